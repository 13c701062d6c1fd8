"""Dense MLA decode over a paged bf16/f16 cache."""

import jax
import jax.numpy as jnp
import numpy as np

from .. import reference
from .._primitive import define
from .schedule import METADATA_WIDTH, num_parts, schedule, workspaces
from .splitkv import attend_and_combine

TARGET = "jax_flashmla.dense_decode.v2"
MAX_ROWS = 8 * 65535
"""s_q * h_q that the handler, csrc/ffi/dense_decode.cc, takes."""


def shapes(q, k_cache, block_table, cache_seqlens, metadata, num_splits, *, softmax_scale, causal):
    b, s_q, h_q, _ = q.shape
    return [
        jax.ShapeDtypeStruct((b, s_q, h_q, reference.D_V), q.dtype),
        jax.ShapeDtypeStruct((b, h_q, s_q), jnp.float32),
    ]


def cuda(q, k_cache, block_table, cache_seqlens, metadata, num_splits, *, softmax_scale, causal):
    b, s_q, h_q, _ = q.shape
    _, page_size, h_kv, _ = k_cache.shape
    rows = s_q * h_q // h_kv
    if metadata.shape[0] == 0:  # no plan given: make it here, after vmap has folded its axes into b
        lengths = reference.clamp_lengths(cache_seqlens, block_table, page_size)
        parts = num_parts(b, rows, h_kv)
        metadata, num_splits = (x[0] for x in schedule(lengths[None], parts=parts, batch_invariant=False, lists=True))
    operands = q, k_cache, block_table, cache_seqlens, metadata, num_splits
    results = shapes(*operands, softmax_scale=softmax_scale, causal=causal)
    parts = metadata.shape[0]
    results += workspaces(b, rows, h_kv, parts)
    scale = np.float32(softmax_scale)
    return attend_and_combine(TARGET, results, operands, parts, softmax_scale=scale, causal=causal)[:2]


def batch(bind, size, operands, mapped):
    q, k_cache, block_table, cache_seqlens, metadata, num_splits = (
        x if is_mapped or i == 1 else jnp.broadcast_to(x, (size, *x.shape))
        for i, (x, is_mapped) in enumerate(zip(operands, mapped, strict=True))
    )
    if mapped[1]:
        raise ValueError(
            f"dense_decode: k_cache cannot be mapped by vmap, got a mapped axis of size {size}; "
            "put the pages of all elements into one pool and map block_table"
        )
    b = q.shape[1]
    # Element e's sequences become e*b ... e*b + b - 1 of one batch: its plan moves along, and so do its partial slots.
    first_seq = b * jnp.arange(size, dtype=jnp.int32)[:, None, None]
    is_seq = jnp.array([[1, 0, 1, 0, 0, 0, 0, 0], [1, 0, 1, 0, 0, 1, 1, 1]], jnp.int32)  # of a range, of a list
    is_seq = is_seq[(metadata[..., 4] < 0).astype(jnp.int32)]
    metadata = (metadata + first_seq * is_seq).reshape(-1, METADATA_WIDTH)
    if num_splits.shape[1]:
        ends = jnp.cumsum(num_splits[:, -1:], axis=0, dtype=jnp.int32)
        num_splits = jnp.concatenate([(num_splits[:, :-1] + ends - num_splits[:, -1:]).ravel(), ends[-1]])
    fold = (x.reshape(size * b, *x.shape[2:]) for x in (q, block_table, cache_seqlens))
    q, block_table, cache_seqlens = fold
    results = bind(q, k_cache, block_table, cache_seqlens, metadata, num_splits.ravel())
    return [x.reshape(size, b, *x.shape[1:]) for x in results]


def unsupported(q, k_cache, block_table, *_):
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the kernel takes bfloat16 and float16, got q in {q.dtype}"
    rows = q.shape[1] * q.shape[2]
    if isinstance(rows, int) and rows > MAX_ROWS:
        return f"the kernel takes s_q * h_q of {MAX_ROWS} at most, got {rows}; cut the queries into shorter chunks"
    if block_table.shape[1] == 0:
        return "the kernel needs a block_table with at least one column, got max_pages = 0"
    return None


dense_decode = define(
    "dense_decode",
    target=TARGET,
    shapes=shapes,
    reference=reference.dense_decode,
    cuda=cuda,
    batch=batch,
    unsupported=unsupported,
)
