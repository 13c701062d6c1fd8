"""Writes what Hugging Face transformers computes for the checkpoints of nn_checkpoints.py: tests/nn_logits.npz, and
tests/nn_logits_v32.npz for those with sparse attention.

pip install torch transformers ml_dtypes && python tests/make_nn_fixtures.py

float32 on the CPU, eager attention, whole sequences at once. The tests need neither torch nor transformers.
"""

import tempfile
from pathlib import Path

import nn_checkpoints
import numpy as np
import torch
import transformers

HERE = Path(__file__).parent


@torch.no_grad()
def logits(directory: Path) -> np.ndarray:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    wrong = {kind: names for kind, names in report.items() if names}
    assert not wrong, wrong  # a tensor that transformers did not take would leave its random values
    return model.eval()(torch.tensor(nn_checkpoints.TOKENS)).logits.numpy()


def write(target: Path, configs: dict[str, dict]) -> None:
    out = {}
    for name, config in configs.items():
        with tempfile.TemporaryDirectory() as directory:
            nn_checkpoints.save(Path(directory), config, nn_checkpoints.weights(config))
            out[name] = logits(Path(directory))
        print(f"{name}: {out[name].shape}, std {out[name].std():.3f}, max {abs(out[name]).max():.3f}")
    np.savez_compressed(target, **out)
    print(f"{target.name}: {target.stat().st_size} bytes, transformers {transformers.__version__}")


if __name__ == "__main__":
    write(HERE / "nn_logits.npz", nn_checkpoints.CONFIGS)
    write(HERE / "nn_logits_v32.npz", nn_checkpoints.SPARSE_CONFIGS)
