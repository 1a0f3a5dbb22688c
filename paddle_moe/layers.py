"""FusedMoE: router, this rank's experts and an optional shared expert as one paddle.nn.Layer."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, TypeVar

import numpy as np
import paddle
from paddle import nn

from paddle_moe import _core, core, functional
from paddle_moe._options import ROUTE_OPTIONS, at_least, checked, dtype_name, flag, one_of, switch, type_name
from paddle_moe.all_to_all import all_to_all_experts
from paddle_moe.collectives import has_no_rows, leave_shards, no_contribution
from paddle_moe.layer_weights import DTYPES, ShardedWeights, as_tensor
from paddle_moe.logs import RankLogger
from paddle_moe.params import PLACE, LayerShard, shard_range
from paddle_moe.prepacking import expect_dtype_of_prepacked
from paddle_moe.router import Router
from paddle_moe.sharded import expect_dynamic_mode, partial_sum

if TYPE_CHECKING:
    from paddle_moe.distributed import ParallelContext


T = TypeVar("T")

# Of those options of FusedMoE that can be checked one by one.
_CHECKS = {
    "hidden_size": at_least(1),
    "intermediate_size": at_least(1),
    "num_experts": at_least(1),
    "shared_intermediate_size": at_least(0, " (0: none)"),
    "dispatch": one_of("replicated", "alltoall"),
    "reduce": one_of("two", "one"),
    "dtype": one_of(*DTYPES),
    **dict.fromkeys(("gate_bias", "gate_up_bias", "down_bias", "shared_gate", "correction_bias"), flag),
    **dict.fromkeys(("fp32_reduce", "recompute", "permuted_weights"), flag),
}


def _now(tensor: paddle.Tensor) -> float:
    """Seconds, after everything queued on the device of `tensor` has run."""
    if tensor.place.is_gpu_place():
        paddle.device.synchronize()
    return time.perf_counter()


@dataclass
class _Partial:
    """What the experts of a rank give."""

    output: paddle.Tensor  # [T, H]
    amax: paddle.Tensor | None  # [E_l], where it was asked for
    ids: paddle.Tensor  # the routing table that they saw
    exchange_seconds: float = 0.0  # of an all-to-all, where there is a logger: what no computation hid


class _OwnExperts:
    """The experts of one rank as a function of the rows that have arrived there."""

    def __init__(self, layer: FusedMoE, measure: bool):
        self.layer, self.measure = layer, measure
        self.amax: paddle.Tensor | None = None
        self.ids: paddle.Tensor | None = None  # None until called

    def __call__(self, rows: paddle.Tensor, ids: paddle.Tensor, weights: paddle.Tensor) -> paddle.Tensor:
        self.ids = ids
        output, self.amax = self.layer._routed_output(rows, ids, weights, self.measure)
        return output


def _expect_arrays(**arrays: Any) -> None:
    for name, array in arrays.items():
        if not hasattr(array, "shape"):
            raise ValueError(f"{name} must be a Paddle tensor or a NumPy array, got {type_name(array)}")


class FusedMoE(ShardedWeights):
    """Mixture of experts, split over ranks by expert (EP) and column (TP).

    Every rank passes the same hidden_states and gets the same output (unless dispatch="alltoall"). It
    computes the partial sum of its own experts and intermediate columns, and all-reduces add them up:

        out[t] = sum over k of router_weights[t, k] * expert[routing_table[t, k]](hidden_states[t])
                 + sigmoid(hidden_states[t] @ shared_gate_weight) * shared_expert(hidden_states[t])

    The last line is there with shared_intermediate_size; its sigmoid only with shared_gate. Several
    shared experts are one whose intermediate size is the sum of theirs. Its intermediate dimension is
    sliced over the whole EP x TP grid, so every rank does an equal part of it and the sum counts it once.

    Training: every rank gets the whole gradient of hidden_states, of the router and of the shared gate, and
    that of its own shard of the experts. Jitter, capacity and the counts behind update_correction_bias are
    parts of training mode only; eval() turns them off. Auxiliary losses are then computed where a call asks
    for them. See docs/training.md.

    Parameters of this rank, E_l experts and I_l columns of each (shapes of the shard, see
    params.shard_experts):
        gate_weight [H, E] and gate_bias [E] in gate_dtype, gate_up_weight [E_l, H, 2 I_l],
        down_weight [E_l, I_l, H], gate_up_bias [E_l, 2 I_l], down_bias [E_l, H] (tp_rank 0 only, so that it
        is added once), correction_bias [E] fp32 (a buffer, not trained), shared_gate_up_weight
        [1, H, 2 Is_l], shared_down_weight [1, Is_l, H], shared_gate_weight [H, 1] in gate_dtype.
        Those that were not asked for are None. With permuted_weights the last two dimensions of the four
        weights of experts are swapped.

    Sharded parameters carry the flags that fleet and PaddleNLP know: is_distributed, expert, no_sync (which
    keeps paddle.DataParallel from averaging different shards) and color.

    Args:
        hidden_size: H. intermediate_size: I of one expert. num_experts: E over all ranks. top_k: per token.
        parallel: result of init_distributed; None: this process holds everything.
        activation: see mixture_of_experts.
        dispatch: "replicated": every rank of the grid passes the same tokens. "alltoall": every EP rank
            passes tokens of its own (the ranks of a tp_group the same), and only the rows that another rank's
            experts need travel, see all_to_all.py. The shared expert is then sliced over tp_group alone and
            runs while the rows travel.
        reduce: "two": all-reduce over ep_group, then over tp_group. "one": a single all-reduce over the
            grid instead; the same sum with less traffic, rounded differently.
        fp32_reduce: add the partial sums, and those of the gradients, in fp32 and round once at the end.
        gate_bias: the router's logits have a bias (zero until loaded), as in gpt-oss; trained, and unlike
            correction_bias part of the router's weights.
        gate_up_bias, down_bias: experts have biases (zero until loaded).
        shared_intermediate_size: I of the shared expert, 0: none. shared_gate: weigh it by a sigmoid gate.
        scoring, num_groups, topk_groups, group_score, group_mask_fill, renormalize, renormalize_eps,
            scaling_factor: see route. correction_bias: the selection has a bias (zero until loaded).
        balance_loss_weight: weight of load_balancing_loss in the auxiliary loss.
        balance_loss: the tokens whose load is balanced: "batch", those of this call; "sequence", each
            sequence of hidden_states [..., S, H]; "global", those of all data-parallel replicas.
        z_loss_weight: weight of router_z_loss in the auxiliary loss.
        jitter_epsilon: see policies.jitter; of the router's input only. 0: none.
        capacity_factor, drop_policy: see policies.limit_capacity; over the tokens of this call. None:
            dropless.
        bias_update_speed: of update_correction_bias, 0: correction_bias is left alone.
        recompute, chunk_size: see mixture_of_experts.
        permuted_weights: the weights of experts are stored [out, in], which a CPU multiplies as fast or
            faster with few tokens and slower with many (docs/cpu_weights.md). from_dense takes the same, and
            a checkpoint loads into either; a state_dict() only into a layer that stores them alike.
        dtype: of the expert weights and the hidden states, a name or a paddle.dtype; None:
            paddle.get_default_dtype().
        gate_dtype: of the gate weights, "float32" or dtype.
        seed: weights are drawn per expert from it, so that the shards of any grid assemble to the same
            dense layer. "own": 0 for the first layer that this process makes so, 1 for the second and so on;
            the same on all ranks that make the same layers, those without `parallel` counted apart. None:
            zeros, for weights that are loaded later.
        logger: a RankLogger (also assignable as layer.logger). Each forward then writes a "moe_call"
            event, which counts tokens on the host and waits for the device. A program, as of
            to_static(full_graph=True) or jit.save, writes none. One passed here beside `parallel` also gets
            the reason when the rank is ended, unless ParallelContext.log_failures_to has named another.

    Under paddle.LazyGuard the weights are drawn when parameter.initialize() is called.

    Raises:
        ValueError: an argument is out of its range, or does not fit another one.
        RuntimeError: paddle.enable_static() is in force.
    """

    _own_seeds = {False: itertools.count(), True: itertools.count()}  # of layers that are parallel

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        parallel: ParallelContext | None = None,
        activation: str = "silu",
        dispatch: str = "replicated",
        reduce: str = "two",
        fp32_reduce: bool = False,
        gate_bias: bool = False,
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
        balance_loss_weight: float = 0.0,
        balance_loss: str = "batch",
        z_loss_weight: float = 0.0,
        jitter_epsilon: float = 0.0,
        capacity_factor: float | None = None,
        drop_policy: str = "probability",
        bias_update_speed: float = 0.0,
        recompute: bool = False,
        chunk_size: int = 0,
        permuted_weights: bool = False,
        dtype: str | paddle.dtype | None = None,
        gate_dtype: str | paddle.dtype = "float32",
        seed: int | str | None = "own",
        logger: RankLogger | None = None,
    ):
        if not paddle.in_dynamic_mode():
            raise RuntimeError(
                "FusedMoE holds its weights in dynamic mode, but a static program is being built; make it"
                " before paddle.enable_static() and compile it with paddle.jit.to_static, or call"
                " paddle_moe.fused_gate_moe with parameters of the program"
            )
        dtype = dtype_name(paddle.get_default_dtype() if dtype is None else dtype)
        gate_dtype = dtype_name(gate_dtype)
        given = locals()
        checked(_CHECKS, given)
        if gate_dtype not in ("float32", dtype):
            raise ValueError(f"gate_dtype must be 'float32' or dtype = {dtype!r}, got {gate_dtype!r}")
        if shared_gate and not shared_intermediate_size:
            raise ValueError("shared_gate=True needs a shared expert, got shared_intermediate_size=0")
        if bias_update_speed and not correction_bias:
            raise ValueError("bias_update_speed needs a bias to update, got correction_bias=False")
        sources = {"parallel": ("init_distributed", "ep_rank"), "logger": ("get_rank_logger", "event")}
        for name, (source, attribute) in sources.items():
            if given[name] is not None and not hasattr(given[name], attribute):
                raise ValueError(f"{name} must be what {source} returns, or None, got {given[name]!r}")
        # Options that the router or the operator would refuse are refused before there are weights.
        router = Router(
            num_experts,
            {name: given[name] for name in ROUTE_OPTIONS},
            balance_loss_weight=balance_loss_weight,
            balance_loss=balance_loss,
            z_loss_weight=z_loss_weight,
            jitter_epsilon=jitter_epsilon,
            capacity_factor=capacity_factor,
            drop_policy=drop_policy,
            bias_update_speed=bias_update_speed,
            parallel=parallel,
            same_tokens="tp" if dispatch == "alltoall" else "grid",
            replicas=("dp", "ep") if dispatch == "alltoall" else ("dp",),
        )
        core._experts(
            _core.Spec(dtype, [-1, hidden_size]),
            _core.Spec("int32", [-1, top_k]),
            _core.Spec("float32", [-1, top_k]),
            _core.Spec(dtype, [1, hidden_size, 2 * intermediate_size]),
            _core.Spec(dtype, [1, intermediate_size, hidden_size]),
            activation=activation,
            chunk_size=chunk_size,
        )
        shard = LayerShard(
            hidden_size,
            intermediate_size,
            num_experts,
            shared_intermediate_size,
            shared_over_grid=dispatch == "replicated",
            permuted_weights=permuted_weights,
            **({} if parallel is None else {name: getattr(parallel, name) for name in PLACE}),
        )
        if shard.tp_size > intermediate_size:
            raise ValueError(
                f"intermediate_size must be at least tp_size = {shard.tp_size}, got {intermediate_size}"
            )
        if seed == "own":
            seed = next(self._own_seeds[parallel is not None])
        elif seed is not None:
            at_least(0, ", 'own' or None")("seed", seed)

        super().__init__(
            shard, parallel, dtype, gate_dtype, gate_bias, gate_up_bias, down_bias, shared_gate, seed
        )
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.activation, self.fp32_reduce = activation, fp32_reduce
        self._num_experts, self._top_k, self._dispatch, self._reduce = num_experts, top_k, dispatch, reduce
        self.shared_intermediate_size = shared_intermediate_size
        self.recompute, self.chunk_size = recompute, chunk_size
        self.router, self.logger = router, logger
        if parallel is not None and isinstance(logger, RankLogger) and not parallel.logs_failures:
            parallel.log_failures_to(logger)
        # Groups of `parallel` whose ranks hold parts of the same output.
        if dispatch == "alltoall":
            self._partial_groups = ("tp",)
        else:
            self._partial_groups = ("ep", "tp") if reduce == "two" else ("grid",)
        bias = paddle.zeros([num_experts], "float32") if correction_bias else None
        self.register_buffer("correction_bias", bias)
        # Tokens per expert since the last update_correction_bias.
        counts = paddle.zeros([num_experts], "int64") if bias_update_speed else None
        self.register_buffer("expert_counts", counts, persistable=False)

    # What router, shards and groups were made for, and cannot be changed afterwards.
    @property
    def num_experts(self) -> int:
        return self._num_experts

    @property
    def top_k(self) -> int:
        return self._top_k

    @property
    def dispatch(self) -> str:
        return self._dispatch

    @property
    def reduce(self) -> str:
        return self._reduce

    @classmethod
    def from_dense(
        cls,
        gate_weight: Any,
        gate_up: Any,
        down: Any,
        top_k: int,
        *,
        parallel: ParallelContext | None = None,
        gate_bias: Any = None,
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
            gate_bias: [E]. gate_up_bias: [E, 2I]. down_bias: [E, H]. correction_bias: [E].
            shared_gate_up: [H, 2 Is] and shared_down: [Is, H] of the shared expert. shared_gate: [H, 1].
            options: as the constructor, without seed. dtype is by default that of gate_up.

        Raises:
            ValueError: a shape does not fit the others.
        """
        if "seed" in options:
            raise ValueError("seed must not be given: the weights are those passed")
        _expect_arrays(gate_weight=gate_weight, gate_up=gate_up, down=down)
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
        if shared_gate is not None and shared_down is None:
            raise ValueError(
                "shared_gate is for a shared expert, got None for shared_gate_up and shared_down"
            )
        if shared_down is not None:
            _expect_arrays(shared_down=shared_down)
        shared_size = 0 if shared_down is None else shared_down.shape[0]
        expected_shapes = {
            "gate_weight": (gate_weight, [hidden_size, num_experts]),
            "down": (down, [num_experts, columns // 2, hidden_size]),
            "gate_bias": (gate_bias, [num_experts]),
            "gate_up_bias": (gate_up_bias, [num_experts, columns]),
            "down_bias": (down_bias, [num_experts, hidden_size]),
            "correction_bias": (correction_bias, [num_experts]),
            "shared_gate_up": (shared_gate_up, [hidden_size, 2 * shared_size]),
            "shared_down": (shared_down, [shared_size, hidden_size]),
            "shared_gate": (shared_gate, [hidden_size, 1]),
        }
        for name, (tensor, expected) in expected_shapes.items():
            if tensor is None:
                continue
            _expect_arrays(**{name: tensor})
            if list(tensor.shape) != expected:
                raise ValueError(f"{name} must have the shape {expected}, got {list(tensor.shape)}")

        if options.get("dtype") is None:
            options["dtype"] = dtype_name(as_tensor(gate_up[:0]).dtype)
            _CHECKS["dtype"]("without dtype=, the dtype of gate_up", options["dtype"])
        layer = cls(
            hidden_size,
            columns // 2,
            num_experts,
            top_k,
            parallel=parallel,
            gate_bias=gate_bias is not None,
            gate_up_bias=gate_up_bias is not None,
            down_bias=down_bias is not None,
            correction_bias=correction_bias is not None,
            shared_intermediate_size=shared_size,
            shared_gate=shared_gate is not None,
            seed=None,
            **options,
        )
        layer._load(
            gate_weight=gate_weight,
            gate_bias=gate_bias,
            gate_up_weight=gate_up,
            down_weight=down,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            correction_bias=correction_bias,
            shared_gate_up_weight=shared_gate_up,
            shared_down_weight=shared_down,
            shared_gate_weight=shared_gate,
        )
        return layer

    def _logits(self, tokens: paddle.Tensor) -> paddle.Tensor:
        weight = self._gate_for(tokens, self.gate_weight)
        return self.router.logits(tokens, weight, self.gate_bias, self.training)

    def _gate_for(self, tokens: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
        """The weight of a gate, where tokens may be of another dtype, as it goes with them."""
        fits = self.quantized is None or weight.dtype == tokens.dtype
        return weight if fits else weight.astype("float32")

    @functional.without_autocast
    def route(self, hidden_states: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """(routing_table int32 [T, K], router_weights fp32 [T, K]) for hidden_states [T, H].

        In training mode with jitter and drops, like `forward`.
        """
        logits = self._logits(hidden_states)
        return self.router.drop(*self.router.choose(logits, self.correction_bias), self.training)

    @functional.without_autocast
    def partial_output(
        self, hidden_states: paddle.Tensor, routing_table: paddle.Tensor, router_weights: paddle.Tensor
    ) -> paddle.Tensor:
        """What this rank adds to the output: [T, H], fp32 with fp32_reduce, else the dtype of hidden_states.

        The sum over all ranks of the grid is the output (with dispatch="alltoall", over the TP group).
        Arguments are [T, H], [T, K], [T, K]. The gradients of hidden_states, router_weights and the shared
        gate are sums over the same ranks, so all of them run the backward together.
        """
        functional.expect_tensors(
            hidden_states=hidden_states, routing_table=routing_table, router_weights=router_weights
        )
        return self._partial_output(hidden_states, routing_table, router_weights).output

    def _partial_output(
        self,
        hidden_states: paddle.Tensor,
        routing_table: paddle.Tensor,
        router_weights: paddle.Tensor,
        measure: bool = False,
    ) -> _Partial:
        autocast = functional._autocast_dtype()
        if autocast is not None:  # here, so that every rank casts and reduces alike
            if self.prepacked and self.quantized is None:
                expect_dtype_of_prepacked(self.down_weight.dtype, autocast, "prepack_()")
            hidden_states = hidden_states.astype(autocast)
        experts = _OwnExperts(self, measure)
        seconds = {"all": 0.0, "experts": 0.0, "shared": 0.0}
        routed, shared, exchange = experts, self._shared_output, None
        if self.dispatch == "alltoall" and self.ep_size > 1:
            ranges = [shard_range(self.num_experts, rank, self.ep_size) for rank in range(self.ep_size)]
            exchange = partial(all_to_all_experts, expert_ranges=ranges, parallel=self.parallel)
            exchange = self._watched(exchange, seconds, "all")
            routed = self._watched(routed, seconds, "experts")
            shared = self._watched(shared, seconds, "shared")
        output = partial_sum(
            hidden_states,
            routing_table,
            router_weights,
            self._shared_share(hidden_states) if self.shared_intermediate_size else None,
            routed=routed,
            shared=shared,
            parallel=self.parallel,
            groups=self._partial_groups,
            fp32=self.fp32_reduce,
            exchange=exchange,
        )
        exchange_seconds = seconds["all"] - seconds["experts"] - seconds["shared"]
        if experts.ids is None:  # an all-to-all does not call a rank without experts
            experts.ids = paddle.zeros([0, self.top_k], "int32")
            experts.amax = paddle.zeros([0], "float32") if measure else None
        output = output.astype("float32" if self.fp32_reduce else hidden_states.dtype)
        return _Partial(output, experts.amax, experts.ids, exchange_seconds)

    @property
    def _is_timed(self) -> bool:
        """Whether calls are events; not while a program is being built, when nothing runs."""
        return self.logger is not None and paddle.in_dynamic_mode()

    def _watched(self, function: Callable[..., T], seconds: dict[str, float], name: str) -> Callable[..., T]:
        """`function`; where there is a logger, what a call takes is added to `seconds`."""
        if not self._is_timed:
            return function

        def call(*arguments: Any, **options: Any) -> T:
            started = _now(self.gate_weight)
            result = function(*arguments, **options)
            seconds[name] += _now(self.gate_weight) - started
            return result

        return call

    def _routed_output(
        self,
        hidden_states: paddle.Tensor,
        routing_table: paddle.Tensor,
        router_weights: paddle.Tensor,
        measure: bool,
    ) -> tuple[paddle.Tensor, paddle.Tensor | None]:
        weights = self.gate_up_weight, self.down_weight, self.gate_up_bias, self.down_bias
        if self.quantized is not None:  # hidden_states may be of any dtype then
            biases = (one if one is None else one.astype(hidden_states.dtype) for one in weights[2:])
            weights = *weights[:2], *biases
        num_experts = self.experts_max - self.experts_min + 1
        if not num_experts or has_no_rows(hidden_states):
            # With more ranks than experts a rank may have nothing to add, but the others wait for its zeros.
            amax = paddle.zeros([num_experts], "float32") if measure else None
            return no_contribution(hidden_states, router_weights, *weights), amax
        result = functional.mixture_of_experts(
            hidden_states,
            routing_table,
            router_weights,
            *weights,
            activation=self.activation,
            experts_min=self.experts_min,
            experts_max=self.experts_max,
            measurement_mode=measure,
            recompute=self.recompute,
            chunk_size=self.chunk_size,
            **self._storage(),
        )
        return result if measure else (result, None)

    def _shared_share(self, hidden_states: paddle.Tensor) -> paddle.Tensor:
        """The weight of the shared expert in each token, [T, 1] fp32."""
        if self.shared_gate_weight is None:
            return paddle.ones_like(hidden_states[:, :1], dtype="float32")
        weight = self._gate_for(hidden_states, self.shared_gate_weight)
        return nn.functional.sigmoid(functional.gate(hidden_states, weight))

    def _shared_output(self, hidden_states: paddle.Tensor, share: paddle.Tensor) -> paddle.Tensor:
        """The shared expert as a mixture of one expert that every token goes to."""
        weights = self.shared_gate_up_weight, self.shared_down_weight
        if not self._holds_shared_columns:
            return no_contribution(hidden_states, share, *weights)
        return functional.mixture_of_experts(
            hidden_states,
            paddle.zeros_like(share, dtype="int32"),
            share,
            *weights,
            activation=self.activation,
            recompute=self.recompute,
            chunk_size=self.chunk_size,
            **self._storage("shared_"),
        )

    def forward(
        self,
        hidden_states: paddle.Tensor,
        routing_table: paddle.Tensor | None = None,
        router_weights: paddle.Tensor | None = None,
        return_routing: bool = False,
        return_aux_loss: bool = False,
        return_amax: bool = False,
    ) -> paddle.Tensor | tuple[paddle.Tensor, ...]:
        """The output of the whole layer, the same on all ranks that passed the same tokens.

        With PADDLE_MOE_CHECK=1 in the environment of every rank, ranks that disagree on the routing of
        replicated tokens raise a RuntimeError that names them.

        Args:
            hidden_states: [..., H], the same on every rank of the grid; with dispatch="alltoall" on every
                rank of the TP group.
            routing_table, router_weights: [..., K] ids (int32 or int64) and weights (fp32 or the dtype of
                hidden_states) to use instead of the router's, for example those that an earlier call
                returned. Both or neither. They are used as they are: no jitter, no drops, no counts.
            return_routing: also return the routing.
            return_aux_loss: also return the auxiliary loss, to be added to the loss of the model.
            return_amax: also return the largest intermediates.

        Returns:
            out [..., H] in the dtype of hidden_states; with any return_* a tuple, in this order:
            return_routing: routing_table [T, K], router_weights [T, K], T being the product of the leading
                dimensions; -1 and 0 where capacity dropped a slot.
            return_aux_loss: scalar fp32, balance_loss_weight * load_balancing_loss + z_loss_weight *
                router_z_loss, the same on all ranks that passed the same tokens.
            return_amax: [E] fp32, the amax of mixture_of_experts over all ranks of the grid.

        Raises:
            ValueError: a shape or dtype does not fit, or in training mode the layer has auxiliary losses but
                return_aux_loss is False.
            NotImplementedError: the layer is spread over ranks and a static program is being built.
        """
        if (routing_table is None) != (router_weights is None):
            missing = "routing_table" if routing_table is None else "router_weights"
            raise ValueError(f"routing_table and router_weights belong together, got None for {missing}")
        replayed = routing_table is not None
        functional.expect_tensors(hidden_states=hidden_states)
        if replayed:
            functional.expect_tensors(routing_table=routing_table, router_weights=router_weights)
        for name, value in (
            ("return_routing", return_routing),
            ("return_aux_loss", return_aux_loss),
            ("return_amax", return_amax),
        ):
            flag(name, value)
        if not hidden_states.shape or hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden_states must have the shape [..., H] with H = {self.hidden_size}, "
                f"got {list(hidden_states.shape)}"
            )
        if self.quantized is None and functional._autocast_dtype() is None:
            functional.expect_dtype("hidden_states", hidden_states, self.down_weight.dtype, "of the layer")
        if replayed and not (routing_table.shape and router_weights.shape):
            raise ValueError(
                "routing_table and router_weights must have the shape [..., K], "
                f"got {list(routing_table.shape)} and {list(router_weights.shape)}"
            )
        if replayed and return_aux_loss:
            raise ValueError("return_aux_loss=True needs the router, but routing_table was passed")
        if not replayed and not return_aux_loss and self.training and self.router.has_aux_loss:
            raise ValueError(
                "this layer has auxiliary losses (balance_loss_weight, z_loss_weight), which would be lost: "
                "pass return_aux_loss=True and add what it returns to the loss, or call eval()"
            )
        by_sequence = self.router.balance_loss == "sequence" and self.router.balance_loss_weight
        if return_aux_loss and by_sequence and len(hidden_states.shape) < 3:
            raise ValueError(
                "hidden_states must have the shape [..., S, H] for balance_loss='sequence', "
                f"got {list(hidden_states.shape)}"
            )
        with functional.own_autocast():
            result = self._forward(
                hidden_states, routing_table, router_weights, return_routing, return_aux_loss, return_amax
            )
        return result

    def _forward(
        self,
        hidden_states: paddle.Tensor,
        routing_table: paddle.Tensor | None,
        router_weights: paddle.Tensor | None,
        return_routing: bool,
        return_aux_loss: bool,
        return_amax: bool,
    ) -> paddle.Tensor | tuple[paddle.Tensor, ...]:
        """`forward` of arguments that fit."""
        expect_dynamic_mode(self.parallel)
        tokens = hidden_states.reshape([-1, self.hidden_size])
        aux_loss = None
        if routing_table is not None:
            routing_table = routing_table.reshape([-1, routing_table.shape[-1]])
            router_weights = router_weights.reshape([-1, router_weights.shape[-1]])
        else:
            logits = self._logits(tokens)
            routing_table, router_weights = self.router.choose(logits, self.correction_bias)
            if return_aux_loss:
                aux_loss = self.router.aux_loss(logits, routing_table, hidden_states.shape[:-1])
            # Recompute runs the forward twice, the first time without gradients. With use_reentrant=False it
            # has them both times: all counts double, and the bias moves the same way.
            if self.training and self.expert_counts is not None and paddle.is_grad_enabled():
                self.router.add_counts(self.expert_counts, routing_table)
            routing_table, router_weights = self.router.drop(routing_table, router_weights, self.training)
        checked = self.dispatch == "replicated" and switch("PADDLE_MOE_CHECK")
        if self.parallel is not None and checked:
            self.parallel.check_same_routing(routing_table, router_weights)

        output, amax = self._timed_output(tokens, routing_table, router_weights, return_amax)
        output = output.astype(tokens.dtype).reshape(hidden_states.shape)
        result = [output]
        if return_routing:
            result += [routing_table, router_weights]
        if return_aux_loss:
            result.append(aux_loss)
        if return_amax:
            result.append(self._gathered_amax(amax))
        return output if len(result) == 1 else tuple(result)

    def _timed_output(
        self,
        tokens: paddle.Tensor,
        routing_table: paddle.Tensor,
        router_weights: paddle.Tensor,
        measure: bool,
    ) -> tuple[paddle.Tensor, paddle.Tensor | None]:
        if not self._is_timed:
            partial = self._partial_output(tokens, routing_table, router_weights, measure)
            return leave_shards(partial.output, self.parallel, self._partial_groups), partial.amax
        started = _now(tokens)
        partial = self._partial_output(tokens, routing_table, router_weights, measure)
        computed = _now(partial.output)
        output = leave_shards(partial.output, self.parallel, self._partial_groups)
        reduced = _now(output)
        slots = partial.ids.numpy().ravel() - self.experts_min
        experts = self.experts_max - self.experts_min + 1
        slots = slots[(slots >= 0) & (slots < experts)]
        self.logger.event(
            "moe_call",
            layer=self.full_name(),
            num_tokens=tokens.shape[0],
            tokens_per_expert=np.bincount(slots, minlength=experts).tolist(),
            experts_min=self.experts_min,
            kernel_ms=1e3 * (computed - started - partial.exchange_seconds),
            collective_ms=1e3 * (reduced - computed + partial.exchange_seconds),
        )
        return output, partial.amax

    def _gathered_amax(self, amax: paddle.Tensor) -> paddle.Tensor:
        """The amax of all experts, [E], from that of this rank's experts and columns."""
        if self.parallel is None:
            return amax
        before, after = self.experts_min, self.num_experts - self.experts_max - 1
        others = [paddle.zeros([count], "float32") for count in (before, after)]
        everywhere = paddle.concat([others[0], amax, others[1]])
        return self.parallel.all_reduce(everywhere, "grid", "max")

    def update_correction_bias(self) -> None:
        """Moves correction_bias by bias_update_speed towards balance, see policies.balanced_correction_bias.

        Call it after each optimizer step, on all ranks. It uses the choices of all forwards in training mode
        since the last call that recorded gradients, summed over the data-parallel replicas.

        Raises:
            ValueError: the layer was made with bias_update_speed = 0.
        """
        if self.expert_counts is None:
            raise ValueError("update_correction_bias needs a layer with bias_update_speed > 0, got 0")
        bias = self.router.balanced_bias(self.correction_bias, self.expert_counts)
        self.correction_bias.set_value(bias)
        self.expert_counts.zero_()

    def extra_repr(self) -> str:
        start, stop = self._shard.columns
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size} "
            f"(here {start}..{stop - 1}), num_experts={self.num_experts} "
            f"(here {self.experts_min}..{self.experts_max}), top_k={self.top_k}, "
            f"activation={self.activation}, shared_intermediate_size={self.shared_intermediate_size}, "
            f"ep {self.ep_rank} of {self.ep_size}, tp {self.tp_rank} of {self.tp_size}, "
            f"dispatch={self.dispatch}, reduce={self.reduce}, permuted_weights={self.permuted_weights}, "
            f"dtype={self.quantized or dtype_name(self.down_weight.dtype)}"
            + (f", granularity={self.granularity}" if self.quantized else "")
            + (", prepacked" if self.prepacked else "")
        )
