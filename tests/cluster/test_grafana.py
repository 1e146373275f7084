"""cluster/grafana.json: Grafana can import it, and it asks for the gauges that training sets, all and no others."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from neurostorm.train.records.gauges import OWN, SHOWN

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def board() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "cluster" / "grafana.json").read_text())
    return loaded


def expressions(board: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def test_it_asks_for_every_gauge_and_for_no_other(board: dict[str, Any]) -> None:
    asked = {name for expression in expressions(board) for name in re.findall(r"ray_(neurostorm_\w+)", expression)}
    assert asked == {*OWN, *SHOWN}
    for text in re.findall(r"neurostorm_\w+", json.dumps(board)):
        assert text in asked, "in a variable"


def test_every_query_is_of_the_chosen_runs_and_balanced(board: dict[str, Any]) -> None:
    for expression in expressions(board):
        assert expression.count('{run=~"$run"}') == len(re.findall("ray_neurostorm_", expression)) == 1
        assert re.sub(r"[^(]", "", expression) == "(" * expression.count(")") != ""


def test_grafana_takes_it_as_a_dashboard_of_its_own(board: dict[str, Any]) -> None:
    assert re.fullmatch(r"[a-z0-9-]{1,40}", board["uid"]) and board["title"] and board["schemaVersion"] >= 36
    assert "id" not in board, "the number in a database of ours would overwrite somebody's dashboard"
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    assert variables["run"]["query"]["query"] == variables["run"]["definition"]
    parts = [*board["panels"], *(target for panel in board["panels"] for target in panel["targets"]), variables["run"]]
    assert {json.dumps(part["datasource"]) for part in parts} == {'{"type": "prometheus", "uid": "${datasource}"}'}


def test_panels_have_their_own_place_title_and_unit(board: dict[str, Any]) -> None:
    cells: list[tuple[int, int]] = []
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells += [(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])]
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
    assert len(cells) == len(set(cells)), "panels overlap"
    for names in ([panel["title"] for panel in board["panels"]], [panel["id"] for panel in board["panels"]]):
        assert len(names) == len(set(names))
