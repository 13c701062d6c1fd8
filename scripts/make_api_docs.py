"""Writes docs/api.md and docs/nn_api.md from the docstrings; with --check, fails when one is out of date.

docs/nn_api.md needs Flax; without it the file is left alone.

python scripts/make_api_docs.py [--check]
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import textwrap
from pathlib import Path

import jax_flashmla
from jax_flashmla import kvcache, sharding

DOCS = Path(__file__).resolve().parent.parent / "docs"
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example|Source):\s*(.*)$")
ENTRY = re.compile(r"^  (\S[^:]*): (.*)$")

HEAD = """# API

<!-- Made from the docstrings by scripts/make_api_docs.py: edit those. -->

Letters as in [index.md](index.md). Arguments are checked at trace time; what only the device can see (page ids,
lengths) never leads out of bounds.
"""

NN_HEAD = """# API of `jax_flashmla.nn`

<!-- Made from the docstrings by scripts/make_api_docs.py: edit those. -->

Needs the extra `flax`; [nn.md](nn.md) shows how the parts go together.
"""

EXPORT = """## `EXPORT_SAFE`

For `jax.export.export(f, disabled_checks=EXPORT_SAFE)`: the custom calls of this package are versioned and keep
their meaning, so an exported computation may contain them.
"""


def signature(function: object, name: str = "", *, method: bool = False) -> str:
    """One parameter a line when the call does not fit in one, without quotes around annotations."""
    assert callable(function)
    sig = inspect.signature(function)
    if method:  # without self
        sig = sig.replace(parameters=list(sig.parameters.values())[1:])
    name = name or getattr(function, "__name__", "")
    text = f"{name}{sig}".replace("'", "")
    if len(text) <= 100:
        return text
    lines, star = [], False
    for parameter in sig.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            lines.append("*")
            star = True
        lines.append(str(parameter).replace("'", ""))
    returns = sig.return_annotation
    arrow = "" if returns is sig.empty else f" -> {inspect.formatannotation(returns)}"
    return f"{name}(\n" + "".join(f"    {line},\n" for line in lines) + f"){arrow}"


def markdown(doc: str) -> str:
    """Google-style sections become headings, their entries list items, examples code blocks."""
    out: list[str] = []
    section = ""
    example: list[str] = []
    doc = re.sub(r"^(  [^\s>][^:\n]*,)\n +", r"\1 ", doc, flags=re.M)  # names over two lines
    for line in [*doc.splitlines(), "End:"]:
        head = SECTION.match(line)
        if (head or line == "End:") and example:
            out += ["```python", *textwrap.dedent("\n".join(example)).strip().splitlines(), "```", ""]
            example = []
        if head:
            section = head.group(1)
            out += [f"**{section}**", ""] + ([head.group(2)] if head.group(2) else [])
        elif line == "End:":
            break
        elif section == "Example":
            example.append(line)
        elif section in ("Args", "Attributes", "Raises") and (entry := ENTRY.match(line)):
            names = ", ".join(f"`{name.strip()}`" for name in entry.group(1).split(","))
            out.append(f"- {names}: {entry.group(2)}")
        elif section:
            indent = "  " if section in ("Args", "Attributes", "Raises") and line else ""
            out.append(indent + line.strip())
        else:
            out.append(line)
    return "\n".join(out).rstrip() + "\n"


def section(name: str, value: object) -> str:
    body = markdown(inspect.getdoc(value) or "")
    if inspect.isclass(value) and issubclass(value, Exception):  # its signature says nothing
        return f"## `{name}`\n\n{body}"
    return f"## `{name}`\n\n```python\n{signature(value)}\n```\n\n{body}"


def methods(value: object) -> list[tuple[str, str]]:
    """Public methods and properties of a class that are documented, with the first paragraph of each."""
    found = []
    for name, member in vars(value).items() if inspect.isclass(value) else ():
        doc = inspect.getdoc(member)
        if name.startswith("_") or not doc or not (inspect.isfunction(member) or isinstance(member, property)):
            continue
        text = name
        if inspect.isfunction(member):
            text = re.sub(r"\(\s*self,?\s*", "(", " ".join(signature(member).split())).replace(", )", ")")
        found.append((text, " ".join(doc.split("\n\n")[0].split())))
    return found


def page() -> str:
    parts = [HEAD]
    functions = [name for name in jax_flashmla.__all__ if inspect.isfunction(getattr(jax_flashmla, name))]
    for name in sorted(functions, key=lambda name: (name != "flash_mla_with_kvcache", name)):
        parts.append(section(name, getattr(jax_flashmla, name)))
    parts.append(EXPORT)
    for name in kvcache.__all__:
        value = getattr(kvcache, name)
        if callable(value):
            parts.append(section(f"kvcache.{name}", value))
            if members := methods(value):
                parts.append("**Methods and properties**\n")
                parts.append("\n".join(f"- `{text}`: {doc}" for text, doc in members) + "\n")
    for name in sharding.__all__:
        parts += in_full(f"sharding.{name}", getattr(sharding, name))
    return "\n".join(parts).replace("jax._src.mesh.", "jax.sharding.")  # the public name


def in_full(name: str, value: object) -> list[str]:
    """A function, or a class with its constructor and its documented public methods."""
    if not inspect.isclass(value):
        return [section(name, value)]
    if issubclass(value, tuple):  # a NamedTuple: its __init__ is that of every object
        heading = signature(value, name)
    else:
        heading = signature(value.__init__, name, method=True).replace(") -> None", ")")
    parts = [f"## `{name}`\n\n```python\n{heading}\n```\n\n{markdown(inspect.getdoc(value) or '')}"]
    for key, member in vars(value).items():
        if key == "__init__" or (key.startswith("_") and key != "__call__"):
            continue
        function = member.__func__ if isinstance(member, classmethod) else member
        if inspect.isfunction(function) and (doc := inspect.getdoc(function)):
            call = signature(function, key, method=True)
            parts.append(f"### `{name}.{key}`\n\n```python\n{call}\n```\n\n{markdown(doc)}")
    return parts


def nn_page() -> str:
    from jax_flashmla import nn

    parts = [NN_HEAD]
    for name in nn.__all__:
        parts += in_full(name, getattr(nn, name))
    text = re.sub(r"<function (\w+) at 0x\w+>", r"\1", "\n".join(parts))  # defaults by name
    return re.sub(r"<class (?:[\w.]*\.)?(\w+)>", r"\1", text)


def main() -> int:
    pages = {"api.md": page()}
    if importlib.util.find_spec("flax"):
        pages["nn_api.md"] = nn_page()
    code = 0
    for name, text in pages.items():
        target = DOCS / name
        if "--check" not in sys.argv[1:]:
            target.write_text(text)
        elif not target.exists() or target.read_text() != text:
            print(f"docs/{name} is out of date: run python scripts/make_api_docs.py", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
