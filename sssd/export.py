"""A run's student as a stock torchvision model: its weights, code that builds it, and ONNX."""

from __future__ import annotations

import importlib.util
import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx.operators import shape_as_tensor

from .detectors import SLIM, STAGES, TORCHVISION_NAMES
from .parameters import check_folder
from .records import RunFolder, write
from .starts import load_student

OPSET = 17
"""The version of ONNX's operators; every runtime since 2022 has it."""
MADE = "# Written by `python -m sssd export`; needs torch and torchvision alone."


def export(run: Path, file: Path, onnx: bool = False) -> list[Path]:
    """Write a run's student as ``file`` (a state_dict), and beside it Python code that builds it.

    Args:
        run: the folder of the run.
        file: ends in ``.pt``; the Python file has the same name with ``.py``.
        onnx: also write a file of the same name with ``.onnx``.

    Returns:
        The files that were written.

    Raises:
        ValueError: the student cannot be loaded (`load_student`), a file cannot be written, or
            the package onnx is missing.
    """
    if file.suffix != ".pt" or not file.parent.is_dir():
        raise ValueError(f"file: {str(file)!r}; expected a name that ends in .pt, in a folder")
    check_folder("file", file.parent)
    script = file.with_suffix(".py")
    if script.exists() and MADE not in script.read_text(errors="replace"):
        raise ValueError(f"file: {str(script)!r} is there and is no export; expected another name")
    if onnx and importlib.util.find_spec("onnx") is None:
        raise ValueError("onnx: not installed; expected it beside torch (pip install onnx)")
    student, classes, config = load_student(run)
    if onnx and config["backbone"] == "swin_t":
        raise ValueError(
            "onnx: not possible for the backbone 'swin_t', as ONNX would fix its windows to one "
            "image size; expected a ResNet"
        )
    weights = io.BytesIO()
    torch.save(student.state_dict(), weights)
    write(file, weights.getbuffer())
    write(script, source(run, student, classes, config, script.name).encode())
    if not onnx:
        return [file, script]
    target = file.with_suffix(".onnx")
    to_onnx(stock(script), target)
    return [file, script, target]


def stock(script: Path) -> nn.Module:
    """The model that the Python file of an export builds and loads."""
    names: dict[str, Any] = {"__name__": "student", "__file__": str(script)}
    exec(compile(script.read_text(), str(script), "exec"), names)
    return names["load"]()


class _OneImage(nn.Module):
    """A detector with plain tensors as input and output, as ONNX needs it.

    torchvision's transform computes the size of the resized image in single precision if it is
    traced, and otherwise in double: for some images they differ by a pixel. So it is resized here.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        transform = self.detector.transform
        transform.resize = self.resize
        (found,) = self.detector([image])
        del transform.resize  # the class's own again
        return found["boxes"], found["labels"], found["scores"]

    def resize(self, image: Tensor, target: None) -> tuple[Tensor, None]:
        """What the detector's ``transform.resize`` does in evaluation."""
        transform = self.detector.transform
        sides = shape_as_tensor(image)[1:].double()
        limits = torch.tensor([transform.min_size[-1], transform.max_size]).double()
        # Not a number ÷ a tensor, which torch computes as the number times the reciprocal.
        scale = (limits / torch.stack([sides.min(), sides.max()])).min()
        height, width = (sides * scale).long()
        return F.interpolate(image[None], (height, width), mode="bilinear")[0], target


def to_onnx(detector: nn.Module, file: Path) -> None:
    """Write a torchvision detector in evaluation mode as ONNX, for one image of any size.

    Input ``image`` float32 [3, height, width], RGB in [0, 1]; outputs ``boxes`` [D, 4],
    ``labels`` [D], ``scores`` [D], the same as the detector's.
    """
    axes = {"image": {1: "height", 2: "width"}}
    axes |= {name: {0: "detections"} for name in ("boxes", "labels", "scores")}
    example = torch.rand(3, 200, 240, generator=torch.Generator().manual_seed(0))
    out = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        # The tracer warns of what it cannot follow, and that it is the older of two exporters; the
        # newer one cannot follow steps of a detector that depend on what was detected.
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


# --- the Python file ------------------------------------------------------------------------------


def source(
    run: Path, model: nn.Module, classes: list[str], config: dict[str, Any], name: str
) -> str:
    """The Python code, for a file called ``name``, that builds the student without this package."""
    ap, names = float(RunFolder(run).last_evaluation()["AP"]), ["__background__", *classes]
    what = f"{config['detector']} {config['backbone']}, trained by {config['method']} on"
    return f'''{MADE}
# {what} {json.dumps(config["data"]["name"], ensure_ascii=False)}; run {run.name}.
import sys
from pathlib import Path

import torch
import torchvision
from torch import nn
from torchvision.models import detection

CLASSES = {names!r}  # by label; label 0 is no class
AP = {ap if ap == ap else 'float("nan")'}  # on the validation images of that data


def build():
    """The detector without its weights."""
    {_build(model, config, len(names))}


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


def _build(model: Any, config: dict[str, Any], labels: int) -> str:
    """The body of ``build``: one call of torchvision's builder if it gives this detector."""
    detector, width = config["detector"], config["width"]
    options = {"min_size": tuple(config["min_sizes"]), "max_size": config["max_size"]}
    if detector == "faster_rcnn":
        n = config["proposals"]
        options |= {f"rpn_{x}_nms_top_n_train": n for x in ("pre", "post")}
        options |= {f"rpn_{x}_nms_top_n_test": n // 2 for x in ("pre", "post")}
        options["box_batch_size_per_image"] = config["roi_samples"]
    else:
        options["num_classes"] = labels
        options["score_thresh"] = model.score_thresh
        options["detections_per_img"] = model.detections_per_img
    if detector == "fcos":
        options["center_sampling_radius"] = model.center_sampling_radius
    as_stock = config["stem_pool"] and not config["trained_norm"]
    if as_stock and (config["backbone"], width, config["scale"]) == ("resnet50", 256, 1):
        options = {"weights": None, "weights_backbone": None, "num_classes": labels, **options}
        arguments = [f"{name}={value!r}" for name, value in options.items()]
        return _call(f"return detection.{detector.replace('_', '')}_resnet50_fpn", arguments)

    generator = (model.rpn if detector == "faster_rcnn" else model).anchor_generator
    ratios = f"({generator.aspect_ratios[0]},) * {len(generator.sizes)}"
    lines = _backbone(model, config)
    lines.append(f"anchors = detection.anchor_utils.AnchorGenerator({generator.sizes}, {ratios})")
    norm = f"norm_layer=lambda c: nn.GroupNorm({width // 8}, c)"
    parts = {"anchor_generator": "anchors", "head": "head"}
    if detector == "faster_rcnn":
        pool = model.roi_heads.box_roi_pool
        scale = f"canonical_scale={pool.canonical_scale}, canonical_level={pool.canonical_level}"
        lines += [
            f"pool = torchvision.ops.MultiScaleRoIAlign({pool.featmap_names}, 7, 2, {scale})",
            f"head = detection.faster_rcnn.TwoMLPHead({width * 7 * 7}, {4 * width})",
            f"last = detection.faster_rcnn.FastRCNNPredictor({4 * width}, {labels})",
        ]
        parts = {"rpn_anchor_generator": "anchors", "box_roi_pool": "pool"}
        parts |= {"box_head": "head", "box_predictor": "last"}
    elif detector == "retinanet":
        norm = f", {norm}" if width < 256 else ""
        lines.append(f"head = detection.retinanet.RetinaNetHead({width}, 9, {labels}{norm})")
    else:
        lines.append(f"head = detection.fcos.FCOSHead({width}, 1, {labels}, num_convs=0)")
        for part, more in (("classification", f", {labels}"), ("regression", "")):
            of = f"detection.fcos.FCOS{part.capitalize()}Head({width}, 1{more}, {norm})"
            lines.append(f"head.{part}_head = {of}")
    arguments = ["backbone", *(f"{name}={part}" for name, part in parts.items())]
    arguments += [f"{name}={value!r}" for name, value in options.items()]
    return "\n    ".join([*lines, _call(f"return detection.{type(model).__name__}", arguments)])


def _call(function: str, arguments: list[str]) -> str:
    return "\n".join([f"{function}(", *(f"        {x}," for x in arguments), "    )"])


def _backbone(model: Any, config: dict[str, Any]) -> list[str]:
    name, width, fpn = config["backbone"], config["width"], model.backbone.fpn
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
            of = f"{block}, {8 * 2**stage}, {blocks}, stride={min(stage, 2)}"
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
        builder = TORCHVISION_NAMES.get(name, name)
        lines.append(f"body = torchvision.models.{builder}(weights=None, norm_layer=norm)")
    if not config["stem_pool"]:
        lines.append("body.maxpool = nn.Identity()")
    channels = [block[-1].in_channels for block in fpn.inner_blocks]
    last = type(fpn.extra_blocks).__name__ + (f"({width}, {width})" if len(channels) == 3 else "()")
    lines += [
        "backbone = detection.backbone_utils.BackboneWithFPN(",
        f"    body, {dict(model.backbone.body.return_layers)}, {channels}, {width},",
        f"    torchvision.ops.feature_pyramid_network.{last},",
        ")",
    ]
    if name == "swin_t":  # its maps are [B, h, w, C]
        lines += [
            "inner = backbone.fpn.inner_blocks",
            f"for i, channels in enumerate({channels}):",
            '    before = {"norm": nn.LayerNorm(channels)}',
            '    before["permute"] = torchvision.ops.Permute([0, 3, 1, 2])',
            '    inner[i] = nn.Sequential(OrderedDict({**before, "0": inner[i][0]}))',
        ]
    return lines
