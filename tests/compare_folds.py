"""How much of the spread between folds do folds by mask size take away? `python tests/compare_folds.py [--splits 200 --folds 5]`

Folds of one data set differ in their scores because their images differ. On what each of the 172 radiographs got by the default recipe
(tests/results/training.csv, mean of the seeds), without any training: the images are dealt to folds at random by patient, with as many
positives in each, and by `make_folds` (patients, positives and mask sizes), so often; the variance between the folds of a split is
averaged over the splits. The ratio to that of the random folds stands beside it, with a 95 % interval from images that were drawn again by
patient. The spread that networks add, which learn from other folds each, is not in it."""
import argparse
import warnings

import numpy as np
import pandas as pd
from compare_training import RESULTS
from comparing import all_images
from sklearn.model_selection import KFold, StratifiedGroupKFold

from pneumothorax.folds import make_folds


def at_random(df, k, seed):
    "Patients, and nothing else"
    who = df.patient_id.unique()
    fold = dict.fromkeys(who, 0)
    for f, (_, i) in enumerate(KFold(k, shuffle=True, random_state=seed).split(who)): fold.update(dict.fromkeys(who[i], f))
    return df.patient_id.map(fold).to_numpy()

def as_many_positives(df, k, seed):
    out = np.zeros(len(df), int)
    for f, (_, i) in enumerate(StratifiedGroupKFold(k, shuffle=True, random_state=seed).split(df, df.has_ptx, df.patient_id)): out[i] = f
    return out

def by_size(df, k, seed): return make_folds(df, n=k, seed=seed).set_index('ImageId').fold[df.ImageId].to_numpy()

WAYS = {'at random, by patient': at_random, 'as many positives in each': as_many_positives, 'by mask size (`make_folds`)': by_size}
SCORES = {"competition's Dice": ('dice', False), 'Dice on positives': ('dice', True), 'outlines of positives': ('outline', True)}

def between(df, fold, column, ill):
    "Variance between the means of the folds"
    t = df[df.has_ptx] if ill else df
    means = t[column].groupby(fold[df.has_ptx.to_numpy()] if ill else fold).mean()
    return means.var(ddof=1) if len(means) > 1 else np.nan

def variances(df, k, seeds):
    "Way × score, means over the splits"
    out = np.full((len(WAYS), len(SCORES), len(seeds)), np.nan)
    for w, deal in enumerate(WAYS.values()):
        for s, seed in enumerate(seeds):
            fold = deal(df, k, seed)
            out[w, :, s] = [between(df, fold, *v) for v in SCORES.values()]
    return np.nanmean(out, -1)

def drawn_again(df, rng):
    "Patients with replacement; one who is drawn twice is two"
    groups = [g for _, g in df.groupby('patient_id')]
    picked = [groups[i].assign(patient_id=f'{n}') for n, i in enumerate(rng.integers(0, len(groups), len(groups)))]
    t = pd.concat(picked, ignore_index=True)
    return t.assign(ImageId=[f'{i}' for i in t.index])

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--splits', type=int, default=200)
    p.add_argument('--folds', type=int, default=5)
    p.add_argument('--resamples', type=int, default=100)
    a = p.parse_args()
    warnings.filterwarnings('ignore')
    t = pd.read_csv(RESULTS)
    scores = t[t.variant == 'base'].groupby('ImageId')[['dice', 'outline']].mean()
    df = all_images().merge(scores, left_on='ImageId', right_index=True, validate='one_to_one')
    v, rng = variances(df, a.folds, range(a.splits)), np.random.default_rng(0)
    again = np.stack([variances(drawn_again(df, rng), a.folds, range(20*i, 20*i+20)) for i in range(a.resamples)])
    print(f'{len(df)} images, {a.folds} folds, {a.splits} splits: standard deviation between folds, and variance relative to random folds')
    print('| folds | '+' | '.join(f'{k} | ratio' for k in SCORES)+' |\n|'+'---|'*(1+2*len(SCORES)))
    for w, name in enumerate(WAYS):
        cells = []
        for s in range(len(SCORES)):
            r = again[:, w, s]/again[:, 0, s]
            cells += [f'{v[w, s]**.5:.3f}', f'{v[w, s]/v[0, s]:.2f} [{np.quantile(r, .025):.2f}, {np.quantile(r, .975):.2f}]' if w else '']
        print('| '+' | '.join([name, *cells])+' |')
