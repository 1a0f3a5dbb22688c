"""Expert, tensor and data parallel (EP, TP, DP) groups that never hang and never give a wrong sum.

The ranks form a grid of ep_size rows and tp_size columns, with ep_rank = rank // tp_size and
tp_rank = rank % tp_size. With ep_size = tp_size = 2:

    rank   ep_rank   tp_rank   tp_group: same ep_rank   ep_group: same tp_rank
    0      0         0         [0, 1]                   [0, 2]
    1      0         1         [0, 1]                   [1, 3]
    2      1         0         [2, 3]                   [0, 2]
    3      1         1         [2, 3]                   [1, 3]

With dp_size > 1 there are as many such grids, one after the other: replicas, each with tokens of its own. The
ranks at the same place of all grids form the dp_group.

Start the ranks with `python -m paddle.distributed.launch`. When a rank dies, fails or does not arrive, all of
them end and say which one it was: see watchdog.py.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import hashlib
import itertools
import math
import multiprocessing.util
import os
import socket
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Callable

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.base import core
from paddle.distributed import collective
from paddle.distributed.communication.group import Group, _add_new_group

from paddle_moe._options import at_least, checked, dtype_name, integer, one_of, positive
from paddle_moe.deep_ep import import_buffer
from paddle_moe.watchdog import Watchdog

if TYPE_CHECKING:
    from paddle_moe.logs import RankLogger

DEFAULT_TIMEOUT_SECONDS = 300.0

_REDUCIBLE_DTYPES = ("float16", "bfloat16", "float32", "float64", "int8", "uint8", "int32", "int64")
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
_GET_INTERFACE_ADDRESS = 0x8915  # SIOCGIFADDR of Linux


# ---------------------------------------------------------------- the grid


@dataclass(frozen=True)
class GridRank:
    """The place of one rank, and the global ranks of its groups, each in the order of the ranks."""

    rank: int
    ep_rank: int
    tp_rank: int
    ep_group: tuple[int, ...]  # same dp_rank and tp_rank: together they hold all experts
    tp_group: tuple[int, ...]  # same dp_rank and ep_rank: together the whole intermediate dimension
    dp_rank: int
    dp_group: tuple[int, ...]  # same ep_rank and tp_rank: they hold the same shard, and different tokens
    grid_group: tuple[int, ...]  # same dp_rank: they hold the same tokens


def rank_grid(world_size: int, ep_size: int, tp_size: int, dp_size: int = 1) -> list[GridRank]:
    """The grid as data, one entry per rank: rank = (dp_rank * ep_size + ep_rank) * tp_size + tp_rank.

    Raises:
        ValueError: a size is no integer or less than 1, or ep_size * tp_size * dp_size is not world_size.
    """
    for name, value in (
        ("world_size", world_size),
        ("ep_size", ep_size),
        ("tp_size", tp_size),
        ("dp_size", dp_size),
    ):
        at_least(1)(name, value)
    product = ep_size * tp_size * dp_size
    if product != world_size:
        raise ValueError(
            f"ep_size * tp_size * dp_size must be the number of ranks, got ep_size={ep_size},"
            f" tp_size={tp_size}, dp_size={dp_size} (product {product}) and world_size={world_size}; change"
            f" the sizes, or start {product} ranks"
        )
    ranks = np.arange(world_size).reshape([dp_size, ep_size, tp_size])
    return [
        GridRank(
            rank=int(ranks[dp_rank, ep_rank, tp_rank]),
            ep_rank=ep_rank,
            tp_rank=tp_rank,
            ep_group=tuple(ranks[dp_rank, :, tp_rank].tolist()),
            tp_group=tuple(ranks[dp_rank, ep_rank].tolist()),
            dp_rank=dp_rank,
            dp_group=tuple(ranks[:, ep_rank, tp_rank].tolist()),
            grid_group=tuple(ranks[dp_rank].ravel().tolist()),
        )
        for dp_rank, ep_rank, tp_rank in np.ndindex(dp_size, ep_size, tp_size)
    ]


# ---------------------------------------------------------------- the context of a rank


class ParallelContext:
    """The place of this rank in the grid, and its groups. Made by `init_distributed` or `from_groups`.

    As a context manager it leaves the job at the end of the block, and reports an exception that ends it
    (sys.exit(0) is none).

    Attributes:
        rank, world_size: of paddle.distributed.
        ep_rank, ep_size, ep_group: position in and size of the group of ranks that hold the other experts.
        tp_rank, tp_size, tp_group: position in and size of the group that holds the other slices of I.
        dp_rank, dp_size, dp_group: position in and size of the group that holds the same shard, and other
            tokens.
        grid_group: all ranks of the EP x TP grid of this replica; None if there is no such group, "grid" is
            then EP followed by TP.
        ep_pairs: on gloo, by global rank, the groups of this rank and one other of ep_group, for send and
            recv. Paddle numbers the messages of a gloo group in each rank for itself, so two ranks can talk
            only after equally many calls; in a group of two that is always so.

    The groups are paddle.distributed groups and work with its functions. Those of size 1 communicate nothing.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelContext:
        return self  # as a copy of a layer is on the same ranks

    def __reduce__(self):
        raise TypeError(
            "a ParallelContext holds this process's groups and cannot be pickled; save what a layer has with"
            " paddle_moe.save_checkpoint, and make the layer anew with the context of the new job"
        )

    def __init__(
        self,
        ep_group: Group,
        tp_group: Group,
        grid_group: Group | None = None,
        dp_group: Group | None = None,
        watchdog: Watchdog | None = None,
    ):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.ep_group, self.tp_group, self.grid_group = ep_group, tp_group, grid_group
        self.dp_group = Group(0, 0, [self.rank]) if dp_group is None else dp_group
        self.ep_rank, self.ep_size = _position(ep_group, self.rank), ep_group.nranks
        self.tp_rank, self.tp_size = _position(tp_group, self.rank), tp_group.nranks
        self.dp_rank, self.dp_size = _position(self.dp_group, self.rank), self.dp_group.nranks
        others = [rank for rank in ep_group.ranks if rank != self.rank]
        self.deep_ep: type | None = None  # DeepEP's Buffer, see use_deep_ep
        self.deep_ep_buffer: Any = None
        self.ep_pairs: dict[int, Group] = {others[0]: ep_group} if len(others) == 1 else {}
        self._watchdog = watchdog
        self.logs_failures = False  # to a logger that the user has named
        self._grid = self._self_test()

    @classmethod
    def from_groups(
        cls,
        ep_group: Group,
        tp_group: Group | None = None,
        grid_group: Group | None = None,
        dp_group: Group | None = None,
    ) -> ParallelContext:
        """A context on groups that exist already, for example those of fleet's hybrid topology.

        Without a tp_group each rank is alone in its own.

        All ranks of the groups call this at the same time; the groups pass the same self-test as those of
        `init_distributed`, but nothing watches the ranks.

        Raises:
            ValueError: this rank is not in a group.
            RuntimeError: a group does not sum over its ranks, the groups form no grid, or dp_group joins
                different places of the grids.
        """
        if tp_group is None:
            tp_group = Group(0, 0, [dist.get_rank()])
        context = cls(ep_group, tp_group, grid_group, dp_group)
        if ep_group.nranks > 2 and ep_group.backend == "GLOO":  # a group of one has no backend
            context._pair_up()
        return context

    def _pair_up(self) -> None:
        """Builds ep_pairs for a group of more than two ranks."""
        ranks = list(self.ep_group.ranks)

        def exchange(value: Any, what: str) -> dict[int, Any]:
            gathered: list[Any] = []
            dist.all_gather_object(gathered, value, group=self.ep_group)
            return dict(zip(ranks, gathered))

        address = os.environ.get("PADDLE_CURRENT_ENDPOINT", "").rpartition(":")[0] or "127.0.0.1"
        groups = _build_gloo_groups(
            [list(pair) for pair in itertools.combinations(ranks, 2)],
            self.ep_group,
            exchange,
            lambda *_: contextlib.nullcontext(),
            exchange(address, "addresses"),
        )
        self.ep_pairs = {next(one for one in pair if one != self.rank): groups[pair] for pair in groups}

    def use_deep_ep(self) -> None:
        """Has all-to-all layers exchange their tokens over the EP group by DeepEP. All of its ranks call it.

        hidden_states must then be bfloat16, and all EP ranks own equally many experts. Not yet run.

        Raises:
            RuntimeError: this Paddle has no DeepEP.
        """
        self.deep_ep = import_buffer()

    @property
    def grid_ranks(self) -> list[int]:
        """The global ranks of this rank's EP x TP grid, in order."""
        return sorted(self._grid.ravel().tolist())

    def size(self, group: str) -> int:
        """Ranks in the "ep", "tp", "grid" or "dp" group; a ValueError for another."""
        return self.ep_size * self.tp_size if group == "grid" else self._groups()[self._slot(group)].nranks

    def all_reduce(
        self, tensor: paddle.Tensor, group: str | Group, op: str = "sum", *, fp32: bool = False
    ) -> paddle.Tensor:
        """Reduces `tensor` over a group, in place, and returns it. No gradient flows through it.

        Gloo gives up when a rank is more than 30 seconds late, whatever timeout_seconds says: call `barrier`
        first where the ranks may have drifted apart that far. On NCCL the time limit covers the launch only.

        Args:
            tensor: any shape; float16, bfloat16, float32, float64, int8, uint8, int32 or int64. On gloo
                float16 is always summed in fp32, because its own sum over more than two ranks is wrong.
            group: "ep", "tp", "grid", "dp", or one of the groups of this context.
            op: "sum" or "max".
            fp32: sum float16 and bfloat16 in fp32 and round once at the end.

        Raises:
            ValueError: another dtype, op or group.
        """
        dtype = dtype_name(tensor.dtype)
        if dtype not in _REDUCIBLE_DTYPES:
            raise ValueError(
                f"tensor must have one of the dtypes {', '.join(_REDUCIBLE_DTYPES)}, got {dtype}"
            )
        one_of(*_OPS)("op", op)
        slot = self._slot(group)
        if slot == "grid" and self.grid_group is None:
            self.all_reduce(tensor, "ep", op, fp32=fp32)
            return self.all_reduce(tensor, "tp", op, fp32=fp32)
        group = self._groups()[slot]
        if group.nranks == 1 or tensor.size == 0:  # gloo refuses an empty tensor
            return tensor
        widen = dtype == "float16" and group.backend == "GLOO" or fp32 and dtype in ("float16", "bfloat16")
        with paddle.no_grad(), self.waiting(slot, "all_reduce"):
            reduced = tensor.astype("float32") if widen else tensor
            if not reduced.is_contiguous():  # contiguous() would cut a view off what it is a view of
                reduced = reduced.clone()
            dist.all_reduce(reduced, op=_OPS[op], group=group)
            if reduced is not tensor:
                paddle.assign(reduced.astype(tensor.dtype), output=tensor)
        return tensor

    def barrier(self) -> None:
        """Waits for all ranks of all grids, up to the timeout_seconds of `init_distributed`."""
        if self._watchdog is not None:
            self._watchdog.exchange(None, "barrier")
        else:
            self.all_reduce(self.all_reduce(paddle.zeros([1], "int32"), "grid"), "dp")

    def exchange(self, value: Any, what: str, detail: str = "") -> list[Any]:
        """The values of all ranks of all grids, by rank; any that JSON can hold.

        `what` says what the ranks are doing, and must be the same on all; messages add `detail` to it.
        """
        if self._watchdog is not None:
            return self._watchdog.exchange(value, what, detail)
        values = {self.rank: value}
        grid_groups = [self.ep_group, self.tp_group] if self.grid_group is None else [self.grid_group]
        for group in (*grid_groups, self.dp_group):
            if group.nranks > 1:
                gathered: list[Any] = []
                dist.all_gather_object(gathered, values, group=group)
                values = {rank: one for part in gathered for rank, one in part.items()}
        return [values[rank] for rank in sorted(values)]

    def files(self) -> contextlib.AbstractContextManager[None]:
        """Around the reading or writing of files: the others wait for as long as this rank gets on with them.

        Without the watchdog of `init_distributed` the transport's own limit holds.
        """
        return contextlib.nullcontext() if self._watchdog is None else self._watchdog.files()

    @property
    def is_watched(self) -> bool:
        """Whether it is from `init_distributed`, over several ranks."""
        return self._watchdog is not None

    def check_same_routing(
        self, routing_table: paddle.Tensor, router_weights: paddle.Tensor | None = None
    ) -> None:
        """Checks that all ranks route their replicated tokens alike; if not, every sum would be corrupt.

        Compares a hash of shapes, dtypes and bits, which costs a copy to the host: for debugging.

        Args:
            routing_table: [T, K], router_weights: [T, K], any dtype.

        Raises:
            RuntimeError: on every rank, naming the ranks that differ from the majority.
        """
        hashes = [_hash(routing_table), 0 if router_weights is None else _hash(router_weights)]
        everyone = self._gather(hashes)
        for index, name in enumerate(("routing_table", "router_weights")):
            values = everyone[:, :, index]
            usual = collections.Counter(values.ravel().tolist()).most_common(1)[0][0]
            if (values != usual).any():
                other, same = self._grid[values != usual].tolist(), self._grid[values == usual].tolist()
                raise RuntimeError(
                    f"{name} differs between ranks that hold the same tokens: ranks {sorted(other)}"
                    f" disagree with ranks {sorted(same)}; give all ranks the same tokens and the same router"
                    ' without noise of its own, or use dispatch="alltoall" where they have other tokens'
                )

    def log_failures_to(self, logger: RankLogger) -> None:
        """Has the watchdog add the reason to the log files of this rank when it ends the rank.

        Raises:
            RuntimeError: the logger was closed.
        """
        files = str(logger.log_path), str(logger.events_path)
        if self._watchdog is not None:
            self._watchdog.log_to(*files, logger.place)
        self.logs_failures = True  # not before: another logger may be named after an error

    def shutdown(self) -> None:
        """Leaves the job: what happens to this rank next does not end the others. Also done at exit."""
        if self._watchdog is not None:
            self._watchdog.leave()
            self._watchdog = None

    def __enter__(self) -> ParallelContext:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        error = _failure(error)
        if error is not None and self._watchdog is not None:
            self._watchdog.fail(error)
        self.shutdown()

    def _groups(self) -> dict[str, Group | None]:
        return {"ep": self.ep_group, "tp": self.tp_group, "grid": self.grid_group, "dp": self.dp_group}

    def _slot(self, group: str | Group) -> str:
        for slot, own in self._groups().items():
            if group is own or group == slot:
                return slot
        raise ValueError(f"group must be 'ep', 'tp', 'grid', 'dp' or a group of this context, got {group!r}")

    def waiting(self, slot: str, what: str) -> contextlib.AbstractContextManager[None]:
        """Around a collective of the "ep", "tp", "grid" or "dp" group, `what` in words: when one of its ranks
        does not come within timeout_seconds, all ranks end and say which."""
        if self._watchdog is None:
            return contextlib.nullcontext()
        return self._watchdog.waiting(slot, f"{what} of the {slot} group {list(self._groups()[slot].ranks)}")

    def _gather(self, values: list[int]) -> np.ndarray:
        """The values of every rank of the grid: [ep_size, tp_size, len(values)] int64."""
        everyone = np.zeros([self.ep_size, self.tp_size, len(values)], np.int64)
        everyone[self.ep_rank, self.tp_rank] = values
        return self.all_reduce(paddle.to_tensor(everyone), "grid").numpy()

    def _self_test(self) -> np.ndarray:
        """Proves that every group sums its ranks, once each, and no others; returns the grid of global ranks.

        Each rank adds its id + 1 at its own place of a vector of zeros, so a missing, foreign or doubled rank
        shows.
        """
        for slot, group in self._groups().items():
            if group is None or group.nranks == 1:
                continue
            ids = np.zeros(group.nranks, np.int64)
            ids[group.ranks.index(self.rank)] = self.rank + 1
            total = self.all_reduce(paddle.to_tensor(ids), slot).numpy() - 1
            if total.tolist() != list(group.ranks):
                raise RuntimeError(
                    f"the {slot} group of rank {self.rank} should sum over the ranks {list(group.ranks)}, but"
                    f" a test sum of their ids came from {total.tolist()}"
                )
        grid = self._gather([self.rank + 1])[:, :, 0] - 1
        if len(set(grid.ravel().tolist())) != grid.size or (grid < 0).any():
            raise RuntimeError(
                f"the EP and TP groups of rank {self.rank} form no grid: gathering the rank ids over EP and"
                f" then TP gave {grid.tolist()}; each TP group must meet each EP group in one rank"
            )
        place = [self.ep_rank, self.tp_rank, self.ep_size, self.tp_size]
        ends = paddle.to_tensor(place + [-number for number in place])
        if self.all_reduce(ends, "dp", "max").tolist()[:4] != place or ends.tolist()[4:] != [
            -n for n in place
        ]:
            raise RuntimeError(
                f"the dp group of rank {self.rank}, {list(self.dp_group.ranks)}, joins ranks at different"
                f" places of their grids; this one has ep_rank {self.ep_rank} of {self.ep_size} and tp_rank"
                f" {self.tp_rank} of {self.tp_size}"
            )
        return grid


def _position(group: Group, rank: int) -> int:
    if rank not in group.ranks:
        raise ValueError(f"group must contain rank {rank}, got the ranks {list(group.ranks)}")
    return list(group.ranks).index(rank)


def _hash(tensor: paddle.Tensor) -> int:
    array = tensor.numpy()
    digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


# ---------------------------------------------------------------- starting


def init_distributed(
    ep_size: int = 1,
    tp_size: int = 1,
    dp_size: int = 1,
    *,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
) -> ParallelContext:
    """Starts paddle.distributed unless it runs already, and builds and tests the groups of this rank.

    Every rank calls it, with the same arguments. With one rank no launcher is needed.

    The reliable construction differs by backend. On gloo each group gets a store of its own, because Paddle's
    gloo groups share keys in the common store. On NCCL every rank creates every group in the same order, with
    a collective after each; that path is not yet run.

    Args:
        ep_size: number of expert shards.
        tp_size: number of slices of the intermediate dimension.
        dp_size: number of EP x TP grids, each of which gets tokens of its own.
        timeout_seconds: how long a rank waits for the others here, in `barrier` and in `all_reduce`. While
            checkpoints are saved and loaded, how long a rank that others wait for may read and write nothing.

    Raises:
        ValueError: a size is no integer, timeout_seconds is not positive and finite, ep_size * tp_size *
            dp_size is not the number of ranks, or the ranks were given different sizes; the text names the
            ranks and their values, on every rank.
        RuntimeError: a variable of the launcher is no number, or no rank of its world; a rank does not come
            within timeout_seconds; or a group fails its self-test.
    """
    timeout_seconds = positive("timeout_seconds", timeout_seconds)
    if timeout_seconds == math.inf:
        raise ValueError("timeout_seconds must be finite, got inf")
    sizes = {"ep_size": ep_size, "tp_size": tp_size, "dp_size": dp_size}
    ep_size, tp_size, dp_size = checked(dict.fromkeys(sizes, integer), sizes)
    rank = _launcher_number("PADDLE_TRAINER_ID", "0")
    world_size = _launcher_number("PADDLE_TRAINERS_NUM", "1")
    if not 0 <= rank < world_size:
        raise RuntimeError(
            f"PADDLE_TRAINER_ID must be between 0 and PADDLE_TRAINERS_NUM - 1 = {world_size - 1}, got {rank};"
            " start the ranks with python -m paddle.distributed.launch, or unset it for one rank"
        )
    if world_size == 1:
        rank_grid(1, ep_size, tp_size, dp_size)
        return ParallelContext(*(Group(0, 0, [0]) for _ in range(3)))

    watchdog = Watchdog(rank, timeout_seconds)
    _report_the_end(watchdog)
    host, port = _rendezvous(watchdog, rank)
    sizes = {"ep_size": ep_size, "tp_size": tp_size, "dp_size": dp_size, "world_size": world_size}
    hosts = watchdog.join(host, port, sizes)
    grid = rank_grid(world_size, ep_size, tp_size, dp_size)
    own = grid[rank]
    watchdog.set_groups(
        {
            "world": list(range(world_size)),
            "grid": own.grid_group,
            "ep": own.ep_group,
            "tp": own.tp_group,
            "dp": own.dp_group,
        }
    )
    if len(set(hosts)) > 1:
        _let_gloo_use_the_route_to(host, port)
    _use_the_older_store_server()
    with watchdog.waiting("world", "paddle.distributed.init_parallel_env"):
        world_group = dist.init_parallel_env()

    on_gloo = world_group.backend == "GLOO"
    rank_lists = {one.ep_group for one in grid} | {one.tp_group for one in grid}
    rank_lists |= {one.dp_group for one in grid} | {one.grid_group for one in grid}
    if on_gloo:
        rank_lists |= {pair for one in grid for pair in itertools.combinations(one.ep_group, 2)}
    lists = [list(ranks) for ranks in sorted(rank_lists)]
    if on_gloo:
        addresses = dict(enumerate(address or host for address in hosts))
        groups = _build_gloo_groups(lists, world_group, watchdog.exchange, watchdog.waiting, addresses)
    else:
        groups = _build_groups(lists, world_group, watchdog)
    own_groups = (groups[ranks] for ranks in (own.ep_group, own.tp_group, own.grid_group, own.dp_group))
    context = ParallelContext(*own_groups, watchdog)
    if on_gloo and ep_size > 2:
        peers = (peer for peer in own.ep_group if peer != rank)
        context.ep_pairs = {peer: groups[tuple(sorted((rank, peer)))] for peer in peers}
    watchdog.exchange(None, "init_distributed")
    return context


def _launcher_number(name: str, default: str) -> int:
    text = os.environ.get(name, default)
    try:
        return int(text)
    except ValueError:
        raise RuntimeError(
            f"{name} must be an integer, got {text!r}; start the ranks with"
            " python -m paddle.distributed.launch, or unset it for one rank"
        ) from None


def _report_the_end(watchdog: Watchdog) -> None:
    """Tells the other ranks how this process ends: by an exception, or well."""
    previous_hook = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        watchdog.fail(error)
        previous_hook(kind, error, traceback)

    def finish() -> None:
        # Where multiprocessing runs this, the exception that ends the process.
        error = _failure(sys.exc_info()[1])
        if error is not None:
            watchdog.fail(error)
        watchdog.leave()

    sys.excepthook = excepthook
    # Unlike atexit it also runs in the children of spawn.
    multiprocessing.util.Finalize(None, finish, exitpriority=0)


def _failure(error: BaseException | None) -> BaseException | None:
    """What the other ranks are told of an exception that ends this one; None: it has finished."""
    if not isinstance(error, SystemExit):
        return error
    if error.code in (None, 0):
        return None
    return error.__context__ or error  # spawn exits with 1 because of an error


def _rendezvous(watchdog: Watchdog, rank: int) -> tuple[str, int]:
    """The address where the watchdogs meet: that of Paddle's own store, the one address that all ranks know.

    The port is free again when Paddle's store needs it. If that store runs already, rank 0 takes another.
    """
    endpoint = os.environ.get("PADDLE_MASTER") or os.environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")[0]
    host, _, port_text = endpoint.rpartition(":")
    if not host or not port_text.isdigit():
        raise RuntimeError(
            f"PADDLE_TRAINERS_NUM={os.environ['PADDLE_TRAINERS_NUM']}, so PADDLE_MASTER or"
            f" PADDLE_TRAINER_ENDPOINTS must give the address of rank 0 as host:port, got {endpoint!r}; start"
            " the ranks with python -m paddle.distributed.launch"
        )
    running = dist.is_initialized()
    port = 0 if running else int(port_text)
    if rank == 0:
        port = watchdog.listen(port)
    if running:
        shared_port = paddle.to_tensor([port], "int64")
        dist.broadcast(shared_port, src=0)
        port = shared_port.item()
    return host, port


def _let_gloo_use_the_route_to(host: str, port: int) -> None:
    """Gloo listens where the host's own name points, often the loopback interface, unless it is told."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an IPv4 address
                request = struct.pack("256s", name.encode())
                if (
                    socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _GET_INTERFACE_ADDRESS, request)[20:24])
                    == address
                ):
                    os.environ["GLOO_SOCKET_IFNAME"] = name


# ---------------------------------------------------------------- building groups


def _build_gloo_groups(
    rank_lists: list[list[int]],
    everyone: Group,
    exchange: Callable[[Any, str], Any],
    waiting: Callable[[str, str], contextlib.AbstractContextManager[None]],
    hosts: Mapping[int, str],
) -> dict[tuple[int, ...], Group]:
    """The groups of this rank, by their global ranks. All ranks of `everyone` call it with the same lists.

    exchange: of watchdog.exchange's kind, over `everyone`. hosts: their addresses, by global rank.

    Paddle connects a gloo group through the keys "0", "1", ... of its store, so two groups on one store read
    each other's addresses. Here the first rank of each group opens a store that serves this group alone.
    """
    rank = everyone.ranks[everyone.rank]
    own_stores = {}
    for index, ranks in enumerate(rank_lists):
        if rank == ranks[0] and 1 < len(ranks) < everyone.nranks:
            own_stores[str(index)] = _open_store(hosts[rank])
    ports_of = exchange({index: port for index, (_, port) in own_stores.items()}, "building groups")

    groups = {}
    for index, ranks in enumerate(rank_lists):
        group_id = collective._new_ring_id()  # on every rank, so that a group has the same id everywhere
        if rank not in ranks:
            continue
        if len(ranks) == everyone.nranks:
            groups[tuple(ranks)] = everyone
            continue
        process_group = None
        if len(ranks) > 1:
            with waiting("world", f"building the group {ranks}"):
                if str(index) in own_stores:
                    store = own_stores[str(index)][0]
                else:
                    store = core.TCPStore(hosts[ranks[0]], ports_of[ranks[0]][str(index)], False, 0)
                process_group = core.ProcessGroupGloo.create(store, ranks.index(rank), len(ranks), group_id)
        groups[tuple(ranks)] = _register(ranks, rank, group_id, process_group)
    return groups


def _use_the_older_store_server() -> None:
    """Paddle 3.3.1's store server on libuv aborts its process now and then when a client disconnects."""
    with contextlib.suppress(ValueError):  # Paddle 2.6 has only the older one
        paddle.set_flags({"FLAGS_tcp_store_using_libuv": False})


def _open_store(host: str) -> tuple[Any, int]:
    """Opens a store on a free port and returns both.

    The port stays reserved until the store listens: Paddle aborts the process when another one has taken it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("", 0))
        port = reserved.getsockname()[1]
        return core.TCPStore(host, port, True, 0), port


def _register(ranks: list[int], rank: int, group_id: int, process_group: Any) -> Group:
    name = f"{collective._default_group_name}{group_id}"
    group = Group(ranks.index(rank), group_id, ranks, pg=process_group, name=name)
    collective._set_group_map(group_id, group)
    collective._set_group_map_by_name(name, group)
    if process_group is not None:
        collective._set_group_map_backend(group, "gloo")
    _add_new_group(group)
    return group


def _build_groups(
    rank_lists: list[list[int]], world_group: Group, watchdog: Watchdog
) -> dict[tuple[int, ...], Group]:
    groups = {}
    for ranks in rank_lists:
        if len(ranks) == world_group.nranks:
            groups[tuple(ranks)] = world_group
            continue
        with watchdog.waiting("world", f"building the group {ranks}"):
            group = dist.new_group(ranks)
            dist.all_reduce(paddle.ones([1], "int32"), group=world_group)
        if world_group.rank in ranks:
            groups[tuple(ranks)] = group
    return groups
