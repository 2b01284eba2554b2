"""Go or no-go before any training: `python -m trl_toolgrpo.doctor --config recipes/tiny_cpu.yaml`.

Owns the questions asked of a run that is about to start, each answered in words with a remedy. The script that would
train builds the trainer; here it is looked at, makes one group of rollouts and is checked against itself.
"""

from .examination import Examination, examine
from .findings import Finding


__all__ = ["Examination", "Finding", "examine"]
