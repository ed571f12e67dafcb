"Submissions as they are written, looked at and merged; what is refused, through functions and commands"
import inspect
import json
import re
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from PIL import Image

from pneumothorax import cli, scoring, submission
from pneumothorax.merging import merge_submissions, vote_runs
from pneumothorax.records import FORMAT
from pneumothorax.rle import PtxError, mask_runs, rle_encode, rle_runs, rles_to_mask
from pneumothorax.siim import PtxNotice, read_labels
from pneumothorax.submission import contact_sheet, write_submission

H = 'ImageId,EncodedPixels\n'

def predictions(p, maps, ids, failed=()):
    "A folder as `predict_maps` writes it"
    p.mkdir()
    np.save(p/'maps.npy', maps)
    (p/'predict.json').write_text(json.dumps({'format': FORMAT}))
    pd.DataFrame({'ImageId': ids, 'path': [f'{i}.png' for i in ids], 'row': range(len(ids)),
        'max_prob': [m.max()/255 for m in maps]}).to_csv(p/'index.csv', index=False)
    pd.DataFrame([(i, i, 'broken') for i in failed], columns=['ImageId', 'path', 'error']).to_csv(p/'failed.csv', index=False)
    return p

@pytest.fixture
def pred(tmp_path):
    "Three maps with blobs, one of them with two, an empty one, and a radiograph that was not read"
    maps = np.zeros((4, 64, 64), np.uint8)
    maps[0, 10:20, 30:50] = maps[1, 40:60, 5:9] = maps[1, 2:12, 50:60] = maps[2, :4, :4] = 255
    return predictions(tmp_path/'pred', maps, list('abcd'), ['e'])

@pytest.fixture
def table(tmp_path):
    "A function that writes a table and gives its path"
    def write(name, lines):
        (tmp_path/name).write_text(H+lines)
        return tmp_path/name
    return write

def quietly(f, *args, **kwargs):
    "The result, and what was told"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        r = f(*args, **kwargs)
    return r, '\n'.join(str(o.message) for o in w if issubclass(o.category, PtxNotice))

def write(pred, out, **kwargs): return quietly(write_submission, pred, out, progress=False, **kwargs)

def refused(capsys, command, *args, **kwargs):
    "stderr of a command that ends with 1; called in this process, which is quicker"
    with pytest.raises(SystemExit) as e: command(*args, **kwargs)
    _, err = capsys.readouterr()
    assert e.value.code == 1 and err.count('error: ') == 1
    return err

def both(capsys, pred, out, why, **kwargs):
    "Refused with the same reason by the function and, in its own words, by the command; nothing is left behind"
    with pytest.raises(PtxError, match=why): write(pred, out, **kwargs)
    assert re.search(cli.as_command(why, inspect.signature(cli.ptx_submit).parameters),
        refused(capsys, cli.ptx_submit, pred, out, **kwargs))
    assert not out.exists() and not list(out.parent.glob('.*part'))

# --- writing

def test_rows_of_components_are_the_same_masks(pred, tmp_path):
    one, _ = write(pred, tmp_path/'one.csv')
    many, _ = write(pred, tmp_path/'many.csv', rows='component')
    assert one.ImageId.tolist() == list('abcde') and many.ImageId.tolist() == list('abbcde')
    a, b = (read_labels(tmp_path/f'{n}.csv') for n in ('one', 'many'))
    assert a.area.tolist() == b.area.tolist() and b.n_masks.tolist() == [1, 2, 1, 0, 0]
    for x, y in zip(a.rles, b.rles): assert (rles_to_mask(x) == rles_to_mask(y)).all()

def test_the_order_is_that_of_the_sample_submission(pred, tmp_path, table):
    df, said = write(pred, tmp_path/'s.csv', sample=table('sample.csv', 'e,-1\nd,1 1\nb,-1\nc,-1\nb,-1\na,-1\n'))
    assert df.ImageId.tolist() == list('edbca') and pd.read_csv(tmp_path/'s.csv', dtype=str).equals(df)
    assert '1 unreadable radiograph is submitted as empty: e' in said and df.EncodedPixels[0] == '-1'

def test_images_that_were_not_predicted(pred, tmp_path, table, capsys):
    sample = table('sample.csv', 'a,-1\nx,-1\nb,-1\nc,-1\nd,-1\ne,-1\ny,-1\n')
    both(capsys, pred, tmp_path/'s.csv', r'2 images are not in .*pred \(x, y\)', sample=sample)
    df, said = write(pred, tmp_path/'s.csv', sample=sample, missing='empty')
    assert df.ImageId.tolist() == list('axbcdey') and '2 images of the sample submission are submitted as empty' in said and 'x, y' in said
    assert df.set_index('ImageId').EncodedPixels[['x', 'y', 'd']].tolist() == ['-1']*3

def test_ids_unknown_to_the_sample_submission(pred, tmp_path, table, capsys):
    both(capsys, pred, tmp_path/'s.csv', r'sample.csv: has no line for 2 images of .*pred \(b, e\)',
        sample=table('sample.csv', 'a,-1\nc,-1\nd,-1\n'))
    both(capsys, pred, tmp_path/'s.csv', r'has no line for 5 images', sample=table('sample.csv', 'q,-1\n'), missing='empty')
    both(capsys, pred, tmp_path/'s.csv', r'no such file', sample=tmp_path/'none.csv')
    both(capsys, pred, tmp_path/'s.csv', r'line 3: no ImageId', sample=table('sample.csv', 'a,-1\n,-1\n'))

@pytest.mark.parametrize(('fill', 'what'), [(0, 'empty'), (255, 'full')])
def test_blank_maps(tmp_path, capsys, fill, what):
    p = predictions(tmp_path/'p', np.full((3, 32, 32), fill, np.uint8), list('abc'))
    both(capsys, p, tmp_path/'s.csv', f'every map of 3 is {what} in every pixel')
    df, _ = write(p, tmp_path/'s.csv', blank=True)
    assert set(df.EncodedPixels) == {'-1' if what == 'empty' else '0 1048576'}

def test_decisions_that_keep_nothing_or_everything_are_told(pred, tmp_path):
    assert 'no image of 4 has a mask; the largest probability is 1.000' in write(pred, tmp_path/'a.csv', min_area=10**6)[1]
    p = predictions(tmp_path/'p', np.full((2, 32, 32), 200, np.uint8), list('ab'))
    assert 'each of the 2 masks fills its image' in write(p, tmp_path/'b.csv')[1]
    assert 'no image' not in write(pred, tmp_path/'c.csv')[1]

def test_an_unfinished_prediction(pred, tmp_path, capsys):
    (pred/'predict.json').unlink()
    both(capsys, pred, tmp_path/'s.csv', 'no predict.json; give a folder of `predict_maps` that finished')

def test_wrong_arguments(pred, tmp_path, capsys):
    both(capsys, pred, tmp_path/'s.csv', "rows='pixel'", rows='pixel')
    both(capsys, pred, tmp_path/'s.csv', "missing='ignore'", missing='ignore')
    both(capsys, pred, tmp_path/'s.csv', 'between 0 and 1', thresh=7.)
    (tmp_path/'folder').mkdir()
    with pytest.raises(PtxError, match='a folder'): write(pred, tmp_path/'folder')
    (tmp_path/'file').write_text('')
    with pytest.raises(PtxError, match='cannot be written'): write(pred, tmp_path/'file'/'s.csv')

def test_verdicts_of_a_gate(pred, tmp_path):
    df, _ = write(pred, tmp_path/'k.csv', keep=pd.Series([False, True, True, True], list('abcd')))
    assert (df.EncodedPixels != '-1').tolist() == [False, True, True, False, False]
    df, _ = write(pred, tmp_path/'w.csv', weigh=pd.Series([1, .2, .3, 1.], list('abcd')))
    assert (df.EncodedPixels != '-1').tolist() == [True, False, True, False, False]
    for kw, why in (({'keep': {'a': True}}, r'nothing of 3 images \(b, c, d\)'), ({'weigh': dict.fromkeys('abcd', 2)}, '2 for a'),
            ({'keep': dict.fromkeys('abcd', .3)}, 'True or False')):
        with pytest.raises(PtxError, match=why): write(pred, tmp_path/'x.csv', **kw)

# --- how it is decided

def out_of_fold(p, maps, truth):
    "A folder as `cross_validate` leaves it, the images of a patient in one fold"
    predictions(p, maps, [f'{k:02}' for k in range(len(maps))])
    rles = [rle_encode(np.kron(m, np.ones((32, 32), np.uint8))) for m in truth]
    pd.DataFrame({'ImageId': [f'{k:02}' for k in range(len(maps))], 'EncodedPixels': rles,
        'patient_id': [f'p{k//2}' if k else '' for k in range(len(maps))],
        'fold': np.arange(len(maps))//2 % 3}).to_csv(p/'labels.csv', index=False)
    return p

@pytest.fixture
def oof(tmp_path):
    "Thirty maps: positives have a bright middle and a grey rim, negatives a grey spot"
    maps, truth = np.zeros((30, 32, 32), np.uint8), np.zeros((30, 32, 32), np.uint8)
    for k in range(30):
        maps[k, 8:20, 8:20] = 120
        if k % 2: maps[k, 10:18, 10:18], truth[k, 8:20, 8:20] = 230, 1
    return out_of_fold(tmp_path/'oof', maps, truth)

def test_a_triplet_is_chosen_on_predictions_out_of_fold(oof, pred, tmp_path, capsys):
    r = submission.tune_decision(oof)
    t, source = r['decision'].triplet, r['note']['source']
    assert t.top > 120/255 and t.bottom < 120/255   # the middle tells, the rim is part of the mask
    assert ((source['n'], source['n_pos'], source['n_patients']) == (30, 15, 16) and source['nested'].value > .95
        and source['optimism'] == pytest.approx(0, abs=1e-9))
    df, _ = write(oof, tmp_path/'s.csv', **r)
    assert (df.EncodedPixels != '-1').tolist() == [False, True]*15
    quietly(cli.ptx_submit, oof, tmp_path/'c.csv', labels=oof)
    assert (tmp_path/'c.csv').read_text() == (tmp_path/'s.csv').read_text()
    assert (f'triplet {t}, chosen on 30 images, 15 of them positive; on folds that were not chosen on, Dice {source["nested"]}'
        in capsys.readouterr().out)
    record = json.loads((tmp_path/'c.json').read_text())
    assert (record['decision']['triplet'] == vars(t) and record['source']['oof'] == str(oof)
        and record['source']['nested']['value'] == source['nested'].value)
    quietly(cli.ptx_submit, oof, tmp_path/'again.csv', decision=tmp_path/'c.json')
    assert (tmp_path/'again.csv').read_text() == (tmp_path/'s.csv').read_text()

@pytest.fixture
def ensemble(tmp_path):
    "Thirty images by three networks, which mark the same positives a little beside each other; and a function that changes the record"
    shifts, each = (-3, 0, 3), np.zeros((3, 30, 32, 32), np.uint8)
    for m, d in zip(each, shifts):
        m[:, 8:20, 8:20] = 120
        m[1::2, 10:18, 12+d:16+d] = 230
    p = predictions(tmp_path/'three', each.mean(0).round().astype(np.uint8), [f'{k:02}' for k in range(30)])
    for k, m in enumerate(each): np.save(p/f'maps-{k}.npy', m)
    def says(**kwargs):
        (p/'predict.json').write_text(json.dumps({'format': FORMAT, 'networks': 3, 'size': 32, 'views': ['identity'], **kwargs}))
    says()
    return p, each, says

def like(oof, **kwargs):
    (oof/'predict.json').write_text(json.dumps({'format': FORMAT, 'networks': 1, 'size': 32, 'views': ['identity'], **kwargs}))

def test_each_network_decides_by_a_rule_of_single_networks(oof, ensemble, tmp_path, capsys):
    from pneumothorax.decide import MapKind, Triplet, decide
    p, each, says = ensemble
    like(oof)
    how = submission.tune_decision(oof, tops=[.85], areas=[0], bottoms=[.25])
    assert how['decision'].triplet == Triplet(.85, 0, .25) and how['decision'].chosen_on == MapKind(1, ('identity',), size=32)
    df, _ = write(p, tmp_path/'s.csv', **how)
    voted = [sum(decide(m[k], how['decision']).astype(int) for m in each)*2 >= 3 for k in range(30)]
    assert (df.EncodedPixels.tolist() == [rle_encode(v.astype(np.uint8)) for v in voted]
        and (df.EncodedPixels != '-1').tolist() == [False, True]*15)
    assert json.loads((tmp_path/'s.json').read_text())['votes_of'] == 3
    by_mean, told = write(p, tmp_path/'m.csv', decision='.85,0,.25')   # somebody's own numbers cut the mean, which is sure of nothing
    assert (by_mean.EncodedPixels == '-1').all() and told
    quietly(cli.ptx_submit, p, tmp_path/'again.csv', decision=tmp_path/'s.json')
    assert (tmp_path/'again.csv').read_text() == (tmp_path/'s.csv').read_text()
    says(weights=[5, 1, 1])
    assert write(p, tmp_path/'w.csv', **how)[0].EncodedPixels.tolist() == [rle_encode(decide(m, how['decision'])) for m in each[0]]

def test_a_rule_is_not_applied_to_other_maps(oof, ensemble, tmp_path, capsys):
    p, _, says = ensemble
    like(oof)
    d = submission.tune_decision(oof, tops=[.85], areas=[0], bottoms=[.25])['decision']
    (tmp_path/'d.json').write_text(json.dumps(d.spec()))
    def other(why):
        with pytest.raises(PtxError, match=why): write(p, tmp_path/'x.csv', decision=d)
        assert (re.search(why, refused(capsys, cli.ptx_submit, p, tmp_path/'x.csv', decision=tmp_path/'d.json'))
            and not (tmp_path/'x.csv').exists())
    for change, why in (({'views': ['identity', 'hflip']}, 'views identity, and these are of views identity,hflip'),
            ({'size': 64}, 'size 32, and these are of size 64')):
        says(**change)
        other(why)
    says()
    for f in p.glob('maps-*.npy'): f.unlink()
    other('mean of 3 alone')

def test_a_rule_of_two_networks_out_of_fold(oof, ensemble, tmp_path):
    "Both are counted, each for itself; without their maps the rule is one of means of two"
    from pneumothorax.decide import count_pixels, nested_search
    t, maps = pd.read_csv(oof/'labels.csv', dtype=str, keep_default_na=False), np.load(oof/'maps.npy')
    like(oof, networks=2)
    for k in range(2): np.save(oof/f'maps-{k}.npy', np.roll(maps, k, 1))
    grid = [.3, .7], [0, 1000], [.3, .5]
    how = submission.tune_decision(oof, *grid)
    c = count_pixels(np.concatenate([maps, np.roll(maps, 1, 1)]), [*t.EncodedPixels]*2, [.3, .5, .7])
    want = nested_search(c, [*t.fold]*2, [*t.patient_id.where(t.patient_id != '', '?'+t.ImageId)]*2, *grid)
    assert ((how['decision'].triplet, how['decision'].chosen_on.networks) == (want['triplet'], 1)
        and how['note']['source']['nested'] == want['score'])
    assert write(ensemble[0], tmp_path/'s.csv', **how)[0].EncodedPixels.ne('-1').sum() == 15
    for f in oof.glob('maps-*.npy'): f.unlink()
    how = submission.tune_decision(oof, *grid)
    assert how['decision'].chosen_on.networks == 2
    with pytest.raises(PtxError, match='networks 2, and these are of networks 3'): write(ensemble[0], tmp_path/'x.csv', **how)

def test_a_gate_is_asked_about_each_network(oof, ensemble, tmp_path):
    "As by hand: features, probability and verdict of each network, then votes"
    from pneumothorax.decide import decide, vote
    from pneumothorax.gate import features, fit_gate, weigh_map
    from pneumothorax.records import open_maps
    p, each, says = ensemble
    like(oof)
    gate, _ = quietly(fit_gate, oof, 'map', progress=False, kind='logistic')
    assert gate.about['maps'] == {'networks': 1, 'views': ('identity',), 'mean': 'prob', 'size': 32, 'dtype': None, 'weighed': False}
    gate.save(tmp_path/'gate')
    how, table = submission.tune_decision(oof, tops=[.85], areas=[0], bottoms=[.25]), open_maps(p)[0]
    ps = [gate.predict(features((table, m), 'map', progress=False)) for m in each]
    said = submission.gate_verdict(p, tmp_path/'gate', progress=False)
    assert said['keep'].shape == (30, 3) and all((said['keep'][k] == (q >= gate.threshold)).all() for k, q in enumerate(ps))
    keep = said['keep'].copy()
    keep.iloc[1] = [True, False, False]
    df, _ = write(p, tmp_path/'s.csv', decision=how['decision'], keep=keep)
    masks = [[decide(m[k], how['decision'], keep[j].iloc[k]) for j, m in enumerate(each)] for k in range(30)]
    assert df.EncodedPixels.tolist() == [rle_encode(vote(m)) for m in masks] and df.EncodedPixels[1] == '-1'
    heavy, _ = quietly(submission.tune_decision, oof, tops=[.5], areas=[0], bottoms=[.25], weigh=gate.out_of_fold())
    said = submission.gate_verdict(p, gate, decision=heavy['decision'], progress=False)   # the rule says that a gate has to weigh
    df, _ = write(p, tmp_path/'w.csv', decision=heavy['decision'], weigh=said['weigh'])
    assert df.EncodedPixels[3] == rle_encode(vote([decide(weigh_map(m[3], ps[j].iloc[3]), heavy['decision']) for j, m in enumerate(each)]))
    with pytest.raises(PtxError, match='that a gate had weighed; give that gate'): write(p, tmp_path/'x.csv', decision=heavy['decision'])
    quietly(cli.ptx_submit, p, tmp_path/'c.csv', labels=oof, gate=tmp_path/'gate', gate_rule='weigh')
    r = json.loads((tmp_path/'c.json').read_text())
    assert r['decision']['chosen_on']['weighed'] and r['gate']['networks'] == 3 and r['votes_of'] == 3
    says(views=['identity', 'hflip'])
    with pytest.raises(PtxError, match='the gate was chosen on maps of views identity'): submission.gate_verdict(p, gate, progress=False)

@pytest.mark.parametrize(('fill', 'what'), [(0, 'empty'), (255, 'full')])
def test_nothing_is_chosen_on_blank_maps(pred, tmp_path, capsys, fill, what):
    truth = np.zeros((6, 32, 32), np.uint8)
    truth[::2, 4:9, 4:9] = 1
    p = out_of_fold(tmp_path/'blank', np.full((6, 32, 32), fill, np.uint8), truth)
    with pytest.raises(PtxError, match=f'every map of 6 is {what} at every threshold'): submission.tune_decision(p)
    assert 'at every threshold' in refused(capsys, cli.ptx_submit, pred, tmp_path/'s.csv', labels=p)
    p = out_of_fold(tmp_path/'healthy', np.full((6, 32, 32), 99, np.uint8), truth*0)
    with pytest.raises(PtxError, match='no image of 6 is positive'): submission.tune_decision(p)

def test_an_unfinished_cross_validation(pred, tmp_path, capsys):
    (tmp_path/'cv'/'oof').mkdir(parents=True)
    (tmp_path/'cv'/'crossval.json').write_text('{}')
    with pytest.raises(PtxError, match='not all folds are trained and predicted'): submission.tune_decision(tmp_path/'cv')
    assert 'not all folds' in refused(capsys, cli.ptx_submit, pred, tmp_path/'s.csv', labels=tmp_path/'cv')
    assert 'no labels.csv' in refused(capsys, cli.ptx_submit, pred, tmp_path/'s.csv', labels=pred)

@pytest.mark.parametrize('text', ['.75', '.75,2000', '.75,2000,.3,1', 'a,b,c', '75,2000,.3', '.75,-1,.3',
    '.75,2000,nan', '.75,inf,.3', ' '])
def test_no_triplet(pred, tmp_path, capsys, text):
    with pytest.raises(PtxError): write(pred, tmp_path/'s.csv', decision=text)
    assert refused(capsys, cli.ptx_submit, pred, tmp_path/'s.csv', triplet=text).startswith('error: ')
    assert not (tmp_path/'s.csv').exists()

def test_a_decision_is_what_it_says(pred, tmp_path):
    from pneumothorax.decide import Decision, Triplet, decide
    d = Decision(Triplet(.5, 3000, .2), min_piece=20_000)
    want = [rle_encode(decide(m, d)) for m in np.load(pred/'maps.npy')]
    for n, x in enumerate((d, d.spec(), json.loads(json.dumps(d.spec())))):
        assert write(pred, tmp_path/f'{n}.csv', decision=x)[0].EncodedPixels.tolist()[:4] == want
    quietly(cli.ptx_submit, pred, tmp_path/'c.csv', triplet='.5,3000,.2', min_piece=20_000)
    assert pd.read_csv(tmp_path/'c.csv', dtype=str).EncodedPixels.tolist()[:4] == want and len(set(want)) == 3
    plain, _ = write(pred, tmp_path/'p.csv', thresh=.3, min_area=0)
    assert write(pred, tmp_path/'q.csv', decision=submission.read_decision(tmp_path/'p.json'))[0].equals(plain)

def test_what_is_no_decision(pred, tmp_path, capsys):
    for text in ('', '[]', '{"decision": "left"}', '{"decision": {"triplet": 7}}',
            '{"decision": {"thresh": 7, "min_area": 0}}', '{"n": 3}'):
        (tmp_path/'d.json').write_text(text)
        with pytest.raises(PtxError, match=re.escape(str(tmp_path/'d.json'))): submission.read_decision(tmp_path/'d.json')
        assert 'd.json' in refused(capsys, cli.ptx_submit, pred, tmp_path/'s.csv', decision=tmp_path/'d.json')
    for kw, why in (({'triplet': '.5,0,.5', 'decision': tmp_path/'d.json'}, 'give one of them'), ({'min_piece': 5}, 'belongs to a triplet'),
            ({'triplet': '.5,0,.5', 'min_area': 0}, 'are the plain rule')):
        assert why in refused(capsys, cli.ptx_submit, pred, tmp_path/'s.csv', **kw)

def test_a_gate_fitted_on_predictions_out_of_fold(oof, tmp_path, capsys, monkeypatch):
    quietly(cli.ptx_submit, oof, tmp_path/'s.csv', gate=oof, thresh=.4)
    assert 'the gate leaves 15 radiographs without a mask' in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    for f in pd.read_csv(oof/'index.csv').path: Image.new('L', (32, 32)).save(f)
    quietly(cli.ptx_export, oof, 'npy', tmp_path/'e', gate=oof, thresh=.4)
    assert 'the gate leaves 15 radiographs without a mask' in capsys.readouterr().out
    quietly(cli.ptx_submit, oof, tmp_path/'t.csv', thresh=.4)
    assert 'the gate' not in capsys.readouterr().out
    r = json.loads((tmp_path/'s.json').read_text())
    assert r['gate']['n_fitted'] == 30 and r['dropped'] == 15 and r['n_masks'] == 15   # at .4 every map has a mask

def test_a_saved_gate_by_the_command(tmp_path, capsys):
    from pneumothorax.gate import Gate, dice_if_kept, features
    maps, y = np.zeros((40, 32, 32), np.uint8), np.arange(40)%2
    for k, m in enumerate(maps): m[5:20, 5:12] = 130+3*k if y[k] else 129+k//4   # all of them get a mask, that of a negative one is fainter
    p = predictions(tmp_path/'p', maps, [f'{k:02}' for k in range(40)])
    truth = [[r] if v else [] for r, v in zip(write(p, tmp_path/'all.csv')[0].EncodedPixels, y)]
    gate, _ = quietly(Gate('logistic').fit, features(p, 'map', progress=False), y, kept=dice_if_kept(p, truth))
    gate.save(tmp_path/'gate')
    df, _ = write(p, tmp_path/'s.csv', **submission.gate_verdict(p, gate, progress=False))
    kept = (df.EncodedPixels != '-1').to_numpy()
    assert (kept == (gate.predict(features(p, 'map', progress=False)) >= gate.threshold)).all() and 15 <= kept.sum() <= 25
    quietly(cli.ptx_submit, p, tmp_path/'c.csv', gate=tmp_path/'gate')
    assert (tmp_path/'c.csv').read_text() == (tmp_path/'s.csv').read_text()
    r = json.loads((tmp_path/'c.json').read_text())
    assert r['gate']['rule'] == 'threshold' and r['gate']['threshold'] == gate.threshold and r['dropped'] == 40-kept.sum()
    assert '--gate_rule guess' in refused(capsys, cli.ptx_submit, p, tmp_path/'x.csv', gate=tmp_path/'gate', gate_rule='guess')
    assert 'no labels.csv' in refused(capsys, cli.ptx_submit, p, tmp_path/'x.csv', gate=p)
    plain, _ = quietly(Gate('logistic').fit, features(p, 'map', progress=False), y)
    with pytest.raises(PtxError, match='has no threshold'): submission.gate_verdict(p, plain, progress=False)
    assert submission.gate_verdict(p, plain, 'weigh', progress=False)['weigh'].between(0, 1).all()

def test_the_record_beside_the_file(pred, tmp_path, table, capsys):
    write(pred, tmp_path/'s.csv', keep=dict(zip('abcd', [1, 1, 0, 1])), sample=table('sample.csv', 'e,-1\nd,-1\nc,-1\nb,-1\na,-1\n'),
        note={'source': 'a guess'})
    r, t = json.loads((tmp_path/'s.json').read_text()), read_labels(tmp_path/'s.csv')
    assert (r['n'], r['n_masks'], r['area']) == (5, t.has_ptx.sum(), t.area.sum()) == (5, 2, t.area.sum()) and t.area.sum() > 0
    assert (r['decision'] == {'thresh': .5, 'min_area': 800} and r['dropped'] == 1 and not r['weighed'] and r['source'] == 'a guess'
        and 'torch' in r['versions'])
    (tmp_path/'own.json').write_text('{"mine": 1}')
    both(capsys, pred, tmp_path/'own.csv', 'own.json: the record of the submission belongs there')
    assert (tmp_path/'own.json').read_text() == '{"mine": 1}'

def test_any_function_may_decide(pred, tmp_path):
    def left(p): return np.repeat(np.arange(1024) < p.max(), 1024).reshape(1024, 1024).T.astype(np.uint8)
    df, _ = write(pred, tmp_path/'s.csv', decision=left)
    assert df.EncodedPixels.tolist() == [f'0 {255*1024}']*3+['-1']*2
    assert json.loads((tmp_path/'s.json').read_text())['decision'] == 'left'

def scrambled(kind):
    "Encoders that are wrong"
    return {'absolute': lambda m: rle_encode(m, relative=False), 'by rows': lambda m: rle_encode(m.T),
        'one pixel short': lambda m: rle_encode(np.roll(m, 1, 0)), 'not a number': lambda m: 'x'}[kind]

@pytest.mark.parametrize('kind', ['absolute', 'by rows', 'one pixel short', 'not a number'])
def test_a_file_that_decodes_to_something_else_is_not_kept(pred, tmp_path, monkeypatch, kind):
    (tmp_path/'s.csv').write_text('the earlier one')
    monkeypatch.setitem(submission._ROWS, 'image', lambda m: [scrambled(kind)(m) if m.any() else '-1'])
    with pytest.raises(PtxError, match='would not decode to the masks that were decided'): write(pred, tmp_path/'s.csv')
    assert (tmp_path/'s.csv').read_text() == 'the earlier one' and not list(tmp_path.glob('.*part'))

def test_a_lost_or_moved_row_is_noticed(pred, tmp_path, monkeypatch):
    to_csv = pd.DataFrame.to_csv
    for wrong in (lambda df: df[1:], lambda df: df[::-1]):
        monkeypatch.setattr(pd.DataFrame, 'to_csv', lambda df, f, wrong=wrong, **kw: to_csv(wrong(df), f, **kw))
        with pytest.raises(PtxError, match='other images, or another order'): write(pred, tmp_path/'s.csv')

MEMORY = '''
import sys, tracemalloc, numpy as np
from pneumothorax.submission import _save
n, row = int(sys.argv[1]), np.zeros((1024, 1024), np.uint8)
row[100:130, 200:240] = 1
_save([(f'i{k}', row) for k in range(2)], ['i0', 'i1'], 'warm.csv')
tracemalloc.start()
_save(((f'i{k}', np.roll(row, k, 0)) for k in range(n)), [f'i{k}' for k in range(n)], 'out.csv')
print(tracemalloc.get_traced_memory()[1])
'''

def test_memory_does_not_grow_with_the_images(tmp_path):
    peak = [int(subprocess.run([sys.executable, '-c', MEMORY, str(n)], cwd=tmp_path, capture_output=True, text=True, check=True).stdout)
        for n in (20, 120)]
    assert peak[1]-peak[0] < 2**20   # a hundred masks are a hundred times as much

# --- looking

def test_the_sheet_of_a_command(pred, tmp_path, capsys):
    # no radiograph is where the index says, and the sheet says so
    quietly(cli.ptx_submit, pred, tmp_path/'s.csv', sheet=tmp_path/'sheet.png')
    assert (tmp_path/'sheet.png').read_bytes()[:4] == b'\x89PNG' and 'a sheet of them' in capsys.readouterr().out
    with pytest.raises(PtxError, match='no image of it is among the 1 given'):
        contact_sheet(tmp_path/'s.csv', {'q': 'q.png'}, tmp_path/'x.png')
    assert not (tmp_path/'x.png').exists()

# --- merging

def test_votes_against_pixels():
    rng = np.random.default_rng(1)
    for k in range(2, 7):
        masks = (rng.random((k, 33, 17)) < rng.random((k, 1, 1))).astype(np.uint8)
        for least in range(1, k+1):
            a, b = vote_runs([mask_runs(m) for m in masks], least), mask_runs(masks.sum(0) >= least)
            assert (a[0] == b[0]).all() and (a[1] == b[1]).all()
    assert [len(o) for o in vote_runs([rle_runs('-1')]*3, 1)] == [0, 0]

@pytest.fixture
def files(table):
    return [table('one.csv', 'a,0 10\nb,-1\nc,0 10\nd,5 5\n'), table('two.csv', 'b,-1\nd,0 3\nd,3 2\na,5 10\nc,-1\n'),
        table('three.csv', 'a,5 5\nb,\nc,-1\nd,-1\n')]

MERGED = {('vote', None): ['5 5', '-1', '-1', '-1'], ('vote', 1): ['0 15', '-1', '0 10', '0 10'], ('vote', 3): ['5 5', '-1', '-1', '-1'],
    ('images', None): ['5 5', '-1', '-1', '0 10'], ('images', 1): ['5 5', '-1', '0 10', '0 10'], ('images', 3): ['5 5', '-1', '-1', '-1'],
    ('agree', None): ['5 5', '-1', '-1', '5 5'], ('union', None): ['0 15', '-1', '0 10', '0 10'],
    ('intersection', None): ['5 5', '-1', '-1', '-1']}

@pytest.mark.parametrize(('how', 'votes'), MERGED)
def test_merged_by_hand(files, tmp_path, how, votes):
    df = merge_submissions(files, tmp_path/'m.csv', how, votes)
    assert df.ImageId.tolist() == list('abcd') and df.EncodedPixels.tolist() == MERGED[how, votes]
    cli.ptx_merge(files, tmp_path/'n.csv', how, votes)
    assert (tmp_path/'n.csv').read_text() == (tmp_path/'m.csv').read_text()
    r = json.loads((tmp_path/'n.json').read_text())
    assert (r['how'], r['votes'], r['n_masks']) == (how, votes, sum(v != '-1' for v in MERGED[how, votes])) and len(r['files']) == 3

def test_weights_and_their_sum(files, tmp_path):
    merged = lambda **kw: merge_submissions(files, tmp_path/'m.csv', **kw).EncodedPixels.tolist()
    assert merged(weights=[3, 1, 1]) == ['0 10', '-1', '0 10', '5 5']
    assert merged(weights=[.3, .1, .1]) == merged(weights=[3, 1, 1])
    assert merged(weights=[.1, .2, .3], votes=.6) == merged(how='intersection')   # .1+.2+.3 > .6 in floating point
    assert merged(weights=[2, 1, 1]) == merged()   # half is no majority

def test_merging_takes_the_order_of_the_sample_submission(files, tmp_path, table):
    df, said = quietly(merge_submissions, files, tmp_path/'m.csv',
        sample=table('sample.csv', 'd,-1\nz,-1\na,-1\nb,-1\nc,-1\n'), missing='empty')
    assert df.ImageId.tolist() == list('dzabc') and 'nothing is known of them: z' in said

def test_what_cannot_be_merged(files, tmp_path, table, capsys):
    less, bad = table('less.csv', 'a,-1\nb,-1\nx,-1\n'), table('bad.csv', 'a,1 2 3\nb,-1\nc,-1\nd,-1\n')
    for fs, kw, why in ((files[:1], {}, 'at least two'),
            ([files[0], less], {}, r'1 image not in .*one.csv \(x\); 2 images not in .*less.csv \(c, d\)'),
            ([files[0], bad], {}, 'bad.csv: 1 faulty line'), (files, {'how': 'mean'}, "how='mean'"),
            (files, {'votes': 4}, 'at most 3'), (files, {'votes': 0}, 'more than 0'),
            (files, {'how': 'union', 'votes': 2}, 'does not count votes'), ([files[0], tmp_path/'none.csv'], {}, 'no such file'),
            (files, {'sample': table('sample.csv', 'a,-1\nb,-1\n')}, r'no line for 2 images of the submissions \(c, d\)')):
        with pytest.raises(PtxError, match=why): merge_submissions(fs, tmp_path/'m.csv', **kw)
        refused(capsys, cli.ptx_merge, fs, tmp_path/'m.csv', **kw)
        assert not (tmp_path/'m.csv').exists()
    for weights, why in (([1, 2], 'each of the 3'), ([1, 1, 0], 'positive'), ([1, 1, float('nan')], 'positive')):
        with pytest.raises(PtxError, match=why): merge_submissions(files, tmp_path/'m.csv', weights=weights)
    assert '--weights 1,x,2' in refused(capsys, cli.ptx_merge, files, tmp_path/'m.csv', weights='1,x,2')
    df, said = quietly(merge_submissions, [files[0], less], tmp_path/'m.csv', 'union', missing='empty')
    assert df.EncodedPixels.tolist() == ['0 10', '-1', '0 10', '5 5', '-1'] and 'less.csv, which counts as empty: c, d' in said
    assert 'given more than once' in quietly(merge_submissions, [files[0], files[0]], tmp_path/'m.csv')[1]

def test_real_submissions(shared, tmp_path):
    fs, labels = sorted((shared/'submissions').glob('*.csv')), shared/'siim-labels'/'stage_2_train.csv.gz'
    quietly(merge_submissions, fs, tmp_path/'m.csv', votes=3, missing='empty')
    s, _ = quietly(scoring.score_submission, tmp_path/'m.csv', labels)
    assert (round(s['dice'], 4), s['n'], s['n_pos']) == (.8257, 1372, 290)

def test_the_documentation_names_merging(): assert 'ptx_merge A.csv B.csv C.csv' in (ROOT/'README.md').read_text(encoding='utf-8')
