"""Eighteen failures of comparable projects, each with the test that keeps us from it.

The numbers are those of the table in the project's notes on kernels; the issue is named in each
docstring. What needs a GPU carries the `gpu` marker; what can be shown without one is shown.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zsu_fast import ops
from zsu_fast.ops import backends, library, reference

ROOT = Path(__file__).parents[2]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GPU_BACKENDS = ["cuda", "triton"]


def rows(n: int = 6, classes: int = 10, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(n, classes, generator=generator)
    target = torch.arange(n) % classes
    coef = torch.where(torch.arange(n) % 2 == 0, -0.9, 0.1) / n
    return logits.to(device), target.to(device), coef.to(device)


def step_state(device: str = "cpu", shape: tuple[int, ...] = (4, 3, 8, 8)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    n = shape[0]
    state = {
        "x": x, "grad": grad, "exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape),
        "step": torch.zeros(n, dtype=torch.int32), "active": torch.ones(n, dtype=torch.bool),
        "low": torch.tensor(-2.0), "high": torch.tensor(2.0), "lr": torch.tensor(0.1),
        "beta": torch.tensor(0.01),
    }  # fmt: skip
    return {k: v.to(device) for k, v in state.items()}


@pytest.mark.parametrize("device", DEVICES)
def test_01_in_place_gradients_are_seen_by_autograd(device: str) -> None:
    """Liger-Kernel#272, #343, unsloth#5002: logits overwritten behind autograd's back."""
    logits, target, coef = rows(device=device)
    before = logits.clone()
    leaf = logits.requires_grad_()
    ops.signed_cross_entropy(leaf, target, coef).sum().backward()
    assert torch.equal(leaf.detach(), before)  # out of place by default
    state = step_state(device)
    weight = torch.ones(1, requires_grad=True, device=device)
    hidden = state["x"] * weight
    entropy = hidden.softmax(1).log().sum() + (hidden * hidden).sum()  # saves hidden
    version = hidden._version
    ops.ascent_step_(**{**state, "x": hidden.detach()})
    assert hidden._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        entropy.backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999, 0.9999])
def test_02_half_precision_keeps_the_gradient_of_a_confident_row(
    device: str, dtype: torch.dtype, p: float
) -> None:
    """Liger-Kernel PR #1268: the true class's gradient was lost to rounding at p = 0.999."""
    classes = 10
    logits = torch.zeros(1, classes)
    logits[0, 3] = float(torch.logit(torch.tensor(p))) + torch.log(torch.tensor(classes - 1.0))
    logits, target = logits.to(dtype).to(device), torch.tensor([3], device=device)
    coef = torch.ones(1, device=device)
    _, grad = ops.signed_cross_entropy_and_grad(logits, target, coef)
    _, exact = reference.signed_cross_entropy(logits.double(), target, coef.double())
    rounding = 2**-11 if dtype == torch.float16 else 2**-8
    torch.testing.assert_close(grad.double(), exact, rtol=1.1 * rounding, atol=1e-7)
    assert grad[0, 3] < 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shift", [1e3, 1e4, 1e5, 1e6])
def test_03_a_common_offset_does_not_change_the_loss(device: str, shift: float) -> None:
    """PyTorch PR #195829, mlx#4188: (m + log d) - x_y rounds the loss away."""
    logits = torch.tensor([[2.0, -1.0]], device=device)
    target, coef = torch.tensor([0], device=device), torch.ones(1, device=device)
    loss = ops.signed_cross_entropy(logits + shift, target, coef).sum()
    torch.testing.assert_close(loss.item(), 0.04858735157374196, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_04_all_rows_ignored_is_zero(device: str) -> None:
    """pytorch#70348, #75181, #116349: a mean over no rows is NaN."""
    logits, target, _ = rows(device=device)
    leaf = logits.requires_grad_()
    nothing = torch.zeros(6, device=device)
    losses = ops.signed_cross_entropy(leaf, torch.full_like(target, -100), nothing)
    losses.sum().backward()
    assert losses.tolist() == [0, 0]
    assert leaf.grad is not None
    assert (leaf.grad == 0).all()
    leaf = logits.detach().requires_grad_()
    forget = torch.zeros(10, dtype=torch.bool, device=device)
    loss = ops.masked_cross_entropy(leaf, logits.detach() * torch.nan, forget, nothing)
    loss.backward()
    assert loss.item() == 0
    assert leaf.grad is not None
    assert (leaf.grad == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_05_the_loss_does_not_need_a_gradient(device: str) -> None:
    """Liger-Kernel#507: the loss was 0 when nothing required grad."""
    logits, target, coef = rows(device=device)
    with_grad = ops.signed_cross_entropy(logits.clone().requires_grad_(), target, coef)
    with torch.no_grad():
        without = ops.signed_cross_entropy(logits, target, coef)
    with torch.inference_mode():
        inference = ops.signed_cross_entropy(logits, target, coef)
    assert without.abs().min() > 0
    assert torch.equal(without, with_grad)
    assert torch.equal(inference, without)


@pytest.mark.parametrize("device", DEVICES)
def test_06_any_incoming_gradient_and_a_second_backward_pass(device: str) -> None:
    """Liger-Kernel PR #435, #421, #680, #678: only a gradient of 1 was right."""
    logits, target, coef = rows(device=device)
    leaf = logits.requires_grad_()
    losses = ops.signed_cross_entropy(leaf, target, coef)
    _, unit = reference.signed_cross_entropy(logits.detach(), target, coef)
    for forget, retain in ((1.0, 1.0), (0.0, 1.0), (-3.0, 0.5), (1.0, 1.0)):
        incoming = torch.tensor([forget, retain], device=device)
        (grad,) = torch.autograd.grad(losses, leaf, incoming, retain_graph=True)
        factor = torch.where(coef < 0, forget, retain)[:, None]
        torch.testing.assert_close(grad, unit * factor)


def test_07_row_offsets_do_not_wrap_on_the_cpu() -> None:
    """triton#6748, fla#1080, mamba#1015: row times stride in 32 bits. (GPU: the TTIR and source
    tests in test_gpu_code_without_gpu.py, and the gpu test below.)"""
    stride = 2**30 + 8  # three rows reach past 2**31 elements, of which only their pages exist
    storage = torch.empty(2 * stride + 10, dtype=torch.bfloat16)
    view = storage.as_strided((3, 10), (stride, 1))
    small, target, coef = rows(3)
    view.copy_(small)
    for got, expected in zip(
        ops.signed_cross_entropy_and_grad(view, target, coef),
        ops.signed_cross_entropy_and_grad(small.bfloat16(), target, coef),
        strict=True,
    ):
        assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_07_row_offsets_do_not_wrap_on_the_gpu(backend: str) -> None:
    """More than 2**31 elements in one matrix."""
    storage = torch.empty(2**31 + 2**20, dtype=torch.bfloat16, device="cuda")
    small, target, coef = rows(3, device="cuda")
    view = storage.as_strided((3, 10), (2**30 + 8, 1))
    view.copy_(small)
    got = ops.signed_cross_entropy_and_grad(view, target, coef, backend=backend)
    expected = ops.signed_cross_entropy_and_grad(small.bfloat16(), target, coef, backend=backend)
    assert torch.equal(got[1], expected[1])


def test_08_no_32_bit_sizes_in_the_step() -> None:
    """apex#1654, DeepSpeed#7640: a fused Adam beyond INT_MAX elements crashed or did nothing."""
    for source in ("ascent_step.h", "checks.h", "cpu/kernels.h", "cpu/ascent_step.cpp",
                   "cpu/ascent_step_kernel.h", "cuda/ascent_step.cu"):  # fmt: skip
        path = ROOT / "csrc" / source
        if not path.exists():
            pytest.skip("no sources next to the tests")
        code = re.sub(r"//.*", "", path.read_text())
        for name in ("row_size", "rows", "channels", "plane", "blocks_per_row", "group", "first"):
            narrow = re.search(rf"\b(int|int32_t|unsigned|uint32_t)\s+{name}\b", code)
            assert not narrow, (source, name)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_08_a_step_beyond_int_max_elements(backend: str) -> None:
    """The last row of 2**31 + 16 elements moves."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    size = 2**20 + 16
    state = step_state("cuda", (1, 1))
    big = {k: torch.zeros(2049, size, device="cuda") for k in ("x", "exp_avg", "exp_avg_sq")}
    grad = torch.ones(2049, size, device="cuda")
    state.update(
        **big, grad=grad, step=torch.zeros(2049, dtype=torch.int32, device="cuda"),
        active=torch.ones(2049, dtype=torch.bool, device="cuda"),
    )  # fmt: skip
    ops.ascent_step_(**state, backend=backend)
    assert (state["x"][-1] > 0.09).all()
    assert (state["x"][0] > 0.09).all()


def test_09_cpu_tensors_never_reach_a_gpu_kernel() -> None:
    """triton#2441, mamba#593: "Pointer argument cannot be accessed (cpu tensor?)"."""
    args = rows()
    for backend in GPU_BACKENDS:
        if backends.why_unavailable(backend, "cpu") is None:  # type: ignore[arg-type]
            continue
        with pytest.raises(ops.BackendUnavailable, match=f"backend '{backend}' on cpu"):
            ops.signed_cross_entropy(*args, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_09_kernels_run_on_the_device_of_their_tensors(backend: str) -> None:
    """A tensor on cuda:1 while cuda:0 is current; mixed devices say so."""
    logits, target, coef = rows(device="cuda")
    with pytest.raises(RuntimeError):
        ops.signed_cross_entropy(logits, target.cpu(), coef, backend="cuda")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    args = tuple(t.to("cuda:1") for t in (logits, target, coef))
    got = ops.signed_cross_entropy(*args, backend=backend)
    assert got.device.index == 1
    torch.testing.assert_close(got.cpu(), ops.signed_cross_entropy(*rows()))


def test_10_the_library_asks_for_no_symbol_that_a_torch_upgrade_removes() -> None:
    """flash-attention#975, #1644, ao#2901: undefined symbol after an upgrade. The same wheel under
    torch 2.11 is benchmarks/check_torch_211.sh; here, its undefined symbols."""
    if not library.CPU.path:
        pytest.skip(str(library.CPU.reason))
    names = library.CPU.path.read_bytes().decode("latin1")
    assert "aoti_torch_" in names
    assert not re.search(r"_ZNK?(3c10|2at|5torch3jit)\d", names)


def test_11_a_missing_library_has_a_reason() -> None:
    """gsplat#249, ml-sharp#52: `_C` is None, and a crash much later. (Installs without nvcc, a
    compiler or torch: tests/test_build.py.)"""
    for lib in (library.CPU, library.CUDA):
        assert lib.loaded or lib.reason
    if not torch.cuda.is_available():
        with pytest.raises(ops.BackendUnavailable, match="backend 'cuda'"):
            ops.signed_cross_entropy(*rows(), backend="cuda")


def test_12_the_cpu_library_does_not_need_cuda() -> None:
    """pytorch#187320: a stable-ABI library still depends on the CUDA major. Ours are two."""
    if not library.CPU.path:
        pytest.skip(str(library.CPU.reason))
    content = library.CPU.path.read_bytes()
    for needed in (b"libcudart", b"libtorch_cuda", b"libc10_cuda"):
        assert needed not in content


def test_13_every_launch_names_its_stream() -> None:
    """pytorch#114048, mirage#207, pytorch#157363: a kernel on the default stream vanishes from a
    captured graph."""
    sources = list((ROOT / "csrc" / "cuda").glob("*.cu"))
    if not sources:
        pytest.skip("no sources next to the tests")
    for source in sources:
        code = source.read_text()
        launches = re.findall(r"<<<(.*?)>>>", code, re.S)
        assert launches
        assert all(re.search(r"stream\s*$|current_stream\(\w+\)\s*$", args) for args in launches)
        assert code.count("LAUNCH_CHECK()") >= len(launches)
        assert code.count("DeviceGuard guard") >= 1


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_13_a_captured_step_replays_on_new_inputs(backend: str) -> None:
    """Replays change the output; a side stream is respected."""
    logits, target, coef = rows(device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            ops.signed_cross_entropy_and_grad(logits, target, coef, backend=backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses, grad = ops.signed_cross_entropy_and_grad(logits, target, coef, backend=backend)
    for scale in (1.0, 2.0):
        fresh = scale * rows(device="cuda")[0]
        logits.copy_(fresh)
        graph.replay()
        expected = ops.signed_cross_entropy_and_grad(fresh, target, coef, backend=backend)
        assert torch.equal(losses, expected[0])
        assert torch.equal(grad, expected[1])


def test_14_no_op_reads_a_device_value_from_python() -> None:
    """tritonbench PR #477, Liger PR #1292: `.item()` in a loss cannot be captured."""
    package = Path(backends.__file__).parent
    for source in package.rglob("*.py"):
        code = re.sub(r'""".*?"""', "", source.read_text(), flags=re.S)
        if source.name == "reference.py":  # reads targets on the CPU only, to name the bad one
            start, end = code.index('if x.device.type == "cpu"'), code.index("y = torch")
            code = code[:start] + code[end:]
        assert not re.search(r"\.item\(|\.tolist\(|bool\(\w+\.any|torch\.equal", code), source.name


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_14_no_op_waits_for_the_device(backend: str) -> None:
    """Everything under sync-debug mode "error"."""
    logits, target, coef = rows(device="cuda")
    state = step_state("cuda")
    forget = torch.zeros(10, dtype=torch.bool, device="cuda")
    leaf = logits.clone().requires_grad_()
    run = lambda: (  # noqa: E731
        ops.signed_cross_entropy(leaf, target, coef, backend=backend).sum().backward(),
        ops.masked_cross_entropy(leaf, logits, forget, coef, backend=backend).backward(),
        ops.ascent_step_(**state, backend=backend),
    )
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_15_what_changes_per_step_is_a_tensor() -> None:
    """pytorch#76368, #106802: a graph froze the step count or the learning rate."""
    schema = torch.ops.zsu_fast.ascent_step_.default._schema
    types = {a.name: str(a.type) for a in schema.arguments}
    for name in ("step", "active", "lr", "beta", "low", "high"):
        assert types[name] == "Tensor"
    state = step_state()
    ops.ascent_step_(**state)
    first = state["x"].clone()
    state["lr"].zero_()
    state["beta"].zero_()
    ops.ascent_step_(**state)
    assert torch.equal(state["x"], first.clamp(-2, 2))
    assert (state["step"] == 2).all()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_15_replays_follow_new_rates_and_count_steps(backend: str) -> None:
    """50 replays with a changing lr equal 50 eager calls, bit for bit."""
    captured, eager = step_state("cuda"), step_state("cuda")
    warm = step_state("cuda")
    ops.ascent_step_(**warm, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.ascent_step_(**captured, backend=backend)
    for i in range(50):
        for state in (captured, eager):
            state["lr"].fill_(0.1 / (1 + i))
        graph.replay()
        ops.ascent_step_(**eager, backend=backend)
    assert (captured["step"] == 50).all()
    for name in ("x", "exp_avg", "exp_avg_sq"):
        assert torch.equal(captured[name], eager[name])


@pytest.mark.parametrize("device", DEVICES)
def test_16_layouts_do_not_change_the_result(device: str) -> None:
    """apex PR #1568: a non-contiguous input gave a random result. (All layouts: the op tests.)"""
    logits, target, coef = rows(device=device)
    expected = ops.signed_cross_entropy_and_grad(logits, target, coef)
    got = ops.signed_cross_entropy_and_grad(logits.t().contiguous().t(), target, coef)
    assert torch.equal(got[1], expected[1])
    plain, last = step_state(device), step_state(device)
    for name in ("x", "exp_avg", "exp_avg_sq"):
        last[name] = last[name].contiguous(memory_format=torch.channels_last)
    ops.ascent_step_(**plain)
    ops.ascent_step_(**last)
    torch.testing.assert_close(last["x"], plain["x"], rtol=1e-6, atol=1e-6)


def test_17_the_interpreter_is_never_chosen_for_you() -> None:
    """triton#5895, #4972: the interpreter agrees where the GPU does not. It cannot see races, so no
    automatic choice on the CPU is Triton, and no kernel reads what another program writes."""
    assert "triton" not in backends.PREFERENCE["cpu"]
    package = Path(backends.__file__).parent / "triton"
    for source in package.glob("*.py"):
        assert "atomic" not in re.sub(r'""".*?"""|#.*', "", source.read_text(), flags=re.S)


@pytest.mark.gpu
def test_17_triton_on_the_gpu_agrees_with_cuda() -> None:
    """What the interpreter cannot vouch for, 20 times over."""
    logits, target, coef = rows(4096, 1001, "cuda")
    expected = ops.signed_cross_entropy_and_grad(logits, target, coef, backend="cuda")
    for _ in range(20):
        got = ops.signed_cross_entropy_and_grad(logits, target, coef, backend="triton")
        torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)


def test_18_no_pybind() -> None:
    """pytorch#152243: py_limited_api and pybind do not go together. We load by torch.ops."""
    if not library.CPU.path:
        pytest.skip(str(library.CPU.reason))
    assert ".abi3." in library.CPU.path.name
    content = library.CPU.path.read_bytes()
    assert b"pybind11" not in content
    assert b"libtorch_python" not in content
    assert "zsu_fast._C_cpu" not in sys.modules
