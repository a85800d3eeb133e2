"""Functions and statements of trainers, taken from the sources that are installed; nothing of theirs is imported.

Importing these packages would load DeepSpeed, Ray and the like, and TRL's formulas are lines inside long methods.
"""

import __future__

import ast
import functools
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

INSTALL = {
    "trl": "pip install trl==1.16.0",
    "openrlhf": "pip install --no-deps openrlhf==0.11.2",
    "verl": "pip install --no-deps verl==0.9.1",
}


@functools.cache
def source(package, path):
    """The syntax tree of a file of an installed package; skips the test where the package is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed: {INSTALL[package]}")
    file = Path(spec.submodule_search_locations[0], path)
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def functions(tree, *names, **given):
    """Functions of a file, methods too, and the constants of `names`, with `given` for what the file imports."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.decorator_list = []
            found[node.name] = node
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in names:
            found[node.targets[0].id] = node
    return SimpleNamespace(**_run(tree, [found[name] for name in names], given))


def conditional(tree, function, condition, assigned):
    """The first ``if`` of a function that asks `condition` and assigns to `assigned` within."""
    [body] = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function]
    for node in ast.walk(body):
        if isinstance(node, ast.If) and ast.unparse(node.test) == condition and assigned in _assigned(node):
            return node
    raise AssertionError(f"{function} has no `if {condition}` that sets {assigned} any more")


def run(tree, statements, **names):
    """What `names` are after the statements."""
    return SimpleNamespace(**_run(tree, statements, names))


def _run(tree, nodes, names):
    # Annotations name what the file imports; this leaves them unevaluated.
    code = compile(ast.Module(nodes, []), "trainer", "exec", flags=__future__.annotations.compiler_flag)
    names = dict(names)
    exec(code, names)
    return names


def _assigned(node):
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
