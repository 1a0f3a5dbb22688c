"""FusedMoE in one process: against the double-precision reference, and shards of grids against the whole."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import re

import numpy as np
import paddle
import pytest
from checks import assert_close, relative_l2, run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import (
    EVERYTHING,
    EXPERTS,
    HIDDEN,
    INTER,
    SHARED,
    TOKENS,
    TOP_K,
    Shard,
    dense_weights,
    expected_output,
    grid,
    tokens,
)

from paddle_moe import functional
from paddle_moe.layers import FusedMoE
from paddle_moe.logs import get_rank_logger
from paddle_moe.params import random_expert, random_gate_weight
from paddle_moe.reference import to_float64

# ---------------------------------------------------------------- one process


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("parts", [{}, dict(bias=True), dict(shared=True), EVERYTHING])
def test_against_the_reference(dtype, parts):
    weights, x = dense_weights(dtype, **parts), tokens(dtype)
    layer = FusedMoE.from_dense(**weights, top_k=TOP_K)
    expected, _ = expected_output(x, weights)
    output = layer(paddle.to_tensor(x)).numpy()
    # Routed and shared part are each rounded once before they are added.
    # The shared part is rounded once more before the sum.
    assert_close(output, expected, slack=1 if dtype == "float32" or "shared" not in parts else 10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_stored_out_in(dtype):
    """The same outputs and gradients, from the same dense weights."""
    results = []
    for permuted in (False, True):
        layer = FusedMoE.from_dense(
            **dense_weights(dtype, **EVERYTHING), top_k=TOP_K, permuted_weights=permuted
        )
        x = paddle.to_tensor(tokens(dtype), stop_gradient=False)
        output = layer(x)
        output.astype("float32").square().sum().backward()
        gradients = {name: one.grad for name, one in layer.named_parameters()}
        if permuted:
            assert layer.gate_up_weight.shape == [EXPERTS, 2 * INTER, HIDDEN]
            assert layer.shared_down_weight.shape == [1, HIDDEN, SHARED]
            for name in ("gate_up_weight", "down_weight", "shared_gate_up_weight", "shared_down_weight"):
                gradients[name] = gradients[name].transpose([0, 2, 1])
        found = {"output": output, "x": x.grad, **gradients}
        results.append({name: one.astype("float32").numpy() for name, one in found.items()})
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert relative_l2(results[1][name], value) < (1e-6 if dtype == "float32" else 1e-2), name


@pytest.mark.parametrize("shard", grid(2, 2))
def test_drawn_weights_stored_out_in_are_the_same(shard):
    options = dict(parallel=shard, shared_intermediate_size=SHARED, seed=3)
    plain = FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K, **options)
    permuted = FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K, **options, permuted_weights=True)
    for name, value in plain.state_dict().items():
        other = permuted.state_dict()[name].numpy()
        np.testing.assert_array_equal(other.swapaxes(1, 2) if other.ndim == 3 else other, value.numpy())


@pytest.mark.parametrize(
    "options",
    [
        dict(renormalize=False),
        dict(scoring="sigmoid", scaling_factor=2.5),
        dict(scoring="softmax_topk"),
        dict(num_groups=5, topk_groups=3, group_mask_fill=float("-inf")),
        dict(activation="swigluoai(1.5, 2.5)"),
        dict(activation="relu2", chunk_size=4),
    ],
)
def test_options_reach_the_operators(options):
    weights, x = dense_weights(**EVERYTHING), tokens()
    layer = FusedMoE.from_dense(**weights, top_k=TOP_K, **options)
    expected, _ = expected_output(x, weights, **{k: v for k, v in options.items() if k != "chunk_size"})
    assert_close(layer(paddle.to_tensor(x)).numpy(), expected)


def test_options_without_an_effect_on_results_reach_the_operators(monkeypatch):
    seen, call = [], functional.mixture_of_experts

    def noted(*arguments, **options):
        seen.append((options["recompute"], options["chunk_size"]))
        return call(*arguments, **options)

    monkeypatch.setattr(functional, "mixture_of_experts", noted)
    for recompute, chunk_size in ((False, 0), (True, 3)):
        layer = FusedMoE.from_dense(
            **dense_weights(shared=True), top_k=TOP_K, recompute=recompute, chunk_size=chunk_size
        )
        layer(paddle.to_tensor(tokens()))
        assert seen == [(recompute, chunk_size)] * 2  # of the routed experts and of the shared one
        seen.clear()


@pytest.mark.parametrize("leading", [(), (1,), (3, 4), (2, 1, 3), (0,), (2, 0)])
def test_leading_dimensions(leading):
    weights = dense_weights(shared=True)
    layer = FusedMoE.from_dense(**weights, top_k=TOP_K)
    x = np.random.default_rng(3).standard_normal((*leading, HIDDEN)).astype(np.float32)
    output, ids, router_weights = layer(paddle.to_tensor(x), return_routing=True)
    assert output.shape == [*leading, HIDDEN]
    assert ids.shape == router_weights.shape == [int(np.prod(leading)), TOP_K]
    expected, routing = expected_output(x.reshape(-1, HIDDEN), weights)
    np.testing.assert_array_equal(ids.numpy(), routing[0])
    assert_close(output.numpy().reshape(-1, HIDDEN), expected)


def test_replay_of_a_routing():
    weights, x = dense_weights(**EVERYTHING), paddle.to_tensor(tokens(num_tokens=12)).reshape([3, 4, HIDDEN])
    layer = FusedMoE.from_dense(**weights, top_k=TOP_K)
    output, ids, router_weights = layer(x, return_routing=True)
    for shape in ([12, TOP_K], [3, 4, TOP_K]):
        again = layer(x, ids.reshape(shape), router_weights.reshape(shape))
        np.testing.assert_array_equal(again.numpy(), output.numpy())
    other_ids = paddle.to_tensor(np.random.default_rng(0).integers(0, EXPERTS, (12, 3)))  # another K, int64
    other_weights = paddle.rand([12, 3])
    expected, _ = expected_output(
        tokens(num_tokens=12), weights, routing=(other_ids.numpy(), other_weights.numpy())
    )
    assert_close(layer(x, other_ids, other_weights).numpy().reshape(12, HIDDEN), expected)


def test_state_dict_round_trip(tmp_path):
    x = paddle.to_tensor(tokens())
    layer = FusedMoE.from_dense(**dense_weights(**EVERYTHING), top_k=TOP_K)
    state = layer.state_dict()
    assert set(state) == {
        "gate_weight",
        "gate_bias",
        "gate_up_weight",
        "down_weight",
        "gate_up_bias",
        "down_bias",
        "correction_bias",
        "shared_gate_up_weight",
        "shared_down_weight",
        "shared_gate_weight",
    }
    paddle.save(state, str(tmp_path / "layer.pdparams"))
    other = FusedMoE(
        HIDDEN,
        INTER,
        EXPERTS,
        TOP_K,
        gate_bias=True,
        gate_up_bias=True,
        down_bias=True,
        correction_bias=True,
        shared_intermediate_size=SHARED,
        shared_gate=True,
        seed=None,
    )
    assert not other(x).numpy().any()
    missing, unexpected = other.set_state_dict(paddle.load(str(tmp_path / "layer.pdparams")))
    assert not missing and not unexpected
    np.testing.assert_array_equal(other(x).numpy(), layer(x).numpy())


def test_correction_bias_is_not_trained():
    layer = FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K, correction_bias=True)
    assert layer.correction_bias.stop_gradient
    assert {name for name, _ in layer.named_parameters()} == {"gate_weight", "gate_up_weight", "down_weight"}


@pytest.mark.parametrize("shape", [[-1, HIDDEN], [-1, -1, HIDDEN]])
def test_to_static(shape, tmp_path):
    layer = FusedMoE.from_dense(**dense_weights(**EVERYTHING), top_k=TOP_K)
    layer.eval()
    x = paddle.to_tensor(tokens(num_tokens=6)).reshape([6, HIDDEN] if len(shape) == 2 else [2, 3, HIDDEN])
    expected = layer(x).numpy()
    static = paddle.jit.to_static(
        layer, input_spec=[paddle.static.InputSpec(shape, "float32")], full_graph=True
    )
    np.testing.assert_array_equal(static(x).numpy(), expected)
    paddle.jit.save(static, str(tmp_path / "layer"))
    np.testing.assert_array_equal(paddle.jit.load(str(tmp_path / "layer"))(x).numpy(), expected)


@pytest.mark.parametrize("function", ["quantize_", "prepack_", "unpack_"])
def test_weights_that_a_program_keeps_stay_as_they_are(function):
    layer = FusedMoE.from_dense(**dense_weights(shared=True), top_k=TOP_K)
    if function == "unpack_":
        layer.prepack_()
    layer.eval()
    paddle.jit.to_static(layer, full_graph=True)
    before = layer.state_dict()
    with pytest.raises(RuntimeError, match=rf"{function}\(\) must be called before paddle.jit.to_static"):
        getattr(layer, function)()
    assert {name: id(value) for name, value in layer.state_dict().items()} == {
        name: id(value) for name, value in before.items()
    }


def test_wrong_arguments_are_named(tmp_path):
    layer = FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K)
    x = paddle.zeros([3, HIDDEN])
    calls = {
        "hidden_states must be a paddle.Tensor, got NoneType": lambda: layer(None),
        "hidden_states must be a paddle.Tensor, got list": lambda: layer([x]),
        "hidden_states must have the dtype of the layer, float32, got bfloat16": lambda: layer(
            x.astype("bfloat16")
        ),
        "parallel must be what init_distributed returns, or None, got 2": lambda: FusedMoE(
            HIDDEN, INTER, EXPERTS, TOP_K, parallel=2
        ),
        "logger must be what get_rank_logger returns, or None, got 'log'": lambda: FusedMoE(
            HIDDEN, INTER, EXPERTS, TOP_K, logger="log"
        ),
        "gate_up must be a Paddle tensor or a NumPy array, got list": lambda: FusedMoE.from_dense(
            **{**dense_weights(), "gate_up": [1.0]}, top_k=TOP_K
        ),
        f"dtype must be float32, bfloat16, float16 for {layer.full_name()}, got float64": lambda: layer.to(
            dtype="float64"
        ),
        f"dtype must be float32, bfloat16, float16 for {layer.full_name()}, got int8": lambda: layer.to(
            dtype="int8"
        ),
        "routing_table must be a paddle.Tensor, got list": lambda: layer(x, [[0, 1]] * 3, [[0.5, 0.5]] * 3),
        "router_weights must be a paddle.Tensor, got NoneType": lambda: layer.partial_output(
            x, paddle.zeros([3, 2], "int32"), None
        ),
        "return_routing must be True or False, got 'no'": lambda: layer(x, return_routing="no"),
        "gate_bias must be a Paddle tensor or a NumPy array, got list": lambda: FusedMoE.from_dense(
            **dense_weights(), top_k=TOP_K, gate_bias=[0.0] * EXPERTS
        ),
    }
    for text, call in calls.items():
        with pytest.raises(ValueError, match=re.escape(text) + "$"):
            call()
    layer(x)  # is what it was
    for name in ("num_experts", "top_k", "dispatch", "reduce"):
        with pytest.raises(AttributeError):
            setattr(layer, name, getattr(layer, name))
    assert FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K, dtype=np.float32).down_weight.dtype == paddle.float32
    half = FusedMoE.from_dense(**dense_weights("bfloat16"), top_k=TOP_K, dtype=None)
    assert half.down_weight.dtype == paddle.bfloat16


def test_a_pickled_layer_has_no_logger(tmp_path):
    """The process that unpickles it has no such files open; the rest is there."""
    layer = FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K, logger=get_rank_logger(0, 0, log_dir=tmp_path))
    (tmp_path / "layer").write_bytes(pickle.dumps(layer))
    x = paddle.to_tensor(tokens())
    np.save(tmp_path / "x.npy", x.numpy())
    code = "import pickle, sys, numpy as np, paddle\n"
    code += "layer = pickle.load(open(sys.argv[1] + '/layer', 'rb'))\n"
    code += "out = layer(paddle.to_tensor(np.load(sys.argv[1] + '/x.npy')))\n"
    code += "assert layer.logger is None and layer.gate_weight.is_gate\n"
    code += "np.save(sys.argv[1] + '/out.npy', out.numpy())"
    run_python("-c", code, str(tmp_path), timeout=300)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), layer(x).numpy())
    assert copy.deepcopy(layer).logger is copy.copy(layer).logger is layer.logger


def test_events(tmp_path):
    logger = get_rank_logger(0, 0, log_dir=tmp_path, prefix="layers")
    weights, x = dense_weights(), tokens()
    layer = FusedMoE.from_dense(**weights, top_k=TOP_K, logger=logger)
    _, ids, _ = layer(paddle.to_tensor(x), return_routing=True)
    events = [json.loads(line) for line in logger.events_path.read_text().splitlines()]
    (call,) = [event for event in events if event["event"] == "moe_call"]
    assert call["tokens_per_expert"] == np.bincount(ids.numpy().ravel(), minlength=EXPERTS).tolist()
    assert (call["num_tokens"], call["experts_min"]) == (TOKENS, 0)
    assert call["kernel_ms"] > 0 and call["collective_ms"] >= 0 and call["layer"]
    twin = copy.deepcopy(layer)
    layer.logger = None
    layer(paddle.to_tensor(x))
    assert len(logger.events_path.read_text().splitlines()) == len(events)
    twin(paddle.to_tensor(x))
    assert json.loads(logger.events_path.read_text().splitlines()[-1])["layer"] != call["layer"]


@pytest.mark.parametrize("full_graph", [True, False])
def test_to_static_with_a_logger(full_graph, tmp_path):
    logger = get_rank_logger(0, 0, log_dir=tmp_path, prefix="compiled")
    layer = FusedMoE.from_dense(**dense_weights(**EVERYTHING), top_k=TOP_K, logger=logger)
    layer.eval()
    x = paddle.to_tensor(tokens())
    expected = layer(x).numpy()
    np.testing.assert_array_equal(paddle.jit.to_static(layer, full_graph=full_graph)(x).numpy(), expected)


def test_lazy_guard():
    options = dict(shared_intermediate_size=SHARED, shared_gate=True, gate_bias=True, seed=3)
    expected = FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K, **options).state_dict()
    with paddle.LazyGuard():
        layer = FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K, **options)
    assert not any(parameter._is_initialized() for parameter in layer.parameters())
    for parameter in layer.parameters():
        parameter.initialize()
    assert layer.down_weight.abs().max().item() > 0  # drawn, as those of `expected`
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), expected[name].numpy(), err_msg=name)


def test_a_global_initializer_leaves_the_seed():
    expected = FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K, gate_bias=True, seed=3).state_dict()
    paddle.nn.initializer.set_global_initializer(paddle.nn.initializer.Constant(7.0))
    try:
        layer = FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K, gate_bias=True, seed=3)
    finally:
        paddle.nn.initializer.set_global_initializer(None)
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), expected[name].numpy(), err_msg=name)


def test_repr_names_the_shard():
    text = repr(FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K, parallel=Shard(1, 2, 0, 3), dtype="bfloat16"))
    for part in ("num_experts=5 (here 3..4)", "intermediate_size=10 (here 0..3)", "ep 1 of 2", "bfloat16"):
        assert part in text


# ---------------------------------------------------------------- shards


def sum_of_shards(weights, x, ep_size, tp_size, **options):
    """The partial outputs of all ranks of a grid, added in float64; every rank routes for itself."""
    total = np.zeros((len(x), HIDDEN))
    for shard in grid(ep_size, tp_size):
        layer = FusedMoE.from_dense(**weights, top_k=TOP_K, parallel=shard, **options)
        tensor = paddle.to_tensor(x)
        total += to_float64(layer.partial_output(tensor, *layer.route(tensor)).numpy())
    return total


@pytest.mark.parametrize(
    ("ep_size", "tp_size"), [(1, 1), (2, 2), (4, 1), (1, 4), (3, 2), (2, 3), (5, 1), (7, 1), (1, 10), (4, 3)]
)
def test_shards_add_up_to_the_dense_layer(ep_size, tp_size):
    weights, x = dense_weights(**EVERYTHING), tokens()
    expected, _ = expected_output(x, weights)
    assert relative_l2(sum_of_shards(weights, x, ep_size, tp_size), expected) < 1e-6


@settings(max_examples=25)
@given(
    ep_size=st.integers(1, 7),
    tp_size=st.integers(1, INTER),
    bias=st.booleans(),
    shared=st.booleans(),
    num_tokens=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_shards_of_any_grid(ep_size, tp_size, bias, shared, num_tokens, seed):
    weights, x = dense_weights(bias=bias, shared=shared, seed=seed), tokens(num_tokens=num_tokens, seed=seed)
    expected, _ = expected_output(x, weights)
    assert relative_l2(sum_of_shards(weights, x, ep_size, tp_size), expected) < 1e-6


@pytest.mark.parametrize("fp32_reduce", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_shards(dtype, fp32_reduce):
    weights, x = dense_weights(dtype, **EVERYTHING), tokens(dtype)
    expected, _ = expected_output(x, weights)
    total = sum_of_shards(weights, x, 2, 2, fp32_reduce=fp32_reduce)
    assert relative_l2(total, expected) < 5e-3
    partial = FusedMoE.from_dense(**weights, top_k=TOP_K, parallel=Shard(0, 2, 0, 2), fp32_reduce=fp32_reduce)
    tensor = paddle.to_tensor(x)
    wanted = paddle.float32 if fp32_reduce else getattr(paddle, dtype)
    assert partial.partial_output(tensor, *partial.route(tensor)).dtype == wanted


def test_shared_expert_is_spread_over_the_whole_grid():
    shards = [
        FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K, parallel=shard, shared_intermediate_size=SHARED)
        for shard in grid(2, 3)
    ]
    assert [layer.shared_down_weight.shape[1] for layer in shards] == [2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("shard", grid(3, 2) + [Shard(6, 7, 0, 1)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drawn_weights_are_the_slices_of_the_dense_layer(shard, dtype):
    options = dict(shared_intermediate_size=SHARED, shared_gate=True, dtype=dtype, seed=5)
    dense = FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K, **options)
    drawn = FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K, parallel=shard, **options)
    expected = {"gate_weight": random_gate_weight(5, HIDDEN, EXPERTS)}
    expected["gate_up_weight"], expected["down_weight"] = map(
        np.stack, zip(*(random_expert(5, expert, HIDDEN, INTER) for expert in range(EXPERTS)))
    )
    shared = random_expert(5, EXPERTS, HIDDEN, SHARED)  # as if it were the next one
    expected["shared_gate_up_weight"], expected["shared_down_weight"] = (one[None] for one in shared)
    for name, value in expected.items():
        value = paddle.to_tensor(value).astype(getattr(dense, name).dtype)
        np.testing.assert_array_equal(getattr(dense, name).numpy(), value.numpy(), err_msg=name)
    cut = FusedMoE.from_dense(
        dense.gate_weight,
        dense.gate_up_weight,
        dense.down_weight,
        TOP_K,
        shared_gate_up=dense.shared_gate_up_weight[0],
        shared_down=dense.shared_down_weight[0],
        shared_gate=dense.shared_gate_weight,
        parallel=shard,
    )
    assert set(drawn.state_dict()) == set(cut.state_dict())
    for name, value in drawn.state_dict().items():
        assert value.dtype == getattr(dense, name).dtype
        np.testing.assert_array_equal(value.numpy(), cut.state_dict()[name].numpy(), err_msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_default_dtype(dtype):
    """That of Paddle, and nothing that is always float32 follows it."""
    paddle.set_default_dtype(dtype)
    try:
        layer = FusedMoE(
            HIDDEN, INTER, EXPERTS, TOP_K, correction_bias=True, z_loss_weight=0.1, balance_loss_weight=0.1
        )
        x = paddle.to_tensor(tokens()).astype(dtype)
        output, loss, amax = layer(x, return_aux_loss=True, return_amax=True)
    finally:
        paddle.set_default_dtype("float32")
    named = FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K, correction_bias=True, dtype=getattr(paddle, dtype))
    for one in (layer, named):
        assert one.down_weight.dtype == getattr(paddle, dtype) and one.gate_weight.dtype == paddle.float32
        assert one.correction_bias.dtype == paddle.float32
    assert output.dtype == x.dtype and loss.dtype == amax.dtype == paddle.float32


@pytest.mark.parametrize("seeds", [(0, 1), ("own", "own")])
def test_seeds_differ(seeds):
    first, second = (FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K, seed=seed) for seed in seeds)
    for name, value in first.state_dict().items():
        assert (value.numpy() != second.state_dict()[name].numpy()).any()


def test_ranks_that_make_the_same_layers_have_the_same_seeds(monkeypatch):
    """Also where one of them makes a layer without `parallel` besides."""
    drawn = {}
    for rank in range(2):
        monkeypatch.setattr(FusedMoE, "_own_seeds", {False: itertools.count(), True: itertools.count()})
        layers = []
        for _ in range(2):
            if rank == 0:
                FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K)
            layers.append(FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K, parallel=Shard(rank, 2, 0, 1)))
        drawn[rank] = [layer.gate_weight.numpy() for layer in layers]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0][0] != drawn[0][1]).any()


def test_state_dict_of_a_rank_without_experts():
    options = dict(parallel=Shard(6, 7, 0, 1))
    layer = FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K, **options)
    assert layer.gate_up_weight.shape == [0, HIDDEN, 2 * INTER]
    other = FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K, **options)
    missing, unexpected = other.set_state_dict(layer.state_dict())
    assert not missing and not unexpected


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(hidden_size=0), "hidden_size must be at least 1, got 0"),
        (dict(intermediate_size=-1), "intermediate_size must be at least 1, got -1"),
        (dict(num_experts=0), "num_experts must be at least 1, got 0"),
        (dict(hidden_size=8.0), "hidden_size must be an integer, got 8.0"),
        (dict(top_k="2"), "top_k must be an integer, got '2'"),
        (dict(top_k=6), "top_k must be between 1 and num_experts = 5, got 6"),
        (dict(reduce="three"), "reduce must be 'two' or 'one', got 'three'"),
        (dict(shared_intermediate_size=-1), "shared_intermediate_size must be at least 0"),
        (dict(shared_gate=True), "shared_gate=True needs a shared expert"),
        (dict(dtype="float64"), "dtype must be 'float32', 'bfloat16' or 'float16', got 'float64'"),
        (dict(gate_dtype="float16"), "gate_dtype must be 'float32' or dtype = 'float32', got 'float16'"),
        (dict(seed=-1), "seed must be at least 0, 'own' or None, got -1"),
        (dict(seed="mine"), "seed must be an integer, got 'mine'"),
        (dict(seed=True), "seed must be an integer, got True"),
        (dict(dtype=paddle.float64), "dtype must be 'float32', 'bfloat16' or 'float16', got 'float64'"),
        (dict(gate_bias="no"), "gate_bias must be True or False, got 'no'"),
        (dict(recompute="no"), "recompute must be True or False, got 'no'"),
        (dict(z_loss_weight=float("inf")), "z_loss_weight must be finite and at least 0, got inf"),
        (dict(jitter_epsilon="x"), "jitter_epsilon must be a number, got 'x'"),
        (dict(capacity_factor="x"), "capacity_factor must be a number, got 'x'"),
        (dict(scaling_factor=True), "scaling_factor must be a number, got True"),
        (dict(activation="swish"), "activation must be one of silu, .* got 'swish'"),
        (dict(chunk_size=-1), "chunk_size must be at least 0"),
        (dict(scoring="max"), "scoring must be one of softmax, sigmoid, softmax_topk, got 'max'"),
        (dict(num_groups=2), "num_groups must divide the number of experts 5, got 2"),
        (dict(parallel=Shard(0, 1, 0, 11)), "intermediate_size must be at least tp_size = 11, got 10"),
    ],
)
def test_constructor_errors(changed, message):
    sizes = dict(hidden_size=HIDDEN, intermediate_size=INTER, num_experts=EXPERTS, top_k=TOP_K)
    with pytest.raises(ValueError, match=message):
        FusedMoE(**{**sizes, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(gate_weight=np.zeros((3, EXPERTS))), r"gate_weight must have the shape \[12, 5\], got"),
        (dict(gate_bias=np.zeros(HIDDEN)), r"gate_bias must have the shape \[5\], got \[12\]"),
        (dict(gate_up=np.zeros((HIDDEN, 4))), r"gate_up must have the shape \[E, H, 2I\], got \[12, 4\]"),
        (dict(gate_up=np.zeros((EXPERTS, HIDDEN, 3))), "gate_up must have an even last dimension"),
        (dict(down=np.zeros((EXPERTS, HIDDEN, INTER))), r"down must have the shape \[5, 10, 12\]"),
        (dict(down_bias=np.zeros(HIDDEN)), r"down_bias must have the shape \[5, 12\], got \[12\]"),
        (dict(shared_down=np.zeros((SHARED, HIDDEN))), "got None for shared_gate_up"),
        (dict(shared_gate=np.zeros((HIDDEN, 1))), "shared_gate is for a shared expert, got None for"),
        (dict(seed=1), "seed must not be given: the weights are those passed"),
        (
            dict(gate_up=np.zeros((EXPERTS, HIDDEN, 2 * INTER))),
            "without dtype=, the dtype of gate_up must be .* got 'float64'",
        ),
    ],
)
def test_from_dense_errors(changed, message):
    with pytest.raises(ValueError, match=message):
        FusedMoE.from_dense(**{**dense_weights(), **changed}, top_k=TOP_K)


def test_static_programs_are_refused():
    paddle.enable_static()
    try:
        with pytest.raises(RuntimeError, match=r"paddle\.jit\.to_static"):
            FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K)
    finally:
        paddle.disable_static()


def test_forward_errors():
    layer = FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K)
    x, ids = paddle.to_tensor(tokens()), paddle.zeros([TOKENS, TOP_K], dtype="int32")
    with pytest.raises(ValueError, match="got None for router_weights"):
        layer(x, ids)
    with pytest.raises(ValueError, match=r"hidden_states must have the shape \[\.\.\., H\] with H = 12"):
        layer(x[:, :5])
    with pytest.raises(ValueError, match="routing_table"):
        layer(x, ids[:3], paddle.zeros([3, TOP_K]))
    scalar = paddle.to_tensor(1.0)
    with pytest.raises(ValueError, match=r"hidden_states must have the shape .* got \[\]"):
        layer(scalar)
    with pytest.raises(ValueError, match=r"routing_table and router_weights must .* got \[\] and \[\]"):
        layer(x, scalar.astype("int32"), scalar)
