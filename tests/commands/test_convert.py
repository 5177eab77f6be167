"""imagenet64-convert, as its users run it."""

import pickle
import shutil
from pathlib import Path

import pytest

from imagenet64_diffusion import ClassConditionalPipeline
from imagenet64_diffusion.convert_checkpoints import main
from imagenet64_diffusion.tests.conversion import originals
from imagenet64_diffusion.tests.conversion.originals import write_small


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_one_checkpoint_there_and_back(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for file in (originals.model_file("res"), originals.params_file("res")):
        shutil.copy(file, tmp_path)
    originals.unpack_optimizer("res", tmp_path)
    Path("names.txt").write_text("\n".join("abcdefghij"))
    arguments = ["--optimizer", "optim_3e_2s.pkl", "--time_embedding", "original_alternating"]
    arguments += ["--id2label", "names.txt", "--variant", "x", "--finish_denoising", "true"]
    assert main(["--checkpoint", "model_3e_2s.pkl", "--output_dir", "out/res", *arguments]) == 0
    assert "checkpoints/checkpoint-2" in capsys.readouterr().out
    pipeline = ClassConditionalPipeline.from_pretrained("out/res", variant="x")
    assert pipeline.unet.config.time_embedding_type == "original_alternating"
    assert (pipeline.labels["j"], pipeline.scheduler.config.set_alpha_to_one) == (9, True)

    assert main(["--to_original", "--checkpoint", "out/res", "--output_dir", "back", "--variant", "x"]) == 0
    assert names(tmp_path / "back") == ["model_3e_2s.pkl", "model_params_3e_2s.json"]


def test_a_folder_of_checkpoints(tmp_path, capsys):
    """Each with what lies beside it; a bad one is reported and does not keep the others from being converted."""
    models, out = tmp_path / "models", tmp_path / "out"
    for recipe in ("res", "res_conv"):
        (models / recipe).mkdir(parents=True)
        for file in (originals.model_file(recipe), originals.params_file(recipe)):
            shutil.copy(file, models / recipe)
    originals.unpack_optimizer("res", models / "res")
    write_small(models / "res_bad")[0].write_bytes(b"<!DOCTYPE html>")
    for name in ("model_4e_9s.pkl", "best.pkl"):
        shutil.copy(originals.model_file("res"), models / name)

    assert main(["--checkpoint", str(models), "--output_dir", str(out)]) == 2
    printed = capsys.readouterr()
    assert printed.err.strip().splitlines()[-1] == "error: 2 of 4 checkpoints could not be converted"
    assert (names(out), names(out / "res")) == (["res", "res_conv"], ["3e_2s"])
    assert (out / "res" / "3e_2s" / "checkpoints" / "checkpoint-2").is_dir()
    assert not (out / "res_conv" / "3e_2s" / "checkpoints").exists()
    table = printed.out.split("\n\n")[-1].splitlines()
    assert [line.split()[:2] for line in table] == [
        ["checkpoint", "result"],
        ["model_4e_9s.pkl", "failed"],
        ["res/model_3e_2s.pkl", "converted"],
        ["res_bad/model_1e_7s.pkl", "failed"],
        ["res_conv/model_3e_2s.pkl", "converted"],
    ]
    assert "model_params_4e_9s.json" in table[1]
    assert "is a web page" in table[3]


def test_an_attack(tmp_path, capsys):
    small, marker = write_small(tmp_path / "small"), tmp_path / "marker"
    attack = b"\x80\x02cposix\nsystem\n" + originals.text(f"touch {marker}") + b"\x85R."
    pickle.loads(attack)
    marker.unlink()
    small[0].write_bytes(attack)
    assert main(["--checkpoint", str(small[0]), "--output_dir", str(tmp_path / "out" / "x")]) == 2
    assert capsys.readouterr().err.startswith("error: model_1e_7s.pkl wants posix.system")
    assert names(tmp_path) == ["small"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nothing.pkl"], "there is no file nothing.pkl"),
        (["--checkpoint", "small/other.pkl"], "other.pkl is not named model_...e_...s.pkl"),
        (["--checkpoint", "small/model_1e_8s.pkl"], "there is no small/model_params_1e_8s"),
        (["--family", "adm"], "family is adm, but model_1e_7s.pkl is one of the original program"),
        (["--guidance_checkpoint", "x.pkl"], "guidance_checkpoint is x.pkl, but does not go with a checkpoint"),
        (["--checkpoint", "small", "--family", "original"], "family is original, but does not go with a folder"),
        (["--checkpoint", "empty"], "error: checkpoint is empty, which holds no model_...e_...s.pkl"),
        (["--checkpoint", "small", "--push_to_hub", "me/x"], "push_to_hub is me/x, but does not go with a folder"),
        (["--epoch", "3"], "error: epoch is 3, but does not go with a checkpoint"),
        (["--to_original", "--optimizer", "x.pkl"], "optimizer is x.pkl, but does not go with to_original"),
        (["--to_original", "--dtype", "float16"], "dtype is float16, but does not go with to_original"),
        (["--to_original"], "must be a pipeline folder for to_original"),
        (["--optimizer", "small/model_1e_7s.pkl"], "does not hold an optimizer's state"),
    ],
)
def test_wrong_options(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    small, params = write_small(tmp_path / "small")
    for name in ("other.pkl", "model_1e_8s.pkl"):
        shutil.copy(small, small.with_name(name))
    (tmp_path / "empty").mkdir()
    assert main(["--checkpoint", "small/model_1e_7s.pkl", "--output_dir", "out", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert names(tmp_path) == ["empty", "small"]
    assert names(small.parent) == ["model_1e_7s.pkl", "model_1e_8s.pkl", params.name, "other.pkl"]
