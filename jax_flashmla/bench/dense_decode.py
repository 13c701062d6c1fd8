"""`flash_mla_with_kvcache` over a bfloat16 cache, plan made once, the merge of partial results inside."""

from __future__ import annotations

import functools
from typing import Any

import jax

from .. import flash_mla_with_kvcache, get_mla_metadata
from . import cases, peers
from .cases import D_QK, D_V, DenseCase, DenseInputs
from .protocol import Chain, Setup, Work, chain_lengths, repeated

NAMES, QUICK, PEERS = cases.DENSE, cases.DENSE_QUICK, peers.DENSE
BESIDE: tuple[str, ...] = ()
RATED = True
check = DenseCase.parse


def scale(i: int) -> float:
    """Of call i: they differ because XLA merges identical calls."""
    return D_QK**-0.5 * (1 + i * 1e-5)


def ours(inputs: DenseInputs, implementation: str) -> Chain:
    case = inputs.case

    def decode(
        i: int, q: Any, pool: jax.Array, tables: Any, lengths: jax.Array, plan: Any
    ) -> tuple[jax.Array, jax.Array]:
        metadata, num_splits = plan
        return flash_mla_with_kvcache(
            q[i % len(q)],
            pool,
            tables[i % len(q)],
            lengths,
            D_V,
            metadata,
            num_splits,
            softmax_scale=scale(i),
            causal=case.causal,
            implementation=implementation,
        )

    def call(i: int, _: jax.Array, *operands: Any) -> jax.Array:
        # Of the small result: nobody reads the output, so all calls write to one place, as in a model, and as peers do.
        return decode(i, *operands)[1][0, 0, 0]

    plan = get_mla_metadata(inputs.lengths, case.s_q * case.h_q, 1)
    operands = inputs.q, inputs.pool, inputs.tables, inputs.lengths, plan
    first = inputs.q[:1], inputs.pool, inputs.tables[:1], inputs.lengths, plan
    one = jax.jit(functools.partial(decode, 0))
    return repeated(call, operands, inputs.chain)._replace(result=lambda: peers.ends(one(*first)[0]))


def seconds(case: DenseCase) -> float:
    """About what a call takes on an H200, to choose the length of a chain."""
    return max(case.flops / 600e12, case.bytes / 3.8e12) + 8e-6


def make_inputs(case: DenseCase, setup: Setup) -> DenseInputs:
    sets = 2 if setup.small else cases.rotation(case.bytes)
    return cases.make_dense_inputs(case, chain_lengths(seconds(case), setup.small), sets)


def work(name: str, setup: Setup) -> Work:
    case = DenseCase.parse(name)
    inputs = make_inputs(case, setup)
    contenders = {peer: functools.partial(make, inputs) for peer, make in setup.peers.items()}
    ours_first = {"jax_flashmla": functools.partial(ours, inputs, setup.implementation), **contenders}
    return Work(case.name, case.shape, case.flops, case.bytes, ours_first)
