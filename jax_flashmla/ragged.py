"""Attention over a ragged batch: the call that JAX serving stacks share, in terms of the paged decode op."""

import jax
import jax.numpy as jnp

from . import api, checks
from .kvcache import arguments
from .kvcache.paged import slot_mapping
from .kvcache.rows import write_rows
from .ops.schedule import ROW_TILE

D_LATENT, D_ROPE = 512, 64


def mla_ragged_paged_attention(
    ql_nope: jax.Array,
    q_pe: jax.Array,
    new_kv_c: jax.Array,
    new_k_pe: jax.Array,
    cache: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
    *,
    sm_scale: float | None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Writes the keys of new tokens into a paged cache, then lets every new token attend to its sequence up to itself.

    Sequences bring any number of new tokens: 1 to decode, more for a prompt or a piece of one, in any mix, one sequence
    behind the other. All shapes are static; other lengths do not compile anew. Arguments and results are those of the
    function of this name in vLLM's tpu-inference and in sglang-jax, but for the shape of the cache, and with neither
    sliding windows, soft caps nor scales of an fp8 cache.

    Args:
      ql_nope: bfloat16, float16 or float32 `[tokens, h_q, 512]`, the absorbed queries of the new tokens. float32 runs
        through the reference.
      q_pe: the same dtype, `[tokens, h_q, 64]`, their roped part.
      new_kv_c: the same dtype, `[tokens, 512]`, the normalised latent of the new tokens.
      new_k_pe: the same dtype, `[tokens, 64]`, their roped key.
      cache: the same dtype, `[P, page_size, 1, 576]`, pages of 16, 32, 64 (fastest), 128 or 256 tokens. Donate it to
        the jit around this, and it is updated in place. Slots that no sequence uses may hold anything, NaN too.
      kv_lens: int32 `[max_seqs]`, tokens of each sequence, the new ones included.
      page_indices: int32 `[max_seqs * pages_per_seq]`, the pages of each sequence in order, one sequence behind the
        other. Entries past the length are not read.
      cu_q_lens: int32 `[max_seqs + 1]`, where the new tokens of each sequence begin; from 0, not decreasing. Entries
        behind that of the last sequence may hold anything.
      distribution: int32 `[3]`, how many sequences only decode; those and the ones with a (chunked) prefill; all. Only
        the last number matters here: the split is made by the lengths themselves.
      sm_scale: static number, which the scores are multiplied by; None means `576 ** -0.5`.
      implementation: as for `flash_mla_with_kvcache`.

    Returns:
      `out`, ql_nope's dtype, `[tokens, h_q, 512]`, 0 for tokens of no sequence, and the cache with the new rows. Tokens
      of no sequence are written nowhere.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype or shape, or is traced and must be static.
      NotImplementedError: the call is differentiated without `implementation="xla"`.
      RuntimeError: `implementation="cuda"` and there is no Hopper GPU or no CUDA build.

    Source: the call is that of tpu-inference, github.com/vllm-project/tpu-inference; the arithmetic that of
    DeepSeek-V2, arXiv:2405.04434.

    Example:
      One sequence decodes its 5th token, another brings a prompt of 3, and there is room for a third:

      >>> import jax.numpy as jnp, jax_flashmla
      >>> q, row, cache = jnp.ones((6, 16, 576)), jnp.ones((6, 576)), jnp.zeros((8, 16, 1, 576))
      >>> out, cache = jax_flashmla.mla_ragged_paged_attention(
      ...     q[..., :512], q[..., 512:], row[:, :512], row[:, 512:], cache,
      ...     kv_lens=jnp.array([5, 3, 0], jnp.int32),
      ...     page_indices=jnp.array([7, 0, 2, 1, 0, 0], jnp.int32),
      ...     cu_q_lens=jnp.array([0, 1, 4, 4], jnp.int32),
      ...     distribution=jnp.array([1, 1, 2], jnp.int32),
      ...     sm_scale=192**-0.5)
      >>> out.shape, cache[7, :, 0, 0].tolist()[:6], cache[2, :, 0, 0].tolist()[:4]
      ((6, 16, 512), [0.0, 0.0, 0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0])
    """
    _check(ql_nope, q_pe, new_kv_c, new_k_pe, cache, kv_lens, page_indices, cu_q_lens, distribution)
    sm_scale = checks.scale("sm_scale", sm_scale, default=(D_LATENT + D_ROPE) ** -0.5)
    ql_nope, q_pe, new_kv_c, new_k_pe, cache = checks.to_jax(ql_nope, q_pe, new_kv_c, new_k_pe, cache)
    kv_lens, page_indices, cu_q_lens, distribution = checks.to_jax(kv_lens, page_indices, cu_q_lens, distribution)
    tokens, h_q, _ = ql_nope.shape
    max_seqs = kv_lens.shape[0]
    block_table = page_indices.reshape(max_seqs, -1)

    # Tokens and their sequences. What stands in cu_q_lens behind the last sequence does not count.
    num_seqs = jnp.clip(distribution[2], 0, max_seqs)
    ends = jnp.where(jnp.arange(max_seqs, dtype=jnp.int32) < num_seqs, cu_q_lens[1:], cu_q_lens[num_seqs])
    ends = jnp.where(num_seqs > 0, jnp.clip(ends, 0, tokens), 0)
    q_lens = jnp.diff(ends, prepend=jnp.zeros(1, jnp.int32))
    token = jnp.arange(tokens, dtype=jnp.int32)
    seq, is_token = _owner(ends, token)
    behind = ends[seq] - 1 - token  # how many new tokens of the sequence follow this one
    position = jnp.where(is_token, kv_lens[seq] - 1 - behind, -1)

    slots = slot_mapping(position, seq, block_table, page_size=cache.shape[1])
    cache = write_rows(cache, jnp.concatenate([new_kv_c, new_k_pe], axis=-1), slots)

    # The op takes equally many query tokens of every sequence, the last ones. So sequences are cut into tiles, counted
    # from their last token, and what is missing is in front of the first. A tile is as many tokens as fill a row tile
    # of the kernel: more would cost a sequence that decodes, fewer would read the keys of a prompt more often.
    width = min(max(ROW_TILE // h_q, 1), tokens)
    most = (tokens + min(max_seqs, tokens) * (width - 1)) // width
    tile_ends = jnp.cumsum(-(q_lens // -width), dtype=jnp.int32)
    tile = jnp.arange(most, dtype=jnp.int32)
    tile_seq, is_tile = _owner(tile_ends, tile)
    tile_behind = width * (tile_ends[tile_seq] - 1 - tile)  # new tokens of the sequence in later tiles
    lengths = jnp.where(is_tile, jnp.maximum(kv_lens[tile_seq] - tile_behind, 0), 0)
    source = (ends[tile_seq] - tile_behind)[:, None] - jnp.arange(width, 0, -1, dtype=jnp.int32)[None]

    # A row of a tile that is no token of its sequence takes any query: its result is not looked at.
    q = jnp.concatenate([ql_nope, q_pe], axis=-1)[jnp.clip(source, 0, tokens - 1)]
    out, _ = api.flash_mla_with_kvcache(
        q,
        cache,
        block_table[tile_seq],
        lengths,
        D_LATENT,
        softmax_scale=sm_scale,
        causal=True,
        implementation=implementation,
    )
    row = width * (tile_ends[seq] - behind // width) - 1 - behind % width
    out = out.reshape(most * width, h_q, D_LATENT)[jnp.where(is_token, row, 0)]
    return jnp.where(is_token[:, None, None], out, 0), cache


def _owner(ends: jax.Array, items: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sequence of each item, and whether it has one; sequences end before `ends`, one behind the other."""
    seq = jnp.searchsorted(ends, items, side="right").astype(jnp.int32)
    return jnp.minimum(seq, ends.shape[0] - 1), seq < ends.shape[0]


def _check(ql_nope, q_pe, new_kv_c, new_k_pe, cache, kv_lens, page_indices, cu_q_lens, distribution) -> None:
    checks.array("ql_nope", ql_nope, axes="tokens, h_q, 512", dtypes=checks.REFERENCE_DTYPES)
    tokens, h_q, _ = ql_nope.shape
    for name, value, axes, expected in (
        ("ql_nope", ql_nope, "tokens, h_q, 512", (tokens, h_q, D_LATENT)),
        ("q_pe", q_pe, "tokens, h_q, 64", (tokens, h_q, D_ROPE)),
        ("new_kv_c", new_kv_c, "tokens, 512", (tokens, D_LATENT)),
        ("new_k_pe", new_k_pe, "tokens, 64", (tokens, D_ROPE)),
    ):
        checks.array(name, value, axes=axes, dtypes=(str(ql_nope.dtype),))
        checks.shape(name, value, expected, axes=axes, remedy="every new token has a query and a row of the cache")
    if tokens == 0 or h_q == 0:
        raise ValueError(f"ql_nope must have at least one token and one head, got shape {ql_nope.shape}")
    arguments.plain_pool("cache", cache, dtypes=(str(ql_nope.dtype),), d_qk=D_LATENT + D_ROPE)
    checks.array("kv_lens", kv_lens, axes="max_seqs", dtypes=("int32",))
    (max_seqs,) = kv_lens.shape
    if max_seqs == 0:
        raise ValueError(f"kv_lens must have room for at least one sequence, got shape {kv_lens.shape}")
    checks.array("page_indices", page_indices, axes="max_seqs * pages_per_seq", dtypes=("int32",))
    if page_indices.shape[0] % max_seqs:
        raise ValueError(
            f"page_indices must have max_seqs * pages_per_seq entries, got shape {page_indices.shape} for max_seqs = "
            f"{max_seqs}; give every sequence equally many"
        )
    checks.array("cu_q_lens", cu_q_lens, axes="max_seqs + 1", dtypes=("int32",))
    remedy = "give a start per sequence, and the end of the last"
    checks.shape("cu_q_lens", cu_q_lens, (max_seqs + 1,), axes="max_seqs + 1", remedy=remedy)
    checks.array("distribution", distribution, axes="3", dtypes=("int32",))
    remedy = "give the cumulative numbers of sequences that decode, that prefill, and of all"
    checks.shape("distribution", distribution, (3,), axes="3", remedy=remedy)
