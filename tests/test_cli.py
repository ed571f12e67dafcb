"The commands as a newcomer meets them: help, exit codes, what is printed where"
import inspect
import re

import pytest
from conftest import ROOT, ptx

from pneumothorax import cli

COMMANDS = re.findall(r'^\s+(ptx_\w+)=', (ROOT/'settings.ini').read_text(encoding='utf-8'), re.MULTILINE)

def test_every_command_is_installed_and_exported():
    assert sorted(COMMANDS) == sorted(n for n in cli.__all__ if n.startswith('ptx_'))
    assert len(COMMANDS) == 11

@pytest.mark.parametrize('command', COMMANDS)
def test_help(command):
    p = ptx(command, '--help')
    assert p.returncode == 0
    text, f = ' '.join(p.stdout.split()), getattr(cli, command)
    assert ' '.join(f.__doc__.split()) in text
    source = inspect.getsource(inspect.unwrap(f))
    for arg in inspect.signature(f).parameters:
        comment = re.search(rf'^\s+{arg}:.*?# (.+)$', source, re.MULTILINE).group(1)
        assert ' '.join(comment.split()) in text, f'{command} --help does not explain {arg}'

@pytest.mark.parametrize('command', COMMANDS)
def test_readme_names_the_command(command): assert command in (ROOT/'README.md').read_text(encoding='utf-8')

@pytest.mark.parametrize('args', [('ptx_train',), ('ptx_sample', 'x', '--size', 'large'), ('ptx_score', 'a', 'b', '--jsn')], ids=lambda a: a[0])
def test_wrong_usage_is_explained(args, tmp_path):
    p = ptx(*args)
    assert p.returncode == 2 and 'usage:' in p.stderr and 'Traceback' not in p.stderr

def test_sample_says_what_comes_next(tmp_path):
    p = ptx('ptx_sample', tmp_path/'s', '--n', 4, '--size', 64, '--seed', 1)
    assert p.returncode == 0 and 'next: ptx_train' in p.stdout
    assert len(list((tmp_path/'s').rglob('*.dcm'))) == 8
