"""A module shaped like one TensorRT version's, made of its record: it checks calls, no more.

A class, call, argument, property or enum member that the version lacks fails as the real
bindings do: AttributeError or TypeError. What calls answer is up to a double (double.py), whose
methods are named `class_method`, in lower case; without one it is the plainest value of the
recorded type.
"""

from __future__ import annotations

import enum
import json
import re
import types
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
VERSIONS = ("10.3", "10.16", "11.4")

# A recorded type that the record calls by its C++ name.
_RENAMED = {"IParserError": "ParserError", "IBuilder": "Builder"}
_BUFFERS = ("buffer", "typing_extensions.Buffer")
_PLAIN: dict[str, tuple[type, ...]] = {
    "int": (int,), "typing.SupportsInt": (int,), "float": (int, float), "bool": (bool,),
    "typing.SupportsFloat": (int, float), "str": (str,), "tuple": (tuple,), "list": (list,),
}  # fmt: skip


def make_module(version: str, double: Any) -> types.ModuleType:
    """The `tensorrt` module of a version.

    Args:
        version: One of `VERSIONS`.
        double: Gives the answers; `double.calls` gets the name of every call.
    """
    return _Module(load_record(version), double).module


def load_record(version: str) -> dict[str, Any]:
    """What was recorded of a version, one of `VERSIONS`."""
    record: dict[str, Any] = json.loads((FOLDER / f"{version}.json").read_text(encoding="utf-8"))
    return record


class _Module:
    def __init__(self, record: dict[str, Any], double: Any) -> None:
        self.double = double
        self.kinds: dict[str, type] = {
            name: _enum(name, members) for name, members in record["enums"].items()
        }
        pending = dict(record["classes"])
        while pending:  # a class after its bases
            for name, parts in list(pending.items()):
                if not pending.keys() & set(parts.get("bases", ())):
                    self.kinds[name] = self._class(name, parts)
                    del pending[name]
        self.module = types.ModuleType("tensorrt")
        self.module.__dict__.update(self.kinds, __version__=record["version"])
        for name, signatures in record["functions"].items():
            self.module.__dict__[name] = self._function(name, signatures)
        self.module.__dict__["_new"] = self.new

    def new(self, name: str, /, **values: Any) -> Any:
        """An instance that TensorRT, not a user, makes; `values` are its properties."""
        made = object.__new__(self.kinds[name])
        made.__dict__.update(_made=True, **{f"_{k}": v for k, v in values.items()})
        return made

    def _class(self, name: str, parts: dict[str, Any]) -> type:
        bases = tuple(self.kinds[b] for b in parts.get("bases", ())[:1]) or (object,)
        space: dict[str, Any] = {"__setattr__": _refuse_unknown}
        for method, signatures in parts.get("methods", {}).items():
            space[method] = self._method(name, method, signatures)
        if "__init__" not in parts.get("methods", {}):
            space["__init__"] = _no_constructor
        for prop, (kind, is_settable) in parts.get("properties", {}).items():
            space[prop] = self._property(name, prop, kind, is_settable)
        inherited = set().union(*(vars(b) for b in bases[0].__mro__))
        for nested, members in parts.get("enums", {}).items():
            if nested not in inherited:
                self.kinds[f"{name}.{nested}"] = space[nested] = _enum(nested, members)
        made = type(name, bases, space)
        for alias, text in parts.get("aliases", {}).items():
            scope, _, member = text.partition(".")
            value = getattr(getattr(made, scope), member) if member else text
            type.__setattr__(made, alias, value)
        return made

    def _method(self, owner: str, name: str, signatures: list[str]) -> Any:
        def call(this: Any, *arguments: Any, **named: Any) -> Any:
            if name == "__init__":
                this.__dict__["_made"] = True
            found = self._bind(f"{owner}.{name}", signatures, arguments, named)
            return self._answer(f"{owner}_{name.strip('_')}".lower(), found, this)

        call.__name__ = name
        return call

    def _function(self, name: str, signatures: list[str]) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            return self._answer(name, self._bind(name, signatures, arguments, named))

        return call

    def _property(self, owner: str, name: str, kind: str, is_settable: bool) -> property:
        def read(this: Any) -> Any:
            hook = getattr(self.double, f"{owner}_{name}".lower(), None)
            if f"_{name}" in this.__dict__ or hook is None:
                return this.__dict__.get(f"_{name}", self._plainest(kind))
            return hook(this)

        def write(this: Any, value: Any) -> None:
            if value is not None and not self._fits(kind, value):
                raise TypeError(f"{owner}.{name} takes {kind}, not {value!r}")
            self.double.calls.append(f"{owner}.{name}={value!r}")
            this.__dict__[f"_{name}"] = value

        return property(read, write if is_settable else None)

    def _bind(
        self, name: str, signatures: list[str], arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[dict[str, Any], str]:
        """The arguments by name and the answer's type, of the first overload that fits."""
        for signature in signatures:
            text, _, returns = signature.rpartition(" -> ")
            wanted = [_argument(a) for a in _split(text[1:-1])]
            bound = self._fit(wanted, arguments, named)
            if bound is not None:
                shown = ", ".join(f"{k}={v!r}"[:60] for k, v in bound.items())
                self.double.calls.append(f"{name}({shown})")
                return bound, returns
        raise TypeError(
            f"{name}(): incompatible function arguments {arguments} {named}; has: {signatures}"
        )

    def _fit(
        self, wanted: list[tuple[str, str, bool]], arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> dict[str, Any] | None:
        names = [name for name, _, _ in wanted]
        if len(arguments) > len(wanted) or set(named) - set(names[len(arguments) :]):
            return None
        bound = dict(zip(names, arguments, strict=False)) | named
        for name, kind, has_default in wanted:
            if name in bound:
                if not self._fits(kind, bound[name]):
                    return None
            elif not has_default:
                return None
        return bound

    def _fits(self, kind: str, value: Any) -> bool:
        kind = _RENAMED.get(kind, kind)
        if kind in _PLAIN:
            is_bool = isinstance(value, bool)
            return isinstance(value, _PLAIN[kind]) and (kind == "bool" or not is_bool)
        if kind in _BUFFERS:
            return isinstance(value, bytes | bytearray | memoryview | self.kinds["IHostMemory"])
        if kind == "Dims" and isinstance(value, tuple | list):  # converted by the bindings
            return all(isinstance(size, int) for size in value)
        if re.match(r"List|list|collections\.abc\.Sequence", kind):
            return isinstance(value, tuple | list)
        if kind in self.kinds:
            # A Python subclass that forgot the base's __init__ is refused, as pybind11 does.
            is_made = isinstance(value, enum.Enum) or getattr(value, "_made", False)
            return isinstance(value, self.kinds[kind]) and is_made
        return True

    def _answer(self, hook: str, found: tuple[dict[str, Any], str], *this: Any) -> Any:
        bound, returns = found
        answer = getattr(self.double, hook, None)
        return self._plainest(returns) if answer is None else answer(*this, **bound)

    def _plainest(self, kind: str) -> Any:
        kind = _RENAMED.get(kind, kind)
        if kind in self.kinds:
            made = self.kinds[kind]
            return next(iter(made)) if issubclass(made, enum.Enum) else self.new(kind)
        plain = {"bool": True, "int": 0, "float": 0.0, "str": ""}
        return [] if kind.lower().startswith("list") else plain.get(kind)


class _RecordedEnum(enum.Enum):
    def __int__(self) -> int:
        return int(self.value)


def _enum(name: str, members: dict[str, int]) -> type:
    return _RecordedEnum(name, members)


def _refuse_unknown(this: Any, name: str, value: Any) -> None:
    """Only what Python code made a subclass of takes attributes of its own."""
    found = getattr(type(this), name, None)
    if isinstance(found, property):
        if found.fset is None:
            raise AttributeError(f"{type(this).__name__}.{name} cannot be set")
        found.fset(this, value)
    elif "__setattr__" in vars(type(this)):
        raise AttributeError(f"{type(this).__name__} has no attribute {name}")
    else:
        this.__dict__[name] = value


def _no_constructor(this: Any, *_: Any, **__: Any) -> None:
    raise TypeError(f"{type(this).__name__}: No constructor defined!")


def _split(arguments: str) -> list[str]:
    """At commas outside brackets."""
    return [a for a in re.split(r", (?![^\[<]*[\]>])", arguments) if a]


def _argument(text: str) -> tuple[str, str, bool]:
    """`name: type = default` as name, type and whether it may be left out."""
    name, _, rest = text.partition(": ")
    kind, _, default = rest.partition(" = ")
    return name, kind, bool(default)
