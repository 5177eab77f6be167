"""A training that ends on the Hub, and one that begins there."""

import pytest
from huggingface_hub import ModelCard

from imagenet64_diffusion import ClassConditionalPipeline
from imagenet64_diffusion.train_imagenet64 import main


SMALL = ("--layer_types", "resnet", "--stem_channels", "8", "--block_out_channels", "8")
SMALL += ("--time_embed_dim", "8", "--class_embed_dim", "8")


@pytest.fixture
def train(prepared, tmp_path):
    """Trains for two steps, in this process, which knows the loopback Hub."""

    def run(name, *arguments):
        options = ["--train_data_dir", str(prepared), "--output_dir", str(tmp_path / name), "--max_train_steps", "2"]
        options += ["--train_batch_size", "4", "--num_inference_steps", "2", "--num_sample_classes", "2"]
        options += ["--num_samples_per_class", "1", "--report_to", "none", "--lr_warmup_steps", "0"]
        return main([*options, *arguments])

    return run


def test_from_training_to_the_hub_and_on(logged_in, train, tmp_path, capfd):
    assert train("first", *SMALL, "--push_to_hub", "--hub_model_id", "me/first", "--hub_private_repo") == 0
    repository = logged_in.repositories["me/first"]
    assert repository.private
    assert repository.commits[repository.refs["main"]].message == "Step 2"
    assert "samples.png" in repository.files
    card = ModelCard(repository.files["README.md"].content.decode()).text
    for fact in ("optimizer steps | 2 |", "images per step | 4 |", "began from | random weights |", '("me/first"'):
        assert fact in card

    assert train("second", "--pretrained_model_name_or_path", "me/first", "--learning_rate", "1e-9") == 0
    assert "training from me/first" in capfd.readouterr().out
    models = [ClassConditionalPipeline.from_pretrained(tmp_path / name / "model") for name in ("first", "second")]
    first, second = (model.unet.state_dict() for model in models)
    for name, weight in first.items():
        # two steps of a billionth
        assert (weight - second[name]).abs().max() < 1e-7, name
    assert models[0].scheduler.config == models[1].scheduler.config
    assert "| began from | me/first |" in (tmp_path / "second" / "model" / "README.md").read_text()


def test_a_hub_that_refuses_is_found_before_the_first_step(online, train, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    assert train("refused", *SMALL, "--push_to_hub", "--hub_model_id", "me/refused") == 2
    error = capfd.readouterr().err
    assert error.count("error: ") == 1
    assert "401" in error
    assert not (tmp_path / "refused" / "model").exists()
    assert not (tmp_path / "refused" / "metrics.jsonl").exists()
