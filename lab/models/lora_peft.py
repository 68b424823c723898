"""LoRA and DoRA adapters to and from the folders that peft reads and writes."""

import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lab.data.paths import require_regular
from lab.errors import UserError
from lab.models.gpt_formats import export_kind, llama_names
from lab.models.lora import adapted, matrix_rows, wrap_layer
from lab.models.lora_layers import DoRALinear, principal
from lab.run.files import is_there, whole_folder, write_json

PREFIX = "base_model.model."
FILES = ("adapter_config.json", "adapter_model.safetensors")
COPY = ".base_layer.weight"
LETTERS = {"A": ".lora_A.weight", "B": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}


@dataclass
class Module:
    """A linear module of transformers: its name, the layer of ours that it is, or some rows of it."""

    name: str
    layer: str
    first: int
    end: int


def their_modules(model, layer) -> list[Module]:
    """The modules that a layer is to transformers: query, key and value are three in the Llama family."""
    rows = getattr(model.get_submodule(layer), "base", model.get_submodule(layer)).out_features
    if export_kind(model.config) == "gpt2":
        return [Module(layer if layer == "lm_head" else f"transformer.{layer}", layer, 0, rows)]
    names = [name.removesuffix(".weight") for name in llama_names(f"{layer}.weight")]
    each = matrix_rows(model.config, layer) or [(0, rows)]
    return [Module(name, layer, *rows) for name, rows in zip(names, each, strict=True)]


def save_peft(model, folder, base):
    """Writes the adapters as a folder that peft loads onto `base` (a folder or Hub id of GPT-2 or of the
    Llama family).

    Three adapters of rank r on GPT-2's fused c_attn are one of rank 3r there: A stacked, B on a diagonal.
    PiSSA's are of twice the rank, and belong to the base as it was.
    """
    import safetensors.torch

    layers, tensors, ranks, alphas = adapted(model), {}, {}, {}
    for name, layer in layers.items():
        for module in their_modules(model, name):
            if found := _adapter_of(layer, module):
                tensors |= {f"{PREFIX}{module.name}{LETTERS[k]}": v.contiguous() for k, v in found.items()}
                ranks[module.name] = len(found["A"])
                alphas[module.name] = layer.multiplier * len(found["A"])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": min(ranks.values()),
        "lora_alpha": min(alphas.values()),
        "use_rslora": False,
        "use_dora": any(isinstance(layer, DoRALinear) for layer in layers.values()),
        "bias": "none",
        "rank_pattern": {re.escape(name): rank for name, rank in ranks.items()},
        "alpha_pattern": {re.escape(name): alpha for name, alpha in alphas.items()},
        "target_modules": list(ranks),
        "fan_in_fan_out": export_kind(model.config) == "gpt2",
        "lora_dropout": next(iter(layers.values())).dropout.p,
        "inference_mode": True,
    }
    with whole_folder(Path(folder), replace=True) as aside:
        safetensors.torch.save_file(tensors, aside / "adapter_model.safetensors", {"format": "pt"})
        write_json(aside / "adapter_config.json", config)


@torch.no_grad()
def _adapter_of(layer, module) -> dict[str, torch.Tensor]:
    """What peft holds for a module: A, B (and DoRA's magnitude) of the parts in its rows; {} without any."""
    own, (A, B), count = slice(module.first, module.end), layer.plain(), len(layer.parts)
    inside = [i for i, (first, end) in enumerate(layer.parts) if first < module.end and module.first < end]
    if not inside:
        return {}
    As, Bs = A.chunk(count), layer.wide(B)[own].chunk(count, dim=1)
    found = {"A": torch.cat([As[i] for i in inside]), "B": torch.cat([Bs[i] for i in inside], dim=1)}
    if isinstance(layer, DoRALinear):
        found["magnitude"] = layer.magnitudes()[own]
    return {name: value.detach().cpu() for name, value in found.items()}


def load_peft(model, folder, dropout=0.0) -> list[str]:
    """Adds the adapters of a peft folder, with their rank, alpha and layers. Returns the layers' names.

    One adapter of a fused c_attn becomes three: A copied, B sliced. UserError for anything but LoRA and DoRA,
    and where A and B began in a way that changed the base, but for PiSSA's.
    """
    config, tensors = _read_peft(Path(folder))
    dora, pissa = bool(config.get("use_dora")), _initial(config) == "pissa"
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    modules = {_bare(m.name): m for name in linear for m in their_modules(model, name)}
    _drop_copies(folder, model, modules, tensors)
    layers = {}  # of ours -> [(module, its tensors, multiplier)]
    for name in sorted({key.rpartition(".lora_")[0] for key in tensors}):
        if name not in modules:
            why = "a head needs --no-tie_head" if name == "lm_head" else "it belongs to another model"
            raise UserError(f"{folder} adapts {name}: the model lacks it ({why})")
        module = modules[name]
        own = {k: tensors.get(f"{name}{end}", torch.empty(0)) for k, end in LETTERS.items()}
        _check_shapes(folder, model, module, own, dora)
        alpha = _pattern_value(config.get("alpha_pattern"), module.name, config["lora_alpha"])
        rank = len(own["A"])
        multiplier = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        layers.setdefault(module.layer, []).append((module, own, multiplier))
    for name, found in layers.items():
        if len({(len(own["A"]), multiplier) for _, own, multiplier in found}) > 1:
            several = f"{folder} adapts the matrices of {name} by several ranks or alphas"
            raise UserError(f"{several}: merge it with peft first")
    model.requires_grad_(False)
    for name, found in layers.items():
        _add_layer(model, name, sorted(found, key=lambda each: each[0].first), dropout, dora, pissa)
    return list(layers)


def _drop_copies(folder, model, modules, tensors):
    """Takes out the base's own head, which peft writes beside adapters of it. UserError where the model has
    another one."""
    for key in [key for key in tensors if key.endswith(COPY)]:
        name, copy = key.removesuffix(COPY), tensors.pop(key)
        own = model.get_submodule(name).weight if name in modules else copy  # none: its A and B are refused
        if not torch.equal(own.to(copy), copy):
            raise UserError(f"{folder} brings another {name} than the model's: merge it with peft first")


def _check_shapes(folder, model, module, own, dora):
    """UserError where the tensors of an adapter do not fit the module or each other."""
    A, B, name, rows = own["A"], own["B"], _bare(module.name), module.end - module.first
    if not A.numel():
        raise UserError(f"{folder} adapts {name} by matrices of rank 0: train it anew, with a rank")
    fits = A.shape[1:] == (model.get_submodule(module.layer).in_features,) and B.shape == (rows, len(A))
    if not fits or (dora and own["magnitude"].shape != (rows,)):
        raise UserError(f"{folder} adapts a {name} of another shape: it belongs to another model")


@torch.no_grad()
def _add_layer(model, name, found, dropout, dora, pissa):
    """Puts the adapters of a layer's modules on it; found: (module, tensors, multiplier) of each."""
    base, multiplier = model.get_submodule(name), found[0][2]
    parts, every = [(m.first, m.end) for m, _, _ in found], matrix_rows(model.config, name)
    A, B = (torch.cat([own[letter] for _, own, _ in found]) for letter in "AB")
    starts = []  # of A and B, in each module
    if pissa:
        starts = [principal(base.weight[m.first : m.end], len(own["A"]), multiplier) for m, own, _ in found]
    A0, B0 = (torch.cat(values) for values in zip(*starts, strict=True)) if pissa else (None, None)
    if every and parts == [(0, base.out_features)]:  # fused, to peft one matrix
        parts, A, B = (every, A.repeat(len(every), 1), B) if pissa else _in_parts(A, B, every, not dora)
        A0 = A0.repeat(len(every), 1) if pissa else None
    layer = wrap_layer(model, name, len(A) // len(parts), multiplier, dropout, parts, dora)
    if pissa:
        layer.begin_at(A0, B0)
    layer.A.copy_(A)
    layer.B.copy_(B)
    if dora:
        layer.magnitude.copy_(torch.cat([own["magnitude"] for _, own, _ in found]))


NOT_PLAIN = (  # settings of peft that change what an adapter means
    "modules_to_save",
    "lora_bias",
    "target_parameters",
    "alora_invocation_tokens",
    "layer_replication",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # kinds of init_lora_weights, read: pissa


def _read_peft(folder) -> tuple[dict, dict]:
    """(adapter_config.json, tensors under our names)"""
    import safetensors.torch

    for name in FILES:
        if is_there(folder / name):
            require_regular(folder / name)  # a pipe would be waited for
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        hint = "a run's adapters are in its peft/ after run_lora.py --mode export"
        raise UserError(f"{folder} is no whole adapter of peft ({error}): {hint}") from None
    if not isinstance(config, dict) or not tensors:
        raise UserError(f"{folder} is no whole adapter of peft: it holds no settings or no tensors")
    dora, init = config.get("use_dora"), _initial(config)
    kinds = r"\.lora_([AB]\.weight|magnitude_vector)" if dora else r"\.lora_[AB]\.weight"
    odd = [key for key in NOT_PLAIN if config.get(key)]
    odd += [f"bias {kind}" for kind in [config.get("bias", "none")] if kind != "none"]
    odd += [f"init_lora_weights {init}"] if init.startswith(MOVES_BASE) and init != "pissa" else []
    own = [key for key in tensors if key != f"{PREFIX}lm_head{COPY}"]
    odd += [key for key in own if not re.fullmatch(rf"base_model\.model\..+{kinds}", key)]
    lengths = sum(key.endswith(LETTERS["magnitude"]) for key in own)
    odd += ["use_dora without its magnitudes"] if dora and 3 * lengths != len(own) else []
    if odd or config.get("peft_type") != "LORA":
        what = ", ".join(odd[:2]) or config.get("peft_type")
        raise UserError(f"{folder} holds more than plain LoRA ({what}): merge it with peft first")
    alphas = config.get("alpha_pattern") or {}
    values = [config.get("lora_alpha"), *(alphas.values() if isinstance(alphas, dict) else [None])]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise UserError(f"{folder} is no whole adapter of peft: its lora_alpha or alpha_pattern is no number")
    return config, {_bare(key.removeprefix(PREFIX)): tensor for key, tensor in tensors.items()}


def _initial(config) -> str:
    """How A and B began."""
    return str(config.get("init_lora_weights")).lower()


def _bare(name) -> str:
    """A module's name without that of the model below the head, which some folders lack."""
    return re.sub(r"^(transformer|model)\.", "", name)


def _in_parts(A, B, every, some) -> tuple[list, torch.Tensor, torch.Tensor]:
    """(parts, A, B) as LoRALinear keeps peft's A (r, in), B (out, r) of a fused layer: what save_peft wrote
    as it was, on all matrices or some; any other as one for each matrix, A copied, B sliced."""
    counts = range(len(every), 0, -1) if some else [len(every)]
    for parts in itertools.chain.from_iterable(itertools.combinations(every, n) for n in counts):
        rank, left = divmod(len(A), len(parts))
        blocks = [(slice(*rows), slice(i * rank, (i + 1) * rank)) for i, rows in enumerate(parts)]
        alone = B.clone()
        for block in blocks:
            alone[block] = 0
        if rank and not left and B.any() and not alone.any():
            return list(parts), A, torch.cat([B[block] for block in blocks])
    return every, A.repeat(len(every), 1), B


def _pattern_value(patterns, name, default):
    """peft's rule: the first pattern that fits the end of the module's name."""
    try:
        values = (v for p, v in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", name))
        return next(values, default)
    except re.error as error:
        raise UserError(f"the adapter's alpha_pattern is no regular expression ({error})") from None
