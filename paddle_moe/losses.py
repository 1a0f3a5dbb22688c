"""Auxiliary losses of the router. Add them to the loss of the model, each times a small weight.

T tokens, E experts over all ranks, K experts per token. All of them are float32 scalars, computed in float32
under paddle.amp.auto_cast too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import paddle
from paddle.autograd import PyLayer
from paddle.nn import functional as F

from paddle_moe._options import at_least, one_of
from paddle_moe.collectives import sum_over
from paddle_moe.functional import expect_tensors, without_autocast
from paddle_moe.policies import count_ids

if TYPE_CHECKING:
    from paddle_moe.distributed import ParallelContext

__all__ = ["load_balancing_loss", "router_z_loss"]


@without_autocast
def load_balancing_loss(
    logits: paddle.Tensor,
    routing_table: paddle.Tensor,
    *,
    scoring: str = "softmax",
    sequence_length: int | None = None,
    parallel: ParallelContext | None = None,
    replicas: Sequence[str] = ("dp",),
) -> paddle.Tensor:
    r"""Is least, 1, when every expert gets the same share of the choices and of the probability.

    .. math::
        L = E \sum_{e=1}^{E} f_e P_e, \quad f_e = \frac{1}{KT} \#\{(t, k): routing\_table_{tk} = e\}, \quad
        P_e = \frac{1}{T} \sum_t p_{te}

    f has no gradient. For K = 1 it is the loss of Fedus et al., "Switch Transformers" (2021), equations 4 to
    6, which simplifies that of Lepikhin et al., "GShard" (2020). p is the softmax of the logits. With
    ``scoring="sigmoid"`` it is the sigmoid of a token's logits divided by their sum, and with
    ``sequence_length`` the loss is computed for each sequence and averaged: the sequence-wise loss of
    DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), equations 17 to 20.

    With ``parallel``, f and P are those of the global batch, the tokens of all data-parallel replicas (Qiu et
    al., "Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized
    Mixture-of-Expert Models", 2025). Every replica then returns the same value, and the average of the
    gradients of the replicas is the gradient of that value, also when they have different numbers of tokens.

    Args:
        logits: [T, E] float32, of the router.
        routing_table: [T, K], int32 or int64, before any drop; ids outside 0 .. E - 1 count for no expert.
        scoring: that of the router: "softmax", "sigmoid" or "softmax_topk" (as "softmax" here).
        sequence_length: tokens per sequence, consecutive rows of ``logits``, in a graph also an integer
            tensor; None: one balance for all.
        parallel: balance over all replicas; all of them call this at the same time.
        replicas: the groups of ``parallel`` whose ranks hold different tokens: ("dp", "ep") where tokens live
            on one EP rank each.

    Returns:
        Scalar float32; 0 without tokens.

    Raises:
        ValueError: an argument has a wrong shape, dtype, value or combination.
    """
    one_of("softmax", "sigmoid", "softmax_topk")("scoring", scoring)
    if sequence_length is not None and parallel is not None:
        raise ValueError(
            "sequence_length balances within a sequence and parallel over all replicas; pass at most one"
        )
    expect_tensors(logits=logits, routing_table=routing_table)
    fit = len(logits.shape) == len(routing_table.shape) == 2 and logits.shape[0] == routing_table.shape[0]
    if not fit or routing_table.shape[1] == 0:
        raise ValueError(
            "logits and routing_table must have the shapes [T, E] and [T, K] with K at least 1, "
            f"got {list(logits.shape)} and {list(routing_table.shape)}"
        )
    num_experts, top_k = logits.shape[1], routing_table.shape[1]
    if sequence_length is not None:
        known = not isinstance(sequence_length, (paddle.static.Variable, paddle.pir.Value))
        sequence_length = at_least(1)("sequence_length", sequence_length) if known else sequence_length
        if known and logits.shape[0] >= 0 and logits.shape[0] % sequence_length:
            raise ValueError(
                "sequence_length must divide the number of tokens, "
                f"got {sequence_length} for {logits.shape[0]} tokens"
            )
    logits = logits.astype("float32")
    if scoring == "sigmoid":
        logits = F.log_sigmoid(logits)  # sigmoids themselves may all be 0, and have no quotient
    probabilities = F.softmax(logits, axis=-1)

    if sequence_length is None:
        choices = count_ids(routing_table, num_experts).astype("float32")
        probability = probabilities.sum(axis=0)
        num_tokens = paddle.ones_like(probabilities[:, :1]).sum(axis=0)
        if parallel is not None and any(parallel.size(group) > 1 for group in replicas):
            parts = paddle.concat([choices, probability, num_tokens])
            totals = _SumOverReplicas.apply(parts, parallel, replicas)
            choices, probability, num_tokens = totals.split([num_experts, num_experts, 1])
    else:
        rows = routing_table.reshape([-1, sequence_length * top_k])
        choices = count_ids(rows, num_experts, per_row=True).astype("float32")
        by_sequence = probabilities.reshape([-1, sequence_length, num_experts])
        probability = by_sequence.sum(axis=1)
        num_tokens = paddle.ones_like(by_sequence[:1, :, 0]).sum()
    num_tokens = num_tokens.clip(min=1)
    loss = num_experts / top_k * (choices * probability).sum(axis=-1) / num_tokens**2
    return loss.sum() / paddle.ones_like(loss).sum().clip(min=1)


class _SumOverReplicas(PyLayer):
    """The sum of a tensor over the data-parallel replicas.

    Every replica computes the same loss from the sum, and gradients are averaged over the replicas; so that
    each part counts once, its gradient is multiplied by their number.
    """

    @staticmethod
    def forward(
        ctx, part: paddle.Tensor, parallel: ParallelContext, replicas: Sequence[str]
    ) -> paddle.Tensor:
        ctx.num_replicas = math.prod(parallel.size(group) for group in replicas)
        return sum_over(part.clone(), parallel, replicas)

    @staticmethod
    def backward(ctx, gradient: paddle.Tensor) -> paddle.Tensor:
        return gradient * ctx.num_replicas


@without_autocast
def router_z_loss(logits: paddle.Tensor) -> paddle.Tensor:
    r"""Keeps the logits small, where float32 and half precision are precise.

    .. math::
        L = \frac{1}{T} \sum_t \Big(\log \sum_e \exp(logits_{te})\Big)^2

    Zoph et al., "ST-MoE: Designing Stable and Transferable Sparse Expert Models" (2022), equation 5.

    Args:
        logits: [T, E] float32, of the router.

    Returns:
        Scalar float32; 0 without tokens.
    """
    expect_tensors(logits=logits)
    squares = paddle.logsumexp(logits.astype("float32"), axis=-1) ** 2
    return squares.sum() / paddle.ones_like(squares).sum().clip(min=1)
