"""`python -m paddle_moe bench` at a tiny size: what it writes, and what it refuses to time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from paddle_moe import bench, cli

TINY = ["--shapes", "4x2x32x16", "--rounds", "1", "--tokens", "1,5"]


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "paddle_moe", "bench", "--device", "cpu", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_figures_and_picture(tmp_path):
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    variants = "paddle_moe,paddle_moe.core,numpy loop,paddle loop"
    options = ["--dtypes", "float32,bfloat16", "--variants", variants, "--out", out, "--picture", picture]
    done = run(*TINY, *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert [(r["num_tokens"], r["dtype"]) for r in report["results"]] == [
        (1, "float32"),
        (5, "float32"),
        (1, "bfloat16"),
        (5, "bfloat16"),
    ]
    for result in report["results"]:
        assert set(result["variants"]) == set(variants.split(",")), result["left_out"]
        assert result["limits"]["read_bytes_per_second"]["min"] > 0
        for name, figures in result["variants"].items():
            assert figures["relative_error"] < bench.TOLERANCE[result["dtype"]], name
            for state in ("cold", "warm"):
                ratio = figures[state]["times_floor"]
                assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        assert result["variants"]["paddle_moe"]["cold"]["times_paddle_moe"]["median"] == 1.0
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert done.stdout.count("paddle loop") == 4


def test_merge_keeps_other_cases_and_replaces_the_same(tmp_path):
    out = tmp_path / "bench.json"
    for variant, tokens in (("numpy loop", "1,5"), ("paddle_moe.core 1 thread", "5,2")):
        done = run(*TINY, "--tokens", tokens, "--variants", variant, "--merge", "--out", out)
        assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    assert ["limits_of_one_thread" in r for r in results] == [False, True, True]
    assert [r["rounds"] for r in results] == [1, 1, 1] and len({r["commit"] for r in results}) == 1
    assert done.stdout.count("; of one thread") == 2
    measured = [(r["num_tokens"], *r["variants"]) for r in results]
    assert measured == [(1, "numpy loop"), (2, "paddle_moe.core 1 thread"), (5, "paddle_moe.core 1 thread")]


def test_sizes_that_cannot_be_prepacked_are_left_out():
    sizes = ["--shapes", "4x2x36x17", "--rounds", "1", "--tokens", "2", "--dtypes", "bfloat16,int8,int4"]
    done = run(*sizes, "--variants", "paddle_moe.core permuted,paddle_moe.core prepacked")
    assert done.returncode == 0, done.stderr
    for dtype, multiple in (("bfloat16", 2), ("int8", 2), ("int4", 8)):
        assert f"prepacked {dtype} needs inputs in multiples of {multiple}" in done.stdout


def test_a_result_names_its_commit(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)  # in a hook of git they name its repository, which would get the commit
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)  # the user may sign all commits, with a passphrase
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "package" / "bench.py"))
    (tmp_path / "package").mkdir()
    bench._commit.cache_clear()
    assert bench._commit() is None  # installed
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    bench._commit.cache_clear()
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert head.startswith(bench._commit()) and len(bench._commit()) >= 7
    bench._commit.cache_clear()


@pytest.mark.parametrize("readme", ["README.md", "README_cn.md"])
def test_the_readme_quotes_the_published_figures(readme):
    repository, to = Path(__file__).parent.parent, "到" if readme == "README_cn.md" else "to"
    rows = re.findall(
        r"^\| \[.*\]\((benchmarks/results/.*\.json)\)[^|]*\|(.*)\|$", (repository / readme).read_text(), re.M
    )
    assert len(rows) == 3
    for file, cells in rows:
        ratios = {}
        for result in json.loads((repository / file).read_text())["results"]:
            for name, figures in result["variants"].items():
                ratios.setdefault(name, []).append(figures["cold"]["times_paddle_moe"]["median"])
        peers = ("numpy loop", "torch grouped", "vllm", "ggml")
        expected = [
            f"{min(ratios[peer]):.2f} {to} {max(ratios[peer]):.2f}" if peer in ratios else ""
            for peer in peers
        ]
        assert [cell.strip() for cell in cells.split("|")] == expected, file


def test_results_of_another_machine_are_not_merged():
    with pytest.raises(ValueError, match="the file's processor is 'that'"):
        bench._report({**bench._report(None, []), "processor": "that"}, [])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_peers_are_right_or_said_to_be_missing(tmp_path, dtype):
    out = tmp_path / "bench.json"
    options = ["--shapes", "4x2x64x128", "--dtypes", dtype, "--variants", "torch grouped,vllm,ggml"]
    done = run(*TINY, *options, "--out", out)
    assert done.returncode == 0, done.stderr
    for result in json.loads(out.read_text())["results"]:
        assert len(result["variants"]) + len(result["left_out"]) == (2 if dtype.startswith("int") else 3)
        assert all("not installed" in str(why) for why in result["left_out"].values()), result["left_out"]


def test_a_peer_without_the_format_says_so(tmp_path):
    done = run(*TINY, "--dtypes", "float8_e4m3fn", "--variants", "paddle_moe.core,ggml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("  ggml: no format for it: Q8_0 and Q4_0 are integers in blocks of 32") == 2


def test_quantised_weights(tmp_path):
    out = tmp_path / "bench.json"
    ours = "paddle_moe,paddle_moe.core,paddle_moe.core list,paddle_moe.core permuted"
    variants = f"{ours},bfloat16 permuted,paddle loop"
    done = run(*TINY, "--dtypes", "int8,int4,float8_e4m3fn", "--variants", variants, "--out", out)
    assert done.returncode == 0, done.stderr
    for result in json.loads(out.read_text())["results"]:
        errors = {name: figures["relative_error"] for name, figures in result["variants"].items()}
        assert set(errors) | set(result["left_out"]) == set(variants.split(","))
        assert set(result["left_out"]) == ({"paddle_moe.core list"} if result["dtype"] == "int4" else set())
        assert all(1e-4 < errors[name] < 4e-3 for name in ours.split(",") if name in errors)
        assert 1e-4 < errors["bfloat16 permuted"] < 1e-2  # which rounds the weights too


def test_backward(tmp_path):
    out = tmp_path / "bench.json"
    done = run(*TINY, "--backward", "--dtypes", "float32,bfloat16", "--out", out)
    assert done.returncode == 0, done.stderr
    for result in json.loads(out.read_text())["results"]:
        assert {"paddle_moe", "paddle_moe.core", "paddle loop"} <= set(result["variants"]), result["left_out"]
        assert "numpy loop" not in result["variants"]
        for name in ("paddle_moe", "paddle_moe.core"):
            assert result["variants"][name]["relative_error"] < bench.TOLERANCE[result["dtype"]]


def test_backward_through_quantised_weights(tmp_path):
    out = tmp_path / "bench.json"
    ours = "paddle_moe,paddle_moe.core,paddle_moe.core permuted"
    variants = f"{ours},bfloat16 permuted,paddle loop"
    done = run(
        *TINY, "--backward", "--dtypes", "int8,int4,float8_e4m3fn", "--variants", variants, "--out", out
    )
    assert done.returncode == 0, done.stderr
    for result in json.loads(out.read_text())["results"]:
        assert set(result["variants"]) == set(variants.split(","))
        for name in variants.split(","):
            assert 1e-4 < result["variants"][name]["relative_error"] < 1e-2 or name == "paddle loop"


def test_a_wrong_peer_is_not_timed_and_a_wrong_operator_fails(monkeypatch, capsys):
    right = bench.VARIANTS["paddle_moe.core"]

    def wrong(inputs, weights):
        call = right(inputs, weights)
        return lambda: 1.01 * call()

    case = bench.Case(4, 2, 32, 16, 5, "float32")
    weights = bench.Weights(case, np.random.default_rng(0))
    monkeypatch.setitem(bench.VARIANTS, "peer", wrong)
    monkeypatch.setitem(bench.VARIANTS, "paddle_moe.wrong", wrong)
    result = bench._run_case(case, weights, ["peer", "paddle_moe.wrong"], 1, bench.Limits(1))
    assert result["left_out"]["peer"] == pytest.approx(0.01, rel=1e-3)
    assert result["variants"]["paddle_moe.wrong"]["relative_error"] == pytest.approx(0.01, rel=1e-3)
    bench._print_case(result)
    assert "peer: relative error 1.0e-02: not timed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("dtype", "backward", "passes", "bytes_per_weight"),
    [("bfloat16", False, 1, 2), ("float32", True, 3, 4), ("int4", True, 2, 0.5)],
)
def test_the_floor_of_a_call(dtype, backward, passes, bytes_per_weight):
    case = bench.Case(4, 2, 32, 16, 5, dtype, backward)
    weights_of_an_expert = 3 * 32 * 16  # gate, up and down
    assert case.flops == passes * 2 * 5 * 2 * weights_of_an_expert
    assert case.weight_bytes(3) == passes * 3 * weights_of_an_expert * bytes_per_weight


@pytest.mark.parametrize(("flops", "read"), [(1e3, 1e12), (1e12, 1e3)])
def test_times_floor_is_the_time_over_the_floor(flops, read):
    class Limits:
        def measure(self, case, threads=None):
            return flops, read

        def flush(self):
            pass

    case = bench.Case(4, 2, 32, 16, 5, "float32")
    weights = bench.Weights(case, np.random.default_rng(0))
    result = bench._run_case(case, weights, ["paddle_moe.core"], 1, Limits())
    floor = max(case.flops / flops, case.weight_bytes(result["active_experts"]) / read)
    assert floor > 1
    for state in ("cold", "warm"):
        figures = result["variants"]["paddle_moe.core"][state]
        seconds = figures["milliseconds"]["median"] / 1e3
        assert figures["times_floor"]["median"] == pytest.approx(seconds / floor)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--shapes", "4x2x32"], "no more experts per token than experts, got 4x2x32"),
        (["--shapes", "2x4x16x16"], "no more experts per token than experts, got 2x4x16x16"),
        (["--shapes", "2x1xHxI"], "no more experts per token than experts, got 2x1xHxI"),
        (["--tokens", "many"], "--tokens must be like 1,8, got many"),
        (["--tokens", "8,0"], "--tokens must be like 1,8, got 8,0"),
        (["--tokens=-1"], "--tokens must be like 1,8, got -1"),
        (["--device", "gpu"], "--device must be cpu, got gpu; a GPU is measured by benchmarks/gpu_moe.py"),
        (["--dtypes", "int2"], "--dtypes must be from float32, bfloat16"),
        (["--variants", "abacus"], ", got abacus"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--threads=-2"], "--threads: n must be from 0 (the default) to 4096, got -2"),
        (["--out", "."], "--out must be a file in a directory that exists, got ."),
        (["--picture", "no/a.png"], "--picture must be a file in a directory that exists, got no/a.png"),
        (["--out", __file__, "--merge"], "test_bench.py is no report of this command"),
        (["--merge"], "--merge needs --out"),
        (["--variants", "vllm,ggml", "--backward"], "--variants must have one that is able to do --backward"),
        (
            ["--variants", "vllm", "--dtypes", "float32,int8"],
            "one that is able to do --dtypes int8, got vllm",
        ),
    ],
)
def test_bad_options(monkeypatch, capsys, options, error):
    def measured(*_):
        raise AssertionError("measured")

    monkeypatch.setattr(bench, "Limits", measured)
    assert cli.main(["bench", *TINY, *options]) == 2
    assert error in capsys.readouterr().err


def test_a_missing_matplotlib_is_said_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", *TINY, "--picture", str(tmp_path / "bench.png")]) == 2
    assert "--picture needs matplotlib" in capsys.readouterr().err
