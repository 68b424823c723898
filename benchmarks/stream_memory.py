"""Peak memory of writing the token cache of a generated stream of documents.

python benchmarks/stream_memory.py [gigabytes] [tokenizer] [max_tokens]

The whole stream is read: with max_tokens of training text, the rest for what is held out of it. `chars` is
encoded by a table and writes two bytes a character; a folder or Hub id by the tokenizers library.
"""

import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import core
from lab.data import tables, text, tokenizers


def generated(size):
    """Rows with a column `text` of some 5,000 characters, all different, `size` characters in all."""
    rng, letters = np.random.default_rng(0), np.array(list("abcdefghijklmnopqrstuvwxyz     \n"))
    pages = ["".join(rng.choice(letters, 5000)) for _ in range(1000)]
    for number in range(size // 5000):
        yield {"text": f"document {number}: {pages[number % len(pages)][: 5000 - 20]}"}


def main():
    gigabytes, tokenizer = float((sys.argv[1:] or ["1"])[0]), (sys.argv[2:] or ["chars"])[0]
    most = int(sys.argv[3]) if len(sys.argv) > 3 else None
    text.text_fingerprint = lambda source: "generated"
    tables.stream_rows = lambda *args, **options: generated(int(gigabytes * 1e9))
    folder = Path(tempfile.mkdtemp(dir="."))
    core.cache_root = lambda: folder
    if tokenizer == "chars":  # learnt from a few documents: what is measured is the stream
        core.make_tokenizer = lambda name, texts: tokenizers.characters(
            sorted(set("\n :0123456789" + ALPHABET))
        )
    began = time.perf_counter()
    try:
        budget = {"max_tokens": most, "held_out_tokens": 10**12, "val_share": 5e-4, "test_share": 5e-4}
        cache = text.token_cache(core.Corpus("generated/stream", tokenizer, first_trains=False, **budget))
        written = sum(len(part) for part in text.open_cache(cache).parts.values())
    finally:
        shutil.rmtree(folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    seconds = time.perf_counter() - began
    print(f"{gigabytes:g} GB of text, {written:,} tokens in {seconds:.0f} s, peak memory {peak:.0f} MB")


ALPHABET = "abcdefghijklmnopqrstuvwxyz"

if __name__ == "__main__":
    main()
