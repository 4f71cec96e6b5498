"""Replace and restore methods of single module instances."""

import types
from collections.abc import Callable

from torch import nn


def replace(module: nn.Module, attribute: str, function: Callable, checked_for: tuple, **attributes) -> None:
    """Replace a method of this module alone. The module also gets the `attributes` that the function needs, and
    `checked_for`: the (device type, compute dtype) that the function was checked for."""
    attach(module, checked_for=checked_for, **attributes, **{attribute: types.MethodType(function, module)})


def attach(module: nn.Module, **attributes) -> None:
    """Give a module attributes that `restore` removes."""
    module.replaced = vars(module).get("replaced", ()) + tuple(attributes)
    for name, value in attributes.items():
        setattr(module, name, value)


def restore(model: nn.Module) -> None:
    """Undo all replacements: the model runs model.py's code again."""
    for module in model.modules():
        for name in vars(module).pop("replaced", ()):
            vars(module).pop(name, None)
