"Reads everything from `settings.ini`, the only place of package metadata"
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=['='], interpolation=None)
cfg.read('settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

def reqs(key): return cfg.get(key, '').split()

readme = Path('README.md')
setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0',
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    packages=find_packages(include=['pneumothorax*']), package_dir={'': '.'},     # so pip install -e uses a path
    python_requires=f">={cfg['min_python']}",
    install_requires=reqs('requirements'),
    extras_require={k: reqs(f'{k}_requirements')
                    for k in ('dev', 'codecs', 'weights', 'smp', 'tensorboard', 'distributed', 'masks', 'dicomseg', 'app',
                              'browser', 'docs')},
    entry_points={'console_scripts': [l for l in cfg['console_scripts'].splitlines() if l.strip()],
                  'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False,
)
