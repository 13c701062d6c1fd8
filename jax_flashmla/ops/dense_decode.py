"""Dense MLA decode over a paged bf16/f16 cache."""

import jax
import jax.numpy as jnp
import numpy as np

from .. import _native, reference
from .._primitive import define
from .schedule import METADATA_WIDTH, num_parts, row_tiles, schedule, workspaces

TARGET = "jax_flashmla.dense_decode.v2"
MAX_ROWS = 8 * 65535
"""s_q * h_q that the handler, csrc/ffi/dense_decode.cc, takes."""
ALL, ATTEND, COMBINE = (np.int32(phase) for phase in range(3))
"""Phase in csrc/params.h."""


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
        plan = schedule(lengths[None], parts=parts, row_tiles=row_tiles(rows), batch_invariant=False, lists=True)
        metadata, num_splits = (x[0] for x in plan)
    operands = q, k_cache, block_table, cache_seqlens, metadata, num_splits
    results = shapes(*operands, softmax_scale=softmax_scale, causal=causal)
    parts = metadata.shape[0]
    results += workspaces(b, rows, h_kv, parts)
    attributes = {"softmax_scale": np.float32(softmax_scale), "causal": causal}
    call = jax.ffi.ffi_call(TARGET, results)
    if not _native.records() or parts == 1:
        return call(*operands, phase=ALL, **attributes)[:2]
    # Kernels that XLA records may start while the one before them ends, and a chain of single ones does so soonest: of
    # two in one call both would wait for what is before the call. So attention and combine are two calls.
    in_place = {len(operands) + i: i for i in range(len(results))}
    combine = jax.ffi.ffi_call(TARGET, results, input_output_aliases=in_place)
    return combine(*operands, *call(*operands, phase=ATTEND, **attributes), phase=COMBINE, **attributes)[:2]


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
