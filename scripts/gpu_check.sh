#!/usr/bin/env bash
# Builds, tests and times the CUDA back end on a machine with a GPU, and writes one JSON file. Needs a CUDA
# toolkit, g++, cmake, and a Python with its headers, pybind11, torch, triton, numpy, pytest, pytest-timeout
# and hypothesis; neither Paddle nor a network. Arguments go to scripts/gpu_check.py; see --help.
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_check.py" "$@"
