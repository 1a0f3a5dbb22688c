"""Mixture-of-experts blocks of the model families, written out densely from their papers.

Every expert computes every token; weights of experts that were not chosen are zero. Plain Paddle operations
in float32, so that gradients come from Paddle's own autograd. Nothing of paddle_moe is used.
"""

from __future__ import annotations

import types

import numpy as np
import paddle
from paddle.nn import functional as F


def chosen(scores: paddle.Tensor, top_k: int) -> paddle.Tensor:
    """1 for the top_k largest scores of each row [T, E], the first of equal ones, else 0."""
    values = scores.numpy()
    mask = np.zeros_like(values)
    np.put_along_axis(mask, np.argsort(-values, axis=1, kind="stable")[:, :top_k], 1, axis=1)
    return paddle.to_tensor(mask)


def keep_groups(scores: paddle.Tensor, num_groups: int, kept: int, best: int) -> paddle.Tensor:
    """scores [T, E] with those outside the `kept` best groups set to 0; a group counts its `best` largest."""
    groups = scores.reshape([len(scores), num_groups, -1])
    totals = paddle.sort(groups, axis=-1, descending=True)[:, :, :best].sum(axis=-1)
    return (groups * chosen(totals, kept).unsqueeze(-1)).reshape(scores.shape)


def gated(x, gate, up, down, act=F.silu):
    return (act(x @ gate) * (x @ up)) @ down


def projections(expert) -> list[paddle.Tensor]:
    """gate [H, I], up [H, I], down [I, H] of an expert, whatever its layers are called."""
    layers = dict(expert.named_parameters())
    fused = layers.get("up_gate_proj.weight", layers.get("gate_up_fused_proj.weight"))
    if fused is not None:
        return [*fused.chunk(2, axis=-1), layers["down_proj.weight"]]
    names = ("w1", "w3", "w2") if "w1.weight" in layers else ("gate_proj", "up_proj", "down_proj")
    return [layers[f"{name}.weight"] for name in names]


def all_experts(block) -> list[list[paddle.Tensor]]:
    if hasattr(block.experts, "gate_up_proj"):
        stacked = zip(block.experts.gate_up_proj, block.experts.down_proj)
        return [[*gate_up.chunk(2, axis=-1), down] for gate_up, down in stacked]
    return [projections(expert) for expert in block.experts]


def mixture(x: paddle.Tensor, weights: paddle.Tensor, experts) -> paddle.Tensor:
    """sum over e of weights[:, e] * expert_e(x), for x [T, H] and weights [T, E]."""
    return sum(weights[:, e : e + 1] * gated(x, *expert) for e, expert in enumerate(experts))


def balance(probabilities: paddle.Tensor, mask: paddle.Tensor) -> paddle.Tensor:
    """E * sum over e of (share of the choices) * (mean probability), over the rows of [T, E]."""
    shares = mask.sum(axis=0) / mask.sum()
    return mask.shape[1] * (shares * probabilities.mean(axis=0)).sum()


# ---------------------------------------------------------------- PaddleNLP


def mixtral(block, hidden_states):
    x = hidden_states.reshape([-1, hidden_states.shape[-1]])
    logits = x @ block.gate.weight
    scores = F.softmax(logits, axis=-1)
    weights = scores * chosen(scores, block.top_k)
    out = mixture(x, weights / weights.sum(axis=-1, keepdim=True), all_experts(block))
    return out.reshape(hidden_states.shape), logits


def jamba(block, hidden_states):
    x = hidden_states.reshape([-1, hidden_states.shape[-1]])
    logits = x @ block.router.weight
    scores = F.softmax(logits, axis=-1)
    out = mixture(x, scores * chosen(scores, block.top_k), all_experts(block))
    return out.reshape(hidden_states.shape), logits


def qwen2_moe(block, hidden_states):
    x = hidden_states.reshape([-1, hidden_states.shape[-1]])
    logits = x @ block.gate.weight
    scores = F.softmax(logits, axis=-1)
    weights = scores * chosen(scores, block.top_k)
    if block.norm_topk_prob:
        weights = weights / weights.sum(axis=-1, keepdim=True)
    out = mixture(x, weights, all_experts(block))
    out = out + F.sigmoid(x @ block.shared_expert_gate.weight) * gated(x, *projections(block.shared_expert))
    return out.reshape(hidden_states.shape), logits


def deepseek(block, hidden_states):
    router, config = block.gate, block.config
    x = hidden_states.reshape([-1, hidden_states.shape[-1]])
    logits = x @ router.weight
    if config.scoring_func == "sigmoid":
        scores = F.sigmoid(logits)
        probabilities = scores / scores.sum(axis=-1, keepdim=True)
    else:
        scores = probabilities = F.softmax(logits, axis=-1)
    selection = scores
    if config.topk_method == "noaux_tc":
        selection = scores + router.e_score_correction_bias
        selection = keep_groups(selection, config.n_group, config.topk_group, best=2)
    elif config.topk_method == "group_limited_greedy":
        selection = keep_groups(selection, config.n_group, config.topk_group, best=1)
    mask = chosen(selection, config.num_experts_per_tok)
    weights = scores * mask
    if config.norm_topk_prob:
        weights = weights / weights.sum(axis=-1, keepdim=True)
    out = mixture(x, weights * config.routed_scaling_factor, all_experts(block))
    if config.n_shared_experts:
        out = out + gated(x, *projections(block.shared_experts))
    if config.seq_aux:
        sequences = zip(
            probabilities.reshape([*hidden_states.shape[:2], -1]),
            mask.reshape([*hidden_states.shape[:2], -1]),
        )
        losses = [balance(*sequence) for sequence in sequences]
    else:
        losses = [balance(probabilities, mask)]
    block.auxiliary_loss = config.aux_loss_alpha * sum(losses) / len(losses)
    return out.reshape(hidden_states.shape)


# ---------------------------------------------------------------- PaddleFormers


def qwen3_moe(block, hidden_states):
    x = hidden_states.reshape([-1, hidden_states.shape[-1]])
    logits = x @ block.gate.weight
    scores = F.softmax(logits, axis=-1)
    weights = scores * chosen(scores, block.top_k)
    if block.norm_topk_prob:
        weights = weights / weights.sum(axis=-1, keepdim=True)
    return mixture(x, weights, all_experts(block)).reshape(hidden_states.shape), logits


def deepseek_v3(block, hidden_states):
    router = block.gate
    x = hidden_states.reshape([-1, hidden_states.shape[-1]])
    transposed = router.weight.shape[0] != x.shape[1]  # [E, H] in GLM-4-MoE
    scores = F.sigmoid(x @ (router.weight.t() if transposed else router.weight))
    selection = scores + router.e_score_correction_bias
    selection = keep_groups(selection, router.n_group, router.topk_group, best=2)
    weights = scores * chosen(selection, router.top_k)
    if router.norm_topk_prob:
        weights = weights / weights.sum(axis=-1, keepdim=True)
    out = mixture(x, weights * router.routed_scaling_factor, all_experts(block))
    return (out + gated(x, *projections(block.shared_experts))).reshape(hidden_states.shape)


def gpt_oss(block, hidden_states):
    router, experts = block.router, block.experts
    x = hidden_states.reshape([-1, hidden_states.shape[-1]])
    logits = x @ router.weight.t() + router.bias
    mask = chosen(logits, router.top_k)
    exponentials = (logits - logits.max(axis=-1, keepdim=True)).exp() * mask
    weights = exponentials / exponentials.sum(axis=-1, keepdim=True)
    out = paddle.zeros_like(x)
    for e in range(experts.num_experts):
        both = x @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
        gate, up = both[:, 0::2].clip(max=7.0), both[:, 1::2].clip(-7.0, 7.0)
        inner = (up + 1) * gate * F.sigmoid(1.702 * gate)
        out = out + weights[:, e : e + 1] * (inner @ experts.down_proj[e] + experts.down_proj_bias[e])
    return out.reshape(hidden_states.shape), weights


def ernie_45_moe(block, hidden_states):
    config = block.config
    x = hidden_states.reshape([-1, hidden_states.shape[-1]])
    logits = x @ block.gate.weight
    scores = F.softmax(logits, axis=-1)
    weights = scores * chosen(scores + block.moe_statics.e_score_correction_bias[0], block.top_k)
    weights = weights / weights.sum(axis=-1, keepdim=True)
    out = mixture(x, weights, all_experts(block))
    out = out + gated(x, *projections(block.shared_experts))

    columns = block.gate.weight / block.gate.weight.norm(axis=0, keepdim=True)
    cosines = columns.t() @ columns - paddle.eye(columns.shape[1])
    shares = chosen(scores, block.top_k).sum(axis=0) / len(x)
    loss = config.router_aux_loss_coef * len(shares) * (shares * scores.mean(axis=0)).sum()
    loss = loss + config.moe_orthogonal_loss_lambda * (cosines**2).mean()
    loss = loss + config.router_z_loss_coef * (paddle.logsumexp(logits, axis=-1) ** 2).mean()
    return out.reshape(hidden_states.shape), weights, loss.reshape([1]), logits


# ---------------------------------------------------------------- models


def use_dense_blocks(model, class_name: str, forward) -> None:
    """Replaces the forward of the blocks of a class, in place."""
    blocks = [layer for layer in model.sublayers() if type(layer).__name__ == class_name]
    assert blocks, f"no {class_name} in {type(model).__name__}"
    for block in blocks:
        block.forward = types.MethodType(forward, block)
