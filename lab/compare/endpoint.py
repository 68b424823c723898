"""HTTP as a judge needs it: bounded in time and size, no redirects; keys and addresses that can be told."""

import contextlib
import http.client
import os
import queue
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from email.utils import parsedate_to_datetime

from lab.errors import UserError
from lab.run.terminal import one_line

LOCAL = ("localhost", "127.0.0.1", "::1", "0.0.0.0")
SECRET = 8  # characters from which on a key is one: `x` and `EMPTY` are what servers without keys are given


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: one would send the API key to another host."""

    def redirect_request(self, *args):
        return None


def in_time(seconds, work, *args):
    """work(*args), at most so many seconds, whatever it does: a connection's own time-out limits each silence
    only, so that a name server, a handshake or headers that drip could take for ever. TimeoutError."""
    done = queue.SimpleQueue()

    def run():
        try:
            done.put((work(*args), None))
        except Exception as error:
            done.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error:
        raise error
    return result


def exchange(request, seconds, most=1 << 24) -> tuple[int, str, object, bytes]:
    """(status, reason, headers, the first `most` bytes of the body) of what a server answers, errors too."""
    deadline, read = time.monotonic() + seconds, b""
    # a proxy of the environment would be handed the key for a server on this machine, in clear
    direct = [urllib.request.ProxyHandler({})] if host_of(request.full_url) in LOCAL else []
    try:
        response = urllib.request.build_opener(NoRedirect, *direct).open(request, timeout=seconds)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        try:
            while len(read) < most and (part := response.read1(1 << 16)):
                read += part
                if time.monotonic() > deadline:
                    raise TimeoutError
        except (OSError, http.client.HTTPException):
            if response.status < 300:  # of an error, the status says enough
                raise
        return response.status, response.reason, response.headers, read


SPAN = (
    r"(?:\d+(?:\.\d+)?\s?(?:ms|milliseconds?|s|sec(?:ond)?s?|m|min(?:ute)?s?|h|hours?)(?![a-z])[\s,]{0,2})+"
)
PAUSES = (  # "retryDelay": "50s"; please try again in 6m0s; "retry_after": 12.5
    rf"retry_?delay\W{{1,6}}({SPAN})",
    rf"(?:try again|retry|wait)(?:ing)?(?: (?:in|after|for|at least|about)){{0,2}} ({SPAN})",
    r"retry[_-]after(?:_seconds)?\W{1,6}(\d+(?:\.\d+)?)",
)
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def told_pause(headers, said) -> float:
    """Seconds that a server asks to wait, in its headers or its words: the longest, or 0."""
    told, date = [0.0], headers.get("Retry-After")
    for value, unit in ((headers.get("Retry-After-ms"), 0.001), (date, 1.0)):
        with contextlib.suppress(TypeError, ValueError):
            told.append(float(value) * unit)
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        told.append(parsedate_to_datetime(date).timestamp() - time.time())
    found = (re.search(pattern, said[:20_000], re.I) for pattern in PAUSES)
    return max([*told, *(seconds_of(span[1]) for span in found if span)])


def seconds_of(span) -> float:
    """Seconds of 50, 350ms, 6m0s, 1 minute 30 seconds."""
    total = 0.0
    for number, unit in re.findall(r"(\d+(?:\.\d+)?)\s?([a-z]*)", span.lower()):
        unit = "ms" if unit.startswith(("ms", "mil")) else unit[:1] or "s"
        total += float(number) * UNITS[unit]
    return total


def fault(error) -> str:
    error = getattr(error, "reason", error)
    if isinstance(error, TimeoutError):
        return "no answer in time (see --judge_seconds)"
    return str(error) or type(error).__name__


def host_of(url) -> str | None:
    return urllib.parse.urlsplit(url).hostname


def checked_host(url) -> str:
    """The host of --judge_url. UserError for what is no address, or holds a password, which would be told."""
    if "@" in url:
        raise UserError("--judge_url holds a name or password before an @: give the key by --judge_key")
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port)
    except ValueError:  # of a port that is no number, of half an IPv6 address
        usable = False
    if not usable or "#" in url or not url.isascii() or not url.isprintable() or " " in url:
        raise UserError(f"--judge_url {shown_url(url)}: use http://localhost:11434/v1 or the like")
    return parts.hostname


def shown_url(url) -> str:
    """An address in one line without its query, in which keys are given, too."""
    return one_line(url.partition("?")[0])


def secrets_of(key, url) -> list[str]:
    """What no message and no file may hold: the key, and values of the address' query, as they stand there
    and decoded. A short one is none: it would be found in any text."""
    query = url.partition("?")[2]
    values = {key or "", *(value for _, value in urllib.parse.parse_qsl(query))}
    values |= {part.rpartition("=")[2] for part in query.split("&")}
    return sorted((value for value in values if len(value) >= SECRET), key=len, reverse=True)


def key_of(name) -> str:
    """The key in the environment variable `name`. UserError, without it, for one that no header holds."""
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.A):
        raise UserError("--judge_key names no environment variable: export NAME=..., then --judge_key NAME")
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"the key in {name} holds a line break, a blank or a sign beyond ASCII: put it alone")
    return key
