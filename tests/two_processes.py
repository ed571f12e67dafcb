"One of two processes that measure the same seven images; started by test_metrics.py"
import json
import os
import sys
from datetime import timedelta

import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.distributed import DistributedDL
from fastai.learner import Learner
from fastai.torch_core import TensorImageBW, TensorMask
from torch import nn

from pneumothorax import metrics as m
from pneumothorax.losses import xray_loss

METRICS = [m.KaggleDice, m.DicePos, m.DiceNeg, m.ImageIoU, m.Sensitivity, m.Specificity, m.AUROC, m.AveragePrecision,
    m.ImageECE, m.PixelECE, m.LesionF1]
BATCHES = 1, 2, 3, 7

def images():
    "Logits and masks of seven images; the first, which is the one repeated for an even share, is worse than the mean"
    g = torch.Generator().manual_seed(1)
    true = torch.zeros(7, 32, 32, dtype=torch.uint8)
    true[0, 4:20, 4:20] = true[4, 8:12, 8:12] = true[6, 20:] = 1
    logits = true.float()*6-3+torch.randn(7, 32, 32, generator=g)*1.5
    logits[[0, 2]] = -5
    return logits[:, None], true

def learner(bs):
    "A model that returns its input, and every metric"
    echo = nn.Conv2d(1, 1, 1)
    nn.init.ones_(echo.weight)
    nn.init.zeros_(echo.bias)
    ds = [(TensorImageBW(x), TensorMask(y)) for x, y in zip(*images())]
    dls = DataLoaders(*[DataLoader(ds, bs=bs, num_workers=0)]*2)
    return Learner(dls, echo, loss_func=xray_loss(), metrics=[c() for c in METRICS])

def to_all(self, t, rank):
    "fastai sends the order of images through CUDA, which is not needed on CPUs"
    t = torch.tensor(t)
    torch.distributed.broadcast(t, rank)
    return t.tolist()

def measure(mode, bs):
    "Values of all metrics as the recorder has them, and how many images this process saw"
    learn, seen = learner(bs), []
    learn.model.register_forward_hook(lambda model, x, y: seen.append(len(y)))
    with learn.no_bar(), learn.no_logging():
        if mode == 'alone': values = learn.validate()
        elif mode == 'shared': values = learn.validate(dl=DistributedDL(learn.dls.valid))
        else:
            with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(1, lr=0)
            values = learn.recorder.values[-1][1:]
    return {'values': [float(v) for v in values[1:]], 'seen': sum(seen)}

if __name__ == '__main__':
    rank, port, out, *modes = sys.argv[1:]
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=60))
    DistributedDL._broadcast = to_all
    result = {mode: [measure(mode, bs) for bs in BATCHES] for mode in modes}
    with open(out, 'w', encoding='utf-8') as f: json.dump(result, f)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
