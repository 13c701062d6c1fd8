"""python -m jax_flashmla.bench: times an op beside its peers on one Hopper GPU. docs/benchmark.md has the protocol."""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import gc
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from .. import _native, testing
from ..__main__ import leave_source_tree, machine
from . import (
    append,
    dense_decode,
    end_to_end,
    gather,
    model,
    protocol,
    report,
    schedule,
    sharding,
    sparse_decode,
    sparse_prefill,
)

OPS: dict[str, protocol.Op] = {
    "dense_decode": dense_decode,
    "sparse_decode": sparse_decode,
    "sparse_prefill": sparse_prefill,
    "end_to_end": end_to_end,
    "schedule": schedule,
    "append": append,
    "gather": gather,
    "sharding": sharding,
    "model": model,
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jax_flashmla.bench", description=__doc__)
    parser.add_argument("op", choices=OPS)
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="CASE",
        help="names, patterns such as '128,*', or b,s_q,h_q,s_k[,pageN][,irregular|normal]",
    )
    parser.add_argument("--peers", type=words, help="those to time, of " + ",".join(dense_decode.PEERS))
    parser.add_argument("--modes", type=words, help="burst,sustained")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one object per row")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="latency against context, from this run's rows")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="source", help="plot the rows of FILE; time nothing")
    parser.add_argument("--quick", action="store_true", help="few cases, burst, no jnp, unless told otherwise")
    parser.add_argument(
        "--implementation", choices=("cuda", "xla"), default="cuda", help="xla: the reference, anywhere"
    )
    parser.add_argument("--commit", help="for --json; by default what git says in the current directory")
    args = parser.parse_args(argv)
    op = OPS[args.op]
    if args.source and not args.plot:
        parser.error("--from needs --plot")
    if args.peers is None:
        args.peers = [peer for peer in op.PEERS if not (args.quick and peer == "jnp")]
    if args.modes is None:
        args.modes = ["burst"] if args.quick else list(protocol.MODES)
    for option, known in (("peers", op.PEERS), ("modes", protocol.MODES)):
        if unknown := [word for word in getattr(args, option) if word not in known]:
            parser.error(f"--{option}: {args.op} has {', '.join(known) or 'none'}; got {', '.join(unknown)}")
    try:
        args.cases = choose(args.cases, op) if args.cases else list(op.QUICK if args.quick else op.NAMES)
    except ValueError as error:
        parser.error(f"--cases: {error}")
    return args


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def choose(wanted: list[str], op: protocol.Op) -> list[str]:
    """Patterns stand for rows of the op's table; anything else must be a case that can be made."""
    chosen: list[str] = []
    for pattern in wanted:
        found = fnmatch.filter(op.NAMES, pattern)
        if not found:
            op.check(pattern)
        chosen += found or [pattern]
    return list(dict.fromkeys(chosen))


def missing_package(args: argparse.Namespace) -> str | None:
    needed = ["matplotlib"] if args.plot else []
    needed += [] if args.source else ["tqdm"]
    needed += ["flax"] if args.op == "model" and not args.source else []
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    extras = "bench,flax" if "flax" in missing else "bench"
    return f"needs {' and '.join(missing)}: pip install 'jax-flashmla[{extras}]'" if missing else None


def no_hopper() -> str | None:
    if not _native.local_cuda_devices():
        return "needs a Hopper GPU: JAX sees no CUDA device on this machine"
    problem = _native.obstacle()
    return f"needs a Hopper GPU and its kernels: {problem}" if problem else None


def find_peers(
    wanted: list[str], known: Mapping[str, Callable[[], Callable[..., protocol.Chain]]]
) -> dict[str, Callable[..., protocol.Chain]]:
    """Loads the peers that are installed, and names the others."""
    found = {}
    for name in wanted:
        try:
            found[name] = known[name]()
        except Exception as error:  # a library that does not load may raise anything
            print(f"{name} is left out: {error}", file=sys.stderr)
    return found


def find_gauge() -> protocol.Gauge | None:
    try:
        return protocol.nvml_gauge()
    except Exception as error:  # NVMLError is known only where pynvml is
        print(f"no clock and no power: {error}", file=sys.stderr)
        return None


def commit() -> str | None:
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return git.stdout.strip()


def run(args: argparse.Namespace) -> tuple[list[report.Row], bool]:
    """Times and prints all rows. False when something of ours failed, or when contenders disagree."""
    from tqdm import tqdm

    op = OPS[args.op]
    on_gpu = bool(_native.local_cuda_devices())
    setup = protocol.Setup(args.implementation, not on_gpu, find_peers(args.peers, op.PEERS))
    modes = [adapt(protocol.MODES[name], args.quick, setup.small) for name in args.modes]
    gauge = find_gauge() if on_gpu else None
    about = machine()
    facts = {
        "gpu": about["device"],
        "driver": about["cuda_driver"],
        "jax": about["jax"],
        "commit": args.commit or commit(),
    }
    print(f"{facts['gpu']}, driver {facts['driver']}, jax {facts['jax']}, commit {facts['commit']}\n", flush=True)

    limits: dict[str, protocol.Ceilings] = {}
    if op.RATED:
        limits = {mode.name: protocol.ceilings(mode, gauge, setup.small) for mode in modes}
        print(report.ceilings_table(limits), flush=True)

    columns = [*args.peers, *op.BESIDE]
    rows, good = [], True
    print(report.table_head(args.op, columns), flush=True)
    # No bar where stderr is a file: there its carriage returns would be in the way of the table.
    for index, name in enumerate(tqdm(args.cases, desc=args.op, unit="case", disable=None)):
        work = op.work(name, setup)
        chains, agreed = prepare(work)
        good = good and agreed
        for mode in modes if chains else ():
            times = protocol.measure(chains, mode, gauge, first=index)
            date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            row = report.make_row(args.op, work, mode.name, times, limits.get(mode.name), {**facts, "date": date})
            rows.append(row)
            tqdm.write(report.table_line(row, columns))
            sys.stdout.flush()
            if args.json:
                report.append_json(row, args.json)
        del work, chains
        gc.collect()  # buffers of this case, before those of the next
    for row in rows:
        if "tokens" in row:
            print("\n" + report.step_line(row), flush=True)
    return rows, good


def adapt(mode: protocol.Mode, quick: bool, small: bool) -> protocol.Mode:
    if small:
        return mode._replace(turns=2, pause=0.0, warm=0.0, timed=0.0)
    if quick:
        return mode._replace(turns=min(mode.turns, 4), warm=0.3 * mode.warm, timed=0.5 * mode.timed)
    return mode


def prepare(work: protocol.Work) -> tuple[dict[str, protocol.Chain], bool]:
    """Compiles and captures every contender. Leaves out peers that fail, and those that compute something else than
    ours: that is an error, and so is a failure of ours, which leaves nothing."""
    chains: dict[str, protocol.Chain] = {}
    expected, agreed = None, True
    for name, make in work.contenders.items():
        try:
            chain = make()
            result = chain.result() if chain.result else None
        except protocol.Unsupported:
            continue
        except Exception as error:  # whatever a peer raises, the other rows are wanted
            print(f"{work.name}: {name} failed: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
            if name == report.OURS:
                return {}, False
            continue
        if name == report.OURS:
            expected = result
        elif result is not None and expected is not None:
            difference = testing.cosine_difference(result, expected)
            if not difference <= work.agreement:
                print(f"{work.name}: {name} is left out: its result is not ours ({difference:.1e})", file=sys.stderr)
                agreed = False
                continue
        chains[name] = chain
    return chains, agreed


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    protocol.set_environment()
    problem = missing_package(args)
    if problem is None and not args.source and args.implementation == "cuda":
        problem = no_hopper()
    if problem:
        print(f"python -m jax_flashmla.bench {problem}", file=sys.stderr)
        return 2
    if args.source:
        try:
            rows, good = report.read_json(args.source), True
        except (OSError, ValueError) as error:  # as json's errors are
            print(f"python -m jax_flashmla.bench --from {args.source}: {error}", file=sys.stderr)
            return 2
    else:
        rows, good = run(args)
    if args.plot:
        try:
            report.plot(rows, args.plot)
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            good = False
    return 0 if good else 1


if __name__ == "__main__":
    leave_source_tree("jax_flashmla.bench")
    sys.exit(main())
