"Folds from the command line, faulty tables of folds and patients, scale, and repeats among files of every kind"
import subprocess
import sys

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest
from conftest import ok, ptx

from pneumothorax.dicom import read_xray
from pneumothorax.folds import (
    FoldError,
    check_folds,
    duplicate_groups,
    fold_balance,
    fold_strata,
    leakage,
    local_contrast,
    make_folds,
    near_duplicates,
    nearest_pairs,
    patient_groups,
    read_folds,
    spread,
    thumbnail,
)
from pneumothorax.rle import LabelError
from pneumothorax.scoring import score_report
from pneumothorax.siim import PtxNotice, find_patients, find_siim, read_labels, read_patients, siim_train

# --- the command

def test_a_folder_a_cache_and_a_label_file_give_the_same_folds(phantoms, tmp_path):
    p = ok('ptx_folds', phantoms, '--out', tmp_path/'a.csv', '--n', 2)
    assert 'share a patient with training: 0.0% of the validation images' in p.stdout and 'median_area' in p.stdout
    ok('ptx_prepare', phantoms, tmp_path/'cache', '--size', 64, '--workers', 0)
    ok('ptx_folds', tmp_path/'cache', '--out', tmp_path/'b.csv', '--n', 2)
    ok('ptx_folds', phantoms/'train-rle.csv', '--patients', phantoms/'metadata.csv', '--out', tmp_path/'c.csv', '--n', 2)
    assert len({(tmp_path/f'{k}.csv').read_bytes() for k in 'abc'}) == 1
    assert set(read_folds(tmp_path/'a.csv', siim_train(phantoms).ImageId).fold) == {0, 1}

def test_without_patients_leakage_is_unknown(phantoms, tmp_path):
    p = ok('ptx_folds', phantoms/'train-rle.csv', '--out', tmp_path/'f.csv', '--n', 2)
    assert 'leakage: unknown' in p.stdout and '%' not in p.stdout.split('leakage')[1]
    assert '12 images of unknown patient' in p.stderr

def test_repeats_stand_in_for_patients(phantoms, tmp_path):
    df = siim_train(phantoms)
    (tmp_path/'set').mkdir()
    for i, f in zip(df.ImageId, df.path): cv2.imwrite(str(tmp_path/'set'/f'{i}.png'), np.rint(read_xray(f)*255).astype(np.uint8))
    twin = df.ImageId[0]
    cv2.imwrite(str(tmp_path/'set'/'twin.png'), np.rint(255-read_xray(df.path[0])*200).astype(np.uint8))
    (tmp_path/'set'/'train-rle.csv').write_text((phantoms/'train-rle.csv').read_text()+'twin, -1\n')
    p = ok('ptx_folds', tmp_path/'set', '--out', tmp_path/'f.csv', '--n', 2, '--near_duplicates')
    assert 'pairs of radiographs that look like the same chest, kept together' in p.stdout and 'leakage: unknown' in p.stdout
    assert 'repeats that were found are kept together, the rest is unknown' in p.stdout and 'look for repeats' not in p.stdout
    f = read_folds(tmp_path/'f.csv').set_index('ImageId').fold
    assert f['twin'] == f[twin]
    p = ptx('ptx_folds', phantoms/'train-rle.csv', '--out', tmp_path/'g.csv', '--near_duplicates')
    assert p.returncode == 1 and 'give their folder' in p.stderr

@pytest.mark.parametrize('args, why', [
    (['--n', '1'], '--n 1: give a whole number'),
    (['--n', '40'], 'cannot be split 40 ways'),
    (['--out', 'none/f.csv'], 'its folder does not exist'),
    (['--patients', 'none.csv'], 'none.csv: no such file'),
])
def test_wrong_arguments_end_in_one_line(phantoms, tmp_path, args, why):
    p = ptx('ptx_folds', phantoms, *([] if '--out' in args else ['--out', tmp_path/'f.csv']), *args)
    assert p.returncode == 1 and why in p.stderr and 'Traceback' not in p.stderr and not (tmp_path/'f.csv').exists()

def test_folds_are_not_overwritten(phantoms, tmp_path):
    (tmp_path/'f.csv').write_text('mine')
    p = ptx('ptx_folds', phantoms, '--out', tmp_path/'f.csv')
    assert p.returncode == 1 and 'is there already' in p.stderr and (tmp_path/'f.csv').read_text() == 'mine'

def test_neither_folds_nor_audits_wait_for_torch():
    code = 'import sys; import pneumothorax.cli, pneumothorax.folds, pneumothorax.siim; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0

# --- tables

LABELS = pd.DataFrame({'ImageId': [f'i{k:02}' for k in range(20)], 'has_ptx': [k % 2 == 0 for k in range(20)]})

def test_missing_patients_are_counted_and_named():
    groups = {i: 'p'+i for i in LABELS.ImageId} | {'i03': None, 'i04': float('nan'), 'i05': ' '}
    with pytest.raises(FoldError, match=r'3 of 20 images have no patient \(i03, i04, i05\); complete the patient ids'):
        make_folds(LABELS, groups)
    with pytest.raises(FoldError, match='20 of 20|no image of 20'): make_folds(LABELS, {'x': 1})

@pytest.mark.parametrize('labels, groups, n, why', [
    (LABELS[LABELS.has_ptx], None, 2, 'image of 10 is negative'),
    (LABELS[~LABELS.has_ptx], None, 2, 'image of 10 is positive'),
    (LABELS, dict.fromkeys(LABELS.ImageId, 'p'), 2, 'images are of one patient'),
    (LABELS[:0], None, 2, 'image of 0 is'),
    (LABELS[:6], None, 5, 'no kind of them has 5 members'),
    (LABELS, None, 2.5, 'n=2.5'),
    (LABELS, None, 0, 'n=0'),
    (LABELS, None, True, 'n=True'),
    (LABELS[['ImageId']], None, 2, 'columns ImageId'),
])
def test_what_cannot_be_split(labels, groups, n, why):
    with pytest.raises(FoldError, match=why): make_folds(labels, groups or dict(zip(labels.ImageId, labels.ImageId)), n)

def test_few_positives_are_noticed():
    few = LABELS.assign(has_ptx=[k < 2 for k in range(20)])
    with pytest.warns(PtxNotice, match='folds have no image with a pneumothorax'):
        f = make_folds(few, dict(zip(few.ImageId, few.ImageId)), 5)
    assert f.fold.value_counts().tolist() == [4]*5

@pytest.mark.parametrize('text, why', [
    ('ImageId,fold\ni00,0\n', '19 images have no fold'),
    ('ImageId,fold\n'+''.join(f'{i},{k%2}\n' for k, i in enumerate([*LABELS.ImageId, 'zz'])), 'line 22: zz is not among the images'),
    ('ImageId,fold\n'+''.join(f'{i},{k%2}\n' for k, i in enumerate([*LABELS.ImageId, 'i00'])), 'line 22: i00 repeats'),
    ('ImageId,fold\n'+''.join(f'{i},{k}.5\n' for k, i in enumerate(LABELS.ImageId)),
        'line 2: fold .0.5. is not a whole number.*and 12 more'),
    ('ImageId,fold\n'+''.join(f'{i},\n' for i in LABELS.ImageId), "line 2: fold '' is not"),
    ('ImageId,fold\n'+''.join(f'{i},3\n' for i in LABELS.ImageId), 'fewer than two folds'),
    ('ImageId;fold\na;1\n', 'columns ImageId;fold, separated by semicolons'),
    ('ImageId,fold\n', 'no rows below the header'),
    ('ImageId,fold\ni00,1\ni01\n', 'line 3: 1 value where'),
    ('', 'not a readable CSV'),
])
def test_faulty_tables_of_folds(tmp_path, text, why):
    (tmp_path/'f.csv').write_text(text)
    with pytest.raises(FoldError, match=why) as e: read_folds(tmp_path/'f.csv', LABELS.ImageId)
    assert 'f.csv' in str(e.value)

def test_a_table_may_have_a_mark_spaces_and_count_from_one(tmp_path):
    (tmp_path/'f.csv').write_text('\ufeffImageId, fold\na, 1\nb, 2\n', encoding='utf-8')
    assert read_folds(tmp_path/'f.csv', ['b', 'a']).values.tolist() == [['a', 1], ['b', 2]]
    assert check_folds(pd.DataFrame({'ImageId': [1, 2], 'fold': [0., 1.]}), [1, 2]).fold.tolist() == [0, 1]

def test_spread_keeps_groups_and_shares_for_any_sizes():
    rng = np.random.default_rng(0)
    for seed in range(10):
        groups, strata = rng.geometric(.05, 400), rng.integers(0, 4, 400)
        f = spread(strata, groups, 4, seed)
        assert pd.Series(f).groupby(groups).nunique().max() == 1 and set(f) == set(range(4))

@pytest.mark.parametrize('kind', [int, float, object])
def test_presence_may_be_one_and_zero(kind, recwarn):
    other = LABELS.assign(has_ptx=LABELS.has_ptx.astype(int).astype(kind))
    who = {i: i for i in LABELS.ImageId}
    f = make_folds(LABELS, who, 2)
    assert make_folds(other, who, 2).equals(f) and not len(recwarn)
    assert leakage(f, who, other).equals(leakage(f, who, LABELS)) and fold_balance(f, other).equals(fold_balance(f, LABELS))

@pytest.mark.parametrize('change, why', [
    ({'has_ptx': [None]+[True, False]*9+[True]}, '1 image has a has_ptx other than'),
    ({'has_ptx': [float('nan')]*2+[1., 0.]*9}, '2 images have a has_ptx other than'),
    ({'has_ptx': ['0', '1']*10}, '20 images have a has_ptx'),
    ({'ImageId': [None, *LABELS.ImageId[1:]]}, '1 row has no ImageId'),
    ({'ImageId': [*LABELS.ImageId[:18], float('nan'), ' ']}, '2 rows have no ImageId'),
])
def test_labels_with_holes_are_refused(change, why):
    f = LABELS[['ImageId']].assign(fold=[0, 1]*10)
    for use in (make_folds, lambda t: fold_balance(f, t), lambda t: leakage(f, dict.fromkeys(LABELS.ImageId, 'p'), t)):
        with pytest.raises(FoldError, match=why): use(LABELS.assign(**change))

@pytest.mark.parametrize('seed', [-1, 2**32, 1.5, None, 'a', True])
def test_what_is_no_seed(seed):
    with pytest.raises(FoldError, match='seed='): make_folds(LABELS, {i: i for i in LABELS.ImageId}, 2, seed)

def test_one_name_is_one_image(tmp_path):
    with pytest.raises(FoldError, match='have the same name'): near_duplicates([tmp_path/'a'/'1.png', tmp_path/'b'/'1.png'])
    with pytest.raises(FoldError, match='a list that holds a ndarray'): near_duplicates([np.zeros((9, 9))]*2)
    with pytest.raises(FoldError, match=r'1 image twice \(a\)'): duplicate_groups(pd.DataFrame({'a': ['a'], 'b': ['b']}), ['a', 'b', 'a'])

# --- tables of patients: one reader for folds, scores and training

PATIENTS = [('ImageId,patient_id\na,1\na,2\n', 'line 3: a belongs to several patients: 2 here, 1 in line 2'),
    ('ImageId,patient_id\n,1\n', 'line 2: no ImageId'), ('ImageId,patient_id\na\n', 'line 2: 1 value'),
    ('ImageId;patient_id\na;1\n', 'separated by semicolons'), ('ImageId,patient_id\n', 'no rows below'),
    ('ImageId,who\na,1\n', 'columns ImageId, who'), ('', 'it is empty')]

@pytest.mark.parametrize('text, why', PATIENTS)
def test_a_faulty_table_of_patients_is_the_same_error_everywhere(tmp_path, text, why):
    (tmp_path/'who.csv').write_text(text)
    (tmp_path/'y.csv').write_text('ImageId,EncodedPixels\na,1 2\nb,-1\n')
    uses = (lambda: patient_groups(tmp_path/'who.csv', ['a']), lambda: read_patients(tmp_path/'who.csv'),
        lambda: score_report(tmp_path/'y.csv', tmp_path/'y.csv', str(tmp_path/'who.csv')))
    for use in uses:
        with pytest.raises(LabelError, match=why) as e: use()
        assert 'who.csv' in str(e.value)

def test_spaces_around_identifiers_matter_nowhere(phantoms, tmp_path):
    m, y = pd.read_csv(phantoms/'metadata.csv', dtype=str), phantoms/'train-rle.csv'
    m.assign(ImageId=m.ImageId+' ', patient_id=' '+m.patient_id+' ').to_csv(tmp_path/'who.csv', index=False)
    for k, who in (('a', tmp_path/'who.csv'), ('b', phantoms/'metadata.csv')):
        ok('ptx_folds', y, '--out', tmp_path/f'{k}.csv', '--n', 2, '--patients', who)
    assert (tmp_path/'a.csv').read_bytes() == (tmp_path/'b.csv').read_bytes()
    assert 'of 12 images of' not in ok('ptx_score', y, y, '--patients', tmp_path/'who.csv').stderr
    files = find_siim(phantoms)
    want = find_patients(files, list(files.images))
    files.metadata = tmp_path/'who.csv'
    assert find_patients(files, list(files.images)).equals(want)

def test_holes_in_a_table_of_patients_name_the_file(phantoms, tmp_path):
    (tmp_path/'who.csv').write_text('ImageId,patient_id\n'+''.join(f'{i},N/A\n' if k == 1 else f'{i},{k}\n'
        for k, i in enumerate(read_labels(phantoms/'train-rle.csv').ImageId)))
    p = ptx('ptx_folds', phantoms/'train-rle.csv', '--out', tmp_path/'f.csv', '--n', 2, '--patients', tmp_path/'who.csv')
    assert p.returncode == 1 and 'who.csv: 1 of 12 images has no patient' in p.stderr

# --- the real labels

def test_real_folds_keep_the_promises(shared):
    y = read_labels(shared/'siim-labels'/'stage_2_train.csv.gz')
    who = patient_groups(shared/'siim-labels'/'patients.csv.gz', y.ImageId)
    f = make_folds(y, who, seed=7)
    assert leakage(f, who, y).to_numpy().max() == 0
    b = fold_balance(f, y, who)
    assert (b.share-b.share['all']).abs().max() < .003 and (b.median_area/b.median_area['all']-1).abs().max() < .05
    assert b.patients[:-1].sum() == b.patients['all'] == 6171
    assert make_folds(y[::-1], who[::-1], seed=7).equals(f)
    ys = y.sort_values('ImageId')
    alone = ys[['ImageId']].assign(fold=spread(fold_strata(ys)))
    leak = leakage(alone, who, y).loc['all']
    assert .55 < leak.images < .65 and leak.positives > .9

# --- repeats

def slow_distance(a, b):
    "Smallest and largest Hamming distance over the shifts, with loops"
    a, b = (local_contrast(t, 8) > 0 for t in (a, b))
    out = [np.mean([a[y, x] != b[y+dy, x+dx] for y in range(12, 116, 6) for x in range(12, 116, 6)]) for dy in range(-12, 13, 4)
        for dx in range(-12, 13, 4)]
    return min(min(out), 1-max(out))

def test_distances_agree_with_loops():
    rng = np.random.default_rng(0)
    ts = np.stack([thumbnail(cv2.GaussianBlur(rng.random((128, 128), np.float32), (0, 0), 6)) for _ in range(4)])
    p = nearest_pairs(ts, 3)
    assert len(p) == 6
    for r in p.itertuples(): assert abs(r.distance-min(slow_distance(ts[r.a], ts[r.b]), slow_distance(ts[r.b], ts[r.a]))) < 1e-6

def test_pairs_are_found_across_blocks():
    rng = np.random.default_rng(1)
    ts = rng.integers(0, 255, (1030, 128, 128), dtype=np.uint8)
    ts[1029] = ts[0]
    p = nearest_pairs(ts, 1)
    r = p[(p.a == 0) & (p.b == 1029)]
    assert len(r) == 1 and r.distance.item() == 0 and (p.a < p.b).all()

def test_copies_in_other_formats_are_found_and_broken_files_listed(phantoms, tmp_path):
    df = siim_train(phantoms)
    ds = pydicom.dcmread(next(f for f in df.path if pydicom.dcmread(f, stop_before_pixels=True).PhotometricInterpretation == 'MONOCHROME2'))
    name, x = str(ds.SOPInstanceUID), ds.pixel_array
    top = 2**int(ds.BitsStored)-1
    ds.decompress() if ds.file_meta.TransferSyntaxUID.is_compressed else None
    ds.PixelData, ds.PhotometricInterpretation = (top-x).astype(x.dtype).tobytes(), 'MONOCHROME1'
    ds.save_as(tmp_path/'mono1.dcm')
    cv2.imwrite(str(tmp_path/'copy.png'), (x/top*200+20).astype(np.uint8))
    (tmp_path/'broken.png').write_bytes(b'none')
    files = dict(zip(df.ImageId, df.path)) | {k: tmp_path/f
        for k, f in (('mono1', 'mono1.dcm'), ('copy', 'copy.png'), ('broken', 'broken.png'))}
    with pytest.warns(PtxNotice, match='broken'): p = near_duplicates(files, min_corr=.95)
    pairs = {frozenset(ab) for ab in zip(p.a, p.b)}
    assert pairs == {frozenset(ab) for ab in ((name, 'mono1'), (name, 'copy'), ('mono1', 'copy'))} and not p.negative.any()
    g = duplicate_groups(p, list(files))
    assert g[name] == g['mono1'] == g['copy'] and g.nunique() == len(files)-2

def test_nothing_to_compare(tmp_path):
    assert not len(near_duplicates({})) and not len(near_duplicates({'a': np.zeros((9, 9), np.float32)}))
    flat = near_duplicates({k: np.zeros((9, 9), np.float32) for k in 'abc'})
    assert not len(flat)   # pictures without content are no evidence
