"Loaders in worker processes that are not forked: by a fork server, and spawned on a system that has no fork, pread or pwrite"
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
if sys.argv[2] == 'windows':     # spawned workers run these lines as well
    for name in ('fork', 'forkpty', 'pread', 'pwrite', 'preadv', 'pwritev', 'posix_fallocate', 'posix_fadvise', 'sched_getaffinity'):
        if hasattr(os, name): delattr(os, name)
if __name__ == '__main__':
    import multiprocessing, warnings, torch
    from pathlib import Path
    multiprocessing.set_start_method('spawn' if sys.argv[2] == 'windows' else sys.argv[2])
    warnings.simplefilter('ignore')
    from pneumothorax.cache import prepare
    from pneumothorax.data import LoadXray, xray_batches, xray_dls
    from pneumothorax.learner import xray_learner
    from pneumothorax.samplers import seeded
    data, out = Path(sys.argv[1]), Path(sys.argv[3])
    c = prepare(data, out, 64, workers=int(sys.argv[2] == 'windows'), progress=False)
    assert len(c) == 12
    def seen(workers):
        dl = xray_dls(data, 64, 4, stats=(.5, .25), workers=workers, valid=.5).train
        assert dl.fake_l.num_workers == workers
        with seeded(1): return [o.clone().as_subclass(torch.Tensor) for b in dl for o in b]
    assert all(torch.equal(a, b) for a, b in zip(seen(0), seen(2), strict=True))
    files = sorted(data.rglob('*.dcm'))[:4]
    (_, x, _, _), = xray_batches(files, LoadXray(64), workers=1)
    (_, y, _, _), = xray_batches(files, LoadXray(64), workers=0)
    assert torch.equal(x, y)
    def trained(workers):
        learn = xray_learner(xray_dls(c, 64, 4, stats=(.5, .25), workers=workers, valid=.5),
            encoder='mobilenetv3_small_050', weights='none', seed=1)
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    assert torch.equal(trained(1), trained(0))
    print('done')
"""

@pytest.mark.parametrize('method', ['windows', 'forkserver'])
def test_training_where_workers_are_not_forked(phantoms, tmp_path, method):
    (tmp_path/'s.py').write_text(SCRIPT)
    p = subprocess.run([sys.executable, tmp_path/'s.py', phantoms, method, tmp_path/'cache'], capture_output=True, text=True, check=False)
    assert p.stdout.strip() == 'done', p.stderr[-3000:]
