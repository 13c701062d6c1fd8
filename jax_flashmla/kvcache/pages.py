"""Pages on the host: which sequence owns which, and how many a device has room for."""

import numbers
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from .. import checks
from . import arguments


class OutOfPages(RuntimeError):
    """A `PageAllocator` has too few free pages for a request; nothing has changed."""


class PageAllocator:
    """Hands out the pages of a pool to sequences, on the host; no arrays are involved.

    Forked sequences share their pages and count references. The first of them to write into a shared page that is not
    full gets a page of its own, which `extend` reports so that `copy_pages` can fill it.

    Args:
      num_pages: pages in the pool (of one layer).
      page_size: tokens in a page.

    Raises:
      OutOfPages: `alloc` or `extend` needs more pages than are free; nothing has changed.
      KeyError: a sequence that was never allocated, or that was freed.
      TypeError, ValueError: a number is no int, or too small.

    Example:
      >>> from jax_flashmla import kvcache
      >>> pages = kvcache.PageAllocator(num_pages=8, page_size=64)
      >>> prompt = pages.alloc(100)
      >>> beam = pages.fork(prompt)
      >>> pages.extend(beam, 1)  # token 101 goes to a page that both share: copy it first
      [(1, 2)]
      >>> pages.block_table([prompt, beam]).tolist(), pages.cache_seqlens([prompt, beam]).tolist()
      ([[0, 1], [0, 2]], [100, 101])
      >>> pages.free(prompt), pages.free(beam), pages.num_free
      (None, None, 8)
    """

    def __init__(self, num_pages: int, page_size: int = 64):
        self.num_pages = checks.integer("num_pages", num_pages, minimum=1)
        self.page_size = checks.integer("page_size", page_size, minimum=1)
        self._free = list(range(self.num_pages))[::-1]
        self._references = [0] * self.num_pages
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._next_sequence = 0

    @property
    def num_free(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def alloc(self, num_tokens: int) -> int:
        """Starts a sequence with room for `num_tokens` tokens, 0 or more, and returns its id."""
        num_tokens = checks.integer("num_tokens", num_tokens, minimum=0)
        pages = self._take(-(-num_tokens // self.page_size))
        return self._start(pages, num_tokens)

    def extend(self, sequence: int, num_tokens: int) -> list[tuple[int, int]]:
        """Adds room for `num_tokens` tokens; returns the pages to copy, `(source, target)`, before they are written."""
        held, length = self._held(sequence), self._lengths[sequence]
        num_tokens = checks.integer("num_tokens", num_tokens, minimum=0)
        more = -(-(length + num_tokens) // self.page_size) - len(held)
        shared = num_tokens > 0 and length % self.page_size > 0 and self._references[held[-1]] > 1
        taken = self._take(more + shared)
        copies = []
        if shared:
            copies.append((held[-1], taken[0]))
            self._references[held[-1]] -= 1
            held.pop()
        held += taken
        self._lengths[sequence] = length + num_tokens
        return copies

    def fork(self, sequence: int, num_tokens: int | None = None) -> int:
        """Starts a sequence with the first `num_tokens` tokens of another, all when None, on the same pages; its id."""
        held, length = self._held(sequence), self._lengths[sequence]
        num_tokens = length if num_tokens is None else checks.integer("num_tokens", num_tokens, minimum=0)
        if num_tokens > length:
            raise ValueError(f"num_tokens must be at most {length}, the tokens of the sequence, got {num_tokens}")
        held = held[: -(-num_tokens // self.page_size)]
        for page in held:
            self._references[page] += 1
        return self._start(held, num_tokens)

    def free(self, sequence: int) -> None:
        """Ends a sequence; pages that nobody else holds can be handed out again."""
        held = self._held(sequence)
        del self._pages[sequence], self._lengths[sequence]
        for page in reversed(held):
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)

    def pages(self, sequence: int) -> tuple[int, ...]:
        """The pages of a sequence, in order."""
        return tuple(self._held(sequence))

    def length(self, sequence: int) -> int:
        """The tokens of a sequence."""
        self._held(sequence)
        return self._lengths[sequence]

    def block_table(self, sequences: Sequence[int], max_pages: int | None = None) -> np.ndarray:
        """int32 `[b, max_pages]`, -1 behind the pages of each; None is as wide as the longest, 1 at least."""
        rows = [self._held(sequence) for sequence in sequences]
        widest = max(map(len, rows), default=0)
        width = max(widest, 1) if max_pages is None else checks.integer("max_pages", max_pages, minimum=1)
        if widest > width:
            raise ValueError(f"max_pages must be at least {widest}, the pages of the longest sequence, got {width}")
        table = np.full((len(rows), width), -1, np.int32)
        for i, row in enumerate(rows):
            table[i, : len(row)] = row
        return table

    def cache_seqlens(self, sequences: Sequence[int]) -> np.ndarray:
        """int32 `[b]`, the tokens of each sequence."""
        return np.array([self.length(sequence) for sequence in sequences], np.int32)

    def _held(self, sequence: int) -> list[int]:
        if sequence not in self._pages:
            raise KeyError(f"sequence must be an id that alloc or fork returned and free did not end, got {sequence!r}")
        return self._pages[sequence]

    def _take(self, count: int) -> list[int]:
        if count > len(self._free):
            raise OutOfPages(
                f"{count} pages of {self.page_size} tokens were asked for and {len(self._free)} of {self.num_pages} "
                "are free; free a sequence and try again, or make the pool larger; nothing has changed"
            )
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._references[page] = 1
        return taken

    def _start(self, pages: list[int], length: int) -> int:
        sequence = self._next_sequence
        self._next_sequence += 1
        self._pages[sequence], self._lengths[sequence] = pages, length
        return sequence


def num_pages_that_fit(
    format: str,
    num_layers: int,
    fraction: float = 0.9,
    *,
    page_size: int = 64,
    head_dim: int | None = None,
    padded: bool = False,
    device: Any = None,
) -> int:
    """How many pages a cache may have per layer, so that the device's memory is filled to a fraction.

    `nn.DeepseekForCausalLM.num_pages_that_fit` knows the caches of a model, also where a layer has two.

    Load the weights first: what is in use when this is called counts towards the fraction.

    Args:
      format: "bf16", "f16", "fp8_v32" or "fp8_v4".
      num_layers: layers of the cache.
      fraction: of the memory that JAX may use on the device, over 0 and up to 1.
      page_size: tokens in a page.
      head_dim: width of a `bf16` or `f16` row, 576 or 512; None is 576.
      padded: pages of `fp8_v4` padded to a multiple of 576 bytes.
      device: None is the first local device.

    Returns:
      Pages per layer, 0 when nothing fits.

    Raises:
      TypeError, ValueError: an argument has the wrong type or value.
      RuntimeError: the device does not tell how much memory it has, as CPUs do not.

    Example:
      >>> from types import SimpleNamespace
      >>> from jax_flashmla import kvcache
      >>> memory = {"bytes_limit": 100_000_000_000, "bytes_in_use": 60_000_000_000}
      >>> gpu = SimpleNamespace(memory_stats=lambda: memory)
      >>> kvcache.num_pages_that_fit("fp8_v32", num_layers=61, device=gpu)
      11714
    """
    fmt = arguments.kv_format(format, head_dim, padded)
    num_layers = checks.integer("num_layers", num_layers, minimum=1)
    page_size = checks.integer("page_size", page_size, minimum=1)
    room = free_bytes(jax.local_devices()[0] if device is None else device, fraction)
    return room // (fmt.page_bytes(page_size, padded=padded) * num_layers)


def free_bytes(device: Any, fraction: float) -> int:
    """What is left of a fraction of the device's memory."""
    if isinstance(fraction, bool) or not isinstance(fraction, numbers.Real) or not 0 < fraction <= 1:
        raise ValueError(f"fraction must be a number over 0 and up to 1, got {fraction!r}")
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        raise RuntimeError(f"device must tell how much memory it has, and {device} does not; choose num_pages yourself")
    return max(int(fraction * stats["bytes_limit"]) - stats.get("bytes_in_use", 0), 0)
