"""The engine against a model of itself that runs one request at a time, and against the model without an engine.

A probe stands in for sampling in most tests: the next token is a hash of every bit of the logits. One different bit in
one row of a cache, and the tokens differ from there on; so equal tokens mean equal bits.
"""

import collections
import dataclasses
import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

nnx = pytest.importorskip("flax.nnx")

from jax_flashmla import flash_mla_with_kvcache  # noqa: E402
from jax_flashmla.nn import DeepseekConfig, DeepseekForCausalLM, Engine, engine, sample, sampling  # noqa: E402
from jax_flashmla.sharding import MLAMesh  # noqa: E402

pytestmark = pytest.mark.usefixtures("small_chunks")

VOCAB, PAGE = 61, 16
CONFIG = dataclasses.replace(
    DeepseekConfig.v2_lite(),
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,  # one dense, one with experts
    num_attention_heads=2,
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
)
SPARSE_CONFIG = dataclasses.replace(CONFIG, q_lora_rank=24, index_topk=4, index_n_heads=4, num_hidden_layers=1)
# Two pools in all: another number of pages is another shape, and has programs of its own to compile.
SMALL = {"page_size": PAGE, "batch_sizes": (1, 3), "chunk_sizes": (8, 32), "max_seq_len": 80}


def attention(*args, **kwargs):
    """The op; its calls are counted, and each is a layer of a program that is traced."""
    attention.traces += 1
    return flash_mla_with_kvcache(*args, **kwargs)


attention.traces = 0


@functools.cache
def model():
    return DeepseekForCausalLM(CONFIG, dtype=jnp.float32, attention=attention, rngs=nnx.Rngs(3))


@functools.cache
def sparse_model():
    """Two pools per layer. Four tokens are picked, of up to 80."""
    return DeepseekForCausalLM(SPARSE_CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(3))


CACHES = {"dense": (model, None), "sparse": (sparse_model, None), "fp8_v32": (sparse_model, "fp8_v32")}
every_cache = pytest.mark.parametrize("caches", CACHES)
plain_and_fp8 = pytest.mark.parametrize("caches", ["dense", "fp8_v32"])


def invariant_engine(caches="dense", num_pages=7, **options):
    made, format = CACHES[caches]
    e = Engine(made(), num_pages=num_pages, batch_invariant=True, format=format, **SMALL, **options)
    assert {str(pool.dtype) for pool in jax.tree.leaves(e.caches)} == {"float32", *(["uint8"] if format else [])}
    return e


def hash_of_bits(logits, seeds, positions, temperature, top_p):
    """In place of `sample`. Odd factors, so that a change of any single bit of any logit changes the sum."""
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    factors = 2 * jnp.arange(logits.shape[1], dtype=jnp.uint32)[None] + jnp.uint32(2654435761)
    total = (bits * factors).sum(axis=1, dtype=jnp.uint32)
    return ((total ^ (total >> 15)) % VOCAB).astype(jnp.int32)


probed_programs = functools.lru_cache(engine._programs.__wrapped__)  # apart from those that sample


@pytest.fixture
def probed(monkeypatch):
    monkeypatch.setattr(engine, "sample", hash_of_bits)
    monkeypatch.setattr(engine, "_programs", probed_programs)


def check(e):
    """What holds between any two steps."""
    owners = collections.Counter(page for r in e.running for page in set(e.pages.pages(r._sequence)))
    assert e.pages.num_free == e.pages.num_pages - len(owners)
    assert len(e.running) <= e.batch_sizes[-1] and not any(r.done for r in [*e.running, *e.waiting])
    ids = [r.id for r in [*e.running, *e.waiting]]
    assert ids == sorted(ids), "first come, first served, also after a preemption"
    for r in e.running:
        assert r._computed <= e.pages.length(r._sequence) <= e.max_seq_len
        # A page with room for more rows has one owner: nobody writes into what another one reads.
        behind = e.pages.pages(r._sequence)[r._computed // PAGE :]
        assert all(owners[page] == 1 for page in behind)


def drive(e, *, limit=2000):
    """Steps to the end, checking; a queue that never ends is a failure."""
    for _ in range(limit):
        if e.idle:
            assert e.pages.num_free == e.pages.num_pages
            return
        e.step()
        check(e)
    raise AssertionError(f"{len(e.running)} running and {len(e.waiting)} waiting after {limit} steps")


def alone(prompt, max_new_tokens, caches="dense"):
    """The same request with nobody beside it."""
    e = invariant_engine(caches)
    request = e.submit(prompt, max_new_tokens=max_new_tokens)
    drive(e)
    return request.tokens


def workload(seed):
    """Requests as (steps before it comes, prompt, max_new_tokens, steps until it is cancelled or None).

    From a generator of its own, not drawn piece by piece: small examples never run out of pages.
    """
    rng = np.random.default_rng(seed)
    plan = []
    for _ in range(rng.integers(3, 7)):
        text = np.arange(rng.choice([0, 20, 37])) * rng.integers(3, 5) % VOCAB  # one of two, so many begin alike
        prompt = [*text.tolist(), *rng.integers(0, VOCAB, rng.integers(1, 6)).tolist()]
        cancelled_after = int(rng.integers(0, 30)) if rng.random() < 0.2 else None
        plan.append((int(rng.integers(0, 5)), prompt, int(rng.integers(1, 37)), cancelled_after))
    return plan


@settings(max_examples=6, deadline=None, derandomize=True)
@given(num_pages=st.sampled_from([5, 7]), share=st.booleans(), seed=st.integers(0, 2**16))
def run_workload(caches, num_pages, share, seed):
    e = invariant_engine(caches, num_pages, share_prefixes=share)
    plan = workload(seed)
    requests, cancel_at, now = [], collections.defaultdict(list), 0

    def step():
        nonlocal now
        e.step()
        now += 1
        for request in cancel_at[now]:
            e.cancel(request)
        check(e)

    for delay, prompt, max_new_tokens, cancelled_after in plan:
        for _ in range(delay):
            step()
        requests.append(e.submit(prompt, max_new_tokens=max_new_tokens))
        if cancelled_after is not None:
            cancel_at[now + cancelled_after + 1].append(requests[-1])
    while not e.idle:
        step()
        assert now < 2000
    assert e.pages.num_free == num_pages
    for request, (_, prompt, max_new_tokens, _) in zip(requests, plan, strict=True):
        assert request.tokens == alone(prompt, max_new_tokens, caches)[: len(request.tokens)]
        assert request.finish_reason == "cancelled" or len(request.tokens) == max_new_tokens
    seen.update(
        preempted=e.stats.preemptions > 0,
        shared=e.stats.shared_tokens > 0,
        cancelled=any(r.finish_reason == "cancelled" for r in requests),
    )


seen = collections.Counter()


@plain_and_fp8
@pytest.mark.usefixtures("all_optimizations")  # programs that run thousands of times, here and in the tests below
def test_batched_output_is_one_by_one_output_bit_for_bit(probed, caches):
    """Whatever runs beside a request, whenever it comes, however few pages there are, whoever is cancelled."""
    seen.clear()
    run_workload(caches)
    assert min(seen[what] for what in ("preempted", "shared", "cancelled")) >= 2, seen


@every_cache
def test_a_bit_in_the_cache_changes_the_tokens(probed, caches):
    """That equal tokens mean equal bits is what the other tests stand on."""
    tokens = []
    for change in (False, True):
        e = invariant_engine(caches)
        request = e.submit([1, 2, 3], max_new_tokens=8)  # the next step sees four tokens, and so picks all of them
        e.step()
        if change:
            pools, structure = jax.tree.flatten(e.caches)
            at = e.pages.pages(request._sequence)[0], 1, 0
            bits = jax.lax.bitcast_convert_type(pools[0][at], {1: jnp.uint8, 4: jnp.uint32}[pools[0].itemsize])
            pools[0] = pools[0].at[at].set(jax.lax.bitcast_convert_type(bits ^ bits.dtype.type(8), pools[0].dtype))
            e.caches = jax.tree.unflatten(structure, pools)
        drive(e)
        tokens.append(request.tokens)
    assert tokens[0][0] == tokens[1][0] and tokens[0] != tokens[1]


def test_admission_waits_for_pages(probed):
    e = invariant_engine(num_pages=5)
    prompts = [[i + 1] * (PAGE + 4) for i in range(4)]  # two pages each, and one in reserve for whoever runs
    requests = [e.submit(prompt, max_new_tokens=6) for prompt in prompts]
    e.step()
    assert e.running == requests[:2] and list(e.waiting) == requests[2:]
    drive(e)
    for before, after in ((0, 2), (1, 3)):  # each gets the pages of one that ended
        assert requests[before].token_times[-1] < requests[after].token_times[0]
    assert e.stats.preemptions == 0
    assert [request.tokens for request in requests] == [alone(prompt, 6) for prompt in prompts]


@plain_and_fp8
def test_the_youngest_is_preempted_and_comes_back(probed, caches):
    e = invariant_engine(caches, num_pages=5)
    prompts = [[5, 6, 7], [8, 9], [10]]
    requests = [e.submit(prompt, max_new_tokens=38) for prompt in prompts]  # 3 pages each in the end
    drive(e)
    assert requests[0].preemptions == 0 and requests[2].preemptions > 0
    assert e.stats.preemptions == sum(request.preemptions for request in requests)
    assert [request.tokens for request in requests] == [alone(prompt, 38, caches) for prompt in prompts]


@pytest.mark.parametrize("common", [2 * PAGE, 2 * PAGE + 5])
@plain_and_fp8
def test_a_prefix_is_shared_by_page(probed, caches, common):
    e = invariant_engine(caches)
    text = list(range(common))
    first, second = e.submit([*text, 50, 51, 52], max_new_tokens=9), e.submit([*text, 40], max_new_tokens=9)
    while second._sequence is None:
        e.step()
    assert first._sequence is not None and second.shared_tokens == e.stats.shared_tokens == common
    mine, others = e.pages.pages(second._sequence), e.pages.pages(first._sequence)
    assert mine[:2] == others[:2] and set(mine[2:]).isdisjoint(others[2:])
    e.cancel(first)  # what is shared stays with the other
    drive(e)
    assert second.tokens == alone([*text, 40], 9, caches)
    assert first.tokens == alone([*text, 50, 51, 52], 9, caches)[: len(first.tokens)]

    apart = invariant_engine(caches, share_prefixes=False)
    requests = [apart.submit([*text, 40], max_new_tokens=9) for _ in range(2)]
    drive(apart)
    assert apart.stats.shared_tokens == 0 and requests[0].tokens == requests[1].tokens == second.tokens


@pytest.mark.parametrize("caches", ["sparse", "fp8_v32"])
def test_sparse_attention(probed, caches):
    """Pages are shared, copied and taken away, those of the indexer with them; bits are those of one by one."""
    e = invariant_engine(caches)
    text = [i % 7 for i in range(PAGE + 5)]  # ends inside a page
    prompts = [[*text, 50, 51], [*text, 40], [3]]
    requests = [e.submit(prompt, max_new_tokens=n) for prompt, n in zip(prompts, (50, 40, 38))]
    drive(e)
    assert requests[1].shared_tokens == len(text) and e.stats.preemptions
    expected = [alone(r.prompt, r.max_new_tokens, caches) for r in requests]
    assert [request.tokens for request in requests] == expected


@plain_and_fp8
def test_cancellation(probed, caches):
    e = invariant_engine(caches)
    requests = [e.submit([i, i + 1], max_new_tokens=10) for i in range(5)]  # three places
    e.step()
    running, waiting = requests[1], requests[4]
    for request in (running, waiting):
        e.cancel(request)
        check(e)
    assert running.finish_reason == waiting.finish_reason == "cancelled" and waiting.tokens == []
    drive(e)
    e.cancel(running)
    e.cancel(requests[0])  # done, so nothing happens
    assert [request.finish_reason for request in requests] == ["length", "cancelled", "length", "length", "cancelled"]
    assert [requests[i].tokens for i in (0, 2, 3)] == [alone([i, i + 1], 10, caches) for i in (0, 2, 3)]

    first, second = e.submit([1], max_new_tokens=3), e.submit([2], max_new_tokens=3)
    got = []
    for request, token in e.stream():  # cancelled by whoever reads, while its token of this step is still to come
        got.append((request, token))
        e.cancel(second)
    assert [request for request, _ in got] == [first] * 3


def test_a_stream_goes_on_where_the_last_one_was_left(probed):
    e = invariant_engine()
    requests = [e.submit([i], max_new_tokens=3) for i in range(3)]
    got = {request: [] for request in requests}
    for _ in range(4):  # in the middle of a step, and of the last one
        for request, token in e.stream():
            got[request].append(token)
            if sum(map(len, got.values())) % 2:
                break
    for request, token in e.stream():
        got[request].append(token)
    assert got == {request: request.tokens for request in requests}


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_nothing_compiles_after_the_warm_up(caplog, batch_invariant):
    m = model()
    if batch_invariant:  # parameters that are bound to a device, as those of a mesh are
        m = nnx.clone(m)
        nnx.update(m, jax.device_put(nnx.state(m), jax.devices("cpu")[0]))
    shapes = {"page_size": PAGE, "batch_sizes": (1, 2), "chunk_sizes": (8,), "max_seq_len": 260}
    e = Engine(m, num_pages=24, batch_invariant=batch_invariant, **shapes)
    with jax.log_compiles():
        # Decode for each batch size and prefill, for each width of the table; and the page copy.
        programs = e.warm_up()
        assert programs == (2 * 1 + 1 if batch_invariant else 3 * 2 + 1)
        assert sum(r.message.startswith("Compiling ") for r in caplog.records) >= programs
        traces = attention.traces
        caplog.clear()
        text = np.random.default_rng(0).integers(0, VOCAB, 250)
        for i, length in enumerate((1, 5, 40, 250, 17, 2, 45)):
            e.submit(text[:length], max_new_tokens=9, temperature=0.5 * (i % 3), seed=i)
            e.step()
        drive(e)
    assert e.stats.shared_tokens and e.stats.decode_steps > 20
    assert attention.traces == traces and not [r for r in caplog.records if "ompil" in r.message or "trac" in r.message]


def test_tokens_are_those_of_the_model_without_an_engine():
    """In every bucket, with pieces of prompts, preemptions and sharing: the likeliest tokens of plain attention."""
    e = Engine(model(), num_pages=7, **SMALL)
    prompts = [list(range(1, 45)), list(range(1, 30)), [7], [9, 9, 9, 9, 9]]
    requests = [e.submit(prompt, max_new_tokens=25) for prompt in prompts]
    drive(e)
    assert e.stats.preemptions and e.stats.shared_tokens
    for request, prompt in zip(requests, prompts, strict=True):
        check_likeliest(prompt, request.tokens)


mha = jax.jit(lambda tokens: model().mha(tokens))


@jax.jit
def packed(tokens):
    """All at once through an fp8_v32 cache, on one device."""
    caches, lengths = sparse_model().init_caches(5, page_size=PAGE, format="fp8_v32"), jnp.array([80], jnp.int32)
    return sparse_model()(tokens, caches, jnp.arange(5, dtype=jnp.int32)[None], lengths)[0]


def check_likeliest(prompt, generated, logits_of=mha):
    tokens = np.zeros((1, 80), np.int32)
    tokens[0, : len(prompt) + len(generated)] = prompt + generated
    logits = np.asarray(logits_of(tokens))[0, len(prompt) - 1 :][: len(generated)]
    # Near ties may go either way in float32; the chosen one is never further from the top than rounding.
    chosen = np.take_along_axis(logits, np.array(generated)[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(chosen, logits.max(axis=1), atol=1e-4)


def test_the_end_of_a_request():
    e = Engine(model(), num_pages=7, **SMALL)
    free = e.submit([1, 2, 3], max_new_tokens=12)
    drive(e)
    assert free.finish_reason == "length" and len(free.tokens) == 12
    stop = free.tokens[4]
    e = Engine(model(), num_pages=7, eos_token_ids=[stop], **SMALL)
    stopped = e.submit([1, 2, 3], max_new_tokens=12)
    drive(e)
    assert stopped.finish_reason == "eos" and stopped.tokens == free.tokens[: free.tokens.index(stop) + 1]
    full = e.submit([1] * 80, max_new_tokens=1)  # 80 rows, all that max_seq_len allows
    drive(e)
    assert full.done and len(full.tokens) == 1


def test_draws_depend_on_the_seed_and_not_on_the_neighbours():
    def tokens(seeds):
        e = invariant_engine()
        requests = [e.submit([4, 2], max_new_tokens=12, temperature=1.5, top_p=0.95, seed=seed) for seed in seeds]
        drive(e)
        return [request.tokens for request in requests]

    alone, together = tokens([1]), tokens([2, 1, 1, 7])
    assert alone[0] == together[1] == together[2] and len(set(map(tuple, together))) == 3


def test_times_and_rates(monkeypatch):
    clock = iter(np.arange(0.0, 1000.0))  # every look at the clock takes a second
    monkeypatch.setattr(engine, "_now", lambda: float(next(clock)))
    e = Engine(model(), num_pages=7, **SMALL)
    assert e.stats.prefill_tokens_per_second == e.stats.decode_tokens_per_second == 0
    request = e.submit([1, 2, 3], max_new_tokens=4)  # 0; prefill from 1 to 2; decode from 3 to 4, 5 to 6, ...
    assert request.time_to_first_token is None and request.token_latencies == []
    drive(e)
    assert request.time_to_first_token == 4 and request.token_latencies == [2, 2, 2]
    assert (e.stats.prefill_steps, e.stats.prefill_tokens, e.stats.prefill_seconds) == (1, 2, 1)
    assert (e.stats.decode_steps, e.stats.decode_tokens, e.stats.decode_seconds) == (4, 4, 4)
    assert e.stats.prefill_tokens_per_second == 2 and e.stats.decode_tokens_per_second == 1


def test_caches_are_donated():
    e = Engine(model(), num_pages=7, **SMALL)
    for prompt in ([1], [1] * 40):
        before = e.caches
        e.submit(prompt, max_new_tokens=1)
        e.step()
        assert all(cache.is_deleted() for cache in before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_pages": 0}, "num_pages must be at least 1, got 0"),
        ({"page_size": 48}, "page_size must be one of .*, got 48"),
        ({"batch_sizes": ()}, "batch_sizes must be ascending numbers, one at least"),
        ({"chunk_sizes": (32, 8)}, r"chunk_sizes must be ascending numbers, one at least, got \(32, 8\)"),
        ({"max_seq_len": 0}, "max_seq_len must be at least 1"),
        ({"batch_sizes": 4}, "batch_sizes must be numbers, got int 4; give a tuple"),
        ({"eos_token_ids": 5}, "eos_token_ids must be numbers, got int 5; give a tuple"),
        ({"eos_token_ids": [-1]}, "eos_token_ids must be at least 0, got -1"),
        ({"format": "fp8_v32"}, "format must be None for a model without index_topk, got 'fp8_v32'; dense attention"),
        ({"batch_invariant": 1}, "batch_invariant must be True or False"),
        ({"batch_invariant": True, "batch_sizes": (5000,)}, "batch_invariant needs b <= 4095"),
    ],
)
def test_errors_of_the_engine(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Engine(model(), **{"num_pages": 8, **SMALL, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "prompt must be token ids .* encode the text first"),
        ({"prompt": "text"}, "prompt must be token ids"),
        ({"prompt": [0.5]}, "prompt must be token ids"),
        ({"prompt": [VOCAB]}, "prompt must have token ids from 0 to 60, got 61"),
        ({"prompt": [3, -1]}, "prompt must have token ids from 0 to 60, got -1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -0.1}, "temperature must be a number at least 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be a number at least 0, got nan"),
        ({"temperature": 1e39}, r"temperature must be a number at least 0, got 1e\+39"),
        ({"top_p": 0}, "top_p must be a number over 0 and up to 1, got 0"),
        ({"seed": 2**32}, r"seed must be below 2\*\*32"),
        ({"prompt": [1] * 41, "max_new_tokens": 41}, r"fit in 80 tokens \(max_seq_len\), got 41 and 41"),
    ],
)
def test_errors_of_submit(options, message):
    e = Engine(model(), num_pages=7, **SMALL)
    running = e.submit([1, 2], max_new_tokens=3)
    e.step()
    with pytest.raises((TypeError, ValueError), match=message):
        e.submit(**{"prompt": [1], **options})
    drive(e)  # the others go on
    assert len(running.tokens) == 3


def test_a_mesh_with_pools_of_its_devices_is_refused():
    mesh = MLAMesh(jax.make_mesh((2,), ("data",), devices=jax.devices("cpu")[:2]), batch="data")
    m = nnx.eval_shape(lambda: DeepseekForCausalLM(CONFIG, dtype=jnp.float32, mesh=mesh, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="model must have one pool of pages, got a mesh of 2 pools"):
        Engine(m, num_pages=8, **SMALL)


@plain_and_fp8
def test_heads_on_a_mesh(caches):
    """The tokens of one device, but for near ties."""
    mesh = MLAMesh(jax.make_mesh((2,), ("model",), devices=jax.devices("cpu")[:2]), heads="model")
    config, format = (CONFIG if caches == "dense" else SPARSE_CONFIG), CACHES[caches][1]
    m = DeepseekForCausalLM(config, dtype=jnp.float32, mesh=mesh, rngs=nnx.Rngs(3))
    e = Engine(m, num_pages=7, batch_invariant=True, format=format, **SMALL)
    text = list(range(20))
    requests = [e.submit([*text, i], max_new_tokens=20) for i in range(4)]
    drive(e)
    assert e.stats.shared_tokens
    for pool in jax.tree.leaves(e.caches):
        assert len(pool.sharding.device_set) == 2 and pool.sharding.is_fully_replicated
    for i, request in enumerate(requests):
        check_likeliest([*text, i], request.tokens, mha if caches == "dense" else packed)


def test_a_request_larger_than_the_pool_is_refused():
    with pytest.raises(ValueError, match=r"fit in 64 tokens \(num_pages\), got 60 and 6"):
        Engine(model(), num_pages=4, **SMALL).submit([1] * 60, max_new_tokens=6)


def draws(logits, count, temperature=1.0, top_p=1.0):
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    full = functools.partial(jnp.full, count, dtype=jnp.float32)
    seeds = jnp.arange(count, dtype=jnp.uint32)
    return np.asarray(sample(rows, seeds, jnp.full(count, 5, jnp.int32), full(temperature), full(top_p)))


def test_sample_draws_by_probability():
    logits, count = np.log([0.1, 0.5, 0.05, 0.3, 0.05]), 20000
    for temperature, top_p, kept in ((1.0, 1.0, [0, 1, 2, 3, 4]), (0.5, 1.0, [0, 1, 2, 3, 4]), (1.0, 0.75, [1, 3])):
        expected = np.zeros(5)
        expected[kept] = np.exp(logits[kept] / temperature)
        expected /= expected.sum()
        got = np.bincount(draws(logits, count, temperature, top_p), minlength=5) / count
        # Five standard deviations of a frequency; exactly none of what was cut off.
        assert (np.abs(got - expected) <= 5 * np.sqrt(expected * (1 - expected) / count)).all()


def test_sample_at_the_limits():
    logits = [1.0, 4.0, 4.0, -np.inf, 3.0]
    assert (draws(logits, 50, temperature=0.0) == 1).all()  # of equal ones the first
    assert (draws(logits, 50, top_p=1e-6) == 1).all() and (draws(logits, 50, top_p=1e-40) == 1).all()
    assert set(draws(logits, 50, temperature=1e-30)) == {1, 2}
    assert 3 not in draws(logits, 500, temperature=1e30)
    assert (draws([0.0], 5) == 0).all()


def test_sample_looks_at_its_own_row_alone():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 97)).astype(np.float32)
    seeds, positions = np.arange(6, dtype=np.uint32), np.arange(6, dtype=np.int32)
    temperature, top_p = np.array([0, 1, 2, 0, 1, 0.5], np.float32), np.array([1, 0.9, 0.8, 0.5, 1, 1], np.float32)
    together = sample(logits, seeds, positions, temperature, top_p)
    with jax.default_prng_impl("rbg"):  # which does not change what a seed means
        for i in range(6):
            assert sample(*(x[i : i + 1] for x in (logits, seeds, positions, temperature, top_p)))[0] == together[i]
    hot = temperature > 0
    others = np.stack([sample(logits, seeds + k, positions, temperature, top_p) for k in range(1, 9)])
    assert (others[:, ~hot] == np.asarray(together)[~hot]).all() and (others[:, hot] != np.asarray(together)[hot]).any()


@pytest.mark.parametrize("module", [engine, sampling], ids=lambda m: m.__name__)
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted > 0
