"""The package as a whole: what it exports, what an import costs, and the header version of the built extension."""

import importlib.util
import inspect
import json
import subprocess
import sys

import jax
import pytest

import jax_flashmla
from jax_flashmla import _native, api, checks, kvcache, ops, reference
from jax_flashmla._primitive import OPS

has_extension = importlib.util.find_spec("jax_flashmla._C") is not None
needs_extension = pytest.mark.skipif(
    not has_extension, reason="needs the compiled extension: this is a reference-only build"
)


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


IMPORT = """
import json, sys, time
import jax, jax.export
start = time.perf_counter()
import jax_flashmla
seconds = time.perf_counter() - start
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
opened = {line.split("/")[-1] for line in maps.splitlines() if "/libcuda" in line}
print(json.dumps([seconds, sorted(opened), "jax_flashmla._C" in sys.modules]))
"""


def test_import_is_quick_and_opens_no_cuda_library():
    seconds, opened, loaded = json.loads(python(IMPORT))
    assert seconds < 0.5  # a few tens of milliseconds; the rest is a busy machine
    assert opened == [] and not loaded


def test_import_starts_no_backend():
    """A user must still be able to choose platforms and to call jax.distributed.initialize."""
    options = "jax.config.update('jax_platforms', 'cpu'); jax.config.update('jax_num_cpu_devices', 3)"
    code = f"import os; os.environ.pop('XLA_FLAGS'); import jax, jax_flashmla; {options}; print(len(jax.devices()))"
    assert python(code).strip() == "3"


def test_public_names_are_documented():
    for name in jax_flashmla.__all__:
        value = getattr(jax_flashmla, name)
        if callable(value):
            assert inspect.getdoc(value), name
    public = [getattr(module, name) for module in (jax_flashmla, kvcache) for name in module.__all__]
    for function in filter(inspect.isfunction, public):
        name = function.__name__
        for argument in inspect.signature(function).parameters:
            assert argument in inspect.getdoc(function).split("Returns:")[0], (name, argument)


def test_signature_starts_like_flashmla():
    names = list(inspect.signature(jax_flashmla.flash_mla_with_kvcache).parameters)
    assert names[:11] == [
        "q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata", "num_splits",
        "softmax_scale", "causal", "is_fp8_kvcache", "indices",
    ]  # fmt: skip
    names = list(inspect.signature(jax_flashmla.flash_mla_sparse_fwd).parameters)
    assert names[:7] == ["q", "kv", "indices", "sm_scale", "d_v", "attn_sink", "topk_length"]
    names = list(inspect.signature(jax_flashmla.get_mla_metadata).parameters)
    assert names[:6] == [
        "cache_seqlens",
        "num_q_tokens_per_head_k",
        "num_heads_k",
        "num_heads_q",
        "is_fp8_kvcache",
        "topk",
    ]


@pytest.mark.parametrize("module", [api, kvcache.paged, kvcache.pages, kvcache.quantize], ids=lambda m: m.__name__)
def test_examples_in_docstrings(module):
    import doctest

    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted > 0


def test_version():
    assert jax_flashmla.__version__[0].isdigit()


def test_one_name_in_every_layer():
    for name, op in OPS.items():
        version = {"dense_decode": 2, "schedule": 2}.get(name, 1)
        assert op.target in (None, f"jax_flashmla.{name}.v{version}")
        assert op.reference is getattr(reference, name) and getattr(ops, name) is op
    assert len(jax_flashmla.EXPORT_SAFE) == len([op for op in OPS.values() if op.target])
    assert checks.HEAD_DIM_V == reference.D_V


def test_only_public_jax():
    for module in [module for name, module in sys.modules.items() if name.startswith("jax_flashmla")]:
        if getattr(module, "__file__", "").endswith(".py"):
            assert "jax._src" not in inspect.getsource(module)


@needs_extension
def test_extension_has_the_targets_and_old_headers():
    """A handler does not register on a jaxlib older than its headers: 0.8 has version 0.2, 0.10 has 0.3."""
    from jax_flashmla import _C

    assert set(_C.registrations(False)) == {op.target for op in OPS.values() if op.target}
    assert list(_C.registrations(True)) == ["jax_flashmla.targets.v1"]  # which registers the same: tests/test_record.py
    assert (0, 0) < tuple(_C.ffi_version()) <= (0, 2)


@needs_extension
def test_registration_works_and_repeats():
    _native.register_cuda_targets()
    _native.register_cuda_targets()
    assert jax.devices()


def test_missing_extension_is_an_import_error():
    if has_extension:
        pytest.skip("this build has the extension")
    with pytest.raises(ImportError, match=r"_C"):
        jax_flashmla.register_cuda_targets()
