"""Converted networks of ADM, EDM and EDM2 give the answers of the official programs."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file

from imagenet64_diffusion import (
    ADMClassifierModel,
    ADMUNet2DModel,
    ClassConditionalPipeline,
    EDM2UNet2DModel,
    EDMHeunScheduler,
    swap_scheduler,
)
from imagenet64_diffusion.convert_checkpoints import convert_checkpoint
from imagenet64_diffusion.data.class_names import imagenet_id2label
from imagenet64_diffusion.tests.components import FIXTURES


PEERS = FIXTURES / "peers"
FILES = {
    "adm": (PEERS / "adm" / "diffusion.pt", {"params": PEERS / "adm" / "flags.json"}),
    "edm": (PEERS / "edm" / "net.pkl", {}),
    "edm2": (PEERS / "edm2" / "net.pkl", {"guidance_checkpoint": PEERS / "edm2" / "gnet.pkl"}),
}
FILES["adm"][1]["classifier_checkpoint"] = PEERS / "adm" / "classifier.pt"


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    assert found.shape == expected.shape
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


class Converted:
    """A converted pipeline, and what the official program computed with the same files."""

    def __init__(self, family: str, folder) -> None:
        file, options = FILES[family]
        self.family, self.folder = family, folder / family
        self.pipeline = convert_checkpoint(file, output_dir=self.folder, **options)
        self.pipeline.set_progress_bar_config(disable=True)
        self.expected = load_file(PEERS / family / "expected.safetensors")
        self.forward = {
            name.removeprefix("forward."): tensor
            for name, tensor in self.expected.items()
            if name.startswith("forward.")
        }

    def sample(self, **options) -> torch.Tensor:
        classes, latents = self.expected["sample.class_label"], self.expected["sample.latents"]
        return self.pipeline(classes, latents=latents, output_type="latent", **options).images


@pytest.fixture(scope="module")
def convert(tmp_path_factory):
    """The converted pipeline of a family, made once."""
    folder, made = tmp_path_factory.mktemp("peers"), {}
    return lambda family: made.get(family) or made.setdefault(family, Converted(family, folder))


@pytest.fixture
def give_noises(monkeypatch):
    """Has the schedulers take these noises, one after another, for those of their generators."""

    def give(noises):
        remaining = iter(noises)
        for file in ("scheduling_ddim_eta", "scheduling_edm_heun"):
            name = f"imagenet64_diffusion.schedulers.{file}.randn_tensor"
            monkeypatch.setattr(name, lambda shape, dtype, **_: next(remaining).to(dtype))

    return give


@torch.no_grad()
def test_adm_networks(convert):
    adm = convert("adm")
    inputs, pipeline = (adm.forward["sample"], adm.forward["timestep"]), adm.pipeline
    assert (type(pipeline.unet), type(pipeline.classifier)) == (UNet2DModel, ADMClassifierModel)
    assert close(pipeline.unet(*inputs, adm.forward["class_label"]).sample, adm.forward["output"], 2e-4)
    assert close(pipeline.classifier(*inputs).logits, adm.expected["classifier.logits"], 2e-4)


@pytest.mark.parametrize("scale", [0, 2])
def test_adm_ddpm(convert, give_noises, scale):
    adm = convert("adm")
    give_noises(adm.expected["ddpm10.noises"])
    image = adm.sample(timesteps=adm.expected["ddpm10.timesteps"].tolist(), classifier_scale=scale)
    assert close(image, adm.expected["ddpm10.classifier_scale2.image" if scale else "ddpm10.image"], 1e-3)


def test_adm_ddim(convert, monkeypatch):
    """Its DDIM goes in the direction of the noise that the clipped image leaves."""
    adm = convert("adm")
    monkeypatch.setattr(adm.pipeline, "scheduler", adm.pipeline.scheduler)
    swap_scheduler(adm.pipeline, "EtaDDIMScheduler")
    image = adm.sample(timesteps=adm.expected["ddim10.timesteps"].tolist())
    assert close(image, adm.expected["ddim10.image"], 1e-3)


@pytest.mark.parametrize(("family", "kind"), [("edm", ADMUNet2DModel), ("edm2", EDM2UNet2DModel)])
@torch.no_grad()
def test_edm_networks(convert, family, kind):
    """The preconditioning is that of Karras et al. 2022, table 1."""
    converted = convert(family)
    forward, unet = converted.forward, converted.pipeline.unet
    assert type(unet) is kind
    sigma = forward["sigma"].reshape(-1, 1, 1, 1)
    noisy, variance, timestep = forward["sample"] * sigma, sigma**2 + 0.5**2, sigma.flatten().log() / 4
    for labels, name in ((forward["class_label"], "denoised"), (None, "denoised_no_class")):
        output = unet(noisy / variance.sqrt(), timestep, labels).sample
        denoised = 0.5**2 / variance * noisy + 0.5 * sigma / variance.sqrt() * output
        assert close(denoised, forward[name], 2e-4)
    if family == "edm2":
        assert close(unet.log_variance(timestep), forward["logvar"], 2e-4)


@pytest.mark.parametrize("family", ["edm", "edm2"])
def test_edm_sampler(convert, family):
    assert close(convert(family).sample(num_inference_steps=8), convert(family).expected["heun8.image"], 1e-3)


@pytest.mark.parametrize("family", ["edm", "edm2"])
def test_edm_churn(convert, give_noises, monkeypatch, family):
    converted = convert(family)
    noises = converted.expected["heun8_churn.noises"]
    if family == "edm":
        # those of the steps without churn are stored, too
        sigmas = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 8) ** 7
        noises = noises[(sigmas >= 0.05) & (sigmas <= 50)]
    give_noises(noises)
    options = {"S_churn": 4, "S_min": 0.05, "S_max": 50, "S_noise": 1.003}
    scheduler = EDMHeunScheduler.from_config(converted.pipeline.scheduler.config, **options)
    monkeypatch.setattr(converted.pipeline, "scheduler", scheduler)
    image = converted.sample(num_inference_steps=8)
    assert close(image, converted.expected["heun8_churn.image"], 1e-3)


def test_autoguidance_with_and_without_the_package(convert, monkeypatch):
    edm2 = convert("edm2")
    options = {"num_inference_steps": 8, "guidance_scale": 1.7}
    image = edm2.sample(**options)
    assert close(image, edm2.expected["heun8_autoguidance1.7.image"], 1e-3)
    loaded = DiffusionPipeline.from_pretrained(edm2.folder, trust_remote_code=True)
    assert not isinstance(loaded, ClassConditionalPipeline)
    monkeypatch.setattr(edm2, "pipeline", loaded)
    assert torch.equal(edm2.sample(**options), image)


@pytest.mark.parametrize("family", list(FILES))
def test_everything_it_writes(convert, family):
    """What the folder says of its origin; it is replaced by another conversion, and by nothing else."""
    folder, (file, options) = convert(family).folder, FILES[family]
    card = (folder / "README.md").read_text()
    assert f"license: {'mit' if family == 'adm' else 'cc-by-nc-sa-4.0'}" in card
    for words in (file.name, "published sampler", *(each.name for each in options.values() if each.suffix != ".json")):
        assert words in card
    manifest = json.loads((folder / "conversion.json").read_text())
    assert (manifest["family"], manifest["checkpoint"]) == (family, file.name)
    other = FILES["edm"][0]
    (folder / "thesis.tex").write_text("keep")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        convert_checkpoint(other, output_dir=folder)
    (folder / "thesis.tex").unlink()
    again = convert_checkpoint(
        file, output_dir=folder, id2label=list("abcdefg")[: convert(family).pipeline.num_classes], **options
    )
    assert again.labels["c"] == 2


def test_names_of_classes():
    """torchvision's order: 281 is the tabby, and the synsets ascend."""
    names = imagenet_id2label()
    assert (names[0].split(",")[0], names[281].split(",")[0], names[999].split(",")[0]) == (
        "tench",
        "tabby",
        "toilet tissue",
    )
    assert len(names) == 1000


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("edm", {"family": "edm2"}, "family is edm2, but net.pkl is one of EDM"),
        ("edm", {"family": "diffusers"}, "family is 'diffusers', but must be one of auto, original, adm, edm, edm2"),
        ("edm", {"params": PEERS / "adm" / "flags.json"}, "params is .*flags.json, but net.pkl says all"),
        ("edm", {"optimizer": "optim.pkl"}, "optimizer is optim.pkl, but does not go with a checkpoint of EDM"),
        ("edm", {"time_embedding": "original_interleaved"}, "time_embedding is original_interleaved, but does not go"),
        ("edm", {"classifier_checkpoint": PEERS / "adm" / "classifier.pt"}, "guides networks of ADM alone"),
        ("edm", {"guidance_checkpoint": FILES["adm"][0]}, "diffusion.pt: .* flags|noise levels are not those"),
        ("adm", {"classifier_checkpoint": FILES["adm"][0]}, "diffusion.pt"),
        ("adm", {"params": None}, "diffusion.pt: .*num_head_channels"),
    ],
)
def test_what_does_not_fit(tmp_path, family, options, message):
    file, usual = FILES[family]
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(file, output_dir=tmp_path / "out", **{**usual, **options})
    assert not list(tmp_path.iterdir())
