"""LoRAs in a prompt: what AUTOMATIC1111's grammar makes of any text, and which files the names are."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from convert_files import save
from hypothesis import given
from hypothesis import strategies as st

from lib_hypermerge.errors import SpecError
from lib_hypermerge.hosts.standalone import FolderHost, PathHost
from lib_hypermerge.jobs.combine.names import in_prompt, wanted
from lib_hypermerge.jobs.combine.prompt import Mention, read
from lib_hypermerge.jobs.combine.spec import CombineSpec

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="<>:="), min_size=1, max_size=12).filter(str.strip)
NUMBERS = st.floats(-100, 100).map(lambda x: round(x, 3))
ANYTHING = st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=8)


@st.composite
def tags(draw):
    """(text, Mention): a tag in any of the ways in which it can be written."""
    name, te, unet = draw(NAMES), draw(NUMBERS), draw(NUMBERS)
    dyn = draw(st.none() | st.integers(1, 512))
    way = draw(st.sampled_from(["bare", "one", "two", "named", "mixed", "unet"]))
    given_dyn = f":dyn={dyn}" if dyn else ""
    if way == "bare":
        return f"{name}{given_dyn}", Mention(name, 1, 1, dyn)
    if way == "one":
        return f"{name}:{te}{given_dyn}", Mention(name, te, te, dyn)
    if way == "two":
        fourth = f":{dyn}" if dyn else ""
        return f"{name}:{te}:{unet}{fourth}", Mention(name, unet, te, dyn)
    if way == "named":
        parts = draw(st.permutations([f"te={te}", f"unet={unet}", *([f"dyn={dyn}"] if dyn else [])]))
        return ":".join([name, *parts]), Mention(name, unet, te, dyn)
    if way == "mixed":  # the name goes before the place
        return f"{name}:7:te={te}{given_dyn}", Mention(name, te, te, dyn)
    return f"{name}:unet={unet}{given_dyn}", Mention(name, unet, 1, dyn)


@given(st.lists(st.tuples(tags(), st.sampled_from(["lora", "lyco"]), ANYTHING), min_size=1, max_size=6,
                unique_by=lambda item: item[0][1].name))  # fmt: skip
def test_every_way_of_writing_weights(items):
    prompt = "".join(f"{text}<{kind}:{tag}>" for (tag, _), kind, text in items)
    first = items[0][1]
    order = sorted(items, key=lambda item: item[1] != first)  # one kind after the other, as the host takes them
    assert read(prompt).loras == tuple(mention for (_, mention), _, _ in order)


@given(st.text(max_size=60))
def test_no_text_breaks_the_reader(text):
    try:
        found = read(text)
    except SpecError:
        return
    for lora in found.loras:
        assert lora.name and all(math.isfinite(w) and abs(w) <= 100 for w in (lora.te, lora.unet))


@given(st.lists(st.sampled_from(["a", "0.5", "-1", "te=2", "unet=", "dyn=x", "1e9", "nan", "", "lbw=ALL", "x=1"])))
def test_no_tag_breaks_the_reader(items):
    try:
        found = read(f"<lora:{':'.join(items)}>")
    except SpecError as error:
        assert error.what and error.hint
        return
    assert len(found.loras) == 1


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        *((text, "no LoRA") for text in ("", "a cat", "<lora:>", "<LORA:a:1>", "<hypernet:a>")),
        *((text, "has no name") for text in ("<lora: :1>", "<lora:te=1>")),
        *((f"<lora:a:{text}>", "no weight") for text in ("", "x", "inf", "nan", "1:two", "te=", "1:1:8:unet=-")),
        *((f"<lora:a:{text}>", "beyond ±100") for text in ("101", "1:-1e5", "unet=500")),
        *((f"<lora:a:{text}>", "whole number") for text in ("1:1:0", "dyn=4.5", "dyn=-1", "1:1:x")),
        ("<lora:a:1><lora:b:1><lora:a:1>", "2 times"), ("<lora:a:1><lyco:a:2>", "2 times"),
        *((text, "<lora:a:0.5 is not closed")
          for text in ("<lora:a:0.5", "<lora:b:1> <lora:a:0.5 ", "<lora:a:0.5<lora:b:1>")),
        ("<lora:b:1> <lyco:a, <hypernet:h:1>", "<lyco:a, is not closed"), ("<lora:b:1><lora:", "<lora: is not closed"),
        ("<lora:a:1:start=5>", "while a picture is made"),
    ],
)  # fmt: skip
def test_what_is_refused(prompt, said):
    with pytest.raises(SpecError) as error:
        read(prompt)
    assert said in str(error.value) and error.value.hint


def test_block_weights_and_what_is_passed_over():
    found = read("<lora:a:0.5:lbw=MIDD> <lora:b:1:1:4:9:x=y> <hypernet:h:1> <lora:c:-2>")
    assert [lora.blocks for lora in found.loras] == ["MIDD", "", ""]
    assert found.loras[2].unet == found.loras[2].te == -2
    assert len(found.notes) == 3 and "hypernet" in found.notes[0]


# --- which files are meant --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two files call themselves shared, and two are called same."""
    called = {
        "one": "", "sub/two.v1": "second", "sub/one-more": "shared", "three": "shared", "deep/same": "x", "same": "y",
    }  # fmt: skip
    for name, alias in called.items():
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save(path, {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(1, 4)},
             {"ss_output_name": alias} if alias else {})  # fmt: skip
    (tmp_path / "other.pt").write_bytes(b"never opened")
    (tmp_path / "broken.safetensors").write_bytes(b"no safetensors file")
    return tmp_path


def hosts(folder: Path):
    """The command line with --lora-dir, and a page."""
    return (PathHost(), str(folder)), (FolderHost(folder, folder), None)


@pytest.mark.parametrize("which", [0, 1])
def test_names_are_files_or_aliases(folder, which):
    host, lora_dir = hosts(folder)[which]
    for name, path in (
        ("one", "one.safetensors"), ("two.v1", "sub/two.v1.safetensors"), ("second", "sub/two.v1.safetensors"),
        ("other", "other.pt"), ("one-more", "sub/one-more.safetensors"), ("broken", "broken.safetensors"),
    ):  # fmt: skip
        (found,) = in_prompt(f"<lora:{name}:0.5>", host, lora_dir)[1]
        assert found[1] == folder / path
        assert host.resolve_lora(found[0]) == folder / path


@pytest.mark.parametrize("which", [0, 1])
def test_names_that_several_have_or_none(folder, which):
    host, lora_dir = hosts(folder)[which]
    for name, files in (("shared", ("one-more", "three")), ("same", ("deep", "same"))):
        with pytest.raises(SpecError) as error:
            in_prompt(f"<lora:{name}:1>", host, lora_dir)
        assert "2 LoRAs are called" in error.value.what and all(file in error.value.why for file in files)
    with pytest.raises(SpecError) as error:
        in_prompt("<lora:onne:1><lora:one:1><lora:nothing like it:1>", host, lora_dir)
    assert "'onne', 'nothing like it'" in error.value.what and "one" in error.value.hint


def test_a_name_of_the_hosts_list_is_the_hosts_choice(folder):
    """A1111 lists one of two files of a name; its prompt means that one."""

    class Listing(FolderHost):
        def loras(self):
            return ["same"]

        def find_loras(self, pattern):
            return {"same": folder / "deep/same.safetensors", "same.safetensors": folder / "same.safetensors"}

    (found,) = in_prompt("<lora:same:1>", Listing(folder, folder))[1]
    assert found == ("same", folder / "deep/same.safetensors")


def test_a_hosts_own_aliases_come_first(folder):
    """A WebUI has read all of them already."""

    class Knowing(FolderHost):
        def resolve_lora(self, name):
            return folder / "three.safetensors" if name == "shared" else super().resolve_lora(name)

    (found,) = in_prompt("<lora:shared:1>", Knowing(folder, folder))[1]
    assert found == ("three.safetensors", folder / "three.safetensors")


def test_an_alias_that_changes_is_read_again(folder):
    path, layer = folder / "one.safetensors", "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"
    for alias in ("first name", "the second name"):
        save(path, {layer: torch.ones(1, 4)}, {"ss_output_name": alias})
        (found,) = in_prompt(f"<lora:{alias}:1>", FolderHost(folder, folder))[1]
        assert found[1] == path
    with pytest.raises(SpecError):
        in_prompt("<lora:first name:1>", FolderHost(folder, folder))


def test_rows_and_prompt_together(folder):
    spec = CombineSpec.from_json({
        "loras": [{"lora": str(folder / "three.safetensors"), "weight": 2}], "prompt": "<lora:one:0.1:-0.5:8> <x:y>",
        "lora_dir": str(folder), "out": "o",
    })  # fmt: skip
    found, notes = wanted(spec, PathHost())
    assert [(w.path.stem, w.item.weight, w.item.te_weight, w.dyn) for w in found] == [
        ("three", 2, None, None), ("one", -0.5, 0.1, 8),
    ]  # fmt: skip
    assert len(notes) == 1


def test_an_empty_list_and_a_folder_that_is_not_there(tmp_path):
    def asked(lora_dir: str | None) -> CombineSpec:
        return CombineSpec.from_json({"prompt": "<lora:a:1>", "lora_dir": lora_dir, "out": "o"})

    for host, lora_dir in ((FolderHost(tmp_path, tmp_path), None), (PathHost(), str(tmp_path))):
        with pytest.raises(SpecError, match="no LoRA called 'a'"):
            wanted(asked(lora_dir), host)
    with pytest.raises(SpecError, match="There is no folder .*none"):
        wanted(asked(str(tmp_path / "none")), PathHost())


@pytest.mark.parametrize("lora_dir", [".", "none"])
def test_a_page_has_its_list_of_loras(folder, tmp_path, lora_dir):
    """An empty one too: what folders there are it does not tell."""
    (tmp_path / "empty").mkdir()
    spec = CombineSpec.from_json({"prompt": "<lora:one:1>", "lora_dir": lora_dir, "out": "o"})
    for loras in (folder, tmp_path / "empty"):
        with pytest.raises(SpecError, match="on the command line alone"):
            wanted(spec, FolderHost(loras, loras))


def test_one_file_by_two_names(folder):
    """A file name and an alias."""
    spec = CombineSpec.from_json({"prompt": "<lora:two.v1:0.5><lora:second:2>", "out": "o"})
    with pytest.raises(SpecError, match=r"two.v1.safetensors is named 2 times. Its weights are 0.5 and 2"):
        wanted(spec, FolderHost(folder, folder))


def test_suggested_names():
    suggest = CombineSpec.suggest_name
    assert suggest({}) == ""
    assert suggest({"loras": [{"lora": "x/a.safetensors"}]}) == "a-weighted"
    assert suggest({"loras": [{"lora": "a.safetensors"}], "prompt": "<lora:b:1>"}) == "a-b"
    assert suggest({"prompt": "".join(f"<lora:{n}:1>" for n in "abcde")}) == "a-b-3-more"
