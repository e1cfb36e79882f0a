"""docs/backbones.md: the facts of its table are timm's and the records' own; its recipes exist."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from conftest import ROOT

import net
import options
from benchmarks import backbones
from net import Architecture

TEXT = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")
LINES = [line for line in TEXT.splitlines() if re.match(r"\| [^|]+ \| `(?!--)", line)]
TABLE = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES]
ROWS = {cells[1].strip("`"): dict(zip(backbones.COLUMNS, cells, strict=True)) for cells in TABLE}
OF_TIMM = [model for model in ROWS if model.startswith(net.TIMM)]


def test_the_table_has_every_row_of_the_benchmark_as_it_prints_it() -> None:
    assert list(ROWS) == [row.model for row in backbones.ROWS] and len(OF_TIMM) >= 12
    for row, cells in zip(backbones.ROWS, TABLE, strict=True):
        assert cells[:-2] == backbones.facts(row)


@pytest.mark.parametrize("model", OF_TIMM)
def test_input_and_dims_are_timms_own(model: str) -> None:
    row, name = ROWS[model], model.removeprefix(net.TIMM)
    config = timm.get_pretrained_cfg(name)
    size = int(row["input, px"])
    assert config.input_size == (3, size, size)
    assert (config.license, config.interpolation) == (row["weights' licence"], row["resized"])
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0).eval()
        features = theirs(torch.empty(1, 3, size, size))
    assert features.shape == (1, int(row["dims"]))


@pytest.mark.parametrize("model", ROWS)
def test_the_row_begins_with_a_recipe_for_this_network_and_has_speeds(model: str) -> None:
    row = ROWS[model]
    if row["begin with"]:
        args = options.parse_train([row["begin with"].strip("`").replace("@", f"@{ROOT}/")])
        asked = Architecture(args.model, 8).model
        assert asked == model and args.image_size == int(row["at px"])
    speeds = [float(row[name]) for name in ("forward, images/s", "training, images/s")]
    assert speeds[0] > speeds[1] > 0


def test_every_model_of_ours_with_weights_of_its_own_has_a_row() -> None:
    sizes = {"resnet10", "resnet18", "resnet34", "resnet101", "resnet152"}
    assert set(net.MODELS) - sizes == set(ROWS) - set(OF_TIMM)
