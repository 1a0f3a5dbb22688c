"""PaddleFormers' models on paddle_moe against the same models on dense blocks and on the stock blocks."""

from __future__ import annotations

import copy

import numpy as np
import paddle
import pytest
from checkpoint_cases import fp8, mxfp4, write_file
from checks import relative_l2

pytest.importorskip("paddleformers", reason="paddleformers is not installed: see docs/integrations.md")

import paddleformers_models as models
from families import (
    assert_adapters_are_refused,
    assert_adapters_train,
    assert_experts_are_prepacked,
    assert_experts_are_quantized,
    assert_programs_compute_the_same,
    assert_recompute_changes_nothing,
    assert_routes_as_in_float32,
    assert_same_gradients,
    assert_same_tensors,
    blocks_of,
    cut_short,
    logits,
    loss_and_gradients,
    read_files,
    set_to_zero,
    use_dense_blocks,
    write_files,
    wrong_files,
)
from paddleformers.peft import LoRAConfig, LoRAModel
from paddleformers_models import FAMILIES, build, generated, published_tensors

from paddle_moe.integrations import paddleformers as integration
from paddle_moe.integrations.blocks import MoEBlock
from paddle_moe.integrations.paddleformers import (
    accelerate,
    load_checkpoint,
    patch,
    restore,
    save_checkpoint,
    unpatch,
)
from paddle_moe.tensor_files import CheckpointError

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
family_of = {family.name: family for family in FAMILIES}


def dense_model(family, **options):
    return use_dense_blocks(build(family, **options), family)


# ---------------------------------------------------------------- the equations of the family


@each_family
def test_logits_and_generated_tokens(family):
    model, reference = accelerate(build(family)), dense_model(family)
    assert relative_l2(logits(model), logits(reference)) < 2e-6
    # The attention of DeepSeek-V3 raises on Paddle 3.3 when there is one token, ours or not.
    cached = family.name != "deepseek_v3"
    assert generated(model, cached) == generated(reference, cached)


@pytest.mark.parametrize(
    "name, options",
    [
        ("qwen3_moe", dict(norm_topk_prob=False)),
        ("qwen3_moe", dict(fd_fallback=True)),  # experts as stacked weights
        ("deepseek_v3", dict(fd_fallback=True)),
        ("glm4_moe", dict(fd_fallback=True)),
        ("deepseek_v3", dict(norm_topk_prob=False)),
    ],
)
def test_options_of_configurations(name, options):
    family = family_of[name]
    model, reference = accelerate(build(family, **options)), dense_model(family, **options)
    assert relative_l2(logits(model), logits(reference)) < 2e-6


@each_family
def test_loss_and_gradients(family):
    loss, gradients = loss_and_gradients(accelerate(build(family)))
    expected_loss, expected = loss_and_gradients(dense_model(family))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(gradients, expected)


def test_stacked_experts_have_gradients():
    family = family_of["qwen3_moe"]
    loss, gradients = loss_and_gradients(accelerate(build(family, fd_fallback=True)))
    expected_loss, expected = loss_and_gradients(dense_model(family, fd_fallback=True))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(gradients, expected)


def test_loss_of_router_logits():
    """gpt-oss passes its loss no logits in PaddleFormers 1.2.0, ours or not, and raises."""
    family, options = family_of["qwen3_moe"], dict(output_router_logits=True)
    loss, gradients = loss_and_gradients(accelerate(build(family)), **options)
    expected_loss, expected = loss_and_gradients(dense_model(family), **options)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(gradients, expected)


@each_family
def test_recompute(family):
    block = blocks_of(accelerate(build(family)), family)[0]
    assert_recompute_changes_nothing(block)
    if family.name == "ernie4_5_moe":
        assert block.moe_statics.expert_usage.sum() == 2 * 10 * block.top_k  # of two steps, once each


@each_family
def test_training_in_bfloat16(family):
    """Of what Paddle's CPU has no kernels for, concat's gradient and sums, a block needs none."""
    gradients = []
    for dtype in ("float32", "bfloat16"):
        model = build(family)
        model.to(dtype="bfloat16")
        model.to(dtype=dtype)
        block = blocks_of(accelerate(model), family)[0]
        block.train()
        x = paddle.to_tensor(np.random.default_rng(4).standard_normal([2, 5, 64]).astype("float32"))
        x = x.astype("bfloat16").astype(dtype)
        x.stop_gradient = False
        out = block(x)
        out = out[0] if isinstance(out, tuple) else out
        out.astype("float32").sum().backward()
        gradients.append(x.grad.astype("float32").numpy())
    assert relative_l2(*gradients[::-1]) < 2e-2


@each_family
def test_programs(family, tmp_path):
    assert_programs_compute_the_same(blocks_of(accelerate(build(family)), family)[0], tmp_path)


@each_family
@pytest.mark.parametrize("how", ["bfloat16", "O1", "O2"])
def test_the_router_computes_in_float32(family, how):
    assert_routes_as_in_float32(integration, family, models, how)


# ---------------------------------------------------------------- the stock blocks


@each_family
def test_stock_block(family):
    if family.name == "ernie4_5_moe":
        pytest.skip("its stock block has CUDA kernels only")
    model = build(family)
    if family.name == "gpt_oss":
        model.train()  # the stock block mixes up tokens and experts in evaluation
    x = paddle.to_tensor(np.random.default_rng(0).standard_normal([2, 9, 64]).astype("float32"))
    with paddle.no_grad():
        stock = [block(x) for block in blocks_of(model, family)]
        accelerate(model)
        ours = [block(x) for block in blocks_of(model, family)]
    assert stock
    for before, after in zip(stock, ours):
        pairs = zip(before, after) if isinstance(before, tuple) else [(before, after)]
        assert type(after) is type(before)
        for one, other in pairs:
            assert other.shape == one.shape and other.dtype == one.dtype
            assert relative_l2(other.numpy(), one.numpy()) < 2e-6


def test_experts_alone():
    """A model with a router of its own around MoeExperts."""
    from paddleformers.nn.experts import MoeExperts
    from paddleformers.transformers.qwen3_moe.configuration import Qwen3MoeConfig

    class Model(paddle.nn.Layer):
        def __init__(self):
            super().__init__()
            config = Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=44, num_experts=6)
            self.experts = MoeExperts(config)

    model = Model()
    rng = np.random.default_rng(1)
    x = paddle.to_tensor(rng.standard_normal([7, 64]).astype("float32"))
    ids = paddle.to_tensor(rng.integers(0, 6, [7, 2]))
    ids[:, 1] = (ids[:, 0] + 1) % 6
    weights = paddle.to_tensor(rng.random([7, 2]).astype("float32"))
    with paddle.no_grad():
        stock = model.experts(x, ids, weights).numpy()
        accelerate(model)
        assert isinstance(model.experts, MoEBlock)
        assert relative_l2(model.experts(x, ids, weights).numpy(), stock) < 2e-6


# ---------------------------------------------------------------- what stays, and what comes back


@each_family
def test_names_and_restore(family):
    model = build(family)
    parameters = {name: (id(one), one.numpy()) for name, one in model.state_dict().items()}
    classes = [type(layer) for layer in model.sublayers()]
    accelerate(model)
    logits(model)
    assert list(model.state_dict()) == list(parameters)
    restore(model)
    assert [type(layer) for layer in model.sublayers()] == classes
    for name, one in model.state_dict().items():
        assert id(one) == parameters[name][0]
        np.testing.assert_array_equal(one.numpy(), parameters[name][1])


@each_family
def test_checkpoints_are_interchangeable(family, tmp_path):
    stock, model = build(family), accelerate(build(family))
    for one in (*stock.state_dict().values(), *model.state_dict().values()):
        one.set_value(one.astype("bfloat16").astype(one.dtype))  # PaddleFormers writes routers in bfloat16
    expected = logits(model)
    model.save_pretrained(tmp_path / "accelerated")
    loaded = type(stock).from_pretrained(tmp_path / "accelerated")
    loaded.eval()
    np.testing.assert_array_equal(logits(accelerate(loaded)), expected)
    save_checkpoint(model, tmp_path / "ours")
    model.config.save_pretrained(tmp_path / "ours")
    loaded = type(stock).from_pretrained(tmp_path / "ours")
    loaded.eval()
    np.testing.assert_array_equal(logits(accelerate(loaded)), expected)
    stock.save_pretrained(tmp_path / "stock")
    set_to_zero(model)
    model.set_state_dict(type(stock).from_pretrained(tmp_path / "stock").state_dict())
    np.testing.assert_array_equal(logits(model), expected)


@pytest.mark.parametrize(
    "name, stacked",
    [(family.name, False) for family in FAMILIES]
    + [(name, True) for name in ("qwen3_moe", "deepseek_v3", "glm4_moe")],
)
def test_quantized_and_prepacked_experts(name, stacked, tmp_path):
    family = family_of[name]
    write_files({"one": np.zeros(1), "two": np.zeros(1)}, tmp_path / "files")
    for are_frozen in (assert_experts_are_quantized, assert_experts_are_prepacked):
        model = accelerate(build(family, **({"fd_fallback": True} if stacked else {})))
        are_frozen(integration, family, model, tmp_path / "files")


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_adapters_train_with_quantized_experts(name):
    model = integration.quantize_experts(accelerate(build(family_of[name])), "int4")
    lora = LoRAModel(model, LoRAConfig(target_modules=[".*qkv_proj.*", ".*o_proj.*"], r=4, lora_alpha=8))
    assert_adapters_train(lora)


@pytest.mark.parametrize(
    "name, layer, options",
    [("qwen3_moe", "gate", {})]
    + [(name, "experts", {"fd_fallback": True}) for name in ("qwen3_moe", "deepseek_v3", "glm4_moe")]
    + [("gpt_oss", "experts", {})],
)
def test_adapters_of_routers_and_stacked_experts_are_refused(name, layer, options):
    family = family_of[name]

    def lora_model(model, target):
        return LoRAModel(model, LoRAConfig(target_modules=[target], r=4, lora_alpha=8))

    text = (
        "^LoRAMoeExperts must have the parameters gate_up_proj and down_proj alone, got also gate_up_proj_lo"
    )
    if layer == "gate":
        text = f"^gate of {family.block} must be a paddle.nn.Linear, got LoRALinear"
    assert_adapters_are_refused(
        integration, family, lora_model, lambda: build(family, **options), f".*mlp.{layer}$", text
    )


@each_family
def test_copies_have_weights_of_their_own(family):
    model = accelerate(build(family))
    twin = copy.deepcopy(model)
    expected = logits(model)
    for parameter in model.parameters():
        parameter.set_value(paddle.zeros_like(parameter))
    np.testing.assert_array_equal(logits(twin), expected)


@each_family
def test_shapes_of_tokens(family):
    block = blocks_of(accelerate(build(family)), family)[0]
    x = paddle.randn([2, 3, 64])

    def run(x):
        out = block(x)
        return (out[0] if isinstance(out, tuple) else out).numpy()

    with paddle.no_grad():
        expected = run(x)
        np.testing.assert_array_equal(run(x.reshape([6, 64])), expected.reshape([6, 64]))  # sequence parallel
        np.testing.assert_array_equal(run(x[:, :1]), expected[:, :1])
        assert run(paddle.zeros([2, 0, 64])).shape == (2, 0, 64)


@each_family
def test_sequences_that_fleet_divides_are_refused(family):
    model = build(family)
    model.config.sequence_parallel = True
    restore(accelerate(model))
    model.config.tensor_model_parallel_size = 2
    with pytest.raises(ValueError, match="sequence_parallel must be False, or .* a degree of 2"):
        accelerate(model)
    assert not any(isinstance(layer, MoEBlock) for layer in model.sublayers())


@each_family
def test_patch_accelerates_models_that_are_built_later(family):
    expected = logits(accelerate(build(family)))
    patch()
    try:
        np.testing.assert_array_equal(logits(build(family)), expected)
        assert all(isinstance(block, MoEBlock) for block in blocks_of(build(family), family))
    finally:
        unpatch()


def test_patch_accelerates_experts_of_other_models():
    """Those of Qwen2-MoE, for example, have a class of their own that computes what MoeExperts does."""
    from paddleformers.transformers.qwen2_moe.modeling import Qwen2MoeExperts
    from paddleformers.transformers.qwen3_moe.configuration import Qwen3MoeConfig
    from paddleformers.transformers.qwen3_moe.modeling import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=44, num_experts=6, fd_fallback=True)
    patch()
    try:
        experts, block = Qwen2MoeExperts(config), Qwen3MoeSparseMoeBlock(config)
    finally:
        unpatch()
    assert isinstance(experts, MoEBlock) and isinstance(experts, Qwen2MoeExperts)
    assert isinstance(block, MoEBlock) and not isinstance(block.experts, MoEBlock)
    assert type(restore(experts)) is Qwen2MoeExperts


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "glm4_moe"])
def test_experts_of_a_block_stay_as_they_are(name):
    """Or they would be divided over ranks without the block around them."""
    model = build(family_of[name], fd_fallback=True)
    blocks = blocks_of(model, family_of[name])
    accelerate(blocks[0])
    if len(blocks) > 1:
        accelerate(model)
    with pytest.raises(ValueError, match="is accelerated already; restore"):
        accelerate(model)
    assert not any(isinstance(block.experts, MoEBlock) for block in blocks)


@each_family
def test_changed_weights_count_at_once(family):
    model, twin = accelerate(build(family)), build(family)
    before = logits(model)
    for parameter in model.parameters():
        parameter.set_value(parameter * 0.5)
    twin.set_state_dict(model.state_dict())
    after = logits(model)
    assert relative_l2(after, before) > 1e-3
    np.testing.assert_array_equal(after, logits(accelerate(twin)))


def test_gpt_oss_with_few_of_its_experts():
    family = family_of["gpt_oss"]
    model, reference = accelerate(build(family)), dense_model(family)
    x = paddle.randn([1, 1, 64])  # two of five experts
    with paddle.no_grad():
        for block, expected in zip(blocks_of(model, family), blocks_of(reference, family)):
            assert relative_l2(block(x)[0].numpy(), expected.forward(x)[0].numpy()) < 2e-6
            assert block(paddle.zeros([1, 0, 64]))[0].shape == [1, 0, 64]


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    "name, options",
    [
        *((family.name, {}) for family in FAMILIES),
        ("qwen3_moe", dict(attention_bias=True, tie_word_embeddings=True)),
        ("qwen3_moe", dict(fd_fallback=True)),  # experts as stacked weights
        ("deepseek_v3", dict(fd_fallback=True)),
        ("glm4_moe", dict(fd_fallback=True)),
    ],
)
def test_published_files(name, options, tmp_path):
    model = build(family_of[name], **options)
    files = published_tensors(model)
    another_layer = {"model.layers.7.mlp.experts.0.gate_proj.weight": np.zeros([2, 2], "float32")}
    write_files({**files, **another_layer}, tmp_path / "files")
    accelerate(model)
    save_checkpoint(model, tmp_path / "saved")
    assert_same_tensors(read_files(tmp_path / "saved"), files)

    expected = {key: one.numpy() for key, one in model.state_dict().items()}
    tied = expected["lm_head.weight"].nbytes if options.get("tie_word_embeddings") else 0
    if tied:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    set_to_zero(model)
    report = load_checkpoint(model, tmp_path / "files")
    assert_same_tensors({key: one.numpy() for key, one in model.state_dict().items()}, expected)
    assert report.unmatched == list(another_layer)
    assert report.bytes_read == sum(one.nbytes for one in files.values()) + tied


@pytest.mark.parametrize(
    "name, options", [("deepseek_v3", {}), ("gpt_oss", dict(intermediate_size=96))], ids=lambda one: str(one)
)
def test_quantised_files(name, options, tmp_path):
    """The experts of gpt-oss in MXFP4; the projections of DeepSeek-V3 in fp8, also those of attention."""
    model, rng = accelerate(build(family_of[name], **options)), np.random.default_rng(9)
    plain, quantised = published_tensors(model), {}
    for key, array in plain.items():
        stored = {"": array}
        if name == "gpt_oss" and key.endswith(("gate_up_proj", "down_proj")):
            values, stored = mxfp4(rng, array.shape[0], *array.shape[:0:-1])
            plain[key] = values.transpose([0, 2, 1])
        elif name == "deepseek_v3" and array.ndim == 2 and "proj" in key:
            plain[key], stored = fp8(rng, *array.shape, "float32")
        quantised.update({key + ending: one for ending, one in stored.items()})
    write_files(plain, tmp_path / "plain")
    load_checkpoint(model, tmp_path / "plain")
    expected = {key: one.numpy() for key, one in model.state_dict().items()}
    (tmp_path / "quantised").mkdir()
    write_file(tmp_path / "quantised" / "model.safetensors", quantised)
    set_to_zero(model)
    report = load_checkpoint(model, tmp_path / "quantised")
    assert_same_tensors({key: one.numpy() for key, one in model.state_dict().items()}, expected)
    assert sorted(report.loaded) == sorted(quantised) and report.unmatched == []
    assert any("self_attn" in key and key.endswith("scale_inv") for key in quantised) == (name != "gpt_oss")


@each_family
def test_files_of_paddleformers(family, tmp_path):
    model = accelerate(build(family))
    expected = {key: one.numpy() for key, one in model.state_dict().items()}
    write_files(expected, tmp_path / "files")
    set_to_zero(model)
    load_checkpoint(model, tmp_path / "files")
    assert_same_tensors({key: one.numpy() for key, one in model.state_dict().items()}, expected)
    save_checkpoint(model, tmp_path / "saved", layout="paddle")
    assert_same_tensors(read_files(tmp_path / "saved"), expected)


EXPERT = "model.layers.1.mlp.experts.2.gate_proj.weight"


@pytest.mark.parametrize("what", wrong_files(EXPERT, [44, 64]))
@pytest.mark.parametrize("stacked", [False, True])
def test_files_that_do_not_fit(what, stacked, tmp_path):
    change, text = wrong_files(EXPERT, [44, 64])[what]
    model = accelerate(build(family_of["qwen3_moe"], fd_fallback=stacked))
    files = published_tensors(model)
    change(files)
    write_files(files, tmp_path / "files")
    set_to_zero(model)
    with pytest.raises(CheckpointError, match=text) as raised:
        load_checkpoint(model, tmp_path / "files")
    assert len(raised.value.problems) == 1
    assert not any(parameter.any() for parameter in model.parameters()), "half loaded"


def test_a_file_that_was_cut_short(tmp_path):
    model = accelerate(build(family_of["gpt_oss"]))
    write_files(published_tensors(model), tmp_path / "files")
    cut_short(tmp_path / "files")
    set_to_zero(model)
    with pytest.raises(
        CheckpointError, match=r"model-00002.*: expected a whole safetensors file, found Safe"
    ):
        load_checkpoint(model, tmp_path / "files")
    assert not any(parameter.any() for parameter in model.parameters()), "half loaded"


def test_published_names_need_accelerated_blocks(tmp_path):
    model = build(family_of["qwen3_moe"])
    for call in (load_checkpoint, save_checkpoint):
        with pytest.raises(ValueError, match="known only of .*, with all of their blocks accelerated"):
            call(model, tmp_path, layout="huggingface")
    with pytest.raises(ValueError, match="layout must be 'huggingface' or 'paddle', got 'torch'"):
        save_checkpoint(model, tmp_path, layout="torch")


# ---------------------------------------------------------------- errors


def test_a_model_of_another_kind():
    with pytest.raises(ValueError, match=r"Qwen3MoeSparseMoeBlock of Qwen3-MoE, .* got Linear"):
        accelerate(paddle.nn.Linear(2, 2))


@pytest.mark.parametrize("training", [True, False])
def test_ernie_without_router_losses_has_gradients(training):
    names = ("router_aux_loss_coef", "moe_orthogonal_loss_lambda", "router_z_loss_coef")
    family = family_of["ernie4_5_moe"]
    model = accelerate(build(family, **dict.fromkeys(names, 0.0)))
    reference = dense_model(family, **dict.fromkeys(names, 0.0))
    expected = loss_and_gradients(reference)[1]
    if training:
        actual = loss_and_gradients(model)[1]
    else:
        ids = models.tokens()
        model(ids, labels=ids)[0].backward()
        actual = {name: one.grad.numpy() for name, one in model.named_parameters() if one.grad is not None}
    assert_same_gradients(actual, expected)


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(moe_capacity=[4, 4, 4]), "moe_capacity must be at least moe_num_experts"),
        (dict(moe_dropout_prob=0.1), "moe_dropout_prob must be 0"),
    ],
)
def test_ernie_options_that_are_not_computed(options, text):
    model = build(family_of["ernie4_5_moe"], **options)
    with pytest.raises(ValueError, match=text):
        accelerate(model)
    assert not any(isinstance(layer, MoEBlock) for layer in model.sublayers())
