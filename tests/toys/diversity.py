"""Small studies of run_pretrain_diversity.py."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import ranks
import torch
from ranks import launch
from toys.once import once

import core
import run_pretrain_diversity as script
from core import World
from lab.compare import study as studies
from lab.data import mixture
from lab.measure import diversity

NAME = "run_pretrain_diversity"
WORDS = {
    "a": ["gene", "cell", "protein", "of", "the", "in", "patient", "was", "with", "study"],
    "b": ["claim", "device", "method", "wherein", "said", "a", "the", "first", "layer", "invention"],
    "c": ["gene", "cell", "protein", "claim", "device", "web", "page", "click", "here", "and", "the"],
}
SOURCES = ["--sources", "a=a.jsonl", "b=b.jsonl", "c=c.jsonl"]
ARMS = ["--arms", "a", "b", "a+b", "--neutral", "c"]
TINY = [
    *("--smoke", *SOURCES, *ARMS, "--max_documents", "none", "--tokenizer", "bytes"),
    *("--val_share", 0.2, "--test_share", 0.2, "--held_out_tokens", 1500),
    *("--n_embd", 16, "--n_head", 2, "--n_layer", 1, "--block_size", 16, "--batch", 6, "--max_steps", 6),
    *("--eval_rows", 12, "--eval_batch", 32, "--eval_every", 4, "--save_every", 3, "--log_every", 3),
    *("--diversity_batches", 3, "--diversity_batch", 4, "--diversity_length", 12, "--head_epochs", 1),
    *("--floor_repeats", 2),
]


def tiny(*argv) -> list:
    """TINY and more flags; a list given anew (flags with several words add up) takes the place of TINY's."""
    flags = list(TINY)
    for name in {"--sources", "--arms"}.intersection(map(str, argv)):
        start = flags.index(name)
        stop = next(i for i in range(start + 1, len(flags)) if str(flags[i]).startswith("--"))
        del flags[start:stop]
    return [*flags, *argv]


def write(name, texts):
    Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def texts_of(name, n=150) -> list[str]:
    rng = random.Random(name)
    return [f"{i} " + " ".join(rng.choices(WORDS[name], k=rng.randint(20, 60))) for i in range(n)]


@pytest.fixture
def sources():
    for name in WORDS:
        write(f"{name}.jsonl", texts_of(name))


def parsed(*argv) -> script.Config:
    return core.parse_config(
        script.Config, script.PRESETS, script.SMOKE, script.__doc__, [str(word) for word in argv]
    )


def go(*argv, size=1, out="out", **options) -> str:
    """The script, expected to end well; returns what it printed."""
    codes = launch(NAME, "--out", out, *tiny(*argv), size=size, **options)
    said = Path("out.txt").read_text()
    assert codes == [0] * size, said
    return said


def study_of(out="out") -> dict:
    """study.json of the only study there."""
    (path,) = Path(out).glob("study-*/study.json")
    return json.loads(path.read_text())


def run_folders(out="out") -> dict[str, Path]:
    """arm-seed -> folder; each run is there once."""
    found = {}
    for path in sorted(Path(out).glob("*/config.json")):
        constants = json.loads(path.read_text())["constants"]
        name = f"{constants['data'].replace('+', '_')}-s{constants['seed']}"
        assert name not in found, f"{path.parent} is {found[name]} again"
        found[name] = path.parent
    return found


JOBS = 3 * 3 * 2 + 2 * 3  # of the arms each batch twice, for the floor; of the bounds once


def kept_in(out="out") -> list[Path]:
    """Files of embeddings."""
    return sorted(Path(out).glob("embeddings/*.npy"))


def results_of(out="out") -> dict[str, dict]:
    return {tag: json.loads((folder / "result.json").read_text()) for tag, folder in run_folders(out).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder in which a study has run to its end, on one rank and undisturbed: not to be written to."""
    return once(_whole, tmp_path_factory)


def _whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in WORDS:
            write(f"{name}.jsonl", texts_of(name))
        Path("said.txt").write_text(go())
    return folder


def study_here(*argv) -> script.DiversityStudy:
    """Of the sources in the current folder."""
    cfg, given = parsed(*tiny("--out", "out", *argv)), (script.Config, script.PRESETS, script.SMOKE)
    plan = studies.Plan(cfg, World(), script.__file__, *given, script.main, own=script.OWN)
    return script.DiversityStudy(plan, mixture.load_text(cfg, World()), None)


def plan_of(folder) -> tuple[diversity.Draws, list]:
    """(Draws, jobs) of the coefficients of a study, whose probe is its last arm's first run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        s = study_here()
        draws = script.draws_of(s, s.text.tokenizer)
        return draws, diversity.plan(
            s.plan.cfg, draws, results_of()["a_b-s0"]["weights_sha256"], torch.float32
        )


@pytest.fixture
def copied(whole):
    """The current folder as a copy of it."""
    shutil.copytree(whole, ".", dirs_exist_ok=True)
    return Path(".")


def snapshot(*patterns) -> dict[str, int]:
    """Files and when they were written."""
    files = [path for pattern in patterns for path in Path("out").rglob(pattern) if path.is_file()]
    return {str(path): path.stat().st_mtime_ns for path in files}


def in_process(argv, monkeypatch, capfd):
    """The script in this process; what it printed."""
    monkeypatch.setattr(sys, "argv", [f"{NAME}.py", *map(str, argv)])
    ranks.main(NAME)
    return capfd.readouterr().out


def fails(argv, monkeypatch, capfd) -> str:
    """Expects one line on stderr and exit code 2; returns the line."""
    monkeypatch.setattr(sys, "argv", [f"{NAME}.py", "--out", "out", *map(str, argv)])
    with pytest.raises(SystemExit) as left:
        ranks.main(NAME)
    lines = capfd.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and len(lines) == 1, lines
    assert lines[0].startswith(f"{NAME}.py: error: ")
    assert not list(Path("out").glob("*/config.json")) and not list(Path("out").glob("*/cross"))
    return lines[0]
