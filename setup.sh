#!/usr/bin/env bash
# The one way to get an environment:
#   bash setup.sh            makes .venv (or $VENV) and installs what is missing
#   bash setup.sh CMD ...    the same, then runs CMD in it; nothing to do costs a few milliseconds
set -euo pipefail
TORCH=2.13.0 # where there is no torch >= 2.6 that can use this machine's GPU
WHEELS=https://download.pytorch.org/whl
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${VENV:-$here/.venv} python=${PYTHON:-python3} gpu=cpu
fail() { echo "setup.sh: $1" >&2; exit 1; }
if [[ $(nvidia-smi -L 2>/dev/null || true) == *GPU* ]]; then gpu=cuda; fi

torch_fits() { # $1: a python. Has it a torch >= 2.6, one that can use the GPU if there is one?
    "$1" - "$gpu" 2>/dev/null <<'PY'
import sys, torch
version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
sys.exit(version < (2, 6) or (sys.argv[1] == "cuda" and not torch.cuda.is_available()))
PY
}

misfit() { # never silent CPU training on a paid box
    if [ "$gpu" = cpu ]; then echo "the torch in $venv is older than 2.6: remove $venv and run again"; return; fi
    local driver cuda wheel
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -1)
    cuda=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9.]*\).*/\1/p' | head -1)
    wheel=$(awk -v v="${cuda:-0}" 'BEGIN { split(v, n, "."); v = n[1] * 100 + n[2]
        print (v >= 1208 ? "cu128" : v >= 1206 ? "cu126" : v >= 1204 ? "cu124" : v >= 1108 ? "cu118" : "none") }')
    echo "torch cannot use the GPU that nvidia-smi shows: driver $driver supports CUDA ${cuda:-?}; type" \
        "$venv/bin/pip install --force-reinstall 'torch>=2.6' --index-url $WHEELS/$wheel" \
        "(no such wheel, or none: update the driver), then run again"
}

install() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "needs Python 3.10 or newer: set PYTHON"
    if [ ! -x "$venv/bin/python" ]; then
        local site=
        if torch_fits "$python"; then site=--system-site-packages; fi # the image ships one: do not fetch another
        "$python" -m venv $site "$venv" || fail "$python -m venv failed: install python3-venv, or set PYTHON"
    fi
    if ! "$venv/bin/pip" show -q torch 2>/dev/null; then
        echo "installing torch $TORCH ($gpu) into $venv" >&2
        # the default Linux wheel brings gigabytes of CUDA: without a GPU ask for the CPU build first
        { [ "$gpu" = cpu ] && [ "$(uname -s)" = Linux ] && "$venv/bin/pip" install -qq --no-deps --retries 2 \
            "torch==$TORCH+cpu" --extra-index-url "$WHEELS/cpu" 2>/dev/null; } ||
            "$venv/bin/pip" install -q "torch==$TORCH"
    fi
    "$venv/bin/pip" install -qq -r "$here/requirements.txt" # torch's own needs come along
    torch_fits "$venv/bin/python" || fail "$(misfit)"
}

stamp="$gpu $TORCH $(cksum <"$here/requirements.txt")"
if [ ! -x "$venv/bin/python" ] || [ "$(cat "$venv/.installed" 2>/dev/null)" != "$stamp" ]; then
    install
    echo "$stamp" >"$venv/.installed"
fi
if [ $# -eq 0 ]; then echo "ready: bash setup.sh python run_preference.py --smoke"; exit; fi
VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH exec "$@"
