"""Published networks at full size with random weights: converting them, and a guided evaluation of the network beside
the official program's. These programs do not come along: give a folder with clones of guided-diffusion and edm2."""

import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from performance_page import publish
from report import alternate_seconds, in_own_process, parse_options, ratios_to, spread
from torch import nn

from conversion import convert
from imagenet64_diffusion import ClassConditionalPipeline


# the official evaluation of (sample, labels), the files, and how the pipeline makes five evaluations
Family = tuple[Callable[..., Any], dict[str, Path], dict[str, Any]]


def randomize(network: nn.Module) -> nn.Module:
    """The same network in evaluation, with random weights where it begins with zeros."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return network.eval()


def adm(folder: Path) -> Family:
    """ADM's network for 64x64, guided by its classifier."""
    from guided_diffusion.unet import EncoderUNetModel, UNetModel

    common = {"image_size": 64, "in_channels": 3, "use_scale_shift_norm": True, "resblock_updown": True}
    common |= {"attention_resolutions": (2, 4, 8), "channel_mult": (1, 2, 3, 4), "num_head_channels": 64}
    options = {"model_channels": 192, "num_res_blocks": 3, "out_channels": 6, "num_classes": 1000}
    network = randomize(UNetModel(**common, **options, use_new_attention_order=True))
    options = {"model_channels": 128, "num_res_blocks": 4, "out_channels": 1000, "pool": "attention"}
    classifier = randomize(EncoderUNetModel(**common, **options))
    files = {"checkpoint": folder / "diffusion.pt", "classifier_checkpoint": folder / "classifier.pt"}
    for file, weights in zip(files.values(), (network, classifier), strict=True):
        torch.save(weights.state_dict(), file)

    def evaluate(sample: torch.Tensor, labels: torch.Tensor) -> None:
        timesteps = torch.full((len(sample),), 500)
        with torch.enable_grad():
            noisy = sample.detach().requires_grad_()
            torch.autograd.grad(-F.cross_entropy(classifier(noisy, timesteps), labels, reduction="sum"), noisy)
        network(sample, timesteps, labels)

    return evaluate, files, {"classifier_scale": 1.0, "num_inference_steps": 5}


def edm2(folder: Path) -> Family:
    """EDM2-S, guided by EDM2-XS."""
    from training.networks_edm2 import Precond

    networks = [randomize(Precond(64, 3, 1000, model_channels=width)) for width in (192, 128)]
    files = {"checkpoint": folder / "net.pkl", "guidance_checkpoint": folder / "gnet.pkl"}
    for file, network in zip(files.values(), networks, strict=True):
        file.write_bytes(pickle.dumps({"ema": network}))

    def evaluate(sample: torch.Tensor, labels: torch.Tensor) -> None:
        net, gnet = (network(sample, torch.ones(len(sample)), F.one_hot(labels, 1000)) for network in networks)
        gnet.lerp(net, 1.7)

    return evaluate, files, {"guidance_scale": 1.7, "num_inference_steps": 3}  # Heun's method


def measure(family: Callable[[Path], Family], options: Any) -> dict[str, Any]:
    """The figures of a family."""
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        (evaluate, files, call), output = family(Path(name)), Path(name) / "pipeline"
        seconds, before, peak = in_own_process(convert, options.threads, {**files, "output_dir": output})
        pipeline = ClassConditionalPipeline.from_pretrained(output)
        pipeline.set_progress_bar_config(disable=True)
        latents, labels = torch.randn(1, 3, 64, 64), torch.tensor([7])
        calls = {
            "official": lambda: [evaluate(latents, labels) for _ in range(5)],
            "ours": lambda: pipeline(labels, latents=latents, output_type="latent", **call),
        }
        timed, size = alternate_seconds(calls, options.repeats), sum(file.stat().st_size for file in files.values())
    return {
        "files, MB": size / 1e6,
        "conversion with its checks, s": seconds,
        "peak memory, times the files": peak / size,
        "above that of the imports, times the files": (peak - before) / size,
        "guided evaluation of the official program, s": spread(value / 5 for value in timed["official"]),
        "guided evaluation of ours, s": spread(value / 5 for value in timed["ours"]),
        "ours, times the official": ratios_to("official", timed)["ours"],
    }


def main() -> None:
    official = {"type": Path, "required": True, "help": "folder with clones of guided-diffusion and edm2"}
    threads = ("threads of torch", os.cpu_count())
    options = parse_options(__doc__, official=official, repeats=("rounds", 3, 1), threads=threads)
    torch.set_num_threads(options.threads)
    sys.path[:0] = [str(options.official / name) for name in ("guided-diffusion", "edm2")]
    columns = {family.__doc__.rstrip("."): measure(family, options) for family in (adm, edm2)}
    publish("published", options, [("", columns)], ("safetensors",))


if __name__ == "__main__":
    main()
