"""The split-KV plan: against a second, sequential implementation in Python, and against what a plan must be."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_flashmla import _native, get_mla_metadata, ops
from jax_flashmla.ops.schedule import MAX_CONSTANT_PLAN, constant_plan, num_parts

BLOCK, OVERHEAD, PENALTY, MIN, MAX_INVARIANT, MIN_INVARIANT = 64, 2, 6, 2, 16, 16
PENALTY_SHARE = 24
MOST_LISTED, MAX_LISTED = 4, 1024


def blocks_of(length):
    return -(-max(length, 0) // BLOCK)


def sequential_plan(lengths, parts, lists=True, row_tiles=1):
    """Cut after cut, in unbounded integers."""
    b = len(lengths)
    blocks = [min(blocks_of(n), 2**29 // max(b, 1)) for n in lengths]
    starts, total = [], 0
    for n in blocks:
        starts.append(total)
        total += n + OVERHEAD
    step = max(-(-(total + (parts - 1) * OVERHEAD) // parts) - OVERHEAD, MIN)

    def boundary(x):
        seq = 0
        while seq < b and starts[seq] + blocks[seq] + OVERHEAD <= x:
            seq += 1
        if seq == b:
            return b, 0
        inside = x - starts[seq] - OVERHEAD
        block = inside // 2 * 2
        if inside < MIN or block < MIN:
            return seq, 0
        if blocks[seq] - block < MIN:
            return seq + 1, 0
        return seq, block

    cuts = [0] + [min(p * step + OVERHEAD, total) for p in range(1, parts)] + [total]
    cuts = [boundary(x) for x in cuts]

    # Whole sequences, each to the share that its middle falls into, when the longest part is not much longer then.
    share = -(-total // parts)
    middles = [start + (n + OVERHEAD) / 2 for start, n in zip(starts, blocks, strict=True)]
    owner = [0] + [sum(middle <= min(p * share, total) for middle in middles) for p in range(1, parts)] + [b]
    loads = [sum(n + OVERHEAD for n in blocks[i:j]) for i, j in itertools.pairwise(owner)]
    limit = step + OVERHEAD + (max(PENALTY, step // PENALTY_SHARE) if row_tiles > 1 else PENALTY)
    if max(loads) <= limit:
        cuts = [(seq, 0) for seq in owner]
    elif lists and parts < b <= MAX_LISTED and (listed := sequential_listed_plan(blocks, parts, limit)):
        return listed
    elif even := sequential_even_plan(blocks, parts, step + MIN - 1):
        return even

    metadata, cuts_in = [], [0] * b
    for p in range(parts):
        seq, block = cuts[p]
        if block and p:
            cuts_in[seq] += 1
        metadata.append([seq, block, *cuts[p + 1], cuts_in[seq] if block else 0, 0, 0, 0])
    num_splits = np.cumsum([0] + [n + 1 if n else 0 for n in cuts_in])
    return np.array(metadata), num_splits


def sequential_listed_plan(blocks, parts, limit):
    """In turns: the longest sequence that is left to the part with the least. None when a part costs more than `limit`
    or has more than a row can list."""
    own = [[] for _ in range(parts)]
    order = sorted(range(len(blocks)), key=lambda seq: -blocks[seq])
    for start in range(0, len(order), parts):
        least = sorted(range(parts), key=lambda part: sum(blocks[seq] + OVERHEAD for seq in own[part]))
        for part, seq in zip(least, order[start : start + parts]):
            own[part].append(seq)
    if max(sum(blocks[seq] + OVERHEAD for seq in seqs) for seqs in own) > limit or len(order) > MOST_LISTED * parts:
        return None
    rows = [[seqs[0], 0, seqs[0] + len(seqs), 0, -1, *seqs[1:], *[0] * (MOST_LISTED - len(seqs))] for seqs in own]
    return np.array(rows), np.zeros(len(blocks) + 1, int)


def sequential_even_plan(blocks, parts, limit):
    """Pieces of one size, each a part of its own; None when they would have to be longer than `limit`."""
    low = max(-(-sum(blocks) // parts), MIN)
    low += low % 2
    for size in range(low, low + 32 * 2 * -(-low // 64), 2 * -(-low // 64)):
        counts = [max(-(-(n - MIN + 1) // size), 1) for n in blocks]
        if sum(counts) <= parts:
            break
    else:
        return None
    if size > limit:
        return None
    metadata, partials = [], [0]
    for seq, (n, count) in enumerate(zip(blocks, counts, strict=True)):
        own = max(-(-n // count), 1)
        own += own % 2
        starts = list(range(0, max(n - MIN + 1, 1), own))
        for split, (start, end) in enumerate(itertools.pairwise([*starts, 0])):
            metadata.append([seq, start, seq if end else seq + 1, end, split, 0, 0, 0])
        partials.append(len(starts) if len(starts) > 1 else 0)
    b = len(blocks)
    metadata += [[b, 0, b, 0, 0, 0, 0, 0]] * (parts - len(metadata))
    return np.array(metadata), np.cumsum(partials)


def sequential_invariant_plan(lengths):
    b, metadata, partials = len(lengths), [], [0]
    for seq, length in enumerate(lengths):
        blocks = blocks_of(length)
        size = max(MIN_INVARIANT, -(-blocks // MAX_INVARIANT))
        count = max(1, -(-blocks // size))
        for s in range(MAX_INVARIANT):
            end = (seq, (s + 1) * size) if s < count - 1 else (seq + 1, 0)
            metadata.append([seq, s * size, *end, s, 0, 0, 0] if s < count else [b, 0, b, 0, 0, 0, 0, 0])
        partials.append(count if count > 1 else 0)
    return np.array(metadata), np.cumsum(partials)


def pieces_of(row, lengths):
    """What a part has: sequence, its split, first block, and the block behind the last one."""
    begin_seq, begin_block, end_seq, end_block, split, *listed = row
    if split == -1:
        assert begin_block == end_block == 0
        count = end_seq - begin_seq
        return [(seq, 0, 0, blocks_of(lengths[seq])) for seq in [begin_seq, *listed][:count]]
    assert listed == [0, 0, 0]
    pieces, seq, block = [], begin_seq, begin_block
    while (seq, block) < (end_seq, end_block):
        pieces.append((seq, split, block, end_block if seq == end_seq else max(blocks_of(lengths[seq]), block)))
        seq, block, split = seq + 1, 0, 0
    return pieces


def check_plan(lengths, metadata, num_splits, *, minimum):
    """Every block once, in splits numbered from 0 and long enough, and a slot for every partial result."""
    metadata, num_splits = np.asarray(metadata), np.asarray(num_splits)
    b = len(lengths)
    splits = [[] for _ in range(b)]
    for row in metadata.tolist():
        for seq, *piece in pieces_of(row, lengths):
            splits[seq].append(tuple(piece))
    splits = [sorted(pieces) for pieces in splits]
    for length, pieces, slots in zip(lengths, splits, np.diff(num_splits), strict=True):
        assert [split for split, _, _ in pieces] == list(range(len(pieces)))  # in order, each exactly once
        edges = [0, *(end for _, _, end in pieces)]
        assert [block for _, block, _ in pieces] == edges[:-1] and edges[-1] == blocks_of(length)
        assert slots == (len(pieces) if len(pieces) > 1 else 0)
        if len(pieces) > 1:
            assert min(np.diff(edges)) >= minimum
    parts = len(metadata)
    assert num_splits[0] == 0 and num_splits[-1] <= max(1, parts - 1 + min(b, parts - 1))  # the decode op's workspace


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def jitted(lengths, parts, batch_invariant, lists, row_tiles):
    attributes = {"parts": parts, "row_tiles": row_tiles, "batch_invariant": batch_invariant, "lists": lists}
    metadata, num_splits = ops.schedule(lengths[None], **attributes)
    return metadata[0], num_splits[0]


def plan(lengths, parts, lists=True, row_tiles=1):
    return jitted(jnp.array(lengths, jnp.int32), parts, False, lists, row_tiles)


def invariant_plan(lengths):
    return jitted(jnp.array(lengths, jnp.int32), len(lengths) * MAX_INVARIANT, True, True, 1)


def random_lengths(b, high, seed):
    rng = np.random.default_rng(seed)
    return (rng.integers(0, high, b) * (rng.random(b) < 0.8)).tolist()


def normal_lengths(b):
    return np.random.default_rng(b).normal(4096, 1500, b).clip(1).astype(int).tolist()


BATCHES = {
    "empty": [0],
    "all_empty": [0] * 7,
    "negative": [-5, 300, -(2**31)],
    "one_block": [64],
    "just_unsplit": [64 * 7],
    "just_split": [64 * 8],
    "one_long": [131072],
    "uniform_128": [4096] * 128,
    "long_64": [16384] * 64,
    "skewed": [100000] + [1] * 63,
    "random_512": random_lengths(512, 30000, 0),
    "random_33": random_lengths(33, 3000, 1),
    "random_3": random_lengths(3, 100000, 2),
    "two_a_part": normal_lengths(264),
    "three_a_part": normal_lengths(78),
    "four_a_part": [*range(64, 64 * 104, 64), 0],
    "five_a_part": normal_lengths(120),
}
huge = {
    "int32_max": [2**31 - 1],
    "int32_max_512": [2**31 - 1] * 512,
    "int32_max_and_small": [2**31 - 1, 0, 70, 2**31 - 63, 5000],
}


# Each number of sequences is a program of its own. One part has everything, however many there are; row tiles matter
# where there are several sequences a part, and with one that is long.
PLANNED = [
    (name, parts, row_tiles)
    for name, lengths in BATCHES.items()
    for parts, row_tiles in ((1, 1), (26, 1), (132, 1), (33, 2))
    if (parts > 1 or len(lengths) in (1, 3, 512)) and (row_tiles == 1 or len(lengths) not in (3, 7, 264))
]


@pytest.mark.parametrize("name, parts, row_tiles", PLANNED)
def test_plan(name, parts, row_tiles):
    lengths = BATCHES[name]
    for lists in (False, True) if parts < len(lengths) <= MOST_LISTED * parts else (True,):  # else they are one program
        metadata, num_splits = plan(lengths, parts, lists, row_tiles)
        expected, expected_splits = sequential_plan(lengths, parts, lists, row_tiles)
        np.testing.assert_array_equal(metadata, expected)
        np.testing.assert_array_equal(num_splits, expected_splits)
        check_plan(lengths, metadata, num_splits, minimum=MIN)


def test_several_row_tiles_are_split_later():
    """Parts of one or two whole sequences of 256 blocks, instead of 497 blocks for each."""
    lengths = BATCHES["long_64"]
    assert np.asarray(plan(lengths, 33)[1])[-1] > 0
    metadata, num_splits = map(np.asarray, plan(lengths, 33, row_tiles=4))
    assert num_splits[-1] == 0 and not metadata[:, [1, 3, 4]].any()
    assert set(metadata[:, 2] - metadata[:, 0]) == {1, 2}


@pytest.mark.parametrize("lengths", huge.values(), ids=huge.keys())
def test_huge_lengths_do_not_overflow(lengths):
    """Balance is lost beyond 2**29 blocks in all, coverage never: the last split runs to the true end."""
    metadata, num_splits = plan(lengths, 132)
    expected, expected_splits = sequential_plan(lengths, 132)
    np.testing.assert_array_equal(metadata, expected)
    np.testing.assert_array_equal(num_splits, expected_splits)
    check_plan(lengths, metadata, num_splits, minimum=MIN)


@pytest.mark.parametrize("lengths", (BATCHES | huge).values(), ids=(BATCHES | huge).keys())
def test_invariant_plan(lengths):
    metadata, num_splits = invariant_plan(lengths)
    expected, expected_splits = sequential_invariant_plan(lengths)
    np.testing.assert_array_equal(metadata, expected)
    np.testing.assert_array_equal(num_splits, expected_splits)
    check_plan(lengths, metadata, num_splits, minimum=1)  # the rest of a sequence may be short


# One shape, so one compilation: zeros stand for shorter batches.
drawn_lengths = st.lists(st.one_of(st.just(0), st.integers(0, 600), st.integers(0, 200000)), min_size=24, max_size=24)


@settings(max_examples=60, deadline=None)
@given(drawn_lengths)
def test_drawn_plans(lengths):
    for parts in (13, 132):
        metadata, num_splits = plan(lengths, parts)
        np.testing.assert_array_equal(metadata, sequential_plan(lengths, parts)[0])
        check_plan(lengths, metadata, num_splits, minimum=MIN)
    metadata, num_splits = invariant_plan(lengths)
    np.testing.assert_array_equal(metadata, sequential_invariant_plan(lengths)[0])
    check_plan(lengths, metadata, num_splits, minimum=1)


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
def test_plan_is_balanced(lengths):
    """No part costs more than the even share, a sequence's start, and the pieces too short to be cut off."""
    parts = 132
    metadata = np.asarray(plan(lengths, parts)[0]).tolist()
    cost = [sum(end - begin + OVERHEAD for *_, begin, end in pieces_of(row, lengths)) for row in metadata]
    total = sum(blocks_of(n) + OVERHEAD for n in lengths)
    share = max(-(-(total + (parts - 1) * OVERHEAD) // parts), MIN + OVERHEAD)
    assert max(cost) <= share + OVERHEAD + 2 * MIN


@pytest.mark.parametrize(
    "name, parts", [("two_a_part", 132), ("three_a_part", 26), ("four_a_part", 26), ("five_a_part", 26)]
)
def test_unequal_lengths_are_not_split(name, parts):
    """But where a row cannot list what a part has."""
    metadata, num_splits = map(np.asarray, plan(BATCHES[name], parts))
    assert (num_splits[-1] == 0) == (metadata[:, 4] == -1).all() == (name != "five_a_part")
    assert np.asarray(plan(BATCHES[name], parts, lists=False)[1])[-1] > 0


def test_invariant_plan_ignores_the_rest_of_the_batch():
    lengths = random_lengths(20, 60000, 3)
    metadata, num_splits = map(np.asarray, invariant_plan(lengths))
    for i, length in enumerate(lengths):
        alone, alone_splits = map(np.asarray, invariant_plan([length]))
        used = alone[:, 0] == 0
        rows = metadata[i * MAX_INVARIANT : (i + 1) * MAX_INVARIANT]
        np.testing.assert_array_equal(rows[used], alone[used] + np.array([i, 0, i, 0, 0, 0, 0, 0]))
        assert num_splits[i + 1] - num_splits[i] == alone_splits[1]


@pytest.mark.parametrize(
    "rows, h_kv, expected", [(1, 1, 132), (64, 1, 132), (65, 1, 66), (128, 1, 66), (16, 5, 26), (64 * 256, 1, 1)]
)
def test_num_parts(rows, h_kv, expected, monkeypatch):
    monkeypatch.setattr(_native, "local_cuda_devices", list)
    assert num_parts(1, rows, h_kv) == expected
    assert get_mla_metadata(jnp.array([5], jnp.int32), rows, h_kv)[0].shape == (expected, 8)


def test_num_parts_fills_whole_waves(monkeypatch):
    for sms in (1, 78, 114, 132):
        monkeypatch.setattr(_native, "sm_count", lambda sms=sms: sms)
        for tiles in range(1, 400):
            parts = num_parts(1, 64 * tiles, 1)
            waves = -(-parts * tiles // sms)
            assert 1 <= parts <= sms and parts * tiles >= waves * sms / 1.05


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", (BATCHES | huge).values(), ids=(BATCHES | huge).keys())
def test_kernel_plans_like_the_reference(lengths, device):
    lengths = jnp.array(lengths, jnp.int32)
    plans = itertools.product((1, 26, 132), (1,), (False,), (False, True))
    others = (33, 2, False, True), (len(lengths) * MAX_INVARIANT, 1, True, True)
    for parts, row_tiles, batch_invariant, lists in (*plans, *others):
        attributes = {"parts": parts, "row_tiles": row_tiles, "batch_invariant": batch_invariant, "lists": lists}
        got = ops.schedule(lengths[None], **attributes, implementation="cuda")
        expected = ops.schedule(lengths[None], **attributes, implementation="xla")
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.gpu
def test_kernel_makes_many_plans_at_once(device):
    lengths = jnp.array([random_lengths(40, 20000, seed) for seed in range(300)], jnp.int32)
    attributes = {"parts": 132, "row_tiles": 1, "batch_invariant": False, "lists": True}
    got = ops.schedule(lengths, **attributes, implementation="cuda")
    expected = ops.schedule(lengths, **attributes, implementation="xla")
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.gpu
def test_kernel_makes_large_invariant_plans(device):
    """Nothing limits them but the decode kernel's grid: the planner's shared memory is for the balanced ones."""
    lengths = jnp.arange(4095, dtype=jnp.int32) % 3000
    attributes = {"parts": 4095 * MAX_INVARIANT, "row_tiles": 1, "batch_invariant": True, "lists": True}
    got = ops.schedule(lengths[None], **attributes, implementation="cuda")
    expected = ops.schedule(lengths[None], **attributes, implementation="xla")
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(x, y)


PLANNED_EQUALLY = [(1, 132, 1), (2, 1, 1), (2, 7, 1), (74, 66, 1), (321, 66, 2), (4096, 7, 1), (4096, 132, 1)]


@pytest.mark.parametrize("parts, row_tiles", ((1, 1), (7, 1), (66, 1), (66, 2), (132, 1)))
@pytest.mark.parametrize("b", (1, 2, 74, 321, 4096))
@pytest.mark.parametrize("length", (1, 64, 2048, 16385))
def test_constant_plan(b, length, parts, row_tiles):
    """In numpy what the planner makes of equal lengths; what a kernel needs not be told has no elements."""
    lengths, metadata, num_splits = constant_plan(b, length, parts, row_tiles)
    expected, expected_splits = sequential_plan([length] * b, parts, lists=False, row_tiles=row_tiles)
    np.testing.assert_array_equal(metadata, expected)
    if (b, parts, row_tiles) in PLANNED_EQUALLY:  # some are enough: programs take longer to compile than plans to make
        of_planner, splits = plan([length] * b, parts, lists=False, row_tiles=row_tiles)
        np.testing.assert_array_equal(of_planner, metadata)
        np.testing.assert_array_equal(splits, expected_splits)
    assert lengths.size == 0 and metadata.dtype == num_splits.dtype == lengths.dtype == np.int32
    if num_splits.size or expected_splits.any():
        np.testing.assert_array_equal(num_splits[0], expected_splits)


def test_large_plans_are_no_constants():
    assert constant_plan(MAX_CONSTANT_PLAN, 64, 132, 1) is not None
    assert constant_plan(MAX_CONSTANT_PLAN + 1, 64, 132, 1) is None
    assert constant_plan(0, 64, 132, 1) is None
