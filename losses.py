"""What an assignment costs: the classification and box losses, and who divides them by what.

Letters as in matchers.py: B images, L decoder layers, N queries, C classes, P matched pairs, M boxes of an image, K
copies, G groups. Every classification loss is, for a query and a class with score p = sigmoid(logit),

    weight * BCE(p, t) = weight * (-t log p - (1-t) log(1-p)),    s the IoU of the query with its ground truth:

    loss     source                matched: t and weight       not matched: t = 0 and weight    at IoU 0, a match
    ce       DETR                  softmax: -log p             0.1: -0.1 log p(no object)       counts in full
    bce      DEIM slides           1, 1                        1                                counts in full
    focal    Deformable DETR,      1, alpha (1-p)^2            (1-alpha) p^2, alpha = 1/4       counts in full
             Stable-DINO Eq. 1
    vfl      DEIM slides           s, s                        alpha p^2, alpha = 3/4           is background
    mal      DEIM slides, Eq. 3    s^g, 1                      p^g, g = 1.5                     pushed to 0, weight 1
    stable   Stable-DINO, Eq. 3    f1(s), |f1(s)-p|^2          p^2                              pushed to 0, weight p^2

ce, bce and focal ask every matched query for score 1, the others for as much as its box deserves. No gradient flows
through s: the score learns from the box, never the box from the score.

Where paper and released code part ways, the paper's form is the default and `official=True` the code's:
    vfl     a match at IoU 0 costs nothing, and p^2 and s in the weight are not differentiated (DEIM)
    mal     p^g is not differentiated (DEIM; the slides say nothing on gradients)
    stable  positives weigh 1/4, negatives 3/4 (Stable-DINO)

What divides the sum over queries, classes and images. n_box: ground truth boxes of the batch (averaged over the
processes; a divisor below 1 counts as 1).

    what                 divisor in the official code                                   here
    one-to-one           n_box                                                          n_box
    one-to-many, K       K * n_box: the repeated boxes are counted (H-DETR's code;      K * n_box
                         Eq. 2 does not say)
    G groups             G * n_box, i.e. the mean over groups of Group DETR Eq. 7       n_box, weight 1/G
    encoder, one head    n_box, labels all 0 (H-DETR's code)                            n_box, labels all 0
    encoder, a head for  G * n_box, full labels (code of two-stage Group DETR)          copies of the head * n_box, and
    each group                                                                          the group's weight; labels all 0
    denoising            denoising groups * n_box (DINO)                                the same
    background           the same divisor as its group: unmatched queries learn "nothing here", and only that
    ce                   sum of the weights of all queries: DETR's weighted mean        the same, of a group and layer

This file needs torch and torchvision only, and can be copied alone. `python losses.py` prints what each loss makes of
score and IoU, `--picture FILE` draws it.
"""
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_area, box_convert, box_iou, generalized_box_iou_loss


L1_WEIGHT, GIOU_WEIGHT = 5.0, 2.0   # in all of the papers


class LossSettings(NamedTuple):
    """What the class loss is, and weighs."""
    cls_loss: str = 'focal'     # ce, bce, focal, vfl, mal or stable
    class_weight: float = 2.0   # the papers': ce 1, focal 2, vfl and mal 1 (DEIM), stable 6 (Stable-DINO §4.1)
    mal_gamma: float = 1.5      # g above (official code of DEIM; the slides give none)
    f1: str = 's2'              # stable: a name of F1
    rescale: str = 'one'        # stable: one, max-iou or none
    official: bool = False      # vfl, mal, stable: the released code's form


# --- Classification losses: logits, matched (0 or 1) and IoU of one shape -> the loss of every entry ---------------

def bce_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target, reduction='none')


def focal_loss(logits: Tensor, matched: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Stable-DINO Eq. 1, which has no alpha; all official codes have."""
    p = logits.sigmoid()
    return (alpha * matched + (1 - alpha) * (1 - matched)) * (p - matched).abs() ** gamma * bce_loss(logits, matched)


def vfl_loss(logits: Tensor, matched: Tensor, iou: Tensor, alpha: float = 0.75, gamma: float = 2.0,
             official: bool = False) -> Tensor:
    """Varifocal loss (DEIM slides): good matches weigh more, and a match without overlap is as good as none."""
    weight = torch.where(iou > 0, iou, alpha * logits.sigmoid() ** gamma)
    if official:
        weight = torch.where(matched > 0, iou, weight).detach()
    return weight * bce_loss(logits, iou)


def mal_loss(logits: Tensor, matched: Tensor, iou: Tensor, gamma: float = 1.5, official: bool = False) -> Tensor:
    """Matchability-aware loss (DEIM slides, Eq. 3): a confident query with a bad box pays in full, unlike in vfl."""
    background = logits.sigmoid() ** gamma
    weight = torch.where(matched > 0, 1.0, background.detach() if official else background)
    return weight * bce_loss(logits, iou ** gamma)


def stable_loss(logits: Tensor, matched: Tensor, target: Tensor, gamma: float = 2.0, official: bool = False) -> Tensor:
    """Position-supervised loss (Stable-DINO Eq. 3); target: f1(s) of matched entries (`stable_target`), 0 elsewhere.

    Of two queries at one object, only the one with the better box is encouraged, whichever was matched: this is what
    makes the matching of successive layers agree (§2.4.1). The factor |f1 - p|^2 is differentiated, as in the code.
    """
    loss = (target - logits.sigmoid()).abs() ** gamma * bce_loss(logits, target)
    return (0.75 - 0.5 * matched) * loss if official else loss


def ce_loss(logits: Tensor, matched: Tensor, no_object: float = 0.1) -> tuple[Tensor, Tensor]:
    """DETR's softmax cross-entropy, column C for "no object": (...,C+1), (...,C) -> weighted loss (...), weight (...).

    The weight is 1 for matched queries and 0.1 for the others, of which there are far more.
    """
    found = matched.sum(-1)
    target = torch.cat([matched, 1 - found[..., None]], -1)
    weight = found + no_object * (1 - found)
    return -(target * logits.log_softmax(-1)).sum(-1) * weight, weight


CLASS_LOSSES = {   # but for ce: logits, matched, and IoU or stable's target, of one shape -> the loss of every entry
    'bce': lambda x, matched, s, how: bce_loss(x, matched),
    'focal': lambda x, matched, s, how: focal_loss(x, matched),
    'vfl': lambda x, matched, s, how: vfl_loss(x, matched, s, official=how.official),
    'mal': lambda x, matched, s, how: mal_loss(x, matched, s, how.mal_gamma, how.official),
    'stable': lambda x, matched, s, how: stable_loss(x, matched, s, official=how.official)}

# Stable-DINO Table 7: what a matched query's score is supervised with; s its IoU, p its score. AP, the paper's, beside.
F1 = {'s0.5': lambda s, p: s ** 0.5,               # 49.3
      's1': lambda s, p: s,                        # 49.4
      's2': lambda s, p: s ** 2,                   # 49.6, the paper's choice
      's3': lambda s, p: s ** 3,                   # 49.4
      's1p0.25': lambda s, p: s * p ** 0.25,       # 48.6: a score that supervises itself keeps what it has,
      's1p1': lambda s, p: s * p,                  # 26.4  and collapses: low scores ask for lower ones
      's2p1': lambda s, p: s ** 2 * p,             # 27.4
      'exp': lambda s, p: (s.exp() - 1) / (math.e - 1),      # 49.6
      'sin': lambda s, p: (s * math.pi / 2).sin()}           # 48.5: concave, near 1 too soon


def stable_target(iou: Tensor, score: Tensor, owner: Tensor, best_iou: Tensor, f1: str = 's2',
                  rescale: str = 'one') -> Tensor:
    """f1(s) of Stable-DINO Eq. 3 for P pairs: iou, score (P,) -> (P,), no gradient.

    Early in training all IoUs are small, and so would all targets be. The rescale (§2.2) multiplies the pairs of an
    owner, i.e. of an image in one layer and group, so that their largest becomes
        'one'      1: better with 300 queries, and what the official code does for 900, too;
        'max-iou'  best_iou, the largest IoU of any query of the owner with any ground truth: better with 900.
    owner (P,) int64: index into best_iou. Pairs that all have IoU 0 keep target 0.
    """
    target = F1[f1](iou, score).detach()
    if rescale == 'none':
        return target
    largest = torch.zeros_like(best_iou).scatter_reduce(0, owner, target, 'amax')
    wanted = torch.ones_like(best_iou) if rescale == 'one' else best_iou
    return target * (wanted / largest.clamp(min=1e-12))[owner]


# --- The loss of all layers, images and groups at once --------------------------------------------------------------

def pair_iou(boxes_xyxy: Tensor, others_xyxy: Tensor) -> Tensor:
    """IoU of box i with other box i: (P,4), (P,4) -> (P,). torchvision's box_iou would compute all P x P."""
    corner_min = torch.maximum(boxes_xyxy[:, :2], others_xyxy[:, :2])
    corner_max = torch.minimum(boxes_xyxy[:, 2:], others_xyxy[:, 2:])
    overlap = (corner_max - corner_min).clamp(min=0).prod(1)
    return overlap / (box_area(boxes_xyxy) + box_area(others_xyxy) - overlap)


def largest_iou(boxes: Tensor, gt_boxes: Sequence[Tensor], sizes: list[int]) -> Tensor:
    """Largest IoU of any query of a group with any ground truth of its image: (L,B,N,4), B x (M,4) -> (L,B,G)."""
    xyxy, of_images = box_convert(boxes.detach(), 'cxcywh', 'xyxy'), []
    for b, gt in enumerate(gt_boxes):
        iou = box_iou(xyxy[:, b].flatten(0, 1), box_convert(gt, 'cxcywh', 'xyxy'))
        of_queries = F.pad(iou, (1, 0)).amax(1).view(boxes.shape[0], -1)     # (L, N); 0 in an image without boxes
        of_images.append(torch.stack([part.amax(1) for part in of_queries.split(sizes, 1)], 1))
    return torch.stack(of_images, 1)


def set_loss(logits: Tensor, boxes: Tensor, gt_labels: Sequence[Tensor], gt_boxes: Sequence[Tensor], matches, groups,
             num_boxes: float, how: LossSettings = LossSettings()) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weighted class, L1 and GIoU loss of a row of queries, and the IoU of every pair.

    logits (L,B,N,C), boxes (L,B,N,4); gt_labels, gt_boxes: B tensors (M_b,), (M_b,4); matches: P pairs (layer, image,
    query, gt), gt counts through the batch; groups: how the row is cut (matchers.QueryGroup); num_boxes: n_box above.
    Returns three scalars and IoU (P,), through which no gradient flows.
    """
    (L, B, N, _), (layer, image, query, gt) = logits.shape, matches
    sizes = [group.queries for group in groups]
    group_of = torch.arange(len(groups)).repeat_interleave(torch.tensor(sizes)).to(logits.device, non_blocking=True)
    # The weight of a group, divided by copies * n_box of its layer: (L, N).
    scale = torch.tensor([[group.weight / max(copies * num_boxes, 1.0) for copies in group.copies]
                          for group in groups], dtype=boxes.dtype).T.to(boxes.device, non_blocking=True)[:, group_of]

    pred, gt_pair, pair_scale = boxes[layer, image, query], torch.cat(list(gt_boxes))[gt], scale[layer, query]
    l1_loss = ((pred - gt_pair).abs().sum(1) * pair_scale).sum()
    pred_xyxy, gt_xyxy = (box_convert(b, 'cxcywh', 'xyxy') for b in (pred, gt_pair))
    # eps=0, as in DETR's and H-DETR's code: every ground truth has an area, so there is no division by 0.
    giou_loss = (generalized_box_iou_loss(pred_xyxy, gt_xyxy, eps=0) * pair_scale).sum()
    iou = pair_iou(pred_xyxy, gt_xyxy).detach()

    # Unmatched queries stay 0 in every class: they pay the background part of the class loss, and no box loss.
    label = torch.cat(list(gt_labels))[gt]
    shape = (L, B, N, logits.shape[-1] - (how.cls_loss == 'ce'))

    def at_matches(value: Tensor) -> Tensor:
        return logits.new_zeros(shape).index_put((layer, image, query, label), value.to(logits.dtype))

    matched, quality = at_matches(torch.ones_like(iou)), iou
    if how.cls_loss == 'stable':
        owner = (layer * B + image) * len(groups) + group_of[query]
        best = largest_iou(boxes, gt_boxes, sizes) if how.rescale == 'max-iou' else boxes.new_empty(L, B, len(groups))
        score = logits[layer, image, query, label].sigmoid()
        quality = stable_target(iou, score, owner, best.flatten(), how.f1, how.rescale)
    if how.cls_loss == 'ce':
        losses, weights = ce_loss(logits, matched)                                                      # (L, B, N)
        divisor = torch.stack([part.sum((1, 2)) for part in weights.split(sizes, 2)], 1)                # (L, G)
        scale = (torch.tensor([group.weight for group in groups]).to(divisor) / divisor)[:, group_of]
    else:
        losses = CLASS_LOSSES[how.cls_loss](logits, matched, at_matches(quality), how).sum(-1)
    class_loss = (losses.sum(1) * scale).sum()
    return how.class_weight * class_loss, L1_WEIGHT * l1_loss, GIOU_WEIGHT * giou_loss, iou


def criterion(outputs, gt_labels: Sequence[Tensor], gt_boxes: Sequence[Tensor], matches, encoder_matches, groups,
              proposal_groups, num_boxes: float,
              how: LossSettings = LossSettings()) -> tuple[dict[str, Tensor], Tensor]:
    """The loss of a step: H-DETR Eq. 1-6, Group DETR Eq. 7, whichever the groups say.

    outputs: the detector's `Outputs`; gt_labels, gt_boxes: B tensors (M_b,), (M_b,4); matches and groups of the
    decoder's and the encoder's row (matchers.py); num_boxes: n_box above.
    Returns the weighted parts, whose sum is the loss, and the IoU (P,) of the decoder's matched pairs.
    """
    pred_logits, pred_boxes, encoder_logits, encoder_boxes = outputs
    # DETR had no encoder proposals, and softmax no score that ranks them: they keep the focal loss.
    encoder_how = how._replace(cls_loss='focal', class_weight=2.0) if how.cls_loss == 'ce' else how
    object_or_not = [torch.zeros_like(labels) for labels in gt_labels]
    *decoder, iou = set_loss(pred_logits, pred_boxes, gt_labels, gt_boxes, matches, groups, num_boxes, how)
    *encoder, _ = set_loss(encoder_logits, encoder_boxes, object_or_not, gt_boxes, encoder_matches, proposal_groups,
                           num_boxes, encoder_how)
    names = ('class', 'l1', 'giou', 'encoder_class', 'encoder_l1', 'encoder_giou')
    return dict(zip(names, (*decoder, *encoder))), iou


# --- The example of the docstring, printed and drawn ----------------------------------------------------------------

def curve(name: str, p: Tensor, iou: float | None) -> tuple[Tensor, Tensor]:
    """Loss and its gradient by the logit of queries with scores p (n,), matched at this IoU, or not (None)."""
    x, matched, s = torch.logit(p).requires_grad_(), torch.full_like(p, iou is not None), torch.full_like(p, iou or 0.0)
    if name == 'ce':   # one class against "no object"
        loss, _ = ce_loss(torch.stack([x, torch.zeros_like(x)], -1), matched[:, None])
    else:
        loss = CLASS_LOSSES[name](x, matched, F1['s2'](s, p) if name == 'stable' else s, LossSettings())
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


def draw(file: str) -> None:
    """A panel for each loss: loss over score, a line for each IoU of the match, a thin one for no match."""
    from PIL import Image, ImageDraw, ImageFont
    lines = {0.0: ('#D55E00', 11), 0.5: ('#E69F00', 8), 0.75: ('#56B4E9', 8), 1.0: ('#0072B2', 8), None: ('black', 3)}
    large, small = (ImageFont.load_default(size=size) for size in (40, 30))
    image = Image.new('RGB', (2400, 1500), 'white')   # twice the final size, for smooth lines
    pen, p = ImageDraw.Draw(image), torch.linspace(0.005, 0.995, 199)
    for i, name in enumerate(('ce', *CLASS_LOSSES)):
        x, y, width, height = i % 3 * 790 + 90, i // 3 * 690 + 80, 660, 500
        pen.rectangle((x, y, x + width, y + height), outline='#555555', width=3)
        pen.text((x + width / 2, y - 12), name, 'black', large, anchor='ms')
        for part in (0, 0.5, 1):
            pen.text((x + part * width, y + height + 12), f'{part:g}', '#555555', small, anchor='ma')
            pen.text((x - 12, y + (1 - part) * height), f'{3 * part:g}', '#555555', small, anchor='rm')
        for iou, style in lines.items():
            points = zip(p.tolist(), curve(name, p, iou)[0].tolist())
            pen.line([(x + width * a, y + height * (1 - b / 3)) for a, b in points if b < 3], *style)
    for j, (iou, style) in enumerate(lines.items()):
        text = 'not matched' if iou is None else f'match, IoU {iou:g}{" (above: any)" * (iou == 1)}'
        pen.line((60 + 450 * j, 1420, 140 + 450 * j, 1420), *style)
        pen.text((155 + 450 * j, 1420), text, 'black', small, anchor='lm')
    image.reduce(2).save(file)


if __name__ == '__main__':
    import argparse
    parser = argparse.ArgumentParser(description='What each classification loss makes of score and IoU.')
    parser.add_argument('--picture', metavar='FILE', help='also draw it')
    args = parser.parse_args()
    scores = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    print('loss and gradient by the logit (below 0: the score is pushed up)\n\n' + ' ' * 25
          + ''.join(f'p = {p:<13g}' for p in scores.tolist()))
    for name in ('ce', *CLASS_LOSSES):
        by_iou = name in ('vfl', 'mal', 'stable')
        for iou in (*((0.0, 0.5, 0.75, 1.0) if by_iou else (1.0,)), None):
            what = 'not matched' if iou is None else f'match, IoU {iou:g}' if by_iou else 'match, any IoU'
            cells = [f'{loss:6.3f} {gradient:+.3f}   ' for loss, gradient in zip(*curve(name, scores, iou))]
            print(f'{name:8}{what:16}' + ' '.join(cells))
    print('\nWhat divides' + __doc__.split('What divides')[1].split('This file')[0].rstrip())
    if args.picture:
        draw(args.picture)
        print(f'picture: {args.picture}')
