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
    EstimatorError,
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
    from .algorithms.base import AdvantageEstimator, RolloutGroup, TokenAdvantages
    from .checkpoints.folder import add_checksums, find_checkpoint
    from .checkpoints.output_folder import check_output_dir, earlier_runs
    from .checkpoints.run_identity import keep_batch_size
    from .config import ToolGRPOConfig, ToolGRPOParser
    from .critic.value_head import ValueHead
    from .memory import MemoryEstimate, ModelShape, estimate_memory
    from .rollout.trajectory import Trajectory, Turn
    from .run_folder.rollout_log import read_rollouts
    from .sampling.protocol import SampledTokens, Sampler, SamplerSession
    from .tools.mcp.config import MCPServer
    from .tools.mcp.session import MCPSession
    from .tools.python_sandbox.python_tool import python_tool
    from .tools.tool import Tool, ToolCall, ToolResult
    from .trainer import ToolGRPOTrainer
else:  # type checkers know the names from above
    _NAMES = {
        "algorithms.base": ["AdvantageEstimator", "RolloutGroup", "TokenAdvantages"],
        "checkpoints.folder": ["add_checksums", "find_checkpoint"],
        "config": ["ToolGRPOConfig", "ToolGRPOParser"],
        "checkpoints.run_identity": ["keep_batch_size"],
        "memory": ["MemoryEstimate", "ModelShape", "estimate_memory"],
        "checkpoints.output_folder": ["check_output_dir", "earlier_runs"],
        "run_folder.rollout_log": ["read_rollouts"],
        "sampling.protocol": ["SampledTokens", "Sampler", "SamplerSession"],
        "tools.mcp.config": ["MCPServer"],
        "tools.mcp.session": ["MCPSession"],
        "tools.python_sandbox.python_tool": ["python_tool"],
        "tools.tool": ["Tool", "ToolCall", "ToolResult"],
        "trainer": ["ToolGRPOTrainer"],
        "rollout.trajectory": ["Trajectory", "Turn"],
        "critic.value_head": ["ValueHead"],
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
    "AdvantageEstimator",
    "ChatTemplateError",
    "CheckpointError",
    "CheckpointSaveError",
    "ConfigError",
    "DatasetError",
    "DoctorError",
    "EnvironmentTimeoutError",
    "EstimatorError",
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
    "RolloutGroup",
    "RolloutLogError",
    "RolloutServerError",
    "SampledTokens",
    "Sampler",
    "SamplerError",
    "SamplerSession",
    "TokenAdvantages",
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
    "add_checksums",
    "check_output_dir",
    "earlier_runs",
    "estimate_memory",
    "find_checkpoint",
    "keep_batch_size",
    "python_tool",
    "read_rollouts",
]
