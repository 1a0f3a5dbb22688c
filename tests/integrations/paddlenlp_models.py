"""Small models of PaddleNLP."""

from __future__ import annotations

import re

import dense
import numpy as np
import paddle
from families import VOCABULARY, Family, draw_weights, split_qkv, tokens
from paddlenlp import transformers

_SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
_DEEPSEEK = dict(
    intermediate_size=96,
    moe_intermediate_size=44,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    kv_lora_rank=16,
    q_lora_rank=24,
    qk_rope_head_dim=16,
    qk_nope_head_dim=16,
    v_head_dim=16,
    first_k_dense_replace=1,
    aux_loss_alpha=0.01,
    # As in the released models; without it the attention of paddlenlp 3.0.0b4 raises on Paddle 3.3.
    rope_scaling=dict(
        type="yarn",
        factor=4.0,
        original_max_position_embeddings=64,
        beta_fast=32,
        beta_slow=1,
        mscale=0.707,
        mscale_all_dim=0.707,
    ),
)


FAMILIES = [
    Family(
        "mixtral",
        "MixtralConfig",
        "MixtralForCausalLM",
        "MixtralSparseMoeBlock",
        dense.mixtral,
        dict(intermediate_size=91, num_local_experts=5, num_experts_per_tok=2),
    ),
    Family(
        "qwen2_moe",
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeSparseMoEBlock",
        dense.qwen2_moe,
        dict(
            intermediate_size=96,
            moe_intermediate_size=44,
            shared_expert_intermediate_size=72,
            num_experts=6,
            num_experts_per_tok=3,
            norm_topk_prob=True,
        ),
    ),
    Family(
        "deepseek_v2",
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        "DeepseekV2MoE",
        dense.deepseek,
        dict(
            _DEEPSEEK,
            n_shared_experts=2,
            topk_method="group_limited_greedy",
            routed_scaling_factor=4.0,
            norm_topk_prob=False,
        ),
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        "DeepseekV2MoE",
        dense.deepseek,
        dict(
            _DEEPSEEK,
            n_shared_experts=1,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
        ),
    ),
    Family(
        "jamba",
        "JambaConfig",
        "JambaForCausalLM",
        "JambaSparseMoeBlock",
        dense.jamba,
        dict(
            intermediate_size=91,
            num_experts=4,
            num_experts_per_tok=2,
            expert_layer_period=2,
            expert_layer_offset=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=8,
            mamba_dt_rank=8,
            use_mamba_kernels=False,
        ),
    ),
]


FAMILIES = [family for family in FAMILIES if hasattr(transformers, family.model)]  # Mixtral alone before 3.0


def build(family: Family, **options):
    config = getattr(transformers, family.config)(**{**_SIZES, **family.options, **options})
    model = getattr(transformers, family.model)(config)
    draw_weights(model)
    model.eval()
    return model


def generated(model) -> list[list[int]]:
    ids = tokens(2, 8)
    out, _ = model.generate(
        ids, attention_mask=paddle.ones_like(ids), max_length=6, decode_strategy="greedy_search"
    )
    return out.tolist()


_TURNED = re.compile(  # matrices that PaddleNLP has as [in, out]
    r"\b(w1|w2|w3|\w+_proj|kv_a_proj_with_mqa|gate|router|shared_expert_gate|score|lm_head)\.weight$"
)


def published_tensors(model) -> dict[str, np.ndarray]:
    """By the names, and as the [out, in] matrices, of the published files."""
    config, tensors = model.config, {}
    for name, tensor in model.state_dict().items():
        name, value = re.sub(r"^(mixtral|qwen2_moe|deepseek_v[23]|jamba)\.", "model.", name), tensor.numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if "qkv_proj" in name:
            for part, columns in split_qkv(value, config).items():
                tensors[name.replace("qkv", part)] = columns.T
        elif "gate_up_fused_proj" in name:
            for part, columns in zip(("gate", "up"), np.split(value, 2, axis=1)):
                tensors[name.replace("gate_up_fused", part)] = columns.T
        else:
            tensors[name] = value.T if _TURNED.search(name) else value
    return tensors
