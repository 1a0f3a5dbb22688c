#!/usr/bin/env bash
# Runs the tests of the models of other packages, each package in an environment of its own, which it makes.
# Arguments name the environments by their files in constraints/: paddlenlp and paddleformers by default;
# paddlenlp-2.8 for the older PaddleNLP. Options for pytest go into PYTEST_ADDOPTS.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ $# -gt 0 ] || set -- paddlenlp paddleformers

make_environment() {
  constraints=$repository/constraints/$1.txt
  [ -e "$constraints" ] || { echo "error: no $constraints" >&2; exit 1; }
  PADDLE_MOE_VENV=${PADDLE_MOE_VENV:-$repository/.venv}-$1
  requirements=(--constraint "$constraints" paddlepaddle "${1%%-*}" "setuptools>=61" wheel
    "pybind11>=2.11" pytest pytest-timeout hypothesis)
  source "$repository/scripts/setup_venv.sh"
}

installs=()
for environment in "$@"; do
  (requirements_only=1; make_environment "$environment") &
  installs+=($!)
done
for install in "${installs[@]}"; do wait "$install"; done

for environment in "$@"; do
  (
    make_environment "$environment"
    step "running the tests of $environment"
    cd "$repository"
    "$venv/bin/pytest" tests/integrations
  )
done
