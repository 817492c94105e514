"""Evaluate a detector: COCO's numbers, other measures, pictures, tables.

    python eval.py --weights runs/a/checkpoint.pt --nms 0.7 --unstable 20
    python eval.py --weights runs/a/checkpoint.pt --pictures 8
    python eval.py --weights runs/a/checkpoint.pt --images photo.jpg folder
    python eval.py --weights official.pth --data COCO
    python eval.py --compare runs/a-1 runs/a-2 runs/b-1 --curves ap.png

Read `detections`, `detect`, `average_precision` and `evaluate` first.
The rest is measures and pictures.

matchers.py explains the letters. `model` is a HybridDETR, and `dataset`
one of data.py. `ids` are the category ids of the model's class columns.
"""
import argparse
import contextlib
import io
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.ops import batched_nms, box_convert
from torchvision.transforms.v2.functional import to_dtype, to_pil_image
from torchvision.utils import draw_bounding_boxes
from tqdm import tqdm

from data import (IMAGENET_MEAN, IMAGENET_STD, Categories, CocoDataset, DenseOneToOne,
                  UserError, collate, open_dataset, pixel_target, read_image, resize_to, val_loader)
from hybrid_detr import HybridDETR, Outputs, TooFewTokens, from_official
from matchers import (Cost, QueryGroup, assign, class_scores, match, matching_cost, query_groups)

try:
    import resource
except ImportError:  # on Windows
    resource = None

METRICS = ('AP', 'AP50', 'AP75', 'AP_small', 'AP_medium', 'AP_large',
           'AR1', 'AR10', 'AR100', 'AR_small', 'AR_medium', 'AR_large')
NMS_IOU = 0.7  # of AP_nms and duplicates
DEVICES = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']


# --- Checkpoints ---

def read_checkpoint(path: str) -> dict:
    """Read a checkpoint without running code from it.

    The prefix `module.` of DistributedDataParallel is removed.
    Raises UserError for a damaged file or a weight that is not finite.
    """
    try:
        # Official files hold their settings in a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location='cpu', weights_only=True)
        model = {name.removeprefix('module.'): x for name, x in content['model'].items()}
        broken = [name for name, x in model.items() if not x.isfinite().all()]
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}') from None
    except Exception as error:
        # torch's text would explain how to run code from the file.
        raise UserError(f'{path} is no readable checkpoint ({type(error).__name__})') from None
    if broken:
        raise UserError(f'{path} holds a model that diverged: {broken[0]} is not finite')
    return content | {'model': model}


def load_detector(path: str):
    """Load a checkpoint -> the HybridDETR in eval(), Categories, settings.

    For an official file, the categories are None and the settings {}.
    Raises UserError if there is no detector in the file.
    """
    checkpoint = read_checkpoint(path)
    weights = checkpoint['model']
    try:
        if 'architecture' not in checkpoint:
            # A file of H-Deformable-DETR. Only mixed selection stores the
            # number of queries. The first 300 are the detector.
            mixed = 'query_embed.weight' in weights
            n = len(weights['query_embed.weight']) if mixed else 300
            groups = (300, n - 300) if n > 300 else (n,)
            return from_official(weights, groups, mixed).eval(), None, {}
        model = HybridDETR(**checkpoint['architecture'])
        model.load_state_dict(weights)
        return model.eval(), Categories(**checkpoint['categories']), checkpoint['settings']
    except Exception as error:
        reason = ' '.join(f'{type(error).__name__} {error}'.split())[:200]
        raise UserError(f'{path} does not fit: {reason}') from None


def ids_for(categories, dataset, columns: int) -> list[int]:
    """Return the category id of every class column.

    Raises UserError if model and data have different categories.
    """
    wanted = dataset.categories
    if categories is None:
        # Official: column c is COCO's raw id c, with unused gaps.
        if max(wanted.ids) >= columns:
            raise UserError(f'the data has category ids above {columns - 1}, the last column')
        return list(range(columns))
    if difference := categories.difference(wanted):
        raise UserError(f'checkpoint and data have different categories: {difference}')
    return wanted.ids


def data_of(settings, given, run) -> str:
    """Return `given`, or the data of a run.

    Raises UserError if the run's data folder is gone or empty.
    """
    data = given or settings['data']
    if not (given or data == 'shapes' or os.path.isdir(data) and os.listdir(data)):
        raise UserError(f'the data {data} of {run} is gone: give its new place with --data')
    return data


def cost_of(settings: dict) -> Cost:
    """Return the matching cost of a run, or the default."""
    if not settings:
        return Cost()
    return Cost(kind=settings['cost'], f2=settings['f2'],
                class_weight=settings['cost_class'], official=settings['official_losses'],
                softmax=settings['cls_loss'] == 'ce')


# --- Images without annotations ---

class ImageFiles(CocoDataset):
    """Image files, and the images directly in folders.

    Raises UserError for any other path.
    """

    def __init__(self, paths, size, categories):
        self.categories, self.seed = categories, 0
        self.transforms, names = resize_to(size), []
        for path in map(Path, paths):
            # macOS puts hidden files ._a.jpg beside a.jpg.
            files = [path] if path.is_file() else sorted(
                x for x in path.glob('[!.]*')
                if x.suffix.lower() in IMG_EXTENSIONS and x.is_file())
            if not files:
                raise UserError(f'{path} is no file, and no folder with images '
                                f'({" ".join(IMG_EXTENSIONS)})')
            names += map(str, files)
        self.images = [(i, name, None, None) for i, name in enumerate(names)]

    def load(self, index):
        image_id, name, *_ = self.images[index]
        image = read_image(name)
        target = pixel_target(np.zeros((0, 4)), np.zeros(0, int), image.size[::-1])
        return image, target, image_id, name


# --- From outputs to detections ---

def detections(outputs: Outputs, sizes: list, top=100, nms=None, softmax=False):
    """Take the `top` best of an image's N*C scores in the last layer.

    Returns for each image: scores (k,) in falling order, class columns
    (k,), boxes_xyxy (k,4) in pixels of the stored image.
    sizes: (height, width) of each stored image.
    nms: IoU above which a better box of the same class removes a box.
    NMS starts from 10 * top boxes, since many are duplicates.
    softmax: the model was trained with cross-entropy.
    """
    # AP needs no threshold. A query may appear with several classes.
    probability = class_scores(outputs.pred_logits[-1].float(), softmax)  # (B, N, C)
    B, N, C = probability.shape
    k = min(top if nms is None else 10 * top, N * C)
    scores, flat = probability.flatten(1).topk(k, 1)  # (B, k)
    query, columns = flat // C, flat % C  # flat = query * C + column
    boxes = box_convert(outputs.pred_boxes[-1].float(), 'cxcywh', 'xyxy')  # (B, N, 4)
    boxes = boxes.take_along_dim(query[..., None], 1)  # (B, k, 4)
    scale = torch.tensor([[w, h, w, h] for h, w in sizes], device=boxes.device)
    kept = []
    for s, c, b in zip(scores, columns, boxes * scale[:, None]):
        # batched_nms separates the classes only if no coordinate is negative.
        keep = slice(None) if nms is None else batched_nms(b - b.min(), s, c, nms)[:top]
        kept.append((s[keep], c[keep], b[keep]))
    return kept


@contextlib.contextmanager
def evaluating(model):
    """Switch to eval() without gradients, yield the device, switch back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        # Parents come first, so that each part ends in its own mode.
        for module, training in modes.items():
            module.train(training)


def predict(model, batch, group=0):
    """Return the outputs of one query group.

    Raises UserError if an image has fewer tokens than queries.
    """
    try:
        return model(batch.images, batch.padding_mask, group)
    except TooFewTokens as error:  # all images of a batch have one size
        raise UserError(f'{batch.names[0]}: {error}') from None


def detect(model, dataset, ids, *, batch_size, workers, nms=(None,), group=0):
    """Run the detector on a data set -> a list of rows, images per second.

    Rows are float64 (detections, 7): image id, x, y, w, h, score,
    category id. (x, y) is the top left corner in pixels.
    nms: an IoU or None for each entry of the list.
    The speed is the median over the batches, without loading.
    Under torchrun each process takes a share, and each gets all rows.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # The empty array: a process may have no images.
    rows, speeds = [[np.zeros((0, 7))] for _ in nms], []
    loader = val_loader(dataset, batch_size, workers, rank, world)
    with evaluating(model) as device:
        id_of = torch.tensor(ids, device=device)
        # None: no progress bar without a terminal.
        for batch in tqdm(loader, 'evaluate', leave=False, disable=rank > 0 or None):
            start = time.perf_counter()
            batch = batch.to(device)
            outputs = predict(model, batch, group)
            for share, iou in zip(rows, nms):
                found = detections(outputs, batch.sizes, nms=iou, softmax=model.softmax)
                for image_id, (scores, columns, boxes) in zip(batch.image_ids, found):
                    # pycocotools computes in double.
                    scores = scores.double()
                    boxes = box_convert(boxes, 'xyxy', 'xywh')
                    image = torch.full_like(scores, image_id)
                    row = torch.column_stack([image, boxes, scores, id_of[columns]])
                    share.append(row.cpu().numpy())
                if share is rows[0]:  # once
                    speeds.append(len(batch.images) / (time.perf_counter() - start))
    rows = [np.concatenate(share) for share in rows]
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, rows)
        rows = [np.concatenate(share) for share in zip(*shares)]
    return rows, float(np.median(speeds)) if speeds else 0.0


# --- Average precision and other measures ---

def one_line(metrics: dict):
    """Write the main numbers of `evaluate` as one line."""
    text = ('AP {AP:.3f}, AP50 {AP50:.3f}, after NMS AP {AP_nms:.3f}, {duplicates:.1%} '
            'duplicates, {gflops:.1f} GFLOPs, {inference_images_per_second:.0f} images/s')
    if metrics.get('unstable'):
        text += f', unstable {[round(x, 1) for x in metrics["unstable"]]} %'
    return text.format(**metrics)


def peak_memory(device):
    """Return the peak memory of the GPU or this process in GB, None if unknown."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == 'darwin' else 1024  # macOS counts bytes
    return resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def duplicate_rate(rows):
    """Return the share of detections (score > 0.3) that NMS removes.

    This project chose 0.3 and NMS_IOU.
    """
    rows = torch.from_numpy(rows[rows[:, 5] > 0.3])
    owner = rows[:, [0, 6]].unique(dim=0, return_inverse=True)[1]
    boxes = box_convert(rows[:, 1:5], 'xywh', 'xyxy')
    kept = batched_nms(boxes, rows[:, 5], owner, NMS_IOU)
    return (len(rows) - len(kept)) / max(len(rows), 1)


def coco_evaluation(coco_json: dict, rows, only_ap=False):
    """Run pycocotools on the rows of `detect` -> a COCOeval, its precision.

    precision: (IoU thresholds, recalls, classes) for all areas and 100
    detections. Speed: only_ap leaves out three of four area ranges.
    """
    from pycocotools.coco import COCO  # only needed here
    from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        truth = COCO()
        truth.dataset = coco_json
        truth.createIndex()
        # loadRes refuses an empty array.
        found = truth.loadRes(rows) if len(rows) else COCO()
        coco_eval = COCOeval(truth, found, 'bbox')
        if only_ap:
            del coco_eval.params.areaRng[1:]
        coco_eval.evaluate()
        coco_eval.accumulate()
    return coco_eval, coco_eval.eval['precision'][:, :, :, 0, -1]


def mean_known(numbers, otherwise=-1.0):
    """Average the known numbers (not -1, not nan)."""
    known = numbers[numbers > -1]
    return float(known.mean()) if known.size else otherwise


def average_precision(coco_json: dict, rows, table=False, curve=None):
    """Score the rows of `detect` -> {name: number}, {category id: AP}.

    The names are METRICS, oLRP and its parts. Without ground truth a
    number is -1 (COCO's convention), and the AP of a class is nan.
    table=True prints the numbers. curve: PNG of precision over recall.
    """
    coco_eval, precision = coco_evaluation(coco_json, rows)
    with contextlib.redirect_stdout(io.StringIO()) as summary:
        coco_eval.summarize()
    by_class = {category_id: mean_known(precision[..., k], math.nan)
                for k, category_id in enumerate(coco_eval.params.catIds)}
    errors = optimal_lrp(coco_eval)
    if table:
        print(summary.getvalue() + ' oLRP @[ IoU=0.50 ] = {:.3f}: localization {:.3f}, false '
              'positives {:.3f}, false negatives {:.3f}'.format(*errors.values()))
    if curve:
        draw_precision_recall(precision, curve)
    return {**dict(zip(METRICS, coco_eval.stats.tolist())), **errors}, by_class


def optimal_lrp(coco_eval) -> dict:
    """Compute oLRP, the optimal localization recall precision error, at IoU 0.5.

        LRP(s) = (sum over TP of (1 - IoU) / 0.5 + #FP + #FN) / (#TP + #FP + #FN)
        oLRP   = min over s of LRP(s), where detections of score >= s count
        Loc = mean of 1 - IoU,  FP = 1 - precision,  FN = 1 - recall,  at that s

    0 is perfect (Oksuz et al., ECCV 2018; H-DETR Fig. 4). The result is
    the mean over the classes with ground truth, or -1. A class whose best
    s keeps no detection has oLRP = FN = 1, and no Loc and FP.
    """
    parts = []
    # evalImgs is ordered by class, area range and image.
    for of_class in np.reshape(coco_eval.evalImgs, (len(coco_eval.params.catIds), 4, -1))[:, 0]:
        results = [r for r in of_class if r]
        targets = sum((r['gtIgnore'] == 0).sum() for r in results)
        if not targets:
            continue
        # (score, 1 for a TP, 1 - IoU). The first keeps no detection.
        found = [(math.inf, 0, 0.0)]
        for r in results:
            key = r['image_id'], r['category_id']
            # ious[key]: rows as in dtScores, columns as in _gts.
            column = {gt['id']: j for j, gt in enumerate(coco_eval._gts[key])}
            # Row 0 is IoU 0.5. dtMatches: id of a ground truth, or 0.
            at_half = zip(r['dtScores'], r['dtMatches'][0], r['dtIgnore'][0])
            for i, (score, gt, ignored) in enumerate(at_half):
                error = 1 - coco_eval.ious[key][i][column[gt]] if gt else 0.0
                found += [] if ignored else [(score, gt > 0, error)]
        score, hit, error = np.array(sorted(found, reverse=True)).T
        # Entry i of these arrays describes the i best detections.
        tp, error = hit.cumsum(), error.cumsum()
        fp, fn = np.arange(len(hit)) - tp, targets - tp
        lrp = (error / 0.5 + fp + fn) / (tp + fp + fn)
        # No threshold separates equal scores.
        lrp[:-1][score[:-1] == score[1:]] = math.inf
        with np.errstate(invalid='ignore'):  # 0 / 0 is nan
            curves = np.stack([lrp, error / tp, fp / (tp + fp), fn / targets])
        parts.append(curves[:, lrp.argmin()])
    names = 'oLRP', 'oLRP_Loc', 'oLRP_FP', 'oLRP_FN'
    return dict(zip(names, map(mean_known, np.reshape(parts, (-1, 4)).T)))


def inference_gflops(model, dataset, group):
    """Count the GFLOPs of the forward pass for the first image.

    torch's counter ignores the sampling of deformable attention.
    """
    batch = collate([dataset[0, 0]])
    # The counter needs eager code and gradients. The MATH backend has
    # the same count on CPU and CUDA.
    with (evaluating(model) as device, torch.inference_mode(False),
          torch.compiler.set_stance('force_eager'), sdpa_kernel(SDPBackend.MATH),
          FlopCounterMode(display=False) as counter):
        predict(model, batch.to(device), group)
    return counter.get_total_flops() / 1e9


def evaluate(model, dataset, ids, *, batch_size, workers, nms=None, group=0, table=False,
             curve=None):
    """Detect and measure -> {name: number}, {category id: AP}, rows.

    The numbers are those of `average_precision`, duplicates, AP_nms,
    millions of parameters, gflops, inference_images_per_second.
    Under torchrun only the first process has numbers.
    """
    (rows, nms_rows), speed = detect(model, dataset, ids, batch_size=batch_size,
                                     workers=workers, nms=(nms, NMS_IOU), group=group)
    if dist.is_initialized() and dist.get_rank() > 0:
        return {}, {}, rows
    coco_json = dataset.coco_json()
    metrics, by_class = average_precision(coco_json, rows, table, curve)
    _, precision = coco_evaluation(coco_json, nms_rows, only_ap=True)
    metrics |= dict(
        duplicates=duplicate_rate(rows), AP_nms=mean_known(precision),
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        gflops=inference_gflops(model, dataset, group), inference_images_per_second=speed)
    return metrics, by_class, rows


def columns_of(dataset, ids):
    """Return the class column of each label."""
    return torch.tensor([ids.index(category_id) for category_id in dataset.categories.ids])


def unstable_score(model, dataset, ids, n_images=20, cost=Cost(), *, batch_size=1, workers=0):
    """Return the % of objects that change their query, for each layer.

    The first n_images count (Stable-DINO §2.4.3, Fig. 3). Layer 1 is
    compared with the encoder, whose proposal i becomes query i. A
    one-stage model has no number for layer 1.
    The first group is matched one-to-one. Labels of proposals are 0.
    """
    changed, objects = 0, 0  # changed becomes (L,)
    with evaluating(model) as device:
        columns = columns_of(dataset, ids).to(device)
        for batch in val_loader(dataset, batch_size, workers, n=n_images):
            batch = batch.to(device)
            outputs = predict(model, batch)
            L, _, n, _ = outputs.pred_logits.shape
            # The proposals of the queries, as in `HybridDETR.select`.
            k = min(n, outputs.encoder_logits.shape[2])  # one-stage: 0
            chosen = outputs.encoder_logits[..., 0].topk(k).indices[..., None]  # (1, B, k, 1)
            proposals = [x.take_along_dim(chosen, 2) for x in outputs[2:]]
            labels = [columns[x] for x in batch.gt_labels]
            decoder, encoder = match(*outputs[:2], *proposals, labels, batch.gt_boxes,
                                     [QueryGroup(n, (1,) * L)], [QueryGroup(k, (1,))], cost)
            # (L + 1, objects), the encoder first; -1 if unmatched.
            query = torch.full((L + 1, sum(map(len, labels))), -1, device=device)
            query[0, encoder.gt] = encoder.query
            query[decoder.layer + 1, decoder.gt] = decoder.query
            query = query if k else query[1:]
            changed = changed + (query[1:] != query[:-1]).sum(1)
            objects += query.shape[1]
    return (100 * changed / objects).tolist() if objects else []


# --- Pictures ---

# Okabe and Ito's colours: the colour-blind can tell them apart.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')


def draw_boxes(image, boxes, labels: list[int], texts: list):
    """Draw boxes (M,4), as fractions, and texts on an image -> uint8 (3,H,W)."""
    # Undo `data.normalise`.
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    picture = to_dtype((image.cpu() * std + mean).clamp(0, 1), torch.uint8, scale=True)
    scale = max(1, math.ceil(384 / min(picture.shape[1:])))
    picture = picture.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    if not len(boxes):
        return picture
    _, height, width = picture.shape
    corners = box_convert(boxes.cpu(), 'cxcywh', 'xyxy').clamp(0, 1)
    corners = corners * torch.tensor([width - 1, height - 1] * 2)
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    return draw_bounding_boxes(picture, corners, texts, colors=colours, width=2, fill_labels=True,
                               label_colors='white', label_background_colors=colours)


def save_grid(pictures: list, columns, path):
    """Save uint8 pictures (3,H,W) as one PNG, row by row."""
    height, width = (max(x.shape[d] for x in pictures) + 8 for d in (1, 2))
    size = width * min(columns, len(pictures)), height * math.ceil(len(pictures) / columns)
    grid = Image.new('RGB', size, 'white')
    for i, picture in enumerate(pictures):
        grid.paste(to_pil_image(picture), (i % columns * width, i // columns * height))
    grid.save(path)


def draw_samples(dataset, path):
    """Save a PNG of 8 images with boxes, as training sees them."""
    dense = (True,) * isinstance(dataset, DenseOneToOne)
    pictures, names = [], dataset.categories.names
    for index in (dataset.dataset if dense else dataset).with_boxes[:8]:
        sample = dataset[0, index, *dense]
        labels = sample.labels.tolist()
        texts = [names[label] for label in labels]
        pictures.append(draw_boxes(sample.image, sample.boxes, labels, texts))
    save_grid(pictures, 4, path)


def draw_predictions(model, dataset, ids, path, n_images=4, threshold=0.3, nms=None, group=0):
    """Save a PNG: ground truth left, predictions right.

    Each of the first n_images is a row, and a class keeps its colour.
    """
    pictures, known = [], dataset.categories
    names = dict(zip(known.ids, known.names))
    with evaluating(model) as device:
        for batch in val_loader(dataset, 1, 0, n=n_images):
            outputs = predict(model, batch.to(device), group)
            # With an image of size (1, 1) the boxes stay fractions.
            found, = detections(outputs, [(1, 1)], nms=nms, softmax=model.softmax)
            scores, columns, boxes = (x[found[0] >= threshold] for x in found)
            predicted = [ids[column] for column in columns.tolist()]
            # An official column may be no category.
            texts = [f'{names.get(i, i)} {s:.2f}' for i, s in zip(predicted, scores)]
            boxes = box_convert(boxes, 'xyxy', 'cxcywh')
            true = [known.ids[label] for label in batch.gt_labels[0].tolist()]
            image, gt_boxes = batch.images[0], batch.gt_boxes[0]
            pictures += [draw_boxes(image, gt_boxes, true, [names[i] for i in true]),
                         draw_boxes(image, boxes, predicted, texts)]
    save_grid(pictures, 2, path)


def draw_matches(model, dataset, ids, path, index, cost=Cost()):
    """Save a PNG: how four schemes match the first group's predictions.

    Objects are orange. A matched query has the number of its object and
    the colour of its group. With several one-stage groups, the first 4
    objects have a panel each. It shows every group's query and
    reference point (Group DETR Fig. 3).
    Raises UserError for too few objects or queries.
    """
    batch = collate([dataset[0, index]])
    gt_boxes, = batch.gt_boxes
    M, N = len(gt_boxes), model.groups[0]
    own = [QueryGroup(n, (1,)) for n in (model.groups[:1] if model.two_stage else model.groups)]
    if not M or len(own) == 1 and N < 4:
        raise UserError(f'--matches needs 1 object, 4 queries: there are {M} and {N}')
    # A panel is (title, groups, objects).
    if len(own) > 1:
        panels = [(f'object {m} in each group', own, [m]) for m in range(M)[:4]]
    else:
        n = N // 4
        schemes = dict(one2one=dict(n=N), one2many=dict(n=N, K=3),
                       branch=dict(n=n, T=N - n, K=3), group=dict(n=n, G=4))
        panels = [(' '.join([scheme, *(flag(*item) for item in numbers.items())]),
                   query_groups(scheme, 1, **numbers), range(M))
                  for scheme, numbers in schemes.items()]
    with evaluating(model) as device:
        outputs = [predict(model, batch.to(device), group) for group in range(len(own))]
        logits, boxes, *_ = (torch.cat(x, 2)[-1:, 0] for x in zip(*outputs))  # (1, N, .)
        labels = columns_of(dataset, ids)[batch.gt_labels[0]].to(device)
        cost = matching_cost(logits, boxes, labels, gt_boxes.to(device), cost).cpu()  # (1, N, M)
        if len(own) > 1:
            points = model.reference_points(model.query_embed.chunk(2, 1)[0]).sigmoid()
            dots = torch.cat([points, torch.full_like(points, 0.02)], 1)
            boxes = torch.cat([boxes, dots[None]])  # (2, N, 4)
    frame, pictures = torch.tensor([[0.5, 0.5, 1, 1]]), []
    for title, groups, objects in panels:
        group_of = [g for g, group in enumerate(groups) for _ in range(group.queries)]
        matches = assign([cost], groups)
        kept = torch.isin(matches.gt, torch.tensor(objects))
        queries, gt = matches.query[kept], matches.gt[kept].tolist()
        # Objects (colour 4), queries, dots, a frame with a title.
        shown = torch.cat([gt_boxes, *boxes.cpu()[:, queries], frame])
        colours = [(0, 1, 2, 3, 5)[group_of[q] % 5] for q in queries] * len(boxes)
        texts = [*map(str, [*range(M), *gt, *[''] * (len(colours) - len(gt))]), title]
        pictures.append(draw_boxes(batch.images[0], shown, [4] * M + colours + [6], texts))
    save_grid(pictures, 2, path)


def line_chart(lines: dict, names, path):
    """Save a PNG of lines {text: (x, y)}, on axes from 0 to the largest value.

    A line (x, y, lowest, highest) has a band. names: those of the axes.
    """
    right = max(max(x) for x, *_ in lines.values())
    highest = max(max(map(max, ys)) for _, *ys in lines.values()) or 1
    top = 110 + 50 * len(lines)  # below the legend
    bottom = top + 950
    # The picture is halved at the end, for smooth lines.
    image = Image.new('RGB', (1600, bottom + 140), 'white')
    pen, font = ImageDraw.Draw(image, 'RGBA'), ImageFont.load_default(40)
    for tick in np.linspace(0, 1, 6):
        x, y = 150 + 1390 * tick, bottom - 950 * tick
        pen.line((x, top, x, bottom), '#DDDDDD', 2)
        pen.text((x, bottom + 50), f'{tick * right:.4g}', 'black', font, 'ms')
        pen.line((150, y, 1540, y), '#DDDDDD', 2)
        pen.text((134, y), f'{tick * highest:.2g}', 'black', font, 'rm')
    pen.text((845, bottom + 120), names[0], 'black', font, 'ms')
    pen.text((20, top - 40), names[1], 'black', font, 'lm')
    for i, (text, (x, *ys)) in enumerate(lines.items()):
        colour, height = COLOURS[i % len(COLOURS)], 40 + 50 * i
        across = 150 + 1390 * np.array(x) / right
        points, *edges = (list(zip(across, bottom - 950 * y / highest)) for y in ys)
        if edges:
            pen.polygon(edges[0] + edges[1][::-1], colour + '40', colour, 2)
        pen.line(points, colour, 8, 'curve')
        pen.line((20, height, 80, height), colour, 8)
        pen.text((96, height), text, 'black', font, 'lm')
    image.reduce(2).save(path)


def draw_precision_recall(precision, path):
    """Save a PNG of precision over recall (H-DETR Fig. 7).

    A curve is the mean over the classes; the area under it is its AP.
    Raises UserError without ground truth.
    """
    precision = precision[:, :, (precision > -1).all((0, 1))]
    if not precision.size:
        raise UserError(f'--pr-curve {path}: the data has no ground truth')
    means = precision.mean(2)  # row i is IoU 0.50 + 0.05 i
    recall = np.linspace(0, 1, len(means[0]))
    curves = {'0.5': means[0], '0.75': means[5], '0.5-0.95': means.mean(0)}
    lines = {f'IoU {iou}: AP {y.mean():.3f}': (recall, y) for iou, y in curves.items()}
    line_chart(lines, ('recall', 'precision'), path)


# --- Runs side by side ---

def read_metrics(path: Path):
    """Read a metrics.jsonl.

    Half a last line, left by a killed run, is skipped.
    Raises UserError if another line is damaged.
    """
    lines, records = path.read_text(errors='replace').splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            if number < len(lines):
                raise UserError(f'line {number} of {path} is damaged') from None
    return records


COLUMNS = ('AP', 'AP50', 'AP_nms', 'duplicates', 'seconds_per_step', 'memory_gb',
           'inference_images_per_second', 'gflops', 'parameters')


def compare(folders: list[str], picture=None):
    """Print a table of runs, and draw their AP over the steps.

    Folders NAME-1, NAME-2, ... are seeds of NAME. They make one row and
    one line, with mean, lowest and highest value. memory_gb is the
    lowest logged peak, since later peaks include evaluations.
    Raises UserError without evaluation, or if seeds differ in steps.
    """
    seeds, lines = {}, {}
    for folder in dict.fromkeys(map(Path, folders)):
        file = folder / 'metrics.jsonl'
        records = read_metrics(file) if file.is_file() else []
        evaluations = [record for record in records if 'AP' in record]
        if not evaluations:
            raise UserError(f'{file} holds no evaluation')
        numbers = dict.fromkeys(COLUMNS, -1) | evaluations[-1]  # -1: no number
        for key, summary in (('seconds_per_step', np.median), ('memory_gb', min)):
            numbers[key] = summary([r[key] for r in records if r.get(key)] or [-1])
        name = re.sub(r'-\d+$', '', str(folder))
        seeds.setdefault(name, []).append((evaluations, numbers))
    table = [['mean (lowest-highest)', 'seeds', 'steps', *COLUMNS], ['---'] * (3 + len(COLUMNS))]
    for name, runs in seeds.items():
        evaluations, numbers = zip(*runs)
        steps = [[record['step'] for record in records] for records in evaluations]
        if any(x != steps[0] for x in steps):
            raise UserError(f'{name}: its runs were evaluated at different steps')
        cells = [name, str(len(runs)), str(steps[0][-1])]
        for key in COLUMNS:
            values = [run[key] for run in numbers]
            digits = 3 if max(values) < 10 else 1
            mean, low, high = (f'{f(values):.{digits}f}' for f in (np.mean, min, max))
            cell = f'{mean} ({low}-{high})' if len(runs) > 1 else mean
            cells.append(cell if min(values) >= 0 else '-')
        table.append(cells)
        ap = np.array([[record['AP'] for record in records] for records in evaluations])
        lines[name] = steps[0], ap.mean(0), ap.min(0), ap.max(0)
    for cells in table:
        print('|', ' | '.join(cells), '|')
    if picture:
        line_chart(lines, ('steps', 'AP'), picture)


# --- The command ---

class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and exit code 1."""

    def parse_args(self, *args):
        flags = super().parse_args(*args)
        for name, value in vars(flags).items():
            if value in ('', ['']):  # an unset shell variable
                self.error(f"{flag(name)} '': is empty")
        return flags

    def error(self, message):
        # "argument --nms: 2: must be .." -> "--nms 2: must be .."
        raise UserError(re.sub('^argument ([^:]*):', r'\1', message))


def number(kind, low, high):
    """Return an argparse `type`: an int or a float from low to high."""
    def parsed(text: str):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        name = 'a whole number' if kind is int else 'a number'
        raise argparse.ArgumentTypeError(f'{text}: must be {name} from {low} to {high}')
    return parsed


def flag(name: str, value=None) -> str:
    """Write a setting as on the command line."""
    text = '--queries' if name == 'n' else '--' + name.replace('_', '-')
    if isinstance(value, bool):
        return text if value else text.replace('--', '--no-', 1)
    return text if value is None else f'{text} {value}'


def check_target(name: str, path: str, ending: str):
    """Raise UserError for a file that cannot be written."""
    if Path(path).suffix != ending:
        raise UserError(f'{flag(name, path)}: must end in {ending}')
    try:
        file = Path(os.path.realpath(path))  # not the link to it
        is_new = not file.exists()
        file.open('ab').close()
        if is_new:
            file.unlink()
    except OSError as error:
        raise UserError(f'{flag(name, path)}: {error.strerror}') from None


# flag -> the flag that it needs. The rest need --weights.
NEEDS = {'curves': 'compare', 'image': 'matches', 'picture_file': 'pictures'}
NOT_WITH_IMAGES = {'data', 'split', 'per_class', 'unstable', 'pr_curve', 'matches'}
TARGETS = 'save_json', 'pr_curve', 'matches', 'picture_file', 'curves'


def parse(argv=None):
    """Parse the command line. Raise UserError for a flag without effect."""
    parser = Parser(description=__doc__.split('\nRead ')[0],
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, number(int, 0, 10 ** 9)
    add('--weights', help='checkpoint of train.py or of H-Deformable-DETR')
    add('--data', help='shapes, or a COCO folder (default: as trained)')
    add('--images', nargs='+', metavar='PATH',
        help='detect in image files and folders without annotations')
    add('--split', choices=('val', 'train'), help='data split (default val; train after --overfit)')
    add('--image-size', type=number(int, 64, 4096), help='short side (default: as trained)')
    add('--batch-size', type=number(int, 1, 4096), help='images at a time (default: as trained)')
    add('--workers', type=number(int, 0, 256), help='loading processes (default 2)')
    add('--device', choices=DEVICES, help=f'default {DEVICES[-1]}')
    add('--group', type=count, help='query group that detects (default 0)')
    add('--nms', type=number(float, 0, 1), help='apply NMS with this IoU threshold')
    add('--per-class', action='store_const', const=True, help='AP of each class')
    add('--save-json', help="file for detections in COCO's results format")
    add('--unstable', type=count, help='%% of objects in N images that change query between layers')
    add('--pr-curve', help='PNG of precision over recall')
    add('--pictures', type=number(int, 0, 1000),
        help='draw detections of N images (default 8 with --images)')
    add('--picture-file', help='PNG for --pictures (default predictions.png)')
    add('--matches', help='PNG of matches by four schemes (one-stage: by groups)')
    add('--image', type=count, help='image number for --matches (default 0)')
    add('--compare', nargs='+', metavar='RUN',
        help='print a table of runs; NAME-1, NAME-2, .. are one row')
    add('--curves', help='PNG of AP over the steps, for --compare')
    args = vars(parser.parse_args(argv))
    given = {name: value for name, value in args.items() if value is not None}
    if 'images' in given:
        given.setdefault('pictures', 8)
    if ('weights' in given) == ('compare' in given):
        parser.error('give either --weights FILE or --compare RUN..')
    for name, value in given.items():
        needs = NEEDS.get(name, 'weights')
        if name != 'compare' and needs not in given:
            parser.error(f'{flag(name, value)}: needs {flag(needs)}')
        if name in NOT_WITH_IMAGES and 'images' in given:
            parser.error(f'{flag(name, value)}: not with --images')
    if given.get('pictures'):
        given.setdefault('picture_file', 'predictions.png')
    defaults = dict(workers=2, group=0, image=0, device=DEVICES[-1])
    return argparse.Namespace(**args | defaults | given)


def data_to_detect(args, model, categories, settings):
    """Open what the command line names -> the data set, its name."""
    size = args.image_size or settings.get('image_size', 800)
    if args.images:
        columns = range(model.num_classes)  # official: names are unknown
        known = categories or Categories(columns, [*map(str, columns)])
        return ImageFiles(args.images, size, known), ' '.join(args.images)[:200]
    if not (args.data or settings):
        raise UserError('an official checkpoint names no data: add --data COCO')
    data = data_of(settings, args.data, args.weights)
    # A run with --overfit is evaluated on its training images.
    overfit = 0 if args.split else settings.get('overfit', 0)
    split = args.split or ('train' if overfit else 'val')
    dataset = open_dataset(data, split, size, seed=settings.get('seed', 0), overfit=overfit)
    if dataset.most_boxes > 100:
        print(f'{data}: images have up to {dataset.most_boxes} objects, but AP counts only the '
              '100 best detections of an image')
    return dataset, f'{data}, {split}'


def main(argv=None):
    args = parse(argv)
    for name in TARGETS:
        if path := getattr(args, name):
            check_target(name, path, '.json' if name == 'save_json' else '.png')
    if args.compare:
        return compare(args.compare, args.curves)
    model, categories, settings = load_detector(args.weights)
    model.to(args.device)
    dataset, origin = data_to_detect(args, model, categories, settings)
    for name, n in (('group', len(model.groups)), ('image', len(dataset))):
        if (i := vars(args)[name]) >= n:
            raise UserError(f'--{name} {i}: there are {n}, from 0 on')
    ids, cost = ids_for(categories, dataset, model.num_classes), cost_of(settings)
    print(f'{args.weights}, group {args.group}, NMS {args.nms}, on {len(dataset)} images of '
          f'{origin}')
    options = dict(batch_size=args.batch_size or settings.get('batch_size', 2),
                   workers=args.workers, group=args.group)
    if args.images:
        [rows], speed = detect(model, dataset, ids, nms=[args.nms], **options)
        print(f'{speed:.1f} images/s')
    else:
        metrics, by_class, rows = evaluate(model, dataset, ids, nms=args.nms, table=True,
                                           curve=args.pr_curve, **options)
        if args.unstable:
            metrics['unstable'] = unstable_score(model, dataset, ids, args.unstable, cost,
                                                 workers=args.workers)
        print(one_line(metrics))
    if args.per_class:
        for category_id, name in zip(dataset.categories.ids, dataset.categories.names):
            print(f'{name:24} AP {by_class[category_id]:.3f}')
    if args.save_json:
        results = [{'image_id': int(i), 'category_id': int(c), 'bbox': box, 'score': score}
                   for i, *box, score, c in rows.tolist()]
        if args.images:
            for x in results:
                x['file_name'] = dataset.images[x.pop('image_id')][1]
        Path(args.save_json).write_text(json.dumps(results))
    if args.matches:
        draw_matches(model, dataset, ids, args.matches, args.image, cost)
    if args.pictures:
        draw_predictions(model, dataset, ids, args.picture_file, args.pictures, nms=args.nms,
                         group=args.group)


# Part of a RuntimeError's text -> its meaning for the user.
REASONS = {
    'gloo': 'another process is gone; its message says why',
    **dict.fromkeys(('DataLoader worker (pid', 'DataLoader timed out'),
                    'a loading process died or hangs: is the memory or /dev/shm '
                    'full? docker run --shm-size=8g, or --workers 0'),
    'compiler': '--compile needs what is named here',
    'triton': '--compile needs it',
    'allocate memory': 'the memory is full'}


def run_command(command):
    """Run a command. Errors that users can correct are one line, exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        # A letter that the terminal lacks is printed as \u1234.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
    try:
        return command()
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, FloatingPointError) as error:
        # A loading process puts its traceback before the text.
        reason = str(error).split('UserError: ')[-1]
    except torch.OutOfMemoryError as error:
        reason = f'{str(error).splitlines()[0]} Smaller --batch-size? --accumulate?'
    except RuntimeError as error:
        texts = [text for text in REASONS if text in str(error)]
        if not texts and not isinstance(error, dist.DistError):
            raise
        reason = f'{REASONS[texts[0] if texts else "gloo"]} ({str(error).splitlines()[0]})'
    sys.exit(f'{Path(sys.argv[0]).name}: {" ".join(reason.split())}')


if __name__ == '__main__':
    run_command(main)
