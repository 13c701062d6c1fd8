"""Inputs that punish reading what must not be read, a float64 oracle, and error metrics. Plain numpy throughout."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from .cases import Case

UNUSED_PAGES = (2147480000, -1)
SPARE_PAGES = 3  # pages of NaN that no table mentions


class Inputs(NamedTuple):
    """The array arguments of `flash_mla_with_kvcache`, in its order."""

    q: np.ndarray
    k_cache: np.ndarray
    block_table: np.ndarray
    cache_seqlens: np.ndarray


def make_inputs(case: Case, seed: int = 0, *, max_pages: int | None = None) -> Inputs:
    """Normal data on shuffled pages; every slot that is no key is NaN, every table entry that is no page is absurd."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(jnp.dtype(case.dtype))
    lengths = np.array(case.seqlens, np.int32)
    pages_of = -(-lengths // case.page_size)
    width = max(int(pages_of.max(initial=0)) + 2, 1) if max_pages is None else max_pages
    num_pages = int(pages_of.sum()) + SPARE_PAGES

    k_cache = np.full((num_pages, case.page_size, case.h_kv, case.d_qk), np.nan, dtype)
    block_table = rng.choice(np.array(UNUSED_PAGES, np.int32), (case.b, width))
    free = iter(rng.permutation(num_pages))
    for i, length in enumerate(lengths):
        for j in range(pages_of[i]):
            block_table[i, j] = page = next(free)
            used = min(case.page_size, length - j * case.page_size)
            k_cache[page, :used] = rng.standard_normal((used, case.h_kv, case.d_qk), np.float32).astype(dtype)
    q = rng.standard_normal((case.b, case.s_q, case.h_q, case.d_qk), np.float32).astype(dtype)
    return Inputs(q, k_cache, block_table, lengths)


def dense_decode_f64(
    q: np.ndarray,
    k_cache: np.ndarray,
    block_table: np.ndarray,
    cache_seqlens: np.ndarray,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    head_dim_v: int = 512,
) -> tuple[np.ndarray, np.ndarray]:
    """`flash_mla_with_kvcache` in float64, one sequence and KV head at a time, written for reading."""
    q, k_cache, block_table, cache_seqlens = map(np.asarray, (q, k_cache, block_table, cache_seqlens))
    b, s_q, h_q, d_qk = q.shape
    num_pages, page_size, h_kv, _ = k_cache.shape
    group = h_q // h_kv
    scale = float(np.float32(d_qk**-0.5 if softmax_scale is None else softmax_scale))
    out = np.zeros((b, s_q, h_q, head_dim_v))
    lse = np.full((b, h_q, s_q), -np.inf)
    for i in range(b):
        length = min(max(int(cache_seqlens[i]), 0), block_table.shape[1] * page_size)
        position = np.arange(length)
        page = block_table[i][position // page_size]
        position = position[(page >= 0) & (page < num_pages)]
        keys = k_cache[block_table[i][position // page_size], position % page_size].astype(np.float64)
        newest = length - s_q + np.arange(s_q) if causal else np.full(s_q, length)
        hidden = position > newest[:, None, None]
        for head in range(h_kv):
            heads = slice(head * group, (head + 1) * group)
            scores = np.einsum("shd,td->sht", q[i, :, heads].astype(np.float64), keys[:, head], optimize=True) * scale
            scores[np.broadcast_to(hidden, scores.shape)] = -np.inf
            peak = scores.max(axis=-1, initial=-np.inf, keepdims=True)
            peak[peak == -np.inf] = 0
            p = np.exp(scores - peak)
            total = p.sum(axis=-1, keepdims=True)
            some = total[..., 0] > 0
            p /= np.where(total > 0, total, 1)
            out[i, :, heads] = np.einsum("sht,td->shd", p, keys[:, head, :head_dim_v], optimize=True)
            log_total = np.log(np.where(some, total[..., 0], 1)) + peak[..., 0]
            lse[i, heads] = np.where(some, log_total, -np.inf).T
    return out, lse


def cosine_difference(a: np.ndarray, b: np.ndarray) -> float:
    """1 - 2ab / (aa + bb): sees scale errors too; 0 for two zero arrays."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = (a * a + b * b).sum()
    return float(1 - 2 * (a * b).sum() / norms) if norms else 0.0


def max_error(a: np.ndarray, exact: np.ndarray) -> float:
    """Largest absolute difference; infinite when infinities or NaNs stand in different places."""
    a, exact = np.asarray(a, np.float64), np.asarray(exact, np.float64)
    finite = np.isfinite(exact)
    if not np.array_equal(np.where(finite, 0, exact), np.where(np.isfinite(a), 0, a), equal_nan=True):
        return float("inf")
    return float(np.abs(a[finite] - exact[finite]).max(initial=0.0))


def max_error_ratio(a: np.ndarray, b: np.ndarray, exact: np.ndarray) -> float:
    """How many times larger a's largest error is than b's.

    b's error counts as at least half a unit in the last place of the largest result: a lucky b rounds better than that.
    """
    exact = np.asarray(exact, np.float64)
    finite = np.abs(exact[np.isfinite(exact)])
    half_ulp = float(finite.max(initial=0.0)) * float(jnp.finfo(np.asarray(b).dtype).eps) / 2
    error = max_error(a, exact)
    return error / max(max_error(b, exact), half_ulp) if error else 0.0
