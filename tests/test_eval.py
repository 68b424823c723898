"""eval.py on runs of every script: measured = trained, answers, mistakes."""

import json
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import ranks
from toys.eval import (
    MADE,
    evaluate,
    lines,
    refused,
    result,
    trained,  # noqa: F401 (a fixture)
)
from toys.results import make_run

import core
import eval as script
from core import UserError, World
from lab.compare.facts import find
from lab.data import instructions
from lab.data.paths import text_files
from lab.measure import answers
from lab.run import files


@pytest.fixture
def copy(trained, tmp_path):
    """A run that a test may change."""
    return lambda kind: Path(shutil.copytree(trained(kind), tmp_path / "copies" / trained(kind).name))


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


def test_a_broken_checkpoint_is_named_and_another_used(copy):
    folder = copy("gpt_scratch")
    [name] = result(folder)["test_checkpoints"]
    weights = folder / "checkpoints" / name / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"\0" * 8)
    said = evaluate("--run", folder)
    other = core.tested_or_newest_checkpoint(folder)
    assert (
        f"WARNING {folder}: checkpoint {name} is broken (model.safetensors is not what was written): "
        f"{other} is used" in said
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
    files.write_sealed(folder / "config.json", config)
    assert "is not what the run was trained on" in refused("--run", folder)


def broken_inputs():
    Path("empty").mkdir()
    Path("bad").mkdir()
    Path("bad/config.json").write_text("{")
    Path("strange").mkdir()
    Path("strange/config.json").write_text('{"script": "rm", "constants": {}}')
    Path("semicolons.csv").write_text("a;b\n1;2\n")
    Path("nothing.txt").write_text("")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")


@pytest.mark.parametrize(("argv", "line"), [
    (["--run", "empty"], "neither a run nor a model: it has no config.json"),
    (["--run", "bad"], "bad is no run folder: its config.json cannot be read"),
    (["--run", "strange"], "strange was made by rm: use a run of"),
    (["--run", "adapter", "--data", "nothing.txt"], "adapter is an adapter: merge it into its base"),
    (["--run", "{run}", "--tokenizer", "x"], "is a run and has a tokenizer of its own: drop --tokenizer"),
    (["--run", "nobody/nothing", "--data", "nothing.txt"], "nobody/nothing cannot be fetched"),
    (["--run", "{run}", "--data", "nothing.txt"], "nothing.txt holds no text"),
    (["--run", "{run}", "--data", "semicolons.csv"], "lacks column"),
    (["--run", "{run}", "--data", "absent.txt"], "no such file or folder: absent.txt"),
    (["--run", "{run}", "--data", "python-docs", "--context", "99"], "--context 99 is over the 32 positions"),
    (["--run", "{run}", "--data", "python-docs", "--stride", "40"], "--stride 40 is over the 32 tokens"),
    (["--run", "{run}", "--sort", "loss"], "--sort is read by table, not by measure"),
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


def test_prompts_of_a_text_file_end_at_line_feeds_only():
    prompts = ["What is a river?", "one\u2028two", "page\x0ctwo", "next\x85line", "", "last"]
    Path("prompts.txt").write_bytes("\r\n".join(prompts).encode() + b"\n")
    (file,) = text_files("prompts.txt")
    assert script.prompts_in(file) == prompts


def test_a_row_to_be_answered_is_read_as_one_to_be_trained_on():
    assert script.asked({"instruction": " a ", "input": "nan"}, 1, "t.json") == ("a", "")
    for row in ({"instruction": None}, {"instruction": "nan"}, ["a"], {"instruction": "a\ud800"}):
        with pytest.raises(UserError, match=r"t\.json: row 7 has no usable instruction"):
            script.asked(row, 7, "t.json")


def test_tags_and_presets_name_runs_wherever_runs_are_named():
    tagged = [make_run(f"r{seed}", tag="boss", seed=seed) for seed in (0, 1)]
    make_run("stopped", tag="boss", status="stopped")
    preset = make_run("p", "gpt_scratch", config={"preset": "strong"})
    asked = script.Config(run_folder=("boss", "strong", "runs/run_lora/r0", "gpt2"))
    assert script.named_runs(asked) == [*tagged, preset, "runs/run_lora/r0", "gpt2"]
    assert script.named_runs(script.Config()) == []


def test_without_runs_of_their_own_those_of_smoke_runs_are_pointed_at():
    with pytest.raises(UserError, match=r"no finished run with checkpoints in runs: .* or make one$"):
        script.newest(Path("runs"), "checkpoints")
    Path("runs/smoke/run_lora/20260101_000000/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"make one, or add --smoke for those of smoke runs$"):
        script.newest(Path("runs"), "checkpoints")


def test_tables_of_folders_of_one_name_do_not_overwrite_each_other():
    make_run("real", lr=0.5)
    Path("runs/smoke").mkdir()
    shutil.copytree("runs/run_lora", "runs/smoke/run_lora")
    shutil.copytree("runs/run_lora", "copies/run_lora")
    for folder in ("runs/run_lora", "runs/smoke/run_lora", "copies/run_lora"):
        script.tabulate(script.Config(table=(folder,)), print)
    folders = {path.parent.name for path in Path("runs/tables").glob("*/table.md")}
    assert folders == {"run_lora", "smoke_run_lora", "copies_run_lora"}


def test_answers_of_five_are_among_the_figures_of_a_run_that_answers():
    figures = {"rows": 40, "loss": 2.0, "loss_interval": [1, 3], "accuracy": 0.5, "accuracy_interval": [0, 1]}
    assert "answers" not in script.cells(figures)
    figures |= {"answer_accuracy": 0.25, "answer_accuracy_interval": [0.2, 0.3]}
    assert script.cells(figures)["answers"] == "0.250 ± 0.050"
    assert script.cells(figures | {"rows": 1, "loss_interval": [math.nan] * 2})["loss"] == "2.0000 ± unknown"


def test_rows_of_a_run_that_cannot_be_written_are_one_line_behind_the_figures():
    Path("file").write_text("")
    with pytest.raises(UserError, match=r"^file/run cannot be written .*: the figures above are right"):
        script.write_rows(Path("file/run"), {"losses.jsonl": []})
