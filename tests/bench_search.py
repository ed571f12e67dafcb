"""`search` against the loop over triplets and images: `python tests/bench_search.py [--images 1000 10000] [--size 128] [--rounds 5]`

The loop thresholds each map twice for each triplet and computes Dice, as everybody's first version does; for all triplets and images it would take hours, so it
runs on a few of both, drawn anew each round, and its time is scaled up linearly. Both give the same scores for what the loop has tried; the largest difference is printed."""
import argparse
import threading
import time

import numpy as np

from pneumothorax.decide import search

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
    px, out = 1024**2/maps[0].size, []
    for top, area, bottom in triplets:
        dices = []
        for p, m in zip(maps, masks):
            x = p.astype(np.float32)/np.float32(255)
            mask = (x > np.float32(bottom)) & ((x > np.float32(top)).sum()*px > area)
            total = mask.sum()+m.sum()
            dices.append(2*(mask & (m > 0)).sum()/total if total else 1.)
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
        print(f'{n:7,} images: {np.median(ratios):,.0f} ({min(ratios):,.0f} to {max(ratios):,.0f}), search takes {np.median(secs):.1f} s, '
            f'at most {peak.most/1e6:.0f} MB beside {maps.nbytes/1e6:.0f} MB of maps; largest difference of a score {far:.1e}')

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--images', type=int, nargs='+', default=[1000, 10_000])
    p.add_argument('--size', type=int, default=128)
    p.add_argument('--rounds', type=int, default=5)
    main(p.parse_args())
