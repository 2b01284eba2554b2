"""The Berkeley Function Calling Leaderboard, to train on and to evaluate with."""

from .multi_turn import MultiTurn
from .task import build_bfcl


__all__ = ["MultiTurn", "build_bfcl"]
