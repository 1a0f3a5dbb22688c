"""Runs pytest with another build of paddle_moe._core: run_tests.py path/to/_core.so [arguments of pytest]."""

from __future__ import annotations

import importlib.util
import sys

import pytest

if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("paddle_moe._core", sys.argv[1])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.exit(pytest.main(sys.argv[2:]))
