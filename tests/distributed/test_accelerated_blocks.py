"""Blocks of another package over several ranks against the same blocks in plain Paddle on one rank."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import numpy as np
import paddle
import pytest
from checkpoint_cases import assert_loaded, make_optimizer
from checks import assert_same_bits, relative_l2
from launcher import WORKERS, launch
from layer_cases import Shard
from small_blocks import HIDDEN, Beside, Block, accelerate, draw_tokens, integration, restore, to_checkpoint
from training_cases import autocast, native_operators

from paddle_moe import checkpoint, load_checkpoint, save_checkpoint
from paddle_moe.integrations.blocks import MoEBlock

GRID = ("graphs_of_one_shape", "half_precision", "all_to_all", "steps_of_an_optimizer", "recomputed")
GRID += ("checkpointed", "saved_by_replicas", "built_under_patch", "quantized", "prepacked")
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


KINDS = {"int8": (paddle.int8, 0.02), "int4": (paddle.int32, 0.3), "float8_e4m3fn": (paddle.uint8, 0.08)}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_experts(kind, stacked, tmp_path):
    dtype, limit = KINDS[kind]
    model = paddle.nn.Sequential(Block(5, 12, shared=9, bias=not stacked, stacked=stacked))
    x = draw_tokens(7, model[0])
    exact = model(x).numpy()
    kept = {name for name in model.state_dict() if "gate.weight" in name or "bias" in name}
    assert integration.quantize_experts(accelerate(model), kind) is model
    with paddle.no_grad():
        output = model(x).numpy()
        assert 1e-4 < relative_l2(output, exact) < limit
        twin = copy.deepcopy(model)
        assert_same_bits(twin(x).numpy(), output)

        state = model.state_dict()
        assert {name for name, _ in model.named_parameters()} == kept
        numbers = [value for value in state.values() if value.dtype == dtype]
        assert len(numbers) == (2 + 3 if stacked else 6 * 3) and len(state) == 2 * len(numbers) + len(kept)
        paddle.save(state, str(tmp_path / "state"))
        other = paddle.nn.Sequential(Block(5, 12, shared=9, bias=not stacked, stacked=stacked))
        for parameter in other.parameters():
            parameter.set_value(paddle.zeros_like(parameter))
        integration.quantize_experts(accelerate(other), kind)
        missing, unexpected = other.set_state_dict(paddle.load(str(tmp_path / "state")))
        assert not missing and not unexpected
        assert_same_bits(other(x).numpy(), output)

        twin.to(dtype="bfloat16")
        assert sum(value.dtype == dtype for value in twin.state_dict().values()) == len(numbers)
        half = twin(x.astype("bfloat16"))
        assert half.dtype == paddle.bfloat16
        assert relative_l2(half.astype("float32").numpy(), output) < 0.03


@pytest.mark.parametrize("change", [None, integration.quantize_experts, integration.prepack_experts])
def test_pickled_blocks(change):
    model = accelerate(paddle.nn.Sequential(Block(5, 12, shared=10)))
    if change is not None:
        change(model)
    twin, x = pickle.loads(pickle.dumps(model)), draw_tokens(7, model[0])
    assert type(twin[0]) is type(model[0])
    assert_same_bits(twin(x).numpy(), model(x).numpy())


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_experts_that_are_prepacked(kind, stacked):
    model = paddle.nn.Sequential(Block(5, 16, shared=24, bias=not stacked, stacked=stacked))
    x = draw_tokens(7, model[0])
    plain = integration.quantize_experts(accelerate(copy.deepcopy(model)), kind)
    assert integration.quantize_experts(accelerate(model), kind, prepack=True) is model
    with paddle.no_grad():
        expected, output = plain(x).numpy(), model(x).numpy()
        assert relative_l2(output, expected) < 1e-6
        assert_same_bits(copy.deepcopy(model)(x).numpy(), output)
        half = copy.deepcopy(model)
        half.to(dtype="bfloat16")
        assert relative_l2(half(x.astype("bfloat16")).astype("float32").numpy(), expected) < 0.03
    x.stop_gradient = False
    gradients = []
    for one in (plain, model):
        one(x).sum().backward()
        gradients.append(x.grad.numpy())
        x.clear_grad()
    assert relative_l2(*gradients[::-1]) < 1e-5
    scales = [value for name, value in model.named_buffers() if name.endswith("scale")]
    assert scales and all(scale.is_contiguous() for scale in scales)
    with pytest.raises(RuntimeError, match=f"are {kind} since quantize_experts.*anew .*prepack=True"):
        integration.prepack_experts(model)
    odd = accelerate(paddle.nn.Sequential(Block(5, 11)))
    with pytest.raises(ValueError, match="down_weight of a rank must have .* got 11"):
        integration.quantize_experts(odd, kind, prepack=True)
    assert odd[0].frozen is None
    with pytest.raises(ValueError, match="prepack must be True or False, got 1"):
        integration.quantize_experts(odd, kind, prepack=1)


@pytest.mark.parametrize("stacked", [False, True])
def test_prepacked_experts(stacked, tmp_path):
    model = paddle.nn.Sequential(Block(5, 12, shared=9, bias=not stacked, stacked=stacked))
    x = draw_tokens(7, model[0])
    with paddle.no_grad():
        exact = accelerate(model)(x).numpy()
        kept = {name for name in model.state_dict() if "gate.weight" in name or "bias" in name}
        assert integration.prepack_experts(model) is model
        assert_same_bits(model(x).numpy(), exact)
        twin = copy.deepcopy(model)
        assert_same_bits(twin(x).numpy(), exact)
        assert {name for name, _ in model.named_parameters()} == kept
        paddle.save(model.state_dict(), str(tmp_path / "state"))
        other = paddle.nn.Sequential(Block(5, 12, shared=9, bias=not stacked, stacked=stacked))
        for parameter in other.parameters():
            parameter.set_value(paddle.zeros_like(parameter))
        integration.prepack_experts(accelerate(other))
        missing, unexpected = other.set_state_dict(paddle.load(str(tmp_path / "state")))
        assert not missing and not unexpected
        assert_same_bits(other(x).numpy(), exact)
    with (
        autocast("O1", "bfloat16"),
        pytest.raises(ValueError, match="prepacked in float32 since prepack_exp"),
    ):
        model(x)
    half = paddle.nn.Sequential(Block(5, 12, shared=8, bias=not stacked, stacked=stacked))
    same = integration.prepack_experts(accelerate(copy.deepcopy(half)))
    for one in (half, same):
        one.to(dtype="bfloat16")
    integration.prepack_experts(accelerate(half))
    with paddle.no_grad():
        assert_same_bits(
            *(one(x.astype("bfloat16")).astype("float32").numpy() for one in (half, same)),
        )
    for refused in (
        lambda: integration.prepack_experts(model),
        lambda: integration.quantize_experts(model),
        lambda: restore(model),
        lambda: save_checkpoint(tmp_path, model),
        lambda: integration.save_checkpoint(model, tmp_path),
    ):
        with pytest.raises(
            RuntimeError, match="the experts of this Block are prepacked since prepack_expert"
        ):
            refused()


@pytest.mark.parametrize("stacked", [False, True])
def test_experts_that_cannot_be_prepacked_are_left_alone(stacked):
    """The 9 columns of the shared expert are odd."""
    model = paddle.nn.Sequential(Block(2, 4), Block(5, 12, shared=9, stacked=stacked))
    accelerate(model)
    model.to(dtype="bfloat16")
    before = {name: id(value) for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="shared_down_weight of a rank must have an even number .* got 9"):
        integration.prepack_experts(model)
    assert {name: id(value) for name, value in model.state_dict().items()} == before
    with pytest.raises(ValueError, match=r"model must be what accelerate\(\) returned, got Linear"):
        integration.prepack_experts(paddle.nn.Linear(2, 2))


@pytest.mark.parametrize("stacked", [False, True])
def test_quantized_experts_compute_in_their_own_dtype(stacked):
    """As before: of experts in bfloat16 in a model in float32."""
    model = Block(5, 12, shared=9, bias=not stacked, stacked=stacked)
    model.experts.to(dtype="bfloat16")
    model.shared.to(dtype="bfloat16")
    x = paddle.randn([7, HIDDEN])
    with paddle.no_grad():
        exact = accelerate(model)(x)
        output = integration.quantize_experts(model)(x)
    assert output.dtype == exact.dtype == paddle.float32
    np.testing.assert_array_equal(output.numpy(), output.astype("bfloat16").astype("float32").numpy())
    assert relative_l2(output.numpy(), exact.numpy()) < 0.03


def test_sizes_of_a_grid_that_are_no_integers():
    model = Block(2, 4)
    for sizes, message in ((("2",), "ep_size must be an integer, got '2'"), ((1, 0), "tp_size must be at")):
        with pytest.raises(ValueError, match=message):
            accelerate(model, *sizes)
    assert type(model) is Block


def test_blocks_that_compute_something_else_are_left_alone():
    class Other(Block):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="model must have a mixture-of-experts block that integrations"):
        accelerate(Other(2, 4))
    for _ in range(2):
        integration.patch()
        try:
            built = [Block(2, 4), Other(2, 4)]
        finally:
            integration.unpatch()
        assert [isinstance(one, MoEBlock) for one in built] == [True, False]
    assert type(Block(2, 4)) is Block


@pytest.mark.parametrize("kind", ["beta1_pow_acc", "as_others_may_call_it"])
def test_single_values_of_an_optimizer_are_whole(kind):
    """Also those of a shard that is a single value itself: one of the four columns of the shared expert."""
    model = accelerate(Block(5, 6, shared=4, bias=True), parallel=Shard(0, 2, 0, 2))
    optimizer = paddle.optimizer.AdamW(parameters=model.parameters())
    optimizer._beta1_pow_acc_str = kind
    kept = checkpoint._optimizer_holdings([optimizer], checkpoint._holdings(model), 0)
    found = {name: kept[f"shared.up_proj.bias.{name}"] for name in ("moment1", kind)}
    assert [one.part.shape for one in found.values()] == [[1], [1]]
    assert [one.whole.shape for one in found.values()] == [[4], [1]]


def test_hooks_of_a_copy_are_its_own():
    model = integration.quantize_experts(accelerate(Block(2, 4)))
    twin = copy.deepcopy(model)
    twin.experts[0].down_proj.register_forward_pre_hook(lambda layer, arguments: None)
    assert not model.experts[0].down_proj._forward_pre_hooks


def test_an_expert_of_two_blocks():
    model = Beside(Block(2, 4), Block(2, 4))
    model.many.experts = model.few.experts
    x = paddle.randn([7, HIDDEN])
    exact = model(x).numpy()
    integration.quantize_experts(accelerate(model))
    with paddle.no_grad():
        assert 1e-4 < relative_l2(model(x).numpy(), exact) < 0.03


def test_quantized_experts_say_what_they_cannot_do(tmp_path):
    model = paddle.nn.Sequential(Block(5, 12, shared=9))
    with pytest.raises(ValueError, match=r"model must be what accelerate\(\) returned, got Sequential"):
        integration.quantize_experts(model)
    accelerate(model)
    with pytest.raises(ValueError, match="granularity must be"):
        integration.quantize_experts(model, "int8", "row")
    integration.quantize_experts(model)
    for refused in (
        lambda: integration.quantize_experts(model),
        lambda: restore(model),
        lambda: save_checkpoint(tmp_path, model),
        lambda: integration.save_checkpoint(model, tmp_path),
    ):
        with pytest.raises(RuntimeError, match="the experts of this Block are int8 since quantize_experts"):
            refused()


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("1.experts.3.down_proj.weight", "1.experts.3.down_proj.weight"),
        ("1.experts.down_proj", r"1.experts.down_proj\[2\]"),
        ("1.shared.up_proj.weight", "1.shared.up_proj.weight"),
    ],
)
def test_experts_that_cannot_be_quantized_are_left_alone(stored, name):
    stacked = stored == "1.experts.down_proj"
    model = paddle.nn.Sequential(Block(2, 4), Block(5, 12, shared=9, stacked=stacked))
    accelerate(model)
    with paddle.no_grad():
        model.state_dict()[stored][(2, 1, 0) if stacked else (2, 1)] = float("nan")
    before = {name: value.numpy() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"^{name} must be finite, got infinity or NaN in it"):
        integration.quantize_experts(model)
    after = model.state_dict()
    assert set(after) == set(before)
    for name, value in after.items():
        np.testing.assert_array_equal(value.numpy(), before[name])


@pytest.mark.parametrize("form", ["stacked", "one_layer"])
def test_blocks_of_scales_hold_columns_of_gate_or_of_up(form):
    """I = 200: blocks that go over both would be as many, and meet the wrong scales."""

    class GateAndUp(paddle.nn.Layer):
        def __init__(self, expert):
            super().__init__()
            self.up_gate_proj = paddle.nn.Linear(HIDDEN, 400, bias_attr=False)
            halves = [expert.gate_proj.weight, expert.up_proj.weight]
            self.up_gate_proj.weight.set_value(paddle.concat(halves, axis=1))
            self.down_proj, self.act_fn = expert.down_proj, expert.act_fn

    model, x = Block(3, 200, stacked=form == "stacked"), paddle.randn([20, HIDDEN])
    if form == "one_layer":
        model.experts = paddle.nn.LayerList([GateAndUp(expert) for expert in model.experts])
    accelerate(model)
    with paddle.no_grad():
        weights = [model.experts.gate_up_proj] if form == "stacked" else model.weights().gate_up
        for weight in weights:  # so that the next scale does not do for them
            weight.set_value(
                weight * paddle.concat([paddle.ones([200]), paddle.full([56], 50), paddle.ones([144])])
            )
        exact = model(x).numpy()
        integration.quantize_experts(model, "int8", "block")
        assert relative_l2(model(x).numpy(), exact) < 0.03
