"""A language model on other data than its own: windows, bytes, instruction rows."""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from ranks import everywhere
from toys.eval import (
    evaluate,
    lines,
    refused,
    result,
    trained,  # noqa: F401 (a fixture)
)

import core
import eval as script
import gpt_scratch
from core import World
from lab.data import builtin, instructions
from lab.measure import other_data
from lab.train import loss


@pytest.mark.parametrize(("context", "stride"), [(8, 4), (8, 1), (8, 8), (5, 3), (16, 8)])
def test_windows_count_every_token_once_where_it_has_seen_most(context, stride):
    rng = np.random.default_rng(0)
    documents = [rng.integers(50, size=n) for n in (1, 2, 3, context, context + 1, context + 2, 40, 41)]
    windows = core.Windows(documents, context, stride)
    counted = [np.zeros(len(ids), dtype=int) for ids in documents]
    for n, (number, start, end, first) in enumerate(windows.windows):
        input_ids, labels = windows.batch([n], "cpu")
        assert input_ids.shape[1] == windows.lengths[n] <= context
        kept = labels[0] != core.IGNORE_INDEX
        assert (
            labels[0][kept].tolist()
            == documents[number][first : end + 1].tolist()
            == windows.target_ids()[n].tolist()
        )
        assert [*input_ids[0].tolist(), int(labels[0, -1])] == documents[number][start : end + 1].tolist()
        counted[number][first : end + 1] += 1
        assert start == 0 or first - start > context - stride  # tokens that the first target has seen
    assert all(count[0] == 0 and (count[1:] == 1).all() for count in counted)


def test_a_window_on_a_whole_document_gives_its_cross_entropy(trained):
    """And a short window a higher one than a long one would."""
    model, tokenizer = core.open_model(trained("gpt_scratch"))
    ids = np.array([tokenizer.eos_token_id, *tokenizer("Return the sum of a list of numbers.").input_ids])[
        :32
    ]
    cfg = gpt_scratch.Config(eval_batch=4)
    sums = core.evaluate(model, core.Windows([ids], 32, 16), cfg, World())
    with torch.no_grad():
        logits = model.logits(model.hidden(torch.tensor(ids[None, :-1])))[0].double()
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    assert sums.shape == (1, 3) and sums[0, 2] == len(ids) - 1
    assert sums[0, 0] == pytest.approx(losses.sum().item(), rel=1e-5)
    assert sums[0, 1] == (logits.argmax(-1) == torch.tensor(ids[1:])).sum()
    slid = core.evaluate(model, core.Windows([ids], 6, 3), cfg, World())
    windows, expected = core.Windows([ids], 6, 3), 0.0
    for number, (_, start, end, first) in enumerate(windows.windows):
        with torch.no_grad():
            logits = model.logits(model.hidden(torch.tensor(ids[None, start:end])))[0].double()
        each = torch.nn.functional.cross_entropy(
            logits, torch.tensor(ids[start + 1 : end + 1]), reduction="none"
        )
        expected += each[first - 1 - start :].sum().item()
        assert slid[number, 2] == end + 1 - first
    assert slid[:, 0].sum() == pytest.approx(expected, rel=1e-5)


TEXT = "Plain words, naïve café, 東京 and 🙂 signs.\n\n\tdef f(x):  return x ** 2\n" * 5


def tokenizers():
    yield "bytes", core.make_tokenizer("bytes", lambda: [])
    yield "bpe", core.make_tokenizer("bpe:300", lambda: [TEXT])
    yield "chars", core.make_tokenizer("chars", lambda: [TEXT])
    yield "scratch", core.make_tokenizer("bpe_scratch:280", lambda: [TEXT])


@pytest.mark.parametrize(("name", "tokenizer"), tokenizers())
def test_the_bytes_of_tokens_are_those_of_the_text(name, tokenizer):
    sizes = core.token_bytes(tokenizer)
    assert len(sizes) == len(tokenizer) and sizes[tokenizer.eos_token_id] == 0
    assert sizes[tokenizer(TEXT, add_special_tokens=False).input_ids].sum() == len(TEXT.encode())


def test_the_bytes_of_sentencepiece_tokens_are_those_of_the_text():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", "▁", "▁a", "b", "é", "<0x0A>", "▁▁"])}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = {"unk_token": "<unk>", "eos_token": "</s>"}
    sizes = core.token_bytes(transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special))
    assert sizes.tolist() == [1, 0, 1, 2, 1, 2, 1, 2]


def test_a_model_that_is_uniform_over_bytes_has_8_bits_per_byte_under_every_tokenizer(monkeypatch):
    """Its tokens' probability is 256 to the minus their bytes; figures by token differ."""
    Path("text.txt").write_text(TEXT)
    perplexities = []
    for _, tokenizer in tokenizers():
        sizes = torch.from_numpy(core.token_bytes(tokenizer)).double()

        def uniform(terms, bias, labels, sizes=sizes):
            return -sizes[labels] * math.log(256), torch.zeros(len(labels), dtype=torch.bool)

        everywhere(monkeypatch.setattr, loss, "token_log_probs", uniform)
        model = core.GPT(core.GPTConfig(len(tokenizer), 16, 1, 2, 8))
        stored = gpt_scratch.Config(eval_batch=8)
        asked = script.Config(context=12)
        found = other_data.measure_text("text.txt", stored, model, tokenizer, asked, World(), int)
        metrics, notes, written = found.metrics, found.lines, found.file
        assert metrics["bits_per_byte"] == pytest.approx(8, rel=1e-12)
        assert metrics["bits_per_byte_interval"] == pytest.approx([8, 8], rel=1e-12)
        assert metrics["bytes"] == len(TEXT.encode()) and len(notes) == 1
        assert sum(line["bytes"] for line in written[1]) == len(TEXT.encode())
        perplexities.append(metrics["perplexity"])
    assert max(perplexities) > 1.5 * min(perplexities)


def test_bits_are_per_byte_of_the_text_where_a_tokenizer_loses_some(monkeypatch):
    """Uncased, it spells fewer bytes, or other ones, than the text has."""
    text = TEXT + "Ünïcödé " * 400
    Path("text.txt").write_text(text)
    tokenizer = core.make_tokenizer("ascii", lambda: [])
    monkeypatch.setattr(other_data, "evaluate", lambda model, windows, *rest: np.ones((len(windows), 3)))
    model = SimpleNamespace(config=SimpleNamespace(block_size=64))
    found = other_data.measure_text("text.txt", None, model, tokenizer, script.Config(), World(), int)
    size = len(text.encode())
    assert found.metrics["bytes"] == size
    assert found.metrics["bits_per_byte"] == pytest.approx(len(found.file[1]) / math.log(2) / size)
    assert sum(line["bytes"] for line in found.file[1]) == pytest.approx(size)
    assert "bits are per byte of the text" in " ".join(found.lines)


def test_without_a_context_windows_have_a_sane_length_and_what_the_model_holds_is_said(monkeypatch):
    """One that advertises 131,072 positions read a book in one window."""
    Path("text.txt").write_text(TEXT * 60)
    tokenizer = core.make_tokenizer("bytes", lambda: [])
    monkeypatch.setattr(other_data, "evaluate", lambda model, windows, *rest: np.ones((len(windows), 3)))
    for most, asked, context in ((131_072, None, 2048), (131_072, 9000, 9000), (300, None, 300)):
        model = SimpleNamespace(config=SimpleNamespace(block_size=most))
        cfg = script.Config(context=asked)
        found = other_data.measure_text("text.txt", None, model, tokenizer, cfg, World(), int)
        assert found.constants["context"] == context and f"windows of {context}, " in " ".join(found.lines)
        assert ("the model holds 131,072 tokens: --context" in " ".join(found.lines)) == (context == 2048)


def test_a_transformers_model_has_the_loss_that_transformers_gives_it():
    torch.manual_seed(0)
    tokenizer = core.make_tokenizer("bpe:300", lambda: [TEXT])
    shape = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": len(tokenizer)}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "initializer_range": 0.5}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **ends)).eval()
    theirs.save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("text.txt").write_text("A short text.")
    said = evaluate("--run", "model", "--data", "text.txt")
    ids = torch.tensor(
        [[tokenizer.eos_token_id, *tokenizer("A short text.").input_ids, tokenizer.eos_token_id]]
    )
    with torch.no_grad():
        wanted = theirs(ids, labels=ids).loss.item()
    [folder] = Path("runs/eval").iterdir()
    assert result(folder)["test/loss"] == pytest.approx(wanted, rel=1e-5)
    assert result(folder)["test/targets"] == ids.shape[1] - 1 and f"loss {wanted:.3f}" in said
    assert "model is a model, no run with rows of its own: use --data" in refused("--run", "model")


@pytest.mark.slow
def test_instruction_rows_of_a_file_get_the_loss_that_the_run_gives_them(trained):
    folder = trained("run_instruct")
    cfg, _, tokenizer = script.subject(str(folder)).load(script.Config(), World())
    data = core.load_instructions(cfg, World(), tokenizer)
    rows = instructions.examples_of(data, cfg)[0]["test"].rows
    Path("rows.json").write_text(json.dumps([data.columns(row) for row in rows]))
    evaluate("--run", folder, "--data", "rows.json")
    [other] = Path("runs/eval").iterdir()
    for name in ("loss", "accuracy", "targets", "bits_per_byte"):
        assert result(other)[f"test/{name}"] == pytest.approx(result(folder)[f"test/{name}"], rel=1e-6)
    own = {line["group"]: line["nats"] for line in lines(folder / "losses.jsonl")}
    assert {line["group"]: line["nats"] for line in lines(other / "losses.jsonl")} == pytest.approx(
        own, rel=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run_preference", "folds"])
def test_preference_rows_of_a_file_get_the_log_loss_that_the_run_gives_them(kind, trained):
    """Of folds the three models are averaged, so there only the rows and the card are looked at."""
    folder = trained(kind)
    chosen = {line["row"] for line in lines(folder / "predictions.jsonl") if line["split"] == "test"}
    rows = [row for number, row in enumerate(builtin.python_pairs()) if number in chosen]
    with open("rows.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    said = evaluate("--run", folder, "--data", "rows.csv")
    [other] = Path("runs/eval").iterdir()
    assert result(other)["test/rows"] == len(rows) == len(lines(other / "predictions.jsonl"))
    assert "rows  log loss" in said and "lengths only" in said
    if kind != "folds":
        assert result(other)["test/log_loss"] == pytest.approx(result(folder)["test/log_loss"], rel=1e-5)


def test_the_split_of_a_hub_set_is_said_and_kept():
    Path("rows.jsonl").touch()
    assert [other_data.split_of(name) for name in ("python-docs", "python-instructions", "rows.jsonl")] == [
        {}
    ] * 3
    assert other_data.split_of("owner/set") == {"split": "train"}
    (line,) = other_data.split_lines("owner/set:en#test", other_data.split_of("owner/set:en#test"))
    assert line.startswith("split test of owner/set:en#test: ")
    with pytest.raises(core.UserError, match="no such file"):
        other_data.split_of("absent.jsonl")


def test_the_kind_of_a_table_is_decided_by_its_first_rows_together():
    rows = [{"instruction": "a"}, {"id": 1}, {"instruction": "b", "output": "c"}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert other_data.kind_of("rows.jsonl", "text") == "rows"


def test_data_are_known_as_those_that_a_run_read_and_the_neutral_text_of_a_mixture_is_not():
    """It was the other way round: `data` of a mixture is the text that nobody trains on."""
    alone = {"fingerprint": {"data": "x", "tokenizer": "t"}}
    mixed = {"fingerprint": {"data": "neutral", "sources": {"a": "x", "b": "y"}, "tokenizer": "t"}}
    known = [[name for name in ("x", "y", "neutral", "t") if other_data.was_trained_on(name, facts)]
             for facts in (alone, mixed, {})]  # fmt: skip
    assert known == [["x"], ["x", "y"], []]
