"""The operators while a graph is built, under to_static, from a saved program and in paddle.inference."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import paddle
import pytest
from paddle.static import InputSpec

import paddle_moe

H, I, E, K = 16, 12, 4, 2


def randn(*shape, dtype="float32"):
    return paddle.randn(shape).astype(dtype)


def weights(layout, dtype="float32"):
    if layout == "stacked":
        return randn(E, H, 2 * I, dtype=dtype), randn(E, I, H, dtype=dtype)
    down = [randn(I, H, dtype=dtype) for _ in range(E)]
    if layout == "separate":
        return [randn(H, I, dtype=dtype) for _ in range(2 * E)], down
    return [randn(H, 2 * I, dtype=dtype) for _ in range(E)], down


class Layer(paddle.nn.Layer):
    """A whole mixture-of-experts layer with every kind of option that a saved program has to keep."""

    def __init__(self, layout, measurement_mode=False):
        super().__init__()
        self.measurement_mode = measurement_mode
        self.gate_weight = self.parameter(randn(H, E))
        self.correction_bias = self.parameter(randn(E) - 10)
        gate_up, down = weights(layout)
        if layout == "stacked":
            self.gate_up, self.down = self.parameter(gate_up), self.parameter(down)
            self.gate_up_bias, self.down_bias = self.parameter(randn(E, 2 * I)), self.parameter(randn(E, H))
        else:
            self.gate_up = paddle.nn.ParameterList([self.parameter(tensor) for tensor in gate_up])
            self.down = paddle.nn.ParameterList([self.parameter(tensor) for tensor in down])
            self.gate_up_bias = self.down_bias = None

    def parameter(self, tensor):
        assign = paddle.nn.initializer.Assign(tensor)
        return self.create_parameter(tensor.shape, default_initializer=assign)

    def forward(self, hidden_states):
        stacked = self.gate_up_bias is not None
        return paddle_moe.fused_gate_moe(
            hidden_states,
            self.gate_weight,
            self.gate_up if stacked else list(self.gate_up),
            self.down if stacked else list(self.down),
            K,
            self.gate_up_bias,
            self.down_bias,
            scoring="sigmoid",
            correction_bias=self.correction_bias,
            num_groups=2,
            group_mask_fill=float("-inf"),
            renormalize_eps=1e-12,
            scaling_factor=2.5,
            activation="swigluoai(1.5, 5.0)",
            measurement_mode=self.measurement_mode,
            chunk_size=3,
            return_routing=True,
        )


HIDDEN = InputSpec([None, H], "float32", "hidden_states")


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        np.testing.assert_array_equal(np.asarray(a), b.numpy())


@pytest.mark.parametrize("layout", ["stacked", "list", "separate"])
@pytest.mark.parametrize("measurement_mode", [False, True])
def test_to_static_gives_the_bits_of_eager_for_every_token_count(layout, measurement_mode):
    layer = Layer(layout, measurement_mode)
    layer.eval()
    inputs = [randn(t, H) for t in (5, 1, 9)]
    expected = [layer(x) for x in inputs]
    static = paddle.jit.to_static(layer, input_spec=[HIDDEN], full_graph=True)
    for x, result in zip(inputs, expected):
        assert_same(static(x), result)


@pytest.mark.parametrize("layout", ["stacked", "list", "separate"])
def test_to_static_gives_the_gradients_of_eager(layout):
    layer = Layer(layout)
    x = randn(5, H)
    x.stop_gradient = False

    def gradients(call):
        x.clear_grad()
        layer.clear_gradients()
        call(x)[0].square().sum().backward()
        # The correction bias only moves the choice of the experts.
        return [x.grad] + [p.grad for p in layer.parameters() if p is not layer.correction_bias]

    eager = [grad.clone() for grad in gradients(layer)]
    assert_same(gradients(paddle.jit.to_static(layer, input_spec=[HIDDEN], full_graph=True)), eager)


@pytest.mark.parametrize("layout", ["stacked", "list"])
def test_a_saved_program_gives_the_bits_of_eager(layout, tmp_path):
    layer = Layer(layout)
    layer.eval()
    x = randn(7, H)
    expected = layer(x)
    path = str(tmp_path / "layer")
    paddle.jit.save(layer, path, input_spec=[HIDDEN])

    assert_same(paddle.jit.load(path)(x), expected)

    from paddle import inference

    config = inference.Config(str(tmp_path), "layer")
    config.disable_gpu()
    config.disable_glog_info()
    predictor = inference.create_predictor(config)
    for tokens in (7, 2):
        predictor.get_input_handle("hidden_states").copy_from_cpu(x[:tokens].numpy())
        predictor.run()
        results = [predictor.get_output_handle(name).copy_to_cpu() for name in predictor.get_output_names()]
        assert_same(results, layer(x[:tokens]))

    # In a process that has never built a layer, importing the package after Paddle makes the operators known.
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "expected.npy", expected[0].numpy())
    script = (
        "import sys, numpy as np, paddle, paddle_moe\n"
        "directory = sys.argv[1]\n"
        "out = paddle.jit.load(directory + '/layer')(paddle.to_tensor(np.load(directory + '/x.npy')))[0]\n"
        "np.testing.assert_array_equal(out.numpy(), np.load(directory + '/expected.npy'))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=300)


def build(function, *specs):
    """The outputs of the program that `function` becomes for inputs that are only specified."""
    static = paddle.jit.to_static(function, input_spec=list(specs), full_graph=True)
    return [(list(output.shape), output.dtype) for output in static.concrete_program.outputs]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("ids", ["int32", "int64"])
@pytest.mark.parametrize("tokens", [None, 3])
@pytest.mark.parametrize("layout", ["stacked", "list", "separate"])
def test_inferred_shapes_and_dtypes(dtype, ids, tokens, layout):
    def call(hidden_states, routing_table, router_weights, gate_up_weights, down_weights):
        return paddle_moe.mixture_of_experts(
            hidden_states, routing_table, router_weights, gate_up_weights, down_weights, measurement_mode=True
        )

    def call_without_amax(hidden_states, routing_table, router_weights, gate_up_weights, down_weights):
        return paddle_moe.mixture_of_experts(
            hidden_states, routing_table, router_weights, gate_up_weights, down_weights
        )

    def spec(*shape):
        return InputSpec(list(shape), dtype)

    gate_up, down = {
        "stacked": (spec(E, H, 2 * I), spec(E, I, H)),
        "list": ([spec(H, 2 * I)] * E, [spec(I, H)] * E),
        "separate": ([spec(H, I)] * (2 * E), [spec(I, H)] * E),
    }[layout]
    specs = (spec(tokens, H), InputSpec([tokens, K], ids), InputSpec([tokens, K], "float32"), gate_up, down)
    out = ([tokens or -1, H], getattr(paddle, dtype))
    assert build(call, *specs) == [out, ([E], paddle.float32)]
    assert build(call_without_amax, *specs) == [out]


def test_inferred_shapes_and_dtypes_of_gate_and_route():
    def call(hidden_states, gate_weight):
        logits = paddle_moe.gate(hidden_states, gate_weight)
        return (logits, *paddle_moe.route(logits, K))

    assert build(call, InputSpec([None, H], "bfloat16"), InputSpec([H, E], "bfloat16")) == [
        ([-1, E], paddle.float32),
        ([-1, K], paddle.int32),
        ([-1, K], paddle.float32),
    ]


def test_nothing_but_the_ranks_need_be_known():
    def call(hidden_states, routing_table, router_weights, gate_up_weights, down_weights):
        return paddle_moe.mixture_of_experts(
            hidden_states, routing_table, router_weights, gate_up_weights, down_weights, measurement_mode=True
        )

    unknown2, unknown3 = InputSpec([None, None], "float32"), InputSpec([None, None, None], "float32")
    outputs = build(call, unknown2, InputSpec([None, None], "int32"), unknown2, unknown3, unknown3)
    assert outputs == [([-1, -1], paddle.float32), ([-1], paddle.float32)]


def good_call(hidden_states, routing_table, router_weights, gate_up_weights, down_weights):
    return paddle_moe.mixture_of_experts(
        hidden_states, routing_table, router_weights, gate_up_weights, down_weights
    )


def wrong_activation(hidden_states, routing_table, router_weights, gate_up_weights, down_weights):
    return paddle_moe.mixture_of_experts(
        hidden_states, routing_table, router_weights, gate_up_weights, down_weights, activation="swish"
    )


def no_tensor(hidden_states, routing_table, router_weights, gate_up_weights, down_weights):
    return paddle_moe.mixture_of_experts(
        hidden_states, routing_table, None, gate_up_weights, down_weights, activation="swish"
    )


GOOD_SPECS = {
    "hidden_states": InputSpec([None, H], "float32"),
    "routing_table": InputSpec([None, K], "int32"),
    "router_weights": InputSpec([None, K], "float32"),
    "gate_up_weights": InputSpec([E, H, 2 * I], "float32"),
    "down_weights": InputSpec([E, I, H], "float32"),
}


@pytest.mark.parametrize(
    ("function", "bad", "message"),
    [
        (wrong_activation, {}, "activation must be one of silu, "),
        (no_tensor, {}, "router_weights must be a paddle.Tensor, got NoneType"),
        (good_call, {"hidden_states": InputSpec([None, H + 1], "float32")},
         "down_weights must have the shape [E_l, I, H] = [4, 12, 17], got [4, 12, 16]"),
        (good_call, {"hidden_states": InputSpec([None, H], "float64")},
         "hidden_states must have the dtype float32, bfloat16 or float16, got float64"),
        (good_call, {"routing_table": InputSpec([None, K], "float32")},
         "routing_table must have the dtype int32 or int64, got float32"),
        (good_call, {"router_weights": InputSpec([None, K + 1], "float32")},
         "router_weights must have the shape [T, K] = [?, 2], got [?, 3]"),
        (good_call, {"down_weights": InputSpec([E, I, H], "bfloat16")},
         "down_weights must have the dtype float32, got bfloat16"),
    ],
)  # fmt: skip
def test_misuse_is_named_while_the_graph_is_built(function, bad, message):
    assert build(good_call, *GOOD_SPECS.values()) == [([-1, H], paddle.float32)]
    with pytest.raises(ValueError, match=re.escape(message)):
        build(function, *{**GOOD_SPECS, **bad}.values())


def test_sizes_that_disagree_only_at_run_time_are_named():
    static = paddle.jit.to_static(good_call, input_spec=list(GOOD_SPECS.values()), full_graph=True)
    gate_up, down = weights("stacked")
    with pytest.raises(
        ValueError, match=re.escape("routing_table must have the shape [T, K] = [3, 2], got [4, 2]")
    ):
        static(randn(3, H), paddle.zeros([4, K], "int32"), randn(4, K), gate_up, down)


PROGRAM = """
import numpy as np, paddle, paddle_moe
rng = np.random.default_rng(0)
feed = {
    "x": rng.standard_normal((5, 16), "float32"),
    "table": rng.integers(0, 4, (5, 2)).astype("int32"),
    "weights": rng.random((5, 2), "float32"),
    "gate_up": rng.standard_normal((4, 16, 24), "float32"),
    "down": rng.standard_normal((4, 12, 16), "float32"),
    "bias": rng.standard_normal((4, 16), "float32"),
}
names = ("x", "table", "weights", "gate_up", "down")
eager = paddle_moe.mixture_of_experts(
    *(paddle.to_tensor(feed[name]) for name in names),
    down_bias=paddle.to_tensor(feed["bias"]),
    measurement_mode=True,
)
paddle.enable_static()
program = paddle.static.Program()
with paddle.static.program_guard(program):
    data = {name: paddle.static.data(name, value.shape, str(value.dtype)) for name, value in feed.items()}
    fetch = paddle_moe.mixture_of_experts(
        *(data[name] for name in names), down_bias=data["bias"], measurement_mode=True
    )
    try:
        paddle_moe.mixture_of_experts(*(data[name] for name in names), activation="swish")
    except ValueError as error:
        assert str(error).startswith("activation must be one of "), error
    else:
        raise AssertionError("the misuse was accepted")
results = paddle.static.Executor().run(program, feed=feed, fetch_list=list(fetch))
for result, expected in zip(results, eager):
    np.testing.assert_array_equal(result, expected.numpy())
"""


TRAINING_PROGRAM = """
import numpy as np, paddle, paddle_moe
rng = np.random.default_rng(0)
values = {
    "x": rng.standard_normal((10, 16), "float32"),
    "gate": rng.standard_normal((16, 4), "float32"),
    "gate_up": rng.standard_normal((4, 16, 48), "float32") / 4,
    "down": rng.standard_normal((4, 24, 16), "float32") / 4,
}

def loss_of(x, gate, gate_up, down):
    return ((paddle_moe.fused_gate_moe(x, gate, gate_up, down, top_k=2) - x) ** 2).mean()

tensors = [paddle.to_tensor(value, stop_gradient=False) for value in values.values()]
loss_of(*tensors).backward()
expected = [tensor.grad.numpy() for tensor in tensors]

paddle.enable_static()
executor = paddle.static.Executor(paddle.CPUPlace())
program = paddle.static.Program()
with paddle.static.program_guard(program):
    data = [paddle.static.data(name, [-1, *value.shape[1:]] if name == "x" else value.shape, "float32")
            for name, value in values.items()]
    for tensor in data:
        tensor.stop_gradient = False
    fetch = paddle.static.gradients([loss_of(*data)], data)
for actual, array in zip(executor.run(program, feed=values, fetch_list=fetch), expected):
    np.testing.assert_array_equal(actual, array)

program, start = paddle.static.Program(), paddle.static.Program()
with paddle.static.program_guard(program, start):
    x = paddle.static.data("x", [-1, 16], "float32")
    x.stop_gradient = False  # the older program has no operators with only some of a list's gradients
    parameters = [
        paddle.static.create_parameter(
            values[name].shape, "float32", name=name,
            default_initializer=paddle.nn.initializer.Assign(values[name]),
        )
        for name in ("gate", "gate_up", "down")
    ]
    loss = loss_of(x, *parameters)
    paddle.optimizer.Adam(1e-2).minimize(loss)  # by append_backward
executor.run(start)
losses = [float(executor.run(program, feed={"x": values["x"]}, fetch_list=[loss])[0]) for _ in range(40)]
assert losses[-1] < 0.2 * losses[0], losses

for trained in (0, 1) if paddle.framework.in_pir_mode() else ():  # the older one needs both, see above
    program = paddle.static.Program()
    with paddle.static.program_guard(program):
        data = [paddle.static.data(name, values[name].shape, "float32") for name in ("x", "gate")]
        data[trained].stop_gradient = False
        fetch = paddle.static.gradients([paddle_moe.gate(*data)], [data[trained]])
    (gradient,) = executor.run(program, feed={name: values[name] for name in ("x", "gate")}, fetch_list=fetch)
    expected = values["gate"].sum(1) if trained == 0 else values["x"].sum(0)[:, None]
    np.testing.assert_allclose(gradient, np.broadcast_to(expected, gradient.shape), rtol=1e-4, atol=1e-5)
"""


@pytest.mark.parametrize("program", [PROGRAM, TRAINING_PROGRAM], ids=["forward", "training"])
@pytest.mark.parametrize("pir", ["0", "1"], ids=["old_program", "pir"])
def test_programs_built_by_hand(pir, program):
    subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "FLAGS_enable_pir_api": pir},
        check=True,
        timeout=300,
    )
