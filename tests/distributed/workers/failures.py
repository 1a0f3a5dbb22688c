"""One rank of a job in which something goes wrong: failures.py WHAT. Prints "finished" unless it is ended.

failures.py WHAT WHAT ... is up to five jobs at the same time, over forks of these processes, so that Paddle
is imported once. Each has its logs in a directory of its name; printed here is how its fork ended, and when.
"""

import ctypes
import os
import signal
import sys
import time

import paddle
from meeting import meet_other_ranks

from paddle_moe.distributed import init_distributed

what = sys.argv[1]
launched_rank = int(os.environ["PADDLE_TRAINER_ID"])
if len(sys.argv) > 2:
    meet_other_ranks()
    children = {}
    # On gloo nobody listens where the endpoints are.
    masters = [os.environ["PADDLE_MASTER"], *os.environ["PADDLE_TRAINER_ENDPOINTS"].split(",")]
    for what, master in zip(sys.argv[1:], masters):
        child = os.fork()
        if child == 0:
            os.environ["PADDLE_MASTER"] = master
            log = os.path.join(os.environ["PADDLE_LOG_DIR"], what, f"workerlog.{launched_rank}")
            os.makedirs(os.path.dirname(log), exist_ok=True)
            with open(log, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            break
        children[child] = what
    else:
        while children:
            child, status = os.wait()
            code = os.waitstatus_to_exitcode(status)
            print(children.pop(child), "ended with", code, "at", time.time(), flush=True)
        sys.exit(0)

if what == "world" and launched_rank == 2:
    os.environ["PADDLE_TRAINERS_NUM"] = "8"
sizes = (4, 1) if what == "sizes" and launched_rank == 2 else (3, 2) if what == "product" else (2, 2)
if what == "absent" and launched_rank == 1:
    sys.exit(0)

# Ranks of the other jobs must not come to the end of their limit, however slow the machine is.
waits = what in ("hangs", "hangs_in_c", "misses_barrier", "other_order", "absent")
context = init_distributed(*sizes, timeout_seconds=8 if waits else 60)
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
