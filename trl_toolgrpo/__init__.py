"""Tool-calling GRPO on top of TRL: rollouts exact to the token, updates that are on-policy and say so.

The names that need torch, transformers or TRL are imported when they are first used, so that `import trl_toolgrpo`
takes no time in a process that asks for something else.
"""

import importlib
import typing

from .errors import (
    ChatTemplateError,
    CheckpointError,
    CheckpointSaveError,
    ConfigError,
    DatasetError,
    DoctorError,
    EnvironmentTimeoutError,
    HealthError,
    HubPushError,
    LogprobMismatchError,
    MCPServerError,
    OutputFolderInUseError,
    ReferenceSyncError,
    ReportError,
    RewardError,
    RolloutLogError,
    RolloutServerError,
    SamplerError,
    ToolGRPOError,
    ToolNameError,
    ToolRuntimeError,
    ToolSchemaError,
    ToolTimeoutError,
    TrajectoryError,
    TransientToolError,
    ValueHeadError,
)
from .version import __version__


if typing.TYPE_CHECKING:
    from .checkpoint import find_checkpoint
    from .config import ToolGRPOConfig
    from .config_parser import ToolGRPOParser
    from .identity import keep_batch_size
    from .memory import MemoryEstimate, ModelShape, estimate_memory
    from .output_folder import check_output_dir, earlier_runs
    from .rollout_log import read_rollouts
    from .tools.mcp_config import MCPServer
    from .tools.mcp_session import MCPSession
    from .tools.python import python_tool
    from .tools.types import Tool, ToolCall, ToolResult
    from .trainer import ToolGRPOTrainer
    from .trajectory import Trajectory, Turn
    from .value import ValueHead
else:  # type checkers know the names from above
    _NAMES = {
        "checkpoint": ["find_checkpoint"],
        "config": ["ToolGRPOConfig"],
        "config_parser": ["ToolGRPOParser"],
        "identity": ["keep_batch_size"],
        "memory": ["MemoryEstimate", "ModelShape", "estimate_memory"],
        "output_folder": ["check_output_dir", "earlier_runs"],
        "rollout_log": ["read_rollouts"],
        "tools.mcp_config": ["MCPServer"],
        "tools.mcp_session": ["MCPSession"],
        "tools.python": ["python_tool"],
        "tools.types": ["Tool", "ToolCall", "ToolResult"],
        "trainer": ["ToolGRPOTrainer"],
        "trajectory": ["Trajectory", "Turn"],
        "value": ["ValueHead"],
    }

    def __getattr__(name: str) -> object:
        for module, names in _NAMES.items():
            if name in names:
                globals()[name] = getattr(importlib.import_module(f".{module}", __name__), name)
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "ChatTemplateError",
    "CheckpointError",
    "CheckpointSaveError",
    "ConfigError",
    "DatasetError",
    "DoctorError",
    "EnvironmentTimeoutError",
    "HealthError",
    "HubPushError",
    "LogprobMismatchError",
    "MCPServer",
    "MCPServerError",
    "MCPSession",
    "MemoryEstimate",
    "ModelShape",
    "OutputFolderInUseError",
    "ReferenceSyncError",
    "ReportError",
    "RewardError",
    "RolloutLogError",
    "RolloutServerError",
    "SamplerError",
    "Tool",
    "ToolCall",
    "ToolGRPOConfig",
    "ToolGRPOError",
    "ToolGRPOParser",
    "ToolGRPOTrainer",
    "ToolNameError",
    "ToolResult",
    "ToolRuntimeError",
    "ToolSchemaError",
    "ToolTimeoutError",
    "Trajectory",
    "TrajectoryError",
    "TransientToolError",
    "Turn",
    "ValueHead",
    "ValueHeadError",
    "__version__",
    "check_output_dir",
    "earlier_runs",
    "estimate_memory",
    "find_checkpoint",
    "keep_batch_size",
    "python_tool",
    "read_rollouts",
]
