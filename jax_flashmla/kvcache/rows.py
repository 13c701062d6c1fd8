"""Rows into a pool and out of it, in jnp: what the kernels for the cache must reproduce bit for bit.

XLA on the CPU updates a pool in place only by a scatter into the pool as it is: reshaping the result back to an array
with h_kv = 1 costs a copy of everything, and so does a change of dtype.
"""

import jax
import jax.numpy as jnp
import numpy as np

from .. import checks
from .formats import FP8_V4, FP8_V32, KVFormat, layout, page_size_of
from .quantize import unpack


def token_slots(positions: jax.Array, sequences: jax.Array, block_table: jax.Array, page_size: int) -> jax.Array:
    """Slots of places in sequences, the rows of `block_table`; -1 where there is none."""
    b, max_pages = block_table.shape
    if b == 0 or max_pages == 0:
        return jnp.full(positions.shape, -1, jnp.int32)
    inside = (positions >= 0) & (positions < max_pages * page_size) & (sequences >= 0) & (sequences < b)
    column = jnp.where(inside, positions // page_size, 0)
    page = block_table.at[jnp.where(inside, sequences, 0), column].get(mode="promise_in_bounds")
    # A page so large that its slots pass 2**31 would come out as some other page.
    inside &= (page >= 0) & (page <= (checks.MAX_TOKENS + 1) // page_size - 1)
    return jnp.where(inside, jnp.where(inside, page, 0) * page_size + positions % page_size, -1)


def gather_slots(block_table: jax.Array, cache_seqlens: jax.Array, page_size: int, total: int) -> jax.Array:
    """Slots `[total]` of whole sequences, one behind the other; -1 behind the last one and where there is no page."""
    b = cache_seqlens.shape[0]
    lengths = jnp.clip(cache_seqlens, 0, jnp.int32(min(block_table.shape[1] * page_size, total)))
    sums = jnp.cumsum(lengths, dtype=jnp.int32)
    # The first sum beyond 2**31 is negative; from there on all are cut off.
    index = jnp.arange(b, dtype=jnp.int32)
    beyond = index >= jnp.where(sums < 0, index, checks.MAX_TOKENS).min(initial=checks.MAX_TOKENS)
    ends = jnp.where(beyond, total, jnp.minimum(sums, total))
    row = jnp.arange(total, dtype=jnp.int32)
    ending = jnp.zeros(total + 1, jnp.int32).at[ends].add(1)  # sequences that end before each row
    sequence = jnp.cumsum(ending, dtype=jnp.int32)[:total]
    starts = jnp.pad(ends, (1, 0))
    return token_slots(row - starts[sequence], sequence, block_table, page_size)


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


def pool_format(cache: jax.Array) -> KVFormat:
    """The format of a pool that the cache operations take."""
    return fp8_format(cache) or layout("f16" if cache.dtype == jnp.float16 else "bf16", cache.shape[3])


def num_slots(cache: jax.Array) -> int:
    fmt = fp8_format(cache)
    return cache.shape[0] * (page_size_of(cache.shape, fmt.token_bytes) if fmt else cache.shape[1])


def join_pools(op: str, pools: jax.Array, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pools `[n, ...]`, one per element that vmap maps, as one pool, and slots `[n, ...]` of those as slots of it."""
    size = pools.shape[0]
    pool = pools.reshape(-1, *pools.shape[2:])
    total = num_slots(pool)
    if total > checks.MAX_TOKENS:
        raise ValueError(
            f"{op}: the caches of all elements that vmap maps must address fewer than 2**31 tokens together, got "
            f"{total}; map fewer, or put all pages into one pool"
        )
    own = total // max(size, 1)
    first = own * jnp.arange(size, dtype=jnp.int32).reshape(size, *[1] * (slots.ndim - 1))
    return pool, jnp.where((slots >= 0) & (slots < own), slots + first, -1)


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
        byte = jnp.asarray(starts + within, jnp.int32)[None] + offset[:, None] * jnp.asarray(widths, jnp.int32)[None]
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
