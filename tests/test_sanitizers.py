"""The C++ checks in tests/cpp under the sanitizers: a compiler and CMake, no Paddle.

test_cuda_emulated.py runs them as they are.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from paddle_moe import core

ROOT = Path(__file__).parent.parent
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1:strict_init_order=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}


def cmake_tool(name: str) -> list[str]:
    """The command for "cmake" or "ctest": the system's, or the one in PyPI's package cmake."""
    if shutil.which(name):
        return [name]
    if importlib.util.find_spec("cmake") is None:
        pytest.fail(f"{name} is neither on PATH nor in PyPI's package cmake; `pip install cmake` provides it")
    return [sys.executable, "-c", f"import sys, cmake; sys.exit(cmake.{name}())"]


def unused_isas() -> str:
    """The option of CMake that compiles quickly what this processor cannot run."""
    every = {path.stem.partition("_")[2] for path in ROOT.glob("csrc/cpu/kernels_*.cc")}
    return f"-DPADDLE_MOE_UNUSED_ISAS={';'.join(sorted(every - {*core.available_isas()}))}"


def run(command: list[str], timeout: int) -> str:
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **OPTIONS}, timeout=timeout, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert result.returncode == 0, f"{' '.join(command)} failed:\n{result.stdout[-6000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def build(request, tmp_path_factory) -> str:
    """A build of all C++ checks under the sanitizer that the parameter names."""
    build = str(tmp_path_factory.mktemp(request.param))
    options = [f"-DPADDLE_MOE_SANITIZE={request.param}", f"-DPython_EXECUTABLE={sys.executable}"]
    options += ["-DCMAKE_CXX_FLAGS_RELEASE=-O1", unused_isas()]  # compiles in a third of the time
    run([*cmake_tool("cmake"), "-S", ".", "-B", build, *options], timeout=60)
    run([*cmake_tool("cmake"), "--build", build, "--parallel", "2"], timeout=900)
    return build


def run_ctest(build: str, names: Sequence[str], seconds: int) -> None:
    ctest = [*cmake_tool("ctest"), "--test-dir", build, "--output-on-failure", "--timeout", str(seconds)]
    done = run([*ctest, "--parallel", "2", "--tests-regex", f"^({'|'.join(names)})$"], timeout=900)
    # CMake 4 leaves "0 tests failed" out.
    assert re.search(rf"100% tests passed(, 0 tests failed)? out of {len(names)}\n", done), done


def run_checks(build: str, *sources: Path, prefix: str = "") -> None:
    run_ctest(build, [prefix + source.stem for source in sources], seconds=300)


@pytest.mark.timeout(1800)  # .ci/run gives it what other tests leave
@pytest.mark.parametrize("build", ["address", "thread"], indirect=True)
def test_cpp_checks(build):
    """address includes undefined behaviour; thread checks the pool and the queue of tasks."""
    run_checks(build, *ROOT.glob("tests/cpp/*.cc"))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("build", ["address"], indirect=True)
def test_avx512_in_software(build):
    """The AVX-512 kernels, with intrinsics in plain C++, by the checks that run on every instruction set."""
    if not {"avx2", "avx512", "avx512_bf16"} & {*core.available_isas()}:
        pytest.skip("the AVX-512 kernels run in software on a processor with AVX2, FMA and F16C only")
    on_every_isa = [path for path in ROOT.glob("tests/cpp/*.cc") if "on_every_isa" in path.read_text()]
    run_checks(build, ROOT / "test_intrinsics.cc", *on_every_isa, prefix="software_avx512_")
