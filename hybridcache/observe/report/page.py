"""Page: a self-contained HTML page of sections with tables and figures, for experiments that compare no strategies."""

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

DPI = 150


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
    """A heading, paragraphs, figures, then a table."""

    title: str
    texts: list[str] = field(default_factory=list)
    figures: list[Picture] = field(default_factory=list)
    headings: Sequence[str] = ()
    rows: list[list[str]] = field(default_factory=list)


def save_picture(folder: Path, name: str, figure: Figure, data: pd.DataFrame, caption: str) -> Picture:
    """Write ``name.png`` and ``name.csv`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    png = folder / f"{name}.png"
    figure.savefig(png, dpi=DPI)
    data.to_csv(png.with_suffix(".csv"), index=False)
    title = " ".join(figure.get_suptitle().split())
    return Picture(name, title, caption, base64.b64encode(png.read_bytes()).decode("ascii"))


def write_page(run_dir: Path, title: str, about: Sequence[str], sections: Sequence[Section]) -> Path:
    """``report.html`` of a run, with the environment of its ``environment.json`` where there is one."""
    package = files("hybridcache.observe.report")
    css = re.search(r"<style>(.*?)</style>", package.joinpath("template.html").read_text(encoding="utf-8"), re.DOTALL)
    assert css is not None
    file = run_dir / "environment.json"
    environment = json.loads(file.read_text()) if file.exists() else {}
    page = (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(package.joinpath("page.html").read_text(encoding="utf-8"))
        .render(title=title, about=about, sections=sections, facts=_facts(environment), css=_Safe(css.group(1)))
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


class _Safe(str):
    """Text of ours that goes into the page as it is."""

    def __html__(self) -> str:
        return self


def _facts(environment: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in environment.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{key}": str(text) for key, text in value.items() if text is not None}
        elif value is not None:
            found[name] = str(value)
    return found
