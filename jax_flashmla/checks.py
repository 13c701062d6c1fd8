"""Argument checks by name: what was expected, what came, what to do. Attributes are cast here and nowhere else."""

import json
import math
import operator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KERNEL_DTYPES = ("bfloat16", "float16")
REFERENCE_DTYPES = (*KERNEL_DTYPES, "float32")
HEAD_DIMS = (576, 512)
HEAD_DIM_V = 512
PAGE_SIZES = (16, 32, 64, 128, 256)
MAX_INVARIANT_BATCH = 4095  # 16 parts per sequence, in a grid dimension of the decode kernel
MAX_TOKENS = 2**31 - 1


def array(name: str, value: Any, *, axes: str, dtypes: tuple[str, ...]) -> None:
    """Checks rank and dtype; `axes` names the axes as the documentation does, such as "b, max_pages" or "..., d"."""
    if not isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(f"{name} must be an array [{axes}], got {type(value).__name__}; use jnp.asarray")
    any_rank, rank = axes.startswith("..."), len(axes.split(","))
    if value.ndim < rank - 1 if any_rank else value.ndim != rank:
        raise ValueError(f"{name} must have the axes [{axes}], got shape {value.shape}; reshape it")
    if str(value.dtype) not in dtypes:
        wanted = " or ".join(dtypes)
        raise TypeError(f"{name} must be {wanted}, got {value.dtype}; cast it with {name}.astype(jnp.{dtypes[0]})")


def shape(name: str, value: jax.Array, expected: tuple[Any, ...], *, axes: str, remedy: str) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{name} must have shape [{axes}] = {expected}, got {value.shape}; {remedy}")


def dense_decode(q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits, head_dim_v: int) -> None:
    for name, value in (("block_table", block_table), ("cache_seqlens", cache_seqlens)):
        if value is None:
            raise ValueError(
                f"{name} must be an int32 array for dense decode, got None; only sparse decode goes without it"
            )
    array("q", q, axes="b, s_q, h_q, d_qk", dtypes=REFERENCE_DTYPES)
    array("k_cache", k_cache, axes="P, page_size, h_kv, d_qk", dtypes=REFERENCE_DTYPES)
    array("block_table", block_table, axes="b, max_pages", dtypes=("int32",))
    array("cache_seqlens", cache_seqlens, axes="b", dtypes=("int32",))
    b, s_q, h_q, d_qk = q.shape
    num_pages, page_size, h_kv, d_cache = k_cache.shape
    if k_cache.dtype != q.dtype:
        raise TypeError(f"k_cache must have q's dtype {q.dtype}, got {k_cache.dtype}; cast q to the dtype of the cache")
    if d_qk not in HEAD_DIMS:
        raise ValueError(f"q must have d_qk 576 or 512, got shape {q.shape}; pad or absorb the heads to one of them")
    if d_cache != d_qk:
        raise ValueError(
            f"k_cache must have q's d_qk = {d_qk}, got shape {k_cache.shape}; its last axis is [latent | rope]"
        )
    value_dim("head_dim_v", head_dim_v)
    if page_size not in PAGE_SIZES:
        raise ValueError(f"k_cache must have a page_size of {PAGE_SIZES}, got shape {k_cache.shape}; 64 is the fastest")
    if num_pages == 0:
        raise ValueError(f"k_cache must have at least one page, got shape {k_cache.shape}")
    if h_kv == 0 or h_q == 0 or h_q % h_kv:
        raise ValueError(
            f"h_q must be a multiple of h_kv, got h_q = {h_q} (q) and h_kv = {h_kv} (k_cache); pad the heads"
        )
    if s_q == 0:
        raise ValueError(f"q must have at least one query token, got shape {q.shape}")
    table_remedy = "give one row per sequence of q"
    shape("block_table", block_table, (b, block_table.shape[1]), axes="b, max_pages", remedy=table_remedy)
    shape("cache_seqlens", cache_seqlens, (b,), axes="b", remedy="give one length per sequence of q")
    if isinstance(block_table.shape[1], int) and block_table.shape[1] * page_size > MAX_TOKENS:
        raise ValueError(
            f"block_table must address fewer than 2**31 tokens, got shape {block_table.shape}; drop unused columns"
        )
    if (tile_scheduler_metadata is None) != (num_splits is None):
        raise ValueError(
            "tile_scheduler_metadata and num_splits must be given together; pass both results of get_mla_metadata"
        )
    if tile_scheduler_metadata is not None:
        array("tile_scheduler_metadata", tile_scheduler_metadata, axes="num_parts, 8", dtypes=("int32",))
        array("num_splits", num_splits, axes="b + 1", dtypes=("int32",))
        remedy = "pass the results of get_mla_metadata for the same cache_seqlens"
        parts = tile_scheduler_metadata.shape[0]
        if parts == 0 and b != 0:
            raise ValueError(f"tile_scheduler_metadata must have at least one part, got shape (0, ...); {remedy}")
        shape("tile_scheduler_metadata", tile_scheduler_metadata, (parts, 8), axes="num_parts, 8", remedy=remedy)
        shape("num_splits", num_splits, (b + 1,), axes="b + 1", remedy=remedy)


def value_dim(name: str, value: int) -> None:
    if value != HEAD_DIM_V:
        raise ValueError(f"{name} must be {HEAD_DIM_V}, got {value}; slice the output if you need fewer columns")


def sparse_decode(q, k_cache, indices, topk_length, attn_sink, *, d_qk: int, d_v: int, causal: bool) -> None:
    """`d_qk`: that of k_cache, which is a pool that sparse decode takes."""
    array("q", q, axes="b, s_q, h_q, d_qk", dtypes=REFERENCE_DTYPES)
    b, s_q, h_q, d_q = q.shape
    cached_dtype("k_cache", k_cache, q)
    if d_q != d_qk:
        raise ValueError(f"q must have k_cache's d_qk = {d_qk}, got shape {q.shape}; absorb the heads to that width")
    value_dim("head_dim_v", d_v)
    if s_q == 0 or h_q == 0:
        raise ValueError(f"q must have at least one query token and one head, got shape {q.shape}")
    if causal:
        raise ValueError("causal must be False with indices, got True; let indices name only tokens that may be seen")
    token_indices("indices", indices, "topk", q)
    topk_lengths("topk_length", topk_length, b)
    sinks(attn_sink, h_q)


def sparse_prefill(q, kv, indices, topk_length, attn_sink, *, h_kv: int, d_qk: int, d_v: int) -> None:
    """`h_kv`, `d_qk`: those of kv, which is rows or a pool that sparse prefill takes."""
    array("q", q, axes="s_q, h_q, d_qk", dtypes=REFERENCE_DTYPES)
    s_q, h_q, d_q = q.shape
    cached_dtype("kv", kv, q)
    if d_q != d_qk:
        raise ValueError(f"q must have kv's d_qk = {d_qk}, got shape {q.shape}; absorb the heads to that width")
    value_dim("d_v", d_v)
    if s_q == 0 or h_q == 0:
        raise ValueError(f"q must have at least one query token and one head, got shape {q.shape}")
    if h_q % h_kv:
        raise ValueError(f"h_q must be a multiple of h_kv, got h_q = {h_q} (q) and h_kv = {h_kv} (kv); pad the heads")
    array("indices", indices, axes="s_q, h_kv, topk", dtypes=("int32",))
    topk = indices.shape[2]
    remedy = "give one list per query token and KV head"
    shape("indices", indices, (s_q, h_kv, topk), axes="s_q, h_kv, topk", remedy=remedy)
    if topk == 0:
        raise ValueError(f"indices must have at least one column, got shape {indices.shape}; -1 names no key")
    if topk_length is not None:
        array("topk_length", topk_length, axes="s_q", dtypes=("int32",))
        shape("topk_length", topk_length, (s_q,), axes="s_q", remedy="give one length per query token")
    sinks(attn_sink, h_q)


def cached_dtype(name: str, cache: Any, q: Any) -> None:
    """Queries of the cache's dtype; of bfloat16, or of float32 for the reference, where the cache is fp8."""
    is_fp8 = cache.dtype.itemsize == 1
    if is_fp8 and q.dtype == jnp.float16:
        raise TypeError("q must be bfloat16 for an fp8 cache, got float16; cast it with q.astype(jnp.bfloat16)")
    if not is_fp8 and cache.dtype != q.dtype:
        raise TypeError(f"{name} must have q's dtype {q.dtype}, got {cache.dtype}; cast q to the dtype of the cache")


def sinks(attn_sink: Any, h_q: Any) -> None:
    if attn_sink is not None:
        array("attn_sink", attn_sink, axes="h_q", dtypes=("float32",))
        shape("attn_sink", attn_sink, (h_q,), axes="h_q", remedy="give one sink per query head")


def extra_cache(k_cache, d_qk: int, extra_k_cache, d_extra: int) -> None:
    """Both caches must be of one format; their page sizes may differ."""
    if (d_extra, extra_k_cache.dtype) != (d_qk, k_cache.dtype):
        raise ValueError(
            f"extra_k_cache must be of k_cache's format, {k_cache.dtype} with d_qk = {d_qk}, got "
            f"{extra_k_cache.dtype} with d_qk = {d_extra}; make both with the same format"
        )


def extra_indices(q, indices, topk_length) -> None:
    if indices is not None:
        token_indices("extra_indices_in_kvcache", indices, "extra_topk", q)
    elif topk_length is not None:
        raise ValueError("extra_topk_length must be None without extra_k_cache, got a length; pass the cache as well")
    topk_lengths("extra_topk_length", topk_length, q.shape[0])


def token_indices(name: str, value: Any, topk: str, q: Any) -> None:
    array(name, value, axes=f"b, s_q, {topk}", dtypes=("int32",))
    b, s_q, _, _ = q.shape
    remedy = "give one row per query token"
    shape(name, value, (b, s_q, value.shape[2]), axes=f"b, s_q, {topk}", remedy=remedy)
    if value.shape[2] == 0:
        raise ValueError(f"{name} must have at least one column, got shape {value.shape}; -1 names no token")


def topk_lengths(name: str, value: Any, b: Any) -> None:
    if value is not None:
        array(name, value, axes="b", dtypes=("int32",))
        shape(name, value, (b,), axes="b", remedy="give one length per sequence of q")


def attention_state(side: str, out: Any, lse: Any, *, like: Any) -> None:
    array(f"out_{side}", out, axes="b, s_q, h_q, d_v", dtypes=REFERENCE_DTYPES)
    array(f"lse_{side}", lse, axes="b, h_q, s_q", dtypes=("float32",))
    b, s_q, h_q, _ = out.shape
    remedy = "give both results of the same attention"
    shape(f"lse_{side}", lse, (b, h_q, s_q), axes="b, h_q, s_q", remedy=remedy)
    if (out.shape, out.dtype) != (like.shape, like.dtype):
        raise ValueError(
            f"out_{side} must be like out_a, {like.dtype} {like.shape}, got {out.dtype} {out.shape}; "
            "both sides come from the same queries"
        )


def invariant_batch(b: int, batch_invariant: bool) -> None:
    if batch_invariant and isinstance(b, int) and b > MAX_INVARIANT_BATCH:
        raise ValueError(
            f"batch_invariant needs b <= {MAX_INVARIANT_BATCH}, got cache_seqlens of shape ({b},); "
            "decode in several batches, which gives the same bits"
        )


def json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:  # of JSON, or of UTF-8
        value = error
    if not isinstance(value, dict):
        got = value if isinstance(value, ValueError) else type(value).__name__
        raise ValueError(f"{path} must be a JSON object, got {got}; is the download complete?")
    return value


def implementation(value: Any) -> None:
    if value not in (None, "cuda", "xla"):
        raise ValueError(f"implementation must be None, 'cuda' or 'xla', got {value!r}")


def static(name: str, value: Any) -> None:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name} must be static, a plain Python value, got the traced {value.aval}; "
            "close over it, or name it in static_argnames of jax.jit"
        )


def integer(name: str, value: Any, *, minimum: int) -> int:
    static(name, value)
    try:
        result = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}") from None
    if result < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {result}")
    return result


def flag(name: str, value: Any) -> bool:
    static(name, value)
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__} {value!r}")
    return bool(value)


def scale(name: str, value: Any, *, default: float) -> float:
    """The Python float nearest to the float32 that the kernel gets: one type, because attributes compare by value."""
    static(name, value)
    if value is None:
        value = default
    try:
        given = math.nan if isinstance(value, (bool, np.bool_, str)) else float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number or None, got {type(value).__name__}") from None
    with np.errstate(over="ignore"):
        result = float(np.float32(given))
    if not (math.isfinite(result) and result >= 0):
        raise ValueError(f"{name} must be finite in float32 and >= 0, got {value!r}; None takes d_qk ** -0.5")
    return result


def not_used(reason: str, **arguments: tuple[Any, Any]) -> None:
    """Refuses what this version does not have; each argument comes with the value that means "not used"."""
    for name, (value, unused) in arguments.items():
        if value is not unused:
            raise NotImplementedError(f"{name} is not supported: {reason}; leave {name} at its default {unused}")


def to_jax(*arrays: Any) -> list[jax.Array]:
    return [jnp.asarray(x) for x in arrays]
