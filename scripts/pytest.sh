#!/usr/bin/env bash
# Runs pytest on all cores, one process and one thread each. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export OMP_NUM_THREADS=1
exec "${PYTHON:-.venv/bin/python}" -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
