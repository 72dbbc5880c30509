"""What a user may name, and what an error says."""

from __future__ import annotations

import pytest

from dimefm_edge.bench.specs import RUNTIMES, parse_subjects
from dimefm_edge.errors import InputError, UnknownNameError


def test_kinds_and_runtimes(tiny_teacher_dir, tiny_run_dir, tiny_bundle_dir, foreign_graph):
    here = __file__
    words = [
        str(tiny_bundle_dir), f"{tiny_bundle_dir}@tensorrt", f"{tiny_bundle_dir}@x/my.engine",
        f"{tiny_run_dir}@plain", f"{foreign_graph}@onnxruntime:cuda", "sample@eager",
        "ViT-B-32:openai", "timm:vit_tiny_patch16_224@compile", f"{here}:function",
    ]  # fmt: skip
    specs = parse_subjects(words)
    assert [s.label for s in specs] == words
    assert [s.kind for s in specs] == [
        "bundle", "bundle", "bundle", "run", "onnx", "teacher", "teacher", "timm", "python",
    ]  # fmt: skip
    assert [s.runtime for s in specs] == [
        "onnxruntime", "tensorrt", "x/my.engine", "plain", "onnxruntime:cuda", "eager",
        "onnxruntime", "compile", "python",
    ]  # fmt: skip


def test_the_same_twice_is_told_apart(tiny_bundle_dir):
    words = [str(tiny_bundle_dir)] * 3
    assert [s.label.removeprefix(words[0]) for s in parse_subjects(words)] == ["", " (2)", " (3)"]


def test_engine_is_for_bundles_that_name_no_runtime(tiny_bundle_dir):
    words = [str(tiny_bundle_dir), f"{tiny_bundle_dir}@onnxruntime", "sample"]
    runtimes = [s.runtime for s in parse_subjects(words, default_runtime="tensorrt")]
    assert runtimes == ["tensorrt", "onnxruntime", "onnxruntime"]


def test_a_path_with_the_mark_in_it(tmp_path, tiny_bundle_dir):
    path = tmp_path / "a@eager.onnx"
    path.write_bytes(b"")
    assert parse_subjects([str(path)])[0].name == str(path)


@pytest.mark.parametrize(
    ("word", "error", "message"),
    [
        ("sample@egaer", UnknownNameError, "Did you mean 'eager'"),
        ("@eager", InputError, "names no model"),
        ("sample@tensorrt", UnknownNameError, "is a teacher, which runs in onnxruntime, "),
        ("gone.py:make", InputError, r"no file at gone\.py"),
        (f"{__file__}:not-a-name", InputError, "names no function"),
        (f"{__file__}:make@eager", UnknownNameError, "is a python"),
        ("my.engine", InputError, r"try: BUNDLE@my\.engine"),
        ("", InputError, "no model was named"),
    ],
)
def test_bad_names(word, error, message):
    with pytest.raises(error, match=message):
        parse_subjects([word])


def test_nothing_named():
    with pytest.raises(InputError, match="no model was named"):
        parse_subjects([])


def test_every_runtime_says_what_it_is():
    assert all(RUNTIMES.values())
