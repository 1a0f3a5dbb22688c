"""Turns the mixture-of-experts blocks of a model into blocks that run on paddle_moe, in place.

What a block becomes is in blocks.py; here are the blocks of whole models, and the files of models.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import paddle
from paddle import nn

from paddle_moe._options import at_least, flag, one_of
from paddle_moe.checkpoint import part_key
from paddle_moe.distributed import ParallelContext, init_distributed
from paddle_moe.integrations.blocks import MoEBlock, Slice, listed_weights
from paddle_moe.params import Part, shard_range
from paddle_moe.prepacking import expect_cpu
from paddle_moe.pretrained import LAYOUTS, stored_tensors, write_stored
from paddle_moe.quantization import check_options, check_shards, check_weight
from paddle_moe.sharded import raise_anywhere
from paddle_moe.tensor_files import LoadReport, Plan, Source, Target, TensorFiles, execute, joined

Tensor = paddle.Tensor
Holdings = dict[str, tuple[Tensor, Part, Part]]  # by name: a tensor, the part it is, the whole of it


@functools.cache
def _accelerated(block: type[MoEBlock], stock: type[nn.Layer]) -> type[nn.Layer]:
    members = {"__module__": block.__module__, "_stock": stock, "__reduce_ex__": _reduced}
    return type(stock.__name__, (block, stock), members)


def _reduced(layer: MoEBlock, protocol: int) -> tuple:
    """For pickle, which does not find such a class by its name."""
    return _new, type(layer).__bases__, *object.__reduce_ex__(layer, protocol)[2:]


def _new(block: type[MoEBlock], stock: type[nn.Layer]) -> MoEBlock:
    return object.__new__(_accelerated(block, stock))


class Integration:
    """The functions of one package: accelerate, restore, quantize_experts, prepack_experts, patch, unpatch,
    load_checkpoint, save_checkpoint.

    Args:
        package: its name.
        blocks: what is known of its blocks.
        published: what the published files of a model have of its holdings, None if their names are not
            known. It may name the dimensions of a whole for that.
        stand_ins: what patch() replaces in the package, by "module:name", because it builds another block
            under fleet: (the block to build, what to put there, given the stock class of that block).
        unpublished: endings of the published names that files may lack; the model keeps what it has there.
        file_format: in the metadata of files in the layout "paddle": what from_pretrained of the package asks
            for, if it reads that layout.
    """

    def __init__(
        self,
        package: str,
        blocks: list[type[MoEBlock]],
        published: Callable[[nn.Layer, Holdings], list[Source] | None],
        stand_ins: dict[str, tuple[type[MoEBlock], Callable[[type[nn.Layer]], Any]]] | None = None,
        unpublished: tuple[str, ...] = (),
        file_format: str = "pt",
    ):
        self.package, self._unpublished, self._file_format = package, unpublished, file_format
        self._published, self._stand_ins = published, stand_ins or {}
        self._blocks = {block.stock: block for block in blocks}
        self._original_init: dict[type, Any] = {}
        self._replaced: list[tuple[Any, str, Any]] = []  # module, name, what was there
        self._built: weakref.WeakSet[MoEBlock] = weakref.WeakSet()  # sharded ones, since patch()

    def accelerate(
        self,
        model: nn.Layer,
        ep_size: int = 1,
        tp_size: int = 1,
        *,
        parallel: ParallelContext | None = None,
        dispatch: str = "replicated",
    ) -> nn.Layer:
        """Has every mixture-of-experts block of a model run on paddle_moe, in place.

        Parameters keep their names and, with ep_size = tp_size = 1, their shapes: what the model saves then,
        the stock model loads, and the other way round. Over several ranks each rank keeps its part of the
        experts. Make optimizers afterwards.

        Args:
            model: built by the package, or any layer that contains such blocks.
            ep_size: ranks over which experts are divided.
            tp_size: ranks over which the intermediate dimension of each expert is divided.
            parallel: result of init_distributed(ep_size, tp_size), made here if None; or
                ParallelContext.from_groups with groups of fleet.
            dispatch: "replicated": all ranks pass the same tokens. "alltoall": each EP rank passes tokens of
                its own, any number of them, which travel to their experts and back; gradients of experts are
                those of the sum over all ranks. A model whose experts its package has divided over the ranks
                of a group of fleet needs this, and that group as EP group.

        Returns:
            ``model``.

        Raises:
            ValueError: the model has no block of a known kind, or one that is set up in a way that paddle_moe
                does not compute; nothing has been changed then.
            RuntimeError: see init_distributed.
        """
        _DISPATCH("dispatch", dispatch)
        _check_sizes(ep_size, tp_size)
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
                _check(layer, ep_size * tp_size > 1, parallel, dispatch, getattr(model, "config", None))
            finally:
                layer.__class__ = stock
        parallel = _context(ep_size, tp_size, parallel)
        self._guard_saving()
        for layer, block in found:
            layer.__class__ = _accelerated(block, type(layer))
            if parallel is not None:
                layer.shard(parallel, dispatch)
                layer.mark()
            layer.use_huge_pages()
        return model

    def _guard_saving(self) -> None:
        """Has save_pretrained refuse models whose experts it would not write, or not as it reads them."""
        base = getattr(sys.modules.get(f"{self.package}.transformers.model_utils"), "PretrainedModel", None)
        if base is None or hasattr(base.save_pretrained, "is_guarded"):
            return
        original = base.save_pretrained

        @functools.wraps(original)
        def save_pretrained(model: nn.Layer, *args: Any, **kwargs: Any) -> Any:
            for block in model.sublayers():
                if isinstance(block, MoEBlock):
                    block.expect_parameters()
                    if block.parallel is not None:
                        raise RuntimeError(
                            "save_pretrained() of one rank would write its own experts alone; call restore() "
                            f"first, or save with paddle_moe.integrations.{self.package}.save_checkpoint()"
                        )
            return original(model, *args, **kwargs)

        save_pretrained.is_guarded = True
        base.save_pretrained = save_pretrained

    def restore(self, model: nn.Layer) -> nn.Layer:
        """Undoes :meth:`accelerate`; over several ranks every rank then has the whole model again.

        All ranks call it together. Returns ``model``.
        """
        blocks = [layer for layer in model.sublayers(include_self=True) if isinstance(layer, MoEBlock)]
        for layer in blocks:
            layer.expect_parameters()
        for layer in blocks:
            if layer.parallel is not None:
                layer.unshard()
            layer.__class__ = type(layer)._stock
        return model

    def quantize_experts(
        self,
        model: nn.Layer,
        dtype: str | paddle.dtype = "int8",
        granularity: str | None = None,
        *,
        prepack: bool = False,
    ) -> nn.Layer:
        """Turns the experts of an accelerated model into 8- or 4-bit numbers, in place.

        Once it is loaded: there is no way back, and no file of the package holds such weights. They are
        frozen, but gradients go through them, to adapters of the attention for example. Each weight of an
        expert, of the shared one too, then is a buffer ``...weight``, stored [out, in] or prepacked, beside
        ``...scale``.
        Over several ranks scales belong to a rank's part, and all of them call it together. Attention,
        router, head and norms stay as they are.

        Args:
            model: what :meth:`accelerate` returned.
            dtype, granularity: see :func:`paddle_moe.quantize`.
            prepack: put them in the order in which the CPU reads them too, as
                :func:`paddle_moe.prepack_weights` does: prompts then take less time, but for
                fp8 without AVX-512 BF16.

        Returns:
            ``model``.

        Raises:
            ValueError: the model is not accelerated, a weight is not finite, an unknown option, with prepack
                an input size that a panel cannot hold; nothing has been changed then, on other ranks neither,
                where it is a RuntimeError that names this one.
            RuntimeError: the experts are quantised already, or on a GPU; a Paddle 2.6 over several ranks.
        """
        dtype, granularity = check_options(dtype, granularity)
        flag("prepack", prepack)
        blocks = _blocks_to_freeze(model, "quantize_experts")
        for block in blocks.values() if prepack else ():
            block.check_prepacking(dtype)
        failure = None
        try:
            for prefix, block in blocks.items():
                for name, weight in block.weights_to_freeze().items():
                    check_weight(joined(prefix, name), weight)
        except (ValueError, RuntimeError) as error:
            failure = error
        raise_anywhere(_parallel_of(model, None), failure, "quantize_experts()")
        for block in blocks.values():
            block.quantize(dtype, granularity, prepack)
        return model

    def prepack_experts(self, model: nn.Layer) -> nn.Layer:
        """Puts the experts of an accelerated model in the order in which the CPU reads them, in place.

        Once it is loaded: there is no way back, and no file of the package holds such weights. See
        :func:`paddle_moe.prepack_weights`: calls take less time, with the same bits. The weights are frozen,
        but gradients go through them, to adapters of the attention for example. Each weight of an expert, of
        the shared one too, then is a buffer ``...weight``.

        Args:
            model: what :meth:`accelerate` returned.

        Returns:
            ``model``.

        Raises:
            ValueError: the model is not accelerated, or has bfloat16 experts with an odd hidden size, or an
                intermediate size that is odd on any rank; nothing has been changed then.
            RuntimeError: the experts are quantised or prepacked already, or on a GPU; a Paddle 2.6 over
                several ranks.
        """
        blocks = _blocks_to_freeze(model, "prepack_experts")
        for prefix, block in blocks.items():
            block.check_prepacking()
            for name, weight in block.weights_to_freeze().items():
                expect_cpu(joined(prefix, name), weight)
        for block in blocks.values():
            block.prepack()
        return model

    def patch(
        self,
        ep_size: int = 1,
        tp_size: int = 1,
        *,
        parallel: ParallelContext | None = None,
        dispatch: str = "replicated",
    ) -> None:
        """Has blocks that are built from now on run on paddle_moe, until :meth:`unpatch`.

        Over several ranks each block is cut to this rank's part as soon as it is built, so that a model whose
        experts do not fit on one rank can be built. Random weights differ between ranks then, also those that
        all ranks hold: fill it with load_checkpoint, or call broadcast_parameters. Arguments and errors are
        those of :meth:`accelerate`.
        """
        _DISPATCH("dispatch", dispatch)
        _check_sizes(ep_size, tp_size)
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
        self._guard_saving()
        building: list[nn.Layer] = []
        for stock, block in stocks.items():
            self._original_init[stock] = stock.__init__
            stock.__init__ = _accelerating_init(stock, block, parallel, dispatch, self._built, building)
        for place, (block, make) in self._stand_ins.items():
            path, _, name = place.partition(":")
            stock = next((one for one, known in stocks.items() if known is block), None)
            if stock is not None and hasattr(module := import_module(path), name):
                self._replaced.append((module, name, getattr(module, name)))
                setattr(module, name, make(stock))

    def unpatch(self) -> None:
        """Undoes :meth:`patch`. Models that were built in between stay as they are."""
        for stock, original in self._original_init.items():
            stock.__init__ = original
        self._original_init.clear()
        for module, name, original in self._replaced:
            setattr(module, name, original)
        self._replaced.clear()
        for block in self._built:
            block.mark()
        self._built.clear()

    def load_checkpoint(
        self,
        model: nn.Layer,
        path: str | os.PathLike,
        *,
        layout: str = "auto",
        cast: str = "lossless",
        progress: bool = False,
        parallel: ParallelContext | None = None,
    ) -> LoadReport:
        """Fills a model, accelerated or not, from safetensors files; each rank reads only what it holds.

        All ranks that share the model call it together.

        Args:
            model: with parameters of the right shapes; for EP x TP, accelerated already.
            path: a directory with model.safetensors.index.json or with *.safetensors, or one such file.
            layout: "huggingface": names and [out, in] matrices of the published files. "paddle": those of the
                package's own files. "auto": whichever names the files have.
            cast: "lossless": float16 and bfloat16 may become float32. "any": every floating-point dtype may
                become every other, with rounding. "none": dtypes must be equal. Files with fp8 weights and a
                scale for each block of 128 x 128 count as float32, those in MXFP4 as bfloat16.
            progress: show a bar on the first rank, outside a terminal lines.
            parallel: as in save_checkpoint. Without it replicas load each for itself.

        Returns:
            LoadReport: the keys loaded, the keys of the files that nothing asked for, the bytes read.

        Raises:
            ValueError: an unknown layout, or one that this package has no names for.
            CheckpointError: a ValueError, on every rank, that lists file, key, what was expected and what
                found, for all that is missing, doubled, truncated, of another shape or dtype, and for keys of
                the mixture-of-experts blocks that the model lacks. Nothing was assigned.
            RuntimeError: a rank could not read on, after some values had been assigned.
        """
        one_of("auto", *_LAYOUTS)("layout", layout)
        files, holdings = TensorFiles(path), _holdings(model)
        candidates = {one: self._sources(model, one) for one in _LAYOUTS if layout in ("auto", one)}
        if layout == "auto" and candidates["huggingface"][1] is None:
            layout = "paddle"
        elif layout == "auto":
            fit = {
                one: sum(
                    found is not None and found.shape == source.part.shape
                    for source in sources
                    for found in [files.find(source.key)]
                )
                for one, (_, sources) in candidates.items()
            }
            if len(set(fit.values())) == 1 and any(fit.values()):
                raise ValueError(
                    "layout must be 'huggingface' or 'paddle' where the files fit both alike, got 'auto'"
                )
            layout = max(fit, key=fit.get)
        holdings, sources = candidates[layout]
        if sources is None:
            raise ValueError(self._unknown_names(model))
        lacking = {
            source.target
            for source in sources
            if layout == "huggingface"
            and source.key.endswith(self._unpublished)
            and files.find(source.key) is None
        }
        sources = [source for source in sources if source.target not in lacking]
        targets = {
            name: Target(tensor, part) for name, (tensor, part, _) in holdings.items() if name not in lacking
        }
        asked = {source.key for source in sources}
        inside = tuple({key.partition(".experts.")[0] + "." for key in asked if ".experts." in key})
        plan = Plan(
            files, targets, sources, path=path, must_match=lambda key: key.startswith(inside), cast=cast
        )
        parallel = _parallel_of(model, parallel)
        return execute([plan], path, parallel, progress=f"loading {path}" if progress else None)

    def save_checkpoint(
        self,
        model: nn.Layer,
        path: str | os.PathLike,
        *,
        layout: str = "huggingface",
        parallel: ParallelContext | None = None,
    ) -> None:
        """The reverse of :meth:`load_checkpoint`: writes the weights of a model, spread over ranks or not.

        All ranks of `parallel` call it together, and pass what they hold to each other through files, so
        ``path`` needs twice the room for a while.

        Args:
            model: accelerated or not.
            path: a directory that all ranks see, without an index file; made when missing.
            layout: "huggingface" or "paddle", as in load_checkpoint.
            parallel: the ranks; None: those that the model was divided over. Of a model that is not divided,
                the process that calls writes, so without `parallel` only one of several replicas may call.

        Raises:
            ValueError: an unknown layout, or path has an index file already.
            RuntimeError: a rank could not write, on every rank.
        """
        one_of(*_LAYOUTS)("layout", layout)
        holdings, sources = self._sources(model, layout)
        if sources is None:
            raise ValueError(self._unknown_names(model))
        parallel = _parallel_of(model, parallel)
        size = 1 if parallel is None else parallel.size("grid")
        rank = 0 if parallel is None else parallel.ep_rank * parallel.tp_size + parallel.tp_rank
        targets, homes = {}, {}
        for source in sources:
            homes.setdefault(source.key, []).append(source)
        for number, (key, stored) in enumerate(sorted(homes.items())):
            distinct: dict[str, str] = {}
            for one in sorted(
                stored, key=lambda one: one.target != key
            ):  # tied to it: others of the same part
                distinct.setdefault(str(holdings[one.target][2].ranges), one.target)
            homes[key] = list(distinct.values())
            if number % size == rank:
                dtype = holdings[homes[key][0]][0].dtype
                targets[key] = Target(paddle.empty(stored[0].part.shape, dtype), stored[0].part)
        alone = {
            joined(prefix, name)
            for prefix, block in model.named_sublayers(include_self=True)
            if isinstance(block, MoEBlock)
            for name, one in block.named_slices().items()
            if one.shared_by
        }
        pieces = {
            part_key(name, part, whole): tensor
            for name, (tensor, part, whole) in holdings.items()
            if (rank == 0 or name in alone) and part.size and not part.copy
        }
        if parallel is not None and parallel.dp_rank > 0:
            pieces, targets = {}, {}
        wholes = {name: whole for name, (_, _, whole) in holdings.items()}
        file_format = self._file_format if layout == "paddle" else "pt"
        write_stored(path, pieces, wholes, targets, homes, parallel, file_format=file_format)

    def _unknown_names(self, model: nn.Layer) -> str:
        return (
            f"layout must be 'paddle' for {type(model).__name__}, got 'huggingface': published names are "
            f"known only of models of {self.package}, with all of their blocks accelerated and listed "
            "in docs/integrations.md"
        )

    def _sources(self, model: nn.Layer, layout: str) -> tuple[Holdings, list[Source] | None]:
        """The tensors of files in a layout, and the holdings of the model that they are parts of."""
        holdings = _holdings(model)
        if layout == "huggingface":
            sources = self._published(model, holdings)
        else:
            sources = [Source(name, name, whole) for name, (_, _, whole) in holdings.items()]
        return holdings, sources

    def supported(self) -> str:
        return ", ".join(
            f"{block.stock.partition(':')[2]} of {block.model}" for block in self._blocks.values()
        )

    def _find(self, model: nn.Layer) -> Iterator[tuple[nn.Layer, type[MoEBlock]]]:
        inside = set()  # experts that belong to a block which is found already, or accelerated
        for layer in model.sublayers(include_self=True):
            if isinstance(layer, MoEBlock):
                inside.update(id(one) for one in layer.sublayers())
            if isinstance(layer, MoEBlock) or id(layer) in inside:
                continue
            for cls in type(layer).__mro__:
                block = self._blocks.get(f"{cls.__module__}:{cls.__qualname__}")
                if block is not None and type(layer).forward is cls.forward:
                    inside.update(id(one) for one in layer.sublayers())
                    yield layer, block
                    break


def _blocks_to_freeze(model: nn.Layer, function: str) -> dict[str, MoEBlock]:
    """By their names; an error if there are none, or one of them cannot be frozen."""
    sublayers = model.named_sublayers(include_self=True)
    blocks = {name: layer for name, layer in sublayers if isinstance(layer, MoEBlock)}
    if not blocks:
        raise ValueError(f"model must be what accelerate() returned, got {type(model).__name__}")
    for block in blocks.values():
        if block.frozen is not None:
            raise RuntimeError(
                f"{block.how_frozen()}, and there is no way back; load the model anew for {function}(), or "
                "for quantize_experts(prepack=True), which does both"
            )
        check_shards(function, 1 if block.parallel is None else block.parallel.size("grid"))
    return blocks


def _holdings(model: nn.Layer) -> Holdings:
    """Everything that the model has, or that another rank has instead."""
    holdings = {name: (one, *[Part.whole(one.shape)] * 2) for name, one in model.state_dict().items()}
    for prefix, block in model.named_sublayers(include_self=True):
        if isinstance(block, MoEBlock):
            for name, one in block.named_slices().items():
                holdings[joined(prefix, name)] = one.parameter, one.part, one.whole
    return dict(sorted(holdings.items()))  # in one order on all ranks


def published_by_blocks(model: nn.Layer) -> list[Source] | None:
    """What published files have of the blocks of a model, by their layouts; None if one has no layout."""
    sources = []
    for prefix, block in model.named_sublayers(include_self=True):
        if not isinstance(block, MoEBlock):
            continue
        if block.layout is None:
            return None
        slices, wholes = block.named_slices(), {}
        for one in slices.values():
            ranges = wholes.setdefault(one.dense, dict(one.whole.ranges))
            for name, (start, stop) in one.whole.ranges.items():
                ranges[name] = min(start, ranges[name][0]), max(stop, ranges[name][1])
        for key, stored in stored_tensors(wholes, LAYOUTS[block.layout]):
            for name, one in slices.items():
                if one.dense == stored.dense and one.whole.overlap(stored.part):
                    sources.append(Source(joined(prefix, key), joined(prefix, name), stored.part))
    return sources or None


def turned(part: Part) -> Part:
    """The same part, stored with the dimensions of the array in reverse order."""
    dimensions = re.findall(r"\([^)]*\)|\S+", part.pattern)
    return Part(" ".join(reversed(dimensions)), part.ranges)


# Layers that hold several of the published files in one: the dimensions of their columns, the one that tells
# the parts apart, and what their names become.
_FUSED = {
    "qkv_proj": ("(K R D)", "R", ("q_proj", "k_proj", "v_proj")),
    "up_gate_proj": ("(G I)", "G", ("gate_proj", "up_proj")),
    "gate_up_fused_proj": ("(G I)", "G", ("gate_proj", "up_proj")),
}


def published_parts(
    name: str, layers: dict[str, nn.Layer], holdings: Holdings, key_of: Callable[[str], str]
) -> list[Source]:
    """What published files have of a tensor: matrices of nn.Linear turned, and fused layers in their parts.

    Args:
        layers: of the model, by name.
        holdings: of the model; the dimensions of fused columns get names there.
        key_of: the published name of an unfused tensor.
    """
    tensor, _, whole = holdings[name]
    path, _, leaf = name.rpartition(".")
    parent, _, last = path.rpartition(".")
    if last not in _FUSED:
        is_matrix = leaf == "weight" and isinstance(layers.get(path), nn.Linear)
        return [Source(key_of(name), name, turned(whole) if is_matrix else whole)]
    columns, cut, parts = _FUSED[last]
    spans = [(number, number + 1) for number in range(len(parts))]
    if cut not in whole.ranges:  # not of a block
        ranges = {"G": (0, 2)}
        if cut == "R":  # the heads of a key follow each other: those of its queries, the key, the value
            config = layers[parent].config
            repeats = config.num_attention_heads // config.num_key_value_heads
            ranges = {"K": (0, config.num_key_value_heads), "R": (0, repeats + 2)}
        pattern = f"H {columns}" if len(whole.names) == 2 else columns
        whole = Slice.of(tensor, name, pattern, **ranges).whole
        holdings[name] = tensor, whole, whole
    if cut == "R":
        repeats = whole.length("R") - 2
        spans = [(0, repeats), (repeats, repeats + 1), (repeats + 1, repeats + 2)]
    return [
        Source(
            key_of(f"{parent}.{part}.{leaf}" if parent else f"{part}.{leaf}"),
            name,
            turned(Part(whole.pattern, {**whole.ranges, cut: span})),
        )
        for part, span in zip(parts, spans)
    ]


def _parallel_of(model: nn.Layer, parallel: ParallelContext | None) -> ParallelContext | None:
    blocks = [layer for layer in model.sublayers(include_self=True) if isinstance(layer, MoEBlock)]
    for own in (block.parallel for block in blocks):  # a block that was accelerated by itself has none
        if None not in (own, parallel) and own is not parallel:
            raise ValueError(
                "parallel must be the one that all blocks of the model were accelerated with, or None; "
                "restore() the model, and accelerate() it with one"
            )
        parallel = parallel or own
    return parallel


_LAYOUTS = ("huggingface", "paddle")
_DISPATCH = one_of("replicated", "alltoall")


def _check_sizes(ep_size: int, tp_size: int) -> None:
    for name, size in (("ep_size", ep_size), ("tp_size", tp_size)):
        at_least(1)(name, size)


def _context(ep_size: int, tp_size: int, parallel: ParallelContext | None) -> ParallelContext | None:
    if parallel is None:
        return init_distributed(ep_size, tp_size) if ep_size * tp_size != 1 else None
    if (ep_size, tp_size) != (1, 1) and (ep_size, tp_size) != (parallel.ep_size, parallel.tp_size):
        raise ValueError(
            f"ep_size and tp_size must be those of parallel, {parallel.ep_size} and {parallel.tp_size}, or "
            f"be left out, got {ep_size} and {tp_size}"
        )
    return parallel if parallel.ep_size * parallel.tp_size > 1 else None


def _check(
    block: MoEBlock, over_ranks: bool, parallel: ParallelContext | None, dispatch: str, model: Any
) -> None:
    """model: the configuration of the model around it, None if that is not known."""
    block.check()
    configs = [layer.config for layer in block.sublayers(include_self=True) if hasattr(layer, "config")]
    if any(getattr(one, "sequence_parallel", False) for one in [block, model, *configs]):
        if over_ranks or parallel is not None:
            raise ValueError(
                "sequence_parallel must be False for ep_size or tp_size above 1, because the router's "
                "gradients would lack those of other ranks' tokens, got True"
            )
        degrees = ("tensor_parallel_degree", "tensor_model_parallel_size")
        divided = max([getattr(one, name, 1) or 1 for one in [model, *configs] for name in degrees])
        if divided > 1:
            raise ValueError(
                "sequence_parallel must be False, or the model built without fleet's tensor parallelism: a "
                f"rank would see only its part of each sequence, got True and a degree of {divided}"
            )
    _check_division(block, parallel, dispatch)
    for name in block.linears:
        block.linear_weight(name)
    block.weights()
    block.activation()
    if block.shared_expert() is not None:
        listed_weights([block.shared_expert()])


def _check_division(block: MoEBlock, parallel: ParallelContext | None, dispatch: str) -> None:
    """A block whose experts its package has divided is used as it is."""
    divided, held = block.divided_over(), [number for number, _ in block.held()]
    if divided == 1:
        return
    fits = parallel is not None and (parallel.ep_size, parallel.tp_size) == (divided, 1)
    if fits:
        fits = held == list(range(*shard_range(block.total_experts(), parallel.ep_rank, divided)))
    if dispatch != "alltoall" or not fits:
        raise ValueError(
            f"{type(block).__name__} holds the experts {held} of {block.total_experts()}, because fleet was "
            "running when it was built: pass dispatch='alltoall' and "
            "parallel=ParallelContext.from_groups(group), with the group that the experts are divided over, "
            f"got dispatch={dispatch!r} and "
            + ("no parallel" if parallel is None else f"{parallel.ep_size} EP x {parallel.tp_size} TP ranks")
        )


def _accelerating_init(
    stock: type[nn.Layer],
    block: type[MoEBlock],
    parallel: ParallelContext | None,
    dispatch: str,
    built: weakref.WeakSet[MoEBlock],
    building: list[nn.Layer],
):
    """building: the blocks whose __init__ is running; experts that are built in one of them belong to it."""
    original = stock.__init__

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        building.append(self)
        try:
            original(self, *args, **kwargs)
        finally:
            building.pop()
        kind = type(self)
        # A subclass with an __init__ of its own is not ready yet; one may compute something else.
        if kind.__init__ is stock.__init__ and kind.forward is stock.forward and not building:
            self.__class__ = _accelerated(block, kind)
            config = next((one for one in [*args, *kwargs.values()] if hasattr(one, "hidden_size")), None)
            _check(self, False, parallel, dispatch, config)
            if parallel is not None:
                self.shard(parallel, dispatch)
                built.add(self)

    return init
