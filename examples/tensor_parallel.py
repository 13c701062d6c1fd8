"""A model on several devices: heads, MLPs and experts divided over all of them, the cache on each.

Runs on all GPUs of the machine; without any, on four fake devices of the CPU.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_flashmla.nn import DeepseekConfig, DeepseekForCausalLM
from jax_flashmla.sharding import MLAMesh

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"

B, PAGE, MAX_PAGES, PROMPT, NEW = 2, 64, 2, 60, 8
config = DeepseekConfig(
    vocab_size=512, hidden_size=256, num_hidden_layers=2, num_attention_heads=16, q_lora_rank=96,
    intermediate_size=512, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=128,
    n_group=2, topk_group=1, first_k_dense_replace=1,
)  # fmt: skip

devices = len(jax.devices())
# The kernels take bfloat16, in which a close choice of an expert may fall otherwise; the reference takes float32 too.
dtype, tolerance = (jnp.bfloat16, 0.1) if jax.default_backend() == "gpu" else (jnp.float32, 1e-4)
mesh = MLAMesh(jax.make_mesh((devices,), ("model",)), heads="model")
model = DeepseekForCausalLM(
    config, dtype=dtype, mesh=mesh, rngs=nnx.Rngs(0)
)  # or from_pretrained(directory, mesh=mesh)
caches = model.init_caches(B * MAX_PAGES, page_size=PAGE)
step = nnx.jit(lambda model, *args: model(*args, logits_to_keep=1), donate_argnums=2)

prompt = jax.random.randint(jax.random.key(1), (B, PROMPT), 0, config.vocab_size, jnp.int32)
table = jnp.array([[3, 0], [1, 2]], jnp.int32)
tokens, generated = prompt, []
for length in range(PROMPT, PROMPT + NEW):  # the prompt at once, then one token at a time
    logits, caches = step(model, tokens, caches, table, jnp.full(B, length, jnp.int32))
    tokens = logits.argmax(axis=-1).astype(jnp.int32)
    generated.append(jax.device_get(tokens))

w_uk = model.layers[0].self_attn.w_uk[...]
print(f"{devices} devices, w_uk {w_uk.shape}: {w_uk.addressable_shards[0].data.shape} on each")
print("tokens", np.concatenate(generated, axis=1).tolist())

alone = DeepseekForCausalLM(config, dtype=dtype, rngs=nnx.Rngs(0))  # the same parameters on one device, without a cache
sequence = np.concatenate([prompt, *generated[:-1]], axis=1)
expected = nnx.jit(DeepseekForCausalLM.mha)(alone, sequence)[:, -1]
error = float(jnp.linalg.norm(jax.device_get(logits[:, -1]) - expected) / jnp.linalg.norm(expected))
print(f"last logits: {error:.1e} from one device, relative")
assert error < tolerance
