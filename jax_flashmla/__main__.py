"""python -m jax_flashmla: decodes an irregular paged batch on this machine, checks it against float64, and times it."""

from __future__ import annotations

import argparse
import ctypes
import importlib.machinery
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import __version__, checks, flash_mla_with_kvcache, get_mla_metadata, testing
from .cases import Case

COSINE_TOLERANCE = 5e-6  # 1 - cosine similarity of bf16 or fp16 results with float64
LSE_TOLERANCE = 1e-4  # of float32 sums over thousands of keys
CHECKED_KEYS = 64 * 1024  # float64 on the CPU: check as many sequences as fit, and at least four
CHAIN = 16  # calls in one jit on a GPU, where launching a single one would be timed with it


def leave_source_tree(module: str = "jax_flashmla") -> None:
    """Runs the installed package instead of a source tree in the current directory, which has no compiled extension."""
    root = Path(__file__).resolve().parent.parent
    if sys.flags.safe_path or not (root / "pyproject.toml").exists():
        return
    elsewhere = [path for path in sys.path if path and Path(path).resolve() != root]
    if importlib.machinery.PathFinder.find_spec("jax_flashmla", elsewhere):
        os.execv(sys.executable, [sys.executable, "-P", "-m", module, *sys.argv[1:]])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jax_flashmla", description=__doc__)
    parser.add_argument("--b", type=int, help="sequences in the batch; one of them is empty (GPU 128, CPU 6)")
    parser.add_argument("--s-k", type=int, help="mean number of keys per sequence (GPU 4096, CPU 300)")
    parser.add_argument("--h-q", type=int, help="query heads (GPU 128, CPU 16)")
    parser.add_argument("--h-kv", type=int, default=1, help="KV heads")
    parser.add_argument("--s-q", type=int, nargs="+", default=[1, 2], help="query tokens per sequence, one run each")
    parser.add_argument("--d-qk", type=int, default=576, choices=(576, 512))
    parser.add_argument("--page-size", type=int, default=64, choices=checks.PAGE_SIZES)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--implementation", choices=("cuda", "xla"), help="insist on one path")
    parser.add_argument("--tolerance", type=float, default=COSINE_TOLERANCE, help="largest cosine difference to pass")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(argv)
    on_gpu = jax.default_backend() == "gpu"
    for name, (gpu, cpu) in {"b": (128, 6), "s_k": (4096, 300), "h_q": (128, 16)}.items():
        if getattr(args, name) is None:
            setattr(args, name, gpu if on_gpu else cpu)
    for name in ("b", "s_k", "h_q", "h_kv"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if min(args.s_q) < 1:
        parser.error(f"--s-q must be at least 1, got {min(args.s_q)}")
    if args.seed < 0:
        parser.error(f"--seed must be at least 0, got {args.seed}")
    if args.implementation == "cuda" and not on_gpu:
        parser.error(f"--implementation cuda needs a Hopper GPU, and JAX runs on {jax.default_backend()}")
    if args.h_q % args.h_kv:
        parser.error(f"--h-q must be a multiple of --h-kv, got {args.h_q} and {args.h_kv}")
    return args


def driver_version() -> str | None:
    """Release of the NVIDIA driver and the newest CUDA it serves, such as "580.65.06 (CUDA 13.0)"."""
    try:
        number = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    newest = f"CUDA {number.value // 1000}.{number.value % 1000 // 10}"
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return newest
    release = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return f"{release.group(0)} ({newest})" if release else newest


def machine() -> dict[str, Any]:
    device = jax.devices()[0]
    on_gpu = device.platform in ("gpu", "cuda")
    runtime = re.search(r"cuda (\d+)", device.client.platform_version) if on_gpu else None
    number = int(runtime.group(1)) if runtime else 0
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "jax_flashmla": __version__,
        "cuda_runtime": f"{number // 1000}.{number % 1000 // 10}" if number else None,
        "cuda_driver": driver_version() if on_gpu else None,
    }


def irregular(args: argparse.Namespace, s_q: int) -> Case:
    """Lengths from 1 to twice the mean, and one empty sequence unless it is alone."""
    lengths = np.random.default_rng(args.seed).integers(1, 2 * args.s_k, args.b)
    if args.b > 1:
        lengths[args.b // 2] = 0
    return Case(
        name="main",
        seqlens=tuple(map(int, lengths)),
        s_q=s_q,
        h_q=args.h_q,
        h_kv=args.h_kv,
        d_qk=args.d_qk,
        page_size=args.page_size,
        causal=True,
        dtype=args.dtype,
    )


def checked_sequences(lengths: np.ndarray) -> np.ndarray:
    """The empty sequence, the longest, and others in order while float64 on the CPU stays affordable."""
    order = list(dict.fromkeys([int(lengths.argmin()), int(lengths.argmax()), *range(len(lengths))]))
    affordable = int((np.cumsum(lengths[order]) <= CHECKED_KEYS).sum())
    return np.array(sorted(order[: max(4, affordable)]))


def median_seconds(run: Callable[[], Any], repetitions: int = 7) -> float:
    for _ in range(2):
        jax.block_until_ready(run())
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def run(args: argparse.Namespace, s_q: int) -> dict[str, Any]:
    case = irregular(args, s_q)
    inputs = testing.make_inputs(case, args.seed)
    operands = [jnp.asarray(array) for array in inputs]

    def decode(q: jax.Array, k_cache: jax.Array, table: jax.Array, lengths: jax.Array, calls: int) -> Any:
        plan = get_mla_metadata(lengths, s_q * args.h_q // args.h_kv, args.h_kv)
        for _ in range(calls):
            out, lse = flash_mla_with_kvcache(
                q, k_cache, table, lengths, 512, *plan, causal=case.causal, implementation=args.implementation
            )
            # The next call waits for this one, and XLA cannot merge the two: their lengths differ, as far as it knows.
            lengths = lengths + jnp.isnan(lse[:, 0, 0])
        return out, lse

    calls = CHAIN if jax.default_backend() == "gpu" else 1
    lowered = jax.jit(decode, static_argnums=4).lower(*operands, 1)
    path = "CUDA kernel" if "jax_flashmla.dense_decode" in lowered.as_text() else "XLA reference"
    out, lse = map(np.asarray, lowered.compile()(*operands))
    chained = jax.jit(decode, static_argnums=4).lower(*operands, calls).compile()
    seconds = median_seconds(lambda: chained(*operands)) / calls

    chosen = checked_sequences(inputs.cache_seqlens)
    exact_out, exact_lse = testing.dense_decode_f64(
        inputs.q[chosen], inputs.k_cache, inputs.block_table[chosen], inputs.cache_seqlens[chosen], causal=case.causal
    )
    out, lse = out[chosen], lse[chosen]
    cosine = testing.cosine_difference(out, exact_out)
    worst = testing.max_error(out, exact_out)  # infinite where a NaN or an infinity is out of place
    with np.errstate(invalid="ignore"):
        same = np.isneginf(exact_lse) & np.isneginf(lse)
        lse_error = float(np.where(same, 0, np.abs(lse - exact_lse) / np.maximum(1, np.abs(exact_lse))).max())
    rows = s_q * args.h_q * args.b
    moved = case.kv_bytes + 2 * rows * (args.d_qk + 512) + 4 * rows
    return {
        "s_q": s_q,
        "b": args.b,
        "h_q": args.h_q,
        "h_kv": args.h_kv,
        "d_qk": args.d_qk,
        "page_size": args.page_size,
        "dtype": args.dtype,
        "keys": sum(case.seqlens),
        "shortest": min(case.seqlens),
        "longest": max(case.seqlens),
        "path": path,
        "checked_sequences": len(chosen),
        "cosine_difference": cosine,
        "max_abs_error": worst,
        "lse_error": lse_error,
        "passed": bool(cosine <= args.tolerance and np.isfinite(worst) and lse_error <= LSE_TOLERANCE),
        "microseconds": seconds * 1e6,
        "tflops": case.flops / seconds / 1e12,
        "gbps": moved / seconds / 1e9,
    }


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    facts = machine()
    if not args.json:
        print(f"{facts['device']} · jax {facts['jax']} on {facts['platform']} · jax_flashmla {facts['jax_flashmla']}")
        if facts["platform"] != "cpu":
            print(f"CUDA runtime {facts['cuda_runtime']} · driver {facts['cuda_driver']}")
    results = []
    for s_q in args.s_q:
        result = run(args, s_q)
        results.append(result)
        if not args.json:
            print(
                f"b {args.b} · s_q {s_q} causal · h_q {args.h_q} · h_kv {args.h_kv} · d_qk {args.d_qk} · "
                f"{args.dtype} · {result['keys']} keys ({result['shortest']} to {result['longest']} a sequence)\n"
                f"  shuffled pages of {args.page_size} tokens, NaN in unused slots\n"
                f"  path {result['path']}: {result['microseconds']:.1f} µs, {result['tflops']:.3g} TFLOPS, "
                f"{result['gbps']:.4g} GB/s\n"
                f"  against float64 ({result['checked_sequences']} sequences): cosine difference "
                f"{result['cosine_difference']:.1e}, largest error {result['max_abs_error']:.1e}, "
                f"lse {result['lse_error']:.1e}: {'passed' if result['passed'] else 'FAILED'}"
            )
    passed = all(result["passed"] for result in results)
    if args.json:
        print(json.dumps({**facts, "runs": results, "passed": passed}))
    return 0 if passed else 1


if __name__ == "__main__":
    leave_source_tree()
    sys.exit(main())
