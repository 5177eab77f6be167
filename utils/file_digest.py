"""What is in a file, in 64 digits."""

import hashlib
from pathlib import Path


def file_digest(*files: Path) -> str:
    """The SHA-256 of a file, or of several one after the other, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
