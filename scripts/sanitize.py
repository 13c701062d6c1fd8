"""A reduced grid for compute-sanitizer: every instantiation of dense and sparse decode and of sparse prefill, split and
unsplit, and the cache operations of every format, small enough for racecheck.

    compute-sanitizer --tool memcheck --error-exitcode 9 python scripts/sanitize.py

XLA should neither preallocate nor use command buffers here, so that the tool sees each buffer and each launch:
XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_FLAGS=--xla_gpu_enable_command_buffer=

With --plant TOOL it also launches a kernel with the mistake that the tool is there to find, in the same process: a
clean report counts only where the planted one is not clean.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata, kvcache, ops, testing
from jax_flashmla.cases import EDGES, LISTED, Case

CASES = (
    Case("edges", EDGES, s_q=2, causal=True),
    Case("split", (1500, 0, 700), h_q=16),
    Case("split_f16", (1500,), h_q=20, s_q=2, causal=True, dtype="float16"),
    Case("two_tiles", (330, 1, 64), h_q=65),
    Case("kv_heads", (140, 65), h_q=6, h_kv=3),
    Case("latent_only", (517, 0, 129), d_qk=512),
    Case("latent_only_f16", (130,), d_qk=512, dtype="float16"),
    Case("page_16", (517, 33), page_size=16),
    Case("page_256", (600, 1), page_size=256),
)


LISTED_CASE = Case("listed", LISTED)


def check(case: Case, batch_invariant: bool) -> bool:
    inputs = testing.make_inputs(case)

    def decode(q: jax.Array, k_cache: jax.Array, table: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = case.s_q * case.h_q // case.h_kv
        plan = get_mla_metadata(lengths, rows, case.h_kv, batch_invariant=batch_invariant)
        if case is LISTED_CASE:  # whose plan for so few parts lists sequences
            metadata, num_splits = ops.schedule(lengths[None], parts=3, row_tiles=1, batch_invariant=False, lists=True)
            plan = metadata[0], num_splits[0]
        return flash_mla_with_kvcache(q, k_cache, table, lengths, 512, *plan, causal=case.causal, implementation="cuda")

    out, lse = map(np.asarray, jax.jit(decode)(*inputs))
    exact, exact_lse = testing.dense_decode_f64(*inputs, causal=case.causal)
    good = testing.cosine_difference(out, exact) <= 5e-6 and testing.max_error(lse, exact_lse) <= 1e-3
    print(f"{case.name}{' batch_invariant' if batch_invariant else ''}: {'ok' if good else 'WRONG'}", flush=True)
    return good


POOLS = (("bf16", 64, False), ("f16", 2, False), ("fp8_v32", 16, False), ("fp8_v4", 69, False), ("fp8_v4", 16, True))


def on_cpu():
    """Where the references run: the tools crash on some of what XLA compiles for the GPU."""
    return jax.default_device(jax.devices("cpu")[0])


def check_cache(format: str, page_size: int, padded: bool) -> bool:
    """Appends to slots that exist and to some that do not, and gathers through tables with pages that do not exist."""
    rng = np.random.default_rng(0)
    cache = np.zeros(kvcache.FORMATS[format].pool_shape(4, page_size, padded=padded), kvcache.FORMATS[format].dtype)
    channels = kvcache.FORMATS[format]["latent"].count
    tokens = 4 * page_size
    slots = np.array([*rng.permutation(tokens), -1, tokens, 2**31 - 1, -(2**31)], np.int32)
    latent, rope = (rng.standard_normal((len(slots), n), np.float32) for n in (channels, 64))
    table = np.array([[2, 0], [4, 3], [-1, 1], [1, 2**31 - 1]], np.int32)
    lengths = np.array([page_size + 1, 2 * page_size, 2**31 - 1, -5], np.int32)

    def run(implementation: str) -> list[np.ndarray]:
        append: Any = functools.partial(kvcache.append_kv_cache, format=format, implementation=implementation)
        gather: Any = functools.partial(kvcache.gather_kv_cache, format=format, implementation=implementation)
        written = append(cache, latent, rope, slots)
        rows = gather(written, table, lengths, total=5 * page_size + 3)
        return [np.asarray(x).view(np.uint8) for x in (written, rows)]

    with on_cpu():
        expected = run("xla")
    good = all(map(np.array_equal, run("cuda"), expected))
    print(f"cache {format}, pages of {page_size}: {'ok' if good else 'WRONG'}", flush=True)
    return good


def check_sparse(format: str, page_size: int, padded: bool, h_q: int, d_qk: int) -> bool:
    """Two pools, invalid entries, lengths, sinks, a row without a key; up to 17 blocks a token, some of them split."""
    rng = np.random.default_rng(0)
    fp8 = format.startswith("fp8")
    head_dim = None if fp8 else d_qk
    rows = rng.standard_normal((4 * page_size, d_qk), np.float32)
    slots = np.arange(4 * page_size, dtype=np.int32)
    append: Any = kvcache.append_kv_cache
    with on_cpu():
        cache: Any = kvcache.init_kv_cache(4, format, page_size=page_size, padded=padded, head_dim=head_dim)
        cache = append(cache, rows[:, :-64], rows[:, -64:], slots, format=format)
    cache = np.asarray(cache)
    q = rng.standard_normal((3, 1, h_q, d_qk)).astype(np.float16 if format == "f16" else jnp.bfloat16)
    indices, extra = (rng.integers(-2, 4 * page_size + 2, (3, 1, n), np.int32) for n in (900, 70))
    lengths = np.array([900, 0, 130], np.int32)
    sink = rng.standard_normal(h_q).astype(np.float32)

    def run(implementation: str) -> list[np.ndarray]:
        decode: Any = flash_mla_with_kvcache
        results = decode(
            q, cache, None, None, 512, is_fp8_kvcache=fp8, indices=indices, topk_length=lengths, attn_sink=sink,
            extra_k_cache=cache, extra_indices_in_kvcache=extra, extra_topk_length=lengths // 13,
            implementation=implementation,
        )  # fmt: skip
        return [np.asarray(x, np.float32) for x in results]

    with on_cpu():
        expected, expected_lse = run("xla")
    out, lse = run("cuda")
    # Both round probabilities and results to 16 bits.
    good = testing.cosine_difference(out, expected) <= 2e-5 and testing.max_error(lse, expected_lse) <= 1e-3
    print(f"sparse {format}, {h_q} heads, pages of {page_size}: {'ok' if good else 'WRONG'}", flush=True)
    return good


def check_prefill(format: str, h_q: int, d_qk: int, h_kv: int) -> bool:
    """Entries that are none, lengths, sinks, a token without a key; lists of up to 15 blocks, some of them split."""
    rng = np.random.default_rng(0)
    tokens = 300
    rows = rng.standard_normal((tokens, h_kv, d_qk), np.float32)
    kv: Any = rows.astype(jnp.bfloat16)
    if format != "rows":
        append: Any = kvcache.append_kv_cache
        with on_cpu():
            pool: Any = kvcache.init_kv_cache(-(-tokens // 7), format, page_size=7)
            slots = np.arange(tokens, dtype=np.int32)
            kv = np.asarray(append(pool, rows[:, 0, :-64], rows[:, 0, -64:], slots, format=format))
    q = rng.standard_normal((5, h_q, d_qk)).astype(jnp.bfloat16)
    indices = rng.integers(-2, tokens + 2, (5, h_kv, 900), np.int32)
    lengths = np.array([900, 0, 130, 2**31 - 1, 64], np.int32)
    sink = rng.standard_normal(h_q).astype(np.float32)

    def run(implementation: str) -> list[np.ndarray]:
        prefill: Any = flash_mla_sparse_fwd
        results = prefill(q, kv, indices, None, attn_sink=sink, topk_length=lengths, implementation=implementation)
        return [np.asarray(x, np.float32) for x in results]

    with on_cpu():
        expected, *logs = run("xla")
    out, *own_logs = run("cuda")
    good = testing.cosine_difference(out, expected) <= 2e-5  # both round probabilities and results to 16 bits
    good &= all(testing.max_error(x, y) <= 1e-3 for x, y in zip(own_logs, logs, strict=True))
    print(f"prefill {format}, {h_q} heads of {h_kv}, d {d_qk}: {'ok' if good else 'WRONG'}", flush=True)
    return good


SPARSE = (
    *(("fp8_v32", 16, False, h_q, 576) for h_q in (16, 70)),
    *(("fp8_v4", page_size, padded, 16, 512) for page_size, padded in ((69, False), (16, True))),
    *((format, 64, False, 20, d_qk) for format in ("bf16", "f16") for d_qk in (576, 512)),
)
PREFILL = (
    ("rows", 70, 576, 1),
    ("rows", 16, 512, 1),
    ("rows", 12, 576, 2),
    ("bf16", 20, 576, 1),
    ("fp8_v32", 70, 576, 1),
)


# One mistake per tool. The parameter is a fresh allocation of 1024 bytes; the kernel runs with 64 threads.
PLANTED = {
    "memcheck": "st.global.u32 [%address + 4096], 1;",
    "initcheck": "ld.global.u32 %value, [%address]; st.global.u32 [%address + 512], %value;",
    "racecheck": "st.shared.u32 [shared], %thread; ld.shared.u32 %value, [shared]; st.global.u32 [%address], %value;",
    "synccheck": "bar.warp.sync 65535;",  # all lanes call it, and the mask names half of them
}
PTX = """
.version 7.8
.target sm_90
.address_size 64
.visible .entry planted(.param .u64 buffer) {{
  .reg .b64 %address; .reg .b32 %thread; .reg .b32 %value; .reg .pred %some;
  .shared .align 4 .b32 shared[32];
  ld.param.u64 %address, [buffer];
  cvta.to.global.u64 %address, %address;
  mov.u32 %thread, %tid.x;
  {mistake}
  ret;
}}
"""


def plant(tool: str) -> None:
    driver = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *args: object) -> None:
        if code := getattr(driver, name)(*args):
            raise RuntimeError(f"{name} returned {code}")

    context, module, function = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    buffer = ctypes.c_uint64()
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    call("cuCtxSetCurrent", context)
    call("cuMemAlloc_v2", ctypes.byref(buffer), ctypes.c_size_t(1024))
    call("cuModuleLoadData", ctypes.byref(module), PTX.format(mistake=PLANTED[tool]).encode())
    call("cuModuleGetFunction", ctypes.byref(function), module, b"planted")
    arguments = (ctypes.c_void_p * 1)(ctypes.cast(ctypes.byref(buffer), ctypes.c_void_p))
    call("cuLaunchKernel", function, 1, 1, 1, 64, 1, 1, 0, None, arguments, None)
    print(f"planted for {tool}: cuCtxSynchronize returned {driver.cuCtxSynchronize()}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plant", choices=PLANTED, metavar="TOOL", help=f"one of {', '.join(PLANTED)}")
    parser.add_argument("--only", choices=("dense", "cache", "sparse", "prefill"), help="one of the four")
    args = parser.parse_args()
    if args.plant:
        jax.block_until_ready(jax.numpy.zeros(1, device=jax.devices("gpu")[0]))
        plant(args.plant)
        return 0
    results = []
    if args.only in (None, "dense"):
        results += [check(case, False) for case in (*CASES, LISTED_CASE)] + [check(case, True) for case in CASES[:3]]
    if args.only in (None, "cache"):
        results += [check_cache(*pool) for pool in POOLS]
    if args.only in (None, "sparse"):
        results += [check_sparse(*pool) for pool in SPARSE]
    if args.only in (None, "prefill"):
        results += [check_prefill(*shape) for shape in PREFILL]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
