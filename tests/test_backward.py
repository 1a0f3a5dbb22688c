"""Gradients of mixture_of_experts, gate and route, and how Paddle's autograd uses them.

They are compared with the reference, which is itself checked against finite differences.
"""

from __future__ import annotations

import contextlib
import functools
import re

import hypothesis
import numpy as np
import paddle
import pytest
from checks import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    assert_close,
    assert_same_bits,
    dtype_of,
    random_case,
    relative_l2,
)
from hypothesis import strategies as st

import paddle_moe
from paddle_moe import core, reference
from paddle_moe.core import Gradients
from paddle_moe.reference import to_float64, to_storage

per_dtype = pytest.mark.parametrize("dtype", DTYPES)
per_layout = pytest.mark.parametrize("layout", LAYOUTS)


def local_rows(case: dict) -> int:
    first = case.get("experts_min", 0)
    count = len(case["down_weights"])
    return int(np.count_nonzero((case["routing_table"] >= first) & (case["routing_table"] < first + count)))


def grad_out_of(case: dict, seed: int = 1) -> np.ndarray:
    x = case["hidden_states"]
    return to_storage(np.random.default_rng(seed).standard_normal(x.shape), dtype_of(x))


def poisoned(like) -> np.ndarray | list:
    if isinstance(like, list):
        return [poisoned(array) for array in like]
    return np.full(like.nbytes, 0xFF, np.uint8).view(like.dtype).reshape(like.shape)


def forward_and_backward(case: dict, grad_out: np.ndarray, *, save: bool = True, **options) -> Gradients:
    """Gradients by paddle_moe.core; every result, the workspaces and the pre-activations start as NaN."""
    pre_activations = None
    if save:
        inter = case["down_weights"][0].shape[1 if case.get("permuted_weights") else 0]
        shape = (core.pre_activation_rows(**case), 2 * inter)
        pre_activations = poisoned(np.empty(shape, case["hidden_states"].dtype))
        core.mixture_of_experts(**case, pre_activations=pre_activations)
    size = core.backward_workspace_size(grad_out, **case, pre_activations=pre_activations, **options)
    out = Gradients(*(None if case.get(n) is None else poisoned(case[n]) for n in Gradients._fields))
    return core.mixture_of_experts_backward(
        grad_out,
        **case,
        pre_activations=pre_activations,
        out=out,
        workspace=np.full(size, 0xFF, np.uint8),
        **options,
    )


def expected_gradients(case: dict, grad_out: np.ndarray) -> dict:
    case = {name: value for name, value in case.items() if name != "chunk_size"}
    return reference.mixture_of_experts_backward(
        grad_out, **case, round_intermediate=dtype_of(case["hidden_states"])
    )


def flat(gradients) -> dict[str, np.ndarray]:
    """Every array of Gradients, or of a dict like it, by a name of its own."""
    items = gradients._asdict() if isinstance(gradients, Gradients) else gradients
    arrays = {}
    for name, value in items.items():
        if value is not None:
            parts = value if isinstance(value, list) else [value]
            arrays.update({f"{name}[{i}]": part for i, part in enumerate(parts)})
    return arrays


def assert_gradients_close(actual, expected, dtype: str) -> None:
    """By all arrays of an argument together, each held to what its own dtype and that of the rows allow."""
    actual, expected = flat(actual), flat(expected)
    assert actual.keys() == expected.keys()
    for name, array in actual.items():
        exact = expected[name]
        assert array.shape == exact.shape
        if dtype_of(array) == dtype:
            matrix = (
                exact.reshape(len(exact), -1) if exact.size else exact
            )  # an expert of a stacked array is a row
            assert_close(array.reshape(matrix.shape), matrix, slack=4)
        else:  # float32 gradients of half-precision rows: a row that rounded the other way shows
            tolerance = {"bfloat16": 2e-3, "float16": 2e-4}[dtype]
            assert relative_l2(to_float64(array), exact) <= tolerance, name


def assert_same_gradients(actual, expected) -> None:
    actual, expected = flat(actual), flat(expected)
    assert actual.keys() == expected.keys()
    for name, array in actual.items():
        assert_same_bits(array, expected[name])


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
    scale = {name: np.linalg.norm(array) for name, array in flat(expected).items()}
    tolerance = {"float32": 4e-6, "bfloat16": 8e-3, "float16": 1e-3}[dtype]
    for name, array in flat(gradients).items():
        error = np.linalg.norm(to_float64(array) - flat(expected)[name])
        assert error <= tolerance * max(scale[name], 1e-3), name
    assert_same_gradients(forward_and_backward({**case, "chunk_size": 0}, grad_out), gradients)


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

    wide = np.full((40, 50), np.nan, np.float32)
    wide[:, 9:41] = grad_out
    assert_same_gradients(forward_and_backward(case, wide[:, 9:41]), expected)


# ---------------------------------------------------------------- bits


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
    from checks import run_python

    run_python(
        "-c",
        "import checks, test_backward as t\n"
        "for dtype in checks.DTYPES:\n"
        "    case = checks.random_case(65, 70, 45, 6, 3, dtype, layout='separate', bias=True)\n"
        "    grad_out = t.grad_out_of(case)\n"
        "    expected = t.expected_gradients(case, grad_out)\n"
        "    t.assert_gradients_close(t.forward_and_backward(case, grad_out), expected, dtype)\n",
        timeout=120,
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


# ---------------------------------------------------------------- Paddle's autograd


def to_paddle(case: dict, trained=Gradients._fields) -> dict:
    def tensor(array, name):
        result = paddle.to_tensor(array)
        result.stop_gradient = name not in trained
        return result

    return {
        name: [tensor(part, name) for part in value] if isinstance(value, list)
        else tensor(value, name) if isinstance(value, np.ndarray) else value
        for name, value in case.items()
    }  # fmt: skip


def grads_of(tensors: dict) -> dict:
    return {
        name: None if tensors[name] is None
        else [t.grad if t.grad is None else t.grad.numpy() for t in tensors[name]]
        if isinstance(tensors[name], list)
        else tensors[name].grad if tensors[name].grad is None else tensors[name].grad.numpy()
        for name in Gradients._fields if name in tensors
    }  # fmt: skip


@per_dtype
@per_layout
@pytest.mark.parametrize("recompute", [False, True])
def test_paddle_gives_the_bits_of_core(dtype, layout, recompute):
    case = random_case(33, 70, 45, 5, 2, dtype, layout=layout, bias=True, permuted=layout == "stacked")
    grad_out = grad_out_of(case)
    tensors = to_paddle(case)
    paddle_moe.mixture_of_experts(**tensors, recompute=recompute).backward(paddle.to_tensor(grad_out))
    assert_same_gradients(grads_of(tensors), forward_and_backward(case, grad_out))


def eager_moe(
    hidden_states, routing_table, router_weights, gate_up_weights, down_weights, gate_up_bias, down_bias
):
    """What a user would write: Paddle's own operators and their gradients, one expert after the other."""
    out = paddle.zeros_like(hidden_states)
    for e, (gate_up, down) in enumerate(zip(gate_up_weights, down_weights)):
        weight = paddle.sum(router_weights * (routing_table == e).astype("float32"), axis=1, keepdim=True)
        gate, up = paddle.chunk(hidden_states @ gate_up + gate_up_bias[e], 2, axis=1)
        out = out + weight * ((paddle.nn.functional.silu(gate) * up) @ down + down_bias[e])
    return out


def test_gradients_agree_with_an_eager_implementation():
    case = random_case(50, 40, 32, 4, 2, bias=True)
    ours, theirs = to_paddle(case), to_paddle(case)
    theirs.pop("permuted_weights")
    grad_out = paddle.to_tensor(grad_out_of(case))
    paddle_moe.mixture_of_experts(**ours).backward(grad_out)
    eager_moe(**theirs).backward(grad_out)
    for name, array in flat(grads_of(ours)).items():
        assert relative_l2(array, flat(grads_of(theirs))[name]) < 1e-5, name


@pytest.mark.parametrize("trained", Gradients._fields)
def test_stop_gradient_on_all_but_one_argument(trained):
    case = random_case(20, 24, 16, 4, 2, bias=True)
    grad_out = grad_out_of(case)
    tensors = to_paddle(case, trained=[trained])
    paddle_moe.mixture_of_experts(**tensors).backward(paddle.to_tensor(grad_out))
    gradients = flat(grads_of(tensors))
    expected = flat(forward_and_backward(case, grad_out))
    for name in expected:
        if name.startswith(trained):
            assert_same_bits(gradients[name], expected[name])
        else:
            assert gradients.get(name) is None


def test_stop_gradient_on_some_experts():
    case = random_case(20, 24, 16, 4, 2)
    grad_out = grad_out_of(case)
    tensors = to_paddle(case)
    tensors["down_weights"][1].stop_gradient = tensors["gate_up_weights"][2].stop_gradient = True
    paddle_moe.mixture_of_experts(**tensors).backward(paddle.to_tensor(grad_out))
    gradients, expected = flat(grads_of(tensors)), flat(forward_and_backward(case, grad_out))
    for name, array in gradients.items():
        if name in ("down_weights[1]", "gate_up_weights[2]"):
            assert array is None
        else:
            assert_same_bits(array, expected[name])


def test_gradients_accumulate_over_calls_and_uses_of_one_weight():
    case = random_case(20, 24, 16, 4, 2)
    grad_out = grad_out_of(case)
    once = forward_and_backward(case, grad_out)
    tensors = to_paddle(case)
    for _ in range(2):
        paddle_moe.mixture_of_experts(**tensors).backward(paddle.to_tensor(grad_out))
    for name, array in flat(grads_of(tensors)).items():
        assert_same_bits(array, 2 * flat(once)[name])
    both = to_paddle(case)
    (paddle_moe.mixture_of_experts(**both) + paddle_moe.mixture_of_experts(**both)).backward(
        paddle.to_tensor(grad_out)
    )
    assert_same_gradients(grads_of(both), grads_of(tensors))
    both["hidden_states"].clear_grad()
    paddle_moe.mixture_of_experts(**both).backward(paddle.to_tensor(grad_out))
    assert_same_bits(both["hidden_states"].grad.numpy(), once.hidden_states)


def test_paddle_grad_transposed_gradients_and_no_grad():
    case = random_case(20, 20, 16, 4, 2)
    tensors = to_paddle(case)
    out = paddle_moe.mixture_of_experts(**tensors)
    grad_out = paddle.to_tensor(np.ascontiguousarray(grad_out_of(case).T))
    (gradient,) = paddle.grad(out, [tensors["hidden_states"]], grad_outputs=[grad_out.T])
    expected = forward_and_backward(case, np.ascontiguousarray(grad_out.numpy().T))
    assert_same_bits(gradient.numpy(), expected.hidden_states)
    with paddle.no_grad():
        assert paddle_moe.mixture_of_experts(**tensors).stop_gradient


class Block(paddle.nn.Layer):
    def __init__(self, num_experts=4, hidden=16, inter=12):
        super().__init__()
        self.gate_weight = self.create_parameter([hidden, num_experts])
        self.gate_up = self.create_parameter([num_experts, hidden, 2 * inter])
        self.down = self.create_parameter([num_experts, inter, hidden])

    def forward(self, hidden_states):
        return paddle_moe.fused_gate_moe(hidden_states, self.gate_weight, self.gate_up, self.down, 2)


def block_gradients(call, block, x):
    block.clear_gradients()
    x.clear_grad()
    call(x).square().mean().backward()
    return [tensor.grad.numpy() for tensor in (x, *block.parameters())]


def test_fleet_recompute_gives_the_same_bits():
    from paddle.distributed.fleet.utils import recompute

    block, x = Block(), paddle.randn([9, 16])
    x.stop_gradient = False
    expected = block_gradients(block, block, x)
    for actual, array in zip(block_gradients(functools.partial(recompute, block), block, x), expected):
        assert_same_bits(actual, array)


@contextlib.contextmanager
def auto_cast(level, dtype):
    """The state that paddle.amp.auto_cast would set; itself, it has no effect where the device is the CPU."""
    from paddle.base import core as paddle_core
    from paddle.base.framework import _dygraph_tracer

    tracer = _dygraph_tracer()
    before = tracer._amp_level, tracer._amp_dtype
    tracer._amp_level, tracer._amp_dtype = getattr(paddle_core.AmpLevel, level), dtype
    try:
        yield
    finally:
        tracer._amp_level, tracer._amp_dtype = before


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_auto_cast_computes_experts_in_half_precision_and_the_router_in_float32(level, dtype):
    case = random_case(20, 24, 16, 4, 2, bias=True)
    halves = {
        name: value
        if name in ("routing_table", "router_weights", "permuted_weights")
        else [to_storage(part, dtype) for part in value]
        if isinstance(value, list)
        else to_storage(value, dtype)
        for name, value in case.items()
    }
    grad_out = grad_out_of(halves)
    expected = flat(forward_and_backward(halves, grad_out))
    tensors = to_paddle(case)
    with auto_cast(level, dtype):
        out = paddle_moe.mixture_of_experts(**tensors)
        logits = paddle_moe.gate(tensors["hidden_states"], paddle.ones([24, 4], dtype))
    assert out.dtype == getattr(paddle, dtype)
    assert logits.dtype == paddle.float32
    out.backward(paddle.to_tensor(grad_out))
    for name, array in flat(grads_of(tensors)).items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, to_float64(expected[name]))


def kept_bytes(call):
    """Memory that the result of a call and its graph hold."""
    from paddle.base import core as paddle_core

    before = paddle_core.host_memory_stat_current_value("Allocated", 0)
    out = call()
    kept = paddle_core.host_memory_stat_current_value("Allocated", 0) - before
    del out
    return kept


def test_fused_gate_moe_passes_recompute_on():
    x, gate_weight = paddle.randn([256, 128]), paddle.randn([128, 4])
    gate_up, down = paddle.randn([4, 128, 384]), paddle.randn([4, 192, 128])
    for tensor in (x, gate_weight, gate_up, down):
        tensor.stop_gradient = False
    kept, recomputed = (
        kept_bytes(
            lambda: paddle_moe.fused_gate_moe(x, gate_weight, gate_up, down, top_k=2, recompute=recompute)
        )
        for recompute in (False, True)
    )
    pre_activations = 4 * 256 * 2 * 384
    assert abs(kept - recomputed - pre_activations) < 4096


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_between_forward_and_backward_and_in_the_backward(recompute):
    from paddle.base import core as paddle_core

    case = random_case(256, 128, 192, 4, 2, chunk_size=16)
    tensors = to_paddle(case)
    grad_out = paddle.to_tensor(grad_out_of(case))
    current = functools.partial(paddle_core.host_memory_stat_current_value, "Allocated", 0)
    before = current()
    out = paddle_moe.mixture_of_experts(**tensors, recompute=recompute)
    pre_activations = 0 if recompute else 4 * local_rows(case) * 2 * 192
    slack = 4096  # each allocation is rounded up
    assert current() - before <= 4 * 256 * 128 + pre_activations + slack
    before = current()
    paddle_core.host_memory_stat_reset_peak_value("Allocated", 0)
    out.backward(grad_out)
    gradients = sum(array.nbytes for array in flat(grads_of(tensors)).values())
    kept = None if recompute else np.zeros((local_rows(case), 2 * 192), np.float32)
    workspace = core.backward_workspace_size(grad_out.numpy(), **case, pre_activations=kept)
    peak = paddle_core.host_memory_stat_peak_value("Allocated", 0) - before
    engine = 2 * grad_out.numpy().nbytes  # Paddle's own copies of the gradient it was given
    assert peak <= gradients + workspace + engine + 16 * slack


@pytest.mark.parametrize(
    "function",
    [
        lambda x: paddle_moe.mixture_of_experts(
            x,
            paddle.zeros([3, 1], "int32"),
            paddle.ones([3, 1]),
            paddle.ones([1, 4, 4]),
            paddle.ones([1, 2, 4]),
        ),
        lambda x: paddle_moe.gate(x, paddle.ones([4, 4])),
        lambda x: paddle_moe.route(x, 2)[1],
    ],
    ids=["mixture_of_experts", "gate", "route"],
)
def test_second_derivatives_are_refused(function):
    x = paddle.randn([3, 4])
    x.stop_gradient = False
    (gradient,) = paddle.grad(function(x).square().sum(), [x], create_graph=True)
    with pytest.raises(NotImplementedError, match="paddle_moe has no second derivatives"):
        gradient.sum().backward()


def test_a_block_learns():
    paddle.seed(3)
    block, target = Block(), Block()
    optimizer = paddle.optimizer.Adam(3e-3, parameters=block.parameters())
    x = paddle.randn([64, 16])
    with paddle.no_grad():
        wanted = target(x)
    losses = []
    for _ in range(60):
        loss = (block(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
