"""One rank whose tokens go to experts on all EP ranks: all_to_all.py EP_SIZE TP_SIZE DIRECTORY.

The experts are plain Paddle, so that this tests the exchange alone. Writes what each case of all_to_all_cases
gave to rank_R.npz; the test compares it with one process that holds all tokens and all experts.
"""

import sys
from pathlib import Path

import numpy as np
import paddle

sys.path.insert(0, str(Path(__file__).parents[1]))
from all_to_all_cases import cases, expert_weights, run_experts, tokens_of

from paddle_moe.all_to_all import _Exchange, all_to_all_experts
from paddle_moe.distributed import ParallelContext, init_distributed
from paddle_moe.params import shard_range

ep_size, tp_size, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
parallel = init_distributed(ep_size, tp_size, timeout_seconds=60)
results = {}

for case in cases(ep_size):
    ranges = [shard_range(case.num_experts, rank, ep_size) for rank in range(ep_size)]
    first, end = ranges[parallel.ep_rank]
    x, ids, weights, cotangent = map(paddle.to_tensor, tokens_of(case, parallel.ep_rank))
    x = x.astype(case.dtype)
    matrices = paddle.to_tensor(expert_weights(case)[first:end]).astype(case.dtype)
    for tensor in (x, weights, matrices):
        tensor.stop_gradient = False
    arrived = []

    def experts(rows, row_ids, row_weights):
        arrived.append(rows.shape[0])
        return run_experts(rows, row_ids, row_weights, matrices, first)

    out, _ = all_to_all_experts(x, ids, weights, experts, ranges, parallel)
    assert out.dtype == x.dtype
    (out.astype("float32") * cotangent).sum().backward()
    gradients = {"x": x.grad, "weights": weights.grad, "matrices": matrices.grad}
    results[f"{case.name} out"] = out.astype("float32").numpy()
    results[f"{case.name} arrived"] = sum(arrived)
    for name, gradient in gradients.items():
        if gradient is not None:
            results[f"{case.name} d {name}"] = gradient.astype("float32").numpy()

# Work that does not need the rows runs while they travel: the other ranks send theirs after rank 0 has come
# to that work, which is after rank 0 has started to send.
turn = paddle.zeros([1])
start_sending = _Exchange.start_sending


def start_sending_late(self, tensors):
    parallel.all_reduce(turn, "grid")
    return start_sending(self, tensors)


if parallel.rank != 0:
    _Exchange.start_sending = start_sending_late
all_to_all_experts(
    paddle.ones([2, 4]),
    paddle.arange(2, dtype="int32").reshape([2, 1]),
    paddle.ones([2, 1]),
    lambda rows, row_ids, row_weights: rows,
    [shard_range(ep_size, rank, ep_size) for rank in range(ep_size)],
    parallel,
    meanwhile=lambda: parallel.all_reduce(turn, "grid") if parallel.rank == 0 else None,
)
_Exchange.start_sending = start_sending
results["overlapped"] = True

# Groups from elsewhere, as those of fleet.
adopted = ParallelContext.from_groups(parallel.ep_group, parallel.tp_group)
ranges = [shard_range(ep_size, rank, ep_size) for rank in range(ep_size)]
first_expert = paddle.zeros([2, 1], "int32")
try:
    adopted.use_deep_ep()
except RuntimeError as error:
    assert "DeepEP needs a GPU build of Paddle" in str(error), error
else:
    raise AssertionError("a Paddle for CPUs has no DeepEP")


def exchange_on_adopted_groups():
    rows = paddle.ones([2, 4])
    return all_to_all_experts(rows, first_expert, rows[:, :1], lambda x, ids, weights: 2 * x, ranges, adopted)


if ep_size == 2:
    assert (exchange_on_adopted_groups()[0] == 2).all()
else:
    try:
        exchange_on_adopted_groups()
    except ValueError as error:
        assert "parallel must be what init_distributed returned" in str(error), error
    else:
        raise AssertionError("a group of more than two ranks without pairs was accepted")

np.savez(directory / f"rank_{parallel.rank}.npz", **results)
