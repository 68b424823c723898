"""Files and folders that are whole or not there: written aside, flushed, renamed; and their hashes."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


@contextmanager
def whole_file(path, mode="w"):
    """Writes a file atomically: aside, flushed, renamed. Mode `wb` for bytes."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(exist_ok=True)
    try:
        with open(aside, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        flush(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_lines(path, lines):
    """Writes a .jsonl file atomically: each of `lines` as JSON."""
    with whole_file(path) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def write_json(path, content):
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1) + "\n")


@contextmanager
def whole_folder(folder):
    """Writes a folder atomically: built aside, flushed, renamed. Removes leftovers older than a day."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f".{folder.name}.*"):  # a younger one may be another run's work
        if time.time() - leftover.stat().st_mtime > 86_400:
            shutil.rmtree(leftover, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    aside.chmod(0o755)  # mkdtemp's are private
    try:
        yield aside
        for path in (*aside.rglob("*"), aside):
            flush(path)
        if not folder.exists():  # otherwise another run has just written the same
            os.rename(aside, folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def sha256_file(path) -> str:
    """About 1.3 s a GiB where the processor has instructions for it; memory stays constant."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 18))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def short_hash(content, length=16) -> str:
    """A name for `content` (JSON): the first `length` hex digits of its SHA-256."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:length]


def joint_hash(hashes) -> str:
    """One hash of several; of a single one that hash itself."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
