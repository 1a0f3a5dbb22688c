"""The files that a rank writes, and what the reader makes of them."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import paddle_moe
from paddle_moe import log_report, logs
from paddle_moe.log_report import print_summary, save_picture

PACKAGE_PARENT = Path(paddle_moe.__file__).parents[1]


@pytest.fixture
def get_logger(tmp_path):
    """get_rank_logger into tmp_path, with the files closed after the test."""
    made = []

    def get(ep_rank, tp_rank, **options):
        made.append(logs.get_rank_logger(ep_rank, tp_rank, **{"log_dir": tmp_path, **options}))
        return made[-1]

    yield get
    for logger in made:
        logger.close()


def refuse_constant(name):
    raise AssertionError(f"{name} is no JSON")


def read_events(path):
    return [json.loads(line, parse_constant=refuse_constant) for line in path.read_text().splitlines()]


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(PACKAGE_PARENT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def write_events(directory, ep_rank, tp_rank, *events, prefix="test_logs"):
    path = directory / f"{prefix}_ep_rank_{ep_rank}_tp_rank_{tp_rank}.jsonl"
    position = {"ep_rank": ep_rank, "tp_rank": tp_rank}
    with open(path, "a") as file:
        file.writelines(json.dumps({"time": 0.0, **position, **event}) + "\n" for event in events)
    return path


def start(time, run="a", **fields):
    return {"event": "start", "time": time, "run": run, **fields}


def call(tokens_per_expert, experts_min, kernel_ms=1.0, collective_ms=0.5, layer="moe"):
    fields = dict(tokens_per_expert=tokens_per_expert, experts_min=experts_min, layer=layer)
    return {
        "event": "moe_call",
        "num_tokens": 8,
        "kernel_ms": kernel_ms,
        "collective_ms": collective_ms,
        **fields,
    }


def summarize(directory):
    return logs.summarize(logs.load_events(directory))


# ---------------------------------------------------------------- writing


def test_names_and_line_format(get_logger, tmp_path):
    logger = get_logger(1, 2)
    assert isinstance(logger, paddle_moe.RankLogger) and logger.name == "moe_ep_rank_1_tp_rank2"
    assert logging.getLogger("moe_ep_rank_1_tp_rank2") is logger
    logger.info("holds %d experts", 4)
    assert logger.log_path == tmp_path / "test_logs_ep_rank_1_tp_rank_2.log"
    assert logger.events_path == tmp_path / "test_logs_ep_rank_1_tp_rank_2.jsonl"
    (line,) = logger.log_path.read_text().splitlines()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \[INFO\] ep_rank 1 tp_rank 2: holds 4 experts", line
    )


def test_replicas_have_files_of_their_own(get_logger, tmp_path):
    first, second = get_logger(0, 1), get_logger(0, 1, dp_rank=2)
    assert second is not first and second.name == "moe_dp_rank_2_ep_rank_0_tp_rank1"
    assert second.events_path == tmp_path / "test_logs_dp_rank_2_ep_rank_0_tp_rank_1.jsonl"
    second.error("lost")
    assert second.log_path.read_text().endswith(" [ERROR] dp_rank 2 ep_rank 0 tp_rank 1: lost\n")
    assert read_events(second.events_path)[-1]["dp_rank"] == 2
    summary = summarize(tmp_path)
    assert [(rank.dp_rank, rank.ep_rank, rank.tp_rank) for rank in summary.ranks] == [(0, 0, 1), (2, 0, 1)]
    assert summary.errors == ["dp_rank 2 ep_rank 0 tp_rank 1: lost"]
    with pytest.raises(ValueError, match="dp_rank must be an integer of at least 0, got -1"):
        get_logger(0, 0, dp_rank=-1)


def test_prefix_and_new_directory(get_logger, tmp_path):
    logger = get_logger(0, 0, log_dir=tmp_path / "a" / "b", prefix="train")
    assert logger.log_path == tmp_path / "a" / "b" / "train_ep_rank_0_tp_rank_0.log"
    assert logger.log_path.exists()


def test_default_directory_is_the_current_one(get_logger, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert get_logger(0, 0, log_dir=None).log_path.parent == tmp_path


def test_launch_directory(get_logger, tmp_path, monkeypatch):
    monkeypatch.setenv("PADDLE_LOG_DIR", str(tmp_path / "launched"))
    assert get_logger(0, 0, log_dir="launch").log_path.parent == tmp_path / "launched"
    monkeypatch.delenv("PADDLE_LOG_DIR")
    with pytest.raises(RuntimeError, match="PADDLE_LOG_DIR"):
        get_logger(0, 0, log_dir="launch")


def test_asking_twice_adds_no_handler(get_logger):
    first = get_logger(0, 0)
    handlers = list(first.handlers)
    second = get_logger(0, 0)
    assert second is first and second.handlers == handlers
    second.warning("once")
    assert len(first.log_path.read_text().splitlines()) == 1
    assert [event["event"] for event in read_events(first.events_path)] == ["start", "warning"]


def test_another_directory_moves_the_logger(get_logger, tmp_path):
    old = get_logger(0, 0).log_path
    logger = get_logger(0, 0, log_dir=tmp_path / "new")
    logger.info("here")
    assert old.read_text() == "" and "here" in logger.log_path.read_text()


def test_a_logger_that_someone_already_holds(get_logger):
    held = logging.getLogger("moe_ep_rank_7_tp_rank7")
    assert get_logger(7, 7) is held
    held.error("lost")
    assert read_events(held.events_path)[-1]["message"] == "lost"


@pytest.mark.parametrize("arguments", [(-1, 0), (0, "1"), (True, 0), (0.0, 0)])
def test_wrong_ranks(arguments):
    with pytest.raises(ValueError, match=r"(ep|tp)_rank must be an integer of at least 0, got"):
        logs.get_rank_logger(*arguments)


@pytest.mark.parametrize("prefix", ["", "a/b"])
def test_wrong_prefix(prefix, tmp_path):
    with pytest.raises(ValueError, match="prefix"):
        logs.get_rank_logger(0, 0, log_dir=tmp_path, prefix=prefix)


def test_events_are_strict_json(get_logger):
    logger = get_logger(0, 0)
    logger.event(
        "numbers",
        nan=float("nan"),
        infinities=[float("inf"), np.float32("-inf")],
        integer=np.int64(2**40),
        array=np.arange(3, dtype=np.int32),
        array_with_nan=np.array([1.5, np.nan]),
        wide=np.longdouble(1.5),
        nested={1: (np.bool_(True), None)},
        path=Path("x"),
        text="line\u2028break \ud800",
    )
    event = read_events(logger.events_path)[-1]
    assert event.pop("time") > 1.6e9
    assert event == {
        "pid": os.getpid(),
        "ep_rank": 0,
        "tp_rank": 0,
        "event": "numbers",
        "nan": "nan",
        "infinities": ["inf", "-inf"],
        "integer": 2**40,
        "array": [0, 1, 2],
        "array_with_nan": [1.5, "nan"],
        "wide": 1.5,
        "nested": {"1": [True, None]},
        "path": "x",
        "text": "line\u2028break \ud800",
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_tensors_in_events_are_numbers(get_logger, dtype):
    paddle = pytest.importorskip("paddle")
    if not hasattr(paddle, dtype):
        pytest.skip(f"Paddle {paddle.__version__} has no {dtype}")
    logger = get_logger(0, 0)
    logger.event("numbers", one=paddle.full([], 1.5).astype(dtype), two=paddle.full([2], 1.5).astype(dtype))
    event = read_events(logger.events_path)[-1]
    assert (event["one"], event["two"]) == (1.5, [1.5, 1.5])


def test_reserved_fields_and_closed_loggers(get_logger):
    logger = get_logger(0, 0)
    for field in ("tp_rank", "pid"):
        with pytest.raises(ValueError, match=field):
            logger.event("x", **{field: 3})
    logger.close()
    with pytest.raises(RuntimeError, match="closed"):
        logger.event("x")


def test_warnings_and_errors_become_events(get_logger):
    logger = get_logger(0, 0)
    logger.disabled = True  # by logging.config.dictConfig
    assert get_logger(0, 0) is logger
    logger.info("not an event")
    logger.warning("slow by %d%%", 10)
    logger.warning("no file caf\udce9")  # a name that is no text
    try:
        raise KeyError("weights")
    except KeyError:
        logger.exception("cannot load")
    messages = [(event["event"], event.get("message")) for event in read_events(logger.events_path)[1:]]
    problems = [("warning", "slow by 10%"), ("warning", "no file caf\udce9")]
    assert messages == [*problems, ("error", "cannot load (KeyError: 'weights')")]
    said = logger.log_path.read_text()
    assert "no file caf\\udce9\n" in said and "Traceback" in said


def test_a_full_disk_does_not_end_the_job(get_logger, capsys):
    resource = pytest.importorskip("resource")
    logger = get_logger(0, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        for number in range(400):
            logger.event("step", number=number)
            logger.warning("slow %d", number)
        said = capsys.readouterr().err
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert re.fullmatch(
        r"paddle_moe: .*test_logs_ep_rank_0_tp_rank_0\.\*: lines are lost .* too large\n", said
    )
    logger.event("room again")
    logger.error("room again")
    written = read_events(logger.events_path)
    assert written[1]["number"] == 0 and [event["event"] for event in written[-2:]] == ["room again", "error"]
    assert logger.log_path.read_text().endswith(": room again\n")


def test_a_full_disk_at_the_end(get_logger, tmp_path):
    done = run_python(
        "import resource, signal\n"
        "from paddle_moe.logs import get_rank_logger\n"
        f"logger = get_rank_logger(0, 0, log_dir={str(tmp_path)!r})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "logger.warning('slow')\n"
        "logger.close()\n"
        "print('done')\n"
    )
    assert done.stdout == "done\n" and done.returncode == 0
    assert done.stderr.count("lines are lost") == 1 and "Traceback" not in done.stderr


def test_a_message_that_does_not_fit_its_arguments(tmp_path):
    done = run_python(  # pytest's own handler would raise
        "from paddle_moe.logs import get_rank_logger\n"
        f"logger = get_rank_logger(0, 0, log_dir={str(tmp_path)!r})\n"
        "logger.warning('%d items', 'x')\n"
        "logger.warning('next')\n"
    )
    assert done.returncode == 0 and done.stderr.count("--- Logging error ---") == 1
    assert summarize(tmp_path).ranks[0].warnings == ["%d items ('x',)", "next"]
    assert "next" in (tmp_path / "test_logs_ep_rank_0_tp_rank_0.log").read_text()


def test_a_killed_process_leaves_its_lines(tmp_path):
    done = run_python(
        "import os, signal\n"
        "from paddle_moe.logs import get_rank_logger\n"
        f"logger = get_rank_logger(0, 1, log_dir={str(tmp_path)!r})\n"
        "logger.info('last words')\n"
        "logger.event('moe_call', tokens_per_expert=[3, 4], experts_min=0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert done.returncode == -signal.SIGKILL
    assert "last words" in (tmp_path / "test_logs_ep_rank_0_tp_rank_1.log").read_text()
    (rank,) = summarize(tmp_path).ranks
    assert rank.rows == 7 and not rank.finished


def test_a_fork_that_ends_is_not_the_end_of_the_rank(tmp_path):
    run_python(
        "import os, sys\n"
        "from paddle_moe.logs import get_rank_logger\n"
        f"logger = get_rank_logger(0, 0, log_dir={str(tmp_path)!r})\n"
        "if os.fork() == 0: sys.exit(0)\n"
        "os.wait()\n"
        "os._exit(0)\n"
    )
    (rank,) = summarize(tmp_path).ranks
    assert not rank.finished


@pytest.mark.parametrize("suffix, write", [("log", "info"), ("jsonl", "event")])
def test_a_fork_while_another_thread_writes(suffix, write, tmp_path):
    """The file is a pipe, so that the thread writes until somebody reads."""
    done = run_python(
        "import os, signal, threading, time\n"
        "from paddle_moe.logs import get_rank_logger\n"
        f"pipe = {str(tmp_path / f'test_logs_ep_rank_0_tp_rank_0.{suffix}')!r}\n"
        "os.mkfifo(pipe)\n"
        "reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)\n"
        f"write = get_rank_logger(0, 0, log_dir={str(tmp_path)!r}).{write}\n"
        "def read():\n"
        "    time.sleep(0.3)\n"
        "    while os.read(reader, 1 << 16): pass\n"
        "os.set_blocking(reader, True)\n"
        "threading.Thread(target=write, args=['long' * 100_000]).start()\n"
        "time.sleep(0.5)\n"
        "threading.Thread(target=read, daemon=True).start()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(20)\n"
        "    write('of the child')\n"
        "    os._exit(0)\n"
        "print(os.waitpid(child, 0)[1])\n"
    )
    assert done.stdout == "0\n", done.stderr


def test_an_uncaught_exception_is_in_the_log(tmp_path):
    done = run_python(
        "from paddle_moe.logs import get_rank_logger\n"
        f"get_rank_logger(0, 0, log_dir={str(tmp_path)!r})\n"
        "raise ValueError('bad shard')\n"
    )
    assert done.returncode == 1
    (rank,) = summarize(tmp_path).ranks
    assert rank.errors == ["ended by ValueError: bad shard"] and rank.finished and rank.failed


def test_the_last_words_of_a_rank_that_is_ended_well(get_logger, tmp_path):
    logger = get_logger(0, 0, log_dir=tmp_path)
    logger.error("ended by the user's stop file")
    logger.close()
    (rank,) = summarize(tmp_path).ranks
    assert rank.finished and not rank.failed
    with pytest.raises(RuntimeError, match="moe_ep_rank_0_tp_rank0 is closed; get_rank_logger"):
        logger.log_path  # noqa: B018


def test_nothing_here_imports_paddle():
    done = run_python("import sys, paddle_moe.logs, paddle_moe.log_report; print('paddle' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


# ---------------------------------------------------------------- reading


def test_tp_ranks_repeat_tokens_that_count_once(tmp_path):
    for tp_rank in range(2):
        write_events(tmp_path, 0, tp_rank, start(1.0), call([5, 1], 0), call([2, 0], 0), {"event": "stop"})
        write_events(tmp_path, 1, tp_rank, start(1.0), call([4, 0, 0], 2), {"event": "stop"})
    summary = summarize(tmp_path)
    (layer,) = summary.layers
    assert layer.tokens_per_expert == {0: 7, 1: 1, 2: 4, 3: 0, 4: 0}
    assert layer.ep_rank_of_expert == {0: 0, 1: 0, 2: 1, 3: 1, 4: 1}
    assert layer.imbalance == pytest.approx(7 / (12 / 5))
    assert [(rank.ep_rank, rank.tp_rank, rank.rows, rank.experts) for rank in summary.ranks] == [
        (0, 0, 8, (0, 1)),
        (0, 1, 8, (0, 1)),
        (1, 0, 4, (2, 4)),
        (1, 1, 4, (2, 4)),
    ]
    assert summary.ranks[0].kernel_ms == 2.0 and summary.ranks[0].collective_ms == 1.0


def test_replicas_have_tokens_of_their_own(tmp_path, capsys):
    for dp_rank, prefix in enumerate(("test_logs", "test_logs_dp_rank_1")):
        for rank in range(4):
            written = start(1.0, rank=4 * dp_rank + rank, world_size=8), call([1 + dp_rank], rank // 2)
            write_events(tmp_path, rank // 2, rank % 2, *written, prefix=prefix)
    summary = summarize(tmp_path)
    assert summary.layers[0].tokens_per_expert == {0: 3, 1: 3} and summary.missing_ranks == []
    print_summary(summary)
    save_picture(summary, tmp_path / "picture.png")
    places = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert places.count(["1", "1", "0"]) == 1


def test_load_comes_from_the_tp_rank_that_lived_longest(tmp_path):
    write_events(tmp_path, 0, 0, start(1.0), call([1, 1], 0))
    write_events(tmp_path, 0, 1, start(1.0), call([1, 1], 0), call([1, 3], 0), {"event": "stop"})
    summary = summarize(tmp_path)
    assert summary.layers[0].tokens_per_expert == {0: 2, 1: 4}
    assert [rank.finished for rank in summary.ranks] == [False, True]


def test_layers_are_kept_apart(tmp_path):
    write_events(tmp_path, 0, 0, start(1.0), call([1, 2], 0, layer="a"), call([4, 0], 0, layer="b"))
    assert {layer.layer: layer.imbalance for layer in summarize(tmp_path).layers} == {"a": 4 / 3, "b": 2.0}


def test_a_layer_without_tokens_has_no_imbalance(tmp_path):
    write_events(tmp_path, 0, 0, start(1.0), call([0, 0], 0))
    assert summarize(tmp_path).layers[0].imbalance is None


def test_warnings_and_errors_name_their_rank(tmp_path):
    write_events(tmp_path, 0, 0, start(1.0), {"event": "warning", "message": "late"})
    write_events(
        tmp_path, 0, 1, start(1.0), {"event": "error", "message": "lost"}, {"event": "result", "error": 0.5}
    )
    summary = summarize(tmp_path)
    assert summary.warnings == ["ep_rank 0 tp_rank 0: late"]
    assert summary.errors == ["ep_rank 0 tp_rank 1: lost"]
    assert [rank.result for rank in summary.ranks] == [None, {"error": 0.5}]
    assert json.loads(json.dumps(summary.to_json()))["errors"] == summary.errors


def test_truncated_last_line_and_foreign_lines(tmp_path):
    path = write_events(tmp_path, 0, 0, start(1.0), call([1, 2], 0), {"event": "of another version", "x": 1})
    with open(path, "ab") as file:
        file.write(b'[1]\n{"no event": 1}\n\xff\n{"event": "moe_call", "tokens_per_ex')
    (rank,) = summarize(tmp_path).ranks
    assert rank.rows == 3 and rank.unreadable_lines == 4


def test_next_run_starts_on_a_line_of_its_own(get_logger, tmp_path):
    path = write_events(tmp_path, 0, 0, start(1.0))
    with open(path, "a") as file:
        file.write('{"event": "moe_c')
    get_logger(0, 0).event("moe_call", tokens_per_expert=[9], experts_min=0)
    (rank,) = summarize(tmp_path).ranks
    assert rank.rows == 9 and rank.unreadable_lines == 0


def test_a_rank_without_experts(tmp_path):
    write_events(tmp_path, 0, 0, start(1.0), call([3], 0))
    write_events(tmp_path, 1, 0, start(1.0), call([], 1))
    summary = summarize(tmp_path)
    assert summary.layers[0].tokens_per_expert == {0: 3}
    assert [(rank.calls, rank.rows, rank.experts) for rank in summary.ranks] == [(1, 3, (0, 0)), (1, 0, None)]


def test_events_of_unexpected_shape_do_not_count(tmp_path):
    odd = [call(None, 0), call([1.5], 0), call([1], None), call(["1"], 0), call([1], 900_000_000)]
    write_events(tmp_path, 0, 0, start(1.0), *odd, call([1], 0, kernel_ms="nan"))
    (rank,) = summarize(tmp_path).ranks
    assert rank.calls == 1 and rank.rows == 1 and rank.kernel_ms == 0.0
    assert summarize(tmp_path).layers[0].tokens_per_expert == {0: 1}


def test_latest_run_wins(tmp_path):
    for ep_rank in range(4):
        write_events(tmp_path, ep_rank, 0, start(1.0, "first"), call([100], ep_rank))
    for ep_rank in range(2):
        for tp_rank in range(2):
            write_events(tmp_path, ep_rank, tp_rank, start(2.0, "second"), call([1], ep_rank))
    summary = summarize(tmp_path)
    assert [(rank.ep_rank, rank.tp_rank) for rank in summary.ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert summary.layers[0].tokens_per_expert == {0: 1, 1: 1}


def test_two_jobs_at_once_are_not_added_up(tmp_path):
    script = (
        "import sys; from paddle_moe.logs import get_rank_logger\n"
        f"logger = get_rank_logger(0, 0, log_dir={str(tmp_path)!r})\n"
        "for tokens in map(int, sys.stdin):\n"
        "    logger.event('moe_call', tokens_per_expert=[tokens], experts_min=0)\n"
        "    print('ok', flush=True)\n"
    )
    jobs = []
    try:
        for tokens in (1, 100, 1, 100):
            if len(jobs) < 2:
                command = [sys.executable, "-c", script]
                environment = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)}
                pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                jobs.append(subprocess.Popen(command, env=environment, **pipes))
            job = jobs[tokens == 100]
            job.stdin.write(f"{tokens}\n")
            job.stdin.flush()
            assert job.stdout.readline() == "ok\n"
        jobs[0].communicate(timeout=300)
        (rank,) = summarize(tmp_path).ranks
        assert (rank.rows, rank.calls, rank.finished) == (200, 2, False)
        assert f"process {jobs[0].pid} wrote to test_logs_ep_rank_0_tp_rank_0.jsonl at the same time" in str(
            rank.warnings
        )
    finally:
        for job in jobs:
            job.kill()
            job.communicate()


def test_another_grid_on_the_same_ports_replaces_its_ranks(tmp_path):
    for rank in range(4):
        write_events(tmp_path, rank, 0, start(1.0, rank=rank, pid=10 + rank), call([100], rank))
    for rank in range(4):
        write_events(
            tmp_path, rank // 2, rank % 2, start(2.0, rank=rank, pid=20 + rank), call([1], rank // 2)
        )
    assert [(rank.ep_rank, rank.tp_rank) for rank in logs.load_events(tmp_path)] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]


def test_prefixes_are_separate_runs(tmp_path):
    write_events(tmp_path, 0, 0, start(1.0), call([1], 0), prefix="train")
    write_events(tmp_path, 0, 0, start(2.0), call([2], 0), prefix="eval")
    assert [rank.path.name[:4] for rank in logs.load_events(tmp_path)] == ["eval"]


def test_ranks_without_a_log_are_named(tmp_path):
    for rank in (0, 3):
        write_events(tmp_path, rank // 2, rank % 2, start(1.0, rank=rank, world_size=4), call([1], rank))
    assert summarize(tmp_path).missing_ranks == [1, 2]


def test_the_ranks_of_one_launch_share_a_run_id(tmp_path):
    for rank, endpoints in enumerate(("host:1,host:2", "host:1,host:2", "host:5")):
        done = run_python(
            f"import paddle_moe; paddle_moe.get_rank_logger({rank}, 0, log_dir={str(tmp_path)!r})",
            PADDLE_TRAINER_ENDPOINTS=endpoints,
            PADDLE_TRAINER_ID=str(rank),
            PADDLE_TRAINERS_NUM="2",
        )
        assert done.returncode == 0, done.stderr
    runs = [read_events(path)[0]["run"] for path in sorted(tmp_path.glob("*.jsonl"))]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("make", [lambda path: path / "missing", lambda path: path])
def test_directories_without_logs(make, tmp_path):
    with pytest.raises(ValueError, match=re.escape(str(make(tmp_path)))):
        logs.load_events(make(tmp_path))


def test_a_log_one_level_below_is_pointed_out(tmp_path):
    (tmp_path / "demo").mkdir()
    write_events(tmp_path / "demo", 0, 0, start(1.0))
    with pytest.raises(ValueError, match=r"did you mean .*demo"):
        logs.load_events(tmp_path)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.floats(),
    st.sampled_from(["start", "moe_call", "warning", "error", "result", "stop", "nan", ""]),
    st.lists(st.integers(0, 9), max_size=3),
    st.dictionaries(st.sampled_from(["event", "x"]), st.integers(), max_size=1),
)
FIELDS = [
    "event",
    "time",
    "run",
    "rank",
    "world_size",
    "pid",
    "tokens_per_expert",
    "experts_min",
    "kernel_ms",
]
FIELDS += ["collective_ms", "layer", "message"]
LINES = st.one_of(st.dictionaries(st.sampled_from(FIELDS), VALUES).map(json.dumps), st.text(max_size=20))


@given(st.lists(LINES, max_size=8), st.lists(LINES, max_size=8))
def test_no_content_breaks_the_reader(tmp_path_factory, first, second):
    directory = tmp_path_factory.mktemp("any")
    for ep_rank, lines in enumerate((first, second)):
        path = directory / f"test_logs_ep_rank_{ep_rank}_tp_rank_0.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    json.dumps(summarize(directory).to_json(), allow_nan=False)


# ---------------------------------------------------------------- picture and tables


def many_ranks(directory, ep_size, tp_size, experts, layers=("moe",)):
    random = np.random.default_rng(0)
    for ep_rank in range(ep_size):
        for tp_rank in range(tp_size):
            local = experts // ep_size
            calls = [
                call(random.integers(0, 500, local).tolist(), ep_rank * local, 3.0, 1.0, name)
                for name in layers
            ]
            write_events(directory, ep_rank, tp_rank, start(1.0), *calls, {"event": "stop"})
    return summarize(directory)


@pytest.mark.parametrize(
    "ep_size, tp_size, experts, layers",
    [
        (2, 2, 8, ["moe"]),
        (8, 1, 256, ["moe"]),
        (32, 1, 64, ["moe"]),
        (4, 1, 32, [f"layers.{i}" for i in range(40)]),
    ],
)
def test_picture(tmp_path, ep_size, tp_size, experts, layers):
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    path = tmp_path / "picture.png"
    save_picture(many_ranks(tmp_path, ep_size, tp_size, experts, layers), path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = np.round(imread(path)[..., :3] * 255).astype(int)
    height, width, _ = pixels.shape
    assert width >= 1400 and height >= 800
    assert 0.3 < (pixels == 255).all(-1).mean() < 0.95 or len(layers) > 1
    # Kernel time is three times the collective time, in bars of their own colours.
    kernel, collective = (
        (pixels == np.round(np.array(to_rgb(colour)) * 255)).all(-1).sum()
        for colour in ("#33415c", "#f4a259")
    )
    assert kernel / collective == pytest.approx(3, rel=0.1)


def test_heat_map_of_layers_with_different_numbers_of_experts(tmp_path):
    from matplotlib.figure import Figure

    write_events(
        tmp_path, 0, 0, start(1.0), call([1, 2], 0, 3.0, 1.0, "small"), call([1] * 16, 0, 3.0, 1.0, "large")
    )
    figure = Figure()
    axes = figure.subplots()
    log_report._draw_heat_map(figure, axes, summarize(tmp_path).layers)
    assert axes.get_xlim() == pytest.approx((-0.6, 15.6))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["small", "large"]


def test_bars_have_the_height_of_their_load(tmp_path):
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    write_events(tmp_path, 0, 0, start(1.0), call([100, 100], 0))
    write_events(tmp_path, 1, 0, start(1.0), call([50, 50], 2))
    save_picture(summarize(tmp_path), tmp_path / "picture.png")
    pixels = np.round(imread(tmp_path / "picture.png")[..., :3] * 255).astype(int)
    areas = []
    for colour in ("#0072b2", "#e69f00"):
        columns = (pixels == np.round(np.array(to_rgb(colour)) * 255)).all(-1).sum(axis=0)
        areas.append(np.median(columns[columns > 20]))
    assert areas[0] / areas[1] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("names", [["moe_$0_x_$1"], ["a$\\frac$b", "c^$"]], ids=["bars", "heat map"])
def test_names_of_layers_are_no_formulas(names, tmp_path):
    write_events(tmp_path, 0, 0, start(1.0), *(call([1, 2], 0, layer=name) for name in names))
    save_picture(summarize(tmp_path), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_picture_and_tables_of_a_job_that_did_nothing(tmp_path, capsys):
    write_events(
        tmp_path, 0, 0, start(1.0, rank=0, world_size=2), {"event": "error", "message": "no weights"}
    )
    write_events(tmp_path, 0, 1, start(1.0), call([], 0))
    summary = summarize(tmp_path)
    print_summary(summary)
    output = capsys.readouterr().out
    assert (
        "ep_rank 0 tp_rank 0: no weights" in output and "rank 1" in output and "running or killed" in output
    )
    save_picture(summary, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000
