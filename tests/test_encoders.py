"Encoders of every family and from every source, weights in every dialect, and what is refused"
import contextlib
import copy
import functools
import json
import pickle
import urllib.error

import numpy as np
import pytest
import timm
import torch
import torchvision
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.vision.models import xresnet
from safetensors.torch import save_file
from torch import nn

from pneumothorax import encoders
from pneumothorax.encoders import (
    ModelError,
    StageEncoder,
    create_encoder,
    encoder_levels,
    find_encoder,
    imagenet_file,
    load_weights,
    read_weights,
    stem_params,
)
from pneumothorax.siim import PtxNotice

CHAINS = ['densenet121', 'googlenet', 'inception_v3', 'mnasnet0_5', 'mobilenet_v3_small', 'regnet_x_400mf', 'resnet18',
    'shufflenet_v2_x0_5', 'squeezenet1_1', 'swin_t']
FAMILIES = ['convnext_atto', 'cs3darknet_focus_s', 'densenet121', 'efficientvit_b0', 'hrnet_w18_small', 'inception_v4',
    'mambaout_femto', 'mobilenetv3_small_050', 'nf_regnet_b0', 'pvt_v2_b0', 'regnety_002', 'sequencer2d_s', 'swin_tiny_patch4_window7_224',
    'tf_efficientnet_lite0', 'tresnet_m', 'vgg11']

pytestmark = pytest.mark.usefixtures('one_thread')

def seeded(make, seed=0):
    "What `make` makes with these random numbers; the others' are left alone"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()

def grey(h=96, w=96): return torch.rand(1, 1, h, w, generator=torch.Generator().manual_seed(1))

def state(m): return {k: v.clone() for k, v in m.state_dict().items()}

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.parametrize('name', CHAINS)
def test_a_chain_computes_what_its_network_does(name):
    kw = {'init_weights': False} if name in ('googlenet', 'inception_v3') else {}
    net = seeded(functools.partial(torchvision.models.get_model, name, weights=None, **kw)).eval()
    enc, seen = create_encoder(net, 3).eval(), {}
    inner = 'features' if hasattr(net, 'features') else 'layers' if hasattr(net, 'layers') else 'conv5' if hasattr(net, 'conv5') else None
    if inner: net.get_submodule(inner).register_forward_hook(lambda m, x, y: seen.update(last=y.clone()))
    else: net.avgpool.register_forward_pre_hook(lambda m, x: seen.update(last=x[0].clone()))
    # a later layer must not write into a map that was taken before
    for cut in enc.cuts: getattr(enc, cut).register_forward_hook(functools.partial(lambda c, m, x, y: seen.update({c: y.clone()}), cut))
    x = torch.rand(2, 3, 128, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        net(x)
        last, maps = seen['last'], enc(x)
    assert torch.equal(maps[-1], last)
    for cut, m in zip(enc.cuts, maps, strict=True): assert torch.equal(m, seen[cut]), cut
    strides = [s for _, _, s, _ in encoder_levels(enc, 3)]
    assert strides == sorted(set(strides)) and strides[-1] in (16, 32)

@pytest.mark.parametrize('name', FAMILIES)
def test_the_trial_agrees_with_the_table(name):
    enc = create_encoder(name, 2)
    table = dict(zip(enc.feature_info.reduction(), enc.feature_info.channels(), strict=True))     # of several at one stride the last
    assert {s: c for _, c, s, _ in encoder_levels(enc, 2)} == table
    assert enc.training and enc.origin == f'timm/{name}'

@pytest.mark.parametrize('n_in', [0, -1, 1.0, True, '3', None])
def test_channel_counts(n_in):
    with pytest.raises(ModelError, match='n_in='): create_encoder('resnet18', n_in)

def test_names():
    assert find_encoder('timm/vgg11') == find_encoder('vgg11') == ('timm', 'vgg11')
    assert find_encoder('resnet18.a1_in1k') == ('timm', 'resnet18.a1_in1k')
    for name, near in (('ResNet34', 'resnet34'), ('torchvision/resnet-18', 'resnet18'), ('tf_efficientnet_lite', 'tf_efficientnet_lite0')):
        with pytest.raises(ModelError, match=f'did you mean .*{near}'): create_encoder(name)
    for name in ('', 'hf-hub:timm/resnet18', None, 7, torchvision.models.ResNet, functools.partial(timm.models.resnet18), nn.ReLU()):
        with pytest.raises(ModelError, match='knows this encoder'): find_encoder(name)
    with pytest.raises(ModelError, match='cannot be used'): create_encoder('resnet18.nobody_trained_it')

def test_networks_and_functions():
    def mine(): return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1))
    for make in (mine, mine(), functools.partial(xresnet.xresnet18, pretrained=False), xresnet.xresnet18,
            nn.Sequential(mine(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))):
        enc = create_encoder(make)
        assert enc(grey())[0].shape[0] == 1 and enc.origin is None
    for bad in (lambda: 7, nn.Linear(3, 3), nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2)), nn.Sequential(nn.Flatten()),
            timm.create_model('vit_tiny_patch16_224'), nn.Conv2d(5, 8, 3, 2, 1), nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(3, 6, 3, groups=3)):
        with pytest.raises(ModelError, match='encoder'): create_encoder(bad)

def test_a_module_is_copied():
    net = seeded(torchvision.models.resnet18)
    net.bn1.eval()
    net.layer1.requires_grad_(False)
    before = state(net)
    enc = create_encoder(net)
    assert same(state(net), before) and net.conv1.in_channels == 3
    assert not enc.bn1.training and enc.layer1_0.bn1.training and not enc.layer1_0.conv1.weight.requires_grad
    with torch.no_grad(): enc.conv1.weight.zero_()
    assert same(state(net), before)

def test_maps_in_a_dictionary_are_no_list():
    net = torchvision.models.feature_extraction.create_feature_extractor(seeded(torchvision.models.resnet18), ['layer1', 'layer4'])
    with pytest.raises(ModelError, match='returns a dict'): create_encoder(net)

def test_a_look_changes_nothing():
    enc = create_encoder('mobilenetv3_small_050')
    enc.bn1.eval()
    modes, rng, before = [m.training for m in enc.modules()], torch.get_rng_state(), state(enc)
    levels = encoder_levels(enc)
    with pytest.raises(ModelError, match='does not run'): encoder_levels(enc, 2)
    assert [m.training for m in enc.modules()] == modes and torch.equal(torch.get_rng_state(), rng) and same(state(enc), before)
    for p in enc.parameters(): p.data.fill_(float('nan'))
    assert encoder_levels(enc) == levels
    assert encoder_levels(enc.double()) == levels

@pytest.mark.parametrize('name', ['mobilenetv3_small_050', 'torchvision/resnet18', 'swin_tiny_patch4_window7_224'])
def test_an_encoder_can_be_copied_and_pickled(name):
    enc = create_encoder(name).eval()
    for other in (copy.deepcopy(enc), pickle.loads(pickle.dumps(enc))):
        assert other.origin == enc.origin and same(state(other), state(enc))
        with torch.no_grad(): assert all(torch.equal(a, b) for a, b in zip(enc(grey(64, 96)), other(grey(64, 96)), strict=True))

@pytest.mark.parametrize('name', FAMILIES)
def test_stem(name):
    enc = create_encoder(name)
    stem = stem_params(enc)
    assert stem[0].ndim == 4 and stem[0].shape[1] in (1, 4, 16) and 1 <= len(stem) <= 4
    assert all(p.ndim == 1 or p.shape[1:] == (1, 1, 1) for p in stem[1:]) and len({id(p) for p in stem}) == len(stem)

def test_no_stem():
    with pytest.raises(ModelError, match='no layer'): stem_params(nn.ReLU())

NAMES = [lambda k: k, lambda k: f'module.{k}', lambda k: f'net.encoder.model.{k}', lambda k: f'_orig_mod.encoder.{k}',
    lambda k: 'backbone_'+k.replace('.', '_')]

@pytest.mark.parametrize('rename', NAMES)
@pytest.mark.parametrize('name', ['mobilenetv3_small_050', 'torchvision/resnet18', 'swin_tiny_patch4_window7_224'])
def test_dialects(rename, name, tmp_path):
    a, b = (seeded(lambda: create_encoder(name), s) for s in (0, 1))
    sd = {rename(k): v for k, v in state(a).items()}
    keys = sorted(sd)                                       # the order of a file that sorts its names
    save_file({k: sd[k].contiguous() for k in keys} | {'head.conv1.weight': torch.zeros(1), 'fc.weight': torch.zeros(9, 9)},
        tmp_path/'w.safetensors')
    r = load_weights(b, tmp_path/'w.safetensors')
    assert r.complete and r.how.startswith('by name') and same(state(a), state(b))
    assert r.unused == ['fc.weight', 'head.conv1.weight'] and len(r.found) == r.total

def test_the_model_has_the_prefix(tmp_path):
    a, b = (seeded(lambda: create_encoder('mobilenetv3_small_050'), s) for s in (0, 1))
    torch.save(a.state_dict(), tmp_path/'w.pth')
    wrapped = nn.Module()
    wrapped.encoder = nn.Module()
    wrapped.encoder.model, wrapped.head = b, nn.Conv2d(288, 1, 1)     # as in segmentation_models.pytorch
    r = load_weights(wrapped, tmp_path/'w.pth')
    assert r.complete and r.part == 'encoder' and r.how == "by name, after 'model.' in the model" and same(state(a), state(b))

def test_renamed_layers_are_placed_by_order(tmp_path):
    a, b = (seeded(lambda: create_encoder('torchvision/densenet121'), s) for s in (0, 1))
    # torchvision's file of densenet says norm.1 where the network says norm1
    old = {k.replace('norm1', 'norm.1').replace('conv2', 'conv.2x'): v for k, v in state(a).items() if 'num_batches' not in k}
    torch.save(old, tmp_path/'w.pth')
    r = load_weights(b, tmp_path/'w.pth')
    assert r.how == 'by order' and same({k: v for k, v in state(b).items() if 'num_batches' not in k},
        {k: v for k, v in state(a).items() if 'num_batches' not in k})
    keys = list(old)
    i, j = (keys.index(f'features_denseblock1.denselayer1.norm2.{k}') for k in ('weight', 'bias'))
    keys[i], keys[j] = keys[j], keys[i]                     # two tensors of one shape in the other order
    torch.save({k: old[k] for k in keys}, tmp_path/'w.pth')
    with pytest.raises(ModelError, match='missing'): load_weights(b, tmp_path/'w.pth')

@pytest.mark.parametrize(('have', 'want'), [(3, 1), (1, 3), (3, 2), (3, 4)])
def test_stems_of_other_colours(have, want, tmp_path):
    a, b = (seeded(functools.partial(create_encoder, 'mobilenetv3_small_050', n), n).eval() for n in (have, want))
    torch.save(a.state_dict(), tmp_path/'w.pth')
    assert load_weights(b, tmp_path/'w.pth').complete
    x = grey()
    with torch.no_grad():
        for p, q in zip(a(x.expand(-1, have, -1, -1)), b(x.expand(-1, want, -1, -1)), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)

def test_stems_that_mean_something_else(tmp_path):
    torch.save(create_encoder('mobilenetv3_small_050', 4).state_dict(), tmp_path/'w.pth')
    for n in (1, 3):
        with pytest.raises(ModelError, match=r'conv_stem.weight 16×\d×3×3 \(file: 16×4×3×3\)'):
            load_weights(create_encoder('mobilenetv3_small_050', n), tmp_path/'w.pth')

def test_space_to_depth(tmp_path):
    a, b = (seeded(functools.partial(create_encoder, 'tresnet_m', n), n).eval() for n in (3, 1))
    torch.save(a.state_dict(), tmp_path/'w.pth')
    assert load_weights(b, tmp_path/'w.pth').complete
    with torch.no_grad(): torch.testing.assert_close(a(grey().expand(-1, 3, -1, -1))[-1], b(grey())[-1], rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_precision(dtype, tmp_path):
    a, b = (seeded(lambda: create_encoder('mobilenetv3_small_050'), s) for s in (0, 1))
    save_file({k: v.to(dtype) if v.is_floating_point() else v for k, v in state(a).items()}, tmp_path/'w.safetensors')
    load_weights(b, tmp_path/'w.safetensors')
    assert all(v.dtype == torch.float32 for v in b.parameters()) and torch.equal(b.conv_stem.weight, a.conv_stem.weight.to(dtype).float())

@pytest.mark.parametrize('strict', [True, False])
def test_weights_that_are_no_numbers(strict, tmp_path):
    a = seeded(lambda: create_encoder('mobilenetv3_small_050'))
    sd, before = state(a), state(a)
    sd['bn1.weight'][3] = float('nan')
    sd['bn1.bias'][0] = float('inf')
    torch.save(sd, tmp_path/'w.pth')
    with pytest.raises(ModelError, match=r'2 tensors with values that are not finite \(bn1.weight, bn1.bias\)'):
        load_weights(a, tmp_path/'w.pth', strict)
    assert same(state(a), before)

def test_not_strict(tmp_path):
    a, b = (seeded(lambda: create_encoder('mobilenetv3_small_050'), s) for s in (0, 1))
    sd, before = state(a), state(b)
    del sd['bn1.weight']
    sd['bn1.bias'] = torch.zeros(3)
    torch.save(sd, tmp_path/'w.pth')
    with pytest.raises(ModelError, match='1 missing: bn1.weight; 1 of another shape: bn1.bias 16'): load_weights(b, tmp_path/'w.pth')
    assert same(state(b), before)
    with pytest.warns(PtxNotice, match='2 tensors keep their values.*bn1.weight, bn1.bias'):
        r = load_weights(b, tmp_path/'w.pth', strict=False)
    assert (r.complete, r.missing, list(r.shapes)) == (False, ['bn1.weight'], ['bn1.bias'])
    kept = ('bn1.weight', 'bn1.bias')
    assert same({k: v for k, v in state(b).items() if k not in kept}, {k: v for k, v in state(a).items() if k not in kept})
    assert all(torch.equal(b.state_dict()[k], before[k]) for k in kept)
    torch.save({'x': torch.ones(1)}, tmp_path/'w.pth')
    with pytest.raises(ModelError, match='no tensor of'): load_weights(b, tmp_path/'w.pth', strict=False)

@pytest.mark.parametrize(('larger', 'smaller'), [('resnet34', 'resnet18'), ('efficientnet_b1', 'efficientnet_b0'),
    ('seresnet50', 'resnet50')])
def test_weights_of_a_larger_network(larger, smaller, tmp_path):
    "Every tensor of the smaller has its place in the file; it is another network's all the same"
    torch.save(timm.create_model(larger).state_dict(), tmp_path/'w.pth')
    enc = create_encoder(smaller)
    before = {k: v.clone() for k, v in enc.state_dict().items()}
    with pytest.raises(ModelError, match='more in blocks of the model'): load_weights(enc, tmp_path/'w.pth')
    assert all(torch.equal(v, before[k]) for k, v in enc.state_dict().items())
    with pytest.warns(PtxNotice, match='larger network'): r = load_weights(enc, tmp_path/'w.pth', strict=False)
    assert r.extra and not r.complete and len(r.found) == r.total
    torch.save(timm.create_model(smaller).state_dict(), tmp_path/'w.pth')
    assert load_weights(enc, tmp_path/'w.pth').complete

@pytest.mark.parametrize('record', ['', '{', '[]', '{"model": null}', '{"model": {"config": {"encoder": 3}}}', '{"model": {"config": 3}}',
    '{"model": ["arch"]}', '{"other": 1}', 'null'])
def test_a_strange_record_of_a_run(record, tmp_path):
    save_file({'a': torch.ones(1)}, tmp_path/'model.safetensors')
    (tmp_path/'run.json').write_text(record)
    with pytest.raises(ModelError, match='for another encoder'): load_weights(nn.Conv2d(1, 1, 1), tmp_path)
    (tmp_path/'run.json').write_text(json.dumps({'model': {'config': {'encoder': 'resnet34'}}}))
    for weights in (tmp_path, tmp_path/'model.safetensors', str(tmp_path)):
        with pytest.raises(ModelError, match="made for encoder='resnet34'"): load_weights(nn.Conv2d(1, 1, 1), weights)

class Touch:
    "Leaves a file behind where it is unpickled"
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')

@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_pickles_with_code(tmp_path):
    trace, bad = tmp_path/'trace', tmp_path/'bad.pth'
    def protocol(n): return lambda o: bad.write_bytes(pickle.dumps(o, protocol=n))
    writers = [lambda o: torch.save(o, bad), lambda o: torch.save(o, bad, _use_new_zipfile_serialization=False), protocol(2),
        protocol(4), protocol(5)]
    for write in writers:
        for o in ({'a': torch.ones(2), 'b': Touch(trace)}, Touch(trace), {'state_dict': {'a': torch.ones(1)}, 'args': Touch(trace)}):
            write(o)
            with pytest.raises(ModelError, match='refused; nothing in it was executed'): read_weights(bad)
            assert not trace.exists()
    pickle.loads(pickle.dumps(Touch(trace))).close()
    assert trace.exists()                                   # it would have
    for o in (nn.Linear(1, 1), {'a': torch.ones(1), 'lr': np.float64(1)}):
        torch.save(o, bad)
        with pytest.raises(ModelError, match='refused'): read_weights(bad)

@pytest.mark.filterwarnings('ignore:`torch.jit')
def test_damaged_files(tmp_path):
    good = {'a': torch.ones(1000)}
    torch.save(good, tmp_path/'w.pth')
    save_file(good, tmp_path/'w.safetensors')
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path/'script.pt')
    for f in ('w.pth', 'w.safetensors'):
        data = (tmp_path/f).read_bytes()
        for n in (1, 7, 100, len(data)//2, len(data)-1):
            (tmp_path/f'cut-{f}').write_bytes(data[:n])
            with pytest.raises(ModelError, match='damaged'): read_weights(tmp_path/f'cut-{f}')
    for data in (b'not weights at all', b'<html><title>404</title>', bytes(1000)):
        (tmp_path/'page.pth').write_bytes(data)
        with pytest.raises(ModelError, match='damaged'): read_weights(tmp_path/'page.pth')
    with pytest.raises(ModelError, match='damaged'), pytest.warns(UserWarning, match='TorchScript'): read_weights(tmp_path/'script.pt')
    for o in ({}, {'lr': 1}, [torch.ones(1)], torch.ones(1), {0: torch.ones(1)}):
        torch.save(o, tmp_path/'none.pth')
        with pytest.raises(ModelError, match='no named tensors'): read_weights(tmp_path/'none.pth')
    save_file({}, tmp_path/'none.safetensors')
    with pytest.raises(ModelError, match='no named tensors'): read_weights(tmp_path/'none.safetensors')

def test_what_fastai_saves(tmp_path):
    model = nn.Module()
    model.encoder = seeded(lambda: create_encoder('mobilenetv3_small_050'))
    learn = Learner(DataLoaders([], []), model, loss_func=nn.MSELoss(), path=tmp_path)
    fresh = seeded(lambda: create_encoder('mobilenetv3_small_050'), 1)
    for with_opt in (True, False):
        learn.create_opt()
        f = learn.save(f'opt-{with_opt}', with_opt=with_opt)
        if with_opt:
            with pytest.raises(ModelError, match=r'fastcore.*with_opt=False'): load_weights(fresh, f)
        else: assert load_weights(fresh, f).complete and same(state(fresh), state(model.encoder))
    learn.dls = None
    torch.save(learn.model, tmp_path/'export.pkl')
    with pytest.raises(ModelError, match='refused'): read_weights(tmp_path/'export.pkl')

@pytest.mark.parametrize(('name', 'file'), [('resnet18', r'timm/resnet18\S+/model\.safetensors.*\$HF_HOME'),
    ('torchvision/resnet18', r'resnet18-f37072fd\.pth.*\$TORCH_HOME'), ('legacy_seresnet18', r'github\S+pth.*\$TORCH_HOME')])
def test_no_network(name, file, tmp_path, monkeypatch):
    "The way out is a proxy where nobody listens, so that it fails on every machine alike"
    for k in ('HTTPS_PROXY', 'https_proxy', 'HTTP_PROXY', 'http_proxy'): monkeypatch.setenv(k, 'http://127.0.0.1:9')
    for k in ('NO_PROXY', 'no_proxy'): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr('huggingface_hub.hf_hub_download', lambda **_: pytest.fail('the client was asked though there is no network'))
    for call in (lambda: imagenet_file(name), lambda: create_encoder(name, pretrained=True),
            lambda: load_weights(create_encoder(name), 'imagenet')):
        with pytest.raises(ModelError, match=rf"could not be fetched.*{file}.*weights='lite0'") as e: call()
        assert isinstance(e.value.__cause__, urllib.error.URLError)
    assert not list(tmp_path.rglob('*.pth'))

def test_a_network_fetches(tmp_path, monkeypatch):
    "With the two ends of the wire replaced: what is asked for, and that it is asked for once"
    asked, net = [], seeded(torchvision.models.resnet18)
    def download(url, dst, hash_prefix=None, progress=True):
        asked.append((url, hash_prefix))
        torch.save(net.state_dict(), dst)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(encoders, 'urlopen', lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr('torch.hub.download_url_to_file', download)
    for _ in range(2): enc = create_encoder('torchvision/resnet18', 3, pretrained=True)
    assert asked == [('https://download.pytorch.org/models/resnet18-f37072fd.pth', 'f37072fd')]
    assert torch.equal(enc.conv1.weight, net.conv1.weight)

def test_a_cached_file_with_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    f = tmp_path/'hub'/'checkpoints'/'resnet18-f37072fd.pth'
    f.parent.mkdir(parents=True)
    torch.save({'a': Touch(tmp_path/'trace')}, f)
    with pytest.raises(ModelError, match='refused'): create_encoder('torchvision/resnet18', pretrained=True)
    assert not (tmp_path/'trace').exists()

def test_nobody_trained_it():
    with pytest.raises(ModelError, match='timm has no pretrained weights for efficientnet_b7'): imagenet_file('efficientnet_b7')
    with pytest.raises(ModelError, match='needs the name'): create_encoder(nn.Conv2d(3, 8, 3), pretrained=True)
    own = StageEncoder(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)))
    with pytest.raises(ModelError, match='not made from a name'): load_weights(own, 'imagenet')
