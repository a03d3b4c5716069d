"""`report.html` of a run."""

from typing import Any

from lapilli.train.setup import Prepared


def write_report(ready: Prepared, rows: list[dict[str, Any]]) -> None:
    """Write the run's report from its metrics."""
