"""A small model with two layers of experts, and how it is trained: the same in one process and in many."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import paddle
from checks import relative_l2
from layer_cases import EVERYTHING, EXPERTS, HIDDEN, TOP_K, dense_weights, tokens
from paddle.base import core
from paddle.base.framework import _dygraph_tracer

from paddle_moe import ClipGradByGlobalNorm, average_gradients
from paddle_moe.layers import FusedMoE
from paddle_moe.params import shard_experts, slice_intermediate

SEQUENCES, LENGTH = 4, 5


def make_layer(parallel=None, *, seed=0, num_experts=EXPERTS, parts=EVERYTHING, **options):
    weights = dense_weights(options.pop("dtype", "float32"), num_experts=num_experts, seed=seed, **parts)
    return FusedMoE.from_dense(**weights, top_k=TOP_K, parallel=parallel, **options)


def shard_like(layer, dense):
    """The part of the values `dense` of a whole layer, by parameter name, that `layer` holds."""
    place = dict(ep_rank=layer.ep_rank, ep_size=layer.ep_size, tp_rank=layer.tp_rank, tp_size=layer.tp_size)
    part = dict(dense)
    shard = shard_experts(
        dense["gate_up_weight"],
        dense["down_weight"],
        dense.get("gate_up_bias"),
        dense.get("down_bias"),
        **place,
    )
    part["gate_up_weight"], part["down_weight"] = shard.gate_up_weights, shard.down_weights
    part["gate_up_bias"], part["down_bias"] = shard.gate_up_bias, shard.down_bias
    if "shared_down_weight" in dense:
        rank, size = layer.tp_rank, layer.tp_size
        if layer.dispatch == "replicated":
            rank, size = layer.ep_rank * layer.tp_size + layer.tp_rank, layer.ep_size * layer.tp_size
        part["shared_gate_up_weight"] = slice_intermediate(
            dense["shared_gate_up_weight"], rank, size, axis=-1, halves=2
        )
        part["shared_down_weight"] = slice_intermediate(dense["shared_down_weight"], rank, size, axis=-2)
    return {name: value for name, value in part.items() if value is not None}


def assert_close(actual, expected, tolerance, where):
    """Equal shapes and a small relative L2 distance; what is zero must be zero."""
    assert list(actual.shape) == list(expected.shape), f"{where}: {actual.shape} and {expected.shape}"
    if actual.size == 0:
        return
    error = relative_l2(actual, expected) if expected.any() else float(np.abs(actual).max())
    assert error < tolerance, f"{where}: relative error {error}"


def as_float32(tensor):
    return None if tensor is None else tensor.astype("float32").numpy()


def gradients(layer, x, *, call=None, **inputs):
    """The output, and all gradients by name for a fixed weighted sum of the output.

    The sum runs over a transposed output, so that the gradient arrives with other strides. `call` stands for
    layer(x, **inputs) where it is given.
    """
    result = call(x) if call else layer(x, **inputs)
    output, *others = result if isinstance(result, tuple) else (result,)
    factors = np.random.default_rng(7).standard_normal(output.shape[::-1]).astype(np.float32)
    loss = (output.astype("float32").T * paddle.to_tensor(factors)).sum()
    for other in others:
        loss = loss + 10 * other.sum()
    if not loss.stop_gradient:
        loss.backward()
    values = {name: as_float32(parameter.grad) for name, parameter in layer.named_parameters()}
    values["hidden_states"] = as_float32(x.grad)
    values["output"] = as_float32(output)
    layer.clear_gradients()
    x.clear_gradient()
    return {name: value for name, value in values.items() if value is not None}


def assert_same_gradients(layer, dense_layer, x, tolerance=2e-6, call=None, dense_call=None, **inputs):
    """`layer` has the output and the gradients of `dense_layer`, of which it is a shard."""
    mine = gradients(layer, x, call=call, **inputs)
    whole = gradients(dense_layer, x, call=dense_call, **inputs)
    sharded = {"gate_up_weight", "down_weight", "gate_up_bias", "down_bias", "shared_gate_up_weight"}
    sharded.add("shared_down_weight")
    if sharded & set(whole):
        zeros = {
            name: np.zeros(parameter.shape, np.float32) for name, parameter in dense_layer.named_parameters()
        }
        part = shard_like(layer, {**zeros, **whole})
        whole = {name: part[name] for name in part if name in whole}
    assert set(mine) == set(whole), (set(mine), set(whole))
    for name, value in whole.items():
        assert np.isfinite(mine[name]).all(), name
        assert_close(mine[name], value, tolerance, name)


@contextlib.contextmanager
def autocast(level: str, dtype: str = "bfloat16") -> Iterator[None]:
    """What paddle.amp.auto_cast sets; on a CPU that does nothing itself, in Paddle 3.3.1."""
    tracer = _dygraph_tracer()
    before = tracer._amp_level, tracer._amp_dtype
    tracer._amp_level, tracer._amp_dtype = getattr(core.AmpLevel, level), dtype
    try:
        yield
    finally:
        tracer._amp_level, tracer._amp_dtype = before


@contextlib.contextmanager
def native_operators() -> Iterator[dict[str, set[str]]]:
    """The names of Paddle's own operators that are called from Python, by the level of autocast at the call.

    On a GPU the level says what they compute in; here they have no half precision that could show.
    """
    seen: dict[str, set[str]] = {}

    def watched(name, function):
        def call(*arguments, **options):
            seen.setdefault(_dygraph_tracer()._amp_level.name, set()).add(name)
            return function(*arguments, **options)

        return call

    names = [(paddle._C_ops, name) for name in dir(paddle._C_ops) if not name.startswith("_")]
    arithmetic = [
        f"__{reverse}{name}__" for reverse in ("", "r") for name in ("add", "sub", "mul", "truediv")
    ]
    names += [(paddle.Tensor, name) for name in arithmetic]
    functions = {place: getattr(*place) for place in names}
    for (home, name), function in functions.items():
        setattr(home, name, watched(name.strip("_") if home is paddle.Tensor else name, function))
    try:
        yield seen
    finally:
        for (home, name), function in functions.items():
            setattr(home, name, function)


class Model(paddle.nn.Layer):
    """Two layers of experts between dense ones, with biases, a shared expert and every loss."""

    def __init__(self, parallel=None, **options):
        super().__init__()
        rng = np.random.default_rng(5)

        def linear():
            layer = paddle.nn.Linear(HIDDEN, HIDDEN)
            layer.weight.set_value((rng.standard_normal((HIDDEN, HIDDEN)) / HIDDEN**0.5).astype(np.float32))
            return layer

        options = {
            **dict(balance_loss_weight=0.1, balance_loss="global", z_loss_weight=0.01),
            **dict(bias_update_speed=1e-3),
            **options,
        }
        self.first, self.last = linear(), linear()
        self.experts = paddle.nn.LayerList([make_layer(parallel, seed=seed, **options) for seed in (0, 1)])

    def forward(self, x):
        x = paddle.tanh(self.first(x))
        losses = paddle.zeros([])
        for experts in self.experts:
            y, loss = experts(x, return_aux_loss=True)
            x, losses = x + y, losses + loss
        return self.last(x), losses


class Block(paddle.nn.Layer):
    """A dense layer and one of experts, which hand on their losses [1]: a part of a pipeline."""

    def __init__(self, seed):
        super().__init__()
        self.linear = paddle.nn.Linear(HIDDEN, HIDDEN)
        weight = np.random.default_rng(seed).standard_normal((HIDDEN, HIDDEN)) / HIDDEN**0.5
        self.linear.weight.set_value(weight.astype(np.float32))
        self.experts = make_layer(seed=seed, balance_loss_weight=0.1, z_loss_weight=0.01)

    def forward(self, inputs):
        x, losses = inputs if isinstance(inputs, tuple) else (inputs, None)
        y, loss = self.experts(paddle.tanh(self.linear(x)), return_aux_loss=True)
        return x + y, loss.reshape([1]) if losses is None else losses + loss


def batch(step):
    """[sequences, length, H] inputs and targets of a step."""
    rng = np.random.default_rng([11, step])
    return rng.standard_normal((2, SEQUENCES, LENGTH, HIDDEN)).astype(np.float32)


def loss_of(model, x, target):
    output, losses = model(paddle.to_tensor(x))
    return ((output.astype("float32") - paddle.to_tensor(target)) ** 2).mean() + losses


def train(
    model,
    steps,
    parallel=None,
    *,
    clip_norm=0.5,
    micro_batches=1,
    wrapped=None,
    after_backward=None,
    replicas=("dp",),
):
    """Trains on this replica's part of every batch; returns the losses."""
    dp_rank, dp_size = (parallel.dp_rank, parallel.dp_size) if parallel else (0, 1)
    if "ep" in replicas:
        dp_rank, dp_size = dp_rank * parallel.ep_size + parallel.ep_rank, dp_size * parallel.ep_size
    clip = (
        ClipGradByGlobalNorm(clip_norm, parallel) if parallel else paddle.nn.ClipGradByGlobalNorm(clip_norm)
    )
    optimizer = paddle.optimizer.AdamW(1e-2, parameters=model.parameters(), grad_clip=clip)
    losses = []
    for step in range(steps):
        x, target = (np.split(part, dp_size)[dp_rank] for part in batch(step))
        total = 0.0
        for piece in zip(np.split(x, micro_batches), np.split(target, micro_batches)):
            loss = loss_of(wrapped or model, *piece) / micro_batches
            loss.backward()
            total += loss.item()
        if after_backward:
            after_backward()
        elif parallel:
            average_gradients(model.parameters(), parallel, replicas=replicas)
        optimizer.step()
        optimizer.clear_grad()
        for experts in model.experts:
            experts.update_correction_bias()
        losses.append(total)
    return losses


def assert_same_model(model, dense, tolerance=1e-5):
    """The parameters and buffers of `model` are those of `dense`, of which it holds shards."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    for name, value in dense.state_dict().items():
        if not name.startswith("experts."):
            assert_close(state[name], value.numpy(), tolerance, name)
    for index, (mine, whole) in enumerate(zip(model.experts, dense.experts)):
        part = shard_like(mine, {name: value.numpy() for name, value in whole.state_dict().items()})
        own = {name: value.numpy() for name, value in mine.state_dict().items()}
        assert set(own) == set(part)
        for name, value in part.items():
            assert_close(own[name], value, tolerance, f"experts.{index}.{name}")


def gradients_of_layer(layer: FusedMoE) -> dict[str, np.ndarray]:
    """Of the tokens and of every parameter that has one."""
    x = paddle.to_tensor(tokens())
    x.stop_gradient = False
    (layer(x) * paddle.to_tensor(tokens(seed=5))).sum().backward()
    trained = {name: value for name, value in layer.named_parameters() if value.grad is not None}
    return {name: value.grad.numpy() for name, value in {"x": x, **trained}.items()}
