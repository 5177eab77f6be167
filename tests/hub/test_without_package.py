"""A repository on the Hub where this package is not installed: in processes that cannot import it."""

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
        assert torch.equal(draw(pipeline), expected), "other images"

        stored = pipeline.scheduler
        for scheduler_class in (DDIMScheduler, DDPMScheduler, UniPCMultistepScheduler):
            pipeline.scheduler = scheduler_class.from_config(stored.config)
            images = draw(pipeline)
            assert images.isfinite().all() and images.std() > 0.01, scheduler_class
        pipeline.scheduler = stored

        pipeline.save_pretrained("saved")
        again = DiffusionPipeline.from_pretrained("saved", trust_remote_code=True)
        assert torch.equal(draw(again), expected), "other images after saving"
        for pushing, repo_id in ((pipeline, "me/again"), (again, "me/once-more")):
            pushing.push_to_hub(repo_id, commit_message="From elsewhere", private=True)
            pushed = DiffusionPipeline.from_pretrained(repo_id, trust_remote_code=True)
            assert torch.equal(draw(pushed), expected), "other images after pushing"
        again.save_pretrained("saved", push_to_hub=True, repo_id="me/saved")

        # a network of one's own in the place of the stored one
        for source in ("me/tiny", "saved"):
            unet = type(again.unet).from_config(again.unet.config, stem_channels=16)
            assert DiffusionPipeline.from_pretrained(source, unet=unet, trust_remote_code=True).unet is unet
    """
    run_python(
        WITHOUT_THE_PACKAGE
        + textwrap.dedent(program)
        + "\n# what the card says\n"
        + "\n".join(code)
        + "\nassert len(images) == 3, images\n",
        HF_TOKEN=TOKEN,
    )
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

    # the last lines of the card, which downloaded a snapshot, do without the Hub now
    asked = len(online.requests)
    run_python(WITHOUT_THE_PACKAGE + code[-1] + "\ndraw(pipeline)\n", HF_HUB_OFFLINE="1")
    assert len(online.requests) == asked

    online.repositories["me/tiny"].private = False
    scope = {}
    exec(with_package, scope)
    assert torch.equal(generate_two(scope["pipeline"]), generate_two(pipeline))
