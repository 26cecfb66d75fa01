"""Hold every figure of README.md and docs/ to the record it comes from: ``python -m tests.checks.docs_figures``.

A figure is a number with a unit in prose, or a cell of a table that holds nothing but numbers. The comment behind a paragraph,
a list item or a table says where its figures come from, one line each:

    <!-- figures
    8,615 = mean(@serve_throughput-h100:results[strategy=shared_pool,workload=chat].output_tokens_per_s)
    4.1 / 13.4 = 1000 * only(@kernels-h100:rows[op=gdn_decode,dtype=float32,shape=$,l2=cold].median_ms) for $ in 1 | 8
    2 GiB :: given
    -->

* Left of the last ``=`` stand words of the text as they are; their numbers, in order, must be what the expression gives,
  rounded to the digits that are written. ``@record:path`` is a list of values in ``benchmarks/results/record.json``:
  ``[key=value,...]`` (or ``!=``) chooses rows, ``[key]`` an entry, ``[2]`` by place. ``spec(model)`` is a shipped model's cache
  spec, for sizes that follow from it. ``for $ in a | b`` evaluates the expression once for each; ``max:`` or ``min:`` before it
  takes one of them. A line without ``=`` or ``::`` goes on with the one before.
* ``::`` gives the reason why there is no record: ``given`` (a setting, a limit, a definition), ``computed by`` a test or
  command, ``source`` (others published it), ``printed`` (the log tells that nothing was kept), ``in the records of commit``.
* ``<!-- figures of this section :: reason -->`` behind a heading speaks for everything up to the next heading.

Exit status 1: a figure that differs from its record, or that no comment covers.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("benchmarks/results")
REASONS = ("given", "computed by ", "source ", "printed", "in the records of commit ")

NUMBER = re.compile(r"(?<![\w.,-])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e-?\d+)?(?![\w]|,?\d|\.\d)")
UNITS = "tokens/s|tok/s|tokens a second|[KMGT]?i?B/s|[TG]FLOP/s|[mu]s|µs|s|seconds?|minutes?|%|[KMGT]i?B|B|times"
FIGURES = re.compile(rf"{NUMBER.pattern}(?:\s?(?:to|and|or|against|/|,)\s?{NUMBER.pattern})*\s?(?:{UNITS})(?![\w/])")
"""Numbers before a unit."""
CELL = re.compile(r"[\d.,/ +%-]*\d[\d.,/ +%-]*(?:%|x)?")
QUERY = re.compile(r"@([\w-]+):((?:\.?[\w-]+|\[[^\]]*\])+)")
COMMENT = re.compile(r"<!-- figures(.*?)-->", re.DOTALL)


@dataclass
class Block:
    """A paragraph, a list item or a table, its code taken out, and what the comment behind it says."""

    place: str
    text: str
    table: bool = False
    lines: list[str] = field(default_factory=list)
    excused: bool = False


@dataclass
class Outcome:
    """What a check of one document, or of all, finds."""

    checked: int = 0
    excused: int = 0
    wrong: list[str] = field(default_factory=list)


# -- documents -----------------------------------------------------------------------------------------------------------


def blocks(name: str, text: str) -> list[Block]:
    """A document's blocks in order."""
    text = re.sub(r"^( *```).*?^\1", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    comments: list[str] = []

    def stand_in(match: re.Match[str]) -> str:
        comments.append(match[1])
        return f"\0{len(comments) - 1}" + "\n" * match[0].count("\n")

    found: list[Block] = []
    current: Block | None = None
    excused = False
    for number, line in enumerate(COMMENT.sub(stand_in, text).split("\n"), 1):
        stripped, place = line.strip(), f"{name}:{number}"
        if stripped.startswith("\0"):
            comment, current = comments[int(stripped[1:])].strip(), None
            if comment.startswith("of this section"):
                excused = True
                found.append(Block(place, "", lines=[comment.removeprefix("of this section")]))
            else:
                found[-1].lines += joined(comment)
        elif not stripped:
            current = None
        else:
            heading, table = stripped.startswith("#"), stripped.startswith("|")
            if current is None or heading or table != current.table or re.match(r"([*-]|\d+\.) ", stripped):
                excused = excused and not heading
                current = Block(place, "", table, excused=excused)
                found.append(current)
            current.text += ("\n" if table else " ") + re.sub(r"`[^`]*`", "`", stripped)
    return found


def joined(comment: str) -> list[str]:
    """Lines of a comment; one without a sign of its own goes on with the line before it."""
    found: list[str] = []
    for line in filter(None, map(str.strip, comment.split("\n"))):
        if re.search(r" (=|::)( |$)", line) or not found:
            found.append(line)
        else:
            found[-1] += f" {line}"
    return found


def figures(block: Block) -> Iterator[re.Match[str]]:
    """Numbers that need a record."""
    if not block.table:
        for match in FIGURES.finditer(block.text):
            yield from NUMBER.finditer(block.text, *match.span())
        return
    at = 0
    for row, line in enumerate(block.text.split("\n")):
        if row > 2 and not re.fullmatch(r"[|: -]*", line):  # behind the heading and its rule
            start = at
            for column, cell in enumerate(line.split("|")):
                if column > 1 and CELL.fullmatch(cell.strip()) and not re.search(r"\d\.\d+\.", cell):  # no version
                    yield from NUMBER.finditer(block.text, start, start + len(cell))
                start += len(cell) + 1
        at += len(line) + 1


# -- records -------------------------------------------------------------------------------------------------------------


@cache
def record(name: str) -> Any:
    """A record's content.

    Raises:
        FileNotFoundError: there is none of that name.
    """
    return json.loads((ROOT / RESULTS / f"{name}.json").read_text())


def select(name: str, path: str) -> list[Any]:
    """Values at a path.

    Raises:
        LookupError: there are none.
    """
    found = [record(name)]
    for plain, chosen in re.findall(r"\.?([\w-]+)|\[([^\]]*)\]", path):
        rows = [row for each in found for row in (each if isinstance(each, list) else [each])]
        if chosen.isdigit():
            found = [each[int(chosen)] for each in found]
        elif plain or "=" not in chosen:
            found = [row[plain or chosen] for row in rows if (plain or chosen) in row]
        else:
            for key, sign, value in re.findall(r"(\w+)(!?=)(.*?)(?=,\w+!?=|$)", chosen):
                rows = [row for row in rows if (str(row.get(key)) == value) == (sign == "=")]
            found = rows
    if not found:
        raise LookupError(f"@{name}:{path} is nothing")
    return found


def only(values: list[Any]) -> Any:
    """The one value of a list.

    Raises:
        LookupError: there are several.
    """
    if len(values) != 1:
        raise LookupError(f"{len(values)} values where one is meant")
    return values[0]


def spec(model: str, **options: Any) -> Any:
    """The cache spec of a shipped model, for sizes that follow from its configuration."""
    from hybridcache.spec import CacheSpec
    from models.configs import shipped_config

    return CacheSpec.from_config(shipped_config(model), **options)


def pairs(values: list[Any]) -> list[list[Any]]:
    """Two by two: the repetitions of rows that stand in order."""
    return [values[i : i + 2] for i in range(0, len(values), 2)]


def spread(values: Iterable[float]) -> float:
    """Largest over smallest, less one."""
    found = list(values)
    return max(found) / min(found) - 1


FUNCTIONS = {
    function.__name__: function for function in (spec, only, pairs, spread, mean, median, min, max, sum, len, sorted)
}


def evaluate(expression: str) -> list[float]:
    """The numbers that an expression gives."""
    chosen = {"max: ": max, "min: ": min}.get(expression[:5])
    expression, _, items = (expression[5:] if chosen else expression).partition(" for $ in ")
    names: dict[str, Any] = {**FUNCTIONS, "_select": select, "__builtins__": {}}
    numbers: list[float] = []
    for item in map(str.strip, items.split("|")):
        code = QUERY.sub(lambda match: f"_select({match[1]!r}, {match[2]!r})", expression.replace("$", item))
        value = eval(code, names)  # of our own documents, as doctest evaluates them
        numbers += value if isinstance(value, (list, tuple)) else [value]
    return [chosen(numbers)] if chosen else numbers


def agrees(written: str, value: float) -> bool:
    """Whether a value, rounded to the digits written, is what is written."""
    plain = written.replace(",", "")
    mantissa, _, exponent = plain.partition("e")
    digits = len(mantissa.partition(".")[2])
    unit = 10.0 ** (int(exponent or 0) - digits)
    return abs(value - float(plain)) <= unit * (0.5 + 1e-6)


# -- verdict -------------------------------------------------------------------------------------------------------------


def check(block: Block) -> Outcome:
    """One block's figures against their records."""
    found, covered = Outcome(), set[int]()
    flat = block.text.replace("\n", " ")

    def wrong(text: str) -> None:
        found.wrong.append(f"{block.place}: {text}")

    for line in block.lines:
        if " :: " in line and " = " not in line.split(" :: ")[0]:
            words, reason = (part.strip() for part in line.split(" :: ", 1))
            if not reason.startswith(REASONS):
                wrong(f"{line.strip()!r}: the reason is none of {', '.join(REASONS)}")
            found.excused += bool(words)
            test = re.match(r"computed by (\S+\.py)", reason)
            if test and not (ROOT / test[1]).exists():
                wrong(f"there is no {test[1]}")
        elif " = " in line:
            words, expression = (part.strip() for part in line.rsplit(" = ", 1))
            written = NUMBER.findall(words)
            try:
                values = evaluate(expression)
                if len(written) != len(values):
                    wrong(f"{words!r} has {len(written)} numbers, its record {len(values)}")
                for text, value in zip(written, values):
                    if not agrees(text, value):
                        wrong(f"{text} in {words!r} is {value:.6g} in the record")
                found.checked += len(values)
            except Exception as error:  # of one line, which must not hide the others
                wrong(f"{line!r}: {type(error).__name__}: {error}")
        else:
            wrong(f"{line!r}: neither a record nor a reason")
            continue
        if words and words not in flat:
            wrong(f"{words!r} does not stand in the text")
        for match in re.finditer(re.escape(words), flat) if words else ():
            covered.update(range(*match.span()))
    if block.excused:
        found.excused += len(list(figures(block)))
        return found
    for match in figures(block):
        if match.start() not in covered:
            around = flat[max(match.start() - 30, 0) : match.end() + 20].strip()
            wrong(f"no record for {match[0].strip()!r} in {around!r}")
    return found


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def check_documents(paths: Iterable[Path]) -> Outcome:
    """All figures of these documents."""
    found = [check(block) for path in paths for block in blocks(path.name, path.read_text())]
    wrong = [line for each in found for line in each.wrong]
    return Outcome(sum(each.checked for each in found), sum(each.excused for each in found), wrong)


def main() -> int:
    total = check_documents([Path(name) for name in sys.argv[1:]] or documents())
    print("\n".join(total.wrong) or "every figure is its record's")
    print(f"{total.checked} figures checked, {total.excused} with a reason and no record, {len(total.wrong)} wrong")
    return 1 if total.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
