"""save_checkpoint and load_checkpoint in one process; real ranks are in tests/distributed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from checkpoint_cases import Model, assert_loaded, fill_moments, make_optimizer
from layer_cases import HIDDEN
from paddle import nn
from safetensors import safe_open
from safetensors.paddle import save_file

import paddle_moe
from paddle_moe import CheckpointError, checkpoint, load_checkpoint, save_checkpoint, tensor_files
from paddle_moe.checkpoint import create_moments
from paddle_moe.params import Part


def save(path, dtype="float32", with_optimizer=True, **options):
    model = Model(dtype, seed=3)
    optimizer = make_optimizer(model) if with_optimizer else None
    if with_optimizer:
        fill_moments(model, optimizer)
        optimizer._learning_rate.step()
    save_checkpoint(path, model, optimizer, **options)
    return model, optimizer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_bit_comes_back(dtype, tmp_path):
    model, optimizer = save(tmp_path, dtype, state={"step": 7, "loss": 0.1})
    other = Model(dtype)
    other_optimizer = make_optimizer(other)
    assert load_checkpoint(tmp_path, other, other_optimizer) == {"step": 7, "loss": 0.1}
    assert_loaded(other, other_optimizer, model)
    assert other_optimizer._learning_rate.state_dict() == optimizer._learning_rate.state_dict()

    weights_only = Model(dtype)
    load_checkpoint(tmp_path, weights_only)
    assert_loaded(weights_only, None, model)


@pytest.mark.parametrize("permuted", [False, True])
def test_weights_stored_either_way_load_into_either(permuted, tmp_path):
    model = Model(seed=3, permuted_weights=not permuted)
    optimizer = make_optimizer(model)
    fill_moments(model, optimizer)
    save_checkpoint(tmp_path, model, optimizer)
    other = Model(permuted_weights=permuted)
    other_optimizer = make_optimizer(other)
    load_checkpoint(tmp_path, other, other_optimizer)
    assert_loaded(other, other_optimizer, Model(seed=3, permuted_weights=permuted))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["version"] == (1 if permuted else 2)  # earlier readers know [in, out] alone


def test_saving_does_not_cut_views_off_what_they_view(tmp_path):
    model, table = nn.Linear(2, 2), paddle.arange(12, dtype="float32").reshape([3, 4])
    model.register_buffer("columns", table[:, 1:3])
    model.columns.zero_()
    if table.sum() == 66:
        pytest.skip("slices are no views in this Paddle")
    save_checkpoint(tmp_path, model)
    model.columns.fill_(1.0)
    assert table.sum() == 0 + 4 + 8 + 3 + 7 + 11 + 6
    load_checkpoint(tmp_path, model)
    assert model.columns.sum() == 0 and table.sum() == 33


@pytest.mark.filterwarnings("ignore:The program will return to single-card operation")
@pytest.mark.parametrize(
    "saves, loads", [(paddle.DataParallel, lambda model: model), (lambda m: m, paddle.DataParallel)]
)
def test_a_wrapped_model_is_the_model(saves, loads, tmp_path):
    model = Model(seed=3)
    optimizer = make_optimizer(model)
    fill_moments(model, optimizer)
    save_checkpoint(tmp_path, saves(model), optimizer)
    other = Model()
    other_optimizer = make_optimizer(other)
    load_checkpoint(tmp_path, loads(other), other_optimizer)
    assert_loaded(other, other_optimizer, model)


def test_training_goes_on_as_if_never_interrupted(tmp_path):
    """Every kind of state matters: moments, their powers, learning rate, random numbers."""

    def make():
        paddle.seed(5)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        schedule = paddle.optimizer.lr.StepDecay(0.1, 2)
        return model, paddle.optimizer.AdamW(schedule, parameters=model.parameters())

    def step(model, optimizer):
        x = paddle.to_tensor(np.random.rand(3, 4).astype(np.float32)) + random.random()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        optimizer._learning_rate.step()
        return float(loss)

    model, optimizer = make()
    for _ in range(3):
        step(model, optimizer)
    save_checkpoint(tmp_path, model, optimizer)
    expected = [step(model, optimizer) for _ in range(3)]
    model, optimizer = make()
    paddle.seed(99)
    load_checkpoint(tmp_path, model, optimizer)
    assert [step(model, optimizer) for _ in range(3)] == expected
    load_checkpoint(tmp_path, model, optimizer)  # over a state that has moved on
    assert [step(model, optimizer) for _ in range(3)] == expected


def test_a_parameter_that_is_frozen_when_it_is_saved_or_loaded(tmp_path):
    def make(*frozen):
        paddle.seed(5)
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
        for name in frozen:
            model.state_dict()[name].stop_gradient = True
        return model, paddle.optimizer.AdamW(0.1, parameters=model.parameters())

    def steps(model, optimizer, number=2):
        for _ in range(number):
            model(paddle.ones([2, 4])).square().mean().backward()
            optimizer.step()
            optimizer.clear_grad()
        return [tensor.numpy() for tensor in model.state_dict().values()]

    model, optimizer = make()
    steps(model, optimizer)
    model[0].weight.stop_gradient = True
    steps(model, optimizer)
    save_checkpoint(tmp_path, model, optimizer)
    other, its_optimizer = make("0.weight")
    load_checkpoint(tmp_path, other, its_optimizer)
    for one in (model, other):  # its moments are those of when it was frozen
        one[0].weight.stop_gradient = False
    for expected, found in zip(steps(model, optimizer), steps(other, its_optimizer)):
        np.testing.assert_array_equal(found, expected)
    rest = paddle.optimizer.AdamW(0.1, parameters=other.parameters()[1:])
    with pytest.raises(CheckpointError, match=r" 0.weight: expected it in an optimizer \(it may be frozen\)"):
        load_checkpoint(tmp_path, other, rest)

    save_checkpoint(tmp_path, *make("0.weight"))
    model, optimizer = make()
    with pytest.raises(CheckpointError, match="0.weight: .* set its stop_gradient while you load"):
        load_checkpoint(tmp_path, model, optimizer)
    model, optimizer = make("0.weight")
    load_checkpoint(tmp_path, model, optimizer)
    model[0].weight.stop_gradient = False
    for expected, found in zip(steps(*make()), steps(model, optimizer)):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {},
        lambda state: [],
        lambda state: {**state, "paddle": []},
        lambda state: {**state, "paddle": [[*state["paddle"][0][:-1], "no engine"]]},
        lambda state: {**state, "numpy": [state["numpy"][0], [2**40] * 624, *state["numpy"][2:]]},
        lambda state: {**state, "python": [3, [-1] * 625, None]},
        lambda state: {**state, "python": [*state["python"][:2], "a"]},
    ],
)
def test_a_file_of_random_numbers_that_holds_something_else(change, tmp_path):
    model = Model(seed=1)
    optimizer = paddle.optimizer.AdamW(parameters=model.parameters())
    save_checkpoint(tmp_path, model, optimizer)
    (file,) = tmp_path.glob("state-*.json")
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    other = Model(seed=2)
    before = [parameter.numpy() for parameter in other.parameters()]
    with pytest.raises(CheckpointError, match="random number generators in JSON"):
        load_checkpoint(tmp_path, other, paddle.optimizer.AdamW(parameters=other.parameters()))
    for parameter, value in zip(other.parameters(), before):
        np.testing.assert_array_equal(parameter.numpy(), value)


def test_several_optimizers(tmp_path):
    def make(seed, rate):
        model = Model(seed=seed)
        named = dict(model.named_parameters())
        experts = [one for name, one in named.items() if name.endswith(("up_weight", "down_weight"))]
        dense = [one for name, one in named.items() if not name.endswith(("up_weight", "down_weight"))]
        schedule = paddle.optimizer.lr.StepDecay(0.1, 2)
        return model, [
            paddle.optimizer.AdamW(schedule, parameters=dense),
            paddle.optimizer.Momentum(rate, parameters=experts),
        ]

    model, optimizers = make(3, rate=0.1)
    for parameter in model.parameters():
        parameter.grad = paddle.full_like(parameter, 0.25)
    for optimizer in optimizers:
        optimizer.step()
    for _ in range(3):
        optimizers[0]._learning_rate.step()
    save_checkpoint(tmp_path, model, optimizers)
    other, others = make(None, rate=0.7)
    load_checkpoint(tmp_path, other, others)
    assert_loaded(other, None, model)
    assert others[0]._learning_rate.last_epoch == 3
    assert [one.get_lr() for one in others] == [one.get_lr() for one in optimizers]
    assert [one.get_lr() for one in others] == pytest.approx([0.01, 0.1])
    for loaded, saved, kind in zip(others, optimizers, ("moment1", "velocity")):
        assert len(saved._accumulators[kind]) > 3
        for one, expected in zip(loaded._accumulators[kind].values(), saved._accumulators[kind].values()):
            assert one.numpy().tobytes() == expected.numpy().tobytes()
            assert one.size == 0 or float(one.abs().max()) > 0
    with pytest.raises(CheckpointError, match=r"optimizer: expected AdamW, found \['AdamW', 'Momentum'\]"):
        load_checkpoint(tmp_path, other, others[:1])
    with pytest.raises(CheckpointError, match=r"expected \['Momentum', 'AdamW'\], found"):
        load_checkpoint(tmp_path, other, others[::-1])
    with pytest.raises(ValueError, match="each parameter must be in one of them, and .* are in more"):
        save_checkpoint(tmp_path, model, [optimizers[1], make_optimizer(model)])


def test_a_learning_rate_without_a_schedule(tmp_path):
    model = nn.Linear(2, 2)
    model.bias.stop_gradient = True
    optimizer, other = (paddle.optimizer.AdamW(rate, parameters=model.parameters()) for rate in (0.1, 0.7))
    save_checkpoint(tmp_path, model, optimizer)
    load_checkpoint(tmp_path, model, other)
    assert other.get_lr() == 0.1
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    trained = {name.partition(".")[0] for name in index["optimizer_map"]}
    assert trained == {"weight"}
    del index["learning_rate"]  # as earlier versions wrote it
    file.write_text(json.dumps(index))
    other.set_lr(0.7)
    load_checkpoint(tmp_path, model, other)
    assert other.get_lr() == 0.7


def test_other_tools_can_read_it(tmp_path):
    model, _ = save(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = set(model.state_dict()) - {"tied.weight"}
    assert index["weight_map"].keys() == names
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert index["metadata"] == {"format": "paddle_moe", "version": 1, "total_size": size}
    for key, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="paddle") as opened:
            assert opened.get_tensor(key).numpy().tobytes() == model.state_dict()[key].numpy().tobytes()
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1, "every file has the mode that the umask gives"


def test_a_save_replaces_the_one_before(tmp_path):
    save(tmp_path)
    (tmp_path / "notes.txt").write_text("not ours")
    left = ("model-deadbeef-00001-of-00002.safetensors", "model.safetensors.index.json.17.tmp", ".tmpRGcOSF")
    for killed in left:
        (tmp_path / killed).write_text("left by a save that was killed")
    model, _ = save(tmp_path, state=2)
    assert sorted(re.sub("-[0-9a-f]{8}-", "-TAG-", file.name) for file in tmp_path.iterdir()) == [
        "model-TAG-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "notes.txt",
        "optimizer-TAG-00001-of-00001.safetensors",
        "state-TAG-00001-of-00001.json",
    ]
    other = Model()
    assert load_checkpoint(tmp_path, other) == 2
    assert_loaded(other, None, model)


def test_a_killed_save_leaves_the_one_before(tmp_path):
    """A process saves 1, 2, 3, ... until it is killed, many times, at moments that differ."""
    script = (
        "import sys, paddle; from paddle_moe import save_checkpoint\n"
        "layer = paddle.nn.Linear(256, 512)\n"
        "optimizer = paddle.optimizer.AdamW(parameters=layer.parameters())\n"
        "for number in range(10**9):\n"
        "    layer.weight.set_value(paddle.full([256, 512], float(number)))\n"
        "    save_checkpoint(sys.argv[1], layer, optimizer, state=number)\n"
        "    print(number, flush=True)\n"
    )
    parent = str(Path(paddle_moe.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": parent},
    )
    layer = nn.Linear(256, 512)
    optimizer = paddle.optimizer.AdamW(parameters=layer.parameters())
    try:
        assert process.stdout.readline() == "0\n"
        for pause in np.random.default_rng(0).uniform(0, 0.03, 30):
            time.sleep(pause)
            process.send_signal(
                signal.SIGSTOP
            )  # nothing of it runs: what is on disk now is what a kill leaves
            os.waitpid(process.pid, os.WUNTRACED)
            number = load_checkpoint(tmp_path, layer, optimizer)
            assert (layer.weight == float(number)).all()
            process.send_signal(signal.SIGCONT)
        while int(process.stdout.readline()) == 0:  # a slow disk may not have come to the next one yet
            pass
    finally:
        process.kill()
        process.wait(30)
        process.stdout.close()
    number = load_checkpoint(tmp_path, layer, optimizer)
    assert (layer.weight == float(number)).all() and number > 0
    save_checkpoint(tmp_path, layer, optimizer)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_full_disk_is_an_error_and_keeps_the_one_before(tmp_path):
    resource = pytest.importorskip("resource")
    model, optimizer = save(tmp_path)
    before = sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(RuntimeError, match="was not saved; what was there before is unchanged. rank 0: "):
            save_checkpoint(tmp_path, model, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(tmp_path.iterdir()) == before
    load_checkpoint(tmp_path, Model())


def test_another_job_that_saves_to_the_same_directory(tmp_path, monkeypatch):
    """While a save is under way, and, where directories cannot be locked, in between."""
    model, optimizer = save(tmp_path, state="first")
    write, commit, refused = checkpoint.save_file, checkpoint._commit, []

    def write_beside_another(*arguments, **options):
        monkeypatch.setattr(checkpoint, "save_file", write)
        with pytest.raises(RuntimeError, match="unchanged. rank 0: OSError: another job is saving there now"):
            save_checkpoint(tmp_path, model, optimizer, state="second")
        refused.append(True)
        write(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save_file", write_beside_another)
    save_checkpoint(tmp_path, model, optimizer, state="third")
    assert refused and load_checkpoint(tmp_path, model) == "third"
    assert len(list(tmp_path.iterdir())) == 4

    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "no locks")

    def commit_after_another(*arguments):
        monkeypatch.setattr(checkpoint, "_commit", commit)
        save_checkpoint(tmp_path, model, optimizer, state="fourth")
        commit(*arguments)

    monkeypatch.setattr(checkpoint.fcntl, "flock", no_locks)
    monkeypatch.setattr(checkpoint, "_commit", commit_after_another)
    with pytest.raises(RuntimeError, match="not saved; another job has saved there meanwhile. rank 0: "):
        save_checkpoint(tmp_path, model, optimizer, state="fifth")
    assert load_checkpoint(tmp_path, model, optimizer) == "fourth"
    assert len(list(tmp_path.iterdir())) == 4


def test_files_are_on_the_disk_before_the_index_is(tmp_path, monkeypatch):
    flushed, flush = [], os.fsync

    def noted(descriptor):
        flush(descriptor)
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr(os, "fsync", noted)
    save(tmp_path)
    index = next(number for number, name in enumerate(flushed) if name.endswith(".tmp"))
    written = {path.name for path in tmp_path.iterdir() if path.name != tensor_files.INDEX_NAME}
    assert len(written) == 3 and written <= set(flushed[:index])
    assert flushed[-1] == tmp_path.name


def test_a_save_that_fails_at_the_index_leaves_nothing(tmp_path, monkeypatch):
    save(tmp_path)
    before = sorted(tmp_path.iterdir())
    flush = checkpoint._flush

    def full(path):
        if path.suffix == ".tmp":
            raise OSError(errno.ENOSPC, "full")
        flush(path)

    monkeypatch.setattr(checkpoint, "_flush", full)
    with pytest.raises(RuntimeError, match="what was there before is unchanged. rank 0: .*full"):
        save(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_errors_after_the_commit_do_not_undo_the_save(tmp_path, monkeypatch):
    """As on file systems that cannot flush a directory, or will not remove a file that someone has open."""
    save(tmp_path, state=1)
    old = next(tmp_path.glob("model-*"))
    flush, unlink, refused = checkpoint._flush, Path.unlink, []

    def flush_files_only(path):
        if path.is_dir():
            refused.append(path)
            raise OSError(errno.EINVAL, "no directories")
        flush(path)

    def unlink_others(path, *arguments, **options):
        if path == old:
            refused.append(path)
            raise PermissionError(errno.EACCES, "in use")
        unlink(path, *arguments, **options)

    monkeypatch.setattr(checkpoint, "_flush", flush_files_only)
    monkeypatch.setattr(Path, "unlink", unlink_others)
    model, optimizer = save(tmp_path, state=2)
    assert refused == [tmp_path, old]
    other = Model()
    other_optimizer = make_optimizer(other)
    assert load_checkpoint(tmp_path, other, other_optimizer) == 2
    assert_loaded(other, other_optimizer, model)
    assert len(list(tmp_path.iterdir())) == 5, "the other old files are gone"
    monkeypatch.undo()
    save(tmp_path)
    assert not old.exists() and len(list(tmp_path.iterdir())) == 4


class Odd(nn.Layer):
    """What a model may have beside matrices of floats."""

    def __init__(self, value):
        super().__init__()
        self.add_sublayer("a[b]", nn.Linear(2, 2))
        self.add_sublayer("[x=0:1]", nn.Linear(2, 2))
        for parameter in self.parameters():
            parameter.set_value(paddle.full_like(parameter, value))
        self.temperature = self.create_parameter(
            [], default_initializer=nn.initializer.Constant(float(value))
        )
        for dtype in ("float64", "bfloat16", "float16", "int64", "int16", "uint8", "bool", "complex64"):
            self.register_buffer(f"some_{dtype}", paddle.full([3], value).astype(dtype))
            self.register_buffer(f"single_{dtype}", paddle.full([], value).astype(dtype))
        self.register_buffer("turns", paddle.complex(paddle.full([2], value + 0.25), paddle.full([2], -1.0)))


def test_tensors_of_every_rank_and_dtype_and_layers_of_every_name(tmp_path):
    def make(value):
        model = Odd(value)
        optimizer = paddle.optimizer.AdamW(parameters=model.parameters())
        create_moments(optimizer, model.parameters())
        for tensor in optimizer._accumulators["moment1"].values():
            tensor.set_value(paddle.full_like(tensor, value + 0.5))
        return model, optimizer

    model, optimizer = make(1)
    save_checkpoint(tmp_path, model, optimizer)
    other, other_optimizer = make(0)
    load_checkpoint(tmp_path, other, other_optimizer)
    assert_loaded(other, None, model)
    moments = other_optimizer._accumulators["moment1"].values()
    assert len(moments) == 5 and all((tensor == 1.5).all() for tensor in moments)


@pytest.mark.parametrize("dtype", ["complex128", "float8_e4m3fn", "float8_e5m2"])
def test_what_could_not_be_loaded_again_is_not_saved(dtype, tmp_path):
    model = nn.Linear(2, 2)
    model.register_buffer("turns", paddle.ones([2]).astype(dtype))
    with pytest.raises(ValueError, match=f"model: tensors must be in one of float64, .* turns is {dtype};"):
        save_checkpoint(tmp_path / "new", model)
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- what does not fit


def test_another_model(tmp_path):
    save(tmp_path)
    model = Model(num_experts=4)
    with pytest.raises(
        CheckpointError, match=r"first.gate_weight: expected the shape \[12, 4\], found \[12, 5\]"
    ):
        load_checkpoint(tmp_path, model)
    model = nn.Linear(HIDDEN, 7)
    before = model.weight.numpy()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path, model)
    found = {(problem.key, problem.expected, problem.found) for problem in caught.value.problems}
    assert ("weight", "all of d0 0..11, d1 0..6", "nothing") in found
    assert ("head.weight", "no tensor of this name", "a tensor [12, 7] in F32") in found
    np.testing.assert_array_equal(model.weight.numpy(), before)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.problems) == (str(caught.value), caught.value.problems)


@pytest.mark.parametrize(
    ("pieces", "found"),
    [
        ([(0, 3), (1, 2)], "each element once, found some in 0 and in 1"),  # as many elements as there are
        ([(0, 2), (1, 3)], "each element once, found some in 0 and in 1"),
        ([(0, 1), (2, 4)], r"all of d0 0..3, found 3 of 4 elements, in 0, 1"),
        ([(2, 4), (0, 2)], None),
        (None, "one tensor, found 0"),
    ],
)
def test_pieces_must_tile_a_tensor(pieces, found):
    whole = Part.whole([] if pieces is None else [4])
    sources = [
        tensor_files.Source(str(index), "tensor", Part("d0", {"d0": piece}))
        for index, piece in enumerate(pieces or ())
    ]
    problems = list(tensor_files._check_cover("here", "tensor", whole, sources))
    assert len(problems) == (found is not None)
    assert not problems or re.search(f"tensor: expected {found}", str(problems[0]))


def test_keys_of_parts_that_lie_outside():
    file = SimpleNamespace(file=Path("file"))
    files = {"w[d0=1:4]": file, "w[d0=0:5]": file, "w[d1=0:1]": file, "other[d0=0:9]": file}
    sources, problems = checkpoint.stored_parts(files, {"w": Part.whole([4])})
    assert [str(one) for one in problems] == [
        "file: w[d0=0:5]: expected d0 up to 4, found d0=0:5",
        "file: w[d1=0:1]: expected d1 up to 0, found d1=0:1",
    ]
    assert sources[0] == tensor_files.Source("w[d0=1:4]", "w", Part("d0", {"d0": (1, 4)}))


def test_problems_of_many_ranks_fit_into_a_message():
    """More than some megabytes would end the watchdogs, and with them the job."""
    problems = [tensor_files.Problem("file", f"key {number}", "x" * 100, "nothing") for number in range(9000)]
    sent = []

    def exchange(value, what, detail):
        sent.append(value)
        return [value] * 500

    ranks = SimpleNamespace(world_size=500, exchange=exchange)
    with pytest.raises(CheckpointError, match="^here was not loaded, 8 problems and more:") as caught:
        tensor_files.raise_together("here", problems, ranks)
    assert 500 * len(json.dumps(sent)) < 2**20 and caught.value.problems == problems[:8]
    with pytest.raises(CheckpointError, match="^here was not loaded, 9000 problems:"):
        tensor_files.raise_together("here", problems, None)


def test_another_dtype(tmp_path):
    save(tmp_path, "bfloat16", with_optimizer=False)
    with pytest.raises(CheckpointError, match="first.down_weight: expected float32, found bfloat16"):
        load_checkpoint(tmp_path, Model("float32"))


def test_the_optimizer_is_checked_before_the_model_is_touched(tmp_path):
    save(tmp_path)
    (file,) = tmp_path.glob("optimizer-*")
    file.write_bytes(file.read_bytes()[:-1])
    model = Model()
    before = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"{file.name}: .*: expected a whole safetensors file"):
        load_checkpoint(tmp_path, model, make_optimizer(model))
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), before[name])
    load_checkpoint(tmp_path, model)  # the weights are whole


def test_another_optimizer(tmp_path):
    model, optimizer = save(tmp_path)
    momentum = paddle.optimizer.Momentum(parameters=model.parameters())
    with pytest.raises(CheckpointError, match="optimizer: expected Momentum, found AdamW"):
        load_checkpoint(tmp_path, model, momentum)
    constant = paddle.optimizer.AdamW(parameters=model.parameters())
    with pytest.raises(CheckpointError, match="lr_scheduler: expected none, found a learning rate scheduler"):
        load_checkpoint(tmp_path, model, constant)
    save_checkpoint(tmp_path, model)
    with pytest.raises(CheckpointError, match="optimizer: expected AdamW, found None"):
        load_checkpoint(tmp_path, model, optimizer)
    with pytest.raises(ValueError, match="optimizer must have parameters of model only"):
        save_checkpoint(tmp_path, nn.Linear(2, 2), optimizer)
    with pytest.raises(ValueError, match="optimizer must be a paddle.optimizer.Optimizer, got Linear"):
        save_checkpoint(tmp_path, model, nn.Linear(2, 2))
    before = sorted(tmp_path.iterdir())
    for foreign in (
        paddle.optimizer.LBFGS(parameters=model.parameters()),
        paddle.incubate.LookAhead(momentum),
    ):
        name = type(foreign).__name__
        for function in (save_checkpoint, load_checkpoint):
            with pytest.raises(ValueError, match=f"tensors of each parameter, and {name} has more"):
                function(tmp_path, model, foreign)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("with_optimizer", [False, True])
@pytest.mark.parametrize(
    "index, problem",
    [
        (None, "nowhere: .*: expected a directory, an index or a safetensors file, found nothing"),
        ("", "expected model.safetensors.index.json or .*, found neither"),
        ("{", "expected an index in JSON, found JSONDecodeError"),
        ("7", "expected an index in JSON, found AttributeError"),
        ("{}", "metadata.format: expected paddle_moe, found None"),
        ('{"metadata": [], "weight_map": {}}', "metadata.format: expected paddle_moe, found None"),
        (
            '{"metadata": {"format": "paddle_moe", "version": 3}, "weight_map": {}}',
            "metadata.version: expected 1 or 2, found 3",
        ),
    ],
)
def test_nothing_to_load(index, problem, with_optimizer, tmp_path):
    model = Model()
    path = tmp_path / "nowhere" if index is None else tmp_path
    if index:
        (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=problem):
        load_checkpoint(path, model, make_optimizer(model) if with_optimizer else None)


def test_an_index_without_the_files_of_the_generators(tmp_path):
    model, optimizer = save(tmp_path)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    del index["state_files"]
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="state_files: expected a list of files, found none"):
        load_checkpoint(tmp_path, model, optimizer)
    load_checkpoint(tmp_path, model)


def test_a_foreign_index_is_kept(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"metadata": {"total_size": 1}, "weight_map": {}}')
    with pytest.raises(CheckpointError, match="metadata.format: expected paddle_moe, found None"):
        load_checkpoint(tmp_path, Model())
    with pytest.raises(ValueError, match="has another model.safetensors.index.json"):
        save_checkpoint(tmp_path, Model())
    assert index.read_text().startswith('{"metadata": {"total_size": 1}')


def test_state_that_json_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="state and the learning rate scheduler must be fit for JSON"):
        save_checkpoint(tmp_path / "new", nn.Linear(2, 2), state=paddle.ones([1]))
    assert not (tmp_path / "new").exists()


def test_what_is_no_model(tmp_path):
    for function in (save_checkpoint, load_checkpoint):
        with pytest.raises(ValueError, match=r"model must be a paddle.nn.Layer, got .*OrderedDict"):
            function(tmp_path, nn.Linear(2, 2).state_dict())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["is_distributed", "shard_group"])  # what FusedMoE gives its own
def test_parameters_that_other_layers_split(flag, tmp_path):
    model = nn.Linear(2, 2)
    setattr(model.weight, flag, True)
    with pytest.raises(
        ValueError, match="weight is split over ranks, which is supported in FusedMoE layers and in blocks"
    ):
        save_checkpoint(tmp_path, model)


# ---------------------------------------------------------------- bytes read


COLUMNS = 1 << 22


@pytest.fixture(scope="module")
def large_file(tmp_path_factory):
    """(file, its tensor [E, H, G, I]), 64 MB: the kernel maps and reads ahead in steps of up to 2 MB."""
    tensor = np.arange(2 * 2 * COLUMNS, dtype=np.float32).reshape(2, 1, 2, COLUMNS)
    file = tmp_path_factory.mktemp("large") / "model.safetensors"
    save_file({"w": paddle.to_tensor(tensor.reshape(2, 1, -1))}, str(file))
    yield file, tensor
    file.unlink()


@pytest.mark.parametrize(
    "experts, columns",
    [
        ((0, 2), (0, COLUMNS)),
        ((1, 2), (0, COLUMNS)),
        ((0, 2), (0, COLUMNS // 4)),
        ((1, 2), (COLUMNS // 4, 3 * COLUMNS // 4)),
    ],
    ids=["all", "one expert", "a quarter of the columns", "half the columns of one expert"],
)
def test_a_rank_reads_its_share_of_a_file(experts, columns, large_file):
    """Counted by the pages of the file that come into the memory of a process that loads a shard."""
    file, tensor = large_file
    script = Path(__file__).parent / "read_a_shard.py"
    done = subprocess.run(
        [sys.executable, str(script), str(file), *map(str, (*experts, *columns))],
        env={**os.environ, "PYTHONPATH": str(Path(paddle_moe.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    bytes_read, touched, total = map(float, done.stdout.split())
    shard = tensor[slice(*experts), :, :, slice(*columns)]
    assert total == shard.sum(dtype=np.float64)
    assert bytes_read == shard.nbytes
    runs = 1 if shard.nbytes == tensor.nbytes else 2 * len(shard)
    assert shard.nbytes <= touched <= min(shard.nbytes + runs * 2 * 2**21, tensor.nbytes + 2**16)
