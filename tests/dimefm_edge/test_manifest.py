"""The manifest parser: any bytes give a checked manifest or a CheckpointError, nothing else."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimefm_edge.errors import CheckpointError
from dimefm_edge.manifest import (
    attention_nodes,
    is_safe_name,
    parse_manifest,
    preprocess_of,
    tokenizer_spec_of,
)
from dimefm_edge.preprocess import PreprocessSpec
from dimefm_edge.tokenizer import TokenizerSpec

GOOD: dict[str, Any] = {
    "format": "dimefm_edge.bundle",
    "format_version": 1,
    "created": "2026-01-01T00:00:00+00:00",
    "name": "vit-p8-w64-d2",
    "spec": {"name": "vit-p8-w64-d2", "family": "vit"},
    "target": "jetson-orin",
    "precision": "fp32",
    "opset": 20,
    "preprocess": json.loads(json.dumps(PreprocessSpec(32).to_dict())),
    "embed_dim": 48,
    "logit_scale": 100.0,
    "parity": {"max_abs_diff": 1e-6, "min_cosine": 1.0, "num_images": 4},
    "accuracy": None,
    "versions": {"torch": "2.9"},
    "label_sets": [{"name": "pets", "num_classes": 2}],
    "files": {
        "model.onnx": {"sha256": "0" * 64, "size_bytes": 10},
        "labels.npz": {"sha256": "f" * 64, "size_bytes": 10},
        "text.onnx": {"sha256": "1" * 64, "size_bytes": 10},
        "tokenizer.json": {"sha256": "2" * 64, "size_bytes": 10},
    },
    "graph": {"nodes": 9, "attentions": [{"form": "decomposed", "nodes": ["qk", "soft", "av"]}]},
    "text": {"context_length": 77, "clean": "lower", "zeroed_id": None, "parity": {}},
}


def changed(path: tuple[str | int, ...], value: Any) -> bytes:
    values: Any = copy.deepcopy(GOOD)
    place = values
    for key in path[:-1]:
        place = place[key]
    if value is Ellipsis:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(values).encode()


def test_a_good_manifest_is_returned_as_it_is() -> None:
    manifest = parse_manifest(json.dumps(GOOD).encode(), where="b")
    assert manifest == GOOD
    int8 = {**GOOD, "quantization": {"rules": "onnxruntime-arm"}}
    assert parse_manifest(json.dumps(int8).encode(), where="b") == int8
    assert preprocess_of(manifest) == PreprocessSpec(32)
    assert tokenizer_spec_of(manifest) == TokenizerSpec(77, "lower")


def test_bundles_from_before_there_was_a_text_side() -> None:
    old = copy.deepcopy(GOOD)
    del old["text"], old["files"]["text.onnx"], old["files"]["tokenizer.json"]
    manifest = parse_manifest(json.dumps(old).encode(), where="b")
    assert manifest == old
    assert tokenizer_spec_of(manifest) is None


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "zip", "its format is not 'dimefm_edge.bundle'"),
        (("format_version",), 2, "version 2; this package reads 1\n  try: pip install --upgrade"),
        (("format_version",), True, "format version True is not 1"),
        (("format_version",), ..., "format version None is not 1"),
        (("spec",), ..., "it lacks 'spec'"),
        (("spec",), [], "spec must be an object"),
        (("precision",), 16, "precision must be text"),
        (("opset",), "20", "opset must be a positive whole number, got '20'"),
        (("embed_dim",), 0, "embed_dim must be a positive whole number, got 0"),
        (("logit_scale",), float("nan"), "logit_scale must be positive, got nan"),
        (("logit_scale",), -1, "logit_scale must be positive, got -1"),
        (("preprocess",), None, "preprocess must be an object"),
        (("preprocess", "image_size"), 10**9, "image_size must be 1 to 8192, got 1000000000"),
        (("preprocess", "mean"), [0, 0], "preprocess.mean must be three numbers"),
        (("preprocess", "std"), [1, 1, 0], "preprocess.std must be positive"),
        (("preprocess", "interpolation"), "sinc", "interpolation must be one of bicubic"),
        (("preprocess", "shear"), 3, "unexpected keyword argument 'shear'"),
        (("preprocess", "fill_color"), 256, "fill_color must be 0 to 255, got 256"),
        (("quantization",), "int8", "quantization must be an object that names its rules"),
        (("quantization",), {"rules": 3}, "quantization must be an object that names its rules"),
        (("quantization",), {}, "it lacks 'rules'"),
        (("files",), {}, "files must be an object that holds model.onnx"),
        (("files", "model.onnx"), ..., "files must be an object that holds model.onnx"),
        (("files", "../evil"), {}, "the file name '../evil' leaves the bundle"),
        (("files", "/etc/passwd"), {}, "the file name '/etc/passwd' leaves the bundle"),
        (("files", "manifest.json"), {}, "manifest.json cannot list itself"),
        (("files", "model.onnx", "sha256"), "0" * 63, "sha256 of model.onnx is not 64 hex digits"),
        (("files", "model.onnx", "size_bytes"), -1, "the size of model.onnx is -1"),
        (("files", "labels.npz"), ..., "it names label sets but no labels.npz"),
        (("label_sets", 0, "num_classes"), 0, "label_sets: pets has no classes"),
        (("label_sets",), [3], "label_sets: each needs a name"),
        (("text",), ..., "it lists files of a text side but has no text"),
        (("text",), None, "it lists files of a text side but has no text"),
        (("text",), [], "text must be an object"),
        (("text",), {}, "it lacks 'context_length'"),
        (("text", "context_length"), True, "text.context_length must be a whole number, got True"),
        (("text", "context_length"), 10**6, "context_length must be 1 to 4096, got 1000000"),
        (("text", "clean"), 3, "text.clean must be text"),
        (("text", "clean"), "lowr", "unknown way to clean text 'lowr'. Did you mean 'lower'?"),
        (("text", "zeroed_id"), -1, "text.zeroed_id must be a token, got -1"),
        (("files", "text.onnx"), ..., "it has a text side but no text.onnx"),
        (("files", "tokenizer.json"), ..., "it has a text side but no tokenizer.json"),
        (("files", "tokenizer.json", "size_bytes"), 2**27, "tokenizer.json is too large to be"),
    ],
)
def test_every_field_is_checked(path: tuple[str | int, ...], value: Any, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_manifest(changed(path, value), where="my.zip")
    assert message in str(caught.value)
    assert "my.zip" in str(caught.value)
    assert "\n  try: " in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b'{"format": ' + b"9" * 5000 + b"}"]
)
def test_not_json(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"my.zip: bad manifest.json: .*\n  try: export it"):
        parse_manifest(data, where="my.zip")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)
places = st.sampled_from(
    [(key,) for key in GOOD]
    + [("preprocess", key) for key in GOOD["preprocess"]]
    + [("files", "model.onnx"), ("files", "model.onnx", "sha256"), ("label_sets", 0)]
    + [("files", "model.onnx", "size_bytes"), ("label_sets", 0, "num_classes")]
    + [("text", key) for key in GOOD["text"]]
    + [("files", "text.onnx"), ("files", "tokenizer.json")]
    + [("files", "tokenizer.json", "size_bytes")]
)


@settings(max_examples=300)
@given(path=places, value=json_values)
def test_any_value_anywhere_is_a_manifest_or_a_checkpoint_error(path: Any, value: Any) -> None:
    try:
        manifest = parse_manifest(changed(path, value), where="b")
    except CheckpointError:
        return
    assert preprocess_of(manifest).image_size == manifest["preprocess"]["image_size"]
    assert all(is_safe_name(name) for name in manifest["files"])
    assert manifest["logit_scale"] > 0
    spec = tokenizer_spec_of(manifest)
    assert spec is None or 0 < spec.context_length <= 4096


@settings(max_examples=200)
@given(data=st.binary(max_size=200) | json_values.map(lambda v: json.dumps(v).encode()))
def test_any_bytes_are_a_checkpoint_error(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        parse_manifest(data, where="b")


@pytest.mark.parametrize("name", ["model.onnx", "kernels/attention_sm87.cubin", "a.b-c_d"])
def test_safe_names(name: str) -> None:
    assert is_safe_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../a",
        "a/../b",
        "/a",
        "a//b",
        "a/",
        "C:/a",
        "C:a",
        "..\\a",
        "a\0b",
        " a",
        "./a",
    ],
)
def test_unsafe_names(name: str) -> None:
    assert not is_safe_name(name)


@pytest.mark.parametrize("bad", ["qk", [3], [{}], [{"nodes": []}], [{"nodes": [1]}]])
def test_attentions_that_cannot_be_are_refused(bad: Any) -> None:
    with pytest.raises(CheckpointError, match=r"graph\.attentions"):
        parse_manifest(changed(("graph", "attentions"), bad), where="b")


def test_attentions_are_lists_of_names_or_unknown() -> None:
    assert attention_nodes(GOOD) == [["qk", "soft", "av"]]
    assert attention_nodes({**GOOD, "graph": {"nodes": 9}}) is None
    assert attention_nodes({k: v for k, v in GOOD.items() if k != "graph"}) is None
