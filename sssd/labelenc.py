"""LabelEnc's label map and label encoding function (ECCV 2020, section 3).

The ground truth is painted as an image of K channels, and a CNN turns this image into a pyramid
shaped like the detector's. Stage 1 trains the CNN through the detector's head; stage 2 freezes it
and starts the detector's FPN from the CNN's.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork

from .detectors import STAGES, has_stem_pool
from .losses import wide


@torch.no_grad()
def label_map(
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    num_classes: int,
    size: tuple[int, int],
    colour: Tensor | None = None,
) -> Tensor:
    """The ground truth of a batch, painted as images with one channel per class.

    Pixel (x, y) is the point (x, y), as in `teacher.inside`: the sources do not say whether a
    pixel's corner or its centre is meant, and so a box has the same pixels in both methods.

    Args:
        boxes, labels, num_classes, size: as in `teacher.describe`.
        colour: factor of each object's values, for all objects of the batch in order, [ΣT];
            default 1. Stage 1 draws min(1, 2·U(0, 1)).

    Returns:
        [B, K, H, W]: 1 − max(|x − cx|/bw, |y − cy|/bh) inside a box, in the channel of its class
        (1 at the centre, ½ at the border); the largest where boxes overlap; 0 outside.
    """
    H, W = size
    image = boxes[0].new_zeros(len(boxes), num_classes, H, W)
    x = torch.arange(W, device=image.device, dtype=image.dtype)
    y = torch.arange(H, device=image.device, dtype=image.dtype)
    colours = (
        [1.0] * len(boxes) if colour is None else colour[:, None, None].split([*map(len, boxes)])
    )
    # Image by image: [ΣT, H, W] of a whole batch of photographs would be gigabytes.
    images = zip(image, boxes, labels, colours, strict=True)
    for painted, image_boxes, image_labels, factor in images:
        x1, y1, x2, y2 = image_boxes[:, :, None].unbind(1)
        across = (x - (x1 + x2) / 2).abs() / (x2 - x1)
        down = (y - (y1 + y2) / 2).abs() / (y2 - y1)
        off = torch.maximum(across[:, None, :], down[:, :, None])
        value = (1 - off).masked_fill(~(off <= 0.5), 0) * factor
        channel = image_labels[:, None, None].expand_as(value)
        painted.scatter_reduce_(0, channel, value, "amax")
    return image


class Bottleneck(nn.Module):
    """Residual 1×1, 3×3, 1×1 without normalisation; ``stride`` in the 3×3 and the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        inner = outputs // 4
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, inner, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, inner, 3, stride, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, outputs, 1),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return (self.branch(x) + self.shortcut(x)).relu()


class LabelEncodingFunction(nn.Module):
    """LabelEnc's teacher: the label map [B, K, H, W] → a pyramid of the detector's shapes.

    It is called like `teacher.LabelGuidedTeacher`, and uses only the labels. Its four stages have
    the strides of a ResNet's: 4, 8, 16 and 32, or without max-pooling 2, 4, 8 and 16. It has no
    normalisation layers.

    Args:
        num_classes: K.
        width: C, the pyramid width.
        stages: those that feed the FPN, (1, 2, 3, 4) for P2–P5 or (2, 3, 4) for P3–P5.
        extra_blocks: torchvision's block for the coarser levels, of the detector's kind. It is
            copied and initialised anew, so the detector's own may be given.
        stem_width: channels of the first convolution; the stages have 2, 4, 8 and 16 times as many.
            128 gives 256 to 2048, as in the paper and in ResNet-50 and 101; 32 gives 64 to 512, as
            in ResNet-18 and 34. If they agree with the detector's, stage 2 can start its FPN
            (``detector.backbone.fpn.load_state_dict(encoder.fpn.state_dict())``).
        stem_pool: whether the detector's ResNet has its max-pooling; without it strides are halved.
    """

    def __init__(
        self,
        num_classes: int,
        width: int,
        stages: tuple[int, ...],
        extra_blocks: ExtraFPNBlock,
        stem_width: int = 128,
        stem_pool: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes, self.fpn_stages = num_classes, stages
        self.noisy = False
        """Draw a colour noise for each object in training, min(1, 2·U(0, 1)), as stage 1 does."""
        first = nn.Conv2d(num_classes, stem_width, 7, 2, 3)
        self.stem = nn.Sequential(first, nn.ReLU(inplace=True))
        c1, c2, c3, c4 = (stem_width * 2**s for s in (1, 2, 3, 4))
        self.stages = nn.ModuleList(
            [
                nn.Sequential(Bottleneck(stem_width, c1, 2 if stem_pool else 1)),
                nn.Sequential(Bottleneck(c1, c2, 2), Bottleneck(c2, c2)),
                nn.Sequential(Bottleneck(c2, c3, 2), Bottleneck(c3, c3)),
                nn.Sequential(Bottleneck(c3, c4, 2)),
            ]
        )
        inputs = [(c1, c2, c3, c4)[s - 1] for s in stages]
        self.fpn = FeaturePyramidNetwork(inputs, width, copy.deepcopy(extra_blocks))
        # The source does not give the initialisation. These weights keep a signal's mean square:
        # gain √2 before a ReLU; gain 1 where branch and shortcut are added (that doubles the mean
        # square, and the ReLU halves it), and in the FPN as in torchvision.
        blocks = [module for module in self.modules() if isinstance(module, Bottleneck)]
        sums = (part for block in blocks for part in (block.branch[-1], block.shortcut))
        linear = {*self.fpn.modules(), *sums}
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                slope = 1 if module in linear else 0  # a leaky ReLU's: the identity, or a ReLU
                nn.init.kaiming_normal_(module.weight, slope)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Of the K channels of a point of the label map, one has a value: only its inputs count.
        nn.init.normal_(first.weight, std=(2 / 49) ** 0.5)

    @classmethod
    def like(cls, detector: Any, num_classes: int) -> LabelEncodingFunction:
        """The function whose pyramid has the levels, width and FPN of a detector's pyramid.

        Raises:
            ValueError: the detector's backbone is not torchvision's ResNet under its FPN.
        """
        backbone = detector.backbone
        layers = getattr(getattr(backbone, "body", None), "return_layers", {})
        stages = tuple(int(name[-1]) for name in layers if name in STAGES[1:])
        if not stages or len(stages) != len(layers):
            raise ValueError(
                f"student: a backbone of {type(backbone).__name__} whose stages are not those of a "
                "ResNet; LabelEnc needs torchvision's ResNet under its FPN"
            )
        deepest = backbone.fpn.inner_blocks[-1].get_submodule("0").in_channels
        return cls(
            num_classes,
            backbone.out_channels,
            stages,
            backbone.fpn.extra_blocks,
            stem_width=deepest // 2 ** stages[-1],
            stem_pool=has_stem_pool(backbone.body),
        )

    def forward(
        self,
        features: Sequence[Tensor],
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        size: tuple[int, int],
        masks: object = None,
    ) -> list[Tensor]:
        """The pyramid of a batch's labels, [B, C, h_p, w_p] per level, finest first.

        Arguments as in `teacher.LabelGuidedTeacher.forward`; ``features`` and ``masks`` are not
        used.
        """
        colour = None
        if self.noisy and self.training:
            colour = boxes[0].new_empty(sum(map(len, labels))).uniform_(0, 2).clamp(max=1)
        return self.encode(label_map(boxes, labels, self.num_classes, size, colour))

    @staticmethod
    def norm(level: Tensor) -> Tensor:
        """LayerNorm of a level [B, C, h, w] without affine parameters, in float32 or wider."""
        return F.group_norm(wide(level), 1)

    def encode(self, drawn: Tensor) -> list[Tensor]:
        """Label map [B, K, H, W] → levels [B, C, h_p, w_p], finest first."""
        x, features = self.stem(drawn), OrderedDict[str, Tensor]()
        for number, stage in enumerate(self.stages, start=1):
            x = stage(x)
            if number in self.fpn_stages:
                features[str(len(features))] = x
        return list(self.fpn(features).values())
