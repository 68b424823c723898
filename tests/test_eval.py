"""eval.py on runs of every script: measured = trained, answers, mistakes."""

import json
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
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
from lab.errors import OutOfMemory
from lab.measure import answers
from lab.run import files
from lab.train.batches import within_memory


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


def parsed(*argv):
    return core.parse_config(script.Config, {}, {}, "", [str(word) for word in argv])


def test_a_model_that_is_asked_for_its_own_rows_leaves_no_folder_behind_and_is_passed_over_among_others():
    """An empty ./gpt2 was made, and then read instead of the Hub's."""
    for mode in ("measure", "generate"):
        with pytest.raises(UserError, match="nobody: no such folder; a model of the Hub needs --data"):
            script.main(parsed("--mode", mode, "--run", "nobody"), World())
        assert not Path("nobody").exists()
    said, asked = [], parsed("--run", "gpt2", "--data", "own", "x.txt")
    plain, run = script.Subject("gpt2"), script.Subject("r", "run_lora")
    assert script.sets_of([plain, run], asked, said.append) == [["x.txt"], ["own", "x.txt"]]
    assert said == ["gpt2  own: skipped, a model that is no run has no rows of its own"]


FAULTS = {"a rank's memory": OutOfMemory("out of memory"), "data of all": UserError("no such file")}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_of_several_sets_one_failure_is_passed_over_unless_other_ranks_wait_for_this_one(
    size, fault, monkeypatch
):
    """The rank that had run out of memory went on, and the others waited for it for ten minutes."""
    subjects, loaded = [script.Subject("m"), script.Subject("n")], []

    def measured(subject, data, **how):
        subject.loaded = True
        loaded.append([one.name for one in subjects if one.loaded])
        if data == "b":
            raise FAULTS[fault]
        return {"loss": 1.0, "loss_interval": [1, 1], "accuracy": 0.5, "accuracy_interval": [0, 1], "rows": 2}

    monkeypatch.setattr(script, "subjects", lambda cfg, world: subjects)
    monkeypatch.setattr(script, "measure_other", measured)
    said, world = [], World(size=size)
    with pytest.raises(UserError, match=r"2 of 4 failed|out of memory") as error:
        script.measure(parsed("--run", "m", "--data", "b", "c", "own"), world, said.append, int)
    assert ("failed" in str(error.value)) == (size == 1 or fault == "data of all")
    if "failed" in str(error.value):
        assert loaded == [["m"], ["m"], ["n"], ["n"]]  # one model at a time, though `own` is passed over


def test_running_out_of_memory_is_a_ranks_own_error():
    line = "out of memory with 3 rows of 7 tokens at once: use a smaller"
    with pytest.raises(OutOfMemory, match=line), within_memory(3, 7):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("argv", "line"), [
    (["--mode", "generate", "--data", "x", "--dtype", "fp32"], "--dtype is read by measure, not by generate"),
    (["--mode", "generate", "--data", "x", "--max_length", 99], "--max_length is read by measure, not by"),
    (["--mode", "generate", "--data", "x", "--text_column", "y"], "--text_column is read by measure, not"),
    (["--mode", "judge", "--compare", "a", "b"], "--mode judge and --compare are different jobs"),
    (["--mode", "measure", "--table", "a"], "--mode measure and --table are different jobs"),
    (["--mode", "judge", "--out", "x"], "--out: grades lie beside the answers"),
    (["--out", "x"], "--out says nothing of a run's own rows: drop it, or name other --data"),
    (["--max_documents", 3], "--max_documents says nothing of a run's own rows"),
    (["--mode", "generate", "--template", "journal"], "--template says nothing of a run's own rows"),
])  # fmt: skip
def test_a_flag_that_would_change_nothing_is_named(argv, line):
    with pytest.raises(UserError, match=line):
        script.job_of(parsed(*argv))


def test_flags_that_are_read_are_taken():
    for argv in (
        ["--data", "x", "--out", "y", "--dtype", "fp32"],
        ["--mode", "judge", "--pairwise", "--out", "y"],
    ):
        assert script.job_of(parsed(*argv)) in ("measure", "judge")
    assert script.job_of(parsed("--mode", "generate", "--data", "x", "--template", "journal")) == "generate"
    assert script.job_of(parsed("--compare", "a", "b", "--out", "x", "--answer_rows", 0)) == "compare"


def test_what_a_run_has_of_its_own_is_no_flag_of_measuring_it():
    run, plain = make_run("r", template="alpaca"), "some/model"
    argv = ["--data", "rows.json", "--template", "journal", "--run", run]
    with pytest.raises(UserError, match=r"runs/run_lora/r has a template of its own: drop --template"):
        script.subjects(parsed(*argv), World())
    assert len(script.subjects(parsed(*argv, plain), World())) == 2
    other = make_run("s", "gpt_scratch")
    assert len(script.subjects(parsed(*argv[:-1], other), World())) == 1


def test_names_that_no_disk_takes_are_one_line():
    with pytest.raises(UserError, match=r"cannot be read .File name too long.: name another file"):
        script.named_runs(parsed("--run", "x" * 300))


def test_a_run_whose_weights_were_not_tested_says_so_before_it_answers(monkeypatch):
    run = make_run("r", status=None)
    monkeypatch.setattr(script.core, "tested_or_newest_checkpoint", lambda folder: "step_7")
    asked, said = [], []
    monkeypatch.setattr(script, "answer", lambda subject, data, *rest: asked.append((data, list(said))))
    script.generate(parsed("--run", run, "--data", "own", "x.json"), World(), said.append, int)
    note = f"{run} is not finished: its newest whole checkpoint, step_7, is used"
    assert asked == [("own", [note]), ("x.json", [note])]


def test_validation_rows_are_marked_in_the_table_of_several():
    figures = {"rows": 40, "loss": 2.0, "loss_interval": [1, 3], "accuracy": 0.5, "accuracy_interval": [0, 1]}
    assert script.cells(figures | {"part": "val"})["part"] == "val"
    assert "part" not in script.cells(figures | {"part": "test"}) and "part" not in script.cells(figures)


def test_rows_of_a_run_that_cannot_be_written_are_one_line_behind_the_figures():
    Path("file").write_text("")
    with pytest.raises(UserError, match=r"^file/run cannot be written .*: the figures above are right"):
        script.write_rows(Path("file/run"), {"losses.jsonl": []})


def test_a_refusal_leaves_earlier_comparisons_and_tables_as_they_are():
    """It emptied a comparison's folder of its answers and curves, or made an empty one."""
    one, other = make_run("a", lr=1), make_run("b", lr=2, status="stopped")
    asked = parsed("--compare", one, other)
    folder = Path("runs/compare") / script.sides.folder_name(script.sides.sides(asked.compare, Path("runs")))
    folder.mkdir(parents=True)
    (folder / "answers.md").write_text("of an earlier call")
    with pytest.raises(UserError, match="is not finished"):
        script.compare_runs(asked, print)
    assert (folder / "answers.md").read_text() == "of an earlier call"
    with pytest.raises(UserError, match="none of 1 runs is finished"):
        script.tabulate(parsed("--table", other, "--group_by", "lr"), print)
    assert not Path("runs/tables").exists()
