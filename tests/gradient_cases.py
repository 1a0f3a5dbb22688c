"""Gradients by paddle_moe.core and by the reference, and how the tests compare them."""

from __future__ import annotations

import numpy as np
from checks import assert_close, assert_same_bits, dtype_of, relative_l2

from paddle_moe import core, reference
from paddle_moe.core import Gradients
from paddle_moe.reference import to_float64, to_storage


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
