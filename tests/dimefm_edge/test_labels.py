"""Label banks: the mean over templates, the file format, and what the loader refuses."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dimefm_edge.errors import CheckpointError, DataError
from dimefm_edge.labels import LabelBank, build_label_bank, load_label_banks, save_label_banks


def encode_by_letters(sentences: Sequence[str]) -> npt.NDArray[np.float32]:
    """(len, 26) counts of letters: a real, if simple, text encoder; not normalised."""
    rows = [[s.lower().count(chr(97 + i)) + 0.01 for i in range(26)] for s in sentences]
    return np.asarray(rows, np.float32)


def unit_rows(count: int, width: int = 8, seed: int = 0) -> npt.NDArray[np.float32]:
    rows = np.random.default_rng(seed).normal(size=(count, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_bank_is_the_normalised_mean_of_normalised_sentences() -> None:
    templates = ("a photo of a {c}.", "{c} and {c}", "{not a place} {c}")
    bank = build_label_bank("pets", ["cat", "dog {x}"], templates, encode_by_letters)
    for row, name in enumerate(["cat", "dog {x}"]):
        total = np.zeros(26)
        for sentence in [
            f"a photo of a {name}.", f"{name} and {name}", "{not a place} " + name,
        ]:  # fmt: skip
            embed = encode_by_letters([sentence])[0].astype(np.float64)
            total += embed / np.sqrt((embed**2).sum())
        np.testing.assert_allclose(bank.embeds[row], total / np.sqrt((total**2).sum()), atol=1e-6)
    assert bank.embeds.dtype == np.float32
    assert bank.classnames == ("cat", "dog {x}")


def test_many_classes_are_encoded_in_pieces_with_the_same_result() -> None:
    calls: list[int] = []

    def encode(sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        calls.append(len(sentences))
        return encode_by_letters(sentences)

    names = [f"thing {chr(97 + i % 26)}{'xyz'[i % 3]}" for i in range(3000)]
    bank = build_label_bank("many", names, ("{c}", "my {c}"), encode)
    assert len(calls) == 2
    assert sum(calls) == 6000
    alone = build_label_bank("one", names[2999:], ("{c}", "my {c}"), encode_by_letters)
    np.testing.assert_allclose(bank.embeds[2999], alone.embeds[0], atol=1e-6)


@pytest.mark.parametrize(
    ("classnames", "templates", "message"),
    [
        ([], ["{c}"], "label set 'pets' needs class names and templates"),
        (["cat"], [], "label set 'pets' needs class names and templates"),
        (["cat"], ["a photo of a {}."], r"the template 'a photo of a \{\}.' has no \{c\}"),
    ],
)
def test_bad_class_names_and_templates(
    classnames: list[str], templates: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        build_label_bank("pets", classnames, templates, encode_by_letters)


def test_classes_of_one_name_are_told(caplog: pytest.LogCaptureFixture) -> None:
    bank = build_label_bank("birds", ["crane", "owl", "crane"], ["{c}"], encode_by_letters)
    assert bank.classnames == ("crane", "owl", "crane")
    (record,) = caplog.records
    assert record.getMessage() == (
        "label set 'birds': several classes are called 'crane'; their images cannot be told apart"
    )


@pytest.mark.parametrize(
    ("embeds", "message"),
    [
        (unit_rows(3), "has 2 class names but 3 embeddings"),
        (unit_rows(2) * 2, "embedding of 'cat' has length 2, not 1"),
        (unit_rows(2) * np.float32("nan"), "has length nan"),
        (unit_rows(2).astype(np.float64), r"must be \(C, E\) float32"),
        (unit_rows(2)[0], r"must be \(C, E\) float32"),
    ],
)
def test_a_bank_checks_its_embeddings(embeds: npt.NDArray[np.float32], message: str) -> None:
    with pytest.raises(DataError, match=message):
        LabelBank("pets", ("cat", "dog"), ("{c}",), embeds)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.text(max_size=20), min_size=1, max_size=5),
    bank_names=st.lists(st.text(max_size=8), min_size=1, max_size=3, unique=True),
)
def test_round_trip(tmp_path: Path, names: list[str], bank_names: list[str]) -> None:
    # Lone surrogates cannot occur: hypothesis draws text that encodes.
    path = tmp_path / "labels.npz"
    banks = [
        LabelBank(name, tuple(names), ("{c}", "a {c}\0"), unit_rows(len(names), seed=i))
        for i, name in enumerate(bank_names)
    ]
    save_label_banks(path, banks)
    loaded = load_label_banks(path)
    assert list(loaded) == bank_names
    for bank in banks:
        assert loaded[bank.name].classnames == bank.classnames
        assert loaded[bank.name].templates == bank.templates
        np.testing.assert_array_equal(loaded[bank.name].embeds, bank.embeds)
    assert [p.name for p in tmp_path.iterdir()] == ["labels.npz"]


def test_equal_banks_make_equal_files(tmp_path: Path) -> None:
    bank = LabelBank("pets", ("cat", "dog"), ("{c}",), unit_rows(2))
    save_label_banks(tmp_path / "a.npz", [bank])
    save_label_banks(tmp_path / "b.npz", [bank])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_two_banks_of_one_name_are_refused(tmp_path: Path) -> None:
    bank = LabelBank("pets", ("cat",), ("{c}",), unit_rows(1))
    with pytest.raises(DataError, match="names of their own, got pets, pets"):
        save_label_banks(tmp_path / "labels.npz", [bank, bank])
    assert not list(tmp_path.iterdir())


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no label sets at .*labels.npz\n  try: export the"):
        load_label_banks(tmp_path / "labels.npz")
    foreign = tmp_path / "foreign.npz"
    np.savez(foreign, banks=np.frombuffer(b'{"format": "other"}', np.uint8))
    with pytest.raises(CheckpointError, match="index is of another format"):
        load_label_banks(foreign)
    np.savez(foreign, banks=np.asarray([{"a": 1}], object))
    with pytest.raises(CheckpointError, match=r"banks.npy holds object"):
        load_label_banks(foreign)
    newer = {"format": "dimefm_edge.labels", "version": 2, "banks": []}
    np.savez(foreign, banks=np.frombuffer(json.dumps(newer).encode(), np.uint8))
    with pytest.raises(CheckpointError, match="format version 2, this package reads 1"):
        load_label_banks(foreign)


def test_a_declared_shape_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "labels.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 512)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("embeds_0.npy", header.getvalue() + bytes(64))
    with pytest.raises(CheckpointError, match="not as long as its shape says"):
        load_label_banks(path)


def test_a_zip_bomb_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "labels.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("embeds_0.npy", bytes(2**20 + 1))
    with pytest.raises(CheckpointError, match="it is compressed, which ours are not"):
        load_label_banks(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("embeds_0.npy", bytes(2**10))
    data = bytearray(path.read_bytes())
    place = data.rindex(b"PK\x01\x02")
    data[place + 24 : place + 28] = (2**31).to_bytes(4, "little")  # its length, forged
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="said to be longer than itself"):
        load_label_banks(path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1), flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255))))
def test_damage_is_a_checkpoint_error_or_harmless(
    tmp_path: Path, cut: float, flips: list[tuple[float, int]]
) -> None:
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    bank = LabelBank("pets", ("cat", "dog"), ("{c}",), unit_rows(2))
    save_label_banks(good, [bank])
    data = bytearray(good.read_bytes())
    for place, value in flips:
        data[int(place * (len(data) - 1))] = value
    bad.write_bytes(data[: max(1, int(len(data) * max(cut, 0.2)))])
    try:
        loaded = load_label_banks(bad)
    except CheckpointError as error:
        assert "holds no label sets of ours" in str(error)  # noqa: PT017
    else:
        np.testing.assert_array_equal(loaded["pets"].embeds, bank.embeds)
