"""Few and small calls that take every path of the CUDA back end.

gpu_check.sh runs them under compute-sanitizer too, which slows a kernel down a hundredfold.
"""

from __future__ import annotations

import checks
import numpy as np
import pytest
from checks import assert_amax_close, assert_close, expected_moe, random_case

from paddle_moe import reference

if checks.why_not_cuda():
    pytest.skip(checks.why_not_cuda(), allow_module_level=True)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("hidden, inter", [(128, 128), (40, 21)])
@pytest.mark.parametrize("num_tokens", [2, 150])
@pytest.mark.parametrize("permuted", [False, True], ids=["in_out", "permuted"])
def test_a_layer(dtype, hidden, inter, num_tokens, permuted):
    case = random_case(
        num_tokens, hidden, inter, 4, 2, dtype, layout="stacked", permuted=permuted, bias=True,
        measurement_mode=True,
    )  # fmt: skip
    case["routing_table"][::5, 1] = -1
    out, amax = checks.Cuda().mixture_of_experts(**case)
    expected, expected_amax = expected_moe(case)
    assert_close(out, expected)
    assert_amax_close(amax, expected_amax)


def test_a_layer_that_routes():
    """40 tokens: two blocks route, and the one that comes last sorts."""
    case = random_case(40, 40, 21, 6, 2, "bfloat16", layout="stacked")
    for name in ("routing_table", "router_weights"):
        del case[name]
    gate_weight = np.random.default_rng(1).standard_normal((40, 6)).astype(np.float32)
    out, table, weights = checks.Cuda().fused_gate_moe(
        **case, gate_weight=gate_weight, top_k=2, return_routing=True
    )
    routing = {"routing_table": table, "router_weights": weights}
    np.testing.assert_array_equal(
        table, reference.route(reference.gate(case["hidden_states"], gate_weight), 2)[0]
    )
    assert_close(out, expected_moe({**case, **routing}))


def test_a_gate_and_a_routing():
    rng = np.random.default_rng(0)
    hidden = reference.to_storage(rng.standard_normal((37, 50)), "bfloat16")
    logits = checks.Cuda().gate(hidden, rng.standard_normal((50, 24)).astype(np.float32))
    options = {"num_groups": 4, "topk_groups": 2, "group_score": "top2_sum", "scoring": "sigmoid"}
    table, weights = checks.Cuda().route(logits, 3, **options)
    expected_table, expected_weights = reference.route(logits, 3, **options)
    np.testing.assert_array_equal(table, expected_table)
    np.testing.assert_allclose(weights, expected_weights, rtol=2e-6)
