"""One rank of a grid: loads a checkpoint, checks every bit of its shard, and saves another.

checkpoint.py EP_SIZE TP_SIZE DP_SIZE OPTIONS FROM TO: OPTIONS are those of FusedMoE in JSON; FROM "-" starts
from the seed instead of a checkpoint.
"""

import json
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import paddle
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[2]))
from checkpoint_cases import LAYOUT, ThreeExperts, assert_loaded, fill_moments, make_optimizer
from layer_cases import HIDDEN

from paddle_moe import (
    checkpoint,
    init_distributed,
    load_checkpoint,
    load_moe_weights,
    save_checkpoint,
    save_moe_weights,
    tensor_files,
)
from paddle_moe.distributed import ParallelContext
from paddle_moe.sharded import raise_anywhere
from paddle_moe.tensor_files import CheckpointError

ep_size, tp_size, dp_size = map(int, sys.argv[1:4])
options, source, target = json.loads(sys.argv[4]), sys.argv[5], Path(sys.argv[6])
Model = partial(ThreeExperts, **options)
own = init_distributed(ep_size, tp_size, dp_size, timeout_seconds=60)
# As users of fleet have it: groups from elsewhere, no watchdog.
foreign = ParallelContext.from_groups(own.ep_group, own.tp_group, dp_group=own.dp_group)

for dtype, parallel in (("float32", own), ("bfloat16", foreign)):
    expected = Model(dtype, seed=3, parallel=parallel)
    model = expected if source == "-" else Model(dtype, parallel=parallel)
    optimizer = make_optimizer(model)
    if source == "-":
        fill_moments(model, optimizer)
    else:
        assert load_checkpoint(Path(source) / dtype, model, optimizer) == {"step": 7}
    assert_loaded(model, optimizer, expected)
    save_checkpoint(target / dtype, model, optimizer, state={"step": 7})
    state = paddle.randn([2]).numpy()
    load_checkpoint(target / dtype, model, optimizer)
    assert (paddle.randn([2]).numpy() == state).all(), "the generators are those of this rank"

# One rank finds a file that is cut short: none of them may load.
(file,) = (target / "float32").glob("model-*-00001-of-*")
broken = target / f"broken-{own.rank}"
if own.rank == own.world_size - 1:
    broken.mkdir()
    for other in (target / "float32").iterdir():
        content = other.read_bytes()
        (broken / other.name).write_bytes(content[:-1] if other.name == file.name else content)
model = Model(parallel=own)
before = [tensor.numpy().tobytes() for tensor in model.state_dict().values()]
try:
    load_checkpoint(broken if broken.exists() else target / "float32", model)
except CheckpointError as error:
    assert [problem.file for problem in error.problems] == [file.name], error
else:
    raise AssertionError("a truncated file on one rank was not noticed on this one")
assert [tensor.numpy().tobytes() for tensor in model.state_dict().values()] == before
# One rank does not see the directory.
seen = own.rank < own.world_size - 1
try:
    load_checkpoint(target / "float32" if seen else target / "nowhere", model, make_optimizer(model))
except CheckpointError as error:
    assert [problem.file for problem in error.problems] == [str(target / "nowhere")], error
else:
    raise AssertionError("a directory that one rank does not see was not noticed on this one")
# Keys that are missing, and keys of no tensor: a model without its head and with a second norm.
other = Model(parallel=own)
other.second_norm = paddle.nn.LayerNorm(HIDDEN)
del other.head
try:
    load_checkpoint(target / "float32", other)
except CheckpointError as error:
    found = {problem.key: (problem.expected, problem.found) for problem in error.problems}
    assert set(found) == {"head.weight", "head.bias", "second_norm.weight", "second_norm.bias"}, error
    assert found["head.bias"][0] == "no tensor of this name" and found["second_norm.bias"][1] == "nothing", (
        error
    )
else:
    raise AssertionError("keys that do not match were loaded")
try:  # one rank cannot write
    save_checkpoint("/dev/null/here" if own.rank == 0 else target / "refused", model)
except RuntimeError as error:
    assert str(error).count("NotADirectoryError") == str(error).count("rank 0: NotADirectoryError") == 1, (
        error
    )
assert not (target / "refused" / "model.safetensors.index.json").exists()


# Whatever keeps one rank from writing or reading is an error of all.
def out_of_memory(*_, **__):
    raise MemoryError("no room")


failing = own.rank == 1
for module, name, call, text in (
    (checkpoint, "save_file", lambda: save_checkpoint(target / "failed", model), "unchanged. "),
    (tensor_files, "_fill", lambda: load_checkpoint(target / "float32", model), "was loaded in part; "),
):
    with patch.object(module, name, out_of_memory if failing else getattr(module, name)):
        try:
            call()
        except RuntimeError as error:
            assert str(error).endswith(text + "rank 1: MemoryError: no room"), error
        else:
            raise AssertionError(f"a rank whose {name} failed was not noticed on this one")

try:
    save_checkpoint(target / "mixed", ThreeExperts(parallel=own, permuted_weights=own.rank == 0))
except ValueError as error:
    assert "permuted_weights must be the same on all ranks, and is another on the ranks [1, " in str(error)
else:
    raise AssertionError("weights that only one rank stores [out, in] were saved")

# The layout of a model: written by this grid, and read by it with the bytes that its shards need.
expected = Model("bfloat16", seed=3, parallel=own).first
save_moe_weights(target / "published", {"model.layers.0.mlp": expected}, LAYOUT)
layer = Model("bfloat16", parallel=own).first
report = load_moe_weights(target / "published", {"model.layers.0.mlp": layer}, LAYOUT)
for name, tensor in expected.state_dict().items():
    assert layer.state_dict()[name].numpy().tobytes() == tensor.numpy().tobytes(), name

# What all ranks hold whole is written once.
save_moe_weights(target / "alone", {"mlp": ThreeExperts(seed=3).first}, LAYOUT, parallel=own)
keys = [key for file in (target / "alone").glob("*.safetensors") for key in safe_open(file, "np").keys()]
assert len(keys) == len(set(keys)) > 0, keys

# The grid of this replica alone, which need not begin at rank 0: errors name ranks of the job.
grid = ParallelContext.from_groups(own.ep_group, own.tp_group)
refuses = (own.ep_rank, own.tp_rank) == (ep_size - 1, tp_size - 1)
try:
    raise_anywhere(grid, ValueError("no") if refuses else None, "this")
except ValueError:
    assert refuses
except RuntimeError as error:
    last = (own.dp_rank + 1) * ep_size * tp_size - 1
    assert not refuses and str(error) == f"rank {last} refuses this: ValueError: no", error
assert report.bytes_read == sum(tensor.size * tensor.element_size() for tensor in layer.state_dict().values())
