"""Checks of plain Python options, shared by paddle_moe.functional and paddle_moe.core.

The operators check shapes, dtypes and ranges themselves; here values only get the Python type they expect.
"""

from __future__ import annotations

import numbers
import operator
from typing import Any

import numpy as np

from paddle_moe._core import LAST_EXPERT_PASSED


def flag(name: str, value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise ValueError(f"{name} must be True or False, got {value!r}")


def integer(name: str, value: Any) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None
    if not -(2**63) < value < 2**63:
        raise ValueError(f"{name} must fit into 64 bits, got {value}")
    return value


def real(name: str, value: Any) -> float:
    if isinstance(value, numbers.Real):
        return float(value)
    raise ValueError(f"{name} must be a number, got {value!r}")


def text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(f"{name} must be a string, got {value!r}")


def array_list(name: str, value: Any) -> list:
    """A list argument that may also be one stacked array."""
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError(f"{name} must hold at least one tensor, got an empty list")
        return list(value)
    return [value]


def optional_array_list(name: str, value: Any) -> list | None:
    return None if value is None else array_list(name, value)


def experts_options(
    permuted_weights, activation, experts_min, experts_max, chunk_size, measurement_mode
) -> tuple:
    return (
        flag("permuted_weights", permuted_weights),
        text("activation", activation),
        integer("experts_min", experts_min),
        LAST_EXPERT_PASSED if experts_max is None else integer("experts_max", experts_max),
        integer("chunk_size", chunk_size),
        flag("measurement_mode", measurement_mode),
    )


def route_options(
    top_k,
    scoring,
    num_groups,
    topk_groups,
    group_score,
    group_mask_fill,
    renormalize,
    renormalize_eps,
    scaling_factor,
) -> tuple:
    return (
        integer("top_k", top_k),
        text("scoring", scoring),
        integer("num_groups", num_groups),
        integer("topk_groups", topk_groups),
        text("group_score", group_score),
        real("group_mask_fill", group_mask_fill),
        flag("renormalize", renormalize),
        real("renormalize_eps", renormalize_eps),
        real("scaling_factor", scaling_factor),
    )
