"""Who is assigned to whom: every matching scheme of the papers as one row of one table.

A detector answers with a fixed row of N queries, each a box and C class scores. Training needs to know which query
has to answer for which object. The row is cut into groups, and a group is three things: how many queries it has, how
many copies of every ground truth it must find in each decoder layer, and what its loss weighs. Nothing else tells the
schemes apart; `query_groups` below is the whole subject.

The letters, the same in every file of this project:

    B images of a batch    L decoder layers       N queries in the row      C classes
    M boxes of one image   K copies of each box   G groups                  S tokens of the encoder
    P matched pairs        D width of a token     V levels of the feature pyramid

Boxes are (cx, cy, w, h) as fractions of the image; `boxes_xyxy` says so where they are not.

Papers: H-DETR = "DETRs with Hybrid Matching"; Group DETR = "Group DETR: Fast DETR Training with Group-Wise
One-to-Many Assignment". This file needs torch, scipy and torchvision only, and can be copied alone.
"""
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou


class QueryGroup(NamedTuple):
    """One consecutive piece of the query row: its size, its copies K in each of the L layers, its loss weight."""
    queries: int
    copies: tuple[int, ...]
    weight: float = 1.0


def query_groups(scheme: str, layers: int, progress: float = 0.0, *, n: int, T: int = 0, K: int = 1,
                 weight: float = 1.0, rho: float = 2 / 3, L1: int = 0, G: int = 1) -> list[QueryGroup]:
    """The table row of a scheme: the groups that are trained at `progress` (0 at the start, 1 at the end of training).

    The first group is the detector: the others exist only in training (Group DETR Alg. 1, H-DETR §3.2.1). It stays
    free of NMS because its own assignment is one-to-one and its self-attention sees no other group.

    n: queries of the first group; T, K, weight (lambda in the paper): queries, copies and loss weight of the
    one-to-many part; rho, L1: the part of training and the number of first layers that are one-to-many; G: groups.
    Raises ValueError for a scheme that is not in the table.
    """
    one, many = (1,) * layers, (K,) * layers
    table = {
        # DETR: every ground truth has one query, all others learn "nothing here".
        'one2one': [QueryGroup(n, one)],
        # H-DETR §3.2.1, Eq. 1-2: L_one2one + lambda * L_one2many.
        'branch': [QueryGroup(n, one), QueryGroup(T, many, weight)],
        # H-DETR §3.2.2, Eq. 3-4: one-to-many for the first rho of training, then one-to-one.
        'epoch': [QueryGroup(n, many if progress < rho else one)],
        # H-DETR §3.2.2, Eq. 5-6: one-to-many on the first L1 layers. (Eq. 6 as printed counts layer L1 twice.)
        'layer': [QueryGroup(n, many[:L1] + one[L1:])],
        # Group DETR Eq. 5-7: the mean of G one-to-one losses.
        'group': [QueryGroup(n, one, 1 / G)] * G,
        # H-DETR Table 13 row 1, Group DETR Table 7 (b): duplicates are never punished, so inference needs NMS.
        'one2many': [QueryGroup(n, many)],
    }
    if scheme not in table:
        raise ValueError(f'unknown scheme {scheme!r}: choose from {", ".join(table)}')
    return [group for group in table[scheme] if group.queries > 0]   # T = 0 is the baseline


class Matches(NamedTuple):
    """P matched pairs: prediction [layer, image, query] answers for ground truth `gt` of the batch's concatenated
    boxes. All int64 of shape (P,)."""
    layer: Tensor
    image: Tensor
    query: Tensor
    gt: Tensor


def matching_cost(pred_logits: Tensor, pred_boxes: Tensor, gt_labels: Tensor, gt_boxes: Tensor) -> Tensor:
    """What it would cost to make query n answer for ground truth m: (L,N,C), (L,N,4), (M,), (M,4) -> (L,N,M).

        cost = 2 * class + 5 * |box - gt|_1 - 2 * GIoU
        class = alpha (1-p)^2 (-log p) - (1-alpha) p^2 (-log(1-p)),  p the score of gt's class, alpha = 1/4

    The class part is what the focal loss would change by if the query became positive (Deformable DETR's and H-DETR's
    official code; H-DETR gives no formula, Stable-DINO Eq. 2 has it without alpha). All layers at once, and only with
    the image's own ground truths; the official code computes every image against the boxes of the whole batch.
    """
    # Only the columns of classes that are present matter: M of C, before any arithmetic.
    p = pred_logits[..., gt_labels].sigmoid()                                               # (L, N, M)
    positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    negative = 0.75 * p ** 2 * -(1 - p + 1e-8).log()
    boxes = pred_boxes.flatten(0, 1)                                                        # (L*N, 4)
    l1 = torch.cdist(boxes, gt_boxes, p=1).view_as(p)
    giou = generalized_box_iou(box_convert(boxes, 'cxcywh', 'xyxy'), box_convert(gt_boxes, 'cxcywh', 'xyxy'))
    return 2 * (positive - negative) + 5 * l1 - 2 * giou.view_as(p)


def one_to_many(cost: Tensor, copies: int) -> tuple[Tensor, Tensor]:
    """Hungarian assignment in which every ground truth wants `copies` queries: (N,M) on the CPU -> query_idx, gt_idx.

    Repeating the ground truths K times and solving one-to-one *is* the one-to-many matching of H-DETR (Eq. 2): equal
    columns compete for different queries. The copies are tiled here, after the cost was computed once. When K*M is
    more than N, the N cheapest pairs in sum are made and the other copies stay without a query.
    """
    query_idx, column = linear_sum_assignment(cost.repeat(1, copies).numpy())
    return torch.from_numpy(query_idx), torch.from_numpy(column) % max(cost.shape[1], 1)


def assign(costs: list[Tensor], groups: list[QueryGroup]) -> Matches:
    """Solve every layer, image and group by itself: B costs (L,N,M_b) on the CPU -> Matches on the CPU.

    Groups never compete for a ground truth, and neither do the layers: each is matched anew.
    """
    found, first_gt = [], 0
    for image, cost in enumerate(costs):
        first_query = 0
        for group in groups:
            rows = cost[:, first_query:first_query + group.queries]
            for layer, copies in enumerate(group.copies):
                query_idx, gt_idx = one_to_many(rows[layer], copies)
                here = torch.tensor([[layer], [image]]).expand(2, len(query_idx))
                found.append(torch.cat([here, query_idx[None] + first_query, gt_idx[None] + first_gt]))
            first_query += group.queries
        first_gt += cost.shape[2]
    return Matches(*torch.cat(found, 1))


@torch.no_grad()   # an assignment is a choice, not a function: no gradient goes through it, only through the losses
def match(pred_logits: Tensor, pred_boxes: Tensor, encoder_logits: Tensor, encoder_boxes: Tensor,
          gt_labels: list[Tensor], gt_boxes: list[Tensor], groups: list[QueryGroup]) -> tuple[Matches, Matches]:
    """Match all layers, images and groups of a training step, and the encoder's proposals: -> (decoder, encoder).

    pred_* (L,B,N,.), encoder_* (E,B,S,.) with E encoder heads, gt_* B tensors (M_b,) and (M_b,4). The encoder is
    matched one-to-one with every label 0, since it only ranks "object or not" (H-DETR's code; its paper is silent).
    The GPU is waited for once: all costs cross to the CPU in one transfer. The official code crosses once for each
    of the 6 + 6 layers of both branches and the encoder.
    Raises FloatingPointError, with the part, image and layer, if a cost is not finite.
    """
    costs = [matching_cost(pred_logits[:, b], pred_boxes[:, b], gt_labels[b], gt_boxes[b])
             for b in range(len(gt_boxes))]
    costs += [matching_cost(encoder_logits[:, b], encoder_boxes[:, b], torch.zeros_like(gt_labels[b]), gt_boxes[b])
              for b in range(len(gt_boxes))]
    flat = torch.cat([cost.flatten() for cost in costs]).cpu()
    on_cpu = [part.view_as(cost) for part, cost in zip(flat.split([cost.numel() for cost in costs]), costs)]
    if not flat.isfinite().all():
        bad = next(i for i, cost in enumerate(on_cpu) if not cost.isfinite().all())
        layer = int((~on_cpu[bad].isfinite()).flatten(1).any(1).nonzero()[0])
        raise FloatingPointError(f'the matching cost of {("decoder", "encoder")[bad // len(gt_boxes)]} layer {layer} '
                                 f'is not finite at image {bad % len(gt_boxes)} of the batch')
    tokens = [QueryGroup(encoder_logits.shape[2], (1,) * encoder_logits.shape[0])]
    pairs = [assign(on_cpu[:len(gt_boxes)], groups), assign(on_cpu[len(gt_boxes):], tokens)]
    return tuple(Matches(*torch.stack(part).to(pred_logits.device, non_blocking=True)) for part in pairs)
