"Masks on their way out: every real radiograph in every format and back, what cannot be referred to, the commands"
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pydicom
import pytest
from conftest import TINY, ok, ptx
from PIL import Image

from pneumothorax.chest import describe_mask
from pneumothorax.dicom import read_xray
from pneumothorax.export import FORMATS, export_masks
from pneumothorax.masks import read_masks
from pneumothorax.outlines import masks_of
from pneumothorax.records import FORMAT, to_bytes
from pneumothorax.rle import PtxError, rle_encode, rles_to_mask
from pneumothorax.show import outline
from pneumothorax.siim import PtxNotice, read_table, siim_train, write_index


def predictions(out, t, size=256, soft=False):
    "A folder of predictions that believe the truth"
    import cv2
    maps = np.stack([to_bytes(cv2.resize(rles_to_mask(r).astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)) for r in t.rles])
    out.mkdir(parents=True)
    np.save(out/'maps.npy', maps)
    (out/'predict.json').write_text(json.dumps({'format': FORMAT, 'run': 'truth'}))
    write_index(pd.DataFrame({'ImageId': t.ImageId, 'path': t.path.astype(str), 'row': range(len(t)), 'max_prob': maps.max((1, 2))/255}),
        out/'index.csv')
    write_index(pd.DataFrame(columns=['ImageId', 'path', 'error']), out/'failed.csv')
    return out

@pytest.fixture(scope='module')
def real(shared, tmp_path_factory):
    "The real DICOM radiographs, a prediction of them, and its masks"
    t = siim_train(shared/'siim-small')
    t = t[t.path.astype(str).str.endswith('.dcm')].reset_index(drop=True)
    pred = predictions(tmp_path_factory.mktemp('real')/'pred', t)
    return t, pred, {i: m for i, _, m in masks_of(pred, '.5,0,.5', 'original')}

@pytest.mark.parametrize('kind', ['png', 'npy', 'nifti', 'coco', 'dicomseg'])
def test_real_masks_in_each_format_and_back(real, kind, tmp_path):
    t, pred, masks = real
    got = export_masks(pred, tmp_path/kind, kind, '.5,0,.5', progress=False)
    assert got.positive.sum() == t.has_ptx.sum() > 2
    back = read_masks(f'{tmp_path/kind}:empty=negative', dict(zip(t.ImageId, t.path)))
    for i, own, h, w in zip(back.ImageId, back.own, back.height, back.width): assert (rles_to_mask(own, (h, w)) == masks[i]).all()
    iou = [(rles_to_mask(r)&masks[i]).sum()/(rles_to_mask(r)|masks[i]).sum() for i, r in zip(t.ImageId, t.rles) if r]
    assert min(iou) > .6     # they were cut out of maps of 256 pixels

def test_dicom_objects_say_what_they_are(real, tmp_path):
    t, pred, masks = real
    for kind in ('dicomseg', 'sc'): export_masks(pred, tmp_path/kind, kind, '.5,0,.5', progress=False)
    sources = {pydicom.dcmread(p).SOPInstanceUID: pydicom.dcmread(p) for p in t.path}
    for f in (tmp_path/'dicomseg').glob('*.dcm'):
        ds = pydicom.dcmread(f)
        uid = ds.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        src = sources[uid]
        assert ((ds.StudyInstanceUID, ds.PatientID) == (src.StudyInstanceUID, src.PatientID)
            and ds.SeriesInstanceUID != src.SeriesInstanceUID)
        s = ds.SegmentSequence[0]
        assert s.SegmentedPropertyTypeCodeSequence[0].CodeValue == '36118008' and s.SegmentAlgorithmType == 'AUTOMATIC'
        assert (s.SegmentationAlgorithmIdentificationSequence[0].AlgorithmName == 'pneumothorax'
            and 'research use only' in ds.SeriesDescription)
        assert ds.pixel_array.sum() == masks[f.stem].sum()
        assert re.fullmatch(r'\d{3}Y', ds.PatientAge) and ds.ContentCreatorName == '' and 'PatientOrientation' in ds
    for f in (tmp_path/'sc').glob('*.dcm'):
        ds = pydicom.dcmread(f)
        assert (ds.BurnedInAnnotation == 'YES' and ds.StudyInstanceUID == sources[f.stem].StudyInstanceUID
            and ds.pixel_array.shape[1:] == (1024, 3) and ds.pixel_array.shape[0] > 1024)
    assert len(list((tmp_path/'sc').glob('*.dcm'))) == t.has_ptx.sum()

def test_the_table_of_real_radiographs(real, tmp_path):
    t, pred, masks = real
    ok('ptx_export', pred, '--as', 'csv', '--out', tmp_path/'csv', '--triplet', '.5,0,.5')
    got = pd.read_csv(tmp_path/'csv'/'masks.csv')
    assert got.area.tolist() == [int(masks[i].sum()) for i in got.ImageId]
    spacing = [np.prod(pydicom.dcmread(p).PixelSpacing) for p in t.path]
    assert np.allclose(got.area_mm2, got.area*spacing, atol=.06)
    assert got.side[got.positive].isin(['left', 'right', 'both']).all() and got.side[~got.positive].isna().all()
    assert got.reason.str.startswith('triplet: ').all()

def test_sides_follow_the_picture(real, tmp_path):
    "A mirrored radiograph has its pneumothorax on the other side, and a header that says so has it on the same"
    t, _, _ = real
    pos = t[t.has_ptx].reset_index(drop=True)
    def sides(change):
        rows = []
        for k, (p, r) in enumerate(zip(pos.path, pos.rles)):
            ds = pydicom.dcmread(p)
            ds.decompress()
            a, m = ds.pixel_array, rles_to_mask(r)
            if change: ds.PixelData, m = np.ascontiguousarray(a[:, ::-1]).tobytes(), m[:, ::-1]
            if change == 'told': ds.PatientOrientation = ['R', 'F']
            f = tmp_path/f'{change}-{k}.dcm'
            ds.save_as(f)
            rows.append(describe_mask(m, read_xray(f), f)['side'])
        return rows
    as_is, other, told = sides(''), sides('mirrored'), sides('told')
    swap = {'left': 'right', 'right': 'left', 'both': 'both'}
    assert other == [swap[s] for s in as_is] and told == as_is and 'left' in as_is and 'right' in as_is

def test_what_dicom_cannot_refer_to(shared, tmp_path):
    stage2 = sorted((shared/'siim-small'/'dicom-images-test').glob('*.dcm'))[:2]
    png = next((shared/'siim-small'/'png-images-train').glob('*.png'))
    t = pd.DataFrame({'ImageId': ['a', 'b', 'c'], 'path': [*stage2, png], 'rles': [['0 99999']]*3})
    pred = predictions(tmp_path/'pred', t)
    for kind in ('dicomseg', 'sc'):
        with pytest.raises(PtxError,
                match='3 radiographs have no place in DICOM, so nothing can refer to them: .*no valid StudyInstanceUID.*is no DICOM file'):
            export_masks(pred, tmp_path/'x', kind)
        assert not (tmp_path/'x').exists()
    assert export_masks(pred, tmp_path/'png', 'png', '.5,0,.5', progress=False).positive.all()

def test_radiographs_of_any_shape(tmp_path):
    rng, rows = np.random.default_rng(0), []
    for k, (h, w) in enumerate([(300, 200), (2048, 1500), (90, 400)]):
        Image.fromarray(rng.integers(0, 255, (h, w), np.uint8)).save(tmp_path/f'{k}.png')
        m = np.zeros((1024, 1024), np.uint8)
        m[100:400, 200:500] = 1
        rows.append((str(k), tmp_path/f'{k}.png', [rle_encode(m)]))
    pred = predictions(tmp_path/'pred', pd.DataFrame(rows, columns=['ImageId', 'path', 'rles']))
    for kind in ('png', 'coco', 'nifti', 'csv'): export_masks(pred, tmp_path/kind, kind, '.5,0,.5', progress=False)
    for kind in ('png', 'coco', 'nifti'):
        t = read_masks(tmp_path/kind, {k: p for k, p, _ in rows})
        assert np.allclose(t.area, 300*300, rtol=.03) and list(zip(t.height, t.width)) == [(300, 200), (2048, 1500), (90, 400)]

@pytest.fixture(scope='module')
def seen(tiny_run, phantoms, tmp_path_factory):
    d = tmp_path_factory.mktemp('seen')
    images = d/'images'
    shutil.copytree(phantoms/'dicom-images-test', images)
    (images/'broken.dcm').write_bytes(b'no radiograph')
    ok('ptx_predict', tiny_run, images, '--out', d/'pred', '--workers', '0')
    return d/'pred', images

@pytest.mark.parametrize('kind', FORMATS)
def test_the_command(seen, kind, tmp_path):
    pred = seen[0]
    p = ok('ptx_export', pred, '--as', kind, '--out', tmp_path/'out', '--thresh', '.001', '--min-area', '0')
    assert 'could not be read' in p.stderr and f'written as {kind}' in p.stdout
    assert json.loads((tmp_path/'out'/'export.json').read_text())['kind'] == kind
    again = ptx('ptx_export', pred, '--as', kind, '--out', tmp_path/'out')
    assert again.returncode == 1 and 'not an empty folder' in again.stderr

def test_an_export_and_a_submission_agree(seen, tmp_path):
    pred, _ = seen
    how = ['--triplet', '.001,5,.002']
    ok('ptx_submit', pred, '--out', tmp_path/'s.csv', *how, '--blank')
    ok('ptx_export', pred, '--as', 'csv', '--out', tmp_path/'t', *how)
    s, t = read_table(tmp_path/'s.csv').groupby('ImageId').EncodedPixels.first(), pd.read_csv(tmp_path/'t'/'masks.csv').set_index('ImageId')
    assert ((s != '-1') == t.positive.reindex(s.index).fillna(False).astype(bool)).all()

def test_radiographs_that_went_away(seen, tmp_path):
    pred = seen[0]
    moved = tmp_path/'pred'
    shutil.copytree(pred, moved)
    t = pd.read_csv(moved/'index.csv')
    t['path'] = t.path.str.replace('images', 'elsewhere')
    t.to_csv(moved/'index.csv', index=False)
    p = ptx('ptx_export', moved, '--out', tmp_path/'out')
    assert p.returncode == 1 and 'are no longer there' in p.stderr and not (tmp_path/'out').exists()

def test_show(seen, tiny_run, tmp_path):
    _, images = seen
    one = next(f for f in sorted(images.rglob('*.dcm')) if f.name != 'broken.dcm')
    p = ok('ptx_show', tiny_run, one, '--out', tmp_path/'one')
    assert 'research use only' in p.stdout and 'chosen on no data' in p.stdout
    with Image.open(tmp_path/'one'/f'{one.stem}.png') as im: assert min(im.size) > 500 and abs(im.info['dpi'][0]-150) < 1
    p = ok('ptx_show', tiny_run, images, '--out', tmp_path/'all', '--triplet', '.5,0,.5')
    assert len(list((tmp_path/'all').glob('*.png'))) == 4 and 'broken' in p.stderr and '(given)' in p.stdout
    for k in (1, 2): (tmp_path/f'P{k}').mkdir()
    both = sorted(f for f in images.rglob('*.dcm') if f.name != 'broken.dcm')[:2]
    for k, f in enumerate(both): (tmp_path/f'P{k+1}'/'IM.dcm').write_bytes(f.read_bytes())
    ok('ptx_show', tiny_run, tiny_run, tmp_path/'P1'/'IM.dcm', tmp_path/'P2'/'IM.dcm', '--out', tmp_path/'two')
    assert sorted(f.name for f in (tmp_path/'two').iterdir()) == ['P1_IM.png', 'P2_IM.png']
    bad = ptx('ptx_show', tiny_run, images/'broken.dcm')
    assert bad.returncode == 1 and 'broken' in bad.stderr and 'Traceback' not in bad.stderr
    assert ptx('ptx_show', tiny_run).returncode == 1

def test_an_outline_in_python(tiny_run, phantoms):
    f = next((phantoms/'dicom-images-test').rglob('*.dcm'))
    o = outline(tiny_run, f)
    assert o.mask.shape == o.x.shape and o.map.shape == (64, 64) and 0 <= o.prob <= 1
    assert np.isnan(o.extent) or 0 <= o.extent <= 1
    assert o.area_mm2 == 0 or o.positive
    with pytest.raises(PtxError, match='none.dcm'): outline(tiny_run, f.parent/'none.dcm')

def test_pixels_that_are_not_square(real, tiny_run, tmp_path):
    "A capture and a picture have the shape of the patient; the segmentation that of the file"
    t, _, _ = real
    ds = pydicom.dcmread(t.path[0])
    ds.decompress()
    ds.PixelData, ds.Rows, ds.PixelSpacing = np.ascontiguousarray(ds.pixel_array[::2]).tobytes(), 512, [.4, .2]
    ds.save_as(tmp_path/'flat.dcm')
    one = pd.DataFrame({'ImageId': ['flat'], 'path': [tmp_path/'flat.dcm'],
        'rles': [[rle_encode(np.pad(np.ones((200, 200), np.uint8), 412))]]})
    pred = predictions(tmp_path/'pred', one)
    for kind in ('sc', 'dicomseg'): export_masks(pred, tmp_path/kind, kind, '.5,0,.5', progress=False)
    sc = pydicom.dcmread(tmp_path/'sc'/'flat.dcm')
    assert sc.Columns == 1024 and sc.Rows > 1024 and sc.SourceImageSequence[0].ReferencedSOPInstanceUID == ds.SOPInstanceUID
    assert pydicom.dcmread(tmp_path/'dicomseg'/'flat.dcm').pixel_array.shape == (512, 1024)
    w, h = outline(tiny_run, tmp_path/'flat.dcm').show().get_size_inches()
    assert 1.6 < w/h < 2.4     # two squares side by side, and words

@pytest.mark.parametrize(('rows', 'columns', 'view', 'said'), [('A', 'F', '', 'a lateral view'), ('L', 'F', 'LL', 'a lateral view'),
    ('F', 'L', '', 'lies on its side'), ('L', 'H', '', 'upside down')])
def test_a_side_that_cannot_be_said(real, rows, columns, view, said, tmp_path):
    t, _, _ = real
    pos = t[t.has_ptx].iloc[0]
    ds = pydicom.dcmread(pos.path)
    ds.PatientOrientation, ds.ViewPosition = [rows, columns], view
    ds.save_as(tmp_path/'x.dcm')
    told = describe_mask(rles_to_mask(pos.rles), read_xray(tmp_path/'x.dcm'), tmp_path/'x.dcm')
    assert said in told['remarks'] and (told['side'] == '') == (said != 'upside down')

def test_a_cross_validation_that_learnt_nothing_shows_something(phantoms, tmp_path):
    ok('ptx_folds', phantoms, '--n', '2', '--out', tmp_path/'f.csv')
    ok('ptx_train', phantoms, '--folds', tmp_path/'f.csv', '--out', tmp_path/'cv', *TINY)
    p = ok('ptx_show', tmp_path/'cv', next((phantoms/'dicom-images-test').rglob('*.dcm')), '--out', tmp_path/'h')
    assert 'chosen on no data, for' in p.stdout or 'out of fold' in p.stdout

def copies(t, d, change=lambda k, ds: None):
    "Positives as files IM0001.dcm in a folder for each patient, and a prediction of them"
    rows = t[t.has_ptx].head(2).reset_index(drop=True)
    for k, p in enumerate(rows.path):
        f = d/'s'/f'P{k}'/'IM0001.dcm'
        f.parent.mkdir(parents=True)
        ds = pydicom.dcmread(p)
        change(k, ds)
        ds.save_as(f)
        rows.loc[k, ['ImageId', 'path']] = [f'P{k}_IM0001', f]
    return rows, predictions(d/'pred', rows)

def test_files_of_one_name_keep_their_folder(real, tmp_path):
    rows, pred = copies(real[0], tmp_path)
    export_masks(pred, tmp_path/'coco', 'coco', '.5,0,.5', progress=False)
    assert [i['file_name'] for i in json.loads((tmp_path/'coco'/'masks.json').read_text())['images']] == ['P0/IM0001.dcm', 'P1/IM0001.dcm']
    t = read_masks(tmp_path/'coco', tmp_path/'s')
    assert t.ImageId.tolist() == rows.ImageId.tolist() and t.has_ptx.all()

def test_deidentified_files_are_referred_to(real, tmp_path):
    def change(k, ds):
        for a in ('PatientBirthDate', 'StudyTime', 'AccessionNumber', 'PatientName')[:4*(k+1)]:
            if a in ds: delattr(ds, a)
        ds.StudyDate = '2024-01-01'
    rows, pred = copies(real[0], tmp_path, change)
    for kind in ('dicomseg', 'sc'): assert export_masks(pred, tmp_path/kind, kind, '.5,0,.5', progress=False).file.ne('').all()
    assert read_masks(tmp_path/'dicomseg', dict(zip(rows.ImageId, rows.path))).has_ptx.all()
    pd.read_csv(pred/'index.csv').assign(path=[str(rows.path[0]), str(tmp_path/'x.png')]).to_csv(pred/'index.csv', index=False)
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path/'x.png')
    with pytest.warns(UserWarning, match=r'1 radiograph has no place in DICOM.*x.png \(is no DICOM file\)'):
        got = export_masks(pred, tmp_path/'some', 'dicomseg', '.5,0,.5', progress=False)
    assert got.file.ne('').tolist() == [True, False]

def test_one_odd_header_does_not_stop_the_others(real, tmp_path):
    def change(k, ds):
        if k: ds.PatientSex = 'W'
        ds.PixelSpacing, ds.ImagerPixelSpacing = [0, 0], [.2, .2]
    _, pred = copies(real[0], tmp_path, change)
    with pytest.warns(UserWarning, match=r'1 header cannot be repeated .*IM0001.dcm \(.*W'):
        got = export_masks(pred, tmp_path/'seg', 'dicomseg', '.5,0,.5', progress=False)
    assert got.file.ne('').tolist() == [True, False] and [f.name for f in (tmp_path/'seg').glob('*.dcm')] == [got.file[0]]
    shared = pydicom.dcmread(tmp_path/'seg'/got.file[0]).SharedFunctionalGroupsSequence[0]
    assert shared.PixelMeasuresSequence[0].PixelSpacing == [.2, .2]
    assert export_masks(pred, tmp_path/'csv', 'csv', '.5,0,.5', progress=False).area_mm2.gt(0).all()

def test_objects_of_one_uid_and_radiographs_that_were_replaced(real, tmp_path):
    def same(k, ds): ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = '1.2.3'
    _, pred = copies(real[0], tmp_path, same)
    os.utime(pred/'predict.json', (0, 0))
    with pytest.warns(UserWarning) as said: got = export_masks(pred, tmp_path/'seg', 'dicomseg', '.5,0,.5', progress=False)
    said = ' '.join(str(w.message) for w in said)
    assert 'IM0001.dcm (has the UID of IM0001.dcm)' in said and '2 radiographs were written after they were predicted' in said
    assert got.file.ne('').tolist() == [True, False]

def test_a_picture_does_not_replace_the_radiograph(real, tiny_run, tmp_path):
    Image.fromarray((255*read_xray(real[0].path[0])).astype(np.uint8)).save(tmp_path/'chest.png')
    before = (tmp_path/'chest.png').read_bytes()
    p = ptx('ptx_show', tiny_run, tmp_path/'chest.png', '--out', tmp_path)
    assert p.returncode and 'the picture would replace' in p.stderr and (tmp_path/'chest.png').read_bytes() == before

def test_what_is_about_a_radiograph_is_none(real, tmp_path):
    "Segmentations and captures are not predicted as if they were chests; probabilities beside masks are no masks"
    t, pred, _ = real
    for kind in ('dicomseg', 'sc'):
        export_masks(pred, tmp_path/kind, kind, '.5,0,.5', progress=False)
        with pytest.raises(PtxError, match='a segmentation, no radiograph' if kind == 'dicomseg' else 'with an outline drawn into it'):
            read_xray(next((tmp_path/kind).glob('*.dcm')))
    export_masks(pred, tmp_path/'nii', 'nifti', '.5,0,.5', maps=True, progress=False)
    with pytest.warns(UserWarning, match='probabilities beside their masks'):
        back = read_masks(tmp_path/'nii', dict(zip(t.ImageId, t.path)))
    assert back.has_ptx.tolist() == t.has_ptx.tolist()

@pytest.mark.slow
def test_a_validator_finds_no_error(real, tmp_path):
    "dciodvfy of the Debian package dicom3tools"
    if not shutil.which('dciodvfy'): pytest.skip('no dciodvfy; it is in the Debian package dicom3tools')
    for kind in ('dicomseg', 'sc'):
        export_masks(real[1], tmp_path/kind, kind, '.5,0,.5', progress=False)
        for f in (tmp_path/kind).glob('*.dcm'):
            said = subprocess.run(['dciodvfy', f], capture_output=True, text=True, check=False).stderr
            assert 'Error' not in said and ('Segmentation' if kind == 'dicomseg' else 'SCImage') in said, said

# --- a network of phantoms

DOES_NOT_HOLD = 'means nothing: trained on synthetic radiographs only'

@pytest.fixture(scope='module')
def alien(tiny_run, phantoms, tmp_path_factory):
    "A phantom, the same as a radiograph that is none, and predictions of both by a run of phantoms"
    d = tmp_path_factory.mktemp('alien')
    ds = pydicom.dcmread(next((phantoms/'dicom-images-test').rglob('*.dcm')))
    for name, kind in (('phantom', 'YES'), ('other', 'NO')):
        ds.SyntheticData, ds.SOPInstanceUID = kind, ds.SOPInstanceUID+'.1'
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.save_as(d/f'{name}.dcm')
    ok('ptx_predict', tiny_run, d, '--out', d/'pred', '--workers', 0)
    return d

def test_a_picture_of_a_network_of_phantoms_says_that_it_means_nothing(alien, tiny_run, capsys):
    with pytest.warns(PtxNotice, match='synthetic radiographs only'): o = outline(tiny_run, alien/'other.dcm')
    fig = o.show()
    fig.canvas.draw()
    title, (wide, high) = fig._suptitle, fig.get_size_inches()*fig.dpi
    box = title.get_window_extent()
    assert str(o).splitlines()[1] == o.caution and ' '.join(title.get_text().split()) == o.caution and o.caution.startswith(DOES_NOT_HOLD)
    assert box.x0 >= 0 and box.x1 <= wide and box.y1 <= high and title.get_fontsize() >= 11     # all of it, and readable
    o = outline(tiny_run, alien/'phantom.dcm')
    assert not o.caution and o.show()._suptitle is None

def test_exports_of_a_network_of_phantoms_say_that_they_mean_nothing(alien, tmp_path, monkeypatch):
    import pneumothorax.export as e
    said, burnt = {}, e.burnt
    monkeypatch.setattr(e, 'burnt', lambda x, mask, lines: said.update({len(said): lines}) or burnt(x, mask, lines))
    for kind in FORMATS:
        with pytest.warns(PtxNotice, match='1 radiograph has masks that mean nothing, .*: other'):
            t = export_masks(alien/'pred', tmp_path/kind, kind, '.001,0,.001', progress=False)
        assert json.loads((tmp_path/kind/'export.json').read_text())['mean_nothing'] == ['other']
    assert sorted(lines[0].startswith(DOES_NOT_HOLD) for lines in said.values()) == [False, True]
    notes = {i: pydicom.dcmread(tmp_path/'dicomseg'/f'{i}.dcm').ContentDescription for i in ('other', 'phantom')}
    assert notes['other'] == DOES_NOT_HOLD and notes['phantom'].startswith('automatic outline')
    assert DOES_NOT_HOLD in json.loads((tmp_path/'coco'/'masks.json').read_text())['info']['description']
    assert t.set_index('ImageId').remarks.str.startswith(DOES_NOT_HOLD).to_dict() == {'other': True, 'phantom': False}

def test_pages_and_sheets_of_a_network_of_phantoms_say_that_they_mean_nothing(alien, tiny_run, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    from pneumothorax.reading import ReadingRoom
    from pneumothorax.report import report
    from pneumothorax.submission import contact_sheet, write_submission
    page = report(alien/'pred', out=tmp_path/'r.html').read_text()
    assert 'was trained on synthetic radiographs only, and 1 of these 2 radiographs' in page
    write_submission(alien/'pred', tmp_path/'s.csv', decision='.001,0,.001', blank=True)
    titles, plain = [], Figure.suptitle
    monkeypatch.setattr(Figure, 'suptitle', lambda self, t, **kw: titles.append(t) or plain(self, t, **kw))
    contact_sheet(tmp_path/'s.csv', alien/'pred', tmp_path/'s.png')
    assert ' '.join(titles[0].split()).startswith(DOES_NOT_HOLD)
    facts = {}
    for i in ('other', 'phantom'):
        r = (room := ReadingRoom(tiny_run, device='cpu')).read((alien/f'{i}.dcm').read_bytes(), f'{i}.dcm')
        facts[i] = r.facts('.5,0,.5')
        room.close(r)
    assert facts['other']['beware'].startswith(DOES_NOT_HOLD) and 'beware' not in facts['phantom']

def test_a_caption_says_both_sides_once(alien):
    from pneumothorax.export import _caption
    x = read_xray(alien/'phantom.dcm')
    mask = np.zeros(x.shape, np.uint8)
    mask[20:30, 8:16] = mask[20:30, -16:-8] = 1
    told = describe_mask(mask, x, alien/'phantom.dcm')
    assert told['side'] == 'both' and np.isnan(told['extent']) and _caption(told).count('both sides') == 1
