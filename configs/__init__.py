"""U-Net configurations as JSON files, each named for its recipe."""

from pathlib import Path


CONFIG_DIR = Path(__file__).parent
