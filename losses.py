"""What an assignment costs: the classification and box losses, and what they are divided by.

Letters as in matchers.py: B images, L decoder layers, N queries, C classes, P matched pairs, M boxes of an image, K
copies, G groups. Every classification loss but ce is, for an entry (a query and a class) with score p =
sigmoid(logit),

    weight * BCE(p, t) = weight * (-t log p - (1-t) log(1-p))

A matched query has one matched entry, in the column of its ground truth's class; its other C - 1, and all C of the
other queries, are not matched. In the table s is the IoU of a matched query with its ground truth (q on the DEIM
slides):

    loss     source                matched: t and weight       not matched: t = 0 and weight    a match at IoU 0
    ce       DETR                  softmax: -log p             0.1: -0.1 log p(no object)       counts in full
    bce      DEIM slides           1, 1                        1                                counts in full
    focal    Deformable DETR,      1, alpha (1-p)^2            (1-alpha) p^2, alpha = 1/4       counts in full
             DEIM slides           (Stable-DINO Eq. 1: without alpha)
    vfl      DEIM slides           s, s                        3/4 p^2 (numbers of the code)    is background
    mal      DEIM slides, Eq. 3    s^gamma, 1                  p^gamma, gamma = 1.5             pushed to 0, weight 1
    stable   Stable-DINO, Eq. 3    f1(s), |f1(s)-p|^2          p^2                              is background

ce, bce and focal ask every matched query for score 1; vfl, mal and stable for as much as its box deserves. No gradient
flows through s (official codes): the score learns from the box, never the box from the score.

Where paper and released code part ways, the paper's form is the default and `official=True` the code's:
    vfl     a match at IoU 0 costs nothing, and p^2 in the weight is not differentiated (DEIM)
    mal     p^gamma is not differentiated (DEIM; the slides say nothing on gradients)
    stable  positives weigh 1/4, negatives 3/4 (Stable-DINO)
Stable-DINO's exponent 2 is its code's, since the paper gives none. Not taken from there: F1's exp and sin of s^2
instead of s, and a rescale that never scales down.

What divides the sum over queries, classes and images, where n_box is the number of ground truth boxes of the step
(of all its batches; averaged over the processes; a divisor below 1 counts as 1):

    what                     in the paper                  in the official code                here
    one-to-one               n_box for boxes (DETR), else  n_box                               n_box
                             unsaid
    DEIM on D-FINE           unsaid                        class n_box; boxes the size of      n_box
                                                           the union of all layers' matches
    one-to-many, K copies    unsaid (H-DETR Eq. 2)         K * n_box: repeated boxes count,    K * n_box
                                                           also those without a query
    G groups                 mean over groups (Group       G * n_box, the same                 n_box, weight 1/G
                             DETR Eq. 7)
    encoder, one head        unsaid (H-DETR,               n_box, labels all 0 (H-DETR); full  n_box, labels all 0
                             Stable-DINO, DEIM)            labels, 900 or 300 best tokens
                                                           (Stable-DINO, DEIM)
    encoder, a head a group  unsaid (Group DETR)           G * n_box, full labels              proposal_copies * n_box,
                                                                                               weight of the group,
                                                                                               labels all 0
    denoising groups         unsaid                        groups * n_box, class weight 1 in   groups * n_box, the same
                                                           Stable-DINO                         class weight
    background               the same divisor as the matches of its group; of a layer without copies n_box
    ce                       unsaid (DETR)                 sum of the weights of all queries   the same, of each group

This file needs torch and torchvision only, and can be copied alone. `python losses.py` prints what each loss makes of
score and IoU.
"""
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_area, box_convert, box_iou


L1_WEIGHT, GIOU_WEIGHT = 5.0, 2.0   # in all official codes
# In the official codes; stable: Stable-DINO §4.1. No code has bce.
CLASS_WEIGHTS = dict(ce=1.0, bce=1.0, focal=2.0, vfl=1.0, mal=1.0, stable=6.0)


class LossSettings(NamedTuple):
    """What the class loss is, and weighs."""
    cls_loss: str = 'focal'     # a name of CLASS_WEIGHTS
    class_weight: float | None = None   # None: CLASS_WEIGHTS
    mal_gamma: float = 1.5      # gamma above, at least 1 (official code of DEIM; the slides give none)
    f1: str = 's2'              # stable: a name of F1
    rescale: str = 'one'        # stable: one, max-iou or none
    official: bool = False      # vfl, mal, stable: the released code's form


# --- Classification losses: a row of the table above each -----------------------------------------------------------

# Scores p of matched entries and the quality of their boxes (the IoU s; stable: f1(s)) -> target t and weight of
# BCE(p, t).
MATCHED = {
    'bce': lambda p, quality, how: (1.0, 1.0),
    'focal': lambda p, quality, how: (1.0, 0.25 * (1 - p) ** 2),
    # Good matches weigh more, and a match without overlap is as good as none.
    'vfl': lambda p, quality, how: (quality, torch.where(quality > 0, quality, 0.0 if how.official else 0.75 * p ** 2)),
    # A confident query with a bad box pays in full, where vfl would weigh it with its small IoU.
    'mal': lambda p, quality, how: (quality ** how.mal_gamma, 1.0),
    # A match with a bad box is hardly encouraged, so an early mistake does not confirm itself (Stable-DINO §2.4.1),
    # and fewer objects change their query between layers (Fig. 3). The factor is differentiated, as in the code.
    'stable': lambda p, quality, how: (quality, (quality - p) ** 2 * (0.25 if how.official else 1.0))}

# Scores p of all other entries -> c and w of the loss c * w * BCE(p, 0). The constant c is kept apart, since on each of
# the L*B*N*C entries, of which there are millions, it would be one pass more: `background_loss` applies it to the sum.
BACKGROUND = {
    'bce': lambda p, how: (1.0, 1.0),
    # Most of the background scores low already, and hardly counts then.
    'focal': lambda p, how: (0.75, p ** 2),
    'vfl': lambda p, how: (0.75, (p.detach() if how.official else p) ** 2),
    'mal': lambda p, how: (1.0, (p.detach() if how.official else p) ** how.mal_gamma),
    'stable': lambda p, how: (0.75 if how.official else 1.0, p ** 2)}


def match_loss(logits: Tensor, quality: Tensor, how: LossSettings) -> Tensor:
    """Loss of matched entries. With logit x, -log(1-p) = softplus(x) and -log p = softplus(x) - x: so BCE(p, t) is
    softplus(x) - t x, which is safe for any x."""
    target, weight = MATCHED[how.cls_loss](logits.sigmoid(), quality, how)
    return weight * (F.softplus(logits) - target * logits)


def background_loss(logits: Tensor, how: LossSettings, dim: Sequence[int] = ()) -> Tensor:
    """Loss of all other entries; if `dim` is given, its sum over these dimensions."""
    constant, weight = BACKGROUND[how.cls_loss](logits.sigmoid(), how)
    loss = weight * F.softplus(logits)
    return constant * (loss.sum(dim) if dim else loss)


def class_loss(logits: Tensor, matched: Tensor, quality: Tensor, how: LossSettings = LossSettings()) -> Tensor:
    """Every loss but ce, of every entry: logits, matched (0 or 1, one-hot) and quality, of one shape. The plain form
    of what `set_loss` sums without a one-hot target."""
    return torch.where(matched > 0, match_loss(logits, quality, how), background_loss(logits, how))


def ce_loss(logits: Tensor, matched: Tensor, no_object: float = 0.1) -> tuple[Tensor, Tensor]:
    """DETR's softmax cross-entropy, column C for "no object": (...,C+1), (...,C) -> weighted loss (...), weight (...).

    The weight is 1 for matched queries and 0.1 for the others, of which there are far more.
    """
    is_matched = matched.sum(-1)
    target = torch.cat([matched, 1 - is_matched[..., None]], -1)
    weight = is_matched + no_object * (1 - is_matched)
    return -(target * logits.log_softmax(-1)).sum(-1) * weight, weight


# Stable-DINO Table 7: what a matched query's score is supervised with; s its IoU, p its score. Beside it the paper's AP
# (class weight 10, no cost of Eq. 4, no fusion, NMS; DINO's focal loss has 49.2). With p in it a confident match with a
# bad box is encouraged, too: the conflict that IoU alone resolves (§2.4.1, §4.4). Without a rescale scores can also
# die out, since low ones ask for lower ones; the paper leaves open whether its rows have one.
# (Not the F1 score: f_1 of Eq. 3, without the rescale, which `stable_target` adds.)
F1 = {'s0.5': lambda s, p: s ** 0.5,                         # 49.3
      's1': lambda s, p: s,                                  # 49.4
      's2': lambda s, p: s ** 2,                             # 49.6, the paper's choice
      's3': lambda s, p: s ** 3,                             # 49.4
      's1p0.25': lambda s, p: s * p ** 0.25,                 # 48.6
      's1p1': lambda s, p: s * p,                            # 26.4
      's2p1': lambda s, p: s ** 2 * p,                       # 27.4
      'exp': lambda s, p: (s.exp() - 1) / (math.e - 1),      # 49.6
      'sin': lambda s, p: (s * math.pi / 2).sin()}           # 48.5: concave, near 1 too soon


def stable_target(iou: Tensor, score: Tensor, owner: Tensor, peak: Tensor | None, f1: str = 's2') -> Tensor:
    """f1(s) of Stable-DINO Eq. 3 for P pairs: iou, score (P,) -> (P,), no gradient.

    Early in training all IoUs are small, and so would all targets be. The rescale (§2.2) multiplies the targets of an
    owner's pairs by one factor, so that the largest of them becomes `peak`, however bad its box. An owner is an image
    in one layer and group (all denoising queries are one).
        'one'      1: better with 300 queries, and what the official code does with 900, too;
        'max-iou'  the largest IoU of any query of the owner with any ground truth (`largest_iou`): better with 900.
                   Where f1(s) > s, this may scale down.
    owner (P,) int64: which one a pair belongs to; peak: one number for each owner, or None without a rescale. Pairs
    that all have IoU 0 keep target 0.
    """
    target = F1[f1](iou, score).detach()
    if peak is None:
        return target
    largest = torch.zeros_like(peak).scatter_reduce(0, owner, target, 'amax')   # (owners,)
    factor = peak / largest.clamp(min=1e-12)
    return target * factor[owner]


# --- The loss of all layers, images and groups at once --------------------------------------------------------------

def pair_iou(boxes_xyxy: Tensor, others_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and GIoU of box i with other box i: (P,4), (P,4) -> (P,), (P,).

    torchvision's box_iou would compute all P x P, and its generalized_box_iou_loss indexes by a mask, for which the CPU
    has to wait for the GPU.
    """
    (a_min, a_max), (b_min, b_max) = (x.split(2, 1) for x in (boxes_xyxy, others_xyxy))
    w, h = (torch.minimum(a_max, b_max) - torch.maximum(a_min, b_min)).clamp(min=0).unbind(1)
    hull_w, hull_h = (torch.maximum(a_max, b_max) - torch.minimum(a_min, b_min)).unbind(1)
    overlap, hull = w * h, hull_w * hull_h
    union = box_area(boxes_xyxy) + box_area(others_xyxy) - overlap   # above 0: every ground truth has an area
    iou = overlap / union
    return iou, iou - (hull - union) / hull


def largest_iou(boxes: Tensor, gt_boxes: Sequence[Tensor], sizes: list[int]) -> Tensor:
    """Largest IoU of any query of a group with any ground truth of its image: (L,B,N,4), B x (M,4) -> (L,B,G)."""
    xyxy = box_convert(boxes.detach(), 'cxcywh', 'xyxy')
    of_images = []
    for b, gt in enumerate(gt_boxes):
        iou = box_iou(xyxy[:, b].flatten(0, 1), box_convert(gt, 'cxcywh', 'xyxy'))                      # (L*N, M)
        of_queries = F.pad(iou, (1, 0)).amax(1).view(boxes.shape[0], -1)     # (L, N); 0 in an image without boxes
        of_images.append(torch.stack([part.amax(1) for part in of_queries.split(sizes, 1)], 1))         # (L, G)
    return torch.stack(of_images, 1)


def set_loss(logits: Tensor, boxes: Tensor, gt_labels: Sequence[Tensor], gt_boxes: Sequence[Tensor], matches, groups,
             num_boxes: float | Tensor, how: LossSettings = LossSettings()) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weighted class, L1 and GIoU loss of a row of queries, and the IoU of every pair.

    logits (L,B,N,C), boxes (L,B,N,4); gt_labels, gt_boxes: B tensors (M_b,), (M_b,4); matches: P pairs (layer, image,
    query, gt), gt counts through the batch; groups: how the row is cut (matchers.QueryGroup); num_boxes: n_box above.
    Returns three scalars and IoU (P,), through which no gradient flows.
    """
    logits, boxes = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logits, boxes))   # half is too coarse
    (L, B, N, _), (layer, image, query, gt) = logits.shape, matches
    sizes = [group.queries for group in groups]
    # Without output_size, repeat_interleave would ask the GPU for the sum; without non_blocking, the CPU would wait.
    repeats = torch.tensor(sizes).to(logits.device, non_blocking=True)
    group_of = torch.arange(len(groups), device=logits.device).repeat_interleave(repeats, output_size=N)     # (N,)
    numbers = torch.tensor([[group.weight, *group.copies] for group in groups], dtype=boxes.dtype).T        # (1+L, G)
    numbers = numbers.to(boxes.device, non_blocking=True)
    weight, copies = numbers[0], numbers[1:]                                                            # (G,), (L, G)
    # What the loss of query q in layer l is multiplied by, g its group, by the table of divisors above:
    # scale_lq = weight_g / max(1, max(1, copies_lg) * n_box)
    scale = (weight / (copies.clamp(min=1) * num_boxes).clamp(min=1.0))[:, group_of]                    # (L, N)

    pair, pair_scale = (layer, image, query), scale[layer, query]
    pred, target = boxes[pair], torch.cat(list(gt_boxes))[gt]                                           # (P, 4) each
    l1_loss = ((pred - target).abs().sum(1) * pair_scale).sum()
    iou, giou = pair_iou(box_convert(pred, 'cxcywh', 'xyxy'), box_convert(target, 'cxcywh', 'xyxy'))
    giou_loss = ((1 - giou) * pair_scale).sum()
    iou = iou.detach()

    label = torch.cat(list(gt_labels))[gt]
    if how.cls_loss == 'ce':
        matched = torch.zeros_like(logits[..., :-1])                                                    # (L, B, N, C)
        matched = matched.index_put((*pair, label), torch.ones_like(iou))
        losses, weights = ce_loss(logits, matched)                                                      # (L, B, N)
        divisor = torch.stack([part.sum((1, 2)) for part in weights.split(sizes, 2)], 1)                # (L, G)
        loss = (losses.sum(1) * (weight / divisor)[:, group_of]).sum()
    else:
        pair_logits, quality = logits[(*pair, label)], iou                                              # (P,) each
        if how.cls_loss == 'stable':
            # The largest target of each layer, image and group is rescaled by itself: entry (l, b, g) of (L, B, G), as
            # one number.
            owner = (layer * B + image) * len(groups) + group_of[query]                             # (P,)
            peak = None
            if how.rescale == 'one':
                peak = torch.ones_like(weight).repeat(L * B)
            elif how.rescale == 'max-iou':
                peak = largest_iou(boxes, gt_boxes, sizes).flatten()
            quality = stable_target(iou, pair_logits.sigmoid(), owner, peak, how.f1)
        # Unmatched queries are background in every class, and pay no box loss. Nearly all entries are background, so
        # all are counted as such, and those of the pairs then exchanged: a one-hot target would cost as much again.
        # (In float32 the difference of the two leaves an error of 1e-7 of the larger one.)
        all_background = (background_loss(logits, how, (1, 3)) * scale).sum()   # (L, N): summed over images, classes
        exchange = (match_loss(pair_logits, quality, how) - background_loss(pair_logits, how)) * pair_scale   # (P,)
        loss = all_background + exchange.sum()
    class_weight = CLASS_WEIGHTS[how.cls_loss] if how.class_weight is None else how.class_weight
    return class_weight * loss, L1_WEIGHT * l1_loss, GIOU_WEIGHT * giou_loss, iou


def criterion(outputs, gt_labels: Sequence[Tensor], gt_boxes: Sequence[Tensor], matches, encoder_matches, groups,
              proposal_groups, num_boxes: float | Tensor,
              how: LossSettings = LossSettings()) -> tuple[dict[str, Tensor], Tensor]:
    """The loss of a step: H-DETR Eq. 1-6, Group DETR Eq. 7, whichever the groups say.

    outputs: the detector's `Outputs`; gt_labels, gt_boxes: B tensors (M_b,), (M_b,4); matches and groups of the
    decoder's and the encoder's row (matchers.py); num_boxes: n_box above.
    Returns the weighted parts, whose sum is the loss, and the IoU (P,) of the decoder's matched pairs.
    """
    pred_logits, pred_boxes, encoder_logits, encoder_boxes = outputs
    # DETR had no encoder proposals, and softmax no score that ranks them: they keep the focal loss.
    encoder_how = how._replace(cls_loss='focal', class_weight=None) if how.cls_loss == 'ce' else how
    # Column 0 of the encoder's C means "object"; the others are background in every token (official code of H-DETR).
    object_or_not = [torch.zeros_like(labels) for labels in gt_labels]
    *decoder, iou = set_loss(pred_logits, pred_boxes, gt_labels, gt_boxes, matches, groups, num_boxes, how)
    *encoder, _ = set_loss(encoder_logits, encoder_boxes, object_or_not, gt_boxes, encoder_matches, proposal_groups,
                           num_boxes, encoder_how)
    names = ('class', 'l1', 'giou', 'encoder_class', 'encoder_l1', 'encoder_giou')
    return dict(zip(names, (*decoder, *encoder))), iou


# --- The example of the docstring, printed --------------------------------------------------------------------------

def curve(name: str, p: Tensor, iou: float | None) -> tuple[Tensor, Tensor]:
    """Loss and its gradient by the logit of queries with scores p (n,), matched at this IoU, or not (None)."""
    x, matched, s = torch.logit(p).requires_grad_(), torch.full_like(p, iou is not None), torch.full_like(p, iou or 0.0)
    if name == 'ce':   # one class against "no object"
        loss, _ = ce_loss(torch.stack([x, torch.zeros_like(x)], -1), matched[:, None])
    else:
        loss = class_loss(x, matched, F1['s2'](s, p) if name == 'stable' else s, LossSettings(name))
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


if __name__ == '__main__':
    import argparse
    argparse.ArgumentParser(description='What each classification loss makes of score and IoU.').parse_args()
    scores = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    print("loss and gradient by the logit (below 0: the score is pushed up), the papers' forms before their class "
          'weights;\nstable: f1(s) = s^2 before the rescale\n\n' + ' ' * 25
          + ''.join(f'p = {p:<13g}' for p in scores.tolist()))
    for name in ('ce', *MATCHED):
        by_iou = name in ('vfl', 'mal', 'stable')
        for iou in (*((0.0, 0.5, 0.75, 1.0) if by_iou else (1.0,)), None):
            what = 'not matched' if iou is None else f'match, IoU {iou:g}' if by_iou else 'match, any IoU'
            cells = [f'{loss:6.3f} {gradient:+.3f}   ' for loss, gradient in zip(*curve(name, scores, iou))]
            print(f'{name:8}{what:16}' + ' '.join(cells).rstrip())
        print()
    print('At p = 0.95 and IoU 0.5, a sure query with a bad box, mal pays most; with the class weights (stable: 6), '
          'stable does.\nAt p = 0.25 and IoU 0.5, stable pays nothing: the score is its target s^2. At IoU 0, vfl and '
          'stable are as if not\nmatched, mal is not. At IoU 1, a match costs in vfl and mal what it costs in bce.')
