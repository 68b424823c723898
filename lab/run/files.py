"""Files and folders that are whole or not there: written aside, flushed, renamed; and their hashes."""

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from lab.errors import UserError

try:
    import fcntl
except ImportError:  # native Windows, whose locks would keep others from reading the file
    fcntl = None

PROJECT = Path(__file__).resolve().parents[2]


def is_there(name) -> bool:
    """Whether there is a file or folder of this name, which a user typed: Path.exists would raise. UserError
    for a name that no disk takes, or that lies where nobody may look."""
    try:
        os.stat(name)
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        short = str(name) if len(str(name)) < 100 else f"{str(name)[:60]}..."
        raise UserError(f"{short} cannot be read ({error.strerror}): name another file") from None
    except ValueError as error:  # a NUL byte, a lone surrogate
        raise UserError(f"{str(name)[:60]!r} is no file name ({error})") from None


def lock_file(file, wait):
    """Locks an open file for this process. BlockingIOError where another one has it, unless it shall `wait`.
    On native Windows nothing is locked."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def is_folder(name) -> bool:
    """Whether there is a folder of this name; UserError as in is_there."""
    return is_there(name) and os.path.isdir(name)


def is_file(name) -> bool:
    """Whether there is a file of this name; UserError as in is_there."""
    return is_there(name) and os.path.isfile(name)


@contextmanager
def whole_file(path, mode="w"):
    """Writes a file atomically: aside, flushed, renamed. Mode `wb` for bytes."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(exist_ok=True)
    remove_leftovers(path.parent, path.name, older=86_400)
    try:
        # backslashes: lone surrogates of data or names must not fail at the last write
        encoding, errors = (None, None) if "b" in mode else ("utf-8", "backslashreplace")
        with open(aside, mode, encoding=encoding, errors=errors) as file:
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


def write_sealed(path, content):
    """write_json of a dict, with a hash of itself: read_sealed sees any later change."""
    content = json.loads(json.dumps(content))  # tuples are lists, and keys text, before they are hashed
    content.pop("seal", None)
    write_json(path, content | {"seal": seal_of(content)})


def read_sealed(path) -> dict:
    """Reads what write_sealed wrote, or a dict without a seal. ValueError where it is damaged, OSError where
    it cannot be read."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    if not isinstance(content, dict) or ("seal" in content and content.pop("seal") != seal_of(content)):
        raise ValueError(f"{path} is not what was written")
    return content


ROW_FILES = ("losses.jsonl", "answers.jsonl", "predictions.jsonl")  # by which runs are compared


def row_hashes(folder) -> dict[str, str]:
    """SHA-256 of the files of rows in a run folder, for its result.json."""
    return {name: sha256_file(folder / name) for name in ROW_FILES if (folder / name).exists()}


def seal_of(content) -> str:
    """The hash of a dict, which is stored beside it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextmanager
def whole_folder(folder, replace=False):
    """Writes a folder atomically: built aside, flushed, renamed. Removes leftovers older than a day. replace:
    what is there goes once the new one is whole; else it stays, for it is another run's and the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent, folder.name, older=86_400)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    mode = 0o777 & ~_umask()
    aside.chmod(mode)  # mkdtemp's are private, and so are the files that safetensors writes
    try:
        yield aside
        for path in (*aside.rglob("*"), aside):
            path.chmod(mode if path.is_dir() else mode & 0o666)
            flush(path)
        if replace and folder.exists():
            shutil.rmtree(folder)
        if not folder.exists():
            os.rename(aside, folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder, name=None, older=0):
    """Removes what killed processes wrote aside of `name` (none: of any) and never renamed. older: seconds; a
    younger one may be another run's work."""
    for path in folder.glob(f".{glob.escape(name)}.*" if name else ".*"):
        aside = re.fullmatch(r"\..+\.(\d+|[a-z0-9_]{8})", path.name)  # a process number, or mkdtemp's letters
        with contextlib.suppress(FileNotFoundError):  # another process removes them, too
            if not aside or time.time() - path.lstat().st_mtime < older:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


_asking = threading.Lock()


def _umask() -> int:
    with _asking:  # two threads that set it could leave the wrong one
        mask = os.umask(0o077)  # there is no way to ask but to set it
        os.umask(mask)
    return mask


def flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def sha256_file(path) -> str:
    """SHA-256 in hexadecimal digits. Reads piece by piece: memory stays constant."""
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
