"""What runs on the device: bundles, engines and a zero-shot classifier, without torch.

    classifier = ZeroShotClassifier("runs/distill/bundle")
    classifier.classify([Image.open("photo.jpg")])

Needs numpy, Pillow and the engine's own package, which is imported when it is asked for.
"""

from __future__ import annotations

from dimefm_edge.runtime.bundle import Bundle, load_bundle
from dimefm_edge.runtime.classifier import ZeroShotClassifier
from dimefm_edge.runtime.engines import ENGINES, Engine, load_engine

__all__ = ["ENGINES", "Bundle", "Engine", "ZeroShotClassifier", "load_bundle", "load_engine"]
