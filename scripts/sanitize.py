"""A reduced grid of decodes for compute-sanitizer: every instantiation, split and unsplit, small enough for racecheck.

    compute-sanitizer --tool memcheck --error-exitcode 9 python scripts/sanitize.py

XLA should neither preallocate nor use command buffers here, so that the tool sees each buffer and each launch:
XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_FLAGS=--xla_gpu_enable_command_buffer=

With --plant TOOL it also launches a kernel with the mistake that the tool is there to find, in the same process: a
clean report counts only where the planted one is not clean.
"""

from __future__ import annotations

import argparse
import ctypes
import sys

import jax
import numpy as np

from jax_flashmla import flash_mla_with_kvcache, get_mla_metadata, testing
from jax_flashmla.cases import EDGES, Case

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


def check(case: Case, batch_invariant: bool) -> bool:
    inputs = testing.make_inputs(case)

    def decode(q: jax.Array, k_cache: jax.Array, table: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        plan = get_mla_metadata(lengths, case.s_q * case.h_q // case.h_kv, case.h_kv, batch_invariant=batch_invariant)
        return flash_mla_with_kvcache(q, k_cache, table, lengths, 512, *plan, causal=case.causal, implementation="cuda")

    out, lse = map(np.asarray, jax.jit(decode)(*inputs))
    exact, exact_lse = testing.dense_decode_f64(*inputs, causal=case.causal)
    good = testing.cosine_difference(out, exact) <= 5e-6 and testing.max_error(lse, exact_lse) <= 1e-3
    print(f"{case.name}{' batch_invariant' if batch_invariant else ''}: {'ok' if good else 'WRONG'}", flush=True)
    return good


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
    args = parser.parse_args()
    if args.plant:
        jax.block_until_ready(jax.numpy.zeros(1, device=jax.devices("gpu")[0]))
        plant(args.plant)
        return 0
    results = [check(case, False) for case in CASES] + [check(case, True) for case in CASES[:3]]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
