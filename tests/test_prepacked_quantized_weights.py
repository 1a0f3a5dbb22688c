"""Quantised weights that are prepacked: the operators, prepack_weights() and FusedMoE."""

from __future__ import annotations

import copy

import checks
import numpy as np
import paddle
import pytest
from checks import (
    assert_amax_close,
    assert_close,
    assert_same_bits,
    expected_moe,
    per_dtype,
    per_layout,
    relative_l2,
    run_python,
    to_float64,
)
from gradient_cases import (
    assert_gradients_close,
    assert_same_gradients,
    expected_gradients,
    grad_out_of,
    poisoned,
)
from layer_cases import EVERYTHING, TOP_K, Shard, dense_weights
from quantized_cases import (
    KINDS,
    dequantised,
    per_granularity,
    per_kind,
    per_storage,
    prepacked_quantised,
    quantized_case,
    slack_of,
)
from test_prepacked_weights import STATIC_PROGRAM
from test_quantized_gradients import WANTED, case_with_biases, gradients_of
from training_cases import autocast

import paddle_moe
from paddle_moe import FusedMoE, core, reference

# Past a block of the depth and groups of scales; of int4 the inputs are a multiple of 8.
SIZES = {"hidden": 304, "inter": 200}


@pytest.fixture(params=["core", "paddle"])
def backend(request):
    """Not on a GPU, which refuses prepacked weights."""
    return checks.Core() if request.param == "core" else checks.Paddle()


# ---------------------------------------------------------------- the operator


@per_storage
@per_granularity
@per_layout
def test_against_the_reference(backend, kind, granularity, layout, permuted):
    for dtype, num_tokens in (("float32", 9), ("bfloat16", 70), ("float16", 1), ("bfloat16", 5)):
        case = quantized_case(
            num_tokens, **SIZES, dtype=dtype, kind=kind, granularity=granularity, layout=layout,
            permuted=permuted, measurement_mode=True,
        )  # fmt: skip
        prepacked = prepacked_quantised(case)
        out, amax = backend.mixture_of_experts(**prepacked)
        expected, expected_amax = expected_moe(case)
        slack = slack_of(prepacked)
        assert_close(out, expected, slack)
        assert_amax_close(amax, expected_amax, 1.0 if slack == 1.0 else 20.0)


@per_kind
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_accuracy_in_half_precision(kind, dtype):
    """The error is that of rounding the right result once."""
    for num_tokens in (30, 200):
        case = quantized_case(
            num_tokens, **SIZES, dtype=dtype, kind=kind, granularity="group", permuted=kind == "int4"
        )
        expected = expected_moe(case)
        rounded = to_float64(reference.to_storage(expected, dtype))
        error = relative_l2(to_float64(core.mixture_of_experts(**prepacked_quantised(case))), expected)
        assert error < 1.2 * relative_l2(rounded, expected)


@per_kind
@pytest.mark.parametrize(
    ("hidden", "inter"), [(8, 8), (16, 24), (64, 320), (128, 136), (1032, 24), (2112, 64), (64, 2176)]
)
def test_sizes(kind, hidden, inter):
    for granularity in ("channel", "group", "block"):
        for dtype in ("float32", "bfloat16"):
            for num_tokens in (1, 4, 13, 60):
                case = quantized_case(
                    num_tokens, hidden, inter, 2, 1, dtype, kind=kind, granularity=granularity,
                    permuted=kind == "int4",
                )  # fmt: skip
                prepacked = prepacked_quantised(case)
                slack = max(2.0, slack_of(prepacked))
                assert_close(core.mixture_of_experts(**prepacked), expected_moe(case), slack)


@per_kind
@per_granularity
@per_dtype
def test_bits_of_a_token_do_not_depend_on_the_others(kind, granularity, dtype, threads):
    """Whatever converts the weights: one tile of rows, each of a few, or once for all of many, whose
    activations are more than stay in a cache."""
    case = assert_bits_of_some(kind, granularity, dtype, 1408 if dtype == "bfloat16" else 704)
    whole = core.mixture_of_experts(**case)
    assert_same_bits(core.mixture_of_experts(**case, chunk_size=7), whole)
    threads(1)
    assert_same_bits(core.mixture_of_experts(**case), whole)


def assert_bits_of_some(kind: str, granularity: str, dtype: str, hidden: int) -> dict:
    case = quantized_case(
        192, hidden, 72, 1, 1, dtype, kind=kind, granularity=granularity, permuted=kind == "int4"
    )
    case = prepacked_quantised(case)
    whole = core.mixture_of_experts(**case)
    per_token = ("hidden_states", "routing_table", "router_weights")
    for count in (1, 2, 5, 9, 14, 30, 60):
        some = {**case, **{name: case[name][-count:] for name in per_token}}
        assert_same_bits(core.mixture_of_experts(**some), whole[-count:])
    return case


@pytest.mark.parametrize("isa", core.available_isas()[1:])
def test_every_instruction_set(isa):
    run_python(
        "-c",
        "import test_prepacked_quantized_weights as t\n"
        f"for kind in {KINDS}:\n"
        "    t.test_sizes(kind, 264, 136)\n"
        "    t.assert_gradients_right('bfloat16', kind, 'group', 'stacked')\n"
        "    t.assert_bits_of_some(kind, 'group', 'bfloat16', 1408)\n",
        timeout=300,
        PADDLE_MOE_ISA=isa,
    )


def test_a_nan_of_fp8_is_one():
    case = quantized_case(9, 64, 48, 2, 1, "bfloat16", kind="float8_e4m3fn")
    case["down_weights"][1, 3, 5] = 0x7F
    out = core.mixture_of_experts(**prepacked_quantised(case))
    is_nan = np.isnan(reference.from_bf16_bits(out))
    chosen = case["routing_table"][:, 0] == 1
    assert chosen.any() and is_nan[chosen, 5].all() and is_nan.sum() == chosen.sum()


def test_refuses():
    case = prepacked_quantised(quantized_case(9, 64, 48, kind="int8"))
    int4 = prepacked_quantised(quantized_case(9, 64, 48, kind="int4", permuted=True))
    for call, text in (
        (
            {**case, "down_weights": case["down_weights"].view(np.uint8)},
            "down_weights must have the dtype int8, got uint8",
        ),
        (
            {**case, "hidden_states": np.zeros((9, 63), np.float32)},
            "hidden_states must have a multiple of 2 columns .* of the dtype int8, got 63",
        ),
        (
            {**int4, "hidden_states": np.zeros((9, 60), np.float32)},
            "hidden_states must have a multiple of 8 columns .* of the dtype int4 in int32, got 60",
        ),
        (
            {**int4, "down_weights": int4["down_weights"][:, :3]},
            r"down_weights must have the shape \[E_l, ceil\(H / 16\), I / 8, 16\] = \[4, 4, 6, 16\], got",
        ),
        (
            {**case, "gate_up_weights": case["gate_up_weights"][..., :16]},
            r"gate_up_weights must have the shape .* H / 2, 32\] = \[4, 6, 32, 32\], got \[4, 6, 32, 16\]",
        ),
        (
            {**case, "down_scale": np.ones((4, 64, 1), np.float32)},
            r"down_scale must have the shape \[4, 1\] \(a scale per matrix\), \[4, 64\] .* got \[4, 64, 1\]",
        ),
        ({**case, "permuted_weights": True}, "permuted_weights must be False with prepacked weights"),
        ({**case, "gate_up_scale": None}, "gate_up_scale must be given"),
    ):
        with pytest.raises(ValueError, match=text):
            core.mixture_of_experts(**call)


@pytest.mark.parametrize("pir", ["0", "1"], ids=["old_program", "pir"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_static_programs(pir, kind, tmp_path):
    case = quantized_case(9, 64, 48, kind=kind, granularity="group", permuted=kind == "int4")
    case = prepacked_quantised(case)
    expected = core.mixture_of_experts(**case)
    del case["permuted_weights"]
    np.savez(tmp_path / "case.npz", **case)
    files = str(tmp_path / "case.npz"), str(tmp_path / "out.npy")
    run_python("-c", STATIC_PROGRAM, *files, timeout=300, FLAGS_enable_pir_api=pir)
    assert_same_bits(np.load(tmp_path / "out.npy"), expected)


# ---------------------------------------------------------------- gradients


def assert_gradients_right(dtype: str, kind: str, granularity: str, layout: str) -> None:
    for num_tokens in (5, 30):
        stored = case_with_biases(
            num_tokens, **SIZES, dtype=dtype, kind=kind, granularity=granularity, layout=layout,
            permuted=kind == "int4",
        )  # fmt: skip
        case, grad_out = prepacked_quantised(stored), grad_out_of(stored)
        expected = expected_gradients(dequantised(stored), grad_out)
        gradients = gradients_of(case, grad_out)
        wanted = {name: expected[name] for name in WANTED if name in case}
        assert_gradients_close(gradients, wanted, dtype)
        shape = (core.pre_activation_rows(**case), 2 * SIZES["inter"])
        kept = poisoned(np.empty(shape, case["hidden_states"].dtype))
        core.mixture_of_experts(**case, pre_activations=kept)
        assert_same_gradients(gradients_of(case, grad_out, kept), gradients)


@per_kind
@per_granularity
@per_layout
def test_gradients(kind, granularity, layout):
    for dtype in ("float32", "bfloat16"):
        assert_gradients_right(dtype, kind, granularity, layout)


def test_weights_have_no_gradient():
    case = prepacked_quantised(quantized_case(9, 64, 48))
    with pytest.raises(ValueError, match="gate_up_weights has no gradient where the weights are prepacked"):
        core.mixture_of_experts_backward(grad_out_of(case), **case, wanted=("gate_up_weights",))


# ---------------------------------------------------------------- prepack_weights


def test_where_each_number_goes():
    """As moe.h says it."""
    rng = np.random.default_rng(0)
    for int4 in (False, True):
        weight = rng.integers(-8, 8, (2, 16, 40)).astype(np.int8)
        packed = reference.prepack_weights(weight, 2, int4)
        assert packed.shape == ((2, 4, 2, 16) if int4 else (2, 4, 8, 32))
        for e, i, o in np.ndindex(weight.shape):
            part, column = divmod(o, 20)
            panel = packed[e, 2 * part + column // 16]
            if int4:
                number = panel[i // 8, column % 16] >> (i % 8 // 2 * 4 + i % 2 * 16) & 15
                assert number == weight[e, i, o] & 15
            else:
                assert panel[i // 2, i % 2 * 16 + column % 16] == weight[e, i, o]
        assert np.count_nonzero(reference.unpack_8_or_4_bits(packed, 40, 2) - weight) == 0


@per_kind
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("granularity", ["channel", "group", "block"])
@pytest.mark.parametrize(("parts", "outputs"), [(1, 33), (2, 64), (2, 300)])
def test_there_and_back(kind, permuted, granularity, parts, outputs):
    if kind == "int4" and not permuted:
        with pytest.raises(ValueError, match="permuted must be True for int4, which is stored"):
            paddle_moe.prepack_weights(
                paddle.zeros([2, 8, outputs], "int32"), paddle.ones([2, 1]), parts=parts
            )
        return
    weight = paddle.randn([3, outputs, 136] if permuted else [3, 136, outputs])
    options = {"parts": parts, "permuted": permuted}
    stored, scale = paddle_moe.quantize(weight, kind, granularity, **options)
    extra = {"inputs": 136} if kind == "int4" else {}
    packed, turned = paddle_moe.prepack_weights(stored, scale, **options, **extra)
    expected = scale.numpy().swapaxes(1, 2) if permuted else scale.numpy()
    assert_same_bits(turned.numpy(), expected)
    back = paddle_moe.unpack_weights(packed, outputs, **options)
    assert_same_bits(back.numpy(), (stored.view("uint8") if kind == "float8_e4m3fn" else stored).numpy())
    one, of_one = paddle_moe.prepack_weights(stored[1], scale[1], **options, **extra)
    assert_same_bits(one.numpy(), packed[1:2].numpy())
    assert_same_bits(of_one.numpy(), turned[1:2].numpy())


def test_prepack_refuses():
    pack = paddle_moe.prepack_weights
    numbers, scale = paddle.zeros([2, 4, 6], "int8"), paddle.ones([2, 6])
    words = paddle.zeros([2, 6, 8], "int32")
    for call, text in (
        (lambda: pack(numbers, parts=1), "scale must be given: weight has the dtype int8"),
        (
            lambda: pack(numbers.astype("float32"), scale, parts=1),
            "scale must not be given: weight has the dtype float32",
        ),
        (lambda: pack(numbers[:, :3], scale, parts=1), "an even number of inputs in int8, .* got 3"),
        (
            lambda: pack(words, scale, parts=1, permuted=True, inputs=60),
            "weight must have a multiple of 8 of inputs in int4, .* holds 8, got 60",
        ),
        (
            lambda: pack(words, scale, parts=1, permuted=True, inputs=65),
            "inputs must be 64 or up to 63 less, as many as the words hold, got 65",
        ),
        (lambda: pack(numbers, scale, parts=4), "a multiple of parts = 4 outputs, got 6"),
        (lambda: pack(numbers, 1.0, parts=1), "scale must be a paddle.Tensor, got float"),
        (
            lambda: pack(numbers, paddle.ones([3, 6]), parts=1),
            r"scale must be float32 with E = 2 in front of up to 2 dimensions, got float32 \[3, 6\]",
        ),
        (
            lambda: pack(numbers[0], scale.astype("float16"), parts=1),
            r"scale must be float32 with up to 2 dimensions, got float16 \[2, 6\]",
        ),
        (lambda: pack(numbers, scale, parts=1, inputs=4), "inputs must not be given: .* int8, whose shape"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


# ---------------------------------------------------------------- FusedMoE


SIZE = 24  # of the hidden states, a multiple of 8


def layer_of(kind: str, granularity: str | None = None, parallel=None, seed: int = 3) -> FusedMoE:
    """Of sizes that int4 can be prepacked in, also over 2, 3, 4 and 7 ranks."""
    layer = FusedMoE(SIZE, 96, 6, TOP_K, seed=seed, parallel=parallel, shared_intermediate_size=672)
    return layer.quantize_(kind, granularity)


def tokens_of_layer() -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(5).standard_normal((11, SIZE), np.float32))


def state_of(layer: FusedMoE) -> dict[str, np.ndarray]:
    return {name: value.astype("float32").numpy() for name, value in layer.state_dict().items()}


@per_kind
@per_granularity
def test_layer(kind, granularity, tmp_path):
    layer, x = layer_of(kind, granularity), tokens_of_layer()
    before = state_of(layer)
    with paddle.no_grad():
        expected = layer(x).numpy()
        assert layer.prepack_() is layer and layer.prepacked and layer.quantized == kind
        scales = [value for name, value in layer.named_buffers() if name.endswith("_scale")]
        assert len(scales) == 4 and all(scale.is_contiguous() for scale in scales)  # else each call copies
        assert relative_l2(layer(x).numpy(), expected) < 1e-6
        assert "prepacked" in repr(layer)
        once = layer(x).numpy()
        assert_same_bits(copy.deepcopy(layer)(x).numpy(), once)
        other = layer_of(kind, granularity, seed=4).prepack_()
        paddle.save(layer.state_dict(), str(tmp_path / "state"))
        missing, unexpected = other.set_state_dict(paddle.load(str(tmp_path / "state")))
        assert not missing and not unexpected
        assert_same_bits(other(x).numpy(), once)
        with autocast("O1", "bfloat16"):
            assert relative_l2(layer(x).astype("float32").numpy(), expected) < 1e-2
        assert layer.unpack_() is layer and not layer.prepacked and layer.quantized == kind
        assert all(value.is_contiguous() for value in layer.buffers())
        assert_same_bits(layer(x).numpy(), expected)
    after = state_of(layer)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert_same_bits(after[name], value)


def gradients_through(layer: FusedMoE) -> dict[str, np.ndarray]:
    x = tokens_of_layer()
    x.stop_gradient = False
    (layer(x) * tokens_of_layer().flip(0)).sum().backward()
    trained = {name: value for name, value in layer.named_parameters() if value.grad is not None}
    return {name: value.grad.numpy() for name, value in {"x": x, **trained}.items()}


@per_kind
def test_router_and_gates_of_a_layer_train(kind):
    expected = gradients_through(layer_of(kind))
    gradients = gradients_through(layer_of(kind).prepack_())
    assert "gate_weight" in gradients
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert relative_l2(gradient, expected[name]) < 2e-6, name


@per_kind
@pytest.mark.parametrize(("ep_size", "tp_size"), [(7, 1), (1, 3), (2, 2)])
def test_shards_of_a_layer(kind, ep_size, tp_size):
    """With ep_size 7 one of them has no expert."""
    x = tokens_of_layer()
    with paddle.no_grad():
        routing = layer_of(kind).route(x)
        for rank in range(ep_size * tp_size):
            shard = Shard(rank // tp_size, ep_size, rank % tp_size, tp_size)
            part = layer_of(kind, parallel=shard)
            expected = part.partial_output(x, *routing).numpy()
            prepacked = part.prepack_().partial_output(x, *routing).numpy()
            assert np.abs(prepacked - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())
            flags = vars(part.down_weight)
            assert flags["is_distributed"] and flags["expert"] and flags["shard_group"] == "grid"
            assert vars(part.down_scale)["shard_group"] == "grid"
            part.unpack_()
            assert_same_bits(part.partial_output(x, *routing).numpy(), expected)


def test_a_layer_becomes_another_dtype_and_is_compiled(tmp_path):
    layer, x = layer_of("int4").prepack_(), tokens_of_layer()
    layer.eval()
    with paddle.no_grad():
        expected = layer(x).numpy()
        spec = paddle.static.InputSpec([None, SIZE], "float32")
        paddle.jit.save(layer, str(tmp_path / "program"), [spec])
        assert_same_bits(paddle.jit.load(str(tmp_path / "program"))(x).numpy(), expected)
        layer.to(dtype="bfloat16")
        out = layer(x.astype("bfloat16")).astype("float32").numpy()
    assert relative_l2(out, expected) < 2e-2


def test_layer_says_what_it_cannot_do(tmp_path):
    layer = layer_of("int8").prepack_()
    with pytest.raises(RuntimeError, match="are prepacked already"):
        layer.prepack_()
    with pytest.raises(RuntimeError, match="are int8 already"):
        layer.quantize_("int4")
    with pytest.raises(RuntimeError, match=r"are prepacked, which no file holds; call unpack_\(\) first"):
        paddle_moe.save_checkpoint(tmp_path / "checkpoint", layer)
    # Of 10 columns 4, 3 and 3.
    odd = FusedMoE.from_dense(**dense_weights(**EVERYTHING), top_k=TOP_K, parallel=Shard(0, 1, 0, 3))
    odd.quantize_("int8")
    with pytest.raises(ValueError, match="down_weight of a rank must have an even number .* int8, .* got 3"):
        odd.prepack_()
    assert not odd.prepacked and odd.quantized == "int8"
    four_bits = FusedMoE(SIZE, 44, 6, TOP_K).quantize_("int4")
    with pytest.raises(ValueError, match="must have a multiple of 8 of inputs in int4, .* got 44"):
        four_bits.prepack_()
