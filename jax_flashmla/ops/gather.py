"""Whole sequences out of a pool, one behind the other."""

import jax
import jax.numpy as jnp

from .. import reference
from .._primitive import define
from ..kvcache.rows import pool_format

TARGET = "jax_flashmla.gather.v1"


def shapes(cache, block_table, cache_seqlens, *, total):
    fmt = pool_format(cache)
    dtype = jnp.bfloat16 if fmt.is_fp8 else cache.dtype
    return [jax.ShapeDtypeStruct((block_table.shape[0], total, fmt.head_dim), dtype)]


def cuda(cache, block_table, cache_seqlens, *, total):
    operands = cache, block_table, cache_seqlens
    return jax.ffi.ffi_call(TARGET, shapes(*operands, total=total))(*operands)


def batch(bind, size, operands, mapped):
    cache, block_table, cache_seqlens = operands
    table, lengths = (
        x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
        for x, is_mapped in zip((block_table, cache_seqlens), mapped[1:], strict=True)
    )
    if mapped[0]:  # pools become one pool, element after element
        pages = cache.shape[1]
        cache = cache.reshape(-1, *cache.shape[2:])
        first = pages * jnp.arange(size, dtype=jnp.int32)[:, None, None, None]
        table = jnp.where((table >= 0) & (table < pages), table + first, -1)
    n = table.shape[1]
    (rows,) = bind(cache, *(x.reshape(size * n, *x.shape[2:]) for x in (table, lengths)))
    return [rows.reshape(size, n, *rows.shape[1:])]


# Tables and lengths are those of n independent batches, so that vmap makes one launch; the public function has n = 1.
gather = define(
    "gather",
    target=TARGET,
    shapes=shapes,
    reference=reference.gather,
    cuda=cuda,
    batch=batch,
)
