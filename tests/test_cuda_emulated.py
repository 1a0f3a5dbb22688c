"""The CUDA kernels, compiled for the CPU against tests/cuda_emulator: a compiler and CMake, no GPU, no CUDA.

It proves indices, barriers and arithmetic. What only a GPU can show is in the tests of scripts/gpu_check.sh.
"""

from __future__ import annotations

import glob
import sys

import checks
import pytest
from test_sanitizers import ROOT, cmake_tool, run, run_ctest, unused_isas

# Not about the back end, or about threads and instruction sets that it does not have.
LEFT_OUT = "paddle or thread or instruction_set or forked"


def build(directory, *targets: str, **options: str) -> None:
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    definitions += ["-DPADDLE_MOE_EMULATE_CUDA=ON", f"-DPython_EXECUTABLE={sys.executable}", unused_isas()]
    run([*cmake_tool("cmake"), "-S", ".", "-B", directory, *definitions], 60)
    run([*cmake_tool("cmake"), "--build", directory, "--parallel", "2", "--target", *targets], 900)


CPU_CHECKS = [path.stem for path in sorted((ROOT / "tests/cpp").glob("test_*.cc"))]
CUDA_CHECKS = [f"emulated_{path.stem}" for path in sorted((ROOT / "tests/cuda_emulator").glob("test_*.cc"))]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> str:
    """A build of all C++ checks, and of paddle_moe._core linked with the emulated kernels."""
    directory = str(tmp_path_factory.mktemp("emulated"))
    build(directory, "core_emulated", *CPU_CHECKS, *CUDA_CHECKS)
    return directory


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("checks", [CPU_CHECKS, CUDA_CHECKS], ids=["cpu", "cuda"])
def test_cpp_checks(emulated, checks):
    """Those of the CPU are here because they can be built along; test_sanitizers.py has them too."""
    run_ctest(emulated, checks, seconds=400)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_cpp_checks_under_the_address_sanitizer(tmp_path):
    build(str(tmp_path), *CUDA_CHECKS, PADDLE_MOE_SANITIZE="address", CMAKE_CXX_FLAGS_RELEASE="-O1")
    run_ctest(str(tmp_path), CUDA_CHECKS, seconds=400)


@pytest.fixture(scope="module")
def emulated_core(emulated) -> str:
    (module,) = glob.glob(f"{emulated}/tests/cuda_emulator/_core*.so")
    return module


def run_on(module: str, files: list[str], *options: str, capability: int = 80) -> None:
    checks.run_python(
        f"{ROOT}/tests/cuda_emulator/run_tests.py",
        module,
        *["-q", "-x", "--no-header", "-p", "no:cacheprovider"],
        *options,
        *files,
        timeout=800,
        PADDLE_MOE_ISA="generic",
        PADDLE_MOE_EMULATED_CAPABILITY=str(capability),
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tests_of_the_cpu_back_end_pass(emulated_core):
    run_on(emulated_core, checks.OPERATOR_TESTS, "-m", "not slow", "-k", f"not ({LEFT_OUT})")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "selected",
    [
        "any_size or strides or expert_that_nobody_chose or nan_token or extreme or route_backward or gate",
        pytest.param("every_layout or every_activation or bits_do_not", marks=pytest.mark.slow),
    ],
    ids=["some", "sweeps"],
)
def test_the_tests_of_gradients_pass(emulated_core, selected):
    run_on(emulated_core, [f"{ROOT}/tests/test_backward.py"], "-k", selected)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "selected",
    [
        "(nobody_chose or silu) and not float32",
        pytest.param("every_activation or bits_do_not", marks=pytest.mark.slow),
    ],
    ids=["some", "sweeps"],
)
def test_the_tests_of_gradients_pass_on_hopper(emulated_core, selected):
    run_on(emulated_core, [f"{ROOT}/tests/test_backward.py"], "-k", selected, capability=90)
