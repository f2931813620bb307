"""The result of resize: a row for each file, what each method misses, errors per block."""

from __future__ import annotations

from html import escape

from ..jobs.report import Report
from ..render_resize import METHODS, describe, facts
from ..words import mib, percent
from . import html
from .plots import INK, as_image, block_bars, in_ink

_TITLE = "What the smaller LoRA misses, per block"


def view(report: Report) -> str:
    """Of a finished resize, or of a preview."""
    d = report.details
    results = [result for file in d["files"] for result in file["results"]]
    if d["preview"]:
        head = f"Nothing was written. {len(results)} files were computed and measured in {report.seconds:.1f} s."
    elif len(results) == 1:
        head = f"{html.files(report)} written in {report.seconds:.1f} s. It misses " \
               f"<b>{percent(results[0]['relative_error'])}</b> of the change (norm)."  # fmt: skip
    else:
        head = f"<b>{len(report.outputs)} files</b> written in {report.seconds:.1f} s."
    if len(d["files"]) == 1 and len(results) > 1:
        head += f" {escape(d['files'][0]['name'])}: {_before(d['files'][0])}, {escape(describe(d['files'][0]))}."
    parts = [f"<p>{head}</p>", html.prompt(report), _table(d)]
    if len(results) == 1:
        file, result = d["files"][0], results[0]
        rows = [("LoRA", f"{file['name']}, {describe(file)}"), *((n[:1].upper() + n[1:], v) for n, v in facts(result))]
        rows += [("SHA-256", output.sha256) for output in report.outputs[:1]]
        parts[2] = html.table(rows)
    if len(d["files"]) == 1 and any(result["components"] for result in results):
        parts.append(html.picture(lambda: _picture(results)))
    return "".join(parts)


def _before(file: dict) -> str:
    return f"{mib(file['bytes'])}, rank {file['rank']}"


def _table(d: dict) -> str:
    """A row for each result, and for each LoRA that could not be resized."""
    methods = [m for m in METHODS if any(m in r["errors"] for f in d["files"] for r in f["results"])]
    several = len(d["files"]) + len(d["failed"]) > 1
    head = [*(["LoRA", "before"] if several else []), "result", "rank", "size", "misses",
            *(METHODS[m] for m in methods if len(methods) > 1)]  # fmt: skip
    rows = []
    for file in d["files"]:
        for result in file["results"]:
            told = dict(facts(result))
            before = [file["name"], _before(file)] if several else []
            row = [*before, result["file"], told["rank"], told["size"], told["misses"]]
            rows.append(row + [told.get(METHODS[m], "–") for m in methods if len(methods) > 1])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    for one in d["failed"]:
        why = " ".join(filter(None, (one["error"]["what"], one["error"]["why"], one["error"]["hint"])))
        body += (f'<tr class="hypermerge-failed"><td>{escape(one["name"])}</td>'
                 f'<td colspan="{len(head) - 1}">{escape(why)}</td></tr>')  # fmt: skip
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    return f'<table class="hypermerge-table hypermerge-rows"><tr>{titles}</tr>{body}</table>'


def _picture(results: list[dict]) -> str:
    """Errors per block of the first result and, of a ladder, the error over the size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    if len(results) == 1:
        axes = figure.subplots()
        block_bars(axes, results[0]["components"], _TITLE)
        in_ink((axes,))
        return as_image(figure, _TITLE)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    last = min(results, key=lambda result: result["bytes"])
    block_bars(left, last["components"], f"{_TITLE} (rank {last['rank']})")
    ladder = sorted(results, key=lambda result: result["bytes"])
    sizes, errors = [r["bytes"] / 2**20 for r in ladder], [100 * r["relative_error"] for r in ladder]
    right.plot(sizes, errors, marker="o", markersize=3, color="#e45756")
    for result, x, y in zip(ladder, sizes, errors, strict=True):
        right.annotate(str(result["rank"]), (x, y), xytext=(3, 3), textcoords="offset points", fontsize=7, color=INK)
    right.set_ylim(bottom=0)
    right.set_xlabel("size, MiB")
    right.set_ylabel("relative error, %")
    right.set_title("Error and size of each rank", fontsize=10)
    in_ink((left, right))
    return as_image(figure, _TITLE)
