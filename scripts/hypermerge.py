"""Registers Hypermerge with the WebUI: its tab, its settings, its API. Runs again on every "Reload UI"."""

from modules import script_callbacks

from lib_hypermerge import api
from lib_hypermerge.hosts import webui
from lib_hypermerge.ui.tab import build_tab


def on_ui_tabs():
    return [(build_tab(webui.runner()), "Hypermerge", "hypermerge")]


def on_app_started(_demo, app):
    if not any(getattr(route, "path", "").startswith(api.ROOT) for route in app.routes):
        api.mount(app, webui.runner(), webui.host().credentials())


script_callbacks.on_ui_tabs(on_ui_tabs)
script_callbacks.on_ui_settings(webui.add_settings)
script_callbacks.on_app_started(on_app_started)
script_callbacks.on_model_loaded(webui.model_loaded)
