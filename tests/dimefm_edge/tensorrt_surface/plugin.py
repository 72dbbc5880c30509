"""`tensorrt.plugin` as a version's record has it: what takes which arguments, and how it checks.

The part of TensorRT's Python package that registers plugins written in Python. Numbers that are
known before a build are ints here; a batch that is not is a `Symbol`.
"""

from __future__ import annotations

import inspect
import re
import types
from typing import Any


class Symbol:
    """A number that TensorRT knows when it runs, written as what it is made of."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __mul__(self, other: Any) -> Symbol:
        return Symbol(f"{self.text} * {other}")

    def __str__(self) -> str:
        return self.text


class Number(int):
    """A number that is known while TensorRT builds."""

    def constant_value(self) -> int:
        return int(self)


def make_plugin_module(record: dict[str, list[str]] | None) -> types.ModuleType | None:
    """The module, or None where the version has none."""
    if record is None:
        return None
    module = types.ModuleType("tensorrt.plugin")
    registry: dict[str, Any] = {}
    module.__dict__["_lib"] = types.SimpleNamespace(QDP_REGISTRY=registry)
    answers = {
        "register": _register(registry),
        "aot_impl": _aot_impl(registry),
        "min": _least,
        "SymIntExprs": lambda length: [None] * length,
        "SymInt32": lambda value: value,
    }
    for name, parameters in record.items():
        module.__dict__[name] = _checked(name, parameters, answers.get(name))
    return module


def _checked(name: str, parameters: list[str], answer: Any) -> Any:
    names = [(re.split(r"\W", text)[0], "=" in text) for text in parameters]
    signature = inspect.Signature([
        inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD,
                          default=None if has_default else inspect.Parameter.empty)
        for n, has_default in names
    ])  # fmt: skip

    def call(*arguments: Any, **named: Any) -> Any:
        bound = signature.bind(*arguments, **named)
        if answer is not None:
            return answer(**bound.arguments)
        return types.SimpleNamespace(**bound.arguments)

    return call


def _register(registry: dict[str, Any]) -> Any:
    def register(plugin_id: str, lazy_register: bool = False) -> Any:
        def decorate(describe: Any) -> Any:
            if plugin_id in registry:
                raise ValueError(f"'_Op' already has a defintion for '{plugin_id}'")
            names = inspect.signature(describe).parameters.values()
            if any(p.annotation is p.empty or isinstance(p.annotation, str) for p in names):
                raise ValueError("arguments of a plugin need types")
            registry[plugin_id] = types.SimpleNamespace(describe=describe, implement=None)
            return describe

        return decorate

    return register


def _aot_impl(registry: dict[str, Any]) -> Any:
    def aot_impl(plugin_id: str) -> Any:
        def decorate(implement: Any) -> Any:
            if plugin_id not in registry:
                raise ValueError(f"Plugin {plugin_id} is not registered.")
            described = [*inspect.signature(registry[plugin_id].describe).parameters]
            if [*inspect.signature(implement).parameters] != [*described, "outputs", "tactic"]:
                raise ValueError("an implementation takes what describes it, outputs and tactic")
            registry[plugin_id].implement = implement
            return implement

        return decorate

    return aot_impl


def _least(first: Any, second: Any) -> Symbol:
    if isinstance(first, int) and isinstance(second, int):
        raise ValueError("Both arguments cannot be 'int's")
    return Symbol(f"min({first}, {second})")
