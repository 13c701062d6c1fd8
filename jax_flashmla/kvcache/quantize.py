"""Rows of a cache to and from bytes, in jnp: what the append and the sparse kernels must reproduce bit for bit."""

import jax
import jax.numpy as jnp

from .. import checks
from . import arguments
from .formats import KVFormat

E4M3_NAN = 0x7F
E8M0_NAN = 0xFF
MIN_EXPONENT = -13  # ceil(log2(1e-4)): tiles of zeros and of tiny values
BIGGEST_MANTISSA = 0x600000  # of 448 = 1.75 * 2**8, the largest e4m3 number, in float32


def quantize_kv(latent: jax.Array, rope: jax.Array, *, format: str) -> jax.Array:
    """Turns keys into the rows that a cache of this format stores.

    Each tile of an fp8 latent (128 channels of `fp8_v32`, 64 of `fp8_v4`) is divided by its scale, the smallest power
    of two, 2^-13 at least, that brings its largest magnitude to 448 or less, and rounded to the nearest e4m3 number,
    ties to even. A tile with an infinity or a NaN becomes NaN, its scale too.

    Args:
      latent: bfloat16, float16 or float32 `[..., d_latent]`: 512 channels; 448 for `fp8_v4`, and for `bf16` and `f16`
        rows of 512.
      rope: the same dtypes, `[..., 64]`, the roped part of the key; not quantised.
      format: static; "bf16", "f16", "fp8_v32" or "fp8_v4".

    Returns:
      uint8 `[..., 656]` or `[..., 584]` for `fp8_v32` and `fp8_v4`, the fields of a token in the order of the format;
      for `bf16` and `f16` the row `[latent | rope]` in that dtype.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype or shape, or `format` is unknown.

    Source: the caches of DeepSeek-V3.2-Exp and of FlashMLA, github.com/deepseek-ai/FlashMLA.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashmla import kvcache
      >>> rows = kvcache.quantize_kv(jnp.full((3, 512), 336.0), jnp.ones((3, 64)), format="fp8_v32")
      >>> rows.shape, str(rows.dtype), rows[0, 512:528].tolist()
      ((3, 656), 'uint8', [0, 0, 128, 63, 0, 0, 128, 63, 0, 0, 128, 63, 0, 0, 128, 63])
    """
    fmt = arguments.kv_rows(latent, rope, format)
    latent, rope = checks.to_jax(latent, rope)
    return pack(latent, rope, fmt)


def dequantize_kv(rows: jax.Array, *, format: str) -> jax.Array:
    """Turns stored rows back into keys: e4m3 times scale in float32, rounded once to bfloat16.

    Any finite scale of the stored type is right, not only those that `quantize_kv` writes. Results below 2^-126 may
    come as zero.

    Args:
      rows: uint8 `[..., 656]` or `[..., 584]`, or rows of `bf16` or `f16`, as `quantize_kv` returns them.
      format: static; "bf16", "f16", "fp8_v32" or "fp8_v4".

    Returns:
      `[..., d_qk]`, `[latent | rope]`: bfloat16, float16 for `f16`.

    Raises:
      TypeError, ValueError: `rows` has the wrong dtype or width, or `format` is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashmla import kvcache
      >>> rows = kvcache.quantize_kv(jnp.full((3, 512), 320.0), jnp.ones((3, 64)), format="fp8_v32")
      >>> keys = kvcache.dequantize_kv(rows, format="fp8_v32")
      >>> keys.shape, float(keys[0, 0]), float(keys[0, -1])
      ((3, 576), 320.0, 1.0)
    """
    fmt = arguments.kv_bytes(rows, format)
    return unpack(jnp.asarray(rows), fmt)


def pack(latent: jax.Array, rope: jax.Array, fmt: KVFormat) -> jax.Array:
    if not fmt.is_fp8:
        return jnp.concatenate([latent.astype(fmt.dtype), rope.astype(fmt.dtype)], axis=-1)
    tiles = latent.astype(jnp.float32).reshape(*latent.shape[:-1], fmt["scale"].count, fmt.tile)
    finite = jnp.isfinite(tiles).all(axis=-1)
    tiles = jnp.where(finite[..., None], tiles, 0)
    exponent = scale_exponent(jnp.abs(tiles).max(axis=-1))
    scaled = tiles * power_of_two(-exponent)[..., None]  # exact, but for what becomes 0 anyway
    quantised = to_bytes(scaled.astype(jnp.float8_e4m3fn))
    # The scale as well as the codes: the kernel of sparse decode sees a NaN by its scale alone.
    if fmt["scale"].dtype == "float8_e8m0fnu":
        scale = jnp.where(finite, exponent + 127, E8M0_NAN).astype(jnp.uint8)
    else:
        scale = to_bytes(jnp.where(finite, power_of_two(exponent), jnp.nan))
    values = {
        "latent": jnp.where(finite[..., None], quantised, E4M3_NAN).reshape(latent.shape),
        "rope": to_bytes(rope.astype(fmt["rope"].dtype)),
        "scale": scale,
        "pad": jnp.zeros((*latent.shape[:-1], 1), jnp.uint8),
    }
    return jnp.concatenate([values[field.name] for field in fmt.fields], axis=-1)


def unpack(rows: jax.Array, fmt: KVFormat) -> jax.Array:
    if not fmt.is_fp8:
        return rows
    parts, start = {}, 0
    for field in fmt.fields:
        parts[field.name] = from_bytes(rows[..., start : start + field.nbytes], field.dtype)
        start += field.nbytes
    tiles = parts["latent"].astype(jnp.float32).reshape(*rows.shape[:-1], fmt["scale"].count, fmt.tile)
    latent = multiply(tiles, scale_bits(parts["scale"])[..., None]).astype(jnp.bfloat16)
    return jnp.concatenate([latent.reshape(parts["latent"].shape), parts["rope"]], axis=-1)


def scale_exponent(amax: jax.Array) -> jax.Array:
    """The smallest e >= MIN_EXPONENT with amax <= 448 * 2**e.

    From the bits: log2 and exp2 are not exact on every device, and XLA may turn a division by 448 into a product.
    """
    bits = jax.lax.bitcast_convert_type(amax, jnp.int32)
    above = ((bits & 0x7FFFFF) > BIGGEST_MANTISSA).astype(jnp.int32)
    return jnp.maximum((bits >> 23) - 127 - 8 + above, MIN_EXPONENT)


def power_of_two(exponent: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def scale_bits(scale: jax.Array) -> jax.Array:
    """A scale as the bits of a float32."""
    if scale.dtype == jnp.float32:
        return jax.lax.bitcast_convert_type(scale, jnp.int32)
    code = jax.lax.bitcast_convert_type(scale, jnp.uint8).astype(jnp.int32)
    return jnp.where(code == 0, 0x00400000, jnp.where(code == 255, 0x7FC00000, code << 23))  # 2**-127 and NaN


def multiply(x: jax.Array, bits: jax.Array) -> jax.Array:
    """x times the float32 of these bits, right for subnormal scales too: XLA on the CPU takes those for 0."""
    subnormal = (bits & 0x7F800000) == 0
    mantissa = (bits & 0x7FFFFF).astype(jnp.float32) * jnp.float32(2**-75)
    normal = jax.lax.bitcast_convert_type(bits, jnp.float32)
    factor = jnp.where(subnormal, jnp.where(bits < 0, -mantissa, mantissa), normal)
    return x * factor * jnp.where(subnormal, jnp.float32(2**-74), jnp.float32(1))


# Bytes by shifts: a bitcast that changes the rank does not survive jax.export with symbolic shapes.


def to_bytes(x: jax.Array) -> jax.Array:
    """The last axis as little-endian bytes."""
    item = x.dtype.itemsize
    word = jax.lax.bitcast_convert_type(x, f"uint{8 * item}")
    shifts = 8 * jax.lax.broadcasted_iota(word.dtype, (*word.shape, item), word.ndim)
    return (word[..., None] >> shifts).astype(jnp.uint8).reshape(*x.shape[:-1], x.shape[-1] * item)


def from_bytes(x: jax.Array, dtype: str) -> jax.Array:
    item = jnp.dtype(dtype).itemsize
    parts = x.reshape(*x.shape[:-1], x.shape[-1] // item, item).astype(f"uint{8 * item}")
    shifts = 8 * jax.lax.broadcasted_iota(parts.dtype, parts.shape, parts.ndim - 1)
    word = (parts << shifts).sum(axis=-1, dtype=parts.dtype)
    return jax.lax.bitcast_convert_type(word, dtype)
