"""One rank of an EP x TP grid that checks its groups in every way: groups.py EP_SIZE TP_SIZE [quick].

Prints "all checks passed" at the end.
"""

import sys

import numpy as np
import paddle
import paddle.distributed as dist

from paddle_moe.distributed import ParallelContext, init_distributed, rank_grid

ep_size, tp_size = int(sys.argv[1]), int(sys.argv[2])
context = init_distributed(ep_size, tp_size, timeout_seconds=60)
rank, world_size = context.rank, ep_size * tp_size
groups = {"ep": context.ep_group, "tp": context.tp_group, "grid": context.grid_group}


def fails_with(error: type, text: str, function, *arguments, **options) -> None:
    try:
        function(*arguments, **options)
    except error as raised:
        assert text in str(raised), raised
    else:
        raise AssertionError(f"no {error.__name__} with {text!r}")


def check_sums(context: ParallelContext) -> None:
    """Values that single out every rank: a missing, foreign or doubled one changes the sum."""
    for name, group in groups.items():
        for dtype in ("float16", "bfloat16", "float32", "float64", "int8", "uint8", "int32", "int64"):
            tensor = paddle.full([3, 5], 2**rank if world_size <= 4 else rank + 1).astype(dtype)
            result = context.all_reduce(tensor, name, fp32=dtype == "bfloat16")
            expected = sum(2**member if world_size <= 4 else member + 1 for member in group.ranks)
            assert result is tensor and result.dtype == getattr(paddle, dtype)
            assert (result.astype("float64").numpy() == expected).all(), (name, dtype, result, expected)
        chosen = name if context.grid_group is None else group
        for dtype in ("float16", "float32"):
            largest = context.all_reduce(paddle.full([7], -1.5 * rank).astype(dtype), chosen, "max")
            assert (largest.astype("float32").numpy() == -1.5 * min(group.ranks)).all(), (name, largest)


check_sums(context)

own = rank_grid(world_size, ep_size, tp_size)[rank]
assert (context.ep_rank, context.ep_size) == (own.ep_rank, ep_size) == (rank // tp_size, ep_size)
assert (context.tp_rank, context.tp_size) == (own.tp_rank, tp_size) == (rank % tp_size, tp_size)
assert tuple(context.ep_group.ranks) == own.ep_group and tuple(context.tp_group.ranks) == own.tp_group
assert list(context.grid_group.ranks) == list(range(world_size)) and context.world_size == world_size

if "quick" not in sys.argv:
    # fp16: partial sums stay in range only if the sum is rounded once, in fp32.
    large = paddle.full([4], 40000.0 if rank % 2 else -30000.0, dtype="float16")
    signs = [1 if member % 2 else 0 for member in context.grid_group.ranks]
    expected = np.float16(sum(40000 if sign else -30000 for sign in signs))
    assert (context.all_reduce(large, "grid").numpy() == expected).all(), large

    # bfloat16 too: added one by one, small numbers would be lost beside a large one.
    beside = paddle.full([4], 1.0 if rank else 256.0, "bfloat16")
    beside.stop_gradient = False  # no gradient flows through it
    expected = paddle.full([4], 256.0 + (world_size - 1)).astype("bfloat16")
    assert (context.all_reduce(beside, "grid", fp32=True) == expected).all() and beside.is_leaf, beside

    # A large tensor, many calls, and every call the same bits.
    noise = np.random.default_rng(rank).standard_normal(100_000).astype(np.float32)
    first = context.all_reduce(paddle.to_tensor(noise), "grid").numpy()
    for _ in range(10):
        assert (context.all_reduce(paddle.to_tensor(noise), "grid").numpy() == first).all()
    total = sum(
        np.random.default_rng(r).standard_normal(100_000).astype(np.float32) for r in range(world_size)
    )
    np.testing.assert_allclose(first, total, rtol=1e-4, atol=1e-5)
    assert context.all_reduce(paddle.zeros([0, 8]), "grid").shape == [0, 8]

    # Every other column: the others stay as they are.
    for dtype in ("float16", "float32"):
        whole = paddle.full([3, 6], rank + 1.0).astype(dtype)
        columns = whole[:, ::2]
        assert not columns.is_contiguous() and context.all_reduce(columns, "grid") is columns
        expected = np.where(np.arange(6) % 2, rank + 1, world_size * (world_size + 1) / 2)
        assert (whole.numpy() == expected).all(), whole

    # The groups are groups of paddle.distributed.
    for group in groups.values():
        if group.nranks > 1:
            tensor = paddle.to_tensor([float(rank)])
            dist.all_reduce(tensor, group=group)
            assert tensor.item() == sum(group.ranks)
            gathered = []
            dist.all_gather(gathered, paddle.to_tensor([rank]), group=group)
            assert [one.item() for one in gathered] == list(group.ranks)
            tensor = paddle.to_tensor([rank])
            dist.broadcast(tensor, src=group.ranks[-1], group=group)
            assert tensor.item() == group.ranks[-1]
            assert dist.get_group(group.id) is group

    # Ranks that disagree on the routing.
    table = paddle.to_tensor([[0, 1], [2, 3], [1, 0]], "int32")
    weights = paddle.full([3, 2], 0.5)
    context.check_same_routing(table)
    context.check_same_routing(table, weights)
    other = world_size - 1
    text = f"routing_table differs between ranks that hold the same tokens: ranks [{other}] disagree with"
    fails_with(
        RuntimeError, text, context.check_same_routing, table.flip(1) if rank == other else table, weights
    )
    text = f"router_weights differs between ranks that hold the same tokens: ranks [{other}]"
    fails_with(RuntimeError, text, context.check_same_routing, table, weights + 1e-7 * (rank == other))
    fails_with(
        RuntimeError, "routing_table", context.check_same_routing, table[:2] if rank == other else table
    )

    # Bad arguments.
    fails_with(ValueError, "got bool", context.all_reduce, paddle.zeros([1], "bool"), "ep")
    fails_with(ValueError, "got 'min'", context.all_reduce, paddle.zeros([1]), "ep", "min")
    fails_with(ValueError, "got 'pp'", context.all_reduce, paddle.zeros([1]), "pp")

    # Groups that exist already; without a group for the grid it is EP followed by TP.
    for grid_group in (None, context.grid_group):
        adopted = ParallelContext.from_groups(context.ep_group, context.tp_group, grid_group)
        assert (adopted.ep_rank, adopted.tp_rank) == (context.ep_rank, context.tp_rank)
        check_sums(adopted)
        adopted.barrier()
        assert adopted.exchange(10 * rank, "testing") == [10 * other for other in range(world_size)]
        fails_with(RuntimeError, "ranks [1]", adopted.check_same_routing, table + (rank == 1))
    if ep_size > 1 and tp_size > 1:
        fails_with(
            RuntimeError, "form no grid", ParallelContext.from_groups, context.ep_group, context.ep_group
        )

context.barrier()
print("all checks passed", flush=True)
