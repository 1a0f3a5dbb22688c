"""Gradients through quantised weights: of hidden_states, router_weights and biases, never of the weights."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from checks import assert_same_bits, per_dtype, per_layout, relative_l2, run_python
from gradient_cases import (
    assert_gradients_close,
    assert_same_gradients,
    expected_gradients,
    flat,
    grad_out_of,
    poisoned,
)
from layer_cases import EVERYTHING, TOP_K, dense_weights
from quantized_cases import KINDS, dequantised, per_granularity, per_kind, per_storage, quantized_case
from training_cases import gradients_of_layer

import paddle_moe
from paddle_moe import FusedMoE, core
from paddle_moe.core import Gradients

WANTED = ("hidden_states", "router_weights", "gate_up_bias", "down_bias")


def case_with_biases(*sizes, layout: str = "stacked", seed: int = 0, **options) -> dict:
    """quantized_case() with biases of float32 and an expert without tokens."""
    case = quantized_case(*sizes, layout=layout, seed=seed, **options)
    rng = np.random.default_rng(seed + 1)
    hidden, num_experts = case["hidden_states"].shape[1], len(case["down_weights"])
    case["gate_up_bias"] = rng.standard_normal((num_experts, 2 * intermediate_size(case)), np.float32)
    case["down_bias"] = rng.standard_normal((num_experts, hidden), np.float32)
    if layout != "stacked":
        case["gate_up_bias"], case["down_bias"] = list(case["gate_up_bias"]), list(case["down_bias"])
    case["routing_table"][case["routing_table"] == 1] = -1
    return case


def intermediate_size(case: dict) -> int:
    separate = len(case["gate_up_weights"]) == 2 * len(case["down_weights"])
    columns = case["gate_up_weights"][0].shape[0 if case["permuted_weights"] else 1]
    return columns if separate else columns // 2


def kept_pre_activations(case: dict) -> np.ndarray:
    rows = core.pre_activation_rows(**case)
    kept = poisoned(np.empty((rows, 2 * intermediate_size(case)), case["hidden_states"].dtype))
    core.mixture_of_experts(**case, pre_activations=kept)
    return kept


def gradients_of(case: dict, grad_out: np.ndarray, pre_activations=None, wanted=WANTED) -> Gradients:
    """By core; results and workspace start as NaN."""
    wanted = tuple(name for name in wanted if name in case)
    call = {**case, "pre_activations": pre_activations, "wanted": wanted}
    size = core.backward_workspace_size(grad_out, **call)
    out = Gradients(**{name: poisoned(case[name]) for name in wanted})
    return core.mixture_of_experts_backward(
        grad_out, **call, out=out, workspace=np.full(size, 0xFF, np.uint8)
    )


def assert_right(case: dict, dtype: str) -> None:
    grad_out = grad_out_of(case)
    expected = expected_gradients(dequantised(case), grad_out)
    gradients = gradients_of(case, grad_out)
    assert_gradients_close(gradients, {name: expected[name] for name in WANTED if name in case}, dtype)
    assert_same_gradients(gradients_of(case, grad_out, kept_pre_activations(case)), gradients)


@per_storage
@per_granularity
@per_layout
def test_against_the_reference(kind, granularity, layout, permuted):
    for dtype, num_tokens in (("float32", 9), ("bfloat16", 70), ("float16", 40)):
        case = case_with_biases(
            num_tokens, dtype=dtype, kind=kind, granularity=granularity, layout=layout, permuted=permuted
        )
        assert_right(case, dtype)


@per_storage
@pytest.mark.parametrize("hidden, inter", [(1, 1), (63, 129), (600, 65), (128, 257)])
def test_sizes(kind, permuted, hidden, inter):
    """Blocks of the depth end at 256, those of columns at 64 and 128, groups of scales at 128."""
    for granularity in ("channel", "group", "block"):
        case = quantized_case(
            200,
            hidden,
            inter,
            2,
            1,
            kind=kind,
            granularity=granularity,
            permuted=permuted,
            activation="relu2",
        )
        assert_right(case, "float32")


@per_granularity
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [1, 9, 400])
def test_the_bits_of_dequantised_weights(kind, granularity, num_tokens):
    """Where both saw the same pre-activations: what a weight stands for is rounded once, to float32."""
    case = quantized_case(num_tokens, 600, kind=kind, granularity=granularity, permuted=True)
    grad_out, kept = grad_out_of(case), kept_pre_activations(case)
    expected = gradients_of(dequantised(case), grad_out, kept)
    assert_same_gradients(gradients_of(case, grad_out, kept), expected)


@per_dtype
@per_kind
def test_bits_do_not_depend_on_threads_chunks_or_what_is_kept(kind, dtype, threads):
    case = case_with_biases(130, dtype=dtype, kind=kind, granularity="group", permuted=True)
    grad_out = grad_out_of(case)
    threads(1)
    expected = gradients_of(case, grad_out)
    kept = kept_pre_activations(case)
    for count in (1, 2, 3):
        threads(count)
        for chunk_size in (0, 7, 64):
            for pre_activations in (None, kept):
                chunked = {**case, "chunk_size": chunk_size}
                assert_same_gradients(gradients_of(chunked, grad_out, pre_activations), expected)


@per_storage
def test_bits_of_a_token_do_not_depend_on_the_others(kind, permuted):
    case = quantized_case(300, kind=kind, granularity="block", dtype="bfloat16", permuted=permuted)
    grad_out, wanted = grad_out_of(case), WANTED[:2]
    whole = gradients_of(case, grad_out, wanted=wanted)
    for first, end in ((0, 1), (7, 12), (100, 300)):
        part = {
            **case,
            **{n: case[n][first:end] for n in ("hidden_states", "routing_table", "router_weights")},
        }
        gradients = gradients_of(part, grad_out[first:end], wanted=wanted)
        for name, array in flat(gradients).items():
            assert_same_bits(array, flat(whole)[name][first:end])


@pytest.mark.parametrize("isa", core.available_isas()[1:])
def test_every_instruction_set_is_right(isa):
    run_python(
        "-c",
        "import quantized_cases as q, test_quantized_gradients as t\n"
        "for kind in q.KINDS:\n"
        "    for dtype in ('float32', 'bfloat16'):\n"
        "        t.assert_right(t.case_with_biases(65, kind=kind, dtype=dtype, granularity='group',\n"
        "                                          permuted=True), dtype)\n",
        timeout=300,
        PADDLE_MOE_ISA=isa,
    )


def test_arrays_with_strides():
    """Scales that are a view, and int8 weights whose rows are further apart than their length."""
    case = quantized_case(20, granularity="group")
    grad_out = grad_out_of(case)
    expected = gradients_of(case, grad_out)
    for name in ("gate_up_weights", "down_weights", "gate_up_scale", "down_scale"):
        array = case[name]
        wide = poisoned(np.empty((*array.shape[:-1], 2 * array.shape[-1]), array.dtype))
        wide[..., ::2] = array
        case[name] = wide[..., ::2]
    assert_same_gradients(gradients_of(case, grad_out), expected)


# ---------------------------------------------------------------- what has no gradient


@per_kind
def test_weights_and_scales_have_no_gradient(kind):
    case = quantized_case(kind=kind, permuted=True)
    grad_out = grad_out_of(case)
    name = {"int4": "int4 in int32"}.get(kind, kind)
    for wanted in ("gate_up_weights", "down_weights"):
        with pytest.raises(ValueError, match=f"^{wanted} has no gradient where .* got the dtype {name}; "):
            core.mixture_of_experts_backward(grad_out, **case, wanted=(wanted,))


def test_by_default_all_gradients_that_there_are():
    case = case_with_biases()
    gradients = core.mixture_of_experts_backward(grad_out_of(case), **case)
    assert [name for name, value in gradients._asdict().items() if value is not None] == list(WANTED)
    assert_same_gradients(gradients, gradients_of(case, grad_out_of(case)))


@pytest.mark.parametrize("name", ["gate_up_weights", "down_weights", "gate_up_scale", "down_scale"])
def test_paddle_says_what_has_no_gradient(name):
    tensors = as_tensors(quantized_case(), trained=[name])
    out = paddle_moe.mixture_of_experts(**tensors)  # raises nothing: a call may be for inference
    with pytest.raises(ValueError, match=f"{name} has no gradient where the weights are quantised"):
        out.sum().backward()


# ---------------------------------------------------------------- Paddle


def as_tensors(case: dict, trained) -> dict:
    tensors = {
        name: paddle.to_tensor(value) if isinstance(value, np.ndarray) else value
        for name, value in case.items()
    }
    for name in trained:
        tensors[name].stop_gradient = False
    return tensors


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "to_static"])
@per_kind
def test_paddle_computes_the_same(kind, compiled, recompute):
    case = case_with_biases(70, dtype="bfloat16", kind=kind, granularity="group", permuted=True)
    grad_out = grad_out_of(case)
    expected = gradients_of(case, grad_out)
    tensors = as_tensors(case, trained=WANTED)
    call = paddle.jit.to_static(paddle_moe.mixture_of_experts) if compiled else paddle_moe.mixture_of_experts
    out = call(**tensors, recompute=recompute)
    out.backward(paddle.to_tensor(grad_out))
    for name in WANTED:
        assert_same_bits(tensors[name].grad.numpy(), getattr(expected, name))
    frozen = ("gate_up_weights", "down_weights", "gate_up_scale", "down_scale")
    assert all(tensors[name].grad is None for name in frozen)


def dequantised_weights(layer: FusedMoE, prefix: str = "") -> dict[str, np.ndarray]:
    """What quantised weights of a layer of one rank stand for, as from_dense() takes them."""
    names = "gate_up_weight", "down_weight", "gate_up_scale", "down_scale"
    gate_up, down, *scales = (getattr(layer, prefix + name).numpy() for name in names)
    case = dequantised(
        {
            "gate_up_weights": gate_up,
            "down_weights": down,
            "gate_up_scale": scales[0],
            "down_scale": scales[1],
            "permuted_weights": True,
            "hidden_states": np.zeros((1, layer.hidden_size)),
        }
    )
    names = {"gate_up": "gate_up_weights", "down": "down_weights"}
    return {prefix + name: np.stack([one.T for one in case[key]]) for name, key in names.items()}


@per_kind
def test_layer(kind):
    """The router, the gates and the biases of a layer with frozen, quantised experts train."""
    dense = dense_weights(**EVERYTHING)
    layer = FusedMoE.from_dense(**dense, top_k=TOP_K).quantize_(kind, "channel")
    shared = dequantised_weights(layer, "shared_")
    weights = dequantised_weights(layer) | {name: matrices[0] for name, matrices in shared.items()}
    expected = gradients_of_layer(FusedMoE.from_dense(**{**dense, **weights}, top_k=TOP_K))
    frozen = {"gate_up_weight", "down_weight", "shared_gate_up_weight", "shared_down_weight"}
    gradients = gradients_of_layer(layer)
    assert gradients.keys() == expected.keys() - frozen
    for name, gradient in gradients.items():
        assert relative_l2(gradient, expected[name]) < 2e-6, name
