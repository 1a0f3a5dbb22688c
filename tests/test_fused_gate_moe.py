"""gate and fused_gate_moe: the router's product, and the whole layer in one call."""

from __future__ import annotations

import checks
import numpy as np
import pytest
from checks import (
    LAYOUTS,
    assert_close,
    assert_exact,
    assert_same_bits,
    per_dtype,
    random_case,
    relative_l2,
)

from paddle_moe import core as kernels
from paddle_moe import reference
from paddle_moe.reference import to_float64, to_storage

per_gate_dtype = pytest.mark.parametrize("gate_dtype", ["float32", "own"])


def gate_case(num_tokens=7, hidden=32, num_experts=5, dtype="float32", gate_dtype="float32", seed=0) -> dict:
    rng = np.random.default_rng(seed)
    gate_weight = rng.standard_normal((hidden, num_experts)) / np.sqrt(hidden)
    return {
        "hidden_states": to_storage(rng.standard_normal((num_tokens, hidden)), dtype),
        "gate_weight": to_storage(gate_weight, dtype if gate_dtype == "own" else gate_dtype),
    }


def fused_case(
    dtype="float32", gate_dtype="float32", num_tokens=9, num_experts=6, top_k=2, **options
) -> dict:
    case = random_case(num_tokens, num_experts=num_experts, dtype=dtype, **options)
    del case["routing_table"], case["router_weights"]
    gate_weight = np.random.default_rng(7).standard_normal((case["hidden_states"].shape[1], num_experts))
    case["gate_weight"] = to_storage(gate_weight, dtype if gate_dtype == "own" else gate_dtype)
    return {**case, "top_k": top_k}


def in_three_calls(backend, case: dict) -> tuple:
    """(out, ids, weights) of the same layer without the fused call."""
    case = dict(case)
    logits = backend.gate(case["hidden_states"], case.pop("gate_weight"))
    options = {name: case.pop(name) for name in reference.ROUTE_OPTIONS if name in case}
    ids, weights = backend.route(logits, case.pop("top_k"), **options)
    return backend.mixture_of_experts(**case, routing_table=ids, router_weights=weights), ids, weights


# ---------------------------------------------------------------- gate


@per_gate_dtype
@per_dtype
def test_gate_matches_the_reference_in_fp32(backend, dtype, gate_dtype):
    """The logits are fp32 whatever comes in: a half precision product would be off by 1e-3."""
    case = gate_case(33, 64, 11, dtype, gate_dtype)
    logits = backend.gate(**case)
    assert logits.dtype == np.float32
    assert_close(logits, reference.gate(**case))


@pytest.mark.parametrize(
    "hidden, num_experts", [(1, 1), (3, 2), (17, 5), (100, 300), (777, 9), (1000, 64), (8, 1100)]
)
@per_dtype
def test_gate_sizes(core, dtype, hidden, num_experts):
    for gate_dtype in ("float32", "own"):
        case = gate_case(5, hidden, num_experts, dtype, gate_dtype)
        assert_close(core.gate(**case), reference.gate(**case))


@per_gate_dtype
@per_dtype
def test_gate_integers_are_exact(backend, dtype, gate_dtype):
    rng = np.random.default_rng(3)
    case = {
        "hidden_states": to_storage(rng.integers(-9, 10, (8, 40)), dtype),
        "gate_weight": to_storage(
            rng.integers(-9, 10, (40, 13)), dtype if gate_dtype == "own" else gate_dtype
        ),
    }
    assert_exact(backend.gate(**case), reference.gate(**case))


@per_gate_dtype
@per_dtype
def test_gate_token_alone_gives_the_bits_it_has_in_a_batch(core, threads, dtype, gate_dtype):
    """Routing must not depend on the batch, or ranks with other batches would choose other experts."""
    case = gate_case(513, 45, 19, dtype, gate_dtype)
    logits = core.gate(**case)
    for num_threads in (1, 2, 3, 5):
        threads(num_threads)
        for rows in (slice(0, 1), slice(512, 513), slice(0, 7), slice(64, 128), slice(0, 513)):
            part = core.gate(case["hidden_states"][rows], case["gate_weight"])
            assert_same_bits(part, logits[rows])


@per_dtype
def test_gate_reads_strided_arrays(core, dtype):
    case = gate_case(6, 20, 7, dtype)
    expected = core.gate(**case)
    wide = np.concatenate([case["hidden_states"]] * 2, axis=1)
    assert_same_bits(core.gate(wide[:, :20], case["gate_weight"]), expected)
    transposed = np.ascontiguousarray(case["gate_weight"].T).T  # a [E, H] weight, as PyTorch stores it
    assert_close(core.gate(case["hidden_states"], transposed), reference.gate(**case))


def test_gate_zero_tokens(backend):
    logits = backend.gate(**gate_case(0))
    assert logits.shape == (0, 5) and logits.dtype == np.float32


@per_dtype
def test_gate_nan_stays_in_its_token(core, dtype):
    case = gate_case(20, dtype=dtype)
    clean = core.gate(**case)
    case["hidden_states"][4, 2] = to_storage(np.array(np.nan), dtype)
    logits = core.gate(**case)
    assert np.isnan(logits[4]).all()
    assert_same_bits(np.delete(logits, 4, axis=0), np.delete(clean, 4, axis=0))


# ---------------------------------------------------------------- fused_gate_moe


@pytest.mark.parametrize("layout", LAYOUTS)
@per_gate_dtype
@per_dtype
def test_fused_equals_the_three_calls_bit_by_bit(backend, dtype, gate_dtype, layout):
    case = fused_case(dtype, gate_dtype, layout=layout, bias=True)
    fused = backend.fused_gate_moe(**case, return_routing=True)
    for one, other in zip(fused, in_three_calls(backend, case)):
        assert_same_bits(one, other)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "softmax_topk"])
@per_dtype
def test_fused_matches_the_reference(backend, dtype, scoring):
    case = fused_case(dtype, num_tokens=40, scoring=scoring, measurement_mode=True, permuted=True)
    out, amax, ids, weights = backend.fused_gate_moe(**case, return_routing=True)
    expected, expected_amax, expected_ids, expected_weights = reference.fused_gate_moe(
        **case, return_routing=True, round_intermediate=dtype
    )
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)
    assert relative_l2(to_float64(out), expected) < {"float32": 2e-6}.get(dtype, 5e-3)
    np.testing.assert_allclose(amax, expected_amax, rtol=1e-5)


def test_fused_passes_every_option_on(backend):
    case = fused_case(
        num_tokens=30,
        num_experts=8,
        top_k=3,
        bias=True,
        layout="separate",
        permuted=True,
        scoring="sigmoid",
        correction_bias=np.linspace(-1, 1, 8).astype(np.float32),
        num_groups=4,
        topk_groups=2,
        group_score="top2_sum",
        group_mask_fill=-np.inf,
        renormalize=False,
        scaling_factor=2.5,
        activation="gelu",
        chunk_size=7,
    )
    fused = backend.fused_gate_moe(**case, return_routing=True)
    for one, other in zip(fused, in_three_calls(backend, case)):
        assert_same_bits(one, other)
    case = {name: value for name, value in case.items() if name != "chunk_size"}
    expected = reference.fused_gate_moe(**case)
    assert relative_l2(to_float64(fused[0]), expected) < 2e-6
    options = ("correction_bias", "num_groups", "renormalize", "scaling_factor", "activation", "scoring")
    for name in options:  # an option that were dropped on the way would leave the result as it is
        without = {key: value for key, value in case.items() if key != name}
        assert relative_l2(reference.fused_gate_moe(**without), expected) > 1e-3, name


def test_fused_results_by_option(backend):
    case = fused_case()
    out = backend.fused_gate_moe(**case)
    measured = backend.fused_gate_moe(**case, measurement_mode=True)
    routed = backend.fused_gate_moe(**case, return_routing=True)
    both = backend.fused_gate_moe(**case, measurement_mode=True, return_routing=True)
    assert isinstance(out, np.ndarray) and (len(measured), len(routed), len(both)) == (2, 3, 4)
    for other in (measured[0], routed[0], both[0]):
        assert_same_bits(other, out)
    assert_same_bits(both[1], measured[1])
    assert_same_bits(both[2], routed[1])
    assert_same_bits(both[3], routed[2])


def test_replaying_the_returned_routing_gives_the_same_bits(backend):
    case = fused_case("bfloat16")
    out, ids, weights = backend.fused_gate_moe(**case, return_routing=True)
    replay = {name: value for name, value in case.items() if name not in ("gate_weight", "top_k")}
    again = backend.mixture_of_experts(**replay, routing_table=ids, router_weights=weights)
    assert_same_bits(again, out)


def test_router_over_all_experts_with_a_local_range(backend):
    """The gate scores the experts of all ranks, the weights are those of one: the shards sum to the whole."""
    case = fused_case(num_tokens=20, layout="stacked")
    whole = backend.fused_gate_moe(**case)
    total = np.zeros(whole.shape)
    for first, last in ((0, 1), (2, 5)):
        shard = {name: case[name][first : last + 1] for name in ("gate_up_weights", "down_weights")}
        total += backend.fused_gate_moe(**{**case, **shard}, experts_min=first, experts_max=last)
    assert relative_l2(total, to_float64(whole)) < 1e-6


def test_fused_nan_token_gets_no_expert_and_zeros(backend):
    case = fused_case(num_tokens=12)
    clean = backend.fused_gate_moe(**case)
    case["hidden_states"][5, 0] = np.nan
    out, ids, weights = backend.fused_gate_moe(**case, return_routing=True)
    assert (ids[5] == -1).all() and not weights[5].any() and not out[5].any()
    assert_same_bits(np.delete(out, 5, axis=0), np.delete(clean, 5, axis=0))


def test_fused_zero_tokens(backend):
    out, amax, ids, weights = backend.fused_gate_moe(
        **fused_case(num_tokens=0), measurement_mode=True, return_routing=True
    )
    assert out.shape == (0, 32) and ids.shape == weights.shape == (0, 2) and not amax.any()


def test_fused_uses_the_workspace_it_is_given():
    case = fused_case("bfloat16")
    expected = checks.Core().fused_gate_moe(**case)
    table = np.zeros((9, 2), np.int32)
    others = {name: value for name, value in case.items() if name not in ("gate_weight", "top_k")}
    num_bytes = max(
        kernels.workspace_size(**others, routing_table=table, router_weights=table.astype(np.float32)),
        kernels.gate_workspace_size(case["hidden_states"], case["gate_weight"]),
    )
    workspace = np.full(num_bytes, 0xFF, np.uint8)
    assert_same_bits(kernels.fused_gate_moe(**case, workspace=workspace), expected)
