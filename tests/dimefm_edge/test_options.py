"""What --config gives to each command."""

from __future__ import annotations

import dataclasses

import pytest

from dimefm_edge import options
from dimefm_edge.config import RunConfig, save
from dimefm_edge.options import CommonOptions, DistillOptions, EmbedOptions, defaults_from

KINDS = [
    kind
    for kind in vars(options).values()
    if isinstance(kind, type) and issubclass(kind, CommonOptions)
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_mapping_names_real_fields(kind, tmp_path):
    path = tmp_path / "run.toml"
    save(RunConfig(), path)
    names = {f.name for f in dataclasses.fields(kind)}
    assert set(kind.from_config) <= names
    assert defaults_from(kind, path).config == path


def test_embed_takes_its_data_from_a_run(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('store = "s"\n[data]\nimages = ["x"]\nmax_bad = 5\n')
    found = defaults_from(EmbedOptions, path)
    assert (found.store, found.images, found.texts) == ("s", ("x",), ("scenes",))
    assert found.max_bad == 5.0


def test_distill_takes_everything(tmp_path):
    path = tmp_path / "run.toml"
    run = RunConfig(target="jetson-nano", out="elsewhere")
    save(run, path)
    assert defaults_from(DistillOptions, path).run == run


@pytest.mark.parametrize("kind", KINDS)
def test_every_flag_has_help(kind):
    import inspect

    source = inspect.getsource(kind)
    for field in dataclasses.fields(kind):
        if field.name in kind.__annotations__ and field.name != "run":
            after = source.split(f"    {field.name}: ", 1)[1].split("\n", 1)[1]
            assert after.lstrip().startswith('"""'), field.name
