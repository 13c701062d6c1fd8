"""python -m jax_flashmla.generate: continues prompts with a DeepSeek model, and shows tokens as they come."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from . import checks
from .__main__ import leave_source_tree

if TYPE_CHECKING:
    from .nn import DeepseekForCausalLM, Engine, Request

DEFAULT_PROMPT = "The capital of France is"
CHUNKS = (32, 128, 512)
DTYPES = ("bfloat16", "float16", "float32")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jax_flashmla.generate", description=__doc__)
    parser.add_argument("--model", type=Path, help="a Hugging Face checkpoint on this disk (a tiny random model)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", nargs="+", metavar="TEXT", help=f"one or more ({DEFAULT_PROMPT!r})")
    source.add_argument("--tokens", metavar="FILE", help="token ids, one prompt a line; - is the standard input")
    parser.add_argument("--batch", type=int, default=16, help="so many prompts at once, the others wait (16)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="per prompt (64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="share of probability to draw from (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the next ones count on (0)")
    parser.add_argument("--batch-invariant", action="store_true", help="bits do not depend on the other prompts")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--implementation", choices=("cuda", "xla"), help="insist on one path")
    parser.add_argument(
        "--kv-format", choices=("fp8_v32",), help="of the cache of a model with sparse attention (rows of --dtype)"
    )
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--num-pages", type=int, help="in the cache (what the prompts need, or what fits)")
    return parser.parse_args(argv)


def random_model(args: argparse.Namespace) -> DeepseekForCausalLM:
    """V2-Lite with everything small but the rows of the cache; a token is a byte. Sparse for a format of its own."""
    from flax import nnx

    from .nn import DeepseekConfig, DeepseekForCausalLM

    config = dataclasses.replace(
        DeepseekConfig.v2_lite(),
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        n_routed_experts=8,
        moe_intermediate_size=64,
    )
    if args.kv_format is not None:
        config = dataclasses.replace(config, q_lora_rank=64, index_topk=16, index_n_heads=4)
    options = {"dtype": jnp.dtype(args.dtype), "implementation": args.implementation}
    return DeepseekForCausalLM(config, **options, rngs=nnx.Rngs(0))


class Text:
    """Text to token ids and back, as tokenizer.json and tokenizer_config.json of a checkpoint say.

    Without a tokenizer, a token is a byte for a random model, and a number for any other; output is numbers for both.
    """

    def __init__(self, directory: Path | None):
        self.tokenizer: Any = None
        self.bytes = directory is None
        if directory is None or not (directory / "tokenizer.json").exists():
            return
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                f"{directory} has a tokenizer.json, which needs the package tokenizers, and importing it failed; "
                "pip install 'jax-flashmla[generate]' brings it"
            ) from error
        path = directory / "tokenizer.json"
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # it raises nothing narrower
            raise ValueError(f"{path} must be a tokenizer, got {error}; is the download complete?") from None
        self._new_stream = lambda: tokenizers.decoders.DecodeStream(skip_special_tokens=True)
        config = read_json(directory / "tokenizer_config.json")
        bos = config.get("bos_token")
        bos = bos.get("content") if isinstance(bos, dict) else bos
        self._bos = self.tokenizer.token_to_id(bos) if bos and config.get("add_bos_token") else None

    def encode(self, text: str) -> list[int]:
        if self.tokenizer is not None:
            ids = self.tokenizer.encode(text).ids
            # Some tokenizer.json put it there themselves.
            return ids if self._bos is None or ids[:1] == [self._bos] else [self._bos, *ids]
        if self.bytes:
            return list(text.encode())
        raise ValueError("--prompt needs a tokenizer.json beside the model, got none; give token ids with --tokens")

    def pieces(self) -> Decoder:
        """What turns the tokens of one request into text, one after the other."""
        return Decoder(self.tokenizer, self._new_stream()) if self.tokenizer is not None else Decoder(None, None)


class Decoder:
    """The text that each token adds; a character of several tokens comes with the last of them, or at the end."""

    def __init__(self, tokenizer: Any, stream: Any):
        self._tokenizer, self._stream = tokenizer, stream
        self._tokens: list[int] = []
        self._shown = ""

    def __call__(self, token: int, *, last: bool = False) -> str:
        if self._stream is None:
            return f"{token} "
        self._tokens.append(token)
        piece = self._stream.step(self._tokenizer, token) or ""
        if last:  # what the stream holds back for the rest of a character that does not come
            text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
            piece = text.removeprefix(self._shown) if text.startswith(self._shown + piece) else piece
        self._shown += piece
        return piece


def read_json(path: Path) -> dict[str, Any]:
    return checks.json_object(path) if path.exists() else {}


def eos_token_ids(directory: Path | None) -> list[int]:
    """generation_config.json goes before config.json; either has a number, a list, or nothing."""
    for name in ("generation_config.json", "config.json") if directory else ():
        assert directory is not None
        ids = read_json(directory / name).get("eos_token_id")
        if ids is not None:
            return ids if isinstance(ids, list) else [ids]
    return []


def read_prompts(args: argparse.Namespace, text: Text) -> list[list[int]]:
    if args.tokens is None:
        prompts = [text.encode(prompt) for prompt in args.prompt or [DEFAULT_PROMPT]]
        if not all(prompts):
            raise ValueError("--prompt must have a token at least, got ''; leave it out for a prompt that is there")
        return prompts
    lines = (sys.stdin.read() if args.tokens == "-" else Path(args.tokens).read_text()).splitlines()
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            ids = [int(word) for word in line.replace(",", " ").split()]
        except ValueError as error:
            raise ValueError(f"--tokens must have token ids, got line {number}: {line[:60]!r} ({error})") from None
        if ids:
            prompts.append(ids)
    if not prompts:
        raise ValueError(f"--tokens must have a line of token ids at least, got none in {args.tokens}")
    return prompts


def make_engine(model: DeepseekForCausalLM, prompts: list[list[int]], args: argparse.Namespace) -> Engine:
    """Room for the longest `--batch` prompts with their outputs, when the device has it."""
    from .nn import Engine

    for name in ("batch", "max_new_tokens", "page_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    rows = sorted((len(prompt) + args.max_new_tokens - 1 for prompt in prompts), reverse=True)
    num_pages = args.num_pages
    if num_pages is None:
        # One more for each: the engine admits a request when all that run have a page in reserve.
        num_pages = sum(-(-n // args.page_size) + 1 for n in rows[: args.batch])
        try:
            fit = model.num_pages_that_fit(page_size=args.page_size, format=args.kv_format)
            num_pages = max(min(num_pages, fit), 1)
        except RuntimeError:
            pass  # the device does not tell how much memory it has
    # Few shapes: this is a short run, and each is a program to compile.
    longest = max(map(len, prompts))
    return Engine(
        model,
        num_pages=num_pages,
        page_size=args.page_size,
        max_seq_len=rows[0],
        batch_sizes=[min(args.batch, len(prompts))],
        chunk_sizes=[size for smaller, size in itertools.pairwise((0, *CHUNKS)) if smaller < longest],
        format=args.kv_format,
        eos_token_ids=eos_token_ids(args.model),
        batch_invariant=args.batch_invariant,
    )


def show(engine: Engine, requests: list[Request], text: Text) -> None:
    """One request token by token; several ones whole, each when it is done, under a bar that counts tokens."""
    from tqdm import tqdm

    decoders = {request: text.pieces() for request in requests}
    if len(requests) == 1:
        for request, token in engine.stream():
            print(decoders[request](token, last=request.done), end="", flush=True)
        print()
        return
    total = sum(request.max_new_tokens for request in requests)
    outputs = dict.fromkeys(requests, "")
    with tqdm(total=total, unit="token", file=sys.stderr) as bar:
        for request, token in engine.stream():
            outputs[request] += decoders[request](token, last=request.done)
            bar.update()
            if request.done:
                bar.total -= request.max_new_tokens - len(request.tokens)
                bar.write(f"[{request.id}] {outputs[request].rstrip()}", file=sys.stdout)


def summary(engine: Engine) -> Iterator[str]:
    stats = engine.stats
    device = next(iter(jax.tree.leaves(engine.caches)[0].devices()))
    yield f"{device.device_kind} ({device.platform})"
    yield f"prefill {stats.prefill_tokens} tokens, {stats.prefill_tokens_per_second:.1f} tokens/s"
    yield f"decode {stats.decode_tokens} tokens, {stats.decode_tokens_per_second:.1f} tokens/s"


def generate(args: argparse.Namespace) -> None:
    from .nn import DeepseekConfig, DeepseekForCausalLM
    from .nn.engine import check_options

    if args.model and not args.model.is_dir():
        raise ValueError(f"--model must be a directory with a checkpoint, got {args.model}")
    text = Text(args.model)
    prompts = read_prompts(args, text)
    for seed in (args.seed, args.seed + len(prompts) - 1):  # before the weights, which take minutes
        check_options(args.max_new_tokens, args.temperature, args.top_p, seed)
    if args.kv_format and args.dtype == "float16":
        raise ValueError(f"--kv-format {args.kv_format} goes with --dtype bfloat16, got float16; leave one of them out")
    if args.model is None:
        print("no --model: a tiny random one, whose tokens are bytes and mean nothing", file=sys.stderr)
        model = random_model(args)
    else:
        config = read_json(args.model / "config.json")
        if args.kv_format and config and DeepseekConfig.from_hf(config).index_topk is None:
            raise ValueError(
                f"--kv-format must be left out for a model with dense attention, got {args.kv_format!r} for "
                f"{args.model}; the kernel for dense attention reads no fp8"
            )
        options = {"dtype": jnp.dtype(args.dtype), "implementation": args.implementation}
        model = DeepseekForCausalLM.from_pretrained(args.model, **options)
    engine = make_engine(model, prompts, args)
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p}
    requests = [engine.submit(prompt, seed=args.seed + i, **options) for i, prompt in enumerate(prompts)]
    engine.warm_up()  # rates without compilation
    show(engine, requests, text)
    print(" · ".join(summary(engine)), file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        generate(args)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    leave_source_tree("jax_flashmla.generate")
    sys.exit(main())
