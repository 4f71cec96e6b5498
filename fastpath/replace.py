"""Attributes of modules that come and go: a function in the place of a method, and what it needs."""

import types
from collections.abc import Callable

from torch import nn


def replace(module: nn.Module, attribute: str, function: Callable, checked_for: tuple, **beside) -> None:
    """Put `function` in the place of a method of this module alone, and what it needs beside it: attributes and
    (device type, dtype of matmuls) for which it was checked."""
    put(module, checked_for=checked_for, **beside, **{attribute: types.MethodType(function, module)})


def put(module: nn.Module, **attributes) -> None:
    """Give a module attributes that `restore` takes away."""
    module.replaced = vars(module).get("replaced", ()) + tuple(attributes)
    for name, value in attributes.items():
        setattr(module, name, value)


def restore(model: nn.Module) -> None:
    """Undo all replacements: from here on model.py computes."""
    for module in model.modules():
        for name in vars(module).pop("replaced", ()):
            vars(module).pop(name, None)
