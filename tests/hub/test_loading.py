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


WEIGHTS, SCHEDULER = "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Blob]:
    folder = tmp_path_factory.mktemp("saved")
    make_pipeline().save_pretrained(folder)
    return {name: Blob((folder / name).read_bytes(), name.endswith("safetensors")) for name in files_under(folder)}


@pytest.fixture
def tiny(online, saved) -> Repository:
    """The repository me/tiny, put there without a push."""
    repository = online.repositories["me/tiny"] = Repository()
    repository.commit(saved, "Upload")
    return repository


def change(repository: Repository, name: str, content: bytes | None) -> None:
    files = dict(repository.files)
    old = files.pop(name)
    repository.commit(files if content is None else {**files, name: Blob(content, old.is_large)}, f"Change {name}")


def load(**options) -> ClassConditionalPipeline:
    return ClassConditionalPipeline.from_pretrained("me/tiny", **options)


def test_no_code_is_downloaded(online, tiny, tmp_path):
    loaded = load()
    assert loaded.config.id2label[1] == "goldfish"
    assert loaded.config._name_or_path == loaded.unet.config._name_or_path == "me/tiny"
    asked = [request.path for request in online.requests]
    assert any(path.endswith(WEIGHTS) for path in asked)
    assert not [path for path in asked if path.endswith((".py", ".md"))]
    assert not list((tmp_path / "cache").rglob("*.py"))
    # the token of a gated or private repository does not follow to where large files lie
    load(token=TOKEN, force_download=True)
    elsewhere = online.asked("GET", "/cdn/")
    assert [request.token for request in elsewhere] == [None, None]
    assert elsewhere[0].host != online.asked("GET", "/resolve/")[0].host


def test_revision_cache_dir_and_dtype(tiny, tmp_path):
    first, elsewhere = tiny.refs["main"], tmp_path / "elsewhere"
    config = json.loads(tiny.files[SCHEDULER].content)
    change(tiny, SCHEDULER, json.dumps(config | {"num_train_timesteps": 500}).encode())
    assert load().scheduler.config.num_train_timesteps == 500
    old = load(revision=first, cache_dir=elsewhere, torch_dtype=torch.float16)
    assert (old.scheduler.config.num_train_timesteps, old.unet.dtype) == (1000, torch.float16)
    assert [repo.repo_id for repo in scan_cache_dir(elsewhere).repos] == ["me/tiny"]


def test_offline_and_local_files_only(online, tiny, monkeypatch):
    load()
    asked = len(online.requests)
    load(local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load(trust_remote_code=True)
    assert len(online.requests) == asked


def test_a_class_and_a_network_of_ones_own(online, tiny):
    class Mine(ClassConditionalPipeline):
        pass

    online.renamed["me/small"] = "me/tiny"
    unet = make_unet(stem_channels=16)
    loaded = Mine.from_pretrained("me/small", unet=unet)
    assert type(loaded) is Mine
    assert loaded.unet is unet
    # what is given is not downloaded
    assert not [request for request in online.requests if "/unet/" in request.path or "/cdn/" in request.path]


def test_a_connection_that_breaks_is_taken_up_again(online, tiny):
    online.cut[tiny.files[WEIGHTS].oid] = 1000
    weights = load().unet.state_dict()
    assert len(online.asked("GET", "/cdn/")) == 2
    assert all(torch.equal(weights[name], parameter) for name, parameter in make_unet().state_dict().items())


def test_damaged_weights_are_never_used(online, tiny, tmp_path):
    whole, digest = tiny.files[WEIGHTS].content, tiny.files[WEIGHTS].oid
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


def index(**entries) -> bytes:
    return json.dumps({"_class_name": "ClassConditionalPipeline", **entries}).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model_index.json", None, "holds no pipeline: there is no model_index.json"),
        ("model_index.json", b"{", "model_index.json is not JSON"),
        ("model_index.json", index(_class_name="DDPMPipeline"), "holds a DDPMPipeline, but must hold a ClassCond"),
        ("model_index.json", index(unet=["diffusers", "UNet1DModel"]), "has a UNet1DModel as its unet, but must have"),
        (WEIGHTS, None, "no file named diffusion_pytorch_model"),
        ("unet/config.json", None, "no file named config.json"),
        (SCHEDULER, None, "no file named scheduler_config.json"),
    ],
)
def test_repositories_that_are_not_whole(tiny, name, content, message):
    change(tiny, name, content)
    with pytest.raises((ValueError, OSError), match=message):
        load()
    with pytest.raises(ValueError, match="unknown arguments of from_pretrained: colour"):
        load(colour="blue")


def test_reasons(online, tiny, monkeypatch, capsys, tmp_path):
    """One line for each, as the command line prints it."""

    def cannot(why: str, model: str = "me/tiny") -> None:
        assert main(["--model", model, "--output_dir", str(tmp_path / "out")]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert lines[0].startswith(f"error: {model} is not a folder, and cannot {why}"), lines

    cannot("be loaded from the Hub: there is none of that name, or it is private", "no/such")
    cannot("be loaded from the Hub: this cannot be the id of a repository", "outputs/nothing/model")
    tiny.private = True
    cannot("be loaded from the Hub: there is none of that name, or it is private and needs a token")
    tiny.private, tiny.gated = False, True
    cannot("be loaded from the Hub: it is gated; accept its conditions on its page")
    tiny.gated = False
    with pytest.raises(OSError, match="it has no such revision"):
        load(revision="v2")
    with pytest.raises(OSError, match="local_files_only is set, and the cache has no whole copy"):
        load(local_files_only=True, cache_dir=tmp_path / "other")
    online.faults["GET", "/api/models/me/tiny"] = 503
    cannot("be loaded from the Hub: the Hub does not answer as it should (Server error '503")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cannot("be loaded from the Hub: HF_HUB_OFFLINE is set, and the cache has no whole copy", "no/such")
    assert not (tmp_path / "out").exists()
