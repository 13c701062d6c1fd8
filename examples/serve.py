"""Continuous batching: requests arrive while others run, share the pages of a common prefix, and one is cancelled."""

import dataclasses
import time

import numpy as np
from flax import nnx

from jax_flashmla.nn import DeepseekConfig, DeepseekForCausalLM, Engine, Request

config = dataclasses.replace(  # random weights; DeepseekForCausalLM.from_pretrained(directory) reads real ones
    DeepseekConfig.v2_lite(),
    vocab_size=1000,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    n_routed_experts=8,
    moe_intermediate_size=64,
)
model = DeepseekForCausalLM(config, rngs=nnx.Rngs(0))
engine = Engine(model, num_pages=24, max_seq_len=256, batch_sizes=(4,), chunk_sizes=(64,))
start = time.perf_counter()
print(f"{engine.warm_up()} programs in {time.perf_counter() - start:.1f} s")

rng = np.random.default_rng(0)
system = rng.integers(0, config.vocab_size, 80)  # what the prompts of a service begin with
prompts = [np.concatenate([system, rng.integers(0, config.vocab_size, n)]) for n in (5, 40, 9, 100, 1, 20)]
arrivals = np.cumsum(rng.exponential(0.02, len(prompts)))
requests: list[Request] = []
start = time.perf_counter()
while len(requests) < len(prompts) or not engine.idle:
    while len(requests) < len(prompts) and time.perf_counter() - start >= arrivals[len(requests)]:
        i = len(requests)
        requests.append(engine.submit(prompts[i], max_new_tokens=8 + 4 * i, temperature=0.8, top_p=0.9, seed=i))
    engine.step()
    if len(requests) > 3 and len(requests[3].tokens) == 5:
        engine.cancel(requests[3])  # its client hung up

print("request  prompt  shared  tokens     end        first token  per token")
for r in requests:
    assert r.time_to_first_token is not None
    print(
        f"{r.id:7}  {len(r.prompt):6}  {r.shared_tokens:6}  {len(r.tokens):6}  {r.finish_reason or '':9}  "
        f"{1e3 * r.time_to_first_token:8.1f} ms  {1e3 * float(np.median(r.token_latencies)):6.1f} ms"
    )
stats = engine.stats
print(f"prefill {stats.prefill_tokens_per_second:.0f} tokens/s, decode {stats.decode_tokens_per_second:.0f} tokens/s")
assert [r.finish_reason for r in requests].count("length") == len(prompts) - 1 and engine.pages.num_free == 24
