"""Mutation testing of the published methods: how many mistakes do the tests notice?

Every operator of `operators.py` is applied at some places of every module (at most `CAP` an operator, spread over the
file), and every mistake of `by_hand.toml` at its one place; each mutant is one copy of the package with one mistake.
The tests that `TESTS` names must fail on it. Writes `docs/mutants.md`; a survivor wants a sentence in
`survivors.toml`, or the exit status is 1.

One process loads the libraries and forks for each mutant: importing torch takes longer than most of the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.mutants.operators import OPERATORS, mutated, places  # noqa: E402
from tests.mutants.page import Outcome, Survivor, page  # noqa: E402

CAP = 4
TIMEOUT_S = 60
KEPT = ROOT / "build" / "mutants.json"
PAGE = ROOT / "docs" / "mutants.md"
PACKAGE = "src/patchclamp"
CONTRACT = "tests/find/test_label_finders.py"
CORNERS = "tests/find/test_corners.py"


@dataclass(frozen=True, slots=True)
class Tests:
    """What must kill the mutants of a module.

    Attributes:
        files: of tests.
        only: those of their tests that are run, as pytest's `-k`; "": all.
    """

    files: tuple[str, ...]
    only: str = ""


def _contract(word: str, *files: str) -> Tests:
    """Tests of the contract of all finders that `word` selects, but not the longest one, and files of the finder."""
    return Tests((*files, CONTRACT), f"({word}) and not null_hypothesis")


TESTS = {
    "find/labelled.py": _contract(
        "lape or contrast or expertise or profile or share or class_of_words",
        "tests/find/test_lape.py",
        "tests/find/test_contrast.py",
        "tests/find/test_token_labels.py",
    ),
    "find/activation_coverage.py": Tests(("tests/find/test_activation_coverage.py", CORNERS)),
    "find/contrast.py": _contract("contrast", "tests/find/test_contrast.py"),
    "find/coverage.py": _contract("cover or overlap_of or never_fires"),
    "find/domains.py": _contract("domains", "tests/find/test_domains.py"),
    "find/expertise.py": _contract("expertise or precision or scikit or relation or share"),
    "find/fingerprint.py": Tests(("tests/find/test_fingerprint.py", CORNERS), "not docstrings_and_code"),
    "find/frequency_tagging.py": Tests(("tests/find/test_frequency_tagging.py", CORNERS)),
    "find/generic_marker.py": Tests(("tests/find/test_generic_marker.py",)),
    "find/lape.py": _contract("lape", "tests/find/test_lape.py"),
    "find/probe_neurons.py": _contract("probe_neurons", "tests/find/test_probe_neurons.py"),
    "find/probes.py": _contract("probe", "tests/find/test_sparse_probe.py", "tests/find/test_probe_neurons.py"),
    "find/profiles.py": _contract("profile"),
    "find/sparse_probe.py": _contract("sparse_probe", "tests/find/test_sparse_probe.py"),
    "find/weighted_assignment.py": Tests(("tests/find/test_weighted_assignment.py",)),
    "decompose/concepts.py": Tests(("tests/decompose/test_embedding_geometry.py",)),
    "decompose/embedding_geometry.py": Tests(("tests/decompose/test_embedding_geometry.py",)),
    "decompose/helix.py": Tests(("tests/decompose/test_embedding_geometry.py",)),
}

# Loaded once, before any fork. None may start a thread when it is imported.
LIBRARIES = (
    "numpy", "torch", "torch.nn", "scipy.stats", "scipy.optimize", "scipy.signal", "sklearn.linear_model",
    "sklearn.model_selection", "sklearn.metrics", "sklearn.ensemble", "sklearn.cross_decomposition", "polars",
    "pandas", "pyarrow.parquet", "duckdb", "zarr", "fsspec", "filelock", "rich", "hypothesis", "numba", "transformers",
    "transformers.models.auto.modeling_auto", "tokenizers", "safetensors.torch", "snowballstemmer", "pytest_timeout",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mutant:
    """One mistake: where it is, and the text of its file without and with it."""

    module: str
    operator: str
    function: str
    line: str
    change: str
    source: str
    mutated: str
    tests: Tests

    @property
    def survivor(self) -> Survivor:
        """What a sentence would belong to."""
        return Survivor(self.module, self.operator, self.function, self.line, self.change)


def main() -> int:
    """Run all mutants, or those of the modules whose path holds `--only`; 1 where a survivor has no sentence."""
    arguments = _arguments()
    begun = time.monotonic()
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    with tempfile.TemporaryDirectory(prefix="patchclamp-mutants-") as folder:
        first = _copy(ROOT, Path(folder) / "0")
        copies = [first, *(_copy(first, Path(folder) / str(number)) for number in range(1, arguments.workers))]
        known = [*by_operator(first), *by_hand(first)]
        if not any(arguments.only in each.module for each in known):
            raise SystemExit(f"no module's path holds {arguments.only!r}: there are {', '.join(TESTS)}")
        mutants = [each for each in known if arguments.only in each.module]
        if arguments.survivors:
            killed = {each.survivor for each in _kept()} - {each.survivor for each in _kept() if not each.killed}
            mutants = [each for each in mutants if each.survivor not in killed]
        print(f"{len(mutants)} mutants, {arguments.workers} at a time", flush=True)
        done = 0
        for tests in dict.fromkeys(each.tests for each in mutants):
            refuse_failing(first, tests)
            outcomes = []
            for outcome in run_all([each for each in mutants if each.tests == tests], copies):
                done += 1
                print(f"{done}/{len(mutants)} {outcome}", flush=True)
                outcomes.append(outcome)
            _keep(outcomes, known)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{time.monotonic() - begun:,.0f} s, and {used.ru_utime + used.ru_stime:,.0f} s of a processor")
    return report(mutants, known)


# Mutants --------------------------------------------------------------------------------------------


def by_operator(root: Path) -> Iterator[Mutant]:
    """The mutants of all operators, at most `CAP` an operator and module, spread over the file."""
    for module, tests in TESTS.items():
        source = (root / PACKAGE / module).read_text(encoding="utf-8")
        lines = source.splitlines()
        for operator in OPERATORS:
            found = places(operator, source)
            for place in _spread(len(found)):
                each = found[place]
                line = lines[each.line - 1].strip()
                yield Mutant(
                    module,
                    operator.name,
                    each.function,
                    line,
                    each.change,
                    source,
                    mutated(operator, source, place),
                    tests,
                )


def by_hand(root: Path) -> Iterator[Mutant]:
    """What `by_hand.toml` describes.

    Raises:
        SystemExit: an old text is not there exactly once, or an operator is unknown.
    """
    names = {operator.name for operator in OPERATORS}
    described = tomllib.loads((ROOT / "tests/mutants/by_hand.toml").read_text(encoding="utf-8"))
    for each in described["mutant"]:
        source = (root / PACKAGE / each["module"]).read_text(encoding="utf-8")
        if source.count(each["old"]) != 1 or each["operator"] not in names:
            raise SystemExit(f"by_hand.toml: {each['module']} must hold this once: {each['old']!r}")
        tests = Tests(tuple(each["tests"]), each.get("only", ""))
        line, change = each["old"].strip(), f"{each['old'].strip()} -> {each['new'].strip()}"
        made = source.replace(each["old"], each["new"])
        yield Mutant(each["module"], each["operator"], "", line, change, source, made, tests)


def _spread(number: int) -> list[int]:
    """At most `CAP` of so many places, evenly spread, the first and the last among them."""
    if number <= CAP:
        return list(range(number))
    return [round(each * (number - 1) / (CAP - 1)) for each in range(CAP)]


# Running --------------------------------------------------------------------------------------------


def run_all(mutants: list[Mutant], copies: list[Path]) -> Iterator[Outcome]:
    """Run each mutant in a copy of its own, as many at once as there are copies."""
    waiting, free = list(mutants)[::-1], list(copies)
    running: dict[int, tuple[Mutant, Path, float]] = {}
    while waiting or running:
        while waiting and free:
            mutant, copied = waiting.pop(), free.pop()
            _write(copied, mutant.module, mutant.mutated)
            running[_start(copied, mutant.tests)] = (mutant, copied, time.monotonic())
        for process, (mutant, copied, begun) in list(running.items()):
            ended = _ended(process, begun)
            if ended is None:
                continue
            del running[process]
            _write(copied, mutant.module, mutant.source)
            free.append(copied)
            yield Outcome(*mutant.survivor, ended)
        time.sleep(0.05)


def refuse_failing(copied: Path, tests: Tests) -> None:
    """The unmutated copy must pass what is asked of mutants.

    Raises:
        SystemExit: it does not.
    """
    begun = time.monotonic()
    process = _start(copied, tests)
    while (ended := _ended(process, begun)) is None:
        time.sleep(0.05)
    print(f"unmutated: {ended}, {time.monotonic() - begun:.0f} s: {' '.join(tests.files)} {tests.only}", flush=True)
    if ended != "survived":
        sys.stdout.write((copied / "log").read_text(encoding="utf-8", errors="replace")[-4000:])
        raise SystemExit(f"without any mutation these tests do not pass in {TIMEOUT_S} s: {' '.join(tests.files)}")


def _copy(root: Path, folder: Path) -> Path:
    """A private copy of what the tests import: others may work on the checkout during a run."""
    clean = shutil.ignore_patterns("__pycache__")
    for each in ("src", "tests"):
        shutil.copytree(root / each, folder / each, ignore=clean)
    shutil.copy(root / "pyproject.toml", folder)
    return folder


def _write(copied: Path, module: str, source: str) -> None:
    (copied / PACKAGE / module).write_text(source, encoding="utf-8")


def _start(copied: Path, tests: Tests) -> int:
    """Run tests in a fork; the number of its process."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        os.setsid()
        log = os.open(copied / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = _test(copied, tests)
    finally:
        sys.stdout.flush()
        os._exit(code)


def _test(copied: Path, tests: Tests) -> int:
    import pytest

    # A cache of byte code is trusted by the second it was made in; a mutant takes less.
    sys.dont_write_bytecode = True
    for name in [each for each in sys.modules if each.partition(".")[0] in ("patchclamp", "tests")]:
        del sys.modules[name]
    sys.path[:] = [
        str(copied),
        str(copied / "src"),
        *(each for each in sys.path if each not in (str(ROOT), str(ROOT / "src"))),
    ]
    os.chdir(copied)
    chosen = ["-k", tests.only] if tests.only else []
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"--rootdir={copied}", *chosen, *tests.files])
    imported = getattr(sys.modules.get("patchclamp"), "__file__", None)
    # A mutant may fail to be imported at all; but one that is imported from elsewhere is not tested.
    if imported and not Path(imported).is_relative_to(copied):
        print(f"{imported} was imported, and not the copy in {copied}")
        return 71
    return int(code)


def _ended(process: int, begun: float) -> str | None:
    """How a run ended: "survived", "killed", "timeout"; None: not yet.

    Raises:
        SystemExit: it could not be run.
    """
    found, status = os.waitpid(process, os.WNOHANG)
    if not found:
        if time.monotonic() - begun < TIMEOUT_S:
            return None
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        return "timeout"
    code = os.waitstatus_to_exitcode(status)
    if code > 3:
        raise SystemExit(f"tests could not be run: pytest ended with {code}")
    return "killed" if code else "survived"


# Reporting ------------------------------------------------------------------------------------------


def report(mutants: Sequence[Mutant], known: Sequence[Mutant]) -> int:
    """Write the page of the last outcomes; 1 where one of `mutants` survived without a sentence.

    While some of the `known` mutants were never run, the page is printed and not written.
    """
    described = tomllib.loads((ROOT / "tests/mutants/survivors.toml").read_text(encoding="utf-8"))
    sentences = {
        Survivor(each["module"], each["operator"], each["function"], each["line"], each["change"]): each["why"].strip()
        for each in described.get("survivor", [])
    }
    outcomes = _kept()
    said = {operator.name: operator.says for operator in OPERATORS}
    written = page(outcomes, sentences, said, CAP)
    if {each.survivor for each in known} <= {each.survivor for each in outcomes}:
        PAGE.write_text(written, encoding="utf-8")
    else:
        print(written)
    asked = {each.survivor for each in mutants}
    survivors = {each.survivor for each in outcomes if not each.killed}
    silent = [each for each in sorted(survivors & asked) if not sentences.get(each)]
    for each in silent:
        print("A survivor without a sentence:", *each, sep="\n    ")
    for each in sorted(sentences.keys() - survivors):
        print("A sentence without a survivor:", *each, sep="\n    ")
    return int(bool(silent))


def _keep(outcomes: Sequence[Outcome], known: Sequence[Mutant]) -> None:
    """Put these outcomes in the place of what was kept of the same mutants; forget mutants that there are no more."""
    old = {each.survivor for each in known} - {each.survivor for each in outcomes}
    kept = [each for each in _kept() if each.survivor in old]
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps([*kept, *outcomes], indent=0), encoding="utf-8")


def _kept() -> list[Outcome]:
    """The last outcomes, in the order of the modules."""
    found = [Outcome(*each) for each in json.loads(KEPT.read_text(encoding="utf-8"))] if KEPT.exists() else []
    order = list(TESTS)
    return sorted(found, key=lambda each: order.index(each.module) if each.module in order else len(order))


def _refuse_missing() -> None:
    """Every published method's module has its tests here.

    Raises:
        SystemExit: one has none.
    """
    process = os.fork()
    if not process:
        for room in ("find", "decompose"):
            importlib.import_module(f"patchclamp.{room}")
        entries = importlib.import_module("patchclamp.published").methods()
        modules = {"/".join(each.function.__module__.split(".")[1:]) + ".py" for each in entries}
        missing = sorted(modules - set(TESTS))
        if missing:
            print(f"no tests are named in run.py for {', '.join(missing)}", flush=True)
        os._exit(bool(missing))
    if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]):
        raise SystemExit(1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Mutation testing of the published methods.")
    parser.add_argument("--only", default="", help="modules whose path holds this; what is kept of others stays")
    parser.add_argument("--survivors", action="store_true", help="only those that no run has killed yet")
    parser.add_argument("--workers", type=int, default=2, choices=(1, 2), help="mutants at a time")
    return parser.parse_args()


if __name__ == "__main__":
    _refuse_missing()
    sys.exit(main())
