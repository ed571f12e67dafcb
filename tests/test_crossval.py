"Cross-validation without training: a network per fold that says which fold it is from"
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from torch import nn

import pneumothorax.crossval as cv
from pneumothorax.cache import prepare
from pneumothorax.crossval import cross_validate
from pneumothorax.folds import FoldError
from pneumothorax.records import FORMAT, RunError, open_maps
from pneumothorax.rle import PtxError
from pneumothorax.siim import siim_train

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore')]

class Says(nn.Module):
    "The same probability everywhere"
    def __init__(self, p): super().__init__(); self.p = p
    def forward(self, x): return torch.full_like(x, torch.logit(torch.tensor(self.p)).item())

@pytest.fixture
def trained(monkeypatch):
    "Runs without training, and how often; the network of fold k says (k+1)/10"
    calls = []
    def train(data, out, valid, seed, broken=(), made=0, **kwargs):
        calls.append(out.name)
        out.mkdir(parents=True)
        how = {'size': 32, 'fit': 'stretch', 'stats': [0, 1], 'equalize': None, 'equalize_first': False,
            'valid': [i for i in valid if i not in broken], 'broken': list(broken)}
        (out/'run.json').write_text(json.dumps({'format': FORMAT, 'args': dict(seed=seed, valid=valid, **kwargs),
            'data': how, 'made': made}))
        (out/'history.csv').write_text('epoch,dice\n0,.5\n1,.6\n')
    def load_run(run, device): return Says((int(run.name[-1])+1)/10), json.loads((run/'run.json').read_text())
    monkeypatch.setattr(cv, 'train', train)
    monkeypatch.setattr(cv, 'load_run', load_run)
    return calls

KW = {'n': 3, 'workers': 0, 'progress': False}

def test_each_image_is_predicted_by_the_run_that_has_not_seen_it(trained, phantoms, tmp_path):
    s = cross_validate(phantoms, tmp_path, epochs=2, **KW)
    folds = pd.read_csv(tmp_path/'folds.csv').set_index('ImageId').fold
    index, maps, failed = open_maps(tmp_path/'oof')
    assert sorted(trained) == ['fold-0', 'fold-1', 'fold-2'] and len(index) == len(folds) == 12 and not len(failed)
    for i, row, k in index[['ImageId', 'row', 'fold']].itertuples(index=False):
        assert folds[i] == k and (maps[row] == round(255*(k+1)/10)).all()
        assert i in json.loads((tmp_path/f'fold-{k}'/'run.json').read_text())['data']['valid']
    assert s.fold.tolist() == ['0', '1', '2', 'all'] and s.epochs.tolist() == [2, 2, 2, 6] and s.n.tolist() == [4, 4, 4, 12]
    o = pd.read_csv(tmp_path/'oof.csv')
    assert (o.columns[:6].tolist() == ['ImageId', 'fold', 'patient_id', 'has_ptx', 'dice', 'prob']
        and o.dice.tolist() == (~o.has_ptx).astype(float).tolist())
    r = json.loads((tmp_path/'summary.json').read_text())
    assert r['scores']['dice']['value'] == s.dice.iloc[-1] and r['patients_shared'] == 0 and r['n_patients'] == o.patient_id.nunique()

def test_a_cache_gives_rows_and_its_failures_are_listed(trained, phantoms, tmp_path):
    t = siim_train(phantoms)
    bad = tmp_path/'bad.dcm'
    bad.write_bytes(b'no radiograph')
    t.loc[5, 'path'] = str(bad)
    cache = prepare(t, tmp_path/'cache', 64, workers=0, progress=False)
    for data, out in ((tmp_path/'cache', tmp_path/'a'), (cache, tmp_path/'b')):
        s = cross_validate(data, out, **KW)
        index, _, failed = open_maps(out/'oof')
        assert failed.ImageId.tolist() == [t.ImageId[5]] and len(index) == 11 and s.n_failed.iloc[-1] == 1 and index.path.notna().all()

def test_folds_that_do_not_match_are_listed(trained, phantoms, tmp_path):
    ids = sorted(siim_train(phantoms).ImageId)
    good = pd.DataFrame({'ImageId': ids, 'fold': np.arange(12)%2})
    for folds, why in ((good[2:], '2 images have no fold'),
            (pd.concat([good, pd.DataFrame({'ImageId': ['stranger'], 'fold': [0]})]), 'stranger is not among'),
            (good.assign(fold=0), 'fewer than two folds'), (good.assign(fold=-1), 'not a whole number')):
        folds.to_csv(tmp_path/'folds.csv', index=False)
        for given in (folds, tmp_path/'folds.csv'):
            with pytest.raises(FoldError, match=why): cross_validate(phantoms, tmp_path/'cv', given, progress=False)
    with pytest.raises(FoldError, match='fold=5'): cross_validate(phantoms, tmp_path/'cv', good, fold=5, progress=False)
    assert not trained and not (tmp_path/'cv'/'oof').exists()

def test_patients_on_both_sides_are_noticed_and_recorded(trained, phantoms, tmp_path):
    t = siim_train(phantoms).assign(patient_id=['a', 'a', *map(str, range(10))])
    folds = pd.DataFrame({'ImageId': t.ImageId, 'fold': np.arange(12)%2})
    with pytest.warns(match='1 patient is in several folds.*: a'): cross_validate(t, tmp_path/'cv', folds, workers=0, progress=False)
    assert json.loads((tmp_path/'cv'/'summary.json').read_text())['patients_shared'] == 2/12

def test_an_interrupted_prediction_is_repeated_and_nothing_else(trained, phantoms, tmp_path, monkeypatch):
    real, seen = cv.predict_batches, []
    def stops(nets, files, *args, **kwargs):
        seen.append(len(files))
        if len(seen) == 2: raise KeyboardInterrupt
        return real(nets, files, *args, **kwargs)
    monkeypatch.setattr(cv, 'predict_batches', stops)
    with pytest.raises(KeyboardInterrupt): cross_validate(phantoms, tmp_path, **KW)
    assert not (tmp_path/'oof'/'predict.json').exists() and not (tmp_path/'oof'/'fold-1.json').exists()
    cross_validate(phantoms, tmp_path, **KW)
    assert len(seen) == 4 and trained == ['fold-0', 'fold-1', 'fold-2']   # folds 0, 1 (stopped), 1, 2
    before = (tmp_path/'oof'/'maps.npy').read_bytes()
    cross_validate(phantoms, tmp_path, **KW)
    assert len(seen) == 4 and (tmp_path/'oof'/'maps.npy').read_bytes() == before

def test_a_run_trained_anew_is_predicted_anew(trained, phantoms, tmp_path):
    cross_validate(phantoms, tmp_path, **KW)
    f = tmp_path/'fold-2'/'run.json'
    f.write_text(json.dumps({**json.loads(f.read_text()), 'made': 1}))
    maps = np.load(tmp_path/'oof'/'maps.npy', mmap_mode='r+')
    maps[:] = 0
    maps.flush()
    cross_validate(phantoms, tmp_path, **KW)
    index, maps, _ = open_maps(tmp_path/'oof')
    assert all((maps[r].max() > 0) == (k == 2) for r, k in zip(index.row, index.fold))

def test_another_configuration_is_refused(trained, phantoms, tmp_path):
    cross_validate(phantoms, tmp_path/'a', epochs=2, **KW)
    for other, why in (({'epochs': 3}, 'epochs=2 (now 3)'), ({'epochs': 2, 'lr': 1.}, 'lr=0.002 (now 1.0)'), ({}, 'epochs=2 (now 25)')):
        with pytest.raises(RunError, match=re.escape(why)): cross_validate(phantoms, tmp_path/'a', **other, **KW)
    (tmp_path/'a'/'crossval.json').unlink()     # the runs remember, too
    with pytest.raises(RunError, match=r'fold-0: holds a run with epochs=2 \(now 3\)'):
        cross_validate(phantoms, tmp_path/'a', epochs=3, **KW)
    (tmp_path/'a'/'crossval.json').unlink()
    f = tmp_path/'a'/'fold-1'/'run.json'
    r = json.loads(f.read_text())
    r['data']['valid'].pop()
    f.write_text(json.dumps(r))
    with pytest.raises(RunError, match='other images held back'): cross_validate(phantoms, tmp_path/'a', epochs=2, **KW)
    (tmp_path/'file').write_text('')
    with pytest.raises(RunError, match='a file'): cross_validate(phantoms, tmp_path/'file', **KW)
    for taken in ('valid', 'fresh'):
        with pytest.raises(PtxError, match=f'{taken}=: set by the folds'): cross_validate(phantoms, tmp_path/'b', **{taken: 1}, **KW)
    assert not (tmp_path/'b').exists()

def test_a_fold_under_way_elsewhere_is_left_alone(trained, phantoms, tmp_path):
    cross_validate(phantoms, tmp_path, fold=0, **KW)
    with FileLock(tmp_path/'.fold-1.lock'), pytest.raises(RunError, match='another process trains it'):
        cross_validate(phantoms, tmp_path, fold=1, **KW)
    with pytest.warns(match='folds are missing.*: 0|folds are missing.*: 1|fold is missing'):
        s = cross_validate(phantoms, tmp_path, fold='2', **KW)
    assert s.fold.tolist() == ['0', '2'] and not (tmp_path/'summary.csv').exists() and 'dice_lo' not in s

def test_other_processes_train_along_and_write_nothing(trained, phantoms, tmp_path, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    assert cross_validate(phantoms, tmp_path, **KW) is None
    assert trained == ['fold-0', 'fold-1', 'fold-2'] and {f.name for f in tmp_path.iterdir()} == set(trained)

def test_maps_of_another_size_are_refused(trained, phantoms, tmp_path):
    cross_validate(phantoms, tmp_path, fold=0, **KW)
    np.save(tmp_path/'oof'/'maps.npy', np.zeros((12, 64, 64), np.uint8))
    with pytest.raises(RunError, match='12 images at 32 px should be'): cross_validate(phantoms, tmp_path, fold=1, **KW)

def test_each_fold_says_which_it_is(phantoms, tmp_path, capsys, monkeypatch):
    from pneumothorax import crossval
    monkeypatch.setattr(crossval, 'train', lambda *a, **kw: None)     # nothing is written, as if time were up
    cross_validate(phantoms, tmp_path/'cv', **{**KW, 'progress': True})
    assert capsys.readouterr().out.splitlines()[0] == 'fold 1 of 3 (fold-0)'
    assert crossval._fold_line(4, [1, 2, 4], [2, 4], 130) == 'fold 3 of 3 (fold-4); about 2 min left for all'
