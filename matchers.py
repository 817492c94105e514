"""Who is assigned to whom: every matching scheme of the papers as one row of one table.

The assignment problem, as the DEIM slides open it: what each worker asks for each task, in dollars.

              bathroom  floors  windows
    Alice         8        4       7
    Bob           5        2       3
    Carol         9        4       8

One task each, as cheap as possible in sum: Alice takes the bathroom, Bob the windows and Carol the floors, for 8 + 3 +
4 = 15. Bob is the cheapest everywhere, and is still not sent to the floors at 2. Here queries are the workers and
objects the tasks, and there are more queries than objects: most stay without one and learn "nothing here".

A detector answers with a fixed row of N queries, each a box and C class scores. Training needs to know which query
has to answer for which object. The row is cut into groups, whose queries see only one another. A group has a size, a
number of copies of every ground truth that it must find in each decoder layer, and the weight of its loss. Apart
from where the first boxes of its queries come from (hybrid_detr.py's `select`, and with it `encoder_groups`), nothing
else tells the schemes apart: `query_groups` below is the whole subject.

The letters, the same in every file of this project unless it says otherwise:

    B images of a batch    L decoder layers       N queries in the row           C classes
    M boxes of one image   K copies of each box   G groups (Group DETR: K)       S tokens of the encoder
    P matched pairs        D width of a token     V levels of the pyramid        E pairs of encoder heads (box, class)
    n queries of the first group, T of the second (branch)    L1 first layers that are one-to-many (layer)

Where the papers write otherwise: Group DETR's N is n here. In H-DETR n is M for epoch and N for layer, its m is M here,
and epoch's K has a tilde.

Boxes are (cx, cy, w, h) as fractions of the image; `boxes_xyxy` says so where they are corners.

One toy through all schemes: 6 queries, ground truths A and B, and what each pair costs, the same in both of its decoder
layers. A letter is the ground truth that query 0..5 has to find, a dot is "nothing here"; early and late are the start
and the end of training (`python matchers.py` prints it).

    query    0 1 2 3 4 5
    cost A   1 4 2 3 6 5
         B   2 3 1 6 5 9

    scheme, its numbers      groups       first layer, early   last layer, early   last layer, late
    one2one   n=6            6            A . B . . .          A . B . . .         A . B . . .
    branch    n=2 T=4 K=2    2 | 4        A B | B A B A        A B | B A B A       A B | B A B A
    epoch     n=6 K=2        6            A B B A . .          A B B A . .         A . B . . .
    layer     n=6 K=2 L1=1   6            A B B A . .          A . B . . .         A . B . . .
    group     n=2 G=3        2 | 2 | 2    A B | B A | B A      A B | B A | B A     A B | B A | B A
    one2many  n=6 K=2        6            A B B A . .          A B B A . .         A B B A . .

`epoch` changes with the time and `layer` with the depth, `branch` and `group` never: their extra positives live in
queries of their own. In `branch` and `group`, q4 and q5 are positives, bad as they are: these groups are as small as
the number of copies they have to find (T = K M = 4, n = M = 2).

Papers: H-DETR = "DETRs with Hybrid Matching"; Group DETR = "Group DETR: Fast DETR Training with Group-Wise
One-to-Many Assignment". This file needs torch, scipy and torchvision only, and can be copied alone.
"""
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert, generalized_box_iou


class QueryGroup(NamedTuple):
    """One consecutive piece of the query row."""
    queries: int
    copies: tuple[int, ...]    # of each ground truth, in each of the L layers
    weight: float = 1.0        # of its loss
    proposal_copies: int = 1   # of each ground truth for its encoder head; read only if groups have heads of their own
    denoising: bool = False    # the assignment is known from the start: see `denoising_queries`


def query_groups(scheme: str, layers: int, progress: float = 0.0, *, n: int, T: int = 0, K: int = 1,
                 weight: float = 1.0, rho: float = 2 / 3, L1: int = 0, G: int = 1) -> list[QueryGroup]:
    """The table row of a scheme: the groups that are trained at `progress` (0 at the start, 1 at the end of training).

    The first group is the detector; the others exist only in training (Group DETR Alg. 1, H-DETR §3.2.1). It needs no
    NMS under two conditions: its last layers end training one-to-one, and its self-attention never sees another group.
    Then one query for each object is rewarded, and a second one is background. A new scheme is a new row (and its
    numbers a row in train.TINY_ROWS and PAPER_ROWS). Copies and weights may change with progress, sizes not.

    n: queries of the first group; T, K, weight (lambda in the paper): queries, copies and loss weight of the
    one-to-many part; rho, L1: the part of training (progress < rho) and the number of first layers that are
    one-to-many; G: groups. The schemes are those of the toy above. The second group of branch has proposal_copies K + 1
    (the detector's copy and its own, see `encoder_groups`). Groups without queries are left out.
    Raises ValueError for a scheme that is not in the table.
    """
    one, many = (1,) * layers, (K,) * layers
    # In the equations, loss(P_l, gt) is that of the predictions of layer l, matched with the ground truths one-to-one;
    # with K gt, each of these repeated K times, it is one-to-many.
    table = {
        # DETR; H-DETR Eq. 1: sum over l of loss(P_l, gt). A ground truth has one query, others learn "nothing here".
        'one2one': [QueryGroup(n, one)],
        # H-DETR §3.2.1: Eq. 1 for the first group, plus lambda times Eq. 2, sum over l of loss(P_l, K gt), for the
        # second. Its T queries see each other: they are matched together, and share out the copies among themselves.
        # K = 1 and 2 lose (Table 9, T = 300 K: 46.4 and 46.7 against 47.0 AP), K = 3 and more gain; the authors' guess
        # is that the second group starts from worse proposals, which few copies do not repay (§4.2; in App. D, K = 1
        # gains with better ones).
        'branch': [QueryGroup(n, one), QueryGroup(T, many, weight, proposal_copies=K + 1)],
        # H-DETR §3.2.2, Eq. 3: sum over l of loss(P_l, K gt) for the first rho of training; then Eq. 4, as Eq. 1.
        'epoch': [QueryGroup(n, many if progress < rho else one)],
        # H-DETR §3.2.2, Eq. 5 and 6: sum over l <= L1 of loss(P_l, K gt), plus sum over l > L1 of loss(P_l, gt). (As
        # printed they overlap: Eq. 5 runs to L, Eq. 6 from L1. The text, and the 504 positives of §4.2, mean this.)
        'layer': [QueryGroup(n, many[:L1] + one[L1:])],
        # Group DETR Eq. 7: 1/G times the sum of the groups' one-to-one losses. Groups must not see each other (Eq. 5):
        # a query would find those of others on its object and learn to count on them, and at inference they are gone
        # (Table 7: 34.8 AP with attention across the groups, 37.6 without). It is more than a mask: each group is
        # matched and weighed by itself, and attention folds equal groups into the batch (Alg. 1; hybrid_detr.py).
        'group': [QueryGroup(n, one, 1 / G)] * G,
        # H-DETR Table 13 row 1, Group DETR Table 7 (b): K queries are rewarded for one object and nothing ranks them,
        # so inference needs NMS.
        'one2many': [QueryGroup(n, many)],
    }
    if scheme not in table:
        raise ValueError(f'unknown scheme {scheme!r}: choose from {", ".join(table)}')
    return [group for group in table[scheme] if group.queries > 0]   # T = 0 is the baseline


def expected_positives(scheme: str, layers: int, epochs: float, **row) -> float:
    """Positive queries of one ground truth in a whole training, all layers and groups, if there are queries enough
    (H-DETR §4.2: 504 in 12 epochs for all its schemes)."""
    moments = 600   # of training, evenly spread: so it holds for any row of the table
    positives = sum(sum(group.copies) for moment in range(moments)
                    for group in query_groups(scheme, layers, (moment + 0.5) / moments, **row))
    return epochs * positives / moments


class Matches(NamedTuple):
    """P matched pairs: prediction [layer, image, query] answers for ground truth `gt` of the batch's concatenated
    boxes. All int64 of shape (P,)."""
    layer: Tensor
    image: Tensor
    query: Tensor
    gt: Tensor


class Cost(NamedTuple):
    """Settings of `matching_cost`."""
    kind: str = 'focal'          # or 'stable'
    class_weight: float = 2.0    # w below; DETR's softmax cost has 1 (official code)
    f2: float = 0.5              # stable: exponent of s' (Stable-DINO Table 9: 0.25 to 2, best 0.5)
    official: bool = False       # stable: with the alpha of the released code
    softmax: bool = False        # scores of DETR's cross-entropy, column C for "no object"


def class_scores(logits: Tensor, softmax: bool = False) -> Tensor:
    """(..., C) -> sigmoid scores; with softmax (..., C+1) -> (..., C), without the "no object" column."""
    return logits.softmax(-1)[..., :-1] if softmax else logits.sigmoid()


def matching_cost(pred_logits: Tensor, pred_boxes: Tensor, gt_labels: Tensor, gt_boxes: Tensor,
                  how: Cost = Cost()) -> Tensor:
    """Of one image: what it would cost to make query n answer for ground truth m: (L,N,C), (L,N,4), (M,), (M,4) ->
    (L,N,M).

        cost = w * class + 5 * |box - gt|_1 - 2 * GIoU,  w = 2
        class = alpha (1-p)^2 (-log p) - (1-alpha) p^2 (-log(1-p)),  p the score of gt's class, alpha = 1/4
        kind 'stable' (Stable-DINO Eq. 4): p * s'^f2 in place of p, s' = (GIoU+1)/2; alpha and 1-alpha both become 1
        softmax (DETR, DEIM slides Eq. 2): class = -p, or -p * s'^f2

    The focal class part is what the focal loss would change by if the query became positive (Deformable DETR's and
    H-DETR's official code; H-DETR gives no formula, Stable-DINO Eq. 2 has it without alpha). Computed for all layers at
    once, and only with the image's own ground truths; the official codes take the boxes of the whole batch.

    Stable-DINO's code keeps one s' for each query and class, so that the last ground truth of a class decides for all,
    and scales its largest to 1. Here each pair has its own, as in the paper.
    """
    # float16 has no 1e-8, and bfloat16 knows a p near 1 only to 1/256.
    pred_logits, pred_boxes = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (pred_logits, pred_boxes))
    boxes = pred_boxes.flatten(0, 1)                                                                # (L*N, 4)
    l1 = torch.cdist(boxes, gt_boxes, p=1).view(*pred_boxes.shape[:2], -1)                          # (L, N, M)
    gt_xyxy, xyxy = (box_convert(x, 'cxcywh', 'xyxy') for x in (gt_boxes, boxes))
    # The few ground truths first: faster on the CPU, and the same numbers.
    giou = generalized_box_iou(gt_xyxy, xyxy).T.reshape(l1.shape)                        # (M, L*N) -> (L, N, M)
    # p (L, N, M): for each ground truth the column of its class. (A softmax needs all C + 1 columns before.)
    if how.softmax:
        p = class_scores(pred_logits, softmax=True)[..., gt_labels]
    else:
        p = class_scores(pred_logits[..., gt_labels])
    if how.kind == 'stable':   # a query with a bad box is not taken for its score
        p = p * ((giou + 1) / 2) ** how.f2   # GIoU >= -1
    if how.softmax:
        of_class = -p
    else:
        alpha, rest = (1.0, 1.0) if how.kind == 'stable' and not how.official else (0.25, 0.75)
        as_match = alpha * (1 - p) ** 2 * -(p + 1e-8).log()   # 1e-8: as the official codes
        as_background = rest * p ** 2 * -(1 - p + 1e-8).log()
        of_class = as_match - as_background
    return how.class_weight * of_class + 5 * l1 - 2 * giou   # 5 and 2: as in the loss (losses.py)


def one_to_many(cost: Tensor, copies: int) -> tuple[Tensor, Tensor]:
    """Hungarian assignment in which every ground truth wants `copies` queries: (N,M) on the CPU -> query_idx, gt_idx.

    Repeating the ground truths K times and solving one-to-one *is* the one-to-many matching of H-DETR (Eq. 2). The
    copies are tiled here, after the cost was computed once. When K*M is more than N, the N cheapest pairs in sum are
    made and the other copies stay without a query: (min(N, K*M),) each.
    """
    # Column c of the tiled costs is copy c // M of ground truth c % M. No query gets two columns, nor a column two
    # queries: so the copies of a ground truth go to different queries.
    query_idx, column = linear_sum_assignment(cost.repeat(1, copies).numpy())
    return torch.from_numpy(query_idx), torch.from_numpy(column) % max(cost.shape[1], 1)   # an image may have M = 0


def assign(costs: list[Tensor], groups: list[QueryGroup]) -> Matches:
    """Solve every layer, image and group separately: B costs (L,N,M_b) on the CPU -> Matches on the CPU.

    Groups do not compete for a ground truth, and neither do layers. A query that is in no pair learns "nothing here"
    from the class loss and nothing from the box losses (losses.set_loss).
    """
    found, first_gt = [], 0
    for image, cost in enumerate(costs):
        M, first_query = cost.shape[2], 0
        for group in groups:
            for layer, copies in enumerate(group.copies):
                if group.denoising:   # it has no costs: who answers for whom is known
                    query_idx, gt_idx = known_pairs(group.queries, copies, M)
                else:
                    query_idx, gt_idx = one_to_many(cost[layer, first_query:first_query + group.queries], copies)
                at = torch.tensor([[layer], [image]]).expand(2, len(query_idx))
                found.append(torch.cat([at, query_idx[None] + first_query, gt_idx[None] + first_gt]))     # (4, pairs)
            first_query += group.queries
        first_gt += M
    return Matches(*torch.cat(found, 1))                                                                  # (P,) each


class Denoising(NamedTuple):
    """Queries made from ground truths, in groups of m slots with little noise and m with much; m is the number of
    boxes of the fullest image, and images with fewer leave slots empty. In the row all of them are one QueryGroup,
    whose X denoising groups see themselves and the detector, and are seen by none (hybrid_detr.GroupSelfAttention)."""
    labels: Tensor   # (B, X*2*m) int64, C at empty slots
    boxes: Tensor    # (B, X*2*m, 4)
    groups: int      # X

    def query_group(self, layers: int) -> QueryGroup:
        """As one more group of the row: every ground truth has a copy in each denoising group."""
        return QueryGroup(self.labels.shape[1], (self.groups,) * layers, denoising=True)


def denoising_queries(gt_labels: Sequence[Tensor], gt_boxes: Sequence[Tensor], num_classes: int, number: int = 100,
                      label_noise: float = 0.5, box_noise: float = 1.0) -> Denoising:
    """Contrastive denoising (DINO; used by Stable-DINO and DEIM): boxes and labels with noise, to be restored.

    gt_labels, gt_boxes: B tensors (M_b,), (M_b,4). There are X = max(1, number // m) groups, i.e. about `number` noisy
    ground truths of the fullest image. A label is drawn anew with probability label_noise / 2 (as in DINO's code). Each
    corner moves by r * half the box's width or height * box_noise, to either side: r in 0..1 for the first m queries of
    a group, which answer for their ground truths, and in 1..2 for the other m, which are near misses and have to learn
    "nothing here". Corners that cross are put in order (as in DEIM's code).
    Without any box one group of empty slots is left, so that every step runs the same graph (as DINO's own code).
    Stable-DINO's released settings draw r in 0..1 for both halves, i.e. without the contrast.
    It goes with every scheme. Group DETR finds DN-DETR's denoising complementary to its groups (Fig. 8), and gives each
    group a denoising task of its own (footnote 3), which is in no released code, and not here.
    """
    B, m = len(gt_labels), max(1, *map(len, gt_labels))
    X = max(1, number // m) if any(map(len, gt_labels)) else 1
    # One image more, of m boxes, dropped again: so the length is m even in a batch without boxes.
    more_labels, more_boxes = gt_labels[0].new_empty(m), gt_boxes[0].new_empty(m, 4)
    labels = pad_sequence([*gt_labels, more_labels], batch_first=True, padding_value=num_classes)[:B]   # (B, m)
    # 0.5: any box will do for an empty slot, which is background.
    boxes = pad_sequence([*gt_boxes, more_boxes], batch_first=True, padding_value=0.5)[:B]              # (B, m, 4)
    labels, boxes = (x[:, None, None].expand(B, X, 2, *x.shape[1:]) for x in (labels, boxes))      # (B, X, 2, m, .)
    empty = labels == num_classes
    anew = (torch.rand_like(boxes[..., 0]) < label_noise / 2) & ~empty
    labels = torch.where(anew, torch.randint_like(labels, num_classes), labels)

    far = torch.arange(2, device=boxes.device).view(2, 1, 1)   # 0 in the first half of a group, 1 in the second
    sign = torch.randint_like(boxes, 2) * 2 - 1
    half = torch.cat([boxes[..., 2:]] * 2, -1) / 2   # (w, h, w, h) / 2                            (B, X, 2, m, 4)
    corners = box_convert(boxes, 'cxcywh', 'xyxy') + sign * (torch.rand_like(boxes) + far) * half * box_noise
    # The corners as two rows (x, y), of which the smaller x and the smaller y come first.
    in_order = corners.clamp(0, 1).unflatten(-1, (2, 2)).sort(-2).values.flatten(-2)
    boxes = torch.where(empty[..., None], boxes, box_convert(in_order, 'xyxy', 'cxcywh'))
    return Denoising(labels.flatten(1), boxes.flatten(1, 3), X)


def known_pairs(queries: int, X: int, M: int) -> tuple[Tensor, Tensor]:
    """Slot j of each of X denoising groups answers for ground truth j of M: -> query_idx, gt_idx (X*M,). A group has 2m
    slots, m >= M, so these lie in its half with little noise."""
    first = torch.arange(X) * (queries // X)
    return (first[:, None] + torch.arange(M)).flatten(), torch.arange(M).repeat(X)


def encoder_groups(groups: list[QueryGroup], heads: int, tokens: int) -> list[QueryGroup]:
    """The encoder's proposals as a row of one layer. There is E = 1 head for all groups, or one for each; each head's
    scores of all S tokens form a group of this row.

    One head is matched one-to-one (official code of H-DETR). Where every group has a head, each is matched one-to-one
    as well (Group DETR A.2 has the heads, but not how they are matched; its codes do this), except that of H-DETR's
    one-to-many group: K + 1 copies (App. D). Each weighs as much as its group.
    """
    if heads == 1:
        return [QueryGroup(tokens, (1,))]
    return [QueryGroup(tokens, (group.proposal_copies,), group.weight) for group in groups if not group.denoising]


@torch.no_grad()   # an assignment is a choice, not a function: no gradient goes through it, only through the losses
def match(pred_logits: Tensor, pred_boxes: Tensor, encoder_logits: Tensor, encoder_boxes: Tensor,
          gt_labels: list[Tensor], gt_boxes: list[Tensor], groups: list[QueryGroup],
          proposal_groups: list[QueryGroup], how: Cost = Cost()) -> tuple[Matches, Matches]:
    """Match all layers, images and groups of a training step, and the encoder's proposals: -> (decoder, encoder).

    pred_* (L,B,N,.), encoder_* (1,B,E*S,.), gt_* B tensors (M_b,) and (M_b,4), groups and proposal_groups: how the
    rows are cut. The encoder is matched with every label 0, which means "object" there (official code of H-DETR).
    The GPU is waited for once: all costs cross to the CPU in one transfer, where the official code waits for every
    layer of both branches, and for the encoder.
    Raises FloatingPointError, with the part, image and layer, if a logit or a box is not finite. Finite ones give
    finite costs, since every ground truth has an area.
    """
    images = range(len(gt_boxes))
    matching = sum(group.queries for group in groups if not group.denoising)   # denoising queries come last
    costs = [matching_cost(pred_logits[:, b, :matching], pred_boxes[:, b, :matching], gt_labels[b], gt_boxes[b], how)
             for b in images]
    encoder_how = how._replace(softmax=False, class_weight=2.0) if how.softmax else how   # as in losses.criterion
    costs += [matching_cost(encoder_logits[:, b], encoder_boxes[:, b], torch.zeros_like(gt_labels[b]), gt_boxes[b],
                            encoder_how) for b in images]
    # (L+1, B): not finite if any logit or box is not.
    sums = torch.cat([logits.sum((2, 3), dtype=torch.float32) + boxes.sum((2, 3), dtype=torch.float32)
                      for logits, boxes in ((pred_logits, pred_boxes), (encoder_logits, encoder_boxes))])
    on_gpu = [*costs, sums]
    flat = torch.cat([x.flatten() for x in on_gpu]).cpu()
    *on_cpu, sums = [part.view_as(x) for part, x in zip(flat.split([x.numel() for x in on_gpu]), on_gpu)]
    broken = (~sums.isfinite()).nonzero().tolist()
    if broken:
        layer, image = broken[0]
        where = 'the encoder' if layer == len(pred_logits) else f'decoder layer {layer}'
        raise FloatingPointError(f'the predictions of {where} are not finite for image {image} of the batch')
    decoder, encoder = assign(on_cpu[:len(images)], groups), assign(on_cpu[len(images):], proposal_groups)
    # Stacked to (4, P), so that each goes to the GPU in one copy.
    return tuple(Matches(*torch.stack(pairs).to(pred_logits.device, non_blocking=True)) for pairs in (decoder, encoder))


# --- The example of the docstring, printed --------------------------------------------------------------------------

TOY_COST = torch.tensor([[1.0, 2], [4, 3], [2, 1], [3, 6], [6, 5], [5, 9]])   # 6 queries, ground truths A and B
TOY_ROWS = {'one2one': dict(n=6), 'branch': dict(n=2, T=4, K=2), 'epoch': dict(n=6, K=2), 'layer': dict(n=6, K=2, L1=1),
            'group': dict(n=2, G=3), 'one2many': dict(n=6, K=2)}


def toy(scheme: str, layer: int, progress: float) -> tuple[list[QueryGroup], list[str]]:
    """The groups of a scheme with 2 decoder layers, and for each toy query 'A', 'B' or '.' in that layer."""
    groups = query_groups(scheme, 2, progress, **TOY_ROWS[scheme])
    matches, found = assign([TOY_COST.expand(2, -1, -1)], groups), ['.'] * len(TOY_COST)
    for at, query, gt in zip(matches.layer.tolist(), matches.query.tolist(), matches.gt.tolist()):
        if at == layer:
            found[query] = 'AB'[gt]
    return groups, found


if __name__ == '__main__':
    import argparse
    argparse.ArgumentParser(description='Carry a toy cost matrix through every matching scheme.').parse_args()
    print('6 queries, ground truths A and B, and what each pair costs, the same in both decoder layers:')
    for name, of_gt in zip('AB', TOY_COST.T.tolist()):
        print(f'cost {name}:  {"  ".join(f"q{q} {cost:g}" for q, cost in enumerate(of_gt))}')
    print('\nWhat q0 to q5 have to find (. nothing, | the next group), early and late in training:')
    print(f'{"scheme":10}{"numbers":17}{"groups":13}{"first layer, early":21}{"last layer, early":20}last layer, late')
    for scheme, numbers in TOY_ROWS.items():
        cells = []
        for layer, progress in ((0, 0.0), (1, 0.0), (1, 1.0)):
            groups, found = toy(scheme, layer, progress)
            letters = iter(found)
            cells.append(' | '.join(' '.join(next(letters) for _ in range(group.queries)) for group in groups))
        print(f'{scheme:10}{" ".join(f"{k}={v}" for k, v in numbers.items()):17}'
              f'{" | ".join(str(group.queries) for group in groups):13}{cells[0]:21}{cells[1]:20}{cells[2]}')
    print('\nWith K = 2 in one group of 6, both A and B cost least at q0 and q2: each gets one of these and one that '
          'costs it more,\nso that all four together cost least.')
