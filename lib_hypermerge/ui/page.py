"""The same tab without a WebUI: gradio and the API in one small server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from .. import api
from ..hosts.standalone import FolderHost
from ..jobs.runner import Runner
from .compat import on
from .tab import build_tab

_ROOT = Path(__file__).resolve().parents[2]


def make_app(checkpoints: Path, loras: Path, threads: int = 0) -> FastAPI:
    """Page at /, API beneath api.ROOT."""
    return app_of(Runner(FolderHost(checkpoints, loras, threads)))


def app_of(runner: Runner) -> FastAPI:
    """The same for a runner that is there already."""
    style = (_ROOT / "style.css").read_text(encoding="utf-8")
    script = "\n".join(f.read_text(encoding="utf-8") for f in sorted((_ROOT / "javascript").glob("*.js")))
    blocks = build_tab(runner, css=style)
    with blocks:
        on(blocks.load, None, js=f"() => {{ {script} }}")
    app = FastAPI(title="Hypermerge")
    api.mount(app, runner)
    return gr.mount_gradio_app(app, blocks, path="/")


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]):
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, *arguments: Any, **more: Any) -> None:
        await super().startup(*arguments, **more)
        if self.started:
            self._on_ready()


def serve(app: FastAPI, host: str, port: int, on_ready: Callable[[], None]) -> None:
    """Run the server in this thread; on_ready is called once it listens."""
    _Server(uvicorn.Config(app, host=host, port=port, log_level="warning"), on_ready).run()
