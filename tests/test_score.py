"ptx_score: the published figures, several submissions, patients, faulty files with their line numbers"
import json
import warnings

import numpy as np
import pandas as pd
import pytest
from conftest import ok, ptx

from pneumothorax import cli
from pneumothorax.bootstrap import bootstrap_ci, paired_bootstrap
from pneumothorax.rle import LabelError, rle_encode
from pneumothorax.scoring import check_submission, report_text, score_images, score_report, score_submission
from pneumothorax.siim import FaultyLines

FILES = {
    'labels': 'ImageId,EncodedPixels\na,0 100\nb,0 100\nc,-1\nd,-1\ne,0 10\ne,5 20\nf,-1\ng,9 9\n',
    'one': 'ImageId,EncodedPixels\na,0 100\nb,50 100\nc,-1\nd,7 1\ne,0 25\nf,-1\ng,-1\n',
    'two': 'ImageId,EncodedPixels\ng,9 9\na,-1\nb,0 100\nc,-1\nd,-1\ne,0 25\nf,-1\n',
    'who': 'ImageId,patient_id\na,1\nb,1\nc,2\nd,3\ne,4\nf,5\ng,6\n',
}

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    d = tmp_path_factory.mktemp('score')
    for n, text in FILES.items(): (d/f'{n}.csv').write_text(text)
    return d

def score(*args): return json.loads(ok('ptx_score', *args, '--json').stdout)

def refused(capsys, *files, **kwargs):
    "stderr of a command that ends with 1 and prints nothing else; called in this process, which is quicker"
    with pytest.raises(SystemExit) as e: cli.ptx_score(list(files), **kwargs)
    out, err = capsys.readouterr()
    assert e.value.code == 1 and out == '' and err.count('error: ') == 1
    return err

def told(*files, **kwargs):
    "Notices of a command, called in this process"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        cli.ptx_score(list(files), **kwargs)
    return '\n'.join(str(o.message) for o in w)

# --- what is right

def test_one_submission(files):
    r = score(files/'one.csv', files/'labels.csv', '--patients', files/'who.csv', '--worst', 2)
    assert list(r)[:5] == ['dice', 'dice_pos', 'dice_neg', 'n', 'n_pos']
    dice = np.array([1, .5, 1, 0, 1, 1, 0])
    assert r['dice'] == dice.mean() and r['dice_pos'] == 2.5/4 and r['dice_neg'] == 2/3 and (r['n'], r['n_pos'], r['n_groups']) == (7, 4, 6)
    ci = bootstrap_ci(dice, [1, 1, 2, 3, 4, 5, 6])
    assert r['intervals']['dice'] == [ci.lo, ci.hi] and r['resampled'] == 'patients'
    assert r['intervals']['dice_neg'] is None and '3 groups of images are too few' in r['no_interval']['dice_neg']
    assert (r['interval_groups'] == {'dice': 6, 'dice_pos': 3, 'dice_neg': 3, 'sensitivity': 3, 'specificity': 3}
        and set(r['intervals']) == set(r['interval_groups']))
    assert r['confusion'] == {'tp': 3, 'fp': 1, 'fn': 1, 'tn': 2, 'sensitivity': .75, 'specificity': 2/3}
    assert r['worst'] == [{'ImageId': 'g', 'dice': 0, 'area_true': 9, 'area_pred': 0},
        {'ImageId': 'd', 'dice': 0, 'area_true': 0, 'area_pred': 1}]

def test_several_submissions_are_compared_in_pairs(files):
    r = score(files/'one.csv', files/'two.csv', files/'one.csv', files/'labels.csv', '--patients', files/'who.csv')
    assert [s['dice'] for s in r['submissions']] == [4.5/7, 6/7, 4.5/7]
    d = [x for x in r['differences'] if x['score'] == 'dice']
    assert [(x['a'][-7:], x['b'][-7:]) for x in d] == [('one.csv', 'two.csv'), ('one.csv', 'one.csv'), ('two.csv', 'one.csv')]
    want = paired_bootstrap([1, .5, 1, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1], [1, 1, 2, 3, 4, 5, 6])
    assert [d[0][k] for k in ('difference', 'lo', 'hi', 'p')] == [want.value, want.lo, want.hi, want.p]
    assert d[1]['difference'] == 0 and d[1]['p'] == 1 and d[1]['lo'] is None and 'same in every resample' in d[1]['no_interval']
    assert not any(x['p_is_bound'] for x in d)

def test_text_for_people(files):
    text = ok('ptx_score', files/'one.csv', files/'labels.csv').stdout
    assert '0.6429' in text and 'too narrow' in text and 'worst images' in text
    text = ok('ptx_score', files/'one.csv', files/'labels.csv', '--patients', files/'who.csv').stdout
    assert '4 images of 3 patients' in text and 'no interval: 3 groups of images are too few, a 95 % interval needs 6' in text
    text = ok('ptx_score', files/'one.csv', files/'two.csv', files/'labels.csv', '--patients', files/'who.csv').stdout
    assert 'one − two' in text and 'too narrow' not in text and 'patients resampled' in text

def test_patients_in_the_label_file(files, tmp_path):
    labels, who = pd.read_csv(files/'labels.csv'), pd.read_csv(files/'who.csv')
    labels.merge(who).to_csv(tmp_path/'l.csv.gz', index=False)
    assert score(files/'one.csv', tmp_path/'l.csv.gz')['n_groups'] == 6

def test_submissions_of_other_images_are_compared_on_the_common_ones(files, tmp_path):
    (tmp_path/'part.csv').write_text('ImageId,EncodedPixels\na,-1\nb,-1\n')
    p = ok('ptx_score', files/'one.csv', tmp_path/'part.csv', files/'labels.csv', '--json')
    r = json.loads(p.stdout)
    assert [s['n'] for s in r['submissions']] == [7, 2] and r['differences'][0]['n'] == 2
    assert 'notice: 5 labelled images are not in the submission and are not scored (part): ' in p.stderr

def test_rows_of_images_that_are_not_scored_are_not_judged(files, tmp_path):
    (tmp_path/'l.csv').write_text(FILES['labels']+'other,not a mask\n')
    assert score(files/'one.csv', tmp_path/'l.csv')['n'] == 7
    (tmp_path/'l.csv').write_text(FILES['labels'].replace('a,0 100', 'a,not a mask')+'other,not a mask\n')
    with pytest.raises(LabelError, match='1 faulty line.*line 2') as e: score_submission(files/'one.csv', tmp_path/'l.csv')
    assert 'l.csv' in str(e.value)

# --- the published figures

SCORES = {'stage1-fastai-solution': (.8342, .3913), 'stage1-keras-v9': (.8165, .2251), 'stage1-keras-v3': (.7971, .2505),
    'stage1-keras-v2': (.4607, .3657)}

def test_published_submissions(shared):
    labels = shared/'siim-labels'
    p = ok('ptx_score', *[shared/'submissions'/f'{n}.csv' for n in SCORES], labels/'stage_2_train.csv.gz',
        '--patients', labels/'patients.csv.gz', '--json')
    r = json.loads(p.stdout)
    for s, (dice, pos) in zip(r['submissions'], SCORES.values()):
        assert (round(s['dice'], 4), round(s['dice_pos'], 4), s['n'], s['n_pos'], s['n_groups']) == (dice, pos, 1372, 290, 1145)
        lo, hi = s['intervals']['dice']
        assert lo < s['dice'] < hi and hi-lo < .06
        c = s['confusion']
        assert c['tp']+c['fn'] == 290 and c['fp']+c['tn'] == 1082 and c['specificity'] == s['dice_neg']
    first = next(d for d in r['differences'] if d['score'] == 'dice')
    last = next(d for d in r['differences'] if 'v2' in d['b'] and d['score'] == 'dice')
    assert last['p_is_bound'] and last['p'] < .0003 and 'p < 0.0003' in report_text(r) and not first['p_is_bound']
    assert first['difference'] == pytest.approx(r['submissions'][0]['dice']-r['submissions'][1]['dice']) and first['p'] < .05
    assert p.stderr.count('5 images of the submission have no label') == 1   # one of the four has five more

# --- what is wrong

H = 'ImageId,EncodedPixels\n'
BAD = {
    'odd count': (H+'a,1 2 3\n', [2], 'odd count'),
    'negative': (H+'a,-1\nb,9 -3\n', [3], 'negative'),
    'no number': (H+'a,x\n', [2], 'not a whole number'),
    'decimals': (H+'a,1.5 2\n', [2], 'not a whole number'),
    'beyond the frame': (H+'a,1048570 9\n', [2], 'of a frame of 1,048,576'),
    'repeated': (H+'a,1 2\nb,-1\na,1 2\n', [4], 'repeats an earlier line'),
    'empty twice': (H+'a,-1\na,\n', [3], 'repeats an earlier line'),
    'empty and not': (H+'a,1 2\nb,-1\na,-1\n', [4], 'is empty here and has a mask elsewhere'),
    'no identifier': (H+',1 2\n', [2], 'no ImageId'),
    'too many values': (H+'a,1 2,3 4\n', [2], '3 values where the header has 2'),
    'too few values': (H+'b,-1\na\n', [3], '1 value where the header has 2'),
    'after blank lines': ('\n'+H+'\n\na,1 2 3\n', [5], 'odd count'),
    'after a value of two lines': (H+'b,"1\n2"\na,x\n', [4], 'not a whole number'),
    'several': (H+'a,x\nb,-1\nc,1\nd,-1\nd,-1\n', [2, 4, 6], ''),
}

@pytest.mark.parametrize('name', BAD)
def test_a_faulty_line_is_named(files, tmp_path, capsys, name):
    text, lines, why = BAD[name]
    f = tmp_path/'bad.csv'
    f.write_text(text)
    c = check_submission(f, files/'labels.csv')
    c = c[c.level == 'error']
    assert c.line.tolist() == lines and c.problem.str.contains(why, regex=False).all()
    head, *rest = refused(capsys, f, files/'labels.csv', json=True).splitlines()
    assert head == f'error: {f}: {len(lines)} faulty line{"s"*(len(lines) > 1)}; correct the file.'
    assert [r.split(':')[0].strip() for r in rest] == [f'line {n}' for n in lines]

def test_every_faulty_line_is_listed(files, tmp_path):
    (tmp_path/'bad.csv').write_text(H+''.join(f'i{k},1 2 3\n' for k in range(300)))
    with pytest.raises(FaultyLines) as e: score_submission(tmp_path/'bad.csv', files/'labels.csv')
    assert len(e.value.lines) == 300 == len(check_submission(tmp_path/'bad.csv'))
    p = ptx('ptx_score', tmp_path/'bad.csv', files/'labels.csv', '--json')   # the terminal gets the first hundred
    assert (p.returncode == 1 and p.stdout == '' and 'Traceback' not in p.stderr and p.stderr.count('\n  line ') == 100
        and p.stderr.endswith('and 200 more\n'))

HEADERS = {'id,rle\na,-1\n': 'columns id, rle', 'ImageId;EncodedPixels\na;-1\n': 'columns ImageId;EncodedPixels',
    'ImageId,EncodedPixels,ImageId\na,-1,a\n': 'once each', '': 'it is empty', 'a,-1\n': 'columns a, -1'}

@pytest.mark.parametrize('text', HEADERS, ids=HEADERS.values())
def test_a_wrong_header(files, tmp_path, capsys, text):
    (tmp_path/'bad.csv').write_text(text)
    c = check_submission(tmp_path/'bad.csv')
    assert c.line.tolist() == [1] and HEADERS[text] in c.problem[0]
    assert HEADERS[text] in refused(capsys, tmp_path/'bad.csv', files/'labels.csv')

def test_unknown_and_missing_identifiers(files, tmp_path, capsys):
    (tmp_path/'s.csv').write_text(H+'a,-1\nx,-1\nb,-1\ny,3 4\n')
    c = check_submission(tmp_path/'s.csv', files/'labels.csv')
    assert set(c.level) == {'notice'} and c.line.tolist() == [3, 5, 0, 0, 0, 0, 0] and c.ImageId.tolist() == list('xycdefg')
    assert set(check_submission(tmp_path/'s.csv', files/'labels.csv', strict=True).level) == {'error'}
    p = ok('ptx_score', tmp_path/'s.csv', files/'labels.csv')
    assert ('notice: 2 images of the submission have no label and are not scored (s): line 3 (x), line 5 (y)' in p.stderr
        and 'notice: 5 labelled images' in p.stderr)
    head, *rest = refused(capsys, tmp_path/'s.csv', files/'labels.csv', strict=True).splitlines()
    assert '2 faulty lines' in head and '5 labelled images are missing: c, d, e, f, g' in head
    assert rest == ['  line 3: x is not in labels.csv', '  line 5: y is not in labels.csv']
    (tmp_path/'s.csv').write_text(H+'a,-1\nb,-1\n')
    err = refused(capsys, tmp_path/'s.csv', files/'labels.csv', strict=True)
    assert 'faulty line' not in err and '5 labelled images are missing' in err
    assert ptx('ptx_score', files/'one.csv', files/'labels.csv', '--strict').returncode == 0

def test_several_masks_of_an_image_are_legal_and_told(files):
    c = check_submission(files/'labels.csv')
    assert c.level.tolist() == ['notice']*2 and c.line.tolist() == [6, 6] and 'overlap by 5 pixels' in c.problem[1]
    assert score_images(files/'labels.csv', files/'labels.csv').dice.eq(1).all()

def test_the_command_tells_several_and_overlapping_masks(files, tmp_path):
    (tmp_path/'s.csv').write_text(H+'a,0 100\nb,-1\na,50 100\nc,0 5\nc,5 5\n')
    p = ok('ptx_score', tmp_path/'s.csv', files/'labels.csv', '--json')
    assert '2 images have several masks; their union is scored (s): line 2 (a), line 5 (c)' in p.stderr
    assert '1 image has masks that overlap (s): line 2 (a)' in p.stderr

def test_equal_notices_of_several_submissions_are_one(files, tmp_path, capsys):
    for n in ('r1', 'r2'):
        (tmp_path/n).mkdir()
        (tmp_path/n/'submission.csv').write_text(H+f'{"long"*12}x,-1\na,{len(n)} 5\nb,-1\nb2,-1\n'.replace('b2', n))
    err = told(tmp_path/'r1'/'submission.csv', tmp_path/'r2'/'submission.csv', files/'labels.csv')
    out = capsys.readouterr().out
    assert err.count('5 labelled images are not in the submission and are not scored (r1/submission, r2/submission): c, d, e, f, g') == 1
    assert len(err.splitlines()) == 3 and '…' in err and 'long'*12 not in err
    assert '\nr1/submission  ' in out and '\nr2/submission  ' in out and 'r1/submission − r2/submission' in out

def test_the_same_file_twice_is_told(files):
    assert ('1 submission is given more than once: one'
        in told(files/'one.csv', files/'two.csv', files/'one.csv', files/'labels.csv', json=True))

def test_labels_in_place_of_the_submission(files, tmp_path):
    (tmp_path/'few.csv').write_text(H+'a,-1\nb,-1\n')
    assert 'is the label file the last one?' in told(files/'labels.csv', tmp_path/'few.csv')
    assert 'the last one' not in told(tmp_path/'few.csv', files/'labels.csv')

def boxes(side, n=6, tall=1/8):
    "Masks of a square frame, far enough to the left for 1024×1024 pixels to hold them"
    rng, far = np.random.default_rng(side), min(.85, .6*(1024/side)**2)
    for _ in range(n):
        m, x, y = np.zeros((side, side), np.uint8), rng.integers(side*far), rng.integers(side//4)
        m[y:y+int(side*tall), x:x+side//12] = 1
        yield m

def table(path, masks):
    path.write_text(H+''.join(f'i{k},{rle_encode(m)}\n' for k, m in enumerate(masks)))
    return path

@pytest.mark.parametrize('side', [256, 512, 768, 1000, 1536, 2048])
@pytest.mark.parametrize('tall', [1/8, 1/2])
def test_masks_of_another_frame_are_refused(tmp_path, capsys, side, tall):
    good, other = table(tmp_path/'good.csv', boxes(1024, tall=tall)), table(tmp_path/'other.csv', boxes(side, tall=tall))
    for f in ([other, good], [good, other]):
        err = refused(capsys, *f)
        assert f'other.csv: its masks repeat every {side:,} pixels' in err and f'a frame {side:,} pixels high' in err
    c = check_submission(other)
    assert c.level.tolist() == ['error'] and c.line.tolist() == [0]
    assert not len(check_submission(good)) and score_submission(good, good)['dice'] == 1

def test_transposed_masks_are_pointed_out(tmp_path):
    masks = np.zeros((12, 1024, 1024), np.uint8)
    for k, m in enumerate(masks): m[100+9*k:220, 180+40*k:800] = 1
    assert ('s: 12 images have an outline in both files, and these share less than 1 %'
        in told(table(tmp_path/'s.csv', masks.transpose(0, 2, 1)), table(tmp_path/'l.csv', masks)))
    assert told(tmp_path/'l.csv', tmp_path/'l.csv') == ''

def test_another_frame_and_the_absolute_form(tmp_path):
    (tmp_path/'small.csv').write_text(H+''.join(f'i{k},{1000+k} 500\n' for k in range(20)))
    assert 'smaller than 1024×1024' in check_submission(tmp_path/'small.csv').problem[0]
    (tmp_path/'absolute.csv').write_text(H+''.join(f'i{k},{700_000+k} 500 800000 100\n' for k in range(20)))
    c = check_submission(tmp_path/'absolute.csv')
    assert c.level.tolist() == ['error']*20+['notice'] and 'absolute' in c.problem[20]
    with pytest.raises(LabelError, match='relative offsets'): score_submission(tmp_path/'absolute.csv', tmp_path/'absolute.csv')

WHO = {'ImageId\na\n': 'columns ImageId', 'ImageId,patient_id\na,1\na,2\n': 'a belongs to several patients',
    'ImageId,patient_id\na,1\n': '6 of 7 scored images have no patient', 'ImageId,patient_id\na,\n': 'have no patient',
    '': 'not a readable CSV'}

@pytest.mark.parametrize('text', WHO, ids=WHO.values())
def test_patients_that_do_not_fit(files, tmp_path, text):
    (tmp_path/'who.csv').write_text(text)
    with pytest.raises(LabelError, match=WHO[text]) as e: score_report(files/'one.csv', files/'labels.csv', tmp_path/'who.csv')
    assert 'who.csv' in str(e.value)

def test_usage(files, capsys):
    assert 'at least one submission, and last the label file' in refused(capsys, files/'one.csv')
    assert 'none.csv: no such file' in refused(capsys, files/'one.csv', files/'none.csv')
    assert '--worst -1' in refused(capsys, files/'one.csv', files/'labels.csv', worst=-1)
