"""Weights in the order in which the CPU kernels read them, as mixture_of_experts takes them prepacked.

The outputs of a matrix stand in panels of 16, the last completed with zeros, and each panel is one run of
memory, row after row. A row is one input, in bfloat16 two, which stand side by side in each output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import paddle

from paddle_moe._options import at_least, dtype_name, flag, type_name

__all__ = ["prepack_weights", "unpack_weights"]

PANEL = 16


def _inputs_of_row(dtype: paddle.dtype) -> int:
    return 2 if dtype_name(dtype) == "bfloat16" else 1


def _expect(name: str, weight: paddle.Tensor, ndims: tuple[int, ...], shape: str) -> None:
    if not isinstance(weight, paddle.Tensor):
        raise ValueError(f"{name} must be a paddle.Tensor, got {type_name(weight)}")
    if weight.ndim not in ndims or dtype_name(weight.dtype) not in ("float32", "bfloat16", "float16"):
        raise ValueError(
            f"{name} must be float32, bfloat16 or float16 with the shape {shape}, got "
            f"{dtype_name(weight.dtype)} {list(weight.shape)}"
        )


def check_inputs(name: str, dtype: paddle.dtype, inputs: int) -> None:
    """A ValueError where a weight with so many inputs cannot be prepacked."""
    if inputs % _inputs_of_row(dtype):
        raise ValueError(
            f"{name} must have an even number of inputs in bfloat16, where a row of a panel holds two, got "
            f"{inputs}"
        )


def _exactly(function: Callable[..., paddle.Tensor]) -> Callable[..., paddle.Tensor]:
    """Without a graph, and without auto_cast, within which Paddle's assignments return float32."""

    @functools.wraps(function)
    def run(*arguments, **options):
        with paddle.no_grad(), paddle.amp.auto_cast(enable=False):
            return function(*arguments, **options)

    return run


def expect_cpu(name: str, weight: paddle.Tensor) -> None:
    """A RuntimeError where a weight is on a GPU, whose kernels read it in another order."""
    if weight.place.is_gpu_place():
        raise RuntimeError(
            f"{name} is on {weight.place}, where no back end takes prepacked weights; move it to the CPU "
            "first"
        )


def prepack_weights(weight: paddle.Tensor, *, parts: int, permuted: bool = False) -> paddle.Tensor:
    """Puts the weights of experts in the order in which the CPU kernels read them, so that no call has to.

    For serving: calls take less time, most of all those of some tens of tokens, and give the same bits as
    those of weights stored [in, out]. Prepacked weights have no gradient, and no GPU takes them.

    Args:
        weight: [E, in, out], or [in, out] of a single expert; float32, bfloat16 or float16. In bfloat16 the
            inputs must be even in number.
        parts: 2 for gate and up side by side, so that no panel holds columns of both; 1 for one of them, or
            for down. The operator cannot tell a wrong one from the shape, which rounds the outputs up.
        permuted: `weight` is transposed, [..., out, in].

    Returns:
        [E, parts * ceil(out / parts / 16), in, 16], in bfloat16 [..., in / 2, 32], with E = 1 for a single
        expert: what to pass to :func:`paddle_moe.mixture_of_experts`, stacked or as one of a list.

    Raises:
        ValueError: another dtype or rank, an odd number of bfloat16 inputs, `parts` that do not divide out.
    """
    flag("permuted", permuted)
    at_least(1)("parts", parts)
    _expect("weight", weight, (2, 3), "[E, out, in]" if permuted else "[E, in, out]")
    return prepack_stack(weight if weight.ndim == 3 else weight.unsqueeze(0), parts, permuted)


def expect_dtype_of_prepacked(dtype: paddle.dtype, wanted: paddle.dtype, since: str) -> None:
    """A ValueError where prepacked weights would have to become another dtype, whose panels are others."""
    if dtype_name(dtype) != dtype_name(wanted):
        raise ValueError(
            f"the expert weights are prepacked in {dtype_name(dtype)} since {since}, so they do not compute "
            f"in {dtype_name(wanted)}, the dtype of auto_cast; convert them to it before that"
        )


@_exactly
def prepack_stack(
    weight: paddle.Tensor,
    parts: int,
    permuted: bool = False,
    order: Callable[[paddle.Tensor], paddle.Tensor] | None = None,
) -> paddle.Tensor:
    """The same of [E, in, out], one expert at a time for the sake of memory.

    `order` puts the columns of an expert in the operator's order.
    """
    outputs, inputs = weight.shape[1:] if permuted else weight.shape[:0:-1]
    check_inputs("weight", weight.dtype, inputs)
    if outputs % parts:
        raise ValueError(f"weight must have a multiple of parts = {parts} outputs, got {outputs}")
    panels = [parts * -(-(outputs // parts) // PANEL), *_row_shape(weight.dtype, inputs)]
    prepacked = paddle.empty([weight.shape[0], *panels], weight.dtype)
    for number, one in enumerate(weight):
        if one.size:
            one = order(one) if order else one
            prepacked[number] = _panels(one if permuted else one.t(), parts).reshape(panels)
    return prepacked


def _row_shape(dtype: paddle.dtype, inputs: int) -> list[int]:
    of_row = _inputs_of_row(dtype)
    return [inputs // of_row, PANEL * of_row]


def _panels(weight: paddle.Tensor, parts: int) -> paddle.Tensor:
    """[out, in] as [panels, rows, 16 outputs, inputs of a row]."""
    outputs, inputs = weight.shape
    of_row = _inputs_of_row(weight.dtype)
    weight = weight.reshape([parts, outputs // parts, inputs])
    missing = -(outputs // parts) % PANEL
    if missing:
        weight = paddle.concat([weight, paddle.zeros([parts, missing, inputs], weight.dtype)], 1)
    return weight.reshape([-1, PANEL, inputs // of_row, of_row]).transpose([0, 2, 1, 3])


@_exactly
def unpack_weights(
    weight: paddle.Tensor, outputs: int, *, parts: int, permuted: bool = False
) -> paddle.Tensor:
    """The reverse of :func:`prepack_weights`: [E, in, out], or [E, out, in] with `permuted`.

    Args:
        weight: what prepack_weights returned.
        outputs: out, which the panels round up. parts: as there.

    Raises:
        ValueError: `weight` is not prepacked, or has panels for another number of outputs.
    """
    flag("permuted", permuted)
    at_least(1)("parts", parts)
    at_least(1)("outputs", outputs)
    _expect("weight", weight, (4,), "[E, panels, rows, 16 or 32]")
    of_row = _inputs_of_row(weight.dtype)
    experts, panels, rows, width = weight.shape
    if width != PANEL * of_row or panels != parts * -(-(outputs // parts) // PANEL) or outputs % parts:
        raise ValueError(
            f"weight must have the shape [E, {parts} * ceil({outputs} / {parts} / {PANEL}), rows, "
            f"{PANEL * of_row}], got {list(weight.shape)}"
        )
    inputs = rows * of_row
    shape = [experts, outputs, inputs] if permuted else [experts, inputs, outputs]
    unpacked = paddle.empty(shape, weight.dtype)
    for number, one in enumerate(weight):
        if one.size:
            one = one.reshape([panels, rows, PANEL, of_row]).transpose([0, 2, 1, 3])
            one = one.reshape([parts, -1, inputs])[:, : outputs // parts].reshape([outputs, inputs])
            unpacked[number] = one if permuted else one.t()
    return unpacked
