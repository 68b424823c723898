"""The scripts on the card itself, in processes of their own; skipped where there is none.

cards.FOUND says how to try these tests on a CPU.
"""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cards
import graph_decoding
import half_head
import pytest
from conftest import PROJECT
from ranks import SCRIPTS

pytestmark = pytest.mark.gpu
AT_ONCE = 4  # processes: most of a smoke is imports and CUDA's start
SECONDS = 240  # for one of them
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

FAST = [*("--smoke", "--max_steps", 30, "--log_every", 1, "--eval_every", 30, "--dropout", 0)]
BARE = [*("--sample_tokens", 0, "--answer_rows", 0, "--plain_blocks", 0)]
LOSSES = {  # 30 steps of the same weights and rows, none of them random
    "gpt_scratch": [*FAST, "--max_documents", 20, "--sample_tokens", 0],
    "run_lora": [*FAST, *BARE, "--lora_dropout", 0],
    "run_preference": [*FAST, "--encoder_dropout", 0, "--max_documents", 400],
}
LONG = ["--smoke", "--max_steps", 90, "--save_every", 10, "--eval_every", 45]
KILLED = {  # behind the checkpoint of step 30; a head of 2^25 logits is compiled, a small one is not
    "gpt_scratch": [
        *(*LONG, "--max_documents", 200, "--sample_tokens", 0),
        *("--tokenizer", "bpe:4096", "--batch", 64, "--block_size", 128),
    ],
    "run_lora": [*LONG, *BARE],
}
AUTO = ["--resume_timestamp", "auto"]


@dataclass
class Process:
    """`python script flags` in a folder of its own, with or without the card."""

    script: str
    flags: list
    folder: Path
    on_card: bool = True
    code: int | None = None

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(PROJECT / f"{self.script}.py"), *map(str, self.flags)]
        env = cards.environment() if self.on_card else dict(os.environ)
        env |= {"OMP_NUM_THREADS": str(max(1, CORES // AT_ONCE))}
        pipes = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        with open(self.folder / "said.txt", "ab") as said:
            self.process = subprocess.Popen(command, cwd=self.folder, env=env, stdout=said, **pipes)

    def wait(self):
        try:
            self.code = self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        return self

    def kill(self):
        self.process.kill()
        self.code = self.process.wait()

    @property
    def said(self) -> str:
        return (self.folder / "said.txt").read_text(errors="replace")

    def runs(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob("**/config.json") if "constants" in read(path))

    def run(self) -> Path:
        """The only one, finished."""
        assert self.code == 0, self.said
        (run,) = self.runs()
        assert read(run / "result.json")["status"] == "finished"
        return run


def read(path) -> dict:
    return json.loads(path.read_text())


def killed_and_resumed(script, flags, folder) -> Process:
    """SIGKILL once the checkpoint of step 30 is whole, then the same command once more."""
    first = Process(script, flags, folder)
    ends = time.monotonic() + SECONDS
    while first.process.poll() is None and time.monotonic() < ends:
        if list(folder.glob("out/*/checkpoints/step_00000030/manifest.json")):
            break
        time.sleep(0.005)
    if first.process.poll() is None:
        first.kill()
    assert first.code == -signal.SIGKILL, f"ended before it could be killed behind step 30:\n{first.said}"
    return Process(script, flags, folder).wait()


def work(key, folder) -> Process:
    """What a key like "smoke run_lora" stands for."""
    kind, script, *how = key.split()
    if kind == "smoke":
        return Process(script, ["--smoke"], folder).wait()
    half = ["--dtype", cards.found()["half"], "--out", "out"]
    if kind == "losses":
        dtype = half if how == ["half"] else ["--dtype", "fp32", "--out", "out"]
        return Process(script, [*LOSSES[script], *dtype], folder, on_card=how != ["cpu"]).wait()
    if how == ["killed"]:
        return killed_and_resumed(script, [*KILLED[script], *half, *AUTO], folder)
    return Process(script, [*KILLED[script], *half, *AUTO], folder).wait()


def keys(kind, scripts, *how):
    """Parameters of a test: for each script the keys of the work it looks at."""
    every = [[f"{kind} {script} {one}".strip() for one in how or [""]] for script in scripts]
    return pytest.mark.parametrize("keys", every, ids=list(scripts))


@pytest.fixture(scope="session")
def made(request, tmp_path_factory):
    """made(keys): the finished processes. All that selected tests will ask for is begun at once, in turn."""
    folder, pool, known = tmp_path_factory.mktemp("gpu"), ThreadPoolExecutor(AT_ONCE), {}

    def begin(key):
        if key not in known:
            known[key] = pool.submit(work, key, folder / key.replace(" ", "-"))
        return known[key]

    if "PYTEST_XDIST_WORKER" not in os.environ:  # whose workers each have tests of their own
        params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
        wanted = [key for some in params if "keys" in some for key in some["keys"]]
        for key in sorted(wanted, key=lambda key: not key.startswith(("smoke run_mathqa", "smoke run_pre"))):
            begin(key)  # the longest first
    yield lambda keys: [one.result() for one in [begin(key) for key in keys]]
    pool.shutdown(cancel_futures=True)


@pytest.mark.usefixtures("made")  # the long ones run meanwhile
def test_two_ranks_on_one_card_are_one_line(tmp_path):
    """Not by torchrun, which may end the one that speaks when the other has left."""
    card = cards.found()
    if card["count"] > 1:
        pytest.skip(f"{card['count']} cards here")
    command = [sys.executable, str(PROJECT / "gpt_scratch.py"), "--smoke"]
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [
        subprocess.Popen(
            command, env=cards.environment() | both | {"RANK": rank, "LOCAL_RANK": rank}, **pipes
        )
        for rank in ("0", "1")
    ]
    said = "".join(rank.communicate(timeout=SECONDS)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert [line for line in said.splitlines() if "error" in line] == [
        f"gpt_scratch.py: error: 2 processes but 1 {card['kind']} device(s): use --nproc_per_node=1"
    ]


HEADS = [  # rows, width, vocabulary, rank of an adapter, bias; 50,257 is padded inside, 50,304 need not be
    *[(700, 256, vocabulary, 0, bias) for vocabulary in (97, 50257, 50304) for bias in (False, True)],
    *[(700, 256, vocabulary, 8, bias) for vocabulary in (97, 50257, 50304) for bias in (False, True)],
    (6000, 32, 50257, 8, False),  # in several chunks, whose gradients are added up
]


@pytest.mark.usefixtures("made")
def test_the_head_in_half_precision_is_the_one_in_fp64():
    card = cards.found()
    command = [sys.executable, half_head.__file__, card["kind"], card["half"], json.dumps(HEADS)]
    done = subprocess.run(command, env=cards.environment(), capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    for case, found in zip(HEADS, json.loads(done.stdout.splitlines()[-1]), strict=True):
        print(case, found)
        half_head.check(found)


@pytest.mark.usefixtures("made")
def test_a_graph_a_token_writes_what_single_kernels_write():
    card = cards.found()
    command = [sys.executable, graph_decoding.__file__, card["kind"], card["half"]]
    done = subprocess.run(command, env=cards.environment(), capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(found["equal"]), found
    graphs = 6 if card["kind"] == "cuda" else 0  # of a shape: fp32's decoder one, those in half one each
    assert found["graphs"] == graphs, done.stderr
    assert ("NOTE" in done.stderr) == (card["kind"] not in ("cpu", "cuda")), done.stderr


KERNELS = """
import sys, torch
from lab.models import packed
cases = [(128, 1), (64, 1), (64, 4), (8, 2)]  # size of heads, how many share keys and values
works = [packed._works(torch.device("cuda"), torch.bfloat16, *case) for case in cases]
sys.exit(None if all(works) else "; ".join(packed.notes))
"""


@pytest.mark.usefixtures("made")
def test_the_kernel_for_packed_rows_computes_what_the_mask_does():
    """From torch 2.11 on."""
    card = cards.found()
    if (card["kind"], card["half"]) != ("cuda", "bf16"):
        pytest.skip("no such kernel")
    command = [sys.executable, "-c", KERNELS]
    env = cards.environment() | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr


@keys("smoke", SCRIPTS)
def test_the_smoke_of_every_script_runs_whole_on_the_card(keys, made):
    (done,) = made(keys)
    assert done.code == 0 and done.runs(), done.said
    for run in done.runs():
        config = read(run / "config.json")
        assert read(run / "result.json")["status"] == "finished"
        card = cards.found()
        assert config["constants"]["dtype"] == ("fp32" if card["kind"] == "cpu" else card["half"])  # of auto
        assert config["device"].startswith("cpu") == (cards.found()["kind"] == "cpu")


@keys("smoke", ["run_lora"])
def test_eval_measures_a_run_of_the_card_again(keys, made, tmp_path):
    run = made(keys)[0].run()
    done = Process("eval", ["--run", run], tmp_path / "eval").wait()
    assert done.code == 0, done.said
    assert " as result.json has it" in done.said and "not as result.json" not in done.said, done.said


def losses(process) -> list[float]:
    rows = [json.loads(row) for row in (process.run() / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


@keys("losses", LOSSES, "cpu", "fp32", "half")
def test_thirty_losses_on_the_card_are_those_of_the_cpu(keys, made):
    cpu, fp32, half = made(keys)
    dtypes = [read(one.run() / "config.json")["constants"]["dtype"] for one in (cpu, fp32, half)]
    assert dtypes == ["fp32", "fp32", cards.found()["half"]]
    there, exact, rounded = map(losses, (cpu, fp32, half))
    assert len(there) == len(exact) == len(rounded) == 30
    # additions in another order, which AdamW passes on: 2e-6 on an H200
    assert max(abs(a - b) / max(1, abs(b)) for a, b in zip(exact, there, strict=True)) <= 1e-5
    # 8 bits of precision: 0.0007 to 0.0044 there
    assert sum(abs(a - b) for a, b in zip(rounded, there, strict=True)) / 30 <= 0.02


@keys("resume", KILLED, "whole", "killed")
def test_killed_on_the_card_and_resumed_ends_in_the_same_weights(keys, made):
    whole, resumed = (process.run() for process in made(keys))
    assert read(resumed / "config.json")["resumes"][0]["step"] >= 30
    first, again = (read(run / "result.json") for run in (whole, resumed))
    assert "not compiled" not in (resumed / "log.txt").read_text()
    assert again["step"] == first["step"] == 90
    apart = {name: (first[name], again[name]) for name in first if name.endswith("/loss")}
    assert again["weights_sha256"] == first["weights_sha256"], apart
