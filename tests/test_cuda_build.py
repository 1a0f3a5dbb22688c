"""The build of the CUDA back end, where a toolkit is: what is compiled, what is refused. Needs no GPU."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from paddle_moe import core

REPOSITORY = Path(__file__).resolve().parent.parent
TOOLKIT_TOOLS = f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"
# pip's nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm put theirs here.
PIP_TOOLS = str(Path(sys.prefix) / "lib" / f"python3.{sys.version_info[1]}/site-packages/nvidia/cu13/bin")
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), TOOLKIT_TOOLS, PIP_TOOLS])
NVCC = shutil.which("nvcc", path=SEARCH_PATH)
CUOBJDUMP = shutil.which("cuobjdump", path=SEARCH_PATH)

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc found")


def compile_strictly(
    tmp_path: Path, kernel: str, *flags: str, strict: bool = True
) -> tuple[subprocess.CompletedProcess, Path]:
    source, target = tmp_path / "kernel.cu", tmp_path / "kernel.o"
    source.write_text(kernel)
    target.write_text("an object of an earlier build")
    command = [sys.executable, str(REPOSITORY / "scripts" / "strict_nvcc.py"), NVCC, "-c", str(source)]
    environment = {**os.environ, "PADDLE_MOE_STRICT_NVCC": "1" if strict else "0"}
    command += ["-o", str(target), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    return done, target


@needs_nvcc
def test_a_good_kernel_is_compiled(tmp_path):
    done, target = compile_strictly(tmp_path, "__global__ void one(float* a) { a[threadIdx.x] = 1; }")
    assert done.returncode == 0, done.stderr
    assert target.read_bytes().startswith(b"\x7fELF")


GREEDY = """
    __global__ void __launch_bounds__(1024) greedy(float* a) {
      float x[200];
    #pragma unroll
      for (int i = 0; i < 200; ++i) x[i] = a[i * 1024 + threadIdx.x];
      __syncthreads();
    #pragma unroll
      for (int i = 0; i < 200; ++i) a[i * 1024 + threadIdx.x] = x[i] * x[(i * 7 + 3) % 200];
    }
"""


@needs_nvcc
def test_spilled_registers_fail_the_build(tmp_path):
    done, target = compile_strictly(tmp_path, GREEDY, "-gencode=arch=compute_80,code=sm_80")
    assert done.returncode != 0
    assert re.search(r"error: registers were spilled by \S*greedy\S* for sm_80", done.stderr), done.stderr
    assert not target.exists(), "the old object could be linked instead"


@needs_nvcc
def test_spilled_registers_may_be_a_warning(tmp_path):
    done, target = compile_strictly(tmp_path, GREEDY, "-gencode=arch=compute_80,code=sm_80", strict=False)
    assert done.returncode == 0 and target.read_bytes().startswith(b"\x7fELF")
    assert "warning: registers were spilled by" in done.stderr


@needs_nvcc
def test_a_failed_compile_fails_the_build(tmp_path):
    done, target = compile_strictly(tmp_path, "#error broken on purpose\n")
    assert done.returncode != 0 and "broken on purpose" in done.stderr
    assert not target.exists()


def test_the_refused_messages_of_ptxas_are_recognised():
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    try:
        from strict_nvcc import complaints
    finally:
        sys.path.pop(0)
    serialised = (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    )
    ignored = "ptxas warning : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum"
    fine = (
        "ptxas info    : Compiling entry function 'k' for 'sm_90a'\n    0 bytes stack frame, 0 bytes spill "
    )
    fine += "stores, 0 bytes spill loads\nptxas info    : Used 168 registers"
    assert complaints(fine) == []
    other = serialised.replace("C7510", "C7520")
    assert complaints(f"{fine}\n{serialised}\n{ignored}\n{other}") == [serialised, ignored, other]


def machine_code(file: Path, architecture: str) -> str:
    environment = {**os.environ, "PATH": SEARCH_PATH}
    done = subprocess.run(
        [CUOBJDUMP, "--dump-sass", "--gpu-architecture", architecture, str(file)],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not core._core.has_cuda(), reason="paddle_moe was built without CUDA")
@pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump found (pip install nvidia-cuda-cuobjdump)")
def test_the_operators_hold_the_instructions_they_are_fast_by():
    """HGMMA: wgmma, tnspA: its left operand transposed. UTMALDG: tensor copies. LDGSTS: cp.async. HMMA: mma.

    _core has the same objects.
    """
    [file] = Path(core.__file__).parent.glob("_ops.*.so")
    expected = {"sm_80": ("HMMA", "LDGSTS"), "sm_90a": ("HGMMA", "tnspA", "UTMALDG", "LDGSTS", "HMMA")}
    with ThreadPoolExecutor() as pool:
        codes = list(pool.map(functools.partial(machine_code, file), expected))
    for (architecture, instructions), code in zip(expected.items(), codes):
        assert "grouped_gemm" in code
        assert ("HGMMA" in code) == (architecture == "sm_90a"), "the code of another architecture was read"
        missing = [name for name in instructions if not re.search(rf"\b{name}\b", code)]
        assert not missing, f"{file.name} has no {', '.join(missing)} for {architecture}"
    assert_wgmma_overlaps(codes[-1])


def assert_wgmma_overlaps(code: str) -> None:
    """Groups of four wgmma, of which the next begins before the last has ended; all end once, after the loop.

    gsb0: the end of a group. DEPBAR.LE gsb0, n: a wait until at most n are unfinished.
    """
    count = 0
    for function in code.split("Function : ")[1:]:
        wgmmas = len(re.findall(r"\bHGMMA\b", function))
        if wgmmas == 0:
            continue
        count += 1
        groups = len(re.findall(r"\bHGMMA\b.*gsb0", function))
        waits = {n: len(re.findall(rf"WARPGROUP\.DEPBAR\.LE gsb0, 0x{n}\b", function)) for n in (0, 1)}
        found = f"{function.split()[0]}: {wgmmas} wgmma in {groups} groups, waits {waits}"
        assert wgmmas == 4 * groups and waits == {0: 1, 1: groups}, found
    assert count == 18, "16 grouped GEMMs and 2 weight gradients"


def cmake(*arguments: str) -> None:
    command = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), SEARCH_PATH]))
    if command is None:
        pytest.skip("no cmake found (pip install cmake)")
    done = subprocess.run(
        [command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=800
    )
    assert done.returncode == 0, done.stdout


def configure(build: Path, *options: str) -> None:
    options = ("-DPADDLE_MOE_CUDA=ON", f"-DPython_EXECUTABLE={sys.executable}", *options)
    cmake("-S", str(REPOSITORY), "-B", str(build), *options)


@needs_nvcc
def test_cmake_compiles_for_what_setup_py_does(tmp_path):
    configure(tmp_path, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    targets = {
        Path(one["file"]).name: re.findall(r"-gencode=arch=(\w+),code=(\w+)", one["command"])
        for one in commands
        if one["file"].endswith(".cu")
    }
    assert {*targets} == {path.name for path in REPOSITORY.glob("csrc/cuda/*.cu")}
    hopper = ("compute_90a", "sm_90a")
    everything = [("compute_80", "sm_80"), hopper, ("compute_80", "compute_80")]
    for name, found in targets.items():
        assert found == ([hopper] if name.endswith("_sm90.cu") else everything), name


@pytest.mark.slow
@needs_nvcc
@pytest.mark.timeout(900)
def test_cmake_builds_the_core_with_cuda(tmp_path):
    build, package = tmp_path / "build", tmp_path / "package"
    configure(build, "-DPADDLE_MOE_CUDA_ARCHS=90a")  # one of them, in half the time
    cmake("--build", str(build), "--target", "_core", "--parallel", "2")
    cmake("--install", str(build), "--prefix", str(package))
    code = "from paddle_moe import core; print(core.__file__, core._core.has_cuda())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.split() == [str(package / "paddle_moe" / "core.py"), "True"], done.stderr
