"""Sparse MLA decode: every query token attends to the slots that its row of `indices` names."""

import jax
import jax.numpy as jnp

from .. import reference
from .._primitive import define


def shapes(q, *_, softmax_scale):
    b, s_q, h_q, _ = q.shape
    return [
        jax.ShapeDtypeStruct((b, s_q, h_q, reference.D_V), q.dtype),
        jax.ShapeDtypeStruct((b, h_q, s_q), jnp.float32),
    ]


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


def unsupported(*operands):
    return "this version of jax_flashmla has no CUDA kernel for sparse decode"


# An operand that is not used is an array of shape (0,). The kernel comes as `cuda` and `target`, and `unsupported`
# then says which operands it does not take.
sparse_decode = define(
    "sparse_decode",
    shapes=shapes,
    reference=reference.sparse_decode,
    batch=batch,
    unsupported=unsupported,
)
