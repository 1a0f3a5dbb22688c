"""PaddleNLP models on paddle_moe: Mixtral, Qwen2-MoE, DeepSeek-V2, DeepSeek-V3 and Jamba.

    from paddle_moe.integrations.paddlenlp import accelerate

    model = accelerate(MixtralForCausalLM.from_pretrained(name))

Written for paddlenlp 3.0.0b4 and, for Mixtral, 2.8.1. What differs from the stock blocks is in
docs/integrations.md.
"""

from __future__ import annotations

import copy
import sys

import paddle
from paddle.nn import functional as F

from paddle_moe.functional import gate, route, without_autocast
from paddle_moe.integrations.blocks import MoEBlock, Slice
from paddle_moe.integrations.models import Holdings, Integration, published_parts, turned
from paddle_moe.losses import load_balancing_loss
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


class Mixtral(MoEBlock):
    """Jiang et al., "Mixtral of Experts" (2024)."""

    stock = "paddlenlp.transformers.mixtral.modeling:MixtralSparseMoeBlock"
    model = "Mixtral"
    linears = ("gate",)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        logits = gate(self.tokens(hidden_states), self.linear_weight("gate"))
        routing_table, router_weights = route(logits, self.top_k, renormalize_eps=0.0)
        output = self.mix(hidden_states, routing_table, router_weights)
        return output, logits.astype(hidden_states.dtype)


class Jamba(MoEBlock):
    """Lieber et al., "Jamba: A Hybrid Transformer-Mamba Language Model" (2024)."""

    stock = "paddlenlp.transformers.jamba.modeling:JambaSparseMoeBlock"
    model = "Jamba"
    linears = ("router",)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        logits = gate(self.tokens(hidden_states), self.linear_weight("router"))
        routing_table, router_weights = route(logits, self.top_k, renormalize=False)
        output = self.mix(hidden_states, routing_table, router_weights)
        return output, logits.astype(hidden_states.dtype)


class Qwen2Moe(MoEBlock):
    """Yang et al., "Qwen2 Technical Report" (2024).

    The second thing it returns is the router logits, from which the model computes its load balancing loss.
    """

    stock = "paddlenlp.transformers.qwen2_moe.modeling:Qwen2MoeSparseMoEBlock"
    model = "Qwen2-MoE"
    linears = ("shared_expert_gate",)

    def shared_expert(self):
        return self._sub_layers["shared_expert"]

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.tokens(hidden_states)
        logits = gate(tokens, self.gate.weight)
        routing_table, router_weights = route(
            logits, self.top_k, renormalize=self.norm_topk_prob, renormalize_eps=0.0
        )
        shared_weights = _sigmoid(gate(tokens, self.linear_weight("shared_expert_gate")))
        output = self.mix(hidden_states, routing_table, router_weights, shared_weights)
        return output, logits.astype(hidden_states.dtype)


@without_autocast
def _sigmoid(logits: Tensor) -> Tensor:
    return F.sigmoid(logits)


class Deepseek(MoEBlock):
    """DeepSeek-AI, "DeepSeek-V2" (2024), section 2.2, and "DeepSeek-V3 Technical Report" (2024), 2.1.2."""

    stock = "paddlenlp.transformers.deepseek_v2.modeling:DeepseekV2MoE"
    model = "DeepSeek-V2 and DeepSeek-V3"
    _SELECTION = {
        "greedy": {},
        "group_limited_greedy": {"group_score": "max"},
        "noaux_tc": {"group_score": "top2_sum"},
    }

    def check(self) -> None:
        for name, value, known in (
            ("scoring_func", self.gate.scoring_func, ("softmax", "sigmoid")),
            ("topk_method", self.gate.topk_method, tuple(self._SELECTION)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")

    def router_slices(self) -> list[Slice]:
        if self.gate.topk_method != "noaux_tc":
            return []
        # PaddleNLP sets is_distributed for it, though all ranks have the whole; here checkpoints see that.
        return [Slice.of(self.gate.e_score_correction_bias, "correction_bias", "E")]

    def shared_expert(self):
        return self._sub_layers.get("shared_experts")

    def forward(self, hidden_states: Tensor) -> Tensor:
        router = self.gate
        logits = gate(self.tokens(hidden_states), router.weight)
        options = dict(self._SELECTION[router.topk_method])
        if options:
            options.update(num_groups=router.n_group, topk_groups=router.topk_group)
        if router.topk_method == "noaux_tc":
            options.update(correction_bias=router.e_score_correction_bias.astype("float32"))
        routing_table, router_weights = route(
            logits,
            router.top_k,
            scoring=router.scoring_func,
            renormalize=bool(router.norm_topk_prob and router.top_k > 1),
            scaling_factor=router.routed_scaling_factor,
            **options,
        )
        output = self.mix(hidden_states, routing_table, router_weights)
        if self.training and self.alpha > 0:
            length = hidden_states.shape[-2]
            if hidden_states.ndim == 2 and self.config.sequence_parallel:  # [sequences * length, H]
                length = self.config.seq_length - self.config.num_nextn_predict_layers
            loss = load_balancing_loss(
                logits,
                routing_table,
                scoring=router.scoring_func,
                sequence_length=length if self.config.seq_aux else None,
            )
            add_loss = sys.modules[self._stock.__module__].AddAuxiliaryLoss
            output = add_loss.apply(output, (self.alpha * loss).reshape([1]))  # the shape of its gradient
        return output


def _published(model, holdings: Holdings) -> list[Source] | None:
    """From PaddleNLP's own table, which depends on the class that a model was saved from.

    The table lacks tensors of some options; they are named as those that it has.
    """
    if not hasattr(model, "_get_name_mappings"):
        return None
    prefix = f"{model.base_model_prefix}."
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if not any(name.startswith(prefix) for name in holdings):
        # A model without a head, which the table knows by its name, DeepSeek-V2 by that of DeepSeek-V3.
        config.architectures.append(getattr(model, "base_model_class", type(model)).__name__)
    table = {one.target_name: one for one in model._get_name_mappings(config)}
    layers, sources = dict(model.named_sublayers()), []

    def key_of(name: str) -> str:
        if name in table:
            return table[name].source_name
        return f"model.{name[len(prefix) :]}" if name.startswith(prefix) else name

    for name, (tensor, _, whole) in list(holdings.items()):
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            embedding = f"{prefix}embed_tokens.weight"
            rows = holdings[embedding][2]
            if tensor.shape != holdings[embedding][0].shape:  # PaddleNLP ties those that it loads
                whole = turned(rows)
                holdings[name] = tensor, whole, whole
            sources.append(Source(key_of(embedding), name, rows))
        elif name in table:
            is_turned = table[name].action == "transpose"
            sources.append(Source(key_of(name), name, turned(whole) if is_turned else whole))
        else:
            sources += published_parts(name, layers, holdings, key_of)
    return sources


_integration = Integration(
    "paddlenlp",
    [Mixtral, Qwen2Moe, Deepseek, Jamba],
    _published,
    unpublished=(".eh_proj.bias",),  # of a Linear that has none in the published DeepSeek-V3
    file_format="np",
)
load_checkpoint, save_checkpoint = _integration.load_checkpoint, _integration.save_checkpoint
accelerate, restore = _integration.accelerate, _integration.restore
quantize_experts, prepack_experts = _integration.quantize_experts, _integration.prepack_experts
patch, unpatch = _integration.patch, _integration.unpatch
