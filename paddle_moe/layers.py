"""FusedMoE: router, this rank's experts and an optional shared expert as one paddle.nn.Layer."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle
from paddle import nn

from . import functional
from .params import random_expert, random_gate_weight, shard_experts, shard_range, slice_intermediate

if TYPE_CHECKING:
    from .distributed import ParallelContext
    from .logs import RankLogger


def _now(tensor: paddle.Tensor) -> float:
    """Seconds, after everything queued on the device of `tensor` has run."""
    if tensor.place.is_gpu_place():
        paddle.device.synchronize()
    return time.perf_counter()


def _tensor(value: Any) -> paddle.Tensor:
    return value if isinstance(value, paddle.Tensor) else paddle.to_tensor(value)


class FusedMoE(nn.Layer):
    """Mixture of experts over replicated tokens, split over ranks by expert (EP) and column (TP).

    Every rank passes the same hidden_states and gets the same output. It computes the partial sum of its
    own experts and intermediate columns, and all-reduces add the partial sums up:

        out[t] = sum over k of router_weights[t, k] * expert[routing_table[t, k]](hidden_states[t])
                 + sigmoid(hidden_states[t] @ shared_gate_weight) * shared_expert(hidden_states[t])

    The last line is there with shared_intermediate_size; its sigmoid only with shared_gate. Several
    shared experts are one whose intermediate size is the sum of theirs. Its intermediate dimension is
    sliced over the whole EP x TP grid, so every rank does an equal part of it and the sum counts it once.

    Inference only: gradients do not flow through the operator yet; call eval() before paddle.jit.to_static.

    Parameters of this rank, E_l experts and I_l columns of each (shapes of the shard, see
    params.shard_experts):
        gate_weight [H, E] in gate_dtype, gate_up_weight [E_l, H, 2 I_l], down_weight [E_l, I_l, H],
        gate_up_bias [E_l, 2 I_l], down_bias [E_l, H] (tp_rank 0 only, so that it is added once),
        correction_bias [E] fp32 (a buffer, not trained), shared_gate_up_weight [1, H, 2 Is_l],
        shared_down_weight [1, Is_l, H], shared_gate_weight [H, 1] in gate_dtype.
        Those that were not asked for are None.

    Args:
        hidden_size: H. intermediate_size: I of one expert. num_experts: E over all ranks. top_k: per token.
        parallel: result of init_distributed; None: this process holds everything.
        activation: see mixture_of_experts.
        reduce: "two": all-reduce over ep_group, then over tp_group. "one": a single all-reduce over the
            grid instead; the same sum with less traffic, rounded differently.
        fp32_reduce: add the partial sums in fp32 and round once at the end.
        gate_up_bias, down_bias: experts have biases (zero until loaded).
        shared_intermediate_size: I of the shared expert, 0: none. shared_gate: weigh it by a sigmoid gate.
        scoring, num_groups, topk_groups, group_score, group_mask_fill, renormalize, renormalize_eps,
            scaling_factor: see route. correction_bias: the selection has a bias (zero until loaded).
        chunk_size: see mixture_of_experts.
        dtype: of the expert weights and the hidden states; None: paddle.get_default_dtype().
        gate_dtype: of the gate weights, "float32" or dtype.
        seed: weights are drawn per expert from it, so that the shards of any grid assemble to the same
            dense layer. Give the layers of one model different seeds. None: zeros, for weights that are
            loaded later.
        logger: a RankLogger (also assignable as layer.logger). Each forward then writes a "moe_call"
            event, which counts tokens on the host and waits for the device.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        parallel: ParallelContext | None = None,
        activation: str = "silu",
        reduce: str = "two",
        fp32_reduce: bool = False,
        gate_up_bias: bool = False,
        down_bias: bool = False,
        shared_intermediate_size: int = 0,
        shared_gate: bool = False,
        scoring: str = "softmax",
        correction_bias: bool = False,
        num_groups: int = 1,
        topk_groups: int = 1,
        group_score: str = "max",
        group_mask_fill: float = 0.0,
        renormalize: bool = True,
        renormalize_eps: float = 1e-20,
        scaling_factor: float = 1.0,
        chunk_size: int = 0,
        dtype: str | None = None,
        gate_dtype: str = "float32",
        seed: int | None = 0,
        logger: RankLogger | None = None,
    ):
        super().__init__()
        for name, size in (
            ("hidden_size", hidden_size),
            ("intermediate_size", intermediate_size),
            ("num_experts", num_experts),
        ):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be between 1 and num_experts = {num_experts}, got {top_k}")
        if shared_intermediate_size < 0:
            raise ValueError(
                f"shared_intermediate_size must be at least 0 (0: none), got {shared_intermediate_size}"
            )
        if shared_gate and not shared_intermediate_size:
            raise ValueError("shared_gate=True needs a shared expert, got shared_intermediate_size=0")
        if reduce not in ("two", "one"):
            raise ValueError(f"reduce must be 'two' or 'one', got {reduce!r}")
        dtype = dtype or paddle.get_default_dtype()
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be 'float32', 'bfloat16' or 'float16', got {dtype!r}")
        if gate_dtype not in ("float32", dtype):
            raise ValueError(f"gate_dtype must be 'float32' or dtype = {dtype!r}, got {gate_dtype!r}")

        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_experts, self.top_k = num_experts, top_k
        self.activation, self.reduce, self.fp32_reduce = activation, reduce, fp32_reduce
        self.shared_intermediate_size, self.chunk_size = shared_intermediate_size, chunk_size
        self.route_options = dict(
            scoring=scoring,
            num_groups=num_groups,
            topk_groups=topk_groups,
            group_score=group_score,
            group_mask_fill=group_mask_fill,
            renormalize=renormalize,
            renormalize_eps=renormalize_eps,
            scaling_factor=scaling_factor,
        )
        self.parallel, self.logger = parallel, logger
        if parallel is None:
            self.ep_rank, self.ep_size, self.tp_rank, self.tp_size = 0, 1, 0, 1
        else:
            self.ep_rank, self.ep_size = parallel.ep_rank, parallel.ep_size
            self.tp_rank, self.tp_size = parallel.tp_rank, parallel.tp_size
        if self.tp_size > intermediate_size:
            raise ValueError(
                f"intermediate_size must be at least tp_size = {self.tp_size}, got {intermediate_size}"
            )

        first, end = shard_range(num_experts, self.ep_rank, self.ep_size)
        self.experts_min, self.experts_max = first, end - 1
        start, stop = shard_range(intermediate_size, self.tp_rank, self.tp_size)
        shared_start, shared_stop = shard_range(
            shared_intermediate_size, self.ep_rank * self.tp_size + self.tp_rank, self.ep_size * self.tp_size
        )
        experts, columns, shared_columns = end - first, stop - start, shared_stop - shared_start
        self._holds_experts, self._holds_shared = experts > 0, shared_columns > 0

        def weight(shape: list[int], dtype: str, wanted: bool = True) -> paddle.Tensor | None:
            zeros = nn.initializer.Constant(0.0)
            return self.create_parameter(shape, dtype=dtype, default_initializer=zeros) if wanted else None

        shared = shared_intermediate_size > 0
        self.gate_weight = weight([hidden_size, num_experts], gate_dtype)
        self.gate_up_weight = weight([experts, hidden_size, 2 * columns], dtype)
        self.down_weight = weight([experts, columns, hidden_size], dtype)
        self.gate_up_bias = weight([experts, 2 * columns], dtype, gate_up_bias)
        self.down_bias = weight([experts, hidden_size], dtype, down_bias and self.tp_rank == 0)
        self.shared_gate_up_weight = weight([1, hidden_size, 2 * shared_columns], dtype, shared)
        self.shared_down_weight = weight([1, shared_columns, hidden_size], dtype, shared)
        self.shared_gate_weight = weight([hidden_size, 1], gate_dtype, shared_gate)
        self.register_buffer("correction_bias", paddle.zeros([num_experts]) if correction_bias else None)
        if seed is not None:
            self._draw_weights(seed)

    @classmethod
    def from_dense(
        cls,
        gate_weight: Any,
        gate_up: Any,
        down: Any,
        top_k: int,
        *,
        parallel: ParallelContext | None = None,
        gate_up_bias: Any = None,
        down_bias: Any = None,
        correction_bias: Any = None,
        shared_gate_up: Any = None,
        shared_down: Any = None,
        shared_gate: Any = None,
        **options: Any,
    ) -> FusedMoE:
        """The layer that holds this rank's shard of dense weights, given as Paddle tensors or NumPy arrays.

        Args:
            gate_weight: [H, E]. gate_up: [E, H, 2I], gate columns first. down: [E, I, H].
            gate_up_bias: [E, 2I]. down_bias: [E, H]. correction_bias: [E].
            shared_gate_up: [H, 2 Is] and shared_down: [Is, H] of the shared expert. shared_gate: [H, 1].
            options: as the constructor, without seed. dtype is by default that of gate_up.

        Raises:
            ValueError: a shape does not fit the others.
        """
        if len(gate_up.shape) != 3:
            raise ValueError(f"gate_up must have the shape [E, H, 2I], got {list(gate_up.shape)}")
        num_experts, hidden_size, columns = gate_up.shape
        if columns % 2:
            raise ValueError(
                f"gate_up must have an even last dimension 2I, got the shape {list(gate_up.shape)}"
            )
        if (shared_gate_up is None) != (shared_down is None):
            missing = "shared_gate_up" if shared_gate_up is None else "shared_down"
            raise ValueError(f"shared_gate_up and shared_down belong together, got None for {missing}")
        shared_size = 0 if shared_down is None else shared_down.shape[0]
        expected_shapes = {
            "gate_weight": (gate_weight, [hidden_size, num_experts]),
            "down": (down, [num_experts, columns // 2, hidden_size]),
            "gate_up_bias": (gate_up_bias, [num_experts, columns]),
            "down_bias": (down_bias, [num_experts, hidden_size]),
            "correction_bias": (correction_bias, [num_experts]),
            "shared_gate_up": (shared_gate_up, [hidden_size, 2 * shared_size]),
            "shared_down": (shared_down, [shared_size, hidden_size]),
            "shared_gate": (shared_gate, [hidden_size, 1]),
        }
        for name, (tensor, expected) in expected_shapes.items():
            if tensor is not None and list(tensor.shape) != expected:
                raise ValueError(f"{name} must have the shape {expected}, got {list(tensor.shape)}")

        options.setdefault("dtype", str(_tensor(gate_up[:0]).dtype).rpartition(".")[2])
        layer = cls(
            hidden_size,
            columns // 2,
            num_experts,
            top_k,
            parallel=parallel,
            gate_up_bias=gate_up_bias is not None,
            down_bias=down_bias is not None,
            correction_bias=correction_bias is not None,
            shared_intermediate_size=shared_size,
            shared_gate=shared_gate is not None,
            seed=None,
            **options,
        )
        shard = shard_experts(
            gate_up,
            down,
            gate_up_bias,
            down_bias,
            ep_rank=layer.ep_rank,
            ep_size=layer.ep_size,
            tp_rank=layer.tp_rank,
            tp_size=layer.tp_size,
        )
        layer._load(
            gate_weight=gate_weight,
            gate_up_weight=shard.gate_up_weights,
            down_weight=shard.down_weights,
            gate_up_bias=shard.gate_up_bias,
            down_bias=shard.down_bias,
            correction_bias=correction_bias,
            shared_gate_weight=shared_gate,
        )
        if shared_size:
            layer._load_shared(shared_gate_up, shared_down)
        return layer

    def _load(self, **values: Any) -> None:
        for name, value in values.items():
            if value is not None:
                parameter = getattr(self, name)
                parameter.set_value(_tensor(value).astype(parameter.dtype))

    def _load_shared(self, gate_up: Any, down: Any) -> None:
        """Cuts this rank's columns out of the dense shared expert, [H, 2 Is] and [Is, H]."""
        rank, size = self.ep_rank * self.tp_size + self.tp_rank, self.ep_size * self.tp_size
        self._load(
            shared_gate_up_weight=slice_intermediate(gate_up, rank, size, axis=-1, halves=2)[None],
            shared_down_weight=slice_intermediate(down, rank, size, axis=-2)[None],
        )

    @paddle.no_grad()
    def _draw_weights(self, seed: int) -> None:
        self._load(gate_weight=random_gate_weight(seed, self.hidden_size, self.num_experts))
        dtype = self.down_weight.dtype
        for slot, expert in enumerate(range(self.experts_min, self.experts_max + 1)):
            gate_up, down = random_expert(seed, expert, self.hidden_size, self.intermediate_size)
            shard = shard_experts([gate_up], [down], tp_rank=self.tp_rank, tp_size=self.tp_size)
            self.gate_up_weight[slot] = paddle.to_tensor(shard.gate_up_weights[0]).astype(dtype)
            self.down_weight[slot] = paddle.to_tensor(shard.down_weights[0]).astype(dtype)
        if self.shared_intermediate_size:
            # The shared expert has the id after the routed ones.
            self._load_shared(
                *random_expert(seed, self.num_experts, self.hidden_size, self.shared_intermediate_size)
            )
        if self.shared_gate_weight is not None:
            self._load(shared_gate_weight=random_gate_weight(seed, self.hidden_size, 1))

    def route(self, hidden_states: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """(routing_table int32 [T, K], router_weights fp32 [T, K]) for hidden_states [T, H]."""
        logits = functional.gate(hidden_states, self.gate_weight)
        bias = self.correction_bias
        return functional.route(logits, self.top_k, correction_bias=bias, **self.route_options)

    def partial_output(
        self, hidden_states: paddle.Tensor, routing_table: paddle.Tensor, router_weights: paddle.Tensor
    ) -> paddle.Tensor:
        """What this rank adds to the output: [T, H], fp32 with fp32_reduce, else the dtype of hidden_states.

        The sum over all ranks of the grid is the output. Arguments are [T, H], [T, K], [T, K].
        """
        dtype = "float32" if self.fp32_reduce else hidden_states.dtype
        # With more ranks than experts a rank may have nothing to add, but the others wait for its zeros.
        if not self._holds_experts and not self._holds_shared:
            return paddle.zeros_like(hidden_states, dtype=dtype)
        if not self._holds_shared:
            return self._routed_output(hidden_states, routing_table, router_weights).astype(dtype)
        if not self._holds_experts:
            return self._shared_output(hidden_states).astype(dtype)
        routed = self._routed_output(hidden_states, routing_table, router_weights)
        # In fp32, also because the CPU has no half-precision addition.
        total = routed.astype("float32") + self._shared_output(hidden_states).astype("float32")
        return total.astype(dtype)

    def _routed_output(
        self, hidden_states: paddle.Tensor, routing_table: paddle.Tensor, router_weights: paddle.Tensor
    ) -> paddle.Tensor:
        return functional.mixture_of_experts(
            hidden_states,
            routing_table,
            router_weights,
            self.gate_up_weight,
            self.down_weight,
            self.gate_up_bias,
            self.down_bias,
            activation=self.activation,
            experts_min=self.experts_min,
            experts_max=self.experts_max,
            chunk_size=self.chunk_size,
        )

    def _shared_output(self, hidden_states: paddle.Tensor) -> paddle.Tensor:
        """The shared expert as a mixture of one expert that every token goes to."""
        if self.shared_gate_weight is None:
            weights = paddle.ones_like(hidden_states[:, :1], dtype="float32")
        else:
            weights = nn.functional.sigmoid(functional.gate(hidden_states, self.shared_gate_weight))
        return functional.mixture_of_experts(
            hidden_states,
            paddle.zeros_like(weights, dtype="int32"),
            weights,
            self.shared_gate_up_weight,
            self.shared_down_weight,
            activation=self.activation,
            chunk_size=self.chunk_size,
        )

    def forward(
        self,
        hidden_states: paddle.Tensor,
        routing_table: paddle.Tensor | None = None,
        router_weights: paddle.Tensor | None = None,
        return_routing: bool = False,
    ) -> paddle.Tensor | tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
        """The output of the whole layer, the same on every rank.

        With PADDLE_MOE_CHECK=1 in the environment of every rank, ranks that disagree on the routing raise a
        RuntimeError that names them.

        Args:
            hidden_states: [..., H], the same on every rank.
            routing_table, router_weights: [..., K] ids (int32 or int64) and weights (fp32 or the dtype of
                hidden_states) to use instead of the router's, for example those that an earlier call
                returned. Both or neither.
            return_routing: also return the routing.

        Returns:
            out [..., H] in the dtype of hidden_states; with return_routing (out, routing_table [T, K],
            router_weights [T, K]), T being the product of the leading dimensions.

        Raises:
            ValueError: a shape or dtype does not fit.
        """
        if (routing_table is None) != (router_weights is None):
            missing = "routing_table" if routing_table is None else "router_weights"
            raise ValueError(f"routing_table and router_weights belong together, got None for {missing}")
        if hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden_states must have the shape [..., H] with H = {self.hidden_size}, "
                f"got {list(hidden_states.shape)}"
            )
        tokens = hidden_states.reshape([-1, self.hidden_size])
        if routing_table is None:
            routing_table, router_weights = self.route(tokens)
        else:
            routing_table = routing_table.reshape([-1, routing_table.shape[-1]])
            router_weights = router_weights.reshape([-1, router_weights.shape[-1]])
        if self.parallel is not None and os.environ.get("PADDLE_MOE_CHECK") == "1":
            self.parallel.check_same_routing(routing_table, router_weights)

        output = self._timed_output(tokens, routing_table, router_weights).astype(tokens.dtype)
        output = output.reshape(hidden_states.shape)
        return (output, routing_table, router_weights) if return_routing else output

    def _timed_output(
        self, tokens: paddle.Tensor, routing_table: paddle.Tensor, router_weights: paddle.Tensor
    ) -> paddle.Tensor:
        if self.logger is None:
            return self._all_reduce(self.partial_output(tokens, routing_table, router_weights))
        started = _now(tokens)
        partial = self.partial_output(tokens, routing_table, router_weights)
        computed = _now(partial)
        output = self._all_reduce(partial)
        reduced = _now(output)
        slots = routing_table.numpy().ravel() - self.experts_min
        experts = self.experts_max - self.experts_min + 1
        slots = slots[(slots >= 0) & (slots < experts)]
        self.logger.event(
            "moe_call",
            layer=self.full_name(),
            num_tokens=tokens.shape[0],
            tokens_per_expert=np.bincount(slots, minlength=experts).tolist(),
            experts_min=self.experts_min,
            kernel_ms=1e3 * (computed - started),
            collective_ms=1e3 * (reduced - computed),
        )
        return output

    def _all_reduce(self, partial: paddle.Tensor) -> paddle.Tensor:
        if self.parallel is None:
            return partial
        if self.reduce == "one":
            return self.parallel.all_reduce(partial, "grid")
        return self.parallel.all_reduce(self.parallel.all_reduce(partial, "ep"), "tp")

    def extra_repr(self) -> str:
        start, stop = shard_range(self.intermediate_size, self.tp_rank, self.tp_size)
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size} "
            f"(here {start}..{stop - 1}), num_experts={self.num_experts} "
            f"(here {self.experts_min}..{self.experts_max}), top_k={self.top_k}, "
            f"activation={self.activation}, shared_intermediate_size={self.shared_intermediate_size}, "
            f"ep {self.ep_rank} of {self.ep_size}, tp {self.tp_rank} of {self.tp_size}, "
            f"reduce={self.reduce}, dtype={str(self.down_weight.dtype).rpartition('.')[2]}"
        )
