"From radiographs to a scored submission by the commands, and the figures that must come out exactly"
import json
import re
import shlex

import pandas as pd
import pytest
from conftest import ROOT, TINY, ok, ptx
from safetensors.numpy import load_file

from pneumothorax.predict import predict_maps
from pneumothorax.records import open_maps
from pneumothorax.train import train


def test_train_predict_submit_score(phantoms, tiny_run, tmp_path):
    sub, truth = tmp_path/'submission.csv', phantoms/'answers'/'test-rle.csv'
    ok('ptx_predict', tiny_run, phantoms/'dicom-images-test', '--out', tmp_path/'pred', '--workers', 0)
    ok('ptx_submit', tmp_path/'pred', '--out', sub, '--thresh', .01)
    df = pd.read_csv(sub)
    assert list(df.columns) == ['ImageId', 'EncodedPixels']
    assert set(df.ImageId) == {f.stem for f in (phantoms/'dicom-images-test').rglob('*.dcm')}
    s = json.loads(ok('ptx_score', sub, truth, '--json').stdout)
    assert list(s)[:5] == ['dice', 'dice_pos', 'dice_neg', 'n', 'n_pos'] and {'intervals', 'confusion', 'worst'} <= set(s)
    assert s['n'] == len(df) and 0 <= s['dice'] <= 1
    perfect = json.loads(ok('ptx_score', truth, truth, '--json').stdout)
    assert perfect['dice'] == 1 and perfect['n_pos'] > 0
    assert f"{s['dice']:.4f}" in ok('ptx_score', sub, truth).stdout

def test_a_run_says_how_it_was_made(tiny_run):
    assert {'run.json', 'history.csv', 'model.safetensors', 'history.png', 'valid.png'} <= {f.name for f in tiny_run.iterdir()}
    r = json.loads((tiny_run/'run.json').read_text())
    assert r['seed'] == r['args']['seed'] == 3 and r['args']['size'] == 64
    assert {'torch', 'fastai', 'timm', 'pneumothorax', 'python'} <= set(r['versions'])
    h = pd.read_csv(tiny_run/'history.csv')
    assert len(h) == 1 and {'train_loss', 'valid_loss', 'dice', 'dice_pos', 'dice_neg'} <= set(h)
    for png in tiny_run.glob('*.png'): assert png.read_bytes()[:4] == b'\x89PNG'

def same(a, b):
    a, b = load_file(a/'model.safetensors'), load_file(b/'model.safetensors')
    return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)

def test_the_command_is_the_function_and_the_seed_decides(phantoms, tiny_run, tmp_path):
    kw = {'size': 64, 'bs': 4, 'epochs': 1, 'encoder': 'mobilenetv3_small_050', 'weights': 'none', 'workers': 0,
        'valid': .5, 'progress': False}
    train(phantoms, tmp_path/'again', seed=3, **kw)
    train(phantoms, tmp_path/'other', seed=4, **kw)
    assert same(tiny_run, tmp_path/'again')
    assert not same(tiny_run, tmp_path/'other')

def test_maps_do_not_depend_on_batches_or_workers(phantoms, tiny_run, tmp_path):
    images = phantoms/'dicom-images-test'
    a = open_maps(predict_maps(tiny_run, images, tmp_path/'a', bs=1, workers=0, progress=False))
    b = open_maps(predict_maps(tiny_run, images, tmp_path/'b', bs=8, workers=2, progress=False))
    assert a[0].ImageId.tolist() == b[0].ImageId.tolist()
    assert abs(a[1].astype(int)-b[1]).max() <= 1   # one 255th, where a sum of another order crosses a rounding edge

def test_another_model_seeded_by_a_run(phantoms, tiny_run, tmp_path):
    "The encoder of one run starts a network of another family, at another size; its run predicts like any other"
    run, tiny = tmp_path/'run', [*TINY]
    tiny[tiny.index('--weights')+1], tiny[tiny.index('--size')+1] = tiny_run, 96
    ok('ptx_train', phantoms, '--out', run, '--valid', '.5', '--model', 'hyperunet:attention=scse,aux=True,deep_supervision=True',
        '--loss', '3:1:4', *tiny)
    config = json.loads((run/'run.json').read_text())['model']['config']
    assert (config['name'], config['attention'], config['aux'], config['encoder']) == ('hyperunet', 'scse', True, 'mobilenetv3_small_050')
    ok('ptx_predict', run, phantoms/'dicom-images-test', '--out', tmp_path/'pred', '--workers', 0)
    tiny[tiny.index('--weights')+1] = run/'model.safetensors'
    ok('ptx_train', phantoms, '--out', tmp_path/'unet', '--valid', '.5', '--model', 'fastai_unet', *tiny)
    ok('ptx_predict', tmp_path/'unet', phantoms/'dicom-images-test', '--out', tmp_path/'pred2', '--workers', 0)
    assert open_maps(tmp_path/'pred2')[1].shape == open_maps(tmp_path/'pred')[1].shape == (4, 96, 96)

def test_a_variant_at_test_time(phantoms, tiny_run, tmp_path):
    ok('ptx_predict', tiny_run, phantoms/'dicom-images-test', '--out', tmp_path/'a', '--workers', 0, '--variant', 'hist')
    assert json.loads((tmp_path/'a'/'predict.json').read_text())['variant']['name'] == 'HistEqualize'
    p = ptx('ptx_predict', tiny_run, phantoms/'dicom-images-test', '--out', tmp_path/'b', '--variant', 'sharpen')
    assert p.returncode == 1 and 'no such equalisation' in p.stderr and not (tmp_path/'b').exists()

SCORES = {'stage1-fastai-solution': .8342, 'stage1-keras-v9': .8165, 'stage1-keras-v3': .7971, 'stage1-keras-v2': .4607}

@pytest.mark.parametrize('name', SCORES)
def test_published_submissions_score_as_published(shared, name):
    p = ok('ptx_score', shared/'submissions'/f'{name}.csv', shared/'siim-labels'/'stage_2_train.csv.gz', '--json')
    s = json.loads(p.stdout)
    assert (round(s['dice'], 4), s['n']) == (SCORES[name], 1372)

def test_a_misspelt_folder_is_no_success(tmp_path): assert ptx('ptx_train', tmp_path/'none', '--out', tmp_path/'run', *TINY).returncode == 1

@pytest.mark.slow
def test_real_radiographs(shared, tmp_path):
    "Three epochs on the real ones, from ImageNet's weights; the untouched ten become a submission"
    ok('ptx_train', shared/'siim-small', '--out', tmp_path/'run', '--weights', 'lite0', '--size', 256, '--epochs', 3)
    r = json.loads((tmp_path/'run'/'run.json').read_text())
    assert r['data']['n_train'] + len(r['data']['valid']) == 114 and r['model']['weights'] == 'lite0'
    ok('ptx_predict', tmp_path/'run', shared/'siim-small'/'dicom-images-test', '--out', tmp_path/'pred')
    ok('ptx_submit', tmp_path/'pred', '--out', tmp_path/'submission.csv')
    assert len(pd.read_csv(tmp_path/'submission.csv')) == 10
    h = pd.read_csv(tmp_path/'run'/'history.csv')
    assert h.train_loss.iloc[-1] < h.train_loss.iloc[0]

@pytest.mark.slow
def test_demo_finds_pneumothoraces(tmp_path):
    ok('ptx_demo', '--out', tmp_path/'demo')
    s = json.loads((tmp_path/'demo'/'score.json').read_text())
    assert s['dice_pos'] >= .6 and (tmp_path/'demo'/'overlays.png').exists()

def blocks():
    "The two blocks of commands in the README that train, each a list of lines, each line a list of words"
    section = re.search(r'^## Or from the command line\n(.*?)^## ', (ROOT/'README.md').read_text(encoding='utf-8'),
        re.MULTILINE|re.DOTALL).group(1)
    return [[shlex.split(line, comments=True) for line in b.splitlines()]
        for b in re.findall(r'^```sh\n(.*?)^```', section, re.MULTILINE|re.DOTALL)]

def changed(words, **options):
    "A command with some of its options replaced or added"
    for k,v in options.items():
        if f'--{k}' in words: words = [*words[:(i := words.index(f'--{k}'))], *words[i+2:]]
        words = [*words, f'--{k}', v]
    return words

def test_the_readme_holds_the_commands():
    first, folds = blocks()
    assert [w[0] for w in first] == ['ptx_sample', 'ptx_train', 'ptx_predict', 'ptx_submit', 'ptx_score']
    assert [w[0] for w in folds] == ['ptx_folds', 'ptx_train', 'ptx_predict', 'ptx_predict', 'ptx_submit', 'ptx_score', 'ptx_report']
    assert changed(['ptx_x', 'data', '--n', '3', '--out', 'y'], n=4, seed=1) == ['ptx_x', 'data', '--out', 'y', '--n', 4, '--seed', 1]

@pytest.mark.parametrize('seed', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_first_commands_on_a_small_sample(tmp_path, monkeypatch, seed):
    """The README's first block with smaller pictures outlines pneumothoraces that its network has not seen; whole, it is one of the long
    tests"""
    train = {'size': 96, 'epochs': 8, 'bs': 4, 'lr': 4e-3, 'workers': 0, 'seed': seed}
    small = {'ptx_sample': {'n': 96, 'size': 96, 'seed': seed}, 'ptx_train': train, 'ptx_predict': {'workers': 0}}
    monkeypatch.chdir(tmp_path)
    for words in blocks()[0]: p = ok(*changed(words, **small.get(words[0], {})))
    s = json.loads(ok(*words, '--json').stdout)
    assert s['n_pos'] == 12 and s['dice_pos'] > .1, p.stdout

@pytest.mark.slow
@pytest.mark.parametrize('which', ['first', 'folds'])
def test_the_commands_of_the_readme(tmp_path, monkeypatch, which):
    "Each block as it stands there ends with networks that outline pneumothoraces on phantoms that they have not seen"
    first, folds = blocks()
    monkeypatch.chdir(tmp_path)
    for words in (block := first if which=='first' else [first[0], *folds]): ok(*words)
    s = json.loads(ok(*next(w for w in block if w[0] == 'ptx_score'), '--json').stdout)
    assert which == 'first' or (tmp_path/'report.html').stat().st_size > 1e5
    assert s['n'] == 40 and s['n_pos'] == 20 and s['dice_pos'] >= .3
