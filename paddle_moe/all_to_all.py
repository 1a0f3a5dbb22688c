"""All-to-all expert parallelism: every token lives on one EP rank, and only the rows that a peer needs
travel.

A token goes once to each rank that owns at least one of its experts, however many of them that rank owns. The
rank runs its experts on the rows that arrived and sends one partial sum per row back; the token's own rank
adds them up. Gradients take the same ways in the opposite direction.

    rank 0   rows ─┐  ┌─ experts 0.. ─┐  ┌─ sum per token
                   ├──┤               ├──┤
    rank 1   rows ─┘  └─ experts n.. ─┘  └─ sum per token
            send       mixture_of_experts  send back

This is the dispatch and combine of Lepikhin et al., "GShard" (2020), without capacity: counts vary per pair
of ranks and per call, and zero is an ordinary count.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, TypeVar

import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer

from paddle_moe._options import dtype_name
from paddle_moe.collectives import no_contribution
from paddle_moe.deep_ep import DeepEPExchange

if TYPE_CHECKING:
    from paddle_moe.distributed import ParallelContext

Tensor = paddle.Tensor
T = TypeVar("T")


def all_to_all_experts(
    hidden_states: Tensor,
    routing_table: Tensor,
    router_weights: Tensor,
    experts: Callable[[Tensor, Tensor, Tensor], Tensor],
    expert_ranges: Sequence[tuple[int, int]],
    parallel: ParallelContext,
    meanwhile: Callable[[], T] = lambda: None,
) -> tuple[Tensor, T]:
    """Runs every token through experts that live on all ranks of the EP group.

    All ranks of the EP group call this at the same time, each with tokens of its own; any number of tokens, 0
    too. In the backward pass gradients of hidden_states and router_weights come back to the token's rank, and
    `experts` sees the gradients of the tokens of all ranks.

    Args:
        hidden_states: [T, H], the tokens of this rank.
        routing_table: [T, K] int32 or int64 global expert ids; -1 for none.
        router_weights: [T, K], fp32 or the dtype of hidden_states.
        experts: gets (rows [N, H], ids [N, K] int32, weights [N, K] fp32) from all ranks and returns [N, H]
            in the dtype of rows, the sum over the experts of this rank. Ids of other ranks' experts are left
            in place. It is not called on a rank that has no experts.
        expert_ranges: (first, end) of the experts of every EP rank, the same on all ranks.
        parallel: its ep_group is exchanged over.
        meanwhile: called while the rows are on their way, for work that does not need them.

    Returns:
        (out [T, H] in the dtype of hidden_states, the result of `meanwhile`).

    Raises:
        ValueError: expert_ranges does not have one entry per EP rank, a shape or dtype does not fit, K is
            another on another EP rank, or `experts` returns another shape or dtype.
        RuntimeError: the transport failed.
    """
    if len(expert_ranges) != parallel.ep_size:
        raise ValueError(
            f"expert_ranges must have one (first, end) for each of the {parallel.ep_size} EP ranks, "
            f"got {len(expert_ranges)}"
        )
    ids = _checked_ids(hidden_states, routing_table, router_weights, expert_ranges[-1][1])
    router_weights = router_weights.astype("float32")
    with paddle.no_grad():
        kind = _Exchange if parallel.deep_ep is None else DeepEPExchange
        exchange = kind(ids, expert_ranges, parallel)
        arriving = exchange.start(hidden_states, ids, router_weights)
    other = meanwhile()
    arrived, ids, weights = arriving()
    arrivals = _Arrivals(arrived, weights)
    rows, weights = _Dispatch.apply(hidden_states, router_weights, exchange, arrivals)
    first, end = expert_ranges[parallel.ep_rank]
    partial = experts(rows, ids, weights) if first < end else no_contribution(rows, weights)
    if partial.dtype != rows.dtype or partial.shape != rows.shape:
        raise ValueError(
            f"experts must return the shape and dtype of its rows, {rows.shape} {rows.dtype}, "
            f"got {partial.shape} {partial.dtype}"
        )
    # Also where nothing of this rank needs a gradient, the others wait for its part of the exchange.
    anchor = paddle.zeros([1], "float32")
    anchor.stop_gradient = False
    return _Combine.apply(partial, anchor, exchange), other


def _checked_ids(
    hidden_states: Tensor, routing_table: Tensor, router_weights: Tensor, num_experts: int
) -> Tensor:
    """The ids as int32, before anything is sent."""
    shape = list(routing_table.shape)
    if len(shape) != 2 or shape[0] != hidden_states.shape[0] or list(router_weights.shape) != shape:
        raise ValueError(
            "routing_table and router_weights must both have the shape [T, K] with T = "
            f"{hidden_states.shape[0]} tokens, got {shape} and {list(router_weights.shape)}"
        )
    for name, tensor, dtypes in (
        ("routing_table", routing_table, (paddle.int32, paddle.int64)),
        ("router_weights", router_weights, (paddle.float32, hidden_states.dtype)),
    ):
        if tensor.dtype not in dtypes:
            expected = " or ".join(dict.fromkeys(map(dtype_name, dtypes)))
            raise ValueError(f"{name} must have the dtype {expected}, got {dtype_name(tensor.dtype)}")
    if routing_table.dtype == paddle.int32:
        return routing_table
    # Ids that no expert has must not become others on the way to 32 bits.
    known = (routing_table >= 0) & (routing_table < num_experts)
    return paddle.where(known, routing_table, paddle.full_like(routing_table, -1)).astype("int32")


@dataclass
class _Arrivals:
    """What _Dispatch puts into the graph; to PyLayer no inputs, since nothing flows back to them."""

    rows: Tensor
    weights: Tensor


class _Dispatch(PyLayer):
    """Gives the rows that have arrived their place in the graph; backward sends their gradients home."""

    @staticmethod
    def forward(ctx, hidden_states, router_weights, exchange, arrivals):
        ctx.exchange, ctx.dtype = exchange, hidden_states.dtype
        ctx.fixed = hidden_states.stop_gradient, router_weights.stop_gradient
        return arrivals.rows, arrivals.weights

    @staticmethod
    def backward(ctx, rows, weights):
        rows, weights = ctx.exchange.combine(rows, weights)
        hidden_states_fixed, router_weights_fixed = ctx.fixed
        return None if hidden_states_fixed else rows.astype(
            ctx.dtype
        ), None if router_weights_fixed else weights


class _Combine(PyLayer):
    """Sends partial sums home and adds them; backward sends every row the gradient of its token."""

    @staticmethod
    def forward(ctx, partial, anchor, exchange):
        ctx.exchange, ctx.fixed = exchange, partial.stop_gradient
        ctx.save_for_backward(anchor)
        return exchange.combine(partial)[0].astype(partial.dtype)

    @staticmethod
    def backward(ctx, out):
        # recompute(use_reentrant=False) runs the forward again here, also on a rank that keeps nothing else.
        ctx.saved_tensor()
        rows = ctx.exchange.send(out)
        return None if ctx.fixed else rows, paddle.zeros([1], "float32")


class _Exchange:
    """Which tokens of this rank go to which EP rank, and how many rows each of those sends here.

    Outgoing rows are ordered by destination, then by token; arriving rows by the rank that they come from.
    """

    def __init__(
        self, routing_table: Tensor, expert_ranges: Sequence[tuple[int, int]], parallel: ParallelContext
    ):
        self._parallel, self._group = parallel, parallel.ep_group
        needed = paddle.stack(
            [((routing_table >= first) & (routing_table < end)).any(axis=1) for first, end in expert_ranges]
        )  # [ranks, tokens]
        # The sizes of the messages must be known on the host, so this waits for the device.
        counts = needed.astype("int64").sum(axis=1)
        self._tokens = paddle.nonzero(needed)[:, 1]
        outgoing = self._tokens.shape[0]
        places = needed.astype("int64").flatten().cumsum().reshape(needed.shape) - 1
        # A token that does not go to a rank reads the row of zeros after the last.
        self._places = paddle.where(needed, places, paddle.full_like(places, outgoing))
        # Of each rank how many rows it sends to which, and its K.
        table = paddle.zeros([parallel.ep_size, parallel.ep_size + 1], "int64")
        table[parallel.ep_rank] = paddle.concat([counts, paddle.full([1], routing_table.shape[1], "int64")])
        *table, top_k = zip(*parallel.all_reduce(table, "ep").tolist())
        if len(set(top_k)) > 1:
            raise ValueError(
                "routing_table must have the same K on all EP ranks, got "
                + ", ".join(f"{k} on rank {rank}" for k, rank in zip(top_k, self._group.ranks))
            )
        self._sent = [of_rank[parallel.ep_rank] for of_rank in table]
        self._received = list(table[parallel.ep_rank])

    def start(
        self, hidden_states: Tensor, ids: Tensor, weights: Tensor
    ) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        """Sends tokens to where they are needed; the result waits for (rows, ids, weights) that come in."""
        arriving = self.start_sending([hidden_states, paddle.concat([ids, weights.view("int32")], axis=1)])

        def wait() -> tuple[Tensor, Tensor, Tensor]:
            rows, slots = arriving()
            ids, weights = paddle.split(slots, 2, axis=1)
            return rows, ids, weights.view("float32")

        return wait

    def send(self, rows: Tensor) -> Tensor:
        """[T, D] to where the tokens are needed: what has come in."""
        return self.start_sending([rows])()[0]

    def combine(self, *rows: Tensor) -> list[Tensor]:
        """Rows in the order of arrival back to their tokens: the fp32 sums [T, D] of what has come back."""
        return [self.sum_per_token(one) for one in self.start_returning(list(rows))()]

    def start_sending(self, tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Sends the rows [T, ...] of tokens to where they are needed; the result waits for what comes in."""
        return self._start([_gather(t.detach(), self._tokens) for t in tensors], self._sent, self._received)

    def start_returning(self, tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Sends rows in the order of arrival back; the result waits for this rank's own, as they left."""
        return self._start([t.detach() for t in tensors], self._received, self._sent)

    def sum_per_token(self, rows: Tensor) -> Tensor:
        """[outgoing rows, D] -> fp32 [T, D], added in the order of the ranks."""
        rows = paddle.concat([rows.astype("float32"), paddle.zeros([1, rows.shape[1]], "float32")])
        total = paddle.gather(rows, self._places[0])
        for places in self._places[1:]:
            total = total + paddle.gather(rows, places)
        return total

    def _start(
        self, tensors: list[Tensor], sent: list[int], received: list[int]
    ) -> Callable[[], list[Tensor]]:
        if self._group.nranks == 1:
            return lambda: tensors
        if self._group.backend == "GLOO":
            return _in_thread(lambda: self._exchange_in_pairs(tensors, sent, received))
        return self._exchange_at_once(tensors, sent, received)

    def _exchange_at_once(
        self, tensors: list[Tensor], sent: list[int], received: list[int]
    ) -> Callable[[], list[Tensor]]:
        results = [paddle.empty([sum(received), *t.shape[1:]], t.dtype) for t in tensors]
        tasks = [
            dist.alltoall_single(  # by name: Paddle 2.6 has the input first, 3 the output
                in_tensor=t.contiguous(),
                out_tensor=to,
                in_split_sizes=sent,
                out_split_sizes=received,
                group=self._group,
                sync_op=False,
            )
            for to, t in zip(results, tensors)
        ]

        def wait() -> list[Tensor]:
            with self._parallel.waiting("ep", "all-to-all"):
                for task in tasks:
                    task.wait()
            return results

        return wait

    def _exchange_in_pairs(self, tensors: list[Tensor], sent: list[int], received: list[int]) -> list[Tensor]:
        """Gloo has no all-to-all, and its send returns only when the other side receives.

        So ranks meet in pairs, and in each pair the lower rank sends first: nobody waits in a circle.
        """
        pieces = [paddle.split(t, sent) if t.shape[0] else [t] * len(sent) for t in tensors]
        with self._parallel.waiting("ep", "all-to-all"):
            for peer in meeting_order(self._group.rank, self._group.nranks):
                rank = self._group.ranks[peer]
                pair = self._parallel.ep_pairs[rank]
                arrivals = [paddle.empty([received[peer], *t.shape[1:]], t.dtype) for t in tensors]
                for sending in (True, False) if self._group.rank < peer else (False, True):
                    for piece, arrival in zip(pieces, arrivals):
                        if sending and sent[peer]:
                            dist.send(piece[peer], rank, group=pair)
                        elif not sending and received[peer]:
                            dist.recv(arrival, rank, group=pair)
                for piece, arrival in zip(pieces, arrivals):
                    piece[peer] = arrival
        return [paddle.concat(piece) for piece in pieces]


def meeting_order(rank: int, size: int) -> Iterator[int]:
    """The other ranks in the order in which `rank` meets them, so that both of a pair meet at the same time.

    The circle method of round-robin tournaments (Kirkman, 1847): in round r the ranks a and b with
    a + b = 2 r modulo the number of ranks - 1 meet; with an odd number of ranks one of them pauses.
    """
    places = size + size % 2
    for meeting in range(places - 1):
        if rank == places - 1:
            peer = meeting
        else:
            peer = (2 * meeting - rank) % (places - 1)
            if peer == rank:
                peer = places - 1
        if peer < size:
            yield peer


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    if str(rows.dtype) == "paddle.float16":  # the CPU gathers no float16
        return paddle.gather(rows.view("int16"), index).view("float16")
    return paddle.gather(rows, index)


def _in_thread(function: Callable[[], T]) -> Callable[[], T]:
    """Starts `function` in a thread; the result waits for it and returns or raises what it did."""
    outcome: dict[str, object] = {}

    def run() -> None:
        try:
            with paddle.no_grad():
                outcome["result"] = function()
        except BaseException as error:  # raised again where the caller waits
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def wait() -> T:
        thread.join()
        if "error" in outcome:
            raise outcome["error"]
        return outcome["result"]

    return wait
