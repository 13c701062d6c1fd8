"""A decode step of a whole model with random weights: one jit of all layers, caches donated, one plan for all of them.

Its only peer is the same model through the XLA reference. Timed besides: what is left of a step without attention.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import cases
from .cases import D_QK, D_V, DenseCase
from .protocol import Chain, Setup, Work, chain_lengths, dispatched
from .report import OURS, REST

MODELS = ("v2_lite", "tiny")
NAMES = ("v2_lite,64,4096",)
QUICK = ("tiny,4,256",)
PEERS: dict[str, Callable[[], Any]] = {}
BESIDE = ("xla",)
RATED = True
PAGE_SIZE = 64
AGREEMENT = 0.03  # of logits: 27 layers make 0.003 of other roundings, and 1 of no attention


class Case(NamedTuple):
    """`model,b,s_k`: sequences, and the keys of each, the new token included."""

    model: str
    b: int
    s_k: int

    @classmethod
    def parse(cls, name: str) -> Case:
        model, *numbers = name.split(",")
        if model not in MODELS or len(numbers) != 2 or not all(n.isdecimal() and int(n) for n in numbers):
            raise ValueError(f"a case is model,b,s_k with a model of {', '.join(MODELS)}, got {name!r}")
        return cls(model, *map(int, numbers))

    @property
    def config(self) -> Any:
        """A `DeepseekConfig`. tiny is V2-Lite in everything but its size."""
        from ..nn import DeepseekConfig

        lite = DeepseekConfig.v2_lite()
        if self.model == "v2_lite":
            return lite
        return dataclasses.replace(
            lite,
            vocab_size=512,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            n_routed_experts=8,
            moe_intermediate_size=64,
        )


check = Case.parse


class Decoder:
    """Parameters and caches. All contenders share them: they would not fit twice."""

    def __init__(self, case: Case):
        from flax import nnx

        from ..nn import DeepseekForCausalLM

        self.config = case.config
        # Not under jit, where all random numbers might be alive at once.
        params = nnx.state(DeepseekForCausalLM(self.config, rngs=nnx.Rngs(0)))
        self.params, self.structure = jax.tree.flatten(params)
        columns = -(-case.s_k // PAGE_SIZE)
        pages = np.random.default_rng(0).permutation(case.b * columns).astype(np.int32)
        self.table = jnp.asarray(pages.reshape(case.b, columns))
        self.lengths = jnp.full(case.b, case.s_k, jnp.int32)
        shape = len(pages), PAGE_SIZE, 1, D_QK
        keys = jax.random.split(jax.random.key(1), self.config.num_hidden_layers)
        self.caches = tuple(cases.normal(key, shape) for key in keys)
        # A model with random weights soon repeats itself. So each sequence adds a number of its own to its tokens, and
        # they ask for different experts.
        vocab_size = self.config.vocab_size
        self.first = jnp.arange(case.b, dtype=jnp.int32) * (vocab_size // case.b) % vocab_size

    def chain(self, small: bool, **options: Any) -> Chain:
        """Steps that follow each other. All have the same lengths, and write the same row of every sequence."""
        from flax import nnx

        from ..nn import DeepseekForCausalLM

        config, structure = self.config, self.structure
        twin = nnx.eval_shape(lambda: DeepseekForCausalLM(config, **options, rngs=nnx.Rngs(0)))  # with our parameters
        graphdef = nnx.split(twin)[0]

        @functools.partial(jax.jit, donate_argnums=1)
        def step(params: Any, caches: Any, tokens: Any, first: Any, table: Any, lengths: Any) -> tuple[Any, Any, Any]:
            model = nnx.merge(graphdef, jax.tree.unflatten(structure, params))
            logits, caches = model(tokens[:, None], caches, table, lengths)
            tokens = (logits[:, 0].argmax(axis=-1).astype(jnp.int32) + first) % config.vocab_size
            return caches, tokens, logits[:: max(1, len(first) - 1), 0]

        tokens = self.first

        def run() -> jax.Array:
            nonlocal tokens
            operands = tokens, self.first, self.table, self.lengths
            self.caches, tokens, ends = step(self.params, self.caches, *operands)
            return ends

        def result() -> np.ndarray:
            nonlocal tokens
            tokens = self.first
            return np.asarray(run())

        run()  # compiles
        return dispatched(run, chain_lengths(1.0, small))._replace(result=result)


def no_attention(q: jax.Array, *args: Any, **kwargs: Any) -> tuple[jax.Array, None]:
    return q[..., :D_V], None


def work(name: str, setup: Setup) -> Work:
    case = Case.parse(name)
    decoder = Decoder(case)
    config, params = decoder.config, decoder.params
    layers, embedding = config.num_hidden_layers, config.vocab_size * config.hidden_size
    attention = DenseCase(case.b, 1, config.num_attention_heads, case.s_k)
    idle = (
        (config.n_routed_experts - config.num_experts_per_tok) * 3 * config.hidden_size * config.moe_intermediate_size
    )
    active = sum(x.size for x in params) - embedding - (layers - config.first_k_dense_replace) * idle
    contenders: dict[str, Callable[[], Chain]] = {
        OURS: functools.partial(decoder.chain, setup.small, implementation=setup.implementation),
        BESIDE[0]: functools.partial(decoder.chain, setup.small, implementation="xla"),
        REST: lambda: decoder.chain(setup.small, attention=no_attention)._replace(result=None),
    }
    return Work(
        name,
        {**case._asdict(), "layers": layers, "parameters": sum(x.size for x in params)},
        flops=2.0 * case.b * active + layers * attention.flops,
        bytes=sum(x.nbytes for x in params) - 2.0 * embedding + layers * attention.bytes,
        contenders=contenders,
        agreement=AGREEMENT,
        tokens=case.b,
    )
