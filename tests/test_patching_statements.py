"""Replaced statements of a trainer's function: the rest stays as it is, and what cannot stay is refused."""

import functools
import inspect
import traceback

import pytest

from rewardfuse.integrations._patching import HookChangedError, with_statements

CHANGE = {"total = value + 1": "total = value + 10"}
SEEN = []


def wrapping(function):
    @functools.wraps(function)
    def wrapper(*arguments):
        return function(*arguments)

    return wrapper


def registered(function):
    SEEN.append(function)
    return function


class Trainer:
    STEP = 3

    def __hidden(self):
        return 5

    def step(self, value, times=STEP, *, offset: "unknown" = STEP):  # noqa: F821
        total = value + 1
        text = """first
        second"""
        return total * times + offset, text

    def failing(self, value):
        total = value + 1
        return self.missing(total)

    def private(self, value):
        total = value + 1
        return total + self.__hidden()

    @registered
    def decorated(self, value):
        total = value + 1
        return total

    @staticmethod
    def static(value):
        total = value + 1
        return total

    @wrapping
    def wrapped(self, value):
        total = value + 1
        return total

    short = lambda self, value: value + 1  # noqa: E731


original_step = Trainer.step


@functools.wraps(original_step)
def watched(self, value, times=1):
    return original_step(self, value, times)


def test_defaults_or_strings_are_made_anew(monkeypatch):
    monkeypatch.setattr(Trainer.step, "__kwdefaults__", {"offset": 100})
    changed = with_statements(Trainer.step, CHANGE)
    expected, text = Trainer().step(1)
    assert changed(Trainer(), 1) == (expected + 9 * 3, text) == (133, "first\n        second")
    assert changed.__defaults__ is Trainer.step.__defaults__
    assert changed.__annotations__ == Trainer.step.__annotations__


def test_result_is_read_as_the_original_or_changed_once_more():
    changed = with_statements(Trainer.step, CHANGE)
    assert not hasattr(changed, "__wrapped__") and inspect.unwrap(changed) is changed
    assert (changed.__name__, changed.__qualname__, changed.__module__) == ("step", "Trainer.step", __name__)
    assert inspect.signature(changed) == inspect.signature(Trainer.step)
    with pytest.raises(HookChangedError, match=r"Trainer\.step has replaced statements already"):
        with_statements(changed, {"return (total * times + offset, text)": "return total"})


def test_traceback_shows_another_line():
    changed = with_statements(Trainer.failing, {"total = value + 1": "total = (\n\n\nvalue.missing)\nother = 1"})
    first = Trainer.failing.__code__.co_firstlineno
    for value, line in ((1, first + 1), (type("V", (), {"missing": 0})(), first + 2)):
        with pytest.raises(AttributeError) as caught:
            changed(Trainer(), value)
        frame = traceback.extract_tb(caught.tb)[-1]
        assert (frame.filename, frame.lineno) == (__file__, line)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (watched, r"Trainer\.step is wrapped by other code"),
        (Trainer.wrapped, r"Trainer\.wrapped is wrapped by other code"),
        (Trainer.decorated, r"Trainer\.decorated is decorated with @registered"),
        (Trainer.static, r"Trainer\.static is decorated with @staticmethod"),
        (Trainer.private, r"Trainer\.private has names that are private to its class: __hidden"),
        (Trainer.short, r"<lambda> has another source|<lambda> has no source"),
        (Trainer().step, r"Trainer\.step is a method, expected a function"),
        (functools.partial(watched, None), r"partial is a partial, expected a function"),
        (len, r"builtins\.len is a builtin_function_or_method"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_function_that_cannot_be_carried_over_is_changed_all_the_same(function, message):
    with pytest.raises(HookChangedError, match=message):
        with_statements(function, CHANGE)


def test_new_statement_reads_private_names_or_super():
    for new, message in (("total = self.__hidden()", "private to its class: __hidden"), ("super()", "calls super")):
        with pytest.raises(HookChangedError, match=message):
            with_statements(Trainer.step, {"total = value + 1": new})


def test_missing_source_gives_an_obscure_error():
    scope = {"__name__": "frozen"}
    exec("def step(value):\n    total = value + 1\n    return total", scope)
    with pytest.raises(HookChangedError, match=r"frozen\.step has no source that can be read: could not get source"):
        with_statements(scope["step"], CHANGE)
