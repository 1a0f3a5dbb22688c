"""The router of FusedMoE: logits, the choice of experts, and what training adds to them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import paddle
from paddle import _C_ops

from paddle_moe import _core, functional
from paddle_moe._options import ROUTE_OPTIONS, checked, integer, one_of, real
from paddle_moe.losses import load_balancing_loss, router_z_loss
from paddle_moe.policies import (
    balanced_correction_bias,
    check_capacity,
    check_jitter,
    count_ids,
    jitter,
    limit_capacity,
)

if TYPE_CHECKING:
    from paddle_moe.distributed import ParallelContext


class Router:  # no dataclass: paddle.jit.to_static finds no methods in the instances of one
    """The options of a router, as functions of the tensors that FusedMoE keeps.

    T tokens, E experts over all ranks, K experts per token.

    Attributes:
        route_options: top_k, scoring, groups, renormalisation and scaling, for functional.route.
        parallel: the ranks; None: this process has everything.
        same_tokens: the group of `parallel` whose ranks pass the same tokens.
        replicas: the groups of `parallel` whose ranks pass other tokens.
        Everything else: as in FusedMoE.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        num_experts: int,
        route_options: dict[str, Any],
        *,
        balance_loss_weight: float,
        balance_loss: str,
        z_loss_weight: float,
        jitter_epsilon: float,
        capacity_factor: float | None,
        drop_policy: str,
        bias_update_speed: float,
        parallel: ParallelContext | None,
        same_tokens: str,
        replicas: tuple[str, ...],
    ):
        self.num_experts, self.route_options = num_experts, route_options
        self.balance_loss_weight, self.balance_loss = balance_loss_weight, balance_loss
        self.z_loss_weight, self.jitter_epsilon = z_loss_weight, jitter_epsilon
        self.capacity_factor, self.drop_policy = capacity_factor, drop_policy
        self.bias_update_speed = bias_update_speed
        self.parallel, self.same_tokens, self.replicas = parallel, same_tokens, replicas

        top_k = route_options["top_k"]
        if not 1 <= integer("top_k", top_k) <= num_experts:
            raise ValueError(f"top_k must be between 1 and num_experts = {num_experts}, got {top_k}")
        options = checked(ROUTE_OPTIONS, route_options)
        _core.Route(_core.Spec("float32", [-1, num_experts]), None, *options)
        one_of("batch", "sequence", "global")("balance_loss", self.balance_loss)
        for name in ("balance_loss_weight", "z_loss_weight", "bias_update_speed"):
            if not 0 <= real(name, getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {getattr(self, name)}")
        check_jitter("jitter_epsilon", self.jitter_epsilon)
        if self.capacity_factor is not None:
            check_capacity(self.capacity_factor, self.drop_policy, "drop_policy")

    @property
    def has_aux_loss(self) -> bool:
        return bool(self.balance_loss_weight or self.z_loss_weight)

    def logits(
        self,
        hidden_states: paddle.Tensor,
        gate_weight: paddle.Tensor,
        gate_bias: paddle.Tensor | None,
        training: bool,
    ) -> paddle.Tensor:
        """[T, E] fp32 for [T, H], [H, E] and [E]; in training of tokens with jitter."""
        if training and self.jitter_epsilon:
            hidden_states = jitter(hidden_states, self.jitter_epsilon, self.parallel, self.same_tokens)
        logits = functional.gate(hidden_states, gate_weight)
        return logits if gate_bias is None else logits + gate_bias.astype("float32")

    def choose(
        self, logits: paddle.Tensor, correction_bias: paddle.Tensor | None
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """(routing_table int32, router_weights fp32), [T, K] each, before any drop."""
        return functional.route(logits, correction_bias=correction_bias, **self.route_options)

    def drop(
        self, routing_table: paddle.Tensor, router_weights: paddle.Tensor, training: bool
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """The same, in training with -1 and 0 in the slots beyond the capacity of an expert."""
        if not training or self.capacity_factor is None:
            return routing_table, router_weights
        return limit_capacity(
            routing_table, router_weights, self.num_experts, self.capacity_factor, self.drop_policy
        )

    def aux_loss(
        self, logits: paddle.Tensor, routing_table: paddle.Tensor, leading: list[int]
    ) -> paddle.Tensor:
        """The weighted sum of the auxiliary losses, scalar fp32.

        The tokens have the shape [*leading, H], for balance_loss="sequence" [..., S, H]. routing_table:
        before any drop.
        """
        loss = paddle.zeros([], "float32")
        if self.balance_loss_weight:
            by_sequence = self.balance_loss == "sequence"
            if by_sequence and isinstance(leading[-1], int) and leading[-1] == 0:
                by_sequence = False  # without tokens there is nothing to balance, whatever the length
            balance = load_balancing_loss(
                logits,
                routing_table,
                scoring=self.route_options["scoring"],
                sequence_length=leading[-1] if by_sequence else None,
                parallel=self.parallel if self.balance_loss == "global" else None,
                replicas=self.replicas,
            )
            loss = loss + self.balance_loss_weight * balance
        if self.z_loss_weight:
            loss = loss + self.z_loss_weight * router_z_loss(logits)
        return loss

    def add_counts(self, counts: paddle.Tensor, routing_table: paddle.Tensor) -> None:
        """Adds the choices to `counts`, [E] int64, in place."""
        total = counts + count_ids(routing_table, self.num_experts)
        _C_ops.assign_out_(total, counts)  # also in a static program

    def balanced_bias(self, correction_bias: paddle.Tensor, counts: paddle.Tensor) -> paddle.Tensor:
        """correction_bias [E] after one step of bias_update_speed towards balance over all replicas."""
        return balanced_correction_bias(
            correction_bias, counts, self.bias_update_speed, self.parallel, self.replicas
        )
