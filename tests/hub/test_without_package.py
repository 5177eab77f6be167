"""A repository on the Hub where this package is not installed: in a process that cannot import it."""

import re
import textwrap

import torch
from huggingface_hub import ModelCard

from imagenet64_diffusion import ClassConditionalPipeline
from imagenet64_diffusion.tests.components import generate_two, make_pipeline
from imagenet64_diffusion.tests.hub.conftest import WITHOUT_THE_PACKAGE
from imagenet64_diffusion.tests.hub.loopback_hub import TOKEN
from imagenet64_diffusion.tests.hub.test_pushing import WHOLE


def test_from_load_to_push(online, run_python, tmp_path):
    pipeline = make_pipeline()
    pipeline.push_to_hub("me/tiny", token=TOKEN, private=True)
    pipeline.save_pretrained(tmp_path / "model")
    torch.save(generate_two(pipeline), tmp_path / "expected.pt")
    card = ModelCard.load("me/tiny", token=TOKEN).text
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(code) == 4
    with_package = next(block for block in code if "imagenet64_diffusion" in block)
    code.remove(with_package)

    program = """
        from diffusers import DDIMScheduler, DDPMScheduler, UniPCMultistepScheduler

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
        for scheduler_class in (DDIMScheduler, DDPMScheduler, UniPCMultistepScheduler):
            pipeline.scheduler = scheduler_class.from_config(stored.config)
            images = generate(pipeline)
            assert images.isfinite().all() and images.std() > 0.01, scheduler_class
        pipeline.scheduler = stored

        pipeline.save_pretrained("saved")
        again = DiffusionPipeline.from_pretrained("saved", trust_remote_code=True)
        for folder in ("saved", "model"):
            loaded = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
            assert torch.equal(generate(loaded), expected), "other images from the folder " + folder
        for pushing, repo_id in ((pipeline, "me/again"), (again, "me/once-more")):
            pushing.push_to_hub(repo_id, commit_message="From elsewhere", private=True)
        pushed = DiffusionPipeline.from_pretrained("me/again", trust_remote_code=True)
        assert torch.equal(generate(pushed), expected), "other images after pushing"
        again.save_pretrained("saved", push_to_hub=True, repo_id="me/saved")

        # a network of one's own in the place of the stored one
        unet = type(again.unet).from_config(again.unet.config, stem_channels=16)
        assert DiffusionPipeline.from_pretrained("me/tiny", unet=unet, trust_remote_code=True).unet is unet
    """
    # after what the card says, its last lines, which downloaded a snapshot, do without the Hub
    offline = """
        assert len(images) == 3, images
        from huggingface_hub import constants
        constants.HF_HUB_OFFLINE, constants.ENDPOINT = True, "http://127.0.0.1:1"
    """
    program = (
        textwrap.dedent(program) + "\n".join(code) + textwrap.dedent(offline) + code[-1] + "\ngenerate(pipeline)\n"
    )
    run_python(WITHOUT_THE_PACKAGE + program, HF_TOKEN=TOKEN)
    assert (tmp_path / "image.png").is_file()

    for repo_id in ("me/again", "me/once-more", "me/saved"):
        repository = online.repositories[repo_id]
        assert sorted(repository.files) == WHOLE
        # diffusers' card, for the package is not there to write its own
        assert ModelCard(repository.files["README.md"].content.decode()).data.library_name == "diffusers"
        for name in ("pipeline_class_conditional.py", "unet/unet_class_conditional.py"):
            assert repository.files[name] == online.repositories["me/tiny"].files[name]
        loaded = ClassConditionalPipeline.from_pretrained(repo_id, token=TOKEN)
        assert torch.equal(generate_two(loaded), generate_two(pipeline))
    repository = online.repositories["me/again"]
    assert repository.commits[repository.refs["main"]].message == "From elsewhere"

    online.repositories["me/tiny"].private = False
    scope = {}
    exec(with_package, scope)
    assert torch.equal(generate_two(scope["pipeline"]), generate_two(pipeline))
