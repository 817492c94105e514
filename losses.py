"""What an assignment costs: the classification and box losses, and who divides them by what.

Letters as in matchers.py: B images, L decoder layers, N queries, C classes, P matched pairs, M boxes of an image, K
copies, G groups. Let n_box be the number of ground truth boxes of the batch (averaged over the processes; a
divisor below 1 counts as 1).

    what                 divisor in the official code                                   here
    one-to-one           n_box                                                          n_box
    one-to-many, K       K * n_box: the repeated boxes are counted (H-DETR's code;      K * n_box
                         Eq. 2 does not say)
    G groups             G * n_box, i.e. the mean over groups of Group DETR Eq. 7       n_box, weight 1/G
    encoder, one head    n_box, labels all 0 (H-DETR's code)                            n_box, labels all 0
    encoder, a head for  G * n_box, full labels (code of two-stage Group DETR)          copies of the head * n_box, and
    each group                                                                          the group's weight; labels all 0
    background           the same divisor as its group: unmatched queries learn "nothing here", and only that

This file needs torch and torchvision only, and can be copied alone.
"""
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_area, box_convert, generalized_box_iou_loss

CLASS_WEIGHT, L1_WEIGHT, GIOU_WEIGHT = 2.0, 5.0, 2.0


def focal_loss(logits: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss of every entry; logits and target (0 or 1) of one shape (Stable-DINO Eq. 1 has no alpha).

        positive: alpha (1-p)^gamma (-log p)      negative: (1-alpha) p^gamma (-log(1-p))
    """
    p = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction='none')
    return (alpha * target + (1 - alpha) * (1 - target)) * (p - target).abs() ** gamma * cross_entropy


def loss_scale(groups, num_boxes: float, like: Tensor) -> Tensor:
    """What the loss of a query is multiplied by: weight of its group / (copies of the layer * num_boxes) -> (L,N)."""
    columns = [[group.weight / max(copies * num_boxes, 1.0) for copies in group.copies] for group in groups]
    sizes = torch.tensor([group.queries for group in groups])
    return torch.tensor(columns, dtype=like.dtype).repeat_interleave(sizes, 0).T.to(like.device, non_blocking=True)


def pair_iou(boxes_xyxy: Tensor, others_xyxy: Tensor) -> Tensor:
    """IoU of box i with other box i: (P,4), (P,4) -> (P,). torchvision's box_iou would compute all P x P."""
    corner_min = torch.maximum(boxes_xyxy[:, :2], others_xyxy[:, :2])
    corner_max = torch.minimum(boxes_xyxy[:, 2:], others_xyxy[:, 2:])
    overlap = (corner_max - corner_min).clamp(min=0).prod(1)
    return overlap / (box_area(boxes_xyxy) + box_area(others_xyxy) - overlap)


def set_loss(logits: Tensor, boxes: Tensor, gt_labels: Tensor, gt_boxes: Tensor, matches, scale: Tensor):
    """The weighted class, L1 and GIoU loss of all layers, images and groups at once, and the IoU of every pair.

    logits (L,B,N,C), boxes (L,B,N,4); gt_labels (sum M,) and gt_boxes (sum M,4) of the whole batch; matches: P pairs
    (layer, image, query, gt); scale (L,N). Returns three scalars and IoU (P,), through which no gradient flows.
    """
    layer, image, query, gt = matches
    # Unmatched queries stay 0 in every class: they pay the background part of the class loss, and no box loss.
    target = torch.zeros_like(logits)
    target[layer, image, query, gt_labels[gt]] = 1
    class_loss = (focal_loss(logits, target).sum((1, 3)) * scale).sum()

    pred, gt_pair, pair_scale = boxes[layer, image, query], gt_boxes[gt], scale[layer, query]
    l1_loss = ((pred - gt_pair).abs().sum(1) * pair_scale).sum()
    pred_xyxy, gt_xyxy = (box_convert(b, 'cxcywh', 'xyxy') for b in (pred, gt_pair))
    # eps=0, as in DETR's and H-DETR's code: every ground truth has an area, so there is no division by 0.
    giou_loss = (generalized_box_iou_loss(pred_xyxy, gt_xyxy, eps=0) * pair_scale).sum()
    iou = pair_iou(pred_xyxy, gt_xyxy).detach()
    return CLASS_WEIGHT * class_loss, L1_WEIGHT * l1_loss, GIOU_WEIGHT * giou_loss, iou


def criterion(outputs, gt_labels: list[Tensor], gt_boxes: list[Tensor], matches, encoder_matches, groups,
              proposal_groups, num_boxes: float) -> tuple[dict[str, Tensor], Tensor]:
    """The loss of a step: H-DETR Eq. 1-6, Group DETR Eq. 7, whichever the groups say.

    outputs: the detector's `Outputs`; gt_labels, gt_boxes: B tensors (M_b,), (M_b,4); matches and groups of the
    decoder's and the encoder's row (matchers.py); num_boxes: n_box above.
    Returns the weighted parts, whose sum is the loss, and the IoU (P,) of the decoder's matched pairs.
    """
    pred_logits, pred_boxes, encoder_logits, encoder_boxes = outputs
    labels, boxes, parts = torch.cat(gt_labels), torch.cat(gt_boxes), {}
    parts['class'], parts['l1'], parts['giou'], iou = set_loss(
        pred_logits, pred_boxes, labels, boxes, matches, loss_scale(groups, num_boxes, pred_boxes))
    # The encoder only says "object or not": every label is 0.
    parts['encoder_class'], parts['encoder_l1'], parts['encoder_giou'], _ = set_loss(
        encoder_logits, encoder_boxes, torch.zeros_like(labels), boxes, encoder_matches,
        loss_scale(proposal_groups, num_boxes, encoder_boxes))
    return parts, iou
