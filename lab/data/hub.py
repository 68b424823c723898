"""The Hugging Face Hub: asked once, quickly; a failure is one line."""

import contextlib
import os
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

from lab.errors import UserError
from lab.run.files import is_file, is_folder, is_there


def from_hub(what, name, load, instead):
    """Calls `load()`; any failure of the Hub becomes a UserError of one line, within seconds."""
    online = _hub_answers()
    try:
        return _quietly(load)
    except UserError:
        raise
    except Exception as error:  # every library on the way has its own kinds
        reason = first_line(error) if online else f"{_silence()} and HF_HOME holds no copy"
        raise UserError(f"{what} {name} cannot be fetched ({reason}): use {instead}") from error


def first_line(error) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    most = 2 if lines[0].endswith(":") else 1  # what follows a colon is the reason
    return " ".join(line.strip() for line in lines[:most])[:160]


def _quietly(load):
    """Calls `load()` without other libraries' tables of weights, and bars where stderr is no terminal."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # what is wrong with a folder is an error of ours
    try:
        return load()
    finally:
        logging.set_verbosity(before)


def _hub_answers(seconds=5) -> bool:
    """Asks the Hub once whether it is there; if not, libraries are told to look into their cache only."""
    answers = []

    def probe():  # in a thread: looking a name up has no time-out of its own
        # many kinds: no network, an HF_ENDPOINT that is no address, an answer that is no HTTP
        with contextlib.suppress(Exception):
            with contextlib.suppress(urllib.error.HTTPError):  # it spoke
                urllib.request.urlopen(
                    os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=seconds
                )
            answers.append(True)

    if "HF_HUB_OFFLINE" not in os.environ:
        _asked.append(True)
        thread = threading.Thread(target=probe, daemon=True)
        thread.start()
        thread.join(seconds)
        os.environ["HF_HUB_OFFLINE"] = "0" if answers else "1"  # read when huggingface_hub is first imported
        if hub := sys.modules.get("huggingface_hub.constants"):  # it was: a local tokenizer did that
            hub.HF_HUB_OFFLINE = not answers
    # as huggingface_hub reads it
    return os.environ["HF_HUB_OFFLINE"].upper() not in ("1", "ON", "YES", "TRUE")


_asked = []  # whether this process has asked the Hub; else HF_HUB_OFFLINE was set by the user


def _silence() -> str:
    """Why the Hub is not asked."""
    if not _asked:
        return "HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT")
    return f"the Hub does not answer{f' at HF_ENDPOINT {endpoint}' if endpoint else ''}"


def local_or_hub(what, name, load, built_in):
    """Calls `load()` for a folder or Hub id; every failure is a UserError of one line."""
    if not is_folder(name):
        if is_file(name):
            raise UserError(f"{what} {name} is a file: use a folder, or {built_in}")
        if name[:1] in ("", ".", "/", "~"):
            raise UserError(f"no such folder: {name or repr(name)}")
        return from_hub(what, name, load, f"a local folder, or {built_in}")
    try:
        return _quietly(load)
    except UserError:
        raise
    except Exception as error:  # as many kinds as there are ways to damage a folder
        why = _what_it_is(Path(name)) or first_line(error)
        raise UserError(f"{what} in folder {name} cannot be loaded: {why}") from error


def _what_it_is(folder) -> str | None:
    """Words for a folder in which nobody has put a model: there is none, or runs are; none for another."""
    if is_there(folder / "config.json") or any(folder.glob("tokenizer*")):
        return None
    if is_there(folder / "adapter_config.json"):
        return f"it holds an adapter: run_lora.py --model BASE --adapter {folder}"
    if runs := sorted(path.parent for path in folder.glob("*/config.json")):
        return f"it holds runs, name one, e.g. {runs[-1]}"
    return "it has no config.json and no tokenizer.json"
