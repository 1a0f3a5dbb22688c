"""The compiled module of the kernels, or what to do where there is none. Imports nothing else."""

from __future__ import annotations

BUILD_HINT = (
    "build with `pip install --no-build-isolation .`; in a clone, whose paddle_moe/ hides the installed one,"
    " work outside the clone or run `python setup.py build_ext --inplace`"
)

try:
    import paddle_moe._core as _core  # `from paddle_moe` would blame a circular import
except ImportError as error:
    if isinstance(error, ModuleNotFoundError) and error.name == "paddle_moe._core":
        raise RuntimeError(f"the compiled module paddle_moe._core is missing; {BUILD_HINT}") from None
    raise RuntimeError(
        f"the compiled module paddle_moe._core cannot be imported ({error}); {BUILD_HINT}"
    ) from error

__all__ = ["BUILD_HINT", "_core"]
