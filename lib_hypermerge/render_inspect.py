"""An inspection in words: what each file is, then how alike they are."""

from __future__ import annotations

from typing import Any

from .jobs.report import Report
from .words import counts, listed, mib, millions, percent

_HASHES = {
    "sha256": "SHA-256", "data_sha256": "SHA-256 of its data", "autov2": "AutoV2", "autov3": "AutoV3",
}  # fmt: skip


def text(report: Report) -> list[str]:
    """The lines of a finished inspection."""
    d = report.details
    lines = [line for file in d["files"] for line in _file(file)]
    for item in d["similarity"]:
        lines += _similarity(item, [file["name"] for file in d["files"]])
    lines += [f"{pair['file']} and {pair['equals']} say that they hold the same data" for pair in d["told_equal"]]
    if "duplicates" in d:
        equal = [f"{pair['file']} is {_same(pair)} {pair['equals']}" for pair in d["duplicates"]]
        lines += equal or [f"no duplicates among {d['looked_at']} files"]
    return lines


def _same(pair: dict[str, str]) -> str:
    return "bit for bit" if pair["same"] == "file" else "but for its metadata"


def _file(file: dict[str, Any]) -> list[str]:
    if file["kind"] == "unreadable":
        error = file["error"]
        return [f"{file['name']}: {' '.join(filter(None, (error['what'], error['why'], error['hint'])))}"]
    lines = [f"  {name}: {value}" for name, value in describe(file)]
    if file["metadata"]:
        lines.append(f"  metadata: {listed(list(file['metadata']), len(file['metadata']), 8)}")
    return [str(file["path"]), *lines]


def describe(file: dict[str, Any]) -> list[tuple[str, str]]:
    """What and how much, of a file that could be read; for the terminal and the page alike."""
    rows = [("size", f"{mib(file['bytes'])}, {file['format']}")]
    rows += _KINDS[file["kind"]](file)
    if file.get("hashes"):
        hashes = file["hashes"]
        rows += [(_HASHES[name], hashes[name]) for name in _HASHES if hashes[name]]
        if hashes["stored_is_right"] is not None:
            rows.append(("hash stored in it", "right" if hashes["stored_is_right"] else "not that of its data"))
    return rows


def _checkpoint(file: dict[str, Any]) -> list[tuple[str, str]]:
    kind = f"{file['title']} checkpoint" + (f", {file['prediction']}" if file["prediction"] else "")
    rows = [("kind", kind)]
    for part in file["components"].values():
        text = (
            f"{part['tensors']} tensors, {millions(part['parameters'])} parameters, {mib(part['bytes'])}, "
            f"{counts(part['dtypes'])}"
        )
        rows.append((part["title"], text if part["present"] else "not in this file"))
    others = {kind: part["tensors"] for kind, part in file["others"].items()}
    if others:
        rows.append(("besides", counts(others)))
    rows += [(host["title"], _loads(host)) for host in file["hosts"].values()]
    titles = {component: part["title"] for component, part in file["components"].items()}
    return rows + (_values_read(file["values"], titles) if "values" in file else [])


def _embedding(file: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("kind", f"embedding (textual inversion) for {file['title']}")]
    rows += [(f"vectors {name}", f"{count} of {file['widths'][name]}") for name, count in file["vectors"].items()]
    return rows + _tensors_of(file)


def _vae(file: dict[str, Any]) -> list[tuple[str, str]]:
    written = "diffusers' names" if file["layout"] == "diffusers" else "the original names"
    rows = [("kind", f"VAE alone, under {written}")]
    if file["latent_channels"]:
        of = f", as of {file['latents_of']}" if file["latents_of"] else ""
        rows.append(("latent channels", f"{file['latent_channels']}{of}"))
    return rows + _tensors_of(file) + ([("besides", f"{file['others']} other tensors")] if file["others"] else [])


def _unknown(file: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("kind", "tensors of a model that Hypermerge does not know"), ("why", file["why"])]
    return [*rows, *_tensors_of(file), ("names", listed(file["names"], file["tensors"]))]


def _tensors_of(file: dict[str, Any]) -> list[tuple[str, str]]:
    sums = f"{file['tensors']}, {millions(file['parameters'])} parameters, {mib(file['bytes_of_tensors'])}"
    rows = [("tensors", sums), ("number formats", counts(file["dtypes"]))]
    return rows + (_values_read(file["values"], {}) if "values" in file else [])


def _values_read(values: dict[str, Any], titles: dict[str, str]) -> list[tuple[str, str]]:
    bad = values["nonfinite"]
    norms = {titles.get(component, component): part["norm"] for component, part in values["components"].items()}
    rows = [(f"norm of {title}", f"{norm:.4g}") for title, norm in norms.items()]
    return [*rows, ("NaN or Inf", listed(bad["names"], bad["count"]) if bad["count"] else "none")]


def _loads(host: dict[str, Any]) -> str:
    says = {"loads": "loads it", "refused": "cannot load it: ", "not listed": "does not list it: "}[host["verdict"]]
    return "; ".join([says + host["why"], *host["notes"]])


def _adapter(file: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("kind", f"LoRA for {file['title']}, written as {file['dialect']}"),
        ("modules", counts(file["families"])),
        ("number formats", counts(file["dtypes"])),
    ]
    if file["ranks"]:
        rows += [("rank", _values(file["ranks"])), ("alpha", _values(file["alphas"])),
                 ("scale", _values(file["scales"]))]  # fmt: skip
    rows += [(part["title"], f"{part['modules']} modules") for part in file["components"].values()]
    if file["dora"]:
        rows.append(("magnitudes (DoRA)", counts(file["dora"])))
    if file["biases"]:
        rows.append(("changes of biases", str(file["biases"])))
    if file["embeddings"]:
        rows.append(("embeddings", listed(list(file["embeddings"]), len(file["embeddings"]))))
    odd = {"no layer answers to": file["unmatched"], "part of no module": file["unknown"]}
    if 2 * file["misfits"]["count"] > file["modules"]:
        rows.append(("sizes", "of a model of another width"))
    else:
        odd["not of their layer's size"] = file["misfits"]
    rows += [(title, listed(found["names"], found["count"])) for title, found in odd.items() if found["count"]]
    rows += [("damaged", f"{key}: {why}") for key, why in file["broken"]["modules"].items()]
    if file["prompt"]:
        rows.append(("prompt", file["prompt"]))
    rows += [(host["title"], _host(host)) for host in file["hosts"].values()]
    rows += [("note", note) for note in file["notes"]]
    return rows + (_measured(file["measured"]) if "measured" in file else [])


def _values(table: dict[str, int]) -> str:
    """A single value, or the commonest with how often each occurs."""
    if len(table) == 1:
        return next(iter(table))
    common = sorted(table.items(), key=lambda item: -item[1])
    return ", ".join(f"{value} ({count}×)" for value, count in common[:5]) + (", …" if len(common) > 5 else "")


def _host(host: dict[str, Any]) -> str:
    says = {
        "all": f"loads all {host['modules']} modules",
        "part": f"loads {host['modules']} modules, leaves out {host['ignored']} tensors ({host['why']})",
        "nothing": f"loads nothing: {host['why']}",
        "refused": f"refuses the file: {host['why']}",
        "not listed": f"does not list it: {host['why']}",
    }[host["verdict"]]
    return says if host["verdict"] == "not listed" else says.rstrip(".") + f"; shown in the group {host['group']}"


def _measured(measured: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("norm of the change", f"{measured['norm']:.4g}")]
    for part in measured["components"].values():
        text = f"{part['norm']:.4g}"
        if part["blocks"] and part["norm"] > 0:
            block, most = max(part["blocks"].items(), key=lambda item: item[1]["norm"])
            text += f", most in {block} ({most['norm']:.4g})"
        spectrum = part.get("spectrum")
        if spectrum and spectrum["layers"]:
            text += f"; 90 % of its energy in {spectrum['rank_for_90']['median']} directions of a usual layer"
        rows.append((f"norm in {part['title']}", text))
    if measured["left_out"]:
        rows.append(("not measured", counts(measured["left_out"])))
    if measured["nonfinite"]["count"]:
        rows.append(("NaN or Inf", listed(measured["nonfinite"]["names"], measured["nonfinite"]["count"])))
    return rows


_KINDS = {
    "checkpoint": _checkpoint, "adapter": _adapter, "embedding": _embedding, "VAE": _vae, "tensors": _unknown,
}  # fmt: skip


def _similarity(item: dict[str, Any], names: list[str]) -> list[str]:
    lines = [similarity_title(item)]
    for place, row in zip(item["files"], item["cosine"], strict=True):
        lines.append("  " + " ".join(f"{'–' if c is None else format(c, '.4f'):>8}" for c in row) + f"  {names[place]}")
    if "distance" in item and item["of"] == "weights":
        lines.append("  relative distance of the weights")
        for place, row in zip(item["files"], item["distance"], strict=True):
            lines.append("  " + " ".join(f"{'–' if c is None else percent(c):>8}" for c in row) + f"  {names[place]}")
    return lines


def similarity_title(item: dict[str, Any]) -> str:
    """What a matrix shows."""
    if item["kind"] == "adapters":
        return f"cosine of the changes ({item['title']})"
    what = f"cosine of the changes from {item['base']}" if item["of"] == "changes" else "cosine of the weights"
    sample = "" if item["values"] == item["all_values"] else f", {percent(item['values'] / item['all_values'])} of them"
    return f"{what} ({item['title']}{sample})"
