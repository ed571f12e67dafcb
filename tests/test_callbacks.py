"Callbacks of a step: all of them together, in every combination, over several fits, and in two processes"
import copy
import io
import itertools
import math
import os
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback, CancelTrainException
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from scipy.stats import chi2
from torch import nn

from pneumothorax.callbacks import Accumulate, CallbackError, DivergedError, EarlyStop, GradientNoise, StopNaN, mixed_precision
from pneumothorax.optimizers import xray_optimizer

N, BS = 22, 4

def pictures(n=N, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(1, 6, 6, generator=g), torch.randn(1, 6, 6, generator=g)) for _ in range(n)]

def network(norm=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.Tanh(), nn.Conv2d(4, 1, 1))

def learner(cbs=(), bs=BS, data=None, model=None, spec='sgd:mom=0', lr=.1):
    "Two groups of parameters; the last batch is smaller"
    return Learner(DataLoaders(*[DataLoader(data or pictures(), bs=bs, num_workers=0)]*2), model or network(), loss_func=nn.MSELoss(),
        opt_func=xray_optimizer(spec), splitter=lambda m: [list(m[:2].parameters()), list(m[2:].parameters())], lr=lr, cbs=list(cbs))

def fit(learn, n=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(n)
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

def through_file(sd):
    f = io.BytesIO()
    torch.save(sd, f)
    f.seek(0)
    return torch.load(f, weights_only=True)

class Steps(Callback):
    "Gradients as the optimiser gets them"
    order = 14
    def __init__(self): self.seen = []
    def before_step(self): self.seen.append(torch.cat([p.grad.flatten() for p in self.learn.model.parameters() if p.requires_grad]).clone())

# --- all together

MATRIX = list(itertools.product((None, 8, 12), (False, True), (False, True), (None, torch.bfloat16, torch.float16), (False, True)))

def plan(acc, noise, clip, half, cls=StopNaN):
    cbs = [cls(), Steps()]
    if acc: cbs.append(Accumulate(acc))
    if noise: cbs.append(GradientNoise(eta=1e-4, seed=3))
    if clip: cbs.append(GradientClip(.05))
    if half: cbs.append(mixed_precision('cpu', half, **({'init_scale': 256.} if half == torch.float16 else {})))
    return cbs

@pytest.mark.parametrize(('acc', 'noise', 'clip', 'half', 'frozen'), MATRIX)
def test_every_combination_takes_the_steps_that_a_loop_takes(acc, noise, clip, half, frozen, one_thread):
    learn = learner(plan(acc, noise, clip, half))
    if frozen: learn.freeze_to(1)
    got = fit(learn, 2)
    # the loop: real batches of whole groups, in float32
    m = network()
    ps = [p for i, part in enumerate((m[:2], m[2:])) for p in part.parameters() if i or not frozen]
    opt, t, draw = torch.optim.SGD(ps, lr=.1), 0, GradientNoise(eta=1e-4, seed=3)
    size = (acc or BS)
    for _ in range(2):
        for i in range(0, N, size):
            x, y = (torch.stack(o) for o in zip(*pictures()[i:i+size]))
            for p in m.parameters(): p.grad = None
            nn.functional.mse_loss(m(x), y).backward()
            if clip: nn.utils.clip_grad_norm_(ps, .05)
            if noise:
                draw.t = t
                draw._add([p.grad for p in ps], draw.sigma())
            opt.step()
            t += 1
    want = torch.cat([p.detach().flatten() for p in m.parameters()])
    assert len(learn.steps.seen) == t
    if noise: assert learn.gradient_noise.t == t
    # float32 differs by the order of sums; half precision by its digits, a share of the way that was gone
    way = (want-torch.cat([p.detach().flatten() for p in network().parameters()])).norm()
    assert (got-want).norm() < {None: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[half]*max(1e-9, way)
    assert not torch.is_autocast_enabled('cpu')

@pytest.mark.parametrize('half', [None, torch.float16])
@pytest.mark.parametrize('last', ['step', 'carry'])
def test_all_state_through_a_file_between_two_epochs_ends_the_same(half, last, one_thread):
    def cbs():
        return [StopNaN(), Accumulate(12, last), GradientNoise(seed=1), GradientClip(.5), EarlyStop('valid_loss', 9),
            *([mixed_precision('cpu', half, init_scale=256.)] if half else [])]
    def states(learn): return {type(c).__name__: c.state_dict() for c in learn.cbs if hasattr(c, 'state_dict')}
    class Save(Callback):
        order = 100
        def after_epoch(self):
            if self.learn.epoch == 0:
                self.saved = through_file({'model': self.learn.model.state_dict(), 'opt': self.learn.opt.state_dict(),
                    'cbs': states(self.learn)})
    class Load(Callback):
        order = 100
        def before_fit(self):
            for c in self.learn.cbs:
                if type(c).__name__ in saved['cbs']: c.load_state_dict(saved['cbs'][type(c).__name__])
    save = Save()
    want = fit(learner([*cbs(), save], spec='radam'), 2)
    saved = save.saved
    assert saved['cbs']['Accumulate']['count'] == (10 if last == 'carry' else 0)
    learn = learner([*cbs(), Load()], spec='radam')
    learn.model.load_state_dict(saved['model'])
    learn.create_opt()
    learn.opt.load_state_dict(saved['opt'])
    assert torch.equal(fit(learn), want)

# --- accumulation

def test_an_epoch_that_is_cut_short_still_steps_once_with_its_true_count(one_thread):
    class Short(Callback):
        def after_batch(self):
            if self.learn.training and self.learn.iter == 2: raise CancelTrainException
    learn = learner([Accumulate(100), Short(), steps := Steps(), noise := GradientNoise(0)])
    got = fit(learn)
    assert len(steps.seen) == noise.t == 1
    assert torch.allclose(got, fit(learner(bs=12, data=pictures()[:12])), atol=1e-7)
    assert all(p.grad.abs().max() == 0 for p in learn.model.parameters())

def test_an_overflow_gives_up_the_whole_group_and_nothing_of_it_is_left(one_thread):
    learn = learner([Accumulate(8), GradientNoise(0), mixed_precision('cpu', torch.float16, init_scale=2.**127)])
    before = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    assert torch.equal(fit(learn), before)
    assert (learn.gradient_noise.t, learn.accumulate.count) == (0, 0)
    assert learn.xray_precision.state_dict()['scaler']['scale'] == 2.**124

def test_momentum_of_batch_norm_is_back_after_a_fit_that_broke(one_thread):
    class Fail(Callback):
        def after_batch(self): raise RuntimeError('power cut')
    learn = learner([Accumulate(16, bn_momentum=True)], model=network(norm=True))
    learn.model[1].momentum = .2
    for _ in range(2):
        with pytest.raises(RuntimeError), learn.added_cbs(Fail()): fit(learn)
        assert learn.model[1].momentum == .2*4/16
    fit(learn)
    assert learn.model[1].momentum == .2

def test_a_gradient_of_another_network_is_refused():
    d = {'n_acc': 8, 'count': 4, 'grads': {'9.weight': torch.zeros(3)}}
    with pytest.raises(CallbackError, match='9.weight'): learner([Accumulate(8)]).accumulate.load_state_dict(d)

# --- half precision

def test_a_failure_in_the_forward_pass_does_not_leave_the_next_fit_in_half_precision(one_thread):
    class Fail(Callback):
        order = 20
        def after_pred(self): raise RuntimeError('power cut')
    learn = learner([mixed_precision('cpu')])
    with pytest.raises(RuntimeError), learn.added_cbs(Fail()): fit(learn)
    fit(learn)
    assert not torch.is_autocast_enabled('cpu')

# --- numbers that are none

def test_a_bad_mask_is_named_and_the_gradient_is_gone(one_thread):
    data = [(x, y*math.inf if i == 5 else y) for i, (x, y) in enumerate(pictures())]
    learn = learner([StopNaN(), Accumulate(8)], data=data)
    with pytest.raises(DivergedError, match='mask of number 1 of the batch') as e: fit(learn)
    assert str(e.value).startswith('loss ')
    assert 'step 1' in str(e.value)
    assert all(p.grad.abs().max() == 0 for p in learn.model.parameters())

def test_the_epoch_is_that_of_the_whole_training(one_thread):
    learn = learner([StopNaN()], data=[(x*math.nan, y) for x, y in pictures(4)])
    learn.plan = (7, 9)
    with pytest.raises(DivergedError, match='epoch 7, step 0'): fit(learn)

def test_validation_may_be_infinite(one_thread):
    learn = learner([StopNaN()])
    learn.dls.valid = DataLoader([(x*math.nan, y) for x, y in pictures(4)], bs=4, num_workers=0)
    assert fit(learn).isfinite().all()

# --- when to stop

def test_a_training_that_has_stopped_stays_so_in_later_fits_and_from_a_file(one_thread):
    learn = learner([stop := EarlyStop('valid_loss', 1)], lr=0.)
    fit(learn, 5)
    assert stop.stopped
    learn.opt.set_hyper('lr', .1)
    before = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    assert torch.equal(fit(learn, 3), before)
    new = EarlyStop('valid_loss', 1)
    new.load_state_dict(through_file(stop.state_dict()))
    assert new.stopped

# --- two processes

def work(rank, port_file, out):
    "A process of two: unequal batches, accumulation, noise of each its own"
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{port_file}', rank=rank, world_size=2, timeout=timedelta(seconds=60))
    os.environ['RANK'] = str(rank)   # where fastai looks
    data = pictures()
    mine = [data[i] for i in range(N) if (i % 4 == 3) == bool(rank)][:15 if rank == 0 else 5]
    model = nn.parallel.DistributedDataParallel(network())
    def run(cbs, m):
        learn = Learner(DataLoaders(*[DataLoader(mine, bs=3 if rank == 0 else 1, num_workers=0)]*2), m, loss_func=nn.MSELoss(),
            opt_func=xray_optimizer('sgd:mom=0'), lr=.1, cbs=cbs)
        return fit(learn)
    torch.save(run([Accumulate(8)], model), Path(out)/f'acc{rank}.pt')
    for by_rank in (False, True):
        noise, grad = GradientNoise(eta=.5, gamma=0., by_rank=by_rank), torch.zeros(40_000)
        noise._add([grad], noise.sigma())
        torch.save(grad, Path(out)/f'noise{int(by_rank)}{rank}.pt')
    torch.distributed.destroy_process_group()

@pytest.fixture(scope='module')
def two():
    "Results of two processes, by name and rank"
    with tempfile.TemporaryDirectory() as d:
        torch.multiprocessing.start_processes(work, (f'{d}/meet', d), nprocs=2, start_method='fork')   # quicker by the imports
        return {f.stem: torch.load(f, weights_only=True) for f in Path(d).glob('*.pt')}

def test_two_processes_with_unequal_batches_step_like_one(two):
    order = [i for k in range(5) for i in (*[j for j in range(N) if j % 4 != 3][3*k:3*k+3], [j for j in range(N) if j % 4 == 3][k])]
    want = fit(learner(bs=8, data=[pictures()[i] for i in order]))
    assert torch.equal(two['acc0'], two['acc1'])
    assert torch.allclose(two['acc0'], want, atol=1e-6)

def test_noise_is_the_same_everywhere_and_of_the_right_size(two):
    for by_rank, variance in ((0, .5), (1, .25)):
        a, b = two[f'noise{by_rank}0'], two[f'noise{by_rank}1']
        assert torch.equal(a, b)
        lo, hi = chi2.ppf([5e-7, 1-5e-7], len(a))*variance
        assert lo < (a.double()**2).sum() < hi

def test_callbacks_can_be_copied():
    for cb in (GradientNoise(), Accumulate(), StopNaN(), EarlyStop(), mixed_precision('cpu')): assert type(copy.deepcopy(cb)) is type(cb)
