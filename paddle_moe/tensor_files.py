"""Parts of tensors in safetensors files: which file holds what, and reading no more than a rank needs.

A dense tensor has named dimensions. What a rank holds of it, and what each tensor of a file holds of it, is a
`Part`: the order of the dimensions and a range of each. Loading intersects the parts that files have with
those that the rank wants. Nothing is assigned before every key, shape and dtype has been checked, on every
rank.

The dimensions of FusedMoE: E experts, H hidden, G the halves gate and up (0 and 1), I intermediate columns,
S those of the shared expert.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import numpy as np
import paddle
from safetensors import SafetensorError, safe_open

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
}
_FLOATS = ("float64", "float32", "bfloat16", "float16")
_SHOWN_PROBLEMS = 40


def dtype_name(tensor: paddle.Tensor) -> str:
    return str(tensor.dtype).rpartition(".")[2].lower()  # the state of optimizers has DataType.FLOAT32


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


def _read_box(stored: FileTensor, part: Part, box: Mapping[str, tuple[int, int]], dtype: str) -> np.ndarray:
    """The elements of `box` from a tensor that holds `part`, in a dimension for each name of the pattern."""

    def read(chosen: list[slice], rest: list[list[slice]]) -> np.ndarray:
        if not rest:
            return stored.array[tuple(chosen)]
        if len(rest[0]) == 1:
            return read([*chosen, rest[0][0]], rest[1:])
        return np.concatenate([read([*chosen, run], rest[1:]) for run in rest[0]], axis=len(chosen))

    values = read([], _cuts(part, box))
    if _DTYPE_NAMES[stored.dtype] != dtype:
        values = paddle.to_tensor(np.array(values), place=paddle.CPUPlace()).astype(dtype).numpy()
    return values.reshape([box[name][1] - box[name][0] for name in part.names])


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
        problems: one Problem for each key, of all ranks.
    """

    def __init__(self, path: Any, problems: Sequence[Problem]):
        self.problems = list(problems)
        lines = [f"  {problem}" for problem in self.problems[:_SHOWN_PROBLEMS]]
        if len(self.problems) > _SHOWN_PROBLEMS:
            lines.append(f"  and {len(self.problems) - _SHOWN_PROBLEMS} more")
        number = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{path} was not loaded, {number}:", *lines]))


def exchange(parallel: ParallelContext | None, value: Any, what: str) -> list[Any]:
    """The values of all ranks, by rank; any that JSON can hold."""
    return [value] if parallel is None else parallel.exchange(value, what)


def raise_together(path: Any, problems: Sequence[Problem], parallel: ParallelContext | None) -> None:
    """Raises a CheckpointError on all ranks if there is a problem on any of them."""
    sent = [[one.file, one.key, one.expected, one.found] for one in problems]
    everyone = exchange(parallel, sent, f"checking {path}")
    merged = {Problem(*fields): None for one in everyone for fields in one}
    if merged:
        raise CheckpointError(path, list(merged))


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
        name = _DTYPE_NAMES[self.dtype]
        return self.content.view("uint16" if name == "bfloat16" else name).reshape(self.shape)


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
        if path.suffix == ".json":
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
            self.index = json.loads(path.read_text())
            file_of = {str(key): str(name) for key, name in self.index.get(map_name, {}).items()}
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
        bytes_read: tensor data that this rank read.
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
        """
        self.files, self.targets = files, targets
        self.problems = [*files.problems, *problems]
        self.boxes: dict[str, list[tuple[Source, dict[str, tuple[int, int]]]]] = {
            name: [] for name in targets
        }
        self.loaded: list[str] = []
        troubled = set()
        for source in sources:
            if source.key not in files:
                continue
            self.loaded.append(source.key)
            target = targets.get(source.target)
            problem = _check_source(files, source, target, cast)
            if problem:
                self.problems.append(problem)
                troubled.add(source.target)
            elif target is not None and (box := source.part.overlap(target.part)):
                self.boxes[source.target].append((source, box))
        named = {source.key for source in sources}
        self.unmatched = sorted(key for key in files.keys() if key not in named)
        for key in filter(must_match, self.unmatched):
            found = files[key]
            text = f"a tensor {found.shape} in {found.dtype}"
            self.problems.append(Problem(found.file.name, key, "no tensor of this name", text))
        if files.problems:
            return  # what they hold is not known, so neither is what is missing
        missing = [source for source in sources if source.key not in files]
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
    """
    raise_together(path, [*problems, *(one for plan in plans for one in plan.problems)], parallel)
    report = LoadReport()
    total = sum(plan.num_bytes(name) for plan in plans for name in plan.targets)
    if parallel is not None and parallel.rank > 0:
        progress = None
    with progress_bar(progress, total, "bytes") as advance:
        for plan in plans:
            report.loaded += plan.loaded
            report.unmatched += plan.unmatched
            for name, target in plan.targets.items():
                report.bytes_read += _fill(plan.files, target, plan.boxes[name])
                advance(plan.num_bytes(name))
    return report


def _check_source(files: TensorFiles, source: Source, target: Target | None, cast: str) -> Problem | None:
    stored = files[source.key]
    if stored.shape != source.part.shape:
        return Problem(stored.file.name, source.key, f"the shape {source.part.shape}", f"{stored.shape}")
    if target is None:
        return None
    found, wanted = _DTYPE_NAMES.get(stored.dtype, stored.dtype), dtype_name(target.tensor)
    allowed = found == wanted or (found in _FLOATS and wanted in _FLOATS and cast == "any")
    allowed |= cast == "lossless" and (found, wanted) in (
        ("float16", "float32"),
        ("bfloat16", "float32"),
        *((name, "float64") for name in _FLOATS),
    )
    return None if allowed else Problem(stored.file.name, source.key, wanted, found)


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
    dtype, bytes_read = dtype_name(target.tensor), 0
    if not plan:
        return 0
    array = None
    for source, box in plan:
        values = _read_box(files[source.key], source.part, box, dtype)
        if array is None:
            array = np.empty(target.part.shape, values.dtype)
        _write_box(array, target.part, box, values, source.part.names)
        bytes_read += values.size * files[source.key].array.itemsize
    target.tensor.set_value(paddle.to_tensor(array, place=paddle.CPUPlace()))
    return bytes_read
