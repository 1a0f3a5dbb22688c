#!/usr/bin/env bash
# A mixture of experts over four processes, on real text, compared with the dense model. Does all its own
# set-up. Arguments go to scripts/demo.py; see scripts/demo.sh --help.
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
step "running the demo"
exec "$venv/bin/python" "$repository/scripts/demo.py" "$@"
