"""Losses and policies of the router against NumPy in double precision, gradients by finite differences."""

from __future__ import annotations

import math

import numpy as np
import paddle
import pytest

import paddle_moe
from paddle_moe import (
    balanced_correction_bias,
    jitter,
    limit_capacity,
    load_balancing_loss,
    route,
    router_z_loss,
    tokens_per_expert,
)

TOKENS, EXPERTS, TOP_K = 24, 6, 3


def case(num_tokens=TOKENS, num_experts=EXPERTS, top_k=TOP_K, seed=0):
    """float64 logits and int32 ids; row 5 was dropped altogether."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((num_tokens, num_experts))
    ids = np.argsort(-logits - rng.standard_normal(logits.shape), axis=1)[:, :top_k].astype(np.int32)
    ids[5:6] = -1
    return logits.astype(np.float32).astype(np.float64), ids


def softmax(logits):
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    return scores / scores.sum(axis=1, keepdims=True)


def normalised_sigmoid(logits):
    scores = 1 / (1 + np.exp(-logits))
    return scores / scores.sum(axis=1, keepdims=True)


def balance_by_definition(logits, ids, probabilities=softmax):
    """One term for each expert, as in the papers."""
    num_tokens, num_experts = logits.shape
    total = 0.0
    for expert in range(num_experts):
        fraction = sum(int(chosen == expert) for chosen in ids.ravel()) / ids.size
        total += fraction * probabilities(logits)[:, expert].mean()
    return num_experts * total


def z_by_definition(logits):
    return np.mean([math.log(sum(math.exp(value) for value in row)) ** 2 for row in logits])


def gradient_by_differences(function, logits, step=1e-5):
    gradient = np.zeros_like(logits)
    for index in np.ndindex(logits.shape):
        moved = logits.copy()
        moved[index] += step
        above = function(moved)
        moved[index] -= 2 * step
        gradient[index] = (above - function(moved)) / (2 * step)
    return gradient


def value_and_gradient(loss, logits):
    tensor = paddle.to_tensor(logits.astype(np.float32), stop_gradient=False)
    value = loss(tensor)
    assert value.dtype == paddle.float32 and value.shape == []
    value.backward()
    return value.item(), tensor.grad.numpy()


def check(loss, definition, logits):
    value, gradient = value_and_gradient(loss, logits)
    assert value == pytest.approx(definition(logits), rel=1e-6)
    expected = gradient_by_differences(definition, logits)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "softmax_topk"])
@pytest.mark.parametrize("top_k", [1, TOP_K])
def test_balance(scoring, top_k):
    logits, ids = case(top_k=top_k)
    probabilities = normalised_sigmoid if scoring == "sigmoid" else softmax
    check(
        lambda tensor: load_balancing_loss(tensor, paddle.to_tensor(ids), scoring=scoring),
        lambda values: balance_by_definition(values, ids, probabilities),
        logits,
    )


@pytest.mark.parametrize("length", [1, 4, TOKENS])
def test_balance_of_each_sequence(length):
    logits, ids = case()

    def definition(values):
        parts = zip(np.split(values, TOKENS // length), np.split(ids, TOKENS // length))
        return np.mean([balance_by_definition(*part, normalised_sigmoid) for part in parts])

    check(
        lambda tensor: load_balancing_loss(
            tensor, paddle.to_tensor(ids.astype(np.int64)), scoring="sigmoid", sequence_length=length
        ),
        definition,
        logits,
    )


def test_balance_is_least_when_balanced():
    ids = paddle.arange(EXPERTS, dtype="int32").unsqueeze(1)
    assert load_balancing_loss(paddle.zeros([EXPERTS, EXPERTS]), ids).item() == pytest.approx(1)
    certain = 50 * paddle.eye(EXPERTS)[0:1].tile([EXPERTS, 1])
    assert load_balancing_loss(certain, paddle.zeros_like(ids)).item() == pytest.approx(EXPERTS)


def test_z():
    check(router_z_loss, z_by_definition, case()[0])


def test_z_of_huge_logits_is_finite():
    value, gradient = value_and_gradient(router_z_loss, np.array([[1e4, -1e4], [-1e4, -1e4]]))
    assert value == pytest.approx(((1e4) ** 2 + (1e4 - math.log(2)) ** 2) / 2)
    assert np.isfinite(gradient).all()


def test_losses_without_tokens_are_zero():
    logits, ids = paddle.zeros([0, EXPERTS]), paddle.zeros([0, TOP_K], "int32")
    for loss in (
        lambda tensor: load_balancing_loss(tensor, ids),
        lambda tensor: load_balancing_loss(tensor, ids, sequence_length=4),
        router_z_loss,
    ):
        tensor = logits.clone()
        tensor.stop_gradient = False
        value = loss(tensor)
        value.backward()
        assert value.item() == 0 and tensor.grad.shape == [0, EXPERTS]


def test_losses_with_experts_that_nobody_chose_are_finite():
    logits = np.full((4, EXPERTS), -300.0)
    logits[:, 0] = 300.0
    ids = paddle.zeros([4, 1], "int32")
    for scoring in ("softmax", "sigmoid"):
        value, gradient = value_and_gradient(
            lambda tensor, scoring=scoring: load_balancing_loss(tensor, ids, scoring=scoring), logits
        )
        assert value == pytest.approx(EXPERTS) and np.isfinite(gradient).all()


def test_balance_of_sigmoids_that_are_all_zero():
    """Below -88 float32 has no sigmoid, but a quotient of two is still there."""
    logits, ids = case()
    for lowest in (-89.0, -1e4):
        logits[0] = lowest
        logits[0, 1] += 0.5
        value, gradient = value_and_gradient(
            lambda tensor: load_balancing_loss(tensor, paddle.to_tensor(ids), scoring="sigmoid"), logits
        )
        same = np.concatenate([logits[:1] - lowest - 20, logits[1:]])  # where a sigmoid is an exponential
        assert value == pytest.approx(balance_by_definition(same, ids, normalised_sigmoid), rel=1e-5)
        assert np.isfinite(gradient).all()


def test_loss_errors():
    logits, ids = paddle.zeros([4, EXPERTS]), paddle.zeros([4, 1], "int32")
    for text, arguments in {
        "scoring must be": dict(scoring="tanh"),
        "sequence_length must divide": dict(sequence_length=3),
        "sequence_length must be an integer": dict(sequence_length=True),
        "sequence_length must be at least 1": dict(sequence_length=0),
        "pass at most one": dict(sequence_length=2, parallel=paddle_moe.init_distributed()),
    }.items():
        with pytest.raises(ValueError, match=text):
            load_balancing_loss(logits, ids, **arguments)
    with pytest.raises(ValueError, match=r"logits and routing_table must have the shapes \[T, E\]"):
        load_balancing_loss(logits, ids[:3])
    with pytest.raises(ValueError, match="with K at least 1, got"):
        load_balancing_loss(logits, ids[:, :0])
    with pytest.raises(ValueError, match="routing_table must have the dtype int32 or int64, got float32"):
        load_balancing_loss(logits, ids.astype("float32"))
    for call, text in (
        (lambda: load_balancing_loss(logits.numpy(), ids), "logits must be a .*Tensor, got numpy.ndarray"),
        (lambda: load_balancing_loss(logits, [[0]] * 4), "routing_table must be a .*Tensor, got list"),
        (lambda: router_z_loss(None), "logits must be a paddle.Tensor, got NoneType"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    whole = load_balancing_loss(logits, ids, sequence_length=np.int64(2))
    assert whole.item() == load_balancing_loss(logits, ids, sequence_length=2).item()


# ---------------------------------------------------------------- counts and capacity


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_tokens_per_expert(dtype):
    _, ids = case()
    counts = tokens_per_expert(paddle.to_tensor(ids.astype(dtype)), EXPERTS)
    assert counts.dtype == paddle.int64
    np.testing.assert_array_equal(counts.numpy(), np.bincount(ids[ids >= 0], minlength=EXPERTS))
    assert tokens_per_expert(paddle.zeros([0, 2], dtype), EXPERTS).tolist() == [0] * EXPERTS


def test_ids_of_no_expert_count_for_nobody():
    """Of a replayed routing; the operator skips them too."""
    ids = paddle.to_tensor([[0, EXPERTS], [-1, EXPERTS - 1], [0, 2**40]])
    counts = tokens_per_expert(ids, EXPERTS).tolist()
    assert counts == [2, *[0] * (EXPERTS - 2), 1]
    for policy in ("probability", "position"):
        kept, weights = limit_capacity(ids, paddle.ones([3, 2]), EXPERTS, 0.5 * EXPERTS / 6, policy)
        assert kept.tolist() == [[0, -1], [-1, EXPERTS - 1], [-1, -1]], policy
        assert weights.tolist() == [[1, 0], [0, 1], [0, 0]], policy


def capacity_by_definition(ids, weights, num_experts, factor, policy):
    """The ids that stay, given out one by one in the order of their priority."""
    capacity = math.ceil(factor * ids.size / num_experts)
    slots = [(t, k) for k in range(ids.shape[1]) for t in range(len(ids))]
    if policy == "probability":
        slots.sort(key=lambda slot: (-weights[slot], slot))
    stays, taken = np.full_like(ids, -1), [0] * num_experts
    for slot in slots:
        expert = ids[slot]
        if expert >= 0 and taken[expert] < capacity:
            taken[expert] += 1
            stays[slot] = expert
    return stays


@pytest.mark.parametrize("policy", ["probability", "position"])
@pytest.mark.parametrize("factor", [0.01, 0.5, 1.0, 1.25, 7.0])
@pytest.mark.parametrize("seed", range(3))
def test_capacity(policy, factor, seed):
    _, ids = case(seed=seed)
    # Few different values, so that ties decide.
    weights = np.random.default_rng(seed).integers(1, 5, ids.shape).astype(np.float32) / 4
    kept, kept_weights = limit_capacity(
        paddle.to_tensor(ids), paddle.to_tensor(weights), EXPERTS, factor, policy
    )
    expected = capacity_by_definition(ids, weights, EXPERTS, factor, policy)
    assert kept.dtype == paddle.int32
    np.testing.assert_array_equal(kept.numpy(), expected)
    np.testing.assert_array_equal(kept_weights.numpy(), np.where(expected >= 0, weights, 0))


def test_capacity_rounds_up_and_keeps_everything_that_fits():
    ids = paddle.zeros([5, 1], "int32")
    weights = paddle.to_tensor([[0.1], [0.5], [0.3], [0.5], [0.2]])
    # ceil(1.0 * 5 * 1 / 4) = 2
    kept, _ = limit_capacity(ids, weights, 4, 1.0)
    assert kept.flatten().tolist() == [-1, 0, -1, 0, -1]
    kept, _ = limit_capacity(ids, weights, 4, 1.0, "position")
    assert kept.flatten().tolist() == [0, 0, -1, -1, -1]
    everything, same = limit_capacity(ids, weights, 4, 4.0)
    assert everything.tolist() == ids.tolist() and same.tolist() == weights.tolist()
    # 1.2 * 25 / 5 is 6 in float64, and more in float32.
    kept, _ = limit_capacity(paddle.zeros([25, 1], "int32"), paddle.ones([25, 1]), 5, 1.2)
    assert (kept == 0).sum() == 6
    empty, _ = limit_capacity(ids[:0], weights[:0], 4, 1.0)
    assert empty.shape == [0, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_capacity_gradient_is_that_of_the_slots_that_stay(dtype):
    ids = paddle.zeros([3, 1], "int32")
    weights = paddle.to_tensor([[0.1], [0.5], [0.3]], dtype, stop_gradient=False)
    _, kept = limit_capacity(ids, weights, 1, 0.5)
    assert kept.dtype == weights.dtype
    (kept.astype("float32") * paddle.to_tensor([[1.0], [2.0], [3.0]])).sum().backward()
    assert weights.grad.astype("float32").flatten().tolist() == [0, 2, 3]


def test_capacity_errors():
    ids, weights = paddle.zeros([3, 1], "int32"), paddle.ones([3, 1])
    with pytest.raises(ValueError, match="capacity_factor must be positive, got 0"):
        limit_capacity(ids, weights, 1, 0)
    with pytest.raises(ValueError, match="policy must be 'probability' or 'position', got 'random'"):
        limit_capacity(ids, weights, 1, 1.0, "random")
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        limit_capacity(ids, weights, 0, 1.0)
    with pytest.raises(ValueError, match="num_experts must be at least 1, got -3"):
        tokens_per_expert(ids, -3)
    with pytest.raises(ValueError, match="routing_table must be a paddle.Tensor, got list"):
        tokens_per_expert([[0, 1]], 2)
    for name, arguments in (("routing_table", (ids.numpy(), weights)), ("router_weights", (ids, None))):
        with pytest.raises(ValueError, match=f"{name} must be a paddle.Tensor, got"):
            limit_capacity(*arguments, 1, 1.0)
    for table, bad in ((ids[:, 0], weights[:, 0]), (ids, weights.tile([1, 2]))):
        with pytest.raises(ValueError, match=r"must both have the shape \[T, K\], got \[3"):
            limit_capacity(table, bad, 1, 1.0)


# ---------------------------------------------------------------- bias and jitter


def test_correction_bias_moves_by_the_sign():
    bias = paddle.to_tensor([0.5, 0.5, 0.5])
    moved = balanced_correction_bias(bias, paddle.to_tensor([9, 3, 0]), 0.25)
    assert moved.tolist() == [0.25, 0.75, 0.75] and bias.tolist() == [0.5] * 3
    assert balanced_correction_bias(bias, paddle.to_tensor([7, 7, 7]), 0.25).tolist() == [0.5] * 3
    # 10 / 3 is no float: an expert that is one above is still above, one at the mean stays.
    assert balanced_correction_bias(bias, paddle.to_tensor([5, 5, 5 + 2**40]), 0.25).tolist()[2] == 0.25
    counts = paddle.to_tensor([0, 0, 1 + 2**30], "int32")  # three times that is more than 32 bits hold
    assert balanced_correction_bias(bias, counts, 0.25).tolist() == [0.75, 0.75, 0.25]
    with pytest.raises(ValueError, match="update_speed must be positive, got 0"):
        balanced_correction_bias(bias, paddle.to_tensor([1, 2, 3]), 0)
    with pytest.raises(ValueError, match=r"counts must have the shape of correction_bias, \[3\], got \[1\]"):
        balanced_correction_bias(bias, paddle.to_tensor([1]))


def test_correction_bias_balances_a_router():
    rng = np.random.default_rng(0)
    skew, bias = np.linspace(0, 1, EXPERTS), paddle.zeros([EXPERTS])

    def choose():
        logits = paddle.to_tensor((rng.standard_normal((512, EXPERTS)) + skew).astype(np.float32))
        ids, _ = route(logits, TOP_K, scoring="sigmoid", correction_bias=bias)
        return tokens_per_expert(ids, EXPERTS)

    first = choose().numpy()
    for _ in range(100):
        bias = balanced_correction_bias(bias, choose(), 0.005)
    last = choose().numpy()
    assert first.max() / first.mean() > 1.2 and last.max() / last.mean() < 1.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_jitter(dtype):
    paddle.seed(3)
    ones = paddle.ones([200, 50]).astype(dtype)
    first, second = jitter(ones, 0.25), jitter(ones, 0.25)
    assert first.dtype == ones.dtype
    noise = first.astype("float32").numpy()
    assert 0.75 <= noise.min() < 0.76 and 1.24 < noise.max() <= 1.25
    assert noise.mean() == pytest.approx(1, abs=0.01) and noise.std() == pytest.approx(
        0.25 / 3**0.5, rel=0.05
    )
    assert (noise != second.astype("float32").numpy()).any()
    paddle.seed(3)
    np.testing.assert_array_equal(jitter(ones, 0.25).astype("float32").numpy(), noise)
    np.testing.assert_array_equal(jitter(ones, 0.0).astype("float32").numpy(), ones.astype("float32").numpy())
    with pytest.raises(ValueError, match="epsilon must be at least 0 and below 1, got 1"):
        jitter(ones, 1)
    with pytest.raises(ValueError, match="group must be 'grid' or 'tp', got 'dp'"):
        jitter(ones, 0.1, paddle_moe.init_distributed(), "dp")


def test_jitter_gradient_is_the_noise():
    x = paddle.full([4, 3], 2.0)
    x.stop_gradient = False
    noisy = jitter(x, 0.1)
    noisy.sum().backward()
    np.testing.assert_allclose(x.grad.numpy() * 2, noisy.numpy(), rtol=1e-6)
