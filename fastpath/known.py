"""The parts of model.py that the replacements stand for, as they were when the replacements were written.

A comparison on a small model finds a fault in a replacement, but not every edit of model.py: an edit may act on rare
values, far back in long documents or in some layers only. So a replacement is used only while the classes and functions
that it stands for are unchanged but for comments and docstrings; after an edit these compute, as they are written.

When a replacement follows an edit, renew its entries: `python -m fastpath.known` prints them.
"""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable

import model as network

ALL = ("RMSNorm", "RotaryEmbedding", "apply_rotary", "attention", "Packing", "KVCache", "Attention", "SwiGLU", "Block",
       "Transformer", "WeakWater.__init__", "WeakWater.forward", "WeakWater.loss")
KNOWN = {
    "RMSNorm": "22e0d53d1fb37477",
    "RotaryEmbedding": "0f3cdf4ce97599e2",
    "apply_rotary": "da8fd199d4512c7e",
    "attention": "e821ed7796099320",
    "Packing": "629ba645fc406be7",
    "KVCache": "4c8bc04f75754b96",
    "Attention": "be1f4627022e144d",
    "SwiGLU": "6a4491bc58f66b86",
    "Block": "8d205f7545ece27b",
    "Transformer": "39d18836dcb4d92f",
    "WeakWater.__init__": "a8ac9fb0b0ed7af6",
    "WeakWater.forward": "ae7b9dd5878966ca",
    "WeakWater.loss": "3f5aa9266066c1ac",
}


def code_of(function: Callable) -> str:
    """The source of a function of model.py without comments and docstrings. Raises ValueError if it has none or if it
    is another module's."""
    if not inspect.isfunction(function) or function.__globals__ is not vars(network) or (
            set(function.__code__.co_freevars) - {"__class__"}):
        raise ValueError("no function of model.py")
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def digest(name: str) -> str:
    """A short hash of a class, function or method of model.py; "" if there is none that can be read."""
    try:
        part = network
        for step in name.split("."):
            part = vars(part)[step]
        if not isinstance(part, type):
            text = code_of(part)
        else:
            members = [(name, value) for name, value in vars(part).items() if callable(value) or name[:2] != "__"]
            text = "\n".join([", ".join(base.__name__ for base in part.__bases__), *(
                code_of(value) if callable(value) else f"{name} = {value!r}" for name, value in members)])
    except (KeyError, TypeError, ValueError, OSError):
        return ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def edited() -> set[str]:
    """The parts of model.py that are not as they are known."""
    return {name for name in ALL if digest(name) != KNOWN.get(name)}


if __name__ == "__main__":
    for name in ALL:
        print(f'    "{name}": "{digest(name)}",')
