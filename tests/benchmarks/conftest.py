"""Makes the modules of benchmarks/ importable, which are scripts and no part of the package."""

import sys
from pathlib import Path


# at the end, so that they hide nothing
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
