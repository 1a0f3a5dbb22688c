"""What the small models of both packages share: seeded weights and real tokens."""

from __future__ import annotations

import contextlib
import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import dense
import numpy as np
import paddle
import pytest
from checks import relative_l2
from paddle.distributed.fleet.utils import recompute
from safetensors import safe_open
from safetensors.numpy import save_file
from training_cases import autocast

from paddle_moe import functional
from paddle_moe.integrations.blocks import MoEBlock

TEXT = b"A mixture of experts sends each token to a few of its many experts and adds up what they say. "
VOCABULARY = 128  # the tokens are the bytes of the text


@dataclass(frozen=True)
class Family:
    """One model of a package, its block, and the dense equations of that block."""

    name: str
    config: str
    model: str
    block: str
    dense: Callable
    options: dict[str, Any]


def use_dense_blocks(model, family: Family):
    dense.use_dense_blocks(model, family.block, family.dense)
    return model


def blocks_of(model, family: Family) -> list:
    return [layer for layer in model.sublayers() if type(layer).__name__ == family.block]


@paddle.no_grad()
def draw_weights(model) -> None:
    """The same values for a model on every call; norms keep theirs."""
    rng = np.random.default_rng(7)
    for name, tensor in model.state_dict().items():
        shape = list(tensor.shape)
        if "norm" not in name:
            scale = 0.1 if "bias" in name or len(shape) < 2 else 1.5 / shape[-2] ** 0.5
            values = rng.standard_normal(shape).astype("float32") * np.float32(scale)
            if "correction_bias" in name:
                values = abs(values)  # below 0, experts would tie with those of groups that are not kept
            tensor.set_value(paddle.to_tensor(values).astype(tensor.dtype))


def tokens(batch: int = 2, length: int = 24) -> paddle.Tensor:
    ids = np.frombuffer(TEXT, np.uint8)[: batch * length].astype("int64")
    return paddle.to_tensor(ids).reshape([batch, length])


def logits(model) -> np.ndarray:
    with paddle.no_grad():
        output = model(tokens())
    return (output if isinstance(output, paddle.Tensor) else output[0]).numpy()


def loss_and_gradients(model, **options) -> tuple[float, dict[str, np.ndarray]]:
    """The loss of the language model and the gradients of it and of the auxiliary losses of dense blocks."""
    model.train()
    ids = tokens()
    loss = model(ids, labels=ids, **options)[0]
    auxiliary = [layer.auxiliary_loss for layer in model.sublayers() if hasattr(layer, "auxiliary_loss")]
    (loss + sum(auxiliary)).backward()
    gradients = {name: one.grad.numpy() for name, one in model.named_parameters() if one.grad is not None}
    return float(loss), gradients


def assert_same_gradients(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    largest = max(np.linalg.norm(one) for one in expected.values())
    for name, gradient in expected.items():
        error = np.linalg.norm(actual[name] - gradient)
        assert error < 1e-5 * np.linalg.norm(gradient) + 1e-7 * largest, name


def assert_routes_as_in_float32(integration, family: Family, models, how: str) -> None:
    """Of one block, with weights and tokens of `how`, against their values in float32."""
    model, twin = (integration.accelerate(models.build(family)) for _ in range(2))
    x = paddle.to_tensor(np.random.default_rng(3).standard_normal([2, 150, 64]).astype("float32"))
    mode = contextlib.nullcontext()
    if how == "bfloat16":
        x = x.astype("bfloat16")
        model.to(dtype="bfloat16")
        rounded = {name: one.astype("bfloat16") for name, one in twin.state_dict().items()}
        twin.set_state_dict({name: one.astype("float32") for name, one in rounded.items()})
    else:
        mode = autocast(how)
    outputs, routings, route = [], [], integration.route

    def recorded(logits, *arguments, **options):
        assert logits.dtype == paddle.float32
        routings.append(route(logits, *arguments, **options))
        return routings[-1]

    def lowered(*factors, **options):  # as auto_cast does on a GPU alone
        dtype = functional._paddle_autocast_dtype()
        return matmul(*(factors if dtype is None else [one.astype(dtype) for one in factors]), **options)

    matmul = paddle.matmul
    with pytest.MonkeyPatch.context() as patched, paddle.no_grad():
        patched.setattr(integration, "route", recorded)
        patched.setattr(paddle, "matmul", lowered)
        for one, values, inside in ((model, x, mode), (twin, x.astype("float32"), contextlib.nullcontext())):
            with inside:
                out = blocks_of(one, family)[0](values)
            out = out[0] if isinstance(out, tuple) else out
            assert out.dtype == values.dtype
            outputs.append(out.astype("float32").numpy())
    (ids, weights), (expected_ids, expected_weights) = routings
    np.testing.assert_array_equal(ids.numpy(), expected_ids.numpy())
    np.testing.assert_allclose(weights.numpy(), expected_weights.numpy(), rtol=1e-5)
    assert relative_l2(*outputs) < 1e-2


def results_of_blocks(model, family: Family) -> list[np.ndarray]:
    """What each block makes of the same tokens, and the gradient of these."""
    rng, results = np.random.default_rng(5), []
    values, grad_out = (rng.standard_normal([2, 24, 64]).astype("float32") for _ in range(2))
    for block in blocks_of(model, family):
        x = paddle.to_tensor(values, stop_gradient=False)
        out = block(x)
        out = out[0] if isinstance(out, tuple) else out
        (gradient,) = paddle.grad([out], [x], [paddle.to_tensor(grad_out)])  # leaves parameters without any
        results += [out.numpy(), gradient.numpy()]
    return results


def assert_adapters_train(lora) -> None:
    """Those of the attention, in front of experts that are quantised."""
    lora.mark_only_lora_as_trainable()
    lora.train()
    ids = paddle.to_tensor(np.random.default_rng(0).integers(0, 60, [4, 16]))
    trained = {name: one for name, one in lora.named_parameters() if not one.stop_gradient}
    assert trained and all("lora" in name for name in trained)
    optimizer, losses = paddle.optimizer.AdamW(1e-2, parameters=list(trained.values())), []
    for step in range(8):
        out = lora(input_ids=ids, labels=ids)
        loss = out if isinstance(out, paddle.Tensor) else out[0]
        loss.backward()
        if step == 1:  # at first the second factors are zero
            assert all(float(one.grad.abs().max()) > 0 for one in trained.values())
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0], losses


def assert_experts_are_quantized(integration, family: Family, model, directory: Path) -> None:
    """Block by block, because a rounded block may change what the router after it chooses."""
    exact = results_of_blocks(model, family)
    prepacked = copy.deepcopy(model)
    slices = [one for block in blocks_of(model, family) for one in block.slices()]
    if any(one.parameter.shape[-2] % 2 for one in slices if one.dense.endswith("down_weight")):
        with pytest.raises(ValueError, match="must have an even number of inputs in int8"):
            integration.quantize_experts(prepacked, "int8", prepack=True)
        prepacked = None
    else:
        integration.quantize_experts(prepacked, "int8", prepack=True)
    assert integration.quantize_experts(model, "int8") is model
    results = results_of_blocks(model, family)
    for one, expected in zip(results, exact):
        assert 1e-4 < relative_l2(one, expected) < 0.03
    if prepacked is not None:
        for one, packed in zip(results, results_of_blocks(prepacked, family)):
            assert relative_l2(packed, one) < 1e-5
    np.testing.assert_array_equal(logits(copy.deepcopy(model)), logits(model))
    numbers = {name for name, one in model.state_dict().items() if one.dtype == paddle.int8}
    assert len(numbers) >= len(exact) and not numbers & {name for name, _ in model.named_parameters()}
    for refused in (
        lambda: integration.restore(model),
        lambda: integration.save_checkpoint(model, directory),
        lambda: integration.load_checkpoint(model, directory),
        lambda: model.save_pretrained(directory),
    ):
        with pytest.raises(RuntimeError, match="are int8 since quantize_experts"):
            refused()


def assert_experts_are_prepacked(integration, family: Family, model, directory: Path) -> None:
    exact = results_of_blocks(model, family)
    assert integration.prepack_experts(model) is model
    results = results_of_blocks(model, family)
    for number, (one, expected) in enumerate(zip(results, exact)):
        if number % 2 == 0:  # the gradient of each comes from other products
            np.testing.assert_array_equal(one, expected)
        assert relative_l2(one, expected) < 2e-6
    np.testing.assert_array_equal(logits(copy.deepcopy(model)), logits(model))
    assert not any(".experts." in name and "bias" not in name for name, _ in model.named_parameters())
    for refused in (
        lambda: integration.restore(model),
        lambda: integration.save_checkpoint(model, directory),
        lambda: model.save_pretrained(directory),
    ):
        with pytest.raises(RuntimeError, match="are prepacked since prepack_experts"):
            refused()


def assert_recompute_changes_nothing(block) -> None:
    """In training, with the gradients of everything that the block returns, and of its auxiliary loss."""
    block.train()
    x = paddle.to_tensor(np.random.default_rng(4).standard_normal([2, 5, 64]).astype("float32"))
    x.stop_gradient = False
    gradients = []
    for run in (block, lambda x: recompute(block, x)):
        out = run(x)
        out = out if isinstance(out, tuple) else (out,)
        sum(one.square().sum() for one in out if not one.stop_gradient).backward()
        own = {name: one.grad.numpy() for name, one in block.named_parameters() if one.grad is not None}
        gradients.append({"x": x.grad.numpy(), **own})
        x.clear_grad()
        block.clear_gradients()
    assert_same_tensors(*gradients)


def assert_programs_compute_the_same(block, directory: Path) -> None:
    """paddle.jit.to_static with gradients, in training, and paddle.jit.save, for any number of tokens."""
    values = np.random.default_rng(4).standard_normal([2, 5, 64]).astype("float32")
    block.train()
    gradients = []
    for run in (block.forward, paddle.jit.to_static(Around(block), full_graph=True)):
        x = paddle.to_tensor(values, stop_gradient=False)
        out = run(x)
        out = out if isinstance(out, (tuple, list)) else (out,)
        sum(one.square().sum() for one in out if not one.stop_gradient).backward()
        own = {name: one.grad.numpy() for name, one in block.named_parameters() if one.grad is not None}
        gradients.append({"x": x.grad.numpy(), **own})
        block.clear_gradients()
    assert_same_tensors(*gradients)

    block.eval()
    spec = [paddle.static.InputSpec([None, None, 64], "float32")]
    paddle.jit.save(Around(block), str(directory / "block"), input_spec=spec)
    loaded = paddle.jit.load(str(directory / "block"))
    with paddle.no_grad():
        for x in (paddle.to_tensor(values), paddle.to_tensor(values[:1, :3])):
            results = [one[0] if isinstance(one, (tuple, list)) else one for one in (block(x), loaded(x))]
            np.testing.assert_array_equal(*(one.numpy() for one in results))


class Around(paddle.nn.Layer):
    """A layer around a block, because to_static changes the layer that it is given."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x)


@paddle.no_grad()
def assert_adapters_are_refused(
    integration, family: Family, lora_model, build, target: str, text: str
) -> None:
    """Before `accelerate` and after it; they would count for nothing."""
    before, after = lora_model(build(), target), integration.accelerate(build())
    with pytest.raises(ValueError, match=text):
        integration.accelerate(before)
    assert not any(isinstance(layer, MoEBlock) for layer in before.sublayers())
    lora_model(after, target)
    with pytest.raises(ValueError, match=text):
        blocks_of(after, family)[0](paddle.randn([1, 3, 64]))


def split_qkv(value: np.ndarray, config) -> dict[str, np.ndarray]:
    """The columns of queries, keys and values, which a fused layer has in groups of one key each."""
    keys = config.num_key_value_heads
    groups = config.num_attention_heads // keys
    heads = value.reshape([*value.shape[:-1], keys, groups + 2, -1])
    parts = {"q": heads[..., :groups, :], "k": heads[..., groups, :], "v": heads[..., groups + 1, :]}
    return {name: part.reshape([*value.shape[:-1], -1]) for name, part in parts.items()}


def write_files(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Two safetensors files and an index."""
    path.mkdir(parents=True)
    keys, weight_map = sorted(tensors), {}
    for part in range(2):
        file = f"model-{part + 1:05}-of-00002.safetensors"
        save_file({key: np.ascontiguousarray(tensors[key]) for key in keys[part::2]}, path / file)
        weight_map.update(dict.fromkeys(keys[part::2], file))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def read_files(path: Path) -> dict[str, np.ndarray]:
    """What the index of a directory names."""
    weight_map = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {}
    for key, file in weight_map.items():
        with safe_open(path / file, framework="np") as opened:
            tensors[key] = opened.get_tensor(key)
    return tensors


def assert_same_tensors(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


def in_no_file(name: str) -> bool:
    """State that published files lack, and that loading them leaves as it was."""
    return "rotary_emb" in name or name.endswith("expert_usage")


@paddle.no_grad()
def set_to_zero(model) -> None:
    for name, tensor in model.state_dict().items():
        if not in_no_file(name):
            tensor.set_value(paddle.zeros_like(tensor))


# What a file of Mixtral-like names can be wrong in, and the text of the error. {key}: of one expert's matrix.
def wrong_files(key: str, shape: list[int]) -> dict[str, tuple[Callable[[dict], Any], str]]:
    here, there = (f"\\[{a}, {b}\\]" for a, b in (shape, shape[::-1]))
    extra = key.replace(".experts.2.", ".experts.77.")
    return {
        "missing": (lambda t: t.pop(key), f"{key}: expected a tensor {here}, found nothing"),
        "turned": (
            lambda t: t.update({key: t[key].T.copy()}),
            f"{key}: expected the shape {here}, found {there}",
        ),
        "dtype": (
            lambda t: t.update({key: t[key].astype("int8")}),
            f"{key}: expected float32, found int8",
        ),
        "extra": (
            lambda t: t.update({extra: t[key]}),
            f"{extra}: expected no tensor of this name, found a tensor",
        ),
    }


def cut_short(path: Path) -> None:
    """The second of the files of `write_files` loses its last bytes."""
    file = path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
