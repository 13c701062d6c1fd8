"""Caches against bytes built by hand, pages against a simple model, and in-place writes in compiled programs."""

# ruff: noqa: C408, E501 - tables, one line per refusal

import functools
import math
import re
import struct
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_flashmla import kvcache

drawn = functools.partial(settings, deadline=None, derandomize=True)
BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
LATENT = {"bf16": 512, "f16": 512, "fp8_v32": 512, "fp8_v4": 448}
DTYPE = {"bf16": BF16, "f16": np.float16, "fp8_v32": np.uint8, "fp8_v4": np.uint8}
every_format = pytest.mark.parametrize("format", LATENT)
any_pool = st.sampled_from([("bf16", False), ("f16", False), ("fp8_v32", False), ("fp8_v4", False), ("fp8_v4", True)])


def scale_of(tile):
    """The writers' rule in float64."""
    amax = max([abs(float(x)) for x in tile if math.isfinite(x)], default=0.0)
    return 2.0 ** math.ceil(math.log2(max(amax / 448, 1e-4)))


def token_bytes(format, latent, rope):
    """One token's bytes: plane after plane, each field after the other."""
    if format in ("bf16", "f16"):
        return [np.concatenate([latent, rope]).astype(DTYPE[format]).tobytes()]
    tiles = latent.astype(np.float64).reshape(-1, 128 if format == "fp8_v32" else 64)
    scales = [scale_of(tile) for tile in tiles]
    with np.errstate(invalid="ignore"):
        codes = (tiles / np.array(scales)[:, None]).astype(np.float32).astype(E4M3).view(np.uint8).ravel()
    codes[~np.isfinite(latent.astype(np.float64))] = 0x7F
    rope = rope.astype(BF16).tobytes()
    if format == "fp8_v32":
        return [codes.tobytes() + struct.pack("<4f", *scales) + rope]
    return [codes.tobytes() + rope, bytes(int(math.log2(s)) + 127 for s in scales) + b"\0"]


def page_stride(format, page_size, padded):
    size = page_size * {"bf16": 1152, "f16": 1152, "fp8_v32": 656, "fp8_v4": 584}[format]
    return -(-size // 576) * 576 if padded else size


def poke(pool, format, page_size, slot, latent, rope):
    """Writes a token into `pool`, uint8 [P, bytes of a page]."""
    page, offset = divmod(slot, page_size)
    start = 0
    for plane in token_bytes(format, latent, rope):
        at = start + offset * len(plane)
        pool[page, at : at + len(plane)] = np.frombuffer(plane, np.uint8)
        start += page_size * len(plane)


def as_pool(raw, format, page_size, padded):
    """Raw bytes [P, bytes of a page] as the array that users hold."""
    if padded:
        return raw.copy()
    return np.ascontiguousarray(raw).view(DTYPE[format]).reshape(len(raw), page_size, 1, -1)


def raw_of(cache):
    return np.ascontiguousarray(np.asarray(cache)).view(np.uint8).reshape(len(cache), -1)


def keys_of(raw, format, page_size, slot):
    """Reads a token back, in float64 rounded once to bfloat16."""
    page, offset = divmod(slot, page_size)
    if format in ("bf16", "f16"):
        return raw[page, offset * 1152 : (offset + 1) * 1152].view(DTYPE[format])
    if format == "fp8_v32":
        row = raw[page, offset * 656 : (offset + 1) * 656]
        codes, scales, rope = row[:512], row[512:528].copy().view(np.float32), row[528:]
    else:
        row = raw[page, offset * 576 : (offset + 1) * 576]
        codes, rope = row[:448], row[448:]
        at = page_size * 576 + offset * 8
        scales = raw[page, at : at + 7].view(ml_dtypes.float8_e8m0fnu)
    values = codes.view(E4M3).astype(np.float64) * np.repeat(scales.astype(np.float64), 512 // len(scales) // 64 * 64)
    return np.concatenate([values.astype(np.float32).astype(BF16), rope.copy().view(BF16)])


def random_rows(rng, t, format, dtype=BF16, spread=12):
    """Tiles of very different size; spread 12 goes far below and above the smallest scale."""
    latent = rng.standard_normal((t, LATENT[format])) * np.exp2(
        rng.uniform(-spread, spread, (t, LATENT[format] // 64))
    ).repeat(64, -1)
    return latent.astype(dtype), rng.standard_normal((t, 64)).astype(dtype)


# Compiled once for each shape, whichever test calls.
quantize, dequantize = (jax.jit(f, static_argnames="format") for f in (kvcache.quantize_kv, kvcache.dequantize_kv))
append = jax.jit(kvcache.append_kv_cache, static_argnames="format")
gather = jax.jit(kvcache.gather_kv_cache, static_argnames=("total", "format"))
slot_mapping, topk_to_slots = (
    jax.jit(f, static_argnames="page_size") for f in (kvcache.slot_mapping, kvcache.topk_to_slots)
)
copy_pages = jax.jit(kvcache.copy_pages)


# The formats


def test_byte_tables():
    table = {
        name: [(f.plane, f.offset, f.nbytes, f.name, f.dtype) for f in fmt.fields]
        for name, fmt in kvcache.FORMATS.items()
    }
    e4m3 = "float8_e4m3fn"
    assert table == {
        "bf16": [(0, 0, 1024, "latent", "bfloat16"), (0, 1024, 128, "rope", "bfloat16")],
        "f16": [(0, 0, 1024, "latent", "float16"), (0, 1024, 128, "rope", "float16")],
        "fp8_v32": [(0, 0, 512, "latent", e4m3), (0, 512, 16, "scale", "float32"), (0, 528, 128, "rope", "bfloat16")],
        "fp8_v4": [
            (0, 0, 448, "latent", e4m3),
            (0, 448, 128, "rope", "bfloat16"),
            (1, 0, 7, "scale", "float8_e8m0fnu"),
            (1, 7, 1, "pad", "uint8"),
        ],
    }
    assert {name: fmt.token_bytes for name, fmt in kvcache.FORMATS.items()} == dict(
        bf16=1152, f16=1152, fp8_v32=656, fp8_v4=584
    )
    assert kvcache.layout("bf16", 512).token_bytes == 1024 and kvcache.layout("bf16", 512)["latent"].count == 448


@given(page_size=st.integers(1, 600))
def test_padded_pages_tell_their_size(page_size):
    fmt = kvcache.FORMATS["fp8_v4"]
    stride = fmt.page_bytes(page_size, padded=True)
    assert stride % 576 == 0 and 0 <= stride - 584 * page_size < 576
    assert kvcache.formats.page_size_of((3, stride), fmt.token_bytes) == page_size
    assert fmt.plane_offset(1, page_size) == 576 * page_size and fmt.page_bytes(page_size) == 584 * page_size


@every_format
def test_init(format):
    cache = kvcache.init_kv_cache(5, format, page_size=3, num_layers=2)
    width = {"bf16": 576, "f16": 576, "fp8_v32": 656, "fp8_v4": 584}[format]
    assert cache.shape == (10, 3, 1, width) and cache.dtype == DTYPE[format] and not raw_of(cache).any()
    if format == "fp8_v4":
        assert kvcache.init_kv_cache(5, format, page_size=3, padded=True).shape == (5, 2304)
    if format in ("bf16", "f16"):
        assert kvcache.init_kv_cache(5, format, page_size=3, head_dim=512).shape == (5, 3, 1, 512)


# Quantisation


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32], ids=lambda d: d.__name__)
@every_format
def test_quantise_bytes(format, dtype):
    rng = np.random.default_rng(0)
    latent, rope = random_rows(rng, 60, format, dtype, spread=4 if dtype == np.float16 else 12)
    rows = np.asarray(quantize(latent, rope, format=format))
    expected = [b"".join(token_bytes(format, *row)) for row in zip(latent, rope)]
    np.testing.assert_array_equal(rows.view(np.uint8), [np.frombuffer(row, np.uint8) for row in expected])


@pytest.mark.parametrize("format, tile", [("fp8_v32", 128), ("fp8_v4", 64)])
def test_scales(format, tile):
    """Every value of a tile is v; the scale is 1 for 336, 2^-13 for an all-zero tile, and steps just above 448 * 2^k."""
    above, below = np.nextafter(np.float32(448), np.float32(500)), np.nextafter(np.float32(448), np.float32(0))
    cases = {
        336.0: 0, 448.0: 0, above: 1, below: 0, 224.0: -1, 224.1: 0, 0.0: -13, 448 * 2.0**-13: -13, above * 2.0**-13: -12,
        1e-30: -13, 1e-42: -13, -336.0: 0, 3e38: 120,
    }  # fmt: skip
    n = LATENT[format] // tile
    for value, exponent in cases.items():
        latent = np.full((1, LATENT[format]), value, np.float32)
        latent[:, -tile:] = 0
        row = np.asarray(quantize(latent, np.zeros((1, 64), np.float32), format=format))[0]
        scales = (
            row[512:528].view(np.float32) if format == "fp8_v32" else 2.0 ** (row[576:583].astype(np.float64) - 127)
        )
        np.testing.assert_array_equal(scales, [2.0**exponent] * (n - 1) + [2.0**-13])


@pytest.mark.parametrize("format, tile", [("fp8_v32", 128), ("fp8_v4", 64)])
def test_a_non_finite_channel_makes_its_tile_nan(format, tile):
    """In the scale as well: the kernel of sparse decode looks there alone."""
    latent = np.full((3, LATENT[format]), 3.0, np.float32)
    latent[[0, 1, 2], [5, 130, 131]] = [np.nan, np.inf, -np.inf]
    rows = np.asarray(quantize(latent, latent[:, :64], format=format))
    keys = np.asarray(dequantize(rows, format=format)).astype(np.float32)[:, : LATENT[format]]
    bad = np.repeat(~np.isfinite(latent.reshape(3, -1, tile)).all(axis=-1), tile, axis=-1)
    np.testing.assert_array_equal(keys, np.where(bad, np.nan, 3))
    layout = kvcache.FORMATS[format]
    start = sum(field.nbytes for field in layout.fields[: [field.name for field in layout.fields].index("scale")])
    scales = kvcache.quantize.from_bytes(rows[:, start : start + layout["scale"].nbytes], layout["scale"].dtype)
    np.testing.assert_array_equal(np.isnan(np.asarray(scales, np.float32)), bad[:, ::tile])


@drawn(max_examples=30)
@given(seed=st.integers(0, 10**6), t=st.sampled_from([0, 1, 9]), format=st.sampled_from(["fp8_v32", "fp8_v4"]))
def test_quantise_is_idempotent_and_close(seed, t, format):
    latent, rope = random_rows(np.random.default_rng(seed), t, format, spread=3)
    rows = quantize(latent, rope, format=format)
    keys = np.asarray(dequantize(rows, format=format))
    assert keys.dtype == BF16 and keys.shape == (t, LATENT[format] + 64)
    np.testing.assert_array_equal(keys[:, -64:], rope)
    tile = 128 if format == "fp8_v32" else 64
    tiles = np.float64(latent).reshape(t, LATENT[format] // tile, tile)
    # e4m3 rounds to 2**-4 relative, and to 2**-10 of the scale, which is at most amax / 224 or 2**-13, near zero.
    allowed = np.abs(tiles) * 2**-4 + np.maximum(np.abs(tiles).max(-1, keepdims=True, initial=0) / 224, 2**-13) * 2**-10
    assert (np.abs(np.float64(keys[:, :-64]).reshape(tiles.shape) - tiles) <= allowed).all()
    again = quantize(keys[:, :-64], keys[:, -64:], format=format)
    np.testing.assert_array_equal(dequantize(again, format=format), keys)


SCALES = (
    1.0,
    -1.0,
    0.0,
    0.1,
    3.0,
    1e-30,
    2.0**-126,
    2.0**-127,
    1e-40,
    -1e-40,
    1e30,
    3.4e38,
    1.2345678,
    2.0**-149,
    -0.0,
    7e5,
)


def test_reader_takes_any_finite_float32_scale():
    rng = np.random.default_rng(0)
    codes = rng.permutation(np.tile(np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF]), 9))[:2048].reshape(4, 512)
    rows = np.zeros((4, 656), np.uint8)
    rows[:, :512] = codes
    rows[:, 512:528] = np.array(SCALES, np.float32).reshape(4, 4).view(np.uint8)
    got = np.asarray(dequantize(rows, format="fp8_v32"))[:, :512].astype(np.float64)
    exact = codes.view(E4M3).astype(np.float64) * np.float64(np.float32(SCALES)).repeat(128).reshape(4, 512)
    with np.errstate(over="ignore"):
        expected = exact.astype(np.float32).astype(BF16).astype(np.float64)
    tiny = np.abs(exact) < 2.0**-126  # XLA on the CPU may flush what float32 can only hold as a subnormal number
    np.testing.assert_array_equal(got[~tiny], expected[~tiny])
    assert (np.abs(got[tiny] - exact[tiny]) <= 2.0**-126).all() and np.isinf(expected).any()


def test_reader_takes_every_e8m0_scale():
    """Every code in every place; 255 is NaN, 0 is 2**-127, which float32 holds as a subnormal number."""
    codes = np.arange(256, dtype=np.uint8)
    raw = np.zeros((256, 584), np.uint8)
    values = np.array([1, -448, 2**-9, 0.40625], np.float32).astype(E4M3).view(np.uint8)
    raw[:, :448] = np.tile(values, 112)
    raw[:, 576:583] = (codes[:, None] + np.arange(7)).astype(np.uint8)
    got = np.asarray(dequantize(raw, format="fp8_v4"))[:, :448].astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        scale = raw[:, 576:583].view(ml_dtypes.float8_e8m0fnu).astype(np.float64).repeat(64, axis=1)
        exact = raw[:, :448].view(E4M3).astype(np.float64) * scale
        expected = exact.astype(np.float32).astype(BF16).astype(np.float64)
    normal = ~(np.abs(exact) < 2.0**-126)
    np.testing.assert_array_equal(got[normal], expected[normal])
    assert np.isnan(got).any() and (got[0, 1] == -448 * 2.0**-127)


# Writing and reading


# Each is compiled. Every format has pages of one token, a page size that is no power of two, and a large one.
APPENDED = [
    # format, padded, page_size, num_pages, t
    ("fp8_v32", False, 61, 2, 12),
    ("bf16", False, 1, 4, 12),
    ("bf16", False, 69, 1, 5),
    ("bf16", False, 64, 3, 0),
    ("f16", False, 3, 4, 9),
    ("f16", False, 61, 2, 12),
    ("f16", False, 1, 1, 1),
    ("fp8_v32", False, 1, 3, 12),
    ("fp8_v32", False, 2, 4, 7),
    ("fp8_v32", False, 64, 1, 0),
    ("fp8_v4", False, 1, 4, 12),
    ("fp8_v4", False, 3, 3, 6),
    ("fp8_v4", False, 69, 2, 12),
    ("fp8_v4", True, 1, 2, 11),
    ("fp8_v4", True, 16, 4, 12),
    ("fp8_v4", True, 61, 3, 12),
]


@pytest.mark.parametrize("shape", APPENDED, ids=str)
@drawn(max_examples=3)
@given(seed=st.integers(0, 10**6))
def test_append_changes_these_bytes_and_no_others(shape, seed):
    format, padded, page_size, num_pages, t = shape
    rng = np.random.default_rng(seed)
    if format in ("bf16", "f16"):  # numbers, for XLA may quieten a NaN that it moves through another dtype
        raw = (
            rng.standard_normal((num_pages, page_stride(format, page_size, padded) // 2))
            .astype(DTYPE[format])
            .view(np.uint8)
        )
    else:
        raw = rng.integers(0, 256, (num_pages, page_stride(format, page_size, padded)), np.uint8)
    expected = raw.copy()
    tokens = num_pages * page_size
    slots = rng.permutation(
        np.concatenate([np.arange(tokens), [-1, -5, -tokens, -(2**31), tokens, tokens + 1, 2**31 - 1] * 2])
    )[:t]
    t = len(slots)
    latent, rope = random_rows(rng, t, format, spread=3)
    for slot, *row in zip(slots, latent, rope):
        if 0 <= slot < tokens:
            poke(expected, format, page_size, int(slot), *row)
    got = append(as_pool(raw, format, page_size, padded), latent, rope, slots.astype(np.int32), format=format)
    np.testing.assert_array_equal(raw_of(got), expected)


@pytest.mark.parametrize("format", ["fp8_v32", "fp8_v4"])
def test_pools_of_float8(format):
    """The same bytes under another dtype, NaN patterns included."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (3, 8, 1, 656 if format == "fp8_v32" else 584), np.uint8)
    latent, rope = random_rows(rng, 2, format)
    slots, pages = np.array([5, -1], np.int32), np.array([0, 2], np.int32)
    table, lengths = np.array([[0]], np.int32), np.array([8], np.int32)
    results = []
    for cache in (raw, raw.view(E4M3)):
        cache = append(cache, latent, rope, slots, format=format)
        rows = gather(cache, table, lengths, total=8, format=format)
        cache = copy_pages(cache, pages[:1], pages[1:])
        results.append((raw_of(cache), np.asarray(rows).view(np.uint16)))
    for x, y in zip(*results):
        np.testing.assert_array_equal(x, y)


# Each is compiled, as above. The lengths that are drawn sum up to less than `total` or to more.
GATHERED = [
    # format, padded, page_size, b, total
    ("fp8_v32", False, 16, 4, 140),
    ("bf16", False, 1, 4, 130),
    ("bf16", False, 64, 1, 40),
    ("bf16", False, 3, 0, 20),
    ("f16", False, 3, 3, 100),
    ("f16", False, 16, 2, 0),
    ("fp8_v32", False, 1, 2, 60),
    ("fp8_v32", False, 64, 3, 110),
    ("fp8_v4", False, 1, 3, 90),
    ("fp8_v4", False, 3, 1, 70),
    ("fp8_v4", False, 64, 4, 150),
    ("fp8_v4", True, 16, 4, 120),
    ("fp8_v4", True, 3, 2, 75),
]


@pytest.mark.parametrize("shape", GATHERED, ids=str)
@drawn(max_examples=4)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=4, max_size=4),
    seed=st.integers(0, 10**6),
)
def test_gather(shape, lengths, seed):
    format, padded, page_size, b, total = shape
    rng, seqlens = np.random.default_rng(seed), lengths[:b]
    needed = [-(-n // page_size) for n in seqlens]
    width = -(-70 // page_size) + 1
    num_pages = b * (width - 1) + 2
    raw = np.full((num_pages, page_stride(format, page_size, padded)), 0xFF, np.uint8)  # NaN in every format
    free, table, expected = iter(rng.permutation(num_pages)), np.full((len(seqlens), width), 2**31 - 1, np.int32), []
    for i, n in enumerate(seqlens):
        table[i, : needed[i]] = [next(free) for _ in range(needed[i])]
        latent, rope = random_rows(rng, n, format, spread=3)
        for j in range(n):
            slot = int(table[i, j // page_size]) * page_size + j % page_size
            poke(raw, format, page_size, slot, latent[j], rope[j])
            expected.append(keys_of(raw, format, page_size, slot))
    pool = as_pool(raw, format, page_size, padded)
    got = np.asarray(gather(pool, table, np.array(seqlens, np.int32), total=total, format=format))
    dim, dtype = LATENT[format] + 64, np.float16 if format == "f16" else BF16
    assert got.shape == (total, dim) and got.dtype == dtype
    padding = np.zeros((total, dim), dtype)
    want = np.concatenate([np.array(expected, dtype).reshape(-1, dim), padding])[:total]
    np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))


def test_gather_of_hostile_tables_and_lengths():
    """Pages that are none, lengths beyond the table, and sums of lengths beyond int32."""
    cache = np.broadcast_to(np.arange(1, 5, dtype=np.float32)[:, None, None, None], (4, 64, 1, 576)).astype(BF16)
    table = np.array([[0, -1], [4, 1], [2**31 - 1, -(2**31)], [3, 2]], np.int32)
    lengths = np.array([2**31 - 1, 128, 128, -5], np.int32)
    rows = np.asarray(gather(cache, table, lengths, total=400, format="bf16"))[:, 0]
    np.testing.assert_array_equal(rows.astype(int), np.repeat([1, 0, 0, 2, 0, 0], [64, 64, 64, 64, 128, 16]))
    wide = np.zeros((3, 2**24), np.int32)
    rows = gather(cache, wide, np.full(3, 2**30, np.int32), total=70, format="bf16")
    assert (np.asarray(rows) == 1).all()


def test_rows_of_512_and_f16():
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((5, 512)).astype(np.float16)
    cache = kvcache.init_kv_cache(2, "f16", page_size=4, head_dim=512)
    slots = np.array([7, 0, 3, 4, 1], np.int32)
    cache = kvcache.append_kv_cache(cache, keys[:, :448], keys[:, 448:], slots, format="f16")
    np.testing.assert_array_equal(np.asarray(cache).reshape(8, 512)[slots], keys)


@drawn(max_examples=40)
@given(
    pages=st.lists(st.tuples(st.integers(-2, 7), st.integers(-2, 7)), min_size=6, max_size=6, unique_by=lambda p: p[1]),
    n=st.sampled_from([0, 1, 6]),
    pool=any_pool,
)
def test_copy_pages(pages, n, pool):
    """All are read before any is written; a pair with a page that is none does nothing."""
    format, padded = pool
    raw = np.random.default_rng(0).integers(0, 100, (6, page_stride(format, 4, padded)), np.uint8)
    expected, pages = raw.copy(), pages[:n]
    for source, target in pages:
        if 0 <= source < 6 and 0 <= target < 6:
            expected[target] = raw[source]
    source, target = np.array(pages, np.int32).reshape(-1, 2).T
    got = copy_pages(as_pool(raw, format, 4, padded), source, target)
    np.testing.assert_array_equal(raw_of(got), expected)


# Slots


@pytest.mark.parametrize("shape", [(3, 2, 3), (0, 2, 3), (2, 0, 64), (1, 1, 1), (3, 3, 1), (2, 3, 64), (1, 3, 64)])
@drawn(max_examples=6)
@given(seed=st.integers(0, 10**6))
def test_slots(shape, seed):
    b, max_pages, page_size = shape
    rng = np.random.default_rng(seed)
    limit = 2**31 // page_size
    table = rng.choice(
        np.array([0, 1, 5, -1, 2**31 - 1, -(2**31), limit - 1, limit - (page_size == 1), 2147480000]), (b, max_pages)
    ).astype(np.int32)

    def slot(i, position):
        if not (0 <= i < b and 0 <= position < max_pages * page_size):
            return -1
        page = int(table[i, position // page_size])
        result = page * page_size + position % page_size
        return result if page >= 0 and (page + 1) * page_size <= 2**31 else -1

    positions = rng.integers(-3, max_pages * page_size + 3, 40).astype(np.int32)
    positions[:2] = -(2**31), 2**31 - 1
    sequences = rng.integers(-2, b + 2, 40).astype(np.int32)
    expected = [slot(i, p) for i, p in zip(sequences.tolist(), positions.tolist())]
    np.testing.assert_array_equal(slot_mapping(positions, sequences, table, page_size=page_size), expected)

    ids = rng.integers(-3, max_pages * page_size + 3, (b, 2, 5)).astype(np.int32)
    lengths = rng.integers(-1, max_pages * page_size + 9, b).astype(np.int32)
    got = topk_to_slots(ids, table, lengths, page_size=page_size)
    expected = [[[slot(i, p) if p < lengths[i] else -1 for p in row] for row in ids[i].tolist()] for i in range(b)]
    np.testing.assert_array_equal(got, np.array(expected, np.int32).reshape(ids.shape))


def test_vmap_of_slots_append_and_gather():
    """Elements of a batch with pools of their own, and with one pool."""
    rng = np.random.default_rng(0)
    caches = rng.integers(0, 100, (3, 2, 4, 1, 656), np.uint8)
    latent, rope = random_rows(rng, 6, "fp8_v32")
    latent, rope = latent.reshape(3, 2, 512), rope.reshape(3, 2, 64)
    slots = np.array([[1, -1], [7, 0], [8, 3]], np.int32)
    append_one = functools.partial(append, format="fp8_v32")
    got = jax.vmap(append_one)(caches, latent, rope, slots)
    expected = np.stack([append_one(*args) for args in zip(caches, latent, rope, slots)])
    np.testing.assert_array_equal(got, expected)
    table, lengths = np.array([[0, 1]], np.int32), np.array([[3], [8], [0]], np.int32)
    gather_one = functools.partial(gather, total=8, format="fp8_v32")
    rows = np.asarray(jax.vmap(gather_one, in_axes=(None, None, 0))(expected[0], table, lengths))
    for i in range(3):
        np.testing.assert_array_equal(rows[i], gather_one(expected[0], table, lengths[i]))
    positions = np.arange(12, dtype=np.int32).reshape(3, 4)
    mapping = functools.partial(slot_mapping, page_size=4)
    ids = np.zeros_like(positions)
    for i, row in enumerate(np.asarray(jax.vmap(mapping, in_axes=(0, 0, None))(positions, ids, table))):
        np.testing.assert_array_equal(row, mapping(positions[i], ids[i], table))


# In place


def whole_cache_instructions(text, elements):
    """Instructions that make a new array as large as the cache: copies, conversions, and the like."""
    found = []
    for name, shape in re.findall(
        r"= \w+\[([\d,]+)\]\S* (copy|copy-start|convert|transpose|concatenate|pad|broadcast|select)\(", text
    ):
        if math.prod(map(int, name.split(","))) >= elements:
            found.append((shape, name))
    return found


def one_cache(append, cache):
    return append(cache, 0)


def list_per_layer(append, caches):
    return [append(cache, i) for i, cache in enumerate(caches)]


def loop_carry(append, cache):
    return jax.lax.fori_loop(0, 3, lambda i, cache: append(cache, i), cache)


def flat_pool_in_scan(append, cache):
    """Two layers of 500 pages."""

    def layer(cache, i):
        return append(cache, i * 500 * 64), None

    return jax.lax.scan(layer, cache, jnp.arange(2, dtype=jnp.int32))[0]


PROGRAMS = one_cache, list_per_layer, loop_carry, flat_pool_in_scan
# Every pair of an op, a format and a program: two programs each of an op for a format, by turns.
DONATED = [
    (op, format, padded, program)
    for i, op in enumerate(("append", "copy_pages"))
    for j, (format, padded) in enumerate((*((f, False) for f in LATENT), ("fp8_v4", True)))
    for k, program in enumerate(PROGRAMS)
    if (i + j + k) % 2 == 0
]


@pytest.mark.parametrize(
    "op, format, padded, program", DONATED, ids=[f"{o}-{f}-{p}-{g.__name__}" for o, f, p, g in DONATED]
)
@pytest.mark.usefixtures("all_optimizations")
def test_donated_caches_are_not_copied(op, format, padded, program):
    if format == "bf16" and jax.__version_info__ < (0, 11):
        pytest.skip("XLA of jax 0.10 widens every bfloat16 scatter on the CPU to float32, the whole operand with it")
    fmt = kvcache.FORMATS[format]
    cache = jax.ShapeDtypeStruct(fmt.pool_shape(1000, 64, padded=padded), fmt.dtype)
    latent = jax.ShapeDtypeStruct((4, LATENT[format]), jnp.bfloat16)
    rope, slots = jax.ShapeDtypeStruct((4, 64), jnp.bfloat16), jax.ShapeDtypeStruct((4,), jnp.int32)

    def step(cache, latent, rope, slots):
        def append(cache, first):
            at = jnp.where(slots < 0, -1, slots + jnp.asarray(first, jnp.int32))
            if op == "copy_pages":
                return kvcache.copy_pages(cache, at // 64, slots // 64)
            return kvcache.append_kv_cache(cache, latent, rope, at, format=format)

        return program(append, cache)

    held = [cache, cache] if program is list_per_layer else cache
    compiled = jax.jit(step, donate_argnums=0).lower(held, latent, rope, slots).compile()
    memory, size = compiled.memory_analysis(), math.prod(cache.shape) * cache.dtype.itemsize
    assert whole_cache_instructions(compiled.as_text(), math.prod(cache.shape)) == []
    assert memory.alias_size_in_bytes == size * (2 if program is list_per_layer else 1)
    assert memory.temp_size_in_bytes < 2**20 < size  # some rows and pages, and no cache


@pytest.mark.usefixtures("all_optimizations")
def test_the_grep_sees_copies():
    """Without donation there is one, and it is found; the result is the same."""
    cache = jnp.zeros((1000, 64, 1, 656), jnp.uint8)
    latent, rope, slots = jnp.ones((1, 512)), jnp.ones((1, 64)), jnp.array([70], jnp.int32)
    append = functools.partial(kvcache.append_kv_cache, format="fp8_v32")
    compiled = jax.jit(append).lower(cache, latent, rope, slots).compile()
    assert [name for name, _ in whole_cache_instructions(compiled.as_text(), cache.size)] == ["copy"]
    kept = compiled(cache, latent, rope, slots)
    assert not cache.any()
    donated = jax.jit(append, donate_argnums=0)(cache, latent, rope, slots)
    assert cache.is_deleted()
    np.testing.assert_array_equal(kept, donated)


# Pages on the host


class Model:
    """Sequences as lists of (page, refers to nothing else): the whole state recounted at every step."""

    def __init__(self, allocator):
        self.allocator, self.tokens, self.content = allocator, {}, {}
        self.next_token = 0

    def write(self, sequence, first, last):
        for position in range(first, last):
            page = self.allocator.pages(sequence)[position // self.allocator.page_size]
            self.content[page, position % self.allocator.page_size] = self.next_token
            self.tokens[sequence].append(self.next_token)
            self.next_token += 1

    def check(self):
        a = self.allocator
        held = {page for sequence in self.tokens for page in a.pages(sequence)}
        assert a.num_free + len(held) == a.num_pages and held <= set(range(a.num_pages))
        for sequence, tokens in self.tokens.items():
            pages = a.pages(sequence)
            assert len(pages) == len(set(pages)) == -(-len(tokens) // a.page_size) and a.length(sequence) == len(tokens)
            where = [(pages[i // a.page_size], i % a.page_size) for i in range(len(tokens))]
            assert [self.content[at] for at in where] == tokens


@drawn(max_examples=150)
@given(
    num_pages=st.integers(1, 9),
    page_size=st.integers(1, 4),
    program=st.lists(
        st.tuples(
            st.sampled_from(["alloc", "extend", "extend", "fork", "free"]), st.integers(0, 12), st.integers(0, 99)
        ),
        max_size=40,
    ),
)
def test_page_allocator(num_pages, page_size, program):
    """Every token ever written into a live sequence is still there, whatever others do to shared pages."""
    model = Model(kvcache.PageAllocator(num_pages, page_size))
    a = model.allocator
    for action, amount, pick in program:
        live = sorted(model.tokens)
        target = live[pick % len(live)] if live else None
        before = {s: a.pages(s) for s in live}, a.num_free
        if action == "alloc":
            needed = -(-amount // page_size)
            if needed > a.num_free:
                with pytest.raises(
                    kvcache.OutOfPages, match=rf"^{needed} pages .* and {a.num_free} of {num_pages} are free"
                ):
                    a.alloc(amount)
                assert before == ({s: a.pages(s) for s in live}, a.num_free)
                continue
            sequence = a.alloc(amount)
            assert sequence not in live
            model.tokens[sequence] = []
            model.write(sequence, 0, amount)
        elif target is None:
            continue
        elif action == "fork":
            first = min(amount, a.length(target))
            sequence = a.fork(target, first) if amount else a.fork(target)
            assert sequence not in live and a.num_free == before[1]
            model.tokens[sequence] = model.tokens[target][: first if amount else None]
        elif action == "free":
            a.free(target)
            del model.tokens[target]
            with pytest.raises(KeyError, match="free did not end"):
                a.pages(target)
        else:
            length, pages = a.length(target), a.pages(target)
            shared = amount and length % page_size and any(s != target and pages[-1] in a.pages(s) for s in live)
            needed = -(-(length + amount) // page_size) - len(pages) + bool(shared)
            if needed > a.num_free:
                with pytest.raises(kvcache.OutOfPages):
                    a.extend(target, amount)
                assert before == ({s: a.pages(s) for s in live}, a.num_free) and a.length(target) == length
                continue
            copies = a.extend(target, amount)
            assert len(copies) == bool(shared)
            for source, copy in copies:
                assert source == pages[-1] and copy in a.pages(target) and copy not in pages
                for offset in range(page_size):
                    model.content[copy, offset] = model.content.get((source, offset))
            model.write(target, length, length + amount)
        model.check()
    for sequence in list(model.tokens):
        a.free(sequence)
    assert a.num_free == num_pages


def test_block_table_of_the_allocator():
    a = kvcache.PageAllocator(8, 4)
    x, y, z = a.alloc(9), a.alloc(0), a.alloc(4)
    table = a.block_table([z, x, y], max_pages=4)
    assert table.dtype == np.int32 and table.shape == (3, 4)
    assert table[0].tolist() == [*a.pages(z), -1, -1, -1] and table[1].tolist() == [*a.pages(x), -1]
    assert (table[2] == -1).all() and a.cache_seqlens([z, x, y]).tolist() == [4, 9, 0]
    assert a.block_table([]).shape == (0, 1) and a.cache_seqlens([]).dtype == np.int32
    with pytest.raises(ValueError, match=r"max_pages must be at least 3.*got 2"):
        a.block_table([x], max_pages=2)


def test_fork_of_the_first_tokens():
    a = kvcache.PageAllocator(6, 4)
    parent = a.alloc(10)
    beam = a.fork(parent, 5)  # in the middle of the second page
    assert a.pages(beam) == a.pages(parent)[:2] and a.length(beam) == 5
    assert a.extend(beam, 1) == [(a.pages(parent)[1], a.pages(beam)[1])] and a.extend(parent, 1) == []
    assert a.length(a.fork(parent, 0)) == 0 and a.num_free == 2
    with pytest.raises(ValueError, match="num_tokens must be at most 11, the tokens of the sequence, got 12"):
        a.fork(parent, 12)
    with pytest.raises(ValueError, match="num_tokens must be at least 0, got -1"):
        a.fork(parent, -1)


def test_fork_and_copy_on_a_device():
    """A beam writes behind its parent's back: the parent's rows stay, the beam's first rows are the parent's."""
    a = kvcache.PageAllocator(6, 4)
    cache = kvcache.init_kv_cache(6, "bf16", page_size=4)
    rng = np.random.default_rng(0)

    def write(cache, sequence, first, latent, rope):
        positions = np.arange(first, first + len(latent), dtype=np.int32)
        slots = slot_mapping(positions, np.zeros_like(positions), a.block_table([sequence]), page_size=4)
        return append(cache, latent, rope, slots, format="bf16")

    def rows(sequence):
        table, lengths = a.block_table([sequence]), a.cache_seqlens([sequence])
        return np.asarray(gather(cache, table, lengths, total=int(lengths[0]), format="bf16"))

    parent = a.alloc(6)
    cache = write(cache, parent, 0, *random_rows(rng, 6, "bf16"))
    before = rows(parent)
    beam = a.fork(parent)
    source, target = np.array(a.extend(beam, 3), np.int32).T
    cache = copy_pages(cache, source, target)
    latent, rope = random_rows(rng, 3, "bf16")
    cache = write(cache, beam, 6, latent, rope)
    np.testing.assert_array_equal(rows(parent), before)
    np.testing.assert_array_equal(rows(beam), np.concatenate([before, np.concatenate([latent, rope], axis=1)]))


def test_num_pages_that_fit():
    def device(**stats):
        return SimpleNamespace(memory_stats=lambda: stats)

    full = device(bytes_limit=1000 * 656 * 64 * 10, bytes_in_use=100 * 656 * 64 * 10)
    fit = functools.partial(kvcache.num_pages_that_fit, device=full)
    assert fit("fp8_v32", 10) == 800 and fit("fp8_v32", 10, 0.5) == 400 and fit("fp8_v32", 1, 0.1) == 0
    assert fit("fp8_v32", 10, 1.0, page_size=32) == 1800 and fit("bf16", 10, head_dim=512) == 800 * 656 // 1024
    assert fit("fp8_v4", 10, padded=True) == 800 * 656 * 64 // 37440 and fit("fp8_v4", 10) == 800 * 656 // 584
    with pytest.raises(RuntimeError, match=r"device must tell how much memory it has.*choose num_pages yourself"):
        fit("bf16", 1, device=SimpleNamespace(memory_stats=lambda: None))


# Refusals


def z(*shape, dtype=jnp.bfloat16):
    return np.zeros(shape, dtype)


i32 = functools.partial(z, dtype=np.int32)
u8 = functools.partial(z, dtype=np.uint8)
APPEND = dict(cache=u8(2, 4, 1, 656), latent=z(3, 512), rope=z(3, 64), slots=i32(3), format="fp8_v32")
GATHER = dict(cache=u8(2, 4, 1, 656), block_table=i32(1, 2), cache_seqlens=i32(1), total=8, format="fp8_v32")
MAPPING = dict(positions=i32(3), sequence_ids=i32(3), block_table=i32(1, 2), page_size=4)
TOPK = dict(ids=i32(1, 2, 3), block_table=i32(1, 2), cache_seqlens=i32(1), page_size=4)
COPY = dict(cache=u8(2, 4, 1, 656), source=i32(2), target=i32(2))
INIT = dict(num_pages=2, format="bf16")
FIT = dict(format="bf16", num_layers=1, device=SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1}))
PAGES = dict(num_pages=3)
ROWS = dict(latent=z(3, 512), rope=z(3, 64), format="fp8_v32")
BYTES = dict(rows=u8(3, 656), format="fp8_v32")
BASE = {
    "append_kv_cache": APPEND, "gather_kv_cache": GATHER, "slot_mapping": MAPPING, "topk_to_slots": TOPK, "copy_pages": COPY,
    "init_kv_cache": INIT, "num_pages_that_fit": FIT, "PageAllocator": PAGES, "quantize_kv": ROWS, "dequantize_kv": BYTES,
}  # fmt: skip

REFUSED = [
    ("append_kv_cache", dict(implementation="gpu"), ValueError, "implementation must be None, 'cuda' or 'xla', got 'gpu'"),
    ("append_kv_cache", dict(implementation="cuda"), RuntimeError, "append: implementation='cuda' needs a Hopper GPU"),
    ("gather_kv_cache", dict(implementation="gpu"), ValueError, "implementation must be None, 'cuda' or 'xla', got 'gpu'"),
    ("gather_kv_cache", dict(implementation="cuda"), RuntimeError, "gather: implementation='cuda' needs a Hopper GPU"),
    ("append_kv_cache", dict(format="fp8"), ValueError, "format must be one of 'bf16', 'f16', 'fp8_v32', 'fp8_v4', got 'fp8'"),
    ("append_kv_cache", dict(format=None), ValueError, "format must be one of .* got None"),
    ("append_kv_cache", dict(cache=[1]), TypeError, "cache must be an array .* got list; make it with init_kv_cache"),
    ("append_kv_cache", dict(cache=u8(2, 4, 656)), ValueError, r"cache must have the axes .* got shape \(2, 4, 656\)"),
    ("append_kv_cache", dict(cache=z(2, 4, 1, 576)), TypeError, "cache must be uint8 or float8_e4m3fn for fp8_v32, got bfloat16"),
    ("append_kv_cache", dict(cache=u8(2, 4, 1, 584)), ValueError, r"cache must have shape \[P, page_size, 1, 656\] for fp8_v32"),
    ("append_kv_cache", dict(cache=u8(2, 4, 2, 656)), ValueError, r"cache must have shape \[P, page_size, 1, 656\]"),
    ("append_kv_cache", dict(cache=u8(0, 4, 1, 656)), ValueError, "cache must have at least one page"),
    ("append_kv_cache", dict(cache=u8(2, 37440)), ValueError, "cache must have the axes .* for fp8_v32"),
    ("append_kv_cache", dict(cache=u8(2, 1000), format="fp8_v4", latent=z(3, 448)), ValueError, r"page_size \* 584 bytes, padded to a multiple of 576 or not, got shape \(2, 1000\)"),
    ("append_kv_cache", dict(cache=z(2, 4, 1, 640), format="bf16"), ValueError, r"cache must have shape \[P, page_size, 1, 576 or 512\] for bf16"),
    ("append_kv_cache", dict(cache=z(2, 4, 1, 512), format="bf16"), ValueError, r"latent must have 448 channels for bf16, got shape \(3, 512\)"),
    ("append_kv_cache", dict(latent=z(3, 448)), ValueError, r"latent must have 512 channels for fp8_v32, got shape \(3, 448\)"),
    ("append_kv_cache", dict(latent=z(3, 1, 512)), ValueError, r"latent must have the axes \[t, d_latent\]"),
    ("append_kv_cache", dict(latent=u8(3, 512)), TypeError, "latent must be bfloat16 or float16 or float32, got uint8; cast"),
    ("append_kv_cache", dict(rope=z(2, 64)), ValueError, r"rope must have shape .* = \(3, 64\), got \(2, 64\)"),
    ("append_kv_cache", dict(rope=z(3, 32)), ValueError, r"rope must have shape .* give the 64 roped channels"),
    ("append_kv_cache", dict(slots=z(3, dtype=np.int64)), TypeError, "slots must be int32, got int64"),
    ("append_kv_cache", dict(slots=i32(2)), ValueError, r"slots must have shape \[t\] = \(3,\), got \(2,\); give one slot per row"),
    ("append_kv_cache", dict(cache=np.broadcast_to(np.uint8(0), (2**29, 4, 1, 656))), ValueError, r"fewer than 2\*\*31 tokens, got 2147483648"),
    ("gather_kv_cache", dict(total=-1), ValueError, "total must be at least 0, got -1"),
    ("gather_kv_cache", dict(total=2.0), TypeError, "total must be an int, got float"),
    ("gather_kv_cache", dict(block_table=i32(2)), ValueError, r"block_table must have the axes \[b, max_pages\]"),
    ("gather_kv_cache", dict(cache_seqlens=i32(2)), ValueError, r"cache_seqlens must have shape \[b\] = \(1,\)"),
    ("gather_kv_cache", dict(format="bf16"), TypeError, "cache must be bfloat16 for bf16, got uint8; is the format right"),
    ("slot_mapping", dict(positions=i32(3, 1)), ValueError, r"positions must have the axes \[t\]"),
    ("slot_mapping", dict(sequence_ids=i32(2)), ValueError, r"sequence_ids must have shape \[t\] = \(3,\), got \(2,\)"),
    ("slot_mapping", dict(page_size=0), ValueError, "page_size must be at least 1"),
    ("slot_mapping", dict(block_table=np.broadcast_to(np.int32(0), (1, 2**30))), ValueError, r"fewer than 2\*\*31 tokens"),
    ("topk_to_slots", dict(ids=i32(1, 3)), ValueError, r"ids must have the axes \[b, s_q, topk\]"),
    ("topk_to_slots", dict(ids=i32(2, 2, 3)), ValueError, r"block_table must have shape .* = \(2, 2\), got \(1, 2\)"),
    ("topk_to_slots", dict(cache_seqlens=i32(2)), ValueError, r"cache_seqlens must have shape \[b\] = \(1,\)"),
    ("copy_pages", dict(target=i32(3)), ValueError, r"target must have shape \[n\] = \(2,\), got \(3,\); give one target per source"),
    ("copy_pages", dict(cache=u8(2)), ValueError, r"cache must have the axes"),
    ("init_kv_cache", dict(num_pages=0), ValueError, "num_pages must be at least 1"),
    ("init_kv_cache", dict(head_dim=640), ValueError, "head_dim must be 576 or 512 for bf16, got 640; None takes 576"),
    ("init_kv_cache", dict(head_dim=512, format="fp8_v32"), ValueError, "head_dim must be 576 for fp8_v32, got 512"),
    ("init_kv_cache", dict(padded=True), ValueError, "padded must be False for bf16"),
    ("init_kv_cache", dict(padded=1, format="fp8_v4"), TypeError, "padded must be True or False"),
    ("init_kv_cache", dict(num_pages=2**25), ValueError, r"num_pages must address fewer than 2\*\*31 tokens"),
    ("num_pages_that_fit", dict(fraction=0), ValueError, "fraction must be a number over 0 and up to 1, got 0"),
    ("num_pages_that_fit", dict(fraction="1"), ValueError, "fraction must be a number over 0 and up to 1, got '1'"),
    ("num_pages_that_fit", dict(num_layers=0), ValueError, "num_layers must be at least 1"),
    ("PageAllocator", dict(num_pages=0), ValueError, "num_pages must be at least 1, got 0"),
    ("PageAllocator", dict(page_size=1.5), TypeError, "page_size must be an int, got float"),
    ("quantize_kv", dict(latent=[1.0]), TypeError, "latent must be an array"),
    ("quantize_kv", dict(rope=z(64)), ValueError, r"rope must have shape .* = \(3, 64\), got \(64,\)"),
    ("quantize_kv", dict(latent=z(3, 576), format="bf16"), ValueError, "latent must have 512 or 448 channels for bf16"),
    ("dequantize_kv", dict(rows=u8(3, 584)), ValueError, r"rows must be 656 wide for fp8_v32, got shape \(3, 584\)"),
    ("dequantize_kv", dict(rows=z(3, 656)), TypeError, "rows must be uint8, got bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize(
    "name, changed, error, match", REFUSED, ids=[f"{r[0]}-{'-'.join(r[1])}-{i}" for i, r in enumerate(REFUSED)]
)
def test_refusals(name, changed, error, match):
    with pytest.raises(error, match=match):
        getattr(kvcache, name)(**(BASE[name] | changed))


@pytest.mark.parametrize(
    "name", [name for name in BASE if name not in ("init_kv_cache", "PageAllocator", "num_pages_that_fit")]
)
def test_the_arguments_that_are_changed_are_accepted(name):
    """Otherwise a refusal would prove nothing."""
    assert jax.tree.leaves(getattr(kvcache, name)(**BASE[name]))[0].size
