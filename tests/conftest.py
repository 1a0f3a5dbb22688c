"""Hypothesis profiles and the fixtures shared by the tests of the kernels."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `import checks` works from any directory and import mode
try:
    import checks  # noqa: E402

    from paddle_moe import core  # noqa: F401
except (ModuleNotFoundError, RuntimeError) as error:
    sys.exit(f"the tests cannot start: {error}; scripts/test.sh installs and compiles what they need")

# The same examples on every run and machine; HYPOTHESIS_PROFILE=explore looks for new ones.
hypothesis.settings.register_profile(
    "ci", deadline=None, derandomize=True, max_examples=60, database=None, print_blob=True
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def same_draws_on_every_run():
    """Paddle seeds its generators differently in every process; PADDLE_MOE_TEST_SEED chooses other draws."""
    if "paddle" in sys.modules:
        sys.modules["paddle"].seed(int(os.environ.get("PADDLE_MOE_TEST_SEED", "0")))


# On a machine with a GPU the tests of the operators run there too; `-k cuda` chooses those.
_CORES = ["core"] if checks.why_not_cuda() else ["core", "cuda"]


def _caller(name: str):
    if name == "paddle":
        pytest.importorskip("paddle")
        return checks.Paddle()
    return checks.Cuda() if name == "cuda" else checks.Core()


@pytest.fixture(params=[*_CORES, "paddle"])
def backend(request):
    """The same operators through NumPy arrays, on a GPU, and through Paddle tensors."""
    return _caller(request.param)


@pytest.fixture(params=_CORES)
def core(request):
    """The operators without Paddle."""
    return _caller(request.param)


@pytest.fixture
def threads():
    """set_num_threads, undone after the test."""
    from paddle_moe import core

    yield core.set_num_threads
    core.set_num_threads(0)
