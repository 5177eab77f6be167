"""A repository on the Hub where this package is not installed: in a process that cannot import it."""

import re
import sys
from pathlib import Path

import diffusers.utils.dynamic_modules_utils
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UniPCMultistepScheduler
from huggingface_hub import ModelCard, constants

from imagenet64_diffusion import ClassConditionalPipeline
from imagenet64_diffusion.tests.commands.processes import run_function
from imagenet64_diffusion.tests.components import generate_two, make_pipeline
from imagenet64_diffusion.tests.hub.conftest import point_at
from imagenet64_diffusion.tests.hub.loopback_hub import TOKEN
from imagenet64_diffusion.tests.hub.test_pushing import WHOLE
from imagenet64_diffusion.tests.pipelines.test_networks import edm2, pipeline_of


def use(url: str, folder: Path, code_of_the_card: list[str]) -> None:
    """Loads, generates and pushes, in a process that can no longer import this package and knows that Hub alone."""
    for name in [name for name in sys.modules if name.startswith("imagenet64_diffusion.")]:
        del sys.modules[name]
    sys.modules["imagenet64_diffusion"] = None
    patch, modules = pytest.MonkeyPatch(), folder / "modules"
    point_at(url, folder, patch)
    patch.setenv("HF_TOKEN", TOKEN)
    modules.mkdir()
    patch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(modules))
    # before the place where another test may have put downloaded code
    patch.syspath_prepend(modules)
    patch.chdir(folder)

    with pytest.raises(ModuleNotFoundError):
        exec("from imagenet64_diffusion.pipelines import pipeline_class_conditional")
    with pytest.raises(
        ValueError, match=r"custom code in pipeline_class_conditional.py(?s:.*)`trust_remote_code=True"
    ):
        DiffusionPipeline.from_pretrained("me/tiny")
    expected = torch.load("expected.pt")
    pipeline = DiffusionPipeline.from_pretrained("me/tiny", trust_remote_code=True)
    assert torch.equal(generate_two(pipeline), expected)

    stored = pipeline.scheduler
    for scheduler_class in (DDPMScheduler, UniPCMultistepScheduler):
        pipeline.scheduler = scheduler_class.from_config(stored.config)
        images = generate_two(pipeline)
        assert images.isfinite().all()
        assert images.std() > 0.01
    pipeline.scheduler = stored

    pipeline.save_pretrained("saved", push_to_hub=True, repo_id="me/saved")
    again = DiffusionPipeline.from_pretrained("saved", trust_remote_code=True)
    assert torch.equal(generate_two(again), expected)
    again.push_to_hub("me/again", commit_message="From elsewhere", private=True)
    # a network of one's own in the place of the stored one
    unet = type(again.unet).from_config(again.unet.config, stem_channels=16)
    assert DiffusionPipeline.from_pretrained("me/again", unet=unet, trust_remote_code=True).unet is unet

    # EDM2's network with another to guide it, each with the file of its class
    guided = DiffusionPipeline.from_pretrained("edm2", trust_remote_code=True)
    assert torch.equal(generate_two(guided), torch.load("edm2.pt"))

    exec("\n".join(code_of_the_card), scope := {})
    assert len(scope["images"]) == 3
    # its last lines, which have downloaded a snapshot, do without the Hub
    constants.HF_HUB_OFFLINE, constants.ENDPOINT = True, "http://127.0.0.1:1"
    exec(code_of_the_card[-1], scope)
    generate_two(scope["pipeline"])


def test_from_load_to_push(logged_in, tmp_path):
    pipeline = make_pipeline()
    pipeline.push_to_hub("me/tiny", private=True)
    torch.save(generate_two(pipeline), tmp_path / "expected.pt")
    guided = pipeline_of(edm2(), names=pipeline.config.id2label, guidance_unet=edm2(seed=1))
    guided.save_pretrained(tmp_path / "edm2")
    torch.save(generate_two(guided), tmp_path / "edm2.pt")
    text = re.sub(r"num_inference_steps=\d+", "num_inference_steps=3", ModelCard.load("me/tiny").text)
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code) == 4
    with_package = code.pop(next(i for i, block in enumerate(code) if "imagenet64_diffusion" in block))
    exit_code, said = run_function(use, logged_in.url, tmp_path, code)
    assert exit_code == 0, said
    assert (tmp_path / "image.png").is_file()

    repositories = logged_in.repositories
    for repo_id in ("me/again", "me/saved"):
        files = repositories[repo_id].files
        assert sorted(files) == WHOLE
        # diffusers' card, for the package is not there to write its own
        assert ModelCard(files["README.md"].content.decode()).data.library_name == "diffusers"
        for name in ("pipeline_class_conditional.py", "unet/unet_class_conditional.py"):
            assert files[name] == repositories["me/tiny"].files[name]
        assert torch.equal(generate_two(ClassConditionalPipeline.from_pretrained(repo_id)), generate_two(pipeline))
    assert repositories["me/again"].commits[repositories["me/again"].refs["main"]].message == "From elsewhere"
    exec(with_package, scope := {})
    assert torch.equal(generate_two(scope["pipeline"]), generate_two(pipeline))
