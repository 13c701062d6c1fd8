"""python -m jax_flashmla.bench: its arithmetic, its tables, and the whole code path on the CPU with tiny cases."""

import contextlib
import functools
import itertools
import os
import subprocess
import sys
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla import flash_mla_sparse_fwd, flash_mla_with_kvcache, kvcache, testing
from jax_flashmla.bench import __main__ as bench
from jax_flashmla.bench import (
    append,
    cases,
    dense_decode,
    end_to_end,
    model,
    peers,
    protocol,
    report,
    sparse_decode,
    sparse_prefill,
)
from jax_flashmla.bench.cases import DenseCase, SparseDecodeCase, SparsePrefillCase
from jax_flashmla.bench.protocol import Ceilings, Chain, Mode, Timing

CEILINGS = Ceilings(copy=4000.0, read=4000.0, matmul=800.0, mhz=1900.0, watts=650.0)


# --- cases

PUBLISHED = """
128,1,16,1024  128,1,16,4096  128,1,16,16384  128,1,32,4096  128,1,32,16384  128,1,64,1024  128,1,64,4096
128,1,64,16384
128,1,128,1024  128,1,128,4096  128,1,128,16384  128,1,128,32768  128,2,128,4096  128,2,128,8192  128,2,128,32768
128,1,128,4096,normal  128,1,16,4096,normal  1,1,16,4096  1,1,128,4096  1,1,16,65536  1,1,128,65536  4,1,16,4096
4,1,128,4096  4,1,128,65536  16,1,16,4096  16,1,128,4096  16,1,128,65536  32,1,128,4096  32,1,128,65536
"""
MORE = """
1,1,8,4096  1,1,20,4096  1,1,32,4096  16,1,8,4096  16,1,20,4096  16,1,32,4096  128,1,8,4096  128,1,20,4096
128,1,16,4096,page16  128,1,128,4096,page16  128,1,16,4096,page128  128,1,128,4096,page128
64,1,16,32768,irregular  64,1,128,32768,irregular  256,1,128,1024,normal  256,1,16,1024,normal
"""


def test_the_table_has_every_row_of_the_published_one_and_more():
    assert len(PUBLISHED.split()) == 29
    assert set(cases.DENSE) == {*PUBLISHED.split(), *MORE.split()} and len(set(cases.DENSE)) == len(cases.DENSE)
    assert set(cases.DENSE_QUICK) <= set(cases.DENSE) and len(cases.DENSE_QUICK) == 8


def test_names_say_all_of_a_case():
    for name in cases.DENSE:
        assert DenseCase.parse(name).name == name
    assert DenseCase.parse("128,2,16,4096,page16,irregular") == (128, 2, 16, 4096, 16, "irregular")
    for wrong in (
        "1,1,16",
        "1,1,16,4096,page",
        "0,1,16,4096",
        "1,1,16,4096,page0",
        "foo",
        "1,1,16,4096,odd",
        "1,1,1,63,irregular",
    ):
        with pytest.raises(ValueError, match="got"):
            DenseCase.parse(wrong)


def test_work_of_a_case_by_hand():
    case = DenseCase.parse("3,2,16,100")
    assert case.causal and case.keys == 300
    assert case.flops == 2 * 2 * 16 * 300 * 1088
    assert case.bytes == 300 * 576 * 2 + 3 * 2 * 16 * 576 * 2 + 3 * 2 * 16 * 512 * 2


def test_lengths_are_what_their_names_say():
    irregular = DenseCase.parse("64,1,16,32768,irregular").seqlens
    assert irregular.min() >= 64 and irregular.max() <= 32768
    assert np.median(irregular) > 128 and np.median(irregular) < irregular.mean() / 1.5
    normal = DenseCase.parse("128,1,16,4096,normal").seqlens
    assert abs(normal.mean() - 4096) < 3 * 2048 / 128**0.5 and 1500 < normal.std() < 2500 and normal.min() >= 1
    assert set(DenseCase.parse("5,1,16,77").seqlens) == {77}


def test_buffers_in_rotation_are_eight_times_the_cache():
    for name in cases.DENSE:
        moved = DenseCase.parse(name).bytes
        sets = cases.rotation(moved)
        assert sets == cases.MOST_SETS or sets * moved > 8 * cases.L2_BYTES
        assert sets * moved > 2 * cases.L2_BYTES and (sets - 1) * moved <= 8 * cases.L2_BYTES
    assert cases.rotation(8 * cases.L2_BYTES + 1) == 1 and cases.rotation(1000) == cases.MOST_SETS


def test_chains_pass_through_all_sets_equally_often():
    assert cases.whole_rounds((16, 64), 1) == (16, 64)
    assert cases.whole_rounds((16, 64), 7) == (21, 70)
    assert cases.whole_rounds((16, 64), 27) == (27, 81)
    assert cases.whole_rounds((1, 3), 4) == (4, 8)


def test_sets_share_no_page():
    inputs = cases.make_dense_inputs(DenseCase.parse("3,1,2,70,page16,irregular"), (1, 3), 3)
    assert len(inputs.q) == len(inputs.tables) == 3 and inputs.chain == (3, 6)
    pages = -(-np.asarray(inputs.lengths) // 16)
    used = [page for table in inputs.tables for row, n in zip(np.asarray(table), pages) for page in row[:n]]
    assert sorted(used) == list(range(3 * pages.sum())) and inputs.pool.shape == (len(used), 16, 1, 576)
    values = np.asarray(inputs.pool, np.float32)
    assert abs(values.std() - 1) < 0.02 and abs(values.mean()) < 0.02


def test_normal_fills_a_pool_of_several_chunks(monkeypatch):
    monkeypatch.setattr(cases, "CHUNK_PAGES", 4)
    pool = np.asarray(cases.normal.__wrapped__(jax.random.key(0), (10, 64)), np.float32)
    assert pool.shape == (12, 64) and abs(pool.std() - 1) < 0.1
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(pool, 2))


# --- timing


class Machine:
    """A clock that advances when chains run: a call costs `call` seconds, a chain another `launch`."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def chain(self, name, call, short=4, long=20, launch=1e-3):
        def run(calls):
            self.log.append(name)
            self.now += launch + calls * call

        return Chain(lambda: run(short), lambda: run(long), long - short)


def test_a_pair_is_time_per_call_without_the_launch():
    machine = Machine()
    assert protocol.pair(machine.chain("a", 5e-6, launch=0.3), machine.clock) == pytest.approx(5e-6)


def test_contenders_take_turns_in_rotating_order():
    machine = Machine()
    chains = {"a": machine.chain("a", 1e-6), "b": machine.chain("b", 3e-6), "c": machine.chain("c", 2e-6)}
    mode = Mode("burst", turns=3, pause=0.1, warm=0.0, timed=0.0)
    times = protocol.measure(chains, mode, None, 1, machine.clock, machine.sleep)
    assert machine.log == [name for name in "bcacababc" for _ in range(6)]  # a lead-in and two pairs each
    assert {name: time.us for name, time in times.items()} == pytest.approx({"a": 1, "b": 3, "c": 2})
    assert times["a"].mhz is None and times["a"].watts is None


def test_sustained_runs_at_load_before_it_times():
    machine = Machine()
    runs = []
    chain = Chain(lambda: machine.sleep(0.002) or runs.append("s"), lambda: machine.sleep(0.01) or runs.append("l"), 8)
    times = protocol.measure({"a": chain}, protocol.SUSTAINED, None, 0, machine.clock, machine.sleep)
    turn = "".join(runs[: len(runs) // 2])
    warm, timed = turn.removeprefix("ls").split("s", 1)  # the lead-in, then long chains until the first timed pair
    assert (len(warm) - 1) * 0.01 >= protocol.SUSTAINED.warm - 0.012
    assert (len(timed) + 2) / 2 * 0.012 >= protocol.SUSTAINED.timed and set(timed[::2]) == {"l"}
    assert times["a"].us == pytest.approx(1000)


def test_median_and_quartiles():
    result = protocol.timing([5e-6, 1e-6, 2e-6, 4e-6, 3e-6], [(1000.0, 300.0), (2000.0, 500.0)])
    assert result.us == pytest.approx(3) and result.spread == pytest.approx((2, 4))
    assert (result.mhz, result.watts) == (1500, 400)


def test_clock_and_power_are_read_while_timed():
    machine = Machine()
    times = protocol.measure(
        {"a": machine.chain("a", 1e-6)}, protocol.BURST, lambda: (1800.0, 640.0), 0, machine.clock, machine.sleep
    )
    assert (times["a"].mhz, times["a"].watts) == (1800, 640)


@pytest.mark.parametrize("instant_works", [True, False])
def test_nvml(monkeypatch, instant_works):
    class NVMLError(Exception):
        pass

    asked = []
    field = types.SimpleNamespace(nvmlReturn=0 if instant_works else 3, value=types.SimpleNamespace(uiVal=612500))
    fake = types.SimpleNamespace(
        NVMLError=NVMLError, NVML_SUCCESS=0, NVML_FI_DEV_POWER_INSTANT=186, NVML_CLOCK_SM=1,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda i: asked.append(i) or i,
        nvmlDeviceGetFieldValues=lambda device, fields: [field],
        nvmlDeviceGetPowerUsage=lambda device: 500000,
        nvmlDeviceGetClockInfo=lambda device, kind: 1755,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert protocol.nvml_gauge()() == (1755, 612.5 if instant_works else 500.0) and asked == [3]


def test_chain_lengths():
    assert protocol.chain_lengths(10e-6) == (64, 256)
    assert protocol.chain_lengths(1e-3) == (1, 4)
    for us in (10, 50, 150, 230, 400):
        short, long = protocol.chain_lengths(us * 1e-6)
        assert 5 < short < long / 2 and (long - short) * us > 400  # captured by XLA, and long beside the host's jitter
        assert short * us >= 600  # the host keeps ahead
    assert protocol.chain_lengths(1e-6, small=True) == (1, 3)


def test_jitted_chain_makes_every_call():
    calls = []

    def call(i, previous, x):
        calls.append(i)
        return x[i] + previous

    chain = protocol.jitted(call, [jnp.arange(3, dtype=jnp.float32)], (1, 3))
    assert calls == [0, 0, 1, 2] and chain.calls == 2
    assert chain.short().tolist() == [0] and chain.long().tolist() == [0, 1, 3]


def test_repeated_chain_runs_one_program():
    traced, chain = [], (2, 7)

    def call(i, previous, x):
        traced.append(i)
        return x[i] + previous

    ours = protocol.repeated(call, [jnp.arange(3, dtype=jnp.float32)], chain)
    assert traced == [0, 1] and ours.calls == 4  # three runs beside one
    assert protocol.repeats(chain) == 3 and protocol.repeats((3, 4)) == 2
    ours.short()
    ours.long()


def test_peers_run_as_many_calls_as_we_do():
    replays, calls = [], []
    context = contextlib.nullcontext
    cuda = types.SimpleNamespace(
        Stream=lambda: None, CUDAGraph=lambda: types.SimpleNamespace(replay=lambda: replays.append(1)),
        graph=lambda *_, **__: context(), stream=lambda _: context(), synchronize=lambda: None,
    )  # fmt: skip
    inputs = types.SimpleNamespace(q=[0, 0], chain=(4, 17))
    chain = peers.captured(types.SimpleNamespace(cuda=cuda), calls.append, inputs)
    assert calls == [0, 0, 1, 0, 1]  # the first one warms up
    assert chain.calls == protocol.repeated(lambda i, previous, x: x, [jnp.zeros(())], inputs.chain).calls == 12
    chain.short()
    assert len(replays) == 1
    chain.long()
    assert len(replays) == 5


def test_no_two_calls_of_a_chain_are_the_same():
    """XLA merges identical calls, and would time one for many."""
    assert len({np.float32(dense_decode.scale(i)) for i in range(64)}) == 64


def test_dispatched_chain():
    """A run finds the memory of the result before it free."""
    results = []

    def run():
        assert not any(result() is not None for result in results)
        result = jnp.zeros(1)
        results.append(weakref.ref(result))
        return result

    chain = protocol.dispatched(run, (2, 5), per_run=61)
    chain.short()
    chain.long()
    assert len(results) == 7 and chain.calls == 183


def test_roofline_by_hand():
    compute = protocol.roofline(flops=800e6, moved=1e3, us=2.0, limits=CEILINGS)  # 1 µs at 800 TFLOPS
    memory = protocol.roofline(flops=1.0, moved=4e6, us=4.0, limits=CEILINGS)  # 1 µs at 4000 GB/s
    assert compute == pytest.approx(0.5) and memory == pytest.approx(0.25)


def test_ceilings_count_bytes_and_operations(monkeypatch):
    monkeypatch.setattr(
        protocol,
        "measure",
        lambda chains, mode, gauge: {
            name: Timing(us, (0, 0), 1500.0, 690.0) for name, us in zip(chains, (10, 8, 4, 2))
        },
    )
    found = protocol.ceilings(protocol.BURST, small=True)
    size = 256 * 256 * 4
    assert found == pytest.approx((2 * size / 10e3, size / 4e3, 2 * 128**3 / 2e6, 1500, 690))


# --- report


def row(**changes):
    times = {
        "jax_flashmla": Timing(100.0, (98.0, 104.0), 1700.0, 680.0),
        "flashmla": Timing(120.0, (0, 0), None, None),
        "fa3": Timing(110.0, (0, 0), None, None),
    }
    work = protocol.Work("128,1,16,4096", DenseCase.parse("128,1,16,4096").shape, 40e9, 200e6, {})
    facts = {"gpu": "H", "driver": "580", "jax": "0.11.2", "commit": "abc", "date": "2026-01-01"}
    return report.make_row("dense_decode", work, "burst", times, CEILINGS, facts) | changes


def test_row_by_hand():
    made = row()
    assert (made["tflops"], made["gbps"]) == pytest.approx((400, 2000))
    assert made["roofline"] == pytest.approx(0.5)  # both ceilings: 50 µs
    assert made["peers"] == {"flashmla": 120, "fa3": 110} and report.best_peer(made) == pytest.approx(1.1)
    assert report.table_line(made, ["flashmla", "flashinfer", "fa3"]) == (
        "| 128,1,16,4096 | burst | 100.0 | 3.0 | 400 | 2000 | 50 | 1.10 | 120.0 | - | 110.0 | 1700 | 680 |"
    )
    head = report.table_head("dense_decode", ["flashmla", "flashinfer", "fa3"]).splitlines()
    assert {line.count("|") for line in head} == {report.table_line(made, ["flashmla", "flashinfer", "fa3"]).count("|")}


def test_json_lines_are_appended(tmp_path):
    path = tmp_path / "results" / "h200.jsonl"
    report.append_json(row(), path)
    report.append_json(row(mode="sustained"), path)
    assert report.read_json(path) == [row(), row(mode="sustained")]


def test_plot_takes_the_newest_rows(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, *a, **k: drawn.append((list(a[0]), list(a[1]))) or plot(self, *a, **k)
    )
    rows = [
        row(case="a", s_k=1024, us=7.0),
        row(case="a", s_k=1024, us=30.0),
        row(),
        row(case="c", s_k=99, page_size=16),
    ]
    report.plot(rows, tmp_path / "new" / "p.png")
    assert ([1024, 4096], [30.0, 100.0]) in drawn and ([1024, 4096], [120.0, 120.0]) in drawn
    assert (tmp_path / "new" / "p.png").read_bytes().startswith(b"\x89PNG") and matplotlib.__version__
    with pytest.raises(ValueError, match="nothing to plot"):
        report.plot([row(page_size=16)], tmp_path / "q.png")


# --- peers


def test_missing_peers_are_named(monkeypatch, capsys):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    found = bench.find_peers(list(peers.DENSE), peers.DENSE)
    assert list(found) == ["jnp"]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "flashmla is left out: sgl-flash-mla is not installed",
        "fa3 is left out: torch is not installed",
        "flashinfer is left out: torch is not installed",
    ]


class Tensor(np.ndarray):
    """As much of a torch.Tensor as peers use."""

    def float(self):
        return self.astype(np.float32)

    def cpu(self):
        return self

    def numpy(self):
        return np.asarray(self)


class Graph:
    recording = None

    def __init__(self):
        self.calls = 0

    def replay(self):
        assert self.calls


class FakeTorch(types.ModuleType):
    """Records captures; ops compute through the reference."""

    bfloat16, uint8, float8_e4m3fn = "bfloat16", "uint8", jnp.float8_e4m3fn.dtype

    def __init__(self):
        super().__init__("torch")
        self.cuda = types.SimpleNamespace(
            is_available=lambda: True, CUDAGraph=Graph, Stream=object, synchronize=lambda: None,
            stream=lambda stream: contextlib.nullcontext(), graph=self.graph,
        )  # fmt: skip
        self.has_flag = True
        self.ops = types.SimpleNamespace(load_library=lambda path: None)

    @contextlib.contextmanager
    def graph(self, graph, stream, capture_error_mode):
        Graph.recording = graph
        yield
        Graph.recording = None

    def from_dlpack(self, x):
        return np.asarray(x).view(Tensor)

    def empty(self, *size, **options):
        return np.empty(size)


# Without jit every call compiles the steps of the reference again.
dense, sparse, prefill = (
    jax.jit(functools.partial(f, implementation="xla"), static_argnames=static)
    for f, static in (
        (flash_mla_with_kvcache, ("head_dim_v", "softmax_scale", "causal")),
        (flash_mla_with_kvcache, ("head_dim_v", "is_fp8_kvcache")),
        (flash_mla_sparse_fwd, "sm_scale"),
    )
)


def attend(q, pool, table, lengths, scale, causal):
    if Graph.recording:
        Graph.recording.calls += 1
    arrays = [jnp.asarray(np.asarray(x)) for x in (q, pool, table, lengths)]
    out = dense(*arrays, head_dim_v=512, softmax_scale=scale, causal=causal)[0]
    return np.asarray(out).view(Tensor)


def attend_sparse(f, *args, **kwargs):
    if Graph.recording:
        Graph.recording.calls += 1
    to_jax = lambda x: jnp.asarray(np.asarray(x)) if isinstance(x, np.ndarray) else x  # noqa: E731
    out = f(*map(to_jax, args), **{name: to_jax(x) for name, x in kwargs.items()})[0]
    return np.asarray(out).view(Tensor)


def fake_flashmla(torch, tmp_path):
    (tmp_path / "_C_legacy.abi3.so").touch()

    def dense_decode_fwd(q, pool, d_v, lengths, table, scale, causal, plan, splits):
        assert (plan, splits) in ((None, None), ("plan", "splits")) and d_v == 512
        return attend(q, pool, table, lengths, scale, causal), None, "plan", "splits"

    def sparse_decode_fwd(q, pool, indices, lengths, sink, plan, splits, *rest):
        assert (plan, splits) in ((None, None), ("plan", "splits")) and rest == (
            None,
            None,
            None,
            512,
            peers.SCALE,
            None,
        )
        assert pool.dtype == jnp.float8_e4m3fn and lengths is sink is None
        out = attend_sparse(sparse, q, pool, None, None, head_dim_v=512, is_fp8_kvcache=True, indices=indices)
        return out, None, "plan", "splits"

    def sparse_prefill_fwd(q, kv, indices, scale, d_v, sink, lengths, *flag):
        if flag and not torch.has_flag:
            raise RuntimeError("sparse_prefill_fwd() expected at most 7 argument(s)")
        assert d_v == 512 and sink is lengths is None and flag in ((), (False,))
        return attend_sparse(prefill, q, kv, indices, sm_scale=scale), None, None

    torch.ops.flash_mla_legacy = types.SimpleNamespace(
        dense_decode_fwd=dense_decode_fwd, sparse_decode_fwd=sparse_decode_fwd, sparse_prefill_fwd=sparse_prefill_fwd
    )
    return {"flash_mla": types.ModuleType("flash_mla")}


def fake_fa3():
    fa3 = types.ModuleType("fa3_fwd_interface")

    def metadata(b, s_q, longest, h_q, h_kv, d, lengths, dtype, headdim_v, causal):
        assert (h_kv, d, headdim_v, dtype) == (1, 64, 512, "bfloat16") and lengths.shape == (b,)
        return "plan", longest

    def with_kvcache(q, k_cache, v_cache, qv, cache_seqlens, softmax_scale, causal, scheduler_metadata):
        b, longest = k_cache.shape[:2]
        assert scheduler_metadata == ("plan", longest)
        table = np.arange(b, dtype=np.int32)[:, None]
        cache = np.concatenate([v_cache, k_cache], -1).reshape(-1, 16, 1, 576)
        table = np.arange(len(cache), dtype=np.int32).reshape(b, -1)
        return attend(np.concatenate([qv, q], -1), cache, table, cache_seqlens, softmax_scale, causal)

    fa3.get_scheduler_metadata, fa3.flash_attn_with_kvcache = metadata, with_kvcache
    return {"fa3_fwd_interface": fa3}


def fake_flashinfer():
    class Wrapper:
        def __init__(self, workspace, backend):
            assert backend == "fa3" and workspace.nbytes

        def plan(self, q_starts, page_starts, pages, lengths, h_q, d_v, d_rope, page_size, causal, scale, *dtypes):
            b = len(lengths)
            self.s_q = int(q_starts[1])
            self.table = np.zeros((b, int(np.diff(page_starts).max())), np.int32)
            for i in range(b):
                mine = pages[page_starts[i] : page_starts[i + 1]]
                assert len(mine) == -(-int(lengths[i]) // page_size)
                self.table[i, : len(mine)] = mine
            self.rest = lengths, scale, causal

        def run(self, q_latent, q_rope, ckv, kpe):
            q = np.concatenate([q_latent, q_rope], -1)
            pool = np.concatenate([ckv, kpe], -1)[:, :, None]
            return attend(q.reshape(-1, self.s_q, *q.shape[1:]), pool, self.table, *self.rest).reshape(
                *q.shape[:2], 512
            )

    package = types.ModuleType("flashinfer")
    package.mla = types.SimpleNamespace(BatchMLAPagedAttentionWrapper=Wrapper)
    return {"flashinfer": package}


@pytest.fixture
def fake_torch(monkeypatch, tmp_path):
    torch = FakeTorch()
    modules = {"torch": torch, **fake_flashmla(torch, tmp_path), **fake_fa3(), **fake_flashinfer()}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    spec = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: spec if name in modules else None)
    return torch


@pytest.mark.parametrize("name", ["3,1,4,80,page16,irregular", "2,2,3,96,page64"])
def test_peers_compute_what_ours_does(fake_torch, name):
    case = DenseCase.parse(name)
    inputs = cases.make_dense_inputs(case, (1, 3), 2)
    makers = {peer: load() for peer, load in peers.DENSE.items()}
    contenders = {"jax_flashmla": lambda: dense_decode.ours(inputs, "xla")}
    contenders |= {peer: lambda make=make: make(inputs) for peer, make in makers.items()}
    chains, agreed = bench.prepare(protocol.Work(name, case.shape, 1.0, 1.0, contenders))
    assert agreed
    assert set(chains) == {"jax_flashmla", *peers.DENSE} - ({"flashmla"} if case.page_size != 64 else set())
    for chain in chains.values():
        chain.short()
        chain.long()
        assert chain.calls == 2


SPARSE = [
    (sparse_decode, "2,3,4,70,40", cases.make_sparse_decode_inputs, True),
    (sparse_prefill, "5,70,40,576,4", cases.make_sparse_prefill_inputs, True),
    (sparse_prefill, "5,70,40,512,4", cases.make_sparse_prefill_inputs, False),
]


@pytest.mark.parametrize("op, name, make, has_flag", SPARSE)
def test_sparse_peers_compute_what_ours_does(fake_torch, op, name, make, has_flag):
    fake_torch.has_flag = has_flag
    inputs = make(op.check(name), (1, 3), 2)
    setup = protocol.Setup("xla", True, {peer: load() for peer, load in op.PEERS.items()})
    chains, agreed = bench.prepare(protocol.Work(name, {}, 1.0, 1.0, op.contenders(inputs, op.attend, setup)))
    assert agreed and list(chains) == ["jax_flashmla", "flashmla", "jnp"]
    for chain in chains.values():
        chain.short()
        chain.long()
        assert chain.calls == 2


def test_sparse_tables_and_work_by_hand():
    assert len(cases.SPARSE_DECODE) == 11 and len(cases.SPARSE_PREFILL) == 8
    assert set(cases.SPARSE_DECODE_QUICK) < set(cases.SPARSE_DECODE)
    assert set(cases.SPARSE_PREFILL_QUICK) < set(cases.SPARSE_PREFILL)
    for op in (sparse_decode, sparse_prefill):
        for name in op.NAMES:
            assert op.check(name).name == name
        for wrong in ("1,1,64,32768", "1,1,64,32768,0", "1,1,64,100,200", "a,1,64,100,20", "1,1,64,100,20,3"):
            with pytest.raises(ValueError, match="got"):
                op.check(wrong)
    with pytest.raises(ValueError, match="d_qk 576 or 512"):
        sparse_prefill.check("4,100,20,192,8")
    decode, prefill = SparseDecodeCase.parse("3,2,16,500,100"), SparsePrefillCase.parse("7,90,40,512,16")
    assert decode.keys == 600 and decode.flops == 2 * 600 * 16 * 1088
    assert decode.bytes == 600 * 656 + 3 * 2 * 16 * 1088 * 2
    assert prefill.flops == 2 * 7 * 40 * 16 * 1024 and prefill.bytes == 90 * 1024 + 7 * 16 * 1024 * 2


def test_lists_name_every_token_once():
    picked = np.asarray(cases.picks(jax.random.key(0), 70, 50, 20))
    assert picked.shape == (70, 20) and picked.min() >= 0 and picked.max() == 49
    assert all(len(set(row)) == 20 for row in picked) and len({tuple(row) for row in picked}) == 70
    inputs = cases.make_sparse_decode_inputs(SparseDecodeCase.parse("2,1,3,70,60"), (1, 3), 2)
    for i, own in enumerate(np.asarray(inputs.indices).reshape(4, 60)):  # two sets of two sequences, two pages each
        assert own.min() >= 128 * i and own.max() < 128 * i + 70
    keys = np.float32(kvcache.dequantize_kv(inputs.keys[:, :, 0], format="fp8_v32"))
    assert keys.shape == (8, 64, 576) and abs(keys.std() - 1) < 0.02


def test_a_peer_that_fails_or_computes_something_else_is_left_out(capsys):
    def result(value):
        return lambda: Chain(int, int, 1, lambda: np.full(4, value))

    def broken():
        raise RuntimeError("out of memory")

    contenders = {"jax_flashmla": result(1.0), "same": result(1.001), "broken": broken}
    chains, agreed = bench.prepare(protocol.Work("x", {}, 1.0, 1.0, contenders))
    assert list(chains) == ["jax_flashmla", "same"] and agreed
    assert "x: broken failed: RuntimeError: out of memory" in capsys.readouterr().err
    for wrong in (-1.0, float("nan")):
        chains, agreed = bench.prepare(
            protocol.Work("x", {}, 1.0, 1.0, {"jax_flashmla": result(1.0), "wrong": result(wrong)})
        )
        assert list(chains) == ["jax_flashmla"] and not agreed
        assert "its result is not ours" in capsys.readouterr().err
    assert bench.prepare(protocol.Work("x", {}, 1.0, 1.0, {"jax_flashmla": broken, "same": result(1.0)})) == ({}, False)


# --- end to end


def test_fewer_caches_where_memory_is_short():
    assert end_to_end.caches_that_fit(600, 61, float("inf")) == 61
    assert end_to_end.caches_that_fit(600, 61, 6100.0) == 10
    assert end_to_end.caches_that_fit(600, 61, 10.0) == 1


# --- the command

FIELDS = {
    "op", "case", "b", "s_q", "h_q", "s_k", "page_size", "lengths", "causal", "keys", "mode", "us", "spread", "tflops",
    "gbps", "roofline", "peers", "mhz", "watts", "ceilings", "gpu", "driver", "jax", "commit", "date",
}  # fmt: skip


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process. What it puts into the environment does not outlive the test."""
    for name in ("XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(bench._native, "local_cuda_devices", list)

    def command(*argv):
        code = bench.main(list(map(str, argv)))
        return code, *capsys.readouterr()

    return command


def test_the_whole_path(run, tmp_path):
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    rows, figure = tmp_path / "rows.jsonl", tmp_path / "figure.png"
    options = "--implementation", "xla", "--peers", "jnp", "--commit", "abc"
    code, out, err = run("dense_decode", *options, "--cases", "2,1,4,64", "--json", rows, "--plot", figure)
    assert code == 0, err
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert sum(line.startswith("| 2,1,4,64 | ") for line in table) == 2
    assert any(line.startswith("| ceilings | copy GB/s | read GB/s |") for line in table)
    found = report.read_json(rows)
    assert [row["mode"] for row in found] == ["burst", "sustained"] and all(set(row) == FIELDS for row in found)
    first = found[0]
    assert (first["op"], first["b"], first["s_q"], first["h_q"], first["s_k"]) == ("dense_decode", 2, 1, 4, 64)
    assert list(first["peers"]) == ["jnp"] and first["commit"] == "abc" and first["mhz"] is None
    assert set(first["ceilings"]) == set(Ceilings._fields)
    assert first["tflops"] == pytest.approx(2 * 4 * 128 * 1088 / first["us"] / 1e6)
    assert figure.read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "again.png"
    code, out, err = run("dense_decode", "--from", rows, "--plot", again)
    assert code == 0 and out == "" and again.exists()
    rows.write_text("{")
    for source in (rows, tmp_path / "nothing"):
        code, out, err = run("dense_decode", "--from", source, "--plot", again)
        assert code == 2 and err.count("\n") == 1 and f"--from {source}: " in err


OTHER_OPS = [
    ("end_to_end", "1,1,2,64"),
    ("schedule", "32"),
    ("append", "fp8_v4,130"),
    ("gather", "fp8_v32,130"),
    ("sparse_decode", "2,1,4,70,40"),
    ("sparse_prefill", "5,70,40,576,4"),
    ("sharding", "heads,2,2,1,4,64"),
    ("sharding", "context,2,2,1,2,300"),
]


@pytest.mark.parametrize("op, name", OTHER_OPS)
def test_other_ops(run, tmp_path, op, name):
    pytest.importorskip("tqdm")
    path = tmp_path / "rows.jsonl"
    code, _, err = run(op, "--implementation", "xla", "--modes", "burst", "--cases", name, "--json", path)
    assert code == 0, err
    (row,) = report.read_json(path)
    assert row["op"] == op and row["case"] == name and np.isfinite(row["us"])
    if op == "end_to_end":
        assert (row["layers"], row["caches"]) == (3, 3) and list(row["peers"]) == ["kernel"]
    elif op == "sharding":  # and the single device computed the same
        assert row["role"] in name and list(row["peers"]) == ["one GPU"] and row["devices"] == 2
    elif op.startswith("sparse"):
        assert list(row["peers"]) == ["jnp"] and (row["topk"], row["h_q"]) == (40, 4)
        assert row["tflops"] == pytest.approx(bench.OPS[op].check(name).flops / row["us"] / 1e6)
    elif op == "schedule":
        assert row["ceilings"] is None and row["tflops"] is None and row["b"] == 32
    else:  # read as bfloat16 and written as it is stored, or the other way round
        moved = 130 * (1152 + 656 if op == "gather" else 1024 + 584)
        assert (
            row["t"] == 130 and list(row["peers"]) == ["jnp"] and row["gbps"] == pytest.approx(moved / row["us"] / 1e3)
        )
        assert row["roofline"] == pytest.approx(row["gbps"] / row["ceilings"]["copy"])


def test_cases_of_cache_operations():
    case = append.CacheCase.parse("fp8_v4,70")
    assert case == ("fp8_v4", 70) and case.bytes == 70 * (1024 + 584)
    for name in append.NAMES:
        assert append.CacheCase.parse(name).name == name
    for wrong in ("fp8_v4", "fp8,70", "bf16,0", "bf16,x", "bf16,1,1"):
        with pytest.raises(ValueError, match="a case is format,t"):
            append.check(wrong)
    for t in (70, 1030):
        pages, slots = append.slots_of(append.CacheCase("bf16", t), 3)
        assert slots.shape == (3, t) and len(set(slots.ravel())) == 3 * t and slots.max() < 64 * pages


def test_a_model(run, tmp_path):
    """Small enough for a CPU; the peer computes the same logits, and attention has its share."""
    pytest.importorskip("tqdm")
    pytest.importorskip("flax")
    path = tmp_path / "rows.jsonl"
    code, out, err = run("model", "--implementation", "xla", "--quick", "--cases", "tiny,2,100", "--json", path)
    assert code == 0, err
    (row,) = report.read_json(path)
    assert set(row) == FIELDS - {"s_q", "h_q", "page_size", "lengths", "causal", "keys"} | {
        "model", "layers", "parameters", "tokens", "tokens_per_second", "attention",
    }  # fmt: skip
    assert list(row["peers"]) == ["xla"] and np.isfinite(row["attention"]) and row["layers"] == 2
    assert row["tokens_per_second"] == pytest.approx(2e6 / row["us"])
    assert f"\ntiny,2,100, burst: jax_flashmla {row['us'] / 1e3:.2f} ms a step, " in out


def test_steps_of_a_model_follow_each_other():
    pytest.importorskip("flax")
    decoder = model.Decoder(model.Case("tiny", 3, 70))
    before = [np.array(cache) for cache in decoder.caches]  # copies: a donated array would change under a view
    chain = decoder.chain(True, implementation="xla")
    first = chain.result()
    chain.long()
    np.testing.assert_array_equal(chain.result(), first)  # the row of the last token is written before it is read
    last = np.zeros(before[0].shape[:2], bool)
    last[np.asarray(decoder.table)[:, 1], 5] = True
    for old, new in zip(before, decoder.caches, strict=True):
        changed = (old != np.asarray(new)).any(axis=(2, 3))
        np.testing.assert_array_equal(changed, last)
    other = decoder.chain(True, attention=model.no_attention).result()
    assert testing.cosine_difference(first, other) > model.AGREEMENT


def test_work_of_a_model_by_hand():
    pytest.importorskip("flax")
    work = model.work("tiny,3,70", protocol.Setup("xla", small=True))
    attention = 128 * 4 * 192 + 128 * 576 + 4 * 128 * 512 * 2 + 4 * 128 * 128
    dense, router, expert = 3 * 128 * 256, 128 * 8, 3 * 128 * 64
    norms = 2 * (2 * 128 + 512) + 128
    shared, head = 2 * expert, 128 * 512
    active = 2 * attention + dense + router + 6 * expert + shared + head + norms
    keys = DenseCase(3, 1, 4, 70)
    assert work.flops == 2 * 3 * active + 2 * keys.flops
    held = active + 2 * expert + head  # two more experts, and the embedding
    assert work.shape["parameters"] == held and work.tokens == 3
    assert work.bytes == 2 * (held - head) + 2 * router + 2 * keys.bytes  # a router is float32


def test_cases_of_models():
    for name in (*model.NAMES, *model.QUICK):
        assert ",".join(map(str, model.Case.parse(name))) == name
    for wrong in ("tiny", "v3,1,64", "tiny,0,64", "tiny,1", "tiny,1,x", "tiny,1,64,2"):
        with pytest.raises(ValueError, match="a case is model,b,s_k"):
            bench.OPS["model"].check(wrong)


def test_more_devices_than_there_are(run):
    pytest.importorskip("tqdm")
    code, out, err = run("sharding", "--implementation", "xla", "--cases", "heads,16,1,1,16,64")
    assert code == 0 and "| heads,16" not in out
    assert f"heads,16,1,1,16,64 is left out: it needs 16 devices, and JAX sees {len(jax.devices())}" in err
    for wrong in ("heads,3,1,1,4,64", "rows,2,1,1,4,64", "heads,0,1,1,4,64", "heads,2", "context,2,1,1"):
        with pytest.raises(ValueError, match="got"):
            bench.OPS["sharding"].check(wrong)


def test_no_hopper_gpu_is_one_sentence(run, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: True)
    code, out, err = run("dense_decode", "--quick")
    assert code == 2 and out == ""
    assert err == "python -m jax_flashmla.bench needs a Hopper GPU: JAX sees no CUDA device on this machine\n"


def test_missing_packages_are_named(run, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    code, _, err = run("dense_decode", "--implementation", "xla", "--plot", "x.png")
    assert code == 2 and "needs matplotlib and tqdm: pip install 'jax-flashmla[bench]'" in err
    code, _, err = run("model", "--implementation", "xla")
    assert code == 2 and "needs tqdm and flax: pip install 'jax-flashmla[bench,flax]'" in err


def test_arguments():
    args = bench.parse_args(["dense_decode", "--quick"])
    assert args.cases == list(cases.DENSE_QUICK) and args.modes == ["burst"]
    assert args.peers == ["flashmla", "fa3", "flashinfer"]
    args = bench.parse_args(["dense_decode"])
    assert args.cases == list(cases.DENSE) and args.modes == ["burst", "sustained"] and args.peers == list(peers.DENSE)
    args = bench.parse_args(["dense_decode", "--cases", "1,1,*,65536", "7,1,16,99", "1,1,16,65536"])
    assert args.cases == ["1,1,16,65536", "1,1,128,65536", "7,1,16,99"]
    for wrong in (["--peers", "nobody"], ["--modes", "warm"], ["--cases", "x"], ["--from", "x"]):
        with pytest.raises(SystemExit, match="2"):
            bench.parse_args(["dense_decode", *wrong])
    for wrong in ("0", "-5", "x"):
        with pytest.raises(SystemExit, match="2"):
            bench.parse_args(["schedule", f"--cases={wrong}"])


def test_environment_is_set_before_the_backend_starts():
    """XLA reads its flags when the first backend starts, not when jax is imported, and knows the name of ours."""
    code = (
        "import os; os.environ.pop('XLA_FLAGS', None); from jax_flashmla.bench import protocol; import jax;"
        "os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=3'; protocol.set_environment();"
        "protocol.set_environment(); print(len(jax.devices()), os.environ['XLA_FLAGS'].count('=SERIALIZE'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert done.stdout.split() == ["3", "1"], done.stderr
