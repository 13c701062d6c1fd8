"""Times dense decode beside its peers, in turns on one GPU: jax_flashmla, FlashMLA (where torch and sgl-flash-mla are
importable), and the XLA reference. Prints a table; --json adds one JSON line per row.

Every contender runs a chain of calls back to back and is timed by the difference of a long and a short chain, so that
launching the chain does not count. The plan is made once outside the chain, and the split-KV merge is inside. Turns
rotate, because who goes first after a pause finds a cool card; medians are shown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# XLA captures the chain into a CUDA graph, as the peer's is; SERIALIZE keeps its calls one after the other.
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_command_buffer_scheduling_mode=SERIALIZE")

import jax
import jax.numpy as jnp

from jax_flashmla import flash_mla_with_kvcache, get_mla_metadata

D_QK, D_V, PAGE = 576, 512, 64
SHORT, LONG, TURNS = 8, 32, 6  # XLA captures chains of five calls and more


class Shape(NamedTuple):
    b: int
    s_q: int
    h_q: int
    s_k: int
    causal: bool = False

    @property
    def flops(self) -> float:
        return 2.0 * self.b * self.s_q * self.h_q * self.s_k * (D_QK + D_V)

    @property
    def bytes(self) -> float:
        return 2.0 * self.b * (self.s_k * D_QK + self.s_q * self.h_q * (D_QK + D_V))


SHAPES = (
    Shape(128, 1, 16, 4096),
    Shape(128, 1, 64, 4096),
    Shape(128, 1, 128, 4096),
    Shape(128, 1, 128, 16384),
    Shape(128, 2, 128, 4096, True),
    Shape(1, 1, 16, 4096),
    Shape(1, 1, 128, 4096),
    Shape(1, 1, 128, 65536),
    Shape(16, 1, 128, 4096),
)

Timer = Callable[[], float]  # seconds of one call


def ours(shape: Shape, implementation: str) -> Timer:
    pages = shape.s_k // PAGE
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (shape.b, shape.s_q, shape.h_q, D_QK), jnp.bfloat16)
    cache = jax.random.normal(keys[1], (shape.b * pages, PAGE, 1, D_QK), jnp.bfloat16)
    table = jax.random.permutation(keys[2], shape.b * pages).astype(jnp.int32).reshape(shape.b, pages)
    lengths = jnp.full(shape.b, shape.s_k, jnp.int32)
    plan = get_mla_metadata(lengths, shape.s_q * shape.h_q, 1)

    def chain(calls: int) -> Any:
        def run(q: jax.Array, cache: jax.Array, table: jax.Array, lengths: jax.Array, plan: Any) -> Any:
            def decode(i: int) -> jax.Array:
                scale = D_QK**-0.5 * (1 + i * 1e-5)  # scales differ: XLA merges identical calls
                options = {"softmax_scale": scale, "causal": shape.causal, "implementation": implementation}
                return flash_mla_with_kvcache(q, cache, table, lengths, D_V, *plan, **options)[0]

            # One number of each: wrapping an array for the user takes the host ten microseconds.
            return jnp.stack([decode(i)[0, 0, 0, 0] for i in range(calls)])

        operands = q, cache, table, lengths, plan
        compiled = jax.jit(run).lower(*operands).compile()
        return lambda: jax.block_until_ready(compiled(*operands))

    short, long = (SHORT, LONG) if implementation == "cuda" else (1, 3)
    return slope(chain(short), chain(long), long - short)


def planner(b: int) -> Timer:
    """`get_mla_metadata` alone, on lengths that differ from call to call."""
    batches = jax.random.randint(jax.random.key(0), (LONG, b), 0, 30000, jnp.int32)

    def chain(calls: int) -> Any:
        lengths = [batches[i] for i in range(calls)]
        compiled = (
            jax.jit(lambda lengths: sum(get_mla_metadata(x, 128, 1)[1][-1] for x in lengths)).lower(lengths).compile()
        )
        return lambda: jax.block_until_ready(compiled(lengths))

    return slope(chain(SHORT), chain(LONG), LONG - SHORT)


def flashmla(shape: Shape) -> Timer:
    import torch

    ops = flashmla_ops()
    generator = torch.Generator(device="cuda").manual_seed(0)
    new = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    pages = shape.s_k // PAGE
    q = torch.randn(shape.b, shape.s_q, shape.h_q, D_QK, **new)
    cache = torch.randn(shape.b * pages, PAGE, 1, D_QK, **new)
    table = torch.randperm(shape.b * pages, device="cuda", dtype=torch.int32).view(shape.b, pages)
    lengths = torch.full((shape.b,), shape.s_k, dtype=torch.int32, device="cuda")
    scale = D_QK**-0.5
    *_, plan, splits = ops.dense_decode_fwd(q, cache, D_V, lengths, table, scale, shape.causal, None, None)

    def chain(calls: int) -> Any:
        def run() -> None:
            for _ in range(calls):
                ops.dense_decode_fwd(q, cache, D_V, lengths, table, scale, shape.causal, plan, splits)

        run()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
            run()

        def replay() -> None:
            graph.replay()
            torch.cuda.synchronize()

        return replay

    return slope(chain(SHORT), chain(LONG), LONG - SHORT)


def flashmla_ops() -> Any:
    import importlib.util

    import torch

    spec = importlib.util.find_spec("flash_mla")
    if spec is None or spec.origin is None:
        raise ImportError("sgl-flash-mla is not installed")
    torch.ops.load_library(str(next(Path(spec.origin).parent.glob("_C_legacy*.so"))))
    return torch.ops.flash_mla_legacy


def slope(short: Callable[[], Any], long: Callable[[], Any], calls: int) -> Timer:
    for _ in range(2):
        short()
        long()

    def seconds(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def turn() -> float:
        return (min(seconds(long) for _ in range(3)) - min(seconds(short) for _ in range(3))) / calls

    return turn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--reference", action="store_true", help="time the XLA reference too")
    args = parser.parse_args()
    contenders: dict[str, Callable[[Shape], Timer]] = {"jax_flashmla": lambda shape: ours(shape, "cuda")}
    try:
        flashmla_ops()
        contenders["FlashMLA"] = flashmla
    except (ImportError, OSError, StopIteration) as error:
        print(f"FlashMLA is left out: {error}", file=sys.stderr)
    if args.reference:
        contenders["XLA reference"] = lambda shape: ours(shape, "xla")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; µs per call (TFLOPS · GB/s)\n")
    print("| b, s_q, h_q, s_k | " + " | ".join(contenders) + " |")
    print("|---" * (len(contenders) + 1) + "|")
    for shape in SHAPES:
        timers = {name: make(shape) for name, make in contenders.items()}
        names = list(timers)
        turns = [
            {name: timers[name]() for name in names[i % len(names) :] + names[: i % len(names)]} for i in range(TURNS)
        ]
        seconds = {name: statistics.median(turn[name] for turn in turns) for name in timers}
        cells = [
            f"{t * 1e6:.1f} ({shape.flops / t / 1e12:.0f} · {shape.bytes / t / 1e9:.0f})" for t in seconds.values()
        ]
        label = f"{shape.b}, {shape.s_q}, {shape.h_q}, {shape.s_k}" + (" causal" if shape.causal else "")
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)
        if args.json:
            print(json.dumps({**shape._asdict(), **{name: t * 1e6 for name, t in seconds.items()}}), flush=True)
    plan = planner(512)
    print(f"\nget_mla_metadata, b 512: {statistics.median(plan() for _ in range(TURNS)) * 1e6:.1f} µs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
