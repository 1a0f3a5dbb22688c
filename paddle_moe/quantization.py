"""8-bit weights for inference, as mixture_of_experts takes them with gate_up_scale and down_scale.

A weight is its 8-bit number times a scale, which stands for the whole matrix, an output channel, a group of
128 input channels of an output channel, or a block of 128 x 128. Nothing else is quantised: activations stay
as they are, and products accumulate in float32.
"""

from __future__ import annotations

import paddle

from paddle_moe._options import at_least, dtype_name, flag, one_of

__all__ = ["quantize"]

GROUP = 128
# The largest number of each dtype.
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
# The input and the output channels that share a scale; None: all of them.
GRANULARITIES = {"tensor": (None, None), "channel": (None, 1), "group": (GROUP, 1), "block": (GROUP, GROUP)}


def check_options(dtype: str | paddle.dtype, granularity: str) -> str:
    """The name of `dtype`; a ValueError if it or `granularity` is none that quantize() has."""
    name = one_of(*LARGEST)("dtype", dtype_name(dtype))
    one_of(*GRANULARITIES)("granularity", granularity)
    if name != "int8" and not hasattr(paddle, name):
        raise ValueError(f"dtype {name!r} needs a later Paddle than {paddle.__version__}; use 'int8'")
    return name


def quantize(
    weight: paddle.Tensor,
    dtype: str | paddle.dtype = "int8",
    granularity: str = "channel",
    *,
    permuted: bool = False,
    parts: int = 1,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Rounds weights to 8 bits, symmetrically: the largest of each group becomes 127, or 448 in fp8.

    Args:
        weight: [..., in, out], float32, bfloat16 or float16; all of it finite.
        dtype: "int8" or "float8_e4m3fn" (Micikevicius et al., "FP8 Formats for Deep Learning", 2022).
        granularity: what shares a scale: "tensor", a matrix; "channel", a column of it; "group", 128
            neighbours in a column; "block", 128 x 128 (as in DeepSeek-V3).
        permuted: `weight` and both results are transposed, [..., out, in].
        parts: 2 for gate and up side by side: no block then holds columns of both.

    Returns:
        The quantised weight, in the shape of `weight`, and its scales, float32 [..., groups of in, groups of
        out]: what to pass as weights and scale to :func:`paddle_moe.mixture_of_experts`.

    Raises:
        ValueError: `weight` is not finite, has another dtype or less than two dimensions; an unknown option.
    """
    dtype = check_options(dtype, granularity)
    flag("permuted", permuted)
    if not isinstance(weight, paddle.Tensor):
        raise ValueError(f"weight must be a paddle.Tensor, got {type(weight).__name__}")
    if weight.ndim < 2 or dtype_name(weight.dtype) not in ("float32", "bfloat16", "float16"):
        raise ValueError(
            "weight must be float32, bfloat16 or float16 with the shape [..., in, out], got "
            f"{dtype_name(weight.dtype)} {list(weight.shape)}"
        )
    at_least(1)("parts", parts)
    with paddle.no_grad():
        if parts == 1 or granularity != "block":
            return _quantize(weight, dtype, granularity, permuted)
        axis = weight.ndim - (2 if permuted else 1)
        pieces = [_quantize(piece, dtype, granularity, permuted) for piece in weight.chunk(parts, axis)]
        # Paddle cannot join fp8.
        joined = paddle.concat([quantised.view("uint8") for quantised, _ in pieces], axis).view(dtype)
        return joined, paddle.concat([scale for _, scale in pieces], axis)


def _quantize(
    weight: paddle.Tensor, dtype: str, granularity: str, permuted: bool
) -> tuple[paddle.Tensor, paddle.Tensor]:
    weight = weight.astype("float32")
    sizes = weight.shape[-2:]
    shared = GRANULARITIES[granularity][::-1] if permuted else GRANULARITIES[granularity]
    group = [max(1, size if count is None else min(count, size)) for size, count in zip(sizes, shared)]
    largest = _largest_of_groups(weight.abs(), group)
    if not bool(paddle.isfinite(largest).all()):
        raise ValueError("weight must be finite, got infinity or NaN in it")
    scale = largest / LARGEST[dtype]
    scale = paddle.where(scale > 0, scale, paddle.ones_like(scale))  # of zeros, or nearly
    spread = scale
    for axis, (size, count) in enumerate(zip(sizes, group), start=weight.ndim - 2):
        spread = spread.repeat_interleave(count, axis).slice([axis], [0], [size])
    scaled = (weight / spread).clip(-LARGEST[dtype], LARGEST[dtype])
    return (scaled.round() if dtype == "int8" else scaled).astype(dtype), scale


def _largest_of_groups(values: paddle.Tensor, group: list[int]) -> paddle.Tensor:
    """[..., m, n] to [..., m / group[0], n / group[1]], rounded up."""
    for axis, count in zip((-2, -1), group):
        size = values.shape[axis]
        missing = -size % count
        if missing:
            shape = list(values.shape)
            shape[axis] = missing
            values = paddle.concat([values, paddle.zeros(shape, "float32")], axis)
        shape = list(values.shape)
        at = axis % values.ndim
        values = values.reshape([*shape[:at], -1 if size else 0, count, *shape[at + 1 :]]).max(at + 1)
    return values
