"""Compares patchclamp with other libraries on the same job and writes docs/peers.md; `make bench-peers` runs it.

Each library runs in an environment of its own, `.venv-peers/NAME`, as a process of its own, several times, in rotated
order. One whose result differs from that of hooks written by hand is named, not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "peers.md"
sys.path.insert(0, str(HERE.parent))

import inputs  # noqa: E402
import numpy as np  # noqa: E402
from job import Result, difference, load_case  # noqa: E402
from machine import described  # noqa: E402

REFERENCE = "hooks"
OURS = "patchclamp"
HOME = (REFERENCE, "plain", OURS)  # run in the environment of this program
PEERS = ("transformer_lens", "nnsight", "pyvene", "neurox")
NAMES = {
    "plain": "plain pass again (noise of the measurement)",
    "hooks": "hooks of torch by hand",
    "patchclamp": "patchclamp",
    "transformer_lens": "TransformerLens",
    "nnsight": "nnsight",
    "pyvene": "pyvene",
    "neurox": "NeuroX",
}
LIMIT_SECONDS = 1800

Pair = tuple[float, float]  # seconds on the clock, seconds of the processor


@dataclass
class Measured:
    """What the rounds of one adapter on one case gave."""

    plain: dict[int, Pair] = field(default_factory=dict)
    recorded: dict[int, Pair] = field(default_factory=dict)
    whole: dict[int, Pair] = field(default_factory=dict)
    growth: list[int] = field(default_factory=list)
    trouble: str = ""

    def ratio(self, which: int) -> list[float]:
        """To the plain pass of the same process, round by round."""
        return [self.recorded[each][which] / self.plain[each][which] for each in self.recorded]


def main() -> None:
    """Measure and write the page."""
    chosen = _arguments()
    adapters = [*HOME, *(name for name in PEERS if name in chosen.peers)]
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        cases = inputs.made(Path(folder), chosen.sequences, chosen.texts)
        measured = {case: {name: Measured() for name in adapters} for case in cases}
        references: dict[str, Result] = {}
        for turn in range(chosen.rounds):
            for case in cases:
                order = adapters[turn % len(adapters) :] + adapters[: turn % len(adapters)]
                # the first round begins with the reference, which all are compared with
                for name in order:
                    _once(name, Path(folder) / case, turn, measured[case][name], references, versions)
            # after every round, so that a long measurement that is cut off leaves a page
            sections, troubles = [], []
            for case in cases:
                sections += _section(load_case(Path(folder) / case).title, measured[case])
                troubles += [
                    f"- {NAMES[name]}, {_short(case)}: {each.trouble}"
                    for name, each in measured[case].items()
                    if each.trouble
                ]
            PAGE.write_text(_page(turn + 1, versions, sections, troubles), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=inputs.SEQUENCES, help="of 128 tokens, for the GPT-2 shape")
    parser.add_argument("--texts", type=int, default=inputs.TEXTS, help="for all-MiniLM-L6-v2")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    return parser.parse_args()


def _once(
    name: str, case: Path, turn: int, measured: Measured, references: dict[str, Result], versions: dict[str, str]
) -> None:
    """Run one adapter once; a failure or a difference is kept in words."""
    if measured.trouble:
        return
    python = Path(sys.executable) if name in HOME else ROOT / ".venv-peers" / name / "bin" / "python"
    out = case.parent / f"{case.name}-{name}-{turn}"
    print(f"round {turn + 1}, {case.name}: {name}", file=sys.stderr, flush=True)
    if name == "neurox":  # nothing to install: the adapter only says why
        python = Path(sys.executable)
    try:
        ended = subprocess.run(
            [str(python), str(HERE / "worker.py"), name, str(case), str(out)],
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
            check=False,
        )
    except FileNotFoundError:
        measured.trouble = f"its environment .venv-peers/{name} is not there"
        return
    except subprocess.TimeoutExpired:
        measured.trouble = f"not done after {LIMIT_SECONDS} s"
        return
    if ended.returncode:
        measured.trouble = _last_line(ended.stderr) or f"ended with {ended.returncode}"
        return
    times = json.loads((out / "times.json").read_text(encoding="utf-8"))
    with np.load(out / "result.npz", allow_pickle=False) as stored:
        result = dict(stored)
    if name == REFERENCE:
        references.setdefault(case.name, result)
    if name != "plain":
        found = difference(result, references[case.name]) if case.name in references else "no reference result"
        if found:
            measured.trouble = f"its result differs, so it is not timed: {found}"
            return
    versions[name] = ", ".join(f"{package} {number}" for package, number in times["versions"].items())
    measured.plain[turn] = tuple(times["plain"])
    measured.recorded[turn] = tuple(times["recorded"])
    measured.whole[turn] = tuple(times["end_to_end"])
    measured.growth.append(times["growth"])


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("RuntimeError: ") if lines else ""


def _short(case: str) -> str:
    return {"gpt2": "GPT-2 shape", "minilm": "all-MiniLM-L6-v2"}[case]


def _section(title: str, measured: dict[str, Measured]) -> list[str]:
    done = {name: each for name, each in measured.items() if each.recorded and not each.trouble}
    lines = [
        f"## {title}",
        "",
        "On the same batches, as a multiple of the plain pass of the same process:",
        "",
        "| | wall time | processor time | memory growth |",
        "|---|---|---|---|",
    ]
    for name in sorted(done, key=lambda each: statistics.median(done[each].ratio(1))):
        each = done[name]
        memory = f"{statistics.median(each.growth) / 2**20:,.0f} MiB"
        lines.append(f"| {NAMES[name]} | {_spread(each.ratio(0))} | {_spread(each.ratio(1))} | {memory} |")
    lines += [
        "",
        "End to end, each with the batches it makes or that are usual with it, as a multiple of patchclamp:",
        "",
    ]
    if OURS not in done:
        return [*lines, "patchclamp has no result here.", ""]
    lines += ["| | wall time | processor time | seconds of the processor |", "|---|---|---|---|"]
    ours = done[OURS].whole
    compared = {name: each.whole for name, each in done.items() if name != "plain"}
    for name in sorted(compared, key=lambda each: statistics.median(_column(compared[each], 1))):
        whole = compared[name]
        both = sorted(whole.keys() & ours.keys())
        cells = [_spread([whole[turn][which] / ours[turn][which] for turn in both]) for which in (0, 1)]
        lines.append(f"| {NAMES[name]} | {cells[0]} | {cells[1]} | {statistics.median(_column(whole, 1)):.2f} |")
    return [*lines, ""]


def _column(pairs: dict[int, Pair], which: int) -> list[float]:
    return [pair[which] for pair in pairs.values()]


def _spread(ratios: Sequence[float], form: Callable[[float], str] = "{:.2f}".format) -> str:
    return f"{form(statistics.median(ratios))} ({form(min(ratios))} to {form(max(ratios))})"


def _page(rounds: int, versions: dict[str, str], sections: list[str], troubles: list[str]) -> str:
    listed = [f"- {NAMES[name]}: {found}" for name, found in versions.items()]
    return "\n".join(
        [
            "# Beside other libraries",
            "",
            "The job: for every neuron after the activation function of every MLP the count, sum, sum of squares, "
            "maximum, minimum, fraction above 0 and the 20 largest activations with their example, of all tokens that "
            "are neither padding nor special. A library that gives activations is asked for them batch by batch, and "
            "the same torch code keeps the statistics (`benchmarks/peers/job.py`); patchclamp keeps its own and "
            "tokenizes within its time. Every result is compared with that of hooks written by hand. The plain pass "
            "has no head, keeps nothing and ends at the last site. Median (least to most) of "
            f"{rounds} process{'es' * (rounds > 1)} each, in rotated order. "
            f"{described()} This page is written by `make bench-peers`; no "
            "figure on it is typed by hand.",
            "",
            *sections,
            "## Versions",
            "",
            *listed,
            "",
            "## Who could not run, and why",
            "",
            *(troubles or ["All ran."]),
            "",
        ]
    )


if __name__ == "__main__":
    main()
