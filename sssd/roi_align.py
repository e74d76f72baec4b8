"""RoIAlign on small maps by matrix products: torchvision's values, faster to train on a CPU."""

# TorchScript reads the annotations: they must not become strings by an import from __future__.
import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import _filter_input, _multiscale_roi_align, _setup_scales

LARGEST_MAP = 80
"""Longest side of a map in pixels. On larger maps torchvision's code is faster: its cost does not
depend on their size."""


def axis_weights(low: Tensor, high: Tensor, pixels: int, bins: int, samples: int) -> Tensor:
    """The weight of each pixel in each bin along one axis: [R], [R] → [R, bins, pixels].

    A box from ``low`` to ``high``, in pixels of the map, has ``bins`` bins of ``samples`` samples.
    A bin is the mean of its samples, each interpolated between two pixels. So the weight of a pixel
    in a bin is the product of its weights along x and along y.
    """
    places = (torch.arange(bins * samples, dtype=low.dtype) + 0.5) / (bins * samples)
    at = low[:, None] + (high - low).clamp(min=1)[:, None] * places
    seen = (at >= -1) & (at <= pixels)
    distance = (at.clamp(0, pixels - 1)[..., None] - torch.arange(pixels, dtype=low.dtype)).abs()
    return ((1 - distance).clamp(min=0) * seen[..., None]).unflatten(1, (bins, samples)).mean(2)


class RoIAlign(MultiScaleRoIAlign):
    """torchvision's ``MultiScaleRoIAlign``, which trains faster on the small maps of a CPU.

    There matrix products compute it: in a step of 8 images of 64 pixels the backward pass takes a
    seventh of torchvision's time, and the forward pass as long. The values are torchvision's up to
    rounding, about 1e-5 for values of size 1. In evaluation, on large maps and on a GPU
    torchvision's own code runs. It has no weights, so a detector's state is the same with either.
    """

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Levels [B, C, h_p, w_p] and boxes [R, 4] of each image → [R of all, C, bins, bins]."""
        levels = _filter_input(x, self.featmap_names)
        if self.scales is None or self.map_levels is None:  # type: ignore[has-type]
            self.scales, self.map_levels = _setup_scales(
                levels, image_shapes, self.canonical_scale, self.canonical_level
            )
        if torch.jit.is_scripting() or not self._is_faster(levels):
            return _multiscale_roi_align(
                levels, boxes, self.output_size, self.sampling_ratio, self.scales, self.map_levels
            )
        return self._by_products(levels, boxes)

    @torch.jit.unused
    def _is_faster(self, levels: list[Tensor]) -> bool:
        """Whether matrix products are faster than torchvision's code."""
        learns = self.training and torch.is_grad_enabled()
        return learns and levels[0].is_cpu and max(levels[0].shape[2:]) <= LARGEST_MAP

    @torch.jit.unused
    def _by_products(self, levels: list[Tensor], boxes: list[Tensor]) -> Tensor:
        """The bins of all boxes, computed level by level and image by image."""
        place = self.map_levels(boxes) * len(boxes)  # [R of all]: level, then image
        place += torch.cat([torch.full((len(x),), i) for i, x in enumerate(boxes)])
        order = place.argsort(stable=True)
        counts = place.bincount(minlength=len(levels) * len(boxes)).view(len(levels), -1)
        sorted_boxes = torch.cat(boxes)[order].split(counts.sum(1).tolist())
        per_level = zip(levels, self.scales, sorted_boxes, counts.tolist(), strict=True)
        with torch.autocast("cpu", enabled=False):  # as torchvision's
            parts = [
                part
                for level, scale, level_boxes, per_image in per_level
                for part in self._of_level(level, level_boxes * scale, per_image)
            ]
        return torch.cat(parts)[order.argsort()]

    def _of_level(self, level: Tensor, boxes: Tensor, per_image: list[int]) -> list[Tensor]:
        """The bins of one level's boxes, image by image; ``per_image``: number of boxes of each."""
        _, C, h, w = level.shape
        rows, columns = self.output_size
        x1, y1, x2, y2 = boxes.unbind(1)
        down = axis_weights(y1, y2, h, rows, self.sampling_ratio).split(per_image)  # [R, rows, h]
        across = axis_weights(x1, x2, w, columns, self.sampling_ratio).split(per_image)
        parts = []
        for pixels, vertical, horizontal in zip(level.to(boxes.dtype), down, across, strict=True):
            lines = vertical.flatten(0, 1) @ pixels.transpose(0, 1).reshape(h, C * w)
            bins = lines.view(-1, rows * C, w) @ horizontal.mT  # [R, rows·C, columns]
            parts.append(bins.unflatten(1, (rows, C)).transpose(1, 2))
        return parts
