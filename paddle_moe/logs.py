"""One log per rank, and the reader that merges them.

Every rank writes two files into the log directory:

    {prefix}_ep_rank_{e}_tp_rank_{t}.log     for people: "time [LEVEL] ep_rank e tp_rank t: message"
    {prefix}_ep_rank_{e}_tp_rank_{t}.jsonl   for programs: one strict JSON object per line

Each event carries "time" (seconds since the epoch), "ep_rank", "tp_rank", "event", and the "pid" that opened
the files. The package writes

    start     when the files are opened: run, rank, world_size, host
    moe_call  layer, num_tokens, tokens_per_expert [E_l], experts_min, kernel_ms, collective_ms
    warning   message; RankLogger.warning() writes it too
    error     message; RankLogger.error(), .exception() and .critical() write it too
    result    whatever a job reports at its end
    stop      when Python exits, with exception if one ended it, or when the watchdog kills the rank, with
              killed_by; missing when something else killed it

and `event()` takes any other name. NaN and the infinities, which JSON lacks, become "nan", "inf" and "-inf".
Data-parallel replicas after the first have `{prefix}_dp_rank_{d}` in place of `{prefix}`, and "dp_rank" in
each event.

Files are only ever appended to, so a directory may hold several runs. The reader shows the latest one: it
takes each file from its last "start" on, and keeps the files whose prefix and run id match the newest
"start" of the directory. The run id is derived from the endpoints that paddle.distributed.launch gives to
all ranks of a job. Events of another pid after that "start" are those of a second job that runs at the same
time: they are left out, and a warning of the rank says so.

A rank whose disk is full goes on: it says on stderr, once, that lines are being lost.

Nothing here imports Paddle, or what was compiled.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import logging
import math
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_PREFIX = "test_logs"
LAUNCH_DIRECTORY = "launch"  # log_dir value that stands for the --log_dir of paddle.distributed.launch

_FILE_NAME = re.compile(
    r"(?P<prefix>.+?)(_dp_rank_(?P<dp>\d+))?_ep_rank_(?P<ep>\d+)_tp_rank_(?P<tp>\d+)\.jsonl"
)
_RESERVED_FIELDS = ("time", "ep_rank", "tp_rank", "dp_rank", "event", "pid")

# Around all writing here. A fork waits for it: a child would wait for ever for a lock, or for the buffer of a
# file, that a thread held which it does not have.
_lock = threading.RLock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


# ---------------------------------------------------------------- writing


def get_rank_logger(
    ep_rank: int,
    tp_rank: int,
    *,
    dp_rank: int = 0,
    log_dir: str | os.PathLike | None = None,
    prefix: str = DEFAULT_PREFIX,
) -> RankLogger:
    """The logger `moe_ep_rank_{ep_rank}_tp_rank{tp_rank}` of this process, with its two files open.

    In the names of data-parallel replicas after the first, `dp_rank_{dp_rank}_` comes before `ep_rank`.

    Calling it again returns the same logger and adds no handler; another log_dir or prefix moves it there.

    Args:
        ep_rank, tp_rank, dp_rank: position in the grid, and which grid, 0 or more.
        log_dir: directory, created when missing. None: the current directory. "launch": the --log_dir of
            paddle.distributed.launch (write "./launch" for a directory of that name).
        prefix: first part of the file names.

    Raises:
        ValueError: a negative or non-integer rank, a prefix that is empty or contains a path separator.
        RuntimeError: log_dir="launch" in a process that paddle.distributed.launch did not start.
    """
    for name, value in (("ep_rank", ep_rank), ("tp_rank", tp_rank), ("dp_rank", dp_rank)):
        if isinstance(value, bool) or not hasattr(value, "__index__") or value < 0:
            raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
    if not prefix or os.path.basename(prefix) != prefix:
        raise ValueError(
            f"prefix must be a file name without directories, got {prefix!r}; use log_dir for those"
        )

    ep_rank, tp_rank, dp_rank = int(ep_rank), int(tp_rank), int(dp_rank)
    replica = f"dp_rank_{dp_rank}_" if dp_rank else ""
    logger = logging.getLogger(f"moe_{replica}ep_rank_{ep_rank}_tp_rank{tp_rank}")
    if not isinstance(logger, RankLogger):
        # logging keeps one object per name, and someone may already hold it: the object itself changes class.
        logger.__class__ = RankLogger
        logger.ep_rank, logger.tp_rank, logger.dp_rank = ep_rank, tp_rank, dp_rank
        logger._files = None
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)
    logger.disabled = False  # as logging.config leaves those that it finds
    logger._open(_resolve_log_dir(log_dir), f"{prefix}_{replica}ep_rank_{ep_rank}_tp_rank_{tp_rank}")
    return logger


class RankLogger(logging.Logger):
    """A logging.Logger bound to the two files of one rank. Made by `get_rank_logger`."""

    ep_rank: int
    tp_rank: int
    dp_rank: int
    _files: _RankFiles | None

    # Another process has no such files open: a layer that is pickled has none there.
    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __copy__(self) -> RankLogger:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> RankLogger:
        return self

    @property
    def place(self) -> dict[str, int]:
        """ep_rank and tp_rank, after the first replica dp_rank before them."""
        return _place(self)

    @property
    def log_path(self) -> Path:
        return self._open_files().log_path

    @property
    def events_path(self) -> Path:
        return self._open_files().events_path

    def event(self, name: str, /, **fields: Any) -> None:
        """Appends one event. Values may be anything JSON knows, NumPy scalars and arrays, or tensors.

        Raises:
            ValueError: a field is named time, ep_rank, tp_rank, dp_rank, event or pid.
            RuntimeError: the logger was closed.
        """
        clash = [key for key in _RESERVED_FIELDS if key in fields]
        if clash:
            raise ValueError(
                f"fields: {', '.join(clash)} is written by the logger itself; choose another name"
            )
        files = self._open_files()
        files.write_event(
            {"time": round(time.time(), 6), **self.place, "event": name, "pid": files.pid, **fields}
        )

    def close(self) -> None:
        """Writes the "stop" event and closes the files; `get_rank_logger` opens them again."""
        self._close()

    def _open_files(self) -> _RankFiles:
        if self._files is None:
            raise RuntimeError(
                f"{self.name} is closed; get_rank_logger({self.ep_rank}, {self.tp_rank}) opens it again"
            )
        return self._files

    def _close(self, **how: Any) -> None:
        if self._files is None:
            return
        self.event("stop", **how)
        for handler in self._files.handlers:
            self.removeHandler(handler)
            handler.close()
        self._files.close()
        self._files = None
        atexit.unregister(self._close_at_exit)

    def _open(self, log_dir: Path, stem: str) -> None:
        log_path, events_path = log_dir / f"{stem}.log", log_dir / f"{stem}.jsonl"
        if self._files is not None:
            if self._files.events_path == events_path:
                return
            self.close()
        log_dir.mkdir(parents=True, exist_ok=True)
        self._files = _RankFiles(self, log_path, events_path)
        for handler in self._files.handlers:
            self.addHandler(handler)
        self.event("start", **_describe_process())
        atexit.register(self._close_at_exit)

    def _close_at_exit(self) -> None:
        if self._files.pid != os.getpid():  # a fork that ends
            return
        # The interpreter keeps the exception that ended it here; a prompt keeps the last one that it showed.
        exception = getattr(sys, "last_value", None)
        if exception is not None and not hasattr(sys, "ps1"):
            self.error(": ".join(filter(None, (f"ended by {type(exception).__name__}", str(exception)))))
            self._close(exception=type(exception).__name__)
        self.close()


class _RankFiles:
    def __init__(self, logger: RankLogger, log_path: Path, events_path: Path):
        self.log_path, self.events_path = log_path, events_path
        _finish_last_line(log_path)
        _finish_last_line(events_path)
        self.pid = os.getpid()
        self._said = False
        self._events = open(events_path, "a", encoding="utf-8")
        text = _TextFile(self)
        text.setFormatter(logging.Formatter(f"%(asctime)s [%(levelname)s] {_position(logger)}: %(message)s"))
        self.handlers = (text, _ProblemsToEvents(logger))

    def write_event(self, event: dict) -> None:
        line = json.dumps(_strict_json(event), allow_nan=False)
        with _lock, self.surviving():
            self._events.write(line + "\n")
            self._events.flush()

    @contextlib.contextmanager
    def surviving(self) -> Iterator[None]:
        """Whoever writes a log must not fail because the disk does."""
        try:
            yield
        except OSError as error:
            self.say_once(error)

    def say_once(self, error: OSError) -> None:
        if not self._said and sys.stderr is not None:
            self._said = True
            text = f"lines are lost while this lasts: {error}"
            print(f"paddle_moe: {self.events_path.with_suffix('.*')}: {text}", file=sys.stderr)

    def close(self) -> None:
        with self.surviving():
            self._events.close()


class _TextFile(logging.FileHandler):
    """It flushes after every record."""

    def __init__(self, files: _RankFiles):
        super().__init__(files.log_path, encoding="utf-8", errors="backslashreplace")
        self._files = files

    def createLock(self) -> None:
        self.lock = _lock

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._files.say_once(error)
        else:
            super().handleError(record)

    def close(self) -> None:
        with self._files.surviving():
            super().close()


class _ProblemsToEvents(logging.Handler):
    def __init__(self, logger: RankLogger):
        super().__init__(logging.WARNING)
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except Exception:  # the text file has said it
            message = f"{record.msg} {record.args}"
        if record.exc_info and record.exc_info[1] is not None:
            message += f" ({type(record.exc_info[1]).__name__}: {record.exc_info[1]})"
        self._logger.event("error" if record.levelno >= logging.ERROR else "warning", message=message)


def _resolve_log_dir(log_dir: str | os.PathLike | None) -> Path:
    if log_dir == LAUNCH_DIRECTORY:
        log_dir = os.environ.get("PADDLE_LOG_DIR")
        if not log_dir:
            raise RuntimeError(
                'log_dir="launch" needs the environment variable PADDLE_LOG_DIR, which '
                "paddle.distributed.launch sets for its processes, but it is not set; start the job with the "
                "launcher or pass a directory"
            )
    return Path(os.getcwd() if log_dir is None else log_dir).absolute()


def _describe_process() -> dict[str, Any]:
    """The launcher gives all ranks of one job the same endpoints, and other ports to the next job."""
    environment = os.environ

    def number(name: str) -> int | None:
        text = environment.get(name, "")
        return int(text) if text.isdecimal() else None

    endpoints = environment.get("PADDLE_MASTER", "") + environment.get("PADDLE_TRAINER_ENDPOINTS", "")
    return {
        "run": hashlib.sha256(endpoints.encode()).hexdigest()[:12] if endpoints else None,
        "rank": number("PADDLE_TRAINER_ID"),
        "world_size": number("PADDLE_TRAINERS_NUM"),
        "host": socket.gethostname(),
    }


def _finish_last_line(path: Path) -> None:
    """A killed rank can leave half a line, which must not swallow the first line of the next run."""
    if path.exists() and path.stat().st_size:
        with open(path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def _strict_json(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, dict):
        return {str(key): _strict_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_strict_json(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy scalars and arrays, Paddle and PyTorch tensors
        if hasattr(value, "astype") and re.search("bfloat|float8|float96|float128", str(value.dtype)):
            value = value.astype("float64")  # Paddle would list their bits, NumPy its own numbers
        return _strict_json(value.tolist())
    return str(value)


# ---------------------------------------------------------------- reading


@dataclass
class RankEvents:
    """What one rank wrote during the latest run of a directory."""

    ep_rank: int
    tp_rank: int
    dp_rank: int
    path: Path
    events: list[dict[str, Any]]  # without "start"
    start: dict[str, Any]  # the "start" event, {} when the file has none
    unreadable_lines: int = 0
    other_pids: tuple[int, ...] = ()  # of jobs that wrote to the file at the same time

    @property
    def start_time(self) -> float:
        return _number(self.start.get("time")) or 0.0

    @property
    def world_rank(self) -> int | None:
        return _integer(self.start.get("rank"))

    def named(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == name]


def load_events(directory: str | os.PathLike) -> list[RankEvents]:
    """Reads the latest run found in a log directory, sorted by (dp_rank, ep_rank, tp_rank).

    Lines that are no complete event (a killed rank can leave half of one) are counted, not raised.

    Raises:
        ValueError: the directory does not exist, or holds no rank log.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"directory must be one with rank logs, got {str(directory)!r}, which is none")
    ranks = {}
    for path in sorted(directory.iterdir()):
        match = _FILE_NAME.fullmatch(path.name)
        if match:
            place = int(match["ep"]), int(match["tp"]), int(match["dp"] or 0)
            ranks[path] = match["prefix"], _read_last_run(path, *place)
    if not ranks:
        hint = next(iter(sorted(directory.glob("*/*_ep_rank_*_tp_rank_*.jsonl"))), None)
        raise ValueError(
            f"directory must have files PREFIX_ep_rank_E_tp_rank_T.jsonl, got {str(directory)!r} without any"
            + (f"; did you mean {str(hint.parent)!r}?" if hint else "")
        )

    def identity(path: Path) -> tuple:
        prefix, rank = ranks[path]
        return prefix, rank.start.get("run")

    newest = max(ranks, key=lambda path: ranks[path][1].start_time)
    latest = [ranks[path][1] for path in ranks if identity(path) == identity(newest)]
    return sorted(_drop_replaced(latest), key=lambda rank: (rank.dp_rank, rank.ep_rank, rank.tp_rank))


def _read_last_run(path: Path, ep_rank: int, tp_rank: int, dp_rank: int) -> RankEvents:
    start, events, unreadable, others = {}, [], 0, set()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except ValueError:
            unreadable += 1
            continue
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            unreadable += 1
        elif event["event"] == "start":
            start, events, unreadable, others = event, [], 0, set()
        elif (pid := _integer(event.get("pid"))) is not None and pid != start.get("pid", pid):
            others.add(pid)
        else:
            events.append(event)
    return RankEvents(ep_rank, tp_rank, dp_rank, path, events, start, unreadable, tuple(sorted(others)))


def _drop_replaced(ranks: list[RankEvents]) -> list[RankEvents]:
    """With fixed ports two runs share their id, and another grid leaves files of ranks that are no more."""
    newest: dict[int, RankEvents] = {}
    for rank in ranks:
        number = rank.world_rank
        if number is not None and (number not in newest or rank.start_time > newest[number].start_time):
            newest[number] = rank
    return [
        rank
        for rank in ranks
        if rank.world_rank is None or rank.start.get("pid") == newest[rank.world_rank].start.get("pid")
    ]


# ---------------------------------------------------------------- merging


@dataclass
class RankSummary:
    ep_rank: int
    tp_rank: int
    dp_rank: int
    experts: tuple[int, int] | None  # first and last global expert, None without experts or calls
    calls: int
    rows: int  # token rows that this rank's experts received
    kernel_ms: float
    collective_ms: float
    warnings: list[str]
    errors: list[str]
    result: dict[str, Any] | None  # fields of the last "result" event
    finished: bool  # by itself; False: still running, or killed
    failed: bool  # ended by an exception
    killed_by_watchdog: bool  # because the job could not go on
    unreadable_lines: int


@dataclass
class LayerLoad:
    """Tokens that each expert of one layer received, summed over the calls of the run."""

    layer: str
    tokens_per_expert: dict[int, int]  # global expert id -> rows
    ep_rank_of_expert: dict[int, int]

    @property
    def imbalance(self) -> float | None:
        """Busiest expert over the mean, 1.0 = perfectly even; None without tokens."""
        total = sum(self.tokens_per_expert.values())
        return max(self.tokens_per_expert.values()) * len(self.tokens_per_expert) / total if total else None


@dataclass
class Summary:
    ranks: list[RankSummary]
    layers: list[LayerLoad]
    missing_ranks: list[int]  # world ranks that left no log in this directory

    @property
    def warnings(self) -> list[str]:
        return [_with_rank(rank, text) for rank in self.ranks for text in rank.warnings]

    @property
    def errors(self) -> list[str]:
        return [_with_rank(rank, text) for rank in self.ranks for text in rank.errors]

    def to_json(self) -> dict[str, Any]:
        """Plain data for json.dumps: {"ranks", "layers", "missing_ranks", "warnings", "errors"}."""
        return _strict_json(
            {
                "ranks": [vars(rank) for rank in self.ranks],
                "layers": [{**vars(layer), "imbalance": layer.imbalance} for layer in self.layers],
                "missing_ranks": self.missing_ranks,
                "warnings": self.warnings,
                "errors": self.errors,
            }
        )


def summarize(ranks: list[RankEvents]) -> Summary:
    """Merges the ranks of one run.

    The TP ranks of one EP rank run the same experts on the same tokens, so the load of an expert is taken
    from one of them: the one with the most calls, because another may have been killed early. Replicas have
    tokens of their own, and add up.
    """
    layers: dict[str, LayerLoad] = {}
    for dp_rank, ep_rank in sorted({(rank.dp_rank, rank.ep_rank) for rank in ranks}):
        alike = [rank for rank in ranks if (rank.dp_rank, rank.ep_rank) == (dp_rank, ep_rank)]
        witness = max(alike, key=lambda rank: len(_calls(rank)))
        for call in _calls(witness):
            if not call["tokens_per_expert"]:  # more ranks than experts
                continue
            name = str(call.get("layer", ""))
            load = layers.setdefault(name, LayerLoad(name, {}, {}))
            for expert, tokens in enumerate(call["tokens_per_expert"], start=call["experts_min"]):
                load.tokens_per_expert[expert] = load.tokens_per_expert.get(expert, 0) + tokens
                load.ep_rank_of_expert[expert] = ep_rank
    for load in layers.values():
        load.tokens_per_expert = dict(sorted(load.tokens_per_expert.items()))
    present = {rank.world_rank for rank in ranks}
    world_size = max((_integer(rank.start.get("world_size")) or 0 for rank in ranks), default=0)
    missing = [rank for rank in range(world_size) if rank not in present]
    return Summary([_summarize_rank(rank) for rank in ranks], list(layers.values()), missing)


def _summarize_rank(rank: RankEvents) -> RankSummary:
    calls = _calls(rank)
    results, stops = rank.named("result"), rank.named("stop")
    experts = [
        call["experts_min"] + i
        for call in calls
        for i in (0, len(call["tokens_per_expert"]) - 1)
        if call["tokens_per_expert"]
    ]
    return RankSummary(
        ep_rank=rank.ep_rank,
        tp_rank=rank.tp_rank,
        dp_rank=rank.dp_rank,
        experts=(min(experts), max(experts)) if experts else None,
        calls=len(calls),
        rows=sum(sum(call["tokens_per_expert"]) for call in calls),
        kernel_ms=sum(_number(call.get("kernel_ms")) or 0.0 for call in calls),
        collective_ms=sum(_number(call.get("collective_ms")) or 0.0 for call in calls),
        warnings=[
            *(str(event.get("message", "")) for event in rank.named("warning")),
            *(
                f"process {pid} wrote to {rank.path.name} at the same time, and is left out; give each job a"
                " directory or prefix of its own"
                for pid in rank.other_pids
            ),
        ],
        errors=[str(event.get("message", "")) for event in rank.named("error")],
        result={key: value for key, value in results[-1].items() if key not in _RESERVED_FIELDS}
        if results
        else None,
        finished=any("killed_by" not in stop for stop in stops),
        failed=any("exception" in stop for stop in stops),
        killed_by_watchdog=any(stop.get("killed_by") == "watchdog" for stop in stops),
        unreadable_lines=rank.unreadable_lines,
    )


# Larger ids are no expert's; a picture has a column for each id up to the largest.
_MAX_EXPERTS = 2**20


def _calls(rank: RankEvents) -> list[dict[str, Any]]:
    """The "moe_call" events that have the fields a merge needs; other programs may write the same name."""
    return [
        event
        for event in rank.named("moe_call")
        if _integer(event.get("experts_min")) in range(_MAX_EXPERTS)
        and isinstance(event.get("tokens_per_expert"), list)
        and all(_integer(tokens) is not None for tokens in event["tokens_per_expert"])
    ]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _with_rank(rank: RankSummary, text: str) -> str:
    return f"{_position(rank)}: {text}"


def _place(rank: RankLogger | RankSummary) -> dict[str, int]:
    replica = {"dp_rank": rank.dp_rank} if rank.dp_rank else {}
    return {**replica, "ep_rank": rank.ep_rank, "tp_rank": rank.tp_rank}


def _position(rank: RankLogger | RankSummary) -> str:
    return " ".join(f"{name} {number}" for name, number in _place(rank).items())
