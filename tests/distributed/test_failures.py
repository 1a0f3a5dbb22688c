"""When something goes wrong on one rank, all ranks end soon and say which rank it was."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from launcher import WORKERS, Job, environment, free_ports, launch, read_logs

from paddle_moe import init_distributed
from paddle_moe.watchdog import Watchdog, _Child, _Coordinator, _Member, _Shared

TIMEOUT_SECONDS = 8  # of the ranks in workers/failures.py that reach it
SOON_SECONDS = 20  # from the end of the first rank that fails to that of the last, on a busy machine


# Those of a group run at the same time.
GROUPS = (
    ("hangs", "hangs_in_c", "misses_barrier", "other_order"),
    ("killed", "killed_outside_collectives", "raises", "exits", "finishes_early"),
    ("sizes", "world", "product", "absent"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[[str], Job]:
    """run(what): a job of four ranks, see workers/failures.py."""

    @functools.cache
    def together(group: tuple[str, ...]) -> tuple[Path, Job]:
        directory = tmp_path_factory.mktemp(group[0])
        # The limit leaves a busy machine a minute to start the ranks.
        seconds = 60 + 2 * TIMEOUT_SECONDS
        return directory, launch(directory, WORKERS / "failures.py", *group, ranks=4, seconds=seconds)

    def one(what: str) -> Job:
        directory, all_jobs = together(next(group for group in GROUPS if what in group))
        assert all_jobs.returncode == 0, str(all_jobs)
        said = rf"^{what} ended with (\S+) at (\S+)$"
        ends = [re.search(said, log, re.M).groups() for log in all_jobs.logs]
        codes, times = [int(code) for code, _ in ends], [float(moment) for _, moment in ends]
        job = Job(next(filter(None, codes), 0), all_jobs.seconds, read_logs(directory / what), str(ends))
        failed = [moment for code, moment in zip(codes, times) if code != 0]
        assert not failed or max(times) < min(failed) + SOON_SECONDS, str(job)
        return job

    return one


def assert_ended(job: Job, reason: str, ranks=(0, 1, 2, 3)) -> None:
    assert job.returncode != 0, str(job)
    assert "finished" not in "".join(job.logs), str(job)
    for rank in ranks:
        assert re.search(rf"paddle_moe: rank {rank} ends: {reason}\n", job.logs[rank]), f"rank {rank}: {job}"


def assert_refused(job: Job, reason: str, ranks=(0, 1, 2, 3)) -> None:
    assert job.returncode != 0, str(job)
    for rank in ranks:
        assert re.search(reason, job.logs[rank]), f"rank {rank}: {job}"
        assert "ready" not in job.logs[rank], str(job)


def test_killed_rank(run):
    assert_ended(run("killed"), r"rank 2 \(pid \d+ on \S+\) died")


def test_killed_rank_outside_collectives(run):
    """Rank 0 is special: Paddle's store and the coordinator run on its host."""
    assert_ended(run("killed_outside_collectives"), r"rank 0 \(pid \d+ on \S+\) died")


def test_exception(run):
    job = run("raises")
    assert_ended(job, "rank 1 failed: ValueError: no such expert", ranks=(0, 2, 3))
    assert "Traceback" in job.logs[1]


@pytest.mark.parametrize("what", ["hangs", "hangs_in_c"])
def test_hanging_rank(what, run):
    """Rank 1 waits for rank 3; rank 0, which waits for rank 1, must not blame it."""
    waited = r"waited (\d+) s in all_reduce of the"
    either = rf"rank 1 {waited} ep group \[1, 3\]|rank 2 {waited} tp group \[2, 3\]"
    job = run(what)
    assert_ended(job, f"({either}); rank 3 did not arrive there")
    waits = {int(seconds) for log in job.logs for seconds in re.findall(r" waited (\d+) s in ", log)}
    # The rank that is named may have come a bit later than the one that has waited for all of its limit.
    assert min(waits) >= TIMEOUT_SECONDS / 2, str(job)


def test_rank_that_misses_a_barrier(run):
    assert_ended(run("misses_barrier"), "rank 0 waited in barrier; rank 2 did not arrive there")


def test_ranks_that_wait_for_each_other(run):
    job = run("other_order")
    (reason,) = {re.search(" ends: (.*)\n", log)[1] for log in job.logs}
    assert reason.startswith("the ranks wait for each other: rank 0 ")
    assert re.search(r"rank 1 \d+ s in all_reduce of the tp group \[0, 1\]", reason), reason
    assert re.search(r"rank 3 \d+ s in all_reduce of the ep group \[1, 3\]", reason), reason


def test_rank_that_exits_while_it_is_needed(run):
    assert_ended(run("exits"), ".*; rank 1 left the job without arriving there", ranks=(0, 2, 3))


def test_rank_that_finishes_early_disturbs_nobody(run):
    job = run("finishes_early")
    assert job.returncode == 0, str(job)
    assert all("finished" in log and "paddle_moe:" not in log for log in job.logs), str(job)


@pytest.mark.parametrize(
    "leave, reported",
    [
        (lambda: None, []),
        (lambda: sys.exit(), []),
        (lambda: sys.exit(0), []),
        (lambda: sys.exit(2), ["SystemExit: 2"]),
        (lambda: {}["no such expert"], ["KeyError: 'no such expert'"]),
    ],
)
def test_what_is_a_failure_at_the_end_of_the_block(leave, reported):
    said = []
    context = init_distributed()
    context._watchdog = SimpleNamespace(
        fail=lambda error: said.append(f"{type(error).__name__}: {error}"),
        leave=lambda: said.append("left"),
    )
    with contextlib.suppress(SystemExit, KeyError), context:
        leave()
    assert said == [*reported, "left"]


def test_rank_outside_the_world(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINER_ID", "4")
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "4")
    with pytest.raises(RuntimeError, match="PADDLE_TRAINER_ID must be between 0 and .* = 3, got 4"):
        init_distributed(2, 2)


def test_a_limit_of_numpy(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    monkeypatch.setattr("paddle_moe.distributed.Watchdog", lambda rank, limit: sys.exit(json.dumps(limit)))
    with pytest.raises(SystemExit, match="5.0"):
        init_distributed(2, timeout_seconds=np.int64(5))


def test_ranks_with_different_sizes(run):
    reason = (
        r"ValueError: the ranks of this job do not agree: ep_size=2, tp_size=2, dp_size=1, world_size=4 on"
        r" ranks \[0, 1, 3\]; ep_size=4, tp_size=1, dp_size=1, world_size=4 on rank 2"
    )
    assert_refused(run("sizes"), reason)


def test_rank_with_another_world_size(run):
    reason = (
        r"ValueError: .* world_size=4 on ranks \[0, 1, 3\]; ep_size=2, tp_size=2, dp_size=1, world_size=8"
        r" on rank 2"
    )
    assert_refused(run("world"), reason)


def test_sizes_that_do_not_fit_the_ranks(run):
    reason = r"ValueError: .*, got ep_size=3, tp_size=2, dp_size=1 \(product 6\) and world_size=4"
    assert_refused(run("product"), reason)


def test_rank_that_never_starts(run):
    reason = f"RuntimeError: rank 1 of 4 did not call init_distributed within {TIMEOUT_SECONDS} s"
    assert_refused(run("absent"), reason, ranks=(0, 2, 3))


# ---------------------------------------------------------------- watchdogs alone, without Paddle


def join_and(
    code: str,
    ranks: Sequence[int] = (0, 1, 2),
    before: str = "",
    join: str = "watchdog.join('127.0.0.1', port, {'world_size': size})",
    limit: float = 20,
) -> list[str]:
    """What ranks print that join a job, then run `code`; `before` runs on rank 0 when it listens.

    They begin together, because a busy machine may start one of them seconds after the others.
    """
    (port,) = free_ports(1)
    script = (
        "import json, os, signal, socket, subprocess, sys, time\nfrom paddle_moe.watchdog import Watchdog\n"
        f"rank, size, port = map(int, sys.argv[1:])\nwatchdog = Watchdog(rank, {limit})\n"
        f"if rank == 0:\n    watchdog.listen(port)\n{textwrap.indent(before, '    ')}\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        f"{join}\n{code}\nwatchdog.leave()\nprint('finished')"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, (rank, len(ranks), port))],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ranks
    ]
    try:
        for process in processes:
            said = process.stdout.readline()
            assert said == "ready\n", said + process.stdout.read()
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        return [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_ranks_that_meet_in_different_calls():
    code = (
        "if rank == 0: watchdog.exchange(1, 'starting to save', '/some/where')\n"
        "else: watchdog.exchange(None, 'barrier')"
    )
    reason = (
        r"the ranks do not meet in one call: rank 0 in starting to save /some/where and ranks \[1, 2\] in"
        " barrier; all must make the same calls in the same order\n"
    )
    for rank, said in enumerate(join_and(code)):
        assert re.search(f"paddle_moe: rank {rank} ends: {reason}", said), said
        assert "finished" not in said


def test_a_reason_that_is_no_text_ends_the_ranks_too(tmp_path):
    """As with the name of a file whose bytes are not in UTF-8."""
    log = tmp_path / "log"
    code = (
        f"watchdog.log_to({str(log)!r}, {str(tmp_path / 'events')!r}, {{'rank': rank}})\n"
        "if rank == 1: watchdog.fail(OSError('caf\\udce9')); os._exit(1)\n"
        "watchdog.exchange(None, 'barrier')"
    )
    said, _ = join_and(code, ranks=(0, 1))
    reason = "rank 0 ends: rank 1 failed: OSError: caf\\udce9\n"
    assert said.endswith(f"paddle_moe: {reason}") and reason in log.read_text()


def test_the_reason_is_in_the_log_when_nobody_reads_stderr(tmp_path):
    log, events = tmp_path / "log", tmp_path / "events"
    script = (
        "import os, time\nfrom paddle_moe.watchdog import Watchdog\n"
        "reader, writer = os.pipe()\nos.dup2(writer, 2)\nos.close(reader)\n"
        "watchdog = Watchdog(0, 0.5)\n"
        "watchdog.join('127.0.0.1', watchdog.listen(0), {'world_size': 1})\n"
        f"watchdog.log_to({str(log)!r}, {str(events)!r}, {{'rank': 0}})\n"
        "with watchdog.waiting('ep', 'all_reduce'): time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert "rank 0 ends: rank 0 waited" in log.read_text()
    assert [json.loads(line)["event"] for line in events.read_text().splitlines()] == ["error", "stop"]


def test_a_fork_that_ends_says_nothing_of_its_rank():
    code = (
        "child = os.fork()\n"
        "if child == 0: watchdog.fail(ValueError('no rank')); watchdog.leave(); os._exit(0)\n"
        "os.waitpid(child, 0)\nprint(watchdog.exchange(rank, 'barrier'))"
    )
    assert join_and(code) == ["[0, 1, 2]\nfinished\n"] * 3


def test_a_path_that_differs_between_hosts():
    code = "print(watchdog.exchange(rank, 'loading', f'/host{rank}/files'))"
    assert join_and(code) == ["[0, 1, 2]\nfinished\n"] * 3


@pytest.mark.parametrize(
    "context, does, waits",
    [
        ("watchdog.files()", "open(path, 'a').write('x')", True),
        ("watchdog.files()", "sum(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)[::4096])", True),
        ("watchdog.files()", "pass", False),
        ("contextlib.nullcontext()", "open(path, 'a').write('x')", False),
    ],
    ids=["writes", "reads what is in memory already", "hangs", "writes elsewhere"],
)
def test_a_rank_that_is_at_files_for_longer_than_the_limit(context, does, waits, tmp_path):
    """The others wait for it while it gets on."""
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    code = (
        f"import contextlib, mmap\npath = {str(tmp_path / 'file')!r}\nfile = open(path)\n"
        "if rank == 1:\n"
        f"    with {context}:\n"
        f"        for _ in range(40): time.sleep(0.25); {does}\n"
        "print(watchdog.exchange(rank, 'writing the files of', 'there'))"
    )
    for rank, said in enumerate(join_and(code, limit=4)):
        if waits:
            assert said == "[0, 1, 2]\nfinished\n"
        else:
            reason = "rank [02] waited in writing the files of there; rank 1 did not arrive there"
            assert re.search(f"paddle_moe: rank {rank} ends: {reason}\n", said), said


WITHOUT_ITS_CHILD = """
watchdog.set_groups(dict.fromkeys(("world", "grid", "ep", "tp", "dp"), [0, 1, 2]))

def stop_child(seconds):
    os.kill(watchdog._process.pid, signal.SIGSTOP)
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {watchdog._process.pid}"])

"""


def test_a_rank_whose_child_is_slow_to_answer_is_not_blamed():
    """As on a host with more work than processors."""
    code = WITHOUT_ITS_CHILD + (
        "if rank == 1: time.sleep(60)\n"
        "with watchdog.waiting('ep', 'all_reduce of the ep group'):\n"
        "    if rank == 2: stop_child(3.5)\n"
        "    time.sleep(60)"
    )
    reason = r"rank [02] waited \d+ s in all_reduce of the ep group; rank 1 did not arrive there\n"
    for rank, said in enumerate(join_and(code, limit=2)):
        assert re.search(f"paddle_moe: rank {rank} ends: {reason}", said), said


def test_a_death_that_is_heard_of_late_is_the_reason_all_the_same():
    """Ranks whose collectives it broke are heard of sooner."""
    code = WITHOUT_ITS_CHILD + (
        "*_, pid = watchdog.exchange(os.getpid(), 'exchanging pids')\n"
        "if rank == 2:\n"
        "    stop_child(1.5)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "while ') Z ' not in open(f'/proc/{pid}/stat').read(): time.sleep(0.01)\n"
        "with watchdog.waiting('ep', 'all_reduce of the ep group'):\n"
        "    raise RuntimeError('connection closed by peer')"
    )
    for rank, said in enumerate(join_and(code)):
        assert re.search(rf"paddle_moe: rank {rank} ends: rank 2 \(pid \d+ on \S+\) died\n", said), said


def test_a_rank_that_reaches_itself_tries_again(tmp_path, monkeypatch):
    """Where nobody listens yet, TCP may choose the port that is called for the caller's own end."""
    (port,) = free_ports(1)
    connect, to_itself = socket.create_connection, []

    def connect_to_itself(address, timeout):
        monkeypatch.setattr(socket, "create_connection", connect)
        to_itself.append(socket.socket())
        to_itself[0].bind(address)
        to_itself[0].connect(address)
        return to_itself[0]

    monkeypatch.setattr(socket, "create_connection", connect_to_itself)
    (tmp_path / "shared").write_bytes(bytes(_Shared.SIZE))
    ours, theirs = socket.socketpair()
    with ours, open(tmp_path / "shared", "r+b") as shared:
        options = {"rank": 0, "timeout": 20, "parent": os.getppid()}
        child = _Child({**options, "socket": theirs.detach(), "shared": shared.fileno()})
        child.on_join({"host": "127.0.0.1", "port": port, "config": {"world_size": 1}})
        child.tick()
        assert to_itself and child.coordinator_channel is None
        child.on_listen({"port": port})
        child.tick()
        assert child.coordinator_channel is not None
        for channel in (child.coordinator_channel, child.rank_channel):
            child.close(channel)
        child.coordinator.stop_listening()


def test_ranks_that_were_refused_try_again():
    """On the same port, which the coordinator has let go when all ranks have heard of it."""
    again = (
        "try: watchdog.join('127.0.0.1', port, {'world_size': size, 'ep_size': 1 + (rank == 1)})\n"
        "except ValueError as error: print('refused')\n"
        "first, watchdog = watchdog, Watchdog(rank, 20)  # init_distributed keeps the first one too\n"
        "if rank == 0: watchdog.listen(port)\n"
        "watchdog.join('127.0.0.1', port, {'world_size': size})\n"
    )
    assert join_and("", join=again) == ["refused\nfinished\n"] * 3


MALFORMED = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"[" * 10**5 + b"\n",
    *(
        json.dumps({"type": "join", **fields}).encode() + b"\n"
        for fields in (
            {},
            {"rank": 1, "config": {}, "pid": 1, "host": "h"},
            {"rank": 1, "config": {"world_size": "3"}, "pid": 1, "host": "h"},
            {"rank": 3, "config": {"world_size": 3}, "pid": 1, "host": "h"},
            {"rank": "1", "config": {"world_size": 3}, "pid": 1, "host": "h"},
            {"rank": 1, "config": {"world_size": 3}},
        )
    ),
]


def test_strangers_do_not_disturb_a_job():
    """Each connection is closed, and the ranks join all the same."""
    before = (
        f"for sent in {MALFORMED}:\n"
        "    with socket.create_connection(('127.0.0.1', port), timeout=20) as stranger:\n"
        "        try: stranger.sendall(sent); assert stranger.recv(1) == b''\n"
        "        except ConnectionResetError: pass"
    )
    assert join_and("", before=before) == ["finished\n"] * 3


def test_a_rank_that_comes_twice_is_named_with_its_process():
    """As one that a job before has left behind does."""
    both = r"rank 1 came more than once \(pid \d+ on \S+, pid \d+ on \S+\); "
    for said in join_and("", ranks=(0, 1, 1)):
        assert re.search(f"ValueError: the ranks of this job do not agree: .*; {both}", said), said


def test_ranks_that_disagree_are_named_in_their_order_whoever_comes_first():
    join = (
        "time.sleep(0.0 if rank == 2 else 1.0)\n"
        "watchdog.join('127.0.0.1', port, {'world_size': size, 'ep_size': 3 if rank == 2 else 1})"
    )
    reason = "ep_size=1 on ranks [0, 1]; world_size=3, ep_size=3 on rank 2; start every rank"
    for said in join_and("", join=join):
        assert reason in said, said


def test_ranks_that_come_after_the_refusal_are_named():
    """Not all of them need to be wrong, nor need those that came."""
    coordinator = _Coordinator(selectors.DefaultSelector(), 0, 5)
    for rank in (0, 2):
        config = {"world_size": 4, "ep_size": 2 + rank}
        message = {"rank": rank, "config": config, "pid": 7, "host": "h"}
        coordinator.joined.append(_Member(None, message, ""))
    assert re.search(
        r"ep_size=4 on rank 2; ranks \[1, 3\] had not come by then; ", coordinator.describe_configs()
    )
    coordinator.stop_listening()


def test_the_memory_that_a_rank_shares_has_room_on_the_disk(monkeypatch):
    """Else the rank would get a SIGBUS from the first collective on."""
    make, kept = tempfile.TemporaryFile, []

    def temporary_file():
        file = make()
        kept.append(os.dup(file.fileno()))
        return file

    monkeypatch.setattr(tempfile, "TemporaryFile", temporary_file)
    Watchdog(0, 5).leave()
    assert 512 * os.fstat(kept[0]).st_blocks >= _Shared.SIZE
    os.close(kept[0])


ENTERS_AND_LEAVES = """
import sys
from paddle_moe.watchdog import _Shared

with open(sys.argv[1], "r+b") as file:
    shared = _Shared(file.fileno())
count = 0
while True:
    for _ in range(1000):
        count += 1
        shared.enter("ep", count, "call " + "x" * (count % 60))
        shared.leave("ep", count)
    print(count, flush=True)
"""


def test_a_child_never_sees_half_of_an_entry(tmp_path):
    """It would end a job whose ranks are all well. In two processes: threads of Python take turns."""
    path = tmp_path / "shared"
    path.write_bytes(bytes(_Shared.SIZE))
    with open(path, "r+b") as file:
        shared = _Shared(file.fileno())
    command = [sys.executable, "-c", ENTERS_AND_LEAVES, path]
    seen = waiting = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as writer:
        try:
            assert int(writer.stdout.readline()) == 1000
            end = time.monotonic() + 3
            while time.monotonic() < end:
                entered, left, since, what = shared.read()["ep"]
                # Of a rank that never pauses the second may be of a later moment.
                assert entered - left <= 1 and entered >= seen, (entered, left, seen)
                assert time.monotonic() - since < 20 and what.startswith("call "), (since, what)
                seen, waiting = entered, waiting + (entered > left)
        finally:
            writer.kill()
    assert seen > 10_000 and waiting > 10, (seen, waiting)
    assert shared.read()["tp"] == (0, 0, 0.0, "")
