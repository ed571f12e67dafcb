"""Virtual environments like Kaggle's image and like a new machine, in seconds and without copies of torch: packages are links to those of
this environment.

`python tests/environments.py newest DIR` makes the newest fastai, fastcore and nbdev over this environment, with our wheel; what they need
is fetched from the registry."""
import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# of Kaggle's image, what concerns this library; nbdev brings the runner of notebooks
KAGGLE = 'fastai', 'timm', 'pydicom', 'kornia', 'opencv-python-headless', 'safetensors', 'filelock', 'nbdev', 'pip', 'setuptools'
NEWEST = [r for r in (Path(__file__).parents[1]/'constraints-newest.txt').read_text().splitlines() if r and r[0] != '#']

# fails on every connection, also where there is no namespace to be had
GUARD = """import socket
def refuse(self, address, *args):
    if self.family != socket.AF_UNIX: raise RuntimeError(f'a connection to {address} was tried; a kernel without internet has none')
    return _connect(self, address, *args)
_connect = socket.socket.connect
socket.socket.connect = socket.socket.connect_ex = refuse
def nobody(host, *args, **kwargs): raise RuntimeError(f'the address of {host} was asked for; a kernel without internet has no name service')
socket.getaddrinfo = nobody
"""

def needed(names, but=()):
    "Distributions that these need, all the way down; without those of `but`"
    out, todo = {}, list(names)
    while todo:
        d = distribution(todo.pop())
        key = canonicalize_name(d.name)
        if key in out or key in but: continue
        out[key] = d
        todo += [r.name for r in map(Requirement, d.requires or []) if not r.marker or r.marker.evaluate({'extra': ''})]
    return [*out.values()]

def site(env):
    "Where an environment keeps packages"
    return Path(sysconfig.get_path('purelib', 'posix_prefix', {'base': str(env)}))

def linked(env, names=KAGGLE, but=()):
    "An environment of links to the packages of this one; its interpreter"
    venv.create(env, symlinks=True)
    for d in needed(names, but):
        for top in {f.parts[0] for f in d.files}-{'..', '__pycache__'}:
            if not (site(env)/top).exists(): (site(env)/top).symlink_to(d.locate_file(top))
    (site(env)/'no_internet.py').write_text(GUARD)
    (site(env)/'no_internet.pth').write_text('import no_internet\n')
    return Path(env)/'bin'/'python'

def pip(env, *args):
    "pip of this environment at work on another one"
    subprocess.run([sys.executable, '-m', 'pip', '--python', Path(env)/'bin'/'python',
        '--disable-pip-version-check', *map(str, args)], check=True)

def over(env, *packages):
    """An environment that finds the packages of this one behind its own, which are installed into it; its interpreter. One that is there
    already is taken as it is"""
    env = Path(env).resolve()
    ready = env/f'.ready-{hashlib.sha256(repr((sys.version, sys.prefix, packages)).encode()).hexdigest()[:16]}'
    if ready.exists(): return env/'bin'/'python'
    shutil.rmtree(env, ignore_errors=True)
    venv.create(env, symlinks=True)
    (site(env)/'base.pth').write_text(str(site(sys.prefix))+'\n')
    pip(env, 'install', '-q', '--no-deps', '-U', *packages)
    ready.touch()
    return env/'bin'/'python'

ALONE = '''IFS=:
for d in $READONLY; do mount --bind "$d" "$d" && mount -o remount,ro,bind "$d" || exit 99; done
[ -z "$SMALL" ] && exec "$@"
mount -t tmpfs -o size="$SMALL" none "$PTX_WORKING" || exit 99
"$@"
code=$?
cp -a "$PTX_WORKING/." "$KEPT"
exit $code'''

def namespaces():
    "May a process have a network and mounts of its own here? Set PTX_NO_NAMESPACES to see what is left without"
    return ('PTX_NO_NAMESPACES' not in os.environ and shutil.which('unshare') is not None
        and subprocess.run(['unshare', '-rmn', 'bash', '-c', ALONE, '_', 'true'], check=False, capture_output=True,
            env={'PATH': os.defpath, 'READONLY': str(Path(__file__).parent)}).returncode == 0)

def alone(cmd, cwd, env, readonly=(), small=None):
    """A process without network, with some folders read-only; where namespaces are not permitted, behind the guard and by permissions.
    `small` is the size of the disk $PTX_WORKING, and where to copy what is on it in the end"""
    env = {'PATH': os.defpath, 'LANG': 'C.UTF-8', 'MPLBACKEND': 'agg', 'OMP_NUM_THREADS': '1', **env}
    if namespaces():
        cmd, env = (['unshare', '-rmn', 'bash', '-c', ALONE, '_', *cmd],
            {**env, 'READONLY': ':'.join(map(str, readonly)), **dict(zip(('SMALL', 'KEPT'), small or ()))})
    else:
        for d in readonly: subprocess.run(['chmod', '-R', 'a-w', d], check=True)
    return subprocess.Popen([*map(str, cmd)], cwd=cwd, env={k: str(v) for k, v in env.items()}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.partition('\n\n')[0])
    p.add_argument('kind', choices=['newest'])
    p.add_argument('env', type=Path)
    p.add_argument('--upgrade', action='store_true', help='today\'s releases, not those of constraints-newest.txt')
    a = p.parse_args()
    if a.upgrade: shutil.rmtree(a.env, ignore_errors=True)
    python = over(a.env, *[r.partition('==')[0] if a.upgrade else r for r in NEWEST])
    from pneumothorax.bundle import pack_wheel
    pip(a.env, 'install', '-q', '--no-deps', '--force-reinstall', pack_wheel('pneumothorax', a.env/'wheel'))
    subprocess.run([python, '-c', ('from importlib.metadata import version; print(*(f"{p} {version(p)}" for p in '
        '("pneumothorax","fastai","fastcore","nbdev","execnb")), sep=", ")')], check=True, cwd='/')
