"""All tests:  python test_all.py     (CPU, no network, below two minutes on two cores; pytest collects them, too)

The numbers in REFERENCE were computed with the public code of HDETR/H-Deformable-DETR (commit f58ceb1). Where a folder
../shared/golden lies beside this one, every array stored there is compared as well.
"""
import contextlib
import functools
import io
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
import unittest
import unittest.mock
import zlib
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.ops import box_convert, generalized_box_iou, generalized_box_iou_loss, sigmoid_focal_loss

import data
import eval as evaluation
import hybrid_detr
import losses
import matchers
import train
from hybrid_detr import HybridDETR, from_official, official_name
from matchers import Matches, QueryGroup, assign, encoder_groups, match, matching_cost, one_to_many, query_groups

HERE = Path(__file__).parent
GOLDEN = HERE.parent / 'shared' / 'golden'
BCCD = HERE.parent / 'shared' / 'bccd'


@contextlib.contextmanager
def quiet():
    """Catch what is printed; yields it as a file."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()):
        yield printed


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
GROUPS = query_groups('branch', 3, n=20, T=60, K=3)


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
        wanted = torch.as_tensor(wanted).to(value.dtype)
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
        self.same(hybrid_detr.proposals(where), 'proposals_unact', 1e-5)
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
            scale = losses.loss_scale(GROUPS, sum(map(len, labels)), outputs.pred_boxes)
            pairs = {}
            for layer in range(3):
                for branch, rows in (('', slice(0, 20)), ('_one2many', slice(20, 80))):
                    keep = (matches.layer == layer) & (matches.query >= rows.start) & (matches.query < rows.stop)
                    part = Matches(matches.layer[keep] - layer, matches.image[keep], matches.query[keep] - rows.start,
                                   matches.gt[keep])
                    values = losses.set_loss(outputs.pred_logits[layer:layer + 1, :, rows],
                                             outputs.pred_boxes[layer:layer + 1, :, rows],
                                             torch.cat(labels), torch.cat(boxes), part, scale[layer:layer + 1, rows])
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
        proposal, wanted = hybrid_detr.proposals(where), torch.from_numpy(arrays['proposals_unact'])
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
        logits, gt = torch.tensor([[[0.0, 2.0]]]), torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.4, 0.5, 0.2, 0.4]])
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
        paper = {name: query_groups(name, 6, **row) for name, row in train.PAPER_ROWS.items()}
        self.assertEqual(paper['branch'], [QueryGroup(300, (1,) * 6),
                                           QueryGroup(1500, (6,) * 6, 1.0, proposal_copies=7)])
        self.assertEqual(paper['layer'], [QueryGroup(1800, (10, 10, 10, 10, 1, 1))])
        self.assertEqual(paper['group'], [QueryGroup(300, (1,) * 6, 1 / 11)] * 11)
        with self.assertRaisesRegex(ValueError, 'unknown scheme'):
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
        printed = subprocess.run([sys.executable, str(HERE / 'matchers.py')], capture_output=True, text=True,
                                 check=True).stdout
        self.assertIn('Alice bathroom, Bob windows, Carol floors, for 15 dollars', printed)
        table = {line.split()[0]: ' '.join(line.split()) for line in printed.splitlines() if line}
        rows = [re.match(r'    q(\d) +(\d) +(\d) +(\w+ .*)', line) for line in matchers.__doc__.splitlines()]
        rows = [row for row in rows if row]
        self.assertEqual([[int(row[2]), int(row[3])] for row in rows], matchers.TOY_COST.tolist())
        for row in rows:
            self.assertEqual(' '.join(row[4].split()), table[row[4].split()[0]])
        for name, wages in zip(('Alice', 'Bob', 'Carol'), matchers.WORKERS.tolist()):
            self.assertRegex(matchers.__doc__, name + ''.join(rf' +{wage:.0f}' for wage in wages))
        # By hand, first and last layer:
        for scheme, first, last in (('one2one', 'A.B...', 'A.B...'),
                                    ('branch', 'ABBABA', 'ABBABA'),
                                    ('group', 'ABBABA', 'ABBABA'),
                                    ('epoch', 'ABBA..', 'A.B...'),
                                    ('layer', 'ABBA..', 'A.B...'),
                                    ('one2many', 'ABBA..', 'ABBA..')):
            self.assertEqual((''.join(matchers.toy(scheme, 0, 0.0)[1]), ''.join(matchers.toy(scheme, 1, 1.0)[1])),
                             (first, last), scheme)

    def test_golden_assignments(self):
        """Released code of H-DETR and of Group DETR's three implementations, on the same costs."""
        if not GOLDEN.exists():
            self.skipTest(f'{GOLDEN} is not there')
        arrays = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / 'losses_and_costs.npz').items()
                  if name.startswith(('in.', 'h.group', 'i.one2many'))}
        sizes = arrays['in.tgt_sizes'].tolist()
        labels, boxes = arrays['in.tgt_labels'].split(sizes), arrays['in.tgt_boxes'].split(sizes)
        for name, loss, prefix, groups in (('h.group_K3', 'h.group_K3.mean.total_2_5_2', 'in.',
                                            [QueryGroup(4, (1,), 1 / 3)] * 3),
                                           ('i.one2many_K3', 'i.one2many_K3.total_2_5_2', 'in.o2m_',
                                            [QueryGroup(15, (3,))])):
            logits, predicted = (arrays[prefix + field][None].requires_grad_() for field in ('logits', 'boxes'))
            matches, _ = match(logits, predicted, logits[:, :, :6], predicted[:, :, :6], labels, boxes, groups,
                               [QueryGroup(6, (1,))])
            image = torch.arange(2).repeat_interleave(arrays[name + '.assign.sizes'])
            wanted = zip(image.tolist(), arrays[name + '.assign.src'].tolist(),
                         (arrays[name + '.assign.tgt'] + 3 * image).tolist())
            self.assertEqual(sorted(zip(*(x.tolist() for x in matches[1:]))), sorted(wanted), name)
            *parts, _ = losses.set_loss(logits, predicted, arrays['in.tgt_labels'], arrays['in.tgt_boxes'], matches,
                                        losses.loss_scale(groups, 5, logits))
            sum(parts).backward()
            self.assertAlmostEqual(sum(parts).item() / float(arrays[loss + '.loss']), 1, delta=1e-6)
            for field, tensor in (('logits', logits), ('boxes', predicted)):
                self.assertTrue(torch.allclose(tensor.grad[0], arrays[f'{loss}.grad_{field}'], rtol=1e-6, atol=1e-9),
                                f'{name} {field}')


# --- Losses ---------------------------------------------------------------------------------------------------------

class TestLosses(unittest.TestCase):
    def test_focal_equals_torchvision(self):
        logits, target = torch.randn(50, 7, dtype=torch.float64), (torch.rand(50, 7) < 0.3).double()
        self.assertTrue(torch.allclose(losses.focal_loss(logits, target), sigmoid_focal_loss(logits, target, 0.25, 2)))

    def test_focal_by_hand(self):
        # p = 1/2: 1/4 * 1/4 * log 2 for a positive, 3/4 * 1/4 * log 2 for a negative.
        values = losses.focal_loss(torch.zeros(2), torch.tensor([1.0, 0.0]))
        self.assertTrue(torch.allclose(values, torch.tensor([1.0, 3.0]) / 16 * math.log(2)))

    def test_finite_at_the_extremes(self):
        logits = torch.tensor([-100.0, 100.0]).view(1, 1, 2, 1).requires_grad_()
        boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]).view(1, 1, 2, 4).requires_grad_()
        gt = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.9, 0.9, 0.1, 0.1]])   # IoU 1 and IoU 0
        index = torch.tensor([0, 0])
        for pairs in (torch.tensor([0, 1]), torch.zeros(0, dtype=torch.int64)):
            matches = Matches(index[:len(pairs)], index[:len(pairs)], pairs, pairs)
            *values, iou = losses.set_loss(logits, boxes, index, gt, matches, torch.ones(1, 2))
            sum(values).backward()
            self.assertTrue(all(v.isfinite() for v in values) and logits.grad.isfinite().all()
                            and boxes.grad.isfinite().all())
        self.assertTrue(torch.allclose(losses.pair_iou(box_convert(boxes[0, 0], 'cxcywh', 'xyxy'),
                                                       box_convert(gt, 'cxcywh', 'xyxy')), torch.tensor([1.0, 0.0])))

    def test_naive_loop_gives_the_same_loss(self):
        """One matcher and one loss per image, layer and group, written out, against all of them at once."""
        rng = np.random.default_rng(5)
        outputs, (labels, boxes) = random_outputs(rng, 3, 3, 14, 4), random_targets(rng, (3, 0, 2), 4)
        groups = [QueryGroup(6, (1, 1, 1)), QueryGroup(8, (3, 3, 1), 0.7)]
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
                divisor = weight / (copies * 5)
                naive[prefix + 'class'] += 2 * divisor * sigmoid_focal_loss(logits[b], target, 0.25, 2, 'sum')
                naive[prefix + 'l1'] += 5 * divisor * (a - c).abs().sum()
                naive[prefix + 'giou'] += 2 * divisor * (1 - generalized_box_iou(box_convert(a, 'cxcywh', 'xyxy'),
                                                                                 box_convert(c, 'cxcywh',
                                                                                             'xyxy')).diag()).sum()
        for name, value in parts.items():
            self.assertAlmostEqual(float(value), float(naive[name]), places=4, msg=name)


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
        boxes[1] = boxes[0]    # tokens can be told by their boxes
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
        self.assertEqual((min(counts), max(counts)), (1, 12))

    def test_ids_there_and_back(self):
        with quiet() as printed:
            dataset = data.CocoFolder(coco_folder(self.root), 'train', 40)
        self.assertEqual(dataset.categories.ids, [1, 7, 90])
        self.assertEqual([dataset[0, i].labels.tolist() for i in range(3)], [[0, 2], [], [1]])
        self.assertIn('2 of 5 boxes', printed.getvalue())
        self.assertIn('2.png', printed.getvalue())
        self.assertEqual([a['category_id'] for a in dataset.coco_json()['annotations']], [1, 90, 7, 7, 7])

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
        whole = [key for batch in data.TrainBatches(10, 4, 8, seed=1) for key in batch]
        self.assertEqual(sorted(index for _, index in whole[:10]), list(range(10)),
                         'an epoch must show every image once')
        self.assertNotEqual(whole[:10], [(0, i) for _, i in whole[10:20]])
        self.assertEqual([key for batch in data.TrainBatches(10, 4, 8, seed=1, start=3) for key in batch], whole[12:])
        halves = [list(data.TrainBatches(10, 2, 8, seed=1, rank=rank, world=2)) for rank in (0, 1)]
        self.assertEqual([key for pair in zip(*halves) for batch in pair for key in batch], whole)


# --- Training and evaluation, from the command line -----------------------------------------------------------------

SMALL = ['--image-size', '64', '--batch-size', '2', '--queries', '8', '--workers', '0', '--device', 'cpu']


class TestCommands(unittest.TestCase):
    def setUp(self):
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))
        real = data.ShapesDataset   # with fewer images, quick to go through
        self.enterContext(unittest.mock.patch.object(data, 'ShapesDataset', lambda split, length, size,
                                                     seed: real(split, 12, size, seed)))

    def run_train(self, *flags, out='run'):
        with quiet() as printed:
            train.main([*flags] if '--resume' in flags else [*SMALL, '--out', str(self.root / out), *flags])
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
        flags = ['--scheme', 'group', '--G', '2', '--steps', '12', '--dropout', '0.1']
        self.run_train(*flags, out='whole')
        saved, real = [], train.save

        def stop_after_first(path, content):
            real(path, content)
            saved.append(1)
            raise KeyboardInterrupt

        with unittest.mock.patch.object(train, 'save', stop_after_first), self.assertRaises(KeyboardInterrupt):
            self.run_train(*flags, out='stopped')
        printed = self.run_train('--resume', str(self.root / 'stopped'))
        self.assertIn('steps 4 to 12', printed)
        lines = (self.root / 'stopped' / 'metrics.jsonl').read_text().splitlines()
        self.assertEqual([r['step'] for r in map(json.loads, lines) if 'AP' in r], [4, 8, 12],
                         'evaluations at every third')
        # Stopped between the last checkpoint and its evaluation: resuming makes up for it.
        (self.root / 'stopped' / 'metrics.jsonl').write_text('\n'.join(lines[:-1]) + '\n{"step": 12, "AP"')
        self.assertIn('Average Precision', self.run_train('--resume', str(self.root / 'stopped')))
        self.assertEqual(len((self.root / 'stopped' / 'metrics.jsonl').read_text().splitlines()), len(lines))
        whole, resumed = (evaluation.read_checkpoint(str(self.root / name / 'checkpoint.pt'))
                          for name in ('whole', 'stopped'))
        for name, value in whole['model'].items():
            self.assertTrue(torch.equal(value, resumed['model'][name]), f'{name} differs after a resumed run')

    def test_every_scheme_and_ablation_overfits_two_images(self):
        for scheme, *flags in (('one2one',), ('branch', '--T', '16', '--K', '2'), ('group', '--G', '2'),
                               ('epoch', '--K', '2', '--rho', '0.5', '--queries', '24'),
                               ('layer', '--K', '2', '--L1', '1', '--queries', '24'),
                               ('one2many', '--K', '2', '--queries', '24'),
                               ('group', '--G', '2', '--no-separate-attention'), ('group', '--G', '2', '--selection',
                                                                                  'ranks'),
                               ('branch', '--T', '8', '--K', '1', '--selection', 'distinct')):
            out = '-'.join((scheme, *flags))
            self.run_train('--overfit', '2', '--steps', '120', '--scheme', scheme, *flags, '--lr', '3e-3', '--ffn',
                           '64',
                           '--eval-every', '120', out=out)
            records = [json.loads(line) for line in (self.root / out / 'metrics.jsonl').read_text().splitlines()]
            self.assertGreater([r['matched_iou'] for r in records if 'loss' in r][-1], 0.9,
                               f'{out} does not fit two images')

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
        iou, score, count, unmatched, pairs = train.matching_stats(outputs, matches, torch.tensor([0]),
                                                                   torch.tensor([0.6, 0.9]), 2).tolist()
        self.assertAlmostEqual(iou, 0.6, places=6)
        self.assertAlmostEqual(score, 0.5, places=6, msg='the score of the matched class, not the largest')
        self.assertAlmostEqual(unmatched, 1 / (1 + math.exp(-2)), places=6)
        self.assertEqual((count, pairs), (1, 2))

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
        self.run_train(*run, '--init', str(self.root / 'run' / 'checkpoint.pt'), out='new')

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
        self.refuses('unknown backbone', train.main, *run, '--model', 'vgg16')
        self.refuses('data folder .*nowhere', train.main, *run, '--data', str(self.root / 'nowhere'))
        self.refuses('--K 6 with --T 0', train.main, *run, '--scheme', 'branch', '--K', '6', '--T', '0')
        self.refuses('--rho nan', train.main, *run, '--scheme', 'epoch', '--rho', 'nan')
        self.refuses('scheme group only has', train.main, *run, '--scheme', 'group', '--T', '5')
        self.refuses('84 tokens, too few', train.main, *run, '--scheme', 'one2one', '--queries', '500')
        self.refuses('there is a file in the way', train.main, *SMALL, '--out',
                     str(self.root / 'run' / 'metrics.jsonl' / 'x'))
        self.refuses('--nms 1.5', evaluation.main, '--weights', str(self.root / 'run' / 'checkpoint.pt'), '--nms',
                     '1.5')
        self.refuses('--rho', train.main, *run, '--scheme', 'epoch', '--rho', '2')
        self.refuses('--L1 9', train.main, *run, '--scheme', 'layer', '--L1', '9')
        self.refuses('holds a run: go on with --resume', train.main, *SMALL, '--out', str(self.root / 'run'))
        self.refuses('a resumed run keeps its settings', train.main, '--resume', str(self.root / 'run'), '--scheme',
                     'group')
        self.refuses('no readable checkpoint', evaluation.main, '--weights', str(self.root / 'code.pt'))
        self.refuses('does not exist', evaluation.main, '--weights', str(self.root / 'no.pt'))
        self.refuses('the data has 3', evaluation.main, '--weights', str(self.root / 'run' / 'checkpoint.pt'),
                     '--data', str(root), '--device', 'cpu')
        for error in (URLError('no network'), RuntimeError('invalid hash value')):
            with unittest.mock.patch('torchvision.models._api.load_state_dict_from_url', side_effect=error):
                self.refuses('--no-pretrained', train.main, *run, '--model', 'resnet18', '--data', str(root))
        file = root / 'annotations' / 'instances_train2017.json'
        good = file.read_text()
        for change, message in ((('"image_id": 10', '"image_id": 99'), 'names image 99'),
                                (('"category_id": 90', '"category_id": 91'), 'has category 91'),
                                (('"width": 60', '"width": 61'),
                                 'has 60 x 40 pixels'), (('"images"', 'images'), 'no valid JSON')):
            file.write_text(good.replace(*change))
            self.refuses(message, train.main, *run, '--data', str(root), '--batch-size', '3')
        file.write_text(good)
        (root / 'train2017' / '1.png').write_bytes((root / 'train2017' / '1.png').read_bytes()[:300])
        self.refuses('cannot read the image .*1.png', train.main, *run, '--data', str(root), '--batch-size', '3')
        (root / 'train2017' / '2.png').unlink()
        self.refuses('names the image 2.png', train.main, *run, '--data', str(root))
        (root / 'annotations' / 'instances_train2017.json').unlink()
        self.refuses('annotation file', train.main, *run, '--data', str(root))

    def test_exit_code_and_nothing_half_written(self):
        done = subprocess.run([sys.executable, str(HERE / 'train.py'), '--data', str(self.root / 'nowhere'), '--out',
                               str(self.root / 'o')],
                              capture_output=True, text=True)
        self.assertEqual((done.returncode, len(done.stderr.strip().splitlines()), (self.root / 'o').exists()),
                         (1, 1, False), done.stderr)


if __name__ == '__main__':
    unittest.main()
