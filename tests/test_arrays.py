"""What the bindings take: strided Paddle tensors, DLPack producers, read-only and bfloat16 NumPy arrays."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

import paddle_moe
from paddle_moe import _cuda_arrays, core

T, H, I, K, E = 5, 16, 12, 2, 4


def arguments():
    """Float32 NumPy arguments of mixture_of_experts."""
    rng = np.random.default_rng(0)
    return {
        "hidden_states": rng.standard_normal((T, H), "float32"),
        "routing_table": rng.integers(-1, E, (T, K)).astype("int32"),
        "router_weights": rng.random((T, K), "float32"),
        "gate_up_weights": rng.standard_normal((E, H, 2 * I), "float32"),
        "down_weights": rng.standard_normal((E, I, H), "float32"),
        "gate_up_bias": rng.standard_normal((E, 2 * I), "float32"),
        "down_bias": rng.standard_normal((E, H), "float32"),
    }


NAMES = list(arguments())


class DLPackOnly:
    """What any other library's array looks like."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self):
        return self.array.__dlpack__()


def transposed(tensor):
    """The same values with the strides of the transposed array."""
    axes = list(range(tensor.ndim))[::-1]
    return paddle.to_tensor(tensor.numpy().transpose(axes)).transpose(axes)


def every_second(tensor):
    """The same values with holes between them."""
    wide = paddle.full([*tensor.shape[:-1], 2 * tensor.shape[-1]], 77, tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2]


@pytest.mark.parametrize("view", [transposed, every_second])
@pytest.mark.parametrize("name", NAMES)
def test_strided_paddle_tensors(name, view):
    contiguous = {key: paddle.to_tensor(value) for key, value in arguments().items()}
    strided = {**contiguous, name: view(contiguous[name])}
    assert not strided[name].is_contiguous()
    expected = paddle_moe.mixture_of_experts(**contiguous)
    np.testing.assert_array_equal(paddle_moe.mixture_of_experts(**strided).numpy(), expected.numpy())


@pytest.mark.parametrize("view", [transposed, every_second])
def test_strided_paddle_tensors_in_gate_and_route(view):
    hidden_states, gate_weight = paddle.randn([T, H]), paddle.randn([H, E])
    logits = paddle_moe.gate(hidden_states, gate_weight)
    strided_logits = paddle_moe.gate(view(hidden_states), view(gate_weight))
    np.testing.assert_array_equal(strided_logits.numpy(), logits.numpy())
    for actual, expected in zip(paddle_moe.route(view(logits), K), paddle_moe.route(logits, K)):
        np.testing.assert_array_equal(actual.numpy(), expected.numpy())


def test_dlpack_arrays_are_read_in_place_and_given_back():
    arrays = arguments()
    expected = core.mixture_of_experts(**arrays)
    wrapped = {name: DLPackOnly(array) for name, array in arrays.items()}
    counts = [sys.getrefcount(array) for array in arrays.values()]
    out = np.full((T, H), np.nan, "float32")
    result = core.mixture_of_experts(**wrapped, out=DLPackOnly(out))
    np.testing.assert_array_equal(out, expected)
    assert isinstance(result, DLPackOnly) and result.array is out
    assert [sys.getrefcount(array) for array in arrays.values()] == counts


class CopiesItself(DLPackOnly):
    """An array whose library exports a copy each time, which the capsule alone keeps alive."""

    def __dlpack__(self):
        return self.array.copy().__dlpack__()


def test_arrays_that_are_copies_live_as_long_as_the_call():
    """Large ones, whose memory the C library would take away at once."""
    rng = np.random.default_rng(0)
    tokens, experts = 20000, 16
    copy = {
        name: CopiesItself(array)
        for name, array in (
            ("logits", rng.standard_normal((tokens, experts), "float32")),
            ("grad", rng.standard_normal((tokens, 2), "float32")),
            ("hidden", rng.standard_normal((tokens, H), "float32")),
            ("gate", rng.standard_normal((H, experts), "float32")),
        )
    }
    plain = {name: one.array for name, one in copy.items()}
    ids, weights = core.route(plain["logits"], 2)
    for array, expected in zip(core.route(copy["logits"], 2), (ids, weights)):
        np.testing.assert_array_equal(array, expected)
    np.testing.assert_array_equal(
        core.route_backward(copy["grad"], CopiesItself(ids), copy["logits"], 2),
        core.route_backward(plain["grad"], ids, plain["logits"], 2),
    )
    for array, expected in zip(
        core.gate_backward(copy["logits"], copy["hidden"], copy["gate"]),
        core.gate_backward(plain["logits"], plain["hidden"], plain["gate"]),
    ):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("fails", [False, True])
def test_the_current_device_of_torch_is_changed_for_the_export_alone(fails, monkeypatch):
    """PyTorch exports arrays on its current device only."""
    current = [0]

    @contextlib.contextmanager
    def device(index):
        current.append(index)
        try:
            yield
        finally:
            current.pop()

    class Array:
        __module__, device = "torch", 1

        def __dlpack__(self, stream):
            assert current[-1] == 1
            if fails:
                raise BufferError("no")
            return stream

    fake = SimpleNamespace(cuda=SimpleNamespace(device=device))
    monkeypatch.setitem(sys.modules, "torch", fake)
    with pytest.raises(BufferError) if fails else contextlib.nullcontext():
        assert _cuda_arrays.export(Array(), Array(), 7) == 7
    assert current == [0]


@pytest.mark.parametrize("dtype", ["V0", np.dtype([])])
def test_dtypes_without_a_size(dtype):
    nothing = np.zeros((2, H), dtype)
    with pytest.raises(ValueError, match="hidden_states must have the dtype"):
        core.gate(nothing, np.zeros((H, E), "float32"))
    with pytest.raises(ValueError, match="workspace must be a writable, contiguous uint8 array"):
        core.gate(np.zeros((2, H), "float32"), np.zeros((H, E), "float32"), workspace=nothing)


def test_paddle_tensors_through_dlpack():
    arrays = arguments()
    tensors = {name: paddle.to_tensor(array) for name, array in arrays.items()}
    np.testing.assert_array_equal(core.mixture_of_experts(**tensors), core.mixture_of_experts(**arrays))


@pytest.mark.parametrize("name", NAMES)
def test_arrays_that_begin_within_an_element_are_refused(name):
    values = arguments()
    shifted = np.frombuffer(b"\0" + values[name].tobytes(), values[name].dtype, offset=1)
    values[name] = shifted.reshape(values[name].shape)
    with pytest.raises(ValueError, match=f"^{name} must begin at a multiple of its item size, 4 bytes;"):
        core.mixture_of_experts(**values)
    behind = np.frombuffer(arguments()[name].tobytes() + bytes(4), values[name].dtype, offset=4)
    values[name] = behind.reshape(values[name].shape)  # four bytes from a multiple of 16 are well
    assert np.isfinite(core.mixture_of_experts(**{**arguments(), name: values[name]})).all()


def test_strides_within_an_element_are_refused():
    fields = np.zeros(T, [("x", "f4", H), ("odd", "u1")])["x"]
    with pytest.raises(ValueError, match="^hidden_states must have strides that are multiples of its item"):
        core.mixture_of_experts(**{**arguments(), "hidden_states": fields})


def test_read_only_arrays():
    arrays = arguments()
    expected = core.mixture_of_experts(**arrays)
    for array in arrays.values():
        array.flags.writeable = False
    np.testing.assert_array_equal(core.mixture_of_experts(**arrays), expected)


def in_bfloat16(arrays):
    """The float arrays as Paddle's bfloat16 tensors."""
    return {
        name: paddle.to_tensor(array).astype("bfloat16" if array.dtype == np.float32 else array.dtype.name)
        for name, array in arrays.items()
    }


def test_uint16_means_bfloat16_bits():
    tensors = in_bfloat16(arguments())
    bits = {name: tensor.numpy() for name, tensor in tensors.items()}  # Paddle shows bfloat16 as uint16
    assert bits["hidden_states"].dtype == np.uint16
    result = core.mixture_of_experts(**bits)
    assert result.dtype == np.uint16
    np.testing.assert_array_equal(result, paddle_moe.mixture_of_experts(**tensors).numpy())


def test_ml_dtypes_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    bits = {name: tensor.numpy() for name, tensor in in_bfloat16(arguments()).items()}
    named = {
        name: array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array
        for name, array in bits.items()
    }
    result = core.mixture_of_experts(**named)
    assert result.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(result.view(np.uint16), core.mixture_of_experts(**bits))


def test_workspace_may_hold_anything_and_lie_anywhere():
    arrays = arguments()
    expected = core.mixture_of_experts(**arrays)
    size = core.workspace_size(**arrays)
    for offset in (0, 1, 17):
        memory = np.full(size + offset, 255, "uint8")
        np.testing.assert_array_equal(core.mixture_of_experts(**arrays, workspace=memory[offset:]), expected)


def test_new_arrays_begin_a_cache_line():
    """Whole lines can be written past the caches."""
    given = arguments()
    gradients = core.mixture_of_experts_backward(given["hidden_states"], **given)
    empty = core.gate(given["hidden_states"][:0], np.ones((H, E), np.float32))
    arrays = [core.mixture_of_experts(**given), empty, *(one for one in gradients if one is not None)]
    for array in arrays:
        assert array.ctypes.data % 64 == 0 and array.flags.writeable and array.flags.c_contiguous
    assert empty.shape == (0, E)
