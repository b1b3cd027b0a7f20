#!/usr/bin/env bash
# Lint, types and tests: what CI runs. Arguments go to pytest, e.g. scripts/test.sh -k metrics.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest "$@"
