"""A run as one HTML file: `python -m trl_toolgrpo.report <output_dir>`.

It reads what a run leaves in its output folder, and nothing else.
"""

from .folder import RunFolder, read_folder
from .page import ReportPage, build_report


__all__ = ["ReportPage", "RunFolder", "build_report", "read_folder"]
