"""scripts/demo.py on a small text: four real ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import paddle_moe

DEMO = Path(__file__).parents[1] / "scripts" / "demo.py"


def run_demo(directory, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(paddle_moe.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, str(DEMO), *map(str, arguments)],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_all_ranks_agree_with_the_dense_layer(tmp_path):
    text = tmp_path / "text"
    text.write_bytes(b"The quick brown fox jumps over the lazy dog. \x00\xff\n" * 100)
    done = run_demo(tmp_path, "--text", text, "--out", "out")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.endswith("  ok")]
    assert [row[:4] for row in rows] == [
        ["0", "0", "0", "0..7"],
        ["1", "0", "1", "0..7"],
        ["2", "1", "0", "8..15"],
        ["3", "1", "1", "8..15"],
    ]
    routed = [int(row[4].replace(",", "")) for row in rows]
    assert routed[0] == routed[1] and routed[2] == routed[3]
    assert routed[0] + routed[2] == 2 * text.stat().st_size  # two experts per token, and every token has both
    assert "PASSED" in done.stdout
    assert (tmp_path / "out" / "moe_logs.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "out").glob("test_logs_ep_rank_*_tp_rank_*.log"))) == 4


def test_no_rank_in_time_is_a_failure(tmp_path):
    done = run_demo(tmp_path, "--out", "out", "--timeout", "1")
    assert done.returncode == 1
    assert "FAILED: stopped after 1 s" in done.stdout


def test_text_that_does_not_exist(tmp_path):
    done = run_demo(tmp_path, "--text", "missing")
    assert done.returncode == 2
    assert "--text: expected a file that is not empty, got 'missing'" in done.stderr
