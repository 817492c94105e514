"""All tests: `python test_all.py` (CPU only, no network; pytest collects them as well).

The reference numbers were computed with the released codes that are named beside them.
"""
import contextlib
import copy
import functools
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
import unittest
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import nn
from torchvision.ops import (FrozenBatchNorm2d, box_convert, box_iou, generalized_box_iou,
                             sigmoid_focal_loss)
from tqdm import tqdm

import data
import eval as evaluation
import hybrid_detr
import losses
import matchers
import train
from data import UserError
from hybrid_detr import HybridDETR, Outputs, from_official, official_name
from losses import LossSettings
from matchers import (Cost, Matches, QueryGroup, assign, encoder_groups, match, matching_cost,
                      one_to_many, query_groups)

HERE = Path(matchers.__file__).parent
torch.set_num_threads(1)  # The models are so small that more threads only wait for each other.


# --- Helpers ---

@contextlib.contextmanager
def quiet():
    """Catch what is printed."""
    with (contextlib.redirect_stdout(io.StringIO()) as printed,
          contextlib.redirect_stderr(io.StringIO())):
        yield printed


def demonstration(file):
    """What `python FILE` prints, without the seconds that a new process needs to import torch."""
    with quiet() as printed, mock.patch.object(sys, 'argv', [file]):
        runpy.run_path(str(HERE / file), run_name='__main__')
    return printed.getvalue()


class Close:
    """An assertion for tensors that are equal up to rounding."""

    def close(self, value, wanted, atol=1e-5, message=''):
        wanted = torch.as_tensor(wanted, dtype=value.dtype).detach()
        self.assertEqual(value.shape, wanted.shape, message)
        if value.numel():
            self.assertLessEqual(float((value.detach() - wanted).abs().max()), atol, message)


class InFolder(unittest.TestCase):
    """A test with a temporary folder."""

    def setUp(self):
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def refuses(self, message, command, *arguments):
        with (self.subTest(arguments), quiet(),
              self.assertRaisesRegex(UserError, message) as caught):
            command(*arguments)
        self.assertNotIn('\n', str(caught.exception))

    def looks_drawn(self, path):
        with Image.open(path) as picture:
            self.assertTrue(350 < min(picture.size) <= max(picture.size) < 5000, path.name)
            self.assertGreater(len(picture.convert('RGB').getcolors(10 ** 6)), 20, path.name)


def xyxy(boxes):
    """Centre and size -> corners."""
    return box_convert(boxes, 'cxcywh', 'xyxy')


def random_targets(rng, counts, classes):
    """Labels and boxes of one image for each of `counts`; the boxes lie inside their image."""
    boxes = [torch.from_numpy(np.column_stack([rng.uniform(0.3, 0.7, (m, 2)),
                                               rng.uniform(0.1, 0.5, (m, 2))])).float()
             for m in counts]
    return [torch.from_numpy(rng.integers(0, classes, m)) for m in counts], boxes


def random_outputs(rng, L, B, N, C, S=12, E=1):
    """Outputs with L layers, B images, N queries, C classes, E encoder heads, S tokens."""
    def boxes(*shape):
        numbers = rng.uniform(0.2, 0.8, (*shape, 2)), rng.uniform(0.05, 0.6, (*shape, 2))
        return torch.from_numpy(np.concatenate(numbers, -1)).float()
    logits = [torch.from_numpy(rng.normal(size=(*shape, C))).float()
              for shape in ((L, B, N), (1, B, E * S))]
    return Outputs(logits[0], boxes(L, B, N), logits[1], boxes(1, B, E * S))


def loss_of(outputs, labels, boxes, groups):
    """The weighted parts of the loss with the default settings and one encoder head."""
    proposals = encoder_groups(groups, 1, outputs.encoder_logits.shape[2])
    matches, encoder_matches = match(*outputs, labels, boxes, groups, proposals)
    parts, _ = losses.criterion(outputs, labels, boxes, matches, encoder_matches, groups, proposals,
                                sum(map(len, labels)))
    return parts


def as_matches(pairs):
    """Rows (layer, image, query, gt) -> Matches."""
    return Matches(*torch.tensor(pairs, dtype=torch.int64).view(-1, 4).T)


# --- The same, written naively ---

def parts_of_row(logits, groups):
    """One layer, image and group after the other: (layer, image, group, range of queries)."""
    for layer, image in itertools.product(*map(range, logits.shape[:2])):
        first = 0
        for group in groups:
            yield layer, image, group, range(first, first + group.queries)
            first += group.queries


def naive_match(logits, boxes, gt_labels, gt_boxes, groups):
    """Matching as in H-DETR's code, which repeats the ground truths before it computes the cost.
    -> rows (layer, image, query, gt of the batch)."""
    pairs = []
    for layer, image, group, queries in parts_of_row(logits, groups):
        copies, first_gt = group.copies[layer], sum(map(len, gt_labels[:image]))
        labels, wanted = gt_labels[image].repeat(copies), gt_boxes[image].repeat(copies, 1)
        p = logits[layer, image, queries].detach().sigmoid()[:, labels]
        predicted = boxes[layer, image, queries].detach()
        cost = -0.25 * (1 - p) ** 2 * (p + 1e-8).log() + 0.75 * p ** 2 * (1 - p + 1e-8).log()
        cost = 2 * cost + 5 * (predicted[:, None] - wanted).abs().sum(-1)
        cost = cost - 2 * generalized_box_iou(xyxy(predicted), xyxy(wanted))
        for query, column in zip(*linear_sum_assignment(cost)):
            gt = first_gt + int(column) % len(gt_labels[image])
            pairs.append((layer, image, queries[query], gt))
    return pairs


def naive_loss(logits, boxes, gt_labels, gt_boxes, pairs, groups, num_boxes):
    """The class (focal), L1 and GIoU loss of given pairs, with a one-hot target."""
    total = torch.zeros(3)
    for layer, image, group, queries in parts_of_row(logits, groups):
        scale = group.weight / max(1, max(1, group.copies[layer]) * num_boxes)
        found = [(query, gt) for l, b, query, gt in pairs
                 if (l, b) == (layer, image) and query in queries]
        query, gt = torch.tensor(found, dtype=torch.int64).view(-1, 2).T
        target = torch.zeros_like(logits[layer, image])
        target[query, torch.cat(gt_labels)[gt]] = 1
        focal = sigmoid_focal_loss(logits[layer, image], target, 0.25, 2)[queries].sum()
        box, wanted = boxes[layer, image, query], torch.cat(gt_boxes)[gt]
        giou = generalized_box_iou(xyxy(box), xyxy(wanted)).diag()
        l1 = (box - wanted).abs().sum()
        total = total + scale * torch.stack([2 * focal, 5 * l1, 2 * (1 - giou).sum()])
    return [*total]


def who_sees(sizes, N, denoising_groups=0):
    """(N, N) bool: the query of a row sees that of a column."""
    rest = N - sum(sizes)  # denoising queries, which see the first group as well
    group_of = torch.tensor([g for g, size in enumerate(sizes) for _ in range(size)]
                            + [-1 - i * denoising_groups // rest for i in range(rest)])
    return (group_of[:, None] == group_of) | ((group_of[:, None] < 0) & (group_of == 0))


def masked_attention(attention, content, position, sizes, denoising_groups=0):
    """GroupSelfAttention as in H-DETR's code: one attention of the row, with an (N, N) mask."""
    row = (content + position).transpose(0, 1)
    out, _ = F.multi_head_attention_forward(
        row, row, content.transpose(0, 1), row.shape[-1], attention.heads,
        attention.in_proj.weight, attention.in_proj.bias, None, None, False, 0.0,
        attention.out_proj.weight, attention.out_proj.bias, need_weights=False,
        attn_mask=~who_sees(sizes, content.shape[1], denoising_groups))  # True forbids there
    return out.transpose(0, 1)


def naive_deformable_attention(value, shapes, locations, weights):
    """Each sample by itself, read from the four cells around it; outside a map all is 0."""
    maps = value.split([h * w for h, w in shapes], 1)
    out = torch.zeros(*locations.shape[:3], value.shape[-1], dtype=value.dtype)
    for b, n, head, v, j in itertools.product(*map(range, weights.shape)):
        h, w = shapes[v]
        x, y = (locations[b, n, head, v, j] * torch.tensor([w, h]) - 0.5).tolist()
        left, top = math.floor(x), math.floor(y)
        for row, column in itertools.product((top, top + 1), (left, left + 1)):
            if 0 <= row < h and 0 <= column < w:
                part = (1 - abs(y - row)) * (1 - abs(x - column)) * weights[b, n, head, v, j]
                out[b, n, head] += part * maps[v][b, row * w + column, head]
    return out.flatten(2)


# --- The same numbers as the public H-Deformable-DETR (commit f58ceb1) ---

def draw(name, shape, salt='#s92'):
    rng = np.random.RandomState(zlib.crc32((name + salt).encode()))
    return rng.standard_normal(shape).astype(np.float32)


def fill(name, shape, salt='#s92'):
    """The value of an entry of the official state dict: it follows from the official name."""
    x = draw(name, shape, salt)
    if name in ('transformer.level_embed', 'query_embed.weight'):
        pass
    elif name.endswith('running_var'):
        x = 1 + np.float32(0.1) * np.abs(x)
    elif len(shape) == 1:
        x = np.float32(0.1) * x + np.float32(name.endswith('weight'))
    else:
        x = x * np.float32(math.sqrt(1 / math.prod(shape[1:])))
    return torch.from_numpy(x)


def official_state(value, *arguments, **sizes):
    """An official state dict, with value(name, shape) for each entry of HybridDETR(...)."""
    with torch.device('meta'):  # Names and shapes are enough.
        model = HybridDETR(*arguments, **sizes)
    state = {}
    for name, x in model.state_dict().items():
        name = official_name(name, sizes['decoder_layers'])
        state[name] = value(name, tuple(x.shape))
        if name.startswith('bbox_embed') or model.two_stage and name.startswith('class_embed'):
            state[f'transformer.decoder.{name}'] = state[name]  # an alias
    return state


@functools.cache
def small_official(dtype=torch.float32, salt='#s92', seed=0, **one_stage):
    """-> model (20 + 60 queries, 2 + 3 layers, 11 classes), images, padding mask."""
    state = official_state(functools.partial(fill, salt=salt), 11, (80,), encoder_layers=2,
                           decoder_layers=3, ffn=128, **one_stage)
    model = from_official(state, (20, 60)).to(dtype)
    images = torch.zeros(2, 3, 96, 128, dtype=dtype)
    mask = torch.ones(2, 96, 128, dtype=torch.bool)
    rng = np.random.RandomState(seed)
    for i, (h, w) in enumerate(((96, 128), (80, 112))):
        images[i, :, :h, :w] = torch.from_numpy(rng.standard_normal((3, h, w)).astype(np.float32))
        mask[i, :h, :w] = False
    return model, images, mask


LABELS = [torch.tensor([3, 7, 0, 10]), torch.tensor([5, 1])]
BOXES = [torch.tensor([[0.3, 0.35, 0.4, 0.5], [0.72, 0.6, 0.35, 0.45], [0.55, 0.22, 0.2, 0.18],
                       [0.2, 0.8, 0.28, 0.3]], dtype=torch.float64),
         torch.tensor([[0.42, 0.5, 0.6, 0.7], [0.75, 0.25, 0.3, 0.36]], dtype=torch.float64)]
# branch with n = 20, T = 60, K = 3; not from query_groups, which is an exercise
GROUPS = [QueryGroup(20, (1, 1, 1)), QueryGroup(60, (3, 3, 3))]
REFERENCE = [  # field, index -> official numbers
    ('pred_logits', (2, 0, 7, slice(0, 4)), [-1.04548, -1.13426, -0.939849, 0.197015]),
    ('pred_logits', (2, 1, 61, slice(4, 8)), [-0.71549, -1.17146, 1.63203, -0.792566]),
    ('pred_boxes', (2, 0, 79), [0.703683, 0.236721, 0.0786476, 0.0600721]),
    ('encoder_logits', (0, 0, 200, slice(0, 4)), [1.23442, 1.22998, 1.37983, -1.74113]),
    ('encoder_boxes', (0, 1, 130), [0.137084, 0.895347, 0.0402376, 0.0600089])]
TOTALS = {(4, 2): 745.688113, (4, 0): 1098.62582, (0, 0): 5198.3938}  # boxes of the two images
ONE_STAGE_BOXES = (
    [[0.692737, 0.225018, 0.203350, 0.307559], [0.264594, 0.557031, 0.231313, 0.252601],
     [0.517890, 0.451284, 0.275874, 0.396578], [0.401245, 0.573512, 0.336950, 0.194620]],
    [[0.474911, 0.604301, 0.265767, 0.204879], [0.288707, 0.414257, 0.251583, 0.0796944]])
GRADIENTS = {  # all boxes: norm, and projection on the draw of the same name
    'transformer.encoder.layers.0.self_attn.sampling_offsets.weight': (379.220928, -149.276831),
    'transformer.pos_trans.weight': (208.577204, 18.9254019),
    'backbone.0.body.layer4.2.conv3.weight': (199.150512, 447.541479)}


class TestParity(Close, unittest.TestCase):
    def test_outputs_and_losses(self):
        model, images, mask = small_official()
        with torch.no_grad():
            outputs = model.train()(images, mask)
        for field, index, wanted in REFERENCE:
            atol = 5e-5 if 'logits' in field else 1e-5
            self.close(getattr(outputs, field)[index], wanted, atol, f'{field} {index}')
        for counts, total in TOTALS.items():
            labels = [x[:m] for x, m in zip(LABELS, counts)]
            boxes = [x[:m].float() for x, m in zip(BOXES, counts)]
            loss = sum(loss_of(outputs, labels, boxes, GROUPS).values())
            self.assertAlmostEqual(float(loss) / total, 1, delta=1e-5, msg=str(counts))

    def test_gradients(self):
        # In float32 a rounding error flips a ReLU here and there, which moves a gradient by 0.2 %.
        model, images, mask = small_official(torch.float64)
        outputs = model.train()(images, mask)
        sum(loss_of(outputs, LABELS, BOXES, GROUPS).values()).backward()
        parameters = dict(model.named_parameters())
        ours = {official_name(name, 3): name for name in parameters}
        for name, (norm, projection) in GRADIENTS.items():
            gradient = parameters[ours[name]].grad
            self.assertAlmostEqual(float(gradient.norm()) / norm, 1, delta=1e-6, msg=name)
            along = float((gradient * torch.from_numpy(draw(name, gradient.shape))).sum())
            self.assertAlmostEqual(along / norm, projection / norm, delta=1e-5, msg=name)
        self.assertIsNone(parameters['backbone.body.conv1.weight'].grad, 'the stem is frozen')

    def test_one_stage(self):
        model, images, mask = small_official(torch.float64, '#o7', 5, two_stage=False)
        outputs = model.train()(images, mask)
        self.close(outputs.pred_logits[2, 0, 7, :4], [2.16385, -1.14804, 0.653811, 0.0209237], 5e-5)
        self.close(outputs.pred_boxes[0, 1, 5], [0.435634, 0.788271, 0.681136, 0.380820])
        labels = torch.tensor([10, 9, 3, 4]), torch.tensor([5, 5])
        boxes = [torch.tensor(x, dtype=torch.float64) for x in ONE_STAGE_BOXES]
        loss = sum(loss_of(outputs, labels, boxes, GROUPS).values())
        self.assertAlmostEqual(float(loss.detach()) / 307.605286, 1, delta=1e-5)
        loss.backward()
        for name, norm in (('query_embed', 13.2526217), ('reference_points.weight', 42.5097885),
                           ('box_heads.0.4.weight', 46.1324959)):
            gradient = model.get_parameter(name).grad
            self.assertAlmostEqual(float(gradient.norm()) / norm, 1, delta=1e-5, msg=name)

    def test_from_official_names_what_is_wrong(self):
        state = official_state(lambda name, shape: torch.zeros(shape), 2, (5,), 'resnet18',
                               encoder_layers=1, decoder_layers=1, ffn=8)
        for name, x in (('transformer.extra', torch.zeros(1)), ('input_proj.2.0.bias', None),
                        ('input_proj.0.0.bias', torch.zeros(3)),
                        ('transformer.decoder.bbox_embed.0.layers.0.bias', None),
                        ('transformer.decoder.class_embed.0.bias', torch.ones(2))):
            broken = {key: y for key, y in {**state, name: x}.items() if y is not None}
            with self.assertRaisesRegex(ValueError, name):
                from_official(broken, (2, 3))
        with self.assertRaisesRegex(ValueError, 'query_embed'):
            from_official(state, (300, 1500))


# --- Matching and schemes ---

class TestMatching(unittest.TestCase):
    def test_hungarian_equals_brute_force(self):
        rng = np.random.default_rng(0)
        for n, m, copies in ((5, 3, 1), (4, 4, 1), (6, 2, 3), (3, 0, 1), (4, 3, 2), (2, 5, 1)):
            cost = torch.from_numpy(rng.normal(size=(n, m)))
            query, gt = one_to_many(cost, copies)
            wide = cost.repeat(1, copies).tolist()
            pairs = min(n, m * copies)  # fewer than all copies if there are too few queries
            best = min(sum(wide[q][c] for q, c in zip(rows, columns))
                       for rows in itertools.combinations(range(n), pairs)
                       for columns in itertools.permutations(range(m * copies), pairs))
            self.assertEqual(len(set(query.tolist())), pairs)
            self.assertTrue(all(gt.tolist().count(j) <= copies for j in range(m)))
            self.assertAlmostEqual(float(cost[query, gt].sum()), best, places=9)

    def test_predictions_that_are_not_finite_are_named(self):
        rng, row, tokens = np.random.default_rng(3), [QueryGroup(8, (1, 1))], [QueryGroup(12, (1,))]
        for field, index, message in (('pred_boxes', (1, 1, 0, 0), 'decoder layer 1 .* image 1'),
                                      ('encoder_logits', (0, 0, 3, 2), 'encoder .* image 0')):
            outputs = random_outputs(rng, 2, 2, 8, 3)
            getattr(outputs, field)[index] = math.inf
            with self.assertRaisesRegex(FloatingPointError, message):
                match(*outputs, *random_targets(rng, (0, 2), 3), row, tokens)

    def test_matching_stats_by_hand(self):
        """Queries: a matched one, an unmatched one, one of group two, and one for denoising."""
        logits = torch.stack([torch.full((1, 4, 2), 9.0),
                              torch.tensor([[[0.0, 3], [2, 0], [5, 5], [5, 5]]])])
        matches = as_matches([(0, 0, 1, 0), (1, 0, 0, 0), (1, 0, 2, 0), (1, 0, 3, 0)])
        iou = torch.tensor([0.3, 0.6, 0.9, 1])
        stats = matchers.matching_stats(Outputs(logits, None, None, None), matches,
                                        torch.tensor([0]), iou, (2, 1))
        self.assertEqual({name: round(float(x), 4) for name, x in stats.items()},
                         {'iou': 0.6, 'score': 0.5, 'matched': 1, 'best_unmatched': 0.8808,
                          'pairs': 3})

    def test_reduces_to_one_to_one(self):
        """With the neutral number, every scheme gives the one-to-one loss exactly."""
        rng = np.random.default_rng(4)
        outputs, (labels, boxes) = random_outputs(rng, 3, 2, 12, 4), random_targets(rng, (3, 2), 4)

        def total(scheme, n=12, T=0, progress=0.0, **numbers):
            row = outputs._replace(pred_logits=outputs.pred_logits[:, :, :n + T],
                                   pred_boxes=outputs.pred_boxes[:, :, :n + T])
            groups = query_groups(scheme, 3, progress, n=n, T=T, **numbers)
            return float(sum(loss_of(row, labels, boxes, groups).values()))
        for scheme, numbers in (('branch', dict(K=6)), ('epoch', dict(K=1)), ('group', dict(G=1)),
                                ('epoch', dict(K=5, rho=0.0)), ('epoch', dict(K=5, progress=0.7)),
                                ('layer', dict(K=5, L1=0)), ('layer', dict(K=1, L1=2)),
                                ('one2many', dict(K=1))):
            self.assertEqual(total(scheme, **numbers), total('one2one'), f'{scheme} {numbers}')
        self.assertEqual(total('branch', n=6, T=6, K=2, weight=0.0), total('one2one', n=6))

    def test_numbers_of_the_papers(self):
        """H-DETR §4.2: its three schemes give a ground truth 504 positives."""
        for scheme, queries, wanted in (
                ('one2one', 300, [3, 72]), ('branch', 1800, [21, 504]), ('epoch', 1800, [21, 504]),
                ('layer', 1800, [21, 504]), ('group', 3300, [12, 11 * 72]),
                ('one2many', 1800, [18, 432])):
            tiny, paper = matchers.NUMBERS[scheme]
            groups = query_groups(scheme, 6, **paper)
            self.assertEqual(sum(group.queries for group in groups), queries, scheme)
            positives = (matchers.expected_positives(scheme, 3, 1, **tiny),
                         matchers.expected_positives(scheme, 6, 12, **paper))
            self.assertEqual([round(x, 6) for x in positives], wanted, scheme)
        arguments = inspect.signature(query_groups).parameters.values()
        self.assertEqual(set(matchers.NUMBER_HELP),
                         {x.name for x in arguments if x.kind == x.KEYWORD_ONLY})

    def test_a_tenth_of_the_learning_rate(self):
        model = tiny_model((4,))
        for pretrained in False, True:
            normal, slow = hybrid_detr.parameter_groups(model, 1.0, pretrained)
            self.assertEqual((normal['base_lr'], slow['base_lr']), (1.0, 0.1))
            is_slow = {id(x): False for x in normal['params']}
            is_slow |= {id(x): True for x in slow['params']}
            for name, x in model.named_parameters():
                wanted = 'sampling_offsets' in name or pretrained and 'backbone.' in name
                self.assertEqual(is_slow[id(x)], wanted, name)

    def test_the_toy_of_the_docstring(self):
        """`python matchers.py` prints the table of the module's docstring, worked out by hand."""
        by_hand, printed = ([row.split() for row in re.findall(r'^ *(\w+ +n=\d.*)', text, re.M)]
                            for text in (matchers.__doc__, demonstration('matchers.py')))
        self.assertEqual(len(by_hand), 6)
        self.assertEqual(printed, by_hand)


# --- The README's exercises ---

class TestExercises(unittest.TestCase):
    """For students: delete the body of what a test names, write it again, and run the test. A
    message says which idea is missing."""
    longMessage = False  # The messages say everything.

    def close(self, answer, wanted, why):
        self.assertIsInstance(answer, torch.Tensor, f'Return tensors. {why}')
        wanted = torch.as_tensor(wanted).detach()
        self.assertEqual(answer.shape, wanted.shape,
                         f'The shape is {[*answer.shape]}, not {[*wanted.shape]}. {why}')
        for place in (~((answer - wanted).abs() <= 1e-5)).nonzero().tolist()[:1]:
            x, y = answer[tuple(place)], wanted[tuple(place)]
            self.fail(f'{why}\n    at {place}: yours {x:.6g}, wanted {y:.6g}')

    def call(self, why, function, *args, **kwargs):
        """What the function returns. It must return something, and leave its inputs alone."""
        flat = itertools.chain(*(x if isinstance(x, data.Sample) else (x,) for x in args))
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        before = [x.detach().clone() for x in tensors]
        try:
            answer = function(*args, **kwargs)
        except Exception as error:
            error.add_note(why)
            raise
        self.assertIsNotNone(answer, f'The function returns nothing yet. {why}')
        self.assertTrue(all(map(torch.equal, before, tensors)),
                        'The function changed a tensor that came in: write x = x + y, not x += y.')
        return answer

    def test_1_one_to_many(self):
        """matchers.one_to_many: which pairs are made, with one copy and with several."""
        cost = torch.tensor([[1.0, 1], [3, 7], [1, 2], [8, 9], [3, 5]])
        crowded = torch.tensor([[1.0, 2, 9], [1, 3, 9], [2, 8, 7], [1, 9, 8]])
        for cost, copies, pairs, least, why in (
            (cost, 1, 2, 2, 'One copy is the usual Hungarian assignment.'),
            (cost, 2, 4, 9, 'With two copies, each ground truth gets two queries.'),
            (torch.zeros(3, 0), 2, 0, 0, 'An image without objects has no pairs.'),
            (cost, 0, 0, 0, 'A layer without copies has no pairs.'),
            (crowded - 10, 2, 4, 8 - 40, 'Four queries cannot serve six copies: the four pairs '
             'are made that cost least together. A cost may be negative.'),
        ):
            why += f'\n    cost {cost.tolist()}, copies={copies}'
            answer = self.call(why, one_to_many, cost, copies)
            dtypes = [x.dtype for x in answer]
            self.assertEqual(dtypes, [torch.int64] * 2, f'Return two int64 tensors. {why}')
            query, gt = (x.tolist() for x in answer)
            why += (f'\n    Your pairs (query, gt) are {list(zip(query, gt))}. Column j is ground '
                    'truth j % M if the matrix was tiled, j // K if each column was repeated.')
            valid = max([*gt, -1]) < cost.shape[1] and all(gt.count(j) <= copies for j in gt)
            self.assertTrue(valid, f'Each ground truth gets at most {copies} queries. {why}')
            self.assertTrue(len(set(query)) == len(query) == pairs, f'There must be {pairs} pairs, '
                            f'with different queries: a query has one box for one object. {why}')
            self.assertEqual(float(cost[query, gt].sum()), least, f'The sum can be {least}: solve '
                             f'for all copies together, not pair after pair. {why}')

    def test_2_matching_cost(self):
        """matchers.matching_cost with the default Cost(): one pair, then many."""
        def focal(p):
            return 2 * (0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p ** 2 * -math.log(1 - p))
        half, sure, at = focal(0.5), focal(1 / (1 + math.exp(-2))), [0.5, 0.5, 0.2, 0.4]
        for logits, box, label, wanted, why in (
            ([0, 0], at, 0, half - 2, 'Score 1/2, perfect box: the class part is 2 * (1/4 (1-p)^2 '
             '(-log p) - 3/4 p^2 (-log(1-p))), L1 is 0, and GIoU 1 counts -2.'),
            ([2, 1], at, 0, sure - 2, 'p is a sigmoid. One focal term has p, the other 1-p.'),
            ([0, 2], at, 1, sure - 2, "p is the score of the ground truth's own class."),
            ([0, 0], [0.6, 0.5, 0.2, 0.4], 0, half + 0.5 - 2 / 3, 'Moved by half the width: 5 * L1 '
             'of (cx, cy, w, h) is 0.5, and GIoU of corners is 1/3.'),
            ([0, 0], [0.8, 0.7, 0.1, 0.2], 0, half + 4 + 10 / 9, 'Boxes without overlap: GIoU is '
             '0 - 5/9, where 5/9 is the empty part of the hull.'),
            ([0, 0], [0.8, 0.9, 0.1, 0.2], 0, half + 5 + 86 / 63, 'Boxes apart in x and in y: '
             'clamp width and height of the overlap at 0, not their product.'),
            ([40, 0], at, 0, 1.5 * math.log(1e-8) - 2, 'Score 1: both logs add 1e-8.'),
        ):
            cost = self.call(why, matching_cost, torch.tensor([[logits]]).float(),
                             torch.tensor([[box]]), torch.tensor([label]), torch.tensor([at]))
            self.close(cost, [[[wanted]]], why)
        torch.manual_seed(0)
        logits, boxes = torch.randn(2, 3, 4), torch.rand(2, 3, 4)
        labels, gt = torch.tensor([3, 0]), torch.rand(2, 4)
        why = 'Entry [l, n, m] is not the cost of this pair alone: are L, N or M mixed up?'
        cost = self.call(why, matching_cost, logits, boxes, labels, gt)
        for l, n, m in itertools.product((0, 1), (0, 1, 2), (0, 1)):
            pair = logits[l:l + 1, n:n + 1], boxes[l:l + 1, n:n + 1], labels[m:m + 1], gt[m:m + 1]
            self.close(cost[l, n, m], matching_cost(*pair)[0, 0, 0], why)
        cost = self.call('M may be 0.', matching_cost, logits, boxes, labels[:0], gt[:0])
        self.close(cost, torch.zeros(2, 3, 0), 'Without objects the cost is (L, N, 0).')

    def test_3_query_groups(self):
        """matchers.query_groups: the rows of the table, for 3 layers."""
        flat = (1, 1, 1)
        for scheme, progress, numbers, wanted, why in (
            ('one2one', 0, dict(n=9), [(9, flat)], 'One group has one copy in every layer.'),
            ('branch', 0, dict(n=3, T=5, K=2, weight=0.5), [(3, flat), (5, (2, 2, 2), 0.5, 3)],
             'H-DETR Eq. 1-2: n queries have one copy; T more have K copies, the loss weight '
             'lambda, and K + 1 proposal_copies.'),
            ('epoch', 0.66, dict(n=9, K=2), [(9, (2, 2, 2))], 'Eq. 3: K copies before rho = 2/3.'),
            ('epoch', 0.5, dict(n=9, K=2, rho=0.5), [(9, flat)], 'Eq. 4: one copy from rho on.'),
            ('layer', 0, dict(n=9, K=2, L1=2), [(9, (2, 2, 1))], 'Eq. 5-6: first K, then one.'),
            ('group', 0, dict(n=3, G=4), [(3, flat, 0.25)] * 4, 'Group DETR Eq. 7: the loss is the '
             'mean of G one-to-one losses.'),
            ('one2many', 1, dict(n=9, K=2), [(9, (2, 2, 2))], 'K copies to the very end.'),
        ):
            wanted = [QueryGroup(*group) for group in wanted]
            why += f'\n    {scheme} with {numbers}, progress {progress}'
            groups = self.call(why, query_groups, scheme, 3, progress, **numbers)
            self.assertEqual(groups, wanted, f'{why}\n    yours  {groups}\n    wanted {wanted}')
        with self.assertRaises(ValueError, msg='An unknown scheme must raise ValueError.'):
            query_groups('no such scheme', 3, n=3)

    def test_4_group_self_attention(self):
        """hybrid_detr.GroupSelfAttention.forward: which query sees which, then the numbers."""
        torch.manual_seed(0)
        attention = hybrid_detr.GroupSelfAttention(16, 2, 0.0)
        masked = functools.partial(masked_attention, attention)
        inputs = [x.requires_grad_() for x in torch.randn(2, 2, 9, 16).unbind()]
        learners, direction = [*inputs, *attention.parameters()], torch.randn(2, 9, 16)
        for *sizes, X in ((3, 3, 3, 0), (4, 5, 0), (2, 3, 4, 0), (3, 2, 2), (5, 2), (3, 3, 1)):
            row = f'\n    Groups {sizes} of the 9 queries, then {X} denoising groups.'
            answer = self.call(f'Return a tensor (B, N, D).{row}', attention, *inputs, sizes, X)
            for which, query in itertools.product((0, 1), range(9)):
                changed = [x.detach().clone() for x in inputs]
                changed[which][:, query] += 1
                far = (attention(*changed, sizes, X) - answer).abs().amax((0, 2))
                moved, wanted = ((x > 1e-6).nonzero().flatten().tolist()
                                 for x in (far, who_sees(sizes, 9, X)[:, query]))
                self.assertEqual(moved, wanted, f'The {("content", "position")[which]} of query '
                    f'{query} was changed. Queries {moved} moved, and {wanted} should. A query '
                    'sees its own group only: at inference group one is alone. A denoising query '
                    'also sees group one. It knows the answer, so no query of a group sees it.'
                    + row)
            self.close(answer, masked(*inputs, sizes, X), 'The right queries are seen, but the '
                       'numbers are wrong. Position is added to query and key, not to the value. '
                       'The scale is that of one head. All that a query sees shares one softmax. '
                       f'out_proj comes last.{row}')
            mine, wanted = (torch.autograd.grad((out * direction).sum(), learners)
                            for out in (answer, masked(*inputs, sizes, X)))
            for x, y in zip(mine, wanted):
                self.close(x / 10, y / 10, 'The values are right, but a gradient is missing: '
                           f'something is detached.{row}')
        attention.dropout = 0.5
        out = [attention.train(mode)(*inputs, (4, 5)) for mode in (False, True, True)]
        self.close(out[0], masked(*inputs, (4, 5)), 'In eval() nothing is dropped.')
        self.assertFalse(torch.equal(*out[1:]), 'In train() dropout_p is self.dropout.')

    def test_5_matchability_aware_loss(self):
        """losses.MATCHED['mal'] and losses.BACKGROUND['mal']: DEIM slides, Eq. 3."""
        log, unmatched = math.log, 'An unmatched entry has the loss p^g * (-log(1-p)). '
        for p, iou, g, official, wanted, gradient, why in (
            (0.9, 0.5, 2, False, -0.25 * log(0.9) - 0.75 * log(0.1), 0.65, 'A match has BCE with '
             'the target IoU^g, here 1/4, and weight 1.'),
            (0.9, 0.0, 1.5, False, -log(0.1), 0.9, 'A match at IoU 0 has target 0, weight 1.'),
            (0.6, None, 2, False, -0.36 * log(0.4), 0.216 - 0.288 * log(0.4), unmatched
             + 'Its gradient goes through the weight p^g as well.'),
            (0.6, None, 1.5, True, -0.6 ** 1.5 * log(0.4), 0.6 ** 2.5, unmatched
             + 'With official=True no gradient goes through p^g.'),
        ):
            x = torch.tensor([log(p / (1 - p))], dtype=torch.float64, requires_grad=True)
            entry = x, torch.full_like(x, iou is not None), torch.full_like(x, iou or 0)
            settings = LossSettings('mal', mal_gamma=g, official=official)
            loss = self.call(why, losses.class_loss, *entry, settings)
            self.close(loss, [wanted], f'The loss at score {p} is wrong. {why}')
            slope, = torch.autograd.grad(loss, x)
            self.close(slope, [gradient], f'The gradient at score {p} is wrong. {why}')

    def test_6_stable_target(self):
        """losses.stable_target, f1(s) of Stable-DINO Eq. 3: three pairs of owner 2, one of 0."""
        iou, owner = torch.tensor([0.5, 0.1, 0.25, 0.0]), torch.tensor([2, 0, 2, 2])
        one, score = torch.ones(3), torch.full((4,), 0.9, requires_grad=True)
        for s, peak, f1, wanted, why in (
            (iou, None, 's2', [0.25, 0.01, 0.0625, 0], 'Without a rescale, s2 is the squared IoU.'),
            (iou, None, 's1p1', [0.45, 0.09, 0.225, 0], 'f1 is looked up in F1: here s * p.'),
            (iou, one, 's1', [1, 1, 0.5, 0], 'Rescaled to 1, the best pair of each owner gets 1, '
             'however bad it is, and the others keep their ratio to it.'),
            (iou, torch.tensor([0.005, 0.7, 0.8]), 's2', [0.8, 0.005, 0.2, 0], 'First f1, then a '
             'factor, so that the best of owner i gets peak[i]. It may scale down.'),
            (iou * 0, one, 's2', [0, 0, 0, 0], 'Where no pair overlaps, do not divide by 0.'),
        ):
            target = self.call(why, losses.stable_target, s, score, owner, peak, f1)
            self.close(target, wanted, why)
            self.assertFalse(target.requires_grad, 'Detach the target, else a score would learn '
                             'to be asked for less.')

    def test_7_set_loss(self):
        """losses.set_loss with the focal loss: two layers, three images (one without objects),
        four queries, two classes."""
        labels, gt = random_targets(np.random.default_rng(0), (1, 2, 0), 2)
        torch.manual_seed(0)
        boxes = torch.rand(2, 3, 4, 4) * 0.3 + 0.3
        boxes[1, 1, 2] = torch.tensor([0.1, 0.1, 0.1, 0.1])  # apart from its ground truth
        boxes, logits = boxes.requires_grad_(), torch.randn(2, 3, 4, 2, requires_grad=True)
        one, twice = [QueryGroup(4, (1, 1))], [QueryGroup(4, (2, 1))]
        three = [QueryGroup(1, (1, 1)), QueryGroup(2, (2, 1), 0.5), QueryGroup(1, (1, 1), 0.25)]
        pair = [(0, 1, 2, 1)]  # layer, image, query, gt of the batch
        six = [(1, 1, 2, 1), (0, 0, 1, 0), (1, 1, 1, 2), (0, 1, 3, 2), (0, 1, 0, 1), (1, 0, 2, 0)]
        for pairs, groups, num_boxes, class_weight, why in (
            (pair, one, 1.0, None, 'One pair: 5 * L1 of (cx, cy, w, h), 2 * (1 - GIoU of corners), '
             '2 * focal loss. Every entry is background, except that of the matched query in the '
             'class of its ground truth.'),
            (six, one, 3.0, None, 'gt counts through the batch. All is divided by num_boxes.'),
            (pair, twice, torch.tensor(3.0), None, 'With K copies, divide by K * num_boxes.'),
            (six[:1], [QueryGroup(4, (0, 1))], 3.0, None,
             'Layer 0 has no copies: its queries are background, divided by num_boxes.'),
            (six, three, 3.0, None, 'Three groups: each query, matched or not, has weight and '
             'copies of its own group.'),
            (pair, one, 1.0, 0.0, 'class_weight replaces the 2 of CLASS_WEIGHTS, unless it is '
             'None. The box losses keep their weights.'),
        ):
            matches, settings = as_matches(pairs), LossSettings(class_weight=class_weight)
            *answer, iou = self.call(why, losses.set_loss, logits, boxes, labels, gt, matches,
                                     groups, num_boxes, settings)
            wanted = naive_loss(logits, boxes, labels, gt, pairs, groups, num_boxes)
            if class_weight is not None:
                wanted[0] = wanted[0] * class_weight / 2
            for name, x, y in zip(('class', 'L1', 'GIoU'), answer, wanted):
                self.close(x, y, f'The {name} loss is wrong. {why}')
            for x, y in zip(*(torch.autograd.grad(sum(parts), (logits, boxes))
                              for parts in (answer, wanted))):
                self.close(x, y, 'The losses are right, but a gradient is wrong: is (1-p)^2 or a '
                           f'box detached? {why}')
            overlap = box_iou(xyxy(boxes[matches[:3]]), xyxy(torch.cat(gt)[matches.gt])).diag()
            self.close(iou, overlap, 'The last result is the IoU, not the GIoU, of each pair, in '
                       f'the order of the matches. {why}')
            self.assertFalse(iou.requires_grad, 'No gradient may go through the IoU.')

    def test_8_mixup(self):
        """data.mixup: 4 x 8 pixels, all 1, and 6 x 4 pixels, all 2, with beta 0.25."""
        samples = [data.Sample(torch.full((3, *size), float(i)), torch.tensor([i]),
                               torch.tensor([box]), i, size, f'image{i}')
                   for i, size, box in ((1, (4, 8), [0.5, 0.5, 0.5, 1]),
                                        (2, (6, 4), [0.5, 0.25, 1, 0.5]))]
        mixed = self.call('Return sample._replace(...).', data.mixup, *samples, 0.25)
        image = torch.zeros(3, 6, 8)
        image[:, :4] += 0.25 * 1
        image[:, :, :4] += 0.75 * 2
        self.close(mixed.image, image, 'The image is as high as the higher and as wide as the '
                   'wider one. Both lie top left: beta * first + (1 - beta) * second.')
        self.assertEqual(mixed.labels.tolist(), [1, 2], 'The objects of the first come first.')
        self.close(mixed.boxes, [[0.5, 1 / 3, 0.5, 2 / 3], [0.25, 0.25, 0.5, 0.5]], 'Boxes are '
                   'fractions of the new image: x and w shrink by own width / new width, y and h '
                   'by own height / new height.')
        self.assertEqual(mixed[3:5], (1, (4, 8)), 'image_id and size are those of the first.')

    def test_9_a_scheme_of_your_own(self):
        """A row in matchers.query_groups, its numbers in matchers.NUMBERS: what holds for each."""
        with self.assertRaises(ValueError, msg='An unknown scheme raises ValueError.') as caught:
            self.call('Every call computes all rows, with K = G = 1 and T = L1 = 0 if not given.',
                      query_groups, 'none', 3, n=2)
        listed = str(caught.exception).partition('choose from ')[2]
        odd = set(listed.split(', ')) ^ set(matchers.NUMBERS) if listed else ()
        self.assertFalse(odd, f'Only one of query_groups and NUMBERS has a row for {odd}.')
        for scheme, rows in matchers.NUMBERS.items():
            for (numbers, layers), progress in itertools.product(zip(rows, (3, 6)), (0, 0.5, 0.99)):
                row = f'\n    {scheme} with {numbers} at {progress} of training'
                start, groups = (self.call(f'Return a list of QueryGroup.{row}', query_groups,
                                           scheme, layers, moment, **numbers)
                                 for moment in (0, progress))
                sizes = [group.queries for group in groups]
                self.assertEqual(sizes, [group.queries for group in start],
                                 f'The model is built once, so groups must keep their sizes.{row}')
                self.assertEqual({len(group.copies) for group in groups}, {layers},
                                 f'Copies are {layers} numbers, one for each layer.{row}')
                if progress == 0.99 and scheme != 'one2many':
                    self.assertEqual(groups[0].copies[-1], 1, 'The first group, the detector, must '
                                     'end training with one copy in its last layer: more copies '
                                     f'need NMS, and none trains nothing.{row}')
                pairs = sum(min(group.queries, 2 * k) for group in groups for k in group.copies)
                matches = assign([torch.rand(layers, sum(sizes), 2)], groups)
                self.assertEqual(len(matches.gt), pairs, f'A copy got no query.{row}')


# --- Losses ---

# From the public codes of detrex, DEIM and Stable-DINO, and from the papers' formulas (float64).
# Rows: logit, matched, IoU, largest IoU of its image.
ENTRIES = torch.tensor([
    [-2.387681, 1, 0.7179563503, 0.7179563503],
    [1.525444, 1, 0.65075269, 0.7179563503],
    [-1.699873, 1, 0, 0.6923352417],
    [-1.674655, 0, 0, 0.6923352417]], dtype=torch.float64)
ENTRY_GRADIENTS = {  # loss, official -> gradient of each entry by its logit
    ('focal', False): [-0.279408552, -0.004005721, -0.254247917, 0.008350114],
    ('vfl', False): [-0.455069045, 0.11100933, 0.007843961, 0.008350114],
    ('vfl', True): [-0.455069045, 0.11100933, 0, 0.002947268],
    ('mal', False): [-0.524224046, 0.296381465, 0.154481853, 0.02349308],
    ('mal', True): [-0.524224046, 0.296381465, 0.154481853, 0.009892332],
    ('stable', False): [-1.117634208, -2.9565e-05, 0.010458615, 0.011133485],
    ('stable', True): [-0.279408536, -6.45e-06, 0.002614654, 0.008350113]}
# DETR's code: logits of a matched (class 1) and an unmatched query, "no object" last, and gradients
# of the loss of 5 matched and 19 other queries, which is divided by 6.9.
CE_LOGITS = [[-1.015997, -2.387681, -1.498653, -3.109972, -1.175418, 0.84923],
             [-2.771431, -1.036781, -3.698559, 0.023167, -0.654705, 0.606178]]
CE_GRADIENTS = [
    [0.01557681, -0.14097602, 0.00961311, 0.00191901, 0.01328137, 0.10058572],
    [0.00023750, 0.00134588, 0.00009397, 0.00388449, 0.00197214, -0.00753398]]
# Costs of two queries and three ground truths, of which the first and last have one class. The GIoU
# cost of Stable-DINO's code is 1 - GIoU, which shifts all costs by 2.
COST_QUERIES = ([[-3.071198, -1.013251, -0.71464, 0.526941, -3.750376, 0.731537],
                 [-1.830478, -2.86228, 1.913643, 1.525444, -1.531977, 1.403095]],
                [[0.364876, 0.518135, 0.233386, 0.119037],
                 [0.358469, 0.505993, 0.245132, 0.126047]])
COST_GTS = ([1, 3, 1], [[0.586446, 0.405901, 0.209817, 0.333296],
                        [0.379815, 0.522578, 0.240343, 0.119097],
                        [0.596566, 0.466167, 0.227374, 0.336159]])
COSTS = [  # settings, shift, costs
    (Cost(), 0, [[3.8781201, -2.0580302, 3.5151810],
                 [4.8299486, -2.7551373, 4.4879786]]),
    (Cost(class_weight=1, softmax=True), 0, [[3.4776968, -1.8631622, 3.1147577],
                                             [3.5211179, -1.3050901, 3.1791479]]),
    (Cost('stable'), 2, [[8.2564651, 0.0048995, 7.8579068],
                         [12.0371451, -0.4669340, 11.6799151]]),
    (Cost('stable', official=True), 2, [[6.2265798, 0.0459089, 5.8545595],
                                        [7.1527932, -0.1239640, 6.8070076]])]


class TestLosses(Close, unittest.TestCase):
    def test_naive_loop_gives_the_same(self):
        """Matches, loss and gradients equal those of one layer, image and group at a time, and
        all costs cross to the CPU in one transfer."""
        rng = np.random.default_rng(5)
        outputs = Outputs(*(x.requires_grad_() for x in random_outputs(rng, 3, 3, 14, 4, E=2)))
        labels, boxes = random_targets(rng, (3, 0, 2), 4)
        zeros = [torch.zeros_like(x) for x in labels]
        groups = [QueryGroup(6, (1, 1, 1)), QueryGroup(8, (3, 0, 2), 0.7, proposal_copies=2)]
        proposals = encoder_groups(groups, 2, 12)
        self.assertEqual(proposals, [QueryGroup(12, (1,)), QueryGroup(12, (2,), 0.7)])
        naive, transfers, cpu = [], [], torch.Tensor.cpu
        with mock.patch('torch.Tensor.cpu', lambda x: transfers.append(x) or cpu(x)):
            rows = match(*outputs, labels, boxes, groups, proposals)
        self.assertEqual(len(transfers), 1)
        for matches, *row, cut in ((rows[0], *outputs[:2], labels, boxes, groups),
                                   (rows[1], *outputs[2:], zeros, boxes, proposals)):
            pairs = naive_match(*row, cut)
            self.assertEqual(sorted(zip(*(x.tolist() for x in matches))), sorted(pairs))
            naive += naive_loss(*row, pairs, cut, 5)
        parts, _ = losses.criterion(outputs, labels, boxes, *rows, groups, proposals, 5)
        self.close(torch.stack([*parts.values()]), torch.stack(naive), 1e-4)
        for x, y in zip(*(torch.autograd.grad(sum(p), outputs) for p in (parts.values(), naive))):
            self.close(x, y)

    def test_reference_gradients(self):
        for (name, official), wanted in ENTRY_GRADIENTS.items():
            logits, matched, iou, largest = ENTRIES.clone().T.requires_grad_().unbind()
            quality = (iou / largest).square() if name == 'stable' else iou
            settings = LossSettings(name, official=official)
            loss = losses.class_loss(logits, matched, quality.detach(), settings)
            gradient, = torch.autograd.grad(loss.sum(), logits)
            atol = 1e-6 if name == 'stable' and official else 3e-8  # its code has epsilons
            self.close(gradient, wanted, atol, f'{name}, official={official}')

    def test_reference_cross_entropy(self):
        logits = torch.tensor(CE_LOGITS, dtype=torch.float64, requires_grad=True)
        matched = torch.zeros(2, 5, dtype=torch.float64)
        matched[0, 1] = 1
        loss, _ = losses.ce_loss(logits, matched)
        self.close(torch.autograd.grad(loss.sum() / 6.9, logits)[0], CE_GRADIENTS, 1e-8)

    def test_reference_costs(self):
        logits, boxes, gt_boxes = (torch.tensor(x, dtype=torch.float64)
                                   for x in (*COST_QUERIES, COST_GTS[1]))
        for settings, shift, wanted in COSTS:
            x = logits if settings.softmax else logits[:, :5]
            labels = torch.tensor(COST_GTS[0])
            cost = matching_cost(x[None], boxes[None], labels, gt_boxes, settings)
            # The codes add 1e-8 inside the logarithms; the papers do not.
            atol = 2e-5 if settings.kind == 'stable' else 1e-6
            self.close(cost[0] + shift, wanted, atol, str(settings))

    def test_f1(self):
        """Stable-DINO Table 7: 1 for a perfect pair, and the order for a bad one."""
        s, p = torch.tensor([1, 0.25]), torch.tensor([1, 0.4])
        targets = {name: f1(s, p).tolist() for name, f1 in losses.F1.items()}
        perfect = {round(target, 6) for target, _ in targets.values()}
        self.assertEqual(perfect, {1})
        self.assertEqual(sorted(targets, key=lambda name: targets[name][1]),
                         ['s3', 's2p1', 's2', 's1p1', 'exp', 's1p0.25', 's1', 'sin', 's0.5'])

    def test_largest_iou_of_each_group(self):
        boxes, gt = torch.rand(2, 2, 5, 4) * 0.3 + 0.2, torch.rand(3, 4) * 0.3 + 0.2
        best = losses.largest_iou(boxes, [gt, gt[:0]], [2, 3])  # the second image has no box
        iou = box_iou(xyxy(boxes[:, 0].flatten(0, 1)), xyxy(gt)).amax(1).view(2, 5)
        self.close(best[:, 0], torch.stack([iou[:, :2].amax(1), iou[:, 2:].amax(1)], 1))
        self.close(best[:, 1], torch.zeros(2, 2))

    def test_every_class_loss(self):
        """The loss is the sum over groups and images (ce: groups) of the loss of each alone. No
        gradient reaches the boxes through the class loss."""
        rng = np.random.default_rng(7)
        outputs, targets = random_outputs(rng, 2, 2, 14, 3), random_targets(rng, (3, 2), 3)
        rows = (slice(6), [QueryGroup(6, (1, 1))]), (slice(6, 14), [QueryGroup(8, (2, 1), 0.5)])

        def loss(queries, groups, images):
            logits, boxes, *encoder = (x[:, images] for x in outputs)
            logits = F.pad(logits, (0, int(name == 'ce')))[:, :, queries]
            boxes = boxes[:, :, queries].clone().requires_grad_()
            gt = [x[images] for x in targets]
            matches, _ = match(logits, boxes, *encoder, *gt, groups, [QueryGroup(12, (1,))],
                               Cost(softmax=name == 'ce'))
            *parts, _ = losses.set_loss(logits, boxes, *gt, matches, groups, 5,
                                        LossSettings(name, rescale=rescale))
            self.assertFalse(parts[0].requires_grad, f'{name} {rescale}')
            return torch.stack(parts)
        for name, rescale in itertools.product(losses.CLASS_WEIGHTS, ('one', 'max-iou', 'none')):
            images = [slice(2)] if name == 'ce' else [slice(1), slice(1, 2)]
            alone = sum(loss(*row, image) for row in rows for image in images)
            whole = loss(slice(14), rows[0][1] + rows[1][1], slice(2))
            self.close(whole, alone, 2e-4, f'{name} {rescale}')

    def test_finite_at_the_extremes(self):
        """Logits of +-100, IoU 0 and 1, with and without ground truths; also under autocast."""
        gt, labels = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.2, 0.2, 0.1, 0.1]]), torch.arange(2)
        boxes, groups = torch.tensor([0.5, 0.5, 0.2, 0.2]).repeat(1, 1, 4, 1), [QueryGroup(4, (1,))]
        # The sum of as many logits as a real row has, at their starting value, overflows float16.
        many = torch.full((1, 1, 900, 80), -4.6), torch.ones(1, 1, 900, 4)
        row = [QueryGroup(900, (1,))]
        for dtype, name, rescale, official, M in itertools.product(
                (torch.float32, torch.float16, torch.bfloat16), losses.CLASS_WEIGHTS,
                ('one', 'max-iou'), (False, True), (0, 2)):
            logits = torch.tensor([100, -100, 100]).repeat(1, 1, 4, 1 + (name == 'ce'))
            logits[:, :, 1::2] *= -1
            logits, pred = (x.to(dtype).requires_grad_() for x in (logits, boxes))
            targets, pairs = ([labels[:M]], [gt[:M]]), as_matches([(0, 0, 0, 0), (0, 0, 3, 1)][:M])
            settings = LossSettings(name, rescale=rescale, official=official)
            cost = Cost('stable' if official else 'focal', softmax=name == 'ce')
            with torch.autocast('cpu', dtype=dtype, enabled=dtype != torch.float32):
                parts = losses.set_loss(logits, pred, *targets, pairs, groups, M, settings)
                costs = matching_cost(logits[:, 0], pred[:, 0], labels, gt, cost)
                match(*(x.to(dtype) for x in many * 2), *targets, row, row, cost)
            gradients = torch.autograd.grad(sum(parts[:3]), (logits, pred))
            for x in (*parts, *gradients, costs):
                self.assertTrue(bool(x.isfinite().all()), f'{dtype} {settings} M = {M}')

    def test_demonstration(self):
        self.assertIn('mal     match, IoU 0     0.051 +0.050     0.288 +0.250     0.693 +0.500',
                      demonstration('losses.py'))


# --- The detector ---

TINY = dict(backbone='tiny', width=32, heads=4, encoder_layers=1, decoder_layers=2, levels=3,
            ffn=32, frozen_backbone=False)


def tiny_model(groups, **switches):
    """A small detector in train(), whose batch norm does not move between two runs."""
    torch.manual_seed(0)
    model = HybridDETR(3, groups, **{**TINY, **switches}).train()
    model.backbone.eval()
    with torch.no_grad():  # An untrained box head is all zero: give the boxes something to do.
        for head in (*model.box_heads, *model.encoder_box_heads):
            head[-1].weight.normal_(std=0.1)
    return model


class TestDetector(Close, unittest.TestCase):
    images = torch.randn(2, 3, 64, 80, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 64, 80, dtype=torch.bool)

    def test_disturbing_another_group(self):
        """With separate attention no bit of group one moves when group two does. Without, it moves
        (Group DETR Table 7 c). No matching query moves when the denoising queries do."""
        noised = [matchers.Denoising(torch.full((2, 6), label), torch.rand(2, 6, 4), 3)
                  for label in (0, 1)]
        for groups, separate in itertools.product(((6, 6, 6), (6, 10)), (True, False)):
            model = tiny_model(groups, separate_attention=separate, denoising=True,
                               two_stage=len(groups) > 2)
            with torch.no_grad():
                plain, *runs = (model(self.images, self.mask, noised=x) for x in (None, *noised))
                model.query_embed[6] += 1  # the first query of group two
                runs.append(model(self.images, self.mask, noised=noised[1]))
            N = sum(groups)
            self.close(runs[0].pred_boxes[:, :, :N], plain.pred_boxes)
            for a, b, c in zip(*(run[:2] for run in runs)):
                self.assertTrue(torch.equal(a[:, :, :N], b[:, :, :N]), 'denoising queries are seen')
                self.assertFalse(torch.equal(a[:, :, N:], b[:, :, N:]))
                self.assertEqual(torch.equal(b[:, :, :6], c[:, :, :6]), separate, str(groups))
                self.assertFalse(torch.equal(b[:, :, 7:12], c[:, :, 7:12]), 'its own group moves')

    def test_a_group_alone_gives_what_it_gives_in_the_row(self):
        for groups, selection, two_stage in (
                ((6, 10), 'ranks', True), ((5, 8), 'distinct', True), ((7, 7, 7), 'heads', True),
                ((6, 10), 'ranks', False)):
            model = tiny_model(groups, selection=selection, two_stage=two_stage)
            with torch.no_grad():
                row = model(self.images, self.mask)
                alone = [model.eval()(self.images, self.mask, g) for g in range(len(groups))]
                detector = model(self.images, self.mask)
            self.close(row.pred_boxes, torch.cat([run.pred_boxes for run in alone], 2))
            self.assertTrue(torch.equal(detector.pred_boxes, alone[0].pred_boxes))
            heads = len(groups) if selection != 'ranks' else 1
            self.assertEqual(row.encoder_boxes.shape[2], heads * detector.encoder_boxes.shape[2])

    def test_deformable_attention_equals_a_loop(self):
        torch.manual_seed(0)
        shapes = [(4, 3), (2, 2)]  # h, w
        value = torch.randn(2, 16, 2, 3, dtype=torch.float64)
        weights = torch.rand(2, 5, 2, 2, 3, dtype=torch.float64)
        locations = torch.rand(2, 5, 2, 2, 3, 2, dtype=torch.float64) * 1.4 - 0.2  # some outside
        out = hybrid_detr.deformable_attention(value, shapes, locations, weights)
        self.close(out, naive_deformable_attention(value, shapes, locations, weights), 1e-10)

    def test_selection(self):
        logits, boxes = torch.randn(1, 2, 30, 3), torch.randn(1, 2, 30, 4)
        boxes[:, 1] = boxes[:, 0]  # A token can be recognised by its box.
        for selection in ('ranks', 'heads', 'distinct'):
            model = tiny_model((6, 9), selection=selection)
            first, second = model.select(logits, boxes, (6, 9))
            tokens = logits[0, 0, :, 0].topk(6).indices
            self.close(first[0], boxes[0, 0, tokens].sigmoid(), 1e-6, 'the best tokens')
            shared = torch.cdist(first[0], second[0]).amin() == 0
            self.assertEqual(bool(shared), selection == 'heads', selection)
        self.assertFalse(torch.equal(*(head.weight for head in model.encoder_class_heads)),
                         'equal heads would stay equal')

    def test_look_forward_twice(self):
        """The loss of a layer reaches the box head of the layer before, and no head behind it."""
        for twice, wanted in ((True, [False, True, True]), (False, [False, False, True])):
            model = tiny_model((6,), look_forward_twice=twice, decoder_layers=3)
            model(self.images, self.mask).pred_boxes[2].sum().backward()
            gradients = [head[-1].bias.grad for head in model.box_heads]
            learns = [x is not None and bool(x.abs().sum() > 0) for x in gradients]
            self.assertEqual(learns, wanted)

    def test_switches(self):
        switches = dict(mixed_selection=False, dropout=0.1, softmax=True)
        outputs = tiny_model((6, 4), **switches)(self.images, self.mask)
        self.assertEqual(outputs.pred_logits.shape, (2, 2, 10, 3 + 1))
        for unknown in ('selection', 'fusion', 'backbone'):
            with self.assertRaisesRegex(ValueError, f'unknown {unknown}'):
                tiny_model((6,), **{unknown: 'late'})
        with self.assertRaisesRegex(hybrid_detr.TooFewTokens, 'tokens'):
            tiny_model((500,))(self.images, self.mask)

    def test_an_exported_program_computes_the_same(self):
        model, free = tiny_model((5,), levels=1, decoder_layers=1).eval(), torch.export.Dim.DYNAMIC
        shapes = {0: free, 2: free, 3: free}, {0: free, 1: free, 2: free}
        program = torch.export.export(model, (self.images, self.mask),
                                      dynamic_shapes=shapes).module()
        for b, h, w in (1, 64, 80), (3, 101, 160):
            images, mask = torch.randn(b, 3, h, w), torch.zeros(b, h, w, dtype=torch.bool)
            mask[-1, h - 9:] = True
            for exported, own in zip(program(images, mask), model(images, mask)):
                self.close(exported, own, 1e-4)

    def test_memory_fusion(self):
        """Which outputs of the encoder layers are joined (0 stands for the backbone's tokens)."""
        where = hybrid_detr.geometry(torch.zeros(1, 64, 64, dtype=torch.bool),
                                     [(8, 8), (4, 4), (2, 2)], torch.zeros(3, 32))
        for fusion, layers, wanted in (
                ('none', 3, []), ('simple', 3, [[3, 0]]), ('dense', 3, [[0, 1, 2, 3]]),
                ('ulike', 4, [[3, 1], [4, 0]]), ('ulike', 3, [[2, 1], [3, 0]])):
            model, calls = tiny_model((5,), encoder_layers=layers, fusion=fusion), []
            for module in (*model.encoder, *model.fusions):
                module.register_forward_hook(lambda *call: calls.append(call))
            last = torch.randn(1, 84, 32)
            final, outputs, joined = model.encode(last, where), [last], []
            for module, (x, *_), y in calls:
                if module in [*model.fusions]:
                    joined.append(x)
                else:  # a layer goes on from what came last
                    self.assertTrue(torch.equal(x, last), fusion)
                    outputs.append(y)
                last = y
            self.assertTrue(torch.equal(final, last), fusion)
            self.assertEqual(len(joined), len(wanted))
            for x, maps in zip(joined, wanted):
                self.close(x, torch.cat([outputs[l] for l in maps], -1), 1e-6, f'{fusion} {maps}')


class TestDenoising(Close, unittest.TestCase):
    def test_layout(self):
        labels, boxes = random_targets(np.random.default_rng(0), (3, 0, 2), 4)
        noised = matchers.denoising_queries(labels, boxes, 4, 7, label_noise=0.0)
        self.assertEqual(noised.boxes.shape, (3, 12, 4))
        self.assertEqual(noised.query_group(6), QueryGroup(12, (2,) * 6, denoising=True))
        for b, image_labels in enumerate(labels):  # twice 3 slots with little noise, 3 with much
            slots = [*image_labels.tolist(), 4, 4, 4][:3]  # 4 means empty
            self.assertEqual(noised.labels[b].tolist(), slots * 4)
        matches = assign([torch.rand(1, 5, len(x)) for x in labels],
                         [QueryGroup(5, (0,)), noised.query_group(1)])
        pairs = torch.stack([matches.image, matches.query - 5, matches.gt], 1).tolist()
        self.assertEqual(pairs, [[0, 0, 0], [0, 1, 1], [0, 2, 2], [0, 6, 0], [0, 7, 1], [0, 8, 2],
                                 [2, 0, 3], [2, 1, 4], [2, 6, 3], [2, 7, 4]])
        empty = matchers.denoising_queries(labels[1:2], boxes[1:2], 4)
        self.assertEqual((empty.groups, empty.labels.tolist()), (1, [[4, 4]]))

    def test_noise(self):
        """A corner moves by 0..1 half sizes in the first half of a group, by 1..2 in the second."""
        box, label, half = torch.tensor([[0.5, 0.5, 0.1, 0.2]]), torch.tensor([1]), [0.05, 0.1]
        torch.manual_seed(0)
        little, full = (matchers.denoising_queries([label], [box], 4, 4000, box_noise=noise)
                        for noise in (0.1, 1.0))  # 0.1: no corners cross
        moved = (xyxy(little.boxes[0]) - xyxy(box)) / torch.tensor(half * 2) / 0.1
        for far, part in enumerate(moved.view(4000, 2, 4).unbind(1)):
            self.close(part.abs().amin(0), [far] * 4, 0.01)
            self.close(part.abs().amax(0), [far + 1] * 4, 0.01)
            self.close((part > 0).float().mean(0), [0.5] * 4, 0.05)
        self.assertTrue(bool((full.boxes[..., 2:] >= 0).all()), 'crossed corners are put in order')
        changed = float((full.labels != 1).float().mean())
        self.assertAlmostEqual(changed, 0.25 * 3 / 4, delta=0.02, msg='1/4 are drawn anew')


# --- Data ---

def coco_folder(root, ids=(1, 7, 90), mode='RGB'):
    """Write three images of 60 x 40: with two boxes, none, and a crowd, a flat and a good box."""
    images = [{'id': 10 + i, 'file_name': f'{i}.png', 'width': 60, 'height': 40} for i in range(3)]
    boxes = [(0, 0, [10, 5, 6, 18], 0), (0, 2, [30, 10, 20, 12], 0), (2, 1, [0, 0, 50, 30], 1),
             (2, 1, [5, 5, 0, 9], 0), (2, 1, [20, 8, 15, 25], 0)]  # image, label, bbox, crowd
    annotations = [{'id': i + 1, 'image_id': images[m]['id'], 'category_id': ids[label],
                    'bbox': box, 'area': box[2] * box[3], 'iscrowd': crowd}
                   for i, (m, label, box, crowd) in enumerate(boxes)]
    content = {'images': images, 'annotations': annotations,
               'categories': [{'id': i, 'name': f'class{i}'} for i in ids]}
    (root / 'annotations').mkdir(parents=True)
    for split in ('train', 'val'):
        file = root / 'annotations' / f'instances_{split}2017.json'
        file.write_text(json.dumps(content))
        (root / f'{split}2017').mkdir()
        for image in images:
            rng = np.random.RandomState(image['id'])
            pixels = Image.fromarray(rng.randint(0, 255, (40, 60, 3)).astype(np.uint8))
            pixels.convert(mode).save(root / f'{split}2017' / image['file_name'])
    return root


class TestData(Close, InFolder):
    def test_shapes_are_the_same_everywhere(self):
        for arguments, wanted in (((3, 77), 881657666), ((0, 5, 200), 2561148459)):
            image, boxes, labels = data.draw_shapes(*arguments)
            numbers = boxes.astype(np.int64).tobytes() + labels.astype(np.int64).tobytes()
            self.assertEqual(zlib.crc32(image.tobytes() + numbers), wanted)

    def test_shapes_touch_their_boxes(self):
        for label, w, h in itertools.product(range(6), range(5, 70, 3), range(5, 70, 4)):
            mask = data.shape_mask(label, w, h)
            sides = mask[0], mask[-1], mask[:, 0], mask[:, -1]
            self.assertTrue(all(side.any() for side in sides), (data.SHAPES[label], w, h))

    def test_ids_there_and_back(self):
        with quiet() as printed:
            dataset = data.CocoFolder(coco_folder(self.root), 'train', 40)
            few = data.CocoFolder(self.root, 'train', 40, overfit=2)
        self.assertRegex(printed.getvalue(), r'1 of 5 boxes are crowds.*2\.png')
        self.assertEqual((dataset.categories.ids, dataset.with_boxes), ([1, 7, 90], [0, 2]))
        self.assertEqual([dataset[0, i].labels.tolist() for i in range(3)], [[0, 2], [], [1]])
        for images, wanted in ((dataset, {10: [1, 90], 11: [], 12: [7, 7, 7]}),
                               (few, {10: [1, 90], 12: [7, 7, 7]})):
            content = images.coco_json()
            found = {image['id']: [a['category_id'] for a in content['annotations']
                                   if a['image_id'] == image['id']] for image in content['images']}
            self.assertEqual(found, wanted)

    def test_tall_boxes_stay_tall(self):
        with quiet():
            plain, augmented = (data.CocoFolder(coco_folder(self.root / str(a)), 'train', 40, a)
                                for a in (False, True))
        self.close(plain[0, 0].boxes[0], [13 / 60, 14 / 40, 6 / 60, 18 / 40], 1e-6)
        for epoch in range(20):
            sample, empty = augmented[epoch, 0], augmented[epoch, 1]
            self.assertEqual((empty.boxes.shape, empty.labels.dtype), ((0, 4), torch.int64))
            self.assertTrue(torch.equal(sample.image, augmented[epoch, 0].image), 'not random')
            height, width = sample.image.shape[1:]
            for box in sample.boxes[sample.labels == 0]:
                corners = xyxy(box)
                if 0.01 < corners.min() and corners.max() < 0.99:  # not cut
                    self.assertGreater(float(box[3] * height), 2 * float(box[2] * width))

    def test_image_modes(self):
        for mode in ('L', '1', 'P', 'RGBA', 'LA'):
            with quiet():
                dataset = data.CocoFolder(coco_folder(self.root / mode, mode=mode), 'val', 40)
            self.assertEqual(dataset[0, 0].image.shape, (3, 40, 60))
        pixels = np.linspace(0, 4000, 2400).reshape(40, 60)
        strange = (pixels - 3000) / 1e6
        strange[0, :4] = math.nan, math.inf, -math.inf, 9e9
        for x, kind in (pixels, np.uint16), (pixels, np.int32), (strange, np.float32):
            rgb = np.asarray(data.as_rgb(Image.fromarray(x.astype(kind))), int)
            self.assertLess(abs(rgb - pixels[..., None] * 255 / 4000)[1:].max(), 2, 'stretched')

    def test_orientation(self):
        pixels = np.random.RandomState(0).randint(0, 255, (4, 6), np.uint8)
        tags = zip(range(2, 9), (0, 3, 1, 5, 2, 6, 4))  # and Pillow's method that needs the tag
        for (tag, method), (ending, mode) in itertools.product(
                tags, (('png', 'RGB'), ('tif', 'RGB'), ('tif', 'L'), ('webp', 'RGB'))):
            upright, path = Image.fromarray(pixels).convert(mode), self.root / f'a.{ending}'
            exif, stored = Image.Exif(), upright.transpose(method)
            exif[0x0112] = tag
            stored.save(path, exif=exif, lossless=True)
            for size, wanted in ((None, upright), ((6, 4), upright), (stored.size, stored)):
                wanted = (upright if size == (6, 4) else wanted).convert('RGB')
                self.assertTrue(np.array_equal(data.read_image(path, size), wanted), (tag, path))

    def test_boxes_at_the_border_are_kept(self):
        transforms = data.train_transforms(192)
        for seed in range(40):
            target = data.pixel_target(np.array([[0, 0, 200, 150]]), np.array([0]), (150, 200))
            image = Image.new('RGB', (200, 150))
            _, labels, _ = data.transformed(transforms, seed, image, target)
            self.assertEqual(len(labels), 1, f'seed {seed}: the box of the whole image is lost')

    def test_padding_mask(self):
        none = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)
        batch = data.collate([data.Sample(torch.ones(3, h, w), *none, 0, (h, w), '')
                              for h, w in ((4, 9), (6, 5))])
        self.assertEqual(batch.images.shape, (2, 3, 6, 9))
        self.assertTrue(torch.equal(batch.images[:, 0] == 0, batch.padding_mask))
        self.assertEqual((~batch.padding_mask[:, -1]).sum(1).tolist(), [0, 5])

    def test_order_does_not_depend_on_the_process_or_the_start(self):
        for dense in ({}, {'dense_part': (0.25, 0.75)}):
            whole = list(data.train_batches(10, 4, 12, seed=1, **dense))
            indices = [key[1] for batch in whole for key in batch]
            self.assertEqual(sorted(indices[:10]), list(range(10)), 'each image once an epoch')
            self.assertNotEqual(indices[:10], indices[10:20])
            self.assertEqual(list(data.train_batches(10, 4, 12, seed=1, start=5, **dense)),
                             whole[5:])
            halves = (data.train_batches(10, 2, 12, seed=1, rank=rank, world=2, **dense)
                      for rank in (0, 1))
            self.assertEqual([a + b for a, b in zip(*halves)], whole)
        self.assertEqual([[key[2] for key in batch] for batch in whole],
                         [[3 <= step < 9] * 4 for step in range(12)], 'dense in the middle half')


class TestDenseOneToOne(Close, unittest.TestCase):
    def test_mosaic_boxes_lie_on_what_they_name(self):
        colours = [(90, 60, 200), (200, 0, 0), (0, 200, 0), (0, 0, 200)]
        images = [Image.new('RGB', (40 + 20 * (i % 2), 40)) for i in range(4)]
        targets = []
        for i, image in enumerate(images):
            corners = 6, 8, 26, 30 + i
            image.paste(colours[i], corners)
            targets.append(data.pixel_target(np.array([corners]), np.array([i]), image.size[::-1]))
        for size in (40, 80):  # the short side of a tile
            canvas, target = data.mosaic(images, targets, size)
            self.assertEqual((canvas.size, len(target['labels'])), ((3 * size, 2 * size), 4))
            for box, label in zip(target['boxes'], target['labels']):
                ys, xs = (np.asarray(canvas) == colours[label]).all(-1).nonzero()
                corners = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
                self.close(corners.float(), box, 2.0 * (size > 40), f'image {label}')

    def test_an_item_follows_from_seed_epoch_and_index(self):
        """A mosaic shows its own image first, and then three others."""
        shapes = data.ShapesDataset(length=4, size=32)
        dense, other = (data.DenseOneToOne(shapes, 32, seed=seed) for seed in (0, 1))
        state, names = torch.get_rng_state(), []
        for epoch, index in itertools.product((1, 2, 3), range(4)):
            sample, plain = dense[epoch, index, True], dense[epoch, index, False]
            for a, b in ((sample, dense[epoch, index, True]), (plain, shapes[epoch, index])):
                self.assertTrue(all(map(torch.equal, a[:3], b[:3])))
                self.assertEqual(a[3:], b[3:])
            first, _, _ = sample.name.partition(' mixed with ')
            parts = re.findall(r'train/(\d)', first)
            self.assertEqual((parts[0], len({*parts})), (str(index), 4 if 'mosaic' in first else 1))
            names.append(sample.name)
        self.assertEqual({(name.count('mosaic'), name.count('mixed')) for name in names},
                         {(0, 0), (1, 0), (0, 1), (1, 1), (2, 1)})
        self.assertTrue(torch.equal(torch.get_rng_state(), state), 'the generator is left alone')
        for others in names[4:8], [other[1, index, True].name for index in range(4)]:
            self.assertNotEqual(names[:4], others)
        with self.assertRaisesRegex(data.UserError, 'needs four images, .* has 3'):
            data.DenseOneToOne(data.ShapesDataset(length=3), 32)


# --- Settings ---

DEFAULTS = """
-> scheme=branch n=50 T=150 K=6 weight=1 steps=600 epochs=None lr=0.001 batch_size=16 ema=0
-> image_size=128 schedule=cosine warmup=0.05 selection=ranks class_weight=2 cost_class=2
--model r50 -> n=300 T=1500 steps=None epochs=12 lr=0.0002 batch_size=2 schedule=step ffn=2048
--data x -> image_size=192 batch_size=4 steps=2800 lr=0.0007
--data x --model r50 --steps 5 -> image_size=800 steps=5 epochs=None
--epochs 2 -> epochs=2 steps=None
--scheme group -> n=50 G=4 selection=heads
--scheme stable -> n=50 cls_loss=stable class_weight=6 cost=stable fusion=dense denoising=100
--scheme deim -> n=100 cls_loss=mal mal_gamma=1.5 dense_o2o=True denoising=100 ema=0.98
--scheme deim --model r50 -> n=300 ema=0.9999 warmup=0.005
--scheme deim --overfit 2 -> dense_o2o=False
--scheme deim --no-dense-o2o --ema 0 --cls-loss vfl --queries 20 -> dense_o2o=False ema=0 n=20
--ema --denoising -> ema=0.98 denoising=100
--cls-loss ce -> class_weight=1 cost_class=1
"""
REFUSALS = """
--scheme one2two -> --scheme
--model vgg16 -> --model vgg16: .*unknown backbone
--data /nowhere -> /nowhere.* does not exist
--scheme group --T 5 -> --T 5: scheme group only has --queries, --G
--f1 s3 -> --f1 s3: only --cls-loss stable
--cls-loss ce --cost stable --official-losses -> --official-losses
--steps 5 --epochs 1 -> --steps 5
--init-part encoder -> --init-part encoder: needs --init
--pretrained -> --pretrained
--vertical-flip -> --vertical-flip
--overfit 2 --dense-o2o -> --dense-o2o
--schedule flat-cosine --warmup 0.9 -> --warmup 0.9
--scheme layer --decoder-layers 1 -> --L1 2: the decoder has 1
--one-stage --selection heads -> --selection heads: only --no-one-stage
--samples s.txt -> --samples s.txt: must end in .png
--scheme one2one --queries 5000 --workers 0 -> tokens
--out /dev/null -> /dev/null
"""
EVAL_REFUSALS = """
--nms 0.5 -> --weights
--weights x --compare y -> --weights
--compare x --nms 0.5 -> --nms 0.5
--weights x --curves c.png -> --curves
--weights x --nms 1.5 -> --nms 1.5
--weights x --images y --split val -> --split val: not with --images
--weights x --pr-curve p.jpg -> --pr-curve p.jpg: must end in .png
--weights x --matches /nowhere/m.png -> /nowhere/m.png: No such
"""


def rows_of(table):
    """The lines 'left -> right' of a text."""
    return [line.split('-> ') for line in table.strip().splitlines()]


class TestSettings(unittest.TestCase):
    def test_defaults(self):
        for flags, wanted in rows_of(DEFAULTS):
            settings = train.complete(train.parse(flags.split())[0])
            names = [setting.split('=')[0] for setting in wanted.split()]
            found = ' '.join(f'{name}={settings[name]}' for name in names)
            self.assertEqual(re.sub(r'\.0\b', '', found), wanted, flags)

    def test_refusals(self):
        for table, command in (REFUSALS, train), (EVAL_REFUSALS, evaluation):
            for flags, message in rows_of(table):
                with (self.subTest(flags), tempfile.TemporaryDirectory() as root, quiet(),
                      self.assertRaisesRegex((UserError, OSError), message) as caught):
                    out = ['--out', f'{root}/out'] if command is train else []
                    command.main([*out, *flags.split()])
                self.assertNotIn('\n', str(caught.exception))

    def test_illegal_values(self):
        flags = {'--workers': ['-1', '2.5', '1e9', 'x']}
        for name, row in train.ROWS.items():
            kind = row.kind or type(train.pick(row.default, False))
            values = ('x',) if row.choices else ()
            if kind in (int, float):
                values = 'nan', 'x', kind(row.low) - 1, kind(row.high) * 2
            flags[train.flag(name)] = [*map(str, values)]
        for name, value in ((name, x) for name, values in flags.items() for x in values):
            with self.assertRaisesRegex(UserError, f'^{name}\\b', msg=f'{name} {value}'):
                train.parse([name, value])

    def test_learning_rate(self):
        """DEIM's rates, and the last epoch before the rate falls (official codes)."""
        settings = dict(schedule='flat-cosine', warmup=1 / 3)
        for step, rate in ((0, 0), (149, 1.11005e-6), (2000, 2e-4), (3400, 2e-4), (5800, 1e-4),
                           (3749, 1.9487254637627513e-4), (4649, 1.467951560353072e-4)):
            factor = train.lr_factor(settings, step / 6000)
            self.assertAlmostEqual(2e-4 * factor, rate, delta=1e-12, msg=str(step))
        for epochs, before in (12, 11), (24, 20), (36, 30):
            settings = dict(schedule='step', warmup=0.0, epochs=epochs)
            factors = [train.lr_factor(settings, (e + 0.5) / epochs) for e in range(epochs)]
            self.assertEqual(factors, [1.0] * before + [0.1] * (epochs - before))

    def test_average(self):
        """The numbers of DEIM's code, in parameters and buffers."""
        model, average = nn.BatchNorm1d(1).double(), nn.BatchNorm1d(1).double()
        for step, value in (1, 1.9990005997833917), (2, 2.998000201864182), (3, 3.996998805248555):
            for tensor in model.weight.data, model.running_var, model.num_batches_tracked:
                tensor.fill_(1 + step)
            train.update_average(average, model, step, 0.9999, 1000)
            for tensor in average.weight, average.running_var:
                self.assertAlmostEqual(tensor.item(), value, places=12)
        self.assertEqual(average.num_batches_tracked, 4)


# --- Annotations and images that are damaged ---

BAD_ENTRIES = """
images 1 id null -> entry 1 of images has the id None
images 1 id 10 -> used once
images 0 file_name "a0.png" -> 1 images are .* first is a0.png .*'0.png
images 2 height -1 -> a whole number from 0
images 2 height 40.5 -> height 40.5
images 2 width 1000 -> too thin
categories 0 id "1" -> has the id '1'
categories 2 name null -> a text
annotations 0 image_id 99 -> image_id 99
annotations 0 bbox [1,2,3] -> four numbers
annotations 0 bbox [1,2,NaN,4] -> four numbers
annotations 0 iscrowd 2 -> iscrowd 2
"""
BAD_FILES = (  # change of the whole file, message
    (lambda c: c.pop('categories'), 'no list of categories'),
    (lambda c: c['images'].insert(0, 'x'), 'entry 0 of images is no object'),
    (lambda c: [a.update(bbox=[30, 25, 55, 38]) for a in c['annotations']], 'x1, y1, x2, y2'),
    (lambda c: [a.update(iscrowd=1) for a in c['annotations']], 'no box with an area'),
    (lambda c: [a.update(bbox=[0, 1, 0.5, 0.5]) for a in c['annotations']], 'fractions'),
    (lambda c: [a.update(bbox=[9, 9, 9, 0.9]) for a in c['annotations']], 'two at --image-size 96'))
DOUBTS = (  # change of the whole file, what is printed
    (lambda c: c['annotations'][0].update(bbox=[10, 5, 0.5, 9]), r'2 of 4 .* one pixel .* 0\.png'),
    (lambda c: c['annotations'].append(c['annotations'][1]), r'1 of 5 boxes repeat .* 0\.png'),
    (lambda c: c['images'][2].update(file_name='./1.png'), r'1 of 3 images .* \./1\.png'),
    (lambda c: c['annotations'][0].update(ignore=True), r'2 of 5 boxes are crowds .* 0\.png'))


class TestBadData(InFolder):
    def setUp(self):
        super().setUp()
        self.file = coco_folder(self.root) / 'annotations' / 'instances_train2017.json'
        self.good = self.file.read_text()

    def open(self, change=lambda content: None, training=False):
        content = json.loads(self.good)
        change(content)
        self.file.write_text(json.dumps(content))
        with quiet() as printed:
            dataset = data.open_dataset(str(self.root), 'train', 40, training)
            return [dataset[0, i] for i in range(len(dataset))], printed.getvalue()

    def test_annotations_that_make_no_sense(self):
        for row, message in rows_of(BAD_ENTRIES):
            kind, entry, field, value = row.split()

            def change(content):
                place = content[kind][int(entry)]
                place[field] = json.loads(value)
                if value == 'null':
                    del place[field]
            self.refuses(f'{self.file}.*{message}', self.open, change)
        for change, message in BAD_FILES:
            self.refuses(message, self.open, change, True)
        for text in '', '{', '[' * 100_000, f'[{self.good}]':
            self.file.write_text(text)
            self.refuses('no valid JSON|no list of images',
                         data.open_dataset, str(self.root), 'train', 40)

    def test_annotations_that_are_handled(self):
        for box, dropped in ([20, 20, -5, 8], 3), ([50, 30, 30, 30], 2), ([90, 90, 10, 10], 3):
            samples, printed = self.open(lambda c: c['annotations'][0].update(bbox=box))
            self.assertIn(f'{dropped - 1} of 4 boxes', printed)
            boxes = xyxy(torch.cat([x.boxes for x in samples]))
            self.assertEqual(len(boxes), 5 - dropped)
            self.assertTrue(-1e-6 < boxes.min() and boxes.max() < 1 + 1e-6, 'cut at the border')
        for change, message in DOUBTS:
            self.assertRegex(self.open(change)[1], message)

    def test_files_of_other_programs(self):
        def loose(content):
            for entry in content['annotations']:
                entry.update(image_id=float(entry['image_id']), area=None, ignore=None)
            for entry in content['images']:
                entry.update(height=None, id=float(entry['id']))
        self.assertEqual(repr(self.open(loose)[0]), repr(self.open()[0]))
        images, file = self.root / 'val2017', self.root / 'annotations/instances_val2017.json'
        for i, layout in enumerate(data.LAYOUTS):
            root, old = self.root / str(i), (images, file)
            images, file = new = [root / pattern.format('valid') for pattern in layout]
            [*map(os.renames, old, new)]
            with quiet():
                self.assertEqual(len(data.open_dataset(root, 'val', 40)), 3)
        self.refuses('holds valid, valid/_annotations.coco.json$',
                     data.open_dataset, root, 'train', 40)

    def test_images(self):
        path = self.root / 'train2017' / '0.png'
        whole = path.read_bytes()
        for content in b'', whole[:30], whole[:len(whole) // 2], b'no image':
            path.write_bytes(content)
            self.refuses(r'cannot read the image .*0\.png', self.open)
        Image.new('RGB', (40, 60)).save(path)
        self.refuses('has 40 x 60 pixels, its annotation file says 60 x 40', self.open)


# --- Measures ---

def coco_json(boxes, images=1, **changes):
    """Boxes (image, category, x, y, w, h) in COCO's form; changes: of the last annotation."""
    annotations = [{'id': i, 'image_id': image, 'category_id': category, 'bbox': list(xywh),
                    'iscrowd': 0, 'area': xywh[2] * xywh[3]}
                   for i, (image, category, *xywh) in enumerate(boxes, 1)]
    annotations[-1].update(changes)
    return {'images': [{'id': i, 'height': 200, 'width': 200} for i in range(images)],
            'annotations': annotations,
            'categories': [{'id': i, 'name': str(i)} for i in (1, 2, 3)]}


LEFT, RIGHT, OFF = torch.tensor([[0.2, 0.5, 0.2, 0.2], [0.8, 0.5, 0.2, 0.2], [0.5, 0.1, 0.1, 0.1]])


class FixedImages(data.CocoDataset):
    """Images of noise with `objects` objects each: the first at LEFT, the second at RIGHT."""
    categories = data.Categories([1, 2, 3], ['one', 'two', 'three'])

    def __init__(self, objects):
        self.objects = objects
        self.images = [(i, f'image {i}', 64, 64) for i in range(len(objects))]

    def __getitem__(self, key):
        image, number = torch.randn(3, 64, 64), self.objects[key[1]]
        return data.Sample(image, torch.zeros(number, dtype=torch.int64),
                           torch.stack([LEFT, RIGHT])[:number], key[1], (64, 64), '')

    def rows(self):
        boxes = (box_convert(torch.stack([LEFT, RIGHT]), 'cxcywh', 'xywh') * 64).tolist()
        return [(i, 1, *box, 100, 0) for i, n in enumerate(self.objects) for box in boxes[:n]]


class FixedModel(nn.Module):
    """Predicts boxes (L,4,4) with falling scores. The token order[i] has the i-th proposal."""
    softmax, order = False, [7, 2, 4, 0]

    def __init__(self, proposals, boxes):
        super().__init__()
        self.proposals, self.boxes = proposals, boxes
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images, padding_mask, group=0):
        assert not self.training and group == 0
        logits, tokens = torch.full((9, 1), -5.0), torch.full((9, 4), 0.1)
        logits[self.order, 0], tokens[self.order] = -torch.arange(4.0), self.proposals
        L, B = len(self.boxes), len(images)
        scores = torch.linspace(2, 1, 4).expand(L, B, 4)[..., None]
        return Outputs(scores, self.boxes[:, None].expand(-1, B, -1, -1),
                       logits.expand(1, B, -1, -1), tokens.expand(1, B, -1, -1))


class TestMeasures(InFolder):
    def errors(self, content, rows):
        rows = np.array(rows, dtype=float).reshape(-1, 7)
        metrics, _ = evaluation.average_precision(content, rows)
        return [metrics[name] for name in ('oLRP', 'oLRP_Loc', 'oLRP_FP', 'oLRP_FN')]

    def test_olrp_by_hand(self):
        one = coco_json([(0, 1, 10, 10, 100, 50)])
        hit, near = [0, 10, 10, 100, 50, 0.8, 1], [0, 30, 10, 100, 50, 0.8, 1]  # IoU 1, 80 / 120
        wrong, tied = [0, 10, 120, 100, 50, 0.7, 1], [0, 10, 120, 100, 50, 0.8, 1]
        two = coco_json([(1, 1, 100, 100, 40, 40), (0, 1, 10, 10, 100, 50),
                         (0, 2, 10, 10, 100, 50)], images=2)
        found = [near, [1, 100, 100, 40, 40, 0.9, 1], [1, 10, 10, 9, 9, 0.9, 3]]
        crowd = coco_json([(0, 1, 10, 10, 100, 50), (0, 1, 0, 100, 200, 100)], iscrowd=1)
        inside = [0, 10, 120, 20, 20, 0.9, 1]  # a detection in the crowd
        for content, rows, wanted in (
                (one, [hit], [0, 0, 0, 0]),
                (one, [near], [2 / 3, 1 / 3, 0, 0]),
                (one, [hit, wrong], [0, 0, 0, 0]),
                (one, [hit, tied], [0.5, 0, 0.5, 0]),
                (one, [], [1, -1, -1, 1]),
                (two, found, [(1 / 3 + 1) / 2, 1 / 6, 0, 0.5]),
                (crowd, [inside, near], [2 / 3, 1 / 3, 0, 0])):
            np.testing.assert_allclose(self.errors(content, rows), wanted, atol=1e-6)

    def test_unstable_score_by_hand(self):
        start = torch.stack([LEFT, RIGHT, OFF, OFF])
        layers = torch.stack([start, start, start[[1, 0, 2, 3]],
                              torch.stack([RIGHT, OFF, OFF, LEFT]), start[[2, 3, 0, 1]]])
        for proposals, objects, n, wanted in (
                (start, [0], 20, []), (start[[1, 0, 2, 3]], [2], 20, [100, 0, 100, 50, 100]),
                (start, [2, 1], 1, [0, 0, 100, 50, 100]),
                (start, [2, 1], 2, [0, 0, 100, 200 / 3, 100])):  # of all objects
            scores = evaluation.unstable_score(FixedModel(proposals, layers), FixedImages(objects),
                                               [1, 2, 3], n, batch_size=2)
            np.testing.assert_allclose(scores, wanted, atol=1e-4)

    def test_evaluate(self):
        """Two boxes on each object: half of all are duplicates, and precision ends at 2 / 3."""
        boxes, images = torch.stack([LEFT, LEFT, RIGHT, RIGHT]), FixedImages([2, 2, 2])

        def evaluate(nms):
            return evaluation.evaluate(FixedModel(boxes, boxes[None]), images, [1], batch_size=2,
                                       workers=0, nms=nms)
        metrics, by_class, _ = evaluate(None)
        ap = (51 + 50 * 2 / 3) / 101  # precision at 101 recalls
        for name, wanted in (('AP', ap), ('AP50', ap), ('AP_nms', 1), ('duplicates', 0.5),
                             ('parameters', 1e-6), ('oLRP', 1 / 3)):
            self.assertAlmostEqual(metrics[name], wanted, places=5, msg=name)
        self.assertAlmostEqual(by_class[1], ap, places=5)
        self.assertTrue(math.isnan(by_class[2]), 'a class without objects')
        _, _, rows = evaluate(0.7)
        perfect, _ = evaluation.average_precision(images.coco_json(), rows)
        self.assertAlmostEqual(perfect['AP'], metrics['AP_nms'], places=9)

    def test_evaluation_leaves_the_model_unchanged(self):
        model, images = tiny_model((6, 8)), data.ShapesDataset('val', 3, 64)
        modes = [module.training for module in model.modules()]  # the backbone's is another
        before, gflops = copy.deepcopy(model.state_dict()), []
        for detector in model, tiny_model((6,)):
            metrics, *_ = evaluation.evaluate(detector, images, [1, 2, 3], batch_size=2, workers=0)
            gflops.append(metrics['gflops'])
        self.assertEqual([module.training for module in model.modules()], modes)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        self.assertTrue(0.001 < gflops[0] == gflops[1], 'inference has the first group only')

    def test_processes_share_the_images(self):
        model, images, shares = tiny_model((6,)), data.ShapesDataset('val', 7, 64), []

        def detect(rank=0, world=1):
            def gather(gathered, rows):
                shares.append(rows)
                gathered[:] = [shares[0], rows]
            with mock.patch.multiple(
                    evaluation.dist, is_initialized=lambda: world > 1, get_rank=lambda: rank,
                    get_world_size=lambda: world, all_gather_object=gather):
                (rows,), _ = evaluation.detect(model, images, [1, 2, 3], batch_size=2, workers=0)
            return rows[np.argsort(rows[:, 0], kind='stable')]
        detect(0, 2)
        np.testing.assert_allclose(detect(1, 2), detect(), atol=1e-3)
        self.assertEqual([len({*rows[:, 0]}) for rows, in shares], [4, 3])

    def test_duplicates(self):
        box = 10, 10, 20, 20
        rows = np.array([[0, *box, 0.9, 1], [0, *box, 0.8, 1], [0, *box, 0.7, 2],
                         [1, *box, 0.6, 1], [0, *box, 0.2, 1]])
        self.assertEqual(evaluation.duplicate_rate(rows), 0.25, 'one of four above 0.3')
        self.assertEqual(evaluation.duplicate_rate(rows[:0]), 0)

    def test_nms_comes_before_the_best_100(self):
        """40 objects with 6 equal predictions each: all 40 stay, though 240 scores compete."""
        centres = torch.cartesian_prod(torch.arange(8), torch.arange(5)).add(0.5) / 8
        boxes = torch.cat([centres, torch.full((40, 2), 0.1)], 1).repeat_interleave(6, 0)
        logits = torch.linspace(2, -2, 240).view(1, 1, 240, 1)
        outputs = Outputs(logits, boxes[None, None], None, None)
        (scores, _, _), = evaluation.detections(outputs, [(100, 100)], nms=0.7)
        self.assertEqual(len(scores), 40)

    def test_official_checkpoint_detects_raw_category_ids(self):
        state = official_state(fill, 91, (30,), 'resnet18', decoder_layers=1, encoder_layers=1)
        args = evaluation.argparse.Namespace(lr=1)
        torch.save({'model': state, 'args': args}, self.root / 'official.pth')
        model, categories, _ = evaluation.load_detector(str(self.root / 'official.pth'))
        with quiet():
            dataset = data.open_dataset(str(coco_folder(self.root)), 'val', 64)
        ids = evaluation.ids_for(categories, dataset, 91)
        (rows,), _ = evaluation.detect(model, dataset, ids, batch_size=2, workers=0)
        logits = model(*data.collate([dataset[0, 0]])[:2]).pred_logits[-1, 0]
        best = int(logits.max(0).values.argmax())
        self.assertIn(best, rows[rows[:, 0] == 10][:, 6], 'column c is category id c')
        self.refuses('category', evaluation.ids_for, None, dataset, 20)

    def test_comparison_of_runs(self):
        command = ['--compare']
        for i, (run, aps) in enumerate({'group-0': (0.1, 0.4), 'group-1': (0.2, 0.6),
                                        'one2one': (0.3, 0.3),
                                        'other/group-1': (0.9, 0.9)}.items()):
            records = [dict(step=5, loss=1, seconds_per_step=seconds + i, memory_gb=seconds)
                       for seconds in (1, 9, 2)]
            records += [dict(step=step, AP=ap, AP50=ap / 2, AP_nms=1 - ap, gflops=3)
                        for step, ap in zip((10, 20), aps)]
            file = self.root / run / 'metrics.jsonl'
            file.parent.mkdir(parents=True)
            file.write_text('\n'.join([*map(json.dumps, records), '{"step": 30, "lo']))  # torn
            command.append(str(file.parent))
        with quiet() as printed:
            evaluation.main([*command, '--curves', str(self.root / 'curves.png')])
        self.looks_drawn(self.root / 'curves.png')
        # Seeds, steps; mean, lowest and highest of AP, AP50, AP_nms, s/step, GB, GFLOPs.
        for wanted in ('group 2 20 .5 .4 .6 .25 .2 .3 .5 .4 .6 2.5 2 3 1 1 1 3 3 3',
                       'one2one 1 20 .3 .15 .7 4 1 3', 'other/group 1 20 .9 .45 .1 5 1 3'):
            name, *numbers = wanted.split()
            row = re.search(rf'^\| {self.root}/{name} \|(.*)', printed.getvalue(), re.M)[1]
            self.assertEqual([*map(float, re.findall(r'[\d.]+', row))], [*map(float, numbers)])
        for content in '{"step": 5, "loss": 1}', 'garbage}\n' + file.read_text():
            file.write_text(content)
            self.refuses('other/group-1', evaluation.main, command)


# --- The commands ---

SMALL = ('--image-size 64 --batch-size 2 --queries 8 --workers 0 --device cpu --ffn 32 '
         '--decoder-layers 2 --scheme one2one')
SPEEDS = 'images_per_second', 'seconds_per_step', 'memory_gb', 'inference_images_per_second'
SIZES = dict(width=64, heads=2, encoder_layers=1)
ALL_SHAPES = data.ShapesDataset


class ThinBackbone(hybrid_detr.TinyBackbone):
    """For tests of what comes after it."""
    channels = (32, 48, 64)

    def __init__(self):
        def conv(c_in, c_out, stride):
            return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1), nn.BatchNorm2d(c_out),
                                 nn.ReLU())
        nn.Sequential.__init__(self, nn.Sequential(conv(3, 16, 2), conv(16, 32, 4)),
                               conv(32, 48, 2), conv(48, 64, 2))


def few_shapes(split, length, *rest):
    return ALL_SHAPES(split, min(length, 8), *rest)


class Commands(InFolder):
    """Runs the commands in this process, with a thin model and eight images."""
    sizes = SIZES

    def setUp(self):
        super().setUp()
        self.patch(data, 'ShapesDataset', few_shapes)
        self.patch(hybrid_detr, 'TinyBackbone', ThinBackbone)
        for model in train.TINY_MODEL, train.PAPER_MODEL:
            self.enterContext(mock.patch.dict(model, self.sizes))

    def patch(self, *arguments, **keywords):
        return self.enterContext(mock.patch.object(*arguments, **keywords))

    def skip_evaluation(self):
        """Speed: for tests of many runs."""
        self.patch(evaluation, 'val_loader', return_value=[])
        self.patch(evaluation, 'inference_gflops', return_value=0)
        self.patch(evaluation, 'save_grid')

    def run_command(self, command, flags):
        with quiet() as printed:
            command.main(flags.replace('ROOT', str(self.root)).split())
        return printed.getvalue()

    def train(self, flags, out='run'):
        small = '' if '--resume' in flags else f'{SMALL} --out ROOT/{out} '
        return self.run_command(train, small + flags)

    def evaluate(self, flags):
        return self.run_command(evaluation, f'--workers 0 --device cpu {flags}')

    def records(self, out='run'):
        """The lines of the log without the numbers that depend on the machine."""
        lines = (self.root / out / 'metrics.jsonl').read_text().splitlines()
        return [{name: x for name, x in json.loads(line).items() if name not in SPEEDS}
                for line in lines]

    def checkpoint(self, out='run'):
        return torch.load(self.root / out / 'checkpoint.pt', weights_only=True)


# Flags of a run | changes of single settings.
CHANGES = """
| --scheme one2many --K 2 | --model resnet18 --no-pretrained | --overfit 4 | --queries 9
| --cls-loss mal | --class-weight 3 | --cost stable | --cost-class 100 | --fusion simple
| --denoising 4 | --dense-o2o | --ema 0.5 | --decoder-layers 1 | --ffn 16 | --dropout 0.5
| --no-mixed-selection | --one-stage | --no-look-forward-twice | --image-size 96 | --batch-size 3
| --steps 1 | --lr 0.1 | --schedule step | --warmup 0.9 | --weight-decay 1 | --clip 1e-6 | --seed 1
| --eval-every 0.25 | --accumulate 2
--scheme branch --T 6 --K 2 | --T 7 | --K 1 | --weight 2
--scheme epoch --K 2 | --rho 0
--scheme layer --K 2 --L1 1 | --L1 0
--scheme group --G 2 | --G 3 | --selection ranks | --no-separate-attention
--cls-loss mal | --mal-gamma 2
--cls-loss stable | --f1 s3 | --rescale none
--cls-loss vfl | --official-losses
--cost stable --cost-class 100 | --f2 0
--dense-o2o | --vertical-flip
--epochs 0.5 | --epochs 0.25
"""


class TestTraining(Commands):
    def test_every_scheme_overfits_two_images(self):
        for flags in ('one2one', 'branch --T 16 --K 2', 'group --G 2 --one-stage',
                      'epoch --K 2 --rho 0.3 --queries 24', 'layer --K 2 --L1 1 --queries 24',
                      'one2many --K 2 --queries 24 --one-stage', 'stable --denoising 6',
                      'deim --denoising 6 --one-stage'):
            with self.subTest(flags):
                out = flags.replace(' ', '')
                self.train('--overfit 2 --steps 44 --eval-every 44 --ffn 64 --lr 8e-3 --scheme '
                           + flags, out)
                loss, metrics = self.records(out)
                self.assertGreater(metrics['AP50'], 0.6)
                parts = [loss[prefix + part] for prefix in ('', 'encoder_')
                         for part in ('class', 'l1', 'giou')]
                self.assertAlmostEqual(sum(parts), loss['loss'], places=3)
        printed = self.evaluate(f'--weights ROOT/{out}/checkpoint.pt')
        self.assertIn(f'] = {metrics["AP50"]:.3f}', printed, 'same images')
        logged = (self.root / out / 'metrics.jsonl').read_text()
        line = json.loads(logged.splitlines()[0])
        self.assertAlmostEqual(line['images_per_second'] * line['seconds_per_step'], 2)
        factor = train.lr_factor(self.checkpoint(out)['settings'], 43 / 44)
        self.assertAlmostEqual(line['lr'], 8e-3 * factor)
        for name in ('gradient_norm', 'matched_iou', 'matched_score', 'best_unmatched_score', 'lr',
                     'positives', 'AP75', 'oLRP', 'AP_nms', 'parameters', 'gflops', *SPEEDS):
            self.assertRegex(logged, rf'"{name}": \d*\.?\d*[1-9]')

    def test_switches_reach_the_computation(self):
        """A change of any setting changes what is logged or saved."""
        self.skip_evaluation()
        folders, changed = map(str, itertools.count()), set()

        @functools.cache
        def result(flags):
            out = next(folders)
            steps = '' if '--epochs' in flags else '--steps 2'
            self.train(f'--eval-every 9 {steps} {flags}', out)
            model = self.checkpoint(out)['model']
            return self.records(out), {name: x.double().sum() for name, x in model.items()}
        self.assertEqual(result(''), result(' '))  # repeated
        for row in CHANGES.split('\n')[1:-1]:
            base, *changes = row.split('|')
            for change in changes:
                self.assertNotEqual(result(base + change), result(base), change)
                changed |= train.parse(change.split())[0].keys()
        others = {'data', 'unstable', 'init', 'init_part', 'fixed_encoder'}  # tested elsewhere
        self.assertEqual(changed, train.ROWS.keys() - others)

    def test_resume_continues_to_the_bit(self):
        """Stopped between the first checkpoint and its evaluation."""
        real = os.replace

        def stop_after(part, path):
            real(part, path)
            if Path(path).name == 'checkpoint.pt':
                raise KeyboardInterrupt
        for i, flags in enumerate(('--scheme group --G 2 --dropout 0.1 --accumulate 2 --steps 3',
                                   '--scheme deim --denoising 4 --steps 3')):
            whole, stopped = f'whole{i}', f'stopped{i}'
            self.train(flags, whole)
            with (mock.patch.object(os, 'replace', stop_after),
                  self.assertRaises(KeyboardInterrupt)):
                self.train(flags, stopped)
            with (self.root / stopped / 'metrics.jsonl').open('a') as file:
                file.write('{"step": 2, "loss": 1}\n{"step": 3, "lo')  # lost in a crash
            self.assertIn('steps 1 to 3', self.train(f'--resume ROOT/{stopped} --workers {2 * i}'))
            self.assertEqual(self.records(stopped), self.records(whole))
            one, two = self.checkpoint(stopped), self.checkpoint(whole)
            torch.testing.assert_close([*tensors(one)], [*tensors(two)], rtol=0, atol=0)

    def test_resume_under_other_conditions_is_refused(self):
        folder = coco_folder(self.root / 'coco') / 'annotations'
        good = json.loads((folder / 'instances_val2017.json').read_text())
        self.train('--steps 1 --data ROOT/coco')
        resume = '--resume ROOT/run --workers 0'
        two = dict(WORLD_SIZE='2', RANK='0', MASTER_PORT='1')
        with mock.patch.dict(os.environ, two):
            self.refuses('MASTER_ADDR=: .*torchrun', self.train, resume)
        with mock.patch.dict(os.environ, two, MASTER_ADDR='localhost'):
            self.refuses('has processes 1.* 2', self.train, resume)
        self.refuses('has amp False.* True', self.train, f'{resume} --amp')
        self.refuses('--epochs 3.*keeps', self.train, f'{resume} --epochs 3')
        self.refuses('--resume', self.train, '--steps 1')  # --out holds a run
        before = self.records()
        self.assertIn('steps 1 to 1', self.train(f'{resume} --queries 8'))
        self.assertEqual(self.records(), before, 'the evaluation of the last step stays')
        self.refuses('--out', self.train, f'{resume} --out ROOT/other')
        fewer = {**good, 'images': good['images'][:2], 'annotations': good['annotations'][:2]}
        more = {**good, 'categories': [*good['categories'], {'id': 91, 'name': 'new'}]}
        (self.root / 'coco').rename(self.root / 'moved')
        flags = '--weights ROOT/run/checkpoint.pt'
        for command in (self.train, resume), (self.evaluate, flags):
            self.refuses('/coco of .*run.* is gone.*--data', *command)
        folder, resume = self.root / 'moved' / 'annotations', f'{resume} --data ROOT/./moved/'
        (folder / 'instances_train2017.json').write_text(json.dumps(fewer))
        self.assertIn('3 images and now has 2: it no longer equals', self.train(resume))
        for split, message in (('train', 'categories of training'), ('val', 'run and data')):
            (folder / f'instances_{split}2017.json').write_text(json.dumps(more))
            self.refuses(f"{message} .*: (none and 91 'new'|91 'new' and none)", self.train, resume)
        self.refuses("none and 91 'new'", self.evaluate, f'{flags} --data ROOT/moved')

    def test_accumulated_cross_entropy_is_a_mean(self):
        """Both batches of a step hold the same two images."""
        for n in '12':
            self.train(f'--cls-loss ce --overfit 2 --steps 1 --accumulate {n}', n)
        one, two = self.records('1')[0], self.records('2')[0]
        for name in ('class', 'l1', 'encoder_class', 'gradient_norm', 'positives'):
            self.assertAlmostEqual(one[name] / two[name], 1, places=4, msg=name)

    def test_mixed_precision_and_checkpointed_activations(self):
        losses = []
        for flag in ('', '--checkpoint-activations', '--amp'):
            self.train(f'--steps 2 --scheme branch --T 16 --K 2 --denoising 4 --dropout 0.1 {flag}',
                       'run' + flag)
            losses.append(self.records('run' + flag)[0]['loss'])
        plain, checkpointed, bfloat16 = losses
        self.assertAlmostEqual(checkpointed / plain, 1, delta=1e-6, msg='dropout is drawn alike')
        self.assertAlmostEqual(bfloat16 / plain, 1, delta=0.1)
        self.assertNotEqual(bfloat16, plain)

    def test_divergence_is_named_and_never_saved(self):
        loss_of, factors = train.loss_of, [1, math.nan]

        def spoiled(*arguments):
            parts, stats = loss_of(*arguments)
            return {**parts, 'class': parts['class'] * factors.pop(0)}, stats

        def step(optimizer):
            optimizer.param_groups[0]['params'][0].data.fill_(math.nan)
            train.INTERRUPTS.extend([True] * interrupted)
        images = [', '.join(f'shapes/train/{key[1]}' for key in batch)
                  for batch in data.train_batches(8, 2, 3)]
        with mock.patch.object(train, 'loss_of', spoiled):
            self.refuses(f'step 1: class is not finite.* {images[1]}', self.train, '--steps 3')
        self.assertEqual(self.checkpoint()['step'], 1)
        for interrupted in False, True:  # Ctrl-C saves as well
            with mock.patch.object(torch.optim.AdamW, 'step', step):
                self.refuses(f'step 0: .*a weight is not finite.* {images[0]}', self.train,
                             '--steps 3 --out ROOT/none')
            train.INTERRUPTS.clear()
        self.assertFalse((self.root / 'none' / 'checkpoint.pt').exists())

    def test_full_disk_keeps_the_old_checkpoint(self):
        real = torch.save

        def save(content, path):
            if content['step'] > 1:
                Path(path).write_bytes(b'half')
                raise RuntimeError('PytorchStreamWriter failed writing file')
            real(content, path)
        with mock.patch.object(torch, 'save', save):
            self.refuses('checkpoint.pt.*writ', self.train, '--steps 3')
        self.assertEqual(self.checkpoint()['step'], 1)
        self.assertEqual(sorted(path.name for path in (self.root / 'run').iterdir()),
                         ['checkpoint.pt', 'metrics.jsonl'])

    def test_init(self):
        self.skip_evaluation()
        coco_folder(self.root / 'coco')
        self.train('--steps 1')
        run = self.checkpoint()['model']
        state = official_state(lambda name, shape: torch.rand(shape) / 100, 6, (8,), 'resnet18',
                               decoder_layers=2, ffn=32, **SIZES)
        torch.save({'model': state}, self.root / 'official.pth')
        wrapped = {f'module.{name}': x for name, x in run.items()}
        torch.save({'model': wrapped}, self.root / 'wrapped.pth')
        own, resnet = '--init ROOT/run/checkpoint.pt', '--model resnet18 --no-pretrained'
        for out, flags, new in (  # new: the matrices that are not taken from the file
                ('own', own, 'none'), ('coco', f'{own} --data ROOT/coco', '.*class_heads|label'),
                ('part', '--init ROOT/wrapped.pth --init-part backbone', r'(?!backbone\.)'),
                ('resnet', f'{own} {resnet}', 'backbone|input_proj|level|.*(offsets|attention_w)'),
                ('official', '--init ROOT/official.pth --model resnet18', 'none')):
            self.train(f'--steps 1 --seed 1 --lr 0 --weight-decay 0 {flags}', out)
            for name, x in self.checkpoint(out)['model'].items():
                old = run.get(name, torch.zeros(0))
                if out == 'official':
                    old = state[hybrid_detr.official_name(name, 2)]
                if x.dim() > 1 and x.any():  # box heads start with zeros
                    self.assertNotEqual(torch.equal(old, x), bool(re.match(new, name)), name)
        fixed = f'{own} --init-part encoder --fixed-encoder'
        self.train(f'--scheme group --G 2 --steps 2 --seed 1 {fixed}', 'fixed')
        self.train('--resume ROOT/fixed')
        for name, x in self.checkpoint('fixed')['model'].items():
            if name.startswith(train.PARTS['encoder']):  # with the statistics of batch norm
                self.assertTrue(torch.equal(x, run[name]), name)
            elif re.match(r'decoder.*(proj|linear\d)\.weight', name):
                self.assertGreater(float((x - run[name]).abs().max()), 0.01, name)
        for flags in f'{fixed} --fusion dense', f'{own} --init-part backbone {resnet}':
            self.refuses('--init-part .* lacks|none of its', self.train, f'{flags} --out ROOT/none')

    def test_backbone_from_shapes_that_are_cut_out(self):
        path = self.root / 'backbone.pt'
        with quiet() as printed, mock.patch.object(train, 'TinyBackbone', ThinBackbone):
            train.pretrain_backbone(path, workers=0, steps=40)
        accuracy = float(re.search(r'([\d.]+)%', printed.getvalue())[1])
        self.assertGreater(accuracy, 60)
        printed = self.train(f'--init {path} --init-part backbone --steps 1')
        self.assertIn('backbone.pt: 28 of', printed)

    def test_imagenet_weights_that_cannot_be_downloaded(self):
        with mock.patch('torchvision.models._api.load_state_dict_from_url', side_effect=OSError):
            self.refuses('--no-pretrained', self.train, '--model resnet18 --steps 1')

    def test_damaged_checkpoints(self):
        trace, path = self.root / 'trace', self.root / 'run' / 'checkpoint.pt'

        class Code:
            def __reduce__(self):
                return exec, (f'open({str(trace)!r}, "w")',)
        self.train('--steps 1')
        good = self.checkpoint()
        nan = torch.full_like(good['model']['level_embed'], math.nan)
        init = '--init ROOT/run/checkpoint.pt --init-part encoder --fixed-encoder --out ROOT/x'
        commands = ((self.evaluate, '--weights ROOT/run/checkpoint.pt'),
                    (self.train, '--resume ROOT/run'), (self.train, init))
        for message, used_by, place, value in (  # the commands; None: without the entry
                ('no readable', '012', 'model', None), ('no readable', '012', 'model', 3),
                ('no readable checkpoint((?!weights_only).)*$', '012', 'code', Code()),
                ('not finite', '012', 'model level_embed', nan),
                ('level_embed', '012', 'model level_embed', None),
                ('level_embed', '012', 'model level_embed', torch.ones(2)),
                ('does not fit', '0', 'architecture num_classes', None),
                ('damaged', '1', 'settings lr', None),
                ('damaged', '1', 'step', None), ('damaged', '1', 'amp', None),
                ('damaged', '1', 'optimizer state', {}),
                ('damaged', '1', 'optimizer state', {0: {'exp_avg': torch.ones(7)}})):
            content = entry = copy.deepcopy(good)
            *parents, name = place.split()
            for parent in parents:
                entry = entry[parent]
            entry[name] = value
            if value is None:
                del entry[name]
            torch.save(content, path)
            for i in used_by:
                self.refuses(message, *commands[int(i)])
        self.assertFalse(trace.exists(), 'code in a checkpoint does not run')
        for command in commands:
            path.write_bytes(b'text')
            self.refuses('no readable checkpoint', *command)
            path.unlink()
            self.refuses('checkpoint.pt: No such file', *command)

    def test_data(self):
        coco_folder(self.root / 'coco')
        run = '--scheme group --G 2 --denoising 4 --cls-loss stable --data ROOT/coco --steps 3'
        few = self.train(f'{run} --queries 1 --batch-size 1')  # an image has no box
        enough = self.train(f'{run} --queries 2', 'enough')
        self.assertEqual(['2 boxes' in x for x in (few, enough)], [True, False])

    def test_pictures(self):
        for flags in '', '--dense-o2o':
            self.train(f'--samples ROOT/samples{flags}.png {flags}')
        self.assertFalse((self.root / 'run').exists(), 'nothing is trained')
        score = self.patch(evaluation, 'unstable_score', side_effect=evaluation.unstable_score)
        self.train('--scheme group --G 2 --steps 1 --unstable 2 --cost stable')
        self.assertEqual(score.call_args.args[-1].kind, 'stable')
        self.assertEqual(len(self.records()[-1]['unstable']), 2, 'one for each decoder layer')
        self.train('--scheme group --G 2 --one-stage --steps 1', 'one')
        self.evaluate('--weights ROOT/one/checkpoint.pt --matches ROOT/one.png --unstable 2')
        weights, rows, evaluate = '--weights ROOT/run/checkpoint.pt', [], evaluation.evaluate

        def evaluate_and_keep(*arguments, **keywords):
            result = evaluate(*arguments, **keywords)
            rows.extend(result[2].tolist())
            return result
        self.patch(evaluation, 'evaluate', evaluate_and_keep)
        printed = self.evaluate(
            f'{weights} --save-json ROOT/results.json --per-class --nms 0.7 --group 1 --unstable 2 '
            '--pictures 2 --picture-file ROOT/pictures.png --pr-curve ROOT/curve.png '
            '--matches ROOT/matches.png --image 1')
        self.assertRegex(printed, r'unstable \[[\d.]+, [\d.]+\]')
        self.assertEqual(re.findall(r'(?m)^(\w+) +AP ', printed), [*data.SHAPES])
        results = json.loads((self.root / 'results.json').read_text())
        for i in range(8):
            data.ShapesDataset('val', 8, 64).load(i)[0].save(self.root / 'run' / f'{i}.bmp')
        (self.root / 'run' / 'predictions.png').unlink()
        self.evaluate(f'{weights} --images ROOT/run --save-json ROOT/found.json --nms 0.7 '
                      '--group 1 --picture-file ROOT/found.png')
        found = json.loads((self.root / 'found.json').read_text())
        for result, (image, *bbox, score, category) in zip(results, rows, strict=True):
            self.assertEqual(result, dict(image_id=image, category_id=category,
                                          bbox=bbox, score=score))
            result['file_name'] = f'{self.root}/run/{result.pop("image_id")}.bmp'
        self.assertEqual(found, results)
        drawn = [*self.root.glob('**/*.png')]
        self.assertEqual(len(drawn), 8)
        for path in drawn:
            self.looks_drawn(path)
        self.refuses('--group 2', self.evaluate, f'{weights} --group 2')
        self.refuses('--image 8', self.evaluate, f'{weights} --image 8 --matches m.png')


def tensors(content):
    """All tensors in nested dictionaries."""
    for x in content.values() if isinstance(content, dict) else ():
        yield from [x] if isinstance(x, torch.Tensor) else tensors(x)


# --- Processes and signals ---

@contextlib.contextmanager
def frozen_norm():
    """A thin model without batch norm, whose statistics are those of a batch."""
    with (mock.patch.object(nn, 'BatchNorm2d', FrozenBatchNorm2d),
          mock.patch.object(hybrid_detr, 'TinyBackbone', ThinBackbone),
          mock.patch.object(data, 'ShapesDataset', few_shapes)):
        yield


def run_file(flags, log, environment):
    """What `python train.py` does, in another process."""
    with open(log, 'w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    os.setpgrp()
    multiprocessing.set_start_method('fork', force=True)
    tqdm.set_lock(threading.RLock())  # its own would stay behind a process that is killed
    sys.argv = ['train.py', *flags]
    with frozen_norm():
        runpy.run_path(str(HERE / 'train.py'), run_name='__main__')


class TestProcesses(Commands):
    sizes = {}

    def start(self, flags, **environment):
        """Speed: the parent of these processes, a forkserver, imports torch once."""
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(['torch', 'torchvision', 'scipy.optimize'])
        self.log = self.root / 'log'
        self.log.touch()
        process = context.Process(target=run_file, args=(
            flags.replace('ROOT', str(self.root)).split(), self.log, environment))
        process.start()
        self.addCleanup(process.kill)
        return process

    def wait(self, process, condition):
        end = time.monotonic() + 240
        while not condition():
            self.assertTrue(process.is_alive() and time.monotonic() < end, self.log.read_text())
            time.sleep(0.05)

    def test_killed_and_interrupted(self):
        process = self.start(f'{SMALL} --overfit 2 --steps 100000 --out ROOT/run')
        self.wait(process, (self.root / 'run' / 'checkpoint.pt').exists)
        process.kill()
        process.join()
        step = self.checkpoint()['step']
        process = self.start('--resume ROOT/run --workers 1', WORLD_SIZE='')
        self.wait(process, lambda: len(self.records()) > step // 50)
        os.killpg(process.pid, signal.SIGTERM)  # the loading process as well
        process.join(60)
        printed, stopped = self.log.read_text(), self.checkpoint()['step']
        self.assertEqual(process.exitcode, 143, printed)
        self.assertIn(f'steps {step} to 100000', printed)
        self.assertIn(f'stopped after step {stopped}: ', printed)
        self.assertNotIn('Traceback', printed)
        self.assertEqual([record['step'] for record in self.records()],
                         [*range(50, stopped, 50), stopped])

    def test_what_is_no_fault_of_the_program(self):
        class Slow(ALL_SHAPES):
            def load(self, index):
                time.sleep(1)
        self.patch(data, 'PATIENCE', 0.3)
        with (contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), 'ascii')),
              self.assertRaisesRegex(SystemExit, '/dev/shm .*--shm-size.*--workers 0')):
            evaluation.run_command(lambda: print('\u56fe'))
            evaluation.run_command(lambda: next(iter(data.val_loader(Slow(), 1, 1))))

    def test_processes_equal_one_batch(self):
        """One batch of 4, two of 2 in turn, and two processes of 2 have the same gradient."""
        with socket.socket() as free:
            free.bind(('localhost', 0))
            address = dict(MASTER_ADDR='localhost', MASTER_PORT=str(free.getsockname()[1]))
        flags = '--scheme group --G 2 --steps 1 --cls-loss mal'
        processes = [self.start(f'{SMALL} {flags} --out ROOT/two', RANK=rank, WORLD_SIZE='2',
                                **address) for rank in '01']
        with frozen_norm():
            self.train(flags + ' --batch-size 4', 'one')
            self.train(flags + ' --accumulate 2', 'accumulated')
        for process in processes:
            process.join(240)
            self.assertEqual(process.exitcode, 0, self.log.read_text())
        one, *others = ([x['exp_avg'] for x in self.checkpoint(out)['optimizer']['state'].values()]
                        for out in ('one', 'accumulated', 'two'))  # 0.1 of the clipped gradient
        for other in others:
            torch.testing.assert_close(other, one, rtol=0, atol=1e-7)
        self.assertGreater(max(float(x.abs().max()) for x in one), 1e-4)

    def test_an_error_is_one_line_and_exit_code_1(self):
        process = self.start('--data /nowhere --out ROOT/run')
        process.join(240)
        printed = self.log.read_text()
        self.assertEqual((process.exitcode, printed.count('\n')), (1, 1), printed)
        self.assertFalse((self.root / 'run').exists())


# --- The README ---

class TestReadme(unittest.TestCase):
    def setUp(self):
        self.enterContext(contextlib.chdir(HERE))
        self.text = Path('README.md').read_text().replace('\\\n', ' ')

    def test_links(self):
        links = re.findall(r'\]\((?!http)([^)\s]+)\)', self.text)
        self.assertGreater(len(links), 20)
        for link in links:
            file, _, anchor = link.partition('#')
            with self.subTest(link):
                content = Path(file or 'README.md').read_bytes().decode(errors='ignore')
                titles = re.findall(r'^#+ (.*)', content, re.M)
                anchors = [re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-')
                           for title in titles]
                self.assertIn(anchor, ['', *anchors])

    def test_commands_are_understood(self):
        loops = re.findall(r'for (\w+) in (\S+)', self.text)  # a variable and its first value
        parsed = []
        for file, flags in re.findall(r'\b(train|eval)\.py +((?:--|\.\.\.)[^`\n;&|#]*)', self.text):
            for name, value in loops:
                flags = flags.replace(f'${name}', value)
            flags = re.sub(r'\.\.\.|--scheme NAME|--help', '', flags).split()
            parsed.append(file)
            with self.subTest(file=file, flags=flags):
                if file == 'eval':
                    evaluation.parse(flags)
                else:
                    given, machine = train.parse(flags)
                    self.assertTrue(machine.resume or train.complete(given))
        self.assertGreater(min(map(parsed.count, ('train', 'eval'))), 3)


if __name__ == '__main__':
    unittest.main()
