"""Checkpoints that go from grid to grid, over real processes; the workers check every bit of their shards."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from checkpoint_cases import LAYOUT, ThreeExperts, assert_loaded, make_optimizer
from launcher import WORKERS, launch
from safetensors import safe_open

from paddle_moe import load_checkpoint, load_moe_weights

# (ep, tp, dp) for three experts and ten columns: neither divides evenly, more ranks than experts, replicas.
GRIDS = [(1, 3, 1), (4, 1, 1), (1, 2, 2), (2, 2, 1)]
# With all-to-all each EP rank holds a shared expert. Files are the same, however a layer stores its weights.
OPTIONS = {
    (1, 3, 1): {"permuted_weights": True},
    (2, 2, 1): {"dispatch": "alltoall", "permuted_weights": True},
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The checkpoint that each grid wrote after loading that of the grid before."""
    directory = tmp_path_factory.mktemp("grids")
    paths, source = {}, "-"
    for grid in GRIDS:
        path = directory / "x".join(map(str, grid))
        arguments = (*grid, json.dumps(OPTIONS.get(grid, {})), source, path)
        job = launch(path / "logs", WORKERS / "checkpoint.py", *arguments, ranks=int(np.prod(grid)))
        assert job.returncode == 0, job
        paths[grid] = source = path
    return paths


def test_quantised_layers_on_another_number_of_ep_ranks(tmp_path):
    """Experts may move; where they are cut by TP, their slices have scales of their own."""
    for ranks, *arguments in ((4, 2, 2, "save"), (2, 1, 2, "load"), (2, 2, 1, "refuse")):
        script = WORKERS / "quantized_checkpoint.py"
        job = launch(tmp_path / "logs" / arguments[-1], script, *arguments, tmp_path, ranks=ranks)
        assert job.returncode == 0, job


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_process_loads_what_a_grid_saved(chain, grid, dtype):
    model = ThreeExperts(dtype)
    optimizer = make_optimizer(model)
    with pytest.warns(UserWarning, match="random generators were left alone"):
        state = load_checkpoint(chain[grid] / dtype, model, optimizer)
    assert state == {"step": 7}
    assert_loaded(model, optimizer, ThreeExperts(dtype, seed=3))


@pytest.mark.parametrize("grid", GRIDS)
def test_everything_is_written_once(chain, grid):
    """The bytes of all files together are those of one process: nothing dense is written twice."""
    path = chain[grid] / "float32"
    index = json.loads((path / "model.safetensors.index.json").read_text())
    stored = Counter()
    for file in path.glob("model-*.safetensors"):
        with safe_open(file, framework="paddle") as opened:
            for key in opened.keys():
                assert index["weight_map"][key] == file.name
                stored[key.partition("[")[0]] += opened.get_tensor(key).size
    expected = {
        name: tensor.size for name, tensor in ThreeExperts().state_dict().items() if name != "tied.weight"
    }
    assert stored == expected
    ranks = int(np.prod(grid))
    assert len(index["state_files"]) == ranks
    data_parallel = [f"-{rank + 1:05}-of-" for rank in range(ranks // grid[2], ranks)]
    for file in path.glob("*.safetensors"):
        assert not any(part in file.name for part in data_parallel), "replicas write no tensors"


@pytest.mark.parametrize("grid", GRIDS)
def test_one_process_loads_the_published_layout_of_a_grid(chain, grid):
    layer = ThreeExperts("bfloat16").first
    load_moe_weights(chain[grid] / "published", {"model.layers.0.mlp": layer}, LAYOUT)
    for name, tensor in ThreeExperts("bfloat16", seed=3).first.state_dict().items():
        found = layer.state_dict()[name]
        assert found.numpy().tobytes() == tensor.numpy().tobytes(), name
    assert all(file.name.startswith("model") for file in (chain[grid] / "published").iterdir())
    with safe_open(
        next(iter((chain[grid] / "published").glob("*.safetensors"))), framework="paddle"
    ) as opened:
        assert opened.metadata() == {"format": "pt"}
