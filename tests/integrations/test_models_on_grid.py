"""The models of both packages over four processes, EP 2 x TP 2, against one process."""

from __future__ import annotations

import sys
from importlib import import_module, util
from pathlib import Path

import numpy as np
import pytest
from checks import relative_l2

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import launcher
from families import assert_same_tensors, blocks_of, logits, read_files, write_files

WORKERS = Path(__file__).parent / "workers"


@pytest.mark.parametrize("package", ["paddlenlp", "paddleformers"])
def test_every_family(package, tmp_path):
    if util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: see docs/integrations.md")
    models = import_module(f"{package}_models")
    files = {family.name: models.published_tensors(models.build(family)) for family in models.FAMILIES}
    for name, tensors in files.items():
        write_files(tensors, tmp_path / "files" / name)
    job = launcher.launch(
        tmp_path / "logs", WORKERS / "models_on_grid.py", package, 2, 2, tmp_path, ranks=4, seconds=240
    )
    assert job.returncode == 0, job
    ranks = [dict(np.load(tmp_path / f"rank_{rank}.npz")) for rank in range(4)]
    for name, value in ranks[0].items():
        if not name.endswith("elements"):
            for other in ranks[1:]:
                np.testing.assert_array_equal(other[name], value, err_msg=name)

    integration = import_module(f"paddle_moe.integrations.{package}")
    for family in models.FAMILIES:
        assert_same_tensors(read_files(tmp_path / "saved" / family.name), files[family.name])
        model = models.build(family)
        elements = sum(one.size for block in blocks_of(model, family) for one in block.experts.parameters())
        integration.accelerate(model)
        assert relative_l2(ranks[0][f"{family.name} logits"], logits(model)) < 2e-6
        if f"{family.name} tokens" in ranks[0]:
            assert ranks[0][f"{family.name} tokens"].tolist() == models.generated(model)
        held = [int(results[f"{family.name} elements"]) for results in ranks]
        assert sum(held) == elements and max(held) < 0.35 * elements
