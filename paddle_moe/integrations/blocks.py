"""Turns the mixture-of-experts blocks of a model into blocks that run on paddle_moe, in place.

A block keeps its parameters, their names and its sublayers. What changes is its class: from the stock class
to one derived from it and from :class:`MoEBlock`, whose forward calls the operators of paddle_moe on the same
parameters. So ``isinstance`` holds, checkpoints are interchangeable, and giving the block its own class back
undoes everything.

Over EP x TP ranks a block also gives away what other ranks hold: experts outside this rank's range leave the
block, and the remaining parameters shrink in place to this rank's columns, under their own names.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import paddle
from paddle import nn

from paddle_moe import functional
from paddle_moe.collectives import enter_shards, leave_shards, no_contribution
from paddle_moe.distributed import ParallelContext, init_distributed
from paddle_moe.params import Part, shard_range
from paddle_moe.tensor_files import LoadReport, Plan, Source, Target, TensorFiles, execute

Tensor = paddle.Tensor

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


def _linear(expert: nn.Layer, name: str) -> nn.Layer:
    layer = expert._sub_layers[name]
    # Packages derive their own Linear (for fp8, say); adapters are derived too, but have names of their own.
    if not isinstance(layer, nn.Linear) or type(layer).__name__ != "Linear":
        raise ValueError(
            f"{name} of {type(expert).__name__} must be a paddle.nn.Linear, got {type(layer).__name__}: "
            "paddle_moe does not run experts with adapters, quantised weights or the package's own tensor "
            "parallelism; merge the adapters, or build the model without them"
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
        if layers[0].bias is None or layers[0].bias.size == 0:
            return None
        return [layer.bias for layer in layers]

    return Weights(
        [layer.weight for layer in gate_up], [layer.weight for layer in down], biases(gate_up), biases(down)
    )


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
    """What this rank holds of a parameter that is spread over the grid: ``part`` of ``whole``.

    The dimensions are those of FusedMoE.parts: E experts, H hidden, G the halves gate and up, I intermediate.
    """

    parameter: Tensor
    part: Part
    whole: Part

    @classmethod
    def of(
        cls, parameter: Tensor, pattern: str, sizes: dict[str, int], kept: dict[str, tuple[int, int]]
    ) -> Slice:
        """``kept`` gives the ranges of the dimensions that are cut, ``sizes`` the whole size of each."""
        whole = Part(pattern, {name: (0, sizes[name]) for name in Part(pattern, {}).names})
        ranges = {name: kept.get(name, whole.ranges[name]) for name in whole.names}
        return cls(parameter, Part(pattern, ranges), whole)

    @paddle.no_grad()
    def cut(self) -> None:
        """Shrinks the parameter, still whole, to the local part."""
        if self.part.size:
            unfolded = self.parameter.reshape([self.whole.length(name) for name in self.whole.names])
            self.hold(unfolded[self._place()].reshape(self.part.shape))
        else:
            self.hold(paddle.zeros(self.part.shape, self.parameter.dtype))
        self._mark(sharded=True)

    def restore(self, parallel: ParallelContext) -> None:
        """Undoes :meth:`cut`: all ranks of the grid call this together."""
        self.hold(self.gather(parallel))
        self._mark(sharded=False)

    def _mark(self, sharded: bool) -> None:
        """As on the parameters of FusedMoE: what sums gradients or norms over ranks must know."""
        self.parameter.is_distributed = self.parameter.expert = self.parameter.no_sync = sharded

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
        if self.part.size:
            unfolded[self._place()] = self.parameter.reshape([self.part.length(name) for name in names])
        return parallel.all_reduce(unfolded, "grid").reshape(self.whole.shape)

    def _place(self) -> tuple[slice, ...]:
        return tuple(slice(*self.part.ranges[name]) for name in self.whole.names)


def _slices_of_expert(expert: nn.Layer, rank: int, size: int, present: bool) -> list[Slice]:
    gate_up, down = _projections(expert)
    inter, hidden = down.weight.shape
    sizes = {"H": hidden, "I": inter, "G": 2}
    kept = {"I": shard_range(inter, rank, size) if present else (0, 0)}
    columns = "I" if len(gate_up) == 2 else "(G I)"
    slices = [Slice.of(one.weight, f"H {columns}", sizes, kept) for one in gate_up]
    slices += [Slice.of(one.bias, columns, sizes, kept) for one in gate_up if one.bias is not None]
    slices.append(Slice.of(down.weight, "I H", sizes, kept))
    if down.bias is not None:  # added once, by the first rank
        slices.append(Slice.of(down.bias, "H", sizes, {} if present and rank == 0 else {"H": (0, 0)}))
    return slices


# ---------------------------------------------------------------- blocks


class MoEBlock:
    """What a block gains: mixed in before the stock class, so ``self`` is the block with its parameters.

    A class derived from this one says how one kind of stock block routes and what it returns. It defines
    ``forward``, which calls :meth:`mix`, and the methods below where the block differs.
    """

    stock = ""  # the class that it accelerates, as "module:name"
    model = ""  # what people call the models that have it
    parallel: ParallelContext | None = None
    _slices: list[Slice] = []
    _away: dict[str, nn.Layer] = {}  # experts that other ranks hold, by their name in the list
    _total_experts = 0

    def check(self) -> None:
        """Raises ValueError where the block is set up in a way that paddle_moe does not compute."""

    def experts_layer(self) -> nn.Layer:
        """The list of the experts, or the layer with their stacked weights."""
        return self._sub_layers["experts"]

    def shared_expert(self) -> nn.Layer | None:
        """The expert that every token goes to."""
        return None

    def weights(self) -> Weights:
        """Of the experts on this rank."""
        experts = self.experts_layer()
        if self._stacked():
            return Weights(experts.gate_up_proj, experts.down_proj)
        return listed_weights(self._present_experts())

    def activation(self) -> str:
        if self._stacked():
            return activation_of(self.experts_layer().act_fn)
        return activation_of((self._present_experts() or list(self._away.values()))[0].act_fn)

    def num_experts_here(self) -> int:
        return self.experts_layer().down_proj.shape[0] if self._stacked() else len(self._present_experts())

    def slices(self, parallel: ParallelContext, first: int, end: int) -> list[Slice]:
        """What is left on this rank of each parameter of the experts, of which it holds [first, end)."""
        if self._stacked():
            weights = self.weights()
            num_experts, inter, hidden = weights.down.shape
            sizes = {"E": num_experts, "H": hidden, "I": inter, "G": 2}
            kept = {"E": (first, end), "I": shard_range(inter, parallel.tp_rank, parallel.tp_size)}
            return [
                Slice.of(weights.gate_up, "E H (G I)", sizes, kept),
                Slice.of(weights.down, "E I H", sizes, kept),
            ]
        slices = []
        for index, expert in enumerate(self._present_experts()):
            slices += _slices_of_expert(expert, parallel.tp_rank, parallel.tp_size, first <= index < end)
        return slices

    def shard(self, parallel: ParallelContext) -> None:
        """Keeps this rank's part of the experts, and of the shared expert an equal part on every rank."""
        total = self.num_experts_here()
        first, end = shard_range(total, parallel.ep_rank, parallel.ep_size)
        slices, away = self.slices(parallel, first, end), {}
        if self.shared_expert() is not None:
            rank = parallel.ep_rank * parallel.tp_size + parallel.tp_rank
            slices += _slices_of_expert(
                self.shared_expert(), rank, parallel.ep_size * parallel.tp_size, present=True
            )
        for one in slices:
            one.cut()
        if not self._stacked():
            for index, name in enumerate(list(self.experts_layer()._sub_layers)):
                if not first <= index < end:
                    away[name] = self.experts_layer()._sub_layers[name]
                    self.experts_layer()._sub_layers[name] = None
        self.parallel, self._slices, self._away, self._total_experts = parallel, slices, away, total

    def unshard(self) -> None:
        """Brings everything back: all ranks of the grid call this together."""
        for one in self._slices:
            one.restore(self.parallel)
        for name, expert in self._away.items():
            self.experts_layer()._sub_layers[name] = expert
        for name in ("parallel", "_slices", "_away", "_total_experts"):
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
        weights = self.weights() if self.num_experts_here() else None
        shared = None if self.shared_expert() is None else listed_weights([self.shared_expert()])
        parallel, tokens = self.parallel, self.tokens(hidden_states)
        if weights is not None:  # under autocast it may have another dtype than the weights
            tokens = tokens.astype(
                (weights.down[0] if isinstance(weights.down, list) else weights.down).dtype
            )
        if shared is not None and shared_weights is None:
            shared_weights = paddle.ones_like(tokens[:, :1], dtype="float32")
        if parallel is not None:
            if os.environ.get("PADDLE_MOE_CHECK") == "1":
                parallel.check_same_routing(routing_table, router_weights)
            entering = [tokens, router_weights] + ([] if shared is None else [shared_weights])
            tokens, router_weights, *rest = enter_shards(entering, parallel, ["grid"], fp32=True)
            shared_weights = rest[0] if rest else None

        parts = []
        if weights is not None:
            first = 0
            if parallel is not None:
                first = shard_range(self._total_experts, parallel.ep_rank, parallel.ep_size)[0]
            parts.append(self.run(tokens, routing_table, router_weights, weights, first))
        if shared is not None and shared.down[0].shape[0] > 0:
            only = paddle.zeros_like(tokens[:, :1], dtype="int32")
            parts.append(self.run(tokens, only, shared_weights, shared, 0))
        if not parts:  # more ranks than experts and columns
            parts = [no_contribution(tokens, router_weights, shared_weights)]
        if len(parts) == 2:  # in float32, also because the CPU has no half-precision addition
            parts = [(parts[0].astype("float32") + parts[1].astype("float32")).astype(tokens.dtype)]
        output = leave_shards(parts[0], parallel, ["grid"])
        return output.astype(hidden_states.dtype).reshape(hidden_states.shape)

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
            activation=self.activation(),
            experts_min=first,
        )

    def _stacked(self) -> bool:
        return "down_proj" in self.experts_layer()._parameters

    def _present_experts(self) -> list[nn.Layer]:
        return [expert for expert in self.experts_layer()._sub_layers.values() if expert is not None]


# ---------------------------------------------------------------- models


@functools.cache
def _accelerated(block: type[MoEBlock], stock: type[nn.Layer]) -> type[nn.Layer]:
    return type(stock.__name__, (block, stock), {"__module__": block.__module__, "_stock": stock})


class Integration:
    """The functions of one package: accelerate, restore, patch, unpatch and load_checkpoint.

    Args:
        package: its name.
        blocks: what is known of its blocks.
        published_names: gives, for a model, {name of a parameter: (its key in the published files of that
            model, whether these have the matrix turned)}; None: only files with the package's own names can
            be loaded.
    """

    def __init__(
        self,
        package: str,
        blocks: list[type[MoEBlock]],
        published_names: Callable[[nn.Layer], dict[str, tuple[str, bool]]] | None = None,
    ):
        self.package = package
        self._published_names = published_names
        self._blocks = {block.stock: block for block in blocks}
        self._original_init: dict[type, Any] = {}

    def accelerate(
        self,
        model: nn.Layer,
        ep_size: int = 1,
        tp_size: int = 1,
        *,
        parallel: ParallelContext | None = None,
    ) -> nn.Layer:
        """Has every mixture-of-experts block of a model run on paddle_moe, in place.

        Parameters keep their names and, with ep_size = tp_size = 1, their shapes: what the model saves then,
        the stock model loads, and the other way round. Over several ranks each rank keeps its part of the
        experts, and all ranks pass the same tokens. Make optimizers afterwards.

        Args:
            model: built by the package, or any layer that contains such blocks.
            ep_size: ranks over which experts are divided.
            tp_size: ranks over which the intermediate dimension of each expert is divided.
            parallel: result of init_distributed(ep_size, tp_size), made here if None.

        Returns:
            ``model``.

        Raises:
            ValueError: the model has no block of a known kind, or one that is set up in a way that paddle_moe
                does not compute; nothing has been changed then.
            RuntimeError: see init_distributed.
        """
        found = list(self._find(model))
        if not found:
            if any(isinstance(layer, MoEBlock) for layer in model.sublayers(include_self=True)):
                raise ValueError(f"{type(model).__name__} is accelerated already; restore() it first")
            raise ValueError(
                f"model must have a mixture-of-experts block that integrations.{self.package} knows "
                f"({self.supported()}), got {type(model).__name__}"
            )
        for layer, block in found:
            stock = type(layer)
            layer.__class__ = _accelerated(block, stock)
            try:
                _check(layer, ep_size * tp_size > 1 or parallel is not None)
            finally:
                layer.__class__ = stock
        parallel = _context(ep_size, tp_size, parallel)
        for layer, block in found:
            layer.__class__ = _accelerated(block, type(layer))
            if parallel is not None:
                layer.shard(parallel)
        return model

    def restore(self, model: nn.Layer) -> nn.Layer:
        """Undoes :meth:`accelerate`; over several ranks every rank then has the whole model again.

        All ranks call it together. Returns ``model``.
        """
        for layer in model.sublayers(include_self=True):
            if isinstance(layer, MoEBlock):
                if layer.parallel is not None:
                    layer.unshard()
                layer.__class__ = type(layer)._stock
        return model

    def patch(self, ep_size: int = 1, tp_size: int = 1, *, parallel: ParallelContext | None = None) -> None:
        """Has blocks that are built from now on run on paddle_moe, until :meth:`unpatch`.

        Over several ranks each block is cut to this rank's part as soon as it is built, so that a model whose
        experts do not fit on one rank can be built. Arguments and errors are those of :meth:`accelerate`.
        """
        if self._original_init:
            raise ValueError(f"{self.package} is patched already; unpatch() it first")
        stocks, errors = {}, []
        for block in self._blocks.values():
            module, _, name = block.stock.partition(":")
            try:
                stocks[getattr(import_module(module), name)] = block
            except (ImportError, AttributeError) as error:  # not in this version, or it cannot be imported
                errors.append(f"{block.stock}: {error}")
        if not stocks:
            raise RuntimeError(f"no block of {self.package} can be imported: " + "; ".join(errors))
        parallel = _context(ep_size, tp_size, parallel)
        for stock, block in stocks.items():
            self._original_init[stock] = stock.__init__
            stock.__init__ = _accelerating_init(stock, block, parallel)

    def unpatch(self) -> None:
        """Undoes :meth:`patch`. Models that were built in between stay as they are."""
        for stock, original in self._original_init.items():
            stock.__init__ = original
        self._original_init.clear()

    def load_checkpoint(
        self,
        model: nn.Layer,
        path: str | os.PathLike,
        *,
        layout: str = "auto",
        cast: str = "lossless",
        progress: bool = False,
    ) -> LoadReport:
        """Fills a model, accelerated or not, from safetensors files; each rank reads only what it holds.

        All ranks that share the model call it together.

        Args:
            model: with parameters of the right shapes; for EP x TP, accelerated already.
            path: a directory with model.safetensors.index.json or with *.safetensors, or one such file.
            layout: "huggingface": names and [out, in] matrices of the published files. "paddle": those of the
                package's own files. "auto": whichever names the files have.
            cast: "lossless": float16 and bfloat16 may become float32. "any": every floating-point dtype may
                become every other, with rounding. "none": dtypes must be equal.
            progress: show a bar in a terminal.

        Returns:
            LoadReport: the keys loaded, the keys of the files that nothing asked for, the bytes read.

        Raises:
            ValueError: an unknown layout, or one that this package has no names for.
            CheckpointError: a ValueError, on every rank, that lists file, key, what was expected and what
                found, for all that is missing, doubled, truncated, of another shape or dtype, and for keys of
                the mixture-of-experts blocks that the model lacks. Nothing was assigned.
        """
        if layout not in ("auto", "huggingface", "paddle"):
            raise ValueError(f"layout must be 'auto', 'huggingface' or 'paddle', got {layout!r}")
        if layout == "huggingface" and self._published_names is None:
            raise ValueError(f"layout must be 'paddle' for models of {self.package}, got {layout!r}")
        blocks = [layer for layer in model.sublayers(include_self=True) if isinstance(layer, MoEBlock)]
        parallel = next((block.parallel for block in blocks), None)
        holdings = _holdings(model)
        own = {name: (name, False) for name in holdings}
        published = own if self._published_names is None else self._published_names(model)
        files = TensorFiles(path)
        if layout == "auto":
            found = [sum(names[name][0] in files for name in holdings) for names in (own, published)]
            if found[0] == found[1] > 0 and published is not own:
                raise ValueError(
                    "layout must be 'huggingface' or 'paddle' where both have the same names, got 'auto'"
                )
            layout = "huggingface" if found[1] > found[0] else "paddle"
        names = published if layout == "huggingface" else own
        sources = [
            Source(names[name][0], name, _turned(whole) if names[name][1] else whole)
            for name, (_, _, whole) in holdings.items()
        ]
        targets = {name: Target(tensor, part) for name, (tensor, part, _) in holdings.items()}
        inside = tuple({key.partition(".experts.")[0] + "." for key in files.keys() if ".experts." in key})
        plan = Plan(
            files, targets, sources, path=path, must_match=lambda key: key.startswith(inside), cast=cast
        )
        return execute([plan], path, parallel, progress=f"loading {path}" if progress else None)

    def supported(self) -> str:
        return ", ".join(
            f"{block.stock.partition(':')[2]} of {block.model}" for block in self._blocks.values()
        )

    def _find(self, model: nn.Layer) -> Iterator[tuple[nn.Layer, type[MoEBlock]]]:
        inside = set()  # experts that belong to a block which is found already
        for layer in model.sublayers(include_self=True):
            if isinstance(layer, MoEBlock) or id(layer) in inside:
                continue
            for cls in type(layer).__mro__:
                block = self._blocks.get(f"{cls.__module__}:{cls.__qualname__}")
                if block is not None and type(layer).forward is cls.forward:
                    inside.update(id(one) for one in layer.sublayers())
                    yield layer, block
                    break


def _holdings(model: nn.Layer) -> dict[str, tuple[Tensor, Part, Part]]:
    """Tensor, part and whole of everything that the model has or another rank has instead, by name."""
    tensors = dict(model.state_dict())
    slices = {}
    for prefix, layer in model.named_sublayers(include_self=True):
        if isinstance(layer, MoEBlock):
            slices.update({id(one.parameter): one for one in layer._slices})
            for index, expert in layer._away.items():
                for name, parameter in expert.named_parameters():
                    tensors[".".join(filter(None, [prefix, "experts", index, name]))] = parameter
    holdings = {}
    for name, tensor in tensors.items():
        one = slices.get(id(tensor))
        whole = Part.whole(tensor.shape) if one is None else one.whole
        holdings[name] = tensor, whole if one is None else one.part, whole
    return dict(sorted(holdings.items()))  # in one order on all ranks


def _turned(part: Part) -> Part:
    """The same part, stored with the dimensions of the array in reverse order."""
    dimensions = re.findall(r"\([^)]*\)|\S+", part.pattern)
    return Part(" ".join(reversed(dimensions)), part.ranges)


def _context(ep_size: int, tp_size: int, parallel: ParallelContext | None) -> ParallelContext | None:
    if parallel is None:
        return init_distributed(ep_size, tp_size) if ep_size * tp_size != 1 else None
    if (ep_size, tp_size) != (1, 1) and (ep_size, tp_size) != (parallel.ep_size, parallel.tp_size):
        raise ValueError(
            f"ep_size and tp_size must be those of parallel, {parallel.ep_size} and {parallel.tp_size}, or "
            f"be left out, got {ep_size} and {tp_size}"
        )
    return parallel if parallel.ep_size * parallel.tp_size > 1 else None


def _check(block: MoEBlock, over_ranks: bool) -> None:
    block.check()
    if over_ranks and getattr(getattr(block, "config", None), "sequence_parallel", False):
        raise ValueError(
            "sequence_parallel must be False for ep_size or tp_size above 1, because all ranks must pass the "
            "same tokens, got True"
        )
    block.weights()
    block.activation()
    if block.shared_expert() is not None:
        listed_weights([block.shared_expert()])


def _accelerating_init(stock: type[nn.Layer], block: type[MoEBlock], parallel: ParallelContext | None):
    original = stock.__init__

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if type(self) is stock:  # a subclass is not ready yet, and may compute something else
            self.__class__ = _accelerated(block, stock)
            _check(self, parallel is not None)
            if parallel is not None:
                self.shard(parallel)

    return init
