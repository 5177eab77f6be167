"""A repository on the Hub where this package is not installed: in a process that cannot import it."""

import re

import torch
from huggingface_hub import ModelCard

from imagenet64_diffusion import ClassConditionalPipeline
from imagenet64_diffusion.tests.components import generate_two, make_pipeline
from imagenet64_diffusion.tests.hub.test_pushing import WHOLE


LOADING = """
import sys

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UniPCMultistepScheduler

def generate(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}
    return pipeline([0, "goldfish"], generator=generator, **options).images

try:
    DiffusionPipeline.from_pretrained("me/tiny")
except ValueError as error:
    assert "contains custom code in pipeline_class_conditional.py" in str(error), error
    assert "Pass `trust_remote_code=True`" in str(error), error
else:
    sys.exit("the code was loaded without being asked for")
expected = torch.load("expected.pt")
pipeline = DiffusionPipeline.from_pretrained("me/tiny", trust_remote_code=True)
assert torch.equal(generate(pipeline), expected), "other images"

stored = pipeline.scheduler
for scheduler_class in (DDPMScheduler, UniPCMultistepScheduler):
    pipeline.scheduler = scheduler_class.from_config(stored.config)
    images = generate(pipeline)
    assert images.isfinite().all() and images.std() > 0.01, scheduler_class
pipeline.scheduler = stored

pipeline.save_pretrained("saved", push_to_hub=True, repo_id="me/saved")
again = DiffusionPipeline.from_pretrained("saved", trust_remote_code=True)
assert torch.equal(generate(again), expected), "other images from the folder"
again.push_to_hub("me/again", commit_message="From elsewhere", private=True)

# a network of one's own in the place of the stored one
unet = type(again.unet).from_config(again.unet.config, stem_channels=16)
assert DiffusionPipeline.from_pretrained("me/again", unet=unet, trust_remote_code=True).unet is unet

"""
# after what the card says, its last lines, which downloaded a snapshot, do without the Hub
OFFLINE = """
assert len(images) == 3, images
from huggingface_hub import constants
constants.HF_HUB_OFFLINE, constants.ENDPOINT = True, "http://127.0.0.1:1"
"""


def test_from_load_to_push(logged_in, run_python, tmp_path):
    pipeline = make_pipeline()
    pipeline.push_to_hub("me/tiny", private=True)
    torch.save(generate_two(pipeline), tmp_path / "expected.pt")
    code = re.findall(r"```python\n(.*?)```", ModelCard.load("me/tiny").text, re.DOTALL)
    assert len(code) == 4
    with_package = code.pop(next(i for i, block in enumerate(code) if "imagenet64_diffusion" in block))
    run_python(LOADING + "\n".join(code) + OFFLINE + code[-1] + "\ngenerate(pipeline)\n")
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
