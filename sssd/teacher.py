"""LGD's label-guided teacher (AAAI 2022, section 3), which SSSD keeps unchanged.

It turns the student's pyramid and the ground truth into a pyramid of the same shapes, in five
stages: label encoder, appearance encoder, inter-object relation, intra-object mapping, refinement.

In the shapes below B is the number of images, M the largest number of objects in an image (others
are padded), P the number of levels, C the pyramid's width, K the number of classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .losses import normalise


def inside(boxes: Tensor, size: tuple[int, int], level: tuple[int, int]) -> Tensor:
    """Which pixels of a pyramid level lie in each box.

    Args:
        boxes: [..., 4] as x1, y1, x2, y2 in pixels of the padded batch.
        size: height H and width W of the padded batch in pixels.
        level: height h and width w of the level.

    Returns:
        bool [..., h, w]: pixel (x, y) is inside if |x − cx| ≤ bw/2 and |y − cy| ≤ bh/2, with the
        box scaled by (w/W, h/H).
    """
    (H, W), (h, w) = size, level
    x1, y1, x2, y2 = (boxes * boxes.new_tensor([w / W, h / H] * 2)).unbind(-1)
    x = torch.arange(w, device=boxes.device, dtype=boxes.dtype)
    y = torch.arange(h, device=boxes.device, dtype=boxes.dtype)
    in_x = (x - ((x1 + x2) / 2)[..., None]).abs() <= ((x2 - x1) / 2)[..., None]
    in_y = (y - ((y1 + y2) / 2)[..., None]).abs() <= ((y2 - y1) / 2)[..., None]
    return in_y[..., :, None] & in_x[..., None, :]


class Objects(NamedTuple):
    """The objects of a batch, padded to the largest number M in an image."""

    boxes: Tensor
    """[B, M, 4]: x1, y1, x2, y2 in pixels of the padded batch."""
    descriptors: Tensor
    """[B, M, 4 + K]: box and one-hot class, scaled to [−1, 1]."""
    valid: Tensor
    """bool [B, M]: False for padding."""
    context: Tensor
    """bool [B, M]: the object that stands for the whole image, and is not drawn as a box."""

    def masks(
        self,
        size: tuple[int, int],
        level: tuple[int, int],
        segmented: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """[B, M, h, w]: 1 where a pixel of the level lies in the object's box, else 0.

        If ``segmented`` has masks for an image, [T, H', W'] in its own pixels, they replace its
        boxes; again pixel (x, y) of a level is the point (x·W/w, y·H/h). A context object has no
        mask and keeps its box; a dummy that is not the context object, too, then has no pixel.
        """
        masks = inside(self.boxes, size, level) & self.valid[..., None, None]
        for b, image_masks in enumerate(segmented or ()):
            if image_masks is not None:
                y, x = (torch.arange(n) * full // n for n, full in zip(level, size, strict=True))
                masks[b] &= self.context[b, :, None, None]
                rows, columns = y[y < image_masks.shape[1]], x[x < image_masks.shape[2]]
                seen = image_masks[:, rows[:, None], columns] > 0
                masks[b, : len(seen), : len(rows), : len(columns)] = seen
        return masks.to(self.boxes.dtype)


@torch.no_grad()
def describe(
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    num_classes: int,
    size: tuple[int, int],
    context: bool,
) -> Objects:
    """The label descriptors of a batch (LGD, section 3; context and dummy: its release).

    An image without objects gets a dummy object: a box of one pixel, no class. With ``context``,
    an image with objects gets a context object: the whole image as its box, no class. In an image
    without objects the dummy is then the context object, too, and keeps its box of one pixel.

    Args:
        boxes: for each image [T, 4] as x1, y1, x2, y2 in pixels of the padded batch; T may be 0.
        labels: for each image [T], classes counted from 0.
        num_classes: K.
        size: height H and width W of the padded batch in pixels.
        context: add the context object.
    """
    H, W = size
    all_boxes, classes, is_context = [], [], []
    for image_boxes, image_labels in zip(boxes, labels, strict=True):
        one_hot = F.one_hot(image_labels, num_classes).to(image_boxes.dtype)
        if context or len(image_boxes) == 0:
            extra = [0, 0, W, H] if len(image_boxes) else [0, 0, 1, 1]
            image_boxes = torch.cat([image_boxes, image_boxes.new_tensor([extra])])
            one_hot = F.pad(one_hot, (0, 0, 0, 1))  # no class
        all_boxes.append(image_boxes)
        classes.append(one_hot)
        n = len(image_boxes)
        is_context.append((torch.arange(n, device=image_boxes.device) == n - 1) & context)
    valid = pad_sequence([torch.ones_like(x) for x in is_context], batch_first=True)
    padded = pad_sequence(all_boxes, batch_first=True)
    sides = padded.new_tensor([W, H] * 2)
    relative = padded.clamp(min=torch.zeros_like(sides), max=sides - 1) / sides
    one_hot = pad_sequence(classes, batch_first=True)
    descriptors = torch.cat([relative, one_hot], dim=-1) * 2 - 1
    return Objects(padded, descriptors, valid, pad_sequence(is_context, batch_first=True))


class LinearNormReLU(nn.Module):
    """Linear layer, LayerNorm without affine parameters, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return F.layer_norm(x, x.shape[-1:]).relu()


class STN(nn.Module):
    """PointNet's T-Net, which LGD calls STN(k): it predicts a k × k matrix for each vector.

    The vector is multiplied by its matrix. Unlike PointNet's, the matrix has no identity added.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        sizes = (k, 64, 128, 1024, 512, 256)
        blocks = [LinearNormReLU(a, b) for a, b in pairwise(sizes)]
        self.layers = nn.Sequential(*blocks, nn.Linear(256, k * k))

    def forward(self, x: Tensor) -> Tensor:
        """[..., k] → [..., k]."""
        k = x.shape[-1]
        matrix = self.layers(x).unflatten(-1, (k, k))  # [..., k, k]
        return (x.unsqueeze(-2) @ matrix).squeeze(-2)


class LabelEncoder(nn.Module):
    """A PointNet in which the objects of an image are the points (LGD, section 3)."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.stn_input = STN(4 + num_classes)
        self.lift = LinearNormReLU(4 + num_classes, 64)
        self.stn_features = STN(64)
        self.image = nn.Sequential(LinearNormReLU(64, 128), LinearNormReLU(128, 1024))
        self.fuse = LinearNormReLU(64 + 1024, width)

    def forward(self, descriptors: Tensor, valid: Tensor) -> Tensor:
        """Descriptors [B, M, 4 + K] → label embeddings [B, M, C]; ``valid`` is bool [B, M]."""
        x = self.stn_input(descriptors)  # [B, M, 4 + K]
        x = self.stn_features(self.lift(x))  # [B, M, 64]
        image = self.image(x).masked_fill(~valid[..., None], -torch.inf)  # [B, M, 1024]
        image = image.amax(dim=1, keepdim=True).expand(-1, x.shape[1], -1)  # equal for all M
        return self.fuse(torch.cat([x, image], dim=-1))  # [B, M, C]


def draw(vectors: Tensor, masks: Tensor, convolution: nn.Conv2d) -> Tensor:
    """A 3 × 3 convolution of the map in which each object's vector fills its box.

    Vectors [B, M, C] and masks [B, M, h, w] → [B, C, h, w]. The map is the sum of mask × vector
    over the objects, so it has rank M. The nine taps of the convolution can therefore be applied to
    vectors and masks separately, at M / C of the convolution's cost.
    """
    if 9 * masks.shape[1] > vectors.shape[2]:  # with so many objects that would cost no less
        return convolution(torch.einsum("bmc,bmhw->bchw", vectors, masks))
    taps = torch.einsum("bmc,ockl->bomkl", vectors, convolution.weight).flatten(2)  # [B, C, 9·M]
    shifted = F.unfold(masks, 3, padding=1)  # [B, 9·M, h·w], nine shifts of each mask
    assert convolution.bias is not None
    return (taps @ shifted).unflatten(2, masks.shape[2:]) + convolution.bias[:, None, None]


class LabelGuidedTeacher(nn.Module):
    """Student pyramid and labels → label-annotated pyramid; all levels share all weights.

    Args:
        num_classes: K, the foreground classes.
        width: C, the pyramid's width.
        heads: number of heads of the attention between the objects of an image.
        context: add the context object, which stands for the whole image.
        detach_appearance: stop the gradient between student and appearance encoder.

    Raises:
        ValueError: ``width`` is not a multiple of ``heads``, or there is no class.
    """

    def __init__(
        self,
        num_classes: int,
        width: int,
        heads: int = 8,
        context: bool = False,
        detach_appearance: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width: {width}; expected a multiple of the {heads} heads")
        if num_classes < 1:
            raise ValueError(f"num_classes: {num_classes}; expected at least 1")
        self.num_classes, self.context = num_classes, context
        self.detach_appearance = detach_appearance
        self.label_encoder = LabelEncoder(num_classes, width)
        self.appearance_conv = nn.Conv2d(width, width, 3, padding=1)
        self.relation_embed = LinearNormReLU(width, width)
        self.relation_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mapping_object = nn.Linear(width, width)
        self.mapping_conv = nn.Conv2d(width, width, 3, padding=1)
        if context:
            self.mapping_context = nn.Linear(width, width)
        self.refinement_convs = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1) for _ in range(3)
        )

    norm = staticmethod(normalise)
    """The normalisation of both pyramids before the distance."""

    def forward(
        self,
        features: Sequence[Tensor],
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        size: tuple[int, int],
        masks: Sequence[Tensor | None] | None = None,
    ) -> list[Tensor]:
        """The label-annotated pyramid.

        Args:
            features: the student's levels [B, C, h_p, w_p].
            boxes, labels, size: as in `describe`.
            masks: for each image None, or [T, H', W'] of its pixels before padding, not 0 where the
                object is: these are painted in place of the boxes.

        Returns:
            levels of the same shapes as ``features``.
        """
        objects = describe(boxes, labels, self.num_classes, size, self.context)
        covers = [
            objects.masks(size, (x.shape[2], x.shape[3]), masks) for x in features
        ]  # [B, M, h_p, w_p]

        embeddings = self.label_encoder(objects.descriptors, objects.valid)  # [B, M, C]
        appearances = self.appearance_encoder(features, covers)  # [B, P·M, C]
        related = self.inter_object_relation(appearances, embeddings, objects.valid)  # [B, P·M, C]
        maps = self.intra_object_mapping(related, covers, objects.context)  # P × [B, C, h_p, w_p]
        return [self.refinement(x) for x in maps]  # P × [B, C, h_p, w_p]

    def appearance_encoder(self, features: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """The mean over each object's pixels, by level: P × [B, C, h_p, w_p] → [B, P·M, C]."""
        appearances = []
        for level, mask in zip(features, masks, strict=True):
            seen = self.appearance_conv(level.detach() if self.detach_appearance else level)
            seen = F.group_norm(seen, 1).relu().flatten(2)  # [B, C, h·w]
            pixels = mask.flatten(2)  # [B, M, h·w]
            # The sum over the pixels of P2 exceeds float16, and even their number does.
            with torch.autocast(level.device.type, enabled=False):
                total = pixels @ seen.to(pixels.dtype).mT  # [B, M, C]
                appearances.append(total / pixels.sum(-1, keepdim=True).clamp(min=1))
        return torch.cat(appearances, dim=1)

    def inter_object_relation(
        self, appearances: Tensor, embeddings: Tensor, valid: Tensor
    ) -> Tensor:
        """Each appearance [B, P·M, C] attends to the label embeddings [B, M, C] of its image.

        Queries do not see each other, so that one call serves those of all levels.
        """
        keys = self.relation_embed(embeddings)  # [B, M, C]
        related, _ = self.relation_attention(
            appearances, keys, keys, key_padding_mask=~valid, need_weights=False
        )
        return related  # [B, P·M, C]

    def intra_object_mapping(
        self, related: Tensor, masks: Sequence[Tensor], context: Tensor
    ) -> list[Tensor]:
        """Add each object's vector to all pixels in its box: [B, P·M, C] → P × [B, C, h_p, w_p].

        The context object's vector is added to every pixel of the image.
        """
        objects = context.shape[1]  # M
        attended = related.split(objects, dim=1)  # P × [B, M, C]
        vectors = self.mapping_object(related).split(objects, dim=1)  # P × [B, M, C]
        maps = []
        for seen, vector, mask in zip(attended, vectors, masks, strict=True):
            drawn = (mask * ~context[..., None, None]).to(vector.dtype)  # [B, M, h, w]
            x = draw(vector, drawn, self.mapping_conv)  # [B, C, h, w]
            if self.context:
                whole = self.mapping_context(seen) * context[..., None]  # [B, M, C]
                x = x + whole.sum(dim=1)[..., None, None]
            maps.append(x.relu())
        return maps

    def refinement(self, x: Tensor) -> Tensor:
        """Three convolutions, GroupNorm after each, ReLU between them: [B, C, h, w] → the same."""
        for i, convolution in enumerate(self.refinement_convs):
            x = F.group_norm(convolution(x.relu() if i else x), 1)
        return x
