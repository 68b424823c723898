"""Where a system lacks what Linux has: native Windows' Python, and an image without `datasets`."""

import os
import subprocess
import sys

from ranks import SCRIPTS

LACKS = f"""
import importlib, os, signal, sys
import tokenizers, torch, transformers, torch.utils.tensorboard  # theirs is theirs
import torch.distributed.elastic.multiprocessing
for name in ("fcntl", "resource", "pwd", "grp", "termios", "pty", "datasets"):
    sys.modules[name] = None  # importing it raises
for name in ("SIGHUP", "SIGKILL"):
    delattr(signal, name)
for name in ("sysconf", "sched_getaffinity", "getuid", "uname"):
    delattr(os, name)
for script in ["core", "eval", *{SCRIPTS!r}]:
    importlib.import_module(script)
import core, gpt_scratch
sys.argv = ["gpt_scratch.py", *sys.argv[1:]]
cfg = core.parse_config(gpt_scratch.Config, gpt_scratch.PRESETS, gpt_scratch.SMOKE, gpt_scratch.__doc__)
with core.distributed(cfg.backend) as world:
    gpt_scratch.main(cfg, world)
"""
SHORT = ["--smoke", "--max_steps", "2", "--max_documents", "20", "--sample_tokens", "0"]


def test_every_script_is_imported_and_built_in_data_are_trained_on():
    command = [sys.executable, "-c", LACKS, *SHORT, "--out", "out"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TOKEN_CACHE": "cache"})
    assert done.returncode == 0, done.stderr
    assert "test/loss" in done.stdout or "test loss" in done.stdout, done.stdout
