"""`append_kv_cache`: new tokens into slots all over a donated pool."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import kvcache
from .cases import rotation, whole_rounds
from .protocol import Chain, Setup, Work, chain_lengths

FORMATS = ("bf16", "fp8_v32", "fp8_v4")
NAMES = tuple(f"{format},{t}" for t in (128, 4096, 65536, 262144) for format in FORMATS)
QUICK = tuple(f"{format},{t}" for t in (128, 65536) for format in FORMATS)
PEERS: dict[str, Callable[[], Any]] = {}
BESIDE = ("jnp",)
RATED = True
PAGE_SIZE = 64


class CacheCase(NamedTuple):
    """`format,t`: tokens written or read; keys are bfloat16."""

    format: str
    t: int

    @classmethod
    def parse(cls, name: str) -> CacheCase:
        format, _, t = name.partition(",")
        if format not in kvcache.FORMATS or not t.isdecimal() or int(t) < 1:
            raise ValueError(f"a case is format,t with a format of {', '.join(kvcache.FORMATS)}, got {name!r}")
        return cls(format, int(t))

    @property
    def name(self) -> str:
        return f"{self.format},{self.t}"

    @property
    def head_dim(self) -> int:
        return kvcache.FORMATS[self.format].head_dim

    @property
    def bytes(self) -> float:
        """Every row once as bfloat16 and once as it is stored."""
        return float(self.t) * (2 * self.head_dim + kvcache.FORMATS[self.format].token_bytes)

    @property
    def seconds(self) -> float:
        """About what a call takes, to choose the length of a chain."""
        return self.bytes / 3e12 + 3e-6

    @property
    def calls(self) -> tuple[int, int]:
        return chain_lengths(self.seconds, most=64)  # XLA takes a minute to compile more of its own


def slots_of(case: CacheCase, sets: int) -> tuple[int, np.ndarray]:
    """Pages of the pool, and slots `[sets, t]`, none twice: of tokens of a prefill whole pages anywhere, of up to 1024
    tokens, a decode step, single slots."""
    rng = np.random.default_rng(0)
    per_set = -(-case.t // PAGE_SIZE)
    slots = np.arange(sets * per_set * PAGE_SIZE, dtype=np.int32).reshape(-1, PAGE_SIZE)
    slots = rng.permutation(slots) if case.t > 1024 else rng.permutation(slots.ravel())
    return sets * per_set, slots.reshape(sets, -1)[:, : case.t]


def ours(case: CacheCase, calls: tuple[int, int], sets: int, implementation: str) -> Chain:
    num_pages, all_slots = slots_of(case, sets)
    slots = list(map(jnp.asarray, all_slots))
    keys = [jax.random.normal(jax.random.key(i), (case.t, case.head_dim), jnp.bfloat16) for i in range(sets)]
    rows = [(x[:, :-64], x[:, -64:]) for x in keys]
    pool = kvcache.init_kv_cache(num_pages, case.format, page_size=PAGE_SIZE)
    operands = rows, slots

    def compiled(calls: int) -> Callable[[], object]:
        def run(cache: jax.Array, rows: Any, slots: Any) -> jax.Array:
            for i in range(calls):
                new = *rows[i % sets], slots[i % sets]
                cache = kvcache.append_kv_cache(cache, *new, format=case.format, implementation=implementation)
            return cache

        executable = jax.jit(run, donate_argnums=0).lower(pool, *operands).compile()

        def go() -> object:
            nonlocal pool
            pool = jax.block_until_ready(executable(pool, *operands))
            return pool

        return go

    short, long = calls
    return Chain(compiled(short), compiled(long), long - short)


def compare(run: Callable[[CacheCase, tuple[int, int], int, str], Chain], name: str, setup: Setup) -> Work:
    """A cache operation beside itself in plain XLA."""
    case = CacheCase.parse(name)
    sets = 1 if setup.small else rotation(case.bytes)
    calls = (1, 3) if setup.small else whole_rounds(case.calls, sets)
    contenders = {
        "jax_flashmla": functools.partial(run, case, calls, sets, setup.implementation),
        "jnp": functools.partial(run, case, calls, sets, "xla"),
    }
    return Work(case.name, case._asdict(), 0.0, case.bytes, contenders, ceiling="copy")


check = CacheCase.parse
work = functools.partial(compare, ours)
