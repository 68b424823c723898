"""run_preference.py as its user meets it: bad input, smoke, folds, both orders, submission."""

import csv
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PROJECT
from ranks import launch, newest, result, run
from safetensors.torch import load_file
from toys.preference import write_csv

import core
import run_preference as script
from core import World
from lab.data import builtin, columns, pairs

BAD_INPUT = {
    "missing file": (["--data", "absent.csv"], ["no such file or folder: absent.csv"]),
    "missing column": (
        ["--data", "column.csv"],
        ["column.csv lacks column(s) response_a, response_b", "found: id, prompt"],
    ),
    "empty file": (["--data", "empty.csv"], ["empty.csv has no rows", "response_a"]),
    "batch and ranks": (
        ["--batch", 1],
        ["batch 1 is smaller than 2 ranks: use --nproc_per_node=1 or --batch 2"],
    ),
    "batch and rows": (["--batch", 5000], ["training rows do not fill a batch of 5000", "--batch"]),
    "unknown flag": (["--epoch", 3], ["unknown flag --epoch: did you mean --epochs?"]),
    "unknown preset": (["--preset", "basline"], ["basline", "baseline"]),
    "bad type": (["--lr", "fast"], ["--lr", "fast", "float"]),
    "tiny family": (["--model", "tiny:gpt"], ["tiny:gpt", "distilbert"]),
    "no folder": (["--model", "./nowhere"], ["no such folder: ./nowhere"]),
    "no model": (["--model", "model_folder"], ["folder model_folder cannot be loaded: it has no config"]),
    "too long": (["--max_length", 600], ["--max_length 600 is more than the 512 positions"]),
    "out is a file": (["--out", "file"], ["file is a file: use a folder"]),
    "out in a file": (["--out", "file/x"], ["out file/x cannot be written"]),
    "resume latest": (["--resume_timestamp", "latest"], ["--resume_timestamp latest: no unfinished run in"]),
    "resume time": (
        ["--resume_timestamp", "20200101_000000"],
        ["20200101_000000: 0 such runs in", "there: none"],
    ),
    "resume step": (["--resume_step", 5], ["--resume_step 5 needs --resume_timestamp"]),
    "folds by the clock": (["--folds", 3, "--max_minutes", 1], ["--folds and --max_minutes", "--max_steps"]),
    "backend": (["--backend", "nccl"], ["--backend nccl does not fit cpu: use auto or gloo"]),
    "tag": (["--tag", "a/b"], ["--tag 'a/b'", "use letters"]),
    "clip": (["--clip", 0], ["--clip 0"]),
    "short": (["--max_length", 3], ["--max_length 3 is out of range: use 16 or more"]),
    "swap twice": (["--swap_augmentation"], ["--swap_augmentation changes nothing while both orders"]),
    "two rates": (["--freeze", "all", "--head_lr", 1e-3], ["--freeze all", "drop --head_lr"]),
    "no rate": (["--lr", 0, "--head_lr", 1e-3], ["--lr 0 trains the head alone", "--freeze all --lr 0.001"]),
    "nothing to submit": (["--mode", "submit"], ["--mode submit needs --test_csv"]),
    "no test file": (["--test_csv", "absent.csv"], ["no such file or folder: absent.csv"]),
    "test columns": (["--test_csv", "column.csv"], ["column.csv lacks column(s) response_a, response_b"]),
    "no lower half": (["--model", "tiny:albert", "--freeze", "bottom"], ["--freeze bottom", "all or none"]),
    "freeze": (["--freeze", "top"], ["--freeze", "top", "bottom"]),
    "layer decay": (["--layer_decay", 1.5], ["--layer_decay 1.5"]),
    "too few for a split": (["--max_documents", 9, "--batch", 2], ["prompts leave one of 3 parts empty"]),
    "too few prompts": (["--max_documents", 8, "--folds", 9], ["cannot be split into 9 parts"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_before_training(case, cache):
    flags, words = BAD_INPUT[case]
    Path("file").write_text("")
    Path("model_folder").mkdir()
    write_csv([{"id": 1, "prompt": "[]"}], "column.csv")
    Path("empty.csv").write_text(",".join(columns.PAIR_COLUMNS) + "\n")
    size = 2 if case == "batch and ranks" else 1
    env = {"TOKEN_CACHE": str(cache)}
    assert launch("run_preference", "--smoke", *flags, size=size, env=env) == [2] * size
    said = Path("out.txt").read_text()
    lines = [line for line in said.splitlines() if "error:" in line]
    assert len(lines) == 1 and all(word in lines[0] for word in words), said
    assert "Traceback" not in said and not list(Path().glob("runs/*/*/*"))


@pytest.mark.slow
def test_a_hub_name_that_cannot_be_fetched_is_refused_at_once():
    """The address is one that never answers; HF_HUB_OFFLINE, which the other tests set, is not."""
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {
        "HF_ENDPOINT": "http://127.0.0.1:9"
    }
    for flags in (
        ["--model", "distilbert-base-uncased"],
        ["--data", "lmsys/lmsys-arena-human-preference-55k"],
    ):
        began = time.monotonic()
        command = [sys.executable, str(PROJECT / "run_preference.py"), "--smoke", *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
        assert done.returncode == 2 and time.monotonic() - began < 60  # retries take minutes
        last = done.stderr.strip().splitlines()[-1]
        assert f"{flags[1]} cannot be fetched (the Hub does not answer" in last, last
        assert "use a local" in last, last


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("run_preference", "--smoke", env={"PICTURES": "drawn"})
    return folder, (folder / "out.txt").read_text()


@pytest.mark.slow
def test_smoke_learns_what_the_journals_second_run_learned(smoke):
    got = result(smoke[0] / "out")
    assert got["status"] == "finished" and got["test/accuracy_interval"][0] >= 0.6
    assert got["test/alarm"] is None and "next: " in smoke[1].splitlines()[-1]


@pytest.mark.slow
def test_smoke_without_the_prompt_is_chance_as_in_the_journals_first_run():
    got = run("run_preference", "--smoke", "--inputs", "responses")
    low, high = got["test/accuracy_interval"]
    assert low <= 1 / 3 <= high and got["test/alarm"].startswith("NOT LEARNING")


def test_a_finished_run_is_rebuilt_from_its_folder_alone(smoke, cache):
    got = result(smoke[0] / "out")
    cfg, model, tokenizer = script.load_model(newest(smoke[0] / "out"), World())
    data = core.load_pairs(cfg, World())
    pairs.measure_sequences(data, cfg.inputs, cfg.max_length)
    split = pairs.split_rows(data, cfg)
    log_probs = script.evaluate(model, data, split["test"], cfg, World())
    again = script.measure(log_probs, data, split["test"], split["train"], cfg.symmetric)
    assert again["log_loss"] == pytest.approx(got["test/log_loss"], rel=1e-5)
    assert tokenizer.get_vocab() == data.tokenizer.get_vocab()
    lines = [
        json.loads(line) for line in (newest(smoke[0] / "out") / "predictions.jsonl").read_text().splitlines()
    ]
    tests = [line for line in lines if line["split"] == "test"]
    assert [line["id"] for line in tests] == [data.ids[i] for i in split["test"]]
    loss = -np.mean([np.log(line[line["label"]]) for line in tests])
    assert loss == pytest.approx(got["test/log_loss"], rel=1e-6)


@pytest.mark.slow
def test_folds_predict_every_row_once_and_survive_a_kill():
    flags = ["--smoke", "--max_documents", 120, "--epochs", 1, "--batch", 12, "--folds", 3]
    whole = run("run_preference", *flags, "--out", "out")
    lines = [json.loads(line) for line in (newest() / "predictions.jsonl").read_text().splitlines()]
    ids = [line["id"] for line in lines if line["split"] == "test"]
    assert len(ids) == len(set(ids)) == 120 == whole["test/rows"]
    assert launch("run_preference", *flags, "--out", "killed", kill=("step", 7, 0)) == [-9]
    assert launch("run_preference", *flags, "--out", "killed", "--resume_timestamp", "auto") == [0]
    again = result("killed")
    assert (
        again["weights_sha256"] == whole["weights_sha256"]
        and again["test/log_loss"] == whole["test/log_loss"]
    )
    assert len(again["test_checkpoints"]) == 3


@pytest.mark.slow
def test_folds_with_the_journals_preset_keep_the_weights_they_tested():
    run(
        "run_preference",
        "--smoke",
        "--preset",
        "baseline",
        "--max_documents",
        120,
        "--batch",
        12,
        "--folds",
        3,
    )
    names = result()["test_checkpoints"]
    assert len(names) == 3 and all((newest() / "checkpoints" / name).is_dir() for name in names)
    script.load_model(newest(), World())


JOURNAL = {  # what all rows of the journal's table share; then each row
    **{"data": "lmsys/lmsys-arena-human-preference-55k", "max_documents": None, "split_seed": 42},
    **{"folds": None, "inputs": "prompt+responses", "max_length": 512, "test_csv": None},
    **{"model": "distilbert-base-uncased", "freeze": "none", "encode_once": True, "pooling": "first"},
    **{
        "head": "mlp",
        "start_at_prior": False,
        "symmetric": False,
        "dropout": 0.1,
        "encoder_dropout": None,
        "batch": 32,
    },
    **{"micro_batch": None, "epochs": 3, "max_steps": None, "max_minutes": None, "lr": 1e-5},
    **{"head_lr": None, "layer_decay": 1.0, "min_lr": 0.0, "warmup": 0.0, "schedule": "constant"},
    **{"optimizer": "adamw", "weight_decay": 0.01, "swap_augmentation": False, "clip": None},
    **{"skip_spikes": False, "dtype": "fp32", "compile": "auto", "seed": 0, "eval_every": None},
    "shard": "none",
    **{"final_eval": True, "test_weights": "last"},
}
ROWS = {
    "random": {"max_steps": 0},
    "baseline": {},
    "frozen": {"freeze": "all"},
    "bottom": {"freeze": "bottom"},
    "bottom_journal": {"freeze": "blocks"},
    "bert": {"model": "bert-base-uncased"},
    "bert-large": {"model": "bert-large-uncased"},
    "roberta": {"model": "roberta-base"},
    "electra": {"model": "google/electra-base-discriminator"},
    "deberta": {"model": "microsoft/deberta-base"},
    "albert": {"model": "albert-base-v2"},
    "run_1": {"inputs": "responses"},
    "run_2": {},
    "max_length_128": {"inputs": "responses", "max_length": 128},
    "batch_2": {"batch": 2, "epochs": 1},
}


@pytest.mark.parametrize("preset", ROWS)
def test_a_journal_preset_is_how_the_journal_trained(preset):
    cfg = core.parse_config(script.Config, script.PRESETS, script.SMOKE, "", ["--preset", preset])
    wanted = JOURNAL | ROWS[preset] | {"tag": preset}
    assert {name: getattr(cfg, name) for name in wanted} == wanted
    assert (
        set(ROWS)
        == set(script.JOURNAL_RESULTS)
        == set(script.PRESETS) - {"recommended", "strong", "strong_decoder"}
    )


@pytest.mark.slow
def test_a_clock_ends_the_run_and_the_schedule_with_it():
    got = run("run_preference", "--smoke", "--epochs", 500, "--max_minutes", "0.03", "--log_every", 1)
    lines = [json.loads(line) for line in (newest() / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert got["status"] == "finished" and 1.5 < got["train_seconds"] < 30  # 1.8 and a step
    assert max(rates) > 8e-4 and rates[-1] < 1e-4  # warmed up and annealed, on whatever machine this is


@pytest.mark.parametrize("dtype", [pytest.param("fp16", marks=pytest.mark.slow), "fp64"])
def test_the_other_precisions_train_and_resume(dtype):
    flags = ["--smoke", "--max_documents", 120, "--epochs", 2, "--dtype", dtype, "--save_every", 2]
    launch("run_preference", *flags, "--out", "out", kill=("step", 5, 0))
    got = run("run_preference", *flags, "--resume_timestamp", "auto")
    assert got["status"] == "finished" and np.isfinite(got["test/log_loss"])
    assert ("has no fast fp16" in Path("out.txt").read_text().replace("this CPU ", "")) == (dtype == "fp16")


def predictions(out="out", part="test"):
    """{id: line of predictions.jsonl} of the newest run."""
    lines = (newest(out) / "predictions.jsonl").read_text().splitlines()
    return {line["id"]: line for line in map(json.loads, lines) if line["split"] == part}


def pairs_csv(n, name="train.csv", turned=False):
    """The built-in pairs as a file, or with A and B swapped."""
    rows = builtin.python_pairs(n)
    if turned:
        names = {"response_a": "response_b", "winner_model_a": "winner_model_b"}
        names |= {b: a for a, b in names.items()}
        rows = [{column: line[names.get(column, column)] for column in line} for line in rows]
    return write_csv(rows, name)


def submission(folder):
    with open(folder / "submission.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("inputs", ["prompt+responses", pytest.param("joint", marks=pytest.mark.slow)])
def test_a_file_with_A_and_B_swapped_gives_exactly_swapped_probabilities(inputs):
    flags = ["--smoke", "--max_documents", 200, "--epochs", 2, "--inputs", inputs]
    run("run_preference", *flags, "--data", pairs_csv(200), "--test_csv", pairs_csv(90, "test.csv"))
    folder, as_is = newest(), submission(newest())
    turned = pairs_csv(90, "turned.csv", turned=True)
    assert launch("run_preference", "--mode", "submit", "--run_folder", folder, "--test_csv", turned) == [0]
    swapped = submission(folder)
    figures = ["winner_model_a", "winner_model_b", "winner_tie"]
    got = np.array([[float(line[name]) for name in figures] for line in swapped])
    want = np.array([[float(line[name]) for name in figures] for line in as_is])
    np.testing.assert_allclose(got, want[:, [1, 0, 2]], rtol=0, atol=1e-6)
    assert np.abs(want[:, 0] - want[:, 1]).max() > 1e-3
    said = predictions()
    flips = [np.argmax(line["as_is"]) != np.argmax(line["swapped_back"]) for line in said.values()]
    assert len(said) > 10 and result()["test/flip_rate"] == pytest.approx(np.mean(flips))


@pytest.mark.slow
def test_training_in_both_orders_does_not_care_which_is_first():
    """A symmetric run on the file with A and B swapped ends in the same weights, but for rounding."""
    weights = []
    for turned in (False, True):
        data = pairs_csv(120, turned=turned)
        flags = ["--smoke", "--data", data, "--epochs", 2, "--batch", 12, "--dtype", "fp64"]
        got = run("run_preference", *flags, "--no-start_at_prior", "--test_weights", "last")
        weights.append(load_file(newest() / "checkpoints" / got["checkpoint"] / "model.safetensors"))
    for name in ("encoder.transformer.layer.0.ffn.lin1.weight", "head.0.weight"):
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=1e-9)


@pytest.mark.slow
def test_swap_augmentation_swaps_half_of_the_rows_and_ranks_agree():
    flags = ["--smoke", "--max_documents", 200, "--batch", 10, "--epochs", 2, "--dtype", "fp64"]
    flags += ["--no-symmetric", "--swap_augmentation", "--test_weights", "last"]
    weights = []
    for size in (1, 3):
        got = run("run_preference", *flags, size=size)
        weights.append(load_file(newest() / "checkpoints" / got["checkpoint"] / "model.safetensors"))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-9, msg=name)
    cfg = SimpleNamespace(swap_augmentation=True, seed=0, batch=32)
    drawn = np.array([pairs.swapped(cfg, 0, step) for step in range(100)])
    assert 0.45 < drawn.mean() < 0.55 and len({tuple(line) for line in drawn.tolist()}) == 100


@pytest.mark.slow
def test_splits_do_not_depend_on_encoder_length_or_seed():
    parts = []
    for flags in ([], ["--model", "tiny:bert", "--max_length", 20, "--seed", 7], ["--inputs", "responses"]):
        run("run_preference", "--smoke", "--max_documents", 120, "--epochs", 0, *flags)
        parts.append([(name, line["group"]) for name, line in predictions().items()])
    assert parts[0] == parts[1] == parts[2] and len(parts[0]) > 5


@pytest.mark.slow
@pytest.mark.parametrize("folds", [None, 3])
def test_a_submission_has_every_row_in_order_and_is_the_same_on_any_number_of_ranks(folds):
    """From Kaggle's zip, with empty, identical and broken rows; of folds, their mean."""
    rows = [{k: v for k, v in line.items() if "winner" not in k} for line in builtin.python_pairs(40, seed=3)]
    rows[3]["response_a"] = rows[4]["response_b"] = ""
    rows[7]["response_a"] = rows[7]["response_b"]
    rows[9]["prompt"] = "not JSON"
    rows = [rows[i] | {"id": 136060 - 7 * i} for i in range(40)]
    with zipfile.ZipFile("kaggle.zip", "w") as archive:
        for name, path in {"train.csv": pairs_csv(120), "test.csv": write_csv(rows, "test.csv")}.items():
            archive.write(path, name)
        archive.writestr("sample_submission.csv", "id,winner_model_a,winner_model_b,winner_tie\n1,1,0,0\n")
    flags = ["--smoke", "--data", "kaggle.zip", "--test_csv", "kaggle.zip", "--epochs", 1, "--batch", 12]
    flags += ["--dtype", "fp64", *(["--folds", folds] if folds else [])]
    figures, said = [], []
    for size in (1, 2, 3):
        got = run("run_preference", *flags, size=size)
        lines = submission(newest())
        assert list(lines[0]) == ["id", "winner_model_a", "winner_model_b", "winner_tie"]
        assert [line["id"] for line in lines] == [str(line["id"]) for line in rows]
        figures.append([[float(value) for name, value in line.items() if name != "id"] for line in lines])
        assert len(got["test_checkpoints"]) == (folds or 1)
        said.append({name: [line["A"], line["B"], line["tie"]] for name, line in predictions().items()})
    np.testing.assert_allclose(np.sum(figures[0], axis=1), 1, rtol=0, atol=1e-12)
    for other in (1, 2):
        np.testing.assert_allclose(figures[other], figures[0], rtol=0, atol=1e-9)
        assert list(said[other]) == list(said[0])
        np.testing.assert_allclose([*said[other].values()], [*said[0].values()], rtol=0, atol=1e-9)
    assert figures[0][7][0] == pytest.approx(figures[0][7][1], abs=1e-9)  # identical responses
    log = (newest() / "log.txt").read_text()
    for side in ("a", "b"):
        assert f"1 row(s) are judged as plain text: response_{side} is empty" in log
    assert "1 row(s) are judged as plain text: prompt is no JSON" in log
    assert "1 row(s) have identical responses" in log and "2 empty responses" in log
    assert log.count("cut to fit") == 2  # of the training rows and of these
    before = (newest() / "submission.csv").read_text()
    again = ["--mode", "submit", "--run_folder", newest(), "--test_csv", "kaggle.zip"]
    assert launch("run_preference", *again, size=2) == [0, 0]
    assert Path("out.txt").read_text().count("written: ") == 1
    np.testing.assert_allclose(
        [[float(line[name]) for name in columns.LABELS.values()] for line in submission(newest())],
        [[float(x) for x in line.split(",")[1:]] for line in before.splitlines()[1:]],
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.slow
def test_a_submission_is_refused_where_it_would_be_another_models():
    flags = ["--smoke", "--max_documents", 120, "--epochs", 1, "--batch", 12, "--folds", 3, "--freeze", "all"]
    submitting = ["--mode", "submit", "--test_csv", pairs_csv(20, "test.csv")]
    run("run_preference", *flags, "--test_csv", "test.csv")  # folds of a frozen encoder, each with its own
    before = (newest() / "submission.csv").read_text()
    assert launch("run_preference", *submitting, "--run_folder", newest(), "--no-encode_once") == [0]
    np.testing.assert_allclose(*(
        [[float(x) for x in line.split(",")] for line in text.splitlines()[1:]]
        for text in (before, (newest() / "submission.csv").read_text())
    ), rtol=0, atol=1e-6)  # fmt: skip
    assert launch("run_preference", *submitting, "--run_folder", newest(), "--max_length", 20) == [2]
    assert (
        "--max_length is read by --mode train or find_lr or study, not by submit"
        in Path("out.txt").read_text()
    )
    damaged = newest() / "checkpoints" / result()["test_checkpoints"][1] / "model.safetensors"
    damaged.write_bytes(b"")
    assert launch("run_preference", *submitting, "--run_folder", newest()) == [2]
    assert f"{damaged.parent.name} is broken" in Path("out.txt").read_text()
    (newest() / "result.json").unlink()
    assert launch("run_preference", *submitting, "--run_folder", newest()) == [2]
    assert "is not finished: resume it" in Path("out.txt").read_text()
    assert launch("run_preference", *submitting, "--run_folder", "nowhere") == [2]
    assert "nowhere is no run folder" in Path("out.txt").read_text()


@pytest.mark.slow
def test_a_frozen_encoders_head_learns_at_lr():
    """Not at the default of head_lr, whatever that is."""
    heads = []
    for lr in (1e-3, 1e-5):
        flags = ["--smoke", "--max_documents", 120, "--freeze", "all", "--max_steps", 2, "--lr", lr]
        got = run("run_preference", *flags, "--test_weights", "last")
        weights = load_file(newest() / "checkpoints" / got["checkpoint"] / "model.safetensors")
        heads.append(weights["head.0.weight"])
    cfg = core.parse_config(script.Config, {}, {}, "", ["--freeze", "all"])
    assert cfg.head_lr and not torch.equal(*heads)


def test_a_changed_preset_says_so():
    run("run_preference", "--smoke", "--preset", "frozen", "--freeze", "none", "--max_steps", 0)
    said = Path("out.txt").read_text()
    assert "journal 000 on LMSYS, preset frozen: accuracy 0.453" in said and "(here with freeze none)" in said


def test_the_report_card_is_on_the_screen_and_in_the_folder(smoke):
    got, said = result(smoke[0] / "out"), smoke[1]
    for words in ("log loss", "accuracy", "flips", "recall", "calibration", "lengths only", "temperature"):
        [line] = [line for line in said.splitlines() if line.startswith(f"test  {words}")]
        assert "±" in line or "(" in line
    names = ("log_loss", "accuracy", "flip_rate", "recall_A", "recall_tie", "calibration_error")
    for name in (*names, "length_only_log_loss", "brier", "tempered_log_loss", "averaged_above_one_order"):
        low, high = got[f"test/{name}_interval"]
        assert not low > high  # NaN where the smoke run's rows of a kind are all alike
        assert (got.get(f"val/{name}") is None) == (name == "tempered_log_loss")
    assert {"test/macro_f1", "test/by_truncation", "test/by_length", "test/prefers_longer"} <= set(got)
    assert (newest(smoke[0] / "out") / "report.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("test_weights", "folds", "best", "tested"),
    [
        ("last", 2, None, "last_step_9"),
        ("best", 2, "best_step_3", "best_step_3"),
        ("best", 2, "step_9", "last_step_9"),
        ("last", None, None, "step_9"),
        ("best", None, "step_9", "step_9"),
    ],
)
def test_a_fold_names_weights_that_later_folds_do_not_push_out(
    test_weights, folds, best, tested, monkeypatch
):
    """Where its best ones found no room, or are damaged, the last ones are tested: they are kept beside."""
    kept = []

    def keep_weights(step, model, kind, must=False):
        kept.append(must)
        return f"{kind}_step_{step}"

    run = SimpleNamespace(
        checkpoint="step_9", load_best=lambda model: best, keep_weights=keep_weights, poll=None
    )
    monkeypatch.setattr(script, "evaluate", lambda *given: np.zeros(0))
    cfg = SimpleNamespace(test_weights=test_weights, folds=folds, final_eval=True)
    rows = dict.fromkeys(("val", "test"))
    found = script.predict(run, cfg, World(), None, rows, torch.nn.Linear(2, 2), 9)
    assert found["checkpoint"] == tested
    assert kept == [True] * tested.startswith("last")  # without them the fold would be trained in vain


def test_models_of_folds_are_averaged_in_their_probabilities_and_both_orders(monkeypatch):
    """One function for other data and for a submission, which must not differ."""
    sides = {"one": [[[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]]], "two": [[[0.6, 0.3, 0.1], [0.3, 0.5, 0.2]]]}
    loaded = []
    monkeypatch.setattr(core, "load_weights", lambda path, model: loaded.append(Path(path).name))
    monkeypatch.setattr(script, "evaluate", lambda *_: np.log(sides[loaded[-1]]))
    data = SimpleNamespace(labels=[0])
    model = torch.nn.Linear(1, 1)
    found = script.mean_of_folds("run", ["one", "two"], None, model, data, World(), None)
    np.testing.assert_allclose(np.exp(found), [[[0.4, 0.3, 0.3], [0.2, 0.3, 0.5]]])


def test_a_frozen_encoder_needs_no_rate():
    given = ["--freeze", "all", "--lr", "0"]
    assert core.parsed_config(script.Config, script.PRESETS, script.SMOKE, "", given).lr == 0


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--head", "compare", "--inputs", "joint"], "--head compare needs A and B apart"),
        (["--folds", "3", "--val_share", "0.2"], "--folds makes parts of equal size: drop --val_share"),
        (["--val_share", "0.5", "--test_share", "0.5"], "leave nothing to train on"),
        (["--label_smoothing", "1.5"], "--label_smoothing 1.5 is out of range"),
        (
            ["--mode", "submit", "--test_csv", "t.csv", "--teacher", "run"],
            "--teacher is read by --mode train",
        ),
    ],
)
def test_constants_that_do_not_go_together_are_refused(flags, line):
    with pytest.raises(core.UserError, match=line):
        core.parsed_config(script.Config, script.PRESETS, script.SMOKE, "", flags)
