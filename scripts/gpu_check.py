"""Builds the core without Paddle, tests it on the GPU of this machine, and times it beside its peers.

Everything that was found out goes into one JSON file: the card, the driver, the commit, and per part its
outcome. Exit status 1 if any part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# Seconds that each part may take; together with the start of Python they fit into eight minutes.
LIMITS = {"build": 170, "test": 100, "sanitize": 70, "bench": 130}
OPERATOR_TESTS = ["cuda", "test_mixture_of_experts.py", "test_guarantees.py"]
OPERATOR_TESTS += ["test_route.py", "test_fused_gate_moe.py"]


class Failed(Exception):
    pass


def output_of(*command: str) -> str:
    """What a command prints, or "" where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def find_tool(name: str) -> str | None:
    toolkit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which(name) or shutil.which(name, path=f"{toolkit}/bin")


class Check:
    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.build_directory = options.build_dir.resolve()
        self.package = self.build_directory / "package"

    def run(self, part: str, command: list[str], deadline: float, **environment: str) -> int:
        """Runs a command with its output shown; the exit status. Raises Failed at the deadline."""
        print("+", " ".join(map(str, command)), flush=True)
        try:
            return subprocess.run(
                command,
                cwd=REPOSITORY / "tests",  # Python would find the clone's own package in the clone
                env={**os.environ, "PYTHONPATH": str(self.package), "PYTHONUNBUFFERED": "1", **environment},
                stdin=subprocess.DEVNULL,
                timeout=max(deadline - time.monotonic(), 1),
            ).returncode
        except subprocess.TimeoutExpired:
            raise Failed(f"took longer than the {LIMITS[part]} s that it has") from None
        except OSError as error:
            raise Failed(f"{command[0]} cannot be started: {error}") from None

    # ------------------------------------------------------------ the parts

    def build(self, deadline: float) -> dict:
        architectures = self.options.archs or own_architecture()
        configure = ["cmake", "-S", str(REPOSITORY), "-B", str(self.build_directory)]
        configure += ["-DPADDLE_MOE_CUDA=ON", f"-DPADDLE_MOE_CUDA_ARCHS={architectures}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}"]
        if nvcc := find_tool("nvcc"):
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        shutil.rmtree(self.package, ignore_errors=True)
        jobs = str(len(os.sched_getaffinity(0)))
        for command in (
            configure,
            ["cmake", "--build", str(self.build_directory), "--target", "_core", "--parallel", jobs],
            ["cmake", "--install", str(self.build_directory), "--prefix", str(self.package)],
        ):
            if self.run("build", command, deadline) != 0:
                raise Failed("the build failed; its output is above")
        return {"architectures": architectures, "nvcc": output_of(nvcc or "nvcc", "--version")[-60:]}

    def pytest(self, part: str, deadline: float, paths: list[str], prefix=(), **environment: str) -> dict:
        report = self.build_directory / f"{part}.xml"
        report.unlink(missing_ok=True)
        command = [*prefix, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cuda"]
        command += [f"--junitxml={report}", "--maxfail=20", *paths]
        status = self.run(part, command, deadline, **environment)
        if not report.exists():
            raise Failed(f"pytest ended with {status} and wrote no report")
        counts, failures = read_report(report)
        result = {**counts, "failures": failures, "exit_status": status}
        if status != 0 or not counts["passed"]:
            raise Failed(f"pytest ended with {status}: {counts}; failed: {failures}")
        return result

    def test(self, deadline: float) -> dict:
        return self.pytest("test", deadline, OPERATOR_TESTS)

    def sanitize(self, deadline: float) -> dict:
        tool = find_tool("compute-sanitizer")
        if tool is None:
            return {"skipped": "compute-sanitizer was not found"}
        results = {}
        for name in ("memcheck", "racecheck"):
            prefix = (tool, "--tool", name, "--error-exitcode", "9", "--launch-timeout", "120")
            # Without PyTorch's cache every array is an allocation of its own, whose ends are seen.
            results[name] = self.pytest(
                "sanitize", deadline, ["cuda/test_sanitized.py"], prefix, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
            )
        return results

    def bench(self, deadline: float) -> dict:
        report = self.build_directory / "bench.json"
        report.unlink(missing_ok=True)
        command = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu_moe.py"), "--out", str(report)]
        # The benchmark stops in time by itself, so that what it has measured by then is not lost.
        command += ["--seconds", str(max(int(deadline - time.monotonic()) - 10, 10))]
        status = self.run("bench", command, deadline)
        if not report.exists():
            raise Failed(f"the benchmark ended with {status} and wrote nothing")
        result = json.loads(report.read_text())
        if status != 0:
            raise Failed(f"the benchmark ended with {status}: {result.get('wrong')}")
        return result


def own_architecture() -> str:
    """The architecture of the first GPU: the build for one takes half the time of the default's two."""
    capability = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").splitlines()
    if not capability:
        raise Failed("nvidia-smi shows no GPU")
    number = capability[0].strip().replace(".", "")
    return "90a" if number == "90" else number


def read_report(report: Path) -> tuple[dict[str, int], list[str]]:
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = []
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        counts[outcome] += 1
        if outcome == "failed":
            failures.append(f"{case.get('classname')}::{case.get('name')}")
    return counts, failures


def versions() -> dict[str, str]:
    code = "import torch, triton; print(torch.__version__, triton.__version__)"
    torch, _, triton = output_of(sys.executable, "-c", code).partition(" ")
    return {"python": sys.version.split()[0], "torch": torch, "triton": triton}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default=",".join(LIMITS), help="parts, comma-separated (default: %(default)s)"
    )
    parser.add_argument(
        "--archs", help='as PADDLE_MOE_CUDA_ARCHS, such as "80;90a" (default: that of the GPU)'
    )
    parser.add_argument(
        "--build-dir", type=Path, default=REPOSITORY / "build-gpu", help="default: %(default)s"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="default: %(default)s")
    parser.add_argument("--commit", help="of the sources, where they are no git clone")
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := set(parts) - set(LIMITS):
        parser.error(f"--only must name parts from {', '.join(LIMITS)}, got {', '.join(sorted(unknown))}")

    gpu = output_of("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    clone = ("git", "-C", str(REPOSITORY))
    result = {
        "gpu": gpu.splitlines(),
        "commit": options.commit or output_of(*clone, "rev-parse", "HEAD") or "unknown",
        "changed_files": output_of(*clone, "status", "--porcelain", "--untracked-files=no").splitlines(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        **versions(),
        "parts": {},
    }
    options.out = options.out.resolve()
    check = Check(options)
    for part in parts:
        print(f"== {part}", flush=True)
        start = time.monotonic()
        try:
            outcome = {"ok": True, **getattr(check, part)(start + LIMITS[part])}
        except Failed as error:
            outcome = {"ok": False, "reason": str(error)}
            print(f"error: {part}: {error}", file=sys.stderr)
        result["parts"][part] = {**outcome, "seconds": round(time.monotonic() - start, 1)}
        options.out.write_text(json.dumps(result, indent=1) + "\n")  # kept if a later part hangs
        if part == "build" and not outcome["ok"]:
            break  # the others would test an older one
    for part, outcome in result["parts"].items():
        print(f"{part:9}{'ok' if outcome['ok'] else 'FAILED':7}{outcome['seconds']:7.1f} s")
    print(f"all figures: {options.out}")
    return 0 if all(outcome["ok"] for outcome in result["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
