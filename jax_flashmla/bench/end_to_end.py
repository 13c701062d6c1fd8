"""A decode step as a model has it: one jit of 61 layers, each with its own cache, one plan; time per layer.

Its only peer is the kernel: what the same call takes in a chain of nothing else.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import flash_mla_with_kvcache, get_mla_metadata
from . import cases, dense_decode
from .cases import D_V, DenseCase, DenseInputs
from .protocol import Chain, Setup, Work, dispatched

NAMES = ("128,1,16,4096", "128,1,128,4096", "1,1,128,4096")
QUICK = NAMES
PEERS: dict[str, Callable[[], Any]] = {}
BESIDE = ("kernel",)
RATED = True
LAYERS = 61
check = DenseCase.parse


def caches_that_fit(one: int, layers: int, free: float) -> int:
    """How many caches of that many bytes to make: fewer than layers, used in rotation, where memory is short."""
    return int(max(1, min(layers, free / one)))


def free_bytes() -> float:
    """Nine tenths of what JAX may still take from the device; unlimited where it does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return float("inf")
    return 0.9 * (stats["bytes_limit"] - stats["bytes_in_use"])


def step(inputs: DenseInputs, caches: list[jax.Array], layers: int, implementation: str) -> Chain:
    case = inputs.case

    @jax.jit
    def run(q: jax.Array, caches: list[jax.Array], table: jax.Array, lengths: jax.Array) -> jax.Array:
        metadata, num_splits = get_mla_metadata(lengths, case.s_q * case.h_q, 1)
        lses = [
            flash_mla_with_kvcache(
                q,
                caches[i % len(caches)],
                table,
                lengths,
                D_V,
                metadata,
                num_splits,
                softmax_scale=dense_decode.scale(i),
                causal=case.causal,
                implementation=implementation,
            )[1]
            for i in range(layers)
        ]
        return jnp.stack([lse[0, 0, 0] for lse in lses])

    operands = inputs.q[0], caches, inputs.tables[0], inputs.lengths
    executable = run.lower(*operands).compile()
    return dispatched(lambda: executable(*operands), (1, 4), per_run=layers)


def work(name: str, setup: Setup) -> Work:
    case = DenseCase.parse(name)
    layers = 3 if setup.small else LAYERS
    inputs = dense_decode.make_inputs(case, setup)
    one = cases.make_dense_inputs(case, (1, 1), sets=1)
    count = caches_that_fit(one.pool.nbytes, layers, free_bytes())
    if count < layers:
        print(f"{name}: {count} caches in rotation; {layers} do not fit into memory", file=sys.stderr)
    caches = [one.pool, *(cases.normal(jax.random.key(i), one.pool.shape) for i in range(1, count))]
    chain = cases.whole_rounds((layers, 4 * layers), len(inputs.q))  # as many calls as steps have: the card is as hot
    contenders = {
        "jax_flashmla": functools.partial(step, one, caches, layers, setup.implementation),
        "kernel": functools.partial(dense_decode.ours, inputs._replace(chain=chain), setup.implementation),
    }
    shape = {**case.shape, "layers": layers, "caches": count}
    return Work(case.name, shape, case.flops, case.bytes, contenders)
