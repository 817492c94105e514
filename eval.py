"""COCO average precision, other measures of the papers, pictures, comparisons and a benchmark.

    python eval.py --weights runs/group/checkpoint.pt                          its own data, the 12 COCO numbers
    python eval.py --weights runs/group/checkpoint.pt --nms 0.7 --group 1      with NMS, another group of queries
    python eval.py --weights runs/group/checkpoint.pt --pictures 8             ground truth beside predictions
    python eval.py --weights runs/group/checkpoint.pt --pr-curve pr.png        precision over recall
    python eval.py --weights runs/group/checkpoint.pt --unstable 20            does the matching change between layers?
    python eval.py --weights runs/group/checkpoint.pt --matches matches.png    who answers for whom, in every scheme
    python eval.py --weights official.pth --data COCO                          a checkpoint of HDETR/H-Deformable-DETR
    python eval.py --compare runs/a-1 runs/a-2 runs/b-1 --curves curves.png    several runs in tables and a picture
    python eval.py --figures DIR                                               the schemes and losses as pictures
    python eval.py --benchmark                                                 time and memory of all schemes

Read `detections`, `detect` and `average_precision` first; the rest are measures, pictures and the benchmark, each by
itself. Letters as in matchers.py; n are the queries of one group; in deformable attention J are sampling points.
"""
import argparse
import contextlib
import io
import json
import math
import pickle
import re
import sys
import time
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import batched_nms, box_convert, generalized_box_iou, sigmoid_focal_loss
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes
from tqdm import tqdm

import hybrid_detr
from data import (IMAGENET_MEAN, IMAGENET_STD, Batch, Categories, FirstImages, UserError, collate,
                  open_dataset, train_loader, val_loader)
from hybrid_detr import HybridDETR, Outputs, TooFewTokens, from_official
from losses import MATCHED, criterion, curve as loss_curve
from matchers import (TOY_COST, TOY_ROWS, Cost, assign, class_scores, denoising_queries, encoder_groups, match,
                      matching_cost, query_groups, toy)

METRICS = ('AP', 'AP50', 'AP75', 'AP_small', 'AP_medium', 'AP_large',
           'AR1', 'AR10', 'AR100', 'AR_small', 'AR_medium', 'AR_large')


# --- Checkpoints ----------------------------------------------------------------------------------------------------

def read_file(path: str):
    """What torch.save wrote, as data: no code in it is run. Raises UserError if it cannot be read."""
    try:
        # Official files hold their settings in a Namespace. The warning is about files that may fail: see below then.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Detected pickle protocol')
            return torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(f'checkpoint {path} does not exist') from None
    except IsADirectoryError:
        raise UserError(f'{path} is a folder: name the file in it, such as {Path(path) / "checkpoint.pt"}') from None
    except pickle.UnpicklingError:   # whose text tells how to run what is in the file
        raise UserError(f'{path} is no readable checkpoint: it is damaged, or holds other things than tensors, numbers '
                        'and text, which are not loaded since they could run code') from None
    except Exception as error:   # a damaged file, or one with code in it, can fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f'{path} is no readable checkpoint: {reason}') from None


def read_checkpoint(path: str) -> dict:
    """The content of a checkpoint with usable weights. Raises UserError if the file cannot be read, or has none."""
    content = read_file(path)
    # Sparse, quantized and meta tensors load, too, but are no weights.
    model = content.get('model') if isinstance(content, dict) else None
    if not isinstance(model, dict) or not all(
            isinstance(name, str) and isinstance(x, Tensor) and x.layout == torch.strided
            and not x.is_quantized and not x.is_meta for name, x in model.items()):
        raise UserError(f"{path} is no checkpoint of a detector: it has no entry 'model' of names and tensors")
    broken = next((name for name, x in model.items() if not x.isfinite().all()), None)
    if broken is not None:
        raise UserError(f'{path} holds a model that diverged: {broken} is not finite')
    return content


def is_official(checkpoint: dict) -> bool:
    """Of HDETR/H-Deformable-DETR? Only train.py writes down the architecture; theirs is read off the shapes."""
    return 'architecture' not in checkpoint


def categories_of(checkpoint: dict) -> Categories:
    categories = checkpoint['categories']
    if not isinstance(categories, dict):   # a tensor would take a name as an index, with a warning
        raise TypeError('its categories are no dictionary')
    ids, names = categories['ids'], categories['names']
    for values, kind in ((ids, int), (names, str)):
        if not isinstance(values, list) or len(values) != len(ids) or not all(isinstance(x, kind) for x in values):
            raise ValueError('its categories are no lists of ids and names')
    return Categories(ids, names)


def load_detector(path: str) -> tuple[HybridDETR, Categories | None, dict]:
    """-> the model in eval mode, the categories of its columns (None: COCO's raw ids), the settings of its training.

    Raises UserError if the file does not hold a detector of this project or of HDETR/H-Deformable-DETR.
    """
    checkpoint = read_checkpoint(path)
    try:
        if is_official(checkpoint):
            mixed = 'query_embed.weight' in checkpoint['model']   # without, no entry tells the number of queries
            queries = len(checkpoint['model']['query_embed.weight']) if mixed else 300
            groups = (300, queries - 300) if queries > 300 else (queries,)   # as in all official files of a ResNet
            return from_official(checkpoint['model'], groups, mixed).eval(), None, {}
        model = HybridDETR(**checkpoint['architecture'])
        model.load_state_dict(checkpoint['model'])
        categories, settings = categories_of(checkpoint), dict(checkpoint['settings'])
        if len(categories) != model.num_classes:
            raise ValueError(f'it has {model.num_classes} classes and the names of {len(categories)}')
        if not isinstance(settings.get('data', ''), str):
            raise TypeError(f'its settings have the data {settings["data"]!r}')
        # Below 2^31: the shapes of `val` have seed 2 * seed + 1, and numpy's generator takes 32 bits.
        for name, least in dict(image_size=64, batch_size=1, seed=0, overfit=0).items():
            value = settings.get(name, least)
            if not isinstance(value, int) or not least <= value < 2 ** 31:
                raise ValueError(f'its settings have the {name} {value!r}')
    except Exception as error:   # entries may be missing, or anything: it is somebody's file
        raise UserError(f'{path} does not fit: {type(error).__name__} {" ".join(str(error).split())[:200]}') from None
    return model.eval(), categories, settings


def ids_for(model_categories: Categories | None, dataset: Dataset, columns: int) -> list[int]:
    """The category id of every class column. Raises UserError if the model was trained for other categories."""
    wanted = dataset.categories
    if model_categories is None:   # an official checkpoint: column c is COCO's raw category id c, 0 and the gaps unused
        if max(wanted.ids) >= columns:
            raise UserError(f'the checkpoint has {columns} columns for category ids, the data has id {max(wanted.ids)}')
        return list(range(columns))
    if (model_categories.ids, model_categories.names) != (wanted.ids, wanted.names):
        known, needed = (f'{len(c)} classes, {", ".join(c.names[:4])}.. with ids {c.ids[:4]}..'
                         for c in (model_categories, wanted))
        raise UserError(f'the checkpoint detects {known}, the data has {needed}')
    return wanted.ids


def cost_of(settings: dict) -> Cost:
    """The matching cost that saved settings ask for; what they lack (those of official files) is Cost's default."""
    default = Cost()
    return Cost(kind=settings.get('cost', default.kind), f2=settings.get('f2', default.f2),
                class_weight=settings.get('cost_class', default.class_weight),
                official=settings.get('official_losses', False), softmax=settings.get('cls_loss') == 'ce')


# --- From outputs to detections -------------------------------------------------------------------------------------

def detections(outputs: Outputs, sizes: list[tuple[int, int]], top: int = 100, nms: float | None = None,
               softmax: bool = False) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The `top` best of all N*C scores of the last layer: -> per image scores (k,) in falling order, class columns
    (k,), boxes_xyxy (k,4) in pixels of the stored image, whose (height, width) is in `sizes`; k = min(top, N*C), or
    less with NMS.

    A query may appear with several classes (as in the official codes of Deformable DETR and H-DETR). With NMS at
    IoU `nms`, the best 10 * top are thinned out first: else duplicates would take the places of other objects.
    softmax: of a model trained with cross-entropy.
    """
    # Every (query, class) is a candidate; all of an image are ranked at once. AP needs no threshold, only an order.
    # COCO looks at the best 100 of each class in an image; 100 of all classes is Deformable DETR's and H-DETR's choice.
    probability = class_scores(outputs.pred_logits[-1].float(), softmax)                            # (B, N, C)
    B, N, C = probability.shape
    scores, flat = probability.flatten(1).topk(min(top if nms is None else 10 * top, N * C), 1)     # (B, k)
    columns, query = flat % C, flat // C   # flat = query * C + column
    boxes = box_convert(outputs.pred_boxes[-1].float(), 'cxcywh', 'xyxy').gather(1, query[..., None].expand(-1, -1, 4))
    boxes = boxes * torch.tensor([[w, h, w, h] for h, w in sizes], device=boxes.device)[:, None]
    kept = []
    for s, c, b in zip(scores, columns, boxes):
        # b - b.min(): batched_nms tells classes apart by adding multiples of the largest coordinate to their boxes,
        # which separates them only if none is negative.
        keep = slice(None) if nms is None else batched_nms(b - b.min(), s, c, nms)[:top]
        kept.append((s[keep], c[keep], b[keep]))
    return kept


@contextlib.contextmanager
def evaluating(model: torch.nn.Module):
    """In eval() and without gradients -> its device; afterwards the model is left as it was, whatever happens."""
    modes = {module: module.training for module in model.modules()}   # parts of it may be in eval(), as in train.py
    model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        for module, training in modes.items():   # parents first; train(), since torchvision's backbones act on it
            module.train(training)


def predict(model: torch.nn.Module, batch: Batch, group: int | None = 0, noised=None) -> Outputs:
    """The outputs for a batch on the model's device, of one group or, in training, of all (None) and of denoising.

    Raises UserError if its images have fewer tokens than queries."""
    try:
        return model(batch.images, batch.padding_mask, group, noised)
    except TooFewTokens as error:   # all images of a batch have one size, so the first stands for all
        raise UserError(f'{batch.names[0]}: {error}') from None


def detect(model: HybridDETR, dataset: Dataset, ids: list[int], *, batch_size: int, workers: int,
           nms: float | None = None, group: int = 0) -> np.ndarray:
    """Run the detector over a data set -> float64 (detections, 7): image id, x, y, w, h, score, category id, with the
    top left corner (x, y) in pixels of the stored image, as pycocotools wants it. ids: of the class columns.

    Under torchrun every process takes its share of the images, and all get all rows. The model is left as it was.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows, id_of = [np.zeros((0, 7))], np.array(ids)   # the empty one: a process may have no images to concatenate
    loader = val_loader(dataset, batch_size, workers, rank, world)
    with evaluating(model) as device:
        for batch in tqdm(loader, desc='evaluate', leave=False, disable=rank > 0 or None):   # None: if no terminal
            batch = batch.to(device)
            found = detections(predict(model, batch, group), batch.sizes, nms=nms, softmax=model.softmax)
            for image_id, (scores, columns, boxes) in zip(batch.image_ids, found):
                xywh = box_convert(boxes, 'xyxy', 'xywh').double().cpu().numpy()   # pycocotools computes in double
                rows.append(np.column_stack([np.full(len(xywh), image_id), xywh, scores.double().cpu(),
                                             id_of[columns.cpu()]]))
    rows = np.concatenate(rows)
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, rows)
        rows = np.concatenate(shares)
    return rows


def duplicate_rate(rows: np.ndarray) -> float:
    """The fraction of the detections of score above 0.3 that NMS at IoU 0.7 would remove; 0 if there are none.
    Both numbers are this project's choice; no paper measures it."""
    rows = torch.from_numpy(rows[rows[:, 5] > 0.3])
    image_and_class = rows[:, [0, 6]].unique(dim=0, return_inverse=True)[1]
    kept = batched_nms(box_convert(rows[:, 1:5], 'xywh', 'xyxy'), rows[:, 5], image_and_class, 0.7)
    return (len(rows) - len(kept)) / max(len(rows), 1)


def average_precision(coco_json: dict, rows: np.ndarray, table: bool = False, curve: str | None = None):
    """For the rows of `detect`: -> {name: number} of pycocotools' 12 and oLRP with its parts (-1: the mean of no
    class at all), and {category id: AP} (nan: a class without ground truth).

    table=True prints pycocotools' table and oLRP; curve: PNG to draw precision over recall to.
    """
    from pycocotools.coco import COCO   # only needed here: training and inference run without it
    from pycocotools.cocoeval import COCOeval
    if not coco_json['images']:
        raise UserError('there are no images to evaluate on')
    chatter = io.StringIO()   # pycocotools tells its progress with print
    with contextlib.redirect_stdout(chatter):
        truth = COCO()
        truth.dataset = coco_json
        truth.createIndex()
        if len(rows):
            found = truth.loadRes(rows)
        else:   # which loadRes cannot take
            found = COCO()
            found.dataset = {'images': coco_json['images'], 'annotations': [], 'categories': coco_json['categories']}
            found.createIndex()
        coco_eval = COCOeval(truth, found, 'bbox')
        coco_eval.evaluate()
        coco_eval.accumulate()
    with contextlib.nullcontext() if table else contextlib.redirect_stdout(chatter):
        coco_eval.summarize()
    # (IoU thresholds, recalls, classes) of all areas and 100 detections; the values are -1 without ground truth.
    precision = coco_eval.eval['precision'][:, :, :, 0, -1]
    by_class = {}
    for k, category_id in enumerate(coco_eval.params.catIds):
        known = precision[..., k][precision[..., k] > -1]
        by_class[category_id] = float(known.mean()) if known.size else math.nan
    errors = optimal_lrp(coco_eval)
    if table:
        print(' oLRP @[ IoU=0.50 ] = {oLRP:.3f}: localization {oLRP_Loc:.3f}, false positives {oLRP_FP:.3f}, '
              'false negatives {oLRP_FN:.3f}'.format(**errors))
    if curve:
        draw_precision_recall(precision, curve)
    return {**dict(zip(METRICS, coco_eval.stats.tolist())), **errors}, by_class


def optimal_lrp(coco_eval) -> dict[str, float]:
    """oLRP, the optimal Localization Recall Precision error at IoU 0.5, and its parts: 0 is perfect, 1 the worst.

        LRP(s) = (sum over TP of (1 - IoU) / 0.5 + #FP + #FN) / (#TP + #FP + #FN),  of the detections of score >= s
        oLRP = min over s;  there Loc = mean over TP of 1 - IoU,  FP = 1 - precision,  FN = 1 - recall

    Oksuz et al., ECCV 2018; H-DETR Fig. 4. TP and FP are those of a COCOeval after `evaluate` (all areas, the 100 best
    detections of a class in an image, crowds ignored); the mean is over the classes with ground truth. A class without
    detections, or whose best threshold keeps none, has oLRP = FN = 1 but no Loc and no FP, and is left out of their
    means. As in COCO's numbers, -1 is the mean of no class at all.
    """
    params, of_classes = coco_eval.params, []
    for k in range(len(params.catIds)):
        first = k * len(params.areaRng) * len(params.imgIds)   # evalImgs is ordered by class, area ('all' first), image
        results = [r for r in coco_eval.evalImgs[first:first + len(params.imgIds)] if r]
        targets = sum(int((r['gtIgnore'] == 0).sum()) for r in results)
        if not targets:
            continue
        pairs = [(math.inf, 0, 0.0)]   # score, is it a TP, 1 - IoU; the first is the threshold above all scores
        for r in results:
            key = r['image_id'], r['category_id']
            # ious[key] is (detections, ground truths): rows in the order of dtScores, columns in that of _gts (gtIds is
            # sorted anew, with the ignored last).
            column = {gt['id']: j for j, gt in enumerate(coco_eval._gts[key])}
            # The first IoU threshold is 0.5; dtMatches holds the id of the ground truth, 0 for none.
            at_half = zip(r['dtScores'], r['dtMatches'][0], r['dtIgnore'][0])
            pairs += [(score, 1, 1 - coco_eval.ious[key][i][column[gt]]) if gt else (score, 0, 0.0)
                      for i, (score, gt, ignored) in enumerate(at_half) if not ignored]
        score, hit, error = np.array(sorted(pairs, reverse=True)).T
        tp, error = hit.cumsum(), error.cumsum()            # entry i: of the i best detections
        fp, fn = np.arange(len(hit)) - tp, targets - tp
        lrp = (error / 0.5 + fp + fn) / (tp + fp + fn)
        lrp[:-1][score[:-1] == score[1:]] = math.inf        # a threshold cannot divide equal scores
        with np.errstate(invalid='ignore'):                 # 0 / 0 is nan: no TP, no Loc; no detection, no FP
            parts = np.stack([lrp, error / tp, fp / (tp + fp), fn / targets])
        of_classes.append(parts[:, lrp.argmin()])
    columns = np.reshape(of_classes, (-1, 4)).T
    return {name: float(np.nanmean(column)) if not np.isnan(column).all() else -1.0
            for name, column in zip(('oLRP', 'oLRP_Loc', 'oLRP_FP', 'oLRP_FN'), columns)}


# --- How stable the matching is -------------------------------------------------------------------------------------

def columns_of(dataset: Dataset, ids: list[int]) -> Tensor:
    """The class column of each label of the data set: in an official checkpoint it is not the label itself."""
    return torch.tensor([ids.index(category_id) for category_id in dataset.categories.ids])


def unstable_score(model: HybridDETR, dataset: Dataset, ids: list[int], n_images: int = 20, cost: Cost = Cost(), *,
                   batch_size: int = 1, workers: int = 0) -> list[float]:
    """Stable-DINO §2.4.3, Fig. 3: for each decoder layer the percentage of ground truths whose query is another one
    than in the layer before. Layer 1 is compared with the encoder: its proposal number i is the start of query i.

    Of the first group, the detector, matched one-to-one whatever the scheme. In the encoder with all labels 0, as in
    training, but only the n chosen proposals: another token has no query to be compared with. The paper's example is
    one image; this is the percentage of all ground truths of the first n_images, and an empty list without any. ids:
    of the class columns. The model is left as it was.
    """
    changed, total = 0, 0   # of each layer, int (L,); ground truths
    with evaluating(model) as device:
        columns = columns_of(dataset, ids).to(device)
        for batch in val_loader(FirstImages(dataset, n_images), batch_size, workers):
            batch = batch.to(device)
            outputs = predict(model, batch)   # of one group, so the encoder has one head
            L, _, n, _ = outputs.pred_logits.shape
            chosen = outputs.encoder_logits[..., 0].topk(n, dim=2).indices[..., None]   # (1, B, n, 1), as in `select`
            proposals = [x.gather(2, chosen.expand(-1, -1, -1, x.shape[3]))
                         for x in (outputs.encoder_logits, outputs.encoder_boxes)]
            groups = query_groups('one2one', L, n=n)
            try:
                decoder, encoder = match(*outputs[:2], *proposals, [columns[labels] for labels in batch.gt_labels],
                                         batch.gt_boxes, groups, encoder_groups(groups, 1, n), cost)
            except FloatingPointError as error:
                raise UserError(f'{error}; the images are {", ".join(batch.names)}') from None
            # (L + 1, objects), the encoder's first; -1 where there are more objects than queries.
            query = torch.full((L + 1, sum(map(len, batch.gt_labels))), -1, device=device)
            query[0, encoder.gt] = encoder.query
            query[decoder.layer + 1, decoder.gt] = decoder.query
            changed = changed + (query[1:] != query[:-1]).sum(1)
            total += query.shape[1]
    return (100 * changed / total).tolist() if total else []


# --- Pictures -------------------------------------------------------------------------------------------------------

def as_picture(image: Tensor) -> Tensor:
    """Undo `data.normalise`: float (3,H,W) -> uint8 (3,H,W)."""
    mean, std = (torch.tensor(x, device=image.device)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    return v2.functional.to_dtype((image * std + mean).clamp(0, 1), torch.uint8, scale=True).cpu()


# Okabe and Ito's colours, told apart by the colour-blind and in print; a class keeps its colour left and right.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000', '#F0E442')


def corners_in(boxes: Tensor, width: int, height: int) -> Tensor:
    """Boxes (M,4) as fractions -> their corners in the pixels of a picture, (M,4); on its border, its last pixel."""
    return box_convert(boxes.cpu(), 'cxcywh', 'xyxy').clamp(0, 1) * torch.tensor([width - 1, height - 1] * 2)


def draw_boxes(picture: Tensor, boxes: Tensor, labels: list[int], texts: list[str]) -> Tensor:
    """uint8 (3,H,W) and boxes (M,4) as fractions -> the picture with boxes and texts, its short side at least 384."""
    scale = max(1, math.ceil(384 / min(picture.shape[1:])))   # pixels stay square, and the texts readable
    picture = picture.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    if not len(boxes):
        return picture
    height, width = picture.shape[1:]
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    return draw_bounding_boxes(picture, corners_in(boxes, width, height), texts, colors=colours, width=2,
                               label_colors='white', label_background_colors=colours, fill_labels=True)


def save_grid(rows: list[list[Tensor]], path: str | Path) -> None:
    """Save a PNG of pictures, uint8 (3,H,W) each, row by row with white between them."""
    def padded(picture, height, width):
        return v2.functional.pad(picture, [0, 0, width - picture.shape[2], height - picture.shape[1]], fill=255)
    lines = []
    for row in rows:
        height = max(picture.shape[1] for picture in row) + 8
        lines.append(torch.cat([padded(picture, height, picture.shape[2] + 8) for picture in row], 2))
    width = max(line.shape[2] for line in lines)
    grid = torch.cat([padded(line, line.shape[1], width) for line in lines], 1)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)


def draw_predictions(model: HybridDETR, dataset: Dataset, ids: list[int], path: str | Path, n_images: int = 4,
                     threshold: float = 0.3, nms: float | None = None, group: int = 0) -> None:
    """Save a PNG, a row for each of the first n_images: ground truth left, predictions of score >= threshold right."""
    rows, categories = [], dataset.categories
    names = dict(zip(categories.ids, categories.names))
    with evaluating(model) as device:
        for batch in val_loader(FirstImages(dataset, n_images), 1, 0):
            # As if the image had one pixel: so the boxes stay fractions.
            (scores, columns, boxes), = detections(predict(model, batch.to(device), group), [(1, 1)], nms=nms,
                                                   softmax=model.softmax)
            good = scores >= threshold
            found = [ids[column] for column in columns[good].tolist()]   # an official column may be no category here
            texts = [f'{names.get(i, i)} {score:.2f}' for i, score in zip(found, scores[good].tolist())]
            picture, truth = as_picture(batch.images[0]), batch.gt_labels[0].tolist()
            rows.append([draw_boxes(picture, batch.gt_boxes[0], truth, [categories.names[label] for label in truth]),
                         draw_boxes(picture, box_convert(boxes[good], 'xyxy', 'cxcywh'),
                                    [categories.label_of.get(i, 0) for i in found], texts)])
    save_grid(rows, path)


def draw_matches(model: HybridDETR, dataset: Dataset, ids: list[int], path: str, index: int,
                 cost: Cost = Cost()) -> None:
    """Save a PNG of one image, again and again: whom each scheme makes answer for whom, given the same predictions.

    The row of N queries, the first group of the model in its last layer, is cut as each scheme would cut it, with three
    copies where copies are. A line leads from the middle of a query's box, or beside it where the number of another one
    stands, to the ground truth that it has to find; colour and number, from 0, are those of its group. Raises UserError
    for an image without objects, or for fewer than 4 queries.
    """
    batch = collate([dataset[0, index]])   # of epoch 0
    with evaluating(model) as device:
        outputs = predict(model, batch.to(device))
        N, truths = outputs.pred_boxes.shape[2], batch.gt_boxes[0]
        if not len(truths) or N < 4:
            raise UserError(f'--matches: {batch.names[0]} has {len(truths)} objects and the model {N} queries; 1 and 4 '
                            'are the least')
        columns = columns_of(dataset, ids)[batch.gt_labels[0]].to(device)
        costs = matching_cost(outputs.pred_logits[-1:, 0], outputs.pred_boxes[-1:, 0], columns, truths.to(device), cost)
    q, title_height = N // 4, 50   # `group` leaves up to 3 queries over
    panels = [(f'one2one: {N} queries', dict(scheme='one2one', n=N)),
              (f'one2many (also epoch at first, and the first layers of layer): {N} queries, K = 3',
               dict(scheme='one2many', n=N, K=3)),
              (f'branch: {q} queries | T = {N - q} queries, K = 3', dict(scheme='branch', n=q, T=N - q, K=3)),
              (f'group: G = 4 groups of {q} queries', dict(scheme='group', n=q, G=4))]
    photograph = dataset.load(index)[0].convert('L').convert('RGB')   # grey, so that the colours tell
    scale = 1200 / max(photograph.size)
    width, height = (round(side * scale) for side in photograph.size)
    found, truths = (corners_in(x, width, height) + torch.tensor([0, title_height] * 2)
                     for x in (outputs.pred_boxes[-1, 0], truths))
    pictures = []
    for title, row in panels:
        groups = query_groups(layers=1, **row)
        group_of = [g for g, group in enumerate(groups) for _ in range(group.queries)]
        picture = Image.new('RGB', (width, height + title_height), 'white')
        picture.paste(photograph.resize((width, height)), (0, title_height))
        pen = ImageDraw.Draw(picture)
        pen.text((0, 22), title, 'black', ImageFont.load_default(size=30), anchor='lm')
        for truth in truths.tolist():
            pen.rectangle(truth, outline='white', width=12)
            pen.rectangle(truth, outline='black', width=6)
        matches = assign([costs.cpu()], groups)
        lines = []   # (query, where its number stands, where its line ends)
        for query, gt in sorted(zip(matches.query.tolist(), matches.gt.tolist())):
            (x, y), end = ((box[:2] + box[2:]).div(2).tolist() for box in (found[query], truths[gt]))   # the centres
            while any(math.dist((x, y), place) < 28 for _, place, _ in lines):   # side by side, or they would hide
                x += 4
            lines.append((query, (x, y), end))
        # The detector, the first group, is drawn last, above the others.
        for query, (x, y), end in reversed(lines):
            colour = COLOURS[group_of[query]]
            pen.rectangle(found[query].tolist(), outline=colour, width=6 if group_of[query] == 0 else 4)
            pen.line((x, y, *end), 'white', 9)
            pen.line((x, y, *end), colour, 5)
        for query, (x, y), _ in reversed(lines):
            pen.ellipse((x - 14, y - 14, x + 14, y + 14), COLOURS[group_of[query]], 'white', 3)
            pen.text((x, y), str(group_of[query]), 'white', ImageFont.load_default(size=20), anchor='mm')
        pictures.append(v2.functional.pil_to_tensor(picture.reduce(2)))
    save_grid([pictures[:2], pictures[2:]], path)


def draw_lines(lines: dict[str, tuple], names: tuple[str, str], limits: tuple, height: int = 1200,
               legend: bool = True) -> Image.Image:
    """A picture of lines {text: (x values, y values)}; names and limits (low, high): of the x and y axis. Lines of few
    points have a mark at each, another one for each line, so that grey print tells them apart, too. {text: (x, y,
    lowest, highest)} adds a bar at each point, from the lowest to the highest; such lines stand side by side, by less
    than 30 of the picture's 800 pixels."""
    image = Image.new('RGB', (1600, height), 'white')   # twice the final size, for smooth lines
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=40)
    top, bottom = 120 + 50 * math.ceil(len(lines) / 3) * legend, height - 140
    (left, right), (low, high) = limits

    def at(x, y):
        return 130 + 1420 * (x - left) / (right - left), bottom - (bottom - top) * (y - low) / (high - low)

    def ticks(low, high):   # up to 6 round steps; whole ones, as for layers, where the axis goes beyond 1
        steps = [digit * 10.0 ** power for power in range(-3 if high <= 1 else 0, 9) for digit in (1, 2, 5)]
        step = next(step for step in steps if (high - low) / step <= 6)
        return step * np.arange(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)

    def mark(x, y, i, colour, r=15):
        corners = {0: ((-1, -1), (1, -1), (1, 1), (-1, 1)), 1: ((0, -1.3), (1.2, 0.9), (-1.2, 0.9)),
                   2: ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)), 3: ((0, 1.3), (1.2, -0.9), (-1.2, -0.9))}.get(i % 5)
        if corners:   # square, triangle, diamond, triangle upside down; else a disc
            pen.polygon([(x + r * a, y + r * b) for a, b in corners], colour, 'white', 3)
        else:
            pen.ellipse((x - r, y - r, x + r, y + r), colour, 'white', 3)

    # Grid and axes, then the lines above them.
    # The lines' own x values, where their texts have room beside each other.
    own = sorted({value for x, *_ in lines.values() for value in x})
    room = min((at(b, low)[0] - at(a, low)[0] for a, b in zip(own, own[1:])), default=1420)
    for tick in own if room > 30 * len(f'{own[-1]:g}') else ticks(left, right):
        pen.line((*at(tick, low), *at(tick, high)), '#DDDDDD', 2)
        pen.text((at(tick, low)[0], bottom + 16), f'{tick:.6g}', 'black', font, anchor='mt')
    for tick in ticks(low, high):
        pen.line((*at(left, tick), *at(right, tick)), '#DDDDDD', 2)
        pen.text((114, at(left, tick)[1]), f'{tick:.4g}', 'black', font, anchor='rm')
    pen.line((at(left, high), at(left, low), at(right, low)), 'black', 4)
    pen.text((at((left + right) / 2, low)[0], height - 20), names[0], 'black', font, anchor='mb')
    pen.text((20, top - 40), names[1], 'black', font, anchor='lm')
    for i, (text, (x, y, *bars)) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        beside = min(22, 110 / len(lines)) if bars else 0   # side by side, or they hide each other's marks and bars
        shift = beside * (i - (len(lines) - 1) / 2)
        points = [(at(*point)[0] + shift, at(*point)[1]) for point in zip(x, y)]
        start, middle = 20 + i % 3 * 525, 50 + i // 3 * 50   # of the legend: above the axes, where no line can be
        pen.line(points, colour, 8, joint='curve')
        for (across, _), lowest, highest in zip(points, *bars) if bars else []:
            pen.line((across, at(left, lowest)[1], across, at(left, highest)[1]), colour, 6)
        if legend:
            pen.line((start, middle, start + 60, middle), colour, 8)
            pen.text((start + 76, middle), text, 'black', font, anchor='lm')
        for point in [*points, *[(start + 30, middle)] * legend] if len(points) <= 20 else []:
            mark(*point, i, colour)
    return image.reduce(2)


def draw_precision_recall(precision: np.ndarray, path: str) -> None:
    """Save a PNG of precision over recall (H-DETR Fig. 7), the mean over the classes with ground truth.

    precision (IoU thresholds, recalls, classes) of COCOeval, -1 for a class without ground truth. The area under a
    curve is its AP. Raises UserError if no class has ground truth.
    """
    precision = precision[:, :, (precision > -1).all((0, 1))]
    if not precision.size:
        raise UserError(f'{path}: without ground truth there is no precision-recall curve')
    of_ious = precision.mean(2)   # IoU 0.50, 0.55, ... 0.95
    curves = {'IoU 0.5': of_ious[0], 'IoU 0.75': of_ious[5], 'mean of 0.5-0.95': of_ious.mean(0)}
    recall = np.linspace(0, 1, precision.shape[1])
    draw_lines({f'{name}: AP {curve.mean():.3f}': (recall, curve) for name, curve in curves.items()},
               ('recall', 'precision'), limits=((0, 1), (0, 1))).save(path)


# --- The toy of matchers.py and the curves of losses.py, drawn ------------------------------------------------------

def draw_figures(folder: Path) -> None:
    """Draw schemes.png and losses.png. Raises UserError if there is no such folder."""
    if not folder.is_dir():
        raise UserError(f'--figures {folder}: is no folder')
    for draw, path in ((draw_schemes, folder / 'schemes.png'), (draw_losses, folder / 'losses.png')):
        draw(path)
        print(f'picture: {path}')


def draw_schemes(path: Path) -> None:
    """A panel for each scheme: queries on the left, ground truths on the right, and who sees whom in self-attention."""
    panels = [('one2one', 'always', 0, 0), ('branch', 'always', 0, 0), ('group', 'always', 0, 0),
              ('one2many', 'always', 0, 0), ('epoch', 'first part of training', 0, 0),
              ('epoch', 'rest of training', 0, 1), ('layer', 'first L1 layers', 0, 0), ('layer', 'other layers', 1, 0)]
    colours, grey = {'A': '#0072B2', 'B': '#D55E00', '.': '#BBBBBB'}, '#555555'
    large, small = (ImageFont.load_default(size=size) for size in (38, 28))
    image = Image.new('RGB', (1640, 2680), 'white')   # twice the final size, for smooth lines
    pen = ImageDraw.Draw(image)
    for i, (scheme, when, layer, progress) in enumerate(panels):   # two in a row
        x, y = i % 2 * 800 + 50, i // 2 * 640 + 30
        groups, found = toy(scheme, layer, progress)
        pen.text((x, y), f'{scheme}: {when}', 'black', large)
        numbers, copies = TOY_ROWS[scheme].items(), ' | '.join(str(group.copies[layer]) for group in groups)
        pen.text((x, y + 48), f'{"  ".join(f"{k}={v}" for k, v in numbers)}:  copies of A and B: {copies}', grey, small)
        group_of = [g for g, group in enumerate(groups) for _ in range(group.queries)]
        # The matches: queries from top to bottom, with a gap between groups, and a line to the ground truth of each.
        height = [y + 150 + 64 * q + 26 * group_of[q] for q in range(len(found))]
        gt_height = {'A': y + 230, 'B': y + 430}
        for q, letter in enumerate(found):
            if letter != '.':
                pen.line((x + 50, height[q], x + 240, gt_height[letter]), colours[letter], 6)
            pen.ellipse((x, height[q] - 28, x + 56, height[q] + 28), colours[letter], 'black', 2)
            pen.text((x + 28, height[q]), f'q{q}', 'black' if letter == '.' else 'white', small, anchor='mm')
        for letter, centre in gt_height.items():
            pen.rectangle((x + 220, centre - 34, x + 288, centre + 34), colours[letter], 'black', 2)
            pen.text((x + 254, centre), letter, 'white', large, anchor='mm')
        for q in range(len(found)):   # the attention block: row q looks at column k
            pen.text((x + 362, y + 156 + 52 * q), f'q{q}', grey, small, anchor='rm')
            for k in range(len(found)):
                left, top = x + 374 + 52 * k, y + 130 + 52 * q
                seen = '#444444' if group_of[q] == group_of[k] else 'white'
                pen.rectangle((left, top, left + 52, top + 52), seen, '#BBBBBB', 2)
    costs = ';  '.join(f'{letter}: ' + '  '.join(f'{cost:g}' for cost in column)
                      for letter, column in zip('AB', TOY_COST.T.tolist()))
    pen.text((50, 2545), 'Circle: query, in the colour of the ground truth (square) it has to find; grey: '
             '"nothing here".\nMatrix: self-attention, the query of a row (q0 to q5) sees those of the dark columns '
             f'(q0 to q5, too).\nCost of q0 to q5 for each ground truth, in all panels: {costs}.', 'black', small)
    image.reduce(2).save(path)


def draw_losses(path: Path) -> None:
    """A panel for each loss as printed: loss over score, a line for each IoU of the match, a thin one for no match. Of
    the three that ask for the IoU also the whole surface, over score and IoU of a match."""
    lines = {0.0: ('#D55E00', 11), 0.5: ('#E69F00', 8), 0.75: ('#56B4E9', 8), 1.0: ('#0072B2', 8), None: ('black', 3)}
    large, small = (ImageFont.load_default(size=size) for size in (40, 30))
    image = Image.new('RGB', (2400, 2190), 'white')   # twice the final size, for smooth lines
    pen, p, width, height = ImageDraw.Draw(image), torch.linspace(0.005, 0.995, 199), 660, 500

    def frame(x, y, title, highest):   # of a panel: to the right the score, 0 to 1, upwards 0 to `highest`
        pen.rectangle((x, y, x + width, y + height), outline='#555555', width=3)
        pen.text((x + width / 2, y - 12), title, 'black', large, anchor='ms')
        for part in (0, 0.5, 1):
            pen.text((x + part * width, y + height + 12), f'{part:g}', '#555555', small, anchor='ma')
            pen.text((x - 12, y + (1 - part) * height), f'{highest * part:g}', '#555555', small, anchor='rm')

    # Above, two rows: the losses as lines; those beyond 3 leave the panel.
    for i, name in enumerate(('ce', *MATCHED)):
        x, y = i % 3 * 790 + 90, i // 3 * 690 + 80
        frame(x, y, name, 3)
        for iou, style in lines.items():
            points = [(x + width * a, y + height * (1 - b / 3))
                      for a, b in zip(p.tolist(), loss_curve(name, p, iou)[0].tolist()) if b < 3]
            for k in range(0, len(points) - 1, 8):   # 4 of 8 pieces at IoU 0.5, whose grey would look like 0.75's
                pen.line(points[k:k + (5 if iou == 0.5 else 9)], *style)
    # Below: the surfaces, IoU 1 at the top.
    for i, name in enumerate(('vfl', 'mal', 'stable')):
        x, y = i * 790 + 90, 1590
        surface = torch.stack([loss_curve(name, p, iou)[0] for iou in torch.linspace(1, 0, 100).tolist()]).clamp(max=3)
        grey = 255 - 20 * (4 * surface).floor()   # a step of grey is 1/4
        image.paste(Image.fromarray(grey.byte().numpy()).resize((width, height), Image.Resampling.NEAREST), (x, y))
        frame(x, y, f'{name}, matched: IoU over p', 1)
    pen.text((1200, 1500), 'loss of a match over the score p (to the right) and the IoU (upwards): a step of grey is '
             '1/4, white is below 1/4, darkest 3 and more', 'black', small, anchor='mm')
    # Between them: the legend of the lines.
    for j, (iou, style) in enumerate(lines.items()):
        text = 'not matched' if iou is None else f'matched at IoU {iou:g}'
        for start in (60, 110):   # dashed or not
            pen.line((start + 450 * j, 1420, start + 450 * j + (30 if iou == 0.5 else 50), 1420), *style)
        pen.text((175 + 450 * j, 1420), text, 'black', small, anchor='lm')
    pen.text((1200, 1360), 'loss over the score p; ce, bce, focal: at any IoU', 'black', small, anchor='mm')
    image.reduce(2).save(path)


# --- Several runs side by side --------------------------------------------------------------------------------------

def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics file. The last line of a killed run may be torn; another bad one raises UserError."""
    lines, records = path.read_text(errors='replace').splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record['step'] + 0   # fails unless it is an object with this number
            records.append(record)
        except (ValueError, TypeError, KeyError, RecursionError):
            if number < len(lines):
                raise UserError(f'line {number} of {path} is no record of a training step') from None
    return records


def with_margin(values: Sequence[float], least: float) -> tuple[float, float]:
    """Limits of an axis: a twentieth more on both sides than the values span, or than `least` if that is more."""
    margin = max(max(values) - min(values), least) / 20
    return min(values) - margin, max(values) + margin


MEASURES = 'AP', 'AP50', 'duplicates'
FINER_MEASURES = 'AP75', 'oLRP', 'oLRP_Loc', 'oLRP_FP', 'oLRP_FN'


class Run(NamedTuple):
    """What --compare reads in a folder of train.py."""
    folder: Path
    evaluations: list[dict]   # of metrics.jsonl
    speed: float              # images per second, the median in training


def read_runs(folders: list[str]) -> dict[str, list[Run]]:
    """-> name -> its runs. Folders whose names differ only in a number after the last '-' are repetitions, NAME-1 and
    NAME-2 of NAME. Raises UserError if a folder holds no evaluated run or is given twice, or if repetitions lie in
    different places, were evaluated at different steps, or, by their checkpoints, have the same seed or differ in more.
    """
    if len(set(map(Path, folders))) < len(folders):
        raise UserError('--compare: one of the folders is given twice')
    runs: dict[str, list[Run]] = {}
    for folder in map(Path, folders):
        file = folder / 'metrics.jsonl'
        if not file.is_file():
            raise UserError(f'{file} does not exist: --compare takes folders of train.py')
        records = read_metrics(file)
        evaluations = [record for record in records if 'AP' in record]
        for record in evaluations:
            if not all(isinstance(record.get(key), (int, float)) for key in (*MEASURES, *FINER_MEASURES)):
                raise UserError(f'{file}: the evaluation of step {record["step"]} lacks a number')
        logged = [record['images_per_second'] for record in records if 'images_per_second' in record]
        if not all(isinstance(speed, (int, float)) for speed in logged):
            raise UserError(f'{file}: an images_per_second is no number')
        name = re.sub(r'-\d+$', '', folder.name)   # NAME-ema and NAME-plain are no seeds of NAME
        runs.setdefault(name, []).append(Run(folder, evaluations, np.median(logged) if logged else math.nan))
    for name, repetitions in runs.items():
        first = repetitions[0]
        for run in repetitions:
            if run.folder.parent != first.folder.parent:
                raise UserError(f'{run.folder}: would count as a repetition of {name} in {first.folder.parent}')
        # A mean over seeds is one of the same steps, at the end and at every point of a curve.
        steps = [[record['step'] for record in run.evaluations] for run in repetitions]
        if not steps[0] or any(x != steps[0] for x in steps):
            raise UserError(f'{name}: its runs have no evaluations, or not at the same steps')
        checkpoints = [run.folder / 'checkpoint.pt' for run in repetitions]
        check_seeds([file for file in checkpoints if len(checkpoints) > 1 and file.is_file()])
    return runs


def check_seeds(checkpoints: list[Path]) -> None:
    """Raises UserError if these are not the checkpoints of one training with different seeds."""
    seeds, wanted = {}, None
    for file in checkpoints:
        content = read_file(str(file))
        found = content.get('settings') if isinstance(content, dict) else None
        if not isinstance(found, dict) or not isinstance(found.get('seed'), int):
            raise UserError(f'{file}: has no settings with a seed')
        if found['seed'] in seeds:
            raise UserError(f'{file}: has the seed {found["seed"]} of {seeds[found["seed"]]}, so it is no repetition')
        seeds[found['seed']] = file
        wanted = wanted or found
        # Each seed may start from a backbone of its own, and --unstable only measures.
        for name in sorted((wanted | found).keys() - {'seed', 'out', 'init', 'unstable'}):
            if wanted.get(name) != found.get(name):
                raise UserError(f'{file}: is no repetition of {checkpoints[0]}: {flag(name)} is {found.get(name)}, '
                                f'there {wanted.get(name)}')


def compare(folders: list[str], picture: str | None = None, unstable: str | None = None) -> None:
    """Print the results of several runs (`read_runs`), and draw their AP over the steps (Group DETR Fig. 1, H-DETR
    Fig. 4), below it, where all were evaluated at the same steps, less the mean of the first of them, and of those with
    --unstable the last unstable scores over the layers (Stable-DINO Fig. 3). Repetitions are one row, and one line, of
    their means; a last column has the differences of AP from those of the first row that end in the same number.

    Raises UserError also if the runs have no unstable scores to draw, or repetitions of different decoders.
    """
    lines, of_layers = {}, {}   # what is drawn: name -> (x, mean, lowest, highest)
    rows, finer_rows = [], []
    runs = read_runs(folders)
    reference = next(iter(runs))
    ap_of = {name: {run.folder.name.removeprefix(name): run.evaluations[-1]['AP'] for run in repetitions}
             for name, repetitions in runs.items()}   # NAME-1 and NAME-2 -> {'-1': AP, '-2': AP}
    for name, repetitions in runs.items():
        last = [run.evaluations[-1] for run in repetitions]
        cells = {}
        for key in (*MEASURES, *FINER_MEASURES):
            values = [record[key] for record in last]
            # -1 is COCO's mark for no number at all, as the localization error of a run without a hit.
            cells[key] = f'{np.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})' if min(values) >= 0 else '-'
        speed = np.mean([run.speed for run in repetitions])
        rows.append(f'| {name} | {len(last)} | {last[0]["step"]} | {" | ".join(cells[key] for key in MEASURES)} | '
                    f'{speed:.1f} |')
        less = ' '.join(f'{ap - ap_of[reference][number]:+.3f}' if number in ap_of[reference] else '-'
                        for number, ap in ap_of[name].items() if name != reference)
        finer_rows.append(f'| {name} | {" | ".join(cells[key] for key in FINER_MEASURES)} | {less} |')
        ap = np.array([[record['AP'] for record in run.evaluations] for run in repetitions])
        lines[name] = [record['step'] for record in repetitions[0].evaluations], ap.mean(0), ap.min(0), ap.max(0)
        if unstable and not all(record.get('unstable') for record in last):
            print(f'{name}: was trained without --unstable, so it is not in {unstable}')
        elif unstable:
            if len({len(record['unstable']) for record in last}) > 1:
                raise UserError(f'{name}: its runs differ in the number of decoder layers')
            scores = np.array([record['unstable'] for record in last])
            of_layers[name] = range(1, scores.shape[1] + 1), scores.mean(0), scores.min(0), scores.max(0)
    if unstable and not of_layers:
        raise UserError('--unstable-curves: none of the runs was trained with --unstable N')
    print(f'| run | seeds | steps | {" | ".join(MEASURES)} | images/s |', '|---' * 7 + '|', *rows, sep='\n')
    print(f'\n| run | {" | ".join(FINER_MEASURES)} | AP less that of {reference}, run by run |', '|---' * 7 + '|',
          *finer_rows, sep='\n')
    print('\nmean (lowest-highest) over the seeds, - where a number is missing; images/s: mean over the seeds '
          'of the\nmedian in training, which compares only runs on a machine that was as busy')
    if picture:
        def limits(lines):   # from the first evaluation on: the differences at the end are small
            return (with_margin(np.concatenate([line[0] for line in lines.values()]), 1),
                    with_margin(np.concatenate([ap for line in lines.values() for ap in line[1:]]), 1e-3))
        panels = [draw_lines(lines, ('steps', 'AP'), limits(lines))]
        steps, mean, *_ = lines[reference]
        if len(lines) > 1 and all(x == steps for x, *_ in lines.values()):
            less = {name: (x, *(ap - mean for ap in aps)) for name, (x, *aps) in lines.items()}
            panels.append(draw_lines(less, ('steps', f'AP, less the mean of {reference}'), limits(less), 900, False))
        elif len(lines) > 1:
            print(f'without a panel of differences from {reference}: not all were evaluated at the same steps')
        save_grid([[v2.functional.pil_to_tensor(panel)] for panel in panels], picture)
        print(f'picture: {picture}')
    if unstable:
        for name, (layers, scores, *_) in of_layers.items():
            print(f'{name}: unstable score of layer 1 to {len(layers)}: {", ".join(f"{x:.1f} %" for x in scores)}')
        most_layers = max(len(layers) for layers, *_ in of_layers.values())
        highest = max(scores.max() for *_, scores in of_layers.values())
        draw_lines(of_layers, ('decoder layer', 'unstable score, %'),
                   (with_margin((1, most_layers), 1), (0, with_margin((0, highest), 1e-3)[1]))).save(unstable)
        print(f'picture: {unstable}')


# --- Benchmark ------------------------------------------------------------------------------------------------------

def published_loss(outputs: Outputs, gt_labels: list[Tensor], gt_boxes: list[Tensor], groups, num_boxes: float):
    """The loss of a scheme as the released code of H-DETR computes it: a matcher and a criterion for every layer and
    group, ground truths repeated before the cost, costs between all images, one-hot targets with a background column.

    Here only to be measured against, and to give the same number (test_all.py).
    """
    # One call for the encoder, then one for each group and layer: predictions, copies, weight, labels.
    total, first = 0.0, 0
    calls = [(outputs.encoder_logits[0], outputs.encoder_boxes[0], 1, 1.0, [torch.zeros_like(x) for x in gt_labels])]
    for group in groups:
        rows = slice(first, first + group.queries)
        calls += [(logits[:, rows], boxes[:, rows], copies, group.weight, gt_labels) for logits, boxes, copies in
                  zip(outputs.pred_logits, outputs.pred_boxes, group.copies)]
        first += group.queries
    for logits, boxes, copies, weight, labels in calls:
        B, n, C = logits.shape
        labels, targets = [x.repeat(copies) for x in labels], [x.repeat(copies, 1) for x in gt_boxes]
        # Matcher: each query of the batch with each target of the batch; used are the blocks on the diagonal, an image
        # with itself.
        with torch.no_grad():
            p, xyxy = logits.flatten(0, 1).sigmoid(), box_convert(torch.cat(targets), 'cxcywh', 'xyxy')
            cost = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p ** 2 * -(1 - p + 1e-8).log()
            cost = 2 * cost[:, torch.cat(labels)] + 5 * torch.cdist(boxes.flatten(0, 1), torch.cat(targets), p=1)
            cost -= 2 * generalized_box_iou(box_convert(boxes.flatten(0, 1), 'cxcywh', 'xyxy'), xyxy)
            cost = cost.view(B, n, -1).cpu().split([len(x) for x in targets], -1)
            pairs = [[torch.from_numpy(i) for i in linear_sum_assignment(c[b])] for b, c in enumerate(cost)]
        # Criterion: C, the background column, for all that are not matched, and dropped after the one-hot.
        image = torch.cat([torch.full_like(query, b) for b, (query, _) in enumerate(pairs)])
        query = torch.cat([query for query, _ in pairs])
        classes = torch.full((B, n), C, device=logits.device)
        classes[image, query] = torch.cat([x[gt] for x, (_, gt) in zip(labels, pairs)])
        target = F.one_hot(classes, C + 1)[..., :-1].to(logits.dtype)
        wanted = torch.cat([x[gt] for x, (_, gt) in zip(targets, pairs)])
        corners = (box_convert(x, 'cxcywh', 'xyxy') for x in (boxes[image, query], wanted))
        loss = (2 * sigmoid_focal_loss(logits, target, 0.25, 2).sum() + 5 * (boxes[image, query] - wanted).abs().sum()
                + 2 * (1 - generalized_box_iou(*corners).diag()).sum())
        total = total + weight * loss / max(copies * num_boxes, 1.0)
    return total


def published_self_attention(self, content: Tensor, position: Tensor, groups, denoising: int = 0) -> Tensor:
    """GroupSelfAttention.forward with one attention over the whole row and an (N,N) mask, as in H-DETR's code."""
    owner = torch.arange(len(groups), device=content.device).repeat_interleave(
        torch.tensor(groups).to(content.device, non_blocking=True), output_size=sum(groups))
    q = (content + position).transpose(0, 1)
    # In attn_mask a True forbids: a query sees those of its own group only.
    return F.multi_head_attention_forward(
        q, q, content.transpose(0, 1), q.shape[-1], self.heads, self.in_proj.weight, self.in_proj.bias, None, None,
        False, 0.0, self.out_proj.weight, self.out_proj.bias, attn_mask=owner[:, None] != owner)[0].transpose(0, 1)


def published_deformable_attention(value: Tensor, shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The pure PyTorch form that comes with the released code: all samples of all levels side by side."""
    B, _, heads, d = value.shape
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)                                   # (B*heads, N, V, J, 2)
    maps = (level.permute(0, 2, 3, 1).reshape(B * heads, d, h, w)
            for (h, w), level in zip(shapes, value.split([h * w for h, w in shapes], 1)))
    samples = [F.grid_sample(level, grid[:, :, v], align_corners=False) for v, level in enumerate(maps)]
    samples = torch.stack(samples, 3)                                                          # (B*heads, d, N, V, J)
    out = (samples * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum((3, 4))
    return out.view(B, heads * d, -1).transpose(1, 2)


class Clock:
    """A stopwatch for named stages, round by round. On CUDA the GPU itself notes when it gets there: waiting for it
    after every stage would slow the step that is measured."""

    def __init__(self, device: torch.device):
        self.device, self.rounds = device, []

    def now(self):
        if self.device.type != 'cuda':
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self.rounds.append({})
        self.last = self.now()

    def tick(self, stage: str) -> None:
        self.rounds[-1][stage] = self.last, self.now()
        self.last = self.rounds[-1][stage][1]

    def seconds(self, stages=None) -> list[float]:
        """Of each round but the first, which warms up: the sum of these stages, or of all."""
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        return [sum(begin.elapsed_time(end) / 1000 if self.device.type == 'cuda' else end - begin
                    for stage, (begin, end) in r.items() if not stages or stage in stages) for r in self.rounds[1:]]


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside had at one time: on a CPU, where torch keeps no such account. What an
    operator needs for itself is not seen."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # Called by torch for every operator. Views share a storage, so storages are counted, by their address, until
        # nothing holds them any more, autograd's graph included.
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = function(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(made) if isinstance(x, Tensor)):
            pointer = storage.data_ptr()
            if pointer not in self.sizes and pointer not in given:   # not a view of what was there before
                self.sizes[pointer] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, pointer)
        return made

    def freed(self, pointer: int) -> None:
        self.now -= self.sizes.pop(pointer)


def spread(values: list[float]) -> str:
    """Median, fastest and slowest."""
    return f'{np.median(values):.3g} ({min(values):.3g}-{max(values):.3g})'


class BenchmarkRow:
    """A model in training, and what its steps took.

    given: flags of train.py; `checkpoint_activations`; or `published`, for H-DETR's released way: a mask in
    self-attention, deformable attention as it is written there in PyTorch, its loss, and an optimizer that is not
    fused. The value of `published` is the row that has the same scheme as it is written here.
    """

    def __init__(self, given: dict, num_classes: int, device: torch.device, amp: bool):
        import train   # not at the top: train imports this file
        given = dict(given)
        checkpointed, self.published = given.pop('checkpoint_activations', False), given.pop('published', None)
        self.settings, self.amp, self.device = train.complete(given), amp, device
        torch.manual_seed(0)
        # Random weights: a pretrained backbone takes as long, and need not be downloaded.
        self.model = HybridDETR(**train.architecture(self.settings, num_classes)).to(device).train()
        self.model.checkpoint_activations = checkpointed
        self.model.backbone.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(train.parameter_groups(self.model, self.settings), fused=not self.published)
        self.loss_of, self.row = train.loss_of, train.row_of(self.settings)
        self.clock, self.inference, self.memory = Clock(device), Clock(device), 0

    def loss(self, batch, num_boxes: float) -> Tensor:
        tick = self.clock.tick
        if not self.published:
            parts, _ = self.loss_of(self.model, batch, self.settings, 0.0, num_boxes, self.amp, tick)
            return sum(parts.values())
        with self.patches(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            outputs = self.model(batch.images, batch.padding_mask)
        tick('forward')
        loss = published_loss(Outputs(*(x.float() for x in outputs)), batch.gt_labels, batch.gt_boxes,
                              query_groups(layers=len(self.model.decoder), **self.row), num_boxes)
        tick('loss')
        return loss

    def patches(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        if self.published:
            stack.enter_context(mock.patch.object(hybrid_detr, 'deformable_attention', published_deformable_attention))
            stack.enter_context(mock.patch.object(hybrid_detr.GroupSelfAttention, 'forward', published_self_attention))
        return stack

    def step(self, batch) -> None:
        """A training step and an inference. The memory is the peak of a step above what was there before."""
        num_boxes, on_cuda = float(sum(map(len, batch.gt_boxes))), self.device.type == 'cuda'
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        elif not self.memory:
            self.memory = self.counted_memory(batch, num_boxes)
        self.clock.start()
        self.loss(batch, num_boxes).backward()
        self.clock.tick('backward')
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings['clip'])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.clock.tick('optimizer')
        if on_cuda and len(self.clock.rounds) > 1:   # the first step makes the optimizer's moments, too
            self.memory = max(self.memory, torch.cuda.max_memory_allocated(self.device) - before)
        with (self.patches(), torch.inference_mode(),
              torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)):
            self.inference.start()
            self.model.eval()(batch.images, batch.padding_mask)
            self.inference.tick('image')
        self.model.train()

    def counted_memory(self, batch, num_boxes: float) -> int:
        """The peak of a step by PeakMemory, in a step of its own, since counting slows it.

        Without --compile, which torch cannot combine with such a watch: torch 2.11 would never again compile a function
        that it has met in one."""
        clock, self.clock = self.clock, Clock(self.device)   # what this step takes does not count
        self.clock.start()
        with torch.compiler.set_stance('force_eager'), PeakMemory() as counted:
            self.loss(batch, num_boxes).backward()
        self.optimizer.zero_grad()
        self.clock = clock
        return counted.peak

    def gflops(self, batch) -> float:
        """Of the forward of an image in training, without the samples of deformable attention (torch counts none)."""
        noised = denoising_queries(batch.gt_labels[:1], batch.gt_boxes[:1], self.model.num_classes,
                                   self.settings['denoising']) if self.settings['denoising'] else None
        with self.patches(), FlopCounterMode(display=False) as flops:
            self.model(batch.images[:1], batch.padding_mask[:1], noised=noised)
        return flops.get_total_flops() / 1e9


def benchmark_rows(kind: str, tiny: bool) -> dict[str, dict]:
    """name -> flags of train.py, by which the rows of the table differ."""
    import train
    rows = train.TINY_ROWS if tiny else train.PAPER_ROWS
    n, T, G = rows['one2one']['n'], rows['branch']['T'], rows['group']['G']
    if kind == 'queries':
        return {f'branch, T = {m * n}': dict(scheme='branch', T=m * n)
                for m in ((0, 1, 2, 3, 4, 5) if tiny else (0, 1, 3, 5, 7, 11))}   # tiny has 336 tokens
    if kind == 'groups':
        return {f'group, G = {groups}': dict(scheme='group', G=groups) for groups in (1, 2, 4, 7, 10, 13)}
    return {'one2one': dict(scheme='one2one'), f'one2one, n = {n + T}': dict(scheme='one2one', n=n + T),
            f'one2one, n = {n * G}': dict(scheme='one2one', n=n * G),
            **{scheme: dict(scheme=scheme) for scheme in rows if scheme != 'one2one'},
            'one2one, checkpointed': dict(scheme='one2one', checkpoint_activations=True),
            'branch, checkpointed': dict(scheme='branch', checkpoint_activations=True),
            'branch, as published': dict(scheme='branch', published='branch'),
            'group, one head': dict(scheme='group', selection='ranks'),   # as published_loss has it
            # Group DETR's code folds its groups into the batch, as is done here.
            "group, H-DETR's way": dict(scheme='group', selection='ranks', published='group, one head')}


def benchmark(args: argparse.Namespace) -> None:
    """Print time and memory of training steps: in every round a step of each row, on the same batch, so that a slower
    moment of the machine slows all of them, and ratios within a round mean something."""
    import train   # not at the top: train imports this file
    device, rows = torch.device(args.device), benchmark_rows(args.benchmark, args.model == 'tiny')
    amp = train.has_bfloat16(device) if args.amp is None else args.amp
    if args.compile:
        train.compile_attention(device)
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')   # as in training
    common = {'model': args.model, 'data': args.data or 'shapes'}
    if args.image_size:
        common['image_size'] = args.image_size
    # Which rows; the first always runs, since ratios are against it.
    first = next(iter(rows))
    if args.rows:
        wanted = {part: [name for name in rows if part in name] for part in args.rows.split(',')}
        for part, found in wanted.items():
            if not found:
                raise UserError(f'--rows {part}: is in none of {", ".join(rows)}')
        rows = {name: rows[name] for name in rows if name == first or any(name in found for found in wanted.values())}
    settings = train.complete({**common, **rows[first]})
    batch_size = args.batch_size or settings['batch_size']
    dataset = open_dataset(settings['data'], 'train', settings['image_size'], augment=True)
    try:
        rows = {name: BenchmarkRow({**common, **given}, len(dataset.categories), device, amp)
                for name, given in rows.items()}
    except ValueError as error:
        raise UserError(f'--model {args.model}: {error}') from None

    # Loading alone, without a model that takes the cores; and how long the rounds wait for it.
    alone, loading, waiting = (Clock(torch.device('cpu')) for _ in range(3))
    for index in range(200 if args.model == 'tiny' else 20):
        alone.start()
        dataset[0, index % len(dataset)]
        alone.tick('image')
    batches = iter(train_loader(dataset, batch_size, 21, args.workers, pin=device.type == 'cuda'))
    for _ in range(21):
        loading.start()
        next(batches).to(device)
        loading.tick('batch')

    # The rounds; the first warms up, and no Clock counts it.
    batches = iter(train_loader(dataset, batch_size, args.repeats + 1, args.workers, pin=device.type == 'cuda'))
    for _ in tqdm(range(args.repeats + 1), desc='rounds', disable=None):
        waiting.start()
        batch = next(batches).to(device)
        waiting.tick('batch')
        for row in rows.values():
            row.step(batch)

    print(f'torch {torch.__version__} on {device}, {torch.get_num_threads()} threads; {args.model}'
          f'{", bfloat16" * amp}; batches of {batch_size} images of {settings["image_size"]} pixels; {args.repeats} '
          f'rounds\n'
          f'data: {args.workers} workers load a batch in {np.mean(loading.seconds()):.3g} s, with nothing beside them; '
          f'one process alone loads {1 / np.mean(alone.seconds()):.0f} images/s; a round of '
          f'{len(rows)} rows waits {spread(waiting.seconds())} s for its batch')
    print_rows(rows, batch)


def print_rows(rows: dict[str, BenchmarkRow], batch) -> None:
    """The table of the benchmark, and how a row of the released way compares with the same scheme here."""
    first, stages = next(iter(rows)), ('forward', 'matching', 'loss', 'backward', 'optimizer')
    steps = {name: row.clock.seconds() for name, row in rows.items()}

    def ratio(name: str, other: str) -> str:   # within each round
        return spread([a / b for a, b in zip(steps[name], steps[other])])

    print(f'| | M parameters | GFLOPs | step, s | {" | ".join(stages)} | MB | images/s | against {first} | '
          f'against one2one with as many queries |\n|{"---|" * (8 + len(stages))}')
    for name, row in rows.items():
        parameters = sum(p.numel() for p in row.model.parameters()) / 1e6
        of_stages = [f'{np.median(row.clock.seconds([stage])):.3g}' if stage in row.clock.rounds[-1] else 'in loss'
                     for stage in stages]
        images = [len(batch.images) / seconds for seconds in row.inference.seconds()]
        # The fair baseline: a detector with as many queries in all.
        alike = [other for other in rows if other.startswith('one2one') and not row.settings['denoising']
                 and sum(rows[other].model.groups) == sum(row.model.groups)]
        cells = [name, f'{parameters:.1f}', f'{row.gflops(batch):.1f}', spread(steps[name]), *of_stages,
                 f'{row.memory / 1e6:.0f}', spread(images), ratio(name, first), ratio(name, alike[0]) if alike else '']
        print(f'| {" | ".join(cells)} |')
    print('step: forward to optimizer, median (fastest-slowest) of the rounds; GFLOPs: forward of an image in '
          'training, two for a multiply-add,\nwithout deformable sampling; MB: peak of a step above what was allocated '
          'before it (on a CPU without --compile);\nimages/s: inference of the first group, in the precision of '
          'training, without picking the detections;\nepoch: its first part; deim: without mosaic, mixup and average')
    for name, row in rows.items():
        if row.published in rows:
            print(f'{name}: {ratio(name, row.published)} times the step of {row.published}')


def benchmark_loss(args: argparse.Namespace) -> None:
    """Print the time of matching, loss and their backward at the paper's size, here and as published."""
    device, rng = torch.device(args.device), torch.Generator().manual_seed(0)
    L, B, C, S, M = 6, 2, 91, 13294, 7   # S: tokens of an image of 800 x 800; M: boxes of an image, COCO's mean

    def logits(*shape):   # - 4: scores near 0.02, as of background
        return (torch.randn(*shape, generator=rng) - 4).to(device).requires_grad_()

    def boxes(*shape):
        centre = torch.rand(*shape, 2, generator=rng) * 0.6 + 0.2
        size = torch.rand(*shape, 2, generator=rng) * 0.3 + 0.05
        return torch.cat([centre, size], -1).to(device).requires_grad_()

    groups = query_groups('branch', L, n=300, T=1500, K=6)
    tokens = encoder_groups(groups, 1, S)
    outputs = Outputs(logits(L, B, 1800, C), boxes(L, B, 1800), logits(1, B, S, C), boxes(1, B, S))
    labels, gt = [torch.randint(C, (M,), generator=rng).to(device) for _ in range(B)], [*boxes(B, M).detach()]

    def here():
        matches = match(*outputs, labels, gt, groups, tokens)
        return sum(criterion(outputs, labels, gt, *matches, groups, tokens, B * M)[0].values())

    # Both ways in turn, so that a slower moment of the machine slows both.
    ways = {'here': here, 'as published': lambda: published_loss(outputs, labels, gt, groups, B * M)}
    clocks, values = {name: Clock(device) for name in ways}, {}
    for _ in range(args.repeats + 1):
        for name, loss_of in ways.items():
            clocks[name].start()
            loss = loss_of()
            torch.autograd.grad(loss, outputs)
            clocks[name].tick('all')
            values[name] = loss.item()
    seconds = {name: clock.seconds() for name, clock in clocks.items()}
    ratio = [b / a for a, b in zip(*seconds.values())]
    print(f'matching, loss and backward, {L} layers of 300 + 1500 queries, K = 6, {S} tokens, {B} images of {M} boxes, '
          f'{C} classes on {device}:\n' + ', '.join(f'{name} {spread(s)} s' for name, s in seconds.items())
          + f': {spread(ratio)} times as fast\nthe losses: ' + ', '.join(f'{value:.5f}' for value in values.values()))


# --- The command ----------------------------------------------------------------------------------------------------

def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\nRead ')[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--weights', metavar='FILE', help='checkpoint of train.py or of HDETR/H-Deformable-DETR')
    parser.add_argument('--data', help="'shapes' or a folder in the COCO layout (default what it was trained on)")
    parser.add_argument('--split', choices=('val', 'train'),
                        help='part of the data (default val; of an --overfit run the images it was trained on)')
    parser.add_argument('--image-size', type=int,
                        help='short side of the resized images, from 64 on (default as in training)')
    parser.add_argument('--batch-size', type=int,
                        help='images at a time (default as in training, official 2); their padding enters the '
                             'GroupNorm, so it moves the result a little')
    parser.add_argument('--workers', type=int, default=2, help='processes that load images (default 2)')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda' if torch.cuda.is_available() else 'cpu',
                        help='default cuda if there is one')
    parser.add_argument('--group', type=int, default=0, help='query group to evaluate (default 0, the detector)')
    parser.add_argument('--nms', type=float, help='remove boxes that overlap a better one of their class at this IoU')
    parser.add_argument('--per-class', action='store_true', help='print the AP of each class')
    parser.add_argument('--save-json', metavar='FILE',
                        help="write the detections in COCO's results format to this file")
    parser.add_argument('--unstable', type=int, default=0, metavar='N',
                        help='match the first N images and print how many objects change their query from layer to '
                             'layer (the unstable score; the paper has N = 20)')
    parser.add_argument('--pr-curve', metavar='FILE', help='draw precision over recall to this PNG')
    parser.add_argument('--pictures', type=int, default=0, metavar='N',
                        help='draw ground truth and predictions of N images')
    parser.add_argument('--matches', metavar='FILE',
                        help='draw one image to this PNG: which query would answer for which object in each scheme, '
                             'given the predictions of this model')
    parser.add_argument('--image', type=int, default=0, metavar='N', help='which image --matches draws (default 0)')
    parser.add_argument('--picture-file', metavar='FILE', default='predictions.png',
                        help='PNG of --pictures (default predictions.png)')
    group = parser.add_argument_group('comparison of runs, instead of an evaluation')
    group.add_argument('--compare', nargs='+', metavar='RUN',
                       help='folders of train.py, of which NAME-1, NAME-2, .. are seeds of one row; with the '
                       'differences of AP from the first row')
    group.add_argument('--curves', metavar='FILE', help='with --compare: draw AP over the steps, and its '
                       'difference from the mean of the first row, to this PNG')
    group.add_argument('--unstable-curves', metavar='FILE',
                       help='with --compare: draw the last unstable scores over the layers, of runs with --unstable')
    group = parser.add_argument_group('matching and losses by themselves, instead of an evaluation')
    group.add_argument('--figures', metavar='DIR',
                       help='draw into this folder every scheme on the toy of matchers.py (schemes.png), and what each '
                            'loss makes of score and IoU (losses.png)')
    group = parser.add_argument_group('benchmark: time and memory of training, instead of an evaluation')
    group.add_argument('--benchmark', nargs='?', const='schemes', choices=('schemes', 'queries', 'groups', 'loss'),
                       help='a table of all schemes (default), of branch with more and more queries, of group with '
                            'more and more groups; or matching and loss alone')
    group.add_argument('--model', default='tiny', help='tiny, r50, or a ResNet or Swin of torchvision (default tiny)')
    group.add_argument('--rows', help='the first row, and those whose names contain one of these texts: a,b')
    group.add_argument('--repeats', type=int, default=5, help='rounds, after one that warms up (default 5)')
    group.add_argument('--amp', action=argparse.BooleanOptionalAction,
                       help='forward in bfloat16 (default on CUDA that supports it)')
    group.add_argument('--compile', action='store_true', help='compile the deformable attention, for CUDA')
    args = parser.parse_args(argv)
    modes = [name for name in ('weights', 'compare', 'figures', 'benchmark') if getattr(args, name) is not None]
    if len(modes) != 1:
        parser.error('exactly one of --weights, --compare, --figures and --benchmark is needed')
    mode, = modes
    # The options that each mode reads: any other is refused, so that nothing is ignored.
    of_compare, of_loss = {'curves', 'unstable_curves'}, {'device', 'repeats'}
    of_table = {'data', 'image_size', 'batch_size', 'workers', 'model', 'rows', 'amp', 'compile'} | of_loss
    of_weights = vars(args).keys() - of_compare - {'model', 'rows', 'repeats', 'amp', 'compile'}
    read = {'weights': of_weights, 'compare': of_compare, 'figures': set(),
            'benchmark': of_loss if args.benchmark == 'loss' else of_table}[mode]
    for name, value in vars(args).items():
        if name not in {mode, *read} and value != parser.get_default(name):
            parser.error(f'{flag(name)} has no meaning with --{mode}'
                         + f' {args.benchmark}' * (mode == 'benchmark'))
    for name, needs in dict(image='matches', picture_file='pictures').items():
        if getattr(args, name) != parser.get_default(name) and not getattr(args, needs):
            parser.error(f'{flag(name)} has no meaning without --{needs}')
    return args


def flag(name: str, value=None) -> str:
    """How a setting is written on the command line, with its value if there is one."""
    text = '--queries' if name == 'n' else '--' + name.replace('_', '-')
    if isinstance(value, bool):
        return text if value else text.replace('--', '--no-', 1)
    return text if value is None else f'{text} {value}'


def check_given(given: dict, texts: tuple[str, ...]) -> None:
    """Raises UserError for one of the named flags if it is empty, and for a GPU that is not there."""
    for name in texts:
        if given.get(name) == '':   # a variable of the shell that was not set
            raise UserError(f"{flag(name)} '': is empty")
    if given.get('device') == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device cuda: torch finds no CUDA device here')


def check_target(name: str, path: str | None, ending: str) -> None:
    """Raises UserError before the work is done if the file that is to hold it has another ending, or no folder."""
    if path is not None and not path.endswith(ending):
        raise UserError(f'{flag(name, path)}: must end in {ending}')
    if path is not None and not Path(path).parent.is_dir():
        raise UserError(f'{flag(name, path)}: its folder does not exist')


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)   # which refuses what does not go together (exit code 2); the values follow (exit code 1)
    if args.nms is not None and not 0 <= args.nms <= 1:
        raise UserError(f'--nms {args.nms}: is an IoU, 0 to 1')
    for name, least in dict(batch_size=1, image_size=64, workers=0, group=0, pictures=0, unstable=0, repeats=1,
                            image=0).items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f'{flag(name, getattr(args, name))}: must be at least {least}')
    pictures = ('picture_file', 'pr_curve', 'matches', 'curves', 'unstable_curves')
    check_given(vars(args), ('weights', 'data', 'save_json', 'figures', 'rows', *pictures))
    for name in ('save_json', *pictures):
        check_target(name, getattr(args, name), '.json' if name == 'save_json' else '.png')
    if args.compare:
        return compare(args.compare, args.curves, args.unstable_curves)
    if args.figures:
        return draw_figures(Path(args.figures))
    if args.benchmark:
        return benchmark_loss(args) if args.benchmark == 'loss' else benchmark(args)
    model, categories, settings = load_detector(args.weights)
    if args.group >= len(model.groups):
        raise UserError(f'--group {args.group}: the model has groups 0 to {len(model.groups) - 1}')
    data = args.data or settings.get('data')
    if data is None:
        raise UserError('an official checkpoint does not say on what to evaluate: add --data COCO')
    size = args.image_size or settings.get('image_size', 800)
    # A run with --overfit is judged by the images it saw, unless asked otherwise.
    as_overfit = settings.get('overfit') and not args.data and not args.split
    split = 'train' if as_overfit else args.split or 'val'
    dataset = open_dataset(data, split, size, seed=settings.get('seed', 0))
    if as_overfit:
        dataset = FirstImages(dataset, settings['overfit'])
    model.to(args.device)
    ids = ids_for(categories, dataset, model.num_classes)
    if args.image >= len(dataset):
        raise UserError(f'--image {args.image}: there are the images 0 to {len(dataset) - 1}')
    batch_size = args.batch_size or settings.get('batch_size', 2)
    print(f'{args.weights}, group {args.group}{f", NMS at {args.nms}" * (args.nms is not None)}, on {len(dataset)} '
          f'images of {data}, {split}{" (those it was trained on)" * bool(as_overfit)}')
    rows = detect(model, dataset, ids, batch_size=batch_size, workers=args.workers, nms=args.nms, group=args.group)
    if args.save_json:
        results = [{'image_id': int(image_id), 'category_id': int(category_id), 'bbox': bbox, 'score': score}
                   for image_id, *bbox, score, category_id in rows.tolist()]
        Path(args.save_json).write_text(json.dumps(results))
        print(f'{len(results)} detections written to {args.save_json}')
    _, by_class = average_precision(dataset.coco_json(), rows, table=True, curve=args.pr_curve)
    if args.per_class:
        for category_id, name in zip(dataset.categories.ids, dataset.categories.names):
            print(f'{name:24} AP {by_class[category_id]:.3f}')
    if args.unstable:
        scores = unstable_score(model, dataset, ids, args.unstable, cost_of(settings), workers=args.workers)
        print(f'unstable score of layer 1 to {len(model.decoder)}, first group: '
              f'{", ".join(f"{score:.1f} %" for score in scores) or "no objects"}')
    if args.pr_curve:
        print(f'curve: {args.pr_curve}')
    if args.matches:
        draw_matches(model, dataset, ids, args.matches, args.image, cost_of(settings))
        print(f'picture: {args.matches}')
    if args.pictures:
        draw_predictions(model, dataset, ids, args.picture_file, args.pictures, nms=args.nms, group=args.group)
        print(f'picture: {args.picture_file}')


def run_command(command) -> None:
    """Run a command; what the user can mend ends it with one line and exit code 1."""
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(130)
    except torch.OutOfMemoryError as error:   # of the GPU; the CPU's has no class of its own
        sys.exit(f'{Path(sys.argv[0]).name}: the GPU is full; take a smaller --batch-size, in training also '
                 f'--accumulate or --checkpoint-activations ({str(error).splitlines()[0]})')
    except RuntimeError as error:
        reasons = {'gloo': 'another process of this run is gone, or does not answer; its own message says why',
                   'DataLoader worker (pid': 'a process that loads images is gone; memory full? fewer --workers?',
                   'allocate memory': 'the memory is full'}
        reason = next((reason for text, reason in reasons.items() if text in str(error)),
                      reasons['gloo'] if isinstance(error, dist.DistError) else None)
        if not reason:
            raise
        sys.exit(f'{Path(sys.argv[0]).name}: {reason} ({str(error).splitlines()[0]})')
    except (UserError, OSError) as error:   # OSError: no right to write, disk full
        # From a worker process the message comes with its traceback around it.
        text = str(error).split('UserError: ')[-1]
        sys.exit(f'{Path(sys.argv[0]).name}: {" ".join(text.split())}')   # one line, whatever a file is called


if __name__ == '__main__':
    run_command(main)
