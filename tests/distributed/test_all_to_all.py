"""Tokens that live on one EP rank each give what one process with all tokens and all experts gives."""

from __future__ import annotations

import itertools

import numpy as np
import paddle
import pytest
from all_to_all_cases import cases, expert_weights, run_experts, tokens_of
from checks import relative_l2
from launcher import WORKERS, launch
from layer_cases import Shard

from paddle_moe.all_to_all import all_to_all_experts, meeting_order
from paddle_moe.deep_ep import DeepEPExchange
from paddle_moe.distributed import init_distributed
from paddle_moe.params import shard_range

TOLERANCE = {"float32": 1e-6, "bfloat16": 8e-3, "float16": 1e-3}


@pytest.fixture(scope="module", params=[(4, 1), (3, 1), (2, 2)], ids=lambda grid: f"ep{grid[0]}_tp{grid[1]}")
def job(request, tmp_path_factory):
    ep_size, tp_size = request.param
    directory = tmp_path_factory.mktemp(f"ep{ep_size}_tp{tp_size}")
    ranks = ep_size * tp_size
    done = launch(directory / "logs", WORKERS / "all_to_all.py", ep_size, tp_size, directory, ranks=ranks)
    assert done.returncode == 0, str(done)
    return ep_size, tp_size, [dict(np.load(directory / f"rank_{rank}.npz")) for rank in range(ranks)]


def in_one_process(case, ep_size):
    """Output and gradients of each rank's tokens, and the gradient of all experts."""
    parts = [tokens_of(case, rank) for rank in range(ep_size)]
    x, ids, weights, cotangent = (paddle.to_tensor(np.concatenate(arrays)) for arrays in zip(*parts))
    x, weights = x.astype(case.dtype), weights.astype(case.weight_dtype)
    matrices = paddle.to_tensor(expert_weights(case)).astype(case.dtype)
    for tensor in (x, weights, matrices):
        tensor.stop_gradient = False
    out = run_experts(x, ids, weights.astype("float32"), matrices, 0)
    (out.astype("float32") * cotangent).sum().backward()
    ends = np.cumsum(case.tokens)[:-1]
    out, dx, dweights = (
        np.split(t.astype("float32").numpy(), ends) for t in (out.detach(), x.grad, weights.grad)
    )
    return out, dx, dweights, matrices.grad.astype("float32").numpy()


@pytest.mark.parametrize("index", range(len(cases(4))), ids=[case.name for case in cases(4)])
def test_output_and_gradients(job, index):
    ep_size, tp_size, ranks = job
    case = cases(ep_size)[index]
    out, dx, dweights, dmatrices = in_one_process(case, ep_size)
    # Also with stand-ins for NCCL's all-to-all, and for DeepEP where that has these dtypes and sizes.
    kinds = ["", "at once "] + ["deep ep "] * (case.dtype == "bfloat16" and case.num_experts % ep_size == 0)
    for kind, (rank, results) in itertools.product(kinds, enumerate(ranks)):
        ep_rank = rank // tp_size
        first, end = shard_range(case.num_experts, ep_rank, ep_size)
        expected = {"out": out[ep_rank], "d x": dx[ep_rank], "d weights": dweights[ep_rank]}
        if end > first:
            expected["d matrices"] = dmatrices[first:end]
        for name, value in expected.items():
            got = results[f"{kind}{case.name} {name}"]
            assert got.shape == value.shape
            if np.any(value):
                assert relative_l2(got, value) < TOLERANCE[case.dtype], (kind, rank, name)
            else:
                np.testing.assert_array_equal(got, value, err_msg=f"{kind} {rank} {name}")


def test_a_token_goes_once_to_each_rank_that_needs_it(job):
    ep_size, tp_size, ranks = job
    for case in cases(ep_size):
        for rank, results in enumerate(ranks):
            first, end = shard_range(case.num_experts, rank // tp_size, ep_size)
            rows = 0
            for source in range(ep_size):
                ids = tokens_of(case, source)[1]
                rows += ((ids >= first) & (ids < end)).any(axis=1).sum()
            assert results[f"{case.name} arrived"] == rows, (rank, case.name)


def test_other_work_runs_while_rows_travel(job):
    """Otherwise rank 0 and the others would wait for each other, and the job would fail."""
    _, _, ranks = job
    assert all(results["overlapped"] for results in ranks)


def test_a_rank_that_waits_logs_collective_time(job):
    _, _, ranks = job
    for rank, results in enumerate(ranks):
        kernel, collective, total = results["logged seconds"]
        # A tenth of a second is that of the shared expert, which runs while rows travel.
        assert kernel >= 0.1 and kernel + collective <= total, (rank, kernel, collective, total)
        assert rank == 0 or collective > 0.6, (rank, kernel, collective, total)


def test_another_number_of_choices_on_another_rank(job):
    ep_size, tp_size, ranks = job
    for rank, results in enumerate(ranks):
        others = [f"{1 + ep_rank} on rank {ep_rank * tp_size + rank % tp_size}" for ep_rank in range(ep_size)]
        expected = f"routing_table must have the same K on all EP ranks, got {', '.join(others)}"
        assert str(results["another K"]) == expected


@pytest.mark.parametrize(
    ("table", "weights", "message"),
    [
        (([4, 2], "float32"), ([4, 2], "float32"), "routing_table .* dtype int32 or int64, got float32"),
        (([4, 2], "int32"), ([4, 2], "float64"), "router_weights .* dtype float32 or bfloat16, got float64"),
        (([4, 2], "int32"), ([4, 2], "float16"), "router_weights .* dtype float32 or bfloat16, got float16"),
        (([3, 2], "int32"), ([4, 2], "float32"), r"T = 4 tokens, got \[3, 2\] and \[4, 2\]"),
        (([4, 2], "int32"), ([3, 2], "float32"), r"T = 4 tokens, got \[4, 2\] and \[3, 2\]"),
        (([4, 2], "int32"), ([4, 1], "float32"), r"T = 4 tokens, got \[4, 2\] and \[4, 1\]"),
        (([3, 2], "int32"), ([3, 2], "float32"), r"T = 4 tokens, got \[3, 2\] and \[3, 2\]"),
        (([4], "int32"), ([4], "float32"), r"T = 4 tokens, got \[4\] and \[4\]"),
    ],
)
def test_a_routing_that_does_not_fit_is_refused_before_anything_is_sent(table, weights, message):
    """On a rank without groups to send over."""
    routing = paddle.zeros(*table), paddle.zeros(*weights)
    x = paddle.zeros([4, 6], "bfloat16")
    with pytest.raises(ValueError, match=message):
        all_to_all_experts(x, *routing, lambda rows, *_: rows, [(0, 1), (1, 2)], Shard(0, 2, 0, 1))


def test_what_no_exchange_can_do_is_refused():
    routing, x = (paddle.zeros([4, 2], "int32"), paddle.zeros([4, 2])), paddle.zeros([4, 6])
    for ranges in ([(0, 1)], [(0, 1), (1, 2), (2, 3)]):
        with pytest.raises(ValueError, match=f"for each of the 2 EP ranks, got {len(ranges)}"):
            all_to_all_experts(x, *routing, lambda rows, *_: rows, ranges, Shard(0, 2, 0, 1))
    with init_distributed() as alone:
        for wrong in (lambda rows: rows[:, :3], lambda rows: rows.astype("float64")):
            with pytest.raises(ValueError, match="experts must return the shape and dtype of its rows"):
                all_to_all_experts(x, *routing, lambda rows, *_, wrong=wrong: wrong(rows), [(0, 1)], alone)
    with pytest.raises(ValueError, match="DeepEP all EP ranks must own equally many experts, got 2, 1"):
        DeepEPExchange(routing[0], [(0, 2), (2, 3)], Shard(0, 2, 0, 1))
    with pytest.raises(ValueError, match="hidden_states must be bfloat16 with DeepEP, got .*float32"):
        DeepEPExchange(routing[0], [(0, 1), (1, 2)], Shard(0, 2, 0, 1)).send(x)


@pytest.mark.parametrize("size", range(1, 18))
def test_meeting_order(size):
    """Each pair meets once, both at the same time."""
    met = set()
    meetings = [list(meeting_order(rank, size)) for rank in range(size)]
    for rank, peers in enumerate(meetings):
        assert sorted(peers) == [other for other in range(size) if other != rank]
    queues = [iter(peers) for peers in meetings]
    waits_for = [next(queue, None) for queue in queues]
    while any(peer is not None for peer in waits_for):
        ready = [r for r, peer in enumerate(waits_for) if peer is not None and waits_for[peer] == r]
        assert ready, f"ranks wait in a circle: {waits_for}"
        for rank in ready:
            met.add(frozenset((rank, waits_for[rank])))
            waits_for[rank] = next(queues[rank], None)
    assert met == {frozenset(pair) for pair in itertools.combinations(range(size), 2)}
