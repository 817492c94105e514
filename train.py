"""Train a detector with any matching scheme:  python train.py --scheme group

One loop, in the order things happen: learning rate, batch, forward, match, loss, backward, clip, step, log; now and then
evaluate and save. On CUDA if there is one, else on the CPU. Under `torchrun --nproc_per_node=W` the same code runs W times,
each process with its own --batch-size images.

Letters as in hybrid_detr.py: B images, L decoder layers, N queries, K copies, G groups, P matched pairs.
"""
import argparse
import json
import math
import os
import time
from pathlib import Path
from urllib.error import URLError

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import eval as evaluation
from data import FirstImages, UserError, open_dataset, train_loader
from hybrid_detr import HybridDETR, official_name
from losses import criterion
from matchers import encoder_groups, match, query_groups

# --- Settings: what is not given as a flag comes from here ----------------------------------------------------------

COMMON = dict(scheme='branch', data='shapes', model='tiny', seed=0, rho=2 / 3, weight=1.0, clip=0.1, weight_decay=1e-4,
              dropout=0.0, mixed_selection=True, look_forward_twice=True, pretrained=True, workers=2, eval_every=1.0,
              overfit=0, vertical_flip=False, init=None)
TINY = dict(image_size=128, batch_size=16, steps=600, lr=1e-3, schedule='cosine', warmup=0.05, pretrained=False, ffn=256)
TINY_PHOTOS = dict(image_size=192, batch_size=4, lr=7e-4, steps=2800)   # tiny on a folder of photographs
PAPER = dict(image_size=800, batch_size=2, epochs=12, lr=2e-4, schedule='step', warmup=0.0, ffn=2048)
TINY_MODEL = dict(width=96, heads=4, encoder_layers=2, decoder_layers=3, levels=3)
PAPER_MODEL = dict(width=256, heads=8, encoder_layers=6, decoder_layers=6, levels=4)

# The numbers of each scheme's table row (matchers.query_groups): the papers' on COCO, and a sixth of them for `tiny`.
PAPER_ROWS = {'one2one': dict(n=300), 'branch': dict(n=300, T=1500, K=6), 'epoch': dict(n=1800, K=10), 'layer': dict(n=1800, K=10, L1=4),
              'group': dict(n=300, G=11), 'one2many': dict(n=1800, K=6)}
TINY_ROWS = {'one2one': dict(n=50), 'branch': dict(n=50, T=150, K=6), 'epoch': dict(n=200, K=6), 'layer': dict(n=200, K=6, L1=2),
             'group': dict(n=50, G=5), 'one2many': dict(n=200, K=6)}


def parse(argv: list[str] | None = None) -> dict:
    """The flags that were given, by name; defaults are filled in by `complete`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    group = parser.add_argument_group('what to train')
    group.add_argument('--scheme', help=f'matching scheme: {", ".join(PAPER_ROWS)} (default: {COMMON["scheme"]})')
    group.add_argument('--data', help="'shapes', made on the fly, or a folder in the COCO layout (default: shapes)")
    group.add_argument('--vertical-flip', action='store_true', help='augment a folder for images without an up, as microscopes see')
    group.add_argument('--model', help='tiny, r50, or a ResNet or Swin of torchvision (default: tiny)')
    group.add_argument('--overfit', type=int, metavar='N', help='train and evaluate on the first N training images, unchanged')
    group = parser.add_argument_group("the scheme's numbers (defaults depend on scheme and model)")
    group.add_argument('--n', type=int, help='queries of the first group, the detector')
    group.add_argument('--T', type=int, help='queries of the one-to-many group (branch)')
    group.add_argument('--K', type=int, help='copies of each ground truth (branch, epoch, layer, one2many)')
    group.add_argument('--weight', type=float, help='lambda, loss weight of the one-to-many group (branch; default 1)')
    group.add_argument('--rho', type=float, help='part of training that is one-to-many (epoch; default 2/3)')
    group.add_argument('--L1', type=int, help='first decoder layers that are one-to-many (layer)')
    group.add_argument('--G', type=int, help='number of groups (group)')
    group = parser.add_argument_group('model: the switches of H-DETR Table 8')
    group.add_argument('--ffn', type=int, help='width of the feed-forward layers (tiny 256, else 2048)')
    group.add_argument('--dropout', type=float, help='dropout in the transformer (default 0)')
    group.add_argument('--no-mixed-selection', dest='mixed_selection', action='store_false', help='query content from the proposal, too')
    group.add_argument('--no-look-forward-twice', dest='look_forward_twice', action='store_false', help="a layer's loss stops at its own head")
    group.add_argument('--no-pretrained', dest='pretrained', action='store_false', help='start the backbone from scratch, batch norm trained')
    group = parser.add_argument_group('optimisation')
    group.add_argument('--image-size', type=int, help='short side of the images, at most, in pixels (tiny 128, else 800)')
    group.add_argument('--batch-size', type=int, help='images of a step, per process (tiny 16, else 2)')
    group.add_argument('--epochs', type=float, help='passes over the training images (default: 12 if not tiny)')
    group.add_argument('--steps', type=int, help='steps, instead of epochs (default: 1000 if tiny)')
    group.add_argument('--lr', type=float, help='learning rate; a tenth for the backbone and the sampling offsets (tiny 1e-3, else 2e-4)')
    group.add_argument('--schedule', choices=('step', 'cosine'), help='x0.1 for the last twelfth, or cosine to 0 (tiny)')
    group.add_argument('--warmup', type=float, help='part of training in which the learning rate rises (tiny 0.05, else 0)')
    group.add_argument('--weight-decay', type=float, help='of AdamW (default 1e-4)')
    group.add_argument('--clip', type=float, help='largest norm of the gradient (default 0.1)')
    group.add_argument('--seed', type=int, help='of weights, order, augmentation and shapes (default 0)')
    group = parser.add_argument_group('files and machine')
    group.add_argument('--out', help='folder of the run (default: runs/SCHEME, numbered if it is taken)')
    group.add_argument('--resume', metavar='RUN', help='go on with the run in this folder; no other setting may change')
    group.add_argument('--init', metavar='FILE', help='start from these weights, own or official; prints what does not fit')
    group.add_argument('--eval-every', type=float, help='epochs between evaluations and checkpoints (default 1)')
    group.add_argument('--workers', type=int, help='processes that load images (default 2)')
    group.add_argument('--device', help='cuda or cpu (default: cuda if there is one)')
    return vars(parser.parse_args(argv))


def complete(given: dict) -> dict:
    """Fill the flags that were not given, by model and scheme. Raises UserError for values that make no sense."""
    scheme, tiny = given.get('scheme', COMMON['scheme']), given.get('model', COMMON['model']) == 'tiny'
    rows = TINY_ROWS if tiny else PAPER_ROWS
    if scheme not in rows:
        raise UserError(f'--scheme {scheme}: choose from {", ".join(rows)}')
    photos = TINY_PHOTOS if tiny and given.get('data', COMMON['data']) != 'shapes' else {}
    settings = {**COMMON, **(TINY if tiny else PAPER), **photos, **rows[scheme], **given}
    if 'steps' in given and 'epochs' in given:
        raise UserError('--steps and --epochs: give one of them')
    if 'epochs' in given:
        settings.pop('steps', None)
    if 'steps' in given:
        settings.pop('epochs', None)
    for name, least in dict(n=1, T=0, K=1, G=1, weight=0, batch_size=1, image_size=32, steps=1, lr=0, workers=0, overfit=0).items():
        if settings.get(name, least) < least:
            raise UserError(f'--{name.replace("_", "-")} {settings[name]}: must be at least {least}')
    if not 0 <= settings['rho'] <= 1:
        raise UserError(f'--rho {settings["rho"]}: is a part of training, 0 to 1')
    layers = (TINY_MODEL if tiny else PAPER_MODEL)['decoder_layers']
    if not 0 <= settings.get('L1', 0) <= layers:
        raise UserError(f'--L1 {settings["L1"]}: the decoder has {layers} layers')
    return settings


def groups_at(settings: dict, layers: int, progress: float):
    row = {name: settings[name] for name in ('n', 'T', 'K', 'weight', 'rho', 'L1', 'G') if name in settings}
    return query_groups(settings['scheme'], layers, progress, **row)


def architecture(settings: dict, num_classes: int) -> dict:
    """The arguments of HybridDETR that a checkpoint has to remember."""
    tiny = settings['model'] == 'tiny'
    size = TINY_MODEL if tiny else PAPER_MODEL
    groups = [group.queries for group in groups_at(settings, size['decoder_layers'], 0.0)]
    return dict(num_classes=num_classes, groups=groups, backbone={'r50': 'resnet50'}.get(settings['model'], settings['model']),
                frozen_backbone=settings['pretrained'], ffn=settings['ffn'], dropout=settings['dropout'],
                mixed_selection=settings['mixed_selection'], look_forward_twice=settings['look_forward_twice'],
                encoder_heads=len(groups) if settings['scheme'] == 'group' else 1, **size)


# --- Start: model, optimizer, files ---------------------------------------------------------------------------------

def parameter_groups(model: HybridDETR, lr: float, tiny: bool) -> list[dict]:
    """A tenth of the learning rate for a pretrained backbone and for the sampling offsets, as in the official code."""
    slow, normal = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            slow_one = 'sampling_offsets' in name or (name.startswith('backbone') and not tiny)
            (slow if slow_one else normal).append(parameter)
    return [{'params': normal, 'lr': lr, 'base_lr': lr}, {'params': slow, 'lr': lr / 10, 'base_lr': lr / 10}]


def lr_factor(settings: dict, progress: float) -> float:
    """What the learning rate is multiplied by at `progress` 0..1."""
    if progress < settings['warmup']:
        return (progress + 1e-3) / (settings['warmup'] + 1e-3)
    if settings['schedule'] == 'step':   # epoch 11 of 12; the papers' longer runs drop it at about the same part
        return 1.0 if progress < 11 / 12 else 0.1
    return 0.5 * (1 + math.cos(math.pi * (progress - settings['warmup']) / (1 - settings['warmup'])))


def initialise(model: HybridDETR, path: str) -> None:
    """Load the weights of a checkpoint, own or official, that fit; say which do not."""
    checkpoint = evaluation.read_checkpoint(path)
    state = checkpoint['model']
    if evaluation.is_official(checkpoint):
        layers = 1 + max((int(name.split('.')[3]) for name in state if name.startswith('transformer.decoder.layers.')), default=-1)
        state = {official_name(name, layers) or name: value for name, value in state.items()}
    ours = model.state_dict()
    fits = {name: value for name, value in state.items() if name in ours and value.shape == ours[name].shape}
    model.load_state_dict({**ours, **fits})
    print(f'{path}: {len(fits)} of {len(ours)} entries loaded')
    for name in ours.keys() - fits.keys():
        print(f'  not in the file, or of another shape: {name} {tuple(ours[name].shape)}')
    for name in state.keys() - fits.keys() - ours.keys():
        print(f'  in the file, but not in this model: {name} {tuple(state[name].shape)}')


def save(path: Path, content: dict) -> None:
    """Write beside, then rename: whoever reads `path` finds the old file or the new one, never half of one."""
    part = path.with_suffix('.part')
    torch.save(content, part)
    os.replace(part, path)


def new_folder(settings: dict) -> Path:
    """The run's folder, not yet there: --out, or runs/SCHEME, runs/SCHEME-2, ... Raises UserError if --out is taken."""
    if 'out' in settings:
        if Path(settings['out']).exists():
            raise UserError(f'--out {settings["out"]} exists: go on with --resume {settings["out"]}, or choose another folder')
        return Path(settings['out'])
    taken = [Path('runs') / (settings['scheme'] + ('' if i == 1 else f'-{i}')) for i in range(1, 1000)]
    return next(path for path in taken if not path.exists())


# --- The loop -------------------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> None:
    given = parse(argv)
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    device = torch.device(given.pop('device', 'cuda' if torch.cuda.is_available() else 'cpu'))
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise UserError(f'--device {device}: torch finds no CUDA device here')
    if device.type == 'cuda':
        device = torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))
    workers, resume = given.pop('workers', COMMON['workers']), given.pop('resume', None)
    checkpoint = None
    if resume:
        folder = Path(resume)
        checkpoint = evaluation.read_checkpoint(str(folder / 'checkpoint.pt'))
        settings = checkpoint['settings']
        for name, value in given.items():
            if settings.get(name) != value:
                raise UserError(f'--{name.replace("_", "-")} {value}: the run in {folder} has {settings.get(name)}, and a resumed run '
                                'keeps its settings; start a new one with --init instead')
    else:
        settings = complete(given)
        folder = new_folder(settings)
    torch.manual_seed(settings['seed'])
    tiny = settings['model'] == 'tiny'

    train_set = open_dataset(settings['data'], 'train', settings['image_size'], augment=not settings['overfit'],
                             vertical_flip=settings['vertical_flip'], seed=settings['seed'])
    val_set = train_set if settings['overfit'] else open_dataset(settings['data'], 'val', settings['image_size'], seed=settings['seed'])
    if settings['overfit']:
        train_set = val_set = FirstImages(train_set, settings['overfit'])
    categories = train_set.categories
    if categories.ids != val_set.categories.ids:
        raise UserError(f'the training annotations have {len(categories)} categories, the validation annotations {len(val_set.categories)}')
    if checkpoint and checkpoint['categories'] != {'ids': categories.ids, 'names': categories.names}:
        raise UserError(f'the checkpoint has {len(checkpoint["categories"]["ids"])} classes, {settings["data"]} has {len(categories)}: '
                        'a resumed run needs the same; start a new one with --init')

    build = architecture(settings, len(categories))
    try:
        model = HybridDETR(**build)
    except ValueError as error:
        raise UserError(f'--model {settings["model"]}: {error}') from None
    if settings['pretrained'] and not tiny and not checkpoint:
        try:
            model.backbone.load_imagenet()
        except (URLError, OSError) as error:
            raise UserError(f'cannot download the ImageNet weights of {settings["model"]} ({error}): connect to the internet once, or train '
                            'from scratch with --no-pretrained') from None
    if settings['init'] and not checkpoint:
        initialise(model, settings['init'])
    model.to(device)
    layers = len(model.decoder)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings['lr'], tiny), weight_decay=settings['weight_decay'])
    start = 0
    if checkpoint:
        model.load_state_dict(checkpoint['model'])
        optimizer.load_state_dict(checkpoint['optimizer'])
        start = checkpoint['step']
        torch.set_rng_state(checkpoint['rng'])
    batch_size = min(settings['batch_size'], len(train_set))
    steps_per_epoch = max(1, len(train_set) // (batch_size * world))
    steps = settings.get('steps') or math.ceil(settings['epochs'] * steps_per_epoch)
    eval_every = max(1, round(settings['eval_every'] * steps_per_epoch))
    if world > 1:
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
        trained = DistributedDataParallel(model, device_ids=[device] if device.type == 'cuda' else None)
    else:
        trained = model

    metrics_file, checkpoint_file = folder / 'metrics.jsonl', folder / 'checkpoint.pt'
    if rank == 0:
        if checkpoint:   # what was logged after the checkpoint happens again
            kept = [line for line in metrics_file.read_text().splitlines() if json.loads(line)['step'] <= start]
            metrics_file.write_text(''.join(line + '\n' for line in kept))
        print(f'{folder}: {settings["scheme"]} on {settings["data"]}, {steps} steps of {batch_size * world} images on {device}, '
              f'{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters')
        for i, group in enumerate(groups_at(settings, layers, 0.0)):
            print(f'  group {i}: {group.queries} queries, copies of each ground truth per layer {group.copies}, weight {group.weight:.3g}')

    def log(record: dict) -> None:
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)   # only now: a run that fails at its start leaves nothing behind
            with metrics_file.open('a') as file:
                file.write(json.dumps(record) + '\n')

    loader = iter(train_loader(train_set, batch_size, steps, workers, settings['seed'], start, rank, world, device.type == 'cuda'))
    bar = tqdm(range(start, steps), initial=start, total=steps, disable=rank > 0, mininterval=1)
    recent, since = [], time.perf_counter()
    model.train()
    for step in bar:
        progress = step / steps
        for parameters in optimizer.param_groups:
            parameters['lr'] = parameters['base_lr'] * lr_factor(settings, progress)
        batch = next(loader).to(device)
        groups = groups_at(settings, layers, progress)

        outputs = trained(batch.images, batch.padding_mask)
        heads = len(model.encoder_class_heads)
        proposals = encoder_groups(groups, heads, outputs.encoder_logits.shape[2] // heads)
        try:
            matches, encoder_matches = match(*outputs, batch.gt_labels, batch.gt_boxes, groups, proposals)
        except FloatingPointError as error:
            raise UserError(f'step {step}: {error}; images {", ".join(batch.names)}. Lower --lr?') from None
        num_boxes = torch.tensor(float(sum(map(len, batch.gt_labels))))
        if world > 1:
            num_boxes = num_boxes.to(device)
            dist.all_reduce(num_boxes)
        parts, iou = criterion(outputs, batch.gt_labels, batch.gt_boxes, matches, encoder_matches, groups, proposals,
                               num_boxes.item() / world)
        loss = sum(parts.values())

        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings['clip'])
        optimizer.step()

        # What the matching did: box quality of the first group's last layer, and positives of all layers and groups.
        final = (matches.layer == layers - 1) & (matches.query < groups[0].queries)
        recent.append(torch.stack([*(part.detach() for part in parts.values()), iou[final].sum(), final.sum()]))
        done = step + 1
        if done % 50 == 0 or done == steps:
            seconds, values = time.perf_counter() - since, torch.stack(recent).mean(0).tolist()
            record = {'step': done, 'epoch': round(done / steps_per_epoch, 3), 'loss': sum(values[:-2]), **dict(zip(parts, values)),
                      'matched_iou': values[-2] / max(values[-1], 1e-9), 'positives': len(matches.layer) / layers / batch_size,
                      'lr': optimizer.param_groups[0]['lr'], 'images_per_second': len(recent) * batch_size * world / seconds}
            log(record)
            bar.set_postfix({'loss': f'{record["loss"]:.2f}', 'IoU': f'{record["matched_iou"]:.3f}',
                             'positives/image': f'{record["positives"]:.1f}', 'images/s': f'{record["images_per_second"]:.0f}'})
            recent, since = [], time.perf_counter()
        if done % eval_every == 0 or done == steps:
            rows = evaluation.detect(model, val_set, categories.ids, batch_size=batch_size, workers=workers)
            if rank == 0:
                metrics, _ = evaluation.average_precision(val_set.coco_json(), rows, table=done == steps)
                log({'step': done, 'epoch': round(done / steps_per_epoch, 3), **metrics})
                bar.write(f'step {done}: AP {metrics["AP"]:.3f}, AP50 {metrics["AP50"]:.3f}')
                save(checkpoint_file, {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'step': done,
                                       'settings': settings, 'architecture': build, 'rng': torch.get_rng_state(),
                                       'categories': {'ids': categories.ids, 'names': categories.names}})
            since = time.perf_counter()

    if rank == 0:
        picture = folder / 'predictions.png'
        evaluation.draw_predictions(model, val_set, categories.ids, picture)
        print(f'checkpoint: {checkpoint_file}\npicture:    {picture}\nlook:       python eval.py --weights {checkpoint_file} --pictures 8')
    if world > 1:
        dist.destroy_process_group()


if __name__ == '__main__':
    evaluation.run_command(main)
