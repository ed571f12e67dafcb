"Finding radiographs and reading labels: identifiers, kinds of files, what is synthetic"
import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest
from conftest import TINY, ok, ptx
from PIL import Image

from pneumothorax.cache import XrayCache
from pneumothorax.data import split_by_patient, xray_dls
from pneumothorax.dicom import read_xray, xray_meta
from pneumothorax.folds import FoldError, make_folds, read_folds, save_folds
from pneumothorax.rle import LabelError, PtxError, likely_frame, rle_encode, rles_runs, rles_to_mask
from pneumothorax.scoring import score_report
from pneumothorax.siim import PtxNotice, counted, find_images, find_siim, read_index, read_labels, read_patients, siim_train, write_index


def dicoms(folder): return sorted(folder.rglob('*.dcm'))

# --- identifiers

NAMES = ['NA', 'nan', 'null', 'None', 'N/A'.replace('/', '_'), 'NULL', '007', '1e5', 'True', 'tail ', '\u2003wide', 'caf\xe9', 'x,y']

@pytest.fixture
def named(phantoms, tmp_path):
    "A folder of radiographs with awkward names, and labels for them"
    some = dicoms(phantoms)
    (tmp_path/'set').mkdir()
    for k, i in enumerate(NAMES): shutil.copy(some[k % len(some)], tmp_path/'set'/f'{i}.dcm')
    t = pd.DataFrame({'ImageId': NAMES, 'EncodedPixels': ['5000 900' if k % 2 else '-1' for k in range(len(NAMES))]})
    t.to_csv(tmp_path/'set'/'train-rle.csv', index=False)
    return tmp_path/'set'

def test_names_that_look_like_nothing(named, recwarn):
    t = siim_train(named)
    assert sorted(t.ImageId) == sorted(i.strip() for i in NAMES) and t.path.map(lambda f: f.stem.strip()).tolist() == t.ImageId.tolist()
    assert not [w for w in recwarn if issubclass(w.category, PtxNotice) and 'label' in str(w.message)]
    folds = make_folds(t, groups={i: f'p{i}' for i in t.ImageId}, n=2)
    save_folds(folds, named/'folds.csv')
    assert read_folds(named/'folds.csv', t.ImageId).equals(folds)

def test_identifiers_are_read_the_same_from_every_table(tmp_path):
    (tmp_path/'p.csv').write_text('ImageId,patient_id,fold\n NA ,1,0\ne\u0301.dcm,2,1\n', encoding='utf-8')
    with pytest.warns(PtxNotice, match='1 identifier'): assert read_patients(tmp_path/'p.csv').to_dict() == {'NA': '1', '\xe9': '2'}
    with pytest.warns(PtxNotice): assert read_folds(tmp_path/'p.csv', ['NA', '\xe9']).ImageId.tolist() == ['NA', '\xe9']

@pytest.mark.parametrize('ending', ['.dcm', '.PNG', '.dcm.png'])
def test_labels_with_the_ending_of_a_file(phantoms, tmp_path, ending):
    (tmp_path/'y.csv').write_text('\n'.join(r.replace(',', f'{ending},') if k else r
        for k, r in enumerate((phantoms/'train-rle.csv').read_text().splitlines())))
    with pytest.warns(PtxNotice, match='end like names of files'): t = siim_train(phantoms, tmp_path/'y.csv')
    assert t.ImageId.tolist() == siim_train(phantoms).ImageId.tolist()

def test_labels_of_other_radiographs_show_one_of_each(phantoms, tmp_path):
    (tmp_path/'y.csv').write_text('ImageId,EncodedPixels\nsomething,-1\n')
    with pytest.raises(LabelError, match="name 'something' for example, the radiographs '1.2.826"): siim_train(phantoms, tmp_path/'y.csv')

# --- what is synthetic

def test_phantoms_say_that_they_are_synthetic(phantoms, tmp_path):
    assert siim_train(phantoms).synthetic.all() and xray_meta(dicoms(phantoms)[0])['synthetic'] is True
    shutil.copytree(phantoms, tmp_path/'bare')
    (tmp_path/'bare'/'metadata.csv').unlink()
    assert siim_train(tmp_path/'bare').synthetic.all()   # by the header alone
    for f in dicoms(tmp_path/'bare'):
        ds = pydicom.dcmread(f)
        del ds.SyntheticData
        ds.save_as(f)
    assert not siim_train(tmp_path/'bare').synthetic.any()

def test_real_radiographs_are_not_synthetic(shared):
    with pytest.warns(PtxNotice): t = siim_train(shared/'siim-small')
    assert t.synthetic.dtype == bool and not t.synthetic.any()

def test_a_cache_carries_it(phantoms, tmp_path):
    from pneumothorax.cache import prepare
    assert prepare(phantoms, tmp_path/'c', 64, workers=0, progress=False).table.synthetic.tolist() == [True]*12

def test_more_positives_from_the_command(tmp_path):
    ok('ptx_sample', tmp_path/'s', '--n', 8, '--size', 64, '--positive', .75)
    assert (read_labels(tmp_path/'s'/'train-rle.csv').has_ptx.sum() == 6
        and json.loads((tmp_path/'s'/'phantom.json').read_text())['positive'] == .75)
    p = ptx('ptx_sample', tmp_path/'t', '--positive', 7)
    assert p.returncode == 1 and '--positive 7.0: give a share from 0 to 1' in p.stderr and not (tmp_path/'t').exists()

# --- space in run-lengths

SPACES = '\xa0', '\u2003', '\u3000', '\x85', '\x1c', '\x1d', '\x1e', '\x1f', '\t'

@pytest.mark.parametrize('space', SPACES, ids=[f'U+{ord(c):04X}' for c in SPACES])
def test_any_space_separates(space, tmp_path):
    (tmp_path/'y.csv').write_text(f'ImageId,EncodedPixels\na{space},5{space}3{space}{space}2 4\n', encoding='utf-8', newline='')
    t = read_labels(tmp_path/'y.csv')
    assert t.ImageId.tolist() == ['a'] and t.area.tolist() == [7]
    assert score_report(tmp_path/'y.csv', tmp_path/'y.csv')['dice'] == 1

# --- the frame

def shrunk(labels, n, out):
    "The same masks in a frame of n²"
    small = lambda r: rle_encode(cv2.resize(rles_to_mask([r])*255, (n, n), interpolation=cv2.INTER_AREA) > 127)
    rows = ([(i, small(r)) for i, rles in zip(labels.ImageId, labels.rles) for r in rles]
        + [(i, '-1') for i in labels.ImageId[~labels.has_ptx]])
    pd.DataFrame(rows, columns=['ImageId', 'EncodedPixels']).drop_duplicates('ImageId').to_csv(out, index=False)
    return out

def real(shared):
    return [shared/'siim-labels'/'stage_2_train.csv.gz', shared/'siim-small'/'train-rle.csv', shared/'siim-more'/'train-rle.csv']

def test_real_labels_are_not_refused(shared):
    for f in real(shared): assert read_labels(f).equals(read_labels(f, 1024))
    y = read_labels(real(shared)[0])
    assert {likely_frame([rles_runs(r)]) for r in y.rles[y.has_ptx][::5]} == {1024}   # not one by one either

@pytest.mark.parametrize('n', [128, 224, 256, 384, 512, 640])
def test_real_masks_of_another_frame_are_refused(shared, tmp_path, n):
    y = read_labels(real(shared)[1])
    f = shrunk(y, n, tmp_path/'y.csv')
    with pytest.raises(LabelError, match=rf'\(frame={n}\), or frame=1024'): read_labels(f)
    t = read_labels(f, n).set_index('ImageId').loc[y.ImageId]
    both = [(rles_to_mask(a), rles_to_mask(b)) for a, b in zip(y.rles, t.rles) if len(a) == 1]
    assert np.mean([2*(a&b).sum()/(a.sum()+b.sum()) for a, b in both]) > (.8 if n < 256 else .93)
    assert len(read_labels(f, 1024)) == len(y)     # who says so is believed

@pytest.mark.parametrize('n', [256, 512])
def test_phantoms_of_another_frame(phantoms, tmp_path, n):
    f = shrunk(read_labels(phantoms/'train-rle.csv'), n, tmp_path/'y.csv')
    for frame in (n, str(n), (n, n), f'{n}x{n}'): assert siim_train(phantoms, f, frame=frame).area.sum() % (1024//n)**2 == 0
    for command in (['ptx_train', phantoms, '--out', tmp_path/'run', *TINY],
            ['ptx_prepare', phantoms, tmp_path/'cache', '--size', 64, '--workers', 0], ['ptx_folds', phantoms, '--out', tmp_path/'f.csv'],
            ['ptx_audit', phantoms, '--out', tmp_path/'audit']):
        p = ptx(*command, '--labels', f)
        assert p.returncode == 1 and f'(--frame {n})' in p.stderr, p.stderr

def test_a_frame_on_the_command_line(phantoms, tmp_path):
    f = shrunk(read_labels(phantoms/'train-rle.csv'), 256, tmp_path/'y.csv')
    ok('ptx_prepare', phantoms, tmp_path/'cache', '--size', 64, '--workers', 0, '--labels', f, '--frame', 256)
    ok('ptx_audit', f, '--out', tmp_path/'audit', '--frame', '256x256')
    ok('ptx_folds', phantoms, '--out', tmp_path/'f.csv', '--labels', f, '--frame', 256, '--n', 2)
    write_submission_like(read_labels(f, 256), tmp_path/'s.csv')
    assert ('Dice' in ok('ptx_score', tmp_path/'s.csv', f, '--frame', 256).stdout
        and score_report(tmp_path/'s.csv', f, frame=256)['dice'] == 1)
    p = ptx('ptx_train', phantoms, '--out', tmp_path/'run', '--labels', f, '--frame', 'big', *TINY)
    assert p.returncode == 1 and "frame 'big': give the side of a square" in p.stderr
    assert XrayCache(tmp_path/'cache').table.area.sum() == read_labels(f, 256).area.sum()
    with pytest.raises(PtxError, match='already'): xray_dls(tmp_path/'cache', frame=256)

def write_submission_like(labels, out):
    pd.DataFrame({'ImageId': labels.ImageId, 'EncodedPixels': [r[0] if r else '-1' for r in labels.rles]}).to_csv(out, index=False)

# --- files without an ending

def test_files_are_known_by_their_mark(phantoms, tmp_path):
    some = dicoms(phantoms/'dicom-images-train')
    for f, name in zip(some, ('IM000001', '1.2.840.113', 'a.ima', 'b.IMG', 'c.dic', 'd.x')): shutil.copy(f, tmp_path/name)
    (tmp_path/'README').write_text('about it')
    (tmp_path/'disk.img').write_bytes(bytes(1000))
    (tmp_path/'DICOMDIR').write_bytes(bytes(128)+b'DICM')
    read = lambda f: Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(f)
    for name in ('e.tif', 'f.TIFF', 'g.bmp', 'h.jp2'): read(tmp_path/name)
    with pytest.warns(PtxNotice, match='2 files are neither tables nor radiographs.*README'): found = find_images(tmp_path)[0]
    assert sorted(found) == sorted(['IM000001', '1.2.840.113', 'a', 'b', 'c', 'd.x', 'e', 'f', 'g', 'h'])
    assert all(read_xray(f).shape == (64, 64) for f in found.values())
    (tmp_path/'y.csv').write_text('ImageId,EncodedPixels\nIM000001,-1\n1.2.840.113,-1\n')
    with pytest.warns(PtxNotice): assert siim_train(tmp_path).patient_id.notna().all()

# --- places that cannot be written

@pytest.mark.skipif(not Path('/sys/kernel').is_dir(), reason='needs a folder that nobody can write')
def test_places_that_cannot_be_written(phantoms, tmp_path):
    for c in (['ptx_sample', '/sys/x', '--n', 4, '--size', 64], ['ptx_folds', phantoms, '--out', '/sys/f.csv', '--n', 2],
            ['ptx_audit', phantoms, '--out', '/sys/a']):
        p = ptx(*c)
        assert p.returncode == 1 and 'cannot be written' in p.stderr and 'Traceback' not in p.stderr, p.stderr

# --- one patient for all

def test_one_patient_for_all_radiographs(phantoms, tmp_path):
    shutil.copytree(phantoms, tmp_path/'set')
    (tmp_path/'set'/'metadata.csv').unlink()
    for f in dicoms(tmp_path/'set'):
        ds = pydicom.dcmread(f)
        ds.PatientID = 'ANONYMOUS'
        ds.save_as(f)
    with pytest.warns(PtxNotice, match=r'12 radiographs claim to be of one patient \(ANONYMOUS\)'): t = siim_train(tmp_path/'set')
    assert t.patient_id.isna().all()
    t['patient_id'] = 'ANONYMOUS'     # a table of somebody's own
    with pytest.warns(PtxNotice): assert len(split_by_patient(t, .25)) == 3
    with pytest.warns(PtxNotice): assert len(make_folds(t, n=2)) == 12
    with pytest.raises(FoldError, match=r'all 12 images are of one patient \(ANONYMOUS\).*metadata|true patients'):
        make_folds(t, groups=t[['ImageId', 'patient_id']], n=2)
    with pytest.raises(PtxError, match='^1 patient cannot be split'): split_by_patient(t.head(6), .5)
    p = ok('ptx_train', tmp_path/'set', '--out', tmp_path/'run', '--valid', '.5', *TINY)
    assert 'claim to be of one patient (ANONYMOUS)' in p.stderr and '12 radiographs of unknown patient' in p.stderr

def test_counted():
    for many, one in (('images have no patient', 'image has no patient'),
            ('files have changed, and are read', 'file has changed, and is read'),
            ('runs stopped, the weights of which are taken', 'run stopped, the weights of which are taken'),
            ('radiographs claim to be', 'radiograph claims to be'), ('masses', 'masse')):
        assert counted(1, many) == f'1 {one}' and counted(2, many) == f'2 {many}'

@pytest.mark.parametrize('name', ['a\rb', 'c\nd', 'e,"f"', 'NA', ' g', 'caf\udce9', 'h\r\ni'])
def test_an_index_keeps_every_name(tmp_path, name):
    t = pd.DataFrame({'ImageId': ['first', name, 'last'], 'path': [f'/x/{name}']*3, 'row': [0, 1, 2], 'ok': [True, False, True]})
    write_index(t, tmp_path/'i.csv')
    back = read_index(tmp_path/'i.csv')
    assert (back.ImageId.tolist() == t.ImageId.tolist() and back.path.tolist() == t.path.tolist() and back.row.tolist() == [0, 1, 2]
        and back.ok.tolist() == [True, False, True])

@pytest.mark.parametrize('odd', ['\ufeff', '\u200b', '\u2003', '\xa0'])
def test_what_has_no_width_is_no_part_of_a_name(tmp_path, odd):
    (tmp_path/'y.csv').write_text(f'\ufeff\ufeffImageId,{odd}EncodedPixels\n{odd}a{odd},5 3\nb,-1\n', encoding='utf-8')
    t = read_labels(tmp_path/'y.csv')
    assert t.ImageId.tolist() == ['a', 'b'] and t.area.tolist() == [3, 0]

def test_a_frame_that_was_named_is_compared_with_the_masks(phantoms, tmp_path):
    y = read_labels(phantoms/'train-rle.csv')
    f = shrunk(y, 256, tmp_path/'y.csv')
    with pytest.raises(LabelError, match=r'repeat every 256 pixels and not every 512; give the frame of the run-lengths \(frame=256\)$'):
        read_labels(f, 512)
    with pytest.raises(LabelError, match='repeat every 1,024 pixels and not every 2,048'): read_labels(phantoms/'train-rle.csv', 2048)

def test_radiographs_of_one_name_in_one_folder_are_refused(phantoms, tmp_path):
    a, b = sorted(phantoms.rglob('*.dcm'))[:2]
    for f, name in ((a, 'x.dcm'), (b, 'x.ima')): shutil.copy(f, tmp_path/name)
    with pytest.raises(PtxError, match='x.dcm, x.ima: radiographs of one name in'): find_siim(tmp_path)

# --- notices

NOTICED = '''import warnings
from pneumothorax.siim import PtxNotice, notice
notice('radiographs are odd', ['a', 'b'])
warnings.warn('of another kind', UserWarning)
with warnings.catch_warnings(record=True) as w:
    warnings.simplefilter('always')
    notice('radiographs are odd', ['c'])
print(w[0].category.__name__, w[0].message)
'''

def test_a_notice_is_its_text_and_other_warnings_stay_what_they_are(tmp_path):
    (tmp_path/'n.py').write_text(NOTICED)
    run = lambda *options: subprocess.run([sys.executable, *options, tmp_path/'n.py'], check=False, capture_output=True, text=True)
    p = run()
    notice, *other = p.stderr.splitlines()
    assert notice == '2 radiographs are odd: a, b' and p.stdout == 'PtxNotice 1 radiograph is odd: c\n'
    assert other == [f"{tmp_path/'n.py'}:4: UserWarning: of another kind", "  warnings.warn('of another kind', UserWarning)"]
    p = run('-W', 'error::UserWarning')
    assert p.returncode == 1 and p.stderr.splitlines()[-1] == 'pneumothorax.siim.PtxNotice: 2 radiographs are odd: a, b'
