"""Weights of 8 and 4 bits: mixture_of_experts with scales, quantize() and FusedMoE.quantize_()."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import types

import checks
import numpy as np
import paddle
import pytest
from checks import (
    assert_amax_close,
    assert_close,
    assert_same_bits,
    expected_moe,
    per_layout,
    per_permuted,
    relative_l2,
)
from layer_cases import EVERYTHING, HIDDEN, TOP_K, Shard, dense_weights, tokens
from paddle.distributed import parallel
from paddle.distributed.parallel import sync_params_buffers
from quantized_cases import (
    GRANULARITIES,
    dequantised,
    per_8_bit_kind,
    per_granularity,
    per_kind,
    per_storage,
    quantized_case,
    random_weights,
    slack_of,
)
from training_cases import autocast

import paddle_moe
from paddle_moe import FusedMoE, quantization, reference
from paddle_moe import core as kernels
from paddle_moe.reference import dequantise, to_float64


@pytest.fixture
def core():
    """Not on a GPU, which refuses quantised weights."""
    return checks.Core()


@pytest.fixture(params=["core", "paddle"])
def backend(request):
    return checks.Core() if request.param == "core" else checks.Paddle()


LAYER_ERROR = {"int8": 0.02, "float8_e4m3fn": 0.08, "int4": 0.3}


# ---------------------------------------------------------------- the operator


@per_storage
@per_granularity
@per_layout
def test_against_the_reference(backend, kind, granularity, layout, permuted):
    for dtype, num_tokens in (("float32", 9), ("bfloat16", 70), ("float16", 1)):
        case = quantized_case(
            num_tokens, dtype=dtype, kind=kind, granularity=granularity, layout=layout, permuted=permuted,
            measurement_mode=True,
        )  # fmt: skip
        out, amax = backend.mixture_of_experts(**case)
        expected, expected_amax = expected_moe(case)
        assert_close(out, expected, slack_of(case))
        assert_amax_close(amax, expected_amax, 1.0 if slack_of(case) == 1.0 else 20.0)


@per_storage
@pytest.mark.parametrize(
    ("hidden", "inter"),
    [(1, 1), (5, 3), (64, 320), (127, 129), (256, 257), (1030, 20), (2112, 64), (64, 2176)],
)
def test_sizes(core, kind, permuted, hidden, inter):
    for granularity in GRANULARITIES:
        for dtype in ("float32", "bfloat16"):
            for num_tokens in (1, 4, 13):
                case = quantized_case(
                    num_tokens,
                    hidden,
                    inter,
                    2,
                    1,
                    dtype,
                    kind=kind,
                    granularity=granularity,
                    permuted=permuted,
                )
                assert_close(core.mixture_of_experts(**case), expected_moe(case), max(2.0, slack_of(case)))


@per_8_bit_kind
@pytest.mark.parametrize("num_tokens", [1, 3, 40, 200])
@pytest.mark.parametrize(
    ("granularity", "permuted"),
    [("channel", False), ("group", False), ("group", True), ("block", False), ("block", True)],
)
def test_the_bits_of_dequantised_weights(core, kind, num_tokens, granularity, permuted):
    """Where scales change along the depth, or weights are stored [in, out]: nothing but memory is saved."""
    case = quantized_case(num_tokens, kind=kind, granularity=granularity, permuted=permuted)
    assert_same_bits(core.mixture_of_experts(**case), core.mixture_of_experts(**dequantised(case)))


@per_storage
@per_granularity
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_of_a_token_do_not_depend_on_the_others(core, kind, granularity, permuted, dtype):
    case = quantized_case(
        50, num_experts=2, top_k=1, dtype=dtype, kind=kind, granularity=granularity, permuted=permuted
    )
    whole = core.mixture_of_experts(**case)
    per_token = ("hidden_states", "routing_table", "router_weights")
    for count in (1, 2, 5, 9, 14, 30):
        some = {**case, **{name: case[name][-count:] for name in per_token}}
        assert_same_bits(core.mixture_of_experts(**some), whole[-count:])
    assert_same_bits(core.mixture_of_experts(**case, chunk_size=7), whole)
    try:
        kernels.set_num_threads(1)
        assert_same_bits(core.mixture_of_experts(**case), whole)
    finally:
        kernels.set_num_threads(0)


@per_8_bit_kind
@per_permuted
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_number(core, kind, permuted, dtype):
    """down = all 256 numbers; the intermediate is 1."""
    bits = np.arange(256, dtype=np.uint8).reshape(1, 1, 256)
    if kind == "int8":
        bits = bits.view(np.int8)
    one = np.ones([1, 256, 2] if not permuted else [1, 2, 256], np.int8 if kind == "int8" else np.uint8)
    if kind != "int8":
        one *= 0x38
    for num_tokens in (1, 2, 30):
        out = core.mixture_of_experts(
            hidden_states=reference.to_storage(np.full((num_tokens, 256), 1 / 256), dtype),
            routing_table=np.zeros((num_tokens, 1), np.int32),
            router_weights=np.ones((num_tokens, 1), np.float32),
            gate_up_weights=one,
            down_weights=np.swapaxes(bits, 1, 2).copy() if permuted else bits,
            gate_up_scale=np.ones((1, 1), np.float32),
            down_scale=np.full((1, 1), 0.125, np.float32),
            permuted_weights=permuted,
            activation="relu",
        )
        expected = np.repeat(to_float64(bits).reshape(1, 256) / 8, num_tokens, 0)
        if kind != "int8":
            assert np.isnan(expected[:, [0x7F, 0xFF]]).all()
        np.testing.assert_array_equal(to_float64(out), expected)


@per_kind
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_accuracy_in_half_precision(core, kind, dtype):
    """The error is that of rounding the right result once."""
    case = quantized_case(200, dtype=dtype, kind=kind, granularity="group", permuted=True)
    expected = expected_moe(case)
    rounded = to_float64(reference.to_storage(expected, dtype))
    error = relative_l2(to_float64(core.mixture_of_experts(**case)), expected)
    assert error < 1.2 * relative_l2(rounded, expected)


@pytest.mark.parametrize("granularity", ["channel", "block"])
def test_outputs_that_are_no_gate_and_up(granularity):
    with pytest.raises(ValueError, match="weight must have a multiple of parts = 2 outputs, got 9"):
        paddle_moe.quantize(paddle.randn([8, 9]), "int8", granularity, parts=2)


def test_every_int4_number(core):
    """Each at every place of its words; the intermediate is 1."""
    numbers = (np.arange(16)[:, None] + np.arange(130)) % 16 - 8  # [H, I]

    def packed(values):
        return paddle_moe.pack_int4(paddle.to_tensor(values[None].astype("int8"))).numpy()

    for dtype in ("float32", "bfloat16"):
        for num_tokens in (1, 2, 30):
            for i in (0, 1, 15, 16, 31, 32, 63, 64, 127, 128, 129):
                gate_up = np.zeros((260, 16))
                gate_up[i, 0] = 1
                gate_up[130:, 0] = 1
                out = core.mixture_of_experts(
                    hidden_states=reference.to_storage(np.ones((num_tokens, 16)), dtype),
                    routing_table=np.zeros((num_tokens, 1), np.int32),
                    router_weights=np.ones((num_tokens, 1), np.float32),
                    gate_up_weights=packed(gate_up),
                    down_weights=packed(numbers),
                    gate_up_scale=np.ones((1, 1), np.float32),
                    down_scale=np.full((1, 1), 0.125, np.float32),
                    permuted_weights=True,
                    activation="relu",
                )
                np.testing.assert_array_equal(to_float64(out), np.tile(numbers[:, i] / 8, (num_tokens, 1)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int4_numbers_behind_the_last_input_count_for_nothing(core, dtype):
    for num_tokens in (1, 5, 30):
        case = quantized_case(num_tokens, dtype=dtype, kind="int4", granularity="group", permuted=True)
        out = core.mixture_of_experts(**case)
        for name, size, completed in (("gate_up_weights", 300, 320), ("down_weights", 200, 256)):
            numbers = reference.unpack_int4(case[name], completed)
            numbers[..., size:] = 7
            case[name] = reference.pack_int4(numbers)
        assert_same_bits(core.mixture_of_experts(**case), out)


def test_activations_of_very_different_sizes(core):
    """Integers hold the largest of 64 neighbours to 15 bits; smaller ones lose theirs, and no others do."""
    for kind in ("int8", "int4"):
        for dtype in ("bfloat16", "float32"):
            case = quantized_case(9, 256, 64, dtype=dtype, kind=kind, permuted=True, activation="identity")
            x = to_float64(case["hidden_states"]) * 10.0 ** np.arange(-6, 2).repeat(32)
            case["hidden_states"] = reference.to_storage(x, dtype)
            case["gate_up_weights"][:, 64:] = 0  # up
            case["gate_up_bias"] = np.concatenate([np.zeros((4, 64)), np.ones((4, 64))], 1).astype(np.float32)
            assert_close(core.mixture_of_experts(**case), expected_moe(case), slack_of(case))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_an_activation_that_is_much_larger_than_its_neighbours(core, kind):
    """And counts for nothing itself: what the neighbours lose is seen."""
    errors = []
    for size in (1.0, 100.0, 1000.0):
        case = quantized_case(64, 1024, 512, dtype="bfloat16", kind="int8", permuted=True)
        case["gate_up_weights"][:, :, 5] = 0
        if kind == "int4":
            for name in ("gate_up", "down"):
                case[f"{name}_weights"] = reference.pack_int4(case[f"{name}_weights"] >> 4)
                case[f"{name}_scale"] *= 16
        x = to_float64(case["hidden_states"])
        x[:, 5] = size
        case["hidden_states"] = reference.to_storage(x, "bfloat16")
        errors.append(relative_l2(to_float64(core.mixture_of_experts(**case)), expected_moe(case)))
    assert errors[0] < 1.8e-3 and errors[1] < 2.1e-3 and errors[2] < 5e-3


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_that_is_no_number(core, kind, bad, dtype):
    """It stays its own."""
    case = quantized_case(40, dtype=dtype, kind=kind, permuted=True)
    right = to_float64(core.mixture_of_experts(**case))
    x = to_float64(case["hidden_states"])
    x[7, 100] = bad
    case["hidden_states"] = reference.to_storage(x, dtype)
    out = to_float64(core.mixture_of_experts(**case))
    assert not np.isfinite(out[7]).any()
    np.testing.assert_array_equal(np.delete(out, 7, 0), np.delete(right, 7, 0))


def test_a_scale_that_is_no_number(core):
    """It makes its own channel NaN and no other."""
    case = quantized_case(40, permuted=True)
    case["down_scale"][:, 7] = np.nan
    out = core.mixture_of_experts(**case)
    assert np.isnan(out[:, 7]).all() and np.isfinite(np.delete(out, 7, 1)).all()


def test_gate_and_up_may_share_their_scales_in_different_ways(core):
    case = quantized_case(30, granularity="channel", layout="separate", permuted=True)
    one_scale = [scale[:1] for scale in case["gate_up_scale"][:4]]
    case["gate_up_scale"] = [*one_scale, *case["gate_up_scale"][4:]]
    assert_close(core.mixture_of_experts(**case), expected_moe(case), slack_of(case))


@per_permuted
def test_side_by_side_or_apart(core, permuted):
    """Blocks belong to gate or to up: the same numbers and scales in both layouts."""
    case = quantized_case(30, inter=200, granularity="block", layout="separate", permuted=permuted)
    expected = core.mixture_of_experts(**case)
    for name in ("gate_up_weights", "gate_up_scale"):
        gates, ups = case[name][:4], case[name][4:]
        case[name] = [np.concatenate(pair, 0 if permuted else 1) for pair in zip(gates, ups)]
    assert_same_bits(core.mixture_of_experts(**case), expected)


@per_permuted
@pytest.mark.parametrize("shape", [(), (1, 1), (1, 2), (3, 1), (1, 200)])
def test_other_forms_of_scales(core, permuted, shape):
    """Those of down [200, 300] that the granularities do not have, as views without strides too."""
    case = quantized_case(30, hidden=200, inter=300, permuted=permuted)
    scale = np.random.default_rng(1).uniform(1e-3, 2e-3, (4, *shape)).astype(np.float32)
    if permuted and len(shape) == 2:
        scale = np.swapaxes(scale, 1, 2)
    case["down_scale"] = scale
    expected = expected_moe(case)
    assert_close(core.mixture_of_experts(**case), expected)
    case["down_scale"] = np.broadcast_to(scale[:1], scale.shape)
    assert_close(core.mixture_of_experts(**case), expected_moe(case), slack_of(case))


def test_strided_arrays(core):
    """Any strides of weights and scales, as NumPy arrays may have them."""
    case = quantized_case(30, granularity="group")
    expected = core.mixture_of_experts(**case)
    for name in ("gate_up_weights", "down_weights", "gate_up_scale", "down_scale"):
        wide = np.zeros([2 * size for size in case[name].shape], case[name].dtype)
        wide[::2, 1::2, ::2] = case[name]
        case[name] = wide[::2, 1::2, ::2]
    assert_same_bits(core.mixture_of_experts(**case), expected)


def test_fused_gate_moe(backend):
    case = quantized_case(21, granularity="block")
    del case["routing_table"], case["router_weights"]
    gate_weight = np.random.default_rng(1).standard_normal((300, 4)).astype(np.float32)
    out, table, weights = backend.fused_gate_moe(
        **case, gate_weight=gate_weight, top_k=2, return_routing=True
    )
    case.update(routing_table=table, router_weights=weights)
    assert_close(out, expected_moe(case))
    assert_same_bits(out, backend.mixture_of_experts(**case))


def test_paddle_takes_its_own_fp8():
    if not hasattr(paddle, "float8_e4m3fn"):
        pytest.skip("this Paddle has no fp8")
    case = quantized_case(kind="float8_e4m3fn", granularity="block", permuted=True)
    arrays = {name: paddle.to_tensor(a) if isinstance(a, np.ndarray) else a for name, a in case.items()}
    as_bits = paddle_moe.mixture_of_experts(**arrays)
    for name in ("gate_up_weights", "down_weights"):
        arrays[name] = arrays[name].view("float8_e4m3fn")
    assert_same_bits(paddle_moe.mixture_of_experts(**arrays).numpy(), as_bits.numpy())


STATIC_PROGRAM = """
import sys, numpy as np, paddle, paddle_moe

case = dict(np.load(sys.argv[1]))
paddle.enable_static()
with paddle.static.program_guard(paddle.static.Program()):
    unknown = {"hidden_states": 0, "routing_table": 0, "router_weights": 0, "gate_up_scale": 1}
    inputs = {}
    for name, array in case.items():
        shape = [-1 if unknown.get(name) == axis else size for axis, size in enumerate(array.shape)]
        inputs[name] = paddle.static.data(name, shape, str(array.dtype))
    pir = paddle.framework.in_pir_mode()  # the older program has no gradients of some tensors of a call alone
    inputs["hidden_states"].stop_gradient = not pir
    out = paddle_moe.mixture_of_experts(**inputs, permuted_weights=True)
    try:
        del inputs["gate_up_scale"]
        paddle_moe.mixture_of_experts(**inputs, permuted_weights=True)
    except ValueError as error:
        assert str(error).startswith("gate_up_scale must be given: gate_up_weights has the dtype "), error
    else:
        raise AssertionError("a missing scale was not seen")
    fetch = [out, *(paddle.static.gradients([out.sum()], [inputs["hidden_states"]]) if pir else [])]
    result, *gradient = paddle.static.Executor().run(feed=case, fetch_list=fetch)
np.savez(sys.argv[2], result=result, gradient=gradient)
"""


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "int4"])
@pytest.mark.parametrize("pir", ["0", "1"], ids=["old_program", "pir"])
def test_static_programs(pir, kind, core, tmp_path):
    case = quantized_case(kind=kind, granularity="block", permuted=True)
    expected = core.mixture_of_experts(**case)
    ones = np.ones_like(case["hidden_states"])
    gradients = kernels.mixture_of_experts_backward(ones, **case)
    del case["permuted_weights"]
    np.savez(tmp_path / "case.npz", **case)
    command = [sys.executable, "-c", STATIC_PROGRAM, str(tmp_path / "case.npz"), str(tmp_path / "out.npz")]
    done = subprocess.run(
        command, env={**os.environ, "FLAGS_enable_pir_api": pir}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = np.load(tmp_path / "out.npz")
    assert_same_bits(found["result"], expected)
    if pir == "1":
        assert_same_bits(found["gradient"][0], gradients.hidden_states)


def test_autocast_leaves_scales_alone():
    case = quantized_case(dtype="bfloat16", granularity="group")
    arrays = {name: paddle.to_tensor(a) if isinstance(a, np.ndarray) else a for name, a in case.items()}
    expected = paddle_moe.mixture_of_experts(**arrays).astype("float32").numpy()
    arrays["hidden_states"] = arrays["hidden_states"].astype("float32")
    with autocast("O2", "bfloat16"):
        out = paddle_moe.mixture_of_experts(**arrays)
    assert out.dtype == paddle.bfloat16
    assert_same_bits(out.astype("float32").numpy(), expected)


# ---------------------------------------------------------------- quantize


def as_numpy(tensor: paddle.Tensor) -> np.ndarray:
    return tensor.numpy() if tensor.dtype in (paddle.int8, paddle.float32) else tensor.view("uint8").numpy()


@per_8_bit_kind
@per_granularity
@per_permuted
@pytest.mark.parametrize("shape", [(3, 300, 257), (130, 64)])
def test_quantize(kind, granularity, permuted, shape):
    weight = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    weight[..., 0, :] = 0
    quantised, scale = (
        as_numpy(tensor)
        for tensor in paddle_moe.quantize(
            paddle.to_tensor(weight), kind, granularity, permuted=permuted, parts=1
        )
    )
    assert quantised.shape == shape and scale.dtype == np.float32
    largest = {"int8": 127, "float8_e4m3fn": 448}[kind]
    matrices = [a.reshape(-1, *a.shape[-2:]) for a in (weight, quantised, scale)]
    for one, bits, scales in zip(*matrices):
        spread = dequantise(np.ones(one.shape), scales, permuted).astype(np.float32)
        ratio = one / spread
        assert np.abs(ratio).max() <= largest * (1 + 1e-6)
        rounded = np.rint(ratio) if kind == "int8" else to_float64(reference.to_fp8_bits(ratio))
        np.testing.assert_array_equal(to_float64(bits), rounded)
        # Each group has an element with the largest magnitude, unless all of it is zero.
        tops = np.unique(scales[np.nonzero(scales != 1)]).size
        assert np.unique(spread[np.abs(to_float64(bits)) == largest]).size >= tops


@per_permuted
def test_numbers_of_a_file_come_back(permuted):
    """fp8 in blocks, dequantised while loading: the same bits, where each block uses the whole range."""
    rng = np.random.default_rng(3)
    bits, scale = random_weights(rng, 2, 256, 384, "float8_e4m3fn", "block")
    bits[:, ::128, 5::128] = 0x7E  # 448
    if permuted:
        bits, scale = (np.ascontiguousarray(np.swapaxes(a, 1, 2)) for a in (bits, scale))
    weight = np.stack([dequantise(*pair, permuted) for pair in zip(bits, scale)]).astype(np.float32)
    again, scale_again = paddle_moe.quantize(
        paddle.to_tensor(weight), "float8_e4m3fn", "block", permuted=permuted, parts=1
    )
    np.testing.assert_array_equal(to_float64(as_numpy(again)), to_float64(bits))
    np.testing.assert_allclose(scale_again.numpy(), scale, rtol=2e-7)


@per_8_bit_kind
def test_quantize_parts(kind):
    """Blocks of the two halves, as if they had been quantised alone."""
    weight = paddle.randn([2, 130, 2 * 200])
    both, scale = paddle_moe.quantize(weight, kind, "block", parts=2)
    for half, bits, scales in zip(weight.chunk(2, 2), np.split(as_numpy(both), 2, 2), scale.chunk(2, 2)):
        alone, scales_alone = paddle_moe.quantize(half.contiguous(), kind, "block", parts=1)
        np.testing.assert_array_equal(bits, as_numpy(alone))
        np.testing.assert_array_equal(scales.numpy(), scales_alone.numpy())


@per_granularity
@pytest.mark.parametrize("shape", [(3, 257, 300), (64, 130)])
def test_quantize_int4(granularity, shape):
    weight = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    weight[..., 0] = 0
    words, scale = (
        tensor.numpy()
        for tensor in paddle_moe.quantize(
            paddle.to_tensor(weight), "int4", granularity, permuted=True, parts=1
        )
    )
    assert words.shape == (*shape[:-1], 8 * -(-shape[-1] // 64)) and scale.dtype == np.float32
    for one, packed, scales in zip(*(a.reshape(-1, *a.shape[-2:]) for a in (weight, words, scale))):
        numbers = reference.unpack_int4(packed, shape[-1])
        spread = dequantise(np.ones(one.shape), scales, True).astype(np.float32)
        ratio = one / spread
        assert ratio.min() >= -8 * (1 + 1e-6) and ratio.max() <= 8 * (1 + 1e-6)
        np.testing.assert_array_equal(numbers, np.clip(np.rint(ratio), -8, 7))
        assert np.unique(spread[numbers == -8]).size >= np.unique(scales[scales != 1]).size
        if granularity == "group":  # what the -8 is good for
            step = np.abs(spread) * 8 / 7
            symmetric = np.rint(one / step) * step
            assert relative_l2(numbers * spread, one) < 0.93 * relative_l2(symmetric, one)
        assert (scales < 0).any() or granularity in ("tensor", "block")


def test_quantize_int4_is_by_group():
    weight = paddle.randn([64, 300])
    for one, other in zip(
        paddle_moe.quantize(weight, "int4", permuted=True),
        paddle_moe.quantize(weight, "int4", "group", permuted=True),
    ):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


@pytest.mark.parametrize("size", [1, 16, 63, 64, 65, 200])
def test_pack_int4(size):
    numbers = np.random.default_rng(size).integers(-8, 7, (2, 3, size), endpoint=True)
    for dtype in ("int8", "int32", "int64"):
        words = paddle_moe.pack_int4(paddle.to_tensor(numbers.astype(dtype)))
        assert words.dtype == paddle.int32 and words.shape == [2, 3, 8 * -(-size // 64)]
        np.testing.assert_array_equal(reference.unpack_int4(words.numpy(), size), numbers)
        rest = reference.unpack_int4(words.numpy(), 64 * -(-size // 64))[..., size:]
        assert not rest.any()


def test_pack_int4_refuses():
    assert paddle_moe.pack_int4(paddle.zeros([2, 0], "int8")).shape == [2, 0]
    with pytest.raises(ValueError, match="numbers must be from -8 to 7, got -9 to 3"):
        paddle_moe.pack_int4(paddle.to_tensor([-9, 3]))
    with pytest.raises(ValueError, match="numbers must be a paddle.Tensor of integers, got float32"):
        paddle_moe.pack_int4(paddle.zeros([2]))
    with pytest.raises(ValueError, match="numbers must have at least one dimension"):
        paddle_moe.pack_int4(paddle.to_tensor(3))
    with pytest.raises(ValueError, match="numbers must be a paddle.Tensor of integers, got numpy.ndarray"):
        paddle_moe.pack_int4(np.zeros([2], np.int8))


def test_int4_refuses():
    case = quantized_case(kind="int4", permuted=True)
    with pytest.raises(ValueError, match="permuted_weights must be True with int4 weights, .* got False"):
        kernels.mixture_of_experts(**{**case, "permuted_weights": False})
    expected = (
        r"gate_up_weights must have the shape .E_l, 2I, 8 . ceil.H / 64.. = .4, 400, 40., got .4, 400, 48."
    )
    with pytest.raises(ValueError, match=expected):
        wide = np.concatenate([case["gate_up_weights"], case["gate_up_weights"][..., :8]], -1)
        kernels.mixture_of_experts(**{**case, "gate_up_weights": wide})
    expected = r"down_weights must have the shape .E_l, H, 8 . ceil.I / 64.. = .4, 300, 32., got .4, 300, 24."
    with pytest.raises(ValueError, match=expected):
        kernels.mixture_of_experts(**{**case, "down_weights": case["down_weights"][..., :24]})
    with pytest.raises(ValueError, match="gate_up_weights must be contiguous in its last dimension"):
        kernels.mixture_of_experts(
            **{**case, "gate_up_weights": case["gate_up_weights"].repeat(2, -1)[..., ::2]}
        )
    numbers = reference.unpack_int4(case["down_weights"], 200)
    with pytest.raises(ValueError, match="down_weights must have the dtype int4 in int32, got int8"):
        kernels.mixture_of_experts(**{**case, "down_weights": numbers})
    numbers = reference.unpack_int4(case["gate_up_weights"], 300)
    with pytest.raises(ValueError, match="down_weights must have the dtype int8, got int32"):
        kernels.mixture_of_experts(**{**case, "gate_up_weights": numbers})
    with pytest.raises(ValueError, match="gate_up_weights must have the dtype float32, got int64"):
        kernels.mixture_of_experts(**{**case, "gate_up_weights": case["gate_up_weights"].astype(np.int64)})
    with pytest.raises(
        ValueError, match=r"gate_up_weights must have an intermediate .*, got the shape .4, 0, 40."
    ):
        kernels.mixture_of_experts(**{**case, "gate_up_weights": case["gate_up_weights"][:, :0]})
    del case["gate_up_scale"], case["down_scale"]
    with pytest.raises(ValueError, match="gate_up_scale must be given: gate_up_weights has the dtype int32"):
        kernels.mixture_of_experts(**case)


def test_quantize_nothing():
    for shape in ([0, 4], [4, 0], [2, 0, 3], [0, 4, 4]):
        for granularity in GRANULARITIES:
            zeros = paddle.zeros(shape)
            assert paddle_moe.quantize(zeros, "int8", granularity, parts=1)[0].shape == shape
            words = paddle_moe.quantize(zeros, "int4", granularity, permuted=True, parts=1)[0]
            assert words.shape == [*shape[:-1], 8 * -(-shape[-1] // 64)]


def test_quantize_zeros_and_almost_nothing():
    for value in (0.0, 1e-44):
        quantised, scale = paddle_moe.quantize(paddle.full([4, 3], value))
        assert not quantised.numpy().any() and bool((scale == 1).all())


def test_quantize_refuses():
    weight = paddle.ones([4, 4])
    with pytest.raises(ValueError, match="weight must be finite, got infinity or NaN in it"):
        paddle_moe.quantize(paddle.full([4, 4], float("inf")))
    with pytest.raises(ValueError, match=r"weight must be float32, .* got int32 \[4, 4\]"):
        paddle_moe.quantize(weight.astype("int32"))
    with pytest.raises(ValueError, match="dtype must be 'int8', 'int4' or 'float8_e4m3fn', got 'int2'"):
        paddle_moe.quantize(weight, "int2")
    with pytest.raises(
        ValueError, match="permuted must be True for int4, which is stored .out, in., got False"
    ):
        paddle_moe.quantize(weight, "int4")
    with pytest.raises(
        ValueError, match="granularity must be 'tensor', 'channel', 'group' or 'block', got 'row'"
    ):
        paddle_moe.quantize(weight, granularity="row")
    with pytest.raises(
        ValueError, match="parts must be 2 for gate and up .*, else 1, with .*'block', got None"
    ):
        paddle_moe.quantize(weight, granularity="block")


# ---------------------------------------------------------------- FusedMoE


@per_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer(kind, dtype):
    layer = FusedMoE.from_dense(**dense_weights(dtype, **EVERYTHING), top_k=TOP_K, gate_dtype=dtype)
    x = paddle.to_tensor(tokens(dtype))
    with paddle.no_grad():
        exact = layer(x).astype("float32").numpy()
        twin = copy.deepcopy(layer)
        assert twin.quantize_(kind, "group") is twin
        output = twin(x)
        assert output.dtype == x.dtype
        error = relative_l2(output.astype("float32").numpy(), exact)
        assert 1e-3 < error < LAYER_ERROR[kind]
        assert_same_bits(layer(x).astype("float32").numpy(), exact)  # the other is left alone
        again = copy.deepcopy(twin)(x)
        assert bool((again == output).all())
        # Tokens of another dtype than the biases and gates of the layer.
        other = "bfloat16" if dtype == "float32" else "float32"
        converted = twin(x.astype(other))
        assert converted.dtype == getattr(paddle, other)
        assert relative_l2(converted.astype("float32").numpy(), output.astype("float32").numpy()) < 0.01
    stored_as = {"int8": paddle.int8, "int4": paddle.int32}.get(kind, paddle.uint8)
    stored = {name for name, value in twin.state_dict().items() if value.dtype == stored_as}
    names = ("gate_up_weight", "down_weight", "shared_gate_up_weight", "shared_down_weight")
    assert stored == set(names)
    assert not any(name in names for name, _ in twin.named_parameters())
    assert f"dtype={kind}, granularity={twin.granularity}" in repr(twin)


@per_kind
@pytest.mark.parametrize(("ep_size", "tp_size"), [(2, 1), (7, 1), (1, 3), (2, 2)])
def test_shards_of_a_layer(kind, ep_size, tp_size):
    """Their sum; with ep_size 7 two of them have no expert."""
    dense = dense_weights(bias=True, shared=tp_size > 1)
    whole, x = FusedMoE.from_dense(**dense, top_k=TOP_K), paddle.to_tensor(tokens())
    with paddle.no_grad():
        routing = whole.route(x)
        if tp_size == 1:  # each expert is quantised alone, whoever has it
            whole.quantize_(kind)
        total = np.zeros(x.shape)
        for rank in range(ep_size * tp_size):
            shard = Shard(rank // tp_size, ep_size, rank % tp_size, tp_size)
            part = FusedMoE.from_dense(**dense, top_k=TOP_K, parallel=shard).quantize_(kind)
            total += part.partial_output(x, *routing).numpy()
        error = relative_l2(total, whole.partial_output(x, *routing).numpy())
    assert error < (1e-6 if tp_size == 1 else LAYER_ERROR[kind])


@per_kind
def test_layer_is_saved_loaded_and_compiled(kind, tmp_path):
    layers = [FusedMoE(HIDDEN, 48, 6, TOP_K, seed=seed).quantize_(kind) for seed in (1, 2)]
    for layer in layers:
        layer.eval()
    paddle.save(layers[0].state_dict(), str(tmp_path / "state"))
    missing, unexpected = layers[1].set_state_dict(paddle.load(str(tmp_path / "state")))
    assert not missing and not unexpected
    x = paddle.to_tensor(tokens())
    with paddle.no_grad():
        expected = layers[0](x).numpy()
        assert_same_bits(layers[1](x).numpy(), expected)
    paddle.jit.save(layers[1], str(tmp_path / "program"), [paddle.static.InputSpec([None, HIDDEN])])
    assert_same_bits(paddle.jit.load(str(tmp_path / "program"))(x).numpy(), expected)


@per_kind
def test_a_layer_stored_out_in_is_quantised_alike(kind):
    layers = [FusedMoE.from_dense(**dense_weights(**EVERYTHING), top_k=TOP_K, permuted_weights=permuted)
              for permuted in (False, True)]  # fmt: skip
    states = [layer.quantize_(kind).state_dict() for layer in layers]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert_same_bits(states[1][name].numpy(), value.numpy())


def test_layer_says_what_it_cannot_do(tmp_path):
    layer = FusedMoE(HIDDEN, 48, 6, TOP_K).quantize_()
    with pytest.raises(RuntimeError, match="the expert weights of this layer are int8 already"):
        layer.quantize_()
    for function in (paddle_moe.save_moe_weights, paddle_moe.load_moe_weights):
        with pytest.raises(RuntimeError, match=r"experts of layers\['mlp'\] are int8 since quantize_\(\)"):
            function(tmp_path, {"mlp": layer}, "qwen3_moe")


def test_a_layer_that_cannot_be_quantised_is_left_alone():
    layer = FusedMoE(HIDDEN, 48, 6, TOP_K)
    with paddle.no_grad():
        layer.down_weight[3, 0, 0] = float("nan")
    before = {name: value.numpy() for name, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match=r"down_weight\[3\] must be finite, got infinity or NaN in it"):
        layer.quantize_()
    assert layer.quantized is None and set(before) == set(layer.state_dict())
    for name, value in layer.state_dict().items():
        assert_same_bits(value.numpy(), before[name])


def test_ranks_without_experts_refuse_the_same():
    layer = FusedMoE.from_dense(**dense_weights(), top_k=TOP_K, parallel=Shard(6, 7, 0, 1))
    with pytest.raises(ValueError, match="dtype must be 'int8', 'int4' or 'float8_e4m3fn', got 'int2'"):
        layer.quantize_("int2")
    with pytest.raises(ValueError, match="granularity must be"):
        layer.quantize_(granularity="row")
    layer.quantize_("float8_e4m3fn")
    assert layer.gate_up_weight.dtype == paddle.uint8 and layer.gate_up_weight.shape[0] == 0


def test_a_rank_without_experts_becomes_another_dtype():
    """Of empty tensors too it is the biases, not the buffers."""
    layer = FusedMoE.from_dense(**dense_weights(bias=True), top_k=TOP_K, parallel=Shard(6, 7, 0, 1))
    layer.quantize_().to(dtype="bfloat16")
    assert layer.gate_up_bias.dtype == layer.down_bias.dtype == paddle.bfloat16
    assert layer.gate_up_weight.dtype == layer.down_weight.dtype == paddle.int8
    assert layer.gate_up_scale.dtype == layer.down_scale.dtype == paddle.float32


@per_kind
def test_blocks_of_a_layer_hold_columns_of_gate_or_of_up(kind):
    """I = 200: blocks that go over both would be as many, and meet the wrong scales."""
    layer, x = FusedMoE(64, 200, 3, 2, seed=1), paddle.randn([20, 64])
    with paddle.no_grad():
        layer.gate_up_weight[:, :, 200:256] *= 50  # so that the next scale does not do for them
        exact = layer(x).numpy()
        layer.quantize_(kind, "block")
        assert relative_l2(layer(x).numpy(), exact) < 1.5 * LAYER_ERROR[kind]


def test_a_gpu_is_refused_before_anything_changes():
    place = types.SimpleNamespace(is_gpu_place=lambda: True)
    weight = types.SimpleNamespace(place=place, ndim=3, dtype=paddle.float32)
    with pytest.raises(
        RuntimeError, match="^down_weight is on .*, where no back end multiplies quantised weights"
    ):
        quantization.check_weight("down_weight", weight)


def test_lazy_layer():
    with paddle.LazyGuard():
        layer = FusedMoE(HIDDEN, 48, 6, TOP_K)
    with pytest.raises(RuntimeError, match="gate_up_weight has no values, as under paddle.LazyGuard"):
        layer.quantize_()


@pytest.mark.parametrize("twin", [False, True])
def test_wrappers_leave_quantised_shards_alone(monkeypatch, twin):
    """What paddle.DataParallel would send from one rank to the others: the gates only."""
    layer = FusedMoE.from_dense(**dense_weights(**EVERYTHING), top_k=TOP_K, parallel=Shard(0, 2, 0, 2))
    sent = []

    def synchronized(layer) -> list[str]:
        sent.clear()
        sync_params_buffers(layer, is_model_parallel=True)
        places = {tensor.data_ptr() for tensor in sent}
        return sorted(name for name, value in layer.state_dict().items() if value.data_ptr() in places)

    monkeypatch.setattr(parallel, "build_groups", lambda tensors, size: sent.extend(tensors) or [])
    before = synchronized(layer)
    assert "gate_weight" in before and "down_weight" not in before
    layer.quantize_()
    assert synchronized(copy.deepcopy(layer) if twin else layer) == before


def test_mistakes_are_seen():
    """What a wrong index of scales would give is far from the right result."""
    case = quantized_case(granularity="block")
    right = expected_moe(case)
    wrong = [{**case, "gate_up_scale": np.roll(case["gate_up_scale"], 1, axis)} for axis in (0, 1, 2)] + [
        {**case, "down_scale": np.roll(case["down_scale"], 1, axis)} for axis in (0, 1, 2)
    ]
    for one in wrong:
        with pytest.raises(AssertionError, match="relative L2 error"):
            assert_close(expected_moe(one).astype(np.float32), right)
