"""Rows as a Markdown table, as JSON lines, and as a plot."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .protocol import Ceilings, Timing, Work, roofline

Row = dict[str, Any]
OURS = "jax_flashmla"
REST = "rest"  # a step of a model without its attention: timed beside ours, and no peer


def make_row(op: str, work: Work, mode: str, times: dict[str, Timing], limits: Ceilings | None, facts: Row) -> Row:
    """One JSON object. `times` has ours and the peers that ran; rates are of ours."""
    ours = times[OURS]
    rates: dict[str, float | None] = {"tflops": None, "gbps": None, "roofline": None}
    if limits is not None:
        rates = {
            "tflops": work.flops / ours.us / 1e6,
            "gbps": work.bytes / ours.us / 1e3,
            "roofline": roofline(work.flops, work.bytes, ours.us, limits, work.ceiling),
        }
    step: Row = {}
    if work.tokens:
        share = 1 - times[REST].us / ours.us if REST in times else None
        step = {"tokens": work.tokens, "tokens_per_second": 1e6 * work.tokens / ours.us, "attention": share}
    return {
        "op": op,
        "case": work.name,
        **work.shape,
        "mode": mode,
        "us": ours.us,
        "spread": list(ours.spread),
        **rates,
        **step,
        "peers": {name: time.us for name, time in times.items() if name not in (OURS, REST)},
        "mhz": ours.mhz,
        "watts": ours.watts,
        "ceilings": limits._asdict() if limits else None,
        **facts,
    }


def best_peer(row: Row) -> float | None:
    """How many times longer than ours the best peer takes."""
    return min(row["peers"].values()) / row["us"] if row["peers"] else None


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table_head(op: str, peers: Sequence[str]) -> str:
    cells = [op, "mode", "µs", "±", "TFLOPS", "GB/s", "% of roofline", "× best peer", *peers, "MHz", "W"]
    return line(cells) + "\n|---|---" + "|--:" * (len(cells) - 2) + "|"


def table_line(row: Row, peers: Sequence[str]) -> str:
    low, high = row["spread"]
    share = row["roofline"] and 100 * row["roofline"]
    cells = [row["case"], row["mode"], number(row["us"], ".1f"), number((high - low) / 2, ".1f")]
    cells += [number(row["tflops"], ".0f"), number(row["gbps"], ".0f"), number(share, ".0f")]
    cells += [number(best_peer(row), ".2f"), *(number(row["peers"].get(peer), ".1f") for peer in peers)]
    return line([*cells, number(row["mhz"], ".0f"), number(row["watts"], ".0f")])


def step_line(row: Row) -> str:
    """What a row says about a model, in its units."""
    rates = [
        f"{name} {us / 1e3:.2f} ms a step, {1e6 * row['tokens'] / us:.0f} tokens/s"
        for name, us in ((OURS, row["us"]), *row["peers"].items())
    ]
    share = "" if row["attention"] is None else f"; attention is {row['attention']:.0%} of ours"
    return f"{row['case']}, {row['mode']}: {'; '.join(rates)}{share}"


def ceilings_table(limits: dict[str, Ceilings]) -> str:
    head = "| ceilings | copy GB/s | read GB/s | bf16 8192³ TFLOPS | MHz | W |\n|---|--:|--:|--:|--:|--:|\n"
    return head + "\n".join(line([mode, *(number(x, ".0f") for x in found)]) for mode, found in limits.items()) + "\n"


def append_json(row: Row, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_json(path: Path) -> list[Row]:
    return [json.loads(text) for text in path.read_text().splitlines() if text.strip()]


def plot(rows: list[Row], path: Path) -> None:
    """Latency against context, a panel per head count: a colour per contender, a marker per batch, the newest rows.

    Takes uniform lengths, one query token and pages of 64; burst where the rows have it.
    """
    from matplotlib.figure import Figure

    wanted = {"op": "dense_decode", "s_q": 1, "page_size": 64, "lengths": "uniform"}
    rows = [row for row in rows if wanted.items() <= row.items()]
    if not rows:
        raise ValueError("nothing to plot: no dense_decode rows with uniform lengths, one query token and pages of 64")
    mode = "burst" if any(row["mode"] == "burst" for row in rows) else "sustained"
    newest = {row["case"]: row for row in rows if row["mode"] == mode}.values()
    contexts = {row["h_q"]: {r["s_k"] for r in newest if r["h_q"] == row["h_q"]} for row in newest}
    heads = sorted(h_q for h_q in contexts if len(contexts[h_q]) > 1) or sorted(contexts)
    batches = sorted({row["b"] for row in newest if row["h_q"] in heads})
    names = list(dict.fromkeys(name for row in newest for name in times_of(row)))
    markers = dict(zip(batches, "osD^vP*X" * len(batches)))

    figure = Figure(figsize=(3.6 * max(2, len(heads)), 4), layout="constrained")
    panels = figure.subplots(1, len(heads), sharex=True, sharey=True, squeeze=False)[0]
    for panel, h_q in zip(panels, heads):
        for b, (i, name) in itertools.product(batches, enumerate(names)):
            mine = [row for row in newest if (row["h_q"], row["b"]) == (h_q, b) and name in times_of(row)]
            points = sorted((row["s_k"], times_of(row)[name]) for row in mine)
            style = {"color": f"C{i}", "marker": markers[b], "markersize": 5, "linewidth": 2 if name == OURS else 1}
            panel.plot([s_k for s_k, _ in points], [us for _, us in points], **style)
        panel.set(title=f"{h_q} heads", xlabel="context, tokens", xscale="log", yscale="log")
        panel.grid(alpha=0.3)
    ticks = sorted(set().union(*(contexts[h_q] for h_q in heads)))
    panels[0].set_xticks(ticks, [f"{s_k / 1024:g}K" for s_k in ticks])
    panels[0].set_xticks([], minor=True)
    for i, name in enumerate(names):
        panels[0].plot([], [], color=f"C{i}", label=name)
    for b, marker in markers.items():
        panels[0].plot([], [], color="grey", linestyle="", marker=marker, label=f"b {b}")
    panels[0].set_ylabel(f"µs per call, {mode}")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    figure.suptitle(f"Dense decode on {next(iter(newest))['gpu']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def times_of(row: Row) -> dict[str, float]:
    return {OURS: row["us"], **row["peers"]}
