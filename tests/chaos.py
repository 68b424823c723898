"""Strikes at random moments: each run is resumed, and must end in the weights of one that was left alone.

    python tests/chaos.py --seconds 600 --seed 7 --scripts gpt_scratch run_lora

A strike is a kill, a signal or a closed terminal, of one rank or all, of one process or two, after a random
time or in a named function. Prints each failure, and a count by kind and by what it met.
Exit code 1 if one failed.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}

import cards  # noqa: E402

cards.hide()

import ranks  # noqa: E402
from laws.test_laws import AUTO, SHORT  # noqa: E402

KINDS = ["kill", "kill all", "SIGTERM", "SIGINT", "SIGHUP", "terminal", "terminal twice"]
PLACES = {"step": 22, "evaluation": 8, "save": 4, "pruning": 2, "worst case": 1, "caching": 1}  # calls


def drawn(rng, scripts, kinds=KINDS) -> dict:
    """What to strike, how and when, by the random numbers of `rng`."""
    place = rng.choice(["time", "time", *PLACES])
    nth = round(rng.uniform(0.1, 3.0), 2) if place == "time" else rng.randint(1, PLACES[place])
    kind, size = rng.choice(kinds), rng.randint(1, 2)
    # only rank 0 saves, prunes and caches
    rank = rng.randrange(size) if place in ("time", "step", "evaluation") else 0
    return {
        "script": rng.choice(scripts),
        "kind": kind,
        "place": place,
        "nth": nth,
        "size": size,
        "rank": rank,
    }


def flags_of(strike) -> dict:
    """The arguments of ranks.launch for a strike."""
    kind, place, nth = strike["kind"], strike["place"], strike["nth"]
    if kind.startswith("kill"):
        return {"kill": (place, nth, "all" if kind == "kill all" else strike["rank"])}
    if kind.startswith("terminal"):
        return {"closed": (place, nth, (signal.SIGHUP,) * kind.endswith("twice"), 0)}
    if place == "time":  # ranks.launch sends a signal at named places only
        place, nth = "step", 1 + int(8 * nth)
    return {"sent": (place, nth, signal.Signals[kind])}


def outcome(result) -> dict:
    figures = {name: value for name, value in result.items() if name.startswith("test/")}
    return figures | {name: result[name] for name in ("status", "weights_sha256")}


def left_over() -> list[str]:
    """Temporary files in the runs: what was written aside and never renamed."""
    return [str(path) for path in Path("out").rglob(".*") if path.name != ".lock"]


def tried(strike, want) -> tuple[str, str]:
    """(what the strike met: killed, saved, over; what was wrong afterwards, or nothing)."""
    shutil.rmtree("out", ignore_errors=True)
    for name in ("signal", "signalled"):
        Path(name).unlink(missing_ok=True)
    command = [strike["script"], "--out", "out", *SHORT[strike["script"]], *AUTO]
    codes = ranks.launch(*command, size=strike["size"], timeout=240, **flags_of(strike))
    said = Path("out.txt").read_text()
    met = "over" if codes == [0] * strike["size"] and "stopped" not in said else "saved"
    if -signal.SIGKILL in codes:
        met = "killed"
    elif "Traceback" in said:
        return met, f"a traceback: {said[-600:]}"
    ends = ranks.launch(*command, size=strike["size"], timeout=240)
    if ends != [0] * strike["size"]:
        return met, f"the resume ended with {ends}: {Path('out.txt').read_text()[-600:]}"
    if (got := outcome(ranks.result())) != want:
        return met, f"{got} is not {want}"
    return met, f"left over: {left}" if (left := left_over()) else ""


def strikes(seconds, seed, scripts, most=10**9, kinds=KINDS):
    """Yields (strike, what it met, what was wrong) until the time is over."""
    rng, known, began = random.Random(seed), {}, time.monotonic()
    for _ in range(most):
        if time.monotonic() - began > seconds:
            return
        strike = drawn(rng, scripts, kinds)
        key = strike["script"], strike["size"]
        if key not in known:
            shutil.rmtree("out", ignore_errors=True)
            known[key] = outcome(ranks.run(strike["script"], *SHORT[strike["script"]], size=strike["size"]))
        try:
            yield strike, *tried(strike, known[key])
        except TimeoutError as error:
            yield strike, "hung", str(error)[-600:]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--scripts", nargs="+", default=ranks.SCRIPTS, choices=ranks.SCRIPTS)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    args = parser.parse_args()
    counts, wrong, began = Counter(), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        os.environ["TOKEN_CACHE"] = str(Path(folder) / "tokens")
        for strike, met, failure in strikes(args.seconds, args.seed, args.scripts, kinds=args.kinds):
            counts[(strike["kind"], met)] += 1
            wrong += bool(failure)
            if failure:
                print(f"FAILED  {strike}\n  {failure}", flush=True)
    for (kind, met), count in sorted(counts.items()):
        print(f"{kind:15} {met:7} {count:4}")
    seconds = time.monotonic() - began
    print(f"{sum(counts.values())} strikes in {seconds:.0f} s, seed {args.seed}: {wrong} failed")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
