"""Decode steps over a paged MLA cache under one jax.jit: the kernel on a Hopper GPU, the reference anywhere else."""

import functools

import jax
import jax.numpy as jnp

from jax_flashmla import flash_mla_with_kvcache, get_mla_metadata

B, HEADS, D_QK, D_V, PAGE, MAX_PAGES = 4, 16, 576, 512, 64, 8


@functools.partial(jax.jit, donate_argnames="cache")
def step(q: jax.Array, row: jax.Array, cache: jax.Array, table: jax.Array, lengths: jax.Array) -> tuple[jax.Array, ...]:
    """Writes one [latent | rope] row per sequence, then lets q attend to all of its sequence, the new row included."""
    page = jnp.take_along_axis(table, lengths[:, None] // PAGE, axis=1)[:, 0]
    cache = cache.at[page, lengths % PAGE, 0].set(row)
    lengths = lengths + 1
    plan = get_mla_metadata(lengths, HEADS, 1)  # once per step; every layer of a model shares it
    out, _ = flash_mla_with_kvcache(q, cache, table, lengths, D_V, *plan, causal=True)
    return out, cache, lengths


key_q, key_cache, key_pages = jax.random.split(jax.random.key(0), 3)
cache = jax.random.normal(key_cache, (B * MAX_PAGES, PAGE, 1, D_QK), jnp.bfloat16)
table = jax.random.permutation(key_pages, B * MAX_PAGES).astype(jnp.int32).reshape(B, MAX_PAGES)
lengths = jnp.array([0, 5, 63, 300], jnp.int32)
for key in jax.random.split(key_q, 5):
    q = jax.random.normal(key, (B, 1, HEADS, D_QK), jnp.bfloat16)
    out, cache, lengths = step(q, q[:, 0, 0], cache, table, lengths)
    print("lengths", lengths, "output rms", jnp.square(out.astype(jnp.float32)).mean((1, 2, 3)) ** 0.5)
