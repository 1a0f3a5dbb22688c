"""What the kernels compute, in NumPy and double precision, one readable function per kernel stage.

Arrays may be float64, float32, float16, or uint16 that holds the bits of bfloat16 numbers. Every function
computes in float64 and returns float64, so a comparison shows the error of the kernel alone.
Overflow gives inf and inf - inf gives NaN, as in the kernels, without a warning.
Nothing here is fast, and nothing imports Paddle.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

# ---------------------------------------------------------------- number formats


@np.errstate(all="ignore")
def to_bf16_bits(values: np.ndarray) -> np.ndarray:
    """Rounds to float32, then to the nearest bfloat16 (ties to even); returns its bits as uint16."""
    single = np.asarray(values).astype(np.float32)
    bits = single.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(single), 0x7FC0, rounded).astype(np.uint16)


def from_bf16_bits(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 numbers given as uint16 bits."""
    return (np.asarray(bits, dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)


@np.errstate(all="ignore")
def to_storage(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rounds to "float32", "float16" or "bfloat16" (uint16 bits): ties to even, too large becomes inf."""
    return to_bf16_bits(values) if dtype == "bfloat16" else np.asarray(values).astype(dtype)


def to_float64(array: np.ndarray) -> np.ndarray:
    """The exact values of an array in any of the formats above."""
    array = np.asarray(array)
    return (from_bf16_bits(array) if array.dtype == np.uint16 else array).astype(np.float64)


# ---------------------------------------------------------------- activations


@np.errstate(all="ignore")
def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x) (Elfwing et al. 2017, arXiv:1702.03118)."""
    return x * sigmoid(x)


def gelu(x: np.ndarray) -> np.ndarray:
    """x * Phi(x), Phi the normal distribution function (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """The tanh approximation of gelu, from the same paper."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def relu(x: np.ndarray) -> np.ndarray:
    """max(x, 0)."""
    return np.maximum(x, 0)


def relu2(x: np.ndarray) -> np.ndarray:
    """max(x, 0) squared (So et al. 2021, arXiv:2109.08668)."""
    return np.maximum(x, 0) ** 2


def selu(x: np.ndarray) -> np.ndarray:
    """scale * (x if x > 0 else alpha * (exp(x) - 1)) (Klambauer et al. 2017, arXiv:1706.02515)."""
    scale, alpha = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
    return scale * np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def identity(x: np.ndarray) -> np.ndarray:
    """x."""
    return x


def swigluoai(gate: np.ndarray, up: np.ndarray, alpha: float = 1.702, limit: float = 7.0) -> np.ndarray:
    """gpt-oss: (up + 1) * gate * sigmoid(alpha * gate) with gate <= limit and |up| <= limit."""
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return (up + 1) * gate * sigmoid(alpha * gate)


ACTIVATIONS = {f.__name__: f for f in (silu, gelu, gelu_tanh, relu, relu2, selu, identity)}


def activate(activation: str, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """act(gate) * up, or swigluoai(gate, up) for "swigluoai" and "swigluoai(alpha, limit)"."""
    if activation.startswith("swigluoai"):
        return swigluoai(gate, up, *(float(number) for number in re.findall(r"[^(),\s]+", activation)[1:]))
    return ACTIVATIONS[activation](gate) * up


# ---------------------------------------------------------------- mixture_of_experts


def _gates_and_ups(gate_up: Sequence[np.ndarray], num_experts: int, axis: int) -> tuple[list, list]:
    if len(gate_up) == 2 * num_experts:  # separate: all gates, then all ups
        return list(gate_up[:num_experts]), list(gate_up[num_experts:])
    halves = [np.split(np.asarray(both), 2, axis=axis) for both in gate_up]
    return [gate for gate, _ in halves], [up for _, up in halves]


@np.errstate(all="ignore")
def mixture_of_experts(
    hidden_states: np.ndarray,
    routing_table: np.ndarray,
    router_weights: np.ndarray,
    gate_up_weights: Sequence[np.ndarray] | np.ndarray,
    down_weights: Sequence[np.ndarray] | np.ndarray,
    gate_up_bias: Sequence[np.ndarray] | np.ndarray | None = None,
    down_bias: Sequence[np.ndarray] | np.ndarray | None = None,
    *,
    permuted_weights: bool = False,
    activation: str = "silu",
    experts_min: int = 0,
    experts_max: int | None = None,
    measurement_mode: bool = False,
    round_intermediate: str | None = None,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """The sum over k of router_weights[t, k] * expert routing_table[t, k] of hidden_states[t].

    Args:
        hidden_states: [T, H].
        routing_table: integer [T, K], global expert ids; those outside the range add nothing.
        router_weights: [T, K].
        gate_up_weights: E_l x [H, 2I], or 2*E_l x [H, I] (all gates, then all ups), or one [E_l, H, 2I].
        down_weights: E_l x [I, H], or one [E_l, I, H].
        gate_up_bias: None, E_l x [2I], 2*E_l x [I], or one [E_l, 2I].
        down_bias: None, E_l x [H], or one [E_l, H].
        permuted_weights: every matrix is stored transposed.
        activation: a name from ACTIVATIONS, "swigluoai" or "swigluoai(alpha, limit)".
        experts_min, experts_max: inclusive global range of the experts that were passed.
        measurement_mode: also return amax [E_l], each expert's largest |intermediate|, 0 without a token.
        round_intermediate: None, or the dtype ("bfloat16", ...) that the kernel rounds the intermediate to.

    Returns:
        out [T, H], not rounded, or (out, amax).
    """
    num_experts = len(down_weights)
    if experts_max not in (None, experts_min + num_experts - 1):
        raise ValueError(f"experts_max must be {experts_min + num_experts - 1}, got {experts_max}")
    x, weight_of = to_float64(hidden_states), to_float64(router_weights)
    gates, ups = _gates_and_ups(gate_up_weights, num_experts, axis=0 if permuted_weights else 1)
    if gate_up_bias is not None:
        gate_bias, up_bias = _gates_and_ups(gate_up_bias, num_experts, axis=0)

    def matrix(stored: np.ndarray) -> np.ndarray:
        return to_float64(stored).T if permuted_weights else to_float64(stored)

    out, amax = np.zeros(x.shape), np.zeros(num_experts)
    for e in range(num_experts):
        token, slot = np.nonzero(np.asarray(routing_table) == experts_min + e)
        if len(token) == 0:
            continue
        gate, up = x[token] @ matrix(gates[e]), x[token] @ matrix(ups[e])
        if gate_up_bias is not None:
            gate, up = gate + to_float64(gate_bias[e]), up + to_float64(up_bias[e])
        intermediate = activate(activation, gate, up)
        amax[e] = np.abs(intermediate).max()
        if round_intermediate is not None:
            intermediate = to_float64(to_storage(intermediate, round_intermediate))
        y = intermediate @ matrix(down_weights[e])
        if down_bias is not None:
            y = y + to_float64(down_bias[e])
        np.add.at(out, token, weight_of[token, slot][:, None] * y)
    return (out, amax) if measurement_mode else out


# ---------------------------------------------------------------- gate and route


def gate(hidden_states: np.ndarray, gate_weight: np.ndarray) -> np.ndarray:
    """Router logits [T, E] from hidden_states [T, H] and gate_weight [H, E]."""
    return to_float64(hidden_states) @ to_float64(gate_weight)


@np.errstate(all="ignore")
def softmax(x: np.ndarray) -> np.ndarray:
    """exp(x) / sum(exp(x)) over the last axis; NaN where a row holds NaN or +inf, or only -inf."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@np.errstate(all="ignore")
def route(
    logits: np.ndarray,
    top_k: int,
    *,
    scoring: str = "softmax",
    correction_bias: np.ndarray | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
    group_mask_fill: float = 0.0,
    renormalize: bool = True,
    renormalize_eps: float = 1e-20,
    scaling_factor: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses top_k experts per token and weighs them.

    Bias-corrected selection and limited groups come from DeepSeek-V3 (arXiv:2412.19437, section 2.1.2).

    Args:
        logits: [T, E].
        top_k: experts per token, at most those of the groups that are kept.
        scoring: "softmax" over all E, "sigmoid", or "softmax_topk": softmax over the chosen logits only.
        correction_bias: None or [E], added to the scores for the selection only.
        num_groups, topk_groups: experts form num_groups equal groups; only the topk_groups best stay.
        group_score: a group's rank is its "max" or its "top2_sum", the sum of its two largest keys.
        group_mask_fill: 0.0 or -inf, the selection key of experts in groups that lost.
        renormalize, renormalize_eps: divide the weights by their sum + eps (not for softmax_topk).
        scaling_factor: multiplies the weights in the end.

    Returns:
        routing_table int32 [T, top_k], best first, ties to the lowest id; router_weights float64 [T, top_k].
        A row in which a score, a selection key or a weight is NaN has the ids -1 and the weights 0.
    """
    logits = to_float64(logits)
    num_tokens, num_experts = logits.shape
    scores = {"softmax": softmax, "sigmoid": sigmoid, "softmax_topk": identity}[scoring](logits)
    # Softmax and sigmoid are monotone: without bias and groups the logits choose, which no rounding can tie.
    keys = logits if correction_bias is None and num_groups == 1 else scores
    if correction_bias is not None:
        keys = keys + to_float64(correction_bias)

    if num_groups > 1:
        grouped = keys.reshape(num_tokens, num_groups, num_experts // num_groups)
        ranked = np.sort(grouped, axis=-1)[..., ::-1]
        group_scores = ranked[..., 0] if group_score == "max" else ranked[..., :2].sum(axis=-1)
        losers = np.argsort(-group_scores, axis=-1, kind="stable")[:, topk_groups:]
        grouped = grouped.copy()
        np.put_along_axis(grouped, losers[..., None], group_mask_fill, axis=1)
        masked_keys = grouped.reshape(num_tokens, num_experts)
    else:
        masked_keys = keys

    ids = np.argsort(-masked_keys, axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(scores, ids, axis=-1)
    if scoring == "softmax_topk":
        weights = softmax(weights)
    elif renormalize:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + renormalize_eps)
    weights = weights * scaling_factor

    invalid = np.isnan(scores).any(axis=-1) | np.isnan(keys).any(axis=-1) | np.isnan(weights).any(axis=-1)
    ids = np.where(invalid[:, None], -1, ids).astype(np.int32)
    return ids, np.where(invalid[:, None], 0.0, weights)


ROUTE_OPTIONS = (
    "scoring",
    "correction_bias",
    "num_groups",
    "topk_groups",
    "group_score",
    "group_mask_fill",
    "renormalize",
    "renormalize_eps",
    "scaling_factor",
)


def fused_gate_moe(
    hidden_states: np.ndarray,
    gate_weight: np.ndarray,
    gate_up_weights: Sequence[np.ndarray] | np.ndarray,
    down_weights: Sequence[np.ndarray] | np.ndarray,
    top_k: int,
    gate_up_bias: Sequence[np.ndarray] | np.ndarray | None = None,
    down_bias: Sequence[np.ndarray] | np.ndarray | None = None,
    *,
    return_routing: bool = False,
    **options,
) -> np.ndarray | tuple:
    """gate, then route, then mixture_of_experts; options are those of the last two.

    Returns:
        out, then amax with measurement_mode, then routing_table and router_weights with return_routing.
    """
    route_options = {name: options.pop(name) for name in ROUTE_OPTIONS if name in options}
    table, weights = route(gate(hidden_states, gate_weight), top_k, **route_options)
    result = mixture_of_experts(
        hidden_states, table, weights, gate_up_weights, down_weights, gate_up_bias, down_bias, **options
    )
    if not return_routing:
        return result
    return (*(result if isinstance(result, tuple) else (result,)), table, weights)
