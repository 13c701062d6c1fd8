"""A Flax NNX layer with MLA: a prompt of each sequence goes into the paged cache, then one token at a time follows."""

import jax
import jax.numpy as jnp
from flax import nnx

from jax_flashmla.nn import MLAAttention, RopeConfig

B, HIDDEN, HEADS, PAGE, MAX_PAGES, PROMPT = 2, 256, 4, 64, 4, 150

rope = RopeConfig(factor=40.0, mscale=1.0, mscale_all_dim=1.0)  # YaRN as in DeepSeek-V3
layer = MLAAttention(HIDDEN, HEADS, q_lora_rank=96, rope=rope, rngs=nnx.Rngs(0))
graphdef, params = nnx.split(layer)


@jax.jit
def reference(params: nnx.State, x: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, params).mha(x)


def run(
    params: nnx.State, x: jax.Array, cache: jax.Array, table: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, ...]:
    y, cache = nnx.merge(graphdef, params)(x, cache, table, lengths)
    return y, cache


step = jax.jit(run, donate_argnames="cache")  # donated: new rows are written in place

x = jax.random.normal(jax.random.key(1), (B, PROMPT + 8, HIDDEN), jnp.bfloat16)
table = jax.random.permutation(jax.random.key(2), B * MAX_PAGES).astype(jnp.int32).reshape(B, MAX_PAGES)
cache = layer.init_cache(B * MAX_PAGES, page_size=PAGE)

y, cache = step(params, x[:, :PROMPT], cache, table, jnp.full(B, PROMPT, jnp.int32))
outputs = [y]
for t in range(PROMPT, x.shape[1]):
    y, cache = step(params, x[:, t : t + 1], cache, table, jnp.full(B, t + 1, jnp.int32))
    outputs.append(y)

y, plain = jnp.concatenate(outputs, axis=1).astype(jnp.float32), reference(params, x).astype(jnp.float32)
error = float(jnp.linalg.norm(y - plain) / jnp.linalg.norm(plain))
print(f"{x.shape[1]} tokens of {B} sequences, 150 at once and then one by one: {error:.2%} from plain attention")
assert error < 0.05  # bfloat16
