"""The kernels' own source, compiled for the host with an emulated CTA, against float64 and the reference.

No GPU is needed. What this can show and what it cannot is said in tests/emulation/emulation.h; it is no substitute for
the tests marked `gpu`.
"""

import ctypes
import functools
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kvcache_cuda import POOLS
from test_schedule import BATCHES, sequential_plan
from test_sparse_reference import FORMATS, make_cache, make_indices, sparse_f64

from jax_flashmla import kvcache, reference, testing
from jax_flashmla.cases import BY_NAME, EDGES, LISTED, Case
from jax_flashmla.ops.schedule import MAX_SPLITS, METADATA_WIDTH

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
SOURCES = (
    "kernels/append.cu",
    "kernels/dense_decode_bf16_512.cu",
    "kernels/dense_decode_bf16_576.cu",
    "kernels/gather.cu",
    "kernels/sparse_decode_bf16.cu",
    "kernels/sparse_decode_fp8_v32.cu",
    "kernels/sparse_decode_fp8_v4.cu",
    "kernels/sparse_prefill.cu",
    "kernels/sparse_prefill_bf16.cu",
    "kernels/sparse_prefill_fp8_v32.cu",
    "splitkv/combine.cu",
    "splitkv/schedule.cu",
)
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not CSRC.is_dir(), reason="needs the kernels' source"),
    pytest.mark.xdist_group("emulation"),
]

POINTERS = ("q", "cache_seqlens", "metadata", "num_splits", "out", "lse", "partial_out", "partial_stats")
SIZES = ("b", "s_q", "h_q", "h_kv", "group", "rows", "d_qk", "max_len", "num_parts", "slots")


class DecodeParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int) for name in SIZES),
        ("softmax_scale", ctypes.c_float),
        ("causal", ctypes.c_bool),
        ("dtype", ctypes.c_int),
        ("stream", ctypes.c_void_p),
    )


class DenseDecodeParams(DecodeParams):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("k_cache", "block_table")),
        *((name, ctypes.c_int) for name in ("num_pages", "page_size", "max_pages")),
    )


class SparseSource(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cache", "indices", "topk_length")),
        *((name, ctypes.c_int) for name in ("topk", "page_size")),
        *((name, ctypes.c_int64) for name in ("slots", "page_bytes")),
    )


class SparseDecodeParams(DecodeParams):
    _fields_ = (
        ("sources", SparseSource * 2),
        ("attn_sink", ctypes.c_void_p),
        ("tokens", ctypes.c_int),
        ("format", ctypes.c_int),
        ("prefetch", ctypes.c_bool),
    )


class SparsePrefillParams(SparseDecodeParams):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("max_logits", "partial_max")),
        ("heads_kv", ctypes.c_int),
    )


class ScheduleParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cache_seqlens", "metadata", "num_splits")),
        *((name, ctypes.c_int) for name in ("n", "b", "num_parts", "row_tiles")),
        *((name, ctypes.c_bool) for name in ("batch_invariant", "lists")),
        ("stream", ctypes.c_void_p),
    )


def compile_object(build, source):
    include = ["-include", "emulation.h", "-I", str(HERE / "emulation"), "-I", str(build / "csrc")]
    flags = ["-std=c++20", "-O2", "-fno-strict-aliasing", "-w", "-fPIC", *include]
    to = build / (source.name + ".o")
    subprocess.run([COMPILER, *flags, "-x", "c++", "-c", "-o", str(to), str(source)], check=True)
    return to


def copy_source(build):
    """Shared memory has no keyword in C++: its declaration becomes a pointer."""
    shutil.copytree(CSRC, build / "csrc", ignore=shutil.ignore_patterns("hopper", "ffi", "module.cc"))
    for file in (build / "csrc").rglob("*.cu*"):
        shared = r"auto* \2 = reinterpret_cast<\1*>(emulation::shared_memory);"
        file.write_text(re.sub(r"extern __shared__ (\w+) (\w+)\[\];", shared, file.read_text()))


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    build = tmp_path_factory.mktemp("emulation")
    copy_source(build)
    sources = [HERE / "emulation" / "entry.cc", *(build / "csrc" / name for name in SOURCES)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(functools.partial(compile_object, build), sources))


@pytest.fixture(scope="module")
def kernels(objects):
    """The kernels as a host library."""
    return load(objects, objects[0].parent / "emulation.so")


def load(objects, library):
    subprocess.run([COMPILER, "-shared", "-o", str(library), *map(str, objects)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.emulate_dense_decode.restype = loaded.emulate_schedule.restype = ctypes.c_char_p
    loaded.emulate_combine.restype = loaded.emulate_sparse_decode.restype = ctypes.c_char_p
    loaded.emulate_combine_meanwhile.restype = ctypes.c_char_p
    assert loaded.params_bytes(0) == ctypes.sizeof(DenseDecodeParams)
    assert loaded.params_bytes(1) == ctypes.sizeof(ScheduleParams)
    assert loaded.params_bytes(2) == ctypes.sizeof(SparseDecodeParams)
    loaded.emulate_append.restype = loaded.emulate_gather.restype = ctypes.c_char_p
    assert loaded.params_bytes(3) == ctypes.sizeof(AppendParams)
    assert loaded.params_bytes(4) == ctypes.sizeof(GatherParams)
    loaded.emulate_sparse_prefill.restype = ctypes.c_char_p
    assert loaded.params_bytes(5) == ctypes.sizeof(SparsePrefillParams)
    return loaded


def emulate_schedule(kernels, lengths, parts, batch_invariant=False, lists=False, row_tiles=1):
    lengths = np.array(lengths, np.int32)
    metadata = np.full((parts, METADATA_WIDTH), -1, np.int32)
    num_splits = np.full(len(lengths) + 1, -1, np.int32)
    pointers = (x.ctypes.data for x in (lengths, metadata, num_splits))
    params = ScheduleParams(*pointers, 1, len(lengths), parts, row_tiles, batch_invariant, lists, None)
    assert kernels.emulate_schedule(ctypes.byref(params)) is None
    return metadata, num_splits


def emulate_decode(kernels, case, parts, *, batch_invariant=False, exponent=0):
    q, k_cache, table, lengths = [np.ascontiguousarray(x) for x in testing.make_inputs(case)]
    q, k_cache = (
        np.ldexp(q, -exponent, dtype=np.float32).astype(q.dtype),
        np.ldexp(k_cache, exponent, dtype=np.float32).astype(q.dtype),
    )
    inputs = q, k_cache, table, lengths
    parts = case.b * MAX_SPLITS if batch_invariant else parts
    plan = emulate_schedule(kernels, lengths, parts, batch_invariant, lists=True)
    group, slots = case.h_q // case.h_kv, max(1, parts - 1 + min(case.b, parts - 1))
    out = np.full((case.b, case.s_q, case.h_q, 512), np.nan, q.dtype)
    lse = np.full((case.b, case.h_q, case.s_q), np.nan, np.float32)
    rows = group * case.s_q
    partial = np.full((slots, case.h_kv, -(-rows // 16) * 16, 512), np.nan, np.float16)
    stats = np.full((slots, case.h_kv, rows, 4), np.nan, np.float32)
    pointers = (x.ctypes.data for x in (q, lengths, *plan, out, lse, partial, stats))
    sizes = (case.b, case.s_q, case.h_q, case.h_kv, group, rows, case.d_qk, table.shape[1] * case.page_size, parts)
    own = (k_cache.ctypes.data, table.ctypes.data, len(k_cache), case.page_size, table.shape[1])
    params = DenseDecodeParams(*pointers, *sizes, slots, case.d_qk**-0.5, case.causal, 0, None, *own)
    assert kernels.emulate_dense_decode(ctypes.byref(params)) is None
    exact, exact_lse = testing.dense_decode_f64(*inputs, causal=case.causal)
    # bfloat16 rounds the result and the probabilities once each; the log-sum-exp stays in float32.
    assert testing.cosine_difference(out, exact) <= 5e-6
    assert testing.max_error(lse, exact_lse) <= 1e-4
    return plan[1][-1]


PLANS = [(name, parts) for name, lengths in BATCHES.items() if 1 <= len(lengths) <= 200 for parts in (7, 132)]


@pytest.mark.parametrize("name, parts", PLANS)
@pytest.mark.parametrize("lists, row_tiles", ((False, 1), (True, 1), (True, 2)))
def test_schedule(kernels, name, parts, lists, row_tiles):
    """Against the plan that the reference is compared with, which has no programs to compile."""
    metadata, num_splits = emulate_schedule(kernels, BATCHES[name], parts, lists=lists, row_tiles=row_tiles)
    expected, expected_splits = sequential_plan(BATCHES[name], parts, lists, row_tiles)
    np.testing.assert_array_equal(metadata, expected)
    np.testing.assert_array_equal(num_splits, expected_splits)


@pytest.mark.parametrize(
    "name",
    (
        "one_token",
        "edges",
        "edges_causal_3",
        "heads_65",
        "heads_16_kv_8",
        "queries_17",
        "latent_only_causal_2",
        "page_16",
        "page_32_kv_2",
        "page_256",
    ),
)
def test_dense_decode(kernels, name):
    emulate_decode(kernels, BY_NAME[name], parts=2)


@pytest.mark.parametrize("h_q, d_qk", ((16, 576), (70, 512)))
@pytest.mark.parametrize("batch_invariant", (False, True))
def test_split(kernels, h_q, d_qk, batch_invariant):
    """Long ones among edges: split, merged, and parts that end one sequence and begin the next."""
    lengths = (1300, 65) if batch_invariant else (1300, *EDGES, 1100)
    case = Case("split", lengths, h_q=h_q, d_qk=d_qk, s_q=2, causal=True)
    assert emulate_decode(kernels, case, parts=9, batch_invariant=batch_invariant) >= 2


def test_listed_sequences(kernels):
    """Whole, in another order than theirs, an empty one among them; parts of three and of two."""
    case = Case("listed", LISTED, h_q=16, s_q=2, causal=True)
    metadata, _ = emulate_schedule(kernels, testing.make_inputs(case)[3], 3, lists=True)
    assert (metadata[:, 4] == -1).all() and sorted(metadata[:, 2] - metadata[:, 0]) == [2, 3, 3]
    assert emulate_decode(kernels, case, parts=3) == 0


@pytest.mark.parametrize(
    "lengths, parts, page_size, h_q, h_kv, d_qk",
    [((900, 400), 5, 64, 65, 1, 576), ((900,), 4, 16, 4, 2, 512), ((700, 1300, 640, 260), 2, 256, 16, 1, 576)],
)
def test_first_operands_are_prefetched(kernels, lengths, parts, page_size, h_q, h_kv, d_qk):
    """Both halves and rope of the first block of every part, once for all row tiles, and the queries of parts that
    begin a sequence: each is then loaded."""
    count = (ctypes.c_int(), ctypes.c_int())
    kernels.take_prefetches(*map(ctypes.byref, count))
    case = Case("prefetched", lengths, h_q=h_q, h_kv=h_kv, d_qk=d_qk, page_size=page_size)
    metadata, _ = emulate_schedule(kernels, testing.make_inputs(case)[3], parts, lists=True)
    emulate_decode(kernels, case, parts)
    kernels.take_prefetches(*map(ctypes.byref, count))
    used = (metadata[:, 0] < case.b).sum()
    keys = used * h_kv * -(-d_qk // 256) * max(64 // page_size, 1)
    queries = (metadata[:used, 1] == 0).sum() * -(-h_q // 64) * 4 if h_kv == 1 else 0
    assert [n.value for n in count] == [keys + queries, 0]


@pytest.mark.parametrize("exponent", (-100, 100))
def test_partial_results_of_any_size(kernels, exponent):
    """They are float16, whose own range ends at 2^16 and, but for few bits, at 2^-14."""
    assert emulate_decode(kernels, Case("any_size", (1300,), h_q=16), parts=9, exponent=exponent) >= 2


def to_fragments(out):
    """[..., rows, 512] as in csrc/splitkv/partial.cuh."""
    rows = out.shape[-2]
    padded = np.pad(out, [(0, 0)] * (out.ndim - 2) + [(0, -rows % 16), (0, 0)], constant_values=np.nan)
    # group, row half, lane/4, fragment, column half, lane%4, column
    parts = padded.reshape(*out.shape[:-2], -1, 2, 8, 32, 2, 4, 2)
    axes = [*range(out.ndim - 2), *(out.ndim - 2 + np.array([0, 3, 2, 5, 4, 1, 6]))]
    return np.ascontiguousarray(parts.transpose(axes)).reshape(*out.shape[:-2], -1, 512)


def test_partial_results_are_marked_as_absent(kernels):
    """One uint4 in every line, and the numbers of every row, before they are written."""
    counts = (ctypes.c_int(), ctypes.c_int(), ctypes.c_int())
    kernels.take_marks(*map(ctypes.byref, counts))
    assert emulate_decode(kernels, Case("marked", (1300, 200, 700), h_q=70), parts=7) >= 2
    kernels.take_marks(*map(ctypes.byref, counts))
    units, marked, unmarked_rows = (count.value for count in counts)
    assert units == 8 * marked > 0 and unmarked_rows == 0


@pytest.mark.parametrize("splits", (2, 4, 5, 9, 33, 132))
@pytest.mark.parametrize("meanwhile", (False, True))
def test_combine(kernels, splits, meanwhile):
    """Every way to divide the work: two KV heads, rows that fill no group, a sequence that is whole. Meanwhile: partial
    results come as combine looks for them, and old ones that are as good as any are where they are to come."""
    b, s_q, h_q, h_kv, rows = 3, 2, 20, 2, 20
    rng = np.random.default_rng(splits)
    num_splits = np.array([0, splits, splits, splits + 2], np.int32)
    slots = splits + 2
    partial = rng.standard_normal((slots, h_kv, rows, 512), np.float32).astype(np.float16)
    m = rng.uniform(-20, 20, (slots, h_kv, rows)).astype(np.float32)
    total = rng.uniform(1, 60, m.shape).astype(np.float32)
    empty = (rng.random(m.shape) < 0.2) | (np.arange(rows) == 7)  # splits in which the row has no key; row 7 has none
    partial[empty], m[empty], total[empty] = 0, -np.inf, 0
    out = np.full((b, s_q, h_q, 512), np.nan, np.dtype(jnp.bfloat16))
    lse = np.full((b, h_q, s_q), np.nan, np.float32)
    scale = np.exp2(rng.integers(-9, 9, (*m.shape, 2))).astype(np.float32)
    fragments, stats = to_fragments(partial), np.concatenate([m[..., None], total[..., None], scale], -1)
    partial = np.repeat(scale, 256, -1) * partial
    left, left_stats = fragments, stats
    if meanwhile:
        left, left_stats = fragments[::-1].copy(), np.full(stats.shape, -1, np.int32)  # -1: kAbsent
        left.view(np.int32).reshape(-1, 32)[:, 28:] = -1
    pointers = (x.ctypes.data for x in (num_splits, out, lse, left, left_stats))
    sizes = (b, s_q, h_q, h_kv, h_q // h_kv, rows, 576, 64, slots + 1, slots)
    params = DecodeParams(0, 0, 0, *pointers, *sizes, 1.0, False, 0, None)
    if meanwhile:
        lines, stats_rows = ctypes.c_int64(fragments.nbytes // 128), ctypes.c_int64(stats.nbytes // 16)
        sources = fragments.ctypes, lines, stats.ctypes, stats_rows
        assert kernels.emulate_combine_meanwhile(ctypes.byref(params), *sources, splits) is None
    else:
        assert kernels.emulate_combine(ctypes.byref(params)) is None
    for seq in range(b):
        own = slice(num_splits[seq], num_splits[seq + 1])
        if own.start == own.stop:
            assert np.isnan(np.float32(out[seq])).all() and np.isnan(lse[seq]).all()  # the decode kernel writes it
            continue
        top = m[own].max(0, keepdims=True)
        weight = np.exp2(
            np.where(np.isneginf(m[own]), -np.inf, m[own] - np.where(np.isneginf(top), 0, top)), dtype=np.float64
        )
        mass = (weight * total[own]).sum(0)  # [h_kv, rows]
        exact = (weight[..., None] * partial[own]).sum(0) / np.where(mass == 0, 1, mass)[..., None]
        exact = exact.reshape(h_kv, s_q, h_q // h_kv, 512).swapaxes(0, 1).reshape(s_q, h_q, 512)
        with np.errstate(divide="ignore"):
            exact_lse = np.log(2) * (top[0] + np.log2(mass))
        exact_lse = exact_lse.reshape(h_kv, s_q, h_q // h_kv).swapaxes(1, 2).reshape(h_q, s_q)
        # bfloat16 rounds once; sums of a few hundred terms in float32 stay far below that.
        np.testing.assert_allclose(np.float32(out[seq]), exact, rtol=2**-8, atol=1e-5)
        np.testing.assert_allclose(lse[seq], exact_lse, rtol=1e-5)


KV_FORMATS = {"fp8_v32": 1, "fp8_v4": 2, "fp8_v4_padded": 2}  # csrc/params.h; the others are plain


def sparse_source(rng, format, b, s_q, topk, lengths, num_pages, page_size):
    """A pool with indices into it: what the kernel takes, what the oracle takes, and the arrays it points to."""
    tokens = num_pages * page_size
    indices, used = make_indices(rng, b, s_q, topk, lengths, tokens)
    cache, keys = make_cache(rng, format, num_pages, page_size, used)
    # Ends at the end of an allocation, on the 256 bytes of a device buffer.
    per_token = None if lengths is None else np.repeat(np.clip(lengths, 0, topk), s_q).astype(np.int32)
    pointers = (cache.ctypes.data, indices.ctypes.data, None if lengths is None else per_token.ctypes.data)
    source = SparseSource(*pointers, topk, page_size, tokens, cache.nbytes // num_pages)
    return source, (keys, indices, lengths), (cache, per_token)


def drop_equal_lengths(params, length, plan, results):
    """What a constant plan hands to the kernel: no lengths, and no num_splits where nothing is split."""
    params.cache_seqlens, params.max_len = None, length
    if plan[1][-1] == 0:
        params.num_splits = None
    for x in results:
        x[...] = np.nan


def emulate_sparse(
    kernels, format, *, h_q=16, b=2, s_q=1, topk=80, parts=2, page_size=7, lengths=None, extra=None, sink=None
):
    """`extra`: topk, lengths and page size of the second source."""
    rng = np.random.default_rng(h_q + topk)
    d_qk, tokens = FORMATS[format][1], b * s_q
    sources = [sparse_source(rng, format, b, s_q, topk, lengths, 9, page_size)]
    if extra:
        sources.append(sparse_source(rng, format, b, s_q, *extra[:2], 5, extra[2]))
    entries = [np.full(b, source.topk) if n is None else np.clip(n, 0, source.topk) for source, (_, _, n), _ in sources]
    seqlens = np.repeat(-(-entries[0] // 64) * 64 + (entries[1] if extra else 0), s_q).astype(np.int32)
    plan = emulate_schedule(kernels, seqlens, parts)
    q = rng.standard_normal((b, s_q, h_q, d_qk), np.float32).astype(jnp.bfloat16)
    slots = max(1, parts - 1 + min(tokens, parts - 1))
    out = np.full((b, s_q, h_q, 512), np.nan, q.dtype)
    lse = np.full((b, h_q, s_q), np.nan, np.float32)
    partial = np.full((slots, 1, -(-h_q // 16) * 16, 512), np.nan, np.float16)
    stats = np.full((slots, 1, h_q, 4), np.nan, np.float32)
    pointers = (x.ctypes.data for x in (q, seqlens, *plan, out, lse, partial, stats))
    sizes = (tokens, 1, h_q, 1, h_q, h_q, d_qk, 2**31 - 65, parts, slots)
    own = (SparseSource * 2)(*(source for source, _, _ in sources)), None if sink is None else sink.ctypes.data
    scale = d_qk**-0.5
    params = SparseDecodeParams(*pointers, *sizes, scale, False, 0, None, *own, s_q, KV_FORMATS.get(format, 0), False)
    assert kernels.emulate_sparse_decode(ctypes.byref(params)) is None
    if lengths is None and (not extra or extra[1] is None):
        with_lengths = out.copy(), lse.copy()
        drop_equal_lengths(params, int(seqlens[0]), plan, (out, lse))
        assert kernels.emulate_sparse_decode(ctypes.byref(params)) is None
        assert all(np.array_equal(x, y) for x, y in zip(with_lengths, (out, lse)))
    exact, exact_lse = sparse_f64(q, [oracle for _, oracle, _ in sources], scale, sink)
    # As for dense decode.
    assert testing.cosine_difference(out, exact) <= 5e-6
    assert testing.max_error(lse, exact_lse) <= 1e-4
    return plan[1][-1]


@pytest.mark.parametrize("format", ("bf16", "bf16_512", "fp8_v32", "fp8_v4", "fp8_v4_padded"))
def test_sparse_decode(kernels, format):
    emulate_sparse(kernels, format, topk=80)
    emulate_sparse(kernels, format, topk=1, page_size=1)


@pytest.mark.parametrize("h_q", (1, 64, 70))
def test_sparse_heads(kernels, h_q):
    emulate_sparse(kernels, "fp8_v32", h_q=h_q, s_q=2, topk=130)


@pytest.mark.parametrize("format", ("bf16", "fp8_v32", "fp8_v4"))
def test_sparse_equal_lists(kernels, format):
    """Whole and split, one list and two: lengths that are all alike need not be handed over."""
    assert emulate_sparse(kernels, format, topk=130, parts=2) == 0
    assert emulate_sparse(kernels, format, b=3, topk=1500, extra=(100, None, 3), parts=9) >= 2


@pytest.mark.parametrize("format", ("bf16", "fp8_v32", "fp8_v4"))
def test_sparse_sources(kernels, format):
    """Two lists of other lengths and page sizes, empty ones among them, sinks, split and merged."""
    sink = np.linspace(-3, 3, 16).astype(np.float32)
    sink[[0, 1]] = -np.inf, np.inf
    lengths, others = np.array([0, 1500, 0, -3], np.int32), np.array([65, 9, 0, 2**31 - 1], np.int32)
    splits = emulate_sparse(
        kernels, format, b=4, s_q=2, topk=1500, lengths=lengths, extra=(100, others, 3), sink=sink, parts=9
    )
    assert splits >= 2


@pytest.mark.parametrize("format", ("bf16", "bf16_512", "fp8_v32"))
@pytest.mark.parametrize("heads_kv, group, topk, parts", [(1, 16, 80, 1), (1, 70, 200, 3), (2, 5, 1500, 5)])
@pytest.mark.parametrize("ragged", (True, False))
def test_sparse_prefill(kernels, format, heads_kv, group, topk, parts, ragged):
    """A list and sinks for each KV head, lengths, entries that are none, split and whole."""
    rng = np.random.default_rng(topk)
    tokens, d_qk = 3 * heads_kv, FORMATS[format][1]
    lengths = np.resize([topk, 0, topk // 2, 2**31 - 1] if ragged else [topk], tokens).astype(np.int32)
    source, (keys, indices, _), _owner = sparse_source(rng, format, tokens, 1, topk, lengths, 9, 7)
    seqlens = np.clip(lengths, 0, topk)
    plan = emulate_schedule(kernels, seqlens, parts)
    q = rng.standard_normal((tokens, 1, group, d_qk), np.float32).astype(jnp.bfloat16)
    sink = rng.standard_normal(heads_kv * group).astype(np.float32)
    sink[[0, -1]] = -np.inf, np.inf
    slots = max(1, parts - 1 + min(tokens, parts - 1))
    out = np.full((tokens, 1, group, 512), np.nan, q.dtype)
    lse, max_logits = (np.full((tokens, group), np.nan, np.float32) for _ in range(2))
    partial = np.full((slots, 1, -(-group // 16) * 16, 512), np.nan, np.float16)
    stats, partial_max = np.full((slots, 1, group, 4), np.nan, np.float32), np.full((slots, group), np.nan, np.float32)
    pointers = (x.ctypes.data for x in (q, seqlens, *plan, out, lse, partial, stats))
    sizes = (tokens, 1, group, 1, group, group, d_qk, 2**31 - 65, parts, slots)
    scale = d_qk**-0.5
    own = ((SparseSource * 2)(source), sink.ctypes.data, 1, KV_FORMATS.get(format, 0), False)
    largest = max_logits.ctypes.data, partial_max.ctypes.data, heads_kv
    params = SparsePrefillParams(*pointers, *sizes, scale, False, 0, None, *own, *largest)
    assert kernels.emulate_sparse_prefill(ctypes.byref(params)) is None
    if not ragged:
        with_lengths = out.copy(), lse.copy(), max_logits.copy()
        drop_equal_lengths(params, topk, plan, (out, lse, max_logits))
        assert kernels.emulate_sparse_prefill(ctypes.byref(params)) is None
        assert all(np.array_equal(x, y) for x, y in zip(with_lengths, (out, lse, max_logits)))
    for head in range(heads_kv):  # heads of other tokens
        at = slice(head, None, heads_kv)
        sources = [(keys, indices[at], lengths[at])]
        exact, exact_lse = sparse_f64(q[at], sources, scale, sink[head * group : (head + 1) * group])
        assert testing.cosine_difference(out[at], exact) <= 5e-6  # as for dense decode
        assert testing.max_error(lse[at], exact_lse[..., 0]) <= 1e-4
    for token in range(tokens):
        seen = indices[token, 0, : seqlens[token]]
        seen = seen[(seen >= 0) & (seen < len(keys))]
        scores = q[token, 0].astype(np.float64) @ keys[seen].astype(np.float64).T * scale
        assert testing.max_error(max_logits[token], scores.max(axis=-1, initial=-np.inf)) <= 1e-4
    assert (plan[1][-1] > 0) == (topk > 200)  # else whole


class KVPool(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("page_bytes", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("num_pages", "page_size", "latent", "format", "dtype")),
    )


class AppendParams(ctypes.Structure):
    _fields_ = (
        ("pool", KVPool),
        *((name, ctypes.c_void_p) for name in ("latent", "rope", "slots")),
        *((name, ctypes.c_int) for name in ("tokens", "dtype")),
        ("stream", ctypes.c_void_p),
    )


class GatherParams(ctypes.Structure):
    _fields_ = (
        ("pool", KVPool),
        *((name, ctypes.c_void_p) for name in ("block_table", "cache_seqlens", "out")),
        *((name, ctypes.c_int) for name in ("n", "b", "max_pages", "total")),
        ("stream", ctypes.c_void_p),
    )


DTYPES = {"bfloat16": 0, "float16": 1, "float32": 2}  # csrc/params.h


def describe(cache, name):
    fmt = kvcache.layout(*POOLS[name][:2])
    page_size = kvcache.formats.page_size_of(cache.shape, fmt.token_bytes)
    own = fmt["latent"].count, KV_FORMATS.get(name, 0), DTYPES.get(str(cache.dtype), 0)
    return fmt, page_size, KVPool(cache.ctypes.data, cache.nbytes // len(cache), len(cache), page_size, *own)


def random_pool(rng, name, num_pages, page_size):
    """Finite numbers where rows are plain, for jnp may quieten a NaN; bytes of every kind else."""
    fmt = kvcache.layout(*POOLS[name][:2])
    shape = fmt.pool_shape(num_pages, page_size, padded=POOLS[name][2])
    if fmt.is_fp8:
        return rng.integers(0, 256, shape, np.uint8)
    return rng.standard_normal(shape, np.float32).astype(fmt.dtype)


def special_rows(channels, dtype):
    """Tiles of zeros, at the steps of the scale, subnormal, huge and infinite; the sign alternates."""
    limits = jnp.finfo(dtype)
    values = [0, 336, 448, 448.5, 464, 480, 224, 2**-9, float(limits.smallest_subnormal), float(limits.tiny)]
    values += [float(limits.max), float(limits.max) / 2, 448 * 2**-13, 449 * 2**-13, 1e-6]
    rows = np.array(values)[:, None] * np.where(np.arange(channels) % 2, 1, -1)
    mixed = np.resize([1, 1.0625, -1.1875, 2**-7, 3 * 2**-8, 2**-10, -(2**-10), 3 * 2**-11, 448, 0.0], (3, channels))
    mixed[1, ::7], mixed[1, 1::70], mixed[1, 2::90] = np.nan, np.inf, -np.inf
    mixed[2] = np.nan
    return np.concatenate([rows, mixed]).astype(dtype)


def append_and_compare(kernels, name, page_size, dtype, latent, rope, slots, cache):
    """Through the kernel and through jnp: the same bytes everywhere."""
    fmt, _, pool = describe(cache, name)
    expected = np.asarray(jax.jit(reference.append)(cache, latent, rope, slots)[0])
    pointers = (x.ctypes.data for x in (latent, rope, slots))
    params = AppendParams(pool, *pointers, len(slots), DTYPES[dtype], None)
    before = cache.copy()
    assert kernels.emulate_append(ctypes.byref(params)) is None
    assert len(slots) == 0 or (cache.view(np.uint8) != before.view(np.uint8)).any()
    if fmt.is_fp8 or dtype == str(cache.dtype):
        np.testing.assert_array_equal(cache.view(np.uint8), expected.view(np.uint8))
    else:
        np.testing.assert_array_equal(cache.astype(np.float32), expected.astype(np.float32))  # NaNs may differ in bits


@pytest.mark.parametrize("page_size", (2, 16, 64, 69))
@pytest.mark.parametrize("name", POOLS)
def test_append(kernels, name, page_size):
    """Random rows, and slots that do not exist: of the pool only the bytes of the tokens change."""
    rng = np.random.default_rng(page_size)
    num_pages = max(3, 30 // page_size)
    tokens = num_pages * page_size
    cache = random_pool(rng, name, num_pages, page_size)
    nowhere = [-1, -2, -page_size, -(2**31), tokens, tokens + 1, 2**31 - 1]
    exist = np.concatenate([[0, tokens - 1], 1 + rng.permutation(tokens - 2)[:10]])
    slots = rng.permutation(np.concatenate([exist, nowhere])).astype(np.int32)
    channels = describe(cache, name)[0]["latent"].count
    size = np.exp2(rng.uniform(-20, 12, (len(slots), channels // 64))).repeat(64, -1)
    latent = (rng.standard_normal((len(slots), channels)) * size).astype(jnp.bfloat16)
    rope = rng.standard_normal((len(slots), 64)).astype(jnp.bfloat16)
    append_and_compare(kernels, name, page_size, "bfloat16", latent, rope, slots, cache)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ("bf16", "f16", "fp8_v32", "fp8_v4"))
def test_append_of_special_rows(kernels, name, dtype):
    rng = np.random.default_rng(0)
    cache = random_pool(rng, name, 3, 16)
    latent = special_rows(describe(cache, name)[0]["latent"].count, dtype)
    if not describe(cache, name)[0].is_fp8 and dtype == "float32":
        latent[np.abs(latent) < jnp.finfo(cache.dtype).tiny] = 0  # jnp on the CPU takes subnormal numbers for 0
    rope = rng.standard_normal((len(latent), 64)).astype(dtype)
    slots = rng.permutation(48)[: len(latent)].astype(np.int32)
    append_and_compare(kernels, name, 16, dtype, latent, rope, slots, cache)


def emulate_gather(kernels, name, cache, table, lengths, total):
    fmt, _, pool = describe(cache, name)
    dtype = jnp.bfloat16 if fmt.is_fp8 else cache.dtype
    out = np.full((len(table), total, fmt.head_dim), np.nan, dtype)
    pointers = (x.ctypes.data for x in (table, lengths, out))
    params = GatherParams(pool, *pointers, *table.shape, total, None)
    assert kernels.emulate_gather(ctypes.byref(params)) is None
    return out


def reference_gather(cache, table, lengths, total):
    return np.asarray(jax.jit(functools.partial(reference.gather, total=total))(cache, table, lengths)[0])


@pytest.mark.parametrize(
    "name, page_size",
    [
        *((name, page_size) for name in ("bf16", "fp8_v32", "fp8_v4") for page_size in (2, 16, 64, 69)),
        *((name, 16) for name in ("bf16_512", "f16", "fp8_v4_padded")),
    ],
)
def test_gather(kernels, name, page_size):
    """Two batches; lengths and pages that are none, no room for the last sequences of one, zeros behind the other's."""
    rng = np.random.default_rng(page_size)
    cache = random_pool(rng, name, 5, page_size)
    if describe(cache, name)[0].is_fp8:  # numbers that no computation takes for 0, and codes of NaN
        rows = rng.standard_normal((5 * page_size, describe(cache, name)[0].head_dim), np.float32)
        slots = jnp.arange(5 * page_size, dtype=jnp.int32)
        (cache,) = jax.jit(reference.append)(cache, rows[:, :-64], rows[:, -64:], slots)
        cache = np.array(cache)
        cache.reshape(5, -1)[:, [3, 70]] = 0x7F, 0xFF
    table = np.array([[[0, 3], [2**31 - 1, 1], [-1, 5], [2, 4]], [[1, 0], [4, 2], [3, 3], [0, 1]]], np.int32)
    lengths = np.array([[page_size + 1, page_size // 8 + 2, 3, 2**31 - 1], [1, 0, -5, page_size]], np.int32)
    total = page_size + page_size // 8 + 12
    out = emulate_gather(kernels, name, cache, table, lengths, total)
    expected = reference_gather(cache, table, lengths, total)
    assert out.dtype == expected.dtype
    nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(out.astype(np.float32)), nan)
    np.testing.assert_array_equal(out.view(np.uint16)[~nan], expected.view(np.uint16)[~nan])


def test_gather_of_many_sequences(kernels):
    """More sequences than a CTA sums up at once, most of them empty, and a sum of lengths beyond 2**31."""
    rng = np.random.default_rng(0)
    cache = random_pool(rng, "bf16", 7, 2)
    lengths = (rng.integers(0, 3, 600) * (rng.random(600) < 0.2)).astype(np.int32)[None]
    lengths[0, 590:] = 2**31 - 1
    table = rng.integers(-1, 8, (1, 600, 2), np.int32)
    for total in (1, int(lengths[0, :590].sum()) + 30):
        out = emulate_gather(kernels, "bf16", cache, table, lengths, total)
        expected = reference_gather(cache, table, lengths, total)
        np.testing.assert_array_equal(out.view(np.uint16), expected.view(np.uint16))


def test_append_then_gather(kernels):
    """Rows of a plain pool come back bit for bit; wide chunks of rows, a CTA each."""
    rng = np.random.default_rng(0)
    cache = random_pool(rng, "bf16", 2, 64)
    rows = rng.integers(0, 2**16, (100, 576), np.uint16)
    latent, rope = np.ascontiguousarray(rows[:, :512]), np.ascontiguousarray(rows[:, 512:])
    slots = np.arange(100, dtype=np.int32)
    _, _, pool = describe(cache, "bf16")
    params = AppendParams(pool, latent.ctypes.data, rope.ctypes.data, slots.ctypes.data, 100, 0, None)
    assert kernels.emulate_append(ctypes.byref(params)) is None
    out = emulate_gather(kernels, "bf16", cache, np.array([[[0, 1]]], np.int32), np.array([[100]], np.int32), 100)
    np.testing.assert_array_equal(out.view(np.uint16)[0], rows)


# Waits without which keys or scores are used while they are still on their way, or slots refilled while they are read.
MISTAKES = {
    "slot refilled under a product": (
        "wgmma_wait<1>();\n        arrive(smem.k_empty[0][1]);",
        "arrive(smem.k_empty[0][1]);",
    ),
    "scores read too early": ("wgmma_wait<0>();\n        take_scores();", "take_scores();"),
    "rope not waited for": (
        "barrier_wait(smem.k_full[kWg][waited], phase);",
        "if (t < 8) barrier_wait(smem.k_full[kWg][waited], phase);",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_shows_missing_waits(objects, tmp_path, mistake):
    right, wrong = MISTAKES[mistake]
    copy_source(tmp_path)
    folder = tmp_path / "csrc" / "kernels"
    text = (folder / "seesaw.cuh").read_text()
    assert text.count(right) == 1
    (folder / "seesaw.cuh").write_text(text.replace(right, wrong))
    changed = compile_object(tmp_path, folder / "dense_decode_bf16_576.cu")
    others = [x for x in objects if x.name != changed.name]
    assert len(others) == len(objects) - 1
    kernels = load([changed, *others], tmp_path / "mistaken.so")
    with pytest.raises(AssertionError):
        for _ in range(3):  # what comes when is drawn
            emulate_decode(kernels, BY_NAME["heads_65"], parts=2)
