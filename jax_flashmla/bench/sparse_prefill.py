"""`flash_mla_sparse_fwd` over bfloat16 rows; plan and merge of partial results inside."""

from __future__ import annotations

import jax

from .. import flash_mla_sparse_fwd
from . import cases, peers
from .cases import SparsePrefillCase
from .protocol import Setup, Work, chain_lengths
from .sparse_decode import contenders

NAMES, QUICK, PEERS = cases.SPARSE_PREFILL, cases.SPARSE_PREFILL_QUICK, peers.SPARSE_PREFILL
BESIDE: tuple[str, ...] = ()
RATED = True
check = SparsePrefillCase.parse


def attend(
    implementation: str, sm_scale: float, q: jax.Array, kv: jax.Array, indices: jax.Array
) -> tuple[jax.Array, ...]:
    return flash_mla_sparse_fwd(q, kv, indices, sm_scale, implementation=implementation)


def work(name: str, setup: Setup) -> Work:
    case = SparsePrefillCase.parse(name)
    lengths = chain_lengths(case.flops / 600e12 + 10e-6, setup.small)
    # One kv serves all sets: in a prompt it is in the L2 cache as far as it fits.
    sets = 2 if setup.small else cases.rotation(case.bytes)
    inputs = cases.make_sparse_prefill_inputs(case, lengths, sets)
    return Work(case.name, case.shape, case.flops, case.bytes, contenders(inputs, attend, setup))
