"""What the kernels compute, in NumPy and double precision, one readable function per kernel stage.

Arrays may be float64, float32, float16, or uint16 that holds the bits of bfloat16 numbers; quantised weights
int8, uint8 that holds the bits of fp8 e4m3 numbers, or int32 that holds int4 numbers. Every function computes
in float64 and returns float64, so a comparison shows the error of the kernel alone.
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


def from_fp8_bits(bits: np.ndarray) -> np.ndarray:
    """The float32 values of fp8 e4m3 numbers given as uint8 bits.

    Micikevicius et al. 2022, arXiv:2209.05433: 1 sign, 4 exponent and 3 mantissa bits; up to 448; no
    infinity, and NaN where all bits but the sign are set.
    """
    bits = np.asarray(bits, dtype=np.uint8).astype(np.int32)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    magnitude = np.where(exponent == 0, mantissa / 512, np.ldexp(1 + mantissa / 8, exponent - 7))
    magnitude[(bits & 127) == 127] = np.nan
    return np.where(bits > 127, -magnitude, magnitude).astype(np.float32)


def to_fp8_bits(values: np.ndarray) -> np.ndarray:
    """Rounds to the nearest fp8 e4m3 number (ties to even), at most 448; returns its bits as uint8."""
    values = np.asarray(values, dtype=np.float64)
    magnitude = np.minimum(np.abs(values), 448)
    exponent = np.frexp(np.maximum(magnitude, 2.0**-6))[1] - 1
    units = np.rint(np.ldexp(magnitude, 3 - exponent))  # of the last mantissa bit; 16 carries over
    bits = np.where(np.isnan(values), 127, (exponent + 6) * 8 + units)
    return (bits + 128 * np.signbit(values)).astype(np.uint8)


def pack_int4(numbers: np.ndarray) -> np.ndarray:
    """int32 [..., 8 * ceil(n / 64)] from integers [..., n], -8 to 7; see paddle_moe.pack_int4."""
    *leading, size = numbers.shape
    runs = -(-size // 64)
    completed = np.zeros((*leading, 64 * runs), np.int32)
    completed[..., :size] = numbers
    parts = np.moveaxis(completed.reshape(*leading, runs, 4, 16) & 15, -2, 0)
    halves = parts[0] | parts[1] << 4 | parts[2] << 8 | parts[3] << 12
    return (halves[..., ::2] | halves[..., 1::2] << 16).reshape(*leading, 8 * runs)


def unpack_int4(words: np.ndarray, size: int) -> np.ndarray:
    """The first `size` int4 numbers of each row of words, int8 [..., size]; see paddle_moe.pack_int4."""
    words = np.asarray(words, dtype=np.int32)
    i = np.arange(size)
    shifts = 16 * (i % 2) + 4 * (i % 64 // 16)
    numbers = words[..., i // 64 * 8 + i % 16 // 2] >> shifts & 15
    return (numbers - (numbers > 7) * 16).astype(np.int8)


def prepack_weights(weight: np.ndarray, parts: int, int4: bool = False) -> np.ndarray:
    """[E, in, out] in panels of 16 outputs, see paddle_moe.prepack_weights.

    uint16: bf16 bits. 8 bits: int8 or, uint8, those of fp8; with int4 the numbers that become words.
    """
    experts, inputs, outputs = weight.shape
    size = outputs // parts
    panels = -(-size // 16)
    completed = np.zeros((experts, inputs, parts, 16 * panels), weight.dtype)
    completed[..., :size] = weight.reshape(experts, inputs, parts, size)
    rows = completed.reshape(experts, inputs, parts * panels, 16).transpose(0, 2, 1, 3)
    if int4:
        eight = rows.reshape(*rows.shape[:2], inputs // 8, 4, 2, 16).astype(np.uint32) & 15
        shifts = np.array([[4 * n + 16 * half for half in range(2)] for n in range(4)], np.uint32)
        words = (eight << shifts[:, :, None]).sum((3, 4), dtype=np.uint32)
        return np.ascontiguousarray(words).view(np.int32)
    if weight.dtype == np.uint16:
        pairs = rows.reshape(*rows.shape[:2], inputs // 2, 2, 16).swapaxes(3, 4)
        return np.ascontiguousarray(pairs).reshape(*rows.shape[:2], inputs // 2, 32)
    rows = np.ascontiguousarray(rows)
    return rows.reshape(*rows.shape[:2], inputs // 2, 32) if weight.itemsize == 1 else rows


def unpack_8_or_4_bits(prepacked: np.ndarray, outputs: int, parts: int) -> np.ndarray:
    """The [E, in, out] of 8 bits, or of the numbers of int4 (words of int32), that prepack_weights() took."""
    experts, panels, rows = prepacked.shape[:3]
    inputs = rows * (8 if prepacked.dtype == np.int32 else 2)
    if prepacked.dtype == np.int32:
        shifts = np.array([[4 * n + 16 * half for half in range(2)] for n in range(4)], np.uint32)
        words = prepacked.view(np.uint32)[:, :, :, None, None]
        numbers = (words >> shifts[:, :, None] & 15).astype(np.int8)
        prepacked = numbers - (numbers > 7) * np.int8(16)
    panels_of_rows = prepacked.reshape(experts, panels, inputs, 16)
    columns = panels_of_rows.transpose(0, 2, 1, 3).reshape(experts, inputs, parts, 16 * panels // parts)
    return np.ascontiguousarray(columns[..., : outputs // parts]).reshape(experts, inputs, outputs)


@np.errstate(all="ignore")
def to_storage(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rounds to "float32", "float16" or "bfloat16" (uint16 bits): ties to even, too large becomes inf."""
    return to_bf16_bits(values) if dtype == "bfloat16" else np.asarray(values).astype(dtype)


def to_float64(array: np.ndarray) -> np.ndarray:
    """The exact values of an array in any of the formats above."""
    array = np.asarray(array)
    if array.dtype == np.uint8:
        return from_fp8_bits(array).astype(np.float64)
    return (from_bf16_bits(array) if array.dtype == np.uint16 else array).astype(np.float64)


def dequantise(weight: np.ndarray, scale: np.ndarray, permuted: bool = False, inputs: int = 0) -> np.ndarray:
    """weight [in, out] times its scales.

    Each stands for all, for one, or for a group of 128 along a dimension.

    Args:
        scale: [], [1], [out], [in or in / 128 or 1, out or out / 128 or 1], rounded up.
        permuted: the two matrices are transposed.
        inputs: in, of int4 weights, which are transposed.
    """
    if weight.dtype == np.int32:
        weight = unpack_int4(weight, inputs)
    values, scale = to_float64(weight), to_float64(scale)
    if permuted:
        return dequantise(values.T, scale.T).T
    scale = scale.reshape((1, 1, *scale.shape)[-2:])
    for axis, size in enumerate(values.shape):
        if scale.shape[axis] not in (1, size):
            if scale.shape[axis] != -(-size // 128):
                raise ValueError(f"scale must fit the weight {values.shape}, got the shape {scale.shape}")
            scale = np.take(scale, np.arange(size) // 128, axis)
    return values * scale


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


# Derivatives. At a kink they take the left side, swigluoai at its limits the inside, as the kernels do.


def silu_slope(x: np.ndarray) -> np.ndarray:
    """sigmoid(x) (1 + x (1 - sigmoid(x)))."""
    return sigmoid(x) * (1 + x * (1 - sigmoid(x)))


def gelu_slope(x: np.ndarray) -> np.ndarray:
    """Phi(x) + x phi(x), phi the normal density."""
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return 0.5 * (1 + erf(x / math.sqrt(2))) + x * np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)


def gelu_tanh_slope(x: np.ndarray) -> np.ndarray:
    """0.5 (1 + tanh(u)) + 0.5 x (1 - tanh(u)^2) du/dx, u as in gelu_tanh."""
    tanh = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)


def relu_slope(x: np.ndarray) -> np.ndarray:
    """1 where x > 0."""
    return np.where(x <= 0, 0.0, 1.0)


def relu2_slope(x: np.ndarray) -> np.ndarray:
    """2 max(x, 0)."""
    return 2 * np.maximum(x, 0)


def selu_slope(x: np.ndarray) -> np.ndarray:
    """scale * (1 if x > 0 else alpha * exp(x))."""
    scale, alpha = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
    return scale * np.where(x > 0, 1.0, alpha * np.exp(np.minimum(x, 0)))


def identity_slope(x: np.ndarray) -> np.ndarray:
    """1."""
    return np.ones_like(x)


SLOPES = {
    "silu": silu_slope,
    "gelu": gelu_slope,
    "gelu_tanh": gelu_tanh_slope,
    "relu": relu_slope,
    "relu2": relu2_slope,
    "selu": selu_slope,
    "identity": identity_slope,
}


def activate_slopes(activation: str, gate: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The derivatives of activate() by gate and by up."""
    if not activation.startswith("swigluoai"):
        return SLOPES[activation](gate) * up, ACTIVATIONS[activation](gate)
    alpha, limit = [float(number) for number in re.findall(r"[^(),\s]+", activation)[1:]] or (1.702, 7.0)
    g, u = np.minimum(gate, limit), np.clip(up, -limit, limit)
    s = sigmoid(alpha * g)
    by_gate = np.where(gate > limit, 0, (u + 1) * (s + alpha * g * s * (1 - s)))
    return by_gate, np.where(np.abs(up) > limit, 0, g * s)


# ---------------------------------------------------------------- mixture_of_experts


def _gates_and_ups(gate_up: Sequence[np.ndarray], num_experts: int, axis: int) -> tuple[list, list]:
    if len(gate_up) == 2 * num_experts:  # separate: all gates, then all ups
        return list(gate_up[:num_experts]), list(gate_up[num_experts:])
    halves = [np.split(np.asarray(both), 2, axis=axis) for both in gate_up]
    return [gate for gate, _ in halves], [up for _, up in halves]


def _scales_of_halves(scales, num_experts: int, axis: int) -> tuple[list, list]:
    """Those of all gates and of all ups; where they are side by side a scale may be that of both."""
    if len(scales) == 2 * num_experts:
        return list(scales[:num_experts]), list(scales[num_experts:])
    halves = []
    for scale in map(np.asarray, scales):
        out = axis if scale.ndim == 2 else 0
        shared = scale.ndim == 0 or scale.shape[out] == 1
        halves.append((scale, scale) if shared else np.split(scale, 2, out))
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
    gate_up_scale: Sequence[np.ndarray] | np.ndarray | None = None,
    down_scale: Sequence[np.ndarray] | np.ndarray | None = None,
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
        gate_up_scale, down_scale: of quantised weights: for each matrix the scales that dequantise() takes.

    Returns:
        out [T, H], not rounded, or (out, amax).
    """
    if gate_up_scale is not None:
        count, axis = len(down_weights), 0 if permuted_weights else 1
        halves = zip(
            _gates_and_ups(gate_up_weights, count, axis), _scales_of_halves(gate_up_scale, count, axis)
        )
        hidden = np.shape(hidden_states)[1]
        gate_up_weights = [
            dequantise(*pair, permuted_weights, hidden) for half in halves for pair in zip(*half)
        ]
        inter = gate_up_weights[0].shape[0 if permuted_weights else 1]
        down_weights = [dequantise(*pair, permuted_weights, inter) for pair in zip(down_weights, down_scale)]
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


@np.errstate(all="ignore")
def mixture_of_experts_backward(
    grad_out: np.ndarray,
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
    round_intermediate: str | None = None,
) -> dict[str, np.ndarray | list[np.ndarray]]:
    """The gradients of mixture_of_experts by its arguments, from that of its result.

    Args:
        grad_out: [T, H].
        round_intermediate: None, or the dtype that the kernel rounds the rows between its GEMMs to: the
            pre-activations, the intermediate (also where it is weighted) and the gradients of gate and up.
        Every other argument is that of mixture_of_experts().

    Returns:
        By argument name the gradient in the layout of the argument, a list where it is a list.
    """
    num_experts = len(down_weights)
    x, weight_of, grad = to_float64(hidden_states), to_float64(router_weights), to_float64(grad_out)
    gates, ups = _gates_and_ups(gate_up_weights, num_experts, axis=0 if permuted_weights else 1)
    gate_bias, up_bias = [0] * num_experts, [0] * num_experts
    if gate_up_bias is not None:
        gate_bias, up_bias = _gates_and_ups(gate_up_bias, num_experts, axis=0)

    def turned(matrix: np.ndarray) -> np.ndarray:
        return matrix.T if permuted_weights else matrix

    def rounded(values: np.ndarray) -> np.ndarray:
        return values if round_intermediate is None else to_float64(to_storage(values, round_intermediate))

    x_grad, router_grad = np.zeros(x.shape), np.zeros(weight_of.shape)
    parts = {name: [] for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")}
    for e in range(num_experts):
        token, slot = np.nonzero(np.asarray(routing_table) == experts_min + e)
        gate_matrix, up_matrix = turned(to_float64(gates[e])), turned(to_float64(ups[e]))
        down_matrix = turned(to_float64(down_weights[e]))
        weight = weight_of[token, slot][:, None]
        gate = rounded(x[token] @ gate_matrix + to_float64(gate_bias[e]))
        up = rounded(x[token] @ up_matrix + to_float64(up_bias[e]))
        intermediate = rounded(activate(activation, gate, up))
        by_gate, by_up = activate_slopes(activation, gate, up)

        inter_grad = grad[token] @ down_matrix.T  # before the router weight
        router_grad[token, slot] = np.sum(inter_grad * intermediate, axis=1)
        if down_bias is not None:
            router_grad[token, slot] += grad[token] @ to_float64(down_bias[e])
        gate_grad, up_grad = (rounded(weight * inter_grad * slope) for slope in (by_gate, by_up))
        np.add.at(x_grad, token, gate_grad @ gate_matrix.T + up_grad @ up_matrix.T)
        parts["gate"].append(turned(x[token].T @ gate_grad))
        parts["up"].append(turned(x[token].T @ up_grad))
        parts["down"].append(turned(rounded(weight * intermediate).T @ grad[token]))
        parts["gate_bias"].append(gate_grad.sum(axis=0))
        parts["up_bias"].append(up_grad.sum(axis=0))
        parts["down_bias"].append((weight * grad[token]).sum(axis=0))

    def arranged(argument, gate: str, up: str | None = None, axis: int = 0):
        if up is None:
            gradient = parts[gate]
        elif len(argument) == 2 * num_experts:
            gradient = parts[gate] + parts[up]
        else:
            gradient = [np.concatenate(pair, axis=axis) for pair in zip(parts[gate], parts[up])]
        return np.stack(gradient) if isinstance(argument, np.ndarray) else gradient

    gradients = {
        "hidden_states": x_grad,
        "router_weights": router_grad,
        "gate_up_weights": arranged(gate_up_weights, "gate", "up", 0 if permuted_weights else 1),
        "down_weights": arranged(down_weights, "down"),
    }
    if gate_up_bias is not None:
        gradients["gate_up_bias"] = arranged(gate_up_bias, "gate_bias", "up_bias")
    if down_bias is not None:
        gradients["down_bias"] = arranged(down_bias, "down_bias")
    return gradients


# ---------------------------------------------------------------- gate and route


def gate(hidden_states: np.ndarray, gate_weight: np.ndarray) -> np.ndarray:
    """Router logits [T, E] from hidden_states [T, H] and gate_weight [H, E]."""
    return to_float64(hidden_states) @ to_float64(gate_weight)


def gate_backward(
    grad_logits: np.ndarray, hidden_states: np.ndarray, gate_weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of hidden_states [T, H] and gate_weight [H, E] from that of the logits [T, E]."""
    grad = to_float64(grad_logits)
    return grad @ to_float64(gate_weight).T, to_float64(hidden_states).T @ grad


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
        renormalize, renormalize_eps: divide the weights by their sum + eps, unless that is 0 (not for
            softmax_topk).
        scaling_factor: multiplies the weights in the end.

    Returns:
        routing_table int32 [T, top_k], best first, ties to the lowest id; router_weights float64 [T, top_k].
        A row in which a score, a selection key or a weight is NaN has the ids -1 and the weights 0.
        A group the sum of whose two best keys is NaN, which are opposite infinities, loses.
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
        total = weights.sum(axis=-1, keepdims=True) + renormalize_eps
        weights = weights / (total + (total == 0))
    weights = weights * scaling_factor

    invalid = np.isnan(scores).any(axis=-1) | np.isnan(keys).any(axis=-1) | np.isnan(weights).any(axis=-1)
    ids = np.where(invalid[:, None], -1, ids).astype(np.int32)
    return ids, np.where(invalid[:, None], 0.0, weights)


@np.errstate(all="ignore")
def route_backward(
    grad_router_weights: np.ndarray,
    routing_table: np.ndarray,
    logits: np.ndarray,
    *,
    scoring: str = "softmax",
    renormalize: bool = True,
    renormalize_eps: float = 1e-20,
    scaling_factor: float = 1.0,
) -> np.ndarray:
    """The gradient of the logits [T, E], the choice of the experts held fixed; zero in rows of -1.

    The options that only choose experts (correction_bias and the groups) do not matter here.
    """
    logits, grad = to_float64(logits), to_float64(grad_router_weights) * scaling_factor
    valid = routing_table[:, :1] >= 0
    ids = np.where(valid, routing_table, 0)

    def softmax_backward(probabilities, grad):
        return probabilities * (grad - np.sum(probabilities * grad, axis=-1, keepdims=True))

    def scattered(chosen):
        result = np.zeros(logits.shape)
        np.add.at(result, (np.arange(len(ids))[:, None], ids), chosen)  # an id may appear twice
        return result

    if scoring == "softmax_topk":
        result = scattered(softmax_backward(softmax(np.take_along_axis(logits, ids, axis=-1)), grad))
        return np.where(valid, result, 0.0)
    scores = {"softmax": softmax, "sigmoid": sigmoid}[scoring](logits)
    if renormalize:
        chosen = np.take_along_axis(scores, ids, axis=-1)
        total = chosen.sum(axis=-1, keepdims=True) + renormalize_eps
        total = total + (total == 0)
        grad = (grad - np.sum(grad * chosen, axis=-1, keepdims=True) / total) / total
    by_score = scattered(grad)
    result = softmax_backward(scores, by_score) if scoring == "softmax" else by_score * scores * (1 - scores)
    return np.where(valid, result, 0.0)


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
