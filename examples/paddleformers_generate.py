"""PaddleFormers models with mixture-of-experts blocks on paddle_moe, their experts spread over EP x TP ranks.

One process:

    python examples/paddleformers_generate.py --family qwen3_moe

Four of them, each with a quarter of the experts' weights:

    PADDLE_DISTRI_BACKEND=gloo python -m paddle.distributed.launch --nproc_per_node 4 --log_dir log/generate \
        examples/paddleformers_generate.py --family qwen3_moe --ep 2 --tp 2

Without paddlefleet, which PyPI lacks, importing PaddleFormers 1.2.0 ends in ModuleNotFoundError for
'paddlefleet_ops'. Then put tests/integrations/workers/run_example.py in front of the name of this file in
both commands: it puts empty stand-ins in the place of modules that PaddleFormers imports and these models do
not use.

Start them from the root of the clone. Without --family all of them. The models are small and random, so what
they say means nothing, but it is the same for every grid. Their tokens are bytes. For a real one replace
build() as docs/integrations.md shows.
"""

from __future__ import annotations

import argparse
import time
from importlib import import_module
from pathlib import Path

import paddle

import paddle_moe
from paddle_moe.integrations.blocks import MoEBlock
from paddle_moe.integrations.paddleformers import accelerate, load_checkpoint, save_checkpoint

SIZES = dict(
    vocab_size=256,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    max_position_embeddings=512,
    eos_token_id=None,
    pad_token_id=0,
    fuse_rms_norm=False,  # has no CPU kernel
    tie_word_embeddings=False,
)
DEEPSEEK = dict(
    intermediate_size=256,
    moe_intermediate_size=96,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    first_k_dense_replace=1,
)
# Names of the classes of PaddleFormers, sizes of the model.
FAMILIES = {
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLMDeprecated",  # Qwen3MoeForCausalLM is a model of paddlefleet
        dict(
            intermediate_size=256,
            moe_intermediate_size=96,
            num_experts=16,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            decoder_sparse_step=1,
        ),
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        dict(
            DEEPSEEK,
            kv_lora_rank=32,
            q_lora_rank=48,
            qk_rope_head_dim=16,
            qk_nope_head_dim=16,
            v_head_dim=16,
            rope_parameters=dict(
                rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=128
            ),
        ),
    ),
    "glm4_moe": ("Glm4MoeConfig", "Glm4MoeForCausalLMDeprecated", DEEPSEEK),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        dict(intermediate_size=96, num_local_experts=8, num_experts_per_tok=2),
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeForCausalLM",
        dict(
            intermediate_size=256,
            moe_intermediate_size=96,
            moe_num_experts=16,
            moe_k=4,
            moe_num_shared_experts=2,
            moe_layer_start_index=1,
            num_nextn_predict_layers=0,
        ),
    ),
}


def build(family: str):
    """The same random weights on every rank."""
    config, model, sizes = FAMILIES[family]
    package = f"paddleformers.transformers.{family}"
    paddle.seed(2024)
    config = getattr(import_module(f"{package}.configuration"), config)(**SIZES, **sizes)
    model = getattr(import_module(f"{package}.modeling"), model)(config)
    model.eval()
    return model


@paddle.no_grad()
def generate(model, family: str, ids: paddle.Tensor, length: int) -> paddle.Tensor:
    if family != "deepseek_v3":
        mask = paddle.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=length, do_sample=False)[0]
    for _ in range(length):  # its generate() raises on Paddle 3.3
        logits = model(ids)
        logits = logits if isinstance(logits, paddle.Tensor) else logits[0]
        ids = paddle.concat([ids, logits[:, -1:].argmax(axis=-1)], axis=1)
    return ids[:, -length:]


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
        output = generate(model, family, ids, arguments.length)
        seconds = time.perf_counter() - started
        print(
            f"{family}, rank {parallel.rank} (ep {parallel.ep_rank}, tp {parallel.tp_rank}): "
            f"{len(blocks)} blocks, {held:,} expert weights here, "
            f"{arguments.length} tokens in {seconds:.2f} s: {output[0].tolist()}",
            flush=True,
        )


if __name__ == "__main__":
    main()
