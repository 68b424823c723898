"""Odd constants and damaged model folders: taken as they are meant, or refused in one line; no code runs."""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import math
import pickle
import shutil
import tempfile
from pathlib import Path

import torch
from damage import DAMAGES
from ranks import SCRIPTS

import core
from lab.models import pretrained

VALUES = ["0", "-1", "1", "7", "0.5", "1.0", "1e-3", "1e400", "-1e400", "nan", "inf", "none", "None", "", " ",
          "true", "x" * 300, "3.5", "1,2", "lr=1", "9" * 400, "1e9", "\u0661", "ü", "\U0001f600", "a/b", "..",
          "--", "-", "auto", "fp8", "train", "study", "find_lr", "best", "tiny:gpt2", "0x10", "1_000",
          "a\nb", "\udcff", "%s", "{x}"]  # fmt: skip


def check_constants(rng, folder):
    """What is typed becomes constants of the kinds that Config names, all numbers finite, or is refused."""
    script = importlib.import_module(rng.choice(SCRIPTS))
    names = [*core.names_of(script.Config), "preset", "smoke", "learning_rate", "no-tie_head", "x", ""]
    argv = []
    for name in rng.choices(names, k=rng.randint(1, 3)):
        usual = str(getattr(script.Config, name, "7"))
        values = rng.choices([usual, usual, rng.choice(VALUES)], k=rng.choice([0, 1, 1, 1, 1, 2]))
        argv += [f"--{name}={values[0]}"] if values and rng.random() < 0.3 else [f"--{name}", *values]
    with contextlib.redirect_stderr(io.StringIO()):
        cfg = core.parsed_config(script.Config, script.PRESETS, script.SMOKE, "", argv)
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise AssertionError(f"{argv}: {field.name} became {value}")
    json.dumps(core.constants_of(cfg)).encode()  # as config.json will hold them


@functools.cache
def templates() -> tuple[list[Path], tempfile.TemporaryDirectory]:
    """Folders of a GPT-2 and a Llama as transformers writes them, with tokenizers."""
    import transformers

    holder, small = (
        tempfile.TemporaryDirectory(),
        {"vocab_size": 257, "bos_token_id": None, "eos_token_id": 256},
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    models = {
        "gpt2": transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **small)
        ),
        "llama": transformers.LlamaForCausalLM(
            transformers.LlamaConfig(max_position_embeddings=32, **sizes, **small)
        ),
    }
    folders = [Path(holder.name) / name for name in models]
    for folder, model in zip(folders, models.values(), strict=True):
        model.save_pretrained(folder)
        core.make_tokenizer("bytes", list).save_pretrained(folder)
    return folders, holder


def check_model(rng, folder):
    """A damaged folder is opened as a model of its vocabulary, or refused; what is planted never runs."""
    source = rng.choice(templates()[0])
    folder = Path(shutil.copytree(source, folder / source.name))
    ran = folder.parent / "ran"
    rng.choice([damage_file, damage_file, damage_constant, plant_module, plant_pickle])(folder, rng, ran)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            model, _ = pretrained.open_any(str(folder))
            with torch.no_grad():
                ids = torch.arange(1, 1 + min(3, model.config.block_size or 3))  # a limit of 1 is one
                terms, bias = model.head(model.hidden(ids[None])[0])  # as evaluate does
                log_probs, _ = core.token_log_probs(terms, bias, ids + 1)
    finally:
        if ran.exists():
            raise AssertionError("planted code has run")
    if log_probs.shape != ids.shape or len(terms[0][1]) < 257:
        raise AssertionError(f"{log_probs.shape} of {len(terms[0][1])} tokens")


def damage_file(folder, rng, ran):
    path = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    kind = rng.choice(["bytes"] * 5 + ["gone", "folder", "link"])
    content = path.read_bytes()
    path.unlink()
    if kind == "bytes":
        path.write_bytes(rng.choice(DAMAGES)(content, rng))
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(rng.choice([path.name, "nowhere", "/dev/null"]))


def damage_constant(folder, rng, ran):
    path = folder / rng.choice(
        ["config.json", "config.json", "tokenizer_config.json", "generation_config.json"]
    )
    config = json.loads(path.read_text())
    odd = [None, 0, -1, 1, 3, 10**9, 1e30, "x", "", [], {}, True, float("nan"), "gelu", "llama", [3] * 40]
    config[rng.choice(list(config))] = rng.choice(odd)
    path.write_text(json.dumps(config))


def plant_module(folder, rng, ran):
    """Code that transformers would import and run if it were trusted."""
    classes = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "planted.Planted")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": classes, "model_type": rng.choice([config["model_type"], "planted"])}
    (folder / "config.json").write_text(json.dumps(config))
    theirs = json.loads((folder / "tokenizer_config.json").read_text())
    theirs |= {"auto_map": {"AutoTokenizer": ["planted.Planted", "planted.Planted"]}}
    theirs |= {"tokenizer_class": rng.choice([theirs["tokenizer_class"], "Planted"])}
    (folder / "tokenizer_config.json").write_text(json.dumps(theirs))
    for name in ("planted.py", "__init__.py", "setup.py"):
        (folder / name).write_text(f"open({str(ran)!r}, 'w')\nclass Planted: pass\n")


class Planted:
    """A pickle that writes a file when it is read."""

    def __init__(self, ran):
        self.ran = str(ran)

    def __reduce__(self):
        return open, (self.ran, "w")


def plant_pickle(folder, rng, ran):
    """Weights that are a pickle with a call in it."""
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    if rng.random() < 0.5:
        path.write_bytes(pickle.dumps({"lm_head.weight": Planted(ran)}))
    else:
        torch.save({"lm_head.weight": Planted(ran)}, path)
