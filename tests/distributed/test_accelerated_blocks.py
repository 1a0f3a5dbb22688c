"""Blocks of another package over several ranks against the same blocks in plain Paddle on one rank."""

from __future__ import annotations

from functools import partial

import paddle
import pytest
from checkpoint_cases import assert_loaded, make_optimizer
from launcher import WORKERS, launch
from small_blocks import HIDDEN, Block, accelerate, to_checkpoint
from training_cases import autocast, native_operators

from paddle_moe import load_checkpoint

GRID = ("graphs_of_one_shape", "half_precision", "all_to_all", "steps_of_an_optimizer", "recomputed")
GRID += ("checkpointed", "built_under_patch")
FLEET = ("all_to_all", "steps_of_an_optimizer", "checkpointed", "divided_by_fleet")


@pytest.mark.parametrize(
    "ep_size, tp_size, ranks, checks", [(2, 2, 4, GRID), ("fleet", 1, 2, FLEET)], ids=["ep2_tp2", "fleet"]
)
def test_accelerated_blocks(ep_size, tp_size, ranks, checks, tmp_path):
    job = launch(tmp_path, WORKERS / "accelerated_blocks.py", ep_size, tp_size, *checks, ranks=ranks)
    assert job.returncode == 0, job
    for name in checks:
        assert all(f"{name} passed" in log for log in job.logs), job
    saved = {"replicated": to_checkpoint, "alltoall": to_checkpoint}
    if "divided_by_fleet" in checks:
        saved["divided"] = partial(Block, 6, 6, shared=4)
    for name, make in saved.items():
        model = make()
        accelerate(model)
        for parameter in model.parameters():
            parameter.set_value(paddle.zeros_like(parameter))
        optimizer = make_optimizer(model)
        with pytest.warns(UserWarning, match="random generators were left alone"):
            load_checkpoint(tmp_path / name, model, optimizer)
        assert_loaded(model, optimizer, make())


def test_autocast_leaves_the_sums_in_float32():
    """Of Paddle's own operators O2 reaches those of the block's forward alone, which only reshapes here."""
    model = paddle.nn.Sequential(Block(5, 12, shared=9))
    accelerate(model)
    x = paddle.randn([7, HIDDEN])
    expected = model(x)
    with autocast("O2"), native_operators() as seen:
        output = model(x)
    assert seen["O2"] <= {"reshape"} and {"cast", "full_like"} <= seen["O0"], seen
    assert output.dtype == x.dtype and 0 < (output - expected).abs().max() < 0.1
