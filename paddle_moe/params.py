"""Expert weights: deterministic values from a seed, and the shard of them that one rank holds.

Everything here is a pure function of its arguments. A rank holds a contiguous range of experts (expert
parallelism, EP) and, of each of them, a contiguous slice of the intermediate dimension I (tensor
parallelism, TP): the gate and up columns and the matching down rows. Summing the partial outputs of all
ranks gives the dense layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from paddle_moe._options import at_least, dtype_name, integer, one_of

if TYPE_CHECKING:
    import paddle

_HIDDEN_STATES, _GATE, _ROUTING, _EXPERT = range(4)  # what a random stream is for; part of its key


# ---------------------------------------------------------------- shards


def shard_range(total: int, rank: int, size: int) -> tuple[int, int]:
    """The half-open range [start, stop) of `total` items that `rank` of `size` ranks holds.

    The ranges are contiguous and in rank order, cover every item once and differ in length by at most
    one, the longer ones first. With more ranks than items the last ranks get an empty range.

    Raises:
        ValueError: total is negative, size is less than 1, or rank is not in [0, size).
    """
    at_least(0)("total", total)
    at_least(1)("size", size)
    if not 0 <= integer("rank", rank) < size:
        raise ValueError(f"rank must be between 0 and size - 1 = {size - 1}, got {rank}")
    quotient, remainder = divmod(total, size)
    start = rank * quotient + min(rank, remainder)
    return start, start + quotient + (rank < remainder)


def slice_intermediate(array: Any, tp_rank: int, tp_size: int, *, axis: int, halves: int = 1) -> Any:
    """The slice of the intermediate dimension I that `tp_rank` of `tp_size` ranks holds.

    Args:
        array: NumPy array or Paddle tensor whose dimension `axis` holds I (halves = 1), or I gate columns
            followed by I up columns (halves = 2), each of which is cut on its own.
        axis: negative index of that dimension. -1 for weights [H, I] and biases, -2 for [I, H].

    Raises:
        ValueError: the dimension is not a multiple of `halves`, or the ranks do not fit (see shard_range).
    """
    shape = list(array.shape)
    if shape[axis] % halves:
        raise ValueError(
            f"array must hold gate and up halves of one size in dimension {axis}, got the shape {shape}"
        )
    start, stop = shard_range(shape[axis] // halves, tp_rank, tp_size)
    before, after = shape[:axis], shape[len(shape) + axis + 1 :]
    split = array.reshape([*before, halves, shape[axis] // halves, *after])
    kept = split[(Ellipsis, slice(start, stop), *[slice(None)] * len(after))]
    return kept.reshape([*before, halves * (stop - start), *after])


@dataclass
class ExpertShard:
    """The expert weights of one rank, in the form (list or stacked) in which the dense ones came.

    experts_min and experts_max are inclusive global ids; a rank without experts has experts_max =
    experts_min - 1. down_bias is None on every tp_rank but 0, so that the sum over the TP group adds it
    once.
    """

    gate_up_weights: Any
    down_weights: Any
    gate_up_bias: Any
    down_bias: Any
    experts_min: int
    experts_max: int


def shard_experts(
    gate_up_weights: Any,
    down_weights: Any,
    gate_up_bias: Any = None,
    down_bias: Any = None,
    *,
    permuted_weights: bool = False,
    ep_rank: int = 0,
    ep_size: int = 1,
    tp_rank: int = 0,
    tp_size: int = 1,
) -> ExpertShard:
    """Cuts the shard of (ep_rank, tp_rank) out of dense expert weights.

    Args:
        gate_up_weights: list of E arrays [H, 2I] (gate columns, then up), of 2*E arrays [H, I] (all
            gates, then all ups), or one stacked array [E, H, 2I]. NumPy arrays or Paddle tensors.
        down_weights: list of E arrays [I, H], or one stacked array [E, I, H].
        gate_up_bias: None, list of E arrays [2I], or one stacked array [E, 2I].
        down_bias: None, list of E arrays [H], or one stacked array [E, H].
        permuted_weights: the last two dimensions of every weight are swapped.

    Raises:
        ValueError: a list has the wrong length, the arrays differ in H or I, or the ranks do not fit.
    """
    num_experts = len(down_weights)
    experts = slice(*shard_range(num_experts, ep_rank, ep_size))
    inputs_axis, outputs_axis = (-1, -2) if permuted_weights else (-2, -1)

    columns = down_weights[0].shape[inputs_axis] if num_experts else 0
    hidden = down_weights[0].shape[outputs_axis] if num_experts else 0

    def held(name: str, arrays: Any) -> Any:
        if len(arrays) != num_experts:
            raise ValueError(f"{name} must hold {num_experts} experts like down_weights, got {len(arrays)}")
        return arrays

    def cut(name: str, weights: Any, axis: int, halves: int, hidden_axis: int | None = None) -> Any:
        def own(weight: Any) -> Any:
            if num_experts and weight.shape[axis] != halves * columns:
                raise ValueError(
                    f"{name} must have the size {halves * columns} in dimension {axis}, as I = {columns} in "
                    f"down_weights, got the shape {list(weight.shape)}"
                )
            if num_experts and hidden_axis and weight.shape[hidden_axis] != hidden:
                raise ValueError(
                    f"{name} must have the size {hidden} in dimension {hidden_axis}, as H = {hidden} in "
                    f"down_weights, got the shape {list(weight.shape)}"
                )
            return slice_intermediate(weight, tp_rank, tp_size, axis=axis, halves=halves)

        if not isinstance(weights, (list, tuple)):
            return own(held(name, weights)[experts])
        if halves == 2 and len(weights) == 2 * num_experts:
            kept, halves = [*weights[:num_experts][experts], *weights[num_experts:][experts]], 1
        else:
            kept = held(name, weights)[experts]
        return [own(weight) for weight in kept]

    own_down_bias = None if down_bias is None else held("down_bias", down_bias)[experts]
    for bias in own_down_bias if own_down_bias is not None else ():
        if bias.shape[-1] != hidden:
            raise ValueError(
                f"down_bias must have the size {hidden} in dimension -1, as H = {hidden} in down_weights, "
                f"got the shape {list(bias.shape)}"
            )
    return ExpertShard(
        gate_up_weights=cut("gate_up_weights", gate_up_weights, outputs_axis, 2, inputs_axis),
        down_weights=cut("down_weights", down_weights, inputs_axis, 1, outputs_axis),
        gate_up_bias=None if gate_up_bias is None else cut("gate_up_bias", gate_up_bias, -1, 2),
        down_bias=own_down_bias if tp_rank == 0 else None,
        experts_min=experts.start,
        experts_max=experts.stop - 1,
    )


# ---------------------------------------------------------------- parts of dense tensors


@dataclass(frozen=True)
class Part:
    """One array that holds a box of a dense tensor.

    Attributes:
        pattern: the dimensions of the array, outermost first, as names of dimensions of the dense tensor.
            Names in parentheses share one dimension, the last varying fastest: "E H (G I)" has all gate
            columns, then all up columns, "E H (I G)" interleaves them. "1" is a dimension of size 1.
        ranges: {name: (start, stop)} of the box, for every dimension of the dense tensor. One that is not in
            the pattern has the length 1.
        copy: another rank holds the same box, and writes it where that happens once.
    """

    pattern: str
    ranges: Mapping[str, tuple[int, int]]
    copy: bool = False

    @property
    def groups(self) -> list[list[str]]:
        """The names of each dimension of the array."""
        words = re.findall(r"\(([^)]*)\)|(\S+)", self.pattern)
        return [folded.split() if folded else [] if single == "1" else [single] for folded, single in words]

    @property
    def names(self) -> list[str]:
        return [name for group in self.groups for name in group]

    @property
    def shape(self) -> list[int]:
        return [math.prod(map(self.length, group)) for group in self.groups]

    @property
    def size(self) -> int:
        return math.prod(stop - start for start, stop in self.ranges.values())

    def length(self, name: str) -> int:
        start, stop = self.ranges[name]
        return stop - start

    def overlap(self, other: Part) -> dict[str, tuple[int, int]] | None:
        """The ranges that both hold; None if there is nothing."""
        common = {}
        for name, (start, stop) in self.ranges.items():
            other_start, other_stop = other.ranges[name]
            common[name] = max(start, other_start), min(stop, other_stop)
            if common[name][0] >= common[name][1]:
                return None
        return common

    def cut(self, dense: Any, whole: Part) -> Any:
        """This part of an array or Paddle tensor that is `whole`, of the same pattern; not an empty one."""
        unfolded = dense.reshape([whole.length(name) for name in whole.names])
        return unfolded[tuple(slice(*self.ranges[name]) for name in self.names)].reshape(self.shape)

    def transposed(self) -> Part:
        """The same box in an array whose last two dimensions are swapped."""
        *outer, first, second = re.findall(r"\([^)]*\)|\S+", self.pattern)
        return replace(self, pattern=" ".join([*outer, second, first]))

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Part:
        """All of a tensor whose dimensions have no meaning here."""
        names = [f"d{index}" for index in range(len(shape))]
        return cls(" ".join(names), {name: (0, size) for name, size in zip(names, shape)})


# Of a FusedMoE: what permuted_weights, quantize_() and prepack_() are about.
EXPERT_WEIGHTS = ("gate_up_weight", "down_weight", "shared_gate_up_weight", "shared_down_weight")
# Where in which grid a rank is.
PLACE = ("ep_rank", "ep_size", "tp_rank", "tp_size")


@dataclass(frozen=True)
class LayerShard:
    """What one rank holds of the weights of a FusedMoE layer, as ranges.

    shared_over_grid: the shared expert is sliced over all ranks of the grid; False: over those of each TP
    group, so that every EP rank has a copy. permuted_weights: the weights of experts are stored [out, in].
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    shared_intermediate_size: int = 0
    shared_over_grid: bool = True
    permuted_weights: bool = False
    ep_rank: int = 0
    ep_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1

    @property
    def place(self) -> tuple[int, ...]:
        """In the order of PLACE."""
        return tuple(getattr(self, name) for name in PLACE)

    @property
    def experts(self) -> tuple[int, int]:
        return shard_range(self.num_experts, self.ep_rank, self.ep_size)

    @property
    def columns(self) -> tuple[int, int]:
        return shard_range(self.intermediate_size, self.tp_rank, self.tp_size)

    @property
    def shared_columns(self) -> tuple[int, int]:
        rank, size = self.tp_rank, self.tp_size
        if self.shared_over_grid:
            rank, size = self.ep_rank * self.tp_size + self.tp_rank, self.ep_size * self.tp_size
        return shard_range(self.shared_intermediate_size, rank, size)

    def whole(self) -> LayerShard:
        """The layer on a single rank."""
        return replace(self, ep_rank=0, ep_size=1, tp_rank=0, tp_size=1)

    def grid(self) -> list[LayerShard]:
        """What every rank holds, this one among them."""
        return [
            replace(self, ep_rank=ep_rank, tp_rank=tp_rank)
            for ep_rank in range(self.ep_size)
            for tp_rank in range(self.tp_size)
        ]

    def parts(self) -> dict[str, Part]:
        """By the name of the parameter or buffer, whether or not the layer has it.

        Dimensions: E experts, H hidden, G gate and up, I intermediate, S intermediate of the shared expert.
        Of down_bias, which the sum over a TP group adds once, all but its first rank have an empty part.
        """
        hidden, halves, all_experts = (0, self.hidden_size), (0, 2), (0, self.num_experts)
        experts, columns, shared = self.experts, self.columns, self.shared_columns
        copy = not self.shared_over_grid and self.ep_rank > 0
        weights = [
            Part("E H (G I)", {"E": experts, "H": hidden, "G": halves, "I": columns}),
            Part("E I H", {"E": experts, "I": columns, "H": hidden}),
            Part("1 H (G S)", {"H": hidden, "G": halves, "S": shared}, copy),
            Part("1 S H", {"S": shared, "H": hidden}, copy),
        ]
        if self.permuted_weights:
            weights = [part.transposed() for part in weights]
        return {
            **dict(zip(EXPERT_WEIGHTS, weights)),
            "gate_weight": Part("H E", {"H": hidden, "E": all_experts}),
            "gate_bias": Part("E", {"E": all_experts}),
            "gate_up_bias": Part("E (G I)", {"E": experts, "G": halves, "I": columns}),
            "down_bias": Part("E H", {"E": experts if self.tp_rank == 0 else (0, 0), "H": hidden}),
            "correction_bias": Part("E", {"E": all_experts}),
            "shared_gate_weight": Part("H 1", {"H": hidden}),
        }


# ---------------------------------------------------------------- values from a seed


def _uniform(key: tuple[int, ...], shape: tuple[int, ...], variance: float) -> np.ndarray:
    """fp32 values of mean 0 and the given variance, the same for a key everywhere.

    The raw bits of a NumPy bit generator are stable across versions and platforms; its distributions are not.
    """
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(math.ceil(math.prod(shape) / 2))
    unit = (bits.view(np.uint32)[: math.prod(shape)] >> 8).astype(np.float32) * np.float32(2.0**-24)
    return ((2 * unit - 1) * np.float32(math.sqrt(3 * variance))).reshape(shape)


def random_gate_weight(seed: int, hidden_dim: int, num_experts: int) -> np.ndarray:
    """Router weight [H, E] fp32 whose logits have variance 1 for inputs of variance 1."""
    return _uniform((seed, _GATE), (hidden_dim, num_experts), 1 / hidden_dim)


def random_expert(seed: int, expert: int, hidden_dim: int, ffn_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights (gate_up [H, 2I], down [I, H]) fp32 of the expert with the global id `expert`.

    An expert's values depend on nothing but the arguments, so a rank draws its own experts only. Variance
    1 / fan-in keeps outputs of order 1 for inputs of variance 1.
    """
    return random_gate_up(seed, expert, hidden_dim, ffn_dim), random_down(seed, expert, hidden_dim, ffn_dim)


def random_gate_up(seed: int, expert: int, hidden_dim: int, ffn_dim: int) -> np.ndarray:
    """The first of random_expert alone."""
    return _uniform((seed, _EXPERT, expert, 0), (hidden_dim, 2 * ffn_dim), 1 / hidden_dim)


def random_down(seed: int, expert: int, hidden_dim: int, ffn_dim: int) -> np.ndarray:
    """The second of random_expert alone."""
    return _uniform((seed, _EXPERT, expert, 1), (ffn_dim, hidden_dim), 1 / ffn_dim)


def drawn_values(shard: LayerShard, name: str, seed: int) -> Iterator[np.ndarray]:
    """What a rank's parameter `name` of a FusedMoE gets from `seed`: all of a gate; experts one by one."""
    hidden, shared = shard.hidden_size, name.startswith("shared_")
    if name not in EXPERT_WEIGHTS:
        yield random_gate_weight(seed, hidden, 1 if shared else shard.num_experts)
        return
    # The shared expert has the id after the routed ones.
    experts = [shard.num_experts] if shared else range(*shard.experts)
    size = shard.shared_intermediate_size if shared else shard.intermediate_size
    start, stop = shard.shared_columns if shared else shard.columns
    for expert in experts if start < stop else ():
        if name.endswith("gate_up_weight"):
            halves = random_gate_up(seed, expert, hidden, size).reshape([hidden, 2, size])
            values = halves[:, :, start:stop].reshape([hidden, -1])
        else:
            values = random_down(seed, expert, hidden, size)[start:stop]
        yield np.ascontiguousarray(values.T) if shard.permuted_weights else values


def _random_routing(
    seed: int, num_tokens: int, top_k: int, num_experts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [T, K] int32, distinct in a row, and renormalised softmax weights [T, K] fp32."""
    logits = _uniform((seed, _ROUTING), (num_tokens, num_experts), 1.0).astype(np.float64)
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    scores = np.exp(np.take_along_axis(logits, ids, axis=1))
    return ids.astype(np.int32), (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)


@dataclass
class MoEParams:
    """What one call of mixture_of_experts takes, as Paddle tensors.

    Attributes:
        hidden_states: [T, H].
        router_weights: [T, K] fp32, each row sums to one.
        routing_table: [T, K] int32 global expert ids, distinct in a row.
        gate_up_weights: E_l tensors [H, 2I] (fused), or 2*E_l tensors [H, I] (all gates, then all ups).
        down_weights: E_l tensors [I, H]. Every weight is transposed when permuted_weights was asked for.
        experts_min, experts_max: inclusive global ids; experts_max = experts_min - 1 on a rank without
            experts, where the lists are empty and the contribution is zero.
    """

    hidden_states: paddle.Tensor
    router_weights: paddle.Tensor
    routing_table: paddle.Tensor
    gate_up_weights: list[paddle.Tensor]
    down_weights: list[paddle.Tensor]
    experts_min: int
    experts_max: int


def generate_moe_params(
    num_tokens: int,
    hidden_dim: int,
    ffn_dim: int,
    top_k: int,
    num_experts: int,
    permuted_weights: bool = False,
    dtype: str = "float32",
    fused_weights: bool = True,
    seed: int = 2024,
) -> MoEParams:
    """Inputs and dense weights of a mixture-of-experts layer, the same for a seed on every rank and platform.

    Args:
        num_tokens: T, at least 0.
        hidden_dim: H. ffn_dim: I. num_experts: E. All at least 1.
        top_k: K, between 1 and E.
        permuted_weights: store weights as [2I, H] and [H, I].
        dtype: "float32", "bfloat16" or "float16" of hidden_states and the weights (drawn in fp32, then
            rounded).
        fused_weights: one [H, 2I] tensor per expert instead of [H, I] gates and [H, I] ups.
        seed: at least 0.

    Raises:
        ValueError: a size, top_k, dtype or seed is out of its range.
    """
    import paddle

    at_least(0)("num_tokens", num_tokens)
    for name, value in (("hidden_dim", hidden_dim), ("ffn_dim", ffn_dim), ("num_experts", num_experts)):
        at_least(1)(name, value)
    if not 1 <= integer("top_k", top_k) <= num_experts:
        raise ValueError(f"top_k must be between 1 and num_experts = {num_experts}, got {top_k}")
    dtype = one_of("float32", "bfloat16", "float16")("dtype", dtype_name(dtype))
    at_least(0)("seed", seed)

    def tensor(values: np.ndarray) -> paddle.Tensor:
        return paddle.to_tensor(np.ascontiguousarray(values.T if permuted_weights else values)).astype(dtype)

    gates, ups, gate_ups, downs = [], [], [], []
    for expert in range(num_experts):
        gate_up, down = random_expert(seed, expert, hidden_dim, ffn_dim)
        if fused_weights:
            gate_ups.append(tensor(gate_up))
        else:
            gates.append(tensor(gate_up[:, :ffn_dim]))
            ups.append(tensor(gate_up[:, ffn_dim:]))
        downs.append(tensor(down))
    routing_table, router_weights = _random_routing(seed, num_tokens, top_k, num_experts)
    hidden_states = _uniform((seed, _HIDDEN_STATES), (num_tokens, hidden_dim), 1.0)
    return MoEParams(
        hidden_states=paddle.to_tensor(hidden_states).astype(dtype),
        router_weights=paddle.to_tensor(router_weights),
        routing_table=paddle.to_tensor(routing_table),
        gate_up_weights=gate_ups if fused_weights else gates + ups,
        down_weights=downs,
        experts_min=0,
        experts_max=num_experts - 1,
    )


def generate_moe_params_static(
    num_tokens: int,
    hidden_dim: int,
    ffn_dim: int,
    top_k: int,
    num_experts: int,
    permuted_weights: bool = False,
    dtype: str = "float32",
    tp_rank: int = 0,
    tp_size: int = 1,
    ep_rank: int = 0,
    ep_size: int = 1,
    fused_weights: bool = True,
    seed: int = 2024,
) -> tuple[MoEParams, MoEParams]:
    """(dense, local): generate_moe_params, and the part of it that rank (ep_rank, tp_rank) holds.

    Both share hidden_states, router_weights and routing_table: tokens are replicated on every rank. Any
    ep_size and tp_size works, whether or not it divides num_experts and ffn_dim.

    Raises:
        ValueError: as generate_moe_params, or a rank is not in [0, size), or tp_size > ffn_dim.
    """
    for name, rank, size in (("ep", ep_rank, ep_size), ("tp", tp_rank, tp_size)):
        at_least(1)(f"{name}_size", size)
        if not 0 <= integer(f"{name}_rank", rank) < size:
            raise ValueError(f"{name}_rank must be between 0 and {name}_size - 1 = {size - 1}, got {rank}")
    dense = generate_moe_params(
        num_tokens, hidden_dim, ffn_dim, top_k, num_experts, permuted_weights, dtype, fused_weights, seed
    )
    if tp_size > ffn_dim:
        raise ValueError(f"tp_size must be at most ffn_dim = {ffn_dim}, got {tp_size}")
    shard = shard_experts(
        dense.gate_up_weights,
        dense.down_weights,
        permuted_weights=permuted_weights,
        ep_rank=ep_rank,
        ep_size=ep_size,
        tp_rank=tp_rank,
        tp_size=tp_size,
    )
    local = MoEParams(
        dense.hidden_states,
        dense.router_weights,
        dense.routing_table,
        shard.gate_up_weights,
        shard.down_weights,
        shard.experts_min,
        shard.experts_max,
    )
    return dense, local
