#!/usr/bin/env bash
# Runs a selection of the tests with other versions than those in .venv. Arguments select the
# environments; the default is all of them:
#   lowest       Python 3.11 and the lowest versions that pyproject.toml allows
#   torch2.11    Python 3.12 and torch 2.11, which many GPU machines have
#   python3.13   the versions of scripts/constraints.txt
# Each is built in .venv-versions/ (8 GB) and deleted after its tests pass.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh

files=(tests/{test_checkpoint,models/test_models,training/test_step,data/test_mask_folder,e2e/test_end_to_end,prediction/test_predict,prediction/test_video}.py)
# These depend on torch and Triton, whose versions are the same in python3.13 and in .venv.
kernels=(tests/{models/test_dense_block,models/test_dense_layer_triton,runtime/test_devices}.py)
# Slow tests that do not depend on versions.
excluded='learns_the_toy_people or solves_a_separable or bomb or kill or full_size'
work=.venv-versions
export UV_CACHE_DIR=$PWD/$work/cache

find_python() { # version
  local candidate
  for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
    # A name on the PATH may be a shim for a version that is not installed, so run it.
    if "$candidate" -c 'import sys; print(sys.executable)' 2>/dev/null; then return; fi
  done
  echo "error: no Python $1 found; install it, e.g. with: .venv/bin/uv python install $1" >&2
  exit 2
}

test_with() { # environment, Python version, constraints file, further tests
  local python=$work/$1/bin/python base
  base=$(find_python "$2")
  printf '\n== %s\n' "$1"
  .venv/bin/uv venv --quiet --clear --python "$base" "$work/$1"
  .venv/bin/uv pip install --quiet --python "$python" -e '.[dev]' -c "$3"
  "$python" -c 'import platform, av, numpy, torch, torchvision
print("Python", platform.python_version(), *(f"{m.__name__} {m.__version__}" for m in (torch, torchvision, numpy, av)))'
  PYTHON=$python bash scripts/pytest.sh -q -k "not ($excluded)" "${files[@]}" "${@:4}"
  rm -rf "$work"
}

if [ $# -eq 0 ]; then set -- lowest torch2.11 python3.13; fi
for environment in "$@"; do
  mkdir -p "$work"
  case $environment in
    lowest) test_with lowest 3.11 scripts/constraints-lowest.txt "${kernels[@]}" ;;
    torch2.11)
      # The interpreter of Triton 3.6, which torch 2.11 requires, fails with numpy 2.4.
      sed 's/^torch==.*/torch==2.11.0/; s/^torchvision==.*/torchvision==0.26.0/; s/^numpy==.*/numpy==2.3.5/' \
        scripts/constraints.txt >"$work/torch2.11.txt"
      test_with torch2.11 3.12 "$work/torch2.11.txt" "${kernels[@]}"
      ;;
    python3.13) test_with python3.13 3.13 scripts/constraints.txt ;;
    *) echo "error: unknown environment $environment; use lowest, torch2.11 or python3.13" >&2 && exit 2 ;;
  esac
done
