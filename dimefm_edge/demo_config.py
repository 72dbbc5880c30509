"""What the page of the demo shows and to whom: its flags and its Python settings. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from dimefm_edge.errors import InputError


@dataclass(frozen=True)
class DemoConfig:
    """What the page shows, to whom, and how much of the machine it may take."""

    models: tuple[str, ...] = ()
    """Runs, bundles and teachers; none: the README's run where it is, else the sample teacher."""
    engine: tuple[str, ...] = ("onnxruntime",)
    """What runs bundles: onnxruntime, tensorrt, or an .engine file; several are compared."""
    search: tuple[str, ...] = ()
    """Images that visitors may search: folders, .tar shards, `scenes[:COUNT]`."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in."""
    port: int | None = None
    """Default: the first free one from 7860 on."""
    share: bool = False
    """Open gradio's public tunnel: anyone with the link can come in."""
    auth: str | None = None
    """USER:PASSWORD that visitors must give, or @FILE that holds it."""
    threads: int = 0
    """CPU threads of one call; 0 takes one per physical core."""
    concurrency: int = 2
    """Answers that are made at once."""
    max_queue: int = 64
    """Requests that wait; more are turned away."""
    max_upload_mib: int = 64
    """Largest file that a visitor may send."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "max_queue", "max_upload_mib"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 at least, got {getattr(self, name)}")
        if self.port is not None and not 0 < self.port < 2**16:
            raise InputError(f"port must be 1 to 65535, got {self.port}")
