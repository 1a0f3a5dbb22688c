"""FusedMoE in training mode, in one process: gradients, auxiliary losses, policies, faults, graphs."""

from __future__ import annotations

import functools
import inspect

import numpy as np
import paddle
import pytest
from layer_cases import EVERYTHING, EXPERTS, HIDDEN, INTER, TOKENS, TOP_K, tokens
from paddle.amp.auto_cast import amp_global_state, amp_initialize
from paddle.base.framework import _dygraph_tracer
from paddle.distributed.fleet.utils import recompute
from paddle.distributed.fleet.utils.mix_precision_utils import MixPrecisionLayer
from paddle.distributed.sharding import group_sharded_parallel
from paddle.nn import functional as F
from training_cases import assert_close, autocast, gradients, make_layer, native_operators

from paddle_moe import (
    ClipGradByGlobalNorm,
    FusedMoE,
    agree_on_overflow,
    average_gradients,
    balanced_correction_bias,
    broadcast_parameters,
    check_optimizer,
    clip_gradients,
    gate,
    init_distributed,
    jitter,
    limit_capacity,
    load_balancing_loss,
    router_z_loss,
    tokens_per_expert,
    training,
)


def trained_tokens(*arguments, **options):
    return paddle.to_tensor(tokens(*arguments, **options), stop_gradient=False)


def eager(layer, x):
    """The layer in Paddle's own operators, a loop over the experts; the routing is that of the layer."""
    with paddle.no_grad():
        ids, _ = layer.route(x)
    scores = F.softmax(x @ layer.gate_weight + layer.gate_bias, axis=-1)
    chosen = F.one_hot(ids.astype("int64"), EXPERTS)  # [T, K, E]
    weights = (chosen * scores.unsqueeze(1)).sum(1)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)

    def expert(x, gate_up, gate_up_bias, down, down_bias):
        before, up = (x @ gate_up + gate_up_bias).split(2, axis=-1)
        return (F.silu(before) * up) @ down + down_bias

    out = expert(x, layer.shared_gate_up_weight[0], 0.0, layer.shared_down_weight[0], 0.0)
    out = out * F.sigmoid(x @ layer.shared_gate_weight)
    for e in range(EXPERTS):
        one = (layer.gate_up_weight[e], layer.gate_up_bias[e], layer.down_weight[e], layer.down_bias[e])
        out = out + weights[:, e : e + 1] * expert(x, *one)
    return out


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients(recompute):
    layer = make_layer(recompute=recompute)
    reference = make_layer()
    expected = gradients(reference, trained_tokens(), call=lambda x: eager(reference, x))
    actual = gradients(layer, trained_tokens())
    assert set(actual) == set(expected) and len(actual) == 11
    for name, value in expected.items():
        assert_close(actual[name], value, 2e-6, name)


# ---------------------------------------------------------------- auxiliary losses


@pytest.mark.parametrize("kind", ["batch", "sequence", "global"])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_aux_loss_is_the_weighted_sum(kind, scoring):
    options = dict(balance_loss_weight=0.5, balance_loss=kind, z_loss_weight=0.25, scoring=scoring)
    layer = make_layer(**options)
    x = trained_tokens(num_tokens=12)
    _, ids, weights, loss = layer(x.reshape([3, 4, HIDDEN]), return_routing=True, return_aux_loss=True)
    logits = gate(x, layer.gate_weight) + layer.gate_bias
    length = 4 if kind == "sequence" else None
    balance = load_balancing_loss(logits, ids, scoring=scoring, sequence_length=length)
    assert loss.item() == pytest.approx((0.5 * balance + 0.25 * router_z_loss(logits)).item(), rel=1e-6)
    loss.backward()
    assert layer.gate_weight.grad.numpy().any() and layer.gate_bias.grad.numpy().any()
    assert x.grad.numpy().any()
    assert layer.down_weight.grad is None


def test_aux_loss_of_one_token_without_other_dimensions():
    layer, x = make_layer(balance_loss_weight=0.5, z_loss_weight=0.25), trained_tokens()
    output, loss = layer(x[0], return_aux_loss=True)
    assert output.shape == [HIDDEN] and loss.item() == layer(x[:1], return_aux_loss=True)[1].item() > 0


def test_aux_loss_is_never_lost():
    layer, x = make_layer(z_loss_weight=0.1), trained_tokens()
    with pytest.raises(ValueError, match="auxiliary losses .* would be lost: pass return_aux_loss=True"):
        layer(x)
    _, ids, weights, loss = layer(x, return_routing=True, return_aux_loss=True)
    layer(x, ids, weights)
    with pytest.raises(ValueError, match="return_aux_loss=True needs the router"):
        layer(x, ids, weights, return_aux_loss=True)
    layer.eval()
    layer(x)
    assert layer(x, return_aux_loss=True)[1].item() == loss.item()
    assert make_layer()(x, return_aux_loss=True)[1].item() == 0
    with pytest.raises(ValueError, match=r"must have the shape \[..., S, H\] for balance_loss='sequence'"):
        make_layer(balance_loss_weight=1.0, balance_loss="sequence")(x, return_aux_loss=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(balance_loss="token"), "balance_loss must be 'batch', 'sequence' or 'global', got 'token'"),
        (dict(balance_loss_weight=-1.0), "balance_loss_weight must be finite and at least 0, got -1.0"),
        (dict(z_loss_weight=float("nan")), "z_loss_weight must be finite and at least 0, got nan"),
        (dict(jitter_epsilon=1.0), "jitter_epsilon must be at least 0 and below 1, got 1.0"),
        (dict(capacity_factor=0.0), "capacity_factor must be positive, got 0.0"),
        (
            dict(capacity_factor=1.0, drop_policy="last"),
            "drop_policy must be 'probability' or 'position', got 'last'",
        ),
        (dict(bias_update_speed=0.1), "bias_update_speed needs a bias to update"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K, **options)


@pytest.mark.parametrize(
    ("function", "option", "default"),
    [
        (FusedMoE, "drop_policy", "probability"),
        (limit_capacity, "policy", "probability"),
        (balanced_correction_bias, "update_speed", 1e-3),
        (jitter, "group", "grid"),
    ],
)
def test_defaults(function, option, default):
    assert inspect.signature(function).parameters[option].default == default


# ---------------------------------------------------------------- policies


@pytest.mark.parametrize("policy", ["probability", "position"])
def test_capacity_in_training_only(policy):
    layer, x = make_layer(capacity_factor=0.7, drop_policy=policy), trained_tokens()
    output, ids, weights = layer(x, return_routing=True)
    np.testing.assert_array_equal(layer.route(x)[0].numpy(), ids.numpy())
    layer.eval()
    free_output, free_ids, free_weights = layer(x, return_routing=True)
    kept = limit_capacity(free_ids, free_weights, EXPERTS, 0.7, policy)
    np.testing.assert_array_equal(ids.numpy(), kept[0].numpy())
    np.testing.assert_array_equal(weights.numpy(), kept[1].numpy())
    assert (ids.numpy() == -1).any() and not (free_ids.numpy() == -1).any()
    np.testing.assert_array_equal(output.numpy(), layer(x, ids, weights).numpy())
    assert (output.numpy() != free_output.numpy()).any()


def test_jitter_in_training_only():
    layer, x = make_layer(jitter_epsilon=0.2), trained_tokens()
    noisy, again = layer(x, return_routing=True)[2], layer(x, return_routing=True)[2]
    assert (noisy.numpy() != again.numpy()).any()
    layer.eval()
    quiet = layer(x, return_routing=True)[2]
    np.testing.assert_array_equal(quiet.numpy(), make_layer()(x, return_routing=True)[2].numpy())


def test_bias_updates():
    layer, x = make_layer(bias_update_speed=0.125, capacity_factor=0.5), trained_tokens()
    before = layer.correction_bias.clone()
    _, ids, _ = make_layer()(x, return_routing=True)
    counts = tokens_per_expert(ids, EXPERTS)
    for _ in range(2):
        layer(x)
    assert layer.expert_counts.tolist() == (2 * counts).tolist()  # before any drop
    with paddle.no_grad():
        layer(x)
    layer(x, ids, paddle.ones([TOKENS, TOP_K]))
    layer.eval()
    layer(x)
    assert layer.expert_counts.tolist() == (2 * counts).tolist()
    layer.update_correction_bias()
    expected = balanced_correction_bias(before, counts, 0.125)
    np.testing.assert_array_equal(layer.correction_bias.numpy(), expected.numpy())
    assert (layer.correction_bias != before).any() and not layer.expert_counts.any()
    assert "expert_counts" not in layer.state_dict()
    with pytest.raises(ValueError, match="needs a layer with bias_update_speed > 0"):
        make_layer().update_correction_bias()


def test_amax():
    layer, x = make_layer(), trained_tokens()
    output, amax = layer(x, return_amax=True)
    with paddle.no_grad():
        logits = x @ layer.gate_up_weight + layer.gate_up_bias.unsqueeze(1)
        before, up = logits.split(2, axis=-1)
        intermediate = (F.silu(before) * up).abs().max(-1)  # [E, T]
        chosen = F.one_hot(layer.route(x)[0].astype("int64"), EXPERTS).sum(1).T
        expected = (intermediate * chosen).max(-1)
    np.testing.assert_allclose(amax.numpy(), expected.numpy(), rtol=1e-5)
    np.testing.assert_array_equal(output.numpy(), layer(x).numpy())
    assert amax.stop_gradient


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("expert", [0, EXPERTS - 1, -1])
def test_all_tokens_on_one_expert_or_on_none(expert):
    layer = make_layer(parts={}, balance_loss_weight=0.0)
    table = paddle.full([TOKENS, 1], expert, "int32")
    values = gradients(
        layer,
        trained_tokens(),
        routing_table=table,
        router_weights=paddle.ones([TOKENS, 1]),
    )
    assert all(np.isfinite(value).all() for value in values.values())
    for name in ("gate_up_weight", "down_weight"):
        others = [values[name][e] for e in range(EXPERTS) if e != expert]
        assert not np.any(others) and values[name].any() == (expert >= 0)


@pytest.mark.parametrize("capacity_factor", [None, 0.01])
def test_loss_is_finite_with_idle_experts(capacity_factor):
    options = dict(balance_loss_weight=1.0, z_loss_weight=1.0, capacity_factor=capacity_factor)
    layer = make_layer(**options)
    layer.gate_weight.set_value(paddle.zeros_like(layer.gate_weight))
    layer.correction_bias.set_value(-100 * paddle.arange(EXPERTS, dtype="float32"))
    output, ids, _, loss = layer(trained_tokens(), return_routing=True, return_aux_loss=True)
    assert set(ids.numpy().ravel()) <= {-1, 0, 1}
    (output.sum() + loss).backward()
    for parameter in layer.parameters():
        assert np.isfinite(parameter.grad.numpy()).all()


def test_one_layer_twice_and_no_tokens():
    layer, reference = make_layer(), make_layer()
    expected = gradients(reference, trained_tokens(), call=lambda x: eager(reference, eager(reference, x)))
    actual = gradients(layer, trained_tokens(), call=lambda x: layer(layer(x)))
    for name, value in expected.items():
        assert_close(actual[name], value, 5e-6, name)
    for call in (layer, functools.partial(recompute, layer)):
        values = gradients(layer, trained_tokens(num_tokens=0), call=call)
        assert len(values) == 11 and not any(value.any() for value in values.values())
    # Paddle takes the memory from empty tensors, from those of its own operators too.
    with pytest.raises(ValueError, match=r"Place\(undefined:0\)"):
        gradients(
            layer, trained_tokens(num_tokens=0), call=functools.partial(recompute, layer, use_reentrant=False)
        )


# ---------------------------------------------------------------- mixed precision, static graph


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_mixed_precision(level):
    """O1: float32 parameters, computed with in bfloat16. O2: bfloat16 parameters and a float32 router."""
    layer, x = make_layer(dtype="float32" if level == "O1" else "bfloat16"), trained_tokens()
    expected = gradients(make_layer(), x)

    def run(x):
        with autocast(level):
            return layer(x)

    actual = gradients(layer, x, call=run)
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert_close(actual[name], value, 2e-2, name)
    assert (actual["output"] != expected["output"]).any()
    assert layer(x.astype(layer.down_weight.dtype)).dtype == layer.down_weight.dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_leaves_the_router_in_float32(dtype):
    """Under O2 Paddle's own operators would compute in half precision; all of a layer see no autocast."""
    options = dict(balance_loss_weight=0.5, z_loss_weight=0.1, bias_update_speed=1e-3)
    layer, x = make_layer(jitter_epsilon=0.1, capacity_factor=0.9, **options), trained_tokens()
    logits = gate(x.detach(), layer.gate_weight)
    layer.eval()
    ids, weights = layer.route(x)
    layer.train()
    level = _dygraph_tracer()._amp_level
    calls = {
        "jitter": lambda: jitter(x, 0.1),
        "limit_capacity": lambda: limit_capacity(ids, weights, EXPERTS, 0.9),
        "load_balancing_loss": lambda: load_balancing_loss(logits, ids),
        "load_balancing_loss, half": lambda: load_balancing_loss(logits.astype(dtype), ids),
        "router_z_loss": lambda: router_z_loss(logits),
        "router_z_loss, half": lambda: router_z_loss(logits.astype(dtype)),
        "route": lambda: layer.route(x),
        "partial_output": lambda: layer.partial_output(x, ids, weights),
        "forward": lambda: layer(x, return_aux_loss=True, return_amax=True),
        "update_correction_bias": lambda: layer.update_correction_bias(),
    }
    for name, call in calls.items():
        with autocast("O2", dtype), native_operators() as seen:
            result = call()
            assert _dygraph_tracer()._amp_level.name == "O2" and _dygraph_tracer()._amp_dtype == dtype
        # The test's own cast of the argument, and zeroing integers.
        allowed = {"cast"} if name.endswith("half") else {"fill_"} if name.startswith("update") else set()
        assert seen.pop("O2", set()) <= allowed and seen["O0"], (name, seen)
        if "loss" in name:
            assert result.dtype == paddle.float32
    assert _dygraph_tracer()._amp_level == level
    with autocast("O2", dtype):  # the experts compute in half precision all the same
        assert layer.partial_output(x, ids, weights).dtype == getattr(paddle, dtype)
    assert amp_global_state().amp_dtype == dtype  # a GradScaler asks for it


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_conversions_leave_what_has_to_stay_in_float32(dtype):
    """What paddle.amp.decorate(level="O2") does on a GPU; on a CPU it returns at once."""
    options = dict(bias_update_speed=1e-3, parts=EVERYTHING)
    kept = {"gate_weight", "gate_bias", "shared_gate_weight", "correction_bias"}
    x = paddle.to_tensor(tokens()).astype(dtype)
    for convert in (lambda model: amp_initialize([model], dtype, []), lambda model: model.to(dtype=dtype)):
        layer = make_layer(**options)
        (layer(trained_tokens()) ** 2).sum().backward()
        model = paddle.nn.Sequential(layer, paddle.nn.Linear(HIDDEN, HIDDEN))
        convert(model)
        found = {name for name, value in layer.state_dict().items() if value.dtype == paddle.float32}
        assert found == kept and model[1].weight.dtype == getattr(paddle, dtype)
        assert layer.gate_weight.grad.dtype == paddle.float32
        assert layer.expert_counts.dtype == paddle.int64
        for name in kept:
            original = make_layer(**options).state_dict()[name]
            np.testing.assert_array_equal(layer.state_dict()[name].numpy(), original.numpy())
        layer.clear_gradients()
        layer(x).sum().backward()
        layer.update_correction_bias()
    half = FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K, gate_bias=True, gate_dtype=dtype, dtype=dtype)
    assert half.gate_bias.dtype == getattr(paddle, dtype) and half(x).dtype == half.gate_bias.dtype
    half.to(dtype="float32")
    assert half.gate_weight.dtype == half.gate_bias.dtype == paddle.float32


@pytest.mark.parametrize("shape", [[3, 0], [0, 4]])
@pytest.mark.parametrize("balance_loss", ["batch", "sequence"])
def test_losses_of_no_tokens(shape, balance_loss):
    layer = make_layer(balance_loss_weight=0.5, balance_loss=balance_loss)
    x = paddle.zeros([*shape, HIDDEN])
    x.stop_gradient = False
    output, loss = layer(x, return_aux_loss=True)
    (output.sum() + loss).backward()
    assert output.shape == x.shape == x.grad.shape and loss.item() == 0


@pytest.mark.parametrize("shape", [[None, HIDDEN], [None, 4, HIDDEN], [None, None, HIDDEN]])
def test_to_static_in_training_mode(shape):
    options = dict(balance_loss_weight=0.5, z_loss_weight=0.1, capacity_factor=1.2, bias_update_speed=0.01)
    if len(shape) == 3:
        options["balance_loss"] = "sequence"
    eager_layer, layer = make_layer(**options), make_layer(**options)

    def run(x):
        return layer(x, return_aux_loss=True)

    spec = [paddle.static.InputSpec(shape, stop_gradient=False)]
    static = paddle.jit.to_static(run, input_spec=spec, full_graph=True)
    for length in (3, 5):
        inner = [length if size in (None, -1) else size for size in shape[1:]]
        x = paddle.to_tensor(tokens(num_tokens=4 * length)).reshape([-1, *inner])
        x.stop_gradient = False
        expected = gradients(eager_layer, x, return_aux_loss=True)
        actual = gradients(layer, x, call=static)
        assert set(actual) == set(expected)
        for name, value in expected.items():
            assert_close(actual[name], value, 1e-6, name)
        assert layer.expert_counts.tolist() == eager_layer.expert_counts.tolist()


@pytest.mark.parametrize("training", [False, True])
def test_to_static_without_full_graph(training):
    """Paddle's default reads the bytecode of what is called, and falls back to eager where it has to."""
    options = dict(balance_loss_weight=0.5, z_loss_weight=0.1, capacity_factor=1.2, bias_update_speed=0.01)
    layers = [make_layer(**options) for _ in range(2)]
    for layer in layers:
        layer.train() if training else layer.eval()
    x = trained_tokens()
    expected = gradients(layers[0], x, return_aux_loss=True)

    def run(x):
        return layers[1](x, return_aux_loss=True)

    actual = gradients(layers[1], x, call=paddle.jit.to_static(run))
    for name, value in expected.items():
        assert_close(actual[name], value, 1e-6, name)
    assert layers[1].expert_counts.tolist() == layers[0].expert_counts.tolist()


def test_jitter_under_to_static():
    layer = make_layer(jitter_epsilon=0.2)

    def run(x):
        return layer(x, return_routing=True)

    spec = [paddle.static.InputSpec([None, HIDDEN])]
    static = paddle.jit.to_static(run, input_spec=spec, full_graph=True)
    x = paddle.to_tensor(tokens())
    assert (static(x)[2].numpy() != static(x)[2].numpy()).any()


# ---------------------------------------------------------------- clipping in one process


@pytest.mark.parametrize("clip_norm", [float("inf"), 1e39])
def test_a_norm_without_clipping(clip_norm):
    parallel = init_distributed()
    layer = make_layer()
    layer(trained_tokens()).sum().backward()
    parameters = layer.parameters()
    before = [parameter.grad.numpy() for parameter in parameters]
    norm = clip_gradients(parameters, clip_norm, parallel)
    assert norm.item() == pytest.approx(sum((grad**2).sum() for grad in before) ** 0.5, rel=1e-5)
    optimizer = paddle.optimizer.SGD(1.0, parameters, grad_clip=ClipGradByGlobalNorm(clip_norm, parallel))
    values = [parameter.numpy() for parameter in parameters]
    optimizer.step()
    for parameter, value, grad in zip(parameters, values, before):
        np.testing.assert_array_equal(parameter.numpy(), value - grad)
    for bad in (0, float("nan"), "1", None, True):
        for clip in (ClipGradByGlobalNorm, functools.partial(clip_gradients, parameters)):
            with pytest.raises(ValueError, match="clip_norm must be"):
                clip(bad, parallel)


def test_clipping_keeps_float64_and_refuses_sparse_gradients():
    parallel = init_distributed()
    linear = paddle.nn.Linear(3, 3).to(dtype="float64")
    linear(paddle.randn([2, 3], "float64")).sum().backward()
    before = linear.weight.grad.numpy()
    norm = clip_gradients(linear.parameters(), 1e9, parallel)
    np.testing.assert_array_equal(linear.weight.grad.numpy(), before)
    clip_gradients(linear.parameters(), norm.item() / 2, parallel)
    np.testing.assert_allclose(linear.weight.grad.numpy(), before / 2, rtol=1e-6)
    half = paddle.nn.Linear(1, 301).to(dtype="bfloat16")  # 301 is none of its numbers
    half.weight.sum().backward()
    assert clip_gradients([half.weight], 1e9, parallel).item() == pytest.approx(301**0.5)
    embedding = paddle.nn.Embedding(5, 3, sparse=True)
    embedding(paddle.to_tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=f"the gradient of {embedding.weight.name} is sparse"):
        clip_gradients(embedding.parameters(), 1.0, parallel)


def test_clipping_of_the_gradients_that_fleet_keeps_in_float32():
    layer = make_layer(dtype="bfloat16")
    model = MixPrecisionLayer(layer, dtype="bfloat16")
    (model(trained_tokens().astype("bfloat16")).astype("float32") ** 2).sum().backward()
    kept = [parameter.main_grad for parameter in layer.parameters()]  # parts of a buffer, under fleet
    before = [grad.numpy() for grad in kept]
    norm = clip_gradients(layer.parameters(), 0.5, init_distributed())
    assert norm.item() == pytest.approx(sum((grad**2).sum() for grad in before) ** 0.5, rel=1e-5)
    for parameter, place, grad in zip(layer.parameters(), kept, before):
        np.testing.assert_allclose(place.numpy(), grad * (0.5 / norm.item()), rtol=1e-5)
        assert parameter.main_grad is place


def test_what_is_no_context_and_no_group():
    parallel, parameters = init_distributed(), make_layer().parameters()
    optimizer = paddle.optimizer.SGD(parameters=parameters)
    for call in (
        functools.partial(ClipGradByGlobalNorm, 1.0),
        functools.partial(clip_gradients, parameters, 1.0),
        functools.partial(average_gradients, parameters),
        functools.partial(broadcast_parameters, parameters),
        functools.partial(check_optimizer, optimizer),
        functools.partial(agree_on_overflow, paddle.amp.GradScaler(enable=False)),
    ):
        with pytest.raises(ValueError, match="parallel must be what init_distributed returned, got None"):
            call(None)
    for call in (parallel.size, lambda group: average_gradients(parameters, parallel, replicas=(group,))):
        with pytest.raises(ValueError, match="group must be 'ep', 'tp', 'grid', 'dp' or a .* got 'xx'"):
            call("xx")


def test_buckets_start_anew_when_they_are_full(monkeypatch):
    monkeypatch.setattr(training, "_BUCKET_ELEMENTS", 4)
    sizes = (3, 2, 2, 9, 1, 1)
    parameters = [*map(paddle.zeros, ([size] for size in sizes)), paddle.zeros([1], "bfloat16")]
    buckets = [[one.size for one in bucket] for bucket in training._buckets(parameters)]
    assert buckets == [[3], [2, 2], [9], [1, 1], [1]]


def test_weights_that_layers_share_count_once(monkeypatch):
    """Also where the second time comes in another bucket."""
    monkeypatch.setattr(training, "_BUCKET_ELEMENTS", 2)
    parallel = init_distributed()
    parameter = paddle.create_parameter([2], "float32")
    parameter.expert, parameter.grad = True, paddle.to_tensor([3.0, 4.0])
    assert clip_gradients([parameter, parameter], 10.0, parallel).item() == 5
    monkeypatch.setattr(parallel, "size", lambda group: 2)
    average_gradients([parameter, parameter], parallel, replicas=("dp", "ep"))
    assert parameter.grad.tolist() == [0.75, 1]


def test_a_scaler_that_is_turned_off_steps_as_before():
    layer = make_layer()
    optimizer = paddle.optimizer.SGD(1.0, parameters=layer.parameters())
    scaler = agree_on_overflow(paddle.amp.GradScaler(enable=False), init_distributed())
    scaler.scale(layer(trained_tokens()).sum()).backward()
    expected = (layer.down_weight - layer.down_weight.grad).numpy()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    np.testing.assert_array_equal(layer.down_weight.numpy(), expected)


# ---------------------------------------------------------------- what Paddle refuses


def test_group_sharded_parallel():
    """When this fails, stages 2 and 3 of ZeRO can be tested here: docs/training.md says that they cannot."""
    layer = make_layer()
    optimizer = paddle.optimizer.AdamW(parameters=layer.parameters())
    for level in ("os", "os_g", "p_g_os"):
        with pytest.raises(AssertionError, match="only support gpu, xpu and custom_device now"):
            group_sharded_parallel(layer, optimizer, level)
