"Each kind of bad input ends in one clear error, or is listed and counted where a batch goes on"
import bz2
import gzip
import inspect
import json
import lzma
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from conftest import TINY, ptx
from PIL import Image

from pneumothorax import cli
from pneumothorax.data import LoadXray
from pneumothorax.dicom import XrayError, read_xray, xray_meta
from pneumothorax.encoders import ModelError
from pneumothorax.equalize import EQUALIZERS, FreqHist, Gamma, TensorXray, clahe, equalizer
from pneumothorax.folds import read_folds
from pneumothorax.hyperunet import HyperUnet
from pneumothorax.learner import load_run
from pneumothorax.predict import predict_maps
from pneumothorax.records import RunError, open_maps
from pneumothorax.rle import LabelError, PtxError, rle_area, rle_decode, rles_to_mask
from pneumothorax.scoring import score_report, score_submission
from pneumothorax.siim import PtxNotice, find_siim, read_labels, read_patients, siim_train


def dicoms(folder): return sorted(folder.rglob('*.dcm'))

def compressed(f): return pydicom.dcmread(f, stop_before_pixels=True).file_meta.TransferSyntaxUID.is_compressed

def fails(*args, why):
    "The command ends with 1, one line of explanation and no traceback"
    p = ptx(*args)
    errors = [line for line in p.stderr.splitlines() if line.startswith('error: ')]
    assert p.returncode == 1 and len(errors) == 1 and 'Traceback' not in p.stderr, p.stderr
    for w in why: assert w in errors[0], errors[0]
    for k in inspect.signature(getattr(cli, args[0])).parameters:
        assert not re.search(rf'(?<![\w:,.(]){k}=', errors[0]), f'Python in the message of a command: {errors[0]}'

# --- files

def zipped(f, good):
    with zipfile.ZipFile(f, 'w') as z: z.writestr('a.dcm', good.read_bytes())

def without_pixels(f, good):
    ds = pydicom.dcmread(good)
    del ds.PixelData
    ds.save_as(f)

def cut(f, good, share=.6): f.write_bytes(good.read_bytes()[:int(good.stat().st_size*share)])

def cut_png(f, good):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(f)
    cut(f, f)

def coloured(f, good): Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(f)

BROKEN = {
    'empty.dcm': (lambda f, good: f.write_bytes(b''), 'empty (0 bytes)'),
    'noise.dcm': (lambda f, good: f.write_bytes(bytes(range(256))*20), 'not a DICOM file'),
    'text.dcm': (lambda f, good: f.write_text('a radiograph\n'*50), 'not a DICOM file'),
    'zip.dcm': (zipped, 'a zip archive'),
    'nopixels.dcm': (without_pixels, 'no pixel data (modality '),
    'header.dcm': (lambda f, good: cut(f, good, .03), 'cut off'),
    'empty.png': (lambda f, good: f.write_bytes(b''), 'empty (0 bytes)'),
    'text.jpg': (lambda f, good: f.write_text('a radiograph'), 'not a readable image'),
    'cut.png': (cut_png, 'not a readable image'),
    'coloured.png': (coloured, 'channels differ'),
}

@pytest.fixture(scope='module')
def broken(phantoms, tmp_path_factory):
    "Files that cannot be read, of every kind; and why"
    out, why = tmp_path_factory.mktemp('broken'), {}
    plain = next(f for f in dicoms(phantoms) if not compressed(f))
    for n, (make, reason) in BROKEN.items():
        make(out/n, plain)
        why[n] = reason
    for kind in (False, True):
        n = f'cut{kind:d}.dcm'
        cut(out/n, next(f for f in dicoms(phantoms) if compressed(f) == kind))
        why[n] = 'cut off'
    return out, why

@pytest.mark.parametrize('n', [*BROKEN, 'cut0.dcm', 'cut1.dcm'])
def test_a_broken_file_names_itself_and_the_cause(broken, n):
    folder, why = broken
    with pytest.raises(XrayError) as e: read_xray(folder/n)
    assert n in str(e.value) and why[n] in str(e.value) and '; ' in str(e.value)

def test_other_paths_are_refused(tmp_path):
    for f, why in ((tmp_path, 'a folder'), (tmp_path/'none.dcm', 'no such file')):
        for read in (read_xray, xray_meta):
            with pytest.raises(XrayError, match=why): read(f)

def test_prediction_goes_on_and_lists_what_is_broken(broken, phantoms, tiny_run, tmp_path):
    folder, why = broken
    images = tmp_path/'images'
    shutil.copytree(folder, images)
    good = dicoms(phantoms/'dicom-images-test')[0]
    shutil.copy(good, images)
    with pytest.warns(PtxNotice): predict_maps(tiny_run, images, tmp_path/'pred', workers=0, progress=False)
    index, _, failed = open_maps(tmp_path/'pred')
    twice = {'empty.png', 'text.jpg'}   # their identifiers are taken by .dcm files, and a notice says so
    assert index.ImageId.tolist() == [good.stem]
    assert set(failed.path.map(lambda p: p.rsplit('/', 1)[-1])) == set(why)-twice
    assert failed.error.str.len().min() > 10
    assert json.loads((tmp_path/'pred'/'predict.json').read_text())['n_failed'] == len(failed)
    p = ptx('ptx_submit', tmp_path/'pred', '--out', tmp_path/'s.csv')
    assert p.returncode == 0 and f'notice: {len(failed)} unreadable' in p.stderr
    assert len(pd.read_csv(tmp_path/'s.csv')) == 1+len(failed)

def test_nothing_readable_is_an_error(broken, tiny_run, tmp_path):
    fails('ptx_predict', tiny_run, broken[0]/'zip.dcm', '--out', tmp_path/'p', '--workers', 0, why=['no file of 1', 'zip'])

def test_training_goes_on_without_broken_files(phantoms, tmp_path):
    data = tmp_path/'data'
    shutil.copytree(phantoms, data)
    bad = dicoms(data/'dicom-images-train')[2]
    cut(bad, bad)
    p = ptx('ptx_train', data, '--out', tmp_path/'run', '--valid', '.5', *TINY)
    assert p.returncode == 0, p.stderr
    assert 'notice: 1 radiograph cannot be read, left out' in p.stderr and bad.stem in p.stderr
    assert json.loads((tmp_path/'run'/'run.json').read_text())['data']['broken'] == [bad.stem]

# --- run-lengths

RLES = {'1 2 3': 'odd count', '1048570 10': 'of a frame of', '5 -3': 'negative', '-5 3': 'negative', '1 x': 'not a whole number',
    '1.5 2': 'not a whole number', 'nothing': 'not a whole number'}

@pytest.mark.parametrize('rle', RLES)
def test_a_wrong_run_length_says_why(rle):
    for f in (rle_decode, rle_area, rles_to_mask):
        with pytest.raises(LabelError, match=RLES[rle]): f(rle)

@pytest.mark.parametrize('rle', RLES)
def test_a_wrong_run_length_in_a_table_names_its_line(rle, tmp_path):
    f = tmp_path/'labels.csv'
    f.write_text(f'ImageId,EncodedPixels\na,-1\nb,{rle}\n')
    with pytest.raises(LabelError, match='line 3') as e: read_labels(f)
    assert RLES[rle] in str(e.value) and 'labels.csv' in str(e.value)

# --- tables

TABLES = {'': 'not a readable CSV', 'id,mask\na,1 2\n': 'columns id, mask',
    'ImageId,EncodedPixels\na,-1\na,-1\n': 'line 3: a repeats', 'ImageId,EncodedPixels\na,1 2\na,1 2\n': 'line 3: a repeats',
    'ImageId,EncodedPixels\na,-1\na,1 2\n': 'a is empty here', 'ImageId,EncodedPixels\n,1 2\n': 'line 2: no ImageId',
    'ImageId,EncodedPixels\n': 'no rows below the header', 'ImageId;EncodedPixels\na;1 2\n': 'separated by semicolons; save it with commas',
    'ImageId\tEncodedPixels\na\t1 2\n': 'separated by tabs'}

@pytest.mark.parametrize('text', TABLES, ids=TABLES.values())
def test_a_wrong_table_says_why(text, tmp_path):
    (tmp_path/'good.csv').write_text('ImageId,EncodedPixels\na,1 2\n')
    (tmp_path/'bad.csv').write_text(text)
    for pair in (('bad.csv', 'good.csv'), ('good.csv', 'bad.csv')):
        with pytest.raises(LabelError, match=TABLES[text]) as e: score_submission(*(tmp_path/n for n in pair))
        assert 'bad.csv' in str(e.value)

GOOD = 'ImageId,EncodedPixels\na,1 2\n'
PACKED = {'bz2': (bz2.compress(GOOD.encode()), 'bzip2.*unpack'), 'xz': (lzma.compress(GOOD.encode()), 'xz.*unpack'),
    'zip': (b'PK\3\4'+bytes(30), 'zip archive or an Excel workbook.*unpack it, or save the sheet'),
    'utf16': (GOOD.encode('utf-16'), 'UTF-16.*CSV UTF-8'), 'utf16be': (b'\xfe\xff'+GOOD.encode('utf-16-be'), 'UTF-16.*CSV UTF-8'),
    'latin1': (GOOD.replace('a', '\xe4').encode('latin-1'), 'neither UTF-8 nor gzip')}

@pytest.mark.parametrize('kind', PACKED)
def test_a_packed_table_says_what_to_do(kind, tmp_path):
    data, why = PACKED[kind]
    (tmp_path/'t.csv').write_bytes(data)
    for read in (read_labels, read_patients, read_folds):
        with pytest.raises(PtxError, match=rf't\.csv: .*{why}'): read(tmp_path/'t.csv')

@pytest.mark.parametrize('name, pack', [('t.csv', True), ('t.csv.gz', True), ('t.csv.gz', False)])
def test_gzip_is_known_by_its_bytes(name, pack, tmp_path):
    (tmp_path/name).write_bytes(gzip.compress(GOOD.encode()) if pack else GOOD.encode())
    assert read_labels(tmp_path/name).ImageId.tolist() == ['a'] and score_report(tmp_path/name, tmp_path/name)['dice'] == 1

def test_images_on_one_side_only_are_counted(tmp_path):
    (tmp_path/'sub.csv').write_text('ImageId,EncodedPixels\na,1 2\nx,-1\n')
    (tmp_path/'labels.csv').write_text('ImageId,EncodedPixels\na,1 2\nb,-1\nc,-1\n')
    with pytest.warns(PtxNotice) as said: assert score_submission(tmp_path/'sub.csv', tmp_path/'labels.csv')['n'] == 1
    text = ' '.join(str(w.message) for w in said)
    assert '1 image of the submission has no label' in text and '2 labelled images are not in the submission' in text

def test_a_wrong_table_on_the_command_line(tmp_path):
    (tmp_path/'bad.csv').write_text('id,mask\na,1 2\n')
    fails('ptx_score', tmp_path/'bad.csv', tmp_path/'bad.csv', why=['bad.csv', 'columns id, mask', 'ImageId and EncodedPixels'])
    fails('ptx_score', tmp_path/'none.csv', tmp_path/'bad.csv', why=['none.csv', 'no such file'])

# --- equalisation

def each(name): return FreqHist([0, .3, .6, 1]) if name == 'freq' else EQUALIZERS[name]()

def some_pixels(*shape): return torch.rand(shape, generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize('name', EQUALIZERS)
def test_equalising_what_is_no_radiograph(name):
    eq, x = each(name), some_pixels(3, 1, 32, 40)
    sick = x.clone()
    sick[1, 0, 5, 5] = float('nan')
    for bad, why in ((sick, r'NaN in radiographs \[1\] of 3'), (sick[1], r'NaN in radiographs \[0\] of 1'), (x[0, 0], r'shape \(32, 40\)'),
            (x.expand(3, 3, 32, 40), r'shape \(3, 3, 32, 40\)'), ((x*255).byte(), 'uint8')):
        with pytest.raises(PtxError, match=why): eq(TensorXray(bad))
    with pytest.raises(PtxError, match='NaN'): eq(sick[1, 0].numpy())
    assert eq(TensorXray(x[:0])).shape == (0, 1, 32, 40)

@pytest.mark.parametrize('name', EQUALIZERS)
def test_equalising_takes_any_order_size_and_range(name):
    eq, x = each(name), some_pixels(2, 1, 32, 40)
    for odd in (x.mT, x[:, :, ::2, 3:], x.to(memory_format=torch.channels_last), x[:1].expand(2, 1, 32, 40)):
        assert torch.equal(eq(TensorXray(odd)), eq(TensorXray(odd.contiguous())))
    wide = x*3-1
    wide[0, 0, 0, :2] = torch.tensor([float('inf'), -float('inf')])
    assert torch.equal(eq(TensorXray(wide)), eq(TensorXray(wide.clamp(0, 1))))
    for shape in ((1, 1), (1, 9), (3, 3), (5, 64), (15, 15)):
        y = eq(TensorXray(some_pixels(2, 1, *shape)))
        assert y.shape == (2, 1, *shape) and 0 <= y.min() and y.max() <= 1
    assert torch.equal(eq(TensorXray(torch.full((1, 1, 9, 9), 2.))), eq(TensorXray(torch.ones(1, 1, 9, 9))))

def test_clahe_limits_its_grid_to_the_image():
    x = some_pixels(2, 1, 32, 20)
    assert torch.equal(clahe(x, grid=64), torch.cat([clahe(i[None], grid=64) for i in x]))
    assert torch.equal(clahe(x[..., :20, :], grid=64), clahe(x[..., :20, :], grid=20))

@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='the peak of one process alone is told by /proc only')
def test_clahe_keeps_its_memory_bounded():
    code = """import torch
from pneumothorax.equalize import clahe
def mb(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])/1024
x = torch.rand(8, 1, 512, 512)
clahe(x[:1], grid=8)
before = mb()
clahe(x, grid=64)
print(mb()-before)"""
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True)
    assert 60 < float(p.stdout) < 800   # MB; the tables of all eight at once and what they are made of would be over 2,000

PARAMETERS = {'clahe:grid=4.0': 'grid=4.0: give a whole number', 'clahe:grid=0': 'grid=0', 'clahe:clip=nan': 'clip=nan',
    'clahe:clip=inf': 'clip=inf', 'clahe16:clip=-1': 'clip=-1', 'hist:levels=0': 'levels=0', 'hist:levels=-5': 'levels=-5',
    'hist:levels=256.0': 'levels=256.0', 'quantize:bits=7.5': 'bits=7.5', 'quantize:bits=17': 'bits=17',
    'stretch:lo=98,hi=2': 'give lo < hi', 'stretch:lo=nan': 'lo=nan', 'gamma:gamma=-1': 'gamma=-1', 'clahe:p=2': 'p=2',
    'freq:breaks=3': 'breaks'}

@pytest.mark.parametrize('text', PARAMETERS)
def test_parameters_of_an_equalisation(text):
    with pytest.raises(PtxError) as e: equalizer(text)
    assert PARAMETERS[text] in str(e.value)

@pytest.mark.parametrize('spec', [{}, {'clip': 2}, {'name': 'CLAHE', 'clip': '3'}, {'name': 'CLAHE', 'grid': None},
    {'name': 'Gamma', 'gamma': [2, 1]}, {'name': 'Quantize', 'bits': True}])
def test_a_record_of_an_equalisation_that_was_changed(spec):
    with pytest.raises(PtxError): equalizer(spec)

def test_an_equalisation_on_the_command_line(phantoms, tiny_run, tmp_path):
    assert equalizer('clahe:clip=1e3').clip == 1000
    fails('ptx_train', phantoms, '--out', tmp_path/'run', '--equalize', 'clahe:grid=4.0', *TINY, why=['grid=4.0', 'whole number'])
    fails('ptx_predict', tiny_run, phantoms, '--out', tmp_path/'pred', '--variant', 'clahe:p=0.5', why=['CLAHE', 'p=0.5', 'by chance'])
    assert not (tmp_path/'run'/'run.json').exists() and not (tmp_path/'pred').exists()

def test_chance_acts_in_training_only():
    x = TensorXray(some_pixels(8, 1, 16, 16))
    for eq in (Gamma((.5, 2.)), equalizer('clahe:p=0.5')):
        assert eq.random and not torch.equal(eq(x, split_idx=0), x)
        for split in (None, 1): assert torch.equal(eq(x, split_idx=split), x)
        for _ in range(10): assert (eq(x[0, 0].numpy()) == x[0, 0].numpy()).all()

# --- folders, architectures, runs

def test_links_that_lead_in_a_circle(phantoms, tmp_path):
    "Two folders that lead to each other, twice: the ways round double at every step"
    for a, b in ('ab', 'ba'):
        (tmp_path/a).mkdir()
        for n in 'xy': (tmp_path/a/n).symlink_to(f'../{b}')
    files = dicoms(phantoms)
    for f, a in zip(files, 'ab'): shutil.copy(f, tmp_path/a)
    find = f"from pneumothorax.siim import find_images; found, spare = find_images({str(tmp_path)!r}); print(*sorted(found), *spare)"
    p = subprocess.run([sys.executable, '-c', find], capture_output=True, text=True, check=True, timeout=60)
    assert p.stdout.split() == sorted(f.stem for f in files[:2])

def test_an_equalisation_that_draws_is_refused_before_the_resize(phantoms, tmp_path):
    fails('ptx_train', phantoms, '--out', tmp_path/'run', '--equalize', 'clahe:p=0.5', '--equalize_first', *TINY, why=['random', 'p=1'])
    with pytest.raises(PtxError, match='random'): LoadXray(64, before=equalizer('hist:p=0.5'))

def test_an_empty_folder(tmp_path, tiny_run):
    with pytest.raises(PtxError, match='no radiographs'): find_siim(tmp_path)
    fails('ptx_train', tmp_path, '--out', tmp_path/'run', why=[str(tmp_path), 'no radiographs'])
    fails('ptx_predict', tiny_run, tmp_path, '--out', tmp_path/'pred', why=[str(tmp_path), 'no radiographs'])
    assert not (tmp_path/'run'/'run.json').exists() and not (tmp_path/'pred').exists()

def test_radiographs_without_labels(phantoms, tmp_path):
    shutil.copy(dicoms(phantoms)[0], tmp_path)
    with pytest.raises(LabelError, match='no label file'): siim_train(tmp_path)

def test_an_unknown_encoder(phantoms, tmp_path):
    with pytest.raises(ModelError, match='did you mean .*resnet18'): HyperUnet('resnet-18')
    fails('ptx_train', phantoms, '--out', tmp_path/'run', '--encoder', 'resnet-18', '--size', 64, '--weights', 'none', '--workers', 0,
        why=['resnet-18', 'did you mean'])

def test_weights_that_are_not_there(phantoms, tmp_path):
    fails('ptx_train', phantoms, '--out', tmp_path/'run', '--weights', tmp_path/'w.pth', '--size', 64, '--workers', 0,
        why=['no such file', 'w.pth'])

class Stranger:
    "Runs code where it is unpickled"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open, (self.path, 'w')

def test_weights_with_code_and_of_another_encoder(phantoms, tiny_run, tmp_path):
    torch.save({'a': Stranger(tmp_path/'ran')}, tmp_path/'evil.pth')
    tiny = [*TINY]
    at = tiny.index('--weights')+1
    tiny[at] = tmp_path/'evil.pth'
    fails('ptx_train', phantoms, '--out', tmp_path/'run', *tiny, why=['evil.pth', 'holds code', 'nothing in it was executed'])
    assert not (tmp_path/'ran').exists()
    tiny[at], tiny[tiny.index('--encoder')+1] = tiny_run, 'resnet18'
    fails('ptx_train', phantoms, '--out', tmp_path/'run2', *tiny, why=['do not fit', '--encoder mobilenetv3_small_050'])

NETWORKS = {'unet++': 'unetplusplus', 'hyperunet:attention=se': "choose one of None, 'scse', 'cbam'", 'hyperunet:colour=3': 'not an option',
    'hyperunet:aux': 'key=value'}

@pytest.mark.parametrize('model', NETWORKS)
def test_networks_that_cannot_be(phantoms, tmp_path, model):
    fails('ptx_train', phantoms, '--out', tmp_path/'run', '--model', model, *TINY, why=[NETWORKS[model]])

def test_an_encoder_without_maps(phantoms, tmp_path):
    tiny = [*TINY]
    tiny[tiny.index('--encoder')+1] = 'vit_tiny_patch16_224'
    fails('ptx_train', phantoms, '--out', tmp_path/'run', *tiny, why=['vit_tiny_patch16_224', 'choose'])

def test_an_unknown_loss(phantoms, tmp_path):
    fails('ptx_train', phantoms, '--out', tmp_path/'run', '--loss', 'dise', *TINY, why=['dise', 'dice'])

def changed(run, out, edit):
    "A copy of a run with another record"
    shutil.copytree(run, out)
    text = edit((out/'run.json').read_text())
    (out/'run.json').write_text(text)
    return out

def newer(text):
    r = json.loads(text)
    r['format'] = 99
    r['versions']['pneumothorax'] = '9.0'
    return json.dumps(r)

RUNS = {'format 99 (written by pneumothorax 9.0)': newer, 'not readable': lambda t: t[:50], "format None": lambda t: '[]'}

@pytest.mark.parametrize('why', RUNS)
def test_a_run_of_another_version_or_none(tiny_run, phantoms, tmp_path, why):
    run = changed(tiny_run, tmp_path/'run', RUNS[why])
    with pytest.raises(RunError) as e: load_run(run)
    assert why in str(e.value) and 'run.json' in str(e.value)
    if RUNS[why] is newer: fails('ptx_predict', run, phantoms, '--out', tmp_path/'pred', why=[why, 'install that version'])

def test_an_incomplete_run(tiny_run, tmp_path):
    run = tmp_path/'run'
    shutil.copytree(tiny_run, run)
    cut(run/'model.safetensors', run/'model.safetensors')
    with pytest.raises(RunError, match='not readable'): load_run(run)
    (run/'model.safetensors').unlink()
    with pytest.raises(RunError, match='incomplete'): load_run(run)
    (run/'run.json').unlink()
    with pytest.raises(RunError, match=r'no run\.json'): load_run(run)
    with pytest.raises(RunError, match='no such run folder'): load_run(tmp_path/'none')

def test_results_are_not_overwritten(tiny_run, phantoms, tmp_path):
    before = (tiny_run/'run.json').read_bytes()
    fails('ptx_train', phantoms, '--out', tiny_run, *TINY, why=['holds a run already'])
    assert (tiny_run/'run.json').read_bytes() == before
