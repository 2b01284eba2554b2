"""Tool-calling GRPO on top of TRL: rollouts exact to the token, updates that are on-policy and say so."""

from .checkpoint import find_checkpoint
from .config import ToolGRPOConfig
from .config_parser import ToolGRPOParser
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
from .version import __version__


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
