"""The command line: python -m lib_hypermerge VERB …, its flags made from the verb's spec."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import traceback
from typing import Any

from . import __version__
from .errors import Cancelled, HypermergeError, SpecError, defect
from .flags import add_flags, values_of
from .hosts.standalone import PathHost
from .jobs.host import Context
from .jobs.runner import execute, forecast
from .jobs.spec import has_preview
from .jobs.verbs import VERBS, Verb
from .words import counts, mib

_THREADS_HELP = "CPU threads, one a layer, at most 8 layers at a time (default: torch's own number)"
_MOST_THREADS = 1024
_BYTES = ("bytes_to_read", "expected_memory")  # of the forecast, beside what ends in _bytes


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise SpecError(message[:1].upper() + message[1:] + ".", hint=f"See: {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """All verbs' flags; every verb also knows --threads, --dry-run, --json and --quiet.

    Where a verb can preview, --dry-run is its flag for that.
    """
    parser = _Parser(prog="python -m lib_hypermerge", description="Hypermerge: model files in, model files out.")
    parser.add_argument("--version", action="version", version=f"hypermerge {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    for verb in VERBS.values():
        sub = verbs.add_parser(verb.id, help=verb.help, description=verb.help, allow_abbrev=False)
        add_flags(sub, verb.spec)
        sub.add_argument("--threads", type=int, default=0, metavar="N", help=_THREADS_HELP)
        if not has_preview(verb.spec):
            sub.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
        sub.add_argument("--json", action="store_true", help="the last line of standard output is one JSON object")
        sub.add_argument("--quiet", action="store_true", help="no progress on standard error")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 2 the request is wrong, 1 it failed, 130 cancelled."""
    arguments = sys.argv[1:] if arguments is None else arguments
    stop = threading.Event()
    try:
        _stop_on_signals(stop)
        values = vars(build_parser().parse_args(arguments))
        verb = VERBS[values.pop("verb")]
        options = {name: values.pop(name, False) for name in ("threads", "dry_run", "json", "quiet")}
        if not 0 <= options["threads"] <= _MOST_THREADS:
            raise SpecError(f"--threads must be 0 or more, and at most {_MOST_THREADS}.")
        return _run(verb, values, stop, **options)
    except HypermergeError as error:
        return _fail(error, "--json" in arguments)
    except KeyboardInterrupt:  # before the handlers were set
        return _fail(Cancelled(), "--json" in arguments)
    except Exception as error:  # a defect of ours; whoever reads the JSON still gets an answer
        print(_plain(traceback.format_exc()), file=sys.stderr)
        return _fail(defect(error), "--json" in arguments)


def _fail(error: HypermergeError, as_json: bool) -> int:
    lines = [error.what, error.why, error.hint]
    print(_plain("\n  ".join(line for line in lines if line)), file=sys.stderr)
    if as_json:
        print(json.dumps({"error": error.to_json(), "exit_code": error.exit_code}), flush=True)
    return error.exit_code


def _plain(text: str) -> str:
    """Without control characters: names come from files, and a terminal would obey them."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "?" for sign in text)


def _run(
    verb: Verb, values: dict[str, Any], stop: threading.Event, *, threads: int, dry_run: bool, json: bool, quiet: bool
) -> int:
    spec = verb.spec.from_json(values_of(verb.spec, values))
    host = PathHost(threads)
    bar = _Bar(quiet)
    try:
        if dry_run:
            table = forecast(verb, spec, host)
            if stop.is_set():
                raise Cancelled
            _show_forecast(table, json)
            return 0
        report = execute(verb, spec, host, Context(bar.update, stop.is_set))
    finally:
        bar.close()
    _show_report(report, json)
    return report.exit_code


def _stop_on_signals(stop: threading.Event) -> None:
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), lambda *_: stop.set())


def _show_forecast(table: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(table), flush=True)
    else:
        for key, value in table.items():
            print(_plain(f"{key.replace('_', ' ')}: {_in_words(key, value)}"))


def _in_words(key: str, value: Any) -> str:
    """A value of the forecast: bytes as MiB, a table of counts as "282 unet, 72 te", a list by commas."""
    if isinstance(value, int) and (key in _BYTES or key.endswith("_bytes")):
        return mib(value)
    if isinstance(value, dict) and all(isinstance(count, int) for count in value.values()):
        return counts(value)
    if isinstance(value, list):
        return (" " if key == "warnings" else ", ").join(map(str, value)) or "none"
    return "not known before" if value is None else str(value)


def _show_report(report: Any, as_json: bool) -> None:
    from .render import as_text

    print(json.dumps(report.to_json()) if as_json else _plain(as_text(report)), flush=True)


class _Bar:
    """Progress on standard error: a bar on a terminal, a line every tenth elsewhere."""

    def __init__(self, quiet: bool):
        self._quiet, self._bar, self._tenth = quiet, None, -1

    def update(self, fraction: float, text: str) -> None:
        if self._quiet:
            return
        text = _plain(text)
        if sys.stderr.isatty():
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=1.0, bar_format="{percentage:3.0f}% |{bar}| {elapsed} {postfix}", leave=False)
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(fraction - self._bar.n)
        elif int(fraction * 10) > self._tenth:
            self._tenth = int(fraction * 10)
            print(f"{fraction:4.0%} {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
