"""Other implementations of the same op. Each loads what it needs, or raises an ImportError that says what is missing.

All of them compute from the JAX arrays of `DenseInputs` or `SparseInputs`; torch sees those through DLPack.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import kvcache
from ..kvcache.rows import fp8_format
from .cases import D_QK, D_V, DenseInputs, SparseInputs
from .protocol import Chain, Unsupported, jitted, replayed

Make = Callable[[DenseInputs], Chain]
MakeSparse = Callable[[SparseInputs], Chain]
SCALE = D_QK**-0.5


def ends(out: jax.Array) -> np.ndarray:
    """The first and the last sequence, which is what contenders are compared by."""
    return np.asarray(out[np.array([0, -1])], np.float32)


def module(name: str, package: str) -> Any:
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"{package} is not installed")
    return importlib.import_module(name)


def cuda_torch() -> Any:
    torch = module("torch", "torch")
    if not torch.cuda.is_available():
        raise ImportError("torch sees no GPU")
    return torch


def to_torch(torch: Any, x: jax.Array) -> Any:
    return torch.from_dlpack(jax.block_until_ready(x))


def captured(torch: Any, call: Callable[[int], Any], inputs: DenseInputs | SparseInputs) -> Chain:
    """A CUDA graph of the short chain's calls, replayed as often as our program runs. Torch reuses one output in it."""
    sets = len(inputs.q)
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()

    def result() -> np.ndarray:
        out = call(0).reshape(*inputs.q[0].shape[:-1], D_V)
        return np.asarray(out[[0, -1]].float().cpu().numpy())

    torch.cuda.synchronize()  # plans are made on another stream
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # XLA's threads are not ours
        for i in range(inputs.chain[0]):
            call(i % sets)
    return replayed(graph.replay, inputs.chain, wait=lambda _: torch.cuda.synchronize())._replace(result=result)


def load_flashmla() -> tuple[Any, Any]:
    """torch, and the ops of PyPI's sgl-flash-mla: the frozen kernels of FlashMLA for Hopper."""
    spec = importlib.util.find_spec("flash_mla")
    if spec is None or spec.origin is None:
        raise ImportError("sgl-flash-mla is not installed")
    torch = cuda_torch()
    library = next(Path(spec.origin).parent.glob("_C_legacy*.so"), None)
    if library is None:
        raise ImportError("the installed flash_mla has no _C_legacy library")
    torch.ops.load_library(str(library))
    return torch, torch.ops.flash_mla_legacy


def flashmla() -> Make:
    """Plan made once, pages of 64 tokens."""
    torch, kernels = load_flashmla()
    decode = kernels.dense_decode_fwd

    def make(inputs: DenseInputs) -> Chain:
        case = inputs.case
        if case.page_size != 64:
            raise Unsupported("pages of 64 tokens only")
        share = functools.partial(to_torch, torch)
        q, tables = [[share(x) for x in xs] for xs in (inputs.q, inputs.tables)]
        pool, lengths = share(inputs.pool), share(inputs.lengths)

        def call(i: int, *plan: Any) -> Any:
            return decode(q[i], pool, D_V, lengths, tables[i], SCALE, case.causal, *plan)

        *_, metadata, splits = call(0, None, None)
        return captured(torch, lambda i: call(i, metadata, splits)[0], inputs)

    return make


def fa3() -> Make:
    """PyPI's fa3-fwd: FlashAttention-3 in its qv mode. Plan made once; the cache is contiguous, not paged."""
    torch = cuda_torch()
    fa3_fwd = module("fa3_fwd_interface", "fa3-fwd")

    def make(inputs: DenseInputs) -> Chain:
        case = inputs.case
        share = functools.partial(to_torch, torch)

        @jax.jit
        def split(q: jax.Array, pool: jax.Array, table: jax.Array) -> list[jax.Array]:
            cache = pool[table].reshape(case.b, -1, 1, D_QK)
            return [q[..., D_V:], q[..., :D_V], cache[..., D_V:], cache[..., :D_V]]

        sets = [[share(x) for x in split(q, inputs.pool, t)] for q, t in zip(inputs.q, inputs.tables)]
        lengths = share(inputs.lengths)
        longest = inputs.tables[0].shape[1] * case.page_size
        plan = fa3_fwd.get_scheduler_metadata(
            case.b, case.s_q, longest, case.h_q, 1, D_QK - D_V, lengths, torch.bfloat16, headdim_v=D_V,
            causal=case.causal,
        )  # fmt: skip

        def call(i: int) -> Any:
            q_rope, q_latent, k_rope, latent = sets[i]
            return fa3_fwd.flash_attn_with_kvcache(
                q_rope, k_rope, latent, qv=q_latent, cache_seqlens=lengths, softmax_scale=SCALE, causal=case.causal,
                scheduler_metadata=plan,
            )  # fmt: skip

        return captured(torch, call, inputs)

    return make


def flashinfer() -> Make:
    """FlashInfer's paged MLA, fa3 backend, latent and rope in separate pools. Plan made once per table."""
    torch = cuda_torch()
    mla = module("flashinfer", "flashinfer-python").mla

    def make(inputs: DenseInputs) -> Chain:
        case = inputs.case
        share = functools.partial(to_torch, torch)
        pool = inputs.pool[:, :, 0]
        caches = share(pool[..., :D_V]), share(pool[..., D_V:])
        pages_of = -(-case.seqlens // case.page_size)
        used = np.arange(inputs.tables[0].shape[1]) < pages_of[:, None]
        q_starts = share(jnp.arange(case.b + 1, dtype=jnp.int32) * case.s_q)
        page_starts = share(jnp.asarray(np.concatenate([[0], np.cumsum(pages_of)]), jnp.int32))
        lengths = share(inputs.lengths)
        workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda")
        sets = []
        for q, table in zip(inputs.q, inputs.tables):
            wrapper = mla.BatchMLAPagedAttentionWrapper(workspace, backend="fa3")
            pages = share(jnp.asarray(np.asarray(table)[used]))
            wrapper.plan(
                q_starts, page_starts, pages, lengths, case.h_q, D_V, D_QK - D_V, case.page_size, case.causal, SCALE,
                torch.bfloat16, torch.bfloat16,
            )  # fmt: skip
            q = q.reshape(-1, case.h_q, D_QK)
            sets.append((wrapper, share(q[..., :D_V]), share(q[..., D_V:])))

        def call(i: int) -> Any:
            wrapper, q_latent, q_rope = sets[i]
            return wrapper.run(q_latent, q_rope, *caches)

        return captured(torch, call, inputs)

    return make


def jnp_peer() -> Make:
    """What one writes in an afternoon: gather the pages, two einsums, a softmax.

    It is slow to compile and to run. So its chains are short, and small batches may come from the L2 cache.
    """

    def decode(q: jax.Array, pool: jax.Array, table: jax.Array, lengths: jax.Array, causal: bool) -> jax.Array:
        s_q = q.shape[1]
        keys = pool[table].reshape(q.shape[0], -1, D_QK)
        scores = jnp.einsum("bshd,btd->bsht", q, keys, preferred_element_type=jnp.float32) * SCALE
        newest = lengths[:, None] - s_q + (jnp.arange(s_q, dtype=jnp.int32)[None] if causal else s_q - 1)
        visible = jnp.arange(keys.shape[1], dtype=jnp.int32)[None, None] <= newest[:, :, None]
        p = jax.nn.softmax(jnp.where(visible[:, :, None], scores, -jnp.inf)).astype(q.dtype)
        return jnp.einsum("bsht,btd->bshd", p, keys[..., :D_V])

    def make(inputs: DenseInputs) -> Chain:
        causal = inputs.case.causal

        def call(i: int, previous: jax.Array, q: Any, pool: jax.Array, tables: Any, lengths: jax.Array) -> jax.Array:
            # The table waits for the call before, and as far as XLA knows it differs: gathers are not merged.
            table = tables[i % len(q)] + jnp.isnan(previous).astype(jnp.int32)
            return decode(q[i % len(q)], pool, table, lengths, causal)[0, 0, 0, 0]

        operands = inputs.q, inputs.pool, inputs.tables, inputs.lengths
        short, long = inputs.chain
        chain = jitted(call, operands, (min(short, 2), min(long, 6)))
        one = jax.jit(decode, static_argnums=4)
        first = inputs.q[0], inputs.pool, inputs.tables[0], inputs.lengths
        return chain._replace(result=lambda: ends(one(*first, causal)))

    return make


def flashmla_sparse_decode() -> MakeSparse:
    """Plan made once."""
    torch, kernels = load_flashmla()

    def make(inputs: SparseInputs) -> Chain:
        share = functools.partial(to_torch, torch)
        q, indices = [[share(x) for x in xs] for xs in (inputs.q, inputs.indices)]
        pool = share(inputs.keys).view(torch.float8_e4m3fn)

        def call(i: int, *plan: Any) -> Any:
            return kernels.sparse_decode_fwd(
                q[i], pool, indices[i], None, None, *plan, None, None, None, D_V, SCALE, None
            )

        *_, metadata, splits = call(0, None, None)
        return captured(torch, lambda i: call(i, metadata, splits)[0], inputs)

    return make


def flashmla_sparse_prefill() -> MakeSparse:
    torch, kernels = load_flashmla()

    def make(inputs: SparseInputs) -> Chain:
        share = functools.partial(to_torch, torch)
        q, indices = [[share(x) for x in xs] for xs in (inputs.q, inputs.indices)]
        kv = share(inputs.keys)
        scale = kv.shape[-1] ** -0.5

        def call(i: int, *flag: bool) -> Any:
            return kernels.sparse_prefill_fwd(q[i], kv, indices[i], scale, D_V, None, None, *flag)[0]

        flags: tuple[bool, ...] = (False,)  # of some releases only
        try:
            call(0, *flags)
        except (RuntimeError, TypeError):
            flags = ()
        return captured(torch, lambda i: call(i, *flags), inputs)

    return make


def jnp_sparse() -> MakeSparse:
    """Gather the rows, two einsums, a softmax, over as many query tokens at a time as a gigabyte holds keys of."""

    def attend(q: jax.Array, keys: jax.Array, indices: jax.Array) -> jax.Array:
        fmt = fp8_format(keys)
        d = q.shape[-1]

        def some(one: tuple[jax.Array, jax.Array]) -> jax.Array:
            q, indices = one  # [h_q, d], [topk]
            if fmt is None:
                rows = keys[indices, 0]
            else:
                rows = kvcache.dequantize_kv(keys[indices // 64, indices % 64, 0], format=fmt.name)
            scores = jnp.einsum("hd,td->ht", q, rows, preferred_element_type=jnp.float32) * d**-0.5
            return jnp.einsum("ht,td->hd", jax.nn.softmax(scores).astype(q.dtype), rows[:, :D_V])

        tokens = q.reshape(-1, *q.shape[-2:]), indices.reshape(-1, indices.shape[-1])
        most = max(1, 2**30 // (2 * d * indices.shape[-1]))
        out = jax.lax.map(some, tokens, batch_size=min(most, tokens[0].shape[0]))
        return out.reshape(*q.shape[:-1], D_V)

    def make(inputs: SparseInputs) -> Chain:
        def call(i: int, previous: jax.Array, q: Any, keys: jax.Array, indices: Any) -> jax.Array:
            # The list waits for the call before, and as far as XLA knows it differs: gathers are not merged.
            own = indices[i % len(q)] + jnp.isnan(previous).astype(jnp.int32)
            return attend(q[i % len(q)], keys, own).ravel()[0]

        short, long = inputs.chain
        chain = jitted(call, (inputs.q, inputs.keys, inputs.indices), (min(short, 1), min(long, 3)))
        first = inputs.q[0], inputs.keys, inputs.indices[0]
        return chain._replace(result=lambda: ends(jax.jit(attend)(*first)))

    return make


SPARSE_DECODE: dict[str, Callable[[], MakeSparse]] = {"flashmla": flashmla_sparse_decode, "jnp": jnp_sparse}
SPARSE_PREFILL: dict[str, Callable[[], MakeSparse]] = {"flashmla": flashmla_sparse_prefill, "jnp": jnp_sparse}
DENSE: dict[str, Callable[[], Make]] = {"flashmla": flashmla, "fa3": fa3, "flashinfer": flashinfer, "jnp": jnp_peer}
