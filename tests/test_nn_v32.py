"""DeepSeek Sparse Attention: against Hugging Face transformers (recorded logits), float64, and against itself.

`make_nn_fixtures.py` records the logits; the weights are made again here, from the same seeds.
"""

import dataclasses
import doctest
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import nn_checkpoints
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

nnx = pytest.importorskip("flax.nnx")

from test_nn import MESH_KINDS, count_parameters, mesh_of, parts  # noqa: E402
from test_sharding import COLLECTIVE  # noqa: E402

from jax_flashmla import flash_mla_with_kvcache, kvcache  # noqa: E402
from jax_flashmla.nn import (  # noqa: E402
    DeepseekConfig,
    DeepseekForCausalLM,
    DSAIndexer,
    MLAAttention,
    RopeConfig,
    SparseCache,
    SparseMLAAttention,
    deepseek,
    mla,
    sparse,
)
from jax_flashmla.ops.append import TARGET as APPEND  # noqa: E402
from jax_flashmla.ops.sparse_decode import TARGET as SPARSE_DECODE  # noqa: E402

pytestmark = pytest.mark.usefixtures("small_chunks")

EXPECTED = np.load(Path(__file__).parent / "nn_logits_v32.npz")
CONFIGS = nn_checkpoints.SPARSE_CONFIGS
TOKENS = nn_checkpoints.TOKENS.astype(np.int32)
B, LENGTH = TOKENS.shape
TOPK = CONFIGS["v32"]["index_topk"]
PAGE = 16
# Shuffled pages; entries past the length are absurd, and pages 3 and 4 belong to nobody.
TABLE = np.array([[5, 0, 7, -1], [1, 6, 2, 2147480000]], np.int32)
NUM_PAGES = 8
TOLERANCE = 1e-4


every_config = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    """A float32 model; each checkpoint is read once, and once for every mesh."""
    root = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def directory(name):
        config = CONFIGS[name]
        return nn_checkpoints.save(root / name, config, nn_checkpoints.weights(config), files=3)

    @functools.cache
    def load(name, mesh=None):
        return DeepseekForCausalLM.from_pretrained(directory(name), dtype=jnp.float32, mesh=mesh, progress=False)

    return load


def poisoned(caches):
    """What no token wrote is NaN; in bytes, every field of the fp8 format is."""
    return jax.tree.map(lambda x: jnp.full_like(x, 255 if x.dtype == jnp.uint8 else jnp.nan), caches)


def poisoned_caches(model, **options):
    return poisoned(model.init_caches(NUM_PAGES, page_size=PAGE, **options))


@nnx.jit
def jitted_step(model, *args):
    return model(*args)


@nnx.jit
def jitted_mha(model, x):
    return model.mha(x)


def fresh_step():
    """Traced anew, for what is patched to take effect."""
    return nnx.jit(lambda model, *args: model(*args))


def decode(model, steps, step=jitted_step, **options):
    """Logits of TOKENS, which go in by `steps` tokens at a time."""
    caches, logits, length = poisoned_caches(model, **options), [], 0
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


def test_a_prompt_at_once_is_what_transformers_computes(load):
    assert difference(decode(load("v32"), [LENGTH]), "v32") < TOLERANCE


@every_config
def test_token_by_token_is_what_transformers_computes(name, load):
    assert difference(decode(load(name), [1] * LENGTH), name) < TOLERANCE


@pytest.mark.parametrize("s_q", [2, 3, 4])
def test_several_tokens_a_step(s_q, load):
    steps = [1] * (LENGTH % s_q) + [s_q] * (LENGTH // s_q)
    assert difference(decode(load("v32"), steps), "v32") < TOLERANCE


def test_prefill_by_steps_and_then_single_tokens(load):
    assert difference(decode(load("v32"), [17, 17, 1, 1, 1, 1, 1, 1]), "v32") < TOLERANCE


def test_chunks_of_queries_and_of_pages(load, monkeypatch):
    """40 tokens in six chunks of 7, two of padding in front; the indexer reads one page at a time."""
    monkeypatch.setattr(mla, "MAX_CHUNK", 7)
    monkeypatch.setattr(sparse, "CHUNK_TOKENS", PAGE)
    assert difference(decode(load("v32"), [LENGTH], fresh_step()), "v32") < TOLERANCE


def test_ragged_batch(load):
    """Sequences of 40 and 9 tokens arrive in steps of at most 16, right-aligned, and each is as if it were alone."""
    model, lengths = load("v32"), np.array([40, 9])
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
            expected = EXPECTED["v32"][i, done[i] : done[i] + n]
            assert np.abs(np.asarray(out)[i, 16 - n :] - expected).max(initial=0) < TOLERANCE
        done += new
    for pool in jax.tree.leaves(caches):
        written = np.isfinite(np.asarray(pool)).all(axis=(2, 3))
        assert [int(written[row].sum()) for row in ([5, 0, 7], [1], [6, 2, 3, 4])] == [40, 9, 0]


def test_fp8_cache_is_a_cache_of_rounded_rows(load, monkeypatch):
    """Logits over fp8_v32 are those over plain rows that went through the format and back."""
    model, steps = load("v32"), [LENGTH // 2] * 2
    logits = decode(model, steps, format="fp8_v32")
    rows = MLAAttention._rows

    def rounded(self, x, positions):
        latent, rope = jnp.split(rows(self, x, positions), [512], axis=-1)
        packed = kvcache.quantize_kv(latent, rope, format="fp8_v32")
        return kvcache.dequantize_kv(packed, format="fp8_v32").astype(x.dtype)

    monkeypatch.setattr(MLAAttention, "_rows", rounded)
    assert np.abs(logits - decode(model, steps, fresh_step())).max() < TOLERANCE
    assert np.isfinite(logits).all() and difference(logits, "v32") > 100 * TOLERANCE  # loud weights, and other picks


def test_export_with_a_symbolic_batch():
    layer = SparseMLAAttention(32, 2, q_lora_rank=16, index_topk=8, dtype=jnp.float32, rngs=nnx.Rngs(0))
    cache = layer.init_cache(2, page_size=16)
    (b,) = jax.export.symbolic_shape("b")
    shapes = (((b, 1, 32), jnp.float32), ((b, 2), jnp.int32), ((b,), jnp.int32))
    exported = jax.export.export(jax.jit(lambda x, table, lengths: layer(x, cache, table, lengths)[0]))(
        *(jax.ShapeDtypeStruct(*shape) for shape in shapes)
    )
    operands = jnp.ones((1, 1, 32)), jnp.array([[1, 0]], jnp.int32), jnp.array([20], jnp.int32)
    np.testing.assert_allclose(exported.call(*operands), layer(operands[0], cache, *operands[1:])[0], atol=1e-6)


def test_pages_that_fit(load, monkeypatch):
    """Both pools of all layers; on a mesh, what every device has room for, of all devices with a pool of their own."""
    model, rooms = load("v32"), iter([10**6, 2 * 10**6, 10**6])
    with pytest.raises(RuntimeError, match="device must tell how much memory it has"):
        model.num_pages_that_fit()
    with pytest.raises(ValueError, match="fraction must be a number over 0 and up to 1, got 2"):
        model.num_pages_that_fit(2)
    seen = []
    monkeypatch.setattr(deepseek, "free_bytes", lambda device, fraction: seen.append(fraction) or next(rooms))
    assert model.num_pages_that_fit(0.5, page_size=16, format="fp8_v32") == 10**6 // (2 * 16 * (656 + 4 * 128))
    assert seen == [0.5]
    divided = load("v32", mesh_of(AxisType.Auto, {"batch": 2}))
    assert divided.num_pages_that_fit(page_size=16) == 2 * (10**6 // (2 * 16 * 4 * (576 + 128)))


# --- the selection matters, and every mistake breaks parity ---


def test_no_pick_of_the_fixtures_is_a_matter_of_rounding(load, monkeypatch):
    """The last picked score and the first one left out differ by far more than float32 does."""
    seen, scores = [], DSAIndexer.scores
    monkeypatch.setattr(DSAIndexer, "scores", lambda self, *args: seen.append(scores(self, *args)) or seen[-1])

    @nnx.jit
    def scores_of_layers(model):
        seen.clear()
        model.mha(jnp.asarray(TOKENS))
        return tuple(seen)

    for name in CONFIGS:
        layers = scores_of_layers(load(name))
        assert len(layers) == CONFIGS[name]["num_hidden_layers"]
        for layer in layers:
            best = -np.sort(-np.where(np.tri(LENGTH, dtype=bool), layer, -1e9))[:, TOPK:]
            assert (best[..., TOPK - 1] - best[..., TOPK]).min() > 4e-4


def patched(name, change):
    """A mutation that replaces a method of the indexer: `change(method)` is the new one."""
    return lambda m: m.setattr(DSAIndexer, name, change(getattr(DSAIndexer, name)))


def change_positions(shift):
    def change(pick):
        return lambda self, q, weights, positions, *args: pick(self, q, weights, positions + shift, *args)

    return change


def all_tokens(pick):
    def wrong(self, q, weights, positions, cache, block_table):
        places = jnp.arange(block_table.shape[1] * cache.shape[1], dtype=jnp.int32)[None, None]
        return jnp.where(places <= positions[:, :, None], places, -1)

    return wrong


def most_recent(pick):  # a sliding window of as many tokens
    return lambda self, q, weights, positions, *_: (
        positions[:, :, None] - jnp.arange(self.topk, dtype=jnp.int32)[None, None]
    )


def other_pairs(rotate):
    def wrong(self, x, positions):
        first, rest = jnp.split(x, [64], axis=-1)
        rope = RopeConfig(**vars(self.rope) | {"interleave": not self.rope.interleave})
        return jnp.concatenate([rope.rotate(first, positions), rest], axis=-1)

    return wrong


def last_columns(rotate):
    return lambda self, x, positions: jnp.roll(rotate(self, jnp.roll(x, 64, -1), positions), 64, -1)


def no_relu(scores):
    def wrong(self, q, weights, keys):
        return jnp.einsum("bshd,btd,bsh->bst", q, keys, weights, precision="highest")

    return wrong


def no_weights(queries):
    def wrong(self, *args):
        q, weights = queries(self, *args)
        return q, jnp.ones_like(weights)

    return wrong


def one_place_on(queries):
    return lambda self, x, compressed, positions: queries(self, x, compressed, positions + 1)


def rms_norm(self, x):
    scale, bias = (mla.along_last(v[...], x.ndim) for v in (self.scale, self.bias))
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.eps) * scale + bias


MUTATIONS = {
    "all tokens": patched("_pick", all_tokens),
    "the latest tokens": patched("_pick", most_recent),
    "a query does not see itself": patched("_pick", change_positions(-1)),
    "a query sees the next token": patched("_pick", change_positions(1)),
    "queries rotated one place too far": patched("queries", one_place_on),
    "other pairs": patched("_rotate", other_pairs),
    "the last 64 columns rotated": patched("_rotate", last_columns),
    "no relu": patched("scores", no_relu),
    "all heads the same weight": patched("queries", no_weights),
    "RMSNorm on keys": lambda m: m.setattr(sparse.LayerNorm, "__call__", rms_norm),
    "no bias in the norm": lambda m: m.setattr(
        sparse.LayerNorm, "__call__", lambda self, x: NORM(self, x) - mla.along_last(self.bias[...], x.ndim)
    ),
}
NORM = sparse.LayerNorm.__call__


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mistake_shows(mutation, load, monkeypatch):
    MUTATIONS[mutation](monkeypatch)
    assert difference(decode(load("v32_mscales"), [LENGTH // 2] * 2, fresh_step()), "v32_mscales") > 100 * TOLERANCE


# --- the indexer ---


def numpy_scores(indexer, x, compressed):
    """Index scores of tokens that all stand at position 0, so that nothing is rotated: float64 `[b, s, s]`."""
    x, compressed = np.float64(x), np.float64(compressed)
    kernel = lambda layer: np.float64(layer.kernel[...])  # noqa: E731
    k = x @ kernel(indexer.wk)
    k = (k - k.mean(-1, keepdims=True)) / np.sqrt(k.var(-1, keepdims=True) + 1e-6)
    k = k * np.float64(indexer.k_norm.scale[...]) + np.float64(indexer.k_norm.bias[...])
    q = (compressed @ kernel(indexer.wq_b)).reshape(*x.shape[:2], indexer.num_heads, indexer.head_dim)
    weights = x @ kernel(indexer.weights_proj) / np.sqrt(indexer.num_heads)
    return np.einsum("bsht,bsh->bst", np.maximum(np.einsum("bshd,btd->bsht", q, k) / np.sqrt(k.shape[-1]), 0), weights)


@nnx.jit
def all_scores(indexer, x, compressed, positions):
    return indexer.scores(*indexer.queries(x, compressed, positions), indexer.keys(x, positions))


def random_indexer(**options):
    indexer = DSAIndexer(24, 16, num_heads=3, dtype=jnp.float32, rngs=nnx.Rngs(0), **options)
    for i, parameter in enumerate((indexer.k_norm.scale, indexer.k_norm.bias)):
        parameter[...] += jax.random.normal(jax.random.key(i), parameter.shape)
    return indexer


def random_tokens(b, s):
    return tuple(jax.random.normal(jax.random.key(i), (b, s, width)) for i, width in ((1, 24), (2, 16)))


def test_scores_are_those_of_float64():
    """Scales too: a factor common to all scores changes no pick."""
    indexer, (x, compressed) = random_indexer(), random_tokens(2, 9)
    scores = all_scores(indexer, x, compressed, jnp.zeros((2, 9), jnp.int32))
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, numpy_scores(indexer, x, compressed), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("topk", [1, 10, 1000])
def test_picks_are_those_of_a_stable_sort(topk, monkeypatch):
    """Ragged lengths, an empty sequence, a missing page, several scan steps; and more picks wanted than there are."""
    monkeypatch.setattr(sparse, "CHUNK_TOKENS", 2 * PAGE)
    indexer, (x, compressed) = random_indexer(topk=topk), random_tokens(3, 70)
    table = jnp.array([[9, 2, -1, 5, 7], [2**31 - 1] * 5, [1, 4, 6, -7, 2**30]], jnp.int32)
    lengths = np.array([70, 0, 33])
    cache = poisoned(indexer.init_cache(10, page_size=PAGE))
    picks, cache = jax.device_get(jax.jit(indexer)(x, compressed, cache, table, jnp.asarray(lengths, jnp.int32)))
    x, compressed, table = jax.device_get((x, compressed, table))  # numpy cuts them without a program for each cut
    assert picks.shape == (3, 70, min(topk, 5 * PAGE)) and picks.dtype == jnp.int32
    for b, length in enumerate(lengths):
        first = 70 - length
        assert (picks[b, :first] == -1).all()
        if not length:
            continue
        positions = np.arange(length, dtype=np.int32)[None]
        new, of_new = x[b : b + 1, first:], compressed[b : b + 1, first:]
        scores = all_scores(indexer, new, of_new, positions)
        known = table[b, np.arange(length) // PAGE] >= 0
        scores = np.where(np.tri(length, dtype=bool) & known, np.asarray(scores)[0], -np.inf)
        order = np.argsort(-scores, axis=-1, kind="stable")[:, :topk]
        expected = np.where(np.take_along_axis(scores, order, axis=-1) == -np.inf, -1, order)
        np.testing.assert_array_equal(picks[b, first:, : expected.shape[1]], expected)
        assert (picks[b, first:, expected.shape[1] :] == -1).all()
    assert np.isfinite(np.asarray(cache)).all(axis=(2, 3)).sum() == 70 - PAGE + 33


def test_equal_scores_are_picked_from_the_left(monkeypatch):
    monkeypatch.setattr(sparse, "CHUNK_TOKENS", PAGE)
    indexer = DSAIndexer(24, 16, num_heads=3, topk=20, dtype=jnp.float32, rngs=nnx.Rngs(0))
    cache, table, length = indexer.init_cache(3, page_size=PAGE), jnp.array([[2, 0, 1]], jnp.int32), jnp.int32([40])
    picks, _ = jax.jit(indexer)(jnp.zeros((1, 40, 24)), jnp.zeros((1, 40, 16)), cache, table, length)  # scores of 0
    places = np.arange(20)
    np.testing.assert_array_equal(picks[0], np.where(places <= np.arange(40)[:, None], places, -1))


def test_memory_does_not_grow_with_the_context(all_optimizations):
    """64 heads, compiled only. All scores of a query over 2^18 tokens would be 64 MiB, those of 512 queries 32 GiB."""
    indexer = DSAIndexer(64, 32, rngs=nnx.Rngs(0))

    def temporary_bytes(s, context):
        pages = context // 64
        like = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
        x, compressed = like(jnp.bfloat16, 1, s, 64), like(jnp.bfloat16, 1, s, 32)
        cache, table = like(jnp.bfloat16, pages, 64, 1, 128), like(jnp.int32, 1, pages)
        lowered = jax.jit(indexer, donate_argnums=2).lower(x, compressed, cache, table, like(jnp.int32, 1))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    # On the CPU the XLA of jax 0.10 copies the pool of 64 MiB, for a single token.
    copied = 0 if jax.__version_info__ >= (0, 11) else 2**18 * 128 * 2
    assert temporary_bytes(1, 2**18) < 4 * 2**20 + copied
    assert temporary_bytes(512, 2**18) < 200 * 2**20


# --- the layer in JAX ---


@pytest.fixture
def layer():
    rope = RopeConfig(factor=40.0, original_max_position=16, mscale_all_dim=1.0)
    options = {"index_topk": 9, "index_n_heads": 3, "rope": rope, "dtype": jnp.float32}
    return SparseMLAAttention(32, 3, q_lora_rank=24, **options, rngs=nnx.Rngs(0))


def test_layer_under_jit_and_scan(layer):
    """One jitted scan over tokens with both caches as carry gives what mha gives."""
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

    y, cache = scanned(state, x, layer.init_cache(4, page_size=PAGE))
    assert isinstance(cache, SparseCache)
    np.testing.assert_allclose(y, jitted_mha(layer, x), atol=2e-5, rtol=2e-5)


def test_more_picks_than_tokens_is_dense_attention(layer, monkeypatch):
    x, table = jax.random.normal(jax.random.key(1), (2, 20, 32)), jnp.array([[3, 0], [1, 2]], jnp.int32)
    layer.indexer.topk = 2048
    y, _ = jitted_step(layer, x, layer.init_cache(4, page_size=PAGE), table, jnp.full(2, 20, jnp.int32))
    monkeypatch.setattr(SparseMLAAttention, "_seen", MLAAttention._seen)
    np.testing.assert_allclose(y, nnx.jit(lambda layer, x: layer.mha(x))(layer, x), atol=2e-5, rtol=2e-5)


def test_gradients_pass_by_the_indexer(layer):
    layer.implementation = "xla"
    x, table = jax.random.normal(jax.random.key(1), (1, 20, 32)), jnp.array([[1, 0]], jnp.int32)
    cache = poisoned(layer.init_cache(3, page_size=PAGE))
    graphdef, state = nnx.split(layer)

    def paged(state, x):
        return nnx.merge(graphdef, state)(x, cache, table, jnp.array([20], jnp.int32))[0].sum()

    def plain(state, x):
        return nnx.merge(graphdef, state).mha(x).sum()

    of_paged, of_plain = (jax.jit(jax.grad(f, argnums=(0, 1)))(state, x) for f in (paged, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-4), of_paged, of_plain)
    assert not any(gradient.any() for gradient in jax.tree.leaves(of_paged[0]["indexer"]))
    assert all(gradient.any() for gradient in jax.tree.leaves((of_paged[0]["q_b_proj"], of_paged[1])))


def test_sequences_on_two_devices(layer):
    """Each device has its sequences and its pools; nothing is gathered."""
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices("cpu")[:2])
    x, table = jax.random.normal(jax.random.key(1), (2, 20, 32)), jnp.array([[1, 0], [0, 1]], jnp.int32)
    lengths, spec = jnp.full(2, 20, jnp.int32), PartitionSpec("data")
    graphdef, state = nnx.split(layer)

    def run(state, *args):
        return nnx.merge(graphdef, state)(*args)

    sharded = jax.shard_map(run, mesh=mesh, in_specs=(PartitionSpec(), *[spec] * 4), out_specs=(spec, spec))
    args = jax.device_put((x, layer.init_cache(4, page_size=PAGE), table, lengths), NamedSharding(mesh, spec))
    y, _ = jax.jit(sharded)(jax.device_put(state, NamedSharding(mesh, PartitionSpec())), *args)
    np.testing.assert_allclose(y, jitted_mha(layer, x), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("format, row", [(None, "f32[64,64,1,576]"), ("fp8_v32", "u8[64,64,1,656]")])
def test_donated_caches_are_not_copied(format, row, load, all_optimizations):
    model = load("v32_mscales")  # one layer
    graphdef, state = nnx.split(model)
    step = jax.jit(lambda state, *args: nnx.merge(graphdef, state)(*args), donate_argnums=2)
    caches, table = model.init_caches(64, format=format), jnp.asarray(TABLE)
    text = step.lower(state, jnp.asarray(TOKENS[:, :1]), caches, table, jnp.ones(B, jnp.int32)).compile().as_text()
    for pool in (row, "f32[64,64,1,128]"):
        assert pool in text and f"{pool}{{3,2,1,0}} copy(" not in text


def test_half_precision(load, tmp_path):
    """Picks differ from those of float32 here and there: most logits are near, all are finite."""
    config = CONFIGS["v32"]
    directory = nn_checkpoints.save(tmp_path, config, nn_checkpoints.weights(config))
    model = DeepseekForCausalLM.from_pretrained(directory, progress=False)
    indexer = model.layers[0].self_attn.indexer
    assert indexer.wq_b.kernel.dtype == jnp.bfloat16 and indexer.weights_proj.kernel.dtype == jnp.float32
    for format in (None, "fp8_v32"):
        logits = decode(model, [LENGTH // 2] * 2, format=format)
        assert np.isfinite(logits).all() and np.median(np.abs(logits - EXPECTED["v32"])) < 0.3


def test_implementation_is_passed_on(layer):
    seen = []

    def attention(*args, **kwargs):
        seen.append(kwargs)
        return flash_mla_with_kvcache(*args, **kwargs)

    layer.attention, layer.implementation = attention, "xla"
    args = jnp.ones((1, 2, 32)), layer.init_cache(2), jnp.array([[1]], jnp.int32), jnp.array([2], jnp.int32)
    jax.eval_shape(layer, *args)
    assert (
        seen[0]["implementation"] == "xla" and not seen[0]["is_fp8_kvcache"] and seen[0]["indices"].shape == (1, 2, 9)
    )


# --- configurations and checkpoints ---


def test_configurations():
    v32, glm5 = (DeepseekConfig.from_hf(CONFIGS[name]) for name in ("v32", "glm5"))
    assert (v32.index_topk, v32.index_n_heads, v32.index_head_dim, v32.index_rope_interleave) == (6, 12, 128, False)
    assert glm5.index_rope_interleave and glm5.rope == RopeConfig(theta=1e6) and glm5.first_k_dense_replace == 1
    # What transformers writes, and what the published files say.
    assert DeepseekConfig.from_hf(CONFIGS["glm5"] | {"indexer_rope_interleave": True}) == glm5
    assert DeepseekConfig.from_hf(CONFIGS["glm5"] | {"indexer_types": ["full"] * 2, "index_topk_pattern": None}) == glm5
    layers = {"mlp_layer_types": ["dense", "sparse"], "first_k_dense_replace": None}
    assert DeepseekConfig.from_hf(CONFIGS["v32"] | layers) == v32
    yarn = nn_checkpoints.YARN | {"original_max_position_embeddings": 4096}
    assert DeepseekConfig.from_hf({"model_type": "deepseek_v32", "rope_scaling": yarn}) == DeepseekConfig.v32()
    default = {"rope_type": "default", "rope_theta": 1000000}
    assert DeepseekConfig.from_hf({"model_type": "glm_moe_dsa", "rope_parameters": default}) == DeepseekConfig.glm5()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "deepseek_v4"}, "index_topk, sparse attention, needs the model_type deepseek_v32 or"),
        ({"indexer_types": ["full", "shared"]}, "indexer_types must be 'full' for all layers"),
        ({"index_topk_freq": 4}, "index_topk_freq must be 1, got 4"),
        ({"index_topk_pattern": "FS"}, "index_topk_pattern must be None, got 'FS'"),
        ({"mlp_layer_types": ["sparse", "dense"]}, "mlp_layer_types must be 'dense' first"),
    ],
)
def test_unsupported_configurations_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        DeepseekConfig.from_hf(CONFIGS["glm5"] | change)


def test_parameters_of_the_published_models():
    """Billions, without multi-token prediction."""
    for config, billions in (DeepseekConfig.v32(), 671.9), (DeepseekConfig.glm5(), 743.4):
        assert count_parameters(config) / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t, name: t.pop(name + "k_norm.bias"), "lacks tensors for layers.1.self_attn.indexer.k_norm.bias"),
        (lambda t, name: t.update({name + "wv.weight": t["lm_head.weight"]}), "does not know: .*indexer.wv"),
        (lambda t, name: t.update({name + "wk.weight": t["lm_head.weight"]}), r"shape \(60, 128\), got \(60, 48\)"),
    ],
)
def test_wrong_checkpoints_are_refused(change, words, tmp_path):
    tensors = nn_checkpoints.weights(CONFIGS["v32"])
    change(tensors, "model.layers.1.self_attn.indexer.")
    with pytest.raises(ValueError, match=words):
        DeepseekForCausalLM.from_pretrained(nn_checkpoints.save(tmp_path, CONFIGS["v32"], tensors), progress=False)


def test_wrong_arguments_are_refused(layer):
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match="q_lora_rank must be an int, got None"):
        SparseMLAAttention(32, 3, q_lora_rank=None, rngs=rngs)
    with pytest.raises(ValueError, match="topk must be at least 1, got 0"):
        DSAIndexer(32, 24, topk=0, rngs=rngs)
    with pytest.raises(ValueError, match="head_dim must be at least 64, got 32"):
        DSAIndexer(32, 24, head_dim=32, rngs=rngs)
    with pytest.raises(ValueError, match="format must be None, which is rows of float32, or 'fp8_v32', got 'fp8_v4'"):
        layer.init_cache(2, format="fp8_v4")
    half = nnx.eval_shape(lambda: SparseMLAAttention(32, 3, q_lora_rank=24, dtype=jnp.float16, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="format must be None for a float16 layer, got 'fp8_v32'"):
        half.init_cache(2, format="fp8_v32")
    x, table, lengths = jnp.ones((1, 1, 32)), jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    with pytest.raises(TypeError, match="cache must be a SparseCache, got ArrayImpl"):
        layer(x, MLAAttention.init_cache(layer, 2), table, lengths)
    kv, index_keys = layer.init_cache(2)
    other = kvcache.init_kv_cache(2, "fp8_v4")
    for cache, words in (
        ((kv, index_keys[:1]), r"two pools of the same pages, got the shapes \(2, 64, 1, 576\) and \(1, "),
        ((other, index_keys), r"cache.kv must have shape .* \(2, 64, 1, 656\), got \(2, 64, 1, 584\)"),
        ((kv, index_keys.astype(jnp.bfloat16)), "cache.index_keys must be float32, got bfloat16"),
        ((kv[:0], index_keys[:0]), "cache.kv must have at least one page and one token"),
        (([], index_keys), r"cache.kv must be an array \[P, page_size, 1, token\], got list"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            layer(x, SparseCache(*cache), table, lengths)
    for args, words in (
        ((x[:, :0], table, lengths), r"x must be \[b, s, hidden_size\] and not empty"),
        ((x, jnp.zeros((2, 1), jnp.int32), lengths), r"block_table must have shape .* \(1, 1\), got \(2, 1\)"),
        ((x, table, jnp.ones(1)), "cache_seqlens must be int32, got float32"),
        ((x, table, lengths, [1]), "num_new must be an array"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            layer(args[0], SparseCache(kv, index_keys), *args[1:3], num_new=args[3] if args[3:] else None)
    with pytest.raises(ValueError, match=r"compressed must have shape .* \(1, 1, 24\), got \(1, 2, 24\)"):
        layer.indexer(x, jnp.ones((1, 2, 24)), index_keys, table, lengths)
    with pytest.raises(NotImplementedError, match="sparse decode takes no plan"):
        metadata = mla.plan(lengths, 1, 3)
        jax.eval_shape(lambda *args: layer(*args, metadata=metadata), x, SparseCache(kv, index_keys), table, lengths)
    config = dataclasses.replace(DeepseekConfig.v2_lite(), num_hidden_layers=1)
    dense = nnx.eval_shape(lambda: DeepseekForCausalLM(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="format must be None for a model without index_topk, got 'fp8_v32'"):
        dense.init_caches(2, format="fp8_v32")


# --- on a mesh ---

ROLES = {"heads": {"heads": 3}, "batch": {"batch": 2}, "batch_heads": {"batch": 2, "heads": 3}}


@pytest.mark.parametrize(
    "kind, roles, format",
    [
        (AxisType.Auto, "batch_heads", None),
        (AxisType.Explicit, "heads", None),
        (AxisType.Explicit, "batch", None),
        (AxisType.Auto, "heads", "fp8_v32"),
        (AxisType.Explicit, "batch_heads", "fp8_v32"),
    ],
)
def test_model_on_a_mesh(kind, roles, format, load):
    """A prompt and then tokens, as transformers, or as one device over packed rows: of one layer, whose rows are made
    before any sum over devices, so that rounding to fp8 goes nowhere else."""
    name, steps = "v32" if format is None else "v32_mscales", [38, 1, 1]
    mesh = mesh_of(kind, ROLES[roles])
    model, heads, pools = load(name, mesh), mesh.size("heads"), mesh.size("pages")
    attn = model.layers[-1].self_attn
    assert parts(attn.w_uk) == {(3 // heads, 128, 512)} and parts(attn.o_proj.kernel) == {(384 // heads, 60)}
    assert parts(attn.indexer.wq_b.kernel) == {(24, 12 * 128)} and parts(attn.indexer.k_norm.bias) == {(128,)}
    caches = model.init_caches(NUM_PAGES * pools, page_size=PAGE, format=format)
    assert {p for pool in jax.tree.leaves(caches) for p in placed(pool, mesh)} == {(NUM_PAGES, PAGE, 1)}
    caches = jax.device_put(poisoned(caches), mesh.sharding("k_cache"))
    # Where each device has a pool, both sequences have the same page numbers.
    table = TABLE if pools == 1 else np.array([[5, 0, 7, -1], [5, 0, 7, 2147480000]], np.int32)
    logits, length = [], 0
    for s in steps:
        tokens, length = TOKENS[:, length : length + s], length + s
        out, caches = jitted_step(model, tokens, caches, table, np.full(B, length, np.int32))
        assert {p for pool in jax.tree.leaves(caches) for p in placed(pool, mesh)} == {(NUM_PAGES, PAGE, 1)}
        logits.append(jax.device_get(out))
    expected = EXPECTED[name] if format is None else decode(load(name), steps, format=format)
    assert np.abs(np.concatenate(logits, axis=1) - expected).max() < TOLERANCE
    assert str(caches[0].kv.dtype) == ("float32" if format is None else "uint8")


def placed(pool, mesh):
    """The shapes of a pool's parts, but for their width."""
    assert pool.sharding.is_equivalent_to(mesh.sharding("k_cache"), 4)
    return [shard.data.shape[:3] for shard in pool.addressable_shards]


@pytest.mark.parametrize("kind, format", [(AxisType.Auto, "fp8_v32"), (AxisType.Explicit, None)], ids=str)
def test_layer_on_two_axes(kind, format, monkeypatch, all_optimizations):
    """Heads and batch, each over two devices: a prompt in chunks, then tokens in a scan with the cache as carry.

    The only collectives are the sums behind o_proj, and pools stay where they are.
    """
    monkeypatch.setattr(mla, "MAX_CHUNK", 7)
    mesh = mesh_of(kind, {"batch": 2, "heads": 2})
    options = {"index_topk": 9, "index_n_heads": 3, "dtype": jnp.float32}
    alone, layer = (
        SparseMLAAttention(32, 4, q_lora_rank=24, **options, mesh=m, rngs=nnx.Rngs(0)) for m in (None, mesh)
    )
    x = jax.random.normal(jax.random.key(1), (2, 20, 32))

    def run(layer, table):
        graphdef, state = nnx.split(layer)

        def steps(state, x, cache, table):
            layer = nnx.merge(graphdef, state)
            prompt, cache = layer(x[:, :13], cache, table, jnp.full(2, 13, jnp.int32))

            def step(carry, token):
                cache, length = carry
                y, cache = layer(token[:, None], cache, table, length + 1)
                return (cache, length + 1), y[:, 0]

            (cache, _), y = jax.lax.scan(step, (cache, jnp.full(2, 13, jnp.int32)), x[:, 13:].swapaxes(0, 1))
            return prompt, y, cache

        cache = layer.init_cache(4 * (1 if layer.mesh is None else 2), page_size=PAGE, format=format)
        compiled = jax.jit(steps, donate_argnums=2).lower(state, x, cache, jnp.array(table, jnp.int32)).compile()
        return compiled, jax.device_get(compiled(state, x, cache, jnp.array(table, jnp.int32)))

    _, (prompt, y, cache) = run(alone, [[3, 0], [1, 2]])
    compiled, got = run(layer, [[3, 0], [3, 0]])
    np.testing.assert_allclose(got[0], prompt, atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(got[1], y, atol=2e-5, rtol=2e-5)
    for pool, expected in zip(got[2], cache):  # pages 3 and 0 of either device
        # A last bit of a product may turn a byte of fp8; a row that is not in its place is 1.5 % of the pool.
        assert np.isclose(pool[[3, 0, 7, 4]], expected[[3, 0, 1, 2]], atol=1e-5).mean() > 0.999
    found = {(kind, shape) for _, shape, kind in COLLECTIVE.findall(compiled.as_text())}
    assert found == {("all-reduce", "1,13,32"), ("all-reduce", "1,1,32")}
    assert compiled.memory_analysis().alias_size_in_bytes == sum(pool[:4].nbytes for pool in cache)


@MESH_KINDS
def test_devices_that_share_sequences_pick_the_same_tokens(kind):
    """And those of one device."""
    mesh, (x, compressed) = mesh_of(kind, {"batch": 2, "heads": 2}), random_tokens(2, 20)
    alone, indexer = random_indexer(topk=9), random_indexer(topk=9, mesh=mesh)
    pick, lengths = nnx.jit(DSAIndexer.__call__), jnp.array([20, 17], jnp.int32)
    expected, _ = pick(alone, x, compressed, alone.init_cache(4, page_size=PAGE), jnp.array([[3, 0], [1, 2]]), lengths)
    cache = indexer.init_cache(8, page_size=PAGE)
    assert all(len(p.sharding.device_set) == 4 for p in jax.tree.leaves((nnx.state(indexer, nnx.Param), cache)))
    # However they lie: a column of the hidden state may be anywhere.
    x, compressed = jax.device_put((x, compressed), NamedSharding(mesh.mesh, PartitionSpec(None, None, mesh.heads)))
    picks, cache = pick(indexer, x, compressed, cache, jnp.array([[3, 0], [3, 0]]), lengths)
    assert picks.sharding.is_equivalent_to(mesh.sharding("x"), 3) and len(picks.addressable_shards) == 4
    for array, whole in ((picks, expected), (cache, jax.device_get(cache))):
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(whole)[shard.index])


@MESH_KINDS
def test_lowers_for_cuda_on_a_mesh(kind, cuda_build):
    """The kernels of every device have its heads, its sequence and its pool."""
    mesh = mesh_of(kind, {"batch": 2, "heads": 2})
    layer = SparseMLAAttention(32, 16, q_lora_rank=24, index_topk=64, index_n_heads=3, mesh=mesh, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    step = jax.jit(lambda state, *args: nnx.merge(graphdef, state)(*args))
    args = jnp.ones((2, 3, 32), jnp.bfloat16), layer.init_cache(8, format="fp8_v32"), jnp.zeros((2, 2), jnp.int32)
    text = step.trace(state, *args, jnp.full(2, 3, jnp.int32)).lower(lowering_platforms=("cuda",)).as_text()
    for target, operand in ((APPEND, "tensor<4x64x1x656xui8>"), (SPARSE_DECODE, "tensor<1x3x8x576xbf16>")):
        assert re.search(rf"custom_call @{re.escape(target)}\(.*{operand}", text)


def test_mha_on_a_mesh(load):
    model = load("v32", mesh_of(AxisType.Explicit, ROLES["batch_heads"]))
    assert difference(jax.device_get(jitted_mha(model, TOKENS)), "v32") < TOLERANCE


def test_what_a_mesh_cannot_divide_is_refused():
    options = {"q_lora_rank": 24, "dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    with pytest.raises(NotImplementedError, match=r"mesh must have no context axis .*, got context='axis of context'"):
        SparseMLAAttention(32, 4, mesh=mesh_of(AxisType.Auto, {"context": 2}), **options)
    with pytest.raises(ValueError, match=r"num_heads must be divisible by 3, the devices on .*, got 4; use fewer"):
        SparseMLAAttention(32, 4, mesh=mesh_of(AxisType.Auto, {"heads": 3}), **options)
    layer = SparseMLAAttention(32, 4, mesh=mesh_of(AxisType.Auto, {"batch": 2}), **options)
    cache, one = layer.init_cache(4, page_size=PAGE), jnp.ones(1, jnp.int32)
    with pytest.raises(
        ValueError, match="x must have b divisible by 2, the devices on 'axis of batch', got b = 1; fill"
    ):
        layer(jnp.ones((1, 1, 32)), cache, one[None], one)
    cache = jax.tree.map(lambda pool: np.zeros((3, *pool.shape[1:]), pool.dtype), cache)
    with pytest.raises(ValueError, match=r"cache must have the first axis divisible by 2, .*; every device has a pool"):
        layer(jnp.ones((2, 1, 32)), cache, jnp.ones((2, 1), jnp.int32), jnp.ones(2, jnp.int32))


def test_examples_in_docstrings():
    assert doctest.testmod(sparse).failed == 0
