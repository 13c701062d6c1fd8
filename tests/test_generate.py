"""python -m jax_flashmla.generate: on a checkpoint with and without a tokenizer, and without a checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import nn_checkpoints
import numpy as np
import pytest

nnx = pytest.importorskip("flax.nnx")

from jax_flashmla import generate  # noqa: E402
from jax_flashmla.nn import DeepseekForCausalLM, deepseek  # noqa: E402

pytestmark = pytest.mark.usefixtures("small_chunks")

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]
SHORT = ["--dtype", "float32", "--max-new-tokens", "6", "--page-size", "16"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = nn_checkpoints.CONFIGS["v2_lite"]
    return nn_checkpoints.save(tmp_path_factory.mktemp("checkpoints") / "lite", config, nn_checkpoints.weights(config))


@pytest.fixture(scope="module")
def likeliest(checkpoint):
    """Six tokens after each prompt, by plain attention over the whole text each time."""
    model = DeepseekForCausalLM.from_pretrained(checkpoint, dtype=jnp.float32, progress=False)
    mha, texts = nnx.jit(DeepseekForCausalLM.mha), [list(prompt) for prompt in PROMPTS]
    for _ in range(6):
        padded = np.zeros((2, 16), np.int32)
        for i, text in enumerate(texts):
            padded[i, : len(text)] = text
        logits = np.asarray(mha(model, jnp.asarray(padded)))
        for i, text in enumerate(texts):
            text.append(int(logits[i, len(text) - 1].argmax()))
    return [text[len(prompt) :] for text, prompt in zip(texts, PROMPTS, strict=True)]


def numbers(text):
    return [int(word) for word in text.split()]


def test_token_files(checkpoint, likeliest, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(" ".join(map(str, prompt)) for prompt in PROMPTS) + "\n\n")
    assert generate.main(["--model", str(checkpoint), "--tokens", str(file), *SHORT]) == 0
    out, err = capsys.readouterr()
    lines = dict(line.split(" ", 1) for line in out.splitlines())
    assert {name: numbers(text) for name, text in lines.items()} == {"[0]": likeliest[0], "[1]": likeliest[1]}
    assert "12/12" in err and "decode 12 tokens" in err and "tokens/s" in err and "cpu" in err

    file.write_text(",".join(map(str, PROMPTS[0])))  # one prompt: its tokens as they come, no bar
    config = {"eos_token_id": [likeliest[0][2], 10**6]}
    (checkpoint / "generation_config.json").write_text(json.dumps(config))
    try:
        assert generate.main(["--model", str(checkpoint), "--tokens", str(file), *SHORT]) == 0
    finally:
        (checkpoint / "generation_config.json").unlink()
    out, err = capsys.readouterr()
    ends = likeliest[0].index(likeliest[0][2]) + 1
    assert numbers(out) == likeliest[0][:ends] and f"decode {ends} tokens" in err and "/6" not in err


def test_a_tokenizer(checkpoint, likeliest, tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    directory = tmp_path / "model"
    directory.mkdir()
    for file in checkpoint.iterdir():
        (directory / file.name).symlink_to(file)
    vocabulary = {f"w{i}": i for i in range(nn_checkpoints.CONFIGS["v2_lite"]["vocab_size"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    # The first token of the prompt comes from here.
    settings = {"add_bos_token": True, "bos_token": {"content": f"w{PROMPTS[0][0]}"}}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    prompt = " ".join(f"w{i}" for i in PROMPTS[0][1:])
    assert generate.main(["--model", str(directory), "--prompt", prompt, *SHORT]) == 0
    assert capsys.readouterr().out == " ".join(f"w{i}" for i in likeliest[0]) + "\n"


def test_characters_of_several_tokens_come_whole(tmp_path):
    """Bytes of UTF-8 as tokens: nothing is shown until a character is there."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = generate.Text(tmp_path)
    first, second = text.pieces(), text.pieces()
    tokens = text.encode("é→x")
    assert [first(token) for token in tokens] == ["", "é", "", "", "→", "x"]
    assert second(tokens[-1]) == "x"


def test_text_that_ends_inside_a_character_is_shown(tmp_path):
    """A token may hold letters and the first byte of a character, which the stream keeps for the next token."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("ab", "Ã")]  # Ã stands for the byte C3
    vocabulary = {c: i for i, c in enumerate([*alphabet, "ab", "abÃ"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = generate.Text(tmp_path)
    x, ab, ab_and_more = vocabulary["x"], vocabulary["ab"], vocabulary["abÃ"]
    for last, withheld, shown in ((ab_and_more, "", "ab\ufffd"), (ab, "ab", "ab")):
        piece = text.pieces()
        assert [piece(x), piece(last)] == ["x", withheld]
        piece = text.pieces()
        assert [piece(x), piece(last, last=True)] == ["x", shown]


def test_without_a_model_it_says_so(tmp_path):
    """As a user calls it: the module's own imports, streams and exit code."""
    root = Path(generate.__file__).resolve().parent.parent
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as in the other tests
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root), **quick}
    command = [sys.executable, "-P", "-m", "jax_flashmla.generate", *SHORT, "--temperature", "1", "--top-p", "0.9"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    assert "tiny random one" in result.stderr and "decode 6 tokens" in result.stderr
    tokens = numbers(result.stdout)
    assert len(tokens) == 6 and all(0 <= token < 256 for token in tokens)


def test_seeds_are_repeatable_and_a_batch_counts_them_on(checkpoint, tmp_path, capsys):
    def run(lines, *options):
        file = tmp_path / "prompts.txt"
        file.write_text("\n".join(lines))
        drawn = ["--temperature", "2", "--batch-invariant", *options]
        assert generate.main(["--model", str(checkpoint), "--tokens", str(file), *SHORT, *drawn]) == 0
        return capsys.readouterr().out

    together = run(["1 2 3", "1 2 3"], "--seed", "5")
    assert together == run(["1 2 3", "1 2 3"], "--seed", "5")
    texts = {line.split(" ", 1)[1] for line in together.splitlines()}
    assert len(texts) == 2  # the same prompt, another seed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "text"], "--prompt needs a tokenizer.json beside the model"),
        (["--model", "missing"], "--model must be a directory with a checkpoint, got missing"),
        (["--tokens", "good.txt", "--implementation", "cuda"], "implementation='cuda' needs a Hopper GPU"),
        (["--tokens", "missing.txt"], "missing.txt"),
        (["--tokens", "words.txt"], "--tokens must have token ids, got line 2: 'two words'"),
        (["--tokens", "empty.txt"], "--tokens must have a line of token ids at least, got none"),
        (["--tokens", "large.txt"], "prompt must have token ids from 0 to"),
        (["--tokens", "good.txt", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["--tokens", "good.txt", "--num-pages", "1"], "(num_pages), got 3 and 64"),
        (["--tokens", "good.txt", "--top-p", "2"], "top_p must be a number over 0 and up to 1, got 2.0"),
        (["--tokens", "good.txt", "--kv-format", "fp8_v32"], "--kv-format must be left out for a model with dense"),
        (
            ["--tokens", "good.txt", "--kv-format", "fp8_v32", "--dtype", "float16"],
            "--kv-format fp8_v32 goes with --dtype bfloat16, got float16; leave",
        ),
    ],
)
def test_errors(checkpoint, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    for name, content in {"words": "1 2\ntwo words", "empty": "\n", "large": "1000000", "good": "1 2 3"}.items():
        Path(f"{name}.txt").write_text(content)
    assert generate.main(["--model", str(checkpoint), "--page-size", "16", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("error: ") and message in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-p", "2"], "top_p must be a number over 0 and up to 1, got 2.0"),
        (["--temperature", "-1"], "temperature must be a number at least 0, got -1.0"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["--seed", str(2**32 - 1)], f"seed must be below 2**32, got {2**32}"),  # that of the second prompt
    ],
)
def test_options_are_checked_before_the_weights_are_read(tmp_path, capsys, options, message):
    (tmp_path / "good.txt").write_text("1 2 3\n4")
    assert generate.main(["--model", str(tmp_path), "--tokens", str(tmp_path / "good.txt"), *options]) == 2
    assert message in capsys.readouterr().err  # and not that there is no checkpoint


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_files_that_are_not_what_they_are_called(checkpoint, tmp_path, capsys, name):
    pytest.importorskip("tokenizers")
    for file in checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "good.txt").write_text("1 2 3")
    assert generate.main(["--model", str(tmp_path), "--tokens", str(tmp_path / "good.txt")]) == 2
    err = capsys.readouterr().err
    assert f"{name} must be a" in err and "is the download complete?" in err


def test_a_prompt_without_tokens_is_refused(capsys):
    assert generate.main(["--prompt", "text", ""]) == 2
    assert "error: --prompt must have a token at least, got ''" in capsys.readouterr().err


@pytest.fixture(scope="module")
def sparse_checkpoint(tmp_path_factory):
    config = nn_checkpoints.SPARSE_CONFIGS["v32_mscales"]  # one layer
    return nn_checkpoints.save(tmp_path_factory.mktemp("checkpoints") / "v32", config, nn_checkpoints.weights(config))


@pytest.mark.parametrize("format, token_bytes", [(None, (576 + 128) * 4), ("fp8_v32", 656 + 128 * 4)])
def test_sparse_attention(format, token_bytes, sparse_checkpoint, tmp_path, monkeypatch, capsys):
    """Two pools per layer, of 576 and 128 numbers a token, and both count where the device has little room."""
    prompt = [i % 7 for i in range(40)]  # 45 rows in the end: 3 pages of 16, and one in reserve
    file = tmp_path / "prompts.txt"
    file.write_text(" ".join(map(str, prompt)))
    monkeypatch.setattr(deepseek, "free_bytes", lambda device, fraction: 4 * 16 * token_bytes - 1)
    engines, summary = [], generate.summary
    monkeypatch.setattr(generate, "summary", lambda engine: engines.append(engine) or summary(engine))
    of_format = [] if format is None else ["--kv-format", format]
    assert generate.main(["--model", str(sparse_checkpoint), "--tokens", str(file), *SHORT, *of_format]) == 0
    out, err = capsys.readouterr()
    assert engines[0].pages.num_pages == 3 and "cpu" in err
    assert engines[0].caches[0].kv.dtype == (jnp.float32 if format is None else jnp.uint8)

    model = DeepseekForCausalLM.from_pretrained(sparse_checkpoint, dtype=jnp.float32, progress=False)
    text = jnp.array([prompt + numbers(out)])
    caches, table, length = model.init_caches(3, page_size=16, format=format), jnp.arange(3)[None], jnp.array([46])
    step = nnx.jit(DeepseekForCausalLM.__call__)
    logits = np.asarray(step(model, text, caches, table, length)[0])[0, len(prompt) - 1 : -1]
    chosen = np.take_along_axis(logits, np.array(numbers(out))[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(chosen, logits.max(axis=1), atol=1e-4)  # near ties may go either way in float32


def test_a_random_model_has_what_the_format_needs(capsys):
    assert generate.main([*SHORT, "--kv-format", "fp8_v32"]) == 0
    out, err = capsys.readouterr()
    assert len(numbers(out)) == 6 and "tiny random one" in err


def test_no_checkpoint_in_the_directory(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("1 2 3")
    assert generate.main(["--model", str(tmp_path), "--tokens", str(tmp_path / "prompts.txt")]) == 2
    assert "must hold a config.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        generate.main(["--prompt", "a", "--tokens", "b"])
