"""`FunctionOverride`: active when chosen, once, and only over the function it was written for."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from recipe.skpo.cpu.override import FunctionOverride, OverrideError


def _override(**changes: Any) -> FunctionOverride:
    def louder(original: Callable[..., str]) -> Callable[..., str]:
        return lambda word, times: original(word, times).upper()

    fields = {
        "module": "upstream_package.speech",
        "function": "say",
        "parameters": ("word", "times"),
        "place": "upstream_package/speech.py:1",
        "wrap": louder,
    }
    return FunctionOverride(**{**fields, **changes})


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    def say(word: str, times: int) -> str:
        return word * times

    module = ModuleType("upstream_package.speech")
    module.say = say  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "upstream_package", ModuleType("upstream_package"))
    monkeypatch.setitem(sys.modules, "upstream_package.speech", module)
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    return module


def test_inactive_unless_the_platform_is_chosen(upstream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VERL_PLATFORM")
    _override().install()
    assert upstream.say("a", 2) == "aa"
    assert not _override().is_installed()


def test_installing_twice_wraps_once(upstream: Any) -> None:
    _override().install()
    once = upstream.say
    _override().install()
    assert upstream.say is once
    assert upstream.say("a", 2) == "AA"
    assert _override().is_installed()


def test_reaches_modules_that_imported_the_function_before(upstream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    user, stranger = ModuleType("upstream_package.user"), ModuleType("another_package")
    user.say = stranger.say = upstream.say  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "upstream_package.user", user)
    monkeypatch.setitem(sys.modules, "another_package", stranger)
    _override().install()
    assert user.say("a", 1) == "A"
    assert stranger.say("a", 1) == "a"


def test_another_signature_is_refused_with_its_place(upstream: Any) -> None:
    known = _override(parameters=("word",))
    with pytest.raises(OverrideError, match=r"upstream_package/speech.py:1.*expected .*word, found word, times"):
        known.install()
    assert upstream.say("a", 1) == "a"


def test_a_missing_function_is_refused_with_its_place(upstream: Any) -> None:
    with pytest.raises(OverrideError, match=r"upstream_package.speech.shout \(upstream_package/speech.py:1\)"):
        _override(function="shout").install()
