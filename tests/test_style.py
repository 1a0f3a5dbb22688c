"""Rules for the Python files: those of ruff, in pyproject.toml, and our own."""

from __future__ import annotations

import ast
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


def test_new_tensors_name_their_dtype():
    """Else it is the user's paddle.set_default_dtype."""
    least = {"zeros": 2, "ones": 2, "empty": 2, "full": 3}
    unnamed = []
    for path in (REPOSITORY / "paddle_moe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            of_paddle = isinstance(node.func.value, ast.Name) and node.func.value.id == "paddle"
            named = any(keyword.arg == "dtype" for keyword in node.keywords)
            if of_paddle and not named and len(node.args) < least.get(node.func.attr, 0):
                unnamed.append(f"{path}:{node.lineno}")
    assert not unnamed, unnamed


def test_ruff_finds_nothing():
    ruff = [sys.executable, "-m", "ruff", "check", "--output-format=concise", *OURS]
    result = subprocess.run(ruff, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
