"""Weights of 8 or 4 bits, as mixture_of_experts takes them with gate_up_scale and down_scale.

A weight is its number times a scale, which stands for the whole matrix, an output channel, a group of 128
input channels of an output channel, or a block of 128 x 128.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Callable

import paddle

from paddle_moe import reference
from paddle_moe._options import at_least, dtype_name, flag, one_of, type_name
from paddle_moe.params import LayerShard, Part

__all__ = ["pack_int4", "quantize"]

GROUP = 128
# The largest magnitude of each dtype.
LARGEST = {"int8": 127.0, "int4": 8.0, "float8_e4m3fn": 448.0}
# The input and the output channels that share a scale; None: all of them.
GRANULARITIES = {"tensor": (None, None), "channel": (None, 1), "group": (GROUP, 1), "block": (GROUP, GROUP)}


def check_options(dtype: str | paddle.dtype, granularity: str | None) -> tuple[str, str]:
    """The names of both, None replaced; a ValueError if one is none that quantize() has."""
    name = one_of(*LARGEST)("dtype", dtype_name(dtype))
    if granularity is None:
        granularity = "group" if name == "int4" else "channel"
    one_of(*GRANULARITIES)("granularity", granularity)
    if name == "float8_e4m3fn" and not hasattr(paddle, name):
        raise ValueError(f"dtype {name!r} needs a later Paddle than {paddle.__version__}; use 'int8'")
    return name, granularity


def pack_int4(numbers: paddle.Tensor) -> paddle.Tensor:
    """The int4 numbers of weights stored [out, in], as :func:`paddle_moe.mixture_of_experts` takes them.

    Element i of each 64 neighbours along the inputs, the last of them completed with zeros, becomes the bits
    4 (i // 16) to 4 (i // 16) + 3 of the int16 i % 16 of 16, of which every two, the first one low, are an
    int32. No other library packs them so: words of GPTQ, AWQ or Paddle's weight_quantize mean other numbers.

    Args:
        numbers: [..., out, in], of an integer dtype, from -8 to 7.

    Returns:
        int32 [..., out, 8 * ceil(in / 64)].

    Raises:
        ValueError: another dtype, or a number out of range.
    """
    if not isinstance(numbers, paddle.Tensor) or not dtype_name(numbers.dtype).lstrip("u").startswith("int"):
        got = dtype_name(numbers.dtype) if isinstance(numbers, paddle.Tensor) else type_name(numbers)
        raise ValueError(f"numbers must be a paddle.Tensor of integers, got {got}")
    if numbers.ndim == 0:
        raise ValueError("numbers must have at least one dimension [..., in], got none")
    array = numbers.numpy()
    if array.size and not (-8 <= array.min() and array.max() <= 7):
        raise ValueError(f"numbers must be from -8 to 7, got {array.min()} to {array.max()}")
    return paddle.to_tensor(reference.pack_int4(array), place=numbers.place)


def quantize(
    weight: paddle.Tensor,
    dtype: str | paddle.dtype = "int8",
    granularity: str | None = None,
    *,
    permuted: bool = False,
    parts: int | None = None,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Rounds weights to 8 or 4 bits, without a zero point.

    The largest magnitude of each group becomes 127, or 448 in fp8. In int4 it becomes -8, whichever its sign
    is, which the scale then carries: the one number more takes an eighth off the error.

    Args:
        weight: [..., in, out], float32, bfloat16 or float16; all of it finite.
        dtype: "int8", "int4" or "float8_e4m3fn" (Micikevicius et al., "FP8 Formats for Deep Learning", 2022).
        granularity: what shares a scale: "tensor", a matrix; "channel", a column of it; "group", 128
            neighbours in a column; "block", 128 x 128 (as in DeepSeek-V3). None: "group" for int4, else
            "channel".
        permuted: `weight` and both results are transposed, [..., out, in]; int4 needs it.
        parts: 2 for gate and up side by side, else 1: no block then holds columns of both. "block" needs it.

    Returns:
        The quantised weight, in the shape of `weight` (int4 as :func:`paddle_moe.pack_int4` gives it), and
        its scales, float32 [..., groups of in, groups of out]: what to pass as weights and scale to
        :func:`paddle_moe.mixture_of_experts`.

    Raises:
        ValueError: `weight` is not finite, has another dtype or less than two dimensions; an unknown option;
            "block" without `parts`.
    """
    dtype, granularity = check_options(dtype, granularity)
    flag("permuted", permuted)
    if dtype == "int4" and not permuted:
        raise ValueError("permuted must be True for int4, which is stored [out, in], got False")
    if not isinstance(weight, paddle.Tensor):
        raise ValueError(f"weight must be a paddle.Tensor, got {type_name(weight)}")
    _check_dtype("weight", weight)
    if parts is None:
        if granularity == "block":
            raise ValueError(
                "parts must be 2 for gate and up side by side, else 1, with granularity 'block', got None"
            )
        parts = 1
    at_least(1)("parts", parts)
    axis = weight.ndim - (2 if permuted else 1)
    if weight.shape[axis] % parts:
        raise ValueError(f"weight must have a multiple of parts = {parts} outputs, got {weight.shape[axis]}")
    with paddle.no_grad():
        if parts == 1 or granularity != "block":
            return _quantize(weight, dtype, granularity, permuted)
        pieces = [_quantize(piece, dtype, granularity, permuted) for piece in weight.chunk(parts, axis)]
        numbers, scales = zip(*pieces)
        if dtype == "float8_e4m3fn":  # Paddle cannot join it
            joined = paddle.concat([one.view("uint8") for one in numbers], axis).view(dtype)
        else:
            joined = paddle.concat(numbers, axis)
        return joined, paddle.concat(scales, axis)


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
    if dtype == "int4":
        scale = paddle.where(_largest_of_groups(weight, group) == largest, -scale, scale)
    spread = scale
    for axis, (size, count) in enumerate(zip(sizes, group), start=weight.ndim - 2):
        spread = spread.repeat_interleave(count, axis).slice([axis], [0], [size])
    scaled = (weight / spread).clip(-LARGEST[dtype], 7.0 if dtype == "int4" else LARGEST[dtype])
    if dtype == "int4":
        return pack_int4(scaled.round().astype("int8")), scale
    return (scaled.round() if dtype == "int8" else scaled).astype(dtype), scale


def check_shards(function: str, ranks: int) -> None:
    """A RuntimeError where tensors cannot carry the flags by which wrappers know what ranks do not share."""
    if ranks > 1 and not hasattr(paddle.zeros([1], "int8"), "__dict__"):
        raise RuntimeError(
            f"{function} of a layer over several ranks needs a later Paddle than {paddle.__version__}"
        )


def check_weight(name: str, weight: paddle.Tensor) -> None:
    """A ValueError or RuntimeError where a layer's weight [in, out] or [E, in, out] cannot be quantised."""
    if weight.place.is_gpu_place():
        raise RuntimeError(
            f"{name} is on {weight.place}, where no back end multiplies quantised weights; move the layer to "
            "the CPU first"
        )
    _check_dtype(name, weight)
    for number, one in enumerate(weight if weight.ndim == 3 else [weight]):
        if one.size and not bool(paddle.isfinite(one.astype("float32")).all()):
            whose = f"{name}[{number}]" if weight.ndim == 3 else name
            raise ValueError(f"{whose} must be finite, got infinity or NaN in it")


def _check_dtype(name: str, weight: paddle.Tensor) -> None:
    if weight.ndim < 2 or dtype_name(weight.dtype) not in ("float32", "bfloat16", "float16"):
        raise ValueError(
            f"{name} must be float32, bfloat16 or float16 with the shape [..., in, out], got "
            f"{dtype_name(weight.dtype)} {list(weight.shape)}"
        )


# How layers keep each dtype: Paddle can neither stack nor save fp8.
_STORED = {"int8": "int8", "int4": "int32", "float8_e4m3fn": "uint8"}


def quantize_stored(
    weight: paddle.Tensor, dtype: str, granularity: str, parts: int, permuted: bool = False
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """quantize() of a weight that check_weight() has passed as [out, in], fp8 as its bits.

    permuted: `weight` is [out, in] too.
    """
    weight = weight if permuted else weight.t()
    quantised, scale = quantize(weight, dtype, granularity, permuted=True, parts=parts)
    return quantised.view(_STORED[dtype]), scale


def quantize_stack(
    weight: paddle.Tensor,
    dtype: str,
    granularity: str,
    parts: int,
    order: Callable[[paddle.Tensor], paddle.Tensor] | None = None,
    permuted: bool = False,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """The same of [E, in, out] as [E, out, in], one expert at a time for the sake of memory.

    `order` puts the columns of an expert in the operator's order.
    """
    if 0 in weight.shape:  # this rank has no experts, or no columns of the shared one
        experts, *sizes = weight.shape
        inputs, outputs = sizes[::-1] if permuted else sizes
        shapes = _stored_shapes(outputs, inputs, dtype, granularity, parts)
        dtypes = _STORED[dtype], "float32"
        return tuple(paddle.zeros([experts, *shape], one) for shape, one in zip(shapes, dtypes))
    pairs = [
        quantize_stored(order(one) if order else one, dtype, granularity, parts, permuted) for one in weight
    ]
    return tuple(paddle.stack(tensors) for tensors in zip(*pairs))


def _stored_shapes(
    outputs: int, inputs: int, dtype: str, granularity: str, parts: int
) -> tuple[list[int], list[int]]:
    """Of a weight [out, in] and its scales as quantize_stored() gives them."""

    def groups(size: int, shared: int | None) -> int:
        return -(-size // min(shared or size, size)) if size else 0

    of_inputs, of_outputs = GRANULARITIES[granularity]
    parts = parts if granularity == "block" else 1
    words = 8 * -(-inputs // 64) if dtype == "int4" else inputs
    return [outputs, words], [parts * groups(outputs // parts, of_outputs), groups(inputs, of_inputs)]


def quantised_parts(
    shard: LayerShard, dtype: str, granularity: str
) -> tuple[dict[str, Part], dict[str, Part]]:
    """What a rank holds of the quantised weights and scales of a FusedMoE, and what all ranks together do.

    Dimensions: E experts; R and C, rows and columns as they are stored, counted through all slices of the
    intermediate dimension, because the slices of another grid would have other scales: only the same fit.
    """
    own, everyone = {}, {}

    def add(prefix: str, slices: list[LayerShard], widths: list[int], experts: Part, all_experts: Part):
        here, hidden = slices.index(shard), shard.hidden_size
        sizes = {
            "gate_up": [_stored_shapes(2 * width, hidden, dtype, granularity, 2) for width in widths],
            "down": [_stored_shapes(hidden, width, dtype, granularity, 1) for width in widths],
        }
        for name, shapes in sizes.items():
            for what, of_slices in zip(("weight", "scale"), zip(*shapes)):
                spans, wholes = {}, {}
                for dim, along in zip("RC", zip(*of_slices)):
                    start = sum(along[:here])
                    spans[dim], wholes[dim] = (start, start + along[here]), (0, sum(along))
                for parts, leading, ranges in ((own, experts, spans), (everyone, all_experts, wholes)):
                    pattern, copy = f"{leading.pattern} R C", leading.copy
                    parts[f"{prefix}{name}_{what}"] = Part(pattern, {**leading.ranges, **ranges}, copy)

    slices = [replace(shard, tp_rank=rank) for rank in range(shard.tp_size)]
    experts = [Part("E", {"E": span}) for span in (shard.experts, (0, shard.num_experts))]
    add("", slices, [stop - start for start, stop in (one.columns for one in slices)], *experts)
    if shard.shared_over_grid:
        slices = [replace(one, ep_rank=rank) for rank in range(shard.ep_size) for one in slices]
    one = Part("1", {}, copy=not shard.shared_over_grid and shard.ep_rank > 0)
    add("shared_", slices, [stop - start for start, stop in (one.shared_columns for one in slices)], one, one)
    return own, everyone


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
