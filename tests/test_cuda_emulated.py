"""The CUDA kernels, compiled for the CPU against tests/cuda_emulator: a compiler and CMake, no GPU, no CUDA.

It proves indices, barriers and arithmetic. What only a GPU can show is in the tests of scripts/gpu_check.sh.
"""

from __future__ import annotations

import glob

import checks
import pytest
from test_sanitizers import ROOT, cmake_tool, run

FILES = [
    f"{ROOT}/tests/{name}"
    for name in ("test_mixture_of_experts.py", "test_route.py", "test_fused_gate_moe.py")
]
# Not about the back end, or about threads and instruction sets that it does not have.
LEFT_OUT = "paddle or thread or instruction_set or forked"


def build(directory, *targets: str, **options: str) -> None:
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    run([*cmake_tool("cmake"), "-S", ".", "-B", directory, "-DPADDLE_MOE_EMULATE_CUDA=ON", *definitions], 60)
    run([*cmake_tool("cmake"), "--build", directory, "--parallel", "2", "--target", *targets], 300)


@pytest.mark.timeout(600)
def test_cpp_checks_under_the_address_sanitizer(tmp_path):
    targets = [f"emulated_{path.stem}" for path in sorted((ROOT / "tests/cuda_emulator").glob("test_*.cc"))]
    directory = str(tmp_path)
    build(directory, *targets, PADDLE_MOE_SANITIZE="address", CMAKE_CXX_FLAGS_RELEASE="-O1")
    options = ["--tests-regex", "emulated_", "--output-on-failure", "--timeout", "200", "--no-tests=error"]
    run([*cmake_tool("ctest"), "--test-dir", directory, *options], 300)


@pytest.mark.timeout(900)
def test_the_tests_of_the_cpu_back_end_pass(tmp_path):
    build(str(tmp_path), "core_emulated")
    (module,) = glob.glob(f"{tmp_path}/tests/cuda_emulator/_core*.so")
    options = [
        "-q",
        "-x",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        "-k",
        f"not ({LEFT_OUT})",
    ]
    checks.run_python(
        f"{ROOT}/tests/cuda_emulator/run_tests.py",
        module,
        *options,
        *FILES,
        timeout=800,
        PADDLE_MOE_ISA="generic",
    )
