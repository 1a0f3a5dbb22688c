#!/usr/bin/env bash
# Runs the tests of the models of other packages, each package in an environment of its own, which it makes.
# Arguments name the environments by the extras in pyproject.toml; all of them by default. paddlenlp@3.0.0 is that
# extra on another Paddle than the newest. Options for pytest go into PYTEST_ADDOPTS. requirements_only=1 makes the
# environments and stops.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ $# -gt 0 ] || set -- paddlenlp paddlenlp2 paddleformers

extra() {  # what pip installs for it, one a line
  "${PYTHON:-python3}" -c 'import sys
try:
    import tomllib
except ImportError:
    from pip._vendor import tomli as tomllib
with open(sys.argv[1], "rb") as file:
    print(*tomllib.load(file)["project"]["optional-dependencies"][sys.argv[2]], sep="\n")' \
    "$repository/pyproject.toml" "$1"
}

make_environment() {
  packages=$(extra "${1%@*}")
  paddle=3.3.1
  case $1 in *@*) paddle=${1#*@} ;; esac
  case $paddle in 2.*) packages+=" numpy<2" ;; esac
  PADDLE_MOE_VENV=${PADDLE_MOE_VENV:-$repository/.venv}-$1
  requirements=(paddlepaddle==$paddle $packages "setuptools>=77" wheel "pybind11>=2.11" pytest pytest-timeout
    hypothesis)
  source "$repository/scripts/setup_venv.sh"
}

installs=()
for environment in "$@"; do
  (requirements_only=1; make_environment "$environment") &
  installs+=($!)
done
for install in "${installs[@]}"; do wait "$install"; done
[ -z "${requirements_only:-}" ] || exit 0

failed=()
for environment in "$@"; do
  # Not `( ... ) || ...`, within which errors would not end it.
  set +e
  (
    set -e
    make_environment "$environment"
    step "running the tests of $environment"
    cd "$repository"
    tests=tests/integrations
    case $environment in  # the others start the same blocks again
      paddlenlp2* | *@*) tests+=/test_paddlenlp.py ;;
    esac
    "$venv/bin/pytest" "$tests"
  )
  [ $? = 0 ] || failed+=("$environment")
  set -e
done
[ ${#failed[@]} = 0 ] || { printf 'error: failed in %s\n' "${failed[*]}" >&2; exit 1; }
