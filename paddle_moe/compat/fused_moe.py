"""The mixture-of-experts functions that paddle.incubate.nn.functional had in Paddle 3.0 and lost in 3.1.

fused_moe is one call; moe_dispatch, moe_ffn and moe_reduce are the same in three steps, with the
intermediate tensors that the original produced. The activation is SwiGLU (silu of the gate half, times
the up half).
"""

from __future__ import annotations

import paddle

from paddle_moe import functional


def _refuse_quantisation(quant_method: str, **scales: paddle.Tensor | None) -> None:
    if quant_method not in ("None", "none"):
        raise ValueError(
            f"quant_method must be 'None' (this function takes no quantised weights), got {quant_method!r}"
        )
    for name, scale in scales.items():
        if scale is not None:
            raise ValueError(f"{name} must be None (this function takes no quantised weights), got a tensor")


@functional.unified
def _expect(name: str, tensor: paddle.Tensor, sizes: list[int | None], meaning: str) -> None:
    """A ValueError unless `tensor` has these sizes; None, and -1 while a program is built: any."""
    functional.expect_tensors(**{name: tensor})
    shape = list(tensor.shape)
    unequal = [None not in pair and -1 not in pair and pair[0] != pair[1] for pair in zip(shape, sizes)]
    if len(shape) != len(sizes) or any(unequal):
        expected = ", ".join("?" if size in (None, -1) else str(size) for size in sizes)
        raise ValueError(f"{name} must have the shape {meaning} = [{expected}], got {shape}")


def _expect_range(name: str, ids: paddle.Tensor, first: int, end: int) -> None:
    """A ValueError for ids outside a tensor, which Paddle reads; not on a GPU, which would have to wait."""
    if not paddle.in_dynamic_mode() or not ids.place.is_cpu_place() or 0 in ids.shape:
        return
    least, greatest = int(ids.min()), int(ids.max())
    if least < first or greatest >= end:
        raise ValueError(f"{name} must be between {first} and {end - 1}, got {least} to {greatest}")


def _flat_bias(bias: paddle.Tensor | None) -> paddle.Tensor | None:
    """[E, 1, N] or [E, N] as [E, N]."""
    return None if bias is None else bias.reshape([bias.shape[0], bias.shape[-1]])


def _select(
    logits: paddle.Tensor, top_k: int, group_moe: bool, renormalize: bool
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Softmax top-k of logits [T, E]; with group_moe the best of each of top_k groups by its own softmax."""
    if not group_moe:
        return functional.route(logits, top_k, renormalize=renormalize)
    num_experts = logits.shape[1]
    if top_k < 1 or num_experts % top_k:
        raise ValueError(f"moe_topk must divide the number of experts {num_experts}, got {top_k}")
    group_size = num_experts // top_k
    ids, scores = functional.route(logits.reshape([-1, group_size]), 1, renormalize=False)
    first_ids = paddle.arange(0, num_experts, group_size, dtype="int32")
    ids, scores = ids.reshape([-1, top_k]), scores.reshape([-1, top_k])
    # As without groups, a NaN anywhere leaves the token without experts.
    is_nan = (ids < 0).any(axis=1, keepdim=True).expand_as(ids)
    ids = paddle.where(is_nan, paddle.full_like(ids, -1), ids + first_ids)
    scores = paddle.where(is_nan, paddle.zeros_like(scores), scores)
    if renormalize:
        scores = _divided_by_sums(scores)
    return ids, scores


def _divided_by_sums(scales: paddle.Tensor) -> paddle.Tensor:
    """Rows that add up to 0 stay as they are."""
    total = scales.sum(axis=1, keepdim=True)
    return scales / (total + (total == 0).astype(total.dtype))


def fused_moe(
    x: paddle.Tensor,
    gate_weight: paddle.Tensor,
    ffn1_weight: paddle.Tensor,
    ffn2_weight: paddle.Tensor,
    ffn1_bias: paddle.Tensor | None = None,
    ffn1_scale: paddle.Tensor | None = None,
    ffn2_bias: paddle.Tensor | None = None,
    ffn2_scale: paddle.Tensor | None = None,
    quant_method: str = "None",
    moe_topk: int = 2,
    norm_topk_prob: bool = True,
    group_moe: bool = False,
) -> paddle.Tensor:
    """Router and experts in one call.

    Args:
        x: [batch, length, d_model] or [tokens, d_model], fp32, bf16 or fp16.
        gate_weight: [d_model, E] fp32. (The documentation of 3.0 says [batch, length, E]; its kernel read
            this.)
        ffn1_weight: [E, d_model, 2 * d_ffn], gate columns first. ffn2_weight: [E, d_ffn, d_model].
        ffn1_bias: [E, 1, 2 * d_ffn]. ffn2_bias: [E, 1, d_model].
        ffn1_scale, ffn2_scale, quant_method: None, None and "None": this function takes no quantised weights.
        moe_topk: experts per token.
        norm_topk_prob: divide the chosen probabilities by their sum.
        group_moe: split the experts into moe_topk equal groups and take the best of each, scored by a
            softmax within the group.

    Returns:
        The shape and dtype of x.

    Raises:
        ValueError: an argument does not fit or asks for quantised weights.
    """
    _refuse_quantisation(quant_method, ffn1_scale=ffn1_scale, ffn2_scale=ffn2_scale)
    functional.expect_tensors(x=x, gate_weight=gate_weight)
    tokens = x.reshape([-1, x.shape[-1]])
    ids, weights = _select(functional.gate(tokens, gate_weight), moe_topk, group_moe, norm_topk_prob)
    output = functional.mixture_of_experts(
        tokens, ids, weights, ffn1_weight, ffn2_weight, _flat_bias(ffn1_bias), _flat_bias(ffn2_bias)
    )
    return functional.reshape_like(output, x)


def moe_dispatch(
    x: paddle.Tensor,
    gating_output: paddle.Tensor,
    moe_topk: int,
    group_moe: bool = False,
    topk_only_mode: bool = False,
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Chooses experts and copies each token once per expert, sorted by expert.

    Args:
        x: [T, d_model]. gating_output: [T, E] fp32 logits, or probabilities with topk_only_mode.
        moe_topk: K. group_moe: as in fused_moe, ignored with topk_only_mode.
        topk_only_mode: gating_output went through a softmax already.

    Returns:
        permute_input [T * K, d_model];
        token_nums_per_expert [E] int64, in spite of its name the running total: rows of experts 0..e;
        permute_indices_per_token [K, T] int32, the row of permute_input for slot k of token t;
        expert_scales_float [T, K] fp32, not renormalised; top_k_indices [T, K] int32.
        A token whose gating_output holds a NaN goes to expert 0 with the scale 0.

    Raises:
        ValueError: an argument does not fit.
    """
    _expect("gating_output", gating_output, [None, None], "[T, E]")
    _expect("x", x, [gating_output.shape[0], None], "[T, d_model]")
    num_tokens, num_experts = gating_output.shape
    if topk_only_mode:
        ids, _ = functional.route(gating_output, moe_topk, scoring="softmax_topk")
        scales = paddle.take_along_axis(gating_output, paddle.clip(ids, min=0), axis=1)
        scales = paddle.where(ids < 0, paddle.zeros_like(scales), scales)
    else:
        ids, scales = _select(gating_output, moe_topk, group_moe, renormalize=False)
    ids = paddle.clip(ids, min=0)
    flat_ids = ids.flatten()
    order = paddle.argsort(flat_ids, stable=True)
    totals = paddle.searchsorted(flat_ids[order], paddle.arange(num_experts, dtype="int32"), right=True)
    rows = paddle.argsort(order).reshape([num_tokens, moe_topk]).transpose([1, 0]).astype("int32")
    return x[order // moe_topk], totals, rows, scales, ids


def moe_ffn(
    permute_input: paddle.Tensor,
    token_nums_per_expert: paddle.Tensor,
    ffn1_weight: paddle.Tensor,
    ffn2_weight: paddle.Tensor,
    ffn1_bias: paddle.Tensor | None = None,
    ffn1_scale: paddle.Tensor | None = None,
    ffn2_scale: paddle.Tensor | None = None,
    quant_method: str = "None",
) -> paddle.Tensor:
    """Applies to each row the expert it was sorted to, without the bias of the second layer.

    Args:
        permute_input: [R, d_model]. token_nums_per_expert: [E] running totals, both from moe_dispatch.
        The others: as in fused_moe.

    Returns:
        [R, d_model] in the dtype of permute_input; rows after the last total are zero.

    Raises:
        ValueError: an argument does not fit or asks for quantised weights.
    """
    _refuse_quantisation(quant_method, ffn1_scale=ffn1_scale, ffn2_scale=ffn2_scale)
    _expect("permute_input", permute_input, [None, None], "[R, d_model]")
    num_experts = len(ffn1_weight) if isinstance(ffn1_weight, (list, tuple)) else ffn1_weight.shape[0]
    _expect("token_nums_per_expert", token_nums_per_expert, [num_experts], "[E]")
    num_rows = permute_input.shape[0]
    ids = paddle.searchsorted(token_nums_per_expert, paddle.arange(num_rows, dtype="int64"), right=True)
    return functional.mixture_of_experts(
        permute_input,
        ids.reshape([num_rows, 1]),
        paddle.ones([num_rows, 1], dtype="float32"),
        ffn1_weight,
        ffn2_weight,
        _flat_bias(ffn1_bias),
    )


def moe_reduce(
    ffn_out: paddle.Tensor,
    expert_scales_float: paddle.Tensor,
    permute_indices_per_token: paddle.Tensor,
    top_k_indices: paddle.Tensor,
    ffn2_bias: paddle.Tensor | None = None,
    norm_topk_prob: bool = False,
    routed_scaling_factor: float = 1.0,
) -> paddle.Tensor:
    """Per token t, the sum over k of scale[t, k] * (ffn_out[row of (k, t)] + ffn2_bias[expert of (t, k)]).

    Args:
        ffn_out: [T * K, d_model] from moe_ffn.
        expert_scales_float: [T, K] or [T, K, 1, 1] fp32. permute_indices_per_token: [K, T].
            top_k_indices: [T, K].
        ffn2_bias: [E, 1, d_model].
        norm_topk_prob: divide by the sum of the scales, unless that is 0.
        routed_scaling_factor: multiplies the result.

    Returns:
        [T, d_model] in the dtype of ffn_out, summed in fp32.

    Raises:
        ValueError: an argument does not fit.
    """
    _expect("permute_indices_per_token", permute_indices_per_token, [None, None], "[K, T]")
    top_k, num_tokens = permute_indices_per_token.shape
    _expect("ffn_out", ffn_out, [None, None], "[T * K, d_model]")
    _expect("top_k_indices", top_k_indices, [num_tokens, top_k], "[T, K]")
    functional.expect_tensors(expert_scales_float=expert_scales_float)
    ones = [1] * (len(expert_scales_float.shape) - 2)
    _expect("expert_scales_float", expert_scales_float, [num_tokens, top_k, *ones], "[T, K] or [T, K, 1, 1]")
    _expect_range("permute_indices_per_token", permute_indices_per_token, 0, ffn_out.shape[0])
    rows = permute_indices_per_token.transpose([1, 0]).flatten()
    outputs = ffn_out[rows].astype("float32")
    if ffn2_bias is not None:
        _expect_range("top_k_indices", top_k_indices, -1, ffn2_bias.shape[0])  # -1: none, of the scale 0
        bias = _flat_bias(ffn2_bias)[top_k_indices.flatten()]
        outputs = outputs + bias.astype("float32")
    scales = expert_scales_float.reshape([num_tokens, top_k])
    if norm_topk_prob:
        scales = _divided_by_sums(scales)
    weighted = outputs.reshape([num_tokens, top_k, ffn_out.shape[-1]]) * scales.unsqueeze(-1)
    return (weighted.sum(axis=1) * routed_scaling_factor).astype(ffn_out.dtype)
