import os

# Before jax starts its backends: eight CPU devices for sharding, and no preallocation, so that workers share a GPU.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import pytest

from jax_flashmla import _native, reference

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def why_no_gpu() -> str | None:
    if not _native.local_cuda_devices():
        return "needs a Hopper GPU: this machine has no CUDA device"
    return _native.obstacle()


def pytest_addoption(parser):
    parser.addoption("--first-cases", action="store_true", help="of a parametrised test only its first case")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a Hopper GPU and the CUDA build; skipped elsewhere")
    config.addinivalue_line("filterwarnings", "error")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--first-cases"):
        first = {(item.path, item.originalname): item for item in reversed(items)}
        config.hook.pytest_deselected(items=[item for item in items if item not in first.values()])
        items[:] = reversed(first.values())
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    reason = why_no_gpu() if gpu_tests else None
    for item in gpu_tests:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def device(request):
    """GPU tests run on the first GPU, all others on the CPU, on every machine."""
    on_gpu = request.node.get_closest_marker("gpu")
    with jax.default_device(jax.devices("cuda" if on_gpu else "cpu")[0]) as chosen:
        yield chosen


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Those of one file at a time: thousands of compiled programs make a process slow, and large."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def small_chunks(programs):
    """Less padding in the reference, for tests of short sequences: it is most of what they would compute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CHUNK_TOKENS", 64)
        patch.setattr(reference, "CHUNK_INDICES", 32)
        yield


@pytest.fixture
def cuda_build(monkeypatch):
    """Lowering for CUDA as on a machine that has the kernels; nothing is compiled or run."""
    monkeypatch.setattr(_native, "register_cuda_targets", lambda: None)
    monkeypatch.setattr(_native, "local_cuda_devices", list)


@pytest.fixture
def no_cuda_build(monkeypatch):
    def missing():
        raise ImportError("No module named 'jax_flashmla._C'")

    monkeypatch.setattr(_native, "register_cuda_targets", missing)
    monkeypatch.setattr(_native, "local_cuda_devices", list)
    _native.warn_fallback.cache_clear()


@pytest.fixture(autouse=True)
def quick_compilation(request):
    """XLA's optimisations cost more time than they save here."""
    everything = request.node.get_closest_marker("gpu") or "all_optimizations" in request.fixturenames
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", not everything)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def all_optimizations():
    """For tests that read the compiled program, or run it very often."""
