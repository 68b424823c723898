"""Tables, means over seeds and pictures, from run folders made by hand: every cell against its file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
from conftest import PROJECT

import core
import results

CONSTANTS = {"data": "rows.json", "text_column": "text", "max_documents": None, "split_seed": 42}
CONSTANTS |= {"val_share": 0.1, "test_share": 0.1, "model": "/somewhere/models/tiny", "lora_rank": 16}
CONSTANTS |= {"batch": 24, "lr": 0.01, "seed": 0, "price_per_hour": None, "note": "", "out": None, "tag": None}


def make_run(name, *, script="run_lora", status="finished", result=None, config=None, files=None, **constants):
    """A run folder without checkpoints. `files`: name -> lines (.jsonl), or what a .json holds, or text."""
    folder = Path("runs", script, name)
    folder.mkdir(parents=True)
    config = {"script": script, "constants": CONSTANTS | constants, "preset": None, "device": "cpu",
              "facts": {"fingerprint": {"data": "abc"}}} | (config or {})  # fmt: skip
    told = {"status": status, "step": 75, "seconds": 90.0, "parameters": 1234567, "peak_memory_mb": 512.4}
    told |= {"tokens_per_second": 1234.5, "weights_sha256": f"of {name}", "test/loss": 2.5}
    told |= {"test/loss_interval": [2.25, 2.75], "test/accuracy": 0.25, "test/accuracy_interval": [0.2, 0.3]}
    told = {key: value for key, value in (told | (result or {})).items() if value is not None}
    steps = [{"step": step, "train/loss": 4 - step / 100} for step in (25, 50, 75)]
    steps += [{"step": 75, "val/loss": 2.9}]
    written = {"config.json": config, "result.json": told if status else None, "metrics.jsonl": steps}
    for file, content in (written | (files or {})).items():
        if file.endswith(".jsonl") and not isinstance(content, str):
            content = "".join(json.dumps(line) + "\n" for line in content)
        if content is not None:
            (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def refused(match):
    """A UserError of one line that matches."""
    return pytest.raises(core.UserError, match=rf"(?=\A.*\Z){match}")


def rows_of(text) -> list[dict]:
    """Of a Markdown table; every line has as many cells as the header."""
    lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    assert len(lines) > 2 and len({len(line) for line in lines}) == 1
    assert all(line[0] == line[-1] == "" for line in lines) and set("".join(lines[1])) == {"-"}
    return [dict(zip(lines[0][1:-1], line[1:-1], strict=True)) for line in lines[2:]]


def table(*folders, order=None) -> list[dict]:
    return rows_of(results.table(results.find(folders or ["runs/run_lora"]), order))


def test_every_cell_of_the_table_is_what_the_small_files_say():
    judged = {"llama3": {"score": 61.5, "score_interval": [58, 65]}, "mute": {"score": None}}
    make_run("b", result={"seconds": 5400.0}, price_per_hour=2.5, note="the base", seed=1)
    figures = {"val/loss": 1.0, "test/perplexity": 12.1825, "test/bits_per_byte": 1.25, "seconds": 30.0}
    figures |= {"trainable_parameters": 54272, "tokens_per_second": None, "examples_per_second": 2.345}
    make_run("a", result=figures, lr=3e-4, lora_rank=8, files={"judged.json": judged})
    text = results.table(results.find(["runs/run_lora"]))
    assert text.splitlines()[0] == "2 runs  script run_lora  data rows.json  device cpu"
    first, second = rows_of(text)
    same = {"model": "models/tiny", "batch": "24", "loss": "2.5000 ± 0.2500", "accuracy": "0.250 ± 0.050"}
    same |= {"parameters": "1,234,567", "memory MB": "512"}
    assert first == same | {
        "run": "a", "lr": "0.0003", "rank": "8", "seed": "0", "perplexity": "12.182", "bits/byte": "1.2500",
        "judge llama3": "61.50 ± 3.50", "min": "0.5", "note": "", "trained": "54,272", "rate": "2.35 examples/s",
        "dollars": "",
    } | {"perplexity": f"{12.1825:.3f}"}  # fmt: skip
    assert second == same | {
        "run": "b", "lr": "0.01", "rank": "16", "seed": "1", "perplexity": "", "bits/byte": "",
        "judge llama3": "", "min": "90.0", "note": "the base", "trained": "", "rate": "1234 tokens/s",
        "dollars": "3.75",
    }  # fmt: skip


def test_columns_are_those_that_tell_runs_apart_or_hold_something():
    for rank in (4, 8):
        make_run(f"r{rank}", lora_rank=rank, dropout=rank / 10, pack=rank > 4, clip=1.0, tag=f"t{rank}", out="x")
    rows = table()
    assert [(row["dropout"], row["pack"]) for row in rows] == [("0.4", "False"), ("0.8", "True")]
    gone = {"clip", "tag", "out", "seed", "script", "note", "dollars", "unfinished", "epochs", "perplexity"}
    assert not gone & rows[0].keys()
    make_run("elsewhere", config={"device": "NVIDIA H100"})
    assert [row["device"] for row in table()] == ["NVIDIA H100", "cpu", "cpu"]


def test_runs_are_sorted_by_name_or_by_a_figure_or_constant_and_ties_stay():
    for name, loss, lr in (("d", 2.0, 1e-3), ("c", 10.0, 1e-2), ("b", None, 1e-3), ("a", 2.0, None)):
        make_run(name, result={"test/loss": loss}, lr=lr)
    make_run("p", script="run_preference", result={"test/loss": None, "test/log_loss": 1.0})

    def names(order):
        return "".join(row["run"] for row in table("runs/run_lora", "runs/run_preference", order=order))

    assert [names(order) for order in (None, "loss", "lr", "seed")] == ["abcdp", "padcb", "bdcpa", "abcdp"]


def test_unfinished_runs_say_how_far_they_came():
    half = '{"step": 25, "train/loss": 4.0}\n{"step": 50, "val/loss": 3.25}\n{"step": 75, "val/lo'
    make_run("a_runs", status=None, files={"metrics.jsonl": half})
    make_run("b_half", files={"result.json": '{"status": "finished", "st'})
    make_run("c_stopped", status="stopped", files={"metrics.jsonl": [{"step": 25, "train/loss": 3.0}]})
    make_run("d_born", status=None, files={"metrics.jsonl": None})
    make_run("e_failed", status="failed")
    make_run("f_finished")
    assert [row["unfinished"] for row in table()] == [
        "running or killed at step 50, val 3.2500",
        "running or killed at step 75, val 2.9000",
        "stopped at step 25",
        "running or killed at step 0",
        "failed at step 75, val 2.9000",
        "",
    ]


@pytest.mark.parametrize("note", ["a | b", "two\nlines", "|\n\n|", "of\r\nWindows"])
def test_no_note_breaks_the_table(note):
    make_run("a", note=note)
    make_run("b", note="plain", tag="t|t")
    text = results.table(results.find(["runs/run_lora"]))
    rows = rows_of(text)
    assert len(rows) == 2 and len(text.splitlines()) == 6 and "\r" not in text
    assert all(word in rows[0]["note"] for word in note.replace("|", "/").split()) and rows[1]["note"] == "plain"


def test_groups_show_mean_and_deviation_over_seeds():
    losses = {(4, 0.1): [2.0, 2.5, 2.1], (16, 0.1): [1.5, 1.75], (4, 0.2): [3.0]}
    for (rank, lr), values in losses.items():
        for seed, loss in enumerate(values):
            figures = {"test/loss": loss, "test/accuracy": loss / 7, "seconds": 60.0 * (seed + 1)}
            judged = {"j": {"score": 10 * loss, "score_interval": [0, 1]}}
            make_run(f"{rank}-{lr}-{seed}", result=figures, lora_rank=rank, lr=lr, seed=seed, tag=f"t{seed}",
                     files={"judged.json": judged})  # fmt: skip
    for name, status in (("lost", None), ("cut", "stopped")):
        make_run(name, status=status, result={"test/loss": 99.0}, lora_rank=4, lr=0.1)
    text = results.grouped(results.find(["runs/run_lora"]), ["lora_rank", "lr"], "loss")
    assert text.splitlines()[-1] == "not counted, unfinished: cut, lost"
    wanted = []
    for rank, lr in ((16, 0.1), (4, 0.1), (4, 0.2)):  # the lowest mean first
        values = np.array(losses[rank, lr])
        row = {"lora_rank": str(rank), "lr": str(lr), "runs": str(len(values))}
        row["seeds"] = " ".join(map(str, range(len(values))))
        for name, of, digits in (("loss", values, 4), ("accuracy", values / 7, 4), ("judge j", values * 10, 2),
                                 ("min", 1 + np.arange(len(values)), 1)):  # fmt: skip
            spread = f" ± {of.std(ddof=1):.{digits}f}" if len(of) > 1 else ""
            row[name] = f"{of.mean():.{digits}f}{spread}"
        wanted.append(row)
    assert rows_of(text) == wanted
    by_rank = rows_of(results.grouped(results.find(["runs/run_lora"]), ["lora_rank"]))
    assert [(r["lora_rank"], r["runs"], r["also differ in"]) for r in by_rank] == [("4", "4", "lr"), ("16", "2", "")]
    assert by_rank[0]["loss"] == f"2.4000 ± {np.std([2.0, 2.5, 2.1, 3.0], ddof=1):.4f}"


def test_groups_without_the_figure_come_last_and_answers_alone_have_no_minutes():
    make_run("a", lora_rank=2, result={"test/loss": None})
    make_run("b", lora_rank=4)
    make_run("c", lora_rank=8, result={"test/loss": 2.0})
    found = results.find(["runs/run_lora"])
    assert [row["lora_rank"] for row in rows_of(results.grouped(found, ["lora_rank"], "loss"))] == ["8", "4", "2"]
    make_run("d", lora_rank=32, files={"result.json": {"status": "finished", "step": 0}})  # of --mode generate
    rows = rows_of(results.grouped(results.find(["runs/run_lora"]), ["lora_rank"]))
    assert [row["min"] for row in rows] == ["1.5", "1.5", "1.5", ""]


def test_folders_stand_for_their_runs_each_once():
    a, b = make_run("a"), make_run("b")
    c = make_run("c", script="run_preference")

    def names(*folders):
        return [facts.name for facts in results.find(folders)]

    assert names("runs/run_lora") == ["a", "b"] and names(str(b)) == ["b"]
    assert names(str(b), "runs/run_lora", f"{a.parent}/../run_lora/a/", str(c)) == ["b", "a", "c"]
    with refused(f"runs holds no run: use {a.parent} {c.parent}"):
        results.find(["runs"])
    with refused("no such folder: nowhere"):
        results.find(["nowhere"])
    with refused("source holds no run"):
        Path("source").mkdir()
        results.find(["source"])
    for text in ('{"model_type": "gpt2"}', '{"script": "run_lora", "const', "[1, 2]", ""):
        (a / "config.json").write_text(text)
        with refused(f"{a} is no run folder"):
            results.find([str(a)])


def test_sorting_and_grouping_by_an_unknown_name_is_refused():
    make_run("a", result={"plain/after": 1.0})
    found = results.find(["runs/run_lora"])
    for name in ("lora_rank", "loss", "accuracy", "seed", "script"):
        results.check_order(found, name)
    for name in ("lora_rnk", "log_los"):
        with refused(f"{name}: no run has such .*lora_rank"):
            results.check_order(found, name)


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they were saved."""
    figures, save = [], matplotlib.figure.Figure.savefig

    def caught(figure, path, **how):
        figures.append(figure)
        save(figure, path, **how)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", caught)
    return figures


@pytest.mark.parametrize("n", [1, 3, 30])
def test_every_run_has_its_curves(drawn, n):
    for i in range(n):
        metrics = [{"step": s, "train/loss": 5 + i - s / 10, "val/loss": 6 + i - s / 10} for s in range(1, 41)]
        make_run(f"{i:02}", tag=f"tag{i}", result={"test/loss": n - i}, files={"metrics.jsonl": metrics})
    make_run("without", tag="none", files={"metrics.jsonl": ""})
    results.draw(results.find(["runs/run_lora"]), "curves.png")
    assert Path("curves.png").read_bytes()[:4] == b"\x89PNG"
    (figure,) = drawn
    train, val = figure.axes
    for panel in (train, val):
        assert [line.get_label() for line in panel.get_lines()] == [f"tag{i}" for i in range(n)]
        styles = {(str(line.get_color()), line.get_linestyle()) for line in panel.get_lines()}
        assert len(styles) == n  # each run can be told from the others
    for i, (smooth, plain) in enumerate(zip(train.get_lines(), val.get_lines(), strict=True)):
        steps = np.arange(1, 41)
        np.testing.assert_allclose(plain.get_xydata(), np.c_[steps, 6 + i - steps / 10])
        means = 5 + i - np.r_[steps[0], (steps[1:] + steps[:-1]) / 2] / 10  # a 20th of 40 points: two
        np.testing.assert_allclose(smooth.get_xydata(), np.c_[steps, means])
    labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert labels == ([f"tag{i}" for i in range(n)] if n < 30 else [])


def test_curves_are_coloured_by_constants_and_none_is_no_error(drawn):
    for i, rank in enumerate((4, 8, 4, 8)):
        make_run(f"{i}", lora_rank=rank, seed=i)
    found = results.find(["runs/run_lora"])
    results.draw(found, "by.png", ["lora_rank", "lr"])
    lines = drawn[0].axes[1].get_lines()
    assert [line.get_label() for line in lines] == ["4, 0.01", "8, 0.01"] * 2
    assert lines[0].get_color() == lines[2].get_color() != lines[1].get_color() == lines[3].get_color()
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["4, 0.01", "8, 0.01"]
    assert drawn[0].legends[0].get_title().get_text() == "lora_rank, lr"
    for facts in found:
        facts.metrics.clear()
    results.draw(found, "none.png")
    assert Path("none.png").read_bytes()[:4] == b"\x89PNG" and not drawn[1].axes[0].get_lines()


def test_tensorboard_reads_constants_and_figures_back():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    judged = {"j": {"score": 61.5}, "mute": {"score": None}}
    one = make_run("a", lr=0.125, schedule="cosine", pack=True, files={"judged.json": judged})
    make_run("b", lr=0.25, schedule="linear", pack=False, lora_dropout=0.5)
    stopped = make_run("c", status="stopped")
    found = results.find(["runs/run_lora"])
    assert results.write_hparams(found) == results.write_hparams(found) == 2
    assert not (stopped / "hparams").exists()
    assert len(list((one / "hparams").rglob("events*"))) == 1
    events = EventAccumulator(str(one / "hparams")).Reload()
    said = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    values = HParamsPluginData.FromString(said).session_start_info.hparams
    read = {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}
    wanted = {"preset": "", "script": "run_lora", "lr": 0.125, "batch": 24, "seed": 0, "schedule": "cosine"}
    assert read == wanted | {"pack": True, "lora_dropout": ""}
    scalars = {tag: [(s.step, s.value) for s in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    figures = {"final/loss": 2.5, "final/accuracy": 0.25, "judge/j": 61.5}
    assert scalars == {tag: [(75, value)] for tag, value in figures.items()}


def evaluate(*args):
    """eval.py in a process of its own: exit code, output, errors."""
    command = [sys.executable, str(PROJECT / "eval.py"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_the_table_from_the_command_line():
    for seed in (0, 1):
        make_run(f"x{seed}", script="elsewhere", seed=seed)
        make_run(f"a{seed}", seed=seed, lora_rank=4)
    code, out, err = evaluate("--table", "runs/run_lora", "runs/elsewhere", "--plot", "--group_by", "lora_rank")
    assert code == 0, err
    assert [(row["lora_rank"], row["runs"]) for row in rows_of(out)] == [("4", "2"), ("16", "2")]
    written = [Path(line.split()[-1]) for line in out.splitlines() if line.startswith("written:")]
    assert [path.name for path in written] == ["table.md", "curves.png"] and all(p.exists() for p in written)
    assert rows_of(written[0].read_text()) == rows_of(out)
    assert "4 runs on TensorBoard's HPARAMS page: tensorboard --logdir runs" in out.splitlines()[-1]


@pytest.mark.parametrize("args", [["--compare", "a"], ["--sort", "lss"], ["--group_by", "lora_rnk"]])
def test_what_cannot_be_listed_ends_in_one_line(args):
    make_run("a")
    code, out, err = evaluate("--table", "runs/run_lora", *args)
    assert (code, out, len(err.splitlines())) == (2, "", 1) and args[0 if args[1] == "a" else 1] in err
    assert not Path("runs/run_lora/table.md").exists()
