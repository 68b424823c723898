"""eval.py on runs of every script: measured = trained, other text, answers, packing, mistakes."""

import csv
import json
import math
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
import transformers
from ranks import everywhere
from test_laws import SHORT

import core
import eval as script
import gpt_scratch
from core import UserError, World
from lab.compare import other_data
from lab.compare.facts import find
from lab.data import builtin, instructions
from lab.measure import answers
from lab.train import loss

FOLDS = ["--smoke", "--max_documents", 90, "--batch", 6, "--epochs", 1, "--folds", 3, "--eval_batch", 17]
MADE = {name: (name, SHORT[name]) for name in ranks.SCRIPTS} | {"folds": ("run_preference", FOLDS)}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """kind -> folder of a short run, made once; a test that changes it takes a copy."""
    known = {}

    def folder(kind):
        if kind not in known:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path_factory.mktemp(f"trained_{kind}"))
                ranks.run(MADE[kind][0], *MADE[kind][1])
                known[kind] = ranks.newest().absolute()
        return known[kind]

    return folder


@pytest.fixture
def copy(trained, tmp_path):
    """A run that a test may change."""
    return lambda kind: Path(shutil.copytree(trained(kind), tmp_path / "copies" / trained(kind).name))


def evaluate(*argv, size=1, codes=None, **options) -> str:
    """What `eval.py argv` says on `size` processes."""
    got = ranks.launch("eval", *argv, size=size, **options)
    assert got == (codes or [0] * size), Path("out.txt").read_text()
    return Path("out.txt").read_text()


def refused(*argv) -> str:
    """The one line that it says instead."""
    said = evaluate(*argv, codes=[2]).strip().splitlines()
    assert len(said) == 1 and said[0].startswith("eval.py: error: "), said
    return said[0]


def result(folder) -> dict:
    return json.loads((folder / "result.json").read_text())


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# measured = trained


def assert_same_figures(found, stored):
    """Counts and words are equal. The run had one thread, this process has several, which add up in another
    order: the last of fp32's seven digits may differ. Some figures are differences of others: abs_tol.
    """
    if isinstance(stored, dict):
        assert found.keys() == stored.keys()
        found, stored = list(found.values()), [stored[name] for name in found]
    if isinstance(stored, list):
        assert len(found) == len(stored)
        for one, other in zip(found, stored, strict=True):
            assert_same_figures(one, other)
    elif isinstance(stored, float):
        assert math.isclose(found, stored, rel_tol=1e-6, abs_tol=1e-6)
    else:
        assert found == stored


@pytest.mark.parametrize("kind", MADE)
def test_a_run_measured_again_has_the_figures_it_was_trained_with(kind, trained):
    found, _ = script.subject(str(trained(kind))).module.remeasure(trained(kind), World())
    stored = {name: value for name, value in result(trained(kind)).items() if name in found}
    assert {"val/accuracy", "test/accuracy"} <= stored.keys() and stored.keys() == found.keys()
    assert_same_figures(json.loads(json.dumps(found)), stored)  # the same batches on one process


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", MADE)
def test_and_so_it_has_on_any_number_of_processes_and_in_any_batch(kind, size, copy):
    folder = copy(kind)
    before = lines(folder / "losses.jsonl") if kind not in ("run_preference", "folds") else None
    said = evaluate("--run_folder", folder, "--eval_batch", 7, size=size)
    assert "as result.json has it" in said  # to a relative 1e-5, see below
    if before:
        after = lines(folder / "losses.jsonl")
        for name in ("row", "group", "hits", "targets", "bytes"):
            assert [line[name] for line in after] == [line[name] for line in before]
        nats = [[line["nats"] for line in some] for some in (before, after)]
        np.testing.assert_allclose(*nats, rtol=1e-5, atol=1e-5)


def test_agreement_names_the_figure_that_is_farthest_away():
    stored = {"test/loss": 2.0, "test/accuracy": 0.5, "test/rows": 10, "test/alarm": None}
    for found in (dict(stored), stored | {"test/loss": 2.0 + 1e-5}):
        same, told = script.agreement(found, stored)
        assert same and told.startswith("as result.json has it")
    told = script.agreement(stored | {"test/loss": 2.001, "test/rows": 11}, stored)
    assert told == (False, "not as result.json has it: test/rows is 11, was 10")
    same, told = script.agreement(stored, {})
    assert not same and "no figures" in told


def test_without_a_name_the_newest_finished_run_is_measured(trained, tmp_path):
    for number, kind in enumerate(("gpt_scratch", "run_instruct")):
        shutil.copytree(trained(kind), tmp_path / "runs" / kind / f"2026010{number + 1}_000000")
    (tmp_path / "runs/run_lora/20270101_000000").mkdir(parents=True)
    said = evaluate()
    assert "runs/run_instruct/20260102_000000\n" in said and "gpt_scratch" not in said
    assert "runs/smoke" in refused("--smoke")


def test_several_runs_on_several_sets_end_in_one_table(trained):
    Path("text.txt").write_text("It was the best of times. " * 30)
    said = evaluate(
        "--run", trained("gpt_scratch"), "--run", trained("run_instruct"), "--data", "own", "text.txt"
    )
    table = [line for line in said.splitlines() if line.startswith("|")]
    assert (
        len(table) == 2 + 4 and [line.split("|")[2].strip() for line in table[2:]] == ["own", "text.txt"] * 2
    )
    assert len(list(Path("runs/eval").glob("*/losses.jsonl"))) == 2


def test_other_text_gives_the_same_on_two_processes(trained):
    Path("text.txt").write_text("It was the best of times, it was the worst of times. " * 40)
    found = []
    for size in (1, 2):
        evaluate("--run_folder", trained("gpt_scratch"), "--data", "text.txt", "--eval_batch", 5, size=size)
        [folder] = Path("runs/eval").iterdir()
        found.append(result(folder))
    same = [name for name in found[0] if name.startswith("test/") and "interval" not in name]
    assert "test/loss" in same
    assert [found[1][name] for name in same] == pytest.approx([found[0][name] for name in same], rel=1e-5)


def test_a_set_that_cannot_be_measured_does_not_end_the_others(trained, copy):
    """Nor does a run that came home without its weights."""
    lost = copy("run_lora")
    shutil.rmtree(lost / "checkpoints")
    Path("text.txt").write_text("It was the best of times. " * 30)
    argv = ["--run", trained("gpt_scratch"), lost, "--data", "absent.txt", "text.txt", "own"]
    said = evaluate(*argv, codes=[2])
    assert said.count("FAILED") == 4 and "eval.py: error: 4 of 6 failed, first" in said
    assert f"FAILED {lost} on own: {lost} has no checkpoint" in said
    table = [line for line in said.splitlines() if line.startswith("|")]
    assert [line.split("|")[2].strip() for line in table[2:]] == ["text.txt", "own"]


# other data


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
            == windows.wanted()[n].tolist()
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
    assert "model is a model, no run with rows of its own: name some by --data" in refused("--run", "model")


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


# answers


def test_a_run_answers_its_own_test_rows_as_it_did(copy):
    folder = copy("run_lora")
    asked = json.loads((folder / "responses.json").read_text())  # 7 of them, see SHORT
    assert len(asked) == 7
    evaluate("--mode", "generate", "--run_folder", folder, "--max_new_tokens", 4, size=2)
    given = {
        row["instruction"] + row["input"]: row for row in json.loads((folder / "responses.json").read_text())
    }
    assert len(given) == result(folder)["test/rows"]
    assert [given[row["instruction"] + row["input"]] for row in asked] == asked


def test_prompts_of_a_file_are_answered_and_keep_their_columns(trained):
    rows = [
        {"instruction": "Name a fruit.", "output": "apple", "category": "knowledge", "id": 7},
        {"instruction": "Write a line.", "input": "on rain", "output": "Rain."},
    ]
    Path("prompts.json").write_text(json.dumps(rows))
    Path("prompts.txt").write_text("Once upon\n\nThe end\n")
    for data in ("prompts.json", "prompts.txt"):
        evaluate(
            "--mode", "generate", "--run", trained("run_instruct"), "--data", data, "--max_new_tokens", 5
        )
    by_name = {
        path.parent.name: json.loads(path.read_text()) for path in Path("runs/eval").glob("*/responses.json")
    }
    [table], [text] = (
        [v for k, v in by_name.items() if kind in k] for kind in ("prompts.json", "prompts.txt")
    )
    assert [{k: v for k, v in row.items() if k != "model_response"} for row in table] == rows
    assert [row["instruction"] for row in text] == ["Once upon", "The end"]
    assert all(isinstance(row["model_response"], str) for row in table + text)
    cfg, model, tokenizer = script.subject(str(trained("run_instruct"))).load(script.Config(), World())
    ids = tokenizer(
        instructions.prompt_text("Name a fruit.", "", cfg.template), add_special_tokens=False
    ).input_ids
    assert table[0]["model_response"] == answers.answers(model, tokenizer, [ids], 5, 1, World())[0]


def test_categories_of_the_rows_reach_the_answers():
    rows = [{"instruction": f"Say {i}.", "output": str(i), "category": "ab"[i % 2]} for i in range(40)]
    rows[0].pop("category")
    Path("rows.json").write_text(json.dumps(rows))
    argv = ["--smoke", "--data", "rows.json", "--max_steps", 0, "--plain_blocks", 0, "--sample_tokens", 0]
    ranks.run("run_instruct", *argv, "--batch", 4, "--max_new_tokens", 1)
    wanted = {row["instruction"]: row.get("category") for row in rows}
    given = json.loads((ranks.newest() / "responses.json").read_text())
    assert given and all(row.get("category") == wanted[row["instruction"]] for row in given)
    assert any("category" in row for row in given)


# packing


@pytest.mark.parametrize("kind", ["run_lora", "folds"])
def test_an_archive_holds_what_measuring_needs_and_no_optimizer(kind, trained):
    folder = trained(kind)
    said = evaluate("--pack", folder, "--out", "away")
    archive = Path("away") / f"{folder.name}.tar.gz"
    assert str(archive) in said and [path.name for path in Path("away").iterdir()] == [archive.name]
    with tarfile.open(archive) as tar:
        names = tar.getnames()
        tar.extractall("home", filter="data")
    assert not any("state.pt" in name or ".lock" in name for name in names)
    unpacked = Path("home/runs") / folder.parent.name / folder.name
    small = {"config.json", "result.json", "log.txt", "metrics.jsonl", "source/core.py"}
    assert all((unpacked / name).read_bytes() == (folder / name).read_bytes() for name in small)
    checkpoints = {path.name for path in (unpacked / "checkpoints").iterdir()}
    assert checkpoints == set(result(folder)["test_checkpoints"])
    assert "as result.json has it" in evaluate("--run", unpacked)
    script_name, argv = MADE[kind]
    code = ranks.launch(
        script_name, *argv, "--out", unpacked.parent, "--resume_timestamp", folder.name, "--epochs", 9
    )
    assert code == [2] and "packed without optimizer state" in Path("out.txt").read_text()
    assert (unpacked / "result.json").read_bytes() == (folder / "result.json").read_bytes()


def test_a_killed_packing_leaves_no_archive_under_its_name(trained, monkeypatch):
    monkeypatch.setattr(tarfile.TarFile, "addfile", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    cfg = core.parse_config(script.Config, {}, {}, "", ["--pack", str(trained("run_lora")), "--out", "away"])
    with pytest.raises(OSError, match="disk full"):
        script.main(cfg, World())
    assert list(Path("away").iterdir()) == []


# what can be wrong


def test_a_broken_checkpoint_is_named_and_another_used(copy):
    folder = copy("gpt_scratch")
    [name] = result(folder)["test_checkpoints"]
    weights = folder / "checkpoints" / name / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"\0" * 8)
    said = evaluate("--run", folder)
    other = core.chosen_checkpoint(folder)
    assert (
        f"WARNING checkpoint {name} is broken (model.safetensors is not what was written): {other} is used"
        in said
    )
    assert f"{folder}\n" in said and "  test  loss" in said
    for path in (folder / "checkpoints").glob("*/model.safetensors"):
        path.write_bytes(b"")
    assert "no checkpoint" in refused("--run", folder)


def test_an_unfinished_run_is_measured_with_its_newest_weights(copy):
    folder = copy("run_instruct")
    (folder / "result.json").unlink()
    said = evaluate("--run", folder)
    assert (
        f"its newest whole checkpoint, {sorted((folder / 'checkpoints').glob('step_*'))[-1].name}, is used"
        in said
    )


def test_data_that_changed_since_the_run_is_refused(copy):
    folder = copy("run_instruct")
    config = json.loads((folder / "config.json").read_text())
    config["facts"]["fingerprint"]["data"] = "other"
    (folder / "config.json").write_text(json.dumps(config))
    assert "is not what the run was trained on" in refused("--run", folder)


def broken_inputs():
    Path("empty").mkdir()
    Path("bad").mkdir()
    Path("bad/config.json").write_text("{")
    Path("strange").mkdir()
    Path("strange/config.json").write_text('{"script": "rm", "constants": {}}')
    Path("semicolons.csv").write_text("a;b\n1;2\n")
    Path("nothing.txt").write_text("")


@pytest.mark.parametrize(("argv", "line"), [
    (["--run", "empty"], "neither a run nor a model: it has no config.json"),
    (["--run", "bad"], "bad is no run folder: its config.json cannot be read"),
    (["--run", "strange"], "strange was made by rm: use a run of"),
    (["--run", "nobody/nothing", "--data", "nothing.txt"], "nobody/nothing cannot be fetched"),
    (["--run", "{run}", "--data", "nothing.txt"], "nothing.txt holds no text"),
    (["--run", "{run}", "--data", "semicolons.csv"], "lacks column"),
    (["--run", "{run}", "--data", "absent.txt"], "no such file or folder: absent.txt"),
    (["--run", "{run}", "--data", "python-docs", "--context", "99"], "--context 99 is over the 32 positions"),
    (["--run", "{run}", "--data", "python-docs", "--stride", "40"], "--stride 40 is over the 32 tokens"),
    (["--run", "{run}", "--sort", "loss"], "measure does not look at --sort"),
    (["--pairwise", "--run", "{run}"], "--pairwise belongs to --mode judge"),
    (["--run", "runs/run_lora/2026"], "no such folder: runs/run_lora/2026"),
    (["--mode", "generate", "--run", "{run}"], "has no instruction rows of its own"),
    (["--pack", "empty"], "empty is no run folder"),
    (["--compare", "{run}", "--table", "{run}"], "different jobs: one at a time"),
    (["--compare", "{run}"], "--compare needs two sides"),
    (["--mode", "judge", "--run", "{run}"], "responses.json is not there: answer first"),
    (["--tabel", "runs"], "unknown flag --tabel: did you mean --table?"),
])  # fmt: skip
def test_bad_input_is_one_line(argv, line, trained):
    broken_inputs()
    said = refused(*(str(trained("gpt_scratch")) if word == "{run}" else word for word in argv))
    assert line in said


@pytest.mark.parametrize("size", [1, 2])
def test_a_signal_ends_measuring_on_all_processes(size, trained):
    """Rank 0 sends it to all in its third batch; nothing was written."""
    argv = ["--run_folder", trained("gpt_scratch"), "--data", "python-docs", "--max_documents", 40]
    sent, codes = ("measuring", 3, signal.SIGTERM), ranks.stopped(size, signal.SIGTERM)
    said = evaluate(*argv, size=size, sent=sent, codes=codes)
    assert "stopped  SIGTERM" in said and not [path for path in Path("runs").rglob("*") if path.is_file()]


def test_what_mode_judge_wants_of_a_folder_is_refused_for_preference_runs(trained):
    assert "judges answers and writes none" in refused(
        "--mode", "generate", "--run", trained("run_preference")
    )
    with pytest.raises(UserError, match="no such folder"):
        find(["nowhere"])
