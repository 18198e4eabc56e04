"""A real server in a process of its own, and a real Chromium that looks at it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.atlas_fixture import atlas as atlas
from tests.atlas_fixture import atlas_folder as atlas_folder

import patchclamp

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Page

# Chromium as root and without a network: no sandbox, and nothing that calls its maker.
_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def address(atlas_folder: Path) -> Iterator[str]:
    """The address of `patchclamp explore` on the atlas of the module: the small one, or its own."""
    command = [
        sys.executable,
        "-m",
        "patchclamp.cli",
        "explore",
        str(atlas_folder),
        "--no-open",
        "--port",
        "0",
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(patchclamp.__file__).parents[1])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1].rstrip("/")
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="session")
def browser(chromium: str) -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=_FLAGS)
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """An empty page; its test fails if a script fails, a foreign one runs, or a request goes elsewhere."""
    context = browser.new_context(base_url=address, viewport={"width": 1360, "height": 900})
    faults: list[str] = []
    context.on("request", lambda request: _check_request(request.url, address, faults))

    def refuse(dialog: Dialog) -> None:
        faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    context.on("dialog", refuse)
    context.on("weberror", lambda error: faults.append(f"script: {error.error}"))
    context.on(
        "console",
        lambda said: faults.append(f"console: {said.text}") if said.type in ("error", "warning") else None,
    )
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.faults = faults  # type: ignore[attr-defined]
    yield page
    context.close()
    assert not faults


def _check_request(url: str, address: str, faults: list[str]) -> None:
    if not url.startswith(f"{address}/"):
        faults.append(f"request to {url}")
