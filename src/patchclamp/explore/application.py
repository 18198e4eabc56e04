"""The FastAPI application: four JSON answers and one page, all read-only."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Iterable
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import JSONResponse, Response

import patchclamp
from patchclamp.atlas import Atlas
from patchclamp.errors import DataError, PatchclampError, UnknownName
from patchclamp.explore import answers
from patchclamp.explore.guard import HEADERS, Guard
from patchclamp.explore.table import NeuronTable, Selection

_LARGEST = 2**31 - 1
_PAGE = "index.html"


def application(atlas: Atlas, hosts: Iterable[str] = ()) -> FastAPI:
    """The explorer of one atlas as a FastAPI application.

    It answers GET only, and serves its own page, the atlas, and nothing else.

    Args:
        atlas: the atlas to show.
        hosts: names under which the server may be addressed, beside localhost, 127.0.0.1 and [::1];
            a request for any other is refused, so that no foreign page can reach it by DNS rebinding.
            "0.0.0.0" or "::" stands for this machine's name and any address in numbers.
    """
    app = FastAPI(
        title="patchclamp explorer",
        version=patchclamp.__version__,
        description=f"What {atlas.manifest['model']['name']} does, neuron by neuron. Read-only.",
        # Their pages load scripts from a network; /openapi.json is the document itself.
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Guard, hosts=hosts)
    app.add_exception_handler(Exception, _say_failure)
    table = NeuronTable(atlas)
    _add_api(app, atlas, table)
    _add_pages(app, table)
    return app


def _add_api(app: FastAPI, atlas: Atlas, table: NeuronTable) -> None:
    facts = answers.about(atlas, table)

    @app.get("/api/atlas", tags=["atlas"], response_model=answers.About)
    def about() -> Response:
        """What was recorded, and what the columns of the table mean."""
        return _json(facts)

    @app.get("/api/neurons", tags=["neurons"], response_model=answers.Page, responses=_refusals(400))
    def neurons(
        sort: Annotated[str, Query(description="the column to sort by")] = "score",
        descending: Annotated[
            bool, Query(description="largest first; neurons without a value always come last")
        ] = True,
        search: Annotated[
            str, Query(max_length=200, description="words that name, family, token or label must hold")
        ] = "",
        site: Annotated[list[str] | None, Query(description="only neurons of these sites")] = None,
        striking: Annotated[bool | None, Query(description="only neurons that are striking, or are not")] = None,
        minimum: Annotated[list[str] | None, Query(description="column:value, as in firing_rate:0.01")] = None,
        maximum: Annotated[list[str] | None, Query(description="column:value, as in firing_rate:0.2")] = None,
        offset: Annotated[int, Query(ge=0, le=_LARGEST)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    ) -> Response:
        """One page of the table of neurons: filtered, sorted, cut on the server."""
        selection = Selection(
            sort,
            descending,
            search,
            tuple(site or ()),
            striking,
            tuple(minimum or ()),
            tuple(maximum or ()),
            offset,
            limit,
        )
        try:
            return _json(table.page(selection))
        except (UnknownName, DataError) as error:
            raise HTTPException(400, str(error)) from error

    @app.get("/api/neurons/{name:path}", tags=["neurons"], response_model=answers.Neuron, responses=_refusals(404))
    def neuron(name: str) -> Response:
        """Everything the atlas knows of one neuron, written `mlp.3:417`."""
        try:
            card = atlas.neuron(name)
        except (UnknownName, DataError) as error:
            raise HTTPException(404, str(error)) from error
        return _json(answers.neuron(card, *table.beside(card.facts["site"], card.facts["index"])))


def _add_pages(app: FastAPI, table: NeuronTable) -> None:
    # Read once and served from memory by exact name: no path of a request ever reaches the disk.
    stored = {
        file.name: file.read_bytes() for file in (files("patchclamp.explore") / "static").iterdir() if file.is_file()
    }

    def send(request: Request, name: str, status: int = 200) -> Response:
        tag = f'"{hashlib.sha256(stored[name]).hexdigest()[:32]}"'
        headers = {"ETag": tag, "Cache-Control": "no-cache"}
        if status == 200 and request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        kind = (
            "text/javascript" if name.endswith(".js") else mimetypes.guess_type(name)[0] or "application/octet-stream"
        )
        return Response(stored[name], status, headers, media_type=kind)

    @app.get("/", include_in_schema=False)
    def home(request: Request) -> Response:
        return send(request, _PAGE)

    @app.get("/neuron/{name:path}", include_in_schema=False)
    def neuron_page(request: Request, name: str) -> Response:
        return send(request, _PAGE, 200 if table.has(name) else 404)

    @app.get("/static/{name}", include_in_schema=False)
    def static(request: Request, name: str) -> Response:
        if name not in stored or name == _PAGE:
            raise HTTPException(404, "there is no such file")
        return send(request, name)


def _json(content: dict[str, Any]) -> Response:
    # The answers hold no NaN or infinity (`answers.plain`), and JSONResponse would refuse them.
    return JSONResponse(content, headers={"Cache-Control": "no-cache"})


def _refusals(status: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": answers.Refusal}}


async def _say_failure(request: Request, error: Exception) -> Response:
    # Our own errors are sentences for the user (a damaged file, named); others stay in the server's log.
    detail = str(error) if isinstance(error, PatchclampError) else "the explorer failed; its terminal says why"
    return JSONResponse({"detail": detail}, 500, headers=HEADERS)
