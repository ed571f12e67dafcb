"""What each step from map to mask is worth on the real radiographs: `python tests/compare_decisions.py OUT [--seeds 1] [--jobs 2]`

The 114 radiographs of `$PTX_SHARED/siim-small` in four folds by patient; a network for each pair of folds, trained on these two (recipe
`stable`) and predicting the other two. Each fold is the test set once. Of the three others each is predicted by the network of the
remaining two, which has seen neither it nor the test set: on these out-of-fold maps the rule is searched and the gate is fitted, and the
same networks predict the test set, each alone or all three together. So nothing is ever tuned on what it is scored on. What stands in OUT
is not made again; `--report` only prints."""
import itertools
import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed

import numpy as np
import pandas as pd
import torch
from comparing import ends, images, parser, same_recipe

from pneumothorax.bootstrap import bootstrap_ci, bootstrap_stat, paired_bootstrap
from pneumothorax.cache import XrayCache, prepare
from pneumothorax.decide import TOPS, Decision, Triplet, count_pixels, decide, search, search_pieces
from pneumothorax.folds import make_folds
from pneumothorax.gate import Gate, dice_if_kept, features
from pneumothorax.metrics import auroc
from pneumothorax.predict import predict_maps
from pneumothorax.records import from_bytes, open_maps

FOLDS = range(4)
PAIRS = list(itertools.combinations(FOLDS, 2))
PLAIN = Decision(Triplet(.5, 0, .5))
STEPS = 'plain threshold', 'triplet', 'pieces', 'gate', 'views', 'three networks'

def fit(cache, ids, pair, seed, a):
    "Train the network of a pair of folds, or go on with it"
    from pneumothorax.train import train
    warnings.filterwarnings('ignore')
    torch.set_num_threads(a.threads)
    run = a.out/f'run-{pair[0]}{pair[1]}-{seed}'
    if not (run/'run.json').exists():
        train(cache, run, 'stable', valid=ids, seed=seed, weights=a.weights, workers=0, progress=False, size=a.size, epochs=a.epochs,
            encoder=a.encoder, loss=a.loss, opt=a.opt)
    return f'{run.name} trained'

def train_all(a, df, cache):
    "A network for each pair of folds and each seed"
    with ProcessPoolExecutor(a.jobs, multiprocessing.get_context('spawn')) as pool:
        jobs = [pool.submit(fit, cache, df.ImageId[~df.fold.isin(p)].tolist(), p, s, a) for s in range(a.seeds) for p in PAIRS]
        for i, j in enumerate(as_completed(jobs)): print(f'{i+1}/{len(jobs)} {j.result()}', flush=True)

def predict_all(a, df):
    "Maps N×size×size of each network, without and with views; empty rows for the images that it was trained on"
    out = {}
    for (i, j), seed, tta in itertools.product(PAIRS, range(a.seeds), ('none', a.tta)):
        unseen, f = df[~df.fold.isin((i, j))], a.out/f'maps-{i}{j}-{seed}-{tta}'
        if not (f/'predict.json').exists():
            predict_maps(a.out/f'run-{i}{j}-{seed}', unseen.path.tolist(), f, tta=tta, dtype='uint16', workers=0, progress=False)
        index, maps, _ = open_maps(f)
        at = pd.Series(np.arange(len(df)), df.ImageId)[index.ImageId]
        out[(i, j), seed, tta] = np.zeros((len(df), *maps.shape[1:]), np.uint16)
        out[(i, j), seed, tta][at] = maps[index.row]
    return out

def tuned(maps, df, cache):
    "Triplet, pieces and gate, chosen on maps that are out of fold"
    rules = {'triplet': Decision(search(count_pixels(maps, df.rles.tolist(), TOPS))[0])}
    rules['pieces'], _ = search_pieces(maps, df.rles.tolist(), rules['triplet'].triplet)
    table = df[['ImageId', 'path']].assign(row=range(len(df)))
    kept = dice_if_kept((table, maps), df.rles.tolist(), lambda p: decide(p, rules['pieces']))
    X = features((table, maps), 'map,image,meta', cache, progress=False)
    return rules, Gate(seed=0).fit(X, df.has_ptx.to_numpy(), df.patient_id.to_numpy(), df.fold.to_numpy(), kept)

def judged(maps, df, cache, rules, gate):
    "Dice and image-level probability of each image, by step"
    table, top = df[['ImageId', 'path']].assign(row=range(len(df))), from_bytes(maps.max((1, 2)))
    p = np.asarray(gate.predict(features((table, maps), 'map,image,meta', cache, progress=False)))
    dice = {k: dice_if_kept((table, maps), df.rles.tolist(), lambda m, d=d: decide(m, d)).dice.to_numpy()
        for k, d in {'plain threshold': PLAIN, **rules}.items()}
    dice['gate'] = np.where(p >= gate.threshold, dice['pieces'], (~df.has_ptx).astype(float))
    return {k: (v, p if k == 'gate' else top) for k, v in dice.items()}

def scored(a, df, cache):
    "Step → (N Dice, N probabilities), means over seeds, and over the networks where each decides alone"
    maps, size = predict_all(a, df), len(df)
    sums = {k: np.zeros((2, size)) for k in STEPS}
    for seed, test in itertools.product(range(a.seeds), FOLDS):
        others = [k for k in FOLDS if k != test]
        new, rest = (df.fold == test).to_numpy(), (df.fold != test).to_numpy()
        for tta in ('none', a.tta):
            oof = sum(maps[tuple(k for k in others if k != v), seed, tta]*(df.fold == v).to_numpy()[:, None, None].astype(np.uint16)
                for v in others)
            rules, gate = tuned(oof[rest], df[rest].reset_index(drop=True), cache)
            nets = [maps[pair, seed, tta][new] for pair in itertools.combinations(others, 2)]
            mine = df[new].reset_index(drop=True)
            alone = [judged(m, mine, cache, rules, gate) for m in nets]
            names = ({'plain threshold': 'plain threshold', 'triplet': 'triplet', 'pieces': 'pieces', 'gate': 'gate'}
                if tta == 'none' else {'gate': 'views'})
            for k, step in names.items(): sums[step][:, new] += np.mean([r[k] for r in alone], 0)/a.seeds
        together = np.mean(nets, 0).round().astype(np.uint16)
        sums['three networks'][:, new] += np.array(judged(together, mine, cache, rules, gate)['gate'])/a.seeds
        print(f'seed {seed}, test fold {test}: {rules["pieces"].spec()}, gate at {gate.threshold:.3f}', flush=True)
    return sums

def report(a, df, cache):
    "A row per step"
    who, y = df.patient_id.to_numpy(), df.has_ptx.to_numpy()
    before = None
    print(f'\n{len(df)} images, {y.sum()} positive, {a.seeds} seed(s), views: {a.tta}; 95 % intervals by patient')
    for step, (dice, p) in scored(a, df, cache).items():
        c, pos, auc = bootstrap_ci(dice, who), bootstrap_ci(dice[y], who[y]), bootstrap_stat(auroc, [p, y], who)
        change = '' if before is None else f'{(d := paired_bootstrap(dice, before, who)).value:+.3f} {ends(d.lo, d.hi, "+.3f")}'
        print(f'| {step} | {c.value:.3f} {ends(c.lo, c.hi)} | {change} | {pos.value:.3f} {ends(pos.lo, pos.hi)} | '
            f'{auc.value:.3f} {ends(auc.lo, auc.hi)} |', flush=True)
        before = dice

if __name__ == '__main__':
    p = parser(__doc__, seeds=1, epochs=16)
    p.add_argument('--encoder', default='tf_efficientnet_lite0')
    p.add_argument('--tta', default='hflip', help='views of the fifth step')
    a = p.parse_args()
    same_recipe(a, ('epochs', 'size', 'weights', 'encoder', 'loss', 'opt'))
    df, cache = images(a), a.out/f'cache-{a.size}'
    prepare(df, cache, a.size, progress=False)
    df = df.merge(make_folds(df, n=len(FOLDS), seed=0), on='ImageId')
    df = df.reset_index(drop=True)
    if not a.report: train_all(a, df, cache)
    warnings.filterwarnings('ignore')
    torch.set_num_threads(a.threads*a.jobs)
    report(a, df, XrayCache(cache))
