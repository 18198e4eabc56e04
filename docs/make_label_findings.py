"""Write docs/label-findings.md: what the finders for a label find in real networks. All its figures are of this run.

    .venv/bin/python docs/make_label_findings.py

Takes some minutes. Data that are not the package's own are looked for in PATCHCLAMP_DATA, else in ../shared/data beside
the checkout; what is not there is left out, and the page says so. The parts are in docs/label_findings.
"""

from __future__ import annotations

import time
from pathlib import Path

from label_findings.language_neurons import four_languages
from label_findings.page import agreement, head, section
from label_findings.parts_of_speech import parts_of_speech
from label_findings.search import searched
from label_findings.tasks import code, dialogue, reviews, subjectivity

PAGE = Path(__file__).resolve().with_name("label-findings.md")


def main() -> None:
    """Run everything, and write the page."""
    started = time.perf_counter()
    found, parts, missing = [], [], []

    def say(what: str) -> None:
        print(f"{what}: done after {time.perf_counter() - started:.0f} s", flush=True)

    for make in (code, reviews, subjectivity, dialogue):
        try:
            found.append(searched(make()))
        except FileNotFoundError as error:
            missing.append(f"- {make.__name__}: {name_of(error)}")
        say(make.__name__)
    parts += [*map(section, found), agreement(found)]
    try:
        parts.append(parts_of_speech())
    except FileNotFoundError as error:
        missing.append(f"- parts of speech: {name_of(error)}")
    say("parts of speech")
    parts.append(four_languages())
    say("language neurons")
    if missing:
        parts += ["## Not run", "The data of these were not at hand where this page was written:", "\n".join(missing)]
    PAGE.write_text("\n\n".join([*head(found), *parts]) + "\n", encoding="utf-8")
    print(f"written: docs/{PAGE.name}")


def name_of(error: FileNotFoundError) -> str:
    """What is not there, without the folders of this machine."""
    return Path(error.filename or str(error)).name


if __name__ == "__main__":
    main()
