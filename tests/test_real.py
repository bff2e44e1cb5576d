"""The main job on real CT: one patient to learn from, another to test on."""

import importlib.util
from pathlib import Path

import nibabel
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def real_ct():
    spec = importlib.util.spec_from_file_location("real_ct", ROOT / "benchmarks" / "real_ct.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")  # the scripts import each other
        spec.loader.exec_module(module)
    return module


@pytest.mark.real
@pytest.mark.slow
def test_one_patient_to_another(real_data, real_ct, tmp_path):
    """As benchmarks/results/real_ct.json records it for LiteMedSAM, with the smallest base and few steps."""
    data = real_ct.prepare_patients(real_data, tmp_path)
    assert len(list((data / "train_npz").glob("first_slice*.npz"))) == 51
    changes = {"system": "samed", "vit_name": "vit_ti", "lora_layers": (), "augment": "samed", "precision": "fp32"}
    result = real_ct.adapt(data, tmp_path, changes, steps=50)
    prediction = nibabel.load(tmp_path / "result" / "predictions" / "second_pred.nii.gz")
    source = nibabel.load(real_data / "dicom_ct" / "example_seg_dicom.nii.gz")
    assert prediction.shape == source.shape == (512, 512, 20) and prediction.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(prediction.affine, source.affine)
    for code in ("qform_code", "sform_code"):
        assert prediction.header[code] == source.header[code]
    found, truth = np.asanyarray(prediction.dataobj) == 5, np.asanyarray(source.dataobj) == 5
    # In the other patient, and in the right place: a mirrored or shifted result would not overlap.
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.5
    assert result["dice"]["liver"] > 0.5
