#!/usr/bin/env bash
# Creates .venv with segtrain and its test dependencies. Does nothing if it is up to date.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/.segtrain-setup
wanted=$(cat pyproject.toml scripts/constraints.txt scripts/setup.sh | cksum)
if [ -x .venv/bin/segtrain ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi

version_ok='import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'
install=(-e '.[dev]' -c scripts/constraints.txt)
if command -v uv >/dev/null; then
  if ! [ -x .venv/bin/python ] || ! .venv/bin/python -c "$version_ok"; then
    uv venv --clear --python '>=3.11,<3.14' .venv
  fi
  uv pip install --python .venv/bin/python "${install[@]}"
else
  python=
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
    # A name on the PATH may be a shim for a version that is not installed, so run it.
    if [ -n "$candidate" ] && "$candidate" -c "$version_ok" 2>/dev/null; then
      python=$candidate
      break
    fi
  done
  if [ -z "$python" ]; then
    echo 'error: no Python 3.11, 3.12 or 3.13 found; install one or set PYTHON=/path/to/python3' >&2
    exit 2
  fi
  if ! [ -x .venv/bin/pip ] || ! .venv/bin/python -c "$version_ok"; then
    if ! "$python" -m venv --clear .venv; then
      echo 'error: cannot create .venv; on Debian or Ubuntu run: apt-get install python3-venv' >&2
      exit 2
    fi
  fi
  echo 'installing torch and the rest into .venv (several GB with CUDA; once) ...'
  .venv/bin/pip install --quiet --disable-pip-version-check "${install[@]}"
fi
echo "$wanted" >"$stamp"
