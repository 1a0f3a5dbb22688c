"""The entry points with other packages' signatures, against the double-precision reference."""

from __future__ import annotations

import inspect

import numpy as np
import paddle
import pytest
from checks import arrange, assert_close, random_case, random_dense, random_tokens

from paddle_moe import gate as gate_logits
from paddle_moe import reference, route
from paddle_moe.compat import fused_moe as incubate
from paddle_moe.compat import paddlenlp_ops
from paddle_moe.reference import to_storage

HIDDEN, INTER, EXPERTS, TOP_K, TOKENS = 16, 12, 6, 3, 9


def tensors(arrays):
    if isinstance(arrays, list):
        return [paddle.to_tensor(array) for array in arrays]
    return paddle.to_tensor(arrays)


# ---------------------------------------------------------------- paddlenlp_ops


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("layout", ["list", "separate", "stacked"])
def test_mixture_of_experts(layout, permuted):
    case = random_case(TOKENS, HIDDEN, INTER, EXPERTS, TOP_K, layout=layout, permuted=permuted)
    rows = {name: tensors(case[name]) for name in ("hidden_states", "routing_table", "router_weights")}
    weights = {name: tensors(case[name]) for name in ("gate_up_weights", "down_weights")}
    expected, expected_amax = reference.mixture_of_experts(**case, activation="gelu", measurement_mode=True)
    output, amax = paddlenlp_ops.mixture_of_experts(
        *rows.values(), *weights.values(), permuted, "gelu", 0, EXPERTS - 1, True, 4
    )
    assert_close(output.numpy(), expected)
    assert_close(amax.numpy(), expected_amax)
    cube = rows.pop("hidden_states").reshape([3, 3, HIDDEN])
    output, amax = paddlenlp_ops.mixture_of_experts(
        cube, *rows.values(), *weights.values(), permuted, "gelu", 0, EXPERTS - 1, False
    )
    assert amax is None and output.shape == [3, 3, HIDDEN]
    assert_close(output.numpy().reshape(TOKENS, HIDDEN), expected)
    with pytest.raises(ValueError, match="chunk_size must be .* got -1"):
        paddlenlp_ops.mixture_of_experts(
            cube, *rows.values(), *weights.values(), permuted, "gelu", 0, EXPERTS - 1, False, -1
        )


def test_slices_of_experts_add_up():
    """The calling code on Gaudi loops over slices of its experts, each with its own inclusive range."""
    case = random_case(TOKENS, HIDDEN, INTER, EXPERTS, TOP_K)
    rows = [tensors(case[name]) for name in ("hidden_states", "routing_table", "router_weights")]
    total = 0
    for first, last in ((0, 1), (2, 4), (5, 5)):
        output, _ = paddlenlp_ops.mixture_of_experts(
            *rows,
            tensors(case["gate_up_weights"][first : last + 1]),
            tensors(case["down_weights"][first : last + 1]),
            False,
            "silu",
            first,
            last,
            False,
        )
        total = total + output
    assert_close(total.numpy(), reference.mixture_of_experts(**case))


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("bias_shape", [None, [EXPERTS], [1, EXPERTS]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_gate_moe(normalise, bias_shape, dtype):
    rng = np.random.default_rng(4)
    weights = arrange(random_dense(rng, EXPERTS, HIDDEN, INTER, dtype), "stacked")
    x = to_storage(rng.standard_normal((TOKENS, HIDDEN)), dtype)
    gate = rng.standard_normal((HIDDEN, EXPERTS)).astype(np.float32)
    bias = None if bias_shape is None else rng.standard_normal(EXPERTS).astype(np.float32)
    permuted = normalise
    experts = weights["gate_up_weights"][2:5], weights["down_weights"][2:5]
    expected = reference.fused_gate_moe(
        x,
        gate,
        *experts,
        TOP_K,
        activation="gelu",
        correction_bias=bias,
        renormalize=normalise,
        experts_min=2,
        experts_max=4,
        round_intermediate=dtype,
    )
    arguments = (
        tensors(x),
        tensors(gate),
        None if bias is None else tensors(bias).reshape(bias_shape),
        *(tensors(np.ascontiguousarray(one.swapaxes(1, 2)) if permuted else one) for one in experts),
        TOP_K,
        normalise,
        permuted,
        "gelu",
        2,
        4,
    )
    assert_close(paddlenlp_ops.fused_gate_moe(*arguments, 64).numpy(), expected)
    with pytest.raises(ValueError, match="chunk_size must be .* got -1"):
        paddlenlp_ops.fused_gate_moe(*arguments, -1)


def test_positional_order():
    """Callers pass everything by position, so the order is the interface."""
    assert list(inspect.signature(paddlenlp_ops.mixture_of_experts).parameters) == [
        "hidden_states",
        "routing_table",
        "router_weights",
        "gate_up_weights",
        "down_weights",
        "permuted_weights",
        "activation",
        "experts_min",
        "experts_max",
        "measurement_mode",
        "chunk_size",
    ]
    assert list(inspect.signature(paddlenlp_ops.fused_gate_moe).parameters) == [
        "hidden_states",
        "gate_weights",
        "gate_correction_bias",
        "gate_up_weights",
        "down_weights",
        "top_k",
        "norm_topk_prob",
        "permuted_weights",
        "activation",
        "experts_min",
        "experts_max",
        "chunk_size",
    ]


# ---------------------------------------------------------------- paddle.incubate.nn.functional of Paddle 3.0


def incubate_case(dtype="float32", bias=True, seed=2):
    """(x, gate, arguments of fused_moe as tensors, the same for the reference)."""
    rng = np.random.default_rng(seed)
    weights = arrange(random_dense(rng, EXPERTS, HIDDEN, INTER, dtype, bias), "stacked")
    x = random_tokens(rng, TOKENS, HIDDEN, TOP_K, EXPERTS, dtype)["hidden_states"]
    gate = rng.standard_normal((HIDDEN, EXPERTS)).astype(np.float32)
    arguments = {
        "ffn1_weight": tensors(weights["gate_up_weights"]),
        "ffn2_weight": tensors(weights["down_weights"]),
    }
    if bias:
        arguments["ffn1_bias"] = tensors(weights["gate_up_bias"]).unsqueeze(1)
        arguments["ffn2_bias"] = tensors(weights["down_bias"]).unsqueeze(1)
    return x, gate, arguments, weights


def select(logits, top_k, group_moe, renormalize):
    """Softmax top-k, written out; with group_moe one expert of each of top_k groups."""
    if not group_moe:
        return reference.route(logits, top_k, renormalize=renormalize)
    grouped = reference.softmax(logits.reshape(len(logits), top_k, -1))
    best = grouped.argmax(axis=2)
    ids = best + np.arange(top_k) * grouped.shape[2]
    weights = grouped.max(axis=2)
    return ids, weights / weights.sum(axis=1, keepdims=True) if renormalize else weights


@pytest.mark.parametrize("group_moe", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_fused_moe(group_moe, normalise, dtype):
    x, gate, arguments, weights = incubate_case(dtype)
    routing = select(reference.gate(x, gate), TOP_K, group_moe, normalise)
    expected = reference.mixture_of_experts(x, *routing, **weights, round_intermediate=dtype)
    output = incubate.fused_moe(
        tensors(x).reshape([3, 3, HIDDEN]),
        tensors(gate),
        **arguments,
        moe_topk=TOP_K,
        norm_topk_prob=normalise,
        group_moe=group_moe,
    )
    assert output.shape == [3, 3, HIDDEN]
    assert_close(output.numpy().reshape(TOKENS, HIDDEN), expected)


@pytest.mark.parametrize("mode", ["softmax", "group_moe", "topk_only_mode"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_three_steps_equal_one(mode, bias, dtype):
    x, gate, arguments, weights = incubate_case(dtype, bias)
    logits = reference.gate(x, gate)
    gating = reference.softmax(logits) if mode == "topk_only_mode" else logits
    rows, totals, indices, scales, ids = incubate.moe_dispatch(
        tensors(x),
        tensors(gating.astype(np.float32)),
        TOP_K,
        group_moe=mode == "group_moe",
        topk_only_mode=mode == "topk_only_mode",
    )
    expected_ids, expected_scales = select(logits, TOP_K, mode == "group_moe", False)
    np.testing.assert_array_equal(ids.numpy(), expected_ids)
    np.testing.assert_allclose(scales.numpy(), expected_scales, rtol=1e-5)
    counts = np.bincount(expected_ids.ravel(), minlength=EXPERTS)
    np.testing.assert_array_equal(totals.numpy(), np.cumsum(counts))
    assert (totals.dtype, indices.dtype, ids.dtype) == (paddle.int64, paddle.int32, paddle.int32)
    expert_of_row = np.repeat(np.arange(EXPERTS), counts)
    for token in range(TOKENS):
        for slot in range(TOP_K):
            row = int(indices[slot, token])
            assert expert_of_row[row] == expected_ids[token, slot]
            np.testing.assert_array_equal(rows[row].numpy(), x[token])

    outputs = incubate.moe_ffn(
        rows, totals, arguments["ffn1_weight"], arguments["ffn2_weight"], arguments.get("ffn1_bias")
    )
    for normalise, factor in ((True, 1.0), (False, 2.5)):
        output = incubate.moe_reduce(
            outputs, scales, indices, ids, arguments.get("ffn2_bias"), normalise, factor
        )
        routing = select(logits, TOP_K, mode == "group_moe", normalise)
        expected = factor * reference.mixture_of_experts(x, *routing, **weights, round_intermediate=dtype)
        # The rows between the steps are rounded to dtype once more than in fused_moe.
        assert_close(output.numpy(), expected, slack=1 if dtype == "float32" else 10)


def test_dispatch_of_no_tokens():
    rows, totals, indices, scales, ids = incubate.moe_dispatch(
        paddle.zeros([0, HIDDEN]), paddle.zeros([0, EXPERTS]), TOP_K
    )
    assert (rows.shape, indices.shape) == ([0, HIDDEN], [TOP_K, 0])
    assert scales.shape == ids.shape == [0, TOP_K]
    np.testing.assert_array_equal(totals.numpy(), np.zeros(EXPERTS))


@pytest.mark.parametrize("mode", [{}, {"group_moe": True}, {"topk_only_mode": True}])
def test_dispatch_of_nan_has_scale_zero(mode):
    gating = np.full((2, EXPERTS), 0.25, np.float32)
    gating[1, 3] = np.nan
    rows, totals, indices, scales, ids = incubate.moe_dispatch(
        paddle.ones([2, HIDDEN]), tensors(gating), TOP_K, **mode
    )
    np.testing.assert_array_equal(ids.numpy()[1], 0)
    np.testing.assert_array_equal(scales.numpy()[1], 0)
    assert totals.numpy()[-1] == 2 * TOP_K
    reduced = incubate.moe_reduce(rows, scales, indices, ids, norm_topk_prob=True).numpy()
    np.testing.assert_allclose(reduced, np.repeat([[1.0], [0.0]], HIDDEN, axis=1), rtol=1e-6)


def test_to_static():
    x, gate, arguments, _ = incubate_case()
    x, gate = tensors(x).reshape([3, 3, HIDDEN]), tensors(gate)
    weights = (arguments["ffn1_weight"], arguments["ffn2_weight"])

    def every_entry(x):
        rows, totals, indices, scales, ids = incubate.moe_dispatch(
            x.reshape([-1, HIDDEN]), paddle.matmul(x.reshape([-1, HIDDEN]), gate), TOP_K
        )
        return (
            incubate.fused_moe(x, gate, **arguments),
            incubate.fused_moe(x, gate, **arguments, moe_topk=TOP_K, group_moe=True),
            incubate.moe_reduce(incubate.moe_ffn(rows, totals, *weights), scales, indices, ids),
            paddlenlp_ops.fused_gate_moe(x, gate, None, *weights, TOP_K, True, False, "silu", 0, EXPERTS - 1),
        )

    spec = [paddle.static.InputSpec([-1, -1, HIDDEN], "float32")]
    static = paddle.jit.to_static(every_entry, input_spec=spec, full_graph=True)
    for output, expected in zip(static(x), every_entry(x)):
        np.testing.assert_array_equal(output.numpy(), expected.numpy())


class Calls(paddle.nn.Layer):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_to_static_where_paddle_rewrites_no_code():
    """Sizes that are not known stay -1 then, and a shape can have only one of them."""
    x, gate, arguments, _ = incubate_case()
    x, gate = tensors(x), tensors(gate)
    weights = (arguments["ffn1_weight"], arguments["ffn2_weight"])
    last = (True, False, "silu", 0, EXPERTS - 1)
    ids, scores = route(gate_logits(x, gate), TOP_K)
    for shape, call in [
        ([None, None, HIDDEN], lambda x: incubate.fused_moe(x, gate, **arguments)),
        ([None, HIDDEN], lambda x: incubate.fused_moe(x, gate, **arguments, group_moe=True)),
        ([None, None, HIDDEN],
         lambda x: paddlenlp_ops.fused_gate_moe(x, gate, None, *weights, TOP_K, *last)),
        ([None, None, HIDDEN],
         lambda x: paddlenlp_ops.mixture_of_experts(x, ids, scores, *weights, *last[1:], False)[0]),
    ]:  # fmt: skip
        call = paddle.jit.not_to_static(call)
        layer = Calls(call)
        spec = [paddle.static.InputSpec(shape)]
        static = paddle.jit.to_static(layer, input_spec=spec, full_graph=True)
        inputs = x.reshape([3, -1, HIDDEN]) if len(shape) == 3 else x
        np.testing.assert_array_equal(static(inputs).numpy(), call(inputs).numpy())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(quant_method="weight_only_int8"), "quant_method must be 'None' .* got 'weight_only_int8'"),
        (dict(ffn1_scale=paddle.ones([1])), "ffn1_scale must be None"),
        (dict(ffn2_scale=paddle.ones([1])), "ffn2_scale must be None"),
        (dict(moe_topk=4, group_moe=True), "moe_topk must divide the number of experts 6, got 4"),
        (dict(moe_topk=7), "top_k"),
    ],
)
def test_fused_moe_errors(changed, message):
    x, gate, arguments, _ = incubate_case()
    with pytest.raises(ValueError, match=message):
        incubate.fused_moe(tensors(x), tensors(gate), **arguments, **changed)


def test_steps_that_do_not_fit_each_other():
    """Paddle reads outside of a tensor where there are fewer rows than ids say."""
    x, gating = paddle.ones([2, HIDDEN]), paddle.zeros([3, EXPERTS])
    with pytest.raises(ValueError, match=rf"^x must have the shape .* = \[3, \?\], got \[2, {HIDDEN}\]"):
        incubate.moe_dispatch(x, gating, TOP_K)
    rows, totals, indices, scales, ids = incubate.moe_dispatch(x, gating[:2], TOP_K)
    _, _, arguments, _ = incubate_case()
    weights = arguments["ffn1_weight"], arguments["ffn2_weight"]
    with pytest.raises(ValueError, match=f"^token_nums_per_expert must .*, got .{EXPERTS - 1}"):
        incubate.moe_ffn(rows, totals[1:], *weights)
    with pytest.raises(ValueError, match="^expert_scales_float must have the shape .T, K. or .T, K, 1, 1. ="):
        incubate.moe_reduce(rows, scales[:1], indices, ids)
    with pytest.raises(ValueError, match="^top_k_indices must have the shape .T, K. ="):
        incubate.moe_reduce(rows, scales, indices, ids.transpose([1, 0])[:1])
    count = rows.shape[0]
    for wrong in (-1, count):
        message = f"^permute_indices_per_token must be between 0 and {count - 1}, got .*{wrong}"
        with pytest.raises(ValueError, match=message):
            incubate.moe_reduce(rows, scales, paddle.full_like(indices, wrong), ids)
    bias = paddle.zeros([EXPERTS, 1, HIDDEN])
    with pytest.raises(ValueError, match=f"^top_k_indices must be between -1 and {EXPERTS - 1}, got"):
        incubate.moe_reduce(rows, scales, indices, paddle.full_like(ids, EXPERTS), bias)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: incubate.fused_moe(x, *[paddle.ones([1])] * 3),
        lambda x: paddlenlp_ops.mixture_of_experts(x, *[[]] * 4, False, "silu", 0, 0, False),
        lambda x: paddlenlp_ops.fused_gate_moe(x, *[[]] * 4, 1, True, False, "silu", 0, 0),
    ],
)
def test_no_tensor(call):
    with pytest.raises(ValueError, match=r"^(x|hidden_states) must be a paddle.Tensor, got numpy.ndarray"):
        call(np.ones([2, HIDDEN], np.float32))


def test_moe_ffn_refuses_quantised_weights():
    _, _, arguments, _ = incubate_case()
    with pytest.raises(ValueError, match="quant_method"):
        incubate.moe_ffn(
            paddle.ones([1, HIDDEN]),
            paddle.ones([EXPERTS], dtype="int64"),
            arguments["ffn1_weight"],
            arguments["ffn2_weight"],
            quant_method="weight_only_int4",
        )
