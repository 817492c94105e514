"""All tests:  python test_all.py     (CPU, no network, below two minutes on two cores; pytest collects them, too)

The numbers in REFERENCE were computed with the public code of HDETR/H-Deformable-DETR (commit f58ceb1). Where a folder
../shared/golden lies beside this one, every array stored there is compared as well.
"""
import ast
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tokenize
import unittest
import unittest.mock
import warnings
import zlib
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import (FrozenBatchNorm2d, box_convert, box_iou, generalized_box_iou, generalized_box_iou_loss,
                             sigmoid_focal_loss)
from torchvision.transforms import v2

import data
import eval as evaluation
import hybrid_detr
import losses
import matchers
import train
from hybrid_detr import HybridDETR, from_official, official_name
from losses import LossSettings
from matchers import (Cost, Matches, QueryGroup, assign, encoder_groups, match, matching_cost, one_to_many,
                      query_groups)

HERE = Path(__file__).parent
GOLDEN = HERE.parent / 'shared' / 'golden'
BCCD = HERE.parent / 'shared' / 'bccd'
torch.set_num_threads(1)   # models so small that more threads mostly wait for each other; and sums in the same order


@contextlib.contextmanager
def quiet():
    """Catch what is printed; yields it as a file."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()):
        yield printed


def demonstration(file):
    """What `python FILE` prints, without the seconds that a new process takes to import torch."""
    with quiet() as printed, unittest.mock.patch.object(sys, 'argv', [file]):
        runpy.run_path(str(HERE / file), run_name='__main__')
    return printed.getvalue()


# --- The small official model: weights by rule, images by seed ------------------------------------------------------

def draw(name: str, shape) -> np.ndarray:
    return np.random.RandomState(zlib.crc32((name + '#s92').encode())).standard_normal(shape).astype(np.float32)


def fill(name: str, shape) -> torch.Tensor:
    """The value of an entry of the official state dict, by its official name."""
    x = draw(name, shape)
    if name in ('transformer.level_embed', 'query_embed.weight'):
        pass
    elif name.endswith('running_var'):
        x = 1 + np.float32(0.1) * np.abs(x)
    elif len(shape) == 1:
        x = np.float32(0.1) * x + np.float32(name.endswith('weight'))
    else:
        x = x * np.float32(math.sqrt(1 / math.prod(shape[1:])))
    return torch.from_numpy(x)


def official_entries(encoder_layers, decoder_layers, ffn, classes, queries) -> dict[str, tuple]:
    """Names and shapes of the official state dict with a ResNet-50, 4 levels and 4 points."""
    entries = {'transformer.level_embed': (4, 256), 'query_embed.weight': (queries, 256)}

    def linear(name, out, into):
        entries.update({f'{name}.weight': (out, into), f'{name}.bias': (out,)})

    def norm(name, width=256):
        entries.update({f'{name}.weight': (width,), f'{name}.bias': (width,)})

    for side, layers in (('encoder', encoder_layers), ('decoder', decoder_layers)):
        for i in range(layers):
            layer = f'transformer.{side}.layers.{i}'
            attention = f'{layer}.self_attn' if side == 'encoder' else f'{layer}.cross_attn'
            for part, out in (('sampling_offsets', 256), ('attention_weights', 128), ('value_proj', 256),
                              ('output_proj', 256)):
                linear(f'{attention}.{part}', out, 256)
            if side == 'decoder':
                entries.update({f'{layer}.self_attn.in_proj_weight': (768, 256),
                                f'{layer}.self_attn.in_proj_bias': (768,)})
                linear(f'{layer}.self_attn.out_proj', 256, 256)
                norm(f'{layer}.norm3')
            linear(f'{layer}.linear1', ffn, 256)
            linear(f'{layer}.linear2', 256, ffn)
            norm(f'{layer}.norm1')
            norm(f'{layer}.norm2')
    linear('transformer.enc_output', 256, 256)
    norm('transformer.enc_output_norm')
    linear('transformer.pos_trans', 512, 512)
    norm('transformer.pos_trans_norm', 512)
    for prefix in ('', 'transformer.decoder.'):   # the second are aliases of the first
        for i in range(decoder_layers + 1):
            linear(f'{prefix}class_embed.{i}', classes, 256)
            for j, out in enumerate((256, 256, 4)):
                linear(f'{prefix}bbox_embed.{i}.layers.{j}', out, 256)
    for level, channels in enumerate((512, 1024, 2048, 2048)):
        entries.update({f'input_proj.{level}.0.weight': (256, channels, *((3, 3) if level == 3 else (1, 1))),
                        f'input_proj.{level}.0.bias': (256,)})
        norm(f'input_proj.{level}.1')
    with torch.device('meta'):
        body = hybrid_detr.Backbone('resnet50').body.state_dict()
    entries.update({f'backbone.0.body.{name}': tuple(value.shape) for name, value in body.items()})
    return entries


@functools.cache
def small_official(dtype=torch.float32):
    """-> model (20 + 60 queries, 2 + 3 layers, 11 classes), images, padding mask."""
    entries = official_entries(2, 3, 128, 11, 80)
    state = {name: fill(re.sub(r'^transformer\.decoder\.(?=class|bbox)', '', name), shape)
             for name, shape in entries.items()}
    model = from_official(state, queries=(20, 60)).to(dtype).train()
    rng, images, mask = np.random.RandomState(0), torch.zeros(2, 3, 96, 128,
                                                              dtype=dtype), torch.ones(2, 96, 128, dtype=torch.bool)
    for i, (h, w) in enumerate(((96, 128), (80, 112))):
        images[i, :, :h, :w] = torch.from_numpy(rng.standard_normal((3, h, w)).astype(np.float32))
        mask[i, :h, :w] = False
    return model, images, mask


CASES = {'A': [([3, 7, 0, 10], [[0.3, 0.35, 0.4, 0.5], [0.72, 0.6, 0.35, 0.45], [0.55, 0.22, 0.2, 0.18],
                                [0.2, 0.8, 0.28, 0.3]]),
               ([5, 1], [[0.42, 0.5, 0.6, 0.7], [0.75, 0.25, 0.3, 0.36]])]}
CASES['B'] = [CASES['A'][0], ([], [])]
CASES['C'] = [([], []), ([], [])]
# branch with n = 20, T = 60, K = 3 and one encoder head; by hand, as query_groups is an exercise
GROUPS = [QueryGroup(20, (1, 1, 1)), QueryGroup(60, (3, 3, 3))]


def ground_truths(case, dtype=torch.float32):
    return ([torch.tensor(labels, dtype=torch.int64) for labels, _ in CASES[case]],
            [torch.tensor(boxes, dtype=dtype).view(-1, 4) for _, boxes in CASES[case]])


def loss_of(outputs, labels, boxes, groups):
    proposals = encoder_groups(groups, 1, outputs.encoder_logits.shape[2])
    matches, encoder_matches = match(*outputs, labels, boxes, groups, proposals)
    return losses.criterion(outputs, labels, boxes, matches, encoder_matches, groups, proposals,
                            sum(map(len, labels)))[0]


REFERENCE = {   # official outputs and gradients: index -> numbers
    'train.pred_logits': ((2, 0, 7, slice(0, 4)), [-1.04548, -1.13426, -0.939849, 0.197015]),
    'train.pred_boxes': ((2, 1, 3), [0.109154, 0.33181, 0.397677, 0.133482]),
    'train.pred_logits_one2many': ((2, 1, 61, slice(4, 8)), [-0.71549, -1.17146, 1.63203, -0.792566]),
    'train.pred_boxes_one2many': ((2, 0, 79), [0.703683, 0.236721, 0.0786476, 0.0600721]),
    'train.aux0.pred_boxes': ((0, 0, 0), [0.0661392, 0.456508, 0.183584, 0.0409808]),
    'train.aux_one2many1.pred_logits': ((1, 0, 30, slice(0, 4)), [0.451051, 0.58661, 0.0262417, 0.258076]),
    'train.enc.pred_logits': ((0, 0, 200, slice(0, 4)), [1.23442, 1.22998, 1.37983, -1.74113]),
    'train.enc.pred_boxes': ((0, 1, 130), [0.137084, 0.895347, 0.0402376, 0.0600089]),
    'infer.pred_logits': ((2, 1, 19, slice(0, 4)), [-0.738276, -0.681838, -0.333179, -0.1122]),
    'infer.pred_boxes': ((2, 0, 11), [0.365862, 0.149605, 0.382636, 0.0988152]),
}
TOP_TOKENS = [[208, 216, 232, 225, 228, 233, 206, 224, 204, 210], [217, 225, 216, 208, 229, 221, 224, 222, 200, 209]]
TOTALS = {'A': 745.688113, 'B': 1098.62582, 'C': 5198.3938}
LAST_LAYER_PAIRS = {   # case A: query, target
    0: [[[3, 3], [8, 2], [11, 0], [19, 1]], [[13, 0], [18, 1]]],
    1: [[[0, 0], [4, 2], [15, 2], [19, 0], [21, 3], [24, 2], [26, 1], [30, 1], [31, 3], [36, 0], [37, 1], [49, 3]],
        [[11, 1], [15, 1], [21, 0], [24, 0], [25, 0], [38, 1]]]}
GRADIENTS = {   # case A: norm, and projection on the draw of the same name
    'transformer.level_embed': (48.5455979, -51.7206055),
    'transformer.encoder.layers.0.self_attn.sampling_offsets.weight': (379.220928, -149.276831),
    'transformer.decoder.layers.1.self_attn.in_proj_weight': (191.566851, -33.1068444),
    'bbox_embed.0.layers.2.weight': (25.8926027, 2.45228249), 'bbox_embed.3.layers.0.weight': (10.2752218, 12.595589),
    'class_embed.2.weight': (400.287233, 822.572518), 'query_embed.weight': (8.17874062, -8.7247685),
    'transformer.pos_trans.weight': (208.577204, 18.9254019), 'input_proj.3.0.weight': (1973.39376, 145.06436),
    'backbone.0.body.layer4.2.conv3.weight': (199.150512, 447.541479)}


class Close:
    def close(self, value, wanted, atol, message=''):
        wanted = torch.as_tensor(wanted, dtype=value.dtype)
        self.assertEqual(value.shape, wanted.shape, message)
        self.assertLessEqual(float((value.detach() - wanted).abs().max()), atol, message)


class TestParity(Close, unittest.TestCase):
    """The same numbers as the public H-Deformable-DETR."""

    def test_outputs(self):
        model, images, mask = small_official()
        outputs = {'train': model.train()(images, mask)}
        with torch.no_grad():
            outputs['infer'] = model.eval()(images, mask)
        self.assertEqual(outputs['infer'].pred_logits.shape, (3, 2, 20, 11))
        for name, (index, wanted) in REFERENCE.items():
            run = outputs[name.split('.')[0]]
            field = [f for f in ('logits', 'boxes') if f in name][0]
            value = getattr(run, ('encoder_' if '.enc.' in name else 'pred_') + field)[index]
            self.close(value, wanted, 5e-5 if field == 'logits' else 1e-5, f'{name} differs from the official model')
        top = outputs['train'].encoder_logits[0, ..., 0].topk(10).indices
        self.assertEqual(top.tolist(), TOP_TOKENS, 'other tokens are chosen than in the official model')

    def test_losses_and_matches(self):
        model, images, mask = small_official()
        with torch.no_grad():
            outputs = model.train()(images, mask)
            for case, total in TOTALS.items():
                parts = loss_of(outputs, *ground_truths(case), GROUPS)
                self.assertAlmostEqual(float(sum(parts.values())) / total, 1, delta=1e-5,
                                       msg=f'total loss of case {case}')
            matches, _ = match(*outputs, *ground_truths('A'), GROUPS, [QueryGroup(256, (1,))])
        for g, first in ((0, 0), (1, 20)):
            for image in range(2):
                keep = ((matches.layer == 2) & (matches.image == image) & (matches.query >= first)
                        & (matches.query < first + GROUPS[g].queries))
                pairs = torch.stack([matches.query[keep] - first, matches.gt[keep] - 4 * image], 1).tolist()
                self.assertEqual(sorted(pairs), LAST_LAYER_PAIRS[g][image], f'pairs of group {g}, image {image}')

    def test_gradients(self):
        # In float64: in float32 a rounding difference flips a ReLU here and there, which moves a gradient by 0.2 %.
        model, images, mask = small_official(torch.float64)
        model.train().zero_grad()
        sum(loss_of(model(images, mask), *ground_truths('A', torch.float64), GROUPS).values()).backward()
        parameters, ours = dict(model.named_parameters()), {official_name(name, 3): name for name in model.state_dict()}
        for name, (norm, projection) in GRADIENTS.items():
            gradient = parameters[ours[name]].grad
            self.assertAlmostEqual(float(gradient.norm()) / norm, 1, delta=1e-6, msg=f'gradient norm of {name}')
            along = float((gradient * torch.from_numpy(draw(name, gradient.shape))).sum())
            self.assertAlmostEqual(along / norm, projection / norm, delta=1e-5, msg=f'gradient of {name}')
        self.assertIsNone(parameters['backbone.body.conv1.weight'].grad, 'stem and first stage must be frozen')

    def test_from_official_names_what_is_wrong(self):
        state = {name: torch.zeros(shape) for name, shape in official_entries(1, 1, 8, 2, 5).items()}
        from_official(state, (2, 3))
        for broken, message in (({**state, 'transformer.extra': torch.zeros(1)}, 'transformer.extra'),
                                ({k: v for k, v in state.items() if k != 'input_proj.2.0.bias'}, 'input_proj.2.0.bias'),
                                ({k: v for k, v in state.items() if 'class_embed.1.bias' not in k},
                                 'class_embed.1.bias'),
                                ({k: v for k, v in state.items() if k != 'transformer.decoder.class_embed.1.bias'},
                                 'transformer.decoder.class_embed.1.bias'),
                                ({k: v for k, v in state.items() if k != 'query_embed.weight'}, 'query_embed.weight'),
                                ({**state, 'input_proj.0.0.bias': torch.zeros(3)}, 'input_proj.0.0.bias'),
                                ({**state, 'transformer.decoder.class_embed.0.bias': torch.ones(2)},
                                 'class_embed.0.bias')):
            with self.assertRaisesRegex(ValueError, re.escape(message)):
                from_official(broken, (2, 3))
        with self.assertRaisesRegex(ValueError, 'query_embed'):
            from_official(state, (300, 1500))


@unittest.skipUnless(GOLDEN.exists(), f'{GOLDEN} is not there')
class TestGolden(Close, unittest.TestCase):
    """Every array of ../shared/golden that concerns the detector and its loss."""

    @classmethod
    def setUpClass(cls):
        cls.arrays = np.load(GOLDEN / 'official_small.npz')
        cls.facts = json.loads((GOLDEN / 'official_small.json').read_text())

    def same(self, value, name, atol, zero_at=None):
        wanted = torch.from_numpy(self.arrays[name])
        if zero_at is not None:
            value = value.masked_fill(zero_at, 0)
        if wanted.dtype in (torch.bool, torch.int64):
            self.assertTrue(torch.equal(value, wanted), name)
        else:
            finite = wanted.isfinite()
            self.assertTrue(torch.equal(value.isfinite(), finite), name)
            self.close(value[finite], wanted[finite], atol, name)

    def test_arrays(self):
        model, images, mask = small_official()
        seen = {}
        hooks = [model.backbone.register_forward_hook(lambda m, i, o: seen.update(backbone=o)),
                 model.encoder[-1].register_forward_hook(lambda m, i, o: seen.update(memory=o)),
                 model.decoder[0].register_forward_pre_hook(lambda m, i: seen.update(position=i[1]))]
        hooks += [p.register_forward_hook(lambda m, i, o, v=v: seen.update({f'feat{v}': o}))
                  for v, p in enumerate(model.input_proj)]
        hooks += [d.register_forward_hook(lambda m, i, o, l=l: seen.update({f'hs{l}': o}))
                  for l, d in enumerate(model.decoder)]
        with torch.no_grad():
            outputs = model.train()(images, mask)
            shapes = [tuple(seen[f'feat{v}'].shape[2:]) for v in range(4)]
            where = hybrid_detr.geometry(mask, shapes, torch.zeros(4, 256))
            boxes = torch.cat(model.select(*model.propose(seen['memory'], where, 1), model.groups), 1)
            for hook in hooks:
                hook.remove()
            inference = model.eval()(images, mask)
        self.same(mask, 'batch_mask', 0)
        for name, value in zip(('c3', 'c4', 'c5'), seen['backbone']):
            self.same(value[:, :8], f'backbone_{name}_first8', 1e-4)
        paddings = where.padding.split([h * w for h, w in shapes], 1)
        codes = where.position.split([h * w for h, w in shapes], 1)
        for v, (h, w) in enumerate(shapes):
            self.same(seen[f'feat{v}'][:, ::2], f'feat{v}_ch2', 1e-4)
            self.same(paddings[v].view(2, h, w), f'mask{v}', 0)
            self.same(codes[v][1].T.reshape(256, h, w), f'pos{v}', 1e-5, paddings[v][1].view(h, w))
        self.same(torch.tensor(shapes), 'spatial_shapes', 0)
        self.same(where.valid_ratios, 'valid_ratios', 1e-5)
        self.same(where.centres[:, :, None] * where.valid_ratios[:, None], 'enc_reference_points', 1e-5)
        self.same(seen['memory'][..., ::2], 'memory_ch2', 1e-4, where.padding[..., None])
        self.same(hybrid_detr.initial_boxes(where), 'proposals_unact', 1e-5)
        self.same(outputs.encoder_logits[0, ..., 0].topk(80).indices, 'topk_proposals', 0)
        self.same(inference.encoder_logits[0, ..., 0].topk(20).indices, 'infer.topk_proposals', 0)
        self.same(boxes, 'init_reference', 1e-5)
        self.same(seen['position'][..., :32], 'query_pos_first32', 5e-5)
        self.same(torch.stack([seen[f'hs{l}'] for l in range(3)])[..., :32], 'decoder_hs_first32', 5e-5)
        self.same(outputs.pred_boxes, 'inter_references', 1e-5)
        for kind, atol in (('logits', 5e-5), ('boxes', 1e-5)):
            value, at_inference = getattr(outputs, f'pred_{kind}'), getattr(inference, f'pred_{kind}')
            for layer, one, many, infer in ((2, 'train.', 'train.%s_one2many', 'infer.'),
                                            (0, 'train.aux0.', 'train.aux_one2many0.%s', 'infer.aux0.'),
                                            (1, 'train.aux1.', 'train.aux_one2many1.%s', 'infer.aux1.')):
                self.same(value[layer, :, :20], f'{one}pred_{kind}', atol)
                self.same(value[layer, :, 20:], many % f'pred_{kind}', atol)
                self.same(at_inference[layer], f'{infer}pred_{kind}', atol)
            self.same(getattr(outputs, f'encoder_{kind}')[0], f'train.enc.pred_{kind}', atol)
        found = evaluation.detections(inference, [(96, 128), (80, 112)])
        for name, values, atol in zip(('scores', 'labels', 'boxes'), zip(*found), (1e-5, 0, 5e-3)):
            self.same(torch.stack(values), f'post.{name}', atol)

    def test_losses_of_each_layer_and_branch(self):
        model, images, mask = small_official()
        with torch.no_grad():
            outputs = model.train()(images, mask)
        for case, facts in self.facts['cases'].items():
            labels, boxes = ground_truths(case)
            matches, encoder_matches = match(*outputs, labels, boxes, GROUPS, [QueryGroup(256, (1,))])
            pairs = {}
            for layer in range(3):
                for branch, rows in (('', slice(0, 20)), ('_one2many', slice(20, 80))):
                    keep = (matches.layer == layer) & (matches.query >= rows.start) & (matches.query < rows.stop)
                    part = Matches(matches.layer[keep] - layer, matches.image[keep], matches.query[keep] - rows.start,
                                   matches.gt[keep])
                    group = GROUPS[branch != '']
                    values = losses.set_loss(outputs.pred_logits[layer:layer + 1, :, rows],
                                             outputs.pred_boxes[layer:layer + 1, :, rows], labels, boxes, part,
                                             [group._replace(copies=group.copies[layer:layer + 1])],
                                             sum(map(len, labels)))
                    for name, weight, value in zip(('ce', 'bbox', 'giou'), (2, 5, 2), values):
                        wanted = facts['losses'][f'loss_{name}{"" if layer == 2 else f"_{layer}"}{branch}']
                        self.assertAlmostEqual(float(value) / weight, wanted, delta=1e-5 + 2e-5 * abs(wanted),
                                               msg=f'{case} {name} {layer}{branch}')
                    pairs[f'{"one2many" if branch else "one2one"}.layer{layer}'] = part
            pairs['encoder'] = encoder_matches
            for name, part in pairs.items():
                found = [sorted([q, g - sum(map(len, labels[:b]))]
                                for q, g, i in zip(*(x.tolist() for x in (part.query, part.gt, part.image))) if i == b)
                         for b in range(2)]
                self.assertEqual(found, facts['matches'][name], f'{case} {name}')
            parts = loss_of(outputs, labels, boxes, GROUPS)
            for name, weight in (('class', 2), ('l1', 5), ('giou', 2)):
                wanted = weight * facts['losses'][f'loss_{dict(l1="bbox").get(name, name).replace("class", "ce")}_enc']
                self.assertAlmostEqual(float(parts[f'encoder_{name}']), wanted, delta=1e-5 + 2e-5 * wanted,
                                       msg=f'{case} encoder {name}')
            self.assertAlmostEqual(float(sum(parts.values())) / facts['weighted_total'], 1, delta=1e-5)

    def test_all_gradients(self):
        model, images, mask = small_official(torch.float64)
        model.train()
        outputs = model(images, mask)
        parameters, ours = dict(model.named_parameters()), {official_name(name, 3): name for name in model.state_dict()}
        for case, facts in self.facts['cases'].items():
            model.zero_grad()
            sum(loss_of(outputs, *ground_truths(case, torch.float64), GROUPS).values()).backward(retain_graph=True)
            for name, norm in facts['grad_norm_float64'].items():
                parameter = parameters[ours[name]]
                if norm is None:
                    self.assertIsNone(parameter.grad, name)
                    continue
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                self.assertAlmostEqual(float(gradient.norm()), norm, delta=1e-5 * norm + 1e-6, msg=f'{case} {name}')
                along = float((gradient * torch.from_numpy(draw(name, gradient.shape))).sum())
                self.assertAlmostEqual(along, facts['grad_proj'][name], delta=2e-5 * norm + 1e-5, msg=f'{case} {name}')

    def test_attention_core(self):
        arrays = np.load(GOLDEN / 'msdeform_attn.npz')
        for dtype, atol in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
            value, locations, weights = (torch.from_numpy(arrays[name]).to(dtype).requires_grad_()
                                         for name in ('value', 'sampling_locations', 'attention_weights'))
            shapes = [tuple(s) for s in arrays['spatial_shapes'].tolist()]
            output = hybrid_detr.deformable_attention(value, shapes, locations, weights)
            self.close(output, arrays['output'], atol)
            output.backward(torch.from_numpy(arrays['grad_output']).to(dtype))
            for name, tensor in (('value', value), ('sampling_locations', locations), ('attention_weights', weights)):
                self.close(tensor.grad, arrays[f'grad_{name}'], atol, name)

    def test_geometry_of_wide_padded_images(self):
        arrays = np.load(GOLDEN / 'geometry.npz')
        sizes, shapes = arrays['image_sizes'].tolist(), [tuple(s) for s in arrays['spatial_shapes'].tolist()]
        mask = torch.ones(3, max(h for h, _ in sizes), max(w for _, w in sizes), dtype=torch.bool)
        for row, (h, w) in zip(mask, sizes):
            row[:h, :w] = False
        where = hybrid_detr.geometry(mask, shapes, torch.zeros(4, 256))
        start = 0
        for v, (h, w) in enumerate(shapes):
            padding = where.padding[:, start:start + h * w].view(3, h, w)
            self.assertTrue(torch.equal(padding, torch.from_numpy(arrays[f'mask{v}'])))
            code = where.position[:, start:start + h * w, arrays['pos_channels']].transpose(1, 2).reshape(3, -1, h, w)
            self.close(code.masked_fill(padding[:, None], 0), arrays[f'pos{v}'], 1e-5)
            start += h * w
        self.close(where.valid_ratios, arrays['valid_ratios'], 1e-5)
        self.close(where.centres[:, :, None] * where.valid_ratios[:, None], arrays['enc_reference_points'], 1e-5)
        proposal, wanted = hybrid_detr.initial_boxes(where), torch.from_numpy(arrays['proposals_unact'])
        self.assertTrue(torch.equal(proposal.isinf(), wanted.isinf()))
        self.assertTrue(torch.equal(~proposal.isinf().any(-1), torch.from_numpy(arrays['proposal_valid'])))
        self.close(proposal[~wanted.isinf()], wanted[~wanted.isinf()], 1e-5)
        self.close(hybrid_detr.sine_code(torch.from_numpy(arrays['proposal_embed_in']).sigmoid(), 128),
                   arrays['proposal_embed_out'], 1e-5)

    def test_all_631_entries(self):
        rows = json.loads((GOLDEN / 'official_full_state_dict.json').read_text())
        entries = official_entries(6, 6, 2048, 91, 1800)
        self.assertEqual({name: tuple(shape) for name, shape in rows}, entries)
        model = from_official({name: torch.zeros(shape) for name, shape in rows})
        self.assertEqual(sum(p.numel() for p in model.parameters() if p.requires_grad), 47_723_673)


@unittest.skipUnless(GOLDEN.exists(), f'{GOLDEN} is not there')
class TestGoldenLosses(Close, unittest.TestCase):
    """Every array of ../shared/golden/losses_and_costs.npz that concerns what is here, in float64.

    Not here, and so not compared: the union set of D-FINE models, alpha in MAL (no released model uses it), LW-DETR's
    own class losses, and the list of image sizes.
    """

    @classmethod
    def setUpClass(cls):
        arrays = {name: torch.from_numpy(np.asarray(x)) for name, x in
                  np.load(GOLDEN / 'losses_and_costs.npz').items()}
        cls.arrays, cls.sizes = arrays, arrays['in.tgt_sizes'].tolist()
        cls.labels, cls.gts = (list(arrays[f'in.tgt_{x}'].split(cls.sizes)) for x in ('labels', 'boxes'))
        image = torch.arange(2).repeat_interleave(arrays['in.tgt_sizes'])
        first = torch.tensor([0, cls.sizes[0]])[image]
        cls.matches = Matches(torch.zeros_like(image), image, arrays['in.match_src'], arrays['in.match_tgt'] + first)
        cls.groups = [QueryGroup(12, (1,))]

    def same(self, value, name, rtol=1e-6, atol=1e-12):
        wanted = self.arrays[name]
        if wanted.dtype in (torch.bool, torch.int64):
            self.assertEqual(torch.as_tensor(value).tolist(), wanted.tolist(), name)
        else:
            torch.testing.assert_close(value.detach(), wanted, rtol=rtol, atol=atol, check_dtype=False, 
                                       msg=lambda text: f'{name}: {text}')

    def pairs(self, name, copies=1, shift=0):
        sizes = self.arrays[f'{name}.assign.sizes'].tolist()
        src, tgt = (self.arrays[f'{name}.assign.{x}'].split(sizes) for x in ('src', 'tgt'))
        return [sorted(zip(s.tolist(), t.tolist())) for s, t in zip(src, tgt)]

    def found(self, matches, layer=0):
        """(query, ground truth of the image) pairs of each image."""
        keep = matches.layer == layer
        return [sorted(zip(matches.query[keep & (matches.image == b)].tolist(),
                           (matches.gt[keep & (matches.image == b)] - first).tolist()))
                for b, first in enumerate((0, self.sizes[0]))]

    def test_losses_and_gradients(self):
        official = dict(official=True)
        for name, how, rtol in (
                ('a.ce', LossSettings('ce', 1), 1e-6), ('b.focal', LossSettings('focal', 1), 1e-6),
                ('b.focal_paper_formula', LossSettings('focal', 1), 1e-6),
                ('c.vfl', LossSettings('vfl', 1, **official), 1e-6),
                ('c.vfl_paper_formula', LossSettings('vfl', 1), 1e-6),
                ('d.mal_alpha_none', LossSettings('mal', 1, **official), 1e-6),
                ('d.mal_paper_eq3', LossSettings('mal', 1), 1e-6),
                ('e.paper_eq3_no_rescale', LossSettings('stable', 1, rescale='none'), 1e-6),
                ('e.paper_eq3_no_rescale_with_alpha025', LossSettings('stable', 1, rescale='none', **official), 1e-6),
                ('e.paper_eq3_rescale_to_max_iou', LossSettings('stable', 1, rescale='max-iou'), 1e-6),
                ('e.paper_eq3_rescale_to_max_iou_with_alpha025',
                 LossSettings('stable', 1, rescale='max-iou', **official), 1e-6),
                ('e.paper_eq3_rescale_to_one', LossSettings('stable', 1), 1e-6),
                ('e.paper_eq3_rescale_to_one_with_alpha025', LossSettings('stable', 1, **official), 1e-6),
                # The epsilons of Stable-DINO's code (1e-8 in logarithms, 1e-6 in boxes) show in the fifth digit.
                ('e.stabledino_code', LossSettings('stable', 1, **official), 1e-5)):
            logits = self.arrays['in.logits_ce' if name == 'a.ce' else 'in.logits'].clone().requires_grad_()
            loss, *_ = losses.set_loss(logits[None], self.arrays['in.boxes'][None], self.labels, self.gts, self.matches,
                                       self.groups, 5, how)
            self.same(loss, f'{name}.loss', rtol)
            self.same(torch.autograd.grad(loss, logits)[0], f'{name}.grad_logits', rtol,
                      1e-6 if rtol > 1e-6 else 1e-12)
            if f'{name}.grad_boxes' in self.arrays:   # here there is none: test_no_gradient_from_class_loss_to_boxes
                self.assertEqual(float(self.arrays[f'{name}.grad_boxes'].abs().max()), 0, name)
            if f'{name}.sum' in self.arrays:
                self.same(loss * 5, f'{name}.sum', rtol)
        for name in ('exp', 'sin'):   # the code applies them to the square, before the rescale
            with unittest.mock.patch.dict(losses.F1, {name: lambda s, p, f=losses.F1[name]: f(s ** 2, p)}):
                loss, *_ = losses.set_loss(self.arrays['in.logits'][None], self.arrays['in.boxes'][None], self.labels,
                                           self.gts, self.matches, self.groups, 5,
                                           LossSettings('stable', 1, f1=name, **official))
            self.same(loss, f'e.stabledino_code_post_{name}.loss', 1e-5)

    def test_elementwise_and_targets(self):
        logits, shape = self.arrays['in.logits'], (2, 12, 5)
        matched, iou = torch.zeros(2, shape[1], shape[2], dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        label = torch.cat(self.labels)[self.matches.gt]
        at = (self.matches.image, self.matches.query, label)
        matched[at] = 1
        iou[at], giou = losses.pair_iou(*(box_convert(x, 'cxcywh', 'xyxy') for x in (
            self.arrays['in.boxes'][self.matches.image, self.matches.query], torch.cat(self.gts)[self.matches.gt])))
        self.same(iou[at], 'e.stabledino_code.matched_iou', 1e-4)
        best = losses.largest_iou(self.arrays['in.boxes'][None], self.gts, [12])[0, :, 0]
        self.same(best, 'e.stabledino_code.max_iou_all_pairs_per_image', 1e-4)
        self.same(losses.class_loss(logits, matched, iou), 'b.focal_paper_formula.elementwise')
        self.same(losses.class_loss(logits, matched, iou, LossSettings('vfl')), 'c.vfl_paper_formula.elementwise')
        self.same(losses.class_loss(logits, matched, iou, LossSettings('mal')), 'd.mal_paper_eq3.elementwise')
        self.same(iou ** 2, 'e.stabledino_code.target_before_rescale', 1e-4)
        for rescale, name in (('none', 'no_rescale'), ('one', 'rescale_to_one'), ('max-iou', 'rescale_to_max_iou')):
            target = torch.zeros_like(iou)
            largest = {'none': None, 'one': torch.ones_like(best), 'max-iou': best}[rescale]
            target[at] = losses.stable_target(iou[at], iou[at], self.matches.image, largest)
            self.same(target, f'e.paper_eq3_{name}.target_table')
            for official, suffix in ((False, ''), (True, '_with_alpha025')):
                loss = losses.class_loss(logits, matched, target, LossSettings('stable', official=official))
                self.same(loss, f'e.paper_eq3_{name}{suffix}.elementwise')
                self.same(loss.sum(), f'e.paper_eq3_{name}{suffix}.sum')
            if rescale == 'one':
                self.same(target, 'e.stabledino_code.target_table', 1e-4)
                self.same((loss * matched).sum(), 'e.stabledino_code.pos_sum', 1e-5)
                self.same((loss * (1 - matched)).sum(), 'e.stabledino_code.neg_sum', 1e-5)

    def test_box_losses(self):
        for i, name in ((1, 'f.l1'), (2, 'f.giou')):
            boxes = self.arrays['in.boxes'].clone().requires_grad_()
            loss = losses.set_loss(self.arrays['in.logits'][None], boxes[None], self.labels, self.gts, self.matches,
                                   self.groups, 5)[i] / (1, losses.L1_WEIGHT, losses.GIOU_WEIGHT)[i]
            self.same(loss, f'{name}.loss')
            self.same(torch.autograd.grad(loss, boxes)[0], f'{name}.grad_boxes')
        self.same(loss, 'f.detrex_giou.loss', 1e-4)   # detrex adds 1e-6 to union and hull
        self.same(torch.autograd.grad(losses.set_loss(
            self.arrays['in.logits'][None], boxes[None], self.labels, self.gts, self.matches, self.groups, 5)[2] / 2,
            boxes)[0], 'f.detrex_giou.grad_boxes', 1e-3, 1e-4)
        boxes, gts = (box_convert(self.arrays[x], 'cxcywh', 'xyxy') for x in ('in.boxes', 'in.tgt_boxes'))
        self.same(torch.stack([generalized_box_iou(b, gts) for b in boxes]), 'g.giou_all_pairs')
        self.same(torch.stack([box_iou(b, gts) for b in boxes]), 'g.iou_all_pairs')

    def cost(self, how, logits='in.logits'):
        """(2, 12, 5): every image against the ground truths of both, as the golden arrays are."""
        return torch.stack([matching_cost(x[None], b[None], self.arrays['in.tgt_labels'], self.arrays['in.tgt_boxes'],
                                          how)[0] for x, b in zip(self.arrays[logits], self.arrays['in.boxes'])])

    def test_costs_and_assignments(self):
        plain = self.cost(Cost(class_weight=0))
        for name, how, logits, shift, atol in (
                ('g.deim', Cost(), 'in.logits', 0, 1e-12), ('g.detrex_focal', Cost(), 'in.logits', 0, 1e-4),
                ('g.detr_softmax', Cost(class_weight=1, softmax=True), 'in.logits_ce', 0, 1e-12),
                ('g.paper_eq2', Cost('stable', f2=0), 'in.logits', 2, 1e-5),   # s'^0 = 1; 1e-8 in our logarithms
                ('g.paper_eq2_with_alpha025', Cost('stable', f2=0, official=True), 'in.logits', 2, 1e-5),
                ('g.paper_eq4', Cost('stable'), 'in.logits', 2, 1e-5),
                ('g.paper_eq4_with_alpha025', Cost('stable', official=True), 'in.logits', 2, 1e-5)):
            cost = self.cost(how, logits)
            self.same(cost + shift, f'{name}.total', 1e-6, atol)
            if f'{name}.cost_class' in self.arrays:
                self.same((cost - plain) / how.class_weight, f'{name}.cost_class', 1e-6, max(atol, 1e-9))
            costs = [cost[b:b + 1, :, columns] for b, columns in enumerate((slice(0, 3), slice(3, 5)))]
            self.assertEqual(self.found(assign(costs, self.groups)), self.pairs(name), name)

    def test_parts_of_the_cost(self):
        giou = self.arrays['g.giou_all_pairs']
        self.same(((giou + 1) / 2) ** 0.5, 'g.paper_eq4.f2')
        l1 = (self.cost(Cost(class_weight=0)) + 2 * giou) / 5
        for name, shift, atol in (('deim', 0, 1e-9), ('detrex_focal', 0, 1e-4), ('detr_softmax', 0, 1e-9),
                                  ('stabledino_code', 1, 1e-4)):
            self.same(l1, f'g.{name}.cost_bbox', 1e-6, 1e-9)
            self.same(shift - giou, f'g.{name}.cost_giou', 1e-6, atol)
        encoder = torch.stack([matching_cost(x[None], b[None], torch.zeros(5, dtype=torch.int64),
                                             self.arrays['in.tgt_boxes'])[0]
                               for x, b in zip(self.arrays['in.enc_logits'], self.arrays['in.enc_boxes'])])
        self.same(encoder, 'i.encoder_binary.total_cost', 1e-6, 1e-9)
        gts = self.arrays['in.tgt_labels'], self.arrays['in.tgt_boxes']
        many = torch.stack([matching_cost(x[None], b[None], *gts)[0]
                            for x, b in zip(self.arrays['in.o2m_logits'], self.arrays['in.o2m_boxes'])])
        repeated = torch.cat([many[..., :3].repeat(1, 1, 3), many[..., 3:].repeat(1, 1, 3)], 2)   # of each image
        self.same(repeated, 'i.one2many_K3.total_cost', 1e-6, 1e-9)
        self.assertEqual(float(self.arrays['i.one2many_K3.num_boxes']), 3 * 5)

    def test_stable_dinos_code_overwrites_qualities(self):
        """The released code's table of qualities, rebuilt: it differs from one quality a pair exactly where a later
        ground truth of the same class has overwritten the column."""
        labels, giou = self.arrays['in.tgt_labels'], self.arrays['g.stabledino_code.giou01_per_pair']
        table, last = torch.zeros(2, 12, 5, dtype=torch.float64), {}
        for j, label in enumerate(labels.tolist()):
            table[..., label], last[label] = giou[..., j], j
        writer = torch.tensor([last[label] for label in labels.tolist()])
        self.same(writer, 'g.stabledino_code.column_written_by_target')
        scale = (1 / (table.amax((1, 2)) + 1e-8)).clamp(min=1)
        self.same(scale, 'g.stabledino_code.image_scale', 1e-6)
        self.same(table * scale[:, None, None], 'g.stabledino_code.quality_table')
        used = (table * scale[:, None, None])[..., labels]
        self.same(used, 'g.stabledino_code.quality_used_per_target')
        own = torch.arange(5) == writer
        differs = ((used - giou * scale[:, None, None]).abs() > 1e-9).flatten(0, 1).any(0)
        self.assertEqual(differs.tolist(), (~own).tolist(), 'exactly the overwritten ground truths')
        # With qualities put in from outside, our cost is the code's: overwritten ones, or one a pair.
        for name, quality in (('code', used), ('per_pair', self.arrays['g.stabledino_per_pair.quality'])):
            p = self.arrays['in.logits'][..., labels].sigmoid() * quality ** 0.5
            of_class = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p ** 2 * -(1 - p + 1e-8).log()
            self.same(of_class, f'g.stabledino_{name}.cost_class', 1e-6, 1e-9)
            cost = 2 * of_class + self.cost(Cost(class_weight=0)) + 2
            self.same(cost, f'g.stabledino_{name}.total', 1e-6, 1e-4)
            costs = [cost[b:b + 1, :, columns] for b, columns in enumerate((slice(0, 3), slice(3, 5)))]
            self.assertEqual(self.found(assign(costs, self.groups)), self.pairs(f'g.stabledino_{name}'), name)
        self.assertNotEqual(self.pairs('g.stabledino_code'), self.pairs('g.stabledino_per_pair'))

    def test_group_detr(self):
        logits, boxes = (self.arrays[f'in.{x}'].clone().requires_grad_() for x in ('logits', 'boxes'))
        encoder = torch.zeros(1, 2, 3, 5), torch.full((1, 2, 3, 4), 0.5)
        for weight, name in ((1 / 3, 'mean'), (1.0, 'sum')):
            groups = [QueryGroup(4, (1,), weight)] * 3
            matches, _ = match(logits[None], boxes[None], *(x.double() for x in encoder), self.labels, self.gts, groups,
                               [QueryGroup(3, (1,))])
            self.assertEqual(self.found(matches), self.pairs('h.group_K3'))
            parts = losses.set_loss(logits[None], boxes[None], self.labels, self.gts, matches, groups, 5)[:3]
            for part, divisor, value in zip(('ce', 'bbox', 'giou'), (2, 5, 2), parts):
                self.same(value / divisor, f'h.group_K3.{name}.loss_{part}')
            self.same(sum(parts), f'h.group_K3.{name}.total_2_5_2.loss')
            for x, gradient in zip(('logits', 'boxes'), torch.autograd.grad(sum(parts), (logits, boxes))):
                self.same(gradient, f'h.group_K3.{name}.total_2_5_2.grad_{x}')
        for g in range(3):
            rows = slice(4 * g, 4 * g + 4)
            keep = (matches.query >= rows.start) & (matches.query < rows.stop)
            part = Matches(*(x[keep] for x in matches))
            values = losses.set_loss(logits[None, :, rows], boxes[None, :, rows], self.labels, self.gts,
                                     part._replace(query=part.query - rows.start), [QueryGroup(4, (1,))], 5)
            for name, divisor, value in zip(('ce', 'bbox', 'giou'), (2, 5, 2), values):
                torch.testing.assert_close(value / divisor, self.arrays[f'h.group_K3.per_group.loss_{name}'][g])

    def test_h_detr_one_to_many_and_encoder(self):
        x, b = (self.arrays[f'in.o2m_{n}'].clone().requires_grad_() for n in ('logits', 'boxes'))
        groups = [QueryGroup(15, (3,))]
        encoder = self.arrays['in.enc_logits'][None], self.arrays['in.enc_boxes'][None]
        matches, encoder_matches = match(x[None], b[None], *encoder, self.labels, self.gts, groups,
                                         [QueryGroup(12, (1,))])
        self.assertEqual(self.found(matches), self.pairs('i.one2many_K3'))
        self.assertEqual(self.found(encoder_matches), self.pairs('i.encoder_binary'))
        parts = losses.set_loss(x[None], b[None], self.labels, self.gts, matches, groups, 5)[:3]
        self.same(sum(parts), 'i.one2many_K3.total_2_5_2.loss')
        for name, gradient in zip(('logits', 'boxes'), torch.autograd.grad(sum(parts), (x, b))):
            self.same(gradient, f'i.one2many_K3.total_2_5_2.grad_{name}')
        zero = [torch.zeros_like(label) for label in self.labels]
        encoder_parts = losses.set_loss(*encoder, zero, self.gts, encoder_matches, self.groups, 5)
        one, _ = match(self.arrays['in.logits'][None], self.arrays['in.boxes'][None], *encoder, self.labels, self.gts,
                       self.groups, self.groups)
        self.assertEqual(self.found(one), self.pairs('i.one2one'))
        one_parts = losses.set_loss(self.arrays['in.logits'][None], self.arrays['in.boxes'][None], self.labels,
                                    self.gts, one, self.groups, 5)
        for values, suffix in ((one_parts, ''), (encoder_parts, '_enc'), (parts, '_one2many')):
            for name, weight, value in zip(('ce', 'bbox', 'giou'), (2, 5, 2), values):
                self.same(value / weight, f'i.loss_{name}{suffix}')

    def test_deim(self):
        """The whole criterion without the union set, which D-FINE models have and RT-DETRv2 models have not."""
        logits, boxes = (self.arrays[f'in.{x}'].clone().requires_grad_() for x in ('logits', 'boxes'))
        total = 0
        for name, suffix, x, b in (('layer_final', '', logits, boxes),
                                   *((f'layer_aux{l}', f'_aux_{l}', self.arrays['in.aux_logits'][l],
                                      self.arrays['in.aux_boxes'][l]) for l in range(2)),
                                   ('layer_enc', '_enc_0', self.arrays['in.enc_logits'], self.arrays['in.enc_boxes'])):
            matches, _ = match(x[None], b[None], x[None], b[None], self.labels, self.gts, self.groups, self.groups)
            self.assertEqual(self.found(matches), self.pairs(f'j.{name}'))
            parts = losses.set_loss(x[None], b[None], self.labels, self.gts, matches, self.groups, 5,
                                    LossSettings('mal', 1.0, official=True))[:3]
            total = total + sum(parts)
            for part, value in zip(('mal', 'bbox', 'giou'), parts):
                self.same(value, f'j.deim_union_off.loss_{part}{suffix}')
        self.same(total, 'j.deim_union_off.total.loss')
        for name, gradient in zip(('logits', 'boxes'), torch.autograd.grad(total, (logits, boxes))):
            self.same(gradient, f'j.deim_union_off.total.grad_{name}')

    def test_schedule_and_average(self):
        per_epoch, epochs, warmup, _, _, lr, _ = self.arrays[
            'k.lr.iter_per_epoch_total_warmup_flat_noaug_lr_gamma'].tolist()
        settings, steps = dict(schedule='flat-cosine', warmup=warmup / (per_epoch * epochs)), per_epoch * epochs
        factors = [train.lr_factor(settings, i / steps) for i in self.arrays['k.lr.iterations'].tolist()]
        self.same(lr * torch.tensor(factors, dtype=torch.float64), 'k.lr.values', 1e-6, 1e-15)
        decay, warmup = self.arrays['k.ema.decay_warmups'].tolist()
        model, average, found = torch.nn.Linear(1, 1).double(), torch.nn.Linear(1, 1).double(), []
        torch.nn.init.ones_(average.weight)
        for step in range(1, 13):
            torch.nn.init.constant_(model.weight, 1 + step)
            train.update_average(average, model, step, decay, warmup)
            found.append(average.weight.item())
        self.same(torch.tensor(found, dtype=torch.float64), 'k.ema.weight_after_updates_1_to_12_when_model_is_2_3_4')

    def test_denoising(self):
        counts, groups = self.arrays['l.cdn_detrex.tgt_sizes'].tolist(), int(self.arrays['l.cdn_detrex.num_groups'])
        labels, boxes = random_targets(np.random.default_rng(0), counts, 5)
        number = int(self.arrays['l.cdn_detrex.dn_number'])
        noised = matchers.denoising_queries(labels, boxes, 5, number, label_noise=0.0)
        self.assertEqual((noised.groups, groups), (groups, int(self.arrays['l.cdn_deim.num_groups'])))
        low, high, far_low, far_high, changed = self.arrays[
            'l.cdn_detrex.noise_over_half_size_minpos_maxpos_minneg_maxneg_and_label_change_rate'].tolist()
        torch.manual_seed(0)
        many = matchers.denoising_queries([torch.tensor([1])], [torch.tensor([[0.5, 0.5, 0.1, 0.2]])], 5, 20000)
        moved = (box_convert(many.boxes.view(-1, 2, 4), 'cxcywh', 'xyxy') - torch.tensor([0.45, 0.4, 0.55, 0.6])).abs()
        moved = moved / torch.tensor([0.05, 0.1, 0.05, 0.1])
        near = moved[:, 0]
        uncrossed = moved[:, 1][(many.boxes.view(-1, 2, 4)[:, 1, 2:] > torch.tensor([0.2, 0.4])).all(1)]
        for found, wanted in ((near.min(), low), (near.max(), high), (uncrossed.min(), far_low),
                              (uncrossed.max(), far_high)):
            self.assertAlmostEqual(float(found), wanted, delta=0.02)
        self.assertAlmostEqual(float((many.labels != 1).double().mean()), changed, delta=0.01)
        # Stable-DINO's released settings have no contrast; the paper's (DINO's) are taken here.
        self.assertLess(float(self.arrays['l.cdn_stabledino_default.noise_over_half_size_minpos_maxpos_minneg_maxneg_'
                                          'and_label_change_rate'][3]), 1)
        self.assertEqual(noised.labels.shape[1] // groups, int(self.arrays['l.cdn_detrex.queries_per_group']))
        self.same(noised.labels < 5, 'l.cdn_detrex.slot_is_used')
        matches, positive = assign([torch.zeros(1, 0, m) for m in counts], [noised.query_group(1)]), torch.zeros(2, 12)
        positive[matches.image, matches.query] = 1
        self.same(positive.bool(), 'l.cdn_detrex.slot_is_positive')
        self.same(matches.query, 'l.cdn_deim.positive_idx')
        self.same(torch.bincount(matches.image), 'l.cdn_deim.positive_counts')
        # Who sees whom, found by disturbing one query after the other; denoising queries come first in the codes' row.
        n, slots = int(self.arrays['l.cdn_detrex.num_queries']), noised.labels.shape[1]
        torch.manual_seed(0)
        attention, content = hybrid_detr.GroupSelfAttention(16, 2, 0.0), torch.randn(1, n + slots, 16)
        with torch.no_grad():
            base = attention(content, content, (n,), groups)
            blocked = torch.ones(n + slots, n + slots, dtype=torch.bool)
            for k in range(n + slots):
                other = content.clone()
                other[:, k] += 1
                blocked[:, k] = (attention(other, other, (n,), groups) == base).all(-1)[0]
        order = [*range(n, n + slots), *range(n)]
        for code in ('detrex', 'deim', 'stabledino_default'):
            self.same(blocked[order][:, order], f'l.cdn_{code}.attn_mask')


# --- Matching -------------------------------------------------------------------------------------------------------

def random_targets(rng, counts, classes):
    """B images with `counts` boxes each, inside the image."""
    boxes = [torch.from_numpy(np.column_stack([rng.uniform(0.3, 0.7, (m, 2)), rng.uniform(0.1, 0.5, (m, 2))])).float()
             for m in counts]
    return [torch.from_numpy(rng.integers(0, classes, m)) for m in counts], boxes


def random_outputs(rng, L, B, N, C, S=12, E=1):
    def boxes(*shape):
        return torch.from_numpy(np.concatenate([rng.uniform(0.2, 0.8, (*shape, 2)),
                                                rng.uniform(0.05, 0.6, (*shape, 2))], -1)).float()
    return hybrid_detr.Outputs(torch.from_numpy(rng.normal(size=(L, B, N, C))).float(), boxes(L, B, N),
                               torch.from_numpy(rng.normal(size=(1, B, E * S, C))).float(), boxes(1, B, E * S))


class TestMatching(unittest.TestCase):
    def test_hungarian_equals_brute_force(self):
        rng = np.random.default_rng(0)
        for n, m, copies in ((5, 3, 1), (4, 4, 1), (6, 2, 3), (6, 1, 4), (3, 0, 1)):
            cost = torch.from_numpy(rng.normal(size=(n, m)))
            wide = cost.repeat(1, copies)
            query, gt = one_to_many(cost, copies)
            best = min((sum(wide[q, j].item() for j, q in enumerate(chosen))
                        for chosen in itertools.permutations(range(n), m * copies)), default=0)
            self.assertAlmostEqual(float(cost[query, gt].sum()), best, places=9, msg='not the cheapest assignment')

    def test_each_target_is_used_exactly_copies_times(self):
        costs = [torch.rand(2, 9, 2), torch.rand(2, 9, 3), torch.rand(2, 9, 0)]
        matches = assign(costs, [QueryGroup(2, (1, 1)), QueryGroup(7, (2, 1))])
        for layer, copies in ((0, 2), (1, 1)):
            for image, gts in ((0, (0, 1)), (1, (2, 3, 4))):
                keep = (matches.layer == layer) & (matches.image == image) & (matches.query >= 2)
                self.assertEqual(sorted(matches.gt[keep].tolist()), sorted(gts * copies),
                                 'indices count the gts of the batch')
                self.assertEqual(len(set(matches.query[keep].tolist())), len(gts) * copies, 'a query answers once')

    def test_more_copies_than_queries(self):
        cost = torch.rand(4, 3)
        query, gt = one_to_many(cost, 2)   # 6 wishes, 4 queries
        self.assertEqual(sorted(query.tolist()), [0, 1, 2, 3])
        self.assertLessEqual(max(torch.bincount(gt)), 2)
        query, gt = one_to_many(torch.rand(2, 5), 1)
        self.assertEqual(len(query), 2)

    def test_batch_equals_image_by_image(self):
        rng = np.random.default_rng(1)
        outputs, (labels, boxes) = random_outputs(rng, 3, 3, 14, 4, E=2), random_targets(rng, (3, 0, 2), 4)
        groups, tokens = [QueryGroup(6, (1, 1, 1)), QueryGroup(8, (2, 2, 1),
                                                               0.5)], [QueryGroup(12, (1,)), QueryGroup(12, (2,))]
        for whole, part in zip(match(*outputs, labels, boxes, groups, tokens), ('decoder', 'encoder')):
            first = 0
            for b in range(3):
                alone = match(*(x[:, b:b + 1] for x in outputs), labels[b:b + 1], boxes[b:b + 1], groups,
                              tokens)[part == 'encoder']
                keep = whole.image == b
                self.assertEqual(torch.stack([whole.layer[keep], whole.query[keep], whole.gt[keep] - first]).tolist(),
                                 torch.stack([alone.layer, alone.query, alone.gt]).tolist(), f'{part}, image {b}')
                first += len(labels[b])

    def test_cost_by_hand(self):
        logits, gt = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.4, 0.5, 0.2, 0.4]])
        cost = matching_cost(logits, torch.tensor([[[0.4, 0.5, 0.2, 0.4]]]), torch.tensor([1, 1]), gt)
        p = 1 / (1 + math.exp(-2))
        class_cost = 0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p ** 2 * -math.log(1 - p)
        # The first box is shifted by half its width: overlap 1/3 of the union, hull equal to the union.
        self.assertAlmostEqual(float(cost[0, 0, 0]), 2 * class_cost + 5 * 0.1 - 2 / 3, places=5)
        self.assertAlmostEqual(float(cost[0, 0, 1]), 2 * class_cost - 2, places=5)

    def test_one_transfer_to_the_cpu(self):
        rng = np.random.default_rng(2)
        outputs, (labels, boxes) = random_outputs(rng, 2, 3, 8, 3), random_targets(rng, (2, 1, 3), 3)
        calls, real = [], torch.Tensor.cpu
        with unittest.mock.patch.object(torch.Tensor, 'cpu', lambda self: calls.append(1) or real(self)):
            match(*outputs, labels, boxes, [QueryGroup(8, (1, 1))], [QueryGroup(12, (1,))])
        self.assertEqual(len(calls), 1, 'the costs of a step must cross to the CPU together')

    def test_cost_that_is_not_finite_is_named(self):
        rng = np.random.default_rng(3)
        outputs, (labels, boxes) = random_outputs(rng, 2, 2, 8, 3), random_targets(rng, (2, 1), 3)
        outputs.pred_boxes[1, 1, 0, 0] = math.nan
        with self.assertRaisesRegex(FloatingPointError, 'decoder layer 1 .* image 1'):
            match(*outputs, labels, boxes, [QueryGroup(8, (1, 1))], [QueryGroup(12, (1,))])
        outputs = random_outputs(rng, 2, 2, 8, 3)
        outputs.encoder_logits[0, 0, 3, 2] = math.inf   # no box in the image, so there is no cost to notice it by
        with self.assertRaisesRegex(FloatingPointError, 'encoder .* image 0'):
            match(*outputs, [labels[0][:0], labels[1]], [boxes[0][:0], boxes[1]], [QueryGroup(8, (1, 1))],
                  [QueryGroup(12, (1,))])


class TestSchemes(unittest.TestCase):
    def test_reduces_to_one_to_one(self):
        """With the neutral number, every scheme gives the one-to-one loss exactly."""
        rng = np.random.default_rng(4)
        outputs, (labels, boxes) = random_outputs(rng, 3, 2, 12, 4), random_targets(rng, (3, 2), 4)

        def total(scheme, progress=0.0, keep=12, **numbers):
            part = outputs._replace(pred_logits=outputs.pred_logits[:, :, :keep],
                                    pred_boxes=outputs.pred_boxes[:, :, :keep])
            return sum(loss_of(part, labels, boxes, query_groups(scheme, 3, progress, **numbers)).values())

        baseline = total('one2one', n=12)
        for scheme, numbers in (('branch', dict(n=12, T=0, K=6)),
                                ('branch', dict(n=12, T=0, K=1)),
                                ('epoch', dict(n=12, K=5, rho=0.0)),
                                ('epoch', dict(n=12, K=5, progress=0.7)),
                                ('epoch', dict(n=12, K=1)),
                                ('layer', dict(n=12, K=5, L1=0)),
                                ('layer', dict(n=12, K=1, L1=2)),
                                ('group', dict(n=12, G=1)),
                                ('one2many', dict(n=12, K=1))):
            self.assertEqual(total(scheme, **numbers), baseline, f'{scheme} with {numbers} is not the one-to-one loss')
        half = total('one2one', keep=6, n=6)
        self.assertEqual(total('branch', n=6, T=6, K=2, weight=0.0), half,
                         'lambda = 0 must leave the first group alone')

    def test_rows(self):
        paper = {name: query_groups(name, 6, **row) for name, row in train.PAPER_ROWS.items()
                 if name not in train.PRESETS}
        self.assertEqual(paper['branch'], [QueryGroup(300, (1,) * 6),
                                           QueryGroup(1500, (6,) * 6, 1.0, proposal_copies=7)])
        self.assertEqual(paper['layer'], [QueryGroup(1800, (10, 10, 10, 10, 1, 1))])
        self.assertEqual(paper['group'], [QueryGroup(300, (1,) * 6, 1 / 11)] * 11)
        with self.assertRaisesRegex(ValueError, 'one2two'):
            query_groups('one2two', 6, n=3)

    def test_504_positives(self):
        """H-DETR §4.2: its three schemes give a ground truth equally many positives in 12 epochs of 6 layers."""
        for scheme, wanted in (('one2one', 72), ('branch', 504), ('epoch', 504), ('layer', 504), ('group', 11 * 72)):
            self.assertAlmostEqual(matchers.expected_positives(scheme, 6, 12, **train.PAPER_ROWS[scheme]), wanted,
                                   msg=scheme)
        self.assertAlmostEqual(matchers.expected_positives('epoch', 6, 12, n=1800, K=10), 504,
                               msg='rho is 2/3 if not given')
        tiny = {round(matchers.expected_positives(scheme, 3, 1, **train.TINY_ROWS[scheme]), 6)
                for scheme in ('branch', 'epoch', 'layer')}
        self.assertEqual(tiny, {21}, "H-DETR's schemes have equally many positives at the tiny size, too")

    def test_encoder_groups(self):
        for K in (1, 6):
            branch = encoder_groups(query_groups('branch', 6, n=300, T=300 * K, K=K, weight=0.5), 2, 1000)
            self.assertEqual(branch, [QueryGroup(1000, (1,)), QueryGroup(1000, (K + 1,), 0.5)],
                             'H-DETR App. D: K + 1 copies')
        group = encoder_groups(query_groups('group', 6, n=300, G=4), 4, 1000)
        self.assertEqual(group, [QueryGroup(1000, (1,), 0.25)] * 4)
        self.assertEqual(encoder_groups(query_groups('branch', 6, n=3, T=3, K=2), 1, 50), [QueryGroup(50, (1,))])

    def test_the_toy_of_the_docstring(self):
        """`python matchers.py` prints the table of the module's docstring."""
        printed = demonstration('matchers.py')
        table = {line.split()[0]: ' '.join(line.split()) for line in printed.splitlines() if line}
        rows = {scheme: re.search(rf'^    ({scheme} .*)', matchers.__doc__, re.M) for scheme in matchers.TOY_ROWS}
        for scheme, row in rows.items():
            self.assertIsNotNone(row, f'{scheme} of TOY_ROWS is not in the table of the docstring of matchers.py')
            self.assertEqual(' '.join(row[1].split()), table[scheme])
        costs = [re.search(rf'{name} ((?: +\d){{6}})$', matchers.__doc__, re.M)[1].split() for name in 'AB']
        self.assertEqual([[float(x) for x in of_gt] for of_gt in costs], matchers.TOY_COST.T.tolist())
        wages = torch.tensor([[int(x) for x in re.search(rf'{name} +(\d+) +(\d+) +(\d+)', matchers.__doc__).groups()]
                              for name in ('Alice', 'Bob', 'Carol')])
        workers, tasks = one_to_many(wages, 1)
        self.assertEqual((tasks.tolist(), int(wages[workers, tasks].sum())), ([0, 2, 1], 15),
                         'bathroom, windows and floors for 8 + 3 + 4')
        # By hand, first and last layer:
        for scheme, first, last in (('one2one', 'A.B...', 'A.B...'),
                                    ('branch', 'ABBABA', 'ABBABA'),
                                    ('group', 'ABBABA', 'ABBABA'),
                                    ('epoch', 'ABBA..', 'A.B...'),
                                    ('layer', 'ABBA..', 'A.B...'),
                                    ('one2many', 'ABBA..', 'ABBA..')):
            self.assertEqual((''.join(matchers.toy(scheme, 0, 0.0)[1]), ''.join(matchers.toy(scheme, 1, 1.0)[1])),
                             (first, last), scheme)


# --- The README's exercises -----------------------------------------------------------------------------------------

class TestExercises(unittest.TestCase):
    """For students: each says what was expected and why. Delete the body of what it names, write it again, run it."""
    longMessage = False   # the messages say it all

    def close(self, found, wanted, why):
        self.assertIsInstance(found, (torch.Tensor, float), f'return tensors: {why}')
        found, wanted = torch.as_tensor(found).detach(), torch.as_tensor(wanted)
        self.assertEqual(tuple(found.shape), tuple(wanted.shape), f'the shape is {tuple(found.shape)}, but it has to '
                         f'be {tuple(wanted.shape)}: {why}')
        off = (found.double() - wanted.double()).abs().nan_to_num(math.inf)
        if off.numel() and off.max() > 1e-5:
            at = tuple(int(i) for i in np.unravel_index(int(off.argmax()), off.shape))
            few = f'\n    yours  {found.tolist()}\n    wanted {wanted.tolist()}' if off.numel() < 10 else ''
            if off.ndim == 0:
                self.fail(f'{why}{few}')
            self.fail(f'{why}{few}\n    furthest off at {list(at)}: yours {float(found[at]):.6g}, wanted '
                      f'{float(wanted[at]):.6g}')

    def attempt(self, hint, function, *args, **kwargs):
        """What the function returns; if it fails, or returns nothing, a sentence beside it."""
        try:
            found = function(*args, **kwargs)
        except Exception as error:
            error.add_note(hint)
            raise
        self.assertIsNotNone(found, f'{getattr(function, "__name__", "forward")} returns nothing yet. {hint}')
        return found

    def test_1_one_to_many(self):
        """matchers.one_to_many: who is matched, on a small cost matrix, with one and with two copies."""
        cost = torch.tensor([[1.0, 1], [3, 7], [1, 2], [8, 9], [3, 5]])
        for copies, wanted in ((1, [(0, 1), (2, 0)]), (2, [(0, 1), (1, 0), (2, 1), (4, 0)])):
            before = cost.clone()
            answer = self.attempt('query_idx and gt_idx are wanted', one_to_many, cost, copies)
            self.assertTrue(torch.equal(cost, before), 'one_to_many changed the costs that came in: work on a copy')
            self.assertTrue(isinstance(answer, tuple) and len(answer) == 2 and all(
                isinstance(x, torch.Tensor) and x.dtype == torch.int64 for x in answer),
                'return a tuple of two int64 tensors, query_idx and gt_idx')
            query, gt = (x.tolist() for x in answer)
            what = f'copies={copies}: your pairs (query, gt) {sorted(zip(query, gt))}. '
            self.assertTrue(all(0 <= j < 2 for j in gt) and all(0 <= i < 5 for i in query), what + 'There are queries '
                            '0 to 4 and ground truths 0 and 1: are the two results exchanged? A column of the repeated '
                            'matrix stands for a ground truth: j % M if the columns were tiled, j // K if each was '
                            'repeated on the spot')
            self.assertEqual(len(set(query)), len(query), what + 'A query is in two pairs, but it has one box and '
                             f'answers for one object: wanted are pairs like {wanted}, each query once')
            self.assertEqual(sorted(gt), sorted([0, 1] * copies), what + f'Each ground truth has to get {copies}')
            paid, least = (sum(float(cost[pair]) for pair in pairs) for pairs in (zip(query, gt), wanted))
            self.assertEqual(paid, least, what + f'They cost {paid:g} in sum, and {wanted} only {least:g}. Always '
                             'taking the cheapest that is left, or matching one copy after the other, does not find '
                             'it; nor does a column read as the wrong ground truth: j % M if they were tiled, j // K '
                             'if each was repeated on the spot')
        query, gt = self.attempt('an image without objects, cost (3, 0)', one_to_many, torch.zeros(3, 0), 2)
        self.assertEqual((query.dtype, gt.dtype, len(query), len(gt)), (torch.int64, torch.int64, 0, 0),
                         'an image without objects has no pairs: two empty int64 tensors')
        query, gt = self.attempt('copies=0, as in a layer without copies', one_to_many, cost, 0)
        self.assertEqual((len(query), len(gt)), (0, 0), 'copies=0: no pairs')
        crowded = torch.tensor([[1.0, 2, 9], [1, 3, 9], [2, 8, 7], [1, 9, 8]])
        query, gt = self.attempt('6 wishes and 4 queries: the 4 pairs that cost least in sum', one_to_many,
                                 crowded / 10 - 1, 2)   # costs are fractions, and most are below 0
        self.assertEqual(sorted(query.tolist()), [0, 1, 2, 3], '6 wishes and 4 queries: all 4 are matched, each once')
        self.assertLessEqual(max(gt.tolist().count(j) for j in range(3)), 2, '2 copies, so no ground truth has more '
                             f'than 2 queries, also where there are too few of these: yours are {gt.tolist()}')
        self.assertEqual(float(crowded[query, gt].sum()), 8, '6 wishes and 4 queries: of all ways to match the 4, the '
                         'cheapest costs 2 + 3 + 2 + 1')

    def test_2_matching_cost(self):
        """matchers.matching_cost with the default Cost(): one query, then the parts of its cost one by one."""
        at, zero, log2 = [0.5, 0.5, 0.2, 0.4], [[[0.0, 0.0]]], math.log(2)

        def cost(logits=zero, box=at, label=0, gt=at):
            return self.attempt('A tensor (L, N, M) is wanted', matching_cost, torch.tensor(logits),
                                torch.tensor([[box]]), torch.tensor([label]), torch.tensor([gt]))
        found = cost()
        finite = bool(torch.as_tensor(found).isfinite().all())
        self.close(found, [[[2 * (0.25 / 4 - 0.75 / 4) * log2 - 2]]], 'score 1/2 and a perfect box: 2 * (1/4 * '
                   '(1-p)^2 * log 2 - 3/4 * p^2 * log 2), no L1, and -2 * GIoU with GIoU = 1, of shape (L, N, M)'
                   + '; inf or nan: GIoU needs corners' * (not finite))
        p = 1 / (1 + math.exp(-2))
        class_cost = 0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p ** 2 * -math.log(1 - p)
        self.close(cost([[[2.0, 1.0]]]), [[[2 * class_cost - 2]]], f'the same with a score of {p:.3f}, the sigmoid of '
                   '2, whatever the logits of other classes are (no softmax): is p in one focal term and 1-p in the '
                   'other, each squared?')
        self.assertLess(float(cost([[[0.0, 3.0]]], label=1)), float(cost([[[0.0, 3.0]]], label=0)), 'the class part is '
                        "that of the ground truth's own class: a query sure of class 1 must be cheaper for a 1 than "
                        'for a 0')
        self.close(cost(box=[0.6, 0.5, 0.2, 0.4]) - cost(), [[[5 * 0.1 + 2 * (1 - 1 / 3)]]], 'a box moved by half its '
                   'width: 5 * |0.1| for L1, and its GIoU is 1/3 instead of 1 (overlap 1/3 of the union, and the hull '
                   'is the union). Is L1 taken of (cx, cy, w, h), and GIoU of corners?')
        self.close(cost(box=[0.8, 0.7, 0.1, 0.2]) - cost(), [[[5 * 0.8 + 2 * (1 + 5 / 9)]]], 'a box that does not '
                   'overlap: 5 * (0.3 + 0.2 + 0.1 + 0.2) for L1, and GIoU = 0 - 5/9, the empty part of the hull')
        self.close(cost(box=[0.8, 0.9, 0.1, 0.2]) - cost(), [[[5 * 1.0 + 2 * (1 + 43 / 63)]]], 'a box that is apart in '
                   'x and in y: the overlap is 0, so clamp its width and its height, not their product')
        torch.manual_seed(0)
        logits, boxes, labels, gt = torch.randn(2, 3, 4), torch.rand(2, 3, 4), torch.tensor([3, 0]), torch.rand(2, 4)
        inputs = [x.clone() for x in (logits, boxes, labels, gt)]
        found = matching_cost(*inputs)
        self.assertTrue(all(map(torch.equal, inputs, (logits, boxes, labels, gt))), 'matching_cost changed its inputs: '
                        'the loss needs the boxes as they were')
        self.assertEqual(tuple(found.shape), (2, 3, 2), '2 layers, 3 queries and 2 ground truths make (L, N, M)')
        for l, n, m in itertools.product(range(2), range(3), range(2)):
            alone = matching_cost(logits[l:l + 1, n:n + 1], boxes[l:l + 1, n:n + 1], labels[m:m + 1], gt[m:m + 1])
            self.close(found[l, n, m], float(alone), f'entry [{l}, {n}, {m}] of a larger cost is not what this pair '
                       'costs alone: are layers, queries or ground truths mixed up?')
        nothing = self.attempt('an image may have no objects, M = 0: a tensor (L, N, 0)', matching_cost, logits, boxes,
                               labels[:0], gt[:0])
        self.assertEqual(tuple(nothing.shape), (2, 3, 0), 'an image without objects, M = 0: (L, N, 0)')
        self.assertTrue(bool(cost([[[100.0, -100.0]]]).isfinite() and cost([[[-100.0, 100.0]]]).isfinite()),
                        'the log of a score of 0 is not finite: add 1e-8')

    def test_3_query_groups(self):
        """matchers.query_groups: the rows of the table."""
        def of(scheme, layers, progress, why, **numbers):
            groups = self.attempt(f'{scheme} with {numbers}: return a list of QueryGroup, whose copies are a tuple '
                                  f'with an entry for each layer, as (1,) * layers. {why}', query_groups, scheme,
                                  layers, progress, **numbers)
            self.assertIsInstance(groups, list, f'{scheme}: return a list of QueryGroup')
            for i, group in enumerate(groups):
                self.assertIsInstance(group, QueryGroup, f'{scheme}: return a list of QueryGroup')
                self.assertIsInstance(group.copies, tuple, f'{scheme}: copies is a tuple with an entry for each layer')
                self.assertFalse(group.denoising, f'{scheme}: denoising queries are no part of the table')
                wanted = numbers['K'] + 1 if (scheme, i) == ('branch', 1) else 1
                self.assertEqual(group.proposal_copies, wanted, f'{scheme}, group {i}: proposal_copies, what an '
                                 'encoder head of its own has to find, is K + 1 in the second group of branch (H-DETR '
                                 'App. D), else 1')
            return [(group.queries, group.copies, round(group.weight, 9)) for group in groups]
        for scheme, layers, progress, numbers, wanted, why in (
                ('one2one', 3, 0, dict(n=9), [(9, (1, 1, 1), 1)], 'one group, one copy in every layer'),
                ('branch', 2, 0, dict(n=3, T=5, K=2, weight=0.5), [(3, (1, 1), 1), (5, (2, 2), 0.5)],
                 'H-DETR Eq. 1-2: n queries one-to-one, and T queries that find K copies, whose loss weighs lambda'),
                ('branch', 3, 0, dict(n=3, T=0, K=2), [(3, (1, 1, 1), 1)], 'with T = 0 only the baseline is left'),
                ('epoch', 3, 0.66, dict(n=9, K=2), [(9, (2, 2, 2), 1)], 'Eq. 3: one-to-many before rho = 2/3'),
                ('epoch', 3, 0.5, dict(n=9, K=2, rho=0.5), [(9, (1, 1, 1), 1)], 'Eq. 4: one-to-one from rho on'),
                ('layer', 3, 0, dict(n=9, K=2, L1=2), [(9, (2, 2, 1), 1)], 'Eq. 5-6: K copies in the first L1 layers'),
                ('layer', 3, 0, dict(n=9, K=2, L1=3), [(9, (2, 2, 2), 1)], 'L1 may be all layers'),
                ('layer', 3, 0, dict(n=9, K=2, L1=0), [(9, (1, 1, 1), 1)], 'L1 may be 0'),
                ('group', 3, 0, dict(n=3, G=3), [(3, (1, 1, 1), round(1 / 3, 9))] * 3, 'Group DETR Eq. 7: the mean of '
                 'G losses'),
                ('one2many', 3, 1, dict(n=9, K=2), [(9, (2, 2, 2), 1)], 'K copies everywhere, to the end')):
            found = of(scheme, layers, progress, why, **numbers)
            self.assertEqual(found, wanted, f'{why}\n    {scheme}, {layers} layers, {numbers}, progress {progress}, as '
                             f'(queries, copies in each layer, weight)\n    yours  {found}\n    wanted {wanted}')
        with self.assertRaises(ValueError, msg='a scheme that is not in the table: raise ValueError'):
            self.attempt('a scheme that is not in the table: raise ValueError', query_groups, 'no such scheme', 3, n=3)

    def test_4_group_self_attention(self):
        """hybrid_detr.GroupSelfAttention.forward: groups of one size and of two, then denoising queries."""
        torch.manual_seed(0)
        attention, (content, position) = hybrid_detr.GroupSelfAttention(16, 2, 0.0), torch.randn(2, 2, 9, 16)
        hints = {(3, 3, 3): 'An answer (B,N,D) for each query; here three groups of 3',
                 (4, 5): 'groups (4, 5): their sizes may differ'}

        def by_mask(groups, denoising=0):   # the numbers, from one attention of all queries with a mask
            rest = 9 - sum(groups)   # the denoising queries
            owner = torch.tensor([g for g, size in enumerate(groups) for _ in range(size)]
                                 + [-1 - i * denoising // rest for i in range(rest)])
            sees = (owner[:, None] == owner) | ((owner[:, None] < 0) & (owner == 0))
            q, k, v = (F.linear(x, weight, bias).unflatten(-1, (2, 8)).transpose(1, 2) for x, weight, bias in zip(
                (content + position, content + position, content), attention.in_proj.weight.chunk(3),
                attention.in_proj.bias.chunk(3)))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=sees)
            return attention.out_proj(out.transpose(1, 2).flatten(2))

        def moved(groups, query, which=0, denoising=0):   # how far each query moves if this one is changed
            inputs = [content.clone(), position.clone()]
            hint = hints.get(groups, f'groups {groups}, then {denoising} denoising groups: what the sizes leave over '
                             'of the 9 queries are denoising queries')
            before = self.attempt(hint, attention, *inputs, groups, denoising)
            self.assertTrue(torch.equal(inputs[0], content) and torch.equal(inputs[1], position), 'forward changed its '
                            'inputs: write x = x + y, not x += y')
            self.assertEqual(tuple(before.shape), (2, 9, 16), f'{hint}: an answer for each query of the row')
            inputs[which][:, query] += 1
            return (attention(*inputs, groups, denoising) - before).abs().amax((0, 2))
        with torch.no_grad():
            for groups in ((3, 3, 3), (4, 5), (2, 3, 4)):
                n = groups[0]
                for which, name in enumerate(('content', 'position')):
                    far = moved(groups, n, which)   # the first query of the second group
                    self.assertLess(float(far[:n].max()), 1e-6, f'groups {groups}: the {name} of query {n}, in group '
                                    'two, was changed and group one moved. At inference group two is gone!')
                    self.assertGreater(float(far[n + 1]), 1e-6, f'groups {groups}: the {name} of query {n} was '
                                       f'changed, and query {n + 1} of its own group did not notice')
                self.close(attention(content, position, groups), by_mask(groups),
                           f'groups {groups}: not the numbers of one attention with a mask. Position added to query '
                           'and key, not to the value? Scale by the width of one head? Biases, out_proj at the end?')
            first = "group one sees it, and all denoising queries see the detector's"
            later = 'denoising queries see the first group only'
            answers = 'no query sees a denoising group but its own members: they know the answer'
            for groups, X, query, seen_by, why in (
                    ((3, 2), 2, 0, [0, 1, 2, 5, 6, 7, 8], first), ((3, 2), 2, 3, [3, 4], later),
                    ((3, 2), 2, 5, [5, 6], answers),
                    ((5,), 2, 0, list(range(9)), first), ((5,), 2, 5, [5, 6], answers),
                    ((3, 3), 1, 0, [0, 1, 2, 6, 7, 8], first), ((3, 3), 1, 3, [3, 4, 5], later),
                    ((3, 3), 1, 6, [6, 7, 8], answers)):
                found = (moved(groups, query, denoising=X) > 1e-6).nonzero().flatten().tolist()
                self.assertEqual(found, seen_by, f'{why}. Row: groups {groups}, then {X} denoising groups of '
                                 f'{(9 - sum(groups)) // X}. Query {query} was changed, and these moved:\n    yours  '
                                 f'{found}\n    wanted {seen_by}')
            for groups, X in (((3, 2), 2), ((5,), 2), ((3, 3), 1)):   # all visibility first, then the numbers
                self.close(attention(content, position, groups, X), by_mask(groups, X), f'groups {groups}, then {X} '
                           "denoising groups: the right queries are seen, but the numbers differ. The detector's and "
                           'those of the own denoising group share one softmax, and the value has no position')
        learners = [content.requires_grad_(), position.requires_grad_(), *attention.parameters()]
        direction = torch.randn(2, 9, 16)
        for groups, X in (((3, 3, 3), 0), ((4, 5), 0), ((3, 2), 2), ((3, 3), 1)):
            mine = attention(content, position, groups, X)
            self.assertTrue(mine.requires_grad, 'no gradient comes back')
            for found, wanted in zip(*(torch.autograd.grad((x * direction).sum(), learners, allow_unused=True)
                                       for x in (mine, by_mask(groups, X)))):
                found = torch.zeros_like(wanted) if found is None else found
                self.assertLess(float((found - wanted).abs().max()), 1e-4, f'groups {groups}, then {X} denoising '
                                'groups: the values are right, the gradient is not, so something is detached; '
                                "denoising queries teach the detector's, too")
        attention.dropout = 0.5
        with torch.no_grad():
            attention.eval()
            self.close(attention(content, position, (4, 5)), by_mask((4, 5)), 'in eval() nothing is dropped')
            attention.train()
            self.assertGreater(float((attention(content, position, (4, 5)) - by_mask((4, 5))).abs().max()), 1e-3,
                               'in training the attention weights are dropped with probability self.dropout')

    def test_5_matchability_aware_loss(self):
        """losses.MATCHED['mal'] and losses.BACKGROUND['mal']: DEIM slides, Eq. 3, with an exponent g."""
        for table in (losses.MATCHED, losses.BACKGROUND):
            self.assertIn('mal', table, "MATCHED and BACKGROUND need a row 'mal'")

        def entry(p, matched, iou, g, official=False):
            x, m, s = (torch.tensor([v], dtype=torch.float64) for v in (math.log(p / (1 - p)), matched, iou))
            x.requires_grad_()
            loss = self.attempt("a row of MATCHED returns (target, weight), one of BACKGROUND (constant, weight)",
                                losses.class_loss, x, m, s, LossSettings('mal', mal_gamma=g, official=official))[0]
            return loss, torch.autograd.grad(loss, x)[0][0]
        for g in (1.5, 2.0):
            for p, iou in ((0.2, 1.0), (0.5, 0.5), (0.9, 0.5), (0.9, 0.0)):
                target = iou ** g
                self.close(entry(p, 1.0, iou, g)[0], -target * math.log(p) - (1 - target) * math.log(1 - p), 'a match '
                           f'of score {p} at IoU {iou}, g = {g}: BCE with the target IoU^g = {target:.3f}, weight 1'
                           + ', also without overlap, where VFL would hardly care' * (iou == 0))
            for p in (0.1, 0.6):
                self.close(entry(p, 0.0, 0.0, g)[0], -p ** g * math.log(1 - p), f'no match, score {p}, g = {g}: '
                           'p^g * -log(1 - p)')
        p, g = 0.6, 1.5
        through = g * p ** (g - 1) * p * (1 - p) * -math.log(1 - p)
        self.close(entry(p, 0.0, 0.0, g)[1], (p ** g * p + through), 'no match: the gradient, which goes '
                   'through the weight p^g, too: the formula as it is printed, differentiated (the slides say nothing '
                   'on gradients; the released code stops it there, as official=True does)')
        self.close(entry(p, 0.0, 0.0, g, True)[1], p ** g * p, 'no match, official=True: no gradient through p^g')
        x = torch.linspace(-2, 2, 6).view(3, 2)
        self.close(losses.background_loss(x, LossSettings('mal'), (0,)), losses.background_loss(x, LossSettings('mal'))
                   .sum(0), 'the constant of BACKGROUND is applied after a sum: it must not depend on the entry')

    def test_6_stable_target(self):
        """losses.stable_target: f1(s) of Stable-DINO Eq. 3, three pairs of owner 2 and one of owner 0, of three."""
        iou, owner = torch.tensor([0.5, 0.1, 0.25, 0.0]), torch.tensor([2, 0, 2, 2])
        score = torch.full((4,), 0.9, requires_grad=True)

        def target(*args, **kwargs):
            return self.attempt("the number to rescale to is given for each owner: index it with `owner`; an owner may "
                                'have no pair; None: no rescale', losses.stable_target, *args, **kwargs)
        self.close(target(iou, score, owner, None), [0.25, 0.01, 0.0625, 0], 'no rescale, s2: the square of the IoU')
        self.close(target(iou, score, owner, None, 's1p1'), [0.45, 0.09, 0.225, 0], "f1 is looked up in F1, here s * p")
        self.close(target(iou, score, owner, torch.ones(3)), [1, 1, 0.25, 0], 'rescaled to one: the best pair of each '
                   'owner, however bad, gets the target 1, and its others keep their ratio to it')
        self.close(target(iou, score, owner, torch.tensor([0.005, 0.7, 0.8])), [0.8, 0.005, 0.2, 0], 'rescaled to 0.8 '
                   'for owner 2 and 0.005 for owner 0, which is less than its 0.01: this scales down, too. First '
                   'comes f1, then the factor')
        self.close(target(torch.zeros(2), score[:2], owner[:2], torch.ones(3)), [0, 0], 'pairs of which none overlaps '
                   'keep the target 0 (mind a division by 0)')
        self.close(target(torch.tensor([1e-4, 5e-5]), score[:2], owner[:1].repeat(2), torch.ones(3)), [1, 0.25], 'the '
                   'best IoU is 0.0001: it gets the target 1 all the same')
        self.close(target(iou[:0], score[:0], owner[:0], torch.ones(3)), torch.zeros(0), 'no pairs, no targets')
        inputs = iou.clone(), torch.tensor([0.005, 0.7, 0.8])
        target(inputs[0], score, owner, inputs[1], 's1')
        self.assertTrue(torch.equal(inputs[0], iou) and torch.equal(inputs[1], torch.tensor([0.005, 0.7, 0.8])),
                        'the IoUs or the peaks that came in were changed: F1 of s1 returns the very tensor it gets')
        for wanted in (None, torch.ones(3)):
            self.assertFalse(target(iou, score, owner, wanted, 's1p1').requires_grad, 'a gradient flows through the '
                             'target, from which a score would learn to be asked for less: detach it')

    def test_7_set_loss(self):
        """losses.set_loss with the focal loss: two layers, two images, groups of 2 and 2 queries."""
        gt = [torch.tensor([[0.5, 0.5, 0.2, 0.4]]), torch.tensor([[0.3, 0.4, 0.2, 0.2], [0.7, 0.6, 0.1, 0.3]])]
        labels = [torch.tensor([1]), torch.tensor([0, 1])]
        torch.manual_seed(0)
        boxes = torch.rand(2, 2, 4, 4) * 0.3 + 0.3
        boxes[1, 1, 2] = torch.tensor([0.1, 0.1, 0.1, 0.1])   # apart from its ground truth in x and in y
        boxes.requires_grad_()
        logits = torch.randn(2, 2, 4, 2, requires_grad=True)

        def parts(pairs, groups, num_boxes=3.0, why='', how=losses.LossSettings()):   # (layer, image, query, gt)
            matches = Matches(*torch.tensor(pairs, dtype=torch.int64).view(-1, 4).T)
            found = self.attempt('set_loss returns the class, L1 and GIoU loss and the IoU of every pair; gt counts '
                                 'through the batch, here 0 to 2; how is a LossSettings, whose class_weight is None if '
                                 f'none is given. This case, {len(pairs)} pairs: {why}',
                                 losses.set_loss, logits, boxes, labels, gt, matches, groups, num_boxes, how)
            self.assertTrue(isinstance(found, tuple) and len(found) == 4, 'return a tuple of four, the class, L1 and '
                            f'GIoU loss and the IoU of every pair, not {type(found).__name__} {found}')
            return found

        def by_hand(pairs, groups, num_boxes=3.0):
            owner = [g for g, group in enumerate(groups) for _ in range(group.queries)]
            scale = [[groups[g].weight / max(max(groups[g].copies[l], 1) * num_boxes, 1) for g in owner]
                     for l in range(2)]
            every, every_label = torch.cat(gt), torch.cat(labels)
            target = torch.zeros_like(logits)
            l1 = giou = torch.tensor(0.0)
            for l, b, q, m in pairs:
                target[l, b, q, every_label[m]] = 1
                a, c = boxes[l, b, q][None], every[m][None]
                l1 = l1 + 5 * scale[l][q] * (a - c).abs().sum()
                giou = giou + 2 * scale[l][q] * (1 - generalized_box_iou(*(box_convert(x, 'cxcywh', 'xyxy')
                                                                           for x in (a, c)))[0, 0])
            entries = sigmoid_focal_loss(logits, target, 0.25, 2).sum((1, 3))
            return 2 * (entries * torch.tensor(scale)).sum(), l1, giou
        one = [QueryGroup(4, (1, 1))]
        nobody = [QueryGroup(4, (0, 1))]
        pair = [(0, 1, 2, 1)]   # layer 0, image 1, query 2 and the batch's ground truth 1
        whole = [(0, 0, 1, 0), (0, 1, 0, 1), (0, 1, 3, 2), (1, 0, 2, 0), (1, 1, 2, 1), (1, 1, 1, 2)]
        copied = [QueryGroup(2, (1, 1)), QueryGroup(2, (2, 1), 0.5)]
        for pairs, groups, num_boxes, why in (
                (pair, one, 1.0, 'one pair: layer 0, image 1, query 2, and ground truth 1 of the batch, the first box '
                 'of image 1. 5 * L1 of (cx, cy, w, h), 2 * (1 - GIoU of corners), 2 * focal loss, each a sum. All '
                 'queries, of all layers and images, are background but for the pair, which is positive in its class '
                 'only'),
                (pair, one, 4.0, 'all parts are divided by the number of ground truth boxes of the batch, here 4'),
                (pair, one, 0.0, 'a divisor below 1 counts as 1'),
                (whole, one, 3.0, 'six pairs in two layers and two images. gt counts through the batch: 1 is the first '
                 'box of image 1'),
                ([(1, 0, 2, 0)], nobody, 3.0, 'layer 0 has no copies, and all its queries are background: divided by '
                 'the number of boxes'),
                (pair, [QueryGroup(4, (2, 1))], 0.0, 'K * num_boxes below 1 counts as 1, not as K'),
                (pair, [QueryGroup(4, (2, 1))], 1.0, 'K = 2 copies in layer 0, one in layer 1: the loss of a layer is '
                 'divided by K times the number of boxes, so that it weighs as much as one-to-one'),
                (pair, [QueryGroup(4, (2, 1))], torch.tensor(3.0), 'num_boxes may be a tensor'),
                ([], one, 3.0, 'without a pair all is background, and the box losses are 0'),
                (pair, [QueryGroup(4, (1, 1), 0.25)], 1.0, 'the whole loss of a group has its weight, here 1/4'),
                (whole, copied, 3.0, 'two groups: each query, matched or background, has the weight and the copies of '
                 'its own group'),
                (whole, [QueryGroup(1, (1, 1)), QueryGroup(2, (2, 1), 0.5), QueryGroup(1, (1, 1), 0.25)], 3.0, 'groups '
                 'of 1, 2 and 1 queries: sizes may differ')):
            found, wanted = parts(pairs, groups, num_boxes, why), by_hand(pairs, groups, num_boxes)
            for i, name in ((1, 'L1'), (2, 'GIoU'), (0, 'class')):
                self.assertIsInstance(found[i], torch.Tensor, f'{name} loss: return a tensor, not a number, in every '
                                      f'case. {why}')
                self.close(found[i].float(), wanted[i].detach(), f'{name} loss. {why}')
                if i == 0 or pairs:
                    learner = logits if i == 0 else boxes
                    learns = torch.autograd.grad(found[i], learner, retain_graph=True,
                                                 allow_unused=True)[0] if found[i].requires_grad else None
                    self.assertTrue(learns is not None and bool((learns != 0).any()), f'{name} loss: no gradient '
                                    f'reaches the {"logits" if i == 0 else "boxes"}, so nothing is learned from it')
                    self.close(learns, torch.autograd.grad(wanted[i], learner)[0], f'{name} loss: its value is right, '
                               'its gradient is not, so something is detached. ' + (
                                   'Unmatched queries learn from the class loss, too, and the weights (1-p)^2 and p^2 '
                                   'are differentiated' if i == 0 else 'All four numbers of a matched box learn'))
        for x, why in ((0.5, 'how.class_weight, here 1/2, takes the place of the weight in CLASS_WEIGHTS, 2'),
                       (0.0, 'how.class_weight may be 0; only None stands for the weight in CLASS_WEIGHTS')):
            found = parts(pair, one, 1.0, why, losses.LossSettings(class_weight=x))
            for i, (part, wanted) in enumerate(zip(found, by_hand(pair, one, 1.0))):
                self.close(part, wanted.detach() * (1 if i else x / 2), f'{("class", "L1", "GIoU")[i]} loss. {why}'
                           + '; the box losses have weights of their own, 5 and 2' * (i > 0))
        for pairs in (pair, [whole[i] for i in (4, 0, 5, 2, 1, 3)], []):   # matches are not in the order of layers
            ious = [box_iou(*(box_convert(x[None].detach(), 'cxcywh', 'xyxy')
                              for x in (boxes[l, b, q], torch.cat(gt)[m])))[0, 0] for l, b, q, m in pairs]
            self.close(parts(pairs, copied)[3], torch.tensor(ious), 'last comes the IoU (not GIoU) of each pair, in '
                       'the order of the matches')
        self.assertFalse(parts(pair, one)[3].requires_grad, 'no gradient goes through the IoU: a box would learn from '
                         'the score')
        num_boxes = torch.tensor(3.0)
        parts(whole, copied, num_boxes)
        self.assertEqual(float(num_boxes), 3, 'num_boxes, here a tensor, was changed: write x = x * K, not x *= K')
        gt[0], labels[0] = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
        pair = [(0, 1, 2, 0)]
        self.close(parts(pair, one)[0], by_hand(pair, one)[0].detach(), 'class loss: in an image without objects all '
                   'queries are background')
        with torch.no_grad():
            logits *= 100
        self.assertTrue(bool(parts([], one)[0].isfinite()), 'logits of 100 and more: log(1 - sigmoid(x)) is -inf '
                        'there; use softplus, as match_loss')

    def test_8_mixup(self):
        """data.mixup: an image of 4 x 8 pixels, all 1, and one of 6 x 4, all 2, with beta 0.25."""
        def sample(h, w, value, box):
            return data.Sample(torch.full((3, h, w), float(value)), torch.tensor([value]), torch.tensor([box]), value,
                               (h, w), f'image{value}')
        first, second = sample(4, 8, 1, [0.5, 0.5, 0.5, 1]), sample(6, 4, 2, [0.5, 0.25, 1, 0.5])
        copies = copy.deepcopy((first, second))
        mixed = self.attempt('return a Sample, as sample._replace(...); its image is as high and as wide as the larger '
                             'of both, each of which lies in its top left corner', data.mixup, first, second, 0.25)
        self.assertIsInstance(mixed, data.Sample, 'return a Sample, as sample._replace(...)')
        self.assertEqual(tuple(mixed.image.shape), (3, 6, 8), 'your shape, and the one wanted: the image is as high as '
                         'the higher and as wide as the wider of both')
        self.close(mixed.image[0, [0, 0, 5, 5], [0, 7, 0, 7]], [1.75, 0.25, 1.5, 0], 'corners top left, top right, '
                   'bottom left, bottom right: beta of the first, 1 - beta of the second, each where it is, else 0')
        self.close(mixed.boxes, [[0.5, 1 / 3, 0.5, 2 / 3], [0.25, 0.25, 0.5, 0.5]], 'boxes are fractions of the image, '
                   'and both images lie in the top left corner of a larger one: x and w times (own width / new width), '
                   'y and h times (own height / new height)')
        self.assertEqual(mixed.labels.tolist(), [1, 2], 'the objects of both, those of the first image first')
        self.assertEqual((mixed.image_id, mixed.size), (1, (4, 8)), 'image_id and size are those of the first image')
        self.assertTrue(all(torch.equal(x, y) for a, b in zip((first, second), copies) for x, y in zip(a[:3], b[:3])),
                        'the samples that came in were changed: they may be used again')
        self.assertEqual([x.dtype for x in mixed[:3]], [torch.float32, torch.int64, torch.float32], 'image and boxes '
                         'are float32, labels int64')
        empty = [x._replace(image=x.image[:, :4, :4].clone(), labels=x.labels[:0], boxes=x.boxes[:0])
                 for x in (first, second)]
        copies = copy.deepcopy(empty)
        mixed = self.attempt('two images without objects, of one size', data.mixup, *empty, 0.25)
        self.assertEqual([(tuple(x.shape), x.dtype) for x in mixed[1:3]],
                         [((0,), torch.int64), ((0, 4), torch.float32)], 'two images without objects: labels of shape '
                         '(0,), int64, and boxes of shape (0, 4), float32')
        self.assertTrue(all(torch.equal(x, y) for a, b in zip(empty, copies) for x, y in zip(a[:3], b[:3])),
                        'the samples that came in, here of one size, were changed: they may be used again')

    def test_9_a_scheme_of_your_own(self):
        """matchers.query_groups, and the numbers in train.py: what holds for every row, also for one you add."""
        with self.assertRaises(ValueError, msg='a scheme that is not in the table') as caught:
            self.attempt('a scheme that is not in the table: raise ValueError. Any other error comes from a row: all '
                         'are computed at each call, also with the defaults K = 1, G = 1, L1 = 0 and T = 0',
                         query_groups, 'no such scheme', 3, n=2)
        schemes = [scheme for scheme in train.TINY_ROWS if scheme not in train.PRESETS]
        listed = str(caught.exception).partition('choose from ')[2]   # of the solution's message, if it is still there
        names = set(listed.split(', ') if listed else schemes)
        self.assertEqual(names, set(schemes), 'the table of query_groups and train.TINY_ROWS need the same schemes; in '
                         f'one only: {sorted(names ^ set(schemes))}')
        others = dict(T=9, K=7, weight=0.37, rho=0.1, L1=1, G=5)
        rng = np.random.default_rng(0)
        labels, boxes = random_targets(rng, (3, 0, 2), 4)
        for (table, rows), layers in (((('TINY_ROWS', train.TINY_ROWS)), 3), ((('PAPER_ROWS', train.PAPER_ROWS)), 6)):
            names = set(rows) - set(train.PRESETS)
            self.assertEqual(names, set(schemes), 'train.TINY_ROWS and train.PAPER_ROWS need the same schemes; in one '
                             f'only: {sorted(names ^ set(schemes))}')
            for scheme, progress in itertools.product(schemes, (0.0, 0.25, 0.5, 0.75, 0.99)):
                numbers, what = rows[scheme], f'{scheme} with the numbers of train.{table}, at {progress} of training: '
                unknown = sorted(set(numbers) - set(train.ROW_NUMBERS))
                self.assertFalse(unknown, f'{what}{unknown} would not reach query_groups: only {train.ROW_NUMBERS} '
                                 'have flags')
                shape = f'{what}return a list of QueryGroup, whose copies are a tuple with an entry for each layer'
                groups = self.attempt(shape, query_groups, scheme, layers, progress, **numbers)
                self.assertTrue(isinstance(groups, list) and groups and all(isinstance(g, QueryGroup) and isinstance(
                    g.copies, tuple) for g in groups), f'{shape}, not {groups}')
                for name in set(others) - set(numbers):
                    self.assertEqual(query_groups(scheme, layers, progress, **numbers, **{name: others[name]}), groups,
                                     f'{what}the row depends on {name}, which has no number in train.{table}: its flag '
                                     'would be refused')
                sizes = [group.queries for group in groups]
                # Of one encoder head all groups get tokens, of which `tiny` has 16^2 + 8^2 + 4^2 for shapes.
                self.assertTrue(table == 'PAPER_ROWS' or sum(sizes) <= 336, f'{what}{sum(sizes)} queries, and an image '
                                'of 128 pixels has 336 tokens to choose them from')
                self.assertTrue(all(len(group.copies) == layers and all(isinstance(k, int) and k >= 0 for k in
                                                                        group.copies) for group in groups),
                                f'{what}copies are whole numbers, {layers}, as many as layers; here they are '
                                f'{[group.copies for group in groups]}')
                self.assertTrue(groups[0].weight > 0 and all(group.weight >= 0 and not group.denoising for group in
                                                             groups), f'{what}the detector weighs something, no group '
                                'less than 0, and none is a denoising group')
                start = [group.queries for group in query_groups(scheme, layers, 0.0, **numbers)]
                self.assertEqual(sizes, start, f'{what}groups keep their sizes, as the model is built once')
                if scheme != 'one2many' and progress == 0.99:
                    self.assertEqual(groups[0].copies[-1], 1, f'{what}the first group has {groups[0].copies[-1]} '
                                     'copies in its last layer; it needs one: more need NMS, and none trains nothing. '
                                     '(Meant to be without a one-to-one end, as one2many? Then add its name to this '
                                     'test.)')
                if layers == 6:
                    continue
                outputs = random_outputs(rng, layers, 3, sum(sizes), 4)
                matches, _ = self.attempt(what, match, *outputs, labels, boxes, groups, [QueryGroup(12, (1,))])
                pairs = sum(min(group.queries, copies * m) for group in groups for copies in group.copies
                            for m in (3, 2))
                self.assertEqual(len(matches.gt), pairs, f'{what}every copy finds a query')
                parts = loss_of(outputs, labels, boxes, groups)
                self.assertTrue(all(part.isfinite() for part in parts.values()), f'{what}{parts}')


class TestExercisesCatch(unittest.TestCase):
    """Wrong solutions that are easy to write: the exercises' tests have to notice."""

    def caught(self, exercise, message):
        with self.assertRaisesRegex(AssertionError, message):
            getattr(TestExercises(exercise), exercise)()

    def test_a_detector_that_is_never_one_to_one(self):
        def row(scheme, *args, **numbers):
            return matchers.query_groups('one2many' if scheme == wrong else scheme, *args, **numbers)
        for wrong in ('epoch', 'layer'):
            with unittest.mock.patch.dict(globals(), query_groups=row):
                self.caught('test_9_a_scheme_of_your_own', f'{wrong} .* more need NMS')

    def test_a_loss_without_its_gradient(self):
        for part in range(3):
            def wrong(*args, solution=losses.set_loss, part=part):
                found = list(solution(*args))
                found[part] = (found[part] + found[part].detach()) / 2
                return tuple(found)
            with unittest.mock.patch.object(losses, 'set_loss', wrong):
                self.caught('test_7_set_loss', 'something is detached')

    def test_a_loss_without_copies_or_weights(self):
        """And each is told what is missing."""
        for missing, message in ((dict(copies=(1, 1)), 'divided by K times'), (dict(weight=1.0), 'has its weight')):
            def wrong(x, boxes, labels, gts, matches, groups, *rest, missing=missing, solution=losses.set_loss):
                return solution(x, boxes, labels, gts, matches, [g._replace(**missing) for g in groups], *rest)
            with unittest.mock.patch.object(losses, 'set_loss', wrong):
                self.caught('test_7_set_loss', message)

    def test_a_loss_with_one_class_weight(self):
        solution = losses.set_loss

        def never(*args):
            return solution(*args[:7])

        def unless_0(*args):
            how = args[7]
            return solution(*args[:7], how._replace(class_weight=how.class_weight or None))

        def of_boxes_too(*args):
            x = args[7].class_weight
            return tuple(part * (1 if x is None or i in (0, 3) else x / 2) for i, part in enumerate(solution(*args)))
        for wrong, message in ((never, 'how.class_weight, here 1/2'), (unless_0, 'may be 0'),
                               (of_boxes_too, 'weights of their own')):
            with unittest.mock.patch.object(losses, 'set_loss', wrong):
                self.caught('test_7_set_loss', message)

    def test_denoising_with_other_numbers(self):
        solution = hybrid_detr.GroupSelfAttention.forward

        def wrong(self, content, position, groups, X=0):
            return solution(self, content, position, groups, X) * (2 if X else 1)
        with unittest.mock.patch.object(hybrid_detr.GroupSelfAttention, 'forward', wrong):
            self.caught('test_4_group_self_attention', 'share one softmax')


# --- Losses ---------------------------------------------------------------------------------------------------------

class TestLosses(unittest.TestCase):
    def test_focal_equals_torchvision(self):
        logits, target = torch.randn(50, 7, dtype=torch.float64), (torch.rand(50, 7) < 0.3).double()
        self.assertTrue(torch.allclose(losses.class_loss(logits, target, target),
                                       sigmoid_focal_loss(logits, target, 0.25, 2)))

    def test_giou_equals_torchvision(self):
        """Of boxes that overlap, are apart along one side or both, or lie in each other; gradients, too."""
        corners = torch.rand(200, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        a, b = torch.cat([corners.amin(2), corners.amax(2)], -1).requires_grad_().unbind(1)
        iou, giou = losses.pair_iou(a, b)
        theirs = 1 - generalized_box_iou_loss(a, b, eps=0)
        torch.testing.assert_close(giou, theirs)
        torch.testing.assert_close(iou, box_iou(a, b).diagonal())
        self.assertTrue(20 < int((iou == 0).sum()) < 180)
        for ours, other in zip(torch.autograd.grad(giou.sum(), (a, b), retain_graph=True),
                               torch.autograd.grad(theirs.sum(), (a, b))):
            torch.testing.assert_close(ours, other)

    def test_peak_memory(self):
        """Of tensors made inside, each while it lives; a view holds nothing of its own."""
        before = torch.zeros(1000)
        with evaluation.PeakMemory() as memory:
            before.view(10, 100)
            a = torch.zeros(1000)
            b = a.view(10, 100) + 1
            del a
            c = b * 2
            del b, c
        self.assertEqual((memory.peak, memory.now), (8000, 0))

    def test_as_published(self):
        """The forms that the benchmark measures against give the same numbers."""
        rng = np.random.default_rng(6)
        outputs, (labels, boxes) = random_outputs(rng, 3, 3, 14, 4), random_targets(rng, (3, 0, 2), 4)
        groups = [QueryGroup(6, (1, 1, 1)), QueryGroup(8, (2, 2, 1), 0.7)]
        outputs = type(outputs)(*(x.requires_grad_() for x in outputs))
        torch.manual_seed(0)
        attention, content = hybrid_detr.GroupSelfAttention(16, 2, 0.0), torch.randn(2, 2, 8, 16, requires_grad=True)
        value, weights = torch.randn(2, 20, 2, 4, requires_grad=True), torch.rand(2, 5, 2, 2, 3, requires_grad=True)
        locations = torch.rand(2, 5, 2, 2, 3, 2, requires_grad=True)
        pairs = [(lambda: sum(loss_of(outputs, labels, boxes, groups).values()),
                  lambda: evaluation.published_loss(outputs, labels, boxes, groups, 5), outputs),
                 (lambda: hybrid_detr.deformable_attention(value, [(4, 4), (2, 2)], locations, weights),
                  lambda: evaluation.published_deformable_attention(value, [(4, 4), (2, 2)], locations, weights),
                  (value, locations, weights))]
        pairs += [(lambda sizes=sizes: attention(*content, sizes),
                   lambda sizes=sizes: evaluation.published_self_attention(attention, *content, sizes),
                   (content, *attention.parameters())) for sizes in ((3, 5), (4, 4))]
        for ours, theirs, inputs in pairs:
            here, there = ours(), theirs()
            torch.testing.assert_close(here, there)
            for a, b in zip(torch.autograd.grad(here.square().sum(), inputs),
                            torch.autograd.grad(there.square().sum(), inputs)):
                torch.testing.assert_close(a, b)

    def test_naive_loop_gives_the_same_loss(self):
        """One matcher and one loss per image, layer and group, written out, against all of them at once."""
        rng = np.random.default_rng(5)
        outputs, (labels, boxes) = random_outputs(rng, 3, 3, 14, 4), random_targets(rng, (3, 0, 2), 4)
        groups = [QueryGroup(6, (1, 1, 1)), QueryGroup(8, (3, 0, 1), 0.7)]   # a layer without copies: background only
        parts = loss_of(outputs, labels, boxes, groups)
        naive, first = dict.fromkeys(parts, 0.0), 0
        layers = [('', outputs.pred_logits[l][:, first:first + g.queries],
                   outputs.pred_boxes[l][:, first:first + g.queries], g.copies[l], g.weight, labels)
                  for first, g in zip((0, 6), groups) for l in range(3)]
        layers.append(('encoder_', outputs.encoder_logits[0], outputs.encoder_boxes[0], 1, 1.0,
                       [torch.zeros_like(x) for x in labels]))
        for prefix, logits, predicted, copies, weight, wanted in layers:
            for b in range(3):
                many_labels, many_boxes = wanted[b].repeat(copies), boxes[b].repeat(copies, 1)
                query, gt = matchers.linear_sum_assignment(matching_cost(logits[b][None], predicted[b][None],
                                                                         many_labels, many_boxes)[0])
                target = F.one_hot(torch.full((len(logits[b]),), 4).index_put((torch.from_numpy(query),),
                                                                              many_labels[gt]), 5)[:, :4].float()
                a, c = predicted[b][query], many_boxes[gt]
                divisor = weight / (max(copies, 1) * 5)
                naive[prefix + 'class'] += 2 * divisor * sigmoid_focal_loss(logits[b], target, 0.25, 2, 'sum')
                naive[prefix + 'l1'] += 5 * divisor * (a - c).abs().sum()
                naive[prefix + 'giou'] += 2 * divisor * (1 - generalized_box_iou(box_convert(a, 'cxcywh', 'xyxy'),
                                                                                 box_convert(c, 'cxcywh',
                                                                                             'xyxy')).diag()).sum()
        for name, value in parts.items():
            self.assertAlmostEqual(float(value), float(naive[name]), places=4, msg=name)


# From the public codes of detrex, DEIM and Stable-DINO, and from the papers' formulas (float64): for an entry (logit,
# matched, IoU, largest IoU of its image's pairs, largest IoU of any query there) the gradient by its logit.
ENTRIES = torch.tensor([[-2.387681, 1, 0.7179563502808732, 0.7179563502808732, 0.8214358651926561],
                        [1.525444, 1, 0.6507526900426909, 0.7179563502808732, 0.8214358651926561],
                        [-1.916311, 1, 0.6433949944066154, 0.7179563502808732, 0.8214358651926561],
                        [-1.734789, 1, 0.6923352416607498, 0.6923352416607498, 0.9062540181712747],
                        [-1.699873, 1, 0, 0.6923352416607498, 0.9062540181712747],
                        [-3.698559, 0, 0, 0.7179563502808732, 0.8214358651926561],
                        [-1.674655, 0, 0, 0.6923352416607498, 0.9062540181712747]], dtype=torch.float64)
ENTRY_GRADIENTS = {
    ('focal', False): [-0.279408552, -0.004005721, -0.265695624, -0.256342453, -0.254247917, 3.1476e-05, 0.008350114],
    ('vfl', False): [-0.455069045, 0.11100933, -0.331426589, -0.37549439, 0.007843961, 3.1476e-05, 0.008350114],
    ('vfl', True): [-0.455069045, 0.11100933, -0.331426589, -0.37549439, 0, 1.0578e-05, 0.002947268],
    ('mal', False): [-0.524224046, 0.296381465, -0.387805889, -0.426093165, 0.154481853, 0.000225186, 0.02349308],
    ('mal', True): [-0.524224046, 0.296381465, -0.387805889, -0.426093165, 0.154481853, 9.0737e-05, 0.009892332],
    ('stable', False): [-1.117634208, -2.9565e-05, -0.560249065, -1.025369812, 0.010458615, 4.1969e-05, 0.011133485],
    ('stable', True): [-0.279408536, -6.45e-06, -0.140061492, -0.256342437, 0.002614654, 3.1476e-05, 0.008350113],
    ('stable max-iou', False): [-0.633640193, 0.032927892, -0.316615103, -0.767042842, 0.010458615, 4.1969e-05,
                                0.011133485]}
# DETR's code: logits of a matched (class 1) and an unmatched query, "no object" last, and gradients of the loss of 5
# matched and 19 other queries, i.e. divided by 6.9.
CE_LOGITS = [[-1.015997, -2.387681, -1.498653, -3.109972, -1.175418, 0.84923],
             [-2.771431, -1.036781, -3.698559, 0.023167, -0.654705, 0.606178]]
CE_GRADIENTS = [[0.0155768112, -0.1409760201, 0.0096131057, 0.0019190079, 0.0132813706, 0.1005857247],
                [0.0002374957, 0.0013458750, 0.0000939743, 0.0038844924, 0.0019721421, -0.0075339795]]
# Matching costs of two queries and three ground truths, the first and last of one class; the codes' GIoU cost is 1-GIoU
# in Stable-DINO, which shifts all costs by 2.
COST_QUERIES = ([[-3.071198, -1.013251, -0.71464, 0.526941, -3.750376, 0.731537],
                 [-1.830478, -2.86228, 1.913643, 1.525444, -1.531977, 1.403095]],
                [[0.364876, 0.518135, 0.233386, 0.119037], [0.358469, 0.505993, 0.245132, 0.126047]])
COST_GTS = ([1, 3, 1], [[0.586446, 0.405901, 0.209817, 0.333296], [0.379815, 0.522578, 0.240343, 0.119097],
                        [0.596566, 0.466167, 0.227374, 0.336159]])
COSTS = [(Cost(), 0, [[3.8781200749, -2.0580302374, 3.5151809624], [4.8299486222, -2.7551373426, 4.4879785672]]),
         (Cost(class_weight=1, softmax=True), 0, [[3.4776968370, -1.8631622144, 3.1147577245],
                                                  [3.5211179117, -1.3050901319, 3.1791478567]]),
         (Cost('stable'), 2, [[8.2564651468, 0.0048994785, 7.8579068250],
                              [12.0371451203, -0.4669340219, 11.6799150642]]),
         (Cost('stable', official=True), 2, [[6.2265797557, 0.0459088520, 5.8545595154],
                                             [7.1527932442, -0.1239639690, 6.8070075676]])]
EMA_WEIGHTS = [1.9990005997833917, 2.998000201864182, 3.996998805248555]   # DEIM: warm-up 1000, weights 2, 3, 4 after 1
FLAT_COSINE = {0: 0, 149: 1.11005e-6, 2000: 2e-4, 3400: 2e-4, 3749: 1.9487254637627513e-4, 4649: 1.467951560353072e-4,
               5800: 1e-4, 5999: 1e-4}   # DEIM: step of 6000 -> learning rate


def entry_losses(kind: str, official: bool, entries=ENTRIES):
    """Loss of each entry, and its gradient by the logit."""
    logits = entries[:, 0].clone().requires_grad_()
    _, matched, iou, largest, best = entries.T
    target = {'stable': iou ** 2 / largest ** 2, 'stable max-iou': iou ** 2 / largest ** 2 * best}.get(kind, iou)
    loss = losses.class_loss(logits, matched, target, LossSettings(kind.split()[0], official=official))
    return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]


class TestWhatAMatchIsWorth(Close, unittest.TestCase):
    def test_reference_gradients(self):
        for (kind, official), wanted in ENTRY_GRADIENTS.items():
            gradient = entry_losses(kind, official)[1]
            for i, (value, number) in enumerate(zip(gradient.tolist(), wanted)):
                delta = 1e-6 if kind == 'stable' and official else 3e-8   # Stable-DINO's code has epsilons
                self.assertAlmostEqual(value, number, delta=delta, msg=f'{kind}, official={official}, entry {i}')

    def test_reference_cross_entropy(self):
        logits = torch.tensor(CE_LOGITS, dtype=torch.float64, requires_grad=True)
        matched = torch.zeros(2, 5, dtype=torch.float64)
        matched[0, 1] = 1
        loss, weight = losses.ce_loss(logits, matched)
        self.assertEqual([round(w, 9) for w in weight.tolist()], [1, 0.1])
        self.close(torch.autograd.grad(loss.sum() / 6.9, logits)[0], CE_GRADIENTS, 1e-9)

    def test_reference_costs(self):
        logits, boxes, gt_boxes = (torch.tensor(x, dtype=torch.float64) for x in (*COST_QUERIES, COST_GTS[1]))
        for how, shift, wanted in COSTS:
            x = logits if how.softmax else logits[:, :5]
            cost = matching_cost(x[None], boxes[None], torch.tensor(COST_GTS[0]), gt_boxes, how)[0]
            # 1e-8 inside the logarithms is the codes', not the papers'.
            self.close(cost + shift, wanted, 2e-5 if how.kind == 'stable' else 1e-9, str(how))

    def test_by_hand(self):
        x, one, zero = (torch.tensor([v], dtype=torch.float64) for v in (0.0, 1.0, 0.0))   # p = 1/2, BCE = log 2
        log2, half = math.log(2), torch.tensor([0.5], dtype=torch.float64)
        for kind, matched, iou, wanted in (('bce', one, one, log2), ('focal', one, one, 0.25 / 4 * log2),
                                           ('focal', zero, zero, 0.75 / 4 * log2), ('vfl', one, half, log2 / 2),
                                           ('vfl', one, zero, 0.75 / 4 * log2), ('mal', one, half, log2),
                                           ('mal', one, zero, log2), ('mal', zero, zero, 0.5 ** 1.5 * log2),
                                           ('stable', one, one, log2 / 4), ('stable', one, half, 0)):
            loss = losses.class_loss(x, matched, iou, LossSettings(kind))
            self.assertAlmostEqual(float(loss), wanted, places=12)

    def test_f1(self):
        """Table 7: all are 0 at IoU 0 and 1 at a perfect, confident pair; those with p ask for less than IoU alone."""
        s, p = torch.tensor([0.0, 0.25, 1]), torch.tensor([0.3, 0.4, 1])
        for name, f1 in losses.F1.items():
            target = f1(s, p)
            self.close(target[[0, 2]], [0.0, 1], 1e-6, name)
        middle = {name: float(f1(s, p)[1]) for name, f1 in losses.F1.items()}
        self.assertEqual(sorted(middle, key=middle.get), ['s3', 's2p1', 's2', 's1p1', 'exp', 's1p0.25', 's1', 'sin',
                                                          's0.5'])

    def test_rescale_of_each_image_layer_and_group(self):
        iou, owner = torch.tensor([0.5, 0.25, 0.2, 0.0]), torch.tensor([0, 0, 2, 3])
        best = torch.tensor([0.8, 0.9, 0.7, 0.6])
        self.close(losses.stable_target(iou, iou, owner, torch.ones(4)), [1, 0.25, 1, 0], 1e-6)
        self.close(losses.stable_target(iou, iou, owner, best), [0.8, 0.2, 0.7, 0], 1e-6)
        self.close(losses.stable_target(iou, iou, owner, None), [0.25, 0.0625, 0.04, 0], 1e-6)
        boxes, gt = torch.rand(2, 2, 5, 4) * 0.3 + 0.2, [torch.rand(3, 4) * 0.3 + 0.2, torch.zeros(0, 4)]
        best = losses.largest_iou(boxes, gt, [2, 3])
        xyxy = [box_convert(x, 'cxcywh', 'xyxy') for x in (boxes[1, 0, 2:], gt[0])]
        self.assertAlmostEqual(float(best[1, 0, 1]), float(box_iou(*xyxy).max()), places=6)
        self.assertEqual(best[:, 1].abs().max(), 0, 'an image without boxes')

    def test_groups_are_on_their_own(self):
        """The loss of a row of two groups is the sum of the losses of two rows of one, for every loss and rescale."""
        rng = np.random.default_rng(7)
        outputs, (labels, boxes) = random_outputs(rng, 2, 2, 14, 3), random_targets(rng, (3, 2), 3)
        groups = [QueryGroup(6, (1, 1)), QueryGroup(8, (2, 1), 0.5)]
        for cls_loss, rescale in itertools.product(train.CLASS_WEIGHTS, ('one', 'max-iou', 'none')):
            how, cost = LossSettings(cls_loss, rescale=rescale), Cost(softmax=cls_loss == 'ce')
            logits = F.pad(outputs.pred_logits, (0, int(cost.softmax)))
            whole, _ = match(logits, *outputs[1:], labels, boxes, groups, [QueryGroup(12, (1,))], cost)
            total = sum(losses.set_loss(logits, outputs.pred_boxes, labels, boxes, whole, groups, 5, how)[:3])
            alone = 0
            for group, rows in zip(groups, (slice(0, 6), slice(6, 14))):
                part, _ = match(logits[:, :, rows], outputs.pred_boxes[:, :, rows], *outputs[2:], labels, boxes,
                                [group], [QueryGroup(12, (1,))], cost)
                alone += sum(losses.set_loss(logits[:, :, rows], outputs.pred_boxes[:, :, rows], labels, boxes, part,
                                             [group], 5, how)[:3])
            self.assertAlmostEqual(float(total), float(alone), places=3, msg=str(how))

    def test_no_gradient_through_the_target(self):
        logits, one = torch.zeros(1, requires_grad=True), torch.ones(1)
        for f1 in losses.F1:
            target = losses.stable_target(one / 2, logits.sigmoid(), torch.tensor([0]), None, f1)
            self.assertFalse(target.requires_grad, f1)

    def test_no_gradient_from_class_loss_to_boxes(self):
        rng = np.random.default_rng(5)
        outputs, (labels, boxes) = random_outputs(rng, 2, 2, 6, 3), random_targets(rng, (2, 1), 3)
        for cls_loss in train.CLASS_WEIGHTS:
            for rescale in ('one', 'max-iou'):
                pred = outputs.pred_boxes.clone().requires_grad_()
                logits = F.pad(outputs.pred_logits, (0, int(cls_loss == 'ce'))).requires_grad_()
                groups = [QueryGroup(6, (1, 1))]
                matches, _ = match(logits.detach(), *outputs[1:], labels, boxes, groups, [QueryGroup(12, (1,))],
                                   Cost(softmax=cls_loss == 'ce'))
                loss = losses.set_loss(logits, pred, labels, boxes, matches, groups, 3,
                                       LossSettings(cls_loss, rescale=rescale))[0]
                self.assertIsNone(torch.autograd.grad(loss, pred, allow_unused=True)[0], cls_loss)

    def test_finite_at_the_extremes(self):
        """Logits of +-100, IoU 0 and 1, no positives, no ground truth in the batch; also under autocast."""
        gt = [torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.2, 0.2, 0.1, 0.1]]), torch.zeros(0, 4)]
        labels = [torch.tensor([0, 1]), torch.zeros(0, dtype=torch.int64)]
        # As many logits at their starting value as a real row has: their sum is beyond float16.
        many = torch.full((1, 2, 900, 80), -4.6), torch.full((1, 2, 900, 4), 0.5)
        for dtype in (torch.float16, torch.bfloat16):
            with torch.autocast('cpu', dtype=dtype):
                for how in (Cost(), Cost('stable')):
                    match(*(x.to(dtype) for x in many * 2), labels, gt, *[[QueryGroup(900, (1,))]] * 2, how)
        boxes = torch.tensor([0.5, 0.5, 0.2, 0.2]).repeat(1, 2, 4, 1)
        boxes[:, :, 2:] = torch.tensor([0.8, 0.8, 0.1, 0.1])                                   # IoU 1 and 0
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for cls_loss, empty, rescale in itertools.product(train.CLASS_WEIGHTS, (False, True), ('one', 'max-iou')):
                logits = torch.tensor([100.0, -100, 100, -100]).view(1, 1, 4, 1).repeat(1, 2, 1, 3 + (cls_loss == 'ce'))
                logits[..., 1] *= -1
                logits, pred = logits.to(dtype).requires_grad_(), boxes.to(dtype).requires_grad_()
                now = (labels, gt) if not empty else ([labels[1]] * 2, [gt[1]] * 2)
                groups = [QueryGroup(4, (1,))]
                pairs = [] if empty else [(0, 0, 0, 0), (0, 0, 3, 1)]
                matches = Matches(*torch.tensor(pairs, dtype=torch.int64).view(-1, 4).T)
                with torch.autocast('cpu', dtype=dtype, enabled=dtype != torch.float32):
                    for official in (False, True):
                        how = LossSettings(cls_loss, rescale=rescale, official=official)
                        parts = losses.set_loss(logits, pred, *now, matches, groups, sum(map(len, now[0])), how)
                        gradients = torch.autograd.grad(sum(parts[:3]), (logits, pred), allow_unused=True)
                        for x in (*parts, *gradients):
                            self.assertTrue(x is None or bool(x.isfinite().all()), f'{dtype} {how} empty={empty}')
                    for how in (Cost(), Cost('stable'), Cost('stable', softmax=True), Cost(softmax=True)):
                        cost = matching_cost(logits.detach()[:, 0], boxes[:, 0].to(dtype), labels[0], gt[0], how)
                        self.assertTrue(bool(cost.isfinite().all()), f'{dtype} {how}')

    def test_two_targets_of_one_class_have_their_own_quality(self):
        """Stable-DINO's code would judge both by the box of the last."""
        logits, boxes = torch.zeros(1, 1, 2), torch.tensor([[[0.3, 0.3, 0.2, 0.2]]])
        gt = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]])
        plain, stable = (matching_cost(logits, boxes, torch.tensor([1, 1]), gt, how)[0, 0]
                         for how in (Cost('stable', f2=0), Cost('stable')))
        self.assertAlmostEqual(float(stable[0]), float(plain[0]), places=6, msg='a perfect box keeps its score')
        self.assertGreater(float(stable[1]), float(plain[1]) + 1, 'a distant one is judged by a lower score')

    def test_demonstration(self):
        printed = demonstration('losses.py')
        self.assertIn('mal     match, IoU 0     0.051 +0.050     0.288 +0.250     0.693 +0.500', printed)
        self.assertIn('mal pays most', printed)


# --- The detector's groups ------------------------------------------------------------------------------------------

TINY = dict(backbone='tiny', width=32, heads=4, encoder_layers=1, decoder_layers=2, levels=3, ffn=32,
            frozen_backbone=False)


def tiny_model(groups, **switches):
    torch.manual_seed(0)
    model = HybridDETR(3, groups, **{**TINY, **switches}).train()
    with torch.no_grad():   # an untrained box head is all zero: give the boxes something to do
        for head in (*model.box_heads, *model.encoder_box_heads):
            head[-1].weight.normal_(std=0.1)
    return model


class TestGroups(unittest.TestCase):
    images, mask = torch.randn(2, 3, 64, 80, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 64, 80,
                                                                                                      dtype=torch.bool)

    def test_groups_do_not_see_each_other(self):
        for groups in ((6, 6, 6), (6, 10)):   # folded into the batch, and one after the other
            model = tiny_model(groups).eval()   # eval: batch norm must not move between the runs
            content, position = torch.randn(2, sum(groups), 32), torch.randn(2, sum(groups), 32)
            attention = model.decoder[0].self_attention
            before = attention(content, position, groups)
            disturbed = content.clone()
            disturbed[:, groups[0]] += 1        # the first query of the second group
            after = attention(disturbed, position, groups)
            self.assertTrue(torch.equal(before[:, :groups[0]], after[:, :groups[0]]),
                            'group 1 moved when a query of group 2 did')
            self.assertFalse(torch.equal(before[:, groups[0] + 1], after[:, groups[0] + 1]),
                             'queries of one group must see each other')

    def test_equals_the_papers_mask(self):
        for groups in ((5, 5), (4, 6)):
            attention = tiny_model(groups).decoder[0].self_attention
            content, position = torch.randn(2, 10, 32), torch.randn(2, 10, 32)
            reference = torch.nn.MultiheadAttention(32, 4, batch_first=True)
            reference.load_state_dict({'in_proj_weight': attention.in_proj.weight,
                                       'in_proj_bias': attention.in_proj.bias,
                                       'out_proj.weight': attention.out_proj.weight,
                                       'out_proj.bias': attention.out_proj.bias})
            number = torch.arange(2).repeat_interleave(torch.tensor(groups))
            query = content + position
            wanted, _ = reference(query, query, content, attn_mask=number[:, None] != number)
            self.assertTrue(torch.allclose(attention(content, position, groups), wanted, atol=1e-6))

    def test_a_group_alone_gives_what_it_gives_in_the_row(self):
        for groups, selection in (((6, 10), 'ranks'), ((5, 8), 'distinct'), ((7, 7, 7), 'heads')):
            model = tiny_model(groups, selection=selection).eval()
            model_train = tiny_model(groups, selection=selection)
            model_train.backbone.eval()
            with torch.no_grad():
                row, first = model_train(self.images, self.mask), 0
                for g, size in enumerate(groups):
                    alone = model(self.images, self.mask, g)
                    self.assertTrue(torch.allclose(row.pred_boxes[:, :, first:first + size], alone.pred_boxes,
                                                   atol=1e-5), f'group {g}')
                    first += size
                self.assertTrue(torch.equal(model(self.images, self.mask).pred_boxes,
                                            model(self.images, self.mask, 0).pred_boxes))
        self.assertEqual(row.encoder_logits.shape[2], 3 * model(self.images, self.mask).encoder_logits.shape[2])

    def test_disturbing_another_group(self):
        """The whole model: with separate attention no bit of group 1 moves; without, it does (Group DETR Table 7 c)."""
        for groups, separate in itertools.product(((6, 6, 6), (6, 10)), (True, False)):
            model = tiny_model(groups, separate_attention=separate)
            model.backbone.eval()
            with torch.no_grad():
                before = model(self.images, self.mask)
                model.query_content[6] += 1   # the first query of group 2
                after = model(self.images, self.mask)
            for name in ('pred_logits', 'pred_boxes'):
                same = torch.equal(getattr(before, name)[:, :, :6], getattr(after, name)[:, :, :6])
                self.assertEqual(same, separate, f'groups {groups}, separate attention {separate}: {name} of group 1')
            self.assertEqual(model.eval()(self.images, self.mask).pred_logits.shape[2], 6, 'inference has one group')

    def test_heads_of_groups_differ(self):
        model = tiny_model((6, 6), selection='heads')
        self.assertFalse(torch.equal(model.encoder_class_heads[0].weight, model.encoder_class_heads[1].weight),
                         'equal heads with equal targets stay equal for ever')

    def test_selection(self):
        logits, boxes = torch.randn(2, 2, 30, 3), torch.randn(2, 2, 30, 4)
        boxes[:, 1] = boxes[:, 0]    # tokens can be told by their boxes
        for selection in ('ranks', 'heads', 'distinct'):
            first, second = tiny_model((6, 9), selection=selection).select(logits, boxes, (6, 9))
            shared = sum(bool((second[b] == box).all(-1).any()) for b in range(2) for box in first[b])
            self.assertEqual(first.shape[1:], (6, 4))
            self.assertEqual(shared > 0, selection == 'heads', f'{selection}: {shared} tokens are in both groups')

    def test_switches(self):
        state = {name for name, _ in tiny_model((6,)).named_parameters()}
        self.assertIn('query_content', state)
        for switches in (dict(mixed_selection=False), dict(look_forward_twice=False), dict(dropout=0.1), dict(ffn=64)):
            outputs = tiny_model((6, 4), **switches)(self.images, self.mask)
            self.assertEqual(outputs.pred_boxes.shape, (2, 2, 10, 4))
        # Look forward twice changes no value, only who learns: the loss of layer 2 reaches the box head of layer 1.
        gradients = []
        for twice in (True, False):
            model = tiny_model((6,), look_forward_twice=twice)
            model(self.images, self.mask).pred_boxes[1].sum().backward()
            gradients.append(model.box_heads[0][-1].bias.grad)
        self.assertGreater(float(gradients[0].abs().sum()), 0)
        self.assertEqual(float(gradients[1].abs().sum()), 0)

    def test_padding_does_not_matter(self):
        model = tiny_model((6,)).eval()
        for projection in model.input_proj:   # GroupNorm's statistics see the padding, in the official code, too
            projection[1] = torch.nn.Identity()
        images, mask = self.images.clone(), self.mask.clone()
        images[:, :, :, 64:], mask[:, :, 64:] = 0, True
        with torch.no_grad():
            padded, cut = model(images, mask), model(images[..., :64], mask[..., :64])
        # The backbone's convolutions see the border, 0 on either side, through their batch norms: compare loosely.
        self.assertLess(float((padded.pred_boxes - cut.pred_boxes).abs().mean()), 0.002)

    def test_too_few_tokens(self):
        with self.assertRaisesRegex(ValueError, 'tokens'):
            tiny_model((500,))(self.images, self.mask)
        few, categories = data.ShapesDataset('val', 1, 64), list(range(1, 7))
        for call in (lambda *args: evaluation.detect(*args, batch_size=1, workers=0), evaluation.unstable_score,
                     lambda *args: evaluation.draw_predictions(*args, 'no.png'),
                     lambda *args: evaluation.draw_matches(*args, 'no.png', 0)):
            with self.assertRaisesRegex(data.UserError, 'shapes/val/0: .*tokens'), quiet():
                call(tiny_model((500,)), few, categories)
        with self.assertRaisesRegex(ValueError, 'a bug'):   # no image is blamed for it
            evaluation.predict(unittest.mock.Mock(side_effect=ValueError('a bug')), unittest.mock.Mock())
        with self.assertRaisesRegex(data.UserError, '--image-size 63: must be a number of at least 64'):
            train.main(['--image-size', '63'])


class TestDenoising(Close, unittest.TestCase):
    def noised(self, counts=(3, 0, 2), number=7, seed=0, **noise):
        labels, boxes = random_targets(np.random.default_rng(seed), counts, 4)
        torch.manual_seed(seed)
        return labels, boxes, matchers.denoising_queries(labels, boxes, 4, number, **noise)

    def test_layout(self):
        labels, boxes, noised = self.noised(label_noise=0.0)
        self.assertEqual((noised.groups, noised.labels.shape, noised.boxes.shape), (2, (3, 12), (3, 12, 4)))
        self.assertEqual(noised.query_group(6), QueryGroup(12, (2,) * 6, denoising=True))
        for b in range(3):
            expected = [*labels[b].tolist(), *[4] * (3 - len(labels[b]))] * 4
            self.assertEqual(noised.labels[b].tolist(), expected, 'twice 3 positive and 3 negative slots; 4 is empty')
        self.assertTrue(torch.equal(noised.boxes[1], torch.full((12, 4), 0.5)))
        matches = assign([torch.rand(2, 5, len(x)) for x in labels], [QueryGroup(5, (1, 1)), noised.query_group(2)])
        keep = (matches.query >= 5) & (matches.layer == 1)
        pairs = torch.stack([matches.image, matches.query - 5, matches.gt], 1)[keep].tolist()
        self.assertEqual(pairs, [[0, 0, 0], [0, 1, 1], [0, 2, 2], [0, 6, 0], [0, 7, 1], [0, 8, 2],
                                 [2, 0, 3], [2, 1, 4], [2, 6, 3], [2, 7, 4]], 'only positive slots answer')
        self.assertEqual(matchers.denoising_queries(labels, boxes, 4, 1).groups, 1, 'at least one group')

    def test_no_boxes_at_all(self):
        labels, boxes, noised = self.noised((0, 0))
        self.assertEqual((noised.groups, noised.labels.tolist()), (1, [[4, 4]] * 2))
        self.assertEqual(len(assign([torch.zeros(1, 0, 0)] * 2, [noised.query_group(1)]).query), 0)

    def test_noise(self):
        """Corners move by 0..1 of half the size in the first half of a group, by 1..2 in the second."""
        box, half = torch.tensor([[0.5, 0.5, 0.1, 0.2]]), torch.tensor([0.05, 0.1])
        torch.manual_seed(0)
        noised = matchers.denoising_queries([torch.tensor([1])], [box], 4, 4000)
        boxes = noised.boxes.view(4000, 2, 4)
        corners = box_convert(boxes, 'cxcywh', 'xyxy')
        low, high = (corners[..., :2] - 0.45 + torch.tensor([0, 0.05])) / half, (corners[..., 2:] - 0.55 - torch.tensor(
            [0, 0.05])) / half   # how far the corners are from where they were; in order again, if they crossed
        self.assertLessEqual(float(torch.cat([low, high], -1)[:, 0].abs().max()), 1 + 1e-4)
        far = torch.cat([low, high], -1)[:, 1]
        # A corner moves by 1..2 half sizes outwards, or inwards: beyond the centre, where it may cross the other one.
        self.assertLessEqual(float(far[:, :2].min()), -1.9)
        self.assertGreaterEqual(float(far[:, :2].min()), -2 - 1e-4)
        self.assertLessEqual(float(far[:, 2:].max()), 2 + 1e-4)
        outwards = (far[:, :2] < 0) & (far[:, 2:] > 0) & (high[:, 1] - low[:, 1] > 2 - 1e-4)
        self.assertGreater(int(outwards.sum()), 1000)
        self.assertGreaterEqual(float(torch.where(outwards, -far[:, :2], 9).min()), 1 - 1e-4)
        self.assertTrue(bool((boxes[..., 2:] >= 0).all()), 'no negative sizes')
        changed = float((noised.labels != 1).float().mean())
        self.assertAlmostEqual(changed, 0.25 * 3 / 4, delta=0.02, msg='drawn anew with 1/4, and 1/C the same again')

    def test_same_as_a_mask(self):
        torch.manual_seed(0)
        attention = hybrid_detr.GroupSelfAttention(16, 2, 0.0).eval()
        for groups in ((3, 5), (4, 4)):
            content, position = torch.randn(2, 8 + 12, 16), torch.randn(2, 8 + 12, 16)
            owner = torch.tensor([0] * groups[0] + [1] * groups[1] + [2] * 6 + [3] * 6)
            seen = owner[:, None] == owner
            seen |= (owner[:, None] >= 2) & (owner == 0)   # a denoising query also sees the first group
            q, k = F.linear(content + position, attention.in_proj.weight[:32], attention.in_proj.bias[:32]).chunk(2, -1)
            v = F.linear(content, attention.in_proj.weight[32:], attention.in_proj.bias[32:])
            q, k, v = (x.unflatten(-1, (2, 8)).transpose(1, 2) for x in (q, k, v))
            masked = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
            self.close(attention(content, position, groups, 2), attention.out_proj(masked).detach(), 1e-5)

    def test_matching_queries_never_see_denoising_queries(self):
        torch.manual_seed(0)
        model = HybridDETR(4, (6, 9), 'tiny', width=32, heads=4, encoder_layers=1, decoder_layers=2, ffn=32, levels=3,
                           denoising=True).eval()
        images, mask = torch.rand(3, 3, 64, 64), torch.zeros(3, 64, 64, dtype=torch.bool)
        _, _, one = self.noised()
        _, _, other = self.noised(seed=1)
        with torch.no_grad():
            model.train()
            for norm in model.modules():
                if isinstance(norm, torch.nn.BatchNorm2d):
                    norm.eval()
            runs = [model(images, mask, noised=noised) for noised in (one, other)]
            without = model(images, mask)
        self.assertEqual(runs[0].pred_logits.shape, (2, 3, 15 + 12, 4))
        for name in ('pred_logits', 'pred_boxes'):
            a, b, plain = (getattr(run, name)[:, :, :15] for run in (*runs, without))
            self.assertTrue(torch.equal(a, b), 'other denoising queries must not move a bit of the others')
            self.close(a, plain, 1e-6)
        self.assertFalse(torch.equal(runs[0].pred_logits[:, :, 15:], runs[1].pred_logits[:, :, 15:]))

    def test_normaliser(self):
        """N denoising groups weigh as much as one: the divisor is groups * boxes (DINO)."""
        labels, boxes, noised = self.noised(number=20, label_noise=0.0)
        group = noised.query_group(1)
        matches = assign([torch.zeros(1, 0, len(x)) for x in labels], [group])
        logits, pred = torch.zeros(1, 3, group.queries, 4), noised.boxes[None]
        loss = losses.set_loss(logits, pred, labels, boxes, matches, [group], 5)
        one = [matches.image[i] for i in range(len(matches.image))]
        self.assertEqual(len(one), noised.groups * 5)
        per_pair = (pred[0, matches.image, matches.query] - torch.cat(boxes)[matches.gt]).abs().sum(1).mean()
        self.assertAlmostEqual(float(loss[1]), 5 * float(per_pair), places=5)


class TestFusion(Close, unittest.TestCase):
    def test_which_tokens_are_joined(self):
        shapes = [(8, 8), (4, 4), (2, 2)]
        where = hybrid_detr.geometry(torch.zeros(1, 64, 64, dtype=torch.bool), shapes, torch.zeros(3, 32))
        tokens = torch.randn(1, 84, 32)
        for fusion, layers, parts in (('none', 3, []), ('simple', 3, [[3, 0]]), ('ulike', 4, [[3, 1], [4, 0]]),
                                      ('ulike', 6, [[4, 2], [5, 1], [6, 0]]), ('ulike', 3, [[2, 1], [3, 0]]),
                                      ('dense', 3, [[0, 1, 2, 3]])):
            torch.manual_seed(0)
            model = HybridDETR(3, (5,), 'tiny', width=32, heads=4, encoder_layers=layers, decoder_layers=1, ffn=32,
                               levels=3, fusion=fusion)
            outputs, joined, fused, entered = [tokens], [], [], []
            for layer in model.encoder:
                layer.register_forward_hook(lambda m, i, o: entered.append(i[0]) or outputs.append(o))
            for part in model.fusions:
                part.register_forward_hook(lambda m, i, o: joined.append(i[0]) or fused.append(o))
            final = model.encode(tokens, where)
            self.assertTrue(torch.equal(final, [*outputs, *fused][-1]), f'{fusion}: what the decoder sees')
            if fusion == 'ulike':   # the next layer goes on with what was joined
                for (l, _), out in zip(parts[:-1], fused):
                    self.assertTrue(torch.equal(entered[l], out))
            self.assertEqual(len(joined), len(parts), fusion)
            for found, wanted in zip(joined, parts):
                self.close(found, torch.cat([outputs[l] for l in wanted], -1).detach(), 1e-6, f'{fusion} {layers}')
            self.assertEqual(final.shape, tokens.shape)
            self.assertEqual(torch.equal(final, outputs[-1]), fusion == 'none')
            for part in model.fusions:   # linear and norm (App. B)
                out = part(torch.randn(1, 5, part[0].in_features)).detach()
                self.assertAlmostEqual(float(out.std(-1, False).mean()), 1, places=3)
        with self.assertRaisesRegex(ValueError, 'unknown fusion'):
            HybridDETR(3, (5,), 'tiny', fusion='late')


class TestAverageAndSchedule(unittest.TestCase):
    def test_average(self):
        model, average = torch.nn.Linear(1, 1, bias=False).double(), torch.nn.Linear(1, 1, bias=False).double()
        torch.nn.init.ones_(average.weight)
        for step, wanted in enumerate(EMA_WEIGHTS, 1):
            torch.nn.init.constant_(model.weight, 1 + step)
            train.update_average(average, model, step, 0.9999, 1000)
            self.assertAlmostEqual(average.weight.item(), wanted, places=12)

    def test_buffers_are_averaged(self):
        model, average = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
        torch.nn.init.ones_(model.running_mean)
        model.num_batches_tracked += 7
        train.update_average(average, model, 1000, 0.5, 1)
        self.assertEqual((average.running_mean.tolist(), int(average.num_batches_tracked)), ([0.5, 0.5], 7))

    def test_flat_cosine(self):
        settings = dict(schedule='flat-cosine', warmup=2000 / 6000)
        for step, wanted in FLAT_COSINE.items():
            self.assertAlmostEqual(2e-4 * train.lr_factor(settings, step / 6000), wanted, delta=1e-12, msg=str(step))

    def test_step_schedule(self):
        """The last epoch before the rate falls: 11 of 12, 20 of 24 and 30 of 36 (official codes)."""
        for epochs, before in ((12, 11), (24, 20), (36, 30)):
            settings = dict(schedule='step', warmup=0.0, epochs=epochs)
            factors = [train.lr_factor(settings, (epoch + 0.5) / epochs) for epoch in range(epochs)]
            self.assertEqual(factors, [1.0] * before + [0.1] * (epochs - before))


class TestPresets(unittest.TestCase):
    def test_what_they_set(self):
        stable, deim = (train.complete({'scheme': name}) for name in ('stable', 'deim'))
        self.assertEqual([stable[name] for name in ('cls_loss', 'class_weight', 'cost', 'fusion', 'denoising')],
                         ['stable', 6, 'stable', 'dense', 100])
        self.assertEqual([deim[name] for name in ('cls_loss', 'class_weight', 'mal_gamma', 'dense_o2o', 'schedule')],
                         ['mal', 1, 1.5, True, 'flat-cosine'])
        self.assertGreater(deim['ema'], 0)
        self.assertEqual(train.row_of(stable), {'scheme': 'one2one', 'n': 50})
        self.assertEqual([train.row_of(deim)['n'], *(deim[name] for name in ('denoising', 'ema', 'warmup'))],
                         [100, 100, 0.98, 0.05])
        paper = train.complete({'scheme': 'deim', 'model': 'r50'})
        self.assertEqual((paper['ema'], paper['warmup'], paper['n']), (0.9999, 0.005, 300))
        self.assertNotIn('steps', train.complete({'epochs': 2.0}), 'of both, the one that was given')
        self.assertNotIn('epochs', train.complete({'model': 'r50', 'steps': 5}))
        self.assertEqual(train.CLASS_WEIGHTS, dict(ce=1, bce=1, focal=2, vfl=1, mal=1, stable=6))
        self.assertEqual(train.EMA, {True: dict(decay=0.98, warmup=20), False: dict(decay=0.9999, warmup=2000)})

    def test_class_weight_follows_the_loss(self):
        for given, wanted in ((dict(scheme='stable', cls_loss='focal'), 2), (dict(scheme='deim', cls_loss='ce'), 1),
                              (dict(scheme='group', cls_loss='stable'), 6), (dict(cls_loss='mal'), 1),
                              (dict(cls_loss='mal', class_weight=3.0), 3)):
            self.assertEqual(train.complete(given)['class_weight'], wanted, given)

    def test_flags_win(self):
        settings = train.complete({'scheme': 'deim', 'dense_o2o': False, 'ema': 0.0, 'cls_loss': 'vfl', 'n': 20})
        self.assertEqual([settings[name] for name in ('dense_o2o', 'ema', 'cls_loss', 'n')], [False, 0, 'vfl', 20])
        for given, message in ((dict(scheme='stable', T=3), 'only has'), (dict(f1='s3'), '--f1 s3'),
                               (dict(cls_loss='bce', mal_gamma=2.0), '--mal-gamma'), (dict(f2=2.0), '--f2 2.0'),
                               (dict(ema=1.5), '--ema'), (dict(denoising=-1), '--denoising'),
                               (dict(cls_loss='mal', mal_gamma=0.5), '--mal-gamma 0.5'),
                               (dict(cls_loss='ce', cost='stable', official_losses=True), '--official-losses')):
            with self.assertRaisesRegex(data.UserError, re.escape(message)):
                train.complete(given)
        self.assertEqual(train.complete({'cls_loss': 'ce'})['cost_class'], 1)


# --- Data -----------------------------------------------------------------------------------------------------------

def coco_folder(root: Path, ids=(1, 7, 90), mode='RGB'):
    """A COCO folder of three images of 60 x 40: two boxes, none, and one crowd, one flat and one good box."""
    images = [{'id': 10 + i, 'file_name': f'{i}.png', 'width': 60, 'height': 40} for i in range(3)]
    boxes = [(0, 0, [10, 5, 6, 18], 0), (0, 2, [30, 10, 20, 12], 0), (2, 1, [0, 0, 50, 30], 1),
             (2, 1, [5, 5, 0, 9], 0), (2, 1, [20, 8, 15, 25], 0)]
    annotations = [{'id': i + 1, 'image_id': images[m]['id'], 'category_id': ids[label], 'bbox': box,
                    'area': box[2] * box[3], 'iscrowd': crowd}
                   for i, (m, label, box, crowd) in enumerate(boxes)]
    content = {'images': images, 'annotations': annotations,
               'categories': [{'id': c, 'name': f'class{c}'} for c in ids]}
    (root / 'annotations').mkdir(parents=True)
    for split in ('train', 'val'):
        (root / f'{split}2017').mkdir()
        (root / 'annotations' / f'instances_{split}2017.json').write_text(json.dumps(content))
        for image in images:
            pixels = np.random.RandomState(image['id']).randint(0, 255, (40, 60, 3)).astype(np.uint8)
            Image.fromarray(pixels).convert(mode).save(root / f'{split}2017' / image['file_name'])
    return root


SHAPES_CHECKS = [3338049857, 881657666, 2561148459]   # of (seed, index, size) = (0, 0, 128), (3, 77, 128), (0, 5, 200)


class TestData(unittest.TestCase):
    def setUp(self):
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def test_shapes_are_the_same_everywhere(self):
        checks = [zlib.crc32(image.tobytes() + boxes.astype(np.int64).tobytes() + labels.astype(np.int64).tobytes())
                  for image, boxes, labels in (data.draw_shapes(0, 0), data.draw_shapes(3, 77),
                                               data.draw_shapes(0, 5, 200))]
        self.assertEqual(checks, SHAPES_CHECKS, 'other bits than on the machine this was written on')

    def test_shapes_touch_their_boxes(self):
        for label, w, h in itertools.product(range(len(data.SHAPES)), range(5, 70, 3), range(5, 70, 4)):
            mask = data.shape_mask(label, w, h)
            self.assertTrue(mask[0].any() and mask[-1].any() and mask[:, 0].any() and mask[:, -1].any(),
                            (data.SHAPES[label], w, h))
        counts = []
        for index in range(200):
            _, boxes, labels = data.draw_shapes(1, index)
            counts.append(len(boxes))
            self.assertTrue((boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= 128).all()
                            and (boxes[:, 2:] > boxes[:, :2]).all())
        self.assertEqual((min(counts), max(counts)), (1, data.ShapesDataset().most_boxes()))

    def test_ids_there_and_back(self):
        with quiet() as printed:
            dataset = data.CocoFolder(coco_folder(self.root), 'train', 40)
        self.assertEqual(dataset.categories.ids, [1, 7, 90])
        self.assertEqual([dataset[0, i].labels.tolist() for i in range(3)], [[0, 2], [], [1]])
        self.assertIn('2 of 5 boxes', printed.getvalue())
        self.assertIn('2.png', printed.getvalue())
        self.assertEqual([a['category_id'] for a in dataset.coco_json()['annotations']], [1, 90, 7, 7, 7])
        for whole in (dataset, data.ShapesDataset(length=4, size=32)):
            content, first = whole.coco_json(), data.FirstImages(whole, 2).coco_json()
            ids = [image['id'] for image in content['images'][:2]]
            self.assertEqual(first, {**content, 'images': content['images'][:2], 'annotations': [
                a for a in content['annotations'] if a['image_id'] in ids]})

    def test_tall_boxes_stay_tall(self):
        with quiet():
            plain, augmented = (data.CocoFolder(coco_folder(self.root / str(a)), 'train', 40, augment=a)
                                for a in (False, True))
        self.assertTrue(torch.allclose(plain[0, 0].boxes[0], torch.tensor([13 / 60, 14 / 40, 6 / 60, 18 / 40]),
                                       atol=1e-6))
        for epoch in range(20):
            sample = augmented[epoch, 0]
            self.assertTrue(torch.equal(sample.image, augmented[epoch, 0].image),
                            'augmentation must follow from (seed, epoch, index)')
            for box, label in zip(sample.boxes, sample.labels):
                height, width = sample.image.shape[1:]
                uncut = (box[:2] - box[2:] / 2 > 0.01).all() and (box[:2] + box[2:] / 2 < 0.99).all()
                if label == 0 and uncut:
                    self.assertGreater(float(box[3] * height), 2 * float(box[2] * width))

    def test_16_bits(self):
        pixels = np.linspace(0, 4000, 2400).reshape(40, 60).astype(np.uint16)
        rgb = np.asarray(data.as_rgb(Image.fromarray(pixels)))
        self.assertEqual((rgb.min(), rgb.max()), (0, 255))
        self.assertLess((rgb == 255).mean(), 0.02, 'nothing may be cut off')

    def test_boxes_at_the_border_are_kept(self):
        box = data.tv_tensors.BoundingBoxes([[0, 0, 200, 150]], format='XYXY', canvas_size=(150, 200))
        for seed in range(40):
            torch.manual_seed(seed)
            target = {'boxes': box.to(torch.float32), 'labels': torch.tensor([0])}
            _, target = data.train_transforms(192)(Image.new('RGB', (200, 150)), target)
            self.assertEqual(len(target['boxes']), 1, f'seed {seed}: a box as large as the image got lost')

    def test_odd_modes(self):
        for mode in ('L', '1', 'P', 'RGBA', 'LA'):
            with quiet():
                dataset = data.CocoFolder(coco_folder(self.root / mode, mode=mode), 'val', 40)
            self.assertEqual(dataset[0, 0].image.shape, (3, 40, 60))

    def test_padding_mask(self):
        samples = [data.Sample(torch.ones(3, h, w), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), 0, (h, w),
                               '') for h, w in ((4, 9), (6, 5))]
        batch = data.collate(samples)
        self.assertEqual(batch.images.shape, (2, 3, 6, 9))
        self.assertTrue(torch.equal(batch.images[:, 0] == 0, batch.padding_mask))
        self.assertEqual((~batch.padding_mask).sum((1, 2)).tolist(), [36, 30])

    def test_order_does_not_depend_on_the_process_or_the_start(self):
        whole = [key for batch in data.train_batches(10, 4, 8, seed=1) for key in batch]
        self.assertEqual(sorted(index for _, index in whole[:10]), list(range(10)),
                         'an epoch must show every image once')
        self.assertNotEqual(whole[:10], [(0, i) for _, i in whole[10:20]])
        self.assertEqual([key for batch in data.train_batches(10, 4, 8, seed=1, start=3) for key in batch], whole[12:])
        halves = [list(data.train_batches(10, 2, 8, seed=1, rank=rank, world=2)) for rank in (0, 1)]
        self.assertEqual([key for pair in zip(*halves) for batch in pair for key in batch], whole)


class Painted(torch.utils.data.Dataset):
    """Image i is black and 40 x 40 or 40 x 60, with one square of colour i where `boxes`; items are unchanged."""

    def __init__(self, n=6, side=1, boxes=True):
        self.n, self.side, self.boxes = n, side, boxes
        self.categories = data.Categories(list(range(n)), [f'class{i}' for i in range(n)])

    def __len__(self):
        return self.n

    def colour(self, index):
        return [50 + 30 * index, 250 - 30 * index, 200]

    def load(self, index):
        pixels = np.zeros((40 * self.side, (40 + 20 * (index % 2)) * self.side, 3), np.uint8)
        x0, y0, x1, y1 = (v * self.side for v in (6, 8, 26, 28))
        pixels[y0:y1, x0:x1] = self.colour(index) if self.boxes else 0
        boxes, labels = np.array([[x0, y0, x1, y1]]), np.array([index])
        target = data.pixel_target(boxes[:self.boxes], labels[:self.boxes], pixels.shape[:2])
        return Image.fromarray(pixels), target, 100 + index, f'painted{index}'

    def __getitem__(self, key):
        image, target, image_id, name = self.load(key[1])
        return data.Sample(*data.transformed(v2.Identity(), 0, image, target), image_id, image.size[::-1], name)


def is_mosaic(sample):
    return sample.name.startswith('mosaic') and 'mixed' not in sample.name


class TestDenseOneToOne(unittest.TestCase):
    def same(self, a, b):
        self.assertTrue(all(torch.equal(x, y) for x, y in zip(a[:3], b[:3])))
        self.assertEqual(a[3:], b[3:])

    def test_boxes_lie_on_what_they_name(self):
        dataset = Painted(side=6)
        dense, seen = data.DenseOneToOne(dataset, 480), 0   # from 480 on colours stay as they are
        std, mean = (torch.tensor(x).view(3, 1, 1) for x in (data.IMAGENET_STD, data.IMAGENET_MEAN))
        for epoch in range(16):
            sample = dense[epoch, epoch % 6, True]
            if not is_mosaic(sample):
                continue
            pixels = ((sample.image * std + mean) * 255).round()
            h, w = pixels.shape[1:]
            self.assertEqual(min(h, w), 480)
            outside = pixels.amax(0) > 10
            for box, label in zip(sample.boxes, sample.labels):
                x0, y0, x1, y1 = (box_convert(box, 'cxcywh', 'xyxy') * torch.tensor([w, h, w, h])).tolist()
                self.assertTrue(-1e-3 <= x0 < x1 <= w + 1e-3 and -1e-3 <= y0 < y1 <= h + 1e-3)
                outside[max(0, int(y0) - 1):int(y1) + 2, max(0, int(x0) - 1):int(x1) + 2] = False
                if min(x0, y0, w - x1, h - y1) > 1:   # whole
                    seen += 1
                    middle = pixels[:, int(y0 + y1) // 2, int(x0 + x1) // 2].tolist()
                    self.assertEqual(middle, dataset.colour(int(label)), sample.name)
                    object = (pixels - torch.tensor(dataset.colour(int(label))).view(3, 1, 1)).abs().amax(0) < 3
                    ys, xs = object.nonzero().T
                    for found, stated in zip((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), (x0, y0, x1, y1)):
                        self.assertLess(abs(float(found) - stated), 2.5)
            self.assertFalse(outside.any(), f'{sample.name}: an object without a box')
        self.assertGreater(seen, 5)

    def test_an_item_follows_from_seed_epoch_and_index(self):
        shapes = data.ShapesDataset(length=20, size=64)
        dense, other = (data.DenseOneToOne(shapes, 64, seed=seed) for seed in (0, 1))
        torch.manual_seed(0)
        state = torch.get_rng_state()
        kinds = set()
        for index in range(20):
            sample = dense[1, index, True]
            torch.rand(3)
            self.same(sample, dense[1, index, True])
            self.same(dense[1, index, False], shapes[1, index])
            self.assertEqual((sample.image_id, sample.size, sample.image.shape), (index, (64, 64), (3, 64, 64)))
            kinds.add((sample.name.count('mosaic'), sample.name.count('mixed')))
        self.assertEqual(kinds, {(0, 0), (1, 0), (0, 1), (1, 1), (2, 1)})
        torch.set_rng_state(state)
        with unittest.mock.patch('torch.manual_seed') as seed:   # which would seed the GPUs, too
            [dense[1, index, True] for index in range(5)]
        seed.assert_not_called()
        self.assertTrue(torch.equal(torch.get_rng_state(), state), "the process's own generator must be left alone")
        self.assertFalse(all(dense[1, i, True].name == other[1, i, True].name for i in range(5)))
        self.assertFalse(all(dense[1, i, True].name == dense[2, i, True].name for i in range(5)))

    def test_four_different_images(self):
        dense = data.DenseOneToOne(Painted(4), 40)
        for epoch in range(12):
            sample = dense[epoch, epoch % 4, True]
            if is_mosaic(sample):
                names = sample.name.removeprefix('mosaic of ').split(', ')
                self.assertEqual((names[0], sorted(names)),
                                 (f'painted{epoch % 4}', ['painted0', 'painted1', 'painted2', 'painted3']))
                self.assertEqual((sample.image_id, sample.size), (100 + epoch % 4, (40, 40 + 20 * (epoch % 2))))
        rng = np.random.RandomState(0)
        drawn = [sorted(dense.others(3, 2, rng)) for _ in range(5)] + [dense.others(1, 2, rng) for _ in range(40)]
        self.assertEqual((drawn[0], {i for one in drawn for i in one}), ([0, 1, 3], {0, 1, 3}))
        with self.assertRaisesRegex(data.UserError, 'a mosaic needs four images, and the training set has 3'):
            data.DenseOneToOne(Painted(3), 40)

    def test_mixup_of_different_sizes(self):
        def sample(h, w, value, box):
            return data.Sample(torch.full((3, h, w), float(value)), torch.tensor([value]), torch.tensor([box]), value,
                               (h, w), f'image{value}')
        mixed = data.mixup(sample(4, 8, 1, [0.5, 0.5, 0.5, 1]), sample(6, 4, 2, [0.5, 0.25, 1, 0.5]), 0.75)
        wanted = torch.zeros(6, 8)
        wanted[:4] += 0.75
        wanted[:, :4] += 0.5
        self.assertTrue(torch.equal(mixed.image, wanted.expand(3, -1, -1)))
        pixels = mixed.boxes * torch.tensor([8, 6, 8, 6])
        self.assertTrue(torch.allclose(pixels, torch.tensor([[4, 2, 4, 4], [2, 1.5, 4, 3]])), pixels)
        self.assertEqual((mixed.labels.tolist(), mixed.image_id, mixed.size), ([1, 2], 1, (4, 8)))
        self.assertEqual(mixed.name, 'image1 mixed with image2')

    def test_no_boxes(self):
        dense = data.DenseOneToOne(Painted(boxes=False), 40)
        samples = [dense[0, index, True] for index in range(6)] + [dense[1, index, True] for index in range(6)]
        self.assertTrue(any('mosaic' in s.name for s in samples) and any('mixed' in s.name for s in samples))
        for sample in samples:
            self.assertEqual((sample.boxes.shape, sample.labels.shape, sample.labels.dtype),
                             ((0, 4), (0,), torch.int64))

    def test_vertical_flip(self):
        pixels = np.zeros((40, 40, 3), np.uint8)
        pixels[:20] = 255
        target = data.pixel_target(np.array([[0, 0, 40, 20]]), np.array([0]), (40, 40))
        for vertical_flip, wanted in ((False, {False}), (True, {False, True})):
            dense, flipped = data.DenseOneToOne(Painted(), 40, vertical_flip), set()
            for seed in range(24):
                image, _, boxes = data.transformed(dense.transforms, seed, Image.fromarray(pixels), target)
                upside_down = bool(image[:, 20:].mean() > image[:, :20].mean())
                self.assertEqual(upside_down, bool(boxes[0, 1] > 0.5))
                flipped.add(upside_down)
            self.assertEqual(flipped, wanted)

    def test_size(self):
        class TallAndWide(Painted):
            def load(self, index):
                image, _, *rest = super().load(index)
                image = image.resize((30, 60) if index % 2 else (60, 30))
                target = data.pixel_target(np.array([[0, 0, 2, 2], [5, 5, 20, 20]]), np.array([0, 1]), image.size[::-1])
                return image, target, *rest
        dense, counts = data.DenseOneToOne(TallAndWide(), 48), set()
        with unittest.mock.patch.object(data, 'mosaic', wraps=data.mosaic) as spy:
            for epoch in range(24):
                sample = dense[epoch, epoch % 6, True]
                if is_mosaic(sample):
                    height, width = sample.image.shape[1:]
                    self.assertEqual(min(height, width), 48)
                    pixels = box_convert(sample.boxes, 'cxcywh', 'xyxy') * torch.tensor([width, height] * 2)
                    self.assertGreaterEqual(float((pixels[:, 2:] - pixels[:, :2]).min()), 0.99, 'below a pixel')
                    counts.add(len(sample.boxes))
        self.assertEqual({call.args[2] for call in spy.call_args_list}, {24}, 'tiles are half as large')
        self.assertLess(min(counts), 8, 'no small box was ever removed')

    def test_schedule(self):
        whole = list(data.train_batches(10, 4, 12, seed=1, dense_part=(0.25, 0.75)))
        self.assertEqual([{dense for _, _, dense in batch} for batch in whole],
                         [{False}] * 3 + [{True}] * 6 + [{False}] * 3)
        self.assertEqual([[key[:2] for key in batch] for batch in whole], list(data.train_batches(10, 4, 12, seed=1)))
        self.assertEqual(list(data.train_batches(10, 4, 12, seed=1, start=5, dense_part=(0.25, 0.75))), whole[5:])
        halves = [list(data.train_batches(10, 2, 12, seed=1, rank=r, world=2, dense_part=(0.25, 0.75))) for r in (0, 1)]
        self.assertEqual([a + b for a, b in zip(*halves)], whole)
        self.assertEqual(sum(batch[0][2] for batch in data.train_batches(10, 1, 60, dense_part=data.DENSE)), 30)

    def test_resumed_and_parallel_batches_are_equal(self):
        dense = data.DenseOneToOne(data.ShapesDataset(length=9, size=32), 32)
        whole, resumed, parallel = (list(data.train_loader(dense, 3, 4, workers, start=start, dense_part=(0.25, 1)))
                                    for workers, start in ((0, 0), (0, 2), (2, 0)))
        for a, b in [*zip(whole[2:], resumed, strict=True), *zip(whole, parallel, strict=True)]:
            self.assertTrue(torch.equal(a.images, b.images))
            self.assertTrue(all(torch.equal(x, y) for x, y in zip(a.gt_boxes, b.gt_boxes)))
            self.assertEqual(a[4:], b[4:])
        self.assertFalse(any('m' in name.split('/')[0] for name in whole[0].names), 'not before a quarter')
        self.assertTrue(any('mosaic' in name for batch in whole[1:] for name in batch.names))

    def test_a_folder(self):
        with tempfile.TemporaryDirectory() as root, quiet():
            dataset = data.CocoFolder(coco_folder(Path(root)), 'train', 40, augment=True)
            dataset.images = dataset.images + dataset.images[:1]
            dataset.first_row = [*dataset.first_row, dataset.first_row[-1]]
            dense = data.DenseOneToOne(dataset, 40, vertical_flip=True)
            samples = [dense[epoch, index, True] for epoch in range(3) for index in range(4)]
        self.assertEqual(dense.categories.ids, [1, 7, 90])
        self.assertTrue(any('mosaic' in s.name for s in samples) and any('mixed' in s.name for s in samples))
        self.assertTrue(all(s.size == (40, 60) and s.boxes.min() >= 0 and s.boxes.max() <= 1 for s in samples if
                            len(s.boxes)))
        data.collate(samples)


@unittest.skipUnless(GOLDEN.exists(), f'{GOLDEN} is not there')
class TestDenseGolden(unittest.TestCase):
    """Mosaic and mixup of ../shared/golden."""

    @classmethod
    def setUpClass(cls):
        cls.arrays = np.load(GOLDEN / 'losses_and_costs.npz')

    def test_mosaic(self):
        def golden(name):
            return self.arrays[f'k.mosaic.{name}']
        images, targets, last = [], [], 0
        for i, ((h, w), colour, count) in enumerate(zip(golden('in_hw'), golden('in_colour'), golden('in_box_counts'))):
            images.append(Image.new('RGB', (w, h), tuple(colour.tolist())))
            targets.append(data.pixel_target(golden('in_boxes_xyxy')[last:last + count], np.full(count, i + 1), (h, w)))
            last += count
        image, target = data.mosaic(images, targets, int(golden('tile_size')))
        boxes = target['boxes']
        self.assertEqual(image.size, tuple(golden('canvas_wh')))
        for tile, (h, w) in zip(images, golden('resized_hw').tolist()):
            self.assertEqual(v2.Resize(int(golden('tile_size')))(tile).size, (w, h))
        self.assertTrue(np.array_equal(np.asarray(image), golden('pixels_before_affine')))
        self.assertEqual(target['labels'].tolist(), golden('labels').tolist())
        np.testing.assert_allclose(boxes, golden('boxes_before_affine'), rtol=0, atol=1e-5)
        angle, x, y, scale = golden('affine_angle_tx_ty_scale').tolist()
        boxes = v2.functional.affine(boxes, angle, [x, y], scale, [0, 0])
        np.testing.assert_allclose(v2.functional.clamp_bounding_boxes(boxes), golden('boxes_after_affine'), rtol=0,
                                   atol=1e-4)
        ranges = golden('affine_sampled_min_max_angle_tx_ty_scale_640')   # of a square of 640 pixels
        affine = data.DenseOneToOne(data.ShapesDataset(), 640).transforms.transforms[0]
        wanted = [affine.degrees, *((-t * 640, t * 640) for t in affine.translate), affine.scale]
        np.testing.assert_allclose(wanted, ranges, rtol=0, atol=0.02)

    def test_mixup(self):
        def golden(name):
            return torch.from_numpy(self.arrays[f'k.mixup.{name}'])
        counts = golden('in_counts').tolist()
        samples = [data.Sample(image, labels, boxes, 0, (4, 5), '') for image, labels, boxes in
                   zip(golden('in_images'), golden('in_labels').split(counts), golden('in_boxes').split(counts))]
        mixed = [data.mixup(samples[i], samples[i - 1], float(golden('beta'))) for i in range(3)]
        self.assertTrue(torch.allclose(torch.stack([s.image for s in mixed]), golden('images'), rtol=0, atol=1e-6))
        self.assertTrue(torch.equal(torch.cat([s.boxes for s in mixed]), golden('boxes')))
        self.assertTrue(torch.equal(torch.cat([s.labels for s in mixed]), golden('labels')))
        self.assertEqual([len(s.boxes) for s in mixed], golden('counts').tolist())
        # An epoch of one image, from epoch 4 of 58 to 29.
        batches = [batch[0][2] for batch in data.train_batches(1, 1, 58, dense_part=(4 / 58, 29 / 58))]
        self.assertEqual([int(batches[epoch]) for epoch in (0, 3, 4, 28, 29, 40)],
                         golden('active_at_epochs_0_3_4_28_29_40').tolist())


# --- Bad input ------------------------------------------------------------------------------------------------------

# What is wrong with an annotation file -> what is done to the good one (`coco_folder`), and the line it must give.
BAD_ANNOTATIONS = {
    'no images': (lambda c: c.update(images=[]), 'no list of images'),
    'images missing': (lambda c: c.pop('images'), 'no list of images'),
    'no annotations': (lambda c: c.update(annotations=[]), 'no list of annotations'),
    'categories missing': (lambda c: c.pop('categories'), 'no list of categories'),
    'an image is a string': (lambda c: c['images'].insert(0, 'x'), 'entry 0 of images is no object'),
    'image without id': (lambda c: c['images'][1].pop('id'), 'entry 1 of images has the id None'),
    'image id twice': (lambda c: c['images'][1].update(id=10), 'the id 10 stands for two images'),
    'image without name': (lambda c: c['images'][0].pop('file_name'), 'entry 0 of images has no file_name'),
    'name leaves the folder': (lambda c: c['images'][0].update(file_name='../x.png'), 'outside the image folder'),
    'absolute name': (lambda c: c['images'][0].update(file_name='/etc/x.png'), 'outside the image folder'),
    'missing image': (lambda c: c['images'][0].update(file_name='none.png'), "names the image 'none.png'"),
    'no height': (lambda c: c['images'][2].pop('height'), r"2\.png', has the width and height \(60, None\)"),
    'height 0': (lambda c: c['images'][2].update(height=0), 'must be whole numbers above 0'),
    'category id is a string': (lambda c: c['categories'][0].update(id='1'), "has the id '1'"),
    'category id twice': (lambda c: c['categories'][0].update(id=7), 'the id 7 stands for two categories'),
    'category without name': (lambda c: c['categories'][2].pop('name'), 'entry 2 of categories has no name'),
    'unknown image': (lambda c: c['annotations'][0].update(image_id=99), r'id 1\) has the image_id 99'),
    'unknown category': (lambda c: c['annotations'][1].update(category_id=91), r'id 2\) has the category_id 91'),
    'no box': (lambda c: c['annotations'][0].pop('bbox'), 'has the bbox None'),
    'box of three': (lambda c: c['annotations'][0].update(bbox=[1, 2, 3]), r'has the bbox \[1, 2, 3\]'),
    'id above 2^53': (lambda c: [c['images'][0].update(id=10 ** 18), c['annotations'][0].update(image_id=10 ** 18)],
                      'has the id 1000000000000000000, no whole number below 2.53'),
    'number of 400 digits': (lambda c: c['annotations'][0].update(bbox=[1, 2, 10 ** 400, 3]), 'must be four numbers'),
    'NaN in a box': (lambda c: c['annotations'][0].update(bbox=[1, 2, math.nan, 4]), 'must be four numbers'),
    'text in a box': (lambda c: c['annotations'][0].update(bbox=[1, '2', 3, 4]), 'must be four numbers'),
    'iscrowd 2': (lambda c: c['annotations'][0].update(iscrowd=2), 'has iscrowd 2'),
    'corners instead of sizes': (lambda c: [a.update(bbox=[30, 25, 55, 38]) for a in c['annotations']],
                                 'are they x1, y1, x2, y2'),
    'only crowds': (lambda c: [a.update(iscrowd=1) for a in c['annotations']], 'has no box with an area')}
# Handled, and said: how many boxes of five do not train.
HANDLED_ANNOTATIONS = {
    'negative size': (lambda c: c['annotations'][0].update(bbox=[20, 20, -5, 8]), 3),
    'partly outside': (lambda c: c['annotations'][0].update(bbox=[50, 30, 30, 30]), 2),
    'outside': (lambda c: c['annotations'][0].update(bbox=[90, 90, 10, 10]), 3),
    'no area, no iscrowd': (lambda c: [a.pop(key) for a in c['annotations'] for key in ('area', 'iscrowd')], 1)}


class TestBadInput(unittest.TestCase):
    def setUp(self):
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.file = coco_folder(self.root) / 'annotations' / 'instances_train2017.json'
        self.good = self.file.read_text()

    def open(self, change=lambda content: None):
        content = json.loads(self.good)
        change(content)
        self.file.write_text(json.dumps(content))
        with quiet() as printed:
            dataset = data.CocoFolder(str(self.root), 'train', 40)
            samples = [dataset[0, i] for i in range(len(dataset))]
        return dataset, samples, printed.getvalue()

    def test_annotations_that_make_no_sense(self):
        for name, (change, message) in BAD_ANNOTATIONS.items():
            with self.assertRaisesRegex(data.UserError, message, msg=name) as caught:
                self.open(change)
            self.assertNotIn('\n', str(caught.exception), name)
            self.assertIn(str(self.file), str(caught.exception), name)
        for text, message in (('', 'no valid JSON'), ('{', 'no valid JSON'), ('[' * 100_000, 'no valid JSON'),
                              ('\xff', 'no valid JSON'), (f'[{self.good}]', 'is not the object')):
            self.file.write_bytes(text.encode('latin-1'))
            with self.assertRaisesRegex(data.UserError, message), quiet():
                data.CocoFolder(str(self.root), 'train', 40)

    def test_annotations_that_are_handled(self):
        for name, (change, dropped) in HANDLED_ANNOTATIONS.items():
            dataset, samples, printed = self.open(change)
            self.assertIn(f'{dropped} of 5 boxes', printed, name)
            self.assertEqual(sum(len(sample.boxes) for sample in samples), 5 - dropped, name)
            for sample in samples:
                corners = box_convert(sample.boxes, 'cxcywh', 'xyxy')
                inside = bool((corners >= -1e-6).all() and (corners <= 1 + 1e-6).all())
                self.assertTrue(inside, f'{name}: cut at the border')

    def test_mutated_annotation_files(self):
        """2000 damaged annotation files: each gives a data set or one line."""
        rng = np.random.RandomState(0)
        junk = [None, True, -1, 0, 10 ** 30, 1.5, math.nan, math.inf, '', 'x', '../x', [], {}, [1], {'id': 1}]
        refused = 0
        for i in range(2000):
            content = json.loads(self.good)
            for _ in range(rng.randint(1, 4)):
                place, where = content, rng.choice(['images', 'annotations', 'categories'])
                if rng.rand() < 0.95 and content.get(where):
                    place = content[where]
                    if place and rng.rand() < 0.9 and isinstance(place, list):
                        place = place[rng.randint(len(place))]
                keys = list(place) if isinstance(place, dict) else list(range(len(place))) if isinstance(
                    place, list) else []
                if keys:
                    key = keys[rng.randint(len(keys))]
                    if rng.rand() < 0.2:
                        del place[key]
                    else:
                        place[key] = copy.deepcopy(junk[rng.randint(len(junk))])
            text = json.dumps(content)
            self.file.write_text(text[:rng.randint(len(text))] if rng.rand() < 0.1 else text)
            with quiet():
                try:
                    dataset = data.CocoFolder(str(self.root), 'train', 40)
                    dataset[0, 0], dataset.coco_json()
                except data.UserError as error:
                    self.assertNotIn('\n', str(error))
                    refused += 1
        self.assertTrue(500 < refused < 2000, refused)

    def test_broken_images(self):
        path = self.root / 'train2017' / '0.png'
        whole = path.read_bytes()
        for content in (b'', whole[:30], whole[:len(whole) // 2], b'no image', b'\x89PNG\r\n\x1a\n' + bytes(50)):
            path.write_bytes(content)
            with self.assertRaisesRegex(data.UserError, r'cannot read the image .*0\.png') as caught:
                self.open()
            self.assertNotIn('\n', str(caught.exception))

    def test_images_of_all_kinds(self):
        path = self.root / 'train2017' / '0.png'
        for mode in ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'I;16', 'I', 'F', 'HSV', 'LAB'):
            image = Image.new('L', (60, 40), 128).convert('I') if mode == 'I;16' else Image.new('RGB', (60, 40), 'red')
            try:
                image = Image.fromarray(np.full((40, 60), 3000, np.uint16)) if mode == 'I;16' else image.convert(mode)
                image.save(path, format='TIFF')
            except (OSError, ValueError):   # Pillow has no such conversion or format
                continue
            _, samples, _ = self.open()
            self.assertEqual(samples[0].image.shape, (3, 40, 60), mode)

    def test_images_turned_by_their_camera(self):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new('RGB', (40, 60), 'red').save(self.root / 'train2017' / '0.png', exif=exif)   # annotated as 60 x 40
        _, samples, _ = self.open()
        self.assertEqual(samples[0].image.shape, (3, 40, 60))
        Image.new('RGB', (40, 60), 'red').save(self.root / 'train2017' / '0.png')
        with self.assertRaisesRegex(data.UserError, 'has 40 x 60 pixels, its annotation file says 60 x 40'):
            self.open()

    def test_odd_sizes(self):
        for width, height in ((1, 1), (200, 11), (8, 150)):
            Image.new('RGB', (width, height)).save(self.root / 'train2017' / '1.png')
            _, samples, _ = self.open(lambda c: c['images'][1].update(width=width, height=height))
            self.assertGreaterEqual(min(samples[1].image.shape[1:]), 1)
        Image.new('RGB', (1000, 3)).save(self.root / 'train2017' / '1.png')
        with self.assertRaisesRegex(data.UserError, r"1\.png' has 1000 x 3 pixels: too long"):
            self.open(lambda c: c['images'][1].update(width=1000, height=3))

    def test_damaged_checkpoints(self):
        """Cut off, with random bytes, without an entry, with another: each gives a detector or one line."""
        with unittest.mock.patch.dict(train.TINY_MODEL, width=32, heads=2, encoder_layers=1), quiet():
            settings = train.complete({'scheme': 'one2one', 'ffn': 8, 'decoder_layers': 1})
            content = {'model': train.build_model(settings, 3).state_dict(), 'settings': settings, 'step': 1,
                       'categories': {'ids': [1, 2, 3], 'names': ['a', 'b', 'c']},
                       'architecture': train.architecture(settings, 3)}
        path, rng, refused = self.root / 'checkpoint.pt', np.random.RandomState(0), 0
        torch.save(content, path)
        evaluation.load_detector(str(path))
        whole = path.read_bytes()
        names = list(content['model'])
        for i in range(120):
            broken = {**content, 'model': dict(content['model']), 'architecture': dict(content['architecture'])}
            if i < 40:
                bytes_ = bytearray(whole if i % 2 else whole[:rng.randint(len(whole))])
                for _ in range(rng.randint(1, 30)):   # near the end lies the list of what is where
                    bytes_[-rng.randint(1, min(len(bytes_), 4000))] = rng.randint(256)
                path.write_bytes(bytes_)
            else:
                name, junk = names[rng.randint(len(names))], [None, 3, 'x', torch.zeros(2), [], {}][rng.randint(6)]
                kind = rng.randint(4)
                if kind == 0:
                    del broken['model'][name]
                elif kind == 1:
                    broken['model'][name] = junk
                elif kind == 2:
                    broken[list(broken)[rng.randint(5)]] = junk
                else:
                    broken['architecture'][list(broken['architecture'])[rng.randint(12)]] = junk
                torch.save(broken, path)
            try:
                evaluation.load_detector(str(path))
            except data.UserError as error:
                refused += 1
                self.assertNotIn('\n', str(error))
        self.assertGreater(refused, 60)

    def test_code_in_a_checkpoint_does_not_run(self):
        class Code:
            def __reduce__(self):
                return exec, (f'open({str(self_root / "was here")!r}, "w")',)
        self_root = self.root
        for write in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))):
            write({'model': {}, 'x': Code()}, self.root / 'code.pt')
            with self.assertRaisesRegex(data.UserError, 'no readable checkpoint') as caught, \
                    warnings.catch_warnings(record=True) as warned:
                evaluation.read_checkpoint(str(self.root / 'code.pt'))
            self.assertNotIn('weights_only', str(caught.exception), 'torch tells how to run it: that is no advice')
            self.assertEqual([str(w.message) for w in warned], [], 'one line, and no warning')
        self.assertFalse((self.root / 'was here').exists())


# --- Measures ---------------------------------------------------------------------------------------------------------

def coco_json(boxes, images=1, **changes):
    """`images` images and these boxes (image, category, x, y, w, h); changes: of the last annotation."""
    annotations = [{'id': i + 1, 'image_id': image, 'category_id': category, 'bbox': list(xywh), 'iscrowd': 0,
                    'area': xywh[2] * xywh[3]} for i, (image, category, *xywh) in enumerate(boxes)]
    annotations[-1].update(changes)
    return {'images': [{'id': i, 'height': 200, 'width': 200} for i in range(images)], 'annotations': annotations,
            'categories': [{'id': i, 'name': str(i)} for i in (1, 2, 3)]}


class FixedImages(data.Dataset):
    """Images of noise with the same two objects, one at the left and one at the right."""
    categories = data.Categories([1, 2, 3], ['one', 'two', 'three'])
    boxes = torch.tensor([[0.2, 0.5, 0.2, 0.2], [0.8, 0.5, 0.2, 0.2]])

    def __init__(self, length=3, objects=2):
        self.length, self.objects = length, objects

    def __len__(self):
        return self.length

    def __getitem__(self, key):
        image = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(key[1]))
        labels = torch.zeros(self.objects, dtype=torch.int64)
        return data.Sample(image, labels, self.boxes[:self.objects], key[1], (64, 64), f'image {key[1]}')


class FixedModel(torch.nn.Module):
    """Answers with the same boxes (L,n,4) and, at the tokens `order`, proposals; asserts that it is in eval mode."""

    def __init__(self, proposals, order, boxes):
        super().__init__()
        self.proposals, self.order, self.boxes = proposals, order, boxes
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images, padding_mask, group, noised=None):
        assert not self.training and group == 0 and noised is None
        logits, tokens = torch.full((9, 1), -5.0), torch.full((9, 4), 0.1)
        logits[self.order, 0], tokens[self.order] = -torch.arange(4.0), self.proposals   # rank i is token order[i]
        L, n, _ = self.boxes.shape
        B = len(images)
        return hybrid_detr.Outputs(torch.zeros(L, B, n, 1), self.boxes[:, None].expand(-1, B, -1, -1),
                                   logits.expand(1, B, -1, -1), tokens.expand(1, B, -1, -1))


class TestMeasures(unittest.TestCase):
    def errors(self, content, rows):
        metrics, _ = evaluation.average_precision(content, np.array(rows, dtype=float).reshape(-1, 7))
        return [round(metrics[name], 6) for name in ('oLRP', 'oLRP_Loc', 'oLRP_FP', 'oLRP_FN')]

    def test_olrp_by_hand(self):
        truth = coco_json([(0, 1, 10, 10, 100, 50)])
        perfect, shifted = [0, 10, 10, 100, 50, 0.8, 1], [0, 30, 10, 100, 50, 0.8, 1]   # 80 / 120 in common
        self.assertEqual(self.errors(truth, [perfect]), [0, 0, 0, 0])
        self.assertEqual(self.errors(truth, [shifted]), [round(2 / 3, 6), round(1 / 3, 6), 0, 0])
        false = [0, 10, 120, 100, 50, 0.7, 1]
        self.assertEqual(self.errors(truth, [perfect, false]), [0, 0, 0, 0], 'a threshold of 0.8 cuts it off')
        self.assertEqual(self.errors(truth, [perfect, false[:5] + [0.8, 1]]), [0.5, 0, 0.5, 0], 'equal scores stay')
        self.assertEqual(self.errors(truth, [perfect, false[:5] + [0.9, 1]]), [0.5, 0, 0.5, 0])
        self.assertEqual(self.errors(truth, []), [1, -1, -1, 1], 'nothing has no precision')
        self.assertEqual(self.errors(truth, [false]), [1, -1, -1, 1])
        self.assertEqual(self.errors(truth, [[0, 50, 10, 100, 50, 0.8, 1]]), [1, -1, -1, 1], 'an IoU of 60 / 140')

    def test_olrp_of_several_classes_and_images(self):
        truth = coco_json([(1, 1, 100, 100, 40, 40), (0, 1, 10, 10, 100, 50), (0, 2, 10, 10, 100, 50)], images=2)
        rows = [[0, 30, 10, 100, 50, 0.8, 1], [1, 100, 100, 40, 40, 0.9, 1], [1, 10, 10, 9, 9, 0.9, 3]]
        # Class 1: errors 0 and 1/3. Class 2 is not found, class 3 has no ground truth and does not count.
        self.assertEqual(self.errors(truth, rows), [round((1 / 3 + 1) / 2, 6), round(1 / 6, 6), 0, 0.5])

    def test_olrp_ignores_crowds(self):
        truth = coco_json([(0, 1, 10, 10, 100, 50), (0, 1, 0, 100, 200, 100)], iscrowd=1)
        truth['annotations'].reverse()   # COCOeval sorts ignored objects last
        rows = [[0, 10, 120, 20, 20, 0.9, 1], [0, 60, 120, 20, 20, 0.9, 1], [0, 30, 10, 100, 50, 0.8, 1]]
        self.assertEqual(self.errors(truth, rows), [round(2 / 3, 6), round(1 / 3, 6), 0, 0])
        truth['annotations'] = truth['annotations'][:1]   # a class with nothing but a crowd
        self.assertEqual(self.errors(truth, rows), [-1] * 4)

    def test_olrp_equals_a_search_over_all_thresholds(self):
        """Against other code: every threshold evaluated anew, with the detections below it left out."""
        dataset, rng = data.ShapesDataset('val', 6, 64, 0), np.random.default_rng(0)
        truth = dataset.coco_json()
        rows = [[a['image_id'], *(np.array(a['bbox']) + rng.normal(0, 1.5, 4)).clip(0.5), score.round(1),
                 a['category_id']] for a in truth['annotations'] for score in rng.uniform(0, 1, 2)]
        rows, best = np.array(rows), {}
        for s in np.unique(rows[:, 5]):
            kept = rows[rows[:, 5] >= s]
            for category in dataset.categories.ids:
                of_class = {**truth, 'annotations': [a for a in truth['annotations'] if a['category_id'] == category]}
                tp, errors, found = 0, 0.0, kept[kept[:, 6] == category]
                for image in range(len(dataset)):
                    boxes = [np.array(a['bbox']) for a in of_class['annotations'] if a['image_id'] == image]
                    for row in sorted(found[found[:, 0] == image], key=lambda row: -row[5]):
                        ious = [iou(row[1:5], box) for box in boxes]
                        if ious and max(ious) >= 0.5:
                            boxes.pop(int(np.argmax(ious)))
                            tp, errors = tp + 1, errors + 1 - max(ious)
                targets = len(of_class['annotations'])
                lrp = (errors / 0.5 + len(found) - tp + targets - tp) / (len(found) + targets - tp)
                best[category] = min(best.get(category, 1), lrp)
        self.assertAlmostEqual(self.errors(truth, rows)[0], np.mean(list(best.values())), places=5)

    def test_unstable_score_by_hand(self):
        left, right = FixedImages.boxes
        off = torch.tensor([0.5, 0.1, 0.1, 0.1])
        start = torch.stack([left, right, off, off])
        model = FixedModel(start, torch.tensor([7, 2, 4, 0]), torch.stack([
            start, start, start[[1, 0, 2, 3]], torch.stack([right, off, off, left]), start[[2, 3, 0, 1]]])).train()
        self.assertEqual(evaluation.unstable_score(model, FixedImages(), [1, 2, 3], batch_size=2), [0, 0, 100, 50, 100])
        self.assertTrue(model.training, 'the model must be left as it was')
        self.assertEqual(evaluation.unstable_score(model, FixedImages(objects=0), [1, 2, 3]), [])

    def test_unstable_score_of_the_first_images_over_all_objects(self):
        """1 of 2 objects of the one image and 0 of 1 of the other: a third of all, not the mean of 50 % and 0 %."""
        class Mixed(FixedImages):
            def __getitem__(self, key):
                self.objects = 2 - key[1] % 2
                return super().__getitem__(key)
        left, right = FixedImages.boxes
        off = torch.tensor([0.5, 0.1, 0.1, 0.1])
        model = FixedModel(torch.stack([left, right, off, off]), torch.arange(4),
                           torch.stack([left, off, off, right])[None])
        self.assertAlmostEqual(evaluation.unstable_score(model, Mixed(20), [1, 2, 3], 2)[0], 100 / 3, places=4)
        self.assertAlmostEqual(evaluation.unstable_score(model, Mixed(20), [1, 2, 3], 1)[0], 50, places=4)

    def test_evaluating_leaves_the_backbone_in_training(self):
        backbone = hybrid_detr.Backbone('resnet18').train()   # torchvision's have another graph in train()
        with evaluation.evaluating(backbone):
            self.assertIs(backbone.body.graph, backbone.body.eval_graph)
        self.assertIs(backbone.body.graph, backbone.body.train_graph)

    def test_unstable_score_starts_with_the_queries_own_proposals(self):
        """A decoder whose box heads are all zero answers with the proposals: they must stand in the same order."""
        for groups, selection in (((6,), 'ranks'), ((6, 8), 'ranks'), ((6, 6), 'heads'), ((6, 6), 'distinct')):
            model = tiny_model(groups, selection=selection)
            with torch.no_grad():
                for head in model.box_heads:
                    head[-1].weight.zero_()
            before = {name: value.clone() for name, value in model.state_dict().items()}
            model.encoder.eval()   # as --fixed-encoder has it
            with unittest.mock.patch.object(evaluation, 'match', wraps=evaluation.match) as match:
                scores = evaluation.unstable_score(model, FixedImages(), [1, 2, 3], batch_size=2)
            self.assertTrue(model.decoder.training and not model.encoder.training, 'each part as it was')
            for call in match.call_args_list:
                boxes, encoder_logits, encoder_boxes = call.args[1:4]
                self.assertEqual(encoder_logits.shape, (1, boxes.shape[1], 6, 3))
                torch.testing.assert_close(boxes, encoder_boxes.expand(2, -1, -1, -1), atol=1e-4, rtol=0)
            self.assertEqual(len(scores), 2)
            self.assertTrue(all(0 <= score <= 100 for score in scores))
            self.assertTrue(model.training and all(torch.equal(value, before[name])
                                                   for name, value in model.state_dict().items()))

    def test_unstable_score_names_the_image_that_is_not_finite(self):
        model = FixedModel(FixedImages.boxes.repeat(2, 1), torch.arange(4), torch.full((2, 4, 4), torch.nan))
        with self.assertRaisesRegex(data.UserError, 'decoder layer 0 are not finite.*; the images are image 0'):
            evaluation.unstable_score(model, FixedImages(), [1, 2, 3])

    def test_processes_share_the_images(self):
        """Two processes with 4 and 3 of 7 images find together what one finds."""
        model, images, shares = tiny_model((6,)), data.ShapesDataset('val', 7, 64), []

        def detect():
            return evaluation.detect(model, images, [1, 2, 3], batch_size=2, workers=0)

        def gather(gathered, rows):
            shares.append(rows)
            gathered[:] = shares if len(shares) == 2 else [rows, rows]
        with quiet():
            whole = detect()
            for rank in range(2):
                with unittest.mock.patch.multiple(evaluation.dist, is_initialized=lambda: True, get_rank=lambda: rank,
                                                  get_world_size=lambda: 2, all_gather_object=gather):
                    together = detect()
        self.assertEqual([len(set(rows[:, 0])) for rows in shares], [4, 3])
        order = np.argsort(together[:, 0], kind='stable')
        np.testing.assert_allclose(together[order], whole, atol=1e-3)

    def test_precision_recall_curve(self):
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        truth = coco_json([(0, 1, 10, 10, 100, 50), (0, 1, 100, 100, 40, 40)])
        rows = np.array([[0, 30, 10, 100, 50, 0.8, 1]])   # IoU 2/3: one of two objects at 0.5, none at 0.75
        evaluation.average_precision(truth, rows, curve=str(folder / 'pr.png'))
        image = np.array(Image.open(folder / 'pr.png').convert('RGB')).astype(int)
        self.assertEqual(image.shape, (600, 800, 3))

        def heights(recall, colour):   # precision at the pixels of this colour
            wanted = np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)])
            column = np.abs(image[80:, round((130 + 1420 * recall) / 2)] - wanted).sum(1) < 30
            return (1060 - 2 * (column.nonzero()[0] + 80)) / 890
        self.assertAlmostEqual(heights(0.3, evaluation.COLOURS[0]).mean(), 1, delta=0.01)
        self.assertAlmostEqual(heights(0.2, evaluation.COLOURS[2]).mean(), 0.4, delta=0.01,
                               msg='0.5, 0.55, 0.6 and 0.65 of ten thresholds')
        with self.assertRaisesRegex(data.UserError, 'without ground truth'):
            evaluation.average_precision({**truth, 'annotations': []}, rows, curve=str(folder / 'no.png'))

    def test_comparison_of_runs(self):
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        others = dict(duplicates=0, AP75=0.5, oLRP=0.7, oLRP_Loc=0.2, oLRP_FP=0.3, oLRP_FN=0.4)
        for speed, (name, aps) in enumerate({'group-0': (0.1, 0.4), 'group-1': (0.2, 0.6),
                                             'one2one-0': (0.3, 0.3)}.items()):
            (folder / name).mkdir()
            line = json.dumps({'step': 5, 'loss': 1, 'images_per_second': 20 + 10 * speed}) + '\n'
            (folder / name / 'metrics.jsonl').write_text(line + ''.join(json.dumps({
                'step': 10 * i + 10, 'AP': ap, 'AP50': ap, **others, 'oLRP_FN': 1 - ap}) + '\n'
                for i, ap in enumerate(aps)) + '{"step": 30, "lo')
        runs = [str(folder / name) for name in ('group-0', 'group-1', 'one2one-0')]
        with quiet() as printed:
            evaluation.main(['--compare', *runs, '--curves', str(folder / 'curves.png')])
        self.assertIn('| group | 2 | 20 | 0.500 (0.400-0.600) |', printed.getvalue())
        self.assertIn(' | 25.0 |\n', printed.getvalue(), 'the mean of 20 and 30 images/s')
        self.assertIn('| one2one | 1 | 20 | 0.300 (0.300-0.300) |', printed.getvalue())
        self.assertIn('| 0.300 (0.300-0.300) | 0.500 (0.400-0.600) |  |\n| one2one | 0.500', printed.getvalue(),
                      'oLRP_FP and oLRP_FN of group, in the second table')
        self.assertIn('| 0.700 (0.700-0.700) | -0.100 |\n', printed.getvalue(), "one2one-0's AP less group-0's")
        picture = np.array(Image.open(folder / 'curves.png').convert('RGB')).astype(int)
        upper, lower = picture[100:600], picture[608:]   # 100: below the legend, which has the same colours

        def rows(panel, x, colour, shift):   # of a colour above x, from 0 to 1 along the axis; shift: side by side
            column = panel[:, round((130 + 1420 * x + shift) / 2)]
            return (np.abs(column - colour).sum(1) < 30).nonzero()[0]
        blue, orange = [0, 0x72, 0xB2], [0xD5, 0x5E, 0]
        height = (1060 - 2 * (rows(upper, 0.5, blue, -11) + 100).mean()) / 890   # axis from 0.1 to 0.6, and margins
        self.assertAlmostEqual(0.1 - 0.05 * 0.5 + height * 1.1 * 0.5, (0.15 + 0.5) / 2, delta=0.01, msg='of the means')
        bar = rows(upper, 1.05 / 1.1, blue, -11)
        heights = (1060 - 2 * (bar[[-1, 0]] + 100)) / 890   # of group's spread at the last step
        np.testing.assert_allclose(0.075 + heights * 0.55, (0.4, 0.6), atol=0.01)
        height = (760 - 2 * rows(lower, 0.5, orange, 11).mean()) / 640   # axis from -0.2 to 0.15, and margins
        self.assertAlmostEqual(-0.2 - 0.05 * 0.35 + height * 1.1 * 0.35, (0.15 - 0.2) / 2, delta=0.01,
                               msg="one2one's 0.3 and 0.3, less group's means of 0.15 and 0.5")
        shutil.copytree(runs[0], folder / 'group-plain')
        with quiet() as printed:
            evaluation.main(['--compare', *runs, str(folder / 'group-plain')])
        self.assertIn('| group | 2 |', printed.getvalue(), 'what follows the dash is no number, so no seed')
        self.assertIn('| group-plain | 1 |', printed.getvalue())
        self.assertIn('(0.600-0.600) | - |\n', printed.getvalue(), 'no run of group ends in the same number')
        shutil.copytree(runs[0], folder / 'elsewhere' / 'group-2')
        for other, message in ((runs[0], 'given twice'),
                               (str(folder / 'elsewhere' / 'group-2'), 'a repetition of group')):
            with self.assertRaisesRegex(data.UserError, message), quiet():
                evaluation.main(['--compare', runs[0], other])
        for folder_, settings in (('group-0', {'seed': 0, 'lr': 1}), ('group-1', {'seed': 1, 'lr': 1})):
            torch.save({'model': {}, 'settings': settings}, folder / folder_ / 'checkpoint.pt')
        with quiet():
            evaluation.main(['--compare', *runs])
        for settings, message in (({'seed': 0, 'lr': 1}, 'group-1.*: has the seed 0 of .*group-0'),
                                  ({'seed': 1, 'lr': 2}, 'is no repetition of .*: --lr is 2, there 1'),
                                  (None, 'has no settings with a seed')):
            torch.save({'model': {}, 'settings': settings}, folder / 'group-1' / 'checkpoint.pt')
            with self.assertRaisesRegex(data.UserError, message), quiet():
                evaluation.main(['--compare', *runs])
        (folder / 'group-1' / 'checkpoint.pt').unlink()   # then nobody can tell
        with self.assertRaisesRegex(data.UserError, 'none of the runs was trained with --unstable'), quiet():
            evaluation.main(['--compare', *runs, '--unstable-curves', str(folder / 'layers.png')])
        for name, scores in (('one2one-0', [60, 30, 10]), ('one2one-1', [40, 30, 20])):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / 'metrics.jsonl').write_text(json.dumps({
                'step': 10, 'AP': 0.5, 'AP50': 0.5, **others, 'oLRP_Loc': -1, 'unstable': scores}) + '\n')
        with quiet() as printed:
            evaluation.main(['--compare', str(folder / 'one2one-0'), str(folder / 'one2one-1'), runs[0],
                             '--unstable-curves', str(folder / 'layers.png')])
        self.assertIn('group: was trained without --unstable', printed.getvalue())
        self.assertIn('| 0.700 (0.700-0.700) | - | 0.300', printed.getvalue(), 'a mark for no number has no mean')
        self.assertIn('one2one: unstable score of layer 1 to 3: 50.0 %, 30.0 %, 15.0 %', printed.getvalue())
        image = np.array(Image.open(folder / 'layers.png').convert('RGB')).astype(int)
        column = np.abs(image[100:, round((130 + 1420 * 1 / 2) / 2)] - [0, 0x72, 0xB2]).sum(1) < 30   # at layer 2 of 3
        self.assertAlmostEqual((1060 - 2 * (column.nonzero()[0] + 100).mean()) / 890 * 63, 30, delta=1)   # and margin
        with self.assertRaisesRegex(data.UserError, 'one2one: its runs differ in the number of decoder'), quiet():
            file = folder / 'one2one-1' / 'metrics.jsonl'
            file.write_text(file.read_text().replace('[40, 30, 20]', '[40, 30]'))
            evaluation.main(['--compare', str(folder / 'one2one-0'), str(folder / 'one2one-1'), '--unstable-curves',
                             str(folder / 'layers.png')])
        file = folder / 'one2one-1' / 'metrics.jsonl'
        file.write_text(json.dumps({'step': 5, 'images_per_second': 'x'}) + '\n')
        with self.assertRaisesRegex(data.UserError, 'images_per_second is no number'), quiet():
            evaluation.main(['--compare', str(file.parent)])
        (folder / 'group-1' / 'metrics.jsonl').write_text('')
        for flags, message in ((runs, 'group: its runs have no evaluat'), ([str(folder)], 'metrics.jsonl does not')):
            with self.assertRaisesRegex(data.UserError, message), quiet():
                evaluation.main(['--compare', *flags])

    def test_picture_of_the_matches_of_every_scheme(self):
        """Four boxes on each of two objects: how often each group's colour leads to an object."""
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        near = torch.linspace(-0.05, 0.05, 4)[:, None] * torch.tensor([0.0, 1, 0, 0])
        boxes = torch.cat([FixedImages.boxes[:1] + near, FixedImages.boxes[1:] + near])[[0, 4, 1, 5, 2, 6, 3, 7]]
        model, images = FixedModel(FixedImages.boxes.repeat(2, 1), [0, 1, 2, 3], boxes[None]), FixedImages()
        images.load = lambda index: (Image.new('RGB', (64, 64), 'white'), None, None, None)
        evaluation.draw_matches(model, data.FirstImages(images, 1), [1, 2, 3], str(folder / 'matches.png'), 0)
        image = np.array(Image.open(folder / 'matches.png').convert('RGB')).astype(int)
        height, width = (side // 2 for side in image.shape[:2])

        def shown(panel):
            y, x = divmod(panel, 2)
            part = image[y * height + 30:(y + 1) * height, x * width:(x + 1) * width]
            colours = [[int(colour[i:i + 2], 16) for i in (1, 3, 5)] for colour in evaluation.COLOURS[:5]]
            return [bool((np.abs(part - colour).sum(2) < 20).sum() > 50) for colour in colours]
        self.assertEqual([shown(panel) for panel in range(4)],
                         [[True] + [False] * 4, [True] + [False] * 4, [True, True] + [False] * 3, [True] * 4 + [False]],
                         'the colours of the groups in the panels one2one, one2many, branch, group')
        with self.assertRaisesRegex(data.UserError, 'image 0 has 0 objects'):
            evaluation.draw_matches(model, FixedImages(objects=0), [1, 2, 3], str(folder / 'no.png'), 0)

    def test_figures_of_schemes_and_losses(self):
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        with quiet():
            evaluation.main(['--figures', str(folder)])
        schemes, losses_drawn = (np.array(Image.open(folder / f'{name}.png')) for name in ('schemes', 'losses'))
        # The query circles of a panel, a colour for what each has to find: branch is the second panel, group the third.
        for panel, found in enumerate(('A.B...', 'AB|BABA', 'AB|BA|BA', 'ABBA..')):
            x, y = panel % 2 * 400 + 39, panel // 2 * 320 + 80   # above the text in the first circle
            for letter in found:
                if letter != '|':
                    colour = {'A': [0, 0x72, 0xB2], 'B': [0xD5, 0x5E, 0], '.': [0xBB] * 3}[letter]
                    self.assertLess(np.abs(schemes[y, x] - np.array(colour)).max(), 30, f'panel {panel}')
                y += 13 if letter == '|' else 32
        # Of an unmatched query (thin black) the curve of mal is p^1.5 * -log(1-p): 0.245 of 3 at score 1/2.
        x, y = 4 % 3 * 395 + 45 + 165, 4 // 3 * 345 + 40 + round(250 * (1 - 0.5 ** 1.5 * math.log(2) / 3))
        self.assertLess(losses_drawn[y - 2:y + 3, x].sum(-1).min(), 300, 'the curve of mal')
        with self.assertRaisesRegex(data.UserError, 'is no folder'):
            evaluation.main(['--figures', str(folder / 'none')])

    def test_bad_flags_are_refused(self):
        for flags, message in ((['--pr-curve', 'p.jpg'], '--pr-curve p.jpg: must end in .png'),
                               (['--pr-curve', '/nowhere/p.png'], '/nowhere/p.png: its folder does not exist'),
                               (['--image-size', '63'], '--image-size 63: must be at least 64'),
                               (['--unstable', '-1'], '--unstable -1: must be at least 0')):
            with self.assertRaisesRegex(data.UserError, message):
                evaluation.main(['--weights', 'x.pt', *flags])


def iou(a, b):
    """Of two boxes (x, y, w, h)."""
    w, h = (max(0, min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    return w * h / (a[2] * a[3] + b[2] * b[3] - w * h)


# --- Training and evaluation, from the command line -----------------------------------------------------------------

SMALL = ['--image-size', '64', '--batch-size', '2', '--queries', '8', '--workers', '0', '--device', 'cpu']


class ThinBackbone(hybrid_detr.TinyBackbone):
    """For tests of what comes after it: a tenth of the time. (Its base is the real one, of `tiny`.)"""
    channels = (32, 48, 64)

    def __init__(self):
        def conv(c_in, c_out, stride):
            return torch.nn.Sequential(torch.nn.Conv2d(c_in, c_out, 3, stride, 1), torch.nn.BatchNorm2d(c_out),
                                       torch.nn.ReLU())
        torch.nn.Sequential.__init__(self, torch.nn.Sequential(conv(3, 16, 2), conv(16, 32, 2), conv(32, 32, 2)),
                                     conv(32, 48, 2), conv(48, 64, 2))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(('localhost', 0))
        return free.getsockname()[1]


def train_with_frozen_norm(flags: list[str]) -> None:
    """train.py on a few images without batch norm, whose statistics are a batch's own."""
    real = data.ShapesDataset
    with (unittest.mock.patch.object(torch.nn, 'BatchNorm2d', FrozenBatchNorm2d),
          unittest.mock.patch.object(hybrid_detr, 'TinyBackbone', ThinBackbone),
          unittest.mock.patch.object(data, 'ShapesDataset', lambda split, _, size, seed: real(split, 12, size, seed))):
        train.main(flags)


class TestCommands(unittest.TestCase):
    def setUp(self):
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))
        real = self.shapes = data.ShapesDataset   # with fewer images, quick to go through
        self.enterContext(unittest.mock.patch.object(data, 'ShapesDataset', lambda split, length, size,
                                                     seed: real(split, 12, size, seed)))
        self.enterContext(unittest.mock.patch.object(hybrid_detr, 'TinyBackbone', ThinBackbone))

    def run_train(self, *flags, out='run'):
        with quiet() as printed:
            train.main(['--workers', '0', *flags] if '--resume' in flags else
                       [*SMALL, '--out', str(self.root / out), *flags])
        return printed.getvalue()

    def refuses(self, message, call, *flags):
        with self.assertRaisesRegex(data.UserError, message) as caught, quiet():
            call([*flags])
        self.assertNotIn('\n', str(caught.exception), 'an error is one line')

    def test_every_scheme_trains_and_evaluates(self):
        for scheme, flags in (('one2one', []), ('branch', ['--T', '12', '--K', '2']), ('group', ['--G', '3']),
                              ('epoch', ['--K', '2']),
                              ('layer', ['--K', '2', '--L1', '1']), ('one2many', ['--K', '2'])):
            printed = self.run_train('--scheme', scheme, '--steps', '2', *flags, out=scheme)
            self.assertIn('Average Precision', printed)
            for name in ('checkpoint.pt', 'metrics.jsonl', 'predictions.png'):
                self.assertTrue((self.root / scheme / name).exists(), name)
            record = json.loads((self.root / scheme / 'metrics.jsonl').read_text().splitlines()[0])
            parts = [record[name] for name in ('class', 'l1', 'giou', 'encoder_class', 'encoder_l1', 'encoder_giou')]
            self.assertAlmostEqual(sum(parts), record['loss'], places=3, msg='the parts must add up to the loss')

    def test_resume_continues_to_the_bit(self):
        flags = ['--scheme', 'group', '--G', '2', '--steps', '6', '--batch-size', '4', '--dropout', '0.1']   # 2 epochs
        self.run_train(*flags, out='whole')
        saved, real = [], train.save

        def stop_after_first(path, content):
            real(path, content)
            saved.append(1)
            raise KeyboardInterrupt

        with unittest.mock.patch.object(train, 'save', stop_after_first), self.assertRaises(KeyboardInterrupt):
            self.run_train(*flags, out='stopped')
        printed = self.run_train('--resume', str(self.root / 'stopped'))
        self.assertIn('steps 2 to 6', printed)
        lines = (self.root / 'stopped' / 'metrics.jsonl').read_text().splitlines()
        self.assertEqual([r['step'] for r in map(json.loads, lines) if 'AP' in r], [2, 4, 6],
                         'evaluations at every third')
        # Stopped between the last checkpoint and its evaluation: resuming makes up for it.
        (self.root / 'stopped' / 'metrics.jsonl').write_text('\n'.join(lines[:-1]) + '\n{"step": 6, "AP"')
        self.assertIn('Average Precision', self.run_train('--resume', str(self.root / 'stopped')))
        self.assertEqual(len((self.root / 'stopped' / 'metrics.jsonl').read_text().splitlines()), len(lines))
        whole, resumed = (evaluation.read_checkpoint(str(self.root / name / 'checkpoint.pt'))
                          for name in ('whole', 'stopped'))
        for name, value in whole['model'].items():
            self.assertTrue(torch.equal(value, resumed['model'][name]), f'{name} differs after a resumed run')

    def test_every_scheme_and_ablation_overfits_two_images(self):
        for scheme, *flags in (('one2one',), ('branch', '--T', '16', '--K', '2'), ('group', '--G', '2'),
                               ('epoch', '--K', '2', '--rho', '0.3', '--queries', '24'),
                               ('layer', '--K', '2', '--L1', '1', '--queries', '24'),
                               ('one2many', '--K', '2', '--queries', '24'),
                               ('group', '--G', '2', '--no-separate-attention'),
                               ('branch', '--T', '8', '--K', '1', '--selection', 'distinct'),
                               ('stable', '--denoising', '6'), ('deim', '--denoising', '6')):
            out = '-'.join((scheme, *flags))
            with unittest.mock.patch.dict(train.TINY_MODEL, width=64, encoder_layers=1):
                printed = self.run_train('--overfit', '2', '--steps', '64', '--eval-every', '64', '--scheme', scheme,
                                         *flags, '--lr', '4e-3', '--ffn', '64', '--decoder-layers', '2', out=out)
            records = [json.loads(line) for line in (self.root / out / 'metrics.jsonl').read_text().splitlines()]
            self.assertGreater(records[-1]['AP50'], 0.6, f'{out} does not detect what it was trained on')
            self.assertGreater([r['matched_iou'] for r in records if 'loss' in r][-1], 0.6, f'{out}, mean of 14 steps')
            self.assertEqual('(a preset of one2one)' in printed and '--cls-loss' in printed, scheme in train.PRESETS)
            self.assertEqual('(2, 2) (at the end of training (1, 1)), weight 1\n' in printed, scheme == 'epoch')

    def test_what_changes_with_time_is_printed(self):
        def fading(scheme, layers, progress=0.0, n=0, **_):
            return [QueryGroup(n, (1,) * layers), QueryGroup(8, (2,) * layers, weight=1 - progress)]

        printed = io.StringIO()
        with unittest.mock.patch.object(train, 'query_groups', fading), contextlib.redirect_stdout(printed):
            train.describe_scheme(train.complete({'scheme': 'one2one', 'n': 5}), layers=2, steps=4, epochs=1)
        self.assertIn('1 x 5 queries, copies of a ground truth in each layer (1, 1), weight 1\n', printed.getvalue())
        self.assertIn('(2, 2), weight 1 (at the end of training 0.25)', printed.getvalue())

    def test_every_pair_of_switches_trains(self):
        """All pairs of (loss, cost, fusion, scheme, denoising) occur in one of 36 runs of 2 steps."""
        schemes = 'one2one', 'branch', 'epoch', 'layer', 'group', 'one2many'   # not those of an exercise
        kinds = (tuple(train.CLASS_WEIGHTS), ('focal', 'stable'), ('none', 'simple', 'ulike', 'dense'), schemes, (0, 6))
        runs = [(i, (i // 2 + j) % 2, (i + j) % 4, j, (i + j // 2) % 2) for i in range(6) for j in range(6)]
        for a, b in itertools.combinations(range(5), 2):
            self.assertEqual(len({(run[a], run[b]) for run in runs}), len(kinds[a]) * len(kinds[b]),
                             f'not all pairs of {kinds[a]} and {kinds[b]}')
        numbers = dict(branch=dict(T=6, K=2), epoch=dict(K=2, rho=0.5), layer=dict(K=2, L1=1), group=dict(G=2),
                       one2many=dict(K=2))
        small = dict(width=32, heads=2, encoder_layers=2, levels=3)
        with (unittest.mock.patch.dict(train.TINY_MODEL, small), quiet(),
              unittest.mock.patch.object(evaluation, 'detect', lambda *args, **kwargs: np.zeros((0, 7))),
              unittest.mock.patch.object(evaluation, 'average_precision', lambda *args, **kwargs: ({
                  'AP': 0.0, 'AP50': 0.0}, {})), unittest.mock.patch.object(evaluation, 'draw_predictions')):
            for run in runs:
                loss, cost, fusion, scheme, denoising = (kind[i] for kind, i in zip(kinds, run))
                flags = [x for name, value in numbers.get(scheme, {}).items() for x in (f'--{name}', str(value))]
                out = self.root / '-'.join(map(str, run))
                train.main([*SMALL, '--queries', '12', '--ffn', '32', '--steps', '2', '--out',
                            str(out), '--scheme', scheme, '--cls-loss', loss, '--cost', cost, '--fusion', fusion,
                            '--denoising', str(denoising), '--decoder-layers', '2', *flags])
                self.assertEqual(evaluation.read_checkpoint(str(out / 'checkpoint.pt'))['architecture'][
                    'decoder_layers'], 2)
                record = json.loads((out / 'metrics.jsonl').read_text().splitlines()[-2])
                self.assertTrue(math.isfinite(record['loss']) and record['positives'] > 0, record)

    def test_two_processes_and_accumulation_equal_one_batch(self):
        """The gradient of a step is the same from one batch of 4, from 2 x 2 in turn, and from 2 processes of 2."""
        port = free_port()
        flags = [*SMALL, '--scheme', 'group', '--G', '2', '--steps', '1', '--cls-loss', 'mal']
        call = [*flags, '--out', str(self.root / 'two')]
        processes = [subprocess.Popen(
            [sys.executable, '-c', f'import test_all; test_all.train_with_frozen_norm({call})'], cwd=HERE,
            env={**os.environ, 'RANK': str(rank), 'WORLD_SIZE': '2', 'MASTER_ADDR': 'localhost',
                 'MASTER_PORT': str(port)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for rank in range(2)]
        for process in processes:
            self.addCleanup(process.kill)   # if something fails before they end
        for name, more in (('one', ['--batch-size', '4']), ('accumulated', ['--accumulate', '2'])):
            with quiet():
                train_with_frozen_norm([*flags, *more, '--out', str(self.root / name)])
        for process in processes:
            printed = process.communicate(timeout=120)[0]
            self.assertEqual(process.returncode, 0, printed)
        moments = {name: evaluation.read_checkpoint(str(self.root / name / 'checkpoint.pt'))['optimizer']['state']
                   for name in ('one', 'accumulated', 'two')}   # after one step, a tenth of the clipped gradient
        for name in ('accumulated', 'two'):
            for i, state in moments['one'].items():
                difference = (state['exp_avg'] - moments[name][i]['exp_avg']).abs().max()
                self.assertLess(float(difference), 1e-7, f'parameter {i}, {name}')   # clipped to a norm of 0.1
        self.assertGreater(max(float(state['exp_avg'].abs().max()) for state in moments['one'].values()), 1e-4)

    def test_mixed_precision_and_checkpointed_activations(self):
        records = {}
        for name, flags in (('plain', []), ('checkpointed', ['--checkpoint-activations']), ('bfloat16', ['--amp'])):
            self.run_train('--steps', '2', '--scheme', 'branch', '--T', '16', '--K', '2', '--denoising', '4',
                           '--dropout', '0.1', *flags, out=name)
            records[name] = json.loads((self.root / name / 'metrics.jsonl').read_text().splitlines()[0])
        self.assertAlmostEqual(records['checkpointed']['loss'] / records['plain']['loss'], 1, delta=1e-6,
                               msg='dropout must be drawn alike when a layer is computed again')
        self.assertAlmostEqual(records['bfloat16']['loss'] / records['plain']['loss'], 1, delta=0.1)
        self.assertNotEqual(records['bfloat16']['loss'], records['plain']['loss'])

    def test_benchmark(self):
        for kind, *flags in (('schemes', '--rows', 'n = 200,branch'), ('queries', '--rows', 'T = 50'), ('loss',)):
            flags += ['--batch-size', '1', '--workers', '0'] if flags else []
            with quiet() as printed:
                evaluation.main(['--benchmark', kind, '--repeats', '1', '--device', 'cpu', *flags])
            lines = printed.getvalue().splitlines()
            if kind == 'loss':
                here, published = (float(x) for x in re.findall(r'\d+\.\d{5}', lines[-1]))
                self.assertAlmostEqual(here / published, 1, places=5, msg='both ways must give the same loss')
            else:
                table = [line for line in lines if line.startswith('|')]
                self.assertEqual({line.count('|') for line in table}, {14}, 'cells of every line')
                self.assertEqual(len(table), 2 + (5 if kind == 'schemes' else 2))
                self.assertEqual('times the step of branch' in lines[-1], kind == 'schemes')
        with quiet():
            rows = [evaluation.BenchmarkRow({'model': 'tiny', 'data': 'shapes', **given}, 6, torch.device('cpu'), False)
                    for given in (dict(scheme='one2one'), dict(scheme='stable'), dict(scheme='branch'),
                                  dict(scheme='branch', published='branch'))]
            batch = data.collate([data.ShapesDataset('train', 1, 128, 0)[0, 0]])
            one, stable, branch, published = (row.gflops(batch) for row in rows)
        self.assertTrue(one < branch < published and one < stable, 'denoising queries and the mask cost something')
        self.refuses('--rows nonsense: is in none of one2one', evaluation.main, '--benchmark', '--rows', 'nonsense')
        self.refuses('--model vgg16: unknown backbone', evaluation.main, '--benchmark', '--model', 'vgg16')
        with unittest.mock.patch.object(torch, 'compile', side_effect=RuntimeError('no compiler c++\nmore')):
            self.refuses('--compile: torch cannot compile here .no compiler c', train.main, '--compile')
        for flags in (['--benchmark', '--nms', '0.5'], ['--weights', 'x', '--rows', 'y'], [],
                      ['--benchmark', 'loss', '--batch-size', '3']):
            with self.assertRaises(SystemExit), quiet():
                evaluation.main(flags)

    def test_one_synchronisation_a_step(self):
        """Everything from forward to loss may copy to the CPU once (in match), and never ask for a number."""
        model, calls = tiny_model((6, 8), denoising=True), []
        settings = train.complete({'scheme': 'branch', 'n': 6, 'T': 8, 'K': 2, 'cls_loss': 'stable', 'denoising': 4})
        with quiet():
            batch = data.collate([data.ShapesDataset('train', 2, 64, 0)[0, i] for i in range(2)])
        batch = batch._replace(gt_labels=[labels % 3 for labels in batch.gt_labels])
        class Operators(TorchDispatchMode):   # what torch and torchvision ask of the GPU, whoever calls them
            def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
                kind = operator.overloadpacket
                indices = args[1] if kind in (aten.index, aten.index_put, aten.index_put_) else []
                by_mask = any(x is not None and x.dtype == torch.bool for x in indices)
                of_unknown_length = kind == aten.repeat_interleave and kwargs.get('output_size') is None
                if by_mask or of_unknown_length or kind in (aten.nonzero, aten.masked_select, aten._unique2, aten.equal,
                                                            aten._local_scalar_dense):
                    calls.append(str(operator))
                return operator(*args, **(kwargs or {}))

        aten = torch.ops.aten
        with contextlib.ExitStack() as patches:
            for name in ('cpu', 'tolist', 'numpy'):
                real = getattr(torch.Tensor, name)
                patches.enter_context(unittest.mock.patch.object(
                    torch.Tensor, name, lambda x, *args, name=name, real=real: calls.append(name) or real(x, *args)))
            move = torch.Tensor.to
            patches.enter_context(unittest.mock.patch.object(torch.Tensor, 'to', lambda x, *args, **more: (
                args[:1] == ('cpu',) and calls.append('to')) or move(x, *args, **more)))
            patches.enter_context(Operators())
            parts, _ = train.loss_of(model, batch, settings, 0.0, 5.0)
            sum(parts.values()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        # match copies the costs, looks on the CPU for what is not finite, and solves.
        self.assertEqual(calls[:3], ['cpu', 'aten.nonzero.default', 'tolist'], calls)
        self.assertEqual(set(calls[3:]), {'numpy'}, 'of costs that are on the CPU')

    def test_divergence_is_one_line_and_keeps_the_checkpoint(self):
        real, calls = train.loss_of, []

        def spoil_later(*args, **kwargs):
            parts, stats = real(*args, **kwargs)
            calls.append(1)
            return ({**parts, 'class': parts['class'] * math.nan}, stats) if len(calls) > 50 else (parts, stats)

        with unittest.mock.patch.object(train, 'loss_of', spoil_later):
            first, second = next(itertools.islice(data.train_batches(12, 2, 60), 50, None))
            names = f'shapes/train/{first[1]}, shapes/train/{second[1]}'
            self.refuses(f'step 50: class is not finite; the images are {names}. Lower', train.main, *SMALL, '--scheme',
                         'one2one', '--out', str(self.root / 'run'), '--steps', '60', '--eval-every', '100')
        checkpoint = evaluation.read_checkpoint(str(self.root / 'run' / 'checkpoint.pt'))
        self.assertEqual(checkpoint['step'], 50)
        self.assertTrue(all(bool(x.isfinite().all()) for x in checkpoint['model'].values()))

    def test_divergence_of_every_kind_saves_nothing(self):
        for steps, flags, interrupted, message in (
                (1, ['--lr', '1e39'], False, 'step 0: a weight is not finite'),   # without a second step to see it
                (3, ['--lr', '1e39'], True, 'step 0: a weight is not finite'),
                (40, ['--lr', '1e5'], False, r'step \d+: .* is not finite'),
                (9, ['--lr', '1e39'], False, 'step 0: a weight is not finite after it; the images are shapes/train/')):
            real = train.loss_of

            def interrupt(*args, **kwargs):
                if interrupted:
                    train.note_interrupt()
                return real(*args, **kwargs)

            with unittest.mock.patch.object(train, 'loss_of', interrupt), self.subTest(flags=flags, steps=steps):
                self.refuses(message, train.main, *SMALL, '--scheme', 'one2one', '--warmup', '0', '--steps', str(steps),
                             '--eval-every', '100', *flags, '--out', str(self.root / f'run{steps}'))
            train.INTERRUPTS.clear()
        self.assertEqual(list(self.root.iterdir()), [])

    def test_full_disk_keeps_the_checkpoint(self):
        path = self.root / 'checkpoint.pt'
        train.save(path, {'step': 1})

        def fail(content, part):
            part.write_bytes(b'half')
            raise RuntimeError('PytorchStreamWriter failed writing file: file write failed')

        with unittest.mock.patch.object(torch, 'save', fail), self.assertRaisesRegex(
                data.UserError, 'cannot write .*checkpoint.pt, the last checkpoint is kept'):
            train.save(path, {'step': 2})
        self.assertEqual(torch.load(path), {'step': 1})
        self.assertEqual(sorted(p.name for p in self.root.iterdir()), ['checkpoint.pt'])

    def test_interrupted_by_the_user(self):
        def interrupt(*args, **kwargs):
            train.note_interrupt()
            return real(*args, **kwargs)

        real = train.loss_of
        with (unittest.mock.patch.object(train, 'loss_of', interrupt), quiet() as printed,
              self.assertRaises(SystemExit) as caught):
            train.main([*SMALL, '--scheme', 'one2one', '--steps', '6', '--out', str(self.root / 'run')])
        train.INTERRUPTS.clear()
        self.assertEqual(caught.exception.code, 130)
        self.assertIn(f'stopped after step 1: go on with  python train.py --resume {self.root / "run"}',
                      printed.getvalue())
        self.assertIn('steps 1 to 6', self.run_train('--resume', str(self.root / 'run')))

    def test_few_and_many_classes_and_batches_without_boxes(self):
        for names in (['only'], [str(i) for i in range(1203)]):
            root = coco_folder(self.root / f'{len(names)}')
            for split in ('train', 'val'):
                file = root / 'annotations' / f'instances_{split}2017.json'
                content = json.loads(file.read_text())
                content['categories'] = [{'id': i + 1, 'name': name} for i, name in enumerate(names)]
                for a in content['annotations']:
                    a['category_id'] = len(names)
                file.write_text(json.dumps(content))
            for flags in (['--batch-size', '1'], ['--cls-loss', 'stable', '--rescale', 'max-iou', '--denoising', '4']):
                out = f'{len(names)}{"".join(flags)}'
                self.run_train('--data', str(root), '--steps', '3', '--scheme', 'group', '--G', '2', *flags, out=out)
                lines = (self.root / out / 'metrics.jsonl').read_text().splitlines()
                self.assertTrue(all(math.isfinite(json.loads(line).get('loss', 0)) for line in lines))

    def test_accumulated_cross_entropy_is_a_mean(self):
        model, parts = tiny_model((6,), softmax=True), {}
        batch = data.collate([data.ShapesDataset('train', 1, 64, 0)[0, 0]])
        batch = batch._replace(gt_labels=[labels % 3 for labels in batch.gt_labels])
        for accumulate in (1, 2):
            settings = train.complete({'scheme': 'one2one', 'n': 6, 'cls_loss': 'ce', 'accumulate': accumulate})
            model.eval()   # batch norm
            model.training = True
            parts[accumulate], _ = train.loss_of(model, batch, settings, 0.0, 5.0)
            parts[accumulate] = {name: part.item() for name, part in parts[accumulate].items()}
        self.assertAlmostEqual(parts[1]['class'] / parts[2]['class'], 2, places=4)
        self.assertAlmostEqual(parts[1]['l1'] / parts[2]['l1'], 1, places=5)

    def test_switches_reach_the_computation(self):
        seen = {}

        def spy(name, real):
            return lambda *args, **kwargs: seen.setdefault(name, (args, kwargs)) and real(*args, **kwargs)

        with contextlib.ExitStack() as patches:
            for name in ('criterion', 'match', 'denoising_queries', 'train_loader', 'update_average'):
                patches.enter_context(unittest.mock.patch.object(train, name, spy(name, getattr(train, name))))
            self.run_train('--steps', '1', '--scheme', 'branch', '--T', '8', '--K', '2', '--cls-loss', 'stable',
                           '--class-weight', '3', '--f1', 's3', '--rescale', 'max-iou', '--official-losses', '--cost',
                           'stable', '--cost-class', '4', '--f2', '0.25', '--denoising', '7', '--dense-o2o', '--ema',
                           '0.5', '--fusion', 'simple')
        args, _ = seen['criterion']
        self.assertEqual(args[-1], LossSettings('stable', 3, 1.5, 's3', 'max-iou', True))
        self.assertEqual([group.queries for group in args[5]][:2], [8, 8])
        self.assertTrue(args[5][2].denoising and len(args[5]) == 3)
        self.assertGreater(int((args[3].query >= 16).sum()), 0, 'denoising queries have their ground truths')
        self.assertEqual(seen['match'][0][-1], Cost('stable', 4, 0.25, True))
        self.assertEqual(seen['denoising_queries'][0][-1], 7)
        self.assertEqual(seen['train_loader'][1]['dense_part'], data.DENSE)
        self.assertEqual(seen['update_average'][0][3], 0.5)
        self.assertEqual(args[0].pred_logits.shape[2], 16 + args[5][2].queries)
        seen.clear()
        with unittest.mock.patch.object(train, 'criterion', spy('criterion', train.criterion)):
            self.run_train('--steps', '1', '--scheme', 'one2one', '--cls-loss', 'mal', '--mal-gamma', '2', out='mal')
        self.assertEqual(seen['criterion'][0][-1], LossSettings('mal', 1, 2))

    def test_samples_are_drawn(self):
        self.refuses('--samples', train.main, *SMALL, '--samples', str(self.root / 's.txt'))
        for flags in ([], ['--dense-o2o']):
            self.run_train('--samples', str(self.root / 's.png'), *flags)
            with Image.open(self.root / 's.png') as picture:
                self.assertEqual(picture.size, (4 * 392, 2 * 392))
        self.assertEqual(sorted(p.name for p in self.root.iterdir()), ['s.png'], 'nothing is trained')

    def test_metrics_do_not_depend_on_the_number_of_workers(self):
        lines = []
        for workers in '021':
            self.run_train('--scheme', 'deim', '--denoising', '4', '--steps', '3', '--workers', workers, out=workers)
            records = [json.loads(line) for line in (self.root / workers / 'metrics.jsonl').read_text().splitlines()]
            lines.append([{k: v for k, v in record.items() if k != 'images_per_second'} for record in records])
        self.assertEqual(len(lines[0]), 6, 'three records of the losses and three evaluations')
        self.assertTrue(lines[0] == lines[1] == lines[2])

    def test_resume_under_other_conditions_is_refused(self):
        self.run_train('--scheme', 'one2one', '--steps', '2')
        resume = ['--resume', str(self.root / 'run'), '--workers', '0']
        with unittest.mock.patch.dict(os.environ, WORLD_SIZE='2'):
            self.refuses('has processes 1, here it is 2', train.main, *resume)
        self.refuses('has amp False, here it is True', train.main, *resume, '--amp')
        with unittest.mock.patch.object(data, 'ShapesDataset', lambda split, _, size, seed: self.shapes(split, 4, size,
                                                                                                        seed)):
            self.refuses(r'has images 12, here it is 4', train.main, *resume)
        self.run_train(*resume)

    def test_a_folder_belongs_to_one_run(self):
        real = train.loss_of

        def other_run(*args, **kwargs):
            (self.root / 'run').mkdir(exist_ok=True)
            (self.root / 'run' / 'metrics.jsonl').write_text('of another run')
            return real(*args, **kwargs)

        flags = [*SMALL, '--scheme', 'one2one', '--steps', '2', '--out', str(self.root / 'run')]
        with unittest.mock.patch.object(train, 'loss_of', other_run):
            self.refuses('holds another run by now', train.main, *flags)
        self.refuses('holds a run', train.main, *flags)
        self.assertEqual([(p.name, p.read_text()) for p in (self.root / 'run').iterdir()],
                         [('metrics.jsonl', 'of another run')])

    def test_metrics_that_are_damaged(self):
        self.run_train('--scheme', 'one2one', '--steps', '2')
        file = self.root / 'run' / 'metrics.jsonl'
        good = file.read_text()
        for line in ('garbage}', '{}', '[]', '3', '{"step": "x"}'):
            file.write_text(f'{line}\n{good}')
            for call in ((train.main, '--resume'), (evaluation.main, '--compare')):
                self.refuses('line 1 of .*metrics.jsonl is no record', call[0], call[1], str(self.root / 'run'))

    def test_damaged_checkpoints_of_a_run(self):
        """24 more, by the entrances that read more of the file: each goes on, or ends in one line."""
        small = dict(width=32, heads=2, encoder_layers=1)
        self.enterContext(unittest.mock.patch.dict(train.TINY_MODEL, small))
        self.enterContext(unittest.mock.patch.dict(train.TINY, decoder_layers=1))
        self.enterContext(unittest.mock.patch.object(evaluation, 'average_precision', lambda *args, **kwargs: ({
            'AP': 0.0, 'AP50': 0.0}, {})))
        self.enterContext(unittest.mock.patch.object(evaluation, 'detect', lambda *args, **kwargs: np.zeros((0, 7))))
        self.enterContext(unittest.mock.patch.object(evaluation, 'draw_predictions'))
        self.run_train('--scheme', 'stable', '--steps', '1', '--ffn', '8', '--denoising', '2', '--ema', '0.5')
        path = self.root / 'run' / 'checkpoint.pt'
        content, rng, refused = evaluation.read_checkpoint(str(path)), np.random.RandomState(0), 0
        junk = (None, 3, -1, 'x', torch.zeros(2), [], {}, math.nan, torch.zeros(1).expand(32, 32),
                torch.tensor([math.inf]), torch.zeros(2, 2).to_sparse(), torch.zeros(2, device='meta'))
        for i in range(24):
            broken = copy.deepcopy(content)
            optimizer = broken['optimizer']
            place = [broken, broken['settings'], broken['model'], broken['trained_model'], broken['categories'],
                     optimizer, optimizer['state'][3], optimizer['state']][i % 8]
            name = list(place)[rng.randint(len(place))]
            if rng.rand() < 0.3:
                del place[name]
            else:
                place[name] = junk[rng.randint(len(junk))]
            torch.save(broken, path)
            for call, *flags in ((train.main, '--resume', str(self.root / 'run')),
                                 (train.main, *SMALL, '--scheme', 'one2one', '--steps', '1', '--ffn', '8', '--init',
                                  str(path), '--out', str(self.root / f'{i}')),
                                 (evaluation.main, '--weights', str(path), '--workers', '0')):
                with self.subTest(i=i, name=name, value=place.get(name, 'deleted'), call=flags[0]), quiet():
                    try:
                        call(flags)
                    except data.UserError as error:
                        refused += 1
                        self.assertNotIn('\n', str(error))
        self.assertGreater(refused, 18)
        # The right shape, and wrong memory behind it: a single number, or channels in another order.
        convolution = next(i for i, state in content['optimizer']['state'].items() if state['exp_avg'].dim() == 4)
        for i, wrong in ((3, lambda x: torch.zeros(1).expand(x.shape)), (convolution, lambda x: x.contiguous())):
            broken = copy.deepcopy(content)
            state = broken['optimizer']['state'][i]
            state['exp_avg'] = wrong(state['exp_avg'])
            torch.save(broken, path)
            self.refuses('moments that do not fit', train.main, '--resume', str(self.root / 'run'))
        for wrong in (list(content['categories'].items()), torch.ones(2)):
            torch.save({**content, 'categories': wrong}, path)
            self.refuses('is damaged', train.main, '--resume', str(self.root / 'run'))
            self.refuses('does not fit', evaluation.main, '--weights', str(path))
        for name, value in (('steps', None), ('eval_every', None), ('data', 3), ('seed', 2 ** 40)):
            broken = copy.deepcopy(content)
            broken['settings'][name] = value
            if value is None:
                del broken['settings'][name]
            torch.save(broken, path)
            self.refuses('is damaged', train.main, '--resume', str(self.root / 'run'))
        # The rest of the optimizer follows from the settings.
        content['optimizer']['param_groups'][0].update(lr='x', weight_decay=5, betas=None)
        torch.save(content, path)
        with quiet():
            train.main(['--resume', str(self.root / 'run')])

    def test_resume_with_average_and_denoising(self):
        flags = ['--scheme', 'deim', '--steps', '3', '--denoising', '4']
        self.run_train(*flags, out='whole')
        real = train.save
        with unittest.mock.patch.object(train, 'save', side_effect=lambda *args: (real(*args), 1 / 0)), \
                self.assertRaises(ZeroDivisionError):
            self.run_train(*flags, out='stopped')
        self.run_train('--resume', str(self.root / 'stopped'), '--scheme', 'deim', '--workers', '2')
        whole, resumed = (evaluation.read_checkpoint(str(self.root / name / 'checkpoint.pt'))
                          for name in ('whole', 'stopped'))
        for entry in ('model', 'trained_model'):
            for name, value in whole[entry].items():
                self.assertTrue(torch.equal(value, resumed[entry][name]), f'{entry} {name} differs after a resumed run')
        self.assertFalse(torch.equal(whole['model']['level_embed'], whole['trained_model']['level_embed']))

    def test_evaluation(self):
        self.run_train('--steps', '1', '--scheme', 'group', '--G', '2')
        weights, results = str(self.root / 'run' / 'checkpoint.pt'), self.root / 'results.json'
        with quiet() as printed:
            evaluation.main(['--weights', weights, '--save-json', str(results), '--per-class', '--nms', '0.7',
                             '--group', '1', '--pictures', '2',
                             '--picture-file', str(self.root / 'p.png'), '--workers', '0', '--device', 'cpu'])
        self.assertIn('triangle', printed.getvalue())
        self.assertEqual(set(json.loads(results.read_text())[0]), {'image_id', 'category_id', 'bbox', 'score'})
        self.assertTrue(all(1 <= row['category_id'] <= len(data.SHAPES) for row in json.loads(results.read_text())))
        model, categories, _ = evaluation.load_detector(weights)
        model.train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with quiet():
            evaluation.detect(model, data.ShapesDataset('val', 4, 64, 0), categories.ids, batch_size=2, workers=0)
        self.assertTrue(model.training and all(torch.equal(value, before[name])
                                               for name, value in model.state_dict().items()),
                        'evaluation must leave the model as it was')

    def test_ablations_train_and_evaluate(self):
        for scheme, flags in (('group', ['--G', '2', '--no-separate-attention']),
                              ('branch', ['--T', '8', '--K', '1', '--selection', 'distinct']),
                              ('branch', ['--T', '8', '--K', '2', '--selection', 'heads'])):
            out = '-'.join([scheme, *flags])
            self.run_train('--scheme', scheme, '--steps', '2', *flags, out=out)
            for group in '01':
                with quiet() as printed:
                    evaluation.main(['--weights', str(self.root / out / 'checkpoint.pt'), '--group', group, '--nms',
                                     '0.7', '--workers', '0', '--device', 'cpu'])
                self.assertIn('Average Precision', printed.getvalue())

    def test_duplicate_rate(self):
        box = [10.0, 10, 20, 20]
        rows = np.array([[0, *box, 0.9, 1], [0, *box, 0.8, 1], [0, *box, 0.7, 2], [1, *box, 0.6, 1], [0, *box, 0.2, 1]])
        self.assertEqual(evaluation.duplicate_rate(rows), 0.25, 'one of four above .3: same image, class and place')
        self.assertEqual(evaluation.duplicate_rate(rows[:0]), 0)

    def test_nms_comes_before_the_best_100(self):
        """40 objects of 6 equal predictions each: NMS must leave all 40, though 240 scores compete for 100 places."""
        grid = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(5), indexing='ij'), -1).flatten(0, 1)
        boxes = torch.cat([(grid + 0.5) / 8, torch.full((40, 2), 0.1)], 1).repeat_interleave(6, 0)
        outputs = hybrid_detr.Outputs(torch.linspace(2, -2, 240).view(1, 1, 240, 1), boxes[None, None], None, None)
        (scores, _, _), = evaluation.detections(outputs, [(100, 100)], nms=0.7)
        self.assertEqual(len(scores), 40)

    def test_matching_stats(self):
        logits = torch.tensor([[[[0.0, 3], [2, 0], [5, 5]]]])   # the third query is of another group
        matches = Matches(*(torch.tensor(x) for x in ([0, 0], [0, 0], [0, 2], [0, 0])))
        outputs = hybrid_detr.Outputs(logits, None, None, None)
        stats = train.matching_stats(outputs, matches, torch.tensor([0]), torch.tensor([0.6, 0.9]), (2, 1))
        stats = {name: value.item() for name, value in stats.items()}
        self.assertAlmostEqual(stats['iou'], 0.6, places=6)
        self.assertAlmostEqual(stats['score'], 0.5, places=6, msg='the score of the matched class, not the largest')
        self.assertAlmostEqual(stats['best_unmatched'], 1 / (1 + math.exp(-2)), places=6)
        self.assertEqual((stats['matched'], stats['pairs']), (1, 2))

    def test_perfect_detections_have_ap_1(self):
        dataset = data.ShapesDataset('val', 4, 64, 0)
        content = dataset.coco_json()
        rows = np.array([[a['image_id'], *a['bbox'], 0.9, a['category_id']] for a in content['annotations']],
                        dtype=float)
        self.assertAlmostEqual(evaluation.average_precision(content, rows)[0]['AP'], 1, places=6)
        self.assertEqual(evaluation.average_precision(content, rows[:0])[0]['AP'], 0)

    def test_official_checkpoint_detects_raw_category_ids(self):
        with quiet():
            dataset = data.CocoFolder(coco_folder(self.root), 'val', 64)
        state = {name: fill(re.sub(r'^transformer\.decoder\.(?=class|bbox)', '', name), shape)
                 for name, shape in official_entries(1, 1, 8, 91, 30).items()}
        torch.save({'model': state, 'args': train.argparse.Namespace(lr=1)}, self.root / 'official.pth')
        model, categories, _ = evaluation.load_detector(str(self.root / 'official.pth'))
        self.assertEqual(evaluation.ids_for(categories, dataset, 91)[90], 90)
        rows = evaluation.detect(model, dataset, evaluation.ids_for(categories, dataset, 91), batch_size=2, workers=0)
        self.assertEqual(rows.shape, (300, 7))
        outputs = model(*data.collate([dataset[0, 0]])[:2])
        best = int(outputs.pred_logits[-1, 0].max(0).values.argmax())
        self.assertIn(best, rows[rows[:, 0] == 10][:, 6], 'column c must be reported as category id c')

    def test_init_loads_what_fits(self):
        self.run_train('--steps', '1', '--scheme', 'one2one')
        weights = str(self.root / 'run' / 'checkpoint.pt')
        printed = self.run_train('--steps', '1', '--scheme', 'one2one', '--data',
                                 str(coco_folder(self.root / 'coco')), '--init', weights, out='second')
        self.assertRegex(printed, r'not taken from it: class_heads.0.weight \(3, 96\)')
        self.assertRegex(printed, r'but not used: class_heads.0.weight \(6, 96\)')

    def test_fixed_encoder(self):
        """With the real backbone of `tiny`."""
        self.enterContext(unittest.mock.patch.object(hybrid_detr, 'TinyBackbone', ThinBackbone.__base__))
        self.refuses('--fixed-encoder: needs --init', train.main, *SMALL, '--fixed-encoder')
        self.refuses('--init-part encoder: needs --init', train.main, *SMALL, '--init-part', 'encoder')
        self.run_train('--steps', '1', '--scheme', 'one2one', out='first')
        weights = str(self.root / 'first' / 'checkpoint.pt')
        self.run_train('--steps', '2', '--scheme', 'group', '--G', '2', '--init', weights, '--init-part', 'encoder',
                       '--fixed-encoder', '--seed', '1')
        before, after = (evaluation.read_checkpoint(path)['model'] for path in (
            weights, str(self.root / 'run' / 'checkpoint.pt')))
        for name, value in before.items():
            if name.startswith(train.PARTS['encoder']):   # the statistics of batch norm, too
                self.assertTrue(torch.equal(value, after[name]), name)
            elif re.match(r'decoder.*(proj|linear\d)\.weight', name):
                self.assertGreater(float((value - after[name]).abs().max()), 0.01, f'{name} must start anew')
        self.run_train('--resume', str(self.root / 'run'))
        fixed = *SMALL, '--init', weights, '--fixed-encoder', '--init-part'
        self.refuses(r'--fixed-encoder: fusions\.0\.0\.weight is not taken', train.main, *fixed, 'encoder', '--fusion',
                     'dense')
        self.refuses('--init-part backbone: nothing of it in', train.main, *fixed, 'backbone', '--model', 'resnet18')

    def test_resume_with_other_classes_is_refused(self):
        root, run = coco_folder(self.root / 'coco'), ('--data', str(self.root / 'coco'), '--steps', '1', '--scheme',
                                                      'one2one')
        self.run_train(*run)
        for split in ('train', 'val'):
            file = root / 'annotations' / f'instances_{split}2017.json'
            content = json.loads(file.read_text())
            content['categories'].append({'id': 91, 'name': 'new'})
            file.write_text(json.dumps(content))
        self.refuses('has 3 classes .* the data has 4', train.main, '--resume', str(self.root / 'run'))
        for overfit in ((), ('--overfit', '2')):
            self.assertIn('up to 2 boxes, but the detector has 1 queries',
                          self.run_train(*run, '--queries', '1', *overfit, out='-'.join(('few', *overfit))))
        self.run_train(*run, '--init', str(self.root / 'run' / 'checkpoint.pt'), out='new')

    def test_boxes_of_overfit_are_those_of_its_images(self):
        most = data.FirstImages(data.open_dataset('shapes', 'train', 64), 2).most_boxes()
        self.assertEqual(most, max(len(data.draw_shapes(0, i, 64)[2]) for i in (0, 1)))
        for queries, told in ((most - 1, True), (most, False)):
            said = self.run_train('--scheme', 'one2one', '--overfit', '2', '--queries', str(queries), '--steps', '1',
                                  out=str(queries))
            self.assertEqual(f'up to {most} boxes, but' in said, told)
        root = coco_folder(self.root / 'coco')
        file = root / 'annotations' / 'instances_train2017.json'
        content = json.loads(file.read_text())
        first = content['annotations'][0]   # beside it a crowd and a box without an area, which do not train
        content['annotations'] += [{**first, 'id': 98, 'iscrowd': 1}, {**first, 'id': 99, 'bbox': [3, 3, 0, 5]}]
        with quiet():
            before = data.open_dataset(str(root), 'train', 64)
            file.write_text(json.dumps(content))
            after = data.open_dataset(str(root), 'train', 64)
        for n in (1, len(before)):
            self.assertEqual(data.FirstImages(after, n).most_boxes(), data.FirstImages(before, n).most_boxes())
        self.assertEqual((data.FirstImages(after, len(after)).most_boxes(), after.most_boxes()), (2, 2))

    def test_a_scheme_whose_groups_change_in_size_is_refused(self):
        def row(*, progress=0.0, **numbers):
            return matchers.query_groups(progress=progress, **{**numbers, 'n': 8 - (progress > 0.4)})
        with unittest.mock.patch.object(train, 'query_groups', row):
            self.refuses(r'--scheme one2one: groups of \[7\] queries at progress 0.50, but \[8\] at the start',
                         train.main, *SMALL, '--scheme', 'one2one', '--steps', '2', '--out', str(self.root / 'new'))

    def test_init_from_official_weights(self):
        torch.save({'model': {name: torch.zeros(shape) for name, shape in official_entries(1, 1, 8, 91, 30).items()}},
                   self.root / 'official.pth')
        printed = self.run_train('--steps', '1', '--scheme', 'one2one', '--init', str(self.root / 'official.pth'))
        self.assertRegex(printed, r'not taken from it: .*backbone\.0\.0\.0\.weight')

    def test_a_backbone_is_taken_whole_or_not_at_all(self):
        for name in ('resnet18', 'resnet34'):
            settings = train.complete({'model': name, 'pretrained': False})
            model = train.build_model(settings, 3)
            torch.save({'model': model.state_dict(), 'architecture': {}}, self.root / name)
            with quiet():
                taken = [train.what_fits(model, str(self.root / path)) for path in ('resnet18',)]
            self.assertEqual(any(entry.startswith('backbone.') for entry in taken[0]), name == 'resnet18', name)
            self.assertIn('decoder.0.ffn.linear1.weight', taken[0])

    def test_bad_input_is_one_line(self):
        root, out = coco_folder(self.root / 'coco'), self.root / 'out'
        self.run_train('--steps', '1', '--scheme', 'one2one')
        (self.root / 'code.pt').write_bytes(b'not a checkpoint')
        run = ['--out', str(out), *SMALL, '--steps', '1']
        self.refuses('--scheme one2two: choose from', train.main, *run, '--scheme', 'one2two')
        with unittest.mock.patch.dict(train.TINY_ROWS, half=dict(n=5)):   # a scheme that is half written
            self.refuses("--scheme half: unknown scheme 'half': choose from", train.main, *run, '--scheme', 'half')
        self.refuses('unknown backbone', train.main, *run, '--model', 'vgg16')
        self.refuses('data folder .*nowhere', train.main, *run, '--data', str(self.root / 'nowhere'))
        self.refuses('--K 6 with --T 0', train.main, *run, '--scheme', 'branch', '--K', '6', '--T', '0')
        self.refuses('--rho nan', train.main, *run, '--scheme', 'epoch', '--rho', 'nan')
        self.refuses('scheme group only has', train.main, *run, '--scheme', 'group', '--T', '5')
        self.refuses('84 tokens, too few', train.main, *run, '--scheme', 'one2one', '--queries', '500')
        for path in (self.root / 'run' / 'metrics.jsonl' / 'x', '/proc/x', '/dev/null'):   # not even root may
            self.refuses('cannot write into', train.main, *SMALL, '--out', str(path))
        for name in ('out', 'resume', 'init', 'samples', 'data'):
            self.refuses(f"--{name} '': is empty", train.main, *SMALL, f'--{name}', '')
        for flags in (['--save-json', ''], ['--save-json', 'x.pt'], ['--pr-curve', '']):
            self.refuses(flags[0], evaluation.main, '--weights', str(self.root / 'run' / 'checkpoint.pt'), *flags)
        self.refuses('--nms 1.5', evaluation.main, '--weights', str(self.root / 'run' / 'checkpoint.pt'), '--nms',
                     '1.5')
        self.refuses('--rho', train.main, *run, '--scheme', 'epoch', '--rho', '2')
        self.refuses('--L1 9', train.main, *run, '--scheme', 'layer', '--L1', '9')
        self.refuses('--L1 2: the decoder has 1 layers', train.main, *run, '--scheme', 'layer', '--decoder-layers', '1')
        self.refuses('--decoder-layers 0', train.main, *run, '--decoder-layers', '0')
        self.refuses('holds a run: go on with --resume', train.main, *SMALL, '--out', str(self.root / 'run'))
        self.refuses('a resumed run keeps its settings', train.main, '--resume', str(self.root / 'run'), '--scheme',
                     'group')
        self.refuses('no readable checkpoint', evaluation.main, '--weights', str(self.root / 'code.pt'))
        self.refuses('does not exist', evaluation.main, '--weights', str(self.root / 'no.pt'))
        self.refuses('is a folder: name the file in it', evaluation.main, '--weights', str(self.root / 'run'))
        self.refuses('is a file; name the folder', train.main, '--resume', str(self.root / 'run' / 'checkpoint.pt'))
        self.refuses('has none, and a resumed run', train.main, '--resume', str(self.root / 'run'), '--epochs', '3')
        self.refuses('the data has 3', evaluation.main, '--weights', str(self.root / 'run' / 'checkpoint.pt'),
                     '--data', str(root), '--device', 'cpu')
        for error in (URLError('no network'), RuntimeError('invalid hash value')):
            with unittest.mock.patch('torchvision.models._api.load_state_dict_from_url', side_effect=error):
                self.refuses('--no-pretrained', train.main, *run, '--model', 'resnet18', '--data', str(root))
        file = root / 'annotations' / 'instances_train2017.json'
        good = file.read_text()
        for change, message in ((('"image_id": 10', '"image_id": 99'), 'has the image_id 99'),
                                (('"category_id": 90', '"category_id": 91'), 'has the category_id 91'),
                                (('"width": 60', '"width": 61'),
                                 'has 60 x 40 pixels'), (('"images"', 'images'), 'no valid JSON')):
            file.write_text(good.replace(*change))
            self.refuses(message, train.main, *run, '--data', str(root), '--batch-size', '3')
        file.write_text(good)
        (root / 'train2017' / '1.png').write_bytes((root / 'train2017' / '1.png').read_bytes()[:300])
        self.refuses('cannot read the image .*1.png', train.main, *run, '--data', str(root), '--batch-size', '3')
        (root / 'train2017' / '2.png').unlink()
        self.refuses("names the image '2.png'", train.main, *run, '--data', str(root))
        (root / 'annotations' / 'instances_train2017.json').unlink()
        self.refuses('annotation file', train.main, *run, '--data', str(root))

    def test_illegal_values_of_every_flag(self):
        """The flags of the help texts, so that a new one cannot be forgotten: each ends in a line that names it."""
        # Paths, whose messages have tests of their own, and switches.
        no_value_is_illegal = {
            'help', 'compare', 'curves', 'unstable-curves', 'matches', 'data', 'out', 'resume', 'init', 'samples',
            'weights', 'save-json', 'rows', 'model', 'no-separate-attention', 'official-losses', 'dense-o2o',
            'no-mixed-selection', 'compile',
            'fixed-encoder', 'no-look-forward-twice', 'no-pretrained', 'vertical-flip', 'checkpoint-activations', 'amp',
            'per-class'}
        more = {'cost-class': ['--cost', 'focal'], 'f2': ['--cost', 'stable'], 'mal-gamma': ['--cls-loss', 'mal'],
                'K': ['--scheme', 'branch'], 'T': ['--scheme', 'branch'], 'weight': ['--scheme', 'branch'],
                'rho': ['--scheme', 'epoch'], 'L1': ['--scheme', 'layer'], 'G': ['--scheme', 'group'],
                'f1': ['--cls-loss', 'stable'], 'rescale': ['--cls-loss', 'stable']}
        above_0 = {'epochs', 'eval-every', 'clip'}
        for command in (train, evaluation):
            with quiet() as printed, self.assertRaises(SystemExit):
                command.parse(['--help'])
            flags = set(re.findall(r'--([a-zA-Z][\w-]*)', printed.getvalue().split('options:')[1]))
            flags = {flag for flag in flags if re.search(rf'^ +(-h, )?--(\[no-\])?{flag}\b', printed.getvalue(), re.M)}
            self.assertGreater(len(flags), 15)
            for flag in sorted(flags - no_value_is_illegal):
                given = [*more.get(flag, []), *(['--weights', 'x.pt'] if command is evaluation else ['--out', str(
                    self.root / 'out')])]
                for value in ('-1', 'nan', 'x', *['0'] * (flag in above_0)):
                    with self.subTest(flag=flag, value=value), contextlib.redirect_stderr(io.StringIO()) as printed:
                        try:
                            command.main([*given, f'--{flag}', value])
                        except data.UserError as error:
                            message = str(error)
                        except SystemExit as error:   # argparse: no number, or none of the choices
                            self.assertEqual(error.code, 2)
                            message = printed.getvalue().splitlines()[-1]
                        self.assertIn(f'--{flag}', message)
                        self.assertNotIn('\n', message)
        self.assertFalse((self.root / 'out').exists())

    def test_exit_code_and_nothing_half_written(self):
        done = subprocess.run([sys.executable, str(HERE / 'train.py'), '--data', str(self.root / 'nowhere'), '--out',
                               str(self.root / 'o')],
                              capture_output=True, text=True)
        self.assertEqual((done.returncode, len(done.stderr.strip().splitlines()), (self.root / 'o').exists()),
                         (1, 1, False), done.stderr)


# --- The README -----------------------------------------------------------------------------------------------------

def line_counts(file):
    """-> all lines, lines of comments and docstrings for each line of code (a line with both is code).
    Blank lines are neither."""
    text = (HERE / file).read_text()
    documented = (node for node in ast.walk(ast.parse(text)) if isinstance(
        node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None)
    comments = {line for node in documented for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith('#'):
            comments.add(token.start[0])
        elif token.string.strip() and token.type not in (tokenize.COMMENT, tokenize.ENDMARKER):
            code.update(range(token.start[0], token.end[0] + 1))
    lines = text.splitlines()
    return len(lines), sum(bool(lines[i - 1].strip()) for i in comments) / len(code - comments)


@unittest.skipUnless((HERE / 'README.md').is_file(), 'there is no README.md')   # the .py files alone, for the exercises
class TestReadme(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.text = (HERE / 'README.md').read_text()

    def test_links(self):
        """A link to a line has a text that stands in this line; one to a heading or a file finds it."""
        titles = re.findall(r'^#+ (.*)', self.text, re.M)
        anchors = {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}
        links = re.findall(r'\[([^]]*(?:\[[^]]*\][^]]*)*)\]\(([^)]+)\)', self.text)
        self.assertGreater(len([target for _, target in links if '#L' in target]), 40)
        for text, target in links:
            file, _, place = target.partition('#')
            with self.subTest(text=text, target=target):
                if not file:
                    self.assertIn(place, anchors, 'no heading with this name')
                else:
                    self.assertTrue((HERE / file).is_file(), f'{file} does not exist')
                if file and place:
                    wanted, lines = text.strip('`'), (HERE / file).read_text().splitlines()
                    self.assertIn(wanted, lines[int(place[1:]) - 1], f'it is in the lines '
                                  f'{[i for i, line in enumerate(lines, 1) if wanted in line]} of {file}')

    def test_tables_end(self):
        """Without an empty line behind it, a table takes the next paragraph for a row."""
        for row, after in zip(self.text.splitlines(), self.text.splitlines()[1:]):
            self.assertFalse(row.startswith('|') and after and not after.startswith('|'), after)

    def test_commands_are_understood(self):
        """Every command is parsed as it stands there: a flag that was renamed, or a test, is noticed."""
        # In the tables of the last section stand flags of train.py alone, from --scheme on or to be added to a scheme.
        before, last = self.text.replace('\\\n', ' ').split("## The papers' tables, small")
        text = before + re.sub(r'(\|[^|`]*)`(--[^`]*)`', r'\1`$base --scheme one2one \2`', last)
        text = re.sub(r'`(--scheme [^`]*`)', r'`python train.py \1', text)
        block = ''.join(re.split(r'^```.*\n', text, flags=re.M)[1::2])
        values = dict(re.findall(r'^ *(\w+)="([^"]*)"', block, re.M))   # small="python train.py ..."
        loops = {name: shlex.split(words) for name, words in re.findall(r'for (\w+) in (.*?); do', block)}
        values |= {name: words[0] for name, words in loops.items()}
        lines = []
        # Every loop goes through its values while the others have their first.
        for one in [{}, *({name: value} for name, words in loops.items() for value in words)]:
            filled = text
            for _ in values:
                filled = re.sub(r'\$(\w+)', lambda match: (values | one).get(match[1], '1'), filled)
            prose, block = (''.join(re.split(r'^```.*\n', filled, flags=re.M)[i::2]) for i in (0, 1))
            lines += [*re.findall(r'`([^`\n]*python [^`]*)`', prose), *block.splitlines(),
                      *re.findall(r'^    (.*python .*)', prose, re.M)]
        lines = dict.fromkeys(lines)
        commands = [part.split('#')[0].split() for line in lines for part in re.split(r'&&|;', line)]
        counted = dict.fromkeys(('train.py', 'eval.py', 'test_all.py'), 0)
        for command in commands:
            if '...' in command or 'python' not in command and command[:1] != ['torchrun']:
                continue
            place = next((i for i, word in enumerate(command) if word in counted), None)
            if place is None or re.match(r'\w+=', command[0]) or '--help' in command:
                continue
            file, flags = command[place], command[place + 1:]
            counted[file] += 1
            with self.subTest(command=' '.join(command)), contextlib.redirect_stderr(io.StringIO()) as printed:
                try:
                    if file == 'train.py':
                        given = train.parse(flags)
                        if given.get('scheme') != 'NAME':
                            train.complete({name: value for name, value in given.items() if name != 'resume'})
                    elif file == 'eval.py':
                        evaluation.parse(flags)
                    elif flags:
                        loader = unittest.TestLoader()
                        loader.loadTestsFromNames(flags, sys.modules[__name__])
                        self.assertFalse(loader.errors)
                except SystemExit:
                    self.fail(printed.getvalue().splitlines()[-1])
        self.assertTrue(counted['train.py'] > 80 and counted['eval.py'] > 10 and counted['test_all.py'] > 1, counted)

    def test_compared_runs_have_a_row(self):
        names = {*re.findall(r'`([\w+]+)`', self.text.split("## The papers' tables, small")[1])}
        for common, folders in re.findall(r'runs/(?:small|bccd)/([\w+]*)\{([^}]*)\}-\?', self.text):
            for folder in folders.split(','):   # `fast+` and `one2one` stand for fast+one2one
                self.assertTrue(common + folder in names or {common, folder} <= names, common + folder)

    def test_lines_and_comments(self):
        for file in ('matchers.py', 'losses.py', 'hybrid_detr.py', 'train.py', 'data.py', 'eval.py', 'test_all.py'):
            row = re.search(rf'^\| `{file}` \| ([\d,]+) \| ([\d.]*) \|', self.text, re.M)
            lines, density = line_counts(file)
            with self.subTest(file=file):
                self.assertIsNotNone(row, f'the table of files needs | `{file}` | {lines} | {density:.2f} |')
                self.assertEqual((row[1], row[2]), (f'{lines:,}', f'{density:.2f}' if row[2] else ''))


@unittest.skipUnless('SLOW' in os.environ, 'minutes of killing: SLOW=20 python test_all.py TestKilled')
class TestKilled(unittest.TestCase):
    """SLOW: how often the training is killed."""

    def setUp(self):
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.flags = [*SMALL, '--scheme', 'deim', '--denoising', '8', '--ffn', '32', '--dropout', '0.1', '--overfit',
                      '12', '--steps', '100000', '--eval-every', '20']   # saved every 50 steps

    def start(self, *flags, **environment):
        one_thread = {'OMP_NUM_THREADS': '1'}   # as in this process, or sums would differ in the last bits
        process = subprocess.Popen([sys.executable, str(HERE / 'train.py'), *flags], text=True,
                                   env={**os.environ, **one_thread, **environment}, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT)
        self.addCleanup(process.kill)
        return process

    def test_kill_9_at_any_moment(self):
        """Every second kill comes at a random time, the others while a checkpoint is written."""
        out, rng, before, kills = self.root / 'run', np.random.RandomState(0), 0, int(os.environ['SLOW'])
        part, checkpoint, metrics = (out / name for name in ('checkpoint.part', 'checkpoint.pt', 'metrics.jsonl'))
        for kill in range(kills):
            part.unlink(missing_ok=True)
            process = self.start(*(('--resume', str(out), '--workers', '0') if checkpoint.exists() else
                                   (*self.flags, '--out', str(out))))
            started, wait = time.monotonic(), rng.uniform(4, 16)
            # The first kill waits for a checkpoint, however slow the machine is: else there is nothing to go on from.
            while (time.monotonic() < started + wait or kill % 2 and not part.exists()
                   or kill == 0 and not checkpoint.exists()):
                self.assertIsNone(process.poll(), 'the training must run until it is killed')
                self.assertLess(time.monotonic(), started + 240)
            process.kill()
            self.assertEqual(process.communicate()[0].count('train.py:'), 0)
            step = evaluation.read_checkpoint(str(checkpoint))['step'] if checkpoint.exists() else 0
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            logged = max([json.loads(line)['step'] for line in lines if line.endswith('}')], default=0)
            print(f'kill {kill + 1}: checkpoint of step {step}, metrics up to {logged}')
            self.assertGreaterEqual(step, before)
            self.assertLessEqual(logged - step, 50, 'more than the last interval is lost')
            before = step

        def stop(_, content):   # an uninterrupted run, up to the same step
            if content['step'] == before:
                whole.update(content)
                raise KeyboardInterrupt

        whole, resumed = {}, evaluation.read_checkpoint(str(checkpoint))
        with unittest.mock.patch.object(train, 'save', stop), self.assertRaises(KeyboardInterrupt), quiet():
            train.main([*self.flags, '--out', str(self.root / 'whole')])
        for entry in ('model', 'trained_model'):
            for name, value in whole[entry].items():
                self.assertTrue(torch.equal(value, resumed[entry][name]), f'{entry} {name} differs')

    def test_interrupted_by_a_signal(self):
        out = self.root / 'run'
        process = self.start(*self.flags, '--out', str(out))
        started = time.monotonic()
        while not (out / 'metrics.jsonl').exists():
            self.assertLess(time.monotonic(), started + 120)
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=60)[0]
        self.assertEqual(process.returncode, 130, printed)
        self.assertNotIn('Traceback', printed)
        step = evaluation.read_checkpoint(str(out / 'checkpoint.pt'))['step']
        self.assertIn(f'stopped after step {step}: go on with  python train.py --resume {out}', printed)

    def test_two_processes_of_which_one_has_no_boxes(self):
        """Three images, of which the second has no box, in batches of one: one process or the other goes without."""
        port, out = str(free_port()), self.root / 'run'
        flags = [*SMALL, '--data', str(coco_folder(self.root / 'coco')), '--batch-size', '1', '--image-size', '64',
                 '--scheme', 'group', '--G', '2', '--denoising', '4', '--cls-loss', 'stable', '--steps', '4', '--out']
        both = [self.start(*flags, str(out), RANK=rank, WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT=port)
                for rank in '01']
        for process in both:
            printed = process.communicate(timeout=200)[0]
            self.assertEqual(process.returncode, 0, printed)
        records = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]
        self.assertEqual([record['step'] for record in records if 'loss' in record], [2, 4])

    def test_a_process_that_dies_ends_the_others(self):
        port, out = str(free_port()), self.root / 'run'
        one, two = (self.start(*self.flags, '--out', str(out), RANK=rank, WORLD_SIZE='2', MASTER_ADDR='localhost',
                               MASTER_PORT=port) for rank in '01')
        started = time.monotonic()
        while not (out / 'checkpoint.pt').exists():
            self.assertIsNone(one.poll(), 'the training must run until the other process is killed')
            self.assertLess(time.monotonic(), started + 120)
        two.kill()
        printed = one.communicate(timeout=60)[0]
        two.communicate()
        self.assertNotEqual(one.returncode, 0)
        self.assertRegex(printed, 'train.py: .*another process')
        self.assertGreater(evaluation.read_checkpoint(str(out / 'checkpoint.pt'))['step'], 0)

if __name__ == '__main__':
    unittest.main()
