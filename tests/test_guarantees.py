"""The guarantees of README.md: a token's bits depend on nothing but its inputs, and NaN stays put."""

from __future__ import annotations

import json
import os
import re
import sys
import threading

import checks
import numpy as np
import pytest
from checks import (
    ACTIVATIONS,
    LAYOUTS,
    arrange,
    assert_close,
    assert_exact,
    assert_same_bits,
    expected_moe,
    per_dtype,
    per_layout,
    per_permuted,
    random_case,
    random_dense,
    random_tokens,
)

from paddle_moe import core as kernels
from paddle_moe.reference import to_float64, to_storage


def take_tokens(case: dict, tokens) -> dict:
    """The same call with only some of its tokens, in another order."""
    return {
        **case,
        **{name: case[name][tokens] for name in ("hidden_states", "routing_table", "router_weights")},
    }


# ---------------------------------------------------------------- the same bits


@per_dtype
def test_twice_gives_the_same_bits(backend, dtype):
    case = random_case(65, 48, 40, dtype=dtype, bias=True)
    assert_same_bits(backend.mixture_of_experts(**case), backend.mixture_of_experts(**case))


@per_dtype
def test_workspace_contents_do_not_matter(core, dtype):
    case = random_case(30, 33, 21, dtype=dtype, measurement_mode=True)
    case["routing_table"][::4, 0] = -1
    (out, amax), (again, amax_again) = (core.mixture_of_experts(**case, poison=p) for p in (0xFF, 0x00))
    assert_same_bits(out, again)
    assert_same_bits(amax, amax_again)


@per_permuted
@per_dtype
def test_token_order_does_not_change_a_token(core, dtype, permuted):
    """Fault seen elsewhere: results that depend on the order of the tokens."""
    case = random_case(70, 37, 21, 4, 2, dtype, permuted=permuted)
    out = core.mixture_of_experts(**case)
    order = np.random.default_rng(3).permutation(70)
    assert_same_bits(core.mixture_of_experts(**take_tokens(case, order)), out[order])


@per_permuted
@per_dtype
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_a_token_alone_gives_the_bits_it_has_in_a_batch(core, dtype, permuted, activation):
    """Batch invariance: what else is in the batch never shows, whichever path its size selects."""
    case = random_case(513, 37, 21, 4, 2, dtype, permuted=permuted, bias=True, activation=activation)
    out = core.mixture_of_experts(**case)
    for size in (7, 64):
        assert_same_bits(core.mixture_of_experts(**take_tokens(case, slice(0, size))), out[:size])
    for token in (0, 1, 100, 511, 512):
        alone = core.mixture_of_experts(**take_tokens(case, slice(token, token + 1)))
        assert_same_bits(alone, out[token : token + 1])


# The last two are longer than a block of the depth, and end within a vector and within a pair.
@pytest.mark.parametrize("hidden, inter", [(1, 1), (8, 8), (64, 64), (1000, 1000), (2101, 40), (40, 2101)])
@per_permuted
@per_dtype
def test_batch_invariance_over_sizes(core, dtype, permuted, hidden, inter):
    case = random_case(40, hidden, inter, 2, 2, dtype, permuted=permuted)
    out = core.mixture_of_experts(**case)
    # Products of tensor cores are added in an order of their own: of long sums more round the other way.
    assert_close(out, expected_moe(case), 2.0)
    for tokens in (slice(0, 1), slice(39, 40), slice(0, 2), slice(0, 5), slice(0, 13)):
        assert_same_bits(core.mixture_of_experts(**take_tokens(case, tokens)), out[tokens])


@per_dtype
def test_local_range_does_not_change_a_token(core, dtype):
    """A token has the same bits on a rank that holds only its experts and on one that holds more."""
    rng = np.random.default_rng(0)
    dense = random_dense(rng, 6, 24, 16, dtype)
    tokens = random_tokens(rng, 12, 24, 2, 2, dtype)
    tokens["routing_table"] += 3
    full = core.mixture_of_experts(**tokens, **arrange(dense))
    part = {name: array[3:5] for name, array in dense.items()}
    assert_same_bits(core.mixture_of_experts(**tokens, **arrange(part), experts_min=3, experts_max=4), full)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 29, 30, 1000, 2**40])
@per_dtype
def test_chunk_size_does_not_change_the_bits(backend, dtype, chunk_size):
    case = random_case(29, 33, 20, 5, 3, dtype, measurement_mode=True)
    case["routing_table"][::5, 1] = -1
    whole, chunked = (
        backend.mixture_of_experts(**case),
        backend.mixture_of_experts(**case, chunk_size=chunk_size),
    )
    assert_same_bits(chunked[0], whole[0])
    assert_same_bits(chunked[1], whole[1])


def test_chunks_bound_the_workspace():
    case = random_case(4000, 64, 64, 4, 2)
    assert kernels.workspace_size(**case, chunk_size=64) < kernels.workspace_size(**case, chunk_size=4000) / 4


@per_permuted
@per_dtype
def test_number_of_threads_does_not_change_the_bits(core, threads, dtype, permuted):
    cases = [
        random_case(tokens, 70, 53, 5, 2, dtype, permuted=permuted, measurement_mode=True)
        for tokens in (1, 6, 150)
    ]
    cases[2]["routing_table"][:, 0] = 1  # one hot expert
    results = []
    for num_threads in (1, 2, 3, 5):
        threads(num_threads)
        assert kernels.get_num_threads() == num_threads
        results.append([core.mixture_of_experts(**case) for case in cases])
    for other in results[1:]:
        for (out, amax), (out_1, amax_1) in zip(other, results[0]):
            assert_same_bits(out, out_1)
            assert_same_bits(amax, amax_1)


@per_permuted
@per_dtype
def test_layouts_of_one_storage_order_give_the_same_bits(backend, dtype, permuted):
    case = {"dtype": dtype, "permuted": permuted, "bias": True}
    first, *others = (backend.mixture_of_experts(**random_case(**case, layout=layout)) for layout in LAYOUTS)
    for other in others:
        assert_same_bits(other, first)


@per_dtype
def test_core_and_paddle_give_the_same_bits(dtype):
    case = random_case(9, 19, 23, dtype=dtype, bias=True)
    assert_same_bits(checks.Paddle().mixture_of_experts(**case), checks.Core().mixture_of_experts(**case))


def test_calls_that_differ_only_in_an_option_do_not_share_a_result(backend):
    """Fault seen elsewhere: a kernel cache keyed on shapes but not on attributes."""
    case = random_case(6, experts_min=0)
    for options in (
        {},
        {"activation": "relu"},
        {"experts_min": 1},
        {"activation": "gelu"},
        {"experts_min": 2},
        {},
    ):
        changed = {**case, **options}
        assert_close(backend.mixture_of_experts(**changed), expected_moe(changed))


NO_SUCH_INSTRUCTION_SET = """
import numpy as np
from paddle_moe import core
hidden, ids, router = np.ones((1, 256), "float32"), np.zeros((1, 1), "int32"), np.ones((1, 1), "float32")
gate_up, down = np.ones((8, 256, 512), "float32"), np.ones((8, 256, 256), "float32")
call = dict(down_bias=np.ones((8, 256), "float32"), wanted=["down_bias"])
core.set_num_threads(4)
for _ in range(50):
    try:
        core.mixture_of_experts_backward(hidden, hidden, ids, router, gate_up, down, **call)
    except RuntimeError as error:
        assert "PADDLE_MOE_ISA must be one of" in str(error)
    else:
        raise AssertionError("no error")
"""


def test_no_thread_waits_for_one_that_failed():
    """The gradient of down_bias alone is the one call whose first kernel runs on a thread of the pool."""
    checks.run_python("-c", NO_SUCH_INSTRUCTION_SET, timeout=60, PADDLE_MOE_ISA="abacus")


CALLS_UNTIL_THE_END = """
import threading, time
import numpy as np
from paddle_moe import core
x, weight = np.ones((64, 256), "float32"), np.ones((256, 64), "float32")
def call():
    while True:
        core.gate(x, weight)
for _ in range(3):
    threading.Thread(target=call, daemon=True).start()
time.sleep(0.2)
"""


def test_the_interpreter_may_end_during_a_call():
    checks.run_python("-c", CALLS_UNTIL_THE_END, timeout=60)


# Prints the number of threads, and whether a call that uses them works.
DEFAULT_THREADS = """
import os, sys
import numpy as np
if sys.argv[1] == "one core":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from paddle_moe import core
if sys.argv[1] == "no threads":
    import resource
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    try:
        os.setuid(65534)  # the limit does not hold for root
    except OSError:
        print("no other user")
        sys.exit()
try:
    print(core.get_num_threads())
    logits = core.gate(np.ones((64, 8), np.float32), np.ones((8, 4), np.float32))
    assert (logits == 8).all()
    if sys.argv[1] == "no threads":  # the benchmark's own ones
        from paddle_moe import _core
        assert _core.measure_flops(False, 4) > 0
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="affinity and limits as Linux has them")
@pytest.mark.parametrize(
    ("case", "environment", "expected"),
    [
        ("one core", {}, "1"),
        ("one core", {"PADDLE_MOE_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, "3"),
        ("one core", {"OMP_NUM_THREADS": "5"}, "5"),
        ("", {"PADDLE_LOCAL_SIZE": "1000"}, "1"),
        ("", {"OMP_NUM_THREADS": "5000"}, "4096"),
        ("", {"PADDLE_MOE_NUM_THREADS": "two"}, "PADDLE_MOE_NUM_THREADS must be .* 1 to 4096, got 'two'.*"),
        ("", {"PADDLE_MOE_NUM_THREADS": "0"}, "PADDLE_MOE_NUM_THREADS must be .* 1 to 4096, got '0'.*"),
        ("", {"PADDLE_MOE_NUM_THREADS": "4097"}, "PADDLE_MOE_NUM_THREADS must be .* 1 to 4096, got '4097'.*"),
        ("", {"PADDLE_MOE_NUM_THREADS": "4", "PADDLE_MOE_ISA": "abacus"}, "4\nPADDLE_MOE_ISA must be one.*"),
        pytest.param(
            "no threads",
            {"PADDLE_MOE_NUM_THREADS": "4"},
            "4",
            marks=pytest.mark.skipif(os.getuid() != 0, reason="needs a user without processes: only root is"),
        ),
    ],
)
def test_default_number_of_threads(case, environment, expected):
    """Fault seen elsewhere: a thread per processor of the machine in a container that has two."""
    names = ("PADDLE_MOE_NUM_THREADS", "OMP_NUM_THREADS", "PADDLE_LOCAL_SIZE", "PADDLE_MOE_ISA")
    unset = dict.fromkeys(names, "")
    printed = checks.run_python("-c", DEFAULT_THREADS, case, timeout=300, **{**unset, **environment})
    if printed == "no other user\n":
        pytest.skip("this root may not become another user")
    assert re.fullmatch(expected, printed.strip()), printed


# A caller that is pinned to a processor at first, and then is not; prints that one, and all affinities.
PINNED = """
import ctypes, os
import numpy as np
from paddle_moe import core

here = ctypes.CDLL(None).sched_getcpu

def call():
    core.gate(np.ones((4096, 64), np.float32), np.ones((64, 64), np.float32))

core.set_num_threads(2)
everywhere = os.sched_getaffinity(0)
pinned = min(everywhere)
os.sched_setaffinity(0, {pinned})
call()
for _ in range(1000):  # until the system leaves it there for a call: workers may be where the caller is not
    os.sched_setaffinity(0, everywhere)
    before = here()
    call()
    affinities = [sorted(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")]
    if before == here() == pinned and [pinned] not in affinities:
        break
    os.sched_setaffinity(0, {pinned})
print([pinned, affinities])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="affinity as Linux has it")
def test_workers_leave_the_processor_that_a_caller_was_pinned_to():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two processors")
    here, affinities = json.loads(checks.run_python("-c", PINNED, timeout=300))
    assert [here] not in affinities, affinities


def test_a_wrong_number_of_threads_that_is_set_late():
    code = (
        "import os, paddle, paddle_moe\nos.environ['PADDLE_MOE_NUM_THREADS'] = 'two'\n"
        "try: paddle_moe.get_num_threads()\n"
        "except RuntimeError as error: print(error)"
    )
    unset = dict.fromkeys(("PADDLE_MOE_NUM_THREADS", "OMP_NUM_THREADS"), "")
    printed = checks.run_python("-c", code, timeout=300, **unset)
    assert printed.startswith("PADDLE_MOE_NUM_THREADS must be a number from 1 to 4096, got 'two'"), printed


def test_calls_from_several_python_threads_at_once(threads):
    threads(2)
    cases = [random_case(tokens, 40, 30, seed=tokens) for tokens in (1, 5, 20, 60)]
    expected = [checks.Core().mixture_of_experts(**case) for case in cases]
    failures = []

    def call(case, right):
        try:
            for _ in range(20):
                assert_same_bits(checks.Core().mixture_of_experts(**case), right)
        except BaseException as error:  # noqa: BLE001 - reported below, in the main thread
            failures.append(error)

    workers = [threading.Thread(target=call, args=pair) for pair in zip(cases, expected)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=300)
        assert not worker.is_alive()
    assert not failures, failures[0]


# ---------------------------------------------------------------- special values


@per_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_stay_in_their_token(backend, dtype, bad):
    case = random_case(70, dtype=dtype)
    clean = backend.mixture_of_experts(**case)
    poisoned = {**case, "hidden_states": case["hidden_states"].copy()}
    poisoned["hidden_states"][17, 3] = to_storage(np.array(bad), dtype)
    out = backend.mixture_of_experts(**poisoned)
    others = np.arange(70) != 17
    assert_same_bits(out[others], clean[others])
    assert not np.isfinite(to_float64(out[17])).any()


@per_dtype
def test_nan_router_weight_stays_in_its_token(core, dtype):
    case = random_case(20, dtype=dtype)
    clean = core.mixture_of_experts(**case)
    case["router_weights"][5, 1] = np.nan
    out = core.mixture_of_experts(**case)
    others = np.arange(20) != 5
    assert_same_bits(out[others], clean[others])
    assert np.isnan(to_float64(out[5])).all()


@per_layout
@per_dtype
def test_weights_of_an_expert_that_nobody_chose_are_never_used(backend, dtype, layout):
    case = random_case(12, num_experts=5, top_k=2, dtype=dtype, layout=layout, bias=True)
    case["routing_table"][case["routing_table"] == 2] = 7
    clean = backend.mixture_of_experts(**case)
    nan = to_storage(np.array(np.nan), dtype)
    for name in checks.WEIGHTS:
        separate = layout == "separate" and name.startswith("gate_up")
        for expert in (2, 5 + 2) if separate else (2,):
            case[name][expert][...] = nan
    assert_same_bits(backend.mixture_of_experts(**case), clean)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_in_the_gate_is_not_swallowed_by_the_activation(core, activation):
    """max and min instructions drop a NaN when it is their first operand."""
    case = random_case(4, 8, 6, 1, 1, activation=activation)
    case["gate_up_weights"][0][3, 2] = np.nan  # one gate column; every up column is a number
    assert np.isnan(core.mixture_of_experts(**case)).all()


def test_nan_in_the_up_half_is_not_swallowed_by_a_clamp(core):
    case = random_case(4, 8, 6, 1, 1, activation="swigluoai")
    case["gate_up_weights"][0][3, 6 + 2] = np.nan
    assert np.isnan(core.mixture_of_experts(**case)).all()


@per_dtype
@per_permuted
def test_denormals_are_numbers(core, dtype, permuted):
    """Tokens of a few times the smallest denormal, integer weights: exact, nothing flushed to zero.

    The exception is bf16 on "avx512_bf16", whose dot product instruction takes denormals for zero.
    """
    smallest = {"float32": 2.0**-149, "bfloat16": 2.0**-133, "float16": 2.0**-24}[dtype]
    rng = np.random.default_rng(2)
    tokens, hidden, inter = 9, 5, 4
    up_bias = np.concatenate([np.zeros((2, inter)), np.ones((2, inter))], axis=1)  # gate untouched, up = 1
    dense = {
        "gate": to_storage(rng.integers(-1, 2, (2, hidden, inter)), dtype),
        "up": to_storage(np.zeros((2, hidden, inter)), dtype),
        "down": to_storage(rng.integers(-1, 2, (2, inter, hidden)), dtype),
    }
    case = {
        "hidden_states": to_storage(rng.integers(-3, 4, (tokens, hidden)) * smallest, dtype),
        "routing_table": rng.integers(0, 2, (tokens, 1)),
        "router_weights": np.ones((tokens, 1), np.float32),
        **arrange(dense, "stacked", permuted),
        "gate_up_bias": to_storage(up_bias, dtype),
        "activation": "identity",
    }
    expected = expected_moe(case)
    assert 0 < np.abs(expected).max() < 128 * smallest
    out = core.mixture_of_experts(**case)
    if dtype == "bfloat16" and kernels.isa_name() == "avx512_bf16":
        expected = np.zeros_like(expected)
    assert_exact(out, expected)


@pytest.mark.parametrize("where", ["intermediate", "output"])
def test_fp16_overflow_is_inf_and_stays_in_its_token(backend, where):
    """Past 65504 the rounded value is inf with the right sign, and 65504 itself is not."""
    one = np.ones((1, 1), np.float16)
    x = np.float16([[1.0], [255.875], [256.0], [-256.0], [300.0], [2.0]])  # x^2: 65472, then 65536 and above
    case = {
        "hidden_states": x,
        "routing_table": np.zeros((6, 1), np.int32),
        "router_weights": np.ones((6, 1), np.float32),
        "gate_up_weights": [np.concatenate([one, one], axis=1)],
        "down_weights": [one],
        "activation": "identity",
    }
    if where == "output":  # the intermediate stays small, the sum over k does not
        case["gate_up_weights"] = [np.float16([[1.0, 0.0]])]
        case["gate_up_bias"] = [np.float16([0.0, 1.0])]
        case["router_weights"] = np.abs(x.astype(np.float32))
    out = backend.mixture_of_experts(**case)
    assert_exact(out, expected_moe(case))
    assert np.isinf(out[2:5]).all() and np.isfinite(out[[0, 1, 5]]).all()


@per_dtype
def test_inputs_are_not_written_to(core, dtype):
    case = random_case(10, dtype=dtype, layout="stacked", bias=True)
    for array in case.values():
        if isinstance(array, np.ndarray):
            array.flags.writeable = False  # a kernel would not notice, so compare as well
    before = {name: value.copy() for name, value in case.items() if isinstance(value, np.ndarray)}
    core.mixture_of_experts(**case)
    for name, array in before.items():
        assert_same_bits(case[name], array)
