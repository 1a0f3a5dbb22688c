"""Group building over and over: a race in the rendezvous shows up as one hang or wrong sum in many starts."""

from __future__ import annotations

import pytest
from launcher import WORKERS, launch


@pytest.mark.soak
@pytest.mark.timeout(90 * 50)
@pytest.mark.parametrize(("ep_size", "tp_size"), [(2, 2), (4, 1), (1, 4), (4, 2)])
def test_fifty_starts(ep_size, tp_size, tmp_path):
    for start in range(50):
        worker = (WORKERS / "groups.py", ep_size, tp_size, "quick")
        job = launch(tmp_path / str(start), *worker, ranks=ep_size * tp_size, seconds=90)
        assert job.returncode == 0, f"start {start + 1}: {job}"
        assert all("all checks passed" in log for log in job.logs), f"start {start + 1}: {job}"
