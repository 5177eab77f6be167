"""Published weights of extractors: named by a path, or fetched once into the Hugging Face cache."""

import hashlib
import http.client
import logging
import os
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import cached_assets_path, constants

from ..utils.atomic_write import only_writer


logger = logging.getLogger(__name__)

MIRROR_VARIABLE = "IMAGENET64_WEIGHTS_MIRROR"


class WeightsFile(NamedTuple):
    """A published file: its name (also in the cache and on a mirror), its URL, and the first digits of its SHA-256."""

    name: str
    url: str
    sha256: str


# The Inception that the usual FID is taken with, from StyleGAN2-ADA; k-diffusion checks the same digest.
INCEPTION_2015 = WeightsFile(
    "inception-2015-12-05.pt",
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
)
# torchvision's Inception_V3_Weights.IMAGENET1K_V1; torchvision publishes eight digits, in the name.
TORCHVISION_INCEPTION = WeightsFile(
    "inception_v3_google-0cc3c7bd.pth",
    "https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth",
    "0cc3c7bd",
)


def find_weights(published: WeightsFile, path: str | Path | None = None) -> tuple[Path, str]:
    """The place and the SHA-256 (64 hexadecimal digits) of a file of weights.

    Without a path, to the file or its folder, it comes from the cache, the assets in HF_HOME, where it is fetched to
    from its URL, or from the mirror that IMAGENET64_WEIGHTS_MIRROR names, a URL under which it has the same name. Its
    SHA-256 is checked each time; of several processes one fetches and the others wait. A file named by its path is
    used whatever it is, with a warning if it is not the published one.

    Raises:
        OSError: There is no such file, or it cannot be fetched. The message says how to name a path.
        ValueError: What the URL gave has another SHA-256, and nothing was kept; or the mirror is no URL.
    """
    if path is not None:
        file = Path(path).expanduser()
        file = file / published.name if file.is_dir() else file
        if not file.is_file():
            raise OSError(f"weights {file}: no such file; it must be a copy of {published.name} from {published.url}")
        digest = file_digest(file)
        if not digest.startswith(published.sha256):
            logger.warning(
                "%s is not the published %s (its SHA-256 is %s instead of %s): the numbers compare only with others"
                " made with the same file",
                *(file, published.name, digest, published.sha256),
            )
        return file, digest
    assets = constants.HF_ASSETS_CACHE
    folder = cached_assets_path("imagenet64_diffusion", "evaluation", "weights", assets_dir=assets)
    file = folder / published.name
    # the lock of a name that nothing has
    with only_writer(folder / f"{file.name}.fetching", waiting_seconds=3600):
        if file.is_file():
            digest = file_digest(file)
            if digest.startswith(published.sha256):
                return file, digest
            logger.warning("%s is damaged (its SHA-256 is %s): fetching it again", file, digest)
        _fetch(published, file)
    return file, file_digest(file)


def _fetch(published: WeightsFile, file: Path) -> None:
    mirror = os.environ.get(MIRROR_VARIABLE)
    url = f"{mirror.rstrip('/')}/{published.name}" if mirror else published.url
    advice = (
        f"fetch {published.url} elsewhere and give its path as the weights, or put it on a mirror that"
        f" {MIRROR_VARIABLE} names"
    )
    if "://" not in url:
        raise ValueError(f"{MIRROR_VARIABLE} is {mirror}, but must be a URL such as https://mirror.example/weights")
    if constants.HF_HUB_OFFLINE:
        raise OSError(f"{published.name} is not in {file.parent}, and HF_HUB_OFFLINE is set: {advice}")
    try:
        torch.hub.download_url_to_file(url, str(file), hash_prefix=published.sha256)
    except RuntimeError as error:
        raise ValueError(f"what {url} gave is not kept ({error}); {advice}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{published.name} cannot be fetched from {url} ({reason}): {advice}") from error


def file_digest(*files: Path) -> str:
    """The SHA-256 of a file, or of several one after the other, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
