"""Sparse MLA decode: every query token attends to the slots that its row of `indices` names."""

import jax
import jax.numpy as jnp
import numpy as np

from .. import reference
from .._primitive import define
from .schedule import MAX_SEQUENCES, constant_plan, num_parts, row_tiles, schedule, workspaces

TARGET = "jax_flashmla.sparse_decode.v1"


def shapes(q, *_, softmax_scale):
    b, s_q, h_q, _ = q.shape
    return [
        jax.ShapeDtypeStruct((b, s_q, h_q, reference.D_V), q.dtype),
        jax.ShapeDtypeStruct((b, h_q, s_q), jnp.float32),
    ]


def cuda(
    q,
    k_cache,
    indices,
    topk_length,
    attn_sink,
    extra_k_cache,
    extra_indices,
    extra_topk_length,
    *,
    softmax_scale,
):
    """To the kernel a query token is a sequence, whose keys are whole blocks of its list and then its second list."""
    b, s_q, h_q, _ = q.shape
    tokens = b * s_q
    topk_length, extra_topk_length = (
        x if x.shape[0] == 0 else jnp.broadcast_to(x[:, None], (b, s_q)).reshape(tokens)
        for x in (topk_length, extra_topk_length)
    )
    keys = reference.BLOCK * -(-_entries(indices, topk_length) // reference.BLOCK)
    if extra_k_cache.ndim > 1:
        keys += _entries(extra_indices, extra_topk_length)
    parts = num_parts(tokens, h_q, 1)
    plan = constant_plan(tokens, keys, parts, row_tiles(h_q))
    if plan is None:
        lengths = jnp.broadcast_to(jnp.asarray(keys, jnp.int32), tokens)
        made = schedule(lengths[None], parts=parts, row_tiles=row_tiles(h_q), batch_invariant=False, lists=False)
        plan = lengths, *(x[0] for x in made)
    operands = q, k_cache, indices, topk_length, attn_sink, extra_k_cache, extra_indices, extra_topk_length, *plan
    results = shapes(q, softmax_scale=softmax_scale) + workspaces(tokens, h_q, 1, parts)
    out, lse, *_ = jax.ffi.ffi_call(TARGET, results)(*operands, softmax_scale=np.float32(softmax_scale))
    return out, lse


def _entries(indices, topk_length):
    """How many entries of a list count."""
    topk = indices.shape[-1]
    return topk if topk_length.shape[0] == 0 else jnp.clip(topk_length, 0, topk)


SHARED = {1: "k_cache", 4: "attn_sink", 5: "extra_k_cache"}
"""The operands without an axis b, by place."""


def batch(bind, size, operands, mapped):
    for place, name in SHARED.items():
        if mapped[place]:
            remedy = "one attn_sink serves all" if name == "attn_sink" else "put all pages into one pool"
            raise ValueError(
                f"sparse_decode: {name} cannot be mapped by vmap, got a mapped axis of size {size}; {remedy}"
            )
    b = operands[0].shape[1] if mapped[0] else operands[0].shape[0]
    folded = []
    for place, (x, is_mapped) in enumerate(zip(operands, mapped, strict=True)):
        if place not in SHARED:
            x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            x = x.reshape(size * x.shape[1], *x.shape[2:])  # one that is not used has the shape (0,) and keeps it
        folded.append(x)
    return [x.reshape(size, b, *x.shape[1:]) for x in bind(*folded)]


def unsupported(q, k_cache, *_):
    tokens = q.shape[0] * q.shape[1]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the kernel takes bfloat16 and float16, got q in {q.dtype}"
    if isinstance(tokens, int) and not 1 <= tokens <= MAX_SEQUENCES:
        return f"the planner takes 1 to {MAX_SEQUENCES} query tokens, got b * s_q = {tokens}"
    return None


# An operand that is not used is an array of shape (0,).
sparse_decode = define(
    "sparse_decode",
    target=TARGET,
    shapes=shapes,
    reference=reference.sparse_decode,
    cuda=cuda,
    batch=batch,
    unsupported=unsupported,
)
