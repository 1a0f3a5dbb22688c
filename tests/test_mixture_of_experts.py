"""mixture_of_experts against the double precision reference, through NumPy arrays and Paddle tensors."""

from __future__ import annotations

import mmap
import os
import sys

import checks
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from checks import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    arrange,
    assert_amax_close,
    assert_close,
    assert_exact,
    assert_same_bits,
    expected_moe,
    integer_case,
    integer_dense,
    per_dtype,
    per_layout,
    per_permuted,
    random_case,
)

from paddle_moe import core as kernels
from paddle_moe.reference import to_float64, to_storage

INT_LIMITS = {"int32": np.iinfo(np.int32), "int64": np.iinfo(np.int64)}


# ---------------------------------------------------------------- right numbers


@per_permuted
@per_layout
@per_dtype
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_every_layout_matches_the_reference(backend, dtype, layout, permuted, bias):
    case = random_case(dtype=dtype, layout=layout, permuted=permuted, bias=bias, measurement_mode=True)
    out, amax = backend.mixture_of_experts(**case)
    expected, expected_amax = expected_moe(case)
    assert checks.dtype_of(out) == dtype and amax.dtype == np.float32
    assert_close(out, expected)
    assert_amax_close(amax, expected_amax)


@per_dtype
def test_end_to_end_error_without_knowing_where_the_kernel_rounds(backend, dtype):
    """The promise of the documentation: 1e-6 in fp32, 5e-3 in half precision."""
    case = random_case(33, 64, 48, 6, 3, dtype)
    out = to_float64(backend.mixture_of_experts(**case))
    expected = expected_moe(case, round_intermediate=False)
    assert checks.relative_l2(out, expected) < (1e-6 if dtype == "float32" else 5e-3)


@per_permuted
@per_layout
@per_dtype
@pytest.mark.parametrize("activation", ["relu", "relu2", "identity"])
def test_integers_are_exact(backend, dtype, layout, permuted, activation):
    case = integer_case(dtype=dtype, layout=layout, permuted=permuted, bias=True, activation=activation)
    assert_exact(backend.mixture_of_experts(**case), expected_moe(case))


@per_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(backend, dtype, activation):
    case = random_case(dtype=dtype, activation=activation, bias=True, measurement_mode=True)
    out, amax = backend.mixture_of_experts(**case)
    expected, expected_amax = expected_moe(case)
    assert_close(out, expected)
    assert_amax_close(amax, expected_amax)


def activation_only(gate_values: np.ndarray, dtype: str, activation: str) -> dict:
    """H = I = 1 and weights 1: out[t] = act(gate_values[t]) * 1, apart from rounding."""
    tokens = len(gate_values)
    one = to_storage(np.ones((1, 1)), dtype)
    return {
        "hidden_states": to_storage(gate_values[:, None], dtype),
        "routing_table": np.zeros((tokens, 1), np.int32),
        "router_weights": np.ones((tokens, 1), np.float32),
        "gate_up_weights": [np.concatenate([one, 0 * one], axis=1)],
        "down_weights": [one],
        "gate_up_bias": [to_storage(np.array([0.0, 1.0]), dtype)],
        "activation": activation,
    }


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_over_its_range(core, activation):
    """Every value of a fine sweep, not their sum: within 1e-6 of the size of what goes in or comes out."""
    case = activation_only(np.linspace(-30, 30, 12001), "float32", activation)
    out, expected = core.mixture_of_experts(**case), expected_moe(case)
    scale = np.maximum(np.abs(case["hidden_states"]), np.abs(expected))
    assert (np.abs(out - expected) <= 1e-6 * scale + 1e-30).all()


@per_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_magnitudes_do_not_overflow_inside_the_activation(backend, dtype, activation):
    """exp and tanh must saturate: no NaN, and inf only where the true result is too large."""
    case = activation_only(
        np.array([1e4, -1e4, 300.0, -300.0, 88.8, -88.8, 104.0, -104.0, 0.0]), dtype, activation
    )
    out, expected = backend.mixture_of_experts(**case), expected_moe(case)
    assert not np.isnan(to_float64(out)).any()
    precision = {"float32": 2e-6, "bfloat16": 2**-8, "float16": 2**-11}[dtype]  # of single values
    np.testing.assert_allclose(
        to_float64(out), to_float64(to_storage(expected, dtype)), rtol=precision, atol=1e-6
    )


SIZES = [1, 3, 5, 17, 100, 777, 1000]


@per_permuted
@per_dtype
@pytest.mark.parametrize("size", SIZES)
def test_sizes_that_are_no_multiple_of_a_vector(core, dtype, size, permuted):
    """Fault seen elsewhere: silently wrong for sizes that are not a multiple of 16, 64 or 128."""
    for hidden, inter in ((size, 24), (32, size), (size, size)):
        case = random_case(3, hidden, inter, 3, 2, dtype, permuted=permuted, bias=True)
        assert_close(core.mixture_of_experts(**case), expected_moe(case))


@pytest.mark.parametrize("size", [3, 17, 100])
def test_sizes_that_are_no_multiple_of_a_vector_in_paddle(size):
    case = random_case(3, size, size + 2, 3, 2, "bfloat16", layout="stacked")
    assert_close(checks.Paddle().mixture_of_experts(**case), expected_moe(case))


@per_dtype
@pytest.mark.parametrize("num_tokens", [1, 2, 4, 7, 8, 9, 16, 33, 64, 100, 257])
def test_token_counts(core, dtype, num_tokens):
    """Both sides of every size at which a kernel may switch its path."""
    case = random_case(num_tokens, 40, 24, 4, 2, dtype)
    assert_close(core.mixture_of_experts(**case), expected_moe(case))


@pytest.mark.parametrize("num_experts", [300, 1100])
def test_many_experts(backend, num_experts):
    """Fault seen elsewhere: more than 255 or 1024 experts."""
    case = random_case(64, 16, 8, num_experts, 8, "bfloat16", layout="stacked", measurement_mode=True)
    case["routing_table"][0, :2] = [num_experts - 1, 256]
    out, amax = backend.mixture_of_experts(**case)
    expected, expected_amax = expected_moe(case)
    assert_close(out, expected)
    assert_amax_close(amax, expected_amax)


@pytest.mark.parametrize("bias_dtype", ["float32", "own"])
@pytest.mark.parametrize("layout", LAYOUTS)
@per_dtype
def test_biases_in_fp32_or_the_activation_dtype(backend, dtype, layout, bias_dtype):
    case = random_case(
        dtype=dtype, layout=layout, bias=True, bias_dtype=None if bias_dtype == "own" else bias_dtype
    )
    assert_close(backend.mixture_of_experts(**case), expected_moe(case))


@pytest.mark.parametrize("present", ["gate_up_bias", "down_bias"])
def test_one_bias_without_the_other(backend, present):
    case = random_case(bias=True)
    del case["gate_up_bias" if present == "down_bias" else "down_bias"]
    assert_close(backend.mixture_of_experts(**case), expected_moe(case))


@per_dtype
def test_router_weights_in_the_activation_dtype(backend, dtype):
    case = random_case(dtype=dtype)
    case["router_weights"] = to_storage(case["router_weights"], dtype)
    assert_close(backend.mixture_of_experts(**case), expected_moe(case))


# ---------------------------------------------------------------- routing


@pytest.mark.parametrize("id_dtype", ["int32", "int64"])
def test_ids_outside_the_local_range_add_exactly_zero(backend, id_dtype):
    """Fault seen elsewhere: -1, masked or out-of-range ids read out of bounds, or wrap around."""
    case = integer_case(40, num_experts=4, top_k=4, activation="relu", experts_min=8, experts_max=11)
    limits = INT_LIMITS[id_dtype]
    foreign = [-1, 0, 7, 12, 13, 255, limits.min, limits.min + 8, limits.max, limits.max - 1, -9]
    if id_dtype == "int64":
        foreign += [2**32 + 8, 2**32 + 9, -(2**32) + 8, 2**31 + 8, 2**40 + 11, 2**63 - 8]
    rng = np.random.default_rng(1)
    table = (case["routing_table"] + 8).astype(id_dtype)
    masked = rng.random(table.shape) < 0.6
    table[masked] = rng.choice(np.array(foreign, dtype=id_dtype), masked.sum())
    table[0, :] = -1
    case["routing_table"] = table
    out = backend.mixture_of_experts(**case)
    assert_exact(out, expected_moe(case))
    assert not out[0].any()
    # The same bits as if the slots were not there at all.
    case["routing_table"] = np.where(masked | (np.arange(40) == 0)[:, None], -1, table).astype(id_dtype)
    assert_same_bits(backend.mixture_of_experts(**case), out)


@pytest.mark.parametrize("id_dtype", ["int32", "int64"])
def test_every_id_outside_the_range(core, id_dtype):
    """Nothing local: exact zeros, whatever the poisoned buffers held, and amax 0."""
    limits = INT_LIMITS[id_dtype]
    case = random_case(5, top_k=2, num_experts=3, experts_min=3, measurement_mode=True)
    case["routing_table"] = np.array(
        [[-1, 6], [2, 7], [limits.min, limits.max], [0, -3], [6, 6]], dtype=id_dtype
    )
    out, amax = core.mixture_of_experts(**case)
    assert not out.any() and not amax.any()


def test_rows_without_an_expert_are_exact_zeros_beside_rows_with_one(backend):
    """Fault seen elsewhere: uninitialised padding rows, 0 x NaN."""
    case = random_case(9)
    case["routing_table"][[0, 4, 8]] = -1
    out = backend.mixture_of_experts(**case)
    assert not out[[0, 4, 8]].any()
    assert_close(out, expected_moe(case))


@per_dtype
def test_duplicate_ids_in_a_row_add_up(backend, dtype):
    case = integer_case(6, num_experts=3, top_k=3, dtype=dtype, activation="identity")
    case["routing_table"][:] = [[1, 1, 1], [0, 2, 0], [2, 2, 1], [0, 0, -1], [1, -1, 1], [2, 1, 0]]
    assert_exact(backend.mixture_of_experts(**case), expected_moe(case))


@pytest.mark.parametrize("top_k", [1, 5], ids=["K=1", "K=E"])
@per_dtype
def test_one_expert_per_token_and_all_experts_per_token(backend, dtype, top_k):
    case = random_case(top_k=top_k, num_experts=5, dtype=dtype)
    assert_close(backend.mixture_of_experts(**case), expected_moe(case))


@per_dtype
def test_all_tokens_on_one_expert_and_the_others_without_a_token(backend, dtype):
    case = random_case(130, num_experts=6, top_k=1, dtype=dtype, measurement_mode=True)
    case["routing_table"][:] = 4
    out, amax = backend.mixture_of_experts(**case)
    expected, expected_amax = expected_moe(case)
    assert_close(out, expected)
    assert_amax_close(amax, expected_amax)
    assert not amax[[0, 1, 2, 3, 5]].any() and amax[4] > 0


@per_layout
@per_dtype
def test_zero_tokens(backend, dtype, layout):
    """Fault seen elsewhere: zero tokens give an invalid launch."""
    case = random_case(0, layout=layout, dtype=dtype, measurement_mode=True)
    out, amax = backend.mixture_of_experts(**case)
    assert out.shape == (0, 32) and checks.dtype_of(out) == dtype
    assert amax.shape == (5,) and not amax.any()


def test_zero_router_weights_give_zero(backend):
    case = random_case(6, top_k=2)
    case["router_weights"][2:4] = 0
    case["router_weights"][5, 1] = 0
    out = backend.mixture_of_experts(**case)
    assert not out[2:4].any()
    assert_close(out, expected_moe(case))


def test_one_expert(backend):
    for layout in LAYOUTS:
        case = random_case(num_experts=1, top_k=1, layout=layout, experts_min=3, experts_max=3)
        case["routing_table"][:] = 3
        assert_close(backend.mixture_of_experts(**case), expected_moe(case))


# ---------------------------------------------------------------- amax


@per_dtype
def test_amax_is_the_largest_intermediate_of_each_expert_before_rounding(backend, dtype):
    case = random_case(50, num_experts=7, top_k=2, dtype=dtype, bias=True, measurement_mode=True)
    case["routing_table"][case["routing_table"] == 3] = -1
    _, amax = backend.mixture_of_experts(**case)
    expected = expected_moe(case)[1]
    assert amax[3] == 0
    assert_amax_close(amax, expected)


def test_measuring_does_not_change_the_output(backend):
    case = random_case(20)
    measured, _ = backend.mixture_of_experts(**case, measurement_mode=True)
    assert_same_bits(backend.mixture_of_experts(**case), measured)


def test_amax_shows_nan_and_inf(core):
    case = random_case(8, num_experts=4, top_k=1, measurement_mode=True)
    case["routing_table"][:, 0] = [0, 0, 1, 1, 2, 2, 3, 3]
    case["hidden_states"][0] = np.nan  # first of its expert
    case["hidden_states"][3] = np.nan  # last of its expert
    case["hidden_states"][4] = 3e38
    _, amax = core.mixture_of_experts(**case)
    assert np.isnan(amax[[0, 1]]).all()
    assert not np.isfinite(amax[2]) and np.isfinite(amax[3])


# ---------------------------------------------------------------- shards


@pytest.mark.parametrize("ep, tp", [(1, 1), (2, 1), (4, 1), (1, 2), (1, 3), (2, 2), (3, 4), (11, 5)])
@per_dtype
def test_expert_and_tensor_shards_reassemble(core, dtype, ep, tp):
    """11 experts and I = 19 divide evenly by nothing. Integers, so that the sum of the shards is exact.

    Faults seen elsewhere: slicing that drops the remainder (11 experts in slices of 4), and odd I / tp.
    """
    rng = np.random.default_rng(5)
    dense = integer_dense(rng, 11, 24, 19, dtype)
    tokens = {
        "hidden_states": to_storage(rng.integers(-1, 1, (16, 24), endpoint=True), dtype),
        "routing_table": checks.random_routing(rng, 16, 3, 11),
        "router_weights": rng.choice(np.float32([-1, 0.5, 1, 2]), (16, 3)),
        "activation": "relu",
    }
    # Rounding of the partial sums to the dtype of the output would hide an error: keep them small.
    total, amax = np.zeros((16, 24)), np.zeros(11)
    for experts in np.array_split(np.arange(11), ep):
        for columns in np.array_split(np.arange(19), tp):
            shard = {
                "gate": dense["gate"][experts][:, :, columns],
                "up": dense["up"][experts][:, :, columns],
                "down": dense["down"][experts][:, columns, :],
            }
            case = {**tokens, **arrange(shard), "measurement_mode": True}
            case |= {"experts_min": int(experts[0]), "experts_max": int(experts[-1])}
            part, part_amax = core.mixture_of_experts(**case)
            assert_exact(part, expected_moe(case)[0])
            total += to_float64(part)
            amax[experts] = np.maximum(amax[experts], part_amax)
    expected, expected_amax = expected_moe({**tokens, **arrange(dense), "measurement_mode": True})
    if dtype == "float32":
        np.testing.assert_array_equal(total, expected)
    assert checks.relative_l2(total, expected) < 5e-3
    np.testing.assert_array_equal(amax, expected_amax)


# ---------------------------------------------------------------- arrays that are not contiguous


def spread(array: np.ndarray, axis: int) -> np.ndarray:
    """A view with the same values and gaps of NaN along one axis."""
    shape = [n * (3 if i == axis % array.ndim else 1) for i, n in enumerate(array.shape)]
    wide = np.full(shape, np.iinfo(np.uint16).max if array.dtype == np.uint16 else np.nan, array.dtype)
    view = wide[
        tuple(slice(1, None, 3) if i == axis % array.ndim else slice(None) for i in range(array.ndim))
    ]
    view[...] = array
    return view


@per_permuted
@per_dtype
def test_strided_weight_views(core, dtype, permuted):
    """Fault seen elsewhere: strided weight views are read as if they were contiguous."""
    case = random_case(11, 26, 18, dtype=dtype, layout="stacked", permuted=permuted)
    contiguous = core.mixture_of_experts(**case)
    for axis in (0, 1, 2):
        for name in ("gate_up_weights", "down_weights"):
            out = core.mixture_of_experts(**{**case, name: spread(case[name], axis)})
            assert_close(out, expected_moe(case))
            if not (permuted and axis == 2):  # columns that are no runs of memory: another order of sums
                assert_same_bits(out, contiguous)
    rows = {
        name: [spread(matrix, 0) for matrix in case[name]] for name in ("gate_up_weights", "down_weights")
    }
    assert_same_bits(core.mixture_of_experts(**{**case, **rows}), contiguous)


@per_dtype
def test_transposed_views_equal_permuted_storage(core, dtype):
    case = random_case(11, 26, 18, dtype=dtype, layout="stacked", permuted=True)
    views = {name: case[name].swapaxes(1, 2) for name in ("gate_up_weights", "down_weights")}
    transposed = core.mixture_of_experts(**{**case, **views, "permuted_weights": False})
    assert_close(transposed, expected_moe(case))


@per_permuted
@per_dtype
@pytest.mark.parametrize("num_tokens", (1, 5, 90))
def test_gate_and_up_stored_in_different_orders(core, dtype, permuted, num_tokens):
    case = random_case(num_tokens, 70, 45, dtype=dtype, layout="separate", permuted=permuted)
    weights = case["gate_up_weights"]
    for half in (slice(None, len(weights) // 2), slice(len(weights) // 2, None)):
        mixed = list(weights)
        mixed[half] = [matrix.T.copy().T for matrix in weights[half]]
        out = core.mixture_of_experts(**{**case, "gate_up_weights": mixed})
        assert_close(out, expected_moe(case))


def test_negative_and_zero_strides(core):
    case = random_case(6, num_experts=4)
    flipped = {**case, "gate_up_weights": [np.flip(np.flip(w).copy()) for w in case["gate_up_weights"]]}
    assert_close(core.mixture_of_experts(**flipped), expected_moe(case))
    one = np.broadcast_to(case["down_weights"][0], (4, *case["down_weights"][0].shape))
    repeated = {**case, "down_weights": one}
    assert_close(core.mixture_of_experts(**repeated), expected_moe(repeated))


@per_dtype
def test_token_rows_with_gaps(core, dtype):
    case = random_case(9, dtype=dtype)
    wide = np.concatenate([case["hidden_states"]] * 2, axis=1)
    wide[:, 32:] = np.iinfo(np.uint16).max if dtype == "bfloat16" else np.nan
    strided = core.mixture_of_experts(**{**case, "hidden_states": wide[:, :32]})
    assert_same_bits(strided, core.mixture_of_experts(**case))
    flipped = {**case, "hidden_states": case["hidden_states"][::-1]}
    assert_close(core.mixture_of_experts(**flipped), expected_moe(flipped))


def test_paddle_tensors_that_are_not_contiguous():
    import paddle

    import paddle_moe

    case = random_case(6, 16, 12, 3, 2)

    def strided(array):
        return paddle.to_tensor(np.repeat(array, 2, axis=-1))[..., ::2]

    def transposed(array):
        return paddle.to_tensor(np.ascontiguousarray(array.T)).T

    out = paddle_moe.mixture_of_experts(
        strided(case["hidden_states"]),
        transposed(case["routing_table"]),
        strided(case["router_weights"]),
        [transposed(w) for w in case["gate_up_weights"]],
        [strided(w) for w in case["down_weights"]],
    )
    assert_close(out.numpy(), expected_moe(case))


def sparse_array(shape, row_stride, dtype) -> np.ndarray:
    """Rows that lie row_stride elements apart in memory that the system only provides where it is touched."""
    itemsize = np.dtype(dtype).itemsize
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(
        -1,
        ((shape[0] - 1) * row_stride + shape[1]) * itemsize,
        mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve,
    )
    return np.lib.stride_tricks.as_strided(
        np.frombuffer(memory, dtype), shape, (row_stride * itemsize, itemsize)
    )


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is reserved without being provided")
@pytest.mark.parametrize("which", ["hidden_states", "gate_up_weights", "down_weights"])
def test_offsets_past_two_to_the_31(core, which):
    """Fault seen elsewhere: int32 overflow of row * stride."""
    case = random_case(9, 9, 9, 2, 2, "float16")
    expected = core.mixture_of_experts(**case)

    def far_apart(array):
        far = sparse_array(array.shape, 2**29, array.dtype)
        far[...] = array
        return far

    if which == "hidden_states":
        case[which] = far_apart(case[which])
    else:
        case[which] = [far_apart(case[which][0]), *case[which][1:]]
    assert_same_bits(core.mixture_of_experts(**case), expected)


# ---------------------------------------------------------------- instruction sets, processes


def test_forced_instruction_set_is_in_use():
    assert kernels.isa_name() in kernels.available_isas()
    assert kernels.isa_name() == os.environ.get("PADDLE_MOE_ISA", kernels.isa_name())


@pytest.mark.parametrize("isa", sorted({*kernels.available_isas()} - {kernels.isa_name()}))
@pytest.mark.timeout(630)
def test_every_instruction_set(isa):
    """All tests of the operators that need no Paddle, once more for each other instruction set.

    Not those of route, which is the same code for all.
    """
    options = ["-q", "-x", "--no-header", "-p", "no:cacheprovider", "-m", "not slow"]
    options += ["-k", "not paddle and not every_instruction_set"]
    files = [name for name in checks.OPERATOR_TESTS if name != "test_route.py"]
    checks.run_python("-m", "pytest", *options, *files, timeout=600, PADDLE_MOE_ISA=isa)


FORKED_CALL = """
import os, signal
import checks
from paddle_moe import core
core.set_num_threads(3)
case = checks.random_case(40, 64, 64)
before = core.mixture_of_experts(**case)
child = os.fork()
if child == 0:
    signal.alarm(120)  # a deadlock ends the child
    checks.assert_same_bits(core.mixture_of_experts(**case), before)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0, "the child failed or hung"
checks.assert_same_bits(core.mixture_of_experts(**case), before)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_can_call_after_its_parent_did():
    """What data loaders do; the threads of the pool do not exist in the child."""
    checks.run_python("-c", FORKED_CALL, timeout=300)


# ---------------------------------------------------------------- anything goes


@st.composite
def cases(draw):
    num_experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, 4))
    num_tokens = draw(st.integers(0, 20))
    experts_min = draw(st.integers(0, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(DTYPES))
    case = random_case(
        num_tokens,
        draw(st.integers(1, 70)),
        draw(st.integers(1, 70)),
        num_experts,
        1,
        dtype,
        layout=draw(st.sampled_from(LAYOUTS)),
        permuted=draw(st.booleans()),
        bias=draw(st.booleans()),
        bias_dtype=draw(st.sampled_from([None, "float32"])),
        seed=rng,
        activation=draw(st.sampled_from(ACTIVATIONS)),
        experts_min=experts_min,
        measurement_mode=True,
        chunk_size=draw(st.integers(0, 25)),
    )
    # Duplicates, foreign ids on both sides, zero and negative weights.
    table = rng.integers(experts_min - 2, experts_min + num_experts + 2, (num_tokens, top_k))
    case["routing_table"] = table.astype(draw(st.sampled_from(["int32", "int64"])))
    case["router_weights"] = rng.standard_normal((num_tokens, top_k)).astype(np.float32)
    case["router_weights"][rng.random((num_tokens, top_k)) < 0.1] = 0
    return case


def check_against_reference(backend, case):
    out, amax = backend.mixture_of_experts(**case)
    expected, expected_amax = expected_moe(case)
    # Random signs can cancel a row almost entirely, so single values may lose more than on average.
    assert_close(out, expected, slack=4)
    np.testing.assert_allclose(amax, expected_amax, rtol=1e-5, atol=1e-6)


@hypothesis.given(case=cases())
def test_any_call_matches_the_reference(case):
    check_against_reference(checks.Core(), case)


@hypothesis.settings(max_examples=15)
@hypothesis.given(case=cases())
def test_any_paddle_call_matches_the_reference(case):
    check_against_reference(checks.Paddle(), case)


@pytest.mark.slow
@hypothesis.settings(max_examples=2000)
@hypothesis.given(case=cases())
def test_any_call_matches_the_reference_at_length(case):
    check_against_reference(checks.Core(), case)


@pytest.mark.slow
@per_permuted
@per_dtype
def test_every_small_size(core, dtype, permuted):
    for hidden in range(1, 40):
        for inter in range(1, 40):
            case = random_case(5, hidden, inter, 2, 1, dtype, permuted=permuted)
            assert_close(core.mixture_of_experts(**case), expected_moe(case), slack=4)


@pytest.mark.slow
@per_dtype
def test_model_sized_layer(core, dtype):
    """A layer of the size of OLMoE: H = 2048, I = 1024, K = 8, here with 16 of its 64 experts."""
    case = random_case(24, 2048, 1024, 16, 8, dtype, layout="stacked", permuted=True)
    assert_close(core.mixture_of_experts(**case), expected_moe(case), slack=2)
