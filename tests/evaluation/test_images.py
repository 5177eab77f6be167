import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from imagenet64_diffusion.data.dataset import PreparedImages
from imagenet64_diffusion.data.errors import DataError
from imagenet64_diffusion.data.image_source import convert_image
from imagenet64_diffusion.evaluation.images import open_images

from .conftest import make_pixels, write_images


LABELS = torch.arange(23) % 5


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    """23 images of 16x16, a number that no batch size divides."""
    return make_pixels(0, count=23, size=16)


def write_saved_dataset(folder, pixels, splits=("train",)):
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=list("abcde"))})
    images = [PIL.Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pixels]
    dataset = datasets.Dataset.from_dict({"photo": images, "kind": LABELS.tolist()}, features=features)
    datasets.DatasetDict(dict.fromkeys(splits, dataset)).save_to_disk(folder)


@pytest.fixture(params=["folder", "saved dataset", "parquet", "npz", "compressed npz", "two npz", "prepared"])
def source(request, pixels, tmp_path, prepared):
    """A source of each kind, its pixels, its labels and how it is opened."""
    arrays = {"arr_0": pixels.permute(0, 2, 3, 1).numpy(), "arr_1": LABELS.numpy()}
    folder = tmp_path / "images"
    options = {}
    match request.param:
        case "folder":
            # in one folder and in folders in it; 2 comes before 10
            for start in (0, 12):
                write_images(folder / f"part {start}", pixels[start : start + 12])
            (folder / "notes.txt").write_text("no image")
            (folder / ".hidden.png").write_text("no image")
            return folder, pixels, None, options
        case "saved dataset":
            write_saved_dataset(folder, pixels, ("test", "validation"))
            options = {"split": "validation"}
        case "parquet":
            write_saved_dataset(tmp_path / "saved", pixels)
            folder.mkdir()
            datasets.load_from_disk(tmp_path / "saved")["train"].to_parquet(folder / "train.parquet")
        case "npz":
            folder = tmp_path / "images.npz"
            np.savez(folder, **arrays)
        case "compressed npz":
            folder = tmp_path / "images.npz"
            np.savez_compressed(folder, arr_0=arrays["arr_0"])
            return folder, pixels, None, options
        case "two npz":
            folder.mkdir()
            for name, rows in (("part2.npz", slice(15)), ("part10.npz", slice(15, None))):
                np.savez(folder / name, **{key: value[rows] for key, value in arrays.items()})
        case "prepared":
            batch = PreparedImages(prepared)[range(96)]
            return prepared, batch["pixel_values"], batch["class_labels"], options
    return folder, pixels, LABELS, options


def test_every_source_gives_its_images_in_any_stretches(source):
    path, pixels, labels, options = source
    images = open_images(path, **options)
    assert len(images) == len(pixels)
    assert images.image_size == tuple(pixels.shape[1:])
    # forwards, on, back, across the end of a file, nothing, all
    for start, stop in [(0, 5), (5, 9), (20, 23), (3, 4), (10, 18), (7, 7), (0, len(pixels))]:
        found = images.read(start, stop)
        assert found.pixels.dtype == torch.uint8
        assert torch.equal(found.pixels, pixels[start:stop])
        if labels is None:
            assert found.labels is None
        else:
            assert found.labels.dtype == torch.int64
            assert torch.equal(found.labels, labels[start:stop])
    for start, stop in [(-1, 3), (5, 4), (0, len(pixels) + 1)]:
        with pytest.raises(IndexError, match=f"{len(pixels)} images: there is no stretch from {start} to {stop}"):
            images.read(start, stop)
    # the same for who opens it next
    assert len(images.fingerprint) >= 16
    assert open_images(str(path), **options).fingerprint == images.fingerprint


def test_fingerprints_are_of_images_and_their_order(pixels, tmp_path):
    def of_folder(name, chosen, **options):
        write_images(tmp_path / name, chosen)
        return open_images(tmp_path / name, **options).fingerprint

    def of_npz(name, chosen, labels=LABELS):
        np.savez(tmp_path / name, images=chosen.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
        return open_images(tmp_path / name).fingerprint

    changed = pixels.clone()
    changed[3, 0, 0, 0] ^= 1
    for fingerprint, end, fewer_labels in ((of_folder, "", {}), (of_npz, ".npz", {"labels": LABELS[1:]})):
        first = fingerprint(f"first{end}", pixels)
        assert fingerprint(f"copy{end}", pixels) == first
        assert fingerprint(f"changed{end}", changed) != first
        assert fingerprint(f"turned{end}", pixels.flip(0)) != first
        assert fingerprint(f"fewer{end}", pixels[1:], **fewer_labels) != first
    assert of_npz("labels.npz", pixels, LABELS.flip(0)) == of_npz("copy.npz", pixels)
    assert of_folder("first", pixels, resolution=8) != of_folder("first", pixels)


def test_other_sizes_are_made_as_they_are_prepared(pixels, tmp_path):
    write_images(tmp_path / "images", pixels[:3])
    wide = PIL.Image.fromarray(make_pixels(1, count=1, size=40)[0].permute(1, 2, 0).numpy()[:30])
    wide.save(tmp_path / "images" / "wide.png")
    images = open_images(tmp_path / "images")
    assert torch.equal(images.read(0, 3).pixels, pixels[:3])
    with pytest.raises(DataError, match=r"wide.png is 40x30 pixels \(width x height\), but the first .* is 16x16"):
        images.read(0, 4)
    images = open_images(tmp_path / "images", resolution=8)
    assert images.image_size == (3, 8, 8)
    expected = convert_image(wide, 8, "box")
    assert np.array_equal(images.read(3, 4).pixels[0], expected)
    grey = open_images(tmp_path / "images", resolution=8, color_mode="grayscale").read(0, 4).pixels
    assert grey.shape == (4, 1, 8, 8)


def test_a_dataset_without_whole_labels_is_opened_without(pixels, tmp_path):
    images = [PIL.Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pixels]
    columns = {"image": images, "label": [-1] * 23, "caption": ["text"] * 23}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "test")
    opened = open_images(tmp_path / "test")
    assert opened.read(0, 3).labels is None


def test_broken_images_are_named(pixels, tmp_path):
    files = write_images(tmp_path / "images", pixels[:4])
    files[2].write_bytes(files[2].read_bytes()[:100])
    images = open_images(tmp_path / "images")
    assert len(images.read(0, 2).pixels) == 2
    with pytest.raises(DataError, match=f"{files[2].name} is not a readable image"):
        images.read(1, 4)

    np.savez(tmp_path / "images.npz", images=pixels.permute(0, 2, 3, 1).numpy())
    content = bytearray((tmp_path / "images.npz").read_bytes())
    content[2000] ^= 1
    (tmp_path / "images.npz").write_bytes(content)
    images = open_images(tmp_path / "images.npz")
    for _ in range(2):
        with pytest.raises(DataError, match=r"images.npz .* cannot be read"):
            images.read(0, 23)


def test_wrong_sources(pixels, tmp_path, prepared):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a")
    (tmp_path / "notes" / "b").write_text("b")
    np.savez(tmp_path / "images.npz", images=pixels.permute(0, 2, 3, 1).numpy())
    np.savez(tmp_path / "other.npz", mu=np.ones(4))
    write_images(tmp_path / "images", pixels[:2])
    for path, options, message in [
        (tmp_path / "absent", {}, "absent: no such file or folder, and it cannot be the id of a Hub dataset either"),
        ("absent.npz", {}, "absent.npz: no such file or folder"),
        (tmp_path / "empty", {}, "empty holds nothing, but must hold images, .npz files, a dataset, or what"),
        (tmp_path / "notes", {}, "notes holds .txt, files without ending, but must hold images"),
        (tmp_path / "notes" / "a.txt", {}, "a.txt is a file, but images are read from .npz files, folders and"),
        (tmp_path / "other.npz", {}, 'other.npz has no array "images" or "arr_0": it holds "mu"'),
        (
            tmp_path / "images.npz",
            {"resolution": 8},
            "resolution is 8, but .*images.npz is a set of .npz images, which has no",
        ),
        (tmp_path / "images", {"split": "test"}, "split is test, but .* is a folder of images, which has no such"),
    ]:
        with pytest.raises(DataError, match=message):
            open_images(path, **options)
