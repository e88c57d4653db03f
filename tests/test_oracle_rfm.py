"""The refining module against the outputs of the authors' code, as far as stored arrays reach without the encoder."""
import pytest, torch

from oracle import close, load, needs_oracle
from weclip.method.batch import group
from weclip.method.rfm import (
    affinity_map, bounding_boxes, box_mask, disagreement, gate, refine_cam, refining_map, sinkhorn, transition)

pytestmark = needs_oracle
IMG_IDX = torch.tensor([0,1,1,2,2,2,3])  # class sets [9], [6,20], [1,11,20], [11]
PHASES = pytest.mark.parametrize("phase", ["rfm_pre", "rfm_post"])
SMALL = pytest.mark.parametrize("thr,key", [(.4,"4"), (.7,"7")])

def our_boxes(cam, thr):
    "Set of (x0, y0, x1, y1) of one map's regions, ends cut as released."
    h, w = cam.shape
    grey = (cam*255).floor()[None]
    y0, y1, x0, x1 = (v[0] for v in bounding_boxes(grey > int(thr*int(grey.max()))))
    box = torch.stack([x0, y0, x1.clamp(max=w-1), y1.clamp(max=h-1)], 1)[y1 > 0]
    return set(map(tuple, box.tolist()))

def small_maps(): return [k[5:] for k in load("boxes_small") if k.startswith("map__")]

@SMALL
def test_box_masks(thr, key):
    z = load("boxes_small")
    names = small_maps()
    assert len(names) == 20
    for size in {z[f"map__{n}"].shape for n in names}:
        same = [n for n in names if z[f"map__{n}"].shape == size]
        for n, m in zip(same, box_mask(torch.stack([z[f"map__{n}"] for n in same]), thr)):
            assert torch.equal(m, z[f"mask{key}__{n}"].bool()), n

@SMALL
def test_boxes(thr, key):
    "Ours are among theirs; what they have more are contours of holes, inside one of ours, or the all-zero map's dummy."
    z = load("boxes_small")
    for n in small_maps():
        ours = our_boxes(z[f"map__{n}"], thr)
        theirs = set(map(tuple, z[f"box{key}__{n}"].tolist())) - {(0,0,0,0)}
        assert ours <= theirs, n
        for x0, y0, x1, y1 in theirs - ours:
            assert any(a <= x0 and b <= y0 and x1 <= c and y1 <= d for a, b, c, d in ours), n

def test_integer_threshold():
    "The bound is int(thr*max) in double precision at every grey level: a patch at it is out, one level above is in."
    for thr in (.4, .7):
        top = torch.arange(2, 256.)
        bound = torch.tensor([float(int(thr*i)) for i in range(2, 256)])
        cam = torch.zeros(254, 1, 7)
        cam[:,0,0] = top
        cam[:,0,2] = bound
        cam[:,0,4] = bound + 1
        got = box_mask((cam + .5)/255, thr, open_border=False)[:,0]
        assert not got[:,2].any() and got[:,4].all()

def test_boxes_of_cams():
    z = load("cam_train")
    assert torch.equal(box_mask(z["gray"]), z["box_mask"].bool())
    for cam, box, n in zip(z["gray"], z["boxes"], z["nbox"]):
        assert our_boxes(cam, .4) <= set(map(tuple, box[:n].tolist()))
    v = load("val_375x500")
    assert torch.equal(box_mask(v["gray"]), v["box_mask"].bool())

def test_affinity():
    z = load("decoder_train")
    aff = affinity_map(z["F_u"])
    close(aff[:2], z["A_f"], atol=1e-5)
    close(aff[:,::16], z["A_f_rows"], atol=1e-5)

def test_filter():
    "S from the stored masses of the attention maps; theirs is a float32 sum of 1.6e5 numbers."
    aff = affinity_map(load("decoder_train")["F_u"])
    mass = load("encoder_train")["attn_mass"][-6:].T
    z = load("rfm_post")
    maps = (mass.double()/160000)[...,None,None].expand(4,6,400,400)  # constant maps of the same mass
    s = disagreement(aff, maps)
    close(s, z["S"], atol=.1)
    close(s.mean(1), z["S_thr"], atol=.1)
    assert torch.equal(gate(s), z["G"].bool())
    assert torch.equal(gate(z["S"]), z["G"].bool())
    v = load("val_375x500")
    assert torch.equal(gate(v["S"][None])[0], v["G"].bool())

def test_refining_map_of_image_1():
    "All maps of image 1 are stored, in half precision, and every 16th row of its R."
    attn = load("encoder_train")["attn_img1_f16"][None,:,1:,1:].float()
    aff = load("decoder_train")["A_f"][1:]
    rows = load("rfm_post")["R_rows"][1:2]
    for signed in (True, False):
        assert torch.equal(gate(disagreement(aff, attn[:,-6:], signed))[0], load("rfm_post")["G"][1].bool())
        close(refining_map(attn, aff, n_dynamic=6, signed=signed)[:,::16], rows, atol=2e-5)
    close(refining_map(attn, aff, dynamic=False, n_static=8)[:,::16], load("rfm_pre")["R_rows"][1:2], atol=2e-5)

@pytest.mark.parametrize("alpha", [1, 2])
def test_transition_small(alpha):
    z = load("transmat_small")
    close(sinkhorn(z["A"][None])[0], z["S3"], atol=1e-6)
    want = z["T"] if alpha == 2 else (z["S3"] + z["S3"].T)/2
    close(transition(z["A"][None], alpha=alpha)[0], want, atol=1e-6)

@PHASES
def test_transition(phase):
    z = load(phase)
    close(sinkhorn(z["R"])[0], z["Sinkhorn3_img0"], atol=1e-6)
    t = transition(z["R"])
    close(t, z["T"], atol=1e-6)
    close(t[:,::16], z["T_rows"][[0,3]], atol=1e-6)

@PHASES
def test_refined(phase):
    "Images 0 and 3 have their T stored in full; the pairs between them get a dummy."
    z = load(phase)
    c = load("cam_train")
    trans = torch.stack([z["T"][0], torch.eye(400), torch.eye(400), z["T"][1]])
    ours = refine_cam(c["gray"], trans, c["box_mask"].bool(), IMG_IDX)
    close(ours[[0,6]], z["refined"][[0,6]], atol=1e-5)
    assert torch.equal(ours, refine_cam(c["gray"], trans, c["box_mask"].bool(), IMG_IDX, k=3))

@PHASES
def test_refined_rows(phase):
    "Every 16th row of T is stored for all images, which gives every 16th patch of all seven refined CAMs."
    z = load(phase)
    c = load("cam_train")
    m = group((c["gray"]*c["box_mask"]).flatten(1), IMG_IDX, 4)                # (4,3,400)
    ours = (z["T_rows"] @ m.mT).mT                                             # (4,3,25)
    close(torch.cat([ours[0,:1], ours[1,:2], ours[2], ours[3,:1]]), z["refined"].flatten(1)[:,::16], atol=1e-5)
