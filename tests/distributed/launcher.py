"""Starts real jobs and ends all of their processes within a time limit."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import signal
import socket
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
    """paddle.distributed.launch with `ranks` processes on this host; its output goes to log_dir/launcher."""
    command = [
        *command_prefix,
        sys.executable,
        "-m",
        "paddle.distributed.launch",
        "--nproc_per_node",
        str(ranks),
    ]
    command += ["--log_dir", str(log_dir), *launch_options, str(script), *map(str, arguments)]
    log_dir.mkdir(parents=True, exist_ok=True)
    return spawn(command, log_dir / "launcher", environment())


def spawn(command: Sequence[str], output: Path, variables: dict[str, str]) -> subprocess.Popen:
    """Starts a command in a process group of its own."""
    with open(output, "w") as file:
        return subprocess.Popen(
            command, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def read_logs(log_dir: Path) -> list[str]:
    return [path.read_text() for path in sorted(log_dir.glob("workerlog.*"))]


def finish(process: subprocess.Popen, log_dir: Path, seconds: float) -> Job:
    """Waits for the job; fails with all its logs when it takes longer than `seconds`."""
    started = time.monotonic()
    try:
        returncode = process.wait(seconds)
        timed_out = False
    except subprocess.TimeoutExpired:
        returncode, timed_out = -signal.SIGKILL, True
    finally:
        kill(process)
    output = (log_dir / "launcher").read_text()
    job = Job(returncode, time.monotonic() - started, read_logs(log_dir), output)
    assert not timed_out, f"the job did not end within {seconds} s: {job}"
    return job


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses, and that the system gives to nobody before the ranks listen on them.

    That of a socket that is bound to port 0 and closed may go to any process that makes a connection.
    """
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        first_given = int(file.read().split()[0])
    candidates = range(10_000, first_given if first_given > 11_000 else 60_000)
    ports: set[int] = set()
    while len(ports) < count:
        port = random.SystemRandom().choice(candidates)  # not those of another run of the tests
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            ports.add(port)
    return list(ports)


def launch(log_dir: Path, script: Path, *arguments: object, ranks: int, seconds: float = 240) -> Job:
    """Runs a job on this host from start to end.

    Once more where fleet.init failed: the ranks of the groups that it makes on gloo do not always find each
    other (Paddle 3.3.1).
    """
    job = _launch_once(log_dir, script, *arguments, ranks=ranks, seconds=seconds)
    if job.returncode and any("_create_hcg" in log and "Connection refused" in log for log in job.logs):
        job = _launch_once(log_dir, script, *arguments, ranks=ranks, seconds=seconds)
    return job


def _launch_once(log_dir: Path, script: Path, *arguments: object, ranks: int, seconds: float) -> Job:
    """Runs a job on this host from start to end.

    It starts the ranks as paddle.distributed.launch does, but at once: that one takes three seconds more.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    master, *endpoints = (f"127.0.0.1:{port}" for port in free_ports(ranks + 1))
    started = time.monotonic()
    end = started + seconds
    processes = []
    try:
        for rank, endpoint in enumerate(endpoints):
            variables = {
                "PADDLE_MASTER": master,
                "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
                "PADDLE_CURRENT_ENDPOINT": endpoint,
                "PADDLE_TRAINER_ID": str(rank),
                "PADDLE_TRAINERS_NUM": str(ranks),
                "PADDLE_LOCAL_SIZE": str(ranks),
                "PADDLE_LOG_DIR": str(log_dir),
            }
            command = [sys.executable, "-u", str(script), *map(str, arguments)]
            processes.append(spawn(command, log_dir / f"workerlog.{rank}", {**environment(), **variables}))
        while None in (codes := [process.poll() for process in processes]) and time.monotonic() < end:
            if any(codes):  # time for the others to notice, also on a busy machine
                end = min(end, time.monotonic() + 20)
            time.sleep(0.02)
    finally:
        for process in processes:
            kill(process)
    job = Job(next(filter(None, codes), 0), time.monotonic() - started, read_logs(log_dir), "")
    assert any(codes) or None not in codes, f"the job did not end within {seconds} s: {job}"
    return job
