"""Variants of the attention kernels in one program that times them in turns, without JAX: in seconds, what a change is
worth.

    python scripts/variants.py OUT before=HEAD~1 after=. other=.,-DLOOKAHEAD=2
    OUT dense_decode:128,2,128,8192 sparse_prefill:4096,8192,2048,576,128

NAME=TREE[,FLAG...]: TREE is a folder or what git calls a revision, FLAG goes to nvcc. OUT runs on any machine with a
Hopper GPU; variants/time.cu says what it takes and prints. The build prints registers and spills of all variants.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import register_report

HERE = Path(__file__).resolve().parent / "variants"
SOURCES = (
    "kernels/dense_decode_bf16_576.cu",
    "kernels/sparse_decode_fp8_v32.cu",
    "kernels/sparse_prefill_bf16.cu",
    "splitkv/combine.cu",
    "splitkv/schedule.cu",
)
FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "--generate-code=arch=compute_90a,code=[sm_90a]")


class Variant(NamedTuple):
    name: str
    tree: str
    flags: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Variant:
        name, _, rest = text.partition("=")
        tree, *flags = rest.split(",")
        if not re.fullmatch("[a-z][a-z0-9_]*", name) or not tree:
            raise argparse.ArgumentTypeError(
                f"a variant is NAME=TREE[,FLAG...], with a name in lower case, got {text!r}"
            )
        return cls(name, tree, tuple(flags))


def check_out(tree: str, folder: Path) -> Path:
    """The csrc/ of a folder, or of a revision, whose files are put into `folder`."""
    if (Path(tree) / "csrc").is_dir():
        return Path(tree).resolve() / "csrc"
    folder.mkdir()
    archive = subprocess.run(
        ["git", "-C", HERE.parents[1], "archive", f"{tree}:csrc"], capture_output=True, check=False
    )
    if archive.returncode:
        raise SystemExit(f"{tree!r} is no folder with csrc/ and no revision: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
    return folder


def cutlass() -> Path:
    spec = importlib.util.find_spec("cutlass_library")
    if not spec or not spec.submodule_search_locations:
        raise SystemExit("CUTLASS headers were not found: pip install nvidia-cutlass==4.2.0.0, or say --cutlass DIR")
    return Path(spec.submodule_search_locations[0]) / "source" / "include"


def nvcc(*arguments: str | Path) -> str:
    done = subprocess.run(
        [os.environ.get("CUDACXX", "nvcc"), *FLAGS, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stdout)
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("variants", nargs="+", type=Variant.parse, metavar="NAME=TREE[,FLAG...]")
    parser.add_argument("--cutlass", type=Path, metavar="DIR", help="its headers; by default those of nvidia-cutlass")
    args = parser.parse_args()
    if len({v.name for v in args.variants}) < len(args.variants):
        parser.error("two variants have one name")
    headers = args.cutlass or cutlass()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        trees = [check_out(v.tree, work / v.name) for v in args.variants]
        params = [(tree / "params.h").read_bytes() for tree in trees]
        for variant, own in zip(args.variants, params, strict=True):
            if own != params[0]:
                parser.error(
                    f"params.h of {variant.name} is not that of {args.variants[0].name}: they cannot share inputs"
                )

        def compile_one(number: int, file: str | Path) -> tuple[Path, str]:
            variant, tree = args.variants[number], trees[number]
            rename = f"-Djax_flashmla={variant.name}_kernels", f"-DVARIANT={variant.name}"
            out = work / f"{variant.name}.{Path(file).name}.o"
            include = f"-I{tree}", "-isystem", headers
            return out, nvcc("-Xptxas=-v", *rename, *variant.flags, *include, "-c", tree / file, "-o", out)

        files = [(i, file) for file in (*SOURCES, HERE / "variant.cu") for i in range(len(trees))]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            objects, logs = zip(*pool.map(compile_one, *zip(*files, strict=True)), strict=True)
        for number, variant in enumerate(args.variants):
            log = "".join(log for (i, _), log in zip(files, logs, strict=True) if i == number)
            kernels = register_report.parse(log.splitlines())
            registers = sorted(kernel.registers for kernel in kernels if kernel.registers is not None)
            bad = sum(kernel.bad for kernel in kernels)
            print(f"{variant.name}: registers {registers}, {bad} kernels spill or have serialised products", flush=True)
        names = "".join(f" X({v.name})" for v in args.variants)
        nvcc(f"-DVARIANTS(X)={names}", f"-I{trees[0]}", HERE / "time.cu", *objects, "-o", args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
