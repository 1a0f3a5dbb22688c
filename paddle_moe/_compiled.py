"""The compiled module of the kernels, or what to do where there is none. Imports nothing else."""

from __future__ import annotations

BUILD_HINT = (
    "build with `pip install --no-build-isolation .`; in a clone, whose paddle_moe/ hides the installed one,"
    " work outside the clone or run `python setup.py build_ext --inplace`"
)

try:
    from paddle_moe import _core
except ImportError as error:
    raise RuntimeError(
        f"the compiled module paddle_moe._core cannot be imported ({error}); {BUILD_HINT}"
    ) from error

__all__ = ["BUILD_HINT", "_core"]
