"""route against the double precision reference, through NumPy arrays and through Paddle tensors."""

from __future__ import annotations

import checks
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from checks import assert_same_bits

from paddle_moe import reference

SCORINGS = ("softmax", "sigmoid", "softmax_topk")
per_scoring = pytest.mark.parametrize("scoring", SCORINGS)


def random_logits(num_tokens, num_experts, seed=0, scale=2.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((num_tokens, num_experts)) * scale).astype(np.float32)


def selection_keys(logits, scoring, correction_bias) -> np.ndarray:
    scores = {"softmax": reference.softmax, "sigmoid": reference.sigmoid, "softmax_topk": reference.identity}
    return scores[scoring](logits.astype(np.float64)) + (0 if correction_bias is None else correction_bias)


def assert_routed(actual, logits, top_k, **options) -> None:
    """Same ids in the same order and the same weights; only where keys are closer than fp32 can tell may ids
    differ from the reference, and then the keys of what was chosen must still be as good."""
    ids, weights = actual
    expected_ids, expected_weights = reference.route(logits, top_k, **options)
    assert ids.dtype == np.int32 and weights.dtype == np.float32
    assert ids.shape == weights.shape == expected_ids.shape
    differs = (ids != expected_ids).any(axis=1)
    np.testing.assert_allclose(weights[~differs], expected_weights[~differs], rtol=3e-6, atol=1e-30)
    if not differs.any():
        return
    assert differs.mean() < 0.01 or len(ids) < 100, f"{differs.sum()} of {len(ids)} rows differ"
    keys = selection_keys(logits, options.get("scoring", "softmax"), options.get("correction_bias"))
    for row in np.flatnonzero(differs):
        chosen, best = keys[row, ids[row]], keys[row, expected_ids[row]]
        np.testing.assert_allclose(
            chosen, best, rtol=1e-6, atol=1e-7, err_msg=f"row {row} chose worse experts"
        )
        assert len(set(ids[row])) == top_k


# ---------------------------------------------------------------- right choice, right weights


@per_scoring
@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalize", "as_is"])
def test_scoring(backend, scoring, renormalize):
    logits = random_logits(200, 16)
    options = {"scoring": scoring, "renormalize": renormalize}
    assert_routed(backend.route(logits, 4, **options), logits, 4, **options)


def test_a_row_worked_out_by_hand(backend):
    """exp(ln n) is n: the weights are fractions anyone can check."""
    logits = np.log(np.float32([[1, 4, 2, 1]]))
    for scoring, renormalize, expected in [
        ("softmax", True, [4 / 6, 2 / 6]),
        ("softmax", False, [4 / 8, 2 / 8]),
        ("softmax_topk", True, [4 / 6, 2 / 6]),
        ("sigmoid", False, [4 / 5, 2 / 3]),
        ("sigmoid", True, [(4 / 5) / (22 / 15), (2 / 3) / (22 / 15)]),
    ]:
        ids, weights = backend.route(logits, 2, scoring=scoring, renormalize=renormalize)
        assert ids.tolist() == [[1, 2]]
        np.testing.assert_allclose(weights, [expected], rtol=1e-6)


@per_scoring
def test_bias_moves_the_selection_and_never_the_weights(backend, scoring):
    logits = random_logits(100, 12, scale=0.5)
    bias = np.random.default_rng(1).standard_normal(12).astype(np.float32)
    options = {"scoring": scoring, "correction_bias": bias, "renormalize": False}
    ids, weights = backend.route(logits, 3, **options)
    assert_routed((ids, weights), logits, 3, **options)
    assert (ids != backend.route(logits, 3, scoring=scoring)[0]).any()
    if scoring != "softmax_topk":
        scores = selection_keys(logits, scoring, None)
        np.testing.assert_allclose(weights, np.take_along_axis(scores, ids, axis=1), rtol=3e-6)


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("group_mask_fill", [0.0, -np.inf], ids=["fill_0", "fill_-inf"])
@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
@per_scoring
def test_groups(backend, scoring, group_score, group_mask_fill, bias):
    """Without a bias and without softmax_topk all keys are positive, so a fill of 0.0 can never be chosen."""
    logits = random_logits(150, 24, scale=1.0)
    options = {"scoring": scoring, "num_groups": 6, "topk_groups": 2, "group_score": group_score}
    options["group_mask_fill"] = group_mask_fill
    if bias:
        options["correction_bias"] = np.random.default_rng(2).standard_normal(24).astype(np.float32)
    ids, weights = backend.route(logits, 4, **options)
    assert_routed((ids, weights), logits, 4, **options)
    if group_mask_fill != 0 or (scoring != "softmax_topk" and not bias):
        assert max(len(set(row)) for row in (ids // 4).tolist()) <= 2


def test_mask_fill_zero_can_win_over_negative_keys(backend):
    """What models trained with a fill of 0.0 do: an expert of a losing group beats a negative key."""
    logits = np.float32([[-1.0, -2.0, -3.0, -4.0]])
    options = {"scoring": "softmax_topk", "num_groups": 2, "topk_groups": 1}
    assert backend.route(logits, 2, **options, group_mask_fill=0.0)[0].tolist() == [[2, 3]]
    assert backend.route(logits, 2, **options, group_mask_fill=-np.inf)[0].tolist() == [[0, 1]]


def test_group_scores_disagree_where_they_should(backend):
    logits = np.float32([[3.0, 0.0, 2.0, 2.0]])  # the best single expert in group 0, the best pair in group 1
    options = {"scoring": "softmax_topk", "num_groups": 2, "topk_groups": 1, "group_mask_fill": -np.inf}
    assert backend.route(logits, 2, **options, group_score="max")[0].tolist() == [[0, 1]]
    assert backend.route(logits, 2, **options, group_score="top2_sum")[0].tolist() == [[2, 3]]


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
@pytest.mark.parametrize("num_groups", [4, 8], ids=["pairs", "single_experts"])
def test_small_groups_and_all_groups_kept(backend, num_groups, group_score):
    logits = random_logits(50, 8)
    for topk_groups in (1, num_groups):
        options = {"num_groups": num_groups, "topk_groups": topk_groups, "group_score": group_score}
        top_k = 8 // num_groups * topk_groups
        assert_routed(backend.route(logits, top_k, **options), logits, top_k, **options)


@pytest.mark.parametrize("scaling_factor", [2.5, 0.0, -1.0])
@per_scoring
def test_scaling_factor(backend, scoring, scaling_factor):
    logits = random_logits(20, 9)
    options = {"scoring": scoring, "scaling_factor": scaling_factor}
    assert_routed(backend.route(logits, 3, **options), logits, 3, **options)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 0.5])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_renormalize_eps(backend, scoring, eps):
    logits = random_logits(20, 9)
    options = {"scoring": scoring, "renormalize_eps": eps}
    assert_routed(backend.route(logits, 3, **options), logits, 3, **options)


def test_renormalising_zero_scores_stays_zero(backend):
    """0 / (0 + eps), not 0 / 0."""
    ids, weights = backend.route(np.full((1, 4), -np.inf, np.float32), 2, scoring="sigmoid")
    assert ids.tolist() == [[0, 1]] and not weights.any()


@per_scoring
def test_finite_logits_without_eps_give_finite_weights(backend, scoring):
    """The bias makes experts win whose scores are 0 in float32; without eps their sum divides them."""
    logits = random_logits(200, 8, scale=60.0) - 80
    options = {"scoring": scoring, "renormalize_eps": 0.0, "scaling_factor": 2.5}
    for bias in (None, np.float32([1e3, 1e3, 0, 0, 0, 0, 0, 0])):
        ids, weights = backend.route(logits, 2, correction_bias=bias, **options)
        assert (ids >= 0).all()
        total = weights.sum(axis=1)
        np.testing.assert_allclose(total[total > 0], 2.5, rtol=1e-6)
        assert not weights[total == 0].any()
        if scoring != "softmax_topk" and bias is not None:
            assert 10 < (total == 0).sum() < 190


@pytest.mark.parametrize("num_experts", [1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 64, 257, 1025, 4096])
@per_scoring
def test_numbers_of_experts(core, scoring, num_experts):
    """Fault seen elsewhere: more than 255 or 1024 experts."""
    logits = random_logits(30, num_experts, seed=num_experts)
    logits[3] = np.sort(logits[3])  # the best experts last
    logits[4] = np.sort(logits[4])[::-1]
    for top_k in sorted({1, min(8, num_experts), min(num_experts, 64)}):
        assert_routed(core.route(logits, top_k, scoring=scoring), logits, top_k, scoring=scoring)


@per_scoring
@pytest.mark.parametrize("num_experts", [1, 5, 64])
def test_every_expert_chosen(backend, scoring, num_experts):
    logits = random_logits(10, num_experts)
    ids, weights = backend.route(logits, num_experts, scoring=scoring)
    assert_routed((ids, weights), logits, num_experts, scoring=scoring)
    np.testing.assert_array_equal(np.sort(ids, axis=1), np.tile(np.arange(num_experts), (10, 1)))


def test_zero_tokens(backend):
    ids, weights = backend.route(np.zeros((0, 6), np.float32), 2)
    assert ids.shape == weights.shape == (0, 2)
    assert (ids.dtype, weights.dtype) == (np.int32, np.float32)


# ---------------------------------------------------------------- ties


@per_scoring
@pytest.mark.parametrize("num_experts", [6, 8, 40, 300])
def test_ties_go_to_the_lowest_id(backend, scoring, num_experts):
    rng = np.random.default_rng(4)
    logits = rng.integers(-2, 3, (60, num_experts)).astype(np.float32)  # many equal values
    logits[0] = 0.25  # all equal
    logits[1, ::2], logits[1, 1::2] = 0.0, -0.0  # equal, though their bits differ
    ids, _ = backend.route(logits, 6, scoring=scoring)
    np.testing.assert_array_equal(ids, np.argsort(-logits, axis=1, kind="stable")[:, :6])
    assert ids[0].tolist() == ids[1].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_logits_choose_where_scores_have_saturated(backend, scoring):
    """sigmoid(40) and sigmoid(50) are both 1 in fp32, exp(-200) and exp(-210) both 0; the logits differ."""
    assert backend.route(np.float32([[40, 50, 45, 0]]), 3, scoring=scoring)[0].tolist() == [[1, 2, 0]]
    assert backend.route(np.float32([[-210, -200, 0, -205]]), 4, scoring=scoring)[0].tolist() == [
        [2, 1, 3, 0]
    ]


def test_neighbouring_logits_are_told_apart(backend):
    one = np.float32(1)
    logits = np.array([[one, np.nextafter(one, np.float32(2)), np.nextafter(one, np.float32(0))]])
    for scoring in SCORINGS:
        assert backend.route(logits, 3, scoring=scoring)[0].tolist() == [[1, 0, 2]]


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
@per_scoring
def test_tied_groups_go_to_the_lowest_group(backend, scoring, group_score):
    logits = np.zeros((1, 12), np.float32)
    options = {"scoring": scoring, "num_groups": 4, "topk_groups": 2, "group_score": group_score}
    ids, _ = backend.route(logits, 4, **options, group_mask_fill=-np.inf)
    assert ids.tolist() == [[0, 1, 2, 3]]


# ---------------------------------------------------------------- NaN, infinities


@pytest.mark.parametrize("position", [0, 2], ids=["first", "last"])
def test_a_group_of_opposite_infinities_has_no_sum_and_loses(backend, position):
    bias = np.zeros(4, np.float32)
    bias[position : position + 2] = np.inf, -np.inf
    options = {"scoring": "sigmoid", "num_groups": 2, "group_score": "top2_sum", "correction_bias": bias}
    logits = np.zeros((1, 4), np.float32)
    assert_routed(backend.route(logits, 1, **options), logits, 1, **options)
    assert backend.route(logits, 1, **options)[0].tolist() == [[2 - position]]


def assert_no_expert(ids, weights):
    assert (ids == -1).all() and not weights.any() and not np.signbit(weights).any()


@per_scoring
@pytest.mark.parametrize("groups", [False, True], ids=["no_groups", "groups"])
@pytest.mark.parametrize("position", [0, 5, 15])
def test_nan_row_gets_no_expert_and_touches_no_other_row(backend, scoring, groups, position):
    """Fault seen elsewhere: NaN logits give duplicate or garbage ids."""
    logits = random_logits(40, 16)
    options = {"scoring": scoring}
    if groups:
        options |= {"num_groups": 4, "topk_groups": 2, "group_mask_fill": -np.inf}
    clean_ids, clean_weights = backend.route(logits, 3, **options)
    logits[7, position] = np.nan
    logits[39] = np.nan
    ids, weights = backend.route(logits, 3, **options)
    others = ~np.isin(np.arange(40), [7, 39])
    assert_same_bits(ids[others], clean_ids[others])
    assert_same_bits(weights[others], clean_weights[others])
    assert_no_expert(ids[~others], weights[~others])


@pytest.mark.parametrize("scoring", ["softmax", "softmax_topk"])
def test_rows_whose_softmax_is_nan_get_no_expert(backend, scoring):
    logits = random_logits(3, 8)
    logits[0, 3] = np.inf
    logits[1] = -np.inf
    ids, weights = backend.route(logits, 2, scoring=scoring)
    assert_no_expert(ids[:2], weights[:2])
    assert (ids[2] >= 0).all() and (weights[2] > 0).all()


def test_infinite_logits_are_ordinary_for_sigmoid(backend):
    logits = np.float32([[0, np.inf, -np.inf, 1], [-np.inf, 0, -np.inf, -np.inf]])
    ids, weights = backend.route(logits, 3, scoring="sigmoid", renormalize=False)
    assert ids.tolist() == [[1, 3, 0], [1, 0, 2]]
    np.testing.assert_allclose(weights, [[1, 0.7310586, 0.5], [0.5, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("scoring", ["softmax", "softmax_topk"])
def test_minus_infinity_masks_an_expert(backend, scoring):
    logits = random_logits(20, 8)
    logits[:, ::2] = -np.inf
    ids, weights = backend.route(logits, 6, scoring=scoring)
    assert_routed((ids, weights), logits, 6, scoring=scoring)
    assert (ids[:, :4] % 2 == 1).all() and not weights[:, 4:].any()
    assert ids[:, 4:].tolist() == [[0, 2]] * 20


def test_minus_infinity_in_the_bias_masks_an_expert(backend):
    bias = np.float32([0, -np.inf, 0, -np.inf, 0, 0])
    logits = random_logits(30, 6)
    ids, weights = backend.route(logits, 4, correction_bias=bias)
    assert_routed((ids, weights), logits, 4, correction_bias=bias)
    assert not np.isin(ids, [1, 3]).any()


@per_scoring
def test_nan_in_the_bias_never_gives_garbage(backend, scoring):
    bias = np.float32([0, 0, np.nan, 0, 0, 0])
    ids, weights = backend.route(random_logits(10, 6), 3, scoring=scoring, correction_bias=bias)
    assert_no_expert(ids, weights)


@per_scoring
@pytest.mark.parametrize("offset", [1e4, -1e4, 3e38])
def test_large_logits_do_not_overflow(backend, scoring, offset):
    logits = np.array([[offset, 0, -offset / 2, 1]], np.float32)
    assert_routed(backend.route(logits, 2, scoring=scoring), logits, 2, scoring=scoring)


# ---------------------------------------------------------------- the same bits


@per_scoring
def test_row_alone_and_in_any_batch_has_the_same_bits(core, threads, scoring):
    logits = random_logits(513, 37)
    options = {"scoring": scoring, "correction_bias": random_logits(1, 37, seed=1)[0]}
    ids, weights = core.route(logits, 5, **options)
    for num_threads in (1, 2, 3, 5):
        threads(num_threads)
        for rows in (slice(0, 1), slice(512, 513), slice(0, 7), slice(100, 164), slice(0, 513)):
            part_ids, part_weights = core.route(logits[rows], 5, **options)
            assert_same_bits(part_ids, ids[rows])
            assert_same_bits(part_weights, weights[rows])


def test_core_and_paddle_give_the_same_bits():
    logits = random_logits(33, 19)
    for scoring in SCORINGS:
        results = [backend.route(logits, 4, scoring=scoring) for backend in (checks.Core(), checks.Paddle())]
        for from_core, from_paddle in zip(*results):
            assert_same_bits(from_paddle, from_core)


# ---------------------------------------------------------------- anything goes


@st.composite
def routings(draw):
    num_groups = draw(st.sampled_from([1, 1, 2, 3, 5]))
    per_group = draw(st.integers(1, 12))
    topk_groups = draw(st.integers(1, num_groups))
    num_experts = num_groups * per_group
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = rng.standard_normal((draw(st.integers(0, 12)), num_experts)).astype(np.float32)
    logits *= draw(st.sampled_from([0.01, 1, 3]))
    logits[rng.random(logits.shape) < draw(st.sampled_from([0, 0, 0.02]))] = np.nan
    options = {
        "scoring": draw(st.sampled_from(SCORINGS)),
        "num_groups": num_groups,
        "topk_groups": topk_groups,
        "group_score": draw(st.sampled_from(["max", "top2_sum"])),
        "group_mask_fill": draw(st.sampled_from([0.0, -np.inf])),
        "renormalize": draw(st.booleans()),
        "renormalize_eps": draw(st.sampled_from([1e-20, 1e-12])),
        "scaling_factor": draw(st.sampled_from([1.0, 2.5])),
    }
    if draw(st.booleans()):
        options["correction_bias"] = rng.standard_normal(num_experts).astype(np.float32)
    return logits, draw(st.integers(1, topk_groups * per_group)), options


@hypothesis.settings(max_examples=150)
@hypothesis.given(routing=routings())
def test_any_call_matches_the_reference(routing):
    logits, top_k, options = routing
    assert_routed(checks.Core().route(logits, top_k, **options), logits, top_k, **options)


@hypothesis.settings(max_examples=20)
@hypothesis.given(routing=routings())
def test_any_paddle_call_matches_the_reference(routing):
    logits, top_k, options = routing
    assert_routed(checks.Paddle().route(logits, top_k, **options), logits, top_k, **options)
