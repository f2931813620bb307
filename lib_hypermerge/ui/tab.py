"""The tab: a panel per verb."""

from __future__ import annotations

import gradio as gr

from ..jobs.runner import Runner
from ..jobs.verbs import VERBS
from .panel import Panel


def build_tab(runner: Runner, **blocks_arguments) -> gr.Blocks:
    """The Blocks that a WebUI shows as its tab, and the standalone page as its only one."""
    with gr.Blocks(analytics_enabled=False, title="Hypermerge", **blocks_arguments) as blocks:
        tabs = gr.Tabs(elem_id="hypermerge_tabs")
        for verb in VERBS.values():
            with tabs, gr.Tab(verb.title, elem_id=f"hypermerge_{verb.id}_tab"):
                panel = Panel(verb, runner)
            panel.on_load(blocks)
    return blocks
