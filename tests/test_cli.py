"The commands as a newcomer meets them: help, exit codes, what is said in which words, what is refused before the work begins"
import ast
import errno
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, TINY, ptx

from pneumothorax import __version__, cli

COMMANDS = re.findall(r'^\s+(ptx_\w+)=', (ROOT/'settings.ini').read_text(encoding='utf-8'), re.MULTILINE)

def signature(command): return inspect.signature(getattr(cli, command)).parameters

def run(capsys, command, *args):
    "Exit code, stdout and stderr of a command line, in this process"
    try: code = getattr(cli, command).main([str(a) for a in args]) or 0
    except SystemExit as e: code = e.code or 0
    return code, *capsys.readouterr()

def test_every_command_is_installed_and_exported():
    assert sorted(COMMANDS) == sorted(n for n in cli.__all__ if n.startswith('ptx_'))
    assert len(COMMANDS) == 17

@pytest.mark.parametrize('command', COMMANDS)
def test_help(command, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '400')
    code, out, _ = run(capsys, command, '--help')
    assert code == 0
    text, f = ' '.join(out.split()), getattr(cli, command)
    assert ' '.join(f.__doc__.partition('\n\nParameters:')[0].split()) in text and f'example: {command} ' in text
    source = inspect.getsource(inspect.unwrap(f))
    for arg in inspect.signature(f).parameters:
        comment = re.search(rf'^\s+{arg}:.*?# (.+)$', source, re.MULTILINE).group(1)
        assert ' '.join(comment.split()) in text, f'{command} --help does not explain {arg}'

@pytest.mark.parametrize('command', COMMANDS)
def test_the_example_of_a_help_page_can_be_typed(command, capsys, monkeypatch):
    "Its options are there, and its values are of their types; what it names is not, and is asked for first"
    _, out, _ = run(capsys, command, '--help')
    words = ' '.join(out.partition('example: ')[2].split()).split()
    monkeypatch.setattr(cli, '_there', lambda *args: (_ for _ in ()).throw(KeyError('asked for')))
    monkeypatch.setattr(cli, 'writable', lambda *args: (_ for _ in ()).throw(KeyError('asked for')))
    assert words[0] == command
    with pytest.raises(KeyError, match='asked for'): getattr(cli, command).main(words[1:])

@pytest.mark.parametrize('command', COMMANDS)
def test_readme_names_the_command(command): assert command in (ROOT/'README.md').read_text(encoding='utf-8')

def test_an_installed_command():
    "As it is started from a shell"
    assert ptx('ptx_score', '--version').stdout == f'ptx_score {__version__}\n'
    p = ptx('ptx_train')
    assert p.returncode == 2 and 'usage:' in p.stderr and 'Traceback' not in p.stderr

WRONG = {('ptx_sample', 'x', '--size', 'large'): 'large is no whole number',
    ('ptx_score', 'a', 'b', '--jsn'): '--jsn: no such option, did you mean --json?',
    ('ptx_train', 's', '--ecnoder', 'x'): 'did you mean --encoder',
    ('ptx_train', 's', '--near-duplicates'): '--near_duplicates: no such option;', ('ptx_predict',): 'required: files',
    ('ptx_prepare', 'a', 'b', 'c'): 'c: more than is expected here', ('ptx_submit', 'p', '--thresh', 'half'): 'half is no number'}

@pytest.mark.parametrize('args', WRONG, ids=lambda a: ' '.join(a))
def test_wrong_usage_is_explained(args, capsys):
    code, _, err = run(capsys, *args)
    assert (code == 2 and WRONG[args] in err and err.startswith('usage:') and err.endswith(f'{args[0]} --help explains\n')
        and len(err.splitlines()) == 2)

def test_options_may_stand_between_the_files(capsys, tmp_path):
    for f in ('a.csv', 'b.csv'): (tmp_path/f).write_text('ImageId,EncodedPixels\na,5 5\n')
    code, out, _ = run(capsys, 'ptx_score', tmp_path/'a.csv', '--json', tmp_path/'b.csv')
    assert code == 0 and '"dice": 1.0' in out

def test_sample_says_what_comes_next(tmp_path):
    p = ptx('ptx_sample', tmp_path/'my s', '--n', 4, '--size', 64, '--seed', 1)
    assert p.returncode == 0 and f"next: ptx_train '{tmp_path}/my s'" in p.stdout
    assert len(list((tmp_path/'my s').rglob('*.dcm'))) == 8

# --- in whose words

def strings(node):
    "Texts of a syntax tree; … for what is filled in"
    for n in ast.walk(node):
        if isinstance(n, ast.JoinedStr): yield n.lineno, ''.join(v.value if isinstance(v, ast.Constant) else '…' for v in n.values)
        elif isinstance(n, ast.Constant) and isinstance(n.value, str): yield n.lineno, n.value

def modules():
    "Module → syntax tree without docstrings"
    for f in sorted((ROOT/'pneumothorax').glob('*.py')):
        if f.stem in ('__init__', '_modidx', 'all', 'cli'): continue
        tree = ast.parse(f.read_text(encoding='utf-8'))
        for n in ast.walk(tree):
            if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Module)) and n.body and isinstance(n.body[0], ast.Expr):
                n.body[0].value = ast.Constant(0)
        yield f.stem, tree

def test_no_function_speaks_of_the_command_line():
    "A message names an argument as `name=value` and a function in backquotes; a command says both in its own words"
    # a report says how to type its run again
    found = [f'{m}:{n}: {s[:80]}' for m, tree in modules() if m != 'report' for n, s in strings(tree) if re.search(
        r'(?<![\w-])(?<!gdcmconv )--[a-z]|\bptx_[a-z]+', s) and not s.startswith('# pneumothorax {version}')]
    assert not found, '\n'.join(found)

def messages():
    "What is raised or told: module, line, text"
    for m, tree in modules():
        for n in ast.walk(tree):
            if (isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call)
                    or isinstance(n, ast.Call) and getattr(n.func, 'id', '') in ('notice', 'PtxNotice')):
                for _, s in strings(n): yield m, n.lineno, s

# arguments that only functions have, and parameters of specifications such as hyperunet:finest=2, which are typed alike in both
NO_OPTION = {'alpha', 'areas', 'aux', 'bins', 'bits', 'by', 'calibration', 'checkpoint', 'chosen_on', 'decoder_width', 'dim', 'dl_type',
    'drop', 'drop_last', 'finest', 'frame', 'gamma', 'groups', 'ids', 'jpeg', 'k', 'kept', 'key', 'kind', 'last', 'least', 'level',
    'loss_func', 'main', 'min_iou', 'n_acc', 'n_in', 'networks', 'over', 'p', 'pretrained', 'prior', 'reduction', 'shape', 'share', 'start',
    'sync_bn', 'top', 'what', 'window', 'with_opt', 'within'}

def test_every_argument_in_a_message_can_be_said_by_a_command():
    "A name in a message is an option of some command, or one that only functions have"
    options = {k for c in COMMANDS for k in signature(c)} | set(cli._CALLED)
    found = [(m, n, k[1]) for m, n, s in messages() for k in cli._NAMED.finditer(s)]
    odd = [f'{m}:{n}: {k}=' for m, n, k in found if k not in options | NO_OPTION]
    assert not odd and len(found) > 100, f'{odd}: name it as the command does, or add it to NO_OPTION'
    assert set(cli._COMMANDS.values()) <= {*COMMANDS, 'ptx_train --folds'} and set(cli._CALLED.values()) <= options

def test_both_say_it_in_their_own_words(phantoms, tiny_run, capsys):
    from pneumothorax.records import RunError
    from pneumothorax.train import train
    with pytest.raises(RunError, match='replace it with fresh=True$'): train(phantoms, tiny_run)
    assert run(capsys, 'ptx_train', phantoms, '--out', tiny_run)[2].rstrip().endswith('replace it with --fresh')
    assert run(capsys, 'ptx_train', phantoms, '--model', 'unett', '--out', 'r')[2].startswith('error: --model unett: no such model')

# --- before the work begins

PATHS = {'ptx_prepare': ['{}', 'OUT'], 'ptx_train': ['{}', '--out', 'OUT'], 'ptx_folds': ['{}', '--out', 'OUT'],
    'ptx_audit': ['{}', '--out', 'OUT'], 'ptx_predict': ['{}', '{}', '--out', 'OUT'], 'ptx_submit': ['{}', '--out', 'OUT'],
    'ptx_merge': ['{}', '{}', '--out', 'OUT'], 'ptx_score': ['{}', '{}'], 'ptx_import': ['{}', '{}', '--out', 'OUT'],
    'ptx_show': ['{}', '{}', '--out', 'OUT'], 'ptx_export': ['{}', '--out', 'OUT'], 'ptx_compare': ['{}', '{}', '--out', 'OUT'],
    'ptx_report': ['{}', '--out', 'OUT'], 'ptx_view': ['{}'], 'ptx_bundle': ['{}', '--out', 'OUT'], 'ptx_sample': ['OUT'],
    'ptx_demo': ['--out', 'OUT']}

def test_every_command_is_in_the_table(): assert sorted(PATHS) == sorted(COMMANDS)

@pytest.mark.parametrize('command', [c for c in PATHS if '{}' in PATHS[c]])
def test_an_input_that_is_not_there_comes_first(command, tiny_run, tmp_path, capsys):
    "Whatever is wrong with the output: it holds a run, a table, a bundle, or is no folder"
    for out in (tiny_run, tiny_run/'history.csv', tiny_run/'history.csv'/'x'):
        code, _, err = run(capsys, command, *(a.format(tmp_path/'nowhere').replace('OUT', str(out)) for a in PATHS[command]))
        assert code == 1 and err.startswith(f'error: {tmp_path}/nowhere: no such file or folder; ') and err.count('\n') == 1, err

OPTIONS = [(c, k) for c in COMMANDS for k in ('labels', 'folds', 'patients', 'findings', 'decision', 'gate', 'sample') if k in signature(c)]

@pytest.mark.parametrize(('command', 'option'), OPTIONS)
def test_so_does_a_path_in_an_option(command, option, phantoms, tmp_path, capsys):
    args = [a.format(phantoms).replace('OUT', str(phantoms/'metadata.csv')) for a in PATHS[command]]
    code, _, err = run(capsys, command, *args, f'--{option}', tmp_path/'nowhere.csv')
    assert code == 1 and err.startswith(f'error: {tmp_path}/nowhere.csv: no such file or folder; ') and err.count('\n') == 1, err

@pytest.mark.parametrize('command', [c for c in PATHS if 'OUT' in PATHS[c]])
def test_an_output_that_cannot_be_written(command, phantoms, tmp_path, capsys, monkeypatch):
    "Is told in one line before anything is done; where permissions are of no use, as for root, by the system's answer"
    def refuse(dir): raise PermissionError(errno.EACCES, 'Permission denied', str(dir))
    monkeypatch.setattr(tempfile, 'TemporaryFile', refuse)
    code, out, err = run(capsys, command, *(a.format(phantoms).replace('OUT', str(tmp_path/'x')) for a in PATHS[command]))
    assert (code, out, err) == (1, '',
        f'error: {tmp_path}/x: cannot be written (Permission denied); make its folder writable, or give another\n')
    assert not list(tmp_path.iterdir())

@pytest.mark.skipif(not Path('/sys').is_dir() or os.access('/sys/x', os.F_OK), reason='no folder here that nobody may write to')
@pytest.mark.parametrize('command', ['ptx_sample', 'ptx_folds', 'ptx_audit', 'ptx_demo'])
def test_a_folder_of_the_system(command, phantoms, capsys):
    code, _, err = run(capsys, command, *(a.format(phantoms).replace('OUT', '/sys/x') for a in PATHS[command]))
    assert code == 1 and err.startswith('error: /sys/x: cannot be written (') and err.count('\n') == 1

@pytest.mark.parametrize(('no', 'why'), [(errno.ENOSPC, 'the disk is full; make room'), (errno.EROFS, 'cannot be read or written'),
    (errno.EIO, 'check the path and the disk')])
def test_what_the_system_refuses_in_the_middle(no, why, tmp_path, capsys, monkeypatch):
    from pneumothorax import phantom
    def refuse(*args, **kwargs): raise OSError(no, os.strerror(no), str(tmp_path/'s'/'a.dcm'))
    monkeypatch.setattr(phantom, 'make_phantoms', refuse)
    code, _, err = run(capsys, 'ptx_sample', tmp_path/'s')
    assert code == 1 and err.startswith(f'error: {tmp_path}/s/a.dcm: ') and why in err and err.count('\n') == 1

def test_a_defect_keeps_its_traceback(tmp_path, monkeypatch):
    from pneumothorax import phantom
    monkeypatch.setattr(phantom, 'make_phantoms', lambda *args, **kwargs: {}['a defect'])
    with pytest.raises(KeyError): cli.ptx_sample.main([str(tmp_path/'s')])

@pytest.mark.skipif(os.name == 'nt', reason='a pipe of POSIX')
@pytest.mark.parametrize('n', [1, 3000], ids=['at the end', 'in the middle'])
def test_a_reader_that_has_gone(n, tmp_path):
    "`ptx_score … | head -1` ends without a word on stderr"
    (tmp_path/'a.csv').write_text('ImageId,EncodedPixels\n'+''.join(f'{i},{i} 5\n' for i in range(n)))
    read, write = os.pipe()
    os.close(read)
    p = subprocess.run([Path(sys.executable).parent/'ptx_score', 'a.csv', 'a.csv', '--worst', str(n)], cwd=tmp_path, stdout=write,
        stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert 'Traceback' not in p.stderr and 'BrokenPipe' not in p.stderr and p.returncode == 141, p.stderr

# --- of which frame run-lengths are

FRAMED = re.compile(r'run-lengths?\b|label file|EncodedPixels|(?<!sample )submissions?\b.*CSV')

def documented():
    "Every exported function: its name, and the remarks on its parameters"
    for f in sorted((ROOT/'pneumothorax').glob('*.py')):
        lines = f.read_text(encoding='utf-8').splitlines()
        for node in ast.parse('\n'.join(lines)).body:
            if isinstance(node, ast.FunctionDef) and node.name[0] != '_':
                args = node.args.posonlyargs+node.args.args+node.args.kwonlyargs
                yield f.stem, node.name, {a.arg: lines[a.lineno-1].partition('# ')[2] for a in args}

def test_whatever_takes_run_lengths_says_of_which_frame():
    "In the remark itself, or by an argument for the frame"
    takes = {(m, f): {a: t for a, t in args.items() if FRAMED.search(t)} for m, f, args in documented()
        if not {'frame', 'shape', 'size', 'relative'} & set(args)}
    assert len([o for o in takes.values() if o]) > 10
    silent = [(f, a) for f, args in takes.items() for a, t in args.items() if not re.search(r'1024|\bframe\b|nothing is read', t)]
    assert not silent

@pytest.mark.parametrize('command', ['ptx_prepare', 'ptx_train', 'ptx_folds', 'ptx_audit', 'ptx_score', 'ptx_merge', 'ptx_submit'])
def test_so_does_its_help_page(command, capsys):
    _, out, err = run(capsys, command, '--help')
    assert '1024x1024' in out+err

# --- bars are for terminals

def quiet(p, code=0):
    "A command whose output went into files: nothing that only a terminal can draw, and an error on a line of its own"
    both = p.stdout+p.stderr
    assert p.returncode == code, both[-3000:]
    assert not re.search('[\r\x08\x1b\u2588-\u258f]', both), both
    assert 'error: ' not in re.sub('^error: ', '', both, flags=re.MULTILINE), both

CHAIN = {'ptx_sample': ('s', '--n', 8, '--size', 64, '--positive', .5), 'ptx_prepare': ('s', 'c', '--size', 64),
    'ptx_folds': ('s', '--out', 'f.csv', '--n', 2, '--near_duplicates'), 'ptx_audit': ('s', '--out', 'a.csv'),
    'ptx_train': ('s', '--out', 'r', '--valid', .5, *TINY), 'ptx_predict': ('r', 's/dicom-images-test', '--out', 'p'),
    'ptx_submit': ('p', '--out', 'x.csv', '--blank', '--sheet', 'x.png'), 'ptx_merge': ('x.csv', 'x.csv', '--out', 'm.csv'),
    'ptx_score': ('x.csv', 's/answers/test-rle.csv'), 'ptx_show': ('r', 's/dicom-images-test', '--out', 'h'),
    'ptx_export': ('p', '--as', 'coco', '--out', 'e', '--thresh', '.001'),
    'ptx_compare': ('p', 'p2', '--labels', 's/answers/test-rle.csv', '--out', 'q.png'), 'ptx_report': ('r', '--out', 'r.html', '--n', 1),
    'ptx_import': ('e', 's/dicom-images-test', '--empty', 'negative', '--out', 'i.csv'), 'ptx_bundle': ('r', '--out', 'b')}

def test_bars_are_for_terminals(tmp_path, monkeypatch):
    "Each command after those whose files it takes, and once more where it ends in an error"
    assert {*CHAIN, 'ptx_demo', 'ptx_view'} == {*COMMANDS}     # the demo is these commands; a server does not end
    monkeypatch.chdir(tmp_path)
    for command, args in CHAIN.items():
        if command == 'ptx_compare': shutil.copytree('p', 'p2')
        quiet(ptx(command, *args))
        quiet(ptx(command, *('nowhere' if command != 'ptx_sample' else 's/train-rle.csv',), *args[1:]), 1)

# --- what is judged before the work

@pytest.fixture(scope='module')
def tiny_pred(phantoms, tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp('pred')/'pred'
    cli.ptx_predict.__wrapped__([tiny_run, phantoms/'dicom-images-test'], out=out, workers=0)
    return out

@pytest.mark.parametrize(('sheet', 'why'), [('s.csv', 'a PNG is written'), ('s.jpg', 'a PNG is written'), ('folder.png', 'a folder'),
    ('out.png', 'the submission has this name'), ('file/s.png', 'cannot be written')])
def test_a_sheet_that_cannot_be(tiny_pred, tmp_path, capsys, sheet, why):
    (tmp_path/'folder.png').mkdir()
    (tmp_path/'file').write_text('')
    code, _, err = run(capsys, 'ptx_submit', tiny_pred, '--out', tmp_path/'out.png', '--sheet', tmp_path/sheet, '--blank')
    assert code == 1 and why in err and not (tmp_path/'out.png').exists(), err

def test_a_rule_of_no_gate(tiny_pred, tmp_path, capsys):
    code, _, err = run(capsys, 'ptx_submit', tiny_pred, '--out', tmp_path/'s.csv', '--gate_rule', 'weigh')
    assert code == 1 and '--gate_rule weigh: of which gate? name it with --gate' in err

def test_options_are_not_abbreviated(capsys):
    code, _, err = run(capsys, 'ptx_train', 's', '--epoch', '3')
    assert code == 2 and '--epoch: no such option, did you mean --epochs' in err

def test_what_comes_next_fits_a_cross_validation_that_is_not_complete(phantoms, tmp_path, capsys):
    run(capsys, 'ptx_folds', phantoms, '--n', 2, '--out', tmp_path/'f.csv')
    code, out, err = run(capsys, 'ptx_train', phantoms, '--folds', tmp_path/'f.csv', '--fold', 0, '--out', tmp_path/'cv', *TINY)
    assert (code == 0
        and out.splitlines()[-1] == 'next: the same command without --fold, which goes on with the folds that are missing'), out+err

@pytest.mark.parametrize('value', ['abc', '64,x'])
def test_numbers_are_asked_for_in_words(capsys, value):
    for option, what in (('--size', 'whole number'), ('--lr', 'number')):
        code, _, err = run(capsys, 'ptx_train', 's', '--show', option, value)
        assert code == 1 and f'give a {what}, or one per stage' in err

def test_a_full_disk_leaves_nothing_in_the_way(phantoms, tiny_run, tmp_path, monkeypatch, capsys):
    "What failed for want of room can be started again"
    import pneumothorax.bundle
    import pneumothorax.folds
    def full(*args, **kwargs): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for module, name, command in ((pneumothorax.folds, 'write_index', ('ptx_folds', phantoms, '--n', 2, '--out', tmp_path/'f.csv')),
            (pneumothorax.bundle, 'write_record', ('ptx_bundle', tiny_run, '--out', tmp_path/'b'))):
        with monkeypatch.context() as m:
            m.setattr(module, name, full)
            code, _, err = run(capsys, *command)
            assert code == 1 and f'{command[-1]}: ' in err and 'No space left' in err and not command[-1].exists(), err
        assert run(capsys, *command)[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ['b', 'f.csv']

@pytest.mark.parametrize(('command', 'args'), [('ptx_show', ('RUN', 'text.dcm')), ('ptx_show', ('bare', 'text.dcm')),
    ('ptx_show', ('RUN', 'bare', '--tta', 'nonsense')), ('ptx_predict', ('RUN', 'none')),
    ('ptx_predict', ('RUN', 'bare', '--tta', 'nonsense')), ('ptx_export', ('bare',)), ('ptx_report', ('bare',)), ('ptx_submit', ('bare',)),
    ('ptx_import', ('none', 'bare')), ('ptx_audit', ('bare',)), ('ptx_prepare', ('bare',)), ('ptx_train', ('bare',)),
    ('ptx_train', ('none',)), ('ptx_train', ('bare', '--workers', '-1'))],
    ids=lambda v: v if isinstance(v, str) else ' '.join(v))
def test_a_refused_start_leaves_no_folder(command, args, tiny_run, phantoms, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for d in ('bare', 'none'): Path(d).mkdir()
    shutil.copy(next(phantoms.rglob('*.dcm')), 'bare')
    Path('text.dcm').write_text('no radiograph')
    before = {*tmp_path.rglob('*')}
    out = ['new/out'] if command == 'ptx_prepare' else ['--out', 'new/out']
    code, _, err = run(capsys, command, *[tiny_run if a == 'RUN' else a for a in args], *out)
    assert code == 1 and 'error: ' in err and {*tmp_path.rglob('*')} == before

@pytest.mark.parametrize('kind', ['nifti', 'coco', 'dicomseg', 'sc'])
def test_an_export_without_its_package_leaves_no_folder(kind, tiny_pred, tmp_path, capsys, monkeypatch):
    for m in [m for m in sys.modules if m.partition('.')[0] in ('nibabel', 'pycocotools', 'highdicom')]: monkeypatch.delitem(sys.modules, m)
    for m in ('nibabel', 'pycocotools', 'highdicom'): monkeypatch.setitem(sys.modules, m, None)
    code, _, err = run(capsys, 'ptx_export', tiny_pred, '--as', kind, '--out', tmp_path/'e')
    assert code == 1 and 'is needed' in err and not (tmp_path/'e').exists()
