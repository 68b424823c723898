"""Decoding by a graph writes what decoding without one does; a graph bakes nothing in that changes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys.gpt import GROUPED, PROMPTS, ids, lively_gpt, random_gpt

import core
from core import generate
from lab.models import decoding
from lab.models.decoding import GraphDecoder, KVCache, StaticCache, decoder_of
from lab.models.generate import choose, drawn
from lab.models.gpt import SECOND_LAYOUT


class Recorded(TorchDispatchMode):
    """As a CUDA graph: replays the kernels of a call on the tensors of that call, whatever Python says since.
    The call itself is the first replay."""

    made, replays, refuses = [], 0, None

    def __init__(self, forward, stream):
        super().__init__()
        if Recorded.refuses:
            raise Recorded.refuses
        self.calls, self.ran = [], True
        with self:
            forward()
        Recorded.made.append(self)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function), "a graph cannot read a number"
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        Recorded.replays += 1
        if self.ran:
            self.ran = False
            return
        for function, args, kwargs, out in self.calls:
            again = tree_leaves(function(*args, **kwargs))
            for old, new in zip(tree_leaves(out), again, strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """Every model decodes as on a card with graphs, which are recordings."""
    monkeypatch.setattr(decoding, "captured", Recorded)
    monkeypatch.setattr("lab.models.generate.decoder_of", GraphDecoder)
    Recorded.made, Recorded.replays, Recorded.refuses = [], 0, None
    decoding.note.cache_clear()
    return Recorded.made


def plainly(monkeypatch, *args, **how):
    with monkeypatch.context() as patch:
        patch.setattr("lab.models.generate.decoder_of", decoder_of)
        return generate(*args, **how)


SAMPLED = {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "seed": 3}
SHAPES = {
    "gpt2": {},
    "llama": {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False},
    "grouped": GROUPED,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("choice", [{"temperature": 0}, SAMPLED], ids=["greedy", "sampled"])
def test_a_graph_writes_the_same_tokens_alone_padded_and_where_the_context_slides(
    shape, dtype, choice, graphs, monkeypatch
):
    model = lively_gpt(**SHAPES[shape]).to(dtype)
    for prompts in ([PROMPTS[0]], PROMPTS, [ids(16).tolist(), [4]]):
        graphs.clear()
        rows = generate(model, prompts, 30, **choice)
        assert rows == plainly(monkeypatch, model, prompts, 30, **choice)
        assert len(graphs) == 1 and {len(row) for row in rows} == {30}
        assert min(len(set(row)) for row in rows) > 3


def test_most_tokens_are_replays(graphs):
    generate(lively_gpt(), PROMPTS, 9, temperature=0)
    assert Recorded.replays == 9 - 1 - decoding.WARM_UP  # one comes of reading


def test_a_recorded_graph_that_bakes_a_place_in_writes_other_tokens(graphs, monkeypatch):
    """The check of the check: what Python counts is not seen by a replay."""

    def read(cache, T, device):
        return torch.full_like(cache.padding, cache.place.item())

    def baked(cache, T, device):
        return torch.full_like(cache.padding, 5)

    model = lively_gpt()
    right = generate(model, [[1, 2, 3]], 12, temperature=0)
    with monkeypatch.context() as patch:
        patch.setattr(StaticCache, "positions", read)
        with pytest.raises(AssertionError, match="cannot read a number"):
            generate(model, [[1, 2, 3]], 12, temperature=0)
        patch.setattr(StaticCache, "positions", baked)
        assert generate(model, [[1, 2, 3]], 12, temperature=0) != right


def test_a_stop_id_is_seen_within_8_tokens_and_cuts_the_row_where_it_stands(graphs, monkeypatch):
    model, polled = lively_gpt(), []
    free = generate(model, PROMPTS, 30, temperature=0)
    stop = {free[0][4], free[1][2], free[2][9]}
    how = {"temperature": 0, "stop": stop}
    stopped = generate(model, PROMPTS, 30, **how, poll=lambda: polled.append(1))
    assert stopped == plainly(monkeypatch, model, PROMPTS, 30, **how)
    ends = [min(row.index(token) for token in stop if token in row) for row in free]
    assert [len(row) for row in stopped] == ends and len(polled) == max(ends) // decoding.AT_ONCE + 1


def test_one_decoder_serves_many_calls_with_one_graph_a_shape(graphs, monkeypatch):
    model = lively_gpt(block_size=300)
    decoder = GraphDecoder(model)
    calls = [([[1, 2, 3]], 9), ([[7] * 20], 30), ([[5]], 12), (PROMPTS, 9), ([[2] * 130], 9), ([[1]], 9)]
    counts = []
    for prompts, n in calls:
        rows = generate(model, prompts, n, temperature=0, decoder=decoder)
        assert rows == plainly(monkeypatch, model, prompts, n, temperature=0)
        counts.append(len(graphs))
    assert counts == [1, 1, 1, 2, 3, 4]
    assert not SECOND_LAYOUT


def test_lora_decodes_by_a_graph_merged_or_not(graphs, monkeypatch):
    model = lively_gpt()
    core.add_lora(model, 4, 8)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(p, std=0.2)
    want = plainly(monkeypatch, model, PROMPTS, 20, temperature=0)
    assert generate(model, PROMPTS, 20, temperature=0) == want
    assert generate(core.merge_lora(model), PROMPTS, 20, temperature=0) == want
    assert len(graphs) == 2 and want != plainly(monkeypatch, lively_gpt(), PROMPTS, 20, temperature=0)


ERRORS = [
    RuntimeError("operation not permitted\nwhen capturing"),
    torch.OutOfMemoryError("CUDA out of memory"),
]


@pytest.mark.parametrize("error", ERRORS, ids=["capture", "memory"])
def test_where_no_graph_can_be_made_the_same_tokens_come_and_one_note(error, graphs, monkeypatch, capfd):
    model = lively_gpt()
    Recorded.refuses = error
    for _ in range(2):
        rows = generate(model, PROMPTS, 20, temperature=0)
        assert rows == plainly(monkeypatch, model, PROMPTS, 20, temperature=0) and not graphs
    said = capfd.readouterr().err
    assert said.startswith("NOTE tokens are launched kernel by kernel: no CUDA graph here (")
    assert said.count("\n") == 1 and str(error).split("\n")[0] in said


def test_on_a_cpu_there_is_no_graph_and_each_token_is_looked_at():
    decoder = decoder_of(lively_gpt())
    assert type(decoder) is decoding.Decoder and decoder.at_once == 1


def test_what_memory_held_before_does_not_matter(graphs, monkeypatch):
    """Buffers are not cleared where they are made, and a masked NaN would still be one."""
    model = lively_gpt()
    right = generate(model, PROMPTS, 12, temperature=0)
    empty = torch.Tensor.new_empty
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", lambda t, shape: empty(t, shape).fill_(torch.nan))
        assert generate(model, PROMPTS, 12, temperature=0) == right


def test_a_static_step_sees_what_a_step_sees():
    """Keys, values and masks, one token of two padded rows behind another."""
    model, padding = lively_gpt(), torch.tensor([0, 2])
    prompts, more = torch.tensor([[1, 2, 3], [0, 0, 4]]), torch.tensor([[5], [6]])
    caches = [KVCache(len(model.h), 16, padding) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model.hidden(prompts, cache)
        still = StaticCache(caches[1])
        for _ in range(5):
            a, b = model.hidden(more, caches[0]), model.hidden(more, still)
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    seen = caches[0].length
    assert still.place.item() == seen == 8
    for a, b in zip(caches[0].keys + caches[0].values, still.keys + still.values, strict=True):
        torch.testing.assert_close(a[:, :, :seen], b[:, :, :seen], rtol=0, atol=1e-5)
    places = torch.arange(16)
    assert torch.equal(still.unseen[:, 0, 0] == 0, (places < 8) & (places >= padding[:, None]))


def test_ids_are_drawn_on_a_card_as_multinomial_draws_them():
    probs = (3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(1))).softmax(-1)
    mine, theirs = ([torch.Generator().manual_seed(i) for i in range(5)] for _ in range(2))
    for _ in range(50):
        got = drawn(probs, mine)
        assert torch.equal(got, choose(probs.log(), theirs, 1.0, None, None))
    assert len(set(got.tolist())) > 1


def test_copies_in_half_compute_what_autocast_computes(monkeypatch):
    """By the copies that a card makes, here on a CPU under its autocast."""
    model = lively_gpt().float()
    linears = (module for module in model.modules() if isinstance(module, decoding.Linear))
    layers = [(module, module.weight, module.bias) for module in linears]
    x = torch.tensor(PROMPTS[:1])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = model(x)
        copies = decoding.half_copies(layers, torch.bfloat16)
        assert {weight.dtype for weight, _ in copies.values()} == {torch.bfloat16}
        with monkeypatch.context() as patch:
            for module, copy in copies.items():
                patch.setitem(SECOND_LAYOUT, module, copy)
            assert torch.equal(model(x), want)


@pytest.mark.parametrize("head", ["tied", "untied", "in half"])
def test_under_autocast_logits_are_in_fp32_unless_the_head_is_in_half(head):
    model = random_gpt(tie_head=head == "tied", dtype=torch.float32)
    if head == "in half":
        model.lm_head.to(torch.bfloat16)
    x = torch.tensor([[1, 2, 3]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = model.hidden(x)[:, -1]
        logits = decoding.Decoder(model).read(x, None, 9)
        assert logits.dtype == (torch.bfloat16 if head == "in half" else torch.float32)
    if head != "in half":
        assert torch.equal(logits, model.logits(hidden).detach())


def test_under_autocast_normed_keys_are_kept_in_half_as_values_are(monkeypatch):
    """A card's autocast computes norms in fp32: such keys would be cast anew with every token."""
    model, norm = random_gpt(dtype=torch.float32, **GROUPED), torch.nn.RMSNorm.forward
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda self, x: norm(self, x.float()))
    decoder = decoding.Decoder(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        decoder.read(torch.tensor([[1, 2, 3]]), None, 9)
        decoder.step(torch.tensor([4]))
    kept = {tensor.dtype for tensor in (*decoder.cache.keys, *decoder.cache.values)}
    assert kept == {torch.bfloat16}


def test_a_graph_in_half_precision_writes_what_single_kernels_write_in_it(graphs, monkeypatch):
    model = lively_gpt().float()
    with torch.autocast("cpu", torch.bfloat16):
        rows = generate(model, PROMPTS, 20, temperature=0)
        assert rows == plainly(monkeypatch, model, PROMPTS, 20, temperature=0)
    (graph,) = graphs
    assert torch.bfloat16 in {out.dtype for *_, out in graph.calls if isinstance(out, torch.Tensor)}
    assert rows != plainly(monkeypatch, model, PROMPTS, 20, temperature=0)
