"""What others train, in loops of their own: PyTorch's around smp's `Unet` and `UnetPlusPlus`, plain or by the first place's loss and
sampling; fastai's `Learner` around its `DynamicUnet`; MONAI's `UNet` by the recipe of its tutorial; nnU-Net's 2-D by its own plans

All get the same images and a mirror for half of them. smp's and fastai's get the same ImageNet weights and as many epochs as ours, at a
rate of 1e-3. MONAI's and nnU-Net's networks have no pretrained encoder and count their steps otherwise: they start from random weights and
get as many seconds of the processor as ours needs. Of our code they have the reading of the files and the names of the networks, nothing
else. The last two want `pip install monai nnunetv2`."""
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from fastai.vision.all import Adam, CrossEntropyLossFlat, DataLoaders, Learner
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from pneumothorax.learner import xray_learner
from pneumothorax.models import xray_model


def arrays(dls):
    "Training images, normalised, and masks, as two tensors"
    m, s = dls.xray['stats']
    pairs = [dls.train.dataset[i] for i in range(len(dls.train.dataset))]
    x, y = (torch.stack([p[k].as_subclass(torch.Tensor) for p in pairs]) for k in (0, 1))
    return (x-m)/s, y[:, None].float()

def mirrored(x, y):
    "Half of the images, with their masks"
    flip = (torch.rand(len(x)) < .5)[:, None, None, None]
    return torch.where(flip, x.flip(-1), x), torch.where(flip, y.flip(-1), y)

def loop(net, batches, loss, opt, sched):
    "PyTorch's own"
    for x, y in batches:
        cost = loss(net.train()(x), y)
        opt.zero_grad()
        cost.backward()
        opt.step()
        sched.step()

def smp_unet(net, dls, epochs, bs=8, lr=1e-3):
    "AdamW with a cosine, cross-entropy plus smp's Dice loss"
    import segmentation_models_pytorch as smp
    dice, dl = smp.losses.DiceLoss('binary'), DataLoader(TensorDataset(*arrays(dls)), bs, shuffle=True, drop_last=True)
    opt = torch.optim.AdamW(net.parameters(), lr)
    loop(net, (mirrored(*b) for _ in range(epochs) for b in dl), lambda z, y: F.binary_cross_entropy_with_logits(z, y)+dice(z, y), opt,
        torch.optim.lr_scheduler.CosineAnnealingLR(opt, epochs*len(dl)))

def first_place(net, dls, epochs, bs=8, lr=1e-3):
    """The same with the loss and the sampling of the first place (Anuar, 2019): cross-entropy, Dice and focal loss as 3:1:4, a share of
    positives that slides from 0.8 to 0.4"""
    import segmentation_models_pytorch as smp
    dice, focal, data = smp.losses.DiceLoss('binary'), smp.losses.FocalLoss('binary'), TensorDataset(*arrays(dls))
    ill, n = data.tensors[1].flatten(1).any(1), len(data)//bs*bs
    opt = torch.optim.AdamW(net.parameters(), lr)
    def batches():
        for e in range(epochs):
            share = .8-.4*e/max(1, epochs-1)
            weights = torch.where(ill, share/ill.sum(), (1-share)/(~ill).sum())
            yield from (mirrored(*b) for b in DataLoader(data, bs, sampler=WeightedRandomSampler(weights, n)))
    loop(net, batches(), lambda z, y: 3*F.binary_cross_entropy_with_logits(z, y)+dice(z, y)+4*focal(z, y), opt,
        torch.optim.lr_scheduler.CosineAnnealingLR(opt, epochs*(n//bs)))

class Two(torch.nn.Module):
    "Logits of two classes, as fastai wants them, out of a network with one"
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x):
        z = self.net(x)
        return torch.cat([torch.zeros_like(z), z], 1)

def _batch(pairs):
    x, y = mirrored(*(torch.stack(o) for o in zip(*pairs)))
    return x, y[:, 0].long()

def fastai_unet(net, dls, epochs, bs=8, lr=1e-3):
    "As after `unet_learner`: Adam, one cycle, cross-entropy over two classes"
    dl = DataLoader(list(zip(*arrays(dls))), bs, shuffle=True, drop_last=True, collate_fn=_batch)
    learn = Learner(DataLoaders(dl, dl), Two(net), loss_func=CrossEntropyLossFlat(axis=1), opt_func=Adam)
    with learn.no_bar(), learn.no_logging(), learn.no_mbar(): learn.fit_one_cycle(epochs, lr)

def seconds_of_ours(dls, epochs, encoder, bs=8):
    "Seconds of the processor for as many steps of ours, from five that are timed"
    net, secs = xray_model('hyperunet', encoder).to(memory_format=torch.channels_last).train(), []
    for _ in range(6):
        t = time.process_time()
        net(torch.rand(bs, 1, *dls.train.dataset[0][0].shape[-2:])).mean().backward()
        secs.append(time.process_time()-t)
    return np.median(secs[1:])*epochs*(len(dls.train.dataset)//bs)

def monai_net():
    import monai
    return monai.networks.nets.UNet(spatial_dims=2, in_channels=1, out_channels=1, channels=(16, 32, 64, 128, 256), strides=(2,)*4,
        num_res_units=2)

class Tiled(torch.nn.Module):
    "MONAI's way to predict: each image from 0 to 1, in windows of the size that was trained"
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x):
        from monai.inferers import sliding_window_inference
        lo, hi = x.amin((1, 2, 3), True), x.amax((1, 2, 3), True)
        return sliding_window_inference((x-lo)/(hi-lo).clamp(min=1e-6), (96, 96), 4, self.net)

def monai_unet(net, dls, seconds):
    """Project-MONAI/tutorials, 2d_segmentation/torch/unet_training_dict.py: Dice loss, Adam 1e-3, two images a step with four windows of 96
    px each, half of them around a positive pixel. Its turns by 90° are a mirror here, since a chest stands upright"""
    import monai
    from monai.transforms import Compose, RandCropByPosNegLabeld, RandFlipd, ScaleIntensityd
    both = ['img', 'seg']
    tfms = Compose([ScaleIntensityd('img'), RandCropByPosNegLabeld(both, label_key='seg', spatial_size=[96, 96], pos=1, neg=1,
        num_samples=4), RandFlipd(both, prob=.5, spatial_axis=1)])
    tfms.set_random_state(torch.initial_seed() % 2**31)
    data = monai.data.Dataset([{'img': x, 'seg': y} for x, y in zip(*arrays(dls))], tfms)
    dl = monai.data.DataLoader(data, batch_size=2, shuffle=True, collate_fn=monai.data.list_data_collate)
    loss, opt, end = monai.losses.DiceLoss(sigmoid=True), torch.optim.Adam(net.parameters(), 1e-3), time.process_time()+seconds
    while time.process_time() < end:
        for b in dl:
            opt.zero_grad()
            loss(net.train()(b['img']), b['seg']).backward()
            opt.step()
    return Tiled(net)

class Planned(torch.nn.Module):
    "nnU-Net's way to predict: each image by its own mean and deviation; the logit of the foreground"
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x):
        z = self.net((x-x.mean((1, 2, 3), keepdim=True))/x.std((1, 2, 3), keepdim=True).clamp(min=1e-8))
        return z[:, 1:]-z[:, :1]

def _written(dls, home):
    "The training images and masks as nnU-Net wants them, with its plans and preprocessed"
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
    raw = home/'raw'/'Dataset001_Ptx'
    for k in ('imagesTr', 'labelsTr'): (raw/k).mkdir(parents=True)
    for i, (image, mask) in enumerate(zip(*arrays(dls))):
        grey = ((image-image.min())/(image.max()-image.min())*255).round()
        for f, a in ((f'imagesTr/x{i:03}_0000.png', grey), (f'labelsTr/x{i:03}.png', mask)):
            cv2.imwrite(str(raw/f), a[0].numpy().astype(np.uint8))
    (raw/'dataset.json').write_text(json.dumps({'channel_names': {'0': 'xray'}, 'labels': {'background': 0, 'pneumothorax': 1},
        'numTraining': i+1, 'file_ending': '.png'}))
    extract_fingerprints([1], num_processes=1)
    plan_experiments([1])
    preprocess([1], configurations=['2d'], num_processes=[1])
    return [json.loads((home/'preprocessed'/raw.name/k).read_text()) for k in ('nnUNetPlans.json', 'dataset.json')]

def _trainer(plans, about, epochs):
    "One step to an epoch, since a few is all there will be"
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    t = nnUNetTrainer(plans | {'continue_training': False}, '2d', 'all', about, torch.device('cpu'))
    t.num_epochs, t.num_iterations_per_epoch = epochs, 1
    t.initialize()
    t.on_train_start()
    return t

def _step(t, e):
    "Seconds of the processor of one step"
    t.lr_scheduler.step(e)
    t.network.train()
    start = time.process_time()
    t.train_step(next(t.dataloader_train))
    return time.process_time()-start

def nnunet(net, dls, seconds):
    """Fingerprint, plans, preprocessing, augmentation, loss, optimiser and schedule are nnU-Net's own (Isensee et al., 2021, `nnunetv2`);
    only the number of steps is what fits into the time: a first step is timed on a network that is thrown away"""
    home = Path(os.environ.get('nnUNet_raw') or Path(tempfile.mkdtemp())/'raw').parent     # nnU-Net reads it once in a process
    os.environ |= {f'nnUNet_{k}': str(home/k) for k in ('raw', 'preprocessed', 'results')}
    os.environ |= {'nnUNet_compile': 'f', 'nnUNet_n_proc_DA': '1'}
    seed, threads, about = torch.initial_seed(), torch.get_num_threads(), _written(dls, home)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)     # its planner has its own
    os.environ['nnUNet_n_proc_DA'] = '0'     # augmentation in this process, whose time counts
    n = max(1, int(seconds/_step(_trainer(*about, 1), 0)))
    print(f"nnU-Net: {n} steps of {about[0]['configurations']['2d']['batch_size']} images", flush=True)
    t = _trainer(*about, n)
    for e in range(n): _step(t, e)
    t.set_deep_supervision_enabled(False)
    shutil.rmtree(home)
    return Planned(t.network)

EPOCHS = {'smp Unet': ('unet', smp_unet), 'smp Unet, first place': ('unet', first_place), 'smp UnetPlusPlus': ('unetplusplus', smp_unet),
    'fastai DynamicUnet': ('fastai_unet', fastai_unet)}
MINUTES = {'MONAI UNet': (monai_net, monai_unet), 'nnU-Net': (lambda: None, nnunet)}     # their own networks, for as long as ours takes
RIVALS = EPOCHS | MINUTES

def rival(name, dls, seed, epochs, encoder, weights):
    "A learner with the trained network, for `predict_maps`"
    model, fit = RIVALS[name]
    torch.manual_seed(seed)
    if name in MINUTES:
        seconds = seconds_of_ours(dls, epochs, encoder)
        torch.manual_seed(seed)
        net, learn = fit(model(), dls, seconds), xray_learner(dls, 'hyperunet', encoder, weights='none')
        learn.model = net
        return learn
    net = xray_model(model, encoder, weights, prior=None).to(memory_format=torch.channels_last)
    fit(net, dls, epochs)
    learn = xray_learner(dls, model, encoder, weights='none')
    learn.model.load_state_dict(net.state_dict())
    return learn
