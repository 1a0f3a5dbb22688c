"""A fused mixture-of-experts operator for PaddlePaddle, with the layers that spread it over ranks.

Names load on first use, so that ``import paddle_moe.core`` (the kernels on NumPy arrays) never imports
Paddle.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "CheckpointError": "tensor_files",
    "ClipGradByGlobalNorm": "training",
    "FusedMoE": "layers",
    "LAYOUTS": "pretrained",
    "MoEParams": "params",
    "ParallelContext": "distributed",
    "RankLogger": "logs",
    "StoredTensor": "pretrained",
    "agree_on_overflow": "training",
    "average_gradients": "training",
    "balanced_correction_bias": "policies",
    "broadcast_parameters": "training",
    "check_optimizer": "training",
    "clip_gradients": "training",
    "fused_gate_moe": "functional",
    "gate": "functional",
    "generate_moe_params": "params",
    "generate_moe_params_static": "params",
    "get_num_threads": "functional",
    "get_rank_logger": "logs",
    "init_distributed": "distributed",
    "jitter": "policies",
    "limit_capacity": "policies",
    "load_balancing_loss": "losses",
    "load_checkpoint": "checkpoint",
    "load_moe_weights": "pretrained",
    "mixture_of_experts": "functional",
    "pack_int4": "quantization",
    "prepack_weights": "prepacking",
    "quantize": "quantization",
    "rank_grid": "distributed",
    "release_memory": "functional",
    "route": "functional",
    "router_z_loss": "losses",
    "save_checkpoint": "checkpoint",
    "save_moe_weights": "pretrained",
    "set_num_threads": "functional",
    "shard_experts": "params",
    "tokens_per_expert": "policies",
    "unpack_weights": "prepacking",
    "use_huge_pages": "huge_pages",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name == "core":  # which needs no import of its own, nor Paddle
        return import_module("paddle_moe.core")
    if name not in _HOME:
        raise AttributeError(f"module 'paddle_moe' has no attribute '{name}'")
    value = getattr(import_module(f"paddle_moe.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


# paddle.jit.load and paddle.inference look for the operators by name; so they are there once Paddle and then
# this package are imported.
if "paddle" in sys.modules:
    try:
        import_module("paddle_moe.functional")
    except RuntimeError as error:  # paddle_moe.core may work all the same
        warnings.warn(str(error), stacklevel=2)
