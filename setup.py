"""Builds the compiled modules of paddle_moe: the Paddle operators (_ops) and the NumPy/DLPack module (_core).

Both link one static library with the checker and the kernels, which is compiled once. Metadata is in
pyproject.toml.
"""

from __future__ import annotations

import os
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_clib import build_clib
from setuptools.command.build_ext import build_ext

try:
    from setuptools.modified import newer_group
except ImportError:  # setuptools < 69
    from distutils.dep_util import newer_group

try:
    import paddle
    import pybind11
    from paddle.utils.cpp_extension import CppExtension
except ImportError as error:
    raise RuntimeError(
        f"paddle_moe is compiled against the PaddlePaddle it will run with, but {error}. Install "
        "paddlepaddle and pybind11 into this environment, then run `pip install --no-build-isolation .`"
    ) from error

FLAGS = ["-std=c++17", "-O3", "-g0", "-DNDEBUG", "-fvisibility=hidden", "-pthread", "-Wall"]
HEADERS = [path for path in glob("csrc/**/*", recursive=True) if path.endswith((".h", ".inc"))]
CORE_SOURCES = sorted(glob("csrc/*.cc") + glob("csrc/cpu/*.cc"))


def compile_only_what_changed(compiler) -> None:
    """Makes `compiler` keep every object file that is newer than its source, the headers and this file."""
    compile_one = compiler._compile

    def compile_if_older(obj, source, *rest):
        if newer_group([source, "setup.py", *HEADERS], obj):
            compile_one(obj, source, *rest)

    compiler._compile = compile_if_older


class BuildLibrary(build_clib):
    def build_libraries(self, libraries) -> None:
        compile_only_what_changed(self.compiler)
        super().build_libraries(libraries)


class BuildExtension(build_ext):
    """setuptools' own command. Paddle's accepts one extension, links on after a failed compile and leaves a
    version.txt in site-packages; CppExtension below already carries every flag that Paddle needs."""

    def run(self) -> None:
        self.run_command("build_clib")
        super().run()

    def build_extensions(self) -> None:
        compile_only_what_changed(self.compiler)
        self.compiler.force = True  # it would not link again when only the static library changed
        super().build_extensions()


def options(*include_dirs: str) -> dict:
    return {
        "depends": [*CORE_SOURCES, *HEADERS, "setup.py"],  # relink when the static library changes
        "include_dirs": ["csrc", *include_dirs],
        "extra_compile_args": list(FLAGS),
        "extra_link_args": ["-pthread"],
    }


ops = CppExtension(["csrc/bindings/paddle_ops.cc"], **options())
ops.name = "paddle_moe._ops"  # Paddle 2.6 takes no name
core = Extension(
    "paddle_moe._core", ["csrc/bindings/core_module.cc"], language="c++", **options(pybind11.get_include())
)

setup(
    libraries=[
        (
            "paddle_moe_core",
            {
                "sources": CORE_SOURCES,
                "include_dirs": ["csrc"],
                "cflags": FLAGS,
                "obj_deps": {"": ["setup.py", *HEADERS]},
            },
        )
    ],
    ext_modules=[ops, core],
    cmdclass={"build_clib": BuildLibrary, "build_ext": BuildExtension},
    # Objects compiled against one version of Paddle must not meet another.
    options={"build": {"build_base": os.path.join("build", f"paddle-{paddle.__version__}")}},
)
