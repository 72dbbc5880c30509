"""Text towers to ONNX: every kind that open_clip has answers there as it does in torch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import open_clip
import pytest
import torch

from dimefm_edge.data.scenes import scene_sentence
from dimefm_edge.encoders import Normalised, TextTower
from dimefm_edge.errors import ExportError, ParityError, UnknownNameError
from dimefm_edge.export import onnx as export_onnx
from dimefm_edge.export.graph_spec import GraphSpec
from dimefm_edge.export.parity import ParityReport, check_parity
from dimefm_edge.export.text import (
    export_text_onnx,
    write_text_side,
)
from dimefm_edge.manifest import TEXT_FILE
from dimefm_edge.teacher import load_teacher
from dimefm_edge.tokenizer import load_tokenizer

LENGTH, END = 12, 49407
VISION = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
TEXT = {"context_length": LENGTH, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
KINDS: dict[str, dict[str, Any]] = {
    "CLIP": {},
    "SigLIP": {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    "MobileCLIP": {"no_causal_mask": True},
    "eos": {"pool_type": "eos", "eos_id": END},
    "first": {"no_causal_mask": True, "pool_type": "first"},
    "CoCa": {"embed_cls": True, "pool_type": "last"},
}


def build_model(kind: str) -> Any:
    torch.manual_seed(0)
    values = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": {**TEXT, **KINDS[kind]}}
    cls = open_clip.CLIP if kind == "CLIP" else open_clip.CustomTextCLIP
    model = cls(**values).eval()
    with torch.no_grad():  # random position embeddings of 0.01 would hide a shift
        for name, parameter in model.named_parameters():
            if "embedding" in name:
                parameter.mul_(50)
    return model


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    tokenize = open_clip.SimpleTokenizer(context_length=LENGTH)
    sentences = [scene_sentence(i) for i in range(44)]
    sentences[7], sentences[8] = "", "<end_of_text> first " + "long " * 20
    return tokenize(sentences).numpy()


def run(path: Path, tokens: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (embeds,) = session.run(["text_embeds"], {"tokens": tokens})
    return embeds


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_text_tower_is_open_clips_without_its_images(kind: str, tokens: np.ndarray) -> None:
    model = build_model(kind)
    names = set(model.state_dict())
    tower = TextTower(model)
    with torch.no_grad():
        wanted = model.encode_text(torch.from_numpy(tokens))
        torch.testing.assert_close(tower(torch.from_numpy(tokens)), wanted, rtol=0, atol=0)
    assert not [name for name in tower.state_dict() if "visual" in name]
    assert set(model.state_dict()) == names  # the model is as it was
    assert model.encode_image(torch.zeros(1, 3, 32, 32)).shape == (1, 8)
    assert len(np.unique(wanted.numpy().round(4), axis=0)) > 40  # sentences are told apart


def export(module: Any, path: Path, tokens: np.ndarray, precision: str = "fp32") -> ParityReport:
    graph = export_text_onnx(
        module,
        path,
        spec=GraphSpec(precision=precision),
        parity_tokens=tokens,
        metadata={"teacher": "mine"},
    )
    assert graph.path == path
    return graph.parity


@pytest.mark.parametrize(
    "kind",
    ["CLIP", "SigLIP", *(pytest.param(k, marks=pytest.mark.slow) for k in list(KINDS)[2:])],
)
def test_graphs_answer_as_the_tower(kind: str, tokens: np.ndarray, tmp_path: Path) -> None:
    model = build_model(kind)
    path = tmp_path / "text.onnx"
    parity = export(Normalised(TextTower(model)), path, tokens)
    assert parity.num_inputs == len(tokens)
    assert parity.max_abs_diff < 1e-5
    with torch.no_grad():
        wanted = model.encode_text(torch.from_numpy(tokens), normalize=True).numpy()
    for rows in (slice(0, 1), slice(3, 10), slice(0, 32)):
        np.testing.assert_allclose(run(path, tokens[rows]), wanted[rows], atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.onnx"]
    check_signature(onnx.load(path))
    if kind == "CLIP":
        check_causal_mask(path)


def check_signature(model: onnx.ModelProto) -> None:
    (given,), (answer,) = model.graph.input, model.graph.output
    shape = given.type.tensor_type.shape.dim
    assert (given.name, answer.name) == ("tokens", "text_embeds")
    assert given.type.tensor_type.elem_type == onnx.TensorProto.INT64
    assert (shape[0].dim_param, shape[1].dim_value) == ("batch", LENGTH)
    assert {p.key: p.value for p in model.metadata_props} == {"teacher": "mine"}
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    for node in model.graph.node:  # what finds the end token needs no 64-bit ArgMax
        if node.op_type == "ArgMax":
            assert types[node.input[0]] == onnx.TensorProto.INT32


def check_causal_mask(path: Path) -> None:
    """It is a constant, and works: what comes after a word changes nothing before it."""
    masks = [
        tensor for tensor in map(onnx.numpy_helper.to_array, onnx.load(path).graph.initializer)
        if tensor.shape[-2:] == (LENGTH, LENGTH)
    ]  # fmt: skip
    assert len(masks) == 1
    assert (masks[0] == -1e4 * np.triu(np.ones((LENGTH, LENGTH)), 1)).all()
    short = np.zeros((1, LENGTH), np.int64)
    short[0, :3] = (49406, 320, END)
    longer = short.copy()
    longer[0, 3:6] = 1929  # after the end token, which is found by the largest id
    np.testing.assert_allclose(run(path, short), run(path, longer), atol=1e-6)


def test_fp16_halves_it_and_keeps_its_answers(tokens: np.ndarray, tmp_path: Path) -> None:
    tower = Normalised(TextTower(build_model("CLIP")))
    assert export(tower, tmp_path / "t.onnx", tokens, "fp16").min_cosine > 0.999
    num_values = sum(p.numel() for p in tower.parameters()) - 1  # all but the logit scale
    assert (tmp_path / "t.onnx").stat().st_size < 2.2 * num_values


@pytest.mark.slow
def test_what_fp16_and_one_file_cannot_hold(
    tokens: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = Normalised(TextTower(build_model("CLIP")))
    overflowing = copy.deepcopy(tower)
    with torch.no_grad():
        overflowing.tower.model.transformer.resblocks[0].ln_2.weight.mul_(1e7)
    with pytest.raises(ParityError, match=r"leaves fp16's range \(65504\) on sentence 0 of 16"):
        export(overflowing, tmp_path / "o.onnx", tokens, "fp16")
    monkeypatch.setattr(export_onnx, "_MAX_ONNX_BYTES", 1000)
    with pytest.raises(ExportError, match=r"one ONNX file holds 2 GiB\n  try: .*precision fp16"):
        export(tower, tmp_path / "o.onnx", tokens)
    assert not list(tmp_path.iterdir())


def test_what_goes_wrong_is_told_and_leaves_nothing(tokens: np.ndarray, tmp_path: Path) -> None:
    tower = Normalised(TextTower(build_model("CLIP")))
    path = tmp_path / "text.onnx"
    with pytest.raises(UnknownNameError, match="unknown ONNX precision 'fp61'"):
        export(tower, path, tokens, "fp61")

    class Loops(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(LENGTH, 8))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            if float(tokens.sum()) > 3:  # depends on the data: cannot be traced
                tokens = tokens + 1
            return torch.nn.functional.normalize(tokens.float() @ self.weight, dim=-1)

    with pytest.raises(ExportError, match=r"cannot export the model to ONNX: .*\n  try: run"):
        export(Loops(), path, tokens)
    broken = copy.deepcopy(tower)
    broken.tower.model.ln_final.weight.data.fill_(float("nan"))
    with pytest.raises(ExportError, match=r"the model itself answers sentence 0 .* length nan"):
        export(broken, path, tokens)
    assert not list(tmp_path.iterdir())


def test_parity_names_the_worst_sentence(tiny_open_bundle_dir: Path, tokens: np.ndarray) -> None:
    path = tiny_open_bundle_dir / TEXT_FILE
    expected = run(path, tokens)
    report = check_parity(path, expected, inputs=tokens, kind="sentence", precision="fp32")
    assert report.max_abs_diff < 1e-5
    assert report.num_inputs == 44
    wrong = expected.copy()
    wrong[[5, 9]] = expected[[6, 8]]
    wrong[5] = -wrong[5]
    with pytest.raises(ParityError, match=r"worst on sentence 5 of 44, .*; 2 sentences differ"):
        check_parity(path, wrong, inputs=tokens, kind="sentence", precision="fp16")
    wrong[9, 0] = np.nan
    with pytest.raises(ParityError, match=r"worst on sentence 9 of 44.*\n  try: another torch"):
        check_parity(path, wrong, inputs=tokens, kind="sentence", precision="fp32")


@pytest.mark.slow
def test_a_text_side_on_its_own(tmp_path: Path) -> None:
    """The sample teacher's, whose tokenizer is a file already."""
    teacher = load_teacher("sample", device="cpu")
    sentences = [scene_sentence(i) for i in range(40)]
    values = write_text_side(tmp_path, teacher, graph=GraphSpec(), sentences=sentences)
    assert (values["context_length"], values["clean"], values["opset"]) == (32, "none", 20)
    assert values["graph"]["op_counts"]["LayerNormalization"] == 7
    assert values["parity"]["num_sentences"] == 46
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    embeds = run(tmp_path / "text.onnx", tokenizer(sentences))
    np.testing.assert_allclose(embeds, teacher.encode_texts(sentences), atol=1e-5)
