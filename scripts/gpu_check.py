"""Builds the core without Paddle, tests it on the GPU of this machine, and times it beside its peers.

Everything that was found out goes into one JSON file: the card, the driver, the commit, and per part its
outcome; the logs of all parts into an archive beside it. Exit status 1 if any part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import traceback
import xml.etree.ElementTree
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# Seconds that each part may take; together with the start of Python they fit into eight minutes.
LIMITS = {"build": 110, "test": 110, "bench": 180, "sanitize": 70}
# Each in a process of its own: after an illegal address all that follows in a process fails too.
TESTS = {
    "route": ["test_route.py", "test_fused_gate_moe.py"],
    "operators": ["test_mixture_of_experts.py", "test_guarantees.py"],
    "cuda": ["cuda"],
}


class Failed(Exception):
    """A part that went wrong, with what it has found out by then."""

    def __init__(self, reason: str, **found: object):
        super().__init__(reason)
        self.found = found


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

    def run(self, command: list[str], deadline: float, log: str, **environment: str) -> int:
        """Runs a command, its output shown and in a file of the build directory; the exit status.

        At the deadline it and all that it started are killed: a test that hangs would keep the GPU busy.
        Raises Failed then.
        """
        print("+", " ".join(map(str, command)), flush=True)
        seconds = max(deadline - time.monotonic(), 1)
        python_path = os.pathsep.join(filter(None, [str(self.package), os.environ.get("PYTHONPATH")]))
        self.build_directory.mkdir(parents=True, exist_ok=True)
        (self.build_directory / log).write_text("")
        try:
            process = subprocess.Popen(
                command,
                cwd=REPOSITORY / "tests",  # Python would find the clone's own package in the clone
                env={**os.environ, "PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1", **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise Failed(f"{command[0]} cannot be started: {error}") from None
        late = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
        late.start()
        try:
            with open(self.build_directory / log, "wb") as file:
                for line in process.stdout:  # ends when the last of the group has closed it
                    file.write(line)
                    sys.stdout.buffer.write(line)
                    sys.stdout.buffer.flush()
            status = process.wait()
        finally:
            late.cancel()
        if status == -signal.SIGKILL and time.monotonic() > deadline:
            raise Failed(f"killed after {seconds:.0f} s")
        return status

    # ------------------------------------------------------------ the parts

    def build(self, deadline: float) -> dict:
        architectures = self.options.archs or own_architecture()
        configure = ["cmake", "-S", str(REPOSITORY), "-B", str(self.build_directory)]
        configure += ["-DPADDLE_MOE_CUDA=ON", f"-DPADDLE_MOE_CUDA_ARCHS={architectures}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}"]
        if shutil.which("ninja") and not (self.build_directory / "CMakeCache.txt").exists():
            configure += ["-G", "Ninja"]  # a directory keeps the generator of its first run
        if nvcc := find_tool("nvcc"):
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        shutil.rmtree(self.package, ignore_errors=True)
        jobs = str(len(os.sched_getaffinity(0)))
        for name, command in {
            "configure": configure,
            "build": ["cmake", "--build", str(self.build_directory), "--target", "_core", "--parallel", jobs],
            "install": ["cmake", "--install", str(self.build_directory), "--prefix", str(self.package)],
        }.items():
            # The ptxas of this machine may spill where that of the tests does not: this is to be known, but
            # what is compiled can be run.
            if self.run(command, deadline, f"{name}.log", PADDLE_MOE_STRICT_NVCC="0") != 0:
                raise Failed(f"{name} failed; its output is above")
        warnings = re.findall(
            r"^warning: (.*)", (self.build_directory / "build.log").read_text(), re.MULTILINE
        )
        version = output_of(nvcc or "nvcc", "--version")[-60:]
        return {"architectures": architectures, "nvcc": version, "warnings": warnings}

    def pytest(self, name: str, deadline: float, paths: list[str], prefix=(), **environment: str) -> dict:
        needs_gpu()
        report, log = (self.build_directory / f"{name}.{ending}" for ending in ("xml", "log"))
        report.unlink(missing_ok=True)
        command = [*prefix, sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", "cuda"]
        command += [f"--junitxml={report}", "--maxfail=20", *paths]
        # A test that waits for a GPU that hangs can only be ended with its process; the last line of the log
        # names it then. A run that is merely long stops between two tests, and reports.
        seconds = int(deadline - time.monotonic())
        command += ["--timeout=20", "--timeout-method=thread", f"--session-timeout={max(seconds - 5, 1)}"]
        found: dict = {}
        try:
            status: int | str = self.run(command, deadline, log.name, **environment)
            found = read_report(report) if report.exists() else {}
        except Failed as error:
            status = str(error)
        if status != 0 or not found["passed"]:
            last_lines = log.read_text(errors="replace").splitlines()[-40:]
            raise Failed(f"pytest ended with {status}", **found, last_lines=last_lines)
        return found

    def test(self, deadline: float) -> dict:
        found, wrong = {}, []
        for i, (name, paths) in enumerate(TESTS.items()):
            end = time.monotonic() + (deadline - time.monotonic()) / (len(TESTS) - i)
            try:
                found[name] = self.pytest(name, end, paths)
            except Failed as error:
                wrong.append(f"{name}: {error}")
                found[name] = error.found
        if wrong:
            raise Failed("; ".join(wrong), **found)
        return found

    def sanitize(self, deadline: float) -> dict:
        tool = find_tool("compute-sanitizer")
        if tool is None:
            return {"skipped": "compute-sanitizer was not found"}
        results: dict[str, dict] = {}
        # racecheck may take what mbarriers and tensor copies order for a hazard: its outcome is kept, and is
        # for a person to read.
        for share, name in ((0.7, "memcheck"), (1.0, "racecheck")):
            prefix = (tool, "--tool", name, "--error-exitcode", "9", "--launch-timeout", "120")
            prefix += ("--kernel-regex", "kns=paddle_moe")
            end = time.monotonic() + share * (deadline - time.monotonic())
            try:
                # Without PyTorch's cache every array is an allocation of its own, whose ends are seen.
                results[name] = self.pytest(
                    name, end, ["cuda/test_sanitized.py"], prefix, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
                )
            except Failed as error:
                results[name] = {"reason": str(error), **error.found}
        if "reason" in results["memcheck"]:
            raise Failed(f"memcheck: {results['memcheck']['reason']}", **results)
        return results

    def bench(self, deadline: float) -> dict:
        needs_gpu()
        report = self.build_directory / "bench.json"
        report.unlink(missing_ok=True)
        command = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu_moe.py"), "--out", str(report)]
        # The benchmark stops in time by itself, so that what it has measured by then is not lost.
        command += ["--seconds", str(max(int(deadline - time.monotonic()) - 10, 10))]
        try:
            status: int | str = self.run(command, deadline, "bench.log")
        except Failed as error:
            status = str(error)
        try:
            found = json.loads(report.read_text())
        except (OSError, ValueError):  # killed before it wrote, or while it did
            found = {}
        if status != 0:
            raise Failed(f"the benchmark ended with {status}", **found)
        return found


def archive_logs(build_directory: Path, archive: Path) -> None:
    """What the parts printed and reported, for a machine that is gone afterwards."""
    with tarfile.open(archive, "w:gz") as file:
        for path in _reports(build_directory):
            file.add(path, path.name)


def _reports(build_directory: Path) -> list[Path]:
    return [path for path in sorted(build_directory.glob("*")) if path.suffix in (".log", ".xml", ".json")]


def compute_capability() -> str:
    return output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").partition("\n")[0]


def needs_gpu() -> None:
    if not compute_capability():
        raise Failed("nvidia-smi shows no GPU, without which only --only build --archs 90a works")


def own_architecture() -> str:
    """The architecture of the first GPU: the build for one takes half the time of the default's two."""
    needs_gpu()
    number = compute_capability().strip().replace(".", "")
    return "90a" if number == "90" else number


def read_report(report: Path) -> dict:
    found: dict = {"passed": 0, "failed": 0, "skipped": 0, "failures": [], "recorded": {}}
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        found[outcome] += 1
        if outcome == "failed":
            found["failures"].append(f"{case.get('classname')}::{case.get('name')}")
        found["recorded"] |= {entry.get("name"): entry.get("value") for entry in case.iter("property")}
    return found


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

    clone = ("git", "-C", str(REPOSITORY))
    commit = options.commit or output_of(*clone, "rev-parse", "HEAD")
    if not commit:
        parser.error(f"{REPOSITORY} is no git clone, so --commit has to say what is measured")
    gpu = output_of("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    result = {
        "gpu": gpu.splitlines(),
        "commit": commit,
        "changed_files": output_of(*clone, "status", "--porcelain", "--untracked-files=no").splitlines(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        **versions(),
        "parts": {},
    }
    options.out = options.out.resolve()
    check = Check(options)
    for path in _reports(check.build_directory):  # of an earlier run
        path.unlink()
    for part in parts:
        print(f"== {part}", flush=True)
        start = time.monotonic()
        try:
            outcome = {"ok": True, **getattr(check, part)(start + LIMITS[part])}
        except Failed as error:
            outcome = {"ok": False, "reason": str(error), **error.found}
            print(f"error: {part}: {error}", file=sys.stderr)
        except Exception as error:  # a fault of this script must not lose what the other parts find
            outcome = {"ok": False, "reason": f"gpu_check.py: {error!r}"}
            traceback.print_exc()
        result["parts"][part] = {**outcome, "seconds": round(time.monotonic() - start, 1)}
        options.out.write_text(json.dumps(result, indent=1) + "\n")  # kept if a later part hangs
        archive_logs(check.build_directory, options.out.with_suffix(".logs.tar.gz"))
        if part == "build" and not outcome["ok"]:
            break  # the others would test an older one
    for part, outcome in result["parts"].items():
        print(f"{part:9}{'ok' if outcome['ok'] else 'FAILED':7}{outcome['seconds']:7.1f} s")
    print(f"all figures: {options.out}; all output: {options.out.with_suffix('.logs.tar.gz')}")
    return 0 if all(outcome["ok"] for outcome in result["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
