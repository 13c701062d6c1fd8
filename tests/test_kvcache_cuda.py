"""The CUDA kernels of the cache operations: the bytes of the jnp twin, in place, and nothing else touched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla import kvcache

pytestmark = pytest.mark.gpu

POOLS = {  # format, width of a plain row, padded
    "bf16": ("bf16", 576, False),
    "bf16_512": ("bf16", 512, False),
    "f16": ("f16", 576, False),
    "fp8_v32": ("fp8_v32", None, False),
    "fp8_v4": ("fp8_v4", None, False),
    "fp8_v4_padded": ("fp8_v4", None, True),
}
every_pool = pytest.mark.parametrize("name", POOLS)


def make_pool(rng, name, num_pages, page_size):
    format, head_dim, padded = POOLS[name]
    shape = kvcache.layout(format, head_dim).pool_shape(num_pages, page_size, padded=padded)
    if format.startswith("fp8"):
        return rng.integers(0, 256, shape, np.uint8)
    return rng.standard_normal(shape, np.float32).astype(kvcache.FORMATS[format].dtype)


def make_rows(rng, name, t, dtype=jnp.bfloat16):
    channels = kvcache.layout(*POOLS[name][:2])["latent"].count
    size = np.exp2(rng.uniform(-16, 12, (t, channels // 64))).repeat(64, -1)
    return (rng.standard_normal((t, channels)) * size).astype(dtype), rng.standard_normal((t, 64)).astype(dtype)


def on_cpu(f, *args):
    with jax.default_device(jax.devices("cpu")[0]):
        return np.asarray(f(*args))


def append(name, implementation="cuda"):
    return functools.partial(kvcache.append_kv_cache, format=POOLS[name][0], implementation=implementation)


def gather(name, total, implementation="cuda"):
    return functools.partial(kvcache.gather_kv_cache, total=total, format=POOLS[name][0], implementation=implementation)


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16, jnp.float32), ids=lambda d: d.__name__)
@pytest.mark.parametrize("page_size", (2, 16, 64, 69))
@every_pool
def test_append(name, page_size, dtype):
    rng = np.random.default_rng(page_size)
    num_pages = 700 // page_size
    tokens = num_pages * page_size
    cache = make_pool(rng, name, num_pages, page_size)
    nowhere = np.tile([-1, -tokens, -(2**31), tokens, 2**31 - 1], 30)
    slots = rng.permutation(np.concatenate([rng.permutation(tokens)[:500], nowhere])).astype(np.int32)
    latent, rope = make_rows(rng, name, len(slots), dtype)
    if dtype == jnp.float16 and name.startswith("fp8"):
        latent[:3, ::5], latent[:3, 1::70] = np.inf, np.nan
    got = np.asarray(jax.jit(append(name))(*map(jnp.asarray, (cache, latent, rope, slots))))
    expected = on_cpu(append(name, "xla"), cache, latent, rope, slots)
    np.testing.assert_array_equal(got.view(np.uint8), expected.view(np.uint8))


def test_append_of_nothing():
    cache = jnp.ones((2, 16, 1, 656), jnp.uint8)
    empty = jnp.zeros((0, 512)), jnp.zeros((0, 64)), jnp.zeros(0, jnp.int32)
    assert (append("fp8_v32")(cache, *empty) == cache).all()


@pytest.mark.parametrize("format", ("fp8_v32", "fp8_v4"))
def test_pools_of_float8(format):
    rng = np.random.default_rng(0)
    raw = make_pool(rng, format, 3, 8)
    latent, rope = make_rows(rng, format, 3)
    slots = jnp.array([5, -1, 17], jnp.int32)
    table, lengths = jnp.array([[2, 0]], jnp.int32), jnp.array([15], jnp.int32)
    results = []
    for cache in (jnp.asarray(raw), jax.lax.bitcast_convert_type(jnp.asarray(raw), jnp.float8_e4m3fn)):
        cache = append(format)(cache, latent, rope, slots)
        rows = gather(format, 20)(cache, table, lengths)
        results.append((np.asarray(cache).view(np.uint8), np.asarray(rows).view(np.uint16)))
    for x, y in zip(*results):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("total", (1, 400, 9000))
@pytest.mark.parametrize("page_size", (2, 16, 64, 69))
@every_pool
def test_gather(name, page_size, total):
    """Few rows, and so many that a CTA has several a warp; hostile tables and lengths; more than 256 sequences."""
    rng = np.random.default_rng(page_size)
    num_pages = 700 // page_size
    tokens = num_pages * page_size
    latent, rope = make_rows(rng, name, tokens)
    every = np.arange(tokens, dtype=np.int32)
    cache = append(name, "xla")(make_pool(rng, name, num_pages, page_size), latent, rope, every)
    table = rng.integers(-1, num_pages + 1, (300, 3)).astype(np.int32)
    lengths = rng.integers(-3, 3 * page_size, 300).astype(np.int32)
    lengths[[200, 250]] = 2**31 - 1
    got = np.asarray(jax.jit(gather(name, total))(*map(jnp.asarray, (cache, table, lengths))))
    expected = on_cpu(gather(name, total, "xla"), np.asarray(cache), table, lengths)
    np.testing.assert_array_equal(got.view(np.uint16), expected.view(np.uint16))


def test_gather_of_no_sequence():
    cache = jnp.ones((2, 16, 1, 656), jnp.uint8)
    rows = gather("fp8_v32", 5)(cache, jnp.zeros((0, 3), jnp.int32), jnp.zeros(0, jnp.int32))
    assert rows.shape == (5, 576) and not rows.any()


def test_vmap():
    """Pools of their own, and one pool with a table per element: one launch each, as without vmap."""
    rng = np.random.default_rng(0)
    caches = np.stack([make_pool(rng, "fp8_v32", 2, 4) for _ in range(3)])
    latent, rope = make_rows(rng, "fp8_v32", 6)
    slots = np.array([[1, -1], [7, 0], [8, 3]], np.int32)
    operands = tuple(map(jnp.asarray, (caches, latent.reshape(3, 2, 512), rope.reshape(3, 2, 64), slots)))
    got = jax.vmap(append("fp8_v32"))(*operands)
    np.testing.assert_array_equal(got, jax.vmap(append("fp8_v32", "xla"))(*operands))
    table, lengths = jnp.array([[0, 1]], jnp.int32), jnp.array([[3], [8], [0]], jnp.int32)
    for axes, cache in (((None, None, 0), got[0]), ((0, None, 0), got)):
        rows, expected = (
            np.asarray(jax.vmap(gather("fp8_v32", 8, which), in_axes=axes)(cache, table, lengths)).astype(np.float32)
            for which in ("cuda", "xla")
        )
        np.testing.assert_array_equal(rows, expected)


# In place


def one_cache(write, cache):
    return write(cache, 0)


def loop_carry(write, cache):
    return jax.lax.fori_loop(0, 3, lambda i, cache: write(cache, i), cache)


def flat_pool_in_scan(write, cache):
    """Two layers of 500 pages."""
    layers = jnp.arange(2, dtype=jnp.int32)
    return jax.lax.scan(lambda cache, i: (write(cache, i * 500 * 64), None), cache, layers)[0]


@pytest.mark.parametrize("program", (one_cache, loop_carry, flat_pool_in_scan), ids=lambda f: f.__name__)
@every_pool
def test_in_place(name, program):
    """The result is the buffer that was donated, and the program has no room for another cache."""
    rng = np.random.default_rng(0)
    cache = jnp.asarray(make_pool(rng, name, 1000, 64))
    latent, rope = map(jnp.asarray, make_rows(rng, name, 4))
    slots = jnp.array([70, -1, 31000, 3], jnp.int32)

    def step(implementation, cache, latent, rope, slots):
        def write(cache, first):
            at = jnp.where(slots < 0, -1, slots + jnp.asarray(first, jnp.int32))
            return append(name, implementation)(cache, latent, rope, at)

        return program(write, cache)

    expected = np.asarray(jax.jit(functools.partial(step, "xla"))(cache, latent, rope, slots))
    step = jax.jit(functools.partial(step, "cuda"), donate_argnums=0)
    compiled = step.lower(cache, latent, rope, slots).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20 < cache.nbytes
    where = cache.unsafe_buffer_pointer()
    got = compiled(cache, latent, rope, slots)
    assert got.unsafe_buffer_pointer() == where and cache.is_deleted()
    np.testing.assert_array_equal(np.asarray(got).view(np.uint8), expected.view(np.uint8))


def test_stacked_caches_in_scan():
    """A layer's cache is a slice of what the scan reads, the result one of what it writes: not the same buffer."""
    rng = np.random.default_rng(0)
    caches = jnp.stack([jnp.asarray(make_pool(rng, "fp8_v32", 4, 64)) for _ in range(3)])
    latent, rope = (jnp.asarray(x).reshape(3, 2, -1) for x in make_rows(rng, "fp8_v32", 6))
    slots = jnp.array([70, -1], jnp.int32)

    def step(implementation, caches, latent, rope):
        write = append("fp8_v32", implementation)
        return jax.lax.scan(lambda _, layer: (None, write(*layer, slots)), None, (caches, latent, rope))[1]

    expected = np.asarray(jax.jit(functools.partial(step, "xla"))(caches, latent, rope))
    np.testing.assert_array_equal(jax.jit(functools.partial(step, "cuda"))(caches, latent, rope), expected)


def test_list_per_layer_in_place():
    rng = np.random.default_rng(0)
    caches = [jnp.asarray(make_pool(rng, "fp8_v32", 1000, 64)) for _ in range(3)]
    latent, rope = map(jnp.asarray, make_rows(rng, "fp8_v32", 2))
    slots = jnp.array([70, 8], jnp.int32)
    step = jax.jit(lambda caches, *new: [append("fp8_v32")(cache, *new) for cache in caches], donate_argnums=0)
    where = [cache.unsafe_buffer_pointer() for cache in caches]
    assert [cache.unsafe_buffer_pointer() for cache in step(caches, latent, rope, slots)] == where


def test_without_donation_the_old_cache_stays():
    rng = np.random.default_rng(0)
    before = make_pool(rng, "fp8_v32", 4, 64)
    cache = jnp.asarray(before)
    new = (*map(jnp.asarray, make_rows(rng, "fp8_v32", 1)), jnp.array([9], jnp.int32))
    got = jax.jit(append("fp8_v32"))(cache, *new)
    np.testing.assert_array_equal(cache, before)
    np.testing.assert_array_equal(got, jax.jit(append("fp8_v32"), donate_argnums=0)(cache, *new))


def test_write_then_read_in_one_program():
    """Chained in one jit, over and over: a kernel starts before its predecessor ends, and reads what that wrote."""
    rng = np.random.default_rng(0)
    cache = jnp.zeros((64, 64, 1, 656), jnp.uint8)
    table, lengths = jnp.arange(64, dtype=jnp.int32)[None], jnp.array([4096], jnp.int32)
    latent, rope = map(jnp.asarray, make_rows(rng, "fp8_v32", 4096))

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, cache, latent, rope):
        for i in range(6):
            slots = jnp.roll(jnp.arange(4096, dtype=jnp.int32), 100 * i)
            cache = append("fp8_v32", implementation)(cache, latent, rope, slots)
            rows = gather("fp8_v32", 4096, implementation)(cache, table, lengths)
            latent, rope = rows[:, :512] * 1.5, rows[:, 512:]
        return cache, rows

    for got, expected in zip(run("cuda", cache, latent, rope), run("xla", cache, latent, rope)):
        np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(expected).view(np.uint8))
