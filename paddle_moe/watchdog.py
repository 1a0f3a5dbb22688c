"""Watches the ranks of a job: when one dies, fails or does not arrive, all of them end and say which it was.

Every rank starts this file as a child process that uses the standard library only. A thread would not do:
Paddle holds Python's global lock while its store waits for other ranks, and a rank that hangs may hold it
for ever.

    rank's process                         its child                                 child of rank 0
    Watchdog  -- a pair of sockets -->     _Child  -- TCP, to the master address --> _Coordinator
              -- shared counters ---->

A connection that closes without a goodbye is a dead rank, so a slow rank is never taken for a dead one.
Collectives cost no message: a rank counts them in shared memory, which its child reads a few times a second.
Messages are JSON objects, one per line. Nothing here imports Paddle.
"""

from __future__ import annotations

import collections
import contextlib
import json
import mmap
import os
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

SLOTS = ("world", "grid", "ep", "tp", "dp")  # one counter of collectives for each group of a rank

_TICK_SECONDS = 0.25
# How long causes are gathered, so that a death is named before the errors that it caused.
_GATHER_SECONDS = 0.3
# Deaths further apart are consequences: a launcher ends the ranks when one has died.
_SAME_MOMENT_SECONDS = 0.05
_STRAGGLER_SECONDS = 2.0  # how long a refused job waits for the ranks that it has not heard of yet
_GRACE_SECONDS = 5.0  # for the last words of a process that is ending anyway


# ---------------------------------------------------------------- shared by a rank and its child


class _Shared:
    """What a rank says of its collectives, in memory that its child reads at any moment.

    Of each slot: how many the rank has entered and left, time.monotonic() of the last entry, and what it is.
    Numbers have 8 bytes, which a processor stores at once. That of those entered is stored last, when the
    rest belongs to it: a child that saw half of an entry would take the rank for one that waits since long.
    """

    _WORDS, _TEXT = 13, 24  # of a slot, 8 bytes each; where in it the text begins
    _IN_FILES = 8 * _WORDS * len(SLOTS)  # one byte: whether the rank is at files
    SIZE = _IN_FILES + 8

    def __init__(self, file: int):
        self._bytes = mmap.mmap(file, self.SIZE)
        self._counts, self._times = memoryview(self._bytes).cast("Q"), memoryview(self._bytes).cast("d")

    def enter(self, slot: str, count: int, what: str) -> None:
        first = self._WORDS * SLOTS.index(slot)
        start, end = 8 * first + self._TEXT, 8 * (first + self._WORDS)
        self._bytes[start:end] = what.encode()[: end - start].ljust(end - start, b"\0")
        self._times[first + 2] = time.monotonic()
        self._counts[first] = count

    def leave(self, slot: str, count: int) -> None:
        self._counts[self._WORDS * SLOTS.index(slot) + 1] = count

    def read(self) -> dict[str, tuple[int, int, float, str]]:
        """All slots at one moment: read until they are twice the same, unless the rank never pauses."""
        last, again = None, self._read()
        for _ in range(100):
            last, again = again, self._read()
            if last == again:
                break
        return again

    def _read(self) -> dict[str, tuple[int, int, float, str]]:
        slots = {}
        for number, slot in enumerate(SLOTS):
            first = self._WORDS * number
            entered, left, since = self._counts[first], self._counts[first + 1], self._times[first + 2]
            text = self._bytes[8 * first + self._TEXT : 8 * (first + self._WORDS)]
            slots[slot] = entered, left, since, text.rstrip(b"\0").decode(errors="replace")
        return slots

    @property
    def is_in_files(self) -> bool:
        return bool(self._bytes[self._IN_FILES])

    @is_in_files.setter
    def is_in_files(self, value: bool) -> None:
        self._bytes[self._IN_FILES] = value


# ---------------------------------------------------------------- in the rank's process


class Watchdog:
    """A rank's handle on its child process.

    Args:
        rank: of this process, 0 or more.
        timeout_seconds: how long this rank waits for the others, in `join`, `exchange` and `waiting`.
    """

    def __init__(self, rank: int, timeout_seconds: float):
        self._counters = {slot: 0 for slot in SLOTS}
        self._owner = os.getpid()  # a fork that ends says nothing of the rank
        with tempfile.TemporaryFile() as file:
            os.posix_fallocate(file.fileno(), 0, _Shared.SIZE)  # on a full disk an error, no SIGBUS later
            self._shared = _Shared(file.fileno())
            ours, theirs = socket.socketpair()
            options = {
                "rank": rank,
                "timeout": timeout_seconds,
                "parent": self._owner,
                "socket": theirs.fileno(),
                "shared": file.fileno(),
            }
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", os.path.abspath(__file__), json.dumps(options)],
                pass_fds=(theirs.fileno(), file.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # it must outlive a Ctrl-C long enough to say why the others end
            )
            theirs.close()
        self._channel = _Channel(ours)

    def listen(self, port: int) -> int:
        """Rank 0 only: makes the child the coordinator, on `port` or, for 0, any free one. Returns the port.

        Raises:
            RuntimeError: the port is taken.
        """
        return self._ask("port", type="listen", port=port)

    def join(self, host: str, port: int, config: dict[str, Any]) -> list[str]:
        """Waits until all config["world_size"] ranks have joined with the same config.

        Returns the address of every rank's host as seen from rank 0; "" for rank 0's own host.

        Raises:
            ValueError: the ranks have different configs; the text names the ranks and their values.
            RuntimeError: rank 0 cannot be reached, or a rank does not join within timeout_seconds.
        """
        return self._ask("hosts", type="join", host=host, port=port, config=config)

    def exchange(self, value: Any, what: str, detail: str = "") -> list[Any]:
        """Waits for every rank and returns the values of all, by rank.

        What the ranks are doing must be the same on all, or all of them end; `detail` is for messages only.
        """
        return self._ask("values", type="exchange", value=value, what=what, detail=detail)

    @contextlib.contextmanager
    def files(self) -> Iterator[None]:
        """Around the reading or writing of files, which one rank may be at for much longer than another.

        While the process reads and writes, no limit of the others counts.
        """
        self._shared.is_in_files = True
        try:
            yield
        finally:
            self._shared.is_in_files = False

    def set_groups(self, groups: dict[str, list[int]]) -> None:
        """The global ranks in the groups of this rank, by slot."""
        self._channel.send(type="groups", groups=groups)

    def log_to(self, log_path: str, events_path: str, place: dict[str, int]) -> None:
        """Has the reason of an end also appended to the two log files of this rank, which name its place."""
        self._channel.send(type="log", log=log_path, events=events_path, place=place)

    @contextlib.contextmanager
    def waiting(self, slot: str, what: str) -> Iterator[None]:
        """Around a call that returns when all ranks of a group make it; timeout_seconds later all end."""
        self._counters[slot] += 1
        count = self._counters[slot]
        self._shared.enter(slot, count, what)
        try:
            yield
        except (RuntimeError, OSError) as error:
            # The transport gave up, most likely because of another rank: the coordinator finds out which,
            # and the child then ends this process.
            self._channel.send(type="broken", error=_first_line(error))
            self._channel.wait_for_end(2 * _GRACE_SECONDS)
            raise
        finally:
            self._shared.leave(slot, count)

    def fail(self, error: BaseException) -> None:
        """Tells the other ranks that this one ends with `error`."""
        if os.getpid() != self._owner:
            return
        self._channel.send(type="failed", error=f"{type(error).__name__}: {_first_line(error)}")

    def leave(self) -> None:
        """Tells the other ranks that this one has finished; what happens to it next is not their concern."""
        if os.getpid() != self._owner:
            return
        self._channel.send(type="leave")
        self._channel.wait_for_end(_GRACE_SECONDS)

    def _ask(self, answer: str, **message: Any) -> Any:
        self._channel.send(**message)
        reply = self._channel.wait()
        if reply is None:
            raise RuntimeError("the watchdog process of this rank has ended; was it killed?")
        if "error" in reply:
            raise (ValueError if reply["type"] == "mismatch" else RuntimeError)(reply["error"])
        return reply[answer]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
    return lines[0][:500] if lines else ""


class _Channel:
    """JSON objects, one per line, over a stream socket."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self._received = b""

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # a closed connection is noticed, and reported, where it is read
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The complete messages that one read brings; None at the end of the stream, or if it is no JSON."""
        try:
            data = self.socket.recv(1 << 16)
            *lines, self._received = (self._received + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError, RecursionError):
            return None
        return messages if data and all(isinstance(message, dict) for message in messages) else None

    def wait(self) -> dict[str, Any] | None:
        messages: list[dict[str, Any]] | None = []
        while messages == []:
            messages = self.receive()
        return messages[0] if messages else None

    def wait_for_end(self, seconds: float) -> None:
        self.socket.settimeout(seconds)
        while self.receive() is not None:
            pass
        self.socket.settimeout(None)


# ---------------------------------------------------------------- in the child process


class _Child:
    """Speaks for one rank: tells the coordinator what happens here, and ends the rank when it is told to."""

    def __init__(self, options: dict[str, Any]):
        self.rank = options["rank"]
        self.timeout = options["timeout"]
        self.parent = options["parent"]
        self.selector = selectors.DefaultSelector()
        self.shared = _Shared(options["shared"])
        self.rank_channel = _Channel(socket.socket(fileno=options["socket"]))
        self.selector.register(self.rank_channel.socket, selectors.EVENT_READ, self.hear_rank)
        self.coordinator: _Coordinator | None = None
        self.coordinator_channel: _Channel | None = None
        self.join: dict[str, Any] | None = None  # the pending request, until a connection stands
        self.join_deadline = 0.0
        self.groups = {slot: [self.rank] for slot in SLOTS}
        self.departed: dict[int, dict[str, int]] = {}  # what the ranks that have left had counted
        self.reported: set[tuple[str, int]] = set()
        self.log: dict[str, Any] | None = None
        self.progress, self.looked_at = "", 0.0
        self.failed = False
        self.parent_gone_since: float | None = None
        self.done = False

    def run(self) -> None:
        while not self.done or (self.coordinator is not None and not self.coordinator.finished()):
            for key, _ in self.selector.select(_TICK_SECONDS):
                if key.fileobj.fileno() >= 0:  # not closed by the call before
                    key.data()
            if not self.done:
                self.tick()
            if self.coordinator is not None:
                self.coordinator.tick()

    def tick(self) -> None:
        now = time.monotonic()
        if self.parent_gone_since is not None:
            if now - self.parent_gone_since > _GRACE_SECONDS:
                self.done = True
            return
        if os.getppid() != self.parent:  # a forked child of the rank may keep our socket open
            self.hear_rank()  # its last words
            self.on_parent_gone()
        elif self.join is not None:
            self.connect(now)
        elif self.coordinator_channel is not None:
            if self.shared.is_in_files and now - self.looked_at > self.timeout / 8:
                before, self.progress, self.looked_at = self.progress, _progress(self.parent), now
                if self.progress != before:
                    self.coordinator_channel.send(type="moved")
            for slot, wait in self.waits().items():
                hopeless = any(counts[slot] < wait["count"] for counts in self.departed_from(wait["ranks"]))
                limit = _STRAGGLER_SECONDS if hopeless else self.timeout
                if wait["seconds"] > limit and (slot, wait["count"]) not in self.reported:
                    self.reported.add((slot, wait["count"]))
                    self.coordinator_channel.send(type="stuck", error="")

    def departed_from(self, ranks: list[int]) -> list[dict[str, int]]:
        return [self.departed[rank] for rank in ranks if rank in self.departed]

    def counts(self) -> dict[str, int]:
        return {slot: entered for slot, (entered, _, _, _) in self.shared.read().items()}

    def waits(self) -> dict[str, dict[str, Any]]:
        """The collectives that this rank is in, by slot: at most one, unless user code uses threads."""
        return {
            slot: {
                "ranks": self.groups[slot],
                "count": entered,
                "seconds": time.monotonic() - since,
                "what": what,
            }
            for slot, (entered, left, since, what) in self.shared.read().items()
            if entered > left
        }

    # what the rank says

    def on_rank_readable(self) -> None:
        messages = self.rank_channel.receive()
        if messages is None:
            self.on_parent_gone()
            return
        for message in messages:
            getattr(self, "on_" + message["type"])(message)

    def hear_rank(self) -> None:
        """Passes on all that the rank has said, and its end, which no answer of this child may overtake."""
        while self.rank_channel.socket.fileno() >= 0:
            if not select.select([self.rank_channel.socket], [], [], 0)[0]:
                return
            self.on_rank_readable()

    def on_listen(self, message: dict[str, Any]) -> None:
        try:
            self.coordinator = _Coordinator(self.selector, message["port"], self.timeout)
        except OSError as error:
            text = f"rank 0 cannot listen on port {message['port']} of its host: {error}; use another port"
            self.rank_channel.send(type="refused", error=text)
        else:
            self.rank_channel.send(type="listening", port=self.coordinator.port)

    def on_join(self, message: dict[str, Any]) -> None:
        self.join, self.join_deadline = message, time.monotonic() + self.timeout

    def connect(self, now: float) -> None:
        host, port = self.join["host"], self.join["port"]
        try:
            connection = socket.create_connection((host, port), timeout=1.0)
            if connection.getsockname() == connection.getpeername():
                _drop(connection)
                raise ConnectionRefusedError("nobody listens there")
        except OSError as error:
            if now > self.join_deadline:
                text = (
                    f"rank {self.rank} got no answer from rank 0 at {host}:{port} within {self.timeout:g} s"
                    f" ({error}); is rank 0 running, and does this host reach that address?"
                )
                self.join = None
                self.rank_channel.send(type="refused", error=text)
            return
        connection.settimeout(_GRACE_SECONDS)
        _detect_lost_host(connection)
        self.coordinator_channel = _Channel(connection)
        self.selector.register(connection, selectors.EVENT_READ, self.on_coordinator_readable)
        self.coordinator_channel.send(
            type="join",
            rank=self.rank,
            config=self.join["config"],
            pid=self.parent,
            host=socket.gethostname(),
        )
        self.join = None

    def on_exchange(self, message: dict[str, Any]) -> None:
        self.coordinator_channel.send(**message)

    def on_groups(self, message: dict[str, Any]) -> None:
        self.groups = message["groups"]

    def on_log(self, message: dict[str, Any]) -> None:
        self.log = message

    def on_broken(self, message: dict[str, Any]) -> None:
        self.coordinator_channel.send(type="stuck", error=message["error"])

    def on_failed(self, message: dict[str, Any]) -> None:
        self.failed = True
        if self.coordinator_channel is not None:
            self.coordinator_channel.send(**message)

    def on_leave(self, message: dict[str, Any]) -> None:
        if self.coordinator_channel is not None:
            self.coordinator_channel.send(type="leave", counts=self.counts())
            self.close(self.coordinator_channel)
            self.coordinator_channel = None
        self.close(self.rank_channel)
        self.done = True

    def on_parent_gone(self) -> None:
        self.close(self.rank_channel)
        if self.coordinator_channel is None:
            self.done = True
        elif self.parent_gone_since is None:
            self.parent_gone_since = time.monotonic()
            self.coordinator_channel.send(type="died")

    # what the coordinator says

    def on_coordinator_readable(self) -> None:
        messages = self.coordinator_channel.receive()
        if messages is None:
            self.end_rank("lost the connection to rank 0, or to its host")
            return
        for message in messages:
            if message["type"] == "end":
                self.end_rank(message["reason"])
                return
            if message["type"] == "departed":
                self.departed[message["rank"]] = message["counts"]
            elif message["type"] == "state?":
                self.hear_rank()
                if self.coordinator_channel is None:  # the rank has left
                    return
                self.coordinator_channel.send(type="state", counts=self.counts(), waits=self.waits())
            else:
                self.rank_channel.send(**message)
                if "error" in message:
                    self.close(self.coordinator_channel)
                    self.coordinator_channel = None
                    return

    def end_rank(self, reason: str) -> None:
        self.close(self.coordinator_channel)
        self.done = True
        text = f"rank {self.rank} ends: {reason}"
        # Neither a full disk, nor a stderr that nobody reads, nor a name of a file that is no text must keep
        # the rank alive.
        with contextlib.suppress(OSError):
            os.write(2, f"\npaddle_moe: {text}\n".encode(errors="backslashreplace"))
        with contextlib.suppress(OSError):
            self.write_log(text)
        deadline = time.monotonic() + (_GRACE_SECONDS if self.failed else 0.0)  # it may be printing its error
        while os.getppid() == self.parent and time.monotonic() < deadline:
            time.sleep(0.05)
        if os.getppid() == self.parent:
            with contextlib.suppress(OSError):
                self.write_event("stop", killed_by="watchdog")
            os.kill(self.parent, signal.SIGKILL)

    def write_log(self, text: str) -> None:
        if self.log is None:
            return
        now = time.time()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now)) + f",{int(now * 1000) % 1000:03d}"
        position = " ".join(f"{name} {rank}" for name, rank in self.log["place"].items())
        with open(self.log["log"], "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{stamp} [ERROR] {position}: {text}\n")
        self.write_event("error", message=text)

    def write_event(self, name: str, **fields: Any) -> None:
        """Appends what RankLogger.event() would, which the rank itself may not come to any more."""
        if self.log is None:
            return
        event = {"time": time.time(), **self.log["place"], "event": name, "pid": self.parent, **fields}
        with open(self.log["events"], "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def close(self, channel: _Channel) -> None:
        if channel.socket.fileno() >= 0:
            self.selector.unregister(channel.socket)
            channel.socket.close()


def _progress(process: int) -> str:
    """Changes while a process reads or writes: its bytes so far, and its page faults, for mapped files.

    Where the system does not tell, it changes always: a rank that is stuck in a file is then waited for.
    """
    try:
        with open(f"/proc/{process}/io") as moved, open(f"/proc/{process}/stat") as stat:
            faults = stat.read().rpartition(")")[2].split()[7:11:2]  # minor and major ones
            return moved.read() + " ".join(faults)
    except OSError:
        return str(time.monotonic())


def _is_join(message: dict[str, Any]) -> bool:
    """Anyone who reaches the port may send anything."""
    rank, config = message.get("rank"), message.get("config")
    world_size = config.get("world_size") if isinstance(config, dict) else None
    return (
        message.get("type") == "join"
        and {"pid", "host"} <= message.keys()
        and isinstance(rank, int)
        and isinstance(world_size, int)
        and 0 <= rank < world_size
    )


class _Member:
    """What the coordinator knows about one rank."""

    def __init__(self, channel: _Channel, message: dict[str, Any], host: str):
        self.channel = channel
        self.rank = message["rank"]
        self.config = message["config"]
        self.process = f"pid {message['pid']} on {message['host']}"
        self.name = f"rank {self.rank} ({self.process})"
        self.host = host
        self.active = True
        self.moved_at = 0.0  # when it was last seen to get on with files
        self.error: str | None = None
        self.counts: dict[str, int] = {}  # of the collectives entered so far; known once asked for
        self.waits: dict[str, dict[str, Any]] = {}


class _Coordinator:
    """Lets all ranks in together or none, and turns what they report into one reason for all."""

    def __init__(self, selector: selectors.BaseSelector, port: int, timeout: float):
        self.selector = selector
        self.timeout = timeout
        self.listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("", port))
        self.listener.listen(1024)
        self.port = self.listener.getsockname()[1]
        selector.register(self.listener, selectors.EVENT_READ, self.on_connect)
        self.open_channels: set[_Channel] = set()
        self.joined: list[_Member] = []
        self.accepted = False
        self.refusal: str | None = None
        self.refuse_at = time.monotonic() + timeout
        self.exchanges: dict[int, dict[str, Any]] = {}  # the ranks that are in one, and with what
        self.exchange_since = 0.0
        self.causes: list[tuple[int, str]] = []  # (priority, text), lower is nearer the root
        self.first_death: float | None = None
        self.stuck: tuple[_Member, str] | None = None
        self.asked: list[_Member] = []  # where they are, without an answer yet
        self.answers_until = 0.0
        self.end_at: float | None = None
        self.ended_at: float | None = None

    def finished(self) -> bool:
        now = time.monotonic()
        if self.ended_at is not None:
            return not self.open_channels or now > self.ended_at + _GRACE_SECONDS
        return not self.open_channels and (self.accepted or self.refusal is not None)

    # joining

    def on_connect(self) -> None:
        connection, address = self.listener.accept()
        connection.settimeout(_GRACE_SECONDS)
        _detect_lost_host(connection)
        channel = _Channel(connection)
        self.open_channels.add(channel)
        host = "" if address[0].startswith("127.") else address[0]
        self.selector.register(
            connection, selectors.EVENT_READ, lambda: self.on_stranger_readable(channel, host)
        )

    def on_stranger_readable(self, channel: _Channel, host: str) -> None:
        messages = channel.receive()
        if messages is None or not all(map(_is_join, messages)):
            self.close(channel)
        elif messages:
            member = _Member(channel, messages[0], host)
            self.selector.modify(
                channel.socket, selectors.EVENT_READ, lambda: self.on_member_readable(member)
            )
            self.joined.append(member)
            self.consider_joined(member)

    def consider_joined(self, member: _Member) -> None:
        world_size = max(one.config["world_size"] for one in self.joined)
        if self.refusal is not None:
            member.channel.send(type="mismatch", error=self.describe_configs())
        elif len(self.configs()) > 1 or len({one.rank for one in self.joined}) < len(self.joined):
            self.refuse_at = time.monotonic() + (_STRAGGLER_SECONDS if len(self.joined) < world_size else 0.0)
        elif len(self.joined) == world_size:
            self.accept()

    def accept(self) -> None:
        self.stop_listening()  # Paddle's own store listens on this port next
        self.accepted = True
        self.joined.sort(key=lambda member: member.rank)
        for member in self.joined:
            member.channel.send(type="joined", hosts=[one.host for one in self.joined])

    def stop_listening(self) -> None:
        self.selector.unregister(self.listener)
        self.listener.close()

    def configs(self) -> dict[str, list[int]]:
        ranks_of: dict[str, list[int]] = collections.defaultdict(list)
        for member in sorted(self.joined, key=lambda member: member.rank):
            ranks_of[", ".join(f"{name}={value}" for name, value in member.config.items())].append(
                member.rank
            )
        return ranks_of

    def describe_configs(self) -> str:
        values = "; ".join(f"{text} on {_ranks(ranks)}" for text, ranks in self.configs().items())
        processes_of: dict[int, list[str]] = collections.defaultdict(list)
        for member in self.joined:
            processes_of[member.rank].append(member.process)
        twice = "".join(
            f"; rank {rank} came more than once ({', '.join(processes)})"
            for rank, processes in sorted(processes_of.items())
            if len(processes) > 1
        )
        known = range(min(one.config["world_size"] for one in self.joined))
        absent = [rank for rank in known if rank not in processes_of]
        late = f"; {_ranks(absent)} had not come by then" if absent else ""
        return (
            f"the ranks of this job do not agree: {values}{twice}{late}; start every rank with the same sizes"
        )

    def refuse(self) -> None:
        world_size = max((one.config["world_size"] for one in self.joined), default=0)
        present = {one.rank for one in self.joined}
        missing = sorted(set(range(world_size)) - present)
        if len(self.configs()) > 1 or len(present) < len(self.joined) or not missing:
            kind, self.refusal = "mismatch", self.describe_configs()
            if not missing:  # nobody has still to be told, and the ranks may try again
                self.stop_listening()
        else:
            kind = "absent"
            self.refusal = (
                f"{_ranks(missing)} of {world_size} did not call init_distributed within {self.timeout:g} s"
            )
        for member in self.joined:
            member.channel.send(type=kind, error=self.refusal)

    # after joining

    def on_member_readable(self, member: _Member) -> None:
        messages = member.channel.receive()
        if messages is None:
            self.on_died(member, {})
            self.close(member.channel)
            return
        for message in messages:
            getattr(self, "on_" + message["type"])(member, message)

    def on_exchange(self, member: _Member, message: dict[str, Any]) -> None:
        if not self.exchanges:
            self.exchange_since = time.monotonic()
        self.exchanges[member.rank] = message
        if len(self.exchanges) == len(self.joined):
            if len({message["what"] for message in self.exchanges.values()}) > 1:
                self.add_cause(1, self.describe_exchanges())
                return
            values = [self.exchanges[rank]["value"] for rank in range(len(self.joined))]
            self.exchanges = {}
            for member in self.joined:
                member.channel.send(type="values", values=values)

    def exchange_deadline(self) -> float:
        absent = [one for one in self.joined if one.rank not in self.exchanges]
        if not all(one.active for one in absent):
            return 0.0  # it will not come any more
        return max([self.exchange_since, *(one.moved_at for one in absent)]) + self.timeout

    def describe_exchanges(self) -> str:
        ranks_of: dict[str, list[int]] = collections.defaultdict(list)
        for rank in sorted(self.exchanges):
            ranks_of[self.where_exchanging(rank)].append(rank)
        places = " and ".join(f"{_ranks(ranks)} in {where}" for where, ranks in ranks_of.items())
        return f"the ranks do not meet in one call: {places}; all must make the same calls in the same order"

    def where_exchanging(self, rank: int) -> str:
        return " ".join(filter(None, (self.exchanges[rank]["what"], self.exchanges[rank]["detail"])))

    def on_failed(self, member: _Member, message: dict[str, Any]) -> None:
        member.error = message["error"]
        self.add_cause(1, f"rank {member.rank} failed: {message['error']}")

    def on_died(self, member: _Member, message: dict[str, Any]) -> None:
        if not self.accepted and self.refusal is None:
            self.joined.remove(member)
        elif member.active and member.error is None and self.accepted:
            now = time.monotonic()
            self.first_death = self.first_death or now
            if now - self.first_death < _SAME_MOMENT_SECONDS:
                self.add_cause(0, f"{member.name} died")
        member.active = False

    def on_leave(self, member: _Member, message: dict[str, Any]) -> None:
        member.active, member.counts = False, message["counts"]
        for other in self.joined:
            if other.active:
                other.channel.send(type="departed", rank=member.rank, counts=member.counts)

    def on_moved(self, member: _Member, message: dict[str, Any]) -> None:
        member.moved_at = time.monotonic()

    def on_stuck(self, member: _Member, message: dict[str, Any]) -> None:
        if self.stuck is None:
            self.find_stuck(member, message["error"])

    def find_stuck(self, member: _Member, error: str) -> None:
        """Asks all ranks where they are; `end_all` uses the answers unless a cause turns up meanwhile."""
        self.stuck = member, error
        self.asked = [other for other in self.joined if other.active]
        for other in self.asked:
            other.channel.send(type="state?")
        now = time.monotonic()
        self.answers_until = now + _GRACE_SECONDS
        self.end_at = self.end_at or now + 2 * _GATHER_SECONDS

    def on_state(self, member: _Member, message: dict[str, Any]) -> None:
        member.counts, member.waits = message["counts"], message["waits"]
        self.asked.remove(member)

    def may_end(self, now: float) -> bool:
        """Not while answers are missing: a rank whose child is slow would be taken for the one to blame."""
        if self.end_at is None or now <= self.end_at:
            return False
        answered = not any(member.active for member in self.asked)
        return answered or bool(self.causes) or now > self.answers_until

    def add_cause(self, priority: int, text: str) -> None:
        now = time.monotonic()
        if not self.causes:
            self.end_at = now + _GATHER_SECONDS
        if now <= self.end_at:
            self.causes.append((priority, text))

    def tick(self) -> None:
        now = time.monotonic()
        if not self.accepted:
            if self.refusal is None and now > self.refuse_at:
                self.refuse()
            return
        if self.exchanges and now > self.exchange_deadline() and self.stuck is None:
            self.find_stuck(self.joined[min(self.exchanges)], "")
        if self.ended_at is None and self.may_end(now):
            self.end_all(now)

    def end_all(self, now: float) -> None:
        if self.causes:
            reason = "; ".join(text for _, text in sorted(self.causes, key=lambda cause: cause[0]))
        else:
            reason = self.describe_stuck(*self.stuck)
        for channel in list(self.open_channels):
            channel.send(type="end", reason=reason)
        self.ended_at = now

    def describe_stuck(self, member: _Member, error: str) -> str:
        """Follows the ranks that wait for each other to one that waits for a rank that does not wait."""
        seen = set()
        while True:
            seen.add(member.rank)
            where, absent = self.where_waiting(member)
            guilty = [other for other in absent if not self.where_waiting(other)[0]]
            waiting = [other for other in absent if other.rank not in seen]
            if guilty or not waiting:
                break
            member, error = waiting[0], ""
        text = f"rank {member.rank} waited {where}" + (f" until it failed ({error})" if error else "")
        if guilty:
            gone = [other.rank for other in guilty if not other.active]
            running = [other.rank for other in guilty if other.active]
            parts = [f"{_ranks(gone)} left the job without arriving there"] if gone else []
            return f"{text}; " + " and ".join(
                parts + ([f"{_ranks(running)} did not arrive there"] if running else [])
            )
        if absent:
            places = [(one.rank, self.where_waiting(one)[0]) for one in self.joined]
            return "the ranks wait for each other: " + "; ".join(
                f"rank {r} {where}" for r, where in places if where
            )
        return f"{text}; all its ranks arrived, but the transport between them did not finish"

    def where_waiting(self, member: _Member) -> tuple[str, list[_Member]]:
        """Where a rank waits, "" if it does not, and which ranks have not arrived there."""
        if member.rank in self.exchanges:
            absent = [other for other in self.joined if other.rank not in self.exchanges]
            return f"in {self.where_exchanging(member.rank)}", absent
        for slot, wait in member.waits.items():
            others = [self.joined[rank] for rank in wait["ranks"]]
            absent = [other for other in others if other.counts.get(slot, 0) < wait["count"]]
            return f"{wait['seconds']:.0f} s in {wait['what']}", absent
        return "", []

    def close(self, channel: _Channel) -> None:
        self.open_channels.discard(channel)
        self.selector.unregister(channel.socket)
        channel.socket.close()


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {sorted(ranks)}"


def _drop(connection: socket.socket) -> None:
    """Closes a connection to itself, at once, because rank 0 cannot listen on its port meanwhile.

    TCP makes one where nobody listens, when it happens to take that very port for the caller's end.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _detect_lost_host(connection: socket.socket) -> None:
    """Has the kernel close the connection when the other host has been silent for about 25 seconds."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", 10),
        ("TCP_KEEPINTVL", 5),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 25000),
    ):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


if __name__ == "__main__":
    _Child(json.loads(sys.argv[1])).run()
