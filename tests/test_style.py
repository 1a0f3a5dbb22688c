"""What ruff says about the Python files, by the rules in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
OURS = [
    "benchmarks",
    "examples",
    "paddle_moe",
    "scripts",
    "setup.py",
    "tests",
]  # virtual environments are not


def test_ruff_finds_nothing():
    ruff = [sys.executable, "-m", "ruff", "check", "--output-format=concise", *OURS]
    result = subprocess.run(ruff, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
