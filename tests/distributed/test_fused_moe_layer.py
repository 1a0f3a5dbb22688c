"""FusedMoE over real processes: every rank has the output of the dense layer, to the last bit the same."""

from __future__ import annotations

import json

import numpy as np
import paddle
import pytest
from checks import relative_l2
from launcher import WORKERS, launch
from layer_cases import (
    EVERYTHING,
    EXPERTS,
    HIDDEN,
    INTER,
    SHARED,
    TOKENS,
    TOP_K,
    dense_weights,
    expected_output,
    tokens,
)

from paddle_moe.layers import FusedMoE

# Relative L2. Each rank rounds its partial sum, and so does each addition unless it runs in fp32.
TOLERANCE = {"float32": 1e-6, "bfloat16": 5e-3, "float16": 1e-3}


@pytest.fixture(scope="module", params=[(2, 2), (4, 1), (1, 4)], ids=lambda grid: f"ep{grid[0]}_tp{grid[1]}")
def job(request, tmp_path_factory):
    """(directory, results of each rank) of one job of four processes."""
    ep_size, tp_size = request.param
    directory = tmp_path_factory.mktemp(f"ep{ep_size}_tp{tp_size}")
    worker = WORKERS / "fused_moe_layer.py"
    done = launch(directory / "logs", worker, ep_size, tp_size, directory, ranks=4, seconds=300)
    assert done.returncode == 0, done
    return directory, [dict(np.load(directory / f"rank_{rank}.npz")) for rank in range(4)]


def test_all_ranks_agree_to_the_bit(job):
    _, ranks = job
    for name, output in ranks[0].items():
        for other in ranks[1:]:
            np.testing.assert_array_equal(other[name], output, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("reduce", ["two", "one"])
@pytest.mark.parametrize("fp32_reduce", [False, True])
def test_biases_shared_expert_and_correction(job, dtype, reduce, fp32_reduce):
    _, ranks = job
    expected, _ = expected_output(tokens(dtype), dense_weights(dtype, **EVERYTHING))
    output = ranks[0][f"everything {dtype} {reduce} {fp32_reduce}"]
    assert relative_l2(output, expected) < TOLERANCE[dtype]
    layer = FusedMoE.from_dense(**dense_weights(dtype, **EVERYTHING), top_k=TOP_K)
    single = layer(paddle.to_tensor(tokens(dtype))).astype("float32").numpy()
    assert relative_l2(output, single) < TOLERANCE[dtype]


def test_forms_of_input(job):
    _, (results, *_) = job
    expected, _ = expected_output(tokens(num_tokens=6), dense_weights())
    assert results["leading dimensions"].shape == (2, 3, HIDDEN)
    np.testing.assert_array_equal(results["leading dimensions"].reshape(6, HIDDEN), results["replay"])
    assert relative_l2(results["replay"], expected) < 1e-6
    assert results["no tokens"].shape == (0, HIDDEN)


def test_fewer_experts_than_ranks(job):
    _, (results, *_) = job
    expected, _ = expected_output(tokens(), dense_weights(bias=True, num_experts=3))
    assert relative_l2(results["three experts"], expected) < 1e-6


def test_quantized_weights(job):
    _, (results, *_) = job
    expected, _ = expected_output(tokens(), dense_weights(**EVERYTHING))
    assert 1e-4 < relative_l2(results["quantized"], expected) < 0.02
    expected, _ = expected_output(tokens(), dense_weights(bias=True, num_experts=3))
    assert 1e-4 < relative_l2(results["three experts in fp8"], expected) < 0.08


def test_gradients_through_quantized_weights(job):
    """Of what all ranks hold; also where ranks have no expert, and where rows travel."""
    _, (results, *_) = job
    gates = ("gate_weight", "gate_bias", "shared_gate_weight")
    for case, parts, names, limit in (
        ("quantized", EVERYTHING, ("x", *gates), 0.02),
        ("few", dict(bias=True, num_experts=3), ("x", "gate_weight"), 0.08),
        ("apart", dict(bias=True), ("x",), 0.02),
    ):
        layer = FusedMoE.from_dense(**dense_weights(**parts), top_k=TOP_K)
        x = paddle.to_tensor(tokens(), stop_gradient=False)
        (layer(x) * paddle.to_tensor(tokens(seed=5))).sum().backward()
        for name in names:
            expected = (x if name == "x" else getattr(layer, name)).grad.numpy()
            assert 1e-4 < relative_l2(results[f"{case} {name}"], expected) < limit, (case, name)


def test_drawn_weights_are_those_of_one_process(job):
    _, (results, *_) = job
    layer = FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K, shared_intermediate_size=SHARED, seed=3)
    assert relative_l2(results["drawn"], layer(paddle.to_tensor(tokens())).numpy()) < 1e-6
    np.testing.assert_array_equal(results["reloaded"], results["drawn"])


def test_events_count_every_expert_once_per_tp_rank(job):
    directory, _ = job
    counts, tp_size = np.zeros(EXPERTS, int), 0
    for path in directory.glob("*.jsonl"):
        events = [json.loads(line) for line in path.read_text().splitlines()]
        (call,) = [event for event in events if event["event"] == "moe_call"]
        first, local = call["experts_min"], call["tokens_per_expert"]
        counts[first : first + len(local)] += local
        tp_size = max(tp_size, call["tp_rank"] + 1)
        assert call["num_tokens"] == TOKENS and call["kernel_ms"] > 0 and call["collective_ms"] > 0
    _, (ids, _) = expected_output(tokens(), dense_weights())
    np.testing.assert_array_equal(counts, tp_size * np.bincount(ids.ravel(), minlength=EXPERTS))


def test_check_finds_ranks_that_disagree_on_the_routing(job):
    _, ranks = job
    expected, _ = expected_output(tokens(), dense_weights())
    assert relative_l2(ranks[0]["checked"], expected) < 1e-6
    for results in ranks:
        assert "routing_table differs between ranks" in str(results["disagreement"])
        assert "[1]" in str(results["disagreement"])
