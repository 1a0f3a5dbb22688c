"""Checkpoints of layers whose experts are quantised: bit by bit, on grids that slice them in the same way."""

from __future__ import annotations

import pytest
from checkpoint_cases import Model
from checks import assert_same_bits
from layer_cases import HIDDEN, INTER, SHARED, TOP_K, Shard
from quantized_cases import GRANULARITIES, KINDS, per_kind, quantised_model

from paddle_moe import CheckpointError, FusedMoE, load_checkpoint, save_checkpoint
from paddle_moe.params import LayerShard
from paddle_moe.quantization import quantised_parts


@per_kind
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_bit_comes_back(kind, granularity, tmp_path):
    model, other = quantised_model(kind, granularity, seed=3), quantised_model(kind, granularity)
    save_checkpoint(tmp_path, model)
    load_checkpoint(tmp_path, other)
    state = other.state_dict()
    assert sum(name.endswith("_scale") for name in state) == 8
    for name, value in model.state_dict().items():
        assert_same_bits(state[name].numpy(), value.numpy())


@pytest.mark.parametrize(
    "saved, loaded, key, found",
    [
        (("int8", "channel"), ("int8", "tensor"), "first.down_scale", "the shape"),
        (("int8", "channel"), ("float8_e4m3fn", "channel"), "first.down_weight", "uint8"),
        (("int4", "group"), None, "first.down_weight", "the shape"),
        (None, ("int8", "channel"), "first.gate_up_scale", "all of E"),
    ],
)
def test_another_quantisation_is_an_error(saved, loaded, key, found, tmp_path):
    save_checkpoint(tmp_path, Model(seed=3) if saved is None else quantised_model(*saved, seed=3))
    model = Model() if loaded is None else quantised_model(*loaded)
    before = {name: value.numpy() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path, model)
    assert found in {problem.key: problem.expected for problem in caught.value.problems}[key]
    for name, value in model.state_dict().items():
        assert_same_bits(value.numpy(), before[name])


def test_other_slices_of_a_shared_expert_are_an_error(tmp_path):
    """With replicated tokens all ranks of the grid slice it, so that EP ranks cannot be more either."""
    save_checkpoint(tmp_path, quantised_model("int8", seed=3))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path, quantised_model("int8", parallel=Shard(0, 2, 0, 1)))
    keys = {problem.key for problem in caught.value.problems}
    assert keys == {f"{name}.shared_{what}" for name in ("first", "second.0")
                    for what in ("gate_up_weight", "gate_up_scale", "down_weight", "down_scale")}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shared_over_grid", [False, True])
@pytest.mark.parametrize("ep_size, tp_size", [(1, 1), (7, 1), (1, 3), (2, 3)])
def test_parts_of_all_ranks_have_every_place_once(kind, granularity, shared_over_grid, ep_size, tp_size):
    """In the shapes that quantize_() gives, which rows and columns of no other rank share."""
    dispatch = "replicated" if shared_over_grid else "alltoall"
    held: dict[str, list] = {}
    for ep_rank in range(ep_size):
        for tp_rank in range(tp_size):
            shard = LayerShard(
                HIDDEN, INTER, 3, SHARED, shared_over_grid, True, ep_rank, ep_size, tp_rank, tp_size
            )
            layer = FusedMoE(
                HIDDEN, INTER, 3, TOP_K, shared_intermediate_size=SHARED, dispatch=dispatch, seed=None,
                parallel=Shard(ep_rank, ep_size, tp_rank, tp_size),
            ).quantize_(kind, granularity)  # fmt: skip
            parts, wholes = quantised_parts(shard, kind, granularity)
            for name, part in parts.items():
                assert part.shape == getattr(layer, name).shape, name
                if part.size and not part.copy:
                    held.setdefault(name, []).append((part, wholes[name]))
    for name, boxes in held.items():
        whole = boxes[0][1]
        assert all(other == whole for _, other in boxes)
        for dim in ("R", "C"):
            # Each slice has a range of its own; those of another expert repeat it.
            spans = sorted({part.ranges[dim] for part, _ in boxes})
            assert [start for start, _ in spans] == [0] + [stop for _, stop in spans[:-1]]
            assert spans[-1][1] == whole.ranges[dim][1]
        for index, (part, _) in enumerate(boxes):
            assert not any(part.overlap(other) for other, _ in boxes[index + 1 :])
