"Training as a whole: recipes and the command line, killed and continued, alone and in two processes, and everything that can go wrong"
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, ok, ptx
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from safetensors.torch import load_file

from pneumothorax import cli
from pneumothorax import train as t
from pneumothorax.cache import prepare
from pneumothorax.callbacks import DivergedError
from pneumothorax.crossval import cross_validate
from pneumothorax.folds import FoldError, make_folds, save_folds
from pneumothorax.learner import load_run, read_run
from pneumothorax.records import RunError
from pneumothorax.rle import PtxError
from pneumothorax.siim import PtxNotice, siim_train
from pneumothorax.states import CheckpointError, last_state, read_state, write_state

pytestmark = pytest.mark.usefixtures('one_thread')
KW = {'size': 64, 'bs': 4, 'epochs': 2, 'encoder': 'mobilenetv3_small_050', 'weights': 'none', 'workers': 0, 'progress': False, 'valid': .5}
SCRIPTS = Path(__file__).parent
BIN = Path(sys.executable).parent

def weights(run): return {f.name: f.read_bytes() for f in run.glob('*.safetensors')}

# --- recipes

def test_command_has_all_fields_of_a_recipe():
    "Under their names, and with the words of the recipe's table at hand"
    given = set(inspect.signature(cli.ptx_train).parameters)
    assert set(t.FIELDS) <= given
    own = set(inspect.signature(t.train).parameters)-{'changes', 'progress', 'sync_bn'}
    assert given-set(t.FIELDS)-own == {'show', 'folds', 'fold'} and own <= given

@pytest.mark.parametrize('name', t.RECIPES)
def test_show_prints_every_field_and_trains_nothing(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.ptx_train(recipe=name, show=True)
    out = capsys.readouterr().out
    assert all(re.search(rf'^[* ] {f} ', out, re.MULTILINE) for f in t.FIELDS) and t.RECIPES[name].source in out
    assert not list(tmp_path.iterdir())

def test_show_from_the_command_line():
    out = ok('ptx_train', '--recipe', 'progressive', '--size', '64,128', '--show').stdout
    assert re.search(r'^\* size +64,128$', out, re.MULTILINE) and re.search(r'^2 +128 +4 +4 ', out, re.MULTILINE)

@pytest.mark.parametrize('bad', [{'size': '64,x'}, {'epochs': '0'}, {'lr': '-1'}, {'freeze': '-1'}, {'clip': float('nan')}, {'swa': 1.5},
    {'ema': -.1}, {'opt': 'adan'}, {'sampling': 'sliding:2'}, {'swa_cycle': 2, 'swa': .5}, {'swa_lr': 1e-3}, {'schedule': 'cosine:3'},
    {'precision': 'fp8'}, {'monitor': 'dise', 'patience': 1}, {'smooth': 1.}, {'bs': []}, {'smooth': .1, 'loss': 'dice'}])
def test_values_that_cannot_be(bad, phantoms, tmp_path):
    with patch.object(t, 'xray_dls', None), pytest.raises(PtxError, match=next(iter(bad))): t.train(phantoms, tmp_path/'r', **{**KW, **bad})
    assert not (tmp_path/'r').exists()

# --- killed and continued

@pytest.fixture(scope='module')
def killed(phantoms, tmp_path_factory):
    "What tests/killed.py found"
    out = tmp_path_factory.mktemp('killed')
    p = subprocess.run([sys.executable, '-W', 'ignore', SCRIPTS/'killed.py', phantoms, out], capture_output=True, text=True, check=False)
    assert p.returncode == 0, p.stderr[-3000:]
    return json.loads(p.stdout.splitlines()[-1])

def test_killed_at_any_moment_it_ends_with_the_same_bits(killed):
    assert len(killed['result']) == 7
    for moment, r in killed['result'].items(): assert r['kills'] > 0 and r['differ'] == [], moment
    assert {'model.safetensors', 'model-swa.safetensors', 'model-ema.safetensors', 'model-avg.safetensors',
        'run.json'} <= set(killed['files'])
    assert not [f for f in killed['files'] if f.startswith('checkpoint') or f.endswith('.part')]

def start(args): return subprocess.Popen([BIN/'ptx_train', *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def until(seen, p, secs=120):
    "Wait for something, as long as the process lives"
    end = time.monotonic()+secs
    while not seen():
        assert p.poll() is None and time.monotonic() < end, p.communicate()
        time.sleep(.02)

def test_ctrl_c_then_kill_then_to_the_end(phantoms, tmp_path, monkeypatch):
    "The same command three times: interrupted, killed, finished; and the weights of one that nobody disturbed"
    monkeypatch.setenv('OMP_NUM_THREADS', '1')   # as many as here: sums depend on it
    args = [phantoms, *TINY, '--epochs', 6, '--valid', .5, '--every', 1, '--ema', .9]
    run = tmp_path/'run'
    p = start([*args, '--out', run])
    until((run/'overlays'/'epoch-000.png').exists, p)
    p.send_signal(signal.SIGINT)
    assert p.wait(60) == 130
    said = p.communicate()[1].strip().splitlines()
    assert (said[-1].startswith('interrupted; the weights after') and 'the same ptx_train again' in said[-1]
        and 'Traceback' not in '\n'.join(said))
    before = last_state(run)
    assert before['epochs'] >= 1
    with pytest.warns(PtxNotice, match=r'of 6 epochs'): load_run(run)   # usable as it is
    p = start([*args, '--out', run])
    until(lambda: (run/'overlays'/f'epoch-{before["epochs"]:03}.png').exists() or (run/'run.json').exists(), p)
    p.kill()
    p.communicate()
    ok('ptx_train', *args, '--out', run)
    t.train(phantoms, tmp_path/'whole', **{**KW, 'epochs': 6, 'ema': .9})
    assert weights(run) == weights(tmp_path/'whole')
    same = [pd.read_csv(r/'history.csv').drop(columns='secs') for r in (run, tmp_path/'whole')]
    np.testing.assert_array_equal(*same)
    assert len(same[0]) == 6

def test_workers_and_earlier_draws_change_nothing(phantoms, tmp_path):
    t.train(phantoms, tmp_path/'a', **KW)
    set_seed(99)
    torch.rand(7)
    t.train(phantoms, tmp_path/'b', **{**KW, 'workers': 2})
    assert weights(tmp_path/'a') == weights(tmp_path/'b')
    t.train(phantoms, tmp_path/'c', **KW, seed=1)
    assert weights(tmp_path/'a') != weights(tmp_path/'c')

class Stop(Callback):
    "Raise once, in the given epoch"
    order = 200
    def __init__(self, epoch, what): self.at, self.what = epoch, what
    def before_train(self):
        if self.epoch == self.at: raise self.what

def broken_off(phantoms, out, epoch=1, **kw):
    "A training that stops before an epoch"
    usual = t.recipe_callbacks
    with (patch.object(t, 'recipe_callbacks', lambda *a: [*usual(*a), Stop(epoch, RuntimeError('power cut'))]),
            pytest.raises(RuntimeError, match='power cut')):
        t.train(phantoms, out, **{**KW, **kw})
    return out

def test_damaged_checkpoint_is_noticed_and_the_one_before_taken(phantoms, tmp_path):
    run = broken_off(phantoms, tmp_path/'r', 2, epochs=3)
    t.train(phantoms, tmp_path/'whole', **{**KW, 'epochs': 3})
    raw = bytearray((run/'checkpoint.pt').read_bytes())
    raw[len(raw)//2] ^= 8
    (run/'checkpoint.pt').write_bytes(raw)
    read_state(run/'checkpoint.prev.pt')
    with pytest.warns(PtxNotice, match='damaged'): t.train(phantoms, run, **{**KW, 'epochs': 3})
    assert weights(run) == weights(tmp_path/'whole')

def test_damaged_checkpoint_does_not_take_the_place_of_the_sound_one(tmp_path):
    "Killed between the two renames of the next one"
    for e in range(2): write_state({'epoch': e}, tmp_path/'checkpoint.pt')
    (tmp_path/'checkpoint.pt').write_bytes(b'damaged')
    with pytest.warns(PtxNotice, match='damaged'): assert last_state(tmp_path)['epoch'] == 0
    real = os.replace
    def killed(a, b):
        if Path(b).name == 'checkpoint.pt': raise KeyboardInterrupt
        real(a, b)
    with patch('os.replace', killed), pytest.raises(KeyboardInterrupt): write_state({'epoch': 1}, tmp_path/'checkpoint.pt')
    assert last_state(tmp_path)['epoch'] == 0

def test_killed_before_a_worse_epoch_is_removed(phantoms, tmp_path):
    "The mean of the best is over as many as it would be"
    kw = {'epochs': 3, 'keep': 1, 'monitor': 'train_loss'}
    t.train(phantoms, tmp_path/'whole', **{**KW, **kw})
    epochs = broken_off(phantoms, tmp_path/'r', 2, **kw)/'epochs'
    kept, = epochs.iterdir()
    (epochs/f'epoch-00{1-int(kept.stem[-1])}.safetensors').write_bytes(kept.read_bytes())
    t.train(phantoms, tmp_path/'r', **{**KW, **kw})
    assert len(list(epochs.iterdir())) == 1
    assert weights(tmp_path/'r') == weights(tmp_path/'whole')

def test_full_disk_leaves_no_half_checkpoint(tmp_path):
    with patch('os.fsync', side_effect=OSError(28, 'No space left on device')), pytest.raises(PtxError, match='full'):
        write_state({'epoch': 1}, tmp_path/'checkpoint.pt')
    assert not list(tmp_path.iterdir())

def test_changed_images_are_refused(phantoms, tmp_path):
    "One more held back than before"
    data = siim_train(phantoms)
    broken_off(data, tmp_path/'r')
    data.loc[len(data)] = {**data.iloc[0].to_dict(), 'ImageId': 'one.more'}
    with pytest.raises(RunError, match='fresh=True'): t.train(data, tmp_path/'r', **KW)
    same = siim_train(phantoms)
    same.loc[0, 'has_ptx'] = not same.has_ptx[0]
    with pytest.raises(RunError, match=r'labels changed since.*fresh=True'): t.train(same, tmp_path/'r', **KW)

def test_both_damaged_is_an_error_and_fresh_begins_anew(phantoms, tmp_path):
    run = broken_off(phantoms, tmp_path/'r')
    for f in run.glob('checkpoint*.pt'): f.write_bytes(f.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match='fresh=True'): t.train(phantoms, run, **KW)
    t.train(phantoms, run, **KW, fresh=True)
    assert read_run(run)['final']

def test_another_configuration_is_refused(phantoms, tmp_path):
    run = broken_off(phantoms, tmp_path/'r')
    with pytest.raises(RunError, match=r'lr=0\.002 \(now 0\.001\).*fresh=True'): t.train(phantoms, run, **{**KW, 'lr': 1e-3})
    with pytest.raises(RunError, match='seed=0 .now 5'): t.train(phantoms, run, **KW, seed=5)
    state = last_state(run)
    del state['callbacks']['Seeded']
    write_state(state, run/'checkpoint.pt')
    with pytest.raises(CheckpointError, match='Seeded'): t.train(phantoms, run, **KW)

def test_full_disk_keeps_the_last_good_checkpoint(phantoms, tmp_path):
    "It is full when the second checkpoint is written; with room again, the same command goes on"
    real, calls = os.fsync, []
    def full(fd):
        calls.append(fd)
        if len(calls) == 2: raise OSError(28, 'No space left on device')
        return real(fd)
    with patch('os.fsync', full), pytest.raises(PtxError, match='disk is full.*start the same again'): t.train(phantoms, tmp_path/'r', **KW)
    assert last_state(tmp_path/'r')['epochs'] == 1
    t.train(phantoms, tmp_path/'r', **KW)
    t.train(phantoms, tmp_path/'whole', **KW)
    assert weights(tmp_path/'r') == weights(tmp_path/'whole')

# --- what goes wrong inside

class Poison(Callback):
    "The network's output becomes NaN in the second epoch"
    order = 0
    def after_pred(self):
        if self.training and self.epoch == 1: self.learn.pred = self.pred*float('nan')

def test_nan_names_the_images_and_keeps_good_weights(phantoms, tmp_path):
    usual = t.recipe_callbacks
    with patch.object(t, 'recipe_callbacks', lambda *a: [*usual(*a), Poison()]), pytest.raises(DivergedError) as e:
        t.train(phantoms, tmp_path/'r', **KW)
    named = re.findall(r'[\d.]{20,}|phantom[-\w]*', str(e.value))
    ids = set(siim_train(phantoms).ImageId)
    assert any(i in str(e.value) for i in ids), (str(e.value), named)
    assert (f'the weights after 1 epoch are in {tmp_path}/r' in str(e.value) and 'predict_maps' in str(e.value)
        and 'Exception occured' not in str(e.value))
    with pytest.warns(PtxNotice, match='1 of 2 epochs'): model, _ = load_run(tmp_path/'r')
    assert all(p.isfinite().all() for p in model.parameters())

def test_batch_larger_than_the_data_trains_on_all_of_it(phantoms, tmp_path):
    "Plainly sampled, a batch is at most the data; a share of positives that leaves less than a batch is an error"
    with pytest.warns(PtxNotice, match='6, not 500'): learn = t.train(phantoms, tmp_path/'r', **{**KW, 'bs': 500, 'epochs': 1})
    assert learn.dls.train.bs == learn.dls.xray['n_train'] == 6
    with pytest.raises(PtxError, match='bs=6.*smaller'): t.train(phantoms, tmp_path/'s', **{**KW, 'bs': 500, 'sampling': 'share:0.9'})

def test_early_stop_ends_with_a_complete_run(phantoms, tmp_path):
    t.train(phantoms, tmp_path/'r', **{**KW, 'epochs': 9, 'patience': 1, 'lr': 1e-9, 'monitor': 'dice', 'keep': 5})
    r = read_run(tmp_path/'r')
    n = len(pd.read_csv(tmp_path/'r'/'history.csv'))
    assert 1 < n < 9 and r['use'] == 'avg' and len(list((tmp_path/'r'/'epochs').iterdir())) == min(n, 5)

def test_early_stop_in_the_first_stage_ends_the_training(phantoms, tmp_path):
    "The run is recorded at the size that it was trained at; it is said, once; and so it is after a restart"
    kw = {'epochs': [9, 2], 'size': [32, 64], 'patience': 1, 'lr': 1e-9, 'swa': .95, 'keep': 1}
    with pytest.warns(PtxNotice) as said: t.train(phantoms, tmp_path/'r', **{**KW, **kw})
    said = [str(w.message) for w in said if issubclass(w.category, PtxNotice)]
    assert (sum('stopped early: after epoch 2 of 11, since dice was no better for 1 epoch' in s for s in said) == 1
        and sum('before SWA began' in s for s in said) == 1)
    assert read_run(tmp_path/'r')['data']['size'] == 32 and pd.read_csv(tmp_path/'r'/'history.csv')['size'].tolist() == [32, 32]
    with patch.object(t, 'save_run', side_effect=RuntimeError('power cut')), pytest.raises(RuntimeError, match='power cut'):
        t.train(phantoms, tmp_path/'s', **{**KW, **kw})
    t.train(phantoms, tmp_path/'s', **{**KW, **kw})
    assert weights(tmp_path/'s') == weights(tmp_path/'r')

def test_weights_that_were_validated_come_before_the_best_epochs(phantoms, tmp_path):
    t.train(phantoms, tmp_path/'r', **{**KW, 'epochs': 1, 'keep': 1, 'ema': .9})
    assert read_run(tmp_path/'r')['use'] == 'ema'

def test_a_score_without_images_cannot_choose(phantoms, tmp_path):
    data = siim_train(phantoms)
    none = data.ImageId[~data.has_ptx].head(3).tolist()
    with pytest.raises(PtxError, match='monitor=dice_pos: no image of 3 held back'):
        t.train(phantoms, tmp_path/'r', **{**KW, 'valid': none, 'keep': 1}, monitor='dice_pos')
    with pytest.raises(PtxError, match='keep=1, patience=2: .*valid=0 holds none back; give 0 there'):
        t.train(phantoms, tmp_path/'r', **{**KW, 'valid': 0, 'keep': 1, 'patience': 2})
    learn = t.train(phantoms, tmp_path/'r', **{**KW, 'epochs': 1, 'valid': none, 'keep': 1})
    learn.recorder.values = [[1., float('nan'), 1., 1., 1.]]
    best = learn.checkpoint.best
    best.monitor, rows = 'valid_loss', list(best.rows)
    assert best.update(learn, 7) == [] and best.rows == rows

def test_fixed_encoder_is_fixed_in_its_stage_alone(phantoms, tmp_path):
    seen = []
    class Look(Callback):
        order = 200
        def before_fit(self): seen.append(np.mean([p.requires_grad for p in self.learn.model.encoder.parameters()]))
    usual = t.recipe_callbacks
    with patch.object(t, 'recipe_callbacks', lambda *a: [*usual(*a), Look()]):
        t.train(phantoms, tmp_path/'r', **{**KW, 'epochs': [1, 1], 'freeze': [1, 0]})
    assert seen[0] < 1 and seen[1] == 1

def test_optimiser_is_reset_or_kept_between_stages(phantoms, tmp_path):
    steps = {keep: t.train(phantoms, tmp_path/str(keep), **{**KW, 'epochs': [2, 2]}, keep_opt=keep).opt for keep in (False, True)}
    count = {k: max(s.get('step', 0) for s in o.state.values()) for k, o in steps.items()}
    assert count[True] == 2*count[False] > 0

def test_mixed_precision_on_the_cpu(phantoms, tmp_path):
    a, b = (t.train(phantoms, tmp_path/p, **{**KW, 'epochs': 1}, precision=p) for p in ('full', 'mixed'))
    losses = [x.recorder.values[-1][0] for x in (a, b)]
    assert losses[0] != losses[1] and abs(losses[0]-losses[1]) < .05

@pytest.mark.slow
def test_compiled_training_is_close_and_can_be_averaged(phantoms, tmp_path):
    a, b = (t.train(phantoms, tmp_path/str(c), **{**KW, 'epochs': 1}, ema=.9, compile=c) for c in (False, True))
    assert abs(a.recorder.values[-1][1]-b.recorder.values[-1][1]) < 1e-3
    load_run(tmp_path/'True')

# --- folds

def test_folds_from_the_command_line(phantoms, tmp_path):
    save_folds(make_folds(siim_train(phantoms), n=2), tmp_path/'folds.csv')
    args = [phantoms, *TINY, '--folds', tmp_path/'folds.csv', '--out', tmp_path/'cv']
    p = ok('ptx_train', *args, '--fold', 1)
    assert 'fold is missing' in p.stderr and not (tmp_path/'cv'/'summary.csv').exists()
    p = ok('ptx_train', *args)
    assert '95 % intervals by patient' in p.stdout
    s = pd.read_csv(tmp_path/'cv'/'summary.csv', dtype={'fold': str})
    assert s.fold.tolist() == ['0', '1', 'all'] and s.n.tolist() == [6, 6, 12]
    ok('ptx_submit', tmp_path/'cv'/'oof', '--out', tmp_path/'oof.csv')
    assert len(pd.read_csv(tmp_path/'oof.csv')) == 12
    p = ptx('ptx_train', *args, '--lr', '1e-4')
    assert p.returncode == 1 and '--lr 0.002 (now 0.0001)' in p.stderr and 'Traceback' not in p.stderr

@pytest.mark.parametrize(('args', 'why'), [(['--fold', 1], 'name it with --folds'),
    (['--folds', 'f.csv', '--valid', .3], 'leave one of the two out')])
def test_folds_and_a_share_are_not_ignored(phantoms, tmp_path, args, why):
    (f := tmp_path/'f.csv').write_text('ImageId,fold\n')
    p = ptx('ptx_train', phantoms, *TINY, *[f if a == 'f.csv' else a for a in args], '--out', tmp_path/'r')
    assert p.returncode == 1 and why in p.stderr and not (tmp_path/'r').exists()

def test_folds_that_do_not_match(phantoms, tmp_path):
    f = make_folds(siim_train(phantoms), n=2)
    with pytest.raises(FoldError, match='no fold'):
        cross_validate(phantoms, tmp_path/'cv', f[1:], **{k: v for k, v in KW.items() if k != 'valid'})

# --- two processes

def launch(n, *args):
    "ptx_train in several processes, as `accelerate launch` starts them"
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'COLUMNS': '400'}
    return subprocess.run([sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', str(n),
        '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0',
        '--no_python', BIN/'ptx_train', *map(str, args)], capture_output=True, text=True, check=False, env=env, timeout=240)

def test_two_processes_make_the_run_of_one(phantoms, tmp_path):
    "The same losses to 1e-4 and the same metrics, one run folder, said once"
    args = [phantoms, *TINY, '--epochs', 2, '--bs', 4, '--valid', .5, '--augment', 0, '--sampling', 'sliding:0.6,0.5', '--swa', .5,
        '--keep', 1, '--opt', 'radam']     # whose first steps are not divided: Adam makes whole steps of gradients that are rounding alone
    p = launch(2, *args, '--out', tmp_path/'two')
    assert p.returncode == 0, p.stdout[-1500:]+p.stderr[-3000:]
    assert p.stdout.count('run in ') == 1 and p.stdout.count('epoch 1/2') == 1
    ok('ptx_train', *args, '--out', tmp_path/'one')
    one, two = (pd.read_csv(tmp_path/k/'history.csv') for k in ('one', 'two'))
    np.testing.assert_allclose(two[['train_loss', 'valid_loss']], one[['train_loss', 'valid_loss']], atol=1e-4)
    np.testing.assert_array_equal(two[['dice', 'dice_pos', 'dice_neg', 'lr']], one[['dice', 'dice_pos', 'dice_neg', 'lr']])
    assert {f.name for f in (tmp_path/'two').iterdir()} == {f.name for f in (tmp_path/'one').iterdir()}
    for which in ('plain', 'swa', 'avg'):
        for a, b in zip(*(load_run(tmp_path/k, which=which)[0].state_dict().values() for k in ('one', 'two'))):
            if a.is_floating_point():
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)   # counts of batches are those of all processes

def test_a_rate_is_not_searched_by_two_processes(tmp_path):
    "Each would find its own, since what is drawn differs"
    with patch.object(t, 'join_processes', lambda: 2), pytest.raises(PtxError, match='lr=find: each process'):
        t.train(tmp_path, tmp_path/'r', **{**KW, 'lr': 'find'})

def test_two_processes_and_a_batch_that_cannot_be_shared(phantoms, tmp_path):
    p = launch(2, phantoms, *TINY, '--bs', 3, '--out', tmp_path/'r')
    assert p.returncode != 0 and 'share evenly' in p.stderr

# --- a training and what comes after it

def all_files(run): return {f.relative_to(run): f.read_bytes() for f in run.rglob('*') if f.is_file()}

def afterwards(learn):
    "What a user does with a learner that `train` returned"
    with learn.no_bar(), learn.no_logging():
        learn.validate()
        learn.get_preds()
        learn.show_results(max_n=1)
        learn.lr_find(num_it=2, show_plot=False, suggest_funcs=None)
        learn.fit(1)

@pytest.mark.parametrize('kw', [{}, {'keep': 1, 'ema': .9, 'swa': .4, 'patience': 5, 'monitor': 'valid_loss'}], ids=['plain', 'averages'])
def test_a_finished_run_is_not_written_into(kw, phantoms, tmp_path):
    "Whatever its learner does afterwards; and what the callbacks know can still be asked"
    learn = t.train(phantoms, tmp_path/'r', **{**KW, **kw})
    before = all_files(tmp_path/'r')
    assert ([r['epoch'] for r in learn.watch.rows] == [0, 1]
        and not [c for c in learn.cbs if type(c).__name__ in ('Watch', 'Checkpoint', 'EMA', 'SWA', 'EarlyStop')])
    afterwards(learn)
    assert all_files(tmp_path/'r') == before and len(learn.watch.rows) == 2

def test_a_stopped_training_takes_all_steps(phantoms, tmp_path):
    "After its learner was validated and trained on by hand, the resumed one is still at the step where it was stopped"
    kw = {**KW, 'epochs': 6, 'bs': 2}
    with pytest.warns(PtxNotice, match='stopped for want of time'): learn = t.train(phantoms, tmp_path/'r', max_hours=1e-9, **kw)
    state, before = read_state(tmp_path/'r'/'checkpoint.pt'), all_files(tmp_path/'r')
    assert (state['epoch'], state['step']) == (0, 1)
    afterwards(learn)
    assert all_files(tmp_path/'r') == before
    assert t.train(phantoms, tmp_path/'r', **kw).watch.steps == 18
    assert t.train(phantoms, tmp_path/'whole', **kw).watch.steps == 18
    assert weights(tmp_path/'r') == weights(tmp_path/'whole')

@pytest.mark.parametrize('kw, network', [({'ema': .7}, ['ema']*3), ({'swa': .4}, ['plain', 'swa', 'swa']),
    ({'ema': .7, 'swa': .4}, ['ema', 'swa', 'swa']), ({}, ['plain']*3)], ids=['ema', 'swa', 'both', 'plain'])
def test_the_file_of_an_epoch_holds_the_network_that_was_scored(kw, network, phantoms, tmp_path):
    learn = t.train(phantoms, tmp_path/'r', **{**KW, 'epochs': 3, 'lr': 5e-3, 'keep': 3, 'monitor': 'valid_loss', **kw})
    h = pd.read_csv(tmp_path/'r'/'history.csv')
    assert h.network.tolist() == network
    for row in h.itertuples():
        learn.model.load_state_dict(load_file(tmp_path/'r'/'epochs'/f'epoch-{row.epoch:03}.safetensors'))
        with learn.no_bar(), learn.no_logging(): loss, dice, pos, neg = learn.validate()
        np.testing.assert_allclose([loss, dice, pos, neg], [row.valid_loss, row.dice, row.dice_pos, row.dice_neg], rtol=1e-5, atol=1e-6)

def test_a_training_that_outlined_nothing_says_what_to_try(phantoms, tmp_path):
    with pytest.warns(PtxNotice, match=r'1 training outlined nothing: .*Dice on positives stayed 0 in 2 epochs, '
            r'largest probability 0\.\d+; '
            r'try more images with a pneumothorax \(so far \d+ of 6\); more epochs \(so far 2 steps\); trained weights'):
        t.train(phantoms, tmp_path/'r', **{**KW, 'lr': 1e-9})

def test_a_run_knows_whether_its_radiographs_were_synthetic(phantoms, tmp_path):
    "From a folder, from a cache, from a table that says otherwise, and from the run whose weights it began with"
    said = lambda run: (read_run(run)['data']['synthetic'], read_run(run)['model']['pretrained_synthetic'])
    t.train(phantoms, tmp_path/'a', **{**KW, 'epochs': 1})
    prepare(phantoms, tmp_path/'cache', 64, workers=0, progress=False)
    t.train(tmp_path/'cache', tmp_path/'b', **{**KW, 'epochs': 1})
    assert said(tmp_path/'a') == said(tmp_path/'b') == (1., None)
    real = siim_train(phantoms).assign(synthetic=False)
    with pytest.warns(PtxNotice, match='1 training has begun with weights of synthetic radiographs, on others: .*a .*lite0'):
        t.train(real, tmp_path/'c', **{**KW, 'epochs': 1, 'weights': tmp_path/'a'})
    assert said(tmp_path/'c') == (0., 1.)
    with warnings.catch_warnings():     # neither over phantoms nor from a run that has seen others
        warnings.filterwarnings('error', message='.*begun with weights')
        t.train(phantoms, tmp_path/'e', **{**KW, 'epochs': 1, 'weights': tmp_path/'a'})
        t.train(real.drop(columns='synthetic'), tmp_path/'d', **{**KW, 'epochs': 1, 'weights': tmp_path/'c'})
    assert said(tmp_path/'d') == (None, 1.)

def test_files_have_the_mode_of_the_umask(phantoms, tmp_path):
    if os.name != 'posix': pytest.skip('no modes')
    old = os.umask(0o027)
    try: t.train(phantoms, tmp_path/'r', **{**KW, 'epochs': 1, 'keep': 1})
    finally: os.umask(old)
    assert {f.stat().st_mode & 0o777 for f in (tmp_path/'r').rglob('*') if f.is_file() and f.name != '.lock'} == {0o640}

def test_a_log_gets_lines_and_no_bar(phantoms, tmp_path, capsys):
    "One an epoch; and within a long one, one a minute"
    with patch('pneumothorax.watch.Watch.every', 0): t.train(phantoms, tmp_path/'r', **{**KW, 'bs': 2, 'progress': True})
    said = capsys.readouterr().out.splitlines()
    assert ([re.match(r'epoch \d/2  (step \d/3|64 px)', line).group(0) for line in said if 'of ' not in line]
        == [f'epoch {e}/2  {w}' for e in (1, 2) for w in ('step 1/3', 'step 2/3', 'step 3/3', '64 px')])
    assert not any('\r' in line or '█' in line for line in said)

def test_an_interrupted_training_takes_all_steps(phantoms, tmp_path):
    "Its learner is gone with the interruption; the resumed one goes through each step once"
    kw, usual = {**KW, 'epochs': 6, 'bs': 2}, t.recipe_callbacks
    with (patch.object(t, 'recipe_callbacks', lambda *a: [*usual(*a), Stop(4, KeyboardInterrupt())]),
            pytest.raises(KeyboardInterrupt, match='same `train` again')):
        t.train(phantoms, tmp_path/'r', **kw)
    assert read_state(tmp_path/'r'/'checkpoint.pt')['epochs'] == 4
    assert t.train(phantoms, tmp_path/'r', **kw).watch.steps == 18

def test_a_device_that_is_not_there(phantoms, tmp_path):
    with pytest.raises(PtxError, match='device=gpu: no such device'): t.train(phantoms, tmp_path/'r', device='gpu', **KW)
    assert not (tmp_path/'r').exists()
    assert str(t.train(phantoms, tmp_path/'r', device='cpu', **{**KW, 'epochs': 1}).dls.device) == 'cpu'
