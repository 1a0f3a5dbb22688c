"""What an optimizer step needs on EP x TP x DP ranks: gradients averaged over replicas, clipped by a norm
that counts every parameter once, and a step that all ranks take or none.

Dense parameters are the same on every rank, and so are their gradients within a grid. The parameters of the
experts are sharded over the grid (FusedMoE sets `is_distributed` and `expert` on them) and the same at the
same place of every grid. So the data-parallel group is the right one for both kinds.

With FusedMoE(dispatch="alltoall") the ranks of an EP group hold different tokens: for dense parameters they
are further replicas. The gradient of an expert is complete then, but it is that of the sum of their losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import paddle
from paddle.nn.clip import ClipGradBase

from paddle_moe._options import expect_parallel, positive
from paddle_moe.collectives import sum_over

if TYPE_CHECKING:
    from paddle_moe.distributed import ParallelContext

    Gradients = list[tuple[paddle.Tensor, paddle.Tensor | None]]  # each parameter with its gradient

__all__ = [
    "ClipGradByGlobalNorm",
    "agree_on_overflow",
    "average_gradients",
    "broadcast_parameters",
    "check_optimizer",
    "clip_gradients",
]

_BUCKET_ELEMENTS = 2**23  # 32 MB in float32: large enough for the network, small beside the gradients


@paddle.no_grad()
def average_gradients(
    parameters: Iterable[paddle.Tensor], parallel: ParallelContext, *, replicas: Sequence[str] = ("dp",)
) -> None:
    """Replaces the gradients by those of the average of the losses of all replicas.

    Call it once per step, after the last backward of gradient accumulation and before clipping and the
    optimizer, on every rank with the parameters in the same order. A parameter that got a gradient on some
    replicas counts with zero on the others; one that got none anywhere keeps none. float16 and bfloat16 are
    summed in float32, and float32 gradients of such parameters stay float32: those of master_grad, and the
    main_grad of fleet's MixPrecisionLayer, which is averaged in place of grad.

    With paddle.DataParallel, which leaves sharded experts alone, call it for those that have `no_sync`.

    Args:
        replicas: the groups of `parallel` whose ranks hold different tokens: ("dp", "ep") with
            FusedMoE(dispatch="alltoall").

    Raises:
        ValueError: a gradient is sparse, or an unknown group.
    """
    num_replicas = math.prod(expect_parallel(parallel).size(group) for group in replicas)
    if num_replicas == 1:
        return
    trained = [parameter for parameter in _distinct(parameters) if not parameter.stop_gradient]
    for parameter in trained:
        _expect_dense(parameter, _gradient_of(parameter))
    for experts in (False, True):
        of_kind = [parameter for parameter in trained if getattr(parameter, "expert", False) == experts]
        # Another EP rank holds other experts.
        groups = [group for group in replicas if not (experts and group == "ep")]
        # Bytes of an element, 0 without a gradient: a replica without one gets that of the others' dtype.
        own = [_gradient_of(parameter) for parameter in of_kind]
        widths = paddle.to_tensor([0 if grad is None else grad.element_size() for grad in own], "int32")
        for group in groups:
            parallel.all_reduce(widths, group, "max")
        width_of = {id(p): width for p, width in zip(of_kind, widths.tolist()) if width and p.size}
        for bucket in _buckets([parameter for parameter in of_kind if id(parameter) in width_of]):
            wide = "float64" if bucket[0].dtype == paddle.float64 else "float32"
            gradients = [paddle.zeros_like(p) if (grad := _gradient_of(p)) is None else grad for p in bucket]
            flat = paddle.concat([gradient.flatten().astype(wide) for gradient in gradients])
            averages = (sum_over(flat, parallel, groups) / num_replicas).split([p.size for p in bucket])
            for parameter, average in zip(bucket, averages):
                narrow = width_of[id(parameter)] == parameter.element_size()
                average = average.reshape(parameter.shape)
                _set_gradient(parameter, average.astype(parameter.dtype) if narrow else average)


def _distinct(parameters: Iterable[paddle.Tensor]) -> list[paddle.Tensor]:
    """Each once: layers that share a weight have it twice between them."""
    return list({id(parameter): parameter for parameter in parameters}.values())


def _gradient_of(parameter: paddle.Tensor) -> paddle.Tensor | None:
    return parameter.main_grad if hasattr(parameter, "main_grad") else parameter.grad


def _set_gradient(parameter: paddle.Tensor, gradient: paddle.Tensor) -> None:
    if getattr(parameter, "main_grad", None) is not None:  # it may be a part of a buffer of fleet's
        paddle.assign(gradient, output=parameter.main_grad)
    else:
        setattr(parameter, "main_grad" if hasattr(parameter, "main_grad") else "grad", gradient)


@paddle.no_grad()
def broadcast_parameters(parameters: Iterable[paddle.Tensor], parallel: ParallelContext) -> None:
    """Gives every rank the same dense parameters, and every replica the same shards of the experts.

    They are those of the first grid, and for dense parameters of its first rank. Call it on every rank, with
    the parameters in the same order, where layers may have started from different random numbers.
    """
    expect_parallel(parallel)
    for parameter in parameters:
        groups = {"dp": parallel.dp_rank}
        # What is cut while its model is still being built is not yet is_distributed.
        shard_group = getattr(parameter, "shard_group", "grid" if parameter.is_distributed else "")
        if not shard_group:
            groups["grid"] = parallel.ep_rank + parallel.tp_rank
        elif shard_group == "tp":
            groups["ep"] = parallel.ep_rank
        for group, place in groups.items():
            value = parameter.detach().clone() if place == 0 else paddle.zeros_like(parameter)
            parameter.set_value(parallel.all_reduce(value, group))


def _expect_dense(parameter: paddle.Tensor, gradient: paddle.Tensor | None) -> None:
    if gradient is not None and gradient.is_selected_rows():
        raise ValueError(f"parameters: the gradient of {parameter.name} is sparse, which is not supported")


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
        clip_norm: positive; inf clips nothing.
        parallel: result of init_distributed.

    Raises:
        ValueError: clip_norm is not positive, or parallel no context; at the step, a parameter is sharded by
            something other than FusedMoE, whose ranks are unknown here.
    """

    def __init__(self, clip_norm: float, parallel: ParallelContext):
        super().__init__()
        self.clip_norm, self.parallel = positive("clip_norm", clip_norm), expect_parallel(parallel)

    def __str__(self) -> str:
        return f"ClipGradByGlobalNorm(clip_norm={self.clip_norm}) over the EP x TP grid"

    def _dygraph_clip(self, params_grads: Gradients) -> Gradients:
        return _clipped(params_grads, self.clip_norm, self.parallel)[0]


def clip_gradients(
    parameters: Iterable[paddle.Tensor], clip_norm: float, parallel: ParallelContext
) -> paddle.Tensor:
    """What ClipGradByGlobalNorm does, on the gradients of `parameters` at once: for several optimizers.

    An optimizer clips what it has itself. Where experts and dense parameters have optimizers of their own, or
    each rank steps a part of the dense parameters (ZeRO), make them without grad_clip. Call this after
    average_gradients and before their step, on every rank.

    Args:
        parameters: all of the model. clip_norm, parallel: as in ClipGradByGlobalNorm. With inf the norm is
            all that there is to get.

    Returns:
        The norm before, scalar float32, the same on every rank of a grid.

    Raises:
        ValueError: as ClipGradByGlobalNorm.
    """
    params_grads = [(parameter, _gradient_of(parameter)) for parameter in _distinct(parameters)]
    clipped, norm = _clipped(params_grads, positive("clip_norm", clip_norm), expect_parallel(parallel))
    for parameter, gradient in clipped:
        if gradient is not None:
            _set_gradient(parameter, gradient)
    return norm


@paddle.no_grad()
def _clipped(
    params_grads: Gradients, clip_norm: float, parallel: ParallelContext
) -> tuple[Gradients, paddle.Tensor]:
    """(the same with gradients that are scaled, their norm before, a scalar)"""
    squares = {shard_group: paddle.zeros([1], "float32") for shard_group in ("", "tp", "grid")}
    counted = [grad is not None and getattr(param, "need_clip", True) for param, grad in params_grads]
    for (parameter, gradient), counts in zip(params_grads, counted):
        if not counts:
            continue
        _expect_dense(parameter, gradient)
        group = getattr(parameter, "shard_group", None if parameter.is_distributed else "")
        if group is None:
            raise ValueError(
                f"the parameter {parameter.name} is sharded (is_distributed), but not by FusedMoE; only"
                " experts of FusedMoE and replicated parameters can be clipped together"
            )
        squares[group] = squares[group] + gradient.astype("float32").square().sum()
    for group in ("tp", "grid"):
        parallel.all_reduce(squares[group], group)
    norm = (squares[""] + squares["tp"] + squares["grid"]).sqrt().reshape([])
    if clip_norm == math.inf:  # inf / inf is no factor
        return params_grads, norm
    factor = (clip_norm / norm).clip(max=1.0)
    clipped = [
        (parameter, _scaled(gradient, factor) if counts else gradient)
        for (parameter, gradient), counts in zip(params_grads, counted)
    ]
    return clipped, norm


def _scaled(gradient: paddle.Tensor, factor: paddle.Tensor) -> paddle.Tensor:
    wide = "float64" if gradient.dtype == paddle.float64 else "float32"
    return (gradient.astype(wide) * factor.astype(wide)).astype(gradient.dtype)


def parameters_of(optimizer: Any) -> list[paddle.Tensor]:
    """Those of an optimizer, also where it has groups of them; with fleet's sharding, those of all ranks."""
    names = ("_origin_parameter_list", "_local_params", "_parameter_list")
    entries = next(filter(None, (getattr(optimizer, name, None) for name in names)), [])
    lists = [entry["params"] if isinstance(entry, dict) else [entry] for entry in entries]
    return [parameter for part in lists for parameter in part]


def check_optimizer(optimizer: Any, parallel: ParallelContext) -> None:
    """Raises where an optimizer would take the shards of different experts for copies of the same parameter.

    Paddle's own wrappers do not look at the flags of the parameters: they broadcast one rank's shard to all,
    or clip each rank by another norm, and training goes on with wrong weights. Call it before the first step,
    on the optimizer with all of its wrappers.

    Args:
        optimizer: of paddle.optimizer, or from fleet.distributed_optimizer or group_sharded_parallel.

    Raises:
        ValueError: it names the parameter and what to do.
    """
    expect_parallel(parallel)
    wrappers = _with_what_it_wraps(optimizer)
    shards = [parameter for parameter in parameters_of(optimizer) if hasattr(parameter, "shard_group")]
    sharding = {}
    for one in wrappers:
        kind = type(one).__name__
        if kind.startswith("DygraphSharding"):
            sharding[kind] = one._hcg.get_sharding_parallel_group().ranks
        elif kind.startswith("GroupSharded"):
            sharding[kind] = one._group.ranks
    joined = dict(sharding)
    if vars(optimizer).get("_dp_enable"):  # fleet's, where it averages gradients itself
        joined[type(optimizer).__name__] = optimizer._hcg.get_data_parallel_group().ranks
    for kind, ranks in joined.items():
        if shards and not set(ranks) <= set(parallel.dp_group.ranks):
            raise ValueError(
                f"optimizer: {kind} takes the parameter {shards[0].name} for the same one on the ranks"
                f" {list(ranks)}, which hold shards of different experts; give it the parameters without"
                " is_distributed, and the others an optimizer of their own"
            )
    for clip in _clips_of(wrappers[-1]):
        kind = type(clip).__name__
        if isinstance(clip, ClipGradByGlobalNorm) and sharding:
            raise ValueError(
                f"optimizer: grad_clip, {clip}, sees other parameters on each rank of {next(iter(sharding))},"
                " and the ranks would clip by different norms; make the optimizer without grad_clip, and call"
                " paddle_moe.clip_gradients before its step"
            )
        of_paddle = isinstance(clip, paddle.nn.ClipGradByGlobalNorm) or kind == "GroupShardedClipGrad"
        if kind == "HybridParallelClipGrad":  # which adds up the shards of fleet's model-parallel group
            of_paddle = clip._hcg.get_model_parallel_group().ranks != parallel.grid_ranks
        if shards and of_paddle:
            raise ValueError(
                f"optimizer: grad_clip, {kind} of Paddle, takes the norm of what one rank holds, but"
                f" {shards[0].name} is a shard of the experts, and the ranks would clip by different norms;"
                " pass grad_clip=paddle_moe.ClipGradByGlobalNorm(clip_norm, parallel)"
            )


def _with_what_it_wraps(optimizer: Any) -> list[Any]:
    """The optimizer, what that wraps, and so on to the optimizer of paddle.optimizer."""
    found = [optimizer]
    while True:  # not getattr: the wrappers pass on what they do not have
        inner = vars(found[-1]).get("_inner_opt") or vars(found[-1]).get("_optim")
        if inner is None:
            return found
        found.append(inner)


def _clips_of(optimizer: paddle.optimizer.Optimizer) -> list[Any]:
    groups = [group for group in optimizer._param_groups or [] if isinstance(group, dict)]
    return [optimizer._grad_clip, *[group.get("grad_clip") for group in groups]]


def agree_on_overflow(scaler: paddle.amp.GradScaler, parallel: ParallelContext) -> paddle.amp.GradScaler:
    """Has all ranks skip a step, and lower the scale, when the gradients of one of them are not finite.

    A GradScaler looks at the shards of its own rank alone, and would skip a step that the other ranks take.
    With several optimizers, call ``scaler.unscale_`` for all of them before the first ``scaler.step``: they
    then skip together too.

    Args:
        scaler: changed in place. All ranks call its step and unscale_ together.

    Returns:
        scaler.
    """
    expect_parallel(parallel)
    unscale = scaler._unscale

    def unscale_everywhere(optimizer: Any) -> None:
        if not scaler.is_enable():
            return
        others = any(key != id(optimizer) for key in scaler._optimizer_states)  # since the last update
        before = scaler._found_inf.astype("int32") if others else 0
        unscale(optimizer)
        found = scaler._found_inf.astype("int32") + before
        for group in ("grid", "dp"):
            parallel.all_reduce(found, group, "max")
        scaler._found_inf = found.astype("bool")

    scaler._unscale = scaler.unscale_ = unscale_everywhere
    return scaler
