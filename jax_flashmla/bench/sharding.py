"""`MLAMesh.flash_mla_with_kvcache` on several GPUs, plan made once: strong scaling of one call beside a single GPU."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import flash_mla_with_kvcache, get_mla_metadata
from ..sharding import MLAMesh
from . import cases, dense_decode, peers
from .cases import D_QK, D_V, DenseCase
from .protocol import Chain, Setup, Work, chain_lengths, replayed

ROLES = ("heads", "context")
COUNTS = (1, 2, 4, 8)
NAMES = (
    *(f"heads,{n},128,1,128,4096" for n in COUNTS),
    *(f"context,{n},1,1,128,1048576" for n in COUNTS),
)
QUICK = NAMES
PEERS: dict[str, Callable[[], Any]] = {}
BESIDE = ("one GPU",)
RATED = False


class Case(NamedTuple):
    """`role,devices,` and then a case of dense decode, whose heads or whose keys the devices divide."""

    role: str
    devices: int
    dense: DenseCase

    @classmethod
    def parse(cls, name: str) -> Case:
        role, devices, dense = (*name.split(",", 2), "", "")[:3]
        if role not in ROLES or not devices.isdecimal() or int(devices) < 1:
            raise ValueError(f"a case is {'|'.join(ROLES)},devices,b,s_q,h_q,s_k[,pageN], got {name!r}")
        case = cls(role, int(devices), DenseCase.parse(dense))
        if role == "heads" and case.dense.h_q % case.devices:
            raise ValueError(f"h_q must be divisible by the devices, got {name!r}")
        return case

    @property
    def shards(self) -> int:
        """How many devices divide the keys."""
        return self.devices if self.role == "context" else 1


check = Case.parse


class Inputs(NamedTuple):
    q: jax.Array  # [b, s_q, h_q, 576]
    pool: jax.Array  # [P, page_size, 1, 576]
    table: jax.Array  # [b, max_pages]
    lengths: jax.Array  # [b]


def make_inputs(case: Case) -> tuple[Inputs, Inputs]:
    """For one device and for the mesh: the pools of the mesh one behind the other are that of the single device."""
    dense = case.dense
    max_pages = -(-int(dense.seqlens.max()) // dense.page_size)
    columns = -(-max_pages // case.shards)
    local = dense.b * columns  # pages of one device
    order = np.random.default_rng(1).permutation(local).astype(np.int32).reshape(dense.b, columns)
    table = np.repeat(order, case.shards, axis=1)[:, :max_pages]
    owner = np.arange(max_pages, dtype=np.int32) % case.shards
    key_q, key_pool = jax.random.split(jax.random.key(0))
    q = jax.random.normal(key_q, (dense.b, dense.s_q, dense.h_q, D_QK), jnp.bfloat16)
    pool = cases.normal(key_pool, (local * case.shards, dense.page_size, 1, D_QK))[: local * case.shards]
    lengths = jnp.asarray(dense.seqlens)
    return Inputs(q, pool, jnp.asarray(table + local * owner), lengths), Inputs(q, pool, jnp.asarray(table), lengths)


def chained(
    case: Case, attend: Callable[..., tuple[jax.Array, jax.Array]], plan: Any, inputs: Inputs, small: bool
) -> Chain:
    """One jit of some calls, run some times. What is kept of a call is small, but needs all of it.

    With a context axis a call waits for the one before, as a layer does: XLA would join sums that are independent.
    """
    dense, whole = case.dense, case.role == "context"

    def call(i: int, q: jax.Array, pool: jax.Array, table: jax.Array, lengths: jax.Array, plan: Any):
        options = {"softmax_scale": dense_decode.scale(i), "causal": dense.causal}
        return attend(q, pool, table, lengths, D_V, *plan, **options)

    calls = chain_lengths(dense_decode.seconds(dense) / case.devices + 1e-5, small)

    def run(q: jax.Array, *rest: Any) -> Any:
        kept = []
        for i in range(calls[0]):
            out, lse = call(i, q, *rest)
            if whole:
                q = q + 1e-30 * out[..., :1]
            kept.append(lse)
        return functools.reduce(jnp.add, kept), q[..., :1]

    executable = jax.jit(run).lower(*inputs, plan).compile()
    first = jax.jit(functools.partial(call, 0))
    chain = replayed(lambda: executable(*inputs, plan), calls)
    return chain._replace(result=lambda: peers.ends(jax.device_get(first(*inputs, plan)[0])))


def one_device(case: Case, inputs: Inputs, setup: Setup) -> Chain:
    attend = functools.partial(flash_mla_with_kvcache, implementation=setup.implementation)
    plan = get_mla_metadata(inputs.lengths, case.dense.s_q * case.dense.h_q, 1)
    return chained(case, attend, plan, inputs, setup.small)


def on_mesh(case: Case, inputs: Inputs, setup: Setup) -> Chain:
    devices = jax.devices()[: case.devices]
    dense, axis_types = case.dense, (jax.sharding.AxisType.Auto,)
    axes = jax.make_mesh((case.devices,), ("x",), axis_types=axis_types, devices=devices)
    mesh = MLAMesh(axes, heads="x") if case.role == "heads" else MLAMesh(axes, context="x")
    names = "q", "k_cache", "block_table", "cache_seqlens"
    placed = Inputs(*(jax.device_put(x, mesh.sharding(name)) for name, x in zip(names, inputs)))
    s_q = dense.s_q if dense.causal else 1
    plan = mesh.get_mla_metadata(placed.lengths, dense.s_q * dense.h_q, 1, s_q=s_q, page_size=dense.page_size)
    attend = functools.partial(mesh.flash_mla_with_kvcache, implementation=setup.implementation)
    return chained(case, attend, plan, placed, setup.small)


def work(name: str, setup: Setup) -> Work:
    case = Case.parse(name)
    shape = {"role": case.role, "devices": case.devices, **case.dense.shape}
    found = len(jax.devices())
    if found < case.devices:
        print(f"{name} is left out: it needs {case.devices} devices, and JAX sees {found}", file=sys.stderr)
        return Work(name, shape, 0.0, 0.0, {})
    alone, divided = make_inputs(case)
    contenders = {
        "jax_flashmla": functools.partial(on_mesh, case, divided, setup),
        BESIDE[0]: functools.partial(one_device, case, alone, setup),
    }
    return Work(name, shape, case.dense.flops, case.dense.bytes, contenders)
