"WeCLIP: train a segmenter from image tags on a frozen CLIP."
__version__ = "0.1.0"

import importlib

_FRONT = dict(predict="segmentation.segment", Segmentation="segmentation.Segmentation", load_model="model.load_model")  # name -> where it is defined
__all__ = list(_FRONT)

def __getattr__(name):
    "The names in front are imported when first used: `import weclip` alone loads neither PyTorch nor CLIP."
    if name not in _FRONT: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _FRONT[name].split(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)

def __dir__(): return sorted({*globals(), *_FRONT})
