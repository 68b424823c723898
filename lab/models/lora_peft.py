"""LoRA adapters to and from the folders that peft reads and writes."""

import json
import math
import re
from pathlib import Path

import torch
from torch import nn

from lab.data.paths import require_regular
from lab.errors import UserError
from lab.models.gpt_formats import FORMATS, misfit
from lab.models.lora import adapted, fused_parts, wrap_layer
from lab.run.files import is_there, whole_folder, write_json

PREFIX = "base_model.model."
FILES = ("adapter_config.json", "adapter_model.safetensors")


def save_peft(model, folder, base):
    """Writes the adapters as a folder that peft loads onto `base` (a folder or Hub id of GPT-2).

    Three adapters of rank r on the fused c_attn are one of rank 3r there: A stacked, B on a diagonal.
    """
    import safetensors.torch

    if misfit(model.config, FORMATS["gpt2"]):
        raise UserError("peft's format is written for GPT-2's shape only: use the merged model instead")
    layers, tensors = adapted(model), {}
    for name, layer in layers.items():
        for letter, value in (("A", layer.A), ("B", layer.wide_B())):
            tensors[f"{PREFIX}{_theirs(name)}.lora_{letter}.weight"] = value.detach().cpu().contiguous()
    ranks = {name: len(layer.A) for name, layer in layers.items()}
    alphas = {name: layer.multiplier * len(layer.A) for name, layer in layers.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": min(ranks.values()),
        "lora_alpha": min(alphas.values()),
        "use_rslora": False,
        "bias": "none",
        "rank_pattern": _patterns(ranks),
        "alpha_pattern": _patterns(alphas),
        "target_modules": [_theirs(name) for name in layers],
        "fan_in_fan_out": True,
        "lora_dropout": next(iter(layers.values())).dropout.p,
        "inference_mode": True,
    }
    with whole_folder(Path(folder), replace=True) as aside:
        safetensors.torch.save_file(tensors, aside / "adapter_model.safetensors", {"format": "pt"})
        write_json(aside / "adapter_config.json", config)


def _theirs(name) -> str:
    return name if name == "lm_head" else f"transformer.{name}"


def _patterns(values) -> dict:
    return {re.escape(_theirs(name)): value for name, value in values.items()}


def load_peft(model, folder, dropout=0.0) -> list[str]:
    """Adds the adapters of a peft folder, with their rank, alpha and layers. Returns the layers' names.

    One adapter of a fused c_attn becomes three: A copied, B sliced. UserError for what is not plain LoRA.
    """
    config, tensors = _read_peft(Path(folder))
    layers, names = dict(model.named_modules()), sorted({key.rpartition(".lora_")[0] for key in tensors})
    for name in names:
        A, B = (tensors.get(f"{name}.lora_{letter}.weight", torch.empty(0)) for letter in "AB")
        if not isinstance(layers.get(name), nn.Linear):
            raise UserError(f"{folder} adapts {name}: the model lacks it (a head needs --no-tie_head)")
        if not A.numel():
            raise UserError(f"{folder} adapts {name} by matrices of rank 0: train it anew, with a rank")
        if A.shape[1:] != (layers[name].in_features,) or B.shape != (layers[name].out_features, len(A)):
            raise UserError(f"{folder} adapts a {name} of another shape: it belongs to another model")
    model.requires_grad_(False)
    for name in names:
        A, B = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        alpha = _pattern_value(config.get("alpha_pattern"), name, config["lora_alpha"])
        multiplier = alpha / (math.sqrt(len(A)) if config.get("use_rslora") else len(A))
        parts = fused_parts(name)
        A, B = _in_parts(A, B, parts)
        layer = wrap_layer(model, name, len(A) // parts, multiplier, dropout)
        with torch.no_grad():
            layer.A.copy_(A)
            layer.B.copy_(B)
    return names


NOT_PLAIN = (  # settings of peft that change what an adapter means
    "use_dora",
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
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # kinds of init_lora_weights


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
    odd = [key for key in NOT_PLAIN if config.get(key)]
    odd += [f"bias {kind}" for kind in [config.get("bias", "none")] if kind != "none"]
    init = str(config.get("init_lora_weights")).lower()
    odd += [f"init_lora_weights {init}"] if init.startswith(MOVES_BASE) else []
    odd += [key for key in tensors if not re.fullmatch(r"base_model\.model\..+\.lora_[AB]\.weight", key)]
    if odd or config.get("peft_type") != "LORA":
        what = ", ".join(odd[:2]) or config.get("peft_type")
        raise UserError(f"{folder} holds more than plain LoRA ({what}): merge it with peft first")
    alphas = config.get("alpha_pattern") or {}
    values = [config.get("lora_alpha"), *(alphas.values() if isinstance(alphas, dict) else [None])]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise UserError(f"{folder} is no whole adapter of peft: its lora_alpha or alpha_pattern is no number")
    prefix = re.compile(rf"^{re.escape(PREFIX)}(transformer\.)?")
    return config, {prefix.sub("", key): tensor for key, tensor in tensors.items()}


def _in_parts(A, B, parts) -> tuple[torch.Tensor, torch.Tensor]:
    """peft's A (r, in), B (out, r) of a layer as LoRALinear keeps them; what save_peft wrote as it was."""
    blocks = [b.chunk(parts, dim=1) for b in B.chunk(parts)]
    diagonal = [row[i] for i, row in enumerate(blocks) if len(row) == parts]
    if (
        B.any()
        and len(A) % parts == 0
        and len(diagonal) == parts
        and torch.equal(B, torch.block_diag(*diagonal))
    ):
        return A, torch.cat(diagonal)
    return A.repeat(parts, 1), B


def _pattern_value(patterns, name, default):
    """peft's rule: the first pattern that fits the end of the module's name."""
    try:
        values = (v for p, v in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", _theirs(name)))
        return next(values, default)
    except re.error as error:
        raise UserError(f"the adapter's alpha_pattern is no regular expression ({error})") from None
