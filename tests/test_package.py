"""The package as pip sees it, in environments of its own."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from paddle_moe import core

REPOSITORY = Path(__file__).resolve().parent.parent
INPUTS = ["csrc", "paddle_moe", "tests/cpp", "CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md"]
INPUTS += ["pyproject.toml", "scripts", "setup.py"]
LEFTOVERS = shutil.ignore_patterns("*.so", "__pycache__")


# As the installed package was built: then its objects in build/ are good for these builds too.
ENVIRONMENT = {**os.environ, "PADDLE_MOE_CUDA": str(int(core._core.has_cuda()))}


def run(*command, **options) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        env=options.pop("env", ENVIRONMENT),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        **options,
    )
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}"
    return result.stdout


def copy_of_the_tree(destination: Path) -> Path:
    for name in INPUTS:
        source, target = REPOSITORY / name, destination / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=LEFTOVERS)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    return destination


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def build_wheel(tree: Path, destination: Path) -> Path:
    run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", destination, tree)
    [wheel] = destination.glob("*.whl")
    return wheel


class Environment:
    """A virtual environment that sees the packages of this one, except paddle_moe itself."""

    def __init__(self, path: Path):
        venv.create(path, with_pip=False)
        self.python = path / "bin" / "python"
        self.site_packages = Path(
            run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        )
        outside = path / "packages_outside"
        outside.mkdir()
        for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
            for entry in Path(place).iterdir():
                if "paddle_moe" not in entry.name and not (outside / entry.name).exists():
                    (outside / entry.name).symlink_to(entry)
        self.pth = self.site_packages / "packages_outside.pth"
        self.pth.write_text(f"{outside}\n")

    def pip(self, *arguments) -> str:
        return run(self.python, "-m", "pip", "--disable-pip-version-check", *arguments)

    def run_code(self, code: str, cwd: Path) -> str:
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        return run(self.python, "-c", code, cwd=cwd, env=environment).strip().splitlines()[-1]

    def files(self) -> set[str]:
        return {entry.name for entry in self.site_packages.iterdir() if entry != self.pth}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    tree = copy_of_the_tree(tmp_path_factory.mktemp("tree"))
    for objects in REPOSITORY.glob("build/paddle-*/temp.*"):
        shutil.copytree(objects, tree / objects.relative_to(REPOSITORY))
    return tree


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def environment(tmp_path) -> Environment:
    return Environment(tmp_path / "environment")


USE = """
import paddle, paddle_moe
x, gate_weight = paddle.ones([3, 8]), paddle.zeros([8, 4])
gate_up, down = paddle.ones([4, 8, 12]), paddle.ones([4, 6, 8])
out = paddle_moe.fused_gate_moe(x, gate_weight, gate_up, down, 2, activation="identity")
assert (out == 8 * 8 * 6).all(), out
print(paddle_moe.__version__, paddle_moe.__file__)
"""


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [record] = [name for name in names if name.endswith(".dist-info/RECORD")]
        recorded = [row[0] for row in csv.reader(archive.read(record).decode().splitlines())]
        [entry_points] = [name for name in names if name.endswith("entry_points.txt")]
        assert "paddle_moe = paddle_moe.cli:main" in archive.read(entry_points).decode()
    assert sorted(recorded) == sorted(names)
    metadata = record.rpartition("/")[0]
    modules = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "paddle_moe").rglob("*.py")}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    compiled = {f"paddle_moe/{name}{suffix}" for name in ("_core", "_ops")}
    assert {name for name in names if not name.startswith(metadata + "/")} == modules | compiled
    assert any(name.startswith(metadata) and name.endswith("LICENSE") for name in names)


def test_two_versions_one_after_the_other(tree, wheel, environment, tmp_path):
    newer_tree = tmp_path / "newer"
    shutil.copytree(tree, newer_tree)  # with its build directory, as a developer's tree has one
    change(newer_tree / "paddle_moe" / "__init__.py", '__version__ = "', '__version__ = "9.')
    change(
        newer_tree / "csrc" / "arguments.cc",
        "top_k must be at least 1",
        "top_k of version 9 must be at least 1",
    )
    newer_wheel = build_wheel(newer_tree, tmp_path / "newer_wheel")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    refuse = (
        "import paddle, paddle_moe\n"
        "try: paddle_moe.route(paddle.zeros([1, 2]), 0)\n"
        "except ValueError as error: print(error)\n"
    )
    environment.pip("install", "--no-deps", wheel)
    first_version, first_file = environment.run_code(USE, elsewhere).split()
    assert Path(first_file).parent == environment.site_packages / "paddle_moe"
    assert environment.run_code(refuse, elsewhere) == "top_k must be at least 1, got 0"
    assert environment.files() == {"paddle_moe", f"paddle_moe-{first_version}.dist-info"}

    environment.pip("install", "--no-deps", newer_wheel)
    second_version = environment.run_code(USE, elsewhere).split()[0]
    assert second_version == f"9.{first_version}"
    assert environment.run_code(refuse, elsewhere) == "top_k of version 9 must be at least 1, got 0"
    assert environment.files() == {"paddle_moe", f"paddle_moe-{second_version}.dist-info"}

    environment.pip("uninstall", "-y", "paddle_moe")
    assert environment.files() == set()


def test_core_never_imports_paddle(wheel, environment, tmp_path):
    environment.pip("install", "--no-deps", wheel)
    code = "import sys, paddle_moe; paddle_moe.core.get_num_threads(); print('paddle' in sys.modules)"
    assert environment.run_code(code, tmp_path) == "False"


def test_a_missing_operator_says_how_to_get_it(wheel, environment, tmp_path):
    environment.pip("install", "--no-deps", wheel)
    for module, use in (
        ("_ops", "paddle_moe.mixture_of_experts"),
        ("_core", "__import__('paddle_moe.core')"),
    ):
        [path] = (environment.site_packages / "paddle_moe").glob(f"{module}.*")
        path.rename(tmp_path / path.name)
        code = f"import paddle_moe\ntry: {use}\nexcept RuntimeError as error: print(repr(str(error)))"
        message = environment.run_code(code, tmp_path)
        assert "pip install --no-build-isolation ." in message
        (tmp_path / path.name).rename(path)


def test_a_failed_compile_fails_the_build(tree, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tree, broken)  # with the objects of the good build, which must not be linked instead
    for source in ("csrc/bindings/paddle_ops.cc", "csrc/arguments.cc"):
        text = (broken / source).read_text()
        (broken / source).write_text(text + "\n#error broken on purpose\n")
        result = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=broken, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=500,
        )  # fmt: skip
        assert result.returncode != 0
        assert "broken on purpose" in result.stdout
        assert not list((broken / "paddle_moe").glob("*.so"))
        (broken / source).write_text(text)


def test_the_source_distribution_can_be_built_from(tree, tmp_path):
    run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=tree)
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        tar.extractall(tmp_path / "unpacked")
    wanted = {str(path.relative_to(tree)) for path in (tree / "csrc").rglob("*") if path.is_file()}
    wanted |= {str(path.relative_to(tree)) for path in (tree / "paddle_moe").rglob("*.py")}
    assert wanted | {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"} <= names
    [unpacked] = (tmp_path / "unpacked").iterdir()
    shutil.copytree(tree / "build", unpacked / "build")  # objects, so that little is compiled
    wheel = build_wheel(unpacked, tmp_path)
    with zipfile.ZipFile(wheel) as built:
        assert {"paddle_moe/layers.py", "paddle_moe/compat/fused_moe.py"} <= set(built.namelist())


def test_the_source_distribution_has_all_files_of_the_repository(tmp_path):
    try:
        tracked = run("git", "ls-files", cwd=REPOSITORY).split()
    except (AssertionError, OSError):
        pytest.skip("this is no clone, or there is no git")
    # Beside the clone, whose leftovers must not come along.
    for name in tracked:
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, tmp_path / "copy" / name)
    leftover = tmp_path / "copy" / "tests" / ".hypothesis" / "found"
    leftover.parent.mkdir()
    leftover.touch()
    run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=tmp_path / "copy")
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert set(tracked) - names <= {".gitignore", ".ci/run"}
    assert not {name for name in names if ".hypothesis" in name}
