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
