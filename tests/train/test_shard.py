"""What ranks share: weights are DDP's, to the bit or 1e-9 in fp64; a share of the memory; one state.pt."""

import json
from pathlib import Path

import pytest
import torch
from ranks import launch
from toys import sharded

import core
from core import World
from lab.train import shard

MOMENTS = {"adamw": 2, "lion": 1, "sgd": 1}  # numbers of state per weight; those of Muon, Adafactor differ


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def trained(request, tmp_path_factory):
    """Folder of what toys/sharded.py leaves on 2 and on 3 ranks, and what each rank says."""
    folder = tmp_path_factory.mktemp(f"shared_by_{request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert launch("toys.sharded", size=request.param) == [0] * request.param, Path("out.txt").read_text()
    return folder, [json.loads((folder / f"said {rank}.json").read_text()) for rank in range(request.param)]


def test_each_rank_keeps_its_share_of_the_state_and_no_more(trained):
    weights = sum(p.numel() for p in sharded.begun(World(), "sgd", "none")[0].parameters())
    for name in trained[1][0]:
        kind, _, how = name.split()
        if kind not in MOMENTS:
            continue
        kept = [of_rank[name][0] for of_rank in trained[1]]
        if how == "none":
            assert kept == [MOMENTS[kind] * weights] * len(kept)
        else:
            assert sum(kept) == MOMENTS[kind] * weights and max(kept) < 1.1 * sum(kept) / len(kept)


def test_with_a_shared_state_the_weights_are_ddps_to_the_bit(trained):
    """With micro-batches, clipping, a step left out, an overflow, a resume of what was not shared."""
    _, said = trained
    for name in {name.rpartition(" ")[0] for name in said[0]}:
        shas = {of_rank[f"{name} {how}"][2] for how in ("none", "optimizer") for of_rank in said}
        assert len(shas) == 1, name
        assert name != "adamw fp64" or {of_rank[f"{name} none"][3] for of_rank in said} == shas


def test_fully_sharded_and_resumed_into_any_other_the_weights_are_ddps_but_for_rounding(trained):
    """Ranks have 3 and 2, or 2, 2 and 1 micro-batches a step; blocks are computed twice (checkpointing)."""
    folder, said = trained
    for kind in {name.split()[0] for name in said[0]}:
        wanted = torch.load(folder / f"{kind} fp64 none" / "ends 0.pt")[0]
        ends = [end for path in folder.glob(f"{kind} fp64 */ends *.pt") for end in torch.load(path)]
        assert len(ends) == len(said) * {"adamw": 6, "muon": 2, "adafactor": 2}.get(kind, 3)
        for end in ends:
            torch.testing.assert_close(end, wanted, rtol=1e-9, atol=1e-9)


def test_of_a_spike_all_ranks_know_the_gradients_and_rank_0_alone_can_compute_a_row(trained):
    said = trained[1]
    norms, loss = said[0]["adamw fp64 none"][1]
    for how in ("optimizer", "full"):
        assert all(of_rank[f"adamw fp64 {how}"][1][0] == pytest.approx(norms, rel=1e-9) for of_rank in said)
        assert said[0][f"adamw fp64 {how}"][1][1] == pytest.approx(loss, rel=1e-9)


def test_the_gathered_state_is_the_whole_one(trained):
    folder, _ = trained
    files = [folder / f"adamw fp64 {how}" / "state.pt" for how in sharded.SHARDS]
    whole, gathered, full = (torch.load(file, weights_only=True) for file in files)
    assert list(gathered["state"]) == list(full["state"]) == list(range(len(whole["state"])))
    torch.testing.assert_close(gathered, whole, rtol=0, atol=0)
    torch.testing.assert_close(full, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", ["optimizer", "full"])
def test_one_process_goes_on_with_what_several_have_shared(trained, how):
    wanted, _, optimizer, _ = parts = sharded.begun(World(), "adamw", how, "fp64")
    assert shard.line(optimizer) == "shard changes nothing: there is one process"
    sharded.train(World(), parts, range(6))
    model = sharded.resumed(World(), "adamw", how, trained[0] / f"adamw fp64 {how}", "fp64")
    torch.testing.assert_close(model.state_dict(), wanted.state_dict(), rtol=1e-9, atol=1e-9)


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
    plain, shared = (core.make_optimizer(model, "sgd", 0.0) for _ in range(2))
    assert shard.kept_share(plain) == 1 and shard.line(plain) is None
    shard.shard_optimizer(shared, World(size=2))
    assert shard.kept_share(shared) == 12 / 16
    assert shard.line(shared) == "shard optimizer  rank 0 keeps the state of 12 of 16 weights"
