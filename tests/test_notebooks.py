"Each notebook is one case, run by nbdev's own runner in a process of its own"
import os
import subprocess
import sys

import pytest
import warm
from conftest import ROOT, SHARED

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

@pytest.mark.slow
@pytest.mark.parametrize('nb', [f for f in NOTEBOOKS if f.stem != 'index'], ids=lambda f: f.stem)
def test_a_copy_elsewhere_twice_without_extras(nb, tmp_path):
    "It works, or says what to do: a page that draws from the repository's results names them"
    p = subprocess.run([sys.executable, ROOT/'tests'/'run_elsewhere.py', nb, tmp_path, 'slow cuda data'], cwd=ROOT,
        env={**os.environ, 'IN_TEST': '1', 'MPLBACKEND': 'agg'}, capture_output=True, text=True, check=False)
    assert not p.returncode or 'open it in a clone' in p.stderr, p.stderr[-2000:]

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
