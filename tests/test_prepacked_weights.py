"""Prepacked weights: mixture_of_experts with them, prepack_weights() and FusedMoE.prepack_()."""

from __future__ import annotations

import copy
import pickle

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
    random_case,
    relative_l2,
    run_python,
)
from gradient_cases import (
    assert_gradients_close,
    assert_same_gradients,
    expected_gradients,
    grad_out_of,
    poisoned,
)
from layer_cases import EVERYTHING, HIDDEN, TOP_K, Shard, dense_weights, tokens
from paddle.utils import unique_name
from training_cases import autocast, gradients_of_layer

import paddle_moe
from paddle_moe import FusedMoE, core, layer_weights, reference

WANTED = ("hidden_states", "router_weights", "gate_up_bias", "down_bias")


@pytest.fixture(params=["core", "paddle"])
def backend(request):
    """Not on a GPU, which refuses prepacked weights."""
    return checks.Core() if request.param == "core" else checks.Paddle()


def prepacked(case: dict) -> dict:
    """The same call with prepacked weights."""
    separate = len(case["gate_up_weights"]) == 2 * len(case["down_weights"])

    def pack(weights, parts):
        if isinstance(weights, list):
            return [reference.prepack_weights(one[None], parts) for one in weights]
        return reference.prepack_weights(weights, parts)

    gate_up = pack(case["gate_up_weights"], 1 if separate else 2)
    return {**case, "gate_up_weights": gate_up, "down_weights": pack(case["down_weights"], 1)}


def as_tensors(case: dict) -> dict:
    return {name: paddle.to_tensor(a) if isinstance(a, np.ndarray) else a for name, a in case.items()}


# ---------------------------------------------------------------- the operator


@per_dtype
@per_layout
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_against_the_reference(backend, dtype, layout, bias):
    for num_tokens in (1, 9, 70):
        case = random_case(
            num_tokens, 300, 200, 4, dtype=dtype, layout=layout, bias=bias, measurement_mode=True
        )
        out, amax = backend.mixture_of_experts(**prepacked(case))
        expected, expected_amax = expected_moe(case)
        assert_close(out, expected)
        assert_amax_close(amax, expected_amax)


@per_dtype
@pytest.mark.parametrize(
    ("hidden", "inter"),
    [(2, 2), (6, 14), (64, 320), (126, 130), (256, 258), (1030, 20), (2112, 64), (64, 2176), (1000, 778)],
)
def test_the_bits_of_weights_stored_in_out(dtype, hidden, inter):
    """Whatever the rows of an expert: one, a few, those that stream, and those that are packed."""
    for num_tokens in (1, 3, 6, 13, 30, 250):
        case = random_case(num_tokens, hidden, inter, 2, 1, dtype, layout="stacked")
        expected = core.mixture_of_experts(**case)
        assert_same_bits(core.mixture_of_experts(**prepacked(case)), expected)


@pytest.mark.parametrize("inter", [1, 3, 17, 777])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_odd_sizes(dtype, inter):
    for num_tokens in (1, 40):
        case = random_case(num_tokens, 33, inter, 2, 1, dtype, layout="separate")
        assert_same_bits(core.mixture_of_experts(**prepacked(case)), core.mixture_of_experts(**case))


@per_dtype
def test_more_activations_than_stay_in_a_cache(dtype):
    """Then all panels go through a block of the depth before the next."""
    case = random_case(200, 2048, 160, 1, 1, dtype, layout="stacked")
    assert_same_bits(core.mixture_of_experts(**prepacked(case)), core.mixture_of_experts(**case))


@per_dtype
def test_bits_of_a_token_do_not_depend_on_the_others(dtype, threads):
    case = prepacked(random_case(50, 300, 200, 2, 1, dtype, layout="stacked"))
    whole = core.mixture_of_experts(**case)
    per_token = ("hidden_states", "routing_table", "router_weights")
    for count in (1, 2, 5, 9, 14, 30):
        some = {**case, **{name: case[name][-count:] for name in per_token}}
        assert_same_bits(core.mixture_of_experts(**some), whole[-count:])
    assert_same_bits(core.mixture_of_experts(**case, chunk_size=7), whole)
    threads(1)
    assert_same_bits(core.mixture_of_experts(**case), whole)


@pytest.mark.parametrize("isa", core.available_isas()[1:])
def test_every_instruction_set(isa):
    run_python(
        "-c",
        "import test_prepacked_weights as t\n"
        "for dtype in ('float32', 'bfloat16', 'float16'):\n"
        "    t.test_the_bits_of_weights_stored_in_out(dtype, 606, 130)\n"
        "    t.assert_gradients_right(dtype, 'stacked')\n",
        timeout=300,
        PADDLE_MOE_ISA=isa,
    )


def test_experts_far_apart():
    case = random_case(9, 64, 48, layout="stacked")
    expected = core.mixture_of_experts(**case)
    case = prepacked(case)
    for name in ("gate_up_weights", "down_weights"):
        wide = poisoned(np.empty((2 * len(case[name]), *case[name].shape[1:]), np.float32))
        wide[::2] = case[name]
        case[name] = wide[::2]
    assert_same_bits(core.mixture_of_experts(**case), expected)


def test_a_local_range_and_ids_outside():
    case = random_case(20, 64, 48, layout="stacked", experts_min=3, experts_max=7)
    case["routing_table"] = np.random.default_rng(1).integers(-1, 10, case["routing_table"].shape)
    assert_same_bits(core.mixture_of_experts(**prepacked(case)), core.mixture_of_experts(**case))


def test_fused_gate_moe(backend):
    case = random_case(21, 64, 48, layout="stacked")
    for name in ("routing_table", "router_weights"):
        del case[name]
    case["gate_weight"] = np.random.default_rng(1).standard_normal((64, 5)).astype(np.float32)
    expected = backend.fused_gate_moe(**case, top_k=2)
    assert_same_bits(backend.fused_gate_moe(**prepacked(case), top_k=2), expected)


def without(case: dict, **changes) -> dict:
    return {**case, **changes}


def test_refuses():
    stacked = random_case(9, 64, 48, layout="stacked")
    case, bf16 = prepacked(stacked), prepacked(random_case(9, 64, 48, dtype="bfloat16", layout="stacked"))
    down = case["down_weights"]
    wrong = [
        (dict(permuted_weights=True), "permuted_weights must be False with prepacked weights, .* got True"),
        (
            dict(gate_up_weights=stacked["gate_up_weights"]),
            r"both be prepacked, .* or neither, got the shapes \[5, 64, 96\] and \[5, 4, 48, 16\]",
        ),
        (
            dict(down_weights=stacked["down_weights"]),
            r"both be prepacked, .* or neither, got the shapes \[5, 6, 64, 16\] and \[5, 48, 64\]",
        ),
        (
            dict(gate_up_weights=case["gate_up_weights"][:, :5]),
            r"gate_up_weights must have the shape \[E_l, 2 \* ceil\(I / 16\), H, 16\] = \[5, 6, 64, 16\], "
            r"got \[5, 5, 64, 16\]",
        ),
        (
            dict(down_weights=down[:, :3]),
            r"down_weights must have the shape \[E_l, ceil\(H / 16\), I, 16\] = \[5, 4, 48, 16\], got",
        ),
        (
            dict(hidden_states=case["hidden_states"][:, :62]),
            r"gate_up_weights must have the shape .* = \[5, 6, 62, 16\], got \[5, 6, 64, 16\]",
        ),
        (
            dict(down_weights=np.concatenate([down, down], 3)[..., :16].swapaxes(2, 3).copy().swapaxes(2, 3)),
            "down_weights must be contiguous",
        ),
        (dict(down_weights=down.astype(np.int8)), "dtype"),
        (dict(gate_up_weights=bf16["gate_up_weights"]), "gate_up_weights must have the"),
        (dict(down_weights=bf16["down_weights"]), "must have the"),
        (
            dict(gate_up_scale=np.ones(1, np.float32), down_scale=np.ones(1, np.float32)),
            "gate_up_scale must not be given: gate_up_weights is not quantised",
        ),
    ]
    for changes, text in wrong:
        with pytest.raises(ValueError, match=text):
            core.mixture_of_experts(**without(case, **changes))
    with pytest.raises(ValueError, match="gate_up_weights must have the dtype bfloat16, got float32"):
        core.mixture_of_experts(**without(case, hidden_states=bf16["hidden_states"]))
    with pytest.raises(
        ValueError, match=r"down_weights must have the shape .* I / 2, 32\] = \[5, 4, 48, 32\]"
    ):
        panels = {name: case[name].astype(np.uint16) for name in ("gate_up_weights", "down_weights")}
        core.mixture_of_experts(**without(bf16, **panels))
    odd = np.zeros((9, 65), np.uint16)
    with pytest.raises(
        ValueError, match="hidden_states must have a multiple of 2 columns .* bfloat16, got 65"
    ):
        core.mixture_of_experts(**without(bf16, hidden_states=odd))
    listed = prepacked(random_case(9, 64, 48))
    listed["down_weights"][3] = np.concatenate([listed["down_weights"][3]] * 2)
    with pytest.raises(
        ValueError, match=r"down_weights\[3\] must have the shape \[1, ceil\(H / 16\), I, 16\]"
    ):
        core.mixture_of_experts(**listed)


STATIC_PROGRAM = """
import sys, numpy as np, paddle, paddle_moe

case = dict(np.load(sys.argv[1]))
dtypes = {np.dtype("uint16"): "bfloat16"}
paddle.enable_static()
with paddle.static.program_guard(paddle.static.Program()):
    inputs = {}
    for name, array in case.items():
        per_token = name in ("hidden_states", "routing_table", "router_weights")
        shape = [-1, *array.shape[1:]] if per_token else array.shape
        inputs[name] = paddle.static.data(name, shape, dtypes.get(array.dtype, str(array.dtype)))
    out = paddle_moe.mixture_of_experts(**inputs)
    assert list(out.shape) == [-1, case["hidden_states"].shape[1]], out.shape
    result = paddle.static.Executor().run(feed=case, fetch_list=[out])[0]
np.save(sys.argv[2], result)
"""


@pytest.mark.parametrize("pir", ["0", "1"], ids=["old_program", "pir"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_static_programs(pir, dtype, tmp_path):
    case = random_case(9, 64, 48, dtype=dtype, layout="stacked")
    expected = core.mixture_of_experts(**case)
    case = prepacked(case)
    del case["permuted_weights"]
    np.savez(tmp_path / "case.npz", **case)
    files = str(tmp_path / "case.npz"), str(tmp_path / "out.npy")
    run_python("-c", STATIC_PROGRAM, *files, timeout=300, FLAGS_enable_pir_api=pir)
    assert_same_bits(np.load(tmp_path / "out.npy"), expected)


def test_autocast_to_another_dtype_is_refused():
    """The weights would be converted, but not put into the order of the other dtype."""
    tensors = as_tensors(prepacked(random_case(9, 64, 48, layout="stacked")))
    with autocast("O1", "bfloat16"), pytest.raises(ValueError, match="must have the shape .* / 2, 32"):
        paddle_moe.mixture_of_experts(**tensors)


# ---------------------------------------------------------------- gradients


def case_with_biases(num_tokens: int, dtype: str, layout: str) -> dict:
    """Past a block of the depth and of the columns of a gradient's product; one expert has no tokens."""
    case = random_case(num_tokens, 300, 270, 4, dtype=dtype, layout=layout, bias=True)
    case["routing_table"][case["routing_table"] == 1] = -1
    return case


def gradients_of(case: dict, grad_out: np.ndarray, **options) -> core.Gradients:
    """By core; the workspace starts as NaN."""
    size = core.backward_workspace_size(grad_out, **case, wanted=WANTED)
    out = core.Gradients(**{name: poisoned(case[name]) for name in WANTED})
    workspace = np.full(size, 0xFF, np.uint8)
    return core.mixture_of_experts_backward(
        grad_out, **case, wanted=WANTED, out=out, workspace=workspace, **options
    )


def assert_gradients_right(dtype: str, layout: str) -> None:
    for num_tokens in (1, 5, 70):
        case = case_with_biases(num_tokens, dtype, layout)
        grad_out = grad_out_of(case)
        expected = expected_gradients(case, grad_out)
        gradients = gradients_of(prepacked(case), grad_out)
        assert_gradients_close(gradients, {name: expected[name] for name in WANTED}, dtype)
        rows = core.pre_activation_rows(**prepacked(case))
        kept = poisoned(np.empty((rows, 540), case["hidden_states"].dtype))
        core.mixture_of_experts(**prepacked(case), pre_activations=kept)
        assert_same_gradients(gradients_of(prepacked(case), grad_out, pre_activations=kept), gradients)


@per_dtype
@per_layout
def test_gradients(dtype, layout):
    assert_gradients_right(dtype, layout)


def test_weights_have_no_gradient():
    case = prepacked(random_case(layout="stacked"))
    for name in ("gate_up_weights", "down_weights"):
        with pytest.raises(ValueError, match=f"^{name} has no gradient where the weights are prepacked; "):
            core.mixture_of_experts_backward(grad_out_of(case), **case, wanted=(name,))
        tensors = as_tensors(case)
        tensors[name].stop_gradient = False
        out = paddle_moe.mixture_of_experts(**tensors)  # a call may be for inference
        with pytest.raises(ValueError, match=f"{name} has no gradient where the weights are prepacked"):
            out.sum().backward()
    gradients = core.mixture_of_experts_backward(grad_out_of(case), **case)
    assert sorted(name for name, one in gradients._asdict().items() if one is not None) == [
        "hidden_states",
        "router_weights",
    ]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "to_static"])
def test_paddle_computes_the_same_gradients(compiled):
    case = prepacked(case_with_biases(30, "bfloat16", "stacked"))
    grad_out = grad_out_of(case)
    expected = gradients_of(case, grad_out)
    tensors = as_tensors(case)
    for name in WANTED:
        tensors[name].stop_gradient = False
    call = paddle.jit.to_static(paddle_moe.mixture_of_experts) if compiled else paddle_moe.mixture_of_experts
    call(**tensors).backward(paddle.to_tensor(grad_out))
    for name in WANTED:
        assert_same_bits(tensors[name].grad.numpy(), getattr(expected, name))


# ---------------------------------------------------------------- prepack_weights


def bits(tensor: paddle.Tensor) -> np.ndarray:
    return tensor.view("uint16").numpy() if tensor.dtype == paddle.bfloat16 else tensor.numpy()


@per_dtype
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(("parts", "outputs"), [(1, 33), (1, 16), (2, 66), (2, 64), (2, 2)])
def test_there_and_back(dtype, permuted, parts, outputs):
    weight = paddle.randn([3, 10, outputs]).astype(dtype)
    stored = weight.transpose([0, 2, 1]) if permuted else weight
    packed = paddle_moe.prepack_weights(stored, parts=parts, permuted=permuted)
    assert_same_bits(bits(packed), reference.prepack_weights(bits(weight), parts))
    one = paddle_moe.prepack_weights(stored[1], parts=parts, permuted=permuted)
    assert_same_bits(bits(one), bits(packed[1:2]))
    back = paddle_moe.unpack_weights(packed, outputs, parts=parts, permuted=permuted)
    assert_same_bits(bits(back), bits(stored))
    with autocast("O1", "bfloat16"):
        again = paddle_moe.prepack_weights(stored, parts=parts, permuted=permuted)
        back = paddle_moe.unpack_weights(again, outputs, parts=parts, permuted=permuted)
    assert_same_bits(bits(again), bits(packed))
    assert_same_bits(bits(back), bits(stored))


@pytest.mark.parametrize(("dtype", "inputs"), [(np.float32, 1), (np.uint16, 2)])
def test_where_each_weight_goes(dtype, inputs):
    """As moe.h says it."""
    weight = np.arange(2 * 6 * 40, dtype=dtype).reshape(2, 6, 40)
    packed = reference.prepack_weights(weight, 2)
    assert packed.shape == (2, 4, 6 // inputs, 16 * inputs)
    for e, i, o in np.ndindex(weight.shape):
        part, column = divmod(o, 20)
        row, first = divmod(i, inputs)
        place = e, 2 * part + column // 16, row, column % 16 * inputs + first
        assert packed[place] == weight[e, i, o]
        packed[place] = 0
    assert not packed.any()  # what completes a panel


def test_prepack_refuses():
    pack, unpack = paddle_moe.prepack_weights, paddle_moe.unpack_weights
    matrix = paddle.zeros([4, 6])
    for call, text in (
        (lambda: pack(np.zeros((2, 4, 6)), parts=1), "weight must be a paddle.Tensor, got numpy.ndarray"),
        (lambda: pack(matrix.astype("int64"), parts=1), r"weight must be float32, .* got int64 \[4, 6\]"),
        (lambda: pack(matrix[0], parts=1), r"weight must be .* the shape \[E, in, out\], got float32 \[6\]"),
        (lambda: pack(matrix, parts=4), "weight must have a multiple of parts = 4 outputs, got 6"),
        (lambda: pack(matrix, parts=0), "parts must be"),
        (lambda: pack(matrix, parts=1, permuted=1), "permuted must be"),
        (
            lambda: pack(paddle.zeros([3, 6], "bfloat16"), parts=1),
            "weight must have an even number of inputs in bfloat16, .* got 3",
        ),
        (
            lambda: unpack(matrix, 6, parts=1),
            r"weight must be .* \[E, panels, rows, 16 or 32\], got float32 \[4, 6\]",
        ),
        (
            lambda: unpack(pack(matrix, parts=1), 17, parts=1),
            r"weight must have the shape \[E, 1 \* ceil\(17 / 1 / 16\)",
        ),
        (
            lambda: unpack(pack(matrix, parts=1).astype("bfloat16"), 6, parts=1),
            r"rows, 32\], got \[1, 1, 4, 16\]",
        ),
        (
            lambda: unpack(pack(matrix, parts=2), 5, parts=2),
            r"weight must have the shape .*, got \[1, 2, 4, 16\]",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            call()


# ---------------------------------------------------------------- FusedMoE


@pytest.mark.parametrize("permuted", [False, True])
def test_layer(permuted):
    dense = dense_weights(**EVERYTHING)
    plain = FusedMoE.from_dense(**dense, top_k=TOP_K)
    layer = FusedMoE.from_dense(**dense, top_k=TOP_K, permuted_weights=permuted)
    before = {name: value.numpy() for name, value in layer.state_dict().items()}
    x = paddle.to_tensor(tokens())
    with paddle.no_grad():
        expected = plain(x).numpy()
        assert layer.prepack_() is layer and layer.prepacked
        assert_same_bits(layer(x).numpy(), expected)
        assert_same_bits(copy.deepcopy(layer)(x).numpy(), expected)
    frozen = {"gate_up_weight", "down_weight", "shared_gate_up_weight", "shared_down_weight"}
    assert not frozen & {name for name, _ in layer.named_parameters()}
    assert frozen < set(layer.state_dict()) and "prepacked" in repr(layer)
    assert layer.unpack_() is layer and not layer.prepacked
    after = layer.state_dict()
    assert set(after) == set(before)
    for name, value in before.items():
        assert_same_bits(after[name].numpy(), value)
    assert frozen < {name for name, _ in layer.named_parameters()} and "prepacked" not in repr(layer)


def test_router_gates_and_biases_of_a_layer_train():
    dense = dense_weights(**EVERYTHING)
    expected = gradients_of_layer(FusedMoE.from_dense(**dense, top_k=TOP_K))
    gradients = gradients_of_layer(FusedMoE.from_dense(**dense, top_k=TOP_K).prepack_())
    frozen = {"gate_up_weight", "down_weight", "shared_gate_up_weight", "shared_down_weight"}
    assert gradients.keys() == expected.keys() - frozen
    for name, gradient in gradients.items():
        assert relative_l2(gradient, expected[name]) < 2e-6, name


def test_an_unpacked_layer_trains():
    dense = dense_weights(**EVERYTHING)
    expected = gradients_of_layer(FusedMoE.from_dense(**dense, top_k=TOP_K))
    gradients = gradients_of_layer(FusedMoE.from_dense(**dense, top_k=TOP_K).prepack_().unpack_())
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_same_bits(gradient, expected[name])


def test_an_unpacked_layer_trains_as_before():
    layer = FusedMoE(HIDDEN, 48, 6, TOP_K)
    layer.gate_up_weight.stop_gradient = True
    layer.down_weight.optimize_attr["learning_rate"] = 0.5
    for _ in range(2):
        layer.prepack_().unpack_()
        assert layer.gate_up_weight.stop_gradient and not layer.down_weight.stop_gradient
        assert layer.down_weight.optimize_attr["learning_rate"] == 0.5


def test_an_unpacked_layer_fits_the_saved_state_of_an_optimizer():
    layer = FusedMoE(HIDDEN, 48, 6, TOP_K, gate_up_bias=True)

    def trained_for_a_step(state: dict | None = None) -> dict:
        with unique_name.guard():  # as in a new process: else the accumulators of a second optimizer count on
            optimizer = paddle.optimizer.AdamW(parameters=layer.parameters())
            if state is not None:
                optimizer.set_state_dict(state)
            layer(paddle.to_tensor(tokens())).sum().backward()
            optimizer.step()
        return optimizer.state_dict()

    names = [(name, parameter.name) for name, parameter in layer.named_parameters()]
    state = trained_for_a_step()
    twin = copy.deepcopy(layer.prepack_())
    layer.unpack_()
    assert [(name, parameter.name) for name, parameter in layer.named_parameters()] == names
    assert set(trained_for_a_step(state)) == set(state)
    layer.prepack_()
    layer.adapter = layer.create_parameter([HIDDEN, 4])
    del layer.gate_up_bias
    pickled = pickle.loads(pickle.dumps(layer))
    assert [name for name, _ in layer.unpack_().named_parameters()] == [
        *(name for name, _ in names if name != "gate_up_bias"),
        "adapter",
    ]
    assert not {one.name for one in pickled.unpack_().parameters()} & {one.name for one in layer.parameters()}
    of_both = [parameter.name for one in (layer, twin.unpack_()) for parameter in one.parameters()]
    assert len(of_both) == len(set(of_both))


@pytest.mark.parametrize("quantised", [False, True])
def test_a_layer_is_left_as_it_was_where_memory_ends(quantised, monkeypatch):
    layer, x = FusedMoE(HIDDEN, 48, 6, TOP_K, dtype="bfloat16"), paddle.to_tensor(tokens()).astype("bfloat16")
    if quantised:
        layer.quantize_()

    def check(name: str, call) -> None:
        state = {key: bits(value) for key, value in layer.state_dict().items()}
        expected, right, calls = bits(layer(x)), getattr(layer_weights, name), []

        def fail_second(*arguments, **options):
            calls.append(0)
            if len(calls) == 2:
                raise MemoryError("no room")
            return right(*arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr(layer_weights, name, fail_second)
            with pytest.raises(MemoryError):
                call()
        assert list(state) == list(layer.state_dict())
        for key, value in layer.state_dict().items():
            assert_same_bits(bits(value), state[key])
        assert_same_bits(bits(layer(x)), expected)
        call()

    with paddle.no_grad():
        check("prepack_weights", layer.prepack_)
        check("unpack_weights", layer.unpack_)


@pytest.mark.parametrize("without_experts", [False, True])
def test_autocast_of_a_layer(without_experts):
    """All ranks refuse the same, those without experts too."""
    shard = Shard(6, 7, 0, 1) if without_experts else None
    layer = FusedMoE.from_dense(**dense_weights(), top_k=TOP_K, parallel=shard).prepack_()
    x = paddle.to_tensor(tokens())
    routing = layer.route(x)
    with autocast("O1", "bfloat16"), pytest.raises(ValueError, match="prepacked in float32 since prepack_"):
        layer.partial_output(x, *routing)
    half = [FusedMoE(HIDDEN, 48, 6, TOP_K, dtype="bfloat16", seed=1) for _ in range(2)]
    half[0].prepack_()
    with paddle.no_grad(), autocast("O1", "bfloat16"):
        assert_same_bits(bits(half[0](x)), bits(half[1](x)))


@pytest.mark.parametrize(("ep_size", "tp_size"), [(2, 1), (7, 1), (1, 3), (2, 2)])
def test_shards_of_a_layer(ep_size, tp_size):
    """With ep_size 7 two of them have no expert."""
    dense = dense_weights(bias=True, shared=True)
    whole, x = FusedMoE.from_dense(**dense, top_k=TOP_K), paddle.to_tensor(tokens())
    with paddle.no_grad():
        routing = whole.route(x)
        for rank in range(ep_size * tp_size):
            shard = Shard(rank // tp_size, ep_size, rank % tp_size, tp_size)
            part = FusedMoE.from_dense(**dense, top_k=TOP_K, parallel=shard)
            expected = part.partial_output(x, *routing).numpy()
            assert_same_bits(part.prepack_().partial_output(x, *routing).numpy(), expected)
            flags = vars(part.down_weight)
            assert flags["is_distributed"] and flags["expert"] and flags["shard_group"] == "grid"
            part.unpack_()
            assert_same_bits(part.partial_output(x, *routing).numpy(), expected)
            assert vars(part.down_weight)["shard_group"] == "grid"


def test_a_rank_without_columns_of_the_shared_expert():
    for rank in (0, 6):
        layer = FusedMoE(16, 48, 6, TOP_K, shared_intermediate_size=1, parallel=Shard(rank, 7, 0, 1), seed=1)
        x = paddle.randn([11, 16])
        with paddle.no_grad():
            routing = layer.route(x)
            expected = layer.partial_output(x, *routing).numpy()
            assert_same_bits(layer.prepack_().partial_output(x, *routing).numpy(), expected)
            assert_same_bits(layer.unpack_().partial_output(x, *routing).numpy(), expected)
        assert not layer.prepacked and not layer.shared_down_weight.stop_gradient


def test_layer_is_saved_loaded_and_compiled(tmp_path):
    layers = [FusedMoE(HIDDEN, 48, 6, TOP_K, seed=seed, dtype="bfloat16").prepack_() for seed in (1, 2)]
    for layer in layers:
        layer.eval()
    paddle.save(layers[0].state_dict(), str(tmp_path / "state"))
    missing, unexpected = layers[1].set_state_dict(paddle.load(str(tmp_path / "state")))
    assert not missing and not unexpected
    x = paddle.to_tensor(tokens()).astype("bfloat16")
    with paddle.no_grad():
        expected = bits(layers[0](x))
        assert_same_bits(bits(layers[1](x)), expected)
    spec = paddle.static.InputSpec([None, HIDDEN], "bfloat16")
    paddle.jit.save(layers[1], str(tmp_path / "program"), [spec])
    assert_same_bits(bits(paddle.jit.load(str(tmp_path / "program"))(x)), expected)


def test_layer_says_what_it_cannot_do(tmp_path):
    layer = FusedMoE(HIDDEN, 48, 6, TOP_K)
    with pytest.raises(RuntimeError, match="the expert weights of this layer are not prepacked"):
        layer.unpack_()
    layer.prepack_()
    with pytest.raises(RuntimeError, match="are prepacked already"):
        layer.prepack_()
    with pytest.raises(RuntimeError, match=r"are prepacked; call unpack_\(\) first"):
        layer.quantize_()
    with pytest.raises(RuntimeError, match=r"are prepacked, which no file holds; call unpack_\(\) first"):
        paddle_moe.save_checkpoint(tmp_path / "checkpoint", layer)
    for function in (paddle_moe.save_moe_weights, paddle_moe.load_moe_weights):
        with pytest.raises(RuntimeError, match="are prepacked, which no file holds"):
            function(tmp_path, {"mlp": layer}, "qwen3_moe")


@pytest.mark.parametrize("before", checks.DTYPES)
@pytest.mark.parametrize("after", checks.DTYPES)
def test_a_layer_that_becomes_another_dtype(before, after):
    """The bits of one that did so before prepack_(), and the flags of its shards."""
    options = dict(gate_up_bias=True, down_bias=True, shared_intermediate_size=40, dtype=before, seed=3)
    first, second = (FusedMoE(HIDDEN, 40, 5, TOP_K, parallel=Shard(1, 2, 0, 1), **options) for _ in range(2))
    model = paddle.nn.Sequential(first.prepack_())
    model.to(dtype=after)
    second.to(dtype=after)
    second.prepack_()
    assert first.down_weight.dtype == getattr(paddle, after) and first.down_weight.shard_group == "grid"
    state = second.state_dict()
    assert first.state_dict().keys() == state.keys()
    for name, value in first.state_dict().items():
        assert_same_bits(bits(value), bits(state[name]))
    assert_same_bits(bits(first.unpack_().gate_up_weight), bits(second.unpack_().gate_up_weight))


def test_a_layer_whose_panels_another_dtype_has_not():
    layer = FusedMoE(HIDDEN, 9, 6, TOP_K).prepack_()
    with pytest.raises(ValueError, match="down_weight of a rank must have an even .* bfloat16.* got 9"):
        layer.to(dtype="bfloat16")
    assert layer.down_weight.dtype == layer.gate_weight.dtype == paddle.float32


def test_a_layer_with_odd_sizes_is_left_alone():
    """All ranks refuse what one of them has: of 10 columns 4, 3 and 3."""
    dense = dense_weights("bfloat16")
    for rank in range(3):
        layer = FusedMoE.from_dense(**dense, top_k=TOP_K, parallel=Shard(0, 1, rank, 3))
        with pytest.raises(ValueError, match="down_weight of a rank must have an even .* got 3"):
            layer.prepack_()
        assert not layer.prepacked and "down_weight" in dict(layer.named_parameters())
    FusedMoE.from_dense(**dense, top_k=TOP_K).prepack_()


def test_lazy_layer():
    with paddle.LazyGuard():
        layer = FusedMoE(HIDDEN, 48, 6, TOP_K)
    with pytest.raises(RuntimeError, match="gate_up_weight has no values, as under paddle.LazyGuard"):
        layer.prepack_()
