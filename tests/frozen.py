"""The last that the server of forks imports (ranks.py): what it holds then is no child's garbage. Else each
child looks through it, and so copies its pages: half a second a process, at exit alone. What each child would
make for itself, always the same, is made here once.
"""

import gc
import importlib
import io

from matplotlib.figure import Figure
from ranks import SCRIPTS
from transformers import AutoTokenizer  # noqa: F401 (imported lazily, by each run)

from lab.data import builtin
from lab.run import flags, provenance

for script in (*SCRIPTS, "eval"):
    flags._comments(importlib.import_module(script).Config)
provenance._versions()
builtin.built_in_problems()
figure = Figure(layout="constrained")
figure.subplots().set(title="fonts", xlabel="are looked for", ylabel="and read once")
figure.savefig(io.BytesIO())
gc.collect()
gc.freeze()
