"""metrics.jsonl, samples.jsonl and TensorBoard: the same numbers and texts, cut back where a run resumes."""

import contextlib
import html
import json
import math
import os
import shutil
import time

from lab.run.files import whole_file


class Curves:
    """Writes metrics.jsonl, samples.jsonl and TensorBoard of a run.

    Opening cuts metrics.jsonl to its first `metrics_bytes`, and samples to steps below `before`: a resumed
    run writes the rest again."""

    def __init__(self, folder, metrics_bytes=0, before=0):
        from torch.utils.tensorboard import SummaryWriter

        self.folder, path = folder, folder / "metrics.jsonl"
        path.touch()
        lost = metrics_bytes - path.stat().st_size
        os.truncate(path, min(path.stat().st_size, metrics_bytes))
        rows, self.lines = keep_rows(path, math.inf, {"time": (int, float)})
        samples, cut = keep_rows(folder / "samples.jsonl", before, {"number": int, "text": str})
        self.lines += [f"WARNING the last {lost} bytes of {path} are gone: its curves have a hole"] * (
            lost > 0
        )
        self.lines += cut  # what was damaged, to be told
        self._metrics = open(path, "a", encoding="utf-8")
        # metrics.jsonl is the truth: TensorBoard's file is rewritten from it, so no resume forks a curve;
        # purge_step=0 tells a TensorBoard that is watching to forget the old file
        shutil.rmtree(folder / "tb", ignore_errors=True)
        self._tensorboard = SummaryWriter(folder / "tb", purge_step=0)
        for row in rows:
            self._show(row)
        for row in samples:
            self._show_sample(row["step"], row["number"], row["text"])
        self._tensorboard.flush()

    def metrics(self, step, values, flush=True):
        """Appends a line to metrics.jsonl, and the same numbers to TensorBoard. flush: shows them at once;
        what comes with every step waits for the next line of the log."""
        record = {"step": step, "time": time.time()}
        record |= {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON knows no inf
        self._metrics.write(json.dumps(record) + "\n")
        self._show(record)
        if flush:
            self._metrics.flush()
            self._tensorboard.flush()

    def samples(self, step, texts):
        """Appends texts to samples.jsonl and TensorBoard."""
        with open(self.folder / "samples.jsonl", "a", encoding="utf-8") as file:
            for number, text in enumerate(texts):
                row = {"step": step, "number": number, "text": text}
                file.write(json.dumps(row) + "\n")
                self._show_sample(**row)

    def flushed_bytes(self) -> int:
        """Flushes metrics.jsonl to the disk and returns its size, which a checkpoint notes."""
        self._metrics.flush()
        os.fsync(self._metrics.fileno())
        return self._metrics.tell()

    def close(self):
        for stream in (self._metrics, self._tensorboard):
            with contextlib.suppress(OSError):  # closing flushes: the disk may be full
                stream.close()

    def _show(self, record):
        for name, value in record.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                self._tensorboard.add_scalar(name, value, record["step"], walltime=record["time"])

    def _show_sample(self, step, number, text):
        self._tensorboard.add_text(f"sample/{number}", f"<pre>{html.escape(text)}</pre>", step)


def keep_rows(path, before, needed=None) -> tuple[list[dict], list[str]]:
    """Cuts a .jsonl file back to its rows with a step below `before`. Returns these, and a line if some were
    damaged: a kill leaves half a line, a crash of the machine NULs. needed: name -> type of what a row holds
    beside its step."""
    if not path.exists():
        return [], []
    lines = path.read_bytes().split(b"\n")
    rows = [row for line in lines if (row := whole_row(line, {"step": int} | (needed or {})))]
    damaged = sum(bool(line.strip()) for line in lines) - len(rows)
    rows = [row for row in rows if row["step"] < before]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    if damaged or math.isfinite(before):
        with whole_file(path) as file:
            file.write(content)
    return rows, [f"WARNING {damaged} damaged line(s) of {path} are cut"] * bool(damaged)


def whole_row(line, needed) -> dict | None:
    """A line of a .jsonl file, or None where it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return (
        row
        if isinstance(row, dict) and all(isinstance(row.get(n), kind) for n, kind in needed.items())
        else None
    )
