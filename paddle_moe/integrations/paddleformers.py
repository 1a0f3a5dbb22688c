"""PaddleFormers models on paddle_moe: Qwen3-MoE, DeepSeek-V3, GLM-4-MoE, gpt-oss and ERNIE-4.5-MoE.

    from paddle_moe.integrations.paddleformers import accelerate

    model = accelerate(Qwen3MoeForCausalLM.from_pretrained(name))

Every other model whose experts are PaddleFormers' ``MoeExperts`` gets these accelerated, and keeps its own
router. Written for paddleformers 1.2.0. What differs from the stock blocks is in docs/integrations.md.
"""

from __future__ import annotations

from dataclasses import replace

import paddle
from paddle.nn import functional as F

from paddle_moe.functional import gate, route, without_autocast
from paddle_moe.integrations.blocks import MoEBlock, Slice, Weights, is_empty, stacked_weights
from paddle_moe.integrations.models import Holdings, Integration, published_by_blocks, published_parts
from paddle_moe.losses import load_balancing_loss, router_z_loss
from paddle_moe.tensor_files import Source

Tensor = paddle.Tensor

__all__ = [
    "accelerate",
    "load_checkpoint",
    "patch",
    "prepack_experts",
    "quantize_experts",
    "restore",
    "save_checkpoint",
    "unpatch",
]


class Experts(MoEBlock):
    """The experts alone, for models with another block around them: they are called with a routing."""

    stock = "paddleformers.nn.experts:MoeExperts"
    model = "any model"

    def experts_layer(self):
        return self

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.mix(hidden_states, top_k_index, top_k_weights.astype("float32"))


class Qwen3Moe(MoEBlock):
    """Yang et al., "Qwen3 Technical Report" (2025)."""

    stock = "paddleformers.transformers.qwen3_moe.modeling:Qwen3MoeSparseMoeBlock"
    model = "Qwen3-MoE"
    layout = "qwen3_moe"
    linears = ("gate",)

    def router_slices(self) -> list[Slice]:
        return [Slice.of(self.linear_weight("gate"), "gate_weight", "H E")]

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        logits = gate(self.tokens(hidden_states), self.linear_weight("gate"))
        routing_table, router_weights = route(
            logits, self.top_k, renormalize=self.norm_topk_prob, renormalize_eps=0.0
        )
        return self.mix(hidden_states, routing_table, router_weights), logits


class DeepseekV3(MoEBlock):
    """DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), section 2.1.2."""

    stock = "paddleformers.transformers.deepseek_v3.modeling:DeepseekV3MoE"
    model = "DeepSeek-V3"
    layout = "deepseek_v3"

    def router_slices(self) -> list[Slice]:
        return [
            Slice.of(self.gate.weight, "gate_weight", "H E"),
            Slice.of(self.gate.e_score_correction_bias, "correction_bias", "E"),
        ]

    def shared_expert(self):
        return self._sub_layers["shared_experts"]

    def logits(self, tokens: Tensor) -> Tensor:
        return gate(tokens, self.gate.weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        router = self.gate
        routing_table, router_weights = route(
            self.logits(self.tokens(hidden_states)),
            router.top_k,
            scoring="sigmoid",
            correction_bias=router.e_score_correction_bias.astype("float32"),
            num_groups=router.n_group,
            topk_groups=router.topk_group,
            group_score="top2_sum",
            renormalize=bool(router.norm_topk_prob),
            scaling_factor=router.routed_scaling_factor,
        )
        return self.mix(hidden_states, routing_table, router_weights)


class Glm4Moe(DeepseekV3):
    """GLM-4.5 Team, "GLM-4.5: Agentic, Reasoning, and Coding (ARC) Foundation Models" (2025)."""

    stock = "paddleformers.transformers.glm4_moe.modeling:Glm4MoeMoE"
    model = "GLM-4-MoE"
    layout = "glm4_moe"

    def router_slices(self) -> list[Slice]:
        weight, bias = super().router_slices()
        return [Slice.of(weight.parameter, "gate_weight", "E H"), bias]

    def logits(self, tokens: Tensor) -> Tensor:
        return _gate_by_rows(tokens, self.gate.weight)


class GptOss(MoEBlock):
    """OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card" (2025).

    The columns of gate and up alternate in ``gate_up_proj``. The operator wants them apart, so each call puts
    them in order, outside training only for the experts that it needs; quantised and prepacked ones are kept
    in order.
    """

    stock = "paddleformers.transformers.gpt_oss.modeling:GptOssMLP"
    model = "gpt-oss"
    layout = "gpt_oss"

    def router_slices(self) -> list[Slice]:
        return [Slice.of(self.router.weight, "gate_weight", "E H")]

    def activation(self) -> str:
        experts = self.experts_layer()
        return f"swigluoai({experts.alpha}, {experts.limit})"

    def weights(self) -> Weights:
        experts = self.experts_layer()
        weights = stacked_weights(experts)
        weights.gate_up_bias = experts.gate_up_proj_bias
        weights.down_bias = None if is_empty(experts.down_proj_bias) else experts.down_proj_bias
        return weights

    def gates_then_ups(self, gate_up: Tensor) -> Tensor:
        # Half the time of slices side by side, and bfloat16 has gradients on a CPU.
        pairs = gate_up.reshape([*gate_up.shape[:-1], -1, 2])
        axes = list(range(pairs.ndim))
        return pairs.transpose([*axes[:-2], axes[-1], axes[-2]]).reshape(gate_up.shape)

    def run(self, tokens, routing_table, router_weights, weights: Weights, first: int) -> Tensor:
        if self.frozen is None:  # else the weights are in order
            if paddle.in_dynamic_mode() and not paddle.is_grad_enabled():
                routing_table, weights = _only_used(routing_table - first, weights)
                first = 0
            weights = replace(weights, gate_up=self.gates_then_ups(weights.gate_up))
        weights = replace(weights, gate_up_bias=self.gates_then_ups(weights.gate_up_bias))
        # Rewritten by to_static, super() would be this function again.
        return MoEBlock.run(self, tokens, routing_table, router_weights, weights, first)

    def expert_slices(self) -> list[Slice]:
        experts = self.experts_layer()
        return [
            Slice.of(experts.gate_up_proj, "gate_up_weight", "E H (I G)", G=(0, 2)),
            Slice.of(experts.gate_up_proj_bias, "gate_up_bias", "E (I G)", G=(0, 2)),
            Slice.of(experts.down_proj, "down_weight", "E I H"),
            Slice.of(experts.down_proj_bias, "down_bias", "E H"),
        ]

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        router, tokens = self.router, self.tokens(hidden_states)
        logits = _gate_by_rows(tokens, router.weight, router.bias)
        routing_table, router_weights = route(logits, router.top_k, scoring="softmax_topk")
        output = self.mix(hidden_states, routing_table, router_weights)
        scores = paddle.put_along_axis(
            paddle.zeros_like(logits), routing_table.astype("int64"), router_weights, axis=1
        )
        return output, scores.astype(hidden_states.dtype)


@without_autocast  # which would lower the product
def _gate_by_rows(tokens: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Router logits for a weight [E, H]; gate() takes [H, E], and transposing costs more than this."""
    logits = paddle.matmul(tokens.astype("float32"), weight.astype("float32"), transpose_y=True)
    return logits if bias is None else logits + bias.astype("float32")


def _only_used(ids: Tensor, weights: Weights) -> tuple[Tensor, Weights]:
    """The experts that occur in ids [T, K], which count from 0 here, and ids that count those alone."""
    num_experts = weights.down.shape[0]
    ids = paddle.where((ids >= 0) & (ids < num_experts), ids, paddle.full_like(ids, num_experts))
    used = paddle.unique(ids)
    used = used[used < num_experts]
    if used.shape[0] in (0, num_experts):
        return paddle.where(ids < num_experts, ids, paddle.full_like(ids, -1)), weights
    places = paddle.full([num_experts + 1], -1, "int32")
    places[used] = paddle.arange(used.shape[0], dtype="int32")
    fields = (weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias)
    return places[ids], Weights(*(None if one is None else one.index_select(used) for one in fields))


class Ernie45Moe(MoEBlock):
    """Baidu ERNIE Team, "ERNIE 4.5 Technical Report" (2025)."""

    stock = "paddleformers.transformers.ernie4_5_moe.modeling:Ernie4_5_MoeSparseMoeBlock"
    model = "ERNIE-4.5-MoE"
    layout = "ernie4_5_moe"

    def router_slices(self) -> list[Slice]:
        slices = [Slice.of(self.gate.weight, "gate_weight", "H E")]
        if self.config.moe_use_aux_free:
            bias = self.moe_statics.e_score_correction_bias
            slices.append(Slice.of(bias, "correction_bias", "1 E"))
        return slices

    def check(self) -> None:
        config = self.config
        for name in ("multimodel_experts", "moe_group_experts", "moe_use_token_type_bias"):
            if config.get(name, False):
                raise ValueError(f"{name} must be False for paddle_moe, got {config.get(name)!r}")
        if config.moe_dropout_prob > 0:
            raise ValueError(f"moe_dropout_prob must be 0 for paddle_moe, got {config.moe_dropout_prob}")
        if min(config.moe_capacity) < config.moe_num_experts:
            raise ValueError(
                "moe_capacity must be at least moe_num_experts, so that none is dropped (paddle_moe never "
                f"drops one), got {config.moe_capacity} for {config.moe_num_experts} experts"
            )

    def shared_expert(self):
        return self._sub_layers.get("shared_experts")

    def forward(self, input: Tensor, token_type_ids=None, use_dense_expert: bool = False):
        config = self.config
        if token_type_ids is not None or use_dense_expert:
            raise ValueError("token_type_ids and use_dense_expert are for multimodal experts; got them here")
        logits = gate(self.tokens(input), self.gate.weight)
        bias = None
        if config.moe_use_aux_free:
            bias = self.moe_statics.e_score_correction_bias[0].detach().astype("float32")
        routing_table, router_weights = route(
            logits,
            self.top_k,
            scoring=config.scoring_func,
            correction_bias=bias,
            renormalize=bool(config.moe_norm_gate_logits),
            renormalize_eps=1e-12,
        )
        output = self.mix(input, routing_table, router_weights)
        loss = paddle.zeros([1], "float32")
        if self.training:
            loss = self._router_loss(logits)
            if config.moe_use_aux_free and paddle.is_grad_enabled():  # once also under recompute
                with paddle.no_grad():
                    chosen = F.one_hot(routing_table, config.moe_num_experts).sum(axis=[0, 1])
                    usage = self.moe_statics.expert_usage
                    # Int64, or since model.to() a half, which a CPU cannot add.
                    usage[0] = (usage[0].astype("float64") + chosen.astype("float64")).astype(usage.dtype)
        # Without a loss, or with a frozen router; the FakeMoERouterLoss of the model takes its gradient.
        if loss.stop_gradient:
            loss.stop_gradient = False
        return output, router_weights.astype(input.dtype), loss, logits

    def _router_loss(self, logits: Tensor) -> Tensor:
        config, loss = self.config, paddle.zeros([1], "float32")
        if config.router_aux_loss_coef:
            # The experts of the largest scores, without the correction that balances the choice.
            chosen = logits.topk(self.top_k)[1]
            balance = load_balancing_loss(logits, chosen, scoring=config.scoring_func)
            loss = loss + config.router_aux_loss_coef * self.top_k * balance
        if config.moe_orthogonal_loss_lambda:
            loss = loss + config.moe_orthogonal_loss_lambda * self.gate._cal_orthogonal_loss()
        if config.router_z_loss_coef:
            loss = loss + config.router_z_loss_coef * router_z_loss(logits)
        return loss


def _published(model, holdings: Holdings) -> list[Source] | None:
    """Hugging Face's names: those of the blocks from their layouts, the others by what the layers are.

    Most names are the model's own, with the matrices of nn.Linear turned. What PaddleFormers fuses has the
    names of its parts.
    """
    sources = published_by_blocks(model)
    if sources is None:
        return None
    done, layers = {source.target for source in sources}, dict(model.named_sublayers())
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    for name, (_, _, whole) in list(holdings.items()):
        path, _, leaf = name.rpartition(".")
        if name in done or path.endswith("rotary_emb") or leaf == "expert_usage":  # the latter: not in files
            continue
        if name == "lm_head.weight" and tied:
            sources.append(Source("model.embed_tokens.weight", name, whole))
        else:
            sources += published_parts(name, layers, holdings, lambda name: name)
    return sources


class _Factory:
    """In the place of PaddleFormers' QuickAccessMoEFactory, which builds blocks that need DeepEP."""

    def __init__(self, stock: type[paddle.nn.Layer]):
        self.stock = stock

    def create_from_model_name(self, pretrained_config, **options) -> paddle.nn.Layer:
        return self.stock(pretrained_config)


_models = "paddleformers.transformers"
_integration = Integration(
    "paddleformers",
    [Qwen3Moe, DeepseekV3, Glm4Moe, GptOss, Ernie45Moe, Experts],
    _published,
    {
        f"{_models}.qwen3_moe.modeling:QuickAccessMoEFactory": (Qwen3Moe, _Factory),
        f"{_models}.glm4_moe.modeling:QuickAccessMoEFactory": (Glm4Moe, _Factory),
        f"{_models}.glm4_moe.modeling:Glm4MoeFlexMoE": (Glm4Moe, lambda stock: stock),
        f"{_models}.deepseek_v3.modeling:DeepseekV3MoEFlexToken": (DeepseekV3, lambda stock: stock),
    },
)
load_checkpoint, save_checkpoint = _integration.load_checkpoint, _integration.save_checkpoint
accelerate, restore = _integration.accelerate, _integration.restore
quantize_experts, prepack_experts = _integration.quantize_experts, _integration.prepack_experts
patch, unpatch = _integration.patch, _integration.unpatch
