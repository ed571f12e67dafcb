"""Models against each other on the real radiographs: `python tests/compare_models.py OUT [--models …] [--seeds 3] [--folds 2] [--epochs 8]`

Each model is trained with each seed on each fold (by patient) of the 114 radiographs in `$PTX_SHARED/siim-small`, from the same ImageNet
weights, for the same number of epochs, with the same data, loss and schedule, and predicts the images that it has not seen. A run leaves a
table in OUT and is not repeated, so an interrupted comparison goes on where it stopped; `--report` only prints what is there. Intervals
resample patients; the spread between seeds stands beside them, since on so few images chance in training is as large as most
differences."""
import itertools
import sys
import time
import warnings

import numpy as np
import pandas as pd
import torch
from comparing import ENCODER, columns, ends, parser, predicted, run, said, same_recipe, scored, write
from fastai.torch_core import set_seed

from pneumothorax.bootstrap import bootstrap_ci, bootstrap_stat, paired_bootstrap
from pneumothorax.data import xray_dls
from pneumothorax.learner import xray_learner
from pneumothorax.metrics import auroc

MODELS = ['hyperunet', 'hyperunet:hypercolumns=False', 'fastai_unet', 'unet', 'unetplusplus']

def table_of(out, model, seed, fold): return out/f'{model.replace(":", "-").replace("=", "-")}.seed{seed}.fold{fold}.csv'

def one(out, cache, ids, model, seed, fold, a):
    "Train one model, and write what it says about the fold that it has not seen"
    warnings.filterwarnings('ignore')
    torch.set_num_threads(a.threads)
    set_seed(seed)
    dls = xray_dls(cache, bs=a.bs, valid=ids, seed=seed, workers=0)
    learn = xray_learner(dls, model, ENCODER, a.weights, a.loss, metrics=[], opt_func=a.opt, seed=seed)
    t0 = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(a.epochs, a.lr)
    secs = time.perf_counter()-t0
    t = scored(learn.dls.valid.items, predicted(learn), a).assign(secs=round(secs, 1))
    f = table_of(out, model, seed, fold)
    write(t, f)
    return f'{f.stem}: Dice {t.dice.mean():.3f}, positives {t.dice[t.has_ptx].mean():.3f}, {secs:.0f} s'

def pooled(a, model):
    "One row per image: patient_id, has_ptx, and for each seed Dice and probability; None if runs are missing"
    files = [[table_of(a.out, model, s, f) for f in range(a.folds)] for s in range(a.seeds)]
    if not all(f.exists() for fs in files for f in fs): return None
    seeds = [pd.concat(map(pd.read_csv, fs)).set_index('ImageId').sort_index() for fs in files]
    out = seeds[0][['patient_id', 'has_ptx']].copy()
    for s, t in enumerate(seeds): out[[f'dice{s}', f'prob{s}']] = t[['dice', 'prob']]
    out.attrs['secs'] = np.mean([pd.read_csv(f).secs[0] for fs in files for f in fs])
    return out

def dices(t): return columns(t, 'dice')
def aurocs(probs, y): return np.mean([auroc(p, y) for p in probs.T])

def report(a):
    "Each model with its intervals, then differences to the first"
    tables = {m: t for m in a.models if (t := pooled(a, m)) is not None}
    if a.models[0] not in tables: sys.exit(f'{a.models[0]}, with which the others are compared, has not all its runs yet')
    if missing := set(a.models)-set(tables): print(f'left out, since runs are missing: {", ".join(sorted(missing))}')
    ref, base = next(iter(tables.items()))
    pos = base.has_ptx.to_numpy(bool)
    print(f'{len(base)} images, {pos.sum()} positive, {base.patient_id.nunique()} patients; '
        f'{a.folds} folds, {a.seeds} seeds, {a.epochs} epochs at {a.size} px; mean over seeds [95 % by patient] (range of seeds)')
    who = base.patient_id.to_numpy()
    for what, rows in (('Dice on positives', pos), ('competition Dice', pos | True)):
        print(f'\n{what}\n{"":32} {"":30} minus {ref}')
        for m, t in tables.items():
            d = dices(t)[rows]
            i, diff = bootstrap_ci(d.mean(1), who[rows]), paired_bootstrap(d.mean(1), dices(base)[rows].mean(1), who[rows])
            print(f'{m:32} {said(i, d.mean(0))}', '' if m == ref else f'  {diff.value:+.3f} {ends(diff.lo, diff.hi, "+.3f")}')
    print('\nAUROC of the image-level probability')
    for m, t in tables.items():
        p, q = (columns(x, 'prob') for x in (t, base))
        i = bootstrap_stat(aurocs, [p, pos], who)
        diff = bootstrap_stat(lambda p, q, y: aurocs(p, y)-aurocs(q, y), [p, q, pos], who)
        each = [auroc(v, pos) for v in p.T]
        print(f'{m:32} {said(i, each)}', '' if m == ref else f'  {diff.value:+.3f} {ends(diff.lo, diff.hi, "+.3f")}')
    print('\nseconds of training per run:', ', '.join(f'{m} {t.attrs["secs"]:.0f}' for m, t in tables.items()))

if __name__ == '__main__':
    p = parser(__doc__)
    p.add_argument('--models', nargs='+', default=MODELS)
    a = p.parse_args()
    same_recipe(a)
    todo = [(m, s, f) for s, f, m in itertools.product(range(a.seeds), range(a.folds), a.models) if not table_of(a.out, m, s, f).exists()]
    if not a.report: run(a, one, todo)
    report(a)
