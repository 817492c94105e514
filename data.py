"""Data sets: shapes that are drawn on the fly, and folders in the COCO layout.

    B images of a batch, H x W pixels, M boxes of one image, C classes
    boxes        (M, 4)  cx, cy, w, h as fractions of the image without its padding
    boxes_xyxy   (M, 4)  x0, y0, x1, y1 in pixels; a `target` holds such boxes
    labels       (M,)    0..C-1, whatever the category ids are

ShapesDataset and CocoFolder share `categories` and:

    dataset[epoch, index]  a Sample; its random draws depend on (seed, epoch, index) alone
    load(index)            the stored image, its target {'boxes', 'labels'}, its id and its name
    coco_json()            the annotations, for pycocotools
    with_boxes             the indices of the images with boxes that train
    most_boxes             an upper bound of such boxes in one image
"""
import atexit
import difflib
import json
import math
import multiprocessing
import os
import signal
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# DenseOneToOne acts in epochs 4 to 34 of 60 (DEIM's released settings for RT-DETRv2).
DENSE = (4 / 60, 34 / 60)

# Seconds after which a loader gives up.
PATIENCE = 180


class UserError(Exception):
    """An error that the user can correct. Its text is one line."""


class Categories:
    """The two-way map between category ids and labels 0..C-1."""

    def __init__(self, ids, names):
        self.ids, self.names = ids, names
        self.label_of = {category_id: label for label, category_id in enumerate(ids)}

    def __len__(self):
        return len(self.ids)

    def difference(self, other) -> str:
        """Describe the first pair of categories that differ, or return ''."""
        for pair in zip_longest(zip(self.ids, self.names), zip(other.ids, other.names)):
            if pair[0] != pair[1]:
                return ' and '.join(f'{x[0]} {x[1]!r}' if x else 'none' for x in pair)
        return ''


class Sample(NamedTuple):
    image: Tensor  # (3, H, W), normalised
    labels: Tensor  # (M,) int64
    boxes: Tensor  # (M, 4)
    image_id: int
    size: tuple  # (height, width) of the stored image in pixels
    name: str  # the origin of the image, for messages


class Batch(NamedTuple):
    images: Tensor  # (B, 3, H, W), zero at padding
    padding_mask: Tensor  # (B, H, W) bool, True at padding
    gt_labels: list  # B tensors (M_b,)
    gt_boxes: list  # B tensors (M_b, 4)
    image_ids: list
    sizes: list  # B tuples, see Sample
    names: list

    def to(self, device) -> 'Batch':
        """Copy the tensors to `device` without waiting for copies from pinned memory."""
        def move(x):
            return list(map(move, x)) if isinstance(x, list) else x.to(device, non_blocking=True)
        return Batch(*map(move, self[:4]), *self[4:])


def collate(samples: list[Sample]) -> Batch:
    """Pad all images at the bottom and right to the largest height and width."""
    height, width = (max(s.image.shape[d] for s in samples) for d in (1, 2))
    images = torch.zeros(len(samples), 3, height, width)
    padding_mask = torch.ones(len(samples), height, width, dtype=torch.bool)
    for sample, image, mask in zip(samples, images, padding_mask):
        _, h, w = sample.image.shape
        image[:, :h, :w] = sample.image
        mask[:h, :w] = False
    # The lists are the remaining fields of Batch, in order.
    _, *lists = map(list, zip(*samples))
    return Batch(images, padding_mask, *lists)


class CocoDataset(Dataset):
    """The common part of the data sets. Each data set adds:

    images: a list of (id, name, height, width)
    load(index), and `transforms` for its result
    rows(): image index, category id, x, y, w, h, area, crowd of each box
    """

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        image, target, image_id, name = self.load(key[1])
        seed = np.random.RandomState([self.seed, *key]).randint(2 ** 31 - 1)
        return Sample(*transformed(self.transforms, seed, image, target),
                      image_id, image.size[::-1], name)

    def coco_json(self):
        names = zip(self.categories.ids, self.categories.names)
        annotations = [
            {'id': i, 'image_id': self.images[int(image)][0], 'category_id': int(category),
             'bbox': bbox, 'area': area, 'iscrowd': int(crowd)}
            for i, (image, category, *bbox, area, crowd) in enumerate(self.rows(), 1)]
        return {'images': [{'id': i, 'height': h, 'width': w} for i, _, h, w in self.images],
                'categories': [{'id': i, 'name': name} for i, name in names],
                'annotations': annotations}


def normalise(image: Image.Image) -> Tensor:
    """Convert to float (3, H, W) with the mean and deviation of pretrained backbones."""
    image = v2.functional.to_dtype(v2.functional.pil_to_tensor(image), torch.float32, scale=True)
    return v2.functional.normalize(image, IMAGENET_MEAN, IMAGENET_STD)


def pixel_target(boxes_xyxy: np.ndarray, labels: np.ndarray, size) -> dict:
    """Return a target for torchvision's transforms of an image of `size` (height, width)."""
    boxes = torch.from_numpy(boxes_xyxy).float()
    return {'boxes': tv_tensors.BoundingBoxes(boxes, format='XYXY', canvas_size=size),
            'labels': torch.from_numpy(labels)}


def transformed(transforms, seed, image: Image.Image, target):
    """Apply transforms that draw from `seed` alone. Return a Sample's image, labels and boxes."""
    # All transforms draw from the CPU's generator. `torch.manual_seed` would also seed the GPUs.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        image, target = transforms(image, target)
    boxes = box_convert(target['boxes'].as_subclass(Tensor), 'xyxy', 'cxcywh')
    boxes = boxes / torch.tensor(image.size * 2)
    return normalise(image), target['labels'], boxes


# --- Shapes, drawn on the fly ---

SHAPES = ('disc', 'ring', 'box', 'frame', 'triangle', 'cross')


def shape_mask(label, w, h):
    """Return the pixels of a shape, bool (h, w). A shape of 5 x 5 or more touches all sides."""
    x = (2 * np.arange(w) + 1) / w - 1  # (w,)    pixel centres, -1..1
    y = (2 * np.arange(h)[:, None] + 1) / h - 1  # (h, 1)
    radius2 = x * x + y * y  # (h, w)
    # Half the triangle's width grows from 1 / h at the top to 1. The minimum 1 / w keeps the top
    # row filled. 1.01 allows for rounding.
    half = np.maximum((y + 1) / 2 + 0.5 / h, 1.01 / w)  # (h, 1)
    return {'disc': radius2 <= 1,
            'ring': (radius2 <= 1) & (radius2 >= 0.3),
            'box': radius2 >= 0,
            'frame': (np.abs(x) >= 0.55) | (np.abs(y) >= 0.55),
            'triangle': np.abs(x) <= half,
            'cross': (np.abs(x) <= 0.34) | (np.abs(y) <= 0.34)}[SHAPES[label]]


def draw_shapes(seed, index, size=128):
    """Draw an image: uint8 (size, size, 3), boxes_xyxy int (M, 4), labels int (M,), M = 1..12.

    Half of the tries put an object beside an earlier object of equal class and similar size. Two
    objects share at most 40 % of the smaller one. Matching schemes differ in such crowds.
    RandomState is frozen, so the bits are the same everywhere.
    """
    rng = np.random.RandomState([seed, index])
    # Speed: one call draws all uniform numbers. An image uses at most 699 of them.
    uniform = iter(rng.random_sample(1200).tolist()).__next__

    def between(low, high):
        """Draw a whole number, both ends included."""
        return low + int(uniform() * (high - low + 1))

    def texture(low, high, cells, cell):
        colours = rng.randint(low, high, (cells, cells, 3), np.int32).astype(np.int16)
        return colours.repeat(cell, 0).repeat(cell, 1)[:size, :size]

    def fits(x, y, w, h):
        """Tell if an object lies inside the image and overlaps little."""
        for x0, y0, x1, y1, _ in placed:
            shared = max(0, min(x + w, x1) - max(x, x0)) * max(0, min(y + h, y1) - max(y, y0))
            if shared > 0.4 * min(w * h, (x1 - x0) * (y1 - y0)):
                return False
        return 0 <= x <= size - w and 0 <= y <= size - h

    # The background has two scales of texture, 70..188 in each channel, and bars of any colour.
    image = texture(70, 150, 4, (size + 3) // 4) + texture(0, 40, size // 8 + 1, 8)
    for _ in range(between(0, 6)):
        thick, long = between(1, max(2, size // 48)), between(size // 8, size // 2)
        h, w = (thick, long) if uniform() < 0.5 else (long, thick)
        x, y = between(0, size - w), between(0, size - h)
        image[y:y + h, x:x + w] = [between(0, 255) for _ in range(3)]

    # Width and height are 0.75..1.25 of a mean side, which is low..high pixels.
    low, high = size * 10 // 128, size * 56 // 128
    placed = []  # (x0, y0, x1, y1, label)
    # 1 to 12 objects are wanted. Small numbers are more frequent.
    wanted = 1 + int(12 * uniform() * (0.4 + 0.6 * uniform()))
    for _ in range(6 * wanted):
        if len(placed) == wanted:
            break
        if placed and uniform() < 0.5:
            # Put the object beside an earlier object. Steps are in units of w and h.
            x0, y0, x1, y1, label = placed[int(uniform() * len(placed))]
            w, h = (max(low // 2, int(side * (0.85 + 0.3 * uniform())))
                    for side in (x1 - x0, y1 - y0))
            sign = 1 if uniform() < 0.5 else -1
            step, drift = sign * (0.65 + 0.5 * uniform()), uniform() - 0.5
            dx, dy = (step, drift) if uniform() < 0.5 else (drift, step)
            x, y = x0 + int(dx * w), y0 + int(dy * h)
        else:
            # The square makes small objects more frequent.
            label, u = between(0, len(SHAPES) - 1), uniform()
            side = low + (high - low) * u * u
            w, h = int(side * (0.75 + 0.5 * uniform())), int(side * (0.75 + 0.5 * uniform()))
            x, y = between(0, size - w), between(0, size - h)
        if fits(x, y, w, h):
            placed.append((x, y, x + w, y + h, label))

    # Draw large objects first, so that small objects stay visible.
    placed.sort(key=lambda b: -(b[2] - b[0]) * (b[3] - b[1]))
    for x0, y0, x1, y1, label in placed:
        # Each channel is darker or lighter than the texture.
        colour = [between(0, 60) if uniform() < 0.5 else between(195, 255) for _ in range(3)]
        image[y0:y1, x0:x1][shape_mask(label, x1 - x0, y1 - y0)] = colour
    noise = np.frombuffer(rng.bytes(size * size * 3), np.uint8).reshape(size, size, 3) >> 3
    image = (image + noise - 16).clip(0, 255).astype(np.uint8)
    objects = np.array(placed, dtype=np.int64)
    return image, objects[:, :4], objects[:, 4]


class ShapesDataset(CocoDataset):
    """`length` images of `size` x `size` pixels. Each split has its own seed."""

    transforms, most_boxes = v2.Identity(), 12

    def __init__(self, split='train', length=8000, size=128, seed=0):
        self.size, self.seed = size, 2 * seed + (split != 'train')
        self.categories = Categories(list(range(1, len(SHAPES) + 1)), list(SHAPES))
        self.images = [(i, f'shapes/{split}/{i}', size, size) for i in range(length)]
        self.with_boxes = range(length)

    def load(self, index):
        image, boxes_xyxy, labels = draw_shapes(self.seed, index, self.size)
        target = pixel_target(boxes_xyxy, labels, (self.size, self.size))
        return Image.fromarray(image), target, *self.images[index][:2]

    # Speed: every evaluation needs the boxes, so they are kept.
    @lru_cache(None)
    def rows(self):
        rows = []
        for index in range(len(self)):
            _, boxes_xyxy, labels = draw_shapes(self.seed, index, self.size)
            for (x0, y0, x1, y1), label in zip(boxes_xyxy.tolist(), labels.tolist()):
                w, h = x1 - x0, y1 - y0
                rows.append((index, label + 1, x0, y0, w, h, w * h, 0))
        return rows


# --- A folder in the COCO layout ---

def random_size_crop(low, high, image: Image.Image, target):
    """Crop to a random width and height of low..high pixels, or less for a smaller image."""
    def choose(low, high):
        return int(torch.randint(low, high + 1, ()))
    w, h = (choose(min(low, side), min(high, side)) for side in image.size)
    window = choose(0, image.height - h), choose(0, image.width - w), h, w
    boxes = v2.functional.crop(target['boxes'], *window)
    return v2.functional.crop(image, *window), {**target, 'boxes': boxes}


def resize_to(size):
    """Resize to a short side of `size`, and a long side of at most 1333 / 800 * size (DETR)."""
    return v2.Resize(size, max_size=round(size * 1333 / 800))


def flips_and_colours(size, vertical_flip):
    """Return random flips and, for small images, random colour changes."""
    return ([v2.RandomHorizontalFlip()] + [v2.RandomVerticalFlip()] * vertical_flip
            + [v2.RandomPhotometricDistort()] * (size < 480))


# Cut boxes at the border, then remove boxes with a side below 1 pixel. The removal alone would also
# drop boxes that end outside by a rounding error.
TIDY_BOXES = v2.Compose([v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()])


def train_transforms(size, vertical_flip=False):
    """Return the augmentation of DETR and H-DETR, scaled from 800 to `size`.

    DETR resizes to a short side of 480..800 and a long side of at most 1333. Before that, half of
    the images are resized to a short side of 400, 500 or 600 and cropped to 384..600.
    If `size` is below 480, the short side is at least 640 / 800 of `size`, and colours change.
    Smaller images would lose small objects.
    """
    def scaled(pixels):
        return max(1, round(pixels * size / 800))
    sides = range(640 if size < 480 else 480, 801, 32)
    # v2.RandomShortestSize would round down, for example to 479 instead of 480.
    resize = v2.RandomChoice([v2.Resize(scaled(side), max_size=scaled(1333)) for side in sides])
    shrink = v2.RandomChoice([v2.Resize(scaled(side)) for side in (400, 500, 600)])
    crop = partial(random_size_crop, scaled(384), scaled(600))
    sizes = v2.RandomChoice([resize, v2.Compose([shrink, crop, resize])])
    return v2.Compose([*flips_and_colours(size, vertical_flip), sizes, TIDY_BOXES])


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB.

    Pixels of 16 or 32 bits are stretched: the 0.1 and 99.9 percentiles of finite pixels become
    0 and 255, so a few faulty pixels do not matter. NaN becomes black.
    """
    if image.mode.startswith(('I', 'F')):
        pixels = np.asarray(image, dtype=np.float64)
        known = pixels[np.isfinite(pixels)]
        low, high = np.percentile(known, (0.1, 99.9)) if known.size else (0, 0)
        pixels = (pixels - low) * 255 / max(high - low, 1e-30)  # all may be equal
        image = Image.fromarray(np.nan_to_num(pixels).clip(0, 255).astype(np.uint8))
    return image.convert('RGB')


@contextmanager
def opened(path):
    """Open an image file -> image, EXIF orientation (0 if it keeps width and height).

    Any error inside becomes a UserError: Pillow raises many kinds for a broken file.
    """
    try:
        # From a path, Pillow would turn some TIFFs wrongly.
        with open(path, 'rb') as file, Image.open(file) as image:
            tag = image.getexif().get(ExifTags.Base.Orientation)
            yield image, tag if tag in (5, 6, 7, 8) else 0
    except Exception as error:
        raise UserError(f'cannot read the image {path}: {error}') from None


def read_image(path, size=None) -> Image.Image:
    """Read an image file as RGB, turned as its EXIF orientation says.

    size: annotated (width, height). An image that has this size only before turning is not turned.
    Raises UserError for a file that cannot be read, and for a very thin image.
    """
    with opened(path) as (file, orientation):
        image = ImageOps.exif_transpose(file)
        if orientation and image.size != size == image.size[::-1]:
            undo = {5: 'TRANSPOSE', 6: 'ROTATE_90', 7: 'TRANSVERSE', 8: 'ROTATE_270'}[orientation]
            image = image.transpose(Image.Transpose[undo])
        image = as_rgb(image)
    check_sides(path, *image.size)
    return image


def check_sides(name, width, height):
    if max(width, height) > 20 * min(width, height):
        raise UserError(f'{name} has {width} x {height} pixels: too thin, beyond 20:1')


def read_annotations(file: Path) -> dict:
    """Return the content of a COCO annotation file. Raise UserError for the first bad entry.

    Whole floats become integers. Optional null fields are removed.
    """
    def number(x, types=(int, float)):  # float64 holds whole numbers below 2^53 exactly
        return type(x) in types and abs(x) < 2 ** 53

    def listed(kind):
        return lambda x: type(x) is int and x in ids[kind], f'the id of one of the {kind}'

    # Each field has a check and the words for its error.
    side = (lambda x: number(x, [int]) and x >= 0, 'a whole number from 0 on')
    own_id = (lambda x: number(x, [int]) and x not in ids[kind],
              'a whole number below 2^53, used once')
    text = (lambda x: isinstance(x, str), 'a text')
    yes_or_no = (lambda x: x in (0, 1), '0 or 1')
    rules = {
        'images': dict(id=own_id, file_name=text, width=side, height=side),
        'categories': dict(id=own_id, name=text),
        'annotations': dict(
            image_id=listed('images'), category_id=listed('categories'),
            bbox=(lambda x: isinstance(x, list) and len(x) == 4 and all(map(number, x)),
                  'four numbers x, y, width, height'),
            area=(number, 'a number'), iscrowd=yes_or_no, ignore=yes_or_no)}
    optional = {'width', 'height', 'area', 'iscrowd', 'ignore'}
    ids = {'images': set(), 'categories': set()}
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f'{file} is no valid JSON: {error}') from None
    for kind, fields in rules.items():
        entries = content.get(kind) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not entries:
            raise UserError(f'{file} has no list of {kind}, or an empty one')
        for place, entry in enumerate(entries):
            origin = f'{file}: entry {place} of {kind}'
            if not isinstance(entry, dict):
                raise UserError(f'{origin} is no object')
            for field, (good, needed) in fields.items():
                value = entry.get(field)
                if value is None and field in optional:
                    entry.pop(field, None)
                    continue
                if type(value) is float and value.is_integer():
                    entry[field] = value = int(value)
                if not good(value):
                    raise UserError(f'{origin} has the {field} {value!r}, which must be {needed}')
            if kind in ids:
                ids[kind].add(entry['id'])
    return content


# The image folder and the annotation file of a split. The last layout is Roboflow's.
LAYOUTS = (('{}2017', 'annotations/instances_{}2017.json'),
           ('{}', 'annotations/instances_{}.json'),
           ('{}', '{}/_annotations.coco.json'))


def find_split(root: Path, split):
    """Return the image folder and the annotation file of a split.

    Raises UserError, which lists the folder, if no layout fits.
    """
    if not root.is_dir():
        raise UserError(f'{root} does not exist as a folder')
    names = ('val', 'valid') if split == 'val' else (split,)
    pairs = [[pattern.format(name) for pattern in layout] for layout in LAYOUTS for name in names]
    for folder, file in pairs:
        if (root / folder).is_dir() and (root / file).is_file():
            return root / folder, root / file
    there = sorted(str(x.relative_to(root)) for x in (*root.glob('*'), *root.glob('*/*.json')))
    raise UserError(f'{root} needs one of: {"; ".join(map(" with ".join, pairs))}. It holds '
                    + (', '.join(there[:12]) or 'nothing') + ', ..' * (len(there) > 12))


def repeats(rows):
    """Return which rows of an array equal an earlier row, bool (rows,)."""
    is_repeated = np.ones(len(rows), bool)
    is_repeated[np.unique(rows, axis=0, return_index=True)[1]] = False
    return is_repeated


class CocoFolder(CocoDataset):
    """A folder in one of LAYOUTS. Doubtful entries are counted and printed.

    For training, boxes are cut at the border of the image. Crowds, ignored boxes and boxes
    without area do not train. The evaluation has all boxes. It treats ignored boxes as crowds.
    training, overfit: see `open_dataset`
    """

    def __init__(self, root, split, size, training=False, vertical_flip=False, seed=0, overfit=0):
        self.folder, self.file = find_split(Path(root), split)
        self.size, self.seed = size, seed
        content = read_annotations(self.file)
        categories = sorted((c['id'], c['name']) for c in content['categories'])
        self.categories = Categories(*map(list, zip(*categories)))
        self.images = [(i['id'], i['file_name'], i.get('height'), i.get('width'))
                       for i in content['images']]
        self.check_images()
        self.keep_boxes(content['annotations'], overfit, training)
        augments = training and not overfit
        self.transforms = train_transforms(size, vertical_flip) if augments else resize_to(size)

    def check_images(self):
        """Check that all files exist. Read missing or zero sizes from the images."""
        # Speed: one look finds all files outside subfolders.
        present = {entry.name for entry in os.scandir(self.folder) if entry.is_file()}
        missing = [name for _, name, *_ in self.images
                   if name not in present and not (self.folder / name).is_file()]
        if missing:
            files = [str(x.relative_to(self.folder)) for x in self.folder.rglob('*.*')]
            nearest = difflib.get_close_matches(missing[0], files, 1, 0)
            raise UserError(f'{self.file}: {len(missing)} images are not in {self.folder}; the '
                            f'first is {missing[0]} (nearest names: {nearest})')
        for index, (image_id, name, height, width) in enumerate(self.images):
            if not (height and width):
                with opened(self.folder / name) as (file, orientation):
                    # Pillow exchanges the sides of a TIFF itself.
                    is_turned = orientation and file.format != 'TIFF'
                    height, width = file.size if is_turned else file.size[::-1]
                self.images[index] = image_id, name, height, width
            check_sides(f'{self.file}: the image {name!r}', width, height)

    def keep_boxes(self, annotations, overfit, training):
        """Store A annotations as arrays, sorted by image. T annotations train. Report doubts.

        Raises UserError for implausible boxes, and in training if most boxes are too small.

        table (A, 8): see `rows`
        corners (T, 4), labels (T,): rows first_row[i] to first_row[i + 1] - 1 belong to image i
        Speed: worker processes share arrays, and copy lists.
        """
        index_of = {image[0]: index for index, image in enumerate(self.images)}
        annotations.sort(key=lambda a: index_of[a['image_id']])
        table = np.array([
            (index_of[a['image_id']], a['category_id'], *a['bbox'],
             a.get('area', a['bbox'][2] * a['bbox'][3]), a.get('iscrowd') or a.get('ignore', 0))
            for a in annotations], dtype=np.float64)
        owner, xy, wh = table[:, 0].astype(int), table[:, 2:4], table[:, 4:6]
        image_wh = np.array([(w, h) for _, _, h, w in self.images])[owner]  # (A, 2)
        if np.abs(table[:, 2:6]).max() < 1.01:
            raise UserError(f'{self.file}: all boxes lie within 0..1: are they fractions?')
        # 1 % and 1 pixel allow for rounding and for resized files.
        outside = (xy + wh > 1.01 * image_wh + 1).any(1).mean()
        if outside > 0.2:
            raise UserError(f'{self.file}: {outside:.0%} of the boxes end outside their image: '
                            'are they x1, y1, x2, y2? COCO has x, y, width, height')
        corners = np.concatenate([xy, xy + wh], 1).clip(0, np.tile(image_wh, 2))  # (A, 4)
        usable = (table[:, 7] == 0) & (corners[:, 2:] > corners[:, :2]).all(1)
        if not usable.any():
            raise UserError(f'{self.file} has no box with an area')
        if overfit:
            chosen = np.unique(owner[usable])[:overfit]
            self.images = [self.images[i] for i in chosen]
            kept = np.isin(owner, chosen)
            table, corners, usable, image_wh = (
                x[kept] for x in (table, corners, usable, image_wh))
            table[:, 0] = owner = np.searchsorted(chosen, owner[kept])
        self.table, self.corners = table, corners[usable].astype(np.float32)
        label_of = self.categories.label_of
        self.labels = np.array([label_of[i] for i in table[usable, 1].tolist()])
        self.first_row = np.searchsorted(owner[usable], np.arange(len(self.images) + 1))
        counts = np.diff(self.first_row)
        self.with_boxes, self.most_boxes = np.flatnonzero(counts).tolist(), int(counts.max())

        plain = table[:, 7] == 0
        self.report('boxes are crowds or ignored, and do not train', ~plain, owner)
        files = np.array([os.path.abspath(self.folder / image[1]) for image in self.images])
        self.report('images use the file of another one', repeats(files), np.arange(len(files)))
        owner, table = owner[plain], table[plain]
        self.report('boxes repeat a box of their class and image', repeats(table[:, :6]), owner)
        # The size (see `resize_to`) at which the shorter side of a box is one pixel.
        needed = np.maximum(image_wh.min(1), image_wh.max(1) * 800 / 1333)
        needed = (needed / (corners[:, 2:] - corners[:, :2]).min(1).clip(1e-6))[plain]
        small = f'boxes are below one pixel at --image-size {self.size}'
        self.report(small, needed > self.size, owner)
        if training and (needed > self.size).mean() > 0.5:
            larger = 32 * math.ceil(np.median(needed) / 16)
            hint = f'; half of all have two at --image-size {larger}' if larger < 10_000 else ''
            raise UserError(f'{self.file}: most {small}{hint}')

    def report(self, text, marked, owner):
        """Print how many entries are `marked` (bool), and the image of the first."""
        if marked.any():
            name = self.images[owner[marked.argmax()]][1]
            print(f'{self.file}: {marked.sum()} of {len(marked)} {text} (first: {name})')

    def rows(self):
        return self.table.tolist()

    def load(self, index):
        image_id, name, height, width = self.images[index]
        path = self.folder / name
        image = read_image(path, (width, height))
        if image.size != (width, height):
            raise UserError(f'{path} has {image.width} x {image.height} pixels, '
                            f'its annotation file says {width} x {height}')
        rows = slice(*self.first_row[index:index + 2])
        target = pixel_target(self.corners[rows], self.labels[rows], (height, width))
        return image, target, image_id, str(path)


def open_dataset(name, split, size, training=False, vertical_flip=False, seed=0, overfit=0):
    """Open the data set 'shapes' or a folder. split: 'train' or 'val'.

    training: augment. overfit: keep the first `overfit` images with boxes, unaugmented (0: all).
    """
    if name == 'shapes':
        length = 8000 if split == 'train' else 500
        return ShapesDataset(split, min(length, overfit or length), size, seed)
    return CocoFolder(name, split, size, training, vertical_flip, seed, overfit)


# --- Dense one-to-one: more objects per image ---

def mosaic(images: list[Image.Image], targets: list[dict], size):
    """Place four images with their targets in a 2 x 2 grid on black (DEIM slides).

    Each image is resized to a short side of `size` pixels and lies in the top left corner of its
    quadrant. All quadrants have the largest width and height of the four.
    """
    # Without a limit, a wide and a high image would make a huge canvas.
    tiles = list(map(v2.Resize(size, max_size=4 * size), images, targets))
    w, h = (max(tile.size[d] for tile, _ in tiles) for d in (0, 1))
    canvas, boxes = Image.new('RGB', (2 * w, 2 * h)), []
    for (tile, target), corner in zip(tiles, ((0, 0), (w, 0), (0, h), (w, h))):
        canvas.paste(tile, corner)
        boxes.append(target['boxes'].as_subclass(Tensor) + torch.tensor(corner * 2))
    boxes, labels = torch.cat(boxes), torch.cat([target['labels'] for target in targets])
    return canvas, pixel_target(boxes.numpy(), labels.numpy(), (2 * h, 2 * w))


def mixup(sample: Sample, other: Sample, beta=0.5) -> Sample:
    """beta * sample + (1 - beta) * other, with the objects of both.

    The result has the larger height and the larger width. Both images lie in its top left corner,
    and missing pixels count as 0, the mean colour. Boxes become fractions of the result.
    """
    h, w = (max(sample.image.shape[d], other.image.shape[d]) for d in (1, 2))
    image, boxes = torch.zeros(3, h, w), []
    for part, weight in ((sample, beta), (other, 1 - beta)):
        _, part_h, part_w = part.image.shape
        image[:, :part_h, :part_w] += weight * part.image
        boxes.append(part.boxes * torch.tensor([part_w / w, part_h / h] * 2))
    labels = torch.cat([sample.labels, other.labels])
    return sample._replace(image=image, labels=labels, boxes=torch.cat(boxes),
                           name=f'{sample.name} mixed with {other.name}')


class DenseOneToOne(Dataset):
    """A training set with several images in one, for more positives per image.

    Items are `dataset[epoch, index, dense]`. If `dense` is true, half of the items are mosaics, and
    half of all items are mixed with another image or mosaic.
    An item has the objects of up to eight images, so the detector needs enough queries.
    """

    def __init__(self, dataset, size, vertical_flip=False, seed=0):
        if len(dataset) < 4:
            raise UserError(f'a mosaic needs four images, and the training set has {len(dataset)}')
        self.dataset, self.categories = dataset, dataset.categories
        self.size, self.seed = size, seed
        # Objects outside the canvas are lost. There is no other crop (released code).
        affine = v2.RandomAffine(degrees=10, translate=(0.1, 0.1), scale=(0.5, 1.5), fill=0)
        self.transforms = v2.Compose([affine, *flips_and_colours(size, vertical_flip),
                                      resize_to(size), TIDY_BOXES])

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        epoch, index, dense = key
        if not dense:
            return self.dataset[epoch, index]
        # The 1 separates these draws from those of the data set.
        rng = np.random.RandomState([self.seed, epoch, index, 1])
        sample = self.plain_or_mosaic(epoch, index, rng)
        if rng.random_sample() < 0.5:
            [partner] = self.others(1, index, rng)
            sample = mixup(sample, self.plain_or_mosaic(epoch, partner, rng))
        return sample

    def plain_or_mosaic(self, epoch, index, rng):
        """Return image `index` or, half of the time, a mosaic with three others."""
        if rng.random_sample() < 0.5:
            return self.dataset[epoch, index]
        four = [index, *self.others(3, index, rng)]
        images, targets, ids, names = zip(*map(self.dataset.load, four))
        image, target = mosaic(images, targets, round(self.size / 2))
        return Sample(*transformed(self.transforms, rng.randint(2 ** 31 - 1), image, target),
                      ids[0], images[0].size[::-1], f'mosaic of {", ".join(names)}')

    def others(self, count, index, rng):
        """Draw `count` different images other than `index`."""
        return rng.choice(np.delete(np.arange(len(self)), index), count, replace=False).tolist()


# --- Batches ---

def train_batches(n, batch_size, steps, seed=0, start=0, rank=0, world=1, dense_part=None):
    """Yield this process's batches of (epoch, index) for the steps start..steps-1.

    n images make an endless stream. Position p lies in epoch p // n. Every epoch has its own order.
    A later start gives the images of an uninterrupted run. All processes together get the images
    of one process with `world` times the batch.
    With `dense_part` (see DENSE), items are (epoch, index, dense). dense is True in that part of
    the training.
    """
    # A batch may reach into the next epoch.
    @lru_cache(2)
    def order(epoch):
        return np.random.RandomState([seed, epoch]).permutation(n).tolist()

    for step in range(start, steps):
        dense = () if dense_part is None else (dense_part[0] <= step / steps < dense_part[1],)
        # In each step, the processes take the next `world` batches of the stream in turn.
        first = (step * world + rank) * batch_size
        yield [(p // n, order(p // n)[p % n], *dense) for p in range(first, first + batch_size)]


def ignore_signals(_worker):
    """Ignore Ctrl-C and SIGTERM in a loading process. The main process handles them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers():
    """Kill loading processes that outlive an error. They ignore SIGTERM."""
    if hasattr(signal, 'SIGCHLD'):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch reports a crash
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def batch_loader(dataset, batches, workers, pin=False):
    """Load the given batches once. Raise RuntimeError if none comes for PATIENCE seconds.

    The loader has its own generator, so that its start leaves torch's unchanged.
    """
    return DataLoader(
        dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers, pin_memory=pin,
        generator=torch.Generator(), worker_init_fn=ignore_signals,
        timeout=PATIENCE if workers else 0)


def train_loader(dataset, batch_size, steps, workers, seed=0, start=0, rank=0, world=1, pin=False,
                 dense_part=None):
    """Load the batches of this process for the steps start..steps-1, see `train_batches`."""
    batches = train_batches(len(dataset), batch_size, steps, seed, start, rank, world, dense_part)
    return batch_loader(dataset, batches, workers, pin)


def val_loader(dataset, batch_size, workers, rank=0, world=1, n=None):
    """Load the first `n` images (default: all) once, in order.

    Process `rank` of `world` takes every world-th image.
    """
    keys = [(0, index) for index in range(len(dataset))[:n][rank::world]]
    return batch_loader(dataset, BatchSampler(keys, batch_size, drop_last=False), workers)
