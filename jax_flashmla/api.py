"""What users call. Names and argument order follow FlashMLA; conventions follow JAX."""

from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from . import checks, ops
from .kvcache import arguments
from .ops.schedule import METADATA_WIDTH, num_parts, row_tiles


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
    checks.not_used(
        "plans are for dense bfloat16/float16 decode only in this version of jax_flashmla; sparse decode needs none",
        is_fp8_kvcache=(checks.flag("is_fp8_kvcache", is_fp8_kvcache), False),
        topk=(topk, None),
    )
    checks.array("cache_seqlens", cache_seqlens, axes="b", dtypes=("int32",))
    rows: Any = num_q_tokens_per_head_k
    if not jax.export.is_symbolic_dim(rows):
        rows = checks.integer("num_q_tokens_per_head_k", rows, minimum=1)
    h_kv = checks.integer("num_heads_k", num_heads_k, minimum=1)
    if num_heads_q is not None:
        checks.integer("num_heads_q", num_heads_q, minimum=1)
    batch_invariant = checks.flag("batch_invariant", batch_invariant)
    b = cache_seqlens.shape[0]
    checks.invariant_batch(b, batch_invariant)
    parts = num_parts(b, rows, h_kv, batch_invariant=batch_invariant)
    lengths = jnp.asarray(cache_seqlens)[None]
    metadata, num_splits = ops.schedule(
        lengths, parts=parts, row_tiles=row_tiles(rows), batch_invariant=batch_invariant, lists=True
    )
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

    Dense without `indices`: each sequence attends to its pages in `block_table`. Sparse with `indices`: each query
    token attends to the tokens that its row of `indices` names, in a plain cache or in one of the fp8 formats of
    `jax_flashmla.kvcache`.

    Args:
      q: bfloat16 or float16 `[b, s_q, h_q, d_qk]` with `d_qk` 576 or 512; float32 runs through the reference. bfloat16
        or float32 for fp8 caches.
      k_cache: q's dtype, `[P, page_size, h_kv, d_qk]`, a pool of pages of 16, 32, 64 (fastest), 128 or 256 tokens; with
        `indices` any page size, and h_kv = 1. fp8: uint8 or float8_e4m3fn, `[P, page_size, 1, 656]` (`fp8_v32`, d_qk
        576), `[P, page_size, 1, 584]` or padded `[P, bytes of a page]` (`fp8_v4`, d_qk 512). Slots that no sequence
        uses may hold anything, NaN too.
      block_table: int32 `[b, max_pages]`, the pages of each sequence in order. Entries past the length are not read;
        tokens of a page outside `[0, P)` are ignored. Not read with `indices`: None will do.
      cache_seqlens: int32 `[b]`, keys per sequence, the new tokens included (write first, then attend). 0 is legal;
        lengths are clamped to `[0, max_pages * page_size]`. Not read with `indices`: None will do.
      head_dim_v: 512.
      tile_scheduler_metadata: int32 `[num_parts, 8]` from `get_mla_metadata`; None plans inside. None with `indices`.
      num_splits: int32 `[b + 1]` from `get_mla_metadata`; None plans inside. None with `indices`.
      softmax_scale: static number; None means `d_qk ** -0.5`.
      causal: static; query token i sees the keys `j <= cache_seqlens - s_q + i`. False with `indices`.
      is_fp8_kvcache: static; whether the caches are in an fp8 format. Needs `indices`. The kernel reads the code of NaN
        as 480 times its scale.
      indices: int32 `[b, s_q, topk]`, slots `page * page_size + offset`, from `kvcache.topk_to_slots`. Negative and too
        large ones are ignored, wherever they stand; one that stands twice counts twice.
      attn_sink: float32 `[h_q]`, with `indices` only: out is multiplied by `exp(lse) / (exp(lse) + exp(attn_sink))`, so
        that -inf has no effect and +inf gives 0. lse does not change.
      extra_k_cache: a second pool of the same format, of any page size, attended to in the same softmax.
      extra_indices_in_kvcache: int32 `[b, s_q, extra_topk]`, slots of `extra_k_cache`.
      topk_length: int32 `[b]`, with `indices` only: how many columns of `indices` count, those beyond are not read.
        None is all of them.
      extra_topk_length: int32 `[b]`, the same for `extra_indices_in_kvcache`.
      descale_q, descale_k: FlashMLA's arguments for dense fp8 caches, not in this version.
      implementation: None takes the CUDA kernel where the computation is lowered for a Hopper GPU, else the XLA
        reference; "cuda" insists on the kernel; "xla" forces the reference, which is differentiable (a cache of bytes
        has no gradient).

    Returns:
      `out`, q's dtype, `[b, s_q, h_q, 512]`, and `softmax_lse`, float32 `[b, h_q, s_q]`, the natural logarithm of the
      sum of the exponentials of the scaled scores. A row that sees no key has out 0 and lse -inf (FlashMLA: +inf).

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype or shape, or is traced and must be static; the
        message says which, what was expected, and what to do. `vmap` over `k_cache`, `extra_k_cache` or `attn_sink` is
        a ValueError too, but with `implementation="xla"` and in float32.
      NotImplementedError: an argument for sparse decode is used without `indices`, or one that this version does not
        have; or the call is differentiated without `implementation="xla"`.
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

      Sparse, over an fp8 cache; the second sequence names one token and nothing else:

      >>> from jax_flashmla import kvcache
      >>> rows = jax.random.normal(jax.random.key(2), (3, 576), jnp.bfloat16)
      >>> slots = jnp.array([5, 64, 130], jnp.int32)
      >>> k_cache = kvcache.init_kv_cache(8, "fp8_v32")
      >>> k_cache = kvcache.append_kv_cache(k_cache, rows[:, :512], rows[:, 512:], slots, format="fp8_v32")
      >>> indices = jnp.array([[[5, 64, 130]], [[-1, 130, -1]]], jnp.int32)
      >>> out, lse = jax_flashmla.flash_mla_with_kvcache(
      ...     q, k_cache, None, None, 512, is_fp8_kvcache=True, indices=indices)
      >>> row = kvcache.dequantize_kv(k_cache[2, 2], format="fp8_v32")  # slot 130: page 2, offset 2
      >>> bool((out[1, 0, 0] == row[0, :512]).all())
      True
    """
    checks.implementation(implementation)
    head_dim_v = checks.integer("head_dim_v", head_dim_v, minimum=1)
    is_fp8_kvcache = checks.flag("is_fp8_kvcache", is_fp8_kvcache)
    if indices is not None:
        checks.not_used(
            "in this version of jax_flashmla sparse decode takes no plan, and no scales beside those in the cache",
            tile_scheduler_metadata=(tile_scheduler_metadata, None),
            num_splits=(num_splits, None),
            descale_q=(descale_q, None),
            descale_k=(descale_k, None),
        )
        d_qk = arguments.sparse_pool("k_cache", k_cache, is_fp8=is_fp8_kvcache)
        causal = checks.flag("causal", causal)
        checks.sparse_decode(q, k_cache, indices, topk_length, attn_sink, d_qk=d_qk, d_v=head_dim_v, causal=causal)
        if (extra_k_cache is None) != (extra_indices_in_kvcache is None):
            raise ValueError("extra_k_cache and extra_indices_in_kvcache must be given together; pass both or neither")
        if extra_k_cache is not None:
            d_extra = arguments.sparse_pool("extra_k_cache", extra_k_cache, is_fp8=is_fp8_kvcache)
            checks.extra_cache(k_cache, d_qk, extra_k_cache, d_extra)
        checks.extra_indices(q, extra_indices_in_kvcache, extra_topk_length)
        softmax_scale = checks.scale("softmax_scale", softmax_scale, default=d_qk**-0.5)
        operands = checks.to_jax(
            q,
            k_cache,
            indices,
            _or_empty(topk_length, jnp.int32),
            _or_empty(attn_sink, jnp.float32),
            _or_empty(extra_k_cache, k_cache.dtype),
            _or_empty(extra_indices_in_kvcache, jnp.int32),
            _or_empty(extra_topk_length, jnp.int32),
        )
        out, lse = ops.sparse_decode(*operands, softmax_scale=softmax_scale, implementation=implementation)
        return out, lse
    checks.not_used(
        "without indices this version of jax_flashmla has dense bfloat16/float16 decode only",
        is_fp8_kvcache=(is_fp8_kvcache, False),
        attn_sink=(attn_sink, None),
        extra_k_cache=(extra_k_cache, None),
        extra_indices_in_kvcache=(extra_indices_in_kvcache, None),
        topk_length=(topk_length, None),
        extra_topk_length=(extra_topk_length, None),
        descale_q=(descale_q, None),
        descale_k=(descale_k, None),
    )
    checks.dense_decode(q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits, head_dim_v)
    softmax_scale = checks.scale("softmax_scale", softmax_scale, default=q.shape[-1] ** -0.5)
    causal = checks.flag("causal", causal)
    if tile_scheduler_metadata is None:
        tile_scheduler_metadata, num_splits = jnp.zeros((0, METADATA_WIDTH), jnp.int32), jnp.zeros(0, jnp.int32)
    operands = checks.to_jax(q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits)
    out, lse = ops.dense_decode(*operands, softmax_scale=softmax_scale, causal=causal, implementation=implementation)
    return out, lse


def flash_mla_sparse_fwd(
    q: jax.Array,
    kv: jax.Array,
    indices: jax.Array,
    sm_scale: float | None,
    d_v: int = 512,
    *,
    attn_sink: jax.Array | None = None,
    topk_length: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sparse Multi-head Latent Attention of many query tokens, a prompt: each attends to the keys its lists name.

    Query head h attends to the `[latent | rope]` rows that `indices[:, h // (h_q // h_kv)]` names; the values are the
    first 512 columns of the same rows. Scores, softmax and sums are in float32. Causality is up to `indices`.

    Args:
      q: bfloat16, float16 or float32 `[s_q, h_q, d_qk]` with `d_qk` 576 or 512; the kernel takes bfloat16. bfloat16 or
        float32 for fp8 pools.
      kv: q's dtype, rows `[s_kv, h_kv, d_qk]`. Or a pool of pages as decode has it, with one KV head: q's dtype,
        `[P, page_size, 1, d_qk]`, or `fp8_v32`, uint8 or float8_e4m3fn `[P, page_size, 1, 656]` (d_qk 576). Rows that
        no list names may hold anything, NaN too.
      indices: int32 `[s_q, h_kv, topk]`, rows of kv; of a pool slots `page * page_size + offset`, as from
        `kvcache.topk_to_slots`. Negative and too large ones are ignored, wherever they stand; one that stands twice
        counts twice. Any topk will do; multiples of 64 are fast.
      sm_scale: static number; None means `d_qk ** -0.5`.
      d_v: 512.
      attn_sink: float32 `[h_q]`: out is multiplied by `exp(lse) / (exp(lse) + exp(attn_sink))`, so that -inf has no
        effect and +inf gives 0. lse and max_logits do not change.
      topk_length: int32 `[s_q]`, how many entries of a token's lists count, those beyond are not read. None is all of
        them.
      implementation: None takes the CUDA kernel where the computation is lowered for a Hopper GPU, else the XLA
        reference; "cuda" insists on the kernel; "xla" forces the reference, which is differentiable but for max_logits.

    Returns:
      `out`, q's dtype, `[s_q, h_q, 512]`; `max_logits`, float32 `[s_q, h_q]`, the largest scaled score; and `lse`,
      float32 `[s_q, h_q]`, the natural logarithm of the sum of the exponentials of the scaled scores. A row that sees
      no key has out 0, max_logits -inf and lse -inf.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype or shape, or is traced and must be static; the
        message says which, what was expected, and what to do. `vmap` over attn_sink is a ValueError but with
        `implementation="xla"`, and so is one over so many pools that their slots together pass 2**31.
      NotImplementedError: the call is differentiated without `implementation="xla"`.
      RuntimeError: `implementation="cuda"` and there is no Hopper GPU or no CUDA build.

    Source: DeepSeek-V3.2-Exp, github.com/deepseek-ai/DeepSeek-V3.2-Exp (DeepSeek Sparse Attention); FlashMLA,
    github.com/deepseek-ai/FlashMLA.

    Example:
      >>> import jax, jax.numpy as jnp, jax_flashmla
      >>> q = jax.random.normal(jax.random.key(0), (3, 16, 576), jnp.bfloat16)
      >>> kv = jax.random.normal(jax.random.key(1), (100, 1, 576), jnp.bfloat16)
      >>> indices = jnp.array([[[7, 99, -1]], [[0, 50, 50]], [[-1, -1, -1]]], jnp.int32)
      >>> out, max_logits, lse = jax_flashmla.flash_mla_sparse_fwd(q, kv, indices, None)
      >>> out.shape, str(out.dtype), lse.shape
      ((3, 16, 512), 'bfloat16', (3, 16))
      >>> float(lse[2, 0]), bool((out[2] == 0).all())  # names no key
      (-inf, True)
      >>> one = jnp.array([1, 0, 0], jnp.int32)
      >>> out, max_logits, lse = jax_flashmla.flash_mla_sparse_fwd(q, kv, indices, None, topk_length=one)
      >>> bool((out[0] == kv[7, :, :512]).all()), bool((lse[0] == max_logits[0]).all())  # names one key
      (True, True)
    """
    checks.implementation(implementation)
    d_v = checks.integer("d_v", d_v, minimum=1)
    s_kv, h_kv, d_qk = arguments.prefill_keys("kv", kv)
    checks.sparse_prefill(q, kv, indices, topk_length, attn_sink, h_kv=h_kv, d_qk=d_qk, d_v=d_v)
    scale = checks.scale("sm_scale", sm_scale, default=d_qk**-0.5)
    q, kv, indices, topk_length, attn_sink = checks.to_jax(
        q, kv, indices, _or_empty(topk_length, jnp.int32), _or_empty(attn_sink, jnp.float32)
    )
    if kv.ndim == 3:  # to the op rows are pages of one token, and those of all KV heads lie in one pool
        kv = kv.reshape(s_kv * h_kv, 1, 1, d_qk)
        if h_kv > 1:
            head = jnp.arange(h_kv, dtype=jnp.int32)[None, :, None]
            exists = (indices >= 0) & (indices < s_kv)
            indices = jnp.where(exists, jnp.where(exists, indices, 0) * h_kv + head, -1)
    operands = q, kv, indices, topk_length, attn_sink
    out, max_logits, lse = ops.sparse_prefill(*operands, softmax_scale=scale, implementation=implementation)
    return out, max_logits, lse


def merge_attention_states(
    out_a: jax.Array, lse_a: jax.Array, out_b: jax.Array, lse_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Joins attention over two disjoint sets of keys into attention over both, in float32.

    Args:
      out_a: bfloat16, float16 or float32 `[b, s_q, h_q, d_v]`, the output over the first set.
      lse_a: float32 `[b, h_q, s_q]`, its logarithm of the sum of exponentials; -inf where the set is empty, and then
        out_a may hold anything.
      out_b: as out_a, over the second set.
      lse_b: as lse_a.

    Returns:
      `out`, out_a's dtype, `[b, s_q, h_q, d_v]`, and `lse`, float32 `[b, h_q, s_q]`; 0 and -inf where both are empty.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype or shape.

    Example:
      >>> import jax.numpy as jnp, jax_flashmla
      >>> ones, lse = jnp.ones((1, 1, 2, 512)), jnp.zeros((1, 2, 1))
      >>> out, total = jax_flashmla.merge_attention_states(ones, lse, 3 * ones, lse)
      >>> float(out[0, 0, 0, 0]), float(total[0, 0, 0])
      (2.0, 0.6931471824645996)
    """
    checks.attention_state("a", out_a, lse_a, like=out_a)
    checks.attention_state("b", out_b, lse_b, like=out_a)
    out_a, lse_a, out_b, lse_b = checks.to_jax(out_a, lse_a, out_b, lse_b)
    peak = jnp.maximum(lse_a, lse_b)
    shift = jnp.where(peak == -jnp.inf, 0, peak)  # -inf - -inf is NaN
    weights = jnp.exp(lse_a - shift), jnp.exp(lse_b - shift)
    total = weights[0] + weights[1]
    divisor = jnp.where(total == 0, 1, total)

    def part(out, weight):
        share = (weight / divisor).swapaxes(1, 2)[..., None]
        # An empty side may hold NaN: kept out of the product, so that no gradient sees it.
        return jnp.where(share == 0, 0, out.astype(jnp.float32)) * share

    out = part(out_a, weights[0]) + part(out_b, weights[1])
    return out.astype(out_a.dtype), jnp.where(total == 0, -jnp.inf, shift + jnp.log(divisor))


def _or_empty(value: jax.Array | None, dtype: Any) -> jax.Array:
    """An operand that is not used is an empty array."""
    return jnp.zeros(0, dtype) if value is None else value
