"""What _core needs from the library of a CUDA array: its current stream and device, and new arrays there."""

from __future__ import annotations

import sys
from typing import Any


def _library(array: Any) -> str:
    name = type(array).__module__.partition(".")[0]
    if name not in ("torch", "cupy"):
        raise ValueError(
            "the first argument of a call on a GPU must be a PyTorch or CuPy array, whose library says what "
            f"the current stream is, got {type(array).__module__}.{type(array).__name__}"
        )
    return name


def current_stream(array: Any) -> int:
    """The handle (cudaStream_t) of the stream that the library of `array` uses on the device of `array`."""
    if _library(array) == "torch":
        return sys.modules["torch"].cuda.current_stream(array.device).cuda_stream
    return sys.modules["cupy"].cuda.get_current_stream(array.device.id).ptr


def export(first: Any, array: Any, stream: int) -> Any:
    """The DLPack capsule of `array`; PyTorch exports none of a device that is not its current one."""
    device = first.device if _library(first) == "cupy" else sys.modules["torch"].cuda.device(first.device)
    with device:
        return array.__dlpack__(stream=stream)


def empty(array: Any, dtype: str, shape: list[int]) -> Any:
    """A new array beside `array`, whose memory belongs to the current stream. `dtype`: a name of NumPy's."""
    if _library(array) == "torch":
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=array.device)
    with array.device:
        # CuPy has bfloat16 only through the dtype object of an array that has it.
        return sys.modules["cupy"].empty(shape, array.dtype if dtype == "bfloat16" else dtype)
