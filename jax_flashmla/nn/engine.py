"""Continuous batching over the paged cache: requests come and go, and the device runs a few fixed shapes.

The host side is plain Python: who runs, who waits, who holds which pages. The device side is two programs per bucket,
one that writes a piece of some prompts into the cache, and one that decodes a token per sequence. docs/serving.md has
the policies and what they promise.
"""

import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from .. import checks
from ..kvcache import OutOfPages, PageAllocator, copy_pages
from .deepseek import Caches, DeepseekForCausalLM
from .sampling import sample

MOST_TEMPERATURE = float(np.finfo(np.float32).max)
NARROWEST_TABLE = 16  # pages; the next widths are 4 times as wide each


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and what was generated for it. Made by `Engine.submit`; read it, change nothing.

    Attributes:
      id: counts the requests of the engine from 0, in the order of `submit`.
      prompt: int32 `[n]`.
      max_new_tokens, temperature, top_p, seed: as given to `submit`.
      submitted: when `submit` was called, in seconds of `time.perf_counter`.
      tokens: generated so far, the one that ended the request included.
      token_times: when each token was there, on the same clock.
      finish_reason: None before the end; then "eos", "length" or "cancelled".
      shared_tokens: tokens of the prompt whose rows came from another request, last time it was admitted.
      preemptions: how often it lost its pages and had to wait for others.
    """

    id: int
    prompt: np.ndarray
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    submitted: float
    tokens: list[int] = dataclasses.field(default_factory=list, init=False)
    token_times: list[float] = dataclasses.field(default_factory=list, init=False)
    finish_reason: str | None = dataclasses.field(default=None, init=False)
    shared_tokens: int = dataclasses.field(default=0, init=False)
    preemptions: int = dataclasses.field(default=0, init=False)
    _sequence: int | None = dataclasses.field(default=None, init=False)  # in the page allocator, while it runs
    _computed: int = dataclasses.field(default=0, init=False)  # tokens whose rows are in the cache

    @property
    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.finish_reason is not None

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from `submit` to the first token; None before it."""
        return self.token_times[0] - self.submitted if self.token_times else None

    @property
    def token_latencies(self) -> list[float]:
        """Seconds from each token to the next one."""
        return [b - a for a, b in itertools.pairwise(self.token_times)]

    @property
    def _known(self) -> int:
        return len(self.prompt) + len(self.tokens)

    def _token(self, position: int) -> int:
        n = len(self.prompt)
        return int(self.prompt[position]) if position < n else self.tokens[position - n]


@dataclasses.dataclass
class Stats:
    """What an engine has done since it was made.

    Attributes:
      prefill_tokens: tokens that prefill steps wrote into the cache.
      prefill_seconds: time in prefill steps, on the host's clock, until the device was done.
      decode_tokens: generated tokens.
      decode_seconds: the same for decode steps.
      prefill_steps, decode_steps: how many there were.
      shared_tokens: tokens of prompts that needed no prefill, because another request had them.
      preemptions: requests that lost their pages to older ones.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    prefill_steps: int = 0
    decode_steps: int = 0
    shared_tokens: int = 0
    preemptions: int = 0

    @property
    def prefill_tokens_per_second(self) -> float:
        """0 without prefill steps."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """0 without decode steps."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


class Engine:
    """Generates for many requests at once, over one pool of pages. For one thread.

    A step admits what fits, runs one piece of prefill, then decodes one token of every request whose prompt is in the
    cache. So a long prompt delays the others by one piece per token, `chunk_sizes[-1]` tokens of prefill.

    Requests are admitted first come, first served, when there are pages for all of their tokens so far. When a running
    one needs a page and none is free, the youngest loses its own and waits again, with the tokens it has. The oldest
    is never preempted, and every request fits into an empty pool, so all of them end.

    A prompt that begins like that of a running request, for a page or more, shares its pages.

    Args:
      model: a `DeepseekForCausalLM`, on one device, or on a mesh whose axes divide heads and nothing else: sequences
        share one pool of pages. Its parameters are read here, once.
      num_pages: pages in the pool, per layer; `DeepseekForCausalLM.num_pages_that_fit` tells how many there may be.
      page_size: tokens in a page: 16, 32, 64 (fastest), 128 or 256.
      max_seq_len: the most tokens of a request, prompt and output; None is what the pool holds. It bounds the widths
        of block tables, and so the number of programs.
      batch_sizes: how many places a decode step may have, ascending. The last one is how many requests run at once.
      chunk_sizes: how many tokens of a prompt a prefill step may take, ascending. The last one bounds the whole step:
        several short prompts go together.
      format: of the caches, as of `DeepseekForCausalLM.init_caches`: None, or "fp8_v32" where attention is sparse.
      eos_token_ids: tokens that end a request.
      batch_invariant: the logits of a request do not depend on the others, bit for bit: one shape for all prefill
        steps and one for all decode steps, the largest of each, and plans with `batch_invariant=True`. Sparse
        attention has no plans, and its picks look at their own sequence alone. Slower.
      share_prefixes: False recomputes every prompt.

    Attributes:
      pages: the `PageAllocator`.
      caches: of the model, one per layer.
      running: requests with pages, the oldest first.
      waiting: requests without, the oldest first; each younger than all that run.
      stats: a `Stats`.

    Raises:
      TypeError, ValueError: an argument has the wrong type or value, or the attention does not read the format.

    Example:
      >>> import dataclasses, jax.numpy as jnp
      >>> from flax import nnx
      >>> from jax_flashmla.nn import DeepseekConfig, DeepseekForCausalLM, Engine
      >>> config = dataclasses.replace(DeepseekConfig.v2_lite(), vocab_size=50, hidden_size=32, num_hidden_layers=1,
      ...     num_attention_heads=2, intermediate_size=32)
      >>> model = DeepseekForCausalLM(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
      >>> engine = Engine(model, num_pages=8, page_size=16, batch_sizes=(2,), chunk_sizes=(16,))
      >>> first = engine.submit([7, 1, 4], max_new_tokens=3)
      >>> second = engine.submit([9] * 20, max_new_tokens=2, temperature=0.8, top_p=0.9, seed=1)
      >>> [request.id for request, token in engine.stream()]
      [0, 0, 0, 1, 1]
      >>> first.finish_reason, len(first.tokens), engine.pages.num_free
      ('length', 3, 8)
    """

    def __init__(
        self,
        model: DeepseekForCausalLM,
        *,
        num_pages: int,
        page_size: int = 64,
        max_seq_len: int | None = None,
        batch_sizes: Sequence[int] = (1, 2, 4, 8, 16),
        chunk_sizes: Sequence[int] = (32, 128, 512),
        format: str | None = None,
        eos_token_ids: Iterable[int] = (),
        batch_invariant: bool = False,
        share_prefixes: bool = True,
    ):
        if model.mesh is not None and model.mesh.size("pages") > 1:
            raise ValueError(
                f"model must have one pool of pages, got a mesh of {model.mesh.size('pages')} pools; divide heads, or "
                "run an engine per device"
            )
        self.pages = PageAllocator(num_pages, page_size)
        if page_size not in checks.PAGE_SIZES:
            raise ValueError(f"page_size must be one of {checks.PAGE_SIZES}, got {page_size}; 64 is the fastest")
        room = self.pages.num_pages * page_size
        self.max_seq_len = room if max_seq_len is None else checks.integer("max_seq_len", max_seq_len, minimum=1)
        self.batch_sizes = _ascending("batch_sizes", batch_sizes)
        self.chunk_sizes = _ascending("chunk_sizes", chunk_sizes)
        self.batch_invariant = checks.flag("batch_invariant", batch_invariant)
        self.share_prefixes = checks.flag("share_prefixes", share_prefixes)
        if self.batch_invariant:
            checks.invariant_batch(self.batch_sizes[-1], True)
            self.batch_sizes, self.chunk_sizes = self.batch_sizes[-1:], self.chunk_sizes[-1:]
        # The last piece of a prompt may reach behind its end, by less than a chunk.
        widest = -(-(self.max_seq_len + self.chunk_sizes[-1]) // page_size)
        narrower = [] if self.batch_invariant else [NARROWEST_TABLE * 4**i for i in range(16)]
        self.table_widths = (*(width for width in narrower if width < widest), widest)
        self.eos_token_ids = frozenset(_integers("eos_token_ids", eos_token_ids, minimum=0))
        self.vocab_size = model.config.vocab_size

        graphdef, params = nnx.split(model)
        self._params, structure = jax.tree.flatten(params)
        self._prefill, self._decode, self._copy = _programs(graphdef, structure, self.batch_invariant)
        self.caches: Caches = model.init_caches(num_pages, page_size=page_size, format=format)
        self.running: list[Request] = []
        self.waiting: collections.deque[Request] = collections.deque()
        self.stats = Stats()
        self._submitted = 0
        self._undelivered: collections.deque[tuple[Request, int]] = collections.deque()  # of the last step of a stream

    # --- what a server calls

    def submit(
        self,
        prompt: Sequence[int] | np.ndarray,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Request:
        """Queues a prompt; `step` will work on it.

        Args:
          prompt: token ids, one at least.
          max_new_tokens: how many tokens to generate, unless one of `eos_token_ids` comes first.
          temperature: 0 takes the likeliest token; above, tokens are drawn, see `sample`.
          top_p: over 0 and up to 1: the share of probability that tokens are drawn from.
          seed: of the draws, from 0 to 2**32 - 1. The same seed and prompt give the same tokens.

        Returns:
          The request, which `step` fills.

        Raises:
          TypeError, ValueError: an argument has the wrong type or value, or the request is too long to fit even alone.
        """
        prompt = np.asarray(prompt)
        if prompt.ndim != 1 or prompt.size == 0 or prompt.dtype.kind not in "iu":
            raise ValueError(
                f"prompt must be token ids [n], one at least, got {prompt.dtype} of shape {prompt.shape}; encode the "
                "text first"
            )
        if prompt.min() < 0 or prompt.max() >= self.vocab_size:
            wrong = prompt[(prompt < 0) | (prompt >= self.vocab_size)][0]
            raise ValueError(f"prompt must have token ids from 0 to {self.vocab_size - 1}, got {wrong}; see vocab_size")
        max_new_tokens, temperature, top_p, seed = check_options(max_new_tokens, temperature, top_p, seed)
        rows = len(prompt) + max_new_tokens - 1  # the last token is not attended to
        room = self.pages.num_pages * self.pages.page_size
        for name, limit in (("max_seq_len", self.max_seq_len), ("num_pages", room)):
            if rows > limit:
                raise ValueError(
                    f"prompt and max_new_tokens must fit in {limit} tokens ({name}), got {len(prompt)} and "
                    f"{max_new_tokens}, of which the last needs no room; ask for fewer, or make the engine larger"
                )
        prompt = prompt.astype(np.int32)  # a copy
        request = Request(self._submitted, prompt, max_new_tokens, temperature, top_p, seed, _now())
        self._submitted += 1
        self.waiting.append(request)
        return request

    def step(self) -> list[tuple[Request, int]]:
        """One piece of prefill and one token of every sequence that is ready; returns the new tokens.

        When it raises, the caches may be gone: make a new engine.
        """
        self._admit()
        self._prefill_step()
        return self._decode_step()

    def stream(self) -> Iterator[tuple[Request, int]]:
        """Steps while there are requests, and yields each token as it comes. More may be submitted meanwhile.

        Whoever leaves in the middle of a step finds the rest of its tokens in the next stream.
        """
        while self._undelivered or not self.idle:
            if not self._undelivered:
                self._undelivered.extend(self.step())
            while self._undelivered:
                request, token = self._undelivered.popleft()
                if request.finish_reason != "cancelled":  # by whoever consumes this
                    yield request, token

    def run(self) -> None:
        """Steps until every request is done."""
        while not self.idle:
            self.step()

    def cancel(self, request: Request) -> None:
        """Ends a request and frees its pages, whether it waits or runs; nothing happens when it is done."""
        if request in self.running:
            self._leave(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        else:
            return
        request.finish_reason = "cancelled"

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not self.waiting

    def warm_up(self) -> int:
        """Compiles, or finds, the programs of all buckets, so that no later step waits for it; returns their number.

        Runs them on empty places: nothing is written.
        """
        decode = [(b, 0) for b in self.batch_sizes]
        prefill = [(b, s) for s in self.chunk_sizes for b in self._prefill_sizes(s)]
        buckets = list(itertools.product(decode + prefill, self.table_widths))
        # Twice: parameters that are bound to devices bind the caches with the first call, and then the programs of
        # unbound caches are of no use any more.
        for (b, s), width in buckets * 2:
            table, zeros = np.full((b, width), -1, np.int32), np.zeros(b, np.int32)
            if s:
                self.caches = self._prefill(self._params, self.caches, np.zeros((b, s), np.int32), table, zeros, zeros)
            else:
                self._run_decode(zeros, table, zeros, [])
        self._copy_page(-1, -1)  # nothing
        jax.block_until_ready(self.caches)
        return len(buckets) + 1

    # --- admission and preemption

    def _admit(self) -> None:
        """First come, first served: when the first of the queue does not fit, nobody passes it."""
        while self.waiting and len(self.running) < self.batch_sizes[-1]:
            request = self.waiting[0]
            owner, shared, soon = self._prefix(request)
            if shared < soon:
                return  # it will be in the cache in a few steps, for the request that computes it is older
            # A page in reserve for each that runs: else it might be preempted as soon as it is in.
            needed = -(-request._known // self.pages.page_size) - shared // self.pages.page_size
            if needed + len(self.running) > self.pages.num_free:
                return
            self.waiting.popleft()
            if owner is None:
                request._sequence = self.pages.alloc(request._known)
            else:
                request._sequence = self.pages.fork(owner, shared)
                for source, target in self.pages.extend(request._sequence, request._known - shared):
                    self._copy_page(source, target)
            request._computed = request.shared_tokens = shared
            self.stats.shared_tokens += shared
            self.running.append(request)

    def _prefix(self, request: Request) -> tuple[int | None, int, int]:
        """A running sequence that begins like the prompt, how many of these tokens it has in the cache, and how many
        the best one will have. The last token of a prompt is decoded, so it is not shared."""
        owner, shared, soon = None, 0, 0
        for other in self.running if self.share_prefixes else ():
            common = _common_prefix(other.prompt[:-1], request.prompt[:-1])
            if common < self.pages.page_size:
                continue
            soon = max(soon, common)
            if min(common, other._computed) > shared:
                owner, shared = other._sequence, min(common, other._computed)
        return owner, shared, soon

    def _extend(self, request: Request) -> bool:
        """Makes room for the next token, at the cost of the youngest; False when that is the request itself."""
        assert request._sequence is not None
        while self.pages.length(request._sequence) == request._computed:
            try:
                copies = self.pages.extend(request._sequence, 1)
                assert not copies, "a page that is not full belongs to one sequence: whoever forks it copies it at once"
            except OutOfPages:
                youngest = self.running[-1]
                self._leave(youngest)
                youngest._computed = 0
                youngest.preemptions += 1
                self.stats.preemptions += 1
                self.waiting.appendleft(youngest)
                if youngest is request:
                    return False
        return True

    def _leave(self, request: Request) -> None:
        assert request._sequence is not None
        self.running.remove(request)
        self.pages.free(request._sequence)
        request._sequence = None

    def _copy_page(self, source: int, target: int) -> None:
        self.caches = self._copy(self.caches, np.array([source], np.int32), np.array([target], np.int32))

    # --- steps

    def _prefilled(self, request: Request) -> int:
        """Tokens that prefill writes: all but the last, which is decoded to get the next one.

        After a preemption the tokens generated so far are known as well. With `batch_invariant` they are decoded once
        more, in the shape in which they were computed the first time.
        """
        return (len(request.prompt) if self.batch_invariant else request._known) - 1

    def _prefill_sizes(self, chunk: int) -> list[int]:
        return [b for b in sorted({1, *self.batch_sizes}) if b == 1 or b * chunk <= self.chunk_sizes[-1]]

    def _prefill_step(self) -> None:
        """The oldest prompt that is not in the cache gets a piece, and the next ones, while there is room."""
        pending = [r for r in self.running if r._computed < self._prefilled(r)]
        if not pending:
            return
        start = _now()
        oldest = pending[0]
        s = _bucket(self.chunk_sizes, self._prefilled(oldest) - oldest._computed)
        sizes = self._prefill_sizes(s)
        pending = pending[: sizes[-1]]
        b = _bucket(sizes, len(pending))
        tokens, ends, num_new = np.zeros((b, s), np.int32), np.zeros(b, np.int32), np.zeros(b, np.int32)
        done = []
        for i, request in enumerate(pending):
            first = request._computed
            # Batch-invariant pieces begin at multiples of their length, so that a token has its place in a piece by its
            # position alone, whatever was shared before it: plans cut the keys of a piece by where it ends. What is in
            # the cache already is not written again.
            skipped = first % s if self.batch_invariant else 0
            count = min(self._prefilled(request) - first, s - skipped)
            tokens[i, skipped : skipped + count] = [request._token(first + j) for j in range(count)]
            # A piece is always full: rows behind the end of the prompt go to pages of its own that later tokens write
            # again, or to none. No real token attends to them.
            ends[i], num_new[i] = first - skipped + s, s - skipped
            done.append(count)
        table = self._table(pending, b, int(ends.max()))
        self.caches = self._prefill(self._params, self.caches, tokens, table, ends, num_new)
        jax.block_until_ready(self.caches)  # else the decode step would be charged for it
        for request, count in zip(pending, done, strict=True):
            request._computed += count
        self.stats.prefill_steps += 1
        self.stats.prefill_tokens += sum(done)
        self.stats.prefill_seconds += _now() - start

    def _decode_step(self) -> list[tuple[Request, int]]:
        ready = []
        for request in list(self.running):
            # Whoever was preempted by an older one has left.
            if request._sequence is None or request._computed < self._prefilled(request):
                continue
            if self._extend(request):
                ready.append(request)
        if not ready:
            return []
        start = _now()
        b = _bucket(self.batch_sizes, len(ready))
        tokens, lengths = np.zeros(b, np.int32), np.zeros(b, np.int32)
        for i, request in enumerate(ready):
            tokens[i], lengths[i] = request._token(request._computed), request._computed + 1
        sampled = self._run_decode(tokens, self._table(ready, b, int(lengths.max())), lengths, ready)
        now = _now()
        new = []
        for request, token in zip(ready, sampled.tolist(), strict=False):
            request._computed += 1
            if request._computed < request._known:
                continue  # decoded once more after a preemption
            request.tokens.append(token)
            request.token_times.append(now)
            new.append((request, token))
            if token in self.eos_token_ids or len(request.tokens) == request.max_new_tokens:
                self._leave(request)
                request.finish_reason = "eos" if token in self.eos_token_ids else "length"
        self.stats.decode_steps += 1
        self.stats.decode_tokens += len(new)
        self.stats.decode_seconds += now - start
        return new

    def _run_decode(self, tokens: np.ndarray, table: np.ndarray, lengths: np.ndarray, requests: list[Request]) -> Any:
        seeds, temperature = np.zeros(len(tokens), np.uint32), np.zeros(len(tokens), np.float32)
        top_p = np.ones(len(tokens), np.float32)
        for i, request in enumerate(requests):
            seeds[i], temperature[i], top_p[i] = request.seed, request.temperature, request.top_p
        sampled, self.caches = self._decode(
            self._params, self.caches, tokens, table, lengths, seeds, temperature, top_p
        )
        return np.asarray(sampled)

    def _table(self, requests: list[Request], b: int, longest: int) -> np.ndarray:
        """As many columns as the lengths reach: the op clamps lengths to the table, which would shift its mask."""
        sequences = [request._sequence for request in requests if request._sequence is not None]
        held = max(len(self.pages.pages(sequence)) for sequence in sequences)
        width = _bucket(self.table_widths, max(held, -(-longest // self.pages.page_size)))
        table = np.full((b, width), -1, np.int32)
        table[: len(sequences)] = self.pages.block_table(sequences, width)
        return table


@functools.lru_cache(maxsize=8)  # engines of the same model share their programs
def _programs(graphdef: Any, structure: Any, batch_invariant: bool) -> tuple[Callable[..., Any], ...]:
    """The parameters come as a list: a State of a thousand of them costs a millisecond per call."""

    def call(params: list[jax.Array], *args: Any, **kwargs: Any) -> tuple[jax.Array, Caches]:
        model = nnx.merge(graphdef, jax.tree.unflatten(structure, params))
        return model(*args, **kwargs, logits_to_keep=1, batch_invariant=batch_invariant)

    def prefill(params, caches, tokens, table, ends, num_new):  # nobody asks for the logits, so XLA drops them
        return call(params, tokens, caches, table, ends, num_new=num_new)[1]

    def decode(params, caches, tokens, table, lengths, seeds, temperature, top_p):
        logits, caches = call(params, tokens[:, None], caches, table, lengths)
        return sample(logits[:, 0], seeds, lengths, temperature, top_p), caches

    def copy(caches, source, target):
        return jax.tree.map(lambda pool: copy_pages(pool, source, target), caches)  # sparse caches are pairs of pools

    return jax.jit(prefill, donate_argnums=1), jax.jit(decode, donate_argnums=1), jax.jit(copy, donate_argnums=0)


def _now() -> float:
    return time.perf_counter()


def _bucket(sizes: Sequence[int], n: int) -> int:
    """The smallest that is large enough, else the largest."""
    return next((size for size in sizes if size >= n), sizes[-1])


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if different.size else n


def _integers(name: str, values: Iterable[int], *, minimum: int) -> tuple[int, ...]:
    if not isinstance(values, Iterable):
        raise TypeError(f"{name} must be numbers, got {type(values).__name__} {values!r}; give a tuple")
    return tuple(checks.integer(name, value, minimum=minimum) for value in values)


def _ascending(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    result = _integers(name, sizes, minimum=1)
    if not result or any(a >= b for a, b in itertools.pairwise(result)):
        raise ValueError(f"{name} must be ascending numbers, one at least, got {result}")
    return result


def check_options(max_new_tokens: int, temperature: float, top_p: float, seed: int) -> tuple[int, float, float, int]:
    """What `Engine.submit` takes beside a prompt, checked; for callers who have a model to load first."""
    seed = checks.integer("seed", seed, minimum=0)
    if seed >= 2**32:
        raise ValueError(f"seed must be below 2**32, got {seed}")
    return (
        checks.integer("max_new_tokens", max_new_tokens, minimum=1),
        _number("temperature", temperature, "at least 0", lambda x: 0 <= x <= MOST_TEMPERATURE),
        _number("top_p", top_p, "over 0 and up to 1", lambda x: 0 < x <= 1),
        seed,
    )


def _number(name: str, value: float, words: str, good: Callable[[float], bool]) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not good(float(value)):
        raise ValueError(f"{name} must be a number {words}, got {value!r}")
    return float(value)
