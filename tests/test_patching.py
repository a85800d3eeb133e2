"""How drop-ins reach into a trainer: they look first, and leave nothing behind."""

import sys
import types

import pytest

from rewardfuse.integrations._patching import (
    HookChangedError,
    Patches,
    check_parameters,
    warn_if_untested,
    with_statements,
)


def theirs(values, scale=1.0):
    return sum(values) * scale


def ours(values, scale=1.0):
    return "ours"


@pytest.fixture
def package(monkeypatch):
    """A package of three modules: one has a function, one imported it, one will."""
    modules = {name: types.ModuleType(name) for name in ("peer", "peer.core", "peer.user", "peer.late")}
    modules["peer.core"].total = theirs
    modules["peer.user"].total_by_name = theirs
    for name in ("peer", "peer.core", "peer.user"):
        monkeypatch.setitem(sys.modules, name, modules[name])
    return modules


def test_module_that_imported_the_original_keeps_it(package):
    patches = Patches()
    patches.take_over(package["peer.core"], "total", ours, ("values", "scale"))
    assert package["peer.core"].total is package["peer.user"].total_by_name is ours and patches
    patches.take_over(package["peer.core"], "total", ours, ("values", "scale"))  # once more does no harm
    patches.undo()
    assert package["peer.core"].total is package["peer.user"].total_by_name is theirs and not patches


def test_module_that_was_imported_since_keeps_ours(package, monkeypatch):
    patches = Patches()
    patches.take_over(package["peer.core"], "total", ours, ("values", "scale"))
    package["peer.late"].total = package["peer.core"].total
    monkeypatch.setitem(sys.modules, "peer.late", package["peer.late"])
    patches.undo()
    assert package["peer.late"].total is theirs


def test_undo_takes_away_what_somebody_else_has_put_there(package):
    patches = Patches()
    patches.take_over(package["peer.core"], "total", ours, ("values", "scale"))
    package["peer.core"].total = max
    patches.undo()
    assert package["peer.core"].total is max and package["peer.user"].total_by_name is theirs


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [("total", ("values",), r"takes \(values, scale\), expected \(values\)"), ("mean", None, "has no mean any more")],
)
def test_changed_hook_is_replaced(package, name, parameters, message):
    with Patches() as patches, pytest.raises(HookChangedError, match=message):
        patches.replace(package["peer.core"], name, ours, parameters)
    assert package["peer.core"].total is theirs


def test_changed_hook_has_a_name_that_nobody_looked_for(package):
    package["peer.core"].total = lambda values: 0
    with Patches() as patches, pytest.raises(HookChangedError, match=r"^peer\.core\.total takes \(values\)"):
        patches.replace(package["peer.core"], "total", ours, ("values", "scale"))


def test_class_is_looked_at_by_its_constructor(package):
    class Loss:
        def forward(self, chosen, rejected):
            raise NotImplementedError

    package["peer.core"].Loss = Loss
    with Patches() as patches, pytest.raises(HookChangedError, match="expected \\(self, chosen\\)"):
        patches.replace(package["peer.core"], "Loss", ours, ("self", "chosen"))
    with Patches() as patches:
        patches.replace(package["peer.core"], "Loss", ours, ("self", "chosen", "rejected"))
        assert package["peer.core"].Loss is ours
    assert package["peer.core"].Loss is Loss


class Trainer:
    def step(self, values):
        total = 0
        for value in values:
            total = total + value
        return total

    def closing(self, values):
        return lambda: values

    def parent(self):
        name = super().__repr__()
        return name


def test_replaced_statement_changes_more_than_itself():
    step = with_statements(Trainer.step, {"total = total + value": "total = total + 10 * value"})
    assert step(Trainer(), [1, 2]) == 30 and Trainer().step([1, 2]) == 3
    assert step.__qualname__ == "Trainer.step" and step.__code__.co_firstlineno == Trainer.step.__code__.co_firstlineno


@pytest.mark.parametrize(("changes", "times"), [({"total = total - value": "pass"}, 0), ({"value": "pass"}, 0)])
def test_statement_that_reads_otherwise_is_passed_over(changes, times):
    with pytest.raises(HookChangedError, match=rf"Trainer.step has the statement `.*` {times} times, expected once"):
        with_statements(Trainer.step, changes)


def test_method_that_calls_super_loses_its_class():
    with pytest.raises(HookChangedError, match="calls super"):
        with_statements(Trainer.parent, {"return name": "return name"})
    changed = with_statements(Trainer.parent, {"name = super().__repr__()": "name = 'mine'"})
    assert changed(Trainer()) == "mine"


def test_wrong_parameters_pass():
    check_parameters(theirs, ("values", "scale"))
    with pytest.raises(HookChangedError, match=r"theirs takes \(values, scale\), expected \(scale, values\)"):
        check_parameters(theirs, ("scale", "values"))


def test_untested_version_passes_in_silence(recwarn):
    warn_if_untested("peer", "1.16", "1.16.3")
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"tested with peer 1\.16, but peer 1\.2\.0 is installed"):
        warn_if_untested("peer", "1.16", "1.2.0")
