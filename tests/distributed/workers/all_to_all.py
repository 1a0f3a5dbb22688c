"""One rank whose tokens go to experts on all EP ranks: all_to_all.py EP_SIZE TP_SIZE DIRECTORY.

The experts are plain Paddle, so that this tests the exchange alone. Writes what each case of all_to_all_cases
gave to rank_R.npz; the test compares it with one process that holds all tokens and all experts.
"""

import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import paddle
import paddle.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from all_to_all_cases import cases, expert_weights, run_experts, tokens_of

from paddle_moe import FusedMoE
from paddle_moe.all_to_all import _Exchange, all_to_all_experts
from paddle_moe.distributed import ParallelContext, init_distributed
from paddle_moe.params import shard_range

ep_size, tp_size, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
parallel = init_distributed(ep_size, tp_size, timeout_seconds=60)
results = {}

# ---------------------------------------------------------------- stand-ins for what needs several GPUs


class Done:
    """A task, or an event, that has ended."""

    def wait(self):
        pass


class Arrival:
    """An event: what comes in is in none of `tensors` before the wait."""

    def __init__(self, *values):
        self.values = values
        nothing = {paddle.int64: -1}
        self.tensors = [paddle.full_like(value, nothing.get(value.dtype, float("nan"))) for value in values]

    def current_stream_wait(self):
        for value, tensor in zip(self.values, self.tensors):
            if value.size:
                paddle.assign(value, tensor)


def send_pieces(pieces, received, like):
    """Piece r to EP rank r; what has come, one after the other."""
    exchange = object.__new__(_Exchange)
    exchange._parallel, exchange._group = parallel, parallel.ep_group
    sent = [piece.shape[0] for piece in pieces]
    rows = paddle.concat(pieces) if sum(sent) else like[:0]
    return exchange._exchange_in_pairs([rows], sent, received)[0]


def alltoall_single(*, in_tensor, out_tensor, in_split_sizes, out_split_sizes, group, sync_op):
    assert group is parallel.ep_group and not sync_op
    pieces = paddle.split(in_tensor, in_split_sizes) if sum(in_split_sizes) else [in_tensor] * ep_size
    paddle.assign(send_pieces(pieces, out_split_sizes, in_tensor), out_tensor)
    return Done()


class Buffer:
    """What DeepEP's Buffer promises, in NumPy and over gloo."""

    class Config:
        def __init__(self, nvl_rows, rdma_rows):
            self.nvl_rows, self.rdma_rows = nvl_rows, rdma_rows

        def get_nvl_buffer_size_hint(self, row_bytes, ranks):
            assert ranks == ep_size
            return self.nvl_rows * row_bytes

        def get_rdma_buffer_size_hint(self, row_bytes, ranks):
            assert ranks == ep_size
            return self.rdma_rows * row_bytes

    get_dispatch_config = staticmethod(lambda ranks: Buffer.Config(100, 40))
    get_combine_config = staticmethod(lambda ranks: Buffer.Config(50, 80))

    def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0):
        assert group is parallel.ep_group
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes

    def expect_room(self, rows):
        assert rows.dtype == paddle.bfloat16
        assert self.num_nvl_bytes >= 100 * 2 * rows.shape[1] and self.num_rdma_bytes >= 80 * 2 * rows.shape[1]

    def get_dispatch_layout(self, topk_idx, num_experts):
        assert topk_idx.dtype == paddle.int64
        own = num_experts // ep_size
        ranks = np.where(topk_idx.numpy() < 0, -1, topk_idx.numpy() // own)
        in_rank = np.stack([(ranks == rank).any(axis=1) for rank in range(ep_size)], axis=1)
        per_expert = np.bincount(topk_idx.numpy()[topk_idx.numpy() >= 0], minlength=num_experts)
        return *map(paddle.to_tensor, (in_rank.sum(axis=0), in_rank.sum(axis=0), per_expert, in_rank)), Done()

    def dispatch(
        self,
        x,
        handle=None,
        num_tokens_per_rank=None,
        num_tokens_per_rdma_rank=None,
        is_token_in_rank=None,
        num_tokens_per_expert=None,
        topk_idx=None,
        topk_weights=None,
        async_finish=False,
    ):
        self.expect_room(x)
        cached = handle is not None
        if not cached:
            table = paddle.zeros([ep_size, ep_size], "int64")
            table[parallel.ep_rank] = num_tokens_per_rank
            table = parallel.all_reduce(table, "ep").numpy()
            own = num_tokens_per_expert.shape[0] // ep_size
            handle = is_token_in_rank.numpy(), table[:, parallel.ep_rank].tolist(), x.shape[0]
        in_rank, received, _ = handle

        def send(tensor, shown=lambda piece, rank: piece):
            places = [np.flatnonzero(in_rank[:, rank]) for rank in range(ep_size)]
            values = tensor.astype("float64").numpy()
            pieces = [paddle.to_tensor(shown(values[place], rank)) for rank, place in enumerate(places)]
            like = paddle.zeros([0, tensor.shape[1]], "float64")
            return send_pieces(pieces, received, like).astype(tensor.dtype)

        def numbered_there(ids, rank):
            ids = ids - rank * own
            return np.where((ids >= 0) & (ids < own), ids, -1.0)

        if cached:
            assert topk_idx is None and topk_weights is None and not async_finish
            return send(x), None, None, None, None, Done()
        assert async_finish
        event = Arrival(send(x), send(topk_idx, numbered_there), send(topk_weights))
        return *event.tensors, None, handle, event

    def combine(self, x, handle, topk_weights=None):
        self.expect_room(x)
        in_rank, received, count = handle
        ends, results = np.cumsum(received)[:-1], []
        for tensor in (x, topk_weights):
            if tensor is None:
                results.append(None)
                continue
            values = tensor.astype("float64").numpy()
            pieces = [paddle.to_tensor(piece) for piece in np.split(values, ends)]
            back = send_pieces(
                pieces, in_rank.sum(axis=0).tolist(), paddle.zeros([0, values.shape[1]], "float64")
            )
            total, rows = np.zeros([count, values.shape[1]]), iter(back.numpy())
            for rank in range(ep_size):
                for token in np.flatnonzero(in_rank[:, rank]):
                    total[token] += next(rows)
            results.append(paddle.to_tensor(total).astype(tensor.dtype))
        return *results, Done()


def run(case, kind=""):
    ranges = [shard_range(case.num_experts, rank, ep_size) for rank in range(ep_size)]
    first, end = ranges[parallel.ep_rank]
    x, ids, weights, cotangent = map(paddle.to_tensor, tokens_of(case, parallel.ep_rank))
    x, weights = x.astype(case.dtype), weights.astype(case.weight_dtype)
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
    results[f"{kind}{case.name} out"] = out.astype("float32").numpy()
    results[f"{kind}{case.name} arrived"] = sum(arrived)
    for name, gradient in gradients.items():
        if gradient is not None:
            results[f"{kind}{case.name} d {name}"] = gradient.astype("float32").numpy()


for case in cases(ep_size):
    run(case)

# All-to-all in one call, as on NCCL.
with mock.patch.multiple(_Exchange, _start=_Exchange._exchange_at_once):
    with mock.patch.object(dist, "alltoall_single", alltoall_single):
        for case in cases(ep_size):
            run(case, "at once ")

# DeepEP, which has bfloat16 alone, and equally many experts on all ranks.
parallel.deep_ep = Buffer
for case in cases(ep_size):
    if case.dtype == "bfloat16" and case.num_experts % ep_size == 0:
        # One that a layer with shorter rows has left, too small for NVLink or for RDMA.
        parallel.deep_ep_buffer = Buffer(parallel.ep_group, *((1, 10**6) if all(case.tokens) else (10**6, 1)))
        run(case, "deep ep ")
parallel.deep_ep = None

# Each EP rank passes another K, and all of them can exchange afterwards.
one_each = [shard_range(ep_size, rank, ep_size) for rank in range(ep_size)]
table = paddle.zeros([2, 1 + parallel.ep_rank], "int32")
try:
    all_to_all_experts(
        paddle.ones([2, 4]), table, table.astype("float32"), lambda x, *_: x, one_each, parallel
    )
except ValueError as error:
    results["another K"] = str(error)

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
    one_each,
    parallel,
    meanwhile=lambda: parallel.all_reduce(turn, "grid") if parallel.rank == 0 else None,
)
_Exchange.start_sending = start_sending
results["overlapped"] = True

# What the others wait for rank 0 is no time of their kernels.
events = mock.Mock()
layer = FusedMoE(
    8, 6, 2 * ep_size, 2, parallel=parallel, dispatch="alltoall", shared_intermediate_size=4, logger=events
)
shared_output = layer._shared_output


def slow_shared_output(*arguments):
    time.sleep(0.1)
    return shared_output(*arguments)


layer._shared_output = slow_shared_output
layer(paddle.ones([5, 8]))  # makes threads
if parallel.rank != 0:
    (directory / f"rank_{parallel.rank}_is_there").touch()
else:
    # A second from when the last is there, which on a busy machine may be a while after a barrier.
    while len(list(directory.glob("rank_*_is_there"))) < parallel.world_size - 1:
        time.sleep(0.01)
    time.sleep(1.0)
started = time.perf_counter()
layer(paddle.ones([5, 8]))
seconds = time.perf_counter() - started
logged = events.event.call_args.kwargs
results["logged seconds"] = [logged["kernel_ms"] / 1e3, logged["collective_ms"] / 1e3, seconds]

# Groups from elsewhere, as those of fleet.
adopted = ParallelContext.from_groups(parallel.ep_group, parallel.tp_group)
first_expert = paddle.zeros([2, 1], "int32")
try:
    adopted.use_deep_ep()
except RuntimeError as error:
    assert "DeepEP needs a GPU build of Paddle" in str(error), error
else:
    raise AssertionError("a Paddle for CPUs has no DeepEP")


def exchange_on_adopted_groups():
    rows = paddle.ones([2, 4])
    return all_to_all_experts(
        rows, first_expert, rows[:, :1], lambda x, ids, weights: 2 * x, one_each, adopted
    )


assert (exchange_on_adopted_groups()[0] == 2).all()

np.savez(directory / f"rank_{parallel.rank}.npz", **results)
