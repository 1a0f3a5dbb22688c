"""Expert weights in the files of published models. The names and shapes here are written out by hand."""

from __future__ import annotations

import json
import struct

import numpy as np
import paddle
import pytest
from checkpoint_cases import fp8, mxfp4, write_file
from layer_cases import EXPERTS, HIDDEN, INTER, SHARED, TOP_K, dense_weights, grid
from safetensors import safe_open
from safetensors.paddle import save_file

from paddle_moe import FusedMoE, load_moe_weights, save_moe_weights, tensor_files
from paddle_moe.reference import to_float64, to_storage
from paddle_moe.tensor_files import CheckpointError

HALF_OPTIONS = {"mixtral": {}, "qwen2_moe": dict(shared=True, shared_gate=True), "qwen3_moe": {}}
OPTIONS = {
    **HALF_OPTIONS,
    "deepseek_v2": dict(shared=True),
    "deepseek_v3": dict(shared=True, correction=True),
    "glm4_moe": dict(shared=True, correction=True),
    "ernie4_5_moe": dict(shared=True, correction=True),
    "gpt_oss": dict(bias=True, gate_bias=True),
    "qwen3_moe_stacked": {},
    "paddleformers": {},
    "paddleformers_stacked": {},
}
BLOCK = {name: "model.layers.3.mlp" for name in OPTIONS} | {"mixtral": "model.layers.3.block_sparse_moe"}


def published(family: str, dense: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of one block as Hugging Face checkpoints of the family have them."""
    block, tensors = BLOCK[family], {}
    if family == "gpt_oss":
        tensors[f"{block}.router.weight"] = dense["gate_weight"].T
        if "gate_bias" in dense:
            tensors[f"{block}.router.bias"] = dense["gate_bias"]
        for name, array in (("", dense["gate_up"]), ("_bias", dense["gate_up_bias"])):
            interleaved = np.empty_like(array)
            interleaved[..., ::2], interleaved[..., 1::2] = array[..., :INTER], array[..., INTER:]
            tensors[f"{block}.experts.gate_up_proj{name}"] = interleaved
        tensors[f"{block}.experts.down_proj"] = dense["down"]
        tensors[f"{block}.experts.down_proj_bias"] = dense["down_bias"]
        return tensors
    if family == "qwen3_moe_stacked":
        tensors[f"{block}.gate.weight"] = dense["gate_weight"].T
        tensors[f"{block}.experts.gate_up_proj"] = dense["gate_up"].transpose([0, 2, 1])
        tensors[f"{block}.experts.down_proj"] = dense["down"].transpose([0, 2, 1])
        return tensors
    if family.startswith("paddleformers"):
        tensors[f"{block}.gate.weight"] = dense["gate_weight"]
        if family.endswith("stacked"):
            tensors[f"{block}.experts.gate_up_proj"] = dense["gate_up"]
            tensors[f"{block}.experts.down_proj"] = dense["down"]
        else:
            for expert in range(EXPERTS):
                tensors[f"{block}.experts.{expert}.up_gate_proj.weight"] = dense["gate_up"][expert]
                tensors[f"{block}.experts.{expert}.down_proj.weight"] = dense["down"][expert]
        return tensors
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    tensors[f"{block}.gate.weight"] = dense["gate_weight"].T
    for expert in range(EXPERTS):
        tensors[f"{block}.experts.{expert}.{gate}.weight"] = dense["gate_up"][expert, :, :INTER].T
        tensors[f"{block}.experts.{expert}.{up}.weight"] = dense["gate_up"][expert, :, INTER:].T
        tensors[f"{block}.experts.{expert}.{down}.weight"] = dense["down"][expert].T
    if "shared_gate_up" in dense:
        shared = f"{block}.shared_expert" + ("" if family == "qwen2_moe" else "s")
        tensors[f"{shared}.gate_proj.weight"] = dense["shared_gate_up"][:, :SHARED].T
        tensors[f"{shared}.up_proj.weight"] = dense["shared_gate_up"][:, SHARED:].T
        tensors[f"{shared}.down_proj.weight"] = dense["shared_down"].T
    if "shared_gate" in dense:
        tensors[f"{block}.shared_expert_gate.weight"] = dense["shared_gate"].T
    if family in ("deepseek_v3", "glm4_moe"):
        tensors[f"{block}.gate.e_score_correction_bias"] = dense["correction_bias"]
    if family == "ernie4_5_moe":
        tensors[f"{block}.moe_statics.e_score_correction_bias"] = dense["correction_bias"][None]
    return tensors


def write(path, tensors: dict[str, np.ndarray], num_files: int = 3) -> None:
    """Files with an index, as large models have them; one tensor outside the block."""
    tensors = {"model.embed_tokens.weight": np.ones((4, HIDDEN), np.float32), **tensors}
    path.mkdir()
    file_of = {}
    for number in range(num_files):
        name = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        part = dict(list(tensors.items())[number::num_files])
        write_file(path / name, part)
        file_of.update(dict.fromkeys(part, name))
    index = {"metadata": {"total_size": 0}, "weight_map": file_of}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def read(path) -> dict[str, np.ndarray]:
    tensors = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="paddle") as opened:
            tensors.update({key: opened.get_tensor(key).numpy() for key in opened.keys()})
    return tensors


def empty_like(layer: FusedMoE, dtype: str | None = None) -> FusedMoE:
    """A layer of the same make whose values are NaN."""
    options = {
        "gate_bias": layer.gate_bias is not None,
        "gate_up_bias": layer.gate_up_bias is not None,
        "down_bias": "down_bias" in layer.parts(),
        "correction_bias": layer.correction_bias is not None,
        "shared_intermediate_size": layer.shared_intermediate_size,
        "shared_gate": layer.shared_gate_weight is not None,
    }
    dtype = dtype or str(layer.down_weight.dtype).rpartition(".")[2]
    options["permuted_weights"] = layer.permuted_weights
    sizes = layer.hidden_size, layer.intermediate_size, layer.num_experts, layer.top_k
    other = FusedMoE(*sizes, dtype=dtype, seed=None, parallel=layer.parallel, **options)
    for tensor in other.state_dict().values():
        tensor.set_value(paddle.full_like(tensor.astype("float32"), float("nan")).astype(tensor.dtype))
    return other


def assert_equal_bits(actual: FusedMoE, expected: FusedMoE) -> None:
    assert actual.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        found = actual.state_dict()[name]
        assert found.dtype == tensor.dtype
        assert found.numpy().tobytes() == tensor.numpy().tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", OPTIONS)
def test_every_family_comes_in_and_goes_out(family, dtype, tmp_path):
    dense = dense_weights(dtype, **OPTIONS[family])
    expected = FusedMoE.from_dense(**dense, top_k=TOP_K, permuted_weights=dtype == "bfloat16")
    tensors = published(family, dense)
    write(tmp_path / "model", tensors)
    layer = empty_like(expected)
    report = load_moe_weights(tmp_path / "model", {BLOCK[family]: layer}, family)
    assert_equal_bits(layer, expected)
    assert sorted(report.loaded) == sorted(tensors)
    assert report.unmatched == ["model.embed_tokens.weight"]
    assert report.bytes_read == sum(array.nbytes for array in tensors.values())

    save_moe_weights(tmp_path / "again", {BLOCK[family]: layer}, family)
    again = read(tmp_path / "again")
    assert again.keys() == tensors.keys()
    for key, array in tensors.items():
        np.testing.assert_array_equal(again[key], array, err_msg=key)
    assert sorted(file.name for file in (tmp_path / "again").iterdir()) == [
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    ]


def test_files_of_a_block_alone(tmp_path):
    dense = dense_weights(**OPTIONS["qwen3_moe"])
    expected = FusedMoE.from_dense(**dense, top_k=TOP_K)
    prefix = BLOCK["qwen3_moe"] + "."
    tensors = {
        key.removeprefix(prefix): array
        for key, array in published("qwen3_moe", dense).items()
        if key.startswith(prefix)
    }
    save_moe_weights(tmp_path, {"": expected}, "qwen3_moe")
    assert read(tmp_path).keys() == tensors.keys()
    layer = empty_like(expected)
    load_moe_weights(tmp_path, {"": layer}, "qwen3_moe")
    assert_equal_bits(layer, expected)


def test_a_save_leaves_what_is_in_the_directory(tmp_path):
    layer = FusedMoE.from_dense(**dense_weights(), top_k=TOP_K)
    (tmp_path / "parts").mkdir()
    mine, model = tmp_path / "parts" / "mine.txt", tmp_path / "model-00001-of-00001.safetensors"
    for file in (mine, model):
        file.write_text("not ours")
    with pytest.raises(RuntimeError, match=f"rank 0: FileExistsError: .*{model.name}"):
        save_moe_weights(tmp_path, {"block": layer}, "mixtral")
    assert sorted(tmp_path.rglob("*")) == sorted([mine.parent, mine, model])
    assert mine.read_text() == model.read_text() == "not ours"
    model.unlink()
    save_moe_weights(tmp_path, {"block": layer}, "mixtral")
    assert mine.read_text() == "not ours"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_paddle_matrices_the_other_way_round(family, tmp_path):
    """Those of Linear layers; the stacked ones of gpt-oss have no other way."""
    dense = dense_weights(**OPTIONS[family])
    expected = FusedMoE.from_dense(**dense, top_k=TOP_K)
    tensors = {
        key: array.T if key.endswith(".weight") else array for key, array in published(family, dense).items()
    }
    write(tmp_path / "model", tensors)
    layer = empty_like(expected)
    load_moe_weights(tmp_path / "model", {BLOCK[family]: layer}, family, transposed=False)
    assert_equal_bits(layer, expected)
    save_moe_weights(tmp_path / "again", {BLOCK[family]: layer}, family, transposed=False)
    for key, array in read(tmp_path / "again").items():
        np.testing.assert_array_equal(array, tensors[key], err_msg=key)


def test_others_in_the_same_pass(tmp_path):
    dense = dense_weights(bias=True)
    matrix, bias = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(EXPERTS, np.float32)
    tensors = published("gpt_oss", dense) | {"a": matrix, f"{BLOCK['gpt_oss']}.router.bias": bias}
    write(tmp_path / "model", tensors)
    layer = empty_like(FusedMoE.from_dense(**dense, top_k=TOP_K))
    straight, turned, router_bias = paddle.zeros([4, HIDDEN]), paddle.zeros([3, 2]), paddle.zeros([EXPERTS])
    others = {
        "model.embed_tokens.weight": (straight, False),
        "a": (turned, True),
        f"{BLOCK['gpt_oss']}.router.bias": (router_bias, False),
    }
    report = load_moe_weights(tmp_path / "model", {BLOCK["gpt_oss"]: layer}, "gpt_oss", others=others)
    assert report.unmatched == [] and float(straight.sum()) == 4 * HIDDEN
    np.testing.assert_array_equal(turned.numpy(), matrix.T)
    np.testing.assert_array_equal(router_bias.numpy(), bias)
    save_moe_weights(tmp_path / "again", {BLOCK["gpt_oss"]: layer}, "gpt_oss", others=others)
    np.testing.assert_array_equal(read(tmp_path / "again")["a"], matrix)


def test_a_scalar_among_the_others(tmp_path):
    layer = FusedMoE.from_dense(**dense_weights(), top_k=TOP_K)
    save_moe_weights(tmp_path, {"mlp": layer}, "mixtral", others={"s": (paddle.to_tensor(3.0), True)})
    scalar = paddle.zeros([])
    load_moe_weights(tmp_path, {"mlp": layer}, "mixtral", others={"s": (scalar, False)})
    assert float(scalar) == 3


def test_casts(tmp_path):
    dense = dense_weights("bfloat16")
    write(tmp_path / "half", published("mixtral", dense))
    wide = empty_like(FusedMoE.from_dense(**dense_weights(), top_k=TOP_K))
    load_moe_weights(tmp_path / "half", {BLOCK["mixtral"]: wide}, "mixtral")
    np.testing.assert_array_equal(
        wide.down_weight.numpy().view(np.uint32), dense["down"].astype(np.uint32) << 16
    )
    with pytest.raises(CheckpointError, match="w1.weight: expected float32, found bfloat16"):
        load_moe_weights(tmp_path / "half", {BLOCK["mixtral"]: wide}, "mixtral", cast="none")

    write(tmp_path / "wide", published("mixtral", dense_weights()))
    half = empty_like(FusedMoE.from_dense(**dense, top_k=TOP_K))
    with pytest.raises(CheckpointError, match="w2.weight: expected bfloat16, found float32"):
        load_moe_weights(tmp_path / "wide", {BLOCK["mixtral"]: half}, "mixtral")
    load_moe_weights(tmp_path / "wide", {BLOCK["mixtral"]: half}, "mixtral", cast="any")
    rounded = paddle.to_tensor(dense_weights()["down"]).astype("bfloat16")
    np.testing.assert_array_equal(half.down_weight.numpy(), rounded.numpy())

    numbers = np.arange(6.0)
    others = {"norm": to_storage(numbers, "bfloat16"), "count": numbers.astype(np.int8)}
    write(tmp_path / "others", {**published("mixtral", dense), **others})
    double = paddle.zeros([6], "float64")
    arguments = tmp_path / "others", {BLOCK["mixtral"]: half}, "mixtral"
    load_moe_weights(*arguments, others={"norm": (double, False)})
    np.testing.assert_array_equal(double.numpy(), numbers)
    with pytest.raises(CheckpointError, match="count: expected float64, found int8"):
        load_moe_weights(*arguments, others={"count": (double, False)}, cast="any")


# ---------------------------------------------------------------- quantised files


def quantised_gpt_oss(dtype: str) -> tuple[dict, dict]:
    """Arguments of FusedMoE.from_dense, and the files of the block."""
    hidden, inter, rng = 64, 96, np.random.default_rng(4)
    gate_up, gate_up_stored = mxfp4(rng, EXPERTS, 2 * inter, hidden)
    down, down_stored = mxfp4(rng, EXPERTS, hidden, inter)
    biases = rng.standard_normal((EXPERTS, 2 * inter)), rng.standard_normal((EXPERTS, hidden))
    biases = [to_storage(bias, "bfloat16") for bias in biases]
    router = (
        to_storage(rng.standard_normal((EXPERTS, hidden)), "bfloat16"),
        to_storage(rng.standard_normal(EXPERTS), "bfloat16"),
    )
    halves = [slice(0, None, 2), slice(1, None, 2)]
    turned = gate_up.transpose([0, 2, 1])
    dense = {
        "gate_weight": router[0].T,
        "gate_bias": router[1],
        "gate_up": np.concatenate([turned[..., half] for half in halves], axis=2),
        "down": down.transpose([0, 2, 1]),
        "gate_up_bias": np.concatenate([biases[0][:, half] for half in halves], axis=1),
        "down_bias": biases[1],
    }
    dense = {name: to_storage(to_float64(array), "float32") for name, array in dense.items()}
    for name in dense.keys() - {"gate_weight", "gate_bias"}:
        dense[name] = to_storage(dense[name], dtype)
    block = BLOCK["gpt_oss"]
    tensors = {f"{block}.router.weight": router[0], f"{block}.router.bias": router[1]}
    for name, stored, bias in (("gate_up", gate_up_stored, biases[0]), ("down", down_stored, biases[1])):
        tensors |= {f"{block}.experts.{name}_proj{ending}": array for ending, array in stored.items()}
        tensors[f"{block}.experts.{name}_proj_bias"] = bias
    return dense, tensors


def quantised_deepseek_v3(dtype: str, scales_dtype: str = "float32") -> tuple[dict, dict]:
    """The same; no size is a multiple of 128."""
    hidden, inter, shared, rng = 160, 301, 130, np.random.default_rng(5)
    block, tensors = BLOCK["deepseek_v3"], {}

    def matrix(key: str, rows: int, columns: int) -> np.ndarray:
        values, stored = fp8(rng, rows, columns, scales_dtype)
        tensors.update({f"{block}.{key}.weight{ending}": array for ending, array in stored.items()})
        return to_storage(values.T, dtype)

    def expert(key: str, size: int) -> tuple[np.ndarray, np.ndarray]:
        gate, up = (matrix(f"{key}.{name}_proj", size, hidden) for name in ("gate", "up"))
        return np.concatenate([gate, up], axis=1), matrix(f"{key}.down_proj", hidden, size)

    gate_up, down = zip(*(expert(f"experts.{number}", inter) for number in range(EXPERTS)))
    shared_gate_up, shared_down = expert("shared_experts", shared)
    router = rng.standard_normal((EXPERTS, hidden)).astype(np.float32)
    correction = rng.standard_normal(EXPERTS).astype(np.float32)
    tensors[f"{block}.gate.weight"] = router
    tensors[f"{block}.gate.e_score_correction_bias"] = correction
    dense = dict(gate_weight=router.T, correction_bias=correction, gate_up=np.stack(gate_up))
    return dense | dict(down=np.stack(down), shared_gate_up=shared_gate_up, shared_down=shared_down), tensors


def load_on_grid(path, family: str, dense: dict, cast: str, shards) -> None:
    """Every rank has the bits of its part of `dense`, and has read no more than the bytes that hold it."""
    for shard in shards:
        expected = FusedMoE.from_dense(**dense, top_k=TOP_K, parallel=shard)
        layer = empty_like(expected)
        report = load_moe_weights(path, {BLOCK[family]: layer}, family, cast=cast)
        assert_equal_bits(layer, expected)
        assert report.unmatched == ["model.embed_tokens.weight"]
        assert report.bytes_read == bytes_of_shard(family, layer), shard


def span(start: int, stop: int, size: int) -> int:
    """How many pieces of `size` hold what is between."""
    return -(-stop // size) - start // size


def bytes_of_shard(family: str, layer: FusedMoE) -> int:
    hidden, experts, (start, stop) = layer.hidden_size, layer.gate_up_weight.shape[0], layer._shard.columns
    if not experts:
        start = stop = 0
    if family == "gpt_oss":
        gate_up = 2 * (stop - start) * (hidden // 2 + hidden // 32)
        down = hidden * (span(start, stop, 2) + span(start, stop, 32))
        bias = 2 * (stop - start) + (hidden if layer.down_bias is not None else 0)
        return experts * (gate_up + down + 2 * bias) + 2 * layer.num_experts * (hidden + 1)
    total = 4 * layer.num_experts * (hidden + 1)
    for count, first, last in ((experts, start, stop), (1, *layer._shard.shared_columns)):
        scales = span(first, last, 128) * span(0, hidden, 128)
        total += 3 * count * (hidden * (last - first) + 4 * scales)
    return total


GRIDS = [(1, 1), (2, 3), (5, 1), (1, 5), (7, 2)]  # cuts within blocks, and within a byte; no experts


@pytest.mark.parametrize("ep_size, tp_size", GRIDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_mxfp4_of_gpt_oss(dtype, ep_size, tp_size, tmp_path):
    dense, tensors = quantised_gpt_oss(dtype)
    write(tmp_path / "model", tensors)
    load_on_grid(tmp_path / "model", "gpt_oss", dense, "lossless", grid(ep_size, tp_size))
    assert np.isnan(tensor_files._E8M0[255])  # the one scale that those files lack


@pytest.mark.parametrize("ep_size, tp_size", GRIDS)
@pytest.mark.parametrize("dtype, cast", [("float32", "lossless"), ("bfloat16", "any")])
def test_fp8_of_deepseek_v3(dtype, cast, ep_size, tp_size, tmp_path):
    dense, tensors = quantised_deepseek_v3(dtype)
    write(tmp_path / "model", tensors)
    load_on_grid(tmp_path / "model", "deepseek_v3", dense, cast, grid(ep_size, tp_size))


def test_fp8_with_bfloat16_scales_also_outside_the_block(tmp_path):
    """As files of Qwen3 have them; NaN comes through."""
    dense, tensors = quantised_deepseek_v3("float32", "bfloat16")
    values, stored = fp8(np.random.default_rng(6), 200, 140, "bfloat16")
    stored[""][3, 2:4], values[3, 2:4] = (127, 255), np.nan
    tensors |= {f"model.q_proj.weight{ending}": array for ending, array in stored.items()}
    write(tmp_path / "model", tensors)
    layer, turned = empty_like(FusedMoE.from_dense(**dense, top_k=TOP_K)), paddle.zeros([140, 200])
    others = {"model.q_proj.weight": (turned, True)}
    report = load_moe_weights(tmp_path / "model", {BLOCK["deepseek_v3"]: layer}, "deepseek_v3", others=others)
    np.testing.assert_array_equal(layer.down_weight.numpy(), dense["down"])
    np.testing.assert_array_equal(turned.numpy(), values.T)
    assert sorted(report.loaded) == sorted(tensors)


MXFP4, FP8 = f"{BLOCK['gpt_oss']}.experts.down_proj", f"{BLOCK['deepseek_v3']}.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    "key, change, message",
    [
        (
            f"{MXFP4}_scales",
            None,
            rf"{MXFP4}_scales: expected U8 \[5, 64, 3\], the scales of {MXFP4}_blocks, found nothing",
        ),
        (f"{MXFP4}_scales", lambda a: a[..., :2], r"down_proj_blocks, found U8 \[5, 64, 2\]"),
        (f"{MXFP4}_scales", lambda a: a.astype("float32"), r"down_proj_blocks, found F32 \[5, 64, 3\]"),
        (f"{MXFP4}_blocks", None, rf"{MXFP4}: expected a tensor \[5, 96, 64\], found nothing"),
        (
            f"{MXFP4}_blocks",
            lambda a: a[..., :15],
            rf"{MXFP4}_blocks: expected U8 \[E, out, in / 32, 16\], found U8 \[5, 64, 3, 15\]",
        ),
        (f"{MXFP4}_blocks", lambda a: a[..., 0], r"in / 32, 16\], found U8 \[5, 64, 3\]"),
        (f"{MXFP4}_blocks", lambda a: a.astype("int8"), r"in / 32, 16\], found I8 \[5, 64, 3, 16\]"),
        (
            "",  # all of down_proj
            lambda a: a[:, :60],
            rf"{MXFP4}: expected the shape \[5, 96, 64\], found \[5, 96, 60\]",
        ),
        (
            f"{FP8}_scale_inv",
            None,
            rf"{FP8}_scale_inv: expected F32 or BF16 \[3, 2\], the scales of {FP8}, found nothing",
        ),
        (f"{FP8}_scale_inv", lambda a: a.T, r"up_proj.weight, found F32 \[2, 3\]"),
        (f"{FP8}_scale_inv", lambda a: a.astype("float16"), r"up_proj.weight, found F16 \[3, 2\]"),
        (FP8, lambda a: a[None], rf"{FP8}: expected a matrix in F8_E4M3, found \[1, 301, 160\]"),
        (FP8, lambda a: a[:, :140], rf"{FP8}: expected the shape \[301, 160\], found \[301, 140\]"),
    ],
)
def test_quantised_files_that_do_not_fit(key, change, message, tmp_path):
    family, make = ("deepseek_v3", quantised_deepseek_v3) if FP8 in key else ("gpt_oss", quantised_gpt_oss)
    dense, tensors = make("float32")
    for changed in [key] if key else [f"{MXFP4}_blocks", f"{MXFP4}_scales"]:
        array = tensors.pop(changed)
        if change is not None:
            tensors[changed] = change(array)
    write(tmp_path / "model", tensors)
    layer = empty_like(FusedMoE.from_dense(**dense, top_k=TOP_K))
    with pytest.raises(CheckpointError, match=message):
        load_moe_weights(tmp_path / "model", {BLOCK[family]: layer}, family)
    for name, tensor in layer.state_dict().items():
        assert tensor.isnan().all(), f"{name} was assigned"


@pytest.mark.parametrize(
    "family, dtype, cast, found",
    [
        (
            "deepseek_v3",
            "bfloat16",
            "lossless",
            "float32, decoded from fp8 with scales, which cast='any' rounds",
        ),
        ("gpt_oss", "float16", "lossless", "bfloat16, decoded from MXFP4, which cast='any' rounds"),
        ("gpt_oss", "float32", "none", "bfloat16, decoded from MXFP4"),
    ],
)
def test_quantised_files_have_the_dtype_that_holds_their_values(family, dtype, cast, found, tmp_path):
    make = {"deepseek_v3": quantised_deepseek_v3, "gpt_oss": quantised_gpt_oss}[family]
    dense, tensors = make("float32")
    write(tmp_path / "model", tensors)
    layer = empty_like(FusedMoE.from_dense(**dense, top_k=TOP_K), dtype)
    with pytest.raises(CheckpointError, match=rf"(?m)down_proj.*: expected {dtype}, found {found}$"):
        load_moe_weights(tmp_path / "model", {BLOCK[family]: layer}, family, cast=cast)


# ---------------------------------------------------------------- files that do not fit

EXPERT_2 = f"{BLOCK['qwen3_moe']}.experts.2.up_proj.weight"


def truncate(path, tensors):
    file = path / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def remove_file(path, tensors):
    (path / "model-00002-of-00003.safetensors").unlink()


def duplicate(path, tensors):
    (extra,) = [file for file in path.glob("*1-of*.safetensors")]
    with safe_open(extra, framework="paddle") as opened:
        stored = {key: opened.get_tensor(key) for key in opened.keys()}
    key = next(key for key in tensors if key not in stored)
    save_file({**stored, key: paddle.to_tensor(np.ascontiguousarray(tensors[key]))}, extra)


def lie_in_the_index(path, tensors):
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"][f"{BLOCK['qwen3_moe']}.experts.9.up_proj.weight"] = "model-00001-of-00003.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def misplace_in_the_index(path, tensors):
    index = json.loads((path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()) - {index["weight_map"][EXPERT_2]})
    index["weight_map"][EXPERT_2] = files[0]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def break_the_index(path, tensors):
    (path / "model.safetensors.index.json").write_text('{"weight_map": [')


def double_in_a_header(path, tensors):
    one = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f"{{{one},{one}}}".encode()
    file = path / "model-00001-of-00003.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(EXPERT_2), rf"model: {EXPERT_2}: expected a tensor \[10, 12\], found nothing"),
        (
            lambda t: t.update({EXPERT_2: t[EXPERT_2].T}),
            rf"-of-00003.safetensors: {EXPERT_2}: expected the shape \[10, 12\], found \[12, 10\]",
        ),
        (
            lambda t: t.update({EXPERT_2: t[EXPERT_2].astype(np.int8)}),
            rf"-of-00003.safetensors: {EXPERT_2}: expected float32, found int8",
        ),
        (
            lambda t: t.update({EXPERT_2.replace("2.up", "5.up"): t[EXPERT_2]}),
            r"experts.5.up_proj.weight: expected no tensor of this name, found a tensor \[10, 12\] in F32",
        ),
        (
            lambda t: t.update({EXPERT_2 + "_scale_inv": np.ones(1, np.float32)}),
            "up_proj.weight_scale_inv: expected no tensor of this name",
        ),
        (truncate, "model-00002-of-00003.safetensors: .*: expected a whole safetensors file"),
        (remove_file, "model-00002-of-00003.safetensors: .*: expected a whole safetensors file"),
        (duplicate, "expected it once, found it in model-0000.-of-00003.safetensors too"),
        (
            lie_in_the_index,
            "experts.9.up_proj.weight: expected the tensor that .* places there, found nothing",
        ),
        (misplace_in_the_index, f"{EXPERT_2}: expected the tensor in this file, found it in model-0000"),
        (
            break_the_index,
            "model.safetensors.index.json: .*: expected an index in JSON, found JSONDecodeError",
        ),
        (double_in_a_header, "model-00001-of-00003.safetensors: .*: expected a whole safetensors file"),
    ],
)
def test_an_error_names_file_key_expected_and_found(change, message, tmp_path):
    dense = dense_weights()
    tensors = published("qwen3_moe", dense)
    changes_files = change.__name__ != "<lambda>"
    if not changes_files:
        change(tensors)
    write(tmp_path / "model", tensors)
    if changes_files:
        change(tmp_path / "model", tensors)
    layer = empty_like(FusedMoE.from_dense(**dense, top_k=TOP_K))
    with pytest.raises(CheckpointError, match=message):
        load_moe_weights(tmp_path / "model", {BLOCK["qwen3_moe"]: layer}, "qwen3_moe")
    for name, tensor in layer.state_dict().items():
        assert tensor.isnan().all(), f"{name} was assigned"


def test_all_problems_in_one_error(tmp_path):
    dense = dense_weights()
    tensors = published("qwen3_moe", dense)
    for expert in range(3):
        tensors.pop(f"{BLOCK['qwen3_moe']}.experts.{expert}.down_proj.weight")
    tensors[EXPERT_2] = tensors[EXPERT_2][:5]
    write(tmp_path / "model", tensors)
    layer = empty_like(FusedMoE.from_dense(**dense, top_k=TOP_K))
    with pytest.raises(CheckpointError, match="4 problems") as caught:
        load_moe_weights(tmp_path / "model", {BLOCK["qwen3_moe"]: layer}, "qwen3_moe")
    assert [problem.key for problem in caught.value.problems if problem.found == "nothing"] == [
        f"{BLOCK['qwen3_moe']}.experts.{expert}.down_proj.weight" for expert in range(3)
    ]


def test_bad_arguments(tmp_path):
    layer = FusedMoE.from_dense(**dense_weights(bias=True), top_k=TOP_K)
    with pytest.raises(ValueError, match="layout must be one of mixtral, .*, got 'llama'"):
        load_moe_weights(tmp_path, {"mlp": layer}, "llama")
    with pytest.raises(ValueError, match="transposed must be left out for .*paddleformers"):
        load_moe_weights(tmp_path, {"mlp": layer}, "paddleformers", transposed=False)
    with pytest.raises(ValueError, match=r"layout has no place for \['down_bias', 'gate_up_bias'\]"):
        save_moe_weights(tmp_path, {"mlp": layer}, "mixtral")
    with pytest.raises(CheckpointError, match="expected model.safetensors.index.json or .*, found neither"):
        load_moe_weights(tmp_path, {"mlp": layer}, "gpt_oss")
    write(tmp_path / "model", published("gpt_oss", dense_weights(bias=True)))
    with pytest.raises(ValueError, match="path must be a directory without model.safetensors.index.json"):
        save_moe_weights(tmp_path / "model", {"mlp": layer}, "gpt_oss")
    with pytest.raises(ValueError, match="cast must be 'lossless', 'any' or 'none', got 'lossles'"):
        load_moe_weights(tmp_path / "model", {"mlp": layer}, "gpt_oss", cast="lossles")
    for function in (load_moe_weights, save_moe_weights):
        with pytest.raises(ValueError, match=r"layers\['mlp'\] must be a FusedMoE, got .*Linear"):
            function(tmp_path / "model", {"mlp": paddle.nn.Linear(2, 2)}, "gpt_oss")
    others = {"mlp.experts.down_proj": (paddle.zeros([1]), False)}
    with pytest.raises(ValueError, match=r"others must not have mlp.experts.down_proj, which .*\['mlp'\]"):
        save_moe_weights(tmp_path / "new", {"mlp": layer}, "gpt_oss", others=others)
    others = {"turns": (paddle.zeros([1], "complex128"), False)}
    with pytest.raises(ValueError, match="others: tensors must be in one of .* turns is complex128"):
        save_moe_weights(tmp_path / "new", {"mlp": layer}, "gpt_oss", others=others)
    assert not (tmp_path / "new").exists()
