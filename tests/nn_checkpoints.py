"""Tiny DeepSeek checkpoints with real MLA head dimensions: configurations, and weights that follow from a seed.

Plain numpy, so that transformers (`make_nn_fixtures.py`) and our tests make the same ones.
"""

import json
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

STD = 0.18  # loud: with small weights attention is uniform, and wrong scales and ropes stay invisible
TOKENS = np.random.default_rng(7).integers(0, 48, (2, 40))

BASE = {
    "vocab_size": 48,
    "hidden_size": 60,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-5,  # unlike the 1e-6 of the norms inside the attention
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 640,
    "rope_theta": 10000.0,
}
# An original context of 16 tokens: within 40 tokens YaRN changes most frequencies, and mscale the scores.
YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
V3 = {"model_type": "deepseek_v3", "q_lora_rank": 24, "n_shared_experts": 1, "n_group": 4, "topk_group": 2}
V3 |= {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
V2 = {"model_type": "deepseek_v2", "q_lora_rank": 24, "n_shared_experts": 2, "n_group": 4, "topk_group": 2}
V2 |= {"norm_topk_prob": False, "routed_scaling_factor": 16.0, "scoring_func": "softmax"}
LITE = {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "topk_method": "greedy"}
NEW_SPELLING = {"rope_theta": 50000.0, "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}

CONFIGS = {
    "v2": BASE | V2 | {"topk_method": "group_limited_greedy", "rope_scaling": YARN},
    "v2_lite": BASE | V2 | LITE | {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "v3": BASE | V3 | {"rope_scaling": YARN},
    # cosines and sines have a factor of their own here, and the softmax scale has another one
    "v3_mscales": BASE | V3 | {"rope_parameters": NEW_SPELLING | {"mscale": 1.0, "mscale_all_dim": 0.6}},
    "v3_half_split": BASE | V3 | {"rope_interleave": False, "rope_scaling": YARN, "attention_bias": True},
    "v3_no_yarn": BASE | V3 | {"rope_scaling": None, "tie_word_embeddings": True},
}
del CONFIGS["v3_mscales"]["rope_theta"]

# Twelve heads: with few, relu leaves 0 of many a score, and transformers and we break ties at the cut differently.
V32 = V3 | {"model_type": "deepseek_v32", "index_topk": 6, "index_n_heads": 12, "index_head_dim": 128}
GLM = V32 | {"model_type": "glm_moe_dsa", "n_group": 1, "topk_group": 1, "qk_nope_head_dim": 192, "v_head_dim": 256}
SPARSE_CONFIGS = {
    "v32": BASE | V32 | {"rope_scaling": YARN},
    # one layer, which is quick to compile with one mistake after the other
    "v32_mscales": CONFIGS["v3_mscales"] | V32 | {"attention_bias": True, "num_hidden_layers": 1},
    "glm5": BASE | GLM | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Hugging Face checkpoint, [out, in], one tensor per expert."""
    d, heads, q_rank = config["hidden_size"], config["num_attention_heads"], config["q_lora_rank"]
    d_nope, d_v = config["qk_nope_head_dim"], config["v_head_dim"]
    out = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = (config["vocab_size"], d)

    def mlp(name: str, width: int) -> None:
        out.update({f"{name}.{p}_proj.weight": (width, d) for p in ("gate", "up")})
        out[f"{name}.down_proj.weight"] = (d, width)

    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        attn = f"{layer}.self_attn"
        out[f"{layer}.input_layernorm.weight"] = out[f"{layer}.post_attention_layernorm.weight"] = (d,)
        if q_rank is None:
            out[f"{attn}.q_proj.weight"] = (heads * (d_nope + 64), d)
        else:
            out[f"{attn}.q_a_proj.weight"] = (q_rank, d)
            out[f"{attn}.q_a_layernorm.weight"] = (q_rank,)
            out[f"{attn}.q_b_proj.weight"] = (heads * (d_nope + 64), q_rank)
        out[f"{attn}.kv_a_proj_with_mqa.weight"] = (576, d)
        out[f"{attn}.kv_a_layernorm.weight"] = (512,)
        out[f"{attn}.kv_b_proj.weight"] = (heads * (d_nope + d_v), 512)
        out[f"{attn}.o_proj.weight"] = (d, heads * d_v)
        if config["attention_bias"]:
            biases = {"q_a_proj": q_rank, "kv_a_proj_with_mqa": 576, "o_proj": d}
            out.update({f"{attn}.{name}.bias": (size,) for name, size in biases.items()})
        if "index_topk" in config:
            index_heads, width = config["index_n_heads"], config["index_head_dim"]
            out[f"{attn}.indexer.wq_b.weight"] = (index_heads * width, q_rank)
            out[f"{attn}.indexer.wk.weight"] = (width, d)
            out[f"{attn}.indexer.k_norm.weight"] = out[f"{attn}.indexer.k_norm.bias"] = (width,)
            out[f"{attn}.indexer.weights_proj.weight"] = (index_heads, d)
        if i < config["first_k_dense_replace"]:
            mlp(f"{layer}.mlp", config["intermediate_size"])
            continue
        experts, width = config["n_routed_experts"], config["moe_intermediate_size"]
        out[f"{layer}.mlp.gate.weight"] = (experts, d)
        if config["model_type"] != "deepseek_v2":
            out[f"{layer}.mlp.gate.e_score_correction_bias"] = (experts,)
        for e in range(experts):
            mlp(f"{layer}.mlp.experts.{e}", width)
        mlp(f"{layer}.mlp.shared_experts", width * config["n_shared_experts"])
    return out


def weights(config: dict) -> dict[str, np.ndarray]:
    """float32; each tensor from its own seed, so that no order matters. Norms are around 1."""
    made = {}
    for name, shape in shapes(config).items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        made[name] = (STD * rng.standard_normal(shape)).astype(np.float32) + np.float32(name.endswith("norm.weight"))
    return made


TYPES = {np.dtype(np.float32): "F32", np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3"}


def save(directory: Path, config: dict, tensors: dict[str, np.ndarray], *, files: int = 1) -> Path:
    """config.json and safetensors, sharded with an index when there are several files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for i in range(files):
        name = "model.safetensors" if files == 1 else f"model-{i + 1:05}-of-{files:05}.safetensors"
        header: dict = {"__metadata__": {"format": "pt"}}
        data = b""
        for key in sorted(tensors)[i::files]:  # experts and scales of one layer lie in different shards
            value = np.ascontiguousarray(tensors[key])
            ends = [len(data), len(data) + value.nbytes]
            header[key] = {"dtype": TYPES[value.dtype], "shape": list(value.shape), "data_offsets": ends}
            data += value.tobytes()
            weight_map[key] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (directory / name).write_bytes(len(text).to_bytes(8, "little") + text + data)
    if files > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory
