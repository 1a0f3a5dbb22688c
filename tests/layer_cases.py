"""Dense weights, tokens and expected outputs that the tests of FusedMoE share, in one process and in many."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import numpy as np
from checks import dtype_of, random_dense

from paddle_moe import reference
from paddle_moe.reference import to_storage

# No size is a multiple of the other or of a likely number of ranks.
HIDDEN, INTER, SHARED, EXPERTS, TOP_K, TOKENS = 12, 10, 9, 5, 2, 11
EVERYTHING = dict(bias=True, shared=True, shared_gate=True, correction=True, gate_bias=True)


class Shard(NamedTuple):
    """A position in a grid without processes: enough to build a layer, to load it, and for partial_output."""

    ep_rank: int
    ep_size: int
    tp_rank: int
    tp_size: int
    dp_group: None = None
    dp_rank: int = 0

    @property
    def rank(self) -> int:
        return self.ep_rank * self.tp_size + self.tp_rank

    @property
    def world_size(self) -> int:
        return self.ep_size * self.tp_size

    def size(self, group: str) -> int:
        return {"ep": self.ep_size, "tp": self.tp_size, "grid": self.ep_size * self.tp_size}[group]

    def exchange(self, value, what, detail=""):
        return [value]

    is_watched, logs_failures = False, True

    def files(self):
        return contextlib.nullcontext()


def grid(ep_size: int, tp_size: int) -> list[Shard]:
    return [Shard(e, ep_size, t, tp_size) for e in range(ep_size) for t in range(tp_size)]


def dense_weights(
    dtype="float32",
    *,
    bias=False,
    shared=False,
    shared_gate=False,
    correction=False,
    gate_bias=False,
    num_experts=EXPERTS,
    seed=0,
):
    """NumPy arguments of FusedMoE.from_dense; bfloat16 as bits."""
    rng = np.random.default_rng(seed)
    dense = random_dense(rng, num_experts, HIDDEN, INTER, dtype, bias)
    weights = {
        "gate_weight": rng.standard_normal((HIDDEN, num_experts)).astype(np.float32),
        "gate_up": np.concatenate([dense["gate"], dense["up"]], axis=2),
        "down": dense["down"],
    }
    if bias:
        weights["gate_up_bias"] = np.concatenate([dense["gate_bias"], dense["up_bias"]], axis=1)
        weights["down_bias"] = dense["down_bias"]
    if shared:
        one = random_dense(rng, 1, HIDDEN, SHARED, dtype)
        weights["shared_gate_up"] = np.concatenate([one["gate"], one["up"]], axis=2)[0]
        weights["shared_down"] = one["down"][0]
    if shared_gate:
        weights["shared_gate"] = rng.standard_normal((HIDDEN, 1)).astype(np.float32)
    if correction:
        weights["correction_bias"] = rng.standard_normal(num_experts).astype(np.float32)
    if gate_bias:
        weights["gate_bias"] = rng.standard_normal(num_experts).astype(np.float32)
    return weights


def tokens(dtype="float32", num_tokens=TOKENS, seed=1):
    return to_storage(np.random.default_rng(seed).standard_normal((num_tokens, HIDDEN)), dtype)


def expected_output(x, weights, routing=None, activation="silu", **route_options):
    """float64 output of the layer for x [T, H], and the routing it used."""
    if routing is None:
        logits = reference.gate(x, weights["gate_weight"]) + weights.get("gate_bias", 0)
        bias = weights.get("correction_bias")
        routing = reference.route(logits, TOP_K, correction_bias=bias, **route_options)
    options = dict(activation=activation, round_intermediate=dtype_of(x))
    output = reference.mixture_of_experts(
        x,
        *routing,
        weights["gate_up"],
        weights["down"],
        weights.get("gate_up_bias"),
        weights.get("down_bias"),
        **options,
    )
    if "shared_down" in weights:
        share = np.ones((len(x), 1))
        if "shared_gate" in weights:
            share = reference.sigmoid(reference.gate(x, weights["shared_gate"]))
        first = np.zeros((len(x), 1), int)
        shared = [weights["shared_gate_up"]], [weights["shared_down"]]
        output += reference.mixture_of_experts(x, first, share, *shared, **options)
    return output, routing
