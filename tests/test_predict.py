"Predictions that are killed, shared by processes, averaged; and questions that cannot be answered"
import json
import os
import shutil
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import warm
from conftest import ok, ptx

from pneumothorax.averaging import average_files
from pneumothorax.encoders import read_weights
from pneumothorax.predict import *
from pneumothorax.records import *
from pneumothorax.rle import PtxError
from pneumothorax.tta import TTA_PRESETS, View, views

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore')]
KILLED = """
import os, signal, sys
from pneumothorax.predict import MapStore, predict_maps
moment, at = sys.argv[1], int(sys.argv[2])
def dies(name, after):
    usual, n = getattr(MapStore, name), [0]
    def f(self, *args):
        n[0] += 1
        if n[0] == at and not after: os.kill(os.getpid(), signal.SIGKILL)
        usual(self, *args)
        if n[0] == at and after: os.kill(os.getpid(), signal.SIGKILL)
        if name == 'add': self.flush()
    setattr(MapStore, name, f)
dies(*moment.split(',')) if ',' in moment else dies(moment, '')
predict_maps(*sys.argv[3:6], bs=3, workers=0, progress=False, tta='hflip', spread=True)
"""

def same(a, b, files=('maps.npy', 'spread.npy', 'index.csv', 'failed.csv')):
    return all((Path(a)/f).read_bytes() == (Path(b)/f).read_bytes() for f in files)

@pytest.fixture(scope='module')
def whole(phantoms, tiny_run, tmp_path_factory):
    "Images with a broken one among them, and their undisturbed prediction"
    images = tmp_path_factory.mktemp('images')
    for f in phantoms.rglob('*.dcm'): shutil.copy(f, images)
    (images/'broken.dcm').write_bytes(b'no radiograph')
    out = images.parent/'whole'
    predict_maps(tiny_run, images, out, bs=3, workers=0, progress=False, tta='hflip', spread=True)
    return images, out

@pytest.mark.parametrize(('moment', 'at'), [('add', 1), ('add', 3), ('add,after', 4), ('flush', 1), ('flush,after', 1)])
def test_killed_at_any_moment_it_goes_on(moment, at, whole, tiny_run, tmp_path):
    images, want = whole
    (tmp_path/'killed.py').write_text(KILLED)
    p = warm.run(tmp_path/'killed.py', moment, at, tiny_run, images, tmp_path/'pred')
    assert p.returncode == -9, p.stderr[-2000:]
    with pytest.raises(PtxError, match='predict again into this folder'): open_maps(tmp_path/'pred')
    before = len(list((tmp_path/'pred').glob('batches-*'))
        and [r for f in (tmp_path/'pred').glob('batches-*') for r in f.read_text().splitlines()])
    seen, usual = [], MapStore.add
    with pytest.MonkeyPatch.context() as m:
        m.setattr(MapStore, 'add', lambda self, batch, *args: (seen.append(batch), usual(self, batch, *args)))
        predict_maps(tiny_run, images, tmp_path/'pred', bs=3, workers=0, progress=False, tta='hflip', spread=True)
    assert len(seen)+before == 6
    assert same(tmp_path/'pred', want)

@pytest.mark.skipif(find_spec('accelerate') is None, reason='accelerate is not installed')
def test_two_processes_write_what_one_does(whole, tiny_run, tmp_path):
    images, want = whole
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'}
    args = [Path(sys.executable).parent/'ptx_predict', tiny_run, images, '--out', tmp_path/'pred', '--bs', 3, '--workers', 0,
        '--tta', 'hflip', '--spread']
    p = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2',
        '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0',
        '--no_python', *map(str, args)], env=env, capture_output=True, text=True, timeout=240, check=False)
    assert p.returncode == 0, p.stderr[-3000:]
    assert p.stdout.count('radiographs predicted') == 1
    assert same(tmp_path/'pred', want)

def test_networks_are_averaged_by_command(whole, tiny_run, tmp_path):
    images, _ = whole
    other = shutil.copytree(tiny_run, tmp_path/'other')
    r = json.loads((other/'run.json').read_text())
    (other/'run.json').write_text(json.dumps({**r, 'data': {**r['data'], 'size': 96}}))
    ok('ptx_predict', tiny_run, other, images, '--out', tmp_path/'both', '--weights', '3,1', '--dtype', 'uint16',
        '--workers', 0, '--spread')
    alone = [open_maps(predict_maps(run, images, tmp_path/run.name, workers=0, progress=False, dtype='uint16', size=96))[1]
        for run in (tiny_run, other)]
    maps = open_maps(tmp_path/'both')[1]
    assert maps.shape[1:] == (96, 96)
    assert np.abs(from_bytes(maps)-(3*from_bytes(alone[0])+from_bytes(alone[1]))/4).max() < 2e-5
    each = open_each(tmp_path/'both')
    assert len(each) == 2 and all((m == a).all() for (m, _), a in zip(each, alone)) and not each[0][1].any()   # one view has no deviation
    record = json.loads((tmp_path/'both'/'predict.json').read_text())
    assert (record['weights'] == [3, 1] and record['networks'] == 2 and record['run'] == [str(tiny_run), str(other)]
        and (tmp_path/'both'/'spread_runs.npy').exists())

def test_what_cannot_be_asked_is_said_by_the_command(whole, tiny_run, tmp_path):
    images, want = whole
    for args, why in (((tiny_run,), 'which images'), ((tiny_run, images, '--tta', 'elastic'), 'cannot be undone'),
            ((tiny_run, images, '--weights', 'a'), 'give numbers'), ((tiny_run, images, '--device', 'cuda:77'), 'not available'),
            ((tiny_run, images, '--out', want), 'holds predictions already')):
        p = ptx('ptx_predict', *args, '--out', tmp_path/'p') if '--out' not in args else ptx('ptx_predict', *args)
        assert p.returncode == 1 and why in p.stderr and 'Traceback' not in p.stderr, p.stderr
    assert not (tmp_path/'p').exists()

def test_another_run_another_size_other_images(whole, tiny_run, tmp_path):
    images, _ = whole
    def stops(*args): raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as m:
        m.setattr(MapStore, 'add', stops)
        with pytest.raises(KeyboardInterrupt): predict_maps(tiny_run, images, tmp_path/'p', workers=0, progress=False)
    few = sorted(images.glob('*.dcm'))[:3]
    for kw, why in (({"size": 32}, 'size=64 .now 32.'), ({"images": few}, 'other images'), ({"tta": 'hflip'}, 'views='),
            ({"dtype": 'uint16'}, 'dtype=')):
        with pytest.raises(PtxError, match=why):
            predict_maps(**{'run': tiny_run, 'images': images, 'out': tmp_path/'p', 'workers': 0, 'progress': False, **kw})
    predict_maps(tiny_run, few, tmp_path/'p', workers=0, progress=False, fresh=True)
    assert len(open_maps(tmp_path/'p')[0]) == 3

@pytest.mark.parametrize('preset', TTA_PRESETS)
def test_presets_see_the_whole_image_and_differ(preset):
    vs = views(preset)
    assert View() in vs and len(set(vs)) == len(vs)

def test_names_of_every_kind_go_through(tiny_run, phantoms, tmp_path):
    "NA and null are names, spaces at the end are none of it, and a name need not be UTF-8"
    from pneumothorax.siim import read_labels
    from pneumothorax.submission import write_submission
    f, bad = next(phantoms.rglob('*.dcm')), os.fsdecode(b'caf\xe9')
    (tmp_path/'in').mkdir()
    for name in ('NA', 'null', 'tail ', '007', bad):
        try: shutil.copy(f, tmp_path/'in'/f'{name}.dcm')
        except OSError: pytest.skip('this file system takes no such name')
    p = predict_maps(tiny_run, tmp_path/'in', tmp_path/'p', workers=0, progress=False)
    index = open_maps(p)[0]
    assert sorted(index.ImageId) == sorted(['NA', 'null', 'tail', '007', bad]) and all(Path(q).exists() for q in index.path)
    with pytest.raises(PtxError, match=r'caf\\udce9: names that are no UTF-8'): write_submission(p, tmp_path/'s.csv', progress=False)
    (tmp_path/'in'/f'{bad}.dcm').unlink()
    p = predict_maps(tiny_run, tmp_path/'in', tmp_path/'q', workers=0, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        write_submission(p, tmp_path/'s.csv', thresh=.01, progress=False)
    assert sorted(read_labels(tmp_path/'s.csv').ImageId) == ['007', 'NA', 'null', 'tail']

@pytest.mark.parametrize('model', ['hyperunet', 'fastai_unet'])
def test_a_learner_keeps_its_network(phantoms, model):
    "In training, where it was, with its gradients; also where hooks hold the maps of the last batch"
    import torch

    from pneumothorax.data import xray_dls
    from pneumothorax.learner import xray_learner
    learn = xray_learner(xray_dls(phantoms, size=64, bs=2, workers=0), model, encoder='mobilenetv3_small_050', weights='none')
    learn.model.train()
    learn.model(torch.rand(2, 1, 64, 64)).sum().backward()
    before = [(p.device, p.requires_grad, p.grad is None) for p in learn.model.parameters()]
    net, = networks(learn)
    assert not net.model.training and all(m.training for m in learn.model.modules())
    assert [(p.device, p.requires_grad, p.grad is None) for p in learn.model.parameters()] == before
    assert not {id(p) for p in net.model.parameters()} & {id(p) for p in learn.model.parameters()}
    x = torch.rand(1, 1, 64, 64)
    with torch.no_grad(): assert torch.equal(net.model(x), learn.model.eval()(x))

def test_a_network_of_phantoms_says_so_about_others(tiny_run, phantoms, tmp_path):
    from PIL import Image

    from pneumothorax.siim import PtxNotice
    run = shutil.copytree(tiny_run, tmp_path/'run')
    r = json.loads((run/'run.json').read_text())
    (tmp_path/'real').mkdir()
    Image.new('L', (64, 64)).save(tmp_path/'real'/'a.png')
    for known, images, told in ((1., tmp_path/'real', True), (True, phantoms/'dicom-images-test', False), (.9, tmp_path/'real', False),
            (None, tmp_path/'real', False)):
        (run/'run.json').write_text(json.dumps({**r, 'data': {**r['data'], 'synthetic': known}}))
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            predict_maps(run, images, tmp_path/f'p{known}{told}', workers=0, progress=False)
        assert any('synthetic radiographs only' in str(o.message) for o in w if issubclass(o.category, PtxNotice)) == told

def test_a_learner_knows_that_it_has_seen_phantoms_only(phantoms):
    from pneumothorax.data import xray_dls
    from pneumothorax.learner import xray_learner
    learn = xray_learner(xray_dls(phantoms, size=64, bs=4, workers=0), encoder='mobilenetv3_small_050', weights='none')
    assert [n.synthetic for n in networks(learn)] == [True]

@pytest.mark.parametrize(('option', 'value', 'why'), [('bs', 0, 'bs=0: give at least 1'), ('bs', -2, 'at least 1'),
    ('workers', -1, 'workers=-1: give at least 0'), ('size', 0, 'size=0: give at least 1'), ('size', -5, 'at least 1')])
def test_numbers_that_cannot_be_leave_nothing_behind(phantoms, tiny_run, tmp_path, option, value, why):
    with pytest.raises(PtxError, match=why):
        predict_maps(tiny_run, phantoms/'dicom-images-test', tmp_path/'p', **{'workers': 0, 'progress': False, option: value})
    predict_maps(tiny_run, phantoms/'dicom-images-test', tmp_path/'p', workers=0, progress=False)
    assert len(open_maps(tmp_path/'p')[0]) == 4

def test_a_run_of_any_name(phantoms, tiny_run, tmp_path):
    "A folder whose name is no UTF-8 is read like any other, and so is a file of weights"
    odd = tmp_path/os.fsdecode(b'run\xe9')
    try: shutil.copytree(tiny_run, odd)
    except OSError: pytest.skip('the file system knows names in UTF-8 only')
    predict_maps(odd, phantoms/'dicom-images-test', tmp_path/'p', workers=0, progress=False)
    predict_maps(tiny_run, phantoms/'dicom-images-test', tmp_path/'q', workers=0, progress=False)
    assert (tmp_path/'p'/'maps.npy').read_bytes() == (tmp_path/'q'/'maps.npy').read_bytes()
    f = shutil.copy(tiny_run/'model.safetensors', tmp_path/os.fsdecode(b'w\xe9.safetensors'))
    assert read_weights(f).keys() == read_weights(tiny_run).keys() and average_files([f]).keys() == read_weights(f).keys()
