"""What a command has to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """`values` are printed with --json, else `text`."""

    values: dict[str, Any]
    text: str
    exit_code: int = 0
    is_markdown: bool = False
