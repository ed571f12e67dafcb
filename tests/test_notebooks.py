"Each notebook is one case, run by nbdev's own runner in a process of its own"
import os
import subprocess
import sys

import pytest
import warm
from conftest import ROOT, SHARED, TINY, ok

NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb')) + [ROOT/'index.ipynb']
RUN = ROOT/'tests'/'run_notebook.py'

def run(nb, force):
    "Run a notebook with the project's flags, some of them forced"
    if (SHARED/'siim-small').is_dir(): force = [*force, 'data']
    p = warm.run(RUN, nb, 'slow cuda data', ' '.join(force), cwd=ROOT, env={**os.environ, 'PTX_SHARED': str(SHARED), 'MPLBACKEND': 'agg'})
    assert p.returncode == 0, f'{nb.name}\n{p.stdout[-2000:]}\n{p.stderr[-6000:]}'

@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda f: f.stem)
def test_notebook(nb): run(nb, [])

@pytest.mark.slow
@pytest.mark.parametrize('nb', [f for f in NOTEBOOKS if f.exists() and '#| slow' in f.read_text(encoding='utf-8')], ids=lambda f: f.stem)
def test_slow_cells(nb): run(nb, ['slow'])

def elsewhere(nb, folder, *line, **env):
    "Run a copy of a notebook in another folder"
    return subprocess.run([sys.executable, ROOT/'tests'/'run_elsewhere.py', nb, folder, 'slow cuda data', *line], cwd=ROOT,
        env={**os.environ, 'IN_TEST': '1', 'MPLBACKEND': 'agg', **env}, capture_output=True, text=True, check=False)

@pytest.mark.slow
@pytest.mark.parametrize('nb', [f for f in NOTEBOOKS if f.stem != 'index'], ids=lambda f: f.stem)
def test_a_copy_elsewhere_twice_without_extras(nb, tmp_path):
    "It works, or says what to do: a page that draws from the repository's results names them"
    p = elsewhere(nb, tmp_path)
    assert not p.returncode or 'open it in a clone' in p.stderr, p.stderr[-2000:]

@pytest.fixture(scope='module')
def own(shared, tmp_path_factory):
    "What a stranger may have: a folder of radiographs, one DICOM file, a cross-validation"
    siim, cv = shared/'siim-small', tmp_path_factory.mktemp('own')/'cv'
    ok('ptx_folds', siim, '--n', '2', '--out', cv.parent/'folds.csv')
    # with this prior some maps are not empty
    ok('ptx_train', siim, '--folds', cv.parent/'folds.csv', '--out', cv, *TINY, '--model', 'hyperunet:prior=.3')
    return {'path': siim, 'file': next((siim/'dicom-images-train').rglob('*.dcm')), 'cv': cv}

OWN_LINES = [('53', "path = '{path}'"), ('53', "path = Path('{path}')"), ('54', "path = '{file}'"), ('55', "cv = '{cv}'"),
    ('56', "path = '{path}'"), ('57', "path = '{path}'")]

@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize('number,line', OWN_LINES)
def test_one_line_for_your_own_data(number, line, own, tmp_path):
    (tmp_path/'nbs').mkdir()
    (tmp_path/'tests').mkdir()
    (tmp_path/'tests'/'results').symlink_to(ROOT/'tests'/'results')
    p = elsewhere(next((ROOT/'nbs').glob(f'{number}_*.ipynb')), tmp_path/'nbs', line.format(**own))
    assert not p.returncode, p.stderr[-2000:]

@pytest.mark.slow
@pytest.mark.data
def test_the_kernel_on_your_own_data(shared, tmp_path):
    "Where things are is said by variables; no line is to be changed"
    folders = ('INPUT', shared/'siim-small'), ('WORKING', tmp_path/'working'), ('SCRATCH', tmp_path/'scratch')
    where = {f'PTX_{k}': str(v) for k, v in folders}
    p = elsewhere(ROOT/'nbs'/'51_tutorial.kaggle.ipynb', tmp_path, **where, PTX_SIZE='64', PTX_BS='4', PTX_EPOCHS='1')
    assert not p.returncode, p.stderr[-2000:]

@pytest.mark.slow
def test_nbdev_test_in_one_process():
    "What one notebook leaves behind (warning filters, a changed folder) must not disturb the next"
    p = subprocess.run([sys.executable, '-c', 'from nbdev.test import nbdev_test; nbdev_test()', '--n_workers', '1'], cwd=ROOT,
        capture_output=True, text=True, check=False)
    assert p.returncode == 0, p.stderr[-6000:]

def test_a_failing_notebook_fails(tmp_path):
    import nbformat
    v4 = nbformat.v4
    nbformat.write(v4.new_notebook(cells=[v4.new_code_cell('assert 1==2')]), tmp_path/'bad.ipynb')
    with pytest.raises(AssertionError, match='bad.ipynb'): run(tmp_path/'bad.ipynb', [])
