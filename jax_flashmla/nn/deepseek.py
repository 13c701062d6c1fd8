"""DeepSeek V2, V2-Lite, V3, R1 and V3.2, and GLM-5, as Flax NNX models over paged caches."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .. import api, checks
from ..kvcache.pages import free_bytes
from ..sharding import MLAMesh
from .mla import (
    Attention,
    MLAAttention,
    RMSNorm,
    RopeConfig,
    by_chunks,
    check_lengths,
    linear,
    not_empty,
    plan,
    precision,
)
from .placement import on_mesh, parameter_sharding, place
from .sparse import SparseCache, SparseMLAAttention

Caches = tuple[jax.Array | SparseCache, ...]
MOE_TOKENS = 1024  # go through the experts at once: what they become inside of all experts is large


@dataclasses.dataclass(frozen=True)
class DeepseekConfig:
    """What the mathematics needs of a Hugging Face `config.json`, under its names. The defaults are V3 and R1.

    Args:
      vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: of the transformer.
      q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim: of the attention.
      n_routed_experts, n_shared_experts, num_experts_per_tok, moe_intermediate_size: of the mixture of experts.
      first_k_dense_replace: so many layers at the bottom have a dense MLP.
      scoring_func: "softmax" (V2) or "sigmoid" (V3, with a bias that takes part in the choice alone).
      n_group, topk_group: experts are chosen from the best `topk_group` of `n_group` groups.
      norm_topk_prob, routed_scaling_factor: chosen weights are divided by their sum, and multiplied.
      rms_norm_eps: of the norms outside the attention.
      attention_bias, tie_word_embeddings: as in Hugging Face.
      index_topk: tokens that a query attends to, picked by an indexer in every layer (V3.2); None is dense attention.
      index_n_heads, index_head_dim, index_rope_interleave: of the indexer, see `DSAIndexer`.
      rope: a `RopeConfig`.

    Example:
      >>> from jax_flashmla.nn import DeepseekConfig
      >>> DeepseekConfig.v2_lite().num_attention_heads, DeepseekConfig.v3().scoring_func
      (16, 'sigmoid')
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 2048
    first_k_dense_replace: int = 3
    scoring_func: str = "sigmoid"
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    index_topk: int | None = None
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_rope_interleave: bool = False
    rope: RopeConfig = RopeConfig(factor=40.0, mscale=1.0, mscale_all_dim=1.0)  # noqa: RUF009 - frozen

    @classmethod
    def v3(cls) -> "DeepseekConfig":
        """DeepSeek-V3, R1 and V3.1: 671 billion parameters."""
        return cls()

    @classmethod
    def v32(cls) -> "DeepseekConfig":
        """DeepSeek-V3.2: V3 with an indexer in every layer, 672 billion parameters."""
        return cls(index_topk=2048)

    @classmethod
    def glm5(cls) -> "DeepseekConfig":
        """GLM-5: V3.2 with other widths, 744 billion parameters."""
        return cls(
            vocab_size=154880,
            hidden_size=6144,
            intermediate_size=12288,
            num_hidden_layers=78,
            num_attention_heads=64,
            q_lora_rank=2048,
            qk_nope_head_dim=192,
            v_head_dim=256,
            n_group=1,
            topk_group=1,
            rms_norm_eps=1e-5,
            index_topk=2048,
            index_n_heads=32,
            index_rope_interleave=True,
            rope=RopeConfig(theta=1e6),
        )

    @classmethod
    def v2(cls) -> "DeepseekConfig":
        """DeepSeek-V2: 236 billion parameters."""
        return cls(
            vocab_size=102400,
            hidden_size=5120,
            intermediate_size=12288,
            num_hidden_layers=60,
            n_routed_experts=160,
            n_shared_experts=2,
            num_experts_per_tok=6,
            moe_intermediate_size=1536,
            first_k_dense_replace=1,
            scoring_func="softmax",
            topk_group=3,
            norm_topk_prob=False,
            routed_scaling_factor=16.0,
        )

    @classmethod
    def v2_lite(cls) -> "DeepseekConfig":
        """DeepSeek-V2-Lite: 16 billion parameters, no compressed query, no groups."""
        return dataclasses.replace(
            cls.v2(),
            hidden_size=2048,
            intermediate_size=10944,
            num_hidden_layers=27,
            num_attention_heads=16,
            q_lora_rank=None,
            n_routed_experts=64,
            moe_intermediate_size=1408,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.0,
            rope=RopeConfig(factor=40.0, mscale=0.707, mscale_all_dim=0.707),
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DeepseekConfig":
        """Reads a parsed `config.json`, with `rope_parameters` or with `rope_scaling` and `rope_theta`.

        Raises:
          ValueError: the configuration asks for what this model does not have.
        """
        model_type = config.get("model_type")
        v3 = model_type != "deepseek_v2"
        sparse = {"deepseek_v32": cls.v32, "glm_moe_dsa": cls.glm5}
        known = ("deepseek_v2", "deepseek_v3", *sparse)
        if model_type not in known and config.get("kv_lora_rank") is None:
            raise ValueError(
                f"config.json must be that of a model with MLA: kv_lora_rank in it, or the model_type "
                f"{', '.join(known[:-1])} or {known[-1]}, got neither and {model_type!r}"
            )
        if config.get("index_topk") is not None and model_type not in sparse:
            raise ValueError(
                f"index_topk, sparse attention, needs the model_type {' or '.join(sparse)}, got {model_type!r} in "
                "config.json"
            )
        # index_topk_freq and index_topk_pattern: layers without an indexer take the picks of one below.
        for name, supported in (
            ("moe_layer_freq", 1),
            ("hidden_act", "silu"),
            ("index_topk_freq", 1),
            ("index_topk_pattern", None),
        ):
            if config.get(name) not in (None, supported):
                raise ValueError(f"{name} must be {supported!r}, got {config[name]!r} in config.json")
        if "shared" in (config.get("indexer_types") or ()):
            raise ValueError("indexer_types must be 'full' for all layers, got 'shared' in config.json")
        defaults = sparse.get(str(model_type), cls.v3 if v3 else cls.v2)()
        names = [field.name for field in dataclasses.fields(cls) if field.name != "rope"]
        values = {name: config[name] for name in names if config.get(name) is not None}
        if "q_lora_rank" in config:
            values["q_lora_rank"] = config["q_lora_rank"] or None
        # null: none of them.
        if config.get("n_group", 1) is None:
            values["n_group"] = values["topk_group"] = 1
        if config.get("n_shared_experts", 1) is None:
            values["n_shared_experts"] = 0
        if config.get("n_routed_experts", 1) is None:
            values["first_k_dense_replace"] = values.get("num_hidden_layers", defaults.num_hidden_layers)
        if mlps := config.get("mlp_layer_types"):
            dense = mlps.count("dense")
            if "dense" in mlps[dense:]:
                raise ValueError(f"mlp_layer_types must be 'dense' first, got {mlps!r} in config.json")
            values["first_k_dense_replace"] = dense
        if config.get("indexer_rope_interleave") is not None:
            values["index_rope_interleave"] = config["indexer_rope_interleave"]
        # transformers writes no scoring_func: there the model type tells.
        method = config.get("topk_method") or ("noaux_tc" if v3 else "greedy")
        if method not in ("greedy", "group_limited_greedy", "noaux_tc"):
            raise ValueError(
                f"topk_method must be 'greedy', 'group_limited_greedy' or 'noaux_tc', got {method!r} in config.json"
            )
        if method == "greedy":
            values["n_group"] = values["topk_group"] = 1
        if (method == "noaux_tc") != (values.get("scoring_func", defaults.scoring_func) == "sigmoid"):
            raise ValueError(
                f"scoring_func and topk_method must be sigmoid with noaux_tc or softmax with another, got "
                f"{values.get('scoring_func')!r} with {method!r} in config.json"
            )
        return dataclasses.replace(defaults, **values, rope=_rope_from_hf(config))


def _rope_from_hf(config: Mapping[str, Any]) -> RopeConfig:
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    interleave = True if config.get("rope_interleave") is None else bool(config["rope_interleave"])
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return RopeConfig(theta=theta, interleave=interleave)
    if kind != "yarn":
        raise ValueError(f"rope type must be 'default' or 'yarn', got {kind!r} in config.json")
    for name in ("attention_factor", "truncate"):
        if scaling.get(name) not in (None, True):
            raise ValueError(f"{name} = {scaling[name]!r} of the rope in config.json is not supported")
    if not scaling.get("original_max_position_embeddings"):
        raise ValueError("original_max_position_embeddings of the rope must be in config.json for 'yarn', got none")
    original = int(scaling["original_max_position_embeddings"])
    return RopeConfig(
        theta=theta,
        interleave=interleave,
        factor=float(scaling.get("factor") or config["max_position_embeddings"] / original),
        original_max_position=original,
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        mscale=float(scaling.get("mscale") or 1),
        mscale_all_dim=float(scaling.get("mscale_all_dim") or 0),
    )


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, dtype: Any, rngs: nnx.Rngs):
        self.gate_proj = linear(hidden_size, intermediate_size, dtype, rngs)
        self.up_proj = linear(hidden_size, intermediate_size, dtype, rngs)
        self.down_proj = linear(intermediate_size, hidden_size, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nnx.Module):
    """Chooses experts per token, in float32: a rounded score would choose others.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.2.2 (softmax, groups by their best expert); DeepSeek-V3,
    arXiv:2412.19437, section 2.1.2 (sigmoid, groups by their two best, a bias for load balance).
    """

    def __init__(self, config: DeepseekConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        sigmoid = c.scoring_func == "sigmoid"
        in_group, rest = divmod(c.n_routed_experts, max(c.n_group, 1))
        most = c.topk_group * in_group if c.n_group > 1 else c.n_routed_experts
        for name, good, words in (
            ("scoring_func", sigmoid or c.scoring_func == "softmax", "'sigmoid' or 'softmax'"),
            ("n_group", c.n_group >= 1 and rest == 0, f"a divisor of n_routed_experts = {c.n_routed_experts}"),
            (
                "n_group",
                c.n_group == 1 or in_group >= 1 + sigmoid,
                "smaller: sigmoid rates a group by two experts",
            ),
            ("topk_group", 1 <= c.topk_group <= c.n_group, f"1 to n_group = {c.n_group}"),
            ("num_experts_per_tok", 1 <= c.num_experts_per_tok <= most, f"1 to {most}, the experts to choose from"),
        ):
            if not good:
                raise ValueError(f"{name} must be {words}, got {getattr(c, name)!r}")
        self.kernel = nnx.Param(
            nnx.initializers.lecun_normal()(rngs.params(), (config.hidden_size, config.n_routed_experts), jnp.float32)
        )
        if sigmoid:
            self.e_score_correction_bias = nnx.Param(jnp.zeros(config.n_routed_experts))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x `[t, hidden_size]` -> weights float32 and experts int32, both `[t, num_experts_per_tok]`."""
        c = self.config
        logits = jnp.dot(x.astype(jnp.float32), self.kernel[...], precision=jax.lax.Precision.HIGHEST)
        sigmoid = c.scoring_func == "sigmoid"
        scores = jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits)
        choice = scores + self.e_score_correction_bias[...][None] if sigmoid else scores
        if c.n_group > 1:
            grouped = choice.reshape(-1, c.n_group, c.n_routed_experts // c.n_group)
            group_scores = jax.lax.top_k(grouped, 2 if sigmoid else 1)[0].sum(axis=-1)
            kept = jax.nn.one_hot(jax.lax.top_k(group_scores, c.topk_group)[1], c.n_group, dtype=bool).any(axis=1)
            choice = jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(choice.shape)
        experts = jax.lax.top_k(choice, c.num_experts_per_tok)[1]
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return weights * c.routed_scaling_factor, experts


class MoE(nnx.Module):
    """Routed experts as one matrix product per projection, and shared ones, if any, as one MLP. Drops no token."""

    def __init__(self, config: DeepseekConfig, *, dtype: Any, mesh: MLAMesh | None = None, rngs: nnx.Rngs):
        self.mesh = mesh
        e, d, f = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.gate = Router(config, rngs=rngs)
        self.gate_proj = nnx.Param(init(rngs.params(), (e, d, f), dtype))
        self.up_proj = nnx.Param(init(rngs.params(), (e, d, f), dtype))
        self.down_proj = nnx.Param(init(rngs.params(), (e, f, d), dtype))
        shared = f * config.n_shared_experts
        self.shared_experts = MLP(d, shared, dtype=dtype, rngs=rngs) if shared else None

    def __call__(self, x: jax.Array) -> jax.Array:
        weights, experts = (y.reshape(*x.shape[:-1], -1) for y in self.gate(x.reshape(-1, x.shape[-1])))
        operands = x, weights, experts, self.gate_proj[...], self.up_proj[...], self.down_proj[...]
        routed = _routed(*operands) if self.mesh is None else self._routed_on_mesh(*operands)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)

    def _routed_on_mesh(self, x: jax.Array, *operands: jax.Array) -> jax.Array:
        """Every device takes its own tokens through its own columns of all experts."""
        assert self.mesh is not None
        names = ("mlp", "gate_proj"), ("mlp", "up_proj"), ("mlp", "down_proj")
        kernels = [parameter_sharding(path, kernel.shape, self.mesh).spec for path, kernel in zip(names, operands[2:])]
        rows = self.mesh.sharding("x").spec
        divided = self.mesh.heads if self.mesh.heads in kernels[0] else None
        body = functools.partial(_routed, axis=divided)
        return self.mesh.shard_map(body, (rows, rows, rows, *kernels), rows)(x, *operands)


def _routed(x, weights, experts, gate_proj, up_proj, down_proj, *, axis: str | None = None) -> jax.Array:
    """Every token through its experts; with the mesh axis over which their columns are divided, summed over it.

    All tokens go through all experts, and those that a token did not choose count nothing. A decode step waits for the
    parameters of nearly all experts in any case. `jax.lax.ragged_dot`, which XLA makes of masks on a GPU, computes
    num_experts_per_tok times as much.
    """
    tokens = x.reshape(-1, x.shape[-1])
    t, e = tokens.shape[0], gate_proj.shape[0]
    chosen = jnp.arange(t)[:, None], experts.reshape(t, -1)
    shares = jnp.zeros((t, e), jnp.float32).at[chosen].add(weights.reshape(t, -1))

    def through_all(tokens: jax.Array, shares: jax.Array) -> jax.Array:
        tokens, shares = tokens[0], shares[0]
        einsum = functools.partial(jnp.einsum, precision=precision(x.dtype))
        inner = jax.nn.silu(einsum("td,edf->etf", tokens, gate_proj)) * einsum("td,edf->etf", tokens, up_proj)
        share = shares.T[:, :, None]
        # Infinity times 0 would be NaN.
        inner = jnp.where(share == 0, 0, inner.astype(jnp.float32) * share).astype(x.dtype)
        return einsum("etf,efd->td", inner, down_proj, preferred_element_type=jnp.float32)[None]

    routed = by_chunks(through_all, tokens[None], shares[None], most=MOE_TOKENS)
    if axis is not None:
        routed = jax.lax.psum(routed, axis)
    return routed.astype(x.dtype).reshape(x.shape)


class DecoderLayer(nnx.Module):
    """Norm, attention, norm, MLP or mixture of experts, with two residuals."""

    def __init__(self, config: DeepseekConfig, index: int, *, dtype: Any, rngs: nnx.Rngs, **attention: Any):
        c = config
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, param_dtype=dtype)
        make: Callable[..., MLAAttention] = MLAAttention
        if c.index_topk is not None:
            names = ("index_topk", "index_n_heads", "index_head_dim", "index_rope_interleave")
            make = functools.partial(SparseMLAAttention, **{name: getattr(c, name) for name in names})
        self.self_attn = make(
            c.hidden_size,
            c.num_attention_heads,
            q_lora_rank=c.q_lora_rank,
            kv_lora_rank=c.kv_lora_rank,
            qk_nope_head_dim=c.qk_nope_head_dim,
            qk_rope_head_dim=c.qk_rope_head_dim,
            v_head_dim=c.v_head_dim,
            rope=c.rope,
            use_bias=c.attention_bias,
            dtype=dtype,
            rngs=rngs,
            **attention,
        )
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, param_dtype=dtype)
        self.mlp: MLP | MoE
        if index < c.first_k_dense_replace:
            self.mlp = MLP(c.hidden_size, c.intermediate_size, dtype=dtype, rngs=rngs)
        else:
            self.mlp = MoE(c, dtype=dtype, mesh=attention.get("mesh"), rngs=rngs)

    def __call__(self, x: jax.Array, cache: Any, *args: Any, **kwargs: Any) -> tuple[jax.Array, Any]:
        y, cache = self.self_attn(self.input_layernorm(x), cache, *args, **kwargs)
        return self._feed_forward(x + y), cache

    def mha(self, x: jax.Array) -> jax.Array:
        return self._feed_forward(x + self.self_attn.mha(self.input_layernorm(x)))

    def _feed_forward(self, x: jax.Array) -> jax.Array:
        return x + self.mlp(self.post_attention_layernorm(x))


class DeepseekForCausalLM(nnx.Module):
    """A DeepSeek V2, V2-Lite, V3, R1 or V3.2 language model, or GLM-5.

    Args:
      config: a `DeepseekConfig`.
      dtype: of parameters, activations and caches; float32 runs through the reference. Routers and the weights of the
        indexer's heads are float32 always.
      attention, implementation: as of `MLAAttention`.
      mesh: an `MLAMesh`: its axis of heads divides those of the attention and the columns of every MLP, expert and the
        head of the model, each where it can be divided; caches as it says. Tokens go through with their sequences.
        Sparse attention knows no context axis.
      rngs: initialises the parameters; `from_pretrained` reads them.

    Raises:
      ValueError: as `MLAAttention`, or `SparseMLAAttention` where `config.index_topk` is not None; the numbers of
        experts and groups do not go together.
      NotImplementedError: sparse attention on a mesh with a context axis.

    Source: DeepSeek-V2, arXiv:2405.04434; DeepSeek-V3, arXiv:2412.19437; DeepSeek-V3.2, arXiv:2512.02556; GLM-5,
    arXiv:2602.15763.

    Example:
      >>> import dataclasses, jax.numpy as jnp
      >>> from flax import nnx
      >>> from jax_flashmla.nn import DeepseekConfig, DeepseekForCausalLM
      >>> config = dataclasses.replace(DeepseekConfig.v2_lite(), vocab_size=50, hidden_size=32, num_hidden_layers=2,
      ...     num_attention_heads=2, intermediate_size=32, n_routed_experts=8, moe_intermediate_size=16)
      >>> model = DeepseekForCausalLM(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
      >>> caches = model.init_caches(num_pages=4, page_size=16)
      >>> block_table = jnp.array([[2, 0]], jnp.int32)
      >>> logits, caches = model(jnp.array([[7, 1, 4]], jnp.int32), caches, block_table, jnp.array([3], jnp.int32))
      >>> logits.shape
      (1, 3, 50)
    """

    def __init__(
        self,
        config: DeepseekConfig,
        *,
        dtype: Any = jnp.bfloat16,
        attention: Attention = api.flash_mla_with_kvcache,
        implementation: str | None = None,
        mesh: MLAMesh | None = None,
        rngs: nnx.Rngs,
    ):
        self.config, self.mesh = config, mesh
        self.dtype = jnp.dtype(dtype)
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs)
        options = {"attention": attention, "implementation": implementation, "mesh": mesh, "dtype": dtype, "rngs": rngs}
        self.layers = nnx.List([DecoderLayer(config, i, **options) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = linear(config.hidden_size, config.vocab_size, dtype, rngs)
        if mesh is not None:
            place(self, mesh)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        dtype: Any = jnp.bfloat16,
        attention: Attention = api.flash_mla_with_kvcache,
        implementation: str | None = None,
        mesh: MLAMesh | None = None,
        progress: bool = True,
    ) -> "DeepseekForCausalLM":
        """Reads a Hugging Face checkpoint: config.json and safetensors, in one file or in shards.

        Tensors go one by one from the file to the default device, or each device's share of them to the devices of the
        mesh; the experts of a layer gather on the host first.
        float8 weights with a scale per block (V3, R1) are dequantised. Layers for multi-token prediction are skipped.

        Args:
          directory: a local directory.
          dtype: what parameters are converted to.
          attention, implementation, mesh: as of the constructor.
          progress: show a bar.

        Raises:
          FileNotFoundError: no config.json, or no safetensors.
          ValueError: the configuration is not supported, or the mesh cannot divide it; tensors are missing, unknown, or
            of another shape.
          NotImplementedError: sparse attention on a mesh with a context axis.
          ImportError: `progress` without tqdm.

        Example:
          >>> model = DeepseekForCausalLM.from_pretrained("DeepSeek-V2-Lite")  # doctest: +SKIP
        """
        from .loading import load

        options = {"attention": attention, "implementation": implementation}
        return load(directory, dtype=dtype, progress=progress, mesh=mesh, **options)

    def init_caches(self, num_pages: int, *, page_size: int = 64, format: str | None = None) -> Caches:
        """One cache of zeros per layer; all use the same block table.

        Args:
          num_pages: of each cache; on a mesh, those of all devices.
          page_size: tokens in a page.
          format: None for rows of the model's dtype; "fp8_v32" only where the attention is sparse.

        Returns:
          Arrays `[num_pages, page_size, 1, 576]`, or a `SparseCache` per layer where the attention is sparse.

        Raises:
          ValueError: a format that the attention does not read.
        """
        if self.config.index_topk is None and format is not None:
            raise ValueError(
                f"format must be None for a model without index_topk, got {format!r}; dense attention reads no fp8"
            )
        options: dict[str, Any] = {} if format is None else {"format": format}
        return tuple(layer.self_attn.init_cache(num_pages, page_size=page_size, **options) for layer in self.layers)

    def num_pages_that_fit(self, fraction: float = 0.9, *, page_size: int = 64, format: str | None = None) -> int:
        """How many pages `init_caches` may be asked for, so that the devices' memory is filled to a fraction.

        Counts all pools of all layers, those of an indexer too. What is in use when this is called counts towards the
        fraction.

        Args:
          fraction: of the memory that JAX may use on a device, over 0 and up to 1. A step needs some besides.
          page_size, format: as of `init_caches`.

        Returns:
          Pages, 0 when none fits; on a mesh, those of all devices.

        Raises:
          TypeError, ValueError: a fraction out of range, or as of `init_caches`.
          RuntimeError: the devices do not tell how much memory they have, as CPUs do not.

        Example:
          >>> caches = model.init_caches(model.num_pages_that_fit(format="fp8_v32"), format="fp8_v32")  # doctest: +SKIP
        """
        page_size = checks.integer("page_size", page_size, minimum=1)
        pools = 1 if self.mesh is None else self.mesh.size("pages")
        page = jax.eval_shape(lambda: self.init_caches(pools, page_size=page_size, format=format))
        page_bytes = sum(pool.size * pool.dtype.itemsize for pool in jax.tree.leaves(page)) // pools
        devices = self.embed_tokens.embedding[...].sharding.addressable_devices
        return pools * (min(free_bytes(device, fraction) for device in devices) // page_bytes)

    @on_mesh("x", "k_cache")
    def __call__(
        self,
        tokens: jax.Array,
        caches: Caches,
        block_table: jax.Array,
        cache_seqlens: jax.Array,
        *,
        num_new: jax.Array | None = None,
        logits_to_keep: int | None = None,
        batch_invariant: bool = False,
    ) -> tuple[jax.Array, Caches]:
        """Appends tokens to their sequences and returns what follows them: decode and prefill.

        Args:
          tokens: int32 `[b, s]`, the last s tokens of each sequence.
          caches: from `init_caches` or from the last call; donate them to the jitted step.
          block_table: int32 `[b, max_pages]`, pages of each sequence, those of the new tokens included.
          cache_seqlens: int32 `[b]`, tokens per sequence, the new ones included.
          num_new: int32 `[b]` when the batch is ragged; see `MLAAttention`.
          logits_to_keep: static; only the last so many tokens get logits. None: all.
          batch_invariant: static; attention plans that cut each sequence by its own length alone, see `plan`. Sparse
            attention has no plan, so there it changes nothing.

        Returns:
          logits, float32 `[b, s, vocab_size]`, and the caches.

        Raises:
          TypeError, ValueError: tokens are empty, caches are not one per layer, or an argument has the wrong type,
            dtype or shape.
        """
        not_empty("tokens", tokens, "b, s")
        check_lengths("cache_seqlens", cache_seqlens, tokens.shape[0])
        if not isinstance(caches, (tuple, list)) or len(caches) != len(self.layers):
            got = len(caches) if isinstance(caches, (tuple, list)) else type(caches).__name__
            raise ValueError(f"caches must be a tuple of {len(self.layers)}, one per layer, got {got}; use init_caches")
        metadata = None  # sparse decode has no plan
        if self.config.index_topk is None:
            metadata = plan(
                cache_seqlens,
                tokens.shape[1],
                self.config.num_attention_heads,
                batch_invariant=batch_invariant,
                mesh=self.mesh,
                page_size=jax.tree.leaves(caches)[0].shape[1],
            )
        x = self.embed_tokens(tokens)
        new_caches: list[jax.Array | SparseCache] = []
        for layer, cache in zip(self.layers, caches, strict=True):  # unrolled: a scan would copy the caches
            x, cache = layer(x, cache, block_table, cache_seqlens, num_new=num_new, metadata=metadata)
            new_caches.append(cache)
        if logits_to_keep is not None:
            x = x[:, -checks.integer("logits_to_keep", logits_to_keep, minimum=1) :]
        return self._logits(x), tuple(new_caches)

    @on_mesh("x")
    def mha(self, tokens: jax.Array) -> jax.Array:
        """Logits `[b, s, vocab_size]` of whole sequences `[b, s]` by plain attention, without a cache. For checking."""
        not_empty("tokens", tokens, "b, s")
        if self.mesh is not None:
            self.mesh.divides("batch", "tokens", tokens.shape[0])
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer.mha(x)
        return self._logits(x)

    def _logits(self, x: jax.Array) -> jax.Array:
        x = self.norm(x)
        if self.config.tie_word_embeddings:
            table = self.embed_tokens.embedding[...]
            return jnp.einsum("bsd,vd->bsv", x, table, precision=precision(self.dtype)).astype(jnp.float32)
        return self.lm_head(x).astype(jnp.float32)
