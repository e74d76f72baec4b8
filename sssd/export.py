"""A run's student as a stock torchvision model: its weights, the lines that build it, and ONNX."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .detectors import SLIM, STAGES, TORCHVISION
from .records import RunFolder, read_records, write
from .starts import load_student

OPSET = 17
"""ONNX's operators of this version are in every runtime since 2022."""
MADE = "# Written by `python -m sssd export`; needs torch and torchvision alone."


def export(run: Path, file: Path, onnx: bool = False) -> list[Path]:
    """Write a run's student as ``file`` (a state_dict) and, beside it, the lines that build it.

    Args:
        run: the folder of the run.
        file: ends in ``.pt``; the lines go into the same name with ``.py``.
        onnx: write the same name with ``.onnx``, too.

    Returns:
        The files that were written.

    Raises:
        ValueError: the run's student cannot be had (`load_student`), a file cannot be written, or
            the package onnx is missing.
    """
    if file.suffix != ".pt" or not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise ValueError(f"file: {str(file)!r}; expected a name that ends in .pt, in a folder")
    lines = file.with_suffix(".py")
    if lines.exists() and MADE not in lines.read_text(errors="replace"):
        raise ValueError(f"file: {str(lines)!r} is there and not an export's; expected other name")
    if onnx and importlib.util.find_spec("onnx") is None:
        raise ValueError("onnx: not installed; expected it beside torch (pip install onnx)")
    student, classes, config = load_student(run)
    if onnx and config["backbone"] == "swin_t":
        raise ValueError(
            "onnx: not possible for the backbone 'swin_t', whose windows it would fix to one image "
            "size; expected a ResNet"
        )
    weights = io.BytesIO()
    torch.save(student.state_dict(), weights)
    write(file, weights.getbuffer())
    write(lines, source(run, classes, config, lines.name).encode())
    if not onnx:
        return [file, lines]
    target = file.with_suffix(".onnx")
    to_onnx(stock(lines), target)
    return [file, lines, target]


def stock(lines: Path) -> nn.Module:
    """The model that an export's lines load, as its user has it."""
    names: dict[str, Any] = {"__name__": "student", "__file__": str(lines)}
    exec(compile(lines.read_text(), str(lines), "exec"), names)
    return names["load"]()


class _OneImage(nn.Module):
    """A detector as ONNX has it: tensors in, tensors out."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (found,) = self.detector([image])
        return found["boxes"], found["labels"], found["scores"]


def to_onnx(detector: nn.Module, file: Path) -> None:
    """Write a torchvision detector in evaluation mode as ONNX, for one image of any size.

    Input ``image`` float32 [3, height, width], RGB in [0, 1]; outputs ``boxes`` [D, 4],
    ``labels`` [D], ``scores`` [D], as the detector's own.
    """
    axes = {"image": {1: "height", 2: "width"}}
    axes |= {name: {0: "detections"} for name in ("boxes", "labels", "scores")}
    example = torch.rand(3, 200, 240, generator=torch.Generator().manual_seed(0))
    out = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        # Of the tracer, and that it is the older of two: the newer cannot follow a detector's
        # steps that depend on what was detected.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _OneImage(detector).eval(),
            (example,),
            out,  # type: ignore[arg-type]
            input_names=["image"],
            output_names=["boxes", "labels", "scores"],
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
    write(file, out.getbuffer())


# --- the lines ------------------------------------------------------------------------------------


def source(run: Path, classes: list[str], config: dict[str, Any], name: str) -> str:
    """Python, for a file of this name, that builds a run's student without this package."""
    last = list(read_records(RunFolder(run).evaluations))[-1]
    ap, names = float(last["AP"]), ["__background__", *classes]
    what = f"{config['detector']} {config['backbone']}, trained by {config['method']} on"
    return f'''{MADE}
# {what} {json.dumps(config["data"]["name"], ensure_ascii=False)}; run {run.name}.
import sys
from pathlib import Path

import torch
import torchvision
from torch import nn
from torchvision.models import detection

CLASSES = {names!r}  # by label; a detection of label 0 is of none
AP = {ap if ap == ap else 'float("nan")'}  # on the validation images of that data


def build():
    """The detector without its weights."""
    {_build(config, len(names))}


def load(file=Path(__file__).with_suffix(".pt")):
    """The trained detector, in evaluation mode."""
    model = build()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True), strict=True)
    return model.eval()


if __name__ == "__main__":  # python {name} image.png
    model, mode = load(), torchvision.io.ImageReadMode.RGB
    for name in sys.argv[1:]:
        with torch.no_grad():
            (found,) = model([torchvision.io.read_image(name, mode) / 255])
        for box, label, score in zip(*(found[x].tolist() for x in ("boxes", "labels", "scores"))):
            if label:
                print(name, CLASSES[label], round(score, 3), [round(x, 1) for x in box])
'''


def _build(config: dict[str, Any], labels: int) -> str:
    """The body of ``build``: a stock builder's call where that gives the detector."""
    detector, width, scale = config["detector"], config["width"], config["scale"]
    size = f"min_size={tuple(config['min_sizes'])}, max_size={config['max_size']}"
    more = ", detections_per_img=100"
    if detector == "faster_rcnn":
        more = _proposals(config["proposals"], config["roi_samples"])
    elif detector == "fcos":
        radius = (1.5 if config["stem_pool"] else 0.75) / scale
        more = f", score_thresh=0.05, center_sampling_radius={radius}"
    as_stock = config["stem_pool"] and not config["trained_norm"] and (width, scale) == (256, 1)
    if as_stock and config["backbone"] == "resnet50":
        name = detector.replace("_", "")
        return f"""return detection.{name}_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes={labels}, {size}{more}
    )"""
    return "\n    ".join([*_backbone(config), *_HEAD[detector](config, labels, size + more)])


def _proposals(n: int, samples: int) -> str:
    if (n, samples) == (2000, 512):  # torchvision's own
        return ""
    each = (
        f"rpn_{x}_nms_top_n_train={n}, rpn_{x}_nms_top_n_test={n // 2}" for x in ("pre", "post")
    )
    return f", {', '.join(each)}, box_batch_size_per_image={samples}"


def _backbone(config: dict[str, Any]) -> list[str]:
    name, width = config["backbone"], config["width"]
    stages = (1, 2, 3, 4) if config["detector"] == "faster_rcnn" else (2, 3, 4)
    first = {"swin_t": 96, "resnet18": 64, "resnet34": 64, **dict.fromkeys(SLIM, 16)}.get(name, 256)
    channels = [first * 2 ** (s - 1) for s in stages]
    norm = "nn.BatchNorm2d" if config["trained_norm"] else "torchvision.ops.FrozenBatchNorm2d"
    lines = [f"norm = {norm}"]
    if name in SLIM:  # ResNet-18 or 34 with a quarter of the channels
        block = "torchvision.models.resnet.BasicBlock"
        lines += [
            f"body = torchvision.models.ResNet({block}, [1, 1, 1, 1], norm_layer=norm)",
            "body.conv1 = nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False)",
            "body.bn1, body.inplanes = norm(16), 16  # a quarter of the channels",
        ]
        for stage, blocks in enumerate(SLIM[name], start=1):
            stride = 1 if stage == 1 else 2
            of = f"{block}, {8 * 2**stage}, {blocks}, stride={stride}"
            lines.append(f"body.layer{stage} = body._make_layer({of})")
    elif name == "swin_t":
        lines = [
            "from collections import OrderedDict",
            "",
            "parts = torchvision.models.swin_t(weights=None).features",
            "parts = parts[:1], parts[1:2], parts[2:4], parts[4:6], parts[6:]",
            f"body = nn.Sequential(OrderedDict(zip({STAGES}, parts)))",
        ]
    else:
        builder = TORCHVISION.get(name, name)
        lines.append(f"body = torchvision.models.{builder}(weights=None, norm_layer=norm)")
    if not config["stem_pool"]:
        lines.append("body.maxpool = nn.Identity()")
    returned = {f"layer{s}": str(i) for i, s in enumerate(stages)}
    last = "LastLevelMaxPool()" if len(stages) == 4 else f"LastLevelP6P7({width}, {width})"
    lines.append("backbone = detection.backbone_utils.BackboneWithFPN(")
    lines.append(f"    body, {returned}, {channels}, {width},")
    lines += [f"    torchvision.ops.feature_pyramid_network.{last},", ")"]
    if name == "swin_t":  # its maps are [B, h, w, C]
        lines += [
            "inner = backbone.fpn.inner_blocks",
            f"for i, channels in enumerate({channels}):",
            '    before = {"norm": nn.LayerNorm(channels)}',
            '    before["permute"] = torchvision.ops.Permute([0, 3, 1, 2])',
            '    inner[i] = nn.Sequential(OrderedDict({**before, "0": inner[i][0]}))',
        ]
    return lines


def _anchors(sizes: Any, ratios: tuple[float, ...]) -> list[str]:
    of = f"{tuple(map(tuple, sizes))}, ({ratios},) * 5"
    return ["anchors = detection.anchor_utils.AnchorGenerator(", f"    {of}", ")"]


def _faster_rcnn(config: dict[str, Any], labels: int, more: str) -> list[str]:
    width, scale = config["width"], config["scale"]
    level = 4 if config["stem_pool"] else 3
    return [
        *_anchors([[side * scale] for side in (32, 64, 128, 256, 512)], (0.5, 1.0, 2.0)),
        "pool = torchvision.ops.MultiScaleRoIAlign(",
        f'    ["0", "1", "2", "3"], 7, 2, canonical_scale={224 * scale}, canonical_level={level}',
        ")",
        f"head = detection.faster_rcnn.TwoMLPHead({width * 7 * 7}, {4 * width})",
        f"last = detection.faster_rcnn.FastRCNNPredictor({4 * width}, {labels})",
        "return detection.FasterRCNN(",
        "    backbone, rpn_anchor_generator=anchors, box_roi_pool=pool, box_head=head,",
        f"    box_predictor=last, {more}",
        ")",
    ]


def _retinanet(config: dict[str, Any], labels: int, more: str) -> list[str]:
    width, scale = config["width"], config["scale"]
    octave = [
        [int(side * 2 ** (i / 3)) * scale for i in range(3)] for side in (32, 64, 128, 256, 512)
    ]
    norm = f", norm_layer=lambda c: nn.GroupNorm({width // 8}, c)" if width < 256 else ""
    return [
        *_anchors(octave, (0.5, 1.0, 2.0)),
        f"head = detection.retinanet.RetinaNetHead({width}, 9, {labels}{norm})",
        "return detection.RetinaNet(",
        f"    backbone, {labels}, anchor_generator=anchors, head=head, {more}",
        ")",
    ]


def _fcos(config: dict[str, Any], labels: int, more: str) -> list[str]:
    width, scale = config["width"], config["scale"]
    norm = f"norm_layer=lambda c: nn.GroupNorm({width // 8}, c)"
    part = "detection.fcos.FCOS"
    return [
        *_anchors([[stride * scale] for stride in (8, 16, 32, 64, 128)], (1.0,)),
        f"head = {part}Head({width}, 1, {labels}, num_convs=0)",
        f"head.classification_head = {part}ClassificationHead({width}, 1, {labels}, {norm})",
        f"head.regression_head = {part}RegressionHead({width}, 1, {norm})",
        "return detection.FCOS(",
        f"    backbone, {labels}, anchor_generator=anchors, head=head, {more}",
        ")",
    ]


_HEAD = {"faster_rcnn": _faster_rcnn, "retinanet": _retinanet, "fcos": _fcos}
