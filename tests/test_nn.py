"""The Flax layer and models: against Hugging Face transformers (recorded logits), and against themselves.

`make_nn_fixtures.py` records the logits; the weights are made again here, from the same seeds.
"""

import dataclasses
import functools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import nn_checkpoints
import numpy as np
import pytest
from jax.sharding import AxisType

nnx = pytest.importorskip("flax.nnx")

from jax_flashmla import flash_mla_with_kvcache  # noqa: E402
from jax_flashmla.nn import (  # noqa: E402
    DeepseekConfig,
    DeepseekForCausalLM,
    MLAAttention,
    RopeConfig,
    deepseek,
    loading,
    mla,
    plan,
)
from jax_flashmla.sharding import MLAMesh  # noqa: E402

pytestmark = pytest.mark.usefixtures("small_chunks")

EXPECTED = np.load(Path(__file__).parent / "nn_logits.npz")
TOKENS = nn_checkpoints.TOKENS.astype(np.int32)
B, LENGTH = TOKENS.shape
PAGE = 16
# Shuffled pages; entries past the length are absurd, and page 3 belongs to nobody.
TABLE = np.array([[5, 0, 7, -1], [1, 6, 2, 2147480000]], np.int32)
NUM_PAGES = 8
TOLERANCE = 1e-4


every_config = pytest.mark.parametrize("name", nn_checkpoints.CONFIGS)


@functools.cache
def checkpoint(name, root):
    config = nn_checkpoints.CONFIGS[name]
    return nn_checkpoints.save(root / name, config, nn_checkpoints.weights(config), files=3)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def load(root):
    def load(name, **options):
        return DeepseekForCausalLM.from_pretrained(checkpoint(name, root), dtype=jnp.float32, progress=False, **options)

    return load


def poisoned_caches(model):
    """What no token wrote is NaN."""
    return tuple(jnp.full_like(cache, jnp.nan) for cache in model.init_caches(NUM_PAGES, page_size=PAGE))


@nnx.jit
def jitted_step(model, *args):
    return model(*args)


@nnx.jit
def jitted_mha(model, x):
    return model.mha(x)


def fresh_step():
    """Traced anew, for what is patched to take effect."""
    return nnx.jit(lambda model, *args: model(*args))


def decode(model, steps, step=jitted_step):
    """Logits of TOKENS, which go in by `steps` tokens at a time."""
    caches, logits, length = poisoned_caches(model), [], 0
    for s in steps:
        tokens, length = TOKENS[:, length : length + s], length + s
        out, caches = step(model, jnp.asarray(tokens), caches, jnp.asarray(TABLE), jnp.full(B, length, jnp.int32))
        logits.append(out)
    assert length == LENGTH
    return np.concatenate(logits, axis=1)


def difference(logits, name):
    return float(np.abs(logits - EXPECTED[name]).max())


@every_config
def test_mha_is_what_transformers_computes(name, load):
    assert difference(jitted_mha(load(name), jnp.asarray(TOKENS)), name) < TOLERANCE


# Every configuration is read, with plain attention above; caches are filled in one of the two ways.
@pytest.mark.parametrize("name", ["v2_lite", "v3", "v3_half_split"])
def test_absorbed_prefill_is_what_transformers_computes(name, load):
    assert difference(decode(load(name), [LENGTH]), name) < TOLERANCE


@pytest.mark.parametrize("name", ["v2", "v2_lite", "v3_mscales", "v3_no_yarn"])
def test_token_by_token_is_what_transformers_computes(name, load):
    assert difference(decode(load(name), [1] * LENGTH), name) < TOLERANCE


@pytest.mark.parametrize("name, s_q", [("v3", 2), ("v2_lite", 3), ("v3", 4)])
def test_several_tokens_a_step(name, s_q, load):
    steps = [1] * (LENGTH % s_q) + [s_q] * (LENGTH // s_q)
    assert difference(decode(load(name), steps), name) < TOLERANCE


def test_prefill_by_steps_and_then_single_tokens(load):
    assert difference(decode(load("v2"), [17, 17, 1, 1, 1, 1, 1, 1]), "v2") < TOLERANCE


def test_a_long_prompt_is_cut_into_chunks(load, monkeypatch):
    """40 tokens in chunks of at most 7: six of 7, two of padding in front."""
    monkeypatch.setattr(mla, "MAX_CHUNK", 7)
    seen = []

    def attention(q, *args, **kwargs):
        seen.append(q.shape)
        return flash_mla_with_kvcache(q, *args, **kwargs)

    model = load("v3", attention=attention)
    assert difference(decode(model, [LENGTH], fresh_step()), "v3") < TOLERANCE
    assert set(seen) == {(B * 6, 7, 3, 576)}


def test_ragged_batch(load):
    """Sequences of 40 and 9 tokens arrive in steps of at most 16, right-aligned, and each is as if it were alone."""
    model, lengths = load("v3"), np.array([40, 9])
    caches, done = poisoned_caches(model), np.zeros(2, np.int32)
    step = nnx.jit(lambda model, *args: model(*args[:-1], num_new=args[-1]))
    while (done < lengths).any():
        new = np.minimum(lengths - done, 16).astype(np.int32)
        tokens = np.zeros((2, 16), np.int32)
        for i, n in enumerate(new):
            tokens[i, 16 - n :] = TOKENS[i, done[i] : done[i] + n]
        tokens, table, ends, count = map(jnp.asarray, (tokens, TABLE, done + new, new))
        out, caches = step(model, tokens, caches, table, ends, count)
        for i, n in enumerate(new):
            expected = EXPECTED["v3"][i, done[i] : done[i] + n]
            assert np.abs(np.asarray(out)[i, 16 - n :] - expected).max(initial=0) < TOLERANCE
        done += new
    for cache in caches:
        written = np.isfinite(np.asarray(cache)).all(axis=(2, 3))
        assert [int(written[row].sum()) for row in ([5, 0, 7], [1], [6, 2, 3, 4])] == [40, 9, 0]


# --- every mistake breaks parity ---


def rope_positions_off_by_one(rotate):
    def wrong(self, x, positions):
        return rotate(self, x, positions + int(x.shape[-2] > 1))  # queries, not keys

    return wrong


def no_mask(*args, causal, **kwargs):
    return flash_mla_with_kvcache(*args, causal=False, **kwargs)


def values_first(weight, num_heads, d_nope):
    w_uk, w_uv = SPLIT(weight, num_heads, d_nope)
    return w_uv, w_uk


def all_keys_first(weight, num_heads, d_nope):
    return tuple(part.reshape(num_heads, -1, weight.shape[1]) for part in np.split(weight, 2))


SPLIT = loading.split_kv_b
MUTATIONS = {
    "no mscale in the softmax": lambda m: m.setattr(RopeConfig, "softmax_mscale", 1.0),
    "mscale not squared": lambda m: m.setattr(
        RopeConfig, "softmax_mscale", property(lambda self: mla._mscale(self.factor, self.mscale_all_dim) ** 0.5)
    ),
    "no factor on cosines and sines": lambda m: m.setattr(RopeConfig, "attention_factor", 1.0),
    "other pairs": lambda m: m.setattr(
        deepseek, "_rope_from_hf", lambda config: dataclasses.replace(ROPE(config), interleave=False)
    ),
    "no YaRN": lambda m: m.setattr(
        RopeConfig, "frequencies", lambda self, dim: FREQUENCIES(dataclasses.replace(self, factor=1.0), dim)
    ),
    "positions from 0 in every step": lambda m: m.setattr(MLAAttention, "__call__", restarted),
    "queries one position further": lambda m: m.setattr(
        RopeConfig, "rotate", rope_positions_off_by_one(RopeConfig.rotate)
    ),
    "kv_b is [v | nope]": lambda m: m.setattr(loading, "split_kv_b", values_first),
    "kv_b is all keys, then all values": lambda m: m.setattr(loading, "split_kv_b", all_keys_first),
    "norms inside with another eps": lambda m: m.setattr(mla, "LATENT_NORM_EPS", 1e-2),
}
ROPE, FREQUENCIES, CALL = deepseek._rope_from_hf, RopeConfig.frequencies, MLAAttention.__call__


def restarted(self, x, *args, **kwargs):
    """Rotates by positions within the step, but writes to the right slots."""
    rope = self.rope

    class Restarted:
        def rotate(self, y, positions):
            return rope.rotate(y, positions - positions[:, :1])

    self.rope = Restarted()
    try:
        return CALL(self, x, *args, **kwargs)
    finally:
        self.rope = rope


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mistake_shows(mutation, load, monkeypatch):
    MUTATIONS[mutation](monkeypatch)
    if "every step" in mutation:
        logits = decode(load("v3_mscales"), [20, 20], fresh_step())
    else:  # without jit most of it is compiled once for all mistakes
        logits = decode(load("v3_mscales"), [LENGTH], lambda model, *args: model(*args))
    assert difference(logits, "v3_mscales") > 100 * TOLERANCE


def test_a_missing_mask_shows(load):
    assert difference(decode(load("v3_mscales", attention=no_mask), [20, 20]), "v3_mscales") > 100 * TOLERANCE


# --- the layer in JAX ---


@pytest.fixture
def layer():
    rope = RopeConfig(factor=40.0, original_max_position=16, mscale_all_dim=1.0)
    return MLAAttention(32, 3, q_lora_rank=None, rope=rope, dtype=jnp.float32, rngs=nnx.Rngs(0))


def test_layer_with_more_than_one_chunk(layer):
    x = jax.random.normal(jax.random.key(1), (2, 150, 32))
    table = jax.random.permutation(jax.random.key(2), 6).astype(jnp.int32).reshape(2, 3)
    cache = jnp.full_like(layer.init_cache(6), jnp.nan)
    lengths = jnp.full(2, 150, jnp.int32)
    y, _ = jitted_step(layer, x, cache, table, lengths)
    np.testing.assert_allclose(y, jitted_mha(layer, x), atol=2e-5, rtol=2e-5)
    metadata = plan(lengths, 150, 3)
    planned, _ = nnx.jit(lambda layer, metadata, *args: layer(*args, metadata=metadata))(
        layer, metadata, x, cache, table, lengths
    )
    np.testing.assert_array_equal(planned, y)


def test_layer_under_jit_and_scan(layer):
    """One jitted scan over tokens with the cache as carry gives what nnx.jit gives, and mha."""
    x = jax.random.normal(jax.random.key(1), (2, 20, 32))
    table = jnp.array([[3, 0], [1, 2]], jnp.int32)
    graphdef, state = nnx.split(layer)

    @jax.jit
    def scanned(state, x, cache):
        layer = nnx.merge(graphdef, state)

        def step(carry, token):
            cache, length = carry
            y, cache = layer(token[:, None], cache, table, length + 1)
            return (cache, length + 1), y[:, 0]

        start = jnp.zeros(2, jnp.int32)
        (cache, _), y = jax.lax.scan(step, (cache, start), x.swapaxes(0, 1))
        return y.swapaxes(0, 1), cache

    y, cache = scanned(state, x, layer.init_cache(4, page_size=16))
    np.testing.assert_allclose(y, jitted_mha(layer, x), atol=2e-5, rtol=2e-5)
    at_once, cache_at_once = jitted_step(layer, x, layer.init_cache(4, page_size=16), table, jnp.full(2, 20, jnp.int32))
    np.testing.assert_allclose(y, at_once, atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(cache, cache_at_once, atol=1e-5, rtol=1e-5)


def test_donated_caches_are_not_copied(load, all_optimizations):
    model = load("v2_lite")
    graphdef, state = nnx.split(model)
    step = jax.jit(lambda state, *args: nnx.merge(graphdef, state)(*args), donate_argnums=2)
    args = (state, jnp.asarray(TOKENS[:, :1]), model.init_caches(64), jnp.asarray(TABLE), jnp.ones(B, jnp.int32))
    assert "f32[64,64,1,576]{3,2,1,0} copy(" not in step.lower(*args).compile().as_text()


def test_bfloat16_stays_near_float32(root):
    path = checkpoint("v3", root)
    model = DeepseekForCausalLM.from_pretrained(path, progress=False)
    leaves = {str(x.dtype) for x in jax.tree.leaves(nnx.state(model.layers[0]))}
    assert leaves == {"bfloat16"} and model.layers[1].mlp.gate.kernel.dtype == jnp.float32
    logits = decode(model, [20, 20])
    # Loud weights and a choice of experts: most tokens agree, and all of them are finite.
    assert np.isfinite(logits).all() and np.median(np.abs(logits - EXPECTED["v3"])) < 0.2


def test_implementation_is_passed_on(layer):
    seen = []

    def attention(q, *args, **kwargs):
        seen.append(kwargs["implementation"])
        return flash_mla_with_kvcache(q, *args, **kwargs)

    model = MLAAttention(
        32, 2, q_lora_rank=16, dtype=jnp.float32, attention=attention, implementation="xla", rngs=nnx.Rngs(0)
    )
    args = jnp.ones((1, 1, 32)), model.init_cache(1), jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    jax.eval_shape(model, *args)
    assert seen == ["xla"]


def test_logits_to_keep(load):
    model = load("v2_lite")
    caches, lengths = model.init_caches(NUM_PAGES, page_size=PAGE), jnp.full(B, LENGTH, jnp.int32)
    last = nnx.jit(lambda model, *args: model(*args, logits_to_keep=1))
    logits, _ = last(model, jnp.asarray(TOKENS), caches, jnp.asarray(TABLE), lengths)
    assert logits.shape == (B, 1, 48)
    assert np.abs(logits[:, 0] - EXPECTED["v2_lite"][:, -1]).max() < TOLERANCE


# --- checkpoints ---


def test_float8_blocks_are_dequantised(tmp_path):
    """Blocks of 128 x 128, the last ones partial; scales in another shard than their weights."""
    config, tensors = nn_checkpoints.CONFIGS["v3"], {}
    exact = nn_checkpoints.weights(config)
    for name, value in exact.items():
        if not name.endswith(("_proj.weight", "_mqa.weight")):
            tensors[name] = value
            continue
        rows, columns = (-(-size // 128) for size in value.shape)
        scale = np.zeros((rows, columns), np.float32)
        quantised = np.zeros(value.shape, ml_dtypes.float8_e4m3fn)
        for i in range(rows):
            for j in range(columns):
                block = np.s_[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
                scale[i, j] = np.abs(value[block]).max() / 448
                quantised[block] = (value[block] / scale[i, j]).astype(quantised.dtype)
                exact[name][block] = quantised[block].astype(np.float32) * scale[i, j]
        tensors[name], tensors[name + "_scale_inv"] = quantised, scale
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    eight = nn_checkpoints.save(tmp_path / "8", config | {"quantization_config": quantization}, tensors, files=2)
    full = nn_checkpoints.save(tmp_path / "32", config, exact)
    models = [DeepseekForCausalLM.from_pretrained(d, dtype=jnp.float32, progress=False) for d in (eight, full)]
    jax.tree.map(np.testing.assert_array_equal, *map(nnx.state, models))


def test_files_of_the_safetensors_library(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, ml_dtypes.bfloat16)}
    numpy.save_file(tensors, tmp_path / "model.safetensors")
    for name, tensor in loading.tensors_in(tmp_path).items():
        np.testing.assert_array_equal(tensor.read(), tensors[name])


def test_layers_for_multi_token_prediction_are_skipped(tmp_path):
    config = nn_checkpoints.CONFIGS["v2_lite"]
    tensors = nn_checkpoints.weights(config) | {"model.layers.2.eh_proj.weight": np.zeros((2, 2), np.float32)}
    DeepseekForCausalLM.from_pretrained(nn_checkpoints.save(tmp_path, config, tensors), progress=False)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("model.layers.1.mlp.experts.5.up_proj.weight"), r"lacks tensors for layers.1.mlp.up_proj"),
        (lambda t: t.pop("lm_head.weight"), r"lacks tensors for lm_head.kernel"),
        (lambda t: t.update({"model.extra.weight": np.zeros(3, np.float32)}), r"does not know: model.extra.weight"),
        (lambda t: t.update({"model.norm.weight": np.zeros(3, np.float32)}), r"must give .* shape \(60,\), got \(3,\)"),
        (lambda t: t.update({"scale": np.zeros(3, np.float32)}), r"does not know: scale"),
        (
            lambda t: t.update({"model.layers.x.weight": np.zeros(3, np.float32)}),
            r"does not know: model.layers.x.weight",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.kv_b_proj.bias": np.zeros(3, np.float32)}),
            r"does not know: model.layers.0.self_attn.kv_b_proj.bias",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.experts.99.up_proj.weight": np.zeros((16, 60), np.float32)}),
            r"does not know: model.layers.1.mlp.experts.99.up_proj.weight",
        ),
        (
            lambda t: t.update(
                {
                    "model.layers.0.self_attn.o_proj.weight": np.zeros((60, 384), ml_dtypes.float8_e4m3fn),
                    "model.layers.0.self_attn.o_proj.weight_scale_inv": np.ones((1, 6), np.float32),
                }
            ),
            r"o_proj.weight: blocks of .* of a weight \(60, 384\) must have scales \(1, 3\), got \(1, 6\); see",
        ),
    ],
)
def test_wrong_checkpoints_are_refused(change, words, tmp_path):
    config = nn_checkpoints.CONFIGS["v2_lite"]
    tensors = nn_checkpoints.weights(config)
    change(tensors)
    with pytest.raises(ValueError, match=words):
        DeepseekForCausalLM.from_pretrained(nn_checkpoints.save(tmp_path, config, tensors), progress=False)


def test_configurations_of_models_without_mla_are_refused():
    llama = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32}
    with pytest.raises(ValueError, match=r"a model with MLA: kv_lora_rank in it, or .*, got neither and 'llama'"):
        DeepseekConfig.from_hf(llama)
    kin = nn_checkpoints.CONFIGS["v3"]
    assert DeepseekConfig.from_hf(kin | {"model_type": "kimi_k2"}) == DeepseekConfig.from_hf(kin)


def test_empty_directories_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        DeepseekForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    with pytest.raises(FileNotFoundError, match="safetensors"):
        DeepseekForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [lambda data: b"version https://git-lfs.github.com/spec/v1\n", lambda data: b"", lambda data: data[:-1]],
    ids=["git-lfs pointer", "empty", "cut off"],
)
def test_files_that_are_not_whole_are_refused(change, tmp_path):
    config = nn_checkpoints.CONFIGS["v2_lite"]
    file = nn_checkpoints.save(tmp_path, config, nn_checkpoints.weights(config)) / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=r"model.safetensors must be a safetensors file.*is the download complete"):
        DeepseekForCausalLM.from_pretrained(tmp_path, progress=False)


def test_weights_of_another_shape_than_the_configuration_says_are_refused():
    config = DeepseekConfig.from_hf(nn_checkpoints.CONFIGS["v3"])
    weight = np.zeros((config.num_attention_heads * 256 + 1, 512), np.float32)
    with pytest.raises(ValueError, match=r"kv_b_proj.weight must have rows for \d heads, got shape .*num_att"):
        list(loading.placed("model.layers.0.self_attn.kv_b_proj.weight", weight, config))
    with pytest.raises(ValueError, match=r"a float8 weight must have two axes, got shape \(128,\)"):
        loading.dequantize(np.zeros(128, ml_dtypes.float8_e4m3fn), np.ones((1, 1), np.float32))


@pytest.mark.parametrize("text, words", [("{}", "must have a weight_map"), ("[]", "must be a JSON object, got list")])
def test_an_index_that_is_none_is_refused(text, words, tmp_path):
    config = nn_checkpoints.CONFIGS["v2_lite"]
    index = nn_checkpoints.save(tmp_path, config, nn_checkpoints.weights(config)) / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(ValueError, match=f"{re.escape(str(index))} {words}.*is the download complete"):
        DeepseekForCausalLM.from_pretrained(tmp_path, progress=False)


def test_a_missing_shard_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(nn_checkpoints.CONFIGS["v2_lite"]))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"model-2\.safetensors must be there, model\.safetensors\.index"):
        DeepseekForCausalLM.from_pretrained(tmp_path, progress=False)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"index_topk": 2048}, "sparse attention"),
        ({"moe_layer_freq": 2}, "moe_layer_freq must be 1"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"topk_method": "dice"}, "topk_method must be"),
        ({"scoring_func": "softmax"}, "scoring_func and topk_method"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type must be"),
        ({"rope_scaling": nn_checkpoints.YARN | {"attention_factor": 1.5}}, "attention_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "original_max_position_embeddings of the rope must be in"),
    ],
)
def test_unsupported_configurations_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        DeepseekConfig.from_hf(nn_checkpoints.CONFIGS["v3"] | change)


def test_null_in_the_configuration_is_nothing():
    config = nn_checkpoints.CONFIGS["v3"]
    for name in ("rope_interleave", "topk_method"):
        assert DeepseekConfig.from_hf(config | {name: None}) == DeepseekConfig.from_hf(config)
    none = DeepseekConfig.from_hf(config | {"n_group": None, "n_shared_experts": None, "n_routed_experts": None})
    assert (none.n_group, none.topk_group, none.n_shared_experts) == (1, 1, 0)
    assert none.first_k_dense_replace == none.num_hidden_layers


def test_a_mixture_without_shared_experts():
    config = DeepseekConfig.from_hf(nn_checkpoints.CONFIGS["v3"])
    alone = deepseek.MoE(dataclasses.replace(config, n_shared_experts=0), dtype=jnp.float32, rngs=nnx.Rngs(0))
    both = deepseek.MoE(config, dtype=jnp.float32, rngs=nnx.Rngs(0))  # routed experts come first, so they are the same
    x = jax.random.normal(jax.random.key(1), (2, 5, config.hidden_size))
    np.testing.assert_allclose(alone(x) + both.shared_experts(x), both(x), atol=1e-6, rtol=1e-6)  # two float32 sums
    assert not any("shared_experts" in path for path, _ in nnx.to_flat_state(nnx.state(alone)))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"scoring_func": "relu"}, "scoring_func must be 'sigmoid' or 'softmax', got 'relu'"),
        ({"n_group": 3}, "n_group must be a divisor of n_routed_experts = 8, got 3"),
        ({"n_group": 0}, "n_group must be a divisor of n_routed_experts = 8, got 0"),
        ({"n_group": 8}, "n_group must be smaller: sigmoid rates a group by two experts, got 8"),
        ({"topk_group": 5}, "topk_group must be 1 to n_group = 4, got 5"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok must be 1 to 4, the experts to choose from, got 5"),
    ],
)
def test_experts_that_do_not_go_together_are_refused(change, words):
    """A router would choose among groups of several tokens, or name no argument."""
    config = dataclasses.replace(
        DeepseekConfig.v3(), hidden_size=32, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3
    )
    with pytest.raises(ValueError, match=words):
        deepseek.Router(dataclasses.replace(config, **change), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("dtype", [jnp.float32, np.dtype("float32"), "float32"])
def test_float32_is_no_tf32(dtype):
    layer = MLAAttention(32, 1, q_lora_rank=None, dtype=dtype, rngs=nnx.Rngs(0))
    assert layer.o_proj.precision == jax.lax.Precision.HIGHEST


def test_spellings_of_the_rope_agree():
    old = nn_checkpoints.CONFIGS["v3"]
    yarn = {k: v for k, v in old["rope_scaling"].items() if k != "type"}
    new = old | {"rope_parameters": yarn | {"rope_type": "yarn", "rope_theta": old["rope_theta"]}, "rope_scaling": None}
    del new["rope_theta"]
    assert DeepseekConfig.from_hf(new) == DeepseekConfig.from_hf(old)


def test_softmax_scales_of_the_published_models():
    for config, scale in ((DeepseekConfig.v3(), 0.135234), (DeepseekConfig.v2_lite(), 0.114721)):
        assert 192**-0.5 * config.rope.softmax_mscale**2 == pytest.approx(scale, abs=1e-6)


def count_parameters(config, layers=None):
    """Of a model with so many layers, or all; nothing is initialised. Layers with experts are all alike: two tell."""
    if layers is None:
        few = config.first_k_dense_replace + 1
        one, two = (count_parameters(config, n) for n in (few, few + 1))
        return one + (two - one) * (config.num_hidden_layers - few)
    config = dataclasses.replace(config, num_hidden_layers=layers)
    model = nnx.eval_shape(lambda: DeepseekForCausalLM(config, rngs=nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_parameters_of_the_published_models():
    """Billions."""
    published = (DeepseekConfig.v2_lite(), 15.7), (DeepseekConfig.v2(), 235.7), (DeepseekConfig.v3(), 671.0)
    for config, billions in published:
        assert count_parameters(config) / 1e9 == pytest.approx(billions, rel=2e-3)
    lite = DeepseekConfig.v2_lite()
    assert count_parameters(lite) == count_parameters(lite, lite.num_hidden_layers)


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="must be 512 and 64, got 256 and 64"):
        MLAAttention(32, 2, q_lora_rank=None, kv_lora_rank=256, rngs=nnx.Rngs(0))


def test_examples_in_docstrings():
    import doctest

    for module in (mla, deepseek):
        assert doctest.testmod(module).failed == 0


def test_without_flax_the_import_says_what_to_install():
    code = (
        "import sys; sys.modules['flax'] = None; sys.modules['flax.nnx'] = None; import jax_flashmla, jax_flashmla.nn"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode and "pip install 'jax-flashmla[flax]'" in result.stderr


# --- on a mesh ---

MESH_KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])


def mesh_of(kind, roles):
    """`roles`: the size of the axis of each role."""
    sizes, n = tuple(roles.values()), math.prod(roles.values())
    axes = tuple(f"axis of {role}" for role in roles)
    mesh = jax.make_mesh(sizes, axes, axis_types=(kind,) * len(sizes), devices=jax.devices("cpu")[:n])
    return MLAMesh(mesh, **dict(zip(roles, axes)))


def parts(parameter):
    return {shard.data.shape for shard in parameter[...].addressable_shards}


@pytest.mark.parametrize(
    "roles, kind",
    [
        ({"heads": 3}, AxisType.Auto),
        ({"heads": 3}, AxisType.Explicit),
        ({"batch": 2}, AxisType.Explicit),
        ({"context": 2}, AxisType.Auto),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value.name.lower(),
)
def test_model_on_a_mesh(roles, kind, load):
    """As transformers: a prompt and then tokens. Every device of a batch or context has the same page numbers."""
    mesh = mesh_of(kind, roles)
    model = load("v3", mesh=mesh)
    attn, mlp = model.layers[1].self_attn, model.layers[1].mlp
    heads = roles.get("heads", 1)
    assert parts(attn.w_uk) == {(3 // heads, 128, 512)} and parts(attn.o_proj.kernel) == {(384 // heads, 60)}
    assert parts(attn.q_b_proj.kernel) == {(24, 576 // heads)} and parts(attn.kv_a_proj_with_mqa.kernel) == {(60, 576)}
    assert parts(model.layers[0].mlp.down_proj.kernel) == {(48 // heads, 60)}
    assert parts(mlp.up_proj) == {(8, 60, 16)}  # 16 columns cannot be divided by 3
    caches = tuple(
        jax.device_put(jnp.full_like(cache, jnp.nan), mesh.sharding("k_cache"))
        for cache in model.init_caches(NUM_PAGES * mesh.size("pages"), page_size=PAGE)
    )
    table = np.repeat(TABLE, 2, axis=1) if "context" in roles else TABLE
    logits, length = [], 0
    for s in (38, 1, 1):
        tokens, length = TOKENS[:, length : length + s], length + s
        out, caches = jitted_step(model, tokens, caches, table, np.full(B, length, np.int32))
        assert all(c.sharding.is_equivalent_to(mesh.sharding("k_cache"), 4) for c in caches)
        logits.append(jax.device_get(out))
    assert difference(np.concatenate(logits, axis=1), "v3") < TOLERANCE


@MESH_KINDS
def test_a_model_on_a_mesh_without_jit(kind, tmp_path):
    """As jitted on one device. One layer, with experts: every step of a layer is compiled again in the next one."""
    config = nn_checkpoints.CONFIGS["v2_lite"] | {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    directory = nn_checkpoints.save(tmp_path, config, nn_checkpoints.weights(config))
    alone, model = (
        DeepseekForCausalLM.from_pretrained(directory, dtype=jnp.float32, mesh=mesh, progress=False)
        for mesh in (None, mesh_of(kind, {"heads": 3}))
    )
    args = jnp.asarray(TOKENS), poisoned_caches(alone), jnp.asarray(TABLE), jnp.full(B, LENGTH, jnp.int32)
    expected, _ = jitted_step(alone, *args)
    out, _ = model(*args)
    assert np.abs(jax.device_get(out) - np.asarray(expected)).max() < TOLERANCE


@MESH_KINDS
def test_layer_on_two_axes(kind, all_optimizations):
    """Heads and batch, each over two devices, inside of a scan; parameters are those of one device."""
    options = {"q_lora_rank": 16, "dtype": jnp.float32}
    alone = MLAAttention(32, 4, **options, rngs=nnx.Rngs(0))
    mesh = mesh_of(kind, {"batch": 2, "heads": 2})
    layer = MLAAttention(32, 4, **options, mesh=mesh, rngs=nnx.Rngs(0))
    assert parts(layer.w_uv) == {(2, 128, 512)}
    x = jax.random.normal(jax.random.key(1), (2, 20, 32))
    table = jnp.array([[3, 0], [1, 2]], jnp.int32)
    graphdef, state = nnx.split(layer)

    @jax.jit
    def scanned(state, x, cache, table):
        layer = nnx.merge(graphdef, state)

        def step(carry, token):
            cache, length = carry
            y, cache = layer(token[:, None], cache, table, length + 1)
            return (cache, length + 1), y[:, 0]

        (cache, _), y = jax.lax.scan(step, (cache, jnp.zeros(2, jnp.int32)), x)
        return y, cache

    args = state, x.swapaxes(0, 1), layer.init_cache(8, page_size=16), table
    compiled = scanned.lower(*args).compile()
    y, _ = compiled(*args)
    expected = jitted_mha(alone, x)
    np.testing.assert_allclose(jax.device_get(y).swapaxes(0, 1), expected, atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(jax.device_get(jitted_mha(layer, x)), expected, atol=2e-5, rtol=2e-5)
    assert not re.search(r"f32\[(8|4),16,1,576\]\S* all-gather", compiled.as_text())


def test_parameters_on_a_mesh_are_those_of_one_device(load):
    mesh = mesh_of(AxisType.Auto, {"heads": 3})
    states = (jax.device_get(nnx.state(load("v2", **options))) for options in ({}, {"mesh": mesh}))
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize("at_once", [1024, 4])  # 10 tokens in one and in three chunks
def test_experts_are_those_that_the_router_chose(monkeypatch, at_once):
    monkeypatch.setattr(deepseek, "MOE_TOKENS", at_once)
    config = DeepseekConfig.from_hf(nn_checkpoints.CONFIGS["v3"])
    moe = deepseek.MoE(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 5, config.hidden_size))
    weights, experts = map(np.asarray, moe.gate(x.reshape(10, -1)))
    unused = np.setdiff1d(np.arange(config.n_routed_experts), experts[0])[0]
    # An expert that a token did not choose may overflow: only rows of those that chose it come out as infinity or NaN.
    moe.gate_proj[...] = moe.gate_proj[...].at[unused].set(3e38)

    def silu(y):
        return y / (1 + np.exp(-y))

    tokens, gate, up, down = (np.asarray(y, np.float64) for y in (x, moe.gate_proj, moe.up_proj, moe.down_proj))
    tokens = tokens.reshape(10, -1)
    expected = np.asarray(moe.shared_experts(x), np.float64).reshape(10, -1)
    finite = ~(experts == unused).any(axis=1)
    assert finite[0] and finite.sum() < 10
    for t in np.flatnonzero(finite):
        for weight, e in zip(weights[t], experts[t], strict=True):
            expected[t] += weight * ((silu(tokens[t] @ gate[e]) * (tokens[t] @ up[e])) @ down[e])
    # 60 terms in float32 of numbers about 1.
    np.testing.assert_allclose(moe(x).reshape(10, -1)[finite], expected[finite], atol=1e-5, rtol=1e-5)


def test_experts_are_divided(load):
    """16 columns over 2 devices, for both sequences at once; three heads stay whole on every device."""
    config = dataclasses.replace(DeepseekConfig.from_hf(nn_checkpoints.CONFIGS["v3"]), num_attention_heads=2)
    alone = DeepseekForCausalLM(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    model = DeepseekForCausalLM(
        config, dtype=jnp.float32, mesh=mesh_of(AxisType.Auto, {"heads": 2, "batch": 2}), rngs=nnx.Rngs(0)
    )
    assert parts(model.layers[1].mlp.up_proj) == {(8, 60, 8)} and parts(model.lm_head.kernel) == {(60, 24)}
    mha = nnx.jit(DeepseekForCausalLM.mha)
    expected = mha(alone, TOKENS)
    assert np.abs(jax.device_get(mha(model, TOKENS)) - expected).max() < TOLERANCE


def test_a_step_without_tokens_is_refused(load):
    layer = MLAAttention(32, 2, q_lora_rank=None, dtype=jnp.float32, rngs=nnx.Rngs(0))
    model = load("v2_lite")
    for b, s in ((0, 1), (1, 0)):
        table, lengths = jnp.zeros((b, 1), jnp.int32), jnp.zeros(b, jnp.int32)
        with pytest.raises(ValueError, match=r"x must be \[b, s, hidden_size\] and not empty, got shape"):
            layer(jnp.ones((b, s, 32)), layer.init_cache(1), table, lengths)
        with pytest.raises(ValueError, match=r"tokens must be \[b, s\] and not empty, got shape"):
            model(jnp.ones((b, s), jnp.int32), model.init_caches(1), table, lengths)
        with pytest.raises(ValueError, match=r"tokens must be \[b, s\] and not empty, got shape"):
            model.mha(jnp.ones((b, s), jnp.int32))
    with pytest.raises(ValueError, match="s must be at least 1, got 0"):
        plan(jnp.ones(1, jnp.int32), 0, 2)


TOKENS_2 = jnp.ones((2, 1), jnp.int32)


@pytest.mark.parametrize(
    "changed, error, words",
    [
        ({"cache_seqlens": [3, 4]}, TypeError, r"cache_seqlens must be an array \[b\], got list; use jnp.asarray"),
        ({"cache_seqlens": jnp.ones(1, jnp.int32)}, ValueError, r"cache_seqlens must have shape \[b\] = \(2,\)"),
        ({"cache_seqlens": jnp.int32(3)}, ValueError, r"cache_seqlens must have the axes \[b\], got shape \(\)"),
        ({"num_new": [1, 2]}, TypeError, r"num_new must be an array \[b\], got list"),
        ({"num_new": jnp.ones(1, jnp.int32)}, ValueError, r"num_new must have shape \[b\] = \(2,\), got \(1,\)"),
        ({"tokens": [[1], [2]]}, TypeError, r"tokens must be an array \[b, s\], got list; use jnp.asarray"),
        ({"caches": ()}, ValueError, "caches must be a tuple of 2, one per layer, got 0; use init_caches"),
        ({"caches": jnp.ones(2)}, ValueError, "caches must be a tuple of 2, one per layer, got ArrayImpl"),
    ],
)
def test_wrong_arguments_of_a_model_are_named(load, changed, error, words):
    model = load("v2_lite")
    arguments = {
        "tokens": TOKENS_2, "caches": model.init_caches(2), "block_table": jnp.array([[0], [1]], jnp.int32),
        "cache_seqlens": jnp.ones(2, jnp.int32), **changed,
    }  # fmt: skip
    with pytest.raises(error, match=words):
        model(**arguments)


def test_wrong_lengths_of_a_plan_and_a_layer_are_named():
    layer = MLAAttention(32, 2, q_lora_rank=None, dtype=jnp.float32, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="cache_seqlens must be an array"):
        plan([3, 4], 1, 2)
    with pytest.raises(ValueError, match=r"cache_seqlens must have shape \[b\] = \(2,\), got \(1,\)"):
        layer(jnp.ones((2, 1, 32)), layer.init_cache(2), jnp.zeros((2, 1), jnp.int32), jnp.ones(1, jnp.int32))
    with pytest.raises(ValueError, match=r"x must be \[b, s, hidden_size\] and not empty"):
        layer.mha(jnp.ones((2, 0, 32)))


def test_a_batch_that_mha_cannot_divide_is_refused(load):
    config = DeepseekConfig.from_hf(nn_checkpoints.CONFIGS["v2_lite"])
    options = {"dtype": jnp.float32, "mesh": mesh_of(AxisType.Auto, {"batch": 2}), "rngs": nnx.Rngs(0)}
    model = DeepseekForCausalLM(config, **options)
    with pytest.raises(ValueError, match="tokens must have b divisible by 2"):
        model.mha(jnp.ones((3, 2), jnp.int32))


def test_heads_that_cannot_be_divided_are_refused():
    with pytest.raises(ValueError, match=r"num_heads must be divisible by 2, the devices on .*, got 3; use fewer"):
        MLAAttention(32, 3, q_lora_rank=None, mesh=mesh_of(AxisType.Auto, {"heads": 2}), rngs=nnx.Rngs(0))
