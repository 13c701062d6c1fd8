"""Checks of arguments that only caches have: what was expected, what came, what to do."""

from typing import Any

import jax
import numpy as np

from .. import checks
from .formats import FORMATS, FP8_DTYPES, FP8_V4, FP8_V32, PLAIN_DIMS, KVFormat, layout, page_size_of


def kv_format(name: Any, head_dim: int | None = None, padded: bool = False) -> KVFormat:
    if not isinstance(name, str) or name not in FORMATS:
        known = ", ".join(map(repr, FORMATS))
        raise ValueError(f"format must be one of {known}, got {name!r}; dense fp8 formats are not in this version")
    fmt = FORMATS[name]
    if head_dim is not None:
        head_dim = checks.integer("head_dim", head_dim, minimum=1)
    if head_dim is not None and head_dim not in ((fmt.head_dim,) if fmt.is_fp8 else PLAIN_DIMS):
        widths = fmt.head_dim if fmt.is_fp8 else "576 or 512"
        raise ValueError(f"head_dim must be {widths} for {name}, got {head_dim!r}; None takes {fmt.head_dim}")
    if checks.flag("padded", padded) and fmt.page_multiple == 1:
        raise ValueError(f"padded must be False for {name}, got True; only pages of fp8_v4 are padded")
    return layout(name, head_dim)


def pool(name: str, cache: Any) -> None:
    """Any pool: pages along the first axis."""
    if not isinstance(cache, (jax.Array, np.ndarray)):
        raise TypeError(f"{name} must be an array [P, ...], got {type(cache).__name__}; make it with init_kv_cache")
    if cache.ndim not in (2, 4):
        raise ValueError(
            f"{name} must have the axes [P, page_size, 1, token], or [P, bytes of a page], got shape {cache.shape}; "
            "make it with init_kv_cache"
        )
    if 0 in cache.shape:
        raise ValueError(f"{name} must have at least one page and one token, got shape {cache.shape}")


def kv_cache(name: str, cache: Any, format: Any) -> KVFormat:
    """A pool that the cache operations can write and read: of the format, with h_kv = 1."""
    fmt = kv_format(format)
    pool(name, cache)
    dtypes = FP8_DTYPES if fmt.is_fp8 else (fmt.dtype,)
    if str(cache.dtype) not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(dtypes)} for {format}, got {cache.dtype}; is the format right?")
    if cache.ndim == 2:
        flat_pool(name, cache, fmt)
    else:
        widths = PLAIN_DIMS if not fmt.is_fp8 else (fmt.token_bytes,)
        if cache.shape[2] != 1 or cache.shape[3] not in widths:
            wanted = " or ".join(map(str, widths))
            raise ValueError(f"{name} must have shape [P, page_size, 1, {wanted}] for {format}, got {cache.shape}")
    fmt = fmt if fmt.is_fp8 else layout(format, cache.shape[3])
    pool_tokens(name, cache.shape[0] * page_size_of(cache.shape, fmt.token_bytes))
    return fmt


def flat_pool(name: str, cache: Any, fmt: KVFormat) -> None:
    """A pool of flat pages: their size tells how many tokens they hold."""
    page_size = page_size_of(cache.shape, fmt.token_bytes)
    sizes = {fmt.page_bytes(page_size, padded=padded) for padded in (False, True)}
    if fmt.page_multiple == 1:
        raise ValueError(f"{name} must have the axes [P, page_size, 1, token] for {fmt.name}, got shape {cache.shape}")
    if page_size == 0 or cache.shape[1] not in sizes:
        raise ValueError(
            f"{name} must have pages of page_size * {fmt.token_bytes} bytes, padded to a multiple of "
            f"{fmt.page_multiple} or not, got shape {cache.shape}; make it with init_kv_cache(..., padded=True)"
        )


def pool_tokens(name: str, tokens: int) -> None:
    if isinstance(tokens, int) and tokens > checks.MAX_TOKENS:
        raise ValueError(f"{name} must address fewer than 2**31 tokens, got {tokens}; int32 slots end there")


def plain_pool(name: str, cache: Any, *, dtypes: tuple[str, ...], d_qk: int) -> None:
    """A pool of rows that are not quantised; of float32 too, which is no format."""
    checks.array(name, cache, axes="P, page_size, 1, d_qk", dtypes=dtypes)
    if 0 in cache.shape or cache.shape[2:] != (1, d_qk):
        raise ValueError(f"{name} must have shape [P, page_size, 1, {d_qk}] and at least one page, got {cache.shape}")
    pool_tokens(name, cache.shape[0] * cache.shape[1])


def block_table(table: Any, page_size: int, *, b: int | None = None) -> None:
    checks.array("block_table", table, axes="b, max_pages", dtypes=("int32",))
    if b is not None:
        expected = (b, table.shape[1])
        checks.shape("block_table", table, expected, axes="b, max_pages", remedy="give one row per sequence")
    if isinstance(table.shape[1], int) and table.shape[1] * page_size > checks.MAX_TOKENS:
        raise ValueError(
            f"block_table must address fewer than 2**31 tokens, got shape {table.shape}; drop unused columns"
        )


def kv_rows(latent: Any, rope: Any, format: Any, *, head_dim: int | None = None) -> KVFormat:
    """Keys to store; returns the format whose rows they are."""
    fmt = kv_format(format, head_dim)
    checks.array("latent", latent, axes="..., d_latent", dtypes=checks.REFERENCE_DTYPES)
    checks.array("rope", rope, axes="..., 64", dtypes=checks.REFERENCE_DTYPES)
    dims = (fmt.head_dim,) if fmt.is_fp8 or head_dim else PLAIN_DIMS
    if latent.shape[-1] + 64 not in dims:
        wanted = " or ".join(str(dim - 64) for dim in dims)
        raise ValueError(f"latent must have {wanted} channels for {format}, got shape {latent.shape}; pad or slice it")
    expected = (*latent.shape[:-1], 64)
    checks.shape("rope", rope, expected, axes="latent's, 64", remedy="give the 64 roped channels of every token")
    return layout(format, latent.shape[-1] + 64)


def kv_bytes(rows: Any, format: Any) -> KVFormat:
    """Rows as `quantize_kv` returns them."""
    fmt = kv_format(format)
    checks.array("rows", rows, axes="..., token", dtypes=("uint8",) if fmt.is_fp8 else (fmt.dtype,))
    widths = PLAIN_DIMS if not fmt.is_fp8 else (fmt.token_bytes,)
    if rows.shape[-1] not in widths:
        wanted = " or ".join(map(str, widths))
        raise ValueError(f"rows must be {wanted} wide for {format}, got shape {rows.shape}; see quantize_kv")
    return fmt if fmt.is_fp8 else layout(format, rows.shape[-1])


def sparse_pool(name: str, cache: Any, *, is_fp8: bool) -> int:
    """A pool for sparse decode, whose format its shape tells; returns its d_qk."""
    pool(name, cache)
    if is_fp8:
        if str(cache.dtype) not in FP8_DTYPES:
            raise TypeError(
                f"{name} must be uint8 or float8_e4m3fn with is_fp8_kvcache=True, got {cache.dtype}; "
                "make it with kvcache.init_kv_cache, or leave is_fp8_kvcache at False"
            )
        if cache.ndim == 2:
            flat_pool(name, cache, FP8_V4)
            fmt = FP8_V4
        else:
            known = {fmt.token_bytes: fmt for fmt in (FP8_V32, FP8_V4)}
            if cache.shape[2] != 1 or cache.shape[3] not in known:
                raise ValueError(
                    f"{name} must have shape [P, page_size, 1, 656] (fp8_v32) or [P, page_size, 1, 584] (fp8_v4), "
                    f"got {cache.shape}; make it with kvcache.init_kv_cache"
                )
            fmt = known[cache.shape[3]]
        pool_tokens(name, cache.shape[0] * page_size_of(cache.shape, fmt.token_bytes))
        return fmt.head_dim
    if str(cache.dtype) not in checks.REFERENCE_DTYPES:
        wanted = " or ".join(checks.REFERENCE_DTYPES)
        raise TypeError(f"{name} must be {wanted}, got {cache.dtype}; fp8 caches need is_fp8_kvcache=True")
    if cache.ndim != 4 or cache.shape[2] != 1 or cache.shape[3] not in PLAIN_DIMS:
        raise ValueError(f"{name} must have shape [P, page_size, 1, 576 or 512] for sparse decode, got {cache.shape}")
    pool_tokens(name, cache.shape[0] * cache.shape[1])
    return cache.shape[3]


def prefill_keys(name: str, kv: Any) -> tuple[int, int, int]:
    """The keys of sparse prefill, rows or a pool: how many an index may name, h_kv and d_qk."""
    if not isinstance(kv, (jax.Array, np.ndarray)):
        raise TypeError(f"{name} must be an array [s_kv, h_kv, d_qk], got {type(kv).__name__}; use jnp.asarray")
    dtype = str(kv.dtype)
    if dtype not in (*checks.REFERENCE_DTYPES, *FP8_DTYPES):
        wanted = " or ".join(checks.REFERENCE_DTYPES)
        raise TypeError(f"{name} must be {wanted}, or a pool of {' or '.join(FP8_DTYPES)}, got {dtype}; cast it")
    if dtype in FP8_DTYPES:
        if kv.ndim != 4 or 0 in kv.shape or kv.shape[2:] != (1, FP8_V32.token_bytes):
            raise ValueError(
                f"{name} in {dtype} must be a pool [P, page_size, 1, {FP8_V32.token_bytes}] of the format fp8_v32, "
                f"got shape {kv.shape}; read other formats with kvcache.gather_kv_cache, and attend to the rows"
            )
        pool_tokens(name, kv.shape[0] * kv.shape[1])
        return kv.shape[0] * kv.shape[1], 1, FP8_V32.head_dim
    if kv.ndim == 4:
        if 0 in kv.shape or kv.shape[2] != 1 or kv.shape[3] not in PLAIN_DIMS:
            raise ValueError(
                f"{name} must have shape [P, page_size, 1, 576 or 512] and at least one page, got {kv.shape}; "
                "pools have one KV head"
            )
        pool_tokens(name, kv.shape[0] * kv.shape[1])
        return kv.shape[0] * kv.shape[1], 1, kv.shape[3]
    if kv.ndim != 3 or 0 in kv.shape or kv.shape[2] not in PLAIN_DIMS:
        raise ValueError(
            f"{name} must have shape [s_kv, h_kv, 576 or 512], or be a pool [P, page_size, 1, ...], got {kv.shape}"
        )
    if isinstance(kv.shape[0], int) and kv.shape[0] * kv.shape[1] > checks.MAX_TOKENS:
        raise ValueError(
            f"{name} must have fewer than 2**31 rows, got s_kv * h_kv of shape {kv.shape}; attend to parts"
        )
    return kv.shape[0], kv.shape[1], kv.shape[2]
