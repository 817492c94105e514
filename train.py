"""Train a detector with any matching scheme:  python train.py --scheme group

Settings first; then the loop (`train`), in the order things happen: learning rate, batch, step, log, save, evaluate;
then a step of it (`loss_of`): forward, match, loss; then what a run needs before and after. The flags come last.

On CUDA if there is one, else on the CPU. Under `torchrun --nproc_per_node=W` the same code runs W times, each process
with --batch-size images of its own.

Letters as in the other files: B images, L decoder layers, N queries, K copies, G groups, P matched pairs.
"""
import argparse
import copy
import json
import math
import os
import shlex
import signal
import sys
import tempfile
import time
from datetime import timedelta
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import eval as evaluation
import hybrid_detr
from data import DENSE, DenseOneToOne, FirstImages, UserError, open_dataset, train_loader
from eval import check_given, check_target, flag
from hybrid_detr import HybridDETR, Outputs, official_name
from losses import CLASS_WEIGHTS, F1, LossSettings, criterion
from matchers import class_scores, denoising_queries, encoder_groups, expected_positives, match, query_groups

# --- Settings: what is not given as a flag comes from here ----------------------------------------------------------

COMMON = dict(
    scheme='branch', data='shapes', model='tiny', overfit=0, seed=0,
    # Loss and cost: Deformable DETR's, which H-DETR keeps, for all schemes alike.
    cls_loss='focal', cost='focal',
    # The papers' choice within a loss or cost, read only where --cls-loss or --cost asks for it.
    mal_gamma=1.5, f1='s2', rescale='one', f2=0.5, official_losses=False,
    # What Stable-DINO and DEIM add to any scheme: off.
    fusion='none', denoising=0, dense_o2o=False, ema=0.0,
    # The detector, with all switches of H-DETR Table 8.
    mixed_selection=True, look_forward_twice=True, dropout=0.0, separate_attention=True, pretrained=True,
    clip=0.1, weight_decay=1e-4, accumulate=1, vertical_flip=False,
    init=None, init_part='all', fixed_encoder=False, eval_every=None, unstable=0)
TINY = dict(image_size=128, batch_size=16, steps=600, lr=1e-3, schedule='cosine', warmup=0.05, ffn=256,
            decoder_layers=3, pretrained=False)
TINY_PHOTOS = dict(image_size=192, batch_size=4, steps=2800, lr=7e-4)   # tiny on a folder of photographs
PAPER = dict(image_size=800, batch_size=2, epochs=12, lr=2e-4, schedule='step', warmup=0.0, ffn=2048, decoder_layers=6)
OFFICIAL_FORMS = 'vfl', 'mal', 'stable'   # losses whose released code differs from the paper
# About 1 / (1 - decay) steps are averaged: 50 of the 600 of tiny, 10,000 of the 440,000 of DEIM (its code; the warm-up
# is that of its RT-DETRv2).
EMA = {True: dict(decay=0.98, warmup=20), False: dict(decay=0.9999, warmup=2000)}   # key: settings['model'] == 'tiny'
TINY_MODEL = dict(width=96, heads=4, encoder_layers=2, levels=3)
PAPER_MODEL = dict(width=256, heads=8, encoder_layers=6, levels=4)

# Stable-DINO and DEIM add no row to matchers.query_groups: what they change are switches, which go with every scheme.
# A preset is one2one with the paper's. Both papers build on detectors with contrastive denoising (DINO, RT-DETRv2).
PRESETS = {'stable': dict(cls_loss='stable', cost='stable', fusion='dense', denoising=100),
           'deim': dict(cls_loss='mal', dense_o2o=True, schedule='flat-cosine', ema=True, denoising=100)}

# The numbers of each row of query_groups: the papers' on COCO, and scaled down for `tiny`; of a preset, those of its
# one2one. The papers give one2many no K: it has the 6 of branch, and the 1800 queries of epoch and layer.
PAPER_ROWS = {'one2one': dict(n=300), 'branch': dict(n=300, T=1500, K=6, weight=1.0),
              'epoch': dict(n=1800, K=10, rho=2 / 3), 'layer': dict(n=1800, K=10, L1=4),
              'group': dict(n=300, G=11), 'one2many': dict(n=1800, K=6), 'stable': dict(n=300), 'deim': dict(n=300)}
TINY_ROWS = {'one2one': dict(n=50), 'branch': dict(n=50, T=150, K=6, weight=1.0),
             'epoch': dict(n=200, K=10, rho=2 / 3), 'layer': dict(n=200, K=10, L1=2),
             'group': dict(n=50, G=4), 'one2many': dict(n=200, K=6), 'stable': dict(n=50),
             'deim': dict(n=100)}   # a mosaic has four images' objects
# What --init-part takes: how the names of its parameters begin.
PARTS = {'all': '', 'backbone': 'backbone.',
         'encoder': ('backbone.', 'input_proj.', 'level_embed', 'encoder.', 'fusions.')}
CHOICES = {'selection': ('ranks', 'heads', 'distinct'), 'cls_loss': tuple(CLASS_WEIGHTS), 'f1': tuple(F1),
           'rescale': ('one', 'max-iou', 'none'), 'cost': ('focal', 'stable'),
           'fusion': ('none', 'simple', 'ulike', 'dense'), 'schedule': ('step', 'cosine', 'flat-cosine'),
           'init_part': tuple(PARTS)}
ROW_NUMBERS = ('n', 'T', 'K', 'weight', 'rho', 'L1', 'G')
LOG_EVERY = 50   # steps


class Machine(NamedTuple):
    """Where and how a run computes: what is no setting of the training."""
    device: torch.device
    amp: bool | None   # None: bfloat16 where it is fast, or as the resumed run had it
    workers: int
    checkpoint_activations: bool
    rank: int
    world: int


# --- The loop -------------------------------------------------------------------------------------------------------

def train(settings: dict, folder: Path, checkpoint: dict | None, machine: Machine) -> None:
    """Train, evaluate and save, from the first step, or from where `checkpoint` stopped, to the last."""
    # Data and model.
    device, rank, world = machine.device, machine.rank, machine.world
    torch.manual_seed(settings['seed'])   # of the starting weights; the loop seeds every step anew
    train_set, val_set = open_data(settings)
    categories = {'ids': train_set.categories.ids, 'names': train_set.categories.names}
    # Number of processes, bfloat16 or not, number of images: a resumed run must have the same.
    conditions = conditions_of(checkpoint, folder, categories, machine, len(train_set))
    model, average, optimizer, start = model_and_optimizer(settings, folder, checkpoint, len(categories['ids']), device)
    model.checkpoint_activations, amp = machine.checkpoint_activations, conditions['amp']
    parallel, evaluated = model, average or model   # what computes the gradients; what is evaluated and saved
    if world > 1:
        # The others wait for the first process, which alone scores what all have detected, 10 minutes at most.
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', timeout=timedelta(minutes=10))
        parallel = DistributedDataParallel(model, device_ids=[device] if device.type == 'cuda' else None)

    # How long, and how often.
    batch_size, accumulate = min(settings['batch_size'], len(train_set)), settings['accumulate']
    step_images = batch_size * world * accumulate
    # An epoch here is a whole number of steps, rounded down (but one at least), in which --epochs and --eval-every
    # count; the loader's own epochs leave no image out.
    steps_per_epoch = max(1, len(train_set) // step_images)
    steps = settings['steps'] if 'steps' in settings else math.ceil(settings['epochs'] * steps_per_epoch)
    eval_every = math.ceil(settings['eval_every'] * steps_per_epoch if settings['eval_every'] else steps / 3)
    # About once an epoch, and only where the numbers were just looked at: a multiple of LOG_EVERY.
    save_every = LOG_EVERY * math.ceil(steps_per_epoch / LOG_EVERY)
    if rank == 0:
        print(f'{folder}: steps {start} to {steps} of {step_images} images on {device}{" in bfloat16" * amp}, '
              f'{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters')
        describe_scheme(settings, len(model.decoder), steps, epochs=steps / steps_per_epoch)
        if start >= steps:
            print('  this run is at its end: nothing is left to train')
        journal = Journal(folder / 'metrics.jsonl', start if checkpoint else None)

    def evaluate(done: int, in_training: str = '') -> None:
        """Score the detector after `done` steps, log and print that; `in_training`: what the print adds."""
        if world > 1:   # in the last step each process updated batch norm for itself: all evaluate what is saved
            for buffer in evaluated.buffers():
                dist.broadcast(buffer, 0)
        rows = evaluation.detect(evaluated, val_set, categories['ids'], batch_size=batch_size, workers=machine.workers)
        if rank == 0:
            metrics, _ = evaluation.average_precision(val_set.coco_json(), rows, table=done == steps)
            metrics['duplicates'] = evaluation.duplicate_rate(rows)
            if settings['unstable']:
                metrics['unstable'] = evaluation.unstable_score(evaluated, val_set, categories['ids'],
                                                                settings['unstable'], evaluation.cost_of(settings))
            journal.write({'step': done, 'epoch': round(done / steps_per_epoch, 3), **metrics})
            text = (f'step {done}: AP {metrics["AP"]:.3f}, AP50 {metrics["AP50"]:.3f}, '
                    f'{metrics["duplicates"]:.1%} duplicates{in_training}')
            if metrics.get('unstable'):
                text += f', unstable score of the last layer {metrics["unstable"][-1]:.0f} %'
            tqdm.write(text)

    # A run that was stopped after a checkpoint and before its evaluation catches up on it.
    due = start > 0 and (start % eval_every == 0 or start == steps)
    missed = [rank == 0 and due and not any(r['step'] == start and 'AP' in r for r in journal.records)]
    if world > 1:
        dist.broadcast_object_list(missed, 0)   # only the first process reads the file; broadcast wants a list
    if missed[0]:
        evaluate(start)

    dense_part = DENSE if isinstance(train_set, DenseOneToOne) else None
    loader = iter(train_loader(train_set, batch_size, steps * accumulate, machine.workers, settings['seed'],
                               start * accumulate, rank, world, pin=device.type == 'cuda', dense_part=dense_part))
    bar = tqdm(range(start, steps), initial=start, total=steps, disable=rank > 0,
               mininterval=1 if sys.stderr.isatty() else 30)
    recent, since = [], time.perf_counter()
    model.train()
    if settings['fixed_encoder']:
        for _, module in parts_of(model.named_modules(), settings['init_part']):
            module.eval()   # or its batch norm would go on to learn, and make an image depend on the others
    for step in bar:
        progress, done = step / steps, step + 1
        # Everything that changes with time follows from `step` alone (learning rate, order of the images, dropout):
        # nothing of it has to be saved, and a resumed run is equal to the bit (on a CPU: CUDA adds up the
        # gradients of deformable attention in any order).
        for parameters in optimizer.param_groups:
            parameters['lr'] = parameters['base_lr'] * lr_factor(settings, progress)
        torch.manual_seed((settings['seed'] * steps + step) * world + rank)   # of each step and process another
        batches = [next(loader) for _ in range(accumulate)]
        # What divides the loss: the boxes of the whole step, for which all its batches are fetched first. If each batch
        # were divided by its own, a box in a crowded one would count less. The mean over the processes, since
        # DistributedDataParallel takes the mean of their gradients.
        num_boxes = float(sum(len(boxes) for batch in batches for boxes in batch.gt_boxes))
        if world > 1:
            num_boxes = torch.full((), num_boxes / world, device=device)   # torch.tensor would wait for the GPU
            dist.all_reduce(num_boxes)

        optimizer.zero_grad()
        numbers = {}   # name -> sum over the batches of this step
        # One after another, so that only one batch at a time keeps activations; backward() adds up their gradients.
        for i, batch in enumerate(batches):
            if world > 1:   # what no_sync() sets: processes exchange their gradients once a step
                parallel.require_backward_grad_sync = i == accumulate - 1
            try:
                parts, stats = loss_of(parallel, batch.to(device), settings, progress, num_boxes, amp)
            except UserError as error:
                check_finite(recent, model)   # if an earlier step has spoiled the weights, this says so instead
                raise UserError(f'step {step}: {error}') from None
            sum(parts.values()).backward()
            for name, value in {**parts, **stats}.items():
                numbers[name] = numbers.get(name, 0) + value.detach()
        # The summed losses of all layers are large: clipping at 0.1 (official code) acts at nearly every step.
        numbers['gradient_norm'] = torch.nn.utils.clip_grad_norm_(model.parameters(), settings['clip'])
        optimizer.step()
        if average:
            update_average(average, model, done, settings['ema'], EMA[settings['model'] == 'tiny']['warmup'])

        # Kept on the device: reading a number after every step would make the CPU wait for it.
        recent.append(Step(step, numbers, [name for batch in batches for name in batch.names]))
        now_evaluate = done % eval_every == 0 or done == steps
        interrupted = bool(INTERRUPTS)   # looked at once: Ctrl-C may come between two of these lines
        if done % LOG_EVERY == 0 or now_evaluate or interrupted:
            check_finite(recent, *{model, evaluated})   # before anything is saved
            record = {'step': done, 'epoch': round(done / steps_per_epoch, 3),
                      **summary(recent, batch_size, accumulate), 'lr': optimizer.param_groups[0]['lr'],
                      'images_per_second': len(recent) * step_images / (time.perf_counter() - since)}
            if rank == 0:
                journal.write(record)
            bar.set_postfix_str('loss {loss:.2f}, IoU {matched_iou:.3f}, {positives:.0f} positives/image, '
                                '{images_per_second:.0f} images/s'.format(**record))
            recent, since = [], time.perf_counter()
        # Before the evaluation: whatever goes wrong there, the training is kept.
        if rank == 0 and (done % save_every == 0 or now_evaluate or interrupted):
            save(folder / 'checkpoint.pt', {   # its 'model' is what eval.py loads: the average, if there is one
                'model': evaluated.state_dict(), 'optimizer': optimizer.state_dict(),
                **({'trained_model': model.state_dict()} if average else {}),
                'step': done, 'settings': settings, 'categories': categories, **conditions,
                'architecture': architecture(settings, len(categories['ids']))})
        if interrupted:
            print(f'\nstopped after step {done}: go on with  python train.py --resume {shlex.quote(str(folder))}')
            sys.exit(130)
        if now_evaluate:
            evaluate(done, '; in training matched IoU {matched_iou:.3f}, score {matched_score:.2f}, best unmatched '
                           '{best_unmatched_score:.2f}'.format(**record))
            since = time.perf_counter()

    if rank == 0:
        picture = folder / 'predictions.png'
        evaluation.draw_predictions(evaluated, val_set, categories['ids'], picture)
        weights = folder / 'checkpoint.pt'
        print(f'checkpoint: {weights}\npicture:    {picture}\n'
              f'look:       python eval.py --weights {shlex.quote(str(weights))} --pictures 8')
    if world > 1:
        # `parallel` goes first: as the last owner of the process group it would join gloo's threads while it holds the
        # interpreter's lock, for which one of them may wait (seen in one run of twelve, torch 2.11).
        del parallel
        dist.destroy_process_group()


# --- A step of it ---------------------------------------------------------------------------------------------------

def loss_of(parallel: torch.nn.Module, batch, settings: dict, progress: float, num_boxes: float | Tensor,
            amp: bool = False, tick=lambda stage: None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Forward, matching and loss of a batch -> the weighted parts of the loss, and `matching_stats`.

    parallel: the model, or what DistributedDataParallel made of it; tick is called with the name of every stage that is
    over (eval.py --benchmark). Raises UserError that names the images if the predictions are not finite.
    """
    model = getattr(parallel, 'module', parallel)
    layers, heads = len(model.decoder), len(model.encoder_class_heads)
    # In the decoder, a scheme is nothing but this list: how many queries each group has, how many copies of a ground
    # truth they have to find in each layer, and what that weighs. All groups are computed at once; at inference only
    # the first exists.
    groups = query_groups(layers=layers, progress=progress, **row_of(settings))
    if tuple(group.queries for group in groups) != model.groups:   # as the model was built
        raise UserError(f'--scheme {settings["scheme"]}: groups of {[group.queries for group in groups]} queries at '
                        f'progress {progress:.2f}, but {list(model.groups)} at the start: their sizes must not change')
    noised = None
    if settings['denoising']:
        noised = denoising_queries(batch.gt_labels, batch.gt_boxes, model.num_classes, settings['denoising'])
        groups.append(noised.query_group(layers))
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=amp):
        outputs = evaluation.predict(parallel, batch, group=None, noised=noised)
    # Matching and loss in float32: bfloat16 keeps 8 bits of a number, so that many costs would be equal.
    outputs = Outputs(*(x.float() for x in outputs))
    tick('forward')
    # The encoder's proposals are matched and trained, too, else the best of them would be no start for queries.
    proposals = encoder_groups(groups, heads, outputs.encoder_logits.shape[2] // heads)
    try:
        matches, encoder_matches = match(*outputs, batch.gt_labels, batch.gt_boxes, groups, proposals,
                                         evaluation.cost_of(settings))
    except FloatingPointError as error:
        raise diverged(str(error), batch.names) from None
    tick('matching')
    parts, iou = criterion(outputs, batch.gt_labels, batch.gt_boxes, matches, encoder_matches, groups, proposals,
                           num_boxes, loss_settings(settings))
    if settings['cls_loss'] == 'ce':   # a mean over its own batch, whatever num_boxes says
        parts['class'] = parts['class'] / settings['accumulate']
    stats = matching_stats(outputs, matches, torch.cat(batch.gt_labels), iou, model.groups, model.softmax)
    tick('loss')
    return parts, stats


def matching_stats(outputs: Outputs, matches, labels: Tensor, iou: Tensor, sizes: tuple[int, ...],
                   softmax: bool = False) -> dict[str, Tensor]:
    """What the matching did, for `summary`.

    Of the detector, the first group, in the last layer: the sums of the IoU of its pairs and of their scores for the
    matched class, and their number; the best score of an unmatched query, as a mean over the images. Of all groups and
    layers: the number of pairs, without denoising. sizes: queries of each group. No boolean indexing: it would wait for
    the GPU.
    """
    n = sizes[0]
    scores = class_scores(outputs.pred_logits[-1].detach(), softmax)                                    # (B, N, C)
    final = (matches.layer == len(outputs.pred_logits) - 1) & (matches.query < n)                       # (P,)
    of_pairs = scores[matches.image, matches.query, labels[matches.gt]] * final
    matched = torch.zeros_like(scores[..., 0])                                                          # (B, N)
    # Added up: the pairs of the other layers hit the same cells, with 0.
    matched = matched.index_put((matches.image, matches.query), final.to(scores), accumulate=True)
    return {'iou': (iou * final).sum(), 'score': of_pairs.sum(), 'matched': final.sum(),
            'best_unmatched': (scores.amax(-1) * (1 - matched))[:, :n].amax(1).mean(),
            'pairs': (matches.query < sum(sizes)).sum()}


def lr_factor(settings: dict, progress: float) -> float:
    """What the learning rate is multiplied by at `progress` 0..1 of training."""
    # Warm-up: at first Adam has seen too few gradients to know the scale of its steps.
    if progress < settings['warmup']:
        if settings['schedule'] == 'flat-cosine':
            return (progress / settings['warmup']) ** 2   # its first step does nothing, as in DEIM's code
        return (progress + 1e-3) / (settings['warmup'] + 1e-3)   # + 1e-3: the first step moves, too
    if settings['schedule'] == 'step':   # after epoch 11 of 12, 20 of 24 and 30 of 36 (official codes)
        return 1.0 if progress < (11 / 12 if settings.get('epochs', 12) <= 12 else 5 / 6) else 0.1
    if settings['schedule'] == 'flat-cosine':
        return flat_cosine(progress)
    # cosine: 1 at the end of the warm-up, 0 at that of training.
    along = (progress - settings['warmup']) / (1 - settings['warmup'] + 1e-9)   # 1e-9: warmup may be 1
    return 0.5 * (1 + math.cos(math.pi * along))


def flat_cosine(progress: float) -> float:
    """DEIM's schedule after its quadratic warm-up: factor 1 until `flat`, where mosaic and mixup end, then a cosine
    down to gamma at `end`, and constant; in parts of training, 0 to 1, those of its RT-DETRv2 R50 (official code)."""
    flat, end, gamma = DENSE[1], 58 / 60, 0.5
    along = min(max((progress - flat) / (end - flat), 0.0), 1.0)
    return gamma + (1 - gamma) * 0.5 * (1 + math.cos(math.pi * along))


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, step: int, decay: float, warmup: float) -> None:
    """average = d * average + (1-d) * model, d = decay * (1 - exp(-step / warmup)) after step 1, 2, ... (DEIM's code).

    d starts near 0, so that the first weights, which know nothing, are forgotten. Buffers are averaged, too.
    """
    d = decay * (1 - math.exp(-step / warmup))
    for mean, new in zip(average.state_dict().values(), model.state_dict().values()):   # the tensors, not copies
        if mean.is_floating_point():
            mean.lerp_(new, 1 - d)
        else:
            mean.copy_(new)


class Step(NamedTuple):
    """What is kept of a step until the next log."""
    step: int
    numbers: dict[str, Tensor]   # of one number each, on the device: loss, matching_stats, gradient_norm
    images: list[str]            # their names


def stacked(recent: list[Step]) -> Tensor:
    """The numbers of the last steps, (steps, numbers): so that one copy brings all of them from the GPU."""
    return torch.stack([torch.stack([*step.numbers.values()]).float() for step in recent])


def diverged(what: str, images: list[str]) -> UserError:
    return UserError(f'{what}; the images are {", ".join(images)}. Lower --lr?')


def check_finite(recent: list[Step], *models: torch.nn.Module) -> None:
    """Raises UserError for the first of the last steps with a number that is not finite, or if a weight is not."""
    if not recent:
        return
    for (step, numbers, images), finite in zip(recent, stacked(recent).isfinite().tolist()):
        if not all(finite):
            raise diverged(f'step {step}: {list(numbers)[finite.index(False)]} is not finite', images)
    for model in models:
        if not torch.stack([x.isfinite().all() for x in model.state_dict().values()]).all():
            raise diverged(f'step {recent[-1].step}: a weight is not finite after it', recent[-1].images)


def summary(recent: list[Step], batch_size: int, accumulate: int) -> dict:
    """What is logged of the last steps: the means of their numbers; under torchrun, of the first process's images."""
    names = list(recent[0].numbers)
    mean = dict(zip(names, stacked(recent).mean(0).tolist()))
    # The loop puts the parts of the loss before matching_stats, which begin with 'iou'.
    parts = {name: mean[name] for name in names[:names.index('iou')]}
    # Means of sums over means of sums, not means of each step's quotient: so every pair counts the same.
    return {'loss': sum(parts.values()), **parts, 'gradient_norm': mean['gradient_norm'],
            'matched_iou': mean['iou'] / max(mean['matched'], 1e-9),   # 1e-9: no image may have had an object
            'matched_score': mean['score'] / max(mean['matched'], 1e-9),
            'best_unmatched_score': mean['best_unmatched'] / accumulate,
            'positives': mean['pairs'] / (batch_size * accumulate)}


# --- What a run starts with -----------------------------------------------------------------------------------------

def open_data(settings: dict):
    """-> training set, validation set. Raises UserError if they do not have the same categories."""
    common = dict(size=settings['image_size'], seed=settings['seed'])
    train_set = open_dataset(settings['data'], 'train', **common, augment=not settings['overfit'],
                             vertical_flip=settings['vertical_flip'])
    if settings['overfit']:   # as they are, without augmentation
        train_set = FirstImages(train_set, settings['overfit'])
    if train_set.most_boxes() > settings['n']:
        print(f'{settings["data"]}: an image has up to {train_set.most_boxes()} boxes, but the detector has '
              f'{settings["n"]} queries: it cannot find them all (--queries)')
    if settings['overfit']:
        return train_set, train_set
    val_set = open_dataset(settings['data'], 'val', **common)
    if (train_set.categories.ids, train_set.categories.names) != (val_set.categories.ids, val_set.categories.names):
        raise UserError(f'{settings["data"]}: training and validation annotations have other categories '
                        f'({len(train_set.categories)} and {len(val_set.categories)} of them)')
    if settings['dense_o2o']:   # some of its images may have more boxes than queries, too
        train_set = DenseOneToOne(train_set, settings['image_size'], settings['vertical_flip'], settings['seed'])
    return train_set, val_set


def architecture(settings: dict, num_classes: int) -> dict:
    """The arguments of HybridDETR, which a checkpoint has to remember."""
    tiny = settings['model'] == 'tiny'
    groups = query_groups(layers=settings['decoder_layers'], **row_of(settings))
    switches = ('decoder_layers', 'ffn', 'dropout', 'mixed_selection', 'look_forward_twice', 'separate_attention',
                'selection', 'fusion')
    return dict(num_classes=num_classes, groups=[group.queries for group in groups],
                backbone='resnet50' if settings['model'] == 'r50' else settings['model'],
                frozen_backbone=settings['pretrained'], denoising=settings['denoising'] > 0,
                softmax=settings['cls_loss'] == 'ce', **{name: settings[name] for name in switches},
                **(TINY_MODEL if tiny else PAPER_MODEL))


def row_of(settings: dict) -> dict:
    """The arguments of matchers.query_groups."""
    scheme = 'one2one' if settings['scheme'] in PRESETS else settings['scheme']
    return {'scheme': scheme, **{name: settings[name] for name in ROW_NUMBERS if name in settings}}


def loss_settings(settings: dict) -> LossSettings:
    return LossSettings(settings['cls_loss'], settings['class_weight'], mal_gamma=settings['mal_gamma'],
                        f1=settings['f1'], rescale=settings['rescale'], official=settings['official_losses'])


def build_model(settings: dict, num_classes: int, bare: bool = False) -> HybridDETR:
    """A new model with its starting weights, or `bare`, to be filled from a checkpoint.

    Raises UserError if the scheme has no row, if the backbone is unknown or cannot be downloaded, and if what is asked
    of the file of --init does not fit."""
    try:
        arguments = architecture(settings, num_classes)
    except ValueError as error:   # a scheme with numbers, but without a row of matchers.query_groups
        raise UserError(f'--scheme {settings["scheme"]}: {error}') from None
    try:
        model = HybridDETR(**arguments)
    except ValueError as error:
        raise UserError(f'--model {settings["model"]}: {error}') from None
    if bare:
        return model
    taken = what_fits(model, settings['init']) if settings['init'] else {}
    part = settings['init_part']
    if part != 'all':
        taken = dict(parts_of(taken.items(), part))
        print(f'  of these, the {len(taken)} of --init-part {part} are used')
        missing = [name for name, _ in parts_of(model.named_parameters(), part) if name not in taken]
        if not taken:
            raise UserError(f'--init-part {part}: nothing of it in {settings["init"]} fits this model')
        if settings['fixed_encoder'] and missing:
            raise UserError(f'--fixed-encoder: {missing[0]} is not taken from {settings["init"]} (see above), and '
                            f'would be fixed without having been trained there ({len(missing)} such parameters)')
    if settings['pretrained'] and not any(name.startswith('backbone.') for name in taken):   # or --init brought one
        try:
            model.backbone.load_imagenet()
        except (OSError, RuntimeError, HTTPException) as error:   # no network, no disk, or half a file
            raise UserError(f'cannot download the ImageNet weights of {settings["model"]} ({error}): connect to the '
                            'internet once, or train from scratch with --no-pretrained') from None
    model.load_state_dict(taken, strict=False)   # the others keep their starting weights
    return model


def parts_of(named, part: str) -> list[tuple]:
    """Of pairs (name, parameter or module), those that belong to a part of PARTS."""
    return [(name, x) for name, x in named if f'{name}.'.startswith(PARTS[part])]


def what_fits(model: HybridDETR, path: str) -> dict[str, Tensor]:
    """The entries of a checkpoint, own or official, that fit the model by name and shape; prints what does not.

    The backbone fits as a whole or not at all: half of it would be a mixture of two networks.
    """
    checkpoint, ours = evaluation.read_checkpoint(path), model.state_dict()
    state = checkpoint['model']
    if evaluation.is_official(checkpoint):
        layers = len({name.split('.')[3] for name in state if name.startswith('transformer.decoder.layers.')})
        ours_of = {official_name(name, layers): name for name in ours}
        # The decoder holds class_embed and bbox_embed a second time, with the same values.
        aliases = ('transformer.decoder.class_embed', 'transformer.decoder.bbox_embed')
        state = {ours_of.get(name, name): value for name, value in state.items() if not name.startswith(aliases)}
    fits = {name: value for name, value in state.items() if name in ours and value.shape == ours[name].shape}
    backbones = [{name: value.shape for name, value in entries.items() if name.startswith('backbone.')}
                 for entries in (ours, state)]
    if backbones[0] != backbones[1]:
        fits = {name: value for name, value in fits.items() if not name.startswith('backbone.')}
    print(f'{path}: {len(fits)} of the {len(ours)} entries of this model are taken from it')
    for entries, what in ((ours, 'not taken from it'), (state, 'in it, but not used')):
        names = [f'{name} {tuple(value.shape)}' for name, value in entries.items() if name not in fits]
        shown = ', '.join(names[:8] + ['...'] * (len(names) > 8))
        print(f'  {len(names)} {what}' + f': {shown}' * bool(names))
    return fits


def parameter_groups(model: HybridDETR, settings: dict) -> list[dict]:
    """A tenth of the learning rate for the sampling offsets and a pretrained backbone, as in the official code.

    Offsets move what is looked at: a large step throws all samples off the object. A pretrained backbone is good
    already, and is to be adapted, not learned anew. base_lr: what lr_factor multiplies.
    """
    slow, normal = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_slow = 'sampling_offsets' in name or (name.startswith('backbone') and settings['pretrained'])
            (slow if is_slow else normal).append(parameter)
    lr = settings['lr']
    return [{'params': normal, 'lr': lr, 'base_lr': lr}, {'params': slow, 'lr': lr / 10, 'base_lr': lr / 10}]


def model_and_optimizer(settings: dict, folder: Path, checkpoint: dict | None, num_classes: int, device: torch.device):
    """-> model, its moving average or None, optimizer, and the step to begin with; new, or as in `checkpoint`."""
    model = build_model(settings, num_classes, bool(checkpoint)).to(device)
    if settings['fixed_encoder']:
        for _, parameter in parts_of(model.named_parameters(), settings['init_part']):
            parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings), weight_decay=settings['weight_decay'], fused=True)
    model.backbone.to(memory_format=torch.channels_last)   # faster convolutions; in place, the parameters are the same
    average = copy.deepcopy(model).requires_grad_(False) if settings['ema'] else None
    if not checkpoint:
        return model, average, optimizer, 0
    try:
        return model, average, optimizer, restore(checkpoint, model, average, optimizer)
    except Exception as error:   # somebody's file: anything may be in it
        raise damaged(folder, error) from None


def conditions_of(checkpoint: dict | None, folder: Path, categories: dict, machine: Machine, images: int) -> dict:
    """What a run keeps beside its settings: number of processes, bfloat16 or not, number of training images.

    Raises UserError if these, or the categories, are not those of the run that is resumed."""
    if checkpoint and checkpoint['categories'] != categories:
        before, now = checkpoint['categories']['names'], categories['names']
        raise UserError(f'the run in {folder} has {len(before)} classes ({", ".join(before[:4])}..), but the data has '
                        f'{len(now)} ({", ".join(now[:4])}..): start anew with --init')
    amp = machine.amp
    if amp is None:
        amp = checkpoint['amp'] if checkpoint else has_bfloat16(machine.device)
    conditions = {'processes': machine.world, 'amp': amp, 'images': images}
    for name, value in conditions.items():
        if checkpoint and checkpoint[name] != value:
            raise UserError(f'the run in {folder} has {name} {checkpoint[name]}, here it is {value}, and a resumed run '
                            'goes on with the same; start a new one with --init')
    return conditions


def new_folder(settings: dict) -> Path:
    """The run's folder: --out, or the first of runs/SCHEME, runs/SCHEME_2, ... that holds no run.

    Raises UserError if --out holds one."""
    def free(path: Path) -> bool:
        return not any((path / name).exists() for name in ('metrics.jsonl', 'checkpoint.pt'))

    if 'out' not in settings:
        base = Path('runs') / settings['scheme']
        return next(filter(free, (Path(f'{base}_{i}') if i > 1 else base for i in range(1, 10_000))))
    out = Path(settings['out'])
    if not free(out):
        how = (f'go on with --resume {shlex.quote(str(out))}' if (out / 'checkpoint.pt').exists()
               else 'without a checkpoint: delete it')
        raise UserError(f'--out {out} holds a run: {how}, or name another folder')
    return out


def check_writable(folder: Path) -> None:
    """Raises UserError if the run could not be written into `folder`, which need not exist yet: better now than at the
    first checkpoint. The folder itself is only made then: a run that fails at its start leaves nothing behind."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise UserError(f'cannot write into {there}, where {folder} should be: {error.strerror}') from None


def new_or_resumed(given: dict) -> tuple[dict, Path, dict | None]:
    """-> settings, folder, and the checkpoint of a resumed run. Raises UserError if a resumed run's settings differ."""
    resume = given.pop('resume', None)
    if not resume:
        settings = complete(given)
        return settings, new_folder(settings), None
    folder = Path(resume)
    if folder.is_file():
        raise UserError(f'--resume {folder}: is a file; name the folder of the run, {folder.parent}')
    checkpoint = evaluation.read_checkpoint(str(folder / 'checkpoint.pt'))
    if evaluation.is_official(checkpoint):
        raise UserError(f'--resume {folder}: holds no run of train.py; start one with --init')
    try:
        settings = dict(checkpoint['settings'])
        fresh = complete({name: settings[name] for name in ('scheme', 'model', 'data')})
        length = 'steps' if 'steps' in settings else 'epochs'   # a run has one of them
        # (where it stands, its name, the types it may have): a setting has its default's, or any if that is None.
        kinds = [(settings, name, object if default is None else (type(default), int))   # int: a whole float
                 for name, default in fresh.items() if name not in ('steps', 'epochs')]
        kinds += [(settings, length, int if length == 'steps' else (int, float)), (settings, 'data', str)]
        kinds += [(checkpoint, name, kind) for name, kind in dict(processes=int, images=int, amp=bool).items()]
        for entries, name, kind in kinds:
            if not isinstance(entries[name], kind):
                raise TypeError(f'it has the {name} {entries[name]!r}')
        check(settings)
        ours = architecture(settings, len(evaluation.categories_of(checkpoint)))
        if any(ours.get(name) != value for name, value in checkpoint['architecture'].items()):
            raise ValueError('its settings describe another model')
    except Exception as error:   # somebody's file: anything may be in it
        raise damaged(folder, error) from None
    if given.get('ema') is True:   # given without a number
        given['ema'] = EMA[settings['model'] == 'tiny']['decay']
    for name, value in given.items():
        if settings.get(name) != value:
            has = 'none' if settings.get(name) is None else settings[name]
            raise UserError(f'{flag(name, value)}: the run in {folder} has {has}, and a resumed run keeps its '
                            'settings; start a new one with --init instead')
    return settings, folder, checkpoint


def damaged(folder: Path, error: Exception) -> UserError:
    text = ' '.join(str(error).split())[:200]
    return UserError(f'{folder / "checkpoint.pt"} is damaged, or of another version: {type(error).__name__} {text}')


def restore(checkpoint: dict, model: HybridDETR, average: HybridDETR | None, optimizer: torch.optim.Optimizer) -> int:
    """Fill in what the checkpoint holds -> its step. Fails with all kinds of exceptions if anything does not fit."""
    (average or model).load_state_dict(checkpoint['model'])   # what is evaluated
    if average:
        model.load_state_dict(checkpoint['trained_model'])
    # Of the optimizer only the moments: the rest follows from the settings.
    saved, groups = checkpoint['optimizer'], optimizer.state_dict()['param_groups']
    if [group['params'] for group in saved['param_groups']] != [group['params'] for group in groups]:
        raise ValueError('its optimizer has other parameters')
    optimizer.load_state_dict({'state': saved['state'], 'param_groups': groups})
    for parameter in (parameter for group in optimizer.param_groups for parameter in group['params']):
        state = optimizer.state[parameter]
        # The fused optimizer walks through the memory of all three side by side, without asking whether they fit.
        for moment in (state['exp_avg'], state['exp_avg_sq']):
            if (moment.shape, moment.stride(), moment.dtype) != (parameter.shape, parameter.stride(), parameter.dtype):
                raise ValueError('its optimizer has moments that do not fit their parameter')
        if state['step'].numel() != 1 or state['step'].layout != torch.strided:
            raise ValueError('its optimizer counts steps in another way')
    if not isinstance(checkpoint['step'], int) or checkpoint['step'] < 0:
        raise ValueError(f'it is of step {checkpoint["step"]!r}')
    return checkpoint['step']


# --- What a run writes and prints -----------------------------------------------------------------------------------

def describe_scheme(settings: dict, layers: int, steps: int, epochs: float) -> None:
    """Print the scheme's row of the table, what it promises, and what a preset or flags change beside it."""
    row = row_of(settings)
    groups = query_groups(layers=layers, **row)
    preset_of = f' (a preset of {row["scheme"]})' * (settings['scheme'] in PRESETS)
    print(f'  scheme {settings["scheme"]}{preset_of}:',
          *(flag(name, f'{row[name]:g}') for name in ROW_NUMBERS if name in row))
    plain = complete({'scheme': row['scheme'], 'model': settings['model'], 'data': settings['data']})
    changed = [name for name in settings if name not in ('scheme', 'out', 'steps', 'epochs', *ROW_NUMBERS)
               and settings[name] != plain.get(name)]
    if changed:
        print(f'  other than the defaults of {row["scheme"]}:', *(flag(name, settings[name]) for name in changed))
    def and_late(early, late) -> str:
        return f'{early}' + f' (at the end of training {late})' * (early != late)

    groups = list(zip(groups, query_groups(layers=layers, progress=max(0, steps - 1) / max(1, steps), **row)))
    for group, last in dict.fromkeys(groups):   # of the first and the last step; equal groups once
        print(f'  {groups.count((group, last))} x {group.queries} queries, copies of a ground truth in each layer '
              f'{and_late(group.copies, last.copies)}, weight '
              f'{and_late(f"{group.weight:.3g}", f"{last.weight:.3g}")}')
    each = expected_positives(layers=layers, epochs=1, **row)   # of `epoch` the mean over the training
    print(f'  positives of a ground truth: {each:.3g} an epoch, {each * epochs:.4g} in the whole training'
          + ', denoising queries not counted' * (settings['denoising'] > 0))


class Journal:
    """metrics.jsonl of a run: a line for every LOG_EVERY steps and one for every evaluation, by the first process.

    records: of a resumed run, what was logged up to its checkpoint."""

    def __init__(self, file: Path, resumed_at: int | None):
        self.file, self.records = file, []
        self.mode = 'x' if resumed_at is None else 'a'
        if resumed_at is not None and file.exists():
            # What was logged after the checkpoint happens again.
            self.records = [record for record in evaluation.read_metrics(file) if record['step'] <= resumed_at]
            part = file.with_suffix('.part')
            part.write_text(''.join(json.dumps(record) + '\n' for record in self.records))
            os.replace(part, file)

    def write(self, record: dict) -> None:
        """Raises UserError if it cannot be written, or if another run has begun in the same folder meanwhile."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open(self.mode) as file:   # 'x': the first line of a new run makes the file
                file.write(json.dumps(record) + '\n')
        except FileExistsError:
            raise UserError(f'{self.file.parent} holds another run by now: name another folder with --out') from None
        except OSError as error:
            raise UserError(f'cannot write {self.file}: {error.strerror}') from None
        self.mode = 'a'


def save(path: Path, content: dict) -> None:
    """Write beside, then rename: whoever reads `path` finds the old file or the new one, never half of one.

    Raises UserError, and leaves the old file, if it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix('.part')
    try:
        torch.save(content, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:   # torch says RuntimeError when the disk is full
        part.unlink(missing_ok=True)
        raise UserError(f'cannot write {path}, the last checkpoint is kept: {error}') from None


def draw_samples(settings: dict, file: str, n: int = 8) -> None:
    """Draw n images as the run trains on them, with --dense-o2o as in its dense part, to a PNG."""
    check_target('samples', file, '.png')
    train_set, _ = open_data(settings)
    dense = (True,) if settings['dense_o2o'] else ()
    samples = [train_set[0, index, *dense] for index in range(min(n, len(train_set)))]
    names = train_set.categories.names
    pictures = [evaluation.draw_boxes(evaluation.as_picture(s.image), s.boxes, s.labels.tolist(),
                                      [names[label] if len(s.labels) <= 20 else '' for label in s.labels.tolist()])
                for s in samples]   # names of many objects would cover them
    evaluation.save_grid([pictures[i:i + 4] for i in range(0, len(pictures), 4)], file)


INTERRUPTS = []   # one entry for each Ctrl-C


def note_interrupt(*_) -> None:
    """Ctrl-C lets the step in progress come to its end, since half of one cannot be saved; a second one ends the run at
    once. Under torchrun the first does, too: the processes would stop at different steps and wait for each other."""
    INTERRUPTS.append(True)
    if len(INTERRUPTS) > 1 or 'WORLD_SIZE' in os.environ:
        raise KeyboardInterrupt


# --- The command ----------------------------------------------------------------------------------------------------

def parse(argv: list[str] | None = None) -> dict:
    """The flags that were given, by name; `complete` fills in the others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    add = parser.add_argument_group('what to train').add_argument
    schemes = ', '.join(scheme for scheme in PAPER_ROWS if scheme not in PRESETS)
    add('--scheme', help=f'matching scheme: {schemes} (default branch); or a preset of the switches '
                         f'below: {", ".join(PRESETS)}')
    add('--data', help="'shapes', made on the fly, or a folder in the COCO layout (default shapes)")
    add('--model', help='tiny, r50, or a ResNet or Swin of torchvision by name (default tiny)')
    add('--overfit', type=int, metavar='N', help='train and evaluate on the first N training images')
    add = parser.add_argument_group("the scheme's numbers (defaults depend on scheme and model)").add_argument
    add('--queries', dest='n', type=int, help='n, queries of the first group, the detector')
    add('--T', type=int, help='branch: queries of the one-to-many group; 0 is the baseline')
    add('--K', type=int, help='branch, epoch, layer, one2many: copies of each ground truth')
    add('--weight', type=float, help='branch: lambda, loss weight of the one-to-many group')
    add('--rho', type=float, help='epoch: part of training that is one-to-many, 0 to 1')
    add('--L1', type=int, help='layer: how many first decoder layers are one-to-many')
    add('--G', type=int, help='group: number of groups')
    add('--selection', choices=CHOICES['selection'],
        help='which proposals a group gets: the next ranks of one encoder head (H-DETR), the best of a head of its own '
             '(Group DETR A.2; default of group), or of those the best that no earlier group has (H-DETR App. D)')
    add('--no-separate-attention', dest='separate_attention', action='store_false',
        help='let the groups see each other in training (Group DETR Table 7 c)')
    add = parser.add_argument_group('what a match is worth: Stable-DINO and DEIM, with every scheme').add_argument
    add('--cls-loss', choices=CHOICES['cls_loss'], help='classification loss (default focal)')
    add('--class-weight', type=float, help='its weight (default: focal 2, stable 6, others 1)')
    add('--mal-gamma', type=float, help='mal: exponent (default 1.5)')
    add('--f1', choices=CHOICES['f1'],
        help='stable: target of a score, from IoU s and score p (Stable-DINO Table 7; default s2, the square)')
    add('--rescale', choices=CHOICES['rescale'],
        help='stable: what the largest target of an image is scaled to (§2.2; default one)')
    add('--official-losses', action='store_true',
        help="the released codes' weights in vfl, mal and stable loss and alpha in the stable cost, instead of the "
             "papers' form")
    add('--cost', choices=CHOICES['cost'],
        help='matching cost; stable: scores count as much as the box is good (Stable-DINO Eq. 4)')
    add('--cost-class', type=float, help='weight of its class part (default 2; ce 1)')
    add('--f2', type=float, help="stable cost: exponent of the box's quality (default 0.5)")
    add('--fusion', choices=CHOICES['fusion'],
        help='join backbone and encoder features (Stable-DINO §3; default none; with the two encoder layers of tiny, '
             'ulike is simple)')
    add('--denoising', type=int, nargs='?', const=100, metavar='N',
        help='contrastive denoising of about N ground truths an image (default 0, without N 100)')
    add('--dense-o2o', action=argparse.BooleanOptionalAction,
        help='mosaic and mixup, each for half of the images, from 7 to 57 %% of training (DEIM)')
    add('--ema', type=float, nargs='?', const=True, metavar='DECAY',
        help='evaluate and save a moving average of the weights (default 0, which is none; without DECAY 0.9999, tiny '
             '0.98)')
    add = parser.add_argument_group('model: depth, and the switches of H-DETR Table 8').add_argument
    add('--decoder-layers', type=int, help='L (tiny 3, else 6)')
    add('--ffn', type=int, help='width of the feed-forward layers (tiny 256, else 2048)')
    add('--dropout', type=float, help='dropout in the transformer (default 0)')
    add('--no-mixed-selection', dest='mixed_selection', action='store_false',
        help='query content from the proposal, too, instead of learned')
    add('--no-look-forward-twice', dest='look_forward_twice', action='store_false',
        help="the box loss of a layer stops at the layer's own head")
    add('--no-pretrained', dest='pretrained', action='store_false',
        help='start the backbone from scratch and train its batch norm (always so for tiny)')
    add = parser.add_argument_group('optimisation').add_argument
    add('--image-size', type=int, help='largest short side of the images, from 64 on (tiny 128 or 192, else 800)')
    add('--vertical-flip', action='store_true', help='for photographs without an up, as from a microscope')
    add('--batch-size', type=int, help='images of a step, per process (tiny 16 or 4, else 2)')
    add('--accumulate', type=int, help='batches whose gradients are added up for a step (default 1)')
    add('--epochs', type=float, help='passes over the training images (default 12 if not tiny)')
    add('--steps', type=int, help='steps, instead of epochs (tiny 600 or 2800)')
    add('--lr', type=float, help='learning rate; a tenth for sampling offsets and pretrained backbone')
    add('--schedule', choices=CHOICES['schedule'],
        help='step: x0.1 for the last twelfth, of more than 12 epochs for the last sixth (default); cosine: down to 0 '
             '(default of tiny); flat-cosine: constant, then down to one half (DEIM)')
    add('--warmup', type=float,
        help='part of training in which the rate rises (default of tiny 0.05; else 0, or 0.005 with flat-cosine)')
    add('--weight-decay', type=float, help='of AdamW (default 1e-4)')
    add('--clip', type=float, help='largest norm of the gradient (default 0.1)')
    add('--seed', type=int, help='of weights, order, augmentation and shapes (default 0)')
    add = parser.add_argument_group('files and machine').add_argument
    add('--out', help='folder of the run (default runs/SCHEME, numbered if it is taken)')
    add('--resume', metavar='RUN', help='go on with the run in this folder, settings unchanged')
    add('--init', metavar='FILE', help='start from these weights, own or official, as far as they fit')
    add('--init-part', choices=CHOICES['init_part'], help='take only this from --init (default all)')
    add('--fixed-encoder', action='store_true',
        help='do not train what --init-part backbone or encoder takes, batch norm included (Group DETR Table 1)')
    add('--eval-every', type=float, help='epochs between evaluations (default a third of the run)')
    add('--unstable', type=int, metavar='N',
        help='with every evaluation, match N images and tell how many objects change their query from layer to layer '
             '(the unstable score; the paper has N = 20; default 0: off)')
    add('--samples', metavar='FILE', help='draw what this run would train on to a PNG, and stop')
    add('--workers', type=int, help='processes that load images (default 2)')
    add('--device', choices=('cuda', 'cpu'), help='default cuda if there is one')
    add('--amp', action=argparse.BooleanOptionalAction,
        help='forward in bfloat16, matching and losses in float32 (default on CUDA that supports it)')
    add('--compile', action='store_true', help='compile the deformable attention, for CUDA (it makes the CPU slower)')
    add('--checkpoint-activations', action='store_true',
        help='compute the activations of encoder and decoder twice instead of keeping them')
    return vars(parser.parse_args(argv))


def complete(given: dict) -> dict:
    """Fill in the flags that were not given, by model and scheme. Raises UserError for values that make no sense."""
    scheme, tiny = given.get('scheme', COMMON['scheme']), given.get('model', COMMON['model']) == 'tiny'
    rows, table = (TINY_ROWS, 'TINY_ROWS') if tiny else (PAPER_ROWS, 'PAPER_ROWS')
    if scheme not in rows:
        raise UserError(f'--scheme {scheme}: choose from {", ".join(rows)} (train.{table})')
    row = rows[scheme]
    for name in ROW_NUMBERS:
        if name in given and name not in row:
            raise UserError(f'{flag(name, given[name])}: scheme {scheme} only has {", ".join(map(flag, row))}')
    # Photographs vary more than shapes: more pixels, fewer of them a step, more steps.
    photos = TINY_PHOTOS if tiny and given.get('data', COMMON['data']) != 'shapes' else {}
    # Later ones win: model, data, scheme, preset, flags.
    settings = {'selection': 'heads' if scheme == 'group' else 'ranks', **COMMON, **(TINY if tiny else PAPER), **photos,
                **row, **PRESETS.get(scheme, {}), **given}
    # Defaults that follow from other settings.
    settings.setdefault('class_weight', CLASS_WEIGHTS[settings['cls_loss']])
    settings.setdefault('cost_class', 1.0 if settings['cls_loss'] == 'ce' else 2.0)
    if settings['schedule'] == 'flat-cosine' and not tiny:
        settings['warmup'] = given.get('warmup', 0.005)   # DEIM's 2000 of 440,000 steps
    if settings['ema'] is True:
        settings['ema'] = EMA[tiny]['decay']
    # A flag of another loss or cost is refused: else a run would not be what its command says.
    for name, needs in dict(f1='stable', rescale='stable', mal_gamma='mal').items():
        if name in given and settings['cls_loss'] != needs:
            raise UserError(f'{flag(name, given[name])}: only --cls-loss {needs} has it')
    if 'f2' in given and settings['cost'] != 'stable':
        raise UserError(f'--f2 {given["f2"]}: only --cost stable has it')
    cost_has_two = settings['cost'] == 'stable' and settings['cls_loss'] != 'ce'   # softmax costs have no alpha
    if settings['official_losses'] and not cost_has_two and settings['cls_loss'] not in OFFICIAL_FORMS:
        raise UserError(f'--official-losses: --cls-loss {settings["cls_loss"]} with --cost {settings["cost"]} has one '
                        'form only')
    if settings['init_part'] != 'all' and not settings['init']:
        raise UserError(f'--init-part {settings["init_part"]}: needs --init FILE')
    if settings['fixed_encoder'] and settings['init_part'] == 'all':
        raise UserError('--fixed-encoder: needs --init FILE --init-part encoder (or backbone)')
    if settings['vertical_flip'] and settings['data'] == 'shapes' and not settings['dense_o2o']:
        raise UserError('--vertical-flip: shapes are not augmented but by --dense-o2o')
    if settings['overfit'] and given.get('dense_o2o'):
        raise UserError('--dense-o2o: --overfit trains on images as they are')
    settings['dense_o2o'] = settings['dense_o2o'] and not settings['overfit']   # of a preset: nobody asked for it
    if 'steps' in given and 'epochs' in given:
        raise UserError('--steps and --epochs: give one of them')
    for name, other in (('epochs', 'steps'), ('steps', 'epochs')):
        if name in given:   # the other one is only a default
            settings.pop(other, None)
    check(settings)
    if given.get('K', 1) > 1 and settings.get('T') == 0:
        raise UserError(f'--K {given["K"]} with --T 0: there is no one-to-many group to find {given["K"]} copies')
    return settings


def check(settings: dict) -> None:
    """Raises UserError for a value that is out of its range, whether it was given or read from a checkpoint."""
    for name, choices in CHOICES.items():
        if settings[name] not in choices:
            raise UserError(f'{flag(name, settings[name])}: choose from {", ".join(choices)}')
    for name, least in dict(n=1, T=0, K=1, G=1, L1=0, weight=0, rho=0, batch_size=1, image_size=64, steps=1, ffn=1,
                            decoder_layers=1, overfit=0, lr=0, warmup=0, dropout=0, weight_decay=0, seed=0,
                            class_weight=0, mal_gamma=1, cost_class=0, f2=0, denoising=0, ema=0, unstable=0,
                            accumulate=1).items():
        if not math.inf > settings.get(name, least) >= least:   # so that nan fails, too
            raise UserError(f'{flag(name, settings[name])}: must be a number of at least {least}')
    # numpy's generator takes 32 bits, and the shapes of `val` have seed 2 * seed + 1; torch's, 64 of seed * steps.
    for name, most in dict(seed=2 ** 31 - 1, steps=10 ** 9, epochs=10 ** 9, eval_every=10 ** 9,
                            accumulate=10 ** 6).items():
        if settings.get(name) is not None and settings[name] > most:
            raise UserError(f'{flag(name, settings[name])}: must be at most {most}')
    for name in ('epochs', 'eval_every', 'clip'):
        if settings.get(name) is not None and not settings[name] > 0:
            raise UserError(f'{flag(name, settings[name])}: must be above 0')
    for name in ('rho', 'dropout', 'warmup', 'ema'):
        if not settings.get(name, 0) <= 1:
            raise UserError(f'{flag(name, settings[name])}: is a part, 0 to 1')
    if settings['schedule'] == 'flat-cosine' and settings['warmup'] > DENSE[1]:
        raise UserError(f'--warmup {settings["warmup"]}: flat-cosine falls from {DENSE[1]:.2f} of training on')
    if settings.get('L1', 0) > settings['decoder_layers']:
        raise UserError(f'--L1 {settings["L1"]}: the decoder has {settings["decoder_layers"]} layers')


def has_bfloat16(device: torch.device) -> bool:
    """Where --amp is the default: on a CUDA device that computes in bfloat16 and does not only emulate it."""
    return device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)


def compile_attention(device: torch.device) -> None:
    """--compile, for this process. Raises UserError if torch has no compiler to work with."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except RuntimeError as error:   # the first of many lines says what is missing
        raise UserError(f'--compile: torch cannot compile here ({str(error).splitlines()[0]}): install what it names, '
                        'or leave the flag out') from None
    # DeformableAttention looks it up by name at every call.
    hybrid_detr.deformable_attention = torch.compile(hybrid_detr.deformable_attention)


def main(argv: list[str] | None = None) -> None:
    given = parse(argv)
    check_given(given, ('data', 'out', 'resume', 'init', 'samples'))
    device = torch.device(given.pop('device', 'cuda' if torch.cuda.is_available() else 'cpu'))
    if device.type == 'cuda':
        device = torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))
        torch.cuda.set_device(device)   # or every process would gather its detections through the first GPU
        torch.set_float32_matmul_precision('high')   # TF32 in training; eval.py computes in full float32
    if given.pop('compile', False):
        compile_attention(device)
    machine = Machine(device, given.pop('amp', None), given.pop('workers', 2),
                      given.pop('checkpoint_activations', False), int(os.environ.get('RANK', 0)),
                      int(os.environ.get('WORLD_SIZE', 1)))
    if machine.workers < 0:
        raise UserError(f'--workers {machine.workers}: must be at least 0')
    samples = given.pop('samples', None)
    settings, folder, checkpoint = new_or_resumed(given)
    if samples:
        draw_samples(settings, samples)
        print(f'picture: {samples}')
        return
    check_writable(folder)
    train(settings, folder, checkpoint, machine)


if __name__ == '__main__':
    signal.signal(signal.SIGINT, note_interrupt)
    evaluation.run_command(main)
