"""The split-KV plan: which part (a column of thread blocks) works on which KV blocks of which sequence."""

import jax
import jax.numpy as jnp
import numpy as np

from .. import _native, reference
from .._primitive import define

TARGET = "jax_flashmla.schedule.v2"
ROW_TILE = 64
METADATA_WIDTH = 8
MAX_SEQUENCES = 50_000
MAX_SPLITS = reference.MAX_INVARIANT_SPLITS
MAX_CONSTANT_PLAN = 8192
"""Sequences of a plan that is put into the program, some ten KB. Beside more of them the planner's time is nothing."""


def num_parts(b: int, rows: int, h_kv: int, *, batch_invariant: bool = False) -> int:
    """The static number of parts for `rows` query rows per sequence and KV head.

    A part is run by one thread block per row tile and KV head, so `parts * tiles` blocks share the SMs in waves. Fewer
    parts write fewer partial results: take the fewest full waves that waste at most 5 % of the SMs.
    """
    if batch_invariant:
        return b * MAX_SPLITS
    sms = _native.sm_count()
    if not isinstance(rows, int):  # symbolic under jax.export; every number is right, this one suits few rows
        return sms
    tiles = -(-rows // ROW_TILE) * h_kv
    full = ((waves, waves * sms // tiles) for waves in range(1, tiles + 1))
    return next(parts for waves, parts in full if parts and waves * sms <= 1.05 * parts * tiles)


def row_tiles(rows: int) -> int:
    """Row tiles of a sequence and KV head; 1 where the number of rows is symbolic, as `num_parts` takes it."""
    return -(-rows // ROW_TILE) if isinstance(rows, int) else 1


def workspaces(b: int, rows: int, h_kv: int, parts: int) -> list[jax.ShapeDtypeStruct]:
    """Room for the partial results: p - 1 inner boundaries add one each, and one more per sequence that they cut."""
    slots = max(1, parts - 1 + min(b, parts - 1)) if isinstance(b, int) and isinstance(parts, int) else 2 * parts
    return [
        jax.ShapeDtypeStruct((slots, h_kv, -(-rows // 16) * 16, reference.D_V), jnp.float16),  # whole fragments
        jax.ShapeDtypeStruct((slots, h_kv, rows, 4), jnp.float32),  # reference maxima, sums, scales of both halves
    ]


def constant_plan(b: int, length: int, parts: int, row_tiles: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Lengths, metadata and num_splits for b sequences of one length; None where the planner's kernel is to make them.

    The kernels read lengths and num_splits of shape (0,) as "all are as long as their list" and "none is split". XLA
    fills an array of equal numbers, and a vector of numbers at equal distances, by a kernel of its own before every
    call: so these have no elements, and num_splits is a matrix [1, b + 1].
    """
    if not (isinstance(b, int) and isinstance(length, int) and isinstance(parts, int) and 1 <= b <= MAX_CONSTANT_PLAN):
        return None
    metadata, num_splits = reference.equal_plan(b, length, parts, row_tiles)
    nothing = np.zeros(0, np.int32)
    return nothing, metadata, num_splits[None] if num_splits[-1] else nothing


def shapes(cache_seqlens, *, parts, row_tiles, batch_invariant, lists):
    n, b = cache_seqlens.shape
    return [
        jax.ShapeDtypeStruct((n, parts, METADATA_WIDTH), jnp.int32),
        jax.ShapeDtypeStruct((n, b + 1), jnp.int32),
    ]


def cuda(cache_seqlens, *, parts, **attributes):
    results = shapes(cache_seqlens, parts=parts, **attributes)
    attributes["row_tiles"] = np.int32(attributes["row_tiles"])
    return jax.ffi.ffi_call(TARGET, results)(cache_seqlens, **attributes)


def batch(bind, size, operands, mapped):
    (cache_seqlens,) = operands
    _, n, b = cache_seqlens.shape
    metadata, num_splits = bind(cache_seqlens.reshape(size * n, b))
    return [x.reshape(size, n, *x.shape[1:]) for x in (metadata, num_splits)]


def unsupported(cache_seqlens):
    b = cache_seqlens.shape[1]
    if isinstance(b, int) and not 1 <= b <= MAX_SEQUENCES:
        return f"the planner keeps 1 to {MAX_SEQUENCES} sequences in shared memory, got b = {b}"
    return None


# Operands are n independent batches, so that vmap makes n plans in one launch; the public function has n = 1.
# row_tiles: of a sequence. lists: parts may list whole sequences in any order, which dense decode understands.
schedule = define(
    "schedule",
    target=TARGET,
    shapes=shapes,
    reference=reference.schedule,
    cuda=cuda,
    batch=batch,
    unsupported=unsupported,
)
