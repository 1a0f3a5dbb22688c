"""The models of both packages over several processes against one process."""

from __future__ import annotations

import sys
from importlib import import_module, util
from pathlib import Path

import numpy as np
import pytest
from checks import relative_l2

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import launcher
from families import (
    assert_same_tensors,
    blocks_of,
    logits,
    loss_and_gradients,
    read_files,
    write_files,
)

WORKERS = Path(__file__).parent / "workers"


@pytest.fixture(params=["paddlenlp", "paddleformers"])
def package(request):
    if util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed: see docs/integrations.md")
    return request.param


def write_published_files(models, path):
    files = {family.name: models.published_tensors(models.build(family)) for family in models.FAMILIES}
    for name, tensors in files.items():
        write_files(tensors, path / name)
    return files


def test_every_family(package, tmp_path):
    """EP 2 x TP 2."""
    models = import_module(f"{package}_models")
    files = write_published_files(models, tmp_path / "files")
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


def test_under_fleet(package, tmp_path):
    """Two ranks in fleet's own groups, with one of the two sequences each."""
    models = import_module(f"{package}_models")
    write_published_files(models, tmp_path / "files")
    worker = WORKERS / "models_under_fleet.py"
    job = launcher.launch(tmp_path / "logs", worker, package, tmp_path, ranks=2, seconds=240)
    assert job.returncode == 0, job
    ranks = [dict(np.load(tmp_path / f"rank_{rank}.npz")) for rank in range(2)]

    integration = import_module(f"paddle_moe.integrations.{package}")
    for family in models.FAMILIES:
        model = integration.accelerate(models.build(family))
        both = np.concatenate([results[f"{family.name} logits"] for results in ranks])
        assert relative_l2(both, logits(model)) < 2e-6
        loss, gradients = loss_and_gradients(model)  # of the mean over both
        assert sum(results[f"{family.name} loss"] for results in ranks) / 2 == pytest.approx(loss, rel=1e-5)
        seen = 0
        for name, gradient in gradients.items():
            parts = [
                results[f"{family.name} d {name}"]
                for results in ranks
                if f"{family.name} d {name}" in results
            ]
            if ".experts." in name:
                whole = np.concatenate(parts) / 2  # stacked ones are cut, others are on one rank
                np.testing.assert_allclose(whole, gradient, rtol=1e-4, atol=1e-6 * abs(gradient).max())
                seen += 1
        assert seen
