"""Damages the folders of runs: what is opened of them is what was written, or refused in one line."""

import contextlib
import functools
import io
import json
import shutil
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from damage import DAMAGES
from torch import nn

import core
from lab.compare import facts, sides, tables

STOPPED, FINISHED, TWIN = "20260103_000000", "20260101_000000-a", "20260102_000000-b"


@dataclass(frozen=True)
class Config(core.Constants):
    """Constants of a script of these tests."""

    batch: int = 8
    lr: float = 0.1
    keep: int = 2
    epochs: int = 3
    max_minutes: float | None = None
    price_per_hour: float | None = None
    dtype: str = "fp32"
    skip_spikes: bool = False
    out: str | None = None
    tag: str | None = None
    resume_timestamp: str | None = None
    resume_step: int | None = None


def start(out, *flags) -> core.Run | None:
    cfg = core.parse_config(Config, {}, {}, "", ["--out", str(out), *flags])
    return core.open_run(cfg, core.World(), Path(out) / "script.py", unit="tokens")


def parts() -> tuple:
    """Model, optimizer and precision of a run that begins."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), core.Precision("fp32", core.World())


def train(run, steps, seed):
    """Steps that save, log, sample and spike; figures and rows of losses."""
    model, optimizer, precision = parts()
    run.begin(9)
    run.load(model, optimizer, precision)
    for step in range(1, steps + 1):
        model(torch.full((1, 3), float(step + seed))).sum().backward()
        optimizer.step()
        run.metrics(step, {"train/loss": 3 - step / 7, "val/loss": 3 - step / 9})
        run.samples(step, [f"sample ü {step}"])
        with open(run.folder / "spikes.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "odd": ["loss"]}) + "\n")
        run.save(step, model, optimizer, precision)
    nats = np.random.default_rng(seed).gamma(4, 5, 30).round(6)
    lines = [{"part": "test", "row": i, "group": i, "nats": n, "hits": 3, "targets": 10, "bytes": 40}
             for i, n in enumerate(nats.tolist())]  # fmt: skip
    core.write_lines(run.folder / "losses.jsonl", lines)
    run.result = {"test/loss": float(nats.mean() / 10), "test/loss_interval": [1.5, 2.5]}
    run.result |= {"test_checkpoints": [run.checkpoint], "weights_sha256": core.weights_sha256(model)}
    run.pin("fingerprint", {"data": "of all three"})


@functools.cache
def template() -> tuple[Path, tempfile.TemporaryDirectory]:
    """A folder of three runs: two are finished, one was stopped behind its third step."""
    holder = tempfile.TemporaryDirectory()
    out = Path(holder.name) / "out"
    out.mkdir()
    (out / "script.py").write_text("x = 1\n")
    for seed, name in enumerate((FINISHED, TWIN, STOPPED)):
        flags = ["--lr", f"0.{seed + 1}", *tag_of(name)]
        in_place = mock.patch("lab.run.resume.new_folder", made(out / name))
        with quietly(), in_place, start(out, *flags) as run:
            train(run, 3, seed)
            shutil.rmtree(
                run.folder / "source" / "lab"
            )  # a copy of it for each case would take most of the time
            if name == STOPPED:
                raise core.Stop("enough")
    return out, holder


def made(folder):
    def new_folder(out, tag):
        folder.mkdir()
        return folder

    return new_folder


def tag_of(name) -> list[str]:
    return ["--tag", name[16:]] if name[16:] else []


@contextlib.contextmanager
def quietly():
    """Yields what is said meanwhile; signals are answered afterwards as before."""
    said, numbers = io.StringIO(), (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            yield said
        finally:
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------- damages


def damage_run(folder, rng, place=".") -> str:
    """Damages one thing in a run folder, or puts something foreign into it; place: of its folders this one.
    Returns what was done."""
    kind = rng.choice(["bytes"] * 6 + ["gone", "folder", "link", "foreign", "foreign", "nuls"])
    kind = "bytes" if place != "." and kind == "foreign" else kind
    if kind == "foreign":
        return foreign(folder, rng)
    every = [path for path in sorted((folder / place).rglob("*")) if path.is_file() and path.name != ".lock"]
    small = [path for path in every if not {"source", "tb"} & set(path.relative_to(folder).parts)]
    above = [path for path in small if path.parent == folder]
    path = rng.choice(rng.choice([small, above or small]))
    if kind == "bytes":
        path.write_bytes(rng.choice(DAMAGES)(path.read_bytes(), rng))
    elif kind == "nuls":
        path.write_bytes(path.read_bytes() + b"\0" * rng.randint(1, 5000))
    else:
        path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(rng.choice([path.name, "nowhere", "/dev/null"]))
    return f"{kind} {path.relative_to(folder)}"


def foreign(folder, rng) -> str:
    """What systems, editors and people leave beside the files of a run."""
    where = rng.choice([folder, folder / "checkpoints", folder.parent])
    name = rng.choice([".DS_Store", ".nfs000000000a1b2c3d", "step_00000099.tar", "step_00000099", "notes.txt",
                       "exported", "._step_00000002", "step_00000003 (copy)", "link"])  # fmt: skip
    path = where / name
    if name in ("step_00000099", "exported", "step_00000003 (copy)"):
        path.mkdir()
        text = rng.choice(
            ['{"model_type": "gpt2"}', "[]", "null", "{}", '{"script": 3, "constants": []}', "{"]
        )
        (path / "config.json").write_text(text)
    elif name == "link":
        path.symlink_to(rng.choice(["nowhere", ".", "step_00000003"]))
    else:
        path.write_bytes(rng.randbytes(20))
    return f"foreign {path}"


# ----------------------------------------------------------------------------------------------------- checks


def check_checkpoints(rng, folder):
    check_run(rng, folder, "checkpoints", (check_checkpoint, check_resume, check_resume))


def check_run(rng, folder, place=".", checks=None):
    """Three runs, one of them damaged: what is shown, compared and resumed is what was written."""
    source, _ = template()
    out = Path(folder) / "out"
    shutil.copytree(source, out, symlinks=True)
    name = rng.choice([FINISHED, STOPPED, STOPPED])
    done = damage_run(out / name, rng, place)
    usual = (check_table, check_compare, check_checkpoint, check_resume, check_resume)
    check = rng.choice(checks or usual)
    with quietly() as said:
        try:
            check(out, source, name, rng)
        except core.UserError:
            raise
        except Exception as error:
            error.add_note(f"{done}; said: {said.getvalue()[-500:]}")
            raise


def check_table(out, source, name, rng):
    """No damage of one run ends the table of all, or changes what is shown of it."""
    try:
        shown = loss_cells(tables.table(facts.find([str(out)])))
        by_lr = tables.grouped(facts.find([str(out)]), ["lr"])
    except core.UserError as error:
        raise AssertionError(f"the table of all was refused: {error}") from None
    wanted = loss_cells(tables.table(facts.find([str(source)])))
    for run, loss in wanted.items():
        if shown.get(run, "") != loss and (run != name or shown.get(run)):
            raise AssertionError(f"{run} is shown with {shown.get(run)}, was {loss}")
    if TWIN not in shown or "0.2" not in by_lr:
        raise AssertionError("an undamaged run is not in the table")


def loss_cells(table) -> dict[str, str]:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "|" in line]
    return {row[rows[0].index("run")]: row[rows[0].index("loss")] for row in rows[2:]}


def check_compare(out, source, name, rng):
    compared = [
        sides.report(sides.sides([str(of / FINISHED), str(of / TWIN)], "runs"))[1] for of in (source, out)
    ]
    wanted, found = (figures["loss"][0] for figures in compared)
    if (found["difference"], found["interval"]) != (wanted["difference"], wanted["interval"]):
        raise AssertionError(f"compared as {found}, was {wanted}")


def compared(*folders) -> dict:
    return sides.report(sides.sides(map(str, folders), "runs"))[1]["loss"][0]


def check_checkpoint(out, source, name, rng):
    """What a finished run is measured by again, or a model opened with."""
    checkpoint = core.tested_or_newest_checkpoint(out / name)
    model, _, _ = parts()
    core.load_weights(out / name / "checkpoints" / checkpoint, model)
    same_weights(model, source, name, checkpoint)


def same_weights(model, source, name, checkpoint):
    wanted, _, _ = parts()
    core.load_weights(source / name / "checkpoints" / checkpoint, wanted)
    if core.weights_sha256(model) != core.weights_sha256(wanted):
        raise AssertionError(f"other weights than {checkpoint} had")


def check_resume(out, source, name, rng):
    """A resume goes on with constants, weights and curves as they were written; a refusal touches nothing."""
    asked = rng.choice([name[:15], "auto", "auto", "latest"])
    before = contents(out)
    try:
        run = start(out, "--resume_timestamp", asked, *tag_of(name))
    except core.UserError:
        if contents(out) != before:
            raise AssertionError(f"a refusal touched {changed(before, contents(out))}") from None
        raise
    if run is None:
        if asked != "auto" or contents(out) != before:
            raise AssertionError("a finished run was touched, or found without auto")
        return
    new = not run.resumed
    if new and (asked != "auto" or "a new run" not in "".join(run._lines)):
        raise AssertionError(f"a new run beside a damaged one without a word: {run._lines}")
    model, optimizer, precision = parts()
    with run:
        run.load(model, optimizer, precision)
        run.begin(9)
        if not new:
            went_on(run, model, source)
        raise core.Stop("enough")


def went_on(run, model, source):
    stored = core.read_config(source / run.folder.name)["constants"]
    odd = {name for name, value in stored.items() if getattr(run.cfg, name) != value}
    if odd - {"out", "resume_timestamp"}:
        raise AssertionError(f"other constants: {odd}")
    if run.checkpoint:
        same_weights(model, source, run.folder.name, run.checkpoint)
    for name in ("metrics.jsonl", "samples.jsonl", "spikes.jsonl"):
        written, kept = steps_of(source / run.folder.name / name), steps_of(run.folder / name)
        if not set(kept) <= set(written):  # a letter flipped within a row is not seen: rows have no sums
            raise AssertionError(f"{name} holds steps that were never written: {kept}")


def steps_of(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def contents(out) -> dict:
    """path -> bytes of all files but the lock, which says who asked last."""
    return {
        path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file() and path.name != ".lock"
    }


def changed(before, after) -> list:
    return [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
