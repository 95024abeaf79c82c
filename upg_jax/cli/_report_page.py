"""The page of `upg-jax report`: a table and plots in one HTML file."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upg_jax._errors import MissingDependencyError
from upg_jax._version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; width: 100%; } th, td { padding: .3em .6em; border-bottom: 1px solid #ddd; }
th { text-align: right; } td { text-align: right; } th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } p { max-width: 45em; }
"""


def write_page(path: Path, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Writes the page.

    Args:
        path: of the page.
        rows: one for each model, as `upg-jax report --json` prints them.
        settings: how they were measured.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    plots = [
        _plot(
            rows, "bits_per_weight", "bits per weight of the linear layers, all overheads", "geometric_mean"
        ),
        _plot(rows, "tokens_per_second", "tokens a second", "geometric_mean"),
    ]
    images = "".join(
        f'<p><img src="data:image/png;base64,{plot}" alt="a plot"></p>' for plot in plots if plot
    )
    texts = ", ".join(map(html.escape, settings["texts"]))
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Compressed models</title><style>{_STYLE}</style></head><body>
<h1>Compressed models</h1>
<p>Perplexity in windows of {settings["window"]} tokens that do not overlap, over at most {settings["max_tokens"]:,}
tokens of each text ({texts}); the geometric mean over the texts. Divergence is KL(dense || model) in nats a token;
agreement, how often both find the same token most likely. Bits per weight are those of the linear layers, all
overheads included; the size is that of the weights' files, embeddings included. Speed is that of a greedy answer to
one prompt on this machine.</p>
{_table(rows)}{images}
<p>upg_jax {html.escape(__version__)}</p>
</body></html>
"""
    path.write_text(page, encoding="utf-8")


def _table(rows: list[dict[str, Any]]) -> str:
    columns = {
        "model": lambda row: html.escape(row["name"]) + (" (dense)" if row["dense"] else ""),
        "size": lambda row: _figure(row.get("file_bytes"), "{:,.1f} MB", 1e-6),
        "bits per weight": lambda row: _figure(row.get("bits_per_weight"), "{:.2f}"),
        "with embeddings": lambda row: _figure(row.get("bits_per_weight_all"), "{:.2f}"),
        "perplexity": lambda row: _figure(row["geometric_mean"], "{:.2f}"),
        "divergence": lambda row: _figure(row["kl"], "{:.4f}"),
        "agreement": lambda row: _figure(row["agreement"], "{:.1f}%", 100),
        "tokens a second": lambda row: _figure(row["tokens_per_second"], "{:.1f}"),
    }
    head = "".join(f"<th>{name}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell(row)}</td>" for cell in columns.values()) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _figure(value: float | None, form: str, factor: float = 1) -> str:
    return "" if value is None else form.format(value * factor)


def figure_class() -> type[Figure]:
    """Matplotlib's; without matplotlib, the error says how to install it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise MissingDependencyError('report: plots need matplotlib; pip install "upg-jax[report]"') from e
    return Figure


def _plot(rows: list[dict[str, Any]], x: str, label: str, y: str) -> str | None:
    """A PNG in base64: every model a point, the dense one a line, and the frontier; None without points."""
    points = [row for row in rows if not row["dense"] and row.get(x) is not None]
    if not points:
        return None
    figure = figure_class()(figsize=(8, 5), layout="constrained", dpi=110)
    axes = figure.subplots()
    for recovered, marker, name in ((False, "o", "one-shot"), (True, "D", "recovered")):
        chosen = [row for row in points if bool(row.get("recovered")) == recovered]
        if chosen:
            axes.plot([row[x] for row in chosen], [row[y] for row in chosen], marker, label=name)
    for row in points:
        axes.annotate(row["name"], (row[x], row[y]), textcoords="offset points", xytext=(6, 5), fontsize=8)
    more_is_better = x == "tokens_per_second"
    best = frontier([(row[x], row[y]) for row in points], more_is_better=more_is_better)
    if len(best) > 1:
        # Between two points, what is to be had is the one that is no larger, or no slower.
        where: Any = "pre" if more_is_better else "post"
        axes.step(
            *zip(*best, strict=True), where=where, color="gray", linewidth=1, label="frontier", zorder=0
        )
    for row in rows:
        if row["dense"]:
            axes.axhline(row[y], linestyle="--", color="black", linewidth=1, label="dense")
    values = [row[y] for row in rows]
    if max(values) > 3 * min(values):
        axes.set_yscale("log")
    axes.margins(x=0.15)
    axes.set(xlabel=label, ylabel="perplexity")
    axes.grid(alpha=0.3)
    axes.legend()
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return base64.b64encode(target.getvalue()).decode()


def frontier(points: list[tuple[float, float]], *, more_is_better: bool) -> list[tuple[float, float]]:
    """The points that no other beats in both: less of the second, and less of the first, or more of it."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (-point[0] if more_is_better else point[0], point[1])):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return sorted(best)
