"""All health rules, in the order in which they are run."""

from .monitor import Rule
from .rollout_rules import ROLLOUT_RULES
from .update_rules import UPDATE_RULES


RULES: tuple[Rule, ...] = (*UPDATE_RULES, *ROLLOUT_RULES)
"""Add the rules of a module of your own here."""
