"""One rank of a job in which something goes wrong: failures.py WHAT. Prints "finished" unless it is ended."""

import ctypes
import os
import signal
import sys
import time

what = sys.argv[1]
launched_rank = int(os.environ["PADDLE_TRAINER_ID"])
if what == "world" and launched_rank == 2:
    os.environ["PADDLE_TRAINERS_NUM"] = "8"

import paddle

from paddle_moe.distributed import init_distributed

sizes = (4, 1) if what == "sizes" and launched_rank == 2 else (3, 2) if what == "product" else (2, 2)
if what == "absent" and launched_rank == 1:
    time.sleep(1000)

context = init_distributed(*sizes, timeout_seconds=8)
rank = context.rank
tensor = paddle.ones([4])
context.all_reduce(tensor, "grid")
print("ready", flush=True)

if what == "killed" and rank == 2:
    os.kill(os.getpid(), signal.SIGKILL)
if what == "raises" and rank == 1:
    raise ValueError("no such expert")
if what == "hangs" and rank == 3:
    time.sleep(1000)
if what == "hangs_in_c" and rank == 3:
    ctypes.PyDLL(None).sleep(1000)  # holds Python's global lock
if what == "exits" and rank == 1:
    sys.exit(0)
if what == "finishes_early":
    # Rank 0 is done; the others go on with a group that it is not in.
    if rank == 0:
        print("finished", flush=True)
        with context:
            sys.exit(0)
    else:
        time.sleep(2)
        if context.tp_rank == 1:
            context.all_reduce(tensor, "ep")
            assert tensor.numpy()[0] == 8, tensor
elif what == "killed_outside_collectives":
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1000)
elif what == "other_order":
    for group in ("ep", "tp") if rank in (0, 3) else ("tp", "ep"):  # 0 waits for 2, 2 for 3, 3 for 1, 1 for 0
        context.all_reduce(tensor, group)
elif what == "misses_barrier":
    if rank == 2:
        time.sleep(1000)
    context.barrier()
else:
    context.all_reduce(tensor, "ep")
    context.all_reduce(tensor, "tp")
print("finished", flush=True)
