"The harness of the comparisons: what was made otherwise is not used, what fails is told, seeds are compared with their own"
import json
from argparse import Namespace
from dataclasses import replace

import bench
import compare_training as harness
import numpy as np
import pandas as pd
import pytest
import racing


@pytest.fixture
def a(tmp_path):
    return Namespace(out=tmp_path, epochs=25, size=256, weights='lite0', tta='hflip', loss='30*bce+pos_dice', opt='adamw', seeds=2)

@pytest.mark.parametrize('f', sorted(harness.RESULTS.parent.glob('training*.csv')), ids=lambda f: f.stem)
def test_what_is_stored_was_made_with_the_settings_of_today(a, f):
    a.size = int((f.stem.split('-')+[a.size])[1])
    stored, notes = pd.read_csv(f), json.loads(f.with_suffix('.json').read_text())
    assert set(stored.variant) == set(notes) <= set(harness.VARIANTS)
    for v, then in notes.items(): assert not harness.changed(then, harness.settings(a, v)), v

def test_another_default_loss_or_version_is_another_setting(a, monkeypatch):
    from pneumothorax.train import RECIPES
    then = harness.settings(a, 'base')
    a.loss = 'bce'
    assert harness.changed(then, harness.settings(a, 'base')) == "loss='30*bce+pos_dice' (now 'bce')"
    a.loss = '30*bce+pos_dice'
    monkeypatch.setitem(RECIPES, 'default', replace(RECIPES['default'], clip=3.))
    assert 'clip=0.0 (now 3.0)' in harness.changed(then, harness.settings(a, 'base'))
    monkeypatch.setattr(harness, '__version__', '9')
    assert "version='0.1.0' (now '9')" in harness.changed(then, harness.settings(a, 'base'))

def finished(a, *job):
    for k in ('maps', 'healthy'):
        d = a.out/f'{harness.name_of(*job)}.{k}'
        d.mkdir()
        (d/'predict.json').write_text('{}')

def test_runs_of_other_settings_are_moved_aside_and_told(a, capsys):
    for f in harness.FOLDS:
        harness.settled(a, 'base', 0, f)
        finished(a, 'base', 0, f)
    assert harness.made(a, 'base', 0) and not harness.made(a, 'base', 1)
    a.epochs = 3
    assert not harness.made(a, 'base', 0) and 'not used, made with epochs=25 (now 3)' in capsys.readouterr().out
    harness.settled(a, 'base', 0, 0)
    assert 'made anew' in capsys.readouterr().out and not harness.done(a, 'base', 0, 0) and (a.out/'base.seed0.fold0.maps.other').exists()

def test_a_variant_that_fails_is_told_and_tried_again(a, monkeypatch):
    def fails(*_): raise ValueError('no such thing')
    monkeypatch.setattr(harness, 'fit', fails)
    assert harness.attempt(a, None, 'base', 0, 1) == 'base.seed0.fold1: FAILED, ValueError: no such thing'
    assert [f.name for f in harness.failures(a, 'base')] == ['base.seed0.fold1.failed.txt'] and not harness.failures(a, 'ema 0.99')
    monkeypatch.setattr(harness, 'fit', lambda *_: 'well')
    assert harness.attempt(a, None, 'base', 0, 1) == 'well' and not harness.failures(a, 'base')

def test_differences_are_taken_in_the_seeds_that_both_have():
    rows = np.ones(8, bool)
    t = lambda v: pd.DataFrame({'dice': np.full(8, v)})
    base, who = {0: t(.1), 1: t(.5)}, np.arange(8)
    assert harness.compared({1: t(.6), 2: t(.9)}, base, 'dice', rows, who) == ['0.750 (0.600–0.900)', '+0.100 [–]']
    assert harness.compared({2: t(.9)}, base, 'dice', rows, who)[1] == '' and harness.compared(base, base, 'dice', rows, who)[1] == ''

def test_a_race_is_kept_with_its_ratio_and_spread(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('PTX_BENCH', str(tmp_path/'lines'))
    monkeypatch.setenv('PTX_ROUNDS', '3')
    racing.race('sums', 'short', {'short': lambda n: sum(range(n)), 'long': lambda n: sum(range(100*n))}, [1000])
    row = json.loads((tmp_path/'lines').read_text())
    assert ((row['task'], row['what'], row['against'], row['rounds']) == ('sums', 'long', 'short', 3)
        and row['lo'] <= row['ratio'] <= row['hi'] and row['ratio'] > 2)

def test_the_suite_keeps_what_was_not_run_and_tells_what_failed(tmp_path, monkeypatch):
    (tmp_path/'well.py').write_text(
        "import os\nopen(os.environ['PTX_BENCH'], 'a').write('{\"task\": \"t\", \"what\": \"a\", \"against\": \"b\", \"ratio\": 2.0}\\n')")
    (tmp_path/'ill.py').write_text('raise SystemExit(3)')
    monkeypatch.setattr(bench, 'SUITE', {'well': (tmp_path/'well.py',), 'ill': (tmp_path/'ill.py',), 'kept': ('x',)})
    old = pd.DataFrame([{'part': 'kept', 'ratio': 1.}, {'part': 'well', 'ratio': 9.}, {'part': 'gone', 'ratio': 7.}], columns=bench.COLUMNS)
    t = bench.merged(old, [*bench.measured('well', 1), *bench.measured('ill', 1)], ['well', 'ill'])
    assert (list(zip(t.part, t.ratio.fillna(0))) == [('well', 2.), ('ill', 0.), ('kept', 1.)]
        and t.task[t.part == 'ill'].item() == 'FAILED with exit status 3')

def test_every_script_of_the_suite_is_there():
    assert (all((bench.HERE/script).exists() for script, *_ in bench.SUITE.values())
        and {'date', 'cpu', 'cores', 'torch'} < set(bench.machine()))
