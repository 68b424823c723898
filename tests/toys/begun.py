"""Tokenizers that put tokens of their own around a text, as Llama's and others do."""

import tokenizers as library
import transformers

import core

TEXT = "The cat sat on the mat. The dog ate the bone. A bird sang in the tree. " * 3


def begun_tokenizer(before="<s>", behind="", size=300):
    """bpe with special tokens <s> and </s>; `before` and `behind` stand around every text."""
    inner = core.make_tokenizer(f"bpe:{size}", lambda: [TEXT]).backend_tokenizer
    inner.add_special_tokens([*("<s>", "</s>")])
    names = [name for name in ("<s>", "</s>") if name in before + behind]
    if names:
        inner.post_processor = library.processors.TemplateProcessing(
            single=f"{before} $A {behind}".strip(),
            special_tokens=[(name, inner.token_to_id(name)) for name in names],
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
