"""The ops, one file each: shapes, the custom call with its workspaces, and the batch rule."""

from jax import export

from .._primitive import OPS
from .append import append
from .dense_decode import dense_decode
from .gather import gather
from .schedule import schedule
from .sparse_decode import sparse_decode
from .sparse_prefill import sparse_prefill

EXPORT_SAFE = tuple(export.DisabledSafetyCheck.custom_call(op.target) for op in OPS.values() if op.target)
"""For `jax.export.export(f, disabled_checks=EXPORT_SAFE)`: the target names are versioned and keep their meaning."""

__all__ = ["EXPORT_SAFE", "append", "dense_decode", "gather", "schedule", "sparse_decode", "sparse_prefill"]
