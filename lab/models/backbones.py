"""What a head reads vectors from: an encoder of the BERT family, or a decoder, the GPT of gpt.py without its
output matrix. Loaded by name, in full or frozen under adapters; what a checkpoint holds of it."""

import dataclasses
import functools
from pathlib import Path

from torch import nn
from torch.utils.checkpoint import checkpoint

from lab.data.hub import local_or_hub
from lab.data.tokenizers import encoder_tokenizer
from lab.errors import UserError
from lab.models import encoders
from lab.models.gpt import GPT, GPTConfig
from lab.models.gpt_formats import READ, with_weights
from lab.models.lora import Adapters, LoRALinear, adapted, add_lora, narrow_base
from lab.models.pretrained import TINY_KINDS, open_model, tiny_gpt
from lab.models.trusted import config_of
from lab.run.checkpoints import state_sha256
from lab.run.files import is_there, read_sealed, write_sealed
from lab.run.stored import is_run, read_config
from lab.train.batches import reseed
from lab.train.processes import main_first

OF_LORA = {"lora_rank", "lora_alpha", "lora_dropout", "base_dtype"}  # constants that only adapters read


def is_decoder(name) -> bool:
    """Whether a name is a language model that a GPT can be: by its config, which is all that is read."""
    if name.startswith("tiny:") or is_run(name):
        return name in TINY_KINDS or is_run(name)
    return local_or_hub("model", name, lambda: config_of(name), "tiny:bert (built in)").model_type in READ


def open_backbone(name, tokenizer, dropout=None, checkpointing=False) -> nn.Module:
    """Opens an encoder or a decoder in fp32: Hub id, folder, tiny:<family>, or a run of gpt_scratch.py.

    `dropout` of hidden states and attention; none: as pretrained (a decoder has none then). checkpointing:
    the backward recomputes each block.
    """
    if is_decoder(name):
        return open_decoder(name, tokenizer, dropout or 0.0, checkpointing)
    encoder = encoders.load_encoder(name, tokenizer, dropout)
    for block in encoders.embeddings_and_blocks(encoder)[1] if checkpointing else ():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return encoder


def open_decoder(name, tokenizer, dropout, checkpointing) -> GPT:
    """A GPT without an output matrix of its own, which would get no gradient: DDP would wait for one."""
    if name in TINY_KINDS:
        return tiny_gpt(name, tokenizer, dropout, checkpointing)
    model, _ = open_model(name, dropout, checkpointing)
    weights = {key: value for key, value in model.state_dict().items() if not key.startswith("lm_head.")}
    return with_weights(dataclasses.replace(model.config, tie_head=True, head_bias=False), weights).float()


def write_backbone(folder, backbone, tokenizer):
    """Writes the shape of a backbone and the tokenizer: with them a run that stores all its weights is built
    again without the Hub."""
    if isinstance(backbone, GPT):
        Path(folder).mkdir(exist_ok=True)
        write_sealed(Path(folder) / "gpt.json", dataclasses.asdict(backbone.config))
    else:
        backbone.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def stored_backbone(folder) -> nn.Module:
    """The architecture that `write_backbone` wrote, with random weights. UserError for none."""
    if is_there(Path(folder) / "gpt.json"):
        return GPT(GPTConfig(**read_sealed(Path(folder) / "gpt.json")))
    return encoders.stored_encoder(folder)


def stores_all(cfg) -> bool:
    """Whether checkpoints hold all weights; else those that are trained, and the rest is cfg.model's."""
    return cfg.freeze == "none" and cfg.method == "full"


def load_backbone(cfg, tokenizer, world, fold=0, run=None) -> nn.Module:
    """The pretrained backbone of cfg.model, the same on every rank. Random weights (tiny:*) are drawn by the
    seed: for every fold anew where all of them are trained, else the same ones, which no checkpoint holds.
    `run` notes their hash, by which a resume and eval.py know them."""
    reseed(cfg.seed, "init", fold if stores_all(cfg) else 0)
    given = cfg.model, tokenizer, cfg.encoder_dropout, cfg.checkpointing
    backbone = main_first(world, open_backbone, *given)
    if fold and not stores_all(cfg):
        reseed(cfg.seed, "init", fold)  # of adapters and head
    if cfg.max_length > (most := encoders.position_limit(backbone)):
        raise UserError(f"--max_length {cfg.max_length} is more than the {most} positions of {cfg.model}")
    if run and not stores_all(cfg):
        run.pin("base_sha256", state_sha256(backbone.state_dict()))
    return backbone


def backbone_of_run(folder, cfg, world) -> tuple[nn.Module, object]:
    """(backbone, tokenizer) of a run. Where its checkpoints lack what was frozen, that is read anew from
    cfg.model: UserError if it is another one now."""
    kept, pinned = Path(folder) / "encoder", read_config(folder)["facts"].get("base_sha256")
    tokenizer = encoder_tokenizer(str(kept))
    if pinned is None:  # checkpoints are whole
        return stored_backbone(kept), tokenizer
    try:
        backbone = load_backbone(cfg, tokenizer, world)
    except UserError as error:
        raise UserError(f"{folder} needs the model that it was trained on: {error}") from None
    if state_sha256(backbone.state_dict()) != pinned:
        raise UserError(f"model {cfg.model} is not the one that {folder} was trained on")
    return backbone, tokenizer


def add_adapters(backbone, rank, alpha, dropout) -> list[str]:
    """Freezes a backbone and puts LoRA on all linear layers of its blocks, in place; returns their names."""
    if isinstance(backbone, GPT):
        return add_lora(backbone, rank, alpha, "alpha/r", dropout)
    backbone.requires_grad_(False)  # first: the adapters are to train
    blocks = set(encoders.embeddings_and_blocks(backbone)[1].modules())
    layers = {n: m for n, m in backbone.named_modules() if m in blocks and isinstance(m, nn.Linear)}
    for name, layer in layers.items():
        adapter = LoRALinear(layer, rank, alpha / rank, dropout)
        adapter.initialise("fan_in")
        backbone.set_submodule(name, adapter)
    return [*layers]


def adapter_line(cfg, model) -> str | None:
    """On how many layers adapters are, and how large a step of B A is. None without adapters."""
    if cfg.method != "lora":
        return None
    multiplier = cfg.lora_alpha / cfg.lora_rank
    layers = f"adapters of rank {cfg.lora_rank} on {len(adapted(model))} layers"
    return f"{layers}  multiplier {multiplier:g}  multiplier x lr {multiplier * cfg.lr:.2g}"


def prepare(cfg, backbone) -> list[nn.Module]:
    """Puts adapters on a backbone, or freezes what cfg.freeze says; returns modules that stay in eval mode.
    UserError for a dtype that it cannot compute in."""
    kind = getattr(backbone.config, "model_type", "gpt")
    if cfg.dtype in ("bf16", "fp16") and kind == "deberta":  # its mask overflows
        raise UserError(f"{cfg.model} cannot compute in {cfg.dtype} (deberta-v3 can): use --dtype tf32")
    if cfg.method == "full":
        return encoders.freeze(backbone, cfg.freeze)
    if kind != "gpt" and "base_dtype" in cfg.typed.flags and cfg.base_dtype == "bf16":
        raise UserError(f"--base_dtype bf16 is for decoders: {cfg.model} keeps fp32")
    add_adapters(backbone, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout)
    return []


def on_device(cfg, model, precision):
    """Moves a scorer to the device in the dtype of training; a decoder's matrices under adapters in
    cfg.base_dtype. (transformers' layers multiply what they are given: they cannot.)"""
    model = precision.cast(model)
    if isinstance(model.encoder, GPT) and cfg.method == "lora":
        narrow_base(model.encoder, cfg.base_dtype)
    return model.to(precision.world.device)


def compiled_parts(backbone) -> list[nn.Module]:
    """What torch.compile takes: an encoder as it is called, a decoder block by block."""
    return [*backbone.h] if isinstance(backbone, GPT) else [backbone]


class Trained(Adapters):
    """The trained tensors of a model with frozen parts, as one module: what a checkpoint saves and loads.
    Whole states load, too: runs once stored what was frozen with each checkpoint."""

    def named_parameters(self):
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def load_state_dict(self, state, strict=True):
        if state.keys() == self.model.state_dict().keys():
            return self.model.load_state_dict(state)
        return super().load_state_dict(state)


def saved_part(model):
    """What checkpoints hold of a model: all of it, or what is trained where a part is frozen."""
    return model if all(p.requires_grad for p in model.parameters()) else Trained(model)
