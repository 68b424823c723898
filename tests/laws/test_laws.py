"""The laws (docs/laws.md) on every script. A script joins SCRIPTS (ranks.py) and SHORT the day it
is born.
"""

import fcntl
import importlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROJECT
from ranks import SCRIPTS, launch, newest, result, run, stopped
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import core
from lab.data import builtin, columns
from lab.run.files import short_hash

SHORT = {  # some 24 steps with several saves and evaluations, and a short last slice on 2 and 3 ranks
    "run_preference": [
        *("--smoke", "--max_documents", 105, "--batch", 7, "--epochs", 2),
        *("--eval_every", 8, "--save_every", 4, "--log_every", 4),
        *("--dropout", 0.1, "--encoder_dropout", 0.1),  # resumed randomness is part of law 3
    ],
    "gpt_scratch": [
        *("--smoke", "--max_documents", 12, "--val_share", 0.2, "--test_share", 0.2, "--n_embd", 32),
        *("--batch", 7, "--max_steps", 24, "--eval_batch", 24),
        *("--eval_every", 8, "--save_every", 4, "--log_every", 4, "--sample_tokens", 8),
        *("--dropout", 0.1, "--shard", "optimizer"),
    ],
}
TUNE = [
    *("--smoke", "--max_documents", 105, "--batch", 7, "--epochs", 2, "--dropout", 0.1),
    *("--eval_every", 8, "--save_every", 5, "--log_every", 4),
    *("--sample_tokens", 4, "--answer_rows", 7, "--max_new_tokens", 4, "--plain_blocks", 3),
]
DIVERSE = [
    *("--smoke", "--mode", "train", "--max_documents", 60, "--val_share", 0.2, "--test_share", 0.2),
    *("--held_out_tokens", 1500, "--n_embd", 32, "--block_size", 32, "--eval_rows", 20, "--eval_batch", 24),
]
SHORT["run_pretrain_diversity"] = [
    *(
        *DIVERSE,
        "--batch",
        7,
        "--max_steps",
        24,
        "--dropout",
        0.1,
        "--optimizer",
        "muon",
        "--schedule",
        "wsd",
    ),
    *("--eval_every", 8, "--save_every", 5, "--log_every", 4),
]
MATHQA = [
    *("--smoke", "--mode", "train", "--init_from", "new", "--max_documents", 105, "--answer_rows", 7),
    *("--pretrain", "noam_wide4,max_documents=30,tokenizer=bpe:300,block_size=64,n_embd=32"),
    *("--plain_blocks", 3),
]
SHORT["run_mathqa"] = [
    *(*MATHQA, "--batch", 7, "--epochs", 2, "--dropout", 0.1),
    *("--eval_every", 8, "--save_every", 5, "--log_every", 4),
]
SHORT |= {
    "run_instruct": [*TUNE, "--skip_spikes", "--shard", "optimizer"],
    "run_lora": [
        *[*TUNE, "--lora_dropout", 0.1, "--model", "tiny:llama"],  # keys and values that heads share
        *["--lora_dora", "--lora_init", "pissa", "--lora_plus", 2, "--lora_rank", 4],
    ],
}
FOLDS = [  # of run_preference, with 12 steps each
    *("--smoke", "--max_documents", 120, "--batch", 6, "--epochs", 2, "--folds", 3),
    *("--eval_every", 6, "--save_every", 3, "--log_every", 4, "--dropout", 0.1),
]
FROZEN = [*FOLDS, "--freeze", "all"]  # the encoder is run once into the cache
ADAPTED = ["--method", "lora", "--lora_rank", 2, "--lora_dropout", 0.1]
PARTLY = {  # what is trained is a part, and checkpoints hold that part
    "frozen": FROZEN,
    "lora": [*FOLDS, *ADAPTED],
    "lora on a decoder": [*FOLDS, *ADAPTED, "--model", "tiny:llama", "--inputs", "joint"],
}
EXACT = {  # what makes the number of ranks invisible
    "run_preference": ["--dropout", 0, "--encoder_dropout", 0],
    "gpt_scratch": ["--dropout", 0],
    "run_instruct": ["--dropout", 0],
    "run_lora": ["--dropout", 0, "--lora_dropout", 0],
    "run_pretrain_diversity": ["--dropout", 0],
    "run_mathqa": ["--dropout", 0],
}
FEW = {  # hardly any rows, no training
    "run_preference": ["--smoke", "--max_documents", 90, "--epochs", 0],
    "gpt_scratch": [
        *("--smoke", "--max_documents", 20, "--val_share", 0.2, "--test_share", 0.2, "--n_embd", 32),
        *("--max_steps", 0, "--sample_tokens", 0),
    ],
}
NONE = ["--smoke", "--max_documents", 200, "--max_steps", 0, "--sample_tokens", 0, "--answer_rows", 0]
FEW |= dict.fromkeys(("run_instruct", "run_lora"), NONE)
FEW["run_pretrain_diversity"] = [*DIVERSE, "--max_steps", 0]
FEW["run_mathqa"] = [*MATHQA, "--max_steps", 0]
TUNED = ("run_instruct", "run_lora")
COUNT = dict.fromkeys(SCRIPTS, "test/rows") | {"gpt_scratch": "test/targets"}
ROW = dict.fromkeys(SCRIPTS, 1) | {"gpt_scratch": 32}  # targets of a full row
LOSS = dict.fromkeys(SCRIPTS, "test/loss") | {"run_preference": "test/log_loss"}
RATE = dict.fromkeys(SCRIPTS, "tokens_per_second") | {"run_preference": "examples_per_second"}
AUTO = ("--resume_timestamp", "auto")
SHARED = ("--shard", "full")


def on_every_script(*cases, scripts=SCRIPTS, quick=1):
    """Parameters (script, *case). Of three and more cases a script gets every third one: each case runs on
    two scripts. CI runs them all, the default set the first `quick` cases, each on one script, in turn."""
    first, params, every = next(_uses), [], scripts
    for n, case in enumerate(cases):
        scripts = every if len(cases) < 3 else every[n % 3 :: 3]
        default = scripts[(first + n) % len(scripts)]
        params += [
            pytest.param(script, *case, marks=[] if script == default and n < quick else [pytest.mark.slow])
            for script in scripts
        ]
    return params


_uses = itertools.count()
# what lab/run does for a script without its help is tried on two that share nothing else
TWO = ["run_preference", "gpt_scratch"]


_known = {}


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """What an uninterrupted run on `size` ranks ends with: (result, curve of TensorBoard). Made once for all
    files and, under a lock, for all workers of pytest-xdist."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared

    def reference(script, size, flags=None):
        key = (script, size, str(flags))
        if key not in _known:
            folder = straight_folder(shared, *key)
            folder.mkdir(exist_ok=True)
            with open(folder / "lock", "w") as lock, pytest.MonkeyPatch.context() as patch:
                fcntl.flock(lock, fcntl.LOCK_EX)
                patch.chdir(folder)
                if not Path("known.json").exists():
                    ended = run(script, *(flags or SHORT[script]), "--note", "a word", size=size)
                    seen = curves(newest()) | {"samples": samples(newest())}
                    Path("known.json").write_text(json.dumps([ended, seen]))
                _known[key] = json.loads(Path("known.json").read_text())
                constants = json.loads((newest() / "config.json").read_text())["constants"]
                assert constants["dtype"] == "fp32"  # what auto became
        return _known[key]

    reference.folder = lambda script, size: newest(straight_folder(shared, script, size, "None") / "out")
    return reference


def straight_folder(shared, *key) -> Path:
    return shared / f"straight_{key[0]}_{key[1]}_{short_hash(key)}"


def curves(folder) -> dict[str, list]:
    """tag -> [(step, value)] as TensorBoard shows it."""
    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def samples(folder) -> list[str]:
    path = folder / "samples.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def same_outcome(got, want):
    assert got["status"] == "finished"
    assert got["weights_sha256"] == want["weights_sha256"]
    tests = [name for name in want if name.startswith("test/")]
    assert tests and {name: got[name] for name in tests} == {name: want[name] for name in tests}


def same_curves(folder, want):
    """The resumed run's TensorBoard and samples.jsonl are those of one that never stopped."""
    got = curves(folder)
    assert samples(folder) == want["samples"]
    for tag, points in want.items():
        if tag == "samples":
            continue
        steps = [step for step, _ in got[tag]]
        assert steps == sorted(set(steps)), f"{tag} is forked"
        if not tag.endswith("_per_second") and not tag.startswith(("wait/", "mfu")):  # by the clock
            np.testing.assert_allclose(got[tag], points, rtol=1e-6, err_msg=tag)


@pytest.mark.parametrize(
    ("script", "place", "nth", "who", "size"),
    on_every_script(
        ("step", 13, 0, 1),
        ("evaluation", 7, 0, 1),
        ("evaluation", 6, 1, 2),
        ("caching", 1, 0, 1),
        ("save", 3, 0, 1),
        ("pruning", 2, 0, 1),
        ("caching", 1, "all", 2),
        ("step", 11, 2, 3),
        ("save", 4, "all", 3),
        quick=3,
    ),
)
def test_killed_and_resumed_ends_in_the_same_weights(script, place, nth, who, size, straight):
    want, want_curves = straight(script, size)
    codes = launch(script, "--out", "out", *SHORT[script], *AUTO, size=size, kill=(place, nth, who))
    assert -9 in codes, Path("out.txt").read_text()
    same_outcome(run(script, *SHORT[script], *AUTO, size=size), want)
    assert len(list(Path("out").iterdir())) == 1
    same_curves(newest(), want_curves)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "place", "nth", "who", "size"),
    [
        ("frozen", "encoding", 1, 0, 1),
        ("frozen", "encoding", 2, "all", 2),
        ("lora on a decoder", "evaluation", 15, 1, 2),
        ("lora", "step", 26, 2, 3),
    ],
)
def test_a_frozen_encoder_and_folds_are_resumed_to_the_same_weights(part, place, nth, who, size, straight):
    """Laws 2 and 3: vectors from the cache, or half made when the process died, and finished folds; of
    adapters and their base, which no checkpoint holds."""
    flags = PARTLY[part]
    want, want_curves = straight("run_preference", size, flags)
    codes = launch("run_preference", "--out", "out", *flags, *AUTO, size=size, kill=(place, nth, who))
    assert -9 in codes, Path("out.txt").read_text()
    same_outcome(run("run_preference", *flags, *AUTO, size=size), want)
    same_curves(newest(), want_curves)


@pytest.mark.slow
@pytest.mark.parametrize(("place", "size"), [("encoding", 2), ("evaluation", 2)])
def test_a_signal_while_a_frozen_encoder_runs_or_folds_are_judged_is_agreed_on(place, size, straight):
    sent = (place, 1 if place == "encoding" else 12, signal.SIGTERM)
    codes = launch("run_preference", "--out", "out", *FROZEN, *AUTO, size=size, sent=sent)
    assert codes == stopped(size, signal.SIGTERM), Path("out.txt").read_text()
    assert result()["why"] == "Stop: SIGTERM"
    want = straight("run_preference", size, FROZEN)[0]
    same_outcome(run("run_preference", *FROZEN, *AUTO, size=size), want)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "ways"),
    [
        ("frozen", [(1, "none"), (2, "none"), (3, 1)]),
        ("lora", [(1, "none"), (3, 1)]),
        ("lora on a decoder", [(1, "none"), (2, 1)]),
    ],
)
def test_a_frozen_encoder_and_folds_do_not_depend_on_ranks_or_accumulation(part, ways):
    """Laws 1 and 2 in fp64, to 1e-9; each row is out of fold once. With rows of another set, some of them
    with probabilities, each weighing a third."""
    more = [line | dict.fromkeys(columns.SOFT, 1 / 3) for line in builtin.python_pairs(15, seed=3)]
    Path("more.json").write_text(json.dumps([*more, *builtin.python_pairs(15, seed=4)]))
    flags = [*PARTLY[part], *EXACT["run_preference"], "--dtype", "fp64"]
    flags += ["--lora_dropout", 0] if part != "frozen" else ["--extra_data", "0.3*more.json"]
    flags += ["--label_smoothing", 0.1, "--head", "compare"] if part == "frozen" else []
    reference = None
    for size, micro_batch in ways:
        got = run("run_preference", *flags, "--micro_batch", micro_batch, size=size)
        checkpoints = newest() / "checkpoints"
        folds = [load_file(checkpoints / name / "model.safetensors") for name in got["test_checkpoints"]]
        reference = reference or (folds, got)
        assert len(folds) == 3 and got["test/rows"] == 120
        for fold, want in zip(folds, reference[0], strict=True):
            for name, value in fold.items():
                torch.testing.assert_close(value, want[name], rtol=0, atol=1e-9, msg=f"{size} {name}")
        assert got["test/log_loss"] == pytest.approx(reference[1]["test/log_loss"], abs=1e-9)
        shutil.rmtree("out")
        shutil.rmtree("cache", ignore_errors=True)  # the next ones encode, too; of adapters there is none


@pytest.mark.slow
@pytest.mark.parametrize(("script", "size"), [("run_preference", 1)])
def test_killed_again_and_again_at_random_moments(script, size, straight):
    """Ten strikes each; the named moments are test_killed_and_resumed_ends_in_the_same_weights's."""
    want, want_curves = straight(script, size)
    rng, kills = random.Random(size), 0
    most = {"caching": 1, "step": 6, "evaluation": 4, "save": 2, "time": 1.2}  # calls, or seconds
    for attempt in range(10):
        place = "caching" if attempt == 0 else rng.choice(["step", "evaluation", "save", "time"])
        nth = rng.uniform(0.3, most[place]) if place == "time" else rng.randint(1, most[place])
        who = "all" if rng.random() < 0.5 else 0 if place in ("save", "caching") else rng.randrange(size)
        codes = launch(script, "--out", "out", *SHORT[script], *AUTO, size=size, kill=(place, nth, who))
        if -9 not in codes:  # the run was over before the moment came: the next kills need a new one
            assert codes == [0] * size, Path("out.txt").read_text()
            same_outcome(result(), want)
            shutil.rmtree("out")
        else:
            kills += 1
    assert kills >= 5
    same_outcome(run(script, *SHORT[script], *AUTO, size=size), want)
    same_curves(newest(), want_curves)


@pytest.mark.parametrize(
    ("script", "number", "place", "nth", "size"),
    on_every_script(
        (signal.SIGTERM, "step", 7, 1),
        (signal.SIGINT, "evaluation", 6, 2),
        (signal.SIGINT, "evaluation", 5, 1),
        (signal.SIGHUP, "step", 9, 2),
        (signal.SIGTERM, "save", 3, 3),
        quick=2,
    ),
)
def test_a_signal_saves_and_leaves(script, number, place, nth, size, straight):
    codes = launch(script, "--out", "out", *SHORT[script], *AUTO, size=size, sent=(place, nth, number))
    left = time.time() - Path("signalled").stat().st_ctime
    assert codes == stopped(size, number), Path("out.txt").read_text()
    assert left < 60  # of a busy machine
    got = result()
    assert got["status"] == "stopped" and got["why"] == f"Stop: {signal.Signals(number).name}"
    if place == "step":  # the signal came before step nth was made: it is made, then saved
        assert got["checkpoint"] == f"step_{nth:08d}"
    same_outcome(run(script, *SHORT[script], *AUTO, size=size), straight(script, size)[0])
    same_curves(newest(), straight(script, size)[1])


@pytest.mark.slow
def test_a_signal_while_rank_0_samples_is_heard_there(straight, size=2):
    """Law 5: the twelfth token is the fourth of the samples after step 16, which are then not written."""
    script = "gpt_scratch"
    codes = launch(script, "--out", "out", *SHORT[script], size=size, sent=("sampling", 12, signal.SIGTERM))
    assert codes == stopped(size, signal.SIGTERM), Path("out.txt").read_text()
    assert result()["why"] == "Stop: SIGTERM" and result()["checkpoint"] == "step_00000016"
    assert {json.loads(line)["step"] for line in samples(newest())} == {8}
    same_outcome(run(script, *SHORT[script], *AUTO, size=size), straight(script, size)[0])
    same_curves(newest(), straight(script, size)[1])


@pytest.mark.slow
def test_a_signal_while_all_ranks_answer_is_agreed_on(straight, size=2):
    """Law 5: the second token of the test rows' answers; ranks that are done keep polling."""
    script = "run_instruct"
    flags = [*SHORT[script], "--sample_tokens", 0]
    codes = launch(script, "--out", "out", *flags, size=size, sent=("sampling", 2, signal.SIGTERM))
    assert codes == stopped(size, signal.SIGTERM), Path("out.txt").read_text()
    assert result()["why"] == "Stop: SIGTERM" and result()["checkpoint"] == "step_00000024"
    same_outcome(run(script, *flags, *AUTO, size=size), straight(script, size)[0])


@pytest.mark.slow
def test_packing_does_not_depend_on_ranks_or_accumulation():
    """Law 1: packs are made before they are shared out; fp64, to 1e-9."""
    flags = [*SHORT["run_instruct"], *EXACT["run_instruct"], "--pack", "--batch", 5, "--max_steps", 8]
    flags, reference = [*flags, "--dtype", "fp64", "--test_weights", "last"], None
    for size, micro_batch in [(1, "none"), (2, 1), (3, "none")]:
        got = run("run_instruct", *flags, "--micro_batch", micro_batch, size=size)
        weights = load_file(newest() / "checkpoints" / got["checkpoint"] / "model.safetensors")
        reference = reference or weights
        for name, value in weights.items():
            torch.testing.assert_close(value, reference[name], rtol=0, atol=1e-9, msg=f"{size} {name}")
        shutil.rmtree("out")


@pytest.mark.parametrize("script", on_every_script((), quick=0, scripts=SCRIPTS[::2]))
def test_a_signal_to_one_rank_stops_all(script, straight):
    codes = launch(script, "--out", "out", *SHORT[script], *AUTO, size=3, sent=("step", 6, signal.SIGTERM, 2))
    assert codes == [0, 0, 0], Path("out.txt").read_text()
    assert result()["status"] == "stopped" and "step_00000006" <= result()["checkpoint"] < "step_00000013"
    same_outcome(run(script, *SHORT[script], *AUTO, size=3), straight(script, 3)[0])


@pytest.mark.parametrize(
    ("script", "place", "size"), on_every_script(("caching", 1), ("caching", 2), ("worst case", 2))
)
def test_a_signal_before_the_first_step_leaves_on_all_ranks(script, place, size, straight):
    codes = launch(script, "--out", "out", *SHORT[script], *AUTO, size=size, sent=(place, 1, signal.SIGINT))
    assert codes == stopped(size, signal.SIGINT), Path("out.txt").read_text()
    assert result()["status"] == "stopped" and "Traceback" not in Path("out.txt").read_text()
    same_outcome(run(script, *SHORT[script], *AUTO, size=size), straight(script, size)[0])


@pytest.mark.parametrize("script", on_every_script((), scripts=TWO))
def test_a_crashed_rank_is_a_failure_not_a_stop(script):
    launch(script, "--out", "out", *SHORT[script], size=2, crash=("step", 6, 1))
    assert not (newest() / "result.json").exists() or result()["status"] == "failed"


@pytest.mark.parametrize("script", on_every_script((), quick=0, scripts=TWO))
def test_a_run_that_is_being_written_is_not_resumed_by_another_process(script, straight):
    launch(script, "--out", "out", *SHORT[script], kill=("step", 7, 0))
    with open(newest() / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert launch(script, "--out", "out", *SHORT[script], *AUTO) == [2]
        assert "is being written by process" in Path("out.txt").read_text()
    same_outcome(run(script, *SHORT[script], *AUTO), straight(script, 1)[0])


@pytest.mark.parametrize(
    ("script", "damage"),
    on_every_script(("truncated",), ("flipped",), ("incomplete",), ("manifest",), quick=2),
)
def test_a_broken_checkpoint_is_named_and_the_one_before_it_used(script, damage, straight):
    launch(script, "--out", "out", *SHORT[script], size=1, kill=("step", 18, 0))
    older, newest_one = sorted((newest() / "checkpoints").glob("step_*"))
    weights = newest_one / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    if damage == "flipped":
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    if damage == "incomplete":
        (newest_one / "state.pt").unlink()
    if damage == "manifest":
        text = (newest_one / "manifest.json").read_text()
        (newest_one / "manifest.json").write_text(text.replace('"step": 1', '"step": 2'))
    same_outcome(run(script, *SHORT[script], *AUTO), straight(script, 1)[0])
    log = (newest() / "log.txt").read_text()
    assert f"checkpoint {newest_one.name} is broken" in log and f"from {older.name}" in log


@pytest.mark.parametrize("script", on_every_script((), scripts=TWO))
def test_no_whole_checkpoint_is_an_error_not_a_restart(script):
    launch(script, "--out", "out", *SHORT[script], size=1, kill=("step", 18, 0))
    for manifest in newest().glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    assert launch(script, "--out", "out", *SHORT[script], *AUTO) == [2]
    assert "is whole" in Path("out.txt").read_text()


@pytest.mark.parametrize("script", on_every_script(()))
def test_weights_do_not_depend_on_ranks_or_accumulation(script):
    """Law 1, proved in fp64: 1, 2, 3 ranks x micro-batches of all, 3 and 1 rows, to 1e-9. Weights that ranks
    share (--shard full) are no exception. Whole slices: test_a_resume_on_another_number_of_ranks_..."""
    flags = [*SHORT[script], *EXACT[script], "--dtype", "fp64", "--max_steps", 12, "--test_weights", "last"]
    reference = None
    for size, micro_batch in [(1, "none"), (2, 3), (3, 1)]:
        shared = SHARED if size == 3 and script == "run_lora" else ()
        got = run(script, *flags, "--micro_batch", micro_batch, *shared, size=size)
        weights = load_file(newest() / "checkpoints" / got["checkpoint"] / "model.safetensors")
        reference = reference or (weights, got)
        for name, value in weights.items():
            torch.testing.assert_close(
                value, reference[0][name], rtol=0, atol=1e-9, msg=f"{size} {micro_batch} {name}"
            )
        assert got[LOSS[script]] == pytest.approx(reference[1][LOSS[script]], abs=1e-9)
        shutil.rmtree("out")


@pytest.mark.parametrize("script", on_every_script((), quick=0))
def test_losses_agree_in_fp32_on_another_number_of_ranks(script):
    losses = []
    for size in (1, 2):  # of which one has a row more
        run(script, *SHORT[script], *EXACT[script], "--max_steps", 8, size=size)
        losses.append([loss for _, loss in curves(newest())["train/loss"]])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.parametrize("script", on_every_script((), quick=0))
def test_evaluation_counts_every_row_once(script):
    """Law 2: the same figures on 1, 2, 3 ranks and batches that leave a row over."""
    want = run(script, *FEW[script])
    rows = math.ceil(want[COUNT[script]] / ROW[script])
    for size, batch in [(2, rows - 1), (3, 2)]:  # the last batch, or every one, leaves ranks without a row
        got = run(script, *FEW[script], "--eval_batch", batch, size=size)
        assert got[COUNT[script]] == want[COUNT[script]] and rows > 2
        for name in ("test/accuracy", LOSS[script]):
            assert got[name] == pytest.approx(want[name], rel=1e-5), (size, name)


@pytest.mark.parametrize("script", on_every_script((), quick=0))
def test_a_resume_on_another_number_of_ranks_ends_in_the_same_weights(script):
    """Law 1 holds over a resume: to 1e-9 in fp64."""
    flags = [*SHORT[script], *EXACT[script], "--dtype", "fp64", "--test_weights", "last", "--max_steps", 12]
    want = run(script, *flags)
    weights = load_file(newest() / "checkpoints" / want["checkpoint"] / "model.safetensors")
    shutil.rmtree("out")
    shared = SHARED if script == "run_lora" else ()
    launch(script, "--out", "out", *flags, *shared, size=2, kill=("step", 8, 0))
    got = run(script, *flags, "--shard", "optimizer", *AUTO, size=3)
    for name, value in load_file(newest() / "checkpoints" / got["checkpoint"] / "model.safetensors").items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-9, msg=name)
    assert got[LOSS[script]] == pytest.approx(want[LOSS[script]], abs=1e-9)


@pytest.mark.parametrize("script", on_every_script(()))
def test_the_run_folder_is_complete(script, straight):
    ended = straight(script, 1)[0]
    folder = straight.folder(script, 1)
    config = json.loads((folder / "config.json").read_text())
    assert config["constants"]["note"] == "a word" and config["smoke"] and config["versions"]["torch"]
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "source", "log.txt", "metrics.jsonl", "tb", "checkpoints", "result.json"} <= names
    ran = {str(path.relative_to(folder / "source")) for path in (folder / "source").rglob("*.py")}
    project = {
        str(path.relative_to(PROJECT)) for path in (*PROJECT.glob("*.py"), *PROJECT.glob("lab/**/*.py"))
    }
    assert {f"{script}.py", "core.py", "lab/run/folder.py"} <= ran <= project
    assert len(list(folder.glob("checkpoints/step_*"))) == 2
    keys = {"status", "step", "seconds", "train_seconds", "peak_memory_mb", "parameters", RATE[script]}
    assert keys | {"weights_sha256"} <= set(ended)
    log = (folder / "log.txt").read_text()
    assert max(map(len, log.splitlines())) <= 100, max(log.splitlines(), key=len)
    assert "\r" not in log


@pytest.mark.parametrize("script", [*SCRIPTS, "eval"])
def test_no_constant_looks_like_one_of_torchruns_options(script):
    """torchrun reads what follows the script, too, and stops at a prefix of several options of its own."""
    from torch.distributed.run import get_args_parser

    module = importlib.import_module(script)
    for name in core.names_of(module.Config):
        argv = ["--nproc_per_node=2", f"{script}.py", f"--{name}", "value"]
        assert get_args_parser().parse_args(argv).training_script_args == argv[2:]


@pytest.mark.slow
@pytest.mark.parametrize("script", [*TWO, "run_lora"])
def test_two_boxes_with_a_process_each_train_the_weights_of_one_box_with_two(script, straight):
    same_outcome(run(script, *SHORT[script], size=2, nodes=2), straight(script, 2)[0])


@pytest.mark.slow
def test_boxes_with_disks_of_their_own_are_named_before_the_first_step(script="gpt_scratch"):
    codes = launch(script, "--out", "out", *SHORT[script], size=2, nodes=2, env={"DISKS_APART": "1"})
    said = Path("out.txt").read_text()
    assert codes == [2, 2] and f"rank 1 on {socket.gethostname()} does not see rank 0's out" in said, said
    assert [path.name for path in Path().glob("box */out/*")] == [] and "step" not in said


@pytest.mark.slow
def test_a_torchrun_that_restarts_its_workers_goes_on_with_its_own_run(straight, script="run_preference"):
    """--max-restarts 1: rank 1 is killed in its ninth step; nobody passes --resume_timestamp."""
    Path("struck.py").write_text(f"""
import os, signal, sys
import ranks
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
    ranks.strike("{script}", "step", 9, lambda: os.kill(os.getpid(), signal.SIGKILL))
sys.argv[0] = "{script}.py"
ranks.main("{script}")
""")
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--max-restarts=1",
    ]
    command = [*start, "struck.py", "--out", "out", *map(str, SHORT[script])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list(Path("out").iterdir())) == 1 and "resumes " in done.stdout
    same_outcome(result(), straight(script, 2)[0])
    same_curves(newest(), straight(script, 2)[1])
