"""run_mathqa.py under the house laws: two stages, bases, export, quantise, bad input."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import ranks
import torch
from ranks import launch
from safetensors.torch import load_file, save_file
from toys.quantise import here as here_in_out
from toys.run_mathqa import (
    DATA,
    FIRST,
    NAME,
    SECOND,
    SPLIT,
    STUDY,
    TEXT,
    arms,
    budgets,
    constants_of,
    copied,  # noqa: F401 (a fixture)
    first,
    go,  # noqa: F401 (a fixture)
    here,  # noqa: F401 (a fixture)
    result_of,
    rows_of,
    run_folders,
    same_outcome,
    script_of,
    shared_cache,
    slow,
    studied,  # noqa: F401 (a fixture)
    study_of,
    tables_of,
)

import core
import run_mathqa as script
from core import World
from lab.models import int4
from lab.run import checkpoints

PROJECT = Path(script.__file__).parent
PRETRAIN = [*("--smoke", "--preset", "noam_wide4"), *(f"--{name}={value}" for name, value in TEXT.items())]
PRETRAIN += ["--test_weights", "best"]
TUNE = [*DATA, "--mode", "train", *SECOND]
BOTH = [*DATA, "--mode", "both", *FIRST, *SECOND]
NEW = [*TUNE, "--init_from", "new", *FIRST]
AUTO = ["--resume_timestamp", "auto"]
ADAPTERS = ("lora", "loha", "lokr")
QAT = ["--qat", "int4", "--qat_start", 0.4]  # of 12 steps: it is on from the sixth one
KINDS = {
    "full": NEW,
    **{method: [*NEW, "--method", method] for method in ADAPTERS},
    "qat": [*NEW, *QAT],
    "pack": [*NEW, "--pack", "--batch", 5],
    "lion": [*NEW, "--optimizer", "lion", "--lr", 1e-3],
    "letter": [*TUNE, "--init_from", "new", *first(block_size=128), "--answer_format", "letter"],
    "prompt": [*NEW, "--loss_on_prompt"],
}
KINDS["letter"] += ["--max_length", 128]


def on(base, kind) -> list:
    """The words of a kind, begun with a run."""
    at = KINDS[kind].index("--init_from")
    return [*KINDS[kind][:at], "--init_from", base, *KINDS[kind][at + 4 :]]


@pytest.fixture(scope="module")
def made(here, cache):
    """kind -> folder of a short run on `base`, made once; a test that changes it takes a copy. base: a run of
    gpt_scratch.py."""
    known = {}

    def folder(kind, *more):
        key = (kind, *more)
        if key not in known:
            argv = ["gpt_scratch", *PRETRAIN] if kind == "base" else [NAME, *on(folder("base"), kind)]
            patch = here(f"made_{kind}")
            ranks.run(*argv, *more, env=shared_cache(cache))
            known[key] = ranks.newest().absolute()
            patch.undo()
        return known[key]

    return folder


def weights_at(folder, name) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "checkpoints" / name / "model.safetensors")


def same_weights(got, want, tolerance=0.0, note=""):
    assert got.keys() == want.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=0, atol=tolerance, msg=f"{note} {name}")


FEW, MANY = [(1, "none"), (2, 3)], [(1, "none"), (2, 1), (3, "none")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "ways"),
    [
        *((kind, FEW) for kind in ("lokr", "qat", "pack")),
        *(pytest.param(kind, FEW, marks=slow) for kind in ("lion", "letter", "prompt")),
        pytest.param("lora", FEW, marks=slow),
        pytest.param("loha", MANY, marks=slow),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} ways",
)
def test_weights_and_figures_do_not_depend_on_ranks_or_accumulation(kind, ways, go):
    """fp64, to 1e-9. With int4, too: a number that is between two levels by as little as additions in another
    order move it is not to be met by chance.
    """
    flags = [*KINDS[kind], "--dtype", "fp64", "--test_weights", "last", "--save_every", "none"]
    want = None
    for size, micro_batch in ways:
        go(*flags, "--micro_batch", micro_batch, size=size)
        got = ranks.result(), weights_at(ranks.newest(), ranks.result()["checkpoint"])
        want = want or got
        same_weights(got[1], want[1], 1e-9, f"{size} x {micro_batch}")
        figures = [name for name in want[0] if name.startswith("test/") and "interval" not in name]
        assert len(figures) > 5
        for name in figures:
            assert got[0][name] == pytest.approx(want[0][name], abs=1e-9), name
        shutil.rmtree("out")


@pytest.fixture(scope="module")
def straight(here, cache):
    """kind, ranks -> result of a run that nothing disturbed."""
    known = {}

    def reference(kind, size):
        if (kind, size) not in known:
            patch = here(f"straight_{kind}_{size}")
            known[kind, size] = ranks.run(NAME, *KINDS[kind], size=size, env=shared_cache(cache))
            patch.undo()
        return known[kind, size]

    return reference


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "place", "nth", "who", "size"),
    [
        ("loha", "step", 7, 0, 1),
        pytest.param("lokr", "evaluation", 5, 0, 1, marks=slow),
        ("qat", "step", 5, 0, 1),  # from the checkpoint after step 4, before int4 begins
        ("qat", "step", 10, 0, 1),  # after it
        pytest.param("qat", "step", 10, 1, 2, marks=slow),
    ],
)
def test_killed_and_resumed_ends_in_the_same_weights(kind, place, nth, who, size, straight, go):
    want = straight(kind, size)
    codes = launch(NAME, "--out", "out", *KINDS[kind], *AUTO, size=size, kill=(place, nth, who))
    assert -9 in codes, Path("out.txt").read_text()
    go(*KINDS[kind], *AUTO, size=size)
    same_outcome(ranks.result(), want)
    assert len(run_folders()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "nth", "size"),
    [
        ("lora", 7, 1),
        ("qat", 8, 1),
    ],
)
def test_a_signal_in_a_step_saves_and_the_run_goes_on_from_there(kind, nth, size, straight, go):
    ends = ranks.stopped(size, signal.SIGTERM)
    go(*KINDS[kind], *AUTO, size=size, sent=("step", nth, signal.SIGTERM), ends=ends)
    stopped = ranks.result()
    assert stopped["status"] == "stopped" and stopped["checkpoint"] == f"step_{nth:08d}"
    go(*KINDS[kind], *AUTO, size=size)
    same_outcome(ranks.result(), straight(kind, size))


@pytest.mark.slow
def test_the_best_weights_of_a_quantised_run_were_quantised(made):
    """A lower loss from before int4 began is no record."""
    folder = made("qat")
    (best,) = result_of(folder)["test_checkpoints"]
    assert int(best.removeprefix("best_step_")) >= 5
    log = (folder / "log.txt").read_text()
    assert log.count("int4 weights and int8 activations from here on") == 1
    assert "step 5: int4 weights" in log


@slow
@pytest.mark.parametrize("kind", [*ADAPTERS, "qat"])
def test_figures_do_not_depend_on_the_evaluation_batch(kind, made):
    """int8 activations, too: what fp32 adds up in another order seldom reaches another level, and that is one
    of 255 of one number.
    """
    folder = made(kind)
    stored = result_of(folder)
    for batch in (7, 64):
        found, _ = script.remeasure(folder, World(), batch)
        assert found["test/answer_accuracy"] is not None
        for name, value in found.items():
            if isinstance(value, float):
                assert value == pytest.approx(stored[name], rel=1e-5, abs=1e-6), (batch, name)


@slow
@pytest.mark.parametrize(("kind", "ways"), [("loha", [(3, 64)]), ("qat", [(2, 3), (3, 64)])])
def test_figures_do_not_depend_on_the_number_of_ranks(kind, ways, made, go):
    folder = made(kind)
    for size, batch in ways:
        said = go("--run_folder", folder, "--eval_batch", batch, size=size, out=None, name="eval")
        assert "  as result.json has it" in said, said


@pytest.fixture(scope="module")
def whole(here, cache):
    """ranks -> a folder in which mode both has run to its end: not to be written to."""
    known = {}

    def folder(size):
        if size not in known:
            patch = here(f"both_{size}")
            codes = launch(NAME, "--out", "out", *BOTH, size=size, env=shared_cache(cache))
            assert codes == [0] * size, Path("out.txt").read_text()
            known[size] = Path.cwd()
            patch.undo()
        return known[size]

    return folder


def stages(out="out") -> tuple[Path, Path]:
    """The only two runs there: of the first stage, and of the second. They may have begun in one second."""
    found = {script_of(folder): folder for folder in run_folders(out)}
    assert len(run_folders(out)) == 2
    return found["gpt_scratch"], found[NAME]


def same_stages(want):
    """out/ holds the two runs of want/out/, with the same weights and figures."""
    assert constants_of(stages()[1])["init_from"] == str(stages()[0])
    for mine, theirs in zip(stages(), stages(want / "out"), strict=True):
        same_outcome(result_of(mine), result_of(theirs))


def test_the_second_stage_starts_from_the_first(whole):
    first, second = stages(whole(1) / "out")
    assert constants_of(second)["init_from"] == f"out/{first.name}"
    base, _ = core.open_model(first)
    assert result_of(second)["base_sha256"] == core.weights_sha256(base)
    assert result_of(first)["step"] == 10 and result_of(second)["steps"] == 12


def test_both_stages_typed_again_make_nothing_new(whole, go):
    shutil.copytree(whole(1) / "out", "out")
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    said = go(*BOTH)
    assert said.count("finished already") == 2
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "nth", "size"),
    [
        ("step", 7, 1),  # in the first stage
        ("caching", 1, 1),  # the second has a folder and no step
        ("step", 17, 1),  # in the second stage
        pytest.param("step", 17, 2, marks=slow),
    ],
)
def test_both_stages_killed_and_typed_again_end_in_the_same_weights(place, nth, size, whole, go):
    want = whole(size)
    codes = launch(
        NAME, "--out", "out", *BOTH, size=size, kill=(place, nth, size - 1 if place == "step" else 0)
    )
    assert -9 in codes, Path("out.txt").read_text()
    go(*BOTH, size=size)
    same_stages(want)


@pytest.mark.slow
def test_both_stages_ended_between_the_two_go_on_with_the_second(whole, go):
    first, _ = stages(whole(1) / "out")
    shutil.copytree(first, f"out/{first.name}")
    assert go(*BOTH).count("finished already") == 1
    same_stages(whole(1))


@slow
def test_a_resumed_pretraining_may_be_cut_into_smaller_micro_batches(go):
    """As into other evaluations and saves: what resume.MAY_CHANGE lists."""
    assert launch(NAME, "--out", "out", *BOTH, kill=("step", 7, 0)) == [-9]
    said = go(*DATA, "--mode", "both", *first(micro_batch=3), *SECOND)
    assert "resumed: micro_batch is now 3 (it was None)" in said
    assert len(run_folders()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("nth", [7, pytest.param(17, marks=slow)])
def test_a_signal_in_mode_both_stops_and_the_same_command_goes_on(nth, whole, go):
    said = go(*BOTH, sent=("step", nth, signal.SIGTERM), ends=[-signal.SIGTERM])
    assert "the same command continues the study" in said and "Traceback" not in said
    assert len(run_folders()) == 1 + (nth > 10)
    go(*BOTH)
    same_stages(whole(1))


BLANK = [*TUNE, "--max_steps", 0, "--answer_rows", 0, "--plain_blocks", 0]  # the weights stay the base's


def start_of(folder) -> dict[str, torch.Tensor]:
    return weights_at(folder, "step_00000000")


def test_a_run_is_tuned_from_the_weights_it_was_tested_with(made, go):
    base = made("base")
    (best,) = result_of(base)["test_checkpoints"]
    assert best.startswith("best_")
    go(*BLANK, "--init_from", base)
    same_weights(start_of(ranks.newest()), weights_at(base, best))


def test_init_step_picks_an_older_checkpoint_and_names_those_there_are(made, go):
    base = made("base")
    assert [path.name[-2:] for path in sorted(base.glob("checkpoints/step_*"))] == ["09", "10"]
    go(*BLANK, "--init_from", base, "--init_step", 9)
    same_weights(start_of(ranks.newest()), weights_at(base, "step_00000009"))
    said = refused(*BLANK, "--init_from", base, "--init_step", 3)
    assert "has no whole step_00000003; there: step_00000009, step_00000010" in said


@slow
def test_an_exported_base_is_tuned_from_the_same_weights(made, go):
    base = made("base")
    (tested,) = result_of(base)["test_checkpoints"]
    go("--mode", "export", "--model", base, out="llama", name="gpt_scratch")
    go(*BLANK, "--init_from", "llama")
    same_weights(start_of(ranks.newest()), weights_at(base, tested))


@slow
def test_adapters_alone_are_refused_and_merged_are_taken(made, go):
    said = refused(*BLANK, "--init_from", made("lora"))
    assert "holds no whole model: adapters are merged by --mode export" in said
    shutil.copytree(made("lora"), "lora")
    go("--mode", "export", "--run_folder", "lora", out=None)
    go(*BLANK, "--init_from", "lora/merged")
    _, model, _ = script.load_model("lora", World())
    same_weights(start_of(ranks.newest()), dict(script.merged(model).state_dict()), 1e-6)


@slow
def test_none_is_the_newest_finished_run_of_gpt_scratch_in_out(made, go):
    assert "no finished run of gpt_scratch.py in out" in refused(*BLANK)
    for name in ("20000101_000000", "20000102_000000", "20000103_000000"):
        shutil.copytree(made("base"), f"out/{name}")
    Path("out/20000103_000000/result.json").unlink()  # not finished
    shutil.copytree(made("full"), "out/20000104_000000")
    go(*BLANK)
    assert constants_of(ranks.newest())["init_from"] == "out/20000102_000000"


def test_a_base_that_has_changed_is_not_gone_on_with(made, go):
    shutil.copytree(made("base"), "base")
    argv = [*TUNE, "--init_from", "base", "--method", "loha", *AUTO]
    assert launch(NAME, "--out", "out", *argv, kill=("step", 9, 0)) == [-9]
    (best,) = result_of("base")["test_checkpoints"]
    weights = Path("base/checkpoints") / best
    state = load_file(weights / "model.safetensors")
    state["wte.weight"][0, 0] += 1e-3
    save_file(state, weights / "model.safetensors")
    content = checkpoints.read_manifest(weights)
    hashes = {"model.safetensors": core.sha256_file(weights / "model.safetensors")}
    content.pop("files")
    core.write_json(weights / "manifest.json", checkpoints.manifest(content, hashes))
    assert "base_sha256 is not what" in refused(*argv)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *(("full", "fp32"), ("qat", "fp32")),
        *(pytest.param(kind, "fp32", marks=slow) for kind in ADAPTERS),
        pytest.param("qat", "fp64", marks=slow),
    ],
)
def test_eval_measures_each_kind_of_run_as_it_ended(kind, dtype, made, go):
    folder = made(kind, *(["--dtype", dtype] if dtype != "fp32" else []))
    said = go("--run_folder", folder, out=None, name="eval")
    assert "  as result.json has it" in said, said
    assert f"{result_of(folder)['test/loss']:.4f}" in said


def test_eval_compares_tuned_runs_in_loss_and_answers_and_lists_them(made, go):
    full, lora = made("full"), made("lora")
    said = go("--compare", full, lora, out="compare", name="eval")
    assert "**loss** on" in said and "**answers** on" in said
    means = {float(row["mean"]) for rows in tables_of(said) for row in rows if "mean" in row}
    rows = rows_of(go("--table", full, lora, made("base"), out="table", name="eval"))
    for folder in (full, lora):
        loss, answers = (result_of(folder)[f"test/{name}"] for name in ("loss", "answer_accuracy"))
        assert {round(loss, 4), round(answers, 4)} <= means
        (row,) = (row for row in rows if row["loss"].startswith(f"{loss:.4f}"))
        assert row["answers"].startswith(f"{answers:.3f}")
    assert len(rows) == 3


def test_eval_takes_the_seeds_of_an_arm_for_one_side(copied, go):
    """Each seed has a pretraining of its own: their init_from differ as their seeds do."""
    arms = study_of()["runs"]["steps"]
    said = go("--compare", *arms["full"], *arms["lora,lr=3e-3"], out="compare", name="eval")
    assert "(2 seeds) - " in said, said[-500:]


@pytest.mark.parametrize("kind", ["full", *ADAPTERS, "qat"])
def test_transformers_gives_the_logits_of_an_exported_run(kind, made, go):
    """Of a run trained for int4: those of its float weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.copytree(made(kind), "run")
    go("--mode", "export", "--run_folder", "run", out=None)
    theirs = AutoModelForCausalLM.from_pretrained("run/merged").eval()
    _, ours, tokenizer = script.load_model("run", World())
    int4.switch(ours, False)
    text = "ned had 14 tins and lost 9 of them . how many tins ?"
    ids = torch.tensor([tokenizer.encode(text)])
    assert AutoTokenizer.from_pretrained("run/merged").encode(text) == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=0, atol=1e-4)
        assert ours(ids).std() > 0.05


def test_mode_quantise_measures_what_it_writes_and_reads_it_the_second_time(made, go):
    shutil.copytree(made("qat"), "run")
    argv = ["--smoke", "--mode", "quantise", "--run_folder", "run"]
    said = go(*argv, out=None)
    found = json.loads(Path("run/quantised_32/result.json").read_text())
    own = result_of("run")
    assert found["int4"]["test/loss"] == pytest.approx(own["test/loss"], abs=1e-4)
    assert found["float"]["test/loss"] != pytest.approx(own["test/loss"], abs=1e-6)
    assert [row["weights"] for row in rows_of(said)] == ["float", "int4 by 32, trained for it"]
    before = Path("run/quantised_32/model.safetensors").stat().st_mtime_ns
    assert rows_of(go(*argv, out=None)) == rows_of(said)
    assert Path("run/quantised_32/model.safetensors").stat().st_mtime_ns == before


def refused(*argv) -> str:
    """The one line of a user error, in this process; no run is begun."""
    before = run_folders()
    with pytest.raises(core.UserError) as error:
        here_in_out(*argv)
    assert run_folders() == before and "\n" not in str(error.value)
    return str(error.value)


def table(**columns):
    Path("rows.jsonl").write_text("".join(f"{json.dumps(columns)}\n" for _ in range(60)))
    return "rows.jsonl"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (arms("full", "lora,seed=3"), "'seed=3' is not a preset ("),
        (arms("full", "lora,max_steps=3"), "or constant=value of base_dtype, beta1, "),
        (arms("full", "lora,lr=much"), "much"),
        (arms("full", "lara"), "lara"),
        (arms("full", "lora,qat=int4"), "--qat int4 trains all weights"),
        (arms("full", "full"), "--arms full and full are the same run: leave one out"),
        (budgets("steps", "money"), "--budgets steps money: use steps, time or steps time"),
        ([*SPLIT, "--shares", 0.5, 1], "--shares 0.5 1: use different numbers between 0 and 1"),
        ([*SPLIT, "--shares", "half"], "--shares half: use different numbers between 0 and 1"),
        ([*SPLIT, *FIRST, "--max_steps", "none", "--max_minutes", 1], "bound both stages by one of them"),
        ([*SPLIT, *FIRST, "--epochs", 1, "--shares", 0.5], "bound both stages by one of them"),
        ([*NEW, *QAT, "--method", "lora"], "--qat int4 trains all weights: use --method full, not lora"),
        ([*NEW, *QAT, "--qat_group", 24], "--qat_group 24 does not divide the 32 inputs of"),
        ([*NEW, "--max_length", 65], "--max_length 65 is over the 64 positions of new"),
        (
            [*NEW, "--max_steps", "none"],
            "nothing ends fine-tuning: use --max_minutes, --max_steps or --epochs",
        ),
        ([*NEW, "--init_step", 3], "--init_step 3"),
        ([*BOTH, "--max_length", 65], "--max_length 65 is over the 64"),
        ([*BOTH, *QAT, "--qat_group", 24], "--qat_group 24 does not divide"),
        ([*arms("full", "lora"), "--qat_group", 24], "measures its first arm in int4"),
        ([*BOTH, "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        ([*SPLIT, *first(lr="fast")], "argument --lr: invalid float value: 'fast'"),
        ([*SPLIT, "--pretrain", "noam,lr=1"], "--pretrain noam,lr=1: 'noam' is not a preset (cpu, "),
        (
            [*SPLIT, "--pretrain", "continue_noam"],
            "the newest run would be another one each time, use model=<run>",
        ),
        ([*SPLIT, *first(data="nowhere.txt")], "nowhere.txt"),
        ([*TUNE, "--seeds", 3], "--seeds is read by --mode study or split, not by train"),
        ([*TUNE, *FIRST], "--pretrain describes a first stage, and --mode train has none: drop it"),
        ([*BOTH, "--max_steps", "none"], "nothing ends fine-tuning"),
        ([*BOTH, "--init_from", "new"], "--init_from: mode both pretrains first"),
        ([*SPLIT, "--init_from", "new"], "--init_from: mode split pretrains first"),
        ([*STUDY, "--resume_timestamp", "latest"], "mode study continues its runs by itself"),
        (["--smoke", "--mode", "quantise"], "--mode quantise needs --run_folder"),
        (["--smoke", "--mode", "study", "--init_from", "newest"], "--init_from newest may be another run"),
        (["--smoke", "--mode", "export"], "--mode export needs --run_folder"),
        (["--smoke", "--mode", "quantise", "--run_folder", "."], ". is no run folder"),
        (["--smoke", "--mode", "quantise", "--run_folder", "nowhere"], "nowhere is no run folder"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(argv, said):
    assert said in refused(*argv)


@pytest.mark.parametrize("start", [NEW, BOTH], ids=["finetune", "both"])
def test_data_without_the_columns_is_refused_before_anything_starts(start):
    said = refused(*start, "--data", table(Problem="how many ?", options="a ) 1"))
    assert "rows.jsonl" in said and "correct" in said


def test_a_run_of_another_script_is_not_quantised(made):
    said = refused("--smoke", "--mode", "quantise", "--run_folder", made("base"))
    assert "is a run of gpt_scratch.py" in said


@slow
def test_the_smoke_run_learns_to_answer_with_all_weights_and_with_int4():
    arms = ["full", "full,qat=int4"]  # those that learn to answer in a smoke run
    assert launch(NAME, "--smoke", "--arms", *arms, "--budgets", "steps", timeout=1500) == [0], Path(
        "out.txt"
    ).read_text()
    (path,) = Path("runs/smoke/run_mathqa").glob("study-*/study.md")
    learnt, int4 = path.read_text().split("**int4**")
    assert len(rows_of(learnt)) == len(arms)
    found = json.loads((path.parent / "study.json").read_text())
    for arm in ("full", "full,qat=int4"):
        (folder,) = found["runs"]["steps"][arm]
        result = result_of(folder)
        assert result["test/answer_accuracy_interval"][0] > 0.3, (arm, result["test/answer_accuracy"])
        low, high = result["test/shuffled_accuracy_interval"]
        assert low <= 0.2 <= high
        (small,) = found["quantised"][arm]
        assert abs(small["int4"]["test/loss"] - small["float"]["test/loss"]) < 0.1
        assert abs(small["int4"]["test/answer_accuracy"] - small["float"]["test/answer_accuracy"]) < 0.06
        assert small["int4"]["mb"] < small["float"]["mb"] / 2
    assert [row["run"] for row in rows_of(int4)] == ["full", "full", "full,qat=int4", "full,qat=int4"]
    assert "Traceback" not in Path("out.txt").read_text()
