"""Checkpoints of models with FusedMoE layers: saved on one EP x TP grid, loaded on any other, bit by bit.

Every rank writes what it alone holds, and the first rank of the grid also what all hold alike. A directory
has, for N ranks,

    model.safetensors.index.json                   which file has which key; the commit point
    model-TAG-0000R-of-0000N.safetensors           parameters and buffers
    optimizer-TAG-0000R-of-0000N.safetensors       what the optimizer keeps for each parameter
    state-TAG-0000R-of-0000N.json                  random number generators of the rank

A tensor that one rank holds whole is stored under its name, as in any safetensors file; a part of one as
`name[E=0:4,I=0:512]` with the ranges that it has of the dense tensor (see FusedMoE.parts). Weights of experts
are [in, out], those that the index names under `transposed` [out, in]. Files of a save
have a tag of their own, and the index is replaced at the end, by a rename: whenever a save is killed, the
directory still has the checkpoint before.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import re
import secrets
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import numpy as np
import paddle
from paddle import nn
from paddle.base.core import GeneratorState
from paddle.base.layer_helper import LayerHelper
from paddle.distributed.fleet.meta_parallel.meta_parallel_base import MetaParallelBase
from paddle.optimizer.lr import LRScheduler
from safetensors import safe_open

from paddle_moe._options import type_name
from paddle_moe.compat.safetensors_paddle import save_file
from paddle_moe.integrations.blocks import MoEBlock
from paddle_moe.layers import FusedMoE
from paddle_moe.params import EXPERT_WEIGHTS, Part
from paddle_moe.tensor_files import (
    INDEX_NAME,
    CheckpointError,
    Plan,
    Problem,
    Source,
    Target,
    TensorFiles,
    at_files,
    exchange,
    execute,
    joined,
    raise_together,
    refuse_dtypes,
)
from paddle_moe.training import parameters_of

if TYPE_CHECKING:
    from paddle_moe.distributed import ParallelContext

__all__ = ["CheckpointError", "load_checkpoint", "save_checkpoint"]

# Version 2: with an entry `transposed`.
FORMAT, VERSION = "paddle_moe", 1
VERSIONS = (1, 2)
# Including what a killed save leaves: the index that it was about to put in place, the file that safetensors
# was writing. All ranks have written theirs when the others are removed.
_OWN_FILE = re.compile(
    r"(model|optimizer|state)-[0-9a-f]{8}-\d{5}-of-\d{5}\.(safetensors|json)"
    rf"|{re.escape(INDEX_NAME)}\.\d+\.tmp|\.tmp[A-Za-z0-9]{{6}}"
)
_KEY = re.compile(r"(?P<name>.*?)(\[(?P<ranges>\w+=\d+:\d+(,\w+=\d+:\d+)*)\])?", re.DOTALL)


# ---------------------------------------------------------------- what a rank holds


def _unwrapped(model: nn.Layer) -> nn.Layer:
    """The model without paddle.DataParallel or fleet's wrappers, in which its parts have other names."""
    if not isinstance(model, nn.Layer):
        raise ValueError(f"model must be a paddle.nn.Layer, got {type_name(model)}")
    while isinstance(model, (paddle.DataParallel, MetaParallelBase)):
        model = model._layers
    return model


def parallel_of(model: nn.Layer, parallel: ParallelContext | None) -> ParallelContext | None:
    for layer in model.sublayers(include_self=True):
        if isinstance(layer, (FusedMoE, MoEBlock)) and layer.parallel is not None:
            parallel = parallel or layer.parallel
            if layer.parallel is not parallel:
                raise ValueError(
                    "parallel must be the context of every layer of model that is split over ranks, and"
                    f" is not that of {layer.full_name()}; use one for all, and pass that or None"
                )
    if parallel is None and paddle.distributed.get_world_size() > 1:
        raise ValueError(
            "parallel must be what init_distributed returned when several ranks hold a model without"
            " FusedMoE layers, got None"
        )
    return parallel


@dataclass(frozen=True)
class _Holding:
    """A tensor of this rank, None where only other ranks hold a part; the part that it is; the whole.

    alone: no other EP rank has it, so this rank writes it though it is the whole. transposed: a weight of
    experts, or what an optimizer keeps for it, that is stored [out, in].
    """

    tensor: paddle.Tensor | None
    part: Part
    whole: Part
    alone: bool = False
    transposed: bool = False

    def __iter__(self) -> Iterator[Any]:
        return iter((self.tensor, self.part, self.whole))

    def whole_in_files(self, transposed: bool) -> Part:
        """The whole, where the files have it `transposed` or not."""
        return self.whole if transposed == self.transposed else self.whole.transposed()


def _holdings(model: nn.Layer) -> dict[str, _Holding]:
    """By name, of parameters and buffers, a shared one once."""
    holdings = {}
    for prefix, layer in model.named_sublayers(include_self=True):
        if isinstance(layer, FusedMoE):
            dense = layer.parts(dense=True)
            for attribute, part in layer.parts().items():
                name, tensor = joined(prefix, attribute), getattr(layer, attribute)
                if tensor is not None and list(tensor.shape) != part.shape:
                    raise ValueError(f"model: {name} should have the shape {part.shape}, got {tensor.shape}")
                transposed = layer.permuted_weights and attribute in EXPERT_WEIGHTS
                holdings[name] = _Holding(tensor, part, dense[attribute], transposed=transposed)
        elif isinstance(layer, MoEBlock):
            here = {id(tensor) for tensor in layer.state_dict().values()}
            for attribute, one in layer.named_slices().items():
                tensor = one.parameter if id(one.parameter) in here else None
                first, end = one.whole.ranges.get("E", (0, 0))
                alone = one.shared_by == "grid" and end - first == 1  # an expert of a list
                holdings[joined(prefix, attribute)] = _Holding(tensor, one.part, one.whole, alone)
    seen = {id(tensor) for tensor, _, _ in holdings.values()}
    for name, tensor in model.state_dict().items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if getattr(tensor, "is_distributed", False) or hasattr(tensor, "shard_group"):
            raise ValueError(
                f"model: {name} is split over ranks, which is supported in FusedMoE layers and in blocks of"
                " accelerate only"
            )
        holdings[name] = _Holding(tensor, *[Part.whole(tensor.shape)] * 2)
    return holdings


def _listed(optimizer: Any) -> list[paddle.optimizer.Optimizer]:
    """None, one or several optimizers as a list."""
    optimizers = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    optimizers = [one for one in optimizers if one is not None]
    for one in optimizers:
        if not isinstance(one, paddle.optimizer.Optimizer):
            raise ValueError(f"optimizer must be a paddle.optimizer.Optimizer, got {type(one).__name__}")
        # LBFGS, and what wraps another one, such as LookAhead.
        if type(one).state_dict is not paddle.optimizer.Optimizer.state_dict or hasattr(
            one, "inner_optimizer"
        ):
            raise ValueError(
                f"optimizer must keep its state in tensors of each parameter, and {type(one).__name__} has"
                " more, which would be lost; keep it with paddle.save, and pass None"
            )
    return optimizers


def _optimizer_holdings(
    optimizers: Sequence[paddle.optimizer.Optimizer],
    holdings: Mapping[str, _Holding],
    tp_rank: int,
    stored: Collection[str] = (),
) -> dict[str, _Holding]:
    """The same for what the optimizers keep, by `parameter.accumulator`.

    stored: parameters of which files have such a state. Frozen ones among them may be trained again later.
    """
    owned = Counter(parameter.name for one in optimizers for parameter in parameters_of(one))
    twice = [name for name, number in owned.items() if number > 1]
    if twice:
        raise ValueError(f"optimizer: each parameter must be in one of them, and {twice} are in more")
    kept: dict[str, _Holding] = {}
    for optimizer in optimizers:
        kept.update(_kept_by(optimizer, holdings, tp_rank, stored))
    return kept


def create_moments(optimizer: paddle.optimizer.Optimizer, parameters: list[paddle.Tensor]) -> None:
    if getattr(optimizer, "helper", "") is None:  # Paddle 2.6 makes it at the first step
        optimizer.helper = LayerHelper(type(optimizer).__name__)
    optimizer._create_accumulators(paddle.static.default_main_program().global_block(), parameters)


def _kept_by(
    optimizer: paddle.optimizer.Optimizer,
    holdings: Mapping[str, _Holding],
    tp_rank: int,
    stored: Collection[str],
) -> dict[str, _Holding]:
    """Creates what the first step would create, so that the state does not depend on which parameters have
    had a gradient yet on which rank.
    """
    name_of = {tensor.name: name for name, (tensor, _, _) in holdings.items() if tensor is not None}
    trained = [
        parameter
        for parameter in parameters_of(optimizer)
        if not parameter.stop_gradient or name_of.get(parameter.name) in stored
    ]
    create_moments(optimizer, trained)
    foreign = [parameter.name for parameter in trained if parameter.name not in name_of]
    if foreign:
        raise ValueError(
            f"optimizer must have parameters of model only, got {foreign}; make it from this model"
        )

    masters = optimizer._master_weights
    kept = {(owner, "master_weight"): master for owner, master in masters.items()}
    owner_of = {**{owner: owner for owner in name_of}, **{one.name: owner for owner, one in masters.items()}}
    for accumulator, by_parameter in optimizer._accumulators.items():
        kept.update({(owner_of[name], accumulator): tensor for name, tensor in by_parameter.items()})
    # One value for the whole parameter, the same on every rank; a parameter may have a single one too.
    single = {
        kind
        for (owner, kind), tensor in kept.items()
        if kind.endswith("_acc") or tensor.size == 1 != holdings[name_of[owner]].tensor.size
    }
    result = {}
    for (owner, kind), tensor in kept.items():
        own = holdings[name_of[owner]]
        kept_alike = replace(own, tensor=tensor)
        if kind in single or tensor.shape != own.tensor.shape:
            if tensor.size != 1:
                raise ValueError(
                    f"optimizer: {kind} of {name_of[owner]} has the shape {tensor.shape}; only that of the"
                    f" parameter, {own.tensor.shape}, and single values can be saved"
                )
            whole = Part.whole(tensor.shape)
            kept_alike = _Holding(tensor, whole, whole, own.alone and own.part.size > 0 and tp_rank == 0)
        result[f"{name_of[owner]}.{kind}"] = kept_alike
    return result


def _schedules(optimizers: Sequence[paddle.optimizer.Optimizer]) -> list[LRScheduler | None]:
    rates = [one._learning_rate for one in optimizers]
    return [rate if isinstance(rate, LRScheduler) else None for rate in rates]


def _one_or_all(values: list[Any]) -> Any:
    """How the index has what belongs to the optimizers: of one alone, or a list."""
    return values[0] if len(values) == 1 else values


# ---------------------------------------------------------------- saving


def save_checkpoint(
    path: str | os.PathLike,
    model: nn.Layer,
    optimizer: paddle.optimizer.Optimizer | Sequence[paddle.optimizer.Optimizer] | None = None,
    *,
    state: Any = None,
    parallel: ParallelContext | None = None,
) -> None:
    """Writes model, optimizer and random number generators to a directory that all ranks see. All ranks call.

    A checkpoint that was in the directory stays whole until the new one is, and is then removed. With data
    parallel ranks, those of the first replica write.

    Args:
        path: the directory, made when missing.
        model: any layer; its FusedMoE layers and the blocks of an accelerated model may be split over ranks,
            everything else is the same on all. paddle.DataParallel and fleet's wrappers are looked through.
        optimizer: its moments, master weights and learning rate, or its scheduler, are saved. Or a list of
            several.
        state: what else the job needs to go on, for example the step and the position in the data; anything
            that JSON can hold. `load_checkpoint` returns it, on every rank that of rank 0.
        parallel: the ranks; None: those of the FusedMoE layers of the model.

    Raises:
        ValueError: path holds an index that save_checkpoint did not write, state is not for JSON, a parameter
            of another layer is split over ranks, a parameter is in two optimizers, or one keeps something of
            another shape or beside its tensors (LBFGS, LookAhead); a tensor is of a dtype that cannot be
            loaded again (fp8, complex128).
        RuntimeError: a rank could not write, or another job is saving there, on every rank, with the reason.
    """
    model = _unwrapped(model)
    path, parallel = Path(path), parallel_of(model, parallel)
    _refuse_foreign_index(path)
    holdings = _holdings(model)
    kept = {"model": holdings}
    index = {"metadata": {"format": FORMAT, "version": VERSION}, "state": state}
    if optimizers := _listed(optimizer):
        kept["optimizer"] = _optimizer_holdings(optimizers, holdings, parallel.tp_rank if parallel else 0)
        index["optimizer"] = _one_or_all([type(one).__name__ for one in optimizers])
        schedules = _schedules(optimizers)
        if any(schedules):
            index["lr_scheduler"] = _one_or_all([one and one.state_dict() for one in schedules])
        index["learning_rate"] = _one_or_all([float(one.get_lr()) for one in optimizers])
    for kind, held in kept.items():
        refuse_dtypes(kind, {name: tensor for name, (tensor, _, _) in held.items()})
    try:
        json.dumps(index)
    except (TypeError, ValueError) as error:
        raise ValueError(f"state and the learning rate scheduler must be fit for JSON: {error}") from error
    own = [name for name, one in holdings.items() if one.transposed]
    rank = 0 if parallel is None else parallel.rank
    (first, names_of_first), *others = exchange(parallel, [rank, own], "starting to save", path)
    if different := [rank for rank, names in others if names != names_of_first]:
        raise ValueError(
            "model: permuted_weights must be the same on all ranks, and is another on the ranks"
            f" {different} than on rank {first}"
        )
    transposed = [name for held in kept.values() for name, one in held.items() if one.transposed]
    if transposed:
        index["transposed"], index["metadata"]["version"] = transposed, 2
    tensors = {kind: pieces_to_write(held, parallel) for kind, held in kept.items()}
    if parallel is None or parallel.dp_rank == 0:
        for kind, held in kept.items():
            for name, one in held.items():
                if one.alone and one.tensor is not None and one.part.size:
                    tensors[kind][part_key(name, one.part, one.whole)] = one.tensor
    write_files(path, tensors, index, parallel, state=_random_state())


def pieces_to_write(
    holdings: Mapping[str, tuple[paddle.Tensor | None, Part, Part]], parallel: ParallelContext | None
) -> dict[str, paddle.Tensor]:
    """By key: the first rank of the grid writes what all hold alike, each rank what it alone holds."""
    first = parallel is None or parallel.ep_rank == parallel.tp_rank == 0
    if parallel is not None and parallel.dp_rank > 0:
        return {}
    return {
        part_key(name, part, whole): tensor
        for name, (tensor, part, whole) in holdings.items()
        if tensor is not None and part.size and not part.copy and (first or part.ranges != whole.ranges)
    }


def part_key(name: str, part: Part, whole: Part) -> str:
    """The key of a part of a tensor: its name, and the ranges of the dimensions that are cut."""
    cut = [dim for dim, span in part.ranges.items() if span != whole.ranges[dim]]
    ranges = ",".join(f"{dim}={part.ranges[dim][0]}:{part.ranges[dim][1]}" for dim in cut)
    return f"{name}[{ranges}]" if cut else name


def write_files(
    path: Path,
    tensors: Mapping[str, Mapping[str, paddle.Tensor]],
    index: Mapping[str, Any],
    parallel: ParallelContext | None,
    *,
    state: Any = None,
    tagged: bool = True,
    file_format: str = "paddle",
) -> None:
    """Writes what each rank has, {kind: {key: tensor}}, and then an index of it all; all ranks call it.

    Args:
        index: its further entries, the same on every rank.
        state: of this rank; anything that JSON can hold, or None.
        tagged: the names of the files belong to this save alone; else none of them may exist.
        file_format: in the metadata of the files: the library that wrote them, "pt" for most readers.

    Raises:
        RuntimeError: a rank could not write, on every rank.
    """
    rank = 0 if parallel is None else parallel.rank
    everyone = exchange(parallel, [rank, secrets.token_hex(4)], "starting to save", path)
    number, tag = [other for other, _ in everyone].index(rank), f"-{everyone[0][1]}" if tagged else ""

    def name_of(kind: str, suffix: str) -> Path:
        return path / f"{kind}{tag}-{number + 1:05}-of-{len(everyone):05}.{suffix}"

    written, failure = [], None
    before = _identity(path / INDEX_NAME)
    with contextlib.ExitStack() as lock:
        try:
            with at_files(parallel):
                path.mkdir(parents=True, exist_ok=True)
                if number == 0:
                    lock.enter_context(_only_save(path))
                for kind, by_key in tensors.items():
                    if by_key:
                        name_of(kind, "safetensors").touch(exist_ok=False)
                        written.append(name_of(kind, "safetensors"))
                        _write_tensors(written[-1], by_key, file_format)
                if state is not None:
                    written.append(name_of("state", "json"))
                    _write_text(written[-1], json.dumps(state))
        except Exception as error:  # whatever it is, the other ranks wait for this one
            failure = f"{type(error).__name__}: {error}"
        own = [[file.name for file in written], failure]
        reports = exchange(parallel, own, "writing the files of", path)
        failures = [f"rank {other}: {why}" for (other, _), (_, why) in zip(everyone, reports) if why]
        if not failures and number == 0:
            temporary = path / f"{INDEX_NAME}.{os.getpid()}.tmp"
            written.append(temporary)
            try:
                with at_files(parallel):
                    _commit(path, [name for names, _ in reports for name in names], tensors, index, temporary)
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
    reports = exchange(parallel, failure, "writing the index of", path)
    failures += [f"rank {other}: {why}" for (other, _), why in zip(everyone, reports) if why]
    if failures:
        for file in written:
            with contextlib.suppress(OSError):
                file.unlink()
        unchanged = _identity(path / INDEX_NAME) == before
        there = "what was there before is unchanged" if unchanged else "another job has saved there meanwhile"
        raise RuntimeError(f"{path} was not saved; {there}. {'; '.join(dict.fromkeys(failures))}")


def _write_tensors(file: Path, tensors: Mapping[str, paddle.Tensor], file_format: str) -> None:
    """Fills a file that is there and empty."""
    mode = file.stat().st_mode  # safetensors replaces the file by one for its owner alone
    # contiguous() would change a strided tensor itself, and cut it off what it is a view of.
    dense = {
        key: tensor.detach() if tensor.is_contiguous() else tensor.detach().clone()
        for key, tensor in tensors.items()
    }
    save_file(dense, str(file), metadata={"format": file_format})
    file.chmod(mode)
    _flush(file)


def _identity(file: Path) -> list[int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return [found.st_ino, found.st_mtime_ns]


@contextlib.contextmanager
def _only_save(path: Path) -> Iterator[None]:
    """Refuses a second save to the directory, whose files this one would remove. Ends with the process."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError("another job is saving there now; give each job a directory of its own") from None
        except OSError:  # some network file systems cannot lock a directory
            pass
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing leaves it to processes forked meanwhile
        os.close(descriptor)


def _refuse_foreign_index(path: Path) -> None:
    try:
        found = json.loads((path / INDEX_NAME).read_text())["metadata"]["format"]
    except (FileNotFoundError, NotADirectoryError):
        return
    except (ValueError, KeyError, TypeError):
        found = None
    if found != FORMAT:
        raise ValueError(
            f"path must be a new directory, or hold a checkpoint to replace; {path} has another {INDEX_NAME}"
        )


def _commit(
    path: Path, files: list[str], kinds: Mapping[str, Any], index: Mapping[str, Any], temporary: Path
) -> None:
    """Writes the index of what lies in `files`, and removes the files of earlier saves."""
    maps: dict[str, dict[str, str]] = {kind: {} for kind in kinds}
    total = 0
    for name in files:
        if name.endswith(".safetensors"):
            with safe_open(str(path / name), framework="np") as opened:
                maps[name.partition("-")[0]].update(dict.fromkeys(opened.keys(), name))
            total += (path / name).stat().st_size
    states = [name for name in files if name.endswith(".json")]
    content = {
        "metadata": {**index["metadata"], "total_size": total},
        "weight_map": maps.pop("model"),
        **{f"{kind}_map": by_key for kind, by_key in maps.items()},
        **({"state_files": states} if states else {}),
        **{key: value for key, value in index.items() if key != "metadata"},
    }
    _write_text(temporary, json.dumps(content, indent=1))
    temporary.replace(path / INDEX_NAME)
    # The save is done: an error from here on must not undo it. What stays is removed by the next save.
    with contextlib.suppress(OSError):  # some network file systems cannot flush a directory
        _flush(path)
    with contextlib.suppress(OSError):
        for file in path.iterdir():
            if _OWN_FILE.fullmatch(file.name) and file.name not in files:
                with contextlib.suppress(OSError):
                    file.unlink()


def _write_text(file: Path, text: str) -> None:
    file.write_text(text)
    _flush(file)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- loading


def load_checkpoint(
    path: str | os.PathLike,
    model: nn.Layer,
    optimizer: paddle.optimizer.Optimizer | Sequence[paddle.optimizer.Optimizer] | None = None,
    *,
    parallel: ParallelContext | None = None,
    progress: bool = False,
) -> Any:
    """Fills the model, and the optimizer if one is given, from what `save_checkpoint` wrote. All ranks call.

    The grid may differ from that of the save. Each rank reads its slices only, and every value arrives bit by
    bit: names, shapes and dtypes must be those of the model.

    With an optimizer the job goes on where it was: its learning rate, or the scheduler, is set, and so are
    the random number generators of Paddle, NumPy and Python, if as many ranks load as have saved (else a
    warning).

    Args:
        path: the directory. model, optimizer, parallel: as in save_checkpoint.
        progress: show a bar on the first rank, outside a terminal lines.

    Returns:
        `state` of save_checkpoint.

    Raises:
        CheckpointError: a ValueError, on every rank, that lists file, key, what was expected and what found,
            for all that is missing, unmatched, doubled, truncated, of another shape or dtype. Nothing was
            assigned.
        RuntimeError: a rank could not read on, after some values had been assigned.
    """
    model = _unwrapped(model)
    path, parallel = Path(path), parallel_of(model, parallel)
    holdings = _holdings(model)
    files, hints = TensorFiles(path), []
    kept = [(files, holdings)]
    if optimizers := _listed(optimizer):
        files = TensorFiles(path, "optimizer_map")
        stored = {_owner(_KEY.fullmatch(key)["name"]) for key in files.keys()}
        held = _optimizer_holdings(optimizers, holdings, parallel.tp_rank if parallel else 0, stored)
        kept.append((files, held))
        if not files.problems:
            hints = _frozen_on_one_side(holdings, set(map(_owner, held)), stored)
    elsewhere = [name for name, (one, _, _) in holdings.items() if one is None]
    plans = [_plan(path, files, held, elsewhere) for files, held in kept]
    index = files.index
    problems = _check_index(path, index, optimizers) if index or not files.problems else []
    random_state = None
    if optimizers:
        raise_together(path, problems, parallel)  # the state of another optimizer has other names throughout
        # A rank that does not see the index must not go on alone.
        raise_together(path, [*hints, *(one for plan in plans for one in plan.problems)], parallel)
        random_state, problems = _read_random_state(path, index, parallel)
    execute(plans, path, parallel, problems=problems, progress=f"loading {path}" if progress else None)
    if optimizers:
        for schedule, stored in zip(_schedules(optimizers), _stored_schedules(index, len(optimizers))):
            if schedule is not None:
                schedule.set_state_dict(stored)
        rates = index.get("learning_rate")  # None in files of earlier versions
        for one, rate in zip(optimizers, rates if isinstance(rates, list) else [rates] * len(optimizers)):
            if rate is not None and not isinstance(one._learning_rate, LRScheduler):
                one.set_lr(rate)
        if random_state is None:
            warnings.warn(
                f"{path} was saved by {len(index['state_files'])} ranks: random generators were left alone",
                stacklevel=2,
            )
        else:
            random_state()
    return index.get("state")


def _owner(name: str) -> str:
    """The parameter of a `parameter.accumulator`."""
    return name.rpartition(".")[0]


def _frozen_on_one_side(
    holdings: Mapping[str, _Holding], here: Collection[str], stored: Collection[str]
) -> list[Problem]:
    """What to do where only the files, or only the optimizers, have a state of a parameter of the model."""
    problems = []
    for name, (tensor, _, _) in holdings.items():
        if name in here and name not in stored:
            expected = "what an optimizer keeps for it (to begin anew, set its stop_gradient while you load)"
            problems.append(Problem(INDEX_NAME, name, expected, "nothing: it was not trained"))
        elif name in stored and name not in here and tensor is not None:
            expected = "it in an optimizer (it may be frozen), as when this was saved"
            problems.append(Problem(INDEX_NAME, name, expected, "it in none"))
    return problems


def _stored_schedules(index: Mapping[str, Any], number: int) -> list[Any]:
    stored = index.get("lr_scheduler")
    return [stored] if number == 1 else stored or [None] * number


def _check_index(path: Path, index: Mapping[str, Any], optimizers: Sequence[Any]) -> list[Problem]:
    def differs(key: str, expected: Any, found: Any) -> list[Problem]:
        return [] if found == expected else [Problem(str(path / INDEX_NAME), key, str(expected), str(found))]

    metadata = index.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    problems = differs("metadata.format", FORMAT, metadata.get("format"))
    if not problems and metadata.get("version") not in VERSIONS:
        problems = differs("metadata.version", " or ".join(map(str, VERSIONS)), metadata.get("version"))
    transposed = index.get("transposed", [])
    if not problems and not isinstance(transposed, list):
        problems = differs("transposed", "a list of names", transposed)
    if problems or not optimizers:
        return problems
    problems = differs(
        "optimizer", _one_or_all([type(one).__name__ for one in optimizers]), index.get("optimizer")
    )
    if not problems and not isinstance(index.get("state_files"), list):
        problems = [Problem(str(path / INDEX_NAME), "state_files", "a list of files", "none")]
    if problems:
        return problems
    for schedule, stored in zip(_schedules(optimizers), _stored_schedules(index, len(optimizers))):
        problems += differs("lr_scheduler", _there(schedule is not None), _there(stored is not None))
    return problems


def _there(is_there: bool) -> str:
    return "a learning rate scheduler" if is_there else "none"


def _plan(
    path: Path,
    files: TensorFiles,
    holdings: Mapping[str, _Holding],
    elsewhere: list[str],
) -> Plan:
    """elsewhere: parameters of which this rank holds nothing, and so knows no optimizer state either."""
    transposed = files.index.get("transposed", [])
    transposed = transposed if isinstance(transposed, list) else []  # _check_index() says so
    wholes = {name: one.whole_in_files(name in transposed) for name, one in holdings.items()}
    sources, problems = stored_parts(files, wholes)
    targets = {
        name: Target(tensor, part) for name, (tensor, part, _) in holdings.items() if tensor is not None
    }
    skipped = tuple(f"{name}." for name in elsewhere)
    return Plan(
        files,
        targets,
        sources,
        path=path,
        must_match=lambda key: not key.startswith(skipped),
        problems=problems,
    )


def stored_parts(files: TensorFiles, wholes: Mapping[str, Part]) -> tuple[list[Source], list[Problem]]:
    """What the files of a checkpoint hold of the tensors `wholes`, by the keys."""
    sources, problems = [], []
    for key in files.keys():
        matched = _KEY.fullmatch(key)
        name, cuts = matched["name"], re.findall(r"(\w+)=(\d+):(\d+)", matched["ranges"] or "")
        if name not in wholes:
            continue
        whole = wholes[name]
        outside = [dim for dim, _, stop in cuts if int(stop) > whole.ranges.get(dim, (0, 0))[1]]
        if outside:
            expected = ", ".join(f"{dim} up to {whole.ranges.get(dim, (0, 0))[1]}" for dim in outside)
            problems.append(Problem(files[key].file.name, key, expected, matched["ranges"]))
        ranges = {dim: (int(start), int(stop)) for dim, start, stop in cuts if dim in whole.ranges}
        sources.append(Source(key, name, Part(whole.pattern, {**whole.ranges, **ranges})))
    return sources, problems


# ---------------------------------------------------------------- random number generators


def _random_state() -> dict[str, Any]:
    """Of Paddle on the current device, NumPy and Python, in what JSON can hold."""
    paddle_states = []
    for generator in paddle.get_rng_state():
        *numbers, engine = generator.__getstate__()  # device, seed, offset, and the engine's text as bytes
        paddle_states.append([*numbers, bytes(engine).decode()])
    name, keys, *rest = np.random.get_state()
    version, words, gauss = random.getstate()
    return {"paddle": paddle_states, "numpy": [name, keys.tolist(), *rest], "python": [version, words, gauss]}


def _setter_of_random_state(state: Mapping[str, Any]) -> Callable[[], None]:
    """Sets it when called. Whatever is wrong with it is raised here."""
    generators = []
    for *numbers, engine in state["paddle"]:
        generators.append(GeneratorState.__new__(GeneratorState))
        generators[-1].__setstate__((*numbers, list(engine.encode())))
        if bytes(generators[-1].__getstate__()[-1]).decode() != engine:
            raise ValueError("the engine of a generator of Paddle is not what it writes")
    if len(generators) != len(paddle.get_rng_state()):
        raise ValueError(f"{len(generators)} generators of Paddle for {len(paddle.get_rng_state())}")
    name, keys, *rest = state["numpy"]
    numpy_state = (name, np.array(keys, np.uint32), *rest)
    np.random.RandomState().set_state(numpy_state)
    version, words, gauss = state["python"]
    python_state = (version, tuple(words), None if gauss is None else float(gauss))
    random.Random().setstate(python_state)

    def apply() -> None:
        paddle.set_rng_state(generators)
        np.random.set_state(numpy_state)
        random.setstate(python_state)

    return apply


def _read_random_state(
    path: Path, index: Mapping[str, Any], parallel: ParallelContext | None
) -> tuple[Callable[[], None] | None, list[Problem]]:
    """What sets that of this rank; None if another number of ranks saved."""
    rank = 0 if parallel is None else parallel.rank
    ranks = exchange(parallel, rank, "loading", path)
    names = index["state_files"]
    if len(names) != len(ranks):
        return None, []
    name = names[ranks.index(rank)]
    try:
        return _setter_of_random_state(json.loads((path / name).read_text())), []
    except Exception as error:  # whatever the file holds, no rank may end here without the others
        return None, [
            Problem(name, "*", "random number generators in JSON", f"{type(error).__name__}: {error}")
        ]
