"""One exception type for each boundary.

Each type is also a standard-library type, so `except ValueError` and `except TimeoutError` keep working.
"""


class ToolGRPOError(Exception):
    """
    Base of every error that this package raises on purpose.

    Args:
        *args (`object`):
            The message: what was passed, and why it cannot work.
        remedy (`str`, *optional*, defaults to `""`):
            What to do about it, in a sentence. `str(error)` ends with it.
    """

    def __init__(self, *args: object, remedy: str = "") -> None:
        super().__init__(*args)
        self.remedy = remedy

    @property
    def message(self) -> str:
        """What is wrong, without the remedy."""
        return super().__str__()

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


class ConfigError(ToolGRPOError, ValueError):
    """A combination of arguments that cannot work, found at construction."""


class DatasetError(ToolGRPOError, ValueError):
    """A dataset that cannot feed the trainer, found at construction."""


class ChatTemplateError(ToolGRPOError, ValueError):
    """A chat template that cannot carry a tool-calling conversation token by token."""


class ToolSchemaError(ToolGRPOError, ValueError):
    """A tool without a usable JSON schema, or with a name or schema that cannot be used."""


class ToolNameError(ToolGRPOError, ValueError):
    """Two tools of one name, or a prompt that names a tool that does not exist."""


class ToolTimeoutError(ToolGRPOError, TimeoutError):
    """A tool or environment call that did not return within its time limit."""


class EnvironmentTimeoutError(ToolTimeoutError):
    """An environment that did not answer within `environment_timeout`, or is still held by a tool call that hangs.

    Args:
        message (`str`):
            What did not answer.
        environment (`object`, *optional*):
            The instance.
        remedy (`str`, *optional*, defaults to `""`):
            What to do about it.
    """

    def __init__(self, message: str, environment: object | None = None, *, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.environment = environment


class ToolRuntimeError(ToolGRPOError, RuntimeError):
    """The tool runtime as a whole cannot go on, for example because too many tools hang."""


class TransientToolError(ToolGRPOError, RuntimeError):
    """Raised by a tool to say that the same call may work if it is tried again."""


class SamplerError(ToolGRPOError, RuntimeError):
    """A sampler that broke its protocol or cannot hold the rollouts it was given."""


class EngineLostError(SamplerError):
    """A rollout engine that ended by itself, and has to be started again."""


class RolloutServerError(SamplerError, ConnectionError):
    """A server of rollouts that cannot be reached, or serves another model or another run."""


class TrajectoryError(ToolGRPOError, ValueError):
    """A trajectory record with a missing, short, non-finite or misnamed field."""


class LogprobMismatchError(ToolGRPOError, ArithmeticError):
    """Log-probs recorded by the sampler and recomputed by the trainer differ beyond the tolerance."""


class RewardError(ToolGRPOError, ValueError):
    """A reward no advantage can be computed from, or a reward function that does not give one for each rollout."""


class ValueHeadError(ToolGRPOError, ValueError):
    """A value head that is missing from a checkpoint or belongs to another model, or values that are not finite."""


class CheckpointError(ToolGRPOError, ValueError):
    """A checkpoint that is torn, or that belongs to a run with another model, adapter, data set or batch."""


class CheckpointSaveError(ToolGRPOError, OSError):
    """A checkpoint that could not be written where it was to go."""


class OutputFolderInUseError(ToolGRPOError, RuntimeError):
    """An output folder that another run is writing to."""


class HubPushError(ToolGRPOError, ConnectionError):
    """A push that the Hub refused or that did not reach it; what was to be pushed is kept on disk."""


class ReferenceSyncError(ToolGRPOError, RuntimeError):
    """A reference that is not what a sync was to make it, or that cannot be restored from a checkpoint."""


class MCPServerError(ToolGRPOError, RuntimeError):
    """An MCP server that does not start or cannot be reached, with the server's own words."""


class ReportError(ToolGRPOError, ValueError):
    """Something no report can be made of, such as a folder that does not exist."""


class DoctorError(ToolGRPOError, ValueError):
    """A run that cannot be examined, such as a YAML without a script that makes its trainer."""


class RolloutLogError(ToolGRPOError, ValueError):
    """A rollout log that is missing, torn, of a newer version, or of another run than the one that replays it."""


class EstimatorError(ToolGRPOError):
    """An advantage estimator raised an error while it was asked about a group."""


class HealthError(ToolGRPOError, RuntimeError):
    """A run that a health rule has found unhealthy, with `health_checks="raise"`."""
