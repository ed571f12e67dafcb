"""What makes a better network of few labels? `python tests/compare_training.py OUT [--only loss… --seeds 1] [--jobs 2]`, then the same with
`--report`

The 172 radiographs of `$PTX_SHARED/siim-small` and `siim-more` (59 positive), in three folds by patient. Each variant of `VARIANTS` is the
base recipe with one thing changed; it is trained on two folds and predicts the third, with as many seeds as `--seeds` says. A map is scored
by the triplet that was chosen on the maps of the other two folds, of the same variant and seed, so no test image had a say; beside it
stands the same by a triplet that was chosen on nothing (0.5,2000,0.3), the AUROC of images, the share of the 598 weak negatives of
`$PTX_SHARED/unlabelled` that the rule marks (each third by the network of one fold), and what differs from the base in pairs, with 95 %
intervals by patient. What stands in OUT is not made again, unless it was made with other settings or by another version, which is told; a
variant that fails is told with its error, in the report as well, and the others go on; variants whose runs are not all there are told. What
tests/results/training.csv knows from another machine is taken from there (without minutes and false alarms), if its settings in
training.json are those of today. Differences are taken in seeds that both have. `outlines` is Dice on positives where each of them is
marked, by the one threshold that suits the positives of the other folds best: what the maps are worth to somebody who knows that there is a
pneumothorax. tests/results/training.csv has a row per image, variant and seed."""
import json
import multiprocessing
import re
import sys
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from comparing import ENCODER, SHARED, all_images, ends, parser, same_recipe, write
from rivals import RIVALS, rival

from pneumothorax import __version__
from pneumothorax.bootstrap import bootstrap_ci, bootstrap_stat, paired_bootstrap
from pneumothorax.cache import prepare
from pneumothorax.data import xray_dls
from pneumothorax.decide import BOTTOMS, TOPS, Triplet, count_pixels, dice_of, search
from pneumothorax.equalize import equalizer
from pneumothorax.folds import make_folds
from pneumothorax.groups import rank_auroc
from pneumothorax.metrics import auroc, image_prob
from pneumothorax.records import open_maps

FOLDS, FIXED, OWN, RESULTS = (range(3), Triplet(.5, 2000, .3), ('masks', 'healthy', 'teacher', 'rival', 'weights'),
    Path(__file__).parent/'results'/'training.csv')     # of 256 px; training-128.csv of 128
OTHER = ('bce+dice', 'bce+dice+2*pos_dice', 'bce+pos_dice', 'bce+pos_dice+0.3*top', 'bce+batch_dice', 'bce+lovasz', 'bce',
    '10*bce+pos_dice', 'focal', 'jaccard', 'bce+tversky', '3:1:4')
VARIANTS = {
    'base': {},
    **{f'loss {k}': {'loss': k} for k in OTHER},
    **{f'opt {k}': {'opt': k} for k in ('adamw:wd=0', 'radam:wd=0.01', 'adamw:eps=1e-8')},
    **{f'{n} epochs': {'epochs': n} for n in (12, 50, 100)},
    **{f'{n} epochs, loss {k}': {'loss': k, 'epochs': n} for k in OTHER[:2] for n in (50, 100)},
    **{f'size {n}': {'size': n} for n in (384, 512)},
    'size 384, loss bce+dice': {'size': 384, 'loss': 'bce+dice'},
    'size 384, 50 epochs': {'size': 384, 'epochs': 50},
    'size 256, then 384': {'size': [256, 384], 'epochs': [16, 8], 'lr': [2e-3, 1e-3]},
    **{f'lr {v:g}': {'lr': v} for v in (1e-3, 5e-4)},
    'loss bce+dice, eps 1e-8': {'loss': 'bce+dice', 'opt': 'adamw:eps=1e-8'},     # its gradients are smaller, and ε is 1e-5 else
    'encoder_lr 0.1': {'encoder_lr': .1},
    'without hypercolumns': {'model': 'hyperunet:hypercolumns=False'},
    'ema 0.99': {'ema': .99},
    'swa 0.6': {'swa': .6},
    'share 0.6': {'sampling': 'share:0.6', 'epochs': 44},     # as many steps: an epoch has fewer images
    # share of positives and number of steps are those of the labelled ones
    '200 healthy more': {'healthy': 200, 'sampling': 'share:0.34'},
    'image branch': {'model': 'hyperunet:aux=True'},
    'attention': {'model': 'hyperunet:attention=scse'},
    'group norm': {'model': 'hyperunet:norm=group'},     # in the decoder
    **{f'logits at stride {n}': {'model': f'hyperunet:finest={n}'} for n in (1, 4)},     # 2 by default
    'smooth 0.02': {'smooth': .02},
    **{f'model {k}': {'model': k} for k in ('unet', 'unetplusplus', 'fpn', 'deeplabv3plus', 'manet', 'segformer')},
    'no augmentation': {'augment': 0},
    'from scratch': {'weights': 'none'},
    **{f'equalize {k}': {'equalize': k} for k in ('stretch', 'hist', 'clahe', 'freq')},
    **{f'equalize {k}, full size': {'equalize': k, 'equalize_first': True} for k in ('hist', 'clahe')},
    'opt radam, lr 5e-3': {'opt': 'radam:wd=0.01', 'lr': 5e-3},
    'opt sgd': {'opt': 'sgd:wd=1e-4', 'lr': .05},
    'opt ranger': {'opt': 'ranger'},
    'noise 1e-7': {'noise': 1e-7},     # of the size of the gradients in the first steps, and less and less
    'accumulate 32': {'accumulate': 32},     # four batches a step
    '2 a step': {'bs': 2, 'lr': 5e-4},
    'unlabelled': {'teacher': 'base'},
    **{f'masks {n}': {'masks': n} for n in (20, 40, 80)},
    **{f'unlabelled, masks {n}': {'teacher': f'masks {n}', 'masks': n} for n in (20, 40, 80)},
    **{k: {'rival': k} for k in RIVALS},
}

def chosen(a): return list(dict.fromkeys(v for k in a.only for v in VARIANTS if v == k or (k not in VARIANTS and v.startswith(k))))

def name_of(variant, seed, fold): return f'{re.sub("[^a-z0-9.]+", "-", variant.lower())}.seed{seed}.fold{fold}'

def settings(a, variant):
    "All that a result of a variant belongs to, but seed and fold; the recipe in full, so that another default is another setting"
    from pneumothorax.train import make_recipe
    v = {k: x for k, x in VARIANTS[variant].items() if k not in OWN}
    recipe = asdict(make_recipe('default', **{'loss': a.loss, 'opt': a.opt, 'epochs': a.epochs, 'size': a.size, **v}))
    del recipe['source']
    more = {k: x for k, x in VARIANTS[variant].items() if k in OWN}
    return json.loads(json.dumps({'version': __version__, 'weights': a.weights, 'tta': a.tta,
        **({'encoder': ENCODER, 'epochs': a.epochs, 'size': a.size} if 'rival' in more else recipe), **more}))

def changed(then, now): return ', '.join(f'{k}={then.get(k)!r} (now {now.get(k)!r})' for k in {**then, **now} if then.get(k) != now.get(k))

def settled(a, variant, seed, fold):
    "Was there a run of these settings? One of others is moved aside and told"
    out = a.out/name_of(variant, seed, fold)
    f, now = out/'settings.json', settings(a, variant)
    if out.exists() and (other := changed(json.loads(f.read_text()) if f.exists() else {}, now)):
        print(f'{out.name}: made with {other}; it is moved to {out.name}.other and made anew', flush=True)
        for g in a.out.glob(f'{out.name}*'):
            if not g.name.endswith('.other'): g.rename(g.with_name(f'{g.name}.other'))
    out.mkdir(exist_ok=True)
    f.write_text(json.dumps(now)+'\n')

def attempt(a, df, *job):
    "`fit`, whose failure is kept for the report"
    f = a.out/f'{name_of(*job)}.failed.txt'
    f.unlink(missing_ok=True)
    try: return fit(a, df, *job)
    except Exception as e:     # noqa: BLE001  whatever it is, the others go on
        f.write_text(traceback.format_exc())
        return f'{name_of(*job)}: FAILED, {type(e).__name__}: {e}'

def fit(a, df, variant, seed, fold):
    "Train one network and write its maps of the fold that it has not seen"
    from pneumothorax.predict import predict_maps
    from pneumothorax.train import train
    warnings.filterwarnings('ignore')
    torch.set_num_threads(a.threads)
    out, kw = (a.out/name_of(variant, seed, fold),
        {'recipe': 'default', 'loss': a.loss, 'opt': a.opt, 'epochs': a.epochs, 'size': a.size, **VARIANTS[variant]})
    unseen, cache, t0 = df[df.fold == fold], a.out/f'cache-{np.max(kw["size"])}', time.perf_counter()
    if 'masks' in kw or 'healthy' in kw:
        n, more, seen, cache = kw.pop('masks', None), kw.pop('healthy', 0), df[df.fold != fold], a.out/f'{out.name}.cache'
        mine = pd.concat([some_of(seen, n, seed) if n else seen, weak_rows(df, fold).head(more)])
        if n: kw['epochs'] = round(a.epochs*len(seen)/n)     # as many steps as with all
        prepare(pd.concat([mine, unseen]), cache, a.size, progress=False)
    if kw.pop('equalize_first', False):     # a cache that is equalised is trained on as it is
        prepare(df, cache := a.out/f'{out.name}.cache', a.size, before=equalizer(kw.pop('equalize')), progress=False)
    if 'teacher' in kw:
        kw.update(unlabelled=pool(a.out/f'pool-{fold}', healthy(df)[fold::len(FOLDS)]),
            teacher=[str(a.out/name_of(kw['teacher'], seed, fold))])
    if 'rival' in kw:
        trained = rival(kw['rival'], xray_dls(cache, a.size, 8, unseen.ImageId.tolist(), workers=0), seed, a.epochs, ENCODER, a.weights)
    elif not (out/'run.json').exists():
        kw = {'weights': a.weights, **kw}
        train(cache, out, kw.pop('recipe'), valid=unseen.ImageId.tolist(), seed=seed, workers=0, progress=False, **kw)
    out.mkdir(exist_ok=True)
    if not (out/'secs.txt').exists(): (out/'secs.txt').write_text(f'{time.perf_counter()-t0:.0f}\n')
    for name, files in (('healthy', healthy(df)[fold::len(FOLDS)]), ('maps', unseen.path.tolist())):
        predict_maps(trained if 'rival' in kw else out, files, a.out/f'{out.name}.{name}', tta=a.tta, workers=0, progress=False, fresh=True)
    return f'{out.name}: {time.perf_counter()-t0:.0f} s'

def some_of(df, n, seed):
    "So many radiographs with the same share of positives; fewer of one seed are among more"
    k = round(n*df.has_ptx.mean())
    mixed = df.sample(frac=1, random_state=seed)
    return pd.concat([mixed[mixed.has_ptx].head(k), mixed[~mixed.has_ptx].head(n-k)])

def healthy(df):
    "Radiographs in whose patients no pneumothorax was ever noted, and of whom none is among the labelled"
    t = pd.read_csv(SHARED/'unlabelled'/'metadata.csv', dtype=str)
    t = t[(t.weak_negative == '1') & ~t.patient_id.isin(df.patient_id)]
    return [SHARED/'unlabelled'/'images'/f'{i}.jpg' for i in t.ImageId]

def weak_rows(df, fold):
    "Rows of weak negatives as healthy radiographs to train on, without the third that is predicted by the network of this fold"
    files = [f for k in FOLDS if k != fold for f in healthy(df)[k::len(FOLDS)]]
    patients = pd.read_csv(SHARED/'unlabelled'/'metadata.csv', dtype=str).set_index('ImageId').patient_id
    return pd.DataFrame({'ImageId': [f.stem for f in files], 'path': files, 'rles': [[] for _ in files], 'has_ptx': False, 'area': 0,
        'patient_id': [patients[f.stem] for f in files]}).sample(frac=1, random_state=fold)

def pool(folder, but):
    "A folder of links to the unlabelled radiographs but some"
    source, names = SHARED/'unlabelled', {f.name for f in but}
    folder.mkdir(exist_ok=True)
    for f in [source/'metadata.csv', *(source/'images').glob('*.jpg')]:
        with suppress(FileExistsError):
            if f.name not in names: (folder/f.name).symlink_to(f)
    return folder

def done(a, variant, seed, fold):
    return all((a.out/f'{name_of(variant, seed, fold)}.{k}'/'predict.json').exists() for k in ('healthy', 'maps'))

def made(a, variant, seed):
    "Are all runs there, with the settings of today?"
    if not all(done(a, variant, seed, f) for f in FOLDS): return False
    notes = [a.out/name_of(variant, seed, f)/'settings.json' for f in FOLDS]
    other = [changed(json.loads(n.read_text()) if n.exists() else {}, settings(a, variant)) for n in notes]
    if any(other): print(f'{variant}, seed {seed}: not used, made with {next(filter(None, other))}')
    return not any(other)

def maps_of(a, df, variant, seed, kind='maps'):
    "Maps of all images, each by the network that has not seen it, n×h×w bytes; of another `kind` of prediction, if there is one"
    parts = []
    for f in FOLDS:
        index, m, _ = open_maps(a.out/f'{name_of(variant, seed, f)}.{kind}')
        parts.append(pd.Series(list(m[index.row.to_numpy()]), index.ImageId))
    return np.stack(pd.concat(parts)[df.ImageId].to_numpy())

def empty_counts(maps):
    "Counts for `dice_of` of images without a mask"
    index, m, _ = open_maps(maps)
    return count_pixels(m[index.row.to_numpy()], [[]]*len(index), TOPS)

def by_other_folds(df, counts):
    """Rule of each fold, searched on the others; Dice of each image by it; and by the one threshold that suits the positives of the others
    best"""
    fold, y, dice, outline = df.fold.to_numpy(), df.has_ptx.to_numpy(bool), np.zeros(len(df)), np.zeros(len(df))
    rules, cuts = [search(counts[fold != f])[0] for f in FOLDS], np.stack([dice_of(counts, Triplet(b, 0, b)) for b in BOTTOMS], 1)
    for f, r in zip(FOLDS, rules):
        dice[fold == f] = dice_of(counts[fold == f], r)
        outline[fold == f] = cuts[fold == f, cuts[y & (fold != f)].mean(0).argmax()]
    return rules, dice, outline

def judged(df, m):
    "Counts of the maps, the rules, and a row per image: Dice by a rule of the other folds, outlines, probability"
    c = count_pixels(m, df.rles.tolist(), TOPS)
    rules, dice, outline = by_other_folds(df, c)
    return c, rules, df[['ImageId', 'patient_id', 'has_ptx', 'fold']].assign(dice=dice.round(4), outline=outline.round(4),
        prob=image_prob(m.astype(np.float32)/255, 64).round(4))

def scored(a, df, variant, seed):
    "False alarms (0 or 1) on the weak negatives; and a row per image as of `judged`, with Dice by the fixed rule"
    c, rules, t = judged(df, maps_of(a, df, variant, seed))
    alarms = np.concatenate([1-dice_of(empty_counts(a.out/f'{name_of(variant, seed, f)}.healthy'), r) for f, r in zip(FOLDS, rules)])
    t = t.assign(variant=variant, seed=seed, fixed=dice_of(c, FIXED).round(4))
    return alarms, t[['ImageId', 'patient_id', 'has_ptx', 'fold', 'variant', 'seed', 'dice', 'fixed', 'outline', 'prob']]

def known(a, df):
    "What was made elsewhere with the settings of today: variant and seed → no false alarms, and a row per image"
    f = RESULTS if a.size == 256 else RESULTS.with_stem(f'{RESULTS.stem}-{a.size}')
    if not f.exists(): return {}
    t, notes = pd.read_csv(f).drop(columns=['patient_id', 'has_ptx', 'fold']), json.loads(f.with_suffix('.json').read_text())
    other = {v: changed(notes.get(v, {}), settings(a, v)) if v in VARIANTS else 'settings that are gone' for v in t.variant.unique()}
    for v, o in other.items():
        if o: print(f'{v}: what {f.name} has is not used, it was made with {o}')
    return {(v, s): (None, df[['ImageId', 'patient_id', 'has_ptx', 'fold']].merge(g, on='ImageId', validate='one_to_one'))
        for (v, s), g in t.groupby(['variant', 'seed']) if not other[v]}

def failures(a, variant): return sorted(a.out.glob(f'{name_of(variant, 0, 0)[:-len("0.fold0")]}*.failed.txt'))

def found(a, df):
    "False alarms and table of each variant and seed that is there; what is not is told"
    tables, alarms, elsewhere = {}, {}, known(a, df)
    for v in VARIANTS:
        for f in failures(a, v): print(f'{v}: FAILED, {f.read_text().splitlines()[-1]} ({f.name})')
        seeds = [s for s in range(a.seeds) if made(a, v, s) or (v, s) in elsewhere]
        if not seeds: continue
        got = [scored(a, df, v, s) if made(a, v, s) else elsewhere[v, s] for s in seeds]
        alarms[v], tables[v] = [m for m, _ in got if m is not None], dict(zip(seeds, (t for _, t in got)))
        if len(seeds) < a.seeds: print(f'{v}: seeds {seeds} only')
    return tables, alarms

def compared(ts, base, column, rows, who):
    "Value with the range of seeds, and difference to the base in the seeds that both have, with its interval by patient"
    mean = lambda tables, seeds: np.mean([tables[s][column][rows] for s in seeds], 0)
    spread, both = [t[column][rows].mean() for t in ts.values()], [s for s in ts if s in base]
    value = f'{np.mean(spread):.3f} ({min(spread):.3f}–{max(spread):.3f})'
    if ts is base or not both: return [value, '']
    diff = paired_bootstrap(mean(ts, both), mean(base, both), who[rows])
    return [value, f'{diff.value:+.3f} {ends(diff.lo, diff.hi, "+.3f")}']

def itself(ts, y, who):
    "AUROC, Dice and outlines with the intervals of the values, means over the seeds"
    probs = [t.prob.to_numpy() for t in ts.values()]
    rows = [bootstrap_stat(lambda ill, *ps: np.mean([rank_auroc(ill.astype(int), p) for p in ps]), [y, *probs], who)]
    rows += [bootstrap_ci(np.mean([t[c].to_numpy()[k] for t in ts.values()], 0), who[k]) for c, k in (('dice', y | True), ('outline', y))]
    return [f'{r.value:.3f} {ends(r.lo, r.hi)}' for r in rows]

def report(a, df):
    "A line per variant, and then what each scores by itself"
    y, who = df.has_ptx.to_numpy(bool), df.patient_id.to_numpy()
    tables, alarms = found(a, df)
    print(f'{len(df)} images of {df.patient_id.nunique()} patients, {y.sum()} positive; 95 % by patient; range of seeds')
    print('| variant | seeds | Dice | less the base | on positives | less the base | outlines | less the base | '
        'Dice by 0.5,2000,0.3 | on positives | AUROC | marked of the weak negatives | minutes |\n'
        '|---|---|---|---|---|---|---|---|---|---|---|---|---|')
    for v, ts in tables.items():
        parts = [compared(ts, tables['base'], *k, who) for k in (('dice', y | True), ('dice', y), ('outline', y))]
        fixed = [[t.fixed[rows].mean() for t in ts.values()] for rows in (y | True, y)]
        au = [auroc(t.prob.to_numpy(), y) for t in ts.values()]
        secs = [int(f.read_text()) for s in ts for k in FOLDS if (f := a.out/name_of(v, s, k)/'secs.txt').exists()]
        al = bootstrap_ci(np.mean(alarms[v], 0)) if alarms[v] else None
        cells = [v, str(len(ts)), *(c for p in parts for c in p), *[f'{np.mean(x):.3f} ({min(x):.3f}–{max(x):.3f})' for x in (*fixed, au)]]
        cells += [f'{al.value:.3f} {ends(al.lo, al.hi)}' if al else '', f'{np.mean(secs)/60:.1f}' if secs else '']
        print('| '+' | '.join(cells)+' |', flush=True)
    print('\n| by itself | AUROC | Dice | outlines |\n|---|---|---|---|')
    for v, ts in tables.items(): print('| '+' | '.join([v, *itself(ts, y, who)])+' |')
    t = pd.concat([t for ts in tables.values() for t in ts.values()])
    t['patient_id'] = pd.factorize(t.patient_id)[0]
    write(t, a.out/'training.csv')
    (a.out/'training.json').write_text(json.dumps({v: settings(a, v) for v in tables}, indent=0)+'\n')

if __name__ == '__main__':
    p = parser(__doc__, epochs=25, seeds=1)
    p.add_argument('--tta', default='hflip', help='views')
    p.add_argument('--first', type=int, default=0, help='seed to begin with, where another machine has made the ones before')
    p.add_argument('--only', nargs='+', default=[''], help='variants, or how their names begin, in this order')
    a = p.parse_args()
    if bad := [k for k in a.only if not any(v.startswith(k) for v in VARIANTS)]:
        sys.exit(f'no variant begins with {", ".join(bad)}; there are {", ".join(VARIANTS)}')
    same_recipe(a, ('epochs', 'size', 'weights', 'tta', 'loss', 'opt'))
    df = all_images()
    df = df.merge(make_folds(df, n=len(FOLDS), seed=0), on='ImageId')
    if a.report: report(a, df)
    else:
        todo = [(v, s, f) for s in range(a.first, a.seeds) for v in chosen(a) for f in FOLDS]
        for size in {int(np.max(VARIANTS[v].get('size', a.size))) for v, *_ in todo}:
            prepare(df, a.out/f'cache-{size}', size, progress=False)
        with ProcessPoolExecutor(a.jobs, multiprocessing.get_context('spawn')) as pool:
            for t in todo: settled(a, *t)
            left = [t for t in todo if not done(a, *t)]
            for taught in (False, True):     # teachers come first
                jobs = [pool.submit(attempt, a, df, *t) for t in left if ('teacher' in VARIANTS[t[0]]) == taught]
                for i, j in enumerate(as_completed(jobs)): print(f'{i+1}/{len(jobs)} {j.result()}', flush=True)
