"""Ops on a mesh of fake CPU devices: equal to one device in every layout, no collective but those that must be."""

# ruff: noqa: E501 - a table, one line per refusal

import contextlib
import doctest
import functools
import math
import os
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jax_flashmla import flash_mla_with_kvcache, get_mla_metadata, kvcache, sharding, testing
from jax_flashmla.cases import Case
from jax_flashmla.ops.dense_decode import TARGET as DECODE
from jax_flashmla.ops.schedule import TARGET as SCHEDULE
from jax_flashmla.sharding import MLAMesh

pytestmark = pytest.mark.usefixtures("small_chunks")

# Nothing, less than a page, whole pages, around their edges, and more pages than any number of devices.
LENGTHS = (0, 1, 15, 16, 17, 140, 64, 201)
PAGE, MAX_PAGES, B, H_Q = 16, 16, 8, 8
# float32: sums of 576 products and of 200 keys, in another order than float64's.
TOLERANCE = 2e-5

# The size of the axis of each role. "heads+context" is one axis with two roles; "idle" has none.
LAYOUTS = {
    "heads": {"heads": 4},
    "batch": {"batch": 4},
    "context": {"context": 4},
    "one_axis": {"heads+context": 4},
    "batch_heads": {"batch": 2, "heads": 2},
    "batch_context": {"batch": 2, "context": 2},
    "heads_context": {"heads": 2, "context": 2},
    "batch_one_axis": {"batch": 2, "heads+context": 2},
    "idle": {"idle": 2, "context": 2},
    "heads_8": {"heads": 8},
    "batch_8": {"batch": 8},
    "context_8": {"context": 8},
    "one_axis_8": {"heads+context": 8},
    "all_roles_8": {"batch": 2, "context": 2, "heads": 2},
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
CASES = {
    "one_token": Case("one_token", LENGTHS, h_q=H_Q, page_size=PAGE, causal=True, dtype="float32"),
    "causal": Case("causal", LENGTHS, s_q=3, h_q=H_Q, page_size=PAGE, causal=True, dtype="float32"),
    "not_causal": Case("not_causal", LENGTHS, s_q=3, h_q=H_Q, page_size=PAGE, dtype="float32"),
}


def mesh_of(layout, kind=AxisType.Auto, pages_per_run=1, devices=None):
    sizes = LAYOUTS[layout] if isinstance(layout, str) else layout
    names = tuple(f"axis of {roles}" for roles in sizes)
    devices = (devices or jax.devices("cpu"))[: math.prod(sizes.values())]
    mesh = jax.make_mesh(tuple(sizes.values()), names, axis_types=(kind,) * len(names), devices=devices)
    roles = {role: name for roles, name in zip(sizes, names) for role in roles.split("+") if role != "idle"}
    return MLAMesh(mesh, **roles, pages_per_run=pages_per_run)


def distribute(inputs, mesh):
    """The pool of one device as the pools of all: pages numbered anew on each, what is no key is NaN or absurd."""
    per_batch, shards = len(inputs.q) // mesh.size("batch"), mesh.size("context")
    pages, _ = np.nonzero(
        np.arange(inputs.block_table.shape[1]) * inputs.k_cache.shape[1] < inputs.cache_seqlens[:, None]
    )
    owned = [[] for _ in range(mesh.size("pages"))]
    for i, length in enumerate(inputs.cache_seqlens):
        for j in range(-(-int(length) // inputs.k_cache.shape[1])):
            owned[i // per_batch * shards + j // mesh.pages_per_run % shards].append((i, j))
    size = max(map(len, owned)) + 2
    assert sum(map(len, owned)) == len(pages)
    pools = np.full((len(owned), size, *inputs.k_cache.shape[1:]), np.nan, inputs.k_cache.dtype)
    table = inputs.block_table.copy()
    for device, mine in enumerate(owned):
        places = np.random.default_rng(device).permutation(size)
        for (i, j), place in zip(mine, places):
            pools[device, place] = inputs.k_cache[table[i, j]]
            table[i, j] = place
    return inputs._replace(k_cache=pools.reshape(-1, *inputs.k_cache.shape[1:]), block_table=table)


def place(mesh, inputs):
    names = "q", "k_cache", "block_table", "cache_seqlens"
    return [jax.device_put(x, mesh.sharding(name)) for name, x in zip(names, inputs)]


def attend_on(mesh, **options):
    def attend(q, k_cache, block_table, cache_seqlens):
        s_q, page_size = q.shape[1] if options.get("causal") else 1, k_cache.shape[1]
        plan = mesh.get_mla_metadata(cache_seqlens, q.shape[1] * q.shape[2], 1, s_q=s_q, page_size=page_size)
        return mesh.flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, 512, *plan, **options)

    return attend


@functools.cache
def jitted_attend_on(mesh, **options):
    """One function, so that it is compiled once for a mesh and shapes."""
    return jax.jit(attend_on(mesh, **options))


def check(mesh, inputs, expected, tolerance=TOLERANCE, distributed=None, **options):
    got = jitted_attend_on(mesh, **options)(*place(mesh, distributed or distribute(inputs, mesh)))
    for name, x, exact in zip(("out", "softmax_lse"), got, expected):
        assert x.sharding.is_equivalent_to(mesh.sharding(name), x.ndim)
        assert testing.max_error(jax.device_get(x), exact) <= tolerance


@functools.cache
def batch(name):
    inputs = testing.make_inputs(CASES[name], max_pages=MAX_PAGES)
    return inputs, testing.dense_decode_f64(*inputs, causal=CASES[name].causal)


@every_layout
def test_equal_to_one_device(layout):
    inputs, expected = batch("causal")
    check(mesh_of(layout), inputs, expected, causal=True)


@pytest.mark.parametrize("layout", ["heads", "batch_context", "one_axis", "context_8"])
def test_one_query_token(layout):
    inputs, expected = batch("one_token")
    check(mesh_of(layout), inputs, expected, causal=True)


@pytest.mark.parametrize("layout", ["batch_heads", "one_axis", "all_roles_8"])
def test_without_a_mask(layout):
    inputs, expected = batch("not_causal")
    check(mesh_of(layout), inputs, expected)


@pytest.mark.parametrize(
    "layout, is_set", [("batch_heads", False), ("batch_heads", True), ("one_axis", True), ("all_roles_8", False)]
)
def test_explicit_axes(layout, is_set):
    inputs, expected = batch("causal")
    mesh = mesh_of(layout, AxisType.Explicit)
    with jax.set_mesh(mesh.mesh) if is_set else contextlib.nullcontext():
        check(mesh, inputs, expected, causal=True)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_arrays_that_lie_elsewhere_are_moved(kind):
    """numpy into a jit; arrays of one device without one, where the many steps of a context are compiled one by one."""
    inputs, expected = batch("one_token")
    mesh = mesh_of("batch_context", kind)
    apart = mesh if kind is AxisType.Explicit else mesh_of("batch_heads", kind)
    without_jit = functools.partial(apart.flash_mla_with_kvcache, head_dim_v=512, causal=True)
    for attend, arrays in (
        (jitted_attend_on(mesh, causal=True), distribute(inputs, mesh)),
        (without_jit, map(jnp.asarray, distribute(inputs, apart))),
    ):
        out, lse = jax.device_get(attend(*arrays))
        assert testing.max_error(out, expected[0]) <= TOLERANCE and testing.max_error(lse, expected[1]) <= TOLERANCE


@pytest.mark.parametrize("layout, pages_per_run", [("batch_one_axis", 2), ("context", 16)])
def test_runs_of_pages(layout, pages_per_run):
    """With 16 pages a run, the first device of the axis has everything."""
    inputs, expected = batch("causal")
    check(mesh_of(layout, pages_per_run=pages_per_run), inputs, expected, causal=True)


@pytest.mark.parametrize("layout, s_q", [("context_8", 18), ("one_axis_8", 1)])
def test_empty_shards(layout, s_q):
    """No sequence reaches all devices, most reach one, none anything; more query tokens than a page has, or than keys."""
    case = Case("", (0, 0, 3, 16, 0, 20, 1, 33), s_q=s_q, h_q=8, page_size=PAGE, causal=True, dtype="float32")
    inputs = testing.make_inputs(case, max_pages=3)
    mesh = mesh_of(layout)
    distributed = distribute(inputs, mesh)
    check(mesh, inputs, testing.dense_decode_f64(*inputs, causal=True), distributed=distributed, causal=True)
    nothing = inputs._replace(cache_seqlens=np.zeros(8, np.int32))
    distributed = distributed._replace(  # of the same shapes
        cache_seqlens=nothing.cache_seqlens, k_cache=np.full_like(distributed.k_cache, np.nan)
    )
    check(mesh, nothing, testing.dense_decode_f64(*nothing, causal=True), distributed=distributed, causal=True)


def test_lengths_beyond_the_table_are_clamped():
    inputs, _ = batch("causal")
    full = testing.make_inputs(Case("", (MAX_PAGES * PAGE,) * B, s_q=3, h_q=H_Q, page_size=PAGE, dtype="float32"))
    full = full._replace(q=inputs.q, block_table=full.block_table[:, :MAX_PAGES])
    expected = testing.dense_decode_f64(*full, causal=True)
    mesh = mesh_of("context")
    placed = distribute(full, mesh)._replace(cache_seqlens=np.full(B, 2**31 - 1, np.int32))
    out, lse = jitted_attend_on(mesh, causal=True)(*place(mesh, placed))
    assert testing.max_error(out, expected[0]) <= TOLERANCE and testing.max_error(lse, expected[1]) <= TOLERANCE


def test_no_pages_in_the_table():
    inputs, _ = batch("causal")
    mesh = mesh_of("context")
    empty = inputs._replace(
        block_table=inputs.block_table[:, :0], k_cache=np.full((8, PAGE, 1, 576), np.nan, np.float32)
    )
    out, lse = jax.jit(attend_on(mesh, causal=True))(*place(mesh, empty))
    assert (np.asarray(out) == 0).all() and (np.asarray(lse) == -np.inf).all()


@pytest.mark.parametrize("layout", ["context", "batch_context"])
def test_no_sequences(layout):
    mesh = mesh_of(layout)
    q, table, lengths = np.zeros((0, 3, H_Q, 576), np.float32), np.zeros((0, 4), np.int32), np.zeros(0, np.int32)
    cache = np.ones((8, PAGE, 1, 576), np.float32)
    out, lse = jax.jit(attend_on(mesh, causal=True))(q, cache, table, lengths)
    assert out.shape == (0, 3, H_Q, 512) and lse.shape == (0, H_Q, 3)
    rows, positions = np.zeros((0, 2, 576), np.float32), np.zeros((0, 2), np.int32)
    after = mesh.append_kv_cache(cache, rows[..., :512], rows[..., 512:], table, positions)
    np.testing.assert_array_equal(after, cache)


@pytest.mark.parametrize("layout", ["heads", "batch_context", "one_axis"])
def test_half_precision(layout):
    """Rounded once more than on one device where parts are joined: outputs up to 3 in bfloat16."""
    case = CASES["causal"]._replace(dtype="bfloat16")
    inputs = testing.make_inputs(case, max_pages=MAX_PAGES)
    expected = testing.dense_decode_f64(*inputs, causal=True)
    check(mesh_of(layout), inputs, expected, tolerance=4 * 2.0**-7, causal=True)


@pytest.mark.parametrize("layout, jit", [("batch_heads", lambda f: f), ("context", jax.jit), ("all_roles_8", jax.jit)])
def test_plans_are_those_of_each_device(layout, jit):
    """The reference needs no plan: every device's is compared with the one for the lengths that it must be for."""
    mesh, lengths, s_q = mesh_of(layout), np.array(LENGTHS, np.int32), 3
    options = {"num_q_tokens_per_head_k": s_q * H_Q, "num_heads_k": 1, "s_q": s_q, "page_size": PAGE}
    plan = jax.device_get(jit(functools.partial(mesh.get_mla_metadata, **options))(lengths))
    expected_of = jax.jit(functools.partial(get_mla_metadata, num_heads_k=1), static_argnums=1)
    per_batch, shards = B // mesh.size("batch"), mesh.size("context")
    for device, (metadata, splits) in enumerate(zip(*(np.split(x, mesh.size("pages")) for x in plan))):
        first, shard = device // shards * per_batch, device % shards
        local = lengths[first : first + per_batch]
        if mesh.context:
            # Whole pages of what the first query token sees.
            seen = [[p for p in range(max(n - s_q + 1, 0)) if p // PAGE % shards == shard] for n in local]
            local = np.array([len(keys) // PAGE * PAGE for keys in seen], np.int32)
        expected = expected_of(local, s_q * H_Q // mesh.size("heads"))
        np.testing.assert_array_equal(metadata, expected[0])
        np.testing.assert_array_equal(splits, expected[1])


COLLECTIVE = re.compile(r"(\w+)\[([\d,]*)\]\S* (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)")
COLLECTIVES = {
    "heads": set(),
    "batch": set(),
    "batch_heads": set(),
    "context": {"all-reduce"},
    "heads_context": {"all-reduce"},
    "all_roles_8": {"all-reduce"},
    "one_axis": {"all-gather", "all-reduce", "reduce-scatter"},
}


@pytest.mark.parametrize("layout", COLLECTIVES)
@pytest.mark.usefixtures("all_optimizations")
def test_no_collective_moves_a_pool(layout):
    """Neither attention nor the write of new rows: what moves is as small as queries and outputs."""
    mesh, pages = mesh_of(layout), 1000
    cache = jax.ShapeDtypeStruct(
        (pages * mesh.size("pages"), PAGE, 1, 576), "float32", sharding=mesh.sharding("k_cache")
    )
    table = np.zeros((B, MAX_PAGES), np.int32)

    def step(cache, q, rows, table, lengths):
        cache = mesh.append_kv_cache(cache, rows[..., :512], rows[..., 512:], table, lengths[:, None] - 1)
        return attend_on(mesh, causal=True)(q, cache, table, lengths), cache

    arrays = (np.zeros((B, 1, H_Q, 576), np.float32), np.zeros((B, 1, 576), np.float32), table, np.ones(B, np.int32))
    shardings = [mesh.sharding(name) for name in ("q", "x", "block_table", "cache_seqlens")]
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in zip(arrays, shardings)]
    compiled = jax.jit(step, donate_argnums=0).lower(cache, *arrays).compile()
    text = compiled.as_text()
    found = COLLECTIVE.findall(text)
    assert {kind for _, _, kind in found} == COLLECTIVES[layout]
    assert all(math.prod(map(int, filter(None, shape.split(",")))) <= B * H_Q * 576 for _, shape, _ in found)
    # The cache is written where it lies.
    assert not re.search(rf"\[{pages},16,1,576\]\S* (copy|convert|select|transpose)\(", text)
    assert compiled.memory_analysis().alias_size_in_bytes == pages * PAGE * 576 * 4


@pytest.mark.parametrize("layout, calls", [("batch_heads", 1), ("heads_context", 2), ("one_axis", 2)])
def test_lowers_for_cuda(layout, calls, cuda_build):
    """The kernel of every device has its heads and its sequences; that of the last keys has a sequence per token."""
    mesh = mesh_of(layout)
    inputs = distribute(testing.make_inputs(CASES["causal"]._replace(dtype="bfloat16")), mesh)
    text = jax.jit(attend_on(mesh, causal=True)).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(f"@{re.escape(DECODE)}", text)) == calls and f"@{SCHEDULE}" in text
    heads = H_Q if layout == "one_axis" else H_Q // mesh.size("heads")
    b = B // mesh.size("batch")
    assert f"tensor<{b}x3x{heads}x512xbf16>" in text
    assert (f"tensor<{3 * b}x1x{heads}x512xbf16>" in text) == (calls == 2)


@every_layout
def test_appends_where_the_keys_belong(layout):
    """Tokens of a sequence in any order; those that are none, beyond the table or on no page are written nowhere."""
    mesh = mesh_of(layout, pages_per_run=2)
    inputs = distribute(batch("one_token")[0], mesh)
    table = np.where(inputs.block_table > 1000, -1, inputs.block_table)
    positions = np.array([[n - 1, n // 2, -1, 2**31 - 1] for n in LENGTHS], np.int32)
    rows = np.random.default_rng(0).standard_normal((B, 4, 576), np.float32)
    local = len(inputs.k_cache) // mesh.size("pages")
    expected = inputs.k_cache.copy()
    for i, (length, some) in enumerate(zip(LENGTHS, positions)):
        for position, row in zip(some, rows[i]):
            if 0 <= position < length:
                shard = position // PAGE // 2 % mesh.size("context")
                device = i // (B // mesh.size("batch")) * mesh.size("context") + shard
                expected[device * local + table[i, position // PAGE], position % PAGE, 0] = row
    append = jax.jit(mesh.append_kv_cache, donate_argnums=0)
    cache = append(place(mesh, inputs)[1], rows[..., :512], rows[..., 512:], table, positions)
    assert cache.sharding.is_equivalent_to(mesh.sharding("k_cache"), 4)
    np.testing.assert_array_equal(cache, expected)


@pytest.mark.parametrize("layout", ["batch_heads", "context"])
@pytest.mark.parametrize("format", ["bf16", "fp8_v32"])
def test_append_in_a_format(format, layout):
    mesh = mesh_of(layout)
    shards = mesh.size("pages")
    rows = np.random.default_rng(0).standard_normal((2, 3, 576), np.float32)
    table, positions = np.array([[0], [1]], np.int32), np.array([[0, 3, 15], [2, 1, 63]], np.int32)
    cache = jax.device_put(kvcache.init_kv_cache(2 * shards, format), mesh.sharding("k_cache"))
    args = rows[..., :512], rows[..., 512:], table, positions
    append = jax.jit(functools.partial(mesh.append_kv_cache, format=format))
    cache = np.asarray(append(cache, *args)).view(np.uint8)
    slots = (table * 64 + positions).reshape(-1)
    one = kvcache.append_kv_cache(
        kvcache.init_kv_cache(2, format), rows[..., :512].reshape(6, 512), rows[..., 512:].reshape(6, 64), slots,
        format=format,
    )  # fmt: skip
    one = np.asarray(one).view(np.uint8)
    if "batch" in layout:  # pages 0 and 1 are on the devices of their sequences
        np.testing.assert_array_equal(cache[[0, 3]], one)
        assert not cache[[1, 2]].any()
    else:  # the first page of every sequence is on the first device
        np.testing.assert_array_equal(cache[:2], one)
        assert not cache[2:].any()


def test_a_decode_loop():
    """Write, then attend, as the carry of a scan, on three axes: as one device does."""
    mesh = mesh_of("all_roles_8")
    steps, pages = 20, 2
    keys = jax.random.split(jax.random.key(0))
    q, rows = jax.random.normal(keys[0], (steps, 4, 1, 8, 576)), jax.random.normal(keys[1], (steps, 4, 1, 576))
    table = np.array([[0, 1], [1, 0]] * 2, np.int32)  # on one device, pages of sequences 2 and 3 come behind these

    def loop(append, attend, cache, table, q, rows):
        def step(carry, now):
            cache, lengths = carry
            q, rows = now
            cache = append(cache, rows, table, lengths[:, None])
            out, lse = attend(q, cache, table, lengths + 1)
            return (cache, lengths + 1), (out, lse)

        return jax.lax.scan(step, (cache, jnp.array([0, 3, 0, 9], jnp.int32)), (q, rows))[1]

    def append_one(cache, rows, table, positions):
        slots = kvcache.slot_mapping(positions[:, 0], jnp.arange(4, dtype=jnp.int32), table, page_size=PAGE)
        return cache.at[slots // PAGE, slots % PAGE, 0].set(rows[:, 0])

    def append_on_mesh(cache, rows, table, positions):
        return mesh.append_kv_cache(cache, rows[..., :512], rows[..., 512:], table, positions)

    attend_one = functools.partial(flash_mla_with_kvcache, head_dim_v=512, causal=True)
    one_table = np.arange(8, dtype=np.int32).reshape(4, 2)
    zeros = jnp.zeros((4 * pages, PAGE, 1, 576))
    expected = jax.jit(functools.partial(loop, append_one, attend_one))(zeros, one_table, q, rows)
    on_mesh = functools.partial(loop, append_on_mesh, attend_on(mesh, causal=True))
    cache = jax.device_put(jnp.zeros((4 * 2, PAGE, 1, 576)), mesh.sharding("k_cache"))
    got = jax.jit(on_mesh)(cache, table, q, rows)
    for x, y in zip(got, expected):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=TOLERANCE)


WEIGHTS = np.random.default_rng(1).standard_normal((4, 2, 4, 512), np.float32)
BY_REFERENCE = {"causal": True, "implementation": "xla"}


def gradients(attend, q, cache, *args):
    f = jax.jit(jax.grad(lambda *x: (attend(*x, *args)[0] * WEIGHTS).sum(), (0, 1)))
    return jax.device_get(f(q, jax.device_put(np.nan_to_num(cache), getattr(cache, "sharding", None))))


@pytest.fixture(scope="module")
def one_device_gradients():
    case = Case("", (0, 17, 40, 70), s_q=2, h_q=4, page_size=PAGE, causal=True, dtype="float32")
    inputs = testing.make_inputs(case, max_pages=5)
    return inputs, gradients(functools.partial(flash_mla_with_kvcache, head_dim_v=512, **BY_REFERENCE), *inputs)


@pytest.mark.parametrize("layout", ["heads", "one_axis", "heads_context"])
def test_gradient_through_the_reference(layout, one_device_gradients):
    """Of queries and of the cache: sums over the devices that share them, around branches that some do not take."""
    (inputs, expected), mesh = one_device_gradients, mesh_of(layout)
    placed = distribute(inputs, mesh)
    got = gradients(attend_on(mesh, **BY_REFERENCE), *place(mesh, placed))
    local, tolerance = len(placed.k_cache) // mesh.size("pages"), 1e-5 * max(np.abs(x).max() for x in expected)
    np.testing.assert_allclose(got[0], expected[0], atol=tolerance)
    for i, length in enumerate(inputs.cache_seqlens):
        for j in range(-(-int(length) // PAGE)):
            page = j % mesh.size("context") * local + placed.block_table[i, j]
            np.testing.assert_allclose(got[1][page], expected[1][inputs.block_table[i, j]], atol=tolerance)


@pytest.mark.parametrize("layout", ["heads", "batch", "batch_heads"])
def test_sparse(layout):
    """Slots count from the first page of the device's pool; heads share them, and have sinks of their own."""
    mesh, rng = mesh_of(layout), np.random.default_rng(0)
    shards, pages = mesh.size("batch"), 3
    q = rng.standard_normal((B, 2, H_Q, 576), np.float32)
    cache = rng.standard_normal((shards * pages, PAGE, 1, 576), np.float32)
    indices = rng.integers(-1, pages * PAGE, (B, 2, 40), np.int32)
    sink, lengths = rng.standard_normal(H_Q, np.float32), rng.integers(0, 41, B, np.int32)

    def attend(op, q, cache, indices, sink, lengths):
        return op(q, cache, None, None, 512, indices=indices, attn_sink=sink, topk_length=lengths)

    own = np.arange(B, dtype=np.int32)[:, None, None] // (B // shards) * pages * PAGE
    shifted = np.where(indices >= 0, indices + own, -1)
    expected = jax.jit(functools.partial(attend, flash_mla_with_kvcache))(q, cache, shifted, sink, lengths)
    got = jax.jit(functools.partial(attend, mesh.flash_mla_with_kvcache))(q, cache, indices, sink, lengths)
    for x, y in zip(got, expected):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=TOLERANCE)


def test_another_attention():
    """`shard` passes on what was given, in the same way, for the share of every device."""
    inputs, expected = batch("one_token")
    mesh, seen = mesh_of("batch_heads"), []

    def attention(q, *args, **kwargs):
        seen.append((q.shape, len(args), kwargs["softmax_scale"]))
        return flash_mla_with_kvcache(q, *args, **kwargs)

    call = functools.partial(mesh.shard(attention), softmax_scale=None, causal=True)
    out, _ = jax.jit(lambda *arrays: call(*arrays, 512))(*distribute(inputs, mesh))
    assert testing.max_error(out, expected[0]) <= TOLERANCE and seen == [((4, 1, 4, 576), 4, None)]


@pytest.mark.parametrize("pages_per_run", [1, 3])
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_every_key_has_one_place(shards, pages_per_run):
    """Lengths, table and positions of all shards together, against a loop over keys."""
    length, layout = 37 * PAGE + 5, {"num_shards": shards, "pages_per_run": pages_per_run}
    table = np.arange(40, dtype=np.int32)[None]
    positions = np.arange(length, dtype=np.int32)
    found = np.full(length, -1)
    for shard in range(shards):
        held = sharding.context_lengths(np.array([length], np.int32), shard, page_size=PAGE, **layout)
        pages = np.asarray(sharding.context_block_table(table, shard, **layout))[0]
        places = np.asarray(sharding.context_positions(positions, shard, page_size=PAGE, **layout))
        own = places >= 0
        np.testing.assert_array_equal(places[own], np.arange(int(held[0])))
        assert (found[own] == -1).all()
        found[own] = pages[places[own] // PAGE]
    np.testing.assert_array_equal(found, positions // PAGE)


TWO_HOSTS = """
import sys
import jax, numpy as np
jax.distributed.initialize("localhost:{port}", num_processes=2, process_id=int(sys.argv[1]))
from jax_flashmla import testing
from jax_flashmla.cases import Case
from jax_flashmla.sharding import MLAMesh
assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
mesh = MLAMesh(jax.make_mesh((2, 2), ("context", "heads")), heads="heads", context="context")
assert [[device.process_index for device in row] for row in mesh.mesh.devices] == [[0, 0], [1, 1]]
inputs = testing.make_inputs(Case("", (40, 0, 7, 16), h_q=4, page_size=16, dtype="float32"))
# Every device of the context axis has all pages of this pool, and reads half of them.
pool = np.tile(inputs.k_cache, (2, 1, 1, 1))
def place(name, x):
    return jax.make_array_from_callback(x.shape, mesh.sharding(name), lambda index: x[index])
names = "q", "k_cache", "block_table", "cache_seqlens"
args = [place(name, x) for name, x in zip(names, inputs._replace(k_cache=pool))]
out, _ = jax.jit(lambda *args: mesh.flash_mla_with_kvcache(*args, 512))(*args)
exact, _ = testing.dense_decode_f64(*inputs)
error = max(testing.max_error(np.asarray(part.data), exact[part.index]) for part in out.addressable_shards)
print("error", error)
assert error <= 2e-5
"""


def test_two_processes():
    """Two hosts, as `jax.distributed` has them: a context over both, heads over the devices of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", TWO_HOSTS.replace("{port}", str(port))]
    options = {"env": {**os.environ, **flags}, "text": True, "stdout": -1, "stderr": subprocess.STDOUT}
    hosts = [subprocess.Popen([*command, str(i)], **options) for i in range(2)]
    try:
        outputs = [host.communicate(timeout=120)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], outputs


def on(layout, **changed):
    """A call of attention that is refused."""
    inputs, _ = batch("causal")
    arguments = {**inputs._asdict(), "head_dim_v": 512, "causal": True, **changed}
    return lambda: mesh_of(layout).flash_mla_with_kvcache(**arguments)


def planned(layout, b=B, rows=24, **options):
    return lambda: mesh_of(layout).get_mla_metadata(np.zeros(b, np.int32), rows, 1, **options)


def append(layout, **changed):
    rows = np.zeros((B, 1, 576), np.float32)
    arguments = {
        "cache": np.zeros((8, PAGE, 1, 576), np.float32), "latent": rows[..., :512], "rope": rows[..., 512:],
        "block_table": np.zeros((B, 2), np.int32), "positions": np.zeros((B, 1), np.int32), **changed,
    }  # fmt: skip
    return lambda: mesh_of(layout).append_kv_cache(**arguments)


def a_mesh(kinds=(AxisType.Auto,), **roles):
    names = ("x", "y")[: len(kinds)]
    return lambda: MLAMesh(jax.make_mesh((1,) * len(kinds), names, axis_types=kinds), **roles)


def f32(*shape):
    return np.zeros(shape, np.float32)


def i32(*shape):
    return np.zeros(shape, np.int32)


REFUSED = {
    "no_mesh": (lambda: MLAMesh("x"), TypeError, r"mesh must be a jax.sharding.Mesh, got str; use jax.make_mesh"),
    "no_axis": (a_mesh(heads="tp"), ValueError, r"heads must be one of the mesh's axes \('x',\) or None, got 'tp'"),
    "same_axis": (a_mesh(heads="x", batch="x"), ValueError, "batch and heads must be different axes, got 'x' for both"),
    "batch_context": (a_mesh(context="x", batch="x"), ValueError, "batch and context must be different axes"),
    "mixed": (a_mesh((AxisType.Auto, AxisType.Explicit)), ValueError, "mesh must have Auto axes or Explicit axes"),
    "no_run": (a_mesh(context="x", pages_per_run=0), ValueError, "pages_per_run must be"),
    "name": (lambda: mesh_of("heads").sharding("kv"), ValueError, "name must be one of q, k_cache.*got 'kv'"),
    "heads": (on("heads", q=f32(B, 3, 6, 576)), ValueError, "q must have h_q divisible by 4, the devices on 'axis of heads', got h_q = 6; pad the heads"),
    "batch": (on("batch", q=f32(6, 3, 8, 576), block_table=i32(6, 2), cache_seqlens=i32(6)), ValueError, "q must have b divisible by 4.*got b = 6; fill up with sequences of length 0"),
    "pages": (on("context", k_cache=f32(9, PAGE, 1, 576)), ValueError, "k_cache must have the first axis divisible by 4.*= 9; every device has a pool"),
    "h_kv": (on("heads", k_cache=f32(8, PAGE, 2, 576)), ValueError, "k_cache must have h_kv = 1 where heads are divided"),
    "dtype": (on("heads", k_cache=np.zeros((8, PAGE, 1, 576), np.float16)), TypeError, "k_cache must have q's dtype float32, got float16"),
    "list": (on("heads", block_table=[[0]]), TypeError, "block_table must be an array .*got list; use jnp.asarray"),
    "lengths": (on("batch", cache_seqlens=i32(4)), ValueError, r"cache_seqlens must have shape \[b\] = \(8,\), got \(4,\)"),
    "one_device_plan": (on("context", k_cache=f32(8, PAGE, 1, 576), tile_scheduler_metadata=i32(4, 8), num_splits=i32(9)), ValueError, r"num_splits must have shape .* = \(36,\), got \(9,\); .*the mesh's get_mla_metadata|num_splits must have the first axis divisible by 4"),
    "half_a_plan": (on("batch", k_cache=f32(8, PAGE, 1, 576), num_splits=i32(12)), ValueError, "must be given together"),
    "sparse_context": (on("context", causal=False, indices=i32(B, 3, 4)), NotImplementedError, "indices are not supported with a context axis; divide heads or the batch"),
    "sparse_list": (on("heads", causal=False, indices=[[[0]]]), TypeError, "indices must be an array, got list"),
    "sparse_batch": (on("batch", causal=False, k_cache=f32(8, PAGE, 1, 576), indices=i32(6, 3, 4)), ValueError, "indices must have b divisible by 4"),
    "sink": (on("heads", causal=False, indices=i32(B, 3, 4), attn_sink=f32()), ValueError, "attn_sink must"),
    "cuda": (on("heads", k_cache=f32(8, PAGE, 1, 576), implementation="pallas"), ValueError, "implementation must be None"),
    "unknown": (on("heads", scale=1.0), TypeError, "scale"),
    "plan_batch": (planned("batch", b=6), ValueError, "cache_seqlens must have b divisible by 4"),
    "plan_heads": (planned("heads", rows=6), ValueError, r"num_q_tokens_per_head_k must have s_q \* h_q // h_kv divisible by 4"),
    "plan_page": (planned("context"), ValueError, "page_size must be the pool's where a context axis divides sequences"),
    "append_shape": (append("heads", positions=i32(B, 2)), ValueError, r"positions must have shape \[b, s\] = \(8, 1\)"),
    "append_rope": (append("heads", rope=f32(B, 1, 32)), ValueError, r"rope must have shape \[b, s, 64\]"),
    "append_pages": (append("context", cache=f32(6, PAGE, 1, 576)), ValueError, "cache must have the first axis divisible by 4"),
    "append_batch": (append("batch_8", cache=f32(8, PAGE, 1, 448)), ValueError, "cache must have shape"),
    "append_format": (append("heads", format="fp4"), ValueError, "format must be one of"),
    "run_too_long": (lambda: sharding.context_lengths(i32(1), 0, 2, page_size=64, pages_per_run=2**30), ValueError, r"pages_per_run must keep .* below 2\*\*31"),
    "no_shards": (lambda: sharding.context_block_table(i32(1, 2), 0, 0), ValueError, "num_shards must be"),
    "positions": (lambda: sharding.context_positions(f32(3), 0, 2, page_size=64), TypeError, "positions must be int32"),
    "shard_behind": (lambda: sharding.context_lengths(i32(1), 2, 2, page_size=64), ValueError, "shard must be below num_shards = 2, got 2"),
    "shard_before": (lambda: sharding.context_block_table(i32(1, 2), -1, 2), ValueError, "shard must be at least 0, got -1"),
    "no_shard": (lambda: sharding.context_positions(i32(3), None, 2, page_size=64), TypeError, "shard must be an int, got NoneType"),
    "shard_array": (lambda: sharding.context_block_table(i32(1, 2), f32(), 2), TypeError, "shard must be one integer, got float32"),
    "cache_list": (append("heads", cache=[f32(8, PAGE, 1, 576)], format="bf16"), TypeError, "cache must be an array .*got list"),
    "no_pool": (on("heads", causal=False, k_cache=None, indices=i32(B, 3, 4)), TypeError, "k_cache must be an array .*got NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("call, error, match", REFUSED.values(), ids=REFUSED)
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_examples_in_the_docstrings():
    assert doctest.testmod(sharding).failed == 0


@pytest.mark.gpu
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("role", ["heads", "batch", "context", "heads+context"])
def test_several_gpus(role, count):
    """The kernel on every GPU, parts joined through NCCL: as exact as on one GPU."""
    devices = jax.devices("cuda")
    if len(devices) < count:
        pytest.skip(f"needs {count} GPUs: this machine has {len(devices)}")
    mesh = mesh_of({role: count}, devices=devices)
    for s_q in (1, 2):
        case = Case("", (517, 0, 1023, 64, 330, 1, 771, 4096), s_q=s_q, h_q=128, causal=True)
        inputs = testing.make_inputs(case)
        exact_out, exact_lse = testing.dense_decode_f64(*inputs, causal=True)
        options = {"causal": True, "implementation": "cuda"}
        one = jax.jit(functools.partial(flash_mla_with_kvcache, head_dim_v=512, **options))(*inputs)
        got = jax.device_get(jax.jit(attend_on(mesh, **options))(*place(mesh, distribute(inputs, mesh))))
        # Parts come in bfloat16, and are rounded again once they are joined.
        assert testing.max_error_ratio(got[0], np.asarray(one[0]), exact_out) <= 3
        assert testing.max_error(got[1], exact_lse) <= 1e-4
