"""A terminal that may be gone: no write to it raises, and none holds control characters."""

import contextlib
import errno
import os
import re
import sys

# what data, names and a server's errors may hold, and a terminal would obey; a bar goes up a line (ESC [A)
CONTROLS = re.compile("\x1b(?!\\[A)|[\x00-\x07\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f]")
LOST = (errno.EIO, errno.EPIPE)  # a terminal or a pipe that nobody will ever read again; a disk may have room


class Terminal:
    """Wraps a stream so that writes never raise: not when the terminal is gone (SSH lost, tmux killed), the
    pipe closed, the disk full, or the locale without ±. Everything else is the stream's own."""

    def __init__(self, stream):
        self.stream, self.is_dead = stream, False

    def __getattr__(self, name):
        if name == "stream" or name.startswith("__"):  # of a copy that is still empty
            raise AttributeError(name)
        return getattr(self.stream, name)

    def write(self, text):
        text = CONTROLS.sub("?", text)
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            self.write(text.encode("ascii", "replace").decode())
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self._failed(error)
        return len(text)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._failed(error)

    def _failed(self, error):
        if isinstance(error, ValueError) or error.errno in LOST:
            self.is_dead = True
            with contextlib.suppress(OSError, ValueError):
                silence(self.stream.fileno())


class Log:
    """log.txt of a run. What is said before `open` waits: a refused resume leaves the file as it was. No
    write raises: a full disk must not end a run."""

    def __init__(self, path):
        self.path, self.waiting, self.stream = path, "", None

    def open(self):
        self.stream = Terminal(open(self.path, "a", encoding="utf-8"))
        self.write(self.waiting)

    def write(self, text):
        if self.stream is None:
            self.waiting += text
        else:
            self.stream.write(text)
            self.stream.flush()

    def close(self):
        if self.stream is not None:
            self.stream.close()

    @property
    def closed(self) -> bool:
        return self.stream is None or self.stream.closed

    def fileno(self) -> int:
        return self.stream.fileno()


def silence(descriptor):
    """Points stdout or stderr to /dev/null, for those who write to it past Terminal: libraries that took the
    stream before it was wrapped, C++, child processes, and Python's last flush at exit."""
    if descriptor in (1, 2):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def outlive_terminal():
    """Wraps stdout and stderr in Terminal: no print, bar, warning or traceback of this process raises."""
    for descriptor in (0, 1, 2):  # one that the shell closed would become the next file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # None where the shell closed it: >&-
        if not isinstance(stream, Terminal):
            setattr(sys, name, Terminal(stream))


def write_in_handler(text, log=None):
    """Writes to stderr and an open log from a signal handler, past Python's streams,
    which may be amid a write.

    Never raises.
    """
    for descriptor in (2, *([log.fileno()] if log and not log.closed else [])):
        try:
            os.write(descriptor, text.encode())
        except OSError as error:
            if error.errno in LOST:
                silence(descriptor)


def one_line(text) -> str:
    return "".join(c if c.isprintable() else " " for c in text.replace("\n", " / "))
