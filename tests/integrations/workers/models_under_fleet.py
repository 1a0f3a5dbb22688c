"""One of two ranks under fleet, each with tokens of its own: models_under_fleet.py PACKAGE OUTPUT.

PaddleNLP divides the experts of some models over the data-parallel group itself, PaddleFormers over the
expert-parallel group. Loads OUTPUT/files/FAMILY; writes this rank's logits, loss and gradients of experts to
OUTPUT/rank_R.npz.
"""

import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import paddle
from paddle.distributed import fleet

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from families import blocks_of, tokens

from paddle_moe.distributed import ParallelContext

package, output = sys.argv[1], Path(sys.argv[2])
models = import_module(f"{package}_models")
integration = import_module(f"paddle_moe.integrations.{package}")
strategy = fleet.DistributedStrategy()
if package == "paddlenlp":
    strategy.hybrid_configs = {"dp_degree": 2}
else:
    order = ["sharding", "moe_sharding", "pp", "sep", "dp", "ep", "mp"]
    degrees = {"dp": 1, "mp": 1, "pp": 1, "sharding": 2, "ep": 2, "moe_sharding": 1}
    strategy.hybrid_configs = {"order": order, **{f"{name}_degree": size for name, size in degrees.items()}}
fleet.init(is_collective=True, strategy=strategy)
hybrid = fleet.get_hybrid_communicate_group()
of_paddlenlp = package == "paddlenlp"
group = hybrid.get_data_parallel_group() if of_paddlenlp else hybrid.get_expert_parallel_group()
parallel = ParallelContext.from_groups(group)
options = {} if of_paddlenlp else {"expert_model_parallel_size": 2}
if not of_paddlenlp:
    models.stand_in_for_paddlefleet()
results = {}

for family in models.FAMILIES:
    if of_paddlenlp:
        model = integration.accelerate(models.build(family), parallel=parallel, dispatch="alltoall")
    else:
        integration.patch(parallel=parallel, dispatch="alltoall")
        model = models.build(family, **options)
        integration.unpatch()
    blocks = blocks_of(model, family)
    assert blocks and all(block.parallel is parallel for block in blocks)
    integration.load_checkpoint(model, output / "files" / family.name)
    model.eval()
    ids = tokens()[parallel.ep_rank : parallel.ep_rank + 1]
    with paddle.no_grad():
        out = model(ids)
    results[f"{family.name} logits"] = (out if isinstance(out, paddle.Tensor) else out[0]).numpy()
    model.train()
    loss = model(ids, labels=ids)[0]
    loss.backward()
    results[f"{family.name} loss"] = loss.numpy()
    for name, one in model.named_parameters():
        if ".experts." in name and one.size:
            # On a rank without tokens for it a gradient is zero.
            gradient = paddle.zeros_like(one) if one.grad is None else one.grad
            results[f"{family.name} d {name}"] = gradient.numpy()
np.savez(output / f"rank_{parallel.ep_rank}.npz", **results)
