"""A run as one HTML file: `python -m trl_toolgrpo.report <output_dir>`.

Owns what the page shows and how it is packed; reads what a run leaves in its output folder, and nothing else.
"""

from .page import ReportPage, build_report


__all__ = ["ReportPage", "build_report"]
