"""Custom calls that record their kernels into XLA's command buffers, instead of having them captured."""

import ctypes
import os
import re
import subprocess
import sys

import fake_xla
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_xla import FakeXla
from jax import export

from jax_flashmla import (
    EXPORT_SAFE,
    _native,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
    kvcache,
    ops,
)
from jax_flashmla._primitive import OPS

PAGE = 64
B, H, PAGES = 5, 16, 60


def decode(q, pool, table, lengths, plan):
    return flash_mla_with_kvcache(q, pool, table, lengths, 512, *plan, causal=True)[0]


def chain(q, pool, latent, rope, slots, table, lengths):
    """Every op whose kernels are recorded, one depending on the other: six commands at least, so XLA makes a graph."""
    pool = kvcache.append_kv_cache(pool, latent, rope, slots, format="bf16")
    plan = get_mla_metadata(lengths, H, 1)
    for _ in range(3):
        out = decode(q, pool, table, lengths, plan)
        q = q.at[..., :512].set(q[..., :512] + out)
    indices = jnp.broadcast_to(jnp.arange(3000, 3000 - 320, -7, dtype=jnp.int32), (B, 1, 46))
    sparse = flash_mla_with_kvcache(q, pool, None, None, 512, indices=indices)[0]
    rows = kvcache.gather_kv_cache(pool, table, lengths, total=2048, format="bf16")
    prefill = flash_mla_sparse_fwd(q[:, 0], pool, indices, 576**-0.5)[0]
    return q, sparse, rows, prefill, pool


def operands(seed):
    keys = jax.random.split(jax.random.key(seed), 4)
    q = jax.random.normal(keys[0], (B, 1, H, 576), jnp.bfloat16)
    pool = jax.random.normal(keys[1], (PAGES, PAGE, 1, 576), jnp.bfloat16)
    latent = jax.random.normal(keys[2], (B, 512), jnp.bfloat16)
    rope = jax.random.normal(keys[3], (B, 64), jnp.bfloat16)
    table = np.random.default_rng(seed).permutation(PAGES).reshape(B, -1).astype(np.int32)
    lengths = np.array([700, 1, 64, 300, 511], np.int32)
    last = lengths - 1
    slots = table[np.arange(B), last // PAGE] * PAGE + last % PAGE
    return q, pool, latent, rope, *map(jnp.asarray, (slots, table, lengths))


# --- when


def header(directory, major, minor):
    path = directory / "include" / "xla" / "ffi" / "api" / "record_c_api.h"
    path.parent.mkdir(parents=True)
    lines = (f"#define XLA_FFI_Extension_Record_{part}Version {n}" for part, n in (("Major", major), ("Minor", minor)))
    path.write_text("\n".join(lines))


@pytest.fixture
def jaxlib_of(monkeypatch, tmp_path):
    """A jaxlib with that version of the interface, and plugins of those releases."""

    def install(*version, plugins=("9.9.9",)):
        if version:
            header(tmp_path, *version)
        monkeypatch.setattr(_native.jaxlib, "__file__", str(tmp_path / "__init__.py"))
        monkeypatch.setattr(_native.jaxlib, "__version__", "9.9.9")
        monkeypatch.setattr(_native, "plugin_versions", lambda: set(plugins))
        monkeypatch.delenv("JAX_FLASHMLA_RECORD", raising=False)
        _native.records.cache_clear()

    yield install
    _native.records.cache_clear()


def test_records_with_the_version_it_was_written_for(jaxlib_of):
    jaxlib_of(0, 1)
    assert _native.records()


@pytest.mark.parametrize(
    ("version", "plugins"),
    [((), ["9.9.9"]), ((0, 2), ["9.9.9"]), ((1, 1), ["9.9.9"]), ((0, 1), []), ((0, 1), ["9.9.8"])],
)
def test_does_not_record_with_another(version, plugins, jaxlib_of):
    jaxlib_of(*version, plugins=plugins)
    assert not _native.records()


def test_can_be_turned_off(jaxlib_of, monkeypatch):
    jaxlib_of(0, 1)
    monkeypatch.setenv("JAX_FLASHMLA_RECORD", "0")
    _native.records.cache_clear()
    assert not _native.records()


# --- what is lowered


def calls(records, monkeypatch):
    monkeypatch.setattr(_native, "records", lambda: records)
    q, pool, *_, table, lengths = operands(0)
    step = jax.jit(lambda *args: decode(*args, get_mla_metadata(lengths, H, 1)))
    text = step.trace(q, pool, table, lengths).lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(rf"custom_call @{re.escape(ops.dense_decode.target)}\(.*", text)


def test_attention_and_combine_are_one_call_where_nothing_is_recorded(cuda_build, monkeypatch):
    (call,) = calls(False, monkeypatch)
    assert "phase = 0 : i32" in call and "output_operand_alias<" not in call


def test_attention_and_combine_are_two_calls_where_kernels_are_recorded(cuda_build, monkeypatch):
    attend, combine = calls(True, monkeypatch)
    assert "phase = 1 : i32" in attend and "output_operand_alias<" not in attend
    assert "phase = 2 : i32" in combine and combine.count("output_operand_alias<") == 4


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_two_calls_of_a_symbolic_batch(batch_invariant, cuda_build, monkeypatch):
    monkeypatch.setattr(_native, "records", lambda: True)
    (b,) = export.symbolic_shape("b")
    q, pool, *_, table, lengths = operands(0)
    shapes = [(b, *x.shape[1:]) if x is not pool else x.shape for x in (q, pool, table, lengths)]
    specs = [jax.ShapeDtypeStruct(shape, x.dtype) for shape, x in zip(shapes, (q, pool, table, lengths), strict=True)]
    step = jax.jit(lambda *args: decode(*args, get_mla_metadata(args[3], H, 1, batch_invariant=batch_invariant)))
    exported = export.export(step, platforms=("cuda",), disabled_checks=EXPORT_SAFE)(*specs)
    assert exported.mlir_module().count(f"custom_call @{ops.dense_decode.target}(") == 2


def test_lists_that_nobody_splits_are_one_call(cuda_build, monkeypatch):
    monkeypatch.setattr(_native, "records", lambda: True)
    b = 2 * _native.HOPPER_SM_COUNT  # a part has whole lists
    q, pool = jnp.zeros((b, 1, 64, 576), jnp.bfloat16), jnp.zeros((2, PAGE, 1, 576), jnp.bfloat16)
    indices = jnp.zeros((b, 1, 64), jnp.int32)
    step = jax.jit(lambda q, pool: flash_mla_with_kvcache(q, pool, None, None, 512, indices=indices)[0])
    text = step.trace(q, pool).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(f"custom_call @{ops.sparse_decode.target}(") == 1


# --- what XLA is told, by an XLA that is not there


@pytest.fixture
def xla():
    extension = pytest.importorskip("jax_flashmla._C", reason="needs the compiled extension")
    fake = FakeXla()
    (capsule,) = extension.registrations(True).values()
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    error, metadata = fake.ask_metadata(fake_xla.Call(pointer(capsule, None)))
    assert (error, fake.errors) == (None, [])
    assert (metadata.version.major, metadata.version.minor) == extension.ffi_version() and metadata.traits == 1
    return fake


def append_operands(tokens, pool=0x1000, latent=0x2000, rope=0x3000, slots=0x4000):
    kv = (PAGES, PAGE, 1, 576), jnp.bfloat16, pool
    bf16 = ((tokens, 512), jnp.bfloat16, latent), ((tokens, 64), jnp.bfloat16, rope)
    return [kv, *bf16, ((tokens,), jnp.int32, slots)], [kv]


def test_all_targets_are_registered_with_both_stages(xla):
    assert set(xla.handlers) == {op.target for op in OPS.values() if op.target}
    for execute, record in xla.handlers.values():
        assert fake_xla.address(execute) != fake_xla.address(record)
        for handler in (execute, record):
            error, metadata = xla.ask_metadata(handler)
            assert error is None and metadata.traits == 1


def test_a_launch_is_recorded_and_updated(xla):
    _, record = xla.handlers[ops.append.target]
    assert not xla.record(record, *append_operands(102))
    ((event, name, image, dims, smem, (params,)),) = xla.events
    assert event == "create" and "append_kernel" in name and smem == 0 and xla.num_commands.value == 1
    assert image[:4] == b"\x50\xed\x55\xba" and len(image) > 1000
    assert (dims.grid_y, dims.grid_z, dims.block_y, dims.block_z) == (1, 1, 1, 1)
    assert dims.grid_x * dims.block_x == 32 * 104  # a warp has a token, a CTA four of them
    assert (dims.cluster_x, dims.cluster_y, dims.cluster_z) == (0, 0, 0)
    for address in (0x1000, 0x2000, 0x3000, 0x4000):
        assert address.to_bytes(8, "little") in params
    assert not xla.record(record, *append_operands(102, latent=0x5000), update=True)
    event, command, (moved,) = xla.events[-1]
    assert (event, command, len(moved)) == ("update", 0xC0, len(params))
    assert moved == params.replace((0x2000).to_bytes(8, "little"), (0x5000).to_bytes(8, "little"))


def test_a_call_that_launches_nothing_is_captured(xla):
    _, record = xla.handlers[ops.append.target]
    assert not xla.record(record, *append_operands(0))
    assert xla.events == [("capture",)] and xla.num_commands.value == 0


def test_a_cache_that_must_be_copied_first_is_captured(xla):
    _, record = xla.handlers[ops.append.target]
    operands, ((shape, dtype, _),) = append_operands(100)
    assert not xla.record(record, operands, [(shape, dtype, 0x9000)])
    assert xla.events == [("capture",)] and xla.num_commands.value == 0


def test_errors_of_a_handler_are_those_of_the_stage(xla):
    _, record = xla.handlers[ops.append.target]
    operands, ((shape, dtype, address),) = append_operands(100)
    assert xla.record(record, operands, [((shape[0] + 1, *shape[1:]), dtype, address)])
    assert "append: the result must be as large as the cache" in xla.errors[0] and not xla.events
    assert not xla.record(record, *append_operands(100))  # and the next one records


@pytest.mark.parametrize("version", [(0, 2), (1, 1)])
def test_another_version_is_an_error(version, xla):
    xla.extension.base.major, xla.extension.base.minor = version
    _, record = xla.handlers[ops.append.target]
    assert xla.record(record, *append_operands(100))
    assert "version 0.1" in xla.errors[0] and not xla.events


# --- on a GPU

PROGRAM = """
import jax, sys
sys.path.insert(0, {tests!r})
import test_record
inputs = test_record.operands(0)
jax.block_until_ready(jax.jit(test_record.chain)(*inputs))
jax.block_until_ready(jax.jit(test_record.chain)(*inputs))
"""


@pytest.mark.gpu
def test_kernels_are_recorded():
    """XLA tells of every kernel that is recorded, and that it may overlap with the one before it."""
    if not _native.records():
        pytest.skip("needs an XLA whose custom calls record kernels: jaxlib 0.11.2 with its own CUDA plugin")
    tests = os.path.dirname(__file__)
    env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_MAX_VLOG_LEVEL": "0", "TF_CPP_VMODULE": "record_ffi=3"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM.format(tests=tests)], env=env, capture_output=True, text=True, check=True
    )
    recorded = re.findall(r"FfiCreateLaunch for kernel: (\w+), use_pdl: (\w+)", done.stderr)
    assert all(overlaps == "true" for _, overlaps in recorded)
    for kernel in ("append", "schedule", "dense_decode", "sparse_decode", "combine", "gather", "sparse_prefill"):
        assert any(f"{kernel}_kernel" in name for name, _ in recorded), (kernel, recorded)


@pytest.mark.gpu
def test_results_are_those_of_single_calls():
    """The same bits from a graph, whatever its buffers are: XLA moves them from call to call."""
    graph = jax.jit(chain)
    kept = []
    for seed in (0, 1, 2, 0):
        inputs = operands(seed)
        got = graph(*inputs)
        kept.append((inputs, got))  # so that the next call has other buffers
        for x, y in zip(got, chain(*inputs), strict=True):
            np.testing.assert_array_equal(np.float32(x), np.float32(y))
    for x, y in zip(kept[0][1], kept[-1][1], strict=True):
        np.testing.assert_array_equal(np.float32(x), np.float32(y))


@pytest.mark.gpu
def test_results_are_not_copied_between_the_calls():
    text = jax.jit(chain).lower(*operands(0)).compile().as_text()
    assert not re.search(r"= bf16\[5,1,16,512\]\S* copy\(", text)


@pytest.mark.gpu
def test_calls_of_several_kernels_are_captured(monkeypatch):
    """Prefill of a long prompt launches once for each of its plans: XLA captures it."""
    sparse_prefill = sys.modules["jax_flashmla.ops.sparse_prefill"]
    monkeypatch.setattr(sparse_prefill, "MAX_SEQUENCES", 8)
    s_q = 100
    q = jax.random.normal(jax.random.key(0), (s_q, 16, 576), jnp.bfloat16)
    kv = jax.random.normal(jax.random.key(1), (512, 1, 576), jnp.bfloat16)
    indices = jax.random.randint(jax.random.key(2), (s_q, 1, 128), 0, 512)

    def prefill(q, kv, indices):
        lengths = jnp.full(s_q, 100)
        for _ in range(5):  # so many commands that XLA makes a graph
            out, *_ = flash_mla_sparse_fwd(q, kv, indices, 576**-0.5, topk_length=lengths)
            q = q.at[..., :512].set(out)
        return q

    got, expected = (np.float32(f(q, kv, indices)) for f in (jax.jit(prefill), prefill))
    np.testing.assert_array_equal(got, expected)
