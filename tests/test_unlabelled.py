"""Unlabelled radiographs as a user has them: from the command line, with folds, several teachers, other networks, too little time, and
folders of the wrong kind"""
import json
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, ok
from safetensors.torch import load_file, save_file
from test_train import launch

from pneumothorax import cli
from pneumothorax.cache import prepare
from pneumothorax.crossval import cross_validate
from pneumothorax.data import XrayInput
from pneumothorax.dicom import read_xray
from pneumothorax.folds import make_folds, save_folds
from pneumothorax.learner import load_run, read_run
from pneumothorax.phantom import make_phantoms
from pneumothorax.records import RunError
from pneumothorax.rle import PtxError
from pneumothorax.siim import PtxNotice, siim_train
from pneumothorax.train import train
from pneumothorax.unlabelled import UnlabelledError, _plain, _same_turned, _told, mark, open_unlabelled, thumbnails

pytestmark = pytest.mark.usefixtures('one_thread')
KW = {'size': 64, 'bs': 4, 'epochs': 1, 'encoder': 'mobilenetv3_small_050', 'weights': 'none', 'workers': 0, 'progress': False, 'valid': .5}

@pytest.fixture(scope='module')
def others(tmp_path_factory):
    "Eight phantoms of other patients, without labels"
    p = make_phantoms(tmp_path_factory.mktemp('others')/'o', n=8, size=64, seed=7, n_test=4, progress=False)
    for f in p.rglob('*rle.csv'): f.unlink()
    return p

@pytest.fixture(scope='module')
def taught(phantoms, others, tmp_path_factory):
    "A run with its teacher, from the command line"
    out = tmp_path_factory.mktemp('taught')/'run'
    cli.ptx_train.main([str(a) for a in (phantoms, '--out', out, '--unlabelled', others, '--valid', .5, *TINY)])
    return out

def told(f):
    "What is said by notices while a function runs"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        f()
    return ' '.join(str(o.message) for o in w if issubclass(o.category, PtxNotice))

def test_the_command_trains_both(taught, others):
    r, first = read_run(taught), read_run(taught/'teacher')
    assert (r['args']['recipe'], first['args']['recipe'], r['args']['epochs']) == ('default', 'default', 1)
    assert (r['data']['unlabelled']['n'], r['args']['unlabelled'], r['data']['valid']) == (12, str(others), first['data']['valid'])
    a, b = (load_run(f)[0].state_dict() for f in (taught, taught/'teacher'))
    assert any((a[k] != b[k]).any() for k in a)
    assert r['data']['unlabelled']['digest'] == json.loads((taught/'unlabelled'/'marks.json').read_text())['digest']

def test_it_is_finished_and_fresh_begins_anew(taught, phantoms, others):
    with pytest.raises(RunError, match='holds a run already'): train(phantoms, taught, unlabelled=others, **KW)

def test_several_teachers_and_none_of_them_is_trained(taught, phantoms, others, tmp_path):
    learn = train(phantoms, tmp_path/'s', unlabelled=others, teacher=[taught, taught/'teacher'], **KW)
    assert learn.dls.xray['unlabelled']['teachers'] == [str(taught), str(taught/'teacher')] and not (tmp_path/'s'/'teacher').exists()
    said = told(lambda: train(phantoms, tmp_path/'other', unlabelled=others, teacher=taught, **{**KW, 'valid': .4, 'seed': 3}))
    assert 'learnt from images that are held back here' in said

def test_folds_have_a_teacher_each(phantoms, others, tmp_path):
    save_folds(make_folds(siim_train(phantoms), n=2), tmp_path/'folds.csv')
    kw = {k: v for k, v in KW.items() if k != 'valid'}
    cross_validate(phantoms, tmp_path/'cv', tmp_path/'folds.csv', unlabelled=others, **kw)
    for k in (0, 1):
        assert (set(read_run(tmp_path/'cv'/f'fold-{k}'/'teacher')['data']['valid'])
            == set(read_run(tmp_path/'cv'/f'fold-{k}')['data']['valid']))
    before = (tmp_path/'cv'/'fold-0'/'run.json').read_bytes()
    cross_validate(phantoms, tmp_path/'cv', tmp_path/'folds.csv', unlabelled=others, **kw)
    assert (tmp_path/'cv'/'fold-0'/'run.json').read_bytes() == before
    with pytest.raises(RunError): cross_validate(phantoms, tmp_path/'cv', tmp_path/'folds.csv', **kw)
    with pytest.raises(PtxError, match='teacher=: set by the folds'):
        cross_validate(phantoms, tmp_path/'cv2', unlabelled=others, teacher=['x'], **kw)
    said = told(lambda: train(phantoms, tmp_path/'distilled', unlabelled=others, teacher=tmp_path/'cv', **KW))
    assert len(read_run(tmp_path/'distilled')['args']['teacher']) == 2 and 'learnt from' in said

@pytest.mark.parametrize('changes', [{'model': 'hyperunet:aux=True,deep_supervision=True'}, {'accumulate': 8}, {'precision': 'mixed'},
    {'equalize': 'clahe', 'equalize_first': True}, {'size': [32, 64], 'epochs': [1, 1]}, {'swa': .5, 'epochs': 2, 'keep': 1}], ids=str)
def test_beside_everything_else(changes, taught, phantoms, others, tmp_path):
    learn = train(phantoms, tmp_path/'r', unlabelled=others, teacher=taught/'teacher', **{**KW, **changes})
    assert np.isfinite(float(learn.unlabelled.cost)) and read_run(tmp_path/'r')['data']['unlabelled']['n'] == 12

def test_a_teacher_that_marks_nothing_is_told(taught, phantoms, others, tmp_path):
    said = told(lambda: train(phantoms, tmp_path/'r', unlabelled=others, teacher=taught/'teacher', **KW))
    assert '1 teacher has marked nothing on 12 unlabelled radiographs' in said and 'largest probability 0.01' in said

def test_time_that_is_up_while_the_teacher_learns(phantoms, others, tmp_path, capsys):
    said = told(lambda: train(phantoms, tmp_path/'r', unlabelled=others, max_hours=1e-6, **{**KW, 'epochs': 3}))
    assert 'stopped for want of time' in said and not (tmp_path/'r'/'run.json').exists()
    cli.ptx_train.main([str(a) for a in (phantoms, '--out', tmp_path/'c', '--unlabelled', others,
        '--max_hours', 1e-6, *TINY, '--epochs', 3)])
    said = capsys.readouterr().out
    assert f'run in {tmp_path/"c"/"teacher"}' in said and f'ptx_predict {tmp_path/"c"/"teacher"} IMAGES' in said
    train(phantoms, tmp_path/'r', unlabelled=others, **{**KW, 'epochs': 3})
    assert (tmp_path/'r'/'run.json').exists() and (tmp_path/'r'/'teacher'/'run.json').exists()

def test_folders_of_the_wrong_kind(taught, phantoms, others, tmp_path):
    go = lambda name, folder, **kw: train(phantoms, tmp_path/name, unlabelled=folder, teacher=taught/'teacher', **{**KW, **kw})
    with pytest.raises(UnlabelledError, match='can be used beside the labelled ones; the first: .* (is held back|is labelled)'):
        go('own', phantoms/'dicom-images-train')
    with pytest.raises(UnlabelledError, match='no such folder'): go('none', tmp_path/'nothing')
    (tmp_path/'torn').mkdir()
    (tmp_path/'torn'/'a.png').write_bytes(b'\x89PNG')
    with pytest.raises(UnlabelledError, match='none of 1 radiograph can be read'): go('torn', tmp_path/'torn')
    cache = tmp_path/'cache'
    prepare(pd.DataFrame({'ImageId': ['a'], 'path': [next(others.rglob('*.dcm'))], 'rles': [[]], 'has_ptx': False, 'area': 0}), cache, 32,
        workers=0, progress=False)
    with pytest.raises(UnlabelledError, match='a cache of 32 px, training takes 64'): go('small', cache)
    assert go('one', cache, size=32).dls.xray['unlabelled']['n'] == 1
    with pytest.raises(RunError, match='no such run'):
        train(phantoms, tmp_path/'norun', unlabelled=others, teacher=tmp_path/'nothing', **KW)
    with pytest.raises(PtxError, match='give unlabelled='): train(phantoms, tmp_path/'x', teacher=taught, **KW)

def test_a_teacher_of_another_training_is_not_taken_for_ours(taught, phantoms, others, tmp_path):
    "As after a stop between the two trainings, when the second call has other arguments"
    shutil.copytree(taught/'teacher', tmp_path/'r'/'teacher')
    with pytest.raises(RunError, match=r'holds a teacher with .*lr=.* \(now 0.0007\)'):
        train(phantoms, tmp_path/'r', unlabelled=others, **{**KW, 'lr': 7e-4})

def test_two_processes_make_the_run_of_one(phantoms, others, tmp_path):
    "Each takes its part of the unlabelled radiographs, too"
    args = [phantoms, *TINY, '--epochs', 2, '--bs', 4, '--valid', .5, '--augment', 0, '--opt', 'radam', '--unlabelled', others]
    p = launch(2, *args, '--out', tmp_path/'two')
    assert p.returncode == 0, p.stdout[-1500:]+p.stderr[-3000:]
    assert p.stdout.count('run in ') == 1
    ok('ptx_train', *args, '--out', tmp_path/'one')
    for part in ('.', 'teacher'):
        for a, b in zip(*(load_run(tmp_path/k/part)[0].state_dict().values() for k in ('one', 'two'))):
            if a.is_floating_point(): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)

def test_fresh_removes_nothing_of_the_user(taught, phantoms, others, tmp_path):
    "Folders with the names of ours stay, and what is in them"
    out = tmp_path/'r'
    kw = {**KW, 'unlabelled': others, 'teacher': taught/'teacher'}
    train(phantoms, out, **kw)
    mine = [out/'teacher'/'notes.txt', out/'unlabelled'/'a.png', out/'unlabelled'/'radiographs'/'b.png']
    for f in mine:
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text('mine')
    train(phantoms, out, fresh=True, **kw)
    assert all(f.read_text() == 'mine' for f in mine)
    for inside in (out/'unlabelled', out/'unlabelled'/'radiographs'):
        with pytest.raises(PtxError, match='where the run in .* keeps its own'):
            train(phantoms, out, fresh=True, **{**kw, 'unlabelled': inside})
    assert all(f.read_text() == 'mine' for f in mine)

def test_fresh_keeps_a_run_that_only_lies_in_the_folder_teacher(phantoms, others, tmp_path):
    train(phantoms, tmp_path/'r'/'teacher', **KW)
    train(phantoms, tmp_path/'r', fresh=True, **KW)
    assert (tmp_path/'r'/'teacher'/'run.json').exists() and (tmp_path/'r'/'run.json').exists()
    train(phantoms, tmp_path/'r', unlabelled=others, teacher=tmp_path/'r'/'teacher', fresh=True, **KW)
    assert (tmp_path/'r'/'teacher'/'model.safetensors').exists()

def cut(f): f.write_bytes(f.read_bytes()[:1000])

@pytest.mark.parametrize('spoil', [lambda d: cut(d/'marks.npy'), lambda d: (d/'marks.json').write_text('{"di'),
    lambda d: np.save(d/'marks.npy', np.full_like(np.load(d/'marks.npy'), 200))], ids=['cut off', 'note', 'changed'])
def test_damaged_marks_are_made_anew(taught, others, tmp_path, spoil):
    cache = open_unlabelled(others, tmp_path/'c', XrayInput.of(read_run(taught)['data']), 0, False)
    first = np.array(mark([taught/'teacher'], cache, cache.table, tmp_path/'m', workers=0, progress=False))
    spoil(tmp_path/'m')
    assert 'damaged and made anew' in told(lambda: mark([taught/'teacher'], cache, cache.table, tmp_path/'m', workers=0, progress=False))
    assert (np.load(tmp_path/'m'/'marks.npy') == first).all()
    assert 'damaged' not in told(lambda: mark([taught/'teacher'], cache, cache.table, tmp_path/'m', workers=0, progress=False))

def test_a_teacher_that_has_diverged_is_no_teacher(taught, others, tmp_path):
    shutil.copytree(taught/'teacher', tmp_path/'t')
    w = load_file(tmp_path/'t'/'model.safetensors')
    save_file({k: torch.full_like(v, torch.nan) if v.is_floating_point() else v for k, v in w.items()}, tmp_path/'t'/'model.safetensors')
    cache = open_unlabelled(others, tmp_path/'c', XrayInput.of(read_run(taught)['data']), 0, False)
    with pytest.raises(UnlabelledError, match='t: its probabilities are no numbers'):
        mark([tmp_path/'t'], cache, cache.table, tmp_path/'m', workers=0, progress=False)

def test_what_teachers_of_teachers_have_learnt_from_is_told(taught, phantoms, others, tmp_path):
    train(phantoms, tmp_path/'all', **{**KW, 'valid': 0})
    ids = read_run(taught)['data']['valid']
    kw = {**KW, 'valid': ids}
    assert ('learnt from images that are held back'
        in told(lambda: train(phantoms, tmp_path/'one', unlabelled=others, teacher=tmp_path/'all', **kw)))
    assert ('learnt from images that are held back'
        in told(lambda: train(phantoms, tmp_path/'two', unlabelled=others, teacher=tmp_path/'one', **kw)))

def test_what_is_left_out_is_listed(taught, phantoms, others, tmp_path):
    mine = shutil.copytree(others, tmp_path/'others')
    own = sorted((phantoms/'dicom-images-train').rglob('*.dcm'))[:2]
    for f in own: shutil.copy(f, mine)
    train(phantoms, tmp_path/'r', unlabelled=mine, teacher=taught/'teacher', **KW)
    left = pd.read_csv(tmp_path/'r'/'unlabelled'/'left_out.csv')
    assert set(left.ImageId) == {f.stem for f in own} and set(left.why) <= {'is held back', 'is labelled'}
    train(phantoms, tmp_path/'r', unlabelled=others, teacher=taught/'teacher', fresh=True, **KW)
    assert not len(pd.read_csv(tmp_path/'r'/'unlabelled'/'left_out.csv'))

def test_teachers_of_phantoms_are_told_on_other_radiographs(taught):
    for synthetic, there in ((None, True), (0., True), (1., False)):
        assert ('know synthetic radiographs only' in told(lambda: _told([taught/'teacher'], [], synthetic))) == there   # noqa: B023

def test_a_folder_may_be_named_from_elsewhere(phantoms, taught, others, tmp_path, monkeypatch):
    kw = {**KW, 'epochs': 2}
    monkeypatch.chdir(others.parent)
    train(phantoms, tmp_path/'r', unlabelled=others.name, teacher=taught/'teacher', max_hours=1e-6, **kw)
    monkeypatch.chdir(taught)
    train(phantoms, tmp_path/'r', unlabelled=others, teacher='teacher', **kw)
    assert (tmp_path/'r'/'run.json').exists()

def test_a_teacher_twice_and_a_weight_of_nothing(phantoms, taught, others, tmp_path):
    with pytest.raises(PtxError, match='named twice'):
        train(phantoms, tmp_path/'r', unlabelled=others, teacher=[taught, f'{taught}/'], **KW)
    with pytest.raises(PtxError, match='unlabelled_weight=1.0: of which'): train(phantoms, tmp_path/'r', unlabelled_weight=1., **KW)

def test_weights_that_have_seen_what_is_held_back_are_told(phantoms, taught, tmp_path):
    "Of a run that held back others, or none; not of one that held back the same, nor of one of other radiographs"
    seen, ids = 'learnt from images held back here', read_run(taught)['data']['valid']
    start = lambda w, **kw: told(lambda: train(phantoms, tmp_path/'r', fresh=True, **{**KW, 'weights': w, **kw}))
    assert seen not in start(taught/'teacher', valid=ids)
    others = [i for i in siim_train(phantoms).ImageId if i not in ids]
    assert f'{len(others)} of {len(others)};' in start(taught/'teacher', valid=others)
    train(phantoms, tmp_path/'all', **{**KW, 'valid': 0})
    assert f'{len(ids)} of {len(ids)};' in start(tmp_path/'all', valid=ids)
    other = shutil.copytree(taught/'teacher', tmp_path/'t')
    r = json.loads((other/'run.json').read_text())
    (other/'run.json').write_text(json.dumps({**r, 'data': {**r['data'], 'valid': ['a', 'b']}}))
    assert seen not in start(other, valid=ids)

def test_empty_names_are_no_folders(phantoms, taught, others, tmp_path):
    for kw in ({'unlabelled': ''}, {'unlabelled': others, 'teacher': ['']}, {'unlabelled': others, 'teacher': ''}):
        with pytest.raises(PtxError, match='an empty name'): train(phantoms, tmp_path/'r', **kw, **KW)

def test_radiographs_that_change_stop_a_training_that_goes_on(taught, phantoms, others, tmp_path):
    mine = shutil.copytree(others, tmp_path/'others')
    kw = {**KW, 'epochs': 3, 'unlabelled': mine, 'teacher': taught/'teacher'}
    train(phantoms, tmp_path/'r', max_hours=1e-6, **kw)
    f = next(mine.rglob('*.dcm'))
    kept = f.read_bytes()
    f.unlink()
    with pytest.raises(RunError, match='unlabelled radiographs or the teachers changed since this training began'):
        train(phantoms, tmp_path/'r', **kw)
    f.write_bytes(kept)
    train(phantoms, tmp_path/'r', **kw)
    assert (tmp_path/'r'/'run.json').exists()

def test_mirrored_and_inverted_copies_and_patients_as_tables_write_them(phantoms):
    x = [read_xray(f) for f in sorted(phantoms.rglob('*.dcm'))[:4]]
    a = thumbnails([x[0][:, ::-1], 1-x[1], 1-x[2][:, ::-1], x[3], np.random.default_rng(0).random((64, 64))])
    assert _same_turned(a, thumbnails(x)).tolist() == [0, 1, 2, 3, -1]
    assert _plain(pd.Series(['7', '7.0', '0007', '0', 'a07', '1.5', '70'])).tolist() == ['7', '7', '7', '0', 'a07', '1.5', '70']
