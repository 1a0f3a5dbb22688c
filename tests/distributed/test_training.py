"""FusedMoE trained by real processes: gradients, optimizer steps and everything that it is combined with.

Each rank compares itself with the whole layer in one process. workers/training.py has the checks.
"""

from __future__ import annotations

import pytest
from launcher import WORKERS, launch

JOBS = {
    "ep2_tp2": (
        (2, 2, 1),
        "gradients losses faults shared_weights dropped_all_reduces recompute to_static jitter amax "
        "mixed_precision clipping overflow flags same_start all_to_all_output all_to_all_training "
        "default_dtype",
    ),
    "ep4": (
        (4, 1, 1),
        "gradients faults branches stop_gradient dropped_all_reduces recompute amax clipping flags "
        "all_to_all_output all_to_all_stop_gradient all_to_all_recompute all_to_all_steps",
    ),
    "tp4": ((1, 4, 1), "gradients branches dropped_all_reduces flags"),
    "dp2": ((1, 1, 2), "sharded_optimizer data_parallel overflow flags"),
    "dp2_fleet_pipeline": ((1, 1, 2), "fleet_pipeline"),
    "ep2_fleet": ((2, 1, 1), "sharded_optimizer"),
    "ep2_fleet_topology": ((2, 1, 1), "fleet_topology"),
    "ep2_dp2": (
        (2, 1, 2),
        "groups optimizer_steps accumulation data_parallel averages wide_gradients same_start "
        "replica_without_tokens global_balance pipeline all_to_all_steps all_to_all_training",
    ),
    "ep2_tp2_dp2": ((2, 2, 2), "groups optimizer_steps"),
}
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name == "ep2_tp2_dp2" else name for name in JOBS]


@pytest.mark.parametrize("name", NAMES)
def test_training(name, tmp_path):
    sizes, checks = JOBS[name]
    ranks = sizes[0] * sizes[1] * sizes[2]
    job = launch(tmp_path, WORKERS / "training.py", *sizes, *checks.split(), ranks=ranks, seconds=240)
    assert job.returncode == 0, str(job)
    for log in job.logs:
        assert [line.split()[0] for line in log.splitlines() if line.endswith(" passed")] == checks.split()
    assert len(job.logs) == ranks
