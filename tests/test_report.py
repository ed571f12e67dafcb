"The page about a run: the same numbers as elsewhere, every kind of input, nothing from outside taken for markup"
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from conftest import ok, ptx
from PIL import Image

from pneumothorax.cases import open_cases
from pneumothorax.groups import by_group, grouped, score_table
from pneumothorax.predict import predict_maps
from pneumothorax.records import FORMAT, to_bytes
from pneumothorax.report import pick_cases, report
from pneumothorax.rle import PtxError, rle_encode
from pneumothorax.siim import write_index

VOID = {'meta', 'img', 'br', 'path', 'use', 'image', 'rect'}

class Page(HTMLParser):
    "What is on a page, and whether its elements are closed"
    def __init__(self, f):
        super().__init__()
        self.open, self.text, self.images, self.scripts, self.links = [], [], [], [], []
        self.feed(f.read_text(encoding='utf-8'))
        assert not self.open, self.open
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.links += [v for k, v in attrs if k in ('src', 'href', 'xlink:href') and v]
        if tag == 'img': self.images.append(a)
        if tag == 'script': self.scripts.append(a)
        if tag not in VOID: self.open.append(tag)
    def handle_startendtag(self, tag, attrs): self.links += [v for k, v in attrs if k in ('src', 'href', 'xlink:href') and v]
    def handle_endtag(self, tag):
        if tag in VOID: return
        assert self.open.pop() == tag
    def handle_data(self, data): self.text.append(data)
    def says(self, words): return words in ' '.join(' '.join(self.text).split())

def made(out, ids, files, maps):
    "Predictions by hand"
    out.mkdir(parents=True)
    np.save(out/'maps.npy', to_bytes(maps))
    (out/'predict.json').write_text(json.dumps({'format': FORMAT, 'run': 'by hand'}))
    write_index(pd.DataFrame({'ImageId': ids, 'path': [str(f) for f in files], 'row': range(len(ids)),
        'max_prob': maps.max((1, 2)).round(4)}), out/'index.csv')
    write_index(pd.DataFrame(columns=['ImageId', 'path', 'error']), out/'failed.csv')
    return out

@pytest.fixture
def four(tmp_path):
    "Four pictures, two of them ill, and predictions: one found, one missed, one false alarm, one healthy"
    maps, rng = np.zeros((4, 64, 64), np.float32), np.random.default_rng(0)
    files = [tmp_path/f'{i}.png' for i in 'abcd']
    for f in files: Image.fromarray(rng.integers(0, 255, (64, 64), np.uint8)).save(f)
    maps[0, 10:20, 10:20], maps[1, 10:20, 10:20], maps[2, 30:40, 30:40] = .9, .3, .8
    y = np.zeros((1024, 1024), np.uint8)
    y[160:320, 160:320] = 1
    (tmp_path/'labels.csv').write_text('ImageId,EncodedPixels\n'+''.join(f'{i},{r}\n' for i, r in zip('abcd', [rle_encode(y)]*2+['-1']*2)))
    return made(tmp_path/'pred', list('abcd'), files, maps), tmp_path/'labels.csv'

def test_the_numbers_are_those_of_the_cross_validation(cv, tmp_path):
    p = Page(report(cv, out=tmp_path/'r.html'))
    s = json.loads((cv/'summary.json').read_text())['scores']
    t = score_table(open_cases(cv).judged).set_index('score').interval
    for mine, theirs in (('Dice', 'dice'), ('Dice on positives', 'dice_pos'), ('positives marked', 'sensitivity'), ('AUROC', 'auroc')):
        assert t[mine].value == pytest.approx(s[theirs]['value']) and (np.isnan(t[mine].lo) or t[mine].lo == pytest.approx(s[theirs]['lo']))
    assert p.says(f'{s["dice"]["value"]:.3f}') and p.says('No patient is in two folds') and p.says('--folds')
    assert all(i['alt'].startswith('Radiograph ') and i['src'].startswith('data:image/jpeg;base64,') for i in p.images) and p.images
    assert all(l.startswith(('data:', '#')) for l in p.links) and not any('src' in a for a in p.scripts)     # nothing is fetched
    assert (tmp_path/'r.html').stat().st_size < 2e6

def test_each_kind_of_case(four, tmp_path):
    pred, labels = four
    t = open_cases(pred, labels).judged.set_index('ImageId')
    assert t.dice.round(3).tolist() == [t.dice['a'].round(3), 0, 0, 1] and t.dice['a'] > .9
    assert pick_cases(t.reset_index(), 2) == {'best': ['a'], 'missed': ['b'], 'alarm': ['c'], 'edge': ['b'], 'empty': ['d']}
    p = Page(report(pred, out=tmp_path/'r.html', labels=labels))
    assert ([i['alt'].partition(': ')[2] for i in p.images]
        == ['outlined best', 'missed, on the edge', 'false alarm', 'likeliest of the others'])
    assert p.says('4 radiographs') and p.says('The runs behind these predictions are not there')

def test_best_and_worst_are_halves_of_what_was_outlined():
    t = pd.DataFrame({'ImageId': list('abcde'), 'max_prob': .9, 'pred_area': 9, 'area': 9, 'has_ptx': True,
        'dice': [.1, .9, .5, .7, .3], 'rles': None})
    assert pick_cases(t, 8) == {'best': ['b', 'd', 'c'], 'worst': ['a', 'e']}
    assert pick_cases(t, 1) == {'best': ['b'], 'worst': ['a']}

def broken(f, how):
    if how == 'gone': f.unlink()
    elif how == 'half': f.write_bytes(f.read_bytes()[:f.stat().st_size//2])
    elif how == 'empty': f.write_bytes(b'')
    else: f.write_text('[]')

@pytest.mark.parametrize('file, how', [('oof/maps.npy', 'half'), ('oof/index.csv', 'empty'), ('oof/predict.json', 'half'),
    ('oof/predict.json', 'list'), ('fold-1/run.json', 'half'), ('fold-0/run.json', 'list'), ('fold-1/history.csv', 'empty')])
def test_a_damaged_file_is_named(cv, tmp_path, file, how):
    shutil.copytree(cv, tmp_path/'cv')
    broken(tmp_path/'cv'/file, how)
    with pytest.raises(PtxError, match=f'{re.escape(file)}.*damaged'): report(tmp_path/'cv', out=tmp_path/'r.html')

def test_folds_that_are_gone_are_told(cv, tmp_path):
    shutil.copytree(cv, tmp_path/'cv')
    shutil.rmtree(tmp_path/'cv'/'fold-1')
    with pytest.warns(UserWarning, match='nothing is said of their training: fold-1'): report(tmp_path/'cv', out=tmp_path/'r.html')

def test_predictions_of_another_run_are_refused(cv, phantoms, tmp_path):
    predict_maps(cv/'fold-0', phantoms/'dicom-images-test', tmp_path/'p', workers=0, progress=False)
    assert report(cv, tmp_path/'p', out=tmp_path/'r.html').exists()
    with pytest.raises(PtxError, match='predicted by .*fold-0, not by .*fold-1'): report(cv/'fold-1', tmp_path/'p', out=tmp_path/'r.html')

@pytest.mark.parametrize('rows', [[0], [3], [0, 1], [2, 3], [0, 3]],
    ids=['one positive', 'one healthy', 'positives', 'healthy', 'one of each'])
def test_few_of_one_kind(four, tmp_path, rows):
    "A page all the same, which says what cannot be said"
    pred, labels = four
    t = pd.read_csv(pred/'index.csv').iloc[rows]
    t.to_csv(pred/'index.csv', index=False)
    p = Page(report(pred, out=tmp_path/'r.html', labels=labels))
    assert p.says('no such radiograph') == (len({r < 2 for r in rows}) == 1) and len(p.images) == len(rows)
    assert p.says('Other rules') == (len({r < 2 for r in rows}) == 2)

def test_without_labels(four, tmp_path):
    p = Page(report(four[0], out=tmp_path/'r.html'))
    assert (p.says('no labels') and not p.says('Scores')
        and {i['alt'].partition(': ')[2].split(', ')[0] for i in p.images} >= {'largest', 'on the edge'})

def test_what_comes_from_outside_is_no_markup(four, tmp_path):
    pred, labels = four
    evil = '<script>alert(1)</script>'
    for f in (pred/'index.csv', labels): f.write_text(re.sub(r'(?m)^a,', f'"{evil}",', f.read_text()))
    s = report(pred, out=tmp_path/'r.html', labels=labels, title='<b>"&').read_text(encoding='utf-8')
    assert evil not in s and '&lt;script&gt;alert(1)' in s and '<b>"' not in s
    assert len(Page(tmp_path/'r.html').scripts) == 1

def test_pictures_that_are_gone(four, tmp_path):
    pred, labels = four
    (tmp_path/'a.png').unlink()
    (tmp_path/'b.png').write_bytes(b'no picture')
    with pytest.warns(UserWarning, match='2 radiographs cannot be read, so their sides are not known'):
        p = Page(report(pred, out=tmp_path/'r.html', labels=labels))
    assert len(p.images) == 4

def test_groups_add_up(cv):
    t = by_group(grouped(open_cases(cv).judged))
    for q, g in t[t.question != ''].groupby('question'): assert g.n.sum() == t.n[0], q

def test_the_command(cv, phantoms, tmp_path):
    assert 'open it in a browser' in ok('ptx_report', cv, '--out', tmp_path/'r.html', '--n', '2',
        '--with_gate', '--triplet', '.2,100,.1').stdout
    p = Page(tmp_path/'r.html')
    assert p.says('A gate') and p.says('the triplet 0.2,100,0.1')
    pred = predict_maps(cv, phantoms/'dicom-images-test', tmp_path/'pred', workers=0, progress=False)
    ok('ptx_report', cv, pred, '--labels', phantoms/'answers'/'test-rle.csv', '--out', tmp_path/'p.html')
    assert Page(tmp_path/'p.html').says('How it was made')
    for args, why in (((phantoms,), 'no run, no cross-validation and no predictions'), ((pred, '--with_gate'), 'leave --with_gate out'),
            ((phantoms, pred), 'no run and no cross-validation'), ((cv, '--triplet', '2,1'), 'give top, area and bottom')):
        q = ptx('ptx_report', *args, '--out', tmp_path/'x.html')
        assert q.returncode == 1 and why in q.stderr and 'Traceback' not in q.stderr and not (tmp_path/'x.html').exists(), q.stderr

def test_no_radiographs(four, tmp_path):
    pd.read_csv(four[0]/'index.csv').head(0).to_csv(four[0]/'index.csv', index=False)
    with pytest.raises(PtxError, match='no radiographs to report on'): report(four[0], out=tmp_path/'r.html')
