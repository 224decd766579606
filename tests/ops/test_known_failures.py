"""Known failures of comparable projects, each with a test that it does not happen here.

The docstrings name the issues. Tests that need a GPU carry the `gpu` marker; everything that can be
shown without one is tested without.
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

CSRC = Path(__file__).parents[2] / "csrc"
PACKAGE = Path(backends.__file__).parent
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GPU_BACKENDS = ["cuda", "triton"]
needs_sources = pytest.mark.skipif(not CSRC.exists(), reason="no sources next to the tests")
needs_library = pytest.mark.skipif(not library.CPU.path, reason=str(library.CPU.reason))


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
def test_autograd_notices_what_is_overwritten(device: str) -> None:
    """Liger-Kernel#272, #343, unsloth#5002: logits overwritten without autograd's knowledge."""
    logits, target, coef = rows(device=device)
    before = logits.clone()
    leaf = logits.requires_grad_()
    ops.signed_cross_entropy(leaf, target, coef).sum().backward()
    assert torch.equal(leaf.detach(), before)
    weight = torch.ones(1, requires_grad=True, device=device)
    hidden = step_state(device)["x"] * weight
    entropy = hidden.softmax(1).log().sum() + (hidden * hidden).sum()  # saves hidden
    version = hidden._version
    ops.ascent_step_(**{**step_state(device), "x": hidden.detach()})
    assert hidden._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        entropy.backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999, 0.9999])
def test_half_precision_keeps_the_gradient_of_a_confident_row(
    device: str, dtype: torch.dtype, p: float
) -> None:
    """Liger-Kernel PR #1268: the true class's gradient was lost to rounding at p = 0.999."""
    logits = torch.zeros(1, 10)
    logits[0, 3] = float(torch.logit(torch.tensor(p))) + torch.log(torch.tensor(9.0))
    logits, target = logits.to(dtype).to(device), torch.tensor([3], device=device)
    coef = torch.ones(1, device=device)
    _, grad = ops.signed_cross_entropy_and_grad(logits, target, coef)
    _, exact = reference.signed_cross_entropy(logits.double(), target, coef.double())
    rounding = 2**-11 if dtype == torch.float16 else 2**-8
    torch.testing.assert_close(grad.double(), exact, rtol=1.1 * rounding, atol=1e-7)
    assert grad[0, 3] < 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shift", [1e3, 1e4, 1e5, 1e6])
def test_a_common_offset_does_not_change_the_loss(device: str, shift: float) -> None:
    """PyTorch PR #195829, mlx#4188: (m + log d) - x_y rounds the loss away."""
    logits = torch.tensor([[2.0, -1.0]], device=device)
    target, coef = torch.tensor([0], device=device), torch.ones(1, device=device)
    loss = ops.signed_cross_entropy(logits + shift, target, coef).sum()
    torch.testing.assert_close(loss.item(), 0.04858735157374196, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_all_rows_ignored_is_zero(device: str) -> None:
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
def test_the_loss_does_not_need_a_gradient(device: str) -> None:
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
def test_any_incoming_gradient_and_a_second_backward_pass(device: str) -> None:
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


def test_row_offsets_do_not_wrap_on_the_cpu() -> None:
    """triton#6748, fla#1080, mamba#1015: row times stride in 32 bits. For the GPU, see the test
    below and test_gpu_code_without_gpu.py."""
    stride = 2**30 + 8  # three rows span 2**31 elements, but touch few pages of them
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
def test_row_offsets_do_not_wrap_on_the_gpu(backend: str) -> None:
    """More than 2**31 elements in one matrix."""
    storage = torch.empty(2**31 + 2**20, dtype=torch.bfloat16, device="cuda")
    small, target, coef = rows(3, device="cuda")
    view = storage.as_strided((3, 10), (2**30 + 8, 1))
    view.copy_(small)
    got = ops.signed_cross_entropy_and_grad(view, target, coef, backend=backend)
    expected = ops.signed_cross_entropy_and_grad(small.bfloat16(), target, coef, backend=backend)
    assert torch.equal(got[1], expected[1])


@needs_sources
def test_no_32_bit_sizes_in_the_step() -> None:
    """apex#1654, DeepSpeed#7640: a fused Adam beyond INT_MAX elements crashed or did nothing."""
    for source in ("ascent_step.h", "checks.h", "cpu/kernels.h", "cpu/ascent_step.cpp",
                   "cpu/ascent_step_kernel.h", "cuda/ascent_step.cu"):  # fmt: skip
        code = re.sub(r"//.*", "", (CSRC / source).read_text())
        for name in ("row_size", "rows", "channels", "plane", "blocks_per_row", "group", "first"):
            declared = rf"\b(int|int32_t|unsigned|uint32_t)\s+{name}\b"
            assert not re.search(declared, code), (source, name)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_a_step_beyond_int_max_elements(backend: str) -> None:
    """The last of more than 2**31 elements moves."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    state = step_state("cuda", (1, 1))
    big = [torch.zeros(2049, 2**20 + 16, device="cuda") for _ in range(3)]
    state.update(
        x=big[0], exp_avg=big[1], exp_avg_sq=big[2], grad=torch.ones_like(big[0]),
        step=torch.zeros(2049, dtype=torch.int32, device="cuda"),
        active=torch.ones(2049, dtype=torch.bool, device="cuda"),
    )  # fmt: skip
    ops.ascent_step_(**state, backend=backend)
    assert (state["x"][-1] > 0.09).all()
    assert (state["x"][0] > 0.09).all()


def test_cpu_tensors_never_reach_a_gpu_kernel() -> None:
    """triton#2441, mamba#593: "Pointer argument cannot be accessed from Triton (cpu tensor?)"."""
    args = rows()
    for backend in GPU_BACKENDS:
        if backends.why_unavailable(backend, "cpu") is None:  # type: ignore[arg-type]
            continue
        with pytest.raises(ops.BackendUnavailable, match=f"backend '{backend}' on cpu"):
            ops.signed_cross_entropy(*args, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_kernels_run_on_the_device_of_their_tensors(backend: str) -> None:
    """Runs on cuda:1 while cuda:0 is current, and refuses mixed devices."""
    logits, target, coef = rows(device="cuda")
    with pytest.raises(RuntimeError):
        ops.signed_cross_entropy(logits, target.cpu(), coef, backend="cuda")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    args = tuple(t.to("cuda:1") for t in (logits, target, coef))
    got = ops.signed_cross_entropy(*args, backend=backend)
    assert got.device.index == 1
    torch.testing.assert_close(got.cpu(), ops.signed_cross_entropy(*rows()))


@needs_library
def test_the_library_needs_no_symbol_that_a_torch_upgrade_removes() -> None:
    """flash-attention#975, #1644, ao#2901: undefined symbol after an upgrade. check_torch_211.sh
    runs the same wheel under torch 2.11."""
    assert library.CPU.path
    names = library.CPU.path.read_bytes().decode("latin1")
    assert "aoti_torch_" in names
    assert not re.search(r"_ZNK?(3c10|2at|5torch3jit)\d", names)


def test_a_missing_library_has_a_reason() -> None:
    """gsplat#249, ml-sharp#52: `_C` is None, and a crash much later. test_build.py tests installs
    without nvcc, without a compiler and without torch."""
    for lib in (library.CPU, library.CUDA):
        assert lib.loaded or lib.reason
    if not torch.cuda.is_available():
        with pytest.raises(ops.BackendUnavailable, match="backend 'cuda'"):
            ops.signed_cross_entropy(*rows(), backend="cuda")


@needs_library
def test_the_cpu_library_does_not_need_cuda() -> None:
    """pytorch#187320: a stable-ABI library still depends on the CUDA major version."""
    assert library.CPU.path
    content = library.CPU.path.read_bytes()
    for needed in (b"libcudart", b"libtorch_cuda", b"libc10_cuda"):
        assert needed not in content


@needs_sources
def test_every_launch_names_its_stream() -> None:
    """pytorch#114048, mirage#207, pytorch#157363: a kernel on the default stream vanishes from a
    captured graph."""
    places = {
        source.name: re.findall(r"<<<(.*?)>>>", source.read_text(), re.S)
        for source in (CSRC / "cuda").glob("*.cu*")
    }
    launches = {name: found for name, found in places.items() if found}
    assert launches
    assert set(launches) == {"launch.cuh"}  # where the guard and the stream are
    assert all(args.endswith(", stream.stream") for args in launches["launch.cuh"])
    code = (CSRC / "cuda" / "launch.cuh").read_text()
    assert code.count("LAUNCH_CHECK()") >= len(launches["launch.cuh"])
    assert "DeviceGuard guard" in code


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_a_captured_step_replays_on_new_inputs(backend: str) -> None:
    """Each replay reads the new inputs."""
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
        new = scale * rows(device="cuda")[0]
        logits.copy_(new)
        graph.replay()
        expected = ops.signed_cross_entropy_and_grad(new, target, coef, backend=backend)
        assert torch.equal(losses, expected[0])
        assert torch.equal(grad, expected[1])


def test_no_op_reads_a_device_value_from_python() -> None:
    """tritonbench PR #477, Liger PR #1292: `.item()` in a loss cannot be captured."""
    for source in PACKAGE.rglob("*.py"):
        code = re.sub(r'""".*?"""', "", source.read_text(), flags=re.S)
        if source.name == "reference.py":  # reads targets on the CPU only, to name the invalid one
            start, end = code.index('if x.device.type == "cpu"'), code.index("y = torch")
            code = code[:start] + code[end:]
        assert not re.search(r"\.item\(|\.tolist\(|bool\(\w+\.any|torch\.equal", code), source.name


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_no_op_waits_for_the_device(backend: str) -> None:
    """Every op runs in sync-debug mode "error"."""
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


def test_what_changes_per_step_is_a_tensor() -> None:
    """pytorch#76368, #106802: a captured graph froze the step count or the learning rate."""
    arguments = torch.ops.zsu_fast.ascent_step_.default._schema.arguments
    types = {a.name: str(a.type) for a in arguments}
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
def test_replays_follow_new_rates_and_count_steps(backend: str) -> None:
    """50 replays with a changing lr equal 50 eager calls, bit for bit."""
    captured, eager = step_state("cuda"), step_state("cuda")
    ops.ascent_step_(**step_state("cuda"), backend=backend)  # warm-up
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
def test_layouts_do_not_change_the_result(device: str) -> None:
    """apex PR #1568: a non-contiguous input gave a random result. The op tests try all layouts."""
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


def test_the_interpreter_is_never_the_automatic_choice() -> None:
    """triton#5895, #4972: the interpreter hides races that the GPU shows. So Triton is never the
    automatic choice on the CPU, and no kernel reads what another program writes."""
    assert "triton" not in backends.PREFERENCE["cpu"]
    for source in (PACKAGE / "triton").glob("*.py"):
        assert "atomic" not in re.sub(r'""".*?"""|#.*', "", source.read_text(), flags=re.S)


@pytest.mark.gpu
def test_triton_on_the_gpu_agrees_with_cuda() -> None:
    """Runs the compiled kernel 20 times: the interpreter cannot show races."""
    logits, target, coef = rows(4096, 1001, "cuda")
    expected = ops.signed_cross_entropy_and_grad(logits, target, coef, backend="cuda")
    for _ in range(20):
        got = ops.signed_cross_entropy_and_grad(logits, target, coef, backend="triton")
        torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)


@needs_library
def test_no_pybind() -> None:
    """pytorch#152243: py_limited_api and pybind are incompatible. torch.ops loads the library."""
    assert library.CPU.path
    assert ".abi3." in library.CPU.path.name
    content = library.CPU.path.read_bytes()
    assert b"pybind11" not in content
    assert b"libtorch_python" not in content
    assert "zsu_fast._C_cpu" not in sys.modules
