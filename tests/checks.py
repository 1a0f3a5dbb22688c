"""Cases, callers and comparisons that the kernel tests share.

A case is a dict with the arguments of an operator as NumPy arrays (bfloat16 as uint16 bits), so that the same
case goes to `paddle_moe.core`, to the Paddle op and to `paddle_moe.reference`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import paddle_moe
from paddle_moe import reference
from paddle_moe.reference import to_float64, to_storage

if TYPE_CHECKING:
    from paddle_moe.integrations.blocks import Slice

DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = (*reference.ACTIVATIONS, "swigluoai", "swigluoai(1.5, 2.5)")
LAYOUTS = ("list", "separate", "stacked")
WEIGHTS = ("gate_up_weights", "down_weights", "gate_up_bias", "down_bias")
per_dtype = pytest.mark.parametrize("dtype", DTYPES)
per_layout = pytest.mark.parametrize("layout", LAYOUTS)
per_permuted = pytest.mark.parametrize("permuted", [False, True], ids=["in_out", "permuted"])
# The files that prove a back end; their tests without Paddle run on others too.
OPERATOR_TESTS = (
    "test_mixture_of_experts.py",
    "test_guarantees.py",
    "test_route.py",
    "test_fused_gate_moe.py",
)

# Relative L2 against the double precision result rounded to the dtype of the output. Half precision is held
# far below the 5e-3 that it may lose end to end: the reference rounds where the kernel rounds, so all that is
# left are the few values that fp32 pushes over a rounding boundary. This makes a factor of 0.999 visible.
TOLERANCE = {"float32": 1e-6, "bfloat16": 5e-4, "float16": 1e-4}
UNIT = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}  # distance of 1 to the next number


def dtype_of(array: np.ndarray) -> str:
    return "bfloat16" if array.dtype == np.uint16 else str(array.dtype)


# ---------------------------------------------------------------- comparisons


def relative_l2(actual: np.ndarray, expected: np.ndarray) -> float:
    """|actual - expected| / |expected|, both float64."""
    size = np.linalg.norm(expected)
    return np.linalg.norm(actual - expected) / (size if size > 0 else 1.0)


def assert_close(actual: np.ndarray, expected: np.ndarray, slack: float = 1.0) -> None:
    """actual, as stored by a kernel, is the float64 array expected up to rounding. slack widens it.

    NaN and inf must sit in the same places. One value may have rounded the other way, however few there are.
    A row must not hide behind many right ones: each is held to two units in the last place, or 8e-6 in fp32,
    of its own length or of the average row's where it is shorter.
    """
    dtype = dtype_of(actual)
    rounded = to_float64(to_storage(expected, dtype))
    actual = to_float64(actual)
    assert actual.shape == rounded.shape, f"shape {actual.shape}, expected {rounded.shape}"
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(actual[~finite], rounded[~finite])
    assert np.isfinite(actual[finite]).all(), "NaN or inf where the reference is finite"
    actual, rounded = np.where(finite, actual, 0.0), np.where(finite, rounded, 0.0)
    error = relative_l2(actual, rounded)
    tolerance = slack * (TOLERANCE[dtype] + UNIT[dtype] / np.sqrt(max(actual.size, 1)))
    assert error <= tolerance, f"relative L2 error {error:.2e} is above {tolerance:.1e}"
    if rounded.ndim == 2 and rounded.size:
        size = np.linalg.norm(rounded, axis=1)
        size = np.maximum(size, np.sqrt(np.mean(size**2)))
        errors = np.linalg.norm(actual - rounded, axis=1) / np.where(size > 0, size, 1.0)
        worst = int(np.argmax(errors))
        tolerance = slack * max(2 * UNIT[dtype], 8e-6)
        assert errors[worst] <= tolerance, f"row {worst}: error {errors[worst]:.2e} above {tolerance:.1e}"


def assert_amax_close(actual: np.ndarray, expected: np.ndarray, slack: float = 1.0) -> None:
    """amax is fp32, never rounded to half precision. Tensor cores cut sums off, here by up to 1.4e-6 as
    the emulator models it; the fast exponential of a GPU adds a few units in the last place."""
    np.testing.assert_allclose(actual, expected, rtol=slack * 5e-6)


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Same dtype, shape and bits: -0.0 is not 0.0, and NaN equals itself."""
    actual, expected = np.ascontiguousarray(actual), np.ascontiguousarray(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    bits = f"u{actual.dtype.itemsize}"
    np.testing.assert_array_equal(actual.view(bits), expected.view(bits))


def assert_exact(actual: np.ndarray, expected: np.ndarray) -> None:
    """actual holds exactly the float64 array expected, rounded once to the dtype of actual."""
    np.testing.assert_array_equal(to_float64(actual), to_float64(to_storage(expected, dtype_of(actual))))


# ---------------------------------------------------------------- cases


def arrange(dense: dict, layout: str = "list", permuted: bool = False) -> dict:
    """The weights and biases of a dense case in one of the layouts that the operator accepts.

    dense holds gate, up [E, H, I], down [E, I, H] and, when there are biases, gate_bias, up_bias [E, I] and
    down_bias [E, H].
    """

    def stored(matrices):
        return np.ascontiguousarray(np.swapaxes(matrices, 1, 2)) if permuted else matrices

    def listed(array):
        return array if layout == "stacked" else list(array)

    def gate_up(gate, up, axis):
        if layout == "separate":
            return list(gate) + list(up)
        return listed(np.concatenate([gate, up], axis=axis))

    arguments = {
        "gate_up_weights": gate_up(stored(dense["gate"]), stored(dense["up"]), 1 if permuted else 2),
        "down_weights": listed(stored(dense["down"])),
        "permuted_weights": permuted,
    }
    if "gate_bias" in dense:
        arguments["gate_up_bias"] = gate_up(dense["gate_bias"], dense["up_bias"], 1)
        arguments["down_bias"] = listed(dense["down_bias"])
    return arguments


def random_dense(rng, num_experts, hidden, inter, dtype="float32", bias=False, bias_dtype=None) -> dict:
    """Random weights that keep activations near 1."""

    def normal(*shape, scale, dtype=dtype):
        return to_storage(rng.standard_normal(shape) * scale, dtype)

    dense = {
        "gate": normal(num_experts, hidden, inter, scale=1.5 / np.sqrt(hidden)),
        "up": normal(num_experts, hidden, inter, scale=1 / np.sqrt(hidden)),
        "down": normal(num_experts, inter, hidden, scale=1 / np.sqrt(inter)),
    }
    if bias:
        dense["gate_bias"] = normal(num_experts, inter, scale=0.5, dtype=bias_dtype or dtype)
        dense["up_bias"] = normal(num_experts, inter, scale=0.5, dtype=bias_dtype or dtype)
        dense["down_bias"] = normal(num_experts, hidden, scale=0.5, dtype=bias_dtype or dtype)
    return dense


def random_routing(rng, num_tokens, top_k, num_experts, dtype="int32") -> np.ndarray:
    """[T, K] ids, distinct in a row."""
    return np.argsort(rng.random((num_tokens, num_experts)), axis=1)[:, :top_k].astype(dtype)


def random_tokens(rng, num_tokens, hidden, top_k, num_experts, dtype="float32") -> dict:
    """hidden_states and a normalised routing over distinct experts."""
    weights = rng.random((num_tokens, top_k)) + 0.1
    return {
        "hidden_states": to_storage(rng.standard_normal((num_tokens, hidden)), dtype),
        "routing_table": random_routing(rng, num_tokens, top_k, num_experts),
        "router_weights": (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32),
    }


def random_case(
    num_tokens=7,
    hidden=32,
    inter=24,
    num_experts=5,
    top_k=2,
    dtype="float32",
    *,
    layout="list",
    permuted=False,
    bias=False,
    bias_dtype=None,
    seed=0,
    **options,
) -> dict:
    rng = np.random.default_rng(seed)
    dense = random_dense(rng, num_experts, hidden, inter, dtype, bias, bias_dtype)
    tokens = random_tokens(rng, num_tokens, hidden, top_k, num_experts, dtype)
    return {**tokens, **arrange(dense, layout, permuted), **options}


def integer_dense(rng, num_experts, hidden, inter, dtype="float32", bias=False) -> dict:
    """Weights in {-1, 0, 1}: see integer_case."""

    def integers(*shape, low=-1, high=1):
        return to_storage(rng.integers(low, high, shape, endpoint=True), dtype)

    dense = {
        "gate": integers(num_experts, hidden, inter),
        "up": integers(num_experts, hidden, inter),
        "down": integers(num_experts, inter, hidden),
    }
    if bias:
        dense["gate_bias"] = integers(num_experts, inter, low=-3, high=3)
        dense["up_bias"] = integers(num_experts, inter, low=-3, high=3)
        dense["down_bias"] = integers(num_experts, hidden, low=-3, high=3)
    return dense


def integer_case(
    num_tokens=7,
    hidden=24,
    inter=20,
    num_experts=5,
    top_k=2,
    dtype="float32",
    *,
    layout="list",
    permuted=False,
    bias=False,
    seed=0,
    **options,
) -> dict:
    """Small integers whose sums fit 24 bits in any order, so a right kernel has no rounding error at all.

    Sizes up to 24 and |x|, |w| <= 1 bound gate and up by 27, relu2(gate) * up by 27^3, the down sum by
    24 * 27^3 + 3, and the combine (5 experts, weights up to 2, in steps of a half) by 2^24 halves.
    """
    assert max(hidden, inter) <= 24 and top_k <= 5
    rng = np.random.default_rng(seed)
    return {
        "hidden_states": to_storage(rng.integers(-1, 1, (num_tokens, hidden), endpoint=True), dtype),
        "routing_table": random_routing(rng, num_tokens, top_k, num_experts),
        "router_weights": rng.choice(np.float32([-1, 0, 0.5, 1, 2]), (num_tokens, top_k)),
        **arrange(integer_dense(rng, num_experts, hidden, inter, dtype, bias), layout, permuted),
        **options,
    }


# ---------------------------------------------------------------- callers


def expected_moe(case: dict, *, round_intermediate: bool = True):
    """The reference with the intermediate rounded like the kernel's."""
    case = {name: value for name, value in case.items() if name != "chunk_size"}
    dtype = dtype_of(case["hidden_states"]) if round_intermediate else None
    return reference.mixture_of_experts(**case, round_intermediate=dtype)


class Core:
    """`paddle_moe.core`, with every buffer it may use poisoned with NaN and fenced."""

    name = "core"
    FENCE = 64  # bytes on either side of a buffer that nothing may touch

    def __init__(self):
        self._fenced = []

    def _buffer(self, num_bytes: int, poison: int) -> np.ndarray:
        whole = np.full(num_bytes + 2 * self.FENCE, poison, np.uint8)
        self._fenced.append((whole, poison))
        return whole[self.FENCE : self.FENCE + num_bytes]

    def _array(self, shape, dtype, poison: int = 0xFF) -> np.ndarray:
        dtype = np.dtype(dtype)
        return self._buffer(int(np.prod(shape)) * dtype.itemsize, poison).view(dtype).reshape(shape)

    def _check_fences(self) -> None:
        for whole, poison in self._fenced:
            fence = np.concatenate([whole[: self.FENCE], whole[-self.FENCE :]])
            assert (fence == poison).all(), "bytes beside a buffer were overwritten"
        self._fenced = []

    # Where the arrays of a case lie when the functions are called: a GPU has its own.
    def _to_device(self, case: dict) -> dict:
        return case

    def _to_numpy(self, result):
        return result

    def mixture_of_experts(self, *, poison: int = 0xFF, **case):
        from paddle_moe import core

        out = self._array(case["hidden_states"].shape, case["hidden_states"].dtype, poison)
        case = self._to_device(case)
        workspace = self._buffer(core.workspace_size(**case), poison)
        result = core.mixture_of_experts(**case, out=out, workspace=workspace)
        assert (result[0] if case.get("measurement_mode") else result) is out, "out= was not used"
        self._check_fences()
        return self._to_numpy(result)

    def route(self, logits, top_k, **options):
        from paddle_moe import core

        shape = (len(logits), top_k)
        out = (self._array(shape, "int32"), self._array(shape, "float32"))
        result = core.route(**self._to_device({"logits": logits, **options}), top_k=top_k, out=out)
        self._check_fences()
        return self._to_numpy(result)

    def gate(self, hidden_states, gate_weight):
        from paddle_moe import core

        out = self._array((len(hidden_states), gate_weight.shape[1]), "float32")
        case = self._to_device({"hidden_states": hidden_states, "gate_weight": gate_weight})
        workspace = self._buffer(core.gate_workspace_size(**case), 0xFF)
        result = core.gate(**case, out=out, workspace=workspace)
        self._check_fences()
        return self._to_numpy(result)

    def fused_gate_moe(self, **case):
        from paddle_moe import core

        out = self._array(case["hidden_states"].shape, case["hidden_states"].dtype)
        result = core.fused_gate_moe(**self._to_device(case), out=out)
        self._check_fences()
        return self._to_numpy(result)


@functools.cache
def why_not_cuda() -> str:
    """Why nothing can run on a GPU here; empty where it can."""
    from paddle_moe import core

    if not core._core.has_cuda():
        return "paddle_moe was built without CUDA"
    if importlib.util.find_spec("torch") is None:
        return "PyTorch, which the tests on a GPU use, is not installed"
    import torch

    return "" if torch.cuda.is_available() else "no CUDA device"


def on_gpu(array: np.ndarray):
    """The array as a PyTorch tensor on the GPU with the same strides, and NaN in the gaps between them."""
    import torch

    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = np.ascontiguousarray(array)
    strides = [stride // array.itemsize for stride in array.strides]
    # A dimension of stride 0 repeats one element, which is copied once.
    once = array[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)]
    dense = torch.from_numpy(np.array(once.view(np.int16) if array.dtype == np.uint16 else once, order="C"))
    if array.dtype == np.uint16:
        dense = dense.view(torch.bfloat16)
    span = 1 + sum((size - 1) * stride for size, stride in zip(array.shape, strides)) if array.size else 0
    memory = torch.full((span * array.itemsize,), 0xFF, dtype=torch.uint8, device="cuda").view(dense.dtype)
    memory.as_strided(dense.shape, strides).copy_(dense)
    return memory.as_strided(array.shape, strides)


class Cuda(Core):
    """`paddle_moe.core` on the GPU, through PyTorch tensors; NumPy in and out."""

    name = "cuda"

    def _buffer(self, num_bytes: int, poison: int):
        import torch

        whole = torch.full((num_bytes + 2 * self.FENCE,), poison, dtype=torch.uint8, device="cuda")
        self._fenced.append((whole, poison))
        return whole[self.FENCE : self.FENCE + num_bytes]

    def _array(self, shape, dtype, poison: int = 0xFF):
        import torch

        dtype = np.dtype(dtype)
        kind = torch.bfloat16 if dtype == np.uint16 else getattr(torch, dtype.name)
        return self._buffer(int(np.prod(shape)) * dtype.itemsize, poison).view(kind).reshape(shape)

    def _check_fences(self) -> None:
        self._fenced = [(whole.cpu().numpy(), poison) for whole, poison in self._fenced]
        super()._check_fences()

    def _to_device(self, case: dict) -> dict:
        def moved(value):
            if isinstance(value, np.ndarray):
                return on_gpu(value)
            return [moved(entry) for entry in value] if isinstance(value, list) else value

        return {name: moved(value) for name, value in case.items()}

    def _to_numpy(self, result):
        import torch

        if isinstance(result, tuple):
            return tuple(self._to_numpy(entry) for entry in result)
        if result.dtype == torch.bfloat16:
            return result.view(torch.int16).cpu().numpy().view(np.uint16)
        return result.cpu().numpy()


class Paddle:
    """The Paddle operators, NumPy in and out."""

    name = "paddle"

    def _call(self, name, *args, **kwargs):
        import paddle

        def to_paddle(value):
            if isinstance(value, np.ndarray):
                return paddle.to_tensor(value, place=paddle.CPUPlace())  # uint16 becomes bfloat16
            if isinstance(value, list):
                return [to_paddle(entry) for entry in value]
            return value

        result = getattr(paddle_moe, name)(
            *[to_paddle(value) for value in args], **{key: to_paddle(value) for key, value in kwargs.items()}
        )
        return tuple(t.numpy() for t in result) if isinstance(result, (tuple, list)) else result.numpy()

    def mixture_of_experts(self, **case):
        return self._call("mixture_of_experts", **case)

    def route(self, logits, top_k, **options):
        return self._call("route", logits, top_k, **options)

    def gate(self, hidden_states, gate_weight):
        return self._call("gate", hidden_states, gate_weight)

    def fused_gate_moe(self, **case):
        return self._call("fused_gate_moe", **case)


# ---------------------------------------------------------------- other processes


def run_python(*arguments: str, timeout: float, **environment: str) -> str:
    """What a new interpreter in this directory, on the paddle_moe that this process uses, prints; it must end
    with 0."""
    package_home = str(Path(paddle_moe.__file__).parent.parent)
    run = subprocess.run(
        [sys.executable, *arguments],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": package_home, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return run.stdout


def part_of(values: np.ndarray, one: Slice | None) -> np.ndarray:
    """What a rank should have of the values of a whole parameter of a block; `one` None: all of it."""
    if one is None:
        return values
    unfolded = values.reshape([one.whole.length(name) for name in one.whole.names])
    return unfolded[tuple(slice(*one.part.ranges[name]) for name in one.whole.names)].reshape(one.part.shape)
