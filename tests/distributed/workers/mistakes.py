"""One rank of scripts/run_moe.py with mistakes to notice: mistakes.py MISTAKE[,MISTAKE...] [its options].

Runs it once without a mistake and once with each, and prints what it said.
"""

import runpy
import sys
from pathlib import Path

from meeting import meet_other_ranks

import paddle_moe
from paddle_moe import params
from paddle_moe.distributed import ParallelContext, init_distributed
from paddle_moe.logs import get_rank_logger

script = runpy.run_path(str(Path(__file__).parents[3] / "scripts" / "run_moe.py"))
mistakes = ["none", *sys.argv.pop(1).split(",")]
mistake = mistakes[0]
all_reduce = ParallelContext.all_reduce
mixture_of_experts = paddle_moe.mixture_of_experts
shard_experts = params.shard_experts
skipped = []


def all_reduce_wrongly(self, tensor, group, *arguments, **options):
    if group == "grid" or len(tensor.shape) != 2:  # not the output
        return all_reduce(self, tensor, group, *arguments, **options)
    if mistake == f"no {group} all-reduce":
        return tensor
    if mistake == "rank 3 skips one tp all-reduce" and (group, self.rank) == ("tp", 3) and not skipped:
        skipped.append(group)
        return tensor
    return all_reduce(self, tensor, "ep" if mistake == "ep and tp swapped" else group, *arguments, **options)


def compute_wrongly(*arguments, **options):
    if mistake == "experts_max too large":
        options["experts_max"] += 1
    if mistake == "experts shifted by one" and options["experts_min"] > 0:
        options["experts_min"] += 1
        options["experts_max"] += 1
    return mixture_of_experts(*arguments, **options)


def shard_wrongly(*arguments, **options):
    if mistake == "same columns twice":
        options["tp_rank"] = 0
    shard = shard_experts(*arguments, **options)
    if mistake == "last expert dropped" and options["ep_rank"] == 1:
        shard.gate_up_weights.pop()
        shard.down_weights.pop()
        shard.experts_max -= 1
    return shard


ParallelContext.all_reduce = all_reduce_wrongly
paddle_moe.mixture_of_experts = compute_wrongly
params.shard_experts = shard_wrongly

options = script["parse_arguments"]()
meet_other_ranks()
with init_distributed(options.ep, options.tp, timeout_seconds=options.timeout) as context:
    logger = get_rank_logger(context.ep_rank, context.tp_rank, log_dir=options.log_dir)
    context.log_failures_to(logger)
    for mistake in mistakes:
        try:
            passed = script["run"](options, context, logger)
            print(f"{mistake}: {'passed' if passed else 'mismatch'}", flush=True)
        except ValueError as error:
            print(f"{mistake}: {error}", flush=True)
