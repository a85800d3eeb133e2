"""How drop-ins reach into a trainer: with a look at its version and its code first, and a way back. And how they refuse
tensors under the trainer's names of them.

A hook is checked when it is set. Where a trainer has changed it, that is an error then and there; a run never goes on
with the trainer's own code in the belief that it is ours.
"""

import __future__

import ast
import functools
import importlib.metadata
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from packaging.version import Version
from torch import Tensor

from rewardfuse.ops import _checks


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


def check_parameters(function: Callable[..., Any], parameters: Sequence[str], name: str | None = None) -> None:
    """Raises HookChangedError unless ``function`` takes just these parameters, in this order (``self`` included).

    ``name``: where it was looked for; None: its own name, which is another one where somebody has put it there.
    """
    found = list(inspect.signature(function).parameters)
    if found != list(parameters):
        name = name or f"{function.__module__}.{function.__qualname__}"
        raise HookChangedError(f"{name} takes ({', '.join(found)}), expected ({', '.join(parameters)})")


def check_alike(**tensors: Tensor) -> None:
    """Raises by name unless all are tensors of a floating dtype, of the shape and on the device of the first."""
    _checks.check_tensors(**tensors)
    (first_name, first), *_ = tensors.items()
    for name, tensor in tensors.items():
        _checks.check_rewards(name, tensor)
        _checks.check_like(name, tensor, first_name, first)


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
            check_parameters(called, parameters, f"{where}.{name}")
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

    The rest is the trainer's own code; defaults are those that ``function`` has now, and lines of tracebacks are those
    of its file. The result is a plain function of the same names, without ``__wrapped__``.

    Raises:
        HookChangedError: a statement stands there never, or more than once; ``function`` is no plain function with a
            source, it is wrapped, decorated or changed in this way already, it closes over variables, or it has names
            that are private to its class (``self.__name``). A method closes over its class where it calls ``super()``:
            those calls must be among what is replaced.
    """
    where = f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    if not isinstance(function, types.FunctionType):
        raise HookChangedError(f"{where} is a {type(function).__name__}, expected a function")
    if hasattr(function, "__wrapped__"):
        raise HookChangedError(f"{where} is wrapped by other code, expected the function itself")
    if hasattr(function, _CHANGED):
        raise HookChangedError(f"{where} has replaced statements already, expected the original")
    closed_over = function.__code__.co_freevars
    if closed_over not in ((), ("__class__",)):
        raise HookChangedError(f"{where} closes over {', '.join(closed_over)}, expected nothing")
    tree, definition = _parsed(function, where)
    for old, new in changes.items():
        replacer = _Replacer(old, new)
        replacer.visit(tree)
        if replacer.found != 1:
            raise HookChangedError(f"{where} has the statement `{old}` {replacer.found} times, expected once")
    _check_names(definition, function, where)
    made = _compiled(definition, function)
    functools.update_wrapper(made, function)
    del made.__wrapped__  # its source is not the code of this one
    setattr(made, _CHANGED, tuple(changes))
    return made


_CHANGED = "__replaced_statements__"


def _parsed(function: types.FunctionType, where: str) -> tuple[ast.Module, ast.FunctionDef | ast.AsyncFunctionDef]:
    """The source of a function, and its definition within, with the lines of its file."""
    try:
        lines, first = inspect.getsourcelines(function)
        indented = lines[0][:1].isspace()  # a block keeps it so: strings of several lines must not lose their spaces
        tree = ast.parse("".join(["if True:\n", *lines] if indented else lines))
    except (OSError, TypeError, SyntaxError) as error:
        raise HookChangedError(f"{where} has no source that can be read: {error}") from error
    ast.increment_lineno(tree, first - 1 - indented)
    definition = tree.body[0].body[0] if indented else tree.body[0]
    is_function = isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef)
    if not is_function or definition.name != function.__code__.co_name:
        raise HookChangedError(f"{where} has another source than a definition of {function.__code__.co_name}")
    if definition.decorator_list:
        decorators = ", ".join(f"@{ast.unparse(decorator)}" for decorator in definition.decorator_list)
        raise HookChangedError(f"{where} is decorated with {decorators}, expected no decorator")
    return tree, definition


def _check_names(definition: ast.AST, function: types.FunctionType, where: str) -> None:
    """Raises HookChangedError for names that mean something else outside of the class."""
    nodes = list(ast.walk(definition))
    if any(isinstance(node, ast.Name) and node.id in ("super", "__class__") for node in nodes):
        raise HookChangedError(f"{where} calls super() beside the statements that are replaced")
    owner = function.__qualname__.rpartition(".")[0]
    if not owner or owner.endswith("<locals>"):
        return
    names = {getattr(node, field, None) for node in nodes for field in ("id", "attr", "arg", "name", "asname")}
    private = sorted(
        name for name in names if isinstance(name, str) and name.startswith("__") and not name.endswith("__")
    )
    if private:
        raise HookChangedError(f"{where} has names that are private to its class: {', '.join(private)}")


def _compiled(definition: ast.FunctionDef | ast.AsyncFunctionDef, function: types.FunctionType) -> types.FunctionType:
    """The function that a definition says, among the globals of the original and with its defaults."""
    arguments = definition.args
    # values of the original, not what their expressions would give now and here
    arguments.defaults, arguments.kw_defaults, definition.returns = [], [None] * len(arguments.kwonlyargs), None
    for node in ast.walk(arguments):
        if isinstance(node, ast.arg):
            node.annotation = None
    tree = ast.fix_missing_locations(ast.Module([definition], type_ignores=[]))
    flags = function.__code__.co_flags & __future__.annotations.compiler_flag
    scope: dict[str, Any] = {}
    code = compile(tree, function.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    exec(code, function.__globals__, scope)
    made = scope[definition.name]
    made.__defaults__, made.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return made


class _Replacer(ast.NodeTransformer):
    """Puts one statement in the place of another, wherever it stands, and counts."""

    def __init__(self, old: str, new: str):
        self.old, self.new, self.found = old, ast.parse(new).body, 0

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.stmt) and ast.unparse(node) == self.old:
            self.found += 1
            for statement in self.new:
                for part in ast.walk(statement):  # the lines of the new text are none of the file's
                    ast.copy_location(part, node)
            return self.new
        return self.generic_visit(node)
