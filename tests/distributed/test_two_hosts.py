"""Jobs over two hosts: two network namespaces, each with its own host name, joined by virtual interfaces."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from launcher import WORKERS, Job, environment, finish, spawn, start

MASTER_PORT = 45678  # free, because the namespaces are new


@dataclass
class Host:
    name: str
    address: str
    directory: Path
    command_prefix: tuple[str, ...]  # runs a command on this host

    def let_name_mean(self, address: str) -> None:
        (self.directory / "hosts").write_text(f"127.0.0.1 localhost\n{address} {self.name}\n")


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


@pytest.fixture
def two_hosts(tmp_path):
    missing = [tool for tool in ("ip", "unshare", "mount") if shutil.which(tool) is None]
    if missing:
        pytest.skip(
            f"two hosts need network namespaces, but {', '.join(missing)} is missing (iproute2, util-linux)"
        )
    names = [f"moe{os.getpid()}{letter}" for letter in "ab"]
    created = []
    try:
        try:
            for name in names:
                run("ip", "netns", "add", name)
                created.append(name)
            link = ["ip", "link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0"]
            run(*link, "netns", names[1])
            hosts = [
                make_host(name, f"10.99.0.{i}", tmp_path / name) for i, name in enumerate(names, start=1)
            ]
        except subprocess.CalledProcessError as error:
            reason = f"{' '.join(error.cmd)}: {error.stderr.strip()}"
            pytest.skip(
                f"two hosts need network namespaces, which are not allowed here ({reason}); run as root"
            )
        yield hosts
    finally:
        for name in created:
            run("ip", "netns", "del", name)


def make_host(name: str, address: str, directory: Path) -> Host:
    run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "veth0")
    run("ip", "-n", name, "link", "set", "veth0", "up")
    run("ip", "-n", name, "link", "set", "lo", "up")
    directory.mkdir()
    inside = f'mount --bind {directory / "hosts"} /etc/hosts; hostname {name}; exec "$@"'
    host = Host(
        name,
        address,
        directory,
        ("ip", "netns", "exec", name, "unshare", "-m", "-u", "sh", "-ec", inside, "--"),
    )
    host.let_name_mean(address)
    run(*host.command_prefix, "true")
    return host


def launch_on(hosts: list[Host], script: Path, *arguments: object) -> list[Job]:
    """Two ranks on each host, with the launcher on both."""
    master = f"{hosts[0].address}:{MASTER_PORT}"
    running = []
    for node, host in enumerate(hosts):
        options = ["--nnodes", "2", "--rank", str(node), "--master", master]
        process = start(
            host.directory,
            script,
            *arguments,
            ranks=2,
            launch_options=options,
            command_prefix=host.command_prefix,
        )
        running.append(process)
    return [finish(process, host.directory, 240) for process, host in zip(running, hosts)]


def test_groups_over_two_hosts(two_hosts):
    jobs = launch_on(two_hosts, WORKERS / "groups.py", 2, 2)
    for job in jobs:
        assert job.returncode == 0, str(job)
        assert len(job.logs) == 2 and all("all checks passed" in log for log in job.logs), str(job)


def test_a_death_ends_the_ranks_on_the_other_host(two_hosts):
    jobs = launch_on(two_hosts, WORKERS / "failures.py", "killed")
    for rank, log in enumerate(jobs[0].logs + jobs[1].logs):
        reason = rf"rank {rank} ends: rank 2 \(pid \d+ on {two_hosts[1].name}\) died"
        assert re.search(reason, log), f"{jobs[0]}\n{jobs[1]}"
    assert all(job.returncode != 0 for job in jobs)


def test_hosts_whose_own_name_is_a_loopback_address(two_hosts):
    """Common on laptops and in containers; the launcher refuses it, so the ranks are started one by one."""
    endpoints = [f"{host.address}:{port}" for host in two_hosts for port in (47000, 47001)]
    running = []
    for rank, endpoint in enumerate(endpoints):
        host = two_hosts[rank // 2]
        host.let_name_mean("127.0.1.1")
        variables = {
            "PADDLE_MASTER": f"{two_hosts[0].address}:{MASTER_PORT}",
            "PADDLE_TRAINER_ID": str(rank),
            "PADDLE_TRAINERS_NUM": "4",
            "PADDLE_CURRENT_ENDPOINT": endpoint,
            "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        }
        command = [*host.command_prefix, sys.executable, str(WORKERS / "groups.py"), "2", "2", "quick"]
        directory = host.directory / str(rank)
        directory.mkdir()
        running.append((spawn(command, directory / "launcher", {**environment(), **variables}), directory))
    for process, directory in running:
        job = finish(process, directory, 240)
        assert job.returncode == 0 and "all checks passed" in job.output, str(job)
