"""Classification and box losses of a DETR, and the divisors of their sums.

Letters: B images, L decoder layers, N queries, C classes, P matched pairs, M boxes of an
image. The row of N queries is cut into G groups. A group has n queries and is matched on
its own, with K copies of every ground truth.

A query has C class entries. A matched query has one matched entry, in the column of its
ground truth's class. All other entries are background. The loss of an entry is

    weight * BCE(p, t) = weight * (-t log p - (1-t) log(1-p)),   p = sigmoid(logit)

with target t. (ce is a softmax.) s is the IoU of a matched query with its ground truth (q
on the DEIM slides).

    loss    source              matched: t, weight   background: weight, t = 0   a match at IoU 0
    ce      DETR                softmax: -log p      0.1: -0.1 log p(no object)  as at IoU 1
    bce     DEIM slides         1, 1                 1                           as at IoU 1
    focal   Deformable DETR,    1, alpha (1-p)^2     (1-alpha) p^2, alpha = 1/4  as at IoU 1
            DEIM slides         (Stable-DINO Eq. 1 has no alpha)
    vfl     DEIM slides         s, s                 3/4 p^2                     background
    mal     DEIM slides, Eq. 3  s^gamma, 1           p^gamma, gamma = 1.5        t = 0, weight 1
    stable  Stable-DINO, Eq. 3  f1(s), |f1(s)-p|^2   p^2                         background

The target of ce, bce and focal is 1 for every match. The target of vfl, mal and stable is
high for a good box only. No gradient flows through s: the score learns from the box, and
the box does not learn from the score.

The default is the paper's form. `official=True` is the form of the released code:

    vfl     background's p^2 has no gradient, and a match at IoU 0 costs nothing (DEIM)
    mal     background's p^gamma has no gradient (DEIM)
    stable  matched entries weigh 1/4, background 3/4 (Stable-DINO)

The table's numbers 1/4, 3/4 and 1.5 and its exponents 2 are from the codes.
Not included: in Stable-DINO's code, exp and sin take s^2, and the rescale never scales down.

Each sum over queries, classes and images has a divisor. n_box is the number of ground truth
boxes of a step. A divisor with n_box is at least 1.

    one-to-one         n_box (DETR)
    one-to-many        K * n_box, even if copies outnumber queries (H-DETR's code)
    G groups           n_box, and weight 1/G (Group DETR Eq. 7)
    encoder, one head  n_box, all labels 0 (H-DETR's code)
    encoder, G heads   copies * n_box, all labels 0, weight of the group (Group DETR: real labels)
    denoising groups   groups * n_box (Stable-DINO's code: class weight 1)
    ce                 sum of the queries' weights, per group (DETR: of all queries)

Matched and background entries of a group have the same divisor.

This file needs torch and torchvision only, and can be copied alone. `python losses.py`
prints every loss at several scores and IoUs, and Table 1 of Stable-DINO.
"""
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_area, box_convert, box_iou

# Loss weights of the official codes (stable: Stable-DINO §4.1; bce: ours).
L1_WEIGHT, GIOU_WEIGHT = 5.0, 2.0
CLASS_WEIGHTS = dict(ce=1.0, bce=1.0, focal=2.0, vfl=1.0, mal=1.0, stable=6.0)


class LossSettings(NamedTuple):
    """Settings of the class loss."""
    cls_loss: str = 'focal'  # a key of CLASS_WEIGHTS
    class_weight: float | None = None  # None: the entry of CLASS_WEIGHTS
    mal_gamma: float = 1.5  # mal: gamma, at least 1
    f1: str = 's2'  # stable: a key of F1
    rescale: str = 'one'  # stable: one, max-iou or none
    official: bool = False  # vfl, mal, stable: the released code's form


# --- Classification losses: one row of the table each ---

# Matched entries: score p and quality (s; stable: f1(s)), both (P,) -> target t and weight.
MATCHED = {
    'bce': lambda p, quality, settings: (1.0, 1.0),
    'focal': lambda p, quality, settings: (1.0, 0.25 * (1 - p) ** 2),
    # Good matches weigh more. A match without overlap is background.
    'vfl': lambda p, quality, settings: (
        quality, torch.where(quality > 0, quality, 0.0 if settings.official else 0.75 * p ** 2)),
    # Weight 1: a confident query with a bad box pays in full.
    'mal': lambda p, quality, settings: (quality ** settings.mal_gamma, 1.0),
    # A match with a bad box has a low target, so it is not encouraged (Stable-DINO
    # §2.4.1). The weight has a gradient.
    'stable': lambda p, quality, settings: (
        quality, (quality - p) ** 2 * (0.25 if settings.official else 1.0))}

# Background entries: p -> c and w of the loss c * w * BCE(p, 0).
# Speed: `background_loss` multiplies the sum by the constant c, not every entry.
BACKGROUND = {
    'bce': lambda p, settings: (1.0, 1.0),
    # Most of the background already has a low score, and p^2 makes it count little.
    'focal': lambda p, settings: (0.75, p ** 2),
    'vfl': lambda p, settings: (0.75, (p.detach() if settings.official else p) ** 2),
    'mal': lambda p, settings: (
        1.0, (p.detach() if settings.official else p) ** settings.mal_gamma),
    'stable': lambda p, settings: (0.75 if settings.official else 1.0, p ** 2)}


def match_loss(logits: Tensor, quality: Tensor, settings: LossSettings) -> Tensor:
    """Loss of matched entries: logits, quality (P,) -> (P,).

    With logit x, -log(1-p) = softplus(x) and -log p = softplus(x) - x. So BCE(p, t) is
    softplus(x) - t x, which is finite for any x.
    """
    target, weight = MATCHED[settings.cls_loss](logits.sigmoid(), quality, settings)
    return weight * (F.softplus(logits) - target * logits)


def background_loss(logits: Tensor, settings: LossSettings, dim: Sequence[int] = ()) -> Tensor:
    """Loss of background entries; if `dim` is given, its sum over these dimensions."""
    constant, weight = BACKGROUND[settings.cls_loss](logits.sigmoid(), settings)
    loss = weight * F.softplus(logits)
    return constant * (loss.sum(dim) if dim else loss)


def class_loss(logits: Tensor, matched: Tensor, quality: Tensor,
               settings: LossSettings = LossSettings()) -> Tensor:
    """Loss of every entry, for all losses except ce: three tensors of one shape.

    `matched` is 0 or 1. `set_loss` computes the same without a one-hot `matched`.
    """
    loss = match_loss(logits, quality, settings)
    return torch.where(matched > 0, loss, background_loss(logits, settings))


def ce_loss(logits: Tensor, matched: Tensor, no_object: float = 0.1) -> tuple[Tensor, Tensor]:
    """DETR's softmax cross-entropy, whose column C is "no object".

    logits (..., C+1), matched (..., C) of 0 and 1 -> weighted loss (...), weight (...).
    The weight is 1 for matched and 0.1 for unmatched queries, since most are unmatched.
    """
    is_matched = matched.sum(-1)
    target = torch.cat([matched, 1 - is_matched[..., None]], -1)
    weight = is_matched + no_object * (1 - is_matched)
    return -(target * logits.log_softmax(-1)).sum(-1) * weight, weight


# f1(s) of Stable-DINO Table 7, with the paper's AP at class weight 10 (focal loss: 49.2). p is
# the score. §2.4.1 says why p in f1 lowers the AP.
F1 = {'s0.5': lambda s, p: s ** 0.5,  # 49.3
      's1': lambda s, p: s,  # 49.4
      's2': lambda s, p: s ** 2,  # 49.6, the paper's choice
      's3': lambda s, p: s ** 3,  # 49.4
      's1p0.25': lambda s, p: s * p ** 0.25,  # 48.6
      's1p1': lambda s, p: s * p,  # 26.4
      's2p1': lambda s, p: s ** 2 * p,  # 27.4
      'exp': lambda s, p: (s.exp() - 1) / (math.e - 1),  # 49.6
      'sin': lambda s, p: (s * math.pi / 2).sin()}  # 48.5: concave, reaches 1 fast (§4.4)


def stable_target(iou: Tensor, score: Tensor, owner: Tensor, peak: Tensor | None,
                  f1: str = 's2') -> Tensor:
    """Targets f1(s) of Stable-DINO Eq. 3, without gradient: iou, score (P,) -> (P,).

    Early in training every IoU is small, and so is every f1(s). An owner is one image in
    one layer and group. The rescale (§2.2) multiplies the targets of an owner's pairs by
    one factor, so that the largest becomes the owner's peak.
        'one'      The peak is 1. This is better with 300 queries.
        'max-iou'  The peak is `largest_iou`. This is better with 900 queries.
        'none'     The peak is None: no rescale.
    `owner` (P,) int64 is the owner of each pair, and `peak` has one number per owner.
    If all IoUs of an owner are 0, its targets stay 0.
    """
    target = F1[f1](iou, score).detach()
    if peak is None:
        return target
    largest = torch.zeros_like(peak).scatter_reduce(0, owner, target, 'amax')  # (owners,)
    factor = peak / largest.clamp(min=1e-12)
    return target * factor[owner]


# --- The loss of all layers, images and groups at once ---

def pair_iou(boxes_xyxy: Tensor, others_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and GIoU of box i with other box i: (P,4), (P,4) -> (P,), (P,).

    Speed: torchvision's functions compute P x P values or make the CPU wait for the GPU.
    """
    a_min, a_max = boxes_xyxy.split(2, 1)
    b_min, b_max = others_xyxy.split(2, 1)
    w, h = (torch.minimum(a_max, b_max) - torch.maximum(a_min, b_min)).clamp(min=0).unbind(1)
    hull_w, hull_h = (torch.maximum(a_max, b_max) - torch.minimum(a_min, b_min)).unbind(1)
    overlap, hull = w * h, hull_w * hull_h
    # The union is above 0, since every ground truth has an area.
    union = box_area(boxes_xyxy) + box_area(others_xyxy) - overlap
    iou = overlap / union
    return iou, iou - (hull - union) / hull


def largest_iou(boxes: Tensor, gt_boxes: Sequence[Tensor], sizes: list[int]) -> Tensor:
    """Largest IoU of a group's queries with the ground truths, per layer and image.

    boxes (L,B,N,4), gt_boxes: B tensors (M_b,4), sizes: queries of each group -> (L,B,G).
    """
    xyxy = box_convert(boxes.detach(), 'cxcywh', 'xyxy')
    of_images = []
    for b, gt in enumerate(gt_boxes):
        iou = box_iou(xyxy[:, b].flatten(0, 1), box_convert(gt, 'cxcywh', 'xyxy'))  # (L*N, M)
        iou = iou.view(len(xyxy), boxes.shape[2], len(gt))
        # The added 0 is the result without queries or boxes.
        of_groups = [F.pad(part.flatten(1), (1, 0)).amax(1)  # (L, n * M) -> (L,)
                     for part in iou.split(sizes, 1)]
        of_images.append(torch.stack(of_groups, 1))
    return torch.stack(of_images, 1)


def set_loss(logits: Tensor, boxes: Tensor, gt_labels: Sequence[Tensor],
             gt_boxes: Sequence[Tensor], matches, groups, num_boxes: float | Tensor,
             settings: LossSettings = LossSettings()) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted class, L1 and GIoU loss of a row of queries, and the IoU of every pair.

    logits (L,B,N,C), boxes (L,B,N,4) as cx, cy, w, h in 0..1.
    gt_labels, gt_boxes: B tensors (M_b,), (M_b,4).
    matches: layer, image, query and ground truth of each pair, 4 x (P,). A ground truth is
    an index into all boxes of the batch.
    groups: each has `queries`, `copies` (a number per layer) and `weight`.
    num_boxes: n_box.
    Returns three scalars, and the IoU (P,) without gradient.
    """
    # Half precision is too coarse for these sums.
    logits, boxes = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logits, boxes))
    L, B, N, _ = logits.shape
    layer, image, query, gt = matches
    sizes = [group.queries for group in groups]
    # Speed: with output_size and non_blocking, the CPU does not wait for the GPU.
    repeats = torch.tensor(sizes).to(logits.device, non_blocking=True)
    group_of = torch.arange(len(sizes), device=logits.device)
    group_of = group_of.repeat_interleave(repeats, output_size=N)  # (N,)
    numbers = torch.tensor([(group.weight, *group.copies) for group in groups], dtype=boxes.dtype)
    numbers = numbers.T.to(boxes.device, non_blocking=True)  # (1+L, G)
    weight, copies = numbers[0], numbers[1:]  # (G,), (L, G)
    # The loss of query q (of group g) in layer l has a factor from the table of divisors:
    # scale_lq = weight_g / max(1, max(1, copies_lg) * n_box)
    divisor = (copies.clamp(min=1) * num_boxes).clamp(min=1.0)  # (L, G)
    scale = (weight / divisor)[:, group_of]  # (L, N)

    pair, pair_scale = (layer, image, query), scale[layer, query]
    pred = boxes[pair]  # (P, 4)
    target = torch.cat(list(gt_boxes))[gt]  # (P, 4)
    l1_loss = ((pred - target).abs().sum(1) * pair_scale).sum()
    iou, giou = pair_iou(*(box_convert(x, 'cxcywh', 'xyxy') for x in (pred, target)))
    giou_loss = ((1 - giou) * pair_scale).sum()
    iou = iou.detach()

    entry = (*pair, torch.cat(list(gt_labels))[gt])
    if settings.cls_loss == 'ce':
        matched = torch.zeros_like(logits[..., :-1])  # (L, B, N, C)
        matched = matched.index_put(entry, torch.ones_like(iou))
        losses, weights = ce_loss(logits, matched)  # (L, B, N)
        # The loss of a group is its weighted mean, sum_q w_q (-log p_q) / sum_q w_q.
        sums = [part.sum((1, 2)) for part in weights.split(sizes, 2)]
        divisor = torch.stack(sums, 1)  # (L, G)
        loss = (losses.sum(1) * (weight / divisor)[:, group_of]).sum()
    else:
        pair_logits, quality = logits[entry], iou  # (P,)
        if settings.cls_loss == 'stable':
            # The owner of a pair is an index into the flat (L, B, G).
            owner = (layer * B + image) * len(groups) + group_of[query]  # (P,)
            peak = None
            if settings.rescale == 'one':
                peak = torch.ones_like(weight).repeat(L * B)
            elif settings.rescale == 'max-iou':
                peak = largest_iou(boxes, gt_boxes, sizes).flatten()
            quality = stable_target(iou, pair_logits.sigmoid(), owner, peak, settings.f1)
        # Speed: sum all entries as background, then exchange the entries of the pairs. A
        # one-hot target would double the work. The error is 1e-7 of the sum in float32.
        background = (background_loss(logits, settings, (1, 3)) * scale).sum()
        matched = match_loss(pair_logits, quality, settings)  # (P,)
        exchange = (matched - background_loss(pair_logits, settings)) * pair_scale
        loss = background + exchange.sum()
    class_weight = settings.class_weight
    if class_weight is None:
        class_weight = CLASS_WEIGHTS[settings.cls_loss]
    return class_weight * loss, L1_WEIGHT * l1_loss, GIOU_WEIGHT * giou_loss, iou


def criterion(outputs, gt_labels: Sequence[Tensor], gt_boxes: Sequence[Tensor], matches,
              encoder_matches, groups, proposal_groups, num_boxes: float | Tensor,
              settings: LossSettings = LossSettings()) -> tuple[dict[str, Tensor], Tensor]:
    """The loss of a step: H-DETR Eq. 1-6 or Group DETR Eq. 7, depending on the groups.

    outputs: logits and boxes of the decoder, then of the encoder (L = 1).
    encoder_matches, proposal_groups: matches and groups of the encoder.
    The other arguments are those of `set_loss`.
    Returns the weighted parts, whose sum is the loss, and the IoU (P,) of the decoder's pairs.
    """
    pred_logits, pred_boxes, encoder_logits, encoder_boxes = outputs
    # With ce the encoder keeps the focal loss, since a sigmoid ranks its proposals.
    encoder_settings = settings
    if settings.cls_loss == 'ce':
        encoder_settings = settings._replace(cls_loss='focal', class_weight=None)
    # The encoder's label 0 means "object". All other columns are background.
    object_labels = [torch.zeros_like(labels) for labels in gt_labels]
    *decoder, iou = set_loss(pred_logits, pred_boxes, gt_labels, gt_boxes, matches, groups,
                             num_boxes, settings)
    *encoder, _ = set_loss(encoder_logits, encoder_boxes, object_labels, gt_boxes, encoder_matches,
                           proposal_groups, num_boxes, encoder_settings)
    names = ('class', 'l1', 'giou', 'encoder_class', 'encoder_l1', 'encoder_giou')
    return dict(zip(names, (*decoder, *encoder))), iou


# --- Worked examples ---

def curve(name: str, p: Tensor, iou: float | None) -> tuple[Tensor, Tensor]:
    """Loss and gradient by the logit at scores p (n,), matched at `iou` or unmatched (None)."""
    x = torch.logit(p).requires_grad_()
    matched = torch.full_like(p, iou is not None)
    s = torch.full_like(p, iou or 0.0)
    if name == 'ce':  # one class against "no object"
        loss, _ = ce_loss(torch.stack([x, torch.zeros_like(x)], -1), matched[:, None])
    else:
        quality = F1['s2'](s, p) if name == 'stable' else s
        loss = class_loss(x, matched, quality, LossSettings(name))
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


if __name__ == '__main__':
    scores = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    print("Loss and gradient by the logit (below 0: the score is pushed up), the papers' forms\n"
          'before their class weights; stable: f1(s) = s^2 before the rescale\n')
    print(' ' * 25 + ''.join(f'p = {p:<13g}' for p in scores.tolist()))
    for name in ('ce', *MATCHED):
        rows = {'match, any IoU': 1.0}
        if name in ('vfl', 'mal', 'stable'):
            rows = {f'match, IoU {iou:g}': iou for iou in (0.0, 0.5, 0.75, 1.0)}
        for row, iou in (rows | {'not matched': None}).items():
            columns = zip(*curve(name, scores, iou))
            cells = [f'{loss:6.3f} {gradient:+.3f}' for loss, gradient in columns]
            print(f'{name:8}{row:16}' + '    '.join(cells))
        print()
    print('At p = 0.95 and IoU 0.5, mal costs most. With the class weights (stable: 6), stable\n'
          'costs most. At p = 0.25 and IoU 0.5, stable costs nothing: the score is its target\n'
          's^2. At IoU 0, a match is background in vfl and stable, but not in mal. At IoU 1, a\n'
          'match costs the same in vfl, mal and bce.')

    print('\nStable-DINO Table 1. A has the better box (IoU 0.75, p = 0.25), B the higher score\n'
          '(IoU 0.5, p = 0.75). One is matched, the other is not.\n')
    predictions = {'A': (0.25, 0.75), 'B': (0.75, 0.5)}  # score p, IoU
    for name, matched in (('focal', 'A'), ('focal', 'B'), ('stable', 'A'), ('stable', 'B')):
        row = f'{name:8}{matched} matched'
        for letter, (p, iou) in predictions.items():
            _, gradient = curve(name, torch.tensor([p]), iou if letter == matched else None)
            word = 'encourage' if gradient < 0 else 'restrain'
            row += f'    {word:9} {letter} {gradient.item():+.3f}'
        print(row)
    print('\nfocal encourages the matched prediction. stable encourages only A: a matched B has\n'
          'target s^2 = 0.25 < p, so B is restrained (the paper: "no encourage"). Both\n'
          'restrain an unmatched A slightly, since its score is low. The rescale is left out:\n'
          'it would encourage B if B were the best match of its image.')
