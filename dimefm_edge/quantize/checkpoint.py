"""An int8 student on disk: the weights that it was trained to, and the ranges that it learned.

The file is a student's (students/), of the deployed form: merged branches, split attention.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dimefm_edge.preprocess import PreprocessSpec
from dimefm_edge.quantize.qat import FakeQuantStudent, qat_prepare
from dimefm_edge.students import (
    LoadedStudent,
    StudentSpec,
    build_student,
    load_checkpoint,
    read_safetensors,
    save_student,
)

_KIND = "int8 student"
_RULES, _RANGES, _FLOAT = "quant_rules", "quant_ranges", "quant_keep_float"
_VERSION = "quant_version"


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
        _VERSION: "2",
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


def float_before(path: Path, student: FakeQuantStudent) -> tuple[str, ...]:
    """Products that a file from before patch embeddings were quantised keeps in float; () of none.

    Args:
        path: What a stage saved last; it need not be there.
        student: As the stage would begin today.
    """
    if not path.is_file():
        return ()
    _, header = read_safetensors(path)
    return _older_float(student, json.loads(header.get("metadata", "{}")))


def _older_float(student: FakeQuantStudent, metadata: Mapping[str, str]) -> tuple[str, ...]:
    if _VERSION in metadata or _RANGES not in metadata:
        return ()
    ranges = json.loads(metadata[_RANGES])
    return tuple(name for name in student.product_names[:1] if name not in ranges)


def _build(
    spec: StudentSpec, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> FakeQuantStudent:
    keep_float, ranges = json.loads(metadata[_FLOAT]), json.loads(metadata[_RANGES])
    prepare = functools.partial(
        qat_prepare, build_student(spec), image_size=spec.image_size, rules_name=metadata[_RULES]
    )
    student = prepare(keep_float=keep_float)
    if older := _older_float(student, metadata):
        student = prepare(keep_float=[*keep_float, *older])
    student.load_deployed(tensors)
    student.set_ranges(ranges)
    return student
