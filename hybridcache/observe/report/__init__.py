"""Report: what a run directory holds, as tables, figures and one self-contained page.

``python -m hybridcache.observe.report RUN_DIR`` writes figures and page anew.
"""

from hybridcache.observe.report.load import NoData, Run, load_run
from hybridcache.observe.report.report import write_report

__all__ = ["NoData", "Run", "load_run", "write_report"]
