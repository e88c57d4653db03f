"WeCLIP: train a segmenter from image tags on a frozen CLIP."
__version__ = "0.2.0"

import importlib

_FRONT = {  # name -> where it is defined
    "register": "method.seams.register",
    "predict": "use.segmentation.predict",
    "Segmentation": "use.segmentation.Segmentation",
    "from_pretrained": "use.hub.from_pretrained",
    "load_model": "engine.weights.load_model",
    "load_released": "engine.weights.load_released",
    "load_released_plus": "beyond.plus.load_released_plus",
    "build": "engine.weights.build",
    "train": "engine.train.train",
    "evaluate": "engine.infer.evaluate",
    "dense_crf": "engine.infer.dense_crf",
    "open_data": "data.voc.open_data",
    "open_images": "data.own.open_images",
    "preprocess": "data.pictures.preprocess",
    "read_image": "data.pictures.read_image",
    "read_mask": "data.pictures.read_mask",
    "Config": "method.config.Config",
    "preset": "method.config.preset",
    "WeCLIP": "method.model.WeCLIP"}
__all__ = list(_FRONT)

def __getattr__(name):
    "The names in front are imported when first used: `import weclip` alone loads neither PyTorch nor CLIP."
    if name not in _FRONT: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _FRONT[name].rsplit(".", 1)
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)

def __dir__(): return sorted({*globals(), *_FRONT})
