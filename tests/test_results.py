"""Tables, means over seeds and pictures, from run folders made by hand: every cell against its file."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import PROJECT
from matplotlib.figure import Figure

import core
from lab.compare import facts, plots, tables
from lab.run import provenance

CONSTANTS = {"data": "rows.json", "text_column": "text", "max_documents": None, "split_seed": 42}
CONSTANTS |= {"val_share": 0.1, "test_share": 0.1, "model": "/some/models/tiny", "lora_rank": 16, "lr": 0.01}
CONSTANTS |= {"batch": 24, "seed": 0, "price_per_hour": None, "note": "", "out": None, "tag": None}
FIGURES = {"step": 75, "seconds": 90.0, "parameters": 1234567, "peak_memory_mb": 512.4, "test/loss": 2.5}
FIGURES |= {"tokens_per_second": 1234.5, "test/loss_interval": [2.25, 2.75], "test/accuracy": 0.25}
FIGURES |= {"test/accuracy_interval": [0.2, 0.3]}
STEPS = [{"step": step, "train/loss": 4 - step / 100} for step in (25, 50, 75)]
STEPS += [{"step": 75, "val/loss": 2.9}]


def make_run(name, script="run_lora", status="finished", result=(), config=(), files=(), **constants):
    """A run folder without checkpoints. `files`: name -> what a .json holds, lines of a .jsonl, or text."""
    folder = Path("runs", script, name)
    folder.mkdir(parents=True)
    stored = {"script": script, "constants": CONSTANTS | constants, "preset": None, "device": "cpu"}
    stored |= {"facts": {"fingerprint": {"data": "abc"}}} | dict(config)
    told = {"status": status, "weights_sha256": f"of {name}"} | FIGURES | dict(result)
    written = {"config.json": stored, "result.json": told if status else "", "metrics.jsonl": STEPS}
    for file, content in (written | dict(files)).items():
        if isinstance(content, list) and file.endswith(".jsonl"):
            content = "".join(json.dumps(line) + "\n" for line in content)
        if content:
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


def refused(match, job, *args):
    with pytest.raises(core.UserError, match=rf"\A(?=.+\Z).*{match}"):
        job(*args)


def rows_of(text) -> list[dict]:
    lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1 and set("".join(lines[1])) == {"-"}
    assert len(lines) > 2 and all(line[0] == line[-1] == "" for line in lines)
    return [dict(zip(lines[0][1:-1], line[1:-1], strict=True)) for line in lines[2:]]


def table(order=None, by=()) -> list[dict]:
    found = facts.find(sorted(map(str, Path("runs").iterdir())))
    return rows_of(tables.grouped(found, by, order) if by else tables.table(found, order))


def test_every_cell_of_the_table_is_what_the_small_files_say():
    judged = {"llama3": {"score": 61.5, "score_interval": [58, 65]}, "mute": {"score": None}}
    make_run("b", result={"seconds": 5400.0}, price_per_hour=2.5, note="the base", seed=1)
    figures = {"val/loss": 1.0, "test/perplexity": 12.18249, "test/bits_per_byte": 1.25, "seconds": 30.0}
    figures |= {"trainable_parameters": 54272, "tokens_per_second": None, "examples_per_second": 2.345}
    make_run("a", result=figures, lr=3e-4, lora_rank=8, files={"judged.json": judged})
    text = tables.table(facts.find(["runs/run_lora"]))
    assert text.splitlines()[0] == "2 runs  script run_lora  data rows.json  device cpu"
    same = {"model": "models/tiny", "batch": "24", "loss": "2.5000 ± 0.2500", "accuracy": "0.250 ± 0.050"}
    same |= {"parameters": "1,234,567", "memory MB": "512"}
    a = {"run": "a", "lr": "0.0003", "rank": "8", "seed": "0", "perplexity": "12.182", "bits/byte": "1.2500"}
    a |= {"judge llama3": "61.50 ± 3.50", "min": "0.5", "trained": "54,272", "rate": "2.35 examples/s"}
    b = {"run": "b", "lr": "0.01", "rank": "16", "seed": "1", "min": "90.0", "note": "the base"}
    b |= {"rate": "1234 tokens/s", "dollars": "3.75"}
    found = [{name: cell for name, cell in row.items() if cell} for row in rows_of(text)]
    assert found == [same | a, same | b]


def test_columns_are_those_that_tell_runs_apart_or_hold_something():
    for rank in (4, 8):
        make_run(f"r{rank}", lora_rank=rank, dropout=rank / 10, pack=rank > 4, clip=1, tag=f"t{rank}")
    rows = table()
    assert [(row["dropout"], row["pack"]) for row in rows] == [("0.4", "False"), ("0.8", "True")]
    assert not {"clip", "tag", "seed", "script", "note", "dollars", "unfinished", "epochs"} & rows[0].keys()
    make_run("elsewhere", config={"device": "NVIDIA H100"}, note="a | b\n\n|c\r\nd")  # breaks no table
    assert [row["device"] for row in table()] == ["NVIDIA H100", "cpu", "cpu"]
    assert table()[0]["note"].split() == ["a", "/", "b", "/c", "d"]


def smoothing_runs():
    """Before a constant was added to run_lora.py; with it, as none and as a number; of another script."""
    make_run("before")
    make_run("none", label_smoothing=None)
    make_run("some", label_smoothing=0.1)
    make_run("other", script="run_instruct", freeze_blocks=2)


def test_a_constant_that_only_some_runs_of_a_script_have_is_a_column_and_absent_is_not_none():
    smoothing_runs()
    assert [row["label_smoothing"] for row in table()] == ["absent", "", "absent", "0.1"]
    assert "freeze_blocks" not in table()[0]  # all runs of its script have the same
    by = {row["label_smoothing"]: row for row in table(by=["label_smoothing"])}
    assert {value: row["runs"] for value, row in by.items()} == {"absent": "2", "none": "1", "0.1": "1"}
    assert by["absent"]["also differ in"] == "script"
    make_run("again", script="run_instruct")
    assert [row["freeze_blocks"] for row in table()] == ["absent", "absent", "absent", "2", "absent"]
    (row,) = table(by=["lr"])
    assert row["also differ in"] == "script, label_smoothing, freeze_blocks"
    make_run("measured", script="eval", config={"kind": "rows"})  # has no constants of training to lack
    assert [row["label_smoothing"] for row in table() if row["script"] == "eval"] == [""]


def source(first="x = 1\n", imported="", also="never imported"):
    """source/ of a run of run_lora.py, which imports sft.py, which imports core.py."""
    files = {"run_lora.py": f"import sft\n{first}", "sft.py": "def f():\n    import core\n"}
    files |= {"core.py": f"import torch\n{imported}", "judge.py": also}
    return {f"source/{name}": text for name, text in files.items()}


def test_runs_of_other_code_have_another_number_and_a_note_below_the_table():
    make_run("a", files=source())
    make_run("b", files=source(also="changed, and not imported"), seed=1)
    assert "NOTE" not in tables.table(facts.find(["runs/run_lora"])) and "code version" not in table()[0]
    make_run("c", files=source(first="x = 2\n"), seed=2)
    make_run("d", files=source(imported="y = 1\n"), seed=3)
    make_run("e")
    make_run("f", script="run_instruct", files={"source/run_instruct.py": "import torch"})
    rows = {row["run"]: row["code version"] for row in table()}
    assert rows == {"a": "1", "b": "1", "c": "2", "d": "3", "e": "unknown", "f": ""}
    found = facts.find(["runs/run_lora"])
    note = (
        "NOTE core.py, run_lora.py are not the same in all of these runs:\n  diff -r runs/run_lora/a/source "
    )
    for text in (tables.table(found), tables.grouped(found, ["lr"])):
        assert f"\n\n{note}" in text
    assert rows_of(tables.grouped(found, ["lr"]))[0]["also differ in"] == "core.py, run_lora.py"


def resumes(*entries):
    """config.json's list: (step, {name: (was, is)}), or a step alone as runs had it once."""
    entries = [entry if isinstance(entry, tuple) else (entry, None) for entry in entries]
    return {"resumes": [{"step": step} if changed is None else {"step": step, "other_code": []}
            | {"changed": {name: {"was": was, "is": now} for name, (was, now) in changed.items()}}
            for step, changed in entries]}  # fmt: skip


def resume_notes(name, *entries, other_code=(), **constants):
    config = resumes(*entries)
    for entry in config["resumes"] if other_code else ():
        entry["other_code"] = list(other_code)
    folder = make_run(
        name, config=config, files=source(), **{"schedule": "cosine", "warmup": 0.1} | constants
    )
    return facts.resume_notes([(name, facts.read(folder))])


def test_a_resume_with_another_length_is_told_and_one_that_goes_on_as_before_is_not():
    end = ": its learning rate followed another schedule until then"
    longer = {"epochs": (3, 6), "max_steps": (10, None), "micro_batch": (1, 2), "final_eval": (True, False)}
    text = "NOTE a was resumed at step 40 with epochs 6 (before: 3), max_steps none (before: 10)"
    assert resume_notes("a", (10, {}), (40, longer)) == [text + end]
    assert resume_notes("b", (40, longer), schedule="constant", warmup=0) == [text.replace("a", "b", 1)]
    assert resume_notes("c", (40, {}), (60, {"keep": (2, 3)}), (0, longer)) == []
    assert resume_notes("d", (40, {"epochs": (3, 6)}), (40, {"epochs": (6, 3)})) == []  # and back again
    back = [(40, {"epochs": (3, 6)}), (60, {"epochs": (6, 8)}), (20, {})]  # of an older checkpoint
    assert resume_notes("e", *back) == [f"NOTE e was resumed at step 20 with epochs 8 (before: 3){end}"]
    untold = "NOTE resumed, perhaps with another length (not recorded): f at step 7, f at step 9"
    assert resume_notes("f", 0, 7, 9) == [untold]
    code = "NOTE g was resumed at step 5 with another core.py than its source/ has"
    assert resume_notes("g", (5, {}), other_code=["judge.py", "core.py"]) == [code]
    text = tables.table(facts.find(["runs/run_lora"]))
    assert "|\n\nNOTE a was resumed at step 40 " in text and text.endswith(f"{code}\n{untold}")


@dataclasses.dataclass
class Resumed:
    """Constants of a script at a resume."""

    epochs: int = 6
    lr: float = 0.1
    tag: str | None = None
    arms: tuple = ("a",)
    label_smoothing: float = 0.0


def test_a_resume_records_which_constants_and_files_are_not_those_it_began_with():
    stored = {"epochs": 3, "lr": 0.1, "lost": 1, "tag": "x", "arms": ["a"]}
    Path("run_other.py").write_text("x = 2\n")
    began = {"source/run_other.py": "x = 1\n", "source/core.py": (PROJECT / "core.py").read_text()}
    folder = Path(make_run("a", config={"constants": stored, "resumes": []}, files=began))
    run = SimpleNamespace(folder=folder, resumed=True, position={"step": 7}, script=Path("run_other.py"))
    run.world, run.cfg, run.say = core.World(), Resumed(), print
    provenance.write_provenance(run)
    (entry,) = core.read_config(folder)["resumes"]
    wanted = {"epochs": {"was": 3, "is": 6}, "lost": {"was": 1}, "label_smoothing": {"is": 0.0}}
    assert (entry["step"], entry["changed"], entry["other_code"]) == (7, wanted, ["run_other.py"])


def test_runs_are_sorted_with_ties_kept_and_unfinished_ones_say_how_far_they_came():
    for name, loss, lr in (("d", 2.0, 1e-3), ("c", 10.0, 1e-2), ("b", None, 1e-3), ("a", 2.0, None)):
        make_run(name, result={"test/loss": loss}, lr=lr)
    make_run("p", script="run_preference", result={"test/loss": None, "test/log_loss": 1.0})
    wanted = {None: "abcdp", "loss": "padcb", "lr": "bdcpa", "seed": "abcdp"}
    assert {order: "".join(row["run"] for row in table(order)) for order in wanted} == wanted
    half = '{"step": 25, "train/loss": 4.0}\n{"step": 50, "val/loss": 3.25}\n{"step": 75, "val/lo'
    lives = [(None, {"metrics.jsonl": half}), ("finished", {"result.json": '{"status": "finished", "st'})]
    lives += [("stopped", {"metrics.jsonl": STEPS[:1]}), (None, {"metrics.jsonl": None}), ("failed", {})]
    for name, (status, files) in zip("abcdef", [*lives, ("finished", {})], strict=True):
        make_run(name, "lives", status, files=files)
    wanted = ["running or killed at step 50, val 3.2500", "running or killed at step 75, val 2.9000"]
    wanted += ["stopped at step 25", "running or killed at step 0", "failed at step 75, val 2.9000", ""]
    assert [row["unfinished"] for row in table() if row["script"] == "lives"] == wanted


def test_groups_show_mean_and_deviation_over_seeds_and_those_without_figures_come_last():
    losses = {(16, 0.1): [1.5, 1.75], (4, 0.1): [2.0, 2.5, 2.1], (4, 0.2): [3.0]}  # the lowest mean first
    wanted = []
    for (rank, lr), values in losses.items():
        for seed, loss in enumerate(values):
            figures = {"test/loss": loss, "test/accuracy": loss / 7, "seconds": 60.0 * (seed + 1)}
            files = {"judged.json": {"j": {"score": 10 * loss, "score_interval": [0, 1]}}}
            make_run(f"{rank}-{lr}-{seed}", result=figures, lora_rank=rank, lr=lr, seed=seed, files=files)
        n, values = len(values), np.array(values)
        row = {"lora_rank": f"{rank}", "lr": f"{lr}", "runs": f"{n}", "seeds": " ".join(map(str, range(n)))}
        shown = {"loss": (values, 4), "accuracy": (values / 7, 4), "judge j": (values * 10, 2)}
        for name, (of, digits) in (shown | {"min": (1 + np.arange(n), 1)}).items():
            row[name] = f"{of.mean():.{digits}f}" + (f" ± {of.std(ddof=1):.{digits}f}" if n > 1 else "")
        wanted.append(row)
    for name, status in (("lost", None), ("cut", "stopped")):
        make_run(name, status=status, result={"test/loss": 99.0}, lora_rank=4, lr=0.1)
    text = tables.grouped(facts.find(["runs/run_lora"]), ["lora_rank", "lr"], "loss")
    assert rows_of(text) == wanted and text.endswith("\nnot counted, unfinished: cut, lost")
    four, sixteen = table(by=["lora_rank"])
    assert [four["also differ in"], sixteen["also differ in"], four["runs"]] == ["lr", "", "4"]
    assert four["loss"] == f"2.4000 ± {np.std([2.0, 2.5, 2.1, 3.0], ddof=1):.4f}"
    make_run("answers", script="eval", files={"result.json": {"status": "finished", "step": 0}}, lora_rank=2)
    last = table("loss", ["lora_rank"])[-1]  # no figure to be sorted by, and no minutes
    assert (last["lora_rank"], last["loss"], last["min"]) == ("2", "", "")


def test_folders_stand_for_their_runs_each_once():
    a, b, c = make_run("a"), make_run("b"), make_run("c", script="run_preference")
    assert [f.name for f in facts.find([b, "runs/run_lora", f"runs/../{a}/", c])] == ["b", "a", "c"]
    refused("runs holds no run: use runs/run_lora runs/run_preference", facts.find, ["runs"])
    refused("no such folder: nowhere", facts.find, ["nowhere"])
    for text in ('{"model_type": "gpt2"}', '{"script": "run_lora", "const', "[1, 2]", ""):
        Path(a, "config.json").write_text(text)
        refused(f"{a} is no run folder", facts.find, [a])


@pytest.mark.parametrize("n", [0, 1, 3, 30])
def test_every_run_has_its_curves(monkeypatch, n):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    steps, names = np.arange(1, 41), [f"tag{i}" for i in range(n)]
    for i, tag in enumerate(names):
        curve = [{"step": s, "train/loss": 5 + i - s / 10, "val/loss": 6 + i - s / 10} for s in range(1, 41)]
        make_run(f"{i:02}", tag=tag, result={"test/loss": n - i}, seed=i % 2, files={"metrics.jsonl": curve})
    make_run("without", tag="none", files={"metrics.jsonl": ""})
    plots.draw(facts.find(["runs/run_lora"]), "curves.png")
    assert Path("curves.png").read_bytes()[:4] == b"\x89PNG"
    assert [text.get_text() for of in drawn[0].legends for text in of.get_texts()] == names * (n < 30)
    train, val = (panel.get_lines() for panel in drawn[0].axes)
    assert [line.get_label() for line in train] == [line.get_label() for line in val] == names
    assert len({(str(line.get_color()), line.get_linestyle()) for line in val}) == n
    for i in range(n):
        np.testing.assert_allclose(val[i].get_xydata(), np.c_[steps, 6 + i - steps / 10])
        means = 5 + i - np.r_[1, (steps[1:] + steps[:-1]) / 2] / 10  # of two: a 20th of 40 points
        np.testing.assert_allclose(train[i].get_xydata(), np.c_[steps, means])
    plots.draw(facts.find(["runs/run_lora"]), "by.png", ["seed", "lr"])
    lines = [(line.get_label(), line.get_color()) for line in drawn[1].axes[1].get_lines()]
    assert sorted(lines) == sorted([("0, 0.01", "C0"), ("1, 0.01", "C1")][i % 2] for i in range(n))


def test_tensorboard_reads_constants_and_figures_back():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    files = {"judged.json": {"j": {"score": 61.5}, "mute": {"score": None}}}
    one = make_run("a", lr=0.125, schedule="cosine", pack=True, tag="t", warmup=None, files=files)
    make_run("b", lr=0.25, schedule="linear", pack=False, warmup=3)
    make_run("c", status="stopped")
    found = facts.find(["runs/run_lora"])
    assert plots.write_hparams(found) == plots.write_hparams(found) == 2
    assert [path.parts[2] for path in sorted(Path("runs").rglob("events*"))] == ["a", "b"]  # one each
    events = EventAccumulator(f"{one}/hparams").Reload()
    said = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    values = HParamsPluginData.FromString(said).session_start_info.hparams
    read = {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}
    wanted = {"script": "run_lora", "tag": "t", "lr": 0.125, "seed": 0, "schedule": "cosine", "pack": True}
    assert {name: value for name, value in read.items() if value != ""} == wanted
    scalars = {tag: [(s.step, s.value) for s in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars == {"final/loss": [(75, 2.5)], "final/accuracy": [(75, 0.25)], "judge/j": [(75, 61.5)]}


def test_tensorboard_shows_a_constant_that_a_script_did_not_have_as_absent():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    smoothing_runs()
    plots.write_hparams(facts.find(["runs/run_lora", "runs/run_instruct"]))
    found = {}
    for path in Path("runs").glob("*/*/hparams"):
        content = EventAccumulator(str(path)).Reload().PluginTagToContent("hparams")
        values = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
        if "label_smoothing" in values.hparams:
            value = values.hparams["label_smoothing"]
            found[path.parent.name] = value.string_value or value.number_value
    assert found == {"before": "absent", "other": "absent", "some": 0.1}  # none is left out


def evaluate(*args):
    command = [sys.executable, str(PROJECT / "eval.py"), *args]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_table_from_the_command_line():
    for name in ("run_instruct/0", "run_instruct/1", "run_lora/0", "run_lora/1"):
        make_run(name[-1], name[:-2], seed=int(name[-1]), lora_rank=4 if "lora" in name else 16)
    folders = ["runs/run_lora", "runs/run_instruct"]
    code, out, err = evaluate("--table", *folders, "--plot", "--group_by", "lora_rank")
    assert code == 0, err
    assert [(row["lora_rank"], row["runs"]) for row in rows_of(out)] == [("4", "2"), ("16", "2")]
    written = [Path(line.split()[-1]) for line in out.splitlines() if line.startswith("written:")]
    assert [path.name for path in written] == [
        "table_by_lora_rank.md",
        "curves_by_lora_rank.png",
    ] and written[1].exists()
    assert rows_of(written[0].read_text()) == rows_of(out)
    assert "4 runs on TensorBoard's HPARAMS page: tensorboard --logdir runs" in out.splitlines()[-1]
    refusals = (
        ("--compare", "one at a time"),
        ("--sort", "x: no run has such"),
        ("--group_by", "x: no run has"),
    )
    for name, said in refusals:
        code, out, err = evaluate("--table", *folders, name, "x")
        assert (code, out, len(err.splitlines())) == (2, "", 1) and said in err


def test_a_runs_source_is_what_it_imported(tmp_path):
    """Asked of the process: neither a list of names to forget, nor what other scripts need."""
    flags = ["--smoke", "--max_documents", "90", "--max_steps", "2", "--out", str(tmp_path / "out")]
    command = [sys.executable, "run_preference.py", *flags]  # in the project's folder, as its user does
    subprocess.run(command, check=True, timeout=300, cwd=PROJECT)
    (folder,) = Path("out").iterdir()
    names = {str(path.relative_to(folder / "source")) for path in (folder / "source").rglob("*.py")}
    assert {"run_preference.py", "core.py", "lab/run/folder.py", "lab/measure/preference.py"} <= names
    assert not {"lab/compare/judge.py", "gpt_scratch.py", "tests/conftest.py", "eval.py"} & names
    code = facts.read(folder).code  # of what the index names, only what the script says counts
    assert {"run_preference.py", "lab/run/folder.py", "lab/data/pairs.py", "lab/errors.py"} <= set(code)
    assert not {"core.py", "lab/models/gpt.py", "lab/data/mixture.py", "lab/models/lora.py"} & set(code)
