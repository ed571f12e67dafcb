"Watching a training: several processes, other networks and loaders, what is no training, a disk that refuses"
import io
import os
import subprocess
import sys
import warnings

import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import LRFinder  # noqa: F401  lr_find is patched in by it
from fastai.learner import CancelTrainException, CancelValidException, Metric
from fastai.test_utils import synth_learner
from torch import nn

from pneumothorax.data import xray_dls
from pneumothorax.learner import xray_learner
from pneumothorax.rle import PtxError
from pneumothorax.siim import PtxNotice
from pneumothorax.watch import Watch, _say, draw_images, epoch_line, evaluating, sample_images, written

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore::FutureWarning')]

def toy(out, *cbs, **kwargs):
    "A learner of a straight line, watched"
    return synth_learner(n_trn=3, n_val=2, cbs=[Watch(out, images=0, line=False, **kwargs), *cbs], path=out)

def fit(learn, n=2):
    with learn.no_bar(), learn.no_logging(): learn.fit(n)
    return learn

def rows(out): return pd.read_csv(out/'history.csv')

def test_any_learner_has_its_table(tmp_path):
    fit(toy(tmp_path))
    assert rows(tmp_path).columns.tolist() == ['epoch', 'stage', 'size', 'network', 'train_loss', 'valid_loss', 'lr', 'secs']
    assert {f.name for f in tmp_path.iterdir()} == {'history.csv', 'history.png'}

def test_other_loaders_are_noticed(tmp_path):
    learn = synth_learner(n_trn=2, n_val=1, cbs=Watch(tmp_path, line=False))
    with pytest.warns(PtxNotice, match='not those of xray_dls'): fit(learn, 1)
    assert len(rows(tmp_path)) == 1

def test_only_the_first_process_writes_and_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('RANK', '1')
    fit(synth_learner(n_trn=2, n_val=1, cbs=Watch(tmp_path/'run', images=0)), 1)
    assert not (tmp_path/'run').exists() and not capsys.readouterr().out

def test_what_is_no_training_leaves_no_row(tmp_path):
    learn = toy(tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(show_plot=False, num_it=8)
        learn.validate()
        learn.get_preds()
    assert not any(tmp_path.glob('*.csv'))
    fit(learn, 1)
    assert len(rows(tmp_path)) == 1 and learn.watch.steps == 3

class Cancel(Callback):
    "Leave out a part of an epoch"
    def __init__(self, part): self.part = part
    def before_train(self):
        if self.part == 'train': raise CancelTrainException
    def before_validate(self):
        if self.part == 'valid': raise CancelValidException

@pytest.mark.parametrize('part', ['train', 'valid'])
def test_cancelled_parts_have_no_number(tmp_path, part):
    full, cut = rows_of(tmp_path/'full'), rows_of(tmp_path/'cut', Cancel(part))
    assert set(full)-set(cut) == {f'{part}_loss'}

def rows_of(out, *cbs):
    fit(toy(out, *cbs), 1)
    return rows(out)

def test_state_survives_a_checkpoint_and_repeated_epochs_replace_theirs(tmp_path):
    learn = fit(toy(tmp_path), 3)
    f = io.BytesIO()
    torch.save(learn.watch.state_dict(), f)
    f.seek(0)
    state = torch.load(f, weights_only=True)
    assert state['steps'] == 9 and [r['epoch'] for r in state['rows']] == [0, 1, 2]
    again = toy(tmp_path)
    again.watch.load_state_dict(state)
    again.plan = 2, 4                      # from a checkpoint one epoch older than the table
    fit(again, 2)
    assert rows(tmp_path).epoch.tolist() == [0, 1, 2, 3] and again.watch.steps == 15
    assert state['rows'][2] == learn.watch.rows[2]      # the state that was given is not changed

def test_a_second_fit_without_a_plan_is_another_training(tmp_path):
    learn = fit(toy(tmp_path), 3)
    fit(learn, 2)
    assert rows(tmp_path).epoch.tolist() == [0, 1]

def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(PtxError, match='history.png: cannot be written'): fit(toy(tmp_path/'file'), 1)
    with pytest.raises(KeyboardInterrupt), written(tmp_path/'x') as part:
        part.write_text('half')
        raise KeyboardInterrupt
    assert [f.name for f in tmp_path.iterdir()] == ['file']

LINES = ('from pneumothorax.watch import _say\nread = [_say("loss 1.000 → 0.900 "+"x"*60+" ★") for _ in range(3000)]\n'
    'import sys; sys.stderr.write(str(all(read)))')

def test_a_reader_who_leaves_does_not_stop_it():
    env = {**os.environ, 'PYTHONWARNINGS': 'ignore', 'PYTHONIOENCODING': 'ascii'}
    p = subprocess.Popen([sys.executable, '-c', LINES], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert p.stdout.readline().startswith('loss 1.000 -> 0.900') and p.stdout.readline().endswith('*\n')
    p.stdout.close()
    assert p.wait(60) == 0
    said = p.stderr.read()
    assert said.endswith('False') and 'Error' not in said

def test_the_line_of_odd_rows():
    r = {'epoch': 0, 'stage': 0, 'size': None, 'train_loss': float('nan'), 'lr': 1e-3, 'secs': 1.}
    assert epoch_line([r], 1) == 'epoch 1/1  loss nan  lr 1.0e-03  1 s'
    worse = [dict(r, epoch=i, valid_loss=v) for i, v in enumerate((.5, .6, .4, float('nan')))]
    assert [epoch_line(worse[:i], 4).endswith('★') for i in (1, 2, 3, 4)] == [False, False, True, False]
    assert _say('✓')

class Told(Metric):
    "A Dice on positives that is written down beforehand"
    name = 'dice_pos'
    def __init__(self, values): self.values = list(values)
    def reset(self): pass
    def accumulate(self, learn): pass
    @property
    def value(self): return self.values.pop(0)

@pytest.mark.parametrize(('dice', 'epoch'), [([.3, .4, .02, .01, 0, 0], 4), ([.1, .2, .3, .02, .3, .01], None),
    ([0, .01, 0, 0, 0, 0], None), ([.2, .4, .1, .08, .06, .05], None)])
def test_a_collapse_is_told_once_while_it_happens(tmp_path, dice, epoch):
    learn = synth_learner(n_trn=8, n_val=1, lr=.05, metrics=Told(dice), cbs=Watch(tmp_path, images=0, line=False), path=tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        fit(learn, len(dice))
    assert rows(tmp_path).train_loss.is_monotonic_decreasing
    said = [str(w.message) for w in told if 'collapsed' in str(w.message)]
    assert [f'epoch {epoch}' in s and 'loss=30*bce+pos_dice' in s for s in said] == [True]*(epoch is not None)

@pytest.fixture(scope='module')
def dls(phantoms): return xray_dls(phantoms, size=64, bs=2, workers=0)

def test_overlays_of_a_wrapped_network_whose_training_gives_a_tuple(dls, tmp_path):
    learn = xray_learner(dls, 'hyperunet:aux=True,deep_supervision=True', 'mobilenetv3_small_050', 'none')
    images = sample_images(dls, 3)
    plain = draw_images(learn, images)
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/meet', rank=0, world_size=1)
    try:
        learn.model = nn.parallel.DistributedDataParallel(learn.model.train())
        with evaluating(learn.model) as net: assert net is learn.model.module
        assert (draw_images(learn, images) == plain).all() and learn.model.module.training
    finally: torch.distributed.destroy_process_group()

def test_pictures_show_the_averaged_network(dls, tmp_path):
    class Full(Callback):
        "Like SWA: other weights in validation"
        order = 70
        def before_validate(self):
            self.kept = self.learn.model
            self.learn.model = Always(self.kept)
        def after_validate(self): self.learn.model = self.kept
    learn = xray_learner(dls, encoder='mobilenetv3_small_050', weights='none', cbs=[Full(), Watch(tmp_path, 2, line=False)])
    fit(learn, 1)
    import numpy as np
    from PIL import Image
    with Image.open(tmp_path/'valid.png') as im: seen = np.asarray(im)
    learn.model = Always(learn.model)
    assert (seen == draw_images(learn, sample_images(dls, 2))).all()
    assert (tmp_path/'valid.png').read_bytes() == (tmp_path/'overlays'/'epoch-000.png').read_bytes()

class Always(nn.Module):
    "A network that sees a pneumothorax everywhere"
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x): return self.net(x)*0+9.

def test_tensorboard_goes_on_in_its_folder(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    fit(toy(tmp_path, tensorboard=True), 2)
    fit(toy(tmp_path, tensorboard=True), 1)     # begun anew: what was there is forgotten
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        board = EventAccumulator(str(tmp_path/'tensorboard'), size_guidance={'scalars': 0}).Reload()
    assert [o.step for o in board.Scalars('lr')] == [1, 2, 3] and [o.step for o in board.Scalars('valid_loss')] == [3]
