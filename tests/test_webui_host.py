"""The WebUI adapter against stand-ins for the host's modules that behave as the real ones do."""

from __future__ import annotations

import sys
import threading
import time
import types
from pathlib import Path

import pytest
from models import base_weights, rank_change, save_pair, tuned_weights

from lib_hypermerge.errors import Cancelled, SpecError
from lib_hypermerge.hosts.webui import WebUIHost
from lib_hypermerge.jobs.combine.names import in_prompt
from lib_hypermerge.jobs.runner import Runner
from lib_hypermerge.ui.prompt_rows import rows_of


class State:
    """What shared.state does that matters: begin() leaves job_count at −1 and clears flags."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.interrupted = self.skipped = True

    def begin(self, job: str) -> None:
        self.log.append(f"begin {job}")
        self.job, self.job_count, self.job_no, self.sampling_step, self.sampling_steps = job, -1, 0, 0, 0
        self.interrupted = self.skipped = False
        self.textinfo = None

    def end(self) -> None:
        self.log.append("end")

    def fraction(self) -> float:
        """As /internal/progress computes it."""
        return self.job_no / self.job_count + self.sampling_step / self.sampling_steps / self.job_count


class Info:
    def __init__(self, path: Path, digest: str = "") -> None:
        self.filename, self.name = str(path), path.name
        self.title = f"{path.name} [{digest}]" if digest else path.name


@pytest.fixture
def webui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    state, lock, finished = State(), threading.Lock(), []
    infos = [Info(tmp_path / "plain.safetensors"), Info(tmp_path / "hashed.safetensors", "0123456789")]
    parts = {
        "shared": types.SimpleNamespace(
            state=state,
            opts=types.SimpleNamespace(),
            cmd_opts=types.SimpleNamespace(lora_dir=str(tmp_path / "Lora"), api_auth=None),
        ),
        "call_queue": types.SimpleNamespace(queue_lock=lock),
        "progress": types.SimpleNamespace(
            add_task_to_queue=lambda job: state.log.append(f"queued {job}"),
            start_task=lambda job: state.log.append(f"started {job}"),
            finish_task=finished.append,
        ),
        "sd_models": types.SimpleNamespace(
            checkpoints_list={info.title: info for info in infos},
            checkpoint_aliases={info.name: info for info in infos[:1]},
            checkpoint_tiles=lambda: [info.title for info in infos],
            list_models=lambda: state.log.append("listed"),
            model_path=str(tmp_path / "Stable-diffusion"),
            model_data=types.SimpleNamespace(sd_model=None),
        ),
        "devices": types.SimpleNamespace(device="privateuseone:0"),
        "initialize_util": types.SimpleNamespace(get_gradio_auth_creds=lambda: iter([("page", "login")])),
    }
    package = types.ModuleType("modules")
    for name, part in parts.items():
        setattr(package, name, part)
        monkeypatch.setitem(sys.modules, f"modules.{name}", part)
    monkeypatch.setitem(sys.modules, "modules", package)
    return types.SimpleNamespace(state=state, lock=lock, finished=finished, folder=tmp_path, infos=infos, **parts)


def test_a_job_takes_the_turn_shows_progress_and_always_ends(webui) -> None:
    host = WebUIHost()
    with host.running("task(1)", lambda: None) as context:
        assert webui.lock.locked()
        context.progress(0.25, "unet IN01")
        assert webui.state.fraction() == pytest.approx(0.25)
        assert webui.state.textinfo == "unet IN01"
    assert not webui.lock.locked()
    assert webui.state.log == ["queued task(1)", "begin task(1)", "started task(1)", "end"]
    assert webui.finished == ["task(1)"]


@pytest.mark.parametrize("flag", ["interrupted", "skipped"])
def test_the_hosts_own_interrupt_stops_a_job(webui, flag: str) -> None:
    with pytest.raises(Cancelled), WebUIHost().running("task(1)", lambda: None) as context:
        context.check()
        setattr(webui.state, flag, True)
        context.check()
    assert not webui.lock.locked()
    assert (webui.state.log[-1], webui.finished) == ("end", ["task(1)"])


def test_titles_are_found_before_and_after_hashing(webui) -> None:
    host = WebUIHost()
    plain, hashed = (Path(info.filename) for info in webui.infos)
    assert host.checkpoints() == ["plain.safetensors", "hashed.safetensors [0123456789]"]
    assert host.resolve_checkpoint("hashed.safetensors [0123456789]") == hashed
    assert host.resolve_checkpoint("hashed.safetensors") == hashed
    assert host.resolve_checkpoint("plain.safetensors [0123456789]") == plain
    for wrong in ("hash", "plain", "", "../plain.safetensors", str(plain)):
        with pytest.raises(SpecError, match="no checkpoint"):
            host.resolve_checkpoint(wrong)


def test_loras_go_to_the_hosts_folder(webui) -> None:
    assert WebUIHost().lora_output("new") == webui.folder / "Lora" / "new.safetensors"
    assert (webui.folder / "Lora").is_dir()
    with pytest.raises(SpecError, match="file name"):
        WebUIHost().lora_output("../new")


def test_settings_are_honoured_and_strange_devices_fall_back(webui) -> None:
    host = WebUIHost()
    assert (host.device(), host.threads()) == ("cpu", 0)
    webui.devices.device = "cuda:1"
    assert host.device() == "cuda:1"
    webui.shared.opts.hypermerge_device, webui.shared.opts.hypermerge_threads = "cpu", 3
    assert (host.device(), host.threads()) == ("cpu", 3)


def test_credentials_are_those_of_the_api_or_else_of_the_page(webui) -> None:
    host = WebUIHost()
    assert host.credentials() == {"page": "login"}
    webui.shared.cmd_opts.api_auth = "ann:one,bob:two"
    assert host.credentials() == {"ann": "one", "bob": "two"}


def test_refresh_tells_the_lora_extension_if_it_is_there(webui, monkeypatch: pytest.MonkeyPatch) -> None:
    WebUIHost().refresh()  # switched off: nothing to tell but the list of checkpoints
    assert webui.state.log == ["listed"]
    calls = []
    monkeypatch.setitem(sys.modules, "networks", types.SimpleNamespace(list_available_networks=lambda: calls.append(1)))
    WebUIHost().refresh()
    assert calls == [1]


@pytest.fixture
def networks(webui, monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """The Lora extension's lists: a file with an alias of its own, and two that share one."""

    def entry(name: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(filename=str(webui.folder / "Lora" / f"{name}.safetensors"))

    files = {name: entry(name) for name in ("zeta", "Alpha", "beta")}
    aliases = {**files, "the zeta": files["zeta"], "twin": files["beta"]}
    module = types.SimpleNamespace(
        available_networks=files, available_network_aliases=aliases, forbidden_network_aliases={"twin": 1, "none": 1}
    )
    monkeypatch.setitem(sys.modules, "networks", module)
    return module


def test_loras_are_those_of_the_prompt_and_peft_folders(webui, networks) -> None:
    host, folder = WebUIHost(), webui.folder / "Lora"
    (folder / "peft" / "deep").mkdir(parents=True)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "peft" / "deep" / file).touch()
    (folder / "unlisted.safetensors").touch()
    assert host.loras() == ["Alpha", "beta", "zeta", "peft/deep"]
    assert host.resolve_lora("zeta") == host.resolve_lora("the zeta") == folder / "zeta.safetensors"
    assert host.resolve_lora("peft/deep") == folder / "peft" / "deep"
    for wrong in ("twin", "unlisted", "", "../zeta", str(folder / "zeta.safetensors")):
        with pytest.raises(SpecError, match="no LoRA"):
            host.resolve_lora(wrong)


def test_a_prompts_names_are_the_lists_or_aliases(webui, networks) -> None:
    host, folder = WebUIHost(), webui.folder / "Lora"
    folder.mkdir(parents=True)
    for name in ("zeta", "Alpha", "beta", "fresh"):
        (folder / f"{name}.safetensors").touch()
    _, found = in_prompt("<lora:the zeta:0.5><lora:Alpha:1><lora:beta:1>", host)
    assert found == [(name, folder / f"{name}.safetensors") for name in ("zeta", "Alpha", "beta")]
    with pytest.raises(SpecError, match="no LoRA called 'twin'"):  # two have it, and the host takes neither
        in_prompt("<lora:twin:1>", host)

    def listing() -> None:
        networks.available_networks["fresh"] = types.SimpleNamespace(filename=str(folder / "fresh.safetensors"))

    networks.list_available_networks = listing
    values, _ = rows_of("<lora:fresh:0.25>", host)
    assert values[0]["value"] == "fresh" and values[1] == 0.25


def test_without_the_lora_extension_its_folders_are_listed(webui) -> None:
    host, options = WebUIHost(), webui.shared.cmd_opts
    second = webui.folder / "more"
    for file in (webui.folder / "Lora" / "a" / "x.safetensors", second / "y.pt", second / "note.txt"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    options.lora_dirs = [str(webui.folder / "Lora"), str(second)]
    assert sorted(host.loras()) == ["a/x.safetensors", "y.pt"]
    assert host.resolve_lora("a/x.safetensors") == webui.folder / "Lora" / "a" / "x.safetensors"
    assert host.resolve_lora("y.pt") == second / "y.pt"


def test_checkpoints_go_where_the_user_keeps_them(webui) -> None:
    host, options = WebUIHost(), webui.shared.cmd_opts
    assert host.checkpoint_output("new") == webui.folder / "Stable-diffusion" / "new.safetensors"
    assert (webui.folder / "Stable-diffusion").is_dir()
    options.ckpt_dirs = [str(webui.folder / "first"), str(webui.folder / "second")]
    assert host.checkpoint_output("new") == webui.folder / "first" / "new.safetensors"
    options.ckpt_dir = str(webui.folder / "only")
    assert host.checkpoint_output("new.safetensors") == webui.folder / "only" / "new.safetensors"
    with pytest.raises(SpecError, match="file name"):
        host.checkpoint_output("../new")


def test_the_loaded_checkpoint_is_asked_for_without_loading_one(webui) -> None:
    host, data = WebUIHost(), webui.sd_models.model_data
    assert not hasattr(webui.shared, "sd_model")  # touching it would load a model
    assert host.loaded_checkpoint() is None
    data.sd_model = object()  # Forge has such a placeholder until something is generated
    assert host.loaded_checkpoint() is None
    data.sd_model = types.SimpleNamespace(sd_checkpoint_info=webui.infos[0])
    assert host.loaded_checkpoint() == webui.folder / "plain.safetensors"
    del webui.sd_models.model_data
    assert host.loaded_checkpoint() is None


def test_a_login_that_cannot_be_read_lets_nobody_in(webui, tmp_path: Path) -> None:
    options, host = webui.shared.cmd_opts, WebUIHost()
    options.api_auth = "just-a-word"
    with pytest.raises(SpecError, match="could not be read"):
        host.credentials()  # the page's login is not what was asked for
    options.api_auth = None

    def unreadable():
        raise OSError("no such file")

    webui.initialize_util.get_gradio_auth_creds = unreadable
    assert host.credentials() is None
    options.gradio_auth = "nonsense"
    with pytest.raises(SpecError, match="could not be read"):
        host.credentials()
    options.gradio_auth, options.gradio_auth_path = None, str(tmp_path / "missing.txt")
    with pytest.raises(SpecError, match="could not be read"):
        host.credentials()


def test_logins_are_read_where_the_fork_has_no_function_for_it(webui, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules["modules"], "initialize_util")
    monkeypatch.setitem(sys.modules, "modules.initialize_util", None)
    options, host = webui.shared.cmd_opts, WebUIHost()
    assert host.credentials() is None
    options.gradio_auth = "ann:with:colon, bob:two"
    assert host.credentials() == {"ann": "with:colon", "bob": "two"}
    file = webui.folder / "logins.txt"
    file.write_text("cy:three,dan:four\n\neve:five\n", encoding="utf-8")
    options.gradio_auth_path = str(file)
    assert host.credentials() == {"ann": "with:colon", "bob": "two", "cy": "three", "dan": "four", "eve": "five"}
    options.api_auth = "api:se:cret"
    assert host.credentials() == {"api": "se:cret"}


def test_what_a_fork_lacks_is_done_without(webui, monkeypatch: pytest.MonkeyPatch) -> None:
    host, options = WebUIHost(), webui.shared.cmd_opts
    del webui.sd_models.checkpoint_tiles
    assert host.checkpoints() == [info.title for info in webui.infos]
    del webui.devices.device
    assert host.device() == "auto"
    monkeypatch.delattr(sys.modules["modules"], "devices")
    monkeypatch.setitem(sys.modules, "modules.devices", None)
    assert host.device() == "auto"
    del options.lora_dir
    options.lora_dirs = [str(webui.folder / "first"), str(webui.folder / "second")]
    assert host.lora_output("x") == webui.folder / "first" / "x.safetensors"
    del options.lora_dirs
    paths = types.SimpleNamespace(models_path=str(webui.folder / "models"))
    monkeypatch.setattr(sys.modules["modules"], "paths", paths, raising=False)
    monkeypatch.setitem(sys.modules, "modules.paths", paths)
    assert host.lora_output("x") == webui.folder / "models" / "Lora" / "x.safetensors"


def test_a_cancelled_job_that_waited_gives_the_turn_back_unrun(webui) -> None:
    class Chosen(WebUIHost):
        def resolve_checkpoint(self, name: str) -> Path:
            return Path(name)

    base = base_weights()
    pair = save_pair(webui.folder, base, tuned_weights(base, rank_change(1)))
    runner = Runner(Chosen())
    with webui.lock:
        job = runner.submit("extract", {"base": str(pair[0]), "tuned": str(pair[1]), "out": "x"}, "task(9)")
        job.cancel()
        assert job.wait(0)
        assert webui.finished == ["task(9)"], "its progress bar ends at once"
    deadline = time.monotonic() + 30
    while "end" not in webui.state.log:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with webui.lock:
        assert job.status == "cancelled"
    assert not (webui.folder / "Lora" / "x.safetensors").exists()


def test_patterns_go_by_names_and_by_folders(webui) -> None:
    host, folder = WebUIHost(), webui.folder / "Lora"
    (folder / "people").mkdir(parents=True)
    for name in ("style.safetensors", "people/ann.safetensors", "people/bob.safetensors"):
        (folder / name).write_bytes(b"")
    assert [path.name for path in host.find_loras("people/*").values()] == ["ann.safetensors", "bob.safetensors"]
    assert [path.name for path in host.find_loras("people").values()] == ["ann.safetensors", "bob.safetensors"]
    assert [path.name for path in host.find_loras("*st*").values()] == ["style.safetensors"]
    assert host.find_loras("style.safetensors") == host.find_loras("nobody") == {}
