"""push_to_hub and save_pretrained(push_to_hub=True), with the package."""

import io

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from imagenet64_diffusion import ClassConditionalPipeline
from imagenet64_diffusion.pipelines.image_grid import image_grid
from imagenet64_diffusion.pipelines.model_card import UNKNOWN_REPO_ID, write_model_card
from imagenet64_diffusion.tests.components import generate_two, make_pipeline, seeded
from imagenet64_diffusion.tests.hub.loopback_hub import Blob, Repository


CODE_AND_WEIGHTS = [
    "cached_weights.py",
    "model_index.json",
    "noise_kinds.py",
    "pipeline_class_conditional.py",
    "scheduler/scheduler_config.json",
    "scheduler/scheduling_ddim_eta.py",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/unet_class_conditional.py",
]
VARIANT = "unet/diffusion_pytorch_model.fp16.safetensors"
WHOLE = [".gitattributes", "README.md", *CODE_AND_WEIGHTS]


@pytest.fixture
def pipeline() -> ClassConditionalPipeline:
    return make_pipeline()


def test_there_and_back(logged_in, pipeline):
    pushed = pipeline.push_to_hub("me/tiny")
    repository = logged_in.repositories["me/tiny"]
    assert sorted(repository.files) == WHOLE
    # the files came in one commit after that which made the repository
    assert pushed.oid == repository.refs["main"]
    assert len(repository.commits) == 2
    assert repository.commits[pushed.oid].message == "Upload ClassConditionalPipeline"
    card = ModelCard(repository.files["README.md"].content.decode())
    assert card.data.library_name == "diffusers"
    assert 'DiffusionPipeline.from_pretrained("me/tiny", trust_remote_code=True)' in card.text
    assert torch.equal(generate_two(ClassConditionalPipeline.from_pretrained("me/tiny")), generate_two(pipeline))

    # of two variants one is downloaded
    pipeline.to(torch.float16).push_to_hub("me/tiny", variant="fp16")
    before = len(logged_in.asked("GET", "/cdn/"))
    loaded = ClassConditionalPipeline.from_pretrained("me/tiny", variant="fp16", dtype=torch.float16)
    assert loaded.unet.dtype == torch.float16
    assert {name for name in repository.files if "tensors" in name} == {VARIANT, CODE_AND_WEIGHTS[-2]}
    downloaded = [request.path for request in logged_in.asked("GET", "/cdn/")[before:]]
    assert downloaded == [f"/cdn/{repository.files[VARIANT].oid}"]


def test_arguments_reach_the_hub(online, pipeline):
    token = "hf_loopback"
    pipeline.push_to_hub("tiny", "First words", True, token)
    repository = online.repositories["me/tiny"]
    first = repository.refs["main"]
    assert (repository.private, repository.commits[first].message) == (True, "First words")
    assert not online.asked("GET", "/cdn")
    assert {request.token for request in online.requests if request.method != "PUT"} == {token}

    pipeline.scheduler = type(pipeline.scheduler)(prediction_type="epsilon")
    pushed = pipeline.push_to_hub("me/tiny", token=token, create_pr=True, commit_message="Noise")
    assert pushed.pr_url == f"{online.url}/me/tiny/discussions/1"
    assert repository.refs["main"] == first
    proposed = ClassConditionalPipeline.from_pretrained("me/tiny", revision="refs/pr/1", token=token)
    assert proposed.scheduler.config.prediction_type == "epsilon"
    assert repository.commits[repository.refs["refs/pr/1"]].message == "Noise"

    pipeline.push_to_hub("me/tiny", token=token, subfolder="noise")
    added = set(repository.files) - set(repository.commits[first].files)
    assert added == {f"noise/{name}" for name in CODE_AND_WEIGHTS}


def test_a_card_that_somebody_wrote_stays(logged_in, pipeline, tmp_path, caplog):
    card = b"---\nlicense: mit\n---\r\nMine."
    repository = logged_in.repositories["me/tiny"] = Repository()
    repository.commit({"README.md": Blob(card)}, "Say what it is")
    write_model_card(pipeline, tmp_path / "tiny")
    for push in (
        lambda: pipeline.push_to_hub("me/tiny"),
        lambda: pipeline.save_pretrained(tmp_path / "tiny", push_to_hub=True, repo_id="me/tiny"),
    ):
        assert not caplog.records
        push()
        assert repository.files["README.md"].content == card
    assert "unet/config.json" in repository.files
    assert "me/tiny keeps its README.md, which somebody has written or changed" in caplog.text


def test_a_card_that_nobody_changed_gives_way_to_a_better_one(logged_in, pipeline, tmp_path):
    def card() -> str:
        return logged_in.repositories["me/tiny"].files["README.md"].content.decode()

    def push(steps: int) -> str:
        write_model_card(pipeline, tmp_path, training_facts={"steps": steps})
        pipeline.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/tiny")
        return card()

    pipeline.push_to_hub("me/tiny")
    first = push(100)
    assert "| steps | 100 |" in first
    assert 'from_pretrained("me/tiny"' in first
    # a push without a card of its own does not take that away
    pipeline.push_to_hub("me/tiny")
    assert card() == first
    assert "| steps | 200 |" in push(200)
    repository = logged_in.repositories["me/tiny"]
    changed = card().replace("## Limits", "## What it cannot do")
    repository.commit({**repository.files, "README.md": Blob(changed.encode())}, "In my words")
    assert push(300) == changed


def test_a_folder_with_its_card(logged_in, pipeline, tmp_path):
    images = pipeline([0, 1, 2], generator=seeded(0, 1, 2), num_inference_steps=3).images
    grid = image_grid(images, ["tabby", "goldfish", "crane"], columns=3)
    folder = tmp_path / "tiny"
    write_model_card(pipeline, folder, samples=grid, training_facts={"steps": 3})
    (folder / ".secrets").write_text("password")
    # the folder's own name, where no id is given
    pipeline.save_pretrained(folder, push_to_hub=True, commit_message="All of it")

    repository = logged_in.repositories["me/tiny"]
    assert sorted(repository.files) == sorted([*WHOLE, "samples.png"])
    assert repository.commits[repository.refs["main"]].message == "All of it"
    card = repository.files["README.md"].content.decode()
    assert "![Images generated by this model](samples.png)" in card
    assert '"me/tiny"' in card
    assert UNKNOWN_REPO_ID not in card
    with Image.open(io.BytesIO(repository.files["samples.png"].content)) as sent:
        np.testing.assert_array_equal(np.asarray(sent), np.asarray(grid))


@pytest.mark.parametrize(
    ("fault", "status"), [(("POST", "/commit/"), 500), (("PUT", "/upload/"), 403), (("POST", "/preupload/"), 403)]
)
def test_a_push_that_fails_changes_nothing(logged_in, pipeline, fault, status):
    pipeline.push_to_hub("me/tiny")
    before = dict(logged_in.repositories["me/tiny"].refs)
    torch.nn.init.ones_(pipeline.unet.head.conv.weight)
    logged_in.faults[fault] = status
    # the client's own: a RuntimeError for a large file, else an OSError
    with pytest.raises((OSError, RuntimeError)):
        pipeline.push_to_hub("me/tiny")
    assert logged_in.repositories["me/tiny"].refs == before
    logged_in.faults.clear()
    pipeline.push_to_hub("me/tiny")
    assert ClassConditionalPipeline.from_pretrained("me/tiny").unet.head.conv.weight.eq(1).all()


def test_strangers_and_classes_without_a_file_cannot_be_pushed(online, pipeline):
    with pytest.raises(OSError, match="401"):
        pipeline.push_to_hub("me/tiny", token="hf_wrong")
    exec("from diffusers import DDIMScheduler\nclass Mine(DDIMScheduler): pass", scope := {})
    scope["Mine"].__module__ = "notebook"
    pipeline.scheduler = scope["Mine"].from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="Mine is defined in no file that could be saved with the pipeline"):
        pipeline.push_to_hub("me/tiny")
    assert online.repositories == {}
