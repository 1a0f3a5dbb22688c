"""Small models of PaddleFormers, which imports packages that the Python index does not have."""

from __future__ import annotations

import re
import sys
import types
from importlib import import_module

import dense
import numpy as np
import paddle
from families import VOCABULARY, Family, draw_weights, in_no_file, split_qkv, tokens

_SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    fuse_rms_norm=False,  # has no CPU kernel
    tie_word_embeddings=False,
)
_DEEPSEEK = dict(
    intermediate_size=96,
    moe_intermediate_size=44,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    first_k_dense_replace=1,
)
FAMILIES = [
    Family(
        "qwen3_moe",
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLMDeprecated",  # the other one is a model of paddlefleet
        "Qwen3MoeSparseMoeBlock",
        dense.qwen3_moe,
        dict(
            intermediate_size=96,
            moe_intermediate_size=44,
            num_experts=8,
            num_experts_per_tok=3,
            norm_topk_prob=True,
            decoder_sparse_step=1,
        ),
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        "DeepseekV3MoE",
        dense.deepseek_v3,
        dict(
            _DEEPSEEK,
            kv_lora_rank=16,
            q_lora_rank=24,
            qk_rope_head_dim=16,
            qk_nope_head_dim=16,
            v_head_dim=16,
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=10000.0,
                factor=4.0,
                original_max_position_embeddings=64,
                beta_fast=32,
                beta_slow=1,
                mscale=0.707,
                mscale_all_dim=0.707,
            ),
        ),
    ),
    Family(
        "glm4_moe",
        "Glm4MoeConfig",
        "Glm4MoeForCausalLMDeprecated",  # as above
        "Glm4MoeMoE",
        dense.deepseek_v3,
        _DEEPSEEK,
    ),
    Family(
        "gpt_oss",
        "GptOssConfig",
        "GptOssForCausalLM",
        "GptOssMLP",
        dense.gpt_oss,
        dict(intermediate_size=44, num_local_experts=5, num_experts_per_tok=2),
    ),
    Family(
        "ernie4_5_moe",
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeSparseMoeBlock",
        dense.ernie_45_moe,
        dict(
            intermediate_size=96,
            moe_intermediate_size=44,
            moe_num_experts=8,
            moe_k=3,
            moe_num_shared_experts=2,
            moe_layer_start_index=1,
            num_nextn_predict_layers=0,
        ),
    ),
]


def stand_in_for_paddlefleet() -> None:
    """Modules of the names that PaddleFormers imports at the top; its blocks use nothing of them."""
    operators = types.ModuleType("paddlefleet_ops")
    operators.is_deep_ep_available = lambda: False
    provider = types.ModuleType("paddleformers.transformers.gpt_provider")
    provider.GPTModelProvider = type("GPTModelProvider", (), {"transform_rules": {}})
    sys.modules.setdefault(operators.__name__, operators)
    sys.modules.setdefault(provider.__name__, provider)


def build(family: Family, **options):
    stand_in_for_paddlefleet()
    package = f"paddleformers.transformers.{family.name}"
    config = getattr(import_module(f"{package}.configuration"), family.config)
    model = getattr(import_module(f"{package}.modeling"), family.model)
    built = model(config(**{**_SIZES, **family.options, **options}))
    draw_weights(built)
    built.eval()
    return built


def generated(model, cached: bool = True) -> list[list[int]]:
    """cached: by generate(), which computes one token at a time; else from all tokens every time."""
    ids = tokens(2, 8)
    if cached:
        out = model.generate(ids, attention_mask=paddle.ones_like(ids), max_new_tokens=6, do_sample=False)
        return out[0].tolist()
    with paddle.no_grad():
        for _ in range(6):
            out = model(ids)
            scores = out if isinstance(out, paddle.Tensor) else out[0]
            ids = paddle.concat([ids, scores[:, -1:].argmax(axis=-1)], axis=1)
    return ids[:, 8:].tolist()


_TURNED = re.compile(  # matrices that PaddleFormers has as [in, out]
    r"\.(o_proj|q_proj|k_proj|v_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|gate_proj|up_proj|down_proj)\.weight$"
)


def published_tensors(model) -> dict[str, np.ndarray]:
    """By the names, and as the [out, in] matrices, of Hugging Face's files."""
    config, tensors = model.config, {}
    gpt_oss = type(model).__name__.startswith("GptOss")
    for name, tensor in model.state_dict().items():
        path, leaf = name.rsplit(".", 1)
        parent, value = path.rpartition(".")[0], tensor.numpy()
        if in_no_file(name):
            continue
        if path.endswith("qkv_proj"):
            for part, columns in split_qkv(value, config).items():
                tensors[f"{parent}.{part}_proj.{leaf}"] = columns.T
        elif path.endswith("up_gate_proj"):
            for part, columns in zip(("gate", "up"), np.split(value, 2, axis=1)):
                tensors[f"{parent}.{part}_proj.weight"] = columns.T
        elif leaf == "gate_up_proj" and not gpt_oss:
            for expert, both in enumerate(value):
                for part, columns in zip(("gate", "up"), np.split(both, 2, axis=1)):
                    tensors[f"{path}.{expert}.{part}_proj.weight"] = columns.T
        elif leaf == "down_proj" and not gpt_oss:
            tensors.update({f"{path}.{expert}.down_proj.weight": one.T for expert, one in enumerate(value)})
        elif path.endswith("mlp.gate") and leaf == "weight":
            tensors[name] = value if value.shape[0] < value.shape[1] else value.T  # [experts, hidden]
        else:
            tensors[name] = value.T if _TURNED.search(name) else value
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors
