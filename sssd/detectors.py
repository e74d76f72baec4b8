"""torchvision's detectors, split at the feature pyramid.

A detector is a pyramid and a head: ``features = backbone(images)``, ``losses = head(features,
targets)``. Student and teacher share the head, so the distiller needs nothing else. `FAMILIES` has
one `Family` for each supported kind of detector; no other module depends on the kind. Mask and
Keypoint R-CNN are Faster R-CNNs with an additional part in the head.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.ops import FrozenBatchNorm2d, Permute
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from .roi_align import RoIAlign

Pyramid = OrderedDict[str, Tensor]
Targets = list[dict[str, Tensor]]
STAGES = ("conv1", "layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True)
class Family:
    """What the distiller needs to know of a detector family."""

    head: Callable[[Any, ImageList, Pyramid, Targets], dict[str, Tensor]]
    """Detection losses of a pyramid: (detector, images, features, targets) -> losses."""
    num_labels: Callable[[Any], int]
    """Number of labels that the head can predict, from ``first_label`` on."""
    first_label: int
    """The lowest label that the head can predict: 1 where 0 is the background."""
    context: bool
    """LGD's choice for this family: use a context object."""
    detach_appearance: bool
    """LGD's choice for this family: stop the gradient before the appearance encoder."""


def _faster_rcnn_head(
    model: FasterRCNN, images: ImageList, features: Pyramid, targets: Targets
) -> dict[str, Tensor]:
    proposals, rpn_losses = model.rpn(images, features, targets)
    _, box_losses = model.roi_heads(features, proposals, images.image_sizes, targets)
    return {**box_losses, **rpn_losses}


def _retinanet_head(
    model: RetinaNet, images: ImageList, features: Pyramid, targets: Targets
) -> dict[str, Tensor]:
    levels = list(features.values())
    return model.compute_loss(targets, model.head(levels), model.anchor_generator(images, levels))


def _fcos_head(
    model: FCOS, images: ImageList, features: Pyramid, targets: Targets
) -> dict[str, Tensor]:
    levels = list(features.values())
    anchors = model.anchor_generator(images, levels)
    sizes = [level.shape[2] * level.shape[3] for level in levels]
    return model.compute_loss(targets, model.head(levels), anchors, sizes)


def _box_predictor_labels(model: FasterRCNN) -> int:
    return model.roi_heads.box_predictor.cls_score.out_features - 1


def _classification_head_labels(model: RetinaNet | FCOS) -> int:
    return model.head.classification_head.num_classes


# Context and detached appearance: the settings of LGD's release for each detector.
FAMILIES: dict[type[nn.Module], Family] = {
    FasterRCNN: Family(
        _faster_rcnn_head,
        _box_predictor_labels,
        first_label=1,
        context=False,
        detach_appearance=True,
    ),
    RetinaNet: Family(
        _retinanet_head,
        _classification_head_labels,
        first_label=0,
        context=True,
        detach_appearance=False,
    ),
    FCOS: Family(
        _fcos_head,
        _classification_head_labels,
        first_label=0,
        context=False,
        detach_appearance=False,
    ),
}


def family_of(model: nn.Module) -> Family:
    """The `Family` of a torchvision detector.

    Raises:
        ValueError: the model belongs to no supported family, or its box predictor is not
            torchvision's ``FastRCNNPredictor``, so that its classes cannot be counted.
    """
    for kind, family in FAMILIES.items():
        if isinstance(model, kind) and hasattr(model.backbone, "out_channels"):
            try:
                family.num_labels(model)
            except AttributeError as error:
                raise ValueError(
                    f"student: the classes of this {kind.__name__} cannot be counted "
                    f"({error}); its predictor must have torchvision's attributes"
                ) from error
            return family
    names = ", ".join(f"torchvision.models.detection.{kind.__name__}" for kind in FAMILIES)
    raise ValueError(
        f"student: {type(model).__name__} cannot be split into pyramid and head; "
        f"expected an instance of {names}"
    )


def target_fields(model: nn.Module) -> tuple[str, ...]:
    """The fields that a target of this detector must have."""
    masks = ("masks",) if isinstance(model, MaskRCNN) else ()
    keypoints = ("keypoints",) if isinstance(model, KeypointRCNN) else ()
    return ("boxes", "labels", *masks, *keypoints)


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Norm layers use the statistics of their batch, and do not update their running statistics."""
    norms: list[Any] = [m for m in model.modules() if getattr(m, "track_running_stats", False)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@contextmanager
def frozen_backbone(model: Any) -> Iterator[None]:
    """The backbone below the pyramid computes no gradients, which saves their cost.

    This is LGD's schedule until ``unfreeze_backbone``. The backbone is called as a whole, so that
    its forward and its hooks run as usual. If its forward is not torchvision's
    ``BackboneWithFPN.forward``, the whole backbone counts as being below the pyramid.
    """
    split = type(model.backbone).forward is BackboneWithFPN.forward
    below = model.backbone.body if split else model.backbone
    enabled = torch.is_grad_enabled()

    def stop(*_: Any) -> None:
        torch.set_grad_enabled(False)

    def resume(*_: Any) -> None:
        torch.set_grad_enabled(enabled)

    hooks = [below.register_forward_pre_hook(stop), below.register_forward_hook(resume)]
    try:
        yield
    finally:
        torch.set_grad_enabled(enabled)
        for hook in hooks:
            hook.remove()


@contextmanager
def observed(module: nn.Module) -> Iterator[list[Any]]:
    """Collect what each call of a module returns."""
    outputs: list[Any] = []
    hook = module.register_forward_hook(lambda *call: outputs.append(call[-1]))
    try:
        yield outputs
    finally:
        hook.remove()


def levels_of(features: Any) -> Pyramid:
    """The output of a backbone as levels [B, C, h_p, w_p], finest first."""
    return OrderedDict([("0", features)]) if isinstance(features, Tensor) else features


SLIM = {"slim18": (2, 2, 2, 2), "slim34": (3, 4, 6, 3)}
"""Blocks in each stage, as in ResNet-18 and 34; with a quarter of their channels: 16 to 128."""
TORCHVISION_NAMES = {"resnext101": "resnext101_32x8d"}
"""Backbones that torchvision has under another name. LGD uses this one of torchvision's two
ResNeXt-101, there with deformable convolutions; its first ImageNet weights (V1) were trained like
ResNet-101's."""


def classifier(name: str, trained_norm: bool = False, stem_pool: bool = True) -> nn.Module:
    """torchvision's image classifier without weights, or one of `SLIM`.

    Args:
        name: ``resnet18``, ``resnet34``, ``resnet50``, ``resnet101``, ``resnext101``, ``slim18``,
            ``slim34`` or ``swin_t``.
        trained_norm: batch norm learns and updates its statistics; otherwise it is frozen. Swin-T
            has layer norm, which always learns.
        stem_pool: keep the max-pooling after the first convolution. Without it the strides of the
            stages are halved: 2, 4, 8, 16. Swin-T has no such pooling.
    """
    if name == "swin_t":
        return torchvision.models.swin_t(weights=None)
    norm = nn.BatchNorm2d if trained_norm else FrozenBatchNorm2d
    if name in SLIM:
        body = ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=norm)
        body.inplanes = 16  # torchvision's own is fixed at 64
        body.conv1 = nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False)
        body.bn1 = norm(16)
        for stage, blocks in enumerate(SLIM[name], start=1):
            layer = body._make_layer(BasicBlock, 8 * 2**stage, blocks, 1 if stage == 1 else 2)
            setattr(body, f"layer{stage}", layer)
        body.fc = nn.Linear(128, body.fc.out_features)
    else:
        body = getattr(torchvision.models, TORCHVISION_NAMES.get(name, name))(norm_layer=norm)
    if not stem_pool:
        body.maxpool = nn.Identity()
    return body


def check_backbone(name: str, trained_norm: bool, stem_pool: bool) -> None:
    """Refuse the options of `classifier` that Swin-T does not have."""
    if name == "swin_t" and trained_norm:
        raise ValueError("trained_norm: True; expected False, as swin_t has no batch norm")
    if name == "swin_t" and not stem_pool:
        raise ValueError("stem_pool: False; expected True, as swin_t has no pooling in its stem")


def has_stem_pool(body: nn.Module) -> bool:
    """Whether a ResNet has its max-pooling, see `classifier`."""
    return not isinstance(getattr(body, "maxpool", None), nn.Identity)


def fpn_backbone(body: Any, width: int, stages: tuple[int, ...], extra: Any) -> BackboneWithFPN:
    """An FPN of ``width`` channels on the ``stages`` (of 1 to 4, finest first) of a classifier.

    With a ResNet at width 256 the state has the names and shapes of torchvision's own builders.
    Swin-T's stages get a ResNet's names. Its stage s returns [B, h, w, 48·2^s], so a layer norm
    (as in Swin's own detectors) and a permutation precede the FPN's 1 × 1 convolutions.
    """
    swin = isinstance(body, SwinTransformer)
    last = body.norm.normalized_shape[0] if swin else body.inplanes  # channels of stage 4
    channels = [last // 2 ** (4 - s) for s in stages]
    if swin:
        f = body.features  # patch embedding and stage 1; later stages begin with patch merging
        parts = (f[:1], f[1:2], f[2:4], f[4:6], f[6:])
        body = nn.Sequential(OrderedDict(zip(STAGES, parts, strict=True)))
    backbone = BackboneWithFPN(
        body,
        return_layers={f"layer{s}": str(i) for i, s in enumerate(stages)},
        in_channels_list=channels,
        out_channels=width,
        extra_blocks=extra,
    )
    if swin:
        inner: Any = backbone.fpn.inner_blocks
        for i, n in enumerate(channels):
            before = {"norm": nn.LayerNorm(n), "permute": Permute([0, 3, 1, 2])}
            inner[i] = nn.Sequential(OrderedDict({**before, "0": inner[i][0]}))
    return backbone


def freeze_stages(model: Any, trainable: int) -> None:
    """Freeze all but the last ``trainable`` (0–5) of the stem and the four stages."""
    if not 0 <= trainable <= len(STAGES):
        raise ValueError(f"trainable: {trainable}; expected 0 to {len(STAGES)}")
    frozen = STAGES[: len(STAGES) - trainable]
    if frozen:
        frozen += ("bn1",)  # the batch norm of the stem
    for name, parameter in model.backbone.body.named_parameters():
        if name.startswith(frozen):
            parameter.requires_grad_(False)


@torch.no_grad()
def _rescale_first_weights(head: nn.Module, width: int) -> None:
    """Scale a head's initial convolutions so that the signal keeps its size at every width.

    torchvision initialises them from N(0, 0.01²), which suits 256 channels; with fewer the signal
    shrinks in each layer by √(width / 256). At width 256 nothing changes.
    """
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            module.weight *= (256 / width) ** 0.5


def build_detector(
    detector: str,
    backbone: str,
    num_classes: int,
    *,
    width: int = 256,
    min_sizes: tuple[int, ...] = (800,),
    max_size: int = 1333,
    scale: float = 1.0,
    proposals: int = 2000,
    roi_samples: int = 512,
    trained_norm: bool = False,
    stem_pool: bool = True,
) -> nn.Module:
    """A stock torchvision detector, by name.

    Args:
        detector: ``faster_rcnn`` (P2–P6), ``retinanet`` or ``fcos`` (P3–P7).
        backbone, trained_norm, stem_pool: see `classifier`. Without the pooling an RoI of the same
            size is read from the same level, which then has half the stride.
        num_classes: foreground classes; labels are 1 to ``num_classes`` in every family, as in
            torchvision's reference, where 0 is the background (an unused channel in RetinaNet and
            FCOS, which have no background).
        width: pyramid width C. At 256 everything is torchvision's own; at fewer channels the heads'
            initial weights are larger, and RetinaNet's head has group norm.
        min_sizes: shorter sides in pixels, drawn from in training; tests use the last one.
        max_size: longest side in pixels.
        scale: every length in pixels that is built into the detector (anchors, the sizes of RoIs
            for each level, FCOS's ranges) ÷ torchvision's, which suit images of 800 pixels.
        proposals: Faster R-CNN's proposals per image in training; half as many in tests.
        roi_samples: Faster R-CNN's RoIs per image that the box head is trained on.
    """
    size = {"min_size": min_sizes, "max_size": max_size}
    check_backbone(backbone, trained_norm, stem_pool)
    body = classifier(backbone, trained_norm, stem_pool)
    if detector == "faster_rcnn":
        return _faster_rcnn(body, num_classes, width, scale, proposals, roi_samples, size)
    if detector == "retinanet":
        return _retinanet(body, num_classes, width, scale, size)
    if detector == "fcos":
        return _fcos(body, num_classes, width, scale, size)
    raise ValueError(f"detector: {detector!r} is unknown; expected faster_rcnn, retinanet or fcos")


def _faster_rcnn(
    body: nn.Module,
    num_classes: int,
    width: int,
    scale: float,
    proposals: int,
    roi_samples: int,
    size: dict[str, Any],
) -> FasterRCNN:
    fc = 4 * width  # torchvision's 1024 at width 256
    sizes = tuple((side * scale,) for side in (32, 64, 128, 256, 512))
    side = 224 * scale
    model = FasterRCNN(
        fpn_backbone(body, width, (1, 2, 3, 4), LastLevelMaxPool()),
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5),
        rpn_pre_nms_top_n_train=proposals,
        rpn_post_nms_top_n_train=proposals,
        rpn_pre_nms_top_n_test=proposals // 2,
        rpn_post_nms_top_n_test=proposals // 2,
        box_batch_size_per_image=roi_samples,
        box_roi_pool=RoIAlign(
            ["0", "1", "2", "3"],
            output_size=7,
            sampling_ratio=2,
            canonical_scale=int(side) if side == int(side) else side,  # TorchScript needs an int
            # Without the stem's pooling an RoI stays on its level, which has half the stride.
            canonical_level=4 if has_stem_pool(body) else 3,
        ),
        box_head=TwoMLPHead(width * 7 * 7, fc),
        box_predictor=FastRCNNPredictor(fc, num_classes + 1),
        **size,
    )
    _rescale_first_weights(model.rpn.head, width)
    return model


def _retinanet(
    body: nn.Module, num_classes: int, width: int, scale: float, size: dict[str, Any]
) -> RetinaNet:
    backbone = fpn_backbone(body, width, (2, 3, 4), LastLevelP6P7(width, width))
    octave = tuple(
        tuple(int(side * 2 ** (i / 3)) * scale for i in range(3))
        for side in (32, 64, 128, 256, 512)
    )
    anchors = AnchorGenerator(octave, ((0.5, 1.0, 2.0),) * 5)
    boxes = anchors.num_anchors_per_location()[0]
    # Narrow heads are for short trainings. They learn to place boxes there only with group norm,
    # which FCOS's head has, and torchvision's second version of RetinaNet's head.
    norm = partial(nn.GroupNorm, width // 8) if width < 256 else None
    head = RetinaNetHead(width, boxes, num_classes + 1, norm_layer=norm)
    _rescale_first_weights(head, width)
    return RetinaNet(
        backbone,
        num_classes + 1,
        anchor_generator=anchors,
        head=head,
        detections_per_img=100,  # as COCO's AP counts, and as the other two detectors give
        **size,
    )


def _fcos(
    body: nn.Module, num_classes: int, width: int, scale: float, size: dict[str, Any]
) -> FCOS:
    backbone = fpn_backbone(body, width, (2, 3, 4), LastLevelP6P7(width, width))
    strides = tuple((stride * scale,) for stride in (8, 16, 32, 64, 128))
    # torchvision's group norm has 32 groups: at width 256 these are groups of 8 channels, which
    # are possible at any width.
    norm = partial(nn.GroupNorm, width // 8)
    head = FCOSHead(32, 1, num_classes + 1)  # it takes no other norm: its parts are replaced
    head.classification_head = FCOSClassificationHead(width, 1, num_classes + 1, norm_layer=norm)
    head.regression_head = FCOSRegressionHead(width, 1, norm_layer=norm)
    _rescale_first_weights(head, width)
    return FCOS(
        backbone,
        num_classes + 1,
        head=head,
        anchor_generator=AnchorGenerator(strides, ((1.0,),) * 5),
        # The radius is in sides of an anchor: this is 1.5 strides at every scale, with any stem.
        center_sampling_radius=(1.5 if has_stem_pool(body) else 0.75) / scale,
        # torchvision's 0.2 cuts the precision-recall curve short; the others have 0.05.
        score_thresh=0.05,
        **size,
    )
