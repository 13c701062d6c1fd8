"""The next token of each sequence: the likeliest one, or one drawn by temperature and top-p."""

import jax
import jax.numpy as jnp


@jax.jit
def sample(
    logits: jax.Array, seeds: jax.Array, positions: jax.Array, temperature: jax.Array, top_p: jax.Array
) -> jax.Array:
    """Picks a token per row. The draw depends on the row's own logits, seed and position, and on nothing else.

    Where the temperature is above 0, tokens are sorted by `softmax(logits / temperature)`, the smallest set of the
    likeliest ones whose probabilities reach `top_p` is kept, and one of those is drawn by its probability. Of equal
    logits the lower id comes first.

    Args:
      logits: float32 `[b, vocab_size]`.
      seeds: uint32 `[b]`.
      positions: int32 `[b]`, the place of the new token in its sequence: every place draws anew.
      temperature: float32 `[b]`; 0 takes the largest logit.
      top_p: float32 `[b]`, over 0 and up to 1; 1 keeps every token.

    Returns:
      int32 `[b]`.

    Source: top-p (nucleus) sampling, arXiv:1904.09751.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashmla.nn import sample
      >>> logits = jnp.array([[0.0, 3.0, 1.0]] * 2)
      >>> seeds, positions = jnp.array([5, 5], jnp.uint32), jnp.array([9, 9], jnp.int32)
      >>> sample(logits, seeds, positions, jnp.array([0.0, 0.7]), jnp.array([1.0, 0.5])).tolist()
      [1, 1]
    """
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        hot = temperature > 0
        order = jnp.argsort(logits, axis=-1, stable=True, descending=True)
        ranked = jnp.take_along_axis(logits, order, axis=-1)
        # Shifted before it is divided: a tiny temperature may give -inf, but not inf - inf.
        ranked = (ranked - ranked[:, :1]) / jnp.where(hot, temperature, 1)[:, None]
        reached = jnp.cumsum(jax.nn.softmax(ranked), axis=-1)
        kept = jnp.pad(reached[:, :-1], ((0, 0), (1, 0))) < top_p[:, None]  # what comes before is not enough
        mass = jnp.where(kept, reached, 0).max(axis=-1)
        drawn = (reached <= (jax.vmap(_uniform)(seeds, positions) * mass)[:, None]).sum(axis=-1, dtype=jnp.int32)
        # A parallel sum need not grow with every term: stay among the kept; one at least, where top_p is 0 in float32.
        drawn = jnp.minimum(drawn, jnp.maximum(kept.sum(axis=-1, dtype=jnp.int32), 1) - 1)
        token = jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)
        return jnp.where(hot, token, likeliest)

    return jax.lax.cond((temperature > 0).any(), draw, lambda: likeliest)  # sorting a vocabulary is not free


def _uniform(seed: jax.Array, position: jax.Array) -> jax.Array:
    # Named, so that jax_default_prng_impl does not change what a seed means.
    return jax.random.uniform(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position))
