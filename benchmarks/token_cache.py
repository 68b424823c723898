"""Tokens per second of building a token cache beside a bare encode_batch of the same tokenizer and text.

    python benchmarks/token_cache.py [text file] [tokenizer]        (default: built-in python-code, bpe:8192)

They take turns in one process. With it: seconds from the imports to the first step on an existing cache.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

import core
from lab.data import cache
from lab.data.text import open_cache, split_pieces, token_cache, write_tokens


def main(data="python-code", tokenizer="bpe:8192"):
    os.environ["TOKEN_CACHE"] = tempfile.mkdtemp()
    which = core.Corpus(data, tokenizer)
    folder = token_cache(which)
    tokens = open_cache(folder)
    rust, kind = tokens.tokenizer.backend_tokenizer, next(iter(tokens.parts.values())).dtype
    texts = [text for _, text, _ in split_pieces(which, cache.BadRows())]
    bare, built = [], []
    for _ in range(5):
        began = time.perf_counter()
        count = sum(len(e.ids) for e in rust.encode_batch(texts, add_special_tokens=False))
        bare.append(count / (time.perf_counter() - began))
        with tempfile.TemporaryDirectory() as aside:
            began = time.perf_counter()
            write_tokens(Path(aside), which, tokens.tokenizer, np.dtype(kind), cache.BadRows())
            built.append(count / (time.perf_counter() - began))
    shares = [b / a for a, b in zip(bare, built, strict=True)]
    print(
        f"{data} {tokenizer}  {count} tokens  encode_batch {statistics.median(bare):.0f} tokens/s  "
        f"cache {statistics.median(built):.0f} tokens/s  {statistics.median(shares):.2f} of it"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
