"""The report: one HTML file that needs nothing else."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from channel_metrics.analysis.report.html import write_report

__all__ = ["write_report"]


def __getattr__(name: str) -> Any:
    # Imported late, because other modules of this package do not need it.
    if name == "write_report":
        from channel_metrics.analysis.report.html import write_report

        return write_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
