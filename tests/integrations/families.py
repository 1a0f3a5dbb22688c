"""What the small models of both packages share: seeded weights and real tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

import dense
import numpy as np
import paddle

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
