"""`python -m paddle_moe bench`: the operator beside what a user would run instead, and the machine's limits.

Machines are shared and their speed drifts, so only ratios taken in the same round mean anything. Each round
measures the limits (a loop of multiply-adds, a loop of reads) and then every variant, with cold weights and
with warm ones; the tables show medians over the rounds with their spread. Inputs are random. A variant whose
result is wrong is not timed.

The floor of a call is max(FLOPs / FLOP limit, bytes of the active experts' weights / read limit). The FLOP
limit is that of fp32, so a processor that multiplies bf16 pairs directly can be below it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import _core, __version__, core, reference
from .console import print_table

DEFAULT_SHAPES = "8x2x1024x2048,64x8x2048x768"
FLUSH_BYTES = 256 << 20
CHECKED_TOKENS = 4
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}  # relative L2 against fp64 on the rounded inputs


@dataclass(frozen=True)
class Case:
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    num_tokens: int
    dtype: str

    @property
    def flops(self) -> int:
        return 6 * self.num_tokens * self.top_k * self.hidden_size * self.intermediate_size

    def weight_bytes(self, experts: int) -> int:
        size = 2 if self.dtype == "bfloat16" else 4
        return experts * 3 * self.hidden_size * self.intermediate_size * size


class Weights:
    """Random weights of one shape and dtype; `fp32` holds the values after rounding to the dtype."""

    def __init__(self, case: Case, generator: np.random.Generator):
        e, h, i = case.num_experts, case.hidden_size, case.intermediate_size
        self.fp32 = tuple(
            generator.random(shape, dtype=np.float32) * (2 * bound) - bound
            for shape, bound in (((e, h, 2 * i), h**-0.5), ((e, i, h), i**-0.5))
        )
        self.own = self.fp32
        if case.dtype == "bfloat16":
            self.own = tuple(reference.to_bf16_bits(w) for w in self.fp32)
            self.fp32 = tuple(reference.from_bf16_bits(w).astype(np.float32) for w in self.own)


class Inputs:
    def __init__(self, case: Case, generator: np.random.Generator):
        self.hidden = generator.standard_normal((case.num_tokens, case.hidden_size), dtype=np.float32)
        self.own = self.hidden
        if case.dtype == "bfloat16":
            self.own = reference.to_bf16_bits(self.hidden)
            self.hidden = reference.from_bf16_bits(self.own).astype(np.float32)
        logits = generator.standard_normal((case.num_tokens, case.num_experts), dtype=np.float32)
        self.table, self.weights = core.route(logits, case.top_k)
        self.active = len(np.unique(self.table))


# ---------------------------------------------------------------- variants: build(inputs, weights) -> call


def _paddle_moe_core(inputs: Inputs, weights: Weights) -> Callable[[], np.ndarray]:
    arguments = (inputs.own, inputs.table, inputs.weights, [weights.own[0]], [weights.own[1]])
    workspace = np.empty(core.workspace_size(*arguments), np.uint8)
    out = np.empty_like(inputs.own)
    return lambda: core.mixture_of_experts(*arguments, out=out, workspace=workspace)


def _paddle_moe_op(inputs: Inputs, weights: Weights) -> Callable[[], np.ndarray]:
    import paddle

    import paddle_moe

    def tensor(array: np.ndarray) -> paddle.Tensor:
        # Paddle takes a uint16 array for bfloat16 bits.
        return paddle.to_tensor(array, place=paddle.CPUPlace())

    arguments = [tensor(a) for a in (inputs.own, inputs.table, inputs.weights, *weights.own)]
    return lambda: paddle_moe.mixture_of_experts(*arguments)


def _numpy_loop(inputs: Inputs, weights: Weights) -> Callable[[], np.ndarray]:
    gate_up, down = weights.fp32
    half = down.shape[1]

    def call() -> np.ndarray:
        out = np.zeros_like(inputs.hidden)
        for e in np.unique(inputs.table):
            token, slot = np.nonzero(inputs.table == e)
            x = inputs.hidden[token] @ gate_up[e]
            gate, up = x[:, :half], x[:, half:]
            out[token] += ((gate / (1 + np.exp(-gate)) * up) @ down[e]) * inputs.weights[token, slot, None]
        return out

    return call


def _paddle_loop(inputs: Inputs, weights: Weights) -> Callable[[], np.ndarray]:
    import paddle
    import paddle.nn.functional as F

    hidden, table, router = (
        paddle.to_tensor(a, place=paddle.CPUPlace())
        for a in (inputs.hidden, inputs.table.astype(np.int64), inputs.weights)
    )
    # Per-expert parameters, as model code holds them.
    gate_up, down = ([paddle.to_tensor(w, place=paddle.CPUPlace()) for w in stack] for stack in weights.fp32)

    def call() -> paddle.Tensor:
        with paddle.no_grad():
            out = paddle.zeros_like(hidden)
            for e in range(len(down)):
                chosen = paddle.nonzero(table == e)
                if chosen.shape[0] == 0:
                    continue
                token = chosen[:, 0]
                gate, up = paddle.chunk(paddle.index_select(hidden, token) @ gate_up[e], 2, axis=-1)
                y = (F.silu(gate) * up) @ down[e]
                out = paddle.index_add(out, token, 0, y * paddle.gather_nd(router, chosen).unsqueeze(-1))
            return out

    return call


def _torch_loop(inputs: Inputs, weights: Weights) -> Callable[[], np.ndarray]:
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(core.num_threads())
    hidden, table, router = (
        torch.from_numpy(a) for a in (inputs.hidden, inputs.table.astype(np.int64), inputs.weights)
    )
    gate_up, down = (torch.from_numpy(w) for w in weights.fp32)
    if inputs.own.dtype == np.uint16:
        hidden, gate_up, down = (t.bfloat16() for t in (hidden, gate_up, down))

    def call() -> torch.Tensor:
        with torch.no_grad():
            out = torch.zeros(hidden.shape)
            for e in torch.unique(table).tolist():
                token, slot = torch.where(table == e)
                gate, up = (hidden[token] @ gate_up[e]).chunk(2, dim=-1)
                y = (F.silu(gate) * up) @ down[e]
                out.index_add_(0, token, y.float() * router[token, slot, None])
            return out

    return call


VARIANTS: dict[str, Callable[[Inputs, Weights], Callable[[], object]]] = {
    "paddle_moe.core": _paddle_moe_core,
    "paddle_moe": _paddle_moe_op,
    "numpy loop": _numpy_loop,
    "paddle loop": _paddle_loop,
    "torch loop": _torch_loop,
}


# ---------------------------------------------------------------- measuring


def _as_float(result: object) -> np.ndarray:
    array = result if isinstance(result, np.ndarray) else result.numpy()
    return reference.from_bf16_bits(array) if array.dtype == np.uint16 else array


def _relative_error(result: object, case: Case, inputs: Inputs, weights: Weights) -> float:
    """Relative L2 error of the first tokens against the fp64 reference."""
    n = min(CHECKED_TOKENS, case.num_tokens)
    table = inputs.table[:n]
    used = np.unique(table)
    expected = reference.mixture_of_experts(
        inputs.hidden[:n],
        np.searchsorted(used, table),
        inputs.weights[:n],
        *(list(w[used]) for w in weights.fp32),
    )
    return float(np.linalg.norm(_as_float(result)[:n] - expected) / np.linalg.norm(expected))


class Limits:
    def __init__(self, threads: int):
        self._buffer = np.ones(FLUSH_BYTES // 4, np.float32)
        self._threads = threads

    def flush(self) -> None:
        """Reads far more than any cache holds."""
        _core.measure_read(self._buffer, 1, self._threads)

    def measure(self) -> tuple[float, float]:
        """(fp32 FLOP/s, bytes/s read)."""
        read = max(_core.measure_read(self._buffer, streams, self._threads) for streams in (1, 2, 4))
        return _core.measure_flops(self._threads), read


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _run_case(case: Case, weights: Weights, names: list[str], rounds: int, limits: Limits) -> dict:
    generator = np.random.default_rng([case.num_tokens, case.num_experts])
    inputs = Inputs(case, generator)
    calls, errors = {}, {}
    for name in names:
        try:
            call = VARIANTS[name](inputs, weights)
        except ImportError as error:
            errors[name] = f"not installed ({error.name})"
            continue
        error = _relative_error(call(), case, inputs, weights)
        errors[name] = error
        # Only ours decides whether the run is good; a peer that is wrong is shown as such.
        if error <= TOLERANCE[case.dtype] or name.startswith("paddle_moe"):
            calls[name] = call
    samples = {name: {"cold": [], "warm": []} for name in calls}
    floors = {"cold": [], "warm": []}
    machine = []
    for _ in range(rounds):
        flops, read = limits.measure()
        machine.append((flops, read))
        for state in ("cold", "warm"):
            floors[state].append(max(case.flops / flops, case.weight_bytes(inputs.active) / read))
            for name, call in calls.items():
                if state == "cold":
                    limits.flush()
                else:
                    call()
                samples[name][state].append(_seconds(call))
    ours = "paddle_moe" if "paddle_moe" in samples else "paddle_moe.core"

    def spread(values: list[float]) -> dict:
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    return {
        **case.__dict__,
        "active_experts": inputs.active,
        "limits": {
            "fp32_flops_per_second": spread([flops for flops, _ in machine]),
            "read_bytes_per_second": spread([read for _, read in machine]),
        },
        "variants": {
            name: {
                "relative_error": errors[name],
                **{
                    state: {
                        "milliseconds": spread([1e3 * t for t in times]),
                        "times_floor": spread([t / f for t, f in zip(times, floors[state])]),
                        "times_paddle_moe": spread([t / o for t, o in zip(times, samples[ours][state])])
                        if ours in samples
                        else None,
                    }
                    for state, times in states.items()
                },
            }
            for name, states in samples.items()
        },
        "left_out": {name: errors[name] for name in names if name not in samples},
    }


def _print_case(result: dict) -> None:
    limits = result["limits"]
    title = (
        f"E={result['num_experts']} K={result['top_k']} H={result['hidden_size']} "
        f"I={result['intermediate_size']} T={result['num_tokens']} {result['dtype']}: "
        f"{result['active_experts']} experts active; limits "
        f"{limits['fp32_flops_per_second']['median'] / 1e9:.0f} GFLOP/s, "
        f"{limits['read_bytes_per_second']['median'] / 1e9:.1f} GB/s"
    )
    rows = []
    for name, figures in result["variants"].items():
        row = [name]
        for state in ("cold", "warm"):
            ms, floor, ours = (figures[state][k] for k in ("milliseconds", "times_floor", "times_paddle_moe"))
            row += [
                f"{ms['median']:.2f}",
                f"{floor['median']:.2f}",
                f"{floor['min']:.2f}-{floor['max']:.2f}",
                f"{ours['median']:.2f}" if ours else "-",
            ]
        rows.append([*row, f"{figures['relative_error']:.1e}"])
    columns = ["variant"]
    for state in ("cold", "warm"):
        columns += [f"{state} ms", "x floor", "spread", "x ours"]
    print_table(title, [*columns, "error"], rows)
    for name, reason in result["left_out"].items():
        why = reason if isinstance(reason, str) else f"relative error {reason:.1e}: not timed"
        print(f"  {name}: {why}")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _save_picture(results: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[tuple, list[dict]] = {}
    for result in results:
        key = tuple(result[k] for k in ("num_experts", "top_k", "hidden_size", "intermediate_size", "dtype"))
        groups.setdefault(key, []).append(result)
    figure, axes = pyplot.subplots(
        1, len(groups), figsize=(5.2 * len(groups), 4.2), squeeze=False, sharey=True
    )
    for axis, (key, members) in zip(axes[0], groups.items()):
        for name in dict.fromkeys(name for member in members for name in member["variants"]):
            shown = [m for m in members if name in m["variants"]]
            spread = [m["variants"][name]["cold"]["times_floor"] for m in shown]
            tokens = [m["num_tokens"] for m in shown]
            (line,) = axis.plot(tokens, [s["median"] for s in spread], marker="o", label=name)
            axis.fill_between(
                tokens,
                [s["min"] for s in spread],
                [s["max"] for s in spread],
                color=line.get_color(),
                alpha=0.15,
            )
        axis.axhline(1, color="black", linewidth=1, linestyle="--", label="limit of the machine")
        axis.set(xscale="log", yscale="log", xlabel="tokens", title="E={} K={} H={} I={} {}".format(*key))
        axis.set_xticks([m["num_tokens"] for m in members], [str(m["num_tokens"]) for m in members])
        axis.minorticks_off()
        axis.grid(True, alpha=0.3)
    axes[0][0].set_ylabel("time / floor, cold weights (lower is better)")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the benchmark to its subcommand."""
    parser.add_argument(
        "--shapes", default=DEFAULT_SHAPES, help="ExKxHxI, comma-separated (default: %(default)s)"
    )
    parser.add_argument("--tokens", default="1,8,64,512", help="comma-separated (default: %(default)s)")
    parser.add_argument("--dtypes", default="float32", help="float32,bfloat16 (default: %(default)s)")
    parser.add_argument(
        "--variants",
        default=",".join(VARIANTS),
        help="comma-separated, quoted (default: all that are installed)",
    )
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="0: the default of the operator")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all figures")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="write a chart of time over floor")


def main(arguments: argparse.Namespace) -> int:
    """Runs the benchmark; 1 when a result of paddle_moe is wrong, 2 when an option is."""
    names = arguments.variants.split(",")
    unknown = [*(set(names) - set(VARIANTS)), *(set(arguments.dtypes.split(",")) - set(TOLERANCE))]
    try:
        shapes = [tuple(int(n) for n in shape.split("x")) for shape in arguments.shapes.split(",")]
        tokens = [int(n) for n in arguments.tokens.split(",")]
    except ValueError:
        shapes, tokens = [], []
    if unknown or not tokens or arguments.rounds < 1 or any(len(s) != 4 or min(s) < 1 for s in shapes):
        print(
            f"paddle_moe bench: --shapes must be like {DEFAULT_SHAPES}, --tokens like 1,8, --rounds at least "
            f"1, --dtypes from {', '.join(TOLERANCE)}, --variants from {', '.join(VARIANTS)}"
            + (f"; got {', '.join(unknown)}" if unknown else ""),
            file=sys.stderr,
        )
        return 2
    core.set_num_threads(arguments.threads)
    # Read when Paddle is imported, which would otherwise run the loop of the peer on one thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(core.num_threads()))
    if "paddle_moe" in names:
        import paddle_moe

        paddle_moe.set_num_threads(arguments.threads)
    limits = Limits(core.num_threads())
    results = []
    for shape in shapes:
        for dtype in arguments.dtypes.split(","):
            weights = Weights(Case(*shape, 0, dtype), np.random.default_rng(shape))
            for t in tokens:
                results.append(_run_case(Case(*shape, t, dtype), weights, names, arguments.rounds, limits))
                _print_case(results[-1])
    report = {
        "paddle_moe": __version__,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": _processor(),
        "threads": core.num_threads(),
        "isa": core.isa_name(),
        "python": platform.python_version(),
        "environment": {
            k: os.environ.get(k) for k in ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE", "PADDLE_MOE_ISA")
        },
        "versions": {
            name: sys.modules[name].__version__
            for name in ("numpy", "paddle", "torch")
            if name in sys.modules
        },
        "results": results,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.picture:
        _save_picture(results, arguments.picture)
    wrong = [
        f"{name} at T={r['num_tokens']} {r['dtype']}: relative error {v['relative_error']:.1e}"
        for r in results
        for name, v in r["variants"].items()
        if not v["relative_error"] <= TOLERANCE[r["dtype"]]
    ]
    for line in wrong:
        print(f"paddle_moe bench: wrong result: {line}", file=sys.stderr)
    return 1 if wrong else 0
