"""azure: the Azure LLM inference traces (2023: Splitwise, Patel et al., ISCA 2024; the 2024 files have the same columns)."""

from datetime import UTC, datetime
from pathlib import Path

from hybridcache.workloads.base import Workload
from hybridcache.workloads.trace_file import Line, Row, Window, build, csv_lines, trace_path

PUBLIC = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
"""Header of the published files: a date and time, prompt tokens, output tokens."""
RELATIVE = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")
"""Header of the common preprocessed form (Vidur's): seconds since the first request instead of a date."""


def azure(
    *, path: str | Path | None = None, max_requests: int | None = None, start_s: float = 0.0, time_scale: float = 1.0
) -> Workload:
    """Read an Azure LLM inference trace (CSV), in its published or its preprocessed form; the header tells which.

    Args:
        path: ``AzureLLMInferenceTrace_conv.csv``, ``AzureLLMInferenceTrace_code.csv`` or the like.
        max_requests, start_s, time_scale: see :class:`Window`.

    Raises:
        UserError: no such file, a malformed line (named), or a value out of range.
    """
    window = Window(max_requests, start_s, time_scale)
    found = trace_path(
        path,
        "Azure LLM inference trace 2023",
        "the GitHub repository Azure/AzurePublicDataset (AzureLLMInferenceDataset2023)",
    )
    rows = [_row(line) for line in csv_lines(found, (PUBLIC, RELATIVE))]
    return build("azure", *window.choose(rows, found))


def _row(line: Line) -> Row:
    if PUBLIC[0] in line.fields:
        return Row(_timestamp(line), line.tokens(PUBLIC[1]), line.tokens(PUBLIC[2]))
    return Row(line.seconds(RELATIVE[0]), line.tokens(RELATIVE[1]), line.tokens(RELATIVE[2]))


def _timestamp(line: Line) -> float:
    """Seconds since 1970. Times without a zone are taken as UTC: only differences matter."""
    expected = "a date and time such as 2023-11-16 18:15:46.6805900"
    value = line.get(PUBLIC[0], expected)
    try:
        found = datetime.fromisoformat(str(value).strip())
    except ValueError:
        raise line.bad(PUBLIC[0], value, expected) from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
