"""Linear layers with an adapter as one node: values and gradients against float64, written from the formula; what is
left to PEFT; and planted bugs."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from helpers.tiny_models import tiny_model
from lowmem_kernels import IGNORE_INDEX
from peft import LoraConfig, get_peft_model

import lowmem_npo.memory.adapted_linear as adapted_linear
from lowmem_npo.config import AdapterConfig
from lowmem_npo.memory.adapted_linear import AdaptedLinear, join_adapters
from lowmem_npo.model.adapters import attach_lora, extra_adapter, original_model
from lowmem_npo.model.modes import train_adapter
from lowmem_npo.model.precision import compute_autocast

D, E, RANK, SCALE = 96, 64, 4, 1.5


def adapted(dtype=torch.bfloat16, four_bit=False, bias=True, **settings):
    """A linear layer of width 96 -> 64 with an adapter of rank 4, and both of its matrices drawn at random."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(D, E, bias=bias, dtype=dtype)
    if four_bit:
        from bitsandbytes.nn import Linear4bit, Params4bit

        quantised = Linear4bit(D, E, bias=bias, compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
        quantised.load_state_dict(layer.state_dict())
        quantised.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        layer = quantised.to("cpu")
    model = torch.nn.Sequential(layer)
    config = LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=["0"], **settings)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
        if "lora" in name:
            parameter.data = 0.2 * torch.randn_like(parameter, dtype=torch.float32)
    module = model.base_model.model[0]
    module.cast_input_dtype_enabled = False
    return model, module


def run(module, x, upstream, dtype):
    """y and the gradients of x, A and B."""
    down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        y = module(x)
    return y, *torch.autograd.grad(y, [x, down, up], upstream)


def exact(module, x, upstream):
    """The same in float64, by the definition of LoRA."""
    base = module.get_base_layer()
    weight = base.weight if base.weight.is_floating_point() else dequantize_4bit(base.weight, base.weight.quant_state)
    bias = 0 if base.bias is None else base.bias.detach().double()
    x, down, up = (
        t.detach().double().requires_grad_()
        for t in (x, module.lora_A["default"].weight, module.lora_B["default"].weight)
    )
    y = x @ weight.detach().double().T + bias + SCALE * ((x @ down.T) @ up.T)
    return y, *torch.autograd.grad(y, [x, down, up], upstream.double())


def errors(module, dtype, shape=(2, 7, D), x_dtype=None):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, generator=g).to(x_dtype or dtype).requires_grad_()
    upstream = torch.randn(*shape[:-1], E, generator=g).to(dtype)
    pairs = zip(run(module, x, upstream, dtype), exact(module, x, upstream), strict=True)
    return [float((ours.detach().double() - true).norm() / true.norm()) for ours, true in pairs]


@pytest.mark.parametrize("four_bit", [False, True], ids=["16 bits", "4 bits"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)], ids=str)
def test_values_and_gradients_are_those_of_float64(dtype, limit, bias, four_bit):
    model, module = adapted(dtype, four_bit, bias)
    by_peft = errors(module, dtype)
    join_adapters(model)
    assert isinstance(module.forward, AdaptedLinear)
    ours = errors(module, dtype)
    assert max(ours) <= limit
    assert all(error <= 1.3 * theirs + 1e-6 for error, theirs in zip(ours, by_peft, strict=True)), "worse than PEFT"
    assert max(errors(module, dtype, (1, 1, D))) <= 2 * limit


def test_float32_rows_of_a_16_bit_model():
    """As LayerNorm hands them over on CUDA; their gradient is float32 as well."""
    model, module = adapted()
    join_adapters(model)
    x = torch.randn(3, D, requires_grad=True)
    y, x_grad, *_ = run(module, x, torch.ones(3, E, dtype=torch.bfloat16), torch.bfloat16)
    assert y.dtype == torch.bfloat16 and x_grad.dtype == torch.float32
    assert max(errors(module, torch.bfloat16, x_dtype=torch.float32)) <= 6e-3


@pytest.mark.parametrize("four_bit", [False, True], ids=["16 bits", "4 bits"])
def test_the_type_is_that_of_the_layer_itself(four_bit):
    """A 4-bit layer answers in the type in which it was asked, as without an adapter."""
    model, module = adapted(four_bit=four_bit)
    x = torch.randn(3, D)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        by_peft = module(x).dtype
        join_adapters(model)
        joined = module(x).dtype
        with original_model(model):
            assert joined == module(x).dtype == by_peft == (torch.float32 if four_bit else torch.bfloat16)
    if four_bit:
        assert max(errors(module, torch.bfloat16, x_dtype=torch.float32)) <= 6e-3


@pytest.mark.parametrize("four_bit", [False, True], ids=["16 bits", "4 bits"])
def test_an_identity_adapter_gives_the_bits_of_the_base(four_bit):
    model, module = adapted(four_bit=four_bit)
    join_adapters(model)
    torch.nn.init.zeros_(module.lora_B["default"].weight)
    x = torch.randn(5, D).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
        with torch.no_grad(), original_model(model):
            assert torch.equal(module(x), y)


def test_left_to_peft():
    """Dropout, DoRA, a bias of the adapter, a merged layer, a base that is trained; a second adapter while it lasts."""
    for settings in ({"use_dora": True}, {"lora_bias": True}):
        model, module = adapted(**settings)
        join_adapters(model)
        assert not isinstance(module.forward, AdaptedLinear)
    model, module = adapted()
    module.get_base_layer().weight.requires_grad_(True)
    join_adapters(model)
    assert not isinstance(module.forward, AdaptedLinear)

    model, module = adapted(lora_dropout=0.5)
    join_adapters(model)
    x = torch.randn(4, D).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model.train()
        dropped = [module(x) for _ in range(2)]
        model.eval()
        kept = [module(x) for _ in range(2)]
        plain = module.forward.plain(x)
        module.merge()
        merged = module(x)
    assert not torch.equal(*dropped) and torch.equal(*kept)
    for y in (kept[0], merged):
        assert (y - plain).norm() <= 1e-2 * plain.norm()


def test_an_extra_adapter_takes_part_while_it_is_there():
    lm = tiny_model("llama", 64)
    model = attach_lora(lm, AdapterConfig())
    join_adapters(model)
    ids = torch.arange(8)[None]
    with torch.no_grad(), compute_autocast(lm):
        before = model(ids).logits
        with extra_adapter(model, 2, seed=0):
            assert torch.allclose(model(ids).logits, before, rtol=1e-2, atol=1e-2)
            for name, parameter in model.named_parameters():
                if ".extra." in name:
                    parameter.normal_()
            assert not torch.allclose(model(ids).logits, before, rtol=1e-2, atol=1e-2)
        assert torch.equal(model(ids).logits, before)


def test_a_step_of_a_whole_model_agrees_with_peft():
    """Every linear layer of a decoder; gradients of both ways in float32."""
    gradients = []
    for join in (False, True):
        torch.manual_seed(0)
        model = attach_lora(tiny_model("llama", 64, torch.float32), AdapterConfig())
        train_adapter(model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        if join:
            join_adapters(model)
        labels = torch.arange(16)[None].clone()
        labels[:, :4] = IGNORE_INDEX
        model(torch.arange(16)[None], labels=labels).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    plain, joined = gradients
    assert (joined - plain).norm() <= 1e-5 * plain.norm()


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("alpha=scale", "alpha=1.0"),
        ("mul_(ctx.scale)\n        low_grad", "mul_(1.0)\n        low_grad"),
        ("low_grad.T @ rows", "low_grad.T @ rows / ctx.scale"),
        (".addmm_(low_grad, down", ".addmm_(low, down"),
    ],
)
def test_planted_bugs_are_noticed(right, wrong, tmp_path, monkeypatch):
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    source = Path(adapted_linear.__file__).read_text()
    assert source.count(right) == 1
    (tmp_path / "broken.py").write_text(source.replace(right, wrong))
    spec = spec_from_file_location("broken", tmp_path / "broken.py")
    broken = module_from_spec(spec)
    spec.loader.exec_module(broken)
    model, module = adapted()
    broken.join_adapters(model)
    assert max(errors(module, torch.bfloat16)) > 0.05
