"""scripts/run_moe.py over real ranks: equal to the dense layer when all is right, and only then."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launcher import RUN_MOE, WORKERS, environment, launch

CASES = {
    "uneven": "--ep 2 --tp 2 --experts 7 --ffn 101 --hidden 67 --top-k 3 --measurement-mode --dtype bfloat16 "
    "--fp32-reduce --permuted",
    "idle rank": "--ep 4 --tp 1 --experts 3 --ffn 40 --dtype float16 --reduce one --activation swigluoai",
    "narrow": "--ep 1 --tp 4 --experts 5 --ffn 6 --top-k 5 --separate --chunk-size 3 --tokens 17",
    "one token": "--ep 2 --tp 2 --tokens 1 --experts 300 --ffn 16 --hidden 33 --top-k 8 --reduce one",
}
MISTAKES = {
    "no ep all-reduce": "mismatch",
    "no tp all-reduce": "mismatch",
    "ep and tp swapped": "mismatch",
    "experts_max too large": "experts_max",  # a ValueError of the operator
    "experts shifted by one": "mismatch",
    "last expert dropped": "mismatch",
    "same columns twice": "mismatch",
}


@pytest.mark.parametrize("options", CASES.values(), ids=list(CASES))
def test_equals_the_dense_layer(options, tmp_path):
    job = launch(tmp_path, RUN_MOE, *options.split(), "--log-dir", "launch", "--prefix", "moe", ranks=4)
    assert job.returncode == 0, str(job)
    assert "PASSED: every rank has the output of the dense layer" in job.logs[0], str(job)
    for ep_rank, tp_rank in (
        (e, t) for e in range(int(options.split()[1])) for t in range(int(options.split()[3]))
    ):
        events = (tmp_path / f"moe_ep_rank_{ep_rank}_tp_rank_{tp_rank}.jsonl").read_text().splitlines()
        (result,) = [event for event in map(json.loads, events) if event["event"] == "result"]
        assert result["passed"] and not result["mismatches"]


def test_one_process_without_launcher(tmp_path):
    command = [sys.executable, str(RUN_MOE), "--tokens", "5", "--log-dir", str(tmp_path)]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0 and "PASSED" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "options, error",
    [
        ("--tp 9 --ffn 8", "--tp must be at most --ffn = 8, got 9"),
        ("--experts 2 --top-k 3", "--top-k must be at most --experts = 2, got 3"),
        ("--hidden 0", "--hidden must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_named(options, error):
    command = [sys.executable, str(RUN_MOE), *options.split()]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.endswith(f"run_moe.py: error: {error}\n"), done.stderr


def test_finds_mistakes(tmp_path):
    options = "--ep 2 --tp 2 --log-dir launch".split()
    job = launch(tmp_path, WORKERS / "mistakes.py", ",".join(MISTAKES), *options, ranks=4)
    assert job.returncode == 0, str(job)
    for log in job.logs:
        assert "none: passed" in log, str(job)
        for mistake, noticed in MISTAKES.items():
            assert f"{mistake}: {noticed}" in log, str(job)


def test_finds_a_rank_that_skips_an_all_reduce(tmp_path):
    """Its later all-reduces pair with earlier ones of rank 2, whose last one then waits for ever."""
    options = "--ep 2 --tp 2 --timeout 8 --log-dir launch".split()
    job = launch(tmp_path, WORKERS / "mistakes.py", "rank 3 skips one tp all-reduce", *options, ranks=4)
    assert job.returncode != 0, str(job)
    reason = re.compile(
        r"the ranks wait for each other: .*; rank 2 \d+ s in all_reduce of the tp group \[2, 3\];"
        r" rank 3 \d+ s in all_reduce of the grid group"
    )
    assert all("none: passed" in log and reason.search(log) for log in job.logs), str(job)
    for path in tmp_path.glob("*_ep_rank_*.log"):
        assert "[ERROR]" in path.read_text() and reason.search(path.read_text()), path.read_text()
    for path in tmp_path.glob("*_ep_rank_*.jsonl"):
        *_, error, stop = map(json.loads, path.read_text().splitlines())
        assert error["event"] == "error" and reason.search(error["message"])
        assert stop["event"] == "stop" and stop["killed_by"] == "watchdog"
    command = [sys.executable, "-m", "paddle_moe", "logs", tmp_path]
    states = subprocess.run(command, capture_output=True, text=True, check=True, env=environment()).stdout
    assert states.count("ended by the watchdog") == 4 and "running or killed" not in states, states


def test_the_script_in_the_readme(tmp_path):
    codes = []
    for readme in ("README.md", "README_cn.md"):
        blocks = (Path(__file__).parents[2] / readme).read_text().split("```python\n")[1:]
        (block,) = [block for block in blocks if "with init_distributed(" in block]
        codes.append(block.partition("```")[0])
    english, chinese = (re.sub(r"# .*", "", code) for code in codes)
    assert english == chinese
    script = tmp_path / "own.py"
    script.write_text(codes[0])
    job = launch(tmp_path / "logs", script, ranks=4)
    assert job.returncode == 0, job
    said = [
        re.search(r"^rank (\d) has the experts (\S+): (-?\d+\.\d{3})$", log, re.M).groups()
        for log in job.logs
    ]
    assert [one[:2] for one in said] == [("0", "0..3"), ("1", "0..3"), ("2", "4..7"), ("3", "4..7")]
    assert len({one[2] for one in said}) == 1, said
