"""`ToolGRPOConfig`: every option, the checks of options against each other, and the parser of command lines."""

from .fields import ToolGRPOConfig
from .parser import ToolGRPOParser


__all__ = ["ToolGRPOConfig", "ToolGRPOParser"]
