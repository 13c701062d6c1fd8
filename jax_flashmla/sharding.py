"""Attention and cache writes on several devices: `jax.shard_map` around the public ops, told by the roles of mesh axes.

No collective moves a pool. Heads and batches are independent, and need none at all; a context that is spread over
devices needs a sum of outputs.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from . import api, checks, kvcache
from .kvcache import arguments
from .kvcache.formats import page_size_of
from .kvcache.paged import batch_slots
from .kvcache.rows import write_rows

__all__ = ["MLAMesh", "context_block_table", "context_lengths", "context_positions"]

Attention = Callable[..., tuple[jax.Array, jax.Array]]

_SIGNATURE = inspect.signature(api.flash_mla_with_kvcache)
# The roles of the axes of every array, by its name in the public functions; what is not named is on all devices.
_ROLES: dict[str, tuple[str | None, ...]] = {
    "q": ("batch", None, "heads"),
    "k_cache": ("pages",),
    "block_table": ("batch",),
    "cache_seqlens": ("batch",),
    "tile_scheduler_metadata": ("pages",),
    "num_splits": ("pages",),
    "indices": ("batch",),
    "topk_length": ("batch",),
    "attn_sink": ("heads",),
    "extra_k_cache": ("pages",),
    "extra_indices_in_kvcache": ("batch",),
    "extra_topk_length": ("batch",),
    "out": ("batch", None, "heads"),
    "softmax_lse": ("batch", "heads"),
    "latent": ("batch",),
    "rope": ("batch",),
    "positions": ("batch",),
    "x": ("batch",),  # tokens, activations, logits
}
_LETTERS = {"batch": "b", "heads": "h_q", "pages": "the first axis"}
_WHOLE_POOLS = "every device has a pool, and a plan from the mesh's get_mla_metadata, of the same size"


def context_lengths(
    cache_seqlens: jax.Array, shard: int | jax.Array, num_shards: int, *, page_size: int, pages_per_run: int = 1
) -> jax.Array:
    """How many of the first keys of each sequence one device of a context-parallel axis holds.

    Pages are dealt out in runs: page j of a sequence lies on device `j // pages_per_run % num_shards`.

    Args:
      cache_seqlens: int32 `[b]`, keys per sequence on all devices together.
      shard: the device's place on the axis: `jax.lax.axis_index` inside of `shard_map`, or a number.
      num_shards: devices on the axis; static.
      page_size: tokens in a page; static.
      pages_per_run: static.

    Returns:
      int32 `[b]`; 0 where the device holds nothing.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype or shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashmla import sharding
      >>> lengths = jnp.array([300, 64, 0], jnp.int32)
      >>> [sharding.context_lengths(lengths, d, 2, page_size=64).tolist() for d in range(2)]
      [[172, 64, 0], [128, 0, 0]]
    """
    checks.array("cache_seqlens", cache_seqlens, axes="b", dtypes=("int32",))
    run = _run_tokens(num_shards, page_size, pages_per_run)
    _check_shard(shard, num_shards)
    return _held(jnp.asarray(cache_seqlens), shard, num_shards, run)


def context_block_table(
    block_table: jax.Array, shard: int | jax.Array, num_shards: int, *, pages_per_run: int = 1
) -> jax.Array:
    """The pages of each sequence that one device of a context-parallel axis holds.

    Args:
      block_table: int32 `[b, max_pages]`, the pages of each sequence in order; page j is a page of the pool of device
        `j // pages_per_run % num_shards`, and counts from the first page of that pool.
      shard, num_shards, pages_per_run: as for `context_lengths`.

    Returns:
      int32 `[b, local_pages]`; -1 where the table ends. local_pages is the same on all devices.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype or shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashmla import sharding
      >>> table = jnp.array([[3, 1, 0, 2, 5]], jnp.int32)
      >>> [sharding.context_block_table(table, d, 2).tolist() for d in range(2)]
      [[[3, 0, 5]], [[1, 2, -1]]]
      >>> [sharding.context_block_table(table, d, 2, pages_per_run=2).tolist() for d in range(2)]
      [[[3, 1, 5, -1]], [[0, 2, -1, -1]]]
    """
    checks.array("block_table", block_table, axes="b, max_pages", dtypes=("int32",))
    num_shards = checks.integer("num_shards", num_shards, minimum=1)
    pages_per_run = checks.integer("pages_per_run", pages_per_run, minimum=1)
    _check_shard(shard, num_shards)
    b, max_pages = block_table.shape
    cycles = -(-max_pages // (num_shards * pages_per_run))
    spare = cycles * num_shards * pages_per_run - max_pages
    runs = jnp.pad(jnp.asarray(block_table), ((0, 0), (0, spare)), constant_values=-1)
    own = jnp.take(runs.reshape(b, cycles, num_shards, pages_per_run), shard, axis=2)
    return own.reshape(b, cycles * pages_per_run)


def context_positions(
    positions: jax.Array, shard: int | jax.Array, num_shards: int, *, page_size: int, pages_per_run: int = 1
) -> jax.Array:
    """Where tokens stand among those of their sequence that one device of a context-parallel axis holds.

    With `context_block_table` they are what `kvcache.slot_mapping` wants.

    Args:
      positions: int32, any shape, places in the sequences from 0.
      shard, num_shards, page_size, pages_per_run: as for `context_lengths`.

    Returns:
      int32, the shape of positions; -1 where the position is negative or another device holds the token.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype or shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashmla import sharding
      >>> sharding.context_positions(jnp.array([70, 130, 63, -1], jnp.int32), 0, 2, page_size=64).tolist()
      [-1, 66, 63, -1]
    """
    checks.array("positions", positions, axes="...", dtypes=("int32",))
    run = _run_tokens(num_shards, page_size, pages_per_run)
    _check_shard(shard, num_shards)
    positions = jnp.asarray(positions)
    cycle, rest = positions // (run * num_shards), positions % (run * num_shards)
    own = (positions >= 0) & (rest // run == shard)
    return jnp.where(own, cycle * run + rest % run, -1)


def _check_shard(shard: int | jax.Array, num_shards: int) -> None:
    """A traced number is known on the device alone."""
    if isinstance(shard, (jax.Array, np.ndarray)):
        if shard.ndim or not jnp.issubdtype(shard.dtype, jnp.integer):
            raise TypeError(
                f"shard must be one integer, got {shard.dtype} of shape {shard.shape}; use jax.lax.axis_index"
            )
    elif checks.integer("shard", shard, minimum=0) >= num_shards:
        raise ValueError(f"shard must be below num_shards = {num_shards}, got {shard}; places count from 0")


def _run_tokens(num_shards: int, page_size: int, pages_per_run: int) -> int:
    num_shards = checks.integer("num_shards", num_shards, minimum=1)
    page_size = checks.integer("page_size", page_size, minimum=1)
    pages_per_run = checks.integer("pages_per_run", pages_per_run, minimum=1)
    if num_shards * page_size * pages_per_run > checks.MAX_TOKENS:
        raise ValueError(
            f"pages_per_run must keep num_shards * page_size * pages_per_run below 2**31, got {pages_per_run} with "
            f"{num_shards} shards and pages of {page_size}; a run no longer than a block table is as good"
        )
    return page_size * pages_per_run


def _held(lengths: jax.Array, shard: int | jax.Array, num_shards: int, run: int) -> jax.Array:
    lengths = jnp.maximum(lengths, 0)
    cycles, rest = lengths // (run * num_shards), lengths % (run * num_shards)
    return cycles * run + jnp.clip(rest - run * jnp.asarray(shard, jnp.int32), 0, run)


@dataclasses.dataclass(frozen=True)
class MLAMesh:
    """A mesh and what its axes do, with the ops of this package on it.

    Arrays are given and returned whole, with the shapes of one device's op; `sharding` tells where their parts lie.
    Axes without a role repeat the work. The ops can be jitted, scanned and differentiated (with
    `implementation="xla"`) like those of one device.

    Args:
      mesh: from `jax.make_mesh`; its axes may all be Auto or all be Explicit.
      heads: the axis over which query heads are divided (tensor parallel). Every device of it holds the same pages,
        unless it is the context axis as well: then queries are gathered over it, and outputs reduced and scattered.
      batch: the axis over which sequences are divided (data parallel). Every device of it has a pool of its own, and
        the block tables of its sequences count pages from the first one of that pool.
      context: the axis over which the keys of every sequence are divided (context parallel), in runs of pages: page j
        of a sequence lies on device `j // pages_per_run % num_shards`, and `block_table[i, j]` counts from the first
        page of that device's pool.
      pages_per_run: see context; 1 divides even short sequences.

    Raises:
      TypeError, ValueError: not a mesh, or an axis that it does not have, or one axis for roles that exclude each
        other.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_flashmla import kvcache
      >>> from jax_flashmla.sharding import MLAMesh
      >>> mesh = MLAMesh(jax.make_mesh((1, 1), ("data", "model")), batch="data", heads="model")
      >>> k_cache = jax.device_put(kvcache.init_kv_cache(8, "bf16"), mesh.sharding("k_cache"))
      >>> q = jax.device_put(jnp.ones((2, 1, 16, 576), jnp.bfloat16), mesh.sharding("q"))
      >>> table, lengths = jnp.array([[3, 1], [0, 2]], jnp.int32), jnp.array([70, 5], jnp.int32)
      >>> plan = mesh.get_mla_metadata(lengths, 16, 1)
      >>> out, lse = mesh.flash_mla_with_kvcache(q, k_cache, table, lengths, 512, *plan, causal=True)
      >>> out.shape, tuple(out.sharding.spec)
      ((2, 1, 16, 512), ('data', None, 'model'))
    """

    mesh: jax.sharding.Mesh
    heads: str | None = None
    batch: str | None = None
    context: str | None = None
    pages_per_run: int = 1

    def __post_init__(self):
        if not isinstance(self.mesh, jax.sharding.Mesh):
            raise TypeError(f"mesh must be a jax.sharding.Mesh, got {type(self.mesh).__name__}; use jax.make_mesh")
        if len(set(self.mesh.axis_types)) > 1 or AxisType.Manual in self.mesh.axis_types:
            raise ValueError(f"mesh must have Auto axes or Explicit axes and no others, got {self.mesh.axis_types}")
        for role in ("heads", "batch", "context"):
            axis = getattr(self, role)
            if axis is not None and axis not in self.mesh.axis_names:
                raise ValueError(f"{role} must be one of the mesh's axes {self.mesh.axis_names} or None, got {axis!r}")
        for role in ("heads", "context"):
            if self.batch is not None and self.batch == getattr(self, role):
                raise ValueError(f"batch and {role} must be different axes, got {self.batch!r} for both")
        checks.integer("pages_per_run", self.pages_per_run, minimum=1)

    def sharding(self, name: str) -> NamedSharding:
        """Where the parts of an array lie, for `jax.device_put` and `jax.jit(..., out_shardings=...)`.

        Args:
          name: an array argument of `flash_mla_with_kvcache` or `append_kv_cache`; "out" or "softmax_lse"; "x" for what
            has the batch as its first axis.

        Raises:
          ValueError: no array has this name.
        """
        if name not in _ROLES:
            raise ValueError(f"name must be one of {', '.join(_ROLES)}, got {name!r}")
        return NamedSharding(self.mesh, self._spec(name))

    def size(self, role: str) -> int:
        """How many devices divide "heads", "batch", "context", or the pages of a pool ("pages")."""
        return math.prod(self.mesh.shape[axis] for axis in self._axes(role))

    def get_mla_metadata(
        self,
        cache_seqlens: jax.Array,
        num_q_tokens_per_head_k: int,
        num_heads_k: int,
        *,
        batch_invariant: bool = False,
        s_q: int = 1,
        page_size: int | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """`jax_flashmla.get_mla_metadata` on every device for its share: a plan for all layers of a step.

        Args:
          cache_seqlens: int32 `[b]`, keys per sequence on all devices together.
          num_q_tokens_per_head_k, num_heads_k: as for one device: `s_q * h_q // h_kv` and `h_kv`, of all heads.
          batch_invariant: as for one device.
          s_q: query tokens per sequence, where attention is causal; only a context axis needs it.
          page_size: of the pool; only a context axis needs it, and must have it.

        Returns:
          `tile_scheduler_metadata` and `num_splits`, opaque, the devices' plans one behind the other.

        Raises:
          TypeError, ValueError: an argument has the wrong type, dtype or shape, or does not fit the mesh.
        """
        rows = checks.integer("num_q_tokens_per_head_k", num_q_tokens_per_head_k, minimum=1)
        checks.array("cache_seqlens", cache_seqlens, axes="b", dtypes=("int32",))
        self.divides("batch", "cache_seqlens", cache_seqlens.shape[0])
        s_q = checks.integer("s_q", s_q, minimum=1)
        if self.heads != self.context:
            self.divides("heads", "num_q_tokens_per_head_k", rows, letter="s_q * h_q // h_kv")
            rows //= self.size("heads")
        if self.context is not None and page_size is None:
            raise ValueError("page_size must be the pool's where a context axis divides sequences, got None")

        def plan(lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
            if page_size is not None and self.context is not None:
                lengths, _ = self._parts(lengths, s_q, page_size)
            return api.get_mla_metadata(lengths, rows, num_heads_k, batch_invariant=batch_invariant)

        out_specs = self._spec("tile_scheduler_metadata"), self._spec("num_splits")
        return self.shard_map(plan, (self._spec("cache_seqlens"),), out_specs)(cache_seqlens)

    def flash_mla_with_kvcache(self, *args: Any, **kwargs: Any) -> tuple[jax.Array, jax.Array]:
        """`jax_flashmla.flash_mla_with_kvcache` on every device for its share: the same arguments and results.

        Sparse decode (`indices`) knows heads and batch; its slots count from the first page of the device's pool.

        With a context axis every device attends to its own keys, and outputs are joined by their logarithmic sums in
        float32: one maximum and one sum over the axis. The last `s_q - 1` keys of a causal call are another call then,
        of a few pages: which query tokens see them is different on every device.

        Raises:
          TypeError, ValueError, NotImplementedError, RuntimeError: as on one device; and an array cannot be divided,
            or `indices` are used with a context axis.
        """
        return self.shard(api.flash_mla_with_kvcache)(*args, **kwargs)

    def shard(self, attention: Attention) -> Attention:
        """A function with the arguments of `flash_mla_with_kvcache`, that calls another such function on every device.

        Args:
          attention: counts, replaces or wraps `flash_mla_with_kvcache` of one device.
        """
        return functools.partial(self._attend, attention)

    def append_kv_cache(
        self,
        cache: jax.Array,
        latent: jax.Array,
        rope: jax.Array,
        block_table: jax.Array,
        positions: jax.Array,
        *,
        format: str | None = None,
        implementation: str | None = None,
    ) -> jax.Array:
        """Writes the keys of new tokens on the devices that hold them, in place when the cache is donated.

        Args:
          cache: a pool, its pages sharded as `sharding("k_cache")` says.
          latent: bfloat16, float16 or float32 `[b, s, d_latent]`.
          rope: the same dtypes, `[b, s, 64]`.
          block_table: int32 `[b, max_pages]`, as for `flash_mla_with_kvcache`.
          positions: int32 `[b, s]`, each token's place in its sequence; a negative one, or one beyond the table, is
            written nowhere.
          format: static; as for `kvcache.append_kv_cache`. None: plain rows, in the dtype of the cache, by plain XLA.
          implementation: with a format, as for `kvcache.append_kv_cache`.

        Returns:
          The cache with the new rows.

        Raises:
          TypeError, ValueError: an argument has the wrong type, dtype or shape, or cannot be divided.
        """
        checks.array("latent", latent, axes="b, s, d_latent", dtypes=checks.REFERENCE_DTYPES)
        b, s, d_latent = latent.shape
        checks.array("rope", rope, axes="b, s, 64", dtypes=checks.REFERENCE_DTYPES)
        checks.shape("rope", rope, (b, s, 64), axes="b, s, 64", remedy="give the 64 roped channels of every token")
        checks.array("positions", positions, axes="b, s", dtypes=("int32",))
        checks.shape("positions", positions, (b, s), axes="b, s", remedy="give one position per row of latent")
        if format is None:
            arguments.plain_pool("cache", cache, dtypes=checks.REFERENCE_DTYPES, d_qk=d_latent + 64)
            page_size = cache.shape[1]
        else:
            token_bytes = arguments.kv_cache("cache", cache, format).token_bytes
            page_size = page_size_of(cache.shape, token_bytes)
        arguments.block_table(block_table, page_size, b=b)
        self.divides("batch", "latent", b)
        self.divides("pages", "cache", cache.shape[0])

        def append(cache, latent, rope, block_table, positions):
            if self.context is not None:
                place = jax.lax.axis_index(self.context), self.size("context")
                block_table = context_block_table(block_table, *place, pages_per_run=self.pages_per_run)
                options = {"page_size": page_size, "pages_per_run": self.pages_per_run}
                positions = context_positions(positions, *place, **options)
            slots = batch_slots(positions, block_table, page_size=page_size)
            latent, rope = latent.reshape(slots.size, d_latent), rope.reshape(slots.size, 64)
            if format is not None:
                return kvcache.append_kv_cache(cache, latent, rope, slots, format=format, implementation=implementation)
            rows = jnp.concatenate([latent.astype(cache.dtype), rope.astype(cache.dtype)], axis=-1)
            return write_rows(cache, rows, slots)

        names = "k_cache", "latent", "rope", "block_table", "positions"
        in_specs = tuple(self._spec(name) for name in names)
        return self.shard_map(append, in_specs, in_specs[0])(cache, latent, rope, block_table, positions)

    def _attend(self, attention: Attention, *args: Any, **kwargs: Any) -> tuple[jax.Array, jax.Array]:
        bound = _SIGNATURE.bind(*args, **kwargs)
        given = bound.arguments
        causal = checks.flag("causal", given.get("causal", False))
        operands = {name: given[name] for name in _ROLES if given.get(name) is not None}
        self._check(given, operands)

        def call(**changed: Any) -> tuple[jax.Array, jax.Array]:
            local = inspect.BoundArguments(_SIGNATURE, given | changed)  # passes on what was given, in the same way
            return attention(*local.args, **local.kwargs)

        def body(operands: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            if self.context is None:
                return call(**operands)
            return self._attend_to_shard(call, self.context, causal=causal, **operands)

        in_specs = {name: self._spec(name) for name in operands}
        out_specs = self._spec("out"), self._spec("softmax_lse")
        return self.shard_map(body, (in_specs,), out_specs)(operands)

    def _attend_to_shard(self, call, axis, *, causal, q, k_cache, block_table, cache_seqlens, **plan):
        """The same result as on one device, or its heads for this device, from every device's keys."""
        scatter = self.heads == self.context
        if scatter:
            q = jax.lax.all_gather(q, self.heads, axis=2, tiled=True)
        page_size, max_pages = k_cache.shape[1], block_table.shape[1]
        b, s_q, h_q, _ = q.shape
        lengths = jnp.clip(cache_seqlens, 0, jnp.int32(max_pages * page_size))
        place = jax.lax.axis_index(axis), self.size("context")
        table = context_block_table(block_table, *place, pages_per_run=self.pages_per_run)
        tokens = s_q if causal and max_pages else 1
        head, tail = self._parts(lengths, tokens, page_size)
        operands = {"q": q, "k_cache": k_cache, "block_table": table, "cache_seqlens": head, "causal": False, **plan}
        results = [call(**operands)]
        if tokens > 1:
            # A sequence per query token, each with its own length, over the pages from the first one that is not whole.
            columns = -(-(page_size + s_q - 2) // page_size)
            column = head[:, None] // page_size + jnp.arange(columns, dtype=jnp.int32)[None]
            pages = jnp.take_along_axis(table, jnp.minimum(column, table.shape[1] - 1), axis=1)
            operands |= {
                "q": q.reshape(b * s_q, 1, h_q, q.shape[3]),
                "block_table": jnp.repeat(pages, s_q, axis=0),
                "cache_seqlens": tail.reshape(-1),
                **dict.fromkeys(plan),
            }
            out, lse = call(**operands)
            results.append((out.reshape(b, s_q, h_q, out.shape[3]), lse.reshape(b, s_q, h_q).swapaxes(1, 2)))
        return _merge(results, axis, scatter=scatter)

    def _parts(self, lengths: jax.Array, s_q: int, page_size: int) -> tuple[jax.Array, jax.Array]:
        """This device's keys of `[b]` sequences, in two parts.

        Keys that all query tokens see, whole pages of them, `[b]`; and the keys behind those that query token i sees,
        `[b, s_q]`. With one query token all are in the first part.
        """
        shard, num_shards = jax.lax.axis_index(self.context), self.size("context")
        run = _run_tokens(num_shards, page_size, self.pages_per_run)
        held = functools.partial(_held, shard=shard, num_shards=num_shards, run=run)
        if s_q == 1:
            return held(lengths), jnp.zeros_like(lengths)[:, None]
        seen = held(lengths[:, None] - jnp.arange(s_q - 1, -1, -1, dtype=jnp.int32)[None])
        head = seen[:, 0] // page_size * page_size
        return head, seen - head[:, None]

    def _check(self, given: dict[str, Any], operands: dict[str, Any]) -> None:
        if given.get("indices") is None:
            q, k_cache, table, lengths = (given[name] for name in ("q", "k_cache", "block_table", "cache_seqlens"))
            checks.dense_decode(q, k_cache, table, lengths, None, None, given["head_dim_v"])
        elif self.context is not None:
            raise NotImplementedError(
                "indices are not supported with a context axis; divide heads or the batch of sparse decode"
            )
        else:
            arguments.pool("k_cache", given["k_cache"])
        for name, value in operands.items():
            self._divides_all(name, value)
        k_cache = given["k_cache"]
        if self.heads is not None and k_cache.ndim == 4 and k_cache.shape[2] != 1:
            raise ValueError(
                f"k_cache must have h_kv = 1 where heads are divided, got shape {k_cache.shape}; all query heads of "
                "MLA share the rows of the cache"
            )
        if "num_splits" in operands:
            expected = (self.size("pages") * (given["q"].shape[0] // self.size("batch") + 1),)
            remedy = "pass the results of the mesh's get_mla_metadata for the same cache_seqlens"
            checks.shape("num_splits", given["num_splits"], expected, axes="devices * (b + 1)", remedy=remedy)

    def _divides_all(self, name: str, value: Any) -> None:
        """Whether all axes of an operand that have a role can be divided."""
        if not isinstance(value, (jax.Array, np.ndarray)):
            raise TypeError(f"{name} must be an array, got {type(value).__name__}; use jnp.asarray")
        roles = _ROLES[name]
        if value.ndim < len(roles):
            raise ValueError(f"{name} must have at least {len(roles)} axes, got shape {value.shape}; reshape it")
        for role, size in zip(roles, value.shape, strict=False):
            if role is not None:
                self.divides(role, name, size)

    def divides(self, role: str, name: str, size: Any, *, letter: str | None = None) -> None:
        """Refuses, in words, a size that the devices of a role cannot divide.

        Args:
          role: "batch", "heads" or "pages".
          name: of the array.
          size: of its axis; what is no int yet, as in `jax.export`, passes.
          letter: what the axis is called, when not by its usual letter.

        Raises:
          ValueError: a remainder.
        """
        count = self.size(role)
        if isinstance(size, int) and size % count:
            axes, letter = " and ".join(map(repr, self._axes(role))), letter or _LETTERS[role]
            raise ValueError(
                f"{name} must have {letter} divisible by {count}, the devices on {axes}, got {letter} = {size}; "
                + {"batch": "fill up with sequences of length 0", "heads": "pad the heads"}.get(role, _WHOLE_POOLS)
            )

    def _axes(self, role: str | None) -> tuple[str, ...]:
        axes = (self.batch, self.context) if role == "pages" else (getattr(self, role) if role else None,)
        return tuple(axis for axis in axes if axis is not None)

    def _spec(self, name: str) -> PartitionSpec:
        axes = [self._axes(role) for role in _ROLES[name]]
        return PartitionSpec(*(axis[0] if len(axis) == 1 else axis or None for axis in axes))

    def shard_map(self, body: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`jax.shard_map` over all axes of the mesh; arguments move to their places, where they lie elsewhere."""
        mapped = jax.shard_map(
            body, mesh=None if self._is_current() else self.mesh, in_specs=in_specs, out_specs=out_specs
        )
        if AxisType.Explicit not in self.axis_types():
            return mapped

        def placed(*args: Any) -> Any:  # shard_map moves nothing along Explicit axes
            places = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), in_specs, is_leaf=_is_spec)
            return mapped(*jax.reshard(args, places))

        return placed

    def axis_types(self) -> tuple[AxisType, ...]:
        """Auto or Explicit, of every axis, at this place of the program."""
        return jax.sharding.get_abstract_mesh().axis_types if self._is_current() else self.mesh.axis_types

    def _is_current(self) -> bool:
        """Whether the context has this mesh, whose types of axes `jax.sharding.auto_axes` may have changed there."""
        return dict(jax.sharding.get_abstract_mesh().shape) == dict(self.mesh.shape)


def _is_spec(value: Any) -> bool:
    return isinstance(value, PartitionSpec)


def _merge(results: list[tuple[jax.Array, jax.Array]], axis: str, *, scatter: bool) -> tuple[jax.Array, jax.Array]:
    """Joins attention over the disjoint sets of keys of all devices of an axis, and of several calls on each."""
    peak = functools.reduce(jnp.maximum, (jax.lax.stop_gradient(lse) for _, lse in results))
    peak = jax.lax.pmax(peak, axis)
    shift = jnp.where(peak == -jnp.inf, 0, peak)  # -inf - -inf is NaN
    weights = [jnp.exp(lse - shift) for _, lse in results]
    total = jax.lax.psum(functools.reduce(jnp.add, weights), axis)
    divisor = jnp.where(total == 0, 1, total)

    def part(out: jax.Array, weight: jax.Array) -> jax.Array:
        return out.astype(jnp.float32) * (weight / divisor).swapaxes(1, 2)[..., None]

    out = functools.reduce(jnp.add, (part(out, weight) for (out, _), weight in zip(results, weights, strict=True)))
    lse = jnp.where(total == 0, -jnp.inf, shift + jnp.log(divisor))
    dtype = results[0][0].dtype
    if not scatter:
        return jax.lax.psum(out, axis).astype(dtype), lse
    out = jax.lax.psum_scatter(out, axis, scatter_dimension=2, tiled=True)
    heads = out.shape[2]
    lse = jax.lax.dynamic_slice_in_dim(lse, heads * jax.lax.axis_index(axis), heads, axis=1)
    return out.astype(dtype), lse
