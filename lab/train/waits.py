"""How long this process waits within its steps, by the host's clock: for its batches, and for other ranks."""

import threading
import time
from contextlib import contextmanager

seconds = {"data": 0.0, "ranks": 0.0}  # since the process began


@contextmanager
def waiting(what):
    """Context, or decorator, whose time counts as waiting for `what`: data or ranks. Of the main thread
    alone: one that prepares batches ahead is at work while others wait for nothing."""
    began = time.perf_counter()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            seconds[what] += time.perf_counter() - began


def since(before) -> dict[str, float]:
    """What has been added to `seconds` since it was as in `before`, a copy."""
    return {what: now - before[what] for what, now in seconds.items()}
