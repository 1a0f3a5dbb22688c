"""The layer on a GPU beside what a PyTorch user would run instead, and beside the limits of the card.

    python benchmarks/gpu_moe.py --out results.json

Every variant computes the same layer from a given routing, in bf16 on random data, as a CUDA graph, so that
no time of the host is in the figures. The peers get the sorted order of their rows for nothing: it is
prepared before the clock starts, while paddle_moe sorts within its time. Each round times the limits (the
product of two 8192 x 8192 matrices, a copy of 2 GiB) and then every variant once, after the L2 cache was
overwritten. Tables show medians over the rounds; the file also has the smallest and the largest.

The floor of a call is max(FLOPs / rate of the product, bytes of the weights of the active experts / rate of
the copy). A result that differs from an fp32 computation is reported and, if it is paddle_moe's, makes the
exit status 1.

Peers: "triton": two grouped GEMMs, an activation kernel and a sum, in the manner of vLLM's fused_moe, the
best of a few tile sizes; "grouped_mm": torch._grouped_mm on gathered rows; "cublas loop": torch.mm per
expert.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from paddle_moe import core

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# name: experts in all, on this GPU, K, H, I
SHAPES = {
    "qwen3-30b": (128, 128, 8, 2048, 768),
    "deepseek-v3-ep8": (256, 32, 8, 7168, 2048),
    "mixtral-8x7b": (8, 8, 2, 4096, 14336),
    "olmoe": (64, 64, 8, 2048, 1024),
    "sonicmoe-30b": (64, 64, 4, 4096, 1024),
}
TOKENS = (1, 8, 64, 512, 4096, 16384)
# The cases that the goals name, measured first: long runs may be cut off.
HEADLINES = (("sonicmoe-30b", 32768), ("qwen3-30b", 64), ("sonicmoe-30b", 4096), ("deepseek-v3-ep8", 512))
TOLERANCE = 1e-2  # relative L2 against fp32 on the same bf16 inputs
CHECKED_TOKENS = 16
FLUSH_BYTES = 256 << 20  # several times any L2 cache
PRODUCT_SIZE = 8192
COPY_BYTES = 2 << 30


@dataclass(frozen=True)
class Case:
    shape: str
    num_tokens: int

    def __getattr__(self, name: str) -> int:
        fields = ("num_experts", "local_experts", "top_k", "hidden_size", "intermediate_size")
        if name not in fields:
            raise AttributeError(name)
        return SHAPES[self.shape][fields.index(name)]


class Weights:
    """Random weights near 1 / sqrt(inputs): stored [in, out] for paddle_moe, and [out, in] for the peers."""

    def __init__(self, case: Case, device: str):
        e, h, i = case.local_experts, case.hidden_size, case.intermediate_size
        self.gate_up = torch.randn(e, h, 2 * i, device=device, dtype=torch.bfloat16).mul_(h**-0.5)
        self.down = torch.randn(e, i, h, device=device, dtype=torch.bfloat16).mul_(i**-0.5)
        self.gate_up_transposed = self.gate_up.transpose(1, 2).contiguous()
        self.down_transposed = self.down.transpose(1, 2).contiguous()


class Inputs:
    """Tokens with a random routing, and the local (token, k) slots in the order of their experts."""

    def __init__(self, case: Case, device: str):
        t, k = case.num_tokens, case.top_k
        self.hidden = torch.randn(t, case.hidden_size, device=device, dtype=torch.bfloat16)
        scores, table = torch.randn(t, case.num_experts, device=device).topk(k)
        self.table, self.weights = table.int(), scores.softmax(-1)
        experts = self.table.flatten()
        order = experts.argsort(stable=True)
        self.counts = experts.bincount(minlength=case.num_experts)[: case.local_experts].tolist()
        self.num_rows = sum(self.counts)
        self.slots = order[: self.num_rows]
        self.tokens = self.slots // k
        self.row_weights = self.weights.flatten()[self.slots, None]
        self.ends = torch.tensor(self.counts, device=device).cumsum(0).int()
        self.active = sum(count > 0 for count in self.counts)

    def flops(self, case: Case) -> int:
        return 6 * self.num_rows * case.hidden_size * case.intermediate_size

    def weight_bytes(self, case: Case) -> int:
        return self.active * 3 * case.hidden_size * case.intermediate_size * 2


def expected_rows(case: Case, inputs: Inputs, weights: Weights) -> torch.Tensor:
    """The first tokens in fp32, with the intermediate rounded to bf16."""
    num_tokens = min(case.num_tokens, CHECKED_TOKENS)
    out = torch.zeros(num_tokens, case.hidden_size, device=inputs.hidden.device)
    for token in range(num_tokens):
        for expert, weight in zip(inputs.table[token].tolist(), inputs.weights[token]):
            if expert < case.local_experts:
                gate, up = (inputs.hidden[token].float() @ weights.gate_up[expert].float()).chunk(2)
                rounded = (F.silu(gate) * up).bfloat16().float()
                out[token] += weight * (rounded @ weights.down[expert].float())
    return out


# ---------------------------------------------------------------- variants: (case, inputs, weights) -> call


def paddle_moe_layer(case: Case, inputs: Inputs, weights: Weights) -> Callable[[], torch.Tensor]:
    arguments = (inputs.hidden, inputs.table, inputs.weights, weights.gate_up, weights.down)
    workspace = torch.empty(core.workspace_size(*arguments), dtype=torch.uint8, device=inputs.hidden.device)
    out = torch.empty_like(inputs.hidden)
    return lambda: core.mixture_of_experts(*arguments, out=out, workspace=workspace)


def _sum_over_k(case: Case, inputs: Inputs) -> Callable[[torch.Tensor], torch.Tensor]:
    """Weighted rows in expert order -> tokens; slots of other GPUs stay zero."""
    slots = inputs.hidden.new_zeros(case.num_tokens * case.top_k, case.hidden_size)

    def call(rows: torch.Tensor) -> torch.Tensor:
        slots.index_copy_(0, inputs.slots, rows * inputs.row_weights.to(rows.dtype))
        return slots.view(case.num_tokens, case.top_k, -1).sum(1)

    return call


def grouped_mm_pipeline(case: Case, inputs: Inputs, weights: Weights) -> Callable[[], torch.Tensor]:
    gate_up, down = weights.gate_up_transposed.mT, weights.down_transposed.mT
    combine = _sum_over_k(case, inputs)

    def call() -> torch.Tensor:
        rows = torch._grouped_mm(inputs.hidden[inputs.tokens], gate_up, offs=inputs.ends)
        gate, up = rows.chunk(2, dim=-1)
        return combine(torch._grouped_mm(F.silu(gate) * up, down, offs=inputs.ends))

    return call


def cublas_loop(case: Case, inputs: Inputs, weights: Weights) -> Callable[[], torch.Tensor]:
    combine = _sum_over_k(case, inputs)
    rows = inputs.hidden.new_empty(inputs.num_rows, case.hidden_size)

    def call() -> torch.Tensor:
        first = 0
        for expert, count in enumerate(inputs.counts):
            if count:
                mine = slice(first, first + count)
                x = inputs.hidden[inputs.tokens[mine]]
                gate, up = (x @ weights.gate_up_transposed[expert].mT).chunk(2, dim=-1)
                torch.mm(F.silu(gate) * up, weights.down_transposed[expert].mT, out=rows[mine])
                first += count
        return combine(rows)

    return call


if triton:

    @triton.jit
    def _grouped_gemm(
        a, b, c, slots, block_expert, block_first, block_end, router_weights, num_blocks, N, K, TOP_K,
        GATHER: tl.constexpr, WEIGHTED: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        # Neighbouring programs share weights: GROUP blocks of rows go through the same columns together.
        program = tl.program_id(0)
        columns = tl.cdiv(N, BLOCK_N)
        group = program // (GROUP * columns)
        group_rows = min(num_blocks - group * GROUP, GROUP)
        within = program % (GROUP * columns)
        block = group * GROUP + within % group_rows
        n = (within // group_rows) * BLOCK_N + tl.arange(0, BLOCK_N)

        row = tl.load(block_first + block) + tl.arange(0, BLOCK_M)
        valid = row < tl.load(block_end + block)
        slot = tl.load(slots + row, mask=valid, other=0)
        source = slot // TOP_K if GATHER else slot
        k = tl.arange(0, BLOCK_K)
        a_tile = a + source[:, None] * K + k[None, :]
        b_tile = b + tl.load(block_expert + block).to(tl.int64) * N * K + n[None, :] * K + k[:, None]
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for _ in range(0, K, BLOCK_K):  # K is a multiple of BLOCK_K, N one of BLOCK_N
            total = tl.dot(tl.load(a_tile, mask=valid[:, None], other=0.0), tl.load(b_tile), total)
            a_tile += BLOCK_K
            b_tile += BLOCK_K
        if WEIGHTED:
            total *= tl.load(router_weights + slot, mask=valid, other=0.0)[:, None]
        tl.store(c + slot[:, None] * N + n[None, :], total.to(c.dtype.element_ty), mask=valid[:, None])

    @triton.jit
    def _silu_and_multiply(gate_up, out, size, count, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        valid = i < count
        gate = gate_up + i // size * 2 * size + i % size
        x = tl.load(gate, mask=valid, other=0.0).to(tl.float32)
        y = x * tl.sigmoid(x) * tl.load(gate + size, mask=valid, other=0.0).to(tl.float32)
        tl.store(out + i, y.to(out.dtype.element_ty), mask=valid)


# BLOCK_M, BLOCK_N, BLOCK_K, GROUP, warps, stages
FEW_ROWS = [(16, 64, 128, 1, 4, 4), (16, 128, 128, 1, 4, 4), (16, 128, 64, 1, 4, 5)]
MANY_ROWS = [(64, 128, 64, 8, 4, 4), (128, 128, 64, 8, 8, 4), (128, 256, 64, 8, 8, 4)]


def triton_layer(
    case: Case, inputs: Inputs, weights: Weights, tiles: tuple[int, ...] | None = None
) -> Callable[[], torch.Tensor]:
    if triton is None:
        raise ImportError("triton")
    if tiles is None:
        rows_per_expert = inputs.num_rows / max(inputs.active, 1)
        candidates = FEW_ROWS if rows_per_expert < 24 else MANY_ROWS
        built = [triton_layer(case, inputs, weights, tiles) for tiles in candidates]
        return min(built, key=lambda call: statistics.median(time_graph(capture(call)) for _ in range(3)))
    block_m, block_n, block_k, group, warps, stages = tiles
    t, k, h, i = case.num_tokens, case.top_k, case.hidden_size, case.intermediate_size
    device = inputs.hidden.device
    blocks = []
    first = 0
    for expert, count in enumerate(inputs.counts):
        end = first + count
        blocks += [(expert, row, end) for row in range(first, end, block_m)]
        first = end
    columns = torch.tensor(blocks or [(0, 0, 0)], dtype=torch.int32, device=device).T.contiguous()
    gate_up = inputs.hidden.new_empty(t * k, 2 * i)
    intermediate = inputs.hidden.new_empty(t * k, i)
    rows = inputs.hidden.new_zeros(t * k, h)  # slots of other GPUs stay zero
    router_weights = inputs.weights.flatten()

    def product(a, b, c, depth, width, gather):
        _grouped_gemm[(len(blocks) * triton.cdiv(width, block_n),)](
            a, b, c, inputs.slots, *columns, router_weights, len(blocks), width, depth, k,
            GATHER=gather, WEIGHTED=not gather, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            GROUP=group, num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def call() -> torch.Tensor:
        if blocks:
            product(inputs.hidden, weights.gate_up_transposed, gate_up, h, 2 * i, gather=True)
            count = t * k * i
            _silu_and_multiply[(triton.cdiv(count, 1024),)](gate_up, intermediate, i, count, BLOCK=1024)
            product(intermediate, weights.down_transposed, rows, i, h, gather=False)
        return rows.view(t, k, h).sum(1)

    return call


VARIANTS = {
    "paddle_moe": paddle_moe_layer,
    "triton": triton_layer,
    "grouped_mm": grouped_mm_pipeline,
    "cublas loop": cublas_loop,
}


# ---------------------------------------------------------------- measuring


def capture(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles, loads, and makes handles before the capture
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.call = call  # a graph does not keep the tensors that its kernels use
    return graph


_flush_buffer: list[torch.Tensor] = []


def flush() -> None:
    """Overwrites the L2 cache."""
    if not _flush_buffer:
        _flush_buffer.append(torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda"))
    _flush_buffer[0].fill_(1)


def time_graph(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds of one replay with cold caches."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class Limits:
    def __init__(self):
        a, b = (
            torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2)
        )
        product = torch.empty_like(a)
        source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        self._product = capture(lambda: torch.mm(a, b, out=product))
        self._copy = capture(lambda: target.copy_(source))

    def measure(self) -> tuple[float, float]:
        """(FLOP/s of a bf16 product, bytes/s of a copy, read and written)."""
        return 2 * PRODUCT_SIZE**3 / time_graph(self._product), 2 * COPY_BYTES / time_graph(self._copy)


def kernel_times(graph: torch.cuda.CUDAGraph, replays: int = 5) -> dict[str, float]:
    """Microseconds of each kernel in one replay with cold caches, by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(replays):
            flush()
            graph.replay()
        torch.cuda.synchronize()
    total: dict[str, float] = {}
    for event in profile.events():
        if "paddle_moe" in event.name:
            total[event.name] = total.get(event.name, 0.0) + event.device_time_total
    return {name: microseconds / replays for name, microseconds in total.items()}


def gpu_still_works() -> bool:
    """False after an illegal address, for example: all later calls of the process fail."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def run_case(case: Case, weights: Weights, names: list[str], rounds: int, limits: Limits) -> dict:
    inputs = Inputs(case, "cuda")
    expected = expected_rows(case, inputs, weights)
    graphs, errors, left_out = {}, {}, {}
    for name in names:
        try:
            call = VARIANTS[name](case, inputs, weights)
            result = call()[: len(expected)].float()
            errors[name] = ((result - expected).norm() / expected.norm().clamp(min=1e-30)).item()
            if errors[name] <= TOLERANCE:
                graphs[name] = capture(call)
            else:
                left_out[name] = f"wrong: relative error {errors[name]:.1e}"
        except Exception as error:  # what this PyTorch or card does not have must not end the others
            left_out[name] = f"{type(error).__name__}: {error}"[:300]
            if not gpu_still_works():
                raise
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    machine = []
    for _ in range(rounds):
        machine.append(limits.measure())
        for name, graph in graphs.items():
            samples[name].append(time_graph(graph))
    product, copy = (statistics.median(values) for values in zip(*machine))
    flops, weight_bytes = inputs.flops(case), inputs.weight_bytes(case)
    compute, memory = flops / product, weight_bytes / copy
    variants = {}
    for name, times in samples.items():
        seconds = statistics.median(times)
        variants[name] = {
            "microseconds": spread([1e6 * t for t in times]),
            "relative_error": errors[name],
            "share_of_limit": max(compute, memory) / seconds,
            "tflops": flops / seconds / 1e12,
            "weight_bandwidth_share": memory / seconds,
        }
        if "paddle_moe" in samples:
            ratios = [theirs / ours for theirs, ours in zip(times, samples["paddle_moe"])]
            variants[name]["times_paddle_moe"] = spread(ratios)
    result = {
        "shape": case.shape,
        "num_tokens": case.num_tokens,
        "rows": inputs.num_rows,
        "active_experts": inputs.active,
        "bound": "compute" if compute > memory else "bandwidth",
        "limits": {
            "product_tflops": spread([p / 1e12 for p, _ in machine]),
            "copy_terabytes_per_second": spread([c / 1e12 for _, c in machine]),
        },
        "variants": variants,
        "left_out": left_out,
    }
    if "paddle_moe" in graphs:
        result["kernels"] = kernels = kernel_times(graphs["paddle_moe"])
        gemm = sum(time for name, time in kernels.items() if "grouped_gemm" in name)
        combine = sum(time for name, time in kernels.items() if "combine" in name)
        moved = inputs.num_rows * case.hidden_size * 4 + case.num_tokens * case.hidden_size * 2
        result["grouped_gemm_tflops"] = flops / gemm / 1e6 if gemm else None
        result["combine_bandwidth_share"] = moved / (combine * 1e-6) / copy if combine else None
    return result


def print_case(result: dict) -> None:
    limits = {name: figures["median"] for name, figures in result["limits"].items()}
    print(
        f"\n{result['shape']} T={result['num_tokens']}: {result['rows']} rows, "
        f"{result['active_experts']} experts active, bound by {result['bound']}; limits "
        f"{limits['product_tflops']:.0f} TFLOP/s, {limits['copy_terabytes_per_second']:.2f} TB/s"
    )
    print(f"  {'variant':12}{'us':>10}{'spread':>20}{'TFLOP/s':>9}{'of limit':>10}{'x ours':>8}{'error':>9}")
    for name, figures in result["variants"].items():
        us = figures["microseconds"]
        ratio = f"{figures['times_paddle_moe']['median']:.2f}" if "times_paddle_moe" in figures else "-"
        print(
            f"  {name:12}{us['median']:10.1f}{us['min']:10.1f}-{us['max']:<9.1f}{figures['tflops']:9.1f}"
            f"{figures['share_of_limit']:10.0%}{ratio:>8}{figures['relative_error']:9.1e}"
        )
    for name, reason in result["left_out"].items():
        print(f"  {name}: {reason}")
    if result.get("grouped_gemm_tflops"):
        print(f"  grouped GEMMs alone: {result['grouped_gemm_tflops']:.0f} TFLOP/s", end="")
        share = result["combine_bandwidth_share"]
        print(f"; combine: {share:.0%} of the copy rate" if share else "", flush=True)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma-separated (default: %(default)s)")
    parser.add_argument(
        "--tokens", help=f"comma-separated (default: {','.join(map(str, TOKENS))}, after the headline cases)"
    )
    parser.add_argument("--variants", default=",".join(VARIANTS), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3600, help="start no new case after this time")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all figures")
    options = parser.parse_args(arguments)
    options.shapes, options.variants = options.shapes.split(","), options.variants.split(",")
    for name, chosen, known in (("shapes", options.shapes, SHAPES), ("variants", options.variants, VARIANTS)):
        if unknown := [entry for entry in chosen if entry not in known]:
            parser.error(f"--{name} must be from {', '.join(known)}, got {', '.join(unknown)}")
    try:
        tokens = [int(number) for number in options.tokens.split(",")] if options.tokens else TOKENS
    except ValueError:
        tokens = [0]
    if min(tokens) < 1 or options.rounds < 1:
        parser.error("--tokens must be positive numbers, comma-separated, and --rounds at least 1")
    first = () if options.tokens else HEADLINES
    # Every shape at one number of tokens before the next number: a run that is short of time has all shapes.
    every = [(shape, number) for number in tokens for shape in options.shapes]
    options.cases = list(dict.fromkeys([*(case for case in first if case[0] in options.shapes), *every]))
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if not torch.cuda.is_available():
        print("gpu_moe.py: no CUDA device that PyTorch can use", file=sys.stderr)
        return 2
    start = time.monotonic()
    torch.manual_seed(0)
    limits = Limits()
    report = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rounds": options.rounds}
    report |= {"triton": getattr(triton, "__version__", None), "cases": [], "not_reached": [], "wrong": []}
    with torch.no_grad():
        works = True
        for shape, num_tokens in options.cases:
            case = Case(shape, num_tokens)
            if not works or time.monotonic() - start > options.seconds:
                report["not_reached"].append(f"{shape} T={num_tokens}")
                continue
            try:
                result = run_case(case, Weights(case, "cuda"), options.variants, options.rounds, limits)
            except Exception as error:
                traceback.print_exc()
                report["wrong"].append(f"{shape} T={num_tokens}: {type(error).__name__}: {error}"[:300])
                works = gpu_still_works()
                continue
            report["cases"].append(result)
            if "paddle_moe" in result["left_out"]:
                report["wrong"].append(f"{shape} T={num_tokens}: {result['left_out']['paddle_moe']}")
            print_case(result)
            if options.out:
                options.out.write_text(json.dumps(report, indent=1) + "\n")
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    for case in report["not_reached"]:
        print(f"not reached{'' if works else ', the GPU failed'}: {case}")
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
