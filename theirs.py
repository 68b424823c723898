"""Language models of transformers that gpt_scratch.py has no architecture for, seen as it sees its own:
enough to be measured and to answer. Used by eval.py.
"""

from types import SimpleNamespace

import torch
from torch import nn

import core
import gpt_scratch
import quantise


def open_plain(name):
    """(model, tokenizer) of a transformers folder or Hub id, fp32, on the CPU: ours where there is one.

    A folder that run_mathqa.py --mode quantise wrote is one, too.
    """
    if quantise.is_quantised(name):
        return quantise.load(name)
    try:
        return gpt_scratch.open_model(name)
    except gpt_scratch.OtherKind:
        return load(name), core.pretrained_tokenizer(name, "a run folder")


def load(name):
    """UserError for what is no causal model, lacks weights, or does more to its logits than a matrix."""

    def fetch():
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)

    model, info = core.local_or_hub("model", name, fetch, "a gpt2 or a llama")
    if missing := sorted(info["missing_keys"]):
        raise core.UserError(f"model {name} lacks {len(missing)} weights, e.g. {missing[0]}")
    wrapped = Theirs(model.eval())
    input_ids = torch.arange(8)[None] % model.config.vocab_size
    with torch.no_grad():
        [(hidden, weight)], bias = wrapped.head(wrapped.hidden(input_ids))
        ours, wanted = core.linear(hidden, weight, bias), model(input_ids=input_ids).logits
    if not torch.allclose(ours, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max())):
        raise core.UserError(
            f"model {name} ({model.config.model_type}) scales or caps its logits: not supported"
        )
    return wrapped


class Theirs(nn.Module):
    """hidden and head as gpt_scratch.GPT has them; continuations in the place of gpt_scratch.generate."""

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
        """Greedy ones, without the first id in `stop`; none of the settings that a model brings along."""
        from transformers import GenerationConfig, StoppingCriteriaList

        def polled(input_ids, scores, **_):
            poll()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        pad = min(stop)
        self.model.generation_config = GenerationConfig(
            do_sample=False, pad_token_id=pad, eos_token_id=[*stop]
        )
        input_ids, padding = gpt_scratch.left_padded([ids[-self.config.block_size :] for ids in prompts])
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
