#!/usr/bin/env bash
# Runs the linter, the type checker and the tests. Arguments go to pytest, e.g. -k metrics.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec bash scripts/pytest.sh "$@"
