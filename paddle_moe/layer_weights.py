"""What a rank holds of a FusedMoE layer: the parameters and buffers of its shard.

How they are made, drawn and cut out of dense weights, and what must survive copies, conversions and
quantisation: values, dtypes, and the flags by which others know what ranks do not share.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Callable

import paddle
from paddle import nn
from paddle.utils import unique_name

from paddle_moe._options import dtype_name
from paddle_moe.huge_pages import use_huge_pages
from paddle_moe.params import EXPERT_WEIGHTS, LayerShard, Part, drawn_values
from paddle_moe.prepacking import check_inputs, convert_panels, expect_cpu, prepack_weights, unpack_weights
from paddle_moe.quantization import (
    check_options,
    check_shards,
    check_weight,
    quantised_parts,
    quantize_stack,
)
from paddle_moe.sharded import raise_anywhere

if TYPE_CHECKING:
    from paddle_moe.distributed import ParallelContext

DTYPES = ("float32", "bfloat16", "float16")
# What optimizers know a parameter by, and how it is trained.
TRAINING_ATTRIBUTES = ("name", "stop_gradient", "optimize_attr", "regularizer", "need_clip")
# Matrices side by side in each of the EXPERT_WEIGHTS, without the ending of their names.
PARTS = {"gate_up": 2, "down": 1, "shared_gate_up": 2, "shared_down": 1}


def keep_dtypes(func: Callable, kept: Any, panels: Any = ()) -> Callable:
    """The conversion that nn.Layer._apply is given, but without another dtype for the tensors `kept`.

    `panels` are prepacked weights, which another dtype has otherwise. `kept` may hold gradients, of which
    Paddle passes another object each time.
    """
    places = {tensor.data_ptr() for tensor in kept if tensor.size}
    own = {id(tensor): tensor for tensor in kept}  # which keeps them, so that no other gets their id
    prepacked = {id(tensor): tensor for tensor in panels}

    def convert(tensor, device, dtype, blocking):
        if id(tensor) in prepacked and dtype is not None:
            tensor = convert_panels(tensor, dtype)
        elif id(tensor) in own or tensor.size and tensor.data_ptr() in places:
            dtype = tensor.dtype
        return func(tensor, device, dtype, blocking)

    return convert


def as_tensor(value: Any) -> paddle.Tensor:
    return value if isinstance(value, paddle.Tensor) else paddle.to_tensor(value)


class _Drawn(nn.initializer.Constant):
    """Zeros, then what `draw` makes of them; under paddle.LazyGuard once the parameter is initialized."""

    def __init__(self, draw: Callable[[paddle.Tensor], None]):
        super().__init__(0.0)
        self.draw = draw

    def forward(self, var: paddle.Tensor, block: Any = None) -> None:
        super().forward(var, block)
        self.draw(var)
        use_huge_pages(var)


class ShardedWeights(nn.Layer):
    """The base of FusedMoE, which describes the parameters.

    Args:
        shard: which part of the layer this rank holds, in the grid of `parallel`.
        dtype: of the weights and biases of experts. gate_dtype: of the gates.
        gate_bias, gate_up_bias, down_bias, shared_gate: whether there are such.
        seed: what weights are drawn from; None: zeros.
    """

    def __init__(
        self,
        shard: LayerShard,
        parallel: ParallelContext | None,
        dtype: str,
        gate_dtype: str,
        gate_bias: bool,
        gate_up_bias: bool,
        down_bias: bool,
        shared_gate: bool,
        seed: int | None,
    ):
        super().__init__()
        self._shard, self.parallel = shard, parallel
        self.ep_rank, self.ep_size, self.tp_rank, self.tp_size = shard.place
        first, end = shard.experts
        self.experts_min, self.experts_max = first, end - 1
        first, end = shard.shared_columns
        self._holds_shared_columns = first < end  # to_static finds no properties of a dataclass
        self._gate_dtype, self._has_down_bias = gate_dtype, down_bias
        # The dtype of the experts' weights since quantize_(), and what shares a scale.
        self.quantized: str | None = None
        self.granularity: str | None = None
        # Whether the experts' weights are in panels, since prepack_().
        self.prepacked = False
        self._before_prepacking: dict[str, dict[str, Any]] = {}  # what unpack_() gives the parameters again
        self._create_parameters(dtype, gate_bias, gate_up_bias, shared_gate, seed)

    def _create_parameters(
        self,
        dtype: str,
        gate_bias: bool,
        gate_up_bias: bool,
        shared_gate: bool,
        seed: int | None,
    ) -> None:
        parts = self._shard.parts()

        def weight(name: str, dtype: str, wanted: bool = True) -> paddle.Tensor | None:
            if not wanted:
                return None
            if seed is None or name.endswith("bias"):
                initializer = nn.initializer.Constant(0.0)
            else:
                initializer = _Drawn(lambda parameter: self._draw(name, parameter, seed))
            attr = paddle.ParamAttr(initializer=initializer)  # a default one yields to set_global_initializer
            return self.create_parameter(parts[name].shape, attr, dtype)

        shared = self._shard.shared_intermediate_size > 0
        self.gate_weight = weight("gate_weight", self._gate_dtype)
        self.gate_bias = weight("gate_bias", self._gate_dtype, gate_bias)
        self.gate_up_weight = weight("gate_up_weight", dtype)
        self.down_weight = weight("down_weight", dtype)
        self.gate_up_bias = weight("gate_up_bias", dtype, gate_up_bias)
        self.down_bias = weight("down_bias", dtype, self._has_down_bias and self.tp_rank == 0)
        self.shared_gate_up_weight = weight("shared_gate_up_weight", dtype, shared)
        self.shared_down_weight = weight("shared_down_weight", dtype, shared)
        self.shared_gate_weight = weight("shared_gate_weight", self._gate_dtype, shared_gate)
        self._settle()

    @paddle.no_grad()
    def _draw(self, name: str, parameter: paddle.Tensor, seed: int) -> None:
        """Gives the parameter `name` the values that belong to `seed`."""
        values = drawn_values(self._shard, name, seed)
        if name not in EXPERT_WEIGHTS:
            parameter.set_value(paddle.to_tensor(next(values)).astype(parameter.dtype))
            return
        for slot, of_expert in enumerate(values):
            parameter[slot] = paddle.to_tensor(of_expert).astype(parameter.dtype)

    def _load(self, **dense: Any) -> None:
        """Cuts this rank's parts out of dense values of parameters and buffers."""
        shard = replace(self._shard, permuted_weights=False)
        parts, wholes = shard.parts(), shard.whole().parts()
        for name, value in dense.items():
            parameter = getattr(self, name)
            if value is not None and parameter is not None and parts[name].size:
                part = as_tensor(parts[name].cut(value, wholes[name])).astype(parameter.dtype)
                if self.permuted_weights and name in EXPERT_WEIGHTS:
                    part = part.transpose([0, 2, 1])
                parameter.set_value(part)

    @property
    def permuted_weights(self) -> bool:
        """Whether the weights of experts are stored [out, in]."""
        return self._shard.permuted_weights

    def _settle(self) -> None:
        """What is to be done where parameters and buffers have become others."""
        self._mark_parameters()
        use_huge_pages(*(getattr(self, f"{name}_weight", None) for name in PARTS))

    def _mark_parameters(self) -> None:
        """The flags by which fleet and PaddleNLP know gates, and parameters that differ between ranks."""
        for gate in (self.gate_weight, self.gate_bias):
            if gate is not None:
                gate.is_gate = True
        if self.ep_size * self.tp_size == 1:
            return
        # What holds the same shard, and may share its optimizer state, is the data-parallel group.
        color = {"color": "moe_expert", "group": self.parallel.dp_group}
        experts = [self.gate_up_weight, self.down_weight, self.gate_up_bias, self.down_bias]
        shared = [self.shared_gate_up_weight, self.shared_down_weight]
        if self.quantized is not None:  # buffers, which wrappers broadcast too
            experts += [self.gate_up_scale, self.down_scale]
            if self._shard.shared_intermediate_size:
                shared += [self.shared_gate_up_scale, self.shared_down_scale]
        if self._shard.shared_over_grid:
            experts += shared
        elif self.tp_size > 1:
            for parameter in (p for p in shared if p is not None):
                parameter.is_distributed = parameter.no_sync = True
                parameter.shard_group = "tp"
        for parameter in (p for p in experts if p is not None):
            parameter.is_distributed = parameter.expert = parameter.no_sync = True
            parameter.shard_group = "grid"
            if getattr(parameter, "color", None) is None:  # which is set once
                parameter.color = color

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedWeights:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        twin._full_name = unique_name.generate(f"{self._full_name}_deepcopy")  # which logs tell layers by
        twin._settle()  # Paddle copies no attributes of parameters
        for before in twin._before_prepacking.values():  # a name belongs to one parameter
            before["name"] += unique_name.generate("_deepcopy")
        return twin

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)  # for pickle, which gives parameters new names
        state["_before_prepacking"] = {
            name: {key: value for key, value in before.items() if key != "name"}
            for name, before in self._before_prepacking.items()
        }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._settle()  # pickle keeps no attributes of parameters

    def _apply(self, func, device, dtype, blocking, include_sublayers=True):
        """Conversions, also that of paddle.amp.decorate, leave the dtype of buffers and of float32 gates."""
        if dtype is not None and dtype_name(dtype) not in DTYPES:
            raise ValueError(
                f"dtype must be {', '.join(DTYPES)} for {self.full_name()}, got {dtype_name(dtype)}"
            )
        buffers = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        panels = []
        if self.prepacked and self.quantized is None:
            panels = [buffers.pop(f"{name}_weight") for name in PARTS if f"{name}_weight" in buffers]
            if dtype is not None:
                self._check_prepacking(dtype)
        kept = list(buffers.values())
        if self._gate_dtype == "float32":
            gates = (self.gate_weight, self.gate_bias, self.shared_gate_weight)
            gates = [gate for gate in gates if gate is not None]
            kept += gates + [gate.grad for gate in gates if gate.grad is not None]
        convert = keep_dtypes(func, kept, panels)
        super()._apply(convert, device, dtype, blocking, include_sublayers)
        self._settle()

    def parts(self, *, dense: bool = False) -> dict[str, Part]:
        """Which part of the dense weights each parameter and buffer is; with dense, on a single rank.

        The dimensions are those of params.LayerShard.parts; of quantised weights and their scales those of
        quantization.quantised_parts. A rank whose down_bias is None, because another holds it, has an empty
        part of it. A RuntimeError where the weights are prepacked.
        """
        if self.prepacked:
            raise RuntimeError(
                "the expert weights of this layer are prepacked, which no file holds; call unpack_() first, "
                "or load before prepack_()"
            )
        parts = (self._shard.whole() if dense else self._shard).parts()
        if self.quantized is not None:
            own, everyone = quantised_parts(self._shard, self.quantized, self.granularity)
            parts.update(everyone if dense else own)
        held = {name for name in parts if getattr(self, name, None) is not None}
        if self._has_down_bias:
            held.add("down_bias")
        return {name: part for name, part in parts.items() if name in held}

    @paddle.no_grad()
    def quantize_(self, dtype: str | paddle.dtype = "int8", granularity: str | None = None) -> ShardedWeights:
        """Turns the weights of this rank's experts, and of the shared one, into 8- or 4-bit numbers.

        Afterwards gate_up_weight [E_l, 2 I_l, H], down_weight [E_l, H, I_l] and those of the shared expert
        are buffers, int8, int4 as paddle_moe.pack_int4 packs it, or the bits of fp8 as uint8, stored
        transposed because few tokens read them fastest so, beside buffers gate_up_scale, down_scale,
        shared_gate_up_scale and shared_down_scale. Router, gates and biases stay as they are. There is no way
        back. The weights are frozen; gradients go through them to hidden_states, router, gates and biases.
        hidden_states may be of any dtype of the operators then; biases and gates are converted.
        With TP, scales belong to a rank's slice. To load what was saved of it, a state_dict() or a checkpoint
        (on any grid with the same tp_size and, where there is a shared expert, the same ranks), make a layer,
        quantise it with the same arguments, and load. All ranks call it together.

        Args:
            dtype, granularity: see paddle_moe.quantize.

        Returns:
            The layer.

        Raises:
            ValueError: see paddle_moe.quantize; the layer is left as it was, and on other ranks too, where
                it is a RuntimeError that names this one.
            RuntimeError: the weights are quantised or prepacked already, not initialised, or on a GPU; the
                layer was compiled by to_static(full_graph=True) before, whose program keeps its weights, as
                does that of a model around it; Paddle is 2.6 and the layer is one of several shards.
        """
        self._expect_no_program("quantize_")
        if self.quantized is not None:
            raise RuntimeError(f"the expert weights of this layer are {self.quantized} already")
        # Here, so that ranks without experts refuse the same.
        dtype, granularity = check_options(dtype, granularity)
        check_shards("quantize_", self.ep_size * self.tp_size)
        if self.prepacked:
            raise RuntimeError("the expert weights of this layer are prepacked; call unpack_() first")
        failure = None
        try:
            weights = self._own_expert_weights()
            for name, weight in weights:
                check_weight(f"{name}_weight", weight)
        except (ValueError, RuntimeError) as error:
            failure = error
        raise_anywhere(self.parallel, failure, "quantize_()")
        quantised = {
            name: quantize_stack(weight, dtype, granularity, PARTS[name], permuted=self.permuted_weights)
            for name, weight in weights
        }
        for name, tensors in quantised.items():
            delattr(self, f"{name}_weight")
            for what, tensor in zip(("weight", "scale"), tensors):
                self.register_buffer(f"{name}_{what}", tensor)
        self.quantized, self.granularity = dtype, granularity
        self._shard = replace(self._shard, permuted_weights=True)
        self._settle()
        return self

    @paddle.no_grad()
    def prepack_(self) -> ShardedWeights:
        """Puts the weights of experts, of the shared one too, in the order in which the CPU reads them.

        For serving: see paddle_moe.prepack_weights. Afterwards gate_up_weight, down_weight and those of the
        shared expert are buffers without a gradient; gradients go through them to hidden_states, router,
        gates and biases. Results are those of weights stored [in, out], bit by bit; but those of quantised
        weights, after quantize_(), are added in another order than before. All ranks call it alike. While it
        runs, memory holds the weights of the layer twice.
        Checkpoints need unpack_() first; state_dict() holds the panels, and
        set_state_dict() of another layer's leaves them out with no more than Paddle's warning.

        Returns:
            The layer.

        Raises:
            ValueError: the hidden size, or what any rank has of the intermediate sizes, is odd in bfloat16,
                int8 or fp8, or no multiple of 8 in int4.
            RuntimeError: the weights are prepacked already, not initialised, or on a GPU; the layer was
                compiled before, see quantize_; Paddle is 2.6 and the layer is one of several shards.
        """
        self._expect_no_program("prepack_")
        if self.prepacked:
            raise RuntimeError("the expert weights of this layer are prepacked already")
        check_shards("prepack_", self.ep_size * self.tp_size)
        expect_cpu("down_weight", self.down_weight)
        dtype = self.quantized or self.down_weight.dtype
        self._check_prepacking(dtype)
        prepacked = {}  # all of them before any is replaced, because this may run out of memory
        for name, weight in self._own_expert_weights():
            scale = getattr(self, f"{name}_scale", None)
            result = prepack_weights(
                weight,
                scale,
                parts=PARTS[name],
                permuted=self.permuted_weights,
                inputs=self._sizes_of(name)[0] if self.quantized == "int4" else None,
            )
            prepacked[name] = (result, None) if scale is None else result
        self._parameter_order = list(self._parameters)
        for name, (weight, scale) in prepacked.items():
            if scale is None:
                before = getattr(self, f"{name}_weight")
                self._before_prepacking[name] = {one: getattr(before, one) for one in TRAINING_ATTRIBUTES}
                delattr(self, f"{name}_weight")
            else:
                self.register_buffer(f"{name}_scale", scale)
            self.register_buffer(f"{name}_weight", weight)
        self.prepacked = True
        self._settle()
        return self

    def _check_prepacking(self, dtype: str | paddle.dtype) -> None:
        """A ValueError where panels of that dtype cannot hold the inputs of any rank, so that all refuse."""
        check_inputs("gate_up_weight", dtype, self._shard.hidden_size)
        for rank in self._shard.grid():
            for name, (start, stop) in (("down", rank.columns), ("shared_down", rank.shared_columns)):
                check_inputs(f"{name}_weight of a rank", dtype, stop - start)

    @paddle.no_grad()
    def unpack_(self) -> ShardedWeights:
        """Undoes prepack_(). Parameters are new ones, so make optimizers afterwards.

        They have the names and the order of those before, so a saved state of an optimizer fits. Those that
        did not train still do not. Quantised weights stay quantised.

        Returns:
            The layer.

        Raises:
            RuntimeError: the weights are not prepacked; the layer was compiled before, see quantize_.
        """
        self._expect_no_program("unpack_")
        if not self.prepacked:
            raise RuntimeError("the expert weights of this layer are not prepacked")
        unpacked = {}  # all of them first, as in prepack_()
        for name, weight in self._own_expert_weights():
            scale, (_, outputs) = getattr(self, f"{name}_scale", None), self._sizes_of(name)
            shape = self._shard.parts()[f"{name}_weight"].shape
            if outputs:
                weight = unpack_weights(weight, outputs, parts=PARTS[name], permuted=self.permuted_weights)
            elif scale is None:  # this rank has no column of the shared expert
                weight = paddle.empty(shape, weight.dtype)
            if scale is not None:
                unpacked[name] = weight, scale.transpose([0, 2, 1]).contiguous()
                continue
            attr = paddle.ParamAttr(initializer=nn.initializer.Constant(0.0))
            parameter = self.create_parameter(shape, attr, dtype_name(weight.dtype))
            if parameter.size:
                parameter.set_value(weight)
            for attribute, value in self._before_prepacking[name].items():
                setattr(parameter, attribute, value)
            unpacked[name] = parameter, None
        for name, (weight, scale) in unpacked.items():
            if scale is None:
                delattr(self, f"{name}_weight")
                setattr(self, f"{name}_weight", weight)
            else:
                self.register_buffer(f"{name}_scale", scale)
                self.register_buffer(f"{name}_weight", weight)
        parameters = dict(self._parameters)
        order = [name for name in self._parameter_order if name in parameters]  # then what came since
        self._parameters.clear()
        self._parameters.update({name: parameters[name] for name in [*order, *parameters]})
        self._before_prepacking = {}
        self.prepacked = False
        self._settle()
        return self

    def _expect_no_program(self, function: str) -> None:
        """A RuntimeError where a program was made of the layer, which would keep the tensors that it has now.

        One that was made of a layer around this one cannot be seen from here.
        """
        if type(vars(self).get("forward")).__name__ == "ASTStaticFunction":
            raise RuntimeError(
                f"{function}() must be called before paddle.jit.to_static(full_graph=True), whose program "
                "keeps the weights that it was made with; make another layer"
            )

    def _sizes_of(self, name: str) -> tuple[int, int]:
        """The inputs and outputs of a matrix of PARTS."""
        _, inputs, outputs = self._shard.parts()[f"{name}_weight"].shape
        return (outputs, inputs) if self.permuted_weights else (inputs, outputs)

    def _own_expert_weights(self) -> list[tuple[str, paddle.Tensor]]:
        """What PARTS names and this rank holds; a RuntimeError where a weight has no values yet."""
        held = [(name, getattr(self, f"{name}_weight")) for name in PARTS]
        for name, weight in held:
            if weight is not None and weight.size and not weight._is_initialized():
                raise RuntimeError(
                    f"{name}_weight has no values, as under paddle.LazyGuard; call its initialize() first"
                )
        return [(name, weight) for name, weight in held if weight is not None]

    def _storage(self, prefix: str = "") -> dict[str, Any]:
        """The options of mixture_of_experts that say how weights are stored."""
        options = {"permuted_weights": self.permuted_weights and not self.prepacked}
        if self.quantized is not None:
            for name in ("gate_up_scale", "down_scale"):
                options[name] = getattr(self, prefix + name)
        return options
