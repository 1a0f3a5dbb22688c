"""scripts/train_lm.py learns, goes on after a kill with equal bits, and has the same losses on any grid."""

from __future__ import annotations

import json
import math
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
from launcher import WORKERS, environment, launch

from paddle_moe import init_distributed, logs

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_lm.py"
KILLED_AT = WORKERS / "killed_at.py"
STEPS = 24
SIZES = "--layers 2 --hidden 32 --heads 2 --experts 5 --top-k 2 --ffn 20 --sequence 32 --batch 4"
SMALL = f"{SIZES} --steps {STEPS} --save-every 5 --log-every 4".split()


def run(*command: object) -> tuple[int, str]:
    """(exit status, what was printed) of a Python program."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    return done.returncode, done.stdout


def train(out: Path, *options: object) -> tuple[dict, str]:
    """(result, what was printed) of a run to the end."""
    status, printed = run(SCRIPT, *SMALL, "--out", out, *options)
    assert status == 0, printed
    return json.loads((out / "result.json").read_text()), printed


@pytest.fixture
def train_here(monkeypatch, capsys):
    """train in this process, which has imported Paddle already."""

    def train(out: Path, *options: str) -> tuple[dict, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SMALL, "--out", str(out), *options])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return json.loads((out / "result.json").read_text()), capsys.readouterr().out

    return train


def events(out: Path, name: str) -> list[dict]:
    lines = [line for path in out.glob("*.jsonl") for line in path.read_text().splitlines()]
    return [event for event in map(json.loads, lines) if event["event"] == name]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    return out, *train(out)


def test_it_learns_and_reports(uninterrupted):
    out, result, printed = uninterrupted
    assert len(result["losses"]) == STEPS and all(map(math.isfinite, result["losses"]))
    assert np.mean(result["losses"][-4:]) < result["losses"][0] - 0.5
    assert 3 < result["unigram_entropy"] < 3.5, "nats per byte of English help pages"
    assert f"{result['validation_loss']:.3f} nats per byte" in printed
    assert f"step {STEPS:>5}  loss {result['losses'][-1]:.4f}" in printed
    assert (out / "loss.png").stat().st_size > 10_000
    loads = events(out, "moe_call")
    assert len(loads) == 2 * (STEPS // 4)
    assert {sum(load["tokens_per_expert"]) for load in loads} == {2 * 4 * 32}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(directory, losses by step) of a run that got SIGKILL in the middle."""
    out = tmp_path_factory.mktemp("killed")
    status, printed = run(KILLED_AT, 12, SCRIPT, *SMALL, "--out", out)
    assert status == -signal.SIGKILL, printed
    losses = {event["step"]: event["loss"] for event in events(out, "step")}
    assert max(losses) == 12
    return out, losses


def test_killed_and_started_again_gives_the_same_bits(uninterrupted, killed, tmp_path):
    _, expected, _ = uninterrupted
    out, losses = killed
    for step, loss in losses.items():
        assert loss == expected["losses"][step - 1], f"the killed run differs in step {step}"
    shutil.copytree(out, tmp_path / "again")
    result, printed = train(tmp_path / "again")
    assert re.search(r"resumed from .* at step 10\n", printed)
    assert result == expected


def test_a_grid_goes_on_with_the_losses_of_one_process(uninterrupted, killed, tmp_path):
    _, expected, _ = uninterrupted
    out, losses = killed
    shutil.copytree(out / "checkpoint", tmp_path / "grid" / "checkpoint")
    options = ["--ep", 2, "--dp", 2, *SMALL, "--out", tmp_path / "grid"]
    job = launch(tmp_path / "logs", SCRIPT, *options, ranks=4)
    assert job.returncode == 0, job
    assert "resumed from" in job.logs[0]
    result = json.loads((tmp_path / "grid" / "result.json").read_text())
    np.testing.assert_allclose(result["losses"], expected["losses"], rtol=1e-3)
    assert result["losses"] != expected["losses"], "the grid adds in another order"
    summary = logs.summarize(logs.load_events(tmp_path / "grid"))
    assert [(rank.dp_rank, rank.ep_rank) for rank in summary.ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert summary.missing_ranks == [] and len(summary.layers) == 2
    slots = 2 * 4 * 32 * summary.ranks[0].calls // 2
    assert slots > 0 and {sum(one.tokens_per_expert.values()) for one in summary.layers} == {slots}


def test_a_killed_grid_goes_on_with_the_same_bits(uninterrupted, tmp_path):
    """With two ranks to a group, every sum has one order."""
    _, expected, _ = uninterrupted
    out = tmp_path / "grid"
    options = ["--ep", 2, *SMALL, "--save-every", 10, "--out", out]
    job = launch(tmp_path / "killed", KILLED_AT, 14, SCRIPT, *options, ranks=2)
    assert job.returncode == -signal.SIGKILL, job
    before = {event["step"]: event["loss"] for event in events(out, "step")}
    assert max(before) == 14
    job = launch(tmp_path / "logs", SCRIPT, *options, ranks=2)
    assert job.returncode == 0, job
    assert re.search(r"resumed from .* at step 10\n", job.logs[0]), job  # so four are taken twice
    losses = json.loads((out / "result.json").read_text())["losses"]
    for step, loss in before.items():
        assert loss == losses[step - 1], f"step {step}"
    np.testing.assert_allclose(losses, expected["losses"], rtol=1e-3)


def test_another_run_is_not_gone_on_with(uninterrupted, tmp_path, monkeypatch):
    script = runpy.run_path(str(SCRIPT))

    def resume(*options):
        monkeypatch.setattr(sys, "argv", ["train_lm.py", *SMALL, "--out", str(uninterrupted[0]), *options])
        arguments = script["parse_arguments"]()
        said = []
        trainer = script["Trainer"](arguments, init_distributed(), SimpleNamespace(info=said.append))
        trainer.resume()
        return said

    with pytest.raises(ValueError, match="another run: --batch was 4 and is 2; --seed was 0 and is 7; pass"):
        resume("--seed", "7", "--batch", "2")
    for name, value in (("--top-k", "3"), ("--hidden", "64"), ("--learning-rate", "0.1")):
        with pytest.raises(ValueError, match=f"{name} was .* and is {value}"):
            resume(name, value)
    (warning, resumed) = resume("--steps", "48")
    assert warning.startswith("WARNING: --steps was 24 and is 48: ") and "resumed from" in resumed
    assert [text.partition(":")[0] for text in resume()][1:] == ["nothing left to train"]


@pytest.mark.parametrize(
    "index, message",
    [
        ('{"metadata": {}, "weight_map": {}}', "KeyError: 'state'"),
        ('{"state": null}', "TypeError: "),
        ('{"state": {"argum', "JSONDecodeError: "),
    ],
)
def test_a_checkpoint_of_something_else(index, message, tmp_path, monkeypatch):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "model.safetensors.index.json").write_text(index)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SMALL, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    text = caught.value.code
    assert re.match(r"train_lm.py: .*index.json is not one of train_lm.py, or is damaged \(", text)
    assert message in text and "\n" not in text


def test_nothing_is_left_to_do(uninterrupted, train_here):
    out, expected, _ = uninterrupted
    result, printed = train_here(out)
    assert f"at step {STEPS}\n" in printed and result == expected


def test_the_loop_over_experts_is_the_same_model(uninterrupted, train_here, tmp_path):
    result, _ = train_here(tmp_path, "--eager")
    _, expected, _ = uninterrupted
    np.testing.assert_allclose(result["losses"], expected["losses"], rtol=1e-3)
    np.testing.assert_allclose(result["losses"][:5], expected["losses"][:5], rtol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--batch", 3, "--dp", 2], "--batch must be a multiple of --dp = 2, got 3"),
        (["--hidden", 30, "--heads", 4], "--hidden must be a multiple of --heads = 4, got 30"),
        (["--eager", "--ep", 2], "--eager has no expert or tensor parallelism"),
        (["--steps", 0], "--steps must be at least 1, got 0"),
        (["--dp", 0], "--dp must be at least 1, got 0"),
        (["--hidden", 0], "--hidden must be at least 1, got 0"),
        (["--seed", -1], "--seed must be at least 0, got -1"),
        (["--top-k", 9, "--experts", 8], "--top-k must be at most --experts = 8, got 9"),
        (["--sequence", 1000000], "as the text is, got 1000000"),
    ],
)
def test_bad_arguments(options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, options)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPT))["parse_arguments"]()
    assert message in capsys.readouterr().err
