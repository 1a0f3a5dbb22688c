#!/usr/bin/env bash
# Runs the tests of the models of other packages, each package in an environment of its own, which it makes.
# Arguments name the environments by their files in constraints/: paddlenlp and paddleformers by default;
# paddlenlp-2.8 for the older PaddleNLP. Options for pytest go into PYTEST_ADDOPTS.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ $# -gt 0 ] || set -- paddlenlp paddleformers

for environment in "$@"; do
  (
    constraints=$repository/constraints/$environment.txt
    [ -e "$constraints" ] || { echo "error: no $constraints" >&2; exit 1; }
    PADDLE_MOE_VENV=${PADDLE_MOE_VENV:-$repository/.venv}-$environment
    requirements=(--constraint "$constraints" paddlepaddle "${environment%%-*}" "setuptools>=61" wheel
      "pybind11>=2.11" pytest pytest-timeout hypothesis)
    source "$repository/scripts/setup_venv.sh"
    step "running the tests of $environment"
    cd "$repository"
    "$venv/bin/pytest" tests/integrations
  )
done
