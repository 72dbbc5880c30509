"""Weights that are none, are others', or are cut: what is said of them."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch

from dimefm_edge.errors import CheckpointError, DimeFMError
from dimefm_edge.open_clip_model import build_open_clip

SMALL = "MobileCLIP2-S0"  # 40 MB


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.manual_seed(0)
    torch.save(open_clip.create_model(SMALL).state_dict(), path)
    return path


def test_weights_of_a_file(weights: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = build_open_clip(SMALL, str(weights), name="mine")
    wanted = torch.load(weights, weights_only=True)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, wanted[key])
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "said", "hint"),
    [
        (b"just text\n", "the weights cannot be read", "copy or download it again"),
        (b"", "the weights cannot be read", "copy or download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git-lfs pointer",
         "git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "is a web page", "download the checkpoint itself"),
        (b"\x89PNG" + bytes(99), "the weights cannot be read", "copy or download it again"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_are_no_checkpoint(
    content: bytes, said: str, hint: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        build_open_clip(SMALL, str(path), name="mine")
    assert hint in str(caught.value.hint)
    assert "weights_only" not in str(caught.value)  # torch's advice would run the file's code


@pytest.mark.parametrize("kept", [[1, 2], {"state_dict": None}, "text", None, {"a": object}])
def test_objects_that_are_no_weights(kept: object, tmp_path: Path) -> None:
    torch.save(kept, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"teacher mine: the weights (cannot|do not)"):
        build_open_clip(SMALL, str(tmp_path / "w.pt"), name="mine")


def test_a_file_that_was_cut(weights: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.pt"
    cut.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="the weights cannot be read") as caught:
        build_open_clip(SMALL, str(cut), name="mine")
    assert "copy or download it again" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("architecture", "why"),
    [("ViT-B-32", r"Missing key\(s\) in state_dict: \S+"), ("ViT-S-32-alt", "width changed")],
)
def test_another_architectures_weights(architecture: str, why: str, weights: Path) -> None:
    with pytest.raises(CheckpointError, match=f"do not fit the architecture: .*{why}") as caught:
        build_open_clip(architecture, str(weights), name="mine")
    assert "name the architecture" in str(caught.value.hint)


def test_an_architecture_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DimeFMError, match="teacher mine"):
        build_open_clip(f"local-dir:{tmp_path}", None, name="mine")


@pytest.mark.parametrize("error", [TypeError("an odd argument"), AttributeError("no such thing")])
def test_what_is_no_files_fault_is_not_blamed_on_one(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(open_clip, "create_model", fail)
    with pytest.raises(type(error), match=str(error)):
        build_open_clip(SMALL, None, name="mine")
    error = RuntimeError("Failed to download")
    with pytest.raises(DimeFMError, match="cannot be loaded: Failed to download") as caught:
        build_open_clip(SMALL, "a_tag", name="mine")
    assert "the network" in str(caught.value.hint)
