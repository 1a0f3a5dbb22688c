# Sourced by demo.sh and test.sh. Afterwards $repository is the clone and $venv a virtual environment in which
# paddle_moe, as it is in the clone, is installed with all it needs. Steps that are done already are skipped.
#
#   PADDLE_MOE_VENV   where the environment is made (default: .venv in the clone)
#   PYTHON            the Python it is made from (default: python3)
#   PADDLE_MOE_CUDA   1: with the CUDA back end; see setup.py for this and related variables
#   requirements      what is installed into it: arguments of `pip install` (default: Paddle and the tools)
#   requirements_only not empty: paddle_moe is left out
set -euo pipefail

# Another environment must not leak into this one.
unset PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE VIRTUAL_ENV PIP_TARGET PIP_PREFIX PIP_ROOT
export PYTHONNOUSERSITE=1 PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${PADDLE_MOE_VENV:-$repository/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac

step() { printf '== %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

make_venv() {
  local python=${PYTHON:-python3}
  command -v "$python" >/dev/null || fail "no '$python' found: install Python 3.9 or newer, or set PYTHON"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' ||
    fail "$("$python" --version) is too old: set PYTHON to Python 3.9 or newer"
  if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    if [ -n "${PYTHON:-}" ]; then
      local version='import sys; print(*sys.version_info[:2])'
      [ "$("$python" -c "$version")" = "$("$venv/bin/python" -c "$version")" ] ||
        fail "$venv was made from another Python than $python: remove it, or set PADDLE_MOE_VENV"
    fi
    return
  fi
  if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
    fail "$venv is no virtual environment: set PADDLE_MOE_VENV to a new directory"
  fi
  step "making the virtual environment $venv from $("$python" --version)"
  if "$python" -c 'import ensurepip' 2>/dev/null; then
    "$python" -m venv --clear "$venv"
  else  # Debian packages ensurepip apart; the pip outside can fill the new environment
    "$python" -m venv --clear --without-pip "$venv"
    "$python" -m pip --python "$venv/bin/python" install -qq pip ||
      fail "cannot put pip into $venv: install python3-venv (Debian, Ubuntu), or set PYTHON to another Python"
  fi
}

# once STAMP KEY WHAT COMMAND...: runs COMMAND unless it succeeded in this environment for the same KEY.
once() {
  local stamp=$venv/.paddle_moe_$1 key=$2 what=$3
  shift 3
  if [ "$(cat "$stamp" 2>/dev/null)" != "$key" ]; then
    step "$what"
    rm -f "$stamp"
    "$@"
    printf '%s\n' "$key" >"$stamp"
  fi
}

# Errors only. Python compiles what it imports; compiling all of every package takes as long as the rest.
pip_install() { "$venv/bin/python" -m pip install -qq --no-compile "$@"; }

install_package() {
  command -v "${CXX:-g++}" >/dev/null || fail "no ${CXX:-g++} found: install g++"
  "$venv/bin/python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
    fail "Python.h not found: install Python's headers (Debian, Ubuntu: apt-get install python3-dev)"
  rm -rf "$repository"/build/paddle-*/lib*  # else a module that was deleted from the clone would be installed
  # The version says nothing about the sources: pip must replace what is installed.
  pip_install --no-build-isolation --no-deps --force-reinstall "$repository"
  # Inside the clone Python finds the clone's own package first; the same objects make that one whole too.
  (cd "$repository" && "$venv/bin/python" setup.py -q build_ext --inplace >/dev/null 2>&1) ||
    fail "python setup.py build_ext --inplace failed: run it to see why"
}

[ -n "${requirements+set}" ] || requirements=("paddlepaddle>=2.6.2,<3.4" "setuptools>=77" wheel
  "pybind11>=2.11" numpy "safetensors>=0.7" matplotlib rich pytest pytest-timeout hypothesis ruff "cmake>=3.18")
# They take the machine code apart that a build with CUDA has to contain.
[ "${PADDLE_MOE_CUDA:-}" != 1 ] || requirements+=(nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)

make_venv
once requirements "${requirements[*]}" "installing Paddle and the tools (about 250 MB the first time)" \
  pip_install "${requirements[@]}"
[ -z "${requirements_only:-}" ] || return 0
sources=$(cd "$repository" &&
  find csrc paddle_moe setup.py pyproject.toml scripts/strict_nvcc.py \
    -type f ! -name '*.so' ! -name '*.pyc' -print0 |
  LC_ALL=C sort -z | xargs -0 cksum | cksum)
options="${PADDLE_MOE_CUDA:-} ${PADDLE_MOE_CUDA_ARCHS:-} ${PADDLE_MOE_STRICT_NVCC:-} ${CUDA_HOME:-} ${CXX:-}"
once sources "$sources $options" \
  "compiling and installing paddle_moe (some minutes the first time)" install_package
