"""Several boxes share one disk: every rank must see it before the first step, not after the last."""

import os
import secrets
import socket
import time
from pathlib import Path

import torch

from lab.errors import UserError
from lab.run.files import PROJECT
from lab.run.stored import prepare_folder
from lab.train.processes import all_reduce_sum, on_main

SIGHT_SECONDS = 30  # network disks may remember for so long that a name was not there


def cache_root() -> Path:
    """Where token ids are kept between runs; TOKEN_CACHE lets it sit on a persistent volume."""
    return Path(os.environ.get("TOKEN_CACHE") or PROJECT / "cache")


def require_one_disk(world, *folders):
    """UserError on all ranks, which names the host, where one does not see what rank 0 writes."""
    for folder in folders:
        token = Path(on_main(world, _write_token, str(folder)))
        blind = not _appears(token)
        all_blind = torch.zeros(world.size)
        all_blind[world.rank] = blind
        if blind:
            world.store.set(f"blind/{world.rank}", socket.gethostname())
        all_reduce_sum(world, all_blind)
        on_main(world, token.unlink)
        if blind_ranks := all_blind.nonzero().flatten().tolist():
            host = world.store.get(f"blind/{blind_ranks[0]}").decode()
            all_reduce_sum(world, all_blind)  # rank 0 may hold the store: it goes when all have read
            word = "use one that all boxes share (--out, TOKEN_CACHE)"
            raise UserError(f"rank {blind_ranks[0]} on {host} does not see rank 0's {folder}: {word}")


def _write_token(folder) -> str:
    prepare_folder(folder)
    token = Path(folder) / f".seen_by_all.{secrets.token_hex(8)}"
    token.touch()
    return str(token)  # a relative one is looked for in each rank's own folder, as the run's is


def _appears(token) -> bool:
    for _ in range(int(10 * SIGHT_SECONDS)):
        if token.exists():
            return True
        time.sleep(0.1)
    return False
