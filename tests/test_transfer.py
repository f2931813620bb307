"""Transfer between bases of equal layers: what is copied, what is projected, and when which of the two is right."""

from __future__ import annotations

import json
import math
from pathlib import Path

import convert_files as files
import pytest
import torch
from models import Weights, base_weights, cast, last_json, listing, run_cli, save_checkpoint
from safetensors.torch import load_file
from transfer_models import arguments, each_matrix, noisy, transfer

SOME = files.some  # about a tenth of the layers


@pytest.fixture(scope="module")
def base() -> Weights:
    return base_weights()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base: Weights) -> Path:
    """A source, a relative of it in another number format, and a LoRA."""
    made = tmp_path_factory.mktemp("transfer")
    save_checkpoint(made / "source.safetensors", base)
    save_checkpoint(made / "relative.safetensors", cast(noisy(base, 0.1), torch.float16))
    files.save(made / "style.safetensors", files.lora("sd15", only=SOME))
    return made


@pytest.fixture
def run(folder: Path, tmp_path: Path):
    def run(*more, target: str = "relative", lora: str = "style", name: str = "new") -> tuple[dict, files.Tensors]:
        out = tmp_path / f"{name}.safetensors"
        report = transfer(folder / f"{lora}.safetensors", folder / "source.safetensors",
                          folder / f"{target}.safetensors", out, *more)  # fmt: skip
        return report, {} if "--dry-run" in more else load_file(out)

    return run


# --- copying --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [("copy",), ("lora-x", "--basis-energy", 1), ("prolora", "--basis-energy", 1), ("cross", "--basis-energy", 1)],
    ids=lambda more: more[0],
)
def test_with_full_bases_every_method_copies_to_the_bit(folder, run, more):
    report, made = run("--method", *more, "--threshold", 0)
    assert files.same_bits(made, load_file(folder / "style.safetensors"))
    assert report["actions"] == {"copied": report["modules"]}
    lora = report["loras"][0]
    assert (lora["retained"], lora["arrived"], lora["apart"], report["relative_error"]) == (1, 1, 0, None)
    assert 0.9 < report["similarity"] < 1


def test_layers_that_are_equal_in_both_bases_are_copied_by_every_method(folder, run, base, tmp_path):
    """Of a fine-tune that left the text encoder alone, say; 16 bits of the same numbers are the same numbers."""
    tuned = noisy(base, 0.1)
    tuned |= {key: weight for key, weight in base.items() if key.startswith("cond_stage_model")}
    save_checkpoint(folder / "tuned.safetensors", cast(tuned, torch.float16))
    report, made = run("--method", "lora-x", "--threshold", 0, target="tuned")
    style = load_file(folder / "style.safetensors")
    text = {key for key in style if key.startswith("lora_te_")}
    assert files.same_bits({key: made[key] for key in text}, {key: style[key] for key in text})
    assert report["layers_equal"] == report["actions"]["copied"] == len(text) / 3
    assert report["components"]["te"]["similarity"] == 1
    assert report["loras"][0]["components"]["te"]["apart"] == 0
    assert report["loras"][0]["components"]["unet"]["apart"] > 0.3


def test_least_similarity_leaves_layers_out_and_counts_them(run):
    report, made = run("--threshold", 0.95)
    below = {layer["layer"] for layer in report["layers"] if layer["similarity"] < 0.95}
    assert 0 < len(below) < len(report["layers"])
    assert report["skipped_because"] == {"below the least similarity": len(below)} and report["skipped"] == len(below)
    assert report["modules"] == len(files.deltas(made)) == len(report["layers"]) - len(below)
    lora = report["loras"][0]
    assert lora["arrived"] < lora["retained"]
    forced, everything = run("--threshold", 0.95, "--force", name="forced")
    assert forced["skipped"] == 0 and len(files.deltas(everything)) == len(report["layers"])


# --- projecting, on models whose relation is known ------------------------------------------------------------

SHARE = 0.9


def leading(W: torch.Tensor, share: float = SHARE) -> tuple[torch.Tensor, torch.Tensor]:
    """(U, V) of the fewest singular directions that hold a share of the energy, float64."""
    U, S, Vh = torch.linalg.svd(W.double().flatten(1), full_matrices=False)
    r = int((S.square().cumsum(0) < share * S.square().sum() * (1 - 1e-9)).sum()) + 1
    return U[:, :r], Vh[:r].mT


def weights_by_name(path: Path) -> dict[str, torch.Tensor]:
    """kohya's name → the layer's weight, of a narrow SD1.5 checkpoint."""
    stored = load_file(path)
    prefix = {"unet": "model.diffusion_model.", "te": "cond_stage_model.transformer.text_model."}
    return {
        m.name: stored[f"{prefix[m.component]}{m.path}.weight"].double().flatten(1)
        for m in files.layers("sd15") if files.linear_or_conv(m) and m.name
    }  # fmt: skip


def distance(made: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Relative, over all modules that were written."""
    error = sum(float((delta - truth[name]).square().sum()) for name, delta in made.items())
    return math.sqrt(error / sum(float(truth[name].square().sum()) for name in made))


def saved_changes(path: Path, changes: dict[str, torch.Tensor], like: files.Tensors) -> Path:
    """A LoRA file of these changes, in float32, each at the rank that it has."""
    out: files.Tensors = {}
    for name, change in changes.items():
        U, S, Vh = torch.linalg.svd(change, full_matrices=False)
        r = max(1, int((1e-9 * S[0] < S).sum()))
        down = like[f"{name}.lora_down.weight"]
        up, low = U[:, :r] * S[:r].sqrt(), S[:r, None].sqrt() * Vh[:r]
        kernel = down.shape[2:]
        out[f"{name}.lora_up.weight"] = up.float().reshape(len(up), r, *[1] * len(kernel))
        out[f"{name}.lora_down.weight"] = low.float().reshape(r, *down.shape[1:])
        out[f"{name}.alpha"] = torch.tensor(float(r))
    return files.save(path, out)


def test_lora_x_keeps_what_is_in_the_targets_directions_and_drops_the_rest(folder, run, tmp_path):
    """Where the true change lies within the target's leading directions, and the source's has more besides,
    projecting finds the truth and copying does not."""
    style = load_file(folder / "style.safetensors")
    targets, own = weights_by_name(folder / "relative.safetensors"), files.deltas(style)
    truth = {}
    for name, delta in own.items():
        U, V = leading(targets[name])
        truth[name] = U @ (U.mT @ delta @ V) @ V.mT
    report, made = run("--method", "lora-x", "--threshold", 0, "--dtype", "fp32")
    assert distance(files.deltas(made), truth) < 1e-4
    assert distance(own, truth) > 0.5
    retained = sum(float(t.square().sum()) for t in truth.values()) / sum(float(d.square().sum()) for d in own.values())
    assert report["loras"][0]["retained"] == pytest.approx(retained, rel=1e-4)
    assert report["loras"][0]["apart"] == pytest.approx(math.sqrt(1 - retained), rel=1e-3)
    assert report["relative_error"] < 1e-5


def turned(W: torch.Tensor, angle: float, seed: int) -> tuple[torch.Tensor, ...]:
    """(W_t, R_L, R_R): the span of W's leading directions turned on both sides by an angle, into the rest of it."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for basis in leading(W):
        n, r = basis.shape
        rest = torch.linalg.qr(torch.cat((basis, torch.randn(n, n, generator=generator).double()), 1)).Q[:, r:]
        pairs = min(r, rest.shape[1])
        A, B = basis[:, :pairs], rest[:, :pairs]
        c, s = math.cos(angle), math.sin(angle)
        eye = torch.eye(n, dtype=torch.float64)
        sides.append(eye + (c - 1) * (A @ A.mT + B @ B.mT) + s * (B @ A.mT - A @ B.mT))
    return sides[0] @ W @ sides[1].mT, *sides


def test_where_the_targets_directions_turned_prolora_beats_copying(folder, run, base):
    """The true change turns with the weights: copying is off by the chord, ProLoRA by much less."""
    angle, turns = 0.35, {}

    def turn(key: str, W: torch.Tensor) -> torch.Tensor:
        new, *turns[key] = turned(W, angle, len(turns))
        return new

    save_checkpoint(folder / "turned.safetensors", each_matrix(base, turn))
    style = files.deltas(load_file(folder / "style.safetensors"))
    prefix = {"unet": "model.diffusion_model.", "te": "cond_stage_model.transformer.text_model."}
    rotations = {m.name: turns[f"{prefix[m.component]}{m.path}.weight"] for m in files.layers("sd15")
                 if files.linear_or_conv(m)}  # fmt: skip
    truth = {name: rotations[name][0] @ delta @ rotations[name][1].mT for name, delta in style.items()}
    more = ("--threshold", 0, "--dtype", "fp32")
    report, made = run("--method", "prolora", *more, target="turned")
    _, copied = run("--method", "copy", *more, target="turned", name="copied")
    by_prolora, by_copy = distance(files.deltas(made), truth), distance(files.deltas(copied), truth)
    assert by_prolora < 0.6 * by_copy
    assert report["similarity"] < 0.97
    assert report["loras"][0]["apart"] > 0.1


def test_where_the_true_change_is_the_sources_copying_is_right_and_the_report_tells_what_projecting_lost(run):
    """A target that differs from the source by noise that has nothing to do with the LoRA."""
    report, made = run("--method", "lora-x", "--threshold", 0)
    _, copied = run("--method", "copy", "--threshold", 0, name="copied")
    truth = files.deltas(copied)
    lost = distance(files.deltas(made), truth)
    lora = report["loras"][0]
    assert lora["apart"] == pytest.approx(lost, rel=1e-2) and lost > 0.5
    assert lora["retained"] < 0.5 and lora["components"]["unet"]["blocks"]["MID"]["retained"] < 0.5
    assert any("Copying or prolora would keep it" in warning for warning in report["warnings"])
    gentle, near = run("--method", "prolora", "--threshold", 0, name="near")
    assert distance(files.deltas(near), truth) < 0.3
    assert gentle["loras"][0]["retained"] > 0.9 and gentle["warnings"] == []


# --- the file -------------------------------------------------------------------------------------------------


def test_the_file_says_what_it_is_and_how_it_was_made(folder, run, tmp_path):
    report, _ = run("--rank", 2)
    told = files.texts(tmp_path / "new.safetensors")
    assert told["ss_output_name"] == told["modelspec.title"] == "new"
    assert told["ss_base_model_version"] == "sd_v1" and told["ss_sd_model_name"] == "relative.safetensors"
    assert told["ss_network_dim"] == told["ss_network_alpha"] == "2"
    assert told["ss_tag_frequency"] == files.TEXTS["ss_tag_frequency"]  # the training is the same one
    assert told["modelspec.author"] == "somebody"
    assert told["sshs_model_hash"] not in ("", files.TEXTS["sshs_model_hash"])
    recipe = json.loads(told["hypermerge"])
    assert recipe["job"] == "transfer" and recipe["parameters"]["method"] == "prolora"
    assert {role: parent["name"] for role, parent in recipe["parents"].items()} == {
        "loras": "style.safetensors", "source_base": "source.safetensors", "target_base": "relative.safetensors",
    }  # fmt: skip
    assert str(folder) not in told["hypermerge"]
    assert recipe["retained"] == pytest.approx(report["loras"][0]["retained"], abs=1e-6)
    assert report["prompt"] == "<lora:new:1>"
    assert report["relative_error"] > 0.1  # rank 4 became 2


def test_number_formats(folder, run):
    style = load_file(folder / "style.safetensors")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        _, copied = run("--method", "copy", "--threshold", 0, "--dtype", name, name=f"copy-{name}")
        _, made = run("--threshold", 0, "--dtype", name, name=name)
        for tensors in (copied, made):
            assert {t.dtype for key, t in tensors.items() if not key.endswith("alpha")} == {dtype}
        assert torch.equal(copied[next(iter(style))], style[next(iter(style))].to(dtype))
    _, kept = run("--threshold", 0, name="kept")
    assert {t.dtype for key, t in kept.items() if not key.endswith("alpha")} == {torch.float16}


def test_equal_runs_give_equal_files_on_any_number_of_threads(folder, tmp_path):
    out = [tmp_path / name for name in ("one", "two")]
    for path, threads in zip(out, (1, 3), strict=True):
        path.mkdir()
        transfer(folder / "style.safetensors", folder / "source.safetensors", folder / "relative.safetensors",
                 path / "new", "--threads", threads)  # fmt: skip
    assert listing(out[0]) == listing(out[1])


def test_several_loras_at_once_are_the_same_files_as_one_by_one(folder, tmp_path):
    files.save(folder / "pose.safetensors", files.lora("sd15", only=lambda m: m.component == "te", seed=3))
    loras = [folder / f"{name}.safetensors" for name in ("style", "pose")]
    source, target = folder / "source.safetensors", folder / "relative.safetensors"
    together, alone = tmp_path / "together", tmp_path / "alone"
    for made in (together, alone):
        made.mkdir()
    report = transfer(loras, source, target, together / "{name}-new")
    assert [lora["output"] for lora in report["loras"]] == ["style-new.safetensors", "pose-new.safetensors"]
    assert len(report["outputs"]) == 2 and "prompt" not in report
    for lora in loras:
        transfer(lora, source, target, alone / "{name}-new")
        name = f"{lora.stem}-new.safetensors"
        assert files.same_bits(load_file(together / name), load_file(alone / name))
    assert report["loras"][0]["modules"] != report["loras"][1]["modules"]


def test_a_folder_or_a_pattern_names_loras_too(folder, tmp_path):
    loras, out = tmp_path / "loras", tmp_path / "out"
    loras.mkdir()
    out.mkdir()
    for i in range(3):
        files.save(loras / f"{i}.safetensors", files.lora("sd15", only=lambda m: m.block == "MID", seed=i))
    source, target = folder / "source.safetensors", folder / "relative.safetensors"
    transfer(loras, source, target, out / "{name}-new")
    assert sorted(listing(out)) == [f"{i}-new.safetensors" for i in range(3)]
    transfer(loras / "[12].safetensors", source, target, out / "two-{name}")
    assert len(listing(out)) == 5


# --- forecast and preview -------------------------------------------------------------------------------------


def test_a_preview_measures_everything_and_writes_nothing(folder, run, tmp_path):
    report, _ = run("--dry-run")
    assert listing(tmp_path) == {} and report["outputs"] == [] and report["preview"] is True
    written, _ = run()
    for figure in ("similarity", "components", "layers", "actions"):
        assert report[figure] == written[figure]


def test_report_in_words(folder, tmp_path):
    command = arguments(folder / "style.safetensors", folder / "source.safetensors", folder / "relative.safetensors",
                        tmp_path / "new")  # fmt: skip
    told = run_cli([part for part in command if part != "--json"])
    assert told.returncode == 0, told.stderr
    assert "Transfer works between related models. These have a similarity Φ of 0.9" in told.stdout
    assert "similarity in unet: 0.9" in told.stdout and "energy retained" in told.stdout
    assert "left out" in told.stdout or "projected" in told.stdout


def test_progress_grows_and_ends(folder, tmp_path):
    command = arguments(folder / "style.safetensors", folder / "source.safetensors", folder / "relative.safetensors",
                        tmp_path / "new")  # fmt: skip
    told = run_cli([part for part in command if part != "--quiet"])
    shares = [int(line[:4].strip().rstrip("%")) for line in told.stderr.splitlines()]
    assert shares == sorted(shares) and shares[0] == 0 and len(shares) > 5
    assert last_json(told)["device"] == "cpu"
