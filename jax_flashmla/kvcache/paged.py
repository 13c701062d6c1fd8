"""Operations on a paged cache, in jnp: jit-able, and in place where the cache is donated.

XLA on the CPU updates a pool in place only by a scatter into the pool as it is: reshaping the result back to an array
with h_kv = 1 costs a copy of everything, and so does a change of dtype.
"""

import jax
import jax.numpy as jnp
import numpy as np

from .. import checks
from . import arguments
from .formats import FP8_V4, FP8_V32, KVFormat, page_size_of
from .quantize import pack, unpack


def init_kv_cache(
    num_pages: int,
    format: str,
    *,
    page_size: int = 64,
    num_layers: int = 1,
    head_dim: int | None = None,
    padded: bool = False,
) -> jax.Array:
    """An empty pool of pages, all zeros.

    With several layers it is one flat pool: page p of layer l is page `l * num_pages + p`. A list of caches, one per
    layer, is as good; a stacked array `[num_layers, ...]` is not, for `scan` would copy it.

    Args:
      num_pages: pages per layer.
      format: "bf16", "f16", "fp8_v32" or "fp8_v4".
      page_size: tokens in a page.
      num_layers: layers that share the pool.
      head_dim: width of a `bf16` or `f16` row, 576 or 512; None is 576. The fp8 formats have one width.
      padded: pages of `fp8_v4` padded to a multiple of 576 bytes.

    Returns:
      bfloat16 or float16 `[P, page_size, 1, head_dim]`; uint8 `[P, page_size, 1, 656]` or `[P, page_size, 1, 584]`;
      padded, uint8 `[P, bytes of a page]`. `P = num_layers * num_pages`.

    Raises:
      TypeError, ValueError: an argument has the wrong type or value, or the pool has 2**31 tokens or more, so that
        int32 could not address them.

    Example:
      >>> from jax_flashmla import kvcache
      >>> kvcache.init_kv_cache(10, "fp8_v32", num_layers=3).shape
      (30, 64, 1, 656)
      >>> kvcache.init_kv_cache(10, "fp8_v4", padded=True).shape
      (10, 37440)
    """
    fmt = arguments.kv_format(format, head_dim, padded)
    num_pages = checks.integer("num_pages", num_pages, minimum=1)
    num_layers = checks.integer("num_layers", num_layers, minimum=1)
    page_size = checks.integer("page_size", page_size, minimum=1)
    arguments.pool_tokens("num_pages", num_layers * num_pages * page_size)
    return jnp.zeros(fmt.pool_shape(num_layers * num_pages, page_size, padded=padded), fmt.dtype)


def slot_mapping(positions: jax.Array, sequence_ids: jax.Array, block_table: jax.Array, *, page_size: int) -> jax.Array:
    """Where tokens stand in the pool: `page * page_size + offset`.

    Args:
      positions: int32 `[t]`, each token's place in its sequence, from 0.
      sequence_ids: int32 `[t]`, the row of `block_table` of each token.
      block_table: int32 `[b, max_pages]`, the pages of each sequence in order.
      page_size: static.

    Returns:
      int32 `[t]`; -1 for a position or a sequence outside the table, and for a page that is negative or too large for
      an int32 slot.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype or shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashmla import kvcache
      >>> table = jnp.array([[3, 1], [0, -1]], jnp.int32)
      >>> positions, sequences = jnp.array([70, 5, 64], jnp.int32), jnp.array([0, 1, 1], jnp.int32)
      >>> kvcache.slot_mapping(positions, sequences, table, page_size=64).tolist()
      [70, 5, -1]
    """
    checks.array("positions", positions, axes="t", dtypes=("int32",))
    checks.array("sequence_ids", sequence_ids, axes="t", dtypes=("int32",))
    page_size = checks.integer("page_size", page_size, minimum=1)
    arguments.block_table(block_table, page_size)
    checks.shape("sequence_ids", sequence_ids, tuple(positions.shape), axes="t", remedy="give one per position")
    positions, sequence_ids, block_table = checks.to_jax(positions, sequence_ids, block_table)
    return _slots(positions, sequence_ids, block_table, page_size)


def topk_to_slots(ids: jax.Array, block_table: jax.Array, cache_seqlens: jax.Array, *, page_size: int) -> jax.Array:
    """Turns tokens that an indexer picked into the `indices` of `flash_mla_with_kvcache`.

    Args:
      ids: int32 `[b, s_q, topk]`, places in the sequence, from 0.
      block_table: int32 `[b, max_pages]`, the pages of each sequence in order.
      cache_seqlens: int32 `[b]`, keys per sequence.
      page_size: static.

    Returns:
      int32 `[b, s_q, topk]`, `page * page_size + offset`; -1 for an id that is negative, or not below the length of
      its sequence, and for a page that is no page.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype or shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashmla import kvcache
      >>> ids = jnp.array([[[70, 2, -1, 90]]], jnp.int32)
      >>> table, lengths = jnp.array([[3, 1]], jnp.int32), jnp.array([80], jnp.int32)
      >>> kvcache.topk_to_slots(ids, table, lengths, page_size=64).tolist()
      [[[70, 194, -1, -1]]]
    """
    checks.array("ids", ids, axes="b, s_q, topk", dtypes=("int32",))
    page_size = checks.integer("page_size", page_size, minimum=1)
    arguments.block_table(block_table, page_size, b=ids.shape[0])
    checks.array("cache_seqlens", cache_seqlens, axes="b", dtypes=("int32",))
    checks.shape("cache_seqlens", cache_seqlens, (ids.shape[0],), axes="b", remedy="give one length per sequence")
    ids, block_table, cache_seqlens = checks.to_jax(ids, block_table, cache_seqlens)
    ids = jnp.where(ids < cache_seqlens[:, None, None], ids, -1)
    sequences = jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None, None]
    return _slots(ids, jnp.broadcast_to(sequences, ids.shape), block_table, page_size)


def append_kv_cache(
    cache: jax.Array, latent: jax.Array, rope: jax.Array, slots: jax.Array, *, format: str
) -> jax.Array:
    """Writes the keys of new tokens into the pool, quantised as `quantize_kv` does it.

    In place when the cache is donated to the jit around it, or is the carry of a loop. Write first, then attend. Two
    tokens for one slot leave either of them there.

    Args:
      cache: a pool of this format: bfloat16 or float16 `[P, page_size, 1, d_qk]`; uint8 or float8_e4m3fn
        `[P, page_size, 1, 656]`, `[P, page_size, 1, 584]`, or padded `[P, bytes of a page]`. On a CPU only a uint8
        pool is updated in place, not one of float8_e4m3fn.
      latent: bfloat16, float16 or float32 `[t, d_latent]`: 512 channels; 448 for `fp8_v4` and for rows of 512.
      rope: the same dtypes, `[t, 64]`.
      slots: int32 `[t]` from `slot_mapping`. Negative slots and those behind the pool are skipped and touch nothing.
      format: static; "bf16", "f16", "fp8_v32" or "fp8_v4".

    Returns:
      The cache with the new rows.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype or shape, or `format` is unknown or not that of the
        cache.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashmla import kvcache
      >>> cache = kvcache.init_kv_cache(4, "bf16")
      >>> latent, rope = jnp.ones((3, 512), jnp.bfloat16), jnp.ones((3, 64), jnp.bfloat16)
      >>> cache = kvcache.append_kv_cache(cache, latent, rope, jnp.array([70, -1, 2], jnp.int32), format="bf16")
      >>> float(cache.sum()), float(cache[1, 6].sum()), float(cache[0, 2].sum())
      (1152.0, 576.0, 576.0)
    """
    fmt = arguments.kv_cache("cache", cache, format)
    checks.array("latent", latent, axes="t, d_latent", dtypes=checks.REFERENCE_DTYPES)
    checks.array("rope", rope, axes="t, 64", dtypes=checks.REFERENCE_DTYPES)
    checks.array("slots", slots, axes="t", dtypes=("int32",))
    arguments.kv_rows(latent, rope, format, head_dim=fmt.head_dim)
    checks.shape("slots", slots, (latent.shape[0],), axes="t", remedy="give one slot per row of latent")
    cache, latent, rope, slots = checks.to_jax(cache, latent, rope, slots)
    return write(cache, pack(latent, rope, fmt), slots, fmt)


def gather_kv_cache(
    cache: jax.Array, block_table: jax.Array, cache_seqlens: jax.Array, *, total: int, format: str
) -> jax.Array:
    """Reads whole sequences out of the pool, one behind the other: keys for a prefill that continues a prefix.

    Args:
      cache: a pool, as for `append_kv_cache`.
      block_table: int32 `[b, max_pages]`, the pages of each sequence in order; not read past the length.
      cache_seqlens: int32 `[b]`, keys per sequence, clamped to `[0, max_pages * page_size]`.
      total: static, rows of the result. Sequences that do not fit are cut off.
      format: static; "bf16", "f16", "fp8_v32" or "fp8_v4".

    Returns:
      `[total, d_qk]`, `[latent | rope]`: bfloat16, float16 for `f16`. Zeros behind the last sequence and for tokens of
      a page outside `[0, P)`.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype or shape, or `format` is unknown or not that of the
        cache.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashmla import kvcache
      >>> cache = jnp.arange(4, dtype=jnp.bfloat16)[:, None, None, None] * jnp.ones((4, 64, 1, 576), jnp.bfloat16)
      >>> table, lengths = jnp.array([[3, 1], [2, -1]], jnp.int32), jnp.array([65, 1], jnp.int32)
      >>> rows = kvcache.gather_kv_cache(cache, table, lengths, total=68, format="bf16")
      >>> rows.shape, rows[62:, 0].tolist()
      ((68, 576), [3.0, 3.0, 1.0, 2.0, 0.0, 0.0])
    """
    fmt = arguments.kv_cache("cache", cache, format)
    total = checks.integer("total", total, minimum=0)
    arguments.pool_tokens("total", total)
    page_size = page_size_of(cache.shape, fmt.token_bytes)
    arguments.block_table(block_table, page_size)
    checks.array("cache_seqlens", cache_seqlens, axes="b", dtypes=("int32",))
    checks.shape("cache_seqlens", cache_seqlens, (block_table.shape[0],), axes="b", remedy="give one per table row")
    cache, block_table, cache_seqlens = checks.to_jax(cache, block_table, cache_seqlens)
    lengths = jnp.clip(cache_seqlens, 0, jnp.int32(min(block_table.shape[1] * page_size, total)))
    # A sum of lengths may pass 2**31; what is cut off need not be counted.
    ends = jax.lax.associative_scan(lambda a, b: jnp.minimum(a, jnp.int32(total) - b) + b, lengths)
    row = jnp.arange(total, dtype=jnp.int32)
    sequence = jnp.searchsorted(ends, row, side="right").astype(jnp.int32)
    starts = jnp.pad(ends, (1, 0))
    slots = _slots(row - starts[sequence], sequence, block_table, page_size)
    exists = (slots >= 0) & (slots < cache.shape[0] * page_size)
    return jnp.where(exists[:, None], read(cache, jnp.where(exists, slots, 0)), 0)


def copy_pages(cache: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """Copies pages within a pool of any format; all are read before any is written.

    In place when the cache is donated: what `PageAllocator.extend` asks for.

    Args:
      cache: a pool, its pages along the first axis.
      source: int32 `[n]`, pages to read.
      target: int32 `[n]`, pages to write. Pairs with a page outside `[0, P)` are skipped, so -1 fills up a batch.

    Returns:
      The cache with the pages copied.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype or shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashmla import kvcache
      >>> cache = jnp.arange(4, dtype=jnp.bfloat16)[:, None, None, None] * jnp.ones((4, 64, 1, 576), jnp.bfloat16)
      >>> source, target = jnp.array([3, 1], jnp.int32), jnp.array([0, -1], jnp.int32)
      >>> kvcache.copy_pages(cache, source, target)[:, 0, 0, 0].tolist()
      [3.0, 1.0, 2.0, 3.0]
    """
    arguments.pool("cache", cache)
    checks.array("source", source, axes="n", dtypes=("int32",))
    checks.array("target", target, axes="n", dtypes=("int32",))
    checks.shape("target", target, tuple(source.shape), axes="n", remedy="give one target per source")
    cache, source, target = checks.to_jax(cache, source, target)
    num_pages = cache.shape[0]
    exists = (source >= 0) & (source < num_pages)
    data = as_bytes(cache)
    pages = data.at[jnp.where(exists, source, 0)].get(mode="promise_in_bounds")
    target = jnp.where(exists, target, -1)
    data = data.at[target].set(pages, mode="drop", wrap_negative_indices=False)
    return as_pool(data, cache)


def _slots(positions, sequences, block_table, page_size):
    b, max_pages = block_table.shape
    if b == 0 or max_pages == 0:
        return jnp.full(positions.shape, -1, jnp.int32)
    inside = (positions >= 0) & (positions < max_pages * page_size) & (sequences >= 0) & (sequences < b)
    column = jnp.where(inside, positions // page_size, 0)
    page = block_table.at[jnp.where(inside, sequences, 0), column].get(mode="promise_in_bounds")
    # A page so large that its slots pass 2**31 would come out as some other page.
    inside &= (page >= 0) & (page <= (checks.MAX_TOKENS + 1) // page_size - 1)
    return jnp.where(inside, jnp.where(inside, page, 0) * page_size + positions % page_size, -1)


def as_bytes(cache: jax.Array) -> jax.Array:
    """A float8 pool as the bytes that it is: XLA may widen a float8 scatter, and NaNs would lose their bits."""
    return jax.lax.bitcast_convert_type(cache, jnp.uint8) if cache.dtype == jnp.float8_e4m3fn else cache


def as_pool(data: jax.Array, cache: jax.Array) -> jax.Array:
    """The inverse of `as_bytes(cache)`."""
    return jax.lax.bitcast_convert_type(data, cache.dtype) if data.dtype != cache.dtype else data


def fp8_format(cache: jax.Array) -> KVFormat | None:
    """The format of a pool of bytes; None for a pool of plain rows."""
    if cache.dtype not in (jnp.uint8, jnp.float8_e4m3fn):
        return None
    return FP8_V32 if cache.ndim == 4 and cache.shape[-1] == FP8_V32.token_bytes else FP8_V4


def num_slots(cache: jax.Array) -> int:
    fmt = fp8_format(cache)
    return cache.shape[0] * (page_size_of(cache.shape, fmt.token_bytes) if fmt else cache.shape[1])


def write_rows(cache: jax.Array, rows: jax.Array, slots: jax.Array) -> jax.Array:
    """Puts rows `[t, token]` into their slots of a pool `[P, page_size, 1, token]`, of any dtype."""
    page, offset = _place(slots, cache.shape[0], cache.shape[1])
    return cache.at[page, offset, 0].set(rows, mode="drop", wrap_negative_indices=False)


def _place(slots: jax.Array, num_pages: int, page_size: int) -> tuple[jax.Array, jax.Array]:
    exists = (slots >= 0) & (slots < num_pages * page_size)
    return jnp.where(exists, slots // page_size, num_pages), slots % page_size  # behind the pool: dropped


def write(cache: jax.Array, rows: jax.Array, slots: jax.Array, fmt: KVFormat) -> jax.Array:
    """Puts packed rows `[t, token]` into their slots; see the head of the file for the way of it."""
    data = as_bytes(cache)
    if len(fmt.plane_bytes) == 1:
        data = write_rows(data, rows, slots)
    else:
        # A token has bytes in several planes, and the array's axes follow none of them.
        page_size = page_size_of(cache.shape, fmt.token_bytes)
        page, offset = _place(slots, cache.shape[0], page_size)
        within = np.concatenate([np.arange(width, dtype=np.int32) for width in fmt.plane_bytes])
        starts = np.repeat([fmt.plane_offset(i, page_size) for i in range(len(fmt.plane_bytes))], fmt.plane_bytes)
        widths = np.repeat(fmt.plane_bytes, fmt.plane_bytes)
        byte = jnp.asarray(starts + within, jnp.int32) + offset[:, None] * jnp.asarray(widths, jnp.int32)
        page = page[:, None]
        at = (page, byte) if data.ndim == 2 else (page, byte // fmt.token_bytes, 0, byte % fmt.token_bytes)
        data = data.at[at].set(rows, mode="drop", wrap_negative_indices=False)
    return as_pool(data, cache)


def read(cache: jax.Array, slots: jax.Array) -> jax.Array:
    """The keys `[..., d_qk]` in slots that exist; bfloat16 from fp8, else in the pool's dtype."""
    fmt = fp8_format(cache)
    if fmt is None:
        page, offset = slots // cache.shape[1], slots % cache.shape[1]
        return cache.at[page, offset, 0].get(mode="promise_in_bounds")
    page_size = page_size_of(cache.shape, fmt.token_bytes)
    data = as_bytes(cache)
    data = data.reshape(cache.shape[0], -1)

    def token(slot):
        page, offset = slot // page_size, slot % page_size
        starts = [fmt.plane_offset(i, page_size) + offset * width for i, width in enumerate(fmt.plane_bytes)]
        planes = [
            jax.lax.dynamic_slice(data, (page, start), (1, width))[0]
            for start, width in zip(starts, fmt.plane_bytes, strict=True)
        ]
        return jnp.concatenate(planes)

    rows = jax.vmap(token)(slots.ravel())
    return unpack(rows.reshape(*slots.shape, fmt.token_bytes), fmt)
