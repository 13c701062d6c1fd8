"""Registers, stack, spills and shared memory of every kernel, read from the log of a build with ptxas -v.

    python scripts/register_report.py build.log --output registers.md

The log comes from a build with -DJAX_FLASHMLA_WERROR=ON. Exit code 1: a kernel spills, or ptxas serialised its wgmma;
2: the log names no kernel.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

_FUNCTION = re.compile(r"Function properties for '?([\w$.]+)'?")
_ENTRY = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SMEM = re.compile(r"(\d+) bytes smem")
# C7508 ... C7519: "Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
_WGMMA = re.compile(r"\(?C75\d\d\)?.*|.*wgmma\.mma_async instructions are serialized.*")
_QUOTED = re.compile(r"function '([^']+)'")


@dataclasses.dataclass
class Kernel:
    symbol: str
    entry: bool = False
    registers: int | None = None
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    smem: int = 0
    warnings: list[str] = dataclasses.field(default_factory=list)

    @property
    def bad(self) -> bool:
        return bool(self.spill_stores or self.spill_loads or self.warnings)


def parse(lines: Iterable[str]) -> list[Kernel]:
    kernels: dict[str, Kernel] = {}
    current: Kernel | None = None
    compiling: Kernel | None = None  # the entry function that "Used N registers" speaks of
    for line in lines:
        if match := _WGMMA.search(line):
            named = _QUOTED.search(line)
            symbol = named.group(1) if named else (current.symbol if current else "(unnamed)")
            kernels.setdefault(symbol, Kernel(symbol)).warnings.append(match.group(0).strip())
        elif match := _ENTRY.search(line):
            compiling = current = kernels.setdefault(match.group(1), Kernel(match.group(1)))
            current.entry = True
        elif match := _FUNCTION.search(line):
            current = kernels.setdefault(match.group(1), Kernel(match.group(1)))
        elif current and (match := _SPILLS.search(line)):
            current.stack, current.spill_stores, current.spill_loads = map(int, match.groups())
        elif compiling and (match := _USED.search(line)):
            compiling.registers = int(match.group(1))
            if smem := _SMEM.search(line):
                compiling.smem = int(smem.group(1))
    return sorted(kernels.values(), key=lambda kernel: kernel.symbol)


def demangle(symbols: list[str]) -> dict[str, str]:
    for tool in ("c++filt", "cu++filt", "llvm-cxxfilt"):
        if symbols and (path := shutil.which(tool)):
            out = subprocess.run([path, *symbols], capture_output=True, text=True, check=False).stdout.splitlines()
            if len(out) == len(symbols):
                return {s: short(name) for s, name in zip(symbols, out, strict=True)}
    return {s: s for s in symbols}


def short(name: str) -> str:
    """Drops the return type and the parameter list: template arguments say which kernel it is."""
    depth = 0
    for i, char in enumerate(name):
        depth += (char == "<") - (char == ">")
        if char == "(" and depth == 0 and not name.startswith("(anonymous", i):
            name = name[:i]
            break
    return re.sub(r"^(void|static)\s+", "", name)


def table(kernels: list[Kernel]) -> str:
    names = demangle([kernel.symbol for kernel in kernels])
    rows = [
        "| kernel | registers | stack B | spill stores B | spill loads B | static smem B | wgmma |",
        "|---|---|---|---|---|---|---|",
    ]
    for k in kernels:
        wgmma = "SERIALISED" if k.warnings else "ok"
        registers = "-" if k.registers is None else k.registers
        name = names[k.symbol].replace("|", "\\|") + ("" if k.entry else " (device function)")
        rows.append(f"| `{name}` | {registers} | {k.stack} | {k.spill_stores} | {k.spill_loads} | {k.smem} | {wgmma} |")
    return "\n".join(rows) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="build log with ptxas -v output")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    args = parser.parse_args(argv)
    kernels = parse(args.log.read_text(errors="replace").splitlines())
    if not any(kernel.entry for kernel in kernels):
        print(
            f"register_report: {args.log} names no kernel; was it built with -DJAX_FLASHMLA_WERROR=ON?", file=sys.stderr
        )
        return 2
    text = table(kernels)
    print(text, end="")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text)
    bad = [kernel for kernel in kernels if kernel.bad]
    for kernel in bad:
        print(f"register_report: {kernel.symbol} spills or has serialised wgmma", *kernel.warnings, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
