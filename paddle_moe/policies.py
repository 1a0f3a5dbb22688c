"""What a router may do besides choosing: jitter, capacity, and a selection bias that balances the load.

T tokens, E experts over all ranks, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import paddle

from paddle_moe._options import at_least, dtype_name, one_of, positive, real
from paddle_moe.collectives import sum_over
from paddle_moe.functional import expect_tensors, without_autocast

if TYPE_CHECKING:
    from paddle_moe.distributed import ParallelContext

__all__ = ["balanced_correction_bias", "jitter", "limit_capacity", "tokens_per_expert"]


def count_ids(ids: paddle.Tensor, num_experts: int, per_row: bool = False) -> paddle.Tensor:
    """How often each expert occurs in ids, no others: [E], or per row of ids [R, E]. int64."""
    at_least(1)("num_experts", num_experts)
    expect_tensors(routing_table=ids)
    if dtype_name(ids.dtype) not in ("int32", "int64"):
        raise ValueError(f"routing_table must have the dtype int32 or int64, got {dtype_name(ids.dtype)}")
    rows = ids if per_row else ids.reshape([1, -1])
    rows = rows.astype("int64")
    # From a row of `rows`, so that the number of rows may be unknown while a graph is built.
    zeros = paddle.zeros_like(rows.sum(axis=1, keepdim=True)).tile([1, num_experts])
    counted = ((rows >= 0) & (rows < num_experts)).astype("int64")
    counts = paddle.put_along_axis(zeros, rows.clip(0, num_experts - 1), counted, axis=1, reduce="add")
    return counts if per_row else counts[0]


def tokens_per_expert(routing_table: paddle.Tensor, num_experts: int) -> paddle.Tensor:
    """The rows that each expert gets: [E] int64.

    Args:
        routing_table: [..., K], int32 or int64; ids outside 0 .. E - 1, such as -1, count for no expert.
        num_experts: E.

    Raises:
        ValueError: another dtype, or num_experts is less than 1.
    """
    return count_ids(routing_table, num_experts)


@without_autocast
def jitter(
    hidden_states: paddle.Tensor,
    epsilon: float,
    parallel: ParallelContext | None = None,
    group: str = "grid",
) -> paddle.Tensor:
    """The router's input times uniform noise in [1 - epsilon, 1 + epsilon], for exploration in training.

    Fedus et al., "Switch Transformers" (2021), section 2.4. The noise comes from Paddle's generator, so
    recompute repeats it. Ranks that hold the same tokens all use that of the first one, at the price of an
    all-reduce.

    Args:
        hidden_states: [T, H].
        epsilon: at least 0 and below 1.
        parallel, group: the group of ``parallel`` whose ranks hold the same tokens, "grid" or "tp".

    Returns:
        [T, H] in the dtype of ``hidden_states``.

    Raises:
        ValueError: epsilon is out of its range, or an unknown group.
    """
    check_jitter("epsilon", epsilon)
    one_of("grid", "tp")("group", group)
    shape = hidden_states.shape if paddle.in_dynamic_mode() else paddle.shape(hidden_states)
    noise = paddle.uniform(shape, "float32", min=1 - epsilon, max=1 + epsilon)
    if parallel is not None:
        first = parallel.tp_rank == 0 and (group == "tp" or parallel.ep_rank == 0)
        noise = parallel.all_reduce(noise if first else paddle.zeros_like(noise), group)
    return (hidden_states.astype("float32") * noise).astype(hidden_states.dtype)


@without_autocast
def limit_capacity(
    routing_table: paddle.Tensor,
    router_weights: paddle.Tensor,
    num_experts: int,
    capacity_factor: float,
    policy: str = "probability",
) -> tuple[paddle.Tensor, paddle.Tensor]:
    r"""Drops what an expert was given beyond its capacity; a dropped slot has the id -1 and the weight 0.

    .. math::
        capacity = \lceil capacity\_factor \cdot T K / E \rceil

    tokens per expert, computed in float64, over the T tokens of this call. Deterministic.

    Args:
        routing_table: [T, K], int32 or int64. Ids outside 0 .. E - 1 take no capacity; they become -1.
        router_weights: [T, K]. The other weights stay as they are.
        num_experts: E.
        capacity_factor: positive.
        policy: which slots stay. "probability": those with the largest weights, of equal ones the earlier
            token (batch prioritized routing by slot, Riquelme et al., "Scaling Vision with Sparse Mixture of
            Experts", 2021). "position": the first choices of all tokens in their order, then the second
            choices, and so on (Lepikhin et al., "GShard", 2020).

    Returns:
        (routing_table, router_weights) of the same shapes and dtypes. The gradient of a dropped weight is 0.

    Raises:
        ValueError: an argument has a wrong shape or dtype or is out of its range.
    """
    check_capacity(capacity_factor, policy)
    expect_tensors(routing_table=routing_table, router_weights=router_weights)
    table, weights = list(routing_table.shape), list(router_weights.shape)
    if len(table) != 2 or table != weights and -1 not in table + weights:  # -1: not known in a program
        raise ValueError(
            f"routing_table and router_weights must both have the shape [T, K], got {table} and {weights}"
        )
    counts = count_ids(routing_table, num_experts)
    top_k = routing_table.shape[1]
    ids = routing_table.flatten().astype("int64")
    ids = paddle.where(ids < num_experts, ids, paddle.full_like(ids, -1))
    slots = paddle.ones_like(ids).cumsum() - 1
    if policy == "position":
        order = slots.reshape([-1, top_k]).transpose([1, 0]).flatten()
    else:
        order = paddle.argsort(-router_weights.detach().flatten().astype("float32"), stable=True)
    # By expert, and within an expert by priority. Slots of no expert come first.
    order = paddle.gather(order, paddle.argsort(paddle.gather(ids, order), stable=True))
    sorted_ids = paddle.gather(ids, order)
    starts = (ids < 0).astype("int64").sum() + counts.cumsum() - counts
    place_in_expert = slots - paddle.gather(starts, sorted_ids.clip(min=0))
    capacity = paddle.ceil(capacity_factor * paddle.ones_like(ids).sum().astype("float64") / num_experts)
    stays = (sorted_ids >= 0) & (place_in_expert.astype("float64") < capacity)
    stays = paddle.scatter(paddle.zeros_like(ids), order, stays.astype("int64")).reshape([-1, top_k])
    dropped, dtype = paddle.full_like(routing_table, -1), router_weights.dtype
    if dtype_name(dtype) in ("bfloat16", "float16"):  # of which the CPU selects none
        router_weights = router_weights.astype("float32")
    return (
        paddle.where(stays > 0, routing_table, dropped),
        paddle.where(stays > 0, router_weights, paddle.zeros_like(router_weights)).astype(dtype),
    )


def check_capacity(capacity_factor: float, policy: str, policy_name: str = "policy") -> None:
    positive("capacity_factor", capacity_factor)
    one_of("probability", "position")(policy_name, policy)


def check_jitter(name: str, epsilon: float) -> None:
    if not 0 <= real(name, epsilon) < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {epsilon}")


@without_autocast
@paddle.no_grad()
def balanced_correction_bias(
    correction_bias: paddle.Tensor,
    counts: paddle.Tensor,
    update_speed: float = 1e-3,
    parallel: ParallelContext | None = None,
    replicas: Sequence[str] = ("dp",),
) -> paddle.Tensor:
    r"""The selection bias after one step of load balancing without an auxiliary loss.

    .. math::
        b_e + update\_speed \cdot sign\Big(\frac{1}{E} \sum_{e'} c_{e'} - c_e\Big)

    Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (2024), algorithm 1;
    DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), section 2.1.2, where update_speed is 1e-3 (gamma).

    Args:
        correction_bias: [E] float32.
        counts: [E] integers, the tokens per expert since the last step, over all micro-batches.
        update_speed: positive.
        parallel, replicas: counts are summed over these groups of ``parallel``, whose ranks hold different
            tokens, so that all of them get the same bias.

    Returns:
        [E] float32.

    Raises:
        ValueError: update_speed is not positive, or the shapes differ.
    """
    positive("update_speed", update_speed)
    if list(counts.shape) != list(correction_bias.shape):
        raise ValueError(
            f"counts must have the shape of correction_bias, {list(correction_bias.shape)}, "
            f"got {list(counts.shape)}"
        )
    counts = counts.astype("int64")
    if parallel is not None:
        counts = sum_over(counts.clone(), parallel, replicas)
    # The mean times E, in integers: a mean that is not exact would move experts that are at it.
    direction = paddle.sign((counts.sum() - counts * counts.shape[0]).astype("float32"))
    return correction_bias + update_speed * direction
