"""Which advantage estimator a run has: a built-in name, an object, or `package.module:Name`."""

import contextlib
import importlib

from ..config.checks import ESTIMATORS
from ..config.fields import ToolGRPOConfig, default_values
from ..errors import ConfigError
from .base import AdvantageEstimator


def estimator_of(args: ToolGRPOConfig) -> AdvantageEstimator:
    """
    Return the estimator of a run.

    Args:
        args ([`ToolGRPOConfig`]):
            Configuration; `advantage_estimator` is read.

    Raises:
        ConfigError: if `package.module:Name` cannot be imported, or what was passed is no estimator.
    """
    given: object = args.advantage_estimator
    if isinstance(given, str):
        kind = _imported(ESTIMATORS.get(given, given))
        given = _made(kind, args) if isinstance(kind, type) and issubclass(kind, AdvantageEstimator) else kind
    if not isinstance(given, AdvantageEstimator):
        what = f"the class `{given.__name__}`" if isinstance(given, type) else f"an object of {type(given).__name__}"
        raise ConfigError(
            f"You passed {what} as `advantage_estimator`, which takes an object of an `AdvantageEstimator`.",
            remedy="Subclass `trl_toolgrpo.AdvantageEstimator`, and pass an object of it or `package.module:Name`.",
        )
    if type(given).score is AdvantageEstimator.score:
        raise ConfigError(
            f"You passed the advantage estimator {given.name}, which does not override `score`.",
            remedy="Define `score(self, group)`; it returns one advantage for each rollout, or for each token.",
        )
    _check_options(args, given)
    with contextlib.suppress(AttributeError):  # of a frozen dataclass
        given.args = args
    return given


def _made(kind: type[AdvantageEstimator], args: ToolGRPOConfig) -> AdvantageEstimator:
    """Return an object of a class that was passed by its name."""
    try:
        return kind(args)
    except TypeError as error:
        raise ConfigError(
            f"You passed `advantage_estimator={args.advantage_estimator!r}`, which cannot be made: {error}. The class "
            "is called with the configuration alone.",
            remedy="Give its other arguments defaults, or pass an object.",
        ) from error


def _imported(name: str) -> object:
    """Return what `package.module:Name` names."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError) as error:  # the latter for a name that begins with a dot
        raise ConfigError(
            f"You passed `advantage_estimator={name!r}`, which cannot be imported: {error}.",
            remedy="Name a class as `package.module:Name`; the module must be installed, or in a folder of "
            "`sys.path`.",
        ) from error


def _check_options(args: ToolGRPOConfig, estimator: AdvantageEstimator) -> None:
    """Check that what is set acts on the estimator; a configuration cannot tell that of every one."""
    defaults = {name: value for name, value in default_values(args).items() if name.startswith("value_")}
    idle = [name for name, value in defaults.items() if getattr(args, name) != value]
    if idle and not estimator.needs_values:
        raise ConfigError(
            f"You passed {', '.join(f'`{name}={getattr(args, name)}`' for name in idle)} with the advantage estimator "
            f"{estimator.name}, which asks for no value head that it could act on.",
            remedy="Leave it out, or set `needs_values = True` in the class.",
        )
    if estimator.whitens and not estimator.needs_values:
        raise ConfigError(
            f"The advantage estimator {estimator.name} sets `whitens` without `needs_values`: only the advantages of "
            "`TokenAdvantages` are whitened.",
            remedy="Set `needs_values`, or leave `whitens` out and scale in `score`.",
        )
    if args.loss_type == "vespo" and estimator.needs_values:
        raise ConfigError(
            f"You passed `loss_type='vespo'` with the advantage estimator {estimator.name}, which gives each token "
            "its own. VESPO weighs a whole sequence by one advantage.",
            remedy="Use another `loss_type`.",
        )
