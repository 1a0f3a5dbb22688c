"""What every rank does around the experts that it holds, in an order that is the same on all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Callable

import paddle

from paddle_moe.collectives import enter_shards

if TYPE_CHECKING:
    from paddle_moe.distributed import ParallelContext

Tensor = paddle.Tensor


def partial_sum(
    tokens: Tensor,
    routing_table: Tensor,
    router_weights: Tensor,
    shared_weights: Tensor | None,
    *,
    routed: Callable[[Tensor, Tensor, Tensor], Tensor],
    shared: Callable[[Tensor, Tensor], Tensor],
    parallel: ParallelContext | None,
    groups: Sequence[str],
    fp32: bool,
    exchange: Callable[..., tuple[Tensor, Tensor | None]] | None = None,
) -> Tensor:
    """What this rank adds to the output of a layer whose experts are divided over ranks.

    The sum over the ranks of `groups` is the output (collectives.leave_shards); the gradients of `tokens`,
    `router_weights` and `shared_weights` are summed over them here.

    Args:
        tokens: [T, H]. routing_table, router_weights: [T, K]. All are the same on the ranks of `groups`.
        shared_weights: [T, 1] fp32, of the shared expert in each token; None: there is no such expert.
        routed: of (rows [N, H], ids [N, K], weights [N, K]) the sum over this rank's experts, [N, H].
        shared: of (tokens, shared_weights) this rank's part of the shared expert, [T, H].
        fp32: sum the gradients in fp32.
        exchange: all_to_all.all_to_all_experts of this rank, where each EP rank has tokens of its own, which
            travel to the experts. None: they have the same tokens.

    Returns:
        [T, H] in the dtype of `tokens`; with a shared expert fp32, also because the CPU has no half-precision
        addition.
    """
    entering = [tokens, router_weights, *([] if shared_weights is None else [shared_weights])]
    tokens, router_weights, *entered = enter_shards(entering, parallel, groups, fp32)

    def of_shared() -> Tensor | None:
        return shared(tokens, *entered) if entered else None

    if exchange is None:
        output, addend = routed(tokens, routing_table, router_weights), of_shared()
    else:
        output, addend = exchange(tokens, routing_table, router_weights, routed, meanwhile=of_shared)
    return output if addend is None else output.astype("float32") + addend.astype("float32")


def expect_dynamic_mode(parallel: ParallelContext | None) -> None:
    """A NotImplementedError where a program is being built of what several ranks compute together."""
    if parallel is not None and parallel.size("grid") > 1 and not paddle.in_dynamic_mode():
        raise NotImplementedError(
            "experts that are spread over ranks need dynamic mode, because a program cannot hold what the "
            "ranks exchange; leave this layer out of paddle.jit.to_static(full_graph=True) and "
            "paddle.jit.save, or pass full_graph=False"
        )


def raise_anywhere(parallel: ParallelContext | None, failure: Exception | None, what: str) -> None:
    """Raises `failure`; on a rank that has none, a RuntimeError with that of another.

    All ranks call it together, where data of one of them may be refused.
    """
    if parallel is not None:
        text = None if failure is None else f"{type(failure).__name__}: {failure}"
        for rank, other in parallel.exchange([parallel.rank, text], what):  # of from_groups not from 0 on
            if failure is None and other is not None:
                raise RuntimeError(f"rank {rank} refuses {what}: {other}")
    if failure is not None:
        raise failure
