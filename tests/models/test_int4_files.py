"""A folder of int4 weights: the same model in another process, damage refused in a line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from toys.quantise import LLAMA, SHAPES, assert_close, assert_same, ids, logits, numbers, prepared, random_gpt

import core
from core import GPT, GPTConfig
from lab.models import gpt, int4


def bytes_of(model):
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


@pytest.fixture
def tokenizer():
    return core.make_tokenizer("ascii", None)


@pytest.fixture
def saved(tmp_path, tokenizer):
    """(prepared model, its folder)"""
    model = prepared(**LLAMA)
    int4.save(int4.convert(model, 16), 16, tokenizer, tmp_path / "small")
    return model, tmp_path / "small"


FRESH = """
import torch
from lab.models import int4
torch.set_num_threads({threads})
model, tokenizer = int4.load({folder!r})
with torch.no_grad():
    torch.save((model(torch.load("ids.pt")), tokenizer("fox 0").input_ids), "there.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["gpt2", "noam"])
def test_another_process_loads_the_same_model_bit_for_bit(shape, tmp_path, tokenizer):
    model = prepared(**SHAPES[shape])
    small, folder = int4.convert(model, 16), tmp_path / "deep" / "small"
    int4.save(small, 16, tokenizer, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.safetensors",
        "quantised.json",
        "tokenizer",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["small"]
    loaded, _ = int4.load(folder)
    assert_same(numbers(loaded), numbers(small))
    torch.save(ids(3, 16), "ids.pt")
    code = FRESH.format(threads=torch.get_num_threads(), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    there, words = torch.load("there.pt")
    assert torch.equal(there, logits(small)) and torch.equal(there, logits(loaded))
    assert words == tokenizer("fox 0").input_ids
    assert_close(there, logits(model))


def test_a_folder_is_replaced_once_the_new_one_is_whole(saved, tokenizer, monkeypatch):
    """A kill or a full disk in between left none."""
    model, folder = saved
    before = numbers(int4.load(folder)[0])
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(int4, "write_json", full)
        int4.save(int4.convert(model, 8), 8, tokenizer, folder)
    assert_same(numbers(int4.load(folder)[0]), before)
    small = int4.convert(model, 8)
    int4.save(small, 8, tokenizer, folder)
    assert_same(numbers(int4.load(folder)[0]), numbers(small))
    assert [path.name for path in folder.parent.iterdir()] == ["small"]


def full(path, content):
    raise OSError("the disk is full")


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_loaded_model_generates_what_the_prepared_one_does(temperature, saved):
    model, folder = saved
    loaded, _ = int4.load(folder)
    prompts, how = [[5, 7, 9], [1], [3] * 12], {"temperature": temperature, "seed": 3}
    texts = [core.generate(of, prompts, 40, **how) for of in (model, loaded)]
    assert texts[0] == texts[1] and len(texts[0][2]) == 40  # past block_size 16, too
    int4.switch(model, False)
    assert core.generate(model, prompts, 40, **how) != texts[0]
    assert not gpt.SECOND_LAYOUT


@pytest.mark.parametrize(
    "how", ["missing", "empty", "truncated", "garbage", "without a tensor", "other shapes"]
)
def test_a_damaged_model_file_is_one_line(how, saved):
    path = saved[1] / "model.safetensors"
    content, state = path.read_bytes(), safetensors.torch.load_file(path)
    path.unlink()
    if how in ("empty", "truncated", "garbage"):
        path.write_bytes({"empty": b"", "truncated": content[:-100], "garbage": b"\x07" * 5000}[how])
    elif how == "without a tensor":
        state.pop("h.1.attn.c_proj.scales")
        safetensors.torch.save_file(state, path)
    elif how == "other shapes":
        safetensors.torch.save_file(state | {"wte.levels": torch.zeros(5, 32, dtype=torch.int8)}, path)
    with pytest.raises(core.UserError, match="small") as error:
        int4.load(saved[1])
    assert "\n" not in str(error.value)


JUNK = {
    "missing": None,
    "empty": "",
    "truncated": '{"group": 16, "conf',
    "no object": "[]",
    "no config": '{"group": 16}',
    "config null": '{"group": 16, "config": null}',
    "unknown constant": '{"group": 16, "config": {"vocab_size": 97, "colour": 3}}',
    "another group": lambda stored: stored | {"group": 8},
    "group 0": lambda stored: stored | {"group": 0},
    "group in words": lambda stored: stored | {"group": "sixteen"},
    "another width": lambda stored: stored | {"config": stored["config"] | {"n_embd": 64}},
}


@pytest.mark.parametrize("how", JUNK)
def test_a_damaged_description_is_one_line(how, saved):
    path, content = saved[1] / "quantised.json", JUNK[how]
    stored = json.loads(path.read_text())
    path.unlink()
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content(stored)))
    with pytest.raises(core.UserError, match="small") as error:
        int4.load(saved[1])
    assert "\n" not in str(error.value)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_loading_executes_nothing(saved, monkeypatch):
    folder = saved[1]
    for path in folder.rglob("*.*"):
        assert path.read_bytes()[:1] != b"\x80" and path.read_bytes()[:2] != b"PK", path
    torch.save(Bomb(), "bomb.pt")
    (folder / "model.safetensors").write_bytes(Path("bomb.pt").read_bytes())
    with pytest.raises(core.UserError):
        int4.load(folder)
    assert not Path("executed").exists()
    torch.load("bomb.pt", weights_only=False)  # the bomb would have worked
    assert Path("executed").is_dir()


def test_a_folder_without_its_tokenizer_is_refused(saved):
    for path in (saved[1] / "tokenizer").iterdir():
        path.unlink()
    (saved[1] / "tokenizer").rmdir()
    with pytest.raises(core.UserError, match="tokenizer"):
        int4.load(saved[1])


def test_what_is_saved_is_what_is_loaded_even_over_another_model(saved, tokenizer):
    other = int4.convert(random_gpt(seed=8, **LLAMA), 16)
    int4.save(other, 16, tokenizer, saved[1])
    assert_same(numbers(int4.load(saved[1])[0]), numbers(other))


@pytest.mark.parametrize("group", [256, 32])
def test_the_full_model_takes_less_than_a_fifth(group):
    with torch.device("meta"):
        model = GPT(GPTConfig(50304, 512, n_layer=10, n_head=16, n_embd=1024, **LLAMA))
    small = int4.convert(model, group)
    matrices = 10 * (4 * 1024**2 + 3 * 1024 * 2816)
    expected = 50304 * (1024 + 4) + matrices // 2 + 4 * matrices // group + 4 * 21 * 1024
    assert bytes_of(model) == 4 * (50304 * 1024 + matrices + 21 * 1024)
    assert bytes_of(small) == expected <= 0.2 * bytes_of(model)


@pytest.mark.parametrize("group", [256, 32])
def test_the_file_is_as_large_as_computed(group, tmp_path, tokenizer):
    model = random_gpt(vocab_size=1000, n_embd=256, **LLAMA)
    small = int4.convert(model, group)
    int4.save(small, group, tokenizer, tmp_path / "small")
    written = (tmp_path / "small" / "model.safetensors").stat().st_size
    with torch.device("meta"):
        computed = bytes_of(int4.convert(GPT(model.config), group))
    assert computed == bytes_of(small) and computed <= written <= computed + 200 * len(small.state_dict())
    assert written <= 0.2 * bytes_of(model)
