"""Inside AUTOMATIC1111's WebUI, Forge, reForge and Forge Classic/Neo: the only file that knows their modules.

What exists is asked for, never assumed from a host's name or version.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SpecError
from ..jobs.host import Context, ModelInMemory
from ..jobs.runner import Runner
from . import webui_model
from .folders import lora_names, matching
from .standalone import file_stem
from .styles import add_styles

if TYPE_CHECKING:  # it needs torch, which nothing here does
    from ..jobs.trial import Trial

_HASH = re.compile(r" \[[0-9a-fA-F]{6,64}\]$")
_STEPS = 1000


class WebUIHost:
    """The WebUI's own lists, folders, queue, progress bar, Interrupt button, and model in memory."""

    trial: Trial | None = None

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
        folder = _lora_folders()[0]
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{file_stem(name)}.safetensors"

    def loras(self) -> list[str]:
        return list(_loras())

    def resolve_lora(self, name: str) -> Path:
        """By name or, as in a prompt, by the alias that a file gives itself, where only one file has it."""
        found = _loras().get(name)
        if found is None:
            aliases = getattr(_networks(), "available_network_aliases", {})
            shared_by_several = getattr(_networks(), "forbidden_network_aliases", {})
            entry = aliases.get(name) if name.lower() not in shared_by_several else None
            found = Path(entry.filename) if entry else None
        if found is None:
            raise SpecError(f"There is no LoRA {name!r}.", hint="Refresh the list and choose one of it.")
        return found

    def find_loras(self, pattern: str) -> dict[str, Path]:
        """By the names of the list, which are without folders here, or by the paths within the folders of LoRAs."""
        found = matching(_loras(), pattern)
        for folder in _lora_folders():
            found |= {name: path for name, path in matching(lora_names(folder), pattern).items()
                      if path not in found.values()}  # fmt: skip
        return found

    def checkpoint_output(self, name: str) -> Path:
        folder = _checkpoint_folder()
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{file_stem(name)}.safetensors"

    def loaded_checkpoint(self) -> Path | None:
        """Of the model that is there already: shared.sd_model would load one first."""
        from modules import sd_models

        model = getattr(getattr(sd_models, "model_data", None), "sd_model", None)
        info = getattr(model, "sd_checkpoint_info", None)
        return Path(info.filename) if info else None

    def model_in_memory(self) -> ModelInMemory:
        return webui_model.model_in_memory()

    def model_loaded(self, model: object) -> None:
        """The host has filled a model from a file, perhaps one that a trial had changed."""
        if self.trial is not None and self.trial.model.is_of(model):
            self.trial = None

    def add_styles(self, prompts: Mapping[str, str]) -> list[str]:
        """Keep prompts as styles; returns the names under which the WebUI has them. See styles.add_styles."""
        from modules import shared

        return add_styles(getattr(shared, "prompt_styles", None), prompts)

    def refresh(self) -> None:
        """Let lists, prompt and cards know new files."""
        from modules import sd_models

        sd_models.list_models()
        networks = _networks()
        if networks:
            networks.list_available_networks()

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


def _networks() -> Any:
    """The module of the built-in Lora extension; None where a user has switched that off."""
    try:
        import networks
    except ImportError:
        return None
    return networks


def _loras() -> dict[str, Path]:
    """Name → path: the prompt's names where the Lora extension is there, names in the folders otherwise.

    PEFT folders, which no prompt knows, stand after the rest.
    """
    found: dict[str, Path] = {}
    for folder in reversed(_lora_folders()):
        found.update(lora_names(folder))
    known = getattr(_networks(), "available_networks", None)
    if known is None:
        return found
    folders = {name: path for name, path in found.items() if path.is_dir()}
    prompts = {name: Path(entry.filename) for name, entry in sorted(known.items(), key=lambda item: item[0].lower())}
    return {**prompts, **{name: path for name, path in folders.items() if name not in prompts}}


def _lora_folders() -> list[Path]:
    """The host's folders of LoRAs; hosts spell the option as one folder, as a list, or not at all."""
    from modules import shared

    folders = _folders_of(shared.cmd_opts, "lora_dir", "lora_dirs")
    if folders:
        return folders
    from modules import paths

    return [Path(paths.models_path) / "Lora"]


def _checkpoint_folder() -> Path:
    """Where new checkpoints go: the folder that the user named, or else the host's own."""
    from modules import sd_models, shared

    named = _folders_of(shared.cmd_opts, "ckpt_dir", "ckpt_dirs")
    return named[0] if named else Path(sd_models.model_path)


def _folders_of(options: object, *names: str) -> list[Path]:
    found: list[Path] = []
    for name in names:
        value = getattr(options, name, None)
        values = value if isinstance(value, (list, tuple)) else [value]
        found += [Path(folder) for folder in values if folder and Path(folder) not in found]
    return found


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


def model_loaded(model: object) -> None:
    """Called by the WebUI whenever it has filled a model from a file."""
    host().model_loaded(model)


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
