"""Blocks of another package over several ranks against the same blocks in plain Paddle on one rank."""

from __future__ import annotations

import pytest
from launcher import WORKERS, launch

GRID = ("graphs_of_one_shape", "half_precision", "all_to_all", "steps_of_an_optimizer")
FLEET = ("all_to_all", "steps_of_an_optimizer", "divided_by_fleet")


@pytest.mark.parametrize(
    "ep_size, tp_size, ranks, checks", [(2, 2, 4, GRID), ("fleet", 1, 2, FLEET)], ids=["ep2_tp2", "fleet"]
)
def test_accelerated_blocks(ep_size, tp_size, ranks, checks, tmp_path):
    job = launch(tmp_path, WORKERS / "accelerated_blocks.py", ep_size, tp_size, *checks, ranks=ranks)
    assert job.returncode == 0, job
    for name in checks:
        assert all(f"{name} passed" in log for log in job.logs), job
