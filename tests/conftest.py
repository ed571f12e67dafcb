"What several tests need: the real radiographs, where they are, and a small set of phantoms"
import os
from pathlib import Path

import matplotlib
import pytest

matplotlib.use('Agg')
ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get('PTX_SHARED', ROOT.parent/'shared')).resolve()

@pytest.fixture(scope='session')
def root():
    "The repository"
    return ROOT

@pytest.fixture(scope='session')
def shared():
    "The folder of real radiographs, labels and submissions"
    if not (SHARED/'siim-small').is_dir(): pytest.skip('no real radiographs: set PTX_SHARED to their folder')
    return SHARED

@pytest.fixture(scope='session')
def phantoms(tmp_path_factory):
    "Twelve small phantoms and four of a test part"
    from pneumothorax.phantom import make_phantoms
    return make_phantoms(tmp_path_factory.mktemp('phantoms')/'sample', n=12, size=64, progress=False)
