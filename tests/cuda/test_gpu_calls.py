"""What only calls on a GPU can get wrong: streams, graphs, devices, memory, large indices.

That the numbers are right is tested by the other tests of the operators, which run on the GPU too where there
is one (`-k cuda`).
"""

from __future__ import annotations

import checks
import numpy as np
import pytest
from checks import (
    arrange,
    assert_amax_close,
    assert_close,
    assert_same_bits,
    expected_moe,
    on_gpu,
    random_case,
    random_tokens,
)

from paddle_moe import core, reference

if checks.why_not_cuda():
    pytest.skip(checks.why_not_cuda(), allow_module_level=True)

half = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
# Sizes that the tensor copies of Hopper can read, and sizes that need the other path.
sizes = pytest.mark.parametrize("hidden, inter", [(256, 192), (200, 96), (104, 176), (33, 21)])


def to_gpu(case: dict) -> dict:
    return checks.Cuda()._to_device(case)


def to_numpy(result):
    return checks.Cuda()._to_numpy(result)


TOKENS = ("hidden_states", "routing_table", "router_weights")


@half
@sizes
@pytest.mark.parametrize("permuted", [False, True], ids=["in_out", "permuted"])
@pytest.mark.parametrize("num_tokens", [1, 5, 64, 700])
def test_both_paths_match_the_reference(dtype, hidden, inter, permuted, num_tokens):
    case = random_case(
        num_tokens, hidden, inter, 8, 3, dtype, layout="stacked", permuted=permuted, bias=True,
        measurement_mode=True,
    )  # fmt: skip
    case["routing_table"][::7, 0] = -1
    out, amax = checks.Cuda().mixture_of_experts(**case)
    expected, expected_amax = expected_moe(case)
    assert_close(out, expected)
    assert_amax_close(amax, expected_amax)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@sizes
@pytest.mark.parametrize("permuted", [False, True], ids=["in_out", "permuted"])
def test_gradients_match_the_reference(dtype, hidden, inter, permuted):
    case = random_case(700, hidden, inter, 8, 3, dtype, layout="stacked", permuted=permuted, bias=True)
    case["routing_table"][::7, 0] = -1
    grad_out = random_case(700, hidden, inter, 8, 3, dtype, seed=1)["hidden_states"]
    expected = reference.mixture_of_experts_backward(grad_out, **case, round_intermediate=dtype)
    tolerance = {"float32": 4e-6, "bfloat16": 8e-3, "float16": 1e-3}[dtype]
    arguments = to_gpu(case)
    rows = core.pre_activation_rows(**arguments)
    kept = on_gpu(np.empty((rows, 2 * inter), case["hidden_states"].dtype))
    core.mixture_of_experts(**arguments, pre_activations=kept)
    first = core.mixture_of_experts_backward(on_gpu(grad_out), **arguments, pre_activations=kept)
    again = core.mixture_of_experts_backward(on_gpu(grad_out), **arguments)
    for name, gradient in first._asdict().items():
        actual = to_numpy(gradient)
        assert checks.relative_l2(reference.to_float64(actual), expected[name]) <= tolerance, name
        assert_same_bits(to_numpy(getattr(again, name)), actual)


@half
@pytest.mark.parametrize("layout", ["list", "separate", "stacked"])
@pytest.mark.parametrize("hidden, inter, by_wgmma", [(256, 192, True), (104, 176, True), (33, 21, False)])
def test_hopper_multiplies_by_wgmma_where_it_can(dtype, layout, hidden, inter, by_wgmma, record_property):
    """Both paths are right, so a driver that refuses the tensor maps would only be slow. gpu_check.py keeps
    what is recorded here."""
    import torch

    case = to_gpu(random_case(40, hidden, inter, 8, 3, dtype, layout=layout))
    core.mixture_of_experts(**case)  # loads the kernels
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        core.mixture_of_experts(**case)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    calls = {
        kernel: sum(kernel in name for name in names) for kernel in ("grouped_gemm_kernel", "multiply_tiles")
    }
    taken = ", ".join(f"{count} {kernel}" for kernel, count in calls.items() if count)
    record_property(f"GEMMs of {layout}, {dtype}, H={hidden}, I={inter}", taken)
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only devices of compute capability 9.0 have wgmma")
    expected = {"grouped_gemm_kernel": 2 * by_wgmma, "multiply_tiles": 2 * (not by_wgmma)}
    assert calls == expected, names


@half
@sizes
def test_many_runs_give_the_same_bits(dtype, hidden, inter):
    case = to_gpu(random_case(1500, hidden, inter, 16, 4, dtype, layout="stacked", measurement_mode=True))
    out, amax = (to_numpy(part) for part in core.mixture_of_experts(**case))
    for _ in range(20):
        again, amax_again = (to_numpy(part) for part in core.mixture_of_experts(**case))
        assert_same_bits(again, out)
        assert_same_bits(amax_again, amax)


@half
@sizes
def test_a_large_permuted_batch_has_the_bits_of_its_tokens(dtype, hidden, inter):
    case = random_case(3000, hidden, inter, 16, 4, dtype, layout="stacked")
    out = checks.Cuda().mixture_of_experts(**case)
    order = np.random.default_rng(1).permutation(3000)
    for chosen in (order, order[:1], order[:9], order[:300]):
        part = {**case, **{name: case[name][chosen] for name in TOKENS}}
        assert_same_bits(checks.Cuda().mixture_of_experts(**part), out[chosen])


@half
@sizes
@pytest.mark.parametrize("num_tokens", [3, 400])
def test_a_graph_replays_with_another_routing(dtype, hidden, inter, num_tokens):
    """One capture serves every routing: nothing of it may be decided on the host."""
    import torch

    rng = np.random.default_rng(2)
    case = random_case(num_tokens, hidden, inter, 8, 2, dtype, layout="stacked", measurement_mode=True)
    tensors = to_gpu(case)
    out = torch.empty_like(tensors["hidden_states"])
    workspace = torch.empty(core.workspace_size(**tensors), dtype=torch.uint8, device="cuda")
    core.mixture_of_experts(**tensors, out=out, workspace=workspace)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, amax = core.mixture_of_experts(**tensors, out=out, workspace=workspace)
    for routing in ("random", "one expert", "nowhere"):
        new = random_tokens(rng, num_tokens, hidden, 2, 8, dtype)
        if routing != "random":
            new["routing_table"][:] = 5 if routing == "one expert" else -1
        for name, value in new.items():
            tensors[name].copy_(on_gpu(value))
        out.view(torch.uint8).fill_(0xFF)
        workspace.fill_(0xFF)
        amax.fill_(float("nan"))
        graph.replay()
        replayed = to_numpy((out, amax))
        now = core.mixture_of_experts(**tensors)
        assert_same_bits(replayed[0], to_numpy(now[0]))
        assert_same_bits(replayed[1], to_numpy(now[1]))
        expected, expected_amax = expected_moe({**case, **new})
        assert_close(replayed[0], expected)
        assert_amax_close(replayed[1], expected_amax)


def test_the_gate_and_the_routing_replay_too():
    import torch

    rng = np.random.default_rng(3)
    hidden = on_gpu(reference.to_storage(rng.standard_normal((50, 64)), "bfloat16"))
    weight = on_gpu(rng.standard_normal((64, 20)).astype(np.float32))
    core.route(core.gate(hidden, weight), 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table, weights = core.route(core.gate(hidden, weight), 4)
    hidden.copy_(on_gpu(reference.to_storage(rng.standard_normal((50, 64)), "bfloat16")))
    graph.replay()
    logits = to_numpy(core.gate(hidden, weight))
    expected_table, expected_weights = reference.route(logits, 4)
    np.testing.assert_array_equal(to_numpy(table), expected_table)
    np.testing.assert_allclose(to_numpy(weights), expected_weights, rtol=2e-6)


@pytest.mark.parametrize("num_tokens", [5, 100, 1000])  # one block routes, several do, and too many to sort
def test_a_graph_of_the_whole_layer_replays(num_tokens):
    """The blocks that route count themselves, from zero again in every replay."""
    import torch

    rng = np.random.default_rng(5)
    case = to_gpu(random_case(num_tokens, 128, 96, 24, 9, "bfloat16", layout="stacked"))
    for name in ("routing_table", "router_weights"):
        del case[name]
    hidden = case.pop("hidden_states")
    gate_weight = on_gpu(rng.standard_normal((128, 24)).astype(np.float32))
    core.fused_gate_moe(hidden, gate_weight, **case, top_k=9)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = core.fused_gate_moe(hidden, gate_weight, **case, top_k=9, return_routing=True)
    for _ in range(3):
        hidden.copy_(on_gpu(reference.to_storage(rng.standard_normal((num_tokens, 128)), "bfloat16")))
        graph.replay()
        routing = core.route(core.gate(hidden, gate_weight), 9)
        expected = (core.mixture_of_experts(hidden, *routing, **case), *routing)
        for one, other in zip(to_numpy(replayed), to_numpy(expected)):
            assert_same_bits(one, other)


def test_work_follows_the_current_stream():
    """Inputs that another kernel of the same stream has still to write, and a result that is read there."""
    import torch

    case = random_case(64, 128, 96, 8, 2, "bfloat16", layout="stacked")
    tensors = to_gpu(case)
    right = to_numpy(core.mixture_of_experts(**tensors))
    late = torch.zeros_like(tensors["hidden_states"])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        core.mixture_of_experts(**tensors)  # the first of a stream allocates, which waits for the GPU
        torch.cuda._sleep(200_000_000)  # cycles: about a tenth of a second
        late.copy_(tensors["hidden_states"], non_blocking=True)
        out = core.mixture_of_experts(**{**tensors, "hidden_states": late})
        assert not stream.query(), "the call waited for the GPU"
    stream.synchronize()
    assert_same_bits(to_numpy(out), right)


def test_results_are_tensors_of_the_same_library_on_the_same_device():
    import torch

    case = to_gpu(random_case(5, dtype="bfloat16", measurement_mode=True))
    out, amax = core.mixture_of_experts(**case)
    assert isinstance(out, torch.Tensor) and out.device == case["hidden_states"].device
    assert out.dtype == torch.bfloat16 and amax.dtype == torch.float32
    cupy = pytest.importorskip("cupy")
    logits = cupy.asarray(np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32))
    table, _ = core.route(logits, 2)
    assert isinstance(table, cupy.ndarray)
    np.testing.assert_array_equal(cupy.asnumpy(table), reference.route(cupy.asnumpy(logits), 2)[0])


def test_arrays_on_two_devices_are_refused():
    case = random_case(5)
    mixed = {**to_gpu(case), "routing_table": case["routing_table"]}
    expected = "routing_table must be on the device of hidden_states, the GPU 0, got the CPU"
    with pytest.raises(ValueError, match=f"^{expected}$"):
        core.mixture_of_experts(**mixed)


def test_arrays_of_a_gpu_that_is_not_the_current_one():
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = random_case(5, dtype="bfloat16", layout="stacked")
    expected = checks.Cuda().mixture_of_experts(**case)
    elsewhere = {name: value.to("cuda:1") for name, value in to_gpu(case).items()}
    out = core.mixture_of_experts(**elsewhere)
    assert out.device.index == 1 and torch.cuda.current_device() == 0
    assert_same_bits(to_numpy(out), expected)
    with pytest.raises(ValueError, match="down_weights must be on the device"):
        core.mixture_of_experts(**{**elsewhere, "down_weights": elsewhere["down_weights"].to("cuda:0")})
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_weights_are_refused(kind):
    case = random_case(4, 64, 32, 3, 2, layout="stacked", permuted=True)
    for name, size in (("gate_up", 64), ("down", 32)):
        shape = (3, 64, size if kind == "int8" else 8)
        case[f"{name}_weights"] = np.ones(shape, np.int8 if kind == "int8" else np.int32)
        case[f"{name}_scale"] = np.ones((3, 64), np.float32)
    with pytest.raises(ValueError, match=f"must have the dtype float32 on a GPU, got {kind}"):
        core.mixture_of_experts(**to_gpu(case))


@half
def test_nan_in_weights_that_nobody_uses_is_not_read(dtype):
    case = random_case(300, 128, 96, 8, 2, dtype, layout="stacked")
    case["routing_table"][case["routing_table"] == 3] = -1
    out = checks.Cuda().mixture_of_experts(**case)
    for name in ("gate_up_weights", "down_weights"):
        case[name] = case[name].copy()
        case[name][3] = np.iinfo(np.uint16).max if dtype == "bfloat16" else np.nan
    assert_same_bits(checks.Cuda().mixture_of_experts(**case), out)


@pytest.mark.parametrize("aligned", [True, False])
def test_offsets_past_two_to_the_31_elements(aligned):
    """Faults seen elsewhere: row * stride in 32 bits, and grids of more than 65535 blocks."""
    import torch

    num_tokens, top_k, hidden, inter = 40_000, 8, 64 if aligned else 33, 7168
    assert num_tokens * top_k * inter > 2**31
    free = torch.cuda.mem_get_info()[0]
    if free < 24 << 30:
        pytest.skip(f"needs 24 GiB of GPU memory, {free >> 30} GiB are free")
    rng = np.random.default_rng(4)
    dense = checks.random_dense(rng, 8, hidden, inter, "bfloat16")
    tokens = random_tokens(rng, num_tokens, hidden, top_k, 8, "bfloat16")
    weights = arrange(dense, "stacked")
    out = to_numpy(core.mixture_of_experts(**to_gpu({**tokens, **weights}), chunk_size=num_tokens))
    few = np.array([0, 1, 9_999, 20_001, 37_449, 39_998, 39_999])
    part = {**weights, **{name: tokens[name][few] for name in TOKENS}}
    assert_same_bits(out[few], checks.Cuda().mixture_of_experts(**part))
    assert_close(out[few], expected_moe(part))


def test_memory_is_not_kept():
    import torch

    case = to_gpu(random_case(200, 128, 96, 8, 2, "bfloat16", layout="stacked"))
    core.mixture_of_experts(**case)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        core.mixture_of_experts(**case)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
