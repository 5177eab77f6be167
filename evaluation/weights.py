"""Published weights of extractors: named by a path, or fetched once into the Hugging Face cache."""

import http.client
import logging
import os
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import cached_assets_path, constants

from ..utils.atomic_write import only_writer
from ..utils.file_digest import file_digest


logger = logging.getLogger(__name__)

MIRROR_VARIABLE = "IMAGENET64_WEIGHTS_MIRROR"


class WeightsFile(NamedTuple):
    """A published file, of whose SHA-256 the first digits are enough; its name is also that in the cache."""

    url: str
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


# The Inception that the usual FID is taken with, from StyleGAN2-ADA; k-diffusion checks the same digest.
INCEPTION_2015 = WeightsFile(
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
)
# torchvision's Inception_V3_Weights.IMAGENET1K_V1; torchvision publishes eight digits, in the name.
TORCHVISION_INCEPTION = WeightsFile("https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth", "0cc3c7bd")


def find_weights(published: WeightsFile, path: str | Path | None = None) -> tuple[Path, str]:
    """The place and the SHA-256 of a file of weights: the named one, whatever it is, or the published one.

    That is in the assets of HF_HOME, where one of several processes fetches it to, from its URL or a mirror.
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
        mirror = os.environ.get(MIRROR_VARIABLE)
        url = f"{mirror.rstrip('/')}/{published.name}" if mirror else published.url
        try:
            if constants.HF_HUB_OFFLINE:
                raise OSError("HF_HUB_OFFLINE is set")
            torch.hub.download_url_to_file(url, str(file), hash_prefix=published.sha256)
        # RuntimeError: another SHA-256, of which nothing is kept; ValueError: the mirror is no URL
        except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise OSError(
                f"{published.name} is not in {folder} and cannot be fetched from {url} ({reason}): fetch"
                f" {published.url} elsewhere and give its path as the weights, or put it on a mirror that"
                f" {MIRROR_VARIABLE} names, a URL"
            ) from error
    return file, file_digest(file)
