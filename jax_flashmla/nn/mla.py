"""Multi-head Latent Attention as a Flax NNX layer: projections, norms, RoPE, and the op over the paged cache."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .. import api, checks
from ..kvcache import rows as kvcache_rows
from ..kvcache.paged import batch_slots
from ..sharding import MLAMesh
from .placement import on_mesh, place, pool_sharding

D_LATENT = 512  # what the op's kernels and reference are made for
LATENT_NORM_EPS = 1e-6  # of the two norms inside the attention, whatever rms_norm_eps the model has
MAX_CHUNK = 128  # query tokens per sequence in one call of the decode op

Attention = Callable[..., tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, with YaRN when `factor` is above 1.

    Args:
      theta: base of the frequencies.
      interleave: True pairs the columns (0, 1), (2, 3), ..., as DeepSeek's weights do; False pairs column i with
        column i + dim / 2.
      factor: how much longer than `original_max_position` the context is; 1 is plain RoPE.
      original_max_position: context length of the pretraining.
      beta_fast, beta_slow: rotations within the original context above which a frequency is kept, and below which it
        is divided by `factor`.
      mscale, mscale_all_dim: see `attention_factor` and `softmax_mscale`.

    Source: YaRN, arXiv:2309.00071; mscale as in DeepSeek-V2, arXiv:2405.04434.

    Example:
      >>> from jax_flashmla.nn import RopeConfig
      >>> rope = RopeConfig(factor=40.0, mscale=1.0, mscale_all_dim=1.0)  # DeepSeek-V3
      >>> round(192**-0.5 * rope.softmax_mscale**2, 6), rope.attention_factor
      (0.135234, 1.0)
    """

    theta: float = 10000.0
    interleave: bool = True
    factor: float = 1.0
    original_max_position: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    @property
    def softmax_mscale(self) -> float:
        """The softmax scale is multiplied by the square of this: rope and nope columns alike."""
        return _mscale(self.factor, self.mscale_all_dim)

    @property
    def attention_factor(self) -> float:
        """Cosines and sines are multiplied by this; 1 in the published models, where both mscales are equal."""
        return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)

    def frequencies(self, dim: int) -> np.ndarray:
        """float32 `[dim / 2]`, radians per position."""
        frequency = self.theta ** -(np.arange(0, dim, 2) / dim)
        if self.factor <= 1:
            return frequency.astype(np.float32)

        def pair_with(rotations: float) -> float:  # the pair that turns so often within the original context
            return dim * math.log(self.original_max_position / (2 * math.pi * rotations)) / (2 * math.log(self.theta))

        low = max(math.floor(pair_with(self.beta_fast)), 0)
        high = min(math.ceil(pair_with(self.beta_slow)), dim - 1)
        slow = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
        return (frequency * (1 - slow + slow / self.factor)).astype(np.float32)

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotates `[..., heads, dim]` by its positions `[...]`. Pairs stay where they are; arithmetic in float32."""
        angle = positions.astype(jnp.float32)[..., None, None] * along_last(self.frequencies(x.shape[-1]), x.ndim)
        cos, sin = jnp.cos(angle) * self.attention_factor, jnp.sin(angle) * self.attention_factor
        # [..., dim / 2, 2] for neighbours, [..., 2, dim / 2] for halves
        axis = -1 if self.interleave else -2
        pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], *((-1, 2) if self.interleave else (2, -1)))
        a, b = jnp.take(pairs, 0, axis), jnp.take(pairs, 1, axis)
        rotated = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis)
        return rotated.reshape(x.shape).astype(x.dtype)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32, rounded once."""

    def __init__(self, size: int, eps: float, *, param_dtype: Any = jnp.float32):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.eps)
        return (y * along_last(self.scale[...].astype(jnp.float32), x.ndim)).astype(x.dtype)


def along_last(vector: Any, ndim: int) -> jax.Array:
    """A vector as an array of ndim axes: users may forbid that ranks are promoted (`jax_numpy_rank_promotion`)."""
    return jnp.reshape(vector, (1,) * (ndim - 1) + (-1,))


def precision(dtype: Any) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None  # no TF32 behind a float32 request


def linear(d_in: int, d_out: int, dtype: Any, rngs: nnx.Rngs, *, use_bias: bool = False) -> nnx.Linear:
    return nnx.Linear(
        d_in, d_out, use_bias=use_bias, dtype=dtype, param_dtype=dtype, precision=precision(dtype), rngs=rngs
    )


def token_positions(cache_seqlens: jax.Array, s: int) -> jax.Array:
    """int32 `[b, s]`: new tokens are the last ones of their sequence. Negative where a sequence is shorter."""
    return cache_seqlens[:, None] - s + jnp.arange(s, dtype=jnp.int32)[None]


def write_positions(positions: jax.Array, num_new: jax.Array | None) -> jax.Array:
    """The positions `[b, s]` at which tokens are written: -1 where a ragged batch has padding."""
    if num_new is None:
        return positions
    s = positions.shape[1]
    return jnp.where(jnp.arange(s, dtype=jnp.int32)[None] >= s - num_new[:, None], positions, -1)


def not_empty(name: str, value: jax.Array, axes: str) -> None:
    """A step needs a token of a sequence: the op has no batch, and no chunk, of nothing."""
    if not isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(f"{name} must be an array [{axes}], got {type(value).__name__}; use jnp.asarray")
    if value.ndim != len(axes.split(",")) or 0 in value.shape:
        raise ValueError(f"{name} must be [{axes}] and not empty, got shape {value.shape}; skip a step without tokens")


def check_lengths(name: str, value: jax.Array, b: int) -> None:
    checks.array(name, value, axes="b", dtypes=("int32",))
    checks.shape(name, value, (b,), axes="b", remedy="give one number per sequence")


def chunks_of(s: int, most: int | None = None) -> tuple[int, int]:
    """Number and width of the equal chunks that s tokens make; what is missing is padded in front."""
    count = -(-s // (most or MAX_CHUNK))
    return count, -(-s // count)


def by_chunks(f: Callable[..., jax.Array], *arrays: jax.Array, most: int | None = None) -> jax.Array:
    """f over `[b, s, ...]`, at most so many of the s tokens at a time (`MAX_CHUNK`), for long prompts take memory."""
    b, s = arrays[0].shape[:2]
    count, width = chunks_of(s, most)
    if count == 1:
        return f(*arrays)
    spare = count * width - s

    def cut(x: jax.Array) -> jax.Array:
        # -1 is a position that sees no key, and a slot that does not exist.
        x = jnp.pad(x, ((0, 0), (spare, 0), *[(0, 0)] * (x.ndim - 2)), constant_values=-1)
        return x.reshape(b, count, width, *x.shape[2:]).swapaxes(0, 1)

    out = jax.lax.map(lambda chunk: f(*chunk), tuple(map(cut, arrays))).swapaxes(0, 1)
    return out.reshape(b, count * width, *out.shape[3:])[:, spare:]


def chunk_lengths(cache_seqlens: jax.Array, s: int) -> jax.Array:
    """int32 `[b * chunks]`: the keys that the last token of each chunk sees."""
    count, width = chunks_of(s)
    later = width * jnp.arange(count - 1, -1, -1, dtype=jnp.int32)[None]
    return jnp.maximum(cache_seqlens[:, None] - later, 0).reshape(-1)


def plan(
    cache_seqlens: jax.Array,
    s: int,
    num_heads: int,
    *,
    batch_invariant: bool = False,
    mesh: MLAMesh | None = None,
    page_size: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """`get_mla_metadata` for a step of s new tokens per sequence, to be shared by all layers.

    Args:
      cache_seqlens: int32 `[b]`, keys per sequence, the new tokens included.
      s: new tokens per sequence; static.
      num_heads: query heads; static.
      batch_invariant: static; as of `get_mla_metadata`.
      mesh: that of the layers.
      page_size: of the caches; only a mesh with a context axis needs it.

    Returns:
      `tile_scheduler_metadata` and `num_splits`; chunks of a long prompt count as sequences.

    Raises:
      TypeError, ValueError: an argument has the wrong type or value.
    """
    s = checks.integer("s", s, minimum=1)
    checks.array("cache_seqlens", cache_seqlens, axes="b", dtypes=("int32",))
    lengths, (_, width) = chunk_lengths(cache_seqlens, s), chunks_of(s)
    rows = width * num_heads
    if mesh is None:
        return api.get_mla_metadata(lengths, rows, 1, batch_invariant=batch_invariant)
    return mesh.get_mla_metadata(lengths, rows, 1, batch_invariant=batch_invariant, s_q=width, page_size=page_size)


def write_rows(cache: jax.Array, rows: jax.Array, block_table: jax.Array, positions: jax.Array) -> jax.Array:
    """Writes rows `[b, s, width]` to their positions `[b, s]`; negative ones and those beyond the table go nowhere.

    In place where the cache is donated to the jitted step.
    """
    slots = batch_slots(positions, block_table, page_size=cache.shape[1])
    return kvcache_rows.write_rows(cache, rows.reshape(slots.size, -1), slots)


class MLAAttention(nnx.Module):
    """Multi-head Latent Attention: absorbed over a paged cache, or plain multi-head attention for checking.

    The cache row of a token is `[RMSNorm(latent) | rotated key]`. The absorbed form folds `w_uk` into the query and
    `w_uv` into the output, so that every head attends to the rows themselves.

    Args:
      hidden_size: width of x.
      num_heads: `h_q`.
      q_lora_rank: width of the compressed query; None projects the query at once (V2-Lite).
      kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim: widths as in the paper; `kv_lora_rank` is 512 and
        `qk_rope_head_dim` 64, because the op is made for rows of 576.
      rope: a `RopeConfig`.
      use_bias: biases in `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj` (`attention_bias` in a checkpoint).
      dtype: of parameters and activations: bfloat16 or float16, or float32, which runs through the reference.
      attention: what attends; called as `flash_mla_with_kvcache`, which is the default.
      implementation: passed on to `attention`: None, "cuda" or "xla".
      mesh: an `MLAMesh`: parameters of heads are divided over its axis of heads, the cache as it says; `attention` and
        the cache write run on every device for its share. None: one device.
      rngs: initialises the parameters.

    Raises:
      ValueError: the op has no rows of this shape; the heads cannot be divided.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jax_flashmla.nn import MLAAttention
      >>> attn = MLAAttention(64, 4, q_lora_rank=None, dtype=jnp.float32, rngs=nnx.Rngs(0))
      >>> cache = attn.init_cache(num_pages=6, page_size=16)
      >>> block_table = jnp.array([[4, 1], [0, 3]], jnp.int32)
      >>> y, cache = attn(jnp.ones((2, 3, 64)), cache, block_table, jnp.array([3, 20], jnp.int32))
      >>> y.shape, cache.shape
      ((2, 3, 64), (6, 16, 1, 576))
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        q_lora_rank: int | None,
        kv_lora_rank: int = D_LATENT,
        qk_nope_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        v_head_dim: int = 128,
        rope: RopeConfig | None = None,
        use_bias: bool = False,
        dtype: Any = jnp.bfloat16,
        attention: Attention = api.flash_mla_with_kvcache,
        implementation: str | None = None,
        mesh: MLAMesh | None = None,
        rngs: nnx.Rngs,
    ):
        if (kv_lora_rank, qk_rope_head_dim) != (D_LATENT, 64):
            raise ValueError(
                "kv_lora_rank and qk_rope_head_dim must be 512 and 64, "
                f"got {kv_lora_rank} and {qk_rope_head_dim}; the op reads rows of 576"
            )
        if mesh is not None and num_heads % mesh.size("heads"):
            raise ValueError(
                f"num_heads must be divisible by {mesh.size('heads')}, the devices on the mesh's axis {mesh.heads!r}, "
                f"got {num_heads}; use fewer devices for heads and more for the batch"
            )
        self.num_heads, self.d_nope, self.d_rope, self.d_v = num_heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self.dtype = jnp.dtype(dtype)
        self.rope = RopeConfig() if rope is None else rope
        self.softmax_scale = (self.d_nope + self.d_rope) ** -0.5 * self.rope.softmax_mscale**2
        self.attention, self.implementation, self.mesh = attention, implementation, mesh

        d_q = num_heads * (self.d_nope + self.d_rope)
        if q_lora_rank is None:
            self.q_proj = linear(hidden_size, d_q, dtype, rngs)
        else:
            self.q_a_proj = linear(hidden_size, q_lora_rank, dtype, rngs, use_bias=use_bias)
            self.q_a_layernorm = RMSNorm(q_lora_rank, LATENT_NORM_EPS, param_dtype=dtype)
            self.q_b_proj = linear(q_lora_rank, d_q, dtype, rngs)
        self.q_lora_rank = q_lora_rank
        self.kv_a_proj_with_mqa = linear(hidden_size, D_LATENT + self.d_rope, dtype, rngs, use_bias=use_bias)
        self.kv_a_layernorm = RMSNorm(D_LATENT, LATENT_NORM_EPS, param_dtype=dtype)
        init = nnx.initializers.normal(D_LATENT**-0.5)
        self.w_uk = nnx.Param(init(rngs.params(), (num_heads, self.d_nope, D_LATENT), dtype))
        self.w_uv = nnx.Param(init(rngs.params(), (num_heads, self.d_v, D_LATENT), dtype))
        self.o_proj = linear(num_heads * self.d_v, hidden_size, dtype, rngs, use_bias=use_bias)
        if mesh is not None:
            place(self, mesh)

    def init_cache(self, num_pages: int, *, page_size: int = 64) -> jax.Array:
        """Zeros of this layer's dtype, `[num_pages, page_size, 1, 576]`; on a mesh, the pages of all devices."""
        return jnp.zeros((num_pages, page_size, 1, D_LATENT + self.d_rope), self.dtype, device=pool_sharding(self.mesh))

    @on_mesh("x", "k_cache")
    def __call__(
        self,
        x: jax.Array,
        cache: jax.Array,
        block_table: jax.Array,
        cache_seqlens: jax.Array,
        *,
        num_new: jax.Array | None = None,
        metadata: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Writes the new tokens into the cache, then lets them attend to their sequences: decode and prefill.

        Args:
          x: the layer's dtype, `[b, s, hidden_size]`, the last s tokens of each sequence. More than 128 are attended
            to in equal chunks of at most 128, all in one call of the op.
          cache: the layer's dtype, `[P, page_size, 1, 576]`; donate it to the jitted step, and it is updated in place.
          block_table: int32 `[b, max_pages]`, the pages of each sequence, those of the new tokens included; on a mesh,
            as `MLAMesh` says.
          cache_seqlens: int32 `[b]`, tokens per sequence, the new ones included. Their positions end there.
          num_new: int32 `[b]`, how many of the s tokens are real when the batch is ragged: the last ones. The others
            write nothing, and what they return means nothing. None: all of them.
          metadata: `plan(cache_seqlens, s, num_heads)`, made once for all layers; None plans inside.

        Returns:
          y `[b, s, hidden_size]` and the cache.

        Raises:
          TypeError, ValueError: x is empty, or an argument has the wrong type, dtype or shape.
        """
        not_empty("x", x, "b, s, hidden_size")
        b, s, _ = x.shape
        check_lengths("cache_seqlens", cache_seqlens, b)
        if num_new is not None:
            check_lengths("num_new", num_new, b)
        positions = token_positions(cache_seqlens, s)
        q = self._absorbed(*self._queries(self._compressed(x), positions))
        # A table shared by sequences is the caller's business: rows are written where it says.
        rows, attention = self._rows(x, positions), self.attention
        slots = write_positions(positions, num_new)
        if self.mesh is None:
            cache = write_rows(cache, rows, block_table, slots)
        else:
            cache = self.mesh.append_kv_cache(cache, rows[..., :D_LATENT], rows[..., D_LATENT:], block_table, slots)
            attention = self.mesh.shard(attention)

        # A long prompt is a batch of chunks: each ends at its own length, and all rows are already in the cache.
        count, width = chunks_of(s)
        q = jnp.pad(q, ((0, 0), (count * width - s, 0), (0, 0), (0, 0))).reshape(b * count, width, *q.shape[2:])
        out, _ = attention(
            q,
            cache,
            jnp.repeat(block_table, count, axis=0),
            chunk_lengths(cache_seqlens, s),
            D_LATENT,
            *(metadata or (None, None)),
            softmax_scale=self.softmax_scale,
            causal=True,
            implementation=self.implementation,
        )
        out = out.reshape(b, count * width, self.num_heads, D_LATENT)[:, count * width - s :]
        return self._output(self._unabsorbed(out)), cache

    @on_mesh("x")
    def mha(self, x: jax.Array) -> jax.Array:
        """The same without cache and absorption, for checking: whole sequences `[b, s, hidden_size]`, O(s^2)."""
        not_empty("x", x, "b, s, hidden_size")
        s = x.shape[1]
        positions = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32), x.shape[:2])
        compressed = self._compressed(x)
        q_nope, q_rope = self._queries(compressed, positions)
        latent, k_rope = jnp.split(self._rows(x, positions), [D_LATENT], axis=-1)
        k_nope = self._einsum("btc,hnc->bthn", latent, self.w_uk[...])
        v = self._einsum("btc,hvc->bthv", latent, self.w_uv[...])
        scores = self._einsum("bshn,bthn->bhst", q_nope, k_nope, jnp.float32)
        scores = scores + self._einsum("bshr,btr->bhst", q_rope, k_rope, jnp.float32)
        seen = self._seen(x, compressed, positions)
        scores = jnp.where(seen, scores * jnp.float32(self.softmax_scale), -jnp.inf)
        return self._output(self._einsum("bhst,bthv->bshv", jax.nn.softmax(scores).astype(v.dtype), v))

    def _compressed(self, x: jax.Array) -> jax.Array:
        """What queries are made of: `[b, s, q_lora_rank]`, or x itself."""
        return x if self.q_lora_rank is None else self.q_a_layernorm(self.q_a_proj(x))

    def _queries(self, compressed: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        q = self.q_proj(compressed) if self.q_lora_rank is None else self.q_b_proj(compressed)
        q_nope, q_rope = jnp.split(q.reshape(*positions.shape, self.num_heads, -1), [self.d_nope], axis=-1)
        return q_nope, self.rope.rotate(q_rope, positions)

    def _absorbed(self, q_nope: jax.Array, q_rope: jax.Array) -> jax.Array:
        return jnp.concatenate([self._einsum("bshn,hnc->bshc", q_nope, self.w_uk[...]), q_rope], axis=-1)

    def _unabsorbed(self, out: jax.Array) -> jax.Array:
        return self._einsum("bshc,hvc->bshv", out, self.w_uv[...])

    def _seen(self, x: jax.Array, compressed: jax.Array, positions: jax.Array) -> jax.Array:
        """Which keys `mha` lets a token see, broadcastable to `[b, h_q, s, s]`."""
        return jnp.tri(x.shape[1], dtype=bool)[None, None]

    def _rows(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        latent, k_rope = jnp.split(self.kv_a_proj_with_mqa(x), [D_LATENT], axis=-1)
        k_rope = self.rope.rotate(k_rope[:, :, None], positions)[:, :, 0]  # one key for all heads
        return jnp.concatenate([self.kv_a_layernorm(latent), k_rope], axis=-1)

    def _output(self, heads: jax.Array) -> jax.Array:
        return self.o_proj(heads.reshape(*heads.shape[:2], -1))

    def _einsum(self, spec: str, a: jax.Array, b: jax.Array, dtype: Any = None) -> jax.Array:
        return jnp.einsum(spec, a, b, precision=precision(self.dtype), preferred_element_type=dtype or self.dtype)
