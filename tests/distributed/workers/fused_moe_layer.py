"""One rank of a grid that runs FusedMoE in many ways: fused_moe_layer.py EP_SIZE TP_SIZE OUTPUT_DIRECTORY.

Writes what each way gave to rank_R.npz, halves as float32; the test compares them with the dense layer.
"""

import itertools
import os
import sys
from pathlib import Path

import numpy as np
import paddle

sys.path.insert(0, str(Path(__file__).parents[2]))
from layer_cases import (
    EVERYTHING,
    EXPERTS,
    HIDDEN,
    INTER,
    SHARED,
    TOKENS,
    TOP_K,
    dense_weights,
    tokens,
)

from paddle_moe.distributed import init_distributed
from paddle_moe.layers import FusedMoE
from paddle_moe.logs import get_rank_logger

ep_size, tp_size, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
parallel = init_distributed(ep_size, tp_size, timeout_seconds=60)
results = {}
reduced_groups = []
all_reduce = parallel.all_reduce


def all_reduce_and_note(tensor: paddle.Tensor, group: str, **options) -> paddle.Tensor:
    reduced_groups.append(group)
    return all_reduce(tensor, group, **options)


def record(name: str, output: paddle.Tensor) -> None:
    results[name] = output.astype("float32").numpy()


for dtype, reduce, fp32_reduce in itertools.product(
    ("float32", "bfloat16", "float16"), ("two", "one"), (False, True)
):
    layer = FusedMoE.from_dense(
        **dense_weights(dtype, **EVERYTHING),
        top_k=TOP_K,
        parallel=parallel,
        reduce=reduce,
        fp32_reduce=fp32_reduce,
        permuted_weights=fp32_reduce,
    )
    parallel.all_reduce = all_reduce_and_note
    output = layer(paddle.to_tensor(tokens(dtype)))
    parallel.all_reduce = all_reduce
    assert output.dtype == getattr(paddle, dtype)
    assert reduced_groups == (["ep", "tp"] if reduce == "two" else ["grid"])
    reduced_groups.clear()
    record(f"everything {dtype} {reduce} {fp32_reduce}", output)

plain = FusedMoE.from_dense(**dense_weights(), top_k=TOP_K, parallel=parallel)
six = paddle.to_tensor(tokens(num_tokens=6))
output, ids, weights = plain(six.reshape([2, 3, HIDDEN]), return_routing=True)
record("leading dimensions", output)
record("replay", plain(six, ids, weights))
record("no tokens", plain(paddle.zeros([0, HIDDEN])))

few = FusedMoE.from_dense(**dense_weights(bias=True, num_experts=3), top_k=TOP_K, parallel=parallel)
record("three experts", few(paddle.to_tensor(tokens())))

with paddle.no_grad():
    quantized = FusedMoE.from_dense(**dense_weights(**EVERYTHING), top_k=TOP_K, parallel=parallel).quantize_()
    record("quantized", quantized(paddle.to_tensor(tokens())))
    few.quantize_("float8_e4m3fn")
    record("three experts in fp8", few(paddle.to_tensor(tokens())))
# The same tokens on all ranks, as if they were each rank's own.
apart = FusedMoE.from_dense(
    **dense_weights(bias=True), top_k=TOP_K, parallel=parallel, dispatch="alltoall"
).quantize_()
for name, layer in {"quantized": quantized, "few": few, "apart": apart}.items():
    x = paddle.to_tensor(tokens(), stop_gradient=False)
    (layer(x) * paddle.to_tensor(tokens(seed=5))).sum().backward()
    record(f"{name} x", x.grad)
    for parameter in ("gate_weight", "gate_bias", "shared_gate_weight"):
        if layer is not apart and getattr(layer, parameter) is not None:
            record(f"{name} {parameter}", getattr(layer, parameter).grad)

drawn = FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K, parallel=parallel, shared_intermediate_size=SHARED, seed=3)
record("drawn", drawn(paddle.to_tensor(tokens())))
state = drawn.state_dict()
reloaded = FusedMoE(
    HIDDEN, INTER, EXPERTS, TOP_K, parallel=parallel, shared_intermediate_size=SHARED, seed=None
)
reloaded.set_state_dict(state)
record("reloaded", reloaded(paddle.to_tensor(tokens())))

plain.logger = get_rank_logger(parallel.ep_rank, parallel.tp_rank, log_dir=directory)
plain(paddle.to_tensor(tokens()))
plain.logger = None

os.environ["PADDLE_MOE_CHECK"] = "1"
record("checked", plain(paddle.to_tensor(tokens())))
disagreeing = paddle.full([TOKENS, 1], parallel.rank == 1, dtype="int32")
try:
    plain(paddle.to_tensor(tokens()), disagreeing, paddle.ones([TOKENS, 1]))
except RuntimeError as error:
    results["disagreement"] = np.array(str(error))

np.savez(directory / f"rank_{parallel.rank}.npz", **results)
