"Averages of weights: over processes, under wrappers, in mixed precision, after interruptions, for every model"
import random
import warnings
from copy import deepcopy
from datetime import timedelta

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException, CancelEpochException, CancelStepException, CancelTrainException
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.distributed import DistributedDL
from fastai.learner import Learner
from fastai.optimizer import SGD, RAdam
from torch import nn

from pneumothorax.averaging import EMA, SWA, average_files, refresh_bn
from pneumothorax.models import SMP, xray_model
from pneumothorax.rle import PtxError
from pneumothorax.siim import PtxNotice

pytestmark = pytest.mark.usefixtures('one_thread')

def net(seed=0, norm=nn.BatchNorm2d):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), norm(4), nn.ReLU(), nn.Conv2d(4, 1, 1))

def pictures(n=24): return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(3))*2+1

def loaders(workers=0, bs=4):
    x = pictures()
    ds = [(a, (a > 1).float()) for a in x]
    dls = DataLoaders(DataLoader(ds[:16], bs=bs, shuffle=True, drop_last=True, num_workers=workers), DataLoader(ds[16:], bs=4))
    dls.train.rng = random.Random(0)
    return dls

def learner(cbs=None, model=None, dls=None, opt_func=SGD, **kwargs):
    return Learner(dls or loaders(), model or net(), loss_func=nn.BCEWithLogitsLoss(), opt_func=opt_func, cbs=cbs, **kwargs)

def fit(learn, n, lr=.2, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, **kwargs)
    return learn

def weights(m): return {k: v.detach().clone() for k, v in m.state_dict().items()}
def same(a, b): return all(torch.equal(v, b[k]) for k, v in a.items())

# --- several processes

def process(rank, folder):
    "One of two: its half of the images, measured with the other's; then a fit under DistributedDataParallel"
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2,
        timeout=timedelta(seconds=60))
    m, x = net(), pictures()
    n = refresh_bn(m, [x[i:i+4] for i in range(0, 24, 4)][rank::2])
    uneven = net()
    refresh_bn(uneven, [x[:4], x[4:8], x[8:12]] if rank else [x[12:16]])
    plain = net()
    ds = [(a, (a > 1).float()) for a in x]
    dls = DataLoaders(DataLoader(ds[rank::2], bs=4), DataLoader(ds, bs=4))
    swa, ema = SWA(.5), EMA(.9)
    learn = learner([swa, ema], plain, dls)
    learn.model = nn.parallel.DistributedDataParallel(plain)
    wrapped = learn.model
    fit(learn, 4)
    assert learn.model is wrapped
    torch.save({'n': n, 'bn': weights(m), 'uneven': weights(uneven), 'swa': weights(swa.model), 'ema': weights(ema.model),
        'keys': list(plain.state_dict())}, f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()

def test_two_processes_measure_what_one_does(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    a, b = (torch.load(tmp_path/f'{r}.pt', weights_only=True) for r in range(2))
    x, alone, four = pictures(), net(), net()
    assert a['n'] == b['n'] == refresh_bn(alone, x.split(4)) == 6
    refresh_bn(four, x[:16].split(4))
    for r in (a, b):
        for k, m in (('bn', alone), ('uneven', four)):
            for name, v in m.state_dict().items(): torch.testing.assert_close(r[k][name], v, rtol=1e-5, atol=1e-6)
    assert same(a['swa'], b['swa']) and list(a['swa']) == list(a['ema']) == a['keys']
    assert same({k: v for k, v in a['ema'].items() if 'running' not in k}, b['ema'])

def test_the_loader_inside_a_distributed_one_is_left_as_it_was():
    dls = loaders()
    dls.train.epoch, dls.train.skip = 7, 2
    dl = DistributedDL(dls.train, rank=0, world_size=2)
    dl._broadcast = lambda idxs, rank: idxs
    before = dls.train.rng.getstate()

    class Counts(DataLoader):
        def before_iter(self): self.epoch += 1
    dls.train.__class__ = Counts
    first, again = net(), net()
    refresh_bn(first, dl, 5)
    assert (dls.train.epoch, dls.train.skip) == (7, 2) and dls.train.rng.getstate() == before
    refresh_bn(again, dl, 5)
    assert same(weights(first), weights(again))

# --- the plain weights

@pytest.mark.parametrize('workers', [0, 2])
def test_plain_weights_do_not_know_of_averages(workers):
    def train(cbs):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        model = nn.Sequential(*net(), nn.Dropout(.2))
        return weights(fit(learner(cbs, model, loaders(workers), RAdam), 4).model), random.random(), np.random.rand(), torch.rand(1).item()
    one, two = train([SWA(.5), EMA()]), train([])
    assert same(one[0], two[0]) and one[1:] == two[1:]

def test_a_constant_rate_does_change_them():
    assert not same(weights(fit(learner([SWA(.5, lr=.01)]), 4).model), weights(fit(learner(), 4).model))

# --- when an epoch ends early

class Raise(Callback):
    def __init__(self, at, epoch, ex): self.at, self.which, self.ex = at, epoch, ex
    def before_batch(self):
        if self.at == 'batch' and self.learn.training and self.learn.epoch == self.which and self.learn.iter == 1: raise self.ex
    def before_validate(self):
        if self.at == 'valid' and self.learn.epoch == self.which: raise self.ex

@pytest.mark.parametrize('ex, n', [(CancelEpochException(), 2), (CancelTrainException(), 3), (CancelBatchException(), 3)])
def test_only_epochs_that_ended_count(ex, n):
    swa = SWA(1)
    fit(learner([swa, Raise('batch', 2, ex)]), 4)
    assert swa.n_averaged == n and not swa.stale

def test_interrupted_before_batch_norm_was_measured():
    swa = SWA(1)
    learn = learner([swa, Raise('valid', 1, KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt): fit(learn, 3)
    with pytest.raises(PtxError, match='refresh'): _ = swa.model
    state = swa.state_dict()
    assert swa.refresh() == 4 and swa.refresh() == 0
    other = SWA(1)
    learner([other]).create_opt()
    other.load_state_dict(state)
    assert other.stale and other.refresh(loaders().train) == 4 and same(weights(other.model), weights(swa.model))

def test_an_interrupted_pass_leaves_momentum_and_mode():
    def torn():
        yield pictures()[:4]
        raise KeyboardInterrupt
    m = net().eval()
    with pytest.raises(KeyboardInterrupt): refresh_bn(m, torn())
    assert m[1].momentum == .1 and not any(o.training for o in m.modules())

def test_an_error_leaves_the_plain_network_and_no_guard():
    learn = learner([SWA(0), bad := Raise('valid', 0, ValueError('broken'))])
    plain = learn.model
    with pytest.raises(ValueError, match='broken'): fit(learn, 2)
    assert learn.model is plain
    learn.remove_cb(bad)
    with learn.no_bar(): learn.validate()
    assert learn.model is plain and '_do_epoch_validate' not in vars(learn)

# --- steps

class Overflow(Callback):
    "Cancels every other step, as a scaler does when half precision overflows"
    order = 10
    def before_step(self):
        if self.learn.train_iter % 2: raise CancelStepException

def test_ema_counts_steps_that_were_taken():
    ema = EMA()
    fit(learner([ema, Overflow()]), 2)
    assert ema.n_averaged == 4

def test_ema_without_warmup_and_a_decay_of_zero():
    ema = EMA(0., warmup=0)
    learn = fit(learner([ema]), 2)
    assert same(weights(ema.model), weights(learn.model))
    slow = EMA(.99, warmup=0)
    kept = []
    fit(learner([slow, Callback(after_batch=lambda cb: cb.learn.training and kept.append(weights(cb.learn.model)))]), 2)
    want = kept[0]['0.weight'].double()
    for w in kept[1:]: want = .99*want+.01*w['0.weight']
    torch.testing.assert_close(slow.model[0].weight, want.float(), rtol=1e-5, atol=1e-7)

def test_bfloat16_on_the_cpu():
    class Half(Callback):
        order = 10
        def before_batch(self):
            self.auto = torch.autocast('cpu', torch.bfloat16)
            self.auto.__enter__()
        def after_pred(self): self.learn.pred = self.learn.pred.float()
        def after_loss(self): self.auto.__exit__(None, None, None)
    swa, ema = SWA(0), EMA()
    fit(learner([swa, ema, Half()]), 2)
    assert all(v.dtype in (torch.float32, torch.int64) for m in (swa.model, ema.model) for v in m.state_dict().values())

# --- networks

@pytest.mark.parametrize('name', ['hyperunet:aux=True,deep_supervision=True,checkpoint=True', 'fastai_unet', 'segformer'])
def test_models_can_be_averaged(name):
    "Networks with side outputs, with hooks, and with a transformer's decoder"
    if name in SMP: pytest.importorskip('segmentation_models_pytorch')
    with torch.random.fork_rng(devices=[]): m = xray_model(name, 'mobilenetv3_small_050')
    x = torch.randn(8, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    dls = DataLoaders(*[DataLoader([(a, (a > 0).float()) for a in x], bs=4)]*2)
    swa, ema = SWA(0), EMA()
    learn = Learner(dls, m, loss_func=lambda p, y: nn.functional.binary_cross_entropy_with_logits(p[0] if isinstance(p, tuple) else p, y),
        opt_func=SGD, cbs=[swa, ema])
    with warnings.catch_warnings():
        warnings.simplefilter('error')   # fastai warns of names that hide a learner's or a network's
        fit(learn, 2, 1e-3)
    assert swa.n_averaged == 2 and ema.n_averaged == 4
    with torch.no_grad():
        for o in (swa.model, ema.model): assert o(x[:1]).shape == (1, 1, 64, 64) and o(x[:1]).isfinite().all()
    assert list(swa.model.state_dict()) == list(learn.model.state_dict())

def test_no_batch_norm_no_pass():
    swa = SWA(0)
    fit(learner([swa], net(norm=lambda n: nn.GroupNorm(2, n))), 2)
    swa.stale = True
    assert swa.refresh([None]) == 0   # would fail on this loader

def test_frozen_layers_and_frozen_batch_norm():
    class Freeze(Callback):
        def before_train(self): self.learn.model[1].eval()
    m = net()
    for p in m[:2].parameters(): p.requires_grad_(False)
    before, swa = weights(m), SWA(0)
    fit(learner([swa, Freeze()], m), 2)
    after = swa.model.state_dict()
    assert (all(torch.equal(after[k], v) for k, v in before.items() if not k.startswith('3.'))
        and not torch.equal(after['3.weight'], before['3.weight']))

def test_a_compiled_module_is_opened():
    class Wrapped(nn.Module):
        def __init__(self, m):
            super().__init__()
            self._orig_mod = m
        def forward(self, x): return self._orig_mod(x)
    swa, ema = SWA(0), EMA()
    fit(learner([swa, ema], Wrapped(net())), 2)
    for cb in (swa, ema): assert list(cb.model.state_dict()) == list(net().state_dict())

# --- state

@pytest.mark.parametrize('make', [lambda: SWA(0), EMA], ids=['SWA', 'EMA'])
def test_state(make):
    cb = make()
    assert cb.state_dict()['n'] == 0 and not cb.ready
    learn = fit(learner([cb]), 2)
    state = cb.state_dict()
    kept = deepcopy(state)
    fit(learn, 1)
    assert all(torch.equal(v, kept['mean'][k]) for k, v in state['mean'].items())   # training on does not change what was saved
    other = make()
    learner([other], net(seed=1))
    other.load_state_dict(state)
    assert other.n_averaged == state['n']
    with pytest.raises(PtxError, match='another model'):
        learner([bad := make()], nn.Sequential(nn.Conv2d(1, 1, 3, padding=1)))
        bad.load_state_dict(state)
    other.load_state_dict({'n': 0, 'mean': {}})
    assert not other.ready

def test_ema_goes_on_when_its_state_comes_after_training_began():
    first, ema = EMA(), EMA()
    fit(learner([first]), 1)
    learn = learner([ema, Callback(before_train=lambda cb: ema.n_averaged or ema.load_state_dict(first.state_dict()))])
    fit(learn, 1)
    assert ema.n_averaged == 8

# --- the plan of a training

@pytest.mark.parametrize('start, plan, n', [(.75, (0, 12), 0), (.75, (6, 12), 1), (.75, (8, 12), 3), (.29, (28, 100), 3), (9, (8, 12), 3),
    (.5, (0, 4), 2), (0, (0, 4), 4), (.99, (0, 4), 1)])
def test_start(start, plan, n):
    swa = SWA(start)
    learn = learner([swa])
    learn.plan = plan
    fit(learn, 4)
    assert swa.n_averaged == n

def test_one_epoch_is_enough():
    swa = SWA()
    learn = fit(learner([swa]), 1)
    assert (swa.n_averaged == 1
        and same({k: v for k, v in weights(swa.model).items() if 'running' not in k and 'num' not in k}, weights(learn.model)))

def test_stopped_early_is_said():
    class Stop(Callback):
        def before_epoch(self):
            from fastai.callback.core import CancelFitException
            if self.epoch == 1: raise CancelFitException
    with pytest.warns(PtxNotice, match='stopped before SWA began'): fit(learner([SWA(), Stop()]), 8)
    with warnings.catch_warnings():
        warnings.simplefilter('error', PtxNotice)
        fit(learner([SWA(0), Stop()]), 8)

def test_the_rate_wins_over_a_schedule_in_every_fit():
    rates = []
    note = Callback(before_step=lambda cb: rates.append(cb.learn.opt.hypers[-1]['lr']))
    learn = learner([SWA(.5, lr=.05), note])
    with learn.no_bar(), learn.no_logging():
        for done in (0, 4):
            learn.plan = (done, 8)
            learn.fit_one_cycle(4, .5)
    assert rates[16:] == [.05]*16 and .05 not in rates[:16]

# --- files

def test_average_of_one_file_is_the_file(tmp_path):
    from safetensors.torch import save_file
    save_file(net().state_dict(), tmp_path/'a.safetensors')
    assert same(average_files([tmp_path/'a.safetensors']*3), net().state_dict())
    state = average_files([tmp_path/'a.safetensors'])
    assert {v.dtype for v in state.values()} == {torch.float32, torch.int64}
