"""Paths of the repository.

The package runs anywhere; the lab needs the checkout around it.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT / "data/text"
CHECKPOINTS = ROOT / "data/checkpoints"
RECORDS = ROOT / "data/records"
FIGURES = ROOT / "figures"
NOTEBOOKS = ROOT / "notebooks"
# Executed notebooks, and everything that the smoke profile writes; never committed.
OUT = ROOT / "out"
