"""Inside AUTOMATIC1111's WebUI, Forge, reForge and Forge Classic/Neo: the only file that knows their modules.

What exists is asked for, never assumed from a host's name or version.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from ..errors import SpecError
from ..jobs.host import Context
from ..jobs.runner import Runner
from .standalone import file_stem

_HASH = re.compile(r" \[[0-9a-fA-F]{6,64}\]$")
_STEPS = 1000


class WebUIHost:
    """The WebUI's own lists, folders, queue, progress bar and Interrupt button."""

    def checkpoints(self) -> list[str]:
        from modules import sd_models

        titles = getattr(sd_models, "checkpoint_tiles", None)
        return list(titles()) if titles else [info.title for info in sd_models.checkpoints_list.values()]

    def resolve_checkpoint(self, name: str) -> Path:
        """By title, or any alias; a title that has gained or lost its [hash] since is found as well."""
        from modules import sd_models

        known = {**getattr(sd_models, "checkpoint_aliases", {}), **sd_models.checkpoints_list}
        info = known.get(name)
        if info is None:
            bare = _HASH.sub("", name)
            found = [i for i in sd_models.checkpoints_list.values() if bare in (_HASH.sub("", i.title), i.name)]
            info = found[0] if len(found) == 1 else None
        if info is None:
            raise SpecError(f"There is no checkpoint {name!r}.", hint="Refresh the list and choose one of it.")
        return Path(info.filename)

    def lora_output(self, name: str) -> Path:
        folder = _lora_folder()
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{file_stem(name)}.safetensors"

    def refresh(self) -> None:
        """Let the prompt and the cards know new LoRAs."""
        try:
            import networks  # of the built-in Lora extension, which a user can switch off
        except ImportError:
            return
        networks.list_available_networks()

    def refresh_checkpoints(self) -> None:
        from modules import sd_models

        sd_models.list_models()

    def device(self) -> str:
        from modules import shared

        chosen = getattr(shared.opts, "hypermerge_device", "auto")
        if chosen != "auto":
            return chosen
        try:
            from modules import devices
        except ImportError:
            return "auto"
        kind = str(getattr(devices, "device", None) or "auto")
        return kind if kind == "auto" or kind.split(":")[0] in ("cpu", "cuda", "mps") else "cpu"

    def threads(self) -> int:
        from modules import shared

        return int(getattr(shared.opts, "hypermerge_threads", 0))

    @contextlib.contextmanager
    def running(self, job_id: str, on_wait: Callable[[], None]) -> Iterator[Context]:
        """One turn in the WebUI's queue; its lock is not reentrant, so nothing here may call into generation."""
        from modules import call_queue, progress, shared

        on_wait()
        progress.add_task_to_queue(job_id)
        with call_queue.queue_lock:
            shared.state.begin(job=job_id)
            progress.start_task(job_id)
            # without these the host would report a negative progress
            shared.state.job_count, shared.state.job_no, shared.state.sampling_steps = 1, 0, _STEPS

            def show(fraction: float, text: str) -> None:
                shared.state.sampling_step = int(fraction * _STEPS)
                shared.state.textinfo = text

            try:
                yield Context(show, lambda: bool(shared.state.interrupted or shared.state.skipped))
            finally:
                progress.finish_task(job_id)
                shared.state.end()

    def forget(self, job_id: str) -> None:
        from modules import progress

        progress.finish_task(job_id)

    def credentials(self) -> dict[str, str] | None:
        """User → password of --api-auth; of the page's own login if there is only that; None if the host is open.

        SpecError if a login was asked for but none could be read: then nobody may get in.
        """
        from modules import shared

        options = ("api_auth", "gradio_auth", "gradio_auth_path")
        api, page, file = (getattr(shared.cmd_opts, name, None) for name in options)
        found = _pairs(api) if api else {**_pairs_of_page(), **_pairs(page), **_pairs_of_file(file)}
        if not found and (api or page or file):
            raise SpecError(
                "The WebUI asks for a login, but its users and passwords could not be read.",
                hint="--api-auth and --gradio-auth are written user:password, several with commas between.",
            )
        return found or None


def _lora_folder() -> Path:
    """The first of the host's folders of LoRAs; hosts spell the option as one folder, as a list, or not at all."""
    from modules import shared

    for name in ("lora_dir", "lora_dirs"):
        value = getattr(shared.cmd_opts, name, None)
        if isinstance(value, (list, tuple)):
            value = value[0] if value else None
        if value:
            return Path(value)
    from modules import paths

    return Path(paths.models_path) / "Lora"


def _pairs(text: object) -> dict[str, str]:
    """Reads user:password,user:password as the WebUI does; a password may hold a colon."""
    entries = (entry.strip() for entry in str(text or "").split(","))
    return dict(entry.split(":", 1) for entry in entries if ":" in entry)


def _pairs_of_file(path: object) -> dict[str, str]:
    try:
        return _pairs(",".join(Path(str(path)).read_text(encoding="utf-8").splitlines())) if path else {}
    except (OSError, ValueError):
        return {}


def _pairs_of_page() -> dict[str, str]:
    """What the host itself makes of its login options; some forks have no such function."""
    try:
        from modules import initialize_util

        return {user: password for user, password in initialize_util.get_gradio_auth_creds() or ()}
    except Exception:  # whatever it is: the options are read here as well, and an empty answer lets nobody in
        return {}


@lru_cache(maxsize=1)
def runner() -> Runner:
    """The one runner of this process; it outlives "Reload UI"."""
    return Runner(host())


@lru_cache(maxsize=1)
def host() -> WebUIHost:
    """The one host of this process."""
    return WebUIHost()


def add_settings() -> None:
    """Our section in the Settings tab."""
    from modules import shared

    section = ("hypermerge", "Hypermerge")

    def option(key: str, default: object, label: str, component: object, arguments: dict) -> None:
        shared.opts.add_option(key, shared.OptionInfo(default, label, component, arguments, section=section))

    import gradio as gr

    option(
        "hypermerge_device",
        "auto",
        "Device that jobs compute on",
        gr.Radio,
        {"choices": ["auto", "cpu", "cuda", "mps"]},
    )
    option(
        "hypermerge_threads", 0, "Processor threads (0: as many as the WebUI)", gr.Slider,
        {"minimum": 0, "maximum": 64, "step": 1},
    )  # fmt: skip
