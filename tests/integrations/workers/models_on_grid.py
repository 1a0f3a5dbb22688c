"""One rank of EP x TP that runs the models of a package: models_on_grid.py PACKAGE EP_SIZE TP_SIZE OUTPUT.

PACKAGE is paddlenlp or paddleformers. Loads OUTPUT/files/FAMILY, writes them again to OUTPUT/saved/FAMILY,
and logits and generated tokens to OUTPUT/rank_R.npz. Gradients and loaded weights are checked here,
against an unsharded model on the same rank.
"""

import copy
import sys
from importlib import import_module
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from checks import part_of, relative_l2
from families import (
    assert_same_gradients,
    assert_same_tensors,
    blocks_of,
    in_no_file,
    logits,
    loss_and_gradients,
    results_of_blocks,
    set_to_zero,
)

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
    local = {name: one.numpy() for name, one in model.state_dict().items()}
    results[f"{family.name} logits"] = logits(model)
    if (package, family.name) != ("paddleformers", "deepseek_v3"):
        results[f"{family.name} tokens"] = np.array(models.generated(model))
    held = sum(one.size for block in blocks_of(model, family) for one in block.experts.parameters())
    results[f"{family.name} elements"] = np.array(held)

    set_to_zero(model)
    report = integration.load_checkpoint(model, output / "files" / family.name)
    assert report.unmatched == []
    assert report.bytes_read == sum(value.nbytes for name, value in local.items() if not in_no_file(name))
    assert_same_tensors({name: one.numpy() for name, one in model.state_dict().items()}, local)
    integration.save_checkpoint(model, output / "saved" / family.name)
    try:
        model.save_pretrained(output / "refused")
    except RuntimeError as error:
        assert "call restore() first, or save with paddle_moe.integrations" in str(error)
    else:
        raise AssertionError("save_pretrained() wrote what one rank has")
    assert not (output / "refused").exists()

    integration.patch(parallel=parallel)
    built = models.build(family)
    integration.unpatch()
    marks = [(one.is_distributed, getattr(one, "shard_group", None)) for one in model.parameters()]
    assert [(one.is_distributed, getattr(one, "shard_group", None)) for one in built.parameters()] == marks
    integration.load_checkpoint(built, output / "files" / family.name)
    assert_same_tensors({name: one.numpy() for name, one in built.state_dict().items()}, local)
    np.testing.assert_array_equal(logits(built), results[f"{family.name} logits"])
    exact = results_of_blocks(built, family)
    for packed, one in zip(
        results_of_blocks(integration.prepack_experts(copy.deepcopy(built)), family), exact
    ):
        assert relative_l2(packed, one) < 2e-6, family.name
    integration.quantize_experts(built, "int8")
    for rounded, exact in zip(results_of_blocks(built, family), results_of_blocks(model, family)):
        assert 1e-4 < relative_l2(rounded, exact) < 0.03, family.name

    slices = {id(one.parameter): one for block in blocks_of(model, family) for one in block.slices()}
    slice_of = {name: slices.get(id(one)) for name, one in model.named_parameters()}
    loss, gradients = loss_and_gradients(model)
    single_loss, expected = loss_and_gradients(integration.accelerate(models.build(family)))
    assert abs(loss - single_loss) < 1e-6 * abs(single_loss)
    expected = {
        name: part_of(expected[name], one) if one else expected[name]
        for name, one in slice_of.items()
        if name in expected and (one is None or one.part.size)
    }
    assert_same_gradients({name: gradients[name] for name in expected}, expected)

    mixed = models.build(family)
    integration.accelerate(blocks_of(mixed, family)[0])  # which all ranks keep whole
    if len(blocks_of(mixed, family)) > 1:
        integration.accelerate(mixed, parallel=parallel)
        local = {name: one.numpy() for name, one in mixed.state_dict().items()}
        integration.save_checkpoint(mixed, output / "mixed" / family.name)
        set_to_zero(mixed)
        integration.load_checkpoint(mixed, output / "mixed" / family.name)
        assert_same_tensors({name: one.numpy() for name, one in mixed.state_dict().items()}, local)

    integration.restore(model)
    restored = {name: one.numpy() for name, one in model.state_dict().items()}
    assert_same_tensors(restored, whole)

np.savez(output / f"rank_{parallel.rank}.npz", **results)
