"""--shard optimizer: each rank keeps the optimizer's state of its share of the parameters, updates these and
sends them to the others (ZeRO-1, Rajbhandari et al. 2020). Gradients, norm and clipping are as without it;
so are the weights, bit for bit.
"""

import copy

import numpy as np
import torch
import torch.distributed as dist


class Shares:
    """Who keeps what of an optimizer's state, by hooks around its step. Parameters that a rank does not keep
    have no gradient in its step, so that no optimizer makes any state for them."""

    def __init__(self, optimizer, world):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self.world, self.params = world, params
        self.owners = share_out([p.numel() for p in params], world.size)  # by state_dict's numbers
        if world.size > 1:
            optimizer.register_step_pre_hook(self._leave_to_others)
            optimizer.register_step_post_hook(self._exchange)

    def _leave_to_others(self, *_):
        for p, owner in zip(self.params, self.owners, strict=True):
            if owner != self.world.rank:
                p.grad = None

    def _exchange(self, *_):
        sent = zip(self.params, self.owners, strict=True)
        for work in [dist.broadcast(p.detach(), owner, async_op=True) for p, owner in sent]:
            work.wait()

    def weights(self) -> int:
        """Number of weights whose state this rank keeps."""
        mine = zip(self.params, self.owners, strict=True)
        return sum(p.numel() for p, owner in mine if owner == self.world.rank)

    def fill(self):
        """Nothing: weights are whole on each rank."""

    take = fill

    def own(self, states) -> dict:
        """Of the states of all parameters (number -> name -> value) those that this rank keeps."""
        own = {number: s for number, s in states.items() if self.owners[number] == self.world.rank}
        return copy.deepcopy(own)  # the file that they are mapped from will be removed

    def line(self) -> str:
        """What is said at the start."""
        if self.world.size == 1:
            return "shard changes nothing: there is one process"
        total = sum(p.numel() for p in self.params)
        return f"shard optimizer  rank 0 keeps the state of {self.weights():,} of {total:,} weights"

    def gather(self, states) -> dict:
        """All ranks: their own states. Rank 0 gets those of all parameters, one tensor after the
        other onto its CPU; the others get their own."""
        if self.world.size == 1:
            return states
        outlines = [None] * self.world.size
        outline = {i: {name: _outline(value) for name, value in s.items()} for i, s in states.items()}
        dist.gather_object(outline, outlines if self.world.is_main else None)
        if not self.world.is_main:
            for value in _tensors(states):
                dist.send(value.detach().cpu(), 0)
            return states
        for rank, theirs in enumerate(outlines[1:], 1):
            for state in theirs.values():
                state.update({name: _received(value, rank) for name, value in state.items()})
            states = states | theirs
        return dict(sorted(states.items()))


def share_out(sizes, ranks) -> list[int]:
    """The rank that gets each of these sizes: the largest first, each to who has least so far."""
    loads, owners = np.zeros(ranks, dtype=np.int64), [0] * len(sizes)
    for i in np.argsort(-np.asarray(sizes), kind="stable"):
        owners[i] = int(loads.argmin())
        loads[owners[i]] += sizes[i]
    return owners


def _outline(value):
    """A tensor without its numbers; anything else as it is."""
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _tensors(states) -> list[torch.Tensor]:
    return [v for state in states.values() for v in state.values() if isinstance(v, torch.Tensor)]


def _received(outline, rank):
    if not isinstance(outline, torch.Tensor):
        return outline
    value = torch.empty_like(outline, device="cpu")
    dist.recv(value, rank)
    return value


def shard_optimizer(optimizer, world):
    """Has the ranks share the optimizer's state from here on, where there are several. Before it has any."""
    optimizer.shares = Shares(optimizer, world)


def shares_of(optimizer):
    return getattr(optimizer, "shares", None)


def whole_state(optimizer) -> dict:
    """All ranks: optimizer.state_dict(), which on rank 0 holds what the other ranks keep, too."""
    whole = optimizer.state_dict()
    if shares := shares_of(optimizer):
        whole["state"] = shares.gather(whole["state"])
    return whole


def load_whole_state(optimizer, whole):
    """Restores what whole_state returned on rank 0, with the same or another sharing."""
    if shares := shares_of(optimizer):
        whole = whole | {"state": shares.own(whole["state"])}
    optimizer.load_state_dict(whole)


def fill(optimizer):
    """All ranks: has a script's model hold its weights, which --shard full keeps elsewhere between uses."""
    if shares := shares_of(optimizer):
        shares.fill()


def gradient_norms(optimizer) -> dict[str, float] | None:
    """All ranks: name -> norm of its gradient, where --shard full has spread it over them."""
    shares = shares_of(optimizer)
    return shares.gradient_norms() if hasattr(shares, "gradient_norms") else None


def take(optimizer):
    """Has the shards of --shard full hold what was loaded into the script's model, which is whole."""
    if shares := shares_of(optimizer):
        shares.take()


def kept_share(optimizer) -> float:
    """Of the trained weights, the share whose optimizer state this rank keeps."""
    if not (shares := shares_of(optimizer)):
        return 1.0
    return shares.weights() / sum(p.numel() for group in optimizer.param_groups for p in group["params"])


def line(optimizer) -> str | None:
    """What is said at the start about a shared state."""
    shares = shares_of(optimizer)
    return shares and shares.line()
