"""An optimizer's state that ranks share: the same weights to the bit, a share of the memory, one state.pt."""

import json
from pathlib import Path

import pytest
import torch
from ranks import launch
from toys import sharded

import core
from core import World
from lab.train import shard

KINDS = ("adamw", "lion", "sgd")
MOMENTS = {"adamw": 2, "lion": 1, "sgd": 1}  # numbers of state per weight


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def trained(request, tmp_path_factory):
    """Folder of what toys/sharded.py leaves on 2 and on 3 ranks, and what each rank says."""
    folder = tmp_path_factory.mktemp(f"shared_by_{request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert launch("toys.sharded", size=request.param) == [0] * request.param, Path("out.txt").read_text()
    return folder, [json.loads((folder / f"said {rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_of_ddp_to_the_bit_and_a_rank_keeps_a_share(trained, kind):
    """With clipping, a left-out spike, an overflow, and resumes from either into either."""
    _, said = trained
    weights = sum(p.numel() for p in sharded.begun(World(), kind, "none")[0].parameters())
    for dtype in ("fp16", "fp64"):  # fp16 here: fp32 with a scaler
        plain = [of_rank[f"{kind} {dtype} none"] for of_rank in said]
        shared = [of_rank[f"{kind} {dtype} optimizer"] for of_rank in said]
        assert len({sha for _, *shas in [*plain, *shared] for sha in shas}) == 1
        assert [numbers for numbers, *_ in plain] == [MOMENTS[kind] * weights] * len(said)
        kept = [numbers for numbers, *_ in shared]
        assert sum(kept) == MOMENTS[kind] * weights
        assert max(kept) < 1.1 * sum(kept) / len(said)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gathered_state_is_the_whole_one_to_the_bit(trained, kind):
    folder, _ = trained
    states = [torch.load(folder / f"{kind} fp64 {how}" / "state.pt") for how in ("none", "optimizer")]
    whole, gathered = states
    assert list(gathered["state"]) == list(whole["state"]) == list(range(len(whole["state"])))
    torch.testing.assert_close(gathered, whole, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_goes_on_with_what_several_have_shared(trained, kind):
    folder, _ = trained
    parts = sharded.begun(World(), kind, "optimizer", "fp64")
    sharded.train(World(), parts, range(7))
    for how in ("none", "optimizer"):
        model = sharded.resumed(World(), kind, how, folder / f"{kind} fp64 optimizer", "fp64")
        for p, wanted in zip(model.parameters(), parts[0].parameters(), strict=True):
            torch.testing.assert_close(p, wanted, rtol=1e-9, atol=1e-9)


def test_shares_are_about_equal_and_every_size_has_one_owner():
    sizes = [40, 1, 1, 30, 30, 2, 40, 3]
    owners = shard.share_out(sizes, 3)
    assert len(owners) == len(sizes) and set(owners) == {0, 1, 2}
    pairs = list(zip(sizes, owners, strict=True))
    loads = [sum(size for size, owner in pairs if owner == rank) for rank in range(3)]
    assert max(loads) - min(loads) <= 30
    assert shard.share_out([5, 5], 4) == [0, 1]  # more ranks than parameters: some keep none


def test_what_is_said_and_counted_of_one_share():
    """12 + 4 weights in two tensors."""
    model = torch.nn.Linear(4, 3, bias=False)
    model.extra = torch.nn.Parameter(torch.zeros(4))
    plain = core.make_optimizer(model, "sgd", 0.0)
    assert shard.kept_weights(plain) == 16 and shard.line(plain) is None
    alone = core.make_optimizer(model, "sgd", 0.0)
    shard.shard_optimizer(alone, World())
    assert shard.line(alone) == "shard changes nothing: there is one process"
    assert shard.kept_weights(alone) == 16
    shared = core.make_optimizer(model, "sgd", 0.0)
    shard.shard_optimizer(shared, World(size=2))
    assert shard.kept_weights(shared) == 12
    assert shard.line(shared) == "shard optimizer  rank 0 keeps the state of 12 of 16 weights"
