"""DICOM as hospitals and programs write it: what is checked of single files is checked of frames, outputs come back.

Every test stands for a kind of fault; its docstring says what else belongs to the kind.
"""

import dataclasses
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from pydicom.dataset import Dataset, FileMetaDataset

import samlora
from samlora.cli import main
from samlora.data import dicom_pixels
from samlora.data.dicom import list_series
from samlora.data.grid import Volume, case_to_volume, common_grid, match_grid, reorient
from samlora.data.plan import plan
from samlora.data.recipe import Recipe
from samlora.data.sources import find_images
from samlora.data.volume import read_volume, write_dicom_seg, write_volume
from samlora.errors import InputError, NoSegmentationError
from samlora.evaluation.cases import Job, measure
from samlora.evaluation.matching import Trio

RNG = np.random.default_rng(5)
AXIAL = [1, 0, 0, 0, 1, 0]
STACK = RNG.integers(0, 2000, (8, 24, 20)).astype(np.uint16)
UP = [100, 103, 106, 109]
FLOAT = "1.2.840.10008.5.1.4.1.1.30"


def item(**tags) -> list[Dataset]:
    """A DICOM sequence of one item."""
    data = Dataset()
    for key, value in tags.items():
        setattr(data, key, value)
    return [data]


def save(path, pixels, kind="CTImageStorage", syntax=pydicom.uid.ExplicitVRLittleEndian, **tags) -> Path:
    """A DICOM file of gray or RGB pixels, one frame or several. A tag of None is left out."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = pixels.ndim > 2 and pixels.shape[-1] == 3
    shape = pixels.shape[:-1] if colours else pixels.shape
    values = {
        "SOPClassUID": getattr(pydicom.uid, kind, kind),
        "SOPInstanceUID": pydicom.uid.generate_uid(),
        "StudyInstanceUID": "1.2.1",
        "SeriesInstanceUID": "1.2.1.1",
        "FrameOfReferenceUID": "1.2.1.9",
        "Modality": "CT",
        "PatientID": "7",
        "PatientName": "A^B",
        "SamplesPerPixel": 3 if colours else 1,
        "PhotometricInterpretation": "RGB" if colours else "MONOCHROME2",
        "Rows": shape[-2],
        "Columns": shape[-1],
        "BitsAllocated": 8 * pixels.itemsize,
        "BitsStored": 8 * pixels.itemsize,
        "HighBit": 8 * pixels.itemsize - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelData": pixels.tobytes(),
    }
    if colours:
        values["PlanarConfiguration"] = 0
    if len(shape) > 2:
        values["NumberOfFrames"] = shape[0]
    data = Dataset()
    for key, value in (values | tags).items():
        if value is not None:
            setattr(data, key, value)
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.save_as(path, enforce_file_format=True)
    return path


def enhanced(path, places, pixels=None, kind="EnhancedMRImageStorage", change=None, between=3, **tags) -> Path:
    """An enhanced file. places: heights of the frames, or points; change: gets the number and groups of each frame."""
    shared, frames = Dataset(), []
    measures = {"PixelSpacing": [0.5, 0.75], "SliceThickness": 3}
    if between is not None:
        measures["SpacingBetweenSlices"] = between
    shared.PixelMeasuresSequence = item(**measures)
    shared.PlaneOrientationSequence = item(ImageOrientationPatient=AXIAL)
    shared.PixelValueTransformationSequence = item(RescaleSlope=1, RescaleIntercept=0, RescaleType="US")
    for number, place in enumerate(places):
        groups = Dataset()
        point = place if isinstance(place, list) else [-20, 30, place]
        groups.PlanePositionSequence = item(ImagePositionPatient=point)
        if change is not None:
            change(number, groups)
        frames.append(groups)
    pixels = STACK[: len(places)] if pixels is None else pixels
    groups = {"SharedFunctionalGroupsSequence": [shared], "PerFrameFunctionalGroupsSequence": frames}
    return save(path, pixels, kind, **({"Modality": "MR"} | groups | tags))


def series(folder, stack=STACK, step=3, **tags) -> Path:
    """One file for each slice, upwards."""
    for number, pixels in enumerate(stack):
        place = {"ImagePositionPatient": [0, 0, step * number], "ImageOrientationPatient": AXIAL}
        place |= {"PixelSpacing": [0.5, 0.75], "RescaleSlope": 1, "RescaleIntercept": -1024}
        save(Path(folder) / f"IM{number}", pixels, **(place | tags))
    return Path(folder)


def refused(path, words, **options) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(InputError, match=words) as error:
        read_volume(path, **options)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    assert not any(part in text for part in ("0x", "ITK", "build", "Dataset' object"))
    return text


def segmented(volume, seed=0, classes=2) -> Volume:
    """Labels in the middle of a volume, on its grid."""
    labels = np.zeros(volume.array.shape[:3], np.uint8)
    labels[2:-2, 3:-3] = np.random.default_rng(seed).integers(0, classes + 1, labels[2:-2, 3:-3].shape)
    return dataclasses.replace(volume, array=labels)


# --- 1: frames of one file are checked as the files of a series -----------------------------------------------------


@pytest.mark.parametrize("between", [3, None])
@pytest.mark.parametrize("heights, both", [(UP * 2, "1 and 5"), ([100, 100, 103, 103, 106, 106], "1 and 2")])
def test_phases_of_an_enhanced_file_are_no_slices(heights, both, between, tmp_path):
    """Kind 1 (A1): time points, echoes, phases, b-values or frame types at the same places.

    To the kind belongs whatever is checked of a series of single files: see the tests below, and stacks of another
    direction, cardiac phases, one place for all frames.
    """
    path = enhanced(tmp_path / "phases.dcm", heights, between=between)
    refused(path, f"phases.dcm: .*frames {both} lie at the same place .*dcm2niix")


def _other_spacing(number, groups):
    if number == 2:
        groups.PixelMeasuresSequence = item(PixelSpacing=[0.6, 0.75], SliceThickness=3)


def _other_direction(number, groups):
    if number == 3:
        groups.PlaneOrientationSequence = item(ImageOrientationPatient=[0, 1, 0, 0, 0, -1])


def _no_place(number, groups):
    if number == 1:
        del groups.PlanePositionSequence


def _skewed(number, groups):
    if number == 1:
        groups.PlaneOrientationSequence = item(ImageOrientationPatient=[1, 0, 0, 1, 0, 0])


@pytest.mark.parametrize(
    "places, change, words",
    [
        (UP, _other_spacing, "pixel spacing 0.75 0.6 in frame 3, not 0.75 0.5 as in frame 1"),
        (UP, _other_direction, "orientation 0 1 0 0 0 -1 in frame 4"),
        (UP, _no_place, "frame 2 of 4 has no place"),
        (UP, _skewed, "frame 2: .*right angles"),
        ([100, 103, 109, 112], None, "6 mm between frame 2 and the next slice, but 3 mm elsewhere"),
        ([100, 106, 103, 109], None, "frame 3 does not follow frame 2"),
        ([[-20, 30 + n * 0.8, 100 + 3 * n] for n in range(4)], None, "shift sideways.*tilted by 14.9 degrees"),
        ([100] * 4, None, "frames 1 and 2 lie at the same place"),
    ],
)
def test_frames_that_make_no_grid_are_refused(places, change, words, tmp_path):
    """Kind 1: spacing, direction, place, order, step and sideways shift of frames, each as of single files."""
    refused(enhanced(tmp_path / "frames.dcm", places, change=change), words)


def test_frames_keep_scales_of_their_own(tmp_path):
    """Kind 1: slope and intercept of each frame, as PET and some MR have them; GDCM takes one for all."""

    def scaled(number, groups):
        groups.PixelValueTransformationSequence = item(
            RescaleSlope=1 + number / 4, RescaleIntercept=number, RescaleType="US"
        )

    for name, heights in (("up", UP), ("down", UP[::-1])):
        path = enhanced(tmp_path / f"{name}.dcm", heights, change=scaled, kind="EnhancedPETImageStorage", Modality="PT")
        factors = (1 + np.arange(4) / 4)[:, None, None]
        meant = STACK[:4] * factors + np.arange(4)[:, None, None]
        if name == "down":
            meant = meant[::-1]
        read = read_volume(path)
        assert np.array_equal(read.array, meant.T)
        assert read.affine[2, 3] == 100
        assert read.spacing == pytest.approx((0.75, 0.5, 3))


def test_files_of_one_frame_make_a_series(tmp_path):
    """Kind 1: enhanced files that hold one frame each are the slices of a series, with the checks of one."""
    for number, height in enumerate((106, 100, 103, 109)):
        enhanced(tmp_path / f"{number}.dcm", [height], STACK[number : number + 1])
    read = read_volume(tmp_path)
    assert np.array_equal(read.array, STACK[[1, 2, 0, 3]].T)
    assert read.spacing == pytest.approx((0.75, 0.5, 3))
    (found,) = list_series(tmp_path)
    assert found.size == (20, 24, 4)
    labels = segmented(read)
    write_dicom_seg(labels, tmp_path, tmp_path / "out" / "seg.dcm", ["a", "b"])
    assert np.array_equal(read_volume(tmp_path / "out" / "seg.dcm", labels=True).array, labels.array)
    enhanced(tmp_path / "again.dcm", [100], STACK[:1])
    refused(tmp_path, "lie at the same place")


def test_parts_of_a_divided_file_are_one_volume(tmp_path):
    """Kind 1: a concatenation, a file of many frames that was divided, is one series; a gap between parts is found."""
    parts = {"ConcatenationUID": "1.2.77", "InConcatenationTotalNumber": 2}
    enhanced(tmp_path / "z.dcm", UP[:2], InConcatenationNumber=1, **parts)
    enhanced(tmp_path / "a.dcm", UP[2:], STACK[2:4], InConcatenationNumber=2, **parts)
    assert np.array_equal(read_volume(tmp_path).array, STACK[:4].T)
    enhanced(tmp_path / "a.dcm", [112, 115], STACK[2:4], InConcatenationNumber=2, **parts)
    refused(tmp_path, "9 mm between z.dcm, frame 2")


def test_frames_of_other_classes_are_placed_too(tmp_path):
    """Kind 1: not only CT and MR; ultrasound volumes, tomosynthesis, secondary captures with functional groups."""

    def in_its_own_frame(number, groups):
        groups.PlanePositionVolumeSequence = item(ImagePositionVolume=[0, 0, 4 * number])
        groups.PlaneOrientationVolumeSequence = item(ImageOrientationVolume=AXIAL)
        del groups.PlanePositionSequence

    path = enhanced(tmp_path / "us.dcm", UP, kind="EnhancedUSVolumeStorage", Modality="US", change=in_its_own_frame)
    data = pydicom.dcmread(path)
    del data.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    data.save_as(path)
    assert read_volume(path).spacing == pytest.approx((0.75, 0.5, 4))
    kinds = ("BreastTomosynthesisImageStorage", "MultiFrameGrayscaleWordSecondaryCaptureImageStorage")
    for kind in kinds:
        path = enhanced(tmp_path / "frames.dcm", UP, kind=kind)
        assert read_volume(path).spacing == pytest.approx((0.75, 0.5, 3))
        refused(enhanced(tmp_path / "frames.dcm", UP * 2, kind=kind), "same place")


def test_enhanced_files_without_pydicom_say_what_is_needed(tmp_path, monkeypatch):
    enhanced(tmp_path / "frames.dcm", UP)
    series(tmp_path / "plain")
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    refused(tmp_path / "frames.dcm", r"pip install 'samlora\[dicom\]'")
    assert read_volume(tmp_path / "plain").array.shape == (20, 24, 8)


# --- 3: a default is no measurement ----------------------------------------------------------------------------------

PLACE = {"ImageOrientationPatient": AXIAL, "PixelSpacing": [0.5, 0.75]}


def test_distances_of_frames_are_stated_or_unknown(tmp_path):
    """Kind 3 (A3): spacing, origin and place that a library fills in. To the kind belong films, doses, nuclear medicine
    (slices and phases), one slice without a thickness, X-rays."""
    save(tmp_path / "legacy.dcm", STACK[:4], ImagePositionPatient=[0, 0, 0], SliceThickness=5, **PLACE)
    legacy = read_volume(tmp_path / "legacy.dcm")
    assert not legacy.has_spacing
    kind = "MultiFrameGrayscaleWordSecondaryCaptureImageStorage"
    tags = PLACE | {"ImagePositionPatient": [-20, 30, 100], "SpacingBetweenSlices": 5}
    save(tmp_path / "sc.dcm", STACK[:4], kind, Modality="OT", **tags)
    capture = read_volume(tmp_path / "sc.dcm")
    assert capture.has_spacing
    assert capture.spacing == pytest.approx((0.75, 0.5, 5))
    assert capture.affine[:3, 3].tolist() == [20, -30, 100]
    assert np.array_equal(capture.array, STACK[:4].T)


def test_frames_in_time_have_no_distance(tmp_path):
    """Kind 3: a film whose header has a distance of slices; heart phases of nuclear medicine at the same places."""
    tags = {"FrameTime": 40, "FrameIncrementPointer": 0x00181063, "SpacingBetweenSlices": 2, "PixelSpacing": [1, 1]}
    save(tmp_path / "xa.dcm", STACK[:4], "XRayAngiographicImageStorage", Modality="XA", **tags)
    assert not read_volume(tmp_path / "xa.dcm").has_spacing
    nuclear = PLACE | {"ImagePositionPatient": [0, 0, 9], "SpacingBetweenSlices": -4, "Modality": "NM"}
    nuclear |= {"FrameIncrementPointer": [0x00540080, 0x00540060]}
    kind = "NuclearMedicineImageStorage"
    save(tmp_path / "nm.dcm", STACK[:4], kind, SliceVector=[1, 2, 3, 4], RRIntervalVector=[1] * 4, **nuclear)
    read = read_volume(tmp_path / "nm.dcm")
    assert read.spacing == pytest.approx((0.75, 0.5, 4))
    assert np.array_equal(read.array, STACK[3::-1].T)  # downwards, as the sign says
    assert read.affine[2, 3] == 9 - 3 * 4
    detector = item(ImagePositionPatient=[5, 6, 7], ImageOrientationPatient=AXIAL)
    bare = nuclear | {"ImagePositionPatient": None, "ImageOrientationPatient": None}
    bare["DetectorInformationSequence"] = detector
    save(tmp_path / "real.dcm", STACK[:4], kind, SliceVector=[1, 2, 3, 4], **bare)
    assert read_volume(tmp_path / "real.dcm").affine[:3, 3].tolist() == [-5, -6, 7 - 3 * 4]
    save(tmp_path / "gated.dcm", STACK[:4], kind, SliceVector=[1, 2, 1, 2], RRIntervalVector=[1, 1, 2, 2], **nuclear)
    refused(tmp_path / "gated.dcm", "frames [12] and [34] lie at the same place")


def test_one_slice_is_as_thick_as_it_says_or_unknown(tmp_path):
    """Kind 3: one slice without a thickness has no volume in ml; a dose has the distances of its own list."""
    place = PLACE | {"ImagePositionPatient": [0, 0, 7]}
    save(tmp_path / "bare.dcm", STACK[0], **place)
    assert not read_volume(tmp_path / "bare.dcm").has_spacing
    save(tmp_path / "apart.dcm", STACK[0], SpacingBetweenSlices=4, **place)
    assert read_volume(tmp_path / "apart.dcm").spacing == pytest.approx((0.75, 0.5, 4))
    tags = {"GridFrameOffsetVector": [0, 2.5, 5, 7.5], "FrameIncrementPointer": 0x3004000C, "Modality": "RTDOSE"}
    save(tmp_path / "dose.dcm", STACK[:4], "RTDoseStorage", **place, **tags)
    assert read_volume(tmp_path / "dose.dcm").spacing == pytest.approx((0.75, 0.5, 2.5))
    tags["GridFrameOffsetVector"] = [0, 2.5, 5, 12.5]
    save(tmp_path / "dose.dcm", STACK[:4], "RTDoseStorage", **place, **tags)
    refused(tmp_path / "dose.dcm", "7.5 mm between frame 3")


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_headers_without_a_spacing_have_none(ending, stated, tmp_path):
    """Kind 3: ITK takes 1 mm for files that state no size of their voxels."""
    content = np.arange(24, dtype=np.uint8).tobytes()
    if ending == ".nrrd":
        lines = ["NRRD0004", "type: uchar", "dimension: 3", "sizes: 4 3 2", "encoding: raw"]
        lines += ["spacings: 1 1 1"] * stated + ["", ""]
    else:
        lines = ["ObjectType = Image", "NDims = 3", "BinaryData = True", "DimSize = 4 3 2"]
        lines += ["ElementSpacing = 1 1 1"] * stated + ["ElementType = MET_UCHAR", "ElementDataFile = LOCAL", ""]
    (tmp_path / f"a{ending}").write_bytes("\n".join(lines).encode() + content)
    read = read_volume(tmp_path / f"a{ending}")
    assert read.has_spacing == stated
    assert read.array.shape == (4, 3, 2)


def flat_source(folder, kind):
    """A picture with a pixel spacing and without a thickness: its file, or DICOM folder."""
    import SimpleITK

    if kind == "xray":
        tags = {"Modality": "DX", "FrameOfReferenceUID": None, "PixelSpacing": [0.5, 0.75]}
        place = folder / "xray" / "a.dcm"
        save(place, STACK[0], "DigitalXRayImageStorageForPresentation", SliceThickness=2, **tags)
        return folder / "xray"
    image = SimpleITK.GetImageFromArray(STACK[0])
    image.SetSpacing((0.75, 0.5))
    SimpleITK.WriteImage(image, str(folder / f"flat{kind}"))
    return folder / f"flat{kind}"


@pytest.mark.parametrize("kind", ["xray", ".mha", ".nrrd", ".nii.gz"])
def test_a_picture_without_a_thickness_has_no_volume(kind, tmp_path):
    """Kind 3: mm within the picture are stated, a thickness of 1 mm is not. To the kind belong
    X-rays, files of two axes, what is written for them, label maps that do not show a class."""
    image = read_volume(flat_source(tmp_path, kind))
    assert image.has_spacing and not image.has_thickness
    assert image.spacing[:2] == pytest.approx((0.75, 0.5))
    case = Recipe("r", "mr", percentiles=(0, 100)).to_case(image)
    assert not case.has_thickness and case.spacing[1:] == pytest.approx((0.5, 0.75))
    labels = np.zeros((1, *case.image.shape[1:]), np.uint8)
    labels[0, 4:9, 4:9] = 1
    written = case_to_volume(case, labels)
    for ending in (".nii.gz", ".mha", ".nrrd"):
        for side, array in (("pred", np.roll(written.array, 1, 0)), ("truth", written.array)):
            other = dataclasses.replace(written, array=array)
            write_volume(other, tmp_path / f"{side}{ending}")
        read = read_volume(tmp_path / f"truth{ending}", labels=True)
        assert read.has_spacing and not read.has_thickness
        sides = tmp_path / f"pred{ending}", tmp_path / f"truth{ending}"
        measured = measure(Job(Trio("a", *sides), None, {}, None, (1, 2), (2.0,)))
        for label in (1, 2):
            strict = measured.results["strict"][label]
            assert all(np.isnan(strict[name]) for name in ("volume_ml", "reference_ml"))
        assert measured.results["strict"][1]["hd"] == pytest.approx(0.75)


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nrrd"])
def test_labels_of_images_without_millimetres_have_none(ending, tmp_path):
    """Kind 3: the label map of a photograph, written in a format that always holds a spacing."""
    labels = np.ones((5, 4, 3), np.uint8)
    known = Volume(labels, np.eye(4))
    write_volume(known, tmp_path / f"known{ending}")
    write_volume(dataclasses.replace(known, has_spacing=False), tmp_path / f"photo{ending}")
    assert read_volume(tmp_path / f"known{ending}").has_spacing
    assert read_volume(tmp_path / f"known{ending}").has_thickness
    assert not read_volume(tmp_path / f"photo{ending}", labels=True).has_spacing


def test_nothing_is_said_in_ml_of_a_picture(tmp_path):
    """Kind 3: what predict records, what plan proposes, what the app shows."""
    from samlora.app.image import Image

    source = flat_source(tmp_path, "xray")
    image = read_volume(source)
    assert Image(image, "a").description()["has_thickness"] is False
    mask = np.zeros(image.array.shape, np.uint8)
    mask[2:8, 2:8] = 1
    for name in ("p0", "p1"):
        write_volume(image, tmp_path / f"set/images/{name}.nii.gz")
        write_volume(dataclasses.replace(image, array=mask), tmp_path / f"set/labels/{name}.nii.gz")
    made = plan(tmp_path / "set")
    assert [found.ml for found in made.classes] == [None]
    assert "ml per case" not in str(made) and "0.75 x 0.5 mm" in str(made)


@pytest.mark.parametrize("stated", ["nothing", "sizes", "unit", "place"])
def test_nifti_headers_that_nobody_has_filled_in_have_no_spacing(stated, tmp_path):
    """Kind 3: 1 x 1 x 1 without a unit and without a place."""
    import nibabel

    file = nibabel.Nifti1Image(np.zeros((4, 3, 2), np.uint8), None)
    if stated == "sizes":
        file.header.set_zooms((1, 1, 2))
    elif stated == "unit":
        file.header.set_xyzt_units("mm")
    elif stated == "place":
        file.set_sform(np.eye(4), 1)
    nibabel.save(file, tmp_path / "a.nii")
    assert read_volume(tmp_path / "a.nii").has_spacing == (stated != "nothing")


# --- 4: what is written is read back ---------------------------------------------------------------------------------

COLOURS = RNG.integers(0, 255, (24, 20, 3)).astype(np.uint8)
SOURCES = {
    "dx": ("DigitalXRayImageStorageForPresentation", STACK[0], {"Modality": "DX", "PixelSpacing": [0.2, 0.2]}),
    "mg": (
        "DigitalMammographyXRayImageStorageForPresentation",
        STACK[0],
        {"Modality": "MG", "ImagerPixelSpacing": [0.1, 0.1]},
    ),
    "cr": ("ComputedRadiographyImageStorage", STACK[0], {"Modality": "CR", "FrameOfReferenceUID": "1.2.1.9"}),
    "xa": ("XRayAngiographicImageStorage", STACK[0], {"Modality": "XA"}),
    "us": ("UltrasoundImageStorage", COLOURS, {"Modality": "US"}),
    "photo": ("VLPhotographicImageStorage", COLOURS, {"Modality": "XC"}),
    "screen": ("SecondaryCaptureImageStorage", COLOURS, {"Modality": "OT", "PixelSpacing": [0.3, 0.3]}),
    "slice": ("MRImageStorage", STACK[0], PLACE | {"ImagePositionPatient": [0, 0, 7], "Modality": "MR"}),
}


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
@pytest.mark.parametrize("name", SOURCES)
def test_segmentations_of_every_source_come_back(name, kind, tmp_path):
    """Kind 4 (A4): X-rays, photographs and captures have no place in space; the sizes decide where the labels lie.

    To the kind belong all classes of images, and all ways in which a segmentation is stored.
    """
    import highdicom

    storage, pixels, tags = SOURCES[name]
    source = save(tmp_path / name / "a.dcm", pixels, storage, **({"FrameOfReferenceUID": None} | tags)).parent
    image = read_volume(source)
    labels = segmented(image)
    path = tmp_path / "seg.dcm"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_dicom_seg(labels, source, path, ["a", "b"], kind=kind)
        other = highdicom.seg.segread(path)
        uid = pydicom.dcmread(source / "a.dcm", stop_before_pixels=True).SOPInstanceUID
        pixels = other.get_pixels_by_source_instance([uid], combine_segments=True)
    assert np.array_equal(pixels[0].T, labels.array[:, :, 0])
    (reference,) = pydicom.dcmread(path).ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert reference.ReferencedSOPClassUID == getattr(pydicom.uid, storage)
    read = read_volume(path, labels=True)
    assert np.array_equal(read.array, labels.array)
    assert read.has_spacing == (name == "slice")
    from samlora.data.sources import on_grid

    assert np.array_equal(on_grid(read, image).array, labels.array)


@pytest.mark.parametrize("heights", [UP, UP[::-1]])
def test_segmentations_of_frames_come_back(heights, tmp_path):
    """Kind 4: the frames of the segmentation lie on those frames of the source that it says, in either order."""
    source = enhanced(tmp_path / "scan" / "a.dcm", heights).parent
    labels = segmented(read_volume(source))
    write_dicom_seg(labels, source, tmp_path / "seg.dcm", ["a", "b"])
    assert np.array_equal(read_volume(tmp_path / "seg.dcm", labels=True).array, labels.array)
    data = pydicom.dcmread(tmp_path / "seg.dcm")
    ascending = heights == UP
    for groups, frame in zip(data.PerFrameFunctionalGroupsSequence, data.pixel_array):
        height = groups.PlanePositionSequence[0].ImagePositionPatient[2]
        source_item = groups.DerivationImageSequence[0].SourceImageSequence[0]
        assert heights[source_item.ReferencedFrameNumber - 1] == height
        number = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        assert np.array_equal(frame.T != 0, labels.array[:, :, UP.index(height)] == number)
    assert ascending or heights[0] == 109


@pytest.mark.parametrize("name", ["film", "legacy", "divided"])
def test_sources_that_no_segmentation_can_refer_to_are_named(name, tmp_path):
    """Kind 4: one line of our own, and no file, where the source has no frames to refer to."""
    path = tmp_path / name / "a.dcm"
    if name == "film":
        save(path, np.stack([COLOURS] * 3), "UltrasoundMultiFrameImageStorage", FrameOfReferenceUID=None)
    elif name == "legacy":
        save(path, STACK[:4], SpacingBetweenSlices=3, ImagePositionPatient=[0, 0, 0], **PLACE)
    else:
        parts = {"ConcatenationUID": "1.2.77"}
        enhanced(path, UP[:2], InConcatenationNumber=1, **parts)
        enhanced(path.with_name("b.dcm"), UP[2:], STACK[2:4], InConcatenationNumber=2, **parts)
    labels = segmented(read_volume(path.parent))
    with pytest.raises(NoSegmentationError, match="no DICOM segmentation can refer to it.*nii.gz"):
        write_dicom_seg(labels, path.parent, tmp_path / "seg.dcm", ["a", "b"])
    assert not (tmp_path / "seg.dcm").exists()


def test_a_segmentation_that_lost_labels_is_not_written(tmp_path, monkeypatch):
    """Kind 4: what is written is counted against what was given, before it takes its place."""
    import samlora.data.dicom_seg

    source = series(tmp_path / "ct")
    labels = segmented(read_volume(source))
    read = samlora.data.dicom_seg.read_dicom_seg

    def less(path):
        volume = read(path)
        return dataclasses.replace(volume, array=volume.array * (volume.array != 2))

    monkeypatch.setattr(samlora.data.dicom_seg, "read_dicom_seg", less)
    with pytest.raises(NoSegmentationError):
        write_dicom_seg(labels, source, tmp_path / "seg.dcm", ["a", "b"])
    assert not (tmp_path / "seg.dcm").exists()


# --- 5: labels that cover a part of the image ------------------------------------------------------------------------


def highdicom_seg(path, source, labels, omit=True, names=("liver",), kind="BINARY", **options):
    """A segmentation as highdicom writes it by default: without empty frames. labels: (slices, rows, columns)."""
    import highdicom
    from pydicom.sr.codedict import codes

    code = codes.SCT.AnatomicalStructure
    segments = [
        highdicom.seg.SegmentDescription(n, name, code, code, "MANUAL") for n, name in enumerate(names, start=1)
    ]
    data = [pydicom.dcmread(file) for file in list_series(source)[0].files]
    for one in data:
        one.SliceThickness = 3
        for key in ("PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime"):
            setattr(one, key, "")
    uids = highdicom.UID(), 9, highdicom.UID(), 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seg = highdicom.seg.Segmentation(
            data, labels, kind, segments, *uids, "m", "m", "1", "1", omit_empty_frames=omit, **options
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        seg.save_as(path)


SPARSE = {"block": (2, 3, 4, 5), "second": (1, 3, 5), "odd": (1, 3, 6), "one": (4,), "ends": (0, 7)}


@pytest.mark.parametrize("name", SPARSE)
def test_segmentations_without_empty_frames_fit_their_image(name, tmp_path):
    """Kind 5 (A5): frames left out before, after and between the others, as highdicom, dcmqi and Slicer write them."""
    source = series(tmp_path / "images" / "p0")
    labels = np.zeros(STACK.shape, np.uint8)
    labels[list(SPARSE[name]), 4:10, 3:9] = 1
    highdicom_seg(tmp_path / "labels" / "p0.dcm", source, labels)
    from samlora.data.folders import Pair
    from samlora.data.sources import read_label

    image = read_volume(source)
    recipe = Recipe("r", "ct", (-160, 240), orientation="LPS", classes=("liver",), label_values=((1,),))
    pair = Pair("p0", (source,), tmp_path / "labels" / "p0.dcm")
    label, _ = read_label(pair, image, recipe)
    assert np.array_equal(label.array, labels.T)
    assert np.array_equal(label.affine, image.affine)
    whole = dataclasses.replace(image, array=labels.T)
    sparse = read_volume(tmp_path / "labels" / "p0.dcm", labels=True)
    write_dicom_seg(whole, source, tmp_path / "all.dcm", ["liver"])
    ours = read_volume(tmp_path / "all.dcm", labels=True)
    for one, other in ((whole, sparse), (sparse, whole), (ours, sparse), (sparse, ours), (ours, whole)):
        first, second = common_grid(one, other)
        assert np.array_equal(first.array, second.array)
        assert first.array.sum() == labels.sum()
        if one is whole or other is whole:
            assert np.array_equal(first.array, labels.T)


def test_a_data_set_of_sparse_segmentations_is_planned_and_measured(tmp_path, capsys):
    labels = np.zeros(STACK.shape, np.uint8)
    labels[2:6, 4:10, 3:9] = 1
    for name in ("p0", "p1"):
        stack = np.full(STACK.shape, 924, np.uint16)
        stack[:, 0] = 24
        source = series(tmp_path / "set" / "images" / name, stack)
        highdicom_seg(tmp_path / "set" / "labels" / f"{name}.dcm", source, labels)
    assert main(["plan", str(tmp_path / "set"), "-o", str(tmp_path / "plan.yaml")]) == 0
    capsys.readouterr()
    write_volume(dataclasses.replace(read_volume(source), array=labels.T), tmp_path / "p1.nii.gz")
    both = [str(tmp_path / "p1.nii.gz"), str(tmp_path / "set" / "labels" / "p1.dcm")]
    for number, files in enumerate((both, both[::-1])):
        assert main(["evaluate", *files, "-o", str(tmp_path / f"e{number}")]) == 0
        assert "100.0" in capsys.readouterr().out


def _grid(shape=(20, 24, 8), directions=None):
    affine = np.array([[0.9, 0.1, 0, -3], [-0.1, 0.9, 0, 8], [0, 0, 2.5, 4], [0, 0, 0, 1.0]])
    return Volume(np.zeros(shape, np.int16), affine if directions is None else directions, path="image")


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR"])
@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_labels_of_a_part_are_padded_in_every_format(ending, axes, tmp_path):
    """Kind 5: a cropped label map, whole voxels away, in any orientation; not what lies between voxels or outside."""
    image = _grid()
    values = RNG.integers(0, 3, (6, 7, 3)).astype(np.uint8)
    corner = np.array([4, 9, 2])
    affine = image.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ corner
    write_volume(reorient(Volume(values, affine), axes), tmp_path / f"part{ending}")
    from samlora.data.sources import on_grid

    label = read_volume(tmp_path / f"part{ending}", labels=True)
    meant = np.zeros(image.array.shape, np.uint8)
    meant[4:10, 9:16, 2:5] = values
    assert np.array_equal(on_grid(label, image).array, meant)
    with pytest.raises(InputError, match="its grid"):
        match_grid(label, image)  # channels of an image are not padded
    for shift in ((0.5, 0, 0), (0, 0, 0.3), (15, 0, 0), (0, -10, 0)):
        moved = affine.copy()
        moved[:3, 3] += moved[:3, :3] @ shift
        with pytest.raises(InputError, match="its grid"):
            on_grid(Volume(values, moved, path="label"), image)
    for scale in ((2, 1, 1), (1, 1, 2), (1, 1, 0.5)):
        with pytest.raises(InputError, match="its grid"):
            on_grid(Volume(values, affine @ np.diag([*scale, 1]), path="label"), image)


def test_two_parts_are_compared_on_a_grid_that_holds_both():
    """Kind 5: two labels, each of which covers another part; labels that share no voxel are refused."""
    first, second = (np.ones((3, 3, 3), np.uint8) * n for n in (1, 2))
    low, high = Volume(first, np.eye(4)), Volume(second, np.eye(4))
    high.affine = np.eye(4)
    high.affine[:3, 3] = (1, 2, -1)
    for one, other in ((low, high), (high, low)):
        a, b = common_grid(one, other)
        assert a.array.shape == b.array.shape == (4, 5, 4)
        assert np.array_equal(a.affine, b.affine)
        assert (a.array != 0).sum() == (b.array != 0).sum() == 27
        assert ((a.array != 0) & (b.array != 0)).sum() == 4
    far = dataclasses.replace(high, affine=np.eye(4) + 9 * np.eye(4, k=3))
    with pytest.raises(InputError, match="its grid"):
        common_grid(low, far)


# --- 6 and 7: several masks in a file, and files of other kinds ------------------------------------------------------


def test_overlapping_segments_name_themselves(tmp_path):
    """Kind 6/7 (A7): a file of several masks that overlap, or of fractions, is no label map; the line says how."""
    source = series(tmp_path / "ct")
    masks = np.zeros((*STACK.shape, 2), np.uint8)
    masks[2:5, 4:10, 4:10, 0] = masks[3:6, 6:12, 6:12, 1] = 1
    highdicom_seg(tmp_path / "seg.dcm", source, masks, names=("liver", "tumour"))
    text = refused(tmp_path / "seg.dcm", "overlap .*one file per segment", labels=True)
    assert "'liver' and 'tumour'" in text
    soft = masks[..., 0] * 0.4
    highdicom_seg(tmp_path / "soft.dcm", source, soft, kind="FRACTIONAL", fractional_type="PROBABILITY")
    refused(tmp_path / "soft.dcm", "fractions.*BINARY", labels=True)
    apart = masks * 0
    apart[2, 4:10, 4:10, 0] = apart[2, 12:, 12:, 1] = 1
    highdicom_seg(tmp_path / "apart.dcm", source, apart, names=("liver", "tumour"))
    read = read_volume(tmp_path / "apart.dcm", labels=True)
    assert np.unique(read.array).tolist() == [0, 1, 2]


def other_object(path, kind, **tags) -> Path:
    """A DICOM object without pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = Dataset()
    data.SOPClassUID = getattr(pydicom.uid, kind, kind)
    data.SOPInstanceUID = pydicom.uid.generate_uid()
    data.Modality, data.SeriesInstanceUID = "OT", "1.2.1.5"
    for key, value in tags.items():
        setattr(data, key, value)
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.save_as(path, enforce_file_format=True)
    return path


OTHERS = {
    "DICOMDIR": "MediaStorageDirectoryStorage",
    "report": "BasicTextSRStorage",
    "state.dcm": "GrayscaleSoftcopyPresentationStateStorage",
    "key": "KeyObjectSelectionDocumentStorage",
    "raw": "RawDataStorage",
    "contours.dcm": "RTStructureSetStorage",
    "spectra": "MRSpectroscopyStorage",
    "private": "1.3.12.2.1107.5.9.1",
    "map.dcm": FLOAT,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_objects_hide_and_block_nothing(name, tmp_path):
    """Kind 7 (A8): directories, reports, presentation states, key objects, raw data, contours, spectra.

    Above folders of slices they hide none; beside slices they are passed over; alone they are named.
    """
    series(tmp_path / "disc" / "STUDY" / "SERIES", STACK[:4])
    other_object(tmp_path / "disc" / name, OTHERS[name])
    (pair,) = find_images(tmp_path / "disc")
    assert pair.images == (tmp_path / "disc" / "STUDY" / "SERIES",)
    other_object(tmp_path / "disc" / "STUDY" / "SERIES" / name, OTHERS[name])
    (pair,) = find_images(tmp_path / "disc")
    assert read_volume(pair.images[0]).array.shape == (20, 24, 4)
    other_object(tmp_path / "alone" / name, OTHERS[name])
    called = pydicom.uid.UID(getattr(pydicom.uid, OTHERS[name], OTHERS[name])).name
    text = refused(tmp_path / "alone", "no DICOM series in this folder")
    assert called in text
    assert called in refused(tmp_path / "alone" / name, "no DICOM image|unknown kind") or "." not in name


def test_discs_are_searched_down_to_their_series(tmp_path):
    """Kind 7: DICOM/PATIENT/STUDY/SERIES below a DICOMDIR, where studies and series of all patients are named alike."""
    other_object(tmp_path / "disc" / "DICOMDIR", OTHERS["DICOMDIR"])
    for patient in ("PA0", "PA1"):
        series(tmp_path / "disc" / "DICOM" / patient / "ST0" / "SE0", STACK[:3])
        other_object(tmp_path / "disc" / "DICOM" / patient / "ST0" / "SE0" / "report", "BasicTextSRStorage")
        series(tmp_path / "disc" / "DICOM" / patient / "ST0" / "SE1", STACK[:4])
    pairs = find_images(tmp_path / "disc")
    assert [pair.name for pair in pairs] == ["PA0_ST0_SE0", "PA0_ST0_SE1", "PA1_ST0_SE0", "PA1_ST0_SE1"]


def test_cases_may_have_their_slices_deeper(tmp_path):
    """Kind 7: images/CASE/STUDY/SERIES with a directory file in every folder, as archives export them."""
    from samlora.data.layouts import find_pairs

    for case in ("p0", "p1"):
        source = series(tmp_path / "images" / case / "ST" / "SE", STACK[:4])
        other_object(tmp_path / "images" / case / "DIRFILE", OTHERS["DICOMDIR"])
        image = read_volume(source)
        (tmp_path / "labels").mkdir(exist_ok=True)
        write_volume(segmented(image), tmp_path / "labels" / f"{case}.nii.gz")
    pairs = find_pairs(tmp_path).pairs
    assert [pair.name for pair in pairs] == ["p0", "p1"]
    assert pairs[0].images == (tmp_path / "images" / "p0" / "ST" / "SE",)


def test_many_reports_hide_no_slices(tmp_path):
    """Kind 7: however many files of other kinds come first; a folder with slices of its own and folders in it."""
    for number in range(25):
        other_object(tmp_path / "disc" / f"A{number:02}", "BasicTextSRStorage")
    series(tmp_path / "disc", STACK[:3])
    series(tmp_path / "disc" / "more", STACK[:4], SeriesInstanceUID="1.2.1.2")
    pairs = find_images(tmp_path / "disc")
    assert sorted(read_volume(pair.images[0]).array.shape[2] for pair in pairs) == [3, 4]


@pytest.mark.parametrize("ending", ["", ".dcm"])
def test_pictures_beside_slices_hide_no_series(ending, tmp_path):
    """Kind 7: a preview or a label beside slices; the slices stay one image."""
    for number in range(3):
        tags = PLACE | {"ImagePositionPatient": [0, 0, 3 * number]}
        save(tmp_path / "in" / f"IM{number}{ending}", STACK[number], **tags)
    write_volume(Volume(COLOURS.transpose(1, 0, 2)[:, :, None], np.eye(4)), tmp_path / "in" / "preview.png")
    write_volume(_grid(), tmp_path / "in" / "seg.nii.gz")
    pairs = find_images(tmp_path / "in")
    assert sorted(pair.images[0].name for pair in pairs) == ["in", "preview.png"]
    assert read_volume(tmp_path / "in").array.shape == (20, 24, 3)


def test_one_broken_series_does_not_block_the_others(tmp_path):
    """Kind 7: a folder that cannot be read is an input that fails, and a dose is nothing to choose beside a scan."""
    series(tmp_path / "in" / "good")
    tags = {"Modality": "RTDOSE", "SeriesInstanceUID": "1.2.1.6", "GridFrameOffsetVector": [0, 3, 6]}
    place = PLACE | {"ImagePositionPatient": [0, 0, 0]}
    save(tmp_path / "in" / "good" / "dose.dcm", STACK[:3], "RTDoseStorage", **tags, **place)
    series(tmp_path / "in" / "bad")
    file = tmp_path / "in" / "bad" / "IM3"
    file.write_bytes(file.read_bytes()[:600])
    pairs = find_images(tmp_path / "in")
    assert [pair.name for pair in pairs] == ["bad", "good"]
    assert read_volume(pairs[1].images[0]).array.shape == (20, 24, 8)
    refused(pairs[0].images[0], "IM3: cannot be read as DICOM.*dcm2niix")


# --- 10: two decoders, one advice, and silence -----------------------------------------------------------------------


def run_length(path, pixels, colours) -> Path:
    """The pixels as RLE Lossless: for each colour the bytes from high to low, here in literal runs."""
    planes = pixels.reshape(-1, 3).T if colours else pixels.reshape(1, -1)
    segments = []
    for plane in planes:
        for byte in range(pixels.itemsize)[::-1]:
            part = plane.astype(np.uint64) >> (8 * byte) & 255
            content = part.astype(np.uint8).tobytes()
            runs = [content[n : n + 128] for n in range(0, len(content), 128)]
            segment = b"".join(bytes((len(run) - 1,)) + run for run in runs)
            segments.append(segment + bytes(len(segment) % 2))
    starts = np.cumsum([64, *map(len, segments)])[:-1]
    head = np.zeros(16, "<u4")
    head[: len(starts) + 1] = [len(starts), *starts]
    data = pydicom.dcmread(save(path, pixels, "SecondaryCaptureImageStorage", Modality="OT"))
    data.PixelData = pydicom.encaps.encapsulate([head.tobytes() + b"".join(segments)])
    data["PixelData"].VR = "OB"
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = pydicom.uid.RLELossless
    data.save_as(path)
    return path


DEEP = RNG.integers(0, 65535, (24, 20, 3)).astype(np.uint16)
LONG = RNG.integers(0, 2**32 - 1, (24, 20)).astype(np.uint32)


@pytest.mark.parametrize("pixels", [DEEP, DEEP.astype(np.uint32) * 65521, LONG], ids=["rgb16", "rgb32", "gray32"])
def test_values_that_one_decoder_gets_wrong(pixels, tmp_path):
    """Kind 10 (A14): RLE of deep colours, 32 bits, big endian of 32 bits. A second decoder is asked where there is one.

    To the kind belong bits that do not end at BitsStored, modality tables, scales of each frame.
    """
    path = save(tmp_path / "deep.dcm", pixels, "SecondaryCaptureImageStorage", Modality="OT")
    meant = pixels.swapaxes(0, 1)
    assert np.array_equal(read_volume(path).array[:, :, 0], meant)
    run_length(path, pixels, pixels.ndim == 3)
    assert np.array_equal(read_volume(path).array[:, :, 0], meant)


def test_big_endian_and_shifted_values(tmp_path):
    """Kind 10: big endian of 16 and 32 bits; values in the upper bits; a table instead of a slope."""
    for dtype in (np.uint16, np.uint32):
        pixels = RNG.integers(0, np.iinfo(dtype).max, (24, 20)).astype(dtype)
        swapped = pixels.astype(pixels.dtype.newbyteorder(">"))
        save(tmp_path / "big.dcm", swapped, syntax=pydicom.uid.ExplicitVRBigEndian)
        assert np.array_equal(read_volume(tmp_path / "big.dcm").array[:, :, 0], pixels.T)
    high = (STACK[0] << 4).astype(np.uint16)
    save(tmp_path / "high.dcm", high, BitsStored=12, HighBit=15)
    assert np.array_equal(read_volume(tmp_path / "high.dcm").array[:, :, 0], STACK[0].T)
    gray = (STACK[0] >> 3).astype(np.uint8)
    table = np.arange(256, dtype="<u2")[::-1] * 3
    lut = item(LUTDescriptor=[256, 0, 16], LUTData=table.tobytes(), ModalityLUTType="US")
    save(tmp_path / "table.dcm", gray, "ComputedRadiographyImageStorage", Modality="CR", ModalityLUTSequence=lut)
    assert np.array_equal(read_volume(tmp_path / "table.dcm").array[:, :, 0], table[gray].T)


COMPRESSED = {
    "MR_small_jp2klossless.dcm": "JPEG 2000",
    "JPEG2000.dcm": "JPEG 2000, lossy",
    "SC_rgb_gdcm_KY.dcm": "JPEG 2000, colours",
    "MR_small_jpeg_ls_lossless.dcm": "JPEG-LS",
    "JPEGLSNearLossless_16.dcm": "JPEG-LS, near-lossless",
}


@pytest.mark.parametrize("wrong", ["swapped bytes", "sign", "none"])
@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_values_are_those_of_a_second_decoder(name, wrong, tmp_path, monkeypatch):
    """Kind 10: JPEG-LS and JPEG 2000, which pydicom decodes with further libraries.

    To the kind belong lossy and near-lossless forms, colours, files of several frames, of which one
    is compared. Where decoders differ nothing says which is right: the file is refused.
    """
    pytest.importorskip("jpeg_ls" if "LS" in COMPRESSED[name] else "PIL")
    path = pydicom.data.get_testdata_file(name, download=False)
    if path is None:
        pytest.skip("this pydicom does not ship the file")
    decode = dicom_pixels._by_gdcm

    def errs(header):
        array = decode(header)
        if wrong == "swapped bytes":
            return array.byteswap() if array.itemsize > 1 else array[..., ::-1]  # colours
        return -array.astype(np.int32) if wrong == "sign" else array

    monkeypatch.setattr(dicom_pixels, "_by_gdcm", errs)
    if wrong == "none":
        assert read_volume(path).array.any()
    else:
        with pytest.raises(InputError, match="GDCM and pydicom decode transfer syntax .*; save the file"):
            read_volume(path)
    monkeypatch.setattr(dicom_pixels, "has_pydicom", lambda: False)
    assert read_volume(path).array.any()  # a second decoder is no condition


def test_without_a_second_decoder_the_line_says_what_is_needed(tmp_path, monkeypatch):
    path = run_length(tmp_path / "deep.dcm", DEEP, True)
    plain = save(tmp_path / "plain.dcm", STACK[0])
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    refused(path, r"16 bits per value .* pip install 'samlora\[dicom\]'")
    assert read_volume(plain).array.shape == (20, 24, 1)


def test_damage_is_said_in_one_way_at_every_stage(tmp_path):
    """Kind 10 (A15): at the head, in the pixels, in the description of frames, in a segmentation: one advice."""
    jpeg = pydicom.data.get_testdata_file("JPEG2000.dcm", download=False)
    if jpeg is not None:
        content = Path(jpeg).read_bytes()
        (tmp_path / "cut.dcm").write_bytes(content[: len(content) // 2])
        refused(tmp_path / "cut.dcm", "cannot be read as DICOM.*copy it again, or convert it with dcm2niix")
    refused(save(tmp_path / "few.dcm", STACK[:4], NumberOfFrames=5), "cannot be read as DICOM.*copy it again")
    path = save(tmp_path / "syntax.dcm", STACK[0])
    path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.9.9.9\0"))
    refused(path, "cannot be read as DICOM.*copy it again")
    path = enhanced(tmp_path / "bare.dcm", UP)
    data = pydicom.dcmread(path)
    del data.PerFrameFunctionalGroupsSequence, data.SharedFunctionalGroupsSequence
    data.save_as(path)
    refused(path, "does not describe its frames.*dcm2niix")
    source = series(tmp_path / "ct")
    write_dicom_seg(segmented(read_volume(source)), source, tmp_path / "seg.dcm", ["a", "b"])
    (tmp_path / "seg.dcm").write_bytes((tmp_path / "seg.dcm").read_bytes()[:-900])
    refused(tmp_path / "seg.dcm", "cannot be read as DICOM segmentation.*export it again", labels=True)


def test_messages_of_libraries_lose_what_only_their_authors_can_use(tmp_path):
    """Kind 10 (A15): addresses, build paths and objects, at reading and at writing."""
    from samlora.data.opening import reading, writing

    file = tmp_path / "a.nrrd"
    file.write_text("x")
    build = "Exception thrown in SimpleITK ImageFileReader_Execute: /tmp/build/ITK/gdcmImageCodec.cxx:382 (): "
    for text, kept in (
        (build + "An invalid logic behavior occurred", "An invalid logic behavior occurred"),
        ("x ITK ERROR: GDCMImageIO(0x55d29b3743e0): Failed to read", "Failed to read"),
        ("cannot identify <_io.BufferedReader name='/a/b.tif'>", "cannot identify"),
        ("far too long " * 40, "far too long far .*"),
    ):
        with pytest.raises(InputError, match=rf"cannot be read as NRRD \({kept}\)$"):
            with reading(file, "NRRD"):
                raise RuntimeError(text)
        with pytest.raises(InputError, match=rf"cannot be written \({kept}\); choose"):
            with writing(file):
                raise RuntimeError(text)


def _test_files() -> list[str]:
    """The files of pydicom's own tests that its package ships."""
    root = Path(pydicom.data.__file__).parent / "test_files"
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.suffix != ".py")


# pydicom decodes these lossy or palette files into something else on purpose, or only with further libraries.
_APART = ("examples_palette.dcm", "badVR.dcm")
# GDCM takes doses of one frame for no images.
_REFUSED = ("rtdose_1frame.dcm", "rtdose_expb_1frame.dcm", "rtdose_rle_1frame.dcm")


@pytest.mark.parametrize("name", _test_files())
def test_pydicoms_own_files_decode_alike_or_are_refused_in_one_line(name, tmp_path, capfd):
    """Kind 10: nothing is printed by the libraries either."""
    root = Path(pydicom.data.__file__).parent / "test_files"
    path = root / name
    if not path.name.lower().endswith(".dcm") and "dicomdirtests" not in name:
        pytest.skip("is no DICOM file")
    try:
        read = read_volume(path)
    except InputError as error:
        assert "\n" not in str(error)
        text = str(error).replace(str(path), "")
        assert not any(word in text for word in ("0x", "ITK", "Traceback", "/tmp/"))
        read = None
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""
    if path.name in _APART:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = pydicom.dcmread(path, force=True)
        try:
            values = data.pixel_array.astype(np.float64)
        except Exception:  # a decoder that pydicom lacks
            return
    assert (read is None) == (path.name in _REFUSED)
    if read is None:
        return
    if data.PhotometricInterpretation == "MONOCHROME1":
        values = 2**data.BitsStored - 1 - values
    if data.SOPClassUID not in pydicom.uid.RTDoseStorage:
        values = values * float(data.get("RescaleSlope", 1)) + float(data.get("RescaleIntercept", 0))
    colours = [3] if data.SamplesPerPixel == 3 else []
    values = values.reshape(-1, data.Rows, data.Columns, *colours)
    np.testing.assert_allclose(read.array.transpose(2, 1, 0, *range(3, read.array.ndim)), values, rtol=1e-6, atol=1e-6)


# --- 2: results of several files -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    torch.manual_seed(0)
    two = {"classes": ("x", "y"), "label_values": ((1,), (2,))}
    recipe = Recipe("i", "image", channels="rgb", **two)
    model = samlora.build_model(variant="vit_ti", image_size=64, num_classes=2, recipe=recipe.to_dict())
    path = tmp_path_factory.mktemp("adapter") / "rgb.safetensors"
    samlora.save_adapter(model, path)
    return path


def predict(source, out, adapter, *words) -> int:
    return main(["predict", str(source), "-o", str(out), "--adapter", str(adapter), "--device", "cpu", *words])


def film(path) -> Path:
    clip = np.stack([np.roll(COLOURS, n, axis=0) for n in range(2)])
    return save(path, clip, "UltrasoundMultiFrameImageStorage", Modality="US", FrameOfReferenceUID=None)


def test_what_cannot_be_written_is_named_and_blocks_nothing(adapter, tmp_path, capsys):
    """Kind 2 (A2): the label map counts, the segmentation is said to be impossible, the next run goes on.

    To the kind belong results whose last file fails for another reason, and runs that end between two files.
    """
    film(tmp_path / "in" / "p1" / "clip.dcm")
    out = tmp_path / "out"
    assert predict(tmp_path / "in", out, adapter) == 0
    text = capsys.readouterr().out
    assert "p1: 2 slices" in text
    assert "without dicom_seg/p1.dcm: " in text
    record = json.loads((out / "cases" / "p1.json").read_text())
    assert record["files"] == ["p1.nii.gz"]
    assert list(record["not_written"]) == ["dicom_seg/p1.dcm"]
    save(tmp_path / "in" / "p2" / "photo.dcm", COLOURS, "VLPhotographicImageStorage", FrameOfReferenceUID=None)
    before = (out / "p1.nii.gz").stat().st_mtime_ns
    assert predict(tmp_path / "in", out, adapter) == 0
    assert "p1: is there already" in capsys.readouterr().out
    assert (out / "p1.nii.gz").stat().st_mtime_ns == before
    assert (out / "p2.nii.gz").is_file()
    assert np.array_equal(
        read_volume(out / "dicom_seg" / "p2.dcm", labels=True).array, read_volume(out / "p2.nii.gz").array
    )
    assert predict(tmp_path / "in" / "p1", tmp_path / "seg", adapter, "--format", "dicom-seg") == 2
    assert "no DICOM segmentation can refer to it" in capsys.readouterr().err
    assert not list((tmp_path / "seg").glob("*.dcm"))


@pytest.mark.parametrize("failing", ["_draw", "write_dicom_seg"])
def test_a_run_that_ended_between_two_files_is_finished(failing, adapter, tmp_path, monkeypatch, capsys):
    """Kind 2: an overlay that fails (a full disk), a segmentation during which the run was killed."""
    import samlora.inference.predict as module

    save(tmp_path / "in" / "p1" / "photo.dcm", COLOURS, "VLPhotographicImageStorage", FrameOfReferenceUID=None)
    out = tmp_path / "out"
    error = InputError("no space left") if failing == "_draw" else KeyboardInterrupt()

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(module, failing, fail)
    words = ["--overlay", "png"]
    assert predict(tmp_path / "in", out, adapter, *words) == (2 if failing == "_draw" else 130)
    assert (out / "p1.nii.gz").is_file()
    monkeypatch.undo()
    capsys.readouterr()
    assert predict(tmp_path / "in", out, adapter, *words) == 0
    assert "p1: 1 slices" in capsys.readouterr().out
    assert (out / "dicom_seg" / "p1.dcm").is_file()
    assert os.listdir(out / "overlays")
    # Another set of options is still not taken for the same.
    assert predict(tmp_path / "in", out, adapter) == 2
    assert "--overwrite" in capsys.readouterr().err
