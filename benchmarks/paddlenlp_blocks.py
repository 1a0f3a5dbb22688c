"""PaddleNLP's mixture-of-experts blocks and models, stock against accelerated, on the same weights.

    PYTHONPATH=. python benchmarks/paddlenlp_blocks.py --out FILE.json

in the environment of docs/integrations.md. The stock blocks raise on Paddle 3.3; here they get back the two
functions of Paddle whose results changed, as columns and as int32, and are untouched otherwise. In a round
the stock and the accelerated variant run one after the other, and the ratio is taken within the round, since
machines drift. fp32, random weights, evaluation.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from importlib import import_module
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))  # importing Paddle sets it to 1

import numpy as np
import paddle
import paddlenlp
from paddlenlp import transformers

import paddle_moe
from paddle_moe.integrations.paddlenlp import accelerate

_COMMON = dict(
    vocab_size=256,
    hidden_size=1024,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    max_position_embeddings=1024,
)
# Layers of the published models with everything but the number of experts per token about halved.
MODELS = {
    "Mixtral": (
        "Mixtral",
        dict(intermediate_size=2048, num_local_experts=8, num_experts_per_tok=2),
    ),
    "Qwen2-MoE": (
        "Qwen2Moe",
        dict(
            intermediate_size=2816,
            moe_intermediate_size=704,
            shared_expert_intermediate_size=2816,
            num_experts=30,
            num_experts_per_tok=4,
        ),
    ),
    "DeepSeek-V3": (
        "DeepseekV3",
        dict(
            intermediate_size=2816,
            moe_intermediate_size=704,
            n_routed_experts=32,
            n_shared_experts=1,
            num_experts_per_tok=8,
            n_group=4,
            topk_group=2,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            norm_topk_prob=True,
            first_k_dense_replace=0,
            kv_lora_rank=128,
            q_lora_rank=256,
            qk_rope_head_dim=32,
            qk_nope_head_dim=64,
            v_head_dim=64,
            rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=256),
        ),
    ),
}


class EarlierPaddle:
    """The module paddle with where() and cumsum() as before Paddle 3.1."""

    def __getattr__(self, name):
        return getattr(paddle, name)

    def where(self, condition, *choices):
        if choices:
            return paddle.where(condition, *choices)
        return tuple(index.reshape([-1, 1]) for index in paddle.where(condition))

    def cumsum(self, x, axis=None):
        return paddle.cumsum(x, axis=axis).astype(x.dtype)


@paddle.no_grad()
def build(name: str, options: dict):
    paddle.seed(0)
    config = getattr(transformers, f"{name}Config")(**_COMMON, **options)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.eval()
    rng = np.random.default_rng(0)
    for key, parameter in model.state_dict().items():
        if "gate.weight" in key:  # all equal in a new model
            parameter.set_value(rng.standard_normal(parameter.shape).astype("float32") / 32)
    return model


def seconds(call, budget: float) -> float:
    """Of one call, the mean over as many as fit into the budget."""
    started, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - started < budget:
        call()
        calls += 1
    return (time.perf_counter() - started) / calls


def compare(stock, accelerated, rounds: int, budget: float) -> dict:
    """Both warmed up, checked against each other, and timed in turn."""
    expected, actual = stock(), accelerated()
    error = float(((actual - expected).norm() / expected.norm()).item())
    if not error < 1e-5:
        raise RuntimeError(f"the accelerated result differs from the stock one by {error:.2e}")
    times = [(seconds(stock, budget), seconds(accelerated, budget)) for _ in range(rounds)]
    ratios = sorted(one / other for one, other in times)
    return {
        "stock_ms": 1e3 * statistics.median(one for one, _ in times),
        "accelerated_ms": 1e3 * statistics.median(other for _, other in times),
        "ratio": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "relative_error": error,
    }


def caller(layer, inputs):
    """A call of the layer that returns its first output."""

    def call():
        output = layer(inputs)
        return output if isinstance(output, paddle.Tensor) else output[0]

    return call


def block_of(model):
    names = ("MixtralSparseMoeBlock", "Qwen2MoeSparseMoEBlock", "DeepseekV2MoE")
    return next(layer for layer in model.sublayers() if type(layer).__name__ in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), help="comma separated, default: %(default)s")
    parser.add_argument("--tokens", default="1,64,512", help="T, comma separated, default: %(default)s")
    parser.add_argument("--what", default="block,model", help="comma separated, default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=0.1, help="seconds per variant and round")
    parser.add_argument("--out", type=Path, help="JSON that gets the results, beside those that it has")
    arguments = parser.parse_args()

    for module in ("mixtral.modeling", "moe_gate"):
        import_module(f"paddlenlp.transformers.{module}").paddle = EarlierPaddle()
    results = []
    print(f"{'model':<12} {'what':<6} {'T':>4}  {'stock ms':>9} {'ours ms':>9}  ratio (minimum-maximum)")
    for label in arguments.models.split(","):
        name, options = MODELS[label]
        stock_model = build(name, options)
        model = accelerate(build(name, options))
        for tokens in map(int, arguments.tokens.split(",")):
            hidden = paddle.randn([1, tokens, _COMMON["hidden_size"]])
            ids = paddle.randint(0, _COMMON["vocab_size"], [1, tokens])
            pairs = {
                "block": (block_of(stock_model), block_of(model), hidden),
                "model": (stock_model, model, ids),
            }
            for what in arguments.what.split(","):
                stock, ours, inputs = pairs[what]
                with paddle.no_grad():
                    result = compare(
                        caller(stock, inputs),
                        caller(ours, inputs),
                        arguments.rounds,
                        arguments.budget,
                    )
                results.append({"model": label, "what": what, "tokens": tokens, **result})
                print(
                    f"{label:<12} {what:<6} {tokens:>4}  {result['stock_ms']:>9.2f} "
                    f"{result['accelerated_ms']:>9.2f}  {result['ratio']:.2f} "
                    f"({result['ratio_min']:.2f}-{result['ratio_max']:.2f})",
                    flush=True,
                )
    if arguments.out:
        environment = {
            "processor": platform.processor() or platform.machine(),
            "threads": paddle_moe.get_num_threads(),
            "paddle": paddle.__version__,
            "paddlenlp": paddlenlp.__version__,
            "paddle_moe": paddle_moe.__version__,
            "mkl_debug_cpu_type": os.environ.get("MKL_DEBUG_CPU_TYPE"),
        }
        if arguments.out.exists():
            earlier = json.loads(arguments.out.read_text())
            if earlier["environment"] != environment:
                raise RuntimeError(f"{arguments.out} was measured elsewhere: {earlier['environment']}")
            measured = {(one["model"], one["what"], one["tokens"]) for one in results}
            kept = [
                one
                for one in earlier["results"]
                if (one["model"], one["what"], one["tokens"]) not in measured
            ]
            results = kept + results
        arguments.out.write_text(
            json.dumps({"environment": environment, "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
