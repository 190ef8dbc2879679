"""A network of the user's own: `my_pkg:make` is imported and called."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn


def from_factory(
    factory: str, n_classes: int | None = None, in_channels: int | None = None, **kwargs: Any
) -> nn.Module:
    """The module that the user's function returns.

    This runs the user's code, so it is for names that come from the user's own command line.

    Args:
        factory: `module:function`; the module is looked for where Python looks, then in the working directory.
        n_classes: passed on if the function has a parameter of this name.
        in_channels: the same.
        kwargs: passed on.

    Raises:
        ValueError: a malformed name, a module that fails to import, a function that is absent or refuses the arguments.
        TypeError: what it returned is not an `nn.Module`.
    """
    module_name, _, name = factory.partition(":")
    if not module_name or not name:
        raise ValueError(f"backbone.factory must be module:function, e.g. my_pkg:make, got {factory!r}")
    with _working_directory_importable():
        make = _find(module_name, name)
        offered = {"n_classes": n_classes, "in_channels": in_channels}
        known = inspect.signature(make).parameters
        arguments = {key: value for key, value in offered.items() if key in known and value is not None} | kwargs
        try:
            inspect.signature(make).bind(**arguments)
        except TypeError as error:
            raise ValueError(
                f"{factory}{inspect.signature(make)} cannot be called with {sorted(arguments)}: {error}"
            ) from error
        model = make(**arguments)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{factory} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _find(module_name: str, name: str) -> Callable[..., Any]:
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything while it is imported
        place = f"Python's path and {Path.cwd()}"
        raise ValueError(
            f"importing {module_name} failed: {type(error).__name__}: {error}; looked in {place}"
        ) from error
    make = getattr(module, name, None)
    if not callable(make):
        where = getattr(module, "__file__", None) or "built in"
        raise ValueError(f"{module_name} ({where}) has no function {name!r}; write the factory as module:function")
    return make


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    """The working directory at the end of `sys.path`; in front, a `search.py` or `conf/` there would hide ours."""
    here = str(Path.cwd())
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)
