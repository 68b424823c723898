"""--shard full, what needs no other rank: who is refused, how tensors are cut, micro-batches of weight 0, the
memory of the plain model. What several ranks compute is in test_shard.py."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.utils import _to_kwargs
from toys.gpt import ids, random_gpt

import core
import gpt_scratch
import run_instruct
import run_lora
import run_mathqa
import run_preference
from core import UserError, World
from lab.train import batches, fsdp


@pytest.fixture
def sharded(monkeypatch):
    """Of rank 0 of 2, with a twin that is a plain copy."""
    monkeypatch.setattr(fsdp, "sharded_twin", lambda model, world: Copied(model))
    model = random_gpt()
    optimizer = core.make_optimizer(model, "sgd", 0.0)
    return model, optimizer, fsdp.Sharded(model, optimizer, World(size=2))


class Copied(torch.nn.Module):
    """A twin whose parameters have the methods of sharded ones."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        for name, p in model.named_parameters():
            twin = torch.nn.Parameter(p.detach().clone())
            twin.full_tensor = twin.detach().clone
            self.register_parameter(name.replace(".", "_"), twin)

    def named_parameters(self):
        return ((name, getattr(self, name.replace(".", "_"))) for name, _ in self.model.named_parameters())

    def forward(self, loss):
        return loss


def test_only_language_models_and_known_optimizers_are_sharded():
    other = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="--shard full is for language models and adamw, sgd or lion: use"):
        fsdp.Sharded(other, core.make_optimizer(other, "sgd", 0.0), World(size=2))
    model = random_gpt()
    with pytest.raises(UserError, match="--shard full is for language models and adamw, sgd or lion: use"):
        fsdp.Sharded(model, torch.optim.Adagrad(model.parameters()), World(size=2))


@pytest.mark.parametrize(
    ("script", "flags", "named"),
    [(gpt_scratch, ["--compile"], "--compile"), (run_lora, ["--dtype", "fp16"], "--dtype fp16"),
     (run_instruct, ["--mode", "find_lr"], "--mode find_lr"),
     (run_mathqa, ["--method", "full", "--qat", "int4"], "--qat int4")],
)  # fmt: skip
def test_what_does_not_go_with_it_is_refused_before_anything_starts(script, flags, named):
    with pytest.raises(UserError, match=f"--shard full does not go with {named}: use --shard optimizer"):
        core.parsed_config(script.Config, {}, {}, "", ["--shard", "full", *flags])
    assert (
        core.parsed_config(script.Config, {}, {}, "", ["--shard", "optimizer", *flags]).shard == "optimizer"
    )


def test_run_preference_refuses_it_before_it_reads_data():
    with pytest.raises(UserError, match="--shard full is for language models: use --shard optimizer"):
        core.parsed_config(run_preference.Config, {}, {}, "", ["--shard", "full"])


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7])
def test_a_rank_holds_the_rows_that_torchs_chunk_gives_it(rows):
    whole = torch.arange(2.0 * rows).view(rows, 2)
    chunks = list(whole.chunk(3)) + [whole[:0]] * 2
    for rank in range(3):
        of_rank = SimpleNamespace(world=World(rank=rank, size=3))
        torch.testing.assert_close(fsdp.Sharded._rows(of_rank, whole), chunks[rank])


def test_a_rank_with_fewer_micro_batches_repeats_its_last_one_at_no_weight(sharded, monkeypatch):
    _, _, called = sharded
    monkeypatch.setattr(fsdp.dist, "all_reduce", lambda most, op: most.fill_(5))  # of another rank
    seen = [
        (rows, float(called(torch.tensor(3.0)))) for rows in batches.micro_batches(called, [4, 5, 6, 7, 8], 2)
    ]
    assert seen == [([4, 5], 3.0), ([6, 7], 3.0), ([8], 3.0), ([8], 0.0), ([8], 0.0)]
    assert float(called(torch.tensor(3.0))) == 3.0


def test_an_evaluation_is_rehearsed_with_the_plain_model(sharded):
    model, _, called = sharded
    called.eval()
    with torch.no_grad():
        assert called(ids(1, 4)).shape == (1, 4, 23) and called.is_whole and not model.training
    called.train()
    assert model.training


def test_labels_stay_on_the_host_though_torch_moves_what_a_model_is_called_with(sharded, monkeypatch):
    _, _, called = sharded
    seen = []

    def moved(module, inputs, options):
        """As FSDP's own hook does it, which stands in front of all others."""
        (inputs,), (options,) = _to_kwargs(inputs, options, torch.device("meta"), False)
        return inputs, options

    called.twin.register_forward_pre_hook(moved, prepend=True, with_kwargs=True)
    monkeypatch.setattr(
        called.twin, "forward", lambda *inputs, **options: seen.extend((*inputs, *options.values())) or 1.0
    )
    labels, weights, on_card = torch.tensor([1]), torch.tensor([2.0]), torch.tensor([3], device="meta")
    called(on_card, labels, None, weights=weights, z_loss=0.1)
    assert seen[0].device.type == "meta" and seen[1] is labels and seen[3] is weights
    assert seen[2] is None and seen[4] == 0.1


def test_memory_that_is_too_small_is_said_at_once_since_the_others_wait_in_an_exchange(sharded):
    _, optimizer, called = sharded

    def step():
        raise torch.OutOfMemoryError

    parts = SimpleNamespace(model=called, halve=lambda rows: pytest.fail("halved"))
    with pytest.raises(UserError, match="out of memory with --shard full: use a smaller --micro_batch"):
        batches.worst_case(World(size=2), parts, step, optimizer, [], bool)  # no reduction: it has no sibling


def test_the_plain_model_has_memory_only_between_its_use_and_the_next_step(sharded):
    model, optimizer, called = sharded
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sizes = [p.shape for p in model.parameters()]

    def held():
        return sum(p.untyped_storage().nbytes() for p in model.parameters())

    numbers = len(sizes) * 8  # bytes of one each
    assert held() > 100 * numbers
    called(torch.tensor(1.0))
    assert held() == numbers and [p.shape for p in model.parameters()] == sizes
    called.fill()
    torch.testing.assert_close(dict(model.named_parameters()), before, rtol=0, atol=0)
    optimizer.step()  # the weights that it holds are old ones now
    assert held() == numbers
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for _, p in called.named_parameters()
    }
