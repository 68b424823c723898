"""BERT-family encoders and the scorer of pairs on top: loading, freezing, pooling, head, rates by depth.

Every family of transformers that ends in one vector per token fits; tiny:<family> is a small one with
random weights and a word tokenizer, for a machine without a network."""

import math

import torch
from torch import nn

from lab.data.columns import SWAP
from lab.data.hub import local_or_hub
from lab.data.tokenizers import id_count, require_ids
from lab.errors import UserError
from lab.models.trusted import config_of, require_whole
from lab.run.files import is_folder
from lab.train.batches import OVERHEAD, length_groups
from lab.train.device import to_device

TINY = {  # 0.1: a vector of 64 numbers then starts as large as one of 768 does with the usual 0.02
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "initializer_range": 0.1,
}
TINY_FAMILIES = {  # what each family needs beside TINY
    "distilbert": {"hidden_dim": 128},
    "bert": {},
    "roberta": {"max_position_embeddings": 514, "type_vocab_size": 1},
    "electra": {"embedding_size": 64},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
    "albert": {"embedding_size": 64},
}
DROPOUTS = (  # what families call those of hidden states and attention
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
    "embedding_dropout",
    "mlp_dropout",
)


def tiny(name) -> str:
    """Name of the tiny model of the same family: `microsoft/deberta-base` -> `tiny:deberta`."""
    longest_first = sorted(TINY_FAMILIES, key=len, reverse=True)  # distilbert before bert
    return f"tiny:{next((family for family in longest_first if family in name.lower()), 'bert')}"


def load_encoder(name, tokenizer, dropout=None) -> nn.Module:
    """Loads an AutoModel in fp32 without pooler: Hub id, folder, or tiny:<family> (random weights).

    `dropout` replaces the pretrained dropout of hidden states and attention. UserError where a checkpoint
    lacks weights, which transformers would fill at random.
    """
    from transformers import AutoConfig, AutoModel

    if name.startswith("tiny:"):
        if (family := name.removeprefix("tiny:")) not in TINY_FAMILIES:
            raise UserError(f"--model {name}: use tiny: with one of {', '.join(TINY_FAMILIES)}")
        ids = {"vocab_size": id_count(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        config = AutoConfig.for_model(family, **TINY, **TINY_FAMILIES[family], **ids)
        return encoder_from_config(_with_dropout(config, dropout))

    def load():
        config = _with_dropout(config_of(name), dropout)
        return AutoModel.from_pretrained(name, config=config, dtype=torch.float32, trust_remote_code=False,
                                         output_loading_info=True)  # fmt: skip

    model, info = local_or_hub("model", name, load, "tiny:bert (built in)")
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith("pooler.")):
        raise UserError(f"model {name} lacks {len(missing)} weights, e.g. {missing[0]}: is it an encoder?")
    require_whole(name, model, _inside(model, info["unexpected_keys"]))
    _require_fit(name, model, tokenizer)
    return _without_pooler(model)


def _inside(model, keys) -> list[str]:
    """Of weights that nobody reads, those of the encoder itself; a head of another task is none of its."""
    keys = [key.removeprefix(f"{model.base_model_prefix}.") for key in keys]
    parts = {name for name, _ in model.named_children()} - {"pooler"}
    # of mdeberta, the generator's embedding, which its word_embeddings already hold
    return [key for key in keys if key.split(".")[0] in parts and not key.endswith("word_embeddings._weight")]


def _require_fit(name, model, tokenizer):
    """UserError for a tokenizer whose ids the model lacks, or whose padding it would count as text."""
    require_ids(tokenizer, model.get_input_embeddings().num_embeddings, name)
    own = {table.padding_idx for table in _position_tables(model)} - {None}
    if own - {tokenizer.pad_token_id}:
        pads = f"pads with {tokenizer.pad_token_id}, positions of the model count from id {min(own)}"
        raise UserError(f"the tokenizer of {name} {pads}: they do not belong together")


def encoder_from_config(config) -> nn.Module:
    """The architecture with random weights, for tiny:* and for weights that a run saved."""
    from transformers import AutoModel

    return _without_pooler(AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False))


def stored_encoder(folder) -> nn.Module:
    """The architecture that a run keeps in its folder encoder/, with random weights. UserError for none."""
    if not is_folder(folder):
        raise UserError(f"{folder} is missing: the run stopped before its first step")

    def build():
        return encoder_from_config(config_of(str(folder)))

    return local_or_hub("encoder", str(folder), build, "")


def _with_dropout(config, dropout):
    fields = [field for field in DROPOUTS if hasattr(config, field)]
    if dropout is not None and not fields:
        raise UserError(f"--encoder_dropout: a {config.model_type} has none that is known here: use none")
    for field in fields if dropout is not None else ():
        setattr(config, field, dropout)
    return config


def _without_pooler(model):
    """Only the last hidden state is used: a pooler's weights would get no gradient, and DDP would wait."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model.train()


def position_limit(encoder) -> int:
    """Longest sequence that the position table holds (RoBERTa's starts after the padding index), or 2048."""
    skipped = [table.padding_idx + 1 for table in _position_tables(encoder) if table.padding_idx is not None]
    return getattr(encoder.config, "max_position_embeddings", 2048) - max(skipped, default=0)


def _position_tables(encoder) -> list[nn.Embedding]:
    named = (module for name, module in encoder.named_modules() if name.endswith("position_embeddings"))
    return [module for module in named if isinstance(module, nn.Embedding)]


def embeddings_and_blocks(encoder) -> tuple[list[nn.Module], nn.ModuleList]:
    """(embedding modules, including DeBERTa's relative positions; the blocks). ALBERT repeats one block."""
    blocks = next(module for module in encoder.modules() if isinstance(module, nn.ModuleList))
    inside = set(blocks.modules())
    embeddings = [m for name, m in encoder.named_modules() if "embed" in name and m not in inside]
    return embeddings, blocks


def freeze(encoder, which) -> list[nn.Module]:
    """Freezes all, bottom (embeddings and the lower half of the blocks), blocks, or none.

    Returns the frozen modules: they must stay in eval mode, since dropout would be noise that
    nothing learns to live with.
    """
    embeddings, blocks = embeddings_and_blocks(encoder)
    if which == "bottom" and len(blocks) < 2:
        raise UserError(
            "--freeze bottom: this encoder repeats one block, it has no lower half: use all or none"
        )
    lower_half = [*embeddings, *blocks[: len(blocks) // 2]]
    frozen = {"none": [], "all": [encoder], "bottom": lower_half, "blocks": [*blocks]}[which]
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def lr_scales(scorer, layer_decay, head) -> dict[str, float]:
    """Parameter name -> factor of the lr: layer_decay ** (number of blocks above it); `head` for the head.

    The top block learns at the full rate, embeddings at layer_decay ** number of blocks (Sun et al. 2019).
    """
    embeddings, blocks = embeddings_and_blocks(scorer.encoder)
    above = {p: len(blocks) for module in embeddings for p in module.parameters()}
    above |= {p: len(blocks) - 1 - i for i, block in enumerate(blocks) for p in block.parameters()}
    scales = {name: layer_decay ** above.get(p, 0) for name, p in scorer.named_parameters()}
    return {name: head if name.startswith("head.") else scale for name, scale in scales.items()}


class PairScorer(nn.Module):
    """Two token sequences of a row, encoded and pooled -> logits (orders, B, 3) of A, B, tie.

    Sequence 1 shows side A and sequence 2 side B, and the head reads both vectors; `joint`: sequence 1 shows
    A before B, sequence 2 B before A, and the head reads one vector. Either way swapping a row's sequences
    swaps A and B. Order 0 is the row as it stands, order 1 with A and B swapped, classes put back.
    Heads: mlp and linear read the vectors side by side; compare is an mlp that also gets |a - b| and a * b.
    """

    def __init__(self, encoder, *, joint, pooling, head, dropout, frozen=()):
        super().__init__()
        h = encoder.config.hidden_size
        width = h if joint else 4 * h if head == "compare" else 2 * h
        self.compares = head == "compare"
        self.encoder, self.joint, self.pooling, self.frozen = encoder, joint, pooling, list(frozen)
        self.register_buffer("swap", torch.tensor(SWAP), persistent=False)  # on the device
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, len(SWAP)))
        if head != "linear":  # mlp: the journal's
            self.head = nn.Sequential(
                *(nn.Linear(width, h), nn.ReLU(), nn.Dropout(dropout)),
                *(nn.Linear(h, h // 2), nn.ReLU(), nn.Dropout(dropout)),
                nn.Linear(h // 2, len(SWAP)),
            )
        self.train()  # but for the frozen parts

    @torch.no_grad()
    def start_at(self, shares):
        """Sets the head's bias to the log class shares, so that the first steps need not learn them.

        Weights stay random: were they zero, both orders of A and B would look alike for hundreds of steps.
        """
        self.head[-1].bias.copy_(torch.tensor(shares).clamp_min(1e-3).log())

    def train(self, mode=True):
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def forward(self, input_ids=None, lengths=None, vectors=None, *, size, orders=2):
        """Logits (orders, B, 3) from input_ids (sequences, T), padded, with their lengths, or from vectors
        (sequences, h).

        Sequence 1 of all `size` rows comes before sequence 2 of all (joint in one order needs no second).
        """
        vectors = self.encode(input_ids, lengths) if vectors is None else vectors
        first, second = vectors[:size], vectors[size:]
        if self.joint:
            seen = [first, second][:orders]
        else:
            alike = [(first - second).abs(), first * second] if self.compares else []
            pairs = ([first, second, *alike], [second, first, *alike])[:orders]
            seen = [torch.cat(pair, dim=-1) for pair in pairs]
        logits = [self.head(one) for one in seen]
        return torch.stack([logits[0], *(one[:, self.swap] for one in logits[1:])])

    def encode(self, input_ids, lengths):
        """Pooled vectors (N, h) in the order given: of the first token, or the mean over tokens.

        Encodes groups of similar length, because padding costs as much as text; only rounding depends on it.
        """
        device = input_ids.device
        overhead = OVERHEAD * (1 if device.type == "cpu" else 16)  # launches: an estimate, not measured
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        ordered = [lengths[i] for i in order]
        longest_first = torch.tensor(order)
        input_ids = input_ids[to_device(longest_first, device)]
        ends = to_device(torch.tensor(ordered), device)[:, None]
        parts, start = [], 0
        for n in length_groups(ordered, math.inf, overhead):
            group, longest = slice(start, start + n), ordered[start]
            is_padded = ordered[start + n - 1] < longest
            parts.append(self._encode_group(input_ids[group, :longest], ends[group], is_padded))
            start += n
        return torch.cat(parts)[to_device(longest_first.argsort(), device)]

    def _encode_group(self, input_ids, ends, is_padded):
        T = input_ids.shape[1]
        mask = torch.arange(T, device=input_ids.device) < ends  # by length, never by token id
        shown = mask.long()
        if takes_whole_masks(self.encoder.config):  # of (B, T) it asks the card: is any false?
            shown = mask[:, None, None].expand(-1, 1, T, -1) if is_padded else None
        hidden = self.encoder(input_ids, attention_mask=shown).last_hidden_state
        if self.pooling == "first":
            return hidden[:, 0]
        return (hidden * mask[..., None]).sum(1) / ends


WHOLE_MASKS = ("distilbert", "bert", "roberta", "electra", "albert")


def takes_whole_masks(config) -> bool:
    """Whether an encoder hands a mask (B, 1, T, T) to torch's attention as it is; others (ModernBERT with its
    windows, DeBERTa) make their own of a mask (B, T)."""
    return config.model_type in WHOLE_MASKS and config._attn_implementation == "sdpa"
