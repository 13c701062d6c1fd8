"""The one way in which everything is timed: chains of calls, two modes, the clock beside them, and the run's ceilings.

A contender runs a short and a long chain of calls back to back; the difference of the two is time on the device, and
what it costs to begin and to wait cancels out. Contenders take turns in rotating order, because who goes first after a
pause finds a cool card.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

GIB = 2**30
READERS = ("read: rows", "read: all")
HIDES = 0.5e-3  # seconds of work of the device behind which the next launch of the host does not show


class Chain(NamedTuple):
    """Two chains of one contender. Each call of `short` or `long` returns when the device is done."""

    short: Callable[[], object]
    long: Callable[[], object]
    calls: int  # how many more of them the long chain has
    result: Callable[[], np.ndarray] | None = None  # output of the first and last sequence, to compare contenders


class Mode(NamedTuple):
    """One turn of a contender: pause, run at load, then pairs of chains for as long as `timed` says, two at least."""

    name: str
    turns: int
    pause: float
    warm: float
    timed: float


BURST = Mode("burst", turns=12, pause=0.1, warm=0.0, timed=0.01)
SUSTAINED = Mode("sustained", turns=2, pause=0.0, warm=1.0, timed=0.5)
MODES = {mode.name: mode for mode in (BURST, SUSTAINED)}


class Timing(NamedTuple):
    us: float  # median over all pairs
    spread: tuple[float, float]  # their quartiles
    mhz: float | None
    watts: float | None


class Work(NamedTuple):
    """One row to be timed."""

    name: str
    shape: dict[str, Any]
    flops: float
    bytes: float
    contenders: Mapping[str, Callable[[], Chain]]  # ours first
    ceiling: str = "read"  # "copy" where as much is written as read
    agreement: float = 1e-3  # cosine difference above which two contenders did not compute the same thing
    tokens: int = 0  # that a call generates, where it is a step of a model


class Setup(NamedTuple):
    """What a run is told once."""

    implementation: str
    small: bool = False  # on a CPU, where only the code path is tried
    peers: Mapping[str, Callable[..., Chain]] = {}  # those that were found


class Op(Protocol):
    """What the file of an op has."""

    @property
    def NAMES(self) -> Sequence[str]: ...  # all cases
    @property
    def QUICK(self) -> Sequence[str]: ...  # those of --quick
    @property
    def PEERS(self) -> Mapping[str, Callable[[], Callable[..., Chain]]]: ...  # loaders, which may raise an ImportError
    @property
    def BESIDE(self) -> Sequence[str]: ...  # further contenders, which are always there
    @property
    def RATED(self) -> bool: ...  # whether rates and ceilings mean anything
    def check(self, name: str, /) -> object: ...  # raises a ValueError for what is no case
    def work(self, name: str, setup: Setup, /) -> Work: ...


class Unsupported(Exception):
    """This peer does not do this case: its cell stays empty."""


Gauge = Callable[[], tuple[float, float]]  # SM clock in MHz, power in W


def set_environment() -> None:
    """Before JAX starts its backend. XLA captures a chain into a CUDA graph, as the peers' chains are; SERIALIZE keeps
    its calls one after the other. Torch needs memory beside JAX."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_command_buffer_scheduling_mode" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_command_buffer_scheduling_mode=SERIALIZE".strip()


# --- chains


def chain_lengths(seconds: float, small: bool = False, most: int = 256) -> tuple[int, int]:
    """Calls in the short and the long chain, for calls of about that long: a long chain takes a few milliseconds.

    XLA captures programs of five calls and more. Long calls hide their launches without a graph. JAX
    takes some hundred microseconds to start a program, give or take a hundred: over 64 calls that is 2 µs a call.
    """
    if small:
        return 1, 3
    if seconds > HIDES:
        return 1, 4
    long = min(most, max(18, round(4e-3 / seconds)))
    return max(6, long // 4), long


def program(call: Callable[..., jax.Array], operands: Any, calls: int) -> Callable[[], jax.Array]:
    """One jit of so many calls. `call(i, previous, *operands)` returns one number, and is to differ from other calls in
    something that XLA cannot see through, or two of them are merged.

    One small array of them comes back: wrapping an array for the user takes the host ten microseconds.
    """

    def run(*operands: Any) -> jax.Array:
        numbers = [jnp.zeros((), jnp.float32)]
        for i in range(calls):
            numbers.append(call(i, numbers[-1], *operands).astype(jnp.float32))
        return jnp.stack(numbers[1:])

    executable = jax.jit(run).lower(*operands).compile()
    return lambda: executable(*operands)


def jitted(call: Callable[..., jax.Array], operands: Any, lengths: tuple[int, int]) -> Chain:
    """A program for each chain: for calls of which as many as a program may have are over before the host has launched
    the next one. Launches show, up to a microsecond a call."""
    short, long = (program(call, operands, calls) for calls in lengths)
    return Chain(lambda: jax.block_until_ready(short()), lambda: jax.block_until_ready(long()), lengths[1] - lengths[0])


def repeated(call: Callable[..., jax.Array], operands: Any, lengths: tuple[int, int]) -> Chain:
    """One program of the short chain's calls, run once or some times, one behind the other: launches of the next hide
    behind the one before, as in a model."""
    return replayed(program(call, operands, lengths[0]), lengths)


def replayed(
    run: Callable[[], Any], lengths: tuple[int, int], wait: Callable[[Any], object] = jax.block_until_ready
) -> Chain:
    """The chains of `repeated` for what makes the short chain's calls already."""
    return dispatched(run, (1, repeats(lengths)), per_run=lengths[0], wait=wait)


def repeats(lengths: tuple[int, int]) -> int:
    """How often the long chain runs what the short one runs once."""
    short, long = lengths
    return max(2, long // short)


def dispatched(
    run: Callable[[], Any],
    lengths: tuple[int, int],
    per_run: int = 1,
    wait: Callable[[Any], object] = jax.block_until_ready,
) -> Chain:
    """Chains of separate launches, for runs so long that the host keeps ahead of the device. `wait` is given the last
    run's result."""

    def repeat(runs: int) -> Callable[[], object]:
        def all_runs() -> None:
            last = None
            for _ in range(runs):
                del last  # its memory is free for this run, whose graph finds all addresses as they were
                last = run()
            wait(last)

        return all_runs

    short, long = lengths
    return Chain(repeat(short), repeat(long), (long - short) * per_run)


# --- timing


def pair(chain: Chain, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call."""
    start = clock()
    chain.long()
    middle = clock()
    chain.short()
    return (2 * middle - start - clock()) / chain.calls


def measure(
    chains: Mapping[str, Chain],
    mode: Mode,
    gauge: Gauge | None = None,
    first: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Timing]:
    """Times all contenders in turns. `first` moves the one that begins, from row to row."""
    names = list(chains)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    readings: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(first, first + mode.turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            chain = chains[name]
            sleep(mode.pause)
            start = clock()
            chain.long()  # wakes the card, and lets XLA write the addresses of this turn into its graphs
            chain.short()
            while clock() - start < mode.warm:
                chain.long()
            with sampled(gauge, readings[name]):
                start = clock()
                turn_seconds = [pair(chain, clock), pair(chain, clock)]
                while clock() - start < mode.timed:
                    turn_seconds.append(pair(chain, clock))
            seconds[name] += turn_seconds
    return {name: timing(seconds[name], readings[name]) for name in names}


def timing(seconds: list[float], readings: list[tuple[float, float]]) -> Timing:
    low, middle, high = (1e6 * t for t in statistics.quantiles(seconds, n=4, method="inclusive"))
    mhz, watts = (statistics.fmean(values) for values in zip(*readings)) if readings else (None, None)
    return Timing(middle, (low, high), mhz, watts)


@contextlib.contextmanager
def sampled(gauge: Gauge | None, into: list[tuple[float, float]], interval: float = 0.005) -> Iterator[None]:
    """Reads the gauge from a thread while the body runs, once at least."""
    if gauge is None:
        yield
        return
    done = threading.Event()

    def read() -> None:
        while True:
            into.append(gauge())
            if done.wait(interval):
                return

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def nvml_gauge() -> Gauge:
    """SM clock and power of the first GPU that CUDA sees. Raises an ImportError or an NVMLError where there is none."""
    import pynvml

    pynvml.nvmlInit()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    if visible.startswith("GPU-"):
        device = pynvml.nvmlDeviceGetHandleByUUID(visible)
    else:
        device = pynvml.nvmlDeviceGetHandleByIndex(int(visible or 0))

    def instant() -> float:  # the plain reading is an average over a second on Hopper
        field = pynvml.nvmlDeviceGetFieldValues(device, [pynvml.NVML_FI_DEV_POWER_INSTANT])[0]
        if field.nvmlReturn != pynvml.NVML_SUCCESS:
            raise pynvml.NVMLError(field.nvmlReturn)
        return field.value.uiVal / 1e3

    def average() -> float:
        return pynvml.nvmlDeviceGetPowerUsage(device) / 1e3

    try:
        instant()
        watts = instant
    except pynvml.NVMLError:
        watts = average
    return lambda: (pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_SM), watts())


# --- what this card can do, in this run


class Ceilings(NamedTuple):
    copy: float  # GB/s, bytes read and written
    read: float  # GB/s of a reduction
    matmul: float  # TFLOPS of a bf16 product
    mhz: float | None  # under the product
    watts: float | None


def ceilings(mode: Mode, gauge: Gauge | None = None, small: bool = False) -> Ceilings:
    """Copy and reduction of 4 GiB, and an 8192³ product; of two ways to reduce, the faster one."""
    side, n = (256, 128) if small else (2**15, 8192)
    x = jax.random.bits(jax.random.key(0), (side, side), jnp.uint32)
    a, b = (jax.random.normal(key, (n, n), jnp.bfloat16) for key in jax.random.split(jax.random.key(1)))
    lengths = (1, 3) if small else (2, 8)
    chains = {
        "copy": dispatched(functools.partial(jax.jit(lambda x: x ^ 1), x), lengths),
        READERS[0]: dispatched(functools.partial(jax.jit(lambda x: x.max(axis=1)), x), lengths),
        READERS[1]: dispatched(functools.partial(jax.jit(jnp.max), x), lengths),
        "matmul": dispatched(functools.partial(jax.jit(jnp.dot), a, b), lengths),
    }
    times = measure(chains, mode, gauge)
    read = min(times[name].us for name in READERS)
    product = times["matmul"]
    return Ceilings(
        copy=2 * x.nbytes / times["copy"].us / 1e3,
        read=x.nbytes / read / 1e3,
        matmul=2 * n**3 / product.us / 1e6,
        mhz=product.mhz,
        watts=product.watts,
    )


def roofline(flops: float, moved: float, us: float, limits: Ceilings, ceiling: str = "read") -> float:
    """Share of the speed that the nearer of the two ceilings allows: products, and one for memory."""
    return max(flops / (limits.matmul * 1e12), moved / (getattr(limits, ceiling) * 1e9)) / (us * 1e-6)
