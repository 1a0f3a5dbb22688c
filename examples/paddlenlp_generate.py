"""PaddleNLP models with mixture-of-experts blocks on paddle_moe, their experts spread over EP x TP ranks.

One process:

    python examples/paddlenlp_generate.py --family mixtral

Four of them, each with a quarter of the experts' weights:

    PADDLE_DISTRI_BACKEND=gloo python -m paddle.distributed.launch --nproc_per_node 4 --log_dir log/generate \
        examples/paddlenlp_generate.py --family mixtral --ep 2 --tp 2

Start them from the root of the clone. Without --family all of them. The models are small and random, so what
they say means nothing, but it is the same for every grid. Their tokens are bytes. For a real one replace
build() as docs/integrations.md shows.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import paddle
from paddlenlp import transformers

import paddle_moe
from paddle_moe.integrations.blocks import MoEBlock
from paddle_moe.integrations.paddlenlp import accelerate, load_checkpoint, save_checkpoint

SIZES = dict(
    vocab_size=256,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
    max_position_embeddings=512,
    eos_token_id=None,
)
DEEPSEEK = dict(
    intermediate_size=256,
    moe_intermediate_size=96,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    kv_lora_rank=32,
    q_lora_rank=48,
    qk_rope_head_dim=16,
    qk_nope_head_dim=16,
    v_head_dim=16,
    rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=128),
)
# Name of the classes of PaddleNLP, sizes of the model.
FAMILIES = {
    "mixtral": ("Mixtral", dict(intermediate_size=256, num_local_experts=8, num_experts_per_tok=2)),
    "qwen2_moe": (
        "Qwen2Moe",
        dict(
            intermediate_size=256,
            moe_intermediate_size=96,
            shared_expert_intermediate_size=256,
            num_experts=16,
            num_experts_per_tok=4,
        ),
    ),
    "deepseek_v2": (
        "DeepseekV2",
        dict(DEEPSEEK, n_shared_experts=2, topk_method="group_limited_greedy", routed_scaling_factor=4.0),
    ),
    "deepseek_v3": (
        "DeepseekV3",
        dict(
            DEEPSEEK,
            n_shared_experts=1,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        ),
    ),
    "jamba": (
        "Jamba",
        dict(
            intermediate_size=256,
            num_experts=8,
            num_experts_per_tok=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=8,
            mamba_dt_rank=8,
            use_mamba_kernels=False,
        ),
    ),
}


def build(family: str):
    """The same random weights on every rank."""
    name, sizes = FAMILIES[family]
    paddle.seed(2024)
    config = getattr(transformers, f"{name}Config")(**SIZES, **sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.eval()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", choices=FAMILIES, nargs="+", default=list(FAMILIES))
    parser.add_argument("--ep", type=int, default=1, help="ranks that share the experts")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share each expert's columns")
    parser.add_argument("--prompt", default="A mixture of experts")
    parser.add_argument("--length", type=int, default=16, help="tokens to generate")
    parser.add_argument("--save", type=Path, help="directory that gets the weights, in Hugging Face's layout")
    parser.add_argument("--load", type=Path, help="directory to read such weights from; each rank its own")
    arguments = parser.parse_args()

    parallel = paddle_moe.init_distributed(arguments.ep, arguments.tp)
    for family in arguments.family:
        model = accelerate(build(family), parallel=parallel)
        if arguments.save:
            save_checkpoint(model, arguments.save / family)
        if arguments.load:
            report = load_checkpoint(model, arguments.load / family)
            print(f"{family}, rank {parallel.rank}: read {report.bytes_read:,} bytes", flush=True)

        blocks = [layer for layer in model.sublayers() if isinstance(layer, MoEBlock)]
        held = sum(parameter.size for block in blocks for parameter in block.experts.parameters())
        ids = paddle.to_tensor([list(arguments.prompt.encode())])
        started = time.perf_counter()
        output, _ = model.generate(
            ids,
            attention_mask=paddle.ones_like(ids),
            max_length=arguments.length,
            decode_strategy="greedy_search",
        )
        seconds = time.perf_counter() - started
        print(
            f"{family}, rank {parallel.rank} (ep {parallel.ep_rank}, tp {parallel.tp_rank}): "
            f"{len(blocks)} blocks, {held:,} expert weights here, "
            f"{arguments.length} tokens in {seconds:.2f} s: {output[0].tolist()}",
            flush=True,
        )


if __name__ == "__main__":
    main()
