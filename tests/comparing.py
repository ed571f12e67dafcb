"""What comparisons on the real radiographs have in common: their arguments, one recipe per folder, runs that are not repeated, tables
written at once

A run is named by a few words (a model, a seed, a fold), leaves one table in the folder of the comparison, and is made by a function
`one(out, cache, ids, *words, args)` that takes the ImageIds of its fold and returns a line to print."""
import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from conftest import SHARED

from pneumothorax.cache import prepare
from pneumothorax.decide import prob_to_mask
from pneumothorax.folds import make_folds
from pneumothorax.losses import LOSS
from pneumothorax.metrics import image_prob, image_scores
from pneumothorax.rle import rles_to_mask
from pneumothorax.siim import siim_train

ENCODER = 'tf_efficientnet_lite0'
RECIPE = 'folds', 'epochs', 'size', 'bs', 'lr', 'thresh', 'min_area', 'loss', 'opt', 'weights'
DEFAULTS = {'seeds': 3, 'folds': 2, 'epochs': 8, 'size': 256, 'bs': 4, 'jobs': 2, 'threads': 1, 'lr': 2e-3, 'thresh': .5, 'min_area': 800,
    'loss': LOSS, 'opt': 'adamw', 'weights': 'lite0'}

def parser(doc, **defaults):
    "Arguments of a comparison: OUT, `DEFAULTS` and what differs from them, and --report"
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out', type=Path)
    for k, v in {**DEFAULTS, **defaults}.items(): p.add_argument(f'--{k}', type=type(v), default=v)
    p.add_argument('--report', action='store_true', help='print what is there, train nothing')
    return p

def same_recipe(a, keys=RECIPE):
    "Runs of one folder were all made in one way; another way is refused"
    a.out.mkdir(parents=True, exist_ok=True)
    f, ours = a.out/'recipe.json', {k: getattr(a, k) for k in keys}
    if not f.exists(): f.write_text(json.dumps(ours)+'\n')
    theirs = json.loads(f.read_text())
    if other := {k: theirs.get(k, 'what was the default') for k in keys if theirs.get(k) != ours[k]}:
        sys.exit(f'{a.out} holds runs made with {other}; give these arguments, or another folder')

def write(t, f):
    "A table that is there as a whole or not at all"
    t.to_csv(f.with_suffix('.part'), index=False)
    f.with_suffix('.part').rename(f)

def predicted(learn):
    "Probabilities of the validation images N×size×size, in their order"
    learn.model.eval()
    with torch.inference_mode(): return torch.cat([learn.model(x).sigmoid()[:, 0] for x, _ in learn.dls.valid]).numpy()

def scored(df, probs, a):
    "One row per image: who, whether positive, Dice of the mask, image-level probability"
    scores = [image_scores(prob_to_mask(p, a.thresh, a.min_area)[None], rles_to_mask(r)[None], 'dice')[0] for p, r in zip(probs, df.rles)]
    return df[['ImageId', 'patient_id', 'has_ptx']].assign(dice=scores, prob=image_prob(probs))

def images(a):
    "The radiographs with their labels; `--images` takes the first so many, half of them positive, to try a comparison out"
    df, n = siim_train(SHARED/'siim-small'), getattr(a, 'images', 0)
    return pd.concat([df[df.has_ptx].head(n//2), df[~df.has_ptx].head(n-n//2)], ignore_index=True) if n else df

def all_images():
    "All 172 radiographs with their labels"
    return pd.concat([siim_train(SHARED/'siim-small'), siim_train(SHARED/'siim-more')], ignore_index=True)

def run(a, one, todo):
    "Make runs, which are tuples of words that end with the number of a fold"
    df, cache = images(a), a.out/f'cache-{a.size}'
    prepare(df, cache, a.size, progress=False)
    folds = make_folds(df, n=a.folds, seed=0)
    with ProcessPoolExecutor(a.jobs, multiprocessing.get_context('spawn')) as pool:
        jobs = [pool.submit(one, a.out, cache, folds.ImageId[folds.fold == t[-1]].tolist(), *t, a) for t in todo]
        for i, j in enumerate(as_completed(jobs)): print(f'{i+1}/{len(todo)} {j.result()}', flush=True)

def columns(t, start): return t.filter(regex=f'^{start}\\d+$').to_numpy()

def ends(lo, hi, form='.3f'):
    "An interval, or a dash where there is none"
    return '[–]' if np.isnan(lo) else f'[{lo:{form}}, {hi:{form}}]'

def said(i, spread):
    "Value, interval and range of seeds"
    return f'{i.value:.3f} {ends(i.lo, i.hi)} ({np.min(spread):.3f}–{np.max(spread):.3f})'
