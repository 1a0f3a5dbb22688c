"""killed_at.py STEP SCRIPT ...: runs a script whose rank that logs step STEP gets SIGKILL right then."""

import os
import runpy
import signal
import sys

from paddle_moe.logs import RankLogger

last_step, sys.argv = int(sys.argv[1]), sys.argv[2:]
log_event = RankLogger.event


def log_and_die(self, name, /, **fields):
    log_event(self, name, **fields)
    if name == "step" and fields["step"] == last_step:
        os.kill(os.getpid(), signal.SIGKILL)


RankLogger.event = log_and_die
runpy.run_path(sys.argv[0], run_name="__main__")
