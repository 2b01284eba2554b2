"""Go or no-go before any training: `python -m trl_toolgrpo.doctor --config recipes/tiny_cpu.yaml`.

The script that would train builds the trainer. Here it is looked at, generates one group of rollouts and is checked
against itself; each fault comes with a remedy.
"""

from .examine import Examination, examine
from .result import CheckResult


__all__ = ["CheckResult", "Examination", "examine"]
