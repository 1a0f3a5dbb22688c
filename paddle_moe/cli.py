"""The command line: `paddle_moe logs | doctor | bench`, or `python -m paddle_moe`.

Each command imports what it needs when it runs, so that `doctor` still works where something is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

USAGE_ERROR = 2  # the exit code that argparse uses too


def main(arguments: Sequence[str] | None = None, program: str = "paddle_moe") -> int:
    """Runs one command and returns its exit code: 0 good, 1 something failed, 2 wrong usage.

    `program` is what the usage calls it.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog=program, description="Tools of the paddle_moe package.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    logs = commands.add_parser("logs", help="merge the logs of all ranks into a table and a picture")
    logs.add_argument("directory", metavar="DIR", help="directory with the *_ep_rank_E_tp_rank_T.jsonl files")
    logs.add_argument(
        "--out", metavar="PICTURE.png", help="where the picture goes (default: DIR/moe_logs.png)"
    )
    logs.add_argument("--json", action="store_true", help="print JSON instead of tables")
    logs.set_defaults(run=_logs)

    doctor = commands.add_parser("doctor", help="check this installation and say how to repair it")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a list")
    doctor.set_defaults(run=_doctor)

    bench = commands.add_parser("bench", help="time the operator beside what Paddle offers")
    bench.set_defaults(run=_bench)
    if arguments[:1] == ["bench"]:
        from paddle_moe import bench as benchmark

        benchmark.add_arguments(bench)

    chosen = parser.parse_args(arguments)
    if hasattr(sys.stdout, "reconfigure"):  # names of files and messages may hold what it cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = chosen.run(chosen)
        sys.stdout.flush()
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1
    return code


def _logs(arguments: argparse.Namespace) -> int:
    from paddle_moe import logs
    from paddle_moe.log_report import print_summary, save_picture

    try:
        summary = logs.summarize(logs.load_events(arguments.directory))
    except (ValueError, OSError) as error:
        print(f"paddle_moe logs: {error}", file=sys.stderr)
        return USAGE_ERROR
    picture = Path(arguments.out or Path(arguments.directory) / "moe_logs.png")
    if not arguments.json:
        print_summary(summary)
    code = 0
    try:
        save_picture(summary, picture)
    except (OSError, RuntimeError) as error:
        print(f"paddle_moe logs: no picture: {error}", file=sys.stderr)
        picture = None
        if arguments.out or isinstance(error, OSError):  # not that matplotlib, which is optional, is missing
            code = 1
    if arguments.json:
        print(
            json.dumps({**summary.to_json(), "picture": picture and str(picture)}, indent=2, allow_nan=False)
        )
    elif picture:
        print(f"Picture  {picture}")
    return code


def _doctor(arguments: argparse.Namespace) -> int:
    from paddle_moe.doctor import main as doctor

    return doctor(as_json=arguments.json)


def _bench(arguments: argparse.Namespace) -> int:
    from paddle_moe import bench

    return bench.main(arguments) or 0
