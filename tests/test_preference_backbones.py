"""run_preference.py with decoders and with LoRA: what a run learns, keeps, and is measured with again."""

from pathlib import Path

import numpy as np
import pytest
from ranks import newest
from safetensors.torch import load_file, save_file
from test_run_preference import pairs_csv, submission
from toys.begun import begun_tokenizer
from toys.gpt import random_gpt

import core
import run_preference as script
from core import World
from lab.run import checkpoints, files

SHORT = ["--smoke", "--max_documents", "120", "--epochs", "1", "--batch", "12", "--out", "out"]


def go(*flags):
    """A run in this process: its result and its folder."""
    given = [*SHORT, *map(str, flags)]
    cfg = core.parse_config(script.Config, script.PRESETS, script.SMOKE, script.__doc__, given)
    return script.main(cfg, World()), newest()


def decoder_folder():
    core.save_pretrained(random_gpt(vocab_size=302, block_size=64).float(), begun_tokenizer(), "base")
    return "base"


LORA = ["--method", "lora", "--lora_rank", 2]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ["--inputs", "joint", "--freeze", "all"],
    ["--inputs", "joint", *LORA],
    ["--folds", 3, *LORA, "--model", "tiny:distilbert"],
])  # fmt: skip
def test_a_run_keeps_what_it_trained_and_is_rebuilt_on_its_base(flags):
    """Measured again and submitted later: the same figures; swapping A and B swaps probabilities."""
    flags = ["--model", decoder_folder(), *flags]
    got, folder = go("--data", pairs_csv(120), "--test_csv", pairs_csv(40, "test.csv"), *flags)
    again, _ = script.remeasure(folder, World())
    assert again["test/log_loss"] == pytest.approx(got["test/log_loss"], rel=1e-9)
    as_is = probabilities(folder)
    for file, order in (("test.csv", [0, 1, 2]), (pairs_csv(40, "turned.csv", turned=True), [1, 0, 2])):
        flags = ["--mode", "submit", "--run_folder", folder, "--test_csv", file]
        cfg = core.parse_config(script.Config, script.PRESETS, script.SMOKE, "", [str(f) for f in flags])
        script.main(cfg, World())
        np.testing.assert_allclose(probabilities(folder), as_is[:, order], rtol=0, atol=1e-6)
    assert np.abs(as_is[:, 0] - as_is[:, 1]).max() > 1e-4
    stored = [load_file(path) for path in folder.glob("checkpoints/*/model.safetensors")]
    assert all(not {n for n in one if n[:5] != "head." and n[-2:] not in (".A", ".B")} for one in stored)


def probabilities(folder):
    return np.array([[float(value) for value in [*line.values()][1:]] for line in submission(folder)])


@pytest.mark.slow
def test_a_frozen_run_of_before_still_opens():
    """Its checkpoints are whole, and its config knows neither adapters nor the base's hash."""
    got, folder = go("--freeze", "all", "--test_weights", "last")
    _, model, _ = script.load_model(folder, World())
    path = folder / "checkpoints" / got["test_checkpoints"][0]
    (path / "manifest.json").unlink()
    save_file(model.state_dict(), path / "model.safetensors", metadata={"format": "pt"})
    checkpoints.write_manifest(path, {"step": 8, "kept": {}})
    config = core.read_config(folder)
    config["facts"].pop("base_sha256")
    for name in ("method", "lora_rank", "lora_alpha", "lora_dropout", "base_dtype", "checkpointing"):
        config["constants"].pop(name)
    config["constants"]["pooling"] = "first"
    files.write_sealed(folder / "config.json", config)
    cfg, again, _ = script.load_model(folder, World())
    assert cfg.method == "full" and core.weights_sha256(again) == core.weights_sha256(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "model", "adapts"),
    [("strong", "tiny:deberta-v2", False), ("strong_decoder", "tiny:llama", True)],
)
def test_strong_presets_shrink_to_their_families(preset, model, adapts):
    got, folder = go("--preset", preset, "--max_steps", 2)
    assert core.read_config(folder)["constants"]["model"] == model and np.isfinite(got["test/log_loss"])
    names = load_file(folder / "checkpoints" / got["test_checkpoints"][0] / "model.safetensors")
    trained = {name.rpartition(".")[2] for name in names if not name.startswith("head.")}
    assert trained == {"A", "B"} if adapts else "weight" in trained


@pytest.mark.parametrize(("flags", "said"), [
    (["--method", "lora", "--freeze", "all"], "--method lora freezes all but adapters and head"),
    (["--lora_rank", "4"], "--lora_rank is read with --method lora alone: add it"),
])  # fmt: skip
def test_constants_that_contradict_are_refused(flags, said):
    with pytest.raises(core.UserError, match=said):
        core.parsed_config(script.Config, script.PRESETS, script.SMOKE, "", flags)


@pytest.mark.slow
def test_a_rate_finder_leaves_adapters_as_they_were():
    got, folder = go("--mode", "find_lr", "--model", "tiny:gpt2", *LORA)
    assert got and not [*Path(folder).glob("checkpoints/step*")]
