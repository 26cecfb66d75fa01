"""burstgpt: the BurstGPT trace (Wang et al., arXiv 2401.17644) of ChatGPT and GPT-4 use on Azure."""

import logging
from pathlib import Path

from hybridcache.errors import UserError
from hybridcache.workloads.base import Workload
from hybridcache.workloads.trace_file import Row, Window, build, csv_lines, trace_path

COLUMNS = ("Timestamp", "Request tokens", "Response tokens")
"""What is read; ``Model``, ``Total tokens`` and ``Log Type`` are there too, newer releases have more."""

_log = logging.getLogger(__name__)


def burstgpt(
    *, path: str | Path | None = None, max_requests: int | None = None, start_s: float = 0.0, time_scale: float = 1.0
) -> Workload:
    """Read a BurstGPT trace (CSV, times in seconds). Rows with 0 response tokens are failed requests, as the trace's
    authors say: they are skipped, and their number is logged once and told in ``Workload.source``.

    Args:
        path: ``BurstGPT_1.csv`` or the like.
        max_requests, start_s, time_scale: see :class:`Window`.

    Raises:
        UserError: no such file, a malformed line (named), a value out of range, or failures only.
    """
    window = Window(max_requests, start_s, time_scale)
    found = trace_path(path, "BurstGPT trace", "the GitHub repository HPMLL/BurstGPT (data/ and its releases)")
    rows, failed = [], 0
    for line in csv_lines(found, (COLUMNS,)):
        time_s, output = line.seconds(COLUMNS[0]), line.tokens(COLUMNS[2], least=0)
        if output == 0:
            failed += 1
            continue
        rows.append(Row(time_s, line.tokens(COLUMNS[1]), output))
    if failed and not rows:
        raise UserError(
            f"{found}: all {failed} rows have 0 response tokens (failed requests); give a trace with successes"
        )
    chosen, source = window.choose(rows, found)
    if failed:
        _log.warning("%s: skipped %d failed requests (0 response tokens)", found, failed)
        source += f" (skipped {failed} failed requests)"
    return build("burstgpt", chosen, source)
