"""The command line: `patchclamp atlas`, `neuron`, `sites`, `explore`, `doctor`, `methods`, `benchmark`.

Each command imports what it needs when it runs, so that `patchclamp --help` starts at once, and
looking at an atlas loads neither torch nor transformers.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from patchclamp.errors import PatchclampError


class _Commands(TyperGroup):
    """Says the project's own errors in one line on the error stream, and exits with code 1."""

    def invoke(self, ctx: Any) -> Any:
        # A terminal that cannot show "█" gets "?", not a traceback.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        try:
            return super().invoke(ctx)
        except PatchclampError as error:
            from patchclamp.atlas.shown import visible

            typer.echo(f"patchclamp: {visible(str(error))}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    name="patchclamp",
    help="Record, find, describe, prove and edit the neurons of any PyTorch network.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Folder = Annotated[
    str, typer.Argument(metavar="DIR", help="The folder of the atlas, or s3://bucket/name.", show_default=False)
]


def _show_version(wanted: bool) -> None:
    if wanted:
        import patchclamp

        typer.echo(f"patchclamp {patchclamp.__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


@app.command()
def atlas(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An alias, a folder, or a hub id.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="X",
            show_default=False,
            help="A .txt, .jsonl or .parquet file of texts, or python_docs.",
        ),
    ],
    out: Annotated[
        str, typer.Option("--out", metavar="DIR", show_default=False, help="The folder to write, or s3://...")
    ],
    sites: Annotated[str, typer.Option("--sites", help="The sites to record: a name or a pattern.")] = "mlp.*",
    column: Annotated[str, typer.Option("--column", help="The column of texts in a .jsonl or .parquet file.")] = "text",
    label: Annotated[
        list[str] | None,
        typer.Option("--label", show_default=False, help="A column of labels; may be repeated."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", min=1, show_default=False, help="The most tokens to read of a text."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, show_default=False, help="The most texts to read.")
    ] = None,
) -> None:
    """Record a model on data and write the atlas of its neurons."""
    from rich.console import Console

    from patchclamp.atlas import Atlas
    from patchclamp.cli.corpus import corpus

    texts = corpus(data, column, tuple(label or ()), limit)
    built = Atlas.build(_load(model), texts, out, sites=sites, max_length=max_length)
    Console().print(built)
    typer.echo(f"\nOpen its page:  patchclamp explore {out}")


@app.command()
def neuron(
    folder: _Folder,
    name: Annotated[str, typer.Argument(metavar="NEURON", help="A neuron, as in mlp.1:500.", show_default=False)],
) -> None:
    """Show the card of one neuron."""
    from rich.console import Console

    from patchclamp.atlas import Atlas

    Console(highlight=False).print(Atlas.open(folder).neuron(name))


@app.command()
def sites(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An alias, a folder, or a hub id.", show_default=False)],
) -> None:
    """Show where the neurons of a model are: which kinds can be read, written and baked into weights, and why not."""
    from rich.console import Console

    from patchclamp.cli.sites import table_of

    Console().print(table_of(_load(model)))


@app.command()
def explore(
    folder: _Folder,
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="The port; 0 takes any that is free.")] = 8765,
    no_open: Annotated[bool, typer.Option("--no-open", help="Do not open the browser.")] = False,
) -> None:
    """Open the page of an atlas in the browser."""
    from patchclamp.atlas import Atlas
    from patchclamp.explore import serve

    serve(Atlas.open(folder), host, port, open_browser=not no_open, say=lambda line: print(line, flush=True))


@app.command()
def doctor(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="A recording, an atlas, or a series of them.", show_default=False)
    ],
) -> None:
    """Say what of a store is damaged, and what can still be read; exits with 1 where something is."""
    from patchclamp.cli.doctor import show

    if not show(folder):
        raise typer.Exit(1)


@app.command()
def methods() -> None:
    """List the published methods: row, where it is, and the paper."""
    from rich.console import Console

    from patchclamp.cli.methods import table_of

    Console().print(table_of())


@app.command()
def benchmark(
    bed: Annotated[
        list[str] | None,
        typer.Option("--bed", show_default=False, help="gpt2, llama or mlp; may be repeated. All by default."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", show_default=False, help="A finder by name; may be repeated. All by default."),
    ] = None,
    difficulty: Annotated[float, typer.Option("--difficulty", help="0 is easy, 1 the default, 3 the hardest.")] = 1.0,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many planted networks of each kind.")] = 3,
    permutations: Annotated[int, typer.Option("--permutations", min=19, help="Of each null.")] = 99,
    null: Annotated[bool, typer.Option("--null/--no-null", help="Measure power and false discoveries.")] = True,
    out: Annotated[
        str | None, typer.Option("--out", metavar="FILE", show_default=False, help="Write all runs: .csv or .parquet.")
    ] = None,
) -> None:
    """Race the finders for a label on networks whose neurons were planted."""
    from rich.console import Console

    from patchclamp.cli.benchmark import race, tables_of, writable, write

    file = None if out is None else writable(out)
    found = race(bed or [], method or [], difficulty, range(seeds), permutations, null)
    for table in tables_of(found):
        Console().print(table)
    if file is not None:
        write(found, file)


def _load(model: str) -> Any:
    import patchclamp as pc

    return pc.load(model)
