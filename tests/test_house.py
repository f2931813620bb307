"""The house's order: who may import whom, what may stand where, and that front ends agree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lib_hypermerge.cli import build_parser
from lib_hypermerge.flags import flag_of, is_positional
from lib_hypermerge.jobs import spec as kinds
from lib_hypermerge.jobs.verbs import VERBS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lib_hypermerge"
FILES = sorted(PACKAGE.rglob("*.py"))

# what each verb's report says in words
RENDERS = {file.stem for file in PACKAGE.glob("render_*.py")}

# room → rooms it may use besides itself and errors
MAY_USE = {
    "lazy": set(),
    "algebra": {"lazy"},
    "files": set(),
    "adapters": {"algebra", "lazy"},
    "layouts": {"files"},
    "jobs": {"algebra", "adapters", "layouts", "files", "words"},
    "hosts": {"jobs", "files"},
    "words": set(),
    "render": {"jobs", "words"} | RENDERS,
    **dict.fromkeys(RENDERS, {"jobs", "words"}),
    "synthetic": {"files"},
    "flags": {"jobs"},
    "cli": {"jobs", "hosts", "render", "flags", "words"},
    "api": {"jobs"},
    "ui": {"jobs", "hosts", "render", "words", "api"} | RENDERS,
    "__main__": {"cli"},
    "__init__": set(),
    "errors": set(),
}


def imports(file: Path) -> set[str]:
    """Absolute names of all modules a file imports, wherever in it."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = list(package[: len(package) - node.level + 1]) if node.level else []
            base = ".".join([*start, *((node.module or "").split(".") if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_nothing_points_back_up(file: Path) -> None:
    own = room("lib_hypermerge." + ".".join(file.relative_to(PACKAGE).with_suffix("").parts))
    allowed = MAY_USE[own] | {own, "errors", "__init__", "__version__"}
    used = {room(name) for name in imports(file) if name.split(".")[0] == "lib_hypermerge"}
    assert used <= allowed


OWNERS = {
    "gradio": {"ui", "hosts/webui.py"},
    "modules": {"hosts/webui.py", "hosts/webui_model.py"},
    "networks": {"hosts/webui.py", "hosts/webui_model.py"},
    "safetensors": {"files"},
    "matplotlib": {"ui"},
    "fastapi": {"api.py", "ui"},
}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_outside_packages_are_known_to_few(file: Path) -> None:
    path = file.relative_to(PACKAGE).as_posix()
    for name in imports(file):
        owners = OWNERS.get(name.split(".")[0])
        assert owners is None or path in owners or path.split("/")[0] in owners, name


def test_the_algebra_knows_only_tensors() -> None:
    allowed = {"torch", "__future__", "collections", "dataclasses", "functools", "math", "lib_hypermerge"}
    for file in (PACKAGE / "algebra").glob("*.py"):
        more = {"pathlib", "platform"} if file.name == "processor.py" else set()  # it asks what the machine is
        assert {name.split(".")[0] for name in imports(file)} <= allowed | more


def test_files_stay_about_one_thing() -> None:
    long = {f.name: n for f in FILES if (n := len(f.read_text(encoding="utf-8").splitlines())) > 400}
    assert long == {}


def test_flags_and_spec_agree() -> None:
    for verb in VERBS.values():
        parser = build_parser()._subparsers._group_actions[0].choices[verb.id]  # noqa: SLF001
        actions = {action.dest: action for action in parser._actions}  # noqa: SLF001
        required = verb.spec.schema()["required"]
        for name, param in verb.spec.params().items():
            flags = [] if is_positional(param, name in required) else [flag_of(name, param)]
            if param.kind == kinds.FLAG and verb.spec.defaults()[name]:
                flags.append(flags[0].replace("--", "--no-", 1))
            assert actions[name].option_strings == flags
            assert actions[name].required == (name in required)
            assert param.label in (actions[name].help or "")
        own = {"help", "threads", "json", "quiet"} | (set() if kinds.has_preview(verb.spec) else {"dry_run"})
        blocks = {"blocks"} if any(param.kind == kinds.LORAS for param in verb.spec.params().values()) else set()
        assert actions.keys() == verb.spec.params().keys() | own | blocks


def test_every_verb_has_its_views() -> None:
    from lib_hypermerge.render import TEXTS
    from lib_hypermerge.ui.results import VIEWS

    assert VERBS.keys() <= VIEWS.keys()
    assert VERBS.keys() <= TEXTS.keys()


def test_a_mistyped_flag_is_answered_without_torch() -> None:
    code = (
        "import sys; from lib_hypermerge.cli import main; code = main(['extract', '--rank', 'x']);"
        "print(code, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["2", "False", "False"]


def test_headers_of_a_lora_are_inspected_without_torch(tmp_path) -> None:
    path = tmp_path / "lora.safetensors"
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    factors = {"lora_up.weight": torch.ones(8, 2), "lora_down.weight": torch.ones(2, 8), "alpha": torch.tensor(1.0)}
    save_file({f"{name}.{part}": tensor for part, tensor in factors.items()}, path)
    code = (
        f"import sys; from lib_hypermerge.cli import main; code = main(['inspect', {str(path)!r}, '--quiet']);"
        "print(code, 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split()[-2:] == ["0", "False"]


def test_install_installs_nothing_and_says_what_is_missing() -> None:
    source = (ROOT / "install.py").read_text(encoding="utf-8")
    assert not {"pip", "subprocess", "launch"} & {name.split(".")[0] for name in imports(ROOT / "install.py")}
    good = subprocess.run([sys.executable, "install.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (good.stdout, good.stderr) == ("", "")
    demanding = source.replace('"torch": (2, 1)', '"torch": (99, 0)').replace('"numpy"', '"no-such-package"')
    bad = subprocess.run([sys.executable, "-c", demanding], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(bad.stdout.splitlines()) == 1
    assert "torch 99.0 or newer" in bad.stdout
    assert "no-such-package" in bad.stdout


def test_install_and_pyproject_ask_for_what_is_imported() -> None:
    used = {name.split(".")[0] for file in FILES for name in imports(file)}
    needed = set(re.findall(r'"(\w+)": \(', (ROOT / "install.py").read_text(encoding="utf-8")))
    assert needed == {"torch", "numpy", "gradio", "matplotlib"} and needed <= used
    listed = re.search(r"^dependencies = \[(.*)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed is not None
    assert set(re.findall(r'"(\w+)', listed[1])) == {"torch", "numpy", "tqdm"} <= used
