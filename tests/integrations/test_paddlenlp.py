"""PaddleNLP's models on paddle_moe against the same models on dense blocks, and against the stock blocks."""

from __future__ import annotations

import contextlib
import copy
from importlib import import_module

import numpy as np
import paddle
import pytest
from checks import relative_l2

pytest.importorskip("paddlenlp", reason="paddlenlp is not installed: see docs/integrations.md")

import paddlenlp_models as models
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
from paddlenlp import transformers
from paddlenlp.peft import LoRAConfig, LoRAModel
from paddlenlp_models import FAMILIES, build, generated, published_tensors

import paddle_moe
from paddle_moe.integrations import paddlenlp as integration
from paddle_moe.integrations.blocks import MoEBlock
from paddle_moe.integrations.paddlenlp import (
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


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


def dense_model(family, **options):
    return use_dense_blocks(build(family, **options), family)


# ---------------------------------------------------------------- the equations of the family


@each_family
def test_logits_and_generated_tokens(family):
    model, reference = accelerate(build(family)), dense_model(family)
    assert relative_l2(logits(model), logits(reference)) < 2e-6
    assert generated(model) == generated(reference)


@pytest.mark.parametrize(
    "name, options",
    [
        ("qwen2_moe", dict(norm_topk_prob=False)),
        ("qwen2_moe", dict(fuse_attention_ffn=True)),
        ("deepseek_v2", dict(topk_method="greedy", n_group=None, topk_group=None)),
        ("deepseek_v2", dict(n_shared_experts=None)),
        ("deepseek_v2", dict(norm_topk_prob=True, scoring_func="sigmoid")),
    ],
)
def test_options_of_configurations(name, options):
    if name not in family_of:
        pytest.skip(f"this version of PaddleNLP has no {name}")
    family = family_of[name]
    model, reference = accelerate(build(family, **options)), dense_model(family, **options)
    assert relative_l2(logits(model), logits(reference)) < 2e-6


@each_family
def test_loss_and_gradients(family):
    # Jamba's own call of its router loss does not fit that function.
    options = dict(output_router_logits=True) if family.name in ("mixtral", "qwen2_moe") else {}
    loss, gradients = loss_and_gradients(accelerate(build(family)), **options)
    expected_loss, expected = loss_and_gradients(dense_model(family), **options)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(gradients, expected)


@each_family
def test_recompute(family):
    assert_recompute_changes_nothing(blocks_of(accelerate(build(family)), family)[0])


@each_family
def test_programs(family, tmp_path):
    assert_programs_compute_the_same(blocks_of(accelerate(build(family)), family)[0], tmp_path)


@pytest.mark.parametrize("name", [name for name in family_of if name != "jamba"])  # whose logger prevents it
def test_a_program_of_the_whole_model(name):
    family = family_of[name]
    model = accelerate(build(family))
    expected = logits(model)
    np.testing.assert_array_equal(logits(paddle.jit.to_static(model, full_graph=True)), expected)


@pytest.mark.skipif("deepseek_v2" not in family_of, reason="this version of PaddleNLP has no DeepSeek-V2")
def test_balance_per_sequence_when_sequences_are_one_after_the_other():
    model = build(family_of["deepseek_v2"], seq_aux=True, seq_length=5, aux_loss_alpha=1.0)
    model.config.sequence_parallel = True
    accelerate(model)
    block, gradients = blocks_of(model, family_of["deepseek_v2"])[0], []
    block.train()
    values = np.random.default_rng(5).standard_normal([2, 5, 64]).astype("float32")
    for shape in ([2, 5, 64], [10, 64]):
        x = paddle.to_tensor(values).reshape(shape)
        x.stop_gradient = False
        block(x).sum().backward()
        gradients.append(x.grad.numpy().ravel())
    np.testing.assert_array_equal(*gradients)


def test_sequences_that_fleet_divides_are_refused():
    model = build(family_of["mixtral"])
    model.config.sequence_parallel, model.config.tensor_parallel_degree = True, 2
    with pytest.raises(ValueError, match="sequence_parallel must be False, or .* a degree of 2"):
        accelerate(model)
    assert not any(isinstance(layer, MoEBlock) for layer in model.sublayers())


@each_family
@pytest.mark.parametrize("how", ["bfloat16", "O1", "O2"])
def test_the_router_computes_in_float32(family, how):
    assert_routes_as_in_float32(integration, family, models, how)


# ---------------------------------------------------------------- the stock blocks


class PaddleWithOldWhere:
    """The module paddle with the where() of Paddle 2, which gave indices as columns."""

    def __getattr__(self, name):
        return getattr(paddle, name)

    def where(self, condition, *choices):
        if choices:
            return paddle.where(condition, *choices)
        return tuple(index.reshape([-1, 1]) for index in paddle.where(condition))


def stock_error(family) -> str | None:
    """What the stock block raises on this version of Paddle; None where it runs as it is."""
    version = tuple(int(part) for part in paddle.__version__.split(".")[:2])
    if family.name in ("mixtral", "jamba"):
        return "Broadcast dimension mismatch" if version >= (3, 1) else None
    return "Type promotion only support" if version >= (3, 2) else None


def repair_stock_blocks(family, monkeypatch):
    """Makes the stock block compute on a newer Paddle what it computed before."""
    if stock_error(family) is None:
        return
    if family.name in ("mixtral", "jamba"):
        module = import_module(f"paddlenlp.transformers.{family.name}.modeling")
        monkeypatch.setattr(module, "paddle", PaddleWithOldWhere())
    else:
        from paddlenlp.transformers.moe_gate import PretrainedMoEGate

        def priority(self, chosen_ids, capacity):
            """[T, E, capacity]: 1 at the place of a token in the buffer of an expert."""
            ids = chosen_ids.numpy()
            places = np.zeros([len(ids), self.num_experts, capacity], "int32")
            filled = np.zeros(self.num_experts, int)
            for column in range(ids.shape[1]):
                for token, expert in enumerate(ids[:, column]):
                    places[token, expert, filled[expert]] = 1
                    filled[expert] += 1
            return paddle.to_tensor(places)

        monkeypatch.setattr(PretrainedMoEGate, "_priority", priority)


# The stock Qwen2-MoE never renormalises, whatever its configuration says.
STOCK_OPTIONS = {"qwen2_moe": dict(norm_topk_prob=False)}
# In training the stock DeepSeek leaves the scaling factor out, and its balance loss is another one.
STOCK_TRAINING_OPTIONS = {
    **STOCK_OPTIONS,
    "deepseek_v2": dict(routed_scaling_factor=1.0, aux_loss_alpha=0.0),
    "deepseek_v3": dict(routed_scaling_factor=1.0, aux_loss_alpha=0.0),
}


@each_family
def test_where_the_stock_model_runs_as_it_is(family):
    error = stock_error(family)
    with pytest.raises((TypeError, ValueError), match=error) if error else contextlib.nullcontext():
        generated(build(family))


@each_family
def test_logits_and_generated_tokens_of_the_stock_model(family, monkeypatch):
    repair_stock_blocks(family, monkeypatch)
    options = STOCK_OPTIONS.get(family.name, {})
    model, stock = accelerate(build(family, **options)), build(family, **options)
    assert relative_l2(logits(model), logits(stock)) < 2e-6
    assert generated(model) == generated(stock)


@each_family
def test_loss_and_gradients_of_the_stock_model(family, monkeypatch):
    repair_stock_blocks(family, monkeypatch)
    options = STOCK_TRAINING_OPTIONS.get(family.name, {})
    model, stock = accelerate(build(family, **options)), build(family, **options)
    if family.name in ("qwen2_moe", "deepseek_v2", "deepseek_v3"):
        # By a cast to bool the stock MoELayer adds 1 to the gradient of the weight of each chosen expert: the
        # gradient of their sum.
        block, route = blocks_of(model, family)[0], integration.route
        block.auxiliary_loss = 0.0

        def recorded(*arguments, **options):
            ids, weights = route(*arguments, **options)
            block.auxiliary_loss = block.auxiliary_loss + weights.sum()
            return ids, weights

        monkeypatch.setattr(integration, "route", recorded)
    loss, gradients = loss_and_gradients(model)
    expected_loss, expected = loss_and_gradients(stock)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(gradients, expected)


@each_family
def test_stock_block(family, monkeypatch):
    repair_stock_blocks(family, monkeypatch)
    model = build(family, **STOCK_OPTIONS.get(family.name, {}))
    x = paddle.to_tensor(np.random.default_rng(0).standard_normal([2, 9, 64]).astype("float32"))
    with paddle.no_grad():
        stock = [block(x) for block in blocks_of(model, family)]
        accelerate(model)
        ours = [block(x) for block in blocks_of(model, family)]
    assert stock
    for before, after in zip(stock, ours):
        assert type(after) is type(before)
        if isinstance(before, tuple):
            assert len(before) == len(after)
            if family.name != "qwen2_moe":  # there the second one is a loss that the model cannot use
                assert relative_l2(after[1].numpy(), before[1].numpy()) < 2e-6
            before, after = before[0], after[0]
        assert after.shape == before.shape and after.dtype == before.dtype
        assert relative_l2(after.numpy(), before.numpy()) < 2e-6


# ---------------------------------------------------------------- what stays, and what comes back


@each_family
def test_checkpoints_are_interchangeable(family, tmp_path):
    stock, model = build(family), accelerate(build(family))
    assert {name: list(one.shape) for name, one in model.state_dict().items()} == {
        name: list(one.shape) for name, one in stock.state_dict().items()
    }
    expected = logits(model)
    model.save_pretrained(tmp_path / "accelerated")
    loaded = type(stock).from_pretrained(tmp_path / "accelerated")
    loaded.eval()
    np.testing.assert_array_equal(logits(accelerate(loaded)), expected)

    stock.save_pretrained(tmp_path / "stock")
    for parameter in model.parameters():
        parameter.set_value(paddle.zeros_like(parameter))
    model.set_state_dict(type(stock).from_pretrained(tmp_path / "stock").state_dict())
    np.testing.assert_array_equal(logits(model), expected)


_EXPERTS = "mlp.gate.weight mlp.experts.{0..7}.gate_proj.weight mlp.experts.{0..7}.up_proj.weight "
_EXPERTS += "mlp.experts.{0..7}.down_proj.weight "
_DEEPSEEK = """
    self_attn.q_a_proj.weight self_attn.q_a_layernorm.weight self_attn.q_b_proj.weight
    self_attn.kv_a_proj_with_mqa.weight self_attn.kv_a_layernorm.weight self_attn.kv_b_proj.weight
    self_attn.o_proj.weight input_layernorm.weight post_attention_layernorm.weight
    mlp.shared_experts.gate_proj.weight mlp.shared_experts.up_proj.weight mlp.shared_experts.down_proj.weight
"""
# The names that the published files have for the second layer, from the indexes of those models.
PUBLISHED_NAMES = {
    "mixtral": """
        self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight self_attn.o_proj.weight
        input_layernorm.weight post_attention_layernorm.weight block_sparse_moe.gate.weight
        block_sparse_moe.experts.{0..4}.w1.weight block_sparse_moe.experts.{0..4}.w2.weight
        block_sparse_moe.experts.{0..4}.w3.weight
    """,
    "qwen2_moe": _EXPERTS.replace("7", "5")
    + """
        self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight self_attn.o_proj.weight
        self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias
        input_layernorm.weight post_attention_layernorm.weight
        mlp.shared_expert.gate_proj.weight mlp.shared_expert.up_proj.weight mlp.shared_expert.down_proj.weight
        mlp.shared_expert_gate.weight
    """,
    "deepseek_v2": _EXPERTS + _DEEPSEEK,
    "deepseek_v3": _EXPERTS + _DEEPSEEK + "mlp.gate.e_score_correction_bias",
    "jamba": """
        self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight self_attn.o_proj.weight
        input_layernorm.weight pre_ff_layernorm.weight feed_forward.router.weight
        feed_forward.experts.{0..3}.gate_proj.weight feed_forward.experts.{0..3}.up_proj.weight
        feed_forward.experts.{0..3}.down_proj.weight
    """,
}


@each_family
def test_published_names(family, tmp_path):
    save_checkpoint(accelerate(build(family)), tmp_path / "saved")
    expected = set()
    for name in PUBLISHED_NAMES[family.name].split():
        start, _, rest = name.partition("{0..")
        last, _, end = rest.partition("}")
        expected |= {f"{start}{number}{end}" for number in range(int(last) + 1)} if last else {name}
    keys = read_files(tmp_path / "saved").keys()
    inside = {key.removeprefix("model.layers.1.") for key in keys if key.startswith("model.layers.1.")}
    assert inside == expected
    norm = "model.final_layernorm.weight" if family.name == "jamba" else "model.norm.weight"
    assert {key for key in keys if ".layers." not in key} == {
        "model.embed_tokens.weight",
        norm,
        "lm_head.weight",
    }


@pytest.mark.parametrize(
    "name, options",
    [
        *((family.name, {}) for family in FAMILIES),
        ("qwen2_moe", dict(fuse_attention_ffn=True, fuse_attention_qkv=True, num_key_value_heads=2)),
        ("mixtral", dict(tie_word_embeddings=True)),
        ("deepseek_v2", dict(tie_word_embeddings=True)),
        ("deepseek_v2", dict(attention_bias=True)),
        ("deepseek_v3", dict(num_nextn_predict_layers=1)),
    ],
)
def test_published_files(name, options, tmp_path):
    if name not in family_of:
        pytest.skip(f"this version of PaddleNLP has no {name}")
    model = build(family_of[name], **options)
    if options.get("tie_word_embeddings"):
        model.tie_weights()  # as from_pretrained does
    files, expected = (
        published_tensors(model),
        {name: one.numpy() for name, one in model.state_dict().items()},
    )
    write_files(files, tmp_path / "files")
    accelerate(model)
    save_checkpoint(model, tmp_path / "saved")
    assert_same_tensors(read_files(tmp_path / "saved"), files)
    for layout in ("huggingface", "auto"):
        set_to_zero(model)
        report = load_checkpoint(model, tmp_path / "files", layout=layout)
        assert report.unmatched == [] and report.bytes_read == sum(one.nbytes for one in expected.values())
        assert_same_tensors({name: one.numpy() for name, one in model.state_dict().items()}, expected)


def test_a_head_that_is_tied_in_the_files_alone(tmp_path):
    """Of a model that PaddleNLP has built, and not loaded: the two are tensors of their own."""
    model = accelerate(build(family_of["mixtral"], tie_word_embeddings=True))
    files = published_tensors(model)
    write_files(files, tmp_path / "files")
    set_to_zero(model)
    load_checkpoint(model, tmp_path / "files")
    assert model.lm_head.weight.shape == [64, 128]
    np.testing.assert_array_equal(model.lm_head.weight.numpy().T, files["model.embed_tokens.weight"])


@pytest.mark.skipif("deepseek_v3" not in family_of, reason="this version of PaddleNLP has no DeepSeek-V3")
def test_published_layers_that_predict_further_tokens_have_no_bias(tmp_path):
    model = accelerate(build(family_of["deepseek_v3"], num_nextn_predict_layers=1))
    files, bias = published_tensors(model), model.deepseek_v3.layers[2].eh_proj.bias
    del files["model.layers.2.eh_proj.bias"]
    write_files(files, tmp_path / "files")
    kept = bias.numpy()
    load_checkpoint(model, tmp_path / "files")
    np.testing.assert_array_equal(bias.numpy(), kept)


class WithScores(transformers.MixtralPretrainedModel):
    """A head that PaddleNLP's table of names does not know."""

    def __init__(self, config):
        super().__init__(config)
        self.mixtral = transformers.MixtralModel(config)
        self.score = paddle.nn.Linear(config.hidden_size, 3, bias_attr=False)


class Around(paddle.nn.Layer):
    def __init__(self, model):
        super().__init__()
        self.block = blocks_of(model, family_of["mixtral"])[0]


def mixtral_with_scores():
    config = transformers.MixtralConfig(**build(family_of["mixtral"]).config.to_dict())
    return WithScores(config)


@pytest.mark.parametrize(
    "make",
    [
        *(pytest.param(lambda f=f: without_a_head(f), id=f"{f.name} without a head") for f in FAMILIES),
        pytest.param(mixtral_with_scores, id="another head"),
        pytest.param(lambda: Around(build(family_of["mixtral"])), id="a layer around a block"),
        pytest.param(lambda: Around(build(family_of["mixtral"])).block, id="a block"),
    ],
)
def test_files_of_other_models_with_such_blocks(make, tmp_path):
    model = accelerate(make())
    expected = {name: one.numpy() for name, one in model.state_dict().items()}
    whole = isinstance(model, transformers.PretrainedModel)
    for layout in ("paddle", "huggingface") if whole else ("paddle",):
        path = tmp_path / layout
        save_checkpoint(model, path, layout=layout)
        files = read_files(path)
        if layout == "huggingface":
            assert_same_tensors(files, published_tensors(model))
        set_to_zero(model)
        load_checkpoint(model, path)
        assert_same_tensors({name: one.numpy() for name, one in model.state_dict().items()}, expected)
    if not whole:
        with pytest.raises(ValueError, match="layout must be 'paddle' for .* known only of models"):
            load_checkpoint(model, path, layout="huggingface")


def without_a_head(family):
    model = build(family)
    return getattr(transformers, family.model.replace("ForCausalLM", "Model"))(model.config)


@each_family
def test_files_of_paddlenlp(family, tmp_path):
    model = build(family)
    expected = {name: one.numpy() for name, one in model.state_dict().items()}
    write_files(expected, tmp_path / "files")
    set_to_zero(model)
    load_checkpoint(accelerate(model), tmp_path / "files")
    assert_same_tensors({name: one.numpy() for name, one in model.state_dict().items()}, expected)
    save_checkpoint(model, tmp_path / "saved", layout="paddle")
    assert_same_tensors(read_files(tmp_path / "saved"), expected)
    model.config.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert_same_tensors({name: one.numpy() for name, one in loaded.state_dict().items()}, expected)


@each_family
def test_a_training_job_goes_on(family, tmp_path):
    losses = []
    for where in ("before", "after"):
        model = accelerate(build(family))
        optimizer = paddle.optimizer.AdamW(1e-3, parameters=model.parameters())
        if where == "after":
            set_to_zero(model)
            paddle_moe.load_checkpoint(tmp_path, model, optimizer)
        for step in range(2 if where == "before" else 1):
            if step == 1:
                paddle_moe.save_checkpoint(tmp_path, model, optimizer)
            loss, _ = loss_and_gradients(model)
            optimizer.step()
            optimizer.clear_grad()
        losses.append(loss)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("what", wrong_files(EXPERT, [91, 64]))
def test_files_that_do_not_fit(what, tmp_path):
    change, text = wrong_files(EXPERT, [91, 64])[what]
    model = accelerate(build(family_of["mixtral"]))
    files = published_tensors(model)
    change(files)
    write_files(files, tmp_path / "files")
    set_to_zero(model)
    with pytest.raises(CheckpointError, match=text) as raised:
        load_checkpoint(model, tmp_path / "files")
    assert len(raised.value.problems) == 1
    assert not any(parameter.any() for parameter in model.parameters()), "half loaded"


def test_a_file_that_was_cut_short(tmp_path):
    model = accelerate(build(family_of["mixtral"]))
    write_files(published_tensors(model), tmp_path / "files")
    cut_short(tmp_path / "files")
    set_to_zero(model)
    with pytest.raises(
        CheckpointError, match=r"model-00002.*: expected a whole safetensors file, found Safe"
    ):
        load_checkpoint(model, tmp_path / "files")
    assert not any(parameter.any() for parameter in model.parameters()), "half loaded"


@each_family
def test_restore_gives_the_stock_block_back(family):
    model = build(family)
    parameters = {name: (id(one), one.numpy()) for name, one in model.named_parameters()}
    classes = [type(layer) for layer in model.sublayers()]
    blocks = blocks_of(accelerate(model), family)
    assert blocks and all(isinstance(block, MoEBlock) for block in blocks)
    assert restore(model) is model
    assert [type(layer) for layer in model.sublayers()] == classes
    for name, one in model.named_parameters():
        assert id(one) == parameters[name][0]
        np.testing.assert_array_equal(one.numpy(), parameters[name][1])


@each_family
def test_quantized_and_prepacked_experts(family, tmp_path):
    write_files({"one": np.zeros(1), "two": np.zeros(1)}, tmp_path / "files")
    assert_experts_are_prepacked(integration, family, accelerate(build(family)), tmp_path / "files")
    model = accelerate(build(family))
    assert_experts_are_quantized(integration, family, model, tmp_path / "files")
    assert len(generated(model)) == len(generated(accelerate(build(family))))


@pytest.mark.parametrize("name", sorted({"mixtral", "qwen2_moe", "deepseek_v3"} & family_of.keys()))
def test_adapters_train_with_quantized_experts(name):
    model = integration.quantize_experts(accelerate(build(family_of[name])), "int4")
    lora = LoRAModel(model, LoRAConfig(target_modules=[".*q_proj.*", ".*o_proj.*"], r=4, lora_alpha=8))
    assert_adapters_train(lora)


def test_copies_have_weights_of_their_own():
    model = accelerate(build(family_of["mixtral"]))
    twin = copy.deepcopy(model)
    expected = logits(model)
    for parameter in model.parameters():
        parameter.set_value(paddle.zeros_like(parameter))
    np.testing.assert_array_equal(logits(twin), expected)


@each_family
def test_patch_accelerates_models_that_are_built_later(family):
    before, expected = build(family), logits(accelerate(build(family)))
    patch()
    try:
        model = build(family)
        assert not any(isinstance(layer, MoEBlock) for layer in before.sublayers())
        assert all(isinstance(block, MoEBlock) for block in blocks_of(model, family))
        np.testing.assert_array_equal(logits(model), expected)
        with pytest.raises(ValueError, match="patched already"):
            patch()
    finally:
        unpatch()
    assert not any(isinstance(layer, MoEBlock) for layer in build(family).sublayers())
    restore(model)
    assert not any(isinstance(layer, MoEBlock) for layer in model.sublayers())


def test_patch_and_from_pretrained(tmp_path):
    stock = build(family_of["mixtral"])
    stock.save_pretrained(tmp_path)
    patch()
    try:
        model = type(stock).from_pretrained(tmp_path)
    finally:
        unpatch()
    model.eval()
    assert all(isinstance(block, MoEBlock) for block in blocks_of(model, family_of["mixtral"]))
    np.testing.assert_array_equal(logits(model), logits(accelerate(stock)))


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


# ---------------------------------------------------------------- errors


def test_a_model_of_another_kind():
    with pytest.raises(
        ValueError, match=r"MixtralSparseMoeBlock of Mixtral, .*JambaSparseMoeBlock.* got Linear"
    ):
        accelerate(paddle.nn.Linear(2, 2))


def test_twice():
    model = accelerate(build(family_of["mixtral"]))
    with pytest.raises(ValueError, match="accelerated already"):
        accelerate(model)


def test_experts_with_adapters_are_refused_and_nothing_changes():
    class LoRALinear(paddle.nn.Linear):
        pass

    model = build(family_of["mixtral"])
    model.mixtral.layers[1].block_sparse_moe.experts[2].w3 = LoRALinear(64, 90, bias_attr=False)
    with pytest.raises(ValueError, match=r"w3 of MixtralMLP must be a paddle.nn.Linear, got LoRALinear"):
        accelerate(model)
    assert not any(isinstance(layer, MoEBlock) for layer in model.sublayers())


@pytest.mark.parametrize(
    "name, layer", [("mixtral", "gate"), ("jamba", "router"), ("qwen2_moe", "shared_expert_gate")]
)
def test_adapters_of_routers_are_refused(name, layer):
    if name not in family_of:
        pytest.skip(f"this version of PaddleNLP has no {name}")
    family = family_of[name]

    def lora_model(model, target):
        return LoRAModel(model, LoRAConfig(target_modules=[target], r=4, lora_alpha=8))

    text = f"^{layer} of {family.block} must be a paddle.nn.Linear, got LoRALinear"
    assert_adapters_are_refused(integration, family, lora_model, lambda: build(family), f".*{layer}$", text)


def test_weights_that_hooks_compute_are_refused_and_nothing_changes():
    model = build(family_of["mixtral"])
    paddle.nn.utils.weight_norm(model.mixtral.layers[1].block_sparse_moe.experts[2].w2, dim=1)
    with pytest.raises(
        ValueError, match=r"^w2 of MixtralMLP must have a parameter weight, got weight_g, weight_v"
    ):
        accelerate(model)
    assert not any(isinstance(layer, MoEBlock) for layer in model.sublayers())


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation must be .* got MishActivation"):
        accelerate(build(family_of["mixtral"], hidden_act="mish"))


@pytest.mark.skipif("deepseek_v2" not in family_of, reason="this version of PaddleNLP has no DeepSeek-V2")
def test_unknown_selection():
    model = build(family_of["deepseek_v2"])
    model.deepseek_v2.layers[1].mlp.gate.topk_method = "random"
    with pytest.raises(ValueError, match="topk_method must be one of .* got 'random'"):
        accelerate(model)


def test_more_ranks_than_started():
    model = build(family_of["mixtral"])
    with pytest.raises(ValueError, match="ep_size=2"):
        accelerate(model, ep_size=2)
    assert not any(isinstance(layer, MoEBlock) for layer in model.sublayers())
