"""`python -m paddle_moe doctor`: checks an installation and says what to do about each failure.

Everything that loads compiled code or starts ranks runs in processes of its own with a time limit, so a
crash or a hang there becomes one line of the report.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paddle_moe.console import print_status

OLDEST_PYTHON = (3, 9)
TESTED_PADDLE = "3.3.1"
# As the table of features in the README says.
TRIED_PADDLE = {
    "3.0.0": "works in part: no calls without tokens, other gradients under auto_cast",
    "2.6.2": "works in part: no tensors without elements, other gradients under auto_cast, no saved programs",
}
PROBE_SECONDS = 120  # for one process, importing Paddle on a busy machine included
LAUNCH_SECONDS = 180

_PACKAGE = Path(__file__).resolve().parent
_REBUILD = (
    "in this clone run `python setup.py build_ext --inplace`, or leave it for where paddle_moe is installed"
    if (_PACKAGE.parent / "setup.py").exists()
    else "in a clone of paddle_moe run `pip install --no-build-isolation .` with Paddle installed"
)


@dataclass
class Check:
    """One line of the report. status: ok, info, warning or failure; advice: what to do, "" when nothing."""

    name: str
    status: str
    detail: str
    advice: str = ""


def main(as_json: bool = False) -> int:
    """Runs all checks and prints each as it finishes, or one JSON object. Returns 1 if any failed, else 0."""
    checks = []
    for check in _checks():
        checks.append(check)
        if not as_json:
            print_status(check.status, check.name, check.detail, check.advice)
    failures = sum(check.status == "failure" for check in checks)
    if as_json:
        print(json.dumps({"checks": [asdict(check) for check in checks], "failures": failures}, indent=2))
    else:
        print(f"{failures} failed" if failures else "Everything needed works.")
    return 1 if failures else 0


def _checks():
    yield _check_python()
    paddle, facts = _check_paddle()
    yield paddle
    operator = _check_operator(facts)
    yield operator
    core, core_facts = _check_core()
    yield core
    yield _check_isa(core_facts)
    yield _check_threads(core_facts)
    yield _check_huge_pages()
    yield _check_compiler(needed=operator.status == "failure")
    yield _check_cuda(facts)
    usable = operator.status == "ok"
    yield _check_groups("gloo groups", usable, gpus=0)
    yield _check_nccl(facts, usable)
    yield _check_model_libraries()
    yield _check_report_libraries()


# ---------------------------------------------------------------- Python, Paddle, the compiled modules


def _check_python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    detail = f"{version} at {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return Check("Python", "failure", detail, f"use Python {oldest} or newer")
    return Check("Python", "ok", detail)


def _check_paddle() -> tuple[Check, dict[str, Any] | None]:
    if importlib.util.find_spec("paddle") is None:
        advice = "pip install paddlepaddle, or the GPU build that paddlepaddle.org names for your CUDA"
        return Check("Paddle", "failure", "not installed", advice), None
    facts, error = _probe("probe_paddle")
    if facts is None:
        advice = "reinstall Paddle in this environment; `python -c 'import paddle'` shows the whole error"
        return Check("Paddle", "failure", f"cannot be imported: {error}", advice), None
    detail = f"{facts['version']} ({'CUDA ' + str(facts['cuda']) if facts['cuda'] else 'CPU'} build)"
    version = ".".join(re.findall(r"\d+", facts["version"])[:3])
    if version != TESTED_PADDLE:
        known = TRIED_PADDLE.get(version, "not tried")
        advice = f"{known}: paddle_moe is developed and tested with {TESTED_PADDLE}"
        return Check("Paddle", "warning", detail, advice), facts
    return Check("Paddle", "ok", detail), facts


def _check_operator(paddle_facts: dict[str, Any] | None) -> Check:
    name = "Operator in Paddle"
    files = _compiled("_ops")
    if not files:
        return Check(name, "failure", f"no compiled _ops module in {_PACKAGE}", _REBUILD)
    if paddle_facts is None:
        return Check(name, "failure", "not tried, because Paddle does not work", "repair Paddle first")
    return _judge_result(name, files[0], *_probe("probe_operator"))


def _check_core() -> tuple[Check, dict[str, Any] | None]:
    name = "Core without Paddle"
    files = _compiled("_core")
    if not files:
        return Check(name, "failure", f"no compiled _core module in {_PACKAGE}", _REBUILD), None
    facts, error = _probe("probe_core")
    return _judge_result(name, files[0], facts, error), facts


def _judge_result(name: str, file: Path, facts: dict[str, Any] | None, error: str) -> Check:
    if facts is None:
        if variable := re.search(r"PADDLE_MOE_\w+", error):
            advice = f"unset {variable[0]}, or set it to what this says"
        elif "SIGILL" in error:
            advice = "this processor lacks an instruction; set PADDLE_MOE_ISA=generic and report it"
        else:
            advice = _REBUILD
        return Check(name, "failure", f"{file.name}: {error}", advice)
    detail = f"{file.name}, error {facts['error']:.1e} against the float64 reference"
    if not facts["error"] < 1e-6:
        return Check(
            name, "failure", detail, "the result is wrong: rebuild from clean (rm -rf build), else report it"
        )
    return Check(name, "ok", detail)


def _check_isa(facts: dict[str, Any] | None) -> Check:
    if facts is None:
        return Check("Instruction set", "info", "unknown without the core")
    available = ", ".join(facts["available_isas"])
    forced = os.environ.get("PADDLE_MOE_ISA")
    detail = f"{facts['isa']} in use, available: {available}" + (
        ", forced by PADDLE_MOE_ISA" if forced else ""
    )
    if facts["isa"] != facts["available_isas"][0]:
        return Check("Instruction set", "warning", detail, "unset PADDLE_MOE_ISA to use the fastest")
    return Check("Instruction set", "ok", detail)


def _check_threads(facts: dict[str, Any] | None) -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if facts is None:
        return Check("Threads", "info", f"{cores} cores; threads unknown without the core")
    detail = f"{facts['num_threads']} for the kernels, {cores} cores for this process"
    if facts["num_threads"] > cores:
        return Check(
            "Threads", "warning", detail, f"more threads than cores are slow: PADDLE_MOE_NUM_THREADS={cores}"
        )
    if facts["num_threads"] == 1 < cores:
        return Check(
            "Threads", "warning", detail, "see PADDLE_MOE_NUM_THREADS, OMP_NUM_THREADS and PADDLE_LOCAL_SIZE"
        )
    return Check("Threads", "ok", detail)


def _check_huge_pages() -> Check:
    from paddle_moe.huge_pages import why_not

    try:
        reason = why_not()
    except ValueError as error:
        return Check("Huge pages", "failure", str(error), "unset it, or set it to one of these")
    if reason is None:
        return Check("Huge pages", "ok", "the memory of weights on the CPU is put into them")
    advice = "few tokens take longer; GLIBC_TUNABLES=glibc.malloc.hugetlb=1 may help, see docs/cpu_weights.md"
    return Check("Huge pages", "info", f"not used: {reason}", advice)


def _check_compiler(needed: bool) -> Check:
    command = os.environ.get("CXX", "").split() or [shutil.which("g++") or shutil.which("c++") or "g++"]
    problem, advice = "", ""
    try:
        version = _output([*command, "--version"]).splitlines()[0]
        program = "#include <thread>\nint main() { if constexpr (sizeof(void*) == 8) return 0; }\n"
        _output([*command, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"], program)
    except (OSError, IndexError, subprocess.SubprocessError) as error:
        version, problem = (
            " ".join(command),
            f"cannot compile C++17: {_last_line(getattr(error, 'stderr', '') or str(error))}",
        )
        advice = (
            "install g++ 9 or newer (Debian, Ubuntu: apt-get install g++), or name another compiler in CXX"
        )
    if not problem and not Path(sysconfig.get_path("include"), "Python.h").exists():
        problem, advice = (
            "Python.h is missing",
            "install Python's headers (Debian, Ubuntu: apt-get install python3-dev)",
        )
    if not problem:
        return Check("Compiler", "ok", version)
    if not needed:
        advice += "; only needed to build"
    return Check("Compiler", "failure" if needed else "warning", f"{version}: {problem}", advice)


# ---------------------------------------------------------------- CUDA


def _check_cuda(facts: dict[str, Any] | None) -> Check:
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        devices = [line.strip() for line in _output(query).splitlines() if line.strip()]
    except (OSError, subprocess.SubprocessError):
        devices = []
    with_kernels = any(b".nv_fatbin" in file.read_bytes() for file in _compiled("_ops"))
    built = f"operator built {'with' if with_kernels else 'without'} CUDA kernels"
    seen = f"{len(devices)} GPU ({devices[0]})" if devices else "no GPU that nvidia-smi can see"
    detail = f"{seen}, {built}"
    if facts is None or not (devices or facts["cuda"]):
        return Check("CUDA", "info", f"{detail}; everything runs on the CPU")
    if not facts["cuda"]:
        return Check(
            "CUDA",
            "warning",
            f"{detail}, CPU build of Paddle",
            "install a GPU build of Paddle to use the GPU",
        )
    if not facts["gpus"]:
        return Check(
            "CUDA", "warning", f"{detail}, Paddle sees no GPU", "check the driver and CUDA_VISIBLE_DEVICES"
        )
    if not with_kernels:
        return Check(
            "CUDA", "warning", detail, f"the operator runs on the CPU only; to change that {_REBUILD}"
        )
    return Check("CUDA", "ok", detail)


# ---------------------------------------------------------------- groups of processes


def _check_nccl(facts: dict[str, Any] | None, usable: bool) -> Check:
    gpus = facts["gpus"] if facts else 0
    if gpus < 2:
        return Check("NCCL groups", "info", f"not tried: needs two GPUs that Paddle can use, found {gpus}")
    return _check_groups("NCCL groups", usable, gpus=2)


def _check_groups(name: str, usable: bool, gpus: int) -> Check:
    """Starts two ranks with the launcher, EP 2 x TP 1; both add up what they hold over all their groups."""
    if not usable:
        return Check(name, "info", "not tried, because the operator does not work")
    with tempfile.TemporaryDirectory(prefix="paddle_moe_doctor_") as directory:
        script = Path(directory, "rank.py")
        script.write_text(_code("probe_groups"), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "paddle.distributed.launch",
            "--nproc_per_node",
            "2",
            "--log_dir",
            directory,
        ]
        started = time.monotonic()
        finished, output = _run([*command, str(script)], LAUNCH_SECONDS, _environment(gloo=not gpus))
        logs = "\n".join(
            path.read_text(errors="replace") for path in sorted(Path(directory).glob("workerlog.*"))
        )
    seconds = time.monotonic() - started
    if finished == 0 and logs.count("groups are right") == 2:
        return Check(name, "ok", f"two ranks, right sums over EP and TP in {seconds:.0f} s")
    reason = f"no end within {LAUNCH_SECONDS} s" if finished is None else f"launch ended with code {finished}"
    if gpus:
        advice = (
            "run again with NCCL_DEBUG=INFO; check that the GPUs can reach each other (nvidia-smi topo -m)"
        )
    elif os.environ.get("GLOO_SOCKET_IFNAME"):
        advice = "unset GLOO_SOCKET_IFNAME, or name an interface that `ip addr` shows with an address"
    else:
        advice = (
            "check that this host's own name resolves (getent hosts $(hostname)), or set GLOO_SOCKET_IFNAME"
        )
    return Check(name, "failure", f"{reason}: {_last_line(logs) or _last_line(output)}", advice)


# ---------------------------------------------------------------- other libraries


def _check_model_libraries() -> Check:
    found = []
    for distribution, module in (("paddlenlp", "paddlenlp"), ("paddleformers", "paddleformers")):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{distribution} not installed")
            continue
        code, output = _run([sys.executable, "-c", f"import {module}"], PROBE_SECONDS, _environment())
        found.append(
            f"{distribution} {version} "
            + ("imports" if code == 0 else f"does not import: {_last_line(output)}")
        )
    return Check("Model libraries", "info", "; ".join(found))


def _check_report_libraries() -> Check:
    missing = [module for module in ("matplotlib", "rich") if importlib.util.find_spec(module) is None]
    if missing:
        detail = f"{' and '.join(missing)} not installed"
        return Check("Pictures and tables", "warning", detail, f"pip install {' '.join(missing)}")
    return Check("Pictures and tables", "ok", "matplotlib and rich are installed")


# ---------------------------------------------------------------- what the child processes run


def probe_paddle() -> None:
    import paddle

    gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    cuda = paddle.version.cuda() if paddle.is_compiled_with_cuda() else None
    _answer({"version": paddle.__version__, "cuda": cuda, "gpus": gpus})


def probe_operator() -> None:
    import paddle

    import paddle_moe

    paddle.set_device("cpu")
    arrays, top_k, expected = _small_case()
    out = paddle_moe.fused_gate_moe(*map(paddle.to_tensor, arrays), top_k)
    _answer({"error": _relative_error(out.numpy(), expected)})


def probe_core() -> None:
    from paddle_moe import core

    arrays, top_k, expected = _small_case()
    error = _relative_error(core.fused_gate_moe(*arrays, top_k), expected)
    isas = core.available_isas()
    _answer(
        {
            "error": error,
            "isa": core.isa_name(),
            "available_isas": isas,
            "num_threads": core.get_num_threads(),
        }
    )


def probe_groups() -> None:
    import paddle

    from paddle_moe.distributed import init_distributed

    with init_distributed(ep_size=2, tp_size=1, timeout_seconds=LAUNCH_SECONDS / 3) as parallel:
        for group, expected in (("ep", 3.0), ("tp", parallel.rank + 1.0), ("grid", 3.0)):
            total = parallel.all_reduce(paddle.full([1], parallel.rank + 1.0, "float32"), group).item()
            if total != expected:
                raise RuntimeError(
                    f"the {group} group of rank {parallel.rank} gave {total}, expected {expected}"
                )
        parallel.barrier()
        print("groups are right", flush=True)


def _small_case() -> tuple[tuple[Any, ...], int, Any]:
    """(hidden_states, gate_weight, gate_up_weights, down_weights), top_k and the reference's output."""
    import numpy as np

    from paddle_moe import reference

    random = np.random.default_rng(0)
    shapes = ((13, 40), (40, 6), (6, 40, 2 * 24), (6, 24, 40))
    arrays = tuple((random.standard_normal(shape) / shape[-2] ** 0.5).astype("float32") for shape in shapes)
    return arrays, 2, reference.fused_gate_moe(*arrays, 2)


def _relative_error(actual: Any, expected: Any) -> float:
    import numpy as np

    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


_ANSWER = "paddle_moe answers: "


def _answer(facts: dict[str, Any]) -> None:
    print(_ANSWER + json.dumps(facts), flush=True)


# ---------------------------------------------------------------- running them


def _code(function: str) -> str:
    root = str(_PACKAGE.parent)
    return (
        f"import sys\nsys.path.insert(0, {root!r})\nfrom paddle_moe.doctor import {function}\n{function}()\n"
    )


def _probe(function: str) -> tuple[dict[str, Any] | None, str]:
    """(what the function answered, "") or (None, why it did not)."""
    code, output = _run([sys.executable, "-c", _code(function)], PROBE_SECONDS, _environment())
    if code is None:
        return None, f"no answer within {PROBE_SECONDS} s"
    if code < 0:
        return None, f"the process was ended by {signal.Signals(-code).name}"
    _, found, answer = output.rpartition(_ANSWER)  # other libraries print too
    if code or not found:
        return None, _last_line(output)
    return json.JSONDecoder().raw_decode(answer)[0], ""


def _run(command: list[str], seconds: float, environment: dict[str, str]) -> tuple[int | None, str]:
    """(exit code, stdout and stderr). After `seconds` the process is killed: the code is None."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return code, output.read().decode(errors="replace")


def _environment(gloo: bool = True) -> dict[str, str]:
    """Of this process, less what a launcher that started it has set for its own job."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PADDLE_") or k.startswith("PADDLE_MOE_")}
    if not kept.get("CUDA_VISIBLE_DEVICES"):
        kept.pop(
            "CUDA_VISIBLE_DEVICES", None
        )  # the launcher fails with an IndexError when it is set but empty
    return {**kept, "PADDLE_DISTRI_BACKEND": "gloo"} if gloo else kept


def _output(command: list[str], stdin: str = "") -> str:
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=PROBE_SECONDS, check=True
    )
    return done.stdout


def _compiled(module: str) -> list[Path]:
    return sorted(_PACKAGE.glob(f"{module}.*.so"))


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip(" -\t")]
    errors = [line for line in lines if re.match(r"\w*(Error|Exception)\b.*:|paddle_moe: ", line)]
    return (errors or lines or [""])[-1][:500]
