#!/usr/bin/env bash
# Runs the tests on the installed package. Does all its own set-up. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
step "running the tests"
cd "$repository"
exec "$venv/bin/pytest" "$@"  # `python -m pytest` would put the clone before the installed package
