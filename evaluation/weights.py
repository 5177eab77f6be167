"""Published weights of extractors: named by a path, or fetched once into the Hugging Face cache."""

import dataclasses
import hashlib
import http.client
import logging
import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import cached_assets_path, constants
from tqdm.auto import tqdm

from ..utils.atomic_write import atomic_file, only_writer


logger = logging.getLogger(__name__)

MIRROR_VARIABLE = "IMAGENET64_WEIGHTS_MIRROR"
_TIMEOUT_SECONDS = 60
# how long one process waits while another fetches the file
_WAITING_SECONDS = 3600


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """A published file: its name (also in the cache and on a mirror), its URL, and the first digits of its SHA-256."""

    name: str
    url: str
    sha256: str


# The Inception of 2015-12-05 that the usual FID is taken with, as TorchScript, from StyleGAN2-ADA. The digest is the
# one that k-diffusion checks its download against.
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


def find_weights(
    published: WeightsFile, path: str | Path | None = None, cache_dir: str | Path | None = None
) -> tuple[Path, str]:
    """The place and the SHA-256 (64 hexadecimal digits) of a file of weights.

    Without a path the file comes from the cache, where it is fetched to from its URL, or from the mirror that the
    environment variable IMAGENET64_WEIGHTS_MIRROR names, a URL under which it has the same name. It is kept if its
    SHA-256 is right, which is checked again each time; of several processes one fetches and the others wait.

    A file named by its path is used whatever its SHA-256 is, with a warning if it is not the published one. Loading
    TorchScript runs the code in the file, so name only files that you trust.

    Args:
        published: The file.
        path: The file elsewhere, or the folder that holds it; None for the cache.
        cache_dir: The folder of the cache; by default ``imagenet64_diffusion`` among the assets in HF_HOME.

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
    if cache_dir is None:
        cache_dir = cached_assets_path("imagenet64_diffusion", namespace="evaluation", subfolder="weights")
    file = Path(cache_dir) / published.name
    cached = _cached_digest(published, file)
    if cached is None:
        # the lock of a name that nothing has
        with only_writer(file.with_name(f"{file.name}.fetching"), waiting_seconds=_WAITING_SECONDS):
            # another process may have fetched it meanwhile
            cached = _cached_digest(published, file) or _fetch(published, file)
    return file, cached


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
            total = int(response.headers.get("Content-Length") or 0) or None
            with writing.open("wb") as opened, tqdm.wrapattr(opened, "write", total, desc=published.name) as target:
                shutil.copyfileobj(response, target, 1 << 20)
            # a connection that broke is seen by it too
            digest = file_digest(writing)
            if not digest.startswith(published.sha256):
                raise ValueError(
                    f"{url} gave {writing.stat().st_size:,} bytes whose SHA-256 is {digest} instead of"
                    f" {published.sha256}: not kept; {advice}"
                )
    except (OSError, http.client.HTTPException) as error:
        # urllib puts the system's reason into its own error
        reason = error.reason if type(error) is urllib.error.URLError else error
        reason = " ".join(str(reason).split()) or type(reason).__name__
        raise OSError(f"{published.name} cannot be fetched from {url} ({reason}): {advice}") from error
    return digest


def file_digest(*files: Path) -> str:
    """The SHA-256 of a file, or of several one after the other, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
