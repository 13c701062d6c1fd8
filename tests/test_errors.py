"""Every refusal in words: the argument, what was expected, what came, what to do."""

# ruff: noqa: C408, E501 - tables, one line per refusal

import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla import _native, flash_mla_with_kvcache, get_mla_metadata
from jax_flashmla.__main__ import parse_args
from jax_flashmla._primitive import OPS

ARGUMENTS = {
    "q": np.ones((2, 1, 4, 576), jnp.bfloat16),
    "k_cache": np.ones((3, 64, 1, 576), jnp.bfloat16),
    "block_table": np.zeros((2, 1), np.int32),
    "cache_seqlens": np.array([5, 64], np.int32),
    "head_dim_v": 512,
}


def decode(**changed):
    return flash_mla_with_kvcache(**(ARGUMENTS | changed))


def zeros(*shape, dtype=jnp.bfloat16):
    return np.zeros(shape, dtype)


METADATA = {"tile_scheduler_metadata": zeros(132, 8, dtype=np.int32), "num_splits": zeros(3, dtype=np.int32)}

REFUSED = {
    "q_rank": (dict(q=zeros(2, 4, 576)), ValueError, r"q must have the axes \[b, s_q, h_q, d_qk\], got shape \(2, 4, 576\)"),
    "q_type": (dict(q=[1.0]), TypeError, "q must be an array.*got list; use jnp.asarray"),
    "q_dtype": (dict(q=zeros(2, 1, 4, 576, dtype=np.int8)), TypeError, "q must be bfloat16 or float16 or float32, got int8; cast"),
    "q_d_qk": (dict(q=zeros(2, 1, 4, 192)), ValueError, "d_qk 576 or 512, got shape.*192"),
    "q_no_tokens": (dict(q=zeros(2, 0, 4, 576)), ValueError, "at least one query token"),
    "cache_rank": (dict(k_cache=zeros(3, 64, 576)), ValueError, r"k_cache must have the axes \[P, page_size, h_kv, d_qk\]"),
    "cache_dtype": (dict(k_cache=zeros(3, 64, 1, 576, dtype=np.float16)), TypeError, "k_cache must have q's dtype bfloat16, got float16"),
    "cache_d_qk": (dict(k_cache=zeros(3, 64, 1, 512)), ValueError, "k_cache must have q's d_qk = 576"),
    "page_size": (dict(k_cache=zeros(3, 48, 1, 576)), ValueError, r"page_size of \(16, 32, 64, 128, 256\).*48"),
    "no_pages": (dict(k_cache=zeros(0, 64, 1, 576)), ValueError, "k_cache must have at least one page"),
    "heads": (dict(k_cache=zeros(3, 64, 3, 576)), ValueError, "h_q must be a multiple of h_kv, got h_q = 4.*h_kv = 3"),
    "no_kv_heads": (dict(k_cache=zeros(3, 64, 0, 576)), ValueError, "h_q must be a multiple of h_kv"),
    "head_dim_v": (dict(head_dim_v=576), ValueError, "head_dim_v must be 512, got 576"),
    "head_dim_v_type": (dict(head_dim_v=512.0), TypeError, "head_dim_v must be an int, got float"),
    "table_none": (dict(block_table=None), ValueError, "block_table must be an int32 array for dense decode, got None"),
    "table_rank": (dict(block_table=zeros(2, dtype=np.int32)), ValueError, r"block_table must have the axes \[b, max_pages\]"),
    "table_int64": (dict(block_table=zeros(2, 1, dtype=np.int64)), TypeError, r"block_table must be int32, got int64; cast it with block_table.astype\(jnp.int32\)"),
    "table_batch": (dict(block_table=zeros(3, 1, dtype=np.int32)), ValueError, r"block_table must have shape \[b, max_pages\] = \(2, 1\), got \(3, 1\)"),
    "table_tokens": (dict(block_table=np.broadcast_to(np.int32(0), (2, 2**25))), ValueError, r"fewer than 2\*\*31 tokens"),
    "lengths_none": (dict(cache_seqlens=None), ValueError, "cache_seqlens must be an int32 array for dense decode, got None"),
    "lengths_int64": (dict(cache_seqlens=zeros(2, dtype=np.int64)), TypeError, "cache_seqlens must be int32, got int64"),
    "lengths_float": (dict(cache_seqlens=zeros(2, dtype=np.float32)), TypeError, "cache_seqlens must be int32, got float32"),
    "lengths_batch": (dict(cache_seqlens=zeros(1, dtype=np.int32)), ValueError, r"cache_seqlens must have shape \[b\] = \(2,\), got \(1,\)"),
    "half_a_plan": (dict(num_splits=METADATA["num_splits"]), ValueError, "must be given together; pass both results of get_mla_metadata"),
    "plan_shape": (METADATA | dict(tile_scheduler_metadata=zeros(132, 7, dtype=np.int32)), ValueError, r"\(132, 8\), got \(132, 7\)"),
    "plan_empty": (METADATA | dict(tile_scheduler_metadata=zeros(0, 8, dtype=np.int32)), ValueError, "at least one part"),
    "plan_dtype": (METADATA | dict(num_splits=zeros(3, dtype=np.int64)), TypeError, "num_splits must be int32, got int64"),
    "plan_batch": (METADATA | dict(num_splits=zeros(9, dtype=np.int32)), ValueError, r"num_splits must have shape \[b \+ 1\] = \(3,\), got \(9,\); pass the results"),
    "scale_nan": (dict(softmax_scale=float("nan")), ValueError, "softmax_scale must be finite in float32 and >= 0, got nan"),
    "scale_negative": (dict(softmax_scale=-1), ValueError, "softmax_scale must be finite in float32 and >= 0, got -1"),
    "scale_overflow": (dict(softmax_scale=1e39), ValueError, "softmax_scale must be finite in float32"),
    "scale_type": (dict(softmax_scale=[1, 2]), TypeError, "softmax_scale must be a number or None, got list"),
    "causal_type": (dict(causal=1), TypeError, "causal must be True or False, got int 1"),
    "implementation": (dict(implementation="triton"), ValueError, "implementation must be None, 'cuda' or 'xla', got 'triton'"),
    "cuda_float32": (
        dict(q=zeros(2, 1, 4, 576, dtype=np.float32), k_cache=zeros(3, 64, 1, 576, dtype=np.float32), implementation="cuda"),
        ValueError,
        "implementation='cuda' cannot be used: the kernel takes bfloat16 and float16, got q in float32; use implementation=None or 'xla'",
    ),
    "cuda_rows": (
        dict(q=np.broadcast_to(zeros(1), (2, 131071, 4, 576)), implementation="cuda"),
        ValueError,
        r"the kernel takes s_q \* h_q of 524280 at most, got 524284; cut the queries into shorter chunks; use",
    ),
}  # fmt: skip


@pytest.mark.parametrize("changed, error, match", REFUSED.values(), ids=REFUSED.keys())
def test_decode_refuses(changed, error, match):
    with pytest.raises(error, match=match):
        decode(**changed)


WITHOUT_INDICES = [
    ("is_fp8_kvcache", True),
    *((name, np.zeros(1, np.float32)) for name in (
        "attn_sink", "extra_k_cache", "extra_indices_in_kvcache", "topk_length", "extra_topk_length", "descale_q", "descale_k"
    )),
]  # fmt: skip


@pytest.mark.parametrize("name, value", WITHOUT_INDICES, ids=[name for name, _ in WITHOUT_INDICES])
def test_fp8_and_sparse_arguments_are_refused_without_indices(name, value):
    with pytest.raises(NotImplementedError, match=rf"^{name} is not supported.*dense bfloat16/float16 decode only"):
        decode(**{name: value})


@pytest.mark.parametrize("name, value", [("softmax_scale", 0.1), ("causal", True), ("head_dim_v", 512)])
def test_traced_attributes_are_refused(name, value):
    with pytest.raises(TypeError, match=rf"{name} must be static.*got the traced.*static_argnames"):
        jax.jit(lambda value: decode(**{name: value}))(value)


PLANS_REFUSED = {
    "rank": (([[1, 2]], 16, 1), {}, TypeError, "cache_seqlens must be an array"),
    "int64": ((zeros(2, dtype=np.int64), 16, 1), {}, TypeError, "cache_seqlens must be int32, got int64"),
    "shape": ((zeros(2, 2, dtype=np.int32), 16, 1), {}, ValueError, r"cache_seqlens must have the axes \[b\]"),
    "rows": ((zeros(2, dtype=np.int32), 0, 1), {}, ValueError, "num_q_tokens_per_head_k must be at least 1, got 0"),
    "heads": ((zeros(2, dtype=np.int32), 16, 1.5), {}, TypeError, "num_heads_k must be an int, got float"),
    "heads_q": ((zeros(2, dtype=np.int32), 16, 1, 0), {}, ValueError, "num_heads_q must be at least 1"),
    "fp8": ((zeros(2, dtype=np.int32), 16, 1, 16, True), {}, NotImplementedError, "is_fp8_kvcache is not supported"),
    "topk": ((zeros(2, dtype=np.int32), 16, 1, 16, False, 64), {}, NotImplementedError, "topk is not supported"),
    "flag": ((zeros(2, dtype=np.int32), 16, 1), dict(batch_invariant=None), TypeError, "batch_invariant must be True or False"),
    "large": ((zeros(4096, dtype=np.int32), 16, 1), dict(batch_invariant=True), ValueError, "batch_invariant needs b <= 4095"),
}  # fmt: skip


@pytest.mark.parametrize("args, kwargs, error, match", PLANS_REFUSED.values(), ids=PLANS_REFUSED.keys())
def test_plan_refuses(args, kwargs, error, match):
    with pytest.raises(error, match=match):
        get_mla_metadata(*args, **kwargs)


def test_a_plan_for_no_sequences_is_none():
    lengths = zeros(0, dtype=np.int32)
    plan = get_mla_metadata(lengths, 4, 1, batch_invariant=True)
    out, lse = flash_mla_with_kvcache(
        zeros(0, 1, 4, 576), zeros(3, 64, 1, 576), zeros(0, 2, dtype=np.int32), lengths, 512, *plan
    )
    assert out.shape == (0, 1, 4, 512) and lse.shape == (0, 4, 1)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--page-size", "48"], "--page-size: invalid choice"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--implementation", "cuda"], "--implementation cuda needs a Hopper GPU, and JAX runs on cpu"),
    ],
)
def test_the_command_refuses(options, message, monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(SystemExit, match="2"):
        parse_args(options)
    assert message in capsys.readouterr().err


def test_traced_plan_sizes_are_refused():
    with pytest.raises(TypeError, match=r"num_q_tokens_per_head_k must be static"):
        jax.jit(lambda rows: get_mla_metadata(ARGUMENTS["cache_seqlens"], rows, 1))(16)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_cuda_insisted_on_a_cpu(wrap):
    with pytest.raises(
        RuntimeError,
        match=r"implementation='cuda' needs a Hopper GPU.*another platform; put the operands on the GPU, or use implementation=None",
    ):
        wrap(lambda: decode(implementation="cuda"))()


def lower_for_cuda(**changed):
    q = changed.pop("q", ARGUMENTS["q"])
    return jax.jit(lambda q: decode(q=q, **changed)).trace(q).lower(lowering_platforms=("cuda",)).as_text()


def test_no_cuda_build(no_cuda_build):
    with pytest.raises(
        RuntimeError, match=r"has no CUDA kernels \(No module named 'jax_flashmla._C'\); install a wheel"
    ):
        lower_for_cuda(implementation="cuda")
    with pytest.warns(
        RuntimeWarning, match=r"runs through its XLA reference: this installation .* has no CUDA kernels"
    ):
        assert "jax_flashmla" not in lower_for_cuda()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert "jax_flashmla" not in lower_for_cuda(causal=True)


def test_wrong_gpu(cuda_build, monkeypatch):
    ada = SimpleNamespace(device_kind="NVIDIA L40S", compute_capability="8.9", core_count=142)
    monkeypatch.setattr(_native, "local_cuda_devices", lambda: [ada])
    _native.warn_fallback.cache_clear()
    match = r"need a Hopper GPU \(compute capability 9.0\), got NVIDIA L40S \(8.9\)"
    with pytest.raises(RuntimeError, match=rf"implementation='cuda' cannot be used: the kernels {match}"):
        lower_for_cuda(implementation="cuda")
    with pytest.warns(RuntimeWarning, match=match):
        assert "jax_flashmla" not in lower_for_cuda()


def test_hopper_takes_the_kernel(cuda_build, monkeypatch):
    hopper = SimpleNamespace(device_kind="NVIDIA H200", compute_capability="9.0", core_count=132)
    monkeypatch.setattr(_native, "local_cuda_devices", lambda: [hopper])
    for implementation in (None, "cuda"):
        assert OPS["dense_decode"].target in lower_for_cuda(implementation=implementation)


def test_operands_on_different_devices():
    """JAX's own error is clear; the op must not get in its way."""
    cpus = jax.devices("cpu")
    q, pool = jax.device_put(ARGUMENTS["q"], cpus[0]), jax.device_put(ARGUMENTS["k_cache"], cpus[1])
    with pytest.raises(ValueError, match=r"incompatible devices"):
        decode(q=q, k_cache=pool)
