"""Every op in plain jnp, with the same operands and attributes: the path without a Hopper GPU, and the contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ._primitive import match_varying
from .kvcache.formats import page_size_of
from .kvcache.quantize import pack
from .kvcache.rows import gather_slots, num_slots, pool_format, read, write

D_V = 512

# One scan step reads this many keys per sequence: enough to keep matrix units busy, little enough that the gathered
# pages and the scores stay small beside the pool, however long the context is.
CHUNK_TOKENS = 512
CHUNK_INDICES = 128  # the same for lists of tokens, where every query token has keys of its own
CHUNK_LISTS = 64  # and so many lists at a time in sparse prefill, whose queries are as many as its keys

# The integers of the plan, the same in the CUDA planner: a KV block is 64 tokens; starting on a sequence costs about as
# much as 2 blocks; the kernel works on blocks in pairs, so a split has two at least; merging partial results costs
# the whole batch about 6 blocks, and with several row tiles, whose partial results are more and which leave the memory
# time to spare, about a 24th of a part.
BLOCK = 64
SEQUENCE_OVERHEAD_BLOCKS = 2
MIN_SPLIT_BLOCKS = 2
EVEN_CANDIDATES = 32
SPLIT_PENALTY_BLOCKS = 6
SPLIT_PENALTY_SHARE = 24
MIN_INVARIANT_BLOCKS = 16
MAX_INVARIANT_SPLITS = 16
MOST_LISTED = 4  # sequences of a part that lists them
MAX_LISTED = 1024  # and of the batch: the CUDA planner compares every length with every other
MAX_TOTAL_BLOCKS = 2**29  # keeps every sum of the planner inside int32


def clamp_lengths(cache_seqlens, block_table, page_size):
    return jnp.clip(cache_seqlens, 0, jnp.asarray(block_table.shape[1] * page_size, jnp.int32))


def dense_decode(q, k_cache, block_table, cache_seqlens, metadata=None, num_splits=None, *, softmax_scale, causal):
    """Online softmax over chunks of pages; differentiable. The plan does not matter here."""
    b, s_q, h_q, d_qk = q.shape
    num_pages, page_size, h_kv, _ = k_cache.shape
    group = h_q // h_kv
    rows = s_q * group
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None  # no TF32 behind a float32 request

    lengths = clamp_lengths(cache_seqlens, block_table, page_size)
    token = jnp.arange(rows, dtype=jnp.int32)[None] // group
    seen = lengths[:, None] - (s_q - 1 - token if causal else jnp.zeros_like(token))  # row r sees keys j < seen[r]
    q = q.reshape(b, s_q, h_kv, group, d_qk).transpose(0, 2, 1, 3, 4).reshape(b, h_kv, rows, d_qk)

    chunk_pages = max(1, CHUNK_TOKENS // page_size)
    chunk_tokens = chunk_pages * page_size
    steps = -(-block_table.shape[1] // chunk_pages)
    spare = steps * chunk_pages - block_table.shape[1]
    pages = jnp.pad(block_table, ((0, 0), (0, spare)), constant_values=-1)  # no page at all, so never read
    pages = pages.reshape(b, steps, chunk_pages).swapaxes(0, 1)
    starts = match_varying(chunk_tokens * jnp.arange(steps, dtype=jnp.int32), lengths)

    def attend(state, page, start):
        position = start + jnp.arange(chunk_tokens, dtype=jnp.int32)[None]
        exists = (page >= 0) & (page < num_pages)
        readable = jnp.repeat(exists, page_size, axis=1) & (position < lengths[:, None])
        keys = k_cache.at[jnp.where(exists, page, 0)].get(mode="promise_in_bounds")
        # Unused slots may hold NaN and 0 * NaN is NaN: they become zeros before any product, forward and backward.
        keys = jnp.where(readable[:, :, None, None], keys.reshape(b, chunk_tokens, h_kv, d_qk), 0)
        scores = jnp.einsum("bkrd,btkd->bkrt", q, keys, precision=precision, preferred_element_type=jnp.float32)
        visible = readable[:, None, None, :] & (position[None, None] < seen[:, None, :, None])
        scores = jnp.where(visible, scores * jnp.float32(softmax_scale), -jnp.inf)
        return _accumulate(state, scores, "bkrt,btkd->bkrd", keys[..., :D_V], precision)

    def step(state, chunk):
        page, start = chunk
        # Tables are as wide as the longest context a server allows; what no sequence reaches costs nothing.
        return jax.lax.cond(start < lengths.max(initial=0), attend, lambda state, *_: state, state, page, start), None

    state = _before_keys((b, h_kv, rows), q, k_cache, block_table, lengths)
    state, _ = jax.lax.scan(step, state, (pages, starts))

    out, lse = _normalise(state)
    out = out.astype(q.dtype).reshape(b, h_kv, s_q, group, D_V).transpose(0, 2, 1, 3, 4).reshape(b, s_q, h_q, D_V)
    return out, lse.reshape(b, h_kv, s_q, group).swapaxes(2, 3).reshape(b, h_q, s_q)


def _before_keys(rows, *operands):
    """The state of an online softmax that has seen no key: maxima, sums, and sums of values."""
    state = jnp.full(rows, -jnp.inf, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros((*rows, D_V), jnp.float32)
    return tuple(match_varying(x, *operands) for x in state)


def _accumulate(state, scores, product, values, precision):
    """One step of the online softmax: `product` is the einsum of probabilities and values."""
    peak, total, acc = state
    # The maximum cancels out of the result, so it needs no gradient. A row that has seen no key yet keeps -inf,
    # and -inf - -inf is NaN: such a row is shifted by 0.
    new_peak = jnp.maximum(peak, jax.lax.stop_gradient(scores.max(axis=-1)))
    shift = jnp.where(new_peak == -jnp.inf, 0, new_peak)
    p = jnp.exp(scores - shift[..., None])
    rescale = jnp.exp(peak - shift)
    products = jnp.einsum(
        product, p.astype(values.dtype), values, precision=precision, preferred_element_type=jnp.float32
    )
    return new_peak, total * rescale + p.sum(axis=-1), acc * rescale[..., None] + products


def _normalise(state):
    peak, total, acc = state
    empty = total == 0
    divisor = jnp.where(empty, 1, total)
    return acc / divisor[..., None], jnp.where(empty, -jnp.inf, peak + jnp.log(divisor))


def sparse_decode(
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
    """Online softmax over chunks of indices, then over those of the extra cache; differentiable in plain rows.

    An operand that is not used has the shape (0,).
    """
    b, s_q, h_q, _ = q.shape
    sources = (k_cache, indices, topk_length), (extra_k_cache, extra_indices, extra_topk_length)
    state = _before_keys((b, s_q, h_q), q, *sources[0], *sources[1])
    for source in sources[: 1 if extra_k_cache.ndim == 1 else 2]:
        state = _attend_to_indices(state, q, *source, softmax_scale)
    out, lse = _normalise(state)
    if attn_sink.shape[0] != 0:
        out = _with_sink(out, lse, attn_sink)
    return out.astype(q.dtype), lse.swapaxes(1, 2)


def _with_sink(out, lse, attn_sink):
    """out times exp(lse) / (exp(lse) + exp(sink))."""
    lse = jnp.where(lse == -jnp.inf, 0, lse)  # out is 0 there, and -inf - -inf is NaN
    sink = jnp.broadcast_to(attn_sink, lse.shape)
    return out * jax.nn.sigmoid(lse - sink)[..., None]


def _attend_to_indices(state, q, k_cache, indices, topk_length, softmax_scale):
    b, s_q, topk = indices.shape
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    lengths = topk_length if topk_length.shape[0] != 0 else jnp.full(b, topk, jnp.int32)
    steps = -(-topk // CHUNK_INDICES)
    indices = jnp.pad(indices, ((0, 0), (0, 0), (0, steps * CHUNK_INDICES - topk)), constant_values=-1)
    chunks = jnp.moveaxis(indices.reshape(b, s_q, steps, CHUNK_INDICES), 2, 0)
    starts = match_varying(CHUNK_INDICES * jnp.arange(steps, dtype=jnp.int32), lengths)

    def attend(state, slots, start):
        position = start + jnp.arange(CHUNK_INDICES, dtype=jnp.int32)[None, None]
        visible = (slots >= 0) & (slots < num_slots(k_cache)) & (position < lengths[:, None, None])
        keys = read(k_cache, jnp.where(visible, slots, 0)).astype(q.dtype)
        keys = jnp.where(visible[..., None], keys, 0)  # slot 0 may hold NaN, and 0 * NaN is NaN
        scores = jnp.einsum("bshd,bstd->bsht", q, keys, precision=precision, preferred_element_type=jnp.float32)
        scores = jnp.where(visible[:, :, None], scores * jnp.float32(softmax_scale), -jnp.inf)
        return _accumulate(state, scores, "bsht,bstd->bshd", keys[..., :D_V], precision)

    def step(state, chunk):
        slots, start = chunk
        return jax.lax.cond(start < lengths.max(initial=0), attend, lambda state, *_: state, state, slots, start), None

    return jax.lax.scan(step, state, (chunks, starts))[0]


def sparse_prefill(q, pool, indices, topk_length, attn_sink, *, softmax_scale):
    """Sparse decode over chunks of query tokens, with a list per KV head; differentiable in plain rows.

    An operand that is not used has the shape (0,).
    """
    s_q, h_q, d_qk = q.shape
    _, h_kv, topk = indices.shape
    group = h_q // h_kv
    size = CHUNK_LISTS // h_kv
    if isinstance(s_q, int):
        size = min(size, s_q)
    size = max(1, size)
    steps = -(-s_q // size)
    lengths = topk_length if topk_length.shape[0] != 0 else jnp.full(s_q, topk, jnp.int32)
    q = q.reshape(s_q, h_kv, group, d_qk)

    def chunks(x):  # those that fill the last chunk have the length 0
        spare = jnp.zeros((steps * size - s_q, *x.shape[1:]), x.dtype)
        return jnp.concatenate([x, spare]).reshape(steps, size, *x.shape[1:])

    # What the backward pass needs of a chunk it computes again: the keys of all chunks would be too many to keep.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend(q, indices, lengths):
        state = _before_keys((size, h_kv, group), q, pool, indices, lengths)
        state = _attend_to_indices(state, q, pool, indices, lengths, softmax_scale)
        out, lse = _normalise(state)
        if attn_sink.shape[0] != 0:
            out = _with_sink(out, lse, attn_sink.reshape(h_kv, group))
        return out.astype(q.dtype), state[0], lse

    results = jax.lax.map(lambda chunk: attend(*chunk), (chunks(q), chunks(indices), chunks(lengths)))
    return [x.reshape(steps * size, h_q, *x.shape[4:])[:s_q] for x in results]


def schedule(cache_seqlens, *, parts, row_tiles, batch_invariant, lists):
    """n independent plans; see `_plan_balanced` and `_plan_invariant` for one."""
    plan = _plan_invariant if batch_invariant else functools.partial(_plan_balanced, row_tiles=row_tiles, lists=lists)
    metadata, partials = jax.vmap(lambda lengths: plan(_blocks(lengths), parts))(cache_seqlens)
    return metadata, jnp.pad(jnp.cumsum(partials, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def equal_plan(b, length, parts, row_tiles):
    """`schedule` in numpy for b sequences of one length: known while a program is traced."""
    blocks = np.full(b, -(-length // BLOCK), np.int32)
    metadata, partials = _plan_balanced(blocks, parts, row_tiles=row_tiles, lists=False, xp=np)
    return metadata.astype(np.int32), np.pad(partials.cumsum(dtype=np.int32), (1, 0))


def _blocks(lengths):
    lengths = jnp.maximum(lengths, 0)
    return lengths // BLOCK + (lengths % BLOCK != 0).astype(jnp.int32)  # lengths + 63 could overflow


def _plan_balanced(blocks, parts, *, row_tiles, lists, xp=jnp):
    """Cuts the line of all sequences, each `overhead + blocks` long, into `parts` pieces of equal cost.

    Every part finds its own two cuts from the prefix sums, so nothing is sequential. A cut that would leave a piece of
    fewer than MIN_SPLIT_BLOCKS moves to the edge of the sequence. Where whole sequences balance nearly as well, every
    cut does: no partial results. Else, where pieces of one size do, every part is one piece (`_plan_even`).
    """
    b = blocks.shape[0]
    blocks = xp.minimum(blocks, xp.asarray(MAX_TOTAL_BLOCKS, xp.int32) // xp.maximum(b, 1))
    ends = xp.cumsum(blocks + SEQUENCE_OVERHEAD_BLOCKS, dtype=xp.int32)
    total = ends.max(initial=0)
    step = -((total + (parts - 1) * SEQUENCE_OVERHEAD_BLOCKS) // -parts) - SEQUENCE_OVERHEAD_BLOCKS
    step = xp.maximum(step, MIN_SPLIT_BLOCKS)

    p = xp.arange(parts + 1, dtype=xp.int32)
    cut = xp.minimum(p * step + SEQUENCE_OVERHEAD_BLOCKS, total)
    cut = xp.where(p == 0, 0, xp.where(p == parts, total, cut))
    seq = (ends[None] <= cut[:, None]).sum(axis=1, dtype=xp.int32)
    ends, blocks = xp.append(ends, total), xp.append(blocks, 0)  # sequence b: the end of the line
    offset = cut - (ends[seq] - blocks[seq] - SEQUENCE_OVERHEAD_BLOCKS) - SEQUENCE_OVERHEAD_BLOCKS
    block = offset - offset % 2
    at_start = (seq == b) | (offset < MIN_SPLIT_BLOCKS) | (block < MIN_SPLIT_BLOCKS)
    at_end = ~at_start & (blocks[seq] - block < MIN_SPLIT_BLOCKS)
    seq = seq + at_end.astype(xp.int32)
    block = xp.where(at_start | at_end, 0, block)

    # Without splits a sequence belongs to the share that its middle falls into.
    starts = xp.pad(ends[:-1], (1, 0))
    share = xp.minimum(p * -(total // -parts), total)
    whole = (starts[None, :b] + ends[None, :b] <= 2 * share[:, None]).sum(axis=1, dtype=xp.int32)
    whole = xp.where(p == parts, b, whole)
    longest = xp.diff(starts[whole]).max()
    penalty = SPLIT_PENALTY_BLOCKS if row_tiles == 1 else xp.maximum(SPLIT_PENALTY_BLOCKS, step // SPLIT_PENALTY_SHARE)
    limit = step + SEQUENCE_OVERHEAD_BLOCKS + penalty  # what a part of whole sequences may cost
    keep_whole = longest <= limit
    seq, block = xp.where(keep_whole, whole, seq), xp.where(keep_whole, 0, block)

    # Parts that begin inside of a sequence: their steps fall between its first and its last possible cut.
    first = -((starts[:-1] + MIN_SPLIT_BLOCKS) // -step)
    last_cut = xp.maximum((blocks[:-1] - MIN_SPLIT_BLOCKS) | 1, 0)
    cuts = xp.minimum((starts[:-1] + last_cut) // step, parts - 1) - first + 1
    split = xp.where(block > 0, p - xp.append(first, 0)[seq] + 1, 0)
    none = xp.zeros(parts, xp.int32)
    metadata = xp.stack([seq[:-1], block[:-1], seq[1:], block[1:], split[:-1], none, none, none], axis=1)
    partials = xp.where(~keep_whole & (cuts > 0), cuts + 1, 0)
    size, even_metadata, even_partials = _plan_even(blocks[:b], parts, xp)
    # A part of the plan above may be longer than its step by what a piece under the minimum adds.
    even = ~keep_whole & (size <= step + MIN_SPLIT_BLOCKS - 1)
    metadata, partials = xp.where(even, even_metadata, metadata), xp.where(even, even_partials, partials)
    if not (lists and isinstance(b, int) and parts < b <= min(MOST_LISTED * parts, MAX_LISTED)):
        return metadata, partials
    cost, listed_metadata = _plan_lists(blocks[:b], parts)
    listed = ~keep_whole & (cost <= limit)
    return jnp.where(listed, listed_metadata, metadata), jnp.where(listed, 0, partials)


def _plan_lists(blocks, parts):
    """Whole sequences, a few a part, in turns: the longest that are left go to all parts, the longest of them to the
    part with the least so far.

    The cost of the longest part, and rows that list what it has: begin_split -1, and end_seq - begin_seq sequences.
    """
    b = len(blocks)
    order = jnp.argsort(-blocks)
    listed, cost = [], jnp.zeros(parts, jnp.int32)
    for turn in range(MOST_LISTED):
        rank = turn * parts + jnp.argsort(jnp.argsort(cost))
        there = rank < b
        seq = jnp.where(there, order[jnp.minimum(rank, b - 1)], 0)
        cost += jnp.where(there, blocks[seq] + SEQUENCE_OVERHEAD_BLOCKS, 0)
        listed.append((seq, there.astype(jnp.int32)))
    first, *rest = (seq for seq, _ in listed)
    end = first + sum(there for _, there in listed)
    none = jnp.zeros(parts, jnp.int32)
    return cost.max(), jnp.stack([first, none, end, none, none - 1, *rest], axis=1).astype(jnp.int32)


def _plan_even(blocks, parts, xp):
    """Every piece a part of its own, and the pieces of a sequence all of one size, the last one aside.

    What few and similar sequences want: a part that ends one sequence and begins the next would be the slowest. The
    size is the smallest of EVEN_CANDIDATES for which the parts suffice, a huge one where none does.
    """
    b = blocks.shape[0]

    def pieces_of(size, blocks=blocks):  # the last one not under the minimum
        return xp.maximum(-((blocks - (MIN_SPLIT_BLOCKS - 1)) // -size), 1)

    low = xp.maximum(-(blocks.sum(dtype=xp.int32) // -parts), MIN_SPLIT_BLOCKS)
    low = low + low % 2
    sizes = low - 2 * (low // -64) * xp.arange(EVEN_CANDIDATES, dtype=xp.int32)
    enough = pieces_of(sizes[:, None], blocks[None]).sum(axis=1, dtype=xp.int32) <= parts
    first = xp.argmax(enough)
    size = xp.where(enough[first], sizes[first], xp.iinfo(xp.int32).max)

    own = -(blocks // -pieces_of(size))
    own = xp.maximum(own + own % 2, 1)
    splits = pieces_of(own)
    ends = xp.cumsum(splits, dtype=xp.int32)
    part = xp.arange(parts, dtype=xp.int32)
    seq = (ends[None] <= part[:, None]).sum(axis=1, dtype=xp.int32)
    ends, own, splits = xp.append(ends, 0), xp.append(own, 0), xp.append(splits, 0)  # sequence b: unused parts
    used, split = seq < b, part - (ends[seq] - splits[seq])
    last = part + 1 == ends[seq]
    end_seq, end_block = xp.where(last, seq + 1, seq), xp.where(last, 0, (split + 1) * own[seq])
    rows = seq, split * own[seq], end_seq, end_block, split, 0, 0, 0
    unused = b, 0, b, 0, 0, 0, 0, 0
    metadata = xp.stack([xp.where(used, x, y) for x, y in zip(rows, unused, strict=True)], axis=1)
    return size, metadata, xp.where(splits[:b] > 1, splits[:b], 0)


def _plan_invariant(blocks, parts):
    """Gives every sequence its own MAX_INVARIANT_SPLITS parts and cuts it by its own length alone."""
    b = blocks.shape[0]
    split_blocks = jnp.maximum(-(blocks // -MAX_INVARIANT_SPLITS), MIN_INVARIANT_BLOCKS)[:, None]
    splits = jnp.maximum(-(blocks[:, None] // -split_blocks), 1)
    seq = jnp.arange(b, dtype=jnp.int32)[:, None]
    split = jnp.arange(MAX_INVARIANT_SPLITS, dtype=jnp.int32)[None]
    last = split == splits - 1
    next_seq = jnp.where(last, seq + 1, seq)
    zero = jnp.zeros_like(split * seq)
    used = [seq + zero, split * split_blocks, next_seq, jnp.where(last, 0, (split + 1) * split_blocks), split + zero]
    unused = [b + zero, zero, b + zero, zero, zero]
    rows = [jnp.where(split < splits, u, v).reshape(parts) for u, v in zip(used, unused, strict=True)]
    rows += [jnp.zeros(parts, jnp.int32)] * 3
    splits = splits[:, 0]
    return jnp.stack(rows, axis=1), jnp.where(splits > 1, splits, 0)


def append(cache, latent, rope, slots):
    fmt = pool_format(cache)
    return [write(cache, pack(latent, rope, fmt), slots, fmt)]


def gather(cache, block_table, cache_seqlens, *, total):
    page_size = page_size_of(cache.shape, pool_format(cache).token_bytes)
    slots = jax.vmap(lambda table, lengths: gather_slots(table, lengths, page_size, total))(block_table, cache_seqlens)
    exists = (slots >= 0) & (slots < num_slots(cache))
    return [jnp.where(exists[..., None], read(cache, jnp.where(exists, slots, 0)), 0)]
