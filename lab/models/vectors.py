"""What a frozen backbone makes of each sequence: computed once, mapped into memory, beside the token ids."""

import shutil
import time
from pathlib import Path

import numpy as np
import torch

from lab.data import pairs
from lab.data.cache import cached_folder, is_whole
from lab.data.pairs import collate
from lab.errors import UserError
from lab.models import encoders, gpt
from lab.run.checkpoints import state_sha256
from lab.run.files import sha256_file, short_hash
from lab.train.batches import each_once
from lab.train.processes import on_main


def cache_vectors(model, data, cfg, world, poll, say):
    """Sets data.vectors, the frozen encoder's vector of every sequence, memory-mapped from the cache.

    The cache is written at the end: after a stop before that, encoding starts again.
    """
    if cfg.freeze != "all" or not cfg.encode_once:
        return
    data.vectors, began = None, time.time()
    folder = Path(on_main(world, vector_folder, model, data, cfg))
    if not on_main(world, is_whole, folder):
        n, width = len(data.labels), encoders.width_of(model.encoder)
        out = torch.zeros(n, 2, width, dtype=next(model.parameters()).dtype)
        megabytes = out.numel() * out.element_size() / 1e6
        on_main(world, require_room, data.folder, megabytes)
        say(f"the frozen encoder reads {n} rows once: {megabytes:.0f} MB of vectors in {data.folder.parent}")

        def vectors(some):
            inputs = collate(data, some, cfg, world.device)
            return torch.stack(model.encode(inputs["input_ids"], inputs["lengths"]).chunk(2), dim=1)

        model.eval()
        each_once(vectors, out, data, np.arange(n), cfg, world, poll, "encoding")
        model.train()
        if not out.isfinite().all():
            raise FloatingPointError(f"the frozen encoder gives inf or nan in {cfg.dtype}: use --dtype fp32")
        on_main(world, cached_folder, folder, write_vectors, out)
        say(f"encoded in {time.time() - began:.1f} s")
    data.vectors = np.load(folder / "vectors.npy", mmap_mode="r")


def vector_folder(model, data, cfg) -> str:
    """Cache folder, named by a hash of all that vectors depend on: weights,
    settings, and the code of rows."""
    code = [sha256_file(module.__file__) for module in (pairs, encoders, gpt)]
    config = model.encoder.config
    shape = str(config) if isinstance(config, gpt.GPTConfig) else config.to_json_string()
    known = [state_sha256(model.encoder.state_dict()), shape, *code]
    known += [cfg.inputs, cfg.max_length, model.pooling, cfg.dtype]
    known += list(data.marks)  # around each piece
    return str(data.folder / f"vectors_{short_hash(known)}")


def require_room(folder, megabytes):
    free = shutil.disk_usage(folder).free / 1e6
    if free < 1.05 * megabytes:
        room = f"{folder.parent} has {free:.0f} MB free, the vectors need {megabytes:.0f}"
        raise UserError(f"{room}: free some, set TOKEN_CACHE, or use --no-encode_once")


def write_vectors(folder, vectors):
    np.save(folder / "vectors.npy", vectors.numpy())
