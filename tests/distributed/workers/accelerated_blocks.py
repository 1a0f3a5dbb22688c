"""One rank with blocks of another package on paddle_moe: accelerated_blocks.py EP_SIZE TP_SIZE CHECK...

With EP_SIZE fleet the EP group is fleet's data-parallel group of all ranks. Every rank also computes all
by itself in plain Paddle and compares. Prints "CHECK passed" after each check.
"""

import copy
import gc
import os
import sys
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import paddle

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from checkpoint_cases import assert_loaded, fill_moments, make_optimizer
from checks import part_of, relative_l2
from paddle.distributed.communication.group import Group
from paddle.distributed.fleet.utils import recompute
from safetensors import safe_open
from small_blocks import HIDDEN, Beside, Block, accelerate, integration, restore, to_checkpoint

from paddle_moe import (
    ClipGradByGlobalNorm,
    ParallelContext,
    average_gradients,
    broadcast_parameters,
    init_distributed,
    load_checkpoint,
    save_checkpoint,
)
from paddle_moe.params import shard_range

FLEET = sys.argv[1] == "fleet"
if FLEET:
    from paddle.distributed import fleet

    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 2, "mp_degree": 1, "pp_degree": 1}
    fleet.init(is_collective=True, strategy=strategy)
    hybrid = fleet.get_hybrid_communicate_group()
    parallel = ParallelContext.from_groups(hybrid.get_data_parallel_group())
else:
    parallel = init_distributed(int(sys.argv[1]), int(sys.argv[2]), timeout_seconds=60)
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def draw(rows: int, seed: int) -> paddle.Tensor:
    values = np.random.default_rng(seed).standard_normal([rows, HIDDEN]).astype("float32")
    return paddle.to_tensor(values, stop_gradient=False)


def slices_of(model) -> dict:
    blocks = [layer for layer in model.sublayers(include_self=True) if hasattr(layer, "mix")]
    return {id(one.parameter): one for block in blocks for one in block.slices()}


def assert_close(actual, expected, tolerance, what):
    actual, expected = actual.astype("float32").numpy(), np.asarray(expected)
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    assert np.isfinite(actual).all(), what
    if expected.any():
        assert relative_l2(actual, expected) < tolerance, (what, relative_l2(actual, expected))


def assert_gradients(model, expected: dict, tolerance: float, *, only=lambda name: True):
    """expected: of the whole parameters, by name."""
    slices, seen = slices_of(model), 0
    for name, parameter in model.named_parameters():
        if parameter.size and only(name):
            one = slices.get(id(parameter))
            value = expected[name] if one is None else part_of(expected[name], one)
            assert_close(parameter.grad, value, tolerance, name)
            seen += 1
    assert seen or parallel.rank > 0


def gradients_of(model) -> dict:
    return {name: one.grad.numpy() for name, one in model.named_parameters() if one.grad is not None}


@check
def graphs_of_one_shape():
    """Also on ranks without experts, without columns, and without a part of the shared expert."""
    for options in (
        dict(num_experts=1, intermediate=6, shared=1),
        dict(num_experts=3, intermediate=1, shared=2),
        dict(num_experts=1, intermediate=1, shared=1, bias=True),
        dict(num_experts=1, intermediate=2, shared=3, stacked=True),
    ):
        for swapped in (False, True):
            pair = [Block(**options), Block(8, 12)]
            stock_pair = [Block(**options), Block(8, 12)]
            if swapped:
                pair, stock_pair = pair[::-1], stock_pair[::-1]
            model, stock = Beside(*pair), Beside(*stock_pair)
            accelerate(model, parallel=parallel)
            for seed in range(2):
                x, x_alone = draw(9, seed), draw(9, seed)
                model.clear_gradients()
                stock.clear_gradients()
                out, expected = model(x), stock(x_alone)
                assert_close(out, expected.numpy(), 1e-5, "out")
                out.square().sum().backward()
                expected.square().sum().backward()
                assert_close(x.grad, x_alone.grad.numpy(), 1e-5, "x")
                assert_gradients(model, gradients_of(stock), 1e-5)
    os.environ["PADDLE_MOE_CHECK"] = "1"
    try:
        model(draw(9, parallel.rank == 1))
    except RuntimeError as error:
        assert "ranks [1] disagree with" in str(error), error
    else:
        raise AssertionError("ranks that route other tokens were not told")
    finally:
        del os.environ["PADDLE_MOE_CHECK"]


@check
def half_precision():
    """Weights in bfloat16, and float32 weights under auto_cast, on ranks with and without experts."""
    for options in (
        dict(num_experts=1, intermediate=6, shared=3),
        dict(num_experts=4, intermediate=6, bias=True),
    ):
        for automatic in (False, True):
            model, stock = Block(**options), Block(**options)
            if not automatic:
                for parameter in stock.parameters():  # the reference computes with the rounded weights
                    parameter.set_value(parameter.astype("bfloat16").astype("float32"))
                model.to(dtype="bfloat16")
            accelerate(model, parallel=parallel)
            x = draw(9, 0) if automatic else draw(9, 0).astype("bfloat16").detach()
            x.stop_gradient = False
            x_alone = x.detach().astype("float32")
            x_alone.stop_gradient = False
            with paddle.amp.auto_cast(enable=automatic, dtype="bfloat16"):
                out = model(x)
            assert out.dtype == x.dtype
            out.astype("float32").square().sum().backward()
            expected = stock(x_alone)
            expected.square().sum().backward()
            assert_close(out, expected.numpy(), 1.5e-2, "out")
            assert_close(x.grad, x_alone.grad.numpy(), 3e-2, "x")
            assert_gradients(model, gradients_of(stock), 5e-2)


@check
def all_to_all():
    """Tokens of each EP rank's own; gradients of experts are those of all tokens, others those of its own."""
    for options in (
        dict(num_experts=5, intermediate=6),
        dict(num_experts=4, intermediate=6, shared=5, bias=True),
        dict(num_experts=1, intermediate=3, shared=1),
        dict(num_experts=4, intermediate=6, shared=3, stacked=True),
    ):
        for counts in ((5, 3), (0, 7), (0, 0)):
            for automatic in (False, True):
                tolerance = 3e-2 if automatic else 1e-5
                model, stock = Block(**options), Block(**options)
                whole = {name: one.numpy() for name, one in model.named_parameters()}
                accelerate(model, parallel=parallel, dispatch="alltoall")
                parts = [draw(count, 10 + rank) for rank, count in enumerate(counts)]
                x = draw(counts[parallel.ep_rank], 10 + parallel.ep_rank)
                with paddle.amp.auto_cast(enable=automatic, dtype="bfloat16"):
                    out = model(x)
                assert out.shape == x.shape and out.dtype == x.dtype
                out.square().sum().backward()
                everyone = paddle.concat(parts)
                if everyone.shape[0]:
                    stock(everyone).square().sum().backward()
                    assert_gradients(model, gradients_of(stock), 2 * tolerance, only=lambda n: "experts" in n)
                own = parts[parallel.ep_rank]
                if own.shape[0]:
                    stock.clear_gradients()
                    expected = stock(own.detach())
                    assert_close(out, expected.numpy(), tolerance, "out")
                    own_alone = own.detach()
                    own_alone.stop_gradient = False
                    stock.clear_gradients()
                    stock(own_alone).square().sum().backward()
                    assert_close(x.grad, own_alone.grad.numpy(), 2 * tolerance, "x")
                    assert_gradients(
                        model, gradients_of(stock), 2 * tolerance, only=lambda n: "experts" not in n
                    )
                restore(model)
                for name, one in model.named_parameters():
                    np.testing.assert_array_equal(one.numpy(), whole[name], err_msg=name)
                    assert not one.is_distributed and not hasattr(one, "shard_group"), name


@check
def steps_of_an_optimizer():
    """Clipped by the norm over all ranks, also of a copy, as in one process with all tokens."""
    for dispatch in ("replicated", "alltoall"):
        model, stock = Block(5, 6, shared=4), Block(5, 6, shared=4)
        accelerate(model, parallel=parallel, dispatch=dispatch)
        if dispatch == "alltoall":
            model = copy.deepcopy(model)
        clip = ClipGradByGlobalNorm(0.1, parallel)
        optimizer = paddle.optimizer.SGD(1.0, model.parameters(), grad_clip=clip)
        clip_alone = paddle.nn.ClipGradByGlobalNorm(0.1)
        alone = paddle.optimizer.SGD(1.0, stock.parameters(), grad_clip=clip_alone)
        for step in range(2):
            everyone = draw(8, step)
            first, end = shard_range(8, parallel.ep_rank, parallel.ep_size)
            x = everyone if dispatch == "replicated" else everyone[first:end]
            model(x).square().sum().scale(1 if dispatch == "replicated" else parallel.ep_size).backward()
            if dispatch == "alltoall":
                average_gradients(model.parameters(), parallel, replicas=("dp", "ep"))
            optimizer.step()
            optimizer.clear_grad()
            stock(everyone).square().sum().backward()
            alone.step()
            alone.clear_grad()
        expected, slices = {name: one.numpy() for name, one in stock.named_parameters()}, slices_of(model)
        for name, one in model.named_parameters():
            if one.size:
                assert_close(one, part_of(expected[name], slices.get(id(one))), 1e-5, (dispatch, name))


@check
def recomputed():
    """The exchange runs again in the backward pass, on all ranks in the same order, also without rows."""
    for dispatch, idle in (("replicated", False), ("alltoall", False), ("alltoall", True)):
        model, gradients = Beside(Block(5, 6, shared=4), Block(4, 6)), []
        for block in (model.few, model.many) if idle else ():  # all tokens go to the first experts
            block.gate.weight.set_value(paddle.zeros_like(block.gate.weight))
        accelerate(model, parallel=parallel, dispatch=dispatch)
        x = draw(9 if dispatch == "replicated" else 5 + parallel.ep_rank, 3)
        for run in (model, *(partial(recompute, model, use_reentrant=value) for value in (True, False))):
            run(x).square().sum().backward()
            own = [one.grad.numpy() for one in model.parameters() if one.grad is not None]
            gradients.append([x.grad.numpy(), *own])
            x.clear_grad()
            model.clear_gradients()
        for plain, *others in zip(*gradients):
            for again in others:
                np.testing.assert_array_equal(plain, again)


@check
def checkpointed():
    """A job with its optimizer: saved by this grid, and loaded by it bit by bit."""
    for dispatch in ("replicated", "alltoall"):
        path = Path(os.environ["PADDLE_LOG_DIR"]) / dispatch
        expected, model = to_checkpoint(), to_checkpoint()
        optimizers = []
        for one in (expected, model):
            accelerate(one, parallel=parallel, dispatch=dispatch)
            optimizers.append(make_optimizer(one))
        fill_moments(expected, optimizers[0])
        save_checkpoint(path, expected, optimizers[0], parallel=parallel)
        for parameter in model.parameters():
            parameter.set_value(paddle.zeros_like(parameter))
        load_checkpoint(path, model, optimizers[1])
        assert_loaded(model, optimizers[1], expected)


@check
def saved_by_replicas():
    """A model that every rank has whole is written once, in turns; `parallel` says who the ranks are."""
    alone = Group(0, 0, [parallel.rank])
    of_two_grids = ParallelContext.from_groups(alone, parallel.tp_group, dp_group=parallel.ep_group)
    for number, ranks in enumerate((parallel, of_two_grids)):
        path = Path(os.environ["PADDLE_LOG_DIR"]) / f"whole_{number}"
        expected, model = (Block(3, 6) for _ in range(2))
        accelerate(expected)
        integration.save_checkpoint(expected, path, layout="paddle", parallel=ranks)
        for parameter in model.parameters():
            parameter.set_value(paddle.zeros_like(parameter))
        accelerate(model)
        integration.load_checkpoint(model, path, layout="paddle", parallel=ranks)
        for name, tensor in expected.state_dict().items():
            assert (tensor == model.state_dict()[name]).all(), name
        keys = []
        for file in path.glob("*.safetensors"):
            with safe_open(file, framework="np") as opened:
                keys.append(list(opened.keys()))
        assert len(keys) == ranks.size("grid") and all(keys), keys
        assert sorted(sum(keys, [])) == sorted(expected.state_dict())


@check
def quantized():
    """With TP, scales of down belong to a rank's rows; without, each owner of an expert makes the same."""

    def output_and_gradient(model):
        x = draw(7, 3)
        output = model(x)
        (output * draw(7, 4)).sum().backward()
        return output.numpy(), x.grad.numpy()

    for stacked, dtype, limit in ((False, "int8", 0.03), (True, "int8", 0.03), (True, "int4", 0.3)):
        model = Beside(Block(5, 12, shared=9, bias=not stacked, stacked=stacked), Block(1, 3))
        single = copy.deepcopy(model)
        exact = output_and_gradient(model)
        accelerate(model, parallel=parallel)
        if not stacked and model.few.held():
            before = weakref.ref(model.few.held()[0][1].down_proj.weight)
        integration.quantize_experts(model, dtype)
        results = output_and_gradient(model)
        integration.quantize_experts(accelerate(single), dtype)
        for result, alone, right in zip(results, output_and_gradient(single), exact):
            error = relative_l2(result, alone)
            assert error < (1e-6 if parallel.tp_size == 1 and not FLEET else limit), error
            assert 1e-4 < relative_l2(result, right) < limit
        gc.collect()
        assert before() is None, "the weights are still in memory"
        flags = [buffer.no_sync for name, buffer in model.named_buffers() if "proj" in name]
        assert flags and all(flags)
    # All ranks refuse what one of them holds.
    model = Block(5, 12)
    accelerate(model, parallel=parallel)
    owner = [number for number, _ in model.held()][:1] == [0]
    if owner:
        with paddle.no_grad():
            model.held()[0][1].down_proj.weight[0, 0] = float("nan")
    try:
        integration.quantize_experts(model)
    except ValueError if owner else RuntimeError as error:
        named = "" if owner else "rank 0 refuses quantize_experts(): ValueError: "
        assert str(error).startswith(f"{named}experts.0.down_proj.weight must be finite"), error
    else:
        raise AssertionError("a weight that is not finite was not refused")
    assert model.frozen is None


@check
def prepacked():
    """The bits of the same shards, and gradients that go through them."""
    for stacked in (False, True):
        model = Beside(Block(5, 12, shared=9, bias=not stacked, stacked=stacked), Block(1, 3))
        accelerate(model, parallel=parallel)
        results = []
        for _ in range(2):
            x = draw(7, 3)
            output = model(x)
            (output * draw(7, 4)).sum().backward()
            results.append((output.numpy(), x.grad.numpy()))
            if len(results) == 1:
                model.clear_gradients()
                integration.prepack_experts(model)
        (expected, expected_gradient), (output, gradient) = results
        assert (output == expected).all()
        assert relative_l2(gradient, expected_gradient) < 1e-6
        flags = [buffer.no_sync for name, buffer in model.named_buffers() if "proj" in name]
        assert flags and all(flags)
    # Quantised ones too: near to what they are without, which adds in another order.
    for stacked in (False, True):
        model = Beside(Block(5, 32, shared=32, bias=not stacked, stacked=stacked), Block(1, 32))
        accelerate(model, parallel=parallel)
        plain = integration.quantize_experts(copy.deepcopy(model), "int4")
        integration.quantize_experts(model, "int4", prepack=True)
        x = draw(7, 3)
        with paddle.no_grad():
            assert relative_l2(model(x).numpy(), plain(x).numpy()) < 1e-5
        flags = [buffer.no_sync for name, buffer in model.named_buffers() if "proj" in name]
        assert flags and all(flags)
    # All ranks refuse what one of them has: 9 columns over two of a TP group are 5 and 4, 15 over the four of
    # the grid are 4, 4, 4 and 3.
    for sizes, what in (
        (dict(intermediate=9), "down_weight"),
        (dict(intermediate=12, shared=15), "shared_down"),
    ):
        model = Block(5, sizes["intermediate"], shared=sizes.get("shared", 0))
        accelerate(model, parallel=parallel)
        model.to(dtype="bfloat16")
        try:
            integration.prepack_experts(model)
        except ValueError as error:
            assert str(error).startswith(what), error
        else:
            raise AssertionError(f"an odd number of columns of {what} was not refused")
        assert model.frozen is None


@check
def built_under_patch():
    """Shards are told from what all ranks hold also before unpatch()."""
    integration.patch(parallel=parallel)
    try:
        model = Block(5, 6, shared=4)
        model.gate.weight.set_value(model.gate.weight + parallel.rank)
        broadcast_parameters(model.parameters(), parallel)
        twin = copy.deepcopy(model)
    finally:
        integration.unpatch()
    stock = Block(5, 6, shared=4)
    expected = {name: one.numpy() for name, one in stock.named_parameters()}
    for model in (model, twin, copy.deepcopy(twin)):
        slices = slices_of(model)
        for name, one in model.named_parameters():
            if one.size:
                value = part_of(expected[name], slices.get(id(one)))
                np.testing.assert_array_equal(one.numpy(), value, err_msg=name)
            assert one.is_distributed == (name != "gate.weight"), name
        restore(model)
        assert not any(one.is_distributed for one in model.parameters())


@check
def divided_by_fleet():
    """Experts that are on this rank only since the block was built, as PaddleNLP does under fleet."""
    here = range(*shard_range(6, parallel.ep_rank, parallel.ep_size))
    model, stock = Block(6, 6, shared=4, here=here), Block(6, 6, shared=4)
    names = [name for name, _ in model.named_parameters()]
    for options in (dict(parallel=parallel), dict(dispatch="alltoall")):
        try:
            accelerate(model, **options)
        except ValueError as error:
            assert "pass dispatch='alltoall' and parallel=ParallelContext.from_groups(group)" in str(error)
        else:
            raise AssertionError(f"{options} was accepted")
    accelerate(model, parallel=parallel, dispatch="alltoall")
    assert [name for name, _ in model.named_parameters()] == names
    path = Path(os.environ["PADDLE_LOG_DIR"]) / "divided"
    optimizer, other = make_optimizer(model), Block(6, 6, shared=4, here=here)
    fill_moments(model, optimizer)
    save_checkpoint(path, model, optimizer)
    accelerate(other, parallel=parallel, dispatch="alltoall")
    for parameter in other.parameters():
        parameter.set_value(paddle.zeros_like(parameter))
    optimizer = make_optimizer(other)
    load_checkpoint(path, other, optimizer)
    assert_loaded(other, optimizer, model)
    parts = [draw(count, 20 + count) for count in (4, 7)]
    x = parts[parallel.ep_rank]
    out = model(x)
    assert_close(out, stock(x.detach()).numpy(), 1e-5, "out")
    out.square().sum().backward()
    stock(paddle.concat([part.detach() for part in parts])).square().sum().backward()
    assert_gradients(model, gradients_of(stock), 1e-5, only=lambda name: "experts" in name)
    restore(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert not any(one.is_distributed for one in model.parameters())


for name in sys.argv[3:]:
    CHECKS[name]()
    print(f"{name} passed", flush=True)
parallel.shutdown()
