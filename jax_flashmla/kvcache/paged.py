"""Operations on a paged cache: jit-able, and in place where the cache is donated."""

import jax
import jax.numpy as jnp

from .. import checks, ops
from . import arguments
from .formats import page_size_of
from .rows import as_bytes, as_pool, token_slots


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
    return token_slots(positions, sequence_ids, block_table, page_size)


def batch_slots(positions: jax.Array, block_table: jax.Array, *, page_size: int) -> jax.Array:
    """`slot_mapping` of positions `[b, s]`, those of sequence i in row i, as `[b * s]`."""
    b, s = positions.shape
    sequences = jnp.repeat(jnp.arange(b, dtype=jnp.int32), s)
    return slot_mapping(positions.reshape(-1), sequences, block_table, page_size=page_size)


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
    return token_slots(ids, jnp.broadcast_to(sequences, ids.shape), block_table, page_size)


def append_kv_cache(
    cache: jax.Array,
    latent: jax.Array,
    rope: jax.Array,
    slots: jax.Array,
    *,
    format: str,
    implementation: str | None = None,
) -> jax.Array:
    """Writes the keys of new tokens into the pool, quantised as `quantize_kv` does it.

    In place when the cache is donated to the jit around it, or is the carry of a loop. Write first, then attend. Slots
    that exist should differ: two tokens for one slot leave either of them there, or parts of both.

    Args:
      cache: a pool of this format: bfloat16 or float16 `[P, page_size, 1, d_qk]`; uint8 or float8_e4m3fn
        `[P, page_size, 1, 656]`, `[P, page_size, 1, 584]`, or padded `[P, bytes of a page]`. On a CPU only a uint8
        pool is updated in place, not one of float8_e4m3fn.
      latent: bfloat16, float16 or float32 `[t, d_latent]`: 512 channels; 448 for `fp8_v4` and for rows of 512.
      rope: the same dtypes, `[t, 64]`.
      slots: int32 `[t]` from `slot_mapping`. Negative slots and those behind the pool are skipped and touch nothing.
      format: static; "bf16", "f16", "fp8_v32" or "fp8_v4".
      implementation: None takes the CUDA kernel where the computation is lowered for a Hopper GPU, else plain XLA;
        "cuda" insists on the kernel; "xla" forces plain XLA, which is differentiable (bytes of fp8 have no gradient).

    Returns:
      The cache with the new rows.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype or shape, or `format` is unknown or not that of the
        cache.
      NotImplementedError: differentiated without `implementation="xla"`.
      RuntimeError: implementation="cuda" where the kernel cannot run.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashmla import kvcache
      >>> cache = kvcache.init_kv_cache(4, "bf16")
      >>> latent, rope = jnp.ones((3, 512), jnp.bfloat16), jnp.ones((3, 64), jnp.bfloat16)
      >>> cache = kvcache.append_kv_cache(cache, latent, rope, jnp.array([70, -1, 2], jnp.int32), format="bf16")
      >>> float(cache.sum()), float(cache[1, 6].sum()), float(cache[0, 2].sum())
      (1152.0, 576.0, 576.0)
    """
    checks.implementation(implementation)
    fmt = arguments.kv_cache("cache", cache, format)
    checks.array("latent", latent, axes="t, d_latent", dtypes=checks.REFERENCE_DTYPES)
    checks.array("rope", rope, axes="t, 64", dtypes=checks.REFERENCE_DTYPES)
    checks.array("slots", slots, axes="t", dtypes=("int32",))
    arguments.kv_rows(latent, rope, format, head_dim=fmt.head_dim)
    checks.shape("slots", slots, (latent.shape[0],), axes="t", remedy="give one slot per row of latent")
    cache, latent, rope, slots = checks.to_jax(cache, latent, rope, slots)
    return ops.append(cache, latent, rope, slots, implementation=implementation)[0]


def gather_kv_cache(
    cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    total: int,
    format: str,
    implementation: str | None = None,
) -> jax.Array:
    """Reads whole sequences out of the pool, one behind the other: keys for a prefill that continues a prefix.

    Args:
      cache: a pool, as for `append_kv_cache`.
      block_table: int32 `[b, max_pages]`, the pages of each sequence in order; not read past the length.
      cache_seqlens: int32 `[b]`, keys per sequence, clamped to `[0, max_pages * page_size]`.
      total: static, rows of the result. Sequences that do not fit are cut off.
      format: static; "bf16", "f16", "fp8_v32" or "fp8_v4".
      implementation: None takes the CUDA kernel where the computation is lowered for a Hopper GPU, else plain XLA;
        "cuda" insists on the kernel; "xla" forces plain XLA, which is differentiable (bytes of fp8 have no gradient).

    Returns:
      `[total, d_qk]`, `[latent | rope]`: bfloat16, float16 for `f16`. Zeros behind the last sequence and for tokens of
      a page outside `[0, P)`.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype or shape, or `format` is unknown or not that of the
        cache.
      NotImplementedError: differentiated without `implementation="xla"`.
      RuntimeError: implementation="cuda" where the kernel cannot run.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashmla import kvcache
      >>> cache = jnp.arange(4, dtype=jnp.bfloat16)[:, None, None, None] * jnp.ones((4, 64, 1, 576), jnp.bfloat16)
      >>> table, lengths = jnp.array([[3, 1], [2, -1]], jnp.int32), jnp.array([65, 1], jnp.int32)
      >>> rows = kvcache.gather_kv_cache(cache, table, lengths, total=68, format="bf16")
      >>> rows.shape, rows[62:, 0].tolist()
      ((68, 576), [3.0, 3.0, 1.0, 2.0, 0.0, 0.0])
    """
    checks.implementation(implementation)
    fmt = arguments.kv_cache("cache", cache, format)
    total = checks.integer("total", total, minimum=0)
    arguments.pool_tokens("total", total)
    page_size = page_size_of(cache.shape, fmt.token_bytes)
    arguments.block_table(block_table, page_size)
    checks.array("cache_seqlens", cache_seqlens, axes="b", dtypes=("int32",))
    checks.shape("cache_seqlens", cache_seqlens, (block_table.shape[0],), axes="b", remedy="give one per table row")
    cache, block_table, cache_seqlens = checks.to_jax(cache, block_table, cache_seqlens)
    (rows,) = ops.gather(cache, block_table[None], cache_seqlens[None], total=total, implementation=implementation)
    return rows[0]


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
