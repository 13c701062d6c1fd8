"""`define`: two plain JAX functions become one op that picks between them at lowering.

No other file knows JAX's machinery.

Why a primitive and not `jax.lax.platform_dependent`: a primitive keeps one equation in the jaxpr whatever the platform,
folds vmapped axes into the batch, and refuses differentiation in words.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from . import _native


class Op(NamedTuple):
    """An op as the layers above call it: `op(*operands, implementation=None, **attributes)`."""

    name: str
    target: str | None
    reference: Callable[..., Sequence[jax.Array]]
    unsupported: Callable[..., str | None]
    forward: Callable[..., Sequence[jax.Array]]

    def __call__(self, *operands: jax.Array, implementation: str | None = None, **attributes: Any):
        problem = self.unsupported(*operands)
        if problem and implementation == "cuda":
            raise ValueError(
                f"{self.name}: implementation='cuda' cannot be used: {problem}; use implementation=None or 'xla'"
            )
        if problem or implementation == "xla":
            # Devices of a mesh that share an operand sum its gradient: out here, and not in a branch of the reference
            # that some of them do not take.
            return self.reference(*(match_varying(x, *operands) for x in operands), **attributes)
        return self.forward(freeze(insist=implementation == "cuda", **attributes), *operands)


OPS: dict[str, Op] = {}
"""Every op by name; the transform tests iterate over it."""


def define(
    name: str,
    *,
    target: str | None = None,
    shapes: Callable[..., Sequence[jax.ShapeDtypeStruct]],
    reference: Callable[..., Sequence[jax.Array]],
    cuda: Callable[..., Sequence[jax.Array]] | None = None,
    batch: Callable[..., Sequence[jax.Array]],
    unsupported: Callable[..., str | None] = lambda *operands: None,
) -> Op:
    """Defines an op from plain functions that all take `(*operands, **attributes)`.

    Args:
      name: the op's name in every layer.
      target: the XLA custom call that `cuda` uses; None while there is no kernel.
      shapes: the results' shapes and dtypes.
      reference: the op in jnp; lowered on every platform that is not CUDA, and on CUDA when the kernels cannot run.
      cuda: the op as JAX code around `jax.ffi.ffi_call`; may call other ops. None while there is no kernel: then
        `unsupported` must refuse every operand.
      batch: `(bind, size, operands, mapped) -> results`: folds the leading vmapped axis of the operands flagged in
        `mapped` into an axis that the op has, calls `bind(*operands)`, and gives every result a leading axis again.
      unsupported: why no kernel takes these operands, in words; None when one does.
    """
    primitive = Primitive(f"jax_flashmla_{name}")
    primitive.multiple_results = True

    @primitive.def_abstract_eval
    def _(*avals, insist, **attributes):
        return [jax.core.ShapedArray(result.shape, result.dtype) for result in shapes(*avals, **attributes)]

    lower_reference = mlir.lower_fun(reference, multiple_results=True)
    lower_cuda = mlir.lower_fun(cuda or reference, multiple_results=True)

    def lower_elsewhere(ctx, *operands, insist, **attributes):
        if insist:
            raise RuntimeError(
                f"{name}: implementation='cuda' needs a Hopper GPU (compute capability {_native.HOPPER}) "
                "and was lowered for another platform; put the operands on the GPU, or use implementation=None, "
                "which takes the XLA reference there"
            )
        return lower_reference(ctx, *operands, **attributes)

    def lower_on_cuda(ctx, *operands, insist, **attributes):
        problem = _native.obstacle()
        if problem is None:
            return lower_cuda(ctx, *operands, **attributes)
        if insist:
            raise RuntimeError(f"{name}: implementation='cuda' cannot be used: {problem}")
        _native.warn_fallback(problem)
        return lower_reference(ctx, *operands, **attributes)

    mlir.register_lowering(primitive, lower_elsewhere)
    if cuda:
        mlir.register_lowering(primitive, lower_on_cuda, platform="cuda")

    def eager(params, *operands):
        return primitive.bind(*operands, **dict(params))

    eager.__name__ = name  # what profilers show
    eager_jit = jax.jit(eager, static_argnums=0)

    @primitive.def_impl
    def _(*operands, **params):
        with jax.disable_jit(False):  # else bind would come back here for ever
            return eager_jit(freeze(**params), *operands)

    def batched(operands, dims, **params):
        mapped = [dim is not None for dim in dims]
        size = next(x.shape[dim] for x, dim, is_mapped in zip(operands, dims, mapped, strict=True) if is_mapped)
        operands = [jnp.moveaxis(x, dim, 0) if m else x for x, dim, m in zip(operands, dims, mapped, strict=True)]
        results = batch(functools.partial(primitive.bind, **params), size, operands, mapped)
        return results, [0] * len(results)

    batching.primitive_batchers[primitive] = batched

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def forward(params, *operands):
        return [match_varying(result, *operands) for result in primitive.bind(*operands, **dict(params))]

    @forward.defjvp
    def _(params, primals, tangents):
        raise NotImplementedError(
            f"{name} is forward-only and cannot be differentiated; put jax.lax.stop_gradient around its floating-point "
            "operands, or use implementation='xla', which is differentiable"
        )

    OPS[name] = op = Op(name, target, reference, unsupported, forward)
    return op


def freeze(**params: Any) -> tuple[tuple[str, Any], ...]:
    """Hashable parameters. Keys compare by value, so an attribute must always come in one type (checks.py casts)."""
    return tuple(sorted(params.items()))


def match_varying(x: jax.Array, *others: jax.Array) -> jax.Array:
    """Marks x as varying over every manual mesh axis over which one of the others varies.

    Without it `shard_map` sees a new value that is the same on all devices, and scan and cond refuse it as a carry.
    """
    missing = frozenset().union(*map(_varying_axes, others)) - _varying_axes(x)
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def _varying_axes(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying
