"""`flash_mla_with_kvcache` with indices over an fp8_v32 cache; plan and merge of partial results inside."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from .. import flash_mla_with_kvcache
from . import cases, peers
from .cases import D_V, SparseDecodeCase, SparseInputs
from .dense_decode import scale
from .protocol import Chain, Setup, Work, chain_lengths, repeated

NAMES, QUICK, PEERS = cases.SPARSE_DECODE, cases.SPARSE_DECODE_QUICK, peers.SPARSE_DECODE
BESIDE: tuple[str, ...] = ()
RATED = True
check = SparseDecodeCase.parse


def attend(
    implementation: str, sm_scale: float, q: jax.Array, keys: jax.Array, indices: jax.Array
) -> tuple[jax.Array, ...]:
    return flash_mla_with_kvcache(
        q,
        keys,
        None,
        None,
        D_V,
        softmax_scale=sm_scale,
        is_fp8_kvcache=True,
        indices=indices,
        implementation=implementation,
    )


def ours(inputs: SparseInputs, attend: Callable[..., tuple[jax.Array, ...]]) -> Chain:
    """`attend(scale, q, keys, indices)`, whose last result is the log-sum-exp."""
    usual = inputs.q[0].shape[-1] ** -0.5

    def call(i: int, _: jax.Array, q: Any, keys: jax.Array, indices: Any) -> jax.Array:
        own = usual * scale(i) / scale(0)
        return attend(own, q[i % len(q)], keys, indices[i % len(q)])[-1].ravel()[0]

    one = jax.jit(functools.partial(attend, usual))
    first = inputs.q[0], inputs.keys, inputs.indices[0]
    chain = repeated(call, (inputs.q, inputs.keys, inputs.indices), inputs.chain)
    return chain._replace(result=lambda: peers.ends(one(*first)[0]))


def contenders(inputs: SparseInputs, attend: Callable[..., Any], setup: Setup) -> dict[str, Callable[[], Chain]]:
    others = {peer: functools.partial(make, inputs) for peer, make in setup.peers.items()}
    return {"jax_flashmla": functools.partial(ours, inputs, functools.partial(attend, setup.implementation)), **others}


def work(name: str, setup: Setup) -> Work:
    case = SparseDecodeCase.parse(name)
    seconds = max(case.flops / 420e12, case.bytes / 2.5e12) + 10e-6
    lengths = chain_lengths(seconds, setup.small)
    inputs = cases.make_sparse_decode_inputs(case, lengths, 2 if setup.small else cases.rotation(case.bytes))
    return Work(case.name, case.shape, case.flops, case.bytes, contenders(inputs, attend, setup))
