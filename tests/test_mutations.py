"""Proof that the comparisons of the other tests can fail: each way to be wrong must be reported.

A mutation recomputes the result with the reference, wrongly, and stores it as a kernel would.
"""

from __future__ import annotations

import numpy as np
import pytest
from checks import (
    DTYPES,
    arrange,
    assert_close,
    assert_exact,
    assert_same_bits,
    per_dtype,
    random_dense,
    random_tokens,
)

from paddle_moe import reference
from paddle_moe.reference import to_float64, to_storage

TOKENS, HIDDEN, INTER, EXPERTS, TOP_K = 33, 64, 48, 8, 2


class Layer:
    """A dense layer, its right result, and the result of each rank of a 2 x 2 grid."""

    def __init__(self, dtype: str):
        rng = np.random.default_rng(11)
        self.dtype = dtype
        self.dense = random_dense(rng, EXPERTS, HIDDEN, INTER, dtype, bias=True)
        self.tokens = random_tokens(rng, TOKENS, HIDDEN, TOP_K, EXPERTS, dtype)
        self.expected = self.run(self.dense)

    def run(self, dense, round_intermediate=True, **options) -> np.ndarray:
        case = {**self.tokens, **arrange(dense), **options}
        return reference.mixture_of_experts(
            **case, round_intermediate=self.dtype if round_intermediate else None
        )

    def shard(self, experts=slice(None), columns=slice(None), down_bias=True) -> dict:
        d = self.dense
        return {
            "gate": d["gate"][experts, :, columns],
            "up": d["up"][experts, :, columns],
            "down": d["down"][experts, columns, :],
            "gate_bias": d["gate_bias"][experts, columns],
            "up_bias": d["up_bias"][experts, columns],
            "down_bias": d["down_bias"][experts] if down_bias else 0 * d["down_bias"][experts],
        }

    def grid(self, ep=2, tp=2) -> list[list[np.ndarray]]:
        """The partial sums by ep_rank and tp_rank."""
        per_ep, per_tp = EXPERTS // ep, INTER // tp
        return [
            [
                self.run(
                    self.shard(
                        slice(e * per_ep, (e + 1) * per_ep), slice(t * per_tp, (t + 1) * per_tp), t == 0
                    ),
                    experts_min=e * per_ep,
                )
                for t in range(tp)
            ]
            for e in range(ep)
        ]


@pytest.fixture(scope="module", params=DTYPES)
def layer(request):
    return Layer(request.param)


def without_expert(dense: dict, expert: int) -> dict:
    """The dense weights with one expert that contributes nothing."""
    dense = {name: array.copy() for name, array in dense.items()}
    dense["down"][expert] = 0
    dense["down_bias"][expert] = 0
    return dense


def swapped(dense: dict) -> dict:
    names = {"gate": "up", "up": "gate", "gate_bias": "up_bias", "up_bias": "gate_bias"}
    return {names.get(name, name): array for name, array in dense.items()}


def one_row_by_another_expert(layer: Layer) -> np.ndarray:
    table = layer.tokens["routing_table"].copy()
    table[5, 0] = (table[5, 0] + 1) % EXPERTS
    return layer.run(layer.dense, routing_table=table)


def one_element_wrong(layer: Layer) -> np.ndarray:
    out = layer.expected.copy()
    out[7, 9] += np.sqrt(np.mean(out**2))
    return out


def transposed_down(layer: Layer) -> np.ndarray:
    """A square weight read in the wrong storage order has the right shape."""
    square = slice(0, INTER)
    dense = {**layer.dense, "down": layer.dense["down"].copy()}
    dense["down"][:, :, square] = dense["down"][:, :, square].swapaxes(1, 2)
    return layer.run(dense)


def unscaled_by_router(layer: Layer) -> np.ndarray:
    uniform = np.full_like(layer.tokens["router_weights"], 1 / TOP_K)
    return layer.run(layer.dense, router_weights=uniform)


def interleaved(layer: Layer) -> np.ndarray:
    """Columns stored gate, up, gate, up, ... read as halves."""
    both = np.stack([layer.dense["gate"], layer.dense["up"]], axis=3).reshape(EXPERTS, HIDDEN, 2 * INTER)
    return layer.run({**layer.dense, "gate": both[:, :, :INTER], "up": both[:, :, INTER:]})


MUTATIONS = {
    "gate and up are swapped": lambda m: m.run(swapped(m.dense)),
    "gate and up are read as if they were not interleaved": interleaved,
    "experts_min is one too high": lambda m: m.run(m.dense, experts_min=1),
    "the range ends one expert early": lambda m: m.run(m.shard(slice(0, EXPERTS - 1))),
    "the range starts one expert late": lambda m: m.run(m.shard(slice(1, EXPERTS)), experts_min=1),
    "one expert is dropped": lambda m: m.run(without_expert(m.dense, 3)),
    "the last column of I is dropped": lambda m: m.run(m.shard(columns=slice(0, INTER - 1))),
    "down is read transposed": transposed_down,
    "all-reduce over ep is missing": lambda m: m.grid()[0][0] + m.grid()[0][1],
    "all-reduce over tp is missing": lambda m: m.grid()[0][0] + m.grid()[1][0],
    "both all-reduces are missing": lambda m: m.grid()[0][0],
    "all-reduce over tp happens twice": lambda m: 2 * m.expected,
    "down_bias is added on both tp ranks": lambda m: (
        m.expected + m.run(m.dense) - m.run(m.shard(down_bias=False))
    ),
    "the output is scaled by 0.999": lambda m: 0.999 * m.expected,
    "the output is scaled by 1.001": lambda m: 1.001 * m.expected,
    "the intermediate is not rounded": lambda m: m.run(m.dense, round_intermediate=False),
    "gelu instead of silu": lambda m: m.run(m.dense, activation="gelu"),
    "router weights are ignored": unscaled_by_router,
    "one token goes to another expert": one_row_by_another_expert,
    "one element is wrong": one_element_wrong,
    "two tokens are exchanged": lambda m: m.expected[[1, 0, *range(2, TOKENS)]],
    "one token is zero": lambda m: m.expected * (np.arange(TOKENS) != 4)[:, None],
    "one element is NaN": lambda m: np.where(np.arange(HIDDEN) == 5, np.nan, m.expected),
    "one element is inf": lambda m: np.where(np.arange(HIDDEN) == 5, np.inf, m.expected),
    "a token is missing": lambda m: m.expected[:-1],
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_is_reported(layer, mutation):
    if layer.dtype == "float32" and mutation == "the intermediate is not rounded":
        wrong = layer.run(layer.dense, round_intermediate=False)
        assert_close(to_storage(wrong, "float32"), layer.expected)  # rounding to fp32 is within the tolerance
        return
    wrong = to_storage(MUTATIONS[mutation](layer), layer.dtype)
    with pytest.raises(AssertionError):
        assert_close(wrong, layer.expected)


def test_mutated_calls_of_the_kernel_are_reported(core, layer):
    """The same with the kernel itself: right as it is, wrong when its arguments are."""
    right = {**layer.tokens, **arrange(layer.dense)}
    assert_close(core.mixture_of_experts(**right), layer.expected)
    dropped = np.where(layer.tokens["routing_table"] == 3, -1, layer.tokens["routing_table"])
    for mutated in (
        {**right, **arrange(swapped(layer.dense))},
        {**right, "experts_min": 1},
        {**right, **arrange(layer.shard(slice(0, EXPERTS - 1)))},
        {**right, **arrange(layer.shard(columns=slice(0, INTER // 2)))},
        {**right, "routing_table": dropped},
        {**right, "router_weights": 0.999 * right["router_weights"]},
        {**right, "activation": "gelu"},
    ):
        with pytest.raises(AssertionError):
            assert_close(core.mixture_of_experts(**mutated), layer.expected)
    with pytest.raises(ValueError, match="experts_max"):  # an inclusive range that is one off is not even run
        core.mixture_of_experts(**right, experts_min=0, experts_max=EXPERTS)


def test_right_results_are_accepted(layer):
    assert_close(to_storage(layer.expected, layer.dtype), layer.expected)
    whole = np.sum(
        layer.grid(), axis=(0, 1)
    )  # rounds the intermediate shard by shard: still the same numbers
    assert_close(to_storage(whole, layer.dtype), layer.expected)


def test_fp32_noise_is_accepted(layer):
    """What a right kernel does differ by: rounding errors of fp32 sums, before the result is stored."""
    noise = np.random.default_rng(0).standard_normal(layer.expected.shape) * np.std(layer.expected)
    assert_close(to_storage(layer.expected + 2e-7 * noise, layer.dtype), layer.expected)


def cosine_similarity(a, b) -> float:
    return float(np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b)))


@pytest.mark.parametrize(
    "mutation, threshold",
    [
        ("all-reduce over tp happens twice", 0.9999),
        ("the output is scaled by 0.999", 0.9999),
        ("the last column of I is dropped", 0.97),
        ("one token is zero", 0.97),
    ],
)
def test_cosine_similarity_would_not_have_seen_it(layer, mutation, threshold):
    """Why nothing here compares by cosine similarity: it is blind to scale and kind to single rows."""
    assert cosine_similarity(MUTATIONS[mutation](layer), layer.expected) > threshold


@per_dtype
def test_cosine_similarity_would_not_have_seen_a_missing_all_reduce(dtype):
    """Where the partial sums of the ranks are alike, one of them differs from the sum by its scale alone."""
    layer = Layer(dtype)
    half = layer.shard(columns=slice(0, INTER // 2))
    twice = {
        name: np.concatenate([array, array], axis={"down": 1}.get(name, array.ndim - 1))
        for name, array in half.items()
        if name != "down_bias"
    }
    twice["down_bias"] = half["down_bias"] = 0 * half["down_bias"]
    whole, one_rank = layer.run(twice), layer.run(half)
    assert cosine_similarity(one_rank, whole) > 0.999999
    with pytest.raises(AssertionError):
        assert_close(to_storage(one_rank, dtype), whole)


@per_dtype
def test_exact_comparison_sees_one_unit_in_the_last_place(dtype):
    expected = np.random.default_rng(0).integers(-50, 50, (4, 5)).astype(np.float64)
    right = to_storage(expected, dtype)
    assert_exact(right, expected)
    wrong = right.copy()
    wrong.view(f"u{wrong.dtype.itemsize}")[2, 3] += 1
    with pytest.raises(AssertionError):
        assert_exact(wrong, expected)
    with pytest.raises(AssertionError):
        assert_same_bits(wrong, right)


@per_dtype
def test_bit_comparison_sees_the_sign_of_zero_and_accepts_nan(dtype):
    zero, minus_zero = (to_storage(np.array([value, np.nan]), dtype) for value in (0.0, -0.0))
    assert_same_bits(zero, zero.copy())
    with pytest.raises(AssertionError):
        assert_same_bits(zero, minus_zero)


def test_bfloat16_rounds_to_nearest_even():
    """1 + 2^-8 lies between two bf16 numbers and goes to the even one, as does 1 + 3 * 2^-8."""
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.0, 3.4e38, 1e39, np.inf, 2.0**-133])
    expected = np.array([1, 1 + 2**-6, 1 + 2**-7, -3, np.inf, np.inf, np.inf, 2.0**-133])
    np.testing.assert_array_equal(to_float64(to_storage(values, "bfloat16")), expected)
    assert np.isnan(to_float64(to_storage(np.array(np.nan), "bfloat16")))
