"""Weights in the order in which the CPU kernels read them, as mixture_of_experts takes them prepacked.

The outputs of a matrix stand in panels of 16, the last completed with zeros, and each panel is one run of
memory, row after row. A row is one input; in bfloat16 two, which stand side by side in each output; of 8 bits
two, one after the other; of int4 eight, a word of int32 in each output, with input 2 n at its bit 4 n and
input 2 n + 1 at bit 16 + 4 n.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import paddle

from paddle_moe import reference
from paddle_moe._options import at_least, dtype_name, flag, type_name

__all__ = ["prepack_weights", "unpack_weights"]

PANEL = 16
FLOATS = ("float32", "bfloat16", "float16")
QUANTISED = ("int8", "uint8", "float8_e4m3fn", "int32")


def _inputs_of_row(dtype: str | paddle.dtype) -> int:
    name = dtype_name(dtype)
    return 8 if name in ("int32", "int4") else 1 if name in ("float32", "float16") else 2


def _expect(name: str, weight: paddle.Tensor, ndims: tuple[int, ...], shape: str) -> None:
    if not isinstance(weight, paddle.Tensor):
        raise ValueError(f"{name} must be a paddle.Tensor, got {type_name(weight)}")
    if weight.ndim not in ndims or dtype_name(weight.dtype) not in (*FLOATS, *QUANTISED):
        raise ValueError(
            f"{name} must be float32, bfloat16, float16 or quantised, with the shape {shape}, got "
            f"{dtype_name(weight.dtype)} {list(weight.shape)}"
        )


def check_inputs(name: str, dtype: str | paddle.dtype, inputs: int) -> None:
    """A ValueError where a weight with so many inputs cannot be prepacked. dtype: also "int4"."""
    if inputs % _inputs_of_row(dtype):
        of_row = {2: "an even number", 8: "a multiple of 8"}[_inputs_of_row(dtype)]
        raise ValueError(
            f"{name} must have {of_row} of inputs in {dtype_name(dtype).replace('int32', 'int4')}, where a "
            f"row of a panel holds {_inputs_of_row(dtype)}, got {inputs}"
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


def prepack_weights(
    weight: paddle.Tensor,
    scale: paddle.Tensor | None = None,
    *,
    parts: int,
    permuted: bool = False,
    inputs: int | None = None,
) -> paddle.Tensor | tuple[paddle.Tensor, paddle.Tensor]:
    """Puts the weights of experts in the order in which the CPU kernels read them, so that no call has to.

    For serving: calls take less time, most of all those of some tens of tokens. Unless the weights are
    quantised, they give the same bits as those of weights stored [in, out]. Prepacked weights have no
    gradient, and no GPU takes them.

    Args:
        weight: [E, in, out], or [in, out] of a single expert; float32, bfloat16 or float16, or quantised:
            int8, float8_e4m3fn or its bits as uint8, int4 as :func:`paddle_moe.quantize` gives it. The inputs
            must be even in number in bfloat16 and in 8 bits, a multiple of 8 in int4.
        scale: of quantised weights, float32, in one of the forms that the operator takes.
        parts: 2 for gate and up side by side, so that no panel holds columns of both; 1 for one of them, or
            for down. The operator cannot tell a wrong one from the shape, which rounds the outputs up.
        permuted: `weight` and `scale` are transposed, [..., out, in]; int4 always is.
        inputs: of int4 alone, whose words do not tell; None: as many as they hold, a multiple of 64.

    Returns:
        [E, parts * ceil(out / parts / 16), in, 16], in bfloat16 and 8 bits [..., in / 2, 32], in int4 int32
        [..., in / 8, 16], with E = 1 for a single expert: what to pass to
        :func:`paddle_moe.mixture_of_experts`, stacked or as one of a list. Of quantised weights this, fp8 as
        uint8, and the scale, as of weights stored [in, out].

    Raises:
        ValueError: another dtype or rank, a wrong number of inputs, `parts` that do not divide out, a scale
            that is missing, must not be given or does not fit, int4 without permuted.
    """
    flag("permuted", permuted)
    at_least(1)("parts", parts)
    _expect("weight", weight, (2, 3), "[E, out, in]" if permuted else "[E, in, out]")
    name = dtype_name(weight.dtype)
    if (scale is not None) != (name in QUANTISED):
        given = "must not be given" if scale is not None else "must be given"
        raise ValueError(f"scale {given}: weight has the dtype {name}")
    if inputs is not None and name != "int32":
        raise ValueError(f"inputs must not be given: weight has the dtype {name}, whose shape tells them")
    stack = weight if weight.ndim == 3 else weight.unsqueeze(0)
    if scale is None:
        return prepack_stack(stack, parts, permuted)
    scale = _scale_of_panels(scale, weight, permuted)
    if name == "int32":
        if not permuted:
            raise ValueError("permuted must be True for int4, which is stored [out, in], got False")
        held = 8 * stack.shape[2]
        inputs = held if inputs is None else at_least(0)("inputs", inputs)
        if -(-inputs // 64) * 64 != held:
            raise ValueError(
                f"inputs must be {held} or up to 63 less, as many as the words hold, got {inputs}"
            )
    return _prepack_quantised(stack, parts, permuted, inputs), scale


@_exactly
def _scale_of_panels(scale: paddle.Tensor, weight: paddle.Tensor, permuted: bool) -> paddle.Tensor:
    """In the order of weights stored [in, out], with E or 1 in front.

    Contiguous, because Paddle would copy it for each call.
    """
    if not isinstance(scale, paddle.Tensor):
        raise ValueError(f"scale must be a paddle.Tensor, got {type_name(scale)}")
    stacked = weight.ndim == 3
    fits = dtype_name(scale.dtype) == "float32" and stacked <= scale.ndim <= weight.ndim
    if not fits or stacked and scale.shape[0] != weight.shape[0]:
        front = f"E = {weight.shape[0]} in front of " if stacked else ""
        raise ValueError(
            f"scale must be float32 with {front}up to 2 dimensions, "
            f"got {dtype_name(scale.dtype)} {list(scale.shape)}"
        )
    scale = scale if stacked else scale.unsqueeze(0)
    return scale.transpose([0, 2, 1]).contiguous() if permuted and scale.ndim == 3 else scale


@_exactly
def _prepack_quantised(
    weight: paddle.Tensor, parts: int, permuted: bool, inputs: int | None
) -> paddle.Tensor:
    """Of [E, in, out], or [E, out, in] with `permuted`; `inputs` of int4."""
    name = dtype_name(weight.dtype)
    if name == "float8_e4m3fn":  # Paddle moves and slices bytes
        weight = weight.view("uint8")
    outputs = weight.shape[1 if permuted else 2]
    inputs = inputs if name == "int32" else weight.shape[2 if permuted else 1]
    check_inputs("weight", name, inputs)
    if outputs % parts:
        raise ValueError(f"weight must have a multiple of parts = {parts} outputs, got {outputs}")
    panels = [parts * -(-(outputs // parts) // PANEL), *_row_shape(name, inputs)]
    prepacked = paddle.empty([weight.shape[0], *panels], weight.dtype)
    for number, one in enumerate(weight):
        if not one.size:
            continue
        array = reference.unpack_int4(one.numpy(), inputs) if name == "int32" else one.numpy()
        array = reference.prepack_weights((array.T if permuted else array)[None], parts, name == "int32")
        prepacked[number] = paddle.to_tensor(array[0], place=weight.place)
    return prepacked


@_exactly
def convert_panels(weight: paddle.Tensor, dtype: str | paddle.dtype) -> paddle.Tensor:
    """Prepacked weights of a floating-point dtype as those of another, whose rows may hold more inputs."""
    before, after = _inputs_of_row(weight.dtype), _inputs_of_row(dtype)
    weight = weight.astype(dtype_name(dtype))
    if before == after:
        return weight
    experts, panels, rows, _ = weight.shape
    inputs = weight.reshape([experts, panels, rows, PANEL, before]).transpose([0, 1, 2, 4, 3])
    inputs = inputs.reshape([experts, panels, rows * before // after, after, PANEL])
    return inputs.transpose([0, 1, 2, 4, 3]).reshape([experts, panels, rows * before // after, -1])


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


def _row_shape(dtype: str | paddle.dtype, inputs: int) -> list[int]:
    of_row = _inputs_of_row(dtype)
    return [inputs // of_row, PANEL if of_row == 8 else PANEL * of_row]


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
        weight: what prepack_weights returned. Quantised ones are given back as numbers: fp8 as its bits in
            uint8, int4 as words again, which need `permuted`. Their scale stays in the order of [in, out];
            with `permuted` transpose it.
        outputs: out, which the panels round up. parts: as there.

    Raises:
        ValueError: `weight` is not prepacked, or has panels for another number of outputs; int4 without
            permuted.
    """
    flag("permuted", permuted)
    at_least(1)("parts", parts)
    at_least(1)("outputs", outputs)
    _expect("weight", weight, (4,), "[E, panels, rows, 16 or 32]")
    of_row = _inputs_of_row(weight.dtype)
    experts, panels, rows, width = weight.shape
    if (
        width != _row_shape(weight.dtype, 0)[1]
        or panels != parts * -(-(outputs // parts) // PANEL)
        or outputs % parts
    ):
        raise ValueError(
            f"weight must have the shape [E, {parts} * ceil({outputs} / {parts} / {PANEL}), rows, "
            f"{_row_shape(weight.dtype, 0)[1]}], got {list(weight.shape)}"
        )
    if dtype_name(weight.dtype) in QUANTISED:
        return _unpack_quantised(weight, outputs, parts, permuted)
    inputs = rows * of_row
    shape = [experts, outputs, inputs] if permuted else [experts, inputs, outputs]
    unpacked = paddle.empty(shape, weight.dtype)
    for number, one in enumerate(weight):
        if one.size:
            one = one.reshape([panels, rows, PANEL, of_row]).transpose([0, 2, 1, 3])
            one = one.reshape([parts, -1, inputs])[:, : outputs // parts].reshape([outputs, inputs])
            unpacked[number] = one if permuted else one.t()
    return unpacked


def _unpack_quantised(weight: paddle.Tensor, outputs: int, parts: int, permuted: bool) -> paddle.Tensor:
    int4 = dtype_name(weight.dtype) == "int32"
    if int4 and not permuted:
        raise ValueError("permuted must be True for int4, which is stored [out, in], got False")
    inputs = weight.shape[2] * _inputs_of_row(weight.dtype)
    last = [outputs, 8 * -(-inputs // 64)] if int4 else [outputs, inputs] if permuted else [inputs, outputs]
    unpacked = paddle.empty([weight.shape[0], *last], weight.dtype)
    for number, one in enumerate(weight):
        if one.size:
            numbers = reference.unpack_8_or_4_bits(one.numpy()[None], outputs, parts)[0]
            numbers = numbers.T if permuted else numbers
            unpacked[number] = paddle.to_tensor(
                reference.pack_int4(numbers) if int4 else numbers, place=weight.place
            )
    return unpacked
