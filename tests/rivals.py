"""What others train, in loops of their own: PyTorch's around smp's `Unet`, plain or by the first place's loss and sampling; fastai's
`Learner` around its `DynamicUnet`

All get the same images, the same ImageNet weights, a mirror for half of the images, and as many epochs as ours. Of our code they have the
reading of the files and the names of the networks, nothing else; the rate is 1e-3."""
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

RIVALS = {'smp Unet': ('unet', smp_unet), 'smp Unet, first place': ('unet', first_place),
    'fastai DynamicUnet': ('fastai_unet', fastai_unet)}

def rival(name, dls, seed, epochs, encoder, weights):
    "A learner with the trained network, for `predict_maps`"
    model, fit = RIVALS[name]
    torch.manual_seed(seed)
    net = xray_model(model, encoder, weights, prior=None).to(memory_format=torch.channels_last)
    fit(net, dls, epochs)
    learn = xray_learner(dls, model, encoder, weights='none')
    learn.model.load_state_dict(net.state_dict())
    return learn
