"""New tokens into the slots of a pool, in place."""

import jax
import jax.numpy as jnp

from .. import reference
from .._primitive import define
from ..kvcache.rows import join_pools

TARGET = "jax_flashmla.append.v1"


def shapes(cache, latent, rope, slots):
    return [jax.ShapeDtypeStruct(cache.shape, cache.dtype)]


def cuda(cache, latent, rope, slots):
    if latent.dtype != rope.dtype:
        latent, rope = latent.astype(jnp.float32), rope.astype(jnp.float32)  # exact
    call = jax.ffi.ffi_call(TARGET, shapes(cache, latent, rope, slots), input_output_aliases={0: 0})
    return call(cache, latent, rope, slots)


def batch(bind, size, operands, mapped):
    """Pools become one pool, element after element; every element has its own, so one that is shared is copied."""
    cache, latent, rope, slots = (
        x if is_mapped else jnp.broadcast_to(x, (size, *x.shape)) for x, is_mapped in zip(operands, mapped, strict=True)
    )
    pages = cache.shape[1]
    cache, slots = join_pools("append", cache, slots)
    latent, rope = (x.reshape(-1, x.shape[-1]) for x in (latent, rope))
    (cache,) = bind(cache, latent, rope, slots.ravel())
    return [cache.reshape(size, pages, *cache.shape[1:])]


append = define(
    "append",
    target=TARGET,
    shapes=shapes,
    reference=reference.append,
    cuda=cuda,
    batch=batch,
)
