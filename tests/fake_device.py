"""A CUDA device that is not there: what the package launches on one, and what its host waits for.

PyTorch's FakeTensorMode places tensors without contents on "cuda" and refuses to mix devices. A log on top of it
counts operations. The process needs a small library in front of PyTorch's, which answers what autograd's engine asks
CUDA; `run` compiles it and starts such a process. `launches.py` holds the cases.

What cannot be seen so: numbers, time and memory, since no kernel runs; waits inside of libraries, of the allocator
and of the driver; whether streams are ordered well. Every `.item()` is answered with a constant, so that code behind
a condition on the device's numbers runs on one side only. An operation that fills a CUDA tensor counts as one launch,
though some are several kernels (a sort, a list of more than a hundred tensors) and cuDNN or cuBLAS may add their own.
"""
import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException, FakeTensor, FakeTensorMode, unset_fake_temporarily)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import weclip

# ---- a process in which PyTorch finds a driver that does nothing

STUB = """
/* What autograd's engine asks before it runs: how many devices are there, has one of them a context? */
int fake_devices = 0;
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 0; return 0; }
int _ZN3c104cuda17hasPrimaryContextEa(signed char device) { return 0; }
signed char _ZN3c104cuda12device_countEv(void) { return fake_devices; }
signed char _ZN3c104cuda25device_count_ensure_non_zeroEv(void) { return 1; }
"""
TORCH = Path(torch.__file__).parent
NVRTC = TORCH/"lib"/"libcaffe2_nvrtc.so"  # what PyTorch opens when it first asks the driver
INTERNALS = (
    "torch._C._select_conv_backend", "torch.autograd.graph._engine_run_backward",
    "torch.optim.optimizer._foreach_supported_types", "torch.utils._foreach_utils._foreach_supported_types",
    "torch.cuda.amp.common.amp_definitely_not_available", "torch.accelerator.is_available")

def missing():
    "Why there can be no such process here; empty where there can."
    tools = [name for name in ("gcc", "nm") if not shutil.which(name)]
    if sys.platform != "linux": return "the fake device needs Linux"
    if tools: return f"the fake device needs {' and '.join(tools)}"
    if not NVRTC.exists(): return f"PyTorch {torch.__version__} is built without CUDA"
    for name in INTERNALS:
        module, _, attribute = name.rpartition(".")
        if not hasattr(sys.modules.get(module), attribute): return f"PyTorch {torch.__version__} has no {name}"
    return ""

def compiled(folder):
    "The library: the stub, and in the driver's place every function of it that PyTorch refers to."
    symbols = subprocess.run(["nm", "-D", "--undefined-only", NVRTC], check=True, text=True, capture_output=True).stdout
    names = set(re.findall(r"\bU (cu[A-Z]\w*)", symbols)) - {"cuDevicePrimaryCtxGetState"}
    driver = [f"int {name}(void) {{ return 100; }}" for name in sorted(names)]  # 100: no device
    source = Path(folder)/"stub.c"
    source.write_text("\n".join([STUB, *driver]))
    library = source.with_suffix(".so")
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    return library

def run(script, *args, **how):
    "A script in a process with the library in front; `how` as in `subprocess.run`."
    with TemporaryDirectory() as folder:
        settings = dict(LD_PRELOAD=str(compiled(folder)), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
        env = os.environ | settings
        env.pop("COVERAGE_PROCESS_START", None)  # it would take twice as long
        return subprocess.run([sys.executable, script, *args], env=env, **how)

def preloaded():
    "The stub's number of devices; None in a process without the library."
    try:
        return ctypes.c_int.in_dll(ctypes.CDLL(None), "fake_devices")
    except ValueError:
        return None

# ---- the log

PACKAGE = Path(weclip.__file__).parent
STAGES = {  # file -> stage of a training step
    str(PACKAGE/"method"/"clip.py"): "encoder",
    str(PACKAGE/"method"/"cam.py"): "GradCAM",
    str(PACKAGE/"method"/"rfm.py"): "RFM",
    str(PACKAGE/"method"/"par.py"): "PAR",
    str(PACKAGE/"method"/"decoder.py"): "decoder",
    str(PACKAGE/"method"/"losses.py"): "losses",
    str(TORCH/"amp"/"grad_scaler.py"): "optimiser",
    str(TORCH/"nn"/"utils"/"clip_grad.py"): "optimiser"}
OPTIMISERS = f"{TORCH}/optim/"
# sizes of results that depend on numbers
SHAPES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "histc"}
MEMORY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}
MAY_MIX = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_", "where"}

def frames():
    "(file, line) of the calls that led here, innermost first."
    frame = sys._getframe(1)
    while frame:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back

@cache
def name_of(op): return str(op).removeprefix("aten.").split(".")[0]

@cache
def is_kernel(op):
    "Does it compute? Else it gives memory, or another look at it."
    returns = op._schema.returns
    is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return not is_view and name_of(op) not in MEMORY

def is_tensor(x): return isinstance(x, Tensor)

LAPS = 3  # of a case; the first steps set up what the later ones use

class Enough(Exception):
    "Ends a case."

class Log(TorchDispatchMode):
    "Launches on CUDA by line and by stage, and what the host waits for."
    def __init__(self):
        super().__init__()
        self.pinned = {}        # address of a storage -> the storage, whose address nobody else gets then
        self.inside = None      # stage whose backward pass runs
        self.capturing = False  # a CUDA graph
        self.laps = []
        self.clear()

    def clear(self):
        self.lines = Counter()   # file:line
        self.stages = Counter()
        self.waits = Counter()   # (kind, operation, file:line)
        self.mixed = Counter()   # (operation, file:line)

    def snapshot(self): return self.lines, self.stages, self.waits, self.mixed

    def lap(self):
        "A step ends here; the third ends the case."
        self.laps.append(self.snapshot())
        self.clear()
        if len(self.laps) == LAPS: raise Enough

    def line(self):
        "Innermost line of the package."
        ours = f"{PACKAGE}/"
        for file, number in frames():
            if file.startswith(ours): return f"{file.removeprefix(ours)}:{number}"
        return self.inside or "outside"

    def stage(self):
        "Outermost stage on the stack: GradCAM runs a block of the encoder. A backward pass has a thread of its own."
        found = None
        for file, _ in frames():
            found = "optimiser" if file.startswith(OPTIMISERS) else STAGES.get(file, found)
        return found or self.inside or "other"

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
        if op.namespace == "prim": return op(*args, **kwargs)  # where does a tensor lie?
        name = name_of(op)
        given = list(filter(is_tensor, tree_leaves((args, kwargs))))
        self.look_at_inputs(op, name, args, given)
        if name == "_local_scalar_dense" and isinstance(given[0], FakeTensor): return self.answer(given[0])
        if name == "equal" and any(isinstance(t, FakeTensor) for t in given): return True
        if name == "bincount":
            classes = args[2] if len(args) > 2 else kwargs["minlength"]
            return given[0].new_zeros(classes)
        is_locked = kwargs.get("pin_memory")
        if is_locked:
            kwargs["pin_memory"] = False  # a driver would have to lock it
        out = op(*args, **kwargs)
        if is_locked:
            self.pin(out)
        if name in ("copy_", "_to_copy"):
            self.look_at_copy(name, args, kwargs, out)
        if is_kernel(op):
            filled = filter(is_tensor, tree_leaves(out)) if op._schema.returns else given  # or lists, in place
            if any(t.is_cuda for t in filled):
                self.launch()
        return out

    def answer(self, tensor):
        "What `.item()` says: no overflow and no loss, but a step, by which optimisers divide."
        if tensor.dtype == torch.bool: return False
        if not tensor.dtype.is_floating_point: return 1
        is_step = any(file.startswith(OPTIMISERS) for file, _ in frames())
        return 1. if is_step or not tensor.is_cuda else 0.

    def look_at_inputs(self, op, name, args, given):
        on_host = [t for t in given if t.device.type == "cpu"]
        if len(on_host) == len(given): return
        if name in ("_local_scalar_dense", "equal"):
            self.wait("item", name)
        elif name in SHAPES or str(op) == "aten.repeat_interleave.Tensor":
            self.wait("shape", name)
        elif name.endswith(("index", "index_put", "index_put_", "_index_put_impl_")):
            self.look_at_index(name, args)
        elif name == "where" and any(t.dim() == 0 for t in on_host):
            self.wait("to device", "where, of a scalar on the host")
        if name not in MAY_MIX and any(t.dim() for t in on_host):
            self.mixed[name, self.line()] += 1

    def look_at_index(self, name, args):
        indices = list(filter(is_tensor, args[1]))
        if any(not t.is_cuda for t in indices):
            self.wait("to device", f"{name}, by an index on the host")
        is_mask = any(t.dtype in (torch.bool, torch.uint8) for t in indices)
        if is_mask and (name == "index" or args[2].numel() > 1):
            self.wait("shape", f"{name}, by a mask")

    def look_at_copy(self, name, args, kwargs, out):
        "Only page-locked memory and `non_blocking` together do without a wait; PyTorch locks new memory on the host."
        is_new = name == "_to_copy"
        source, target = (args[0], out) if is_new else (args[1], args[0])
        if source.device.type == target.device.type: return
        is_asked = kwargs.get("non_blocking", args[2] if not is_new and len(args) > 2 else False)
        host = source if target.is_cuda else target
        is_locked = self.is_pinned(host) or is_new and is_asked and not target.is_cuda
        if is_asked and is_locked: return
        kind = "to device" if target.is_cuda else "to host"
        memory = "page-locked" if is_locked else "pageable"
        self.wait(kind, f"{memory} {tuple(source.shape)} {str(source.dtype).removeprefix('torch.')}")

# ---- what PyTorch would ask the driver for

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
    def synchronize(self): self.log.wait("item", "synchronize")
    def query(self): return True
    def elapsed_time(self, end): return 1.
    def record_event(self, event=None): return event or Stream()
    def wait_stream(self, stream): pass
    def wait_event(self, event): pass
    def record(self, stream=None): pass
    def wait(self, stream=None): pass

def zeros(tensor): return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

def as_numpy(self, *, force=False):
    "`Tensor.numpy`, refused where it would be."
    if self.is_cuda: raise TypeError(f"can't convert {self.device} device type tensor to numpy")
    if self.requires_grad: raise RuntimeError("Can't call numpy() on Tensor that requires grad")
    return zeros(self)

def moved(module, *args, **kwargs):
    "`nn.Module.to`, which cannot swap the contents of fake tensors."
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    def new(t):
        is_cast = dtype is not None and t.dtype.is_floating_point
        return torch.empty(t.shape, dtype=dtype if is_cast else t.dtype, device=device or t.device)
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            part._parameters[name] = nn.Parameter(new(p), requires_grad=p.requires_grad)
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = new(buffer)
    return module

def saver(save):
    "`torch.save` of fake tensors, as zeros."
    def real(x): return torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, FakeTensor) else x
    def call(state, file):
        with unset_fake_temporarily():
            save(tree_map(real, state), file)
    return call

def fused(plain):
    "`scaled_dot_product_attention` as a card has it, in one kernel; fake tensors would go through its parts."
    def call(query, key, value, attn_mask=None, dropout_p=0., is_causal=False, scale=None, enable_gqa=False):
        inputs = query, key, value
        if not query.is_cuda: return plain(*inputs, attn_mask, dropout_p, is_causal, scale=scale)
        if torch.is_autocast_enabled("cuda"):
            inputs = [x.to(torch.get_autocast_dtype("cuda")) for x in inputs]
            attn_mask = None if attn_mask is None else attn_mask.to(inputs[0].dtype)
        keeps_sums = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        bias = None if attn_mask is None else attn_mask.expand(*query.shape[:-1], key.shape[-2])
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(*inputs, bias, keeps_sums, dropout_p, is_causal, scale=scale)[0]
    return call

def engine(log):
    "Autograd's engine, which hears of devices while it runs."
    devices = preloaded()
    backward = torch.autograd.graph._engine_run_backward
    def call(*args, **kwargs):
        before = log.inside
        stage = log.stage()
        log.inside = "backward" if stage == "other" else stage
        devices.value = 127  # what stands in for CUDA's guard claims as many
        try:
            return backward(*args, **kwargs)
        finally:
            devices.value = 0
            log.inside = before
    return call

def device_functions(log):
    "Of torch.cuda."
    def synchronize(device=None): log.wait("item", "torch.cuda.synchronize")
    return dict(
        is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0, is_initialized=lambda: False,
        _lazy_init=lambda: None, get_device_capability=lambda *a: (9, 0), get_device_name=lambda *a: "fake",
        is_bf16_supported=lambda *a, **k: True, manual_seed=lambda *a: None, manual_seed_all=lambda *a: None,
        max_memory_allocated=lambda *a: 2**30, reset_peak_memory_stats=lambda *a: None, synchronize=synchronize,
        CUDAGraph=Graph, Stream=Stream, Event=Stream, current_stream=lambda *a: Stream(), stream=lambda s: s,
        graph_pool_handle=lambda: (0, 0), is_current_stream_capturing=lambda: log.capturing)

def tensor_functions(log):
    "Of torch.Tensor."
    def pin_memory(self, device=None): return log.pin(self)
    def is_pinned(self, device=None): return log.is_pinned(self)
    return dict(pin_memory=pin_memory, is_pinned=is_pinned, record_stream=lambda *a: None)

def elsewhere(log):
    "By their names."
    def tolist(self):
        if self.is_cuda:
            log.wait("item", "tolist")
        return zeros(self).tolist()
    kinds = [Tensor, nn.Parameter, FakeTensor]  # of which an optimiser takes many at once
    fakes = "torch._subclasses.fake_tensor"
    return {
        f"{fakes}.FakeTensor.numpy": as_numpy,
        f"{fakes}.FakeTensor.tolist": tolist,
        f"{fakes}.init_gpu_context": lambda *a: None,
        "torch.nn.Module.to": moved,
        "torch.save": saver(torch.save),
        "torch.nn.functional.scaled_dot_product_attention": fused(F.scaled_dot_product_attention),
        "torch.autograd._engine_run_backward": engine(log),
        "torch.autograd.graph._engine_run_backward": engine(log),
        "torch.accelerator.is_available": lambda: True,
        "torch.accelerator.current_accelerator": lambda *a, **k: torch.device("cuda"),
        "torch.optim.optimizer._foreach_supported_types": kinds,
        "torch.utils._foreach_utils._foreach_supported_types": kinds,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch._C._select_conv_backend": lambda *a, **k: torch._C._ConvBackend.Cudnn}

@contextmanager
def fake_cuda():
    "Within: a CUDA device, and the log of what is done on it."
    log = Log()
    patches = [mock.patch.object(torch.cuda, name, new) for name, new in device_functions(log).items()]
    patches += [mock.patch.object(Tensor, name, new) for name, new in tensor_functions(log).items()]
    patches += [mock.patch(name, new, create=True) for name, new in elsewhere(log).items()]
    patches += [mock.patch.object(kind, "log", log) for kind in (Graph, Stream)]
    with ExitStack() as stack:
        stack.enter_context(Mode(allow_non_fake_inputs=True))
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(log)
        yield log

# ---- does the log see what it is for?

class WaitsBackwards(torch.autograd.Function):
    "The identity, whose backward pass asks for a number."
    @staticmethod
    def forward(ctx, x): return x.clone()

    @staticmethod
    def backward(ctx, slope):
        slope.sum().item()
        return slope

def backward_pass(x): WaitsBackwards.apply(x.requires_grad_()).sum().backward()

def captured(f):
    "Replayed twice from a CUDA graph."
    def call(x):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            f(x)
        graph.replay()
        graph.replay()
    return call

def sent(x, non_blocking=True, pin=True):
    there = torch.ones(2, pin_memory=pin)
    return there.view(1, 2).to(x.device, non_blocking=non_blocking)

def received(x):
    here = x.to("cpu", non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return here

PROBES = {  # what is done with x, two numbers on the device: its launches, the kinds of its waits
    "three operations": (lambda x: ((x + 1)*2).view(1, 2).sum(), 3, []),
    "lists of tensors": (lambda x: torch._foreach_add_([x, x], 1), 1, []),
    "page-locked memory": (lambda x: sent(x), 1, []),
    "page-locked memory, waited for": (lambda x: sent(x, non_blocking=False), 1, ["to device"]),
    "pageable memory": (lambda x: sent(x, pin=False), 1, ["to device"]),
    "a list": (lambda x: torch.tensor([1, 2], device=x.device), 1, ["to device"]),
    "to the host": (lambda x: x.cpu(), 0, ["to host"]),
    "to the host, waited for later": (received, 0, ["item"]),
    "a number": (lambda x: x.sum().item(), 1, ["item"]),
    "a condition": (lambda x: bool((x > 0).all()), 2, ["item"]),
    "numbers": (lambda x: x.tolist(), 0, ["item"]),
    "equal": (lambda x: x.equal(x), 0, ["item"]),
    "places": (lambda x: x.nonzero(), 0, ["shape"]),
    "a mask": (lambda x: x[x > 0], 1, ["shape"]),
    "a mask that is filled": (lambda x: x.masked_fill_(x > 0, 1), 2, []),
    "an index on the host": (lambda x: x[torch.tensor([0])], 1, ["to device"]),
    "a choice": (lambda x: torch.where(x > 0, x, 1.), 3, []),
    "a wait in a backward pass": (backward_pass, 5, ["item"]),
    "attention": (lambda x: F.scaled_dot_product_attention(*[x.view(1, 1, 1, 2)]*3), 1, []),
    "a graph": (captured(lambda x: (x + 1)*2), 2, ["item"]),
    "mixed devices": (lambda x: x + torch.ones(2), 0, "FakeTensorDeviceMismatchError"),
    "an array": (lambda x: x.numpy(), 0, "TypeError"),
    "a wait in a graph": (captured(lambda x: x.sum().item()), 0, "RuntimeError")}

def probed(log, f):
    "Launches, and the kinds of waits or the error."
    x = torch.ones(2).to("cuda")
    log.clear()
    try:
        f(x)
    except DynamicOutputShapeException:
        pass  # of a shape that depends on numbers
    except Exception as e:
        return [log.lines.total(), type(e).__name__]
    return [log.lines.total(), [kind for kind, _, _ in log.waits]]

def unseen(log):
    "What the log gets wrong."
    wrong = []
    for name, (f, *expected) in PROBES.items():
        found = probed(log, f)
        if found != expected:
            wrong.append(f"{name}: expected {expected}, got {found}")
    log.capturing = False
    return wrong
