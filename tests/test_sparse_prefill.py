"""Sparse prefill: the jnp reference and what JAX does to it on a CPU, the CUDA kernel on a GPU, both against float64."""

# ruff: noqa: C408, E501 - dicts of keyword arguments; tables, one line per refusal

import functools
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_dense_decode import ERROR_RATIO, assert_same_bits
from test_sparse_reference import LSE_TOLERANCE, OUT_TOLERANCE, make_cache, make_indices

from jax_flashmla import flash_mla_sparse_fwd, flash_mla_with_kvcache, reference, testing
from jax_flashmla._primitive import OPS, freeze
from jax_flashmla.ops.schedule import MAX_SEQUENCES, num_parts
from jax_flashmla.ops.sparse_prefill import TARGET
from jax_flashmla.ops.sparse_prefill import batch as fold

BF16 = ml_dtypes.bfloat16
COSINE_TOLERANCE = 7e-6
SINKS = np.array([-np.inf, np.inf, 0, 3.5, -2, -100], np.float32)
EMPTY = np.zeros(0, np.int32)


def prefill_f64(q, keys, indices, lengths=None, sink=None, scale=None):
    """One query token and KV head at a time. keys: [s_kv, h_kv, d_qk] in float64."""
    s_q, h_q, d = q.shape
    s_kv, h_kv, _ = keys.shape
    group = h_q // h_kv
    scale = float(np.float32(d**-0.5 if scale is None else scale))
    out = np.zeros((s_q, h_q, 512))
    peak, lse = np.full((s_q, h_q), -np.inf), np.full((s_q, h_q), -np.inf)
    for i in range(s_q):
        for head in range(h_kv):
            row = indices[i, head] if lengths is None else indices[i, head, : max(int(lengths[i]), 0)]
            picked = keys[row[(row >= 0) & (row < s_kv)], head]
            if not len(picked):
                continue
            heads = slice(head * group, (head + 1) * group)
            scores = q[i, heads].astype(np.float64) @ picked.T * scale
            peak[i, heads] = scores.max(axis=1)
            p = np.exp(scores - peak[i, heads, None])
            lse[i, heads] = np.log(p.sum(axis=1)) + peak[i, heads]
            out[i, heads] = p @ picked[:, :512] / p.sum(axis=1, keepdims=True)
    if sink is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            out *= np.nan_to_num(1 / (1 + np.exp(sink.astype(np.float64) - lse)))[..., None]
    return out, peak, lse


def problem(
    source="rows", *, s_q=3, h_q=4, h_kv=1, d=576, s_kv=128, topk=128, page_size=16, lengths=None, seed=0, dtype=BF16
):
    """q, kv, keys in float64, indices and lengths. What no list names is NaN; fp8_v32 and bf16 are pools."""
    rng = np.random.default_rng(seed)
    lengths = None if lengths is None else np.array(lengths, np.int32)
    if source != "rows":
        s_kv = -(-s_kv // page_size) * page_size
    indices, used = make_indices(rng, s_q, h_kv, topk, lengths, s_kv)
    if source == "rows":
        kv = np.full((s_kv, h_kv, d), np.nan, dtype)
        kv[used] = rng.standard_normal((len(used), h_kv, d)).astype(dtype)
        keys = kv.astype(np.float64)
    else:
        name = "bf16_512" if (source, d) == ("bf16", 512) else source
        kv, keys = make_cache(rng, name, s_kv // page_size, page_size, used)
        keys = keys[:, None]
    return rng.standard_normal((s_q, h_q, d)).astype(dtype), kv, keys, indices, lengths


@functools.partial(jax.jit, static_argnames=("scale", "implementation"))
def prefill(q, kv, indices, scale=None, **options):
    return flash_mla_sparse_fwd(q, kv, indices, scale, **options)


def check(got, exact):
    out, peak, lse = map(np.asarray, got)
    for x, y in zip((out, peak, lse), exact):
        assert x.shape == y.shape
    assert peak.dtype == lse.dtype == np.float32
    assert testing.max_error(peak, exact[1]) <= LSE_TOLERANCE and testing.max_error(lse, exact[2]) <= LSE_TOLERANCE
    assert testing.max_error(out, exact[0]) <= OUT_TOLERANCE[str(out.dtype)]
    assert testing.cosine_difference(out, exact[0]) <= COSINE_TOLERANCE
    assert (out[np.isneginf(exact[2])] == 0).all()


def assert_alike(got, expected):
    """To one bfloat16 step: XLA may fuse otherwise."""
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=2**-7, atol=2**-9)


# The reference


GRID = [
    # source, d, h_q, h_kv, s_kv, topk, s_q
    ("rows", 576, 1, 1, 128, 128, 1),
    ("rows", 512, 16, 1, 128, 128, 7),
    ("rows", 576, 20, 1, 100, 300, 7),
    ("rows", 512, 64, 1, 640, 100, 1),
    ("rows", 576, 128, 1, 200, 130, 7),
    ("rows", 576, 16, 2, 128, 128, 7),
    ("rows", 512, 20, 2, 90, 100, 3),
    ("rows", 576, 6, 3, 5, 1, 2),
    ("bf16", 576, 16, 1, 128, 128, 7),
    ("bf16", 512, 5, 1, 100, 300, 2),
    ("fp8_v32", 576, 64, 1, 128, 128, 7),
    ("fp8_v32", 576, 20, 1, 600, 200, 1),
]


@pytest.mark.parametrize("source, d, h_q, h_kv, s_kv, topk, s_q", GRID)
def test_reference(source, d, h_q, h_kv, s_kv, topk, s_q):
    sink = np.resize(SINKS, h_q)
    lengths = np.resize(np.array([topk, topk // 2, 0, topk + 5, -3, 1], np.int32), s_q)
    shape = dict(s_q=s_q, h_q=h_q, h_kv=h_kv, d=d, s_kv=s_kv, topk=topk)
    q, kv, keys, indices, _ = problem(source, **shape)
    check(prefill(q, kv, indices), prefill_f64(q, keys, indices))
    q, kv, keys, indices, lengths = problem(source, lengths=lengths, seed=1, **shape)
    got = prefill(q, kv, indices, 0.05, attn_sink=sink, topk_length=lengths)
    check(got, prefill_f64(q, keys, indices, lengths, sink, 0.05))


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    source=st.sampled_from(["rows", "bf16", "fp8_v32"]),
    dtype=st.sampled_from([BF16, np.float16, np.float32]),
    s_q=st.sampled_from([1, 2, 63, 65, 130]),
    group=st.sampled_from([1, 3]),
    h_kv=st.integers(1, 3),
    d=st.sampled_from([576, 512]),
    s_kv=st.integers(1, 150),
    topk=st.sampled_from([1, 63, 129]),
    page_size=st.sampled_from([1, 7, 64]),
    with_lengths=st.booleans(),
    scale=st.sampled_from([None, 0.0, 0.1]),
    seed=st.integers(0, 10**6),
)
def test_reference_drawn(source, dtype, s_q, group, h_kv, d, s_kv, topk, page_size, with_lengths, scale, seed):
    if source != "rows":
        dtype, h_kv = BF16, 1
    d = 576 if source == "fp8_v32" else d
    lengths = np.random.default_rng(seed).integers(-3, topk + 5, s_q) if with_lengths else None
    shape = dict(s_q=s_q, h_q=group * h_kv, h_kv=h_kv, d=d, s_kv=s_kv, topk=topk, page_size=page_size)
    q, kv, keys, indices, lengths = problem(source, lengths=lengths, seed=seed, dtype=dtype, **shape)
    check(prefill(q, kv, indices, scale, topk_length=lengths), prefill_f64(q, keys, indices, lengths, None, scale))


def test_more_tokens_than_a_chunk_holds():
    """The same keys for a token whatever chunk it is in, and the last chunk filled up."""
    q, kv, keys, indices, _ = problem(s_q=2 * reference.CHUNK_LISTS + 3, h_q=1, topk=9)
    check(prefill(q, kv, indices), prefill_f64(q, keys, indices))


def test_duplicates_invalid_entries_and_tokens_without_a_key():
    q, kv, keys, indices, _ = problem(s_q=4, topk=8)
    slot = np.flatnonzero(~np.isnan(keys[:, 0, 0]))[0]
    invalid = [-1, -(2**31), 2**31 - 1, len(keys)]
    indices[:, 0] = [[*invalid, *invalid], [slot, *[-1] * 7], [slot] * 8, [*invalid, *[slot] * 4]]
    out, peak, lse = got = list(map(np.asarray, prefill(q, kv, indices)))
    check(got, prefill_f64(q, keys, indices))
    assert (out[0] == 0).all() and np.isneginf(peak[0]).all() and np.isneginf(lse[0]).all()
    np.testing.assert_array_equal(lse[1], peak[1])
    np.testing.assert_allclose(lse[2] - peak[2], np.log(8), rtol=1e-6)
    np.testing.assert_allclose(lse[3] - peak[3], np.log(4), rtol=1e-6)
    for options in (dict(topk_length=np.zeros(4, np.int32)), dict(attn_sink=SINKS[:4])):
        out, peak, lse = map(np.asarray, prefill(q, kv, np.full_like(indices, -1), **options))
        assert (out == 0).all() and np.isneginf(peak).all() and np.isneginf(lse).all()


def test_sinks_at_infinity():
    q, kv, _, indices, _ = problem()
    plain, sunk = prefill(q, kv, indices), prefill(q, kv, indices, attn_sink=SINKS[[0, 1, 0, 1]])
    for x, y in zip(plain[1:], sunk[1:]):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(plain[0][:, ::2], sunk[0][:, ::2])
    assert (np.asarray(sunk[0])[:, 1::2] == 0).all() and (np.asarray(plain[0])[:, 1::2] != 0).any()


@pytest.mark.parametrize("source", ["bf16", "fp8_v32"])
def test_equals_sparse_decode_of_the_same_keys(source):
    q, kv, _, indices, lengths = problem(source, s_q=5, lengths=[128, 70, 0, 3, 128])
    sink = SINKS[:4]
    out, _, lse = prefill(q, kv, indices, attn_sink=sink, topk_length=lengths)
    decode = functools.partial(flash_mla_with_kvcache, is_fp8_kvcache=source == "fp8_v32", implementation="xla")
    options = dict(indices=indices, topk_length=lengths, attn_sink=sink)
    expected_out, expected_lse = jax.jit(lambda q, kv: decode(q[:, None], kv, None, None, 512, **options))(q, kv)
    assert_alike((out, lse), (expected_out[:, 0], expected_lse[:, :, 0]))
    if source == "fp8_v32":  # the other spelling of its bytes
        assert_alike(
            prefill(q, kv.view(jnp.float8_e4m3fn), indices, attn_sink=sink, topk_length=lengths)[::2], (out, lse)
        )


def test_a_pool_and_its_rows_are_the_same():
    q, kv, _, indices, _ = problem("bf16")
    for x, y in zip(prefill(q, kv, indices), prefill(q, kv.reshape(-1, 1, 576), indices)):
        np.testing.assert_array_equal(x, y)


def test_float32_queries_over_fp8_bytes_are_exact():
    q, kv, keys, indices, _ = problem("fp8_v32")
    q = q.astype(np.float32)
    check(prefill(q, kv, indices), prefill_f64(q, keys, indices))


@pytest.mark.usefixtures("all_optimizations")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_is_bounded(backward):
    """The keys named would be 4.5 GiB; those of a chunk are 9 MiB in bfloat16, a step of the forward pass."""
    s_q, topk, h_q = 2048, 2048, 4
    q, kv, indices = (
        jax.ShapeDtypeStruct(*x) for x in (
            ((s_q, h_q, 576), jnp.bfloat16), ((8192, 1, 576), jnp.bfloat16), ((s_q, 1, topk), jnp.int32)
        )
    )  # fmt: skip

    def forward(q, kv, indices):
        return prefill(q, kv, indices, implementation="xla")

    def loss(q, kv, indices):
        return forward(q, kv, indices)[0].astype(jnp.float32).sum()

    f = jax.grad(loss, argnums=(0, 1)) if backward else forward
    used = jax.jit(f).lower(q, kv, indices).compile().memory_analysis().temp_size_in_bytes
    step = reference.CHUNK_LISTS * reference.CHUNK_INDICES * 576 * 4
    operands = 2 * (q.size + kv.size) + 4 * indices.size
    # Of the backward pass all steps of one chunk of query tokens, in as many copies as jax 0.10 makes.
    assert used < (3 * topk // reference.CHUNK_INDICES if backward else 4) * step + 4 * operands


def test_gradients():
    """Finite in spite of NaN where no list points; they reach the rows that were named, and no others."""
    h_kv = 2
    q, kv, keys, indices, lengths = problem(h_kv=h_kv, s_q=70, topk=20, lengths=[20, 0] * 35)

    def loss(q, kv, sink):
        options = dict(attn_sink=sink, topk_length=lengths, implementation="xla")
        out, _, lse = prefill(q, kv, indices, **options)
        return out.astype(jnp.float32).sum() + jnp.where(jnp.isneginf(lse), 0, lse).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, kv, SINKS[:4])
    assert all(np.isfinite(np.float32(x)).all() for x in gradients)
    seen = indices[::2]
    for head in range(h_kv):
        named = np.unique(seen[:, head][(seen[:, head] >= 0) & (seen[:, head] < len(keys))])
        np.testing.assert_array_equal(np.flatnonzero(np.float32(gradients[1])[:, head].any(axis=1)), named)


def test_gradients_against_differences():
    q, kv, _, indices, _ = problem(s_q=2, h_q=2, s_kv=6, topk=5, dtype=np.float32)
    kv = np.nan_to_num(kv)
    weights = np.random.default_rng(0).standard_normal((2, 2, 512))

    def loss(out, lse):
        return (out * weights).sum() + np.where(np.isneginf(lse), 0, lse).sum()

    def ours(q, kv):
        out, _, lse = prefill(q, kv, indices, implementation="xla")
        return (out * jnp.asarray(weights, jnp.float32)).sum() + jnp.where(jnp.isneginf(lse), 0, lse).sum()

    gradients = jax.jit(jax.grad(ours, argnums=(0, 1)))(q, kv)
    rng = np.random.default_rng(1)
    for place in (0, 1):
        operands = [q.astype(np.float64), kv.astype(np.float64)]
        direction = rng.standard_normal(operands[place].shape)
        ends = []
        for step in (1e-4, -1e-4):
            moved = [x + step * direction if i == place else x for i, x in enumerate(operands)]
            out, _, lse = prefill_f64(moved[0], moved[1], indices)
            ends.append(loss(out, lse))
        slope = (ends[0] - ends[1]) / 2e-4
        np.testing.assert_allclose((np.float64(gradients[place]) * direction).sum(), slope, rtol=1e-3)


# What JAX does to it


@pytest.mark.parametrize("source, through", [("rows", "reference"), ("rows", "primitive"), ("fp8_v32", "primitive")])
def test_vmap(source, through):
    """The primitive as it is where the kernel takes the call: bound, lowered to the reference, folded into s_q."""
    h_kv = 2 if source == "rows" else 1
    problems = [problem(source, h_kv=h_kv, s_kv=48, topk=20, lengths=[20, 3, 0], seed=seed) for seed in range(2)]
    q, _, _, indices, lengths = problems[0]
    sink = SINKS[:4]
    shift = np.array([0, 7], np.int32)[:, None, None, None]
    many = (
        np.stack([q, q[::-1]]),
        np.stack([p[1] for p in problems]),
        indices + shift,
        np.stack([lengths, lengths[::-1]]),
    )
    many = [np.nan_to_num(x.astype(np.float32)).astype(x.dtype) if x.dtype == BF16 else x for x in many]

    def one(q, kv, indices, lengths):
        if through == "reference":
            return prefill(q, kv, indices, attn_sink=sink, topk_length=lengths, implementation="xla")
        pool = kv.reshape(-1, 1, 1, 576) if source == "rows" else kv
        params = freeze(insist=False, softmax_scale=float(np.float32(576**-0.5)))
        if source == "rows":
            exists = (indices >= 0) & (indices < 48)
            indices = jnp.where(exists, indices * 2 + jnp.arange(2, dtype=jnp.int32)[None, :, None], -1)
        return OPS["sparse_prefill"].forward(params, q, pool, indices, lengths, sink)

    each = jax.jit(one)
    axes_of = [(0, 0, 0, 0), (0, None, None, None), (None, 0, None, None), (None, None, 0, None), (None, None, None, 0)]
    for axes in axes_of:
        args = [x if axis == 0 else x[0] for x, axis in zip(many, axes)]
        got = jax.jit(jax.vmap(one, in_axes=axes))(*args)
        for e in range(2):
            expected = each(*(x[e] if axis == 0 else x for x, axis in zip(args, axes)))
            assert_alike(
                [np.nan_to_num(np.float32(x[e])) for x in got], [np.nan_to_num(np.float32(x)) for x in expected]
            )


def test_vmap_of_sinks():
    q, kv, _, indices, _ = problem()
    many = np.stack([SINKS[:4], SINKS[1:5]])
    got = jax.vmap(lambda sink: prefill(q, kv, indices, attn_sink=sink, implementation="xla"))(many)
    for e in range(2):
        assert_alike([x[e] for x in got], prefill(q, kv, indices, attn_sink=many[e]))
    forward = OPS["sparse_prefill"].forward
    pool, params = kv.reshape(-1, 1, 1, 576), freeze(insist=False, softmax_scale=0.05)
    with pytest.raises(
        ValueError, match=r"sparse_prefill: attn_sink cannot be mapped by vmap, got a mapped axis of size 2"
    ):
        jax.vmap(lambda sink: forward(params, q, pool, indices, EMPTY, sink))(many)
    with pytest.raises(NotImplementedError, match="sparse_prefill is forward-only"):
        jax.grad(lambda q: forward(params, q, pool, indices, EMPTY, many[0])[0].astype(jnp.float32).sum())(q)


def test_vmap_folds_into_one_call():
    """Unused operands stay empty; pools one behind the other, and the slots move along."""
    seen = []

    def bind(*operands):
        seen.append(operands)
        return [operands[0]]

    q, pool, sink = jnp.zeros((3, 2, 4, 576), jnp.bfloat16), jnp.zeros((3, 2, 4, 1, 576), jnp.bfloat16), jnp.zeros(0)
    indices = jnp.array([[[3, -1]], [[8, 7]]], jnp.int32)
    (got,) = fold(bind, 3, (q, pool, indices, EMPTY, sink), [True, True, False, False, False])
    assert got.shape == q.shape and [x.shape for x in seen[0]] == [(6, 4, 576), (6, 4, 1, 576), (6, 1, 2), (0,), (0,)]
    assert seen[0][2].tolist() == [[[3, -1]], [[-1, 7]], [[11, -1]], [[-1, 15]], [[19, -1]], [[-1, 23]]]
    lengths = jnp.array([[1, 2], [3, 4], [5, 6]], jnp.int32)
    fold(bind, 3, (q[0], pool[0], indices, lengths, sink), [False, False, False, True, False])
    assert seen[1][2].tolist() == indices.tolist() * 3 and seen[1][3].tolist() == [1, 2, 3, 4, 5, 6]
    assert seen[1][1].shape == (2, 4, 1, 576) and seen[1][0].shape == (6, 4, 576)
    big = jax.ShapeDtypeStruct((3, 2**18, 2**12, 1, 576), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"sparse_prefill: the caches of all elements.*fewer than 2\*\*31 tokens"):
        jax.eval_shape(
            lambda *x: fold(bind, 3, x, [True] * 4 + [False]), q, big, jnp.stack([indices] * 3), lengths, sink
        )


def specs(s_q, h_q=16, h_kv=1, topk=64, s_kv=1000, dtype=jnp.bfloat16):
    shapes = ((s_q, h_q, 576), dtype), ((s_kv, h_kv, 576), dtype), ((s_q, h_kv, topk), jnp.int32), ((s_q,), jnp.int32)
    return [jax.ShapeDtypeStruct(*x) for x in shapes]


def lowered(*operands, with_lengths=True, implementation="cuda"):
    def f(q, kv, indices, lengths):
        lengths = lengths if with_lengths else None
        return prefill(q, kv, indices, topk_length=lengths, implementation=implementation)

    return jax.jit(f).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("s_q, h_kv, plans, chunk", [(1, 1, 1, 1), (70000, 1, 2, 35000), (75001, 2, 4, 37502)])
def test_cuda_lowering(cuda_build, s_q, h_kv, plans, chunk):
    """One call; lists in as many plans of one size as the planner needs, and the workspaces of one of them."""
    text = lowered(*specs(s_q, h_kv=h_kv))
    (call,) = [line for line in text.splitlines() if f"@{TARGET}(" in line]
    group, lists = 16 // h_kv, s_q * h_kv
    parts = num_parts(chunk, group, 1)
    slots = parts - 1 + min(chunk, parts - 1)
    operands, results = call.rsplit(" : ", 1)[1].split(" -> ")
    assert chunk <= MAX_SEQUENCES and chunk % h_kv == 0 and chunk * plans - lists < plans * h_kv
    assert operands == (
        f"(tensor<{s_q}x16x576xbf16>, tensor<{1000 * h_kv}x1x1x576xbf16>, tensor<{s_q}x{h_kv}x64xi32>, "
        f"tensor<{lists}xi32>, tensor<0xf32>, tensor<{plans}x{chunk}xi32>, tensor<{plans}x{parts}x8xi32>, "
        f"tensor<{plans}x{chunk + 1}xi32>)"
    )
    assert results == (
        f"(tensor<{s_q}x16x512xbf16>, tensor<{s_q}x16xf32>, tensor<{s_q}x16xf32>, "
        f"tensor<{slots}x1x16x512xf16>, tensor<{slots}x1x{group}x4xf32>, tensor<{slots}x{group}xf32>)"
    )
    assert text.count("@jax_flashmla.schedule.v2(") == 1
    without = lowered(*specs(s_q, h_kv=h_kv), with_lengths=False)
    (call,) = [line for line in without.splitlines() if f"@{TARGET}(" in line]
    assert f"x{h_kv}x64xi32>, tensor<0xi32>, tensor<0xf32>" in call


def test_cuda_lowering_of_other_dtypes_takes_the_reference(cuda_build):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (jnp.float16, jnp.float32):
            assert "jax_flashmla." not in lowered(*specs(5, dtype=dtype), implementation=None)
        assert "jax_flashmla." in lowered(*specs(5), implementation=None)


# Refusals


def z(*shape, dtype=jnp.bfloat16):
    return np.zeros(shape, dtype)


i32, u8 = functools.partial(z, dtype=np.int32), functools.partial(z, dtype=np.uint8)
BASE = dict(q=z(2, 4, 576), kv=z(9, 1, 576), indices=i32(2, 1, 8), sm_scale=None)
KERNEL = "sparse_prefill: implementation='cuda' needs a Hopper GPU .* and was lowered for another platform"
DTYPE = "sparse_prefill: implementation='cuda' cannot be used: the kernel takes bfloat16, got q in float16; use"
FP8_ONLY = r"must be a pool \[P, page_size, 1, 656\] of the format fp8_v32, got shape"
POOL = r"kv must have shape \[P, page_size, 1, 576 or 512\] and at least one page, got"

REFUSED = {
    "q_type": (dict(q=[1.0]), TypeError, "q must be an array .* got list; use jnp.asarray"),
    "q_rank": (dict(q=z(1, 2, 4, 576)), ValueError, r"q must have the axes \[s_q, h_q, d_qk\], got shape \(1, 2, 4, 576\)"),
    "q_dtype": (dict(q=u8(2, 4, 576)), TypeError, "q must be bfloat16 or float16 or float32, got uint8; cast"),
    "q_d_qk": (dict(q=z(2, 4, 512)), ValueError, r"q must have kv's d_qk = 576, got shape \(2, 4, 512\)"),
    "q_empty": (dict(q=z(0, 4, 576)), ValueError, "q must have at least one query token and one head"),
    "q_f16_over_fp8": (dict(q=z(2, 4, 576, dtype=np.float16), kv=u8(3, 4, 1, 656)), TypeError, "q must be bfloat16 for an fp8 cache, got float16"),
    "kv_type": (dict(kv=[1]), TypeError, r"kv must be an array \[s_kv, h_kv, d_qk\], got list; use jnp.asarray"),
    "kv_dtype": (dict(kv=z(9, 1, 576, dtype=np.float16)), TypeError, "kv must have q's dtype bfloat16, got float16; cast q"),
    "kv_int": (dict(kv=i32(9, 1, 576)), TypeError, "kv must be bfloat16 or float16 or float32, or a pool of uint8 or float8_e4m3fn, got int32"),
    "kv_rank": (dict(kv=z(9, 576)), ValueError, r"kv must have shape \[s_kv, h_kv, 576 or 512\], or be a pool .* got \(9, 576\)"),
    "kv_width": (dict(kv=z(9, 1, 192)), ValueError, r"kv must have shape \[s_kv, h_kv, 576 or 512\]"),
    "kv_empty": (dict(kv=z(0, 1, 576)), ValueError, r"kv must have shape .* got \(0, 1, 576\)"),
    "kv_rows": (dict(kv=np.broadcast_to(z(1), (2**30, 2, 576))), ValueError, r"kv must have fewer than 2\*\*31 rows, got s_kv \* h_kv of shape"),
    "pool_heads": (dict(kv=z(3, 16, 2, 576)), ValueError, POOL),
    "pool_width": (dict(kv=z(3, 16, 1, 192)), ValueError, POOL),
    "pool_empty": (dict(kv=z(0, 16, 1, 576)), ValueError, POOL),
    "pool_tokens": (dict(kv=np.broadcast_to(z(1), (2**20, 2**11, 1, 576))), ValueError, r"kv must address fewer than 2\*\*31 tokens"),
    "fp8_v4": (dict(kv=u8(3, 16, 1, 584)), ValueError, rf"kv in uint8 {FP8_ONLY} \(3, 16, 1, 584\); read other formats with kvcache.gather_kv_cache"),
    "fp8_v4_padded": (dict(kv=u8(3, 9792)), ValueError, FP8_ONLY),
    "fp8_rows": (dict(kv=u8(9, 1, 656)), ValueError, FP8_ONLY),
    "fp8_d_qk": (dict(q=z(2, 4, 512), kv=u8(3, 16, 1, 656)), ValueError, "q must have kv's d_qk = 576"),
    "heads": (dict(kv=z(9, 3, 576), indices=i32(2, 3, 8)), ValueError, "h_q must be a multiple of h_kv, got h_q = 4.*h_kv = 3"),
    "indices_rank": (dict(indices=i32(2, 8)), ValueError, r"indices must have the axes \[s_q, h_kv, topk\], got shape \(2, 8\)"),
    "indices_dtype": (dict(indices=z(2, 1, 8, dtype=np.int64)), TypeError, "indices must be int32, got int64"),
    "indices_tokens": (dict(indices=i32(3, 1, 8)), ValueError, r"indices must have shape \[s_q, h_kv, topk\] = \(2, 1, 8\), got \(3, 1, 8\); give one list"),
    "indices_heads": (dict(kv=z(9, 2, 576)), ValueError, r"indices must have shape .* = \(2, 2, 8\), got \(2, 1, 8\)"),
    "indices_empty": (dict(indices=i32(2, 1, 0)), ValueError, "indices must have at least one column"),
    "length_shape": (dict(topk_length=i32(3)), ValueError, r"topk_length must have shape \[s_q\] = \(2,\), got \(3,\)"),
    "length_dtype": (dict(topk_length=z(2)), TypeError, "topk_length must be int32, got bfloat16"),
    "sink_shape": (dict(attn_sink=z(3, dtype=np.float32)), ValueError, r"attn_sink must have shape \[h_q\] = \(4,\), got \(3,\)"),
    "sink_dtype": (dict(attn_sink=z(4)), TypeError, "attn_sink must be float32, got bfloat16"),
    "scale": (dict(sm_scale=-1), ValueError, "sm_scale must be finite in float32 and >= 0, got -1"),
    "scale_type": (dict(sm_scale=[1]), TypeError, "sm_scale must be a number or None, got list"),
    "d_v": (dict(d_v=448), ValueError, "d_v must be 512, got 448"),
    "d_v_type": (dict(d_v=512.0), TypeError, "d_v must be an int, got float"),
    "implementation": (dict(implementation="triton"), ValueError, "implementation must be None, 'cuda' or 'xla'"),
    "cuda_on_a_cpu": (dict(implementation="cuda"), RuntimeError, KERNEL),
    "cuda_f16": (dict(implementation="cuda", q=z(2, 4, 576, dtype=np.float16), kv=z(9, 1, 576, dtype=np.float16)), ValueError, DTYPE),
}  # fmt: skip


@pytest.mark.parametrize("changed, error, match", REFUSED.values(), ids=REFUSED.keys())
def test_refusals(changed, error, match):
    with pytest.raises(error, match=match):
        flash_mla_sparse_fwd(**(BASE | changed))


@pytest.mark.parametrize("name, value", [("sm_scale", 0.1), ("d_v", 512)])
def test_traced_attributes_are_refused(name, value):
    with pytest.raises(TypeError, match=rf"{name} must be static.*got the traced.*static_argnames"):
        jax.jit(lambda value: flash_mla_sparse_fwd(**(BASE | {name: value})))(value)


# The kernel


@functools.partial(jax.jit, static_argnames=("implementation", "scale"))
def run(q, kv, indices, options, implementation="cuda", scale=None):
    return flash_mla_sparse_fwd(q, kv, indices, scale, implementation=implementation, **options)


def on_gpu(source="rows", *, sink=None, **shape):
    """Calls of `run`, and the oracle for some tokens: all, or of many the ends and a sample."""
    q, kv, keys, indices, lengths = problem(source, **shape)
    options = dict(topk_length=lengths, attn_sink=sink)
    options = {name: jnp.asarray(x) for name, x in options.items() if x is not None}
    call = functools.partial(run, jnp.asarray(q), jnp.asarray(kv), jnp.asarray(indices), options)
    s_q = len(q)
    some = np.arange(s_q)
    if s_q > 40:
        some = np.unique([0, 1, s_q - 2, s_q - 1, *np.random.default_rng(0).integers(0, s_q, 24)])
    exact = prefill_f64(q[some], keys, indices[some], None if lengths is None else lengths[some], sink)
    return call, some, exact


def assert_kernel(call, some, exact):
    """Against float64 where it was computed, no worse than jnp; against jnp everywhere."""
    got, expected = jax.device_get((call(), call(implementation="xla")))
    for x, y in zip(got[1:], expected[1:]):
        np.testing.assert_array_equal(np.isneginf(x), np.isneginf(y))
        np.testing.assert_allclose(x, y, rtol=2 * LSE_TOLERANCE, atol=2 * LSE_TOLERANCE)
    assert np.isfinite(np.float32(got[0])).all() and (got[0][np.isneginf(got[2])] == 0).all()
    assert testing.cosine_difference(got[0], expected[0]) <= 2 * COSINE_TOLERANCE
    assert_exact([x[some] for x in got], exact, [x[some] for x in expected])


def assert_exact(got, exact, against=None):
    for x, y in zip(got[1:], exact[1:]):
        np.testing.assert_array_equal(np.isneginf(x), np.isneginf(y))
        finite = np.isfinite(y)
        np.testing.assert_allclose(x[finite], y[finite], rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)
    assert testing.cosine_difference(got[0], exact[0]) <= COSINE_TOLERANCE
    if against is not None:
        assert testing.max_error_ratio(got[0], against[0], exact[0]) <= ERROR_RATIO


SIZES = [(128, 128), (500, 64), (1024, 576), (8192, 2048), (1000, 1500), (640, 100)]


@pytest.mark.gpu
@pytest.mark.parametrize("s_kv, topk", SIZES)
@pytest.mark.parametrize("h_q", [64, 128, 1, 16, 20])
@pytest.mark.parametrize("d", [576, 512])
def test_kernel(d, h_q, s_kv, topk):
    """One token is split over many thread blocks, 213 are not."""
    for s_q in (1, 62, 213):
        assert_kernel(*on_gpu(s_q=s_q, h_q=h_q, d=d, s_kv=s_kv, topk=topk))


@pytest.mark.gpu
@pytest.mark.parametrize("h_q", [16, 64, 128, 70])
@pytest.mark.parametrize(
    "source, d, page_size",
    [
        ("rows", 576, 1),
        ("rows", 512, 1),
        ("bf16", 576, 64),
        ("bf16", 512, 7),
        ("fp8_v32", 576, 64),
        ("fp8_v32", 576, 61),
    ],
)
def test_kernel_with_lengths_and_sinks(source, d, page_size, h_q):
    for s_q, topk in ((1, 2048), (5, 1500), (150, 300)):
        lengths = np.resize(np.array([topk, 0, 1, topk // 3, topk + 9, -5, 65], np.int32), s_q)
        sink = np.concatenate([SINKS, np.linspace(-3, 8, h_q).astype(np.float32)])[:h_q]
        shape = dict(s_q=s_q, h_q=h_q, d=d, s_kv=3000, topk=topk, page_size=page_size)
        assert_kernel(*on_gpu(source, lengths=lengths, sink=sink, **shape))
        assert_kernel(*on_gpu(source, seed=1, **shape))


@pytest.mark.gpu
@pytest.mark.parametrize("h_q, h_kv", [(16, 2), (128, 2), (20, 4), (3, 3)])
def test_kernel_with_kv_heads(h_q, h_kv):
    for s_q, topk in ((1, 1000), (60, 130)):
        sink = np.linspace(-3, 8, h_q).astype(np.float32)
        lengths = np.random.default_rng(0).integers(0, topk + 1, s_q)
        assert_kernel(*on_gpu(s_q=s_q, h_q=h_q, h_kv=h_kv, s_kv=900, topk=topk, lengths=lengths, sink=sink))


@pytest.mark.gpu
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    source=st.sampled_from(["rows", "rows", "bf16", "fp8_v32"]),
    s_q=st.integers(1, 200),
    group=st.integers(1, 140),
    h_kv=st.integers(1, 3),
    d=st.sampled_from([576, 512]),
    s_kv=st.integers(1, 1500),
    topk=st.integers(1, 700),
    page_size=st.integers(1, 70),
    with_lengths=st.booleans(),
    seed=st.integers(0, 100),
)
def test_kernel_drawn_shapes(source, s_q, group, h_kv, d, s_kv, topk, page_size, with_lengths, seed):
    h_kv = h_kv if source == "rows" and group < 70 else 1
    d = 576 if source == "fp8_v32" else d
    lengths = np.random.default_rng(seed).integers(-3, topk + 5, s_q) if with_lengths else None
    shape = dict(s_q=s_q, h_q=group * h_kv, h_kv=h_kv, d=d, s_kv=s_kv, topk=topk, page_size=page_size)
    assert_kernel(*on_gpu(source, lengths=lengths, seed=seed, **shape))


@pytest.mark.gpu
@pytest.mark.parametrize("s_q, h_q", [(1, 16), (5, 128), (213, 64)])
def test_twenty_repetitions_are_bit_equal(s_q, h_q):
    call, *_ = on_gpu(s_q=s_q, h_q=h_q, s_kv=4000, topk=1500)
    first = call()
    for _ in range(20):
        assert_same_bits(call(), first)


@pytest.mark.gpu
@pytest.mark.parametrize("s_q, h_kv", [(70_000, 1), (33_001, 2)])
def test_more_lists_than_a_plan_takes(s_q, h_kv):
    h_q, topk, s_kv = 16, 70, 5000
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (s_q, h_q, 576), jnp.bfloat16)
    kv = jax.random.normal(keys[1], (s_kv, h_kv, 576), jnp.bfloat16)
    indices = jax.random.randint(keys[2], (s_q, h_kv, topk), -500, s_kv + 500, jnp.int32)
    lengths = jax.random.randint(keys[3], (s_q,), 0, topk + 1, jnp.int32)
    lengths = jnp.where(jnp.arange(s_q) % 3 == 0, topk, lengths)
    got = run(q, kv, indices, dict(topk_length=lengths))
    edge = s_q // 2
    some = np.unique([0, 1, edge - 1, edge, edge + 1, s_q - 1, *np.random.default_rng(0).integers(0, s_q, 200)])
    kv_f64 = np.asarray(kv).astype(np.float64)
    exact = prefill_f64(np.asarray(q[some]), kv_f64, np.asarray(indices[some]), np.asarray(lengths[some]))
    assert_exact([np.asarray(x[some]) for x in got], exact)


@pytest.mark.gpu
def test_pool_larger_than_4_gib():
    """Slots whose bytes lie beyond 2**32: offsets into the pool are 64-bit."""
    s_kv = 2**22
    kv = (
        jnp.zeros((s_kv, 1, 576), jnp.bfloat16)
        .at[-300:]
        .set(jax.random.normal(jax.random.key(0), (300, 1, 576), jnp.bfloat16))
    )
    indices = s_kv - 1 - np.random.default_rng(0).integers(0, 300, (3, 1, 200)).astype(np.int32)
    q = jax.random.normal(jax.random.key(1), (3, 16, 576), jnp.bfloat16)
    got = run(q, kv, jnp.asarray(indices), {})
    keys = np.asarray(kv[-300:]).astype(np.float64)
    assert_exact(list(map(np.asarray, got)), prefill_f64(np.asarray(q), keys, indices - (s_kv - 300)))


@pytest.mark.gpu
def test_kernel_without_a_key():
    call, _, exact = on_gpu(s_q=4, h_q=16, topk=100, lengths=[0, 0, -1, 0])
    assert np.isneginf(exact[2]).all()
    out, peak, lse = map(np.asarray, call())
    assert (out == 0).all() and np.isneginf(peak).all() and np.isneginf(lse).all()


@pytest.mark.gpu
def test_vmap_of_the_kernel():
    problems = [problem("fp8_v32", s_q=5, h_q=16, s_kv=300, topk=70, seed=seed) for seed in range(3)]
    q, kv, indices = (jnp.asarray(np.stack([p[i] for p in problems])) for i in (0, 1, 3))
    got = jax.vmap(lambda *operands: run(*operands, {}))(q, kv, indices)
    for e in range(3):
        expected = run(q[e], kv[e], indices[e], {})
        # The folded batch is cut elsewhere.
        assert testing.cosine_difference(np.asarray(got[0][e]), np.asarray(expected[0])) <= COSINE_TOLERANCE
        np.testing.assert_allclose(got[1][e], expected[1], rtol=LSE_TOLERANCE)
