"""Starts real jobs with paddle.distributed.launch and ends all of their processes within a time limit."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WORKERS = Path(__file__).parent / "workers"
PACKAGE_PARENT = Path(importlib.util.find_spec("paddle_moe").origin).parents[1]
RUN_MOE = Path(__file__).parents[2] / "scripts" / "run_moe.py"


@dataclass
class Job:
    returncode: int
    seconds: float
    logs: list[str]  # of each rank of this host
    output: str  # of the launcher

    def __str__(self) -> str:
        logs = "".join(f"\n--- rank {rank} of this host\n{log}" for rank, log in enumerate(self.logs))
        return f"exit status {self.returncode} after {self.seconds:.1f} s\n{self.output[-3000:]}{logs}"


def environment() -> dict[str, str]:
    """That of this process, for ranks on gloo that import the same paddle_moe."""
    variables = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    python_path = os.pathsep.join([str(PACKAGE_PARENT), variables.get("PYTHONPATH", "")])
    return {**variables, "PADDLE_DISTRI_BACKEND": "gloo", "PYTHONPATH": python_path}


def start(
    log_dir: Path,
    script: Path,
    *arguments: object,
    ranks: int,
    launch_options: Sequence[str] = (),
    command_prefix: Sequence[str] = (),
) -> subprocess.Popen:
    """Starts `ranks` processes on this host; the launcher's output goes to log_dir/launcher."""
    command = [
        *command_prefix,
        sys.executable,
        "-m",
        "paddle.distributed.launch",
        "--nproc_per_node",
        str(ranks),
    ]
    command += ["--log_dir", str(log_dir), *launch_options, str(script), *map(str, arguments)]
    return spawn(command, log_dir, environment())


def spawn(command: Sequence[str], log_dir: Path, variables: dict[str, str]) -> subprocess.Popen:
    """Starts a command in a process group of its own."""
    log_dir.mkdir(parents=True, exist_ok=True)
    with open(log_dir / "launcher", "w") as output:
        return subprocess.Popen(
            command, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def finish(process: subprocess.Popen, log_dir: Path, seconds: float) -> Job:
    """Waits for the job; fails with all its logs when it takes longer than `seconds`."""
    started = time.monotonic()
    try:
        returncode = process.wait(seconds)
        timed_out = False
    except subprocess.TimeoutExpired:
        returncode, timed_out = -signal.SIGKILL, True
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    logs = [path.read_text() for path in sorted(log_dir.glob("workerlog.*"))]
    job = Job(returncode, time.monotonic() - started, logs, (log_dir / "launcher").read_text())
    assert not timed_out, f"the job did not end within {seconds} s: {job}"
    return job


def launch(log_dir: Path, script: Path, *arguments: object, ranks: int, seconds: float = 120) -> Job:
    """Runs a job on this host from start to end."""
    return finish(start(log_dir, script, *arguments, ranks=ranks), log_dir, seconds)
