"""The family of trained models: its layout, its tokenizer, its sampler beside diffusers', what members are taught."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from benchmarks.family import demo, hosts, judge, unet_training, vae_training
from benchmarks.family.autoencoder import Autoencoder
from benchmarks.family.captions import NUMBER_SCENES, SCENES, Tokenizer
from benchmarks.family.drawing import MANNERS, SIDE, draw
from benchmarks.family.members import BASE, EVERY
from benchmarks.family.model import VAE_WIDTHS, Model, from_tensors, load, new_text, new_unet, save
from benchmarks.family.sampling import latents, noise, pictures
from lib_hypermerge.files.opening import open_tensors
from lib_hypermerge.layouts import tables
from lib_hypermerge.layouts.detect import recognise

CAPTIONS = ["a large red star on sky", "a small black ring on sand"]


@pytest.fixture(scope="module")
def model() -> Model:
    """Random in all weights, those that start at zero too."""
    torch.manual_seed(0)
    tokenizer = Tokenizer()
    made = Model(new_unet(), new_text(tokenizer), Autoencoder(VAE_WIDTHS), tokenizer)
    for part in made.parts().values():
        part.eval().requires_grad_(False)
        for weight in part.parameters():
            if not weight.any():
                torch.nn.init.normal_(weight, std=0.05)
    return made


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As after training: a checkpoint, and what programs need beside it."""
    folder = tmp_path_factory.mktemp("family")
    save(folder / "base.safetensors", model.parts(), torch.float32)
    hosts.write_configurations(folder, ["base"])
    return folder


def test_a_checkpoint_has_the_names_and_ranks_of_sd15(folder: Path) -> None:
    with open_tensors(folder / "base.safetensors") as file:
        table = tables.shapes("sd15")
        assert set(file.tensors) == set(table)
        assert all(len(info.shape) == len(table[name]) for name, info in file.tensors.items())
        assert recognise(file).architecture.id == "sd1"


def test_a_checkpoint_comes_back_as_it_was(model: Model, folder: Path) -> None:
    again = load(folder / "base.safetensors")
    for part, module in model.parts().items():
        assert all(torch.equal(t, again.parts()[part].state_dict()[key]) for key, t in module.state_dict().items())
    tensors = {"model.diffusion_model.no.such.name": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"no\.such\.name"):
        from_tensors(tensors)


def test_diffusers_draws_the_same_pictures(model: Model, folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_single_file(
        str(folder / "base.safetensors"), config=str(folder / "diffusers"), local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    ours = latents(model, CAPTIONS, [3, 4], steps=5)
    theirs = pipeline(
        CAPTIONS, latents=noise([3, 4]), num_inference_steps=5, guidance_scale=3.0, output_type="latent",
        height=SIDE, width=SIDE,
    ).images  # fmt: skip
    assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()
    drawn = pictures(model, CAPTIONS, [3, 4], steps=5)
    decoded = pipeline.vae.decode(theirs / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)
    assert (drawn - decoded).abs().max() < 5e-3


def test_the_tokenizer_is_clips(folder: Path) -> None:
    theirs = CLIPTokenizer.from_pretrained(str(folder / "text"))
    captions = [*map(str, SCENES[::37]), *map(str, NUMBER_SCENES), "", "red"]
    read = theirs(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(read, Tokenizer()(captions))


def test_every_word_is_one_token() -> None:
    tokenizer = Tokenizer()
    for caption in (*map(str, SCENES), *map(str, NUMBER_SCENES)):
        row = tokenizer([caption])[0].tolist()
        assert row.index(tokenizer.numbers["<|endoftext|>"]) == 1 + len(caption.split())


def test_whitening_changes_latents_and_no_picture() -> None:
    torch.manual_seed(0)
    vae = Autoencoder(VAE_WIDTHS).requires_grad_(False)
    drawn = vae_training.batch(16, torch.Generator().manual_seed(0))
    before = vae.decode(vae.encode(drawn))
    vae.whiten(vae.encode(drawn))
    white = vae.encode(drawn).transpose(0, 1).flatten(1)
    assert torch.allclose(white.cov(correction=0), torch.eye(4), atol=1e-3)
    assert white.mean(1).abs().max() < 1e-4
    assert torch.allclose(vae.decode(vae.encode(drawn)), before, atol=1e-4)


@pytest.mark.parametrize("manner", MANNERS)
def test_drawings_depend_on_the_seed_alone(manner: str) -> None:
    scenes = NUMBER_SCENES if manner == "numbers" else SCENES[::17]
    first, again, other = (draw(scenes, manner, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (len(scenes), 3, SIDE, SIDE) and first.min() >= -1 and first.max() <= 1


def test_members_say_what_they_are_trained_on() -> None:
    names = [member.name for member in EVERY]
    assert len(set(names)) == len(names) >= 9
    assert all(member.parent in (BASE, *names[:number]) for number, member in enumerate(EVERY))
    turned = next(m for m in EVERY if m.name == "turned")
    assert all(str(turned.asked(s)) == str(s).replace("red", "yellow") for s in SCENES if s.colour == 0)
    others = [m for m in EVERY if m.name not in ("turned", "round")]
    assert all(member.asked(scene) == scene for member in others for scene in (*SCENES, *NUMBER_SCENES))
    assert {next(m for m in EVERY if m.name == "round").asked(scene).subject for scene in SCENES} == {0, 5, 6}


def test_training_lowers_the_loss(model: Model, folder: Path) -> None:
    tuned = load(folder / "base.safetensors")
    random = torch.Generator().manual_seed(0)
    scenes = [SCENES[i] for i in torch.randint(len(SCENES), (64,), generator=random).tolist()]
    encoded = unet_training.encode(tuned, scenes, "plain", random)
    said: list[str] = []
    before = {key: t.clone() for key, t in tuned.text.state_dict().items()}
    unet_training.fit(tuned, list(map(str, scenes)), encoded, 0, said.append, steps=20, rate=1e-3, every=10)
    first, last = (float(line.split()[-1]) for line in said)
    assert last < first
    assert all(torch.equal(t, before[key]) for key, t in tuned.text.state_dict().items())
    assert any(not torch.equal(t, model.unet.state_dict()[key]) for key, t in tuned.unet.state_dict().items())


def test_the_judge_learns() -> None:
    untrained, trained = judge.Judge(), judge.train(0, lambda text: None, steps=60, each=4)
    for head in ("manner", "ground"):
        assert judge.score(trained, 5, 20)[head] > 1.5 * judge.score(untrained.eval(), 5, 20)[head]


def test_the_demo_draws_with_a_lora_what_the_fine_tune_draws(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert demo.main(["--folder", str(tmp_path / "demo"), "--steps", "10"]) == 0
    said = capsys.readouterr().out
    assert "relative error" in said and str(tmp_path / "demo" / "pictures.png") in said
    for name in ("base", "night", "night-lora", "night-again"):
        assert (tmp_path / "demo" / f"{name}.safetensors").exists()
    assert (tmp_path / "demo" / "night-again.yaml").exists() and (tmp_path / "demo" / "pictures.png").exists()
