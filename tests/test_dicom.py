"Radiographs that are legal and rare, and radiographs that are nearly legal: what is read, what is refused, whichever way the header is read"
import os
import struct
from itertools import product

import cv2
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, JPEGLosslessSV1, JPEGLSLossless

from pneumothorax import dicom
from pneumothorax.dicom import XrayError, read_xray
from pneumothorax.siim import PtxNotice, find_images

imagecodecs = pytest.importorskip('imagecodecs')   # the extra "codecs"
rng = np.random.default_rng(0)
GREY = rng.integers(0, 4096, (16, 20)).astype(np.uint16)
EIGHT = (GREY >> 4).astype(np.uint8)

def jpegls(a): return imagecodecs.jpegls_encode(a)
def lossless(a): return imagecodecs.jpeg8_encode(a, lossless=True, colorspace='rgb' if a.ndim == 3 else None, outcolorspace='rgb' if a.ndim == 3 else None)

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
    ds.HighBit = ds.BitsStored-1
    ds.save_as(f, enforce_file_format=True)
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

def both(f, monkeypatch, **kw):
    "The outcome of the short way and of the long one: pixels, or why not"
    def outcome():
        try: return read_xray(f, **kw)
        except XrayError as e: return str(e)
    a = outcome()
    with monkeypatch.context() as m:
        m.setattr(dicom, 'image_elements', lambda data: None)
        return a, outcome()

@pytest.mark.parametrize('encode, syntax', [(jpegls, JPEGLSLossless), (lossless, JPEGLosslessSV1)], ids=['JPEG-LS', 'JPEG Lossless'])
@pytest.mark.parametrize('photo', ['RGB', 'YBR_FULL'])
def test_colours_of_every_codec(tmp_path, encode, syntax, photo):
    a = np.repeat(EIGHT[..., None], 3, 2)
    if photo == 'YBR_FULL': a[..., 1:] = 128
    x = read_xray(save(tmp_path/'a.dcm', a, encode, syntax, PhotometricInterpretation=photo))
    assert np.abs(x*255-EIGHT).max() < .01

def test_a_modality_lut_of_unknown_vr_counts(tmp_path, monkeypatch):
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
    x, y = both(f, monkeypatch)
    assert np.array_equal(x, y) and np.allclose(x, (4095-GREY.astype(float))*16/65535, atol=1e-6)

@pytest.mark.parametrize('sp', ['0.2\\0.1\\0.3', '0.2', '\\0.2\\0.1 ', '0.2\\', '0.2\\0.1\\', '        '])
def test_odd_spacings_are_read_alike(tmp_path, monkeypatch, sp):
    f = save(tmp_path/'a.dcm', GREY, jpegls, BitsStored=12)
    v = sp.encode()+b' '*(len(sp) % 2)
    put(f, b'\x28\0\x30\0DS'+struct.pack('<H', len(v))+v)
    assert dicom.image_elements(f.read_bytes()) is None   # out of order, so the long way
    ds = save(tmp_path/'b.dcm', GREY, jpegls, BitsStored=12, PixelSpacing=[.2, .1])
    data = ds.read_bytes().replace(b'DS\x08\x000.2\\0.1 ', b'DS'+struct.pack('<H', len(v))+v)
    ds.write_bytes(data)
    x, y = both(ds, monkeypatch, square=True)
    assert x.shape == y.shape and np.array_equal(x, y)

@pytest.mark.parametrize('slope', [b'-1\\ ', b' -2 ', b'nan ', b'inf ', b'0   ', b'1\\2 ', b'    ', b'1,5 '])
def test_odd_slopes_are_read_alike(tmp_path, monkeypatch, slope):
    f = swap(save(tmp_path/'a.dcm', GREY, jpegls, BitsStored=12, RescaleIntercept='0', RescaleSlope='9.99'), b'DS\x04\x009.99', b'DS\x04\0'+slope)
    x, y = both(f, monkeypatch)
    assert (x == y) if isinstance(x, str) else np.array_equal(x, y)

@pytest.mark.parametrize('slope, window', list(product([b'nan ', b'inf ', b'0   '], [None, (1000, 500), 'lut'])))
def test_a_slope_that_leaves_no_image_is_refused_in_every_window(tmp_path, slope, window):
    voi = Dataset()
    voi.LUTDescriptor, voi.LUTData = [4096, 0, 16], np.arange(4096, dtype=np.uint16).tobytes()
    voi['LUTData'].VR = 'OW'
    f = swap(save(tmp_path/'a.dcm', GREY, BitsStored=12, RescaleIntercept='0', RescaleSlope='9.99', VOILUTSequence=[voi]), b'DS\x04\x009.99', b'DS\x04\0'+slope)
    with pytest.raises(XrayError, match=r'a\.dcm.*no image is left'): read_xray(f, window)

@pytest.mark.parametrize('kw, want', [({'PixelPaddingValue': 65535}, 0), ({'PixelPaddingValue': 4095}, 9), ({'PixelPaddingValue': 5000, 'PixelPaddingRangeLimit': 4095}, 0)])
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
    with pytest.raises(XrayError, match='not what its header says'): read_xray(save(tmp_path/'b.dcm', EIGHT, jpegls, BitsAllocated=16, BitsStored=12))

def test_zeros_after_the_end_mark_are_no_cut(tmp_path, monkeypatch):
    x, y = both(save(tmp_path/'a.dcm', EIGHT, lambda a: jpegls(a)+bytes(40)), monkeypatch)
    assert np.array_equal(x, y)

def test_samples_that_do_not_fit_the_photometric_interpretation(tmp_path):
    colour = rng.integers(0, 256, (16, 20, 3)).astype(np.uint8)
    for encode in (None, jpegls):
        with pytest.raises(XrayError, match='MONOCHROME2 with 3 samples'): read_xray(save(tmp_path/'a.dcm', colour, encode, PhotometricInterpretation='MONOCHROME2'))
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
    with pytest.raises(XrayError, match='64×64, its header says 16×20'): read_xray(save(tmp_path/'d.dcm', EIGHT, lambda a: big, JPEGBaseline8Bit))

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
