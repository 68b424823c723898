"""--shard full: weights, gradients and optimizer state spread over the ranks by torch's fully_shard (FSDP2).

A script's model stays a plain one, whole when it is evaluated, saved or asked. What is trained is a twin of
it, whose parameters are sharded; from the twin's forward to its own next use the plain one has no memory.
"""

import copy
import itertools
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lab.errors import UserError
from lab.train.optim import Lion


class Sharded:
    """What a script calls in place of its model. Each forward and backward is an exchange of all ranks."""

    def __init__(self, model, optimizer, world):
        if not hasattr(model, "h") or not isinstance(optimizer, torch.optim.AdamW | torch.optim.SGD | Lion):
            kinds = "language models and adamw, sgd or lion"
            raise UserError(f"--shard full is for {kinds}: use --shard optimizer")
        self.model, self.world, self.weight, self.is_whole = model, world, 1.0, True
        names = {p: name for name, p in model.named_parameters()}
        self.twin = sharded_twin(model, world)
        self.twin.register_forward_pre_hook(_unwrapped, with_kwargs=True)  # behind torch's own
        of_twin = dict(self.twin.named_parameters())
        self.pairs = [(p, of_twin[name]) for p, name in names.items()]  # (plain, sharded)
        for group in optimizer.param_groups:
            group["params"] = [of_twin[names[p]] for p in group["params"]]
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.register_step_pre_hook(self.empty)  # the plain weights are about to be the old ones

    def __call__(self, *inputs, **options):
        if not torch.is_grad_enabled():  # the rehearsal of an evaluation, for which the plain model is whole
            return self.model(*inputs, **options)
        self.empty()
        return self.twin(*map(OnHost.wrap, inputs), **_each(OnHost.wrap, options)) * self.weight

    def eval(self):
        self.model.eval()

    def train(self):
        self.model.train()

    def named_parameters(self):
        return self.twin.named_parameters()

    def in_step(self, parts):
        """All ranks: the parts of this rank's rows, then the last one with weight 0, until it has made as
        many as the rank with most."""
        most = torch.tensor(len(parts))
        dist.all_reduce(most, dist.ReduceOp.MAX)
        yield from parts
        self.weight = 0.0
        yield from itertools.repeat(parts[-1], int(most) - len(parts))
        self.weight = 1.0

    # -- the plain model -----------------------------------------------------------------------------------

    @torch.no_grad()
    def fill(self):
        """All ranks: gives the plain model its weights."""
        if not self.is_whole:
            for plain, sharded in self.pairs:
                plain.data = sharded.full_tensor()
        self.is_whole = True

    def empty(self, *_):
        """Frees the plain model's memory; shapes stay, of one number repeated."""
        if self.is_whole:
            for plain, _ in self.pairs:
                plain.data = plain.data.new_empty(()).expand(plain.shape)
        self.is_whole = False

    @torch.no_grad()
    def take(self):
        """Has the shards hold what was loaded into the plain model."""
        for plain, sharded in self.pairs:
            sharded.to_local().copy_(self._rows(plain))

    def gradient_norms(self) -> dict[str, float]:
        """All ranks: name -> norm of its gradient."""
        grads = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        return {name: float(grad.norm().full_tensor()) for name, grad in grads.items()}

    # -- the optimizer's state: as Shares have it ----------------------------------------------------------

    def weights(self) -> int:
        """Number of weights whose state this rank keeps."""
        return sum(p.to_local().numel() for p in self.params)

    def line(self) -> str:
        """What is said at the start."""
        kept = sum(p.to_local().numel() for p in self.twin.parameters())
        total = sum(p.numel() for p in self.twin.parameters())
        return f"shard full  rank 0 keeps {kept:,} of {total:,} weights between evaluations"

    def own(self, states) -> dict:
        """Of whole states (number -> name -> value) this rank's rows."""
        return {number: self._own(self.params[number], state) for number, state in states.items()}

    @torch.no_grad()
    def _own(self, p, state) -> dict:
        own = {n: torch.zeros_like(p) if v.shape == p.shape else v.clone() for n, v in state.items()}
        for name, value in state.items():
            if value.shape == p.shape:
                own[name].to_local().copy_(self._rows(value))
        return own

    def _rows(self, whole):
        """The rows of a tensor that lie on this rank, as fully_shard cuts them."""
        each = -(-len(whole) // self.world.size)
        return whole[self.world.rank * each : (self.world.rank + 1) * each]

    def gather(self, states) -> dict:
        """All ranks: their rows of the states. Rank 0 gets whole ones on the CPU, one tensor after the other;
        the others get none."""
        gathered = {}
        for number, state in states.items():
            whole = {name: _whole(value, self.world.is_main) for name, value in state.items()}
            gathered |= {number: whole} if self.world.is_main else {}
        return gathered


@dataclass
class OnHost:
    """A host tensor that FSDP hands on as it is. Bare labels it would copy to the card, and whoever then asks
    where the targets are waits for it."""

    tensor: torch.Tensor

    @classmethod
    def wrap(cls, value):
        return cls(value) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value

    @classmethod
    def unwrap(cls, value):
        return value.tensor if isinstance(value, cls) else value


def _unwrapped(module, inputs, options):
    """What the model itself is called with."""
    return tuple(map(OnHost.unwrap, inputs)), _each(OnHost.unwrap, options)


def _each(change, options) -> dict:
    return {name: change(value) for name, value in options.items()}


def sharded_twin(model, world):
    """A copy of the model with sharded parameters, which are not copied first: beside the plain weights there
    is memory for the shards alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # of all but the parameters
    for block in twin.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(twin, mesh=mesh)


def _whole(value, keep):
    """A sharded tensor as a whole one on the CPU, where it is kept."""
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    return value.cpu() if keep else None
