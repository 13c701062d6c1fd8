"""The CUDA kernel of sparse decode: against float64 on the same bytes, no worse than jnp, the same bits every time."""

# ruff: noqa: C408 - dicts of keyword arguments

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_dense_decode import COSINE_TOLERANCE, assert_close, assert_same_bits
from test_sparse_reference import FORMATS, PLAIN, make_cache, make_indices, sparse_f64

from jax_flashmla import flash_mla_with_kvcache, kvcache, testing

pytestmark = pytest.mark.gpu

KERNEL_FORMATS = [format for format in FORMATS if format != "f32"]


@functools.partial(jax.jit, static_argnames=("implementation", "is_fp8", "scale"))
def decode(q, cache, indices, options, implementation="cuda", is_fp8=True, scale=None):
    return flash_mla_with_kvcache(
        q, cache, None, None, 512, is_fp8_kvcache=is_fp8, indices=indices, softmax_scale=scale,
        implementation=implementation, **options,
    )  # fmt: skip


def make(format, *, b=2, s_q=1, h_q=64, topk=64, pages=8, page_size=64, lengths=None, sink=None, extra=None, seed=0):
    """Operands of `decode` on the GPU, and of `sparse_f64`. `extra`: topk, pages and page size of a second pool."""
    rng = np.random.default_rng(seed)
    d = FORMATS[format][1]

    def source(topk, pages, page_size, lengths):
        lengths = None if lengths is None else np.array(lengths, np.int32)
        indices, used = make_indices(rng, b, s_q, topk, lengths, pages * page_size)
        cache, keys = make_cache(rng, format, pages, page_size, used)
        return jnp.asarray(cache), (keys, indices, lengths)

    cache, first = source(topk, pages, page_size, lengths)
    sources, options = [first], {}
    if lengths is not None:
        options["topk_length"] = jnp.asarray(first[2])
    if extra:
        other = None if lengths is None else np.roll(np.minimum(lengths, extra[0]), 1)
        extra_cache, second = source(*extra, other)
        sources.append(second)
        options |= dict(extra_k_cache=extra_cache, extra_indices_in_kvcache=jnp.asarray(second[1]))
        if other is not None:
            options["extra_topk_length"] = jnp.asarray(second[2])
    if sink is not None:
        options["attn_sink"] = jnp.asarray(sink, jnp.float32)
    q = rng.standard_normal((b, s_q, h_q, d)).astype(PLAIN.get(format, jnp.bfloat16))
    is_fp8 = format.startswith("fp8")
    call = functools.partial(decode, jnp.asarray(q), cache, jnp.asarray(first[1]), options, is_fp8=is_fp8)
    return call, functools.partial(sparse_f64, q, sources, d**-0.5, sink)


@pytest.mark.parametrize("h_q", [1, 8, 16, 20, 64, 128])
@pytest.mark.parametrize(
    "s_k, topk, page_size",
    [(512, 64, 2), (512, 64, 64), (512, 64, 69), (1024, 576, 2), (1024, 576, 61), (2046, 2048, 576), (65536, 2048, 64)],
)
@pytest.mark.parametrize("format", ["fp8_v32", "fp8_v4"])
def test_grid(format, s_k, topk, page_size, h_q):
    shape = dict(h_q=h_q, topk=topk, pages=-(-s_k // page_size), page_size=page_size)
    for b, s_q in ((1, 1), (4, 3)):
        sink = np.linspace(-3, 8, h_q).astype(np.float32)
        call, oracle = make(format, b=b, s_q=s_q, sink=sink, lengths=[topk, topk // 3, 0, 1][:b], **shape)
        assert_close(call(), oracle(), call(implementation="xla"))


@pytest.mark.parametrize("format", KERNEL_FORMATS)
def test_formats(format):
    """Two pools, lengths, sinks at infinity; both kinds of scale, and one row tile and two."""
    for h_q in (16, 70, 128):
        sink = np.zeros(h_q, np.float32)
        sink[:2] = [np.inf, -np.inf][:h_q]
        shape = dict(b=3, s_q=2, h_q=h_q, topk=300, pages=9, page_size=61, lengths=[300, 0, 17])
        call, oracle = make(format, sink=sink, extra=(130, 5, 7), **shape)
        assert_close(call(), oracle(), call(implementation="xla"))


@pytest.mark.parametrize("b", [74, 321])
@pytest.mark.parametrize("format", ["bf16", "fp8_v32", "fp8_v4"])
def test_batches(format, b):
    call, oracle = make(format, b=b, h_q=20, topk=130, pages=20)
    assert_close(call(), oracle())


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    format=st.sampled_from(KERNEL_FORMATS),
    b=st.integers(1, 6),
    s_q=st.integers(1, 3),
    h_q=st.integers(1, 140),
    topk=st.integers(1, 400),
    pages=st.integers(1, 9),
    page_size=st.integers(1, 70),
    extra=st.sampled_from([None, (1, 1, 1), (64, 3, 5), (130, 2, 64)]),
    with_lengths=st.booleans(),
    seed=st.integers(0, 100),
)
def test_drawn_shapes(format, b, s_q, h_q, topk, pages, page_size, extra, with_lengths, seed):
    lengths = np.random.default_rng(seed).integers(-3, topk + 5, b) if with_lengths else None
    shape = dict(b=b, s_q=s_q, h_q=h_q, topk=topk, pages=pages, page_size=page_size)
    call, oracle = make(format, extra=extra, lengths=lengths, seed=seed, **shape)
    assert_close(call(), oracle())


@pytest.mark.parametrize("format", ["fp8_v32", "fp8_v4"])
def test_twenty_repetitions_are_bit_equal(format):
    call, _ = make(format, b=5, h_q=128, topk=1500, pages=40)
    first = call()
    for _ in range(20):
        assert_same_bits(call(), first)


def test_no_key_at_all():
    call, oracle = make("fp8_v32", b=2, topk=100, lengths=[0, 0])
    assert_close(call(), oracle())


def test_powers_of_two_take_one_multiplication_and_round_alike():
    """The fast way of dequantising against the slow one: scales that are powers of two, and scales that are not."""
    call, oracle = make("fp8_v4", b=2, topk=200)
    assert_close(call(), oracle(), call(implementation="xla"))
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]  # without the code of NaN
    rng = np.random.default_rng(0)
    rows = np.zeros((64, 656), np.uint8)
    rows[:, :512] = rng.permutation(np.resize(codes, 64 * 512)).reshape(64, 512)
    for scale in (1.0, 2.0**-13, 2.0**7, 0.3, 2.0**8):
        rows[:, 512:528] = np.full(4, scale, np.float32).view(np.uint8)
        cache = jnp.asarray(rows.reshape(1, 64, 1, 656))
        # One key at a time: the output is its latent, exactly.
        indices = jnp.arange(64, dtype=jnp.int32).reshape(64, 1, 1)
        out, _ = decode(jnp.zeros((64, 1, 1, 576), jnp.bfloat16), cache, indices, {})
        expected = rows[:, :512].view(jnp.float8_e4m3fn).astype(np.float64) * np.float64(np.float32(scale))
        expected = expected.astype(np.float32).astype(jnp.bfloat16)
        np.testing.assert_array_equal(np.asarray(out).reshape(64, 512), expected)


@pytest.mark.parametrize("format, d", [("fp8_v32", 576), ("fp8_v4", 512)])
def test_a_nan_that_was_appended_reaches_the_rows_that_see_it(format, d):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((128, d)).astype(np.float32)
    rows[70, 200] = np.nan
    slots = jnp.arange(128, dtype=jnp.int32)
    cache = kvcache.init_kv_cache(2, format)
    cache = kvcache.append_kv_cache(cache, rows[:, :-64], rows[:, -64:], slots, format=format)
    indices = jnp.asarray(np.stack([np.arange(64), np.arange(64, 128)])[:, None], jnp.int32)
    q = jnp.asarray(rng.standard_normal((2, 1, 16, d)), jnp.bfloat16)
    out, lse = map(np.asarray, decode(q, cache, indices, {}))
    assert np.isfinite(out[0].astype(np.float32)).all() and np.isfinite(lse[0]).all()
    assert np.isnan(out[1].astype(np.float32)).all() and np.isnan(lse[1]).all()


def test_vmap_folds():
    call, _ = make("fp8_v32", b=3, s_q=2, h_q=16, topk=70)
    q, cache, indices, options = call.args
    rolled = jnp.stack([q, q[::-1]]), jnp.stack([indices, indices[::-1]])

    def one(q, indices):
        return decode(q, cache, indices, options)

    got = jax.vmap(one)(*rolled)
    for e in range(2):
        expected = one(rolled[0][e], rolled[1][e])
        # The folded batch is cut elsewhere.
        assert testing.cosine_difference(np.asarray(got[0][e]), np.asarray(expected[0])) <= COSINE_TOLERANCE
