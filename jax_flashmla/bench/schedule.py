"""`get_mla_metadata` alone, on lengths that differ from call to call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import get_mla_metadata
from .cases import numbers
from .protocol import Chain, Setup, Work, jitted

NAMES = ("1", "32", "512")  # b
QUICK = NAMES
PEERS: dict[str, Callable[[], Any]] = {}
BESIDE: tuple[str, ...] = ()
RATED = False
ROWS, LONGEST = 128, 30000


def check(name: str) -> int:
    (b,) = numbers(name, ("b",))
    return b


def ours(b: int, chain: tuple[int, int]) -> Chain:
    lengths = list(jax.random.randint(jax.random.key(0), (chain[1], b), 0, LONGEST, jnp.int32))

    def call(i: int, _: jax.Array, *lengths: jax.Array) -> jax.Array:
        return get_mla_metadata(lengths[i], ROWS, 1)[1][-1]

    return jitted(call, lengths, chain)


def work(name: str, setup: Setup) -> Work:
    b = check(name)
    chain = (1, 3) if setup.small else (16, 64)
    return Work(name, {"b": b, "h_q": ROWS}, 0.0, 0.0, {"jax_flashmla": functools.partial(ours, b, chain)})
