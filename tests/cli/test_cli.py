"""The command line, run as a user runs it: in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import patchclamp
from patchclamp.atlas import Atlas
from patchclamp.atlas.words import share

_HEAVY = ("torch", "transformers", "zarr", "sklearn", "scipy")
_SOURCE = str(Path(patchclamp.__file__).parents[1])


def _environment(**more: str) -> dict[str, str]:
    kept = {
        key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TERM")
    }
    return kept | {"PYTHONPATH": _SOURCE, "COLUMNS": "120"} | more


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "patchclamp.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=_environment(**environment), timeout=60)


def _imported_by(*arguments: str) -> set[str]:
    """The modules that a command has loaded when it ends, asked of the process itself."""
    script = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('LOADED', *sys.modules, file=sys.stderr))\n"
        f"sys.argv = ['patchclamp', *{arguments!r}]\n"
        "from patchclamp.cli import app\n"
        "app()\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=_environment(), timeout=60)
    loaded = next(line for line in ran.stderr.splitlines() if line.startswith("LOADED"))
    return set(loaded.split()[1:])


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("--version",), *((name, "--help") for name in ("neuron", "explore", "atlas", "sites"))],
)
def test_help_loads_nothing_heavy(arguments: tuple[str, ...]) -> None:
    loaded = _imported_by(*arguments)
    assert "typer" in loaded and "patchclamp.cli" in loaded
    assert loaded.isdisjoint({*_HEAVY, "numpy", "polars", "duckdb", "pyarrow", "fastapi", "uvicorn", "pandas"})


def test_looking_at_a_neuron_loads_no_torch(atlas_folder: Path) -> None:
    loaded = _imported_by("neuron", str(atlas_folder), "mlp.0:7")
    assert "polars" in loaded
    assert loaded.isdisjoint({*_HEAVY, "duckdb", "fastapi", "uvicorn", "pandas"})


def test_exploring_loads_no_torch(atlas_folder: Path) -> None:
    """The port is taken, so the command loads all it needs and then ends by itself."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        loaded = _imported_by("explore", str(atlas_folder), "--no-open", "--port", str(server.getsockname()[1]))
    assert "uvicorn" in loaded and "patchclamp.explore.application" in loaded
    assert loaded.isdisjoint({*_HEAVY, "duckdb", "pandas"})


def test_sites_prints_what_the_model_says(tmp_path: Path) -> None:
    from tests.zoo import by_title

    import patchclamp as pc

    module: Any = by_title("Mixtral").build()
    module.save_pretrained(tmp_path / "model")
    ran = _run("sites", str(tmp_path / "model"), COLUMNS="200")
    assert ran.returncode == 0, ran.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in ran.stdout.splitlines() if "│" in line]
    # A long reason goes on in the next line.
    rows = [row for row in rows if row[0]]
    expected = pc.load(module).kinds()
    assert [row[0] for row in rows] == [kind.name for kind in expected]
    for row, kind in zip(rows, expected, strict=True):
        assert row[1] == str(kind.number)
        assert row[3:6] == ["yes" if each else "no" for each in (kind.read, kind.written, kind.baked)]
        assert kind.why_not.startswith(row[6])


def test_sites_of_a_model_that_is_none_is_one_clear_line(tmp_path: Path) -> None:
    ran = _run("sites", str(tmp_path))
    assert ran.returncode == 1 and "no config.json" in ran.stderr and "Traceback" not in ran.stderr


def test_version() -> None:
    assert _run("--version").stdout == f"patchclamp {patchclamp.__version__}\n"


def test_neuron_prints_the_card(atlas_folder: Path) -> None:
    ran = _run("neuron", str(atlas_folder), "mlp.0:7")
    facts = Atlas.open(atlas_folder).neuron("mlp.0:7").facts
    assert ran.returncode == 0 and not ran.stderr
    assert ran.stdout.startswith("mlp.0:7\n") and share(facts["purity"]) in ran.stdout
    # Not a terminal: no colour, the peak is marked instead.
    assert "\x1b" not in ran.stdout and "«return»" in ran.stdout


def test_a_terminal_without_unicode_gets_no_traceback(atlas_folder: Path) -> None:
    ran = _run("neuron", str(atlas_folder), "mlp.0:13", PYTHONIOENCODING="ascii")
    assert ran.returncode == 0 and "Traceback" not in ran.stderr and "mlp.0:13" in ran.stdout


@pytest.mark.parametrize("command", [("neuron", "{}", "mlp.0:7"), ("explore", "{}", "--no-open")])
def test_a_missing_or_damaged_atlas_is_one_clear_line(
    atlas_folder: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    damaged = Path(shutil.copytree(atlas_folder, tmp_path / "damaged"))
    (damaged / "tokens.parquet").write_bytes(b"")
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, says in (
        (tmp_path / "none", "does not exist"), (empty, "is not a patchclamp atlas"),
        (damaged, "tokens.parquet is damaged"),
    ):  # fmt: skip
        ran = _run(*(part.format(folder) for part in command))
        assert ran.returncode == 1 and not ran.stdout, ran
        assert says in ran.stderr and ran.stderr.startswith("patchclamp: ") and ran.stderr.count("\n") == 1
        assert "Traceback" not in ran.stderr


def test_an_unknown_neuron_is_one_clear_line(atlas_folder: Path) -> None:
    ran = _run("neuron", str(atlas_folder), "mlp.0:99\x1b[31m")
    assert ran.returncode == 1 and "\x1b" not in ran.stderr and r"\x1b" in ran.stderr
    ran = _run("neuron", str(atlas_folder), "mlp.0:99")
    assert ran.returncode == 1 and "The nearest: mlp.0:95" in ran.stderr and "Traceback" not in ran.stderr


def test_a_taken_port_is_one_clear_line(atlas_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ran = _run("explore", str(atlas_folder), "--no-open", "--port", str(port))
    assert ran.returncode == 1 and not ran.stdout and "Traceback" not in ran.stderr
    assert re.fullmatch(rf"patchclamp: port {port} of 127\.0\.0\.1 is in use: try --port \d+\n", ran.stderr)


@pytest.mark.parametrize("port", ["-1", "65536", "http"])
def test_a_port_that_is_none_is_refused(atlas_folder: Path, port: str) -> None:
    ran = _run("explore", str(atlas_folder), "--no-open", "--port", port)
    assert ran.returncode == 2 and "--port" in ran.stderr


def test_explore_serves_on_this_machine_only_and_ends_with_ctrl_c(atlas_folder: Path) -> None:
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
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment())
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
        assert match, line
        with urllib.request.urlopen(match[0], timeout=10) as answer:
            assert b"patchclamp" in answer.read()
        assert _listens_on(int(match[1])) == {"127.0.0.1"}
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=20)[1]
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0 and "Traceback" not in err and not err


def test_explore_opens_the_browser_unless_told_not_to(atlas_folder: Path, tmp_path: Path) -> None:
    browser = tmp_path / "browser"
    browser.write_text(
        f'#!/bin/sh\necho "$1" > {tmp_path}/opened.part && mv {tmp_path}/opened.part {tmp_path}/opened\n'
    )
    browser.chmod(0o755)
    for flags, opens in (((), True), (("--no-open",), False)):
        command = [
            sys.executable,
            "-m",
            "patchclamp.cli",
            "explore",
            str(atlas_folder),
            "--port",
            "0",
            *flags,
        ]
        environment = _environment(BROWSER=f"{browser} %s")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[-1]
            while "Ctrl-C" not in process.stdout.readline():
                pass
            with urllib.request.urlopen(address, timeout=10):
                pass
            opened = tmp_path / "opened"
            assert _appears(opened, 5.0 if opens else 1.0) == opens
            if opens:
                assert opened.read_text().strip() == address
                opened.unlink()
        finally:
            process.kill()
            process.communicate()


def test_data_that_is_neither_file_nor_corpus_is_named(tmp_path: Path) -> None:
    from patchclamp.cli.corpus import corpus
    from patchclamp.errors import DataError

    with pytest.raises(DataError, match=r"no file 'nothing\.txt'.*python_docs"):
        corpus("nothing.txt", "text", (), None)
    with pytest.raises(DataError, match="python_docs brings its own labels"):
        corpus("python_docs", "text", ("kind",), None)


def test_the_first_texts_keep_their_labels(tmp_path: Path) -> None:
    from patchclamp.cli.corpus import corpus

    file = tmp_path / "texts.jsonl"
    file.write_text("".join(f'{{"body": "text {n}", "kind": "k{n % 2}"}}\n' for n in range(6)))
    texts = corpus(str(file), "body", ("kind",), 3)
    assert [(each.text, each.labels["kind"]) for each in texts] == [
        ("text 0", "k0"),
        ("text 1", "k1"),
        ("text 2", "k0"),
    ]
    assert len(list(corpus(str(file), "body", (), None))) == 6


def _listens_on(port: int) -> set[str]:
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        address, state = line.split()[1], line.split()[3]
        if state == "0A" and int(address.split(":")[1], 16) == port:
            found.add(socket.inet_ntoa(bytes.fromhex(address.split(":")[0])[::-1]))
    return found


def _appears(file: Path, seconds: float) -> bool:
    import time

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if file.exists():
            return True
        time.sleep(0.05)
    return False


def test_methods_are_listed_with_their_papers() -> None:
    shown = _run("methods", COLUMNS="200").stdout
    assert "pc.find.lape " in shown and "S093" in shown and "Tang et al., 2024" in shown
    assert "pc.decompose." in shown


def test_a_race_prints_its_tables_and_writes_its_runs(tmp_path: Path) -> None:
    import polars as pl

    file = tmp_path / "runs.csv"
    given = ("--bed", "mlp", "--method", "expertise", "--method", "chance", "--seeds", "2", "--no-null")
    done = _run("benchmark", *given, "--out", str(file))
    assert done.returncode == 0, done.stderr
    assert "mlp: neurons planted as selective" in done.stdout
    runs = pl.read_csv(file)
    assert len(runs) == 4 and set(runs["method"]) == {"expertise", "chance"}
    found = runs.group_by("method").agg(pl.col("average_precision").mean())
    figures = dict(found.iter_rows())
    assert figures["expertise"] > 0.9 > 0.1 > figures["chance"]
    assert f"{figures['expertise']:.3f}" in done.stdout


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--bed", "gpt"), "nearest: gpt2"),
        (("--method", "lap"), "nearest: lape"),
        (("--bed", "mlp", "--difficulty", "9"), "between 0 and 3"),
        (("--bed", "mlp", "--method", "chance", "--seeds", "1", "--out", "runs.txt"), ".csv or .parquet"),
    ],
)
def test_a_race_that_cannot_be_is_one_clear_line(given: tuple[str, ...], words: str) -> None:
    done = _run("benchmark", *given)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
