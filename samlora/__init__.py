"""samlora: adapt Segment Anything to medical images with small trained parts."""

import importlib

_PUBLIC = {
    "InputError": "samlora.errors",
    "MissingFileError": "samlora.errors",
    "LoRA_qkv": "samlora.model.lora",
    "LoRA_sam": "samlora.model.lora",
    "merge": "samlora.model.lora",
    "unmerge": "samlora.model.lora",
    "build_model": "samlora.model.build",
    "load_model": "samlora.model.build",
    "save_adapter": "samlora.model.checkpoint",
    "predict_volume": "samlora.inference.predict",
    "Predictor": "samlora.inference.predictor",
    "Samprocessor": "samlora.training.processor",
    "DatasetSegmentation": "samlora.training.processor",
    "evaluate": "samlora.evaluation.metrics",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    # torch and its friends take seconds to import: each public name is fetched when it is first used.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'samlora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
