"""`gather_kv_cache`: sequences out of pages all over a pool."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from .. import kvcache
from .append import BESIDE, FORMATS, NAMES, PAGE_SIZE, PEERS, QUICK, RATED, CacheCase, check, compare
from .protocol import HIDES, Chain, jitted, repeated

__all__ = ["BESIDE", "FORMATS", "NAMES", "PEERS", "QUICK", "RATED", "check", "work"]


def ours(case: CacheCase, calls: tuple[int, int], sets: int, implementation: str) -> Chain:
    """Every call has a table of its own, or XLA would merge calls."""
    rng = np.random.default_rng(0)
    b = max(1, min(8, case.t // PAGE_SIZE))
    lengths = np.full(b, case.t // b, np.int32)
    lengths[0] += case.t - lengths.sum()
    width = -(-int(lengths[0]) // PAGE_SIZE)
    pages = rng.permutation(sets * b * width).astype(np.int32).reshape(sets, -1)
    tables = [jnp.asarray(rng.permutation(pages[i % sets]).reshape(b, width)) for i in range(calls[1])]
    tokens = pages.size * PAGE_SIZE
    keys = jax.random.normal(jax.random.key(0), (tokens, case.head_dim), jnp.bfloat16)
    pool = kvcache.init_kv_cache(pages.size, case.format, page_size=PAGE_SIZE)
    new = keys[:, :-64], keys[:, -64:], jnp.arange(tokens, dtype=jnp.int32)
    pool = jax.jit(functools.partial(kvcache.append_kv_cache, format=case.format), donate_argnums=0)(pool, *new)
    del keys, new

    def call(i: int, _: jax.Array, pool: jax.Array, lengths: jax.Array, *tables: jax.Array) -> jax.Array:
        read = functools.partial(kvcache.gather_kv_cache, format=case.format, implementation=implementation)
        rows = read(pool, tables[i], lengths, total=case.t)
        return jax.lax.optimization_barrier(rows)[0, 0]  # jnp would make this number alone

    # Results live as long as the program that makes them: gigabytes of them take 3 µs more than what is used again.
    chain = repeated if calls[0] * case.seconds > HIDES else jitted
    return chain(call, (pool, jnp.asarray(lengths), *tables), calls)


work = functools.partial(compare, ours)
