"""What JAX does to a function, done to every op: on four CPU devices, and lowered for CUDA by text."""

import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flashmla import (
    EXPORT_SAFE,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
    kvcache,
    ops,
    testing,
)
from jax_flashmla._primitive import OPS
from jax_flashmla.cases import LISTED, Case
from jax_flashmla.ops.append import batch as fold_append
from jax_flashmla.ops.dense_decode import TARGET as DECODE
from jax_flashmla.ops.dense_decode import batch as fold_decode
from jax_flashmla.ops.gather import batch as fold_gather
from jax_flashmla.ops.schedule import TARGET as SCHEDULE

pytestmark = pytest.mark.usefixtures("small_chunks")

CASE = Case("transforms", (70, 0, 129, 64), s_q=2, h_q=8, causal=True)
INPUTS = tuple(map(np.asarray, testing.make_inputs(CASE, max_pages=4)))
Q, POOL, TABLE, LENGTHS = INPUTS
COLLECTIVES = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")


def decode(q, table, lengths, pool=POOL, **kwargs):
    return flash_mla_with_kvcache(q, pool, table, lengths, 512, causal=True, **kwargs)


def plan(lengths, **kwargs):
    return get_mla_metadata(lengths, 16, 1, **kwargs)


BYTES = np.asarray(
    kvcache.quantize_kv(POOL[..., :512].astype(np.float32), POOL[..., 512:].astype(np.float32), format="fp8_v32")
)
INDICES = np.random.default_rng(0).integers(128, 192, (4, 2, 200), np.int32)  # page 2 of the pool, all in use
assert np.isfinite(POOL[2].astype(np.float32)).all()
COUNTS = np.array([130, 0, 200, 7], np.int32)


def attend_to(q, indices, topk_length, cache=BYTES, **kwargs):
    options = {"is_fp8_kvcache": True, "indices": indices, "topk_length": topk_length}
    return flash_mla_with_kvcache(q, cache, None, None, 512, **options, **kwargs)


def attend_to_rows(q, indices, topk_length, **kwargs):
    return flash_mla_sparse_fwd(q, POOL.reshape(-1, 1, 576), indices, None, topk_length=topk_length, **kwargs)


NEW = np.random.default_rng(0).standard_normal((4, 512), np.float32), np.ones((4, 64), np.float32)
SLOTS = np.array([70, -1, 3, 700], np.int32)


def write_new(latent, rope, slots, cache=BYTES, **kwargs):
    return kvcache.append_kv_cache(cache, latent, rope, slots, format="fp8_v32", **kwargs)


def read_all(table, lengths, cache=BYTES, **kwargs):
    rows = kvcache.gather_kv_cache(cache, table, lengths, total=150, format="fp8_v32", **kwargs)
    return jnp.nan_to_num(rows)  # rolled tables point at slots that hold NaN


# One entry per op; a new op without one fails `test_every_op_has_an_example`.
EXAMPLES = {
    "append": (write_new, (*NEW, SLOTS)),
    "dense_decode": (decode, (Q, TABLE, LENGTHS)),
    "gather": (read_all, (TABLE, LENGTHS)),
    "schedule": (plan, (LENGTHS,)),
    "sparse_decode": (attend_to, (Q, INDICES, COUNTS)),
    "sparse_prefill": (attend_to_rows, (Q[:, 0], INDICES[:, :1], COUNTS)),
}
every_op = pytest.mark.parametrize("name", EXAMPLES)


def assert_same(got, expected):
    """Equal integers and infinities; floats to one bf16 step (2**-8), for XLA may fuse differently around the op."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        tolerance = 2**-7 if jnp.issubdtype(x.dtype, jnp.floating) else 0
        np.testing.assert_allclose(np.float64(x), np.float64(y), rtol=tolerance, atol=tolerance / 4)


def lowered_for_cuda(f, *args):
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def test_every_op_has_an_example():
    assert set(EXAMPLES) == set(OPS)


@every_op
def test_jit_equals_eager(name):
    f, args = EXAMPLES[name]
    assert_same(jax.jit(f)(*args), f(*args))


@every_op
def test_without_jit(name):
    f, args = EXAMPLES[name]
    expected = jax.jit(f)(*args)
    with jax.disable_jit():
        assert_same(f(*args), expected)


@every_op
def test_eval_shape(name):
    f, args = EXAMPLES[name]
    expected = f(*args)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(f, *args)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )


@every_op
def test_vmap_and_vmap_of_vmap(name):
    f, args = EXAMPLES[name]
    # Element e sees the batch rolled by e, and so must give the results rolled by e.
    rolled = [np.stack([np.roll(x, e, axis=0) for e in range(6)]) for x in args]
    expected = [f(*(x[e] for x in rolled)) for e in range(6)]
    expected = jax.tree.map(lambda *xs: np.stack(xs), *expected)
    assert_same(jax.vmap(f)(*rolled), expected)
    nested = [x.reshape(2, 3, *x.shape[1:]) for x in rolled]
    assert_same(jax.vmap(jax.vmap(f))(*nested), jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), expected))


@every_op
def test_vmap_of_nothing(name):
    f, args = EXAMPLES[name]
    expected = jax.tree.map(lambda x: ((0, *x.shape), x.dtype), jax.eval_shape(f, *args))
    results = jax.vmap(f)(*(np.zeros((0, *x.shape), x.dtype) for x in args))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), results) == expected


def test_vmap_without_rows_or_sequences():
    tables, lengths = (np.stack([x, x]) for x in (TABLE, LENGTHS))
    read = functools.partial(kvcache.gather_kv_cache, POOL, total=0, format="bf16")
    assert jax.jit(jax.vmap(read))(tables, lengths).shape == (2, 0, 576)
    metadata, num_splits = jax.jit(jax.vmap(plan))(lengths[:, :0])
    assert metadata.shape[0] == 2 and num_splits.tolist() == [[0], [0]]


@every_op
def test_scan_cond_remat(name):
    f, args = EXAMPLES[name]
    expected = f(*args)

    @jax.jit
    def inside(*args):
        _, scanned = jax.lax.scan(lambda carry, _: (carry, f(*args)), 0, None, length=2)
        chosen = jax.lax.cond(args[-1][0] > 0, f, lambda *args: jax.tree.map(jnp.zeros_like, expected), *args)
        return jax.tree.map(lambda x: x[1], scanned), chosen, jax.checkpoint(f)(*args)

    for got in inside(*args):
        assert_same(got, expected)


@every_op
def test_x64(name):
    f, args = EXAMPLES[name]
    expected = f(*args)
    with jax.enable_x64(True):
        assert_same(jax.jit(f)(*args), expected)


@every_op
@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "cuda")])
def test_export_round_trip(name, platforms, cuda_build):
    f, args = EXAMPLES[name]
    exported = export.export(jax.jit(f), platforms=platforms, disabled_checks=EXPORT_SAFE)(*args)
    again = export.deserialize(exported.serialize())
    assert again.platforms == platforms
    assert ("jax_flashmla." in again.mlir_module()) == ("cuda" in platforms)
    assert_same(again.call(*args), f(*args))


@every_op
def test_export_symbolic_batch(name, cuda_build):
    f, args = EXAMPLES[name]
    (b,) = export.symbolic_shape("b")
    specs = [jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype) for x in args]
    exported = export.export(jax.jit(f), platforms=("cpu", "cuda"), disabled_checks=EXPORT_SAFE)(*specs)
    again = export.deserialize(exported.serialize())
    for size in (2, 4):
        part = [x[:size] for x in args]
        assert_same(again.call(*part), f(*part))


def test_export_symbolic_rows():
    """The number of query tokens, in the plan as in decode."""

    def step(q, table, lengths):
        metadata, num_splits = get_mla_metadata(lengths, q.shape[1] * q.shape[2], 1)
        return decode(q, table, lengths, tile_scheduler_metadata=metadata, num_splits=num_splits)

    shape = export.symbolic_shape(f"{len(Q)}, s, {Q.shape[2]}, 576")
    exported = export.export(jax.jit(step))(jax.ShapeDtypeStruct(shape, Q.dtype), TABLE, LENGTHS)
    assert_same(exported.call(Q, TABLE, LENGTHS), decode(Q, TABLE, LENGTHS))


def test_export_symbolic_invariant_plan(cuda_build):
    f = functools.partial(plan, batch_invariant=True)
    spec = jax.ShapeDtypeStruct(export.symbolic_shape("b"), jnp.int32)
    exported = export.export(jax.jit(f), platforms=("cpu", "cuda"), disabled_checks=EXPORT_SAFE)(spec)
    assert_same(exported.call(LENGTHS), f(LENGTHS))


@pytest.mark.parametrize(
    "axes", [(0, None, None), (None, 0, None), (None, None, 0), (2, 1, None), (1, None, 1), (3, 2, 1)]
)
def test_vmap_in_axes(axes):
    stacked = [
        x if a is None else np.stack([np.roll(x, e, axis=0) for e in range(3)], a)
        for x, a in zip((Q, TABLE, LENGTHS), axes)
    ]
    # Rolling the table without its lengths points at pages that were never written; the values there are NaN.
    pool = np.nan_to_num(POOL.astype(np.float32)).astype(POOL.dtype)
    got = jax.vmap(functools.partial(decode, pool=pool), in_axes=axes)(*stacked)
    for e, got_one in enumerate(zip(*got, strict=True)):
        one = [x if a is None else np.take(x, e, a) for x, a in zip(stacked, axes)]
        assert_same(got_one, decode(*one, pool=pool))


def test_vmap_over_the_pool_is_refused():
    with pytest.raises(ValueError, match=r"k_cache cannot be mapped by vmap, got a mapped axis of size 2.*one pool"):
        jax.vmap(lambda pool: decode(Q, TABLE, LENGTHS, pool))(np.stack([POOL, POOL]))


def folded_operands(lengths, metadata, num_splits, share_plan=False):
    """What the op is bound to when q and lengths are mapped, and the plan unless it is shared."""
    n, b = lengths.shape
    zeros = jnp.zeros((n, b, 1, 1, 1), jnp.float32)
    seen = []

    def bind(*operands):
        seen.extend(operands)
        return [operands[0]]

    mapped = [True, False, False, True, not share_plan, not share_plan]
    fold_decode(bind, n, (zeros, zeros[0], jnp.zeros((b, 2), jnp.int32), lengths, metadata, num_splits), mapped)
    return map(np.asarray, seen)


@pytest.mark.parametrize("share_plan", [True, False])
@pytest.mark.parametrize("batch_invariant", [True, False])
def test_vmap_folds_the_plan(share_plan, batch_invariant):
    lengths = jnp.array([[5000, 0, 300], [64, 9000, 1], [0, 0, 70000]], jnp.int32)
    n, b = lengths.shape
    plans = jax.jit(jax.vmap(functools.partial(plan, batch_invariant=batch_invariant)))(lengths)
    metadata, num_splits = jax.tree.map(lambda x: x[0], plans) if share_plan else plans
    q, _, table, folded_lengths, folded, folded_splits = folded_operands(lengths, metadata, num_splits, share_plan)
    assert q.shape[0] == table.shape[0] == n * b
    np.testing.assert_array_equal(folded_lengths, lengths.ravel())
    parts = folded.shape[0] // n
    expected_splits = [0]
    for e in range(n):
        one = np.array(metadata if share_plan else metadata[e])
        one[:, [0, 2]] += e * b
        np.testing.assert_array_equal(folded[e * parts : (e + 1) * parts], one)
        one = np.asarray(num_splits if share_plan else num_splits[e])
        expected_splits.extend(expected_splits[-1] + np.cumsum(np.diff(one)))
    np.testing.assert_array_equal(folded_splits, expected_splits)


def test_vmap_folds_lists_of_sequences():
    lengths = jnp.array([LISTED] * 2, jnp.int32)
    metadata, num_splits = ops.schedule(lengths, parts=3, row_tiles=1, batch_invariant=False, lists=True)
    *_, both, splits = folded_operands(lengths, metadata, num_splits)
    assert (metadata[..., 4] == -1).all() and not splits.any()
    np.testing.assert_array_equal(both[3:] - both[:3], np.tile([8, 0, 8, 0, 0, 8, 8, 8], (3, 1)))


def mesh(kind):
    return jax.make_mesh((4,), ("x",), axis_types=(kind,), devices=jax.devices("cpu")[:4])


BY_HEADS = (P(None, None, "x"), P(), P(), P()), (P(None, None, "x"), P(None, "x"))
# Data parallel: every device has its own pages, and its tables count from its own first page.
BY_BATCH = (P("x"), P("x"), P("x"), P("x")), (P("x"), P("x"))
sharded = pytest.mark.parametrize("specs", [BY_HEADS, BY_BATCH], ids=["heads", "batch"])
mesh_kinds = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])


def sharded_inputs(specs):
    """Operands of `step`, and what it must return: with a pool per device, the same pages on each."""
    pool = np.tile(POOL, (4, 1, 1, 1)) if specs is BY_BATCH else POOL
    return (Q, pool, TABLE, LENGTHS), decode(Q, TABLE, LENGTHS)


def step(q, pool, table, lengths):
    """A plan and a decode, bare and as the carry of a scan, in which shard_map's type check is strictest."""
    metadata, num_splits = plan(lengths)

    def body(carry, _):
        return decode(q, table, lengths, pool, tile_scheduler_metadata=metadata, num_splits=num_splits), None

    bare = decode(q, table, lengths, pool)
    return jax.lax.scan(body, bare, None, length=2)[0]


@sharded
@mesh_kinds
@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.usefixtures("all_optimizations")
def test_shard_map(specs, kind, implementation):
    operands, expected = sharded_inputs(specs)
    in_specs, out_specs = specs
    m = mesh(kind)
    with jax.set_mesh(m):
        operands = [jax.device_put(x, NamedSharding(m, s)) for x, s in zip(operands, in_specs)]
        body = step
        if implementation == "xla":
            body = lambda q, pool, table, lengths: decode(q, table, lengths, pool, implementation="xla")  # noqa: E731
        f = jax.jit(jax.shard_map(body, in_specs=in_specs, out_specs=out_specs))
        got = f(*operands)
        assert got[0].sharding.is_equivalent_to(NamedSharding(m, out_specs[0]), 4)
        assert_same(jax.device_get(got), jax.device_get(expected))
        assert not COLLECTIVES.search(f.lower(*operands).compile().as_text())


@sharded
def test_shard_map_of_vmap(specs):
    operands, expected = sharded_inputs(specs)
    in_specs, out_specs = specs
    body = jax.vmap(lambda q, pool, table, lengths: decode(q, table, lengths, pool), in_axes=(0, None, None, None))
    in_specs = (P(None, *in_specs[0]), *in_specs[1:])
    with jax.set_mesh(mesh(AxisType.Auto)):
        f = jax.jit(jax.shard_map(body, in_specs=in_specs, out_specs=tuple(P(None, *s) for s in out_specs)))
        got = f(np.stack([operands[0], operands[0]]), *operands[1:])
    assert_same(jax.tree.map(lambda x: np.asarray(x)[1], got), jax.device_get(expected))


@pytest.mark.parametrize("name", ["dense_decode", "sparse_decode", "sparse_prefill"])
def test_vmap_of_shard_map_over_lengths(name):
    """How far a loop goes is another number for every element then."""
    example, operands = EXAMPLES[name]
    op = functools.partial(example, implementation="xla")
    with jax.set_mesh(mesh(AxisType.Auto)):
        f = jax.vmap(jax.shard_map(op, in_specs=(P("x"),) * 3, out_specs=P("x")))
        got = jax.jit(f)(*(np.stack([x, x[::-1]]) for x in operands))
    assert_same(jax.tree.map(lambda x: np.asarray(x)[1][::-1], got), jax.device_get(op(*operands)))


@sharded
def test_shard_map_lowers_for_cuda(specs, cuda_build):
    operands, _ = sharded_inputs(specs)
    in_specs, out_specs = specs
    with jax.set_mesh(mesh(AxisType.Auto)):
        text = lowered_for_cuda(jax.shard_map(step, in_specs=in_specs, out_specs=out_specs), *operands)
    assert f"@{DECODE}" in text and f"@{SCHEDULE}" in text
    local_heads = 2 if specs is BY_HEADS else 8
    local_b = 4 if specs is BY_HEADS else 1
    assert f"tensor<{local_b}x2x{local_heads}x512xbf16>" in text


@sharded
def test_export_from_four_devices(specs, cuda_build):
    operands, expected = sharded_inputs(specs)
    in_specs, out_specs = specs
    m = mesh(AxisType.Auto)
    with jax.set_mesh(m):
        operands = [jax.device_put(x, NamedSharding(m, s)) for x, s in zip(operands, in_specs)]
        f = jax.jit(jax.shard_map(step, in_specs=in_specs, out_specs=out_specs))
        exported = export.export(f, platforms=("cpu", "cuda"), disabled_checks=EXPORT_SAFE)(*operands)
        again = export.deserialize(exported.serialize())
        assert again.nr_devices == 4
        assert_same(jax.device_get(jax.jit(again.call)(*operands)), jax.device_get(expected))


def test_forward_only():
    match = "dense_decode is forward-only.*stop_gradient.*implementation='xla'"
    loss = lambda q, **kwargs: decode(q, TABLE, LENGTHS, **kwargs)[0].astype(jnp.float32).sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match=match):
        jax.grad(loss)(Q)
    with pytest.raises(NotImplementedError, match=match):
        jax.jvp(lambda pool: decode(Q, TABLE, LENGTHS, pool), (POOL,), (POOL,))
    with pytest.raises(NotImplementedError, match=match):
        jax.grad(jax.jit(jax.checkpoint(loss)))(Q)
    weighted = lambda w: (w * loss(jax.lax.stop_gradient(Q))).sum()  # noqa: E731
    assert jax.grad(weighted)(jnp.ones(())) == loss(Q)
    assert np.isfinite(np.float32(jax.jit(jax.grad(functools.partial(loss, implementation="xla")))(Q))).all()


def test_plan_is_constant_under_grad():
    loss = lambda w: w * plan(LENGTHS)[1].astype(jnp.float32).sum()  # noqa: E731
    assert np.isfinite(jax.grad(loss)(1.0))


def test_cuda_lowering_on_a_cpu_machine(cuda_build):
    metadata, num_splits = plan(LENGTHS)
    with_plan = lambda *args: decode(*args, tile_scheduler_metadata=metadata, num_splits=num_splits)  # noqa: E731
    text = lowered_for_cuda(with_plan, Q, TABLE, LENGTHS)
    assert text.count(f"@{DECODE}") == 1 and SCHEDULE not in text
    (call,) = [line for line in text.splitlines() if f"@{DECODE}(" in line]
    assert "causal = true" in call
    assert re.search(r"softmax_scale = 0\.0416\d*(e-?\d+)? : f32", call)
    assert "(tensor<4x2x8x576xbf16>" in call
    # 132 parts on an assumed H200: 131 inner boundaries and at most one more partial result per sequence.
    assert "tensor<4x2x8x512xbf16>, tensor<4x8x2xf32>, tensor<135x1x16x512xf16>, tensor<135x1x16x4xf32>" in call


def test_cuda_lowering_plans_when_no_plan_is_given(cuda_build):
    text = lowered_for_cuda(decode, Q, TABLE, LENGTHS)
    assert text.count(f"@{DECODE}(") == 1 and text.count(f"@{SCHEDULE}(") == 1
    assert "clamp" in text or ("minimum" in text and "maximum" in text)  # lengths, to the table, before planning
    folded = lowered_for_cuda(jax.vmap(decode, in_axes=(0, None, None)), np.stack([Q, Q, Q]), TABLE, LENGTHS)
    assert folded.count(f"@{DECODE}(") == 1 and folded.count(f"@{SCHEDULE}(") == 1
    assert "tensor<12x2x8x512xbf16>" in folded


def test_cuda_lowering_of_plans(cuda_build):
    (call,) = [line for line in lowered_for_cuda(plan, LENGTHS).splitlines() if f"@{SCHEDULE}(" in line]
    assert "batch_invariant = false" in call and "tensor<1x132x8xi32>, tensor<1x5xi32>" in call
    invariant = functools.partial(plan, batch_invariant=True)
    (call,) = [line for line in lowered_for_cuda(invariant, LENGTHS).splitlines() if f"@{SCHEDULE}(" in line]
    assert "batch_invariant = true" in call and "tensor<1x64x8xi32>, tensor<1x5xi32>" in call


def test_cuda_lowering_of_float32_takes_the_reference(cuda_build):
    f = functools.partial(decode, pool=POOL.astype(np.float32))
    assert "jax_flashmla" not in lowered_for_cuda(f, Q.astype(np.float32), TABLE, LENGTHS)


def test_cuda_lowering_of_cache_operations(cuda_build):
    """One call, which writes into its operand; vmap folds pools, tokens and tables into one call as well."""
    append, gather = OPS["append"].target, OPS["gather"].target
    alias = r"output_operand_aliases = \[#stablehlo\.output_operand_alias<.*operand_index = 0"
    write = functools.partial(write_new, implementation="cuda")
    (call,) = [line for line in lowered_for_cuda(write, *NEW, SLOTS).splitlines() if f"@{append}(" in line]
    assert re.search(alias, call) and f"tensor<{'x'.join(map(str, BYTES.shape))}xui8>" in call
    new = [np.stack([x, x, x]) for x in (*NEW, SLOTS, BYTES)]
    (call,) = [line for line in lowered_for_cuda(jax.vmap(write), *new).splitlines() if f"@{append}(" in line]
    assert "tensor<12x512xf32>, tensor<12x64xf32>, tensor<12xi32>" in call
    mixed = lowered_for_cuda(write, NEW[0].astype(jnp.bfloat16), NEW[1], SLOTS)
    assert "tensor<4x512xf32>, tensor<4x64xf32>" in mixed  # the kernel takes one dtype for both

    read = functools.partial(read_all, implementation="cuda")
    (call,) = [line for line in lowered_for_cuda(read, TABLE, LENGTHS).splitlines() if f"@{gather}(" in line]
    assert "tensor<1x4x4xi32>, tensor<1x4xi32>" in call and "tensor<1x150x576xbf16>" in call
    tables = np.stack([TABLE, TABLE])
    text = lowered_for_cuda(jax.vmap(read, in_axes=(0, None)), tables, LENGTHS)
    assert text.count(f"@{gather}(") == 1 and "tensor<2x150x576xbf16>" in text


def test_vmap_folds_caches():
    """What the kernels get under vmap: pools one behind the other, and slots and pages that move along."""
    slots = np.array([[3, -1], [8, 7], [0, 2**31 - 1]], np.int32)
    seen = []

    def bind(*operands):
        seen.append(operands)
        return [operands[0] if len(operands) == 4 else operands[1]]  # as large as the cache, or as the table

    pools = jnp.zeros((3, 2, 4, 1, 576), jnp.bfloat16)
    operands = pools, jnp.zeros((3, 2, 512)), jnp.zeros((2, 64)), slots
    (cache,) = fold_append(bind, 3, operands, [True, True, False, True])
    assert cache.shape == pools.shape and seen[0][0].shape == (6, 4, 1, 576) and seen[0][2].shape == (6, 64)
    assert seen[0][3].tolist() == [3, -1, -1, 15, 16, -1]
    tables = np.array([[[0, 2]], [[1, -1]], [[2**31 - 1, 1]]], np.int32)[:, None]
    fold_gather(bind, 3, (pools, tables, np.ones((1, 1), np.int32)), [True, True, False])
    assert seen[1][1].tolist() == [[[0, -1]], [[3, -1]], [[-1, 5]]] and seen[1][2].shape == (3, 1)
    with pytest.raises(ValueError, match=r"append: the caches of all elements.*fewer than 2\*\*31 tokens"):
        big = jax.ShapeDtypeStruct((3, 2**18, 2**12, 1, 576), jnp.bfloat16)
        jax.eval_shape(lambda *x: fold_append(bind, 3, x, [True] * 4), big, *operands[1:])


CACHE_SCRIPT = """
import sys, jax, jax.numpy as jnp
hits = []
jax.monitoring.register_event_listener(lambda event, **kwargs: hits.append(event))
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
from jax_flashmla import flash_mla_with_kvcache
with jax.default_device(jax.devices(sys.argv[2])[0]):
    q, pool = jnp.ones((1, 1, 8, 576), jnp.bfloat16), jnp.ones((2, 64, 1, 576), jnp.bfloat16)
    table, lengths = jnp.array([[1]], jnp.int32), jnp.array([60], jnp.int32)
    hits.clear()
    step = jax.jit(lambda *args: flash_mla_with_kvcache(*args, 512))
    assert step(q, pool, table, lengths)[0].sum() == 8 * 512
print(hits.count("/jax/compilation_cache/cache_hits"), hits.count("/jax/compilation_cache/cache_misses"))
"""


@pytest.mark.parametrize("platform", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_second_process_hits_the_compilation_cache(tmp_path, platform):
    run = [sys.executable, "-c", CACHE_SCRIPT, str(tmp_path), platform]
    first, second = (subprocess.run(run, capture_output=True, text=True, check=True).stdout.split() for _ in range(2))
    assert first[0] == "0" and int(first[1]) > 0
    assert int(second[0]) > 0 and second[1] == "0"
