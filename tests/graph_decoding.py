"""A process of its own for tests/test_gpu.py: `python graph_decoding.py KIND HALF` writes text by a graph and
kernel by kernel, and prints which rows are equal and how many graphs were made, as JSON."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from toys.gpt import GROUPED, PROMPTS, lively_gpt

import core
from lab.models import decoding

CHOICES = [{"temperature": 0}, {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 3}]
SHAPES = [{}, GROUPED]


def main(kind, half):
    equal, graphs, made = [], [], decoding.captured

    def captured(*args):
        graphs.append(made(*args))
        return graphs[-1]

    decoding.captured = captured
    for shape in SHAPES:
        size = {"vocab_size": 500, "block_size": 64, "n_layer": 4, "n_embd": 128}
        model = lively_gpt(**size, **shape).float().to(kind)
        decoder = decoding.decoder_of(model)
        for choice in CHOICES:  # 90 tokens: the context slides
            both = (decoder, decoding.Decoder(model))
            rows = [core.generate(model, PROMPTS, 90, **choice, decoder=one) for one in both]
            equal.append(rows[0] == rows[1] and min(len(set(row)) for row in rows[0]) > 9)
        with torch.autocast(kind, {"bf16": torch.bfloat16, "fp16": torch.float16}[half]):
            halved = [core.generate(model, PROMPTS, 90, temperature=0) for _ in range(2)]
        equal.append(halved[0] == halved[1])
    print(json.dumps({"equal": equal, "graphs": len(graphs)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
