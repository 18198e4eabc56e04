"""The explorer on an atlas of a real model: what its pages say is what the tables hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import pytest
from tests.browser.checks import check_neuron
from tests.browser.reading import cell, names, open_table, rows

from patchclamp.atlas import Atlas

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from patchclamp.model import Model

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def atlas_folder(minilm: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An atlas of two layers of all-MiniLM-L6-v2, on some English and some code; takes the small one's place here."""
    import patchclamp as pc

    folder = tmp_path_factory.mktemp("real") / "atlas"
    data = pc.corpora.python_docs(limit=100)
    Atlas.build(minilm, data, folder, sites="mlp.[12]", max_length=48, correlate_tokens=1000, progress=False)
    return folder


def test_the_table_is_that_of_the_real_neurons(page: Page, atlas: Atlas) -> None:
    open_table(page)
    table = atlas.neurons.to_polars()
    best = table.sort("score", descending=True, nulls_last=True, maintain_order=True).head(50)
    assert names(page) == best["neuron"].to_list()
    wanted = [{name: cell(name, row[name], row) for name in rows(page)[0]} for row in best.iter_rows(named=True)]
    assert rows(page) == wanted
    said = page.inner_text(".intro")
    data = atlas.manifest["data"]
    assert f"{table.height:,} neurons at 2 sites, recorded on {data['tokens']:,} tokens" in said
    assert f"{table['striking'].sum():,} of them are striking" in said


def test_the_pages_are_those_of_the_real_neurons(page: Page, atlas: Atlas) -> None:
    table = atlas.neurons.to_polars()
    chosen = [
        *atlas.striking.top(3).names,
        *table.sort("firing_rate")["neuron"].head(2),
        *table.sort("label_contrast", descending=True, nulls_last=True)["neuron"].head(2),
        *table.filter(pl.col("site") == "mlp.2").sample(3, seed=0)["neuron"],
    ]
    for name in chosen:
        check_neuron(page, atlas.neuron(name))
