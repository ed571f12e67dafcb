"""Races between contestants that do the same: they take turns, in one process and in an order that is drawn anew each round, so that what
disturbs the machine disturbs both

Each is raced with the one it is compared with by itself, since what a third one does to memory is not theirs to pay. The median of the
rounds' ratios is printed, and their 10th and 90th percentile. Where `$PTX_BENCH` names a file, each line is kept there as well (`bench.py`
makes a table of them); `$PTX_ROUNDS` sets the rounds."""
import json
import os
import time

import numpy as np


def rounds_of(n): return int(os.environ.get('PTX_ROUNDS', n))

def keep(task, what, against, ratios, ms=None):
    "A line for the table: median ratio of the times of `what` to those of `against`, with its 10th and 90th percentile"
    if not (f := os.environ.get('PTX_BENCH')): return
    r = np.asarray(ratios, float)
    row = {'task': task, 'what': what, 'against': against, 'ms': None if ms is None else round(float(np.median(ms)), 3),
        'ratio': round(float(np.median(r)), 4), 'lo': round(float(np.percentile(r, 10)), 4),
        'hi': round(float(np.percentile(r, 90)), 4), 'rounds': r.size}
    with open(f, 'a', encoding='utf-8') as out: out.write(json.dumps(row)+'\n')

def line(name, times, base, task=None, against=None):
    "Milliseconds and ratio: median, and 10th to 90th percentile; kept if it has a task"
    r = np.asarray(times)/np.asarray(base)
    if task: keep(task, name, against, r, times)
    print(f'{name:34} {np.median(times):8.3f}   {np.median(r):6.3f}  ({np.percentile(r, 10):.3f} to {np.percentile(r, 90):.3f})',
        flush=True)

def race(title, base, contestants, items, rounds=25, seed=0):
    "Time each contestant and `base` in turns over all items; print milliseconds an item and the ratio"
    rng, rounds = np.random.default_rng(seed), rounds_of(rounds)
    print(f'\n{title}\n{"":34} {"ms":>8}   ratio to {base}')
    for name in contestants:
        pair, times = {base: contestants[base], name: contestants[name]}, {base: np.zeros(rounds), name: np.zeros(rounds)}
        for f in pair.values(): out = [f(i) for i in items]   # warm up
        for r in range(rounds if len(pair) > 1 else 0):
            for k in rng.permutation(list(pair)):
                t0 = time.perf_counter()
                for i in items: out = pair[k](i)  # noqa: F841 the result is kept until the next one is there, as in any use
                times[k][r] = (time.perf_counter()-t0)/len(items)*1e3
        if name != base:
            line(name, times[name], times[base], title, base)
            own = np.median(times[base])
    print(f'{base:34} {own:8.3f}', flush=True)
