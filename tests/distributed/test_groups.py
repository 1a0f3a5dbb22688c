"""The EP x TP grid: as data for any size, and as groups of real processes."""

from __future__ import annotations

import itertools

import paddle
import pytest
from launcher import WORKERS, launch

from paddle_moe.distributed import init_distributed, rank_grid
from paddle_moe.logs import get_rank_logger


def test_grid_of_two_by_two():
    assert [
        (one.rank, one.ep_rank, one.tp_rank, one.tp_group, one.ep_group) for one in rank_grid(4, 2, 2)
    ] == [
        (0, 0, 0, (0, 1), (0, 2)),
        (1, 0, 1, (0, 1), (1, 3)),
        (2, 1, 0, (2, 3), (0, 2)),
        (3, 1, 1, (2, 3), (1, 3)),
    ]


def test_pure_ep_and_pure_tp():
    """Groups built the wrong way round are right for 2 x 2 by luck, and wrong here."""
    for one in rank_grid(4, 4, 1):
        assert one.ep_group == (0, 1, 2, 3) and one.tp_group == (one.rank,)
    for one in rank_grid(4, 1, 4):
        assert one.tp_group == (0, 1, 2, 3) and one.ep_group == (one.rank,)


@pytest.mark.parametrize("ep_size", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("tp_size", [1, 2, 3, 8])
@pytest.mark.parametrize("dp_size", [1, 3])
def test_groups_follow_from_the_places(ep_size, tp_size, dp_size):
    grid = rank_grid(ep_size * tp_size * dp_size, ep_size, tp_size, dp_size)
    assert [(one.dp_rank, one.ep_rank, one.tp_rank) for one in grid] == list(
        itertools.product(range(dp_size), range(ep_size), range(tp_size))
    )
    for rank, one in enumerate(grid):
        assert one.rank == rank
        replica = [other for other in grid if other.dp_rank == one.dp_rank]
        assert one.grid_group == tuple(other.rank for other in replica)
        assert one.ep_group == tuple(other.rank for other in replica if other.tp_rank == one.tp_rank)
        assert one.tp_group == tuple(other.rank for other in replica if other.ep_rank == one.ep_rank)
        assert one.dp_group == tuple(
            other.rank for other in grid if (other.ep_rank, other.tp_rank) == (one.ep_rank, one.tp_rank)
        )
        assert [grid[rank].ep_rank for rank in one.ep_group] == list(range(ep_size))
        assert [grid[rank].tp_rank for rank in one.tp_group] == list(range(tp_size))
        assert [grid[rank].dp_rank for rank in one.dp_group] == list(range(dp_size))


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"ep_size=3, tp_size=2, dp_size=1 \(product 6\) and world_size=4"):
        rank_grid(4, 3, 2)
    for sizes in ((0, 1, 1), (1, 0, 1), (1, 1, -1)):
        with pytest.raises(ValueError, match="must be at least 1"):
            rank_grid(*sizes)


def test_one_rank_needs_no_launcher():
    with init_distributed() as context:
        assert (context.ep_rank, context.ep_size, context.tp_rank, context.tp_size) == (0, 1, 0, 1)
        assert (context.rank, context.world_size) == (0, 1)
        tensor = paddle.ones([2])
        assert context.all_reduce(tensor, "ep") is context.all_reduce(tensor, "grid", "max") is tensor
        context.barrier()
        context.check_same_routing(paddle.zeros([2, 1], "int32"))
    with pytest.raises(ValueError, match="ep_size=2, tp_size=1"):
        init_distributed(2)
    with pytest.raises(ValueError, match="timeout_seconds must be positive, got 0"):
        init_distributed(timeout_seconds=0)


def test_a_closed_logger_gets_no_failures(tmp_path):
    logger = get_rank_logger(0, 0, log_dir=tmp_path)
    logger.close()
    with init_distributed() as context:
        with pytest.raises(RuntimeError, match="moe_ep_rank_0_tp_rank0 is closed"):
            context.log_failures_to(logger)
        assert not context.logs_failures


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "5", None, True])
def test_timeouts_that_are_none(value):
    with pytest.raises(ValueError, match="timeout_seconds must be"):
        init_distributed(timeout_seconds=value)


@pytest.mark.parametrize("size", [True, "1", 1.0])
def test_sizes_that_are_no_integers(size):
    with pytest.raises(ValueError, match="tp_size must be an integer, got"):
        init_distributed(1, size)


@pytest.mark.parametrize("name", ["PADDLE_TRAINER_ID", "PADDLE_TRAINERS_NUM"])
def test_variables_of_the_launcher_that_are_empty(name, monkeypatch):
    monkeypatch.setenv(name, "")
    with pytest.raises(RuntimeError, match=f"{name} must be an integer, got ''"):
        init_distributed()


EIGHT = pytest.param(4, 2, marks=pytest.mark.slow)


@pytest.mark.parametrize(("ep_size", "tp_size"), [(4, 1), (1, 4), (2, 2), EIGHT])
def test_groups_of_real_ranks(ep_size, tp_size, tmp_path):
    job = launch(tmp_path, WORKERS / "groups.py", ep_size, tp_size, ranks=ep_size * tp_size)
    assert job.returncode == 0, str(job)
    assert all("all checks passed" in log for log in job.logs) and len(job.logs) == ep_size * tp_size, str(
        job
    )
