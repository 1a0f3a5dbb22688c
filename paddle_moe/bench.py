"""`python -m paddle_moe bench`: the operator beside what a user would run instead, and the machine's limits.

Machines are shared and their speed drifts, so only ratios taken in the same round mean anything. Each round
measures the limits (a loop of multiply-adds, a loop of reads) and then every variant, with cold weights and
with warm ones; the tables show medians over the rounds with their spread. Inputs are random. A variant whose
result is wrong is not timed.

Weights of the dtypes int8 and float8_e4m3fn have a scale per output channel, those of int4 one per 128
inputs of a channel, and are always stored [out, in]; the activations are bfloat16. ggml runs the same numbers
as Q8_0 and Q4_0; it rounds activations to 8 bits. Loops run the dequantised weights in float32.

The floor of a call is max(FLOPs / FLOP limit, bytes of the active experts' weights / read limit). With
--backward a call is forward and backward, three times the FLOPs and bytes, and gives all gradients; with
quantised weights, which have none, twice, and gives those of hidden_states and router_weights. The FLOP
limit is that of multiply-adds of bf16 pairs (VDPBF16PS) for bfloat16 and quantised weights where the
processor has them, of fp32 otherwise, which products of integers may pass, and for gradients through
quantised weights.

Before the limits and before each variant the process sleeps until the threads of the variant before do.
Cold means that a buffer larger than any cache was read, and then a small layer of the same variant was run
for a few milliseconds, as the layer before would in a model, so that the variant's threads are awake.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from paddle_moe import __version__, _core, core, reference
from paddle_moe.bench_variants import (
    DEFAULT_VARIANTS,
    ONE_THREAD,
    QUANTISED,
    VARIANTS,
    WITHOUT_BACKWARD,
    WITHOUT_QUANTISED,
    Case,
    Inputs,
    NotSupported,
    Weights,
)
from paddle_moe.console import print_table
from paddle_moe.huge_pages import why_not

DEFAULT_SHAPES = "8x2x1024x2048,64x8x2048x768"
FLUSH_BYTES = 256 << 20
WAKE_SECONDS = 3e-3
# OpenMP's idle threads and ggml's spin before they sleep, and would take a core from what is measured next.
SETTLE_SECONDS = 0.22
CHECKED_TOKENS = 4
# Relative L2 against fp64 on the rounded inputs; what is accepted of a peer, which may quantise activations.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 2e-3, **dict.fromkeys(QUANTISED, 1e-2)}
PEER_TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2, **dict.fromkeys(QUANTISED, 5e-2)}


# ---------------------------------------------------------------- measuring


def _as_float(result: object) -> np.ndarray:
    array = result if isinstance(result, np.ndarray) else result.numpy()
    return reference.from_bf16_bits(array) if array.dtype == np.uint16 else array


def _relative_error(result: object, case: Case, inputs: Inputs, weights: Weights) -> float:
    """Relative L2 error of the first tokens against the fp64 reference."""
    n = min(CHECKED_TOKENS, case.num_tokens)
    table = inputs.table[:n]
    used = np.unique(table)
    arguments = (
        inputs.hidden[:n],
        np.searchsorted(used, table),
        inputs.weights[:n],
        *(list(w[used]) for w in weights.fp32),
    )
    if case.backward:
        expected = reference.mixture_of_experts_backward(inputs.grad[:n], *arguments)["hidden_states"]
    else:
        expected = reference.mixture_of_experts(*arguments)
    return float(np.linalg.norm(_as_float(result)[:n] - expected) / np.linalg.norm(expected))


class Limits:
    def __init__(self, threads: int):
        self._buffer = np.ones(FLUSH_BYTES // 4, np.float32)
        self._threads = threads

    def flush(self) -> None:
        """Reads far more than any cache holds."""
        _core.measure_read(self._buffer, 1, self._threads)

    def measure(self, case: Case, threads: int | None = None) -> tuple[float, float]:
        """(FLOP/s of the instructions for this case, bytes/s read) of all threads or of some."""
        threads = threads or self._threads
        read = max(_core.measure_read(self._buffer, streams, threads) for streams in (1, 2, 4))
        pairs = case.dtype == "bfloat16" or (case.dtype in QUANTISED and not case.backward)
        return _core.measure_flops(pairs, threads), read


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _wake(call: Callable[[], object]) -> None:
    end = time.perf_counter() + WAKE_SECONDS
    while time.perf_counter() < end:
        call()


def _run_case(case: Case, weights: Weights, names: list[str], rounds: int, limits: Limits) -> dict:
    generator = np.random.default_rng([case.num_tokens, case.num_experts])
    inputs = Inputs(case, generator)
    small = Case(4, 2, 256, 512, 8, case.dtype, case.backward)
    small_layer = Inputs(small, generator), Weights(small, generator)
    calls, wakers, errors = {}, {}, {}
    for name in names:
        try:
            call = VARIANTS[name](inputs, weights)
        except ImportError as error:
            errors[name] = f"not installed ({error.name})"
            continue
        except NotSupported as error:
            errors[name] = str(error)
            continue
        error = _relative_error(call(), case, inputs, weights)
        errors[name] = error
        # Only ours decides whether the run is good; a peer that is wrong is shown as such.
        if error <= PEER_TOLERANCE[case.dtype] or name.startswith("paddle_moe"):
            calls[name] = call
            wakers[name] = VARIANTS[name](*small_layer)
    samples = {name: {"cold": [], "warm": []} for name in calls}
    floors = {"cold": [], "warm": []}
    machine, one_thread = [], []
    settle = SETTLE_SECONDS if any(not name.startswith("paddle_moe.core") for name in calls) else 0
    for _ in range(rounds):
        time.sleep(settle)
        flops, read = limits.measure(case)
        machine.append((flops, read))
        if ONE_THREAD in calls:
            one_thread.append(limits.measure(case, 1))
        for state in ("cold", "warm"):
            floors[state].append(max(case.flops / flops, case.weight_bytes(inputs.active) / read))
            for name, call in calls.items():
                time.sleep(settle)
                if state == "cold":
                    limits.flush()
                    _wake(wakers[name])
                else:
                    call()
                samples[name][state].append(_seconds(call))
    ours = "paddle_moe" if "paddle_moe" in samples else "paddle_moe.core"

    def spread(values: Sequence[float]) -> dict:
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    def limits_of(measured: list[tuple[float, float]]) -> dict:
        flops, read = zip(*measured)
        return {"flops_per_second": spread(flops), "read_bytes_per_second": spread(read)}

    return {
        **case.__dict__,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "rounds": rounds,
        "active_experts": inputs.active,
        "limits": limits_of(machine),
        **({"limits_of_one_thread": limits_of(one_thread)} if one_thread else {}),
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
    one = result.get("limits_of_one_thread")
    title = (
        f"E={result['num_experts']} K={result['top_k']} H={result['hidden_size']} "
        f"I={result['intermediate_size']} T={result['num_tokens']} {result['dtype']}"
        f"{' with backward' if result['backward'] else ''}: "
        f"{result['active_experts']} experts active; limits "
        f"{limits['flops_per_second']['median'] / 1e9:.0f} GFLOP/s, "
        f"{limits['read_bytes_per_second']['median'] / 1e9:.1f} GB/s"
        + (
            f"; of one thread {one['flops_per_second']['median'] / 1e9:.0f} GFLOP/s, "
            f"{one['read_bytes_per_second']['median'] / 1e9:.1f} GB/s"
            if one
            else ""
        )
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


@functools.cache
def _commit() -> str | None:
    """What `git describe` says of the clone that this file is in; None where it is in none."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    directory = Path(__file__).parent
    if not (directory.parent / ".git").exists():
        return None
    try:
        return subprocess.run(
            command, cwd=directory, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _save_picture(results: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[tuple, list[dict]] = {}
    for result in results:
        key = tuple(result[k] for k in ("num_experts", "top_k", "hidden_size", "intermediate_size", "dtype"))
        groups.setdefault(key, []).append(result)
    figure, axes = pyplot.subplots(
        2, len(groups), figsize=(5.2 * len(groups), 8), squeeze=False, sharex="row", sharey="row"
    )
    for (floors, roofline), (key, members) in zip(axes.T, groups.items()):
        intensity, ridge = [_intensity(m) for m in members], statistics.median(map(_ridge, members))
        for name in dict.fromkeys(name for member in members for name in member["variants"]):
            shown = [m for m in members if name in m["variants"]]
            spread = [m["variants"][name]["cold"]["times_floor"] for m in shown]
            tokens = [m["num_tokens"] for m in shown]
            color = pyplot.get_cmap("tab20")(list(VARIANTS).index(name))
            floors.plot(tokens, [s["median"] for s in spread], marker="o", color=color, label=name)
            lowest, highest = ([s[k] for s in spread] for k in ("min", "max"))
            floors.fill_between(tokens, lowest, highest, color=color, alpha=0.15)
            # The roof over the time in floors is the share of the FLOP limit that was reached.
            share = [min(1, _intensity(m) / _ridge(m)) / s["median"] for m, s in zip(shown, spread)]
            roofline.plot([_intensity(m) for m in shown], share, "o", color=color, label=name)
        floors.axhline(1, color="black", linewidth=1, linestyle="--", label="limit of the machine")
        floors.set(xscale="log", yscale="log", xlabel="tokens", title="E={} K={} H={} I={} {}".format(*key))
        floors.set_xticks([m["num_tokens"] for m in members], [str(m["num_tokens"]) for m in members])
        ends = [min(intensity) / 2, ridge, max(2 * ridge, 2 * max(intensity))]
        roofline.plot(ends, [x / ridge if x < ridge else 1 for x in ends], color="black", linewidth=1)
        roofline.set(xscale="log", yscale="log", xlabel="FLOP per byte of weights")
        for axis in (floors, roofline):
            axis.minorticks_off()
            axis.grid(True, alpha=0.3)
    axes[0][0].set_ylabel("time / floor, cold weights (lower is better)")
    axes[1][0].set_ylabel("share of the FLOP limit; line: what reading and FLOPs allow")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _report(earlier: dict | None, results: list[dict]) -> dict:
    """What is written: also the earlier report's results of cases that are not among the new ones."""
    report = {
        "paddle_moe": __version__,
        "processor": _processor(),
        "threads": core.get_num_threads(),
        "isa": core.isa_name(),
        "huge_pages": why_not() is None,
        "python": platform.python_version(),
        "environment": {
            k: os.environ.get(k) for k in ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE", "PADDLE_MOE_ISA")
        },
        "versions": {
            name: sys.modules[name].__version__
            for name in ("numpy", "paddle", "torch")
            if name in sys.modules
        },
    }
    if earlier is None:
        return {**report, "results": results}
    for key in ("processor", "threads", "isa"):
        if earlier[key] != report[key]:
            raise ValueError(
                f"--merge: the file's {key} is {earlier[key]!r}, here it is {report[key]!r}; "
                "write another file"
            )

    def case(result: dict) -> tuple:
        return tuple(result[k] for k in Case.__dataclass_fields__)

    report["versions"] = {**earlier.get("versions", {}), **report["versions"]}
    cases = {case(result): result for result in [*earlier["results"], *results]}
    order = sorted(cases, key=lambda c: (c[0], c[5] != "float32", c))
    return {**report, "results": [cases[c] for c in order]}


def _intensity(result: dict) -> float:
    """FLOP per byte of the active experts' weights."""
    case = Case(*(result[k] for k in Case.__dataclass_fields__))
    return case.flops / case.weight_bytes(result["active_experts"])


def _ridge(result: dict) -> float:
    """FLOP per byte from which on a call is bound by FLOPs."""
    flops, read = (result["limits"][k]["median"] for k in ("flops_per_second", "read_bytes_per_second"))
    return flops / read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the benchmark to its subcommand."""
    parser.add_argument(
        "--device", default="cpu", help="cpu; benchmarks/gpu_moe.py in the repository measures a GPU"
    )
    parser.add_argument(
        "--shapes", default=DEFAULT_SHAPES, help="ExKxHxI, comma-separated (default: %(default)s)"
    )
    parser.add_argument("--tokens", default="1,8,64,512", help="comma-separated (default: %(default)s)")
    parser.add_argument(
        "--dtypes",
        default="float32",
        help="float32,bfloat16,float16,int8,int4,float8_e4m3fn (default: %(default)s)",
    )
    parser.add_argument(
        "--variants",
        default=DEFAULT_VARIANTS,
        help="comma-separated, quoted, also 'paddle_moe.core list', 'paddle_moe.core permuted', "
        "'paddle_moe.core prepacked' and, beside quantised weights, 'bfloat16 permuted' and "
        "'bfloat16 prepacked' (default: %(default)s)",
    )
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="0: the default of the operator")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all figures")
    parser.add_argument(
        "--merge", action="store_true", help="keep the other cases that FILE.json has, of the same machine"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="write a chart: time over floor, and the roofline"
    )


def _positive_integers(text: str, separator: str) -> tuple[int, ...]:
    """Those of a text; none if it holds anything else."""
    parts = text.split(separator)
    numbers = tuple(int(part) for part in parts if part.isdecimal() and int(part) > 0)
    return numbers if len(numbers) == len(parts) else ()


def _read(arguments: argparse.Namespace) -> tuple[list[str], list[tuple[int, ...]], list[int], dict | None]:
    """Variants, shapes, tokens and the report to merge with; all that can be wrong fails before measuring.

    Raises:
        ValueError: an option is wrong.
    """
    if arguments.device != "cpu":
        raise ValueError(
            f"--device must be cpu, got {arguments.device}; a GPU is measured by benchmarks/gpu_moe.py in "
            "the repository"
        )
    names = arguments.variants.split(",")
    if arguments.backward:
        names = [name for name in names if name not in WITHOUT_BACKWARD]
    for option, given, choices in (
        ("variants", names, VARIANTS),
        ("dtypes", arguments.dtypes.split(","), TOLERANCE),
    ):
        if unknown := set(given) - set(choices):
            raise ValueError(
                f"--{option} must be from {', '.join(choices)}, got {', '.join(sorted(unknown))}"
            )
    shapes = [_positive_integers(shape, "x") for shape in arguments.shapes.split(",")]
    if any(len(shape) != 4 or shape[1] > shape[0] for shape in shapes):
        raise ValueError(
            f"--shapes must be like {DEFAULT_SHAPES}, with no more experts per token than experts, got "
            f"{arguments.shapes}"
        )
    tokens = _positive_integers(arguments.tokens, ",")
    if not tokens:
        raise ValueError(f"--tokens must be like 1,8, got {arguments.tokens}")
    if arguments.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {arguments.rounds}")
    quantised = [dtype for dtype in arguments.dtypes.split(",") if Case(*shapes[0], 1, dtype).is_quantised]
    if not names or quantised and set(names) <= set(WITHOUT_QUANTISED):
        what = "--backward" if not names else f"--dtypes {quantised[0]}"
        raise ValueError(f"--variants must have one that is able to do {what}, got {arguments.variants}")
    if arguments.merge and not arguments.out:
        raise ValueError("--merge needs --out FILE.json")
    for option in ("out", "picture"):
        path = getattr(arguments, option)
        if path and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"--{option} must be a file in a directory that exists, got {path}")
    if arguments.picture and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--picture needs matplotlib, which is not installed: pip install matplotlib")
    try:
        core.set_num_threads(arguments.threads)
    except ValueError as error:
        raise ValueError(f"--threads: {error}") from None
    earlier = None
    if arguments.merge and arguments.out.exists():
        try:
            earlier = json.loads(arguments.out.read_text())
            _report(earlier, [])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(
                f"--merge: {arguments.out} is no report of this command; write another file"
            ) from None
    return names, shapes, tokens, earlier


def main(arguments: argparse.Namespace) -> int:
    """Runs the benchmark; 1 when a result of paddle_moe is wrong, 2 when an option is."""
    try:
        names, shapes, tokens, earlier = _read(arguments)
    except ValueError as error:
        print(f"paddle_moe bench: {error}", file=sys.stderr)
        return 2
    # Read when Paddle is imported, which would otherwise run the loop of the peer on one thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(core.get_num_threads()))
    if "paddle_moe" in names:
        import paddle_moe

        paddle_moe.set_num_threads(arguments.threads)
    limits = Limits(core.get_num_threads())
    print(
        "Medians over the rounds. x floor: by the least time that the limits of the machine allow, and its "
        "spread; x ours: by the time of paddle_moe.\n"
    )
    results = []
    for shape in shapes:
        for dtype in arguments.dtypes.split(","):
            weights = Weights(Case(*shape, 0, dtype), np.random.default_rng(shape))
            for t in tokens:
                case = Case(*shape, t, dtype, arguments.backward)
                shown = [name for name in names if not (case.is_quantised and name in WITHOUT_QUANTISED)]
                results.append(_run_case(case, weights, shown, arguments.rounds, limits))
                _print_case(results[-1])
                report = _report(earlier, results)
                if arguments.out:
                    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.picture:
        _save_picture(report["results"], arguments.picture)
    wrong = [
        f"{name} at T={r['num_tokens']} {r['dtype']}: relative error {v['relative_error']:.1e}"
        for r in results
        for name, v in r["variants"].items()
        if name.startswith("paddle_moe") and not v["relative_error"] <= TOLERANCE[r["dtype"]]
    ]
    for line in wrong:
        print(f"paddle_moe bench: wrong result: {line}", file=sys.stderr)
    return 1 if wrong else 0
