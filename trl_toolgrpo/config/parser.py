"""A command line and its YAML, in which every value is checked wherever it comes from."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, get_args

import yaml
from trl import TrlParser

from ..errors import ConfigError
from .checks import as_whole, field_types, wrong_type


class ToolGRPOParser(TrlParser):
    """
    TRL's parser of command lines and YAMLs, which says in one line what it cannot read.

    That is a key or a flag that no argument has (it names the one that was likely meant), a value of another type, and
    one that is none of the choices. Flags cannot be abbreviated.

    Args:
        dataclass_types (`Sequence[type]`):
            The dataclasses to fill, as in [`~trl.TrlParser`].
    """

    def __init__(self, dataclass_types: Sequence[Any]) -> None:
        super().__init__(tuple(dataclass_types), allow_abbrev=False)
        self.hints = {name: hint for kind in dataclass_types for name, hint in field_types(kind).items()}
        self.source = ""

    def parse_args_and_config(
        self, args: Iterable[str] | None = None, *options: bool, **kwargs: bool
    ) -> tuple[Any, ...]:
        """
        Read a command line and the YAML that its `--config` names.

        Args:
            args, options, kwargs:
                As in [`~trl.TrlParser.parse_args_and_config`].

        Raises:
            ConfigError: naming the file or the flag, for what cannot be read.
        """
        given = [] if args is None else list(args)
        if given[-1:] == ["--config"]:
            raise ConfigError("You passed `--config` without a file.", remedy="Name a YAML.")
        self.source = given[given.index("--config") + 1] if "--config" in given else ""
        if self.source and not Path(self.source).is_file():
            raise ConfigError(f"You passed `--config {self.source}`, which is no file.", remedy="Name a YAML.")
        try:
            if self.source:
                self._check_keys()
            return super().parse_args_and_config(given, *options, **kwargs)
        except yaml.YAMLError as error:
            raise ConfigError(f"{self.source} is no YAML: {' '.join(str(error).split())}.") from error

    def _check_keys(self) -> None:
        """Refuse keys that occur twice in the YAML, of which the first would be lost, and keys that are no names."""
        root = yaml.compose(Path(self.source).read_text(encoding="utf-8"), yaml.SafeLoader)
        keys = [key for key, _ in root.value] if isinstance(root, yaml.MappingNode) else []
        names = [key.value for key in keys]
        for key in keys:
            if names.count(key.value) > 1:
                message = f"{self.source}: `{key.value}` occurs {names.count(key.value)} times."
                raise ConfigError(message, remedy="Keep one of them.")
            if not key.tag.endswith((":str", ":merge")):
                raise ConfigError(
                    f"{self.source}: there is no argument `{key.value}`.", remedy="Write names of arguments."
                )

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """
        Set values of a YAML, or of environment variables, for what the command line leaves out.

        Args:
            kwargs:
                The values by name.
        """
        return super().set_defaults_with_config(**{name: self._read(name, kwargs[name]) for name in kwargs})

    def _read(self, name: str, value: Any) -> Any:
        where = f"{self.source}: " if self.source else ""
        action = next((action for action in self._actions if action.dest == name), None)
        if action is None:
            known = sorted(action.dest for action in self._actions)
            raise ConfigError(f"{where}there is no argument `{name}`.", remedy=_suggestion(name, known))
        hint = self.hints.get(name, Any)
        if isinstance(value, str):
            try:
                value = self._get_value(action, text := value)
            except Exception as error:  # whatever a type raises; argparse gives it back as an error of its own
                reason = str(error).partition(": ")[2] or str(error)
                raise ConfigError(f"{where}`{name}` is {text!r}: {reason.rstrip('.')}.") from error
            if action.nargs == "+" and wrong_type(value, hint) is not None:  # one of a list, as on the command line
                value = [value]
        wanted = wrong_type(value, hint)
        if wanted is not None and (value is not None or action.choices is None):
            raise ConfigError(f"{where}`{name}` is {value!r}.", remedy=f"Write {wanted}.")
        for item in value if isinstance(value, list) else [value]:
            takes_none = item is None and type(None) in get_args(hint)
            if action.choices is not None and not takes_none and item not in action.choices:
                choices = ", ".join(map(str, action.choices))
                raise ConfigError(f"{where}`{name}` is {item!r}.", remedy=f"Choose one of {choices}.")
        return as_whole(value, hint)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse as argparse does, and refuse what is left over."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            flag = next((text for text in rest if text.startswith("-")), rest[0]).partition("=")[0]
            suggestion = _suggestion(flag, sorted(self._option_string_actions))
            raise ConfigError(f"On the command line, there is no argument {flag}.", remedy=suggestion)
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print, after all its usage, before it ends the program."""
        raise ConfigError(f"On the command line, {message.rstrip('.')}.")


def _suggestion(name: str, known: Sequence[str]) -> str:
    closest = get_close_matches(name, known, n=1)
    return f"Did you mean {closest[0]}?" if closest else "See --help for those there are."
