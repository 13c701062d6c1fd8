"""What users call. Names and argument order follow FlashMLA; conventions follow JAX."""

import jax
import jax.numpy as jnp

from . import checks, ops
from .ops.schedule import METADATA_WIDTH, num_parts


def get_mla_metadata(
    cache_seqlens: jax.Array,
    num_q_tokens_per_head_k: int,
    num_heads_k: int,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    *,
    batch_invariant: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Plans how the thread blocks of a decode step share the KV cache.

    Make the plan once per step and pass it to all layers. It is a pure function with static shapes, so it can be jitted
    with the step, and it costs a few microseconds on the GPU.

    Args:
      cache_seqlens: int32 `[b]`, keys per sequence, the new tokens included. Negative lengths count as 0.
      num_q_tokens_per_head_k: query rows per sequence and KV head, `s_q * h_q // h_kv`; static.
      num_heads_k: `h_kv`; static.
      num_heads_q: `h_q`; only sparse decode needs it.
      is_fp8_kvcache: must be False in this version.
      topk: must be None in this version.
      batch_invariant: cut each sequence by its own length alone, so that its output bits do not depend on the rest of
        the batch. Balances the GPU less well.

    Returns:
      `tile_scheduler_metadata`, int32 `[num_parts, 8]`, and `num_splits`, int32 `[b + 1]`; both opaque, for
      `flash_mla_with_kvcache`.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype or shape.
      NotImplementedError: `is_fp8_kvcache` or `topk` is used.

    Example:
      >>> import jax.numpy as jnp, jax_flashmla
      >>> metadata, num_splits = jax_flashmla.get_mla_metadata(jnp.array([300, 0, 70], jnp.int32), 16, 1)
      >>> metadata.shape[1], num_splits.shape
      (8, (4,))
    """
    checks.dense_only(is_fp8_kvcache=(is_fp8_kvcache, False), topk=(topk, None))
    checks.array("cache_seqlens", cache_seqlens, axes="b", dtypes=("int32",))
    rows = checks.integer("num_q_tokens_per_head_k", num_q_tokens_per_head_k, minimum=1)
    h_kv = checks.integer("num_heads_k", num_heads_k, minimum=1)
    if num_heads_q is not None:
        checks.integer("num_heads_q", num_heads_q, minimum=1)
    batch_invariant = checks.flag("batch_invariant", batch_invariant)
    b = cache_seqlens.shape[0]
    checks.invariant_batch(b, batch_invariant)
    parts = num_parts(b, rows, h_kv, batch_invariant=batch_invariant)
    metadata, num_splits = ops.schedule(jnp.asarray(cache_seqlens)[None], parts=parts, batch_invariant=batch_invariant)
    return metadata[0], num_splits[0]


def flash_mla_with_kvcache(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array | None,
    cache_seqlens: jax.Array | None,
    head_dim_v: int,
    tile_scheduler_metadata: jax.Array | None = None,
    num_splits: jax.Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: jax.Array | None = None,
    *,
    attn_sink: jax.Array | None = None,
    extra_k_cache: jax.Array | None = None,
    extra_indices_in_kvcache: jax.Array | None = None,
    topk_length: jax.Array | None = None,
    extra_topk_length: jax.Array | None = None,
    descale_q: jax.Array | None = None,
    descale_k: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Multi-head Latent Attention of a few query tokens per sequence over a paged KV cache.

    Every query head attends to the `[latent | rope]` rows of the cache that its group of heads shares; the values are
    the first 512 columns of the same rows. Scores, softmax and sums are in float32.

    Args:
      q: bfloat16 or float16 `[b, s_q, h_q, d_qk]` with `d_qk` 576 or 512; float32 runs through the reference.
      k_cache: q's dtype, `[P, page_size, h_kv, d_qk]`, a pool of pages of 16, 32, 64 (fastest), 128 or 256 tokens.
        Slots that no sequence uses may hold anything, NaN too.
      block_table: int32 `[b, max_pages]`, the pages of each sequence in order. Entries past the length are not read;
        tokens of a page outside `[0, P)` are ignored.
      cache_seqlens: int32 `[b]`, keys per sequence, the new tokens included (write first, then attend). 0 is legal;
        lengths are clamped to `[0, max_pages * page_size]`.
      head_dim_v: 512.
      tile_scheduler_metadata: int32 `[num_parts, 8]` from `get_mla_metadata`; None plans inside.
      num_splits: int32 `[b + 1]` from `get_mla_metadata`; None plans inside.
      softmax_scale: static number; None means `d_qk ** -0.5`.
      causal: static; query token i sees the keys `j <= cache_seqlens - s_q + i`.
      is_fp8_kvcache, indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length,
        descale_q, descale_k: FlashMLA's arguments for fp8 and sparse caches, not in this version.
      implementation: None takes the CUDA kernel where the computation is lowered for a Hopper GPU, else the XLA
        reference; "cuda" insists on the kernel; "xla" forces the reference, which is differentiable.

    Returns:
      `out`, q's dtype, `[b, s_q, h_q, 512]`, and `softmax_lse`, float32 `[b, h_q, s_q]`, the natural logarithm of the
      sum of the exponentials of the scaled scores. A row that sees no key has out 0 and lse -inf (FlashMLA: +inf).

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype or shape, or is traced and must be static; the
        message says which, what was expected, and what to do. `vmap` over `k_cache` is a ValueError too.
      NotImplementedError: an argument for fp8 or sparse caches is used; or the call is differentiated without
        `implementation="xla"`.
      RuntimeError: `implementation="cuda"` and there is no Hopper GPU or no CUDA build.

    Source: DeepSeek-V2, arXiv:2405.04434 (the absorbed form of MLA); FlashMLA, github.com/deepseek-ai/FlashMLA.

    Example:
      >>> import jax, jax.numpy as jnp, jax_flashmla
      >>> q = jax.random.normal(jax.random.key(0), (2, 1, 16, 576), jnp.bfloat16)
      >>> k_cache = jax.random.normal(jax.random.key(1), (8, 64, 1, 576), jnp.bfloat16)
      >>> block_table = jnp.array([[3, 1, 6], [0, 2, 2]], jnp.int32)
      >>> cache_seqlens = jnp.array([140, 7], jnp.int32)
      >>> metadata, num_splits = jax_flashmla.get_mla_metadata(cache_seqlens, 16, 1)
      >>> out, lse = jax_flashmla.flash_mla_with_kvcache(
      ...     q, k_cache, block_table, cache_seqlens, 512, metadata, num_splits, causal=True)
      >>> out.shape, str(out.dtype), lse.shape
      ((2, 1, 16, 512), 'bfloat16', (2, 16, 1))
    """
    checks.dense_only(
        is_fp8_kvcache=(is_fp8_kvcache, False),
        indices=(indices, None),
        attn_sink=(attn_sink, None),
        extra_k_cache=(extra_k_cache, None),
        extra_indices_in_kvcache=(extra_indices_in_kvcache, None),
        topk_length=(topk_length, None),
        extra_topk_length=(extra_topk_length, None),
        descale_q=(descale_q, None),
        descale_k=(descale_k, None),
    )
    checks.implementation(implementation)
    head_dim_v = checks.integer("head_dim_v", head_dim_v, minimum=1)
    checks.dense_decode(q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits, head_dim_v)
    softmax_scale = checks.scale("softmax_scale", softmax_scale, default=q.shape[-1] ** -0.5)
    causal = checks.flag("causal", causal)
    if tile_scheduler_metadata is None:  # an optional operand is an empty array
        tile_scheduler_metadata, num_splits = jnp.zeros((0, METADATA_WIDTH), jnp.int32), jnp.zeros(0, jnp.int32)
    operands = checks.to_jax(q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits)
    out, lse = ops.dense_decode(*operands, softmax_scale=softmax_scale, causal=causal, implementation=implementation)
    return out, lse
