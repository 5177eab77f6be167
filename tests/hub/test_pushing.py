"""push_to_hub and save_pretrained(push_to_hub=True), with the package."""

import re

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from imagenet64_diffusion import ClassConditionalPipeline
from imagenet64_diffusion.pipelines.image_grid import image_grid
from imagenet64_diffusion.pipelines.model_card import UNKNOWN_REPO_ID, write_model_card
from imagenet64_diffusion.tests.commands.runs import ROOT
from imagenet64_diffusion.tests.components import generate_two, make_pipeline, seeded
from imagenet64_diffusion.tests.hub.loopback_hub import TOKEN, Blob, Repository


WHOLE = [
    ".gitattributes",
    "README.md",
    "cached_weights.py",
    "model_index.json",
    "pipeline_class_conditional.py",
    "scheduler/scheduler_config.json",
    "scheduler/scheduling_ddim_eta.py",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/unet_class_conditional.py",
]


def test_there_and_back(online):
    pipeline = make_pipeline()
    pushed = pipeline.push_to_hub("me/tiny", token=TOKEN)
    repository = online.repositories["me/tiny"]
    assert sorted(repository.files) == WHOLE
    assert pushed.oid == repository.refs["main"]
    # the files came in one commit after that which made the repository
    commit = repository.commits[pushed.oid]
    assert len(repository.commits) == 2
    assert commit.message == "Upload ClassConditionalPipeline"
    card = ModelCard(repository.files["README.md"].content.decode())
    assert card.data.library_name == "diffusers"
    assert 'DiffusionPipeline.from_pretrained("me/tiny", trust_remote_code=True)' in card.text

    loaded = ClassConditionalPipeline.from_pretrained("me/tiny")
    assert type(loaded) is ClassConditionalPipeline
    assert torch.equal(generate_two(loaded), generate_two(pipeline))


def test_arguments_reach_the_hub(online):
    pipeline = make_pipeline()
    pipeline.push_to_hub("tiny", "First words", True, TOKEN)
    repository = online.repositories["me/tiny"]
    assert repository.private
    first = repository.refs["main"]
    assert repository.commits[first].message == "First words"
    assert not [request for request in online.requests if request.path.startswith("/cdn")]
    assert {request.token for request in online.requests if request.method != "PUT"} == {TOKEN}

    pipeline.scheduler = type(pipeline.scheduler)(prediction_type="epsilon")
    pushed = pipeline.push_to_hub("me/tiny", token=TOKEN, create_pr=True, commit_message="Noise")
    assert pushed.pr_url == f"{online.url}/me/tiny/discussions/1"
    assert repository.refs["main"] == first
    proposed = ClassConditionalPipeline.from_pretrained("me/tiny", revision="refs/pr/1", token=TOKEN)
    assert proposed.scheduler.config.prediction_type == "epsilon"
    assert repository.commits[repository.refs["refs/pr/1"]].message == "Noise"

    pipeline.push_to_hub("me/tiny", token=TOKEN, subfolder="noise")
    added = set(repository.files) - set(repository.commits[first].files)
    assert added == {f"noise/{name}" for name in WHOLE if name not in (".gitattributes", "README.md")}


def test_variants(online):
    pipeline = make_pipeline()
    pipeline.push_to_hub("me/tiny", token=TOKEN)
    pipeline.to(torch.float16).push_to_hub("me/tiny", token=TOKEN, variant="fp16")
    loaded = ClassConditionalPipeline.from_pretrained("me/tiny", variant="fp16", dtype=torch.float16)
    assert loaded.unet.dtype == torch.float16
    # of the two files of weights one was downloaded
    weights = [blob.oid for name, blob in online.repositories["me/tiny"].files.items() if "safetensors" in name]
    assert len(weights) == 2
    assert [request.path for request in online.asked("GET", "/cdn/")] == [
        f"/cdn/{online.repositories['me/tiny'].files['unet/diffusion_pytorch_model.fp16.safetensors'].oid}"
    ]


def test_a_card_that_somebody_wrote_stays(online, tmp_path, caplog):
    card = b"---\nlicense: mit\n---\r\nMine."
    repository = online.repositories["me/tiny"] = Repository()
    repository.commit({"README.md": Blob(card)}, "Say what it is")
    pipeline = make_pipeline()
    pipeline.push_to_hub("me/tiny", token=TOKEN)
    assert repository.files["README.md"].content == card
    assert "unet/config.json" in repository.files
    assert not caplog.records
    write_model_card(pipeline, tmp_path / "tiny")
    pipeline.save_pretrained(tmp_path / "tiny", push_to_hub=True, repo_id="me/tiny", token=TOKEN)
    assert repository.files["README.md"].content == card
    assert "me/tiny keeps its README.md, which somebody has written or changed" in caplog.text


def test_a_card_that_nobody_changed_gives_way_to_a_better_one(online, tmp_path):
    pipeline = make_pipeline()
    folder = tmp_path / "tiny"

    def push(**facts) -> str:
        write_model_card(pipeline, folder, training_facts=facts)
        pipeline.save_pretrained(folder, push_to_hub=True, repo_id="me/tiny", token=TOKEN)
        return online.repositories["me/tiny"].files["README.md"].content.decode()

    pipeline.push_to_hub("me/tiny", token=TOKEN)
    first = push(steps=100)
    assert "| steps | 100 |" in first
    assert 'from_pretrained("me/tiny"' in first
    # a push without a card of its own does not take that away
    pipeline.push_to_hub("me/tiny", token=TOKEN)
    assert online.repositories["me/tiny"].files["README.md"].content.decode() == first
    assert "| steps | 200 |" in push(steps=200)
    files = dict(online.repositories["me/tiny"].files)
    changed = files["README.md"].content.replace(b"## Limits", b"## What it cannot do")
    online.repositories["me/tiny"].commit(files | {"README.md": Blob(changed)}, "In my words")
    assert push(steps=300) == changed.decode()


def test_a_folder_with_its_card(online, tmp_path):
    pipeline = make_pipeline()
    images = pipeline([0, 1, 2], generator=seeded(0, 1, 2), num_inference_steps=3).images
    grid = image_grid(images, ["tabby", "goldfish", "crane"], columns=3)
    folder = tmp_path / "tiny"
    write_model_card(pipeline, folder, samples=grid, training_facts={"steps": 3})
    (folder / ".secrets").write_text("password")
    pipeline.save_pretrained(folder, push_to_hub=True, repo_id="me/other", token=TOKEN, commit_message="All of it")

    repository = online.repositories["me/other"]
    assert sorted(repository.files) == sorted([*WHOLE, "samples.png"])
    assert repository.commits[repository.refs["main"]].message == "All of it"
    card = repository.files["README.md"].content.decode()
    assert "![Images generated by this model](samples.png)" in card
    assert '"me/other"' in card
    assert UNKNOWN_REPO_ID not in card
    with Image.open(folder / "samples.png") as sent:
        np.testing.assert_array_equal(np.asarray(sent), np.asarray(grid))
    assert repository.files["samples.png"].content == (folder / "samples.png").read_bytes()
    # the folder's own name, where no id is given
    pipeline.save_pretrained(folder, push_to_hub=True, token=TOKEN)
    assert sorted(online.repositories["me/tiny"].files) == sorted([*WHOLE, "samples.png"])


@pytest.mark.parametrize(
    ("fault", "status"), [(("POST", "/commit/"), 500), (("PUT", "/upload/"), 403), (("POST", "/preupload/"), 403)]
)
def test_a_push_that_fails_changes_nothing(online, fault, status):
    pipeline = make_pipeline()
    pipeline.push_to_hub("me/tiny", token=TOKEN)
    before = dict(online.repositories["me/tiny"].refs)
    torch.nn.init.ones_(pipeline.unet.head.conv.weight)
    online.faults[fault] = status
    # the client's own: a RuntimeError for a large file, else an OSError
    with pytest.raises((OSError, RuntimeError)):
        pipeline.push_to_hub("me/tiny", token=TOKEN)
    assert online.repositories["me/tiny"].refs == before
    online.faults.clear()
    pipeline.push_to_hub("me/tiny", token=TOKEN)
    assert torch.equal(
        ClassConditionalPipeline.from_pretrained("me/tiny").unet.head.conv.weight, torch.ones(2, 8, 3, 3)
    )


def test_strangers_cannot_push(online):
    with pytest.raises(OSError, match="401"):
        make_pipeline().push_to_hub("me/tiny", token="hf_wrong")
    assert online.repositories == {}


def test_the_code_in_the_documentation_runs(online, tmp_path, monkeypatch):
    """But for the lines that load without the package: the card has the same, which run in a process of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    make_pipeline().save_pretrained("outputs/demo/model")
    make_pipeline().push_to_hub("your-name/your-model")
    document = (ROOT / "docs" / "hub.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    run = [block for block in blocks if "trust_remote_code" not in block]
    assert len(run) == 3
    for block in run:
        exec(block, {})
    card = online.repositories["your-name/your-model"].files["README.md"].content.decode()
    assert "(samples.png)" in card
    assert "| accuracy |" in card


def test_a_class_without_a_file_cannot_be_pushed(online):
    scope = {}
    exec("from diffusers import DDIMScheduler\nclass Mine(DDIMScheduler): pass", scope)
    scope["Mine"].__module__ = "notebook"
    pipeline = make_pipeline()
    pipeline.scheduler = scope["Mine"].from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="Mine is defined in no file that could be saved with the pipeline"):
        pipeline.push_to_hub("me/tiny", token=TOKEN)
    assert online.repositories == {}
