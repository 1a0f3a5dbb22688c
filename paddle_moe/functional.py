"""The operators as Python functions: mixture_of_experts, gate, route and fused_gate_moe.

Reading order: these functions -> csrc/bindings/paddle_ops.cc -> csrc/moe.h -> csrc/arguments.cc ->
csrc/dispatch.cc -> csrc/cpu/ and csrc/cuda/. They work on eager tensors, while a static graph is built, and
under ``paddle.jit.to_static``. Importing this module is what makes the operators known to Paddle: do so
before ``paddle.jit.load`` or ``paddle.inference`` reads a program.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any, Callable, NoReturn, Union

import paddle
from paddle import _C_ops
from paddle.base import core
from paddle.base.framework import _dygraph_tracer
from paddle.base.layer_helper import LayerHelper
from paddle.framework import in_dynamic_mode, in_dynamic_or_pir_mode
from paddle.utils.cpp_extension import load_op_meta_info_and_register_op

from paddle_moe._compiled import BUILD_HINT, _core
from paddle_moe._options import (
    EXPERTS_OPTIONS,
    ROUTE_OPTIONS,
    WEIGHTS,
    checked,
    dtype_name,
    flag,
    thread_count,
    type_name,
)

try:
    from paddle.jit.marker import unified
except ImportError:  # Paddle < 3.1
    from paddle.jit import not_to_static as unified

__all__ = [
    "fused_gate_moe",
    "gate",
    "get_num_threads",
    "mixture_of_experts",
    "release_memory",
    "route",
    "set_num_threads",
]

Tensor = paddle.Tensor
Weights = Union[Tensor, Sequence[Tensor]]


def _load_library() -> ctypes.CDLL:
    spec = find_spec("paddle_moe._ops")
    if spec is None:
        raise RuntimeError(f"the compiled operators of paddle_moe are missing; {BUILD_HINT}")
    try:
        load_op_meta_info_and_register_op(spec.origin)
        return ctypes.CDLL(spec.origin)
    except Exception as error:
        raise RuntimeError(
            f"the compiled operators of paddle_moe ({spec.origin}) cannot be loaded into Paddle "
            f"{paddle.__version__}: {error}; {BUILD_HINT}"
        ) from error


_library = _load_library()
_library.paddle_moe_release_memory.restype = ctypes.c_size_t


class _EagerOperator:
    """One of the custom operators of paddle_ops.cc, for eager tensors.

    A call starts with tensors, whose names in ``tensors`` have a suffix ``@VECTOR`` for a list and
    ``@OPTIONAL`` for one that may be None. ``arrange`` turns the arguments into the operator's own inputs and
    attributes, which are named as in paddle_ops.cc; without it they are the same.
    """

    def __init__(
        self,
        name: str,
        tensors: tuple[str, ...],
        arrange: Callable[..., tuple] = lambda *arguments: arguments,
    ):
        self.name, self.tensors, self.arrange = name, tensors, arrange

    def __call__(self, *arguments) -> list[Tensor]:
        try:
            outputs = core.eager._run_custom_op(self.name, *self.arrange(*arguments))
        except Exception as error:
            self._check_types(arguments)
            _raise_plainly(error)
        if not paddle.is_grad_enabled():
            for output in outputs:  # a custom operator's outputs do not notice no_grad() by themselves
                output.stop_gradient = True
        return outputs

    def _check_types(self, arguments) -> None:
        for spec, value in zip(self.tensors, arguments):
            name, *kinds = spec.split("@")
            if value is None and "OPTIONAL" in kinds:
                continue
            items = value if "VECTOR" in kinds and isinstance(value, list) else [value]
            for index, item in enumerate(items):
                if not isinstance(item, TENSOR_TYPES):
                    entry = f"{name}[{index}]" if len(items) > 1 else name
                    raise ValueError(f"{entry} must be a paddle.Tensor, got {type_name(item)}") from None


class _Operator(_EagerOperator):
    """An operator that is called in whichever mode Paddle is.

    ``check`` takes the arguments of a call, tensors replaced by their specifications, and raises what the
    operator would: Paddle ends the process when shape inference throws while a program is being built.
    """

    def __init__(
        self,
        name: str,
        inputs: tuple[str, ...],
        attributes: tuple[str, ...],
        outputs: tuple[str, ...],
        check: Callable[..., Any],
        tensors: tuple[str, ...] | None = None,
        arrange: Callable[..., tuple] = lambda *arguments: arguments,
    ):
        super().__init__(name, tensors or inputs, arrange)
        self.inputs, self.attributes, self.outputs, self.check = inputs, attributes, outputs, check

    def __call__(self, *arguments) -> list[Tensor]:
        return super().__call__(*arguments) if in_dynamic_mode() else self._append_to_program(arguments)

    def _append_to_program(self, arguments) -> list[Tensor]:
        self._check_types(arguments)
        self.check(*map(_specification, arguments))
        arguments = self.arrange(*arguments)
        if in_dynamic_or_pir_mode():
            return _C_ops._run_custom_op(self.name, *arguments)
        helper = LayerHelper(self.name)
        inputs = {name: value for name, value in zip(self.inputs, arguments) if value is not None}
        outputs = {name: helper.create_variable(dtype="float32") for name in self.outputs}
        attributes = dict(zip(self.attributes, arguments[len(self.inputs) :]))
        helper.append_op(type=self.name, inputs=inputs, outputs=outputs, attrs=attributes)
        return list(outputs.values())


def _needs_a_graph(arguments: list) -> bool:
    """Whether this is a part of a program, or of what backward() goes through."""
    if not in_dynamic_mode():
        return True
    tensors = [item for entry in arguments for item in (entry if isinstance(entry, list) else [entry])]
    return paddle.is_grad_enabled() and not all(getattr(item, "stop_gradient", True) for item in tensors)


_own_autocast: ContextVar[paddle.dtype | None] = ContextVar("_own_autocast", default=None)


def _autocast_dtype() -> paddle.dtype | None:
    """What paddle.amp.auto_cast computes matrix products in; None outside of it."""
    return _own_autocast.get() or _paddle_autocast_dtype()


def _paddle_autocast_dtype() -> paddle.dtype | None:
    """The same for Paddle's own operators."""
    pir = in_dynamic_or_pir_mode() and not in_dynamic_mode()
    state = core._get_amp_attrs() if pir else _dygraph_tracer()
    if state is None or state._amp_level == core.AmpLevel.O0 or state._amp_dtype == "float32":
        return None
    return getattr(paddle, state._amp_dtype)


@unified
def own_autocast() -> contextlib.AbstractContextManager[None]:
    """Within it paddle.amp.auto_cast holds for the operators of this module alone.

    Paddle's own compute in the dtypes of their inputs: O2 may round what a router has to compute in float32.
    """
    dtype = _paddle_autocast_dtype()
    return contextlib.nullcontext() if dtype is None else _autocast_without_paddle(dtype)


@contextlib.contextmanager
def _autocast_without_paddle(dtype: paddle.dtype) -> Iterator[None]:
    token = _own_autocast.set(dtype)
    try:  # the dtype because a GradScaler asks for that of the last auto_cast
        with paddle.amp.auto_cast(enable=False, dtype=dtype_name(dtype)):
            yield
    finally:
        _own_autocast.reset(token)


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` within own_autocast, and not rewritten by paddle.jit.to_static."""

    @unified
    @functools.wraps(function)
    def run(*arguments, **options):
        with own_autocast():
            return function(*arguments, **options)

    return run


def _cast(tensor: Any, dtype: paddle.dtype) -> Any:
    """The floating-point tensors of an argument as `dtype`."""
    if isinstance(tensor, list):
        return [_cast(item, dtype) for item in tensor]
    floats = (paddle.float32, paddle.bfloat16, paddle.float16)
    if not isinstance(tensor, TENSOR_TYPES) or tensor.dtype == dtype or tensor.dtype not in floats:
        return tensor
    return tensor.astype(dtype)


TENSOR_TYPES = (Tensor, paddle.static.Variable, paddle.pir.Value)


def expect_tensors(**tensors: Any) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, TENSOR_TYPES):
            raise ValueError(f"{name} must be a paddle.Tensor, got {type_name(tensor)}")


@unified
def reshape_like(output: Tensor, tensor: Tensor) -> Tensor:
    """`output` in the shape of `tensor`, of which several sizes may be unknown while a program is built."""
    shape = list(tensor.shape)
    if shape.count(-1) > 1:
        sizes = paddle.shape(tensor)
        shape = [sizes[axis] if size == -1 else size for axis, size in enumerate(shape)]
    return output.reshape(shape)


def expect_dtype(name: str, tensor: Tensor, dtype: paddle.dtype, whose: str) -> None:
    if tensor.dtype != dtype:
        raise ValueError(
            f"{name} must have the dtype {whose}, {dtype_name(dtype)}, got {dtype_name(tensor.dtype)}"
        )


def _specification(argument: Any) -> Any:
    if isinstance(argument, list):
        return [_specification(item) for item in argument]
    if isinstance(argument, TENSOR_TYPES):
        return _core.Spec(dtype_name(argument.dtype), list(argument.shape))
    return argument


def _raise_plainly(error: Exception) -> NoReturn:
    """Raises `error` again; if it comes from paddle_ops.cc, with the text alone that was written there."""
    found = re.search(r"(?:\(\w+\)|\w+Error:) (.*) \(at [^()]*paddle_ops\.cc:\d+\)", str(error), re.DOTALL)
    if found is None:
        raise error
    raise type(error)(found.group(1)) from None


def _wanted(tensors: Sequence[Tensor]) -> list[int]:
    """1 for each tensor whose gradient has to be computed, else 0."""
    return [int(not tensor.stop_gradient) for tensor in tensors]


def _arrange_experts(
    hidden_states,
    routing_table,
    router_weights,
    gate_up_weights,
    down_weights,
    gate_up_bias,
    down_bias,
    gate_up_scale,
    down_scale,
    recompute,
    *options,
) -> tuple:
    """All that has a gradient as one list: paddle_ops.cc says why."""
    optional = [gate_up_bias, down_bias, gate_up_scale, down_scale]
    groups = [gate_up_weights, down_weights, *(group or [] for group in optional)]
    tensors = [hidden_states, router_weights, *(tensor for group in groups for tensor in group)]
    wanted = _wanted(tensors)
    save_pre_activations = not recompute and paddle.is_grad_enabled() and any(wanted)
    return routing_table, tensors, [len(group) for group in groups], wanted, *options, save_pre_activations


_experts = _Operator(
    "paddle_moe_experts",
    ("routing_table", "tensors@VECTOR"),
    ("counts", "wanted", *EXPERTS_OPTIONS, "save_pre_activations"),
    ("out", "amax", "pre_activations"),
    lambda *arguments: _core.Experts(*arguments[:9], *arguments[10:]),  # all but recompute
    (
        "hidden_states",
        "routing_table",
        "router_weights",
        "gate_up_weights@VECTOR",
        "down_weights@VECTOR",
        "gate_up_bias@VECTOR@OPTIONAL",
        "down_bias@VECTOR@OPTIONAL",
        "gate_up_scale@VECTOR@OPTIONAL",
        "down_scale@VECTOR@OPTIONAL",
    ),
    _arrange_experts,
)
_gate = _Operator(
    "paddle_moe_gate",
    ("hidden_states", "gate_weight"),
    ("wanted",),
    ("logits",),
    _core.Gate,
    arrange=lambda *tensors: (*tensors, _wanted(tensors)),
)
_route = _Operator(
    "paddle_moe_route",
    ("logits", "correction_bias@OPTIONAL"),
    tuple(ROUTE_OPTIONS),
    ("routing_table", "router_weights"),
    _core.Route,
)


def _arrange_fused(
    hidden_states,
    gate_weight,
    gate_up_weights,
    down_weights,
    gate_up_bias,
    down_bias,
    gate_up_scale,
    down_scale,
    correction_bias,
    *options,
) -> tuple:
    optional = [gate_up_bias, down_bias, gate_up_scale, down_scale]
    groups = [gate_up_weights, down_weights, *(group or [] for group in optional)]
    tensors = [hidden_states, *(tensor for group in groups for tensor in group)]
    return gate_weight, correction_bias, tensors, [len(group) for group in groups], *options


# No gradient goes through it.
_fused = _EagerOperator(
    "paddle_moe_fused_gate_moe",
    ("hidden_states", "gate_weight", *_experts.tensors[3:], "correction_bias@OPTIONAL"),
    _arrange_fused,
)


def _mix(arrays: list, recompute: bool, options: tuple) -> tuple[Tensor, Tensor]:
    """out and amax; the first three arrays are hidden_states and the routing."""
    dtype = _autocast_dtype()
    if dtype is not None:  # the router's weights stay as they are, usually float32, and so do scales
        routing, scales = arrays[1:3], arrays[7:]
        arrays = [_cast(array, dtype) for array in arrays]
        arrays[1:3], arrays[7:] = routing, scales
    out, amax, _ = _experts(*arrays, flag("recompute", recompute), *options)
    amax.stop_gradient = True
    return out, amax


def _choose(logits: Tensor, correction_bias: Tensor | None, options: tuple) -> tuple[Tensor, Tensor]:
    routing_table, router_weights = _route(logits, correction_bias, *options)
    routing_table.stop_gradient = True  # else backward() would wait for a gradient of the ids
    return routing_table, router_weights


@unified
def mixture_of_experts(
    hidden_states: Tensor,
    routing_table: Tensor,
    router_weights: Tensor,
    gate_up_weights: Weights,
    down_weights: Weights,
    gate_up_bias: Weights | None = None,
    down_bias: Weights | None = None,
    *,
    gate_up_scale: Weights | None = None,
    down_scale: Weights | None = None,
    permuted_weights: bool = False,
    activation: str = "silu",
    experts_min: int = 0,
    experts_max: int | None = None,
    measurement_mode: bool = False,
    chunk_size: int = 0,
    recompute: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Sends every token through its experts and sums what comes back, weighted by the router.

    .. math::
        out_t = \sum_k w_{tk} \Big(\big(act(x_t G_e + g_e) \odot (x_t U_e + u_e)\big) D_e + d_e\Big), \quad
        e = routing\_table_{tk}

    over the experts e in [experts_min, experts_max]; a slot whose id lies outside (such as -1) adds exactly
    zero and costs nothing, so ``out`` is this shard's part of the sum. The gated feed-forward network is that
    of Shazeer, "GLU Variants Improve Transformer" (2020), the sparse layer that of Shazeer et al.,
    "Outrageously Large Neural Networks" (2017).

    Products accumulate in float32, the intermediate is rounded to the dtype of ``hidden_states``, and the sum
    over k runs in float32 in the order of k: equal inputs give equal bits, whatever else is in the batch.
    int8 and int4 weights that are stored [out, in] or prepacked are multiplied as integers beside activations
    of half precision, int4 ones stored [out, in] beside float32 too: of 64 neighbouring activations each is
    rounded to 2^-15 of the largest, or 2^-29 in float32, so that bfloat16 ones stay exact down to 2^-7 of it,
    and NaN or infinity in one makes all of them NaN. Not so bfloat16 where the processor multiplies it
    (AVX-512 BF16): there the weights become bfloat16, exactly.

    T tokens, hidden size H, intermediate size I, K experts per token, E_l local experts.

    Args:
        hidden_states: [T, H], float32, bfloat16 or float16.
        routing_table: [T, K], int32 or int64, global expert ids. An id that appears twice in a row counts
            twice.
        router_weights: [T, K], float32 or the dtype of ``hidden_states``.
        gate_up_weights: E_l tensors [H, 2I] (gate columns first, then up), or 2*E_l tensors [H, I] (all
            gates, then all ups), or one stacked tensor [E_l, H, 2I]; dtype of ``hidden_states``, or, with
            scales and on a CPU, all weights int8, or float8_e4m3fn or uint8 that holds its bits, or int4 in
            int32 as :func:`paddle_moe.pack_int4` packs it, [..., 2I, 8 * ceil(H / 64)], with
            ``permuted_weights``. Never integers with a zero point. Or, on a CPU, both kinds of weights as
            :func:`paddle_moe.prepack_weights` returns them, which have four dimensions: stacked, or listed
            with E_l = 1 in each, quantised ones with its scales. They take the least time, with some
            exceptions among quantised ones, and have no gradient. Their shapes round outputs up to 16, so
            sizes that differ by less are not told apart.
        down_weights: E_l tensors [I, H], or one stacked tensor [E_l, I, H]; dtype of ``gate_up_weights``.
        gate_up_bias: E_l tensors [2I], or 2*E_l tensors [I], or one stacked tensor [E_l, 2I]; float32 or the
            dtype of ``hidden_states``.
        down_bias: E_l tensors [H], or one stacked tensor [E_l, H]; dtype of ``gate_up_bias``.
        gate_up_scale: of quantised weights, float32, in as many tensors as ``gate_up_weights``: what the
            elements of a matrix [in, out] are multiplied by. [1]: all of it; [out]: an output channel;
            [in / 128 or 1, out]: 128 inputs of an output channel; [in / 128, out / 128]: a block, of gate or
            of up; rounded up, with E_l in front where stacked (1 in each of a list of prepacked ones),
            transposed with ``permuted_weights``. See :func:`paddle_moe.quantize`. The weights and their
            scales then have no gradient.
        down_scale: the same of ``down_weights``.
        permuted_weights: every weight matrix is stored transposed ([2I, H] and [H, I]), as PyTorch and
            Hugging Face do. Prefer this to passing ``weight.T``, which Paddle copies on each call.
        activation: silu, gelu (erf), gelu_tanh, relu, relu2 (relu squared), selu, identity, swigluoai or
            swigluoai(alpha, limit): (up + 1) * gate * sigmoid(alpha * gate) with gate clamped to at most
            ``limit`` and up to [-limit, limit]; alpha = 1.702 and limit = 7.0 unless given.
        experts_min: global id of the first expert that was passed.
        experts_max: global id of the last one, inclusive; None: experts_min + E_l - 1.
        measurement_mode: also return amax.
        chunk_size: tokens per internal chunk, 0: chosen. It bounds the scratch memory and never changes the
            result.
        recompute: keep no pre-activations for the backward, which then computes them again.

    Returns:
        out [T, H] of the dtype of ``hidden_states``; in measurement mode (out, amax), where amax [E_l]
        float32 is the largest absolute intermediate of each expert before rounding, 0 where it got no token.

    Raises:
        ValueError: an argument has a wrong type, rank, shape, dtype, device, length or range.
    """
    given = locals()
    options, weights = checked(EXPERTS_OPTIONS, given), checked(WEIGHTS, given)
    out, amax = _mix([hidden_states, routing_table, router_weights, *weights], recompute, options)
    return (out, amax) if measurement_mode else out


@unified
def gate(hidden_states: Tensor, gate_weight: Tensor) -> Tensor:
    """Computes router logits, hidden_states @ gate_weight, accumulated in float32.

    Args:
        hidden_states: [T, H], float32, bfloat16 or float16.
        gate_weight: [H, E], float32 or the dtype of ``hidden_states``.

    Returns:
        logits [T, E], float32.

    Raises:
        ValueError: an argument has a wrong type, rank, shape, dtype or device.
    """
    if _autocast_dtype() is not None:  # which leaves the router in float32
        gate_weight = _cast(gate_weight, paddle.float32)
    return _gate(hidden_states, gate_weight)[0]


@unified
def route(
    logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    correction_bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
    group_mask_fill: float = 0.0,
    renormalize: bool = True,
    renormalize_eps: float = 1e-20,
    scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Chooses the experts of every token and their weights.

    A row whose scores contain a NaN gets the ids -1 and the weights 0. Ties go to the lowest id. Grouped
    selection and the correction bias are those of DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), section
    2.1.2.

    Args:
        logits: [T, E], float32.
        top_k: K, experts per token; at most the experts of the groups that are kept.
        scoring: softmax (over all E), sigmoid, or softmax_topk (softmax over the K chosen logits).
        correction_bias: [E] float32, added to the scores for the selection only, never to the weights.
        num_groups: the experts form this many groups of equal size, and only the ``topk_groups`` best are
            kept.
        topk_groups: see ``num_groups``.
        group_score: what ranks a group: max, or top2_sum (the sum of its two best experts).
        group_mask_fill: the selection score of experts in the other groups, 0.0 or -inf. With 0.0, as in the
            published code of DeepSeek-V3, such an expert still wins against a negative score of the groups
            that are kept: a logit (``softmax_topk``) or a score with a negative bias. Pass -inf where that
            can be, unless a model was trained so.
        renormalize: divide the weights of a token by their sum + ``renormalize_eps`` (softmax and sigmoid;
            softmax_topk already sums to one).
        renormalize_eps: see ``renormalize``. Where it is 0 and the chosen scores too, the weights are 0.
        scaling_factor: the last factor of every weight.

    Returns:
        routing_table int32 [T, K], the best expert first, and router_weights float32 [T, K].

    Raises:
        ValueError: an argument has a wrong type, rank, shape, dtype, device or range.
    """
    return _choose(logits, correction_bias, checked(ROUTE_OPTIONS, locals()))


@unified
def fused_gate_moe(
    hidden_states: Tensor,
    gate_weight: Tensor,
    gate_up_weights: Weights,
    down_weights: Weights,
    top_k: int,
    gate_up_bias: Weights | None = None,
    down_bias: Weights | None = None,
    *,
    scoring: str = "softmax",
    correction_bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
    group_mask_fill: float = 0.0,
    renormalize: bool = True,
    renormalize_eps: float = 1e-20,
    scaling_factor: float = 1.0,
    gate_up_scale: Weights | None = None,
    down_scale: Weights | None = None,
    permuted_weights: bool = False,
    activation: str = "silu",
    experts_min: int = 0,
    experts_max: int | None = None,
    measurement_mode: bool = False,
    chunk_size: int = 0,
    recompute: bool = False,
    return_routing: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """The whole layer in one call: :func:`gate`, :func:`route` and :func:`mixture_of_experts`.

    Args:
        gate_weight: [H, E], float32 or the dtype of ``hidden_states``; E counts the experts of all shards.
        return_routing: also return the routing, for example to replay it.
        Every other argument is documented at the function of that name above.

    Returns:
        out [T, H]; then amax [E_l] in measurement mode; then routing_table [T, K] int32 and router_weights
        [T, K] float32 with ``return_routing``. Only out: the tensor itself, else a tuple.

    Raises:
        ValueError: an argument has a wrong type, rank, shape, dtype, device, length or range.
    """
    given = locals()
    weights = checked(WEIGHTS, given)
    route_options, experts_options = checked(ROUTE_OPTIONS, given), checked(EXPERTS_OPTIONS, given)
    return_routing, recompute = flag("return_routing", return_routing), flag("recompute", recompute)
    arrays = [hidden_states, gate_weight, *weights, correction_bias]
    if _needs_a_graph(arrays) or _autocast_dtype() is not None:
        routing = _choose(gate(hidden_states, gate_weight), correction_bias, route_options)
        out, amax = _mix([hidden_states, *routing, *weights], recompute, experts_options)
    else:
        out, amax, *routing = _fused(*arrays, *route_options, *experts_options)
    results = (out, *((amax,) if measurement_mode else ()), *(routing if return_routing else ()))
    return results if len(results) > 1 else out


def set_num_threads(n: int) -> None:
    """Sets how many threads the operators for Paddle use on a CPU, up to 4096; 0 restores the default.

    It does not depend on OMP_NUM_THREADS, which importing Paddle sets to 1. ``paddle_moe.core`` has threads
    of its own, and its own setting.

    Raises:
        ValueError: ``n`` is not an integer from 0 to 4096.
    """
    _library.paddle_moe_set_num_threads(thread_count("n", n))


def get_num_threads() -> int:
    """How many threads the operators for Paddle use on a CPU."""
    number = _library.paddle_moe_num_threads()
    if number < 0:
        text = os.environ.get("PADDLE_MOE_NUM_THREADS")
        raise RuntimeError(
            f"PADDLE_MOE_NUM_THREADS must be a number from 1 to {_core.MAX_THREADS}, got {text!r}; without it"
            " all cores of the process are used"
        )
    return number


def release_memory() -> int:
    """Gives the memory that is kept on the CPU for later calls back to the system; returns its bytes.

    What tensors still use stays, and a later call keeps its own again: docs/training.md, "Memory that stays".
    """
    return _library.paddle_moe_release_memory()
