"""Sparse decode through the jnp reference, against float64 numpy on the same quantised bytes."""

# ruff: noqa: C408, E501 - tables, one line per refusal

import functools
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_flashmla import flash_mla_with_kvcache, kvcache, merge_attention_states, reference, testing
from jax_flashmla._primitive import OPS, freeze
from jax_flashmla.ops.sparse_decode import batch as fold

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn

# out: P and the result are rounded to the dtype, each to a relative eps / 2, and values are N(0, 1), so |out| <= ~4.
# lse: float32 sums of some hundred terms, and scores of magnitude <= ~8: a few units of 2**-23 * 8.
OUT_TOLERANCE = {"bfloat16": 2e-2, "float16": 2.5e-3, "float32": 1e-5}
LSE_TOLERANCE = 1e-5
COSINE_TOLERANCE = 5e-6

# name -> bytes of a token, d_qk, channels of latent
FORMATS = {
    "bf16": (1152, 576),
    "f16": (1152, 576),
    "f32": (2304, 576),
    "bf16_512": (1024, 512),
    "fp8_v32": (656, 576),
    "fp8_v4": (584, 512),
    "fp8_v4_padded": (584, 512),
}
PLAIN = {"bf16": BF16, "f16": np.float16, "f32": np.float32, "bf16_512": BF16}
every_format = pytest.mark.parametrize("format", FORMATS)


def make_cache(rng, format, num_pages, page_size, used):
    """A pool whose slots are NaN but for those in `used`, and its keys `[tokens, d_qk]` in float64, NaN where unused.

    The fp8 bytes are random codes and random scales, not powers of two: no writer of ours has a part in it.
    """
    token, d = FORMATS[format]
    tokens = num_pages * page_size
    if format in PLAIN:
        pool = np.full((tokens, d), np.nan, PLAIN[format])
        pool[used] = rng.standard_normal((len(used), d)).astype(PLAIN[format])
        return pool.reshape(num_pages, page_size, 1, d), pool.astype(np.float64)
    nope, tile = (512, 128) if format == "fp8_v32" else (448, 64)
    codes = rng.standard_normal((tokens, nope)).astype(np.float32).astype(E4M3)
    rope = rng.standard_normal((tokens, 64)).astype(BF16)
    if format == "fp8_v32":
        scales = rng.uniform(0.3, 1.7, (tokens, 4)).astype(np.float32)
    else:
        scales = rng.integers(126, 129, (tokens, 7)).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)
    values = codes.astype(np.float64) * scales.astype(np.float64).repeat(tile, axis=1)
    keys = np.concatenate([values.astype(np.float32).astype(BF16), rope], axis=1).astype(np.float64)
    stride = page_size * token
    if format == "fp8_v4_padded":
        stride = -(-stride // 576) * 576
    raw = np.full((num_pages, stride), 0xFF, np.uint8)
    unused = np.ones(tokens, bool)
    unused[used] = False
    keys[unused] = np.nan
    for slot in used:
        page, o = divmod(int(slot), page_size)
        data, scale, tail = codes[slot].view(np.uint8), scales[slot].view(np.uint8), rope[slot].view(np.uint8)
        if format == "fp8_v32":
            raw[page, o * 656 : (o + 1) * 656] = np.concatenate([data, scale, tail])
        else:
            raw[page, o * 576 : (o + 1) * 576] = np.concatenate([data, tail])
            raw[page, page_size * 576 + o * 8 :][:7] = scale
    return raw if format == "fp8_v4_padded" else raw.reshape(num_pages, page_size, 1, token), keys


def make_indices(rng, b, s_q, topk, lengths, tokens):
    """Valid slots, some twice, with invalid ones anywhere; beyond the length slots that hold NaN. Also: those used."""
    used = rng.permutation(tokens)[: max(1, tokens // 2)]
    nan = np.setdiff1d(np.arange(tokens), used)
    invalid = np.array([-1, -7, -(2**31), tokens, tokens + 1, 2**31 - 1])
    indices = rng.choice(used, (b, s_q, topk))
    indices = np.where(rng.random(indices.shape) < 0.2, rng.choice(invalid, indices.shape), indices)
    if lengths is not None and len(nan):
        beyond = np.arange(topk) >= lengths[:, None, None]
        indices = np.where(beyond, rng.choice(nan, indices.shape), indices)
    return indices.astype(np.int32), used


def sparse_f64(q, sources, scale, sink=None):
    """`sources`: (keys [tokens, d_qk] float64, indices, lengths or None). One query token at a time."""
    b, s_q, h_q, _ = q.shape
    out, lse = np.zeros((b, s_q, h_q, 512)), np.full((b, h_q, s_q), -np.inf)
    for i in range(b):
        for j in range(s_q):
            picked = []
            for keys, indices, lengths in sources:
                row = indices[i, j] if lengths is None else indices[i, j, : max(int(lengths[i]), 0)]
                picked.append(keys[row[(row >= 0) & (row < len(keys))]])
            picked = np.concatenate(picked)
            if not len(picked):
                continue
            scores = q[i, j].astype(np.float64) @ picked.T * float(np.float32(scale))
            peak = scores.max(axis=1, keepdims=True)
            p = np.exp(scores - peak)
            lse[i, :, j] = np.log(p.sum(axis=1)) + peak[:, 0]
            out[i, j] = p @ picked[:, :512] / p.sum(axis=1, keepdims=True)
    if sink is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            factor = 1 / (1 + np.exp(sink.astype(np.float64)[:, None] - lse))
        out *= np.nan_to_num(factor).swapaxes(1, 2)[..., None]
    return out, lse


def check(got, exact):
    out, lse = map(np.asarray, got)
    exact_out, exact_lse = exact
    assert out.shape == exact_out.shape and lse.shape == exact_lse.shape and lse.dtype == np.float32
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(exact_lse))
    assert testing.max_error(lse, exact_lse) <= LSE_TOLERANCE
    assert testing.max_error(out, exact_out) <= OUT_TOLERANCE[str(out.dtype)]
    assert testing.cosine_difference(out, exact_out) <= COSINE_TOLERANCE
    assert (out.swapaxes(1, 2)[np.isneginf(lse)] == 0).all()


def problem(format, *, b=2, s_q=1, h_q=3, topk=40, num_pages=6, page_size=16, lengths=None, seed=0, dtype=None):
    rng = np.random.default_rng(seed)
    lengths = None if lengths is None else np.array(lengths, np.int32)
    indices, used = make_indices(rng, b, s_q, topk, lengths, num_pages * page_size)
    cache, keys = make_cache(rng, format, num_pages, page_size, used)
    q = rng.standard_normal((b, s_q, h_q, FORMATS[format][1])).astype(dtype or PLAIN.get(format, BF16))
    return q, cache, keys, indices, lengths


STATIC = "head_dim_v", "is_fp8_kvcache", "softmax_scale", "implementation"
jitted = jax.jit(flash_mla_with_kvcache, static_argnames=STATIC)


def decode(q, cache, indices, **kwargs):
    is_fp8 = cache.dtype.itemsize == 1
    return jitted(q, cache, None, None, head_dim_v=512, is_fp8_kvcache=is_fp8, indices=indices, **kwargs)


# Each is compiled: every format twice, and every number beside as many others as there is room for.
SHAPES = [
    # format, b, s_q, h_q, topk, num_pages, page_size, with_lengths, sink, extra_topk, scale
    ("fp8_v32", 4, 1, 5, 300, 6, 61, True, True, 64, None),
    ("bf16", 1, 1, 1, 300, 9, 64, True, True, 0, None),
    ("bf16", 4, 2, 20, 127, 3, 1, False, False, 130, 0.05),
    ("f16", 2, 3, 16, 128, 5, 69, True, False, 64, None),
    ("f16", 3, 1, 2, 1, 1, 2, False, True, 0, 0.0),
    ("f32", 3, 2, 5, 129, 2, 61, False, True, 1, None),
    ("f32", 1, 3, 20, 63, 7, 16, True, False, 0, 0.05),
    ("bf16_512", 2, 1, 16, 129, 4, 16, True, True, 130, 0.05),
    ("bf16_512", 4, 3, 1, 2, 8, 69, False, False, 0, None),
    ("fp8_v32", 1, 2, 16, 63, 9, 2, False, False, 0, 0.05),
    ("fp8_v32", 2, 3, 20, 2, 1, 1, True, False, 1, 0.0),
    ("fp8_v4", 3, 1, 20, 128, 2, 64, True, False, 130, None),
    ("fp8_v4", 2, 2, 1, 129, 3, 69, False, True, 0, 0.05),
    ("fp8_v4_padded", 1, 3, 2, 300, 7, 61, True, True, 1, None),
    ("fp8_v4_padded", 4, 1, 16, 127, 5, 1, False, False, 64, 0.0),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
@settings(max_examples=2, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_drawn(shape, seed):
    format, b, s_q, h_q, topk, num_pages, page_size, with_lengths, sink, extra_topk, scale = shape
    rng = np.random.default_rng(seed)

    def drawn_lengths(n):
        return rng.choice(np.array([0, 1, n // 2, n, n + 5, -3], np.int32), b) if with_lengths else None

    lengths, extra_lengths = drawn_lengths(topk), drawn_lengths(extra_topk)
    shape = dict(b=b, s_q=s_q, h_q=h_q, num_pages=num_pages, page_size=page_size)
    q, cache, keys, indices, lengths = problem(format, topk=topk, lengths=lengths, seed=seed, **shape)
    sources, options = [(keys, indices, lengths)], dict(topk_length=lengths, softmax_scale=scale)
    if extra_topk:
        shape |= dict(num_pages=2, page_size=7)
        _, extra, extra_keys, extra_indices, extra_lengths = problem(
            format, topk=extra_topk, lengths=extra_lengths, seed=seed + 1, **shape
        )
        sources.append((extra_keys, extra_indices, extra_lengths))
        options |= dict(extra_k_cache=extra, extra_indices_in_kvcache=extra_indices, extra_topk_length=extra_lengths)
    if sink:
        options["attn_sink"] = rng.choice(np.array([-np.inf, np.inf, 0, 3.5, -2, -100], np.float32), h_q)
    exact = sparse_f64(q, sources, q.shape[-1] ** -0.5 if scale is None else scale, options.get("attn_sink"))
    check(decode(q, cache, indices, **options), exact)


@every_format
def test_duplicates_count_as_often_as_they_stand(format):
    q, cache, keys, indices, _ = problem(format, topk=1)
    slot = indices[indices >= 0][:1]
    slot = slot if len(slot) and slot[0] < len(keys) else np.flatnonzero(~np.isnan(keys[:, 0]))[:1]
    once, many = (np.broadcast_to(slot.astype(np.int32), (2, 1, n)) for n in (1, 7))
    one, seven = decode(q, cache, once), decode(q, cache, many)
    np.testing.assert_allclose(np.float32(seven[1]) - np.float32(one[1]), np.log(7), rtol=1e-5)
    check(seven, sparse_f64(q, [(keys, many, None)], q.shape[-1] ** -0.5))


@every_format
def test_rows_without_a_key(format):
    q, cache, keys, indices, _ = problem(format, b=3, s_q=2)
    indices[0] = -1
    indices[1, 1] = len(keys)
    lengths = np.array([40, 40, 0], np.int32)
    sink = np.array([-np.inf, np.inf, 1], np.float32)
    for options in ({}, dict(attn_sink=sink)):
        out, lse = map(np.asarray, decode(q, cache, indices, topk_length=lengths, **options))
        empty = np.array([[True, True], [False, True], [True, True]])
        np.testing.assert_array_equal(np.isneginf(lse), np.broadcast_to(empty[:, None], lse.shape))
        assert (out[empty] == 0).all() and np.isfinite(lse[1, :, 0]).all()
    everything = decode(q, cache, np.full_like(indices, -1), topk_length=np.full_like(lengths, 40))
    assert (np.asarray(everything[0]) == 0).all() and np.isneginf(everything[1]).all()


def test_sinks_at_infinity():
    q, cache, _, indices, _ = problem("fp8_v32", h_q=4)
    plain_out, plain_lse = map(np.asarray, decode(q, cache, indices))
    out, lse = map(
        np.asarray, decode(q, cache, indices, attn_sink=np.array([-np.inf, np.inf, -np.inf, np.inf], np.float32))
    )
    np.testing.assert_array_equal(lse, plain_lse)
    np.testing.assert_array_equal(out[:, :, ::2], plain_out[:, :, ::2])
    assert (out[:, :, 1::2] == 0).all() and (plain_out[:, :, 1::2] != 0).any()


@every_format
def test_equals_dense_decode_of_the_same_keys(format):
    """Through append, slot mapping and top-k of everything: what dense decode computes from the dequantised rows."""
    rng = np.random.default_rng(0)
    name, d = format.split("_5")[0].removesuffix("_padded"), FORMATS[format][1]
    if name == "f32":
        pytest.skip("float32 is no format of the cache operations")
    lengths, table = np.array([37, 5], np.int32), np.array([[3, 0, 2], [1, -1, -1]], np.int32)
    padded = format.endswith("padded")
    cache = kvcache.init_kv_cache(4, name, page_size=16, padded=padded, head_dim=None if name[:3] == "fp8" else d)
    keys = rng.standard_normal((42, d)).astype(np.float32)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    q = rng.standard_normal((2, 1, 4, d)).astype(np.float16 if name == "f16" else BF16)
    ids = np.broadcast_to(np.arange(48, dtype=np.int32), (2, 1, 48))

    @jax.jit
    def through_the_cache(cache, keys):
        sequences = jnp.repeat(jnp.arange(2, dtype=jnp.int32), lengths, total_repeat_length=42)
        slots = kvcache.slot_mapping(positions, sequences, table, page_size=16)
        cache = kvcache.append_kv_cache(cache, keys[:, :-64], keys[:, -64:], slots, format=name)
        indices = kvcache.topk_to_slots(ids, table, lengths, page_size=16)
        rows = kvcache.gather_kv_cache(cache, table, lengths, total=42, format=name)
        return decode(q, cache, indices), slots, rows

    got, slots, rows = jax.device_get(through_the_cache(cache, keys))
    dense = np.zeros((64, d), q.dtype)
    dense[slots] = rows
    dense = dense.reshape(4, 16, 1, d)
    exact = testing.dense_decode_f64(q, dense, table, lengths)
    check(got, exact)
    check(flash_mla_with_kvcache(q, dense, table, lengths, 512), exact)


def test_float32_queries_over_fp8_bytes_are_exact():
    q, cache, keys, indices, _ = problem("fp8_v4", dtype=np.float32, topk=200)
    out, lse = decode(q, cache, indices)
    assert out.dtype == jnp.float32
    check((out, lse), sparse_f64(q, [(keys, indices, None)], 512**-0.5))


def test_unused_arguments_are_not_read():
    q, cache, _, indices, _ = problem("fp8_v32")
    expected = decode(q, cache, indices)
    table, lengths = np.full((2, 1), 2**31 - 1, np.int32), np.full(2, -5, np.int32)
    got = flash_mla_with_kvcache(q, cache, table, lengths, 512, is_fp8_kvcache=True, indices=indices)
    for x, y in zip(got, expected):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("format", ["bf16", "fp8_v32"])
def test_gradients(format):
    """Finite in spite of NaN in unused slots; of plain rows they reach the rows that were named, and no others."""
    q, cache, keys, indices, _ = problem(format, topk=200)

    def loss(q, cache):
        out, lse = decode(q, cache, indices, implementation="xla", attn_sink=jnp.zeros(3))
        return out.astype(jnp.float32).sum() + jnp.where(jnp.isneginf(lse), 0, lse).sum()

    if format == "fp8_v32":
        assert np.isfinite(np.float32(jax.jit(jax.grad(loss))(q, cache))).all()
        return
    d_q, d_cache = jax.jit(jax.grad(loss, argnums=(0, 1)))(q, cache)
    named = np.unique(indices[(indices >= 0) & (indices < len(keys))])
    touched = np.flatnonzero(np.float32(d_cache).reshape(len(keys), -1).any(axis=1))
    assert np.isfinite(np.float32(d_q)).all() and np.isfinite(np.float32(d_cache)).all()
    np.testing.assert_array_equal(touched, named)


@pytest.mark.parametrize("format", ["bf16", "fp8_v32", "fp8_v4", "fp8_v4_padded"])
@pytest.mark.usefixtures("all_optimizations")
def test_memory_is_bounded(format):
    """The keys named would be 288 MiB in float32, the pool in float32 over 1 GiB; a chunk of 128 keys is 2.2 MiB."""
    d = FORMATS[format][1]
    padded = format.endswith("padded")
    fmt = kvcache.FORMATS[format.removesuffix("_padded")]
    specs = [
        jax.ShapeDtypeStruct((8, 1, 4, d), jnp.bfloat16),
        jax.ShapeDtypeStruct(fmt.pool_shape(2**13, 64, padded=padded), fmt.dtype),
        jax.ShapeDtypeStruct((8, 1, 2**14), jnp.int32),
    ]
    compiled = jax.jit(decode).lower(*specs).compile()
    chunk = 8 * reference.CHUNK_INDICES * d * 4
    # Some copies of a chunk in different stages of decoding, and the chunked indices.
    assert compiled.memory_analysis().temp_size_in_bytes < 10 * chunk + 2**20


def test_the_op_machinery_folds_vmapped_axes_into_b():
    """The primitive as it will run once a kernel exists: bound, lowered to the reference, batched, not differentiable."""
    q, cache, _, indices, lengths = problem("fp8_v32", b=3, lengths=[40, 3, 0])
    empty = np.zeros(0, np.int32)
    op, params = OPS["sparse_decode"], freeze(insist=False, softmax_scale=0.05)

    def bound(q, indices, lengths, sink):
        return op.forward(params, q, cache, indices, lengths, sink, np.zeros(0, np.uint8), empty, empty)

    sink = np.array([0, 1, -np.inf], np.float32)
    expected = decode(q, cache, indices, topk_length=lengths, attn_sink=sink, softmax_scale=0.05)
    jitted_bound = jax.jit(bound)
    for x, y in zip(jitted_bound(q, indices, lengths, sink), expected):
        np.testing.assert_allclose(
            np.float32(x), np.float32(y), rtol=2**-7
        )  # one bfloat16 step: XLA may fuse otherwise
    rolled = np.stack([q, q[::-1]]), np.stack([indices, indices[::-1]]), np.stack([lengths, lengths[::-1]])
    for axes in ((0, 0, 0, None), (0, None, None, None), (None, 0, 0, None)):
        args = [x if a == 0 else x[0] for x, a in zip(rolled, axes)]
        got = jax.jit(jax.vmap(bound, in_axes=axes))(*args, sink)
        for e in range(2):
            one = jitted_bound(*(x[e] if a == 0 else x for x, a in zip(args, axes)), sink)
            for x, y in zip(got, one):
                np.testing.assert_allclose(np.float32(x[e]), np.float32(y), rtol=2**-7)
    with pytest.raises(ValueError, match=r"attn_sink cannot be mapped by vmap, got a mapped axis of size 2"):
        jax.vmap(bound, in_axes=(None, None, None, 0))(q, indices, lengths, np.stack([sink, sink]))
    with pytest.raises(NotImplementedError, match="sparse_decode is forward-only"):
        jax.grad(lambda q: bound(q, indices, lengths, sink)[0].astype(jnp.float32).sum())(q)


def test_fold_keeps_unused_operands_empty():
    q, cache, _, indices, _ = problem("fp8_v32")
    empty, seen = jnp.zeros(0, jnp.int32), []

    def bind(*operands):
        seen.extend(operands)
        return [operands[0]]

    operands = (jnp.stack([q, q, q]), cache, indices, empty, jnp.zeros(0), jnp.zeros(0, jnp.uint8), empty, empty)
    (got,) = fold(bind, 3, operands, [True] + [False] * 7)
    assert [x.shape for x in seen] == [(6, *q.shape[1:]), cache.shape, (6, *indices.shape[1:]), *[(0,)] * 5]
    assert got.shape == (3, *q.shape)


def test_vmap_over_pools():
    """The reference takes it; a kernel will not."""
    q, cache, _, indices, _ = problem("fp8_v32")
    other = problem("fp8_v32", seed=1)
    caches, many = np.stack([cache, other[1]]), np.stack([indices, other[3]])
    got = jax.jit(jax.vmap(functools.partial(decode, implementation="xla"), in_axes=(None, 0, 0)))(q, caches, many)
    for e in range(2):
        for x, y in zip(got, decode(q, caches[e], many[e])):
            np.testing.assert_allclose(np.float32(x[e]), np.float32(y), rtol=2**-7, atol=2**-9)


# merge_attention_states


def halves(dtype):
    """Three rows: keys on both sides, on one, on none; what belongs to an empty side is NaN."""
    rng = np.random.default_rng(0)
    q, keys = rng.standard_normal((4, 1, 2, 576)).astype(dtype), rng.standard_normal((96, 576))
    sides = [rng.integers(0, 96, (4, 1, 30)) for _ in range(2)]
    sides[0][1], sides[1][2], sides[0][3], sides[1][3] = -1, -1, -1, -1
    states = [sparse_f64(q, [(keys, side, None)], 576**-0.5) for side in sides]
    return q, keys, sides, states


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32], ids=lambda d: d.__name__)
def test_merge(dtype):
    q, keys, sides, states = halves(dtype)
    exact_out, exact_lse = sparse_f64(q, [(keys, side, None) for side in sides], 576**-0.5)
    (out_a, lse_a), (out_b, lse_b) = ((out.astype(dtype), lse.astype(np.float32)) for out, lse in states)
    out_a[[1, 3]], out_b[[2, 3]] = np.nan, np.nan
    out, lse = jax.jit(merge_attention_states)(out_a, lse_a, out_b, lse_b)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    assert testing.max_error(lse, exact_lse) <= LSE_TOLERANCE
    assert testing.max_error(out, exact_out) <= OUT_TOLERANCE[np.dtype(dtype).name]  # inputs and result rounded once
    assert (np.asarray(out)[3] == 0).all() and np.isneginf(np.asarray(lse)[3]).all()
    # A side alone comes back as it is; sides may change places.
    np.testing.assert_array_equal(np.asarray(out)[2], out_a[2])
    swapped = merge_attention_states(out_b, lse_b, out_a, lse_a)
    assert testing.max_error(swapped[0], exact_out) <= OUT_TOLERANCE[np.dtype(dtype).name]
    np.testing.assert_allclose(swapped[1], lse, rtol=1e-6)  # float32 sums in the other order


def test_an_empty_side_has_no_gradient():
    """Whatever its output holds."""
    out_b, lse_b, empty = jnp.ones((1, 1, 2, 512)), jnp.zeros((1, 2, 1)), jnp.full((1, 2, 1), -jnp.inf)

    def total(lse_a, out_b, lse_b):
        return merge_attention_states(jnp.full_like(out_b, jnp.nan), lse_a, out_b, lse_b)[0].sum()

    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(empty, out_b, lse_b)
    assert [np.asarray(x).tolist() for x in gradients] == [
        np.zeros_like(empty).tolist(), np.ones_like(out_b).tolist(), np.zeros_like(lse_b).tolist()
    ]  # fmt: skip


def test_merge_of_distant_states_does_not_overflow():
    ones, lse = np.ones((1, 1, 1, 512), np.float32), np.zeros((1, 1, 1), np.float32)
    out, total = merge_attention_states(ones, lse + 3e38, 5 * ones, lse - 3e38)
    np.testing.assert_array_equal(out, ones)
    assert float(total[0, 0, 0]) == np.float32(3e38)
    mapped = jax.vmap(merge_attention_states)(*(np.stack([x, x]) for x in (ones, lse, 3 * ones, lse)))
    assert (np.asarray(mapped[0]) == 2).all()


# Refusals


def z(*shape, dtype=jnp.bfloat16):
    return np.zeros(shape, dtype)


i32, u8 = functools.partial(z, dtype=np.int32), functools.partial(z, dtype=np.uint8)
BASE = dict(
    q=z(2, 1, 4, 576), k_cache=u8(3, 16, 1, 656), block_table=None, cache_seqlens=None, head_dim_v=512,
    is_fp8_kvcache=True, indices=i32(2, 1, 8),
)  # fmt: skip
EXTRA = dict(extra_k_cache=u8(2, 4, 1, 656), extra_indices_in_kvcache=i32(2, 1, 3))
KERNEL = "sparse_decode: implementation='cuda' needs a Hopper GPU .* and was lowered for another platform"
FLOAT32 = (
    "sparse_decode: implementation='cuda' cannot be used: the kernel takes bfloat16 and float16, got q in float32; use"
)

REFUSED = {
    "q_rank": (dict(q=z(2, 4, 576)), ValueError, r"q must have the axes \[b, s_q, h_q, d_qk\]"),
    "q_f16": (dict(q=z(2, 1, 4, 576, dtype=np.float16)), TypeError, "q must be bfloat16 for an fp8 cache, got float16; cast"),
    "q_d_qk": (dict(q=z(2, 1, 4, 512)), ValueError, r"q must have k_cache's d_qk = 576, got shape \(2, 1, 4, 512\)"),
    "q_v4": (dict(k_cache=u8(3, 16, 1, 584)), ValueError, r"q must have k_cache's d_qk = 512, got shape \(2, 1, 4, 576\)"),
    "q_empty": (dict(q=z(2, 0, 4, 576)), ValueError, "at least one query token and one head"),
    "cache_type": (dict(k_cache=[1]), TypeError, "k_cache must be an array .* got list"),
    "cache_rank": (dict(k_cache=u8(3, 16, 656)), ValueError, "k_cache must have the axes"),
    "cache_width": (dict(k_cache=u8(3, 16, 1, 576)), ValueError, r"k_cache must have shape .* 656\] \(fp8_v32\) or .* 584\] \(fp8_v4\), got"),
    "cache_heads": (dict(k_cache=u8(3, 16, 2, 656)), ValueError, "k_cache must have shape"),
    "cache_stride": (dict(k_cache=u8(3, 1000)), ValueError, "k_cache must have pages of page_size"),
    "cache_plain": (dict(k_cache=z(3, 16, 1, 576)), TypeError, "k_cache must be uint8 or float8_e4m3fn with is_fp8_kvcache=True, got bfloat16"),
    "cache_fp8": (dict(is_fp8_kvcache=False), TypeError, "k_cache must be bfloat16 or .* got uint8; fp8 caches need is_fp8_kvcache=True"),
    "cache_dtype": (dict(is_fp8_kvcache=False, k_cache=z(3, 16, 1, 576, dtype=np.float16)), TypeError, "k_cache must have q's dtype bfloat16, got float16"),
    "cache_plain_heads": (dict(is_fp8_kvcache=False, k_cache=z(3, 16, 2, 576)), ValueError, r"k_cache must have shape \[P, page_size, 1, 576 or 512\]"),
    "flag": (dict(is_fp8_kvcache=1), TypeError, "is_fp8_kvcache must be True or False, got int 1"),
    "causal": (dict(causal=True), ValueError, "causal must be False with indices, got True; let indices name"),
    "d_v": (dict(head_dim_v=448), ValueError, "head_dim_v must be 512, got 448"),
    "indices_dtype": (dict(indices=z(2, 1, 8, dtype=np.int64)), TypeError, "indices must be int32, got int64"),
    "indices_rank": (dict(indices=i32(2, 8)), ValueError, r"indices must have the axes \[b, s_q, topk\]"),
    "indices_shape": (dict(indices=i32(2, 3, 8)), ValueError, r"indices must have shape .* = \(2, 1, 8\), got \(2, 3, 8\)"),
    "indices_empty": (dict(indices=i32(2, 1, 0)), ValueError, "indices must have at least one column"),
    "length_shape": (dict(topk_length=i32(3)), ValueError, r"topk_length must have shape \[b\] = \(2,\), got \(3,\)"),
    "length_dtype": (dict(topk_length=z(2)), TypeError, "topk_length must be int32, got bfloat16"),
    "sink_shape": (dict(attn_sink=z(3, dtype=np.float32)), ValueError, r"attn_sink must have shape \[h_q\] = \(4,\), got \(3,\)"),
    "sink_dtype": (dict(attn_sink=z(4)), TypeError, "attn_sink must be float32, got bfloat16"),
    "extra_alone": (dict(extra_k_cache=EXTRA["extra_k_cache"]), ValueError, "must be given together; pass both or neither"),
    "extra_indices_alone": (dict(extra_indices_in_kvcache=i32(2, 1, 3)), ValueError, "must be given together"),
    "extra_length_alone": (dict(extra_topk_length=i32(2)), ValueError, "extra_topk_length must be None without extra_k_cache"),
    "extra_format": (EXTRA | dict(extra_k_cache=u8(2, 4, 1, 584)), ValueError, "extra_k_cache must be of k_cache's format, uint8 with d_qk = 576, got uint8 with d_qk = 512"),
    "extra_indices": (EXTRA | dict(extra_indices_in_kvcache=i32(1, 1, 3)), ValueError, r"extra_indices_in_kvcache must have shape \[b, s_q, extra_topk\] = \(2, 1, 3\)"),
    "extra_length": (EXTRA | dict(extra_topk_length=i32(1)), ValueError, r"extra_topk_length must have shape \[b\] = \(2,\)"),
    "plan": (dict(tile_scheduler_metadata=i32(4, 8), num_splits=i32(3)), NotImplementedError, "^tile_scheduler_metadata is not supported: .* takes no plan"),
    "descale": (dict(descale_k=z(1, dtype=np.float32)), NotImplementedError, "^descale_k is not supported"),
    "cuda_fp8": (dict(implementation="cuda"), RuntimeError, KERNEL),
    "cuda_bf16": (dict(implementation="cuda", k_cache=z(3, 16, 1, 576), is_fp8_kvcache=False), RuntimeError, KERNEL),
    "cuda_f32": (dict(implementation="cuda", q=z(2, 1, 4, 576, dtype=np.float32)), ValueError, FLOAT32),
    "no_indices": (dict(indices=None), NotImplementedError, "^is_fp8_kvcache is not supported: without indices"),
}  # fmt: skip


@pytest.mark.parametrize("changed, error, match", REFUSED.values(), ids=REFUSED.keys())
def test_refusals(changed, error, match):
    with pytest.raises(error, match=match), jax.default_device(jax.devices("cpu")[0]):
        flash_mla_with_kvcache(**(BASE | changed))


def test_what_the_refusals_change_is_accepted():
    out, _ = flash_mla_with_kvcache(
        **BASE, **EXTRA, topk_length=i32(2), extra_topk_length=i32(2), attn_sink=z(4, dtype=np.float32)
    )
    assert out.shape == (2, 1, 4, 512)


def test_lowering_for_cuda_takes_the_kernel_without_a_warning(cuda_build):
    """And float32 queries the reference."""
    for dtype in (BF16, np.float32):
        q, cache, _, indices, _ = problem("fp8_v32", dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            text = jax.jit(decode).trace(q, cache, indices).lower(lowering_platforms=("cuda",)).as_text()
        assert ("jax_flashmla.sparse_decode" in text) == (dtype == BF16)


MERGE = dict(
    out_a=z(1, 2, 3, 512), lse_a=z(1, 3, 2, dtype=np.float32), out_b=z(1, 2, 3, 512), lse_b=z(1, 3, 2, dtype=np.float32)
)
MERGE_REFUSED = {
    "rank": (dict(out_a=z(2, 3, 512)), ValueError, r"out_a must have the axes \[b, s_q, h_q, d_v\]"),
    "lse": (dict(lse_a=z(1, 2, 3, dtype=np.float32)), ValueError, r"lse_a must have shape \[b, h_q, s_q\] = \(1, 3, 2\), got \(1, 2, 3\)"),
    "lse_dtype": (dict(lse_b=z(1, 3, 2)), TypeError, "lse_b must be float32, got bfloat16"),
    "shape": (dict(out_b=z(1, 2, 3, 448)), ValueError, r"out_b must be like out_a, bfloat16 \(1, 2, 3, 512\), got bfloat16 \(1, 2, 3, 448\)"),
    "dtype": (dict(out_b=z(1, 2, 3, 512, dtype=np.float16)), ValueError, "out_b must be like out_a, bfloat16 .* got float16"),
}  # fmt: skip


@pytest.mark.parametrize("changed, error, match", MERGE_REFUSED.values(), ids=MERGE_REFUSED.keys())
def test_merge_refusals(changed, error, match):
    with pytest.raises(error, match=match):
        merge_attention_states(**(MERGE | changed))
