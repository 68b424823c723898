"""What is asked of any model folder before its weights count: no code, no absurd size, every weight read."""

import math
import re
from pathlib import Path

import torch

from lab.data.hub import first_line, local_or_hub
from lab.errors import UserError
from lab.run.files import is_there
from lab.train.cpu import require_memory

MOST = {  # in any model; beyond these a config.json is damaged, and would cost memory or hours
    "num_hidden_layers": 1000,
    "num_attention_heads": 10_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 10_000_000,
    "vocab_size": 100_000_000,
    "max_position_embeddings": 100_000_000,
}
OLD_BUFFERS = re.compile(r"masked_bias$|(attn|attention)\.bias$|inv_freq$|position_ids$")


def config_of(name):
    """transformers' config of a folder or Hub id. Executes no code of it. UserError for absurd sizes, and for
    an adapter."""
    from transformers import AutoConfig

    if is_there(Path(name) / "adapter_config.json"):
        raise UserError(f"{name} holds an adapter: {adapter_hint(name)}")
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if "/" in str(getattr(config, "_attn_implementation", "")):  # of the Hub: code, too
        raise UserError(f"model {name} wants the attention of {config._attn_implementation}: take that out")
    for size, most in MOST.items():
        value = getattr(config, size, None)
        if isinstance(value, int) and not 1 <= value <= most:
            raise UserError(f"model {name} has {size} {value} in its config.json: use one from 1 to {most}")
    for key, value in config.to_dict().items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"model {name} has {key} {value} in its config.json: use a finite number")
    sizes = [getattr(config, size, None) for size in ("hidden_size", "num_hidden_layers", "vocab_size")]
    if all(isinstance(size, int) for size in sizes):
        width, layers, words = sizes
        least = width * words + 2 * layers * width**2  # queries and outputs of attention
        require_memory(least, f"model {name} by its config.json")
    return config


def adapter_hint(name) -> str:
    """How an adapter is used."""
    tuned = f"python run_lora.py --model BASE --adapter {name}"
    return f"merge it into its base by peft and name the result, or tune on: {tuned}"


def require_whole(name, model, unread):
    """UserError where the weights of a model are not those of its config: `unread` are the names of weights
    that nobody reads; a head beside a tied embedding; an adapter that was put on top."""
    kind = model.config.model_type
    if unread := sorted(key for key in unread if not OLD_BUFFERS.search(key)):
        least = f"{len(unread)} weights that a {kind} of its config.json does not read, e.g. {unread[0]}"
        raise UserError(f"model {name} has {least}: weights and config belong to two models")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"{name} holds an adapter: {adapter_hint(name)}")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not getattr(model.config, "tie_word_embeddings", False):
        return
    if head.weight is not embedding.weight and not torch.equal(head.weight, embedding.weight):
        untied = "set tie_word_embeddings to false in its config.json"
        raise UserError(
            f"model {name} has a head of its own, which its config ties to the embedding: {untied}"
        )


def load_causal(name, instead, check=None):
    """transformers' causal model of a folder or Hub id, in fp32 and evaluation mode. Executes no code of it.

    check(name, config) may refuse it before its weights are read. UserError for weights that are missing,
    that nobody reads, or that are not the config's.
    """

    def load():
        from transformers import AutoModelForCausalLM

        config = config_of(name)
        if check:
            check(name, config)
        return AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )

    model, info = local_or_hub("model", name, load, instead)
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"model {name} lacks {len(missing)} weights, e.g. {missing[0]}")
    require_whole(name, model, info["unexpected_keys"])
    return model.eval()


@torch.no_grad()
def their_logits(name, model, input_ids) -> torch.Tensor:
    """What transformers' model says of these ids. UserError where it cannot: settings may be read, and not
    fit each other."""
    try:
        return model(input_ids=input_ids).logits
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        why = f"transformers cannot compute it ({first_line(error)})"
        raise UserError(f"model {name} is damaged, {why}: look at its config.json") from error


def probe(vocab_size, positions) -> torch.Tensor:
    """(2, T) ids, T = 16 or fewer, whose first halves are equal."""
    ids = (torch.arange(2 * min(16, positions)) * 7 % vocab_size).view(2, -1)
    ids[1, : ids.shape[1] // 2] = ids[0, : ids.shape[1] // 2]
    return ids


def same(ours, wanted) -> bool:
    """Whether logits or vectors agree but for rounding. UserError where they are no numbers."""
    if not wanted.isfinite().all():
        raise UserError("what the model says is no finite number: its weights or its config.json are damaged")
    return torch.allclose(ours, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
