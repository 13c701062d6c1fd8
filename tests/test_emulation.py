"""The kernels' own source, compiled for the host with an emulated CTA, against float64 and the reference.

No GPU is needed. What this can show and what it cannot is said in tests/emulation/emulation.h; it is no substitute for
the tests marked `gpu`.
"""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_schedule import BATCHES

from jax_flashmla import ops, testing
from jax_flashmla.cases import BY_NAME, EDGES, Case
from jax_flashmla.ops.schedule import MAX_SPLITS, METADATA_WIDTH

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
SOURCES = (
    "kernels/dense_decode_bf16_512.cu",
    "kernels/dense_decode_bf16_576.cu",
    "splitkv/combine.cu",
    "splitkv/schedule.cu",
)
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not CSRC.is_dir(), reason="needs the kernels' source"),
    pytest.mark.xdist_group("emulation"),
]

POINTERS = (
    *("q", "k_cache", "block_table", "cache_seqlens", "metadata", "num_splits"),
    *("out", "lse", "partial_out", "partial_stats"),
)
SIZES = (
    *("b", "s_q", "h_q", "h_kv", "group", "rows", "d_qk"),
    *("num_pages", "page_size", "max_pages", "max_len", "num_parts", "slots"),
)


class DenseDecodeParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int) for name in SIZES),
        ("softmax_scale", ctypes.c_float),
        ("causal", ctypes.c_bool),
        ("dtype", ctypes.c_int),
        ("stream", ctypes.c_void_p),
    )


class ScheduleParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cache_seqlens", "metadata", "num_splits")),
        *((name, ctypes.c_int) for name in ("n", "b", "num_parts")),
        ("batch_invariant", ctypes.c_bool),
        ("stream", ctypes.c_void_p),
    )


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The kernels as a host library. Shared memory has no keyword in C++: its declaration becomes a pointer."""
    build = tmp_path_factory.mktemp("emulation")
    shutil.copytree(CSRC, build / "csrc", ignore=shutil.ignore_patterns("hopper", "ffi", "module.cc"))
    for file in (build / "csrc").rglob("*.cu*"):
        shared = r"auto* \2 = reinterpret_cast<\1*>(emulation::shared_memory);"
        file.write_text(re.sub(r"extern __shared__ (\w+) (\w+)\[\];", shared, file.read_text()))
    flags = ["-std=c++20", "-O2", "-w", "-fPIC", "-pthread", "-include", "emulation.h"]
    flags += ["-I", str(HERE / "emulation"), "-I", str(build / "csrc")]
    sources = [str(HERE / "emulation" / "entry.cc"), "-x", "c++", *(str(build / "csrc" / name) for name in SOURCES)]
    library = build / "emulation.so"
    subprocess.run([COMPILER, *flags, "-shared", "-o", str(library), *sources], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.emulate_dense_decode.restype = loaded.emulate_schedule.restype = ctypes.c_char_p
    loaded.emulate_combine.restype = ctypes.c_char_p
    assert loaded.params_bytes(0) == ctypes.sizeof(DenseDecodeParams)
    assert loaded.params_bytes(1) == ctypes.sizeof(ScheduleParams)
    return loaded


def emulate_schedule(kernels, lengths, parts, batch_invariant=False):
    lengths = np.array(lengths, np.int32)
    metadata = np.full((parts, METADATA_WIDTH), -1, np.int32)
    num_splits = np.full(len(lengths) + 1, -1, np.int32)
    pointers = (x.ctypes.data for x in (lengths, metadata, num_splits))
    params = ScheduleParams(*pointers, 1, len(lengths), parts, batch_invariant, None)
    assert kernels.emulate_schedule(ctypes.byref(params)) is None
    return metadata, num_splits


def emulate_decode(kernels, case, parts, *, batch_invariant=False):
    inputs = [np.ascontiguousarray(x) for x in testing.make_inputs(case)]
    q, k_cache, table, lengths = inputs
    parts = case.b * MAX_SPLITS if batch_invariant else parts
    plan = emulate_schedule(kernels, lengths, parts, batch_invariant)
    group, slots = case.h_q // case.h_kv, max(1, parts - 1 + min(case.b, parts - 1))
    out = np.full((case.b, case.s_q, case.h_q, 512), np.nan, q.dtype)
    lse = np.full((case.b, case.h_q, case.s_q), np.nan, np.float32)
    rows = group * case.s_q
    partial = np.full((slots, case.h_kv, -(-rows // 16) * 16, 512), np.nan, np.float32)
    stats = np.full((slots, case.h_kv, rows, 2), np.nan, np.float32)
    pointers = (x.ctypes.data for x in (q, k_cache, table, lengths, *plan, out, lse, partial, stats))
    sizes = (case.b, case.s_q, case.h_q, case.h_kv, group, rows, case.d_qk, len(k_cache), case.page_size)
    sizes += (table.shape[1], table.shape[1] * case.page_size, parts, slots)
    params = DenseDecodeParams(*pointers, *sizes, case.d_qk**-0.5, case.causal, 0, None)
    assert kernels.emulate_dense_decode(ctypes.byref(params)) is None
    exact, exact_lse = testing.dense_decode_f64(*inputs, causal=case.causal)
    # bfloat16 rounds the result and the probabilities once each; the log-sum-exp stays in float32.
    assert testing.cosine_difference(out, exact) <= 5e-6
    assert testing.max_error(lse, exact_lse) <= 1e-4
    return plan[1][-1]


PLANS = [(name, parts) for name, lengths in BATCHES.items() if 1 <= len(lengths) <= 200 for parts in (7, 132)]


@pytest.mark.parametrize("name, parts", PLANS)
def test_schedule(kernels, name, parts):
    metadata, num_splits = emulate_schedule(kernels, BATCHES[name], parts)
    lengths = jnp.array(BATCHES[name], jnp.int32)
    expected = ops.schedule.reference(lengths[None], parts=parts, batch_invariant=False)
    np.testing.assert_array_equal(metadata, expected[0][0])
    np.testing.assert_array_equal(num_splits, expected[1][0])


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


def to_fragments(out):
    """[..., rows, 512] as in csrc/splitkv/partial.cuh."""
    rows = out.shape[-2]
    padded = np.pad(out, [(0, 0)] * (out.ndim - 2) + [(0, -rows % 16), (0, 0)], constant_values=np.nan)
    parts = padded.reshape(*out.shape[:-2], -1, 2, 8, 64, 4, 2)  # group, row half, lane/4, fragment, lane%4, column
    axes = [*range(out.ndim - 2), *(out.ndim - 2 + np.array([0, 3, 2, 4, 1, 5]))]
    return np.ascontiguousarray(parts.transpose(axes)).reshape(*out.shape[:-2], -1, 512)


@pytest.mark.parametrize("splits", (2, 4, 5, 9, 33, 132))
def test_combine(kernels, splits):
    """Every way to divide the work: two KV heads, rows that fill no group, a sequence that is whole."""
    b, s_q, h_q, h_kv, rows = 3, 2, 20, 2, 20
    rng = np.random.default_rng(splits)
    num_splits = np.array([0, splits, splits, splits + 2], np.int32)
    slots = splits + 2
    partial = rng.standard_normal((slots, h_kv, rows, 512), np.float32)
    m = rng.uniform(-20, 20, (slots, h_kv, rows)).astype(np.float32)
    total = rng.uniform(1, 60, m.shape).astype(np.float32)
    empty = (rng.random(m.shape) < 0.2) | (np.arange(rows) == 7)  # splits in which the row has no key; row 7 has none
    partial[empty], m[empty], total[empty] = 0, -np.inf, 0
    out = np.full((b, s_q, h_q, 512), np.nan, np.dtype(jnp.bfloat16))
    lse = np.full((b, h_q, s_q), np.nan, np.float32)
    fragments, stats = to_fragments(partial), np.stack([m, total], -1)
    pointers = [0, 0, 0, 0, 0, num_splits, out, lse, fragments, stats]
    pointers = [x if isinstance(x, int) else x.ctypes.data for x in pointers]
    sizes = (b, s_q, h_q, h_kv, h_q // h_kv, rows, 576, 1, 64, 1, 64, slots + 1, slots)
    params = DenseDecodeParams(*pointers, *sizes, 1.0, False, 0, None)
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
