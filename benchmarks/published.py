"""Published networks at full size with random weights: what converting them takes, and a guided step beside the
official program's.

The official programs do not come along: --official names a folder with clones of openai/guided-diffusion, NVlabs/edm2.
"""

import json
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import (
    alternate_seconds,
    in_own_process,
    parse_options,
    ratios_to,
    resident_bytes,
    seconds_of,
    spread,
    write_result,
)
from torch import nn

import imagenet64_diffusion.conversion.converting  # noqa: F401, so that no import is measured
from imagenet64_diffusion import ClassConditionalPipeline
from imagenet64_diffusion.convert_checkpoints import convert_checkpoint


EDM2_WIDTHS = {"net": 192, "gnet": 128}  # EDM2-S, and EDM2-XS to guide it


def convert(threads: int, files: dict[str, Path], output_dir: Path) -> tuple[float, int]:
    """Converts; returns the seconds, and the peak memory above that of the imports."""
    torch.set_num_threads(threads)
    before = resident_bytes("VmHWM")
    return seconds_of(lambda: convert_checkpoint(**files, output_dir=output_dir)), resident_bytes("VmHWM") - before


def randomize(network: nn.Module) -> nn.Module:
    """The same network in evaluation, with random weights where it begins with zeros."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return network.eval().requires_grad_(False)


def adm(folder: Path, small: bool) -> tuple[Callable, dict[str, Path], dict[str, Any]]:
    """ADM's network of 64x64 with its classifier: the official evaluation, the files, and how ours is called."""
    from guided_diffusion.unet import EncoderUNetModel, UNetModel

    common = {"image_size": 64, "in_channels": 3, "use_scale_shift_norm": True, "resblock_updown": True}
    common |= {"attention_resolutions": (2, 4, 8), "channel_mult": (1, 2, 3, 4), "num_head_channels": 64}
    common |= {"use_new_attention_order": True, "dropout": 0.1}
    blocks = {"model_channels": 192, "num_res_blocks": 3, "out_channels": 6, "num_classes": 1000}
    network = randomize(UNetModel(**common, **blocks))
    blocks = {"model_channels": 128, "num_res_blocks": 4, "out_channels": 1000, "pool": "attention"}
    classifier = randomize(EncoderUNetModel(**common, **blocks))
    files = {"checkpoint": folder / "64x64_diffusion.pt", "classifier_checkpoint": folder / "64x64_classifier.pt"}
    torch.save(network.state_dict(), files["checkpoint"])
    torch.save(classifier.state_dict(), files["classifier_checkpoint"])

    def evaluate(sample: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        timesteps = torch.full((len(sample),), 500)
        with torch.enable_grad():
            sample = sample.detach().requires_grad_()
            chosen = classifier(sample, timesteps).log_softmax(dim=-1)[range(len(labels)), labels]
            torch.autograd.grad(chosen.sum(), sample)
        return network(sample.detach(), timesteps, labels)

    return evaluate, files, {"classifier_scale": 1.0, "num_inference_steps": 5}


def edm2(folder: Path, small: bool) -> tuple[Callable, dict[str, Path], dict[str, Any]]:
    """EDM2-S with EDM2-XS to guide it, as `adm`."""
    from training.networks_edm2 import Precond

    networks, files = {}, {}
    for name, width in EDM2_WIDTHS.items():
        options = {
            "img_resolution": 64,
            "img_channels": 3,
            "label_dim": 1000,
            "model_channels": width // (8 * small or 1),
        }
        networks[name] = randomize(Precond(**options, channels_per_head=8 if small else 64))
        file = files["checkpoint" if name == "net" else "guidance_checkpoint"] = folder / f"edm2-{name}.pkl"
        file.write_bytes(pickle.dumps({"ema": networks[name]}))

    def evaluate(sample: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        one_hot, sigma = nn.functional.one_hot(labels, 1000), torch.ones(len(sample))
        outputs = [network(sample, sigma, one_hot) for network in networks.values()]
        return outputs[1].lerp(outputs[0], 1.7)

    return evaluate, files, {"guidance_scale": 1.7, "num_inference_steps": 3}  # Heun's method: five evaluations


def measure(family: Callable, options: Any) -> dict[str, Any]:
    """Converts the random files of a family, and times five guided evaluations of ours and of the official program."""
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        evaluate, files, call = family(Path(name), options.small)
        output = Path(name) / "pipeline"
        seconds, peak = in_own_process(convert, options.threads, files, output)
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
        "conversion, s": seconds,
        "peak memory above that of the imports, times the files": peak / size,
        "guided evaluation, s": {name: spread(value / 5 for value in values) for name, values in timed.items()},
        "ours, times the official": ratios_to("official", timed)["ours"],
    }


def main() -> None:
    options = parse_options(
        __doc__,
        official={"type": Path, "required": True, "help": "folder with clones of the official programs"},
        repeats=("rounds", 5, 1),
        threads=("threads of torch", os.cpu_count()),
    )
    torch.set_num_threads(options.threads)
    sys.path[:0] = [str(options.official / name) for name in ("guided-diffusion", "edm2")]
    results = {family.__name__: measure(family, options) for family in (adm, edm2)[options.small :]}
    print(json.dumps(results, indent=2))
    write_result("published", options, results=results)


if __name__ == "__main__":
    main()
