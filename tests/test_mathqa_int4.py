"""run_mathqa.py --mode quantise: the model and its figures are kept until the weights change."""

import math

import pytest
from ranks import newest, result
from toys.quantise import TINY, assert_far, here, logits, quantised

import core
from lab.models import int4


def times(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_mode_quantise_keeps_the_model_and_its_figures_until_the_weights_change(capsys):
    own = here(*TINY)
    found, small = quantised(folder := newest())
    assert small.name == "quantised_32" and found["group"] == 32 and found["trained_for_it"] is False
    for kind in ("float", "int4"):
        assert {"test/loss", "test/answer_accuracy", "mb", "tokens_per_second"} <= found[kind].keys()
        assert found[kind]["tokens_per_second"] > 0
    for name in ("test/loss", "val/loss", "test/answer_accuracy"):
        assert math.isclose(found["float"][name], own[name], rel_tol=1e-6)
    assert found["int4"]["test/loss"] != own["test/loss"]
    assert math.isclose(found["int4"]["test/loss"], own["test/loss"], rel_tol=0.05)
    assert found["int4"]["mb"] == (small / "model.safetensors").stat().st_size / 1e6
    assert math.isclose(found["float"]["mb"], 4 * own["parameters"] / 1e6)
    model, words = int4.load(small)
    assert len(words) <= model.config.vocab_size
    text = capsys.readouterr().out
    assert "int4 by 32" in text and str(small) in text

    before = times(small)
    assert quantised(folder)[0] == found and times(small) == before

    more = [*TINY, "--max_steps", 18, "--test_weights", "best", "--resume_timestamp", folder.name[:15]]
    here(*more)
    assert newest() == folder and result()["steps"] == 18
    again, _ = quantised(folder, size=2)
    assert again["weights_sha256"] != found["weights_sha256"] and times(small) != before
    assert math.isclose(again["float"]["test/loss"], result()["test/loss"], rel_tol=1e-6)
    assert abs(again["int4"]["test/loss"] - result()["test/loss"]) < abs(
        found["int4"]["test/loss"] - result()["test/loss"]
    )
    assert_far(logits(int4.load(small)[0]), logits(model))


@pytest.mark.slow
def test_a_run_that_trained_for_int4_has_the_figures_of_its_int4_model():
    own = here(*TINY, "--qat", "int4", "--qat_group", 16)
    found, small = quantised(newest())  # by the group it was trained for, not the call's 32
    assert small.name == "quantised_16" and found["group"] == 16 and found["trained_for_it"] is True
    for name in ("val/loss", "test/loss", "test/unigram_loss"):
        assert math.isclose(found["int4"][name], own[name], rel_tol=1e-5)
    assert found["int4"]["test/answer_accuracy"] == own["test/answer_accuracy"]
    assert found["float"]["test/loss"] != own["test/loss"]


@pytest.mark.parametrize(
    ("argv", "word"), [([], "--run_folder"), (["--run_folder", "nowhere"], "nowhere")], ids=["none", "absent"]
)
def test_mode_quantise_without_a_run_is_one_line(argv, word):
    with pytest.raises(core.UserError, match=word) as error:
        here("--smoke", "--mode", "quantise", *argv)
    assert "\n" not in str(error.value)
