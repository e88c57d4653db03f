"""PAR and pseudo labels against the outputs of the authors' code."""
import pytest, torch, torch.nn.functional as F

from oracle import close, load, needs_oracle
from weclip.method.batch import group
from weclip.method.par import par, pseudo_labels, upsample_cam, winner, with_background

pytestmark = needs_oracle
MEAN = torch.tensor([123.675,116.28,103.53])
STD = torch.tensor([58.395,57.12,57.375])
IMG_IDX = torch.tensor([0,1,1,2,2,2,3])  # class sets [9], [6,20], [1,11,20], [11]

def normalised(rgb): return ((rgb.float() - MEAN)/STD).movedim(-1, 1)

SMALL = [("out", "img", "mask", 20), ("out_1iter", "img", "mask", 1), ("out_resized", "img", "mask2", 20),
         ("out_const", "img_const", "mask", 20)]

@pytest.mark.parametrize("out,img,mask,iters", SMALL)
def test_par(out, img, mask, iters):
    z = load("par_small")
    close(par(z[img], z[mask], iters), z[out], atol=3e-6)

def test_par_in_a_batch():
    z = load("par_small")
    both = par(torch.cat([z["img"], z["img_const"]]), torch.cat([z["mask"]]*2))
    close(both, torch.cat([z["out"], z["out_const"]]), atol=3e-6)

@pytest.mark.parametrize("i,size", [(1,(320,320)), (2,(375,500)), (3,(320,320)), (4,(340,512))])
def test_upsample(i, size):
    z = load("scale_cam_small")
    step = int(z["stride"][i-1])
    close(upsample_cam(z[f"in{i}"][None], size)[0,::step,::step], z[f"out{i}"], atol=1e-5)

@pytest.mark.parametrize("phase", ["rfm_pre", "rfm_post"])
def test_pieces_in_training(phase):
    z = load(phase)
    img = normalised(load("inputs_train")["images"])
    hires = upsample_cam(z["refined"], (320,320))
    close(hires[:,::4,::4], z["hires_sub"], atol=1e-5)
    scores = with_background(group(hires, IMG_IDX, 4))
    close(scores[:,0,::4,::4], z["bg_score_sub"], atol=1e-5)
    close(scores[2,:,::2,::2], z["par_in_img2"], atol=1e-5)
    close(par(img[2:3], scores[2:3])[0,:,::2,::2], z["par_out_img2"], atol=2e-5)

@pytest.mark.parametrize("phase", ["rfm_pre", "rfm_post"])
def test_labels_in_training(phase):
    z = load(phase)
    img = normalised(load("inputs_train")["images"])
    labels = pseudo_labels(z["refined"], img, IMG_IDX, z["keys"].long(), (320,320))
    assert labels.dtype == torch.long
    assert (labels != z["labels"]).double().mean() <= 1e-4
    assert torch.equal(labels, pseudo_labels(z["refined"], img, IMG_IDX, z["keys"].long(), (320,320), k=3))

def test_labels_in_validation():
    z = load("val_375x500")
    img = F.interpolate(normalised(z["image"][None]), tuple(z["in_hw"].tolist()), mode="bilinear", align_corners=False)
    close(img[0,:,::8,::8], z["x_sub"], atol=1e-4)
    pair = torch.tensor([0,0])
    scores = with_background(group(upsample_cam(z["refined"], (375,500)), pair, 1))
    close(scores[0,:,::5,::5], z["par_in_sub"], atol=1e-5)
    scores = par(img, scores)
    close(scores[0,:,::5,::5], z["par_out_sub"], atol=5e-5)
    labels = winner(scores, pair, z["class_set"] - 1)
    assert (labels[0] != z["labels"]).double().mean() <= 1e-4
