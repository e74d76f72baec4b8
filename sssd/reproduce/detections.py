"""A look at what a run detects: validation images with its boxes and the ground truth."""

from __future__ import annotations

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..engine import open_split
from ..runs import Run


def draw_detections(run: Run, images: int = 3, least_score: float = 0.4) -> Figure:
    """The first ``images`` validation images with a run's last detections.

    Boxes with their class and score, in a colour a class; the ground truth dashed in white.
    """
    split = open_split(run.config.data, "val")
    found = run.detections()
    colours = sns.color_palette("colorblind", len(split.class_names))
    height, width = split[0][0].shape[1:]
    size = (3.2 * images, 3.2 * height / width + 0.1)
    figure, axes = plt.subplots(1, images, figsize=size, layout="constrained", squeeze=False)
    for i, panel in enumerate(axes[0]):
        pixels, target = split[i]
        panel.imshow(
            pixels.permute(1, 2, 0).numpy(), extent=(0, pixels.shape[2], pixels.shape[1], 0)
        )
        panel.set_axis_off()
        for x1, y1, x2, y2 in target["boxes"].tolist():
            panel.add_patch(
                Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec="white", lw=0.8, ls=":")
            )
        own = (found.image_id == target["image_id"]) & (found.scores >= least_score)
        for (x1, y1, x2, y2), category, score in zip(
            found.boxes[own].tolist(), found.category_id[own], found.scores[own], strict=True
        ):
            kind = split.category_ids.index(int(category))
            panel.add_patch(
                Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colours[kind], lw=1.4)
            )
            panel.text(
                x1,
                y1,
                f"{split.class_names[kind]} {score:.2f}",
                parse_math=False,  # a class may be called $x_{$
                fontsize=5,
                color="white",
                va="bottom",
                bbox={"facecolor": colours[kind], "edgecolor": "none", "pad": 0.6},
            )
    plt.close(figure)
    return figure
