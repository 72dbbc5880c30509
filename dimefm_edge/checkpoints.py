"""open_clip models with their weights, and in plain words why a checkpoint could not be read."""

from __future__ import annotations

import io
import pickle
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from dimefm_edge.errors import CheckpointError, DimeFMError

_COPY_AGAIN = "the file is truncated or not a checkpoint; copy or download it again"
_KINDS = {
    b"version https://git-lfs": ("is a git-lfs pointer, not the weights", "git lfs pull"),
    b"<": ("is a web page, not the weights", "download the checkpoint itself"),
}
_NO_WEIGHTS = (pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError)
"""What torch and open_clip raise, by what a file holds instead."""
_MAX_DETAIL = 300


def create_open_clip(architecture: str, pretrained: str | None, *, name: str) -> Any:
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
    except SafetensorError as error:
        raise _unreadable(name, error) from error
    except _NO_WEIGHTS as error:
        why, hint = _why_no_checkpoint(pretrained)
        raise CheckpointError(f"teacher {name}: {why}", hint=hint) from error
    except (RuntimeError, AssertionError) as error:  # open_clip asserts that widths are equal
        said = str(error)
        if isinstance(error, RuntimeError) and "state_dict" not in said:
            raise _unreadable(name, error) from error
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
            hint="check the name and the network, or give a local checkpoint: ARCHITECTURE:FILE",
        ) from error


def _unreadable(name: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"teacher {name}: the weights cannot be read: {first_line(error)}", hint=_COPY_AGAIN
    )


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:_MAX_DETAIL]


def _why_no_checkpoint(pretrained: str | None) -> tuple[str, str]:
    """What a file is instead, by how it begins, and what to do."""
    path = Path(pretrained or "").expanduser()
    if not path.is_file():
        return "the weights cannot be read", _COPY_AGAIN
    with path.open("rb") as file:
        head = file.read(64).lstrip()
    for begin, (why, hint) in _KINDS.items():
        if head.startswith(begin):
            return f"{path} {why}", hint
    return (
        f"{path} holds no weights that can be read: neither safetensors nor a state_dict of "
        "tensors (other objects are not loaded: they could run code)",
        _COPY_AGAIN,
    )
