"""How drop-ins reach into a trainer: with a look at its version and its code first, and a way back.

A hook is checked when it is set. Where a trainer has changed it, that is an error then and there; a run never goes on
with the trainer's own code in the belief that it is ours.
"""

import ast
import functools
import importlib.metadata
import inspect
import sys
import textwrap
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from packaging.version import Version


class HookChangedError(RuntimeError):
    """A trainer no longer has the function, the parameters or the statement that a drop-in takes the place of."""


def warn_if_untested(package: str, tested: str, installed: str | None = None) -> None:
    """Warn where ``installed`` (default: the version that pip knows) is none of the ``tested`` series, as "1.16"."""
    installed = installed or importlib.metadata.version(package)
    series = Version(tested).release
    if Version(installed).release[: len(series)] != series:
        warnings.warn(
            f"rewardfuse is tested with {package} {tested}, but {package} {installed} is installed: "
            "results may differ from the trainer's own",
            stacklevel=3,
        )


def check_parameters(function: Callable[..., Any], parameters: Sequence[str]) -> None:
    """Raises HookChangedError unless ``function`` takes just these parameters, in this order (``self`` included)."""
    found = list(inspect.signature(function).parameters)
    if found != list(parameters):
        name = f"{function.__module__}.{function.__qualname__}"
        raise HookChangedError(f"{name} takes ({', '.join(found)}), expected ({', '.join(parameters)})")


class Patches:
    """Attributes replaced, and put back in reverse by :meth:`undo`; as a context manager, on leaving."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any, Any]] = []
        self._taken: list[tuple[str, Any, Any]] = []  # (package, original, ours)

    def __bool__(self) -> bool:
        """Whether anything is replaced."""
        return bool(self._undo)

    def replace(self, owner: Any, name: str, new: Any, parameters: Sequence[str] | None = None) -> Any:
        """Put ``new`` in the place of ``owner.name`` and return what was there.

        Args:
            parameters: what the original must take, a loss by its ``forward`` or ``__call__``; None: not looked at.

        Raises:
            HookChangedError: there is no such attribute, or it takes other parameters.
        """
        where = getattr(owner, "__name__", type(owner).__name__)
        if name not in vars(owner):
            raise HookChangedError(f"{where} has no {name} any more")
        original = vars(owner)[name]
        if parameters is not None:
            called = original
            if isinstance(original, type) and parameters[:1] == ("self",):
                called = getattr(original, "forward", None) or original.__call__
            check_parameters(called, parameters)
        setattr(owner, name, new)
        self._undo.append((owner, name, original, new))
        return original

    def take_over(self, module: types.ModuleType, name: str, ours: Any, parameters: Sequence[str]) -> None:
        """:meth:`replace` in ``module`` and in every loaded module of its package that imported the original by name.

        Modules that are imported later take ours from there. Nothing where it is in place already.
        """
        if vars(module).get(name) is ours:
            return
        original, package = self.replace(module, name, ours, parameters), module.__name__.split(".")[0]
        self._taken.append((package, original, ours))
        for other, attribute in _holders(package, original):
            self.replace(other, attribute, ours)

    def undo(self) -> None:
        """Put everything back, but for what somebody else has replaced since; also where :meth:`take_over` reached
        modules that were imported after it."""
        while self._undo:
            owner, name, original, new = self._undo.pop()
            if vars(owner).get(name) is new:
                setattr(owner, name, original)
        while self._taken:
            package, original, ours = self._taken.pop()
            for module, attribute in _holders(package, ours):
                setattr(module, attribute, original)

    def __enter__(self) -> "Patches":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def _holders(package: str, value: Any) -> list[tuple[types.ModuleType, str]]:
    """The loaded modules of a package that hold ``value``, and under which names."""
    modules = [module for name, module in list(sys.modules.items()) if name.split(".")[0] == package]
    return [
        (module, name)
        for module in modules
        if isinstance(module, types.ModuleType)
        for name, held in list(vars(module).items())
        if held is value
    ]


def with_statements(function: Callable[..., Any], changes: dict[str, str]) -> Callable[..., Any]:
    """``function`` with some of its statements replaced, for trainers whose formulas are lines within long methods.

    Args:
        changes: statement to statement, written as ``ast.unparse`` writes them; each must stand there exactly once. The
            new ones see what the old ones saw; what else they need is best an attribute of ``self``.

    The rest is the trainer's own code; lines of tracebacks are those of its file.

    Raises:
        HookChangedError: a statement stands there never, or more than once, or the function closes over variables. A
            method closes over its class where it calls ``super()``: those calls must be among what is replaced.
    """
    where = f"{function.__module__}.{function.__qualname__}"
    closed_over = function.__code__.co_freevars
    if closed_over not in ((), ("__class__",)):
        raise HookChangedError(f"{where} closes over {', '.join(closed_over)}, expected nothing")
    lines, first = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    for old, new in changes.items():
        replacer = _Replacer(old, new)
        tree = replacer.visit(tree)
        if replacer.found != 1:
            raise HookChangedError(f"{where} has the statement `{old}` {replacer.found} times, expected once")
    if any(isinstance(node, ast.Name) and node.id == "super" for node in ast.walk(tree)):
        raise HookChangedError(f"{where} calls super() where it did not")
    ast.fix_missing_locations(ast.increment_lineno(tree, first - 1))
    definition = tree.body[0]
    definition.decorator_list = []
    code = compile(tree, inspect.getsourcefile(function), "exec")
    scope: dict[str, Any] = {}
    exec(code, function.__globals__, scope)
    made = scope[definition.name]
    return functools.wraps(function)(made)


class _Replacer(ast.NodeTransformer):
    """Puts one statement in the place of another, wherever it stands, and counts."""

    def __init__(self, old: str, new: str):
        self.old, self.new, self.found = old, ast.parse(new).body, 0

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.stmt) and ast.unparse(node) == self.old:
            self.found += 1
            return [ast.copy_location(statement, node) for statement in self.new]
        return self.generic_visit(node)
