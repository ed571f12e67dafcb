"Every model by name: what it refuses, its groups, formats and types, its way through a file, another process and ONNX"
import json
import pickle
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner

from pneumothorax.encoders import ModelError, create_encoder, load_weights
from pneumothorax.hyperunet import unet_split
from pneumothorax.losses import xray_loss
from pneumothorax.models import MODELS, SMP, xray_model

TINY = 'mobilenetv3_small_050'
every = pytest.mark.parametrize('name', MODELS)

pytestmark = pytest.mark.usefixtures('one_thread')

def build(name='hyperunet', encoder=TINY, **kw):
    "The same random weights each time"
    if name in SMP: pytest.importorskip('segmentation_models_pytorch')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return xray_model(name, encoder, **kw).eval()

def image(*size, n=2): return torch.randn(n, 1, *size, generator=torch.Generator().manual_seed(1))

@every
@torch.no_grad()
def test_any_size_from_the_stride_on(name):
    m = build(name)
    for size in ((m.stride, m.stride), (m.stride+1, 2*m.stride-1), (100, 72)): assert m(image(*size)).shape == (2, 1, *size)

@every
def test_what_is_refused(name):
    m = build(name)
    nan = image(64, 64)
    nan[1, 0, 3, 5] = torch.nan
    for x, why in ((image(64, m.stride-1), 'at least'), (image(64, 64).expand(-1, 3, -1, -1), 'n_in'),
            (image(64, 64)[0], 'n_in'), (nan, 'NaN')):
        with pytest.raises(ModelError, match=why): m(x)
    for kw, why in (({'encoder': 'resnet81'}, 'resnet18'), ({'heads': 8}, 'heads: not an option of'), ({'prior': 2}, 'prior')):
        with pytest.raises(ModelError, match=why): build(name, **kw)

@every
def test_groups_hold_each_parameter_once(name):
    m = build(name)
    groups = [[id(p) for p in g] for g in unet_split(m)]
    flat = [p for g in groups for p in g]
    assert len(flat) == len(set(flat)) and set(flat) == {id(p) for p in m.parameters()} and all(groups)
    assert set(flat)-set(groups[-1]) == {id(p) for p in m.encoder.parameters()}

@every
@torch.no_grad()
def test_channels_last_and_bfloat16(name):
    m, x = build(name), image(64, 96)
    want = m(x)
    last = m.to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.contiguous(memory_format=torch.channels_last)), want, rtol=1e-3, atol=1e-4)
    with torch.autocast('cpu', dtype=torch.bfloat16): low = m(x)
    assert low.shape == want.shape and low.isfinite().all()
    assert (low.float()-want).abs().mean() < .05*want.std()+.05   # eight bits of mantissa through some sixty layers

@pytest.mark.parametrize('name', ['fastai_unet', *SMP])
@torch.no_grad()
def test_encoder_is_the_common_one(name):
    m, ours = build(name), create_encoder(TINY).eval()
    assert {k: v.shape for k, v in m.encoder.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}
    ours.load_state_dict(m.encoder.state_dict())
    a, b = m.encoder(image(64, 64)), ours(image(64, 64))
    same = [torch.equal(x, y) for x, y in zip(a, b, strict=True)]
    assert same == ([True]*4+[False] if name == 'deeplabv3plus' else [True]*5)   # its last stage is dilated

@every
def test_trained_and_pickled_as_an_exported_learner_is(name):
    xs, ys = image(64, 64, n=4), (image(64, 64, n=4) > 1).byte()[:, 0]
    dl = DataLoader(list(zip(xs, ys, strict=True)), bs=2, num_workers=0)
    learn = Learner(DataLoaders(dl, dl), build(name), loss_func=xray_loss(), splitter=unet_split)
    with learn.no_logging(): learn.fit(1)
    with torch.no_grad():
        want = learn.model.eval()(xs)
        for again in (pickle.loads(pickle.dumps(learn.model)), deepcopy(learn.model.train())): assert torch.equal(again.eval()(xs), want)

RELOAD = '''
import json, sys, torch
from pneumothorax.models import xray_model
from pneumothorax.encoders import load_weights
torch.set_num_threads(1)
for name in sys.argv[2:]:
    model = xray_model(**json.load(open(f'{sys.argv[1]}/{name}.json')))
    load_weights(model, f'{sys.argv[1]}/{name}.pth')
    x = torch.load(f'{sys.argv[1]}/x.pth')
    with torch.no_grad(): torch.save(model.eval()(x), f'{sys.argv[1]}/{name}-out.pth')
    if name!='unet': assert 'segmentation_models_pytorch' not in sys.modules
'''

def test_reload_in_a_process_that_has_only_the_package(tmp_path):
    x, want, names = image(65, 97), {}, ['hyperunet', 'fastai_unet', 'unet']
    torch.save(x, tmp_path/'x.pth')
    for name in names:
        m = build(name)
        with torch.no_grad(): want[name] = m(x)
        torch.save(m.state_dict(), tmp_path/f'{name}.pth')
        (tmp_path/f'{name}.json').write_text(json.dumps(m.config))
    subprocess.run([sys.executable, '-c', RELOAD, tmp_path, *names], cwd=tmp_path, check=True, capture_output=True, text=True)
    for name in names: assert torch.equal(torch.load(tmp_path/f'{name}-out.pth', weights_only=True), want[name]), name

def run_onnx(path, x):
    "Logits of an ONNX file"
    import onnxruntime
    return torch.from_numpy(onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider']).run(None, {'image': np.asarray(x)})[0])

@pytest.mark.filterwarnings('ignore')
def test_onnx_of_the_default_model(tmp_path):
    for o in ('onnx', 'onnxscript', 'onnxruntime'): pytest.importorskip(o)
    m = build(encoder='tf_efficientnet_lite0')
    load_weights(m, 'lite0')
    names = {'input_names': ['image'], 'output_names': ['logits']}
    torch.onnx.export(m, (image(64, 96),), tmp_path/'batch.onnx', dynamo=True, verbose=False,
        dynamic_shapes=({0: torch.export.Dim('n')},), **names)
    free = {0: 'n', 2: 'h', 3: 'w'}
    torch.onnx.export(m, (image(64, 96),), tmp_path/'size.onnx', dynamo=False, dynamic_axes={'image': free, 'logits': free}, **names)
    for file, x in (('batch.onnx', image(64, 96)), ('batch.onnx', image(64, 96, n=3)), ('size.onnx', image(64, 96)),
            ('size.onnx', image(128, 64, n=1))):
        with torch.no_grad(): torch.testing.assert_close(run_onnx(tmp_path/file, x), m(x), rtol=0, atol=1e-4)

@every
@torch.no_grad()
def test_exported_program_has_equal_logits(name):
    m, x = build(name), image(70, 64)
    torch.testing.assert_close(torch.export.export(m, (x,)).module()(x), m(x), rtol=0, atol=1e-6)
