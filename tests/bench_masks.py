"""Run-lengths, scoring, augmentation and views against the named alternatives: `python tests/bench_masks.py [runs score augment views]`

Raced as in `racing`, on real outlines where there are some (`$PTX_SHARED/siim-labels`), else on discs. The competition's
`mask_functions.py` is re-told in `theirs`; pycocotools is what COCO uses, in C. A score of a submission is raced with the obvious way,
masks drawn and compared; augmentation with kornia's of the same strength; a prediction of several views with as many passes of the network
alone, which is its bound."""
import sys
import tempfile
import warnings
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from conftest import SHARED
from racing import race

from pneumothorax.data import TensorXrayMask, xray_tfms
from pneumothorax.equalize import TensorXray
from pneumothorax.models import xray_model
from pneumothorax.rle import rle_decode, rle_encode
from pneumothorax.scoring import score_submission
from pneumothorax.tta import tta_probs, views


def real_runs(n=200):
    "Run-lengths of the competition, or of discs where it is not at hand"
    f = next((SHARED/'siim-labels').glob('*train.csv*'), None) if (SHARED/'siim-labels').is_dir() else None
    if f is not None:
        t = pd.read_csv(f, dtype=str).rename(columns=str.strip)
        rles = t[next(c for c in t if 'ixels' in c)].str.strip()
        return rles[rles != '-1'].head(n).tolist()
    rng = np.random.default_rng(0)
    return [rle_encode(cv2.circle(np.zeros((1024, 1024), np.uint8), rng.integers(200, 800, 2).tolist(), int(rng.integers(20, 150)), 1, -1))
        for _ in range(n)]

def theirs(rle, width=1024, height=1024):
    "The competition's decoder, as its participants used it"
    mask, at = np.zeros(width*height), 0
    for start, n in np.array(rle.split(), int).reshape(-1, 2):
        at += start
        mask[at:at+n] = 255
        at += n
    return mask.reshape(width, height).T

def encoded(mask):
    "Its encoder: a loop over pixels"
    out, at, last, n = [], -1, 0, 0
    for i, v in enumerate(mask.T.reshape(-1) > 0):
        if v and not last: out, n = [*out, str(i-at-1 if out else i)], 0
        n += v
        if last and not v: out, at = [*out, str(n)], i-1
        last = v
    return ' '.join([*out, str(n)] if last else out)

def runs():
    "A run-length to a mask, and back"
    from pycocotools import mask as coco
    rles = real_runs(60)
    masks = [rle_decode(r) for r in rles]
    assert all((theirs(r).astype(bool) == m).all() for r, m in zip(rles, masks)) and encoded(masks[0]) == rle_encode(masks[0])
    packed = {id(m): coco.encode(np.asfortranarray(m)) for m in masks}
    by_rle = {r: packed[id(m)] for r, m in zip(rles, masks)}
    race('a run-length to a mask of 1024²', 'rle_decode',
        {'rle_decode': rle_decode, "the competition's": theirs, 'pycocotools': lambda r: coco.decode(by_rle[r]),
        'an empty mask (bound)': lambda r: np.full((1024, 1024), 0, np.uint8)}, rles)
    race('a mask of 1024² to a run-length', 'rle_encode',
        {'rle_encode': rle_encode, 'pycocotools': lambda m: coco.encode(np.asfortranarray(m))}, masks)
    race('the same, one mask', 'rle_encode', {'rle_encode': rle_encode, "the competition's": encoded}, masks[:1], rounds=5)

def drawn(sub, labels):
    "Mean Dice the obvious way"
    a, b = (pd.read_csv(f).set_index('ImageId').EncodedPixels for f in (sub, labels))
    dice = []
    for i in b.index:
        x, y = (theirs(t[i]) > 0 if t[i] != '-1' else np.zeros((1024, 1024), bool) for t in (a, b))
        dice.append(2*(x & y).sum()/total if (total := x.sum()+y.sum()) else 1.)
    return float(np.mean(dice))

def score():
    "A submission of 300 images, a fifth of them positive"
    rles, rng = real_runs(60), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as d:
        ids, files = [f'1.2.{i}' for i in range(300)], [Path(d)/f for f in ('sub.csv', 'labels.csv')]
        for f in files:
            pd.DataFrame({'ImageId': ids, 'EncodedPixels': [*rng.permutation(rles), *['-1']*(300-len(rles))]}).to_csv(f, index=False)
        assert abs(score_submission(*files)['dice']-drawn(*files)) < 1e-9
        race('scoring 300 images', 'score_submission',
            {'score_submission': lambda _: score_submission(*files), 'masks drawn and compared': lambda _: drawn(*files)}, [0], rounds=5)

def augment():
    "A batch of eight with masks"
    import kornia.augmentation as K
    from fastai.vision.all import Pipeline
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(8, 1, 256, 256, generator=g), (torch.rand(8, 256, 256, generator=g) < .05).to(torch.uint8)
    ours, theirs = Pipeline(xray_tfms(), split_idx=0), K.AugmentationSequential(K.RandomHorizontalFlip(p=.5),
        K.RandomAffine(10, scale=(1/1.15, 1.15), p=.75), K.RandomBrightness((.8, 1.2), p=.75), K.RandomContrast((.8, 1.2), p=.75),
        data_keys=['input', 'mask'])
    race('augmentation of 8 radiographs of 256 px with their masks', 'xray_tfms',
        {'xray_tfms': lambda _: ours((TensorXray(x), TensorXrayMask(y))), 'kornia': lambda _: theirs(x, y[:, None].float())}, [0])

def predict_views():
    "A batch of four by one, two and more views"
    net = xray_model('hyperunet', 'tf_efficientnet_lite0').eval().to(memory_format=torch.channels_last)
    x = torch.rand(4, 1, 256, 256)
    passes = lambda x, _=None: net(x.contiguous(memory_format=torch.channels_last)).sigmoid()
    with torch.inference_mode():
        race('a prediction of 4 radiographs of 256 px with its mirror image', 'two passes of the network (bound)',
            {'two passes of the network (bound)': lambda _: (passes(x), passes(x)),
            'tta_probs, hflip': lambda _: tta_probs(passes, x, views('hflip'))}, [0], rounds=15)

PARTS = {'runs': runs, 'score': score, 'augment': augment, 'views': predict_views}

if __name__ == '__main__':
    warnings.simplefilter('ignore')
    if unknown := set(sys.argv[1:])-set(PARTS): sys.exit(f'{", ".join(unknown)}: give some of {", ".join(PARTS)}')
    for part in sys.argv[1:] or PARTS: PARTS[part]()
    sys.stdout.flush()
