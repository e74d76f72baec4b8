"""The check of a data set tells what is in it and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import write_coco

from sssd.__main__ import main
from sssd.data.check import check_data


def test_counts_and_sizes(tmp_path: Path) -> None:
    found = check_data(write_coco(tmp_path / "data", train=8, val=4))
    assert found.splits["images"].tolist() == [8, 4]
    assert found.splits["objects"].tolist() == [16, 8]
    assert found.splits["width"].tolist() == ["64–64"] * 2
    content = json.loads((tmp_path / "data/annotations/instances_train.json").read_text())
    own = [entry for entry in content["annotations"] if entry["category_id"] == 7]
    row = found.classes.set_index("class").loc["colour 7"]
    assert row["training objects"] == len(own)
    assert row["training images"] == len({entry["image_id"] for entry in own}) < len(own)
    assert found.problems == ()


def test_what_is_wrong_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_coco(tmp_path / "data", classes=3)
    file = root / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"] = [e for e in content["annotations"] if e["image_id"] != 2]
    for entry in content["annotations"]:
        entry["category_id"] = 3
    content["annotations"][0]["bbox"][2] = 0
    content["annotations"][1] |= {"iscrowd": 1, "area": 9.0}
    file.write_text(json.dumps(content))
    assert main(["check", str(root)]) == 0
    printed = capsys.readouterr().out
    for sentence in (
        "degenerate boxes dropped from the targets",
        "training: no object of colour 7, colour 12",
        "training: 2 images without a usable box are left out",  # its own two were spoilt
    ):
        assert sentence in printed
    assert check_data(root).splits["crowds"].tolist() == [1, 0]

    file = root / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    for entry in content["annotations"]:
        entry["iscrowd"] = int(entry["image_id"] == 3)
    file.write_text(json.dumps(content))
    found = check_data(root)
    assert found.splits["crowds"].tolist() == [1, 2]
    said = (
        "validation: 1 images without a usable box are kept: detections there count as false, but"
    )
    assert f"{said} for those in crowd regions" in str(found)

    (root / "val" / "002.png").write_bytes(b"torn")
    assert main(["check", str(root)]) == 2
    assert "002.png) cannot be read" in capsys.readouterr().err
    assert main(["check", ""]) == 2


def test_a_problem_is_shown_as_it_is(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "data")
    file = root / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["categories"].append({"id": 99, "name": "<script>alert(1)</script>"})
    file.write_text(json.dumps(content))
    page = check_data(root)._repr_html_()
    assert "no object of &lt;script&gt;alert" in page and "<script>" not in page
