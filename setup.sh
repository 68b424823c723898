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
# asked of the drivers' own tools: /dev/dri is there for any screen
if [[ $(nvidia-smi -L 2>/dev/null || true) == *GPU* ]]; then gpu=cuda
elif [[ $(rocminfo 2>/dev/null || true) == *gfx* ]]; then gpu=rocm
elif [[ $(xpu-smi discovery 2>/dev/null || true) == *"Device Name"* ]]; then gpu=xpu; fi

torch_fits() { # $1: a python. Has it a torch >= 2.6, one that can use the GPU if there is one?
    "$1" - "$gpu" 2>/dev/null <<'PY'
import sys, torch
version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
kind = {"rocm": "cuda"}.get(sys.argv[1], sys.argv[1])  # torch calls AMD's cards cuda, too
if (2, 6) <= version < (2, 13):
    print("this torch's torchrun knows no --shutdown-timeout: leave it out where README.md and docs/ have it")
sys.exit(version < (2, 6) or (kind != "cpu" and not getattr(torch, kind).is_available()))
PY
}

look() { # driver: what it says of itself; wheel: the newest of torch's builds that it can run, or none
    local cuda rocm
    driver="xpu-smi shows (this user must be in the group render)" wheel=xpu
    if [ "$gpu" = cuda ]; then
        driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -1)
        cuda=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9.]*\).*/\1/p' | head -1)
        driver="nvidia-smi shows: driver $driver supports CUDA ${cuda:-?}"
        wheel=$(newest "$cuda" 13.0:cu130 12.8:cu128 12.6:cu126 12.4:cu124 11.8:cu118)
    elif [ "$gpu" = rocm ]; then
        rocm=$(cat "${ROCM_PATH:-/opt/rocm}/.info/version" 2>/dev/null || true)
        driver="rocminfo shows (this user must be in the groups render and video): ROCm ${rocm:-?}"
        wheel=$(newest "${rocm%%-*}" 7.2:rocm7.2 7.1:rocm7.1 6.4:rocm6.4 6.3:rocm6.3 6.2.4:rocm6.2.4 6.1:rocm6.1)
    fi
}

newest() { # $1: a version; then LEAST:NAME, the newest first. The first name that is not too new
    awk -v have="$1" -v all="${*:2}" 'function number(v, n) { split(v, n, "."); return n[1] * 10000 + n[2] * 100 + n[3] }
        BEGIN { count = split(all, pairs, " ")
            for (i = 1; i <= count; i++) { split(pairs[i], pair, ":")
                if (number(have) >= number(pair[1])) { print pair[2]; exit } }
            print "none" }'
}

misfit() { # never silent CPU training on a paid box
    if [ "$gpu" = cpu ]; then echo "the torch in $venv is older than 2.6: remove $venv and run again"; return; fi
    echo "torch cannot use the GPU that $driver; type" \
        "$venv/bin/pip install --force-reinstall 'torch>=2.6' --index-url $WHEELS/$wheel" \
        "(no such wheel, or none: update the driver), then run again"
}

install_torch() {
    echo "installing torch ($gpu) into $venv" >&2
    # the default Linux wheel brings gigabytes of CUDA: without a GPU ask for the CPU build first
    if [ "$gpu" = cpu ] && [ "$(uname -s)" = Linux ] && "$venv/bin/pip" install -qq --no-deps --retries 2 \
        "torch==$TORCH+cpu" --extra-index-url "$WHEELS/cpu" 2>/dev/null; then return; fi
    case $gpu in # that wheel knows NVIDIA's cards alone
    rocm | xpu) [ "$wheel" != none ] && "$venv/bin/pip" install -q "torch>=2.6" --index-url "$WHEELS/$wheel" || fail "$(misfit)" ;;
    *) "$venv/bin/pip" install -q "torch==$TORCH" ;;
    esac
}

install() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "needs Python 3.10 or newer: set PYTHON"
    if [ ! -x "$venv/bin/python" ]; then
        local site=
        # the image ships one: do not fetch another
        if torch_fits "$python" >/dev/null; then site=--system-site-packages; fi
        "$python" -m venv $site "$venv" || fail "$python -m venv failed: install python3-venv, or set PYTHON"
    fi
    look
    "$venv/bin/pip" show -q torch 2>/dev/null || install_torch
    "$venv/bin/pip" install -qq -r "$here/requirements.txt" # torch's own needs come along
    torch_fits "$venv/bin/python" >&2 || fail "$(misfit)"
}

stamp="$gpu $TORCH $(cksum <"$here/requirements.txt")"
if [ ! -x "$venv/bin/python" ] || [ "$(cat "$venv/.installed" 2>/dev/null)" != "$stamp" ]; then
    install
    echo "$stamp" >"$venv/.installed"
fi
if [ $# -eq 0 ]; then echo "ready: bash setup.sh python run_preference.py --smoke"; exit; fi
VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH exec "$@"
