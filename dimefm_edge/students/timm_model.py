"""Students by name: any timm model with a projection to the teacher's embedding size."""

from __future__ import annotations

import logging
from typing import Any

import timm
from torch import nn

from dimefm_edge.errors import ConfigError, DimeFMError, lookup
from dimefm_edge.students import StudentSpec
from dimefm_edge.students.student import Student

logger = logging.getLogger(__name__)


def build_timm_model(spec: StudentSpec, *, pretrained: bool = False) -> Student:
    """Build a student on a timm model.

    Args:
        spec: `args["model"]` is a timm name, with or without a tag.
        pretrained: Ask timm for the weights; they are downloaded unless timm has them cached.

    Raises:
        UnknownNameError: If timm has no such model.
        ConfigError: If the model cannot be built at the image size.
        DimeFMError: If the pretrained weights cannot be had.
    """
    name = spec.args["model"]
    architecture = name.split(".")[0]
    lookup(dict.fromkeys(timm.list_models()), architecture, kind="timm model")
    options: dict[str, Any] = {"num_classes": 0}
    cfg = timm.get_pretrained_cfg(architecture)
    if cfg is not None and cfg.fixed_input_size:
        options["img_size"] = spec.image_size
    try:
        trunk: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise ConfigError(f"timm model {name} cannot be built: {error}") from error
        raise DimeFMError(
            f"no pretrained weights for timm model {name}: {str(error).splitlines()[0]}",
            hint="check the network, or --init random",
        ) from error
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(
            f"timm model {name} cannot be built for {spec.image_size} px images: {error}",
            hint="--image-size with the model's own size",
        ) from error
    num_features = int(getattr(trunk, "head_hidden_size", None) or trunk.num_features)  # type: ignore[arg-type]
    return Student(trunk, num_features=num_features, embed_dim=spec.embed_dim)
