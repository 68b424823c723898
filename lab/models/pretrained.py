"""Any language model by name: a run, a folder, a Hub id, tiny:gpt2. Models that
gpt.py cannot build are wrapped, so that they can be measured and asked."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from lab.data.hub import local_or_hub
from lab.data.tokenizers import pretrained_tokenizer
from lab.errors import UserError
from lab.models.generate import left_padded
from lab.models.gpt import GPT, GPTConfig
from lab.models.gpt_formats import OtherKind, load_pretrained, untied, with_weights
from lab.models.int4 import is_quantised, load
from lab.run.checkpoints import broken, step_name, tested_or_newest_checkpoint
from lab.run.stored import is_run
from lab.train.cpu import linear
from lab.train.processes import main_first

TINY_SCALE = 5  # a vector of 64 numbers then starts as large as one of 768 does
TINY = {"block_size": 256, "n_layer": 2, "n_head": 4, "n_embd": 64}


def build_model(cfg, tokenizer, world) -> GPT:
    """The GPT to tune: a Hub id or folder of GPT-2, a run of gpt_scratch.py, or
    tiny:gpt2 with random weights."""
    if cfg.model.startswith("tiny:"):
        if cfg.model != "tiny:gpt2":
            raise UserError(f"--model {cfg.model}: the only tiny one here is tiny:gpt2")
        own = {name: getattr(cfg, name) for name in ("tie_head", "dropout", "checkpointing")}
        config = GPTConfig(len(tokenizer), **TINY, **own)
        model = GPT(config)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(TINY_SCALE) if weight.dim() == 2 else None
    else:
        dropout, checkpointing = cfg.dropout, cfg.checkpointing
        model, _ = main_first(world, open_model, cfg.model, dropout, checkpointing)
        if cfg.tie_head and not model.config.tie_head:
            raise UserError(f"{cfg.model} has an output matrix of its own: use --no-tie_head")
        model = model if cfg.tie_head else untied(model)
    if cfg.max_length > (most := model.config.block_size):
        raise UserError(f"--max_length {cfg.max_length} is over the {most} positions of {cfg.model}")
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(f"the tokenizer of {cfg.model} has {len(tokenizer)} tokens, the model "
                             f"{model.config.vocab_size}: they do not belong together")  # fmt: skip
    return model


def open_any(name):
    """Opens (model, tokenizer) of a transformers folder or Hub id, in fp32 on the CPU: as a GPT where it can.

    Takes folders of run_mathqa.py --mode quantise, too.
    """
    if is_quantised(name):
        return load(name)
    try:
        return open_model(name)
    except OtherKind:
        return load_other(name), pretrained_tokenizer(name, "a run folder")


def load_other(name):
    """Loads a causal model as OtherModel. UserError for one that is no causal model, lacks weights, or does
    more for its logits than multiply by a matrix."""

    def fetch():
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)

    model, info = local_or_hub("model", name, fetch, "a gpt2 or a llama")
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"model {name} lacks {len(missing)} weights, e.g. {missing[0]}")
    wrapped = OtherModel(model.eval())
    input_ids = torch.arange(8)[None] % model.config.vocab_size
    with torch.no_grad():
        [(hidden, weight)], bias = wrapped.head(wrapped.hidden(input_ids))
        ours, wanted = linear(hidden, weight, bias), model(input_ids=input_ids).logits
    if not torch.allclose(ours, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max())):
        raise UserError(f"model {name} ({model.config.model_type}) scales or caps its logits: not supported")
    return wrapped


class OtherModel(nn.Module):
    """A transformers model with `hidden` and `head` like a GPT, and `continuations`
    in place of `generate`."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.config = SimpleNamespace(block_size=getattr(model.config, "max_position_embeddings", 2048))

    def hidden(self, input_ids):
        """(B, T) -> (B, T, C); padding stands on the right, where no real token looks."""
        return self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    def head(self, hidden):
        out = self.model.get_output_embeddings()
        return [(hidden, out.weight)], out.bias

    @torch.no_grad()
    def continuations(self, prompts, max_new_tokens, *, stop, poll, **greedy) -> list[list[int]]:
        """Greedy continuations, cut before the first id in `stop`; ignores the model's
        own generation settings."""
        from transformers import GenerationConfig, StoppingCriteriaList

        def polled(input_ids, scores, **_):
            poll()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        pad = min(stop)
        self.model.generation_config = GenerationConfig(
            do_sample=False, pad_token_id=pad, eos_token_id=[*stop]
        )
        input_ids, padding = left_padded([ids[-self.config.block_size :] for ids in prompts])
        seen = torch.ones_like(input_ids)
        if padding is not None:
            seen = (torch.arange(input_ids.shape[1]) >= padding[:, None]).long()
        device = self.model.device
        rows = self.model.generate(
            input_ids.to(device),
            attention_mask=seen.to(device),
            max_new_tokens=max_new_tokens,
            stopping_criteria=StoppingCriteriaList([polled]),
        )[:, input_ids.shape[1] :].tolist()
        return [row[: next((i for i, token in enumerate(row) if token in stop), len(row))] for row in rows]


def refuse_no_model(name, step, flag):
    """UserError for a path that cannot be a model, or a run without a checkpoint of this step."""
    if Path(name).is_file():
        raise UserError(f"{flag} {name} is a file: use a run's folder")
    if name.count("/") > 1 and not Path(name).exists():
        raise UserError(f"{flag} {name} is not there; paths count from where the run was started")
    if (Path(name) / "checkpoints").is_dir() and not is_run(name):
        raise UserError(f"{flag} {name} holds no whole model: adapters are merged by --mode export")
    if step is not None and (not is_run(name) or broken(Path(name) / "checkpoints" / step_name(step))):
        there = sorted(path.name for path in Path(name).glob("checkpoints/step_*"))
        raise UserError(f"{flag} {name} has no whole {step_name(step)}; there: {', '.join(there) or 'none'}")


def open_model(name, dropout=0.0, checkpointing=False, step=None, flag="--model"):
    """Opens (model, tokenizer) of a run folder (in its fp32 or fp64), a GPT-2 or Llama folder, or a Hub id,
    on the CPU. step: of a checkpoint of the run; none: the one it was tested with. flag: that named it."""
    import safetensors.torch

    refuse_no_model(str(name), step, flag)
    if not is_run(name):
        return load_pretrained(name, dropout, checkpointing), pretrained_tokenizer(name, "a run folder")
    folder = Path(name)
    config = GPTConfig(**json.loads((folder / "gpt.json").read_text()))
    config = replace(config, dropout=dropout, checkpointing=checkpointing)
    checkpoint = tested_or_newest_checkpoint(folder) if step is None else step_name(step)
    weights = folder / "checkpoints" / checkpoint / "model.safetensors"
    model = with_weights(config, safetensors.torch.load_file(weights))
    return model, pretrained_tokenizer(str(folder / "tokenizer"), "")
