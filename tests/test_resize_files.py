"""Many LoRAs at once, dialects, refusals, and that a job which ends early leaves nothing."""

import json

import pytest
import torch
from convert_files import convert, load, lora, same_bits, save, texts
from killing import die, killed
from models import base_weights, save_checkpoint
from resize_files import deltas, distance, refusal, resize, run, sample

from lib_hypermerge.errors import Cancelled, OutputError
from lib_hypermerge.hosts.standalone import FolderHost, PathHost
from lib_hypermerge.jobs.host import Context
from lib_hypermerge.jobs.resize import job
from lib_hypermerge.jobs.resize.spec import ResizeSpec
from lib_hypermerge.jobs.resize.work import ResizeWork
from lib_hypermerge.jobs.runner import execute
from lib_hypermerge.jobs.verbs import VERBS


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in" / "people").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    save(tmp_path / "in" / "a.safetensors", lora("sd15", rank=lambda i: 8, seed=1))
    save(tmp_path / "in" / "people" / "b.safetensors", lora("sd15", rank=lambda i: 6, seed=2))
    save(tmp_path / "in" / "people" / "c.safetensors", lora("sdxl", rank=lambda i: 5, seed=3))
    return tmp_path


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("how", ["folder", "pattern", "list"])
def test_many_files_with_one_setting_give_a_row_each(folder, how):
    given = {
        "folder": [folder / "in"], "pattern": [f"{folder}/in/**/*.safetensors"],
        "list": [folder / "in" / "a.safetensors", *sorted((folder / "in" / "people").iterdir())],
    }[how]  # fmt: skip
    answer = resize("--lora", *given, "--out", f"{folder}/out/{{name}}-r{{rank}}", "--rank", "4,2")
    assert names(folder / "out") == [f"{n}-r{r}.safetensors" for n in "abc" for r in (2, 4)]
    assert [row["architecture"] for row in answer["files"]] == ["Stable Diffusion 1"] * 2 + ["Stable Diffusion XL"]
    assert [row["rank"] for row in answer["files"]] == [8, 6, 5]
    resize("--lora", folder / "in" / "a.safetensors", "--out", folder / "alone", "--rank", 4)
    assert same_bits(load(folder / "alone.safetensors"), load(folder / "out" / "a-r4.safetensors"))


def test_what_is_wrong_with_one_file_stands_in_its_row(folder):
    (folder / "in" / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    save_checkpoint(folder / "in" / "model.safetensors", base_weights("sd15", 32))
    code, answer = run("--lora", folder / "in", "--out", f"{folder}/out/{{name}}", "--rank", 7)
    assert code == 1
    assert [row["name"].rsplit("/", 1)[1] for row in answer["files"]] == ["a.safetensors"]
    failed = {row["name"].rsplit("/", 1)[1]: row["error"] for row in answer["failed"]}
    assert failed.keys() == {"b.safetensors", "c.safetensors", "broken.safetensors", "model.safetensors"}
    assert "above that of b.safetensors, 6" in failed["b.safetensors"]["what"]
    assert "checkpoint, not a LoRA" in failed["model.safetensors"]["what"]
    assert names(folder / "out") == ["a.safetensors"]


def test_numbers_that_are_none_end_one_file_of_a_batch(folder):
    bad = lora("sd15", rank=lambda i: 8, seed=4)
    bad[next(iter(bad))][0] = torch.nan
    save(folder / "in" / "nan.safetensors", bad)
    code, answer = run("--lora", folder / "in" / "nan.safetensors", folder / "in" / "a.safetensors",
                       "--out", f"{folder}/out/{{name}}", "--rank", 4)  # fmt: skip
    assert code == 1 and names(folder / "out") == ["a.safetensors"]
    assert "NaN" in answer["failed"][0]["error"]["what"]
    code, answer = run("--lora", folder / "in" / "nan.safetensors", "--out", folder / "out" / "x", "--rank", 4)
    assert code == 1 and "NaN" in answer["error"]["what"] and names(folder / "out") == ["a.safetensors"]


@pytest.mark.parametrize("to", ["diffusers", "peft"])
@pytest.mark.parametrize("family", ["sd15", "flux_dev"])
def test_a_dialect_stays_or_becomes_another(tmp_path, family, to):
    source = save(tmp_path / "a.safetensors", lora(family, rank=lambda i: 6, dtype=torch.float32))
    convert(source, tmp_path / f"other-{to}", "--to", to)
    other = next(p for p in tmp_path.iterdir() if p.name.startswith("other"))
    resize("--lora", other, "--out", tmp_path / "b", "--rank", 3)
    made = tmp_path / ("b" if to == "peft" else "b.safetensors")
    assert made.is_dir() == (to == "peft")
    convert(made, tmp_path / "back", "--to", "kohya")
    resize("--lora", other, "--out", tmp_path / "k", "--rank", 3, "--to", "kohya")
    kohya, back = deltas(tmp_path / "k.safetensors"), deltas(tmp_path / "back.safetensors")
    assert {len(t) for k, t in load(tmp_path / "k.safetensors").items() if k.endswith("lora_down.weight")} == {3}
    if family == "sd15":
        assert kohya.keys() == back.keys() and distance(back, kohya) < 1e-5
    else:  # diffusers keeps q, k and v apart, so that each has a rank of its own there
        resize("--lora", source, "--out", tmp_path / "direct", "--rank", 3)
        assert distance(kohya, deltas(tmp_path / "direct.safetensors")) < 1e-4


def test_recipe_and_texts_tell_where_it_comes_from(tmp_path):
    source = save(tmp_path / "a.safetensors", lora("sd15", rank=lambda i: 8))
    resize("--lora", source, "--out", tmp_path / "b", "--rank", 2)
    told = texts(tmp_path / "b.safetensors")
    recipe = json.loads(told["hypermerge"])
    assert recipe["job"] == "resize" and recipe["parents"]["lora"]["name"] == "a.safetensors"
    assert recipe["parameters"]["rank"] == [2] and str(tmp_path) not in told["hypermerge"]
    assert told["ss_tag_frequency"] == '{"a": {"b": 1}}' and told["ss_network_dim"] == "2"
    assert told["sshs_model_hash"] != "0" * 64


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--rank", "16"], "above that of a.safetensors, 8"),
        (["--rank", "16,4"], "above that of a.safetensors, 8"),
        (["--rank", "0"], "between 1 and 4096"),
        (["--rank", "4,4"], "twice"),
        (["--rank", "4,2", "--rank-rule", "energy", "--rank-target", "0.5"], "chooses them itself"),
        (["--rank", "x"], "invalid whole number"),
        (["--rank-rule", "energy"], "needs a target"),
        (["--rank-rule", "energy", "--rank-target", "1.5"], "above 0 and at most 1"),
        (["--rank-target", "0.5"], "rule is 'fixed'"),
        (["--rank-rule", "size", "--rank-target", "0.001"], "too small"),
        (["--rank-rule", "size", "--rank-target", "1", "--to", "diffusers"], "kohya's dialect"),
        (["--method", "random", "--rank-rule", "energy", "--rank-target", "0.5"], "singular values"),
        (["--fill", "--rank-rule", "energy", "--rank-target", "0.5"], "does not ask for one"),
        (["--min-rank", "5", "--max-rank", "3"], "below the least"),
        (["--method", "best"], "invalid choice"),
    ],
)
def test_refusals_say_what_is_wrong_and_leave_nothing(folder, more, said):
    error = refusal("--lora", folder / "in" / "a.safetensors", "--out", folder / "out" / "x", *more)
    told = " ".join((error["what"], error["why"], error["hint"]))
    assert said in told or "must be one of" in told
    assert names(folder / "out") == []


def test_refusals_about_names(folder):
    a, b = folder / "in" / "a.safetensors", folder / "in" / "people" / "b.safetensors"
    assert "No LoRA was named" in refusal("--out", folder / "out" / "x")["what"]
    assert "cannot all become" in refusal("--lora", a, b, "--out", folder / "out" / "x", "--rank", 2)["what"]
    assert "No LoRA matches" in refusal("--lora", f"{folder}/none*", "--out", f"{folder}/out/{{name}}")["what"]
    assert "stands for nothing" in refusal("--lora", a, "--out", f"{folder}/out/{{nam}}", "--rank", 2)["what"]
    assert "names a folder" in refusal("--lora", a, "--out", f"{folder}/out/", "--rank", 2)["what"]
    assert "No LoRA matches" in refusal("--pattern", f"{folder}/none/*", "--out", f"{folder}/out/{{name}}")["what"]
    assert "replace the file" in refusal("--lora", a, "--out", a, "--rank", 2, "--overwrite")["what"]
    resize("--lora", a, "--out", folder / "out" / "x", "--rank", 2)
    before = (folder / "out" / "x.safetensors").read_bytes()
    assert "exists already" in refusal("--lora", a, "--out", folder / "out" / "x", "--rank", 3)["what"]
    assert (folder / "out" / "x.safetensors").read_bytes() == before
    resize("--lora", a, "--out", folder / "out" / "x", "--rank", 3, "--overwrite")
    assert texts(folder / "out" / "x.safetensors")["ss_network_dim"] == "3"


@pytest.mark.parametrize("family", ["dora_input", "ia3", "oft"])
def test_changes_that_depend_on_weights_need_the_checkpoint(tmp_path, family):
    source = save(tmp_path / "a.safetensors", sample(family)[0])
    error = refusal("--lora", source, "--out", tmp_path / "b", "--rank", 1)
    assert "checkpoint" in error["what"] + error["hint"]


def test_a_dora_that_is_small_enough_needs_no_checkpoint(tmp_path):
    tensors, _ = sample("dora_input")
    source = save(tmp_path / "a.safetensors", tensors)
    resize("--lora", source, "--out", tmp_path / "b", "--rank", 5, "--fill")
    made = load(tmp_path / "b.safetensors")
    assert {len(t) for k, t in made.items() if k.endswith("lora_down.weight")} == {5}
    scales = {k: t for k, t in tensors.items() if k.endswith("dora_scale")}
    assert same_bits({k: made[k] for k in scales}, scales)


def test_modules_that_no_layer_answers_to_are_resized_too(tmp_path):
    tensors = lora("sd15", rank=lambda i: 6)
    tensors |= {"lora_unet_new.lora_up.weight": torch.randn(8, 6).half(),
                "lora_unet_new.lora_down.weight": torch.randn(6, 9).half(),
                "lora_unet_new.alpha": torch.tensor(3.0), "lora_unet_odd.diff": torch.randn(4, 4)}  # fmt: skip
    source = save(tmp_path / "a.safetensors", tensors)
    answer = resize("--lora", source, "--out", tmp_path / "b", "--rank", 2)
    made = load(tmp_path / "b.safetensors")
    assert len(made["lora_unet_new.lora_down.weight"]) == 2
    assert same_bits({"x": made["lora_unet_odd.diff"]}, {"x": tensors["lora_unet_odd.diff"]})
    assert any("no layer" in warning for warning in answer["warnings"])


class Stopping(Context):
    """Interrupted after some steps."""

    def __init__(self, steps: int):
        super().__init__()
        self.steps = steps

    def check(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise Cancelled


@pytest.mark.parametrize("steps", [0, 3, 60, 300, 700])
def test_a_cancelled_batch_leaves_no_file(folder, steps):
    before = names(folder / "out")
    spec = ResizeSpec.from_json({"loras": [str(folder / "in")], "out": f"{folder}/out/{{name}}-{{rank}}",
                                 "rank": [4, 2]})  # fmt: skip
    with pytest.raises(Cancelled):
        execute(VERBS["resize"], spec, PathHost(1), Stopping(steps))
    assert names(folder / "out") == before


def test_a_batch_that_cannot_be_written_leaves_no_file(folder, monkeypatch):
    def full(*_):
        raise OutputError("The disk is full.")

    (folder / "out" / "a-2.safetensors").write_bytes(b"mine")
    monkeypatch.setattr(job, "publish_together", full)
    spec = ResizeSpec.from_json({"loras": [str(folder / "in")], "out": f"{folder}/out/{{name}}-2", "rank": [2],
                                 "overwrite": True})  # fmt: skip
    with pytest.raises(OutputError):
        execute(VERBS["resize"], spec, PathHost(1), Context())
    assert names(folder / "out") == ["a-2.safetensors"]
    assert (folder / "out" / "a-2.safetensors").read_bytes() == b"mine"


def test_a_page_takes_patterns_over_its_own_list(folder):
    host = FolderHost(folder, folder / "in", 1)
    spec = ResizeSpec.from_json({"pattern": "people/*", "out": "{name}-small", "rank": [2]})
    report = execute(VERBS["resize"], spec, host, Context())
    assert [output.path.rsplit("/", 1)[1] for output in report.outputs] == [
        "b-small.safetensors", "c-small.safetensors"]  # fmt: skip
    assert host.find_loras("people").keys() == {"people/b.safetensors", "people/c.safetensors"}


@pytest.mark.parametrize("steps", [2, 5])
def test_a_killed_batch_leaves_no_file(folder, monkeypatch, steps):
    calls = []
    real = ResizeWork.resize

    def dying(self, unit):
        calls.append(unit)
        if len(calls) > 400 * steps // 2:
            die()
        return real(self, unit)

    monkeypatch.setattr(ResizeWork, "resize", dying)
    (folder / "out" / "a-2.safetensors").write_bytes(b"mine")
    spec = ResizeSpec.from_json({"loras": [str(folder / "in")], "out": f"{folder}/out/{{name}}-2", "rank": [2],
                                 "overwrite": True})  # fmt: skip
    assert killed(lambda: execute(VERBS["resize"], spec, PathHost(1), Context()))
    assert names(folder / "out") == ["a-2.safetensors"]
    assert (folder / "out" / "a-2.safetensors").read_bytes() == b"mine"


def test_names_that_cannot_be_are_rows_of_their_own_and_hidden_files_are_passed_over(folder):
    inside = folder / "in"
    (inside / "._a.safetensors").write_bytes(b"what macOS leaves")
    save(inside / "we:ird.safetensors", lora("sd15", rank=lambda i: 8, seed=5))
    (inside / "more").mkdir()
    save(inside / "more" / "a.safetensors", lora("sd15", rank=lambda i: 8, seed=6))
    code, answer = run("--lora", inside, "--out", f"{folder}/out/{{name}}", "--rank", 4)
    assert code == 1 and names(folder / "out") == ["a.safetensors", "b.safetensors", "c.safetensors"]
    said = {row["name"].rsplit("/", 1)[1]: row["error"]["what"] for row in answer["failed"]}
    assert "cannot be a file name" in said["we:ird.safetensors"]
    assert "would both become" in said["a.safetensors"]


def test_a_size_beyond_what_there_is_asks_for_no_disk(tmp_path):
    source = save(tmp_path / "a.safetensors", lora("sd15", rank=lambda i: 4))
    answer = resize("--lora", source, "--out", tmp_path / "b", "--rank-rule", "size", "--rank-target", "1e9")
    assert any("below the target" in warning for warning in answer["warnings"])
    assert (tmp_path / "b.safetensors").stat().st_size < 1.1 * source.stat().st_size


def test_headers_are_as_large_as_they_need_to_be(tmp_path):
    source = save(tmp_path / "a.safetensors", lora("sd15", rank=lambda i: 4))
    answer = resize("--lora", source, "--out", tmp_path / "b", "--rank", 2)
    written = tmp_path / "b.safetensors"
    room = int.from_bytes(written.read_bytes()[:8], "little")
    used = len(written.read_bytes()[8 : 8 + room].rstrip())
    assert room - used < 0.15 * room
    preview = resize("--lora", source, "--out", tmp_path / "c", "--rank", 2, "--dry-run")
    assert preview["files"][0]["results"][0]["bytes"] == pytest.approx(answer["outputs"][0]["bytes"], rel=1e-3)
