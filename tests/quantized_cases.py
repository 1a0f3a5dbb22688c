"""Calls of mixture_of_experts with quantised weights, and the same with what they stand for."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from checkpoint_cases import Model
from checks import random_tokens

import paddle_moe
from paddle_moe import FusedMoE, reference
from paddle_moe.reference import dequantise

GRANULARITIES = ("tensor", "channel", "group", "block")
KINDS = ("int8", "float8_e4m3fn", "int4")
per_kind = pytest.mark.parametrize("kind", KINDS)
per_8_bit_kind = pytest.mark.parametrize("kind", KINDS[:2])
# int4 is stored transposed.
per_storage = pytest.mark.parametrize(
    ("kind", "permuted"),
    [(kind, permuted) for kind in KINDS for permuted in (True, False) if kind != "int4" or permuted],
)
per_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


def groups(size: int) -> int:
    return -(-size // 128)


def random_weights(
    rng, num_experts: int, rows: int, columns: int, kind: str, granularity: str, parts: int = 1
):
    """(numbers [E, in, out], scales [E, ...]) of weights near 1 / sqrt(in); int4 is not packed yet."""
    shape = (num_experts, rows, columns)
    if kind == "int8":
        bits = rng.integers(-128, 127, shape, endpoint=True).astype(np.int8)
    elif kind == "int4":
        bits = rng.integers(-8, 7, shape, endpoint=True).astype(np.int8)
    else:
        bits = reference.to_fp8_bits(rng.standard_normal(shape) * 60)
    scales = {
        "tensor": (1,),
        "channel": (columns,),
        "group": (groups(rows), columns),
        "block": (groups(rows), parts * groups(columns // parts)),
    }
    scale = rng.uniform(0.5, 1.5, (num_experts, *scales[granularity]))
    scale /= np.sqrt(rows) * (4 if kind == "int4" else 60)
    return bits, scale.astype(np.float32)


def quantized_case(
    num_tokens=9, hidden=300, inter=200, num_experts=4, top_k=2, dtype="float32", *,
    kind="int8", granularity="channel", layout="stacked", permuted=False, seed=0, **options,
) -> dict:  # fmt: skip
    rng = np.random.default_rng(seed)

    def stored(pair):
        bits, scale = (np.swapaxes(a, 1, 2) if permuted and a.ndim == 3 else a for a in pair)
        if kind == "int4":
            bits = paddle_moe.pack_int4(paddle.to_tensor(bits)).numpy()
        arrays = np.ascontiguousarray(bits), np.ascontiguousarray(scale)
        return arrays if layout == "stacked" else tuple(map(list, arrays))

    if layout == "separate":
        halves = [
            stored(random_weights(rng, num_experts, hidden, inter, kind, granularity)) for _ in range(2)
        ]
        gate_up, gate_up_scale = ([*gates, *ups] for gates, ups in zip(*halves))
    else:
        pair = random_weights(rng, num_experts, hidden, 2 * inter, kind, granularity, parts=2)
        gate_up, gate_up_scale = stored(pair)
    down, down_scale = stored(random_weights(rng, num_experts, inter, hidden, kind, granularity))
    return {
        **random_tokens(rng, num_tokens, hidden, top_k, num_experts, dtype),
        "gate_up_weights": gate_up,
        "down_weights": down,
        "gate_up_scale": gate_up_scale,
        "down_scale": down_scale,
        "permuted_weights": permuted,
        **options,
    }


def dequantised(case: dict) -> dict:
    """The same call with float32 weights, each the product with its scale rounded once."""
    result = {name: value for name, value in case.items() if not name.endswith("_scale")}
    permuted, count = case["permuted_weights"], len(case["down_weights"])
    axis = 0 if permuted else 1
    halves = zip(
        reference._gates_and_ups(case["gate_up_weights"], count, axis),
        reference._scales_of_halves(case["gate_up_scale"], count, axis),
    )
    hidden = case["hidden_states"].shape[1]
    gates, ups = ([dequantise(*pair, permuted, hidden) for pair in zip(*half)] for half in halves)
    inter = gates[0].shape[axis]
    pairs = zip(case["down_weights"], case["down_scale"])
    weights = {
        "gate_up_weights": [np.concatenate(pair, axis) for pair in zip(gates, ups)],
        "down_weights": [dequantise(*pair, permuted, inter) for pair in pairs],
    }
    for name, matrices in weights.items():
        result[name] = [np.ascontiguousarray(matrix, np.float32) for matrix in matrices]
    return result


def slack_of(case: dict) -> float:
    """Integer products hold half-precision activations to 2^-15 of the largest of 64 neighbours.

    More results then fall on the other side of where they are rounded; the error of the result grows by less
    than a fifth: see test_accuracy_in_half_precision.
    """
    weight = case["gate_up_weights"][0]
    integers = weight.dtype != np.uint8 and (case["permuted_weights"] or weight.ndim > 2)  # or prepacked
    return 2.5 if integers and case["hidden_states"].dtype != np.float32 else 1.0


def quantised_model(kind: str, granularity: str | None = None, seed: int | None = None, **options) -> Model:
    model = Model(seed=seed, **options)
    for layer in model.sublayers():
        if isinstance(layer, FusedMoE):
            layer.quantize_(kind, granularity)
    return model


def prepacked_quantised(case: dict) -> dict:
    """The same call with prepacked weights."""
    result = {**case, "permuted_weights": False}
    permuted, int4 = case["permuted_weights"], case["gate_up_weights"][0].dtype == np.int32
    hidden = case["hidden_states"].shape[1]
    separate = len(case["gate_up_weights"]) == 2 * len(case["down_weights"])
    inter = case["gate_up_weights"][0].shape[0 if permuted else 1] // (1 if separate else 2)
    for kind, inputs, parts in (("gate_up", hidden, 1 if separate else 2), ("down", inter, 1)):
        weights, scales = case[f"{kind}_weights"], case[f"{kind}_scale"]

        def pack(weight):
            weight = reference.unpack_int4(weight, inputs) if int4 else weight
            return reference.prepack_weights(weight.swapaxes(1, 2) if permuted else weight, parts, int4)

        def turn(scale):
            return np.ascontiguousarray(scale.swapaxes(1, 2)) if permuted and scale.ndim == 3 else scale

        if isinstance(weights, list):
            result[f"{kind}_weights"] = [pack(one[None]) for one in weights]
            result[f"{kind}_scale"] = [turn(one[None]) for one in scales]
        else:
            result[f"{kind}_weights"], result[f"{kind}_scale"] = pack(weights), turn(scales)
    return result
