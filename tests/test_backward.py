"""Gradients of mixture_of_experts, gate and route by paddle_moe.core.

They are compared with the reference, which is itself checked against finite differences.
"""

from __future__ import annotations

import functools
import os
import re
import tracemalloc

import hypothesis
import numpy as np
import pytest
from checks import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    assert_close,
    assert_same_bits,
    per_dtype,
    per_layout,
    random_case,
    run_python,
)
from gradient_cases import (
    assert_gradients_close,
    assert_same_gradients,
    expected_gradients,
    flat,
    forward_and_backward,
    grad_out_of,
    poisoned,
)
from hypothesis import strategies as st

from paddle_moe import core, reference
from paddle_moe.core import Gradients
from paddle_moe.reference import to_float64, to_storage

# ---------------------------------------------------------------- the reference against finite differences


def finite_difference(function, array: np.ndarray, direction: np.ndarray, step: float = 1e-5) -> float:
    return (function(array + step * direction) - function(array - step * direction)) / (2 * step)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "layout, permuted, bias", [("list", False, True), ("separate", True, True), ("stacked", False, False)]
)
def test_the_reference_agrees_with_finite_differences(activation, layout, permuted, bias):
    case = random_case(9, 7, 6, 4, 2, layout=layout, permuted=permuted, bias=bias, activation=activation)
    case["routing_table"][3, 1] = -1
    case = {
        name: [to_float64(a) for a in value]
        if isinstance(value, list)
        else to_float64(value)
        if name in Gradients._fields
        else value
        for name, value in case.items()
    }
    rng = np.random.default_rng(2)
    grad_out = rng.standard_normal(case["hidden_states"].shape)
    gradients = reference.mixture_of_experts_backward(grad_out, **case)
    for name, gradient in gradients.items():
        arrays = case[name] if isinstance(case[name], list) else [case[name]]
        for index, part in enumerate(gradient if isinstance(gradient, list) else [gradient]):
            direction = rng.standard_normal(part.shape)

            def loss(value, index=index):
                changed = [value if i == index else a for i, a in enumerate(arrays)]
                changed = changed if isinstance(case[name], list) else changed[0]
                return np.sum(grad_out * reference.mixture_of_experts(**{**case, name: changed}))

            difference = finite_difference(loss, arrays[index], direction)
            np.testing.assert_allclose(np.sum(part * direction), difference, rtol=1e-6, atol=1e-7)


ROUTINGS = {
    "softmax": {},
    "softmax, not renormalised": {"renormalize": False},
    "sigmoid": {"scoring": "sigmoid", "scaling_factor": 2.5, "renormalize_eps": 1e-2},
    "sigmoid, not renormalised": {"scoring": "sigmoid", "renormalize": False},
    "softmax_topk": {"scoring": "softmax_topk", "scaling_factor": 0.5},
    "groups": {"scoring": "sigmoid", "num_groups": 4, "topk_groups": 2, "group_score": "top2_sum"},
}


def route_options(name: str) -> tuple[dict, dict]:
    """All options of a case, and those that matter to the gradient."""
    options = dict(ROUTINGS[name])
    if "groups" in name:
        options["correction_bias"] = np.random.default_rng(4).standard_normal(16).astype(np.float32)
    selecting = ("num_groups", "topk_groups", "group_score", "correction_bias")
    return options, {key: value for key, value in options.items() if key not in selecting}


@pytest.mark.parametrize("name", ROUTINGS)
def test_the_reference_of_route_agrees_with_finite_differences(name):
    rng = np.random.default_rng(3)
    logits, direction = rng.standard_normal((2, 11, 16))
    grad = rng.standard_normal((11, 4))
    options, gradient_options = route_options(name)
    table, _ = reference.route(logits, 4, **options)
    gradient = reference.route_backward(grad, table, logits, **gradient_options)
    difference = finite_difference(
        lambda x: np.sum(grad * reference.route(x, 4, **options)[1]), logits, direction
    )
    np.testing.assert_allclose(np.sum(gradient * direction), difference, rtol=1e-6)


# ---------------------------------------------------------------- the kernels against the reference


@per_dtype
@per_layout
@pytest.mark.parametrize("permuted", [False, True], ids=["plain", "permuted"])
@pytest.mark.parametrize("bias", [None, "same", "float32"])
def test_gradients_in_every_layout(dtype, layout, permuted, bias):
    bias_dtype = None if bias == "same" else bias
    case = random_case(
        65,
        70,
        45,
        6,
        3,
        dtype,
        layout=layout,
        permuted=permuted,
        bias=bias is not None,
        bias_dtype=bias_dtype,
    )
    case["routing_table"][case["routing_table"] == 4] = -1  # an expert without tokens
    grad_out = grad_out_of(case)
    expected = expected_gradients(case, grad_out)
    gradients = forward_and_backward(case, grad_out)
    assert_gradients_close(gradients, expected, dtype)
    assert_same_gradients(forward_and_backward(case, grad_out, save=False), gradients)


@per_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_every_activation(dtype, activation):
    case = random_case(64, 48, 40, 4, 2, dtype, bias=True, activation=activation)
    grad_out = grad_out_of(case)
    assert_gradients_close(forward_and_backward(case, grad_out), expected_gradients(case, grad_out), dtype)


@hypothesis.given(
    tokens=st.integers(0, 70),
    hidden=st.integers(1, 140),
    inter=st.integers(1, 140),
    experts=st.integers(1, 7),
    top_k=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    permuted=st.booleans(),
    bias=st.booleans(),
    chunk_size=st.sampled_from([0, 1, 5, 32]),
    seed=st.integers(0, 1000),
)
@hypothesis.settings(max_examples=40)
def test_gradients_of_any_size(
    tokens, hidden, inter, experts, top_k, dtype, layout, permuted, bias, chunk_size, seed
):
    options = {"layout": layout, "permuted": permuted, "bias": bias, "seed": seed, "chunk_size": chunk_size}
    case = random_case(tokens, hidden, inter, experts, min(top_k, experts), dtype, **options)
    rng = np.random.default_rng(seed)
    case["routing_table"][rng.random(case["routing_table"].shape) < 0.2] = -1
    grad_out = grad_out_of(case)
    gradients = forward_and_backward(case, grad_out)
    expected = expected_gradients(case, grad_out)
    # The terms of a bias may cancel, most of all where it has one element: what counts is their size.
    of_tokens = [
        flat(expected_gradients(case, np.where(row, grad_out, 0)))
        for row in np.eye(tokens, dtype=bool)[..., None]
    ]
    scale = {
        name: np.linalg.norm(sum(np.abs(t[name]) for t in of_tokens) if "bias" in name else array)
        for name, array in flat(expected).items()
    }
    tolerance = {"float32": 4e-6, "bfloat16": 8e-3, "float16": 1e-3}[dtype]
    for name, array in flat(gradients).items():
        error = np.linalg.norm(to_float64(array) - flat(expected)[name])
        assert error <= tolerance * max(scale[name], 1e-3), name
    assert_same_gradients(forward_and_backward({**case, "chunk_size": 0}, grad_out), gradients)


@per_dtype
def test_gradients_that_go_past_the_caches(dtype):
    experts = 2 if dtype == "float32" else 4
    case = random_case(12, 1100, 1300, experts, 1, dtype, layout="stacked")  # rows in and out of alignment
    assert case["gate_up_weights"].nbytes + case["down_weights"].nbytes > 32 << 20
    grad_out = grad_out_of(case)
    gradients = forward_and_backward(case, grad_out)
    assert_gradients_close(gradients, expected_gradients(case, grad_out), dtype)
    assert_same_gradients(forward_and_backward({**case, "chunk_size": 5}, grad_out), gradients)


def test_gradients_of_weights_with_any_strides():
    case = random_case(40, 32, 24, 3, 2, layout="stacked", bias=True)
    grad_out = grad_out_of(case)
    expected = forward_and_backward(case, grad_out)

    def strided(array):
        wide = np.full((array.shape[0] + 1, array.shape[1] * 2, array.shape[2] * 3), np.nan, array.dtype)
        return wide[1:, ::2, ::3]

    views = Gradients(None, None, strided(case["gate_up_weights"]), strided(case["down_weights"]))
    gradients = core.mixture_of_experts_backward(grad_out, **case, out=views)
    assert np.shares_memory(gradients.down_weights, views.down_weights)
    for name in ("gate_up_weights", "down_weights"):
        assert_same_bits(getattr(gradients, name), getattr(expected, name))
        base = getattr(gradients, name).base
        assert np.count_nonzero(~np.isnan(base)) == getattr(expected, name).size  # nothing beside the view

    once = np.empty_like(case["down_weights"][:1])
    twice = np.lib.stride_tricks.as_strided(once, case["down_weights"].shape, (0, *once.strides[1:]))
    with pytest.raises(
        ValueError, match=r"gradient of down_weights must have an element for each index, .*\[0, "
    ):
        core.mixture_of_experts_backward(grad_out, **case, out=views._replace(down_weights=twice))

    wide = np.full((40, 50), np.nan, np.float32)
    wide[:, 9:41] = grad_out
    assert_same_gradients(forward_and_backward(case, wide[:, 9:41]), expected)


@pytest.mark.parametrize("num_tokens", [5, 90])
def test_gradients_of_gate_and_up_stored_in_different_orders(num_tokens):
    case = random_case(num_tokens, 70, 45, layout="separate")
    weights, grad_out = case["gate_up_weights"], grad_out_of(case)
    expected = expected_gradients(case, grad_out)
    for half in (slice(None, len(weights) // 2), slice(len(weights) // 2, None)):
        mixed = list(weights)
        mixed[half] = [matrix.T.copy().T for matrix in weights[half]]
        gradients = forward_and_backward({**case, "gate_up_weights": mixed}, grad_out)
        assert_gradients_close(gradients, expected, "float32")


# ---------------------------------------------------------------- bits


@pytest.mark.parametrize("activation", [one for one in ACTIVATIONS if one != "relu2"])
def test_gradients_of_the_largest_gates_are_finite(activation):
    """relu2 has squares of them in its result."""
    case = random_case(40, 32, 24, 3, 2, layout="stacked", activation=activation)
    case["hidden_states"][:] = 0
    case["hidden_states"][::2, 0], case["hidden_states"][1::2, 0] = 1e16, -1e16
    case["gate_up_weights"][:, 0, :24] = 3e3  # gates
    case["gate_up_weights"][:, 0, 24:] = 1e-16  # ups
    assert np.isfinite(core.mixture_of_experts(**case)).all()
    for gradient in forward_and_backward(case, grad_out_of(case)):
        assert gradient is None or np.isfinite(gradient).all()


@per_dtype
def test_bits_do_not_depend_on_threads_chunks_or_what_is_kept(dtype, threads):
    case = random_case(130, 96, 72, 6, 2, dtype, bias=True)
    grad_out = grad_out_of(case)
    threads(1)
    expected = forward_and_backward(case, grad_out)
    for count in (1, 2, 3):
        threads(count)
        for chunk_size in (0, 7, 64):
            for save in (False, True):
                gradients = forward_and_backward({**case, "chunk_size": chunk_size}, grad_out, save=save)
                assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("isa", core.available_isas()[1:])
def test_every_instruction_set_is_right(isa):
    run_python(
        "-c",
        "import checks, gradient_cases as t\n"
        "for dtype in checks.DTYPES:\n"
        "    case = checks.random_case(65, 70, 45, 6, 3, dtype, layout='separate', bias=True)\n"
        "    grad_out = t.grad_out_of(case)\n"
        "    expected = t.expected_gradients(case, grad_out)\n"
        "    t.assert_gradients_close(t.forward_and_backward(case, grad_out), expected, dtype)\n",
        timeout=300,
        PADDLE_MOE_ISA=isa,
    )


# ---------------------------------------------------------------- isolation


@per_dtype
def test_an_expert_that_nobody_chose_gets_zeros_even_when_its_weights_are_nan(dtype):
    case = random_case(30, 40, 24, 5, 2, dtype, bias=True)
    case["routing_table"][case["routing_table"] == 2] = -1
    for name in ("gate_up_weights", "down_weights", "gate_up_bias", "down_bias"):
        case[name][2] = to_storage(np.full(case[name][2].shape, np.nan), dtype)
    gradients = forward_and_backward(case, grad_out_of(case))
    for name, array in flat(gradients).items():
        values = to_float64(array)
        assert np.isfinite(values).all(), name
        if name.endswith("[2]"):
            assert not values.any(), name
    assert not to_float64(gradients.router_weights)[case["routing_table"] < 0].any()


def test_a_nan_token_spoils_only_what_it_touches():
    case = random_case(30, 40, 24, 5, 2)
    grad_out = grad_out_of(case)
    clean = forward_and_backward(case, grad_out)
    case["hidden_states"][4, 3] = np.nan
    touched = set(case["routing_table"][4])
    spoiled = forward_and_backward(case, grad_out)
    others = np.arange(30) != 4
    assert_same_bits(spoiled.hidden_states[others], clean.hidden_states[others])
    assert_same_bits(spoiled.router_weights[others], clean.router_weights[others])
    assert np.isnan(spoiled.router_weights[4]).all()
    for e in range(5):
        if e in touched:
            assert np.isnan(spoiled.down_weights[e]).any()
        else:
            assert_same_bits(spoiled.down_weights[e], clean.down_weights[e])
            assert_same_bits(spoiled.gate_up_weights[e], clean.gate_up_weights[e])


@pytest.mark.parametrize("table", ["no token", "one expert", "all outside"])
def test_extreme_routings(table):
    case = random_case(0 if table == "no token" else 40, 40, 24, 4, 1, bias=True)
    case["routing_table"][:] = 2 if table == "one expert" else -1
    grad_out = grad_out_of(case)
    gradients = forward_and_backward(case, grad_out)
    assert_gradients_close(gradients, expected_gradients(case, grad_out), "float32")
    if table != "one expert":
        assert all(not array.any() for array in flat(gradients).values())


# ---------------------------------------------------------------- gate and route


@per_dtype
@pytest.mark.parametrize("weight_dtype", ["same", "float32"])
@pytest.mark.parametrize("tokens, hidden, experts", [(37, 70, 9), (300, 33, 130), (0, 16, 4)])
def test_gate_backward(dtype, weight_dtype, tokens, hidden, experts, threads):
    rng = np.random.default_rng(0)
    x = to_storage(rng.standard_normal((tokens, hidden)), dtype)
    weight = to_storage(
        rng.standard_normal((hidden, experts)), dtype if weight_dtype == "same" else "float32"
    )
    grad = rng.standard_normal((tokens, experts)).astype(np.float32)
    gradients = core.gate_backward(grad, x, weight, out=(poisoned(x), poisoned(weight)))
    for actual, expected in zip(gradients, reference.gate_backward(grad, x, weight)):
        assert_close(actual, expected, slack=2)
    threads(1)
    for actual, again in zip(gradients, core.gate_backward(grad, x, weight)):
        assert_same_bits(again, actual)


@pytest.mark.parametrize("wanted", ["hidden_states", "gate_weight"])
def test_gate_backward_computes_only_what_is_wanted(wanted):
    rng = np.random.default_rng(0)
    grad, x, weight = (rng.standard_normal(shape).astype("float32") for shape in ((7, 9), (7, 16), (16, 9)))
    out = poisoned(x), poisoned(weight)
    gradients = core.gate_backward(grad, x, weight, wanted=[wanted], out=out)
    for name, array, actual, expected in zip(
        ("hidden_states", "gate_weight"), out, gradients, core.gate_backward(grad, x, weight)
    ):
        if name == wanted:
            assert actual is array
            assert_same_bits(actual, expected)
        else:
            assert actual is None and np.isnan(array).all()
    with pytest.raises(ValueError, match="wanted must hold names out of .*, got 'hidden_states'"):
        core.gate_backward(grad, x, weight, wanted="hidden_states")


@pytest.mark.parametrize("name", ROUTINGS)
def test_route_backward(name):
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((70, 16)).astype(np.float32)
    logits[5, 2] = np.nan
    grad = rng.standard_normal((70, 4)).astype(np.float32)
    options, gradient_options = route_options(name)
    table, _ = core.route(logits, 4, **options)
    assert (table[5] == -1).all()
    actual = core.route_backward(grad, table, logits, 4, **options, out=poisoned(logits))
    expected = reference.route_backward(
        grad, table, np.where(np.isnan(logits), 0, logits), **gradient_options
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    assert not actual[5].any()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "softmax_topk"])
def test_route_backward_without_eps_is_finite(scoring):
    """Also where the chosen scores, whose sum divides, are 0 or so small that 1 over them is not finite."""
    depth = np.arange(60, 120, 0.25, dtype=np.float32)
    logits = np.stack([-depth, -depth - 1, np.zeros_like(depth), np.ones_like(depth)], axis=1)
    table = np.tile(np.int32([0, 1]), (len(logits), 1))
    grad = np.random.default_rng(4).standard_normal(table.shape).astype(np.float32) * 3
    options = {"scoring": scoring, "renormalize_eps": 0.0}
    gradient = core.route_backward(grad, table, logits, 2, **options, out=poisoned(logits))
    assert np.isfinite(gradient).all()
    expected = reference.route_backward(grad, table, logits, **options)
    known = depth < (1000 if scoring == "softmax_topk" else 80)
    np.testing.assert_allclose(gradient[known], expected[known], rtol=1e-4, atol=1e-6)
    assert known.all() or not gradient[depth > 110].any()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "softmax_topk"])
def test_route_backward_of_an_id_that_appears_twice(scoring):
    logits = np.float32([[0.5, 1, -1, 0]])
    grad, table = np.float32([[1, 2]]), np.int32([[1, 1]])
    for renormalize in (True, False):
        options = {"scoring": scoring, "renormalize": renormalize, "renormalize_eps": 0.0}
        actual = core.route_backward(grad, table, logits, 2, **options)
        if renormalize or scoring == "softmax_topk":  # the weights are a half each, whatever the logits are
            expected = np.zeros_like(actual)
        else:
            expected = core.route_backward(np.float32([[3]]), table[:, :1], logits, 1, **options)
            assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
        reference_gradient = reference.route_backward(grad, table, logits, **options)
        np.testing.assert_allclose(reference_gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(
    "PADDLE_MOE_EMULATED_CAPABILITY" not in os.environ, reason="a ValueError on a CPU, see test_bad_input.py"
)
@pytest.mark.parametrize("row", [[1, -1], [-1, 1], [0, 16]])
def test_route_backward_of_a_changed_table_is_not_a_number_on_a_gpu(row):
    logits = np.random.default_rng(3).standard_normal((70, 16)).astype(np.float32)
    table, weights = core.route(logits, 2)
    table[66] = row
    gradient = core.route_backward(np.ones_like(weights), table, logits, 2, out=np.zeros_like(logits))
    assert np.isnan(gradient[66]).all() and np.isfinite(np.delete(gradient, 66, 0)).all()


# ---------------------------------------------------------------- mutations


def mutated(expected: dict, name: str, change) -> dict:
    return {**expected, name: change(expected[name])}


def swap_halves(gradients: list) -> list:
    return [np.concatenate(np.split(gradient, 2, axis=1)[::-1], axis=1) for gradient in gradients]


def gradient_with(case, name, **changed):
    """The expected gradient of `name` where some arguments are others."""
    return expected_gradients({**case, **changed}, grad_out_of(case))[name]


def equal_weights(case):
    return case["router_weights"] * 0 + 0.5


MUTATIONS = {
    "gate and up are swapped": lambda e, c: mutated(e, "gate_up_weights", swap_halves),
    "an expert is dropped": lambda e, c: mutated(
        e, "down_weights", lambda g: [part * (i != 2) for i, part in enumerate(g)]
    ),
    "the router weight is missing in down": lambda e, c: mutated(
        e, "down_weights", lambda g: gradient_with(c, "down_weights", router_weights=equal_weights(c))
    ),
    "the router weight is missing in hidden_states": lambda e, c: mutated(
        e, "hidden_states", lambda g: gradient_with(c, "hidden_states", router_weights=equal_weights(c))
    ),
    "the down bias is missing in the router's gradient": lambda e, c: mutated(
        e,
        "router_weights",
        lambda g: gradient_with(c, "router_weights", down_bias=[0 * b for b in c["down_bias"]]),
    ),
    "one token is missing in hidden_states": lambda e, c: mutated(
        e, "hidden_states", lambda g: g * (np.arange(len(g)) != 7)[:, None]
    ),
    "one slot is missing in a bias": lambda e, c: mutated(
        e,
        "down_bias",
        lambda g: [
            part - grad_out_of(c)[0] * (i == c["routing_table"][0, 0]) for i, part in enumerate(g)
        ],
    ),
    "gelu instead of silu": lambda e, c: expected_gradients({**c, "activation": "gelu"}, grad_out_of(c)),
    "down is transposed": lambda e, c: mutated(e, "down_weights", lambda g: [part.T for part in g]),
    "scaled by 1.001": lambda e, c: mutated(e, "gate_up_bias", lambda g: [1.001 * part for part in g]),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_gradient_is_reported(mutation):
    case = random_case(65, 48, 48, 5, 2, bias=True)
    grad_out = grad_out_of(case)
    expected = expected_gradients(case, grad_out)
    gradients = forward_and_backward(case, grad_out)
    assert_gradients_close(gradients, expected, "float32")
    with pytest.raises(AssertionError):
        assert_gradients_close(gradients, MUTATIONS[mutation](expected, case), "float32")


# ---------------------------------------------------------------- what core refuses


def test_misuse_is_named():
    case = random_case(6, 8, 4, 3, 2)
    grad_out = grad_out_of(case)
    call = functools.partial(core.mixture_of_experts_backward, **case)
    for bad, message in (
        (dict(grad_out=grad_out[:5]), "grad_out must have the shape [T, H] = [6, 8], got [5, 8]"),
        (dict(grad_out=grad_out.astype("float16")), "grad_out must have the dtype float32, got float16"),
        (dict(grad_out=grad_out, wanted=["hidden_state"]), "wanted must hold names out of "),
        (dict(grad_out=grad_out, pre_activations=np.zeros((12, 9), "float32")),
         "pre_activations must have the shape [R, 2I] = [?, 8], got [12, 9]"),
        (dict(grad_out=grad_out, pre_activations=np.zeros((11, 8), "float32")),
         "pre_activations must have a row for each of the 12 slots with a local expert, got 11 rows"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(message)):
            call(**bad)


def test_the_size_of_the_workspace_is_found_without_making_gradients():
    case = random_case(6, 8, 64, 1024, 2)
    grad_out = grad_out_of(case)
    tracemalloc.start()
    try:
        sizes = [
            core.backward_workspace_size(grad_out, **case, wanted=wanted)
            for wanted in (None, ["hidden_states"], ["router_weights"], [])
        ]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**16, "NumPy tells tracemalloc of its arrays; the weights have 6 MiB"
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    # What reads no pre-activations computes none again.
    kept = np.empty((core.pre_activation_rows(**case), 2 * case["down_weights"][0].shape[0]), np.float32)
    for wanted, alike in (((), True), (("down_bias",), True), (("router_weights",), False)):
        size = core.backward_workspace_size(grad_out, **case, wanted=wanted)
        with_kept = core.backward_workspace_size(grad_out, **case, wanted=wanted, pre_activations=kept)
        assert (size == with_kept) == alike

    workspace = np.empty(sizes[0] - 1, np.uint8)
    with pytest.raises(ValueError, match=f"with at least {sizes[0]} bytes"):
        core.mixture_of_experts_backward(grad_out, **case, workspace=workspace)


PEAK_MEMORY = """
import os
import re
from pathlib import Path
# Each processor counts some pages of its own before Linux adds them up, and has a thread with a stack.
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import numpy as np
from paddle_moe import core

def resident(which):  # VmRSS: now; VmHWM: the peak. That of getrusage would count the parent before exec.
    return 1024 * int(re.search(which + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def touched(*shape):
    return np.ones(shape, np.float32)

tokens, hidden, inter, experts, top_k = 4096, 512, 1024, 8, 2
ids = np.random.default_rng(0).integers(0, experts, (tokens, top_k)).astype(np.int32)
x, grad_out, weights = touched(tokens, hidden), touched(tokens, hidden), touched(tokens, top_k)
stacks = touched(experts, hidden, 2 * inter), touched(experts, inter, hidden)

def run(count):
    arguments = x[:count], ids[:count], weights[:count], *stacks
    kept = np.empty((count * top_k, 2 * inter), np.float32)
    out = core.mixture_of_experts(*arguments, pre_activations=kept)
    gradients = core.mixture_of_experts_backward(grad_out[:count], *arguments, pre_activations=kept)
    return kept.nbytes + out.nbytes + sum(array.nbytes for array in gradients if array is not None)

run(8)  # threads and what else is made once
before = resident("VmRSS")
results = run(tokens)
peak = resident("VmHWM") - before
chunk = 64 << 20  # what docs/cpu_kernels.md allows beside 48 MiB of weights
print(f"results and pre-activations {results >> 20} MiB, peak {peak >> 20} MiB")
assert peak <= results + chunk + (8 << 20), (peak, results)
"""


def test_peak_memory_of_forward_and_backward():
    run_python("-c", PEAK_MEMORY, timeout=300)
