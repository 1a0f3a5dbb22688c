"""Every misuse gives a ValueError whose whole text names the argument, what was expected and what came."""

from __future__ import annotations

import re

import numpy as np
import paddle
import pytest

import paddle_moe
from paddle_moe import core
from paddle_moe._options import switch

T, H, I, K, E = 3, 8, 6, 2, 4


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


def experts_arguments():
    return {
        "hidden_states": zeros(T, H),
        "routing_table": zeros(T, K, dtype="int32"),
        "router_weights": zeros(T, K),
        "gate_up_weights": zeros(E, H, 2 * I),
        "down_weights": zeros(E, I, H),
        "gate_up_bias": zeros(E, 2 * I),
        "down_bias": zeros(E, H),
    }


def test_switches_are_0_or_1(monkeypatch):
    for value, expected in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("PADDLE_MOE_CHECK", value)
        assert switch("PADDLE_MOE_CHECK") == expected
    monkeypatch.setenv("PADDLE_MOE_CHECK", "yes")
    with pytest.raises(ValueError, match="PADDLE_MOE_CHECK must be 0 or 1, got 'yes'"):
        switch("PADDLE_MOE_CHECK")


def test_what_has_no_elements_is_checked_only():
    spec = core._core.Spec
    text = "cannot be computed from a Spec, which has no elements"
    gate = core._core.Gate(spec("float32", [T, H]), spec("float32", [H, E]))
    route = core._core.Route(spec("float32", [T, E]), None, K, "softmax", 1, 1, "max", 0.0, True, 1e-20, 1.0)
    for run in (gate.run, route.run):
        with pytest.raises(ValueError, match=text):
            run(None, None)
    arguments = {name: spec(str(array.dtype), array.shape) for name, array in experts_arguments().items()}
    with pytest.raises(ValueError, match=text):
        core.mixture_of_experts(**arguments)
    with pytest.raises(ValueError, match=text):
        core.mixture_of_experts_backward(zeros(T, H), **arguments)
    with pytest.raises(ValueError, match=f"pre_activation_rows {text}"):
        core.pre_activation_rows(**arguments)
    for size in (core.workspace_size, lambda **given: core.backward_workspace_size(zeros(T, H), **given)):
        with pytest.raises(ValueError, match=f"workspace_size {text}"):
            size(**arguments)
    with pytest.raises(ValueError, match=f"workspace_size {text}"):
        gate.workspace_size()


def test_no_size_is_too_large_for_the_check_of_sizes():
    arguments = experts_arguments() | {"hidden_states": zeros(0, H), "router_weights": zeros(0, 2**59)}
    arguments["routing_table"] = zeros(0, 2**59, dtype="int32")
    with pytest.raises(ValueError, match="routing_table must have at most 2814"):
        core.mixture_of_experts(**arguments)


@pytest.mark.parametrize("arguments", [(0, 1), (-1, 1), (1, 0)])
def test_limits_need_threads(arguments):
    streams, threads = arguments
    with pytest.raises(ValueError, match="must be at least 1, got"):
        core._core.measure_read(zeros(64), streams, threads)
    if threads < 1:
        with pytest.raises(ValueError, match="num_threads must be at least 1, got 0"):
            core._core.measure_flops(False, threads)


def gate_arguments():
    return {"hidden_states": zeros(T, H), "gate_weight": zeros(H, E)}


def route_arguments():
    return {"logits": zeros(T, E), "top_k": K}


def fused_arguments():
    return {
        "hidden_states": zeros(T, H),
        "gate_weight": zeros(H, E),
        "gate_up_weights": zeros(E, H, 2 * I),
        "down_weights": zeros(E, I, H),
        "top_k": K,
    }


ARGUMENTS = {
    "mixture_of_experts": experts_arguments,
    "gate": gate_arguments,
    "route": route_arguments,
    "fused_gate_moe": fused_arguments,
}

ACTIVATIONS = (
    "activation must be one of silu, gelu, gelu_tanh, relu, relu2, selu, identity, swigluoai, "
    "swigluoai(alpha, limit), got "
)

INT8 = {
    "gate_up_weights": zeros(E, H, 2 * I, dtype="int8"),
    "down_weights": zeros(E, I, H, dtype="int8"),
    "gate_up_scale": zeros(E, 2 * I),
    "down_scale": zeros(E, H),
}

# (function, arguments that replace good ones, the error)
MISUSES = [
    # rank
    ("mixture_of_experts", {"hidden_states": zeros(H)},
     "hidden_states must have 2 dimensions [T, H], got the shape [8]"),
    ("mixture_of_experts", {"routing_table": zeros(T, dtype="int32")},
     "routing_table must have 2 dimensions [T, K], got the shape [3]"),
    ("mixture_of_experts", {"router_weights": zeros(T, K, 1)},
     "router_weights must have 2 dimensions [T, K], got the shape [3, 2, 1]"),
    ("mixture_of_experts", {"down_weights": [zeros(1, I, H)] * E},
     "down_weights[0] must have the shape [I, H] = [6, 8], got [1, 6, 8]"),
    ("mixture_of_experts", {"gate_up_weights": [zeros(1, H, 2 * I)] * E},
     "gate_up_weights[0] must have the shape [H, 2I] = [8, 12], got [1, 8, 12]"),
    ("gate", {"hidden_states": zeros(H)}, "hidden_states must have 2 dimensions [T, H], got the shape [8]"),
    ("gate", {"gate_weight": zeros(H)}, "gate_weight must have 2 dimensions [H, E], got the shape [8]"),
    ("route", {"logits": zeros(E)}, "logits must have 2 dimensions [T, E], got the shape [4]"),
    # shape
    ("mixture_of_experts", {"routing_table": zeros(T + 1, K, dtype="int32")},
     "routing_table must have the shape [T, K] = [3, 2], got [4, 2]"),
    ("mixture_of_experts", {"router_weights": zeros(T, K + 1)},
     "router_weights must have the shape [T, K] = [3, 2], got [3, 3]"),
    ("mixture_of_experts", {"routing_table": zeros(T, 0, dtype="int32"), "router_weights": zeros(T, 0)},
     "routing_table must have at least one column (K >= 1), got the shape [3, 0]"),
    ("mixture_of_experts", {"gate_up_weights": zeros(E, H + 1, 2 * I)},
     "gate_up_weights must have the shape [E_l, H, 2I] = [4, 8, 12], got [4, 9, 12]"),
    ("mixture_of_experts", {"gate_up_weights": [zeros(H, 2 * I)] * 3 + [zeros(H, 2 * I + 1)]},
     "gate_up_weights[3] must have the shape [H, 2I] = [8, 12], got [8, 13]"),
    ("mixture_of_experts", {"gate_up_weights": [zeros(H, I)] * 7 + [zeros(H, I - 1)]},
     "gate_up_weights[7] must have the shape [H, I] = [8, 6], got [8, 5]"),
    ("mixture_of_experts", {"permuted_weights": True},
     "down_weights must have the shape [E_l, H, I] = [4, 8, 8], got [4, 6, 8]; [in, out] needs "
     "permuted_weights=False"),
    ("mixture_of_experts", {"gate_up_weights": zeros(E, 2 * I, H)},
     "gate_up_weights must have the shape [E_l, H, 2I] = [4, 8, 12], got [4, 12, 8]; [out, in] needs "
     "permuted_weights=True"),
    ("mixture_of_experts", {"down_weights": zeros(E, H, I)},
     "down_weights must have the shape [E_l, I, H] = [4, 8, 8], got [4, 8, 6]; [out, in] needs "
     "permuted_weights=True"),
    ("mixture_of_experts", {"down_weights": zeros(E, I, H + 1)},
     "down_weights must have the shape [E_l, I, H] = [4, 6, 8], got [4, 6, 9]"),
    ("mixture_of_experts", {"gate_up_bias": zeros(E, I)},
     "gate_up_bias must have the shape [E_l, 2I] = [4, 12], got [4, 6]"),
    ("mixture_of_experts", {"down_bias": [zeros(H)] * 3 + [zeros(H + 1)]},
     "down_bias[3] must have the shape [H] = [8], got [9]"),
    ("mixture_of_experts", {"hidden_states": zeros(T, 0)},
     "hidden_states must have at least one column (H >= 1), got the shape [3, 0]"),
    ("mixture_of_experts", {"down_weights": zeros(E, 0, H)},
     "down_weights must have an intermediate dimension I >= 1, got the shape [4, 0, 8]"),
    ("gate", {"gate_weight": zeros(H + 1, E)}, "gate_weight must have the shape [H, E] = [8, ?], got [9, 4]"),
    ("gate", {"gate_weight": zeros(H, 0)},
     "gate_weight must have at least one row and one column, got the shape [8, 0]"),
    ("route", {"logits": zeros(T, 0)}, "logits must have at least one column (E >= 1), got the shape [3, 0]"),
    ("route", {"correction_bias": zeros(E + 1)}, "correction_bias must have the shape [E] = [4], got [5]"),
    # quantised weights
    ("mixture_of_experts", {"gate_up_weights": zeros(E, H, 2 * I, dtype="int8")},
     "down_weights must have the dtype int8, got float32"),
    ("mixture_of_experts", {"down_weights": zeros(E, I, H, dtype="int8")},
     "down_weights must have the dtype float32, got int8"),
    ("mixture_of_experts", INT8 | {"gate_up_scale": None},
     "gate_up_scale must be given: gate_up_weights has the dtype int8"),
    ("mixture_of_experts", INT8 | {"down_scale": None},
     "down_scale must be given: down_weights has the dtype int8"),
    ("mixture_of_experts", INT8 | {"down_weights": zeros(E, I, H, dtype="uint8")},
     "down_weights must have the dtype int8, got uint8"),
    ("mixture_of_experts", {"gate_up_scale": zeros(E, 1)},
     "gate_up_scale must not be given: gate_up_weights is not quantised (int8, int4 in int32, float8_e4m3fn "
     "or its bits as uint8) but has the dtype float32"),
    ("mixture_of_experts", INT8 | {"gate_up_scale": [zeros(1)] * E},
     "gate_up_scale must hold as many tensors as gate_up_weights (1), got 4"),
    ("mixture_of_experts", INT8 | {"gate_up_scale": zeros(E, 2 * I + 1)},
     "gate_up_scale must have the shape [4, 1] (a scale per matrix), [4, 12] (per output), [4, 1, 12] (per "
     "output and 128 inputs) or [4, 1, 2] (per 128 x 128 block, of gate and of up), got [4, 13]"),
    ("mixture_of_experts", INT8 | {"down_scale": zeros(E - 1, H)},
     "down_scale must have the shape [4, 1] (a scale per matrix), [4, 8] (per output), [4, 1, 8] (per output "
     "and 128 inputs) or [4, 1, 1] (per 128 x 128 block), got [3, 8]"),
    ("mixture_of_experts", INT8 | {"down_scale": zeros(E, 2, H)},
     "down_scale must have the shape [4, 1] (a scale per matrix), [4, 8] (per output), [4, 1, 8] (per output "
     "and 128 inputs) or [4, 1, 1] (per 128 x 128 block), got [4, 2, 8]"),
    ("mixture_of_experts", INT8 | {"down_scale": zeros(E, H, dtype="float16")},
     "down_scale must have the dtype float32, got float16"),
    # dtype
    ("mixture_of_experts", {"hidden_states": zeros(T, H, dtype="float64")},
     "hidden_states must have the dtype float32, bfloat16 or float16, got float64"),
    ("mixture_of_experts", {"hidden_states": zeros(T, H, dtype="int32")},
     "hidden_states must have the dtype float32, bfloat16 or float16, got int32"),
    ("mixture_of_experts", {"routing_table": zeros(T, K)},
     "routing_table must have the dtype int32 or int64, got float32"),
    ("mixture_of_experts", {"routing_table": zeros(T, K, dtype="int16")},
     "routing_table must have the dtype int32 or int64, got int16"),
    ("mixture_of_experts", {"router_weights": zeros(T, K, dtype="float16")},
     "router_weights must have the dtype float32, got float16"),
    ("mixture_of_experts", {"gate_up_weights": [zeros(H, 2 * I)] * 3 + [zeros(H, 2 * I, dtype="float16")]},
     "gate_up_weights[3] must have the dtype float32, got float16"),
    ("mixture_of_experts", {"down_weights": zeros(E, I, H, dtype="int8")},
     "down_weights must have the dtype float32, got int8"),
    ("mixture_of_experts", {"gate_up_bias": zeros(E, 2 * I, dtype="float16")},
     "gate_up_bias must have the dtype float32, got float16"),
    ("mixture_of_experts", {"hidden_states": zeros(T, H, dtype="float16"),
                            "gate_up_weights": zeros(E, H, 2 * I, dtype="float16"),
                            "down_weights": zeros(E, I, H, dtype="float16"),
                            "down_bias": zeros(E, H, dtype="float16")},
     "down_bias must have the dtype float32, got float16"),
    ("gate", {"hidden_states": zeros(T, H, dtype="bool")},
     "hidden_states must have the dtype float32, bfloat16 or float16, got bool"),
    ("gate", {"gate_weight": zeros(H, E, dtype="float16")},
     "gate_weight must have the dtype float32, got float16"),
    ("route", {"logits": zeros(T, E, dtype="float16")}, "logits must have the dtype float32, got float16"),
    ("route", {"correction_bias": zeros(E, dtype="float64")},
     "correction_bias must have the dtype float32, got float64"),
    ("mixture_of_experts", {"hidden_states": zeros(T, H, dtype="complex64")},
     "hidden_states must have the dtype float32, bfloat16 or float16, got complex64"),
    ("mixture_of_experts", {"routing_table": zeros(T, K, dtype="complex128")},
     "routing_table must have the dtype int32 or int64, got complex128"),
    ("gate", {"hidden_states": zeros(T, H, dtype="complex64")},
     "hidden_states must have the dtype float32, bfloat16 or float16, got complex64"),
    # lists
    ("mixture_of_experts", {"gate_up_weights": []},
     "gate_up_weights must hold at least one tensor, got an empty list"),
    ("mixture_of_experts", {"down_weights": ()},
     "down_weights must hold at least one tensor, got an empty list"),
    ("mixture_of_experts", {"gate_up_bias": []},
     "gate_up_bias must hold at least one tensor, got an empty list"),
    ("mixture_of_experts", {"gate_up_weights": [zeros(H, 2 * I)] * 3},
     "gate_up_weights must hold one tensor per expert (4, gate and up side by side), two (8, all gates, then "
     "all ups), or one stacked tensor; down_weights holds 4 experts, got 3 tensors"),
    ("mixture_of_experts", {"gate_up_weights": zeros(E + 1, H, 2 * I)},
     "gate_up_weights must hold as many experts as down_weights (4), got the stacked shape [5, 8, 12]"),
    ("mixture_of_experts", {"down_weights": zeros(0, I, H)},
     "down_weights must hold at least one expert, got the shape [0, 6, 8]"),
    ("mixture_of_experts", {"gate_up_bias": [zeros(2 * I)] * 3},
     "gate_up_bias must hold one tensor per expert (4) or one stacked tensor, got 3 tensors"),
    ("mixture_of_experts", {"down_bias": [zeros(H)] * 5},
     "down_bias must hold one tensor per expert (4) or one stacked tensor, got 5 tensors"),
    # range
    ("mixture_of_experts", {"experts_min": -1}, f"experts_min must be between 0 and {2**63 - 1 - E}, got -1"),
    ("mixture_of_experts", {"experts_max": E},
     "experts_max must be experts_min + 4 - 1 = 3 (the range is inclusive and 4 experts were passed), got "
     "experts_min=0, experts_max=4"),
    ("mixture_of_experts", {"experts_min": 8, "experts_max": 10},
     "experts_max must be experts_min + 4 - 1 = 11 (the range is inclusive and 4 experts were passed), got "
     "experts_min=8, experts_max=10"),
    ("mixture_of_experts", {"experts_min": 2**63 - 1},
     f"experts_min must be between 0 and {2**63 - 1 - E}, got {2**63 - 1}"),
    ("mixture_of_experts", {"experts_min": 2**70}, f"experts_min must fit into 64 bits, got {2**70}"),
    ("mixture_of_experts", {"chunk_size": -1}, "chunk_size must be at least 0 (0: chosen), got -1"),
    ("route", {"top_k": 0}, "top_k must be at least 1, got 0"),
    ("route", {"top_k": -2}, "top_k must be at least 1, got -2"),
    ("route", {"top_k": E + 1},
     "top_k must be at most 4, the number of experts in the groups that are kept, got 5"),
    ("route", {"top_k": 3, "num_groups": 2},
     "top_k must be at most 2, the number of experts in the groups that are kept, got 3"),
    ("route", {"num_groups": 0}, "num_groups must be at least 1, got 0"),
    ("route", {"num_groups": 3}, "num_groups must divide the number of experts 4, got 3"),
    ("route", {"num_groups": 2, "topk_groups": 3},
     "topk_groups must be between 1 and num_groups = 2, got 3"),
    ("route", {"topk_groups": 0}, "topk_groups must be between 1 and num_groups = 1, got 0"),
    ("route", {"group_mask_fill": 0.5}, "group_mask_fill must be 0.0 or -inf, got 0.5"),
    ("route", {"renormalize_eps": -1.0}, "renormalize_eps must be finite and at least 0, got -1"),
    ("route", {"renormalize_eps": float("nan")}, "renormalize_eps must be finite and at least 0, got nan"),
    ("route", {"scaling_factor": float("inf")}, "scaling_factor must be finite, got inf"),
    # names
    ("mixture_of_experts", {"activation": "swish"}, ACTIVATIONS + "'swish'"),
    ("mixture_of_experts", {"activation": ""}, ACTIVATIONS + "''"),
    ("mixture_of_experts", {"activation": "swigluoai(1.7)"}, ACTIVATIONS + "'swigluoai(1.7)'"),
    ("mixture_of_experts", {"activation": "swigluoai(1.7, 0)"},
     "activation must have a positive limit, got 'swigluoai(1.7, 0)'"),
    ("route", {"scoring": "relu"}, "scoring must be one of softmax, sigmoid, softmax_topk, got 'relu'"),
    ("route", {"group_score": "mean"}, "group_score must be one of max, top2_sum, got 'mean'"),
    # Python types of options
    ("mixture_of_experts", {"permuted_weights": "yes"}, "permuted_weights must be True or False, got 'yes'"),
    ("mixture_of_experts", {"measurement_mode": None}, "measurement_mode must be True or False, got None"),
    ("mixture_of_experts", {"activation": None}, "activation must be a string, got None"),
    ("mixture_of_experts", {"experts_min": 0.0}, "experts_min must be an integer, got 0.0"),
    ("mixture_of_experts", {"experts_max": "3"}, "experts_max must be an integer, got '3'"),
    ("mixture_of_experts", {"chunk_size": None}, "chunk_size must be an integer, got None"),
    ("route", {"top_k": 2.0}, "top_k must be an integer, got 2.0"),
    ("route", {"renormalize": 1}, "renormalize must be True or False, got 1"),
    ("route", {"scaling_factor": "2"}, "scaling_factor must be a number, got '2'"),
    # the same checks behind the fused call
    ("fused_gate_moe", {"top_k": E + 1},
     "top_k must be at most 4, the number of experts in the groups that are kept, got 5"),
    ("fused_gate_moe", {"gate_weight": zeros(H + 1, E)},
     "gate_weight must have the shape [H, E] = [8, ?], got [9, 4]"),
    ("fused_gate_moe", {"activation": "swish"}, ACTIVATIONS + "'swish'"),
    ("fused_gate_moe", {"return_routing": 1}, "return_routing must be True or False, got 1"),
]  # fmt: skip


def to_paddle(value):
    if isinstance(value, np.ndarray):
        return paddle.to_tensor(value)
    if isinstance(value, (list, tuple)):
        return type(value)(to_paddle(item) for item in value)
    return value


@pytest.fixture(params=["paddle", "core"])
def call(request):
    def through_paddle(function, arguments):
        return getattr(paddle_moe, function)(**{name: to_paddle(value) for name, value in arguments.items()})

    def through_core(function, arguments):
        return getattr(core, function)(**arguments)

    return through_paddle if request.param == "paddle" else through_core


def exactly(text):
    return f"^{re.escape(text)}$"


@pytest.mark.parametrize("function", ARGUMENTS)
def test_the_arguments_that_the_misuses_start_from_are_good(call, function):
    call(function, ARGUMENTS[function]())


@pytest.mark.parametrize(
    ("function", "bad", "message"),
    MISUSES,
    ids=[f"{m[0]}-{'-'.join(m[1])}-{i}" for i, m in enumerate(MISUSES)],
)
def test_misuse_is_named(call, function, bad, message):
    with pytest.raises(ValueError, match=exactly(message)):
        call(function, {**ARGUMENTS[function](), **bad})


NOT_TENSORS = [
    ("mixture_of_experts", "hidden_states", None, "hidden_states {0}, got NoneType"),
    ("mixture_of_experts", "routing_table", [[0, 1]] * T, "routing_table {0}, got list"),
    ("mixture_of_experts", "router_weights", 1.0, "router_weights {0}, got float"),
    ("mixture_of_experts", "gate_up_weights", None, "gate_up_weights {0}, got NoneType"),
    (
        "mixture_of_experts",
        "gate_up_weights",
        [zeros(H, 2 * I)] * 3 + [None],
        "gate_up_weights[3] {0}, got NoneType",
    ),
    ("mixture_of_experts", "down_weights", {"a": 1}, "down_weights {0}, got dict"),
    ("mixture_of_experts", "down_weights", ["a", "b", "c", "d"], "down_weights[0] {0}, got str"),
    ("mixture_of_experts", "down_bias", 3, "down_bias {0}, got int"),
    ("gate", "gate_weight", None, "gate_weight {0}, got NoneType"),
    ("route", "logits", "logits", "logits {0}, got str"),
    ("route", "correction_bias", 0.0, "correction_bias {0}, got float"),
    ("fused_gate_moe", "hidden_states", None, "hidden_states {0}, got NoneType"),
]


@pytest.mark.parametrize(("function", "name", "value", "message"), NOT_TENSORS)
def test_what_is_no_tensor_is_named(function, name, value, message):
    arguments = ARGUMENTS[function]()
    with pytest.raises(ValueError, match=exactly(message.format("must be a NumPy array or have __dlpack__"))):
        getattr(core, function)(**{**arguments, name: value})
    arguments = {**{key: to_paddle(item) for key, item in arguments.items()}, name: to_paddle(value)}
    with pytest.raises(ValueError, match=exactly(message.format("must be a paddle.Tensor"))):
        getattr(paddle_moe, function)(**arguments)


def test_a_numpy_array_is_no_paddle_tensor():
    with pytest.raises(ValueError, match=exactly("gate_weight must be a paddle.Tensor, got numpy.ndarray")):
        paddle_moe.gate(paddle.zeros([T, H]), zeros(H, E))


@pytest.mark.skipif(
    not paddle.is_compiled_with_cuda(), reason="this Paddle has no second device to mix with the CPU"
)
def test_tensors_on_different_devices_are_named():
    with pytest.raises(ValueError, match="gate_weight must be on the device of the first argument"):
        paddle_moe.gate(paddle.zeros([T, H]).cpu(), paddle.zeros([H, E]).cuda())


def test_paddle_misuse_reads_the_same_when_paddle_reports_cpp_stacks():
    level = paddle.get_flags("FLAGS_call_stack_level")
    paddle.set_flags({"FLAGS_call_stack_level": 2})
    try:
        with pytest.raises(ValueError, match=exactly("top_k must be at least 1, got 0")):
            paddle_moe.route(paddle.zeros([T, E]), 0)
    finally:
        paddle.set_flags(level)


def routing():
    return paddle.zeros([T, K], "int32"), paddle.ones([T, K])


def weights():
    return paddle.ones([E, H, 2 * I]), paddle.ones([E, I, H])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: paddle_moe.mixture_of_experts(x, *routing(), *weights()),
        lambda x: paddle_moe.gate(x, paddle.zeros([H, E])),
        lambda x: paddle_moe.route(x, K)[1],
    ],
    ids=["mixture_of_experts", "gate", "route"],
)
def test_a_result_knows_whether_it_has_a_gradient(function):
    x = paddle.ones([T, H])
    x.stop_gradient = False
    assert not function(x).stop_gradient
    with paddle.no_grad():
        assert function(x).stop_gradient


# ---------------------------------------------------------------- what only paddle_moe.core takes

OUTPUTS = [
    ({"out": zeros(T, H + 1)}, "out must have the shape [3, 8], got [3, 9]"),
    ({"out": zeros(T, H, dtype="float16")}, "out must have the dtype float32, got float16"),
    ({"out": zeros(H, T).T}, "out must be contiguous, got the strides [1, 3]"),
    ({"out": [0]}, "out must be a NumPy array or have __dlpack__, got list"),
    (
        {"workspace": zeros(8, dtype="uint8")},
        "workspace must be a writable, contiguous uint8 array with at least ",
    ),
    ({"workspace": zeros(2**20)}, "workspace must be a writable, contiguous uint8 array with at least "),
    (
        {"workspace": zeros(2**20, 2, dtype="uint8")[:, 0]},
        "workspace must be a writable, contiguous uint8 array",
    ),
]


@pytest.mark.parametrize(("bad", "message"), OUTPUTS)
def test_bad_output_and_workspace_are_named(bad, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        core.mixture_of_experts(**experts_arguments(), **bad)


def test_read_only_output_is_named():
    out = zeros(T, E)
    out.flags.writeable = False
    with pytest.raises(ValueError, match=exactly("out must be writable, got a read-only array")):
        core.gate(**gate_arguments(), out=out)


def test_bad_output_pair_is_named():
    with pytest.raises(
        ValueError, match=exactly("out must be a pair (routing_table, router_weights), got numpy.ndarray")
    ):
        core.route(zeros(T, E), K, out=zeros(T, K))
    with pytest.raises(ValueError, match=exactly("out[0] must have the dtype int32, got float32")):
        core.route(zeros(T, E), K, out=(zeros(T, K), zeros(T, K)))


@pytest.mark.parametrize(("out", "message"), [
    ({}, "out must be of the type core.Gradients, got dict"),
    (core.Gradients(down_weights=[zeros(I, H)]),
     "out.down_weights must have an entry for each of the 4 arrays of down_weights, got 1"),
    (core.Gradients(hidden_states=[]),
     "out.hidden_states must have an entry for each of the 1 arrays of hidden_states, got 0"),
])  # fmt: skip
def test_bad_gradients_are_named(out, message):
    arguments = experts_arguments()
    arguments["down_weights"] = list(arguments["down_weights"])
    with pytest.raises(ValueError, match=exactly(message)):
        core.mixture_of_experts_backward(zeros(T, H), **arguments, out=out)


@pytest.mark.parametrize("row", [[1, -1], [-1, 1], [0, E]])
def test_a_changed_routing_table_has_no_gradient(row):
    table, _ = core.route(zeros(70, E), K)
    table[66] = row
    expected = (
        "routing_table must be what route() returned, ids between 0 and 3 or a row of -1, got something "
        "else in row 66; drop slots after route, in a copy of the table"
    )
    with pytest.raises(ValueError, match=exactly(expected)):
        core.route_backward(zeros(70, K), table, zeros(70, E), K)


def test_an_array_on_another_device_is_named():
    class OnGpu:
        def __dlpack_device__(self):
            return (2, 0)

        def __dlpack__(self):
            raise AssertionError("the device has to be looked at first")

    with pytest.raises(
        ValueError,
        match=exactly("gate_weight must be on the device of hidden_states, the CPU, got the GPU 0"),
    ):
        core.gate(zeros(T, H), OnGpu())
    if core._core.has_cuda():  # then the library of the array has to say what the current stream is
        expected = "the first argument of a call on a GPU must be a PyTorch or CuPy array"
        with pytest.raises(ValueError, match=f"^{expected}"):
            core.gate(OnGpu(), zeros(H, E))
    else:
        expected = "hidden_states is on a GPU, but this build of paddle_moe has only the CPU back end"
        with pytest.raises(RuntimeError, match=f"^{expected}"):
            core.gate(OnGpu(), zeros(H, E))


def test_an_array_that_refuses_to_be_exported_is_named():
    class Refuses:
        def __dlpack_device__(self):
            return (1, 0)

        def __dlpack__(self):
            raise BufferError("it needs a gradient")

    with pytest.raises(
        ValueError, match="^gate_weight cannot be read through DLPack: BufferError: it needs a gradient"
    ):
        core.gate(zeros(T, H), Refuses())


@pytest.mark.parametrize("dtype", [">f4", "uint32", "float128"])
def test_dtypes_that_only_numpy_has_are_named(dtype):
    with pytest.raises(ValueError, match=f"got {dtype}$"):
        core.gate(zeros(T, H, dtype=dtype), zeros(H, E))
    with pytest.raises(ValueError, match=f"^out must have the dtype float32, got {dtype}$"):
        core.gate(zeros(T, H), zeros(H, E), out=zeros(T, E, dtype=dtype))
    with pytest.raises(ValueError, match=f"bytes, got {dtype} with the shape"):
        core.gate(zeros(T, H), zeros(H, E), workspace=zeros(T, dtype=dtype))


def test_dtypes_that_only_dlpack_has_are_named():
    tensor = paddle.zeros([T, H], "complex64")
    with pytest.raises(ValueError, match="got the DLPack type code 5 with 64 bits and 1 lanes$"):
        core.gate(tensor, zeros(H, E))


@pytest.mark.parametrize(("function", "name", "first", "written", "shape"), [
    ("mixture_of_experts", "hidden_states", 0, "out", (T, H)),
    ("mixture_of_experts", "hidden_states", H, "out", (T, H)),
    ("mixture_of_experts", "router_weights", T * K - 1, "out", (T, H)),
    ("mixture_of_experts", "gate_up_weights", E * H * 2 * I - 1, "out", (T, H)),
    ("mixture_of_experts", "down_bias", 5, "pre_activations", (T * K, 2 * I)),
    ("gate", "hidden_states", T * H - 1, "out", (T, E)),
    ("gate", "gate_weight", 0, "out", (T, E)),
    ("fused_gate_moe", "hidden_states", 0, "out", (T, H)),
    ("fused_gate_moe", "gate_weight", H * E - 1, "out", (T, H)),
    ("fused_gate_moe", "down_weights", 0, "out", (T, H)),
])  # fmt: skip
def test_an_output_in_the_memory_of_an_input_is_named(function, name, first, written, shape):
    arguments = ARGUMENTS[function]()
    size, written_size = arguments[name].size, int(np.prod(shape))
    memory = zeros(size + written_size)
    arguments[name] = memory[:size].reshape(arguments[name].shape)
    message = f"{written} must not share memory with {name}; pass an array of its own"
    with pytest.raises(ValueError, match=exactly(message)):
        getattr(core, function)(**arguments, **{written: memory[first : first + written_size].reshape(shape)})
    getattr(core, function)(**arguments, **{written: memory[size:].reshape(shape)})  # beside it


def test_outputs_in_the_memory_of_another_array_are_named():
    arguments = experts_arguments()
    kept, table, grad = zeros(T * K, 2 * I), zeros(T, K, dtype="int32"), zeros(T, K)
    workspace = zeros(core.workspace_size(**arguments) + 4 * T * H, dtype="uint8")
    in_workspace = workspace[-4 * T * H :].view("float32").reshape(T, H)
    for name, other, call in [
        ("workspace", "out",
         lambda: core.mixture_of_experts(**arguments, out=in_workspace, workspace=workspace)),
        ("out", "pre_activations",
         lambda: core.mixture_of_experts(**arguments, out=kept.ravel()[: T * H].reshape(T, H),
                                         pre_activations=kept)),
        ("out[1]", "out[0]", lambda: core.route(zeros(T, E), K, out=(table, table.view("float32")))),
        ("out", "grad_router_weights",
         lambda: core.route_backward(grad, table, zeros(T, K), K, out=grad)),
        ("gradient of down_weights", "down_weights",
         lambda: core.mixture_of_experts_backward(
             zeros(T, H), **arguments, out=core.Gradients(down_weights=arguments["down_weights"]))),
    ]:  # fmt: skip
        message = f"{name} must not share memory with {other}; pass an array of its own"
        with pytest.raises(ValueError, match=exactly(message)):
            call()


def test_gradients_may_lie_in_the_gaps_of_each_other():
    arguments, both = experts_arguments(), np.full((E, H, 2 * I), np.nan, "float32")
    gates_and_ups = [*arguments["gate_up_weights"][..., :I], *arguments["gate_up_weights"][..., I:]]
    out = core.Gradients(gate_up_weights=[*both[..., :I], *both[..., I:]])
    core.mixture_of_experts_backward(zeros(T, H), **{**arguments, "gate_up_weights": gates_and_ups}, out=out)
    assert not both.any()


def test_strides_that_a_kernel_cannot_read_are_named():
    with pytest.raises(
        ValueError, match="^hidden_states must be contiguous in its last dimension, got the shape"
    ):
        core.gate(zeros(H, T).T, zeros(H, E))
    backwards = zeros(T, 2 * H)[:, ::-2]
    with pytest.raises(ValueError, match=re.escape("[3, 8] with the strides [16, -2]")):
        core.gate(backwards, zeros(H, E))
    with pytest.raises(ValueError, match="^routing_table must be contiguous, got the shape"):
        arguments = experts_arguments()
        arguments["routing_table"] = zeros(K, T, dtype="int32").T
        core.mixture_of_experts(**arguments)


@pytest.mark.parametrize("module", [paddle_moe, core], ids=["paddle", "core"])
@pytest.mark.parametrize(("n", "message"), [
    (-1, "n must be from 0 (the default) to 4096, got -1"),
    (4097, "n must be from 0 (the default) to 4096, got 4097"),
    (1.5, "n must be an integer, got 1.5"),
])  # fmt: skip
def test_bad_thread_counts_are_named(module, n, message):
    with pytest.raises(ValueError, match=exactly(message)):
        module.set_num_threads(n)


@pytest.mark.parametrize("module", [paddle_moe, core], ids=["paddle", "core"])
def test_thread_counts_may_be_those_of_numpy(module):
    try:
        module.set_num_threads(np.int64(2))
        assert module.get_num_threads() == 2
    finally:
        module.set_num_threads(0)
