"""Which shapes are timed, and the buffers of one."""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import kvcache

D_QK, D_V = 576, 512
L2_BYTES = 60 * 2**20  # of an H200; an H100 has 50 MB
MOST_SETS = 32  # enough for a sequence of 4096 tokens
CHUNK_PAGES = 4096  # random numbers are made for so many pages at a time

NAME = re.compile(r"(\d+),(\d+),(\d+),(\d+)(?:,page(\d+))?(?:,(irregular|normal))?")


class DenseCase(NamedTuple):
    """`b,s_q,h_q,s_k[,pageN][,irregular|normal]`: more than one query token is causal.

    irregular: lengths log-uniform between 64 and s_k. normal: around s_k, with a standard deviation of half of it.
    """

    b: int
    s_q: int
    h_q: int
    s_k: int
    page_size: int = 64
    lengths: str = "uniform"

    @classmethod
    def parse(cls, name: str) -> DenseCase:
        match = NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"a case is b,s_q,h_q,s_k[,pageN][,irregular|normal], got {name!r}")
        b, s_q, h_q, s_k, page_size = (int(number or 64) for number in match.groups()[:5])
        if min(b, s_q, h_q, s_k, page_size) < 1:
            raise ValueError(f"b, s_q, h_q, s_k and the page size must be at least 1, got {name!r}")
        if match[6] == "irregular" and s_k < 64:
            raise ValueError(f"irregular lengths begin at 64, got {name!r}")
        return cls(b, s_q, h_q, s_k, page_size, match[6] or "uniform")

    @property
    def name(self) -> str:
        page = f",page{self.page_size}" * (self.page_size != 64)
        return f"{self.b},{self.s_q},{self.h_q},{self.s_k}{page}" + f",{self.lengths}" * (self.lengths != "uniform")

    @property
    def causal(self) -> bool:
        return self.s_q > 1

    @property
    def seqlens(self) -> np.ndarray:
        rng = np.random.default_rng(0)
        if self.lengths == "irregular":
            return np.exp(rng.uniform(np.log(64), np.log(self.s_k), self.b)).astype(np.int32)
        if self.lengths == "normal":
            return np.clip(rng.normal(self.s_k, self.s_k / 2, self.b), self.s_q, 2 * self.s_k).astype(np.int32)
        return np.full(self.b, self.s_k, np.int32)

    @property
    def keys(self) -> int:
        return int(self.seqlens.sum())

    @property
    def flops(self) -> float:
        """Multiply-adds count twice; causal masking is not deducted."""
        return 2.0 * self.s_q * self.h_q * self.keys * (D_QK + D_V)

    @property
    def bytes(self) -> float:
        """Every key once, queries, outputs."""
        return 2.0 * (self.keys * D_QK + self.b * self.s_q * self.h_q * (D_QK + D_V))

    @property
    def shape(self) -> dict[str, Any]:
        return {**self._asdict(), "causal": self.causal, "keys": self.keys}


DENSE = tuple(
    dict.fromkeys(
        (
            *(f"128,1,16,{s_k}" for s_k in (1024, 4096, 16384)),
            *(f"128,1,32,{s_k}" for s_k in (4096, 16384)),
            *(f"128,1,64,{s_k}" for s_k in (1024, 4096, 16384)),
            *(f"128,1,128,{s_k}" for s_k in (1024, 4096, 16384, 32768)),
            *(f"128,2,128,{s_k}" for s_k in (4096, 8192, 32768)),
            *(f"{b},1,{h_q},{s_k},normal" for b, s_k in ((128, 4096), (256, 1024)) for h_q in (128, 16)),
            *(f"1,1,{h_q},{s_k}" for s_k in (4096, 65536) for h_q in (16, 128)),
            *("4,1,16,4096", "4,1,128,4096", "4,1,128,65536"),
            *("16,1,16,4096", "16,1,128,4096", "16,1,128,65536"),
            *("32,1,128,4096", "32,1,128,65536"),
            *(f"{b},1,{h_q},4096" for b in (1, 16, 128) for h_q in (8, 20, 32)),
            *(f"128,1,{h_q},4096,page{page_size}" for page_size in (16, 128) for h_q in (16, 128)),
            *(f"64,1,{h_q},32768,irregular" for h_q in (16, 128)),
        )
    )
)

DENSE_QUICK = (
    "128,1,16,4096", "128,1,64,4096", "128,1,128,4096", "128,1,128,16384",
    "128,2,128,8192", "16,1,128,4096", "1,1,16,4096", "1,1,128,4096",
)  # fmt: skip


class DenseInputs(NamedTuple):
    """What every contender computes from: sets of queries and tables over one pool, used in rotation."""

    case: DenseCase
    q: list[jax.Array]  # [b, s_q, h_q, 576] each
    pool: jax.Array  # [P, page_size, 1, 576]
    tables: list[jax.Array]  # [b, max_pages] each, no page twice
    lengths: jax.Array  # [b]
    chain: tuple[int, int]  # calls in a short and in a long chain


def rotation(moved: float) -> int:
    """Sets of buffers until a set is out of the L2 cache when its turn comes again: eight times the cache in all.

    The cache does not evict what is oldest: after three times its size some of a set is still there, worth up to 2 %.
    """
    return min(MOST_SETS, int(8 * L2_BYTES // moved) + 1)


def whole_rounds(lengths: tuple[int, int], sets: int) -> tuple[int, int]:
    """Chains that pass through all sets equally often: whichever comes next, its first set was used longest ago."""
    short, long = (-(-calls // sets) * sets for calls in lengths)
    return short, max(long, short + sets)


@functools.partial(jax.jit, static_argnums=1)
def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Unit-normal bfloat16; the first axis may come out longer, by less than one chunk in all."""
    chunks = -(-shape[0] // CHUNK_PAGES)
    chunk = (-(-shape[0] // chunks), *shape[1:])
    parts = jax.lax.map(lambda k: jax.random.normal(k, chunk, jnp.bfloat16), jax.random.split(key, chunks))
    return parts.reshape(-1, *shape[1:])


def make_dense_inputs(case: DenseCase, lengths: tuple[int, int], sets: int) -> DenseInputs:
    pages_of = -(-case.seqlens // case.page_size)
    used = np.arange(pages_of.max()) < pages_of[:, None]
    tables = np.zeros((sets, *used.shape), np.int32)
    tables[:, used] = np.random.default_rng(1).permutation(sets * int(pages_of.sum())).reshape(sets, -1)
    keys = jax.random.split(jax.random.key(0), sets + 1)
    q_shape = case.b, case.s_q, case.h_q, D_QK
    return DenseInputs(
        case,
        [jax.random.normal(key, q_shape, jnp.bfloat16) for key in keys[1:]],
        normal(keys[0], (sets * int(pages_of.sum()), case.page_size, 1, D_QK)),
        [jnp.asarray(table) for table in tables],
        jnp.asarray(case.seqlens),
        whole_rounds(lengths, sets),
    )


class SparseDecodeCase(NamedTuple):
    """`b,s_q,h_q,s_k,topk`: every query token names topk of the s_k tokens of its sequence, in an fp8_v32 cache."""

    b: int
    s_q: int
    h_q: int
    s_k: int
    topk: int

    @classmethod
    def parse(cls, name: str) -> SparseDecodeCase:
        case = cls(*numbers(name, cls._fields))
        if case.topk > case.s_k:
            raise ValueError(f"topk must be at most s_k, got {name!r}")
        return case

    @property
    def name(self) -> str:
        return ",".join(map(str, self))

    @property
    def keys(self) -> int:
        return self.b * self.s_q * self.topk

    @property
    def flops(self) -> float:
        return 2.0 * self.h_q * self.keys * (D_QK + D_V)

    @property
    def bytes(self) -> float:
        """Every key once per query token that names it, queries, outputs."""
        return float(self.keys * 656 + 2 * self.b * self.s_q * self.h_q * (D_QK + D_V))

    @property
    def shape(self) -> dict[str, Any]:
        return {**self._asdict(), "keys": self.keys}


class SparsePrefillCase(NamedTuple):
    """`s_q,s_kv,topk,d_qk,h_q`: every query token names topk of s_kv bfloat16 rows, any."""

    s_q: int
    s_kv: int
    topk: int
    d_qk: int
    h_q: int

    @classmethod
    def parse(cls, name: str) -> SparsePrefillCase:
        case = cls(*numbers(name, cls._fields))
        if case.topk > case.s_kv or case.d_qk not in (D_QK, D_V):
            raise ValueError(f"topk must be at most s_kv, and d_qk {D_QK} or {D_V}, got {name!r}")
        return case

    @property
    def name(self) -> str:
        return ",".join(map(str, self))

    @property
    def keys(self) -> int:
        return self.s_q * self.topk

    @property
    def flops(self) -> float:
        return 2.0 * self.h_q * self.keys * (self.d_qk + D_V)

    @property
    def bytes(self) -> float:
        """Every row once, queries, outputs: that tokens share rows is what the L2 cache is for."""
        return 2.0 * (min(self.s_kv, self.keys) * self.d_qk + self.s_q * self.h_q * (self.d_qk + D_V))

    @property
    def shape(self) -> dict[str, Any]:
        return {**self._asdict(), "keys": self.keys}


def numbers(name: str, fields: tuple[str, ...]) -> list[int]:
    parts = name.split(",")
    if len(parts) != len(fields) or not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ValueError(f"a case is {','.join(fields)}, each at least 1, got {name!r}")
    return [int(part) for part in parts]


SPARSE_DECODE = (
    *(f"{b},1,{h_q},32768,2048" for b in (1, 16, 64, 128) for h_q in (64, 128)),
    *(f"128,2,{h_q},32768,2048" for h_q in (64, 128)),
    "64,2,128,32768,16384",
)
SPARSE_DECODE_QUICK = tuple(f"{b},1,{h_q},32768,2048" for b in (1, 16, 128) for h_q in (64, 128))
SPARSE_PREFILL = (
    *(f"4096,{s_kv},2048,576,{h_q}" for s_kv in (8192, 65536, 131072) for h_q in (64, 128)),
    *(f"4096,65536,512,512,{h_q}" for h_q in (64, 128)),
)
SPARSE_PREFILL_QUICK = (*(f"4096,65536,2048,576,{h_q}" for h_q in (64, 128)), "4096,65536,512,512,128")


class SparseInputs(NamedTuple):
    """What every contender computes from: sets of queries and lists, used in rotation."""

    case: SparseDecodeCase | SparsePrefillCase
    q: list[jax.Array]  # [b, s_q, h_q, 576], or [s_q, h_q, d_qk], each
    keys: jax.Array  # fp8_v32 [P, 64, 1, 656] uint8, or [s_kv, 1, d_qk]
    indices: list[jax.Array]  # [b, s_q, topk], or [s_q, 1, topk], each
    chain: tuple[int, int]


def picks(key: jax.Array, lists: int, choices: int, topk: int) -> jax.Array:
    """int32 `[lists, topk]`: in each no number below `choices` twice, in no order."""
    some = jax.jit(lambda key: jax.random.permutation(key, choices)[:topk].astype(jnp.int32))
    return jax.lax.map(some, jax.random.split(key, lists), batch_size=64)


def make_sparse_decode_inputs(case: SparseDecodeCase, lengths: tuple[int, int], sets: int) -> SparseInputs:
    """Every set has sequences of its own, or small batches would find theirs in the L2 cache."""
    keys = jax.random.split(jax.random.key(0), 2 * sets)
    pages_of = -(-case.s_k // 64)
    tokens = pages_of * 64
    pool = kvcache.init_kv_cache(sets * case.b * pages_of, "fp8_v32")
    fill = jax.jit(functools.partial(kvcache.append_kv_cache, format="fp8_v32"), donate_argnums=0)
    for i in range(sets * case.b):  # a sequence at a time: in bfloat16 all of them may be too many
        rows = jax.random.normal(jax.random.key(i + 1), (tokens, D_QK), jnp.bfloat16)
        pool = fill(pool, rows[:, :D_V], rows[:, D_V:], i * tokens + jnp.arange(tokens, dtype=jnp.int32))
    lists = [picks(key, case.b * case.s_q, case.s_k, case.topk) for key in keys[sets:]]
    first = tokens * jnp.arange(sets * case.b, dtype=jnp.int32).reshape(sets, case.b, 1, 1)
    return SparseInputs(
        case,
        [jax.random.normal(key, (case.b, case.s_q, case.h_q, D_QK), jnp.bfloat16) for key in keys[:sets]],
        pool,
        [x.reshape(case.b, case.s_q, case.topk) + start for x, start in zip(lists, first)],
        whole_rounds(lengths, sets),
    )


def make_sparse_prefill_inputs(case: SparsePrefillCase, lengths: tuple[int, int], sets: int) -> SparseInputs:
    keys = jax.random.split(jax.random.key(0), 2 * sets + 1)
    return SparseInputs(
        case,
        [jax.random.normal(key, (case.s_q, case.h_q, case.d_qk), jnp.bfloat16) for key in keys[1 : sets + 1]],
        jax.random.normal(keys[0], (case.s_kv, 1, case.d_qk), jnp.bfloat16),
        [picks(key, case.s_q, case.s_kv, case.topk)[:, None] for key in keys[sets + 1 :]],
        whole_rounds(lengths, sets),
    )
