"""Tokens, routings and experts that test_all_to_all.py and its worker share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import paddle

HIDDEN, TOP_K = 6, 3


@dataclass
class Case:
    name: str
    tokens: list[int]  # of each EP rank
    num_experts: int = 7
    dtype: str = "float32"
    id_dtype: str = "int32"
    weight_dtype: str = "float32"
    one_expert: bool = False  # all tokens go to the first
    nobody: bool = False  # no token goes anywhere


def cases(ep_size: int) -> list[Case]:
    uneven = [5, 3, 8, 2][:ep_size]
    return [
        Case("uneven", uneven),
        Case("int64", uneven, id_dtype="int64"),
        Case("bfloat16", uneven, dtype="bfloat16"),
        Case("float16", uneven, dtype="float16"),
        Case("bfloat16 weights", uneven, dtype="bfloat16", weight_dtype="bfloat16"),
        Case("float16 weights", uneven, dtype="float16", weight_dtype="float16"),
        Case("empty rank", [0, 4, 0, 6][:ep_size]),
        Case("no tokens", [0] * ep_size),
        Case("one expert", uneven, one_expert=True),
        Case("nobody", uneven, nobody=True),
        Case("fewer experts than ranks", uneven, num_experts=ep_size - 1),
        Case("equally many experts", uneven, num_experts=2 * ep_size, dtype="bfloat16"),
        Case("equally many experts, empty rank", [0, 4, 0, 6][:ep_size], 2 * ep_size, "bfloat16"),
    ]


def tokens_of(case: Case, ep_rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Hidden states [T, H], ids [T, K], weights [T, K] and the gradient of the output [T, H].

    Some ids are of no expert: -1, of 64 bits 2**32, whose lower half is that of the first expert.
    """
    rng = np.random.default_rng(100 + ep_rank)
    count = case.tokens[ep_rank]
    ids = rng.integers(-1, case.num_experts, (count, TOP_K)).astype(case.id_dtype)
    if case.one_expert:
        ids[:] = 0
    if case.nobody:
        ids[:] = -1
    if case.id_dtype == "int64":
        ids[ids < 0] = 2**32
    floats = [rng.standard_normal((count, n)).astype(np.float32) for n in (HIDDEN, TOP_K, HIDDEN)]
    return floats[0], ids, floats[1], floats[2]


def expert_weights(case: Case) -> np.ndarray:
    """[E, H, H]."""
    return np.random.default_rng(0).standard_normal((case.num_experts, HIDDEN, HIDDEN)).astype(np.float32)


def run_experts(
    rows: paddle.Tensor, ids: paddle.Tensor, weights: paddle.Tensor, matrices: paddle.Tensor, first: int
) -> paddle.Tensor:
    """[N, H]: the sum over k of weights[n, k] * tanh(rows[n] @ matrices[ids[n, k] - first]), in float32."""
    out = paddle.zeros(rows.shape)
    for e in range(matrices.shape[0]):
        share = (weights * (ids == first + e).astype("float32")).sum(axis=1, keepdim=True)
        out = out + share * paddle.tanh(rows.astype("float32") @ matrices[e].astype("float32"))
    return out.astype(rows.dtype)
