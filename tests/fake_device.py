"""A CUDA device that is not there: what the package would launch on one, and what it would wait for.

PyTorch's FakeTensorMode places tensors on "cuda" and refuses to mix devices; a log on top of it counts operations. A
child process runs the cases, with a small library in front of PyTorch's that answers what autograd's engine asks CUDA.

    python tests/fake_device.py                  # every case: launches and waits
    python tests/fake_device.py step dynamic     # cases whose names hold one of these words, line by line
    python tests/fake_device.py --write          # all of them, into nbs/7_speed/launches.json

No kernel runs, so this sees no number, no time and no memory. Every `.item()` is answered with a constant: code behind
a condition on the device's numbers runs on one side only. One operation that fills a CUDA tensor counts as one launch,
though some kernels are several (a sort) or none (an empty tensor). Waits inside of libraries, of the allocator and of
the driver are not seen; nor is the order of streams.
"""
import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

STUB = """
/* What autograd's engine asks CUDA before it runs: how many devices are there, has one of them a context? */
int fake_devices = 0;
int _ZN3c104cuda17hasPrimaryContextEa(signed char device) { return 0; }
signed char _ZN3c104cuda12device_countEv(void) { return fake_devices; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 0; return 0; }
signed char _ZN3c104cuda25device_count_ensure_non_zeroEv(void) { return 1; }
"""

# ---- the child: a log of operations, on a device that PyTorch believes in

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import weclip

PACKAGE = str(Path(weclip.__file__).parent)
TORCH = str(Path(torch.__file__).parent)
STAGES = {
    f"{PACKAGE}/method/clip.py": "encoder",
    f"{PACKAGE}/method/cam.py": "GradCAM",
    f"{PACKAGE}/method/rfm.py": "RFM",
    f"{PACKAGE}/method/par.py": "PAR",
    f"{PACKAGE}/method/decoder.py": "decoder",
    f"{PACKAGE}/method/losses.py": "losses",
    f"{TORCH}/amp/grad_scaler.py": "optimiser"}
SHAPES = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
          "repeat_interleave.Tensor", "histc")
MEMORY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh")

def frames():
    "(file, line) of the calls that led here, innermost first."
    frame = sys._getframe(1)
    while frame:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back

def in_optimiser(file): return file.startswith(f"{TORCH}/optim/") or file.endswith("clip_grad.py")

class Log(TorchDispatchMode):
    "Launches on CUDA by line and by stage, and what the host waits for."
    def __init__(self):
        super().__init__()
        self.pinned = {}      # address of a storage -> the storage, so that the address stays its own
        self.within = None    # stage whose backward pass runs
        self.capturing = False
        self.clear()

    def clear(self):
        self.lines = Counter()
        self.stages = Counter()
        self.waits = Counter()  # (kind, operation, line)
        self.mixed = Counter()

    def snapshot(self): return dict(lines=self.lines, stages=self.stages, waits=self.waits, mixed=self.mixed)

    def line(self):
        "Innermost line of the package."
        for file, number in frames():
            if file.startswith(PACKAGE): return f"{os.path.basename(file)}:{number}"
        return self.within or "outside"

    def stage(self):
        "Outermost stage on the stack; a backward pass runs on a thread of its own."
        found = None
        for file, _ in frames():
            found = "optimiser" if in_optimiser(file) else STAGES.get(file, found)
        return found or self.within or "other"

    def wait(self, kind, name):
        if self.capturing: raise RuntimeError(f"{self.line()}: {name} waits while a CUDA graph is captured")
        self.waits[kind, name, self.line()] += 1

    def launch(self):
        if self.capturing: return
        self.lines[self.line()] += 1
        self.stages[self.stage()] += 1

    def pin(self, tensor):
        storage = tensor.untyped_storage()
        self.pinned[storage._cdata] = storage
        return tensor

    def is_pinned(self, tensor): return tensor.untyped_storage()._cdata in self.pinned

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = str(op).removeprefix("aten.").removesuffix(".default")
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name == "_local_scalar_dense" and isinstance(given[0], FakeTensor): return self.scalar(given[0])
        if name == "equal" and any(t.is_cuda for t in given):
            self.wait("item", name)
            return True
        self.look_at_inputs(name, args, given)
        pin = kwargs.get("pin_memory")
        if pin:
            kwargs["pin_memory"] = False
        out = op(*args, **kwargs)
        if pin:
            self.pin(out)
        if name.startswith(("_to_copy", "copy_")):
            self.look_at_copy(name, args, kwargs, out)
        is_new = name.split(".")[0] not in MEMORY and not is_view(op)
        filled = tree_leaves(out)
        if op._schema.is_mutable:
            filled += given  # lists of tensors are filled in place
        if is_new and any(isinstance(t, Tensor) and t.is_cuda for t in filled):
            self.launch()
        return out

    def scalar(self, tensor):
        "What `.item()` answers."
        if tensor.is_cuda:
            self.wait("item", "item")
        if tensor.dtype == torch.bool: return False
        if not tensor.dtype.is_floating_point: return 1
        is_step = not tensor.is_cuda or any(file.startswith(f"{TORCH}/optim/") for file, _ in frames())
        return float(is_step)  # counters of steps divide; overflows and losses of the device are 0

    def look_at_inputs(self, name, args, given):
        base = name.split(".")[0]
        on_cuda = [t for t in given if t.is_cuda]
        on_host = [t for t in given if t.device.type == "cpu"]
        if not on_cuda: return
        if name.startswith(SHAPES):
            self.wait("shape", name)
        if base in ("index", "index_put", "index_put_", "_index_put_impl_"):
            self.look_at_index(base, args)
        elif base == "where" and any(t.dim() == 0 for t in on_host):
            self.wait("to device", f"{name} of a scalar on the host")
        elif base not in ("copy_", "_to_copy") and any(t.dim() for t in on_host):
            self.mixed[name, self.line()] += 1

    def look_at_index(self, base, args):
        indices = [t for t in args[1] if isinstance(t, Tensor)]
        if args[0].is_cuda and any(not t.is_cuda for t in indices):
            self.wait("to device", f"{base} with an index on the host")
        is_mask = any(t.dtype in (torch.bool, torch.uint8) for t in indices)
        if is_mask and (base == "index" or args[2].numel() > 1):
            self.wait("shape", f"{base} with a mask")

    def look_at_copy(self, name, args, kwargs, out):
        "Page-locked memory and non_blocking together do without a wait; so does a new host tensor, non_blocking."
        is_in_place = name.startswith("copy_")
        source, target = (args[1], args[0]) if is_in_place else (args[0], out)
        if source.device.type == target.device.type: return
        flag = args[2] if is_in_place and len(args) > 2 else kwargs.get("non_blocking", False)
        host = source if target.is_cuda else target
        is_locked = self.is_pinned(host) or (not is_in_place and not target.is_cuda)
        if flag and is_locked: return
        kind = "to device" if target.is_cuda else "to host"
        how = "" if is_locked else "pageable "
        self.wait(kind, f"{how}{tuple(source.shape)} {str(source.dtype).removeprefix('torch.')}")

def is_view(op):
    returns = op._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)

class Mode(FakeTensorMode):
    "Never touches the driver, even while `torch.cuda.is_available` is told to say yes."
    avoid_device_init = True

class Graph:
    "In the place of torch.cuda.CUDAGraph: its capture launches nothing, a replay is one launch."
    log = None
    def __init__(self, *args, **kwargs): pass
    def capture_begin(self, *args, **kwargs): self.log.capturing = True
    def capture_end(self): self.log.capturing = False
    def replay(self): self.log.launch()
    def pool(self): return 0, 0
    def reset(self): pass

class Stream:
    "In the place of torch.cuda.Stream and torch.cuda.Event."
    log = None
    def __init__(self, *args, **kwargs): pass
    def __enter__(self): return self
    def __exit__(self, *args): pass
    def synchronize(self): self.log.wait("sync", "synchronize")
    def query(self): return True
    def elapsed_time(self, other): return 1.
    def record_event(self, event=None): return event or Stream()
    def wait_stream(self, stream): pass
    def wait_event(self, event): pass
    def record(self, stream=None): pass
    def wait(self, stream=None): pass

def as_numpy(tensor):
    kind = str(tensor.dtype).removeprefix("torch.")
    return np.zeros(tuple(tensor.shape), kind)

def fake_numpy(self, *, force=False):
    "Zeros; refused where a tensor on a device would refuse."
    if self.is_cuda: raise TypeError(f"can't convert {self.device} device type tensor to numpy")
    if self.requires_grad: raise RuntimeError("Can't call numpy() on Tensor that requires grad")
    return as_numpy(self)

def moved(module, *args, **kwargs):
    "`nn.Module.to` for a module of fake tensors."
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    def new(t):
        kind = dtype if dtype and t.dtype.is_floating_point else t.dtype
        return torch.empty(t.shape, dtype=kind, device=device or t.device)
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            part._parameters[name] = nn.Parameter(new(p), requires_grad=p.requires_grad)
        for name, b in part.named_buffers(recurse=False):
            part._buffers[name] = new(b)
    return module

def engine(log):
    "Autograd's engine, which hears of devices while it runs."
    count = ctypes.c_int.in_dll(ctypes.CDLL(None), "fake_devices")
    run = torch.autograd.graph._engine_run_backward
    def call(*args, **kwargs):
        was = count.value, log.within
        stage = log.stage()
        log.within = "backward" if stage == "other" else stage
        count.value = 127  # what stands in for CUDA's guard claims as many
        try:
            return run(*args, **kwargs)
        finally:
            count.value, log.within = was
    return call

def patches(log):
    "What PyTorch would ask the driver for."
    def tolist(self):
        if self.is_cuda:
            log.wait("item", "tolist")
        return as_numpy(self).tolist()
    def pin(self, device=None): return log.pin(self)
    def is_pinned(self, device=None): return log.is_pinned(self)
    def synchronize(device=None): log.wait("sync", "torch.cuda.synchronize")
    run = engine(log)
    kinds = [Tensor, nn.Parameter, FakeTensor]  # those of which an optimiser takes many at once
    cuda = dict(
        is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0, is_initialized=lambda: False,
        _lazy_init=lambda: None, get_device_capability=lambda *a: (9, 0), get_device_name=lambda *a: "fake",
        is_bf16_supported=lambda *a, **k: True, manual_seed=lambda *a: None, manual_seed_all=lambda *a: None,
        synchronize=synchronize, max_memory_allocated=lambda *a: 2**30, reset_peak_memory_stats=lambda *a: None,
        CUDAGraph=Graph, Stream=Stream, Event=Stream, current_stream=lambda *a: Stream(), stream=lambda s: s,
        graph_pool_handle=lambda: (0, 0), is_current_stream_capturing=lambda: log.capturing)
    found = [mock.patch.object(torch.cuda, name, value) for name, value in cuda.items()]
    tensor = dict(pin_memory=pin, is_pinned=is_pinned, record_stream=lambda *a: None)
    found += [mock.patch.object(Tensor, name, value) for name, value in tensor.items()]
    found += [mock.patch.object(FakeTensor, "numpy", fake_numpy), mock.patch.object(FakeTensor, "tolist", tolist)]
    return [*found, mock.patch.object(nn.Module, "to", moved), mock.patch.object(Graph, "log", log), mock.patch.object(Stream, "log", log),
            mock.patch.object(torch.autograd, "_engine_run_backward", run),
            mock.patch.object(torch.autograd.graph, "_engine_run_backward", run),
            mock.patch.object(torch.accelerator, "is_available", lambda: True),
            mock.patch.object(torch.accelerator, "current_accelerator", lambda *a, **k: torch.device("cuda")),
            mock.patch("torch.optim.optimizer._foreach_supported_types", kinds),
            mock.patch("torch.utils._foreach_utils._foreach_supported_types", kinds),
            mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            mock.patch("torch._subclasses.fake_tensor.init_gpu_context", lambda *a: None, create=True)]

@contextmanager
def fake_cuda():
    "Within: a CUDA device, and the log of what is done on it."
    log = Log()
    with ExitStack() as stack:
        stack.enter_context(Mode(allow_non_fake_inputs=True))
        for patch in patches(log):
            stack.enter_context(patch)
        stack.enter_context(log)
        yield log

# ---- the cases

def new_model(**settings):
    "ViT-B/16 with random weights on the fake device, under the released VOC settings."
    from weclip.speed.bench import inputs
    model, _, image = inputs(False, 320, "cuda")
    model.cfg = replace(model.cfg, **settings)
    return model, image

TAGS = [8], [5, 19], [0, 10], [10]  # of four pictures: six pairs

def photographs(folder):
    "Four drawn pictures with masks, as a training set."
    from weclip.speed.bench import pictures
    from PIL import Image
    data = pictures(4, folder, (375, 500))
    masks = {}
    for i in data.ids:
        masks[i] = Path(folder)/f"{i}.png"
        Image.fromarray(np.zeros((375, 500), np.uint8)).save(masks[i])
    return replace(data, tags=dict(zip(data.ids, map(list, TAGS))), masks=masks)

def really(make):
    "A generator whose items are made of real tensors, outside of the fake device."
    def feed(*args, **kwargs):
        items = make(*args, **kwargs)
        while True:
            with unset_fake_temporarily():
                item = next(items)
            yield item
    return feed

def trained(log, iterations=(1, 3), resumed=False, cache=None, loss=None, **settings):
    "Snapshots of the log over some iterations of `train`, of which the third and later are dynamic."
    from weclip.engine import train as page
    seen = {}
    def on_step(i, output):
        if i in iterations:
            seen[i] = log.snapshot()
        log.clear()
    with TemporaryDirectory() as folder, mock.patch.object(page, "batches", really(page.batches)):
        with unset_fake_temporarily():
            data = photographs(folder)
        model, _ = new_model(iters=100, switch=2, **settings)
        out = Path(folder)/"run"
        out.mkdir()
        if resumed:
            opt = page.optimiser(model, model.cfg)
            for p in model.decoder.parameters():
                p.grad = torch.zeros_like(p)
            opt.step()
            page.save_checkpoint(out/"checkpoint.pt", model, opt, 2, [], page.loss_scaler(model))
        def stop(i, output):
            on_step(i, output)
            if i == max(iterations): raise KeyboardInterrupt
        extra = dict(loss=loss) if loss else {}
        try:
            page.train(model, data, out, resume=resumed, cache=cache and Path(folder)/"cache", log_every=1000,
                       every=1000, on_step=stop, progress=False, **extra)
        except KeyboardInterrupt:
            pass
    return seen

def training_steps(log):
    for amp in ("off", "bf16", "fp16"):
        seen = trained(log, amp=amp)
        yield f"static step, {amp}", seen[1]
        yield f"dynamic step, {amp}", seen[3]

CASES = dict(step=training_steps)

def count(wanted=()):
    for name, case in CASES.items():
        if wanted and not any(w in name for w in wanted): continue
        with fake_cuda() as log:
            for title, seen in case(log):
                show(title, seen)

def show(title, seen):
    print(f"== {title}: {sum(seen['lines'].values())} launches, {sum(seen['waits'].values())} waits")
    print("  ", dict(seen["stages"]))
    for (kind, name, line), n in sorted(seen["waits"].items()):
        print(f"   wait {n:4d} {line:20s} {kind} {name}")
    for (name, line), n in seen["mixed"].items():
        print(f"   MIXED {n:4d} {line:20s} {name}")
    for line, n in seen["lines"].most_common(40):
        print(f"   {n:5d} {line}")

def compiled(folder):
    "The stub as a library, which takes the place of the driver's: every function of that PyTorch's one refers to."
    nvrtc = Path(TORCH)/"lib"/"libcaffe2_nvrtc.so"
    symbols = subprocess.run(["nm", "-D", "--undefined-only", nvrtc], check=True, text=True, capture_output=True).stdout
    names = {name for name in re.findall(r"\bU (cu[A-Z]\w*)", symbols)}
    driver = [f"int {name}(void) {{ return 100; }}" for name in sorted(names - {"cuDevicePrimaryCtxGetState"})]
    source = Path(folder)/"stub.c"
    source.write_text("\n".join([STUB, *driver]))
    library = source.with_suffix(".so")
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    return library

def parent(args):
    with TemporaryDirectory() as folder:
        library = compiled(folder)
        environment = os.environ | dict(LD_PRELOAD=str(library), FAKE_DEVICE="1", OMP_NUM_THREADS="1")
        return subprocess.run([sys.executable, __file__, *args], env=environment).returncode

if __name__ == "__main__":
    if "FAKE_DEVICE" in os.environ:
        count(sys.argv[1:])
    else:
        sys.exit(parent(sys.argv[1:]))
