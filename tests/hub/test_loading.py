"""from_pretrained of repositories on the Hub, with the package."""

import json

import pytest
import torch
from huggingface_hub import constants, scan_cache_dir

from imagenet64_diffusion import ClassConditionalPipeline
from imagenet64_diffusion.generate_images import main
from imagenet64_diffusion.tests.components import make_pipeline, make_unet
from imagenet64_diffusion.tests.hub.conftest import files_under
from imagenet64_diffusion.tests.hub.loopback_hub import TOKEN, Blob, Repository


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def tiny(online, tmp_path) -> Repository:
    """The repository me/tiny, put there without a push."""
    folder = tmp_path / "saved"
    make_pipeline().save_pretrained(folder)
    repository = online.repositories["me/tiny"] = Repository()
    files = {name: Blob((folder / name).read_bytes(), name.endswith("safetensors")) for name in files_under(folder)}
    repository.commit(files, "Upload")
    return repository


def change(repository: Repository, name: str, content: bytes | None) -> str:
    files = dict(repository.files)
    if content is None:
        del files[name]
    else:
        files[name] = Blob(content, files[name].is_large)
    return repository.commit(files, f"Change {name}")


def load(**options) -> ClassConditionalPipeline:
    return ClassConditionalPipeline.from_pretrained("me/tiny", **options)


def test_no_code_is_downloaded(online, tiny, tmp_path):
    loaded = load()
    assert loaded.config.id2label[1] == "goldfish"
    assert loaded.config._name_or_path == loaded.unet.config._name_or_path == "me/tiny"
    asked = [request.path for request in online.requests if request.method in ("GET", "HEAD")]
    assert any(path.endswith(WEIGHTS) for path in asked)
    assert not [path for path in asked if path.endswith((".py", ".md"))]
    assert not list((tmp_path / "cache").rglob("*.py"))
    # the token of a gated or private repository does not follow to where large files lie
    load(token=TOKEN, force_download=True)
    elsewhere = online.asked("GET", "/cdn/")
    assert [request.token for request in elsewhere] == [None, None]
    assert elsewhere[0].host != online.asked("GET", "/resolve/")[0].host


def test_revision_cache_dir_and_dtype(tiny, tmp_path):
    first = tiny.refs["main"]
    config = json.loads(tiny.files["scheduler/scheduler_config.json"].content)
    change(tiny, "scheduler/scheduler_config.json", json.dumps(config | {"num_train_timesteps": 500}).encode())
    assert load().scheduler.config.num_train_timesteps == 500
    elsewhere = tmp_path / "elsewhere"
    old = load(revision=first, cache_dir=elsewhere, torch_dtype=torch.float16)
    assert old.scheduler.config.num_train_timesteps == 1000
    assert old.unet.dtype == torch.float16
    assert [repo.repo_id for repo in scan_cache_dir(elsewhere).repos] == ["me/tiny"]


def test_offline_and_local_files_only(online, tiny, monkeypatch):
    load()
    asked = len(online.requests)
    load(local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load()
    load(trust_remote_code=True)
    assert len(online.requests) == asked


def test_a_class_of_ones_own(tiny):
    class Mine(ClassConditionalPipeline):
        pass

    assert type(Mine.from_pretrained("me/tiny")) is Mine


def test_renamed(online, tiny):
    online.renamed["me/small"] = "me/tiny"
    assert ClassConditionalPipeline.from_pretrained("me/small").unet.config.num_class_embeds == 3


def test_components_that_are_given_are_not_downloaded(online, tiny):
    unet = make_unet(stem_channels=16)
    assert load(unet=unet).unet is unet
    assert not [request for request in online.requests if "/unet/" in request.path or "/cdn/" in request.path]


def test_a_connection_that_breaks_is_taken_up_again(online, tiny):
    online.cut[tiny.files[WEIGHTS].oid] = 1000
    loaded = load()
    assert len(online.asked("GET", "/cdn/")) == 2
    for name, parameter in make_unet().state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], parameter)


def test_damaged_weights_are_never_used(online, tiny, tmp_path):
    whole = tiny.files[WEIGHTS].content
    digest = tiny.files[WEIGHTS].oid
    online.replaced[digest] = whole[:-100]
    with pytest.raises(OSError, match="me/tiny is not a folder, and cannot be loaded from the Hub: Consistency check"):
        load()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    # as long as announced, but not what was announced: the client does not see it
    online.replaced[digest] = whole[:-1] + bytes([whole[-1] ^ 1])
    for _ in range(2):
        with pytest.raises(OSError, match=f"is damaged: its SHA-256 is .*, but the Hub announced {digest}"):
            load()
    online.replaced.clear()
    with pytest.raises(OSError, match="force_download=True"):
        load()
    assert load(force_download=True).unet.config.num_class_embeds == 3
    # damaged before it was uploaded
    change(tiny, WEIGHTS, whole[:-100])
    with pytest.raises(OSError, match="Unable to load weights from checkpoint file"):
        load()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model_index.json", None, "holds no pipeline: there is no model_index.json"),
        ("model_index.json", b"{", "model_index.json is not JSON"),
        ("model_index.json", b'{"_class_name": "DDPMPipeline"}', "holds a DDPMPipeline, but must hold a ClassCond"),
        ("model_index.json", b'{"_class_name": "ClassConditionalPipeline"}', "has no unet"),
        (
            "model_index.json",
            b'{"_class_name": "ClassConditionalPipeline", "unet": ["diffusers", "UNet2DModel"]}',
            "has a UNet2DModel as its unet, but must have a ClassConditionalUNet2DModel",
        ),
        (WEIGHTS, None, "no file named diffusion_pytorch_model"),
        ("unet/config.json", None, "no file named config.json"),
        ("scheduler/scheduler_config.json", None, "no file named scheduler_config.json"),
    ],
)
def test_repositories_that_are_not_whole(tiny, name, content, message):
    change(tiny, name, content)
    with pytest.raises((ValueError, OSError), match=message):
        load()


def test_the_command_line_takes_an_id(tiny, tmp_path):
    arguments = ["--model", "me/tiny", "--num_inference_steps", "2", "--animation", "false"]
    assert main([*arguments, "--output_dir", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["model"] == "me/tiny"


def test_reasons(online, tiny, monkeypatch, capsys, tmp_path):
    """One line for each, as the command line prints it."""

    def reason(model: str = "me/tiny") -> str:
        assert main(["--model", model, "--output_dir", str(tmp_path / "out")]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    def cannot(why: str, model: str = "me/tiny") -> None:
        found = reason(model)
        assert found.startswith(f"error: {model} is not a folder, and cannot be loaded from the Hub: {why}"), found

    cannot("there is none of that name, or it is private", "no/such")
    assert reason("outputs/nothing/model") == (
        "error: outputs/nothing/model is not a folder, and cannot be the id of a Hub repository either"
    )
    tiny.private = True
    cannot("there is none of that name, or it is private and needs a token")
    tiny.private, tiny.gated = False, True
    cannot("it is gated; accept its conditions on its page")
    tiny.gated = False
    with pytest.raises(OSError, match="it has no such revision"):
        load(revision="v2")
    with pytest.raises(OSError, match="local_files_only is set, and the cache has no whole copy"):
        load(local_files_only=True, cache_dir=tmp_path / "other")
    online.faults["GET", "/api/models/me/tiny"] = 503
    cannot("the Hub does not answer as it should (Server error '503")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cannot("HF_HUB_OFFLINE is set, and the cache has no whole copy")
    cannot("HF_HUB_OFFLINE is set, and the cache has no whole copy", "no/such")
    assert not (tmp_path / "out").exists()
