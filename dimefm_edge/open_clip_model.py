"""open_clip models with their weights, and in plain words why a checkpoint could not be read."""

from __future__ import annotations

import io
import pickle
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from dimefm_edge.errors import CheckpointError, DimeFMError

_COPY_AGAIN = "the file is truncated or not a checkpoint; copy or download it again"
_CHECK_NAME = "check the name and the network, or give a local checkpoint: ARCHITECTURE:FILE"
_FOLDER = "local-dir:"
_WEB_PAGE = ("is a web page, not the weights", "download the checkpoint itself")
_KINDS = {
    b"version https://git-lfs": ("is a git-lfs pointer, not the weights", "git lfs pull"),
    b"<!doctype html": _WEB_PAGE,
    b"<html": _WEB_PAGE,
}
_NO_WEIGHTS = (pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError)
"""What torch and open_clip raise, by what a file holds instead."""
_MAX_DETAIL = 300


def build_open_clip(architecture: str, pretrained: str | None, *, name: str) -> Any:
    """An open_clip model in float32 with its weights; nothing is printed.

    Args:
        architecture: As open_clip knows it.
        pretrained: A tag, or a file of weights; None for random ones.
        name: What errors call it.

    Raises:
        CheckpointError: If the weights cannot be read or are another architecture's.
        DimeFMError: If open_clip cannot make the model.
    """
    import open_clip
    from safetensors import SafetensorError

    try:
        with redirect_stdout(io.StringIO()):
            return open_clip.create_model(architecture, pretrained=pretrained, precision="fp32")
    except (SafetensorError, *_NO_WEIGHTS) as error:
        file = _weights_file(architecture, pretrained)
        if file is None:
            raise
        why, hint = _why_no_checkpoint(file, error)
        raise CheckpointError(f"teacher {name}: {why}", hint=hint) from error
    except (RuntimeError, AssertionError) as error:  # open_clip asserts that widths are equal
        said = str(error)
        if isinstance(error, RuntimeError) and "state_dict" not in said:
            if _weights_file(architecture, pretrained) is None:
                raise DimeFMError(
                    f"teacher {name} cannot be loaded: {first_line(error)}", hint=_CHECK_NAME
                ) from error
            raise CheckpointError(
                f"teacher {name}: the weights cannot be read: {first_line(error)}",
                hint=_COPY_AGAIN,
            ) from error
        detail = " ".join(said.split())[:_MAX_DETAIL]
        raise CheckpointError(
            f"teacher {name}: the weights do not fit the architecture: {detail}",
            hint="name the architecture that the checkpoint was trained with",
        ) from error
    except FileNotFoundError as error:
        raise CheckpointError(f"teacher {name}: {first_line(error)}") from error
    except (OSError, ValueError) as error:
        raise DimeFMError(
            f"teacher {name} cannot be loaded: {first_line(error)}",
            hint=_CHECK_NAME,
        ) from error


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:_MAX_DETAIL]


def _weights_file(architecture: str, pretrained: str | None) -> Path | None:
    """The file or folder of weights that was named; None for a tag, or random weights."""
    named = architecture.removeprefix(_FOLDER) if architecture.startswith(_FOLDER) else pretrained
    path = Path(named or "").expanduser()
    return path if named and path.exists() else None


def _why_no_checkpoint(path: Path, error: Exception) -> tuple[str, str]:
    """What a file is instead, by how it begins, and what to do."""
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(64).lstrip().lower()
        for begin, (why, hint) in _KINDS.items():
            if head.startswith(begin):
                return f"the weights cannot be read: {path} {why}", hint
    if type(error).__name__ == "SafetensorError":
        return f"the weights cannot be read: {first_line(error)}", _COPY_AGAIN
    return (
        f"the weights cannot be read: {path} holds neither safetensors nor a state_dict of tensors "
        "(other objects are not loaded: they could run code)",
        _COPY_AGAIN,
    )
