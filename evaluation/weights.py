"""Published weights of extractors: named by a path, or fetched once into the Hugging Face cache."""

import dataclasses
import hashlib
import http.client
import logging
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import cached_assets_path, constants
from tqdm import tqdm

from ..utils.atomic_write import atomic_file, only_writer


logger = logging.getLogger(__name__)

MIRROR_VARIABLE = "IMAGENET64_WEIGHTS_MIRROR"

_BLOCK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 60
# How long one process waits while another fetches the file.
_WAITING_SECONDS = 3600


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """A published file.

    Attributes:
        name: its name, which is also its name in the cache and on a mirror.
        url: where it is published.
        sha256: its SHA-256, or as many of the first digits as are published.
    """

    name: str
    url: str
    sha256: str


# The Inception of 2015-12-05 that the usual FID is measured with, as TorchScript, from StyleGAN2-ADA. The
# digest is the one that k-diffusion checks its download against.
INCEPTION_2015 = WeightsFile(
    "inception-2015-12-05.pt",
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
)
# torchvision's Inception_V3_Weights.IMAGENET1K_V1; of its digest torchvision publishes eight digits, in the
# name.
TORCHVISION_INCEPTION = WeightsFile(
    "inception_v3_google-0cc3c7bd.pth",
    "https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth",
    "0cc3c7bd",
)


def find_weights(
    published: WeightsFile, path: str | Path | None = None, cache_dir: str | Path | None = None
) -> tuple[Path, str]:
    """The place and the SHA-256 of a file of weights.

    Without a path the file comes from the cache. Where it is not there yet, it is fetched from its URL, or
    from the mirror that the environment variable IMAGENET64_WEIGHTS_MIRROR names, a URL under which it has
    the same name. It is written under another name and takes its own when its SHA-256 is right; of several
    processes of a machine one fetches and the others wait. What is in the cache is checked again each time.

    A file named by its path is used whatever its SHA-256 is, with a warning if it is not the published one.
    For TorchScript this matters: loading such a file runs the code in it, so name only files that you trust.

    Args:
        published: the file.
        path: the file elsewhere, or the folder that holds it; None for the cache.
        cache_dir: the folder of the cache; by default ``imagenet64_diffusion`` among the assets in HF_HOME.

    Returns:
        The path, and 64 hexadecimal digits.

    Raises:
        OSError: there is no such file, or it cannot be fetched. The message says how to name a path.
        ValueError: what the URL gave has another SHA-256, and nothing was kept; or the mirror is no URL.
    """
    if path is not None:
        return _check_named_file(published, Path(path).expanduser())
    if cache_dir is None:
        cache_dir = cached_assets_path("imagenet64_diffusion", namespace="evaluation", subfolder="weights")
    file = Path(cache_dir) / published.name
    if (digest := _cached_digest(published, file)) is not None:
        return file, digest
    # the lock of a name that nothing has
    with only_writer(file.with_name(f"{file.name}.fetching"), waiting_seconds=_WAITING_SECONDS):
        # another process may have fetched it meanwhile
        digest = _cached_digest(published, file) or _fetch(published, file)
    return file, digest


def _check_named_file(published: WeightsFile, file: Path) -> tuple[Path, str]:
    if file.is_dir():
        file = file / published.name
    if not file.is_file():
        raise OSError(f"weights {file}: no such file; it must be a copy of {published.name} from {published.url}")
    digest = file_digest(file)
    if not digest.startswith(published.sha256):
        logger.warning(
            "%s is not the published %s (its SHA-256 is %s instead of %s): the numbers compare only with others made"
            " with the same file",
            *(file, published.name, digest, published.sha256),
        )
    return file, digest


def _cached_digest(published: WeightsFile, file: Path) -> str | None:
    """The SHA-256 of a cached file, if it is there and whole."""
    if not file.is_file():
        return None
    digest = file_digest(file)
    if digest.startswith(published.sha256):
        return digest
    logger.warning("%s is damaged (its SHA-256 is %s): fetching it again", file, digest)
    return None


def _fetch(published: WeightsFile, file: Path) -> str:
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
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response, atomic_file(file) as writing:
            with writing.open("wb") as opened:
                digest = _copy(response, opened, published.name)
            if not digest.startswith(published.sha256):
                raise ValueError(
                    f"{url} gave a file whose SHA-256 is {digest} instead of {published.sha256}: not kept; {advice}"
                )
    except (OSError, http.client.HTTPException) as error:
        # urllib puts the system's reason into its own error
        reason = error.reason if type(error) is urllib.error.URLError else error
        reason = " ".join(str(reason).split()) or type(reason).__name__
        raise OSError(f"{published.name} cannot be fetched from {url} ({reason}): {advice}") from error
    return digest


def _copy(response: http.client.HTTPResponse, opened: BinaryIO, name: str) -> str:
    """Copies an answer to a file and returns its SHA-256."""
    digest = hashlib.sha256()
    total = int(response.headers.get("Content-Length") or 0)
    copied = 0
    with tqdm(desc=name, total=total or None, unit="B", unit_scale=True, disable=None) as bar:
        while block := response.read(_BLOCK_BYTES):
            opened.write(block)
            digest.update(block)
            bar.update(len(block))
            copied += len(block)
    # reading in blocks ends without an error where the connection breaks
    if copied < total:
        raise ConnectionError(f"the connection broke after {copied:,} of {total:,} bytes")
    return digest.hexdigest()


def file_digest(*files: Path) -> str:
    """The SHA-256 of a file, or of several one after the other, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()
