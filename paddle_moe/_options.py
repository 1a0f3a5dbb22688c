"""Checks of plain Python options, shared by paddle_moe.functional and paddle_moe.core.

The operators check shapes, dtypes and ranges themselves; here values only get the Python type they expect.
"""

from __future__ import annotations

import numbers
import operator
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from paddle_moe._compiled import _core


def flag(name: str, value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise ValueError(f"{name} must be True or False, got {value!r}")


def switch(variable: str) -> bool:
    """Whether the environment variable is "1"; not set, empty and "0" mean no.

    Raises:
        ValueError: it is something else.
    """
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{variable} must be 0 or 1, got {value!r}")
    return value == "1"


def integer(name: str, value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    try:
        value = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None
    if not -(2**63) < value < 2**63:
        raise ValueError(f"{name} must fit into 64 bits, got {value}")
    return value


def real(name: str, value: Any) -> float:
    # float by itself because it is found sooner
    if isinstance(value, float) or isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    raise ValueError(f"{name} must be a number, got {value!r}")


def positive(name: str, value: Any) -> float:
    if not real(name, value) > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return float(value)


def dtype_name(dtype: Any) -> Any:
    """'float32' for 'float32', paddle.float32, numpy.float32 and DataType.FLOAT32, as optimizers have it."""
    return dtype.__name__ if isinstance(dtype, type) else str(dtype).rpartition(".")[2].lower()


def type_name(value: Any) -> str:
    """Of what was passed, for messages; tensors of several libraries have the same name."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def expect_parallel(value: Any) -> Any:
    """A ParallelContext, whose module is not imported for this."""
    if not hasattr(value, "ep_rank"):
        raise ValueError(f"parallel must be what init_distributed returned, got {value!r}")
    return value


def text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(f"{name} must be a string, got {value!r}")


def at_least(least: int, note: str = "") -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        value = integer(name, value)
        if value < least:
            raise ValueError(f"{name} must be at least {least}{note}, got {value}")
        return value

    return check


def one_of(*choices: str) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if value not in choices:
            *others, last = map(repr, choices)
            raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")
        return value

    return check


def array_list(name: str, value: Any) -> list:
    """A list argument that may also be one stacked array."""
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError(f"{name} must hold at least one tensor, got an empty list")
        return list(value)
    return [value]


def optional_array_list(name: str, value: Any) -> list | None:
    return None if value is None else array_list(name, value)


def last_expert(name: str, value: Any) -> int:
    return _core.LAST_EXPERT_PASSED if value is None else integer(name, value)


def thread_count(name: str, value: Any) -> int:
    value = integer(name, value)
    if not 0 <= value <= _core.MAX_THREADS:
        raise ValueError(f"{name} must be from 0 (the default) to {_core.MAX_THREADS}, got {value}")
    return value


# What the operators take besides other tensors, in their order: a name, and what gives a value its type.
WEIGHTS = {
    "gate_up_weights": array_list,
    "down_weights": array_list,
    "gate_up_bias": optional_array_list,
    "down_bias": optional_array_list,
    "gate_up_scale": optional_array_list,
    "down_scale": optional_array_list,
}
EXPERTS_OPTIONS = {
    "permuted_weights": flag,
    "activation": text,
    "experts_min": integer,
    "experts_max": last_expert,
    "chunk_size": integer,
    "measurement_mode": flag,
}
ROUTE_OPTIONS = {
    "top_k": integer,
    "scoring": text,
    "num_groups": integer,
    "topk_groups": integer,
    "group_score": text,
    "group_mask_fill": real,
    "renormalize": flag,
    "renormalize_eps": real,
    "scaling_factor": real,
}


def checked(options: dict[str, Callable[[str, Any], Any]], given: dict[str, Any]) -> tuple:
    """What `given`, such as the locals() of a function that takes them, holds for each of `options`."""
    return tuple([check(name, given[name]) for name, check in options.items()])
