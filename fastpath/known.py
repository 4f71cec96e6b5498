"""Hashes of the parts of model.py that the replacements were written for.

The comparison on a small model (twin.py) finds faults in a replacement, but may miss an edit of model.py that affects
only rare values, long documents or some layers. So a replacement is used only while every class and function that it
depends on has the hash below, which ignores comments and docstrings. After an edit, model.py's own code runs.

After adapting a replacement to an edit, update the hashes: `python -m fastpath.known` prints them.
"""

import ast
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable

import model as network
from common import exits
from Config import OneLineParser

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
    """The source of a function of model.py without comments and docstrings. Raises ValueError if it is not a plain
    function of model.py."""
    if not inspect.isfunction(function) or function.__globals__ is not vars(network) or (
            set(function.__code__.co_freevars) - {"__class__"}):
        raise ValueError("not a plain function of model.py")
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def digest(name: str) -> str:
    """A short hash of a class, function or method of model.py; "" if it does not exist or has no source."""
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
    """The parts of model.py whose hash differs from KNOWN."""
    return {name for name in ALL if digest(name) != KNOWN.get(name)}


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m fastpath.known", description="Print the hashes of the parts of model.py.")
    parser.parse_args(argv)
    for name in ALL:
        print(f'    "{name}": "{digest(name)}",')


if __name__ == "__main__":
    sys.exit(exits.run(main))
