"""Ranks that wait for each other: a missing one is named."""

import subprocess
import sys


def test_a_rank_that_is_missing_is_named():
    """Rank 1 never comes to the second reduction; the error on rank 0 says so."""
    code = """
import datetime, os, sys, threading, torch, core
rank = int(sys.argv[1])
os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1",
                   MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
with core.distributed(timeout_minutes=0.05) as world:
    core.barrier(world)
    if rank == 0:
        try:
            core.barrier(world)
        except RuntimeError as error:
            print(error)
        os._exit(0)
    import time; time.sleep(8); os._exit(0)
"""
    from ranks import free_port

    port = str(free_port())
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), port], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    said = ranks[0].communicate(timeout=60)[0]
    ranks[1].kill()
    assert "rank 1 did not come to reduction 2" in said
