"""The collectives of FusedMoE with their gradients.

Tokens are replicated, experts are sharded. Where replicated tensors enter the sharded part, each rank of the
grid gets a part of their gradient, and the backward adds these parts up. Where partial outputs leave it, the
forward adds them up, and every rank has the whole gradient already. These are the conjugate operators f and g
of Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism"
(2019), section 3.

Every rank must run the same collectives in the same order in the backward too, and Paddle orders its nodes by
the shape of the graph. So the graph has the same shape everywhere: `no_contribution` stands where a rank has
no experts, or no rows for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import paddle
from paddle.autograd import PyLayer

if TYPE_CHECKING:
    from paddle_moe.distributed import ParallelContext

__all__ = ["enter_shards", "has_no_rows", "leave_shards", "no_contribution", "sum_over"]


def enter_shards(
    tensors: list[paddle.Tensor], parallel: ParallelContext | None, groups: Sequence[str], fp32: bool
) -> list[paddle.Tensor]:
    """`tensors`, replicated on the ranks of `groups`, with gradients that are summed over them, in place.

    Args:
        groups: names of groups of `parallel`, summed over one after the other.
        fp32: sum bfloat16 and float16 in float32.
    """
    trained = [index for index, tensor in enumerate(tensors) if not tensor.stop_gradient]
    if not _spans_ranks(parallel, groups) or not trained or not paddle.is_grad_enabled():
        return tensors
    entered = _Enter.apply(parallel, groups, fp32, *[tensors[index] for index in trained])
    result = list(tensors)
    for index, tensor in zip(trained, entered):
        result[index] = tensor
    return result


def leave_shards(
    partial: paddle.Tensor, parallel: ParallelContext | None, groups: Sequence[str]
) -> paddle.Tensor:
    """The sum of `partial` over the ranks of `groups`; the gradient of the sum is that of each part."""
    if not _spans_ranks(parallel, groups):
        return partial
    if partial.stop_gradient or not paddle.is_grad_enabled():
        return sum_over(partial, parallel, groups)
    return _Leave.apply(partial, parallel, groups)


def no_contribution(like: paddle.Tensor, *inputs: paddle.Tensor | None) -> paddle.Tensor:
    """Zeros of the shape and dtype of `like`, which depend on `inputs` with the gradient zero."""
    return _NoContribution.apply(like, *[tensor for tensor in inputs if tensor is not None])


def has_no_rows(tokens: paddle.Tensor) -> bool:
    """Whether experts have nothing to do.

    `no_contribution` stands there too: recompute(use_reentrant=False) gives tensors without elements back
    without a place, which the operator refuses.
    """
    return paddle.in_dynamic_mode() and tokens.shape[0] == 0


def sum_over(
    tensor: paddle.Tensor, parallel: ParallelContext, groups: Sequence[str], fp32: bool = False
) -> paddle.Tensor:
    """All-reduces `tensor` in place over each of `groups`."""
    for group in groups:
        parallel.all_reduce(tensor, group, fp32=fp32)
    return tensor


def _spans_ranks(parallel: ParallelContext | None, groups: Sequence[str]) -> bool:
    return parallel is not None and any(parallel.size(group) > 1 for group in groups)


class _Enter(PyLayer):
    @staticmethod
    def forward(ctx, parallel: ParallelContext, groups: Sequence[str], fp32: bool, *tensors: paddle.Tensor):
        ctx.options = parallel, groups, fp32
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients: paddle.Tensor):
        # In place: operators of FusedMoE made these gradients, and nobody else holds them.
        return tuple(sum_over(gradient, *ctx.options) for gradient in gradients)


class _Leave(PyLayer):
    @staticmethod
    def forward(ctx, partial: paddle.Tensor, parallel: ParallelContext, groups: Sequence[str]):
        return sum_over(partial.clone(), parallel, groups)

    @staticmethod
    def backward(ctx, gradient: paddle.Tensor):
        return gradient


class _NoContribution(PyLayer):
    @staticmethod
    def forward(ctx, *inputs: paddle.Tensor):
        ctx.inputs = [(tensor.shape, tensor.dtype, tensor.stop_gradient) for tensor in inputs]
        ctx.save_for_backward(paddle.zeros([1], "float32"))
        return paddle.zeros_like(inputs[0])

    @staticmethod
    def backward(ctx, gradient: paddle.Tensor):
        # As the operator does on ranks with experts: recompute(use_reentrant=False) runs the forward and its
        # all-reduces again when the first kept tensor is asked for.
        ctx.saved_tensor()
        gradients = [None if fixed else paddle.zeros(shape, dtype) for shape, dtype, fixed in ctx.inputs]
        return gradients[0] if len(gradients) == 1 else tuple(gradients)
