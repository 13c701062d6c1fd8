"""DeepSeek Sparse Attention: an indexer picks a few tokens for every query, and MLA attends to those alone."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .. import checks, kvcache
from .._primitive import match_varying
from ..kvcache import arguments
from ..kvcache.formats import FP8_DTYPES, FP8_V32
from ..kvcache.paged import batch_slots
from ..sharding import MLAMesh
from .mla import (
    D_LATENT,
    MLAAttention,
    RopeConfig,
    along_last,
    by_chunks,
    check_lengths,
    linear,
    not_empty,
    precision,
    token_positions,
    write_positions,
    write_rows,
)
from .placement import on_mesh, place, pool_sharding

D_ROPE = 64  # the columns of an indexer's query or key that are rotated: the first ones
INDEX_NORM_EPS = 1e-6  # whatever rms_norm_eps the model has

# One scan step of the indexer scores this many tokens per sequence, or fewer where scores of all its heads would be
# more than MAX_SCORES numbers (64 MiB). Small enough that a short sequence does not pay for a wide table.
CHUNK_TOKENS = 4096
MAX_SCORES = 2**24


class SparseCache(NamedTuple):
    """The two caches of a layer with sparse attention; one block table serves both.

    Attributes:
      kv: the keys, `[P, page_size, 1, 576]` in the layer's dtype, or uint8 `[P, page_size, 1, 656]` (`fp8_v32`).
      index_keys: those of the indexer, the layer's dtype, `[P, page_size, 1, head_dim]`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from jax_flashmla import kvcache
      >>> from jax_flashmla.nn import SparseMLAAttention
      >>> attn = SparseMLAAttention(64, 4, q_lora_rank=32, dtype=jnp.float32, rngs=nnx.Rngs(0))
      >>> cache = attn.init_cache(num_pages=6, format="fp8_v32")
      >>> cache.kv.shape, cache.index_keys.shape
      ((6, 64, 1, 656), (6, 64, 1, 128))
      >>> source, target = jnp.array([2], jnp.int32), jnp.array([5], jnp.int32)
      >>> cache = jax.tree.map(lambda pool: kvcache.copy_pages(pool, source, target), cache)  # a page of both
    """

    kv: jax.Array
    index_keys: jax.Array


class LayerNorm(nnx.Module):
    """(x - mean) / deviation * scale + bias over the last axis, in float32, rounded once."""

    def __init__(self, size: int, eps: float, *, param_dtype: Any = jnp.float32):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size, param_dtype))
        self.bias = nnx.Param(jnp.zeros(size, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.eps)
        scale, bias = (along_last(v[...].astype(jnp.float32), x.ndim) for v in (self.scale, self.bias))
        return (y * scale + bias).astype(x.dtype)


def check_pool(name: str, pool: jax.Array, dtypes: tuple[str, ...], width: int) -> None:
    axes, remedy = f"P, page_size, 1, {width}", "make it with init_cache"
    checks.array(name, pool, axes=axes, dtypes=dtypes)
    checks.shape(name, pool, (*pool.shape[:2], 1, width), axes=axes, remedy=remedy)
    if pool.size == 0:
        raise ValueError(f"{name} must have at least one page and one token, got shape {pool.shape}; {remedy}")


class DSAIndexer(nnx.Module):
    """Picks, for every query token, the `topk` tokens of its sequence with the largest index scores.

    The score of token j for query i is `sum_h w[i, h] * relu(q[i, h] · k[j] * head_dim**-0.5)`, in float32. All heads
    share k, which the indexer keeps in a paged cache of its own.

    Args:
      hidden_size: width of x.
      q_lora_rank: width of the compressed query.
      num_heads, head_dim: of the indexer.
      topk: tokens to pick.
      rope: the `RopeConfig` of the layer, for the first 64 columns of q and k; its `interleave` is not used.
      interleave: pairs of those columns: False for half-split ones (DeepSeek-V3.2), True for neighbours (GLM-5).
      dtype: of parameters, activations and cache. The projection to w is float32 always, as in transformers.
      mesh: an `MLAMesh`: every device scores its sequences, whose keys are in its own pool. Parameters and the heads of
        the indexer are whole on each, so devices that share sequences pick the same tokens. None: one device.
      rngs: initialises the parameters.

    Raises:
      TypeError, ValueError: `num_heads`, `head_dim` or `topk` is no int or too small.
      NotImplementedError: a mesh with a context axis.

    Source: DeepSeek-V3.2, arXiv:2512.02556, section 2.1. Norm, rotation and scales as in transformers' `deepseek_v32`.
    DeepSeek's own inference code rotates q and k by a Hadamard matrix and quantises them to fp8: exact products do not
    need the one, and this indexer does not do the other.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jax_flashmla.nn import DSAIndexer
      >>> indexer = DSAIndexer(64, 32, num_heads=4, topk=2, dtype=jnp.float32, rngs=nnx.Rngs(0))
      >>> cache = indexer.init_cache(num_pages=4, page_size=16)
      >>> table, lengths = jnp.array([[2, 0]], jnp.int32), jnp.array([3], jnp.int32)
      >>> x, compressed = jnp.ones((1, 3, 64)), jnp.ones((1, 3, 32))
      >>> picks, cache = nnx.jit(DSAIndexer.__call__)(indexer, x, compressed, cache, table, lengths)
      >>> picks.shape, picks[0, 0].tolist()  # the first token sees itself and nothing else
      ((1, 3, 2), [0, -1])
    """

    def __init__(
        self,
        hidden_size: int,
        q_lora_rank: int,
        *,
        num_heads: int = 64,
        head_dim: int = 128,
        topk: int = 2048,
        rope: RopeConfig | None = None,
        interleave: bool = False,
        dtype: Any = jnp.bfloat16,
        mesh: MLAMesh | None = None,
        rngs: nnx.Rngs,
    ):
        if mesh is not None and mesh.context is not None:
            raise NotImplementedError(
                f"mesh must have no context axis for sparse attention, got context={mesh.context!r}; divide heads or "
                "the batch"
            )
        self.num_heads = checks.integer("num_heads", num_heads, minimum=1)
        self.head_dim = checks.integer("head_dim", head_dim, minimum=D_ROPE)
        self.topk = checks.integer("topk", topk, minimum=1)
        self.rope = dataclasses.replace(rope or RopeConfig(), interleave=interleave)
        self.dtype = jnp.dtype(dtype)
        self.wq_b = linear(q_lora_rank, num_heads * head_dim, dtype, rngs)
        self.wk = linear(hidden_size, head_dim, dtype, rngs)
        self.k_norm = LayerNorm(head_dim, INDEX_NORM_EPS, param_dtype=dtype)
        self.weights_proj = linear(hidden_size, num_heads, jnp.float32, rngs)
        self.mesh = mesh
        if mesh is not None:
            place(self, mesh)

    def init_cache(self, num_pages: int, *, page_size: int = 64) -> jax.Array:
        """Zeros of this indexer's dtype, `[num_pages, page_size, 1, head_dim]`; on a mesh, the pages of all devices."""
        return jnp.zeros((num_pages, page_size, 1, self.head_dim), self.dtype, device=pool_sharding(self.mesh))

    @on_mesh("x", "k_cache")
    def __call__(
        self,
        x: jax.Array,
        compressed: jax.Array,
        cache: jax.Array,
        block_table: jax.Array,
        cache_seqlens: jax.Array,
        *,
        num_new: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Writes the keys of the new tokens into the cache, then picks tokens for each of them.

        Memory does not grow with the context, but for the cache: pages are scored some at a time, and the best tokens
        so far are kept. Pages that no sequence of the batch reaches cost nothing.

        Args:
          x: the indexer's dtype, `[b, s, hidden_size]`, the last s tokens of each sequence.
          compressed: the same dtype, `[b, s, q_lora_rank]`, the compressed query of the attention behind its norm.
          cache: `[P, page_size, 1, head_dim]`; donate it to the jitted step, and it is updated in place. Slots that no
            token was written to may hold anything.
          block_table, cache_seqlens, num_new: as of `MLAAttention`.

        Returns:
          int32 `[b, s, k]` with `k = min(topk, max_pages * page_size)`, places in the sequence from 0, the best first
          and the earlier of two equals first; -1 behind the tokens that the query sees. And the cache.
          `kvcache.topk_to_slots` makes the `indices` of `flash_mla_with_kvcache` of them.

        Raises:
          TypeError, ValueError: an argument has the wrong type, dtype or shape, or cannot be divided.
        """
        self._check(x, compressed, cache, block_table, cache_seqlens, num_new)
        positions = token_positions(cache_seqlens, x.shape[1])
        written = write_positions(positions, num_new)
        operands = *self.queries(x, compressed, positions), self.keys(x, positions), positions, written, block_table
        if self.mesh is None:
            return self._write_and_pick(cache, *operands)
        # Devices of the heads axis must pick alike. They do: each has these operands whole, and what x comes from, the
        # sum of all their parts, has the same bits on every one.
        pool, rows = self.mesh.sharding("k_cache").spec, self.mesh.sharding("x").spec
        body = self.mesh.shard_map(self._write_and_pick, (pool, *[rows] * len(operands)), (rows, pool))
        return body(cache, *operands)

    def queries(self, x: jax.Array, compressed: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """q `[b, s, num_heads, head_dim]` and the weights of the heads, float32 `[b, s, num_heads]`."""
        q = self.wq_b(compressed).reshape(*positions.shape, self.num_heads, self.head_dim)
        weights = self.weights_proj(x.astype(jnp.float32)) * np.float32(self.num_heads**-0.5)
        return self._rotate(q, positions), weights

    def keys(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """k `[b, s, head_dim]`, as the cache stores it."""
        return self._rotate(self.k_norm(self.wk(x))[:, :, None], positions)[:, :, 0]

    def scores(self, q: jax.Array, weights: jax.Array, keys: jax.Array) -> jax.Array:
        """Index scores, float32 `[b, s, t]`, of the queries for keys `[b, t, head_dim]`, whether seen or not."""
        products = jnp.einsum(
            "bshd,btd->bsht", q, keys, precision=precision(self.dtype), preferred_element_type=jnp.float32
        )
        products = jax.nn.relu(products * np.float32(self.head_dim**-0.5))
        return jnp.einsum("bsht,bsh->bst", products, weights, precision=jax.lax.Precision.HIGHEST)

    def _check(
        self,
        x: jax.Array,
        compressed: jax.Array,
        cache: jax.Array,
        block_table: jax.Array,
        cache_seqlens: jax.Array,
        num_new: jax.Array | None,
    ) -> None:
        """The widths of x and compressed are left to the projections."""
        not_empty("x", x, "b, s, hidden_size")
        b, s, _ = x.shape
        remedy = "give one row per token of x"
        checks.shape("compressed", compressed, (b, s, compressed.shape[-1]), axes="b, s, q_lora_rank", remedy=remedy)
        check_pool("cache", cache, (self.dtype.name,), self.head_dim)
        arguments.block_table(block_table, cache.shape[1], b=b)
        check_lengths("cache_seqlens", cache_seqlens, b)
        if num_new is not None:
            check_lengths("num_new", num_new, b)
        if self.mesh is not None:
            self.mesh.divides("batch", "x", b)
            self.mesh.divides("pages", "cache", cache.shape[0])

    def _rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        rotary, plain = jnp.split(x, [D_ROPE], axis=-1)
        return jnp.concatenate([self.rope.rotate(rotary, positions), plain], axis=-1)

    def _write_and_pick(
        self,
        cache: jax.Array,
        q: jax.Array,
        weights: jax.Array,
        keys: jax.Array,
        positions: jax.Array,
        written: jax.Array,
        block_table: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """What a device does with its own sequences and its own pool."""
        cache = write_rows(cache, keys, block_table, written)
        # Picks are integers, and have no gradient.
        q, weights, pool = map(jax.lax.stop_gradient, (q, weights, cache))

        def pick(q: jax.Array, weights: jax.Array, positions: jax.Array) -> jax.Array:
            return self._pick(q, weights, positions, pool, block_table)

        return by_chunks(pick, q, weights, positions), cache

    def _pick(
        self, q: jax.Array, weights: jax.Array, positions: jax.Array, cache: jax.Array, block_table: jax.Array
    ) -> jax.Array:
        """A running top-k over chunks of pages."""
        b, s = positions.shape
        num_pages, page_size = cache.shape[:2]
        max_pages = block_table.shape[1]
        k = min(self.topk, max_pages * page_size)
        scores = b * s * self.num_heads  # of a key; no number where the batch is symbolic
        fit = MAX_SCORES // scores if isinstance(scores, int) else CHUNK_TOKENS
        tokens = min(CHUNK_TOKENS, fit, max_pages * page_size)
        chunk_pages = max(1, tokens // page_size)
        tokens = chunk_pages * page_size
        steps = -(-max_pages // chunk_pages)
        pages = jnp.pad(block_table, ((0, 0), (0, steps * chunk_pages - max_pages)), constant_values=-1)
        pages = pages.reshape(b, steps, chunk_pages).swapaxes(0, 1)
        starts = tokens * jnp.arange(steps, dtype=jnp.int32)

        def merge(best: tuple[jax.Array, ...], page: jax.Array, start: jax.Array) -> tuple[jax.Array, ...]:
            exists = (page >= 0) & (page < num_pages)
            keys = cache.at[jnp.where(exists, page, 0)].get(mode="promise_in_bounds").reshape(b, tokens, -1)
            place = start + jnp.arange(tokens, dtype=jnp.int32)[None, None]
            seen = jnp.repeat(exists, page_size, axis=1)[:, None] & (place <= positions[:, :, None])
            # An unused slot may hold NaN, and so may its score, but no other score.
            scores = jnp.where(seen, self.scores(q, weights, keys), -jnp.inf)
            # top_k names places for scores of -inf too: there the place is -1 already.
            ids = jnp.where(seen, place, -1)
            scores, ids = jnp.concatenate([best[0], scores], axis=-1), jnp.concatenate([best[1], ids], axis=-1)
            scores, at = jax.lax.top_k(scores, k)
            return scores, jnp.take_along_axis(ids, at, axis=-1)

        def step(best: tuple[jax.Array, ...], chunk: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, ...], None]:
            # Tables are as wide as the longest context a server allows; what no query sees costs nothing.
            needed = chunk[1] <= positions.max()
            return jax.lax.cond(needed, merge, lambda best, *_: best, best, *chunk), None

        best: tuple[jax.Array, ...] = jnp.full((b, s, k), -jnp.inf, jnp.float32), jnp.full((b, s, k), -1, jnp.int32)
        best = tuple(match_varying(x, q, weights, positions, cache, block_table) for x in best)
        return jax.lax.scan(step, best, (pages, starts))[0][1]


class SparseMLAAttention(MLAAttention):
    """`MLAAttention` that attends only to the tokens that its `DSAIndexer` picks: DeepSeek Sparse Attention.

    Args:
      hidden_size, num_heads, rope, dtype, rngs: as of `MLAAttention`.
      q_lora_rank: width of the compressed query, which the indexer reads too; not None.
      index_topk, index_n_heads, index_head_dim: `topk`, `num_heads` and `head_dim` of the indexer.
      index_rope_interleave: its `interleave`.
      mesh: an `MLAMesh` that divides heads, sequences, or both: attention as in `MLAAttention`, picks as in
        `DSAIndexer`, and both pools of the cache as it says. None: one device.
      options: the other arguments of `MLAAttention`.

    Raises:
      TypeError, ValueError: a width that the op or the indexer does not have, or no compressed query; heads that cannot
        be divided.
      NotImplementedError: a mesh with a context axis.

    Source: DeepSeek-V3.2, arXiv:2512.02556, section 2.1.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jax_flashmla.nn import SparseMLAAttention
      >>> attn = SparseMLAAttention(64, 4, q_lora_rank=32, index_topk=8, dtype=jnp.float32, rngs=nnx.Rngs(0))
      >>> step = nnx.jit(SparseMLAAttention.__call__, donate_argnums=2)
      >>> cache = attn.init_cache(num_pages=6, page_size=16)
      >>> block_table, lengths = jnp.array([[4, 1], [0, 3]], jnp.int32), jnp.array([3, 20], jnp.int32)
      >>> y, cache = step(attn, jnp.ones((2, 3, 64)), cache, block_table, lengths)
      >>> y.shape, cache.kv.shape, cache.index_keys.shape
      ((2, 3, 64), (6, 16, 1, 576), (6, 16, 1, 128))
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        q_lora_rank: int,
        index_topk: int = 2048,
        index_n_heads: int = 64,
        index_head_dim: int = 128,
        index_rope_interleave: bool = False,
        rope: RopeConfig | None = None,
        dtype: Any = jnp.bfloat16,
        mesh: MLAMesh | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        if q_lora_rank is None:
            raise ValueError("q_lora_rank must be an int, got None; the indexer reads the compressed query")
        shared: dict[str, Any] = {"rope": rope, "dtype": dtype, "mesh": mesh, "rngs": rngs}
        super().__init__(hidden_size, num_heads, q_lora_rank=q_lora_rank, **shared, **options)
        self.indexer = DSAIndexer(
            hidden_size,
            q_lora_rank,
            num_heads=index_n_heads,
            head_dim=index_head_dim,
            topk=index_topk,
            interleave=index_rope_interleave,
            **shared,
        )

    def init_cache(  # type: ignore[override]
        self, num_pages: int, *, page_size: int = 64, format: str | None = None
    ) -> SparseCache:
        """Zeros for `num_pages` pages.

        Args:
          num_pages: pages, the same for keys and for those of the indexer; on a mesh, those of all devices.
          page_size: tokens in a page.
          format: of the keys: None for rows of this layer's dtype, or "fp8_v32" for 656 bytes a token. The keys of the
            indexer are of the layer's dtype always.

        Returns:
          A `SparseCache`; its dtypes tell the layer the format.

        Raises:
          ValueError: another format, or fp8 for a float16 layer.
        """
        index_keys = self.indexer.init_cache(num_pages, page_size=page_size)
        if format is None:
            return SparseCache(super().init_cache(num_pages, page_size=page_size), index_keys)
        if format != "fp8_v32":
            raise ValueError(f"format must be None, which is rows of {self.dtype}, or 'fp8_v32', got {format!r}")
        if self.dtype == jnp.float16:
            raise ValueError("format must be None for a float16 layer, got 'fp8_v32'; make the layer in bfloat16")
        shape = FP8_V32.pool_shape(num_pages, page_size)
        return SparseCache(jnp.zeros(shape, FP8_V32.dtype, device=pool_sharding(self.mesh)), index_keys)

    @on_mesh("x", "k_cache")
    def __call__(
        self,
        x: jax.Array,
        cache: SparseCache,
        block_table: jax.Array,
        cache_seqlens: jax.Array,
        *,
        num_new: jax.Array | None = None,
        metadata: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, SparseCache]:
        """Writes the new tokens into both caches, picks tokens for each of them, and attends to those.

        Args:
          x, block_table, cache_seqlens, num_new: as of `MLAAttention`. More than 128 tokens go through in equal chunks
            of at most 128, one after the other.
          cache: from `init_cache` or from the last call; donate it to the jitted step.
          metadata: None; sparse decode has no plan in this version.

        Returns:
          y `[b, s, hidden_size]` and the cache.

        Raises:
          TypeError, ValueError: the cache is not from `init_cache`, or an argument has the wrong dtype or shape, or
            cannot be divided.
        """
        self._check_cache(cache)
        compressed = self._compressed(x)
        picks, index_keys = self.indexer(x, compressed, cache.index_keys, block_table, cache_seqlens, num_new=num_new)
        positions = token_positions(cache_seqlens, x.shape[1])
        kv = self._write(cache.kv, self._rows(x, positions), block_table, write_positions(positions, num_new))
        slots: Callable[..., jax.Array] = functools.partial(kvcache.topk_to_slots, page_size=kv.shape[1])
        attention = self.attention
        if self.mesh is not None:
            rows = self.mesh.sharding("x").spec
            slots = self.mesh.shard_map(slots, (rows, rows, rows), rows)
            attention = self.mesh.shard(attention)
        indices = slots(picks, block_table, cache_seqlens)

        def attend(q: jax.Array, indices: jax.Array) -> jax.Array:
            return attention(
                q,
                kv,
                None,
                None,
                D_LATENT,
                *(metadata or (None, None)),
                softmax_scale=self.softmax_scale,
                is_fp8_kvcache=_is_fp8(kv),
                indices=indices,
                implementation=self.implementation,
            )[0]

        out = by_chunks(attend, self._absorbed(*self._queries(compressed, positions)), indices)
        return self._output(self._unabsorbed(out)), SparseCache(kv, index_keys)

    def _check_cache(self, cache: SparseCache) -> None:
        if not isinstance(cache, SparseCache):
            raise TypeError(f"cache must be a SparseCache, got {type(cache).__name__}; make it with init_cache")
        kv, index_keys = cache
        checks.array("cache.kv", kv, axes="P, page_size, 1, token", dtypes=(self.dtype.name, *FP8_DTYPES))
        check_pool("cache.kv", kv, (kv.dtype.name,), FP8_V32.token_bytes if _is_fp8(kv) else D_LATENT + self.d_rope)
        check_pool("cache.index_keys", index_keys, (self.dtype.name,), self.indexer.head_dim)
        if kv.shape[:2] != index_keys.shape[:2]:
            raise ValueError(
                "cache must have two pools of the same pages, got the shapes "
                f"{kv.shape} and {index_keys.shape}; make it with init_cache"
            )

    def _write(self, kv: jax.Array, rows: jax.Array, block_table: jax.Array, positions: jax.Array) -> jax.Array:
        format = "fp8_v32" if _is_fp8(kv) else None
        latent, rope = jnp.split(rows, [D_LATENT], axis=-1)
        if self.mesh is not None:
            options = {"format": format, "implementation": self.implementation}
            return self.mesh.append_kv_cache(kv, latent, rope, block_table, positions, **options)
        if format is None:
            return write_rows(kv, rows, block_table, positions)
        slots = batch_slots(positions, block_table, page_size=kv.shape[1])
        latent, rope = latent.reshape(slots.size, -1), rope.reshape(slots.size, -1)
        return kvcache.append_kv_cache(kv, latent, rope, slots, format=format, implementation=self.implementation)

    def _seen(self, x: jax.Array, compressed: jax.Array, positions: jax.Array) -> jax.Array:
        """The picks among all tokens at once, for `mha`."""
        causal = super()._seen(x, compressed, positions)[:, 0]
        scores = self.indexer.scores(*self.indexer.queries(x, compressed, positions), self.indexer.keys(x, positions))
        picks = jax.lax.top_k(jnp.where(causal, scores, -jnp.inf), min(self.indexer.topk, x.shape[1]))[1]
        picked = jnp.put_along_axis(jnp.zeros(scores.shape, bool), picks, True, axis=-1, inplace=False)
        return (picked & causal)[:, None]


def _is_fp8(cache: jax.Array) -> bool:
    return str(cache.dtype) in FP8_DTYPES
