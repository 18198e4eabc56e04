"""The JSON API: what it answers is what polars says of the Parquet files."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from fastapi.testclient import TestClient

from patchclamp.atlas import Atlas
from patchclamp.explore import application


@pytest.fixture
def client(atlas: Atlas) -> Iterator[TestClient]:
    with TestClient(application(atlas), base_url="http://localhost") as client:
        yield client


@pytest.fixture
def table(atlas_folder: Path) -> pl.DataFrame:
    return pl.read_parquet(atlas_folder / "neurons.parquet")


def _names(client: TestClient, **parameters: object) -> list[str]:
    answer = client.get("/api/neurons", params=parameters)  # type: ignore[arg-type]
    assert answer.status_code == 200, answer.text
    return [row["neuron"] for row in answer.json()["neurons"]]


def test_about(client: TestClient, atlas: Atlas) -> None:
    about = client.get("/api/atlas").json()
    assert about["model"]["name"] == "tiny <b>network</b>"
    assert about["neurons"] == 192 and about["striking"] == len(atlas.striking)
    assert about["data"]["tokens"] == atlas.neurons.to_polars()["count"][0]
    assert [site["name"] for site in about["sites"]] == ["mlp.0", "mlp.1"]
    assert {column["name"] for column in about["columns"]} == set(atlas.neurons.columns)
    assert str(atlas.path) not in json.dumps(about)


@pytest.mark.parametrize("descending", [True, False])
def test_every_column_sorts_as_polars_does(client: TestClient, table: pl.DataFrame, descending: bool) -> None:
    for column in table.columns:
        names = _names(client, sort=column, descending=descending, limit=1000)
        key = pl.col(column)
        if column == "neuron":
            key = pl.int_range(pl.len())
        elif table.schema[column] == pl.String and column != "site":
            key = pl.when(key != "").then(key.str.to_lowercase())
        wanted = table.sort(key, descending=descending, nulls_last=True, maintain_order=True)["neuron"]
        assert names == wanted.to_list(), column


def test_sites_and_names_sort_by_number_not_by_letter(atlas_folder: Path, tmp_path: Path) -> None:
    app = application(_renamed(atlas_folder, tmp_path, {"mlp.0": "mlp.2", "mlp.1": "mlp.10"}))
    client = TestClient(app, base_url="http://localhost")
    names = _names(client, sort="neuron", descending=False, limit=12)
    assert names == [f"mlp.2:{index}" for index in range(12)]
    assert _names(client, sort="site", descending=False, limit=1) == ["mlp.2:0"]


def test_neurons_without_a_value_come_last(atlas_folder: Path, tmp_path: Path) -> None:
    atlas = _changed(atlas_folder, tmp_path, [
        pl.when(pl.col("index") == 4).then(float("nan")).when(pl.col("index") == 5).then(None)
        .when(pl.col("index") == 6).then(float("inf")).otherwise(pl.col("score")).alias("score")
    ])  # fmt: skip
    client = TestClient(application(atlas), base_url="http://localhost")
    for descending in (True, False):
        rows = client.get(f"/api/neurons?sort=score&descending={descending}&limit=1000").json()["neurons"]
        assert {row["index"] for row in rows[-4:]} == {4, 5} and all(row["score"] is None for row in rows[-4:])
    assert rows[-5]["score"] == "Infinity"


def test_search_keeps_the_neurons_that_hold_every_word(client: TestClient, table: pl.DataFrame) -> None:
    for search in (
        "return",
        "RETURN",
        "mlp.1 return",
        "prose return mlp.0",
        "<script>",
        ".*",
        "no such thing",
        "שלום",
    ):
        columns = table.select("neuron", "family", "top_token", "label_value").iter_rows()
        wanted = [row[0] for row in columns if all(word in "\n".join(row).lower() for word in search.lower().split())]
        assert sorted(_names(client, search=search, limit=1000)) == sorted(wanted), search
    assert len(_names(client, search="return")) > 0


def test_filters_are_those_of_polars(client: TestClient, table: pl.DataFrame) -> None:
    assert (
        _names(client, site="mlp.1", sort="neuron", descending=False, limit=1000)
        == table.filter(site="mlp.1")["neuron"].to_list()
    )
    assert len(_names(client, site=["mlp.0", "mlp.1"], limit=1000)) == 192
    striking = table.filter("striking")["neuron"].to_list()
    assert sorted(_names(client, striking=True, limit=1000)) == sorted(striking)
    assert len(_names(client, striking=False, limit=1000)) == 192 - len(striking)
    bounds = {"minimum": ["firing_rate:0.3", "score:0.1"], "maximum": "firing_rate:0.5"}
    chosen = table.filter(pl.col("firing_rate").is_between(0.3, 0.5), pl.col("score") >= 0.1)["neuron"]
    assert sorted(_names(client, **bounds, limit=1000)) == sorted(chosen) and 0 < len(chosen) < 192


def test_pages_together_are_the_whole(client: TestClient) -> None:
    whole = _names(client, sort="score", limit=1000)
    pages = [name for offset in range(0, 200, 50) for name in _names(client, sort="score", offset=offset, limit=50)]
    assert pages == whole and len(set(whole)) == 192
    beyond = client.get("/api/neurons?offset=5000").json()
    assert beyond["neurons"] == [] and beyond["total"] == 192


def test_a_row_holds_the_values_of_the_table(client: TestClient, table: pl.DataFrame) -> None:
    rows = client.get("/api/neurons?sort=neuron&descending=false&limit=1000").json()["neurons"]
    assert rows == table.to_dicts()


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("sort=scor", "score"), ("sort=", "no column"), ("site=mlp.9", "mlp.0"), ("minimum=score", "score"),
        ("minimum=scor:1", "score"), ("minimum=family:1", "family"), ("maximum=score:many", "many"),
        ("minimum=score:nan", "nan"), ("minimum=:1", ":1"),
    ],
)  # fmt: skip
def test_a_wrong_question_is_answered_with_the_nearest(client: TestClient, query: str, says: str) -> None:
    answer = client.get(f"/api/neurons?{query}")
    assert answer.status_code == 400 and says in answer.json()["detail"]


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=1001",
        "limit=x",
        "offset=-1",
        f"offset={10**30}",
        "descending=maybe",
        "search=" + "x" * 201,
    ],
)
def test_a_question_out_of_range_is_refused(client: TestClient, query: str) -> None:
    assert client.get(f"/api/neurons?{query}").status_code == 422


def test_a_neuron_is_what_the_tables_hold(client: TestClient, atlas: Atlas) -> None:
    for name in ("mlp.0:7", "mlp.0:11", "mlp.1:3", "mlp.1:60"):
        answer, card = client.get(f"/api/neurons/{name}").json(), atlas.neuron(name)
        assert answer["facts"] == card.facts and answer["headline"] == card.headline
        for shown, row in zip(answer["examples"], card.examples.iter_rows(named=True), strict=True):
            assert shown["tokens"] == row["tokens"] and shown["labels"] == json.loads(row["labels"])
            assert shown["values"] == [None if math.isnan(value) else value for value in row["values"]]
        columns = ["token", "fired", "occurrences", "share_of_firings", "share_of_token"]
        assert answer["tokens"] == card.tokens.select(columns).to_dicts()
        near = [f"{row['other_site']}:{row['other_index']}" for row in card.neighbors.iter_rows(named=True)]
        assert [row["neuron"] for row in answer["neighbors"]] == near
        assert [row["count"] for row in answer["histogram"]] == card.histogram["count"].to_list()


def test_infinite_edges_are_text_that_javascript_reads(atlas_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(atlas_folder, tmp_path / "copy"))
    histograms = pl.read_parquet(copy / "histograms.parquet")
    open_ended = pl.concat_list(
        pl.lit(-math.inf), pl.col("edges").list.slice(1, pl.col("edges").list.len() - 2), pl.lit(math.inf)
    )
    histograms.with_columns(edges=open_ended).write_parquet(copy / "histograms.parquet")
    client = TestClient(application(Atlas.open(copy, verify=False)), base_url="http://localhost")
    bins = client.get("/api/neurons/mlp.0:7").json()["histogram"]
    assert bins[0]["low"] == "-Infinity" and bins[-1]["high"] == "Infinity" and isinstance(bins[0]["high"], float)


def test_neighbours_in_the_table(client: TestClient) -> None:
    first, last, middle = (client.get(f"/api/neurons/{name}").json() for name in ("mlp.0:0", "mlp.0:95", "mlp.1:4"))
    assert (first["previous"], first["next"]) == (None, "mlp.0:1")
    assert (last["previous"], last["next"]) == ("mlp.0:94", None)
    assert (middle["previous"], middle["next"]) == ("mlp.1:3", "mlp.1:5")


@pytest.mark.parametrize(
    "name",
    [
        "mlp.0:96",
        "mlp.9:1",
        "mlp.0",
        "..%2F..%2Fetc%2Fpasswd",
        "%00",
        "mlp.0:1e3",
        "mlp.0:" + "9" * 30,
        "x" * 5000,
    ],
)
def test_an_unknown_neuron_is_not_found(client: TestClient, name: str) -> None:
    answer = client.get(f"/api/neurons/{name}")
    assert answer.status_code == 404 and answer.json()["detail"]


def test_the_document_describes_the_answers(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert set(document["paths"]) == {"/api/atlas", "/api/neurons", "/api/neurons/{name}"}
    assert all(set(path) == {"get"} for path in document["paths"].values())
    for path, shape in (
        ("/api/atlas", "About"),
        ("/api/neurons/mlp.0:7", "Neuron"),
        ("/api/neurons", "Page"),
    ):
        assert set(client.get(path).json()) == set(document["components"]["schemas"][shape]["properties"])


def test_answers_have_the_shapes_that_the_document_promises(client: TestClient) -> None:
    from patchclamp.explore import answers

    answers.About.model_validate(client.get("/api/atlas").json(), strict=True)
    answers.Page.model_validate(client.get("/api/neurons?limit=1000").json(), strict=True)
    for index in range(96):
        answers.Neuron.model_validate(client.get(f"/api/neurons/mlp.1:{index}").json(), strict=True)


def test_a_damaged_file_is_said_by_name(atlas_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(atlas_folder, tmp_path / "copy"))
    client = TestClient(application(Atlas.open(copy)), base_url="http://localhost", raise_server_exceptions=False)
    (copy / "examples.parquet").unlink()
    answer = client.get("/api/neurons/mlp.0:7")
    assert answer.status_code == 500 and "examples.parquet" in answer.json()["detail"]
    assert answer.headers["content-security-policy"]


def _changed(folder: Path, tmp_path: Path, columns: list[pl.Expr]) -> Atlas:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    pl.read_parquet(copy / "neurons.parquet").with_columns(columns).write_parquet(copy / "neurons.parquet")
    return Atlas.open(copy, verify=False)


def _renamed(folder: Path, tmp_path: Path, names: dict[str, str]) -> Atlas:
    site = pl.col("site").replace(names)
    return _changed(folder, tmp_path, [site, pl.format("{}:{}", site, "index").alias("neuron")])
