"""scripts/variants.py: what it refuses, and that its own files compile. Timing needs a Hopper GPU, and a person."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"


def build(*arguments):
    command = [sys.executable, SCRIPTS / "variants.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "."], "a variant is NAME=TREE[,FLAG...]"),
        (["out", "Before=."], "with a name in lower case"),
        (["out", f"one={ROOT}", f"one={ROOT}", "--cutlass", "."], "two variants have one name"),
        (["out", "one=no_such_tree", "--cutlass", "."], "is no folder with csrc/ and no revision"),
    ],
)
def test_refuses(arguments, message):
    code, error = build(*arguments)
    assert code != 0 and message in error


def test_refuses_other_parameters(tmp_path):
    """Variants share inputs, so their params.h must be the same."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "params.h").write_text("struct DecodeParams {};")
    code, error = build(tmp_path / "out", f"one={ROOT}", f"two={tmp_path}", "--cutlass", ".")
    assert code == 2 and "params.h of two is not that of one" in error


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize("define", ["VARIANT=one", "VARIANTS(X)=X(one) X(two)"])
def test_compiles(tmp_path, define):
    file = "variant.cu" if define.startswith("VARIANT=") else "time.cu"
    flags = ["-std=c++17", "-arch=sm_90a", f"-I{ROOT / 'csrc'}", "-Werror=all-warnings", f"-D{define}"]
    done = subprocess.run(
        ["nvcc", *flags, "-c", SCRIPTS / "variants" / file, "-o", tmp_path / "out.o"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
