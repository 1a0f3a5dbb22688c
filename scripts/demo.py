"""Four processes run one mixture of experts over real text, and compare it with the dense model.

    python scripts/demo.py [--text FILE]

The text (by default the Python language reference that ships with Python) becomes one token per byte:
each token is the sum of random vectors for its byte and the three bytes before it. Four ranks, EP 2 x TP
2, started by paddle.distributed.launch, send all of it through a FusedMoE layer. Each rank then compares
a sample of its output with the dense layer in double precision, and all ranks compare the bits of their
whole output. Exits with 1 if anything is off.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

import numpy as np

EP_SIZE, TP_SIZE = 2, 2
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 64, 128, 16, 2
SEED = 2024
BATCH_TOKENS = 4096
SAMPLE_TOKENS = 8192  # compared with the dense layer, on each rank
TOLERANCE = 1e-6  # relative L2 error, float32
TIE = 1e-5  # float32 may order logits closer than this differently: such tokens are left out of the sample


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text", metavar="FILE", type=Path, help="text to use instead of the language reference"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("log/demo"),
        help="directory for logs and picture (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout", type=float, default=600, help="seconds until the job is stopped (%(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.text and not (arguments.text.is_file() and arguments.text.stat().st_size):
        parser.error(f"--text: expected a file that is not empty, got {str(arguments.text)!r}")
    return arguments


def read_text(path: Path | None) -> np.ndarray:
    """The bytes of the text, [T] uint8."""
    if path is not None:
        return np.fromfile(path, np.uint8)
    from pydoc_data.topics import topics

    return np.frombuffer("\n\n".join(topics[name] for name in sorted(topics)).encode(), np.uint8)


# ---------------------------------------------------------------- what every rank does


def embed(text: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Tokens [stop - start, HIDDEN] float32 of variance about 1, for the bytes [start, stop) of the text."""
    tables = np.random.default_rng(SEED).standard_normal((4, 256, HIDDEN)).astype(np.float32)
    positions = np.arange(start, stop)
    hidden = np.zeros((stop - start, HIDDEN), np.float32)
    for distance, table in enumerate(tables):
        hidden += table[text[np.maximum(positions - distance, 0)]]
    return hidden / 2


def dense_weights() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """gate_weight [H, E], gate_up [E, H, 2I] and down [E, I, H] of the dense layer, float32."""
    from paddle_moe.params import random_expert, random_gate_weight

    experts = [random_expert(SEED, expert, HIDDEN, INTERMEDIATE) for expert in range(EXPERTS)]
    gate_up, down = (np.stack(weights) for weights in zip(*experts))
    return random_gate_weight(SEED, HIDDEN, EXPERTS), gate_up, down


def run_rank(arguments: argparse.Namespace) -> int:
    import paddle

    from paddle_moe import FusedMoE, get_rank_logger, init_distributed

    with init_distributed(EP_SIZE, TP_SIZE, timeout_seconds=arguments.timeout) as parallel:
        logger = get_rank_logger(parallel.ep_rank, parallel.tp_rank, log_dir="launch")
        parallel.log_failures_to(logger)
        text, weights = read_text(arguments.text), dense_weights()
        layer = FusedMoE.from_dense(*weights, TOP_K, parallel=parallel)
        layer(
            paddle.to_tensor(embed(text, 0, min(len(text), BATCH_TOKENS)))
        )  # the first call sets up, and counts not
        layer.logger = logger
        logger.info("holds experts %d..%d of %d", layer.experts_min, layer.experts_max, EXPERTS)

        outputs = []
        for start in range(0, len(text), BATCH_TOKENS):
            hidden = paddle.to_tensor(embed(text, start, min(start + BATCH_TOKENS, len(text))))
            outputs.append(layer(hidden).numpy())
            if parallel.rank == 0:
                print(f"{start + len(outputs[-1]):,} of {len(text):,} tokens", flush=True)
        output = np.concatenate(outputs)

        error, checked = compare(text, output, weights, parallel.rank)
        problems = (
            []
            if error <= TOLERANCE
            else [f"relative error {error:.2e} against dense is above {TOLERANCE:.0e}"]
        )
        if not same_on_all_ranks(parallel, output):
            problems.append("the output of this rank and that of others differ in their bits")
        for problem in problems:
            logger.error(problem)
        logger.event("result", passed=not problems, tokens=len(text), checked=checked, error=error)
        failed = parallel.all_reduce(paddle.to_tensor([len(problems)]), "grid", "max").item()
        parallel.barrier()
    return 1 if failed else 0


def compare(
    text: np.ndarray, output: np.ndarray, weights: tuple[np.ndarray, ...], rank: int
) -> tuple[float, int]:
    """(relative L2 error, number of tokens compared) of evenly spaced tokens, others on each rank."""
    from paddle_moe import reference

    stride = max(1, len(text) // SAMPLE_TOKENS)
    sample = np.arange(rank % stride, len(text), stride)
    hidden = embed(text, 0, len(text))[sample]
    best = -np.sort(-reference.gate(hidden, weights[0]), axis=1)[:, : TOP_K + 1]
    clear = (best[:, :-1] - best[:, 1:]).min(axis=1) > TIE
    expected = reference.fused_gate_moe(hidden[clear], *weights, TOP_K)
    difference = np.linalg.norm(output[sample[clear]] - expected)
    return float(difference / np.linalg.norm(expected)), int(clear.sum())


def same_on_all_ranks(parallel, output: np.ndarray) -> bool:
    import paddle

    digest = int.from_bytes(hashlib.sha256(output.tobytes()).digest()[:7], "little")
    largest, smallest = parallel.all_reduce(paddle.to_tensor([digest, -digest]), "grid", "max").tolist()
    return largest == -smallest


# ---------------------------------------------------------------- starting and watching them


def start(arguments: argparse.Namespace) -> int:
    from paddle_moe.console import print_table
    from paddle_moe.logs import Summary, load_events, summarize

    text = read_text(arguments.text)
    name = arguments.text or "the Python language reference (pydoc_data.topics)"
    print(f"{len(text):,} bytes of {name}, one token each")
    print(
        f"{EXPERTS} experts, {TOP_K} per token, H {HIDDEN}, I {INTERMEDIATE}; "
        f"EP {EP_SIZE} x TP {TP_SIZE} processes on gloo"
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    for old in (*arguments.out.glob("test_logs_ep_rank_*"), *arguments.out.glob("workerlog.*")):
        old.unlink()
    code = launch(arguments, -(-len(text) // BATCH_TOKENS))

    try:
        summary = summarize(load_events(arguments.out))
    except ValueError:
        summary = Summary([], [], [])  # no rank came as far as its log
    print_table(
        "Against the dense layer in double precision",
        (
            "rank",
            "ep",
            "tp",
            "experts",
            "rows",
            "kernel ms",
            "reduce ms",
            "tokens compared",
            "error against dense",
            "result",
        ),
        [
            (
                rank.ep_rank * TP_SIZE + rank.tp_rank,
                rank.ep_rank,
                rank.tp_rank,
                "{}..{}".format(*rank.experts) if rank.experts else "-",
                f"{rank.rows:,}",
                f"{rank.kernel_ms:,.0f}",
                f"{rank.collective_ms:,.0f}",
                *verdict(rank.result),
            )
            for rank in summary.ranks
        ],
    )
    results = [rank.result for rank in summary.ranks if rank.result]
    if code == 0 and len(results) == EP_SIZE * TP_SIZE and all(result["passed"] for result in results):
        print(f"PASSED: all ranks agree with the dense layer (relative L2 error up to {TOLERANCE:.0e})")
        return 0
    print(*summary.errors, sep="\n")
    if not summary.errors:
        for log in sorted(arguments.out.glob("workerlog.*")):
            print(f"--- end of {log}", *log.read_text(errors="replace").splitlines()[-12:], sep="\n")
    how = f"stopped after {arguments.timeout:g} s" if code is None else f"the launcher ended with code {code}"
    print(f"FAILED: {how}; all logs are in {arguments.out}")
    return 1


def verdict(result: dict | None) -> tuple[str, str, str]:
    if result is None:
        return "-", "-", "NO RESULT"
    return f"{result['checked']:,}", f"{float(result['error']):.2e}", "ok" if result["passed"] else "WRONG"


def launch(arguments: argparse.Namespace, batches: int) -> int | None:
    """Runs the ranks and shows how far they are. Returns the launcher's exit code, None when time ran out."""
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", str(EP_SIZE * TP_SIZE)]
    command += ["--log_dir", str(arguments.out), *sys.argv]
    print("$ PADDLE_DISTRI_BACKEND=gloo python", *command[1:], "\n", flush=True)
    environment = {**os.environ, "PADDLE_DISTRI_BACKEND": "gloo"}
    if not environment.get("CUDA_VISIBLE_DEVICES"):
        environment.pop(
            "CUDA_VISIBLE_DEVICES", None
        )  # the launcher fails with an IndexError when it is set but empty
    deadline = time.monotonic() + arguments.timeout
    with open(arguments.out / "launch.log", "wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        with Progress(arguments.out, batches) as progress:
            while process.poll() is None and time.monotonic() < deadline:
                progress.update()
                time.sleep(0.2)
            progress.update(last=True)
        return process.poll()
    finally:
        if process.poll() is None:
            process.terminate()  # the launcher ends its ranks
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


class Progress:
    """One bar per rank in a terminal, else a line every few seconds; counts the events of the ranks."""

    def __init__(self, directory: Path, batches: int):
        from paddle_moe.console import rich_console

        self.directory, self.batches = directory, batches
        self.files: dict[tuple[int, int], TextIO] = {}
        self.done = {(ep, tp): 0 for ep in range(EP_SIZE) for tp in range(TP_SIZE)}
        self.line, self.next_line = "", 0.0
        self.bars = None
        console = rich_console()
        if console is not None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("batches"),
            )
            self.bars = Progress(*columns, TimeElapsedColumn(), console=console)
            self.tasks = {
                rank: self.bars.add_task("EP {} TP {}".format(*rank), total=batches) for rank in self.done
            }

    def __enter__(self) -> Progress:
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(self, *error) -> None:
        if self.bars is not None:
            self.bars.stop()
        for file in self.files.values():
            file.close()

    def update(self, last: bool = False) -> None:
        for ep, tp in self.done:
            path = self.directory / f"test_logs_ep_rank_{ep}_tp_rank_{tp}.jsonl"
            if (ep, tp) not in self.files and path.exists():
                self.files[ep, tp] = open(path, encoding="utf-8")
            if (ep, tp) in self.files:
                self.done[ep, tp] += self.files[ep, tp].read().count('"event": "moe_call"')
            if self.bars is not None:
                self.bars.update(self.tasks[ep, tp], completed=self.done[ep, tp])
        if self.bars is None and (last or time.monotonic() > self.next_line):
            self.next_line = time.monotonic() + 3
            line = f"batches done, of {self.batches}: "
            line += ", ".join("EP {} TP {}: {}".format(*rank, count) for rank, count in self.done.items())
            if line != self.line:
                print(line, flush=True)
            self.line = line


def main() -> int:
    arguments = parse_arguments()
    if "PADDLE_TRAINER_ID" in os.environ:
        return run_rank(arguments)
    try:
        code = start(arguments)
    except KeyboardInterrupt:
        print("stopped")
        return 130
    if code == 0:
        from paddle_moe.cli import main as command_line

        print(f"\n$ python -m paddle_moe logs {arguments.out}", flush=True)
        code = command_line(["logs", str(arguments.out)])
    return code


if __name__ == "__main__":
    sys.exit(main())
