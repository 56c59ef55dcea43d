"""The tests, a folder for each part of the package; helpers stand beside those that use them."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
