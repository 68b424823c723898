"""Encoders and the scorer of pairs: the journal's parameter counts, freezing, rates by depth, both orders."""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import core
from core import UserError
from lab.data import tokenizers
from lab.models import encoders

WORDS = ["one two three four five six"]


def scorer(family="bert", which="none", **changes):
    """A tiny scorer in fp64 without dropout."""
    tokenizer = tokenizers.encoder_tokenizer("tiny:", WORDS)
    encoder = core.load_encoder(f"tiny:{family}", tokenizer, dropout=0.0)
    frozen = encoders.freeze(encoder, which)
    options = {"joint": False, "pooling": "first", "head": "mlp", "dropout": 0.0, "frozen": frozen} | changes
    return core.PairScorer(encoder, **options).double()


def padded(lengths, width=30):
    ids = torch.randint(4, 10, (len(lengths), width))
    return torch.where(torch.arange(width) < torch.tensor(lengths)[:, None], ids, 0)


def on_meta(family, which="none", **shape):
    """The scorer of real shape, without storage."""
    from transformers import AutoConfig

    with torch.device("meta"):
        encoder = encoders.encoder_from_config(AutoConfig.for_model(family, **shape))
        frozen = encoders.freeze(encoder, which)
        return core.PairScorer(encoder, joint=False, pooling="first", head="mlp", dropout=0.1, frozen=frozen)


BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
HEAD = 1_476_867  # for h = 768
POOLER = 768 * 768 + 768


@pytest.mark.parametrize(
    ("family", "shape", "base"),
    [
        ("distilbert", {}, 66_362_880),
        ("bert", {}, 108_891_648),
        ("bert", LARGE, 334_092_288),
        ("roberta", {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}, 124_055_040),
        ("electra", BASE | {"embedding_size": 768}, 108_891_648),
        ("albert", BASE | {"embedding_size": 128, "inner_group_num": 1}, 11_683_584 - POOLER),
    ],
)
def test_the_journals_encoders_have_the_known_number_of_parameters(family, shape, base):
    model = on_meta(family, **shape)
    assert core.count_parameters(model.encoder)[0] == base
    if model.encoder.config.hidden_size == 768:
        assert core.count_parameters(model) == (base + HEAD, base + HEAD)


def test_what_the_journal_called_bottom_frozen_was_every_block():
    assert core.count_parameters(on_meta("distilbert", "blocks").encoder) == (66_362_880, 23_835_648)
    block = 42_527_232 // 6
    assert core.count_parameters(on_meta("distilbert", "bottom").encoder)[1] == 3 * block
    assert core.count_parameters(on_meta("distilbert", "all")) == (66_362_880 + HEAD, HEAD)


FREEZABLE = [(family, which) for family in encoders.TINY_FAMILIES for which in ("all", "bottom", "blocks")]


@pytest.mark.parametrize(("family", "which"), [case for case in FREEZABLE if case != ("albert", "bottom")])
def test_frozen_parts_stay_in_eval_mode_and_all_others_learn(family, which):
    model = scorer(family, which)
    blocks = r"\.layer\.\d|albert_layer_groups"
    pattern = {"all": "", "blocks": blocks, "bottom": r"\.layer\.0|embed"}[which]
    names = {name for name, _ in model.encoder.named_parameters() if re.search(pattern, name)}
    ids = {id(p) for name, p in model.encoder.named_parameters() if name in names}
    frozen = [
        m for name, m in model.encoder.named_modules() if any(name == n.rpartition(".")[0] for n in names)
    ]
    assert ids and all(p.requires_grad != (id(p) in ids) for p in model.encoder.parameters())
    assert not any(module.training for part in frozen for module in part.modules())
    assert model.training and model.head.training
    assert which == "all" or any(module.training for module in model.encoder.modules())
    model(padded([5, 9, 4, 3]), [5, 9, 4, 3], size=2).sum().backward()
    learn = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in learn) and len(learn) + len(ids) == len(list(model.parameters()))


@pytest.mark.parametrize("family", encoders.TINY_FAMILIES)
def test_every_parameter_is_of_the_embeddings_or_of_a_block(family):
    """A family whose parts have other names would learn at other rates than asked for."""
    encoder = scorer(family).encoder
    embeddings, blocks = encoders.embeddings_and_blocks(encoder)
    known = {id(p) for module in (*embeddings, blocks) for p in module.parameters()}
    assert known == {id(p) for p in encoder.parameters()}


def test_a_single_repeated_block_has_no_lower_half():
    with pytest.raises(UserError, match="--freeze bottom: this encoder repeats one block"):
        scorer("albert", "bottom")


@pytest.mark.parametrize("family", encoders.TINY_FAMILIES)
def test_every_parameter_gets_a_gradient_and_grouping_changes_nothing(family):
    model = scorer(family)
    lengths = [5, 30, 9, 2, 17, 3, 3, 8] * 3
    ids = padded(lengths)
    logits = model(ids, lengths, size=12)
    logits.square().sum().backward()
    assert logits.shape == (2, 12, 3)
    assert all(p.grad is not None for p in model.parameters())
    hidden = [model.encoder(ids[i : i + 1, :n]).last_hidden_state[0] for i, n in enumerate(lengths)]
    first = torch.stack([one[0] for one in hidden])
    torch.testing.assert_close(model.encode(ids, lengths), first, rtol=0, atol=1e-9)
    model.pooling = "mean"
    mean = torch.stack([one.mean(0) for one in hidden])
    torch.testing.assert_close(model.encode(ids, lengths), mean, rtol=0, atol=1e-9)
    assert not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))


@pytest.mark.parametrize("family", encoders.WHOLE_MASKS)
def test_a_whole_mask_is_bit_for_bit_what_transformers_makes_of_a_plain_one(family, monkeypatch):
    model, lengths = scorer(family).eval(), [5, 30, 9, 2, 17, 3, 3, 8]
    ids = padded(lengths)
    assert encoders.takes_whole_masks(model.encoder.config)
    whole = model.encode(ids, lengths)
    monkeypatch.setattr(encoders, "WHOLE_MASKS", ())
    assert torch.equal(model.encode(ids, lengths), whole)


def test_an_encoder_that_makes_its_own_masks_gets_a_plain_one():
    """Windows of ModernBERT, relative positions of DeBERTa; and attention that adds a mask to the scores."""
    from transformers import BertConfig, ModernBertConfig

    assert not encoders.takes_whole_masks(scorer("deberta").encoder.config)
    assert not encoders.takes_whole_masks(ModernBertConfig(attn_implementation="sdpa"))
    assert not encoders.takes_whole_masks(BertConfig(attn_implementation="eager"))


@pytest.mark.parametrize(("joint", "head"), [(False, "mlp"), (True, "linear"), (False, "compare")])
def test_the_second_order_is_the_first_one_of_exchanged_sequences_with_classes_put_back(joint, head):
    model = scorer(joint=joint, head=head).eval()
    lengths = [5, 9, 4, 3, 7, 12]
    ids = padded(lengths)
    there = model(ids, lengths, size=3)
    back = [3, 4, 5, 0, 1, 2]
    again = model(ids[back], [lengths[i] for i in back], size=3)
    torch.testing.assert_close(again[..., [1, 0, 2]].flip(0), there, rtol=0, atol=1e-12)
    assert (there[0] - there[1]).abs().max() > 1e-3
    vectors = model.encode(ids, lengths)
    torch.testing.assert_close(model(vectors=vectors, size=3), there, rtol=0, atol=0)
    if head == "compare":
        a, b = vectors[:3], vectors[3:]
        seen = torch.cat([a, b, (a - b).abs(), a * b], dim=1)
        torch.testing.assert_close(model.head(seen), there[0], rtol=0, atol=0)
    needed = 3 if joint else 6  # joint in one order needs one sequence of each row
    alone = model(ids[:needed], lengths[:needed], size=3, orders=1)
    torch.testing.assert_close(alone, there[:1], rtol=0, atol=1e-12)


def test_rates_fall_from_the_top_block_down_and_the_head_has_its_own():
    model = scorer("bert")
    scales = encoders.lr_scales(model, 0.5, head=30.0)
    assert scales["head.0.weight"] == 30
    assert scales["encoder.encoder.layer.1.output.dense.weight"] == 1
    assert scales["encoder.encoder.layer.0.output.dense.weight"] == 0.5
    assert scales["encoder.embeddings.word_embeddings.weight"] == 0.25
    optimizer = core.make_optimizer(model, "sgd", 0.0, scales=scales)
    model(padded([5, 9]), [5, 9], size=1).square().sum().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    core.optimizer_step(optimizer, core.Precision("fp64", core.World()), clip=None, lr=1e-3)
    for name, p in model.named_parameters():
        step = before[name] - p.detach()
        torch.testing.assert_close(
            step, 1e-3 * scales[name] * gradients[name], rtol=1e-6, atol=1e-12, msg=name
        )


def test_missing_weights_are_an_error_and_poolers_are_not_missed(tmp_path):
    tokenizer = tokenizers.encoder_tokenizer("tiny:", ["a b"])
    encoder = core.load_encoder("tiny:bert", tokenizer)
    encoder.save_pretrained(tmp_path)
    loaded = core.load_encoder(str(tmp_path), tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), loaded.parameters(), strict=True))
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("encoder.layer.1.output.dense.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights, e.g. encoder.layer.1.output.dense.weight"):
        core.load_encoder(str(tmp_path), tokenizer)


def bert_folder(tmp_path, vocab_size=100, kind="bert", **more):
    """A folder of a masked language model with its head, as most on the Hub are."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.AutoConfig.for_model(kind, vocab_size=vocab_size, **shape, **more)
    transformers.AutoModelForMaskedLM.from_config(config, trust_remote_code=False).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra", "deberta-v2"])
def test_a_head_of_another_task_is_no_fault_and_a_block_that_nobody_reads_is(tmp_path, kind):
    tokenizer = tokenizers.encoder_tokenizer("tiny:", ["a b"])
    folder = bert_folder(tmp_path, kind=kind, pad_token_id=0)
    core.load_encoder(folder, tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    layers = "n_layers" if kind == "distilbert" else "num_hidden_layers"
    (tmp_path / "config.json").write_text(json.dumps(config | {layers: 1}))
    with pytest.raises(
        UserError, match=r"weights that a .* of its config.json does not read, e.g. \w+.layer.1"
    ):
        core.load_encoder(folder, tokenizer)


def test_a_tokenizer_of_another_encoder_is_refused(tmp_path):
    many = tokenizers.encoder_tokenizer("tiny:", ["a b c d e f g h"])
    with pytest.raises(UserError, match="has 12 tokens, the model 9: they do not belong together"):
        core.load_encoder(bert_folder(tmp_path / "bert", vocab_size=9), many)
    roberta = bert_folder(tmp_path / "roberta", kind="roberta", pad_token_id=1)
    with pytest.raises(UserError, match="pads with 0, positions of the model count from id 1"):
        core.load_encoder(roberta, many)
    many.pad_token = "[UNK]"  # id 1
    assert encoders.position_limit(core.load_encoder(roberta, many)) == 510


def test_a_run_without_its_encoder_is_one_line(tmp_path):
    with pytest.raises(UserError, match="encoder is missing: the run stopped before its first step"):
        encoders.stored_encoder(tmp_path / "encoder")
    core.load_encoder("tiny:bert", tokenizers.encoder_tokenizer("tiny:", ["a"])).config.save_pretrained(
        tmp_path
    )
    encoders.stored_encoder(tmp_path)
    for text in (
        "{",
        "[]",
        '{"model_type": "bert", "hidden_size": 7}',
        '{"model_type": "bert", "vocab_size": 0}',
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError) as error:
            encoders.stored_encoder(tmp_path)
        assert "\n" not in str(error.value)


def test_a_half_precision_checkpoint_is_trained_in_fp32(tmp_path):
    tokenizer = tokenizers.encoder_tokenizer("tiny:", ["a b"])
    core.load_encoder("tiny:bert", tokenizer).half().save_pretrained(tmp_path)
    model = core.load_encoder(str(tmp_path), tokenizer)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and model.training
