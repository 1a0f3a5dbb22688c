"""A block as other packages have them, in plain Paddle, and what it becomes on paddle_moe."""

from __future__ import annotations

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F

from paddle_moe import gate, route
from paddle_moe.integrations.blocks import MoEBlock
from paddle_moe.integrations.models import Integration

HIDDEN = 16


class Expert(nn.Layer):
    def __init__(self, intermediate: int, bias: bool):
        super().__init__()
        options = None if bias else False
        self.gate_proj = nn.Linear(HIDDEN, intermediate, bias_attr=options)
        self.up_proj = nn.Linear(HIDDEN, intermediate, bias_attr=options)
        self.down_proj = nn.Linear(intermediate, HIDDEN, bias_attr=options)
        self.act_fn = nn.Silu()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Stacked(nn.Layer):
    def __init__(self, num_experts: int, intermediate: int):
        super().__init__()
        self.gate_up_proj = self.create_parameter([num_experts, HIDDEN, 2 * intermediate])
        self.down_proj = self.create_parameter([num_experts, intermediate, HIDDEN])
        self.act_fn = nn.Silu()

    def forward(self, x, expert: int):
        gate, up = (x @ self.gate_up_proj[expert]).chunk(2, axis=-1)
        return (self.act_fn(gate) * up) @ self.down_proj[expert]


class Block(nn.Layer):
    """The same values on every rank; `here`: the experts that fleet would leave on this one."""

    def __init__(
        self, num_experts: int, intermediate: int, shared: int = 0, bias=False, stacked=False, here=None
    ):
        super().__init__()
        self.top_k = min(2, num_experts)
        self.gate = nn.Linear(HIDDEN, num_experts, bias_attr=False)
        if stacked:
            self.experts = Stacked(num_experts, intermediate)
        else:
            self.experts = nn.LayerList([Expert(intermediate, bias) for _ in range(num_experts)])
        if shared:
            self.shared = Expert(shared, bias)
        rng = np.random.default_rng(num_experts)
        for parameter in self.parameters():
            values = rng.standard_normal(parameter.shape) / HIDDEN**0.5
            parameter.set_value(paddle.to_tensor(values.astype("float32")))
        for number in range(num_experts):
            if here is not None and number not in here:
                self.experts[number] = None

    def forward(self, x):
        scores = F.softmax(self.gate(x), axis=-1)
        weights, chosen = scores.topk(self.top_k, axis=-1)
        weights = weights / weights.sum(axis=-1, keepdim=True)
        out = paddle.zeros_like(x)
        for number in range(scores.shape[1]):
            share = (weights * (chosen == number).astype(x.dtype)).sum(axis=-1, keepdim=True)
            stacked = isinstance(self.experts, Stacked)
            out = out + share * (self.experts(x, number) if stacked else self.experts[number](x))
        return out + self.shared(x) if hasattr(self, "shared") else out


def draw_tokens(count: int, block: Block) -> paddle.Tensor:
    """Tokens whose experts do not depend on rounding: of many, those that tell them apart best."""
    x = paddle.randn([16 * count, HIDDEN])
    scores = F.softmax(block.gate(x), axis=-1).topk(block.top_k + 1, axis=-1)[0]
    return x[(scores[:, -2] - scores[:, -1]).argsort(descending=True)[:count]]


class Beside(nn.Layer):
    """Two blocks next to each other: their collectives have no order but that of the graph."""

    def __init__(self, few, many):
        super().__init__()
        self.few, self.many = few, many

    def forward(self, x):
        return x + self.few(x) + self.many(x)


def to_checkpoint():
    """Experts in a list, with everything they can have, and stacked ones."""
    return Beside(Block(5, 6, shared=4, bias=True), Block(3, 5, stacked=True))


class Accelerated(MoEBlock):
    stock = f"{__name__}:Block"
    model = "the tests"

    def shared_expert(self):
        return self._sub_layers.get("shared")

    def forward(self, hidden_states):
        logits = gate(self.tokens(hidden_states), self.gate.weight)
        return self.mix(hidden_states, *route(logits, self.top_k, renormalize_eps=0.0))


integration = Integration("the tests", [Accelerated], lambda model, holdings: None)
accelerate, restore = integration.accelerate, integration.restore
