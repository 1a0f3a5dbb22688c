"""The exchange of all_to_all.py on DeepEP's kernels for NVLink and RDMA, for ParallelContext.use_deep_ep().

Written for `Buffer` of paddle.distributed.communication.deep_ep, which GPU builds of Paddle have, and of
paddlefleet_ops; https://github.com/deepseek-ai/DeepEP describes it. Not yet run: it needs several GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Callable

import paddle

if TYPE_CHECKING:
    from paddle_moe.distributed import ParallelContext

Tensor = paddle.Tensor

_MODULES = ("paddle.distributed.communication.deep_ep", "paddlefleet_ops.deep_ep")


def import_buffer() -> type:
    """DeepEP's Buffer.

    Raises:
        RuntimeError: this Paddle has no DeepEP.
    """
    reasons = []
    for module in _MODULES:
        try:
            return import_module(module).Buffer
        except (ImportError, AttributeError) as error:
            reasons.append(f"{module}: {error}")
    raise RuntimeError(
        "DeepEP needs a GPU build of Paddle that contains it, or paddlefleet_ops; leave use_deep_ep() out to "
        f"exchange by other means ({'; '.join(reasons)})"
    )


class DeepEPExchange:
    """Does what all_to_all._Exchange does. Rows travel in bfloat16 and are added up by the kernels.

    Raises:
        ValueError: the ranks do not own equally many experts, or the rows are not bfloat16.
    """

    def __init__(
        self, routing_table: Tensor, expert_ranges: Sequence[tuple[int, int]], parallel: ParallelContext
    ):
        sizes = {end - first for first, end in expert_ranges}
        if len(sizes) != 1:
            raise ValueError(
                "with DeepEP all EP ranks must own equally many experts, got "
                + ", ".join(str(end - first) for first, end in expert_ranges)
            )
        self._ids, self._parallel = routing_table.astype("int64"), parallel
        self._first, self._num_experts = expert_ranges[parallel.ep_rank][0], expert_ranges[-1][1]
        self._handle: Any = None

    def start(
        self, hidden_states: Tensor, ids: Tensor, weights: Tensor
    ) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        buffer = self._buffer(hidden_states)
        per_rank, per_node, per_expert, is_in_rank, _ = buffer.get_dispatch_layout(
            self._ids, self._num_experts
        )
        rows, ids, weights, _, self._handle, event = buffer.dispatch(
            hidden_states.detach().contiguous(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=self._ids,
            topk_weights=weights.detach(),
            async_finish=True,
        )

        def wait() -> tuple[Tensor, Tensor, Tensor]:
            event.current_stream_wait()
            # They arrive as numbers among the experts of this rank, those of others as -1.
            return rows, paddle.where(ids >= 0, ids + self._first, ids).astype("int32"), weights

        return wait

    def send(self, rows: Tensor) -> Tensor:
        return self._buffer(rows).dispatch(rows.detach().contiguous(), handle=self._handle)[0]

    def combine(self, rows: Tensor, weights: Tensor | None = None) -> list[Tensor]:
        weights = None if weights is None else weights.detach().contiguous()
        combined = self._buffer(rows).combine(rows.detach().contiguous(), self._handle, topk_weights=weights)
        return [one for one in combined[:2] if one is not None]

    def _buffer(self, rows: Tensor) -> Any:
        """That of the EP group, large enough for these rows."""
        if rows.dtype != paddle.bfloat16:
            raise ValueError(f"hidden_states must be bfloat16 with DeepEP, got {rows.dtype}")
        kind, group = self._parallel.deep_ep, self._parallel.ep_group
        row_bytes, current = rows.shape[1] * rows.element_size(), self._parallel.deep_ep_buffer
        configs = kind.get_dispatch_config(group.nranks), kind.get_combine_config(group.nranks)
        nvlink = max(one.get_nvl_buffer_size_hint(row_bytes, group.nranks) for one in configs)
        rdma = max(one.get_rdma_buffer_size_hint(row_bytes, group.nranks) for one in configs)
        if current is None or current.num_nvl_bytes < nvlink or current.num_rdma_bytes < rdma:
            self._parallel.deep_ep_buffer = kind(group, nvlink, rdma)
        return self._parallel.deep_ep_buffer
