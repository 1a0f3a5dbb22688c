"""The command line, run as users run it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import paddle_moe
from paddle_moe.cli import main as command_line
from paddle_moe.console import progress_bar
from paddle_moe.doctor import TESTED_PADDLE, TRIED_PADDLE, _check_core, _check_paddle
from paddle_moe.logs import get_rank_logger

PACKAGE = Path(paddle_moe.__file__).parent


def run_command(directory, *arguments, package_parent=PACKAGE.parent, **environment):
    return subprocess.run(
        [sys.executable, "-m", "paddle_moe", *map(str, arguments)],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(package_parent), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
    )


def doctor(directory, **options):
    """(exit code, {name of a check: the check}) of `doctor --json`."""
    done = run_command(directory, "doctor", "--json", **options)
    report = json.loads(done.stdout)
    assert report["failures"] == sum(check["status"] == "failure" for check in report["checks"])
    assert done.stderr == ""
    return done.returncode, {check["name"]: check for check in report["checks"]}


@pytest.fixture
def log_directory(tmp_path):
    directory = tmp_path / "job"
    for ep_rank in range(2):
        for tp_rank in range(2):
            logger = get_rank_logger(ep_rank, tp_rank, log_dir=directory)
            logger.event(
                "moe_call",
                layer="moe",
                num_tokens=10,
                tokens_per_expert=[6 * ep_rank + 1, 3],
                experts_min=2 * ep_rank,
                kernel_ms=2.0,
                collective_ms=1.0,
            )
            if (ep_rank, tp_rank) == (1, 0):
                logger.error("overflow in expert 3")
                logger.warning("no file caf\udce9")
            logger.close()
    return directory


# ---------------------------------------------------------------- logs


def test_logs_prints_tables_and_writes_a_picture(log_directory, tmp_path):
    done = run_command(tmp_path, "logs", log_directory, PYTHONIOENCODING="utf-8:strict")
    assert done.returncode == 0, done.stderr
    assert "Warning  ep_rank 1 tp_rank 0: no file caf\\udce9" in done.stdout
    assert "Error  ep_rank 1 tp_rank 0: overflow in expert 3" in done.stdout
    assert "#2: 7" in done.stdout and "2.00" in done.stdout  # busiest expert, imbalance 7 / 3.5
    assert "\x1b" not in done.stdout  # no terminal, no colours
    assert (log_directory / "moe_logs.png").read_bytes().startswith(b"\x89PNG")


def test_logs_as_json(log_directory, tmp_path):
    done = run_command(tmp_path, "logs", log_directory, "--json", "--out", "p.png")
    summary = json.loads(done.stdout)
    assert done.returncode == 0 and done.stderr == ""
    assert summary["layers"][0]["tokens_per_expert"] == {"0": 1, "1": 3, "2": 7, "3": 3}
    assert len(summary["ranks"]) == 4 and summary["picture"] == "p.png"
    assert (tmp_path / "p.png").exists() and not (log_directory / "moe_logs.png").exists()


@pytest.mark.parametrize("name", ["missing", "empty", "unreadable"])
def test_logs_of_a_directory_without_logs(name, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "unreadable" / "x_ep_rank_0_tp_rank_0.jsonl").mkdir(parents=True)
    done = run_command(tmp_path, "logs", name)
    assert done.returncode == 2 and done.stdout == ""
    assert name in done.stderr and "Traceback" not in done.stderr


def test_logs_says_why_there_is_no_picture(log_directory, tmp_path):
    done = run_command(tmp_path, "logs", log_directory, "--out", "no/such/directory/p.png")
    assert done.returncode == 1
    assert "overflow in expert 3" in done.stdout  # the tables come all the same
    assert "no picture" in done.stderr and "no/such/directory" in done.stderr


def test_logs_without_matplotlib(log_directory, tmp_path):
    """It is optional: only who asks for a picture by name misses it."""
    (tmp_path / "without" / "matplotlib").mkdir(parents=True)
    (tmp_path / "without" / "matplotlib" / "__init__.py").write_text("raise ImportError")
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "without"), str(PACKAGE.parent)])}
    done = run_command(tmp_path, "logs", log_directory, **environment)
    assert done.returncode == 0 and "overflow in expert 3" in done.stdout
    assert "no picture: the picture needs matplotlib" in done.stderr
    assert not (log_directory / "moe_logs.png").exists()
    done = run_command(tmp_path, "logs", log_directory, "--out", "p.png", **environment)
    assert done.returncode == 1 and "no picture: the picture needs matplotlib" in done.stderr


# ---------------------------------------------------------------- the parser


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["logs"]])
def test_wrong_usage(arguments, tmp_path):
    done = run_command(tmp_path, *arguments)
    assert done.returncode == 2
    assert "usage: python -m paddle_moe" in done.stderr and "Traceback" not in done.stderr


def test_usage_of_the_console_script(capsys):
    with pytest.raises(SystemExit):
        command_line(["nonsense"])
    assert capsys.readouterr().err.startswith("usage: paddle_moe ")


def test_help_is_quick(tmp_path):
    code = (
        "import sys\nfrom paddle_moe.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    print(end.code)\n"
        "print([name for name in ('paddle', 'numpy', 'matplotlib', 'rich') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.endswith("0\n[]\n"), done.stdout + done.stderr
    assert "doctor" in done.stdout and "bench" in done.stdout


# ---------------------------------------------------------------- doctor


def test_doctor_of_a_good_installation(tmp_path):
    code, checks = doctor(tmp_path)
    assert code == 0, checks
    for name in ("Python", "Operator in Paddle", "Core without Paddle", "gloo groups"):
        assert checks[name]["status"] == "ok", checks[name]
    assert (
        checks["Instruction set"]["detail"].split()[0]
        in checks["Instruction set"]["detail"].split("available: ")[1]
    )


def test_doctor_among_libraries_that_print(tmp_path):
    """Whatever stands before or after an answer."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\n"
        "if b'-c' in open('/proc/self/cmdline', 'rb').read().split(b'\\0'):  # not the doctor itself\n"
        "    print('Error in cpuinfo: no such thing', file=sys.stderr)\n"
        "    print('Loading... ', end='', flush=True)\n"
        "    atexit.register(print, 'bye')\n"
    )
    code, checks = doctor(tmp_path, PYTHONPATH=f"{PACKAGE.parent}{os.pathsep}{tmp_path}")
    assert code == 0, checks


def test_output_that_nobody_reads_to_its_end(log_directory):
    """As with `| head`."""
    command = [sys.executable, "-m", "paddle_moe", "logs", str(log_directory), "--json"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        text=True,
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 1


@pytest.fixture
def copy_without_modules(tmp_path):
    copy = tmp_path / "copy" / "paddle_moe"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


def test_doctor_without_compiled_modules(copy_without_modules, tmp_path):
    done = run_command(tmp_path, "doctor", package_parent=copy_without_modules.parent)
    assert done.returncode == 1 and done.stderr == ""
    assert "failure  Operator in Paddle   no compiled _ops module" in done.stdout
    assert "failure  Core without Paddle  no compiled _core module" in done.stdout
    assert "-> in a clone of paddle_moe run `pip install --no-build-isolation .`" in done.stdout
    assert done.stdout.endswith("2 failed\n")


def test_the_first_words_without_compiled_modules(copy_without_modules, tmp_path):
    """Of an import, and of the tests."""
    test = Path(__file__).with_name("test_style.py")
    for command, before in (
        (["-c", "import paddle_moe.core"], "RuntimeError: "),
        (["-m", "pytest", "-p", "no:cacheprovider", str(test)], "the tests cannot start: "),
    ):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(copy_without_modules.parent)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 1 and done.stdout == ""
        assert "ImportError" not in done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"{before}the compiled module paddle_moe._core is missing; build with `pip ")


def test_doctor_with_damaged_modules(copy_without_modules, tmp_path):
    for module in PACKAGE.glob("*.so"):
        (copy_without_modules / module.name).write_bytes(b"\x7fELF, but no more")
    code, checks = doctor(tmp_path, package_parent=copy_without_modules.parent)
    assert code == 1
    for name in ("Operator in Paddle", "Core without Paddle"):
        assert checks[name]["status"] == "failure" and "pip install" in checks[name]["advice"], checks[name]
    assert checks["gloo groups"]["status"] == "info"


def test_doctor_names_wrong_variables(tmp_path, monkeypatch):
    code, checks = doctor(tmp_path, PADDLE_MOE_ISA="abacus", PADDLE_MOE_HUGE_PAGES="yes")
    assert code == 1
    assert "'abacus'" in checks["Core without Paddle"]["detail"]
    assert "unset PADDLE_MOE_ISA" in checks["Core without Paddle"]["advice"]
    assert checks["Huge pages"]["status"] == "failure"
    assert "PADDLE_MOE_HUGE_PAGES must be 0 or 1, got 'yes'" in checks["Huge pages"]["detail"]
    monkeypatch.setenv("PADDLE_MOE_NUM_THREADS", "many")
    assert "unset PADDLE_MOE_NUM_THREADS" in _check_core()[0].advice


@pytest.mark.parametrize(
    "version, status, says",
    [
        ("3.3.1", "ok", ""),
        ("3.3.1.dev20260101", "ok", ""),
        ("3.3.0", "warning", "not tried: paddle_moe is developed and tested with 3.3.1"),
        ("3.0.0", "warning", "in part"),
        ("3.1.1", "warning", "not tried"),
        ("2.6.2", "warning", "in part"),
        ("2.6.1", "warning", "not tried"),
        ("4.0.0", "warning", "not tried"),
    ],
)
def test_doctor_says_of_paddle_what_the_readme_says(version, status, says, monkeypatch):
    facts = {"version": version, "cuda": None, "gpus": 0}
    monkeypatch.setattr("paddle_moe.doctor._probe", lambda function: (facts, ""))
    check, _ = _check_paddle()
    assert check.status == status and says in check.advice
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    rows = {*re.findall(r"^\| Paddle (\d[.\d]*)", readme, re.MULTILINE)}
    assert rows == {TESTED_PADDLE, *TRIED_PADDLE}


def test_doctor_reports_groups_that_cannot_form(tmp_path):
    code, checks = doctor(tmp_path, GLOO_SOCKET_IFNAME="nosuch0")
    assert code == 1
    assert checks["gloo groups"]["status"] == "failure"
    assert (
        "nosuch0" in checks["gloo groups"]["detail"]
        and "GLOO_SOCKET_IFNAME" in checks["gloo groups"]["advice"]
    )


def test_progress_without_a_terminal_is_printed_in_lines(capsys):
    with progress_bar("loading", 40_000_000, "bytes") as advance:
        for _ in range(40):
            advance(1_000_000)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[0] == "loading: 10 % (4.0 of 40.0 MB)" and lines[-1] == "loading: 100 % (40.0 of 40.0 MB)"
    with progress_bar("steps", 3) as advance:
        advance(1, "loss 2")
        advance(0)
    with progress_bar(None, 3) as advance:
        advance(3)
    assert capsys.readouterr().out.splitlines() == ["loss 2: 30 % (1 of 3)"]


def test_progress_in_a_terminal_is_a_bar(monkeypatch, capsys):
    rich = pytest.importorskip("rich.console", reason="rich is not installed")
    screen = io.StringIO()
    console = rich.Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr("paddle_moe.console.rich_console", lambda: console)
    with progress_bar("loading", 10, "bytes") as advance:
        advance(10, "loaded [/run]")  # no markup
    assert "loaded [/run]" in screen.getvalue() and "10/10 bytes" in screen.getvalue()
    assert capsys.readouterr().out == ""


def test_public_names():
    """Each is where __init__.py says, and what a caller catches or passes is among them."""
    assert {"CheckpointError", "LAYOUTS", "StoredTensor", "RankLogger"} <= set(paddle_moe.__all__)
    for name in paddle_moe.__all__:
        assert getattr(paddle_moe, name) is not None
