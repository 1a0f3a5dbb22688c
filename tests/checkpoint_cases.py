"""The model, optimizer, values and files that the tests of checkpoints share, in one process and in many."""

from __future__ import annotations

import functools
import json
import struct

import numpy as np
import paddle
from layer_cases import EXPERTS, HIDDEN, INTER, SHARED, TOP_K
from paddle import nn

from paddle_moe import FusedMoE, StoredTensor
from paddle_moe.checkpoint import create_moments
from paddle_moe.pretrained import GATE, UP
from paddle_moe.reference import to_float64, to_storage

# Every way of storing that the published layouts have, for the layers of Model.
LAYOUT = [
    StoredTensor("gate_weight", "gate.weight", "E H"),
    StoredTensor("gate_bias", "gate.bias", "E"),
    StoredTensor("gate_up_weight", "experts.{expert}.gate_proj.weight", "I H", GATE),
    StoredTensor("gate_up_weight", "experts.{expert}.up_proj.weight", "I H", UP),
    StoredTensor("down_weight", "experts.down_proj", "E H I"),
    StoredTensor("gate_up_bias", "experts.gate_up_bias", "E (I G)"),
    StoredTensor("down_bias", "experts.{expert}.down_proj.bias", "H"),
    StoredTensor("correction_bias", "moe_statics.e_score_correction_bias", "1 E"),
    StoredTensor("shared_gate_up_weight", "shared_expert.gate_up_proj.weight", "(G S) H"),
    StoredTensor("shared_down_weight", "shared_expert.down_proj.weight", "H S"),
    StoredTensor("shared_gate_weight", "shared_expert_gate.weight", "1 H"),
]


class Model(nn.Layer):
    """Two FusedMoE layers with everything that one can have, between dense ones that share a weight."""

    def __init__(self, dtype="float32", seed=None, parallel=None, num_experts=EXPERTS, **options):
        """options: of the FusedMoE layers."""
        super().__init__()
        paddle.seed(0 if seed is None else seed)  # dense weights, the same on every rank
        self.embed = nn.Embedding(7, HIDDEN)
        options.update(dtype=dtype, parallel=parallel)
        self.first = self._moe(num_experts, seed, options)
        self.norm = nn.LayerNorm(HIDDEN)
        self.second = nn.Sequential(self._moe(num_experts, seed and seed + 1, options))
        self.head = nn.Linear(HIDDEN, 7)
        self.tied = nn.Layer()
        self.tied.weight = self.embed.weight
        self.register_buffer("seen", paddle.to_tensor([0 if seed is None else seed], "int64"))
        if seed is None:
            for parameter in self.parameters():
                parameter.set_value(paddle.zeros_like(parameter))

    @staticmethod
    def _moe(num_experts, seed, options):
        layer = FusedMoE(
            HIDDEN,
            INTER,
            num_experts,
            TOP_K,
            gate_bias=True,
            gate_up_bias=True,
            down_bias=True,
            correction_bias=True,
            shared_intermediate_size=SHARED,
            shared_gate=True,
            seed=seed,
            **options,
        )
        if seed is not None:  # the seed leaves these zero
            fill(layer, "gate_bias", layer.parts()["gate_bias"], seed)
            fill(layer, "gate_up_bias", layer.parts().get("gate_up_bias"), seed)
            fill(layer, "down_bias", layer.parts().get("down_bias"), seed)
            fill(layer, "correction_bias", layer.parts()["correction_bias"], seed)
        return layer


ThreeExperts = functools.partial(Model, num_experts=3)  # fewer than a grid of four ranks


def fill(layer, name, part, seed):
    """Values that say where in the dense bias they belong."""
    tensor = getattr(layer, name)
    if tensor is None or not tensor.size:
        return
    experts = paddle.arange(*part.ranges["E"], dtype="float32")
    if name in ("gate_bias", "correction_bias"):
        values = experts
    elif name == "down_bias":
        values = 100 * experts[:, None] + paddle.arange(*part.ranges["H"], dtype="float32")
    else:
        columns = paddle.arange(*part.ranges["I"], dtype="float32")
        values = (100 * experts[:, None, None]) + paddle.stack([columns, columns + 50])
        values = values.reshape([len(experts), -1])
    tensor.set_value((values + seed).astype(tensor.dtype))


def make_optimizer(model):
    schedule = paddle.optimizer.lr.CosineAnnealingDecay(1e-3, 10)
    return paddle.optimizer.AdamW(schedule, parameters=model.parameters(), multi_precision=True)


def fill_moments(model, optimizer):
    """Moments that are functions of the parameter, as every rank can compute and check them for itself."""
    create_moments(optimizer, model.parameters())
    for name, parameter, tensor in optimizer_tensors(model, optimizer):
        tensor.set_value(expected_moment(name, parameter, tensor))


def expected_moment(name, parameter, tensor):
    value = parameter.detach().astype("float32")
    if name.endswith("_pow_acc"):
        return paddle.full(tensor.shape, 0.5)
    return {"moment1": 2 * value, "moment2": value * value, "master_weight": value + 2.0**-20}[name]


def optimizer_tensors(model, optimizer):
    """(kind, parameter, tensor) of all that the optimizer keeps."""
    parameter_of = {parameter.name: parameter for parameter in model.parameters()}
    for name, master in optimizer._master_weights.items():
        yield "master_weight", parameter_of[name], master
        parameter_of[master.name] = parameter_of[name]
    for kind, tensors in optimizer._accumulators.items():
        for name, tensor in tensors.items():
            yield kind, parameter_of[name], tensor


def assert_loaded(model, optimizer, expected):
    """Every bit of the model is that of `expected`, and of the optimizer as fill_moments made it."""
    for name, tensor in expected.state_dict().items():
        found = model.state_dict()[name]
        assert found.dtype == tensor.dtype
        assert found.numpy().tobytes() == tensor.numpy().tobytes(), name
    if optimizer is not None:
        checked = set()
        for kind, parameter, tensor in optimizer_tensors(model, optimizer):
            expected_value = expected_moment(kind, parameter, tensor)
            assert tensor.numpy().tobytes() == expected_value.numpy().tobytes(), (kind, parameter.name)
            checked.add(kind)
        assert {"moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc"} <= checked


# ---------------------------------------------------------------- files

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "uint16": "BF16", "int8": "I8", "uint8": "U8"}


def write_file(file, tensors: dict[str, np.ndarray]) -> None:
    """By hand: NumPy has no bfloat16 and no fp8, so uint16, and uint8 of a weight, are their bits."""
    header, data = {}, b""
    for key, array in tensors.items():
        is_fp8 = array.dtype == np.uint8 and key.endswith("weight")
        entry = {"dtype": "F8_E4M3" if is_fp8 else DTYPES[str(array.dtype)], "shape": array.shape}
        header[key] = entry | {"data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def mxfp4(rng, experts: int, rows: int, columns: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """float32 [E, out, in], and the bytes that stand for it, by the ending of the key."""
    codes = rng.integers(0, 16, (experts, rows, columns))
    codes.flat[:16] = range(16)
    scales = rng.integers(110, 140, (experts, rows, columns // 32))
    scales.flat[:3] = 0, 1, 252
    exponent, mantissa = codes >> 1 & 3, codes & 1
    sizes = np.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))
    values = np.where(codes < 8, sizes, -sizes) * 2.0 ** (np.repeat(scales, 32, axis=2) - 127)
    blocks = (codes[..., ::2] + 16 * codes[..., 1::2]).reshape(experts, rows, columns // 32, 16)
    stored = {"_blocks": blocks.astype(np.uint8), "_scales": scales.astype(np.uint8)}
    return values.astype(np.float32), stored


def fp8(rng, rows: int, columns: int, scales_dtype: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The same for float32 [out, in] in fp8 with a scale for each block of 128 x 128."""
    codes = rng.integers(0, 256, (rows, columns))
    codes.flat[: min(codes.size, 256)] = range(min(codes.size, 256))
    codes[codes & 127 == 127] = 126  # NaN
    exponent, mantissa = codes >> 3 & 15, codes & 7
    sizes = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    scales = to_storage(rng.uniform(1e-4, 1, (-(-rows // 128), -(-columns // 128))), scales_dtype)
    wide = np.kron(to_float64(scales), np.ones((128, 128)))[:rows, :columns]
    values = np.where(codes < 128, sizes, -sizes) * wide
    return values.astype(np.float32), {"": codes.astype(np.uint8), "_scale_inv": scales}
