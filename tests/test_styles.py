"""Styles in the table of a WebUI: added behind what is there, never in its place."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib_hypermerge.errors import FormatError, OutputError, SpecError
from lib_hypermerge.hosts import styles
from lib_hypermerge.hosts.styles import add_styles
from lib_hypermerge.hosts.webui import WebUIHost

HEADING = "\ufeffname,prompt,negative_prompt\r\n"


class Database:
    """Reads its file as the WebUIs do; older ones call it path."""

    def __init__(self, path: Path, name: str = "default_path") -> None:
        self.file, self.styles = path, {}
        setattr(self, name, path)

    def reload(self) -> None:
        self.styles.clear()
        if not self.file.is_file():
            return
        with self.file.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file, skipinitialspace=True):
                if not row["name"].startswith("#"):
                    self.styles[row["name"]] = SimpleNamespace(prompt=row.get("prompt", row.get("text")))

    def prompts(self) -> dict[str, str]:
        self.reload()
        return {name: style.prompt for name, style in self.styles.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "styles.csv"


TWO = {"family: a": "<lora:family-1:0.5>", 'family: b, "c"': "<lora:family-1:-1><lora:family-2:1>"}


@pytest.mark.parametrize(
    "before", [None, "", "\ufeff", HEADING, HEADING + "mine,a cat,\r\n", "name,prompt\nmine,a cat"]
)
@pytest.mark.parametrize("name", ["default_path", "path"])
def test_new_ones_stand_behind_the_old(path: Path, before: str | None, name: str) -> None:
    if before is not None:
        path.write_bytes(before.encode())
    database = Database(path, name)
    old = database.prompts()
    assert add_styles(database, TWO) == list(TWO)
    assert database.prompts() == {**old, **TWO}
    content = path.read_bytes()
    assert content.startswith((before or HEADING).encode())
    assert add_styles(database, TWO) == list(TWO)  # they are there already
    assert path.read_bytes() == content


def test_other_rows_comments_and_columns_stay(path: Path) -> None:
    rows = HEADING[:-2] + ',note\r\n# a comment,,,\r\nfamily: a,mine,,kept\r\nfamily: a (2),mine too,"bad, worse",\r\n'
    path.write_bytes(rows.encode())
    database = Database(path)
    assert add_styles(database, TWO) == ["family: a (3)", 'family: b, "c"']
    assert path.read_bytes().startswith(rows.encode())
    assert database.prompts()["family: a"] == "mine"
    assert add_styles(database, TWO) == ["family: a (3)", 'family: b, "c"']


def test_the_oldest_tables_call_a_prompt_text(path: Path) -> None:
    path.write_text("name,text\nmine,a cat\n")
    database = Database(path)
    add_styles(database, TWO)
    assert database.prompts() == {"mine": "a cat", **TWO}


@pytest.mark.parametrize(
    "content", [b"colour,size\nred,1\n", b"\xff\xfe\x00name", HEADING.encode() + b'open,"no end\n']
)
def test_what_is_no_table_stays_as_it_is(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    database = Database(path)
    database.reload = lambda: None if b"name,prompt" not in content else Database.reload(database)
    with pytest.raises(FormatError):
        add_styles(database, TWO)
    assert path.read_bytes() == content


def test_a_full_disk_leaves_the_table_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes((HEADING + "mine,a cat,\r\n").encode())
    before = path.read_bytes()

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(styles.os, "fsync", full)
    with pytest.raises(OutputError, match="cannot be written"):
        add_styles(Database(path), TWO)
    assert path.read_bytes() == before
    path.unlink()
    with pytest.raises(OutputError):
        add_styles(Database(path), TWO)
    assert not path.exists()
    assert list(path.parent.iterdir()) == []


def test_hosts_without_a_file_say_so(tmp_path: Path) -> None:
    for database in (None, SimpleNamespace(path=str(tmp_path / "*.csv"))):
        with pytest.raises(SpecError, match="no file for styles"):
            add_styles(database, TWO)


def test_the_webui_s_own_table_is_used(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database, shared = Database(path), SimpleNamespace()
    shared.prompt_styles = database
    monkeypatch.setitem(sys.modules, "modules", SimpleNamespace(shared=shared))
    monkeypatch.setitem(sys.modules, "modules.shared", shared)
    assert WebUIHost().add_styles(TWO) == list(TWO)
    assert database.prompts() == TWO
