"""Ways in which bytes are damaged, by the random numbers of `rng`."""

import contextlib


def cut(content, rng) -> bytes:
    return content[: rng.randrange(len(content))] if content else content


def flip(content, rng) -> bytes:
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 20])):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def splice(content, rng) -> bytes:
    """Moves, doubles or drops a stretch."""
    a, b, c = sorted(rng.randrange(len(content) + 1) for _ in range(3))
    return content[:a] + rng.choice([content[b:c], content[b:c] * 2, b""]) + content[b:]


INSERTS = [b'"', b'\\"', b",", b"\t", b";", b"\r", b"\n", b"\0", b"\xff", b"\xe2\x80\xa8", b"[", b"{", b"}",
           b"]", b"NaN", b"null", b"\\ud800", b"[" * 50_000, b'{"a":' * 50_000, b"9" * 5000, b"-1e999",
           b"\xef\xbb\xbf", b"PK\x03\x04", b"PAR1"]  # fmt: skip


def insert(content, rng) -> bytes:
    for _ in range(rng.choice([1, 1, 3])):
        at = rng.randrange(len(content) + 1)
        content = content[:at] + rng.choice(INSERTS) + content[at:]
    return content


def encode(content, rng) -> bytes:
    with contextlib.suppress(UnicodeDecodeError):
        return content.decode().encode(rng.choice(["utf-16", "utf-32", "latin-1", "cp1252"]), "replace")
    return content


def zeros(content, rng) -> bytes:
    """What a crash of the machine leaves: the end is there, and empty."""
    at = rng.randrange(len(content) + 1)
    return content[:at] + b"\0" * (len(content) - at)


DAMAGES = [cut, flip, splice, insert, encode, zeros]
