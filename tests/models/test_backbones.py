"""Encoders and decoders as backbones: vectors, adapters, what a checkpoint holds, DeBERTa-v3."""

import copy
import dataclasses
import io
import json
import sys

import pytest
import torch
from toys.begun import begun_tokenizer
from toys.gpt import random_gpt, transformers_model

import core
import run_preference as script
from core import UserError, World
from lab.data import pairs, tokenizers
from lab.models import backbones, encoders
from lab.models.gpt import GPT
from lab.models.lora import adapted, base_weights
from lab.models.pretrained import TINY_KINDS
from lab.run.checkpoints import tensor_bytes

DECODERS = [*TINY_KINDS]
ALL = [*DECODERS, *(f"tiny:{family}" for family in encoders.TINY_FAMILIES)]
LENGTHS = [5, 30, 9, 2, 17, 3, 3, 8]


def words():
    return tokenizers.encoder_tokenizer("tiny:", ["one two three four five six"])


def scorer(name, cfg=None, **changes):
    """A scorer in fp64 without dropout; cfg: with frozen parts or adapters."""
    backbone = backbones.open_backbone(name, words(), dropout=0.0)
    frozen = backbones.prepare(cfg, backbone) if cfg else ()
    options = {"joint": True, "pooling": "auto", "head": "linear", "dropout": 0.0, "frozen": frozen}
    return core.PairScorer(backbone, **options | changes).double()


def padded(lengths, padding=0):
    ids = torch.randint(4, 10, (len(lengths), 30), generator=torch.Generator().manual_seed(1))
    return torch.where(torch.arange(30) < torch.tensor(lengths)[:, None], ids, padding)


def config(**changes):
    return script.Config(**{"lora_rank": 2, "max_length": 16} | changes)


@pytest.mark.parametrize("name", ALL)
def test_a_vector_is_of_the_last_real_token_whatever_stands_behind_it(name):
    model = scorer(name, pooling="last")
    vectors = model.encode(padded(LENGTHS), LENGTHS)
    torch.testing.assert_close(model.encode(padded(LENGTHS, padding=7), LENGTHS), vectors, rtol=0, atol=1e-12)
    for i, n in enumerate(LENGTHS):
        alone = padded(LENGTHS)[i : i + 1, :n]
        hidden = model.encoder.hidden(alone) if name in DECODERS else model.encoder(alone).last_hidden_state
        torch.testing.assert_close(vectors[i], hidden[0, -1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_learns_in_all_its_parts_and_swapping_sides_swaps_classes(name):
    model = scorer(name)
    assert model.pooling == "last" and scorer("tiny:bert").pooling == "first"
    there, back = model(padded(LENGTHS), LENGTHS, size=4), [4, 5, 6, 7, 0, 1, 2, 3]
    again = model(padded(LENGTHS)[back], [LENGTHS[i] for i in back], size=4)
    torch.testing.assert_close(again[..., [1, 0, 2]].flip(0), there, rtol=0, atol=1e-12)
    there.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    rates = encoders.lr_scales(model, 0.5, head=30.0)
    assert rates["encoder.wte.weight"] == 0.25 and rates["encoder.h.0.mlp.c_fc.weight"] == 0.5
    assert rates["encoder.h.1.mlp.c_fc.weight"] == rates["encoder.ln_f.weight"] == 1
    encoders.freeze(model.encoder, "bottom")
    still = {n for n, p in model.encoder.named_parameters() if not p.requires_grad}
    assert still and all(n.startswith(("h.0.", "wte", "wpe")) for n in still)


def test_the_first_token_of_a_decoder_is_no_vector():
    with pytest.raises(UserError, match="--pooling first: a decoder's first token has seen no other"):
        scorer("tiny:gpt2", pooling="first")


@pytest.mark.parametrize("name", ALL)
def test_adapters_are_on_every_linear_layer_of_the_blocks_and_nothing_reads_past_them(name):
    """The scorer with adapters is the one whose matrices have what they add; at the start, the base's."""
    plain = scorer(name)
    model = copy.deepcopy(plain)
    backbones.prepare(config(method="lora"), model.encoder)
    model.double()
    given = padded(LENGTHS), LENGTHS
    torch.testing.assert_close(model(*given, size=4), plain(*given, size=4), rtol=0, atol=1e-12)
    learn = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rpartition(".")[2] for n in learn if not n.startswith("head.")} == {"A", "B"}
    matrices = {n for n, p in plain.encoder.named_parameters() if p.dim() == 2 and not _table(plain, p)}
    outside = {
        n for n in matrices if n.startswith("encoder.embedding_hidden_mapping_in") or "embeddings" in n
    }
    assert {f"{n}.weight" for n in adapted(model.encoder)} == matrices - outside
    with torch.no_grad():
        for layer in adapted(model).values():
            torch.nn.init.normal_(layer.B, std=0.3)
        for layer_name, layer in adapted(model.encoder).items():
            plain.encoder.get_submodule(layer_name).weight += layer.delta()
    changed = model(*given, size=4)
    torch.testing.assert_close(changed, plain(*given, size=4), rtol=0, atol=1e-9)
    changed.square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == learn


def _table(model, p):
    tables = (m for m in model.modules() if isinstance(m, torch.nn.Embedding))
    return any(p is table.weight for table in tables)


def test_what_is_frozen_is_not_stored_and_whole_states_still_load():
    model, other = (scorer("tiny:bert", config(freeze="bottom")) for _ in range(2))
    part = core.saved_part(model)
    assert {*part.state_dict()} == {n for n, p in model.named_parameters() if p.requires_grad}
    core.saved_part(other).load_state_dict(part.state_dict())
    trained = dict(other.named_parameters())
    assert all(torch.equal(trained[name], value) for name, value in part.state_dict().items())
    core.saved_part(other).load_state_dict(model.state_dict())  # as runs once stored them
    assert core.weights_sha256(other) == core.weights_sha256(model)
    wider = scorer("tiny:bert", config(freeze="bottom"), joint=False)
    with pytest.raises(UserError, match=r"do not fit in 1 tensors, e.g. .*head"):
        part.load_state_dict(core.saved_part(wider).state_dict())
    whole = scorer("tiny:bert")
    assert core.saved_part(whole) is whole


@pytest.mark.parametrize("changes", [{"freeze": "all"}, {"method": "lora", "lora_rank": 8}])
def test_a_checkpoint_of_a_frozen_base_is_below_two_percent_of_it(changes):
    """GPT-2 small with the journal's head, read as one sequence."""
    shape = {"vocab_size": 50257, "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768}
    with torch.device("meta"):
        backbone = GPT(core.GPTConfig(**shape))
        size = tensor_bytes(backbone.state_dict())
        frozen = backbones.prepare(config(**changes), backbone)
        model = core.PairScorer(backbone, joint=True, pooling="auto", head="mlp", dropout=0.0, frozen=frozen)
    assert 0 < tensor_bytes(core.saved_part(model).state_dict()) < 0.02 * size


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_decoder_of_a_folder_is_read_without_its_output_matrix(kind, tmp_path):
    theirs = transformers_model(kind, tie_word_embeddings=False)
    theirs.resize_token_embeddings(302)
    theirs.save_pretrained(tmp_path)
    begun_tokenizer("" if kind == "gpt2" else "<s>").save_pretrained(tmp_path)
    name = str(tmp_path)
    assert backbones.is_decoder(name) and not backbones.is_decoder("tiny:bert")
    tokenizer = tokenizers.encoder_tokenizer(name)
    ours = backbones.open_backbone(name, tokenizer)
    assert not any("head" in n for n, _ in ours.named_parameters()) and ours.training
    ids = torch.arange(14).view(2, 7)
    wanted = theirs.base_model(input_ids=ids).last_hidden_state.detach()
    torch.testing.assert_close(ours.hidden(ids), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    begin = [] if kind == "gpt2" else [tokenizer.convert_tokens_to_ids("<s>")]
    assert tokenizers.marks_of(tokenizer) == (begin, tokenizer.eos_token_id)
    backbones.write_backbone(tmp_path / "encoder", ours, tokenizer)
    assert backbones.stored_backbone(tmp_path / "encoder").config == ours.config


def test_a_decoder_is_shown_what_it_begins_texts_with_and_an_end_behind_each_piece(cache):
    cfg = config(data="python-pairs", max_documents=60, inputs="joint", max_length=40)
    for begins in ("", "<s>"):
        tokenizer = begun_tokenizer(begins)
        data = core.load_pairs(cfg, World(), tokenizer)
        pairs.measure_sequences(data, cfg.inputs, cfg.max_length)
        for row in range(5):
            ids = pairs.sequence_ids(data, row, 1, cfg.inputs, cfg.max_length)
            assert ids.count(tokenizer.eos_token_id) == 3 and ids[-1] == tokenizer.eos_token_id
            assert len(ids) == data.lengths[row, 0] <= 40
            assert (ids[0] == tokenizer.convert_tokens_to_ids("<s>")) == bool(begins)
        assert data.lengths.max() > 35


def test_a_base_that_has_changed_is_not_taken_for_the_runs(tmp_path, monkeypatch):
    tokenizer = begun_tokenizer()
    core.save_pretrained(random_gpt(vocab_size=302).float(), tokenizer, tmp_path / "base")
    cfg = config(model=str(tmp_path / "base"), method="lora")
    backbone = core.load_backbone(cfg, tokenizer, World())
    facts = {"base_sha256": core.state_sha256(backbone.state_dict())}
    monkeypatch.setattr(backbones, "read_config", lambda folder: {"facts": facts})
    backbones.write_backbone(tmp_path / "encoder", backbone, tokenizer)
    again, _ = backbones.backbone_of_run(tmp_path, cfg, World())
    assert core.weights_sha256(again) == core.weights_sha256(backbone)
    core.save_pretrained(random_gpt(vocab_size=302, seed=1).float(), tokenizer, tmp_path / "base")
    with pytest.raises(UserError, match=r"base is not the one that .* was trained on"):
        backbones.backbone_of_run(tmp_path, cfg, World())
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="needs the model that it was trained on: no such folder"):
        backbones.backbone_of_run(tmp_path, cfg, World())


def test_a_base_under_adapters_is_the_same_in_all_folds_and_adapters_are_not():
    def drawn(fold, **changes):
        cfg = config(model="tiny:gpt2", **changes)
        backbone = core.load_backbone(cfg, words(), World(), fold)
        backbones.prepare(cfg, backbone)
        return base_weights(backbone)["h.0.mlp.c_fc.weight"], [*adapted(backbone).values()]

    (one, first), (two, second) = (drawn(fold, method="lora") for fold in (0, 1))
    assert torch.equal(one, two) and not torch.equal(first[0].A, second[0].A)
    assert not torch.equal(drawn(0)[0], drawn(1)[0])  # all of it is trained, and stored


def test_a_decoders_frozen_matrices_are_held_in_bf16_and_its_adapters_are_not():
    cfg = config(method="lora", base_dtype="bf16")
    model = core.PairScorer(
        backbones.open_backbone("tiny:llama", words()),
        **{"joint": True, "pooling": "auto", "head": "linear", "dropout": 0.0},
        frozen=(),
    )
    backbones.prepare(cfg, model.encoder)
    backbones.on_device(cfg, model, core.Precision("fp32", World()))
    dtypes = {n.rpartition(".")[2]: p.dtype for n, p in model.encoder.h.named_parameters() if ".mlp." in n}
    assert dtypes == {"weight": torch.bfloat16, "A": torch.float32, "B": torch.float32}
    assert model(padded(LENGTHS), LENGTHS, size=4).isfinite().all()  # fp32, as on a CPU later on
    with pytest.raises(UserError, match="--base_dtype bf16 is for decoders"):
        typed = script.Config(method="lora", base_dtype="bf16")
        typed = core.counting(typed, flags={"base_dtype"})
        backbones.prepare(typed, backbones.open_backbone("tiny:bert", words()))


@pytest.mark.parametrize("name", ["tiny:deberta-v2", "tiny:bert", "tiny:llama"])
def test_recomputed_blocks_have_the_same_gradients(name):
    gradients, counts = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        backbone = backbones.open_backbone(name, words(), 0.0, checkpointing)
        backbones.prepare(config(method="lora"), backbone)
        options = {"joint": True, "pooling": "auto", "head": "linear", "dropout": 0.0}
        model = core.PairScorer(backbone, **options).double()
        calls, layer = [], next(iter(adapted(backbone).values()))
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(padded(LENGTHS[:2]), LENGTHS[:2], size=1).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        counts.append(len(calls))
    assert counts[1] == 2 * counts[0]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def deberta_v3(tmp_path_factory):
    """A folder as microsoft/deberta-v3-base is: spm.model, no tokenizer.json, weights in half precision."""
    import sentencepiece

    folder, model = tmp_path_factory.mktemp("deberta"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((script.__doc__ * 9).splitlines()), model_writer=model, vocab_size=200,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2, hard_vocab_limit=False,
        pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]",
    )  # fmt: skip
    encoder = backbones.open_backbone("tiny:deberta-v2", words())
    grown = type(encoder)(encoder.config.__class__.from_dict(encoder.config.to_dict() | {"vocab_size": 256}))
    grown.half().save_pretrained(folder)
    (folder / "spm.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "vocab_type": "spm"}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "method"), [("fp32", "full"), ("bf16", "full"), ("fp16", "lora")])
def test_deberta_v3_is_read_from_its_sentencepieces_and_takes_a_step(deberta_v3, dtype, method):
    tokenizer = tokenizers.encoder_tokenizer(str(deberta_v3))
    assert tokenizers.marks_of(tokenizer) == ([1], 2) and tokenizer.pad_token_id == 0
    ids = tokenizer("which answer does a person prefer?", **tokenizers.AS_TEXT).input_ids
    assert tokenizer.decode(ids) == "which answer does a person prefer?"
    cfg = config(model=str(deberta_v3), dtype=dtype, method=method, max_length=700, encoder_dropout=0.0)
    backbone = core.load_backbone(cfg, tokenizer, World())  # 700: its positions are relative
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    precision = core.Precision(dtype, World())
    model = script.scorer(dataclasses.replace(cfg, dropout=0.0), backbone, precision)
    optimizer = core.make_optimizer(model, "adamw", 0.0)
    lengths = [530, len(ids)]
    rows = torch.zeros(2, 530, dtype=torch.long)
    rows[0, :], rows[1, : len(ids)] = torch.tensor(ids * 99)[:530], torch.tensor(ids)
    losses = []
    for _ in range(2):
        with precision.autocast():
            logits = model(rows, lengths, size=1).mean(0)
            losses.append(core.sum_cross_entropy(logits, torch.tensor([0])))
        core.scaled_backward(losses[-1], World(), 1, precision)
        core.optimizer_step(optimizer, precision, clip=1.0, lr=1e-3)
    assert precision.skipped == 0 and losses[1] < losses[0]


def test_without_sentencepiece_the_error_names_it(deberta_v3, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="pip install sentencepiece") as error:
        tokenizers.encoder_tokenizer(str(deberta_v3))
    assert "tiktoken" not in str(error.value) and "\n" not in str(error.value)


def test_smoke_shrinks_a_model_to_its_own_family():
    names = {"microsoft/deberta-v3-base": "deberta-v2", "microsoft/deberta-base": "deberta"}
    names |= {
        "Qwen/Qwen2.5-1.5B-Instruct": "llama",
        "openai-community/gpt2": "gpt2",
        "roberta-base": "roberta",
    }
    assert {name: encoders.tiny(name) for name in names} == {n: f"tiny:{to}" for n, to in names.items()}
