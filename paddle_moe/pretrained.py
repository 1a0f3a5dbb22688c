"""Expert weights in the files of published models: loaded into FusedMoE layers, and written back.

A layout says under which name, and in which order of dimensions, a model's files hold each parameter of a
FusedMoE layer. LAYOUTS has those of the Hugging Face checkpoints of several families; a new one is a few
lines.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import paddle

from paddle_moe._options import type_name
from paddle_moe.checkpoint import FORMAT, VERSION, parallel_of, pieces_to_write, stored_parts, write_files
from paddle_moe.layers import FusedMoE
from paddle_moe.params import Part
from paddle_moe.tensor_files import (
    INDEX_NAME,
    LoadReport,
    Plan,
    Source,
    Target,
    TensorFiles,
    exchange,
    execute,
    is_first,
    joined,
    refuse_dtypes,
)

if TYPE_CHECKING:
    import os

    from paddle_moe.distributed import ParallelContext

GATE, UP = 0, 1


@dataclass(frozen=True)
class StoredTensor:
    """How files hold one parameter of FusedMoE, or a part of it.

    Attributes:
        parameter: its name in FusedMoE.
        key: the name in the files after that of the block; {expert} stands for each expert.
        pattern: the dimensions, as in params.Part. Of those that it lacks, {expert} gives E and `half` gives
            G.
        half: GATE or UP, where the two are stored apart.
    """

    parameter: str
    key: str
    pattern: str
    half: int | None = None


def _experts(gate: str, up: str, down: str) -> tuple[StoredTensor, ...]:
    return (
        StoredTensor("gate_up_weight", f"experts.{{expert}}.{gate}.weight", "I H", GATE),
        StoredTensor("gate_up_weight", f"experts.{{expert}}.{up}.weight", "I H", UP),
        StoredTensor("down_weight", f"experts.{{expert}}.{down}.weight", "H I"),
    )


def _shared_expert(name: str) -> tuple[StoredTensor, ...]:
    return (
        StoredTensor("shared_gate_up_weight", f"{name}.gate_proj.weight", "S H", GATE),
        StoredTensor("shared_gate_up_weight", f"{name}.up_proj.weight", "S H", UP),
        StoredTensor("shared_down_weight", f"{name}.down_proj.weight", "H S"),
    )


_ROUTER = StoredTensor("gate_weight", "gate.weight", "E H")
_QWEN3 = (_ROUTER, *_experts("gate_proj", "up_proj", "down_proj"))
_DEEPSEEK_V2 = (*_QWEN3, *_shared_expert("shared_experts"))
_DEEPSEEK_V3 = (*_DEEPSEEK_V2, StoredTensor("correction_bias", "gate.e_score_correction_bias", "E"))

# Every matrix [out, in] as in torch.nn.Linear. The block is model.layers.N.mlp, in Mixtral
# model.layers.N.block_sparse_moe. Several shared experts are stored as one.
LAYOUTS: dict[str, tuple[StoredTensor, ...]] = {
    "mixtral": (_ROUTER, *_experts("w1", "w3", "w2")),
    "qwen2_moe": (
        *_QWEN3,
        *_shared_expert("shared_expert"),
        StoredTensor("shared_gate_weight", "shared_expert_gate.weight", "1 H"),
    ),
    "qwen3_moe": _QWEN3,
    "deepseek_v2": _DEEPSEEK_V2,
    "deepseek_v3": _DEEPSEEK_V3,
    "glm4_moe": _DEEPSEEK_V3,
    "ernie4_5_moe": (
        *_DEEPSEEK_V2,
        StoredTensor("correction_bias", "moe_statics.e_score_correction_bias", "1 E"),
    ),
    # As Transformers writes it, where gate and up columns alternate, and in MXFP4 as it was published.
    "gpt_oss": (
        StoredTensor("gate_weight", "router.weight", "E H"),
        StoredTensor("gate_bias", "router.bias", "E"),
        StoredTensor("gate_up_weight", "experts.gate_up_proj", "E H (I G)"),
        StoredTensor("gate_up_bias", "experts.gate_up_proj_bias", "E (I G)"),
        StoredTensor("down_weight", "experts.down_proj", "E I H"),
        StoredTensor("down_bias", "experts.down_proj_bias", "E H"),
    ),
    # Experts in one tensor, as newer versions of Transformers keep them.
    "qwen3_moe_stacked": (
        _ROUTER,
        StoredTensor("gate_up_weight", "experts.gate_up_proj", "E (G I) H"),
        StoredTensor("down_weight", "experts.down_proj", "E H I"),
    ),
    # What PaddleFormers saves of Qwen3-MoE under its own names, [in, out]: gate and up of each expert in one,
    # or all experts in one.
    "paddleformers": (
        StoredTensor("gate_weight", "gate.weight", "H E"),
        StoredTensor("gate_up_weight", "experts.{expert}.up_gate_proj.weight", "H (G I)"),
        StoredTensor("down_weight", "experts.{expert}.down_proj.weight", "I H"),
    ),
    "paddleformers_stacked": (
        StoredTensor("gate_weight", "gate.weight", "H E"),
        StoredTensor("gate_up_weight", "experts.gate_up_proj", "E H (G I)"),
        StoredTensor("down_weight", "experts.down_proj", "E I H"),
    ),
}


def _layout(layout: str | Sequence[StoredTensor], transposed: bool) -> list[StoredTensor]:
    if isinstance(layout, str):
        if layout not in LAYOUTS:
            raise ValueError(
                f"layout must be one of {', '.join(LAYOUTS)}, or a list of StoredTensor, got {layout!r}"
            )
        if not transposed and layout.startswith("paddleformers"):
            raise ValueError(
                f"transposed must be left out for the layout {layout}, which is [in, out] already"
            )
        layout = LAYOUTS[layout]
        if not transposed:
            layout = [
                replace(one, pattern=" ".join(reversed(one.pattern.split())))
                if one.key.endswith(".weight")
                else one
                for one in layout
            ]
    elif not transposed:
        raise ValueError(
            "transposed=False is for the layouts with a name; write the patterns of your own as they are"
        )
    return list(layout)


@dataclass(frozen=True)
class StoredPart:
    """One tensor of files: the parameter of FusedMoE that it belongs to, and the part of it that it is.

    expert: the one whose own tensor it is; None: it has all of them, or none.
    """

    dense: str
    part: Part
    expert: int | None


def stored_tensors(
    wholes: Mapping[str, Mapping[str, tuple[int, int]]], layout: Sequence[StoredTensor]
) -> list[tuple[str, StoredPart]]:
    """What files in a layout have of one block, by the key after its name.

    wholes: of each parameter that the block has, the ranges of the dimensions on a single rank.
    """
    stored = []
    for one in layout:
        if one.parameter not in wholes:
            continue
        ranges = dict(wholes[one.parameter])
        if one.half is not None:
            ranges["G"] = one.half, one.half + 1
        experts = range(*ranges["E"]) if "{expert}" in one.key else [None]
        for expert in experts:
            own = ranges if expert is None else {**ranges, "E": (expert, expert + 1)}
            part = StoredPart(one.parameter, Part(one.pattern, own), expert)
            stored.append((one.key.format(expert=expert), part))
    return stored


def _stored(layer: FusedMoE, layout: Sequence[StoredTensor]) -> list[tuple[str, StoredPart]]:
    return stored_tensors({name: part.ranges for name, part in layer.parts(dense=True).items()}, layout)


def load_moe_weights(
    path: str | os.PathLike,
    layers: Mapping[str, FusedMoE],
    layout: str | Sequence[StoredTensor],
    *,
    others: Mapping[str, tuple[paddle.Tensor, bool]] | None = None,
    transposed: bool = True,
    cast: str = "lossless",
    parallel: ParallelContext | None = None,
    progress: bool = False,
) -> LoadReport:
    """Fills FusedMoE layers from a model's safetensors files; all ranks call, each reads its slices only.

    Weights that are quantised as in the files of gpt-oss (MXFP4) or DeepSeek-V3 (fp8) are decoded; the keys
    tell.

    Example:
        layers = {f"model.layers.{i}.mlp": block.moe for i, block in enumerate(blocks)}
        report = load_moe_weights("Qwen3-30B-A3B", layers, "qwen3_moe", progress=True)

    Args:
        path: a directory with model.safetensors.index.json or with *.safetensors, or one such file.
        layers: by the name that the block has in the files, for example "model.layers.0.mlp"; "" where they
            hold the block alone.
        layout: a name in LAYOUTS, or the StoredTensors of another layout. A parameter that a layer lacks, for
            example a bias, is not looked for. gpt_oss wants FusedMoE(gate_bias=True).
        others: {key: (tensor, transposed)}, tensors outside FusedMoE to fill too, whole on every
            rank. transposed: the file has the matrix turned.
        transposed: matrices are [out, in] in the files, as Hugging Face has them; False: [in, out], as
            PaddleNLP has them.
        cast: "lossless": float16 and bfloat16 may become float32. "any": every floating dtype may become
            every other, with rounding. "none": dtypes must be equal. Quantised weights count as the dtype
            that holds their decoded values: MXFP4 as bfloat16, fp8 with a scale for each block of 128 x 128
            as float32; to load the latter into bfloat16, pass "any".
        parallel: the ranks; None: those of the layers.
        progress: show a bar on the first rank, outside a terminal lines.

    Returns:
        LoadReport: the keys loaded, the keys of the files that nothing asked for, the bytes read.

    Raises:
        ValueError: an unknown layout or cast, or an entry of `layers` that is no FusedMoE.
        RuntimeError: a layer is quantised or prepacked.
        CheckpointError: a ValueError, on every rank, that lists file, key, what was expected and what found,
            for all that is missing, doubled, truncated, of another shape or dtype, and for every key below a
            name in `layers` that the layout lacks. Nothing was assigned.
        RuntimeError: a rank could not read on, after some values had been assigned.
    """
    layout, parallel = _layout(layout, transposed), _parallel_of_layers(layers, parallel)
    targets, sources = {}, []
    for name, layer in layers.items():
        for attribute, part in layer.parts().items():
            if getattr(layer, attribute) is not None:
                targets[joined(name, attribute)] = Target(getattr(layer, attribute), part)
        sources += [
            Source(joined(name, key), joined(name, one.dense), one.part)
            for key, one in _stored(layer, layout)
        ]
    for key, (tensor, is_transposed) in (others or {}).items():
        part = Part.whole(tensor.shape)
        targets[key] = Target(tensor, part)
        stored = replace(part, pattern=" ".join(reversed(part.names))) if is_transposed else part
        sources.append(Source(key, key, stored))
    prefixes = tuple(joined(name, "") for name in layers)
    files = TensorFiles(path)
    plan = Plan(
        files, targets, sources, path=path, must_match=lambda key: key.startswith(prefixes), cast=cast
    )
    return execute([plan], path, parallel, progress=f"loading {path}" if progress else None)


def _parallel_of_layers(
    layers: Mapping[str, FusedMoE], parallel: ParallelContext | None
) -> ParallelContext | None:
    for name, layer in layers.items():
        if not isinstance(layer, FusedMoE):
            raise ValueError(f"layers[{name!r}] must be a FusedMoE, got {type_name(layer)}")
        if layer.quantized is not None:
            raise RuntimeError(
                f"the experts of layers[{name!r}] are {layer.quantized} since quantize_(), which no published"
                " layout holds; load before quantize_(), and keep the result with save_checkpoint"
            )
        parallel = parallel_of(layer, parallel)
    return parallel


def save_moe_weights(
    path: str | os.PathLike,
    layers: Mapping[str, FusedMoE],
    layout: str | Sequence[StoredTensor],
    *,
    others: Mapping[str, tuple[paddle.Tensor, bool]] | None = None,
    transposed: bool = True,
    parallel: ParallelContext | None = None,
) -> None:
    """The reverse of load_moe_weights: writes FusedMoE layers under the names and in the layout of a model.

    Never quantised, also where the layers were loaded from quantised files.

    The ranks pass their parts to each other through files, so `path` needs twice the room for a while. Dtypes
    are those of the layers.

    Args:
        path: a directory that all ranks see, without an index file; made when missing.
        layers, layout, others, transposed, parallel: as in load_moe_weights.

    Raises:
        ValueError: an unknown layout, path has an index file already, a key of `others` is one that a layer
            writes, or a tensor of a dtype that cannot be loaded again.
        RuntimeError: a layer is quantised or prepacked; a rank could not write, or a file is there already
            that it would replace, on every rank.
    """
    layout, parallel = _layout(layout, transposed), _parallel_of_layers(layers, parallel)
    others = others or {}
    refuse_dtypes("others", {key: tensor for key, (tensor, _) in others.items()})
    holdings, targets, homes = {}, {}, {}
    for name, layer in layers.items():
        dense = layer.parts(dense=True)
        homeless = sorted(set(dense) - {one.parameter for one in layout})
        if homeless:
            raise ValueError(
                f"layout has no place for {homeless} of layers[{name!r}]; save_checkpoint keeps everything"
            )
        for attribute, part in layer.parts().items():
            holdings[joined(name, attribute)] = getattr(layer, attribute), part, dense[attribute]
        for key, one in _stored(layer, layout):
            if joined(name, key) in others:
                raise ValueError(f"others must not have {joined(name, key)}, which layers[{name!r}] writes")
            if _is_written_here(layer, one.expert, parallel):
                dtype = (getattr(layer, one.dense) if one.dense != "down_bias" else layer.down_weight).dtype
                targets[joined(name, key)] = Target(paddle.empty(one.part.shape, dtype), one.part)
                homes[joined(name, key)] = [joined(name, one.dense)]
    tensors = {}
    if is_first(parallel):
        for key, (tensor, is_transposed) in others.items():
            tensors[key] = tensor.transpose(range(tensor.ndim)[::-1]) if is_transposed else tensor
    wholes = {name: whole for name, (_, _, whole) in holdings.items()}
    write_stored(path, pieces_to_write(holdings, parallel), wholes, targets, homes, parallel, tensors)


def write_stored(
    path: str | os.PathLike,
    pieces: Mapping[str, paddle.Tensor],
    wholes: Mapping[str, Part],
    targets: Mapping[str, Target],
    homes: Mapping[str, Sequence[str]],
    parallel: ParallelContext | None,
    others: Mapping[str, paddle.Tensor] | None = None,
    file_format: str = "pt",
) -> None:
    """Writes tensors that are made up of what several ranks hold; all ranks call it.

    Args:
        path: a directory that all ranks see, without an index file; made when missing.
        pieces: what this rank has for all, by checkpoint.part_key.
        wholes: the whole of each tensor that the pieces are parts of, by name.
        targets: by key, the empty tensors that this rank writes.
        homes: by key, the names of the wholes that its values are in.
        others: by key, what this rank writes besides.
        file_format: in the metadata of the files: "pt", as most readers want it, or "np", as PaddleNLP does.

    Raises:
        ValueError: path has an index file already.
        RuntimeError: a rank could not write, or a file is there already that it would replace, on every rank.
    """
    path = Path(path)
    if (path / INDEX_NAME).exists():
        raise ValueError(f"path must be a directory without {INDEX_NAME}, got {path}; choose another")
    parts_path = path / f".parts-{exchange(parallel, secrets.token_hex(4), 'starting to save', path)[0]}"
    try:
        _gather(parts_path, pieces, wholes, targets, homes, parallel)
        tensors = {**{key: target.tensor for key, target in targets.items()}, **(others or {})}
        index = {"metadata": {}}
        write_files(path, {"model": tensors}, index, parallel, tagged=False, file_format=file_format)
    finally:
        if is_first(parallel):
            shutil.rmtree(parts_path, ignore_errors=True)


def _gather(
    path: Path,
    pieces: Mapping[str, paddle.Tensor],
    wholes: Mapping[str, Part],
    targets: Mapping[str, Target],
    homes: Mapping[str, Sequence[str]],
    parallel: ParallelContext | None,
) -> None:
    """Fills the targets from the pieces of all ranks, through files in a directory that is theirs alone."""
    write_files(path, {"model": pieces}, {"metadata": {"format": FORMAT, "version": VERSION}}, parallel)
    files = TensorFiles(path)
    stored, _ = stored_parts(files, wholes)
    parts_of: dict[str, list[Source]] = {}
    for source in stored:
        parts_of.setdefault(source.target, []).append(source)
    sources = [
        replace(source, target=key)
        for key, target in targets.items()
        for home in homes[key]
        for source in parts_of.get(home, [])
        if source.part.overlap(target.part) is not None
    ]
    plan = Plan(files, targets, sources, path=path, must_match=lambda key: False)
    execute([plan], path, parallel)


def _is_written_here(layer: FusedMoE, expert: int | None, parallel: ParallelContext | None) -> bool:
    """One expert: by a rank that holds a part of it, in turn. What all ranks have: by the first."""
    if expert is None or layer.parallel is None:
        return is_first(parallel)
    if parallel is not None and parallel.dp_rank > 0:
        return False
    return layer.experts_min <= expert <= layer.experts_max and expert % layer.tp_size == layer.tp_rank
