"""Models that only transformers knows: measured and answering as transformers does it."""

import json
from pathlib import Path

import pytest
import torch
import transformers

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


def make(kind, folder="model", **extra):
    torch.manual_seed(0)
    tokenizer = core.make_tokenizer("bpe:300", lambda: [TEXT])
    make_config, shape = KINDS[kind]
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "initializer_range": 0.3}
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
