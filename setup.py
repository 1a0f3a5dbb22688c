"""Builds the compiled modules of paddle_moe: the Paddle operators (_ops) and the NumPy/DLPack module (_core).

Both link one static library with the checker and the kernels of both back ends, which is compiled once.
Metadata is in pyproject.toml.

    PADDLE_MOE_CUDA         1: with the CUDA back end. 0: without. auto, the default: with it if the installed
                            Paddle is a CUDA build.
    PADDLE_MOE_CUDA_ARCHS   what to compile it for, such as "80;86;89;90a;100" (default: "80;90a"). The
                            highest without a letter is also embedded as PTX, which later GPUs can run.
    CUDA_HOME, CUDA_PATH    the CUDA toolkit, if it is neither that of the nvcc on PATH nor /usr/local/cuda
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from glob import glob
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_clib import build_clib
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:
    raise RuntimeError(
        f"setuptools is {setuptools.__version__}, which cannot read pyproject.toml. Run "
        "`pip install 'setuptools>=77'`, then `pip install --no-build-isolation .`"
    )
from setuptools.modified import newer_group  # noqa: E402

try:
    import paddle
    import pybind11
    from paddle.utils.cpp_extension import CppExtension
except ImportError as error:
    raise RuntimeError(
        f"paddle_moe is compiled against the PaddlePaddle it will run with, but {error}. Run `pip install "
        "paddlepaddle 'setuptools>=77' wheel pybind11`, then `pip install --no-build-isolation .`: without "
        "that option pip builds in an environment of its own, which has no Paddle"
    ) from error


# ---------------------------------------------------------------- CUDA


def cuda_toolkit() -> Path | None:
    """The directory with bin/nvcc and include/cuda_runtime.h."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            toolkit = Path(os.environ[variable])
            if not (toolkit / "bin" / "nvcc").exists():
                raise RuntimeError(
                    f"{variable} must name a CUDA toolkit, but {toolkit}/bin/nvcc does not exist"
                )
            return toolkit
    if nvcc := shutil.which("nvcc"):  # may be a script that calls another one: only nvcc knows where it is
        asked = subprocess.run(
            [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], stderr=subprocess.PIPE, text=True
        )
        if top := re.search(r"^#\$ TOP=(.+)$", asked.stderr, re.MULTILINE):
            return Path(top.group(1).strip()).resolve()
    toolkit = Path("/usr/local/cuda")
    return toolkit if (toolkit / "bin" / "nvcc").exists() else None


def wanted_cuda_toolkit() -> Path | None:
    """The toolkit to build the CUDA back end with; None: build without it."""
    choice = os.environ.get("PADDLE_MOE_CUDA") or "auto"
    if choice not in ("0", "1", "auto"):
        raise RuntimeError(f"PADDLE_MOE_CUDA must be 0, 1 or auto, got {choice}")
    if choice == "0" or (choice == "auto" and not paddle.is_compiled_with_cuda()):
        return None
    toolkit = cuda_toolkit()
    if toolkit is None:
        reason = "PADDLE_MOE_CUDA=1" if choice == "1" else "the installed Paddle is a CUDA build"
        raise RuntimeError(
            f"{reason}, but no nvcc was found. Set CUDA_HOME to a CUDA toolkit, or PADDLE_MOE_CUDA=0 to "
            "build paddle_moe for the CPU alone"
        )
    return toolkit


def cuda_architectures() -> list[str]:
    text = os.environ.get("PADDLE_MOE_CUDA_ARCHS") or "80;90a"
    architectures = text.split(";")
    if not all(re.fullmatch(r"\d{2,3}[af]?", architecture) for architecture in architectures):
        raise RuntimeError(f'PADDLE_MOE_CUDA_ARCHS must be like "80;86;89;90a;100", got "{text}"')
    if min(int(architecture.rstrip("af")) for architecture in architectures) < 80:
        raise RuntimeError(f'PADDLE_MOE_CUDA_ARCHS must be 80 or higher, got "{text}"')
    return architectures


def nvcc_flags(source: str, architectures: list[str]) -> list[str]:
    """The target architectures of a source, and what it has to know about them."""
    flags = []
    if "90a" not in architectures:
        flags.append("-DPADDLE_MOE_NO_SM90A")
    elif source.endswith("_sm90.cu"):  # its instructions exist there alone
        architectures = ["90a"]
    flags += [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    plain = [name for name in architectures if name.isdigit()]
    if plain:
        newest = max(plain, key=int)
        flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return flags


def cudart_directory(toolkit: Path) -> Path:
    for directory in (toolkit / "lib64", toolkit / "lib", *toolkit.glob("targets/*/lib")):
        if (directory / "libcudart_static.a").exists():
            return directory
    raise RuntimeError(f"libcudart_static.a was not found in the CUDA toolkit {toolkit}")


# ---------------------------------------------------------------- sources and flags

TOOLKIT = wanted_cuda_toolkit()
ARCHITECTURES = cuda_architectures() if TOOLKIT else []
FLAGS = ["-std=c++17", "-O3", "-g0", "-DNDEBUG", "-fvisibility=hidden", "-pthread", "-Wall"]
LINK_FLAGS = ["-pthread"]
INCLUDE_DIRS = ["csrc"]
CPU_SOURCES = sorted(glob("csrc/*.cc") + glob("csrc/cpu/*.cc"))
CUDA_SOURCES = []
if TOOLKIT:
    CUDA_SOURCES = sorted(glob("csrc/cuda/*.cu"))
    INCLUDE_DIRS += [str(TOOLKIT / "include"), str(TOOLKIT / "include" / "cccl")]
    # The CUDA runtime is linked in and hidden: Paddle and PyTorch load theirs, of any version, beside it.
    LINK_FLAGS += [
        f"-L{cudart_directory(TOOLKIT)}",
        "-lcudart_static",
        "-ldl",
        "-lrt",
        "-Wl,--exclude-libs,ALL",
    ]
DISPATCH_MACROS = [("PADDLE_MOE_WITH_CUDA", None)] if TOOLKIT else []


def dependencies(source: str) -> list[str]:
    """What an object of `source` is compiled from: a back end sees its own headers and the interface."""
    folders = {"csrc", os.path.dirname(source)}
    headers = [
        path for folder in folders for path in glob(f"{folder}/*") if path.endswith((".h", ".inc", ".cuh"))
    ]
    return [source, "setup.py", *headers]


# ---------------------------------------------------------------- compiling


def compile_unless_done(source: str, obj: str, command: object, run) -> None:
    """run() unless `obj` is newer than what it depends on and came from the same command.

    Another environment with the same Paddle, see build_base below, gives the same object.
    """
    stamp = Path(f"{obj}.command")
    key = repr(command).replace(sys.prefix, "")
    if stamp.exists() and stamp.read_text() == key and not newer_group(dependencies(source), obj):
        return
    stamp.unlink(missing_ok=True)
    run()
    stamp.write_text(key)


def compile_only_what_changed(compiler) -> None:
    """Makes `compiler` keep every object file that is up to date."""
    compile_one = compiler._compile

    def compile_if_older(obj, source, *rest):
        command = (compiler.compiler_so, *rest)
        compile_unless_done(source, obj, command, lambda: compile_one(obj, source, *rest))

    compiler._compile = compile_if_older


class BuildLibrary(build_clib):
    """The static library, on all cores, and with the CUDA sources that setuptools does not know."""

    def build_libraries(self, libraries) -> None:
        compile_only_what_changed(self.compiler)
        [(name, library)] = libraries

        def compile_cpp(source: str) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=DISPATCH_MACROS if source == "csrc/dispatch.cc" else [],
                include_dirs=library["include_dirs"],
                extra_postargs=library["cflags"],
            )

        # The CUDA sources take longest, so they go first.
        tasks = [(self.compile_cuda, source) for source in CUDA_SOURCES]
        tasks += [(compile_cpp, source) for source in library["sources"]]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            results = [pool.submit(task, source) for task, source in tasks]
            try:
                for result in as_completed(results):
                    result.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)  # else all is compiled before anybody sees it
                raise
        objects = [obj for result in results for obj in result.result()]
        archive = Path(self.build_clib, self.compiler.library_filename(name))
        archive.unlink(missing_ok=True)  # ar would keep the objects of sources that are gone
        self.compiler.create_static_lib(objects, name, output_dir=self.build_clib)

    def compile_cuda(self, source: str) -> list[str]:
        obj = os.path.join(self.build_temp, f"{source}.o")
        host_flags = ["-fPIC", "-fvisibility=hidden", "-Wall"]
        command = [str(TOOLKIT / "bin" / "nvcc")]
        command += ["-std=c++17", "-O3", "-DNDEBUG", "-Icsrc", *(f"-Xcompiler={flag}" for flag in host_flags)]
        command += [*nvcc_flags(source, ARCHITECTURES), "-c", source, "-o", obj]
        if compiler := os.environ.get("CXX"):
            command.append(f"-ccbin={compiler}")

        def run() -> None:
            os.makedirs(os.path.dirname(obj), exist_ok=True)
            # Any Python may run it, so the object is kept when another one does.
            strictly = [sys.executable, "scripts/strict_nvcc.py", *command]
            print(*strictly, flush=True)
            if subprocess.run(strictly).returncode != 0:
                raise RuntimeError(f"{source} was not compiled; the reason is printed above")

        # What a lenient build lets pass must not be taken for the object of a strict one.
        lenient = os.environ.get("PADDLE_MOE_STRICT_NVCC") == "0"
        compile_unless_done(source, obj, (command, lenient), run)
        return [obj]


class BuildExtension(build_ext):
    """setuptools' own command. Paddle's accepts one extension, links on after a failed compile and leaves a
    version.txt in site-packages; CppExtension below already carries every flag that Paddle needs."""

    def run(self) -> None:
        self.run_command("build_clib")
        super().run()

    def build_extensions(self) -> None:
        compile_only_what_changed(self.compiler)
        self.force = self.compiler.force = True  # else it would not link when only the static library changed
        self.parallel = self.parallel or len(self.extensions)  # each is one source that takes half a minute
        super().build_extensions()


def options(*include_dirs: str) -> dict:
    return {
        "include_dirs": [*INCLUDE_DIRS, *include_dirs],
        "extra_compile_args": list(FLAGS),
        "extra_link_args": list(LINK_FLAGS),
    }


ops = CppExtension(["csrc/bindings/paddle_ops.cc"], **options())
ops.name = "paddle_moe._ops"  # Paddle 2.6 takes no name
if int(paddle.__version__.partition(".")[0]) >= 3:
    ops.define_macros += [("PADDLE_MOE_KEPT_GRADIENTS", None)]
if paddle.is_compiled_with_cuda() and TOOLKIT:
    # The second leaves out headers of Paddle that need cuBLAS and others.
    ops.define_macros += [("PADDLE_WITH_CUDA", None), ("PADDLE_NO_PYTHON", None)]
core = Extension(
    "paddle_moe._core", ["csrc/bindings/core_module.cc"], language="c++", **options(pybind11.get_include())
)

setup(
    libraries=[
        (
            "paddle_moe_core",
            {"sources": CPU_SOURCES, "include_dirs": INCLUDE_DIRS, "cflags": FLAGS},
        )
    ],
    ext_modules=[ops, core],
    cmdclass={"build_clib": BuildLibrary, "build_ext": BuildExtension},
    # Objects compiled against one version of Paddle must not meet another.
    options={"build": {"build_base": os.path.join("build", f"paddle-{paddle.__version__}")}},
)
