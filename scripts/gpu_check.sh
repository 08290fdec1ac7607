#!/usr/bin/env bash
# Exercise every CUDA path of the project and compare it with the CPU; options go to gpu_check.py (--help shows them).
# Needs the packages, not an installation: PYTHON names the interpreter, else .venv's, else python3.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -W ignore scripts/gpu_check.py "$@"
