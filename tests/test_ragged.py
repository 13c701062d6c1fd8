"""The ragged call against a float64 loop over its tokens, for every mix of decode and prefill."""

# ruff: noqa: C408, E501 - tables, one line per refusal

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_flashmla import mla_ragged_paged_attention, ragged, testing

pytestmark = pytest.mark.usefixtures("small_chunks")

TOKENS, MAX_SEQS, PAGES_PER_SEQ, PAGE, NUM_PAGES = 24, 5, 3, 16, 20
SCALE = 192**-0.5
ABSURD = 2147480000
# float32: sums of 576 products, then of up to 48 keys, in another order than float64's.
TOLERANCE = 2e-5


def make(lengths, h_q=4, dtype=np.float32, seed=0):
    """A batch of (new tokens, tokens in all), on shuffled pages; what is no key is NaN, what is no number absurd."""
    rng = np.random.default_rng(seed)
    n, total = len(lengths), sum(new for new, _ in lengths)
    q, rows = rng.standard_normal((TOKENS, h_q, 576), np.float32), rng.standard_normal((TOKENS, 576), np.float32)
    q[total:], rows[total:] = np.nan, np.nan
    cache = np.full((NUM_PAGES, PAGE, 1, 576), np.nan, np.float32)
    pages = rng.choice(np.array([ABSURD, -1], np.int32), (MAX_SEQS, PAGES_PER_SEQ))
    free = iter(rng.permutation(NUM_PAGES))
    for i, (new, length) in enumerate(lengths):
        for j in range(-(-length // PAGE)):
            pages[i, j] = page = next(free)
            old = np.clip(length - new - j * PAGE, 0, PAGE)
            cache[page, :old] = rng.standard_normal((old, 1, 576), np.float32)
    kv_lens, starts = np.full(MAX_SEQS, 40, np.int32), np.full(MAX_SEQS + 1, -7, np.int32)
    kv_lens[:n] = [length for _, length in lengths]
    starts[: n + 1] = np.cumsum([0, *(new for new, _ in lengths)])
    decoding = next((i for i, (new, _) in enumerate(lengths) if new != 1), n)
    distribution = np.array([decoding, min(decoding + 1, n), n], np.int32)
    q, rows, cache = q.astype(dtype), rows.astype(dtype), cache.astype(dtype)
    arrays = q[..., :512], q[..., 512:], rows[:, :512], rows[:, 512:], cache
    return *arrays, kv_lens, pages.reshape(-1), starts, distribution


def expected(ql_nope, q_pe, new_kv_c, new_k_pe, cache, kv_lens, page_indices, cu_q_lens, distribution):
    q, rows, cache = np.concatenate([ql_nope, q_pe], -1), np.concatenate([new_kv_c, new_k_pe], -1), cache.copy()
    out = np.zeros((*q.shape[:2], 512))
    for i in range(distribution[2]):
        new, pages = range(cu_q_lens[i], cu_q_lens[i + 1]), page_indices.reshape(MAX_SEQS, -1)[i : i + 1]
        for k, token in enumerate(new, kv_lens[i] - len(new)):
            cache[pages[0, k // PAGE], k % PAGE, 0] = rows[token]
            one = q[None, None, token], cache, pages, np.array([k + 1], np.int32)
            out[token] = testing.dense_decode_f64(*one, softmax_scale=SCALE)[0][0, 0]
    return out, cache


step = jax.jit(functools.partial(mla_ragged_paged_attention, sm_scale=SCALE))


def check(args, tolerance=TOLERANCE, run=step):
    out, cache = run(*args)
    want, want_cache = expected(*args)
    assert out.dtype == args[0].dtype and testing.max_error(out, want) <= tolerance
    # NaN stays where no token was written; numpy knows no NaN of bfloat16.
    np.testing.assert_array_equal(np.float32(cache), np.float32(want_cache))


MIXES = {
    "nothing": [],
    "decode": [(1, 1), (1, 17), (1, 48), (1, 16), (1, 2)],
    "one_prompt": [(24, 24)],
    "chunk_of_a_prompt": [(19, 48)],
    "decode_and_prompts": [(1, 33), (1, 16), (13, 13), (2, 40)],
    "speculative": [(3, 33), (3, 3), (2, 17), (4, 18)],
    "no_new_token": [(1, 5), (0, 9), (5, 16), (0, 0), (1, 1)],
    "full": [(1, 48), (4, 4), (9, 17), (1, 16), (9, 32)],
}


@pytest.mark.parametrize("h_q", [4, 5, 64])  # tiles of 16, 12 and 1 tokens
@pytest.mark.parametrize("mix", MIXES)
def test_mixes(mix, h_q):
    check(make(MIXES[mix], h_q))


@st.composite
def mixes(draw):
    lengths, left = [], TOKENS
    for _ in range(draw(st.integers(0, MAX_SEQS))):
        new = draw(st.integers(0, left))
        lengths.append((new, draw(st.integers(new, PAGE * PAGES_PER_SEQ))))
        left -= new
    return lengths


@settings(deadline=None, derandomize=True, max_examples=30)
@given(lengths=mixes(), seed=st.integers(0, 10**6))
def test_any_mix(lengths, seed):
    check(make(lengths, seed=seed))


@pytest.mark.parametrize("distribution", [(0, 0, 3), (3, 3, 3), (1, 3, 3), (0, 3, 3)])
def test_only_the_number_of_sequences_matters(distribution):
    """A sequence among the mixed ones may decode, and one that "only decodes" may bring more tokens."""
    args = make([(1, 20), (7, 30), (1, 1)])
    check((*args[:-1], np.array(distribution, np.int32)))


def test_other_lengths_do_not_compile_anew():
    run = jax.jit(functools.partial(mla_ragged_paged_attention, sm_scale=SCALE))
    for lengths in MIXES.values():
        run(*make(lengths))
    assert run._cache_size() == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_half_precision(dtype):
    """Outputs up to 3: rounded once, after probabilities that were rounded too."""
    check(make(MIXES["full"], dtype=dtype), 4 * float(jnp.finfo(dtype).eps))


def test_hostile_lengths_and_pages_stay_in_bounds():
    """What a caller must not give: nothing is read or written out of bounds, and good sequences stay right."""
    *arrays, kv_lens, pages, starts, distribution = make([(3, 20), (2, 9), (4, 30)])
    bad_lens, bad_pages = kv_lens.copy(), pages.reshape(MAX_SEQS, -1).copy()
    bad_lens[0], bad_pages[1] = 1, [ABSURD, -3, NUM_PAGES]  # 3 new tokens of 1; pages that are none
    got, cache = step(*arrays, bad_lens, bad_pages.reshape(-1), starts, distribution)
    want, want_cache = expected(*arrays, kv_lens, pages, starts, distribution)
    assert testing.max_error(got[5:9], want[5:9]) <= TOLERANCE and (np.asarray(got[3:5]) == 0).all()
    own = pages.reshape(MAX_SEQS, -1)[2, :2]
    np.testing.assert_array_equal(np.asarray(cache)[own], want_cache[own])
    assert np.isfinite(np.asarray(cache)).all(-1).sum() == 17 + 7 + 30  # one new token took the place of an old one


@pytest.mark.usefixtures("all_optimizations")
def test_donated_cache_is_not_copied():
    """float32: XLA of jax 0.10 widens a bfloat16 scatter on the CPU, the whole pool with it."""
    *arrays, cache, kv_lens, pages, starts, distribution = make(MIXES["full"])
    pool = jax.ShapeDtypeStruct((1000, PAGE, 1, 576), cache.dtype)
    run = jax.jit(functools.partial(mla_ragged_paged_attention, sm_scale=SCALE), donate_argnums=4)
    compiled = run.lower(*arrays, pool, kv_lens, pages, starts, distribution).compile()
    assert not re.search(r"\[1000,16,1,576\]\S* (copy|convert|select|transpose)\(", compiled.as_text())
    assert compiled.memory_analysis().alias_size_in_bytes == 1000 * PAGE * 576 * 4


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_heads_on_four_devices(kind):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,), devices=jax.devices("cpu")[:4])
    heads = P(None, "x")
    in_specs = (heads, heads, *[P()] * 7)
    call = functools.partial(mla_ragged_paged_attention, sm_scale=SCALE)
    run = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=in_specs, out_specs=(heads, P())))
    args = make(MIXES["decode_and_prompts"])
    placed = [jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)) for x, spec in zip(args, in_specs)]
    check(args, run=lambda *_: jax.device_get(run(*placed)))


def test_batches_on_four_devices():
    """Every device has a ragged batch and a pool of its own: each alone."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:4])
    call = functools.partial(mla_ragged_paged_attention, sm_scale=SCALE)
    run = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=P("x"), out_specs=P("x")))
    batches = [make(MIXES[name]) for name in ("full", "nothing", "decode", "one_prompt")]
    out, cache = jax.device_get(run(*map(np.concatenate, zip(*batches))))
    for i, args in enumerate(batches):
        check(args, run=lambda *_, i=i: (np.split(out, 4)[i], np.split(cache, 4)[i]))


def test_forward_only():
    args = make(MIXES["full"], dtype=jnp.bfloat16)
    loss = lambda q: step(q, *args[1:])[0].astype(jnp.float32).sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match=r"dense_decode is forward-only.*implementation='xla'"):
        jax.grad(loss)(args[0])


def test_example_in_the_docstring():
    import doctest

    assert doctest.testmod(ragged).failed == 0


NAMES = "ql_nope", "q_pe", "new_kv_c", "new_k_pe", "cache", "kv_lens", "page_indices", "cu_q_lens", "distribution"


def f(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


i32 = functools.partial(f, dtype=np.int32)
REFUSED = [
    (dict(ql_nope=[1.0]), TypeError, "ql_nope must be an array"),
    (dict(ql_nope=f(24, 4, 448)), ValueError, r"ql_nope must have shape \[tokens, h_q, 512\] = \(24, 4, 512\), got \(24, 4, 448\)"),
    (dict(ql_nope=f(24, 4, 512, dtype=np.int8)), TypeError, "ql_nope must be bfloat16 or float16 or float32, got int8"),
    (dict(q_pe=f(24, 5, 64)), ValueError, r"q_pe must have shape .* = \(24, 4, 64\), got \(24, 5, 64\)"),
    (dict(q_pe=f(24, 4, 64, dtype=np.float16)), TypeError, "q_pe must be float32, got float16"),
    (dict(new_kv_c=f(23, 512)), ValueError, r"new_kv_c must have shape \[tokens, 512\] = \(24, 512\).*every new token"),
    (dict(new_k_pe=f(24, 32)), ValueError, r"new_k_pe must have shape \[tokens, 64\]"),
    (dict(cache=f(3, 16, 2, 576)), ValueError, r"cache must have shape \[P, page_size, 1, 576\].*got \(3, 16, 2, 576\)"),
    (dict(cache=f(0, 16, 1, 576)), ValueError, "at least one page"),
    (dict(cache=f(3, 16, 1, 640)), ValueError, r"cache must have shape \[P, page_size, 1, 576\]"),
    (dict(cache=f(3, 16, 1, 576, dtype=np.float16)), TypeError, "cache must be float32, got float16"),
    (dict(cache=f(3, 48, 1, 576)), ValueError, r"page_size of \(16, 32, 64, 128, 256\)"),
    (dict(kv_lens=i32(5, 1)), ValueError, r"kv_lens must have the axes \[max_seqs\]"),
    (dict(kv_lens=i32(0), cu_q_lens=i32(1)), ValueError, "kv_lens must have room for at least one sequence"),
    (dict(page_indices=i32(16)), ValueError, r"page_indices must have max_seqs \* pages_per_seq entries, got shape \(16,\) for max_seqs = 5"),
    (dict(page_indices=f(15)), TypeError, "page_indices must be int32, got float32"),
    (dict(cu_q_lens=i32(5)), ValueError, r"cu_q_lens must have shape \[max_seqs \+ 1\] = \(6,\), got \(5,\)"),
    (dict(distribution=i32(2)), ValueError, r"distribution must have shape \[3\] = \(3,\), got \(2,\)"),
    (dict(sm_scale=-1.0), ValueError, "sm_scale must be finite in float32 and >= 0, got -1.0"),
    (dict(implementation="pallas"), ValueError, "implementation must be None, 'cuda' or 'xla'"),
]  # fmt: skip


@pytest.mark.parametrize("changed, error, match", REFUSED, ids=[f"{'-'.join(r[0])}-{i}" for i, r in enumerate(REFUSED)])
def test_refusals(changed, error, match):
    options = dict(sm_scale=SCALE) | {k: v for k, v in changed.items() if k not in NAMES}
    arrays = dict(zip(NAMES, make(MIXES["full"]))) | {k: v for k, v in changed.items() if k in NAMES}
    with pytest.raises(error, match=match):
        jax.eval_shape(functools.partial(mla_ragged_paged_attention, **options), **arrays)


def test_no_tokens_are_refused():
    arguments = dict(zip(NAMES, make(MIXES["full"])))
    empty = {name: arguments[name][:0] for name in NAMES[:4]}
    with pytest.raises(ValueError, match="ql_nope must have at least one token and one head"):
        mla_ragged_paged_attention(**(arguments | empty), sm_scale=SCALE)
