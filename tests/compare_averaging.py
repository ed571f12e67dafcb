"""Do means of weights shrink the spread between seeds? `python tests/compare_averaging.py OUT [--seeds 5] [--folds 2] [--epochs 12]`

One training per seed and fold (by patient) of the 114 radiographs in `$PTX_SHARED/siim-small` gives five networks: the plain weights of the
last epoch, SWA, EMA, the mean of the `--best` epochs with the highest Dice, and the mean of the `--last` epochs. The three means of whole
epochs have their batch norm measured on the training images. Each predicts the fold, which training has not seen.

The best epochs are not chosen on that fold, which would be optimistic: about 15 % of the training images are held back for it, by patient.
So all five networks are trained on that much less, and their difference to each other is what counts. The images held back depend on the
fold and not on the seed.

A run leaves a table in OUT and is not repeated, so an interrupted comparison goes on where it stopped; `--report` only prints what is
there. Intervals of means resample patients; those of the ratios of standard deviations resample seeds and patients both, and with few seeds
they are wide."""
import itertools
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from comparing import ENCODER, RECIPE, columns, ends, parser, predicted, run, said, same_recipe, scored, write
from fastai.callback.core import Callback, CancelValidException
from fastai.torch_core import set_seed
from safetensors.torch import save_file

from pneumothorax.averaging import EMA, SWA, average_checkpoints, average_files, refresh_bn
from pneumothorax.bootstrap import bootstrap_ci, bootstrap_stat, paired_bootstrap
from pneumothorax.cache import XrayCache
from pneumothorax.data import LoadXray, XrayInput, split_by_patient, xray_batches, xray_dls
from pneumothorax.learner import xray_learner

KINDS = 'plain', 'swa', 'ema', 'best', 'last'

def table_of(out, seed, fold): return out/f'averaging.seed{seed}.fold{fold}.csv'

class KeepEpochs(Callback):
    """Keeps the plain weights of each epoch, and their Dice on the images held back; leaves out the validation of the averages, which
    nobody reads"""
    order = 69
    def __init__(self, run, a): self.folder, self.args, self.rows = run, a, []
    def after_train(self):
        save_file({k: v.contiguous() for k, v in self.learn.model.state_dict().items()},
            self.folder/'epochs'/f'epoch-{self.learn.epoch:03d}.safetensors')
        t = scored(self.learn.dls.valid.items, predicted(self.learn), self.args)
        self.rows.append({'epoch': self.learn.epoch, 'dice': t.dice.mean()})
        pd.DataFrame(self.rows).to_csv(self.folder/'history.csv', index=False)
    def before_validate(self): raise CancelValidException

def part(cache, keep):
    "Some rows of a cache"
    c = XrayCache(cache)
    c.table = c.table[keep(c.table)].reset_index(drop=True)
    return c

def networks(learn, swa, ema, folder, a):
    "The five kinds in turn, with the epochs that went into them"
    yield 'plain', learn.model, [a.epochs-1]
    yield 'swa', swa.model, list(range(a.epochs-swa.n_averaged, a.epochs))
    yield 'ema', ema.model, []
    state, epochs = average_checkpoints(folder, min(a.best, a.epochs), 'dice', learn.dls, learn.model)
    learn.model.load_state_dict(state)
    yield 'best', learn.model, epochs
    epochs = list(range(max(0, a.epochs-a.last), a.epochs))
    learn.model.load_state_dict(average_files([folder/'epochs'/f'epoch-{e:03d}.safetensors' for e in epochs]))
    refresh_bn(learn.model.eval(), learn.dls.train)
    yield 'last', learn.model, epochs

@torch.inference_mode()
def unseen(model, how, cache, a):
    "Probabilities of all images of a cache"
    batches = xray_batches(cache.table.row, LoadXray(how.size, cache=cache), a.bs, workers=0)
    return torch.cat([model.eval()(how.batch(xb)).sigmoid()[:, 0] for _, xb, *_ in batches]).numpy()

def one(out, cache, ids, seed, fold, a):
    "One training; what its five networks say about the fold that they have not seen"
    warnings.filterwarnings('ignore')
    torch.set_num_threads(a.threads)
    train, test = part(cache, lambda t: ~t.ImageId.isin(ids)), part(cache, lambda t: t.ImageId.isin(ids))
    held = train.table.ImageId[split_by_patient(train.table, a.held, seed=fold)].tolist()
    set_seed(seed)
    dls = xray_dls(train, bs=a.bs, valid=held, seed=seed, workers=0)
    learn = xray_learner(dls, 'hyperunet', ENCODER, a.weights, a.loss, metrics=[], opt_func=a.opt, seed=seed)
    swa, ema, t0 = SWA(a.start, lr=a.swa_lr or None, seed=seed), EMA(a.decay), time.perf_counter()
    with tempfile.TemporaryDirectory() as tmp, learn.no_bar(), learn.no_logging():
        folder = Path(tmp)
        (folder/'epochs').mkdir()
        learn.fit_one_cycle(a.epochs, a.lr, cbs=[swa, ema, KeepEpochs(folder, a)])
        secs, how = time.perf_counter()-t0, XrayInput.of(dls.xray)
        tables = [scored(test.table, unseen(m, how, test, a), a).assign(kind=kind, epochs=' '.join(map(str, epochs)), secs=round(secs, 1))
            for kind, m, epochs in networks(learn, swa, ema, folder, a)]
    f = table_of(out, seed, fold)
    write(pd.concat(tables), f)
    return f'{f.stem}: Dice on positives '+', '.join(f'{t.kind.iloc[0]} {t.dice[t.has_ptx].mean():.3f}' for t in tables)+f', {secs:.0f} s'

def pooled(a):
    "For each kind one row per image: patient_id, has_ptx, and for each seed that is complete Dice and probability; and those seeds"
    seeds = [s for s in range(a.seeds) if all(table_of(a.out, s, f).exists() for f in range(a.folds))]
    if len(seeds) < 2: sys.exit(f'{a.out}: {len(seeds)} seeds have all their folds; a spread needs two')
    runs = [pd.concat([pd.read_csv(table_of(a.out, s, f)) for f in range(a.folds)]) for s in seeds]
    tables = {}
    for k in KINDS:
        each = [r[r.kind == k].set_index('ImageId').sort_index() for r in runs]
        tables[k] = each[0][['patient_id', 'has_ptx']].join(
            [t[['dice', 'prob']].set_axis([f'dice{s}', f'prob{s}'], axis=1) for s, t in zip(seeds, each)])
    return tables, seeds

def sd_ratio(d, ref, who, n=2000, seed=0):
    """Standard deviation between seeds of the mean over images, as a ratio to the reference's, and 95 % from resampled seeds and patients;
    NaN where there is none"""
    codes, m = pd.factorize(who)[0], d.shape[1]
    group = lambda v: np.stack([np.bincount(codes, c) for c in v.T], 1)
    sums, count, rng, out = np.stack([group(d), group(ref)]), np.bincount(codes), np.random.default_rng(seed), []
    sd = lambda weight, seeds: (np.einsum('p,kps->ks', weight, sums)/(weight@count))[:, seeds].std(1, ddof=1)
    for _ in range(n):
        seeds = rng.integers(m, size=m)
        if len(set(seeds)) > 1: out.append(sd(np.bincount(rng.integers(len(count), size=len(count)), minlength=len(count)), seeds))
    a, b = sd(np.ones(len(count)), np.arange(m))
    with np.errstate(divide='ignore', invalid='ignore'): ratios = np.divide(*np.array(out).T)
    ratios = ratios[np.isfinite(ratios)]
    lo, hi = np.quantile(ratios, [.025, .975]) if len(ratios) > n/2 else (np.nan, np.nan)
    return a/b if b else np.nan, lo, hi

def spread_ratio(p, q): return p.std(1, ddof=1).mean()/max(q.std(1, ddof=1).mean(), 1e-12)

def report(a):
    "Each kind with its intervals, its spread between seeds, and both against the plain weights"
    tables, seeds = pooled(a)
    base = tables['plain']
    pos, who = base.has_ptx.to_numpy(bool), base.patient_id.to_numpy()
    print(f'{len(base)} images, {pos.sum()} positive, {base.patient_id.nunique()} patients; {a.folds} folds, '
        f'seeds {" ".join(map(str, seeds))}, {a.epochs} epochs at {a.size} px; '
        f'{100*a.held:.0f} % of each training part held back to choose epochs')
    for what, rows in (('Dice on positives', pos), ('competition Dice', pos | True)):
        print(f'\n{what}: mean over seeds [95 % by patient] (range of seeds); minus plain; '
            'standard deviation between seeds, and its ratio to plain [95 % by seed and patient]')
        for k, t in tables.items():
            d, ref = columns(t, 'dice')[rows], columns(base, 'dice')[rows]
            line = f'{k:6} {said(bootstrap_ci(d.mean(1), who[rows]), d.mean(0))}  '
            sd = f'sd {d.mean(0).std(ddof=1):.4f}'
            if k == 'plain': print(f'{line}{"":24}  {sd}')
            else:
                diff, (r, lo, hi) = paired_bootstrap(d.mean(1), ref.mean(1), who[rows]), sd_ratio(d, ref, who[rows])
                print(f'{line}{diff.value:+.3f} {ends(diff.lo, diff.hi, "+.3f")}  {sd}  ratio {r:.2f} {ends(lo, hi, ".2f")}')
    print('\nprobability that an image has a pneumothorax: standard deviation between seeds, '
        'mean over images [95 % by patient], and its ratio to plain')
    for k, t in tables.items():
        p, q = columns(t, 'prob'), columns(base, 'prob')
        i = bootstrap_ci(p.std(1, ddof=1), who)
        r = bootstrap_stat(spread_ratio, [p, q], who)
        print(f'{k:6} {i.value:.4f} {ends(i.lo, i.hi, ".4f")}', '' if k == 'plain' else f'  ratio {r.value:.2f} {ends(r.lo, r.hi, ".2f")}')

if __name__ == '__main__':
    p = parser(__doc__, seeds=5, epochs=12)
    p.add_argument('--start', type=float, default=.75, help='share of training after which SWA begins')
    p.add_argument('--swa_lr', type=float, default=0.,
        help='constant learning rate from then on; 0: that of the schedule. It changes the plain weights too')
    p.add_argument('--decay', type=float, default=.999, help='of EMA')
    p.add_argument('--best', type=int, default=3, help='epochs with the highest Dice on the images held back')
    p.add_argument('--last', type=int, default=6, help='epochs at the end')
    p.add_argument('--held', type=float, default=.15, help='share of the training images held back to choose the best epochs')
    p.add_argument('--images', type=int, default=0, help='the first so many images only, to try it out; 0: all')
    a = p.parse_args()
    same_recipe(a, (*RECIPE, 'start', 'swa_lr', 'decay', 'best', 'last', 'held', 'images'))
    todo = [t for t in itertools.product(range(a.seeds), range(a.folds)) if not table_of(a.out, *t).exists()]
    if not a.report: run(a, one, todo)
    report(a)
