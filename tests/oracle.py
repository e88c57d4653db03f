"""Where the outputs of the authors' code lie, and the seeded weights they were computed with."""
import functools, importlib.util, os
from pathlib import Path

import numpy as np, pytest, torch

ORACLE = Path(os.environ.get("WECLIP_ORACLE", Path(__file__).resolve().parents[2]/"shared"/"oracle"))
MISSING = f"no outputs of the authors' code at {ORACLE} (set WECLIP_ORACLE)"
needs_oracle = pytest.mark.skipif(not ORACLE.is_dir(), reason=MISSING)
PLUS = ORACLE.with_name("oracle_plus")  # of the method's successors
needs_plus = pytest.mark.skipif(not PLUS.is_dir(), reason=f"no outputs of the successors' code at {PLUS}")

@functools.lru_cache
def load(name, folder=ORACLE):
    "Arrays of `name`.npz as tensors, by key (strings stay NumPy)."
    z = np.load(folder/f"{name}.npz", allow_pickle=False)
    return {k: torch.from_numpy(np.asarray(z[k])) if z[k].dtype.kind in "fiub" else z[k] for k in z.files}

@functools.lru_cache
def recipe():
    spec = importlib.util.spec_from_file_location("weights_recipe", ORACLE/"weights_recipe.py")
    mod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mod)
    return mod

@functools.lru_cache
def clip_weights():
    "CLIP ViT-B/16 in OpenAI's key names, float32."
    return recipe().make_clip_state_dict()

@functools.lru_cache
def decoder_weights():
    "The VOC decoder in the authors' key names."
    return recipe().make_decoder_state_dict(21)

def close(ours, theirs, atol, rtol=0):
    torch.testing.assert_close(ours.double(), theirs.double(), atol=atol, rtol=rtol, check_dtype=False)
