"""Parts of tensors in safetensors files: which file holds what, and reading no more than a rank needs.

A dense tensor has named dimensions. What a rank holds of it, and what each tensor of a file holds of it, is a
`Part`: the order of the dimensions and a range of each. Loading intersects the parts that files have with
those that the rank wants. Nothing is assigned before every key, shape and dtype has been checked, on every
rank.

The dimensions of FusedMoE: E experts, H hidden, G the halves gate and up (0 and 1), I intermediate columns,
S those of the shared expert.

A quantised tensor is found under the name that it has decoded, see EncodedTensor.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, ClassVar

import numpy as np
import paddle
from safetensors import SafetensorError, safe_open

from paddle_moe._options import dtype_name, one_of
from paddle_moe.console import progress_bar
from paddle_moe.params import Part

if TYPE_CHECKING:
    from paddle_moe.distributed import ParallelContext

INDEX_NAME = "model.safetensors.index.json"

_DTYPE_NAMES = {  # as safetensors writes them: as Paddle does
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
_FLOATS = ("float64", "float32", "bfloat16", "float16")
_CASTS = ("lossless", "any", "none")
_SHOWN_PROBLEMS = 40
_SENT_PROBLEMS = 4000  # by all ranks together, about a megabyte: the watchdogs cannot pass on many of these


def joined(prefix: str, name: str) -> str:
    """The name, in a model or a file, of what has `name` in the layer `prefix`; "": all is that layer."""
    return f"{prefix}.{name}" if prefix else name


def refuse_dtypes(argument: str, tensors: Mapping[str, paddle.Tensor | None]) -> None:
    """Raises a ValueError that names the tensors that could not be loaded again."""
    found = {name: dtype_name(tensor.dtype) for name, tensor in tensors.items() if tensor is not None}
    odd = [f"{name} is {dtype}" for name, dtype in found.items() if dtype not in _DTYPE_NAMES.values()]
    if odd:
        raise ValueError(
            f"{argument}: tensors must be in one of {', '.join(_DTYPE_NAMES.values())}, and"
            f" {', '.join(odd)}; convert them, or register buffers with persistable=False"
        )


# ---------------------------------------------------------------- boxes


def _cuts(part: Part, box: Mapping[str, tuple[int, int]]) -> list[list[slice]]:
    """For each dimension of the array of `part`, the runs in it that hold `box`, in order."""
    cuts = []
    for group in part.groups:
        runs = [(0, 1)]
        for name in group:
            (start, stop), offset, length = box[name], part.ranges[name][0], part.length(name)
            if stop - start == length:
                runs = [(first * length, last * length) for first, last in runs]
            else:
                outer = [index for first, last in runs for index in range(first, last)]
                runs = [(index * length + start - offset, index * length + stop - offset) for index in outer]
        cuts.append([slice(*run) for run in runs])
    return cuts


def _read_box(
    stored: FileTensor | EncodedTensor, part: Part, box: Mapping[str, tuple[int, int]], dtype: str
) -> tuple[np.ndarray, int]:
    """The elements of `box` from a tensor that holds `part`, in a dimension for each name of the pattern.

    And how many bytes of files they were in.
    """
    bytes_read = 0

    def read(chosen: list[slice], rest: list[list[slice]]) -> np.ndarray:
        if not rest:
            nonlocal bytes_read
            values, num_bytes = stored.read(chosen)
            bytes_read += num_bytes
            return values
        if len(rest[0]) == 1:
            return read([*chosen, rest[0][0]], rest[1:])
        return np.concatenate([read([*chosen, run], rest[1:]) for run in rest[0]], axis=len(chosen))

    values = read([], _cuts(part, box))
    if stored.read_dtype != dtype:
        values = paddle.to_tensor(np.array(values), place=paddle.CPUPlace()).astype(dtype).numpy()
    return values.reshape([box[name][1] - box[name][0] for name in part.names]), bytes_read


def _write_box(
    array: np.ndarray, part: Part, box: Mapping[str, tuple[int, int]], values: np.ndarray, order: list[str]
) -> None:
    """Puts `values`, whose dimensions are named by `order`, where `box` lies in the array of `part`."""
    names = part.names
    place = {name: index for index, name in enumerate(names)}
    values = values.transpose(sorted(range(len(order)), key=lambda axis: place.get(order[axis], -1)))
    unfolded = array.reshape([part.length(name) for name in names])  # a view
    start = {name: part.ranges[name][0] for name in names}
    inside = tuple(slice(box[name][0] - start[name], box[name][1] - start[name]) for name in names)
    unfolded[inside] = values.reshape(unfolded[inside].shape)  # dimensions that only one of them has are 1


# ---------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    """What is wrong with one key of one file."""

    file: str
    key: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.file}: {self.key}: expected {self.expected}, found {self.found}"


class CheckpointError(ValueError):
    """Files do not fit what is to be loaded from them. Nothing was assigned, on any rank.

    Attributes:
        problems: one Problem for each key, of all ranks; of several ranks at most some thousands.
    """

    def __init__(self, path: Any, problems: Sequence[Problem], more: bool = False):
        self.problems = list(problems)
        self._arguments = path, self.problems, more
        lines = [f"  {problem}" for problem in self.problems[:_SHOWN_PROBLEMS]]
        if len(self.problems) > _SHOWN_PROBLEMS:
            lines.append(f"  and {len(self.problems) - _SHOWN_PROBLEMS} more")
        number = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        number += " and more" if more else ""
        super().__init__("\n".join([f"{path} was not loaded, {number}:", *lines]))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments


def exchange(parallel: ParallelContext | None, value: Any, what: str, path: Any) -> list[Any]:
    """The values of all ranks, by rank; any that JSON can hold. The path may differ between hosts."""
    return [value] if parallel is None else parallel.exchange(value, what, str(path))


def is_first(parallel: ParallelContext | None) -> bool:
    """The rank that does what one has to do. That of a context of from_groups need not be rank 0."""
    return parallel is None or parallel.dp_rank == parallel.ep_rank == parallel.tp_rank == 0


def at_files(parallel: ParallelContext | None) -> contextlib.AbstractContextManager[None]:
    """Around what one rank may take much longer for than another: see ParallelContext.files."""
    return contextlib.nullcontext() if parallel is None else parallel.files()


def raise_together(path: Any, problems: Sequence[Problem], parallel: ParallelContext | None) -> None:
    """Raises a CheckpointError on all ranks if there is a problem on any of them."""
    limit = len(problems) if parallel is None else max(1, _SENT_PROBLEMS // parallel.world_size)
    sent = [[one.file, one.key, one.expected, one.found] for one in problems[:limit]]
    everyone = exchange(parallel, [sent, len(problems) > limit], "checking", path)
    merged = {Problem(*fields): None for one, _ in everyone for fields in one}
    if merged:
        raise CheckpointError(path, list(merged), any(more for _, more in everyone))


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a file, mapped into memory: only the pages of what is copied out of it are read.

    Of safetensors' own slices, those for NumPy lack bfloat16, and those for Paddle read the whole file.
    """

    file: Path
    dtype: str  # as safetensors writes it
    shape: list[int]
    content: np.ndarray  # its bytes

    @property
    def array(self) -> np.ndarray:
        """Of NumPy's dtype of the same name; bfloat16 as uint16."""
        name = self.read_dtype
        return self.content.view("uint16" if name == "bfloat16" else name).reshape(self.shape)

    @property
    def read_dtype(self) -> str:
        return _DTYPE_NAMES[self.dtype]

    def read(self, cut: Sequence[slice]) -> tuple[np.ndarray, int]:
        """The elements in a slice of each dimension, and how many bytes of files they are."""
        values = self.array[tuple(cut)]
        return values, values.nbytes


_BYTE = np.arange(256)
_E8M0 = np.where(_BYTE < 255, np.ldexp(1.0, _BYTE - 127), np.nan).astype(np.float32)


def _e2m1() -> np.ndarray:
    """The two values of each byte, [256, 2]; the first has the low bits."""
    positive = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    return np.concatenate([positive, -positive])[np.stack([_BYTE & 15, _BYTE >> 4], axis=1)]


def _e4m3() -> np.ndarray:
    """The value of each byte, [256, 1]; there are no infinities."""
    exponent, mantissa = _BYTE >> 3 & 15, _BYTE & 7
    values = np.ldexp(np.where(exponent, 8.0 + mantissa, mantissa), np.maximum(exponent, 1) - 10)
    values = np.where(exponent * 8 + mantissa == 127, np.nan, values)
    return np.where(_BYTE < 128, values, -values).astype(np.float32)[:, None]


@dataclass(frozen=True)
class EncodedTensor:
    """Matrices [out, in] that files have as codes, and a scale for each block of them; read decoded.

    Attributes:
        key: the name of the decoded tensor.
        codes, scales: scales is None where files lack it.
        name: of the encoding.
        decoded: the dtype, of Paddle, that holds every decoded value.
        endings: what the keys of codes and scales have after `key`.
        scales_dtypes: those that scales may have.
        values: of a byte of codes, [256, values in a byte].
        block: rows and columns that share a scale.
    """

    key: str
    codes: FileTensor
    scales: FileTensor | None

    name: ClassVar[str]
    decoded: ClassVar[str]
    endings: ClassVar[tuple[str, str]]
    scales_dtypes: ClassVar[tuple[str, ...]]
    values: ClassVar[np.ndarray]
    block: ClassVar[tuple[int, int]]
    read_dtype: ClassVar[str] = "float32"

    @property
    def file(self) -> Path:
        return self.codes.file

    @property
    def keys(self) -> list[str]:
        return [self.key + ending for ending in self.endings]

    @property
    def shape(self) -> list[int]:
        return self._codes_shape

    @property
    def _codes_shape(self) -> list[int]:
        """[..., out, in] of the codes."""
        return self.codes.shape

    def flaw(self) -> Problem | None:
        """Why it cannot be decoded."""
        *outer, rows, columns = self._codes_shape
        blocks = [*outer, *(-(-size // side) for size, side in zip((rows, columns), self.block))]
        codes_key, scales_key = self.keys
        wanted = f"{' or '.join(self.scales_dtypes)} {blocks}, the scales of {codes_key}"
        if self.scales is None:
            return Problem(self.file.name, scales_key, wanted, "nothing")
        dtype, shape = self.scales.dtype, self.scales.shape
        if dtype not in self.scales_dtypes or shape != blocks:
            return Problem(self.scales.file.name, scales_key, wanted, f"{dtype} {shape}")
        return None

    def read(self, cut: Sequence[slice]) -> tuple[np.ndarray, int]:
        """As that of FileTensor, in float32: the bytes with these codes, and the scales of their blocks."""
        *outer, rows, columns = cut
        in_byte = self.values.shape[1]
        first, skipped = divmod(columns.start, in_byte)
        codes = self.codes.content.reshape([*self._codes_shape[:-1], -1])
        codes = codes[(*outer, rows, slice(first, -(-columns.stop // in_byte)))]
        values = self.values.take(codes, axis=0).reshape([*codes.shape[:-1], -1])
        values = values[..., skipped : skipped + columns.stop - columns.start]
        cells = [slice(one.start // side, -(-one.stop // side)) for one, side in zip(cut[-2:], self.block)]
        scales = self.scales.array[(*outer, *cells)]
        bytes_read = codes.nbytes + scales.nbytes
        if self.scales.dtype == "U8":
            scales = _E8M0[scales]
        elif self.scales.dtype == "BF16":
            scales = (scales.astype(np.uint32) << 16).view(np.float32)
        for axis, one, cell, side in zip((-2, -1), cut[-2:], cells, self.block):
            scales = scales.take(np.arange(one.start, one.stop) // side - cell.start, axis)
        with np.errstate(over="ignore", invalid="ignore"):
            values *= scales
        return values, bytes_read


class Fp8Tensor(EncodedTensor):
    """float8 e4m3 [out, in], and what each block of 128 x 128 is multiplied by, in float32.

    DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), section 3.3.
    """

    name, decoded, endings = "fp8 with scales", "float32", ("", "_scale_inv")
    scales_dtypes, values, block = ("F32", "BF16"), _e4m3(), (128, 128)

    def flaw(self) -> Problem | None:
        if len(self.shape) != 2:
            return Problem(self.file.name, self.key, "a matrix in F8_E4M3", f"{self.shape}")
        return super().flaw()


class Mxfp4Tensor(EncodedTensor):
    """float4 e2m1 with a power of two for 32 of a row; the decoded tensor is [E, in, out].

    Codes are uint8 [E, out, in / 32, 16], scales uint8 [E, out, in / 32] with a bias of 127. bfloat16 holds
    every value: Rouhani et al., "Microscaling Data Formats for Deep Learning" (2023).
    """

    name, decoded, endings = "MXFP4", "bfloat16", ("_blocks", "_scales")
    scales_dtypes, values, block = ("U8",), _e2m1(), (1, 32)

    @property
    def _codes_shape(self) -> list[int]:
        return [*self.codes.shape[:2], *(32 * blocks for blocks in self.codes.shape[2:3])]

    @property
    def shape(self) -> list[int]:
        return self._codes_shape[:1] + self._codes_shape[:0:-1]

    def flaw(self) -> Problem | None:
        found = self.codes
        if found.dtype != "U8" or len(found.shape) != 4 or found.shape[-1] != 16:
            wanted = "U8 [E, out, in / 32, 16]"
            return Problem(self.file.name, self.keys[0], wanted, f"{found.dtype} {found.shape}")
        return super().flaw()

    def read(self, cut: Sequence[slice]) -> tuple[np.ndarray, int]:
        experts, columns, rows = cut
        values, bytes_read = super().read([experts, rows, columns])
        return values.swapaxes(1, 2), bytes_read


def _map_file(file: Path) -> dict[str, FileTensor]:
    """The tensors of a safetensors file by key.

    Raises:
        SafetensorError, OSError: it is not one, or not whole.
    """
    with safe_open(str(file), framework="np"):  # checks the header, and the size of the file against it
        content = np.memmap(file, np.uint8, "r")
    data = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:data].tobytes())
    header.pop("__metadata__", None)
    return {
        key: FileTensor(file, entry["dtype"], entry["shape"], content[data:][slice(*entry["data_offsets"])])
        for key, entry in header.items()
    }


class TensorFiles:
    """The tensors in the safetensors files of a directory, by key; reads headers only.

    Attributes:
        problems: what is wrong with the files themselves: missing, truncated, a key in two of them.
        index: the content of the index file, {} if there is none.
    """

    def __init__(self, path: str | Path, map_name: str = "weight_map"):
        """path: a directory with an index file or with *.safetensors, an index file, or one safetensors file.

        map_name: the entry of the index that names the file of each key.
        """
        path = Path(path)
        self.problems: list[Problem] = []
        self.index: dict[str, Any] = {}
        self._tensors: dict[str, FileTensor] = {}
        if path.is_dir() and (path / INDEX_NAME).exists():
            path = path / INDEX_NAME
        if not path.exists():
            self.problems.append(
                Problem(str(path), "*", "a directory, an index or a safetensors file", "nothing")
            )
        elif path.suffix == ".json":
            self._read_index(path, map_name)
        elif path.is_dir():
            files = sorted(path.glob("*.safetensors"))
            if not files:
                self.problems.append(Problem(str(path), "*", f"{INDEX_NAME} or *.safetensors", "neither"))
            self._open(files)
        else:
            self._open([path])

    def _read_index(self, path: Path, map_name: str) -> None:
        try:
            index = json.loads(path.read_text())
            file_of = {str(key): str(name) for key, name in index.get(map_name, {}).items()}
            self.index = index
        except (OSError, ValueError, AttributeError) as error:
            self.problems.append(Problem(path.name, "*", "an index in JSON", _describe(error)))
            return
        self._open([path.parent / name for name in sorted(set(file_of.values()))])
        unreadable = {problem.file for problem in self.problems}
        for key, name in file_of.items():
            found = self._tensors.get(key)
            if found is None and name not in unreadable:
                expected = f"the tensor that {path.name} places there"
                self.problems.append(Problem(name, key, expected, "nothing"))
            elif found is not None and found.file.name != name:
                self.problems.append(
                    Problem(name, key, "the tensor in this file", f"it in {found.file.name}")
                )

    def _open(self, files: Iterable[Path]) -> None:
        for file in files:
            try:
                tensors = _map_file(file)
            except (SafetensorError, OSError) as error:
                self.problems.append(Problem(file.name, "*", "a whole safetensors file", _describe(error)))
                continue
            for key in tensors.keys() & self._tensors.keys():
                other = self._tensors[key].file.name
                self.problems.append(Problem(file.name, key, "it once", f"it in {other} too"))
            self._tensors.update(tensors)

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def __getitem__(self, key: str) -> FileTensor:
        return self._tensors[key]

    def keys(self) -> Collection[str]:
        return self._tensors.keys()

    def find(self, key: str) -> FileTensor | EncodedTensor | None:
        """The tensor `key`, or what is decoded into it."""
        found = self._tensors.get(key)
        kind = Mxfp4Tensor if found is None else Fp8Tensor if found.dtype == "F8_E4M3" else None
        if kind is None or (codes := self._tensors.get(key + kind.endings[0])) is None:
            return found
        return kind(key, codes, self._tensors.get(key + kind.endings[1]))


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


# ---------------------------------------------------------------- loading


@dataclass(frozen=True)
class Target:
    """A tensor to fill, and which part of the dense tensor it is."""

    tensor: paddle.Tensor
    part: Part


@dataclass(frozen=True)
class Source:
    """A tensor of the files: its key, the target that it belongs to, and the part that it holds of it."""

    key: str
    target: str
    part: Part


@dataclass
class LoadReport:
    """What a load did on this rank.

    Attributes:
        loaded: keys of the files that were asked for, whether or not this rank needed any part of them.
        unmatched: keys of the files that nothing asked for.
        bytes_read: tensor data that this rank read, as it is stored.
    """

    loaded: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    bytes_read: int = 0


class Plan:
    """Which boxes of which files go to which targets, and what is wrong with that; nothing is read yet.

    Attributes:
        problems: of this rank.
        unmatched: keys of the files that no source names.
    """

    def __init__(
        self,
        files: TensorFiles,
        targets: Mapping[str, Target],
        sources: Sequence[Source],
        *,
        path: str | Path,
        must_match: Callable[[str], bool] = lambda key: True,
        cast: str = "none",
        problems: Sequence[Problem] = (),
    ):
        """
        Args:
            files: the same on every rank.
            targets: of this rank, by name. One without elements needs no source.
            sources: what the files should have, in all; the same on every rank. Those of one target must
                cover it, and must not overlap.
            path: for messages.
            must_match: of the keys that no source names, those for which it is true are a problem.
            cast: "none": dtypes must be equal. "lossless": bfloat16 and float16 may also become float32, and
                all of these float64. "any": floating-point dtypes may become one another, with rounding.
            problems: found by the caller before.

        Raises:
            ValueError: cast is none of these.
        """
        one_of(*_CASTS)("cast", cast)
        self.files, self.targets = files, targets
        self.problems = [*files.problems, *problems]
        self.boxes: dict[str, list[tuple[Source, dict[str, tuple[int, int]]]]] = {
            name: [] for name in targets
        }
        self.loaded: list[str] = []
        troubled, missing = set(), []
        for source in sources:
            found = files.find(source.key)
            if found is None:
                missing.append(source)
                continue
            self.loaded += found.keys if isinstance(found, EncodedTensor) else [source.key]
            target = targets.get(source.target)
            problem = _check_source(found, source, target, cast)
            if problem:
                self.problems.append(problem)
                troubled.add(source.target)
            elif target is not None and (box := source.part.overlap(target.part)) is not None:
                self.boxes[source.target].append((source, box))
        self.unmatched = sorted(files.keys() - set(self.loaded))
        for key in filter(must_match, self.unmatched):
            found = files[key]
            text = f"a tensor {found.shape} in {found.dtype}"
            self.problems.append(Problem(found.file.name, key, "no tensor of this name", text))
        if files.problems:
            return  # what they hold is not known, so neither is what is missing
        for source in missing:
            self.problems.append(Problem(str(path), source.key, f"a tensor {source.part.shape}", "nothing"))
        troubled.update(source.target for source in missing)
        for name, target in targets.items():
            if name not in troubled:
                self.problems += _check_cover(
                    str(path), name, target.part, [one for one, _ in self.boxes[name]]
                )

    def num_bytes(self, name: str) -> int:
        return self.targets[name].tensor.element_size() * self.targets[name].part.size


def execute(
    plans: Sequence[Plan],
    path: str | Path,
    parallel: ParallelContext | None = None,
    *,
    problems: Sequence[Problem] = (),
    progress: str | None = None,
) -> LoadReport:
    """Fills the targets of all plans, unless a rank has a problem. Every rank of `parallel` calls it.

    Args:
        path: for messages.
        problems: of this rank, beside those of the plans.
        progress: the text of a progress bar of the first rank, None: no bar.

    Raises:
        CheckpointError: on every rank, with the problems of all ranks; nothing was assigned.
        RuntimeError: a rank could not read on, after some values had been assigned; on every rank of a job of
            `init_distributed`.
    """
    raise_together(path, [*problems, *(one for plan in plans for one in plan.problems)], parallel)
    report = LoadReport()
    total = sum(plan.num_bytes(name) for plan in plans for name in plan.targets)
    if not is_first(parallel):
        progress = None
    failure, cause = None, None
    try:
        with at_files(parallel), progress_bar(progress, total, "bytes") as advance:
            for plan in plans:
                report.loaded += plan.loaded
                report.unmatched += plan.unmatched
                for name, target in plan.targets.items():
                    report.bytes_read += _fill(plan.files, target, plan.boxes[name])
                    advance(plan.num_bytes(name))
    except Exception as error:
        failure, cause = f"{type(error).__name__}: {error}", error
    rank = 0 if parallel is None else parallel.rank
    reasons = {rank: failure}
    if parallel is not None and parallel.is_watched:  # else the first ones would not wait for the last
        reasons = dict(exchange(parallel, [rank, failure], "reading", path))
    if failures := [f"rank {rank}: {reason}" for rank, reason in reasons.items() if reason]:
        raise RuntimeError(f"{path} was loaded in part; {'; '.join(failures)}") from cause
    return report


def _check_source(
    stored: FileTensor | EncodedTensor, source: Source, target: Target | None, cast: str
) -> Problem | None:
    is_encoded = isinstance(stored, EncodedTensor)
    if is_encoded and (flaw := stored.flaw()):
        return flaw
    if stored.shape != source.part.shape:
        return Problem(stored.file.name, source.key, f"the shape {source.part.shape}", f"{stored.shape}")
    if target is None:
        return None
    found = stored.decoded if is_encoded else _DTYPE_NAMES.get(stored.dtype, stored.dtype)
    wanted = dtype_name(target.tensor.dtype)
    allowed = found == wanted or (found in _FLOATS and wanted in _FLOATS and cast == "any")
    allowed |= cast == "lossless" and (found, wanted) in (
        ("float16", "float32"),
        ("bfloat16", "float32"),
        *((name, "float64") for name in _FLOATS),
    )
    if allowed:
        return None
    text = f"{found}, decoded from {stored.name}" if is_encoded else found
    if cast == "lossless" and found in _FLOATS and wanted in _FLOATS:
        text += ", which cast='any' rounds"
    return Problem(stored.file.name, source.key, wanted, text)


def _check_cover(path: str, name: str, part: Part, sources: list[Source]) -> Iterator[Problem]:
    """Sources must tile the part: no element missing, none twice."""
    first = next(iter(part.ranges), None)
    if first is None or part.size == 0:
        if first is None and len(sources) != 1:
            yield Problem(path, name, "one tensor", f"{len(sources)}")
        return
    ordered = sorted(sources, key=lambda source: source.part.ranges[first])
    for index, source in enumerate(ordered):
        for other in itertools.islice(ordered, index + 1, None):
            if other.part.ranges[first][0] >= source.part.ranges[first][1]:
                break
            if source.part.overlap(other.part):
                yield Problem(path, name, "each element once", f"some in {source.key} and in {other.key}")
                return
    covered = sum(Part("", source.part.overlap(part)).size for source in sources)
    if covered != part.size:
        box = ", ".join(f"{dim} {start}..{stop - 1}" for dim, (start, stop) in part.ranges.items())
        keys = ", ".join(source.key for source in ordered[:4])
        found = f"{covered} of {part.size} elements, in {keys}" if keys else "nothing"
        yield Problem(path, name, f"all of {box}", found)


def _fill(files: TensorFiles, target: Target, plan: list[tuple[Source, dict]]) -> int:
    dtype, bytes_read = dtype_name(target.tensor.dtype), 0
    if not plan:
        return 0
    array = None
    for source, whole_box in plan:
        stored, boxes = files.find(source.key), [whole_box]
        if isinstance(stored, EncodedTensor) and len(stored.shape) > 2:
            # Expert by expert, because what is being decoded takes many times its room.
            first = source.part.names[0]
            boxes = [{**whole_box, first: (index, index + 1)} for index in range(*whole_box[first])]
        for box in boxes:
            values, num_bytes = _read_box(stored, source.part, box, dtype)
            if array is None:
                array = np.empty(target.part.shape, values.dtype)
            _write_box(array, target.part, box, values, source.part.names)
            bytes_read += num_bytes
    target.tensor.set_value(paddle.to_tensor(array, place=paddle.CPUPlace()))
    return bytes_read
