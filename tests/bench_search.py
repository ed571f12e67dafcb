"""`search` against the loop over triplets and images: `python tests/bench_search.py [--images 1000 10000] [--size 128] [--rounds 5]`
With `--oof FOLDER`, of a cross-validation: how much the best triplet varies on resampled patients, and what it and the pieces score by
folds.

The loop thresholds each map (already in floats) twice for each triplet and computes Dice, and does it well; for all triplets and images it
would take hours, so it runs on a few of both, drawn anew each round, and its time is scaled up linearly. Both give the same scores for what
the loop has tried; the largest difference is printed."""
import argparse
import threading
import time

import numpy as np
import pandas as pd
from racing import keep

from pneumothorax.decide import AREAS as LIMITS
from pneumothorax.decide import BOTTOMS as EDGES
from pneumothorax.decide import TOPS as SURE
from pneumothorax.decide import Decision, count_pixels, dice_of, nested_pieces, nested_search, search

TOPS, AREAS, BOTTOMS = np.linspace(.05, .95, 20), np.linspace(0, 9500, 25), np.linspace(.04, .96, 20)

def sample(n, size, seed=0):
    "Blurred discs as maps, other discs as true masks; every fifth image is positive, as in the competition"
    rng, yx = np.random.default_rng(seed), np.mgrid[:size, :size].astype(np.float32)/size
    maps, masks = np.empty((n, size, size), np.uint8), np.zeros((n, size, size), np.uint8)
    for i in range(n):
        c, r, off = rng.uniform(.3, .7, (2, 1, 1)), rng.uniform(.03, .2), rng.normal(0, .03, (2, 1, 1))
        if i % 5 == 0: masks[i] = ((yx-c)**2).sum(0) < r**2
        maps[i] = np.exp(-((yx-c-off)**2).sum(0)/(2*r**2))*rng.uniform(.5 if i % 5 == 0 else 0, 1)*255
    return maps, masks

def loop(maps, masks, triplets):
    "Mean Dice of each triplet, the obvious way"
    px, out, pairs = 1024**2/maps[0].size, [], [(p.astype(np.float32)/np.float32(255), m > 0, int(m.sum())) for p, m in zip(maps, masks)]
    for top, area, bottom in triplets:
        dices = []
        for x, m, area_m in pairs:
            mask = (x > np.float32(bottom)) & (np.count_nonzero(x > np.float32(top))*px > area)
            total = np.count_nonzero(mask)+area_m
            dices.append(2*np.count_nonzero(mask & m)/total if total else 1.)
        out.append(np.mean(dices))
    return np.array(out)

class Peak:
    "Resident memory of this process above what it was, watched by a thread"
    def __enter__(self):
        self.start, self.most, self.on = self.now(), 0, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self
    def now(self): return int(open('/proc/self/statm').read().split()[1])*4096
    def watch(self):
        while self.on:
            self.most = max(self.most, self.now()-self.start)
            time.sleep(.01)
    def __exit__(self, *args):
        self.on = False
        self.thread.join()

def main(a):
    every = [(t, ar, b) for t in TOPS for ar in AREAS for b in BOTTOMS]
    print(f'{len(every):,} triplets, maps of {a.size} px in bytes; ratio of times, median of {a.rounds} rounds (least to most)')
    for n in a.images:
        maps, masks = sample(n, a.size)
        rng, ratios, secs, far = np.random.default_rng(0), [], [], 0
        with Peak() as peak: search(maps, masks, TOPS, AREAS, BOTTOMS)
        for _ in range(a.rounds):
            t = time.perf_counter()
            search(maps, masks, TOPS, AREAS, BOTTOMS)
            secs.append(time.perf_counter()-t)
            some, few = rng.choice(n, 50, replace=False), rng.choice(len(every), 40, replace=False)
            t = time.perf_counter()
            slow = loop(maps[some], masks[some], [every[i] for i in few])
            ratios.append((time.perf_counter()-t)*n/50*len(every)/40/secs[-1])
            far = max(far, np.abs(search(maps[some], masks[some], TOPS, AREAS, BOTTOMS)[1].ravel()[few]-slow).max())
        keep(f'search of {len(every):,} triplets on {n:,} maps of {a.size} px', 'loop over triplets and images', 'search', ratios)
        print(f'{n:7,} images: {np.median(ratios):,.0f} ({min(ratios):,.0f} to {max(ratios):,.0f}), search takes {np.median(secs):.1f} s, '
            f'at most {peak.most/1e6:.0f} MB beside {maps.nbytes/1e6:.0f} MB of maps; largest difference of a score {far:.1e}')

def resampled(c, who, n, seed=0):
    """The best triplet, chosen on resampled patients: how far they scatter in steps of the grid, how many they are, and what they lose on
    the patients left out"""
    rng, rows = np.random.default_rng(seed), []
    codes, names = pd.factorize(who)
    for r in range(n):
        w = rng.multinomial(len(names), np.full(len(names), 1/len(names)))
        drawn = np.repeat(np.arange(len(c)), w[codes])
        again, out = c[drawn], c[w[codes] == 0]
        most = search(out)[1].max()
        t = search(again)[0]
        rows.append((str(t), *(g.index(v) for g, v in zip((SURE, LIMITS, EDGES), t)), most-dice_of(out, t).mean()))
    t = pd.DataFrame(rows, columns=['triplet', 'top', 'area', 'bottom', 'lost'])
    return pd.concat([t[['top', 'area', 'bottom']].std().round(2),
        pd.Series({'different': t.triplet.nunique(), 'commonest': t.triplet.mode()[0], 'lost': round(t.lost.mean(), 4)})])

def on_real(a):
    "Out-of-fold maps of a cross-validation"
    from pneumothorax.records import open_oof
    t, maps = open_oof(a.oof)
    maps, rles = [maps[r] for r in t.row], t.rle.tolist()
    start = time.perf_counter()
    c = count_pixels(maps, rles, [*SURE, *EDGES])
    print(f'{len(c)} images of {t.patient_id.nunique()} patients, {t.has_ptx.sum()} positive; '
        f'counted at 1024² in {(time.perf_counter()-start)/len(c)*1e3:.0f} ms each')
    print(f'{a.resamples} resamples of patients; standard deviations in steps of the grid\n'
        f'{resampled(c, t.patient_id, a.resamples).to_string()}')
    r = nested_search(c, t.fold, t.patient_id)
    print(f"by folds {r['score']}; without {r['optimistic']}; optimism {r['optimism']:.4f}; "
        f"triplets {', '.join(r['chosen'].triplet)}; all {r['triplet']}")
    more = nested_pieces(maps, rles, r, t.fold, t.patient_id)
    print(f"pieces by folds {more['score']}, gain {more['gain']}; {Decision.spec(more['decision'])}")

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--images', type=int, nargs='+', default=[1000, 10_000])
    p.add_argument('--size', type=int, default=128)
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--oof', help='folder of a cross-validation, such as ptx_train --folds makes')
    p.add_argument('--resamples', type=int, default=200)
    a = p.parse_args()
    on_real(a) if a.oof else main(a)
