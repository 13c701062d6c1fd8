"""The jnp reference against float64 numpy, and what its semantics promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_flashmla import flash_mla_with_kvcache, get_mla_metadata, reference, testing
from jax_flashmla.cases import BY_NAME, CASES, Case

# out: P and the result are rounded to the dtype, each to a relative eps / 2; values are N(0, 1), so that |out| <= ~4.
# lse: float32 sums of up to 4096 terms and scores of magnitude <= ~8, so a few units of 2**-23 * 8.
OUT_TOLERANCE = {"bfloat16": 2e-2, "float16": 2.5e-3, "float32": 1e-5}
LSE_TOLERANCE = {"bfloat16": 1e-5, "float16": 1e-5, "float32": 1e-5}
COSINE_TOLERANCE = 5e-6


jitted = jax.jit(flash_mla_with_kvcache, static_argnames=("head_dim_v", "causal", "softmax_scale"))


def decode(inputs, case, **kwargs):
    return jitted(*inputs, head_dim_v=512, causal=case.causal, **kwargs)


def check(got, case, inputs, **kwargs):
    out, lse = map(np.asarray, got)
    exact_out, exact_lse = testing.dense_decode_f64(*inputs, causal=case.causal, **kwargs)
    assert out.shape == exact_out.shape and out.dtype == inputs.q.dtype
    assert lse.shape == exact_lse.shape and lse.dtype == np.float32
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(exact_lse))
    assert testing.max_error(out, exact_out) <= OUT_TOLERANCE[case.dtype]
    assert testing.max_error(lse, exact_lse) <= LSE_TOLERANCE[case.dtype]
    assert testing.cosine_difference(out, exact_out) <= COSINE_TOLERANCE
    assert (out.swapaxes(1, 2)[np.isneginf(lse)] == 0).all()


@pytest.mark.parametrize("case", [case for case in CASES if not case.heavy], ids=lambda case: case.name)
def test_cases(case):
    inputs = testing.make_inputs(case)
    check(decode(inputs, case), case, inputs)


# Each is compiled, for all lengths that are drawn.
SHAPES = [
    # b, s_q, group, h_kv, d_qk, page_size, causal, dtype
    (3, 4, 2, 3, 576, 32, True, "bfloat16"),
    (1, 1, 9, 1, 576, 64, False, "bfloat16"),
    (1, 5, 1, 3, 512, 16, True, "float32"),
    (2, 3, 4, 2, 576, 256, True, "float16"),
    (2, 2, 1, 1, 512, 128, False, "float32"),
    (3, 1, 7, 2, 512, 64, True, "float16"),
    (4, 2, 8, 1, 576, 16, False, "float16"),
    (4, 5, 3, 2, 512, 256, False, "bfloat16"),
    (5, 3, 1, 3, 576, 128, False, "float32"),
    (5, 1, 5, 3, 576, 64, True, "float32"),
    (5, 4, 6, 1, 512, 32, True, "bfloat16"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
@settings(max_examples=3, deadline=None, derandomize=True)
@given(seqlens=st.lists(st.integers(0, 700), min_size=5, max_size=5), seed=st.integers(0, 100))
def test_drawn_shapes(shape, seqlens, seed):
    b, s_q, group, h_kv, d_qk, page_size, causal, dtype = shape
    case = Case("drawn", tuple(seqlens[:b]), s_q, group * h_kv, h_kv, d_qk, page_size, causal, dtype)
    width = -(-700 // page_size)
    inputs = testing.make_inputs(case, seed, max_pages=width + 2)
    unused = np.full((b * width + testing.SPARE_PAGES - len(inputs.k_cache), *inputs.k_cache.shape[1:]), np.nan)
    inputs = inputs._replace(k_cache=np.concatenate([inputs.k_cache, unused.astype(inputs.k_cache.dtype)]))
    check(decode(inputs, case), case, inputs)


def test_float32_is_exact_and_differentiable_by_default():
    case = Case("f32", (130, 0, 7), s_q=2, h_q=4, h_kv=2, causal=True, dtype="float32")
    inputs = testing.make_inputs(case)
    check(decode(inputs, case), case, inputs)
    assert np.isfinite(jax.jit(jax.grad(lambda q: decode((q, *inputs[1:]), case)[0].sum()))(inputs.q)).all()


@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.5, np.float64(0.04), 1])
def test_softmax_scale(scale):
    case = BY_NAME["edges_causal_2"]
    inputs = testing.make_inputs(case)
    # A scale of 0.5 spreads the scores over +-50: there a float32 score has an error of some 50 * 2**-22.
    out, lse = decode(inputs, case, softmax_scale=scale)
    exact_out, exact_lse = testing.dense_decode_f64(*inputs, causal=case.causal, softmax_scale=scale)
    assert testing.max_error(lse, exact_lse) <= 5e-5
    assert testing.cosine_difference(out, exact_out) <= COSINE_TOLERANCE


def test_large_scores_do_not_overflow():
    case = Case("large", (300, 64), h_q=4)
    q, *rest = testing.make_inputs(case)
    inputs = testing.Inputs((q.astype(np.float32) * 1000).astype(q.dtype), *rest)
    out, lse = decode(inputs, case)
    exact_out, exact_lse = testing.dense_decode_f64(*inputs)
    assert np.isfinite(np.asarray(lse)).all()
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-5)
    assert (
        testing.cosine_difference(out, exact_out) <= 1e-3
    )  # nearly one-hot: a tie within rounding may fall either way


def test_lengths_are_clamped_to_the_table():
    case = Case("full", (128, 128, 0), h_q=4)
    inputs = testing.make_inputs(case, max_pages=2)
    expected = decode(inputs, case)
    beyond = inputs._replace(cache_seqlens=np.array([129, 2**31 - 1, -(2**31)], np.int32))
    for causal in (False, True):
        case = case._replace(causal=causal)
        check(decode(beyond, case), case, beyond)
    for x, y in zip(decode(beyond, case._replace(causal=False)), expected):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("page", [-1, 2147480000, -(2**31), "P"])
def test_pages_outside_the_pool_are_ignored(page):
    case = Case("bad_page", (200, 64, 65), h_q=4, s_q=2, causal=True)
    inputs = testing.make_inputs(case)
    inputs.block_table[0, 1] = inputs.block_table[1, 0] = len(inputs.k_cache) if page == "P" else page
    check(decode(inputs, case), case, inputs)


@pytest.mark.parametrize("shape", ["no_pages", "no_sequences"])
def test_nothing_to_attend_to(shape):
    case = Case("empty", (5, 6), h_q=4)
    q, pool, table, lengths = testing.make_inputs(case)
    if shape == "no_pages":
        out, lse = decode((q, pool, table[:, :0], lengths), case)
        assert (np.asarray(out) == 0).all() and np.isneginf(lse).all()
    else:
        metadata, num_splits = jax.jit(lambda lengths: get_mla_metadata(lengths, 4, 1))(lengths[:0])
        out, lse = decode((q[:0], pool, table[:0], lengths[:0]), case)
        assert out.shape == (0, 1, 4, 512) and lse.shape == (0, 4, 1) and num_splits.tolist() == [0]
        assert (np.asarray(metadata) == 0).all()


def test_metadata_never_changes_the_result():
    case = BY_NAME["irregular_128_causal_2"]
    inputs = testing.make_inputs(case)
    plan = get_mla_metadata(inputs.cache_seqlens, 256, 1)
    for x, y in zip(decode(inputs, case), decode(inputs, case, tile_scheduler_metadata=plan[0], num_splits=plan[1])):
        np.testing.assert_array_equal(x, y)


def test_repeats_are_bit_equal():
    case = BY_NAME["edges_causal_2"]
    inputs = testing.make_inputs(case)
    first = jax.tree.map(np.asarray, decode(inputs, case))
    for _ in range(3):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, decode(inputs, case)), first)


def gathered(q, k_cache, block_table, cache_seqlens, *, causal):
    """A second, naive float32 implementation for gradients: gather everything, mask, softmax."""
    b, s_q, h_q, d_qk = q.shape
    keys = jnp.nan_to_num(k_cache)[jnp.clip(block_table, 0, k_cache.shape[0] - 1)].reshape(
        b, -1, k_cache.shape[2], d_qk
    )
    keys = jnp.repeat(keys, h_q // k_cache.shape[2], axis=2)
    position = jnp.arange(keys.shape[1])[None, None]
    newest = cache_seqlens[:, None] - (jnp.arange(s_q)[None, ::-1] if causal else jnp.zeros((1, s_q), jnp.int32))
    visible = (position < newest[..., None])[:, None]
    scores = jnp.where(visible, jnp.einsum("bshd,bthd->bhst", q, keys) * d_qk**-0.5, -1e30)
    p = jnp.where(visible, jax.nn.softmax(scores), 0)
    lse = jnp.where(visible.any(-1), jax.nn.logsumexp(scores, axis=-1), 0)
    return jnp.einsum("bhst,bthd->bshd", p, keys[..., :512]), lse


@pytest.mark.parametrize("causal", [False, True])
def test_gradients(causal):
    """Through out and lse, over several scan steps, with NaN in unused slots and rows without a key."""
    case = Case("grad", (1100, 0, 1, 64), s_q=2, h_q=4, h_kv=2, dtype="float32", page_size=16, causal=causal)
    q, pool, table, lengths = testing.make_inputs(case)
    rng = np.random.default_rng(1)
    d_out, d_lse = rng.standard_normal((4, 2, 4, 512), np.float32), rng.standard_normal((4, 4, 2), np.float32)

    def loss(f, q, pool):
        out, lse = f(q, pool, table, lengths)
        return (out * d_out).sum() + (jnp.where(jnp.isneginf(lse), 0, lse) * d_lse).sum()

    ours = functools.partial(flash_mla_with_kvcache, head_dim_v=512, causal=causal, implementation="xla")
    got = jax.jit(jax.grad(functools.partial(loss, ours), argnums=(0, 1)))(q, pool)
    expected = jax.jit(jax.grad(functools.partial(loss, functools.partial(gathered, causal=causal)), argnums=(0, 1)))(
        q, pool
    )
    for x, y in zip(got, expected):
        np.testing.assert_allclose(x, y, atol=1e-4 * np.abs(y).max())  # float32, two orders of summation
    assert (np.asarray(got[1])[np.isnan(pool)] == 0).all()


def test_gradients_in_bfloat16():
    case = Case("grad", (130, 0, 7), s_q=2, h_q=4, causal=True)
    q, pool, table, lengths = testing.make_inputs(case)

    def loss(q, pool):
        out, _ = flash_mla_with_kvcache(q, pool, table, lengths, 512, causal=True, implementation="xla")
        return out.sum()

    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1)))(q, pool):
        assert gradient.dtype == jnp.bfloat16 and np.isfinite(np.float32(gradient)).all()


@pytest.mark.usefixtures("all_optimizations")
def test_memory_does_not_grow_with_the_table():
    """The gathered cache would be 1 GiB here; a chunk of it is 1.2 MiB."""
    width = 2**20 // reference.CHUNK_TOKENS * 8
    specs = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((1, 1, 4, 576), jnp.bfloat16),
            ((8, 64, 1, 576), jnp.bfloat16),
            ((1, width), jnp.int32),
            ((1,), jnp.int32),
        )
    ]
    f = jax.jit(lambda *args: flash_mla_with_kvcache(*args, 512, implementation="xla"))
    assert f.lower(*specs).compile().memory_analysis().temp_size_in_bytes < 32 * 2**20


@pytest.mark.parametrize("fault", ["swap_pages", "off_by_one", "not_causal"])
def test_the_metrics_see_faults(fault):
    """The comparison itself is tested: each fault must fail it."""
    case = BY_NAME["edges_causal_2"]
    inputs = testing.make_inputs(case)
    inputs.k_cache[np.isnan(inputs.k_cache)] = 0
    wrong, wrong_case = inputs, case
    if fault == "swap_pages":
        wrong = inputs._replace(block_table=np.roll(inputs.block_table, 1, axis=0))
    elif fault == "off_by_one":
        wrong = inputs._replace(cache_seqlens=np.maximum(inputs.cache_seqlens - 1, 0))
    else:
        wrong_case = case._replace(causal=False)
    with pytest.raises(AssertionError):
        check(decode(wrong, wrong_case), case, inputs)
