"""The speed suite: `make bench`, or `python tests/bench.py [PART…] [--rounds 9] [--out FILE]`

Runs the scripts below one after the other, each race as in `racing`, and writes tests/results/speed.csv: a line for each contestant with
the median ratio of its time to that of what it is compared with, the 10th and 90th percentile of the rounds, and the milliseconds of this
machine; speed.json says which machine, when, and of which commit. A script that fails is told, and its lines stay out with a line of its
own that says so. Parts that are not run keep the lines of the last time."""
import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
RESULTS = HERE/'results'/'speed.csv'
LITE0 = 'tf_efficientnet_lite0'
SUITE = {
    'masks': ('bench_masks.py',),
    'radiographs': ('bench_radiographs.py', 'read', 'cache', 'clahe', 'prepare'),
    'models': ('bench_models.py', '--sections', 'train', 'inference', '--encoders', LITE0, '--sizes', '256', '--threads', '1'),
    'training': ('bench_training.py', '--sections', 'parts', 'callbacks', '--threads', '1'),
    'predict': ('bench_predict.py', '--images', '100'),
    'search': ('bench_search.py', '--images', '1000'),
    'start': ('bench_start.py',),
    'import': ('bench_import.py',),
}
COLUMNS = ['part', 'task', 'what', 'against', 'ms', 'ratio', 'lo', 'hi', 'rounds']

def machine():
    "What the times belong to"
    cpu = next((line.split(':')[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines() if line.startswith('model name')),
        platform.processor())
    git = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
    return {'date': time.strftime('%Y-%m-%d', time.gmtime()), 'commit': git, 'cpu': cpu, 'cores': os.cpu_count(),
        'system': platform.system(), 'python': platform.python_version(),
        **{p: version(p) for p in ('torch', 'fastai', 'numpy', 'opencv-python-headless')}}

def measured(part, rounds):
    "Lines of one script; of one that fails, a line that says so"
    with tempfile.TemporaryDirectory() as d:
        f = Path(d)/'lines'
        f.touch()
        t = time.perf_counter()
        p = subprocess.run([sys.executable, '-W', 'ignore', HERE/SUITE[part][0], *SUITE[part][1:]],
            env={**os.environ, 'PTX_BENCH': str(f), 'PTX_ROUNDS': str(rounds)}, check=False)
        rows = [{'part': part, **json.loads(line)} for line in f.read_text(encoding='utf-8').splitlines()]
    print(f'{part}: {time.perf_counter()-t:.0f} s, {len(rows)} lines', flush=True)
    return rows+[{'part': part, 'task': f'FAILED with exit status {p.returncode}', 'what': SUITE[part][0]}]*(p.returncode != 0)

def merged(old, rows, parts):
    "The table with the parts that were run anew, in the order of the suite"
    t = pd.concat([old[~old.part.isin(parts)], pd.DataFrame(rows, columns=COLUMNS)], ignore_index=True)
    return t[t.part.isin(SUITE)].sort_values('part', key=lambda s: s.map(list(SUITE).index), kind='stable')

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('parts', nargs='*', help=f'of {", ".join(SUITE)}; all if left out')
    p.add_argument('--rounds', type=int, default=9)
    p.add_argument('--out', type=Path, default=RESULTS)
    a = p.parse_args()
    if unknown := set(a.parts)-set(SUITE): sys.exit(f'{", ".join(unknown)}: there are {", ".join(SUITE)}')
    f = a.out.with_suffix('.json')
    for part in a.parts or SUITE:     # each is kept as it comes
        old = pd.read_csv(a.out) if a.out.exists() else pd.DataFrame(columns=COLUMNS)
        merged(old, measured(part, a.rounds), [part]).to_csv(a.out, index=False)
        notes = json.loads(f.read_text()) if f.exists() else {}
        f.write_text(json.dumps({**notes, part: machine()}, indent=0)+'\n')
    failed = (t := pd.read_csv(a.out))[t.ratio.isna()]
    if len(failed): sys.exit(f'{", ".join(failed.what)}: failed')
