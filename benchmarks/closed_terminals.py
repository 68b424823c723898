"""Closes terminals at random moments of the six scripts' short smokes; each run is then resumed with auto.

python benchmarks/closed_terminals.py [how many, 40] [seed, 0]        # ten minutes on two cores

A terminal is a real pseudo-terminal whose other end is closed; some runs get more signals than the kernel's
SIGHUP.
The last line counts runs that were saved, and those that ended in the weights of a run left alone.
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]
import conftest  # noqa: E402, F401 (offline, cards hidden)
import ranks  # noqa: E402
from laws.test_laws import AUTO, SHORT  # noqa: E402

ALSO = [[], [signal.SIGHUP], [signal.SIGTERM], [signal.SIGTERM, signal.SIGHUP]]


def undisturbed(script) -> tuple[str, float]:
    """weights_sha256, and the seconds of a run whose imports and caches are warm."""
    for folder in ("cold", "warm"):
        os.makedirs(folder)
        os.chdir(folder)
        began = time.monotonic()
        sha = ranks.run(script, *SHORT[script], timeout=900)["weights_sha256"]
        os.chdir("..")
    return sha, time.monotonic() - began


def closed(script, seconds, also) -> dict | None:
    """result.json of a run whose terminal is closed after `seconds`; None if it was over before."""
    ranks.launch(
        script, "--out", "out", *SHORT[script], *AUTO, closed=("time", seconds, also, 0), timeout=900
    )
    if not Path("signalled").exists():
        return None
    begun = list(Path("out").glob("*/config.json"))
    return ranks.result() if begun else {"status": "not begun", "checkpoint": None}


def main(number=40, seed=0):
    here, random_moment, known = Path(tempfile.mkdtemp()), random.Random(seed), {}
    saved = same = 0
    for i in range(number):
        script, also = ranks.SCRIPTS[i % len(ranks.SCRIPTS)], random_moment.choice(ALSO)
        os.makedirs(here / script, exist_ok=True)
        os.chdir(here / script)
        sha, seconds = known.setdefault(script, None) or undisturbed(script)
        known[script], share, found = (sha, seconds), random_moment.random(), None
        while found is None:  # an earlier moment where it was over
            folder = here / f"{i}-{share:.6f}"
            os.makedirs(folder)
            os.chdir(folder)
            found = closed(script, share * seconds, also)
            moment, share = share * seconds, share * random_moment.random()
        again = ranks.run(script, *SHORT[script], *AUTO, timeout=900)["weights_sha256"] == sha
        saved, same = saved + (found["status"] in ("stopped", "finished", "not begun")), same + again
        names = "+".join(["HUP", *(number.name.removeprefix("SIG") for number in also)])
        when = f"{moment:5.1f} of {seconds:4.1f} s  {names:14}"
        ended = f"{found['status']:9} {found['checkpoint'] or '':14} {'same' if again else 'OTHER'} weights"
        print(f"{i:2} {script:24} {when} {ended}", flush=True)
    print(f"{number} closed: {saved} saved, {same} resumed to the same weights")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
