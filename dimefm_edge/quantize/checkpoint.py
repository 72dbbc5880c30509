"""An int8 student on disk: the weights that it was trained to, and the ranges that it learned.

The file is a student's (students/), of the deployed form: merged branches, split attention.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from dimefm_edge.preprocess import PreprocessSpec
from dimefm_edge.quantize.qat import FakeQuantStudent, qat_prepare
from dimefm_edge.students import (
    LoadedStudent,
    StudentSpec,
    build_student,
    load_checkpoint,
    save_student,
)

_KIND = "int8 student"
_RULES, _RANGES, _FLOAT = "quant_rules", "quant_ranges", "quant_keep_float"


def save_int8_student(
    path: Path,
    student: FakeQuantStudent,
    spec: StudentSpec,
    preprocess: PreprocessSpec,
    metadata: dict[str, str],
) -> None:
    """Write one safetensors file, atomically.

    Raises:
        DimeFMError: If it cannot be written.
    """
    learned = {
        _RULES: student.rules_name,
        _RANGES: json.dumps(student.ranges()),
        _FLOAT: json.dumps(sorted(student.keep_float)),
    }
    save_student(path, student.deployed(), spec, preprocess, metadata | learned, kind=_KIND)


def load_int8_student(path: Path | str) -> LoadedStudent:
    """Load what `save_int8_student` wrote; its student is a `FakeQuantStudent` in eval mode.

    Raises:
        CheckpointError: If it is missing, damaged, or a float student.
    """
    return load_checkpoint(path, _KIND, _build)


def _build(
    spec: StudentSpec, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> FakeQuantStudent:
    student = qat_prepare(
        build_student(spec),
        image_size=spec.image_size,
        rules_name=metadata[_RULES],
        keep_float=json.loads(metadata[_FLOAT]),
    )
    student.load_deployed(tensors)
    student.set_ranges(json.loads(metadata[_RANGES]))
    return student
