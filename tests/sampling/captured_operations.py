"""A stand-in for CUDA graphs on a CPU: the operations of a step, recorded and repeated on the same memory.

As in a graph, what Python decided when the step was captured holds for ever, and nothing may be read on the host.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CaptureError(RuntimeError):
    """A step that cannot be captured."""


_ATEN = torch.ops.aten
_COPIES = (_ATEN._to_copy.default, _ATEN.clone.default)
_ON_HOST = ("tolist", "numpy", "__array__")


def capture_operations(run: Callable[[], None]) -> Callable[[], None]:
    """
    Run a function, and return what repeats its operations.

    Args:
        run (`Callable`):
            The function. What it decides must not depend on values of tensors; it reads tensors that stay where they
            are in memory, and leaves its results in such tensors.

    Returns:
        `Callable`: repeats the operations, on the same memory.

    Raises:
        CaptureError: if the function reads a tensor on the host, or draws random numbers; it has not run to its end.
    """
    recorder = _Recorder()
    with _nothing_on_the_host(), recorder:
        run()
    steps = recorder.steps()

    def replay() -> None:
        with torch.autocast("cpu", enabled=False):  # casts are among the operations
            for step in steps:
                step()

    return replay


class _Recorder(TorchDispatchMode):
    """Runs and records operations."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], dict[int, Tensor]]] = []
        self._written: set[int] = set()  # storages that a recorded operation has written to

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        depends = torch.Tag.data_dependent_output in func.tags or _size_depends(func, args)
        if depends or _draws(func, args, kwargs):
            raise CaptureError(f"{func} depends on what is computed, or on random numbers")
        output = func(*args, **kwargs)
        written = _written(func, args, kwargs)
        self._written |= set(map(_storage, written))
        before = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        made = {place: tensor for place, tensor in enumerate(_tensors(output)) if _storage(tensor) not in before}
        if made or written:
            self._calls.append((func, args, kwargs, made))
        return output

    def steps(self) -> list[Callable[[], object]]:
        """Return what repeats the operations: all but views, whose memory stays, and constants nothing writes to."""
        found: list[Callable[[], object]] = []
        for func, args, kwargs, made in self._calls:
            constant = not _tensors((args, kwargs))
            if constant and not self._written & set(map(_storage, made.values())):
                continue
            found.append(_repeated(func, args, kwargs, made))
        return found


def _repeated(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: dict[int, Tensor]
) -> Callable[[], object]:
    """Return what runs an operation again, and leaves its results in the tensors it has made before, by their place
    among its outputs."""
    if not made:
        return partial(func, *args, **kwargs)
    if func in _COPIES:
        return partial(_ATEN.copy_.default, made[0], args[0])
    into = _into(func)
    if into is not None and set(made) == {0}:
        return partial(into, *args, **kwargs, out=made[0])

    def again() -> None:
        found = _tensors(func(*args, **kwargs))
        for place, kept in made.items():
            kept.copy_(found[place])

    return again


@cache
def _into(func: Any) -> Any | None:
    """Return the variant of an operation that writes into a given tensor; `None` without one."""
    packet = func.overloadpacket
    given = [(argument.name, str(argument.type)) for argument in func._schema.arguments]
    for name in packet.overloads():
        other = getattr(packet, name)
        outs = [argument for argument in other._schema.arguments if argument.is_out]
        rest = [(argument.name, str(argument.type)) for argument in other._schema.arguments if not argument.is_out]
        if len(outs) == 1 and outs[0].name == "out" and str(outs[0].type) == "Tensor" and rest == given:
            return other
    return None


def _size_depends(func: Any, args: tuple[Any, ...]) -> bool:
    """Return whether the shape of an operation's output depends on values; that of an index does by a mask alone."""
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    masks = any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _tensors(args[1:]))
    return func is not _ATEN.index.Tensor or masks


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether an operation draws random numbers; attention does for dropout alone."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    # The dispatcher leaves out what has its default value
    defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
    return (defaults | given | kwargs).get("dropout_p", 1.0) != 0.0


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors among the arguments of an operation that it writes to."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _tensors(args[place] if place < len(args) else kwargs.get(argument.name))
    return found


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    """Return what identifies the memory of a tensor; weights that oneDNN has packed have none to be seen."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


@contextmanager
def _nothing_on_the_host() -> Iterator[None]:
    """Refuse what reads a tensor on the host without an operation."""

    def refused(name: str) -> Callable[..., None]:
        def run(*args: object, **kwargs: object) -> None:
            raise CaptureError(f"`Tensor.{name}` reads what is computed on the host")

        return run

    kept = {name: getattr(Tensor, name) for name in _ON_HOST}
    own = {name for name in _ON_HOST if name in Tensor.__dict__}
    for name in _ON_HOST:
        setattr(Tensor, name, refused(name))
    try:
        yield
    finally:
        for name in _ON_HOST:
            if name in own:
                setattr(Tensor, name, kept[name])
            else:
                delattr(Tensor, name)
