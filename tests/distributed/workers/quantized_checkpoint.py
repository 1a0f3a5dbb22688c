"""One rank that saves or loads quantised layers: quantized_checkpoint.py EP TP save|load|refuse PATH."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from quantized_cases import KINDS, quantised_model

from paddle_moe import CheckpointError, init_distributed, load_checkpoint, save_checkpoint

ep_size, tp_size, path = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[4])
parallel = init_distributed(ep_size, tp_size, timeout_seconds=60)
for kind in KINDS:
    options = dict(parallel=parallel, dispatch="alltoall")  # which slices the shared expert over TP alone
    expected, model = (quantised_model(kind, seed=seed, **options) for seed in (3, None))
    if sys.argv[3] == "save":
        save_checkpoint(path / kind, expected)
        continue
    try:
        load_checkpoint(path / kind, model)
    except CheckpointError as error:
        assert sys.argv[3] == "refuse", error
        assert "first.down_weight" in {problem.key.partition("[")[0] for problem in error.problems}, error
        continue
    assert sys.argv[3] == "load", "slices of another width were taken"
    for name, value in expected.state_dict().items():
        assert model.state_dict()[name].numpy().tobytes() == value.numpy().tobytes(), name
