"""Models in bfloat16 on the GPU: through the kernels they are as near to float32 as through the reference.

The weights are those of `nn_checkpoints.py`, rounded to bfloat16; the float32 model has the same rounded ones, and runs
on the CPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import nn_checkpoints
import numpy as np
import pytest

nnx = pytest.importorskip("flax.nnx")

import test_engine  # noqa: E402

from jax_flashmla import flash_mla_with_kvcache  # noqa: E402
from jax_flashmla.nn import DeepseekForCausalLM, Engine, engine  # noqa: E402

pytestmark = pytest.mark.gpu

# Six pages: several tiles of keys, and sequences that are cut into parts.
B, LENGTH, NUM_PAGES = 2, 342, 14
TOKENS = np.random.default_rng(0).integers(0, 48, (B, LENGTH), np.int32)
# Shuffled; entries past the length are absurd, and pages 8 and 11 belong to nobody.
TABLE = np.array([[5, 0, 12, 7, 10, 3, -1], [1, 6, 13, 2, 9, 4, 2147480000]], np.int32)
STEPS = {
    "a prompt at once": [LENGTH],
    "a prompt in two pieces": [171] * 2,
    "1 a step": [1] * 342,
    "2 a step": [2] * 171,
    "3 a step": [3] * 114,
    "4 a step": [2] + [4] * 85,
}

# Of 342 tokens: most queries see more than they may pick. No multiple of what a kernel takes at a time.
V32 = nn_checkpoints.SPARSE_CONFIGS["v32"] | {"index_topk": 100}


@dataclasses.dataclass(frozen=True)
class Model:
    """`cosine`: what logits have to reach. Loud weights, and where bfloat16 turns a pick or an expert, the logits of
    that token are others. On the CPU the reference has 0.995, sparse 0.987, and 0.971 where the cache is fp8 as well.
    """

    config: str
    cosine: float
    format: str | None = None


MODELS = {
    "v2": Model("v2", 0.99),
    "v2_lite": Model("v2_lite", 0.99),
    "v3": Model("v3", 0.99),
    "v32": Model("v32", 0.975),
    "v32_fp8": Model("v32", 0.95, "fp8_v32"),
}
# Shares of the reference's error, root mean square over all logits. On the CPU, attention that rounds elsewhere is
# never more than 1.04 times as far from float32, and 0.3 to 0.5 errors away from the reference: the rest of
# the model rounds alike in both. Small mistakes show in the second number first.
FURTHER, APART = 1.3, 0.8


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    configs = {**nn_checkpoints.CONFIGS, "v32": V32}
    return functools.cache(
        lambda name: nn_checkpoints.save(root / name, configs[name], nn_checkpoints.weights(configs[name]))
    )


@pytest.fixture(scope="session")
def logits_of(directories):
    """Logits of TOKENS; those that several tests want are computed once."""

    def load(name, **options):
        return DeepseekForCausalLM.from_pretrained(directories(MODELS[name].config), progress=False, **options)

    @functools.cache
    def exact(config):
        cpu = jax.devices("cpu")[0]
        with jax.default_device(cpu):
            rounded = DeepseekForCausalLM.from_pretrained(directories(config), progress=False)
            options = {"dtype": jnp.float32, "implementation": "xla"}
            model = nnx.eval_shape(lambda: DeepseekForCausalLM(rounded.config, **options, rngs=nnx.Rngs(0)))
            nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(rounded)))
            return decode(model, [LENGTH])

    @functools.cache
    def reference(name, steps):
        return decode(load(name, implementation="xla"), STEPS[steps], MODELS[name].format)

    def ours(name, steps, **options):
        return decode(load(name, implementation="cuda", **options), STEPS[steps], MODELS[name].format)

    return lambda name, steps, **options: (
        ours(name, steps, **options),
        reference(name, steps),
        exact(MODELS[name].config),
    )


@functools.partial(nnx.jit, donate_argnums=2)
def step(model, *args):
    return model(*args)


def poisoned(pool):
    """What no token wrote is NaN; in bytes, every field of the fp8 format is."""
    return jnp.full_like(pool, 255 if pool.dtype == jnp.uint8 else jnp.nan)


def decode(model, steps, format=None):
    """Logits of TOKENS, which go in by `steps` tokens at a time."""
    caches, logits, length = jax.tree.map(poisoned, model.init_caches(NUM_PAGES, format=format)), [], 0
    for s in steps:
        tokens, length = TOKENS[:, length : length + s], length + s
        args = jnp.asarray(tokens), caches, jnp.asarray(TABLE), jnp.full(B, length, jnp.int32)
        out, caches = step(model, *args)
        logits.append(out)
    assert length == LENGTH
    return np.concatenate(logits, axis=1).astype(np.float64)


def rms(x):
    return float(np.sqrt(np.mean(x * x)))


def check(ours, reference, exact, cosine):
    assert np.isfinite(ours).all()
    error = rms(reference - exact)
    assert rms(ours - exact) <= FURTHER * error
    assert rms(ours - reference) <= APART * error
    assert (ours * exact).mean() / (rms(ours) * rms(exact)) > cosine


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", MODELS)
def test_logits(name, steps, logits_of):
    check(*logits_of(name, steps), MODELS[name].cosine)


def no_mask(*args, causal, **kwargs):
    return flash_mla_with_kvcache(*args, causal=False, **kwargs)


def no_mscale(*args, softmax_scale, **kwargs):
    return flash_mla_with_kvcache(*args, softmax_scale=192**-0.5, **kwargs)


def another_slot(*args, indices, **kwargs):
    return flash_mla_with_kvcache(*args, indices=indices ^ 1, **kwargs)


def worst_picks_missing(*args, indices, **kwargs):
    """The last tile of the list is not read."""
    return flash_mla_with_kvcache(*args, indices=indices[..., :64], **kwargs)


@pytest.mark.parametrize(
    "name, attention",
    [
        ("v3", no_mask),
        ("v3", no_mscale),
        ("v32", no_mscale),
        ("v32", worst_picks_missing),
        ("v32_fp8", no_mscale),
        ("v32_fp8", worst_picks_missing),
        ("v32_fp8", another_slot),
    ],
)
def test_mistakes_show(name, attention, logits_of):
    """That the limits are narrow enough."""
    logits = logits_of(name, "a prompt at once", attention=attention)
    with pytest.raises(AssertionError):
        check(*logits, MODELS[name].cosine)


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_batched_output_is_one_by_one_output_bit_for_bit(attention, monkeypatch):
    """Through the engine, with a hash of all bits of the logits in place of sampling; see `test_engine.py`."""
    monkeypatch.setattr(engine, "sample", test_engine.hash_of_bits)
    monkeypatch.setattr(engine, "_programs", test_engine.probed_programs)
    config = test_engine.CONFIG
    if attention == "sparse":
        config = dataclasses.replace(config, q_lora_rank=24, index_topk=70, index_n_heads=4)
    model = DeepseekForCausalLM(config, implementation="cuda", rngs=nnx.Rngs(3))
    shapes = {"num_pages": 30, "page_size": 16, "batch_sizes": (4,), "chunk_sizes": (64,), "max_seq_len": 400}

    def run(requests):
        e = Engine(model, batch_invariant=True, **shapes)
        done = [e.submit(prompt, max_new_tokens=n) for prompt, n in requests]
        test_engine.drive(e)
        return [request.tokens for request in done], e.stats

    text = [i * i % 59 for i in range(150)]
    requests = [([*text, 50, 51], 60), ([*text, 40], 50), ([7, 5] * 115, 40), ([3], 90), (text[:20], 30)]
    together, stats = run(requests)
    assert stats.preemptions and stats.shared_tokens
    assert [len(tokens) for tokens in together] == [n for _, n in requests]
    for tokens, request in zip(together, requests, strict=True):
        assert run([request])[0] == [tokens]
