"""What the small files say of a run: its code, its resumes, folders that stand for runs."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PROJECT
from toys.results import make_run, refused, resumes, source

import core
from lab.compare import facts, tables
from lab.run import files, provenance


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


def test_folders_stand_for_their_runs_each_once():
    a, b, c = make_run("a"), make_run("b"), make_run("c", script="run_preference")
    assert [f.name for f in facts.find([b, "runs/run_lora", f"runs/../{a}/", c])] == ["b", "a", "c"]
    refused("runs holds no run: use runs/run_lora runs/run_preference", facts.find, ["runs"])
    refused("no such folder: nowhere", facts.find, ["nowhere"])
    for text in ('{"model_type": "gpt2"}', '{"script": "run_lora", "const', "[1, 2]", ""):
        Path(a, "config.json").write_text(text)
        refused(f"{a} is no run folder", facts.find, [a])


@pytest.mark.slow
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
    assert not {"core.py", "lab/data/mixture.py", "lab/measure/choices.py", "lab/models/loha_lokr.py"} & set(
        code
    )


@pytest.mark.parametrize("file", ["config.json", "result.json", "metrics.jsonl", "judged.json"])
@pytest.mark.parametrize("content", [b"\xff", b"[]", b"null", b"[" * 100_000, b'{"a": 1}', b"\0" * 100])
def test_one_damaged_file_of_one_run_ends_no_table(file, content, capfd):
    make_run("good", lr=0.5)
    bad = make_run("bad", files={"judged.json": {"j": {"score": 1.0, "score_interval": [0, 2]}}})
    Path(bad, file).write_bytes(content)
    text = tables.table(facts.find(["runs/run_lora"]))
    assert "good" in text and "2.5000 ± 0.2500" in text
    assert ("bad" in text) == (file != "config.json")
    quiet = file == "metrics.jsonl" or (file != "config.json" and content.startswith(b"{"))
    assert ("WARNING" in capfd.readouterr().err) != quiet


def test_a_file_of_a_run_that_may_not_be_read_ends_no_table(monkeypatch, capfd):
    make_run("good", lr=0.5)
    bad = Path(make_run("bad", files={"judged.json": {"j": {"score": 1.0, "score_interval": [0, 2]}}}))
    (bad / "responses.json").mkdir()  # to be hashed
    read_text = Path.read_text

    def refused(path, *args, **options):
        if path == bad / "metrics.jsonl":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", refused)  # as root every file may be read
        text = tables.table(facts.find(["runs/run_lora"]))
    assert "good" in text and "bad" in text
    err = capfd.readouterr().err
    assert f"WARNING {bad}/metrics.jsonl cannot be read (Permission denied): it counts as empty" in err
    assert f"WARNING {bad}/responses.json cannot be read (Is a directory): its grades are not shown" in err


def test_a_figure_that_was_changed_since_is_not_shown(capfd):
    run = Path(make_run("a"))
    files.write_sealed(run / "result.json", json.loads((run / "result.json").read_text()))
    assert facts.read(run).result["test/loss"] == 2.5
    (run / "result.json").write_text((run / "result.json").read_text().replace("2.5,", "1.5,"))
    assert facts.read(run).result == {} and "result.json is damaged" in capfd.readouterr().err
