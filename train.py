"""Train a detector with any matching scheme:  python train.py --scheme group

SETTINGS holds every setting of a run, `train` is the loop, and
`loss_of` is the loss of a batch.

`torchrun --nproc_per_node=W` starts W processes. Each one has
--batch-size images of its own. `machine` holds `rank` (the
process number), `world` (W) and the flags that are not settings.

matchers.py explains the letters.
"""
import argparse
import contextlib
import copy
import itertools
import json
import math
import os
import shlex
import signal
import sys
import tempfile
import time
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import box_convert, roi_align
from tqdm import tqdm

import eval as evaluation
from data import (DENSE, SHAPES, Categories, DenseOneToOne, ShapesDataset, UserError,
                  open_dataset, train_loader)
from eval import flag
from hybrid_detr import (
    PARTS, DeformableAttention, HybridDETR, Outputs, TinyBackbone, TooFewTokens,
    deformable_attention, official_name, parameter_groups, parts_of)
from losses import CLASS_WEIGHTS, F1, LossSettings, criterion
from matchers import (NUMBER_HELP, NUMBERS, Cost, denoising_queries, encoder_groups,
                      expected_positives, match, matching_stats, query_groups)


# --- Settings ---

class Row(NamedTuple):
    """A row of SETTINGS: one setting of a run, and its flag.

    default: a value, a pair (tiny, other models), or a function of
    the settings.
    needs: the setting (name, value) that the flag requires.
    kind: the type, if the default does not show it.
    bare: the value if the flag stands alone.
    """
    default: object
    help: str
    low: float = 0
    high: float = 1e9
    choices: tuple | dict = ()
    needs: tuple = ()
    kind: type | None = None
    bare: object = None


# A preset is one2one with a paper's switches. They work with
# every scheme. Both papers use `denoising`.
PRESETS = {
    'stable': dict(cls_loss='stable', cost='stable', fusion='dense', denoising=100),
    # tiny has 100 queries, not 50: a mosaic holds four images.
    'deim': dict(cls_loss='mal', dense_o2o=True, schedule='flat-cosine',
                 ema=(0.98, 0.9999), denoising=100, n=(100, 300)),
}

SETTINGS = {
    'what to train': dict(
        scheme=Row('branch', 'matching scheme; stable, deim: one2one with the switches below',
                   choices=(*NUMBERS, *PRESETS)),
        data=Row('shapes', 'shapes (drawn), or a COCO folder'),
        model=Row('tiny', 'tiny, r50, or a ResNet or Swin of torchvision'),
        overfit=Row(0, 'train and evaluate on the first N images')),
    "the scheme's numbers (defaults: matchers.NUMBERS)": dict(
        {name: Row(None, *row, kind=query_groups.__annotations__[name])
         for name, row in NUMBER_HELP.items()},
        selection=Row(
            lambda s: 'heads' if s['scheme'] == 'group' and not s['one_stage'] else 'ranks',
            'proposals of a group. ranks: the next best of a shared head; heads: the best of '
            'its own head (default of group); distinct: as heads, but no token twice',
            choices=('ranks', 'heads', 'distinct'), needs=('one_stage', False)),
        separate_attention=Row(True, 'no attention between groups in training')),
    'Stable-DINO and DEIM, with every scheme': dict(
        cls_loss=Row('focal', 'classification loss', choices=CLASS_WEIGHTS),
        class_weight=Row(lambda s: CLASS_WEIGHTS[s['cls_loss']],
                         'weight of --cls-loss (default 1; focal 2, stable 6)', kind=float),
        mal_gamma=Row(1.5, 'mal: target score is IoU^N', 1, 100, needs=('cls_loss', 'mal')),
        f1=Row('s2', 'stable: target score; s2p1: IoU^2 * score', choices=F1,
               needs=('cls_loss', 'stable')),
        rescale=Row('one', 'stable: scale the largest target to this',
                    choices=('one', 'max-iou', 'none'), needs=('cls_loss', 'stable')),
        official_losses=Row(False, "the released code's vfl, mal, stable"),
        cost=Row('focal', 'matching cost; stable: score * quality', choices=('focal', 'stable')),
        cost_class=Row(lambda s: 1.0 if s['cls_loss'] == 'ce' else 2.0,
                       'weight of the class cost (default 2; ce 1)', kind=float),
        f2=Row(0.5, 'stable cost: exponent of the box quality', 0, 100, needs=('cost', 'stable')),
        fusion=Row('none', 'join backbone and encoder features',
                   choices=('none', 'simple', 'ulike', 'dense')),
        denoising=Row(0, 'noisy ground truths as queries (no N: 100)', 0, 10_000, bare=100),
        dense_o2o=Row(False, 'mosaic and mixup from 7 to 57 %% of training'),
        ema=Row(0.0, 'evaluate and save averaged weights, decay N (no N: tiny 0.98, else '
                '0.9999)', 0, 1, bare=(0.98, 0.9999))),
    'model, with the switches of H-DETR Table 8': dict(
        decoder_layers=Row((3, 6), 'number of decoder layers', 1, 100),
        ffn=Row((256, 2048), 'feed-forward width', 1, 100_000),
        dropout=Row(0.0, 'dropout rate in the transformer', 0, 1),
        one_stage=Row(False, 'learned queries instead of proposals'),
        mixed_selection=Row(True, 'query content is learned', needs=('one_stage', False)),
        look_forward_twice=Row(True, 'box loss also trains the previous head'),
        pretrained=Row((False, True), 'ImageNet backbone with fixed batch norm')),
    'optimisation (tiny on photographs: 2800 steps of 4, size 192, lr 0.0007)': dict(
        image_size=Row((128, 800), 'largest short side', 64, 10_000),
        vertical_flip=Row(False, 'also flip images upside down'),
        batch_size=Row((16, 2), 'images per batch and process', 1),
        accumulate=Row(1, 'batches per step; their gradients add up', 1),
        epochs=Row((None, 12.0), 'passes over the images', 1e-9, kind=float),
        steps=Row((600, None), 'steps instead of epochs', 1, kind=int),
        lr=Row((1e-3, 2e-4), 'learning rate'),
        schedule=Row(('cosine', 'step'), 'step: at the end, lr falls to a tenth; cosine: to 0; '
                     'flat-cosine: constant, then to a half',
                     choices=('step', 'cosine', 'flat-cosine')),
        # DEIM warms up for 2000 of 440,000 steps.
        warmup=Row((0.05, lambda s: 0.005 if s['schedule'] == 'flat-cosine' else 0.0),
                   'part of training with rising lr (default tiny 0.05; else 0, flat-cosine 0.005)',
                   0, 1, kind=float),
        weight_decay=Row(1e-4, 'weight decay of AdamW'),
        clip=Row(0.1, 'largest norm of the gradient', 1e-9),
        seed=Row(0, 'seed of everything random', 0, 2 ** 31 - 1)),
    'start and evaluation': dict(
        init=Row(None, 'start from the weights of this file that fit', kind=str),
        init_part=Row('all', 'take only this part from --init', choices=PARTS),
        fixed_encoder=Row(False, 'do not train what --init-part takes'),
        eval_every=Row(None, 'epochs per evaluation (default a third of all)', 1e-9, kind=float),
        unstable=Row(0, '%% of objects that change their query between layers, on N images')),
}
ROWS = {name: row for rows in SETTINGS.values() for name, row in rows.items()}

# tiny's defaults on photographs.
PHOTOS = dict(image_size=192, batch_size=4, steps=2800, lr=7e-4)
TINY_MODEL = dict(width=96, heads=4, encoder_layers=2, levels=3)
PAPER_MODEL = dict(width=256, heads=8, encoder_layers=6, levels=4)
# Steps (tiny, others). DEIM's code has 2000.
AVERAGE_WARMUP = (20, 2000)
LOG_EVERY = 50  # steps


def pick(value, is_tiny):
    """Choose from a pair (tiny, other models). Other values stay."""
    return value[0 if is_tiny else 1] if isinstance(value, tuple) else value


def add_settings(parser):
    """Add a flag for each row of SETTINGS.

    Flags that are not given are absent from the result.
    """
    for title, rows in SETTINGS.items():
        group = parser.add_argument_group(title, argument_default=argparse.SUPPRESS)
        for name, row in rows.items():
            tiny, other = pick(row.default, True), pick(row.default, False)
            kind, text = row.kind or type(other), row.help
            if row.choices or kind is str:
                options = dict(choices=row.choices or None)
            elif kind is bool:
                options = dict(action=argparse.BooleanOptionalAction)
            else:
                options = dict(type=evaluation.number(kind, row.low, row.high), metavar='N')
            if row.bare is not None:
                options |= dict(nargs='?', const=row.bare)
            if not callable(other) and (tiny, other) != (None, None):
                text += f' (default {other if tiny == other else f"tiny {tiny}, else {other}"})'
            group.add_argument(flag(name), dest=name, help=text, **options)


def complete(given):
    """Fill in the settings that were not given.

    Raises UserError for flags that contradict each other or have
    no effect.
    """
    scheme, is_tiny = given.get('scheme', 'branch'), given.get('model', 'tiny') == 'tiny'
    photos = PHOTOS if is_tiny and given.get('data', 'shapes') != 'shapes' else {}
    numbers = pick(NUMBERS['one2one' if scheme in PRESETS else scheme], is_tiny)
    s = {name: row.default for name, row in ROWS.items() if name not in NUMBER_HELP}
    # The later dict wins.
    s |= photos | numbers | PRESETS.get(scheme, {}) | given
    s = {name: pick(value, is_tiny) for name, value in s.items()}
    # Some defaults depend on other settings.
    s |= {name: value(s) for name, value in s.items() if callable(value)}
    # --overfit takes images as they are.
    if s['overfit'] and 'dense_o2o' not in given:
        s['dense_o2o'] = False
    if 'steps' in given:
        s['epochs'] = None
    elif 'epochs' in given:
        s['steps'] = None
    for name in given:
        if (needs := ROWS[name].needs) and s[needs[0]] != needs[1]:
            raise UserError(f'{flag(name, s[name])}: only {flag(*needs)} has it')
        if name in NUMBER_HELP and name not in numbers:
            raise UserError(f'{flag(name, s[name])}: scheme {scheme} only has '
                            f'{", ".join(map(flag, numbers))}')
    # In these losses and the stable cost, paper and code differ.
    has_two_forms = (s['cls_loss'] in ('vfl', 'mal', 'stable')
                     or s['cost'] == 'stable' and s['cls_loss'] != 'ce')
    for name, is_wrong, reason in (
            ('steps', 'steps' in given and 'epochs' in given, 'not with --epochs'),
            ('official_losses', s['official_losses'] and not has_two_forms,
             'loss and cost have one form only'),
            ('init_part', s['init_part'] != 'all' and not s['init'], 'needs --init FILE'),
            ('fixed_encoder', s['fixed_encoder'] and s['init_part'] == 'all',
             'needs --init-part encoder'),
            ('pretrained', s['pretrained'] and is_tiny, 'tiny has no such weights'),
            ('vertical_flip', s['vertical_flip'] and s['data'] == 'shapes'
             and not s['dense_o2o'], 'only --dense-o2o augments shapes'),
            ('dense_o2o', s['overfit'] and s['dense_o2o'], '--overfit augments nothing'),
            ('warmup', s['schedule'] == 'flat-cosine' and s['warmup'] > DENSE[1],
             f'flat-cosine allows {DENSE[1]:.2f} at most'),
            ('L1', s.get('L1', 0) > s['decoder_layers'],
             f'the decoder has {s["decoder_layers"]} layers')):
        if is_wrong:
            raise UserError(f'{flag(name, s[name])}: {reason}')
    return s


def scheme_of(settings):
    """The arguments of matchers.query_groups, except progress."""
    scheme = 'one2one' if settings['scheme'] in PRESETS else settings['scheme']
    return dict(scheme=scheme, layers=settings['decoder_layers'],
                **{name: settings[name] for name in NUMBER_HELP if name in settings})


def architecture(settings, num_classes):
    """The arguments of HybridDETR, which a checkpoint stores."""
    model = settings['model']
    switches = [name for name in HybridDETR.__init__.__annotations__ if name in settings]
    return dict(num_classes=num_classes, softmax=settings['cls_loss'] == 'ce',
                groups=[group.queries for group in query_groups(**scheme_of(settings))],
                backbone='resnet50' if model == 'r50' else model,
                frozen_backbone=settings['pretrained'], two_stage=not settings['one_stage'],
                **{name: settings[name] for name in switches},
                **(TINY_MODEL if model == 'tiny' else PAPER_MODEL))


class Recipe(NamedTuple):
    """Settings of a step, besides its groups."""
    cost: Cost
    loss: LossSettings
    denoising: int  # noisy ground truths of an image; 0 is none
    accumulate: int  # batches of a step
    amp: bool  # forward pass in bfloat16


class Plan:
    """The length of a run and of its parts, in steps."""

    def __init__(self, settings, images, world):
        self.batch_size = min(settings['batch_size'], images)  # in each process
        self.step_images = self.batch_size * world * settings['accumulate']
        # Rounded down, but the loader uses every image.
        self.epoch = max(1, images // self.step_images)
        self.steps = settings['steps'] or math.ceil(settings['epochs'] * self.epoch)
        every = settings['eval_every']
        self.eval_every = math.ceil(every * self.epoch if every else self.steps / 3)
        # An epoch, rounded up to a multiple of LOG_EVERY.
        self.save_every = LOG_EVERY * math.ceil(self.epoch / LOG_EVERY)

    def is_evaluated(self, done):
        return done % self.eval_every == 0 or done == self.steps


# --- The loop ---

def train(settings, folder, checkpoint, machine):
    """Train, evaluate and save, from the first step to the last.

    checkpoint: the content of a resumed run's file, or None.
    """
    torch.manual_seed(settings['seed'])
    train_set, val_set = open_data(settings)
    conditions = conditions_of(checkpoint, folder, train_set, machine)
    design = architecture(settings, len(train_set.categories))
    model, average, optimizer, start = model_and_optimizer(
        settings, design, folder, checkpoint, machine)
    # `evaluated` is saved. `parallel` computes the gradients.
    evaluated, parallel = average or model, model
    if machine.world > 1:
        dist.init_process_group('nccl' if machine.on_gpu else 'gloo')
        parallel = DistributedDataParallel(
            model, device_ids=[machine.device] if machine.on_gpu else None)
    plan, accumulate = Plan(settings, conditions['images'], machine.world), settings['accumulate']
    loss = LossSettings(*(settings[name] for name in LossSettings._fields[:5]),
                        settings['official_losses'])
    recipe = Recipe(evaluation.cost_of(settings), loss, settings['denoising'], accumulate,
                    conditions['amp'])
    loader = iter(train_loader(
        train_set, plan.batch_size, plan.steps * accumulate, machine.workers,
        settings['seed'], start * accumulate, machine.rank, machine.world,
        pin=machine.on_gpu, dense_part=DENSE if settings['dense_o2o'] else None))
    if machine.rank == 0:
        describe(settings, folder, plan, start, machine)
    journal = Journal(folder, plan, machine, start if checkpoint else None)
    # The run may have stopped just before an evaluation.
    if start and plan.is_evaluated(start) and journal.lacks_evaluation:
        journal.evaluate(start, evaluated, val_set, settings)
    bar = tqdm(range(start, plan.steps), initial=start, total=plan.steps,
               disable=machine.rank > 0, mininterval=1 if sys.stderr.isatty() else 30)

    for step in bar:
        # `step` alone decides learning rate, groups, images, dropout
        # and noise. On a CPU, a resumed run therefore equals an
        # uninterrupted one to the bit.
        progress, done = step / plan.steps, step + 1
        for parameters in optimizer.param_groups:
            parameters['lr'] = parameters['base_lr'] * lr_factor(settings, progress)
        torch.manual_seed((settings['seed'] * plan.steps + step) * machine.world + machine.rank)
        # In the decoder, this list is the whole scheme.
        groups = query_groups(progress=progress, **scheme_of(settings))

        batches = [next(loader) for _ in range(accumulate)]
        num_boxes = boxes_of_step(batches, machine)

        optimizer.zero_grad()
        # name -> sum over the batches
        numbers = {}
        for i, batch in enumerate(batches):
            # DDP: exchange gradients once a step.
            parallel.require_backward_grad_sync = i == accumulate - 1
            try:
                parts, stats = loss_of(parallel, batch.to(machine.device), groups, recipe,
                                       num_boxes)
            except (TooFewTokens, FloatingPointError) as error:
                raise failed(step, error, batch.names) from None
            # The gradients of the batches add up.
            sum(parts.values()).backward()
            for name, value in (parts | stats).items():
                numbers[name] = numbers.get(name, 0) + value.detach()
        # The losses of all layers are summed, so 0.1 clips nearly always.
        numbers['gradient_norm'] = nn.utils.clip_grad_norm_(model.parameters(), settings['clip'])
        optimizer.step()
        if average:
            update_average(average, model, done, settings['ema'],
                           pick(AVERAGE_WARMUP, settings['model'] == 'tiny'))

        # Speed: the numbers stay on the GPU until they are logged.
        names = [name for batch in batches for name in batch.names]
        journal.recent.append((step, numbers, names))
        # Read once: Ctrl-C may come at any time.
        is_interrupted = bool(INTERRUPTS)
        is_saved = is_interrupted or plan.is_evaluated(done) or done % plan.save_every == 0
        if done % LOG_EVERY == 0 or is_saved:
            bar.set_postfix(journal.log(done, optimizer, {model, evaluated}))
        if is_saved and machine.rank == 0:
            content = {'model': evaluated.state_dict(), 'optimizer': optimizer.state_dict(),
                       'trained_model': model.state_dict() if average else None, 'step': done,
                       'settings': settings, 'architecture': design, **conditions}
            replace(folder / 'checkpoint.pt', lambda part: torch.save(content, part))
        if is_interrupted:
            del loader  # its processes end
            print(f'\nstopped after step {done}: python train.py --resume '
                  f'{shlex.quote(str(folder))} goes on')
            sys.exit(128 + INTERRUPTS[0])
        # The model is saved, so a failed evaluation loses nothing.
        if plan.is_evaluated(done):
            journal.evaluate(done, evaluated, val_set, settings)

    if machine.rank == 0:
        picture = folder / 'predictions.png'
        evaluation.draw_predictions(evaluated, val_set, val_set.categories.ids, picture)
        print(f'look at {picture}')
    if machine.world > 1:
        # Delete the model before its process group, or threads of
        # both may wait for each other.
        del parallel
        dist.destroy_process_group()


# --- A step ---

def loss_of(model, batch, groups, recipe, num_boxes):
    """Forward pass, matching and loss of a batch.

    model: the detector, or DistributedDataParallel around it.
    num_boxes: the divisor, see `boxes_of_step`.
    Returns the weighted parts of the loss, and `matching_stats`.
    Raises TooFewTokens for images too small for the queries, and
    FloatingPointError for predictions that are not finite.
    """
    detector = getattr(model, 'module', model)
    truths = batch.gt_labels, batch.gt_boxes
    noised = None
    if recipe.denoising:
        noised = denoising_queries(*truths, detector.num_classes, recipe.denoising)
        groups = [*groups, noised.query_group(len(detector.decoder))]
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=recipe.amp):
        outputs = model(batch.images, batch.padding_mask, noised=noised)
    # In bfloat16, with 8 significant bits, many costs would be equal.
    outputs = Outputs(*(x.float() for x in outputs))
    # The encoder is trained as well: its best proposals become queries.
    heads = max(1, len(detector.encoder_class_heads))  # E (one-stage: 1)
    tokens = outputs.encoder_logits.shape[2] // heads  # S
    proposals = encoder_groups(groups, heads, tokens)  # groups of E*S
    matches, encoder_matches = match(*outputs, *truths, groups, proposals, recipe.cost)
    parts, iou = criterion(outputs, *truths, matches, encoder_matches, groups, proposals,
                           num_boxes, recipe.loss)
    # ce is a mean over its batch, so batches are averaged.
    if recipe.loss.cls_loss == 'ce':
        parts['class'] = parts['class'] / recipe.accumulate
    return parts, matching_stats(outputs, matches, torch.cat(batch.gt_labels), iou,
                                 detector.groups, detector.softmax)


def boxes_of_step(batches, machine):
    """The number of boxes that divides the loss of a step.

    All batches of a step count together, so every box has the same
    weight. The number is averaged over processes, as gradients are.
    """
    num_boxes = float(sum(len(boxes) for batch in batches for boxes in batch.gt_boxes))
    if machine.world > 1:
        # Speed: torch.tensor would wait for the GPU.
        num_boxes = torch.full((), num_boxes / machine.world, device=machine.device)
        dist.all_reduce(num_boxes)
    return num_boxes


# --- What changes with time ---

def lr_factor(settings, progress):
    """The factor of the learning rate at `progress` 0..1 of training."""
    schedule, warmup = settings['schedule'], settings['warmup']
    # Warm-up: at first Adam knows too few gradients to scale steps.
    if progress < warmup and schedule == 'flat-cosine':
        # DEIM's code: the first step does nothing.
        return (progress / warmup) ** 2
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    if schedule == 'step':
        # Official codes: after epoch 11 of 12, 20 of 24, 30 of 36.
        fall = 11 / 12 if (settings['epochs'] or 12) <= 12 else 5 / 6
        return 1.0 if progress < fall else 0.1
    if schedule == 'flat-cosine':
        # DEIM's code: 1 until mosaic and mixup end, then a cosine
        # down to 1/2 at 58/60 of training.
        flat, span, low = DENSE[1], 58 / 60 - DENSE[1], 0.5
    else:
        # A cosine from 1 after the warm-up to 0. 1e-9 avoids 0 / 0.
        flat, span, low = warmup, 1 - warmup + 1e-9, 0.0
    along = min(max((progress - flat) / span, 0.0), 1.0)
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * along))


@torch.no_grad()
def update_average(average, model, step, decay, warmup):
    """Update the moving average, as in DEIM's code.

        average = d * average + (1-d) * model
        d = decay * (1 - exp(-step / warmup)),   step = 1, 2, ...

    At first d is near 0, so the initial weights are forgotten.
    """
    d = decay * (1 - math.exp(-step / warmup))
    # state_dict() holds the tensors themselves, not copies.
    for mean, new in zip(average.state_dict().values(), model.state_dict().values()):
        if mean.is_floating_point():
            mean.lerp_(new, 1 - d)
        else:
            mean.copy_(new)


# --- The start of a run ---

def open_data(settings):
    """Open the training set and the validation set.

    Raises UserError if their categories differ.
    """
    name, size, flip, seed = (settings[key] for key in (
        'data', 'image_size', 'vertical_flip', 'seed'))
    train_set = val_set = open_dataset(name, 'train', size, True, flip, seed, settings['overfit'])
    if not settings['overfit']:
        val_set = open_dataset(name, 'val', size, seed=seed)
    if train_set.most_boxes > settings['n']:
        print(f'{name}: {train_set.most_boxes} boxes in an image, but {settings["n"]} --queries')
    if difference := train_set.categories.difference(val_set.categories):
        raise UserError(f'{name}: categories of training and validation differ: {difference}')
    if settings['dense_o2o']:
        train_set = DenseOneToOne(train_set, size, flip, seed)
    return train_set, val_set


def conditions_of(checkpoint, folder, train_set, machine):
    """Return what a checkpoint keeps besides the settings.

    The number of images may change, but epochs keep their length.
    Raises UserError if anything else differs.
    """
    amp, categories = machine.amp, train_set.categories
    if amp is None:
        amp = checkpoint['amp'] if checkpoint else (
            machine.on_gpu and torch.cuda.is_bf16_supported(including_emulation=False))
    conditions = {'categories': {'ids': categories.ids, 'names': categories.names},
                  'images': len(train_set), 'processes': machine.world, 'amp': amp}
    if not checkpoint:
        return conditions
    if difference := Categories(**checkpoint['categories']).difference(categories):
        raise UserError(f'{folder} and data have different categories: {difference}')
    if checkpoint['images'] != len(train_set):
        print(f'{folder} began with {checkpoint["images"]} images and now has '
              f'{len(train_set)}: it no longer equals an uninterrupted run')
    for name in ('processes', 'amp'):
        if checkpoint[name] != conditions[name]:
            raise UserError(f'{folder} has {name} {checkpoint[name]}, not {conditions[name]}: '
                            'use --init')
    return conditions | {'images': checkpoint['images']}


def model_and_optimizer(settings, design, folder, checkpoint, machine):
    """Return model, moving average (or None), optimizer and step.

    They are new, or come from `checkpoint`.
    Raises UserError for an unknown backbone.
    """
    try:
        model = HybridDETR(**design)
    except ValueError as error:
        raise UserError(f'--model {settings["model"]}: {error}') from None
    if not checkpoint:
        load_initial(model, settings)
    model.to(machine.device).train()
    model.checkpoint_activations = machine.checkpoint_activations
    if settings['fixed_encoder']:
        # In train() batch norm would still change.
        for module in parts_of(model.named_modules(), settings['init_part']).values():
            module.eval()
        for weight in parts_of(model.named_parameters(), settings['init_part']).values():
            weight.requires_grad_(False)
    groups = parameter_groups(model, settings['lr'], settings['pretrained'])
    optimizer = torch.optim.AdamW(groups, weight_decay=settings['weight_decay'], fused=True)
    # Speed: convolutions are faster with this layout.
    model.backbone.to(memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False) if settings['ema'] else None
    for module in model.modules():
        if machine.compile and isinstance(module, DeformableAttention):
            module.core = torch.compile(deformable_attention)
    with reading(folder):
        start = restore(checkpoint, model, average, optimizer) if checkpoint else 0
    return model, average, optimizer, start


def load_initial(model, settings):
    """Load the weights of --init and of ImageNet, if asked for.

    Entries of --init are taken if name and shape fit. The file may
    be official. A backbone is taken whole or not at all.
    Raises UserError for weights that are missing or do not fit.
    """
    path, part, taken = settings['init'], settings['init_part'], {}
    if path:
        ours, theirs = model.state_dict(), evaluation.read_checkpoint(path)['model']
        # The names of an official file become ours.
        layers = {name.split('.')[3] for name in theirs if '.decoder.layers.' in name}
        names = {official_name(name, len(layers)): name for name in ours}
        theirs = {names.get(name, name): x for name, x in theirs.items()}
        taken = {name: x for name, x in theirs.items()
                 if name in ours and x.shape == ours[name].shape}
        # A backbone that fits only in part is left out.
        if len({len(parts_of(x, 'backbone')) for x in (ours, theirs, taken)}) > 1:
            taken = {name: x for name, x in taken.items() if not name.startswith('backbone')}
        taken = parts_of(taken, part)
        if not taken:
            raise UserError(f'--init {path}: none of its entries fits the model')
        print(f'{path}: {len(taken)} of {len(ours)} entries are taken. Not taken:',
              *[name for name in ours if name not in taken][:8])
        missing = parts_of(model.named_parameters(), part).keys() - taken.keys()
        if missing and settings['fixed_encoder']:
            raise UserError(f'--init-part {part}: {path} lacks {min(missing)}')
    if settings['pretrained'] and not parts_of(taken, 'backbone'):
        try:
            model.backbone.load_imagenet()
        except (OSError, RuntimeError, HTTPException) as error:  # no network, half a file
            raise UserError(f'no ImageNet weights of {settings["model"]} ({error}): connect '
                            'to the internet, or use --no-pretrained') from None
    # The other weights stay as they are.
    model.load_state_dict(taken, strict=False)


def pretrain_backbone(path, workers, steps=300):
    """Train tiny's backbone to classify shapes, and write it for --init.

    The shapes are cut from images of the largest seed.
    """
    torch.manual_seed(0)
    backbone, right = TinyBackbone(), []
    head = nn.Linear(backbone.channels[-1], len(SHAPES))
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], 1e-3)
    images = ShapesDataset(length=16 * steps, seed=2 ** 31 - 1)
    for batch in tqdm(train_loader(images, 16, steps, workers), total=steps):
        # Cut out each object, and resize it to 32 x 32 pixels.
        corners = [box_convert(x, 'cxcywh', 'xyxy') * images.size for x in batch.gt_boxes]
        crops = roi_align(batch.images, corners, 32, aligned=True)  # last map: 1 x 1 cell
        logits, labels = head(backbone(crops)[-1].flatten(1)), torch.cat(batch.gt_labels)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        right += (logits.argmax(1) == labels).tolist()
        if INTERRUPTS:
            raise KeyboardInterrupt
    # Every image came once, so these shapes were unseen.
    print(f'{path}: accuracy of the last shapes {torch.tensor(right[-3000:]).float().mean():.1%}')
    model = {f'backbone.{name}': x for name, x in backbone.state_dict().items()}
    replace(Path(path), lambda part: torch.save({'model': model}, part))


def processes():
    """Read rank, world and GPU number from torchrun's variables.

    An empty variable counts as unset. LOCAL_RANK is then 0.
    Raises UserError if several processes lack another.
    """
    values = dict(WORLD_SIZE='1', RANK='', LOCAL_RANK='0', MASTER_PORT='', MASTER_ADDR='')
    values = {name: os.environ.get(name) or default for name, default in values.items()}
    *numbers, address = values.values()
    if values['WORLD_SIZE'] == '1':
        return 0, 1, 0
    if address and all(map(str.isdecimal, numbers)):
        world, rank, local_rank, _ = map(int, numbers)
        return rank, world, local_rank
    text = ' '.join(f'{name}={value}' for name, value in values.items())
    raise UserError(f'{text}: unset these, or use torchrun')


def describe(settings, folder, plan, start, machine):
    """Print steps, settings that are not defaults, and groups."""
    plain = complete({name: settings[name] for name in ('model', 'data')})
    print(f'{folder}: steps {start} to {plan.steps} of {plan.step_images} images on',
          machine.device, *(flag(name, value) for name, value in settings.items()
                            if value not in (None, plain.get(name))))
    # First and last step. Equal groups are printed once.
    for progress in (0.0, 1 - 1 / plan.steps):
        groups = query_groups(progress=progress, **scheme_of(settings))
        for group in dict.fromkeys(groups):
            print(f'  at {progress:.0%}: {groups.count(group)} x {group}')
    positives = expected_positives(epochs=plan.steps / plan.epoch, **scheme_of(settings))
    print(f'  positives of a ground truth in all: {positives:.4g}')


# --- The log ---

class Journal:
    """The numbers of the last steps, and metrics.jsonl.

    The first process writes a line every LOG_EVERY steps and after
    every evaluation. resumed_at: step of the checkpoint, or None.
    """

    def __init__(self, folder, plan, machine, resumed_at):
        self.file, self.plan, self.machine = folder / 'metrics.jsonl', plan, machine
        self.recent = []  # (step, numbers, image names) of the last steps
        self.since = time.perf_counter()
        # 'x' refuses a folder in which another run has begun.
        self.mode, records = 'x', []
        if resumed_at is not None:
            # Steps after the checkpoint run again: drop their lines.
            self.mode, records = 'a', [x for x in evaluation.read_metrics(self.file)
                                       if x['step'] <= resumed_at]
        self.lacks_evaluation = not any(x['step'] == resumed_at and 'AP' in x for x in records)
        if machine.rank > 0:
            return
        # Fail now if the folder cannot be written.
        there = next(x for x in (folder, *folder.absolute().parents) if x.exists())
        tempfile.TemporaryFile(dir=there).close()
        if records:
            text = ''.join(json.dumps(record) + '\n' for record in records)
            replace(self.file, lambda part: part.write_text(text))

    def log(self, done, optimizer, models):
        """Write the means of the last steps, and return some to show.

        Raises UserError for a number or a weight that is not finite.
        """
        # Speed: one copy from the GPU, (steps, numbers).
        table = torch.stack([torch.stack([*numbers.values()]).float()
                             for _, numbers, _ in self.recent]).cpu()
        for row, column in (~table.isfinite()).nonzero().tolist():
            step, numbers, images = self.recent[row]
            raise failed(step, f'{list(numbers)[column]} is not finite (lower --lr?)', images)
        if not all(x.isfinite().all() for model in models for x in model.state_dict().values()):
            raise failed(done - 1, 'a weight is not finite (lower --lr?)', self.recent[-1][2])
        mean, plan = dict(zip(self.recent[0][1], table.mean(0).tolist())), self.plan
        norm, pairs, matched, iou, score, best = (mean.pop(name) for name in (
            'gradient_norm', 'pairs', 'matched', 'iou', 'score', 'best_unmatched'))
        # Perhaps no image had an object.
        matched = max(matched, 1e-9)
        # Images of a step in this process.
        images = plan.step_images / self.machine.world
        seconds = (time.perf_counter() - self.since) / len(self.recent)
        record = {
            'loss': sum(mean.values()), **mean, 'gradient_norm': norm,
            # A ratio of means gives every pair the same weight.
            'matched_iou': iou / matched, 'matched_score': score / matched,
            # Mean over batches.
            'best_unmatched_score': best / (images / plan.batch_size),
            'positives': pairs / images, 'lr': optimizer.param_groups[0]['lr'],
            'images_per_second': plan.step_images / seconds, 'seconds_per_step': seconds,
            'memory_gb': evaluation.peak_memory(self.machine.device)}
        self.recent = []
        self.write(done, record)
        shown = 'loss', 'matched_iou', 'positives', 'images_per_second'
        return {name: record[name] for name in shown}

    def evaluate(self, done, model, val_set, settings):
        """Evaluate the model after `done` steps, print and write the result."""
        machine, ids = self.machine, val_set.categories.ids
        if machine.world > 1:
            # Each process has its own batch norm. Take the first's.
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        metrics, _, _ = evaluation.evaluate(
            model, val_set, ids, batch_size=self.plan.batch_size, workers=machine.workers,
            table=done == self.plan.steps)
        if machine.rank == 0:
            if settings['unstable']:
                metrics['unstable'] = evaluation.unstable_score(
                    model, val_set, ids, settings['unstable'], evaluation.cost_of(settings))
            tqdm.write(f'step {done}: {evaluation.one_line(metrics)}')
        self.write(done, metrics)

    def write(self, done, record):
        """Append a line to metrics.jsonl, and restart the clock."""
        if self.machine.rank == 0:
            record = {'step': done, 'epoch': round(done / self.plan.epoch, 3), **record}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open(self.mode) as file:
                file.write(json.dumps(record) + '\n')
            self.mode = 'a'
        self.since = time.perf_counter()


def failed(step, text, images):
    return UserError(f'step {step}: {text}; the images are {", ".join(images)}')


# --- Checkpoints ---

def replace(path, write):
    """Write a file beside `path`, then rename it.

    So `path` is never half a file. Raises UserError and keeps the
    old file if this fails.
    """
    part = path.with_suffix('.part')
    try:
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch's error if the disk is full
        part.unlink(missing_ok=True)
        raise UserError(f'{path} is not written: {error}') from None


@contextlib.contextmanager
def reading(folder):
    """Turn any error of a damaged checkpoint into one line."""
    try:
        yield
    except Exception as error:  # a file may hold anything
        text = ' '.join(f'{type(error).__name__} {error}'.split())[:200]
        raise UserError(f'{folder} has a damaged or old checkpoint: {text}') from None


def restore(checkpoint, model, average, optimizer):
    """Load weights and Adam's moments, and return the step."""
    (average or model).load_state_dict(checkpoint['model'])
    if average:
        model.load_state_dict(checkpoint['trained_model'])
    parameters = [x for group in optimizer.param_groups for x in group['params']]
    for index, parameter in enumerate(parameters):
        saved = checkpoint['optimizer']['state'][index]
        # copy_ checks the shape. Fused AdamW does not.
        state = {'step': torch.zeros((), device=parameter.device),
                 'exp_avg': torch.zeros_like(parameter), 'exp_avg_sq': torch.zeros_like(parameter)}
        optimizer.state[parameter] = {name: x.copy_(saved[name]) for name, x in state.items()}
    return int(checkpoint['step'])


def read_run(folder, given):
    """Read settings and checkpoint of the run in `folder`.

    Raises UserError if there is no run, or if a flag other than
    --data differs.
    """
    checkpoint = evaluation.read_checkpoint(folder / 'checkpoint.pt')
    with reading(folder):
        settings = checkpoint['settings']
        # A KeyError names what is missing.
        for name in complete({name: settings[name] for name in ('scheme', 'model')}):
            settings[name]
        for name in ('categories', 'images', 'processes', 'amp'):
            checkpoint[name]
    for name, value in given.items():
        value = pick(value, settings['model'] == 'tiny')
        # The data may have moved.
        if name != 'data' and settings.get(name) != value:
            raise UserError(f'{flag(name, value)}: {folder} keeps {settings.get(name)}; '
                            '--init starts anew')
    settings['data'] = evaluation.data_of(settings, given.get('data'), folder)
    return settings, checkpoint


def new_folder(out, scheme):
    """Return --out, or the first free of runs/SCHEME, _2, _3, ...

    Raises UserError if --out holds a run.
    """
    for i in itertools.count(1):
        folder = Path(out or f'runs/{scheme}' + f'_{i}' * (i > 1))
        if not any((folder / name).exists() for name in ('metrics.jsonl', 'checkpoint.pt')):
            return folder
        if out:
            raise UserError(f'--out {out}: holds a run; delete it, or go on with --resume')


# --- Ctrl-C and SIGTERM ---

# Signals received. `docker stop` and SLURM send SIGTERM.
INTERRUPTS = []


def note_interrupt(number, _frame):
    """Note a signal. The run stops after the step in progress.

    A second Ctrl-C ends the run at once. Several processes end at
    the first signal. Otherwise they would stop at different steps
    and wait for each other.
    """
    INTERRUPTS.append(number)
    is_later = number == signal.SIGINT and len(INTERRUPTS) > 1
    if is_later or os.environ.get('WORLD_SIZE', '') not in ('', '1'):
        raise KeyboardInterrupt


# --- The command ---

def parse(argv=None):
    """Parse the flags. Return the given settings, and all flags."""
    parser = evaluation.Parser(description=__doc__.splitlines()[0])
    add_settings(parser)
    add = parser.add_argument_group('files and machine').add_argument
    add('--workers', type=evaluation.number(int, 0, 256), default=2,
        help='processes that load images (default 2)')
    add('--device', choices=evaluation.DEVICES, default=evaluation.DEVICES[-1],
        help='default %(default)s')
    add('--out', help='run folder (default runs/SCHEME, or the next free)')
    add('--resume', metavar='RUN', help='continue the run in this folder')
    add('--pretrain-backbone', metavar='FILE',
        help="only train tiny's backbone on shapes, for --init")
    add('--samples', metavar='FILE', help='only draw training images with boxes (PNG)')
    add('--amp', action=argparse.BooleanOptionalAction,
        help='forward pass in bfloat16 (default if the GPU has it)')
    add('--compile', action='store_true', help='compile deformable attention (for CUDA)')
    add('--checkpoint-activations', action='store_true', help='less memory, slower')
    flags = parser.parse_args(argv)
    return {name: value for name, value in vars(flags).items() if name in ROWS}, flags


def main(argv=None):
    given, machine = parse(argv)
    machine.rank, machine.world, local_rank = processes()
    machine.on_gpu = machine.device == 'cuda'
    machine.device = torch.device(f'cuda:{local_rank}' if machine.on_gpu else 'cpu')
    if machine.on_gpu:
        torch.cuda.set_device(machine.device)
        # Allow TF32 in training.
        torch.set_float32_matmul_precision('high')
    if machine.resume and machine.out:
        raise UserError(f'--out {machine.out}: not with --resume')
    if machine.resume:
        folder = Path(machine.resume)
        settings, checkpoint = read_run(folder, given)
    else:
        settings, checkpoint = complete(given), None
        folder = new_folder(machine.out, settings['scheme'])
    if machine.pretrain_backbone:
        if given:
            raise UserError(f'{flag(min(given))}: not with --pretrain-backbone')
        pretrain_backbone(machine.pretrain_backbone, machine.workers)
    elif machine.samples:
        evaluation.check_target('samples', machine.samples, '.png')
        evaluation.draw_samples(open_data(settings)[0], machine.samples)
    else:
        train(settings, folder, checkpoint, machine)


if __name__ == '__main__':
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note_interrupt)
    evaluation.run_command(main)
