"""A study of sources survives whatever ends it, and does nothing twice."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import ranks
from ranks import launch
from toys.diversity import (
    JOBS,
    NAME,
    TINY,
    copied,  # noqa: F401 (a fixture)
    go,
    kept_in,
    plan_of,
    results_of,
    run_folders,
    snapshot,
    sources,  # noqa: F401 (a fixture)
    study_of,
    texts_of,
    tiny,
    whole,  # noqa: F401 (a fixture)
    write,
)

import core
from lab.run import files


def crossed_in(out="out") -> list[Path]:
    return sorted(Path(out).glob("cross/*.jsonl"))


PARTS = ("matrix", "differences", "diversity")


def same_study(found, want, tolerance=0.0):
    """Every figure of two studies, whose constants are the same but for what the call says."""

    def flat(tree, path=""):
        if isinstance(tree, dict | list):
            items = tree.items() if isinstance(tree, dict) else enumerate(tree)
            return {name: value for key, one in items for name, value in flat(one, f"{path}/{key}").items()}
        return {path: tree}

    found, want = (flat({part: one[part] for part in PARTS}) for one in (found, want))
    assert found.keys() == want.keys() and len(want) > 100
    for name, value in want.items():
        if isinstance(value, float):
            assert found[name] == pytest.approx(value, rel=0, abs=tolerance, nan_ok=True), name
        else:
            assert found[name] == value, name


def similar_coefficients(found, want):
    """By a probe whose weights differ in a last digit: another name, and so other targets are drawn."""
    floor = max(one["noise_floor"] for one in want["arms"].values())
    for kind in ("arms", "bounds", "cross"):
        assert found[kind].keys() == want[kind].keys()
        for name, one in want[kind].items():
            assert found[kind][name]["coefficient"] == pytest.approx(one["coefficient"], abs=floor)


MADE = ("result.json", "losses.jsonl", "*.npy", "cross/*", "checkpoints/**/*", "config.json")


def test_a_finished_study_typed_again_computes_nothing_and_says_the_same(copied):
    before, first = snapshot(*MADE), Path("said.txt").read_text()
    said = go()
    assert snapshot(*MADE) == before and len(before) > 30
    assert said.count("finished already: ") == 3 and "step 3/6" not in said and "to make" not in said

    def told(text):
        return text[text.index("\n**loss** on the held-out part of") :]

    assert told(said) == told(first)
    same_study(study_of(), json.loads(next(Path("out").glob("study-*/study.json")).read_text()))


@pytest.mark.slow
def test_a_seed_more_trains_the_new_runs_alone(copied):
    before = snapshot("result.json", "checkpoints/**/*", "*.npy")
    said = go("--seeds", 2)
    after = snapshot("result.json", "checkpoints/**/*", "*.npy")
    assert {path: after[path] for path in before} == before
    assert set(run_folders()) == {f"{arm}-s{seed}" for arm in ("a", "b", "a_b") for seed in (0, 1)}
    assert said.count("finished already: ") == 3
    found = [json.loads(path.read_text()) for path in Path("out").glob("study-*/study.json")]
    (two,) = [one for one in found if one["constants"]["seeds"] == 2]
    for arm in ("a", "b", "a+b"):
        first, second = two["matrix"]["loss"][arm]["c"]["runs"]
        assert first == pytest.approx(results_of()[f"{arm.replace('+', '_')}-s0"]["test/loss"], abs=1e-6)
        assert first != second
    facts = [core.read_config(folder)["facts"]["initial_weights"] for folder in run_folders().values()]
    assert len(set(facts)) == 2


@pytest.mark.slow
def test_an_arm_more_leaves_no_mixture_that_read_other_blocks_than_its_sources(sources, whole):
    """b becomes an arm of its own: the mixture that was trained without it stays, and is what it would be."""
    go("--arms", "a", "a+b", "--diversity_batches", 0)
    before = snapshot("result.json", "checkpoints/**/*")
    (old,) = (json.loads(path.read_text()) for path in Path("out").glob("*-a_b-*/ledger.json"))
    (want,) = (json.loads(path.read_text()) for path in (whole / "out").glob("*-a_b-*/ledger.json"))
    said = go("--diversity_batches", 0)
    assert old == want and said.count("finished already: ") == 2
    after = snapshot("result.json", "checkpoints/**/*")
    assert {path: after[path] for path in before} == before and len(run_folders()) == 3
    weights = [results_of(out)["a_b-s0"]["weights_sha256"] for out in ("out", whole / "out")]
    assert weights[0] == weights[1]


def test_a_source_that_changed_after_its_run_finished_is_refused(copied):
    """Otherwise the study would measure a run on text that it may have been trained on."""
    made, texts = snapshot(*MADE), texts_of("b")
    write("b.jsonl", [*texts[:-1], texts[-1] + " and more"])
    assert launch(NAME, "--out", "out", *TINY) == [2]
    lines = [line for line in Path("out.txt").read_text().splitlines() if "error:" in line]
    (line,) = lines
    assert line.startswith(f"{NAME}.py: error: {run_folders()['b-s0']} had read other text (")
    assert "(fingerprint" in line and line.endswith("move it away, or use --out")
    assert snapshot(*MADE) == made and "Traceback" not in Path("out.txt").read_text()


@pytest.mark.slow
def test_a_source_that_changed_is_refused_before_anything_is_trained(copied):
    shutil.rmtree(run_folders()["b-s0"])
    write("a.jsonl", [*texts_of("a"), "one more"])
    assert launch(NAME, "--out", "out", *TINY) == [2]
    assert "move it away" in Path("out.txt").read_text() and "b-s0" not in run_folders()


@pytest.mark.slow
def test_two_ranks_find_the_same_study(whole, sources):
    go(size=2)
    want = study_of(whole / "out")
    for arm, texts in study_of()["matrix"]["loss"].items():
        for name, cell in texts.items():
            assert cell["mean"] == pytest.approx(want["matrix"]["loss"][arm][name]["mean"], abs=1e-5)
    similar_coefficients(study_of()["diversity"], want["diversity"])
    (draws, jobs), (others, same) = plan_of("."), plan_of(whole)
    assert {path.name for path in kept_in()} == {job[2] for job in jobs} and len(jobs) == JOBS
    assert [job[:2] for job in jobs] == [job[:2] for job in same]
    for name, i, *_ in jobs:
        assert draws.batch(name, i).ids.tolist() == others.batch(name, i).ids.tolist()


@pytest.mark.slow
def test_a_study_killed_in_every_phase_ends_with_the_same_figures(whole, sources):
    """Each launch is struck a phase further on; nothing that was finished is made twice."""

    def struck(place, nth):
        before = {path: made for path, made in snapshot("result.json").items() if finished(path)}
        kept = snapshot("cross/*", "*.npy")
        codes = launch(NAME, "--out", "out", *TINY, kill=(place, nth, 0))
        assert -9 in codes, Path("out.txt").read_text()
        after = snapshot("result.json", "cross/*", "*.npy")
        assert {path: after.get(path) for path in before | kept} == before | kept
        return sum(map(finished, snapshot("result.json")))

    def finished(path):
        return json.loads(Path(path).read_text())["status"] == "finished"

    assert struck("caching", 2) == 0 and not run_folders()
    assert struck("evaluation", 2) == 0  # of the first run, at step 4
    assert struck("step", 12) == 1  # of the second: the first took what was left of its own
    assert set(run_folders()) == {"a-s0", "b-s0"}
    assert struck("save", 2) in (1, 2)
    assert struck("embedding", 2) == 3
    cross = crossed_in()
    assert len(cross) == 9
    for path in cross:
        path.unlink()
    assert struck("measuring", 12) == 3
    assert 0 < len(crossed_in()) < 9
    go()
    assert len(run_folders()) == 3
    same_study(study_of(), study_of(whole / "out"))


@pytest.mark.parametrize(
    ("place", "nth", "size"),
    [
        pytest.param("embedding", 2, 2, marks=pytest.mark.slow),
        ("measuring", 3, 1),
    ],
)
def test_a_signal_behind_the_training_stops_all_ranks_and_the_same_command_goes_on(
    place, nth, size, copied, whole
):
    made = len(kept_in())
    for path in [*crossed_in(), *kept_in()]:
        path.unlink()
    before = snapshot("result.json", "checkpoints/**/*")
    codes = launch(NAME, "--out", "out", *TINY, size=size, sent=(place, nth, signal.SIGTERM))
    assert codes == ranks.stopped(size, signal.SIGTERM), Path("out.txt").read_text()
    said = Path("out.txt").read_text()
    assert "Traceback" not in said and "tables:" not in said
    left = len(crossed_in()), len(kept_in())
    assert left[0] < 9 if place == "measuring" else left[0] == 9 and 0 < left[1] < made
    kept = {path.name for path in kept_in()}
    missing = {job[2] for job in plan_of(".")[1]} - kept
    assert f"{len(missing)} of {JOBS} embeddings to make" in go(size=size) and len(kept_in()) == made
    assert snapshot("result.json", "checkpoints/**/*") == before
    same_study(study_of(), study_of(whole / "out"), tolerance=0.0 if size == 1 else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_a_signal_in_training_ends_the_study_and_the_same_command_goes_on(size, sources, whole):
    flags = ["--diversity_batches", 0, "--arms", "a", "b"]
    codes = launch(NAME, "--out", "out", *tiny(*flags), size=size, sent=("step", 5, signal.SIGTERM))
    assert codes == ranks.stopped(size, signal.SIGTERM), Path("out.txt").read_text()
    (stopped,) = results_of().values()
    assert stopped["status"] == "stopped" and "Stop: SIGTERM" in stopped["why"]
    assert "Traceback" not in Path("out.txt").read_text() and not crossed_in()
    anew = ["--micro_batch", 2] if size == 2 else []  # typed anew it holds for what goes on and what comes
    said = go(*flags, *anew, size=size)
    assert set(run_folders()) == {"a-s0", "b-s0"}
    assert said.count("resumed: micro_batch is now 2 (it was None)") == bool(anew)
    stored = {core.read_config(folder)["constants"]["micro_batch"] for folder in run_folders().values()}
    assert stored <= ({2, None} if anew else {None}) and (2 in stored) == bool(anew)
    want = study_of(whole / "out")["matrix"]["loss"]
    for arm, texts in study_of()["matrix"]["loss"].items():
        for name, cell in texts.items():
            assert cell["mean"] == pytest.approx(want[arm][name]["mean"], abs=1e-5)
    if size == 1:  # what stands beside it is no part of a run
        assert results_of()["a-s0"]["weights_sha256"] == results_of(whole / "out")["a-s0"]["weights_sha256"]


def test_what_may_change_is_honoured_by_a_study_that_goes_on(copied, whole):
    """--micro_batch, for one, after memory ran out: the run that was stopped takes it, finished ones stay."""
    folder, before = run_folders()["b-s0"], snapshot("result.json")
    result = json.loads((folder / "result.json").read_text())
    files.write_sealed(folder / "result.json", result | {"status": "stopped"})
    shutil.rmtree(folder / "checkpoints" / result["checkpoint"])
    said = go("--micro_batch", 2)
    assert "resumed: micro_batch is now 2 (it was None)" in said and said.count("finished already: ") == 2
    assert "resumes " in said and "step 6/6" in said and len(run_folders()) == 3
    batches = {tag: core.read_config(of)["constants"]["micro_batch"] for tag, of in run_folders().items()}
    again = json.loads((folder / "result.json").read_text())
    assert again["status"] == "finished" and batches["a-s0"] is batches["a_b-s0"] is None
    assert again["test/loss"] == pytest.approx(result["test/loss"], abs=1e-5)
    changed = {path for path, made in snapshot("result.json").items() if before[path] != made}
    assert changed == {str(folder / "result.json")}
