"""Label smoothing, z-loss, weights and a loss of one's own against torch's autograd, and in a whole model."""

import json

import pytest
import ranks
import torch
import torch.nn.functional as F
from ranks import everywhere
from toys.gpt import ids, random_gpt
from toys.sft import BARE, go, toy_file

import core
import lab.train.objective
from lab.train.objective import objective

OPTIONS = [
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"weighted": True},
    {"label_smoothing": 0.2, "z_loss": 1e-3, "weighted": True},
]


def by_autograd(terms, bias, labels, weights, label_smoothing=0.0, z_loss=0.0):
    """All logits at once."""
    logits = sum(x @ w.t() for x, w in terms) + (0 if bias is None else bias)
    each = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    return (weights * (each + z_loss * logits.logsumexp(-1) ** 2)).sum()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options))
@pytest.mark.parametrize("chunk", [30, 7])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("V", "folds"), [(97, True), (97, False), (128, False)])
def test_loss_and_slopes_are_those_of_autograd(V, folds, bias, adapter, chunk, options, monkeypatch):
    """As a CPU computes them, and as a card does."""
    torch.manual_seed(0)
    monkeypatch.setattr(lab.train.objective, "_is_exact_cpu", lambda *kind: folds)
    slices = lambda x, w: [slice(start, start + chunk) for start in range(0, len(x), chunk)]  # noqa: E731
    everywhere(monkeypatch.setattr, lab.train.loss, "_chunks", slices)
    like, options = {"dtype": torch.float64, "requires_grad": True}, dict(options)
    terms = [(torch.randn(30, 8, **like), torch.randn(V, 8, **like))]
    if adapter:
        terms.append((torch.randn(30, 3, **like), torch.randn(V, 3, **like)))
    b, labels = torch.randn(V, **like) if bias else None, torch.randint(V, (30,))
    weights = torch.rand(30).double() if options.pop("weighted", False) else None
    ours = objective(terms, b, labels, weights, **options)
    plain = torch.ones(30).double() if weights is None else weights
    theirs = by_autograd(terms, b, labels, plain, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    wanted = [*terms[0], *(terms[1] if adapter else ()), *([b] if bias else ())]
    mine, right = torch.autograd.grad(0.3 * ours, wanted), torch.autograd.grad(0.3 * theirs, wanted)
    for got, want in zip(mine, right, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_without_options_it_is_cross_entropy():
    model = random_gpt(vocab_size=40).double()
    x, y = ids(4, 12, vocab_size=40), ids(4, 12, vocab_size=40)
    y[:, :3] = core.IGNORE_INDEX
    torch.testing.assert_close(model(x, y, label_smoothing=0.0), model(x, y), rtol=1e-12, atol=0)


def test_a_model_weighs_rows_and_tokens_and_leaves_out_what_has_no_target():
    model = random_gpt(vocab_size=40).double()
    x, y = ids(4, 12, vocab_size=40), ids(4, 12, vocab_size=40)
    y[:, :3] = core.IGNORE_INDEX
    rows = torch.tensor([1.0, 0.0, 2.0, 0.5]).double()
    alone = [model(x[i : i + 1], y[i : i + 1]) for i in range(4)]
    weighed = sum(w * loss for w, loss in zip(rows, alone, strict=True))
    torch.testing.assert_close(model(x, y, weights=rows[:, None].expand(4, 12)), weighed, rtol=1e-10, atol=0)


def test_a_loss_of_ones_own_takes_no_other_option():
    model = random_gpt(vocab_size=40)
    with pytest.raises(ValueError, match="of_logits computes the whole loss"):
        model(ids(2, 5, vocab_size=40), ids(2, 5, vocab_size=40), of_logits=print, z_loss=0.1)


def test_a_loss_of_ones_own_sees_all_logits_and_is_the_slow_road():
    model = random_gpt(vocab_size=40).double()
    x, y = ids(4, 12, vocab_size=40), ids(4, 12, vocab_size=40)
    own = lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum")  # noqa: E731
    slow, quick = model(x, y, of_logits=own), model(x, y, label_smoothing=0.1)
    torch.testing.assert_close(quick, slow, rtol=1e-10, atol=0)
    weights = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(slow, weights), torch.autograd.grad(quick, weights), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("pack", ["--no-pack", "--pack"])
def test_the_recipe_of_the_docs_trains_and_is_logged_under_a_name_of_its_own(pack, monkeypatch):
    """docs/instruct_and_lora.md, "Changing the loss": two lines of run_lora.py."""
    import run_lora

    text = open(run_lora.__file__).read()
    line = "losses.append(ddp(*batch))"
    assert text.count(line) == 1 and text.count("at.update(optimizer, precision, lr, ") == 1
    text = text.replace(line, "losses.append(ddp(*batch, label_smoothing=0.1))")
    update = "at.update(optimizer, precision, lr, "
    text = text.replace(update, f"{update}objective=True, ")
    edited = {"__name__": "edited", "__file__": run_lora.__file__}
    exec(compile(text, run_lora.__file__, "exec"), edited)
    monkeypatch.setattr(run_lora, "train", edited["train"])
    flags = ["--data", toy_file(), *BARE, "--max_steps", 4, "--log_every", 2, pack]
    _, folder = go("run_lora", *flags)
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/objective" in row] == [2, 4]
    assert not any("train/loss" in row or "train/perplexity" in row for row in rows)
    assert "  objective " in (folder / "log.txt").read_text() and ranks.result()["val/loss"] > 0
