"""Hypothesis profiles and the fixtures shared by the tests of the kernels."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `import checks` works from any directory and import mode

# The same examples on every run and machine; HYPOTHESIS_PROFILE=explore looks for new ones.
hypothesis.settings.register_profile(
    "ci", deadline=None, derandomize=True, max_examples=60, database=None, print_blob=True
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(params=["core", "paddle"])
def backend(request):
    """The same operators through NumPy arrays and through Paddle tensors."""
    import checks

    return checks.Core() if request.param == "core" else checks.Paddle()


@pytest.fixture
def core():
    import checks

    return checks.Core()


@pytest.fixture
def threads():
    """set_num_threads, undone after the test."""
    from paddle_moe import core

    yield core.set_num_threads
    core.set_num_threads(0)
