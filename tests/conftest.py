"""What all tests share: Ultralytics stays off the network and out of the home directory, random numbers repeat."""

from __future__ import annotations

import os
import sys
import tempfile

import pytest
from tensorrt_parts import cuda, libraries  # noqa: F401  fixtures

os.environ["YOLO_OFFLINE"] = "true"
os.environ["YOLO_AUTOINSTALL"] = "false"
os.environ["YOLO_CONFIG_DIR"] = tempfile.gettempdir()


@pytest.fixture(autouse=True)
def _seed() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
