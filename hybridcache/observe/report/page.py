"""Page: a self-contained HTML page of sections with cards, figures and tables; every report is made of it."""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment
from matplotlib.figure import Figure

from hybridcache.observe.report.units import seconds_text

DPI = 150
SUFFIXES = (".png", ".pdf", ".csv")
"""Files of a figure: to look at, to print, to analyse."""


class Best(str):
    """A table's cell that is shaded."""

    best = True


@dataclass(frozen=True)
class Card:
    """One answer: what was asked, the value, who reached it, and how it compares."""

    title: str
    value: str
    strategies: str
    note: str


@dataclass(frozen=True)
class Picture:
    """A figure that lies in the run's ``figures/`` beside its data."""

    name: str
    title: str
    caption: str
    image: str
    """PNG, base64."""


@dataclass
class Section:
    """A heading with paragraphs, cards, figures, a table, notes and terms; what is empty is left out.

    ``anchor`` names a section of the first level, which the page's navigation lists; without one it belongs to the one before.
    """

    title: str
    texts: list[str] = field(default_factory=list)
    figures: list[Picture] = field(default_factory=list)
    headings: Sequence[str] = ()
    rows: list[list[str]] = field(default_factory=list)
    anchor: str = ""
    cards: Sequence[Card] = ()
    notes: Sequence[str] = ()
    terms: Mapping[str, str] = field(default_factory=dict)


def save_picture(folder: Path, name: str, figure: Figure, data: pd.DataFrame, caption: str) -> Picture:
    """Write ``name.png``, ``name.pdf`` (vectors) and ``name.csv`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    png, pdf, csv = (folder / f"{name}{suffix}" for suffix in SUFFIXES)
    figure.dpi = DPI
    if (layout := figure.get_layout_engine()) is not None:
        layout.execute(figure)
        figure.set_layout_engine(None)  # laid out once for both files, and no file is drawn once more to be laid out
    figure.savefig(png, dpi=DPI)
    figure.savefig(pdf, dpi=DPI, metadata={"CreationDate": None})
    data.to_csv(csv, index=False)
    title = " ".join(figure.get_suptitle().split())
    return Picture(name, title, caption, base64.b64encode(png.read_bytes()).decode("ascii"))


def write_page(
    run_dir: Path, title: str, about: Sequence[str], sections: Sequence[Section], header: Sequence[Sequence[str]] = (),
    config: str = "",
) -> Path:  # fmt: skip
    """``report.html`` of a run, with the environment of its ``environment.json`` where there is one.

    Args:
        about: paragraphs under the title.
        header: rows of the table under them; the first holds its headings.
        config: the configuration, as text.
    """
    file = run_dir / "environment.json"
    facts = flat(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}
    template = files("hybridcache.observe.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(
        title=title, about=about, header=header, sections=sections, facts=facts, config=config
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values under dotted names, as text; unknown ones are left away and seconds are said as people say them."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif key.endswith("_s") and isinstance(value, int | float):
            found[prefix + key.removesuffix("_s")] = seconds_text(value)
        elif value is not None:
            found[f"{prefix}{key}"] = str(value)
    return found


def file_name(text: str) -> str:
    """``text`` as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", text).strip("_.") or "unnamed"
