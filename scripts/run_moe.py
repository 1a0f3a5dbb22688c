"""Runs one mixture of experts over EP x TP ranks and compares every rank's output with the dense layer.

    PADDLE_DISTRI_BACKEND=gloo python -m paddle.distributed.launch --nproc_per_node 4 --log_dir log \\
        scripts/run_moe.py --ep 2 --tp 2 --dtype bfloat16

Every rank draws the same parameters from the seed, computes with its own experts and its own slice of the
intermediate dimension, and adds up the partial outputs with all-reduces. The result is held against the
reference in double precision on the same (rounded) inputs, against one process that has all experts, and,
bit for bit, against its repetitions and the other ranks. Rank 0 prints the summary; every rank exits with 1
if any rank has a mismatch.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time

import numpy as np
import paddle

import paddle_moe
from paddle_moe import reference
from paddle_moe.distributed import DEFAULT_TIMEOUT_SECONDS, ParallelContext, init_distributed
from paddle_moe.logs import DEFAULT_PREFIX, RankLogger, get_rank_logger
from paddle_moe.params import MoEParams, generate_moe_params_static

# Largest relative L2 error against the reference. In half precision each rank rounds its partial output.
TOLERANCE = {"float32": 1e-6, "bfloat16": 5e-3, "float16": 5e-3}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ep", type=int, default=1, help="expert parallel ranks (default %(default)s)")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel ranks (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="T (default %(default)s)")
    parser.add_argument("--hidden", type=int, default=256, help="H (default %(default)s)")
    parser.add_argument("--ffn", type=int, default=512, help="I of one expert (default %(default)s)")
    parser.add_argument("--experts", type=int, default=8, help="E over all ranks (default %(default)s)")
    parser.add_argument("--top-k", type=int, default=2, help="experts per token (default %(default)s)")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    parser.add_argument("--permuted", action="store_true", help="weights are stored as [2I, H] and [H, I]")
    parser.add_argument(
        "--separate", action="store_true", help="gate and up are two tensors instead of one [H, 2I]"
    )
    parser.add_argument("--activation", default="silu", help="see paddle_moe.mixture_of_experts")
    parser.add_argument(
        "--reduce", choices=["two", "one"], default="two", help="all-reduces: EP then TP, or the grid"
    )
    parser.add_argument("--fp32-reduce", action="store_true", help="add partial outputs in fp32, round once")
    parser.add_argument("--chunk-size", type=int, default=0, help="tokens per chunk, 0: chosen (default)")
    parser.add_argument(
        "--measurement-mode", action="store_true", help="also compare the largest intermediates"
    )
    parser.add_argument("--seed", type=int, default=2024, help="of parameters and tokens (default 2024)")
    parser.add_argument(
        "--repeat", type=int, default=3, help="runs, of which the fastest is shown (default 3)"
    )
    parser.add_argument(
        "--log-dir", default=None, help='directory of the rank logs; "launch": that of the launcher'
    )
    parser.add_argument(
        "--prefix", default=DEFAULT_PREFIX, help="of the rank log files (default %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=float, default=DEFAULT_TIMEOUT_SECONDS, help="seconds to wait for a rank"
    )
    arguments = parser.parse_args()
    for name in ("repeat", "hidden", "ffn", "experts", "top_k"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    if arguments.top_k > arguments.experts:
        parser.error(f"--top-k must be at most --experts = {arguments.experts}, got {arguments.top_k}")
    if arguments.tp > arguments.ffn:
        parser.error(f"--tp must be at most --ffn = {arguments.ffn}, got {arguments.tp}")
    return arguments


def compute_partial(arguments: argparse.Namespace, params: MoEParams) -> tuple[paddle.Tensor, paddle.Tensor]:
    """(partial output [T, H], amax [E_l]) of one rank."""
    if not params.down_weights:  # more EP ranks than experts
        return paddle.zeros_like(params.hidden_states), paddle.zeros([0])
    result = paddle_moe.mixture_of_experts(
        params.hidden_states,
        params.routing_table,
        params.router_weights,
        params.gate_up_weights,
        params.down_weights,
        permuted_weights=arguments.permuted,
        activation=arguments.activation,
        experts_min=params.experts_min,
        experts_max=params.experts_max,
        measurement_mode=arguments.measurement_mode,
        chunk_size=arguments.chunk_size,
    )
    return result if arguments.measurement_mode else (result, paddle.zeros([0]))


def all_reduce(
    arguments: argparse.Namespace, context: ParallelContext, partial: paddle.Tensor, amax: paddle.Tensor
) -> tuple[paddle.Tensor, paddle.Tensor]:
    total = partial.astype("float32") if arguments.fp32_reduce else partial
    if arguments.reduce == "two":
        context.all_reduce(total, "ep")
        context.all_reduce(total, "tp")
    else:
        context.all_reduce(total, "grid")
    return total.astype(partial.dtype), context.all_reduce(amax, "tp", "max")


def relative_l2(actual: paddle.Tensor, expected: np.ndarray) -> float:
    difference = np.linalg.norm(reference.to_float64(actual.numpy()) - expected)
    return float(difference / max(np.linalg.norm(expected), np.finfo(np.float64).tiny))


def find_mismatches(
    arguments: argparse.Namespace,
    dense: MoEParams,
    local: MoEParams,
    runs: list[tuple[paddle.Tensor, paddle.Tensor]],
) -> tuple[dict[str, float], list[str]]:
    """(errors by name, descriptions of those that are too large), of this rank."""
    expected, expected_amax = reference.mixture_of_experts(
        dense.hidden_states.numpy(),
        dense.routing_table.numpy(),
        dense.router_weights.numpy(),
        [weight.numpy() for weight in dense.gate_up_weights],
        [weight.numpy() for weight in dense.down_weights],
        permuted_weights=arguments.permuted,
        activation=arguments.activation,
        measurement_mode=True,
    )
    output, amax = runs[0]
    single, _ = compute_partial(arguments, dense)
    errors = {
        "dense": relative_l2(output, expected),
        "single": relative_l2(output, reference.to_float64(single.numpy())),
    }
    if arguments.measurement_mode:
        own_experts = slice(local.experts_min, local.experts_max + 1)
        errors["amax"] = relative_l2(amax, expected_amax[own_experts])
    limits = {"dense": TOLERANCE[arguments.dtype], "single": TOLERANCE[arguments.dtype], "amax": 1e-5}
    mismatches = [
        f"relative L2 error {error:.2e} against {name} is above {limits[name]:.0e}"
        for name, error in errors.items()
        if not error <= limits[name]
    ]
    bits = [result.numpy().tobytes() for result, _ in runs]
    mismatches += [
        f"run {run} differs in its bits from run 0" for run, other in enumerate(bits) if other != bits[0]
    ]
    return errors, mismatches


def digest(output: paddle.Tensor) -> int:
    """A hash of the bits that a float64 holds exactly."""
    return int.from_bytes(hashlib.sha256(output.numpy().tobytes()).digest()[:6], "little")


def gather(context: ParallelContext, values: list[float]) -> np.ndarray:
    """The values of all ranks, [world_size, len(values)]; every rank adds its own row to zeros."""
    rows = np.zeros([context.world_size, len(values)], np.float64)
    rows[context.rank] = values
    return context.all_reduce(paddle.to_tensor(rows), "grid").numpy()


def print_summary(
    arguments: argparse.Namespace,
    table: np.ndarray,
    error_names: list[str],
    mismatches: list[str],
    passed: bool,
) -> None:
    sizes = {"T": arguments.tokens, "H": arguments.hidden, "I": arguments.ffn, "E": arguments.experts}
    sizes_text = " ".join(f"{name}={size}" for name, size in {**sizes, "K": arguments.top_k}.items())
    print(f"mixture of experts, EP {arguments.ep} x TP {arguments.tp}, {sizes_text}, {arguments.dtype}")
    head = f"{'rank':>5}{'ep':>4}{'tp':>4}{'experts':>11}{'rows':>8}{'kernel ms':>11}{'reduce ms':>11}"
    print(head + "".join(f"{'error vs ' + name:>17}" for name in error_names))
    for rank, (first, last, rows, kernel_ms, reduce_ms, num_mismatches, *errors) in enumerate(table):
        ep_rank, tp_rank = divmod(rank, arguments.tp)
        experts = f"{first:.0f}..{last:.0f}" if last >= first else "none"
        cells = (
            f"{rank:>5}{ep_rank:>4}{tp_rank:>4}{experts:>11}{rows:>8.0f}{kernel_ms:>11.3f}{reduce_ms:>11.3f}"
        )
        cells += "".join(f"{error:>17.2e}" for error in errors)
        print(cells + ("  MISMATCH" if num_mismatches else "  ok"))
    for mismatch in mismatches:
        print(f"rank 0: {mismatch}")
    print(
        "PASSED: every rank has the output of the dense layer" if passed else "FAILED: see the rank logs",
        flush=True,
    )


def run(arguments: argparse.Namespace, context: ParallelContext, logger: RankLogger) -> bool:
    dense, local = generate_moe_params_static(
        arguments.tokens,
        arguments.hidden,
        arguments.ffn,
        arguments.top_k,
        arguments.experts,
        permuted_weights=arguments.permuted,
        dtype=arguments.dtype,
        tp_rank=context.tp_rank,
        tp_size=context.tp_size,
        ep_rank=context.ep_rank,
        ep_size=context.ep_size,
        fused_weights=not arguments.separate,
        seed=arguments.seed,
    )
    logger.info("holds experts %d..%d of %d", local.experts_min, local.experts_max, arguments.experts)
    context.check_same_routing(local.routing_table, local.router_weights)
    ids = local.routing_table.numpy().ravel() - local.experts_min
    num_local = local.experts_max - local.experts_min + 1
    rows_of = np.bincount(ids[(ids >= 0) & (ids < num_local)], minlength=num_local)

    runs, times = [], []
    for _ in range(arguments.repeat):
        started = time.perf_counter()
        partial, amax = compute_partial(arguments, local)
        computed = time.perf_counter()
        runs.append(all_reduce(arguments, context, partial, amax))
        times.append((1e3 * (computed - started), 1e3 * (time.perf_counter() - computed)))
        logger.event(
            "moe_call",
            layer="run_moe",
            num_tokens=arguments.tokens,
            tokens_per_expert=rows_of.tolist(),
            experts_min=local.experts_min,
            kernel_ms=times[-1][0],
            collective_ms=times[-1][1],
        )

    errors, mismatches = find_mismatches(arguments, dense, local, runs)
    kernel_ms, reduce_ms = np.min(times, axis=0)
    row = [local.experts_min, local.experts_max, rows_of.sum(), kernel_ms, reduce_ms, len(mismatches)]
    table = gather(context, [digest(runs[0][0]), *row, *errors.values()])
    digests, table = table[:, 0], table[:, 1:]
    if (digests != digests[0]).any():
        mismatches.append(
            f"ranks {np.flatnonzero(digests != digests[0]).tolist()} have other bits than rank 0"
        )
    for mismatch in mismatches:
        logger.error(mismatch)
    passed = not table[:, 5].any() and (digests == digests[0]).all()
    logger.event("result", passed=bool(passed), mismatches=mismatches, errors=errors)
    logger.info("passed" if passed else "failed")
    if context.rank == 0:
        print_summary(arguments, table, list(errors), mismatches, passed)
    return passed


def main() -> None:
    arguments = parse_arguments()
    try:
        context = init_distributed(arguments.ep, arguments.tp, timeout_seconds=arguments.timeout)
    except ValueError as error:
        sys.exit(f"run_moe.py: {error}")
    with context:
        logger = get_rank_logger(
            context.ep_rank, context.tp_rank, log_dir=arguments.log_dir, prefix=arguments.prefix
        )
        context.log_failures_to(logger)
        passed = run(arguments, context, logger)
        context.barrier()  # a rank that leaves with 1 has the launcher end the others
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
