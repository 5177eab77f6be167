"""Trained models that travel with the package."""

from pathlib import Path


# A pipeline folder of handwritten digits, 32x32 pixels in one channel; its README.md says how it was made and what was
# measured.
DIGITS = Path(__file__).parent / "digits"
