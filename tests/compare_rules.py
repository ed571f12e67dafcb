"""Which rule, when few labels are there to choose it by? `python tests/compare_rules.py OUT [--draws 12]`, on the maps that
`compare_ensembles.py OUT --train` made

In each outer fold a rule is chosen on out-of-fold maps of 8, 15 or 25 positives and of negatives in proportion, drawn so often, or on all
(about 39); it is scored on the images of the third that no network has seen, in the mean of its four networks, each alone. `search` takes
the highest of 4,332 triplets. The others: triplets that were chosen on nothing; the highest of a smoothed surface; the highest less a price
of the distance from the middle of what leading solutions took, which fades as positives come in; the median of what resampled images
choose; the top threshold alone; and no triplet at all, but for each image the mask with the highest expected Dice, where probabilities of
images come from a logistic regression on the areas over five thresholds. Intervals by patient, paired with `search`.
tests/results/rules.csv has the mean Dice of each image by rule and size."""
from pathlib import Path

import numpy as np
import pandas as pd
from compare_ensembles import OUTER, counted_oof, with_folds
from comparing import all_images, ends, parser, write
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression

from pneumothorax.bootstrap import paired_bootstrap
from pneumothorax.decide import AREAS, BOTTOMS, TOPS, Triplet, _triplet, count_pixels, dice_of, search, surface

SIZES = 8, 15, 25, None
FIXED = {f'{t.top:g},{t.min_area:g},{t.bottom:g}': t
    for t in (Triplet(.5, 2000, .3), Triplet(.7, 600, .3), Triplet(.75, 2000, .3), Triplet(.9, 1500, .3))}
T, A, B = (np.array(g, float) for g in (TOPS, AREAS, BOTTOMS))
# of a triplet from 0.6,1500,0.3
AWAY = ((T[:, None, None]-.6)/.2)**2+(np.log((A[None, :, None]+300)/1800)/np.log(2.5))**2+((B[None, None]-.3)/.15)**2

def highest(scores): return _triplet(scores, TOPS, AREAS, BOTTOMS)

def median_of(rules):
    "The grid's nearest to the median of each number"
    near = lambda g, v: g[int(np.abs(np.array(g)-np.median(v)).argmin())]
    return Triplet(near(TOPS, [r.top for r in rules]), near(AREAS, [r.min_area for r in rules]), near(BOTTOMS, [r.bottom for r in rules]))

def triplets(c, positive, rng):
    "Way to choose → triplet"
    (best, s), price = search(c), .1/positive.sum()*AWAY
    smooth, few = gaussian_filter(s, (1.5, 1, 1.5), mode='nearest'), np.full(s.shape, -1.)
    few[:, AREAS.index(1500), BOTTOMS.index(.3)] = s[:, AREAS.index(1500), BOTTOMS.index(.3)]
    w = rng.poisson(1, (len(c), 60)).astype(float)
    again = np.moveaxis(surface(c, TOPS, AREAS, BOTTOMS, w[:, w[positive].sum(0) > 0]), -1, 0)
    return {'search': best, **FIXED, 'smoothed': highest(smooth), 'drawn to the middle': highest(s-price),
        'smoothed and drawn': highest(smooth-price), 'median of 60 resamples': median_of([highest(x) for x in again]),
        'top alone': highest(few)}

def features(c): return np.log1p(c.over[:, c.at([.1, .3, .5, .7, .9])]/1000)

def expected(c, q):
    "Expected Dice of the mask at each threshold, if the image has a pneumothorax, N×thresholds; probabilities are taken at their word"
    middles = np.r_[(B[1:]+B[:-1])/2, (B[-1]+1)/2]
    bins = c.over-np.c_[c.over[:, 1:], np.zeros(len(c))]
    mass = (bins*middles)[:, ::-1].cumsum(1)[:, ::-1]/np.maximum(q, .05)[:, None]
    return 2*np.minimum(mass, c.over)/(c.over+mass[:, :1]+1)

def expected_dice(c, positive, tests):
    "Dice of each test image by the mask with the highest expected Dice, or none"
    fit = LogisticRegression(C=.3).fit(features(c), positive)
    out = []
    for x in tests:
        q = fit.predict_proba(features(x))[:, 1]
        e = expected(x, q)
        by = np.stack([dice_of(x, Triplet(b, 0, b)) for b in BOTTOMS], 1)[np.arange(len(x)), e.argmax(1)]
        out.append(np.where(q*e.max(1) > 1-q, by, x.truth == 0))
    return np.mean(out, 0)

def drawn(positive, m, rng):
    "Rows with m positives and negatives in proportion, or all"
    p, n = np.flatnonzero(positive), np.flatnonzero(~positive)
    if m is None or m >= len(p): return np.arange(len(positive))
    return np.sort(np.r_[rng.choice(p, m, replace=False), rng.choice(n, round(m*len(n)/len(p)), replace=False)])

def per_image(a, df):
    "A row per test image and size"
    rows = []
    for outer in OUTER:
        made = counted_oof(a, df, outer)
        if made is None:
            print(f'fold {outer}: networks are missing, left out')
            continue
        mine, (c, rest, test) = df[df.outer == outer], made
        positive, tests = rest.has_ptx.to_numpy(bool), [count_pixels(m, mine.rles.tolist(), TOPS) for m in test]
        for m in SIZES:
            dice = {}
            for r in range(a.draws if m else 1):
                rng = np.random.default_rng([outer, m or 0, r])
                at = drawn(positive, m, rng)
                for name, t in triplets(c[at], positive[at], rng).items():
                    dice.setdefault(name, []).append(np.mean([dice_of(x, t) for x in tests], 0))
                dice.setdefault('expected Dice', []).append(expected_dice(c[at], positive[at], tests))
            rows.append(pd.DataFrame({'ImageId': mine.ImageId, 'patient': mine.patient_id, 'fold': outer,
                'positive': mine.has_ptx.astype(int), 'positives': m or int(positive.sum()), 'all': m is None,
                **{k: np.round(np.mean(v, 0), 4) for k, v in dice.items()}}))
    t = pd.concat(rows)
    t['patient'] = pd.factorize(t.patient)[0]
    return t

def report(t):
    "A table per size"
    names = t.columns[6:]
    for (alls, m), o in t.groupby(['all', t.positives.where(~t['all'], 0)]):
        y, who = o.positive.to_numpy() > 0, o.patient.to_numpy()
        print(f'\nchosen on {"all, about "+format(o.positives.mean(), ".0f") if alls else m} positives; '
            f'{len(o)} images of {o.patient.nunique()} patients, {y.sum()} positive; 95 % by patient')
        print('| rule | Dice | less search | on positives | less search | healthy left empty |\n|---|---|---|---|---|---|')
        for k in names:
            cells = [k]
            for rows in (y | True, y):
                v, d = o[k].to_numpy()[rows], paired_bootstrap(o[k].to_numpy()[rows], o.search.to_numpy()[rows], who[rows])
                cells += [f'{v.mean():.3f}', '' if k == 'search' else f'{d.value:+.3f} {ends(d.lo, d.hi, "+.3f")}']
            print('| '+' | '.join([*cells, f'{o[k][~y].mean():.3f}'])+' |')

if __name__ == '__main__':
    p = parser(__doc__)
    p.add_argument('--draws', type=int, default=12, help='draws of each size')
    p.add_argument('--csv', type=Path, help='table to write; OUT/rules.csv if not given')
    a = p.parse_args()
    a.repeats = 1
    df = with_folds(all_images(), 1)
    t = per_image(a, df)
    write(t, a.csv or a.out/'rules.csv')
    report(t)
