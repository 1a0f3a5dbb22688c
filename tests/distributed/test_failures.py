"""When something goes wrong on one rank, all ranks end soon and say which rank it was."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from launcher import WORKERS, Job, launch

from paddle_moe import init_distributed

TIMEOUT_SECONDS = 8  # of the ranks in workers/failures.py


def run(what: str, directory: Path) -> Job:
    """The limit leaves a busy machine a minute to start four ranks."""
    return launch(directory, WORKERS / "failures.py", what, ranks=4, seconds=60 + 2 * TIMEOUT_SECONDS)


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


def test_killed_rank(tmp_path):
    assert_ended(run("killed", tmp_path), r"rank 2 \(pid \d+ on \S+\) died")


def test_killed_rank_outside_collectives(tmp_path):
    """Rank 0 is special: Paddle's store and the coordinator run on its host."""
    assert_ended(run("killed_outside_collectives", tmp_path), r"rank 0 \(pid \d+ on \S+\) died")


def test_exception(tmp_path):
    job = run("raises", tmp_path)
    assert_ended(job, "rank 1 failed: ValueError: no such expert", ranks=(0, 2, 3))
    assert "Traceback" in job.logs[1]


@pytest.mark.parametrize("what", ["hangs", "hangs_in_c"])
def test_hanging_rank(what, tmp_path):
    """Rank 1 waits for rank 3; rank 0, which waits for rank 1, must not blame it."""
    waited = rf"waited {TIMEOUT_SECONDS} s in all_reduce of the"
    either = rf"rank 1 {waited} ep group \[1, 3\]|rank 2 {waited} tp group \[2, 3\]"
    assert_ended(run(what, tmp_path), f"({either}); rank 3 did not arrive there")


def test_rank_that_misses_a_barrier(tmp_path):
    assert_ended(run("misses_barrier", tmp_path), "rank 0 waited in barrier; rank 2 did not arrive there")


def test_ranks_that_wait_for_each_other(tmp_path):
    (reason,) = {log.partition(" ends: ")[2].strip() for log in run("other_order", tmp_path).logs}
    assert reason.startswith("the ranks wait for each other: rank 0 ")
    assert re.search(r"rank 1 \d+ s in all_reduce of the tp group \[0, 1\]", reason), reason
    assert re.search(r"rank 3 \d+ s in all_reduce of the ep group \[1, 3\]", reason), reason


def test_rank_that_exits_while_it_is_needed(tmp_path):
    assert_ended(run("exits", tmp_path), ".*; rank 1 left the job without arriving there", ranks=(0, 2, 3))


def test_rank_that_finishes_early_disturbs_nobody(tmp_path):
    job = run("finishes_early", tmp_path)
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


def test_ranks_with_different_sizes(tmp_path):
    reason = (
        r"ValueError: the ranks of this job do not agree: ep_size=2, tp_size=2, dp_size=1, world_size=4 on"
        r" ranks \[0, 1, 3\]; ep_size=4, tp_size=1, dp_size=1, world_size=4 on rank 2"
    )
    assert_refused(run("sizes", tmp_path), reason)


def test_rank_with_another_world_size(tmp_path):
    reason = (
        r"ValueError: .* world_size=4 on ranks \[0, 1, 3\]; ep_size=2, tp_size=2, dp_size=1, world_size=8"
        r" on rank 2"
    )
    assert_refused(run("world", tmp_path), reason)


def test_sizes_that_do_not_fit_the_ranks(tmp_path):
    reason = r"ValueError: .*, got ep_size=3, tp_size=2, dp_size=1 \(product 6\) and world_size=4"
    assert_refused(run("product", tmp_path), reason)


def test_rank_that_never_starts(tmp_path):
    reason = f"RuntimeError: rank 1 of 4 did not call init_distributed within {TIMEOUT_SECONDS} s"
    assert_refused(run("absent", tmp_path), reason, ranks=(0, 2, 3))
