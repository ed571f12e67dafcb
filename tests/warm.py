"""Commands and notebooks, each a process of its own that does not pay for the import of torch and fastai: a copy of a process that has done
it. This package is imported anew by each"""
import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

context = multiprocessing.get_context('forkserver')
context.set_forkserver_preload(['fastai.vision.all'])

def _script(file, args, cwd, env, streams):
    "What the copy does: the script, as its interpreter would"
    import torch
    multiprocessing.set_start_method(None, force=True)     # the usual one
    for fd, name in enumerate(streams, 1): os.dup2(os.open(name, os.O_WRONLY), fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env.get('OMP_NUM_THREADS', torch.get_num_threads())))     # torch has read another one
    sys.argv = [str(file), *args]
    try: runpy.run_path(str(file), run_name='__main__')
    finally: atexit._run_exitfuncs()     # a copy ends without

def run(file, *args, cwd=None, env=None):
    "`subprocess.run` of a Python script, its output captured as text"
    with tempfile.TemporaryDirectory() as d:
        streams = [Path(d)/s for s in ('stdout', 'stderr')]
        for s in streams: s.touch()
        p = context.Process(target=_script, args=(file, [*map(str, args)], cwd or os.getcwd(), env or dict(os.environ), streams))
        p.start()
        p.join()
        # as it was written, carriage returns and all
        return subprocess.CompletedProcess([file, *args], p.exitcode, *(s.read_bytes().decode() for s in streams))
