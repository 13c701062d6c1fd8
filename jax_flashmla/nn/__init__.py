"""MLA layers and DeepSeek models in Flax NNX, over the paged cache of this package. Needs the extra `flax`."""

try:
    import flax.nnx  # noqa: F401
except ImportError as error:
    raise ImportError(
        "jax_flashmla.nn needs Flax 0.12 or newer, and importing it failed; pip install 'jax-flashmla[flax]' brings it"
    ) from error

from .deepseek import DeepseekConfig, DeepseekForCausalLM
from .engine import Engine, Request, Stats
from .mla import MLAAttention, RopeConfig, plan
from .sampling import sample
from .sparse import DSAIndexer, SparseCache, SparseMLAAttention

__all__ = [
    "DSAIndexer",
    "DeepseekConfig",
    "DeepseekForCausalLM",
    "Engine",
    "MLAAttention",
    "Request",
    "RopeConfig",
    "SparseCache",
    "SparseMLAAttention",
    "Stats",
    "plan",
    "sample",
]
