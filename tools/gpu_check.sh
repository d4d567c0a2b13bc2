#!/usr/bin/env bash
# Tests and figures of one GPU in under ten minutes; writes docs/gpu-results.md (docs/gpu.md, "First ten minutes").
#
#   tools/gpu_check.sh [flags of benchmarks/gpu_check.py]
#   tools/gpu_check.sh --dry        the same steps at tiny sizes on a CPU
#
# PYTHON   the Python to use (default: that of .venv, else python3)
# OUT      folder of logs and JSON (default: runs/gpu_check)
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi
exec "$PYTHON" benchmarks/gpu_check.py --out "${OUT:-runs/gpu_check}" "$@"
