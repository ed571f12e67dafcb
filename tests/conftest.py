"What several tests need: the real radiographs, where they are, and a small set of phantoms"
import os
import re
import sys
from pathlib import Path

import matplotlib
import pytest
import warm

matplotlib.use('Agg')
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ['OMP_NUM_THREADS'] = '1'   # as many workers as cores; read when torch is imported
ROOT = Path(__file__).resolve().parents[1]
if 'PTX_INSTALLED' in os.environ:     # not the checkout but what is installed is to be tested; Python 3.10 knows no PYTHONSAFEPATH
    sys.path[:] = [p for p in sys.path if Path(p or '.').resolve() != ROOT]
    import pneumothorax
    if Path(pneumothorax.__file__).resolve().parent == ROOT/'pneumothorax':
        raise pytest.UsageError(f'{pneumothorax.__file__}: the checkout, where the installed package was to be tested')
SHARED = Path(os.environ.get('PTX_SHARED', ROOT.parent/'shared')).resolve()

# files that take minutes begin first, so that no process waits for another in the end
LONGEST = 'test_notebooks', 'test_train', 'test_kaggle'

def pytest_collection_modifyitems(items): items.sort(key=lambda i: i.path.stem not in LONGEST)

@pytest.fixture(scope='session')
def root():
    "The repository"
    return ROOT

@pytest.fixture(scope='module')
def one_thread():
    "Many small networks are built and run faster by one thread"
    import torch
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='session')
def shared():
    "The folder of real radiographs, labels and submissions"
    if not (SHARED/'siim-small').is_dir(): pytest.skip('no real radiographs: set PTX_SHARED to their folder')
    return SHARED

@pytest.fixture(scope='session')
def phantoms(tmp_path_factory):
    "Twelve small phantoms and four of a test part; half of each are positive, enough for any split"
    from pneumothorax.phantom import make_phantoms
    return make_phantoms(tmp_path_factory.mktemp('phantoms')/'sample', n=12, size=64, positive=.5, progress=False)

TINY = ['--size', '64', '--bs', '4', '--epochs', '1', '--encoder', 'mobilenetv3_small_050', '--weights', 'none', '--workers', '0']

def named(o):
    "Name of a case: the same in every process, without addresses"
    return re.sub(r' at 0x\w+', '', str(o))

def ptx(command, *args):
    "Run an installed command as a user would; stdout and stderr apart"
    return warm.run(Path(sys.executable).parent/command, *args, env={**os.environ, 'COLUMNS': '400'})

def ok(command, *args):
    "The same, and it must succeed"
    p = ptx(command, *args)
    assert p.returncode == 0, f'{command}\n{p.stdout[-1000:]}\n{p.stderr[-3000:]}'
    return p

@pytest.fixture(scope='module')
def cv(phantoms, tmp_path_factory):
    "A cross-validation of two folds and one epoch on the phantoms, from the command line"
    d = tmp_path_factory.mktemp('folds')
    ok('ptx_folds', phantoms, '--n', '2', '--out', d/'folds.csv')
    ok('ptx_train', phantoms, '--folds', d/'folds.csv', '--out', d/'cv', *TINY)
    return d/'cv'

@pytest.fixture(scope='session')
def tiny_run(phantoms, tmp_path_factory):
    "A run of one epoch on the phantoms, from the command line"
    out = tmp_path_factory.mktemp('tiny')/'run'
    ok('ptx_train', phantoms, '--out', out, '--valid', '.5', '--seed', 3, *TINY)
    return out
