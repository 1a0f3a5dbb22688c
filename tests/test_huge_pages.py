"""Weights in huge pages: what moves, what does not, and that nothing else changes."""

from __future__ import annotations

import copy
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from checks import assert_same_bits

import paddle_moe
from paddle_moe import FusedMoE, huge_pages

PAGE = 2 << 20
needs_them = pytest.mark.skipif(
    huge_pages.why_not() is not None, reason=f"no huge pages: {huge_pages.why_not()}"
)


# Of all programs, also where they do not ask: then there is nothing left to move.
ALWAYS = huge_pages.why_not() is None and "[always]" in (huge_pages._SETTINGS / "enabled").read_text()
THERE_ARE_NONE_NOW = (errno.EAGAIN, errno.EBUSY, errno.ENOMEM)


def note_errors() -> list[int]:
    """Of each collapse from now on."""
    advise, errors = huge_pages._advise, []

    def noted(*extent):
        errors.append(advise(*extent))
        return errors[-1]

    huge_pages._advise = noted
    return errors


def in_huge_pages() -> int:
    """Bytes of this process."""
    found = re.search(r"AnonHugePages: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    return int(found[1]) << 10


@pytest.fixture
def collapsed(monkeypatch):
    """The addresses and sizes of what is put into huge pages."""
    calls = []
    monkeypatch.setattr(huge_pages, "collapse", lambda *extent: calls.append(extent))
    return calls


def extent_of(tensor: paddle.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.size * tensor.element_size()


@needs_them
def test_a_tensor_moves_and_keeps_its_address_and_bits(monkeypatch):
    tensor = paddle.randn([24 << 20])
    address, values, before = tensor.data_ptr(), tensor.numpy().copy(), in_huge_pages()
    monkeypatch.setattr(huge_pages, "_advise", huge_pages._advise)  # undone after the test
    errors = note_errors()
    paddle_moe.use_huge_pages(tensor)
    moved = in_huge_pages() - (0 if ALWAYS else before)
    assert len(errors) == 1 and errors[0] in (0, *THERE_ARE_NONE_NOW)
    assert moved >= (24 << 22) - 2 * PAGE or errors[0] != 0
    assert tensor.data_ptr() == address
    assert_same_bits(tensor.numpy(), values)
    paddle_moe.use_huge_pages(tensor)  # where they are already
    assert_same_bits(tensor.numpy(), values)


def test_whole_pages_inside_of_the_memory_alone_move(monkeypatch):
    moved = []
    monkeypatch.setattr(huge_pages, "why_not", lambda: None)
    monkeypatch.setattr(huge_pages, "_page_bytes", lambda: PAGE)
    monkeypatch.setattr(huge_pages, "_advise", lambda start, size: moved.append((start, size)))
    for address, size, expected in (
        (3 * PAGE, 2 * PAGE, (3 * PAGE, 2 * PAGE)),
        (3 * PAGE + 64, 3 * PAGE, (4 * PAGE, 2 * PAGE)),
        (3 * PAGE - 64, 2 * PAGE + 63, (3 * PAGE, PAGE)),
        (3 * PAGE + 64, 2 * PAGE - 64, (4 * PAGE, PAGE)),
        (3 * PAGE + 64, PAGE, None),
        (3 * PAGE, PAGE - 1, None),
        (3 * PAGE, 0, None),
    ):
        huge_pages.collapse(address, size)
        assert moved == ([] if expected is None else [expected]), (address, size)
        moved.clear()


def test_the_weights_of_a_layer(collapsed):
    """Those of experts and of the shared one, wherever they are new."""
    layer = FusedMoE(64, 32, num_experts=4, top_k=2, shared_intermediate_size=32)
    names = ("gate_up_weight", "down_weight", "shared_gate_up_weight", "shared_down_weight")

    def expect(layer: FusedMoE) -> None:
        assert {extent_of(getattr(layer, name)) for name in names} <= set(collapsed)
        assert extent_of(layer.gate_weight) not in collapsed[-4:]
        collapsed.clear()

    expect(layer)
    for change in (
        lambda: layer.to(dtype="bfloat16"),
        layer.prepack_,
        layer.unpack_,
        layer.quantize_,
        layer.prepack_,
    ):
        change()
        expect(layer)
    expect(copy.deepcopy(layer))


def test_a_layer_that_is_initialised_later(collapsed):
    with paddle.LazyGuard():
        layer = FusedMoE(64, 32, num_experts=4, top_k=2, seed=1)
    assert collapsed == []
    for parameter in layer.parameters():
        parameter.initialize()
    assert {extent_of(layer.gate_up_weight), extent_of(layer.down_weight)} <= set(collapsed)


LAYER = """
import paddle
from paddle_moe import FusedMoE
from test_huge_pages import in_huge_pages, note_errors

errors, before = note_errors(), in_huge_pages()
layer = FusedMoE(512, 1024, num_experts=8, top_k=2, seed=3)
moved = in_huge_pages() - before
with paddle.no_grad():
    result = layer(paddle.linspace(-1, 1, 9 * 512).reshape([9, 512])).sum().item()
print(moved, max(errors, default=0), result)
"""


@needs_them
def test_a_layer_with_them_and_without_them():
    """In processes of their own, because Paddle gives memory again that is in huge pages already."""
    weights, results = 4 * 3 * 8 * 512 * 1024, []
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    for choice in ("0", "1"):
        environment = {**os.environ, "PADDLE_MOE_HUGE_PAGES": choice, "PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(
            [sys.executable, "-c", LAYER],
            env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        moved, error, result = done.stdout.split()
        if choice == "0":
            assert int(moved) < weights / 4 or ALWAYS
        else:
            assert int(moved) >= weights / 2 or int(error) in THERE_ARE_NONE_NOW
        results.append(result)
    assert results[0] == results[1]


def test_what_is_none_of_its_business(collapsed):
    paddle_moe.use_huge_pages(None)
    with paddle.LazyGuard():
        lazy = paddle.nn.Linear(4, 4)
    paddle_moe.use_huge_pages(lazy.weight)
    assert collapsed == []
    with pytest.raises(ValueError, match="tensors must be of type paddle.Tensor, got numpy.ndarray"):
        paddle_moe.use_huge_pages(np.zeros(4))


def test_a_reason(monkeypatch):
    monkeypatch.setenv("PADDLE_MOE_HUGE_PAGES", "0")
    assert huge_pages.why_not() == "PADDLE_MOE_HUGE_PAGES=0 is set"
    monkeypatch.setenv("PADDLE_MOE_HUGE_PAGES", "yes")
    with pytest.raises(ValueError, match="PADDLE_MOE_HUGE_PAGES must be 0 or 1, got 'yes'"):
        huge_pages.why_not()


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        (None, 0, "this system has none"),
        ("always madvise [never]", 0, "says never"),
        ("always [madvise] never", 22, "which Linux has since 6.1: Invalid argument"),
        ("always [madvise] never", 0, None),
        ("always [madvise] never", errno.ENOMEM, None),
        ("always [madvise] never", errno.EAGAIN, None),
    ],
)
def test_systems(settings, error, reason, tmp_path, monkeypatch):
    monkeypatch.delenv("PADDLE_MOE_HUGE_PAGES", raising=False)
    monkeypatch.setattr(huge_pages, "_SETTINGS", tmp_path)
    monkeypatch.setattr(huge_pages, "_page_bytes", lambda: PAGE)
    monkeypatch.setattr(huge_pages, "_advise", lambda start, size: error)
    if settings is not None:
        (tmp_path / "enabled").write_text(settings)
    huge_pages._why_not_in_this_system.cache_clear()
    try:
        found = huge_pages.why_not()
    finally:
        huge_pages._why_not_in_this_system.cache_clear()
    assert found is None if reason is None else reason in found
