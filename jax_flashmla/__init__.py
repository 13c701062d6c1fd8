"""Multi-head Latent Attention for JAX: CUDA kernels on Hopper GPUs, a pure-jnp reference elsewhere."""

from importlib.metadata import PackageNotFoundError, version

from . import kvcache, sharding
from ._native import register_cuda_targets
from .api import flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata, merge_attention_states
from .ops import EXPORT_SAFE
from .ragged import mla_ragged_paged_attention

try:
    __version__ = version("jax-flashmla")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0.0.0+unknown"

__all__ = [
    "EXPORT_SAFE",
    "__version__",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "kvcache",
    "merge_attention_states",
    "mla_ragged_paged_attention",
    "register_cuda_targets",
    "sharding",
]
