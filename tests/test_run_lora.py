"""run_lora.py: adapters alone in checkpoints, a base that may not change, export to peft."""

import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import safetensors.torch
import torch
from toys.results import make_run
from toys.sft import (
    BARE,
    adapted,  # noqa: F401 (a fixture)
    config,
    fails,
    go,
    gpt2_folder,  # noqa: F401 (a fixture)
    initial_model,
    parts_of,
    toy_file,
)

import core
import run_lora
from core import UserError, World
from lab.data import tokenizers
from lab.models import gpt_formats, lora_layers


def test_a_run_that_was_killed_before_it_knew_its_base_can_be_exported_in_the_end():
    argv = ["--data", toy_file(53), *BARE, "--max_steps", 2, "--no-final_eval"]  # 53: not in the cache yet
    where = {"env": {"TOKEN_CACHE": os.environ["TOKEN_CACHE"]}}
    assert ranks.launch("run_lora", "--smoke", "--out", "out", *argv, kill=("caching", 1, 0), **where) == [-9]
    folder = ranks.newest()
    assert core.read_config(folder)["facts"] == {}
    result, again = go("run_lora", *argv, "--resume_timestamp", "auto")
    facts = core.read_config(folder)["facts"]
    assert again == folder and facts["base_sha256"] == result["base_sha256"]
    assert set(facts["fingerprint"]) == {"data", "tokenizer", "template"}
    run_lora.main(config("run_lora", "--mode", "export", "--run_folder", folder), World())
    assert (folder / "peft" / "adapter_model.safetensors").exists()


def tune_folder(gpt2_folder, *argv, out="out"):
    most = ["--model", gpt2_folder, "--tie_head", "--lr", 0.02, "--data", toy_file()]
    most += [] if "--adapter" in argv else ["--no-lora_head"]  # an adapter brings its own
    return go("run_lora", *most, *BARE, *argv, out=out)


def test_a_checkpoint_holds_adapters_only_and_the_base_is_named(adapted):
    result, folder = adapted
    cfg, model, _ = run_lora.load_model(folder, World())
    paths = list((folder / "checkpoints").glob("*/model.safetensors"))
    wanted = {name: p.shape for name, p in core.Adapters(model).named_parameters()}
    assert len(paths) >= 2 and len(wanted) == 2 * 9
    for path in paths:
        held = safetensors.torch.load_file(path)
        assert {name: w.shape for name, w in held.items()} == wanted
        assert all(name.rpartition(".")[2] in "AB" for name in held)
    fresh = core.base_weights(initial_model("run_lora", cfg, _))
    assert result["base_sha256"] == core.state_sha256(fresh)
    assert core.read_config(folder)["facts"]["base_sha256"] == result["base_sha256"]
    assert result["trainable_parameters"] == sum(math.prod(shape) for shape in wanted.values())
    assert "the base is unchanged (checksum)" in (folder / "log.txt").read_text()


def test_a_changed_base_is_refused_by_a_resume_and_by_load_model(gpt2_folder, monkeypatch, capfd):
    base = gpt_formats.load_pretrained(str(gpt2_folder))
    tokenizer = tokenizers.named_tokenizer(str(gpt2_folder))
    core.save_pretrained(base, tokenizer, "mine")
    argv = ["--max_steps", 2, "--no-final_eval"]
    _, folder = tune_folder("mine", *argv)
    before = (folder / "log.txt").read_text()
    with torch.no_grad():
        base.h[1].mlp.c_fc.bias[3] += 1e-3
    core.save_pretrained(base, tokenizer, "mine")
    flags = ["--smoke", "--out", "out", "--resume_timestamp", folder.name[:15], "--max_steps", 4]
    error = fails("run_lora", flags, monkeypatch, capfd)
    assert "base_sha256 is not what out/" in error
    assert (folder / "log.txt").read_text().startswith(before)
    with pytest.raises(UserError, match="model mine is not the one that"):
        run_lora.load_model(folder, World())


@pytest.mark.slow
def test_exported_adapters_are_the_run_to_peft_and_to_a_run_that_goes_on(gpt2_folder, capfd):
    import peft
    from transformers import GPT2LMHeadModel

    result, folder = tune_folder(gpt2_folder, "--test_weights", "last", "--lora_alpha", 32)
    run_lora.main(config("run_lora", "--mode", "export", "--run_folder", folder), World())
    out = capfd.readouterr().out
    assert out.splitlines()[-4:] == [
        f"written: {folder}/merged",
        f"next: python gpt_scratch.py --mode generate --model {folder}/merged",
        f"written: {folder}/peft, adapters for",
        f"  {gpt2_folder}",
    ]
    cfg, model, tokenizer = run_lora.load_model(folder, World())
    _, parts = parts_of(cfg)
    ids = parts["test"].batch(range(4), "cpu")[0]
    merged = GPT2LMHeadModel.from_pretrained(folder / "merged")
    theirs = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(gpt2_folder), folder / "peft")
    ours = gpt_formats.load_pretrained(str(folder / "merged")).eval()
    with torch.no_grad():
        expected, base = model(ids), GPT2LMHeadModel.from_pretrained(gpt2_folder).eval()(ids).logits
        found = [merged.eval()(ids).logits, theirs.eval()(ids).logits, ours(ids)]
    for logits in found:  # fp32, another order of additions
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (base - expected).abs().max() > 0.01 * expected.abs().max()
    assert tokenizers.named_tokenizer(str(folder / "merged")).get_vocab() == tokenizer.get_vocab()
    # from here another run goes on: at its step 0 it is the exported one
    argv = ["--adapter", folder / "peft", "--max_steps", 0]
    again, other = tune_folder(gpt2_folder, *argv, out="again")
    assert again["test/loss"] == pytest.approx(result["test/loss"], rel=1e-6)  # alpha / rank, once more
    assert again["trainable_parameters"] == result["trainable_parameters"]
    stronger = max(
        layer.multiplier for layer in core.adapted(run_lora.load_model(other, World())[1]).values()
    )
    assert stronger == pytest.approx(2, rel=1e-12)
    better, _ = tune_folder(gpt2_folder, "--adapter", folder / "peft", "--epochs", 3, out="better")
    assert better["val/loss"] < result["val/loss"]


def test_the_base_that_exported_adapters_name_is_there(adapted, capfd):
    """Of a tiny model, too, whose weights are in no folder beforehand."""
    _, folder = adapted
    run_lora.main(config("run_lora", "--mode", "export", "--run_folder", folder), World())
    base = json.loads((folder / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base).is_dir()


def exported(folder) -> dict[str, torch.Tensor]:
    run_lora.main(config("run_lora", "--mode", "export", "--run_folder", folder), World())
    peft, merged = (
        safetensors.torch.load_file(folder / path)
        for path in ("peft/adapter_model.safetensors", "merged/model.safetensors")
    )
    return {**{f"peft {k}": w for k, w in peft.items()}, **{f"merged {k}": w for k, w in merged.items()}}


@pytest.mark.slow
def test_adapters_that_a_run_began_with_may_go(gpt2_folder):
    steady = ["--schedule", "constant", "--warmup", 0, "--test_weights", "last", "--no-final_eval"]
    argv = ["--max_steps", 4, *steady]
    _, first = tune_folder(gpt2_folder, *argv, "--lora_rank", 3, "--lora_alpha", 6, out="first")
    exported(first)
    shutil.move(first / "peft", "mine")
    argv = [*steady, "--adapter", "mine"]
    whole, other = tune_folder(gpt2_folder, *argv, "--max_steps", 8, out="whole")
    _, folder = tune_folder(gpt2_folder, *argv, "--max_steps", 4)
    kept = {path.name: path.read_bytes() for path in (folder / "adapter").iterdir()}
    assert kept == {path.name: path.read_bytes() for path in Path("mine").iterdir()}
    model = run_lora.load_model(folder, World())[1]
    shutil.rmtree("mine")
    assert core.weights_sha256(run_lora.load_model(folder, World())[1]) == core.weights_sha256(model)
    assert exported(folder).keys() == exported(other).keys()
    resumed, _ = tune_folder(gpt2_folder, *argv, "--max_steps", 8, "--resume_timestamp", folder.name[:15])
    assert resumed["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.slow
def test_a_second_export_takes_the_place_of_the_first(gpt2_folder):
    argv = ["--test_weights", "last", "--no-final_eval", "--schedule", "constant", "--warmup", 0]
    _, other = tune_folder(gpt2_folder, *argv, "--epochs", 2, out="whole")
    _, folder = tune_folder(gpt2_folder, *argv)
    before = exported(folder)
    again = tune_folder(gpt2_folder, *argv, "--epochs", 2, "--resume_timestamp", folder.name[:15])[1]
    assert again == folder
    after, expected = exported(folder), exported(other)
    assert after.keys() == before.keys() == expected.keys()
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    for kind in ("peft", "merged"):
        assert any(not torch.equal(after[n], before[n]) for n in after if n.startswith(kind))


FAMILY = [
    *["--lora_targets", "q,v,down", "--lora_init", "pissa", "--lora_dora", "--lora_plus", 4],
    *["--lora_rank_pattern", "h.0.mlp=2,h.1.attn=3", "--lora_alpha_pattern", "mlp=9", "--lora_dropout", 0.1],
]


@pytest.mark.slow
def test_a_run_of_dora_pissa_and_lora_plus_resumes_and_is_exported(gpt2_folder, monkeypatch):
    import peft
    from transformers import GPT2LMHeadModel

    steady = ["--schedule", "constant", "--warmup", 0, "--test_weights", "last", "--no-final_eval"]
    whole, _ = tune_folder(gpt2_folder, *steady, *FAMILY, "--max_steps", 6, out="whole")
    _, folder = tune_folder(gpt2_folder, *steady, *FAMILY, "--max_steps", 3)
    log = (folder / "log.txt").read_text()
    assert "rank 2/3/16  alpha 16  scaling alpha/r  DoRA  PiSSA" in log and "rate of B x 4 (LoRA+)" in log
    exact = lora_layers.principal
    monkeypatch.setattr(lora_layers, "principal", lambda *how: [-1.001 * x for x in exact(*how)])
    again = ["--max_steps", 6, "--resume_timestamp", folder.name[:15]]
    resumed, _ = tune_folder(gpt2_folder, *steady, *FAMILY, *again)  # where the SVD gives other numbers
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert resumed["base_sha256"] == whole["base_sha256"]
    assert "the base is unchanged (checksum)" in (folder / "log.txt").read_text()
    exported(folder)
    cfg, model, _ = run_lora.load_model(folder, World())
    ids = parts_of(cfg)[1]["test"].batch(range(4), "cpu")[0]
    base = GPT2LMHeadModel.from_pretrained(gpt2_folder).eval()
    merged = gpt_formats.load_pretrained(str(folder / "merged")).eval()
    with torch.no_grad():
        expected, plain = model(ids), base(ids).logits
        theirs = peft.PeftModel.from_pretrained(base, folder / "peft").eval()(ids).logits
        for logits in (theirs, merged(ids)):
            assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (plain - expected).abs().max() > 0.01 * expected.abs().max()


@pytest.mark.parametrize("name", ["rank", "targets", "dora", "init", "rank_pattern"])
def test_an_adapter_brings_its_own_constants(name):
    value = {"rank": [2], "targets": ["q"], "dora": [], "init": ["pissa"], "rank_pattern": ["mlp=2"]}[name]
    with pytest.raises(SystemExit):
        config("run_lora", "--adapter", "mine", f"--lora_{name}", *value)
    assert config("run_lora", "--adapter", "mine", "--lora_plus", 4, "--lora_dropout", 0.1).lora_plus == 4


@pytest.mark.parametrize("how", ["fresh", "adapter"])
def test_a_head_is_exported_beside_a_base_with_a_head_of_its_own(how, gpt2_folder):
    """Onto a tied base peft would merge it into the embedding, too."""
    argv = ["--model", gpt2_folder, "--no-tie_head", "--data", toy_file(), *BARE, "--max_steps", 2]
    argv += ["--no-final_eval"]
    _, folder = go("run_lora", *argv, "--lora_head", smoke=False)
    names = exported(folder)
    if how == "adapter":
        _, folder = go("run_lora", *argv, "--adapter", folder / "peft", out="again", smoke=False)
        assert exported(folder).keys() == names.keys()
    base = json.loads((folder / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert "peft base_model.model.lm_head.lora_A.weight" in names
    assert Path(base).is_absolute() and Path(base).samefile(folder / "base")
    weights = safetensors.torch.load_file(Path(base) / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"])


def test_adapters_on_the_output_matrix_alone_are_a_run():
    argv = ["--data", toy_file(), *BARE, "--max_steps", 2, "--lora_layers", 0, "--lora_head", "--no-tie_head"]
    _, folder = go("run_lora", *argv)
    weights = [safetensors.torch.load_file(path) for path in folder.glob("checkpoints/*/model.safetensors")]
    assert weights and all(set(held) == {"lm_head.A", "lm_head.B"} for held in weights)
    assert any(held["lm_head.B"].any() for held in weights)
    assert {key.split(".lora_")[0] for key in exported(folder) if key.startswith("peft")} == {
        "peft base_model.model.lm_head"}  # fmt: skip


def test_a_run_on_a_base_held_in_bf16_ends_with_the_same_adapters_and_exports_the_whole_base():
    flags = ["--data", toy_file(), *BARE, "--max_steps", 3, "--dtype", "bf16", "--batch", 2]
    wide, _ = go("run_lora", *flags)
    narrow, folder = go("run_lora", *flags, "--base_dtype", "bf16", out="narrow")
    for name in ("weights_sha256", "base_sha256", "val/loss"):
        assert narrow[name] == wide[name], name
    facts = core.read_config(folder)
    assert facts["constants"]["base_dtype"] == "bf16" and facts["facts"]["base_sha256"] == wide["base_sha256"]
    dtypes = [
        {p.dtype for p in run_lora.load_model(folder, World(), *base)[1].h.parameters()}
        for base in ((), ("fp32",))
    ]
    assert dtypes == [{torch.float32, torch.bfloat16}, {torch.float32}]
    assert core.read_config(ranks.newest("out"))["constants"]["base_dtype"] == "fp32"  # auto, on a CPU


def test_a_run_keeps_of_an_adapter_what_it_reads_and_nothing_else(monkeypatch):
    """A pipe beside it, or the runs' own folder in it, must not be copied."""
    Path("mine/sub").mkdir(parents=True)
    os.mkfifo("mine/pipe")
    for name in ("adapter_config.json", "adapter_model.safetensors", "notes.txt"):
        Path("mine", name).write_text(name)
    monkeypatch.chdir("mine")
    Path("runs/a").mkdir(parents=True)
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    run_lora.keep_for_later(Path("runs/a"), SimpleNamespace(adapter="."), tokenizer)
    kept = {path.name: path.read_text() for path in Path("runs/a/adapter").iterdir()}
    assert kept == {name: name for name in ("adapter_config.json", "adapter_model.safetensors")}


def test_a_run_that_lost_its_tokenizer_says_so_and_asks_no_hub():
    folder = make_run("a")
    with pytest.raises(UserError, match=f"^{folder} has lost its tokenizer: copy {folder}/tokenizer anew$"):
        run_lora.load_model(folder, World())
