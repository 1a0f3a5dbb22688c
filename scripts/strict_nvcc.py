#!/usr/bin/env python3
"""Runs nvcc, and fails where ptxas says that a kernel did not become what was written.

    strict_nvcc.py NVCC ARGUMENT...

setup.py and CMake compile with it. It fails on registers that spill to memory (but for MAY_SPILL), on what
ptxas calls a potential performance loss (wgmma instructions that wait for each other, an ignored setmaxnreg),
and when nvcc itself fails. Then it leaves no output file behind, so that no later step can take an old one
for the new one.

PADDLE_MOE_STRICT_NVCC=0 in the environment makes warnings of what is not an error of nvcc: another ptxas
than that of CUDA 13.0 may spill where that does not.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

# Kernels, by a part of their name, that are not worth the registers they would need.
MAY_SPILL: tuple[str, ...] = ()

PERFORMANCE_LOSS = re.compile(r"\(C\d+\) Potential Performance Loss|wgmma.*serialized", re.IGNORECASE)


def complaints(log: str) -> list[str]:
    """What is wrong according to the output of ptxas -v."""
    found = [line.strip() for line in log.splitlines() if PERFORMANCE_LOSS.search(line)]
    kernel = architecture = "?"
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            kernel, architecture = entry.groups()
        spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if spill and spill.groups() != ("0", "0") and not any(name in kernel for name in MAY_SPILL):
            found.append(f"registers were spilled by {kernel} for {architecture}: {line.strip()}")
    return found


def worth_reading(line: str) -> bool:
    """Whether a line of nvcc's output is more than the report of ptxas -v."""
    return bool(line.strip()) and not re.match(r"ptxas info\s*:|\s+\d+ bytes stack frame", line)


def main(command: list[str]) -> int:
    done = subprocess.run(
        [*command, "-Xptxas", "-v"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wrong = complaints(done.stdout)
    for line in done.stdout.splitlines():
        if worth_reading(line):
            print(line, file=sys.stderr)
    lenient = os.environ.get("PADDLE_MOE_STRICT_NVCC") == "0"
    for text in wrong:
        print(f"{'warning' if lenient else 'error'}: {text}", file=sys.stderr)
    if done.returncode == 0 and (lenient or not wrong):
        return 0
    if "-o" in command:
        Path(command[command.index("-o") + 1]).unlink(missing_ok=True)
    return done.returncode or 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
