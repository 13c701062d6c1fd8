"""Hugging Face checkpoints: config.json and safetensors, one tensor at a time from the file to the device."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from .. import checks
from ..sharding import MLAMesh
from .deepseek import DeepseekConfig, DeepseekForCausalLM
from .placement import ParamPath, parameter_sharding

# safetensors' own numpy reader knows no float8; the format is a JSON header of offsets, and little-endian data.
DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}

FP8_BLOCK = (128, 128)


class Tensor(NamedTuple):
    """Where a tensor lies; `read` maps it, so that pages come from the disk when they are converted."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        if self.dtype not in DTYPES:
            raise ValueError(f"tensors must be of {', '.join(DTYPES)}, got {self.dtype} in {self.file}")
        dtype = np.dtype(DTYPES[self.dtype])
        raw = np.memmap(self.file, np.uint8, "r", self.offset, (math.prod(self.shape) * dtype.itemsize,))
        return raw.view(dtype).reshape(self.shape)


def tensors_in(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, one file or sharded, in the order of the files."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = checks.json_object(index).get("weight_map")
        if not isinstance(names, dict):
            raise ValueError(f"{index} must have a weight_map, got {names!r}; is the download complete?")
        files = sorted({directory / name for name in names.values()})
        if absent := [file for file in files if not file.exists()]:
            raise FileNotFoundError(f"{absent[0]} must be there, {index.name} names it; is the download complete?")
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory} must hold *.safetensors files, got none; is the download complete?")
    tensors = {}
    for file in files:
        total = file.stat().st_size
        with file.open("rb") as f:
            size = int.from_bytes(f.read(8), "little")
            readable = 0 < size <= total - 8
            header = json.loads(f.read(size)) if readable else {}
        header.pop("__metadata__", None)
        if not readable or 8 + size + max((entry["data_offsets"][1] for entry in header.values()), default=0) > total:
            raise ValueError(f"{file} must be a safetensors file; is the download complete, or a git-lfs pointer?")
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            tensors[name] = Tensor(file, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
    return tensors


def dequantize(weight: np.ndarray, scale_inv: np.ndarray, block: tuple[int, int] = FP8_BLOCK) -> np.ndarray:
    """float32: each block of the e4m3 weight times its scale, which the checkpoint calls its inverse."""
    if weight.ndim != 2:
        raise ValueError(f"a float8 weight must have two axes, got shape {weight.shape}")
    blocks = tuple(-(-n // k) for n, k in zip(weight.shape, block, strict=True))
    if scale_inv.shape != blocks:
        raise ValueError(
            f"blocks of {block} of a weight {weight.shape} must have scales {blocks}, got {scale_inv.shape}"
        )
    for axis in (0, 1):
        scale_inv = np.repeat(scale_inv, block[axis], axis=axis)
    return weight.astype(np.float32) * scale_inv[: weight.shape[0], : weight.shape[1]].astype(np.float32)


def split_kv_b(weight: np.ndarray, num_heads: int, d_nope: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a head are [nope | v]: `w_uk` [h_q, d_nope, 512] and `w_uv` [h_q, d_v, 512]."""
    if weight.shape[0] % num_heads:
        raise ValueError(
            f"kv_b_proj.weight must have rows for {num_heads} heads, got shape {weight.shape}; see num_attention_heads "
            "in config.json"
        )
    w_uk, w_uv = np.split(weight.reshape(num_heads, -1, weight.shape[1]), [d_nope], axis=1)
    return w_uk, w_uv


def placed(name: str, weight: np.ndarray, config: DeepseekConfig) -> Iterator[tuple[ParamPath, int | None, np.ndarray]]:
    """Parameters that a tensor of the checkpoint fills: path in the model, expert or None, value."""
    *path, kind = (int(part) if part.isdigit() else part for part in name.removeprefix("model.").split("."))
    owner = path[-1] if path else ""
    if owner == "kv_b_proj" and kind == "weight":
        w_uk, w_uv = split_kv_b(weight, config.num_attention_heads, config.qk_nope_head_dim)
        yield (*path[:-1], "w_uk"), None, w_uk
        yield (*path[:-1], "w_uv"), None, w_uv
    elif len(path) > 3 and path[-3] == "experts":
        yield (*path[:-3], owner), int(path[-2]), weight.T
    elif kind != "weight":
        yield (*path, kind), None, weight
    elif owner == "embed_tokens":
        yield (*path, "embedding"), None, weight
    elif weight.ndim == 1:
        yield (*path, "scale"), None, weight
    else:
        yield (*path, "kernel"), None, weight.T


def unused(name: str, config: DeepseekConfig) -> bool:
    """Scales (read with their weights), frequencies, a tied head, and layers for multi-token prediction."""
    parts = name.split(".")
    return (
        name.endswith(("_scale_inv", "rotary_emb.inv_freq"))
        or (config.tie_word_embeddings and name == "lm_head.weight")
        or (parts[:2] == ["model", "layers"] and parts[2].isdigit() and int(parts[2]) >= config.num_hidden_layers)
    )


def load(
    directory: str | Path, *, dtype: Any, progress: bool, mesh: MLAMesh | None, **options: Any
) -> DeepseekForCausalLM:
    """See `DeepseekForCausalLM.from_pretrained`."""
    directory = Path(directory)
    if not (directory / "config.json").exists():
        raise FileNotFoundError(f"{directory} must hold a config.json, got none; is it a Hugging Face checkpoint?")
    raw_config = checks.json_object(directory / "config.json")
    config = DeepseekConfig.from_hf(raw_config)
    quantization = raw_config.get("quantization_config") or {}
    block = tuple(quantization.get("weight_block_size") or FP8_BLOCK)
    tensors = tensors_in(directory)

    # Shapes only: no parameter is initialised, and none exists twice.
    model = nnx.eval_shape(lambda: DeepseekForCausalLM(config, dtype=dtype, mesh=mesh, rngs=nnx.Rngs(0), **options))
    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    missing = {path: parameter.shape[0] if _stacked(path) else 1 for path, parameter in flat.items()}
    stacks: dict[ParamPath, np.ndarray] = {}
    unknown: list[str] = []

    names = [name for name in tensors if not unused(name, config)]
    for name in _bar(names) if progress else names:
        weight = tensors[name].read()
        if weight.dtype == ml_dtypes.float8_e4m3fn:
            if name + "_scale_inv" not in tensors:
                raise ValueError(f"{name} is float8 and must come with {name}_scale_inv, got none in {directory}")
            scale_inv = tensors[name + "_scale_inv"].read()
            try:
                weight = dequantize(weight, scale_inv, block)
            except ValueError as error:
                raise ValueError(f"{name}: {error}; see weight_block_size in config.json") from None
        for path, expert, value in placed(name, weight, config):
            if path not in flat or (expert is not None and expert >= flat[path].shape[0]):
                unknown.append(name)
                continue
            wanted = flat[path]
            shape = wanted.shape if expert is None else wanted.shape[1:]
            if value.shape != shape:
                raise ValueError(f"{name} must give a parameter of shape {shape}, got {value.shape}; see config.json")
            missing[path] -= 1
            if expert is None:
                flat[path] = wanted.replace(_put(path, value, wanted.dtype, mesh))
                continue
            # Experts of a layer gather on the host, and leave it when the last one is in.
            stack = stacks.setdefault(path, np.empty(wanted.shape, wanted.dtype))
            stack[expert] = value
            if not missing[path]:
                flat[path] = wanted.replace(_put(path, stacks.pop(path), wanted.dtype, mesh))

    for words, wrong in (
        ("lacks tensors for", [".".join(map(str, path)) for path, count in missing.items() if count]),
        ("has tensors that the model does not know:", unknown),
    ):
        if wrong:
            raise ValueError(f"the checkpoint {words} {', '.join(wrong[:5])} ({len(wrong)} in all) in {directory}")
    nnx.update(model, nnx.from_flat_state(flat))
    return model


def _put(path: ParamPath, value: np.ndarray, dtype: Any, mesh: MLAMesh | None) -> jax.Array:
    """Converts and copies what a device needs: only that is read from the disk, on every host of several."""
    if mesh is None:
        return jnp.asarray(np.array(value, dtype))
    sharding = parameter_sharding(path, value.shape, mesh)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: np.array(value[index], dtype))


def _stacked(path: ParamPath) -> bool:
    return path[-2:] in (("mlp", "gate_proj"), ("mlp", "up_proj"), ("mlp", "down_proj"))


def _bar(names: list[str]) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "from_pretrained shows its progress with tqdm, and importing it failed; "
            "pip install 'jax-flashmla[flax]' brings it, progress=False goes without"
        ) from error
    return tqdm(names, desc="loading", unit="tensor")
