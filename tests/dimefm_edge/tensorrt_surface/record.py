"""Record which classes, calls, arguments and enums one TensorRT version's Python bindings have.

    python record.py tensorrt_cu12_bindings-10.3.0-cp311-none-manylinux_2_17_x86_64.whl

writes `10.3.json` beside this file. The wheel's bindings are imported in a process of their own,
by the Python version they are for, against empty libraries that gcc makes of the symbols they
miss: so no TensorRT, CUDA or GPU is needed, and nothing of TensorRT can run. Only names,
signatures and numbers are kept, of what a tool that builds and runs engines may touch.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

_NAMESPACES = re.compile(
    r"\b(?:tensorrt_bindings\.tensorrt|nvinfer1|nvonnxparser|v_\d+_\d+)(?:\.|::)"
)
_SIGNATURE = re.compile(r"^(?:\d+\. )?\w*\((?P<arguments>.*)\)(?: -> (?P<returns>.+))?$")
_SPECIAL = ("__init__", "__len__", "__getitem__")
# What only a network written layer by layer would touch: ours come from ONNX files.
_LEFT_OUT = re.compile(r"I\w+Layer|IAlgorithm\w*|IInt8\w*|ILoop|IIf\w+|\w*Expr\w*")
_LAYERS_KEPT = ("ILayer", "IPluginV3Layer")


def main(wheel: Path) -> None:
    """Record one wheel."""
    version = re.search(r"-(\d+\.\d+)", wheel.name)
    assert version is not None, f"{wheel.name} names no version"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        zipfile.ZipFile(wheel).extractall(folder)
        _make_empty_libraries(folder / "tensorrt_bindings" / "tensorrt.so", folder)
        done = subprocess.run(
            [sys.executable, __file__, "--inside"],
            env={**os.environ, "PYTHONPATH": name, "LD_LIBRARY_PATH": name},
            capture_output=True,
            text=True,
            check=True,
        )
    said = done.stdout.splitlines()[-1]  # `tensorrt.plugin` prints a warning first
    record = {"wheel": wheel.name, **json.loads(said)}
    path = Path(__file__).with_name(f"{version.group(1)}.json")
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _make_empty_libraries(bindings: Path, folder: Path) -> None:
    """The libraries that the bindings name, with the symbols that they miss, all of them empty."""

    def lines(*command: str) -> list[str]:
        return subprocess.run(
            [*command, str(bindings)], capture_output=True, text=True, check=True
        ).stdout.splitlines()

    needed = re.findall(r"NEEDED.*\[(libnv\w+\.so\.\d+)\]", "\n".join(lines("readelf", "-d")))
    missing = [line.split()[-1] for line in lines("nm", "-D", "--undefined-only")]
    ends = re.compile(r"\w*(INTERNAL|PluginRegistry|Plugins|Version)")
    symbols = [symbol for symbol in missing if ends.fullmatch(symbol)]
    for i, library in enumerate(needed):
        source = "\n".join(f"void* {s}(void) {{ return 0; }}" for s in symbols) if not i else ""
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{library}", "-o",
             str(folder / library)],
            input=source, text=True, check=True,
        )  # fmt: skip


def _inside() -> None:
    """In the process that can import the bindings: print the record."""
    import tensorrt_bindings as trt  # type: ignore[import-not-found]

    found = {name: getattr(trt, name) for name in dir(trt) if not name.startswith("_")}
    kinds = {
        name: kind for name, kind in found.items()
        if isinstance(kind, type) and "tensorrt" in kind.__module__ and not _is_left_out(name)
    }  # fmt: skip
    functions = {
        name: _signatures(value) for name, value in found.items()
        if not isinstance(value, type) and type(value).__name__ == "builtin_function_or_method"
    }  # fmt: skip
    record = {
        "version": trt.__version__,
        "enums": {n: _members(k) for n, k in kinds.items() if hasattr(k, "__members__")},
        "classes": {n: _class(k) for n, k in kinds.items() if not hasattr(k, "__members__")},
        "functions": {n: s for n, s in functions.items() if s},
        "plugin": _plugin(trt),
    }
    print(json.dumps(record))


def _plugin(trt: Any) -> dict[str, list[str]] | None:
    """Arguments of what `tensorrt.plugin`, which is Python, holds; None where there is none."""
    sys.modules["tensorrt"] = trt
    try:
        plugin = importlib.import_module("tensorrt_bindings.plugin")
    except ImportError:
        return None
    found = {name: getattr(plugin, name) for name in sorted(plugin.__all__)}
    signatures = {name: inspect.signature(v) for name, v in found.items() if callable(v)}
    return {
        name: [str(p.replace(annotation=p.empty)) for p in signature.parameters.values()]
        for name, signature in signatures.items()
    }


def _is_left_out(name: str) -> bool:
    return _LEFT_OUT.fullmatch(name) is not None and name not in _LAYERS_KEPT


def _members(kind: Any) -> dict[str, int]:
    return {name: int(value) for name, value in kind.__members__.items()}


def _class(kind: type) -> dict[str, Any]:
    methods, properties, enums, aliases = {}, {}, {}, {}
    for name in dir(kind):
        value = getattr(kind, name)
        if name.startswith("_") and name not in _SPECIAL:
            continue
        if isinstance(value, property):
            returns = _signatures(value.fget)
            properties[name] = [
                returns[0].partition(" -> ")[2] if returns else "object", value.fset is not None
            ]  # fmt: skip
        elif isinstance(value, type) and hasattr(value, "__members__"):
            enums[name] = _members(value)
        elif callable(value):
            if name != "__init__" or "->" in (value.__doc__ or ""):
                methods[name] = _signatures(value)
        else:
            aliases[name] = str(value)
    bases = [b.__name__ for b in kind.__mro__[1:] if "tensorrt" in b.__module__]
    parts = {"bases": bases, "methods": methods, "properties": properties, "enums": enums,
             "aliases": aliases}  # fmt: skip
    return {name: part for name, part in parts.items() if part}


def _signatures(function: Any) -> list[str]:
    """`(name: type = default, ...) -> type` of each overload, self left out."""
    found = []
    for line in (getattr(function, "__doc__", "") or "").splitlines():
        match = _SIGNATURE.match(_NAMESPACES.sub("", line.strip()))
        if match is None or match["arguments"].startswith("*args"):
            continue
        if found and not line.strip()[0].isdigit():
            continue  # prose that looks like a call
        arguments = re.sub(r"^(?:self|arg0): \w+(?:\[[^]]*\])?(?:, )?", "", match["arguments"])
        found.append(f"({arguments}) -> {match['returns'] or 'None'}")
    return found


if __name__ == "__main__":
    if sys.argv[1:] == ["--inside"]:
        _inside()
    else:
        for argument in sys.argv[1:]:
            main(Path(argument))
