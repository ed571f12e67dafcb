"Radiographs that are legal and rare, and radiographs that are nearly legal: what is read, and what is refused"
import io
import os
import struct
import subprocess
import sys
import zlib
from collections import Counter
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from conftest import ROOT
from PIL import ExifTags, Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
)

from pneumothorax import dicom
from pneumothorax.dicom import XrayError, read_image, read_xray, xray_meta
from pneumothorax.siim import PtxNotice, find_images

imagecodecs = pytest.importorskip('imagecodecs')   # the extra "codecs"
rng = np.random.default_rng(0)
GREY = rng.integers(0, 4096, (16, 20)).astype(np.uint16)
EIGHT = (GREY >> 4).astype(np.uint8)

def jpegls(a): return imagecodecs.jpegls_encode(a)
def lossless(a):
    return imagecodecs.jpeg8_encode(a, lossless=True, colorspace='rgb' if a.ndim == 3 else None,
        outcolorspace='rgb' if a.ndim == 3 else None)

def save(f, a, encode=None, syntax=JPEGLSLossless, **kw):
    "Write an array as DICOM, encoded if there is a function for it"
    ds, ds.file_meta = Dataset(), FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax if encode else ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = '1.2.840.10008.5.1.4.1.1.1', '1.2.3'
    ds.Rows, ds.Columns, ds.SamplesPerPixel = *a.shape[:2], 1 if a.ndim == 2 else 3
    ds.PhotometricInterpretation = 'MONOCHROME2' if a.ndim == 2 else 'RGB'
    if a.ndim == 3: ds.PlanarConfiguration = 0
    ds.BitsAllocated = ds.BitsStored = 8*a.itemsize
    ds.PixelRepresentation = int(a.dtype.kind == 'i')
    ds.PixelData = encapsulate([encode(a)]) if encode else a.tobytes()
    ds['PixelData'].VR = 'OB' if encode or a.itemsize == 1 else 'OW'
    for k, v in kw.items(): setattr(ds, k, v)
    ds.HighBit = kw.get('HighBit', ds.BitsStored-1)
    ds.preamble = bytes(128)
    pydicom.dcmwrite(f, ds, implicit_vr=False, little_endian=True, force_encoding=True)   # this pydicom may not know the syntax
    return f

def put(f, element):
    "Insert an encoded element before the pixel data"
    data = f.read_bytes()
    i = data.index(b'\xe0\x7f\x10\0')
    f.write_bytes(data[:i]+element+data[i:])
    return f

def swap(f, old, new):
    data = f.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    f.write_bytes(data.replace(old, new))
    return f

@pytest.mark.parametrize('encode, syntax', [(jpegls, JPEGLSLossless), (lossless, JPEGLosslessSV1)], ids=['JPEG-LS', 'JPEG Lossless'])
@pytest.mark.parametrize('photo', ['RGB', 'YBR_FULL'])
def test_colours_of_every_codec(tmp_path, encode, syntax, photo):
    a = np.repeat(EIGHT[..., None], 3, 2)
    if photo == 'YBR_FULL': a[..., 1:] = 128
    x = read_xray(save(tmp_path/'a.dcm', a, encode, syntax, PhotometricInterpretation=photo))
    assert np.abs(x*255-EIGHT).max() < .01

def test_a_modality_lut_of_unknown_vr_counts(tmp_path):
    f = save(tmp_path/'a.dcm', GREY, jpegls, BitsStored=12)
    lut = Dataset()
    lut.LUTDescriptor, lut.ModalityLUTType, lut.LUTData = [4096, 0, 16], 'US', (np.arange(4096)[::-1]*16).astype(np.uint16).tobytes()
    lut['LUTData'].VR = 'OW'
    holder = Dataset()
    holder.ModalityLUTSequence = [lut]
    b = pydicom.filebase.DicomBytesIO()
    b.is_implicit_VR, b.is_little_endian = True, True
    pydicom.filewriter.write_dataset(b, holder)
    raw = b.getvalue()[8:]
    put(f, b'\x28\0\0\x30UN\0\0'+struct.pack('<I', len(raw))+raw)
    assert np.allclose(read_xray(f), (4095-GREY.astype(float))*16/65535, atol=1e-6)

@pytest.mark.parametrize('sp, want', [('0.2\\0.1', (32, 20)), ('0.2\\0.1\\0.3', (16, 20)), ('0.2', (16, 20)), ('\\0.2\\0.1 ', (16, 20)),
    ('0.2\\', (16, 20)), ('0.2\\x ', (16, 20)), ('        ', (16, 20))])
def test_only_a_pair_of_numbers_is_a_spacing(tmp_path, sp, want):
    v = sp.encode()+b' '*(len(sp) % 2)
    f = save(tmp_path/'a.dcm', GREY, jpegls, BitsStored=12, PixelSpacing=[.2, .1])
    f.write_bytes(f.read_bytes().replace(b'DS\x08\x000.2\\0.1 ', b'DS'+struct.pack('<H', len(v))+v))
    assert read_xray(f, square=True).shape == want and xray_meta(f)['pixel_spacing'] == ((.2, .1) if want[0] == 32 else None)

@pytest.mark.parametrize('slope, turned', [(b' -2 ', True), (b'2   ', False), (b'    ', False)])
def test_only_the_sign_of_the_slope_matters(tmp_path, slope, turned):
    f = swap(save(tmp_path/'a.dcm', GREY, jpegls, BitsStored=12, RescaleIntercept='0', RescaleSlope='9.99'),
        b'DS\x04\x009.99', b'DS\x04\0'+slope)
    assert np.abs(read_xray(f)*4095-(4095-GREY.astype(float) if turned else GREY)).max() < .01

@pytest.mark.parametrize('slope, window', list(product([b'nan ', b'inf ', b'0   '], [None, (1000, 500), 'lut'])))
def test_a_slope_that_leaves_no_image_is_refused_in_every_window(tmp_path, slope, window):
    voi = Dataset()
    voi.LUTDescriptor, voi.LUTData = [4096, 0, 16], np.arange(4096, dtype=np.uint16).tobytes()
    voi['LUTData'].VR = 'OW'
    f = swap(save(tmp_path/'a.dcm', GREY, BitsStored=12, RescaleIntercept='0', RescaleSlope='9.99', VOILUTSequence=[voi]),
        b'DS\x04\x009.99', b'DS\x04\0'+slope)
    with pytest.raises(XrayError, match=r'a\.dcm.*no image is left'): read_xray(f, window)

@pytest.mark.parametrize('kw, want', [({'PixelPaddingValue': 65535}, 0), ({'PixelPaddingValue': 4095}, 9),
    ({'PixelPaddingValue': 5000, 'PixelPaddingRangeLimit': 4095}, 0)])
def test_padding_that_cannot_be_stored_touches_no_pixel(tmp_path, kw, want):
    a = np.full((3, 3), 4095, np.uint16)
    assert (read_xray(save(tmp_path/'a.dcm', a, BitsStored=12, **kw)) == 0).sum() == want
    eight = np.full((4, 4), 255, np.uint8)
    assert read_xray(save(tmp_path/'b.dcm', eight, PixelPaddingValue=511)).min() == 1

def test_padding_read_without_its_sign(tmp_path):
    a = np.array([[-2000, 5]], np.int16)
    f = save(tmp_path/'a.dcm', a, PixelPaddingValue=-2000)
    swap(f, b'\x28\0\x20\x01SS\2\0', b'\x28\0\x20\x01US\2\0')   # 63536, the same sixteen bits
    assert read_xray(f)[0].tolist()[0] == 0 < read_xray(f)[0, 1]

def test_eight_bits_declared_with_sixteen(tmp_path):
    x = read_xray(save(tmp_path/'a.dcm', EIGHT, jpegls, BitsAllocated=16, BitsStored=8))
    assert np.abs(x*255-EIGHT).max() < .01
    with pytest.raises(XrayError, match='not what its header says'):
        read_xray(save(tmp_path/'b.dcm', EIGHT, jpegls, BitsAllocated=16, BitsStored=12))

def test_zeros_after_the_end_mark_are_no_cut(tmp_path):
    assert np.abs(read_xray(save(tmp_path/'a.dcm', EIGHT, lambda a: jpegls(a)+bytes(40)))*255-EIGHT).max() < .01

def test_samples_that_do_not_fit_the_photometric_interpretation(tmp_path):
    colour = rng.integers(0, 256, (16, 20, 3)).astype(np.uint8)
    for encode in (None, jpegls):
        with pytest.raises(XrayError, match='MONOCHROME2 with 3 samples'):
            read_xray(save(tmp_path/'a.dcm', colour, encode, PhotometricInterpretation='MONOCHROME2'))
    with pytest.raises(XrayError, match='for colours'): read_xray(save(tmp_path/'b.dcm', colour), window=(100, 50))
    with pytest.raises(XrayError, match='whole number'): read_xray(save(tmp_path/'c.dcm', EIGHT), frame='a')

def test_an_overlay_excuses_its_own_bit_only(tmp_path):
    f = save(tmp_path/'a.dcm', GREY | np.uint16(0x1000), BitsStored=12)
    with pytest.raises(XrayError, match='above BitsStored'): read_xray(f)
    for bit, ok in ((12, True), (0, False), (14, False)):
        f = save(tmp_path/'a.dcm', GREY | np.uint16(0x1000), BitsStored=12)
        put(f, b'\0\x60\0\x01US\2\0\x10\0'+b'\0\x60\2\x01US\2\0'+struct.pack('<H', bit))
        if ok: assert np.abs(read_xray(f)*4095-GREY).max() < .01
        else:
            with pytest.raises(XrayError, match='above BitsStored'): read_xray(f)

def test_headers_that_claim_what_cannot_be(tmp_path):
    f = save(tmp_path/'a.dcm', EIGHT, Rows=60000, Columns=60000)
    with pytest.raises(XrayError, match='60,000×60,000'): read_xray(f)
    with pytest.raises(XrayError, match='0×20 pixels'): read_xray(save(tmp_path/'b.dcm', EIGHT, Rows=0))
    with pytest.raises(XrayError, match='cut off'): read_xray(save(tmp_path/'c.dcm', EIGHT, Rows=32))
    big = cv2.imencode('.jpg', np.zeros((64, 64), np.uint8))[1].tobytes()
    with pytest.raises(XrayError, match='64×64, its header says 16×20'):
        read_xray(save(tmp_path/'d.dcm', EIGHT, lambda a: big, JPEGBaseline8Bit))

def test_a_deflate_bomb_behind_a_long_header(tmp_path, monkeypatch):
    ds = pydicom.dcmread(pydicom.data.get_testdata_file('image_dfl.dcm'))
    ds.file_meta.PrivateInformationCreatorUID, ds.file_meta.PrivateInformation = '1.2.3', bytes(5000)
    ds.save_as(tmp_path/'a.dcm')
    assert dicom.read_header(tmp_path/'a.dcm').Rows == 512
    monkeypatch.setattr(dicom, 'MAX_PIXELS', 1000)
    for pixels in (False, True):
        with pytest.raises(XrayError, match='unpacks to more'): dicom.read_header(tmp_path/'a.dcm', pixels)

def test_what_may_not_be_opened(tmp_path):
    f = save(tmp_path/'a.dcm', EIGHT)
    (tmp_path/'shut').mkdir()
    f.chmod(0)
    (tmp_path/'shut').chmod(0)
    pid = os.fork()   # another user, if this one may open everything
    if pid == 0:
        code = 1
        try:
            tmp_path.chmod(0o755)
            os.chdir(tmp_path)
            if os.geteuid() == 0: os.seteuid(65534)
            with pytest.raises(XrayError, match='permissions'): read_xray('a.dcm')
            with pytest.warns(PtxNotice, match='folder cannot be opened'): find_images('.')
            code = 0
        finally: os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0

# --- lossy codecs

def saturated(bits, shape=64):
    "A bright background, a dark half and noise: what makes a lossy codec swing"
    a = np.full((shape, shape), (1 << bits)-1, np.uint16)
    a[:, :shape//2] = 200
    a[shape//4:shape//2, 8:-8] = np.random.default_rng(0).integers(0, 1 << bits, (shape//4, shape-16))
    return a

def extended(a): return imagecodecs.jpeg8_encode(a, level=95, bitspersample=12)
def near(a): return imagecodecs.jpegls_encode(a, level=3)
def j2k(a): return imagecodecs.jpeg2k_encode(a, level=40, bitspersample=16, codecformat='j2k', reversible=False)
def htj2k(a): return imagecodecs.htj2k_encode(a, level=.005, reversible=False)
def jpegxl(a): return imagecodecs.jpegxl_encode(a, level=90, lossless=False)

LOSSY = {'JPEG Extended': (10, JPEGExtended12Bit, extended, imagecodecs.jpeg8_decode),
    'JPEG-LS': (10, JPEGLSNearLossless, near, imagecodecs.jpegls_decode), 'JPEG 2000': (12, JPEG2000, j2k, imagecodecs.jpeg2k_decode),
    'HTJ2K': (12, HTJ2K, htj2k, imagecodecs.htj2k_decode)}

@pytest.mark.parametrize('kind', LOSSY)
def test_what_a_lossy_codec_overshoots_is_clipped(tmp_path, kind):
    bits, syntax, encode, decode = LOSSY[kind]
    a, top = saturated(bits), (1 << bits)-1
    decoded = decode(encode(a))
    assert decoded.max() > top   # there is something to clip
    for photo in ('MONOCHROME2', 'MONOCHROME1'):
        x, want = (read_xray(save(tmp_path/'a.dcm', a, encode, syntax, BitsStored=bits, PhotometricInterpretation=photo)),
            np.clip(decoded, 0, top)/top)
        # two libraries round differently there
        assert np.abs(x-(want if photo[-1] == '2' else 1-want)).max() < (1.01/top if kind == 'HTJ2K' else 1e-6)

def test_the_overshoot_stays_in_a_file_that_was_decompressed(tmp_path):
    over = imagecodecs.jpeg8_decode(extended(saturated(10)))
    with pytest.raises(XrayError, match='above BitsStored 10'): read_xray(save(tmp_path/'a.dcm', over, BitsStored=10))
    with pytest.raises(XrayError, match='above BitsStored 10'): read_xray(save(tmp_path/'b.dcm', over, jpegls, BitsStored=10))
    for encode in (None, jpegls):
        assert np.abs(read_xray(save(tmp_path/'c.dcm', over, encode, BitsStored=10, LossyImageCompression='01'))*1023
            -over.clip(0, 1023)).max() < .01

def test_bits_stored_that_are_wrong_are_no_overshoot(tmp_path):
    a = saturated(12)
    with pytest.raises(XrayError, match='above BitsStored 10.*; correct BitsStored'):
        read_xray(save(tmp_path/'a.dcm', a, extended, JPEGExtended12Bit, BitsStored=10))
    with pytest.raises(XrayError, match='above BitsStored 11'):
        read_xray(save(tmp_path/'b.dcm', a, near, JPEGLSNearLossless, BitsStored=11))

def test_the_sign_of_a_jpeg_is_its_highest_bit(tmp_path):
    "10 signed bits: written with 12, with the sign repeated; with 10 alone; in a lossy stream that swings"
    a = np.linspace(-512, 511, 32*32).astype(np.int16).reshape(32, 32)
    want = (a+512.)/1023
    for bits in (10, 12):
        coded = a.view(np.uint16) & np.uint16((1 << bits)-1)
        f = save(tmp_path/f'{bits}.dcm', a, lambda _, c=coded: imagecodecs.jpeg8_encode(c, lossless=True, bitspersample=12),
            JPEGLosslessSV1, BitsStored=10)
        assert np.abs(read_xray(f)-want).max() < 1e-6, bits
    assert np.abs(read_xray(save(tmp_path/'n.dcm', a, BitsStored=10))-want).max() < 1e-6
    loud = np.where(np.indices((32, 32)).sum(0) % 16 < 8, -512, 511).astype(np.int16)
    encode = lambda a: imagecodecs.jpeg2k_encode(a, level=65, bitspersample=16, codecformat='j2k', reversible=False)
    decoded = imagecodecs.jpeg2k_decode(encode(loud))
    assert decoded.dtype == np.int16 and decoded.max() > 511 and decoded.min() < -512
    assert np.abs(read_xray(save(tmp_path/'j.dcm', loud, encode, JPEG2000, BitsStored=10))*1023-512-decoded.clip(-512, 511)).max() < .01

# --- transfer syntaxes

def progressive(a):
    out = io.BytesIO()
    Image.fromarray(a).save(out, 'JPEG', progressive=True, quality=95)
    return out.getvalue()

def deflate(a):
    c = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return c.compress(a.tobytes())+c.flush()

def recompressed(a): return imagecodecs.jpegxl_encode_jpeg(imagecodecs.jpeg8_encode(a, level=95))
def exact_jpegxl(a): return imagecodecs.jpegxl_encode(a, lossless=True)
def of_syntax(n): return UID(f'1.2.840.10008.1.2.{n}')

RARE = {'HTJ2K lossless': (HTJ2KLossless, imagecodecs.htj2k_encode, GREY, None),
    'HTJ2K RPCL': (HTJ2KLosslessRPCL, imagecodecs.htj2k_encode, GREY, None), 'HTJ2K': (HTJ2K, htj2k, GREY, imagecodecs.htj2k_decode),
    'JPEG XL lossless': (of_syntax('4.110'), exact_jpegxl, GREY, None), 'JPEG XL 8 bits': (of_syntax('4.110'), exact_jpegxl, EIGHT, None),
    'JPEG XL of JPEG': (of_syntax('4.111'), recompressed, EIGHT, imagecodecs.jpegxl_decode),
    'JPEG XL': (of_syntax('4.112'), jpegxl, EIGHT, imagecodecs.jpegxl_decode),
    'deflated frames': (of_syntax('8.1'), deflate, GREY, None), 'deflated frames, 8 bits': (of_syntax('8.1'), deflate, EIGHT, None),
    'spectral JPEG': (of_syntax('4.53'), progressive, EIGHT, imagecodecs.jpeg8_decode),
    'progressive JPEG': (of_syntax('4.55'), progressive, EIGHT, imagecodecs.jpeg8_decode)}

@pytest.mark.parametrize('kind', RARE)
def test_rare_transfer_syntaxes(tmp_path, kind):
    syntax, encode, a, decoded = RARE[kind]
    bits = 8 if a is EIGHT else 12
    want = a if decoded is None else np.clip(decoded(encode(a)), 0, (1 << bits)-1)
    f = save(tmp_path/'a.dcm', a, encode, syntax, BitsStored=bits)
    assert np.abs(read_xray(f)*((1 << bits)-1)-want).max() < (1.01 if kind == 'HTJ2K' else .01)   # two libraries round differently there
    assert xray_meta(f)['size'] == (16, 20) and not xray_meta(f)['transfer_syntax'].startswith('1.2.')

@pytest.mark.parametrize('kind', [k for k in RARE if k != 'HTJ2K'])
def test_a_rare_syntax_cut_off_or_of_another_size(tmp_path, kind):
    syntax, encode, a, _ = RARE[kind]
    for n, change in (('cut', lambda s: s[:len(s)*2//3]), ('size', lambda s: s)):
        f = save(tmp_path/f'{n}.dcm', a, lambda a, c=change: c(encode(a)), syntax, **({'Rows': 32, 'Columns': 30} if n == 'size' else {}))
        with pytest.raises(XrayError, match='cut off|not what its header says|has no end|its header says|cannot be decoded') as e:
            read_xray(f)
        assert 'plugins' not in str(e.value) and 'Error' not in str(e.value) and 'NoneType' not in str(e.value)

@pytest.mark.parametrize('kind', [k for k in RARE if 'XL' not in k])
def test_rare_syntaxes_without_the_extra(tmp_path, monkeypatch, kind):
    syntax, encode, a, _ = RARE[kind]
    f = save(tmp_path/'a.dcm', a, encode, syntax, BitsStored=8 if a is EIGHT else 12)
    x = read_xray(f)
    monkeypatch.setitem(sys.modules, 'imagecodecs', None)
    assert np.array_equal(read_xray(f), x)

def test_no_decoder_is_said_truly(tmp_path, monkeypatch):
    for n, name in (('4.54', 'Process 7 and 9'), ('4.100', 'MPEG2'), ('4.92', 'Multi-component')):
        f = save(tmp_path/'a.dcm', EIGHT, jpegls, of_syntax(n))
        with pytest.raises(XrayError, match=f'no decoder for transfer syntax .*{name}.*; '
                'convert it to Explicit VR Little Endian, for example with gdcmconv --raw$'):
            read_xray(f)
    monkeypatch.setitem(sys.modules, 'imagecodecs', None)
    for syntax, encode in ((of_syntax('4.110'), exact_jpegxl), (JPEGLosslessSV1, lossless)):
        monkeypatch.setattr(dicom, 'DECODERS', ())
        with pytest.raises(XrayError, match=r"no decoder for .*; pip install 'pneumothorax\[codecs\]'"):
            read_xray(save(tmp_path/'b.dcm', EIGHT, encode, syntax))

def test_a_colour_of_each_new_syntax(tmp_path):
    a = np.repeat(EIGHT[..., None], 3, 2)
    for encode, syntax, photo in ((exact_jpegxl, of_syntax('4.110'), 'RGB'), (deflate, of_syntax('8.1'), 'RGB'),
            (imagecodecs.htj2k_encode, HTJ2KLossless, 'RGB'), (progressive, of_syntax('4.55'), 'YBR_FULL_422')):
        x = read_xray(save(tmp_path/'a.dcm', a, encode, syntax, PhotometricInterpretation=photo))
        assert np.abs(x*255-EIGHT).max() < (.01 if photo == 'RGB' else 25), syntax

# --- tables and windows

def table(desc, data, vr='OW', desc_vr='US'):
    item = Dataset()
    item.LUTDescriptor, item.LUTData = desc, data
    item['LUTData'].VR, item['LUTDescriptor'].VR = vr, desc_vr
    return item

def without(item, key):
    del item[key]
    return item

RAMP = (np.arange(4096)[::-1]*16).astype(np.uint16)
SHELLS = {'empty item': lambda: [Dataset()], 'no items': list,
    'no descriptor': lambda: [without(table([4096, 0, 16], RAMP.tobytes()), 'LUTDescriptor')],
    'no data': lambda: [without(table([4096, 0, 16], RAMP.tobytes()), 'LUTData')], 'empty values': lambda: [table(None, None)]}

@pytest.mark.parametrize('shell', SHELLS)
def test_a_table_that_is_none(tmp_path, shell):
    x = read_xray(save(tmp_path/'a.dcm', GREY, BitsStored=12, RescaleSlope=-1, RescaleIntercept=0, ModalityLUTSequence=SHELLS[shell]()))
    assert np.abs(x*4095-(4095-GREY.astype(float))).max() < .01   # the slope holds
    with pytest.raises(XrayError, match=r'no VOI LUT; use window=None'):
        read_xray(save(tmp_path/'b.dcm', GREY, BitsStored=12, VOILUTSequence=SHELLS[shell]()), 'lut')

def test_tables_of_every_form(tmp_path):
    "The same 4,096 entries as packed words, as numbers; 65,536 entries; entries of 8 bits in one byte and in two"
    want = RAMP[GREY]/65535
    for data, vr in ((RAMP.tobytes(), 'OW'), (RAMP[:1000].tolist(), 'US')):
        n = len(RAMP) if vr == 'OW' else 1000
        x = read_xray(save(tmp_path/'a.dcm', GREY, BitsStored=12, ModalityLUTSequence=[Dataset(), table([n, 0, 16], data, vr)]))
        assert np.abs(x-(want if vr == 'OW' else RAMP[GREY.clip(0, 999)]/65535)).max() < 1e-6
    deep, full = rng.integers(0, 65536, (16, 20)).astype(np.uint16), np.arange(65536)[::-1].astype(np.uint16)
    assert np.abs(read_xray(save(tmp_path/'b.dcm', deep, ModalityLUTSequence=[table([0, 0, 16], full.tobytes())]))
        -(1-deep/65535)).max() < 1e-6
    eight = np.arange(256)[::-1].astype(np.uint8)
    for data in (eight.tobytes(), eight.astype('<u2').tobytes(), eight.astype('<u2').tolist(), eight.view('<u2').tolist()):
        x = read_xray(save(tmp_path/'c.dcm', EIGHT,
            ModalityLUTSequence=[table([256, 0, 8], data, 'OW' if isinstance(data, bytes) else 'US')]))
        assert np.abs(x*255-(255-EIGHT.astype(float))).max() < .01

@pytest.mark.parametrize('first, vr', [(-2048, 'SS'), (65536-2048, 'US')])
def test_the_first_input_of_a_table_with_and_without_its_sign(tmp_path, first, vr):
    a = (GREY.astype(int)-2048).astype(np.int16)
    x = read_xray(save(tmp_path/'a.dcm', a, BitsStored=12, ModalityLUTSequence=[table([4096, first, 16], RAMP.tobytes(), desc_vr=vr)]))
    assert np.abs(x-RAMP[GREY]/65535).max() < 1e-6
    x = read_xray(save(tmp_path/'b.dcm', GREY, BitsStored=12, RescaleSlope=1, RescaleIntercept=-2048,
        VOILUTSequence=[Dataset(), table([4096, first, 16], RAMP.tobytes(), desc_vr=vr)]), 'lut')
    assert np.abs(x-RAMP[GREY]/65535).max() < 1e-6

def test_a_table_in_big_endian(tmp_path):
    ds = pydicom.dcmread(save(tmp_path/'a.dcm', GREY, BitsStored=12,
        ModalityLUTSequence=[table([4096, 0, 16], RAMP.astype('>u2').tobytes())]))
    ds.file_meta.TransferSyntaxUID, ds.PixelData = ExplicitVRBigEndian, GREY.astype('>u2').tobytes()
    pydicom.dcmwrite(tmp_path/'b.dcm', ds, implicit_vr=False, little_endian=False, force_encoding=True)
    assert np.abs(read_xray(tmp_path/'b.dcm')-RAMP[GREY]/65535).max() < 1e-6

@pytest.mark.parametrize('desc, data', [([4096, 0, 16], RAMP[:100].tobytes()), ([4096, 0], RAMP.tobytes()), ([4096, 0, 0], RAMP.tobytes())])
def test_a_table_that_does_not_fit_its_descriptor(tmp_path, desc, data):
    with pytest.raises(XrayError, match='ModalityLUTSequence: descriptor .* does not fit its data'):
        read_xray(save(tmp_path/'a.dcm', GREY, BitsStored=12, ModalityLUTSequence=[table(desc, data)]))

@pytest.mark.parametrize('centres, widths', [(1000, 600), ([1000, 5], [600, 9]), ([1000, 5, 7], [600, 9, 11])])
@pytest.mark.parametrize('function', [None, '', 'LINEAR', 'LINEAR_EXACT', 'SIGMOID'])
def test_windows_of_every_form(tmp_path, centres, widths, function):
    kw = {} if function is None else {'VOILUTFunction': function}
    x, v = (read_xray(save(tmp_path/'a.dcm', GREY, BitsStored=12, WindowCenter=centres, WindowWidth=widths,
        RescaleSlope=.5, RescaleIntercept=-100, **kw), 'stored'), GREY*.5-100)
    # C.11.2.1, by hand
    want = (1/(1+np.exp(-4*(v-1000)/600)) if function == 'SIGMOID'
        else ((v-1000)/600+.5 if function == 'LINEAR_EXACT' else (v-999.5)/599+.5))
    assert np.abs(x-want.clip(0, 1)).max() < 1e-6

def test_a_window_that_is_none(tmp_path):
    kw = {'BitsStored': 12, 'WindowCenter': 1000, 'WindowWidth': 600}
    with pytest.raises(XrayError, match="VOILUTFunction 'CUBIC'"):
        read_xray(save(tmp_path/'a.dcm', GREY, VOILUTFunction='CUBIC', **kw), 'stored')
    f = swap(save(tmp_path/'b.dcm', GREY, **kw), b'DS\x06\x001000.0', b'DS\x06\x001,5   ')
    with pytest.raises(XrayError, match="WindowCenter '1,5' is no number"): read_xray(f, 'stored')

# --- headers that say what cannot be

def test_no_pixels_in_the_pixel_data(tmp_path):
    for f in (save(tmp_path/'a.dcm', GREY[:0], Rows=64, Columns=64), save(tmp_path/'b.dcm', GREY, PixelData=None)):
        with pytest.raises(XrayError, match=r'no pixel data \(modality unknown\); leave it out'): read_xray(f)

@pytest.mark.parametrize('key, vr, value', [('RescaleSlope', 'DS', '0,5 '), ('RescaleSlope', 'DS', '1\\1 '),
    ('RescaleSlope', 'DS', 'n/a '), ('RescaleIntercept', 'DS', 'US'), ('NumberOfFrames', 'IS', '1A'), ('NumberOfFrames', 'IS', 'two '),
    ('PixelPaddingValue', 'US', b'\1\0\2\0'), ('Rows', 'US', b'\x10\0\x10\0'), ('BitsStored', 'US', b'\x0c\0\x0c\0')])
def test_an_attribute_that_is_no_number_is_named(tmp_path, key, vr, value):
    ds = pydicom.dcmread(save(tmp_path/'a.dcm', GREY, BitsStored=12))
    tag, value = pydicom.tag.Tag(key), value if isinstance(value, bytes) else value.encode()
    if key in ds: del ds[key]
    ds._dict[tag] = pydicom.dataelem.RawDataElement(tag, vr, len(value), value, 0, False, True, True)
    ds.save_as(tmp_path/'b.dcm')
    with pytest.raises(XrayError, match=f'b.dcm: {key} .* (is no number|is more than one number); correct the file'):
        read_xray(tmp_path/'b.dcm')
    xray_meta(tmp_path/'b.dcm')

# --- pixel data without their end

@pytest.mark.parametrize('lost', range(1, 9))
@pytest.mark.parametrize('kind', ['JPEG', 'JPEG-LS', 'JPEG 2000'])
def test_a_frame_without_its_delimiter(tmp_path, kind, lost):
    encode, syntax = {'JPEG': (lambda a: cv2.imencode('.jpg', a)[1].tobytes(), JPEGBaseline8Bit), 'JPEG-LS': (jpegls, JPEGLSLossless),
        'JPEG 2000': (lambda a: imagecodecs.jpeg2k_encode(a, level=0, codecformat='j2k', reversible=True), JPEG2000Lossless)}[kind]
    f = save(tmp_path/'a.dcm', EIGHT, encode, syntax)
    x = read_xray(f)
    f.write_bytes(f.read_bytes()[:-lost])
    assert np.array_equal(read_xray(f), x) and xray_meta(f)['size'] == (16, 20)
    f.write_bytes(f.read_bytes()[:lost-8 or None][:-100])
    with pytest.raises(XrayError, match='cut off|has no end|broken'): read_xray(f)

# --- pictures

@pytest.mark.parametrize('name', [b'caf\xe9.png', 'röntgen.png'.encode(), '肺.png'.encode()])
def test_deep_pngs_of_any_name(tmp_path, name):
    "In a process of its own, which a fault of the decoder would end without a word"
    cv2.imwrite(str(tmp_path/'a.png'), GREY)
    try: os.replace(tmp_path/'a.png', os.path.join(os.fsencode(tmp_path), name))
    except OSError: pytest.skip('this file system knows no such names')
    code = ('import sys, os; from pneumothorax.dicom import read_xray, xray_meta; f = os.listdir(".")[0]; '
        'print(*(read_xray(f)*65535).round().astype(int).ravel()); assert xray_meta(f)["bits_stored"] == 16')
    p = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True, text=True, check=False)
    assert p.returncode == 0 and p.stdout.split() == [str(v) for v in GREY.ravel()], p.stderr

def test_no_file_is_opened_by_opencv():
    for f in [*(ROOT/'pneumothorax').glob('*.py'), *(ROOT/'nbs').glob('*.ipynb'), *(ROOT/'tests').glob('*.py')]:
        assert 'cv2.'+'imread(' not in f.read_text(encoding='utf-8'), f.name

TURNED = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].T, 8: lambda a: np.rot90(a)}

@pytest.mark.parametrize('orientation', TURNED)
def test_pictures_are_turned_as_viewers_turn_them(tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for name, a in (('a.jpg', EIGHT), ('a.png', EIGHT), ('deep.png', GREY), ('a.tif', EIGHT),
            ('rgb.jpg', np.repeat(EIGHT[..., None], 3, 2))):
        kw = {'quality': 100, 'subsampling': 0} if name[-3:] == 'jpg' else {}
        (tmp_path/'plain').mkdir(exist_ok=True)
        Image.fromarray(a).save(tmp_path/'plain'/name, **kw)
        Image.fromarray(a).save(tmp_path/name, exif=exif, **kw)
        plain, x = read_image(tmp_path/'plain'/name), read_xray(tmp_path/name)
        assert np.array_equal(x, TURNED[orientation](plain)) and xray_meta(tmp_path/name)['size'] == x.shape

def test_an_orientation_that_stands_behind_the_pixels_of_a_png(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for g in (EIGHT, GREY):
        Image.fromarray(g).save(tmp_path/'a.png', exif=exif)
        data = (tmp_path/'a.png').read_bytes()
        i = data.index(b'eXIf')-4
        n = 12+int.from_bytes(data[i:i+4], 'big')
        (tmp_path/'a.png').write_bytes(data[:i]+data[i+n:-12]+data[i:i+n]+data[-12:])   # before IEND
        assert np.abs(read_xray(tmp_path/'a.png')*np.iinfo(g.dtype).max-np.rot90(g, -1)).max() < .01
        assert xray_meta(tmp_path/'a.png')['size'] == (20, 16)

def test_orientations_that_are_none(tmp_path):
    for o in (0, 9, 77):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = o
        Image.fromarray(EIGHT).save(tmp_path/'a.png', exif=exif)
        assert read_xray(tmp_path/'a.png').shape == (16, 20)
    Image.fromarray(EIGHT).save(tmp_path/'b.png', exif=b'Exif\0\0nonsense')
    assert np.abs(read_xray(tmp_path/'b.png')*255-EIGHT).max() < .01

def test_a_picture_may_be_as_large_as_a_dicom_file(tmp_path, monkeypatch):
    Image.new('1', (13500, 13500)).save(tmp_path/'a.png')
    assert xray_meta(tmp_path/'a.png')['size'] == (13500, 13500)   # 182 million; Pillow alone refuses it
    Image.new('1', (16390, 16390)).save(tmp_path/'b.png')
    for read in (xray_meta, read_xray):
        with pytest.raises(XrayError, match=r'b.png: more than 268,435,456 pixels; no radiograph is that large'): read(tmp_path/'b.png')
    before = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10)
    Image.fromarray(EIGHT).save(tmp_path/'c.png')
    assert read_xray(tmp_path/'c.png').shape == (16, 20) and Image.MAX_IMAGE_PIXELS == 10 and before != 10

# --- whatever comes

def kind_of(read, f):
    "The kind of an outcome: 'read', or the words of the refusal that are of no file"
    try: read(f)
    except XrayError as e:
        said = str(e)
        assert said.startswith(f'{f}: ') and '; ' in said, said
        return 'fault' if 'cannot be decoded (' in said and 'Error: ' in said else 'refused'
    return 'read'

def test_every_dicom_file_of_pydicom(tmp_path):
    "Each is read or refused with a cause; the notebook compares the pixels"
    import data_store
    roots = Path(pydicom.data.__file__).parent, Path(data_store.__file__).parent
    files = sorted({f for r in roots for f in r.rglob('*') if f.is_file() and (f.suffix == '.dcm' or f.read_bytes()[128:132] == b'DICM')})
    about = [f for f in files
        if str(pydicom.dcmread(f, stop_before_pixels=True, force=True).get('SOPClassUID', '')) == '1.2.840.10008.5.1.4.1.1.66.4']
    for f in about:
        with pytest.raises(XrayError, match='a segmentation, no radiograph; leave it out'): read_xray(f, frame=0)
    counts = Counter(kind_of(lambda f: read_xray(f, frame=0), f) for f in files)
    assert counts == {'read': counts['read'], 'refused': len(files)-counts['read']} and counts['read'] >= 166 and len(about) > 2, counts
    assert set(Counter(kind_of(xray_meta, f) for f in files)) <= {'read', 'refused'}

def changed(data, rng):
    "A file with one thing wrong: cut, with other bits, with bytes lost or put in"
    how, at = rng.integers(5), int(rng.integers(132, len(data)))
    if how == 0: return data[:at]
    data = bytearray(data)
    if how == 1: del data[at:at+int(rng.integers(1, 40))]
    elif how == 2: data[at:at] = rng.bytes(int(rng.integers(1, 12)))
    else:
        for i in rng.integers(132, min(len(data), 132+(900 if how == 3 else len(data))), 4): data[i] ^= 1 << int(rng.integers(8))
    return bytes(data)

def lesser(f, out, rng):
    "A file that lacks an element, or has another one in its place"
    ds = pydicom.dcmread(f)
    group = [e.tag for e in ds if e.tag.group in (0x28, 0x7fe0)]
    tag = group[rng.integers(len(group))]
    if tag.group == 0x7fe0 or rng.integers(2): del ds[tag]
    else: ds._dict[tag] = pydicom.dataelem.RawDataElement(tag, ds.get_item(tag).VR, 4, rng.bytes(4), 0, False, True, True)
    pydicom.dcmwrite(out, ds, implicit_vr=False, little_endian=True, force_encoding=True)
    return out

def test_damage_of_any_kind_is_refused_or_read(tmp_path):
    rng, kinds = np.random.default_rng(0), {'plain': (GREY, None, None, {'BitsStored': 12}),
        **{k: (a, e, s, {'BitsStored': 8 if a is EIGHT else 12}) for k, (s, e, a, _) in RARE.items()},
        'JPEG': (EIGHT, lambda a: cv2.imencode('.jpg', a)[1].tobytes(), JPEGBaseline8Bit, {}),
        'JPEG-LS': (GREY, jpegls, JPEGLSLossless, {'BitsStored': 12}), 'JPEG Lossless': (EIGHT, lossless, JPEGLosslessSV1, {}),
        'table': (GREY, None, None, {'BitsStored': 12, 'ModalityLUTSequence': [table([4096, 0, 16], RAMP.tobytes())],
            'VOILUTSequence': [table([4096, 0, 16], RAMP.tobytes())], 'WindowCenter': 9, 'WindowWidth': 9})}
    counts = Counter()
    for k, (a, encode, syntax, kw) in kinds.items():
        good = save(tmp_path/'good.dcm', a, encode, syntax, **kw)
        assert kind_of(read_xray, good) == 'read', k
        for i in range(40):
            bad = tmp_path/'bad.dcm'
            if i % 4: bad.write_bytes(changed(good.read_bytes(), rng))
            else: lesser(good, bad, rng)
            for read in (read_xray, xray_meta, lambda f: read_xray(f, window='stored'), lambda f: read_xray(f, window='lut'),
                    lambda f: read_xray(f, frame=0, square=True)):
                counts[kind_of(read, bad)] += 1
    # a fault would be an exception that nobody foresaw
    assert counts['read'] > 500 and counts['refused'] > 500 and not counts['fault'], counts

def test_damaged_pictures_are_refused_or_read(tmp_path):
    rng, exif, counts = np.random.default_rng(0), Image.Exif(), Counter()
    exif[ExifTags.Base.Orientation] = 6
    for name, a in (('a.jpg', EIGHT), ('a.png', EIGHT), ('deep.png', GREY), ('a.tif', GREY)):
        Image.fromarray(a).save(tmp_path/name, exif=exif)
        good = (tmp_path/name).read_bytes()
        for _ in range(60):
            data = bytearray(good)
            for i in rng.integers(0, len(data), 3): data[i] = rng.integers(256)
            (tmp_path/name).write_bytes(data[:rng.integers(len(data))] if rng.integers(3) == 0 else data)
            for read in (read_xray, xray_meta): counts[kind_of(read, tmp_path/name)] += 1
    assert counts['read'] > 20 and counts['refused'] > 20 and not counts['fault'], counts

@pytest.mark.parametrize(('kind', 'high'), [('u', 13), ('u', 15), ('i', 15)])
def test_bits_that_stand_higher_up(tmp_path, kind, high):
    "HighBit says so, and nothing stands below them"
    a = np.random.default_rng(0).integers(-2048 if kind == 'i' else 0, 2048 if kind == 'i' else 4096, (32, 32)).astype(f'{kind}2')
    kw = {'BitsStored': 12}
    want = read_xray(save(tmp_path/'a.dcm', a, HighBit=11, **kw))
    assert (read_xray(save(tmp_path/'b.dcm', a << high-11, HighBit=high, **kw)) == want).all()
    with pytest.raises(XrayError, match='above BitsStored 12'): read_xray(save(tmp_path/'c.dcm', (a << high-11)|1, HighBit=high, **kw))

def test_two_photometric_interpretations(tmp_path):
    f = save(tmp_path/'a.dcm', np.zeros((8, 8), np.uint16), PhotometricInterpretation=['MONOCHROME2', 'MONOCHROME1'])
    with pytest.raises(XrayError, match='photometric interpretation'): read_xray(f)

def test_a_png_of_16_bits_that_is_cut_off(tmp_path):
    cv2.imwrite(str(tmp_path/'a.png'), np.arange(4096, dtype=np.uint16).reshape(64, 64))
    data = (tmp_path/'a.png').read_bytes()
    (tmp_path/'a.png').write_bytes(data[:-12])
    with pytest.raises(XrayError, match='a.png: damaged or cut off'): read_xray(tmp_path/'a.png')

def test_pages_of_a_tiff_are_not_chosen_silently(tmp_path):
    pages = [Image.fromarray(np.full((8, 8), v, np.uint8)) for v in (10, 200)]
    pages[0].save(tmp_path/'a.tif', save_all=True, append_images=pages[1:])
    with pytest.raises(XrayError, match='a.tif: 2 pages; give a file of one'): read_xray(tmp_path/'a.tif')
    pages[0].save(tmp_path/'b.tif')
    assert read_xray(tmp_path/'b.tif').mean() == pytest.approx(10/255)
