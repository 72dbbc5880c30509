from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dimefm_edge import errors
from dimefm_edge.errors import DimeFMError, UnknownNameError, lookup, nearest_names


def test_the_hint_is_part_of_the_text():
    assert str(DimeFMError("what happened")) == "what happened"
    error = DimeFMError("what happened", hint="dimefm-edge doctor")
    assert str(error) == "what happened\n  try: dimefm-edge doctor"
    assert error.hint == "dimefm-edge doctor"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("DimeFMError", 1), ("TrainingError", 1), ("ExportError", 1), ("MissingExtraError", 1),
        ("InputError", 2), ("ConfigError", 2), ("UnknownNameError", 2), ("DataError", 2),
        ("StoreError", 2), ("CheckpointError", 2), ("BudgetError", 3), ("ParityError", 3),
    ],
)  # fmt: skip
def test_exit_codes(name, code):
    assert getattr(errors, name).exit_code == code


def test_lookup_finds_or_offers_the_nearest():
    table = {"onnx": 1, "tensorrt": 2}
    assert lookup(table, "onnx", kind="export format") == 1
    with pytest.raises(UnknownNameError) as caught:
        lookup(table, "tensort", kind="export format")
    assert str(caught.value) == (
        "unknown export format 'tensort'. Did you mean 'tensorrt'? Known: onnx, tensorrt."
    )


def test_a_long_table_is_not_printed_whole():
    with pytest.raises(UnknownNameError) as caught:
        lookup({f"name-{i:03}": i for i in range(100)}, "name-0x7", kind="thing")
    assert "... (100)" in str(caught.value)
    assert len(str(caught.value)) < 200


def test_case_does_not_matter_for_the_guess():
    assert nearest_names("VIT-b-32", ["ViT-B-32", "RN50"]) == ["ViT-B-32"]


@given(st.text(max_size=30), st.lists(st.text(max_size=12), max_size=8))
def test_lookup_answers_anything(name, known):
    table = dict.fromkeys(known, True)
    if name in table:
        assert lookup(table, name, kind="thing")
    else:
        with pytest.raises(UnknownNameError, match="unknown thing"):
            lookup(table, name, kind="thing")
