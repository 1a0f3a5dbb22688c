"""One rank that trains FusedMoE in many ways: training.py EP_SIZE TP_SIZE DP_SIZE CHECK...

Every rank also trains the whole layer by itself and compares. Prints "CHECK passed" after each check.
"""

import copy
import functools
import itertools
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import paddle

sys.path.insert(0, str(Path(__file__).parents[2]))
from layer_cases import EXPERTS, HIDDEN, INTER, TOP_K, tokens
from training_cases import (
    SEQUENCES,
    Block,
    Model,
    as_float32,
    assert_close,
    assert_same_gradients,
    assert_same_model,
    autocast,
    batch,
    loss_of,
    make_layer,
    shard_like,
    train,
)

from paddle_moe import (
    ClipGradByGlobalNorm,
    FusedMoE,
    ParallelContext,
    agree_on_overflow,
    average_gradients,
    broadcast_parameters,
    check_optimizer,
    clip_gradients,
    init_distributed,
    load_balancing_loss,
    rank_grid,
)

ep_size, tp_size, dp_size = map(int, sys.argv[1:4])
parallel = init_distributed(ep_size, tp_size, dp_size, timeout_seconds=60)
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def trained_tokens(*arguments, **options):
    return paddle.to_tensor(tokens(*arguments, **options), stop_gradient=False)


def both(**options):
    return make_layer(parallel, **options), make_layer(**options)


@check
def gradients():
    """Every way to reduce; then biases, the shared expert and its gate one by one."""
    for reduce, fp32_reduce in itertools.product(("two", "one"), (False, True)):
        layer = make_layer(parallel, reduce=reduce, fp32_reduce=fp32_reduce)
        assert_same_gradients(layer, make_layer(), trained_tokens())
    for parts in ({}, dict(bias=True), dict(shared=True), dict(shared=True, shared_gate=True)):
        assert_same_gradients(*both(parts=parts), trained_tokens())


@check
def losses():
    options = dict(balance_loss_weight=0.5, z_loss_weight=0.1, return_aux_loss=True)
    called = dict(return_aux_loss=options.pop("return_aux_loss"))
    for kind in ("batch", "global"):
        assert_same_gradients(*both(balance_loss=kind, **options), trained_tokens(), **called)
    layers = both(balance_loss="sequence", **options)
    calls = [lambda x, layer=layer: layer(x.reshape([3, 4, HIDDEN]), **called) for layer in layers]
    assert_same_gradients(*layers, trained_tokens(num_tokens=12), call=calls[0], dense_call=calls[1])
    for policy in ("probability", "position"):
        layers = both(capacity_factor=0.8, drop_policy=policy, **options)
        assert_same_gradients(*layers, trained_tokens(), **called)


@check
def faults():
    # Fewer experts than ranks, then fewer columns of the shared expert too: these ranks add nothing.
    assert_same_gradients(*both(num_experts=3), trained_tokens())
    assert_same_gradients(*both(num_experts=2, parts={}), trained_tokens())
    # All tokens on one expert; no token on any expert; no token at all.
    ones = paddle.ones([len(tokens()), 1])
    for expert in (0, EXPERTS - 1, -1):
        table = paddle.full([len(tokens()), 1], expert, "int32")
        for fixed in (False, True):
            weights = ones.clone()
            weights.stop_gradient = fixed
            inputs = dict(routing_table=table, router_weights=weights)
            assert_same_gradients(*both(), trained_tokens(), **inputs)
    assert_same_gradients(*both(), trained_tokens(num_tokens=0))


@check
def stop_gradient():
    """Any subset, the same on every rank; also where a rank holds no experts."""
    names = ("hidden_states", "gate_weight", "gate_up_weight", "down_bias")
    for num_experts, *fixed in itertools.product((2, EXPERTS), *[(False, True)] * 4):
        layers = both(num_experts=num_experts, parts=dict(bias=True))
        x = trained_tokens()
        for name, stops in zip(names, fixed):
            for holder in layers:
                tensor = x if name == "hidden_states" else getattr(holder, name)
                if tensor is not None:
                    tensor.stop_gradient = stops
        assert_same_gradients(*layers, x)
    layers = both()
    for layer in layers:
        for parameter in layer.parameters():
            parameter.stop_gradient = True
    assert_same_gradients(*layers, trained_tokens())


@check
def branches():
    """Layers side by side, with experts on other ranks each: the order of the backward is the same anyway."""
    sizes = (3, EXPERTS, 2, 4)
    pairs = [both(num_experts=size, parts={"shared": size == 3}, seed=size) for size in sizes]
    for x in (trained_tokens(), trained_tokens(num_tokens=3)):
        for layer, dense in pairs:
            others = [pair for pair in pairs if pair[0] is not layer]
            assert_same_gradients(
                layer,
                dense,
                x,
                call=lambda x, layer=layer, others=others: sum((one(x) for one, _ in others), layer(x)),
                dense_call=lambda x, dense=dense, others=others: sum((one(x) for _, one in others), dense(x)),
            )


@check
def shared_weights():
    """One layer used twice, and its weights in a second layer."""
    layer, dense = both()
    assert_same_gradients(
        layer, dense, trained_tokens(), call=lambda x: layer(layer(x)), dense_call=lambda x: dense(dense(x))
    )
    twins = both()
    for twin, original in zip(twins, (layer, dense)):
        twin.gate_up_weight, twin.down_weight = original.gate_up_weight, original.down_weight
    assert_same_gradients(
        layer,
        dense,
        trained_tokens(),
        call=lambda x: twins[0](layer(x)),
        dense_call=lambda x: twins[1](dense(x)),
    )


@check
def dropped_all_reduces():
    """Each all-reduce of a step, left out on all ranks: the comparison notices."""
    for reduce in ("two", "one"):
        layer, dense = make_layer(parallel, reduce=reduce), make_layer()
        all_reduce, seen, left_out, in_fp32 = parallel.all_reduce, [], None, []

        def faulty(tensor, group, *arguments, **options):
            seen.append(group)
            in_fp32.append(options["fp32"])
            drop = len(seen) - 1 == left_out
            return tensor if drop else all_reduce(tensor, group, *arguments, **options)

        parallel.all_reduce = faulty
        try:
            assert_same_gradients(layer, dense, trained_tokens())
            # The output, then the gradients of hidden_states, router_weights and the shared gate.
            groups = ["ep", "tp"] if reduce == "two" else ["grid"]
            assert seen == groups * 4, seen
            assert not any(in_fp32)
            in_fp32.clear()
            wide = make_layer(parallel, reduce=reduce, fp32_reduce=True)
            assert_same_gradients(wide, dense, trained_tokens())
            # The output is in float32 already.
            assert in_fp32 == [False] * len(groups) + [True] * len(groups * 3), in_fp32
            del seen[len(groups) * 4 :]
            for left_out in [index for index, group in enumerate(seen) if sizes()[group] > 1]:
                seen.clear()
                try:
                    assert_same_gradients(layer, dense, trained_tokens())
                except AssertionError:
                    continue
                raise RuntimeError(f"nobody noticed that all-reduce {left_out} was left out")
        finally:
            parallel.all_reduce = all_reduce


def sizes():
    return {"ep": ep_size, "tp": tp_size, "grid": ep_size * tp_size}


@check
def recompute():
    from paddle.distributed.fleet.utils import recompute

    cases = (
        dict(balance_loss_weight=0.5),
        dict(num_experts=2, parts=dict(correction=True)),  # a rank without experts has nothing to compute
    )
    for reentrant, options in itertools.product((True, False), cases):
        layer, dense = both(bias_update_speed=1e-3, **options)
        called = dict(return_aux_loss="balance_loss_weight" in options)

        def run(x, layer=layer, reentrant=reentrant, called=called):
            return recompute(layer, x, use_reentrant=reentrant, **called)

        assert_same_gradients(
            layer, dense, trained_tokens(), call=run, dense_call=lambda x: dense(x, **called)
        )
        # Without reentry both forwards record gradients and count; the bias moves the same way.
        assert layer.expert_counts.tolist() == ((2 - reentrant) * dense.expert_counts).tolist()
        layer.update_correction_bias()
        dense.update_correction_bias()
        np.testing.assert_array_equal(layer.correction_bias.numpy(), dense.correction_bias.numpy())


@check
def to_static():
    """Runs what it can, and says what it cannot."""
    for dispatch in ("replicated", "alltoall"):
        layer, dense = make_layer(parallel, dispatch=dispatch, jitter_epsilon=0.3), make_layer()
        try:
            paddle.jit.to_static(layer, full_graph=True)(trained_tokens())
        except NotImplementedError as error:
            assert "spread over ranks need dynamic mode" in str(error), error
        else:
            raise AssertionError("a program of what several ranks exchange was built")
        layer = make_layer(parallel, dispatch=dispatch)
        static = paddle.jit.to_static(layer, full_graph=False)
        assert_close(static(trained_tokens()).numpy(), dense(trained_tokens()).numpy(), 2e-6, dispatch)


@check
def jitter():
    """The noise is that of the first rank, also where the generators differ; recompute repeats it."""
    from paddle.distributed.fleet.utils import recompute

    layer, dense = both(jitter_epsilon=0.3, parts={})
    paddle.seed(parallel.rank)
    x = trained_tokens(num_tokens=50)
    _, ids, weights = layer(x, return_routing=True)
    parallel.check_same_routing(ids, weights)
    paddle.seed(0)
    _, first_ids, first_weights = dense(x, return_routing=True)
    assert (ids == first_ids).all() and (weights == first_weights).all()
    layer.eval()
    assert (weights != layer(x, return_routing=True)[2]).any()
    layer.train()

    def seeded(call):
        def run(x):
            paddle.seed(0)
            return call(x)

        return run

    assert_same_gradients(
        layer, dense, x, call=seeded(lambda x: recompute(layer, x)), dense_call=seeded(dense)
    )


@check
def amax():
    for num_experts in (2, EXPERTS):
        layer, dense = both(num_experts=num_experts)
        x = paddle.to_tensor(tokens())
        (_, ours), (_, whole) = layer(x, return_amax=True), dense(x, return_amax=True)
        assert ours.shape == [num_experts] and whole.numpy().any()
        np.testing.assert_allclose(ours.numpy(), whole.numpy(), rtol=1e-6)


@check
def flags():
    gates = ("gate_weight", "gate_bias")
    for dispatch in ("replicated", "alltoall"):
        for name, parameter in make_layer(parallel, dispatch=dispatch).named_parameters():
            assert getattr(parameter, "is_gate", False) == (name in gates)
            # Of an all-to-all each EP rank has the shared expert, cut by TP alone.
            by_tp = dispatch == "alltoall" and name.startswith("shared_")
            shards = tp_size if by_tp else ep_size * tp_size
            sharded = name not in (*gates, "shared_gate_weight") and shards > 1
            assert parameter.is_distributed == getattr(parameter, "no_sync", False) == sharded, name
            group = getattr(parameter, "shard_group", None)
            assert group == (("tp" if by_tp else "grid") if sharded else None), name
            expert = sharded and not by_tp
            assert getattr(parameter, "expert", False) == expert, name
            assert not expert or parameter.color == {"color": "moe_expert", "group": parallel.dp_group}


@check
def optimizer_steps():
    """Twenty steps of AdamW with clipping, every loss and bias updates."""
    model, dense = Model(parallel), Model()
    losses = train(model, 20, parallel)
    expected = train(dense, 20)
    totals = parallel.all_reduce(paddle.to_tensor(losses), "dp").numpy() / dp_size
    np.testing.assert_allclose(totals, expected, rtol=1e-5)
    assert expected[-1] < 0.9 * expected[0]
    assert_same_model(model, dense)


@check
def all_to_all_output():
    """Every EP rank passes another number of tokens, some none: what the whole layer gives for them."""
    everyone = tokens(num_tokens=3 * ep_size)
    for dtype, num_experts in itertools.product(("float32", "bfloat16"), (2, EXPERTS)):
        options = dict(num_experts=num_experts, dtype=dtype)
        layer, dense = make_layer(parallel, dispatch="alltoall", **options), make_layer(**options)
        ends = np.cumsum([0, *[6 * (rank % 2) for rank in range(ep_size)]]).tolist()
        mine = everyone[ends[parallel.ep_rank] : ends[parallel.ep_rank + 1]]
        output, amax = layer(paddle.to_tensor(mine).astype(dtype), return_amax=True)
        expected = dense(paddle.to_tensor(mine).astype(dtype))
        assert_close(as_float32(output), as_float32(expected), 1e-6 if dtype == "float32" else 5e-3, dtype)
        whole = dense(paddle.to_tensor(everyone[: ends[-1]]).astype(dtype), return_amax=True)[1]
        np.testing.assert_allclose(amax.numpy(), whole.numpy(), rtol=1e-5)


@check
def default_dtype():
    """Models are built and run while the default dtype is that of their weights."""
    paddle.set_default_dtype("bfloat16")
    try:
        for dispatch in ("replicated", "alltoall"):
            layer = FusedMoE(HIDDEN, INTER, EXPERTS, TOP_K, parallel=parallel, dispatch=dispatch)
            x = trained_tokens().astype("bfloat16")
            output, amax = layer(x, return_amax=True)
            output.sum().backward()
            norm = clip_gradients(layer.parameters(), 1.0, parallel)
            assert output.dtype == paddle.bfloat16 and amax.dtype == norm.dtype == paddle.float32
            assert amax.shape == [EXPERTS] and np.isfinite(float(norm))
    finally:
        paddle.set_default_dtype("float32")


@check
def all_to_all_steps():
    """Twenty steps of AdamW with clipping, every loss and bias updates, each EP rank with its own tokens."""
    replicas = ("dp", "ep")
    model, dense = Model(parallel, dispatch="alltoall"), Model()
    losses = train(model, 20, parallel, replicas=replicas)
    expected = train(dense, 20)
    totals = paddle.to_tensor(losses)
    for group in replicas:
        totals = parallel.all_reduce(totals, group)
    np.testing.assert_allclose(totals.numpy() / (dp_size * ep_size), expected, rtol=1e-5)
    assert_same_model(model, dense)


@check
def all_to_all_stop_gradient():
    """Any subset without a gradient, also where that leaves a rank without experts nothing to compute."""
    for num_experts, *fixed in itertools.product((ep_size - 1, EXPERTS), *[(False, True)] * 3):
        layers = (
            make_layer(parallel, dispatch="alltoall", num_experts=num_experts),
            make_layer(num_experts=num_experts),
        )
        found = []
        for layer in layers:
            x = trained_tokens()
            tensors = [x, layer.gate_weight, layer.gate_up_weight]
            for tensor, stops in zip(tensors, fixed):
                tensor.stop_gradient = stops
            (layer(x) ** 2).sum().backward()
            if layer.parallel is not None:  # the experts saw the same tokens from each EP rank
                average_gradients(layer.parameters(), parallel, replicas=("dp", "ep"))
            grads = {name: p.grad for name, p in [("hidden_states", x), *layer.named_parameters()]}
            zeros = {name: np.zeros(p.shape, np.float32) for name, p in layer.named_parameters()}
            found.append((zeros, {name: as_float32(g) for name, g in grads.items() if g is not None}))
        (_, mine), (zeros, whole) = found
        expected = {**shard_like(layers[0], {**zeros, **whole}), "hidden_states": whole.get("hidden_states")}
        for name in {*mine, *whole}:
            if name in mine and mine[name].size:
                assert_close(mine[name], expected[name], 2e-6, f"{name} {fixed}")
            else:  # only what this rank holds nothing of may have no gradient
                assert expected[name].size == 0, f"{name} {fixed}"


@check
def all_to_all_training():
    """Each EP rank trains on its own tokens, one of them on none: micro-batches, recompute, policies."""
    from paddle.distributed.fleet.utils import recompute

    replica, replicas = parallel.dp_rank * ep_size + parallel.ep_rank, dp_size * ep_size
    sizes = [0, 5, 3, 4][:replicas]
    ends = np.cumsum([0, *sizes])
    batches = [np.split(tokens(num_tokens=ends[-1], seed=seed), ends[1:-1]) for seed in (1, 2)]
    factors = np.random.default_rng(7).standard_normal(HIDDEN).astype(np.float32)

    def backward(layer, part, seed, reentrant):
        """Of both micro-batches; (outputs, gradients of the hidden states)"""
        paddle.seed(seed)
        found = []
        for parts in batches:
            x = paddle.to_tensor(parts[part], stop_gradient=False)
            options = {} if reentrant is None else dict(use_reentrant=reentrant)
            call = layer if reentrant is None else functools.partial(recompute, layer)
            output, loss = call(x, return_aux_loss=True, **options)
            ((output * paddle.to_tensor(factors)).sum() + loss).backward()
            found += [output.numpy(), x.grad.numpy()]
        return found

    policies = (
        {},
        dict(capacity_factor=0.7, drop_policy="position"),
        dict(capacity_factor=0.7, jitter_epsilon=0.3),
        dict(jitter_epsilon=0.3, recompute=True, num_experts=2),
    )
    for policy, reentrant in itertools.product(policies, (None, True)):
        options = dict(balance_loss_weight=0.5, z_loss_weight=0.1, bias_update_speed=1e-3, **policy)
        layer, dense = make_layer(parallel, dispatch="alltoall", **options), make_layer(**options)
        # The noise of a token is that of the first rank that has it.
        found = backward(layer, replica, replica + 100 * parallel.tp_rank, reentrant)
        average_gradients(layer.parameters(), parallel, replicas=("dp", "ep"))
        expected = [backward(dense, part, part, None) for part in range(replicas)][replica]
        for mine, whole in zip(found, expected):
            assert_close(mine, whole, 2e-6, f"{policy} {reentrant}")
        gradients = {name: p.grad.numpy() / replicas for name, p in dense.named_parameters()}
        for name, value in shard_like(layer, gradients).items():
            mine = getattr(layer, name)
            assert mine.size == 0 or np.isfinite(mine.grad.numpy()).all()
            if mine.size:
                assert_close(mine.grad.numpy(), value, 3e-6, f"{name} {policy} {reentrant}")
        layer.update_correction_bias()
        dense.update_correction_bias()
        np.testing.assert_array_equal(layer.correction_bias.numpy(), dense.correction_bias.numpy())


@check
def all_to_all_recompute():
    """All tokens go to the experts of one rank: the others have experts, but no rows for them, or neither."""
    from paddle.distributed.fleet.utils import recompute

    table, weights = paddle.zeros([len(tokens()), 1], "int32"), paddle.ones([len(tokens()), 1])
    for reentrant, frozen in ((True, False), (False, False), (False, True)):
        options = dict(num_experts=2, parts={}) if frozen else {}
        layer, dense = make_layer(parallel, dispatch="alltoall", **options), make_layer(**options)
        found = []
        for one in (layer, dense):
            x = trained_tokens()
            x.stop_gradient = frozen
            output = recompute(lambda x: one(x, table, weights), x, use_reentrant=reentrant)
            (output**2).sum().backward()
            found.append({name: p.grad for name, p in [("hidden_states", x), *one.named_parameters()]})
        average_gradients(layer.parameters(), parallel, replicas=("dp", "ep"))
        whole = {name: grad.numpy() for name, grad in found[1].items() if grad is not None}
        if not frozen:
            assert_close(found[0]["hidden_states"].numpy(), whole["hidden_states"], 2e-6, "hidden_states")
        for name, value in shard_like(layer, whole).items():
            if name != "hidden_states" and value.size:
                assert_close(getattr(layer, name).grad.numpy(), value, 2e-6, f"{name} {reentrant} {frozen}")


@check
def accumulation():
    """Two micro-batches are one batch; the balance loss is one of each micro-batch."""
    options = dict(balance_loss_weight=0.0)
    model, dense = Model(parallel, **options), Model(**options)
    train(model, 3, parallel, micro_batches=2)
    train(dense, 3)
    assert_same_model(model, dense)


@check
def mixed_precision():
    """Automatic casts over float32 parameters, and bfloat16 ones, also where a rank holds no experts."""
    for level, num_experts in itertools.product(("O1", "O2"), (2, EXPERTS)):
        layers = both(num_experts=num_experts, dtype="float32" if level == "O1" else "bfloat16")

        def run(x, layer):
            with autocast(level):
                return layer(x)

        assert_same_gradients(
            *layers,
            trained_tokens(),
            tolerance=2e-2,
            call=lambda x: run(x, layers[0]),
            dense_call=lambda x: run(x, layers[1]),
        )


@check
def data_parallel():
    """paddle.DataParallel averages the dense parameters and leaves the shards to average_gradients."""
    dense = Model()
    train(dense, 3)
    for group in (None, parallel.dp_group):
        model = Model(parallel)
        wrapped = paddle.DataParallel(model, group=group)
        shards = [parameter for parameter in model.parameters() if getattr(parameter, "no_sync", False)]
        train(model, 3, parallel, wrapped=wrapped, after_backward=lambda: average_gradients(shards, parallel))
        assert_same_model(model, dense)


@check
def clipping():
    """The norm is that of one process, and paddle's own class is the reference there."""
    layer, dense = both()
    x = trained_tokens()
    for one in (layer, dense):
        (one(x) ** 2).sum().backward()
    dense.down_weight.need_clip = layer.down_weight.need_clip = False

    def clipped(layer, clip):
        pairs = clip([(parameter, parameter.grad.clone()) for parameter in layer.parameters()])
        names = [name for name, _ in layer.named_parameters()]
        return {name: gradient.numpy() for name, (_, gradient) in zip(names, pairs)}

    for clip_norm in (0.1, 1e9):
        mine = clipped(layer, ClipGradByGlobalNorm(clip_norm, parallel))
        whole = shard_like(layer, clipped(dense, paddle.nn.ClipGradByGlobalNorm(clip_norm)))
        for name, gradient in whole.items():
            assert_close(mine[name], gradient, 1e-5, name)
    norm = float(clip_gradients(layer.parameters(), 1e9, parallel))
    twin = copy.deepcopy(layer)
    assert twin.parallel is parallel and twin.down_weight is not layer.down_weight
    (twin(x) ** 2).sum().backward()
    twin.down_weight.need_clip = False
    assert float(clip_gradients(twin.parameters(), 1e9, parallel)) == norm > 0
    for name in ("is_distributed", "no_sync", "expert", "shard_group", "color", "is_gate"):
        marked = [hasattr(parameter, name) for parameter in layer.parameters()]
        assert [hasattr(parameter, name) for parameter in twin.parameters()] == marked, name
    layer.gate_weight.is_distributed = True
    try:
        clipped(layer, ClipGradByGlobalNorm(0.1, parallel))
    except ValueError as error:
        assert "is sharded (is_distributed), but not by FusedMoE" in str(error), error
    else:
        raise AssertionError("a foreign shard was clipped")


@check
def groups():
    """Every group sums its own ranks, and a dp_group across different places of the grids is refused."""
    own = rank_grid(parallel.world_size, ep_size, tp_size, dp_size)[parallel.rank]
    for name in ("ep", "tp", "dp", "grid"):
        ranks = getattr(own, name + "_group")
        assert tuple(getattr(parallel, name + "_group").ranks) == ranks
        assert parallel.all_reduce(paddle.to_tensor([2**parallel.rank]), name).item() == sum(
            2**rank for rank in ranks
        )
    try:
        ParallelContext.from_groups(parallel.ep_group, parallel.tp_group, dp_group=parallel.grid_group)
    except RuntimeError as error:
        assert "joins ranks at different places of their grids" in str(error), error
    else:
        raise AssertionError("wrong groups were accepted")
    with mock.patch(
        "paddle.distributed.all_reduce", lambda *arguments, **options: None
    ):  # as gloo now and then
        try:
            ParallelContext.from_groups(parallel.ep_group, parallel.tp_group)
        except RuntimeError as error:
            ranks = list(parallel.ep_group.ranks)
            assert f"should sum over the ranks {ranks}, but a test sum of their ids came from" in str(
                error
            ), error
        else:
            raise AssertionError("a group that does not sum was accepted")


@check
def averages():
    """Gradients that only some replicas have, that none has, of two dtypes."""
    replica = parallel.dp_rank
    values = {"float32": [1.0, 2.0], "bfloat16": [3.0], "float64": [1e-300]}
    zeros = paddle.nn.initializer.Constant(0.0)
    parameters = [
        paddle.create_parameter([len(value)], dtype, default_initializer=zeros)
        for dtype, value in values.items()
    ]
    unused, fixed = paddle.create_parameter([2], "float32"), paddle.create_parameter([2], "float32")
    fixed.stop_gradient = True
    for parameter, value in zip(parameters, values.values()):
        if replica == 0:
            parameter.grad = paddle.to_tensor(np.array(value)).astype(parameter.dtype)
    average_gradients([*parameters, unused, fixed], parallel)
    for parameter, value in zip(parameters, values.values()):
        assert parameter.grad.dtype == parameter.dtype
        np.testing.assert_allclose(
            parameter.grad.astype("float64").numpy(), np.array(value) / dp_size, rtol=1e-6
        )
    assert unused.grad is None and fixed.grad is None


@check
def wide_gradients():
    """Those in float32 of bfloat16 parameters: in grad, as with master_grad, and in fleet's main_grad."""
    small = 2.0**-12  # which bfloat16 loses beside 1
    expected = 1 + small * (dp_size - 1) / 2
    for name, everywhere in itertools.product(("grad", "main_grad"), (True, False)):
        zeros = paddle.nn.initializer.Constant(0.0)
        parameter = paddle.create_parameter([3], "bfloat16", default_initializer=zeros)
        value = paddle.full([3], 1 + small * parallel.dp_rank)
        missing = not everywhere and parallel.dp_rank > 0
        if name == "main_grad" or not missing:
            setattr(parameter, name, None if missing else value)
        average_gradients([parameter], parallel)
        gradient = getattr(parameter, name)
        assert gradient.dtype == paddle.float32, (name, everywhere)
        assert (gradient.numpy() == (expected if everywhere else 1 / dp_size)).all(), (name, gradient)
        clip_gradients([parameter], 0.5, parallel)
        np.testing.assert_allclose(np.linalg.norm(getattr(parameter, name).numpy()), 0.5, rtol=1e-6)


@check
def same_start():
    """Each rank has drawn other values: all get those of the first that holds the same part."""
    place = parallel.ep_rank * tp_size + parallel.tp_rank
    for dispatch in ("replicated", "alltoall"):
        layer = make_layer(parallel, seed=parallel.rank, dispatch=dispatch)
        broadcast_parameters(layer.parameters(), parallel)
        owners = {"gate_weight": 0, "shared_gate_weight": 0, "down_weight": place}
        # Of an all-to-all each EP rank has the same part of the shared expert.
        owners["shared_down_weight"] = place if dispatch == "replicated" else parallel.tp_rank
        for name, owner in owners.items():
            expected = getattr(make_layer(parallel, seed=owner, dispatch=dispatch), name)
            np.testing.assert_array_equal(getattr(layer, name).numpy(), expected.numpy(), name)


@check
def replica_without_tokens():
    """One replica has no tokens for a whole step: its gradients are zeros, and nobody waits."""
    layer, dense = both(balance_loss_weight=0.5, balance_loss="global", z_loss_weight=0.1)
    for num_tokens in (0, 7):
        x = trained_tokens(num_tokens=num_tokens if parallel.dp_rank else 6)
        output, loss = layer(x, return_aux_loss=True)
        (output.sum() / 6 + loss).backward()
        average_gradients(layer.parameters(), parallel)
        assert all(np.isfinite(parameter.grad.numpy()).all() for parameter in layer.parameters())
        assert np.isfinite(loss.item())
        layer.clear_gradients()


@check
def global_balance():
    """Replicas with different numbers of tokens: the value and the averaged gradient of the whole batch."""
    logits = np.random.default_rng(0).standard_normal((10, EXPERTS)).astype(np.float32)
    ids = paddle.to_tensor(np.argsort(-logits, axis=1)[:, :TOP_K].astype(np.int32))
    parts = [slice(0, 7), slice(7, 10)] + [slice(10, 10)] * (dp_size - 2)
    weight = paddle.to_tensor(logits, stop_gradient=False)
    mine = parts[parallel.dp_rank]
    local = load_balancing_loss(weight[mine], ids[mine], parallel=parallel)
    local.backward()
    average_gradients([weight], parallel)
    whole = paddle.to_tensor(logits, stop_gradient=False)
    expected = load_balancing_loss(whole, ids)
    expected.backward()
    np.testing.assert_allclose(local.item(), expected.item(), rtol=1e-6)
    assert_close(weight.grad.numpy(), whole.grad.numpy(), 1e-6, "logits")


@check
def pipeline():
    """Two stages with a layer of experts each, every stage a grid of its own, two micro-batches in flight."""
    import paddle.distributed as dist

    stage, other = parallel.dp_rank, parallel.dp_group.ranks[1 - parallel.dp_rank]
    options = dict(balance_loss_weight=0.5)
    stages = [make_layer(seed=seed, **options) for seed in (0, 1)]
    layer = make_layer(parallel, seed=stage, **options)
    shape = [5, HIDDEN]
    inputs = [paddle.to_tensor(part, stop_gradient=False) for part in np.split(tokens(num_tokens=10), 2)]

    sent = []
    for part in inputs:
        if stage == 1:
            part = paddle.empty(shape)
            dist.recv(part, other)
            part.stop_gradient = False
        output, loss = layer(part, return_aux_loss=True)
        if stage == 0:
            dist.send(output.detach(), other)
        sent.append((part, output, loss))
    for part, output, loss in sent:
        if stage == 1:
            (output.sum() + loss).backward()
            dist.send(part.grad, other)
        else:
            gradient = paddle.empty(shape)
            dist.recv(gradient, other)
            paddle.autograd.backward([output, loss], [gradient, paddle.ones([])])

    for part in inputs:
        part = part.detach()
        hidden, first = stages[0](part, return_aux_loss=True)
        output, second = stages[1](hidden, return_aux_loss=True)
        (output.sum() + first + second).backward()
    whole = {name: parameter.grad.numpy() for name, parameter in stages[stage].named_parameters()}
    part = shard_like(layer, whole)
    for name, parameter in layer.named_parameters():
        assert_close(parameter.grad.numpy(), part[name], 2e-6, name)


@check
def fleet_topology():
    """The groups of fleet's hybrid topology, its model-parallel group with all ranks, and its steps."""
    from paddle.distributed import fleet

    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": parallel.world_size}
    fleet.init(is_collective=True, strategy=strategy)
    topology = fleet.get_hybrid_communicate_group()
    single, everyone = topology.get_data_parallel_group(), topology.get_model_parallel_group()
    for groups in ((single, everyone), (everyone, single)):
        adopted = ParallelContext.from_groups(*groups, dp_group=single)
        assert_same_gradients(make_layer(adopted), make_layer(), trained_tokens())

        # fleet's own clipping adds up what its model-parallel group has, which is the grid here.
        for clip in (ClipGradByGlobalNorm(0.5, adopted), paddle.nn.ClipGradByGlobalNorm(0.5)):
            model, dense = Model(adopted), Model()
            inner = paddle.optimizer.AdamW(1e-2, parameters=model.parameters(), grad_clip=clip)
            wrapped, optimizer = fleet.distributed_model(model), fleet.distributed_optimizer(inner)
            check_optimizer(optimizer, adopted)
            try:  # then the model itself
                loss_of(wrapped, *batch(0))
            except AssertionError as error:
                assert str(error) == "Only support xpu, gpu and custom_device now, but this is cpu", error
            else:
                raise RuntimeError("fleet's TensorParallel runs on a CPU: use it below, and change the docs")
            train(dense, 3)
            for step in range(3):
                loss_of(model, *batch(step)).backward()
                optimizer.step()
                optimizer.clear_grad()
                for experts in model.experts:
                    experts.update_correction_bias()
            assert_same_model(model, dense)


@check
def fleet_pipeline():
    """fleet's PipelineLayer: two stages with experts and their losses in each, two micro-batches."""
    from paddle.distributed import fleet
    from paddle.distributed.fleet.meta_parallel import LayerDesc, PipelineLayer

    paddle.distributed.ParallelEnv._device_id = 0  # PipelineLayer asks for it, and on a CPU nobody sets it
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 1, "pp_degree": 2}
    strategy.hybrid_configs["pp_configs"].use_batch_p2p_comm = False
    strategy.pipeline_configs = {"micro_batch_size": SEQUENCES // 2, "accumulate_steps": 2}
    fleet.init(is_collective=True, strategy=strategy)

    def cost(results, target):
        output, losses = results
        return ((output - target) ** 2).mean() + losses.sum()

    model = PipelineLayer(
        [LayerDesc(Block, seed) for seed in range(4)], num_stages=2, loss_fn=cost, seg_method="layer:Block"
    )
    stage = fleet.get_hybrid_communicate_group().get_stage_id()
    assert stage == parallel.rank
    dense = paddle.nn.LayerList([Block(seed) for seed in range(4)])
    pipeline = fleet.distributed_model(model)
    optimizer = fleet.distributed_optimizer(paddle.optimizer.AdamW(1e-2, parameters=model.parameters()))
    whole = paddle.optimizer.AdamW(1e-2, parameters=dense.parameters())
    for step in range(3):
        x, target = map(paddle.to_tensor, batch(step))
        loss = pipeline.train_batch([x, target], optimizer)
        total = 0.0
        for part, wanted in zip(x.chunk(2), target.chunk(2)):
            results = part
            for block in dense:
                results = block(results)
            micro = cost(results, wanted) / 2
            micro.backward()
            total += micro.item()
        whole.step()
        whole.clear_grad()
        np.testing.assert_allclose(loss.item(), total, rtol=1e-6)
    own = [p.numpy() for block in list(dense)[2 * stage : 2 * stage + 2] for p in block.parameters()]
    assert len(own) == len(model.parameters())
    for parameter, expected in zip(model.parameters(), own):
        assert_close(parameter.numpy(), expected, 1e-5, parameter.name)


def refused(text, optimizer):
    """`optimizer` is an error where a grid has several ranks, and fine elsewhere."""
    if ep_size * tp_size == 1:
        return check_optimizer(optimizer, parallel)
    try:
        check_optimizer(optimizer, parallel)
    except ValueError as error:
        assert all(part in str(error) for part in ("optimizer: ", *text)), error
    else:
        raise AssertionError(f"accepted: {text}")


@check
def sharded_optimizer():
    """fleet's sharding stage 1 for the dense parameters; one norm clips everything; misuse is refused."""
    from paddle.distributed import fleet
    from paddle.distributed.fleet.meta_parallel.sharding.group_sharded_optimizer_stage2 import (
        GroupShardedOptimizerStage2,
    )

    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 1, "sharding_degree": parallel.world_size}
    fleet.init(is_collective=True, strategy=strategy)
    model, dense = Model(parallel), Model()
    shards = [parameter for parameter in model.parameters() if parameter.is_distributed]
    others = [parameter for parameter in model.parameters() if not parameter.is_distributed]
    wrapped = fleet.distributed_model(model)
    optimizers = [
        fleet.distributed_optimizer(paddle.optimizer.AdamW(1e-2, parameters=others)),
        *[paddle.optimizer.AdamW(1e-2, parameters=part) for part in (shards,) if part],
    ]
    for optimizer in optimizers:
        check_optimizer(optimizer, parallel)
    clip = paddle.nn.ClipGradByGlobalNorm(0.5)
    whole = [paddle.optimizer.AdamW(1e-2, parameters=dense.parameters(), grad_clip=clip)]
    for step in range(3):
        x, target = batch(step)
        mine = [np.split(part, dp_size)[parallel.dp_rank] for part in (x, target)]
        loss_of(wrapped, *mine).backward()
        average_gradients(model.parameters(), parallel)
        norm = clip_gradients(model.parameters(), 0.5, parallel)
        loss_of(dense, x, target).backward()
        expected = sum((parameter.grad**2).sum() for parameter in dense.parameters()).sqrt()
        np.testing.assert_allclose(norm.item(), expected.item(), rtol=1e-5)
        assert norm.item() > 0.5, "nothing was clipped"
        for optimizer in optimizers + whole:
            optimizer.step()
            optimizer.clear_grad()
        for experts in (*model.experts, *dense.experts):
            experts.update_correction_bias()
    assert len(optimizers[0].state_dict()) < 4 * len(others)
    assert_same_model(model, dense)

    def sharding(parameters, clip=None):
        inner = paddle.optimizer.AdamW(1e-2, parameters=parameters, grad_clip=clip)
        return fleet.distributed_optimizer(inner)

    name = (shards or others)[0].name
    everything = [parameter for parameter in model.parameters() if parameter.size]
    refused(["DygraphShardingOptimizer takes the parameter", name, "of their own"], sharding(everything))
    check_optimizer(sharding(others, paddle.nn.ClipGradByGlobalNorm(1.0)), parallel)
    inner = sharding(others, ClipGradByGlobalNorm(1.0, parallel))
    try:
        check_optimizer(inner, parallel)
    except ValueError as error:
        assert "call paddle_moe.clip_gradients before its step" in str(error), error
    else:
        raise AssertionError("a norm of a part of the parameters was accepted")
    stage_2 = GroupShardedOptimizerStage2.__new__(GroupShardedOptimizerStage2)  # its __init__ refuses a CPU
    stage_2._optim = paddle.optimizer.AdamW(1e-2, parameters=model.parameters())
    stage_2._local_params = model.parameters()
    stage_2._group = paddle.distributed.collective._get_global_group()
    refused(["GroupShardedOptimizerStage2 takes the parameter", name], stage_2)
    groups = [{"params": others[:1]}, {"params": others[1:] + shards, "learning_rate": 0.1}]
    for parameters in (model.parameters(), groups):
        own = paddle.optimizer.AdamW(1e-2, parameters=parameters, grad_clip=clip)
        refused(["ClipGradByGlobalNorm of Paddle", name, "grad_clip=paddle_moe.ClipGradByGlobal"], own)
        own = paddle.optimizer.AdamW(
            1e-2, parameters=parameters, grad_clip=ClipGradByGlobalNorm(1.0, parallel)
        )
        check_optimizer(own, parallel)


@check
def overflow():
    """Infinity in a shard of one rank: all ranks skip the step and count it, and go on together."""
    with mock.patch("paddle.amp.grad_scaler.in_dynamic_mode", lambda: False):  # it turns itself off on a CPU
        scaler = paddle.amp.GradScaler(init_loss_scaling=4.0, decr_every_n_nan_or_inf=100)
    assert scaler.is_enable() and agree_on_overflow(scaler, parallel) is scaler
    layer = make_layer(parallel)
    one = [paddle.optimizer.SGD(1e-3, parameters=layer.parameters())]
    halves = layer.parameters()[1:], layer.parameters()[:1]  # the optimizer asked last has no infinity
    two = [paddle.optimizer.SGD(1e-3, parameters=half) for half in halves]
    cases = itertools.product((one, two), (None, 0, parallel.world_size - 1, None))
    skipped = 0
    for optimizers, place in cases:
        before = [parameter.numpy() for parameter in layer.parameters()]
        (layer(trained_tokens()).sum() * scaler._scale).backward()
        if place == parallel.rank:
            layer.down_weight.grad[0, 0, 0] = float("inf")
        if place == 0 or optimizers is two:
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.clear_grad()
        scaler.update()
        moved = [bool((p.numpy() != old).any()) for p, old in zip(layer.parameters(), before) if old.size]
        assert moved == [place is None] * len(moved), (place, moved)
        skipped = 0 if place is None else skipped + 1
        assert scaler._decr_count == skipped


for name in sys.argv[4:]:
    CHECKS[name]()
    parallel.barrier()
    print(name, "passed", flush=True)
