"""Any language model by name: a run, a folder, a Hub id, tiny:gpt2 or tiny:llama. Models that
gpt.py cannot build are wrapped, so that they can be measured and asked."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from lab.data.hub import first_line
from lab.data.tokenizers import id_count, own_tokenizer, pretrained_tokenizer, require_ids
from lab.errors import UserError
from lab.models.encoders import position_limit
from lab.models.generate import in_context, left_padded
from lab.models.gpt import GPT, GPTConfig
from lab.models.gpt_formats import OtherKind, load_pretrained, untied, with_weights
from lab.models.int4 import is_quantised, load
from lab.models.trusted import load_causal, probe, same, their_logits
from lab.run.checkpoints import broken, step_name, tested_or_newest_checkpoint
from lab.run.files import is_file, is_folder, is_there, read_sealed
from lab.run.stored import is_run
from lab.train.cpu import linear
from lab.train.processes import main_first

TINY_SCALE = 5  # a vector of 64 numbers then starts as large as one of 768 does
TINY = {"block_size": 256, "n_layer": 2, "n_head": 4, "n_embd": 64}
TINY_KINDS = {  # what each has beside these sizes
    "tiny:gpt2": {},
    "tiny:llama": {
        "positions": "rotary",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "qkv_bias": False,
        "n_kv_head": 2,
    },
}


def build_model(cfg, tokenizer, world) -> GPT:
    """The GPT to tune: a Hub id or folder of GPT-2 or of the Llama family, a run of gpt_scratch.py, or
    tiny:gpt2 or tiny:llama with random weights."""
    if cfg.model.startswith("tiny:"):
        model = tiny_gpt(cfg.model, tokenizer, cfg.dropout, cfg.checkpointing, cfg.tie_head)
    else:
        dropout, checkpointing = cfg.dropout, cfg.checkpointing
        model, _ = main_first(world, open_model, cfg.model, dropout, checkpointing)
        if cfg.tie_head and not model.config.tie_head:
            raise UserError(f"{cfg.model} has an output matrix of its own: use --no-tie_head")
        model = model if cfg.tie_head else untied(model)
    if cfg.max_length > (most := model.config.block_size):
        raise UserError(f"--max_length {cfg.max_length} is over the {most} positions of {cfg.model}")
    require_ids(tokenizer, model.config.vocab_size, cfg.model)
    return model


def tiny_gpt(name, tokenizer, dropout=0.0, checkpointing=False, tie_head=True) -> GPT:
    """A small GPT of TINY_KINDS with random weights."""
    if name not in TINY_KINDS:
        raise UserError(f"--model {name}: the tiny ones here are {' and '.join(TINY_KINDS)}")
    own = {"dropout": dropout, "checkpointing": checkpointing, "tie_head": tie_head}
    model = GPT(GPTConfig(id_count(tokenizer), **TINY, **TINY_KINDS[name], **own))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(TINY_SCALE) if weight.dim() == 2 else None
    return model


def open_any(name, tokenizer=None):
    """Opens (model, tokenizer) of a transformers folder or Hub id, in fp32 on the CPU: as a GPT where it can.

    Takes folders of run_mathqa.py --mode quantise, too. `tokenizer`: a folder or Hub id, of a model without.
    """
    if is_quantised(name):
        model, own = load(name)
    else:
        try:
            model = load_pretrained(name)
        except OtherKind:
            model = load_other(name)
        own = None if tokenizer else pretrained_tokenizer(name, "a run folder")
    own = pretrained_tokenizer(tokenizer, "a folder") if tokenizer else own
    require_ids(own, model.config.vocab_size, name)
    return model, own


def load_other(name):
    """Loads a causal model as OtherModel. UserError for one that is not causal, or does more for its logits
    than multiply by a matrix."""
    model = load_causal(name, "a gpt2 or one of the Llama family")
    wrapped = OtherModel(model)
    kind = f"model {name} ({model.config.model_type})"
    if wrapped.config.block_size < 2:
        raise UserError(f"{kind} has {wrapped.config.block_size} position by its config.json: it needs 2")
    input_ids = probe(wrapped.config.vocab_size, wrapped.config.block_size)
    half = input_ids.shape[1] // 2
    wanted = their_logits(name, model, input_ids)
    with torch.no_grad():
        if not same(*wanted[:, :half]):
            raise UserError(f"{kind} is not causal: later tokens change what it says of earlier ones")
        hidden = wrapped.hidden(input_ids)
        [(_, weight)], bias = wrapped.head(hidden)
        fits = hidden.shape[-1] == weight.shape[1] and same(linear(hidden, weight, bias), wanted)
    if not fits:
        raise UserError(f"{kind} scales or caps its logits: not supported")
    return wrapped


class OtherModel(nn.Module):
    """A transformers model with `hidden` and `head` like a GPT, and `continuations`
    in place of `generate`."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        rows = model.get_input_embeddings().num_embeddings
        self.config = SimpleNamespace(block_size=position_limit(model), vocab_size=rows)

    def hidden(self, input_ids):
        """(B, T) -> (B, T, C); padding stands on the right, where no real token looks."""
        return self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    def head(self, hidden):
        out = self.model.get_output_embeddings()
        return [(hidden, out.weight)], out.bias

    @torch.no_grad()
    def continuations(
        self, prompts, max_new_tokens, *, stop, poll, begin=(), vocab_size=None, **greedy
    ) -> list[list[int]]:
        """Greedy continuations, cut before the first id in `stop`; ignores the model's
        own generation settings. A full context slides as in `generate`: its later half is read again.
        Ids from `vocab_size` on (a padded vocabulary) are never chosen."""
        padded = [*range(vocab_size or self.config.vocab_size, self.config.vocab_size)]
        size, rows, first, ended = self.config.block_size, [*map(list, prompts)], [0] * len(prompts), {}
        wanted = [len(prompt) + max_new_tokens for prompt in prompts]
        while going := [i for i in range(len(rows)) if i not in ended and len(rows[i]) < wanted[i]]:
            for i in going:
                if len(rows[i]) - first[i] > size:
                    first[i] = len(rows[i]) - (size + 1) // 2
            room = min(min(size + 1 - len(rows[i]) + first[i], wanted[i] - len(rows[i])) for i in going)
            seen = [in_context(rows[i], first[i], begin) for i in going]
            new = self._greedy(seen, room, stop, padded, poll)
            for i, ids in zip(going, new, strict=True):
                end = next((n for n, token in enumerate(ids) if token in stop), None)
                rows[i] += ids[:end]
                ended |= {} if end is None else {i: True}
        return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]

    def _greedy(self, rows, n, stop, padded, poll) -> list[list[int]]:
        """The likeliest n next ids of each row, none of them `padded`, or fewer where each has ended."""
        from transformers import GenerationConfig, StoppingCriteriaList

        def polled(input_ids, scores, **_):
            poll()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        self.model.generation_config = GenerationConfig(
            do_sample=False,
            pad_token_id=min(stop),
            eos_token_id=[*stop],
            suppress_tokens=padded or None,
        )
        input_ids, padding = left_padded(rows)
        seen = torch.ones_like(input_ids)
        if padding is not None:
            seen = (torch.arange(input_ids.shape[1]) >= padding[:, None]).long()
        return self.model.generate(
            input_ids.to(self.model.device),
            attention_mask=seen.to(self.model.device),
            max_new_tokens=n,
            stopping_criteria=StoppingCriteriaList([polled]),
        )[:, input_ids.shape[1] :].tolist()


def refuse_no_model(name, step, flag):
    """UserError for a path that cannot be a model, or a run without a checkpoint of this step."""
    if is_file(name):
        raise UserError(f"{flag} {name} is a file: use a run's folder")
    if name.count("/") > 1 and not is_there(name):
        raise UserError(f"{flag} {name} is not there; paths count from where the run was started")
    if is_folder(Path(name) / "checkpoints") and not is_run(name):
        raise UserError(f"{flag} {name} holds no whole model: adapters are merged by --mode export")
    if step is not None and (not is_run(name) or broken(Path(name) / "checkpoints" / step_name(step))):
        there = sorted(path.name for path in Path(name).glob("checkpoints/step_*"))
        raise UserError(f"{flag} {name} has no whole {step_name(step)}; there: {', '.join(there) or 'none'}")


def open_model(name, dropout=0.0, checkpointing=False, step=None, flag="--model"):
    """Opens (model, tokenizer) of a run (in its fp32 or fp64), or a folder or Hub id of GPT-2 or the Llama
    family, on the CPU. step: of a checkpoint of the run; none: the one it was tested with. flag: that named
    it."""
    refuse_no_model(str(name), step, flag)
    if not is_run(name):
        model, tokenizer = (
            load_pretrained(name, dropout, checkpointing),
            pretrained_tokenizer(name, "a run folder"),
        )
    else:
        model, tokenizer = run_model(Path(name), step, dropout, checkpointing), own_tokenizer(name)
    require_ids(tokenizer, model.config.vocab_size, name)
    return model, tokenizer


def run_model(folder, step, dropout, checkpointing) -> GPT:
    """The GPT of a run folder, of `step` or as tested. UserError where its files do not fit each other."""
    import safetensors.torch

    checkpoint = tested_or_newest_checkpoint(folder) if step is None else step_name(step)
    weights = folder / "checkpoints" / checkpoint / "model.safetensors"
    try:
        config = GPTConfig(**read_sealed(folder / "gpt.json"))
        config = replace(config, dropout=dropout, checkpointing=checkpointing)
        return with_weights(config, safetensors.torch.load_file(weights))
    except (UserError, OSError, ValueError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder} is no whole run ({first_line(error)}): copy it anew") from None
