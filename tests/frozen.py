"""The last that the server of forks imports (ranks.py): what it holds then is no child's garbage. Else each
child looks through it, and so copies its pages: half a second a process, at exit alone.
"""

import gc

gc.collect()
gc.freeze()
