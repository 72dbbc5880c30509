"""Engine files: foreign, truncated and tampered ones are refused before TensorRT sees them."""

from __future__ import annotations

import dataclasses
import json
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dimefm_edge.errors import CheckpointError, ExportError
from dimefm_edge.runtime import load_bundle
from dimefm_edge.runtime.bundle import Bundle
from dimefm_edge.runtime.cuda import Gpu
from dimefm_edge.runtime.tensorrt_cache import (
    EngineArtifact,
    bundle_hash,
    cache_dir,
    engine_path,
    facts_path,
    find_engine,
    load_artifact,
    machine_dir,
    save_engine,
    save_file,
    why_foreign,
)
from dimefm_edge.runtime.tensorrt_machine import Machine

ORIN = Machine(Gpu("Orin", (8, 7), "12.6"), "10.3.0")
THOR = Machine(Gpu("NVIDIA Thor", (11, 0), "13.2"), "10.16.2")
OPTIONS: dict[str, Any] = {"precision": None, "batch": [1, 1, 8]}


@pytest.fixture
def bundle(exported_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bundle:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return load_bundle(exported_bundle)


@pytest.fixture
def save(bundle: Bundle) -> Callable[..., EngineArtifact]:
    def write(machine: Machine = ORIN, **changed: Any) -> EngineArtifact:
        options = {**OPTIONS, **changed}
        path = engine_path(bundle, machine, options)
        return save_engine(
            path, b"an engine", bundle=bundle, machine=machine, options=options, typing="strong",
            build_s=1.5, layers=[],
        )  # fmt: skip

    return write


def test_the_place_tells_gpu_version_bundle_and_options(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = engine_path(bundle, ORIN, OPTIONS)
    assert path.parent == tmp_path / "cache/dimefm_edge/engines/orin-sm_87/tensorrt-10.3.0"
    assert path.name.startswith(bundle_hash(bundle)[:16])
    others = [
        engine_path(bundle, THOR, OPTIONS),
        engine_path(bundle, ORIN, {**OPTIONS, "batch": [1, 1, 4]}),
    ]
    assert len({path, *others}) == 3
    assert machine_dir(THOR).parts[-2] == "nvidia-thor-sm_110"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache/dimefm_edge/engines"


def test_labels_do_not_change_the_hash_and_the_graph_does(
    bundle: Bundle, exported_bundles: dict[str, Path]
) -> None:
    files = {**bundle.manifest["files"], "labels.npz": {"sha256": "0" * 64, "size_bytes": 1}}
    relabelled = dataclasses.replace(bundle, manifest={**bundle.manifest, "files": files})
    assert bundle_hash(relabelled) == bundle_hash(bundle)
    assert bundle_hash(load_bundle(exported_bundles["fp16"])) != bundle_hash(bundle)
    files["kernels/attention.cubin"] = {"sha256": "1" * 64, "size_bytes": 1}
    assert bundle_hash(relabelled) != bundle_hash(bundle)


def test_what_was_saved_is_found(bundle: Bundle, save: Callable[..., EngineArtifact]) -> None:
    saved = save()
    found = find_engine(bundle, ORIN)
    assert found == saved
    assert found.path.read_bytes() == b"an engine"
    assert sorted(p.name for p in found.path.parent.iterdir()) == sorted(
        [found.path.name, facts_path(found.path).name]
    )
    assert found.facts["gpu"] == {"name": "Orin", "sm": "sm_87", "cuda": "12.6"}
    assert found.size_mib == 9 / 2**20


def test_nothing_built_yet_names_the_command(bundle: Bundle) -> None:
    with pytest.raises(CheckpointError, match=r"built here yet \(Orin, TensorRT 10\.3\.0\)") as e:
        find_engine(bundle, ORIN)
    assert e.value.hint == f"dimefm-edge build {bundle.path}"


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (THOR, r"it was built for Orin \(sm_87\), and this is NVIDIA Thor \(sm_110\)"),
        (dataclasses.replace(ORIN, gpu=Gpu("Orin Nano", (8, 7), "12.6")), "this is Orin Nano"),
        (dataclasses.replace(ORIN, tensorrt="10.7.0"), r"built by TensorRT 10\.3\.0, and this is"),
        (dataclasses.replace(ORIN, tensorrt="10.3.1"), r"this is 10\.3\.1"),
    ],
)
def test_a_foreign_engine_is_refused(
    bundle: Bundle, save: Callable[..., EngineArtifact], machine: Machine, reason: str
) -> None:
    path = save().path
    with pytest.raises(CheckpointError, match=f"is not loaded: .*{reason}") as caught:
        load_artifact(path, bundle=bundle, machine=machine)
    assert caught.value.hint == f"dimefm-edge build {bundle.path}"
    with pytest.raises(CheckpointError, match=reason):  # the cache says whose it has
        find_engine(bundle, machine)


def test_an_engine_of_another_bundle_is_refused(
    save: Callable[..., EngineArtifact], exported_bundles: dict[str, Path]
) -> None:
    path = save().path
    with pytest.raises(CheckpointError, match=r"built of another bundle \(vit-p16-w32-d1\)"):
        load_artifact(path, bundle=load_bundle(exported_bundles["fp16"]), machine=ORIN)


@pytest.mark.parametrize(
    ("options", "machine", "may_run"),
    [
        ({"version_compatible": True}, dataclasses.replace(ORIN, tensorrt="10.7.0"), True),
        ({"version_compatible": True}, dataclasses.replace(ORIN, tensorrt="10.2.0"), False),
        ({"version_compatible": True}, dataclasses.replace(ORIN, tensorrt="11.0.0"), False),
        ({"hardware_compatible": True}, dataclasses.replace(THOR, tensorrt="10.3.0"), True),
        ({"hardware_compatible": True}, THOR, False),
        (
            {"hardware_compatible": True},
            dataclasses.replace(ORIN, gpu=Gpu("Xavier", (7, 2), "12.6")),
            False,
        ),
    ],
)
def test_compatible_engines_may_run_elsewhere(
    bundle: Bundle,
    save: Callable[..., EngineArtifact],
    options: dict[str, Any],
    machine: Machine,
    may_run: bool,
) -> None:
    facts = save(**options).facts
    assert (why_foreign(facts, bundle=bundle, machine=machine) is None) == may_run


def test_a_truncated_or_tampered_engine_is_refused(
    bundle: Bundle, save: Callable[..., EngineArtifact]
) -> None:
    path = save().path
    path.write_bytes(b"an eng")
    with pytest.raises(CheckpointError, match=r"it is truncated \(6 of 9 bytes\)"):
        load_artifact(path, bundle=bundle, machine=ORIN)
    path.write_bytes(b"an engine and more")
    with pytest.raises(CheckpointError, match="it is not the file that was built"):
        load_artifact(path, bundle=bundle, machine=ORIN)
    path.write_bytes(b"AN ENGINE")
    with pytest.raises(CheckpointError, match="it was changed after it was built"):
        load_artifact(path, bundle=bundle, machine=ORIN)
    path.unlink()
    with pytest.raises(CheckpointError, match="no engine at"):
        load_artifact(path, bundle=bundle, machine=ORIN)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (None, "which says what it is, is missing"),
        ("", "cannot be read"),
        ("[]", "cannot be read"),
        ({"format": "another"}, "of another format"),
        ({"format_version": 2}, "of another format"),
        ({"size_bytes": "9"}, "size_bytes cannot be '9'"),
        ({"size_bytes": True}, "size_bytes cannot be True"),
        ({"tensorrt": "new"}, "cannot be read"),
        ({"gpu": []}, r"gpu cannot be \[\]"),
    ],
)
def test_facts_that_cannot_be_are_refused(
    bundle: Bundle, save: Callable[..., EngineArtifact], change: Any, reason: str
) -> None:
    artifact = save()
    beside = facts_path(artifact.path)
    if change is None:
        beside.unlink()
    else:
        text = change if isinstance(change, str) else json.dumps({**artifact.facts, **change})
        beside.write_text(text)
    with pytest.raises(CheckpointError, match=reason):
        load_artifact(artifact.path, bundle=bundle, machine=ORIN)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "my.engine"
    save_file(path, b"before")
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ExportError, match=r"cannot write .*my\.engine: File too large") as e:
            save_file(path, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert "free some space" in str(e.value.hint)
    assert [p.name for p in tmp_path.iterdir()] == ["my.engine"]
    assert path.read_bytes() == b"before"


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="cannot write"):
        save_file(tmp_path / "file" / "my.engine", b"x")
