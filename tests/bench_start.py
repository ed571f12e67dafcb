"""How long until a command has done something small? `python tests/bench_start.py [ROUNDS]`

Each command at its smallest task (a dozen phantoms of 64 px, a run of one epoch), as a process of its own, in turns with `import torch`
alone; seconds, and the median ratio to that import with the smallest and largest. ptx_predict and ptx_show predict one radiograph."""
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from racing import keep, rounds_of

BIN = Path(sys.executable).parent
ENV = {**os.environ, 'PYTHONWARNINGS': 'ignore'}

def seconds(*args):
    "Wall time of a process that must succeed"
    t = time.perf_counter()
    subprocess.run([str(a) for a in args], env=ENV, capture_output=True, check=True)
    return time.perf_counter()-t

def prepared(d):
    "A sample, a run, predictions and a submission"
    subprocess.run([BIN/'ptx_sample', d/'sample', '--n', '12', '--size', '64', '--positive', '.5'], env=ENV,
        capture_output=True, check=True)
    tiny = ['--size', '64', '--epochs', '1', '--bs', '4', '--encoder', 'mobilenetv3_small_050', '--weights', 'none', '--workers', '0']
    subprocess.run([BIN/'ptx_train', d/'sample', '--out', d/'run', *tiny], env=ENV, capture_output=True, check=True)
    subprocess.run([BIN/'ptx_predict', d/'run', d/'sample'/'dicom-images-test', '--out', d/'pred', '--workers', '0'], env=ENV,
        capture_output=True, check=True)
    subprocess.run([BIN/'ptx_submit', d/'pred', '--out', d/'s.csv', '--blank'], env=ENV, capture_output=True, check=True)
    return next((d/'sample'/'dicom-images-test').rglob('*.dcm'))

if __name__ == '__main__':
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else rounds_of(5)
    with tempfile.TemporaryDirectory() as tmp:
        d = Path(tmp)
        one = prepared(d)
        answers = d/'sample'/'answers'/'test-rle.csv'
        tasks = {'import fastai.vision.all': lambda k: (sys.executable, '-c', 'import fastai.vision.all'),
            'ptx_score': lambda k: (BIN/'ptx_score', d/'s.csv', answers),
            'ptx_merge': lambda k: (BIN/'ptx_merge', d/'s.csv', d/'s.csv', '--out', d/f'm{k}.csv'),
            'ptx_submit': lambda k: (BIN/'ptx_submit', d/'pred', '--out', d/f's{k}.csv', '--blank'),
            'ptx_folds': lambda k: (BIN/'ptx_folds', d/'sample', '--n', 2, '--out', d/f'f{k}.csv'),
            'ptx_export': lambda k: (BIN/'ptx_export', d/'pred', '--out', d/f'e{k}'),
            'ptx_show': lambda k: (BIN/'ptx_show', d/'run', one, '--out', d/'shown'),
            'ptx_predict': lambda k: (BIN/'ptx_predict', d/'run', one, '--out', d/f'p{k}', '--workers', 0)}
        taken, torch = {k: [] for k in tasks}, []
        for r in range(rounds):
            torch.append(seconds(sys.executable, '-c', 'import torch'))
            for k, f in tasks.items(): taken[k].append(seconds(*f(r)))
    print(f'import torch: {statistics.median(torch):.2f} s\n| command | seconds | of `import torch` |\n|---|---|---|')
    for k, v in taken.items():
        ratio = [a/b for a, b in zip(v, torch)]
        keep('start-up, to the end of a small task', k, 'import torch', ratio, [1000*x for x in v])
        print(f'| {k} | {statistics.median(v):.2f} | {statistics.median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f}) |')
