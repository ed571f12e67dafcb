"Masks that other tools drew: every real outline through every format and back, and what people get wrong"
import base64
import io
import json
import unicodedata
import warnings

import numpy as np
import pandas as pd
import pydicom
import pytest
from conftest import TINY, ok, ptx
from PIL import Image

from pneumothorax.cache import prepare
from pneumothorax.crossval import cross_validate, predict_oof
from pneumothorax.masks import FaultyMasks, labelled, read_masks
from pneumothorax.phantom import make_phantoms
from pneumothorax.predict import list_images
from pneumothorax.records import open_oof
from pneumothorax.rle import LabelError, PtxError, rle_encode, rles_to_mask
from pneumothorax.siim import PtxNotice, find_siim, read_labels, siim_train
from pneumothorax.source import open_data


def shape_of(t, i): return tuple(t.loc[t.ImageId == i, ['height', 'width']].iloc[0])

def as_png(ms, d):
    for i, m in ms.items(): Image.fromarray(m*255).save(d/f'{i}_mask.png')
def as_palette(ms, d):
    for i, m in ms.items():
        im = Image.fromarray(m, 'P')
        im.putpalette([0, 0, 0, 255, 0, 0])
        im.save(d/f'seg-{i}.gif')
def as_colour(ms, d):
    for k, (i, m) in enumerate(ms.items()):
        # every other on a transparent ground
        Image.fromarray(np.dstack([m*0, m*200, m*30, *([m*255] if k % 2 else [])])).save(d/f'{i}_mask.png')
def as_bits(ms, d):
    for i, m in ms.items(): Image.fromarray(m > 0).save(d/f'{i}.tif')
def as_array(ms, d):
    for i, m in ms.items(): np.save(d/f'{i}.npy', m[None, ..., None] > 0)
def as_nifti(ms, d):
    import nibabel as nib
    for i, m in ms.items(): nib.save(nib.Nifti1Image(m.T[..., None], np.diag([-.2, -.2, 1, 1])), d/f'{i}.nii.gz')
def packed(m):
    from pycocotools import mask as coco
    c = coco.encode(np.asfortranarray(m))
    return {**c, 'counts': c['counts'].decode()}
def coco_of(ms):
    images = [{"id": k+7, "file_name": f'C:\\scans\\{i}.jpeg', "height": m.shape[0], "width": m.shape[1]}
        for k, (i, m) in enumerate(ms.items())]
    notes = [{"id": k, "image_id": k+7, "category_id": 3, "segmentation": packed(m)} for k, m in enumerate(ms.values())]
    return {"images": images, "annotations": notes, "categories": [{"id": 3, "name": 'lesion'}]}
def as_coco(ms, d): (d/'instances.json').write_text(json.dumps(coco_of(ms)))
def as_labelme(ms, d):
    for i, m in ms.items():
        y, x = (np.flatnonzero(m.any(a)) for a in (1, 0))
        f = io.BytesIO()
        Image.fromarray(m[y[0]:y[-1]+1, x[0]:x[-1]+1] > 0).save(f, 'PNG')
        s = {"label": 'PTX', "shape_type": 'mask', "points": [[int(x[0]), int(y[0])], [int(x[-1]), int(y[-1])]],
            "mask": base64.b64encode(f.getvalue()).decode()}
        (d/f'{i}.json').write_text(json.dumps({"imagePath": f'{i}.png', "imageHeight": m.shape[0],
            "imageWidth": m.shape[1], "shapes": [s]}))
def as_table(ms, d):
    as_array(ms, d)
    pd.DataFrame({'Scan': [f'{i}.dcm' for i in ms], 'Outline': [f'{i}.npy' for i in ms]}).to_csv(d/'mine.csv', index=False)

FORMATS = {f.__name__: f for f in (as_png, as_palette, as_colour, as_bits, as_array, as_nifti, as_coco, as_labelme, as_table)}

def written(kind, ms, d):
    d.mkdir()
    FORMATS[kind](ms, d)
    return d/'mine.csv' if kind == 'as_table' else d

@pytest.fixture(scope='module')
def real(shared):
    "Real radiographs, half of them outlined"
    t = siim_train(shared/'siim-small')
    dcm = t.path.astype(str).str.endswith('.dcm')
    return pd.concat([t[dcm], t[~dcm & t.has_ptx].head(12), t[~dcm & ~t.has_ptx].head(6)]).reset_index(drop=True)

@pytest.mark.parametrize('kind', FORMATS)
def test_real_outlines_come_back_to_the_pixel(real, kind, tmp_path):
    ms = {i: rles_to_mask(r) for i, r in zip(real.ImageId, real.rles) if r}
    t = read_masks(written(kind, ms, tmp_path/'m'), dict(zip(real.ImageId, real.path)), empty='negative')
    assert t.ImageId.tolist() == real.ImageId.tolist() and t.has_ptx.tolist() == real.has_ptx.tolist()
    assert [rles_to_mask(r).tobytes() for r in t.rles] == [rles_to_mask(r).tobytes() for r in real.rles]
    assert t.area.tolist() == real.area.tolist()

def seg(xray, mask, path, label='Pneumothorax', uid=None):
    import highdicom as hd
    from pydicom.sr.codedict import codes
    src = pydicom.dcmread(xray)
    if uid: src.SOPInstanceUID = src.file_meta.MediaStorageSOPInstanceUID = uid
    what = [hd.seg.SegmentDescription(k+1, n, codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Pneumothorax,
        hd.seg.SegmentAlgorithmTypeValues.MANUAL) for k, n in enumerate(label.split('|'))]
    m = np.stack([mask, *[1-mask]*(len(what)-1)], -1)[None].astype(np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        hd.seg.Segmentation([src], m, 'BINARY', what, hd.UID(), 1, hd.UID(), 1, 'pencil', 'model', '1', '0').save_as(path)

def test_real_dicom_segmentations(real, tmp_path):
    t = real[real.path.astype(str).str.endswith('.dcm')]
    pos = t[t.has_ptx]
    for k, (p, r) in enumerate(zip(pos.path, pos.rles)): seg(p, rles_to_mask(r), tmp_path/f'{k}.dcm', 'Pneumothorax|rest' if k else 'PTX')
    got = read_masks(f'{tmp_path}:empty=negative', dict(zip(t.ImageId, t.path)))
    assert [rles_to_mask(r).tobytes() for r in got.rles] == [rles_to_mask(r).tobytes() for r in t.rles] and len(pos) > 2
    spacing = [np.prod(pydicom.dcmread(p).PixelSpacing) for p in t.path]
    assert np.allclose(got.area_mm2, t.area*spacing)

@pytest.fixture(scope='module')
def odd(tmp_path_factory):
    "Radiographs of several sizes and spacings, with drawings at their own size"
    d = tmp_path_factory.mktemp('odd')
    rng, ms = np.random.default_rng(0), {}
    for k, (h, w) in enumerate([(300, 200), (256, 320), (1000, 900), (128, 128), (2048, 1500), (200, 200)]):
        i, m = f'IM-{k:04d}', np.zeros((h, w), np.uint8)
        Image.fromarray(rng.integers(0, 255, (h, w), np.uint8)).save(d/f'{i}.png')
        m[h//5:h//3, w//2:w//2+1+w//7] = 1
        ms[i] = m
    return d, ms

@pytest.mark.parametrize('kind', FORMATS)
def test_outlines_of_any_size(odd, kind, tmp_path):
    d, ms = odd
    t = read_masks(written(kind, ms, tmp_path/'m'), d)
    for i, own, h, w in zip(t.ImageId, t.own, t.height, t.width): assert (rles_to_mask(own, (h, w)) == ms[i]).all()
    share = t.area/2**20
    assert np.allclose(share, [ms[i].mean() for i in t.ImageId], atol=.004) and t.area_mm2.isna().all()

def test_several_masks_are_united(odd, tmp_path):
    d, ms = odd
    for i, m in ms.items():
        left = m.copy()
        left[:, m.shape[1]//2+3:] = 0
        Image.fromarray(left).save(tmp_path/f'{i}_1.png')
        Image.fromarray(m-left).save(tmp_path/f'{i}_2.png')
    t = read_masks(tmp_path, d)
    assert t.n_masks.tolist() == [2]*len(t)
    for i, own, h, w in zip(t.ImageId, t.own, t.height, t.width): assert (rles_to_mask(own, (h, w)) == ms[i]).all()

def refused(source, images, *lines, **kw):
    with pytest.raises(PtxError) as e: read_masks(source, images, **kw)
    for line in lines: assert line in str(e.value)
    return str(e.value)

def test_what_people_get_wrong_is_told_at_once(odd, tmp_path):
    d, ms = odd
    a, b, c, s, e, f = ms
    Image.fromarray(ms[a].T*255).save(tmp_path/f'{a}_mask.png')
    Image.fromarray(ms[b][::2, ::2]*255).save(tmp_path/f'{b}_mask.png')
    Image.fromarray(np.dstack([ms[c]*255, 1-ms[c], ms[c]*0])).save(tmp_path/f'{c}_mask.png')
    Image.fromarray(ms[s]*3+1).save(tmp_path/f'{s}_mask.png')
    (tmp_path/f'{e}_mask.png').write_bytes(b'no picture')
    Image.fromarray(ms[f]).save(tmp_path/f'{f}_mask.png')
    np.save(tmp_path/f'{f}_mask.npy', ms[f])
    refused(tmp_path, d, '1 mask has rows and columns exchanged: IM-0000_mask.png: 200×300, radiograph 300×200',
        'another size than their radiograph: IM-0001_mask.png: 128×160',
        'several colours besides 0: IM-0002_mask.png: #000100, #ff0000; say which counts, as in value=#ff0000',
        'several values besides 0: IM-0003_mask.png: 1, 4; say which counts', 'cannot be read as masks: IM-0004_mask.png',
        'there twice: IM-0005_mask.npy, IM-0005_mask.png')
    p = ptx('ptx_import', tmp_path, d, '--out', tmp_path/'y.csv')
    assert p.returncode == 1 and 'Traceback' not in p.stderr and len(p.stderr.strip().splitlines()) == 7 and not (tmp_path/'y.csv').exists()

def test_a_mask_for_no_image_and_an_image_for_no_mask(odd, tmp_path):
    d, ms = odd
    some = dict(list(ms.items())[:3])
    as_png({**some, 'IM-9999': ms['IM-0000']}, tmp_path)
    with pytest.warns(PtxNotice, match='1 mask is of no radiograph here, left out: IM-9999_mask.png'):
        refused(tmp_path, d, '3 radiographs have no mask: IM-0003, IM-0004, IM-0005; if they are healthy say so (empty=negative)')
    with pytest.warns(PtxNotice): assert len(read_masks(tmp_path, d, empty='skip')) == 3
    with pytest.warns(PtxNotice): assert read_masks(tmp_path, d, empty='negative').has_ptx.tolist() == [True]*3+[False]*3
    with pytest.raises(PtxError, match='give one of error, negative, skip'): read_masks(tmp_path, d, empty='no')
    other = {f'x{i}': f for i, f in zip(ms, d.glob('*.png'))}
    with pytest.raises(LabelError, match='the masks are called IM-0000_mask.png, IM-0001_mask.png and 2 more, the radiographs x'):
        read_masks(tmp_path, other)

def test_faults_of_coco_files(odd, tmp_path):
    d, ms = odd
    def told(change, *lines, **kw):
        j = coco_of(ms)
        change(j)
        (tmp_path/'c.json').write_text(json.dumps(j))
        return refused(tmp_path/'c.json', d, *lines, **kw)
    def outside(j):
        for n in j['annotations'][:2]: n['segmentation'] = [[0, 0, 5000, 0, 5000, 10]]
    told(outside, '2 polygons are partly outside their radiograph: ')
    told(lambda j: j['annotations'][0].update(segmentation=[]), '1 annotation has a box and no outline')
    told(lambda j: j['annotations'][0].update(image_id=99), '1 file has annotations of images that they do not list: c.json: image 99')
    told(lambda j: j['categories'].append({"id": 4, "name": 'heart'}),
        "say which count, as in value='lesion', or several as value='lesion|heart'", '(lesion, heart), none of them pneumothorax')
    told(lambda j: j['annotations'][0]['segmentation'].update(size=[3, 3]), 'another size than their image')
    told(lambda j: j['images'][0].update(height=7, width=9) or j['annotations'][0].update(segmentation=packed(np.ones((7, 9), np.uint8))),
        '7×9, radiograph 300×200')
    told(lambda j: j.pop('images'), 'neither COCO nor labelme')
    (tmp_path/'c.json').write_text('{')
    refused(tmp_path/'c.json', d, 'cannot be read as masks')

def test_dicom_objects_that_are_no_segmentation_of_these(phantoms, tmp_path):
    t = siim_train(phantoms)
    pos = t[t.has_ptx].iloc[0]
    images = {pos.ImageId: pos.path}
    seg(pos.path, np.ones((64, 64), np.uint8), tmp_path/'a.dcm', uid='1.2.3.4')
    with pytest.raises(LabelError, match=r'the masks are called a.dcm \(1.2.3.4\)'): read_masks(tmp_path, images)
    seg(pos.path, np.eye(64, dtype=np.uint8), tmp_path/'a.dcm', 'left|right')
    refused(tmp_path, images, 'several labels (left, right), none of them pneumothorax')
    assert (read_masks(f'{tmp_path}:value=right', images).area.item() == 2**20-64*256
        and read_masks(tmp_path, images, value=1).area.item() == 64*256)
    refused(tmp_path, images, "no label value='lung'; there are left, right", value='lung')
    (tmp_path/'a.dcm').write_bytes(pos.path.read_bytes())
    refused(tmp_path, images, 'no segmentations: a.dcm')
    ds = pydicom.dcmread(pos.path)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.481.3'
    ds.save_as(tmp_path/'a.dcm')
    refused(tmp_path, images, 'RT structure sets', 'export a DICOM segmentation or PNG')

def test_tables_that_contradict_themselves(odd, tmp_path):
    d, ms = odd
    as_array(ms, tmp_path)
    def told(*rows, head='image,mask,label,patient'):
        (tmp_path/'t.csv').write_text('\n'.join([head, *rows]))
        return tmp_path/'t.csv'
    rest = [f'IM-000{k},IM-000{k}.npy,1,p{k}' for k in range(1, 6)]
    refused(told('IM-0000,IM-0000.npy,0,p0', *rest), d, '1 mask has a row that says no: IM-0000')
    refused(told('IM-0000,gone.npy,1,p0', *rest), d, 'not there: IM-0000: gone.npy')
    refused(told('IM-0000,IM-0000.npy,1,p0', 'IM-0000,IM-0000.npy,1,p1', *rest), d, '1 radiograph is of several patients: IM-0000: p0, p1')
    refused(told('IM-0000,,1,p0', 'IM-0000,,0,p0', *rest), d, 'said to be positive and to be healthy: IM-0000')
    refused(told('IM-0000,,,p0', *rest), d, '1 radiograph has no mask: IM-0000')
    refused(told('a,b', head='scan,drawing'), d, 'columns scan, drawing; say which one names the file of the mask (mask=NAME)')
    t = read_masks(told('IM-0000,,1,p0', *rest), d)
    assert t.outlined.tolist() == [False]+[True]*5 and t.has_ptx.all() and t.patient_id.tolist() == [f'p{k}' for k in range(6)]
    frame = rle_encode(np.pad(np.ones((9, 9), np.uint8), ((0, 1015), (0, 1015))))
    t = read_masks(told(*(f'{i},{frame}' for i in ms), head='file,rle'), d)
    assert t.area.tolist() == [81]*6 and t.own.tolist() == [['']]*6

@pytest.fixture(scope='module')
def hospital(tmp_path_factory):
    "Phantoms as a hospital keeps them: masks beside the radiographs, in one folder, and no label file"
    d = tmp_path_factory.mktemp('hospital')
    t = siim_train(make_phantoms(d/'sample', n=12, size=64, n_test=4, positive=.5, progress=False))
    (d/'both').mkdir()
    for i, p, r in zip(t.ImageId, t.path, t.rles):
        (d/'both'/f'{i}.dcm').write_bytes(p.read_bytes())
        if r: Image.fromarray(rles_to_mask(r)[8::16, 8::16]*255).save(d/'both'/f'{i} mask.png')
    return d/'both', t

def test_one_folder_for_everything_that_takes_labels(hospital, tmp_path):
    d, t = hospital
    spec = f'{d}:empty=negative'
    data = open_data(d, spec)
    assert data.table.has_ptx.sum() == t.has_ptx.sum() and len(data) == len(t) and data.table.patient_id.notna().all()
    assert prepare(d, tmp_path/'cache', 64, labels=spec, workers=0, progress=False).table.has_ptx.sum() == t.has_ptx.sum()
    with pytest.raises(PtxError, match='a table has its masks already'): prepare(data, tmp_path/'other', 64, labels=spec)
    with pytest.raises(PtxError, match='or masks of another kind'): labelled(d)
    assert '12 radiographs: 6 outlined (6 masks), 6 healthy' in ok('ptx_import', d, d, '--empty', 'negative',
        '--out', tmp_path/'y.csv').stdout
    assert read_labels(tmp_path/'y.csv').area.sum() == data.table.area.sum() and (tmp_path/'y.png').exists()
    ok('ptx_audit', d, '--labels', spec, '--out', tmp_path/'audit')
    ok('ptx_folds', d, '--labels', spec, '--n', '2', '--out', tmp_path/'folds.csv')
    ok('ptx_train', d, '--labels', spec, '--out', tmp_path/'run', *TINY)
    assert json.loads((tmp_path/'run'/'run.json').read_text())['args']['labels'] == spec
    assert 'no such file or folder' in ptx('ptx_train', d, '--labels', f'{tmp_path}/none:empty=negative').stderr

def test_a_cross_validation_finds_its_masks_again(hospital, tmp_path):
    d, t = hospital
    cross_validate(d, tmp_path/'cv', n=2, labels=f'{d}:empty=negative', encoder='mobilenetv3_small_050', weights='none', size=64, bs=4,
        epochs=1, workers=0, progress=False)
    predict_oof(tmp_path/'cv', tmp_path/'again', workers=0, progress=False)
    y, _ = open_oof(tmp_path/'again')
    assert y.has_ptx.sum() == t.has_ptx.sum()

def test_a_table_that_was_read_is_taken_too(hospital):
    d = hospital[0]
    y = read_masks(d, d, empty='negative')
    assert open_data(d, y).table.area.sum() == open_data(d, f'{d}:empty=negative').table.area.sum()
    with pytest.raises(FaultyMasks): read_masks(d, d)

def blob(k=0):
    "A mask that is like none of its mirror images"
    m = np.zeros((40, 40), np.uint8)
    m[4:20, 5+k:9+k] = m[4:8, 5+k:20] = 1
    return m

def scans(d, names):
    for n in names:
        f = d/f'{n}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(len(n)).integers(0, 255, (40, 40), np.uint8)).save(f)
    return d

def test_the_same_names_in_a_folder_for_each_patient(phantoms, tmp_path):
    t = siim_train(phantoms)
    for k, (p, r) in enumerate(zip(t.path[:4], t.rles[:4])):
        for top in ('scans', 'masks'): (tmp_path/top/f'P{k}').mkdir(parents=True)
        (tmp_path/'scans'/f'P{k}'/'IM0001.dcm').write_bytes(p.read_bytes())
        Image.fromarray(rles_to_mask(r)[8::16, 8::16]*255).save(tmp_path/'masks'/f'P{k}'/'IM0001.png')
    pd.DataFrame({'image': [f'P{k}/IM0001.dcm' for k in range(4)],
        'mask': [f'masks/P{k}/IM0001.png' for k in range(4)]}).to_csv(tmp_path/'t.csv', index=False)
    for source in ('masks', 't.csv'):
        got = read_masks(tmp_path/source, tmp_path/'scans').set_index('ImageId')
        assert [(rles_to_mask(got.own[f'P{k}_IM0001'], (64, 64)) == rles_to_mask(t.rles[k])[8::16, 8::16]).all()
            for k in range(4)] == [True]*4
    (tmp_path/'masks'/'P1'/'IM0001.png').unlink()
    assert 'P1_IM0001' in refused(tmp_path/'masks', tmp_path/'scans', '1 radiograph has no mask')
    assert sorted(list_images([tmp_path/'scans'/f'P{k}'/'IM0001.dcm' for k in (0, 1)])) == ['P0_IM0001', 'P1_IM0001']

def test_pictures_of_one_name_are_not_guessed(tmp_path):
    scans(tmp_path/'s', ['A/im', 'B/im'])
    (tmp_path/'m'/'B').mkdir(parents=True)
    Image.fromarray(blob()).save(tmp_path/'m'/'B'/'im.png')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        refused(tmp_path/'m', tmp_path/'s', 'the name of another one', empty='negative')

def test_labels_are_judged_over_all_files(tmp_path):
    scans(tmp_path/'s', 'abc')
    (tmp_path/'m').mkdir()
    for i, label in zip('abc', ('pneumothorax', 'Pneumothorax', 'chest tube')):
        shape = {'label': label, 'points': [[5, 5], [20, 5], [20, 20]]}
        (tmp_path/'m'/f'{i}.json').write_text(json.dumps({'imagePath': f'{i}.png', 'imageHeight': 40, 'imageWidth': 40, 'shapes': [shape]}))
    for source in ('m', 'm:value=pneumothorax'):
        assert read_masks(f'{tmp_path}/{source}', tmp_path/'s').has_ptx.tolist() == [True, True, False]
    assert read_masks(f'{tmp_path}/m:value=chest tube', tmp_path/'s').has_ptx.tolist() == [False, False, True]
    (tmp_path/'m'/'c.json').write_text((tmp_path/'m'/'a.json').read_text())
    refused(tmp_path/'m', tmp_path/'s', 'c.json: a, c')

def test_no_pneumothorax_is_none(tmp_path):
    scans(tmp_path/'s', 'ab')
    notes = [{'id': k, 'image_id': k, 'category_id': k, 'segmentation': [[5, 5, 20, 5, 20, 20]]} for k in (1, 2)]
    images = [{'id': k, 'file_name': f'{i}.png', 'height': 40, 'width': 40} for k, i in ((1, 'a'), (2, 'b'))]
    for other in ('no pneumothorax', 'pneumothorax drain'):
        (tmp_path/'c.json').write_text(json.dumps({'images': images, 'annotations': notes,
            'categories': [{'id': 1, 'name': 'Pneumothorax'}, {'id': 2, 'name': other}]}))
        assert read_masks(tmp_path/'c.json', tmp_path/'s', empty='negative').has_ptx.tolist() == [True, False]

def test_labels_that_are_not_understood(tmp_path):
    scans(tmp_path/'s', 'abcd')
    for said, why in (('unsure', 'b: unsure'), ('ja', 'b: ja'), ('left', 'b: left'), ('x', 'b: x')):
        (tmp_path/'t.csv').write_text(f'image,mask,label\na,-1,no\nb,,{said}\nc,,yes\nd,,negative\n')
        refused(tmp_path/'t.csv', tmp_path/'s', 'not understood', why, empty='negative')
    (tmp_path/'t.csv').write_text('image,mask,diagnosis\na,-1,no\nb,,PTX left\nc,,yes\nd,,normal\n')
    t = read_masks(tmp_path/'t.csv', tmp_path/'s')
    assert (t.has_ptx.tolist(), t.outlined.tolist()) == ([False, True, True, False], [True, False, False, True])
    (tmp_path/'t.csv').write_text('image;mask\na;-1\n')
    refused(tmp_path/'t.csv', tmp_path/'s', 'separated by semicolons')

def test_what_cannot_be_read_is_not_healthy(tmp_path):
    scans(tmp_path/'s', ['a', 'b', 'DEF'])
    (tmp_path/'m').mkdir()
    np.save(tmp_path/'m'/'a.npy', blob())
    np.savez(tmp_path/'m'/'b.npz', blob())
    np.save(tmp_path/'m'/'def_1.npy', blob())
    (tmp_path/'m'/'._a.png').write_bytes(b'of a Mac')
    refused(tmp_path/'m', tmp_path/'s', 'of a kind that cannot be read: b.npz', empty='negative')
    (tmp_path/'m'/'b.npz').unlink()
    assert (read_masks(tmp_path/'m', tmp_path/'s', empty='negative').set_index('ImageId').has_ptx.to_dict()
        == {'a': True, 'b': False, 'DEF': True})

def test_a_number_is_another_radiograph_where_they_are_numbered(tmp_path):
    scans(tmp_path/'s', ['P001', 'P001_1', '1', '2'])
    (tmp_path/'m').mkdir()
    for n in ('P001_2', 'patient_2_left_1', 'P001_1_mask'): np.save(tmp_path/'m'/f'{n}.npy', blob())
    with pytest.warns(PtxNotice, match='2 masks are of no radiograph here'): t = read_masks(tmp_path/'m', tmp_path/'s', empty='skip')
    assert t.ImageId.tolist() == ['P001_1']

def test_axes_of_nifti_that_a_tool_has_turned(tmp_path):
    import nibabel as nib
    scans(tmp_path/'s', 'a')
    (tmp_path/'m').mkdir()
    lps = nib.Nifti1Image(blob().T[..., None], np.diag([-.2, -.2, 1, 1]))
    cases = {'as ITK writes it': lps, 'canonical': nib.as_closest_canonical(lps), 'by hand': nib.Nifti1Image(blob().T, np.eye(4))}
    ornt = nib.orientations.axcodes2ornt('PRS')
    cases['rows first, mirrored'] = lps.as_reoriented(nib.orientations.ornt_transform(nib.orientations.io_orientation(lps.affine), ornt))
    for name, im in cases.items():
        nib.save(im, tmp_path/'m'/'a.nii.gz')
        t = read_masks(tmp_path/'m', tmp_path/'s')
        assert (rles_to_mask(t.own[0], (40, 40)) == blob()).all(), name

def test_palettes(tmp_path):
    scans(tmp_path/'s', 'ab')
    (tmp_path/'m').mkdir()
    Image.fromarray(np.repeat(blob()[..., None]*255, 3, 2)).quantize(2).save(tmp_path/'m'/'a.png')     # white may be 0 of it
    im = Image.fromarray(blob(), 'P')
    im.putpalette([0, 0, 0, 128, 0, 0])
    im.save(tmp_path/'m'/'b.png')
    for own in read_masks(tmp_path/'m', tmp_path/'s').own: assert (rles_to_mask(own, (40, 40)) == blob()).all()

def test_a_mask_that_is_named_twice(tmp_path):
    scans(tmp_path/'s', 'a')
    np.save(tmp_path/'m.npy', blob())
    (tmp_path/'t.csv').write_text('image,mask\na,m.npy\na,m.npy\n')
    ok('ptx_import', tmp_path/'t.csv', tmp_path/'s', '--out', tmp_path/'y.csv')
    assert read_labels(tmp_path/'y.csv').n_masks.tolist() == [1]

def test_folders_whose_names_hold_a_word(tmp_path):
    scans(tmp_path, ['unmasked/a', 'latest scans/b', 'masks/c', 'test/d'])
    files = find_siim(tmp_path, labels='none')
    assert sorted(files.images) == ['a', 'b', 'd'] and files.test == {'d'}

def test_copies_of_one_radiograph_get_its_segmentation(phantoms, tmp_path):
    p = siim_train(phantoms).path[0]
    for n in ('one', 'copy'): (tmp_path/f'{n}.dcm').write_bytes(p.read_bytes())
    (tmp_path/'seg').mkdir()
    seg(p, np.eye(64, dtype=np.uint8), tmp_path/'seg'/'x.dcm')
    assert read_masks(tmp_path/'seg', {n: tmp_path/f'{n}.dcm' for n in ('one', 'copy')}).has_ptx.tolist() == [True, True]

def test_masks_of_copies_are_brought_to_the_size_of_their_radiograph_if_one_says_so(odd, tmp_path):
    d, ms = odd
    for k, (i, m) in enumerate(ms.items()):
        Image.fromarray(np.kron(m, np.ones((2, 2), np.uint8)) if k else m[:, ::2]*255).save(tmp_path/f'{i}.png')
    refused(tmp_path, d, '6 masks have another size', 'a copy of the whole of it (resize=True)')
    with pytest.warns(PtxNotice, match='1 mask has other proportions.*IM-0000'): t = read_masks(f'{tmp_path}:resize=True', d)
    for i, own, h, w in list(zip(t.ImageId, t.own, t.height, t.width))[1:]: assert (rles_to_mask(own, (h, w)) == ms[i]).all()
    assert 'say yes or no' in ptx('ptx_import', f'{tmp_path}:resize=maybe', d, '--out', tmp_path/'l.csv').stderr
    assert '6 outlined' in ok('ptx_import', tmp_path, d, '--out', tmp_path/'l.csv', '--resize').stdout

def labelme(f, label, points, **k):
    f.write_text(json.dumps({"imagePath": f'{f.stem}.png', "imageHeight": 40, "imageWidth": 40,
        "shapes": [{"label": label, "points": points}], **k}))

BOX = [[5, 5], [20, 5], [20, 30]]

def test_labels_with_a_side_count_and_others_are_told(tmp_path):
    scans(tmp_path/'s', 'abcde')
    (tmp_path/'m').mkdir()
    for i, l in zip('abcd', ('pneumothorax', 'Pneumothorax left', 'tension pneumothorax', 'pneumotorax')):
        labelme(tmp_path/'m'/f'{i}.json', l, BOX)
    with pytest.warns(PtxNotice, match='1 label is not counted, only .*: pneumotorax'):
        t = read_masks(tmp_path/'m', tmp_path/'s', empty='negative')
    assert t.has_ptx.tolist() == [True, True, True, False, False]
    for i, l in zip('abcd', ('air left', 'air right', 'heart', 'air left')): labelme(tmp_path/'m'/f'{i}.json', l, BOX)
    refused(tmp_path/'m', tmp_path/'s', "say which count, as in value='air left', or several as value='air left|air right'",
        empty='negative')
    assert (read_masks(tmp_path/'m', tmp_path/'s', value='air left|air right', empty='negative').has_ptx.tolist()
        == [True, True, False, True, False])

def test_masks_that_hold_another_value_are_told(tmp_path):
    scans(tmp_path/'s', 'abc')
    (tmp_path/'m').mkdir()
    for i, v in zip('abc', (1, 255, 0)): Image.fromarray(blob()*np.uint8(v)).save(tmp_path/'m'/f'{i}.png')
    with pytest.warns(PtxNotice, match='1 mask is empty, for what is drawn in them is not value=>127: a.png'):
        t = read_masks(tmp_path/'m', tmp_path/'s', value='>127')
    assert t.has_ptx.tolist() == [False, True, False]
    p = ptx('ptx_import', tmp_path/'m', tmp_path/'s', '--out', tmp_path/'l.csv', '--value', '>127')
    assert "--value '>127': a.png" in p.stderr

def test_pictures_as_drawing_tools_save_them(tmp_path):
    scans(tmp_path/'s', 'abcd')
    (tmp_path/'m').mkdir()
    m = blob()
    white = np.full((*m.shape, 3), 255, np.uint8)
    Image.fromarray(np.dstack([white, m*255])).save(tmp_path/'m'/'a.png')   # white, and all in the alpha channel
    Image.fromarray(np.dstack([white*[1, 0, 0], m*200]).astype(np.uint8)).save(tmp_path/'m'/'b.png')   # red, half transparent
    Image.fromarray(m[..., None]*np.uint8([255, 0, 0])).quantize(2).save(tmp_path/'m'/'c.png')   # a palette in which red may come first
    Image.fromarray(m*255).convert('RGB').save(tmp_path/'m'/'d.png')
    t = read_masks(tmp_path/'m', tmp_path/'s')
    assert all((rles_to_mask(o, m.shape) == m).all() for o in t.own)

def test_whose_mask_it_is(tmp_path):
    for f in ('P1/x1', 'P2/x2', 'P3/x3'): scans(tmp_path/'s'/f[:2], [f[3:]])
    (tmp_path/'m'/'P1').mkdir(parents=True)
    Image.fromarray(blob()*255).save(tmp_path/'m'/'P1'/'mask.png')
    assert read_masks(tmp_path/'m', tmp_path/'s', empty='negative').has_ptx.tolist() == [True, False, False]   # the only one of its folder
    (tmp_path/'m'/'P2').mkdir()
    Image.fromarray(blob()*255).save(tmp_path/'m'/'P2'/'x1.png')
    refused(tmp_path/'m', tmp_path/'s', '1 mask is in the folder of another radiograph', 'x1.png', empty='negative')

def test_overlapping_masks_and_squares_without_axes_are_told(tmp_path):
    import nibabel as nib
    scans(tmp_path/'s', 'ab')
    (tmp_path/'m').mkdir()
    m = blob()
    Image.fromarray(m*255).save(tmp_path/'m'/'a_1.png')
    Image.fromarray(np.roll(m, 2, 0)*255).save(tmp_path/'m'/'a_2.png')
    nib.save(nib.Nifti1Image(m, np.eye(4)), tmp_path/'m'/'b.nii.gz')
    with pytest.warns(PtxNotice) as w: read_masks(tmp_path/'m', tmp_path/'s')
    said = ' '.join(str(o.message) for o in w)
    assert '1 radiograph has masks that overlap' in said and 'read as x first' in said and 'b.nii.gz' in said

def test_odd_outlines_are_faults(tmp_path):
    scans(tmp_path/'s', 'abc')
    (tmp_path/'m').mkdir()
    labelme(tmp_path/'m'/'a.json', 'ptx', [[5, 5.2], [20, 5.2], [20, 5.21]])
    labelme(tmp_path/'m'/'b.json', 'ptx', [[5, float('nan')], [20, 5], [20, 9]])
    labelme(tmp_path/'m'/'c.json', 'ptx', BOX, imageHeight=None)
    refused(tmp_path/'m', tmp_path/'s', 'so thin that they cover no pixel', 'corners without a number', 'without the size of their picture')
    coco = {"images": [{"id": 1, "file_name": 'a.png', "height": 40, "width": 40}], "categories": [{"id": 1, "name": 'pneumothorax'}]}
    for note, why in (({"category_id": 7}, 'categories that they do not list: c.json: category 7'),
            ({}, 'without id, image_id or category_id')):
        (tmp_path/'c.json').write_text(json.dumps({**coco,
            "annotations": [{"id": 1, "image_id": 1, "segmentation": [5, 5, 20, 5, 20, 30], **note}]}))
        refused(tmp_path/'c.json', tmp_path/'s', why, empty='negative')
    (tmp_path/'c.json').write_text(json.dumps({**coco,
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": [5, 5, 20, 5, 20, 30]}]}))
    # a polygon that is not in a list
    assert read_masks(tmp_path/'c.json', tmp_path/'s', empty='negative').has_ptx.tolist() == [True, False, False]

def test_a_table_may_know_who_is_ill_and_no_more(tmp_path):
    scans(tmp_path/'s', 'ab')
    (tmp_path/'t.csv').write_text('image,finding\na,Atelectasis|Pneumothorax\nb,No Finding\n')
    t = read_masks(tmp_path/'t.csv', tmp_path/'s')
    assert (t.has_ptx.tolist(), t.outlined.tolist()) == ([True, False], [False, True])
    (tmp_path/'t.csv').write_text('image,rle\na,1 3\nb,1048570 30\n')
    refused(tmp_path/'t.csv', tmp_path/'s', '1 run-length is not of the 1024×1024 frame: b', 'a run ends at pixel 1,048,600')
    (tmp_path/'t.csv').write_text('filename,file_size,region_shape_attributes\na.png,1,{}\n')
    refused(tmp_path/'t.csv', tmp_path/'s', 'VGG annotator')

def pictures(d, names, shape=(120, 100), endings='.png'):
    "Radiographs of noise, and a mask of the same size for each"
    rng, out = np.random.default_rng(0), {}
    for k, name in enumerate(names):
        f = d/f'{name}{endings}'
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(f)
        out[name] = np.zeros(shape, np.uint8)
        out[name][10+3*k:60, 20:70] = 1
    return out

def test_the_name_of_a_mask_says_more_than_that_of_its_folder(tmp_path):
    "Readers whose folders are numbered, as the radiographs are"
    ms = pictures(tmp_path/'s', [str(k) for k in range(1, 5)])
    for reader, k in (('1', '3'), ('2', '4')):
        (tmp_path/'m'/reader).mkdir(parents=True)
        Image.fromarray(ms[k]*255).save(tmp_path/'m'/reader/f'{k}.png')
    refused(f'{tmp_path/"m"}:empty=negative', tmp_path/'s',
        '2 masks are called after one radiograph and lie in a folder called after another: 1/3.png, 2/4.png')
    for reader in '12': (tmp_path/'m'/reader).rename(tmp_path/'m'/f'reader{reader}')
    t = read_masks(f'{tmp_path/"m"}:empty=negative', tmp_path/'s').set_index('ImageId')
    assert t.has_ptx.to_dict() == {'1': False, '2': False, '3': True, '4': True}
    assert (rles_to_mask(t.own['3'], (120, 100)) == ms['3']).all()

def test_a_mask_of_a_relative_is_of_nobody(tmp_path):
    ms = pictures(tmp_path/'s', ['P1', 'P1_b', 'IM-0031', 'IM-0031-R'])
    (tmp_path/'m').mkdir()
    for name in ('P1_c_mask', 'IM-0031-L_mask', 'P1_b_mask', 'P1_mask_2'):
        Image.fromarray(ms['P1']*255).save(tmp_path/'m'/f'{name}.png')
    with pytest.warns(UserWarning, match='2 masks are of no radiograph here, left out: IM-0031-L_mask.png, P1_c_mask.png'):
        t = read_masks(f'{tmp_path/"m"}:empty=skip', tmp_path/'s')
    assert t.ImageId.tolist() == ['P1', 'P1_b']

def test_umlauts_of_folders_in_two_ways_of_writing(tmp_path):
    for k, name in enumerate(('Müller', 'Mayer')):
        ms = pictures(tmp_path/'s', [f'{unicodedata.normalize("NFC", name)}/IM{k}'])
        d = tmp_path/'m'/unicodedata.normalize('NFD', name)
        d.mkdir(parents=True)
        Image.fromarray(next(iter(ms.values()))*255).save(d/f'IM{k}.png')
    assert read_masks(tmp_path/'m', tmp_path/'s').has_ptx.all()

@pytest.mark.parametrize('low', [1, 255])
def test_sixteen_bits_in_three_channels(tmp_path, low):
    import cv2
    ms = pictures(tmp_path/'s', ['a', 'b'])
    (tmp_path/'m').mkdir()
    for i, m in ms.items():
        cv2.imwrite(str(tmp_path/'m'/f'{i}.{"png" if i == "a" else "tif"}'), np.repeat(m[..., None].astype(np.uint16)*low, 3, 2))
    t = read_masks(tmp_path/'m', tmp_path/'s')
    assert [(rles_to_mask(r, (120, 100)) == ms[i]).all() for i, r in zip(t.ImageId, t.own)] == [True, True]

def test_a_palette_whose_colours_are_alike(tmp_path):
    ms = pictures(tmp_path/'s', ['a'])
    (tmp_path/'m').mkdir()
    im = Image.fromarray(ms['a'], 'P')
    im.putpalette([0]*768)
    im.save(tmp_path/'m'/'a.png')
    assert (rles_to_mask(read_masks(tmp_path/'m', tmp_path/'s').own[0], (120, 100)) == ms['a']).all()

def test_nifti_without_any_axes_is_as_the_array_was_saved(tmp_path):
    import nibabel as nib
    ms = pictures(tmp_path/'s', ['a'])
    (tmp_path/'m').mkdir()
    nib.save(nib.Nifti1Image(ms['a'].T, None), tmp_path/'m'/'a.nii.gz')
    assert (rles_to_mask(read_masks(tmp_path/'m', tmp_path/'s').own[0], (120, 100)) == ms['a']).all()

def test_other_values_from_file_to_file_are_asked_about(tmp_path):
    ms = pictures(tmp_path/'s', ['a', 'b', 'c'])
    (tmp_path/'m').mkdir()
    def save(*values):
        for v, (i, m) in zip(values, ms.items()): Image.fromarray((m*v).astype(np.uint8)).save(tmp_path/'m'/f'{i}.png')
    save(1, 2, 1)
    refused(tmp_path/'m', tmp_path/'s', 'another value in each file: 1 in a.png, 2 in b.png; '
        'say which counts, as in value=2, or several as value=1|2')
    with pytest.warns(UserWarning, match='1 mask is empty'): t = read_masks(f'{tmp_path/"m"}:value=1', tmp_path/'s')
    assert t.has_ptx.tolist() == [True, False, True]
    save(1, 255, 255)
    assert read_masks(tmp_path/'m', tmp_path/'s').has_ptx.all()

def test_several_files_of_a_radiograph_are_told_once(tmp_path):
    ms = pictures(tmp_path/'s', ['a', 'b'])
    (tmp_path/'m').mkdir()
    for i, m in ms.items():
        for k in range(3): Image.fromarray(np.roll(m, 20*k, 1)*255).save(tmp_path/'m'/f'{i}_reader{k}.png')
    with pytest.warns(UserWarning) as said: read_masks(tmp_path/'m', tmp_path/'s')
    said = [str(w.message) for w in said if issubclass(w.category, PtxNotice)]
    assert any(s.startswith('2 radiographs have several files of masks') for s in said)
    assert any(s.startswith('2 radiographs have masks that overlap') and s.endswith(': a, b') for s in said)

def test_coco_files_that_were_cut_or_merged(tmp_path):
    ms = pictures(tmp_path/'s', ['a', 'b'])
    def write(change):
        j = coco_of(ms)
        change(j)
        (tmp_path/'c.json').write_text(json.dumps(j))
    def cut(j): j['annotations'][0]['segmentation']['counts'] = j['annotations'][0]['segmentation']['counts'][:-4]
    def short(j): j['annotations'][1]['segmentation']['counts'] = [10, 20, 30]
    def twice(j): j['images'][1]['id'] = j['images'][0]['id']
    for change, why in ((cut, '1 run-length has another sum than their image has pixels: '), (short, 'b.jpeg; export again'),
            (twice, 'several images of one id: c.json: id 7')):
        write(change)
        refused(tmp_path/'c.json', tmp_path/'s', why)

def test_a_number_is_a_label_before_it_is_an_id(tmp_path):
    ms = pictures(tmp_path/'s', ['a', 'b'])
    j = coco_of(ms)
    j['categories'] = [{'id': 1, 'name': '0'}, {'id': 2, 'name': '1'}]
    for a, k in zip(j['annotations'], (2, 1)): a['category_id'] = k
    (tmp_path/'c.json').write_text(json.dumps(j))
    with pytest.warns(UserWarning, match='only 1: 0'): t = read_masks(f'{tmp_path/"c.json"}:value=1,empty=negative', tmp_path/'s')
    assert t.has_ptx.tolist() == [True, False]
    j['categories'] = [{'id': 1, 'name': 'lung'}, {'id': 2, 'name': 'pneumothorax'}]
    (tmp_path/'c.json').write_text(json.dumps(j))
    with pytest.warns(UserWarning, match='only pneumothorax: lung'):
        t = read_masks(tmp_path/'c.json', tmp_path/'s', value='>127', empty='negative')
    assert t.has_ptx.tolist() == [True, False]

def test_a_flag_of_labelme_is_a_label(tmp_path):
    ms = pictures(tmp_path/'s', ['a', 'b'])
    (tmp_path/'m').mkdir()
    for i, m in ms.items():
        h, w = m.shape
        j = {'shapes': [], 'flags': {'pneumothorax': i == 'a', 'rotated': True}, 'imagePath': f'{i}.png', 'imageHeight': h, 'imageWidth': w}
        (tmp_path/'m'/f'{i}.json').write_text(json.dumps(j))
    t = read_masks(tmp_path/'m', tmp_path/'s')
    assert t.has_ptx.tolist() == [True, False] and t.outlined.tolist() == [False, True]

@pytest.mark.parametrize('rows, why', [
    ('a,PTX-,\nb,no,', '1 label is not understood: a: PTX-'), ('a,Pneumothorax: 0,\nb,no,', 'a: Pneumothorax: 0'),
    ('a,pneumothorax|no finding,\nb,no,', 'a: pneumothorax|no finding'), ('a,,-1\na,,0 5\nb,no,', '1 mask has a row that says no: a')])
def test_tables_that_say_two_things(tmp_path, rows, why):
    pictures(tmp_path/'s', ['a', 'b'])
    (tmp_path/'t.csv').write_text(f'image,label,mask\n{rows}\n')
    refused(tmp_path/'t.csv', tmp_path/'s', why)

def test_run_lengths_of_another_frame_are_refused_in_any_table(tmp_path):
    rows = []
    for k in range(40):
        m = np.zeros((256, 256), np.uint8)
        m[20+3*k:60+3*k, 30+2*k:90+2*k] = 1
        rows.append(f'im{k:02},{rle_encode(m)}')
    pictures(tmp_path/'s', [f'im{k:02}' for k in range(40)], (256, 256))
    for head in ('ImageId,EncodedPixels', 'image,rle'):
        (tmp_path/'t.csv').write_text('\n'.join([head, *rows]))
        with pytest.raises(LabelError, match='as if they were made for a frame 256 pixels high; write the run-lengths of the 1024'):
            read_masks(tmp_path/'t.csv', tmp_path/'s')

def test_segmentations_and_radiographs_of_one_uid(real, tmp_path):
    "Copies share it; other pictures must not"
    t = real[real.path.astype(str).str.endswith('.dcm')]
    (tmp_path/'s').mkdir()
    for k, p in enumerate(t.path[:2]):
        ds = pydicom.dcmread(p)
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = '1.2.3'
        ds.save_as(tmp_path/'s'/f'{k}.dcm')
    (tmp_path/'m').mkdir()
    seg(tmp_path/'s'/'0.dcm', rles_to_mask(t.rles[t.has_ptx].iloc[0]), tmp_path/'m'/'a.dcm', 'PTX')
    refused(f'{tmp_path/"m"}:empty=negative', tmp_path/'s', '1 segmentation has a UID that different radiographs share: 0, 1')

def test_a_radiograph_without_a_frame_of_its_segmentation_is_asked_about(real, tmp_path):
    from pydicom.dataset import Dataset
    t = real[real.path.astype(str).str.endswith('.dcm')]
    pos = t[t.has_ptx].iloc[0]
    other = t[t.ImageId != pos.ImageId].iloc[0]
    seg(pos.path, rles_to_mask(pos.rles), tmp_path/'a.dcm', 'PTX')
    ds, o, also = pydicom.dcmread(tmp_path/'a.dcm'), pydicom.dcmread(other.path), Dataset()
    also.ReferencedSOPClassUID, also.ReferencedSOPInstanceUID = o.SOPClassUID, o.SOPInstanceUID
    ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence.append(also)
    ds.save_as(tmp_path/'a.dcm')
    refused(tmp_path/'a.dcm', {pos.ImageId: pos.path, other.ImageId: other.path}, f'1 radiograph has no mask: {other.ImageId}')
