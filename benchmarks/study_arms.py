"""The arms of every study in studies.py: what is compared, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from dimefm_edge.config import LossConfig

PAPER = LossConfig()


@dataclass(frozen=True)
class Arm:
    """One choice, trained once a seed."""

    loss: LossConfig = PAPER
    images: str = "unlabelled"
    """unlabelled, labelled (these have pairs), or both (without)."""
    texts: str = "all"
    """all; grounded: the share of them that is nearest to images; prompts: of class names only;
    beside: prompts and all."""
    image_share: float = 1.0
    text_share: float = 1.0
    train: dict[str, Any] = field(default_factory=dict)
    """Settings of TrainConfig."""
    student: str = ""
    """Another student than the study's, by the names that `student_spec` takes."""
    image_size: int = 0
    """Of the student, in pixels; 0: the study's."""
    inherits: bool = False
    """Whether it starts from the teacher's layers."""


def only(**weights: float) -> LossConfig:
    """The named terms alone: `only(pvl=1)`."""
    given: dict[str, Any] = {f"{name}_weight": weight for name, weight in weights.items()}
    return dataclasses.replace(PAPER, **{"vl_weight": 0, "pvl_weight": 0} | given)


def contrastive(positives: str) -> LossConfig:
    return dataclasses.replace(only(contrastive=1), contrastive_positives=positives)


PAIRS = Arm(contrastive("pair"), "labelled")
FEATURES = dataclasses.replace(PAPER, feature_weight=10.0)
NEAR_PROMPTS = {"hard_negatives": 0.5}
"""With texts `beside`: half of a batch's sentences are near to its images, most of them prompts."""
PROMPTED = Arm(texts="prompts")
OURS = dataclasses.replace(PROMPTED, inherits=True)


def longer(arm: Arm, **changes: Any) -> Arm:
    """4,000 steps of 256 images at 64 px, as large as the teacher's."""
    train = {**arm.train, "steps": 4000, "batch_size": 256, "ema_decay": 0.999}
    return dataclasses.replace(arm, train=train, image_size=64, **changes)


def with_views(arm: Arm, count: int) -> Arm:
    """The teacher sees `count` augmentations of each image, and the student those alone."""
    return dataclasses.replace(arm, train={**arm.train, "views": count})


STUDIES: dict[str, dict[str, Arm]] = {
    "unpaired": {
        "distilled, unlabelled images": Arm(),
        "distilled, the paired images": Arm(images="labelled"),
        "class prompts, unlabelled images": PROMPTED,
        "class prompts, unlabelled images, 4 views": with_views(PROMPTED, 4),
        "ours, unlabelled images": OURS,
        "ours, the paired images": dataclasses.replace(OURS, images="labelled"),
        "contrastive, own sentence": PAIRS,
        "contrastive, shared labels": Arm(contrastive("label"), "labelled"),
        "contrastive, own sentence, inherits": dataclasses.replace(PAIRS, inherits=True),
    },
    "losses": {
        "0.7 vl + 0.3 pvl": Arm(),
        "vl": Arm(only(vl=1)),
        "pvl": Arm(only(pvl=1)),
        "udist": Arm(only(udist=1)),
        "feature": Arm(only(feature=1)),
        "vl + udist": Arm(only(vl=0.7, udist=0.3)),
        "vl + pvl + udist": Arm(only(vl=0.7, pvl=0.3, udist=0.3)),
        **{
            f"0.7 vl + 0.3 pvl + {weight} feature": Arm(only(vl=0.7, pvl=0.3, feature=weight))
            for weight in (1, 10, 30)
        },
    },
    "corpus": {
        "all": Arm(),
        "the most grounded 0.5": Arm(texts="grounded", text_share=0.5),
        "the most grounded 0.1": Arm(texts="grounded", text_share=0.1),
        "any 0.1": Arm(text_share=0.1),
        "class prompts": PROMPTED,
        "class prompts and all": Arm(texts="beside"),
        "all, hard negatives 0.5": Arm(train={"hard_negatives": 0.5}),
        "class prompts and all, hard negatives 0.5": Arm(texts="beside", train=NEAR_PROMPTS),
    },
    "scale": {
        "all": Arm(),
        **{f"{share:g} of the images": Arm(image_share=share) for share in (0.5, 0.25, 0.125)},
        **{f"{share:g} of the sentences": Arm(text_share=share) for share in (0.1, 0.01, 0.001)},
    },
    "image-only": {
        "0.7 vl + 0.3 pvl": Arm(),
        "pvl": Arm(only(pvl=1)),
        "feature": Arm(only(feature=1)),
        "pvl + feature": Arm(only(pvl=1, feature=1)),
    },
    "extras": {
        name: arm
        for base, plain in {
            "the paper's": Arm(),
            "class prompts": PROMPTED,
            "ours": OURS,
        }.items()
        for name, arm in {base: plain, f"{base}, 8 views": with_views(plain, 8)}.items()
    },
    "recipe": {
        "the paper's": Arm(),
        "feature regression": Arm(only(feature=1)),
        "class prompts": PROMPTED,
        "class prompts, vl only": Arm(only(vl=1), texts="prompts"),
        "class prompts + 10 feature": Arm(FEATURES, texts="prompts"),
        "near prompts + 10 feature": Arm(FEATURES, texts="beside", train=NEAR_PROMPTS),
        "feature regression, inherits": Arm(only(feature=1), inherits=True),
        "class prompts, inherits: ours": OURS,
    },
    "retention": {
        "ours": longer(OURS),
        "pairs, inherits": longer(PAIRS, inherits=True),
        "ours, the paired images": longer(OURS, images="labelled"),
        "ours, both pools": longer(OURS, images="both"),
        "ours, 8 views": longer(with_views(OURS, 8)),
        "ours, both pools, 4 views": longer(with_views(OURS, 4), images="both"),
        "class prompts, timm:repvit_m1_0, both pools": longer(
            PROMPTED, student="timm:repvit_m1_0", images="both"
        ),
        "pairs": longer(PAIRS),
        "class prompts": longer(PROMPTED),
    },
    "activations": {
        name: Arm(student=name)
        for shape in ("hybrid-w16-d1.1.1.1", "hybrid-w24-d1.1.2.1")
        for name in (shape, f"{shape}-relu")
    },
    "students": {
        **{
            name: Arm(student=name)
            for name in (
                "vit-p8-w64-d2",
                "vit-p8-w64-d6",
                "vit-p8-w128-d2",
                "vit-p8-w128-d4",
                "vit-p8-w192-d2",
                "vit-p8-w256-d3",
                "vit-p16-w128-d4",
                "vit-p16-w256-d4",
                "hybrid-w16-d1.1.1.1",
                "hybrid-w24-d1.1.2.1",
                "hybrid-w32-d2.2.4.2",
                "convnet-w8-d1.1.1.1",
                "convnet-w12-d1.1.1.1",
                "convnet-w16-d1.1.1.1",
                "convnet-w24-d1.1.2.1",
                "convnet-w32-d2.2.4.2",
                "timm:resnet10t",
                "timm:mobilenetv3_small_050",
                "timm:mobilenetv4_conv_small",
                "timm:repvit_m0_9",
            )
        },
        **{
            f"{name}, inherits": Arm(student=name, inherits=True)
            for name in (
                "vit-p8-w192-d2",
                "vit-p8-w192-d3",
                "vit-p8-w192-d4",
                "vit-p8-w64-d4",
                "vit-p8-w64-d8",
                "vit-p8-w96-d2",
                "vit-p8-w96-d4",
                "vit-p8-w96-d8",
                "vit-p8-w128-d4",
            )
        },
    },
    "hand-picked": {
        f"{name}{', inherits' * inherits}": dataclasses.replace(
            PROMPTED, student=name, image_size=64, inherits=inherits
        )
        for name, inherits in (
            ("timm:resnet10t", False),
            ("convnet-w32-d2.2.4.2", False),
            ("convnet-w48-d1.1.1.1", False),
            ("timm:regnetx_004", False),
            ("timm:convnext_atto", False),
            ("timm:mobilenetv3_large_100", False),
            ("timm:efficientnet_lite0", False),
            ("timm:mobilenetv4_conv_small", False),
            ("convnet-w16-d1.1.1.1", False),
            ("convnet-w12-d1.1.1.1", False),
            ("timm:resnet10t", True),
        )
    },
    "resolution": {
        f"{name} at {side} px": Arm(student=name, image_size=side, inherits=inherits)
        for name, inherits, sides in (
            ("vit-p8-w192-d4", True, (64, 56, 48, 32)),
            ("vit-p8-w96-d8", True, (64, 56, 48, 32)),
            ("vit-p8-w192-d8", True, (48, 40, 32)),
            ("timm:resnet10t", False, (64, 48, 32)),
        )
        for side in sides
    },
    "kernels": {
        f"{shape}{kernel}": Arm(student=f"{shape}{kernel}")
        for shape in ("hybrid-w16-d1.1.1.1", "convnet-w16-d1.1.1.1")
        for kernel in ("", "-k5", "-k7")
    },
}
