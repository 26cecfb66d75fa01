"""Report: what a run directory holds, as tables, figures and one self-contained page.

``python -m hybridcache.report RUN_DIR`` writes figures and page anew.
"""

from hybridcache.report.load import Run, load_run
from hybridcache.report.report import write_report

__all__ = ["Run", "load_run", "write_report"]
