"""Every figure of the documents against its record, and what the check sees: other digits, other words, no record at all."""

import json

import pytest

from tests.checks import docs_figures
from tests.checks.docs_figures import agrees, blocks, check, check_documents, documents, evaluate

ROWS = [
    {"strategy": "a", "workload": "x", "rate": 1069.4},
    {"strategy": "a", "workload": "x", "rate": 1071.0},
    {"strategy": "b", "workload": "y", "rate": 0.25},
]


@pytest.fixture(autouse=True)
def records(tmp_path_factory, monkeypatch):
    """One record of three rows, ``serve``."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "serve.json").write_text(json.dumps({"rows": ROWS, "sizes": {"whole thing": {"bytes": 2048}}}))
    monkeypatch.setattr(docs_figures, "RESULTS", folder)
    docs_figures.record.cache_clear()
    yield
    docs_figures.record.cache_clear()


def wrong(text: str) -> list[str]:
    return [line for block in blocks("page.md", text) for line in check(block).wrong]


def test_every_figure_of_the_documents_is_its_records(monkeypatch):
    monkeypatch.undo()
    docs_figures.record.cache_clear()
    total = check_documents(documents())
    assert total.wrong == []
    assert total.checked > 150


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("mean(@serve:rows[strategy=a,workload=x].rate)", [1070.2]),
        ("only(@serve:rows[strategy!=a].rate) * 4", [1.0]),
        ("only(@serve:sizes[whole thing].bytes) / 2**10", [2.0]),
        ("@serve:rows[2].rate", [0.25]),
        ("max(@serve:rows[workload=$].rate) for $ in x | y", [1071.0, 0.25]),
        ("min: max(@serve:rows[workload=$].rate) for $ in x | y", [0.25]),
        ("100 * spread(pairs(@serve:rows.rate)[0])", [100 * (1071.0 / 1069.4 - 1)]),
        ('spec("qwen3_next_80b_a3b").kv_bytes_per_token', [24576]),
    ],
)
def test_expressions(expression, expected):
    assert evaluate(expression) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("written", "value", "expected"),
    [
        ("1,070", 1070.49, True),
        ("1,070", 1070.51, False),
        ("0.25", 0.2549, True),
        ("0.25", 0.2451, True),
        ("0.250", 0.2451, False),
        ("5e-3", 0.0051, True),
        ("5e-3", 0.0056, False),
    ],
)
def test_rounding_is_to_the_digits_written(written, value, expected):
    assert agrees(written, value) is expected


GOOD = """It serves 1,070 tokens/s.
<!-- figures
1,070 = mean(@serve:rows[strategy=a].rate)
-->
"""


def test_a_figure_with_its_record_is_right():
    assert wrong(GOOD) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD.replace("1,070", "1,071"), "1,071 in '1,071' is 1070.2 in the record"),
        (GOOD.replace("serves 1,070", "serves 1,090"), "'1,070' does not stand in the text"),
        (GOOD.replace("tokens/s.", "tokens/s, after 12 ms."), "no record for '12'"),
        (GOOD.replace("strategy=a", "strategy=c"), "is nothing"),
        (GOOD.replace("serve:", "gone:"), "FileNotFoundError"),
        (GOOD.replace("mean(", "only("), "2 values where one is meant"),
        (GOOD.replace("1,070 =", "1,070 to 2 ="), "2 numbers, its record 1"),
        (GOOD.replace(" = mean", " :: whatever"), "the reason is none of"),
        ("Takes 0.3 to 0.5 ms.\n", "no record for '0.3'"),
        ("* fast: 3 %\n* slow\n", "no record for '3'"),
        ("| a | b |\n|---|---|\n| x | 17 |\n", "no record for '17'"),
        (
            "Held to 9 B.\n<!-- figures\n9 B :: computed by tests/no_such_test.py\n-->\n",
            "there is no tests/no_such_test.py",
        ),
    ],
)
def test_what_is_wrong_is_named(text, words):
    assert any(words in line for line in wrong(text)), wrong(text)


@pytest.mark.parametrize(
    "text",
    [
        "Version 0.25.1 runs 64 requests of 1,024 tokens.\n",
        "```\nit takes 12 ms\n```\n",
        "A budget of `20 GiB` is given.\n",
        "| a | version |\n|---|---|\n| x | 0.25.1 |\n",
        "A budget of 20 GiB.\n<!-- figures\n20 GiB :: given\n-->\n",
        "# Old\n<!-- figures of this section :: printed -->\n\nIt took 12 ms.\n\n* or 13 ms\n",
    ],
)
def test_what_is_no_measurement_needs_no_record(text):
    assert wrong(text) == []


def test_a_section_speaks_for_itself_alone():
    text = "# Old\n<!-- figures of this section :: printed -->\n\nIt took 12 ms.\n\n# New\n\nIt takes 11 ms.\n"
    assert [line.split(": ", 1)[1][:19] for line in wrong(text)] == ["no record for '11' "]
