"Two processes train as one does; an error in one of them ends both"
import json
import os
import subprocess
import sys
import time
import uuid
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import share_training as share
from conftest import ROOT
from safetensors.torch import load_file

from pneumothorax.phantom import make_phantoms

pytestmark = [pytest.mark.usefixtures('one_thread'),
    pytest.mark.skipif(find_spec('accelerate') is None, reason='accelerate is not installed')]

def launch(mark, *args, script=ROOT/'tests'/'share_training.py'):
    "A script in two processes on the CPU"
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]), 'ACCELERATE_USE_CPU': 'true',
        'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1', 'PTX_TEST_MARK': mark}
    command = ['-W', 'ignore', '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1',
        '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0', script, *args]
    return subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True, timeout=240, check=False)

def left(mark):
    "Processes that carry the mark in their environment"
    out = []
    for p in Path('/proc').glob('[0-9]*'):
        try:
            found = (f'PTX_TEST_MARK={mark}'.encode() in (p/'environ').read_bytes()
                and 'Z' not in (p/'stat').read_text().rsplit(')', 1)[1].split()[0])
        except OSError: continue     # gone meanwhile, or somebody else's
        if found: out.append(p.name)
    return out

@pytest.fixture(scope='module')
def data(tmp_path_factory): return make_phantoms(tmp_path_factory.mktemp('data'), n=21, size=64, n_test=4, positive=.4, progress=False)

@pytest.fixture(scope='module')
def alone(data, tmp_path_factory):
    "What one process does, and the folder with its weights"
    out = tmp_path_factory.mktemp('shared')
    result = share.everything(data, None, out)
    (out/'plain.safetensors').rename(out/'alone.safetensors')
    return {**result, 'measured': share.measure(data, out/'alone.safetensors')}, out

@pytest.fixture(scope='module')
def ended(alone, data):
    "Two processes that do all of it, until one of them fails; and who is left of them"
    mark = uuid.uuid4().hex
    p = launch(mark, data, alone[1])
    for _ in range(60):     # workers look every five seconds whether their process is alive
        if not left(mark): break
        time.sleep(.25)
    return p, left(mark)

@pytest.fixture(scope='module')
def both(alone, ended):
    "What each of two processes did"
    files = [alone[1]/f'{r}.json' for r in range(2)]
    assert all(f.exists() for f in files), ended[0].stdout[-2000:]+ended[0].stderr[-6000:]
    return [json.loads(f.read_text()) for f in files]

def test_two_processes_met(both): assert [(r['n'], r['rank'], r['main']) for r in both] == [(2, 0, True), (2, 1, False)]

@pytest.mark.parametrize('which', ['plain', 'sliding'])
def test_same_losses_and_weights(alone, both, which):
    one, out = alone
    for r in both:
        np.testing.assert_allclose(r[which]['losses'], one[which]['losses'], atol=1e-4, rtol=0)
        np.testing.assert_allclose(np.array(r[which]['values'])[:, :2], np.array(one[which]['values'])[:, :2], atol=1e-4, rtol=0)
    if which == 'plain':
        a, b = load_file(out/'alone.safetensors'), load_file(out/'plain.safetensors')
        assert list(a) == list(b)
        for k in a: np.testing.assert_allclose(b[k], a[k], atol=1e-3, err_msg=k)
    assert both[0][which]['values'] == both[1][which]['values']

def test_batch_norm_of_each_its_own_would_be_another_training(alone, both):
    assert alone[0]['apart']['losses'] == alone[0]['plain']['losses']
    apart, shared = (np.abs(np.subtract(both[0][k]['losses'], alone[0][k]['losses'])).max() for k in ('apart', 'plain'))
    assert apart > 1e-4 > 20*shared

def test_same_metrics_exactly(alone, both):
    for r in both:
        assert r['measured']['values'][1:] == alone[0]['measured']['values'][1:]
        np.testing.assert_allclose(r['measured']['values'][0], alone[0]['measured']['values'][0], rtol=1e-6)
        assert r['measured']['masks'] == alone[0]['measured']['masks']

def test_predictions_come_in_the_order_of_the_data(alone, both):
    for r in both: np.testing.assert_allclose(r['measured']['preds'], alone[0]['measured']['preds'], atol=1e-4)

@pytest.mark.parametrize('which', ['plain', 'sliding'])
def test_each_image_goes_through_one_process(alone, both, which):
    want = alone[0][which]['seen']
    assert [a+b for a, b in zip(both[0][which]['seen'], both[1][which]['seen'])] == want
    assert len(set(want[0])) == 4
    if which == 'sliding': assert len(want) < len(alone[0]['plain']['seen'])

def test_through_the_main_process(both):
    for r in both: assert r['together'] == {'result': {'n': 3}, 'first': 1, 'error': 'LabelError: row 7 of labels.csv'}

def test_learner_is_as_before_after_an_error(both):
    for r in both:
        assert 'this process fails' in r['broken']['error']
        assert r['broken']['kinds'] == ['Sequential', 'Conv2d', 'BatchNormAct2d', 'Conv2d', 'BatchNorm2d', 'ReLU', 'Upsample',
            'Conv2d', 'XrayDL', 'XrayDL']
        assert 'bs=5 for 2 processes' in r['broken']['odd']

def test_an_error_in_one_process_ends_all(alone, both, ended):
    p, alive = ended
    assert p.returncode != 0 and 'this process fails' in p.stdout+p.stderr
    assert not alive and not (alone[1]/'survived').exists()

def test_marks_are_found():
    mark = uuid.uuid4().hex
    p = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE, env={**os.environ, 'PTX_TEST_MARK': mark})
    try:
        deadline = time.time()+20
        while not left(mark) and time.time() < deadline: time.sleep(.05)
        assert left(mark) == [str(p.pid)]
    finally:
        p.kill()
        p.communicate()
    assert not left(mark)

LEAVES = """
import atexit, os, sys
from pathlib import Path
import torch.distributed as dist
# called last
atexit.register(lambda: Path(sys.argv[1], os.environ['RANK']).write_text('still there' if dist.is_initialized() else 'gone'))
from pneumothorax.distributed import join_processes, on_main
assert join_processes() == join_processes() == 2 and on_main(lambda: 3) == 3
"""

def test_the_connection_ends_with_the_process(tmp_path):
    "Threads of gloo that outlive the interpreter end a run that is complete with an abort, now and then"
    (tmp_path/'leaves.py').write_text(LEAVES, encoding='utf-8')
    p = launch(uuid.uuid4().hex, tmp_path, script=tmp_path/'leaves.py')
    assert p.returncode == 0, p.stderr[-2000:]
    assert [(tmp_path/r).read_text() for r in '01'] == ['gone']*2     # in files: the lines of two processes run into each other
