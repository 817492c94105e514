"""Match queries to ground truths: every scheme is one row of a table.

In the assignment problem (DEIM slides), each worker asks a price for each task:

              bathroom  floors  windows
    Alice         8        4       7
    Bob           5        2       3
    Carol         9        4       8

Each worker gets one task, and the sum of the prices is minimised. The best sum is
8 + 3 + 4 = 15: Alice gets the bathroom, Bob the windows and Carol the floors. Bob
asks least for the floors, but Carol gets them. In a detector, queries are the
workers and ground truths are the tasks. Most queries stay unmatched and learn
"background".

A detector has a fixed row of N queries. Each query predicts a box and C class
scores. The row is cut into groups, and self-attention stays inside a group. A group
has a number of queries, a number of copies of every ground truth in each decoder
layer, and the weight of its loss. A ground truth with K copies is matched to K
queries. A scheme is a list of groups and nothing more: see `query_groups`. (One
exception: where a group's initial boxes come from, see `encoder_groups`.)

Letters:

    B images of a batch    L decoder layers       N queries in the row           C classes
    M boxes of one image   K copies of each box   G groups (Group DETR: K)       S encoder tokens
    P matched pairs        D width of a token     V levels of the pyramid        E encoder heads
    X denoising groups     m largest M in a batch
    n queries of the first group, T of the second (branch)    L1 first layers that are one-to-many

Group DETR's N is n here. H-DETR's M (epoch) and N (layer) are n, and H-DETR's m is M.

Boxes are (cx, cy, w, h) as fractions of the image. Boxes named xyxy are corners.

`python matchers.py` matches one toy with all schemes. The toy has 6 queries, ground
truths A and B, and 2 decoder layers with the same costs. A letter is the ground
truth that a query is matched to, and a dot is an unmatched query. Early and late
are the start and the end of training.

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

`epoch` changes with time and `layer` with depth. `branch` and `group` never change,
because their extra positives are in other groups. There q4 and q5 are matched at a
high cost: their groups have only as many queries as copies (T = K M = 4, n = M = 2).

This file needs torch, torchvision and scipy, and can be copied alone.
"""
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert, generalized_box_iou


# --- The schemes ---

class QueryGroup(NamedTuple):
    """One consecutive part of the query row."""
    queries: int
    copies: tuple[int, ...]   # of each ground truth, in each of the L layers
    weight: float = 1.0       # of the group's loss
    proposal_copies: int = 1  # of each ground truth in the encoder head of this group
    denoising: bool = False   # matched by `known_pairs`, without a cost


def query_groups(scheme: str, layers: int, progress: float = 0.0, *, n: int, T: int = 0, K: int = 1,
                 weight: float = 1.0, rho: float = 2 / 3, L1: int = 0,
                 G: int = 1) -> list[QueryGroup]:
    """Return the groups of a scheme at `progress` (training starts at 0 and ends at 1).

    The first group is the detector. The other groups exist only in training. The
    detector needs no NMS if its last layer is one-to-one at the end of training and
    its queries never see another group. Then one query of each object is rewarded,
    and self-attention learns to suppress the duplicates.

    NUMBER_HELP explains the numbers. A new scheme is a row here and a row of
    NUMBERS. Copies and weights may change with progress, but sizes may not. Groups
    without queries are left out. Raises ValueError for an unknown scheme.
    """
    one, many = (1,) * layers, (K,) * layers
    # loss(P_l, gt): the predictions of layer l are matched one-to-one with the
    # ground truths. loss(P_l, K gt): each ground truth is repeated K times, so the
    # matching is one-to-many.
    table = {
        # DETR; H-DETR Eq. 1: sum over l of loss(P_l, gt).
        'one2one': [QueryGroup(n, one)],
        # H-DETR §3.2.1: Eq. 1 for the first group, plus lambda times Eq. 2 for the
        # second: sum over l of loss(P_l, K gt). K = 1 and K = 2 are worse than the
        # baseline; K >= 3 is better (Table 9). T = 0 is the baseline.
        'branch': [QueryGroup(n, one), QueryGroup(T, many, weight, proposal_copies=K + 1)],
        # H-DETR §3.2.2, Eq. 3: sum over l of loss(P_l, K gt) for the first rho of
        # training; then Eq. 4, which is Eq. 1 again.
        'epoch': [QueryGroup(n, many if progress < rho else one)],
        # H-DETR §3.2.2, Eq. 5 and 6: loss(P_l, K gt) summed over l <= L1, plus
        # loss(P_l, gt) summed over l > L1. (The printed Eq. 6 starts at l = L1: a
        # misprint.)
        'layer': [QueryGroup(n, many[:L1] + one[L1:])],
        # Group DETR Eq. 7: 1/G times the sum of the groups' one-to-one losses. A
        # group must not see the others, which are absent at inference (Eq. 5; Table
        # 7: 34.8 AP with attention across groups, 37.6 without).
        'group': [QueryGroup(n, one, 1 / G)] * G,
        # H-DETR Table 13 row 1, Group DETR Table 7 (b): K queries are rewarded for
        # the same object, so inference needs NMS.
        'one2many': [QueryGroup(n, many)],
    }
    if scheme not in table:
        raise ValueError(f'unknown scheme {scheme!r}: choose from {", ".join(table)}')
    return [group for group in table[scheme] if group.queries > 0]


# Numbers of each scheme: of a small model (`tiny`), and of the papers on COCO. The
# papers give no K for one2many.
NUMBERS = {
    'one2one': (dict(n=50), dict(n=300)),
    'branch': (dict(n=50, T=150, K=6, weight=1.0),
               dict(n=300, T=1500, K=6, weight=1.0)),
    'epoch': (dict(n=200, K=10, rho=2 / 3), dict(n=1800, K=10, rho=2 / 3)),
    'layer': (dict(n=200, K=10, L1=2), dict(n=1800, K=10, L1=4)),
    'group': (dict(n=50, G=4), dict(n=300, G=11)),
    'one2many': (dict(n=200, K=6), dict(n=1800, K=6)),
}

# Meaning, lowest and highest value of each number of `query_groups`.
NUMBER_HELP = {
    'n': ('queries of the first group, which is the detector', 1, 100_000),
    'T': ('branch: queries of the one-to-many group (0: none)', 0, 100_000),
    'K': ('copies of each object (not in one2one and group)', 1, 10_000),
    'weight': ('branch: loss weight lambda of the one-to-many group', 0, 1e6),
    'rho': ('epoch: first part of training, which is one-to-many', 0, 1),
    'L1': ('layer: number of first, one-to-many decoder layers', 0, 100),
    'G': ('group: the number of groups', 1, 1000),
}


def expected_positives(scheme: str, layers: int, epochs: float, **numbers) -> float:
    """Count the positives of one ground truth in a whole training, if there are enough queries.

    All layers and groups count. Each scheme of H-DETR has 504 in 12 epochs (§4.2).
    """
    # Copies may change with progress, so average over evenly spread moments.
    moments = 600
    groups = [group for moment in range(moments)
              for group in query_groups(scheme, layers, (moment + 0.5) / moments, **numbers)]
    return epochs * sum(sum(group.copies) for group in groups) / moments


# --- Cost and assignment ---

class Matches(NamedTuple):
    """P matched pairs: prediction [layer, image, query] is matched to ground truth `gt`.

    `gt` is an index into all boxes of the batch. All four are int64 (P,).
    """
    layer: Tensor
    image: Tensor
    query: Tensor
    gt: Tensor


class Cost(NamedTuple):
    """Settings of the matching cost.

    class_weight: w of `matching_cost`. With softmax, DETR's code has w = 1.
    f2: the exponent of s' in 'stable' (Stable-DINO Table 9: 0.5 is best).
    official: 'stable' has alpha = 1/4, as in the released code.
    softmax: the scores are DETR's softmax, with column C for "no object".
    """
    kind: str = 'focal'  # or 'stable'
    class_weight: float = 2.0
    f2: float = 0.5
    official: bool = False
    softmax: bool = False


def class_scores(logits: Tensor, softmax: bool = False) -> Tensor:
    """Scores (..., C): sigmoid of logits (..., C), or softmax of (..., C+1) without "no object"."""
    return logits.softmax(-1)[..., :-1] if softmax else logits.sigmoid()


def matching_cost(pred_logits: Tensor, pred_boxes: Tensor, gt_labels: Tensor, gt_boxes: Tensor,
                  settings: Cost = Cost()) -> Tensor:
    """Cost of matching each query to each ground truth, for one image and all layers.

    (L,N,C), (L,N,4), (M,), (M,4) -> (L,N,M)

        cost = w * class + 5 * |box - gt|_1 - 2 * GIoU,  w = 2
        class = alpha (1-p)^2 (-log p) - (1-alpha) p^2 (-log(1-p)),  alpha = 1/4,
                where p is the score of gt's class
        kind 'stable' (Stable-DINO Eq. 4): p * s'^f2 replaces p, with s' = (GIoU+1)/2;
                1 replaces alpha and 1-alpha
        softmax (DETR, DEIM slides Eq. 2): class = -p, or -p * s'^f2

    `class` is the focal loss as a match minus the focal loss as background (code of
    Deformable DETR; Stable-DINO Eq. 2, without alpha). Both logs add 1e-8, as in all
    official codes. Each pair has its own s'. Stable-DINO's code keeps one s' per query
    and class, so later boxes overwrite earlier ones.
    """
    # Compute in float32: 1e-8 underflows in float16, and bfloat16 has steps of 1/256
    # near p = 1.
    pred_logits, pred_boxes = (x.to(torch.promote_types(x.dtype, torch.float32))
                               for x in (pred_logits, pred_boxes))
    boxes = pred_boxes.flatten(0, 1)  # (L*N, 4)
    l1 = torch.cdist(boxes, gt_boxes, p=1).view(*pred_boxes.shape[:2], len(gt_boxes))  # (L, N, M)
    gt_xyxy, xyxy = (box_convert(x, 'cxcywh', 'xyxy') for x in (gt_boxes, boxes))
    # Speed: the CPU is faster with the few ground truths first.
    giou = generalized_box_iou(gt_xyxy, xyxy).T.reshape(l1.shape)  # (M, L*N) -> (L, N, M)
    # p (L, N, M): the score of each ground truth's class. A softmax needs all columns.
    if settings.softmax:
        p = class_scores(pred_logits, softmax=True)[..., gt_labels]
    else:
        p = class_scores(pred_logits[..., gt_labels])
    if settings.kind == 'stable':  # a bad box lowers the score
        p = p * ((giou + 1) / 2) ** settings.f2
    if settings.softmax:
        class_cost = -p
    else:
        without_alpha = settings.kind == 'stable' and not settings.official
        alpha, rest = (1.0, 1.0) if without_alpha else (0.25, 0.75)
        as_match = alpha * (1 - p) ** 2 * -(p + 1e-8).log()
        as_background = rest * p ** 2 * -(1 - p + 1e-8).log()
        class_cost = as_match - as_background
    return settings.class_weight * class_cost + 5 * l1 - 2 * giou  # 5 and 2: all official codes


def one_to_many(cost: Tensor, copies: int) -> tuple[Tensor, Tensor]:
    """Match every ground truth with `copies` queries: (N,M) on the CPU -> query_idx, gt_idx.

    H-DETR Eq. 2: repeat the ground truths K times, and solve one-to-one (Hungarian
    assignment). The cost is computed once and repeated here. If K*M > N, every query
    is matched, and the remaining copies stay unmatched. Both results have the shape
    (min(N, K*M),).
    """
    # Column c of the repeated costs is copy c // M of ground truth c % M. Two
    # columns never share a query, so each copy goes to a different query.
    query_idx, column = linear_sum_assignment(cost.repeat(1, copies).numpy())
    M = max(cost.shape[1], 1)  # an image may have no object
    return torch.from_numpy(query_idx), torch.from_numpy(column) % M


def assign(costs: list[Tensor], groups: list[QueryGroup]) -> Matches:
    """Match each layer, image and group separately: B costs (L,N,M_b) on the CPU -> Matches.

    In every layer, every group is matched to all ground truths. An unmatched query
    learns "background" from the class loss and has no box loss.
    """
    pairs, first_gt = [], 0
    for image, cost in enumerate(costs):
        M, first_query = cost.shape[2], 0
        for group in groups:
            queries = slice(first_query, first_query + group.queries)
            for layer, copies in enumerate(group.copies):
                if group.denoising:
                    query_idx, gt_idx = known_pairs(group.queries, copies, M)
                else:
                    query_idx, gt_idx = one_to_many(cost[layer, queries], copies)
                where = torch.tensor([[layer], [image]]).expand(2, len(query_idx))
                which = torch.stack([query_idx + first_query, gt_idx + first_gt])
                pairs.append(torch.cat([where, which]))  # (4, pairs)
            first_query += group.queries
        first_gt += M
    return Matches(*torch.cat(pairs, 1))  # (P,) each


# --- Denoising queries ---

class Denoising(NamedTuple):
    """Noisy copies of the ground truths as queries: X groups of 2m slots.

    In each group, m slots have little noise and m slots have much. An image with
    fewer than m boxes leaves slots empty. The X groups are one QueryGroup, the last
    of the row. In self-attention a denoising group sees itself and the detector. No
    other query sees a denoising query, because that would show the answer.
    """
    labels: Tensor  # (B, X*2*m) int64, C at empty slots
    boxes: Tensor  # (B, X*2*m, 4)
    groups: int  # X

    def query_group(self, layers: int) -> QueryGroup:
        """Return one QueryGroup, with a copy of every ground truth in each denoising group."""
        return QueryGroup(self.labels.shape[1], (self.groups,) * layers, denoising=True)


def denoising_queries(gt_labels: Sequence[Tensor], gt_boxes: Sequence[Tensor], num_classes: int,
                      number: int = 100, label_noise: float = 0.5,
                      box_noise: float = 1.0) -> Denoising:
    """Make denoising queries, as in DINO (contrastive denoising), Stable-DINO and DEIM.

    The decoder learns to restore noisy labels and boxes. gt_labels, gt_boxes: B
    tensors (M_b,), (M_b,4). There are X = max(1, number // m) groups. A label is
    drawn anew with probability label_noise / 2 (DINO's code). A corner moves by
    r * w/2 * box_noise to the left or right, and by r * h/2 * box_noise up or down.
    The first m queries of a group have r in 0..1 and are matched to their ground
    truth. The other m queries have r in 1..2 and learn "background". If corners
    cross, they are put in order (DEIM's code). A batch without boxes has one group
    of empty slots, so that every step runs the same graph (DINO's code).
    """
    B, m = len(gt_labels), max(1, *map(len, gt_labels))
    X = max(1, number // m) if any(map(len, gt_labels)) else 1
    # One extra image of m boxes, dropped below, makes the padded length m in any
    # batch.
    more_labels = gt_labels[0].new_empty(m)
    more_boxes = gt_boxes[0].new_empty(m, 4)
    labels = pad_sequence([*gt_labels, more_labels], batch_first=True,
                          padding_value=num_classes)[:B]  # (B, m)
    # An empty slot may have any box.
    boxes = pad_sequence([*gt_boxes, more_boxes], batch_first=True,
                         padding_value=0.5)[:B]  # (B, m, 4)
    labels, boxes = (x[:, None, None].expand(B, X, 2, *x.shape[1:])
                     for x in (labels, boxes))  # (B, X, 2, m, .)
    empty = labels == num_classes
    is_redrawn = (torch.rand_like(boxes[..., 0]) < label_noise / 2) & ~empty
    labels = torch.where(is_redrawn, torch.randint_like(labels, num_classes), labels)

    # `far` is 0 in the first half of a group, 1 in the second.
    far = torch.arange(2, device=boxes.device).view(2, 1, 1)
    sign = torch.randint_like(boxes, 2) * 2 - 1
    half = torch.cat([boxes[..., 2:]] * 2, -1) / 2  # (w, h, w, h) / 2
    shift = sign * (torch.rand_like(boxes) + far) * half * box_noise
    corners = box_convert(boxes, 'cxcywh', 'xyxy') + shift
    # Sort two rows (x, y): the smaller x and the smaller y come first.
    ordered = corners.clamp(0, 1).unflatten(-1, (2, 2)).sort(-2).values.flatten(-2)
    boxes = torch.where(empty[..., None], boxes, box_convert(ordered, 'xyxy', 'cxcywh'))
    return Denoising(labels.flatten(1), boxes.flatten(1, 3), X)


def known_pairs(queries: int, X: int, M: int) -> tuple[Tensor, Tensor]:
    """Match slot j of each of X denoising groups to ground truth j: -> query_idx, gt_idx (X*M,).

    A group has 2m slots and m >= M, so slots 0 to M-1 have little noise.
    """
    first = torch.arange(X) * (queries // X)
    return (first[:, None] + torch.arange(M)).flatten(), torch.arange(M).repeat(X)


# --- A training step ---

def encoder_groups(groups: list[QueryGroup], heads: int, tokens: int) -> list[QueryGroup]:
    """Return the groups of the encoder's proposals: a row of one layer, S tokens for each head.

    Every encoder token proposes a box, and the best proposals are a group's initial
    boxes. A single head serves all groups and is matched one-to-one (code of
    H-DETR). If each group has a head (Group DETR A.2), the head has the weight of
    its group and is matched one-to-one. One exception: the head of H-DETR's
    one-to-many group has K + 1 copies (App. D).
    """
    if heads == 1:
        return [QueryGroup(tokens, (1,))]
    return [QueryGroup(tokens, (group.proposal_copies,), group.weight)
            for group in groups if not group.denoising]


@torch.no_grad()  # an assignment is a choice: gradients flow through the losses only
def match(pred_logits: Tensor, pred_boxes: Tensor, encoder_logits: Tensor, encoder_boxes: Tensor,
          gt_labels: list[Tensor], gt_boxes: list[Tensor], groups: list[QueryGroup],
          proposal_groups: list[QueryGroup], settings: Cost = Cost()) -> tuple[Matches, Matches]:
    """Match every layer, image and group of a training step, and the encoder's proposals.

    pred_* (L,B,N,.), encoder_* (1,B,E*S,.), gt_* B tensors (M_b,) and (M_b,4).
    groups and proposal_groups say how the rows are cut. Returns the decoder's and
    the encoder's Matches. In the encoder every label is 0, which means "object"
    (code of H-DETR). Raises FloatingPointError if a logit or a box is not finite.
    """
    images = range(len(gt_boxes))
    # Denoising queries come last in the row and need no cost.
    matching = sum(group.queries for group in groups if not group.denoising)
    costs = [matching_cost(pred_logits[:, b, :matching], pred_boxes[:, b, :matching], gt_labels[b],
                           gt_boxes[b], settings) for b in images]
    # The encoder always scores with a sigmoid.
    if settings.softmax:
        settings = settings._replace(softmax=False, class_weight=2.0)
    costs += [matching_cost(encoder_logits[:, b], encoder_boxes[:, b],
                            torch.zeros_like(gt_labels[b]), gt_boxes[b], settings) for b in images]
    # (L+1, B): one NaN or infinite value makes its sum NaN or infinite.
    rows = (pred_logits, pred_boxes), (encoder_logits, encoder_boxes)
    sums = torch.cat([sum(x.sum((2, 3), dtype=torch.float32) for x in row) for row in rows])
    # Speed: with one transfer of all costs, the CPU waits for the GPU only once.
    on_gpu = [*costs, sums]
    flat = torch.cat([x.flatten() for x in on_gpu]).cpu()
    parts = flat.split([x.numel() for x in on_gpu])
    *costs, sums = [part.view_as(x) for part, x in zip(parts, on_gpu)]
    broken = (~sums.isfinite()).nonzero().tolist()
    if broken:
        layer, image = broken[0]
        part = 'the encoder' if layer == len(pred_logits) else f'decoder layer {layer}'
        raise FloatingPointError(f'the predictions of {part} are not finite for image {image} of '
                                 'the batch (lower the learning rate?)')
    decoder = assign(costs[:len(images)], groups)
    encoder = assign(costs[len(images):], proposal_groups)
    # Speed: a stack (4, P) goes to the GPU in one copy.
    device = pred_logits.device
    return tuple(Matches(*torch.stack(matches).to(device, non_blocking=True))
                 for matches in (decoder, encoder))


def matching_stats(outputs, matches: Matches, labels: Tensor, iou: Tensor, sizes: tuple[int, ...],
                   softmax: bool = False) -> dict[str, Tensor]:
    """Summarise a step's matches.

    Statistics of the detector (first group) in its last layer: summed IoU and score
    of the matched pairs, their number, and the best score of an unmatched query
    (mean over the images). `pairs` counts the pairs of all groups and layers,
    without denoising. outputs.pred_logits (L,B,N,.), labels (sum of M_b,), iou (P,),
    sizes: queries of each group. Speed: boolean indexing would wait for the GPU.
    """
    n = sizes[0]
    scores = class_scores(outputs.pred_logits[-1].detach(), softmax)  # (B, N, C)
    last = len(outputs.pred_logits) - 1
    is_final = (matches.layer == last) & (matches.query < n)  # (P,)
    pair_scores = scores[matches.image, matches.query, labels[matches.gt]] * is_final
    # All other pairs add 0.
    matched = torch.zeros_like(scores[..., 0]).index_put(
        (matches.image, matches.query), is_final.to(scores), accumulate=True)  # (B, N)
    unmatched = (scores.amax(-1) * (1 - matched))[:, :n]
    return {'iou': (iou * is_final).sum(), 'score': pair_scores.sum(),
            'matched': is_final.sum(), 'best_unmatched': unmatched.amax(1).mean(),
            'pairs': (matches.query < sum(sizes)).sum()}


# --- The example of the docstring, printed ---

TOY_COST = torch.tensor([[1.0, 2], [4, 3], [2, 1], [3, 6], [6, 5], [5, 9]])
TOY_ROWS = {'one2one': dict(n=6), 'branch': dict(n=2, T=4, K=2), 'epoch': dict(n=6, K=2),
            'layer': dict(n=6, K=2, L1=1), 'group': dict(n=2, G=3), 'one2many': dict(n=6, K=2)}


def toy(scheme: str, layer: int, progress: float) -> tuple[list[QueryGroup], list[str]]:
    """Match the toy: return the groups of a scheme, and 'A', 'B' or '.' for each query."""
    groups = query_groups(scheme, 2, progress, **TOY_ROWS[scheme])
    letters = ['.'] * len(TOY_COST)
    matches = assign([TOY_COST.expand(2, -1, -1)], groups)
    for pair_layer, _, query, gt in torch.stack(matches, 1).tolist():
        if pair_layer == layer:
            letters[query] = 'AB'[gt]
    return groups, letters


if __name__ == '__main__':
    print('6 queries, ground truths A and B, and the cost of each pair in both decoder layers:')
    for name, column in zip('AB', TOY_COST.T.tolist()):
        costs = '  '.join(f'q{q} {cost:g}' for q, cost in enumerate(column))
        print(f'cost {name}:  {costs}')
    print('\nThe ground truths that q0 to q5 are matched to (. none, | the next group):')
    print('scheme    numbers          groups       first layer, early   last layer, early   '
          'last layer, late')
    for scheme, numbers in TOY_ROWS.items():
        cells = []
        for layer, progress in ((0, 0.0), (1, 0.0), (1, 1.0)):
            groups, letters = toy(scheme, layer, progress)
            rest = iter(letters)
            cells.append(' | '.join(' '.join(next(rest) for _ in range(group.queries))
                                    for group in groups))
        given = ' '.join(f'{name}={value}' for name, value in numbers.items())
        sizes = ' | '.join(str(group.queries) for group in groups)
        print(f'{scheme:10}{given:17}{sizes:13}{cells[0]:21}{cells[1]:20}{cells[2]}')
