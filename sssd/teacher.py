"""The label-guided teacher (LGD, section 3; method.md, section 2).

It takes the student's pyramid and the ground truth and gives a label-annotated pyramid of the same
shapes: encode the labels, look up each object's appearance, let the objects of an image attend to
each other, render them back into maps, refine.

Objects are padded to the most of any image of the batch, [B, M, …]: one batched matrix product then
pools all objects of a level, and another one renders them; no map of an object of its own is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .losses import normalise


def inside(boxes: Tensor, size: tuple[int, int], level: tuple[int, int]) -> Tensor:
    """Which pixels of a pyramid level lie in each box.

    Args:
        boxes: [..., 4] as x1, y1, x2, y2 in pixels of the padded batch.
        size: height and width of the padded batch.
        level: height h and width w of the level.

    Returns:
        bool [..., h, w]: pixel (x, y) is inside if |x − cx| ≤ bw/2 and |y − cy| ≤ bh/2, with the
        box scaled by (w/W, h/H).
    """
    (height, width), (h, w) = size, level
    x1, y1, x2, y2 = (boxes * boxes.new_tensor([w / width, h / height] * 2)).unbind(-1)
    x = torch.arange(w, device=boxes.device, dtype=boxes.dtype)
    y = torch.arange(h, device=boxes.device, dtype=boxes.dtype)
    in_x = (x - ((x1 + x2) / 2)[..., None]).abs() <= ((x2 - x1) / 2)[..., None]
    in_y = (y - ((y1 + y2) / 2)[..., None]).abs() <= ((y2 - y1) / 2)[..., None]
    return in_y[..., :, None] & in_x[..., None, :]


class Block(nn.Module):
    """Linear layer, LayerNorm without affine parameters, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return F.layer_norm(x, x.shape[-1:]).relu()


class Transformer(nn.Module):
    """STN(k): a k × k matrix predicted from each vector and applied to it; no identity is added."""

    def __init__(self, k: int) -> None:
        super().__init__()
        widths = (k, 64, 128, 1024, 512, 256)
        blocks = [Block(a, b) for a, b in pairwise(widths)]
        self.layers = nn.Sequential(*blocks, nn.Linear(256, k * k))

    def forward(self, x: Tensor) -> Tensor:
        """[..., k] → [..., k]."""
        k = x.shape[-1]
        return (x.unsqueeze(-2) @ self.layers(x).unflatten(-1, (k, k))).squeeze(-2)


class LabelEncoder(nn.Module):
    """A PointNet over the objects of an image: descriptors [B, M, 4 + K] → embeddings [B, M, C]."""

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.align = Transformer(4 + num_classes)
        self.lift = Block(4 + num_classes, 64)
        self.align_features = Transformer(64)
        self.image = nn.Sequential(Block(64, 128), Block(128, 1024))
        self.fuse = Block(64 + 1024, channels)

    def forward(self, descriptors: Tensor, valid: Tensor) -> Tensor:
        h = self.align_features(self.lift(self.align(descriptors)))
        image = self.image(h).masked_fill(~valid[..., None], -torch.inf).amax(dim=1, keepdim=True)
        return self.fuse(torch.cat([h, image.expand(-1, h.shape[1], -1)], dim=-1))


class LabelGuidedTeacher(nn.Module):
    """Student pyramid and labels → label-annotated pyramid; all weights shared across levels.

    Args:
        num_classes: K, the foreground classes.
        channels: C, the pyramid width.
        heads: of the attention between the objects of an image.
        context: add the whole image as one more object where an image has objects.
        detach_appearance: stop the gradient between student and appearance encoder.

    Raises:
        ValueError: ``channels`` is not a multiple of ``heads``, or there is no class.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        heads: int = 8,
        context: bool = False,
        detach_appearance: bool = False,
    ) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"channels: {channels}; expected a multiple of the {heads} heads")
        if num_classes < 1:
            raise ValueError(f"num_classes: {num_classes}; expected at least 1")
        self.num_classes, self.context = num_classes, context
        self.detach_appearance = detach_appearance
        self.encode = LabelEncoder(num_classes, channels)
        self.appearance = nn.Conv2d(channels, channels, 3, padding=1)
        self.relate = Block(channels, channels)
        self.attend = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.render = nn.Linear(channels, channels)
        self.spread = nn.Conv2d(channels, channels, 3, padding=1)
        if context:
            self.surround = nn.Linear(channels, channels)
        self.refine = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))

    norm = staticmethod(normalise)
    """What both pyramids pass through before the distance."""

    def forward(
        self,
        features: Sequence[Tensor],
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        size: tuple[int, int],
    ) -> list[Tensor]:
        """The label-annotated pyramid.

        Args:
            features: the student's levels [B, C, h_p, w_p].
            boxes: for each image [T, 4] as x1, y1, x2, y2 in pixels of the padded batch; T may be 0.
            labels: for each image [T], classes counted from 0.
            size: height and width of the padded batch in pixels.

        Returns:
            levels of the same shapes as ``features``.
        """
        all_boxes, descriptors, valid, around = self.describe(boxes, labels, size)
        embeddings = self.relate(self.encode(descriptors, valid))
        masks, appearances = [], []
        for level in features:
            seen = level.detach() if self.detach_appearance else level
            seen = F.group_norm(self.appearance(seen), 1).relu().flatten(2)
            mask = (
                inside(all_boxes, size, (level.shape[2], level.shape[3])) & valid[..., None, None]
            )
            mask = mask.flatten(2).to(all_boxes.dtype)
            # A sum over the pixels of P2 exceeds float16, and even their number does.
            with torch.autocast(level.device.type, enabled=False):
                total = mask @ seen.to(mask.dtype).mT
                appearances.append(total / mask.sum(-1, keepdim=True).clamp(min=1))
            masks.append(mask)
        # One attention for all levels: queries do not see each other, so they need not be apart.
        attended, _ = self.attend(
            torch.cat(appearances, dim=1),
            embeddings,
            embeddings,
            key_padding_mask=~valid,
            need_weights=False,
        )
        drawn = self.render(attended)
        pyramid = []
        for p, (level, mask) in enumerate(zip(features, masks, strict=True)):
            own = slice(p * mask.shape[1], (p + 1) * mask.shape[1])
            objects = mask * ~around[..., None]
            x = (drawn[:, own].mT @ objects.to(drawn.dtype)).unflatten(2, level.shape[2:])
            x = self.spread(x)
            if self.context:
                whole = self.surround(attended[:, own]) * around[..., None]
                x = x + whole.sum(dim=1)[..., None, None]
            x = x.relu()
            for i, convolution in enumerate(self.refine):
                x = F.group_norm(convolution(x.relu() if i else x), 1)
            pyramid.append(x)
        return pyramid

    @torch.no_grad()
    def describe(
        self, boxes: Sequence[Tensor], labels: Sequence[Tensor], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes [B, M, 4], descriptors [B, M, 4 + K], which of the M are objects, which context."""
        height, width = size
        every, classes, around = [], [], []
        for own, kinds in zip(boxes, labels, strict=True):
            hot = F.one_hot(kinds, self.num_classes).to(own.dtype)
            extra = None
            if len(own) == 0:
                extra = own.new_tensor([[0, 0, 1, 1]])
            elif self.context:
                extra = own.new_tensor([[0, 0, width, height]])
            if extra is not None:
                own, hot = torch.cat([own, extra]), torch.cat([hot, hot.new_zeros(1, hot.shape[1])])
            every.append(own)
            classes.append(hot)
            last = torch.arange(len(own), device=own.device) == len(own) - 1
            around.append(last & (self.context and len(kinds) > 0))
        valid = pad_sequence([torch.ones_like(a) for a in around], batch_first=True)
        all_boxes = pad_sequence(every, batch_first=True)
        unit = all_boxes.new_tensor([width, height] * 2)
        relative = all_boxes.clamp(min=torch.zeros_like(unit), max=unit - 1) / unit
        hot = pad_sequence(classes, batch_first=True)
        descriptors = torch.cat([relative, hot], dim=-1) * 2 - 1
        return all_boxes, descriptors, valid, pad_sequence(around, batch_first=True)
