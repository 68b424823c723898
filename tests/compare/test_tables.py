"""Tables from run folders made by hand: every cell against its file."""

import json
from pathlib import Path

import numpy as np
import pytest
from ranks import typed
from toys.results import STEPS, make_run, rows_of, smoothing_runs, source

from lab.compare import facts, tables


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


def test_a_group_says_where_its_figures_are_of_validation_rows():
    only_val = {"test/loss": None, "test/accuracy": None, "val/loss": 3.0}
    for name, lr, figures in (("a", 1, {}), ("b", 2, only_val), ("c", 3, {}), ("d", 3, only_val)):
        folder = make_run(name, lr=lr)
        result = {"status": "finished", "step": 5, "test/loss": 2.0, "test/accuracy": 0.5} | figures
        kept = {key: value for key, value in result.items() if value is not None}
        Path(folder, "result.json").write_text(json.dumps(kept))
    assert [row["loss"] for row in table(by=["lr"])] == [
        "2.0000",
        "val 3.0000",
        "test and val 2.5000 ± 0.7071",
    ]
    assert [row["accuracy"] for row in table(by=["lr"])] == ["0.5000", "", "0.5000"]


@pytest.mark.slow
def test_the_table_from_the_command_line():
    for name in ("run_instruct/0", "run_instruct/1", "run_lora/0", "run_lora/1"):
        make_run(name[-1], name[:-2], seed=int(name[-1]), lora_rank=4 if "lora" in name else 16)
    folders = ["runs/run_lora", "runs/run_instruct"]
    code, out, err = typed("eval", "--table", *folders, "--plot", "--group_by", "lora_rank")
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
        code, out, err = typed("eval", "--table", *folders, name, "x")
        assert (code, out, len(err.splitlines())) == (2, "", 1) and said in err


def test_groups_by_seed_say_what_else_differs_from_line_to_line():
    for seed in (0, 1):
        make_run(f"a{seed}", seed=seed, max_steps=100 * (seed + 1))
    text = tables.grouped(facts.find(["runs/run_lora"]), ["seed"])
    assert "NOTE from line to line max_steps differs, too" in text
    make_run("b0", seed=0, max_steps=300, pack=True)
    text = tables.grouped(facts.find(["runs/run_lora"]), ["seed"])
    assert "max_steps, pack" in text and "from line to line" not in text  # the column says it
    assert "from line to line" not in tables.grouped(
        facts.find(["runs/run_lora"]), ["seed", "max_steps", "pack"]
    )
