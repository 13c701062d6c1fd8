"""Where the parameters of a model lie on a mesh, and how its methods run there."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ..sharding import MLAMesh

ParamPath = tuple[Any, ...]  # as nnx.to_flat_state has it: names, and numbers in lists

# By the end of a parameter's path, its axis of heads, or the one that takes their place outside of the attention.
DIVIDED: dict[ParamPath, int] = {
    ("q_proj", "kernel"): 1,
    ("q_b_proj", "kernel"): 1,
    ("w_uk",): 0,
    ("w_uv",): 0,
    ("o_proj", "kernel"): 0,
    ("gate_proj", "kernel"): 1,
    ("up_proj", "kernel"): 1,
    ("down_proj", "kernel"): 0,
    ("gate_proj",): 2,  # of routed experts, stacked along axis 0
    ("up_proj",): 2,
    ("down_proj",): 1,
    ("lm_head", "kernel"): 1,
}


def parameter_sharding(path: ParamPath, shape: tuple[int, ...], mesh: MLAMesh) -> NamedSharding:
    """Divided over the axis of heads where the axis of heads, or its like, can be; else whole on every device."""
    axis = DIVIDED.get(tuple(path[-2:]), DIVIDED.get(tuple(path[-1:])))
    spec = PartitionSpec()
    if axis is not None and mesh.heads is not None and shape[axis] % mesh.size("heads") == 0:
        spec = PartitionSpec(*[None] * axis, mesh.heads)
    return NamedSharding(mesh.mesh, spec)


def pool_sharding(mesh: MLAMesh | None) -> NamedSharding | None:
    """Of caches with the pages of all devices; None is the default device."""
    return None if mesh is None else mesh.sharding("k_cache")


def place(module: nnx.Module, mesh: MLAMesh) -> None:
    """Moves the parameters of a module to their places."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    placed = [
        (path, variable.replace(jax.device_put(variable[...], parameter_sharding(path, variable.shape, mesh))))
        for path, variable in flat
    ]
    nnx.update(module, nnx.from_flat_state(placed))


def _on_devices_of(mesh: MLAMesh, x: Any) -> Any:
    """x; a copy on every device where it lies on none of a mesh, as what is made outside of jit does."""
    outside = isinstance(x, np.ndarray) or (
        isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and not isinstance(x.sharding, NamedSharding)
    )
    return jax.device_put(x, NamedSharding(mesh.mesh, PartitionSpec())) if outside else x


def on_mesh(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Lets a method see Auto axes where those of `self.mesh` are Explicit: XLA, not the code, divides its products.

    Args:
      names: of the results, as `MLAMesh.sharding` takes them; one name places all leaves of its result.
    """

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.mesh is None or AxisType.Explicit not in self.mesh.axis_types():
                return method(self, *args, **kwargs)
            graphdef, state = nnx.split(self)
            static = {name: value for name, value in kwargs.items() if isinstance(value, int)}
            traced = {name: value for name, value in kwargs.items() if name not in static}
            args, traced = jax.tree.map(functools.partial(_on_devices_of, self.mesh), (args, traced))

            def body(state: Any, args: Any, traced: Any) -> Any:
                return method(nnx.merge(graphdef, state), *args, **traced, **static)

            out = tuple(self.mesh.sharding(name) for name in names)
            return jax.sharding.auto_axes(body, out_sharding=out if len(out) > 1 else out[0])(state, args, traced)

        return wrapper

    return decorate
