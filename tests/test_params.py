"""Shards of expert weights: nothing dropped, nothing doubled, and the same values everywhere."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddle_moe import reference, shard_experts
from paddle_moe.params import (
    LayerShard,
    generate_moe_params,
    generate_moe_params_static,
    random_expert,
    shard_range,
    slice_intermediate,
)

SIZES = dict(num_tokens=6, hidden_dim=10, ffn_dim=7, top_k=3, num_experts=5)


def arrays(tensors):
    return [tensor.numpy() for tensor in tensors]


# ---------------------------------------------------------------- ranges and slices


@given(total=st.integers(0, 200), size=st.integers(1, 40))
def test_ranges_cover_everything_once_and_are_balanced(total, size):
    ranges = [shard_range(total, rank, size) for rank in range(size)]
    assert [item for start, stop in ranges for item in range(start, stop)] == list(range(total))
    lengths = [stop - start for start, stop in ranges]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] - lengths[-1] <= 1


@pytest.mark.parametrize(
    ("total", "rank", "size", "message"),
    [
        (-1, 0, 1, "total must be at least 0, got -1"),
        (4, 0, 0, "size must be at least 1, got 0"),
        (4, 2, 2, "rank must be between 0 and size - 1 = 1, got 2"),
        (4, -1, 2, "rank must be between 0 and size - 1 = 1, got -1"),
        (4, 0.5, 2, "rank must be an integer, got 0.5"),
    ],
)
def test_range_errors(total, rank, size, message):
    with pytest.raises(ValueError, match=message):
        shard_range(total, rank, size)


@given(
    inter=st.integers(1, 30),
    size=st.integers(1, 8),
    halves=st.integers(1, 2),
    axis=st.sampled_from([-1, -2]),
)
def test_slices_of_each_half_concatenate_to_that_half(inter, size, halves, axis):
    shape = [2, 3, 3]
    shape[axis] = halves * inter
    array = np.arange(np.prod(shape)).reshape(shape)
    shards = [slice_intermediate(array, rank, size, axis=axis, halves=halves) for rank in range(size)]
    for half, whole in enumerate(np.split(array, halves, axis=axis)):
        pieces = [np.split(shard, halves, axis=axis)[half] for shard in shards]
        np.testing.assert_array_equal(np.concatenate(pieces, axis=axis), whole)


def test_slice_refuses_an_odd_fused_dimension():
    with pytest.raises(ValueError, match=r"halves of one size in dimension -1, got the shape \[4, 7\]"):
        slice_intermediate(np.zeros((4, 7)), 0, 1, axis=-1, halves=2)


def test_slices_of_paddle_tensors_equal_those_of_arrays():
    array = np.arange(2 * 3 * 10, dtype=np.float32).reshape(2, 3, 10)
    for dtype in ("float32", "bfloat16", "float16"):
        tensor = slice_intermediate(paddle.to_tensor(array).astype(dtype), 1, 2, axis=-1, halves=2)
        np.testing.assert_array_equal(
            tensor.astype("float32").numpy(), slice_intermediate(array, 1, 2, axis=-1, halves=2)
        )


# ---------------------------------------------------------------- shards of experts


def dense_weights(layout, permuted, num_experts, hidden, inter, rng):
    gate, up = rng.standard_normal((2, num_experts, hidden, inter))
    down = rng.standard_normal((num_experts, inter, hidden))
    gate_up_bias = rng.standard_normal((num_experts, 2 * inter))
    down_bias = rng.standard_normal((num_experts, hidden))
    if permuted:
        gate, up, down = (np.swapaxes(weights, 1, 2) for weights in (gate, up, down))
    if layout == "separate":
        gate_up = [*gate, *up]
    else:
        gate_up = np.concatenate([gate, up], axis=1 if permuted else 2)
    if layout != "stacked":
        gate_up, down, gate_up_bias, down_bias = (
            list(weights) for weights in (gate_up, down, gate_up_bias, down_bias)
        )
    return gate_up, down, gate_up_bias, down_bias


@given(
    layout=st.sampled_from(["list", "separate", "stacked"]),
    permuted=st.booleans(),
    num_experts=st.integers(1, 7),
    inter=st.integers(1, 9),
    ep_size=st.integers(1, 8),
    tp_size=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_partial_outputs_of_all_shards_add_up(layout, permuted, num_experts, inter, ep_size, tp_size, seed):
    rng = np.random.default_rng(seed)
    tokens, hidden, top_k = 5, 4, min(2, num_experts)
    tp_size = min(tp_size, inter)
    routing = (
        rng.standard_normal((tokens, hidden)),
        rng.integers(0, num_experts, (tokens, top_k)),
        rng.random((tokens, top_k)),
    )
    weights = dense_weights(layout, permuted, num_experts, hidden, inter, rng)
    expected = reference.mixture_of_experts(*routing, *weights, permuted_weights=permuted)
    total = np.zeros_like(expected)
    for ep_rank in range(ep_size):
        for tp_rank in range(tp_size):
            shard = shard_experts(
                *weights,
                permuted_weights=permuted,
                ep_rank=ep_rank,
                ep_size=ep_size,
                tp_rank=tp_rank,
                tp_size=tp_size,
            )
            assert shard.experts_max - shard.experts_min + 1 == len(shard.down_weights)
            assert (shard.down_bias is None) == (tp_rank > 0)
            if len(shard.down_weights):
                total += reference.mixture_of_experts(
                    *routing,
                    shard.gate_up_weights,
                    shard.down_weights,
                    shard.gate_up_bias,
                    shard.down_bias,
                    permuted_weights=permuted,
                    experts_min=shard.experts_min,
                    experts_max=shard.experts_max,
                )
    np.testing.assert_allclose(total, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("gate_up", "message"),
    [
        (np.zeros((3, 4, 6)), "gate_up_weights must hold 2 experts like down_weights, got 3"),
        ([np.zeros((4, 6))] * 3, "gate_up_weights must hold 2 experts like down_weights, got 3"),
        (
            np.zeros((2, 4, 10)),
            r"gate_up_weights .* size 6 in dimension -1, as I = 3 .* got the shape \[2, 4, 10\]",
        ),
        (
            [np.zeros((4, 5))] * 4,
            r"gate_up_weights .* size 3 in dimension -1, as I = 3 .* got the shape \[4, 5\]",
        ),
        (
            np.zeros((2, 5, 6)),
            r"gate_up_weights .* size 4 in dimension -2, as H = 4 .* got the shape \[2, 5, 6\]",
        ),
    ],
)
def test_shard_errors(gate_up, message):
    with pytest.raises(ValueError, match=message):
        shard_experts(gate_up, [np.zeros((3, 4))] * 2)


def test_experts_of_another_hidden_size():
    weights = np.zeros((2, 6, 4)), [np.zeros((4, 3)), np.zeros((5, 3))]
    with pytest.raises(ValueError, match=r"down_weights .* size 4 in dimension -2, as H = 4 .* \[5, 3\]"):
        shard_experts(*weights, permuted_weights=True)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (np.zeros((3, 4)), "down_bias must hold 2 experts like down_weights, got 3"),
        ([np.zeros(4)], "down_bias must hold 2 experts like down_weights, got 1"),
        ([np.zeros(4), np.zeros(5)], r"down_bias must have the size 4 in dimension -1, .* shape \[5\]"),
    ],
)
def test_a_down_bias_of_another_length(bias, message):
    with pytest.raises(ValueError, match=message):
        shard_experts(np.zeros((2, 4, 6)), np.zeros((2, 3, 4)), down_bias=bias)


@pytest.mark.parametrize("shared_over_grid", [True, False])
@pytest.mark.parametrize(("ep_size", "tp_size"), [(1, 1), (3, 2), (2, 4), (7, 1)])
def test_parts_of_all_ranks_make_up_every_weight_of_a_layer(ep_size, tp_size, shared_over_grid):
    """Each number is in the part of one rank, or, of what is not sharded, in that of all."""
    sizes = dict(shared_intermediate_size=7, shared_over_grid=shared_over_grid)
    layer = LayerShard(4, 5, 6, **sizes, permuted_weights=ep_size == 2)
    wholes = layer.parts()
    dense = {name: np.arange(whole.size).reshape(whole.shape) for name, whole in wholes.items()}
    held = {name: [] for name in wholes}
    for ep_rank in range(ep_size):
        for tp_rank in range(tp_size):
            place = dict(ep_rank=ep_rank, ep_size=ep_size, tp_rank=tp_rank, tp_size=tp_size)
            shard = dataclasses.replace(layer, **place)
            assert shard.whole() == layer
            for name, part in shard.parts().items():
                shared = name in ("shared_gate_up_weight", "shared_down_weight")
                assert part.copy == (shared and not shared_over_grid and ep_rank > 0)
                if part.size and not part.copy:
                    held[name] += part.cut(dense[name], wholes[name]).ravel().tolist()
    whole_everywhere = ("gate_weight", "gate_bias", "correction_bias", "shared_gate_weight")
    for name, numbers in held.items():
        times = ep_size * tp_size if name in whole_everywhere else 1
        assert sorted(numbers) == np.repeat(dense[name], times).tolist(), name


# ---------------------------------------------------------------- generated parameters


def test_values_never_change():
    """The numbers a seed stands for are part of the interface: ranks, machines and releases agree on them."""
    params = generate_moe_params(**SIZES, seed=7)
    digest = hashlib.sha256()
    for array in arrays(
        [params.hidden_states, params.routing_table, *params.gate_up_weights, *params.down_weights]
    ):
        digest.update(array.tobytes())
    assert digest.hexdigest() == "67bf02c44a4e49cd5cd9a11c680c5847a7a56d26925f63a5d9a0f3d627cf5cd0"
    np.testing.assert_allclose(params.router_weights.numpy()[0], [0.819113, 0.1039113, 0.0769757], rtol=1e-6)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shapes_and_dtypes(permuted, fused, dtype):
    params = generate_moe_params(**SIZES, permuted_weights=permuted, fused_weights=fused, dtype=dtype)
    gate_up, down = ([10, 14] if fused else [10, 7]), [7, 10]
    if permuted:
        gate_up, down = gate_up[::-1], down[::-1]
    assert [weight.shape for weight in params.gate_up_weights] == [gate_up] * (5 if fused else 10)
    assert [weight.shape for weight in params.down_weights] == [down] * 5
    assert (params.hidden_states.shape, params.routing_table.shape) == ([6, 10], [6, 3])
    for tensor in (params.hidden_states, *params.gate_up_weights, *params.down_weights):
        assert tensor.dtype == getattr(paddle, dtype) and tensor.is_contiguous()
    assert (params.routing_table.dtype, params.router_weights.dtype) == (paddle.int32, paddle.float32)
    assert (params.experts_min, params.experts_max) == (0, 4)


def test_layouts_hold_the_same_numbers():
    plain = generate_moe_params(**SIZES)
    permuted = generate_moe_params(**SIZES, permuted_weights=True, fused_weights=False)
    for expert in range(5):
        gate, up = np.split(plain.gate_up_weights[expert].numpy(), 2, axis=1)
        np.testing.assert_array_equal(permuted.gate_up_weights[expert].numpy().T, gate)
        np.testing.assert_array_equal(permuted.gate_up_weights[5 + expert].numpy().T, up)
        down = plain.down_weights[expert].numpy()
        np.testing.assert_array_equal(permuted.down_weights[expert].numpy().T, down)


def test_routing_is_distinct_and_normalised_and_uses_every_expert():
    params = generate_moe_params(num_tokens=500, hidden_dim=4, ffn_dim=4, top_k=3, num_experts=16)
    ids, weights = params.routing_table.numpy(), params.router_weights.numpy()
    assert all(len(set(row)) == 3 for row in ids.tolist()) and set(ids.ravel()) == set(range(16))
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    assert (weights > 0).all() and (np.diff(weights, axis=1) <= 0).all()


def test_outputs_are_of_order_one():
    params = generate_moe_params(num_tokens=64, hidden_dim=96, ffn_dim=48, top_k=2, num_experts=4)
    output = reference.mixture_of_experts(
        params.hidden_states.numpy(),
        params.routing_table.numpy(),
        params.router_weights.numpy(),
        arrays(params.gate_up_weights),
        arrays(params.down_weights),
    )
    assert 0.1 < output.std() < 2


def test_seeds_and_experts_differ():
    drawn = [random_expert(seed, expert, 4, 4)[0] for seed in (0, 1) for expert in (0, 1)]
    assert len({array.tobytes() for array in drawn}) == 4


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("ep_size", "tp_size"), [(1, 1), (2, 2), (3, 2), (1, 7), (7, 1)])
def test_static_shards_add_up_to_dense(permuted, fused, ep_size, tp_size):
    total, expected, experts = 0, None, []
    for ep_rank in range(ep_size):
        for tp_rank in range(tp_size):
            dense, local = generate_moe_params_static(
                **SIZES,
                permuted_weights=permuted,
                tp_rank=tp_rank,
                tp_size=tp_size,
                ep_rank=ep_rank,
                ep_size=ep_size,
                fused_weights=fused,
            )
            outputs = []
            for params in (dense, local):
                if not params.down_weights:
                    assert params.experts_max == params.experts_min - 1 and not params.gate_up_weights
                    outputs.append(0.0)
                    continue
                outputs.append(
                    reference.mixture_of_experts(
                        params.hidden_states.numpy(),
                        params.routing_table.numpy(),
                        params.router_weights.numpy(),
                        arrays(params.gate_up_weights),
                        arrays(params.down_weights),
                        permuted_weights=permuted,
                        experts_min=params.experts_min,
                        experts_max=params.experts_max,
                    )
                )
            expected, total = outputs[0], total + outputs[1]
        experts += range(local.experts_min, local.experts_max + 1)
    assert experts == list(range(5))
    np.testing.assert_allclose(total, expected, rtol=1e-10, atol=1e-12)


def test_no_tokens():
    params = generate_moe_params(**{**SIZES, "num_tokens": 0})
    assert (params.hidden_states.shape, params.routing_table.shape) == ([0, 10], [0, 3])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(num_tokens=2.5), "num_tokens must be an integer, got 2.5"),
        (dict(num_tokens=-1), "num_tokens must be at least 0, got -1"),
        (dict(hidden_dim=0), "hidden_dim must be at least 1, got 0"),
        (dict(ffn_dim=-3), "ffn_dim must be at least 1, got -3"),
        (dict(num_experts=0), "num_experts must be at least 1, got 0"),
        (dict(top_k=0), "top_k must be between 1 and num_experts = 5, got 0"),
        (dict(top_k=6), "top_k must be between 1 and num_experts = 5, got 6"),
        (dict(dtype="float64"), "dtype must be 'float32', 'bfloat16' or 'float16', got 'float64'"),
        (dict(seed=-1), "seed must be at least 0, got -1"),
        (dict(seed=None), "seed must be an integer, got None"),
        (dict(tp_size=0), "tp_size must be at least 1, got 0"),
        (dict(ep_size=0), "ep_size must be at least 1, got 0"),
        (dict(tp_rank=2, tp_size=2), "tp_rank must be between 0 and tp_size - 1 = 1, got 2"),
        (dict(tp_rank=0.5, tp_size=2), "tp_rank must be an integer, got 0.5"),
        (dict(ep_rank=-1), "ep_rank must be between 0 and ep_size - 1 = 0, got -1"),
        (dict(tp_size=8), "tp_size must be at most ffn_dim = 7, got 8"),
    ],
)
def test_generator_errors(changed, message):
    with pytest.raises(ValueError, match=message):
        generate_moe_params_static(**{**SIZES, **changed})
