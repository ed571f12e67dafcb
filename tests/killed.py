"""Trainings that are killed at awkward moments and started again: `python tests/killed.py DATA OUT`; started by test_train.py

Each training runs in a fork that kills itself with SIGKILL at a chosen call of a chosen function, as often as the moment is met, until a
fork reaches the end. The weights of every run are compared with those of a training that nobody disturbed; what differs is printed as
JSON."""
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

import pneumothorax.train as t

EVERYTHING = {'size': [32, 64], 'epochs': [2, 2], 'bs': 2, 'lr': [2e-3, 1e-3], 'encoder': 'mobilenetv3_small_050', 'accumulate': 6,
    'bn_momentum': True, 'clip': 1., 'noise': 3e-10, 'sampling': 'sliding:0.8,0.4', 'smooth': .02, 'swa': .5, 'ema': .9, 'keep': 2,
    'opt': 'ranger', 'freeze': [1, 0], 'encoder_lr': .1}

# function, and at which of its calls the process dies (counted anew in every fork)
MOMENTS = {
    'in the first epoch': ('pneumothorax.callbacks.StopNaN.after_loss', 2),
    'in the second epoch of a stage': ('pneumothorax.callbacks.StopNaN.after_loss', 4),
    'in the middle of an epoch, saved step by step': ('pneumothorax.callbacks.StopNaN.after_loss', 3),
    'checkpoint written, not yet forced to the disk': ('os.fsync', 2),
    'old checkpoint moved away, new one not yet in place': ('os.replace', 9),
    'while batch norm is measured for the average': ('pneumothorax.averaging.update_bn', 1),
    'before the record': ('pneumothorax.train.save_run', 1),
}

def doomed(name, n):
    "Replace a function by one that kills the process at its n-th call"
    module, _, attr = name.rpartition('.')
    owner = sys.modules.get(module) or getattr(sys.modules[module.rpartition('.')[0]], module.rpartition('.')[2])
    plain, left = getattr(owner, attr), [n]
    def f(*args, **kwargs):
        left[0] -= 1
        if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)
    setattr(owner, attr, f)

def trained(data, out, moment=None, **changes):
    "Train in forks until one comes through; how many were killed"
    for kills in range(12):
        pid = os.fork()
        if not pid:
            if moment and kills < 2: doomed(*moment)
            t.train(data, out, weights='none', workers=0, progress=False, valid=.5, **{**EVERYTHING, **changes})
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status): sys.exit(f'{out} failed')
            return kills
    sys.exit(f'{out}: killed for ever')

def differ(a, b):
    "Files of two runs that should be the same and are not"
    names = sorted({f.relative_to(d).as_posix() for d in (a, b) for f in [*d.glob('*.safetensors'), *d.glob('epochs/*')]})
    return [n for n in names if not ((a/n).exists() and (b/n).exists()) or (a/n).read_bytes() != (b/n).read_bytes()]

if __name__ == '__main__':
    data, out = map(Path, sys.argv[1:])
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    result, t0 = {}, time.perf_counter()
    trained(data, out/'whole')
    for k, m in MOMENTS.items():
        run = out/k.replace(' ', '-').replace(',', '')
        kills = trained(data, run, m, every='step by step' in k)
        result[k] = {'kills': kills, 'differ': differ(out/'whole', run)}
    print(json.dumps({'result': result, 'files': sorted(f.name for f in (out/'whole').iterdir()),
        'secs': round(time.perf_counter()-t0, 1)}))
