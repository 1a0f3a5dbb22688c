"""What an optimizer step needs on EP x TP x DP ranks: gradients averaged over replicas, and clipped by a norm
that counts every parameter once.

Dense parameters are the same on every rank, and so are their gradients within a grid. The parameters of the
experts are sharded over the grid (FusedMoE sets `is_distributed` and `expert` on them) and the same at the
same place of every grid. So the data-parallel group is the right one for both kinds.

With FusedMoE(dispatch="alltoall") the ranks of an EP group hold different tokens: for dense parameters they
are further replicas. The gradient of an expert is complete then, but it is that of the sum of their losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import paddle
from paddle.nn.clip import ClipGradBase

from paddle_moe.collectives import sum_over

if TYPE_CHECKING:
    from paddle_moe.distributed import ParallelContext

__all__ = ["ClipGradByGlobalNorm", "average_gradients", "broadcast_parameters"]

_BUCKET_ELEMENTS = 2**23  # 32 MB in float32: large enough for the network, small beside the gradients


@paddle.no_grad()
def average_gradients(
    parameters: Iterable[paddle.Tensor], parallel: ParallelContext, *, replicas: Sequence[str] = ("dp",)
) -> None:
    """Replaces the gradients by those of the average of the losses of all replicas.

    Call it once per step, after the last backward of gradient accumulation and before clipping and the
    optimizer, on every rank with the parameters in the same order. A parameter that got a gradient on some
    replicas counts with zero on the others; one that got none anywhere keeps none. float16 and bfloat16 are
    summed in float32.

    With paddle.DataParallel, which leaves sharded experts alone, call it for those that have `no_sync`.

    Args:
        replicas: the groups of `parallel` whose ranks hold different tokens: ("dp", "ep") with
            FusedMoE(dispatch="alltoall").

    Raises:
        ValueError: a gradient is sparse.
    """
    num_replicas = math.prod(parallel.size(group) for group in replicas)
    if num_replicas == 1:
        return
    trained = [parameter for parameter in parameters if not parameter.stop_gradient]
    for parameter in trained:
        if parameter.grad is not None and parameter.grad.is_selected_rows():
            raise ValueError(
                f"parameters: the gradient of {parameter.name} is sparse, which is not supported"
            )
    for experts in (False, True):
        of_kind = [parameter for parameter in trained if getattr(parameter, "expert", False) == experts]
        # Another EP rank holds other experts.
        groups = [group for group in replicas if not (experts and group == "ep")]
        present = paddle.to_tensor([parameter.grad is not None for parameter in of_kind], "int32")
        present = sum_over(present, parallel, groups).tolist()
        used = [parameter for parameter, count in zip(of_kind, present) if count and parameter.size]
        for bucket in _buckets(used):
            wide = "float64" if bucket[0].dtype == paddle.float64 else "float32"
            gradients = [paddle.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = paddle.concat([gradient.flatten().astype(wide) for gradient in gradients])
            averages = (sum_over(flat, parallel, groups) / num_replicas).split([p.size for p in bucket])
            for parameter, average in zip(bucket, averages):
                parameter.grad = average.reshape(parameter.shape).astype(parameter.dtype)


@paddle.no_grad()
def broadcast_parameters(parameters: Iterable[paddle.Tensor], parallel: ParallelContext) -> None:
    """Gives every rank the same dense parameters, and every replica the same shards of the experts.

    They are those of the first grid, and for dense parameters of its first rank. Call it on every rank, with
    the parameters in the same order, where layers may have started from different random numbers.
    """
    for parameter in parameters:
        groups = {"dp": parallel.dp_rank}
        if not parameter.is_distributed:
            groups["grid"] = parallel.ep_rank + parallel.tp_rank
        elif getattr(parameter, "shard_group", None) == "tp":
            groups["ep"] = parallel.ep_rank
        for group, place in groups.items():
            value = parameter.detach().clone() if place == 0 else paddle.zeros_like(parameter)
            parameter.set_value(parallel.all_reduce(value, group))


def _buckets(parameters: list[paddle.Tensor]) -> Iterator[list[paddle.Tensor]]:
    """Groups of one dtype, in order."""
    bucket, elements = [], 0
    for parameter in parameters:
        full = elements + parameter.size > _BUCKET_ELEMENTS
        if bucket and (full or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, elements = [], 0
        bucket.append(parameter)
        elements += parameter.size
    if bucket:
        yield bucket


class ClipGradByGlobalNorm(ClipGradBase):
    r"""Scales all gradients by clip_norm / norm where their global norm is above clip_norm.

    For ``grad_clip=`` of an optimizer, in place of ``paddle.nn.ClipGradByGlobalNorm``, which would take the
    norm of one rank's shards. The norm is the one that a single process with all experts computes:

    .. math::
        norm = \sqrt{\sum_{dense} \|g\|^2 + \sum_{ranks} \sum_{shards} \|g\|^2}

    in float32, over the ranks of the grid, or of the TP group for the shared expert of
    FusedMoE(dispatch="alltoall"), which every EP rank holds. Every rank of the grid clips at the same time
    and by the same factor. Parameters with ``need_clip=False`` are neither counted nor clipped. Pascanu et
    al., "On the difficulty of training recurrent neural networks" (2013).

    Args:
        clip_norm: positive.
        parallel: result of init_distributed.

    Raises:
        ValueError: clip_norm is not positive; at the step, a parameter is sharded by something other than
            FusedMoE, whose ranks are unknown here.
    """

    def __init__(self, clip_norm: float, parallel: ParallelContext):
        super().__init__()
        if not clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, got {clip_norm}")
        self.clip_norm, self.parallel = float(clip_norm), parallel

    def __str__(self) -> str:
        return f"ClipGradByGlobalNorm(clip_norm={self.clip_norm}) over the EP x TP grid"

    @paddle.no_grad()
    def _dygraph_clip(
        self, params_grads: list[tuple[paddle.Tensor, paddle.Tensor | None]]
    ) -> list[tuple[paddle.Tensor, paddle.Tensor | None]]:
        squares = {shard_group: paddle.zeros([1]) for shard_group in ("", "tp", "grid")}
        clipped = [grad is not None and getattr(param, "need_clip", True) for param, grad in params_grads]
        for (parameter, gradient), clips in zip(params_grads, clipped):
            if not clips:
                continue
            group = getattr(parameter, "shard_group", None if parameter.is_distributed else "")
            if group is None:
                raise ValueError(
                    f"the parameter {parameter.name} is sharded (is_distributed), but not by FusedMoE; only"
                    " experts of FusedMoE and replicated parameters can be clipped together"
                )
            squares[group] = squares[group] + gradient.astype("float32").square().sum()
        for group in ("tp", "grid"):
            self.parallel.all_reduce(squares[group], group)
        norm = (squares[""] + squares["tp"] + squares["grid"]).sqrt()
        factor = self.clip_norm / norm.clip(min=self.clip_norm)
        return [
            (parameter, (gradient.astype("float32") * factor).astype(gradient.dtype) if clips else gradient)
            for (parameter, gradient), clips in zip(params_grads, clipped)
        ]
