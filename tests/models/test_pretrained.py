"""Models that only transformers knows: measured and answering as transformers does it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers
from toys.gpt import random_gpt

import core
import eval as script
from core import UserError, World
from lab.measure import answers
from lab.models import pretrained

TEXT = "The cat sat on the mat. The dog ate the bone. A bird sang in the tree. " * 3
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
KINDS = {  # shared keys, biases of queries, parallel blocks: what gpt_scratch.GPT does not have
    "llama": (transformers.LlamaConfig, SHAPE | {"num_key_value_heads": 2}),
    "qwen2": (transformers.Qwen2Config, SHAPE | {"num_key_value_heads": 2}),
    "gpt_neox": (transformers.GPTNeoXConfig, SHAPE),
}
TABLES = {  # positions in a table, which ends
    "opt": (transformers.OPTConfig, {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                                     "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt_neo": (transformers.GPTNeoConfig, {"hidden_size": 32, "num_layers": 2, "num_heads": 4,
                                            "attention_types": [[["global", "local"], 1]]}),
}  # fmt: skip
KINDS |= TABLES


def make(kind, folder="model", positions=64, **extra):
    torch.manual_seed(0)
    tokenizer = core.make_tokenizer("bpe:300", lambda: [TEXT])
    make_config, shape = KINDS[kind]
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": positions, "initializer_range": 0.3}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    model = transformers.AutoModelForCausalLM.from_config(
        make_config(**shape, **sizes, **ends, **extra)
    ).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_transformers(kind, capsys):
    model, tokenizer = make(kind)
    Path("text.txt").write_text(TEXT[:60])
    script.main(
        core.parse_config(script.Config, {}, {}, "", ["--run", "model", "--data", "text.txt"]), World()
    )
    [folder] = Path("runs/eval").iterdir()
    found = json.loads((folder / "result.json").read_text())
    end = tokenizer.eos_token_id
    ids = torch.tensor([[end, *tokenizer(TEXT[:60]).input_ids, end]])
    with torch.no_grad():
        wanted = model(ids, labels=ids).loss.item()
    assert found["test/loss"] == pytest.approx(wanted, rel=1e-5) and found["test/bytes"] == 60
    assert "loss" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_greedy_ones_whatever_the_model_brings_along(kind):
    model, tokenizer = make(kind)
    settings = transformers.GenerationConfig(do_sample=True, temperature=3.0, repetition_penalty=5.0)
    settings.save_pretrained("model")
    ours, _ = pretrained.open_any("model")
    prompts = [tokenizer(text).input_ids for text in ("The cat", "A bird sang in", "dog")]
    polls = []
    texts = answers.answers(ours, tokenizer, prompts, 6, 3, World(), lambda active: polls.append(active) or 0)
    for ids, text in zip(prompts, texts, strict=True):  # one by one, without padding
        row = torch.tensor([ids])
        for _ in range(6):
            with torch.no_grad():
                row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], 1)
        new = row[0, len(ids) :].tolist()
        new = new[: new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new
        assert text == tokenizer.decode(new).strip()
    assert polls.count(1) >= 1 and 0 in polls


@pytest.mark.parametrize("kind", TABLES)
def test_an_answer_beyond_the_models_positions_slides_as_a_gpts_does(kind):
    """GPT-Neo and OPT raised an IndexError there."""
    model, tokenizer = make(kind, positions=16)
    ours, _ = pretrained.open_any("model")
    prompts = [tokenizer(text).input_ids for text in (TEXT[:60], "The cat", "A bird sang in the")]
    stop, rows = {-1}, []
    for ids in prompts:  # one by one, without cache or padding
        row, start = list(ids), 0
        for _ in range(40):
            start = start if len(row) - start <= 16 else len(row) - 8
            with torch.no_grad():
                row.append(int(model(torch.tensor([row[start:]])).logits[0, -1].argmax()))
        rows.append(row[len(ids) :])
    assert max(map(len, prompts)) > 16
    stop = {len(tokenizer) - 1}
    wanted = [row[: next((n for n, token in enumerate(row) if token in stop), 40)] for row in rows]
    assert ours.continuations(prompts, 40, stop=stop, poll=int) == wanted
    assert [ours.continuations([ids], 40, stop=stop, poll=int)[0] for ids in prompts] == wanted


def test_ids_of_a_padded_vocabulary_are_never_chosen():
    """They spell nothing, and were written where they were likeliest."""
    model, tokenizer = make("gpt_neox")
    words, prompts = len(tokenizer), [tokenizer(text).input_ids for text in ("The cat", "A bird sang")]
    how = {"stop": {tokenizer.eos_token_id}, "poll": int, "vocab_size": words, "temperature": 0}
    wanted = pretrained.OtherModel(model).continuations(prompts, 12, **how)
    model.resize_token_embeddings(words + 7)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[words:] = torch.stack(
            [sign * 5 * head[i] for i, sign in zip(range(7), (1, -1) * 4, strict=False)]
        )
    padded = pretrained.OtherModel(model)
    free = padded.continuations(prompts, 12, **how | {"vocab_size": None})
    assert max(map(max, free)) >= words  # they are likeliest somewhere
    assert padded.continuations(prompts, 12, **how) == wanted


def test_a_model_of_a_single_position_is_one_line():
    make("gpt_neox", positions=1)
    with pytest.raises(
        UserError, match=r"model model .gpt_neox. has 1 position by its config.json: it needs 2"
    ):
        pretrained.open_any("model")


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_tokenizer_that_a_model_is_too_small_for_is_refused_and_another_can_be_named(kind):
    make(kind)
    core.make_tokenizer("bytes", lambda: []).save_pretrained("small")
    core.make_tokenizer("bpe:320", lambda: [TEXT * 2 + "zebra qux wonder fjord hymn"]).save_pretrained(
        "model"
    )
    with pytest.raises(UserError, match=r"the tokenizer of model has \d+ tokens, the model \d+: they do not"):
        pretrained.open_any("model")
    assert len(pretrained.open_any("model", "small")[1]) == 257


@pytest.mark.parametrize("files", [("tokenizer.json",), ("tokenizer.json", "tokenizer_config.json")])
def test_a_folder_without_a_tokenizer_is_measured_with_one_that_is_named_only(files, capsys):
    """transformers makes one of a single token: its accuracy was 1."""
    _, tokenizer = make("llama")
    tokenizer.save_pretrained("words")
    for name in files:
        Path("model", name).unlink()
    Path("text.txt").write_text(TEXT[:60])
    argv = ["--run", "model", "--data", "text.txt"]
    with pytest.raises(
        UserError, match=r"model brings no tokenizer.* --tokenizer|tokenizer in folder model cannot"
    ):
        script.main(core.parse_config(script.Config, {}, {}, "", argv), World())
    argv += ["--tokenizer", "words"]
    script.main(core.parse_config(script.Config, {}, {}, "", argv), World())
    assert "loss" in capsys.readouterr().out


DAMAGE = {  # of gpt.json
    "half": '{"vocab_size": 3',
    "a list": "[]",
    "null": "null",
    "unknown": '{"vocab_size": 23, "colour": 3}',
    "none": "{}",
    "another size": '{"vocab_size": 24, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}',
    "a text": '{"vocab_size": "23"}',
    "deep": "[" * 100_000,
    "no text": "\udcff",  # a byte that is no UTF-8
    "endless": '{"vocab_size": 23, "n_layer": 1000000000}',
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_run_is_one_line(case, monkeypatch):
    from safetensors.torch import save_file

    model = random_gpt(dtype=torch.float32)
    Path("run/checkpoints/step").mkdir(parents=True)
    save_file(model.state_dict(), "run/checkpoints/step/model.safetensors")
    monkeypatch.setattr(pretrained, "tested_or_newest_checkpoint", lambda folder: "step")
    Path("run/gpt.json").write_text(json.dumps(dataclasses.asdict(model.config)))
    with pytest.raises(UserError, match="run has lost its tokenizer"):  # none of that name of the Hub, either
        core.open_model("run")
    tokenizer = core.make_tokenizer("bytes", lambda: [])
    tokenizer.save_pretrained("run/tokenizer")
    with pytest.raises(UserError, match="tokenizer of run has 257 tokens, the model 23"):
        core.open_model("run")
    Path("run/gpt.json").write_bytes(DAMAGE[case].encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="run is no whole run") as error:
        core.open_model("run")
    assert "\n" not in str(error.value)


def test_what_is_known_to_gpt_scratch_is_opened_by_it_and_other_things_are_refused():
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, vocab_size=300)
    transformers.GPT2LMHeadModel(config).save_pretrained("gpt2")
    core.make_tokenizer("bpe:300", lambda: [TEXT]).save_pretrained("gpt2")
    assert not isinstance(pretrained.open_any("gpt2")[0], pretrained.OtherModel)
    make("llama", "capped")
    config = json.loads(Path("capped/config.json").read_text())
    small = {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 1.0}
    gemma = transformers.Gemma2Config(**KINDS["qwen2"][1], vocab_size=config["vocab_size"], **small)
    torch.manual_seed(0)
    transformers.Gemma2ForCausalLM(gemma).save_pretrained("capped")
    with pytest.raises(UserError, match=r"gemma2. scales or caps its logits"):
        pretrained.open_any("capped")
