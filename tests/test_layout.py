"""The promises about the layout: lean import, README true, small modules, a test for each."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dimefm_edge.cli import COMMANDS, parse_options

ROOT = Path(__file__).parents[1]
PACKAGES = ("dimefm_edge", "kernels/dimefm_kernels", "demos/dimefm_demo")
BESIDE = ("kernels", "demos")
"""Folders that hold a package of their own; its tests lie in the same folder of tests/."""
MODULES = sorted(p.relative_to(ROOT) for name in PACKAGES for p in (ROOT / name).rglob("*.py"))
HEAVY = (
    "torch", "timm", "open_clip", "onnxruntime", "onnx", "matplotlib", "triton", "tensorrt",
    "tensorrt_rtx_bindings",
    "gradio", "transformers", "datasets", "pyarrow", "sklearn", "scipy", "imagecorruptions", "cv2",
)  # fmt: skip
MAX_LINES = 400
MAX_BYTES = 250_000
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _loaded_after(code: str) -> set[str]:
    report = f"{code}\nimport sys\nprint(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", report], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import dimefm_edge; dimefm_edge.RunConfig",
        "from dimefm_edge.cli import main; main(['--help'])",
        "from dimefm_edge.cli import main\ntry: main(['distill', '--help'])\nexcept SystemExit: 0",
        "from dimefm_edge.targets import load_target; load_target('jetson-orin')",
    ],
    ids=["import", "help", "distill --help", "targets"],
)
def test_lean_import(code):
    assert _loaded_after(code) == set()


def test_runtime_does_not_import_torch():
    assert not _loaded_after("import dimefm_edge.runtime") & {"torch", "timm", "open_clip"}


def test_help_takes_half_a_second_at_most():
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "dimefm_edge", "--help"], cwd=ROOT, check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        best = min(best, time.perf_counter() - begun)
    assert best < 0.5


def test_public_names_load():
    import dimefm_edge

    assert "run" in dir(dimefm_edge)
    for name in dimefm_edge.__all__:
        assert getattr(dimefm_edge, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'destill'"):
        dimefm_edge.destill  # noqa: B018


# ------------------------------------------------------------------------------ README


def _tree() -> dict[str, str]:
    """Path -> description of each line of the code block under `## Layout`."""
    block = README.split("## Layout", 1)[1].split("```", 2)[1]
    lines = block.splitlines()[1:]
    folders: list[tuple[int, str]] = []
    found = {}
    for line in filter(str.strip, lines):
        name, _, description = line.strip().partition(" ")
        indent = len(line) - len(line.lstrip())
        while folders and folders[-1][0] >= indent:
            folders.pop()
        path = "".join(folder for _, folder in folders) + name
        found[path] = description.strip()
        if name.endswith("/"):
            folders.append((indent, name))
    return found


def test_readme_tree_names_what_is_there():
    tree = _tree()
    assert "dimefm_edge/" in tree
    missing = [path for path in tree if not (ROOT / path).exists()]
    assert not missing, f"in the README's tree, but not on disk: {missing}"


def test_readme_tree_names_everything():
    """A module has a line of its own, or its folder's line says its file name."""
    tree = _tree()
    benchmarks = [p.relative_to(ROOT) for p in (ROOT / "benchmarks").glob("*.py")]
    unnamed = [
        str(path)
        for path in [*MODULES, *benchmarks]
        if path.name != "__init__.py"
        and path.as_posix() not in tree
        and path.name not in tree.get(f"{path.parent.as_posix()}/", "").split()
    ]
    assert not unnamed, f"on disk, but not in the README's tree: {unnamed}"


def _readme_commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("dimefm-edge ")]


def test_readme_commands_parse():
    commands = _readme_commands()
    assert ["dimefm-edge", "distill", "--target", "jetson-orin", "--out", "runs/first"] in commands
    for _, name, *flags in commands:
        parse_options(name, flags)
    for name in re.findall(r"`dimefm-edge (\w+)", README):
        assert name in COMMANDS


def test_readme_table_has_every_command():
    rows = re.findall(r"^\| `dimefm-edge ([\w ]+)` \|", README, flags=re.MULTILINE)
    assert rows == list(COMMANDS)


# --------------------------------------------------------------------------------- code


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_modules_are_short(path):
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def _dotted(path: Path) -> str:
    parts = path.with_suffix("").parts[1 if path.parts[0] in BESIDE else 0 :]
    return ".".join(parts).removesuffix(".__init__")


def _imports(text: str, path: Path) -> bool:
    package, _, stem = _dotted(path).rpartition(".")
    names = rf"\b{re.escape(_dotted(path))}\b|from {re.escape(package)} import [^\n]*\b{stem}\b"
    return re.search(names, text) is not None


def _has_own_test(path: Path) -> bool:
    """A test file with its stem, or one in the mirrored folder that imports it."""
    parent = Path(path.parts[0]) if path.parts[0] in BESIDE else path.parent
    tests = sorted((ROOT / "tests" / parent).glob("test_*.py"))
    if path.name == "__init__.py":
        return bool(tests)
    texts = [p.read_text(encoding="utf-8") for p in tests]
    is_named = any(p.stem == f"test_{path.stem.lstrip('_')}" for p in tests)
    return is_named or any(_imports(text, path) for text in texts)


@pytest.mark.parametrize("path", [p for p in MODULES if p.name != "__main__.py"], ids=str)
def test_each_module_has_a_test(path):
    """Of its own, or of a module beside it that is made of it."""
    siblings = [p for p in MODULES if p.parent == path.parent and p != path]
    assert _has_own_test(path) or any(
        _has_own_test(p) and _imports((ROOT / p).read_text(encoding="utf-8"), path)
        for p in siblings
    ), f"no test_{path.stem}.py in tests/{path.parent}"


def test_git_files_are_small():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    large = [
        str(path.relative_to(ROOT))
        for path in paths
        if path.is_file()
        and path.stat().st_size > MAX_BYTES
        and not path.is_relative_to(ROOT / "dimefm_edge" / "assets")
    ]
    assert not large
    weights = {".pt", ".pth", ".safetensors", ".onnx", ".engine", ".bin"}
    assert not [
        str(p.relative_to(ROOT))
        for p in paths
        if p.suffix in weights and not p.is_relative_to(ROOT / "dimefm_edge" / "assets")
    ]
