"""The mixture-of-experts operators of `paddlenlp_ops` for Intel Gaudi, with their positional signatures.

Code written for them runs on the CPU after

    import paddle_moe.compat.paddlenlp_ops as paddlenlp_ops
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

import paddle

from paddle_moe import functional

Weights = Union[Sequence[paddle.Tensor], paddle.Tensor]


def mixture_of_experts(
    hidden_states: paddle.Tensor,
    routing_table: paddle.Tensor,
    router_weights: paddle.Tensor,
    gate_up_weights: Weights,
    down_weights: Weights,
    permuted_weights: bool,
    activation: str,
    experts_min: int,
    experts_max: int,
    measurement_mode: bool,
    chunk_size: int = 0,
) -> tuple[paddle.Tensor, paddle.Tensor | None]:
    """paddle_moe.mixture_of_experts in the form of the Gaudi operator, which always returns a pair.

    Args:
        hidden_states: [..., H]. routing_table and router_weights: [T, K], T being the product of the
            leading dimensions.
        gate_up_weights: E_l tensors [H, 2I] (gate and up side by side), or 2*E_l tensors [H, I] (all
            gates, then all ups), or one stacked tensor.
        down_weights: E_l tensors [I, H], or one stacked tensor.
        The others: as in paddle_moe.mixture_of_experts.

    Returns:
        (final_hidden_states [..., H], amax_per_expert [E_l] fp32), the latter None without measurement_mode.

    Raises:
        ValueError: an argument does not fit.
    """
    functional.expect_tensors(hidden_states=hidden_states)
    result = functional.mixture_of_experts(
        hidden_states.reshape([-1, hidden_states.shape[-1]]),
        routing_table,
        router_weights,
        gate_up_weights,
        down_weights,
        permuted_weights=permuted_weights,
        activation=activation,
        experts_min=experts_min,
        experts_max=experts_max,
        measurement_mode=measurement_mode,
        chunk_size=chunk_size,
    )
    output, amax = result if measurement_mode else (result, None)
    return functional.reshape_like(output, hidden_states), amax


def fused_gate_moe(
    hidden_states: paddle.Tensor,
    gate_weights: paddle.Tensor,
    gate_correction_bias: paddle.Tensor | None,
    gate_up_weights: Weights,
    down_weights: Weights,
    top_k: int,
    norm_topk_prob: bool,
    permuted_weights: bool,
    activation: str,
    experts_min: int,
    experts_max: int,
    chunk_size: int = 0,
) -> paddle.Tensor:
    """Softmax router and experts in one call: the Gaudi operator that takes the router's weight.

    Experts are chosen by softmax score plus gate_correction_bias and weighted by the score alone, divided
    by the sum over the chosen with norm_topk_prob.

    Args:
        hidden_states: [..., H]. gate_weights: [H, E] over all experts of all ranks, fp32.
        gate_correction_bias: None, or E values fp32 in any shape ([1, E] and [E] occur).
        gate_up_weights, down_weights: as in mixture_of_experts above, for experts_min..experts_max.

    Returns:
        final_hidden_states [..., H], the partial sum of experts_min..experts_max (inclusive).

    Raises:
        ValueError: an argument does not fit.
    """
    functional.expect_tensors(hidden_states=hidden_states)
    output = functional.fused_gate_moe(
        hidden_states.reshape([-1, hidden_states.shape[-1]]),
        gate_weights,
        gate_up_weights,
        down_weights,
        top_k,
        correction_bias=None if gate_correction_bias is None else gate_correction_bias.flatten(),
        renormalize=norm_topk_prob,
        permuted_weights=permuted_weights,
        activation=activation,
        experts_min=experts_min,
        experts_max=experts_max,
        chunk_size=chunk_size,
    )
    return functional.reshape_like(output, hidden_states)
