"""The standalone page: python -m lib_hypermerge.ui."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import webbrowser
from pathlib import Path

from .page import make_app, serve

_ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None) -> int:
    """Serve the page until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m lib_hypermerge.ui", description="Hypermerge in a page of its own.")
    models = _ROOT / "models"
    parser.add_argument("--checkpoints", type=Path, default=models / "Stable-diffusion", help="folder of checkpoints")
    parser.add_argument("--loras", type=Path, default=models / "Lora", help="folder where LoRAs are written")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=7870)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: those of torch, at most 8)")
    parser.add_argument("--no-browser", action="store_true", help="do not open it in the browser")
    options = parser.parse_args(arguments)
    for folder in (options.checkpoints, options.loras):
        folder.mkdir(parents=True, exist_ok=True)
    # 0.0.0.0 and :: listen on every address, but are none to go to
    url = f"http://{'127.0.0.1' if options.host in ('0.0.0.0', '::') else options.host}:{options.port}"
    opens = not options.no_browser and not os.environ.get("CI")

    def ready() -> None:
        print(f"Hypermerge: {url}\n  checkpoints: {options.checkpoints}\n  LoRAs: {options.loras}")
        print("Opening it in the browser (--no-browser: don't)." if opens else "Open it in a browser.", end=" ")
        print("Ctrl+C ends it.", flush=True)
        if opens:  # in a thread: some browsers return only when they are closed
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

    app = make_app(options.checkpoints, options.loras, options.threads)
    serve(app, options.host, options.port, ready)
    return 0


if __name__ == "__main__":
    sys.exit(main())
