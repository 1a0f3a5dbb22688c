"""The kernels without Paddle: the same operators on NumPy arrays and on any array with ``__dlpack__``.

Arguments and errors are those of the functions of the same name in :mod:`paddle_moe`. Nothing is copied:
weights may have any strides, ``hidden_states`` and biases must be contiguous in their last dimension, the
routing altogether. Two keyword arguments exist only here. ``out`` receives the result instead of a new array.
``workspace`` is the scratch memory, a ``uint8`` array of at least :func:`workspace_size` bytes, instead of a
new one on each call. What a call writes must share no memory with another array of the call.

On the CPU results are NumPy arrays (``float32``, ``float16``, or the bfloat16 kind that ``hidden_states``
came in). NumPy has no bfloat16, so a ``uint16`` array means bfloat16 bits; an array of ``ml_dtypes.bfloat16``
is understood too. Read-only NumPy arrays are welcome.

On a GPU, in a build with the CUDA back end, the first argument of a call is a PyTorch or CuPy array; results
and scratch are arrays of that library, and the work is enqueued on its current stream, as that of any of its
own functions. No call waits for the GPU. Given ``out`` and ``workspace`` none allocates memory either.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from paddle_moe._compiled import _core
from paddle_moe._options import (
    EXPERTS_OPTIONS,
    ROUTE_OPTIONS,
    WEIGHTS,
    checked,
    flag,
    thread_count,
    type_name,
)

__all__ = [
    "Gradients",
    "available_isas",
    "backward_workspace_size",
    "fused_gate_moe",
    "gate",
    "gate_backward",
    "gate_workspace_size",
    "get_num_threads",
    "isa_name",
    "mixture_of_experts",
    "mixture_of_experts_backward",
    "pre_activation_rows",
    "route",
    "route_backward",
    "set_num_threads",
    "workspace_size",
]

Array = Any  # a NumPy array, or anything with __dlpack__


def _experts(
    hidden_states,
    routing_table,
    router_weights,
    gate_up_weights,
    down_weights,
    gate_up_bias=None,
    down_bias=None,
    *,
    gate_up_scale=None,
    down_scale=None,
    permuted_weights=False,
    activation="silu",
    experts_min=0,
    experts_max=None,
    measurement_mode=False,
    chunk_size=0,
) -> _core.Experts:
    return _call(hidden_states, routing_table, router_weights, locals())


def _call(hidden_states, routing_table, router_weights, given: dict[str, Any]) -> _core.Experts:
    weights, options = checked(WEIGHTS, given), checked(EXPERTS_OPTIONS, given)
    return _core.Experts(hidden_states, routing_table, router_weights, *weights, *options)


def mixture_of_experts(
    hidden_states: Array,
    routing_table: Array,
    router_weights: Array,
    gate_up_weights: Array | list[Array],
    down_weights: Array | list[Array],
    gate_up_bias: Array | list[Array] | None = None,
    down_bias: Array | list[Array] | None = None,
    *,
    gate_up_scale: Array | list[Array] | None = None,
    down_scale: Array | list[Array] | None = None,
    permuted_weights: bool = False,
    activation: str = "silu",
    experts_min: int = 0,
    experts_max: int | None = None,
    measurement_mode: bool = False,
    chunk_size: int = 0,
    out: Array | None = None,
    workspace: Array | None = None,
    pre_activations: Array | None = None,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """See :func:`paddle_moe.mixture_of_experts`.

    Args:
        out: [T, H], contiguous, of the dtype of ``hidden_states``; returned in place of a new array.
        workspace: uint8, at least ``workspace_size(...)`` bytes; its contents do not matter.
        pre_activations: receives what :func:`mixture_of_experts_backward` would otherwise compute again: gate
            and up with their biases, [R, 2I] of the dtype of ``hidden_states``, contiguous. On the CPU R rows
            for the R slots (token, k) whose expert is local, sorted by expert; on a GPU a row for each of the
            T * K slots, of which those without a local expert are not written. ``pre_activation_rows(...)``
            is R.
    """
    call = _call(hidden_states, routing_table, router_weights, locals())
    return call.run(out, workspace, pre_activations)


def workspace_size(*args, **kwargs) -> int:
    """Bytes of ``workspace`` that :func:`mixture_of_experts` needs for these arguments.

    All but ``out``, ``workspace`` and ``pre_activations``.
    """
    return _experts(*args, **kwargs).workspace_size()


def pre_activation_rows(*args, **kwargs) -> int:
    """Rows of ``pre_activations`` that :func:`mixture_of_experts` stores for these arguments.

    All but ``out``, ``workspace`` and ``pre_activations``.
    """
    return _experts(*args, **kwargs).pre_activation_rows()


class Gradients(NamedTuple):
    """One entry per differentiable argument of :func:`mixture_of_experts`, in its form: an array, or a list
    where a list was passed; None where there is no such argument or its gradient is not wanted."""

    hidden_states: Any = None
    router_weights: Any = None
    gate_up_weights: Any = None
    down_weights: Any = None
    gate_up_bias: Any = None
    down_bias: Any = None


def _are_prepacked(weights: Array | list[Array]) -> bool:
    first = weights[0] if isinstance(weights, (list, tuple)) and weights else weights
    return len(getattr(first, "shape", ())) == 4


def _check_wanted(wanted: Sequence[str], names: Sequence[str]) -> None:
    if isinstance(wanted, str) or not set(wanted) <= set(names):
        raise ValueError(f"wanted must hold names out of {names}, got {wanted!r}")


def _backward(
    grad_out, *args, pre_activations=None, wanted=None, out=None, new=None, **kwargs
) -> tuple[_core.ExpertsBackward, Callable[[list], Gradients]]:
    """The checked call, and what turns its list of arrays into Gradients.

    new: what stands for an array that the call has to make; True: it is not run.
    """
    passed = inspect.signature(_experts).bind(*args, **kwargs).arguments
    if wanted is None:
        frozen = passed.get("gate_up_scale") is not None or _are_prepacked(passed["down_weights"])
        without = ("gate_up_weights", "down_weights") if frozen else ()
        wanted = [name for name in Gradients._fields if name not in without]
    _check_wanted(wanted, Gradients._fields)
    if out is not None and not isinstance(out, Gradients):
        raise ValueError(f"out must be of the type core.Gradients, got {type(out).__name__}")
    passed = {name: passed[name] for name in Gradients._fields if passed.get(name) is not None}
    outs, places = [], {}
    for name, value in passed.items():
        listed = isinstance(value, (list, tuple))
        given = getattr(out, name, new) if name in wanted else False
        begin = len(outs)
        outs += list(given) if isinstance(given, (list, tuple)) else [given] * (len(value) if listed else 1)
        count, expected = len(outs) - begin, len(value) if listed else 1
        if count != expected:
            raise ValueError(
                f"out.{name} must have an entry for each of the {expected} arrays of {name}, got {count}"
            )
        places[name] = slice(begin, len(outs)) if listed else begin

    def collect(arrays: list) -> Gradients:
        return Gradients(
            *(
                arrays[places[name]] if name in wanted and name in places else None
                for name in Gradients._fields
            )
        )

    return _core.ExpertsBackward(_experts(*args, **kwargs), grad_out, pre_activations, outs), collect


def mixture_of_experts_backward(
    grad_out: Array,
    hidden_states: Array,
    routing_table: Array,
    router_weights: Array,
    gate_up_weights: Array | list[Array],
    down_weights: Array | list[Array],
    gate_up_bias: Array | list[Array] | None = None,
    down_bias: Array | list[Array] | None = None,
    *,
    gate_up_scale: Array | list[Array] | None = None,
    down_scale: Array | list[Array] | None = None,
    permuted_weights: bool = False,
    activation: str = "silu",
    experts_min: int = 0,
    experts_max: int | None = None,
    chunk_size: int = 0,
    pre_activations: Array | None = None,
    wanted: Sequence[str] | None = None,
    out: Gradients | None = None,
    workspace: Array | None = None,
) -> Gradients:
    """The gradients of :func:`mixture_of_experts`, from that of its result.

    Args:
        grad_out: [T, H], of the dtype of ``hidden_states``, contiguous in its last dimension.
        pre_activations: what :func:`mixture_of_experts` stored for these arguments; None: computed again,
            with the same result to the last bit.
        wanted: the arguments whose gradients are computed; None: all that have one, which quantised and
            prepacked weights have not.
        out: arrays that receive the gradients, of the shapes and dtypes of the arguments; an entry may be
            None. Those of weights may have any strides, the others must be contiguous.
        workspace: uint8, at least ``backward_workspace_size(...)`` bytes.
        Every other argument is that of the forward call.
    """
    passed = {name: value for name, value in locals().items() if name != "workspace"}
    call, collect = _backward(**passed)
    return collect(call.run(workspace))


def backward_workspace_size(*args, **kwargs) -> int:
    """Bytes of ``workspace`` that :func:`mixture_of_experts_backward` needs for these arguments (all but
    ``out`` and ``workspace``)."""
    return _backward(*args, **kwargs, new=True)[0].workspace_size()


def gate(
    hidden_states: Array, gate_weight: Array, *, out: Array | None = None, workspace: Array | None = None
) -> np.ndarray:
    """See :func:`paddle_moe.gate`.

    Args:
        out: float32 [T, E], contiguous.
        workspace: uint8, at least ``gate_workspace_size(hidden_states, gate_weight)`` bytes.
    """
    return _core.Gate(hidden_states, gate_weight).run(out, workspace)


def _pair(out: Any, names: tuple[str, str]) -> Sequence[Array | None]:
    if out is None:
        return None, None
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise ValueError(f"out must be a pair ({', '.join(names)}), got {type_name(out)}")
    return out


def gate_backward(
    grad_logits: Array,
    hidden_states: Array,
    gate_weight: Array,
    *,
    wanted: Sequence[str] = ("hidden_states", "gate_weight"),
    out: tuple[Array | None, Array | None] | None = None,
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The gradients of ``hidden_states`` and ``gate_weight`` from that of the logits, float32 [T, E].

    Args:
        wanted: the arguments whose gradients are computed; None is returned for another.
        out: arrays of the shapes and dtypes of the two arguments that receive them.
    """
    names = "hidden_states", "gate_weight"
    _check_wanted(wanted, names)
    out = _pair(out, names)
    gate_call = _core.Gate(hidden_states, gate_weight)
    return gate_call.backward(grad_logits, *out, *(name in wanted for name in names))


def gate_workspace_size(hidden_states: Array, gate_weight: Array) -> int:
    """Bytes of ``workspace`` that :func:`gate` needs for these arguments."""
    return _core.Gate(hidden_states, gate_weight).workspace_size()


def route(
    logits: Array,
    top_k: int,
    *,
    scoring: str = "softmax",
    correction_bias: Array | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
    group_mask_fill: float = 0.0,
    renormalize: bool = True,
    renormalize_eps: float = 1e-20,
    scaling_factor: float = 1.0,
    out: tuple[Array, Array] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """See :func:`paddle_moe.route`. It needs no workspace.

    Args:
        out: (int32 [T, K], float32 [T, K]), both contiguous.
    """
    out = _pair(out, ("routing_table", "router_weights"))
    options = checked(ROUTE_OPTIONS, locals())
    return _core.Route(logits, correction_bias, *options).run(*out)


def route_backward(
    grad_router_weights: Array,
    routing_table: Array,
    logits: Array,
    top_k: int,
    *,
    scoring: str = "softmax",
    correction_bias: Array | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
    group_mask_fill: float = 0.0,
    renormalize: bool = True,
    renormalize_eps: float = 1e-20,
    scaling_factor: float = 1.0,
    out: Array | None = None,
) -> np.ndarray:
    """The gradient of the logits, from that of the router weights and the ``routing_table`` of the call.

    The choice of the experts is a constant to it. A token with the ids -1 gets zeros.

    Args:
        grad_router_weights: float32 [T, K].
        routing_table: int32 [T, K], as :func:`route` returned it for the other arguments. Anything else is a
            ValueError on a CPU; on a GPU its rows get NaN.
        out: float32 [T, E], contiguous.
    """
    options = checked(ROUTE_OPTIONS, locals())
    return _core.Route(logits, correction_bias, *options).backward(routing_table, grad_router_weights, out)


def fused_gate_moe(
    hidden_states: Array,
    gate_weight: Array,
    gate_up_weights: Array | list[Array],
    down_weights: Array | list[Array],
    top_k: int,
    gate_up_bias: Array | list[Array] | None = None,
    down_bias: Array | list[Array] | None = None,
    *,
    scoring: str = "softmax",
    correction_bias: Array | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
    group_mask_fill: float = 0.0,
    renormalize: bool = True,
    renormalize_eps: float = 1e-20,
    scaling_factor: float = 1.0,
    gate_up_scale: Array | list[Array] | None = None,
    down_scale: Array | list[Array] | None = None,
    permuted_weights: bool = False,
    activation: str = "silu",
    experts_min: int = 0,
    experts_max: int | None = None,
    measurement_mode: bool = False,
    chunk_size: int = 0,
    return_routing: bool = False,
    out: Array | None = None,
    workspace: Array | None = None,
) -> np.ndarray | tuple[np.ndarray, ...]:
    """See :func:`paddle_moe.fused_gate_moe`.

    Args:
        out: [T, H], contiguous, of the dtype of ``hidden_states``.
        workspace: uint8, at least as large as both :func:`gate` and :func:`mixture_of_experts` need.
    """
    given = locals()
    gate_call = _core.Gate(hidden_states, gate_weight)
    route_call = _core.Route(gate_call.new_logits(), correction_bias, *checked(ROUTE_OPTIONS, given))
    routing = route_call.new_routing()
    experts_call = _call(hidden_states, *routing, given)
    return_routing = flag("return_routing", return_routing)
    result = experts_call.run_after(gate_call, route_call, out, workspace)
    if not return_routing:
        return result
    return (*result, *routing) if measurement_mode else (result, *routing)


def set_num_threads(n: int) -> None:
    """Sets how many threads the functions of this module use, up to 4096; 0 restores the default.

    They have threads of their own: ``paddle_moe.set_num_threads`` is another setting.
    """
    _core.set_num_threads(thread_count("n", n))


def get_num_threads() -> int:
    """How many threads the functions of this module use."""
    return _core.num_threads()


def isa_name() -> str:
    """The instruction set the kernels run with. ``PADDLE_MOE_ISA`` forces one of :func:`available_isas`."""
    return _core.isa_name()


def available_isas() -> list[str]:
    """The instruction sets this processor can run the kernels with."""
    return _core.available_isas()
