"""torch.compile of blocks and encoders as scripts have it: whole graphs, few of them, none of evaluations."""

import functools

import pytest
import torch

import core
from core import World
from lab.data.tokenizers import encoder_tokenizer
from lab.models import gpt, int4
from lab.train import compiling, cpu

SHAPES = {
    "gpt2": {},
    "llama": {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False},
}
HEAD = {"joint": False, "pooling": "first", "head": "linear", "dropout": 0.0}


@pytest.fixture
def graphs(monkeypatch):
    """Sizes of the graphs that dynamo hands over; none is made into code."""
    torch.compiler.reset()
    found = []

    def backend(graph, example_inputs):
        found.append(len(graph.graph.nodes))
        return graph.forward

    counting = functools.partial(torch.compile, backend=backend, fullgraph=True)
    monkeypatch.setattr(torch, "compile", counting)
    yield found
    torch.compiler.reset()


def small_gpt(shape="gpt2", **options):
    torch.manual_seed(0)
    return core.GPT(core.GPTConfig(50, 32, 2, 2, 16, **SHAPES[shape], **options)).train()


def compiled(model, dynamic=True):
    """As a script has it."""
    assert core.wrap_ddp(model, World(), model.h, dynamic) is model
    compiling.switch(True)
    return model


def train(model, shapes, packed=False):
    """A forward and backward of each (rows, tokens)."""
    for rows, length in shapes:
        ids = torch.randint(50, (rows, length))
        model(ids, ids, torch.arange(length).expand(rows, length) // 4 if packed else None).backward()


def look(model):
    """What comes between two steps: evaluations of other numbers of rows, and samples."""
    model.eval()
    with torch.no_grad():
        for rows, length in [(5, 9), (1, 12), (3, 32)]:
            model(torch.randint(50, (rows, length)))
    model.train()
    core.generate(model, [[1, 2, 3]], 5)
    core.generate(model, [[1, 2, 3], [4]], 40)


LENGTHS = [(3, 7), (2, 12), (4, 20), (1, 9), (6, 16), (1, 30)]  # rows and tokens of micro-batches
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("shape", "options", "packed", "most"),
    [
        pytest.param("gpt2", {}, False, 2, id="run_instruct"),
        pytest.param("gpt2", {"checkpointing": True, "dropout": 0.1}, True, 4, marks=slow, id="run_lora"),
    ],
)
def test_rows_of_all_lengths_share_a_graph_and_what_comes_between_costs_none(
    shape, options, packed, most, graphs
):
    """fullgraph: a break would raise. A single row is a graph of its own, and so is the lowest block of a
    frozen base, which is handed what needs no gradient. torch keeps eight."""
    model = small_gpt(shape, **options)
    if packed:
        core.add_lora(model, 4, 4, targets="attention")
    compiled(model)
    look(model)
    assert not graphs
    train(model, LENGTHS, packed)
    look(model)
    train(model, LENGTHS[::-1], packed)
    assert len(graphs) == most


@pytest.mark.slow
def test_fake_quantisation_switched_on_and_off_doubles_the_graphs(graphs):
    """run_mathqa rehearses quantised steps, trains others, then quantised ones; with LoRA eight."""
    model = small_gpt()
    int4.insert_fake_quant(model, 8)
    compiled(model)
    for on in (True, False, True):
        int4.switch(model, on)
        train(model, LENGTHS[:4])
    assert len(graphs) == 4


def test_of_one_length_the_usual_rows_are_one_graph_and_the_rest_of_a_batch_another(graphs):
    """gpt_scratch and run_pretrain_diversity; blocks of one shape share their graph."""
    model = compiled(small_gpt(), dynamic=None)
    for _ in range(2):
        train(model, [(8, 16), (8, 16)])
        look(model)
    assert len(graphs) == 1
    train(model, [(4, 16), (8, 16), (3, 16)])
    assert len(graphs) == 2


def test_an_encoder_is_one_graph_for_all_lengths_and_one_for_a_single_row(graphs):
    """run_preference, whose rows are encoded in groups of similar length."""
    tokenizer = encoder_tokenizer("tiny:", ["one two three"])
    model = core.PairScorer(core.load_encoder("tiny:distilbert", tokenizer), **HEAD)
    core.wrap_ddp(model, World(), [model.encoder])
    compiling.switch(True)
    for lengths in ([9, 9, 8, 8], [5, 30, 30, 5], [7, 7, 6, 20]):
        ids = torch.randint(4, 7, (4, max(lengths)))
        model(ids, lengths, size=2).sum().backward()
        with torch.no_grad():
            model.eval()(ids[:2], lengths[:2], size=1)
        model.train()
    assert 1 <= len(graphs) <= 2


def test_a_compiled_block_computes_what_it_computes_otherwise_and_runs_as_written_without_gradients(graphs):
    model, ids = compiled(small_gpt("llama")), torch.randint(50, (3, 13))
    once, again = model(ids), model(ids)
    assert torch.equal(once, again) and graphs
    with torch.no_grad():
        torch.testing.assert_close(model(ids), once.detach(), rtol=0, atol=1e-6)
        before = len(graphs)
        model(ids[:, :5])
    assert len(graphs) == before


def test_nothing_is_written_to_a_module_while_generating():
    """A compiled block looks at its module's attributes: one more and it would be compiled anew."""
    model = compiled(small_gpt())
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    during = []

    def see():
        during.append({name: set(module.__dict__) for name, module in model.named_modules()})
        assert gpt.SECOND_LAYOUT or not cpu.ONEDNN

    core.generate(model, [[1, 2, 3]], 4, poll=see)
    assert during == [before] * 4 and not gpt.SECOND_LAYOUT


def test_export_takes_any_length():
    model = core.GPT(core.GPTConfig(50, 32, 2, 2, 16)).eval()
    lengths = {"input_ids": {1: torch.export.Dim("length", min=2, max=32)}}
    exported = torch.export.export(model, (torch.ones(1, 5, dtype=torch.long),), dynamic_shapes=lengths)
    for length in (2, 19, 32):
        ids = torch.randint(50, (1, length))
        torch.testing.assert_close(exported.module()(ids), model(ids), rtol=0, atol=1e-6)
