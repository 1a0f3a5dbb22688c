"""Blocks of other packages that run on paddle_moe.

A block keeps its parameters, their names and its sublayers. What changes is its class: from the stock class
to one derived from it and from :class:`MoEBlock`, whose forward calls the operators of paddle_moe on the same
parameters. So ``isinstance`` holds, checkpoints are interchangeable, and giving the block its own class back
undoes everything.

Over EP x TP ranks a block also gives away what other ranks hold: experts outside this rank's range leave the
block, and the remaining parameters shrink in place to this rank's columns, under their own names.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Callable, Optional

import paddle
from paddle import nn

from paddle_moe import functional
from paddle_moe._options import dtype_name, switch
from paddle_moe.all_to_all import all_to_all_experts
from paddle_moe.collectives import has_no_rows, leave_shards, no_contribution
from paddle_moe.distributed import ParallelContext
from paddle_moe.huge_pages import use_huge_pages
from paddle_moe.layer_weights import keep_dtypes
from paddle_moe.params import Part, shard_range
from paddle_moe.prepacking import check_inputs, expect_dtype_of_prepacked, prepack_stack, prepack_weights
from paddle_moe.quantization import quantize_stack, quantize_stored
from paddle_moe.sharded import expect_dynamic_mode, partial_sum

Tensor = paddle.Tensor
_MISSING = ...  # stays itself in a copy

# The Linear layers of an expert in the models that we know: gate and up, or both in one; down.
_PROJECTIONS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("up_gate_proj",), "down_proj"),  # holds [gate | up], whatever its name says
    (("gate_up_fused_proj",), "down_proj"),
)

# Names of activation classes and functions in these packages -> activation of the operator.
_ACTIVATIONS = {
    "Silu": "silu",
    "SiLUActivation": "silu",
    "swiglu": "silu",  # silu(gate) * up as one function
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "LinearActivation": "identity",
}


# ---------------------------------------------------------------- weights of experts


@dataclass
class Weights:
    """Experts in a form that mixture_of_experts takes: one tensor per expert and matrix, or stacked ones."""

    gate_up: Any
    down: Any
    gate_up_bias: Any = None
    down_bias: Any = None
    gate_up_scale: Any = None  # of quantised ones, which are stored [out, in] or prepacked
    down_scale: Any = None

    def tensors(self) -> list[Tensor]:
        groups = [one for one in vars(self).values() if one is not None]
        return [tensor for group in groups for tensor in (group if isinstance(group, list) else [group])]

    def are_prepacked(self) -> bool:
        down = self.down[0] if isinstance(self.down, list) else self.down
        return down.ndim == 4


class FrozenWeight(nn.Layer):
    """What MoEBlock.quantize() and prepack() put in the place of a Linear layer, or of weights [E, in, out].

    Buffers weight and scale, [out, in] as paddle_moe.quantize gives them or as paddle_moe.prepack_weights
    does, or weight alone, prepacked; the bias as it was. They get the flags of the parameter `before` where
    it is a shard, and compute in its dtype, `dense_dtype`.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None, before: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.register_buffer("weight", weight)
        if scale is None:
            self.scale = None
        else:
            self.register_buffer("scale", scale)
        self.bias = bias
        self.dense_dtype = before.dtype
        use_huge_pages(weight)
        self._flags = {}
        if hasattr(before, "shard_group"):
            self._flags = {name: getattr(before, name) for name in ("no_sync", "expert", "shard_group")}
            self._flags["is_distributed"] = True  # nobody draws values for them any more
        self._mark()

    def _mark(self) -> None:
        for tensor in self._buffers.values():
            for name, value in self._flags.items():
                setattr(tensor, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenWeight:
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        if hasattr(self.bias, "shard_group"):  # Paddle copies no attributes of parameters
            for name in self._flags:
                setattr(twin.bias, name, getattr(self.bias, name))
        twin._mark()
        return twin

    def _apply(self, func, device, dtype, blocking, include_sublayers=True):
        panels = [self.weight] if self.scale is None else []
        convert = keep_dtypes(func, [] if panels else self._buffers.values(), panels)
        super()._apply(convert, device, dtype, blocking, include_sublayers)
        self._mark()
        use_huge_pages(self.weight)
        if dtype is not None:
            self.dense_dtype = getattr(paddle, dtype_name(dtype))

    def extra_repr(self) -> str:
        return f"shape={self.weight.shape}, dtype={self.weight.dtype}"


def is_empty(tensor: Tensor) -> bool:
    """By its shape: in a program that is being built ``size`` is a value that nobody knows yet."""
    return 0 in tensor.shape


def _linear(owner: nn.Layer, name: str) -> nn.Layer:
    layer = owner._sub_layers[name]
    if isinstance(layer, FrozenWeight):
        return layer
    # Packages derive their own Linear (for fp8, say); adapters are derived too, but have names of their own.
    if not isinstance(layer, nn.Linear) or type(layer).__name__ != "Linear":
        raise ValueError(
            f"{name} of {type(owner).__name__} must be a paddle.nn.Linear, got {type(layer).__name__}: "
            "paddle_moe does not run experts and routers with adapters, quantised weights or the package's "
            "own tensor parallelism; merge the adapters, or build the model without them"
        )
    if "weight" not in layer._parameters:  # hooks compute it, which run only where the layer itself is called
        raise ValueError(
            f"{name} of {type(owner).__name__} must have a parameter weight, got "
            f"{', '.join(sorted(layer._parameters))}: take off what computes it, such as weight_norm"
        )
    return layer


def _projections(expert: nn.Layer) -> tuple[list[nn.Layer], nn.Layer]:
    """(the layers of gate and up, or the one that holds both; the layer of down)."""
    for gate_up, down in _PROJECTIONS:
        if gate_up[0] in expert._sub_layers:
            return [_linear(expert, name) for name in gate_up], _linear(expert, down)
    known = "; ".join(", ".join([*gate_up, down]) for gate_up, down in _PROJECTIONS)
    raise ValueError(
        f"{type(expert).__name__} must have the layers of a gated expert ({known}), got "
        + (", ".join(expert._sub_layers) or "no layers")
    )


def listed_weights(experts: list[nn.Layer]) -> Weights:
    """The parameters of experts that are layers of their own."""
    pairs = [_projections(expert) for expert in experts]
    gate_up = [pair[0][part] for part in range(len(pairs[0][0])) for pair in pairs]
    down = [pair[1] for pair in pairs]

    def biases(layers: list[nn.Layer]) -> list[Tensor] | None:
        if layers[0].bias is None or is_empty(layers[0].bias):
            return None
        return [layer.bias for layer in layers]

    weights = Weights(
        [layer.weight for layer in gate_up], [layer.weight for layer in down], biases(gate_up), biases(down)
    )
    if isinstance(down[0], FrozenWeight) and down[0].scale is not None:
        weights.gate_up_scale = [layer.scale for layer in gate_up]
        weights.down_scale = [layer.scale for layer in down]
    return weights


_STACKED = {"gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"}


def stacked_weights(experts: nn.Layer) -> Weights:
    """The parameters of experts that are one layer, without biases."""
    # LoRA keeps these two under their names, beside its own.
    others = [name for name in experts._parameters if name not in _STACKED]
    if others:
        raise ValueError(
            f"{type(experts).__name__} must have the parameters gate_up_proj and down_proj alone, got also "
            f"{', '.join(others)}: paddle_moe does not run experts with adapters; build the model without "
            "them"
        )
    pair = experts.gate_up_proj, experts.down_proj
    if isinstance(pair[1], FrozenWeight):
        tensors, scales = [one.weight for one in pair], [one.scale for one in pair]
        return Weights(*tensors, None, None, *scales)
    return Weights(*pair)


def activation_of(function: Any) -> str:
    """The operator's name of an activation function or layer of a model."""
    name = getattr(function, "__name__", type(function).__name__)
    if name == "GELU" and function._approximate:
        return "gelu_tanh"
    if name not in _ACTIVATIONS:
        raise ValueError(f"the experts' activation must be one of {', '.join(_ACTIVATIONS)}, got {name}")
    return _ACTIVATIONS[name]


# ---------------------------------------------------------------- parts of a parameter


@dataclass
class Slice:
    """What this rank holds of a tensor of a block, and what that tensor is of the block's dense weights.

    Attributes:
        parameter: the tensor, a part of it, or of a rank that has nothing of it an empty one.
        dense: the dense weight that it belongs to, named as in FusedMoE.
        whole: which part of the dense weight the tensor is on a single rank. The dimensions are those of
            FusedMoE.parts: E experts, H hidden, G the halves gate and up, I intermediate, S intermediate of
            the shared expert.
        part: which part of it this rank holds.
        shared_by: "grid" or "tp", the ranks that share it; "": all have the whole.
    """

    parameter: Tensor
    dense: str
    whole: Part
    part: Part
    shared_by: str = ""
    before: dict[str, Any] = field(default_factory=dict)  # attributes of the parameter that were changed

    @classmethod
    def of(cls, parameter: Tensor, dense: str, pattern: str, **ranges: tuple[int, int]) -> Slice:
        """A tensor that is still whole. `ranges`: of the dimensions that do not follow from its shape."""
        part = Part(pattern, ranges)
        for group, size in zip(part.groups, parameter.shape):
            for name in group:
                if name not in ranges:
                    known = [part.length(other) for other in group if other in ranges]
                    ranges[name] = 0, size // math.prod(known)
        return cls(parameter, dense, part, part)

    def part_in(self, ranges: dict[str, tuple[int, int]] | None, copy: bool = False) -> Part:
        """What of the whole lies in `ranges`; None: nothing."""
        box = None
        if ranges is not None:
            known = {name: span for name, span in ranges.items() if name in self.whole.ranges}
            box = self.whole.overlap(Part("", {**self.whole.ranges, **known}))
        if box is None:
            box = {**self.whole.ranges, self.whole.names[-1]: (0, 0)}
        return Part(self.whole.pattern, box, copy)

    def cut(self, ranges: dict[str, tuple[int, int]] | None, shared_by: str = "", copy: bool = False) -> None:
        """Shrinks the tensor, still whole, to what of it lies in `ranges`; None: to nothing.

        Args:
            shared_by: see above.
            copy: another rank of the grid holds the same.
        """
        self.part = self.part_in(ranges, copy)
        with paddle.no_grad():
            if not self.part.size:
                self.hold(paddle.zeros(self.part.shape, self.parameter.dtype))
            elif self.part.ranges != self.whole.ranges:
                unfolded = self.parameter.reshape([self.whole.length(name) for name in self.whole.names])
                self.hold(unfolded[self._place()].reshape(self.part.shape))
        self.shared_by = shared_by
        if shared_by:
            self._set(no_sync=True, expert=shared_by == "grid", shard_group=shared_by)

    def mark(self) -> None:
        """With what `cut` has set, as the parameters of FusedMoE are: what sums over ranks must know it."""
        if self.shared_by:
            self._set(is_distributed=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Slice:
        twin = memo[id(self)] = copy.copy(self)
        twin.parameter, twin.before = copy.deepcopy(self.parameter, memo), dict(self.before)
        for name in self.before:  # Paddle copies no attributes of parameters
            if hasattr(self.parameter, name):
                setattr(twin.parameter, name, getattr(self.parameter, name))
        twin.mark()  # nobody draws values for a copy, and unpatch() does not know it
        return twin

    def _set(self, **attributes: Any) -> None:
        for name, value in attributes.items():
            self.before.setdefault(name, getattr(self.parameter, name, _MISSING))
            setattr(self.parameter, name, value)

    def restore(self, parallel: ParallelContext) -> None:
        """Undoes :meth:`cut`: all ranks of the grid call this together."""
        self.hold(self.gather(parallel))
        self.unmark()

    def unmark(self) -> None:
        for name, value in self.before.items():
            if value is _MISSING:
                delattr(self.parameter, name)
            else:
                setattr(self.parameter, name, value)

    def hold(self, value: Tensor) -> None:
        """Gives the parameter another shape and value; it stays the object that others refer to."""
        self.parameter.clear_gradient(False)
        value = value.clone()  # may be a view; and it must outlive the call, get_tensor() does not keep it
        self.parameter.get_tensor()._share_data_with(value.get_tensor())

    @paddle.no_grad()
    def gather(self, parallel: ParallelContext) -> Tensor:
        """The whole, on every rank of the grid: all ranks call this together."""
        names = self.whole.names
        unfolded = paddle.zeros([self.whole.length(name) for name in names], self.parameter.dtype)
        if self.part.size and not self.part.copy:
            unfolded[self._place()] = self.parameter.reshape([self.part.length(name) for name in names])
        return parallel.all_reduce(unfolded, "grid").reshape(self.whole.shape)

    def _place(self) -> tuple[slice, ...]:
        return tuple(slice(*self.part.ranges[name]) for name in self.whole.names)


def _slices_of_expert(expert: nn.Layer, number: int | None) -> list[Slice]:
    """Of the tensors of one expert that is a layer, the shared one if `number` is None."""
    gate_up, down = _projections(expert)
    prefix, columns = ("shared_", "S") if number is None else ("", "I")
    own = {} if number is None else {"E": (number, number + 1)}
    slices = []
    for half, one in enumerate(gate_up):
        fused = len(gate_up) == 1
        which = {**own, "G": (0, 2) if fused else (half, half + 1)}
        pattern = f"(G {columns})" if fused else columns
        slices.append(Slice.of(one.weight, f"{prefix}gate_up_weight", f"H {pattern}", **which))
        if one.bias is not None:
            slices.append(Slice.of(one.bias, f"{prefix}gate_up_bias", pattern, **which))
    slices.append(Slice.of(down.weight, f"{prefix}down_weight", f"{columns} H", **own))
    if down.bias is not None:
        slices.append(Slice.of(down.bias, f"{prefix}down_bias", "H", **own))
    return slices


def _linears(expert: nn.Layer) -> list[nn.Layer]:
    gate_up, down = _projections(expert)
    return [*gate_up, down]


Order = Callable[[Tensor], Tensor]  # puts the columns of weights in the operator's order
# What FrozenWeight holds of weights [in, out] or [E, in, out], so many of which stand side by side.
Freeze = Callable[[Tensor, int, Optional[Order]], "tuple[Tensor, Tensor | None]"]


def _freeze_expert(expert: nn.Layer, freeze: Freeze) -> None:
    gate_up, _ = _projections(expert)
    for layer in _linears(expert):
        if isinstance(layer, FrozenWeight):  # of another block, too
            continue
        name = next(name for name, one in expert._sub_layers.items() if one is layer)
        parts = 2 if layer is gate_up[0] and len(gate_up) == 1 else 1
        pair = freeze(layer.weight, parts, None)
        expert._sub_layers[name] = FrozenWeight(*pair, layer.weight, layer.bias)


# ---------------------------------------------------------------- blocks


class MoEBlock:
    """What a block gains: mixed in before the stock class, so ``self`` is the block with its parameters.

    A class derived from this one says how one kind of stock block routes and what it returns. It defines
    ``forward``, which calls :meth:`mix`, and the methods below where the block differs.
    """

    stock = ""  # the class that it accelerates, as "module:name"
    model = ""  # what people call the models that have it
    layout: str | None = None  # of pretrained.LAYOUTS: that of the published files
    linears: tuple[str, ...] = ()  # names of the Linear layers that score tokens
    dispatch = "replicated"
    parallel: ParallelContext | None = None
    frozen: str | None = None  # the dtype of the experts' weights since quantize(), or "prepacked"
    _slices: list[Slice] = []
    _away: dict[str, nn.Layer] = {}  # experts that other ranks hold, by their name in the list
    _ranges: list[tuple[int, int]] = []  # the experts of each EP rank

    def check(self) -> None:
        """Raises ValueError where the block is set up in a way that paddle_moe does not compute."""

    def experts_layer(self) -> nn.Layer:
        """The list of the experts, or the layer with their stacked weights."""
        return self._sub_layers["experts"]

    def shared_expert(self) -> nn.Layer | None:
        """The expert that every token goes to."""
        return None

    def linear_weight(self, name: str) -> Tensor:
        """Of one of `linears`, which adapters may have replaced since the block was accelerated."""
        return _linear(self, name).weight

    def router_slices(self) -> list[Slice]:
        """The tensors of the router."""
        return []

    def expert_slices(self) -> list[Slice]:
        """The tensors of the experts, all of them still whole."""
        if self._stacked():
            experts = self.experts_layer()
            return [
                Slice.of(experts.gate_up_proj, "gate_up_weight", "E H (G I)", G=(0, 2)),
                Slice.of(experts.down_proj, "down_weight", "E I H"),
            ]
        return [one for number, expert in self.held() for one in _slices_of_expert(expert, number)]

    def slices(self) -> list[Slice]:
        """All tensors of the block that files have under the names of its layout."""
        self.expect_parameters()
        if self._slices:
            return self.router_slices() + self._slices
        shared = [] if self.shared_expert() is None else _slices_of_expert(self.shared_expert(), None)
        return self.router_slices() + self.expert_slices() + shared

    def named_slices(self) -> dict[str, Slice]:
        """The same by name, also of experts that are on other ranks."""
        tensors = dict(self.state_dict())
        for index, expert in self._away.items():
            tensors.update((f"experts.{index}.{name}", one) for name, one in expert.named_parameters())
        names = {id(tensor): name for name, tensor in tensors.items()}
        named = {names[id(one.parameter)]: one for one in self.slices()}
        if self.divided_over() > 1:  # they have never been on this rank
            held = self.held()[0][0]
            pattern = [(name, one) for name, one in named.items() if name.startswith(f"experts.{held}.")]
            for number, expert in enumerate(self.experts_layer()._sub_layers.values()):
                if expert is None:
                    for name, one in pattern:
                        whole = Part(one.whole.pattern, {**one.whole.ranges, "E": (number, number + 1)})
                        nothing = Slice(paddle.empty([0], one.parameter.dtype), one.dense, whole, whole)
                        nothing.part = nothing.part_in(None)
                        named[name.replace(f".{held}.", f".{number}.", 1)] = nothing
        return named

    def weights(self) -> Weights:
        """Of the experts on this rank."""
        experts = self.experts_layer()
        if self._stacked():
            return stacked_weights(experts)
        return listed_weights([expert for _, expert in self.held()])

    def activation(self) -> str:
        return activation_of((self.experts_layer() if self._stacked() else self._any_expert()).act_fn)

    def total_experts(self) -> int:
        """Of all ranks."""
        if not self._stacked():
            return len(self.experts_layer()._sub_layers)
        if self._ranges:
            return self._ranges[-1][1]
        if self.frozen is not None:
            return self.experts_layer().down_proj.weight.shape[0]
        return next(one for one in self.slices() if one.dense == "down_weight").whole.length("E")

    def gates_then_ups(self, gate_up: Tensor) -> Tensor:
        """Stacked weights, or their bias, with their last dimension in the order of the operator."""
        return gate_up

    def expect_parameters(self) -> None:
        if self.frozen is not None:
            raise RuntimeError(
                f"{self.how_frozen()}, which no file of its package holds; load, save and restore before "
                "that, or keep the state_dict() of each rank with paddle.save"
            )

    def how_frozen(self) -> str:
        function = "prepack_experts()" if self.frozen == "prepacked" else "quantize_experts()"
        return f"the experts of this {type(self).__name__} are {self.frozen} since {function}"

    def weights_to_freeze(self) -> dict[str, Tensor]:
        """By their names in the block."""
        experts = self.experts_layer()
        stacked = [experts.gate_up_proj, experts.down_proj] if self._stacked() else []
        listed = [] if stacked else [expert for _, expert in self.held()]
        shared = [] if self.shared_expert() is None else [self.shared_expert()]
        layers = [layer for expert in listed + shared for layer in _linears(expert)]
        names = {id(tensor): name for name, tensor in self.state_dict().items()}
        return {names[id(weight)]: weight for weight in stacked + [layer.weight for layer in layers]}

    def use_huge_pages(self) -> None:
        """For the weights of this rank's experts, and of the shared one."""
        use_huge_pages(*self.weights_to_freeze().values())

    def check_prepacking(self, dtype: str | None = None) -> None:
        """A ValueError where the weights of any rank cannot be prepacked.

        dtype: that they will be quantised to; None: as they are.
        """
        for one in self.slices():
            if one.dense.removeprefix("shared_") in ("gate_up_weight", "down_weight"):
                inputs, ranks = one.whole.names[1 if one.whole.names[0] == "E" else 0], 1
                if inputs != "H" and self.parallel is not None:
                    over_grid = one.dense.startswith("shared_") and one.shared_by == "grid"
                    ranks = self.parallel.size("grid" if over_grid else "tp")
                whole = one.whole.length(inputs)
                for size in {whole // ranks, -(-whole // ranks)}:
                    check_inputs(f"{one.dense} of a rank", dtype or one.parameter.dtype, size)

    def quantize(self, dtype: str, granularity: str, prepack: bool = False) -> None:
        """Quantises the experts on this rank and the shared one, whose weights are finite.

        prepack: and prepacks them, after check_prepacking().
        """

        def freeze(weight: Tensor, parts: int, order: Order | None) -> tuple[Tensor, Tensor]:
            if weight.ndim == 3:
                pair = quantize_stack(weight, dtype, granularity, parts, order)
            else:
                pair = quantize_stored(weight, dtype, granularity, parts)
            if not prepack:
                return pair
            inputs = weight.shape[-2] if dtype == "int4" else None
            return prepack_weights(*pair, parts=parts, permuted=True, inputs=inputs)

        self._freeze(freeze, dtype)

    def prepack(self) -> None:
        """Prepacks the same, after check_prepacking()."""

        def freeze(weight: Tensor, parts: int, order: Order | None) -> tuple[Tensor, None]:
            stack = weight if weight.ndim == 3 else weight.unsqueeze(0)
            return prepack_stack(stack, parts, order=order), None

        self._freeze(freeze, "prepacked")

    @paddle.no_grad()
    def _freeze(self, freeze: Freeze, frozen: str) -> None:
        if self._stacked():
            experts = self.experts_layer()
            for name, parts in (("gate_up_proj", 2), ("down_proj", 1)):
                weight = getattr(experts, name)
                if isinstance(weight, FrozenWeight):  # of another block, too
                    continue
                order = self.gates_then_ups if parts == 2 else None
                layer = FrozenWeight(*freeze(weight, parts, order), weight)
                delattr(experts, name)
                experts.add_sublayer(name, layer)
        experts = [] if self._stacked() else [expert for _, expert in self.held()]
        for expert in [*experts, self.shared_expert()]:
            if expert is not None:
                _freeze_expert(expert, freeze)
        self._slices, self.frozen = [], frozen

    def shard(self, parallel: ParallelContext, dispatch: str) -> None:
        """Keeps this rank's part of the experts, and of the shared expert.

        With replicated tokens all ranks share the latter, with tokens of its own each EP rank needs it whole.
        """
        first, end = shard_range(self.total_experts(), parallel.ep_rank, parallel.ep_size)
        slices, away = self.expert_slices(), {}
        for one in slices:
            if one.dense == "down_bias" and parallel.tp_rank > 0:  # added once, by the first rank
                one.cut(None, "grid")
                continue
            columns = one.whole.ranges.get("I", (0, 0))[1]
            kept = {"E": (first, end), "I": shard_range(columns, parallel.tp_rank, parallel.tp_size)}
            one.cut(kept, "grid")
        if self.shared_expert() is not None:
            rank, size = parallel.ep_rank * parallel.tp_size + parallel.tp_rank, parallel.size("grid")
            shared_by, copy = "grid", False
            if dispatch == "alltoall":
                rank, size = parallel.tp_rank, parallel.tp_size
                shared_by, copy = "tp" if size > 1 else "", parallel.ep_rank > 0
            for one in _slices_of_expert(self.shared_expert(), None):
                columns = one.whole.ranges.get("S", (0, 0))[1]
                kept = (
                    None
                    if one.dense == "shared_down_bias" and rank
                    else {"S": shard_range(columns, rank, size)}
                )
                one.cut(kept, shared_by, copy)
                slices.append(one)
        if not self._stacked() and self.divided_over() == 1:
            for number, expert in self.held():
                if not first <= number < end:
                    away[str(number)] = expert
            self.experts_layer()._sub_layers.update(dict.fromkeys(away))
        self.parallel, self.dispatch, self._slices, self._away = parallel, dispatch, slices, away
        self._ranges = [
            shard_range(self.total_experts(), rank, parallel.ep_size) for rank in range(parallel.ep_size)
        ]

    def mark(self) -> None:
        """Marks the parameters of a block that is sharded, once its package has drawn their values.

        PaddleNLP cannot draw those that are marked already.
        """
        for one in self._slices:
            one.mark()

    def unshard(self) -> None:
        """Brings everything back: all ranks of the grid call this together."""
        for one in self._slices:
            if self.divided_over() > 1:  # by its package, and never cut
                one.unmark()
            else:
                one.restore(self.parallel)
        self.experts_layer()._sub_layers.update(self._away)
        for name in ("parallel", "dispatch", "_slices", "_away", "_ranges"):
            self.__dict__.pop(name, None)

    def tokens(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., H] as [T, H]."""
        return hidden_states.reshape([-1, hidden_states.shape[-1]])

    def mix(
        self,
        hidden_states: Tensor,
        routing_table: Tensor,
        router_weights: Tensor,
        shared_weights: Tensor | None = None,
    ) -> Tensor:
        """What the experts of all ranks and the shared expert make of the tokens.

        Args:
            hidden_states: [..., H]. routing_table, router_weights: [T, K].
            shared_weights: [T, 1] float32, factor of the shared expert; None: 1.

        Returns:
            Shape and dtype of ``hidden_states``.
        """
        with functional.own_autocast():
            output = self._mix(hidden_states, routing_table, router_weights, shared_weights)
        return output

    def _mix(
        self,
        hidden_states: Tensor,
        routing_table: Tensor,
        router_weights: Tensor,
        shared_weights: Tensor | None,
    ) -> Tensor:
        expect_dynamic_mode(self.parallel)
        parallel, groups = self.parallel, ["tp" if self.dispatch == "alltoall" else "grid"]
        tokens = self.tokens(hidden_states).astype(self._compute_dtype())
        if parallel is not None and groups == ["grid"] and switch("PADDLE_MOE_CHECK"):
            parallel.check_same_routing(routing_table, router_weights)
        if self.shared_expert() is not None and shared_weights is None:
            shared_weights = paddle.ones_like(tokens[:, :1], dtype="float32")
        exchange = None
        if self.dispatch == "alltoall" and parallel.ep_size > 1:
            exchange = partial(all_to_all_experts, expert_ranges=self._ranges, parallel=parallel)
        output = partial_sum(
            tokens,
            routing_table,
            router_weights,
            shared_weights if self.shared_expert() is not None else None,
            routed=self._routed_output,
            shared=self._shared_output,
            parallel=parallel,
            groups=groups,
            fp32=True,
            exchange=exchange,
        )
        output = leave_shards(output.astype(tokens.dtype), parallel, groups)
        return functional.reshape_like(output.astype(hidden_states.dtype), hidden_states)

    def _shared_output(self, tokens: Tensor, shared_weights: Tensor) -> Tensor:
        only = paddle.zeros_like(tokens[:, :1], dtype="int32")
        weights = listed_weights([self.shared_expert()])
        return self._run_or_nothing(tokens, only, shared_weights, weights, 0)

    def _routed_output(self, tokens: Tensor, routing_table: Tensor, router_weights: Tensor) -> Tensor:
        if not self._stacked() and not self.held():
            return no_contribution(tokens, router_weights)
        first = 0 if self.parallel is None else self._ranges[self.parallel.ep_rank][0]
        return self._run_or_nothing(tokens, routing_table, router_weights, self.weights(), first)

    def _run_or_nothing(
        self, tokens: Tensor, routing_table: Tensor, router_weights: Tensor, weights: Weights, first: int
    ) -> Tensor:
        """Zeros on a rank that holds no expert, or no column, so that all ranks build graphs of one shape."""
        down = weights.down[0] if isinstance(weights.down, list) else weights.down
        if is_empty(down) or has_no_rows(tokens):
            return no_contribution(tokens, router_weights, *weights.tensors())
        return self.run(tokens, routing_table, router_weights, weights, first)

    def run(
        self, tokens: Tensor, routing_table: Tensor, router_weights: Tensor, weights: Weights, first: int
    ) -> Tensor:
        """What the experts with these weights make of tokens [T, H]; ``first`` is the id of the first."""
        return functional.mixture_of_experts(
            tokens,
            routing_table,
            router_weights,
            weights.gate_up,
            weights.down,
            weights.gate_up_bias,
            weights.down_bias,
            gate_up_scale=weights.gate_up_scale,
            down_scale=weights.down_scale,
            permuted_weights=weights.down_scale is not None and not weights.are_prepacked(),
            activation=self.activation(),
            experts_min=first,
        )

    def _compute_dtype(self) -> paddle.dtype:
        """The same on all ranks, also on those without experts."""
        down = self.experts_layer().down_proj if self._stacked() else _projections(self._any_expert())[1]
        if isinstance(down, FrozenWeight):
            dtype = down.dense_dtype
        else:
            dtype = down.dtype if self._stacked() else down.weight.dtype
        autocast = functional._autocast_dtype()
        if autocast is not None and self.frozen == "prepacked":
            expect_dtype_of_prepacked(dtype, autocast, "prepack_experts()")
        return dtype if autocast is None else autocast

    def _stacked(self) -> bool:
        experts = self.experts_layer()
        return "down_proj" in experts._parameters or "down_proj" in experts._sub_layers

    def held(self) -> list[tuple[int, nn.Layer]]:
        """Number and layer of the experts in the list that are on this rank."""
        experts = enumerate(self.experts_layer()._sub_layers.values())
        return [(number, expert) for number, expert in experts if expert is not None]

    def _any_expert(self) -> nn.Layer:
        return next(iter([*(expert for _, expert in self.held()), *self._away.values()]))

    def divided_over(self) -> int:
        """The ranks over which the package itself has divided the experts when it built the block."""
        if self._stacked():
            return 1
        return self.total_experts() // (len(self.held()) + len(self._away))
