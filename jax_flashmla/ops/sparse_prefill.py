"""Sparse MLA prefill: every query token attends to the slots of a pool that its own list of each KV head names."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import reference
from .._primitive import define
from ..kvcache.rows import join_pools
from .schedule import MAX_SEQUENCES, constant_plan, num_parts, row_tiles, schedule, workspaces

TARGET = "jax_flashmla.sparse_prefill.v1"


def shapes(q, *_, softmax_scale):
    s_q, h_q, _ = q.shape
    return [
        jax.ShapeDtypeStruct((s_q, h_q, reference.D_V), q.dtype),
        jax.ShapeDtypeStruct((s_q, h_q), jnp.float32),
        jax.ShapeDtypeStruct((s_q, h_q), jnp.float32),
    ]


def cuda(q, pool, indices, topk_length, attn_sink, *, softmax_scale):
    """To the kernel a list is a sequence; a plan holds so many at most, and prompts have more."""
    s_q, h_q, _ = q.shape
    _, h_kv, topk = indices.shape
    group = h_q // h_kv
    lists = s_q * h_kv
    plans, chunk = 1, lists
    if isinstance(lists, int):  # else symbolic under jax.export: one plan, or too many sequences at run time
        plans = -(-s_q // max(1, MAX_SEQUENCES // h_kv))
        chunk = -(-s_q // plans) * h_kv  # whole tokens
    parts = num_parts(chunk, group, 1)
    plan: tuple[Any, ...]
    constant = constant_plan(lists, topk, parts, row_tiles(group)) if topk_length.shape[0] == 0 else None
    if constant is not None:
        plan = constant[0], constant[1][None], constant[2]
    else:
        lengths = jnp.full(lists, topk, jnp.int32)
        if topk_length.shape[0] != 0:
            topk_length = jnp.broadcast_to(topk_length[:, None], (s_q, h_kv)).reshape(lists)
            lengths = jnp.clip(topk_length, 0, topk)
        if isinstance(lists, int):
            lengths = jnp.pad(lengths, (0, plans * chunk - lists))
        lengths = lengths.reshape(plans, chunk)
        plan = lengths, *schedule(lengths, parts=parts, row_tiles=row_tiles(group), batch_invariant=False, lists=False)
    room = workspaces(chunk, group, 1, parts)
    room.append(jax.ShapeDtypeStruct((room[0].shape[0], group), jnp.float32))  # the largest scores
    call = jax.ffi.ffi_call(TARGET, shapes(q, softmax_scale=softmax_scale) + room)
    return call(q, pool, indices, topk_length, attn_sink, *plan, softmax_scale=np.float32(softmax_scale))[:3]


def batch(bind, size, operands, mapped):
    """Elements follow each other along s_q, and so do their pools along P where each has its own."""
    q, pool, indices, topk_length, attn_sink = operands
    if mapped[4]:
        raise ValueError(
            f"sparse_prefill: attn_sink cannot be mapped by vmap, got a mapped axis of size {size}; "
            "one attn_sink serves all"
        )
    q, indices, topk_length = (
        x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
        for x, is_mapped in ((q, mapped[0]), (indices, mapped[2]), (topk_length, mapped[3]))
    )
    if mapped[1]:
        pool, indices = join_pools("sparse_prefill", pool, indices)
    s_q = q.shape[1]
    q, indices, topk_length = (x.reshape(size * x.shape[1], *x.shape[2:]) for x in (q, indices, topk_length))
    return [x.reshape(size, s_q, *x.shape[1:]) for x in bind(q, pool, indices, topk_length, attn_sink)]


def unsupported(q, *_):
    if q.dtype != jnp.bfloat16:
        return f"the kernel takes bfloat16, got q in {q.dtype}"
    return None


# An operand that is not used is an array of shape (0,).
sparse_prefill = define(
    "sparse_prefill",
    target=TARGET,
    shapes=shapes,
    reference=reference.sparse_prefill,
    cuda=cuda,
    batch=batch,
    unsupported=unsupported,
)
