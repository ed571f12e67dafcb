"""Which rule suits the mean of several networks? `python tests/compare_ensembles.py OUT --train [--repeats 2] [--jobs 2]`, then without
`--train`

The 172 radiographs of `$PTX_SHARED/siim-small` and `siim-more`, in three outer folds by patient; each outer fold is the test set once. On
the images of the other two a cross-validation of four folds is trained (recipe `stable` with AdamW, as the README trains it), as many times
as `--repeats` says. Its networks predict the images that each has not seen: those of its inner fold, on which a rule is searched, and the
test set, on which it is scored: on the mean of the networks, by votes of the masks of each, on the mean with the quantiles of single
networks, and with more repeats as a rule of means of as many networks, applied to such means. `--halves 60` compares the best triplet with
the middle of all that are as good. What stands in OUT is not made again; outer folds whose networks are not all there are left out, which
is said. tests/results/ensembles.csv has the Dice of each image for two repeats of the first outer fold and one of the others."""
import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed

import numpy as np
import pandas as pd
import torch
from comparing import all_images, ends, parser, same_recipe

from pneumothorax.bootstrap import bootstrap_ci, paired_bootstrap, score_areas
from pneumothorax.decide import AREAS, BOTTOMS, TOPS, Triplet, count_pixels, decide, dice_of, prob_to_mask, search, surface, vote
from pneumothorax.folds import make_folds
from pneumothorax.records import open_maps
from pneumothorax.rle import rles_to_mask

OUTER, INNER = range(3), range(4)

def fit(cache, df, outer, inner, repeat, a):
    "Train one network, and predict what it has not seen"
    from pneumothorax.predict import predict_maps
    from pneumothorax.train import train
    warnings.filterwarnings('ignore')
    torch.set_num_threads(a.threads)
    name = f'{outer}{inner}-{repeat}'
    run, maps = a.out/f'run-{name}', a.out/f'maps-{name}'
    if not (maps/'predict.json').exists():
        mine = df[df.outer != outer].reset_index(drop=True)
        held = mine.ImageId[mine[f'inner{outer}-{repeat}'] == inner].tolist()
        if not (run/'run.json').exists():
            train(mine, run, 'stable', valid=held, seed=100*repeat+10*outer+inner, weights=a.weights, workers=0, progress=False,
                  size=a.size, epochs=a.epochs, loss=a.loss, opt=a.opt)
        unseen = df[(df.outer == outer) | df.ImageId.isin(held)]
        predict_maps(run, unseen.path.tolist(), maps, tta=a.tta, workers=0, progress=False)
    return f'{name} done'

def with_folds(df, repeats):
    "Outer folds, and inner ones of each outer fold and repeat"
    df = df.merge(make_folds(df, n=len(OUTER), seed=0).rename(columns={'fold': 'outer'}), on='ImageId')
    for o in OUTER:
        for r in range(repeats):
            inner = make_folds(df[df.outer != o].reset_index(drop=True), n=len(INNER), seed=10*r+o)
            df = df.merge(inner.rename(columns={'fold': f'inner{o}-{r}'}), on='ImageId', how='left')
    return df

def train_all(a, df):
    "All networks, repeat by repeat"
    with ProcessPoolExecutor(a.jobs, multiprocessing.get_context('spawn')) as pool:
        jobs = [pool.submit(fit, None, df, o, i, r, a) for r in range(a.repeats) for o in OUTER for i in INNER]
        for n, j in enumerate(as_completed(jobs)): print(f'{n+1}/{len(jobs)} {j.result()}', flush=True)

PLAIN = {'plain 0.5,2000,0.3': Triplet(.5, 2000, .3), 'plain 0.7,600,0.3': Triplet(.7, 600, .3)}

def maps_of(a, df, outer, repeat):
    "Maps of images by each network of a fold: K×N×h×w bytes, and which images each has not seen, K×N; nothing where a network is missing"
    ms, unseen = [], []
    for inner in INNER:
        f = a.out/f'maps-{outer}{inner}-{repeat}'
        if not (f/'predict.json').exists(): return None
        index, m, _ = open_maps(f)
        at = pd.Series(np.arange(len(df)), df.ImageId)[index.ImageId].to_numpy()
        ms.append(np.zeros((len(df), *m.shape[1:]), np.uint8))
        ms[-1][at] = m[index.row]
        unseen.append(np.isin(np.arange(len(df)), at))
    return np.array(ms), np.array(unseen)

def mean_of(ms): return (ms.mean(0)/255).astype(np.float32)

def matched(mean, ms):
    "The mean with the quantiles that pixels of single networks have on the same images"
    q = np.unique(np.r_[np.linspace(0, 1, 2001), 1-np.geomspace(1e-7, .1, 400)])
    have, want = np.quantile(mean, q), np.quantile(ms/np.float32(255), q)
    have, at = np.unique(have, return_index=True)
    return np.interp(mean, have, want[at]).astype(np.float32)

def fold_masks(test, rule, repeated):
    "Method → masks 1024×1024 of the test images of a fold, one after the other; `test` K×n×h×w"
    k, mean = len(test), mean_of(test)
    near, single = matched(mean, test), [[decide(p, rule) for p in m] for m in test]
    out = {'rule on the mean': [decide(p, rule) for p in mean], 'rule on matched quantiles': [decide(p, rule) for p in near]}
    for least, name in ((1, 'one vote'), (k/2, 'half of the votes'), (k/2+.5, 'more than half'), (k, 'all votes')):
        out[name] = [(np.sum(ms, 0) >= least).astype(np.uint8) for ms in zip(*single)]
    if repeated:
        means, every = repeated[1].mean(0)/255, repeated[1].reshape(-1, *repeated[1].shape[2:])
        out[f'rule of means of {len(repeated[1])}, half of the votes of {k} such means'] = [
            vote([decide(m[i].astype(np.float32), repeated[0]) for m in means]) for i in range(len(mean))]
        out[f'half of the votes of {len(every)}'] = [vote([decide(m[i], rule) for m in every]) for i in range(len(mean))]
        out[f'rule on the mean of {len(every)}'] = [decide(p, rule) for p in mean_of(every)]
    for name, t in PLAIN.items():
        out[f'{name} on the mean'] = [decide(p, t) for p in mean]
        out[f'{name}, half of the votes'] = [vote([decide(m[i], t) for m in test]) for i in range(len(mean))]
    out['p over 0.5 on the mean'] = [prob_to_mask(p) for p in mean]
    return out | {f'network {i+1} alone': m for i, m in enumerate(single)}

def repeated_rule(a, df, outer):
    """A rule of means over the repeats, and maps of the test images, repeats×K×n×h×w: means over the first axis are of as many networks;
    None with one repeat"""
    parts = [maps_of(a, df, outer, r) for r in range(a.repeats)]
    if a.repeats < 2 or any(p is None for p in parts): return None
    rest, new = (df.outer != outer).to_numpy(), (df.outer == outer).to_numpy()
    oof = np.mean([np.where(seen[:, :, None, None], m, 0).sum(0) for m, seen in parts], 0)[rest]/255
    rule = search(count_pixels(oof.astype(np.float32), df.rles[rest].tolist(), TOPS))[0]
    return rule, np.array([m[:, new] for m, _ in parts])

def counted_oof(a, df, outer):
    "Counts of the out-of-fold maps of single networks, and their rows; None where a network is missing"
    made = maps_of(a, df, outer, 0)
    if made is None: return None
    rest = (df.outer != outer).to_numpy()
    oof = np.where(made[1][:, :, None, None], made[0], 0).sum(0).astype(np.uint8)[rest]
    return count_pixels(oof, df.rles[rest].tolist(), TOPS), df[rest], made[0][:, ~rest]

def per_image(a, df):
    "A row per test image: Dice and whether there is a mask, by method"
    rows = []
    for outer in OUTER:
        made = counted_oof(a, df, outer)
        if made is None:
            print(f'fold {outer}: networks are missing, left out')
            continue
        c, _, test = made
        rule, mine = search(c)[0], df[df.outer == outer]
        print(f'fold {outer}: rule {rule}, which scores {dice_of(c, rule).mean():.3f} where it was chosen', flush=True)
        masks = fold_masks(test, rule, repeated_rule(a, df, outer))
        for i, r in enumerate(mine.itertuples()):
            true = rles_to_mask(r.rles) > 0
            row = {'ImageId': r.ImageId, 'fold': outer, 'patient': r.patient_id, 'positive': int(true.any())}
            for name, ms in masks.items():
                row[f'dice {name}'] = round(float(score_areas((ms[i] > 0)[true].sum(), ms[i].sum(), true.sum())[0]), 4)
                row[f'mask {name}'] = int(ms[i].any())
            rows.append(row)
    t = pd.DataFrame(rows)
    t['patient'] = pd.factorize(t.patient)[0]
    return t

def report(t):
    "A line per method: Dice, on positives, share called positive, difference to the rule on the mean; intervals by patient"
    names = [c[5:] for c in t if c.startswith('dice ') and ' alone' not in c]
    alone = [c for c in t if c.startswith('dice ') and ' alone' in c]
    print(f'\n{len(t)} images of {t.patient.nunique()} patients, {t.positive.sum()} positive; 95 % intervals by patient')
    print('| how | images | Dice | less the rule on the mean | on positives | less the rule on the mean | called positive |\n'
        '|---|---|---|---|---|---|---|')
    for name in [*names, 'a single network']:
        cols = alone if name == 'a single network' else [f'dice {name}']
        o = t[t[cols].notna().all(axis=1)]     # a method of several repeats is known where these were made
        y, d, base = o.positive.to_numpy() > 0, o[cols].mean(axis=1).to_numpy(), o['dice rule on the mean'].to_numpy()
        cells = [name, str(len(o))]
        for rows in (y | True, y):
            who = o.patient.to_numpy()[rows]
            c, diff = bootstrap_ci(d[rows], who), paired_bootstrap(d[rows], base[rows], who)
            cells += [f'{c.value:.3f} {ends(c.lo, c.hi)}', f'{diff.value:+.3f} {ends(diff.lo, diff.hi, "+.3f")}']
        m = o[[c.replace('dice', 'mask', 1) for c in cols]].to_numpy().mean()
        print('| '+' | '.join([*cells, f'{m:.3f}'])+' |', flush=True)
    half, near = (t[f'dice {k}'].to_numpy() for k in ('half of the votes', 'rule on matched quantiles'))
    diff = paired_bootstrap(near, half, t.patient.to_numpy())
    print(f'matched quantiles less half of the votes: {diff.value:+.3f} {ends(diff.lo, diff.hi, "+.3f")}')

def plateau(c, groups, n=200):
    "The middle of all triplets within a standard error of the peak, as far as resampled patients tell"
    grid, k, rng = (TOPS, AREAS, BOTTOMS), groups.max()+1, np.random.default_rng(0)
    w = rng.multinomial(k, np.full(k, 1/k), n)[:, groups].T
    scores, s = surface(c, *grid), surface(c, *grid, w)
    top = np.unravel_index(np.argmax(scores >= scores.max()-1e-12), scores.shape)
    below, se = scores[top]-scores, (s[top]-s).std(-1)
    flat = np.argwhere(below <= np.maximum(se, 1e-12))
    at = flat[np.lexsort((-scores[tuple(flat.T)], ((flat-flat.mean(0))**2).sum(1).round(9)))[0]]
    return Triplet(*(g[i] for g, i in zip(grid, at)))

def halves(a, df):
    "Peak and plateau, chosen on one half of the patients and scored on the other"
    rng, rows = np.random.default_rng(0), []
    for outer in OUTER:
        made = counted_oof(a, df, outer)
        if made is None: continue
        c, t, _ = made
        who = pd.factorize(t.patient_id)[0]
        for _ in range(a.halves):
            first = np.isin(who, rng.permutation(who.max()+1)[:(who.max()+1)//2])
            both = search(c[first])[0], plateau(c[first], pd.factorize(who[first])[0])
            rows.append((outer, *[dice_of(c[~first], r).mean() for r in both]))
    t = pd.DataFrame(rows, columns=['fold', 'peak', 'plateau'])
    d = (t.plateau-t.peak).to_numpy()
    print(f'\n{len(t)} random halves: peak {t.peak.mean():.4f}, plateau {t.plateau.mean():.4f}, difference {d.mean():+.4f}, '
        f'95 % of the halves {np.quantile(d, .025):+.4f} to {np.quantile(d, .975):+.4f}, '
        f'plateau better in {(d > 0).mean():.0%}, worse in {(d < 0).mean():.0%}')

if __name__ == '__main__':
    p = parser(__doc__, epochs=25)
    p.add_argument('--repeats', type=int, default=1, help='cross-validations of other folds and seeds')
    p.add_argument('--tta', default='hflip', help='views')
    p.add_argument('--train', action='store_true', help='make networks and maps, compare nothing')
    p.add_argument('--halves', type=int, default=0, help='random halves on which the peak and the plateau are compared')
    p.add_argument('--csv', help='table to write, a row per test image; OUT/ensembles.csv if not given')
    a = p.parse_args()
    same_recipe(a, ('epochs', 'size', 'weights', 'tta', 'loss', 'opt'))
    df = with_folds(all_images(), a.repeats)
    if a.train: train_all(a, df)
    else:
        t = per_image(a, df)
        t.to_csv(a.csv or a.out/'ensembles.csv', index=False)
        report(t)
        if a.halves: halves(a, df)
