"""Tokenizers with a chat template, in the manner of the families that are tuned; {% generation %} marks what
an assistant writes, so that transformers itself says which tokens are to be learnt."""

import tokenizers as library
import transformers
from toys.begun import TEXT

import core

SAYS = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
START = "<|im_start|>{{ m.role }}\n"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = START + "{% if m.role == 'assistant' %}" + SAYS + "{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
HELPS = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
HEAD = "<|head|>{{ m.role }}<|/head|>\n\n"
TEMPLATES = {
    "chatml": HELPS + "{% for m in messages %}" + TURN + "{% endfor %}" + ASKS,  # SmolLM2, Qwen2
    "llama3": "{{ bos_token }}<|head|>system<|/head|>\n\nToday: {{ strftime_now('%d %b %Y') }}\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}"
    "{% endif %}"
    "<|eot|>{% for m in messages %}" + HEAD + "{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content | trim }}<|eot|>{% endgeneration %}{% else %}{{ m.content | trim }}<|eot|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{% generation %} {{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('no system turns') }}{% endif %}{% endfor %}",
    # thoughts of earlier turns are dropped, the last one has empty ones
    "qwen3": "{% for m in messages %}"
    + START
    + "{% if m.role == 'assistant' and loop.last %}{% generation %}"
    "<think>\n\n</think>\n\n{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}{{ m.content }}"
    "<|im_end|>\n"
    "{% endif %}{% endfor %}" + ASKS,
    "zephyr": "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",  # writes no begin token
}
ENDS = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot|>",
    "mistral": "</s>",
    "qwen3": "<|im_end|>",
    "zephyr": "</s>",
}
MARKS = ["<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>"]
BEGUN = {"llama3", "mistral", "zephyr"}  # their tokenizers put <s> before a text


def chat_tokenizer(kind, template=None):
    """bpe whose own end token is </s>; `template`: another than that of the kind."""
    inner = core.make_tokenizer("bpe:300", lambda: [TEXT]).backend_tokenizer
    inner.add_special_tokens(["<s>", "</s>", *MARKS])
    inner.add_tokens(["<think>", "</think>"])
    if kind in BEGUN:
        ids = [("<s>", inner.token_to_id("<s>"))]
        inner.post_processor = library.processors.TemplateProcessing(single="<s> $A", special_tokens=ids)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATES[kind] if template is None else template or None
    return tokenizer


def turns(*texts, system=None) -> list[dict]:
    """user, assistant, user ... in turn"""
    spoken = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + spoken
