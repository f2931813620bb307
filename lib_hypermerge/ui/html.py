"""Pieces of HTML that the results of several verbs are made of."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

from ..jobs.report import Report
from ..render import mib

log = logging.getLogger("hypermerge")


def files(report: Report) -> str:
    """Names and sizes of what was written."""
    return ", ".join(f"<b>{escape(Path(o.path).name)}</b> ({mib(o.bytes)})" for o in report.outputs)


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Two columns: what, and how much."""
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<table class="hypermerge-table">{cells}</table>'


def notes(texts: Iterable[str]) -> str:
    """Each in a box of its own."""
    return "".join(f'<div class="hypermerge-note">{escape(text)}</div>' for text in texts)


def button(
    verb: str, action: str, argument: str, label: str, number: int | None = None, call: str | None = None
) -> str:
    """Calls hypermerge.<call or action>(argument) in the page's script.  number: where a result has several of it."""
    end = "" if number is None else f"_{number}"
    return (
        f'<button type="button" id="hypermerge_{verb}_{action}{end}" class="hypermerge-button hypermerge-{action}" '
        f'onclick="hypermerge.{call or action}({_quoted(argument)})">{escape(label)}</button>'
    )


def _quoted(text: str) -> str:
    """A text as the page's script reads it within an attribute."""
    return escape(json.dumps(text), quote=True)


def offers(element: str, label: str, texts: Iterable[str]) -> str:
    """Buttons, each of which writes its text into the text field of that id."""
    buttons = "".join(
        f'<button type="button" class="hypermerge-button" '
        f'onclick="hypermerge.fill({_quoted(element)}, {_quoted(text)})">{escape(text)}</button>'
        for text in texts
    )
    return f'<div class="hypermerge-note hypermerge-offers">{escape(label)}: {buttons}</div>' if buttons else ""


def prompt(report: Report) -> str:
    """The snippet that applies a LoRA, with buttons; empty if the result is none."""
    text = report.details.get("prompt")
    if not text:
        return ""
    copy = button(report.verb, "copy", text, "Copy")
    send = button(report.verb, "send", text, "Send to txt2img")
    return f'<p><code id="hypermerge_{report.verb}_prompt">{escape(text)}</code> {copy} {send}</p>'


def picture(draw: Callable[[], str]) -> str:
    """What draw() returns; a host's matplotlib may be broken, and the result must be shown all the same."""
    try:
        return draw()
    except Exception:
        log.exception("a picture could not be drawn")
        return '<div class="hypermerge-note">The picture could not be drawn; the console says why.</div>'
