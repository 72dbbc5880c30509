"""What runs on the device: bundles, engines and a zero-shot classifier, without torch.

    classifier = ZeroShotClassifier("runs/distill/bundle")
    classifier.classify(["photo.jpg"])

With a text side in the bundle, the labels can be any:

    ZeroShotClassifier("bundle", labels=["a red car", "a blue car"])

Needs numpy, Pillow and the engine's own package, which is imported when it is asked for; a
text side also tokenizers, and ftfy for sentences that are more than plain ASCII.
"""

from __future__ import annotations

from dimefm_edge.runtime.bundle import Bundle, load_bundle
from dimefm_edge.runtime.classifier import ZeroShotClassifier
from dimefm_edge.runtime.engines import ENGINES, Engine, load_engine
from dimefm_edge.runtime.text import TextEncoder, load_text_encoder

__all__ = [
    "ENGINES", "Bundle", "Engine", "TextEncoder", "ZeroShotClassifier", "load_bundle",
    "load_engine", "load_text_encoder",
]  # fmt: skip
