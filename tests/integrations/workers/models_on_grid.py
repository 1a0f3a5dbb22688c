"""One rank of EP x TP that runs the models of a package: models_on_grid.py PACKAGE EP_SIZE TP_SIZE OUTPUT.

PACKAGE is paddlenlp or paddleformers. Writes logits and generated tokens to OUTPUT/rank_R.npz.
"""

import sys
from importlib import import_module
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from families import blocks_of, logits

from paddle_moe.distributed import init_distributed

package, ep_size, tp_size, output = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
models = import_module(f"{package}_models")
integration = import_module(f"paddle_moe.integrations.{package}")
parallel = init_distributed(ep_size, tp_size, timeout_seconds=120)
results = {}

for family in models.FAMILIES:
    model = models.build(family)
    whole = {name: one.numpy() for name, one in model.state_dict().items()}
    integration.accelerate(model, ep_size, tp_size, parallel=parallel)
    results[f"{family.name} logits"] = logits(model)
    if (package, family.name) != ("paddleformers", "deepseek_v3"):
        results[f"{family.name} tokens"] = np.array(models.generated(model))
    local = sum(one.size for block in blocks_of(model, family) for one in block.experts.parameters())
    results[f"{family.name} elements"] = np.array(local)

    integration.restore(model)
    restored = {name: one.numpy() for name, one in model.state_dict().items()}
    assert restored.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(restored[name], value, err_msg=name)

np.savez(output / f"rank_{parallel.rank}.npz", **results)
