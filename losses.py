"""Classification and box losses of matched queries, and the divisors of their sums.

Letters: B images, L decoder layers, N queries, C classes, P matched pairs, M boxes of an
image. The row of N queries is cut into G groups. Each group is matched on its own, with K
copies of every ground truth box.

A matched query has one matched entry: the column of its ground truth's class. Its other
C - 1 entries and all C entries of an unmatched query are background. An entry's loss is

    weight * BCE(p, t) = weight * (-t log p - (1-t) log(1-p)),   p = sigmoid(logit)

in every row of this table but ce. s is the IoU of the query with its ground truth (q on
the DEIM slides).

    loss    source              matched: t, weight   background: weight, t = 0   a match at IoU 0
    ce      DETR                softmax: -log p      0.1: -0.1 log p(no object)  in full
    bce     DEIM slides         1, 1                 1                           in full
    focal   Deformable DETR,    1, alpha (1-p)^2     (1-alpha) p^2, alpha = 1/4  in full
            DEIM slides         (Stable-DINO Eq. 1 has no alpha)
    vfl     DEIM slides         s, s                 3/4 p^2                     background
    mal     DEIM slides, Eq. 3  s^gamma, 1           p^gamma, gamma = 1.5        t = 0, weight 1
    stable  Stable-DINO, Eq. 3  f1(s), |f1(s)-p|^2   p^2                         background

ce, bce and focal ask every matched query for score 1. vfl, mal and stable ask for the score
that its box deserves. No gradient flows through s: the score learns from the box, never the
box from the score.

The default is the paper's form. `official=True` is the form of the released code:

    vfl     background's p^2 has no gradient, and a match at IoU 0 costs nothing (DEIM)
    mal     background's p^gamma has no gradient (DEIM)
    stable  matched entries weigh 1/4, background 3/4 (Stable-DINO)

Three numbers stand in the codes only: 3/4 of vfl, 1.5 of mal, and the exponents 2 of
stable. Two more points of Stable-DINO's code are left out: exp and sin in F1 take s^2,
and the rescale never scales down.

The table divides the sum over queries, classes and images. n_box is the number of ground truth
boxes of the step: of all its batches, averaged over the processes. A divisor below 1
counts as 1. The papers give two divisors: n_box for boxes (DETR), and the mean over groups
(Group DETR Eq. 7).

    sum                official code                           here
    one-to-one         n_box; D-FINE (DEIM): boxes by the      n_box
                       number of all layers' joint matches
    one-to-many        K * n_box, also for copies without      K * n_box
                       a query (H-DETR)
    G groups           G * n_box (Group DETR)                  n_box, weight 1/G: the same
    encoder, one head  n_box, labels 0 (H-DETR); full labels,  n_box, labels 0
                       900 or 300 tokens (Stable-DINO, DEIM)
    encoder, G heads   G * n_box, full labels (Group DETR)     proposal copies * n_box, labels
                                                               0, weight of its group
    denoising groups   groups * n_box, class weight 1          groups * n_box, the loss's
                       (Stable-DINO)                           class weight
    ce                 sum of the queries' weights (DETR)      the same, per group

Background has the divisor of its group's matches. In a layer without copies that is n_box.

This file needs torch and torchvision only, and can be copied alone. `python losses.py`
prints every loss at several scores and IoUs.
"""
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_area, box_convert, box_iou

# L1 and GIoU: all official codes. No code has bce; stable's is in Stable-DINO §4.1.
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

# Matched entries: p (their scores) and quality (IoU s; stable: f1(s)) -> target t and weight.
MATCHED = {
    'bce': lambda p, quality, settings: (1.0, 1.0),
    'focal': lambda p, quality, settings: (1.0, 0.25 * (1 - p) ** 2),
    # Good matches weigh more. A match without overlap is background.
    'vfl': lambda p, quality, settings: (
        quality, torch.where(quality > 0, quality, 0.0 if settings.official else 0.75 * p ** 2)),
    # A confident query with a bad box pays in full; in vfl its small IoU is the weight.
    'mal': lambda p, quality, settings: (quality ** settings.mal_gamma, 1.0),
    # A match with a bad box is hardly encouraged, so an early mistake does not confirm itself
    # (Stable-DINO §2.4.1, Fig. 3). The weight has a gradient.
    'stable': lambda p, quality, settings: (
        quality, (quality - p) ** 2 * (0.25 if settings.official else 1.0))}

# Background entries: p -> c and w of the loss c * w * BCE(p, 0).
# Speed: `background_loss` multiplies the sum by the constant c, not each of L*B*N*C entries.
BACKGROUND = {
    'bce': lambda p, settings: (1.0, 1.0),
    # Most of the background already has a low score, and p^2 makes it count little.
    'focal': lambda p, settings: (0.75, p ** 2),
    'vfl': lambda p, settings: (0.75, (p.detach() if settings.official else p) ** 2),
    'mal': lambda p, settings: (
        1.0, (p.detach() if settings.official else p) ** settings.mal_gamma),
    'stable': lambda p, settings: (0.75 if settings.official else 1.0, p ** 2)}


def match_loss(logits: Tensor, quality: Tensor, settings: LossSettings) -> Tensor:
    """Loss of matched entries.

    With logit x, -log(1-p) = softplus(x) and -log p = softplus(x) - x. So BCE(p, t) is
    softplus(x) - t x, which is safe for any x.
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
    """Every loss but ce, for every entry: logits, matched (0 or 1) and quality of one shape.

    For examples and tests: `set_loss` does the same without a one-hot `matched`.
    """
    loss = match_loss(logits, quality, settings)
    return torch.where(matched > 0, loss, background_loss(logits, settings))


def ce_loss(logits: Tensor, matched: Tensor, no_object: float = 0.1) -> tuple[Tensor, Tensor]:
    """DETR's softmax cross-entropy, whose column C is "no object".

    logits (..., C+1), matched (..., C) of 0 and 1 -> weighted loss (...) and its weight (...).
    The weight is 1 for matched and 0.1 for unmatched queries, since most are unmatched.
    """
    is_matched = matched.sum(-1)
    target = torch.cat([matched, 1 - is_matched[..., None]], -1)
    weight = is_matched + no_object * (1 - is_matched)
    return -(target * logits.log_softmax(-1)).sum(-1) * weight, weight


# f1(s) of Stable-DINO Table 7: s is a matched query's IoU, p its score. Behind each stands the
# paper's AP (class weight 10, plain cost, no fusion, NMS; focal loss: 49.2). With p in f1, a
# confident match with a bad box is encouraged: a conflict that IoU alone resolves (§4.4).
F1 = {'s0.5': lambda s, p: s ** 0.5,  # 49.3
      's1': lambda s, p: s,  # 49.4
      's2': lambda s, p: s ** 2,  # 49.6, the paper's choice
      's3': lambda s, p: s ** 3,  # 49.4
      's1p0.25': lambda s, p: s * p ** 0.25,  # 48.6
      's1p1': lambda s, p: s * p,  # 26.4
      's2p1': lambda s, p: s ** 2 * p,  # 27.4
      'exp': lambda s, p: (s.exp() - 1) / (math.e - 1),  # 49.6
      'sin': lambda s, p: (s * math.pi / 2).sin()}  # 48.5: concave, so near 1 too soon


def stable_target(iou: Tensor, score: Tensor, owner: Tensor, peak: Tensor | None,
                  f1: str = 's2') -> Tensor:
    """Targets f1(s) of Stable-DINO Eq. 3, without gradient: iou, score (P,) -> (P,).

    Early in training every IoU is small, and so is every f1(s). An owner is one image in
    one layer and group. The rescale (§2.2) multiplies the targets of an owner's pairs by
    one factor, so that the largest becomes the owner's peak.
        'one'      The peak is 1. This is better with 300 queries.
        'max-iou'  The peak is `largest_iou`. This is better with 900 queries.
        'none'     The peak is None. With p in f1, a low score then gets a lower target.
    `owner` (P,) int64 is the owner of each pair, and `peak` has one number per owner.
    Pairs of an owner whose IoUs are all 0 keep target 0.
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
    # GIoU = IoU - (hull - union) / hull
    return iou, iou - (hull - union) / hull


def largest_iou(boxes: Tensor, gt_boxes: Sequence[Tensor], sizes: list[int]) -> Tensor:
    """Largest IoU of any query of a group with any ground truth of its image.

    boxes (L,B,N,4), gt_boxes: B tensors (M_b,4), sizes: queries of each group -> (L,B,G).
    """
    xyxy = box_convert(boxes.detach(), 'cxcywh', 'xyxy')
    of_images = []
    for b, gt in enumerate(gt_boxes):
        iou = box_iou(xyxy[:, b].flatten(0, 1), box_convert(gt, 'cxcywh', 'xyxy'))  # (L*N, M)
        iou = iou.view(len(xyxy), boxes.shape[2], len(gt))
        # Padding: 0 if a group has no query or an image no box.
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
    matches: layer, image, query and ground truth of each pair, 4 x (P,). Ground truths are
    numbered through the batch.
    groups: each has `queries`, `copies` (a number per layer) and `weight`.
    num_boxes: n_box.
    Returns three scalars and the IoU (P,), through which no gradient flows.
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
            # The owner of a pair is entry (layer, image, group) of (L, B, G), as one number.
            owner = (layer * B + image) * len(groups) + group_of[query]  # (P,)
            peak = None
            if settings.rescale == 'one':
                peak = torch.ones_like(weight).repeat(L * B)
            elif settings.rescale == 'max-iou':
                peak = largest_iou(boxes, gt_boxes, sizes).flatten()
            quality = stable_target(iou, pair_logits.sigmoid(), owner, peak, settings.f1)
        # Speed: all entries are summed as background, then those of the pairs are exchanged.
        # A one-hot target would double the work. The error is 1e-7 of the sum in float32.
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

    outputs: logits and boxes of the decoder, then of the encoder.
    `encoder_matches` and `proposal_groups` belong to the encoder.
    The other arguments are those of `set_loss`.
    Returns the weighted parts, whose sum is the loss, and the IoU (P,) of the decoder's pairs.
    """
    pred_logits, pred_boxes, encoder_logits, encoder_boxes = outputs
    # With ce the encoder keeps the focal loss, since a sigmoid ranks its proposals.
    encoder_settings = settings
    if settings.cls_loss == 'ce':
        encoder_settings = settings._replace(cls_loss='focal', class_weight=None)
    # The encoder's label 0 means "object". Its other columns are background in every token.
    object_labels = [torch.zeros_like(labels) for labels in gt_labels]
    *decoder, iou = set_loss(pred_logits, pred_boxes, gt_labels, gt_boxes, matches, groups,
                             num_boxes, settings)
    *encoder, _ = set_loss(encoder_logits, encoder_boxes, object_labels, gt_boxes, encoder_matches,
                           proposal_groups, num_boxes, encoder_settings)
    names = ('class', 'l1', 'giou', 'encoder_class', 'encoder_l1', 'encoder_giou')
    return dict(zip(names, (*decoder, *encoder))), iou


# --- The worked example ---

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
    print('At p = 0.95 and IoU 0.5, a sure query with a bad box, mal pays most; with the class\n'
          'weights (stable: 6), stable does. At p = 0.25 and IoU 0.5, stable pays nothing: the\n'
          'score is its target s^2. At IoU 0, vfl and stable treat the match as background, and\n'
          'mal does not. At IoU 1, a match costs in vfl and mal what it costs in bce.')
