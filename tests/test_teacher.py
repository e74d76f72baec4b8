"""The label-guided teacher against a slow reference with plain loops, and its invariances."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sssd.teacher import STN, LabelGuidedTeacher, describe, draw, inside

SIZE = (64, 96)
LEVELS = ((16, 24), (8, 12), (1, 1))
CLASSES, WIDTH = 3, 16


def example(counts: list[int], seed: int = 0) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    features = [torch.randn(len(counts), WIDTH, *level, generator=draw) for level in LEVELS]
    boxes, labels = [], []
    for count in counts:
        corner = torch.rand(count, 2, generator=draw) * torch.tensor([60.0, 40.0])
        boxes.append(torch.cat([corner, corner + 3 + 30 * torch.rand(count, 2, generator=draw)], 1))
        labels.append(torch.randint(CLASSES, (count,), generator=draw))
    return features, boxes, labels


@pytest.mark.parametrize("objects", [1, 3, 4, 40])  # nine shifts of 4 are fewer than 40 channels
def test_drawing_is_a_convolution_of_the_rendered_map(objects: int) -> None:
    torch.manual_seed(0)
    vectors, masks = torch.randn(2, objects, 40), (torch.rand(2, objects, 5, 7) > 0.5).float()
    convolution = torch.nn.Conv2d(40, 24, 3, padding=1)
    rendered = torch.stack(
        [
            sum(v[:, None, None] * m for v, m in zip(*x, strict=True))
            for x in zip(vectors, masks, strict=True)
        ]
    )
    torch.testing.assert_close(
        draw(vectors, masks, convolution), convolution(rendered), rtol=1e-4, atol=1e-5
    )


def teacher(context: bool = False, detach: bool = False) -> LabelGuidedTeacher:
    torch.manual_seed(1)
    return LabelGuidedTeacher(CLASSES, WIDTH, context=context, detach_appearance=detach)


def ln(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()


def gn(x: Tensor) -> Tensor:
    """One group over channels and pixels of one image [C, h, w]."""
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()


def stn(module: STN, x: Tensor) -> Tensor:
    h = x
    for block in module.layers[:-1]:
        h = ln(block.linear(h)).relu()  # type: ignore[union-attr, operator]
    matrix = module.layers[-1](h).reshape(len(x), len(x))
    return x @ matrix


def reference(
    m: LabelGuidedTeacher, features: list[Tensor], boxes: list[Tensor], labels: list[Tensor]
) -> list[Tensor]:
    """LGD, section 3, image by image, object by object, pixel by pixel."""
    height, width = SIZE
    out = []
    for level in features:
        h, w = level.shape[2:]
        images = []
        for b in range(len(boxes)):
            objects = [
                (box, F.one_hot(label, CLASSES).float(), False)
                for box, label in zip(boxes[b], labels[b], strict=True)
            ]
            if not objects:
                objects = [(torch.tensor([0.0, 0, 1, 1]), torch.zeros(CLASSES), m.context)]
            elif m.context:
                whole = torch.tensor([0.0, 0, width, height])
                objects.append((whole, torch.zeros(CLASSES), True))
            lifted = []
            for (x1, y1, x2, y2), hot, _ in objects:
                place = [x1.clamp(0, width - 1) / width, y1.clamp(0, height - 1) / height]
                place += [x2.clamp(0, width - 1) / width, y2.clamp(0, height - 1) / height]
                descriptor = 2 * torch.cat([torch.stack(place), hot]) - 1
                aligned = stn(m.label_encoder.stn_input, descriptor)
                lifted.append(
                    stn(
                        m.label_encoder.stn_features,
                        ln(m.label_encoder.lift.linear(aligned)).relu(),
                    )
                )
            deep = [
                ln(
                    m.label_encoder.image[1].linear(ln(m.label_encoder.image[0].linear(x)).relu())
                ).relu()
                for x in lifted
            ]
            top = torch.stack(deep).max(dim=0).values
            keys = []
            for x in lifted:
                embedding = ln(m.label_encoder.fuse.linear(torch.cat([x, top]))).relu()
                keys.append(ln(m.relation_embed.linear(embedding)).relu())
            seen = gn(m.appearance_conv(level[b][None])[0]).relu()
            masks, queries = [], []
            for (x1, y1, x2, y2), _, _ in objects:
                mask = torch.zeros(h, w)
                cx, cy = (x1 + x2) / 2 * w / width, (y1 + y2) / 2 * h / height
                for y in range(h):
                    for x in range(w):
                        near = abs(x - cx) <= (x2 - x1) / 2 * w / width
                        mask[y, x] = near and abs(y - cy) <= (y2 - y1) / 2 * h / height
                masks.append(mask)
                queries.append((seen * mask).sum(dim=(1, 2)) / max(mask.sum().item(), 1))
            key = torch.stack(keys)
            attended = m.relation_attention(torch.stack(queries), key, key, need_weights=False)[0]
            drawn, around = torch.zeros(WIDTH, h, w), torch.zeros(WIDTH)
            for vector, mask, (_, _, is_context) in zip(attended, masks, objects, strict=True):
                if is_context:
                    around = m.mapping_context(vector)
                else:
                    drawn = drawn + m.mapping_object(vector)[:, None, None] * mask
            x = (m.mapping_conv(drawn[None])[0] + around[:, None, None]).relu()
            x = gn(m.refinement_convs[0](x[None])[0]).relu()
            x = gn(m.refinement_convs[1](x[None])[0]).relu()
            images.append(gn(m.refinement_convs[2](x[None])[0]))
        out.append(torch.stack(images))
    return out


@settings(max_examples=8)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=3), st.booleans(), st.integers(0, 99))
def test_equals_the_reference(counts: list[int], context: bool, seed: int) -> None:
    features, boxes, labels = example(counts, seed)
    module = teacher(context)
    with torch.no_grad():
        got = module(features, boxes, labels, SIZE)
        for x, y in zip(got, reference(module, features, boxes, labels), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("context", [False, True])
def test_order_of_objects_and_other_images_do_not_matter(context: bool) -> None:
    features, boxes, labels = example([4, 2, 0])
    module = teacher(context)
    with torch.no_grad():
        before = module(features, boxes, labels, SIZE)
        turned = [b.flip(0) for b in boxes], [x.flip(0) for x in labels]
        for x, y in zip(before, module(features, *turned, SIZE), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
        fewer = [boxes[0][:1], *boxes[1:]], [labels[0][:1], *labels[1:]]
        after = module(features, *fewer, SIZE)
    for x, y in zip(before, after, strict=True):
        torch.testing.assert_close(x[1:], y[1:], rtol=1e-4, atol=1e-5)
    assert (before[0][0] - after[0][0]).abs().max() > 1e-3


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("detach", [False, True])
def test_gradients(context: bool, detach: bool) -> None:
    features, boxes, labels = example([3, 0])
    for level in features:
        level.requires_grad_()
    module = teacher(context, detach)
    sum((x**3).sum() for x in module(features, boxes, labels, SIZE)).backward()  # type: ignore[union-attr]
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    for level in features:
        assert (level.grad is None) if detach else (level.grad is not None)
    if not detach:
        assert features[0].grad is not None and features[0].grad.abs().sum() > 0


def test_box_masks_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [2, 0, 4, 8], [7, 7, 8, 8], [0, 0, 1, 1]])
    masks = inside(boxes, (8, 8), (4, 4))  # one pixel of the level is two of the image
    assert masks.shape == (4, 4, 4)
    expected = [
        ["xxx.", "xxx.", "xxx.", "...."],  # |x − 1| ≤ 1
        [".xx.", ".xx.", ".xx.", ".xx."],  # |x − 1.5| ≤ 0.5, |y − 2| ≤ 2
        ["....", "....", "....", "...."],  # |x − 3.75| ≤ 0.25 holds for no pixel
        ["x...", "....", "....", "...."],  # the dummy object
    ]
    got = [["".join("x" if p else "." for p in row) for row in mask] for mask in masks.tolist()]
    assert got == expected


def test_masks_take_the_place_of_boxes() -> None:
    """Pixel (x, y) of a level is the point (x·W/w, y·H/h) of the image's mask, too."""
    boxes = [torch.tensor([[8.0, 4, 40, 60], [0, 0, 9, 9]]), torch.zeros(0, 4)]
    labels = [torch.tensor([0, 1]), torch.zeros(0).long()]
    y, x = torch.arange(64)[:, None], torch.arange(96)
    filled = [(x >= x1) & (x <= x2) & (y >= y1) & (y <= y2) for x1, y1, x2, y2 in boxes[0]]
    whole = torch.stack(filled)
    for context in (False, True):
        objects = describe(boxes, labels, CLASSES, SIZE, context)
        for level in (*LEVELS, (5, 7)):
            by_box = objects.masks(SIZE, level)
            by_mask = objects.masks(SIZE, level, [whole, torch.zeros(0, 64, 96)])
            assert torch.equal(by_mask[0], by_box[0])  # also of the context object
            assert by_mask[1].sum() == (by_box[1].sum() if context else 0)  # the dummy's
            assert torch.equal(objects.masks(SIZE, level, [None, None]), by_box)
    small = whole[:, :50, :70].clone()  # of an image that was padded
    small[0, 16:] = False
    seen = describe(boxes, labels, CLASSES, SIZE, False).masks(SIZE, (8, 12), [small, None])
    assert seen[0, 0].nonzero().tolist() == [[1, x] for x in range(1, 6)]


def test_descriptors_by_hand() -> None:
    boxes = [torch.tensor([[-5.0, 16, 200, 64]]), torch.zeros(0, 4)]
    labels = [torch.tensor([2]), torch.zeros(0, dtype=torch.int64)]
    all_boxes, descriptors, valid, context = describe(boxes, labels, CLASSES, SIZE, True)
    assert all_boxes[0].tolist() == [[-5, 16, 200, 64], [0, 0, 96, 64]]
    assert valid.tolist() == [[True, True], [True, False]]
    assert context.tolist() == [[False, True], [True, False]]  # the dummy takes its place
    far_x, far_y = 2 * 95 / 96 - 1, 2 * 63 / 64 - 1
    torch.testing.assert_close(
        descriptors[0],
        torch.tensor([[-1, -0.5, far_x, far_y, -1, -1, 1], [-1, -1, far_x, far_y] + [-1] * 3]),
    )
    torch.testing.assert_close(
        descriptors[1, 0], torch.tensor([-1, -1, 2 / 96 - 1, 2 / 64 - 1, -1, -1, -1])
    )


def test_half_precision_stays_finite() -> None:
    features, boxes, labels = example([2, 0, 3])
    with torch.autocast("cpu", torch.bfloat16):
        for level in teacher(True)(features, boxes, labels, SIZE):
            assert torch.isfinite(level).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pools_a_large_box(dtype: torch.dtype) -> None:
    """More pixels than the largest float16, 65504, as P2 of a large image has."""
    torch.manual_seed(0)
    module, size = LabelGuidedTeacher(2, 8), (1044, 1044)
    whole = [0.0, 0, 1044, 1044]
    features = [torch.randn(1, 8, 261, 261)]
    labelled = [torch.tensor([whole, [9, 9, 500, 700]])], [torch.tensor([1, 0])]
    with torch.no_grad():
        module.appearance_conv.bias[0] = 3  # type: ignore[index]  # a channel of large mean
        expected = module(features, *labelled, size)[0]
        with torch.autocast("cpu", dtype):
            got = module(features, *labelled, size)[0].float()
    assert (got - expected).norm() <= 0.05 * expected.norm()


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="width: 20; expected a multiple of the 8 heads"):
        LabelGuidedTeacher(3, 20)
    with pytest.raises(ValueError, match="num_classes: 0"):
        LabelGuidedTeacher(0, 16)


def test_without_objects_and_with_a_context_object_all_pixels_are_alike() -> None:
    """The dummy's box of one pixel is not drawn."""
    module = teacher(context=True)
    with torch.no_grad():
        objects = describe([torch.zeros(0, 4)], [torch.zeros(0).long()], CLASSES, SIZE, True)
        masks = [objects.masks(SIZE, level) for level in LEVELS]
        related = torch.randn(1, len(LEVELS), WIDTH)
        for p, x in enumerate(module.intra_object_mapping(related, masks, objects.context)):
            whole = module.mapping_conv.bias + module.mapping_context(related[0, p])
            expected = whole.relu()[None, :, None, None].expand_as(x)
            torch.testing.assert_close(x, expected)
