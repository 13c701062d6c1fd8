"""The CUDA kernel: against float64, no worse than jnp in the same dtype, and the same bits under every circumstance."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import export

from jax_flashmla import EXPORT_SAFE, flash_mla_with_kvcache, get_mla_metadata, ops, testing
from jax_flashmla.cases import BY_NAME, CASES, IRREGULAR, LISTED, Case

pytestmark = pytest.mark.gpu

COSINE_TOLERANCE = 5e-6
LSE_TOLERANCE = 1e-5  # relative: float32 sums of up to some thousand exponentials
ERROR_RATIO = 2  # the kernel may round P and sum in another order than jnp, and nothing worse


@functools.partial(jax.jit, static_argnames=("causal", "implementation", "batch_invariant", "softmax_scale"))
def decode(inputs, causal=False, implementation="cuda", batch_invariant=None, softmax_scale=None):
    """batch_invariant None: no plan is passed."""
    q, pool, _, lengths = inputs
    plan = None, None
    if batch_invariant is not None:
        rows = q.shape[1] * q.shape[2] // pool.shape[2]
        plan = get_mla_metadata(lengths, rows, pool.shape[2], batch_invariant=batch_invariant)
    return flash_mla_with_kvcache(
        *inputs, 512, *plan, softmax_scale=softmax_scale, causal=causal, implementation=implementation
    )


def on_gpu(inputs):
    return testing.Inputs(*map(jnp.asarray, inputs))


def assert_same_bits(got, expected):
    for x, y in zip(jax.device_get(got), jax.device_get(expected), strict=True):
        np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8))


def check(got, inputs, *, causal, against=None, **kwargs):
    assert_close(got, testing.dense_decode_f64(*jax.device_get(inputs), causal=causal, **kwargs), against)


def assert_close(got, exact, against=None):
    """`against`: the same call through the reference, in the same dtype and on the same device."""
    (out, lse), (exact_out, exact_lse) = jax.device_get(got), exact
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(exact_lse))
    finite = np.isfinite(exact_lse)
    np.testing.assert_allclose(lse[finite], exact_lse[finite], rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)
    assert np.isfinite(np.float32(out)).all()
    assert (out.swapaxes(1, 2)[~finite] == 0).all()
    assert testing.cosine_difference(out, exact_out) <= COSINE_TOLERANCE
    if against is not None:
        assert testing.max_error_ratio(out, np.asarray(against[0]), exact_out) <= ERROR_RATIO


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case):
    inputs = on_gpu(testing.make_inputs(case))
    got = decode(inputs, case.causal)
    check(got, inputs, causal=case.causal, against=decode(inputs, case.causal, "xla"))
    # Passing the plan changes nothing, and cutting elsewhere stays right.
    assert_same_bits(decode(inputs, case.causal, batch_invariant=False), got)
    check(decode(inputs, case.causal, batch_invariant=True), inputs, causal=case.causal)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seqlens=st.lists(st.integers(0, 1500), min_size=1, max_size=9),
    s_q=st.integers(1, 9),
    group=st.integers(1, 70),
    h_kv=st.integers(1, 3),
    d_qk=st.sampled_from([576, 512]),
    page_size=st.sampled_from([16, 32, 64, 128, 256]),
    causal=st.booleans(),
    dtype=st.sampled_from(["bfloat16", "float16"]),
    seed=st.integers(0, 100),
)
def test_drawn_shapes(seqlens, s_q, group, h_kv, d_qk, page_size, causal, dtype, seed):
    case = Case("drawn", tuple(seqlens), s_q, group * h_kv, h_kv, d_qk, page_size, causal, dtype)
    inputs = on_gpu(testing.make_inputs(case, seed))
    check(decode(inputs, causal), inputs, causal=causal)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.135])
def test_softmax_scale(scale):
    case = BY_NAME["edges_causal_2"]
    inputs = on_gpu(testing.make_inputs(case))
    check(decode(inputs, case.causal, softmax_scale=scale), inputs, causal=case.causal, softmax_scale=scale)


def test_scores_far_from_zero():
    """Maxima that rise and fall by hundreds from block to block: the rescaling, and no overflow in base 2."""
    case = Case("steep", (1500, 700), h_q=16)
    q, pool, table, lengths = testing.make_inputs(case)
    slope = np.linspace(-40, 40, pool.shape[0], dtype=np.float32)[:, None, None, None]
    pool = (pool.astype(np.float32) + slope).astype(pool.dtype)
    q = (np.abs(q.astype(np.float32)) * np.linspace(-1, 1, 16)[:, None]).astype(q.dtype)
    inputs = on_gpu(testing.Inputs(q, pool, table, lengths))
    out, lse = jax.device_get(decode(inputs))
    exact_out, exact_lse = testing.dense_decode_f64(*jax.device_get(inputs))
    np.testing.assert_allclose(lse, exact_lse, rtol=LSE_TOLERANCE)
    reference = np.asarray(decode(inputs, implementation="xla")[0])
    assert testing.max_error_ratio(out, reference, exact_out) <= ERROR_RATIO


REPEATED = ["irregular_128_causal_2", "batch_33_skewed", "one_long", "heads_126_kv_3"]


@pytest.mark.parametrize("name", REPEATED)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_twenty_repetitions_are_bit_equal(name, batch_invariant):
    case = BY_NAME[name]
    inputs = on_gpu(testing.make_inputs(case))
    first = decode(inputs, case.causal, batch_invariant=batch_invariant)
    for _ in range(20):
        assert_same_bits(decode(inputs, case.causal, batch_invariant=batch_invariant), first)


def test_batch_invariant():
    """Every sequence alone, and in batches of other sizes and neighbours: the same bits."""
    case = Case("invariant", (4096, *IRREGULAR, 2500, 9000), h_q=64, s_q=2, causal=True)
    inputs = testing.make_inputs(case)
    whole = jax.device_get(decode(on_gpu(inputs), True, batch_invariant=True))
    order = np.random.default_rng(0).permutation(case.b)
    for chosen in (*([i] for i in range(case.b)), order[:5], order[3:]):
        q, table, lengths = (x[np.array(chosen)] for x in (inputs.q, inputs.block_table, inputs.cache_seqlens))
        part = testing.Inputs(q, inputs.k_cache, table, lengths)
        assert_same_bits(decode(on_gpu(part), True, batch_invariant=True), [x[np.array(chosen)] for x in whole])


def test_pool_larger_than_4_gib():
    """Offsets need 64 bits: the pages in use stand at the ends and around 2**31 and 2**32 elements and bytes."""
    page = 64 * 576
    num_pages = 2**32 // page + 1000  # 8 GiB
    used = sorted({0, num_pages - 1, *(2**k // page + d for k in (30, 31, 32) for d in (-1, 0, 1))})
    case = Case("large", (64 * len(used), 100, 64), h_q=64)
    q, small, table, lengths = testing.make_inputs(case)
    order = np.random.default_rng(0).permutation(used)
    own = table[0, : len(used)].copy()
    table[0, : len(used)] = order
    shared = {int(a): int(b) for a, b in zip(own, order, strict=True)}
    table[1, :2], table[2, 0] = order[:2], order[-1]
    fill = jax.jit(lambda rows, at: jnp.full((num_pages, 64, 1, 576), jnp.nan, jnp.bfloat16).at[at].set(rows))
    pool = fill(jnp.asarray(small[list(shared)]), jnp.asarray(list(shared.values()), jnp.int32))
    got = decode(testing.Inputs(q, pool, table, lengths))
    del pool
    # The oracle sees only the pages in use, under new numbers.
    small_table = np.full_like(table, -1)
    for new, old in enumerate(shared.values()):
        small_table[table == old] = new
    check(got, testing.Inputs(q, small[list(shared)], small_table, lengths), causal=False)


@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_pages_outside_the_pool_are_ignored(page_size):
    case = Case("bad_pages", (1000, 300, 300, 300, 64), h_q=16, s_q=2, causal=True, page_size=page_size)
    inputs = testing.make_inputs(case)
    for i, page in enumerate((-1, 2147480000, -(2**31), len(inputs.k_cache))):
        inputs.block_table[i, i // 2] = page
    inputs.block_table[4] = -1
    check(decode(on_gpu(inputs), True), inputs, causal=True)


@pytest.mark.parametrize("batch_invariant", [None, False, True])
def test_lengths_beyond_the_table(batch_invariant):
    case = Case("full", (512, 512, 0, 512), h_q=16)
    inputs = testing.make_inputs(case, max_pages=8)
    beyond = inputs._replace(cache_seqlens=np.array([513, 2**31 - 1, -(2**31), 70000], np.int32))
    for causal in (False, True):
        check(decode(on_gpu(beyond), causal, batch_invariant=batch_invariant), beyond, causal=causal)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_nan_in_a_query_stays_in_its_row(batch_invariant):
    inputs = testing.make_inputs(Case("nan", (2000, 70), h_q=16))
    inputs.q[0, 0, 3, 100] = np.nan
    out, lse = map(np.asarray, decode(on_gpu(inputs), batch_invariant=batch_invariant))
    expected = np.zeros((2, 16), bool)
    expected[0, 3] = True
    np.testing.assert_array_equal(np.isnan(lse[..., 0]), expected)
    np.testing.assert_array_equal(np.isnan(np.float32(out[:, 0])).all(axis=-1), expected)
    np.testing.assert_array_equal(np.isnan(np.float32(out[:, 0])).any(axis=-1), expected)


def test_one_plan_serves_all_layers():
    case = BY_NAME["irregular_128"]
    plan = get_mla_metadata(np.array(case.seqlens, np.int32), 128, 1)
    for seed in range(3):
        inputs = on_gpu(testing.make_inputs(case, seed))
        got = flash_mla_with_kvcache(*inputs, 512, *plan, implementation="cuda")
        assert_same_bits(got, decode(inputs))


@pytest.mark.parametrize("garbage", ["random", "listed", "huge", "negative", "late", "last", "stale"])
def test_garbage_plans_do_not_crash(garbage):
    """The result is meaningless then, but nothing is read or written out of bounds, and the next call is right."""
    case = BY_NAME["irregular_128"]
    inputs = on_gpu(testing.make_inputs(case))
    metadata, num_splits = jax.device_get(get_mla_metadata(inputs.cache_seqlens, 128, 1))
    rng = np.random.default_rng(0)
    bits = np.iinfo(np.int32)
    if garbage == "random":
        metadata = rng.integers(-20, 20, metadata.shape, np.int32)
        num_splits = rng.integers(-20, 200, num_splits.shape, np.int32)
    elif garbage == "listed":
        metadata = rng.integers(bits.min, bits.max, metadata.shape, np.int32)
        metadata[:, 0], metadata[:, 4] = rng.integers(-2, case.b + 2, len(metadata)), -1
        metadata[::2, 2] = metadata[::2, 0] + rng.integers(-1, 6, len(metadata[::2]))
    elif garbage == "huge":
        metadata, num_splits = np.full_like(metadata, bits.max), np.full_like(num_splits, bits.max)
    elif garbage == "negative":
        metadata, num_splits = np.full_like(metadata, bits.min), np.full_like(num_splits, bits.min)
    elif garbage in ("late", "last"):  # a first block whose tokens no int32 can count
        metadata = np.zeros_like(metadata)
        metadata[:, 1:3] = {"late": 2**25, "last": bits.max}[garbage], case.b
    else:  # the plan of lengths that are no more
        longer = np.full(case.b, 100000, np.int32)
        metadata, num_splits = get_mla_metadata(longer, 128, 1)
    jax.block_until_ready(flash_mla_with_kvcache(*inputs, 512, metadata, num_splits, implementation="cuda"))
    check(decode(inputs), inputs, causal=False)


@pytest.mark.parametrize("s_q, h_q, dtype", [(1, 16, "bfloat16"), (3, 65, "bfloat16"), (2, 16, "float16")])
def test_parts_that_list_sequences(s_q, h_q, dtype):
    case = Case("listed", LISTED, s_q, h_q, causal=s_q > 1, dtype=dtype)
    inputs = on_gpu(testing.make_inputs(case))
    lengths = jnp.stack([inputs.cache_seqlens, inputs.cache_seqlens[::-1]])
    metadata, num_splits = ops.schedule(lengths, parts=3, row_tiles=1, batch_invariant=False, lists=True)
    assert (metadata[..., 4] == -1).all() and not num_splits.any()

    def one(q, table, lengths, *plan):
        return flash_mla_with_kvcache(
            q, inputs.k_cache, table, lengths, 512, *plan, causal=case.causal, implementation="cuda"
        )

    got = one(inputs.q, inputs.block_table, lengths[0], metadata[0], num_splits[0])
    check(got, inputs, causal=case.causal, against=decode(inputs, case.causal, "xla"))
    both = [jnp.stack([x, x[::-1]]) for x in (inputs.q, inputs.block_table)]
    mapped = jax.vmap(one)(*both, lengths, metadata, num_splits)
    assert_same_bits([x[0] for x in mapped], got)
    assert_same_bits([x[1][::-1] for x in mapped], got)


def test_unequal_lengths_are_listed():
    """As many sequences as a server has, and the plan of this card."""
    lengths = np.random.default_rng(0).normal(700, 150, 132).clip(1).astype(int)
    inputs = on_gpu(testing.make_inputs(Case("served", tuple(lengths.tolist()), h_q=65)))
    assert (get_mla_metadata(inputs.cache_seqlens, 65, 1)[0][:, 4] == -1).all()
    check(decode(inputs, batch_invariant=False), inputs, causal=False, against=decode(inputs, implementation="xla"))


@pytest.mark.parametrize("plan", ["inside", "mapped", "shared"])
def test_vmap(plan):
    case = Case("vmap", (700, 0, 65), h_q=16, s_q=2, causal=True)
    inputs = on_gpu(testing.make_inputs(case))
    rolled = [jnp.stack([jnp.roll(x, e, axis=0) for e in range(3)]) for x in (inputs.q, inputs.block_table)]
    # With the plan shared, all elements need the same lengths, so only q is rolled.
    lengths = jnp.stack([jnp.roll(inputs.cache_seqlens, e) for e in range(3)])
    metadata = num_splits = None
    if plan == "mapped":
        metadata, num_splits = jax.vmap(lambda lengths: get_mla_metadata(lengths, 32, 1))(lengths)
    elif plan == "shared":
        metadata, num_splits = get_mla_metadata(inputs.cache_seqlens, 32, 1)
        rolled[1] = jnp.stack([inputs.block_table] * 3)
        lengths = jnp.stack([inputs.cache_seqlens] * 3)

    def one(q, table, lengths, metadata, num_splits):
        return flash_mla_with_kvcache(
            q, inputs.k_cache, table, lengths, 512, metadata, num_splits, causal=True, implementation="cuda"
        )

    axis = 0 if plan == "mapped" else None
    got = jax.vmap(one, in_axes=(0, 0, 0, axis, axis))(*rolled, lengths, metadata, num_splits)
    for e in range(3):
        element = testing.Inputs(rolled[0][e], inputs.k_cache, rolled[1][e], lengths[e])
        check([x[e] for x in got], element, causal=True)
        if plan != "inside":  # the same plan, so the same bits; a plan for the folded batch cuts elsewhere
            assert_same_bits([x[e] for x in got], decode(element, True))


LAYERS = 61


def chain(inputs, layers=LAYERS):
    """As in a model: one plan, and layers that wait for each other."""
    q, pool, table, lengths = inputs
    plan = get_mla_metadata(lengths, q.shape[2], 1)
    total = jnp.zeros((), jnp.float32)
    for _ in range(layers):
        out, lse = flash_mla_with_kvcache(q, pool, table, lengths, 512, *plan, implementation="cuda")
        q = q.at[..., :512].set(out)
        total = total + jnp.where(jnp.isneginf(lse), 0, lse).sum()
    return out, total


def chained_bytes():
    inputs = on_gpu(testing.make_inputs(BY_NAME["irregular_128"]))
    step = jax.jit(chain).lower(inputs).compile()
    runs = [b"".join(np.asarray(x).tobytes() for x in step(inputs)) for _ in range(4)]
    assert len(set(runs)) == 1  # captured on the second run, replayed from then on
    return runs[0]


def test_command_buffers(tmp_path):
    """A chain of layers in one jit becomes CUDA graphs by default, and without them it gives the same bits."""
    bits, captured = [], []
    for name, flags in (("default", ""), ("off", "--xla_gpu_enable_command_buffer=")):
        path, dump = tmp_path / name, tmp_path / f"dump_{name}"
        code = f"import test_dense_decode as t; open({str(path)!r}, 'wb').write(t.chained_bytes())"
        flags = f"{os.environ['XLA_FLAGS']} {flags} --xla_dump_to={dump} --xla_dump_hlo_as_text"
        python_path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
        environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": python_path}
        subprocess.run([sys.executable, "-P", "-c", code], check=True, env=environment)
        bits.append(path.read_bytes())
        # Which of the two XLA writes depends on whether its version forms graphs from HLO or from thunks.
        dumps = [file.read_text(errors="ignore") for file in dump.glob("*jit_chain*.txt")]
        captured.append(any("%command_buffer" in text or "kCommandBuffer" in text for text in dumps))
    assert captured == [True, False]
    assert bits[0] == bits[1] == chained_bytes()


def test_unsplit_layers_wait_for_each_other():
    """Where nothing is split the merge has nothing to do; what follows must wait for the decode kernel all the same."""
    inputs = on_gpu(testing.make_inputs(Case("unsplit", (2048,) * 66, h_q=128)))
    plan = get_mla_metadata(inputs.cache_seqlens, 128, 1)
    assert plan[1][-1] == 0
    q = inputs.q
    for _ in range(8):
        out, _ = jax.block_until_ready(decode(inputs._replace(q=q), batch_invariant=False))
        q = q.at[..., :512].set(out)
    step = jax.jit(functools.partial(chain, layers=8))
    for _ in range(4):
        assert_same_bits(step(inputs)[:1], [out])


@pytest.mark.parametrize(
    "case",
    [
        Case("one", (4096,), h_q=16),
        Case("four", (4096,) * 4, h_q=128),
        Case("sixteen", (4096,) * 16, h_q=20, d_qk=512, dtype="float16"),
        Case("unlike", (*IRREGULAR, 9000, 30000), h_q=40, s_q=2, causal=True),
    ],
    ids=lambda case: case.name,
)
def test_partial_results_of_one_call_are_not_taken_for_those_of_the_next(case):
    """Combine takes them while the kernel that leaves them runs, and the last call's were in the same memory."""
    inputs = on_gpu(testing.make_inputs(case))
    rng = np.random.default_rng(0)
    queries = [jnp.asarray(rng.standard_normal(inputs.q.shape), inputs.q.dtype) for _ in range(16)]
    alone = [jax.device_get(decode(inputs._replace(q=q), case.causal, batch_invariant=False)) for q in queries]
    assert get_mla_metadata(inputs.cache_seqlens, case.s_q * case.h_q, 1)[1][-1] > 0

    @jax.jit
    def all_of(inputs, queries):
        plan = get_mla_metadata(inputs.cache_seqlens, case.s_q * case.h_q, 1)
        return [
            flash_mla_with_kvcache(q, *inputs[1:], 512, *plan, causal=case.causal, implementation="cuda")
            for q in queries
        ]

    for _ in range(20):
        for got, expected in zip(all_of(inputs, queries), alone, strict=True):
            assert_same_bits(got, expected)


def test_scan_and_loop():
    inputs = on_gpu(testing.make_inputs(BY_NAME["edges_causal_2"]))

    @jax.jit
    def scanned(inputs):
        body = lambda carry, _: (carry, flash_mla_with_kvcache(*carry, 512, causal=True, implementation="cuda"))  # noqa: E731
        return jax.tree.map(lambda x: x[-1], jax.lax.scan(body, inputs, None, length=3)[1])

    assert_same_bits(scanned(inputs), decode(inputs, True))


def test_export_round_trip():
    inputs = on_gpu(testing.make_inputs(BY_NAME["edges_causal_2"]))
    f = jax.jit(lambda *inputs: decode(testing.Inputs(*inputs), True))
    (b,) = export.symbolic_shape("b")
    shapes = [x.shape if i == 1 else (b, *x.shape[1:]) for i, x in enumerate(inputs)]
    symbolic = [jax.ShapeDtypeStruct(shape, x.dtype) for shape, x in zip(shapes, inputs, strict=True)]
    for args in (inputs, symbolic):
        exported = export.export(f, platforms=("cuda",), disabled_checks=EXPORT_SAFE)(*args)
        assert_same_bits(export.deserialize(exported.serialize()).call(*inputs), decode(inputs, True))


def test_x64():
    inputs = on_gpu(testing.make_inputs(BY_NAME["edges_causal_2"]))
    expected = decode(inputs, True)
    with jax.enable_x64(True):
        assert_same_bits(flash_mla_with_kvcache(*inputs, 512, causal=True, implementation="cuda"), expected)


def test_float32_runs_through_the_reference():
    case = Case("f32", (130, 0, 7), s_q=2, h_q=4, causal=True, dtype="float32")
    inputs = testing.make_inputs(case)
    out, lse = decode(on_gpu(inputs), True, None)
    exact_out, exact_lse = testing.dense_decode_f64(*inputs, causal=True)
    assert testing.max_error(out, exact_out) <= 1e-5 and testing.max_error(lse, exact_lse) <= 1e-5


def test_no_implementation_is_the_kernel():
    inputs = on_gpu(testing.make_inputs(BY_NAME["edges_causal_2"]))
    assert "jax_flashmla.dense_decode.v2" in decode.lower(inputs, True, None).as_text()
    assert_same_bits(decode(inputs, True, None), decode(inputs, True))


def test_two_gpus_in_one_process():
    devices = jax.devices("cuda")
    if len(devices) < 2:
        pytest.skip("needs two GPUs")
    case = BY_NAME["irregular_128"]
    inputs = testing.make_inputs(case)
    expected = jax.device_get(decode(on_gpu(inputs)))
    placed = [jax.device_put(inputs, device) for device in devices[:2]]
    results = [decode(x) for _ in range(10) for x in placed]
    for got in results:
        assert_same_bits(got, expected)
    P = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices[:2])
    specs = P("x"), P("x"), P("x"), P("x")  # data parallel: every GPU has its own pool
    body = jax.shard_map(lambda *x: decode(testing.Inputs(*x)), mesh=mesh, in_specs=specs, out_specs=(P("x"), P("x")))
    halves = [testing.make_inputs(case._replace(seqlens=case.seqlens[i::2]), i, max_pages=20) for i in range(2)]
    pools = max(len(half.k_cache) for half in halves)
    halves = [
        h._replace(k_cache=np.pad(h.k_cache, ((0, pools - len(h.k_cache)), (0, 0), (0, 0), (0, 0)))) for h in halves
    ]
    got = jax.device_get(jax.jit(body)(*map(np.concatenate, zip(*halves, strict=True))))
    for i, half in enumerate(halves):
        assert_same_bits([x[4 * i : 4 * i + 4] for x in got], decode(on_gpu(half)))
